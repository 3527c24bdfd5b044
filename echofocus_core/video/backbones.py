"""Backbones, which turn clips into vectors: PanEcho's, and those of its published experiments.

PanEcho's backbone (ConvNeXt-Tiny and a frame transformer) needs only torch. The others need
torchvision, timm or open_clip; their last layer is removed.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from echofocus_core.base.checkpoints import WeightsError, load_safely, load_strictly
from echofocus_core.base.console import UserError
from echofocus_core.base.download import fetch
from echofocus_core.base.files import sha256_file
from echofocus_core.video.panecho import ConvNeXt, FrameTransformer, ImageEncoder

# torchvision's ConvNeXt-Tiny, IMAGENET1K_V1; the name holds the first digits of its SHA-256.
IMAGENET_URL = "https://download.pytorch.org/models/convnext_tiny-983f1562.pth"
IMAGENET_LICENCE = "BSD 3-Clause (torchvision), trained on ImageNet-1K"


class Images(nn.Module):
    """An image model of another package: (B, 3, H, W) -> (B, width)."""

    def __init__(self, model, width):
        super().__init__()
        self.model, self.width = model, width

    def forward(self, x):
        return self.model(x)


class Clips(Images):
    """A clip model of another package: (B, 3, L, H, W) -> (B, width)."""

    drop_rates = ()


TORCHVISION = {  # name -> (its last layer, width before that)
    "resnet18": ("fc", 512),
    "resnet50": ("fc", 2048),
    "convnext_small": ("classifier.2", 768),
    "swin_v2_s": ("head", 768),
    "r3d_18": ("fc", 512),  # of clips: --model_name 3dresnet18
}
TIMM = {  # name -> width
    "convnext_base.fb_in22k_ft_in1k": 1024,
    "convnext_base.fb_in22k_ft_in1k_384": 1024,
    "convnextv2_tiny.fcmae": 768,
    "convnextv2_tiny.fcmae_ft_in22k_in1k": 768,
}
# --arch, for --model_name frame_transformer; convnext_tiny is in video/panecho.py
NAMES = ("convnext_tiny", *list(TORCHVISION)[:-1], *TIMM, "echo-clip")


def from_torchvision(name, pretrained):
    """A torchvision model without its last layer."""
    models = import_optional("torchvision.models", "torchvision")
    models, weights = (models.video, "DEFAULT") if name == "r3d_18" else (models, "IMAGENET1K_V1")
    model = getattr(models, name)(weights=weights if pretrained else None)
    parent, _, layer = TORCHVISION[name][0].rpartition(".")
    setattr(model.get_submodule(parent), layer, nn.Identity())
    return model


def from_open_clip(pretrained):
    """EchoCLIP's image encoder."""
    open_clip = import_optional("open_clip", "open_clip_torch")
    if pretrained:
        hub = "hf-hub:mkaichristensen/echo-clip"
        return open_clip.create_model_and_transforms(hub)[0].visual
    return open_clip.create_model("convnext_base", pretrained=None).visual


def import_optional(module, package):
    """Import a module of an optional package. The UserError names the package to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this backbone needs {package}: pip install {package}, or the extra 'backbones' (in "
            "versions for the installed torch); --arch convnext_tiny needs no other package"
        ) from error


def build_model(name, pretrained):
    """(model, width, licence) of torchvision, timm or open_clip. Raises UserError."""
    try:
        if name in TORCHVISION:
            return from_torchvision(name, pretrained), TORCHVISION[name][1], IMAGENET_LICENCE
        if name == "echo-clip":
            return from_open_clip(pretrained), 512, "see EchoCLIP's card"
        timm = import_optional("timm", "timm")
        model = timm.create_model(name, pretrained=pretrained, num_classes=0)
        return model, TIMM[name], "see timm's model card"
    except (OSError, RuntimeError) as error:  # the packages download weights
        raise UserError(
            f"the weights of {name} cannot be downloaded ({type(error).__name__}); download them "
            "on a machine with a network, or start at random with --rand_init"
        ) from error


@dataclass
class Start:
    """The origin of a backbone's initial weights."""

    name: str = "random"
    sha256: str = ""
    licence: str = ""
    seen: tuple = ()  # of Seen: the training patients
    echo: bool = False  # trained on echocardiograms


def build_backbone(model_name, arch, pretrained, clip_len=16, layers=4, heads=8, dropout=0.0):
    """(backbone, Start): clips (B, 3, L, H, W) -> (B, backbone.width). Raises UserError.

    pretrained: use the backbone's published weights (ImageNet, Kinetics, EchoCLIP), else random
    weights from torch's generator.
    """
    if model_name == "3dresnet18":
        model, width, licence = build_model("r3d_18", pretrained)
        net, start = Clips(model, width), Start("kinetics", licence=licence)
    else:
        images, start = build_images(arch, pretrained)
        if images.width % heads:
            raise UserError(f"--n_heads {heads} does not divide the width {images.width} of {arch}")
        net = FrameTransformer(clip_len, images, layers, heads, dropout)
    return net, start if pretrained else Start()


def build_images(arch, pretrained):
    """(image encoder, Start) of an arch."""
    if arch != "convnext_tiny":
        model, width, licence = build_model(arch, pretrained)
        return Images(model, width), Start(arch, licence=licence, echo=arch == "echo-clip")
    images = ImageEncoder()
    if not pretrained:
        return images, Start()
    path = imagenet_weights()
    weights = load_safely(path).items()
    state = {k: v for k, v in weights if not k.startswith("classifier.2.")}  # not the last layer
    with torch.device("meta"):
        images.model = ConvNeXt()
    load_strictly(images.model, state, path, "torchvision's ConvNeXt-Tiny")
    return images, Start("imagenet", sha256_file(path), IMAGENET_LICENCE)


def imagenet_weights():
    """The path of torchvision's weights in torch.hub's cache; downloads and verifies them."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / IMAGENET_URL.rpartition("/")[2]
    if not path.exists():
        try:
            fetch(IMAGENET_URL, path)
        except WeightsError as error:
            raise WeightsError(
                f"{str(error).partition(';')[0]}; put the file at {path}, or start from other "
                "weights: --model_dir_path panecho, or --rand_init"
            ) from error
    digest = path.stem.rpartition("-")[2]
    if not sha256_file(path).startswith(digest):
        raise WeightsError(
            f"{path} is not the published file: its SHA-256 does not begin with {digest}; delete "
            "it to download it again"
        )
    return path
