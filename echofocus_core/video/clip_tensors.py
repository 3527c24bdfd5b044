"""Clips as input tensors for training the encoder, and its random dropout factors."""

import numpy as np
import torch

from echofocus_core.base.files import derive_seed
from echofocus_core.video.panecho import MEAN, STD

NORMALIZATIONS = {  # name -> (mean, std) of the three stored channels, for values 0..1
    "": ((0.0,) * 3, (1.0,) * 3),
    "imagenet": (MEAN, STD),
    "kinetics": ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)),
    "echo-clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def as_input(clips, normalization):
    """uint8 clips (B, L, S, S, 3) -> float32 (B, 3, L, S, S), normalised by stored channel."""
    mean, std = (
        torch.tensor(v, device=clips.device).view(3, 1, 1, 1) for v in NORMALIZATIONS[normalization]
    )
    return clips.permute(0, 4, 1, 2, 3).float().div_(255).sub_(mean).div_(std)


def draw_factors(encoder, keys, seed, clip_len, dropout=0, n_tasks=0):
    """(factors of stochastic depth (blocks, B L), of dropout (T, B, width)) for training, or None.

    encoder: a FrameTransformer or another backbone. The draws of a clip depend only on its key and
    the seed, not on its batch.
    """
    rates = np.array(encoder.drop_rates)
    depth, heads = [], []
    for key in keys:
        rng = np.random.default_rng(derive_seed("factors", seed, key))
        if len(rates):
            kept = rng.random((len(rates), clip_len)) >= rates[:, None]
            depth.append(kept / (1 - rates[:, None]))
        if dropout:
            kept = rng.random((n_tasks, encoder.width), np.float32) >= dropout
            heads.append(kept.astype(np.float32) / np.float32(1 - dropout))
    device = next(encoder.parameters()).device
    depth = torch.from_numpy(np.concatenate(depth, 1)).float().to(device) if depth else None
    return depth, torch.from_numpy(np.stack(heads, 1)).to(device) if heads else None
