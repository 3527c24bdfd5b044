"""PanEcho: the video encoder, in plain torch.

A clip of L frames becomes one 768-vector, the clip embedding:

    (B, 3, L, H, W) -> L images -> ConvNeXt-Tiny each -> (B, L, 768) + positions
                    -> 4-layer transformer -> mean over images -> (B, 768)

and 40 linear heads read it (EF, valve disease, ...). The state-dict names are those of the
published weights (image encoder: torchvision's ConvNeXt-Tiny), so that the release loads unchanged.
Reference: Holste et al., "Complete AI-Enabled Echocardiography Interpretation With Multitask Deep
Learning", JAMA 2025; Liu et al., "A ConvNet for the 2020s", CVPR 2022.

Inputs are normalised with `MEAN` and `STD`; see `video/decode.py` for the channel order that the
released study-level models expect.
"""

import hashlib
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from echofocus_core import EMBED_DIM
from echofocus_core.base.checkpoints import WeightsError, load_safely, load_strictly, save
from echofocus_core.base.console import RUN
from echofocus_core.base.download import fetch
from echofocus_core.base.files import sha256_file
from echofocus_core.base.releases import (
    SOURCE,
    check_digest,
    check_source,
    read_source,
    registry,
    registry_entry,
)
from echofocus_core.base.resume import differences
from echofocus_core.video.record import EncoderRecord, record_of

WEIGHTS_URL = "https://github.com/CarDS-Yale/PanEcho/releases/download/v1.0/panecho.pt"
DOWNLOADED = Path("trained_models/PanEcho/panecho.pt")  # by `echofocus.py download PanEcho`
MEAN = (0.485, 0.456, 0.406)  # ImageNet statistics, by channel as stored
STD = (0.229, 0.224, 0.225)
RANDOM_SHA256 = hashlib.sha256(b"random weights").hexdigest()  # names those of `random_weights`
CACHED_NUMBERS = 1_250_000  # of a block's hidden layer, computed at a time on a CPU: 5 MB in fp32
CONVNEXT_TINY = ((96, 3), (192, 3), (384, 9), (768, 3))  # (channels, blocks) of each stage

TASKS = json.loads(Path(__file__).with_name("panecho_tasks.json").read_text())
"""The 40 heads in order: name, type, class_names in output order, mean over the training labels,
unit of regressions."""

PUBLISHED = {"encoder": "panecho.model.", "study": "transformer."}  # of end-to-end checkpoints

POSITIVE_IS_SECOND = {  # binary heads trained on the normal class: 1 - sigmoid is the abnormal one
    "MVStenosis",
    "AVStructure",
    "RASize",
    "RVSystolicFunction",
    "LVWallThickness-increased-modsev",
    "LVWallThickness-increased-any",
    "pericardial-effusion",
}


# ---------------------------------------------------------------------------------- image encoder


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm, two pointwise layers with GELU, layer scale, residual."""

    def __init__(self, dim):
        super().__init__()
        self.layer_scale = nn.Parameter(torch.full((dim, 1, 1), 1e-6))
        self.block = nn.Sequential(  # Identity keeps the indices of torchvision's names
            nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim),
            nn.Identity(),
            nn.LayerNorm(dim, eps=1e-6),
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            nn.Linear(4 * dim, dim),
        )

    def forward(self, x, keep=None):
        """x (B, C, H, W). keep (B,): stochastic depth's factor of each image, in training."""
        y = self.block[0](x).permute(0, 2, 3, 1)  # (B, H, W, C)
        y = self.block[2:](y) * self.layer_scale.view(-1)
        if keep is not None:
            y = y * keep.view(-1, 1, 1, 1).to(y.dtype)
        return x + y.permute(0, 3, 1, 2)


