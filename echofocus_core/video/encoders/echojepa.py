"""EchoJEPA-L: a V-JEPA 2 ViT-L/16, with the architecture of transformers."""

import re

from echofocus_core.base.checkpoints import WeightsError
from echofocus_core.video.decode import Pixels
from echofocus_core.video.encoders.base import ClipEncoder, library, load_weights

NAMES = (  # of the training code -> of transformers
    (r"^module\.backbone\.", ""),
    (r"^blocks\.", "encoder.layer."),
    (r"\battn\.", "attention."),
    (r"^patch_embed\.", "encoder.embeddings.patch_embeddings."),
    (r"^norm\.", "encoder.layernorm."),
)


class EchoJEPA(ClipEncoder):
    """16 frames -> 1568 tokens of 1024 features, and their mean."""

    name, width = "echojepa-l", 1024
    licence, citation = "see EchoJEPA's repository", "EchoJEPA, 2026; Assran et al., V-JEPA 2, 2025"
    pixels = Pixels(resize=256, filter="bilinear")
    config = {"crop_size": 224, "frames_per_clip": 16}  # noqa: RUF012

    def __init__(self, weights=""):
        source = "a checkpoint with 'target_encoder', or a state dict of transformers' VJEPA2Model"
        load_weights(self, self.network, weights, source=source, state_of=target_encoder)

    def network(self):
        transformers = library("transformers")
        model = transformers.VJEPA2Model(transformers.VJEPA2Config(**self.config))
        del model.predictor
        return model

    def encode(self, clips):
        videos = clips.transpose(1, 2)  # (n, frames, 3, S, S)
        return self.model(videos, skip_predictor=True).last_hidden_state.mean(1)


def target_encoder(saved):
    """The state dict of an encoder in the names of transformers. Raises WeightsError."""
    state = saved.get("target_encoder", saved.get("model", saved))
    named = {}
    for name, tensor in state.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if name == "pos_embed" or name.startswith("predictor."):
            continue  # positions are rotations, which have no weights
        if "qkv." in name:
            for part, values in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                named[name.replace("qkv", part)] = values
        else:
            named[name] = tensor
    if not any(name.startswith("encoder.layer.") for name in named):
        raise WeightsError("these weights are not of a V-JEPA 2 encoder: they have no blocks")
    return named
