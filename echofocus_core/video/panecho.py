"""PanEcho: the video encoder, in plain torch.

A clip of L frames becomes one 768-vector, the clip embedding:

    (B, 3, L, H, W) -> L images -> ConvNeXt-Tiny each -> (B, L, 768) + positions
                    -> 4-layer transformer -> mean over images -> (B, 768)

and 40 linear heads read it (EF, valve disease, ...). The state-dict names are those of the
published weights (image encoder: torchvision's ConvNeXt-Tiny), so that the release loads as it is.
Reference: Holste et al., "Complete AI-Enabled Echocardiography Interpretation With Multitask Deep
Learning", JAMA 2025; Liu et al., "A ConvNet for the 2020s", CVPR 2022.

    python embed/panecho.py predict FOLDER     # its readings of a folder of exams

Inputs are normalised with `MEAN` and `STD`; see `embed/video.py` for the channel order that the
released study-level models expect.
"""

import hashlib
import json
import math
import subprocess
import sys
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from echofocus_core import EMBED_DIM
from echofocus_core.base.checkpoints import WeightsError, load_safely, load_strictly, save
from echofocus_core.base.console import Parser, run_main
from echofocus_core.base.download import fetch
from echofocus_core.base.files import sha256_file
from echofocus_core.base.releases import (
    SOURCE,
    check_digest,
    check_source,
    read_source,
    registry,
    released,
)
from echofocus_core.video.record import record_of

WEIGHTS_URL = "https://github.com/CarDS-Yale/PanEcho/releases/download/v1.0/panecho.pt"
DOWNLOADED = Path("trained_models/PanEcho/panecho.pt")  # by `echofocus.py download PanEcho`
MEAN = (0.485, 0.456, 0.406)  # ImageNet statistics, by channel as stored
STD = (0.229, 0.224, 0.225)
CACHED_NUMBERS = 1_250_000  # of a block's hidden layer at a time, on a CPU: 5 MB in fp32
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
        self.block = nn.Sequential(  # indices 1 and 4, 6 hold no weights: names as torchvision's
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
    """A ConvNeXtBlock for inference by oneDNN on a CPU; the same but for rounding.

    The weights are cast and laid out once instead of at every call, the layer scale is part of
    the last product, and GELU and the residual are fused into the products.
    """

    def __init__(self, block, dtype, rows):
        super().__init__()
        conv, _, norm, up, _, down = block.block
        scale = block.layer_scale.detach().view(-1)
        self.conv, self.norm = conv.to(dtype), norm.to(dtype)

        def packed(weight, bias):  # for products with so many rows
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), rows)
            return weight, bias.to(dtype)

        self.up = packed(up.weight.detach(), up.bias.detach())
        self.down = packed(down.weight.detach() * scale[:, None], down.bias.detach() * scale)

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
                before = CONVNEXT_TINY[stage - 1][0]
                downsample = (LayerNorm2d(before, eps=1e-6), nn.Conv2d(before, dim, 2, stride=2))
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
        for stage in range(len(CONVNEXT_TINY)):
            layers = self.features[2 * stage : 2 * stage + 2]
            if keep is not None:
                x, keep = self.run_stage(layers, x, keep)
                continue
            parts = x.split(len(x) if whole else images_at_once(stage, H, W))
            x = torch.cat([layers(part) for part in parts])
        return self.classifier(x.float().mean((2, 3), keepdim=True))

    @staticmethod
    def run_stage(layers, x, keep):
        """A stage with stochastic depth: (x, what of `keep` is for the stages after it)."""
        x = layers[0](x)
        for block, factor in zip(layers[1], keep, strict=False):
            x = block(x, factor)
        return x, keep[len(layers[1]) :]

    @torch.no_grad()
    def pack(self, dtype, size):
        """Make this model one for inference on a CPU alone, at images of (size, size) for best."""
        for stage in range(len(CONVNEXT_TINY)):
            self.features[2 * stage].to(dtype)
            rows = images_at_once(stage, size, size) * (size >> (2 + stage)) ** 2
            blocks = self.features[2 * stage + 1]
            for i, block in enumerate(blocks):
                blocks[i] = PackedBlock(block, dtype, rows)