class PackedBlock(nn.Module):
    """A ConvNeXtBlock for inference by oneDNN on a CPU; results differ only by rounding.

    The weights are cast and laid out once instead of at every call, the layer scale is part of
    the last product, and GELU and the residual are fused into the products.
    """

    def __init__(self, block, dtype, rows):
        super().__init__()
        conv, _, norm, up, _, down = block.block
        scale = block.layer_scale.detach().view(-1)
        self.conv, self.norm = conv.to(dtype), norm.to(dtype)

        def pack(weight, bias):  # for products with this number of rows
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), rows)
            return weight, bias.to(dtype)

        self.up = pack(up.weight.detach(), up.bias.detach())
        self.down = pack(down.weight.detach() * scale[:, None], down.bias.detach() * scale)

    def forward(self, x):  # (B, C, H, W)
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))  # (B, H, W, C)
        linear = torch.ops.mkldnn._linear_pointwise
        y = linear(y, *self.up, "gelu", [], "none")  # "none": not tanh's approximation
        return linear.binary(y, x.permute(0, 2, 3, 1), *self.down, "add").permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """ConvNeXt-Tiny up to its final LayerNorm: (B, 3, H, W) -> (B, 768)."""

    def __init__(self):
        super().__init__()
        width = CONVNEXT_TINY[0][0]
        layers = [nn.Sequential(nn.Conv2d(3, width, 4, stride=4), LayerNorm2d(width, eps=1e-6))]
        for stage, (dim, blocks) in enumerate(CONVNEXT_TINY):
            if stage:
                n_in = CONVNEXT_TINY[stage - 1][0]
                downsample = (LayerNorm2d(n_in, eps=1e-6), nn.Conv2d(n_in, dim, 2, stride=2))
                layers.append(nn.Sequential(*downsample))
            layers.append(nn.Sequential(*(ConvNeXtBlock(dim) for _ in range(blocks))))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(LayerNorm2d(EMBED_DIM, eps=1e-6), nn.Flatten(1))
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def forward(self, x, keep=None):
        """x (B, 3, H, W) -> (B, 768). keep (18 blocks, B): see ConvNeXtBlock."""
        H, W = x.shape[2:]
        x = x.to(self.features[0][0].weight.dtype, memory_format=torch.channels_last)
        whole = torch.is_grad_enabled() or x.device.type != "cpu"
        factors = None if keep is None else iter(keep)
        for stage in range(len(CONVNEXT_TINY)):
            layers = self.features[2 * stage : 2 * stage + 2]
            if factors is not None:
                x = layers[0](x)
                for block in layers[1]:
                    x = block(x, next(factors))
                continue
            parts = x.split(len(x) if whole else images_at_once(stage, H, W))
            x = torch.cat([layers(part) for part in parts])
        return self.classifier(x.float().mean((2, 3), keepdim=True))

    @torch.no_grad()
    def pack(self, dtype, size):
        """Prepare this model for inference on a CPU, fastest for images of (size, size)."""
        for stage in range(len(CONVNEXT_TINY)):
            self.features[2 * stage].to(dtype)
            rows = images_at_once(stage, size, size) * (size >> (2 + stage)) ** 2
            blocks = self.features[2 * stage + 1]
            for i, block in enumerate(blocks):
                blocks[i] = PackedBlock(block, dtype, rows)


