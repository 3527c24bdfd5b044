"""General encoders of Hugging Face transformers, timm and open_clip.

Image models encode each frame; a clip's embedding is the mean over its frames.
"""

from pathlib import Path

from torch.nn.functional import normalize

from echofocus_core.base.console import UserError
from echofocus_core.video.decode import Pixels
from echofocus_core.video.encoders.base import ClipEncoder, ImageClips, library, untrained

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def finish(encoder, model, weights):
    encoder.model = model.float().eval().requires_grad_(False)  # hubs have half precision too
    encoder.weights = str(weights or encoder.name)
    return encoder


def download(name, load):
    """The result of `load()`; a UserError if the hub has no such model or cannot be reached."""
    try:
        return load()
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"{name} cannot be loaded: {reason}") from error


class EchoCLIP(ImageClips):
    """EchoCLIP's image tower; features of a frame have length 1."""

    name, width = "echoclip", 512
    licence, citation = "see its card on the hub", "Christensen et al., Nature Medicine 2024"
    pixels = Pixels(resize=224)
    mean, deviation = CLIP_MEAN, CLIP_DEVIATION
    hub = "hf-hub:mkaichristensen/echo-clip"

    def __init__(self, weights=""):
        open_clip = library("open_clip", "open_clip_torch")
        if weights in ("", "random"):
            model, pretrained = ("convnext_base", None) if weights else (self.hub, None)
        else:
            model, pretrained = "convnext_base", str(weights)

        def load():
            return open_clip.create_model(model, pretrained=pretrained).visual

        finish(self, untrained(lambda: download(self.name, load)), weights)

    def encode(self, images):
        return normalize(self.model(images).float(), dim=-1)


class Timm(ImageClips):
    """An image model of timm without its last layer, with the transform of its data config."""

    def __init__(self, model_name, weights=""):
        timm = library("timm")
        self.name = f"timm:{model_name}"
        from_file = {"checkpoint_path": str(weights)} if weights not in ("", "random") else {}

        def load():
            return timm.create_model(model_name, not weights, num_classes=0, **from_file)

        finish(self, untrained(lambda: download(self.name, load)), weights)
        self.width = self.model.num_features
        config = timm.data.resolve_data_config({}, model=self.model)
        size, mode = config["input_size"][-1], config["crop_mode"]
        if mode not in ("center", "squash"):
            raise UserError(f"{self.name}: crops of the kind '{mode}' are not supported")
        resize = int(size / config["crop_pct"]) if mode == "center" else 0
        self.pixels = Pixels(size, resize=resize, filter=config["interpolation"])
        self.mean, self.deviation = config["mean"], config["std"]
        self.licence = str(self.model.pretrained_cfg.get("license") or "see timm's model card")
        self.citation = "Wightman, PyTorch Image Models"


class HuggingFace:
    """What image and video models of transformers share; see `hugging_face`."""

    def set_up(self, name, model, processor, weights):
        self.name = f"hf:{Path(name).name if Path(name).is_dir() else name}"  # no local path
        finish(self, model, weights)
        self.licence = self.citation = f"see the card of {name}"
        self.pixels = pixels_of(processor, self.name)
        self.mean, self.deviation = tuple(processor.image_mean), tuple(processor.image_std)
        self.range = 255 * processor.rescale_factor if processor.do_rescale else 255.0
        config = getattr(model.config, "vision_config", model.config)
        self.width = config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else (
            config.hidden_size
        )  # fmt: skip

    def pool(self, output):
        """The pooled features of a model's output, or the mean over its tokens or pixels."""
        if getattr(output, "pooler_output", None) is not None:
            return output.pooler_output.flatten(1)
        return output.last_hidden_state.mean(1)


class HuggingFaceImages(HuggingFace, ImageClips):
    def encode(self, images):
        return self.pool(self.model(pixel_values=images))


class HuggingFaceVideos(HuggingFace, ClipEncoder):
    def encode(self, clips):
        videos = clips.transpose(1, 2)  # (n, frames, 3, S, S)
        if self.model.config.model_type == "vjepa2":
            output = self.model(videos, skip_predictor=True)
        else:
            output = self.model(videos)
        return self.pool(output)


def hugging_face(name, weights=""):
    """The encoder of `hf:ORG/MODEL`, or of a folder with a model in the format of transformers."""
    transformers = library("transformers")
    source = str(weights) if weights not in ("", "random") else name

    def load():
        config = transformers.AutoConfig.from_pretrained(source)
        if weights == "random":
            return transformers.AutoModel.from_config(config)
        return transformers.AutoModel.from_pretrained(source)

    def load_processor():
        try:
            return transformers.AutoVideoProcessor.from_pretrained(source)
        except (OSError, ValueError, ImportError):
            return transformers.AutoImageProcessor.from_pretrained(source)

    model = untrained(lambda: download(f"hf:{name}", load))
    processor = download(f"hf:{name}", load_processor)
    model = getattr(model, "vision_model", model)  # SigLIP and CLIP have a text tower too
    frames = getattr(model.config, "frames_per_clip", getattr(model.config, "num_frames", 0))
    encoder = HuggingFaceVideos() if frames else HuggingFaceImages()
    encoder.set_up(name, model, processor, weights)
    encoder.frames = frames or encoder.frames
    return encoder


def pixels_of(processor, name):
    """The Pixels of an image or video processor of transformers. Raises UserError."""
    size, crop = dict(processor.size or {}), dict(getattr(processor, "crop_size", None) or {})
    crops = getattr(processor, "do_center_crop", False) and crop
    try:
        filter_name = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")[
            int(processor.resample)
        ]
        side = crop["height"] if crops else size.get("height") or size["shortest_edge"]
        resize = size.get("shortest_edge", 0)
        if crops and not resize and size["height"] != side:
            raise KeyError("shortest_edge")  # the whole frame is resized, then cropped
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{name}: its processor's size {size} is not supported") from error
    return Pixels(side, resize=resize, filter=filter_name, floor=True)