def images_at_once(stage, H, W):
    """Of images (H, W): so many that a block's hidden layer stays in a CPU's cache.

    All at once would be memory traffic, at half the speed in the first stage. Each stage halves
    the hidden layer, 4 * 96 numbers for 4 x 4 pixels in the first.
    """
    return max(1, (CACHED_NUMBERS << stage) // (24 * H * W))


def can_pack(dtype):
    """Whether this torch and this CPU have what PackedBlock takes."""
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
        # Stochastic depth of each block in training (Huang et al., 2016), as torchvision's has.
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
    """Which planes make a clip's images: an int array (clip_len, 3, 2) of (channel, frame).

    The published model lays a clip's memory (3 channels, L frames) out as L images of 3 planes
    without moving the axes, and its weights were trained so: an image holds three successive
    frames of one colour channel, not one frame's three colours. Image j's plane i is entry
    3 j + i of the channel-major list, that is channel (3 j + i) // L of frame (3 j + i) % L.
    """
    return np.stack(np.divmod(np.arange(3 * clip_len).reshape(clip_len, 3), clip_len), axis=-1)


class FrameTransformer(nn.Module):
    """The PanEcho backbone: clips (B, 3, L, H, W), any L, -> clip embeddings (B, 768).

    `encode_images` and `encode_clips` are its two halves, for callers that share images
    between clips. With other image encoders the features have those' width instead of 768.
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
        # Computed, not learned: kept out of the state dict so that any clip length loads.
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
        images = x.reshape(B * L, C, H, W)  # no axis moved, as the released weights were trained
        return self.encode_clips(self.encode_images(images, keep).view(B, L, -1))


class PanEcho(nn.Module):
    """Backbone and task heads: clips (B, 3, L, H, W) -> dict of task name to (B, n) outputs.

    With `activations` binary tasks are probabilities (of the abnormal class), multi-class tasks
    are softmaxes in the order of `class_names`, regression tasks are in their own unit.
    """

    def __init__(self, tasks="all", activations=True, clip_len=16, backbone=None, dropout=0.25):
        """tasks: as `select_tasks` takes them. backbone: any with a `width`; None: PanEcho's."""
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

        A binary task has one output, of the abnormal class (of '1.0' where classes are numbers).
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

        keep (tasks, B, 768): the factors of dropout, for callers that draw them themselves.
        """
        out = {}
        for i, task in enumerate(self.tasks):
            head = self.get_submodule(f"{task['name']}_head")
            logits = head(embeddings) if keep is None else head[1](embeddings * keep[i])
            out[task["name"]] = activate(logits, task) if self.activations else logits
        return out


def select_tasks(tasks):
    """`'all'`, a task name or a list of names -> the entries of TASKS, in TASKS' order.

    A list of entries (dicts like those of TASKS) is what it is.
    """
    if tasks == "all":
        return TASKS
    if not isinstance(tasks, str) and tasks and all(isinstance(t, dict) for t in tasks):
        return list(tasks)
    wanted = [tasks] if isinstance(tasks, str) else list(tasks)
    unknown = sorted(set(wanted) - {t["name"] for t in TASKS})
    if unknown:
        names = ", ".join(t["name"] for t in TASKS)
        raise ValueError(f"unknown PanEcho task {', '.join(unknown)}; the tasks are: {names}")
    return [t for t in TASKS if t["name"] in wanted]


def activate(logits, task):
    """One head's logits (B, n) -> probabilities; regression outputs pass unchanged."""
    if task["type"] == "regression":
        return logits
    if task["type"].startswith("multi"):
        return logits.softmax(dim=1)
    return 1 - logits.sigmoid() if task["name"] in POSITIVE_IS_SECOND else logits.sigmoid()


# --------------------------------------------------------------------------------------- weights


def without_weights(**kwargs):
    """A PanEcho whose parameters are still to be assigned: no time goes into drawing them."""
    with torch.device("meta"):
        return PanEcho(**kwargs)


def random_weights():
    """An untrained full model's state dict, the same on every machine: for tries without weights.

    Each tensor is drawn by numpy from a seed made of its name; weights are scaled by fan-in and
    the layer scale is near 0.1, so that features vary with the image (torchvision's own
    initialisation, layer scale 1e-6, makes the blocks all but vanish).
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

    An untrained encoder's embeddings differ by a few percent around a large constant; the last
    LayerNorm is set so that over these clips each feature has mean 0 and all together have
    standard deviation 1. clips: float32 (3, L, H, W) each, normalised.
    """
    state, model = random_weights(), load_panecho("random")[0].encoder
    embeddings = torch.cat([model(clip[None]) for clip in clips])  # (n, 768)
    centre = embeddings.mean(0)
    spread = (embeddings - centre).std()
    last = "encoder.transformer.layers.3.norm2."
    state[last + "weight"] = state[last + "weight"] / spread
    state[last + "bias"] = (state[last + "bias"] - centre) / spread
    save({"weights": state}, path)


def cached_weights():
    """Where a downloaded weights file lies: torch.hub's cache."""
    return Path(torch.hub.get_dir()) / "checkpoints" / "panecho.pt"


def find_weights(source="panecho", show=True):
    """`--weights` as typed (a file, a URL or 'panecho' for the release) -> path of the file.

    The release is taken from trained_models/PanEcho, if it was downloaded there, else from
    torch.hub's cache, where it is fetched with its SHA-256 beside it (`panecho.pt.sha256`). A file
    that no longer has the digest recorded at its download is refused.
    """
    if source == "panecho" and DOWNLOADED.is_file():
        (check_source if DOWNLOADED.with_name(SOURCE).is_file() else check_digest)(DOWNLOADED)
        return DOWNLOADED
    if source == "panecho" or str(source).startswith(("http://", "https://")):
        url = WEIGHTS_URL if source == "panecho" else source
        path = cached_weights() if source == "panecho" else url_cache(url)
        if not path.exists():
            fetch(url, path, show)
        check_digest(path)
        return path
    path = newest_epoch(source) or Path(source)
    if not path.is_file():
        raise WeightsError(
            f"no weights file {source}; give the path of panecho.pt, or leave --weights out to "
            "download the release, or --weights random to try without"
        )
    check_source(path)
    return path


def newest_epoch(folder):
    """The highest chkpt_epoch-N.pt of a run's folder, published or ours, or the encoder.pt of a
    model that was trained through its encoder; None without one."""
    if (file := Path(folder, "encoder.pt")).is_file():
        return file
    found = Path(folder).glob("chkpt_epoch-*.pt") if Path(folder).is_dir() else ()
    numbered = {int(n): p for p in found if (n := p.stem.removeprefix("chkpt_epoch-")).isdecimal()}
    return numbered[max(numbered)] if numbered else None


def encoder_in(place):
    """The encoder file of a model's folder, or a .pt file that is none of a study-level model."""
    place = Path(place)
    if place.suffix == ".pt" and place.is_file() and not place.name.endswith("_checkpoint.pt"):
        return place
    file = place / DOWNLOADED.name
    return file if file.is_file() else newest_epoch(place)


def url_cache(url):
    """A cache name of its own for each URL, so that two files called alike do not mix."""
    name = f"{Path(url).stem}-{hashlib.sha256(url.encode()).hexdigest()[:8]}.pt"
    return cached_weights().with_name(name)


def published_parts(state):
    """A published end-to-end state dict -> {'encoder': ..., 'study': ...}; {} for any other."""
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        return {}
    parts = {
        part: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        for part, prefix in PUBLISHED.items()
    }
    return parts if all(parts.values()) else {}


def read_encoder(path):
    """(state dict of the full model, EncoderRecord or None, list of Seen) of a weights file,
    published or ours. No Seen in one that was trained elsewhere; None: ours does not say.

    A published end-to-end checkpoint has a backbone and no heads. Nothing in the file is run.
    Raises WeightsError.
    """
    saved = load_safely(path)
    saved = saved if isinstance(saved, dict) else {}
    state, seen = saved.get("weights"), seen_in(saved, path)
    if parts := published_parts(saved.get("model_state_dict")):
        state, saved = {f"encoder.{k}": v for k, v in parts["encoder"].items()}, {}
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise WeightsError(f"{path} has no dict 'weights' as the published panecho.pt has")
    state = {k: v for k, v in state.items() if not k.endswith("time_encoder.pe")}
    record = record_of(saved, path)
    if seen is None:
        print(
            f"WARNING: {path} does not say whom it was trained on (an older version wrote it): "
            "keep its patients out of every validation and test yourself"
        )
    return state, record, seen


def seen_in(saved, path):
    """Whom an encoder and what it started from were trained on, see `read_encoder`."""
    if "seen" not in saved:
        return None if "encoder" in saved or "echofocus" in saved else []
    from echofocus_core.study.splits import seen_from

    return seen_from(saved, path)


def seen_by(weights):
    """Whom an encoder (see `load_panecho`) was trained on: (list of Seen, whether that is all)."""
    seen = [] if weights == "random" else read_encoder(find_weights(weights))[2]
    return seen or [], seen is not None


def licence_of(path, record):
    """The licence of a weights file: by its record, its download's, or the registry's."""
    if record:
        return record.licence
    entry = read_source(path.parent) or released(path.parent)
    if path.name == "panecho.pt" and not entry:
        entry = registry()["PanEcho"]
    return str(entry.get("licence", "not known"))


def tell_other_input(record, path, size, clip_len, rate=1):
    """Warn where an encoder is given other clips than it was trained on; record: its, or None."""
    was = record and {
        "size": record.size, "clip_len": record.clip_len,
        "sampling_rate": record.settings.get("sampling_rate", 1),
    }  # fmt: skip
    now = {"size": size, "clip_len": clip_len, "sampling_rate": rate}
    for name in was or ():
        if was[name] != now[name]:
            print(
                f"WARNING: {path} was trained with {name} = {was[name]} and gets {now[name]} here: "
                "its embeddings may mean less"
            )


def tasks_in(state, record):
    """The tasks of a file's heads, by its record or the names of TASKS; [] of a backbone alone."""
    if record:
        return [task.entry() for task in record.tasks]
    return [t for t in TASKS if any(k.startswith(f"{t['name']}_head.") for k in state)]


@cache
def random_digest():
    sha256 = hashlib.sha256()
    for tensor in random_weights().values():
        sha256.update(tensor.numpy())
    return sha256.hexdigest()


def weights_digest(weights):
    """The SHA-256 that names weights, see `load_panecho`."""
    return random_digest() if weights == "random" else sha256_file(find_weights(weights))


def load_panecho(weights="panecho", clip_len=16):
    """The full PanEcho model in evaluation mode, and the SHA-256 that names its weights.

    `weights` is a path (a run's folder of `embed/train.py`, too), a URL, 'panecho' (the release) or
    'random'. Its heads are those that the file has; `record` and `seen`: see `read_encoder`. Raises
    WeightsError.
    """
    digest = weights_digest(weights)
    if weights == "random":
        state, record, seen, path = random_weights(), None, [], weights
    else:
        path = find_weights(weights)
        state, record, seen = read_encoder(path)
    if record and not record.is_panecho:
        raise WeightsError(
            f"{path} is a {record.model_name} of {record.arch} for inputs by "
            f"'{record.normalization}': extraction takes PanEcho's architecture alone "
            "(frame_transformer, convnext_tiny, 4 layers, 8 heads, imagenet)"
        )
    model = without_weights(tasks=tasks_in(state, record), clip_len=clip_len)
    load_strictly(model, state, path, "PanEcho")
    model.record, model.seen = record, seen
    return model.eval(), digest


def build(
    pretrained=True,
    image_encoder_only=False,
    backbone_only=False,
    tasks="all",
    activations=True,
    clip_len=16,
):
    """What `torch.hub.load(..., 'PanEcho', ...)` returns; see hubconf.py."""
    options = dict(tasks=tasks, activations=activations, clip_len=clip_len)
    model = without_weights(**options) if pretrained else PanEcho(**options)
    if pretrained:
        path = find_weights()
        state, *_ = read_encoder(path)
        heads = tuple(f"{t['name']}_head." for t in TASKS)
        kept = tuple(f"{t['name']}_head." for t in model.tasks)
        state = {k: v for k, v in state.items() if k.startswith(kept) or not k.startswith(heads)}
        load_strictly(model, state, path, "PanEcho")
    if image_encoder_only:
        return model.encoder.encoder
    return model.encoder if backbone_only else model


def normalise(planes, channel):
    """uint8 planes (..., H, W) of the colour channels `channel` (...) -> float32, normalised."""
    mean, std = (torch.tensor(v, device=planes.device)[channel] for v in (MEAN, STD))
    return planes.float().div_(255).sub_(mean[..., None, None]).div_(std[..., None, None])


# ---------------------------------------------------------------------------------- command line


def main(argv=None):
    """Readings of a folder of exams: what `echofocus.py predict` gives with the same encoder."""
    parser = Parser(prog="embed/panecho.py", description=main.__doc__)
    parser.add_argument("command", choices=["predict"], help="the readings, a row a study")
    parser.add_argument("folder", help="a folder of study folders, or of one study's files")
    parser.add_argument("--weights", default="panecho", help="as of embed/extract.py")
    parser.add_argument("--out", default="", help="table to write [panecho_<folder>.csv here]")
    typed, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    file = find_weights(typed.weights)
    out = typed.out or f"panecho_{Path(typed.folder).resolve().name}.csv"
    program = Path(__file__).resolve().parents[2] / "echofocus.py"
    line = ["predict", "--model_name", str(file.resolve()), f"--weights={file}", f"--out={out}"]
    line.append(f"--videos={typed.folder}")  # one word each: a name may begin with a hyphen
    sys.exit(subprocess.call([sys.executable, str(program), *line, *rest]))


def program():
    """What the command line runs."""
    run_main(main, "embed/panecho.py")