def images_at_once(stage, H, W):
    """The number of images (H, W) whose hidden layer fits a CPU's cache, which is twice as fast.

    The hidden layer has 4 * 96 numbers for 4 x 4 pixels in the first stage; each stage halves it.
    """
    return max(1, (CACHED_NUMBERS << stage) // (24 * H * W))


def can_pack(dtype):
    """Whether this build of torch and this CPU can run a PackedBlock."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or ops._is_mkldnn_bf16_supported()


class ImageEncoder(nn.Module):
    """One image to one feature vector: (B, 3, H, W) -> (B, 768)."""

    width = EMBED_DIM

    def __init__(self):
        super().__init__()
        self.model = ConvNeXt()
        # Stochastic depth of each block in training (Huang et al., 2016), as in torchvision.
        self.drop_rates = np.linspace(0, 0.1, sum(n for _, n in CONVNEXT_TINY))

    def forward(self, x, keep=None):
        return self.model(x, keep)


# --------------------------------------------------------------------------------- video encoder


def frame_positions(n_frames, dim=EMBED_DIM):
    """Sinusoidal position code (1, n_frames, dim) of Vaswani et al., 2017."""
    position = torch.arange(n_frames, device="cpu").unsqueeze(1)
    rate = torch.exp(torch.arange(0, dim, 2, device="cpu") * (-math.log(10000.0) / dim))
    code = torch.zeros(1, n_frames, dim, device="cpu")
    code[0, :, 0::2] = torch.sin(position * rate)
    code[0, :, 1::2] = torch.cos(position * rate)
    return code


def clip_planes(clip_len):
    """The planes of a clip's images: an int array (clip_len, 3, 2) of (channel, frame).

    The published model reshapes a clip (3 channels, L frames) to L images of 3 planes without
    moving the axes, and its weights were trained this way: an image has three successive frames of
    one colour channel, not the three colours of one frame. Plane i of image j is entry 3 j + i of
    the channel-major list: channel (3 j + i) // L of frame (3 j + i) % L.
    """
    return np.stack(np.divmod(np.arange(3 * clip_len).reshape(clip_len, 3), clip_len), axis=-1)


class FrameTransformer(nn.Module):
    """The PanEcho backbone: clips (B, 3, L, H, W), any L, -> clip embeddings (B, 768).

    `encode_images` and `encode_clips` are its two halves, for callers that share images
    between clips. With another image encoder, the features have its width instead of 768.
    """

    def __init__(self, clip_len=16, images=None, layers=4, heads=8, dropout=0.0):
        super().__init__()
        self.encoder = images or ImageEncoder()
        self.width = width = self.encoder.width
        self.drop_rates = getattr(self.encoder, "drop_rates", ())
        layer = nn.TransformerEncoderLayer(
            width, nhead=heads, dim_feedforward=width, dropout=dropout, batch_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        # Computed, not learned: not in the state dict, so that weights load for any clip length.
        self.register_buffer("positions", frame_positions(clip_len, width), persistent=False)

    def encode_images(self, images, keep=None):
        """Normalised images (N, 3, H, W), see `clip_planes`, -> image features (N, 768).

        keep (blocks, N): see ConvNeXtBlock; of image encoders with `drop_rates`, in training.
        """
        return self.encoder(images) if keep is None else self.encoder(images, keep)

    def encode_clips(self, features):
        """Image features (B, L, 768) in clip order -> clip embeddings (B, 768)."""
        L = features.shape[1]
        if self.positions.shape[1] < L:
            self.positions = frame_positions(L, self.width).to(self.positions)
        return self.transformer(features + self.positions[:, :L]).mean(dim=1)

    def forward(self, x, keep=None):
        B, C, L, H, W = x.shape
        images = x.reshape(B * L, C, H, W)  # without moving axes, see `clip_planes`
        return self.encode_clips(self.encode_images(images, keep).view(B, L, -1))


class PanEcho(nn.Module):
    """Backbone and task heads: clips (B, 3, L, H, W) -> dict of task name to (B, n) outputs.

    With `activations`, binary tasks are probabilities (of the abnormal class), multi-class tasks
    are softmaxes in the order of `class_names`, and regression tasks are in their unit.
    """

    def __init__(self, tasks="all", activations=True, clip_len=16, backbone=None, dropout=0.25):
        """tasks: see `select_tasks`. backbone: any module with a `width`; None: PanEcho's."""
        super().__init__()
        self.tasks = select_tasks(tasks)
        self.activations = activations
        self.encoder = backbone or FrameTransformer(clip_len)
        for task in self.tasks:
            n_out = len(task["class_names"]) if task["type"].startswith("multi") else 1
            head = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.encoder.width, n_out))
            if n_out == 1:
                nn.init.constant_(head[1].bias, task["mean"])
            self.add_module(f"{task['name']}_head", head)

    def forward(self, x):
        return self.read(self.encoder(x))

    def columns(self):
        """Names of all outputs in order, by task, class and unit: `EF [%]`, `AVStenosis: Severe`.

        A binary task has one output, for the abnormal class (for '1.0' if classes are numbers).
        """
        names = []
        for task in self.tasks:
            name, classes = task["name"], task["class_names"]
            if task["type"] == "regression":
                names.append(f"{name} [{task['unit']}]" if task["unit"] else name)
            elif task["type"].startswith("multi"):
                names += [f"{name}: {c}" for c in classes]
            else:
                positive = classes[0] if name in POSITIVE_IS_SECOND else classes[1]
                names.append(name if positive == "1.0" else f"{name}: {positive}")
        return names

    def read(self, embeddings, keep=None):
        """Clip embeddings (B, 768) -> dict of task name to (B, n) outputs.

        keep (tasks, B, 768): dropout factors, for callers that draw them.
        """
        out = {}
        for i, task in enumerate(self.tasks):
            head = self.get_submodule(f"{task['name']}_head")
            logits = head(embeddings) if keep is None else head[1](embeddings * keep[i])
            out[task["name"]] = activate(logits, task) if self.activations else logits
        return out


