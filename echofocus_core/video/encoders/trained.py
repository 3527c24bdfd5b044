"""PanEcho, and the encoders that embed/train.py trains."""

from contextlib import nullcontext

import numpy as np
import torch

from echofocus_core.video import backbones, panecho
from echofocus_core.video.clip_tensors import NORMALIZATIONS
from echofocus_core.video.decode import SAMPLINGS
from echofocus_core.video.encoders.base import ClipEncoder, WholeClips

TRAINED = "trained/"  # before the architecture, in the names of encoders other than PanEcho


def load_trained(weights="panecho", clip_len=16):
    """A LoadedEncoder like that of `load_panecho`, of any architecture that embed/train.py has."""
    return panecho.load_panecho(weights, clip_len, backbone_of)


def backbone_of(record):
    """The backbone of an EncoderRecord, with random weights."""
    shape = record.clip_len, record.layers, record.heads
    return backbones.build_backbone(record.model_name, record.arch, False, *shape)[0]


class Trained(ClipEncoder):
    """Clips as published for PanEcho: random starts, BGR, area resize.

    A FrameTransformer encodes the distinct images of a video once, see `distinct_images`.
    """

    licence, citation = "CC BY-NC-SA 4.0", "Holste et al., JAMA 2025"
    n_clips, stride = 16, 1

    def __init__(self, weights="", clip_len=16, size=224):
        weights = weights or "panecho"
        loaded = load_trained(weights, clip_len)
        self.model = loaded.model.encoder
        self.sha256, self.seen, self.record = loaded.sha256, loaded.seen, loaded.record
        self.weights, self.width = str(weights), self.model.width
        self.frames, self.size, self.cast = clip_len, size, False
        self.name, normalization = "PanEcho", "imagenet"
        if self.record:
            normalization, self.licence = self.record.normalization, self.record.licence
            if not self.record.is_panecho:
                video_model = self.record.model_name != "frame_transformer"
                kind = self.record.model_name if video_model else self.record.arch
                self.name, self.citation = f"{TRAINED}{kind}", ""
        self.mean, self.deviation = NORMALIZATIONS[normalization]
        self.shares_images = isinstance(self.model, panecho.FrameTransformer)
        self.convnext = self.shares_images and isinstance(self.model.encoder, panecho.ImageEncoder)

    def sampling(self, sampling, chosen):
        del chosen  # PanEcho's options have PanEcho's defaults
        return sampling

    def sampling_text(self, sampling):
        text = SAMPLINGS[sampling.starts]
        if (self.mean, self.deviation) != (panecho.MEAN, panecho.STD):
            text += f"; mean {list(self.mean)}, deviation {list(self.deviation)}"
        return text

    def prepare(self, device, dtype):
        """For a CPU the weights are packed, for images of `size`; for bf16 on a GPU they are cast
        once, LayerNorm's too, which autocast would compute in fp32."""
        self.model.to(device)
        kind = torch.device(device).type
        if not self.convnext:
            return
        if kind == "cpu" and panecho.can_pack(dtype):
            self.model.encoder.model.pack(dtype, self.size)
        elif kind == "cuda" and dtype == torch.bfloat16:
            self.model.encoder.model.features.to(dtype)
            self.cast = True

    def images_of_piece(self):
        return 1 if self.shares_images else self.frames

    def pieces(self, pictures, index):
        if self.shares_images:
            return PlaneImages(pictures, index, self)
        return WholeClips(self.normalise(pictures), index)

    def encode(self, batch):
        if not self.shares_images:
            return self.model(batch)
        with torch.autocast(batch.device.type, enabled=False) if self.cast else nullcontext():
            return self.model.encode_images(batch)


def distinct_images(index):
    """The distinct encoder images of a video's clips.

    index: (C clips, L) frame numbers. Returns the images as plane numbers (N, 3), a plane being
    3 * frame + channel, and (C, L) positions in that list. Clips that start a multiple of three
    frames apart share images (see `panecho.clip_planes`), and each is encoded once.
    """
    channel, position = np.moveaxis(panecho.clip_planes(index.shape[1]), -1, 0)  # (L, 3) each
    planes = 3 * index[:, position] + channel  # (C, L, 3)
    images, inverse = np.unique(planes.reshape(-1, 3), axis=0, return_inverse=True)
    return images, inverse.reshape(index.shape)


class PlaneImages:
    """The distinct images of a video as pieces of batches."""

    def __init__(self, pictures, index, encoder):
        self.encoder = encoder
        self.planes = pictures.permute(0, 3, 1, 2).flatten(0, 1)  # of (F, S, S, 3): (3 F, S, S)
        images, positions = distinct_images(index)  # of (copies * C, L)
        self.images = torch.from_numpy(images).to(pictures.device)
        self.positions = torch.from_numpy(positions).to(pictures.device)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, part):
        """Normalised images of a slice: float32 (n, 3, S, S)."""
        numbers = self.images[part]
        # A plane is normalised by its own channel, whatever its position in the image.
        statistics = self.encoder.mean, self.encoder.deviation
        return panecho.normalise(self.planes[numbers], numbers % 3, *statistics)

    def join(self, features):
        """Image features (n, width) -> clip embeddings (copies * C, width)."""
        return self.encoder.model.encode_clips(features[self.positions])
