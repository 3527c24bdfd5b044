"""What turns clips into vectors: PanEcho's backbone, and the others of its published experiments.

Only PanEcho's own (ConvNeXt-Tiny below a frame transformer) needs nothing beyond torch. The others
are built by torchvision, timm or open_clip, where those are installed, less their last layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from echofocus_core.base.checkpoints import WeightsError, load_safely, load_strictly
from echofocus_core.base.console import UserError, nearest
from echofocus_core.base.download import fetch
from echofocus_core.base.files import sha256_file
from echofocus_core.video.panecho import ConvNeXt, FrameTransformer, ImageEncoder

# torchvision's ConvNeXt-Tiny, IMAGENET1K_V1; the name holds the first digits of its SHA-256.
IMAGENET_URL = "https://download.pytorch.org/models/convnext_tiny-983f1562.pth"
IMAGENET_LICENCE = "BSD 3-Clause (torchvision), trained on ImageNet-1K"


class Images(nn.Module):
    """A model of images from elsewhere: (B, 3, H, W) -> (B, width)."""

    def __init__(self, model, width):
        super().__init__()
        self.model, self.width = model, width

    def forward(self, x):
        return self.model(x)


class Clips(Images):
    """A model of whole clips from elsewhere: (B, 3, L, H, W) -> (B, width)."""

    drop_rates = ()


def from_torchvision(name, last, pretrained):
    models = imported("torchvision.models", "torchvision")
    models = models.video if name == "r3d_18" else models
    model = getattr(models, name)(weights="DEFAULT" if name == "r3d_18" and pretrained else
                                  "IMAGENET1K_V1" if pretrained else None)  # fmt: skip
    part = model
    *above, name = last.split(".")
    for step in above:
        part = part[int(step)] if step.isdecimal() else getattr(part, step)
    if name.isdecimal():
        part[int(name)] = nn.Identity()
    else:
        setattr(part, name, nn.Identity())
    return model


def from_timm(name, pretrained):
    return imported("timm", "timm").create_model(name, pretrained=pretrained, num_classes=0)


def from_open_clip(name, pretrained):
    open_clip = imported("open_clip", "open_clip_torch")
    if pretrained:
        return open_clip.create_model_and_transforms(f"hf-hub:{name}")[0].visual
    return open_clip.create_model("convnext_base", pretrained=None).visual


def imported(module, package):
    """A module of an optional package. UserError names what to install."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this backbone is built by {package}, which is not installed: pip install {package}, "
            "or the extra 'backbones' (beside a torch of the same release); --arch convnext_tiny "
            "needs nothing"
        ) from error


@dataclass(frozen=True)
class Backbone:
    """How an image model is built (a function of `pretrained`), its width and licence."""

    build: Callable
    width: int
    licence: str = IMAGENET_LICENCE


def torchvision_model(name, last, width):
    return Backbone(partial(from_torchvision, name, last), width)


def timm_model(name, width):
    return Backbone(partial(from_timm, name), width, "see timm's card of the model")


ARCHS = {  # --arch, for --model_name frame_transformer; convnext_tiny is our own
    "resnet18": torchvision_model("resnet18", "fc", 512),
    "resnet50": torchvision_model("resnet50", "fc", 2048),
    "convnext_small": torchvision_model("convnext_small", "classifier.2", 768),
    "swin_v2_s": torchvision_model("swin_v2_s", "head", 768),
    "convnext_base.fb_in22k_ft_in1k": timm_model("convnext_base.fb_in22k_ft_in1k", 1024),
    "convnext_base.fb_in22k_ft_in1k_384": timm_model("convnext_base.fb_in22k_ft_in1k_384", 1024),
    "convnextv2_tiny.fcmae": timm_model("convnextv2_tiny.fcmae", 768),
    "convnextv2_tiny.fcmae_ft_in22k_in1k": timm_model("convnextv2_tiny.fcmae_ft_in22k_in1k", 768),
    "echo-clip": Backbone(
        partial(from_open_clip, "mkaichristensen/echo-clip"), 512, "see EchoCLIP's card"
    ),
}
R3D = torchvision_model("r3d_18", "fc", 512)
NAMES = ("convnext_tiny", *ARCHS)


@dataclass
class Start:
    """Where a backbone's weights are from."""

    name: str = "random"
    sha256: str = ""
    licence: str = ""
    seen: tuple = ()  # of Seen: its training patients
    echo: bool = False  # trained on echocardiograms


def build_backbone(model_name, arch, pretrained, clip_len=16, layers=4, heads=8, dropout=0.0):
    """(backbone, Start): clips (B, 3, L, H, W) -> (B, backbone.width). Raises UserError.

    pretrained: the published start of that backbone (ImageNet, Kinetics, EchoCLIP), else random
    by torch's generator.
    """
    if model_name == "3dresnet18":
        net = Clips(*built("3dresnet18", R3D, pretrained))
        start = Start("kinetics", licence=R3D.licence) if pretrained else Start()
    else:
        if arch not in NAMES:
            raise UserError(f"--arch {arch or chr(39) * 2} is not known{nearest(arch, NAMES)}; "
                            f"frame_transformer takes {', '.join(NAMES)}")  # fmt: skip
        images, start = build_images(arch, pretrained)
        if images.width % heads:
            raise UserError(f"--n_heads {heads} does not divide the width {images.width} of {arch}")
        net = FrameTransformer(clip_len, images, layers, heads, dropout)
    return net, start


def built(name, known, pretrained):
    """(model, width) of a Backbone. Raises UserError."""
    try:
        return known.build(pretrained), known.width
    except (OSError, RuntimeError) as error:  # the packages fetch weights themselves
        raise UserError(
            f"the weights of {name} cannot be fetched ({type(error).__name__}); fetch them on a "
            "machine with a network, or start at random with --rand_init"
        ) from error


def build_images(arch, pretrained):
    """(image encoder, Start) of an arch."""
    if arch != "convnext_tiny":
        theirs = Start(arch, licence=ARCHS[arch].licence, echo=arch == "echo-clip")
        start = theirs if pretrained else Start()
        return Images(*built(arch, ARCHS[arch], pretrained)), start
    images = ImageEncoder()
    if not pretrained:
        return images, Start()
    path = imagenet_weights()
    state = load_safely(path)
    if not isinstance(state, dict):
        raise WeightsError(f"{path} is no state dict of torchvision's ConvNeXt-Tiny; delete it")
    state = {k: v for k, v in state.items() if not k.startswith("classifier.2.")}
    with torch.device("meta"):
        images.model = ConvNeXt()
    load_strictly(images.model, state, path, "torchvision's ConvNeXt-Tiny")
    return images, Start("imagenet", sha256_file(path), IMAGENET_LICENCE)


def imagenet_weights():
    """torchvision's published file, in torch.hub's cache; fetched once, its digest compared."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / IMAGENET_URL.rpartition("/")[2]
    if not path.exists():
        try:
            fetch(IMAGENET_URL, path)
        except WeightsError as error:
            reason = str(error).partition(";")[0]
            raise WeightsError(
                f"{reason}; put the file at {path}, or start elsewhere: --model_dir_path with "
                "weights of PanEcho, or --rand_init"
            ) from error
    wanted = path.stem.rpartition("-")[2]
    if not sha256_file(path).startswith(wanted):
        raise WeightsError(
            f"{path} is not the published file: its SHA-256 does not begin with {wanted}; delete "
            "it, it is fetched anew"
        )
    return path