def select_tasks(tasks):
    """`'all'`, a task name or a list of names -> the entries of TASKS, in TASKS' order.

    A list of entries (dicts like those of TASKS) is returned unchanged.
    """
    if tasks == "all":
        return TASKS
    if not isinstance(tasks, str) and tasks and all(isinstance(t, dict) for t in tasks):
        return list(tasks)
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if unknown := sorted(set(names) - {t["name"] for t in TASKS}):
        valid = ", ".join(t["name"] for t in TASKS)
        raise ValueError(f"unknown PanEcho task {', '.join(unknown)}; the tasks are: {valid}")
    return [t for t in TASKS if t["name"] in names]


def activate(logits, task):
    """One head's logits (B, n) -> probabilities; regression outputs are unchanged."""
    if task["type"] == "regression":
        return logits
    if task["type"].startswith("multi"):
        return logits.softmax(dim=1)
    return 1 - logits.sigmoid() if task["name"] in POSITIVE_IS_SECOND else logits.sigmoid()


# --------------------------------------------------------------------------------------- weights


def without_weights(**kwargs):
    """A PanEcho on the meta device, for loading weights without drawing random ones first."""
    with torch.device("meta"):
        return PanEcho(**kwargs)


def random_weights():
    """The state dict of an untrained full model, the same on every machine, for trials.

    numpy draws each tensor with a seed from its name; weights are scaled by fan-in and the layer
    scale is near 0.1, so that features vary with the image (with torchvision's layer scale of 1e-6
    the blocks have almost no effect).
    """
    state = {}
    for name, tensor in without_weights().state_dict().items():
        r = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tensor.shape)
        if "layer_scale" in name:
            w = 0.1 + 0.01 * r
        elif name.endswith("bias"):
            w = 0.03 * r
        elif tensor.ndim == 1:
            w = 1 + 0.03 * r
        else:
            w = r / np.sqrt(np.prod(tensor.shape[1:]))
        state[name] = torch.from_numpy(w.astype(np.float32))
    return state


@torch.inference_mode()
def save_untrained(path, clips):
    """Write a weights file of an untrained encoder whose embeddings of `clips` are standardised.

    The embeddings of an untrained encoder differ by a few percent around a large constant; the last
    LayerNorm is set so that over these clips each feature has mean 0, and all features together
    have standard deviation 1. clips: float32 (3, L, H, W) each, normalised.
    """
    model = load_panecho("random").model
    embeddings = torch.cat([model.encoder(clip[None]) for clip in clips])  # (n, 768)
    centre, norm = embeddings.mean(0), model.encoder.transformer.layers[-1].norm2
    spread = (embeddings - centre).std()
    norm.weight /= spread
    norm.bias.sub_(centre).div_(spread)
    save({"weights": model.state_dict()}, path)


