"""The interface of encoders: what a clip is, and how a batch of clips becomes embeddings."""

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path

import torch

from echofocus_core.base.checkpoints import WeightsError, load_safely, load_strictly
from echofocus_core.base.console import UserError
from echofocus_core.base.files import sha256_file
from echofocus_core.video.decode import Pixels

EXTRA = "encoders"  # the optional dependencies of encoders in pyproject.toml


class ClipEncoder:
    """An encoder of clips of its own length, with its own pixels.

    A subclass sets the attributes below and `self.model`, and may change `encode`. docs/encoders.md
    has an example.
    """

    name = ""  # in the embedding files, and for --encoder
    licence = citation = ""
    width = 0  # features of an embedding
    frames, stride = 16, 2  # of a clip: its length, and frames of the video from one to the next
    padding = "repeat"  # of a video that is too short: its last frame, or "zeros" (normalised)
    n_clips = 1  # of a video, by default
    pixels = Pixels()  # a frame's picture: size, crop, order of the channels
    range = 1.0  # white, in the unit of mean and deviation: 1 or 255
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the channels in order
    # Of the weights; empty `sha256`: that of the model's parameters
    weights, sha256, seen, record = "", "", (), None

    model: torch.nn.Module

    def encode(self, clips):
        """Normalised clips float32 (n, 3, frames, size, size) -> (n, width)."""
        return self.model(clips)

    def pieces(self, pictures, index):
        """What a video sends through `encode`, see `Clips`.

        pictures: uint8 (F, size, size, 3) on the device. index: (n, frames) numpy, numbers of
        pictures; -1: zeros.
        """
        return WholeClips(self.normalise(pictures), index)

    def normalise(self, pictures):
        """uint8 (F, S, S, 3) -> float32 (F, 3, S, S)."""
        mean, deviation = (
            torch.tensor(v, device=pictures.device).view(3, 1, 1)
            for v in (self.mean, self.deviation)
        )
        return (pictures.permute(0, 3, 1, 2).float() * (self.range / 255) - mean) / deviation

    def prepare(self, device, dtype):
        """Move the model to a device. dtype: bfloat16 if `encode` will run in autocast."""
        self.model.to(device)

    def images_of_piece(self):
        """The number of images in a piece, for the size of batches."""
        return self.frames

    def sampling(self, sampling, chosen):
        """The Sampling of this encoder.

        sampling: that of the options. chosen: the names of options that the user gave.
        """
        for name, value in (("clip_len", self.frames), ("size", self.pixels.size)):
            if name in chosen and getattr(sampling, name) != value:
                raise UserError(
                    f"--{name} {getattr(sampling, name)}: {self.name} needs clips of {self.frames} "
                    f"frames of {self.pixels.size} x {self.pixels.size} pixels"
                )
        if sampling.augment:
            raise UserError(f"--augment is for PanEcho only, not for {self.name}")
        n_clips = sampling.n_clips if "n_clips" in chosen else self.n_clips
        changes = {"clip_len": self.frames, "size": self.pixels.size, "n_clips": n_clips}
        changes |= {"pixels": self.pixels, "stride": self.stride, "padding": self.padding}
        return type(sampling)(**vars(sampling) | changes)

    def sampling_text(self, sampling):
        """The record of how clips are sampled; embeddings with another text are not mixed."""
        p = self.pixels
        crop = "square crop; " * p.square + f"cut {p.cut:g}; " * bool(p.cut)
        resize = f"resize {p.resize} {p.filter}, crop" if p.resize else p.filter
        resize += " (floor)" * (p.floor and p.resize > 0)
        return (
            f"evenly spaced windows, stride {self.stride}; {p.order}; {crop}{resize}; "
            f"mean {list(self.mean)}, deviation {list(self.deviation)} of {self.range:g}; "
            f"padding {self.padding}"
        )

    def digest(self):
        """The SHA-256 that identifies the weights."""
        return self.sha256 or state_digest(self.model)


class ImageClips(ClipEncoder):
    """An image encoder: each frame is encoded once; an embedding is the mean over its frames."""

    def encode(self, images):
        """Normalised images float32 (n, 3, size, size) -> (n, width)."""
        return self.model(images)

    def pieces(self, pictures, index):
        return SingleImages(self.normalise(pictures), index)

    def images_of_piece(self):
        return 1


@dataclass
class WholeClips:
    """The clips of a video as pieces of batches."""

    images: torch.Tensor  # float32 (F, 3, S, S), normalised
    index: object  # int64 (n, frames) into images; -1: zeros

    def __post_init__(self):
        self.images = torch.cat([self.images, torch.zeros_like(self.images[:1])])  # -1: the last
        self.index = torch.from_numpy(self.index).to(self.images.device)

    def __len__(self):
        return len(self.index)

    def __getitem__(self, part):
        """(n, 3, frames, S, S) of a slice."""
        return self.images[self.index[part]].transpose(1, 2)

    def join(self, features):
        """The features of all pieces in order -> the embeddings (clips, width)."""
        return features


@dataclass
class SingleImages:
    """The distinct images of a video as pieces of batches."""

    images: torch.Tensor  # float32 (F, 3, S, S), normalised
    index: object  # int64 (n, frames) into images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, part):
        return self.images[part]

    def join(self, features):
        """The features (F, width) -> means over the frames of each clip (clips, width)."""
        return features[torch.from_numpy(self.index).to(features.device)].mean(1)


# ---------------------------------------------------------------------------------------- helpers


def state_digest(model):
    """SHA-256 of the names, types and bytes of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def library(module, package=""):
    """An optional module. The UserError names the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        raise UserError(
            f"this encoder needs {package}: pip install {package}, or the extra '{EXTRA}' "
            f"(pip install 'echofocus[{EXTRA}]')"
        ) from error


def untrained(build):
    """The result of `build()` with the same random weights on every call."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return build()


def load_weights(encoder, build, weights, *, source, state_of=lambda saved: saved):
    """Set the model, weights and digest of an encoder from a file, or at random for 'random'.

    build: makes the network. source: where the file can be obtained, for the error. state_of: the
    state dict in the content of the file. Raises WeightsError.
    """
    encoder.model = untrained(build)
    if weights != "random":
        path = str(weights)
        if not Path(path).is_file():
            raise WeightsError(f"{encoder.name} needs --weights FILE, {source}")
        state = state_of(load_safely(path))
        if not isinstance(state, dict):
            raise WeightsError(f"{path} has no weights of {encoder.name}")
        load_strictly(encoder.model, state, path, encoder.name)
        encoder.sha256 = sha256_file(path)
    encoder.weights = str(weights)
    encoder.model.eval().requires_grad_(False)
    return encoder
