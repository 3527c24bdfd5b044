"""Encoders by name: `open_encoder`. Each is a file with a subclass of `ClipEncoder`."""

import hashlib
import importlib.util
import inspect
from pathlib import Path

from torch.nn import Module

from echofocus_core.base.console import UserError, nearest
from echofocus_core.video import panecho
from echofocus_core.video.decode import Pixels
from echofocus_core.video.encoders.base import ClipEncoder, ImageClips, WholeClips
from echofocus_core.video.encoders.echojepa import EchoJEPA
from echofocus_core.video.encoders.echoprime import EchoPrime
from echofocus_core.video.encoders.hub import EchoCLIP, Timm, hugging_face
from echofocus_core.video.encoders.trained import TRAINED, Trained

__all__ = ["ENCODERS", "ClipEncoder", "ImageClips", "Pixels", "WholeClips", "open_encoder"]

ENCODERS = {  # name -> function of the weights ('' for the published ones) to a ClipEncoder
    "echoprime": EchoPrime,
    "echoclip": EchoCLIP,
    "echojepa-l": EchoJEPA,
}
PREFIXES = {"hf": hugging_face, "timm": Timm}  # before the name of a model


def is_panecho(name):
    """Whether this is PanEcho, or an encoder that embed/train.py trained."""
    return name.lower() in ("", "panecho") or name.startswith(TRAINED)


def is_file(name):
    """Whether the name is FILE.py:FUNCTION, which runs that file."""
    return name.partition(":")[0].endswith(".py")


def open_encoder(name="panecho", weights="", clip_len=16, size=224):
    """The ClipEncoder of a name, as for --encoder. Raises UserError.

    weights: a file, 'random', or '' for the published ones. clip_len, size: of PanEcho's clips.
    """
    if is_panecho(name):
        return Trained(weights, clip_len, size)
    weights = "" if weights == "panecho" else weights  # the option's default
    kind, _, rest = name.partition(":")
    if is_file(name):
        return from_file(Path(kind), rest, weights)
    if kind in PREFIXES and rest:
        return PREFIXES[kind](rest, weights)
    if name.lower() not in ENCODERS:
        names = ["panecho", *ENCODERS]
        raise UserError(
            f"unknown encoder {name!r}{nearest(name, names)}; the encoders are {', '.join(names)}, "
            "hf:ORG/MODEL, timm:MODEL and FILE.py:FUNCTION"
        )
    return ENCODERS[name.lower()](weights)


def weights_digest(name, weights):
    """The SHA-256 that `open_encoder(name, weights)` records."""
    if is_panecho(name):
        return panecho.weights_digest(weights)
    return open_encoder(name, weights).digest()


def from_file(path, function, weights):
    """The ClipEncoder that FUNCTION(weights) of a file returns; the file runs."""
    if not path.is_file():
        raise UserError(f"--encoder: no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(make := getattr(module, function, None)):
        raise UserError(f"{path} has no function {function!r}; use --encoder {path}:FUNCTION")
    try:
        inspect.signature(make).bind(weights)
    except TypeError as error:
        raise UserError(f"{path}: {function} must take one argument, the value of --weights") from (
            error
        )
    encoder = make(weights)
    if not isinstance(encoder, ClipEncoder):
        raise UserError(f"{path}:{function} returns {type(encoder).__name__}, not a ClipEncoder")
    if not (isinstance(getattr(encoder, "model", None), Module) and encoder.width > 0):
        raise UserError(
            f"{path}:{function}: the encoder needs a torch module as `model`, and a `width` above 0"
        )
    encoder.name = f"{path.name}:{function}"
    encoder.weights = encoder.weights or str(weights) or path.name
    encoder.model.eval().requires_grad_(False)
    code = hashlib.sha256(path.read_bytes())
    code.update(encoder.digest().encode())
    encoder.sha256 = code.hexdigest()
    return encoder