def weights_path(source="panecho"):
    """The path of the weights file for `source`; the file may not exist yet.

    source: the text 'panecho' (the release, in trained_models/PanEcho or torch.hub's cache), a URL
    (in torch.hub's cache), a file, or a folder. In a folder: panecho.pt, encoder.pt (of an
    end-to-end training), or the highest chkpt_epoch-N.pt (of an encoder training).
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if str(source).startswith(("http://", "https://")):
        digest = hashlib.sha256(source.encode()).hexdigest()[:8]  # URLs may have the same ending
        return cache / f"{Path(source).stem}-{digest}.pt"
    if source == "panecho":
        return DOWNLOADED if DOWNLOADED.is_file() else cache / DOWNLOADED.name
    path = Path(source)
    if not path.is_dir():
        return path
    files = [path / DOWNLOADED.name, path / "encoder.pt"]
    epochs = [x for x in path.glob("chkpt_epoch-*.pt") if x.stem.rpartition("-")[2].isdecimal()]
    files += sorted(epochs, key=lambda file: -int(file.stem.rpartition("-")[2]))
    return next((file for file in files if file.is_file()), files[0])


def find_weights(source="panecho"):
    """The file of `weights_path`, downloaded if it is missing; its digest is compared.

    The digest is recorded at the download: in source.json, or next to the file in torch.hub's cache
    (`panecho.pt.sha256`). Raises WeightsError.
    """
    path, url = weights_path(source), WEIGHTS_URL if source == "panecho" else str(source)
    is_download = url.startswith(("http://", "https://"))
    if is_download and not path.exists():
        fetch(url, path)
    if not path.is_file():
        raise WeightsError(
            f"no weights file {source}; give the path of panecho.pt, leave out --weights to "
            "download the release, or use --weights random for a trial"
        )
    if is_download and not path.with_name(SOURCE).is_file():
        check_digest(path)
    check_source(path)
    return path


def published_parts(state):
    """A published end-to-end state dict -> {'encoder': ..., 'study': ...}; {} for any other."""
    if not isinstance(state, dict):
        return {}
    parts = {
        part: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        for part, prefix in PUBLISHED.items()
    }
    return parts if all(parts.values()) else {}


@dataclass(frozen=True)
class EncoderFile:
    """The content of a weights file."""

    state: dict  # of the full model, or of the backbone if it has no heads
    record: EncoderRecord | None  # None in a published file
    seen: tuple  # of Seen: its training patients; () if not recorded

    @property
    def tasks(self):
        """The tasks of the heads, by the record or by TASKS; [] for a backbone."""
        if self.record:
            return [task.entry() for task in self.record.tasks]
        return [t for t in TASKS if f"{t['name']}_head.1.weight" in self.state]


def read_encoder(path):
    """Read a weights file, published or from EchoFocus: an EncoderFile. No code in the file runs.

    A published end-to-end checkpoint has a backbone and no heads. Raises WeightsError.
    """
    saved = load_safely(path)
    saved = saved if isinstance(saved, dict) else {}
    state, seen = saved.get("weights"), ()
    if "seen" in saved:  # never in published files: torch.hub runs without pandas
        from echofocus_core.base.seen import seen_from

        seen = tuple(seen_from(saved, path))
    if parts := published_parts(saved.get("model_state_dict")):
        state, saved = {f"encoder.{k}": v for k, v in parts["encoder"].items()}, {}
    if not isinstance(state, dict):
        raise WeightsError(f"{path} has no dict 'weights'; the published panecho.pt has one")
    state = {k: v for k, v in state.items() if not k.endswith("time_encoder.pe")}
    return EncoderFile(state, record_of(saved, path), seen)


def seen_by(weights):
    """The training patients of an encoder, see `EncoderFile.seen`."""
    return () if weights == "random" else read_encoder(find_weights(weights)).seen


def licence_of(path, record):
    """The licence of a weights file, from its record, its download or the registry."""
    if record:
        return record.licence
    entry = read_source(path.parent) or registry_entry(path.parent)
    if path.name == "panecho.pt" and not entry:
        entry = registry()["PanEcho"]
    return str(entry.get("licence", "not known"))


def warn_of_other_clips(record, path, size, clip_len, rate=1):
    """Warn if clips differ from those of the encoder's training. record: None without one."""
    if record:
        trained = {"sampling_rate": record.settings.get("sampling_rate", 1)}
        trained |= {"size": record.size, "clip_len": record.clip_len}
        current = {"size": size, "clip_len": clip_len, "sampling_rate": rate}
        for change in differences(trained, current).values():
            RUN.warning(f"the clips differ from those that {path} was trained on: {change}",
                        "use the same values, or the embeddings may be worse")  # fmt: skip


