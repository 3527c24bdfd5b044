"""Changes of ultrasound images that scanners and bodies make, to measure how robust answers are.

Pixels are log-compressed echoes, so that a loss or a gain in decibels is subtracted or added. Only
the ultrasound sector changes. The strength of each is a share of the full grey scale:

    depth=0.5     loss that grows with the distance from the transducer, to 0.5 at the far end
    shadow=0.3    an acoustic shadow across 0.3 of the sector's angle, from a drawn depth on
    speckle=0.2   noise of fully developed speckle (the logarithm of a Rayleigh amplitude)
    gain=0.2      brighter everywhere; negative values are darker
"""

import numpy as np

from echofocus_core.base.console import UserError

KINDS = ("depth", "shadow", "speckle", "gain")
SHADOW_LOSS = 0.8  # of the full scale, inside an acoustic shadow
GRAIN = 1.0  # standard deviation of the blur of speckle, in pixels


def read_perturbations(texts):
    """['depth=0.5', 'gain=-0.1'] -> {kind: strength}, in the order of KINDS. Raises UserError."""
    strengths = {}
    for text in texts:
        kind, _, number = text.partition("=")
        try:
            strengths[kind] = float(number)
        except ValueError:
            strengths[kind] = np.nan
        least = -1 if kind == "gain" else 0
        if kind not in KINDS or not least <= strengths[kind] <= 1:
            raise UserError(f"--perturb {text}: one of {', '.join(KINDS)} and a share, depth=0.5")
    return {kind: strengths[kind] for kind in KINDS if strengths.get(kind)}


def perturb(frames, inside, strengths, rng):
    """Frames (n, H, W, 3) uint8 with the changes of `strengths` inside the sector.

    inside: (H, W, 1), 1 in the sector; rng: draws the shadow and the speckle.
    """
    inside = np.asarray(inside)[:, :, 0] > 0
    distance, angle = sector_coordinates(inside)
    change = -strengths.get("depth", 0) * distance + strengths.get("gain", 0)
    if width := strengths.get("shadow", 0):
        centre, start = rng.uniform(width / 2, 1 - width / 2), rng.uniform(0.1, 0.4)
        change -= SHADOW_LOSS * ((abs(angle - centre) <= width / 2) & (distance >= start))
    perturbed = []
    for frame in frames:
        total = change
        if grain := strengths.get("speckle", 0):
            total = change + grain * speckle(inside.shape, rng)
        grey = frame + 255 * (total * inside)[:, :, None]
        perturbed.append(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    return perturbed


def sector_coordinates(inside):
    """(distance from the transducer, angle), each (H, W) from 0 to 1 over a sector (H, W) bool.

    The transducer is at the middle of the sector's highest row; nearer than half of the sector, the
    angle may be beyond 0 and 1.
    """
    rows, columns = np.nonzero(inside)
    top = rows.min()
    x, y = np.meshgrid(np.arange(inside.shape[1]), np.arange(inside.shape[0]))
    x, y = x - columns[rows == top].mean(), y - top
    distance, angle = np.hypot(x, y), np.arctan2(x, y)
    distance = distance / max(distance[inside].max(), 1)
    far = angle[inside & (distance > 0.5)]  # the top of a curved sector has every angle
    return distance, (angle - far.min()) / max(np.ptp(far), 1e-9)


def speckle(shape, rng):
    """Zero-mean noise (H, W) of standard deviation 1: the logarithm of a blurred Rayleigh field."""
    import cv2

    field = rng.standard_normal((2, *shape)).astype(np.float32)
    parts = [cv2.GaussianBlur(part, (0, 0), GRAIN) for part in field]
    noise = np.log(np.hypot(*parts) + 1e-6)
    return (noise - noise.mean()) / noise.std()