def weights_digest(weights):
    """The SHA-256 of the weights that `load_panecho` loads."""
    return RANDOM_SHA256 if weights == "random" else sha256_file(find_weights(weights))


@dataclass(frozen=True)
class LoadedEncoder:
    """A PanEcho network with its weights, and the information in their file."""

    model: PanEcho  # in evaluation mode, with the heads of the file
    sha256: str  # identifies the weights
    record: EncoderRecord | None  # None of published and random weights
    seen: tuple  # see EncoderFile


def load_panecho(weights="panecho", clip_len=16, backbone_of=None):
    """The LoadedEncoder of `weights`: 'random', or a source as for `weights_path`.

    backbone_of: makes the backbone of an encoder with another architecture from its record; None
    refuses it. Raises WeightsError.
    """
    digest = weights_digest(weights)
    if weights == "random":
        path, file = weights, EncoderFile(random_weights(), None, ())
    else:
        path = find_weights(weights)
        file = read_encoder(path)
    if file.record and not file.record.is_panecho:
        if not backbone_of:
            raise WeightsError(
                f"{path} is a {file.record.model_name} with {file.record.arch}, inputs normalised "
                f"by '{file.record.normalization}': this needs PanEcho's architecture "
                "(frame_transformer, convnext_tiny, 4 layers, 8 heads, imagenet)"
            )
        model = PanEcho(file.tasks, backbone=backbone_of(file.record))
        state = {k: v for k, v in file.state.items() if not k.endswith("num_batches_tracked")}
        load_strictly(model, state, path, f"a {file.record.model_name} of {file.record.arch}")
    else:
        model = without_weights(tasks=file.tasks, clip_len=clip_len)
        load_strictly(model, file.state, path, "PanEcho")
    return LoadedEncoder(model.eval(), digest, file.record, file.seen)


def build(pretrained=True, image_encoder_only=False, backbone_only=False, **options):
    """The result of `torch.hub.load(..., 'PanEcho', ...)`, see hubconf.py; options: of PanEcho."""
    model = without_weights(**options) if pretrained else PanEcho(**options)
    if pretrained:
        path, parts = find_weights(), dict(model.named_children())
        state = read_encoder(path).state
        names = {name: name.partition(".")[0] for name in state}  # encoder, or <task>_head
        state = {k: v for k, v in state.items() if names[k] in parts or "_head" not in names[k]}
        load_strictly(model, state, path, "PanEcho")
    if image_encoder_only:
        return model.encoder.encoder
    return model.encoder if backbone_only else model


def normalise(planes, channel, mean=MEAN, std=STD):
    """uint8 planes (..., H, W) of the colour channels `channel` (...) -> float32, normalised."""
    mean, std = (torch.tensor(v, device=planes.device)[channel] for v in (mean, std))
    return planes.float().div_(255).sub_(mean[..., None, None]).div_(std[..., None, None])
