"""Convert components of DICOM frames to colours; the pixels can overrule the header.

    components of a few frames -> Layout.check: do they have the declared layout?
                               -> choose_rule: conversion to colours -> ColourRule.bgr

An echo is mostly black and grey. In the wrong colour space its black becomes green or teal, so the
share of pixels without colour shows which colour space is right. In the wrong layout the image is
rough, since neighbouring pixels are separated.
"""

from dataclasses import dataclass, replace

import numpy as np

from echofocus_core.video.errors import VideoError

# Shares of pixels that are dark or without colour. Measured on real and simulated ultrasound with
# colour Doppler and tinted maps: 0.6 or more in the right colour space, 0.2 or less in a wrong one.
PLAUSIBLE, IMPLAUSIBLE = 0.3, 0.05
COLOURLESS = 32  # grey levels between channels, at most
BLACK, DARK, BRIGHT = 8, 40, 215  # grey levels of the brightest channel
# The right layout is smoother than a wrong one of the same bytes: on real and simulated ultrasound,
# its roughness was at most 0.65 times as large.
SMOOTHER = 0.8
JUDGED_SIDE = 32  # pixels; in smaller images the right layout cannot be recognised


# ------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class Layout:
    """The layout of components in the bytes of an uncompressed frame."""

    rows: int
    columns: int
    samples: int
    dtype: str  # of a component: 'u1', '<u2' or '>u2'
    planar: bool = False  # all values of one colour, then those of the next
    halved: bool = False  # 4:2:2: two pixels share their chroma, Y Y Cb Cr

    @property
    def size(self):
        """Bytes of a frame."""
        values = 2 if self.halved else self.samples
        return self.rows * self.columns * values * np.dtype(self.dtype).itemsize

    def components(self, data):
        """A frame's bytes -> (H, W) or (H, W, 3), unsigned."""
        H, W = self.rows, self.columns
        array = np.frombuffer(data[: self.size], self.dtype)
        if self.halved:
            pairs = array.reshape(H, W // 2, 4)
            chroma = pairs[:, :, None, 2:].repeat(2, axis=2)  # (H, W / 2, 2, 2)
            return np.concatenate([pairs[:, :, :2, None], chroma], axis=3).reshape(H, W, 3)
        if self.samples == 1:
            return array.reshape(H, W)
        if self.planar:
            return np.moveaxis(array.reshape(self.samples, H, W), 0, 2)
        return array.reshape(H, W, self.samples)

    def alternatives(self):
        """Yield (the attribute that would be wrong, Layout) for other layouts of the same size."""
        rows, columns = self.rows, self.columns
        if rows != columns and (rows % 2 == 0 or not self.halved):
            yield "Rows and Columns", replace(self, rows=columns, columns=rows)
        if self.samples == 3 and not self.halved:
            yield "PlanarConfiguration", replace(self, planar=not self.planar)
        if self.dtype != "u1":
            other = ">u2" if self.dtype == "<u2" else "<u2"
            yield "the byte order", replace(self, dtype=other)
        elif self.halved:
            whole = replace(self, halved=False, rows=rows * 2 // 3)
            yield "the size or the number of frames", whole
        elif self.samples == 3 and columns % 2 == 0:
            halved = replace(self, halved=True, planar=False, rows=rows * 3 // 2)
            yield "the size or the number of frames", halved

    def check(self, frames):
        """VideoError if the frames (a list of bytes) are smoother in another layout."""
        if min(self.rows, self.columns) < JUDGED_SIDE:
            return
        declared = self.roughness(frames)
        for name, layout in self.alternatives():
            if layout.roughness(frames) < SMOOTHER * declared:
                raise VideoError(f"the header is wrong about {name}: another layout is smoother")

    def roughness(self, frames):
        """Mean squared difference between neighbouring pixels, as a share of the contrast."""
        rough = contrast = 0.0
        for data in frames:
            image = self.components(data)
            # two neighbouring rows of every four
            upper, lower = (image[i::4].astype(np.float32) for i in (0, 1))
            contrast += float(upper.var())
            rough += float((np.diff(upper, axis=1) ** 2).mean())
            rough += float(((lower - upper[: len(lower)]) ** 2).mean())
        return rough / contrast if contrast else 0.0


# ----------------------------------------------------------------------------- components to colour


@dataclass(frozen=True)
class ColourRule:
    """A conversion of components to colours."""

    colour: str  # 'RGB', 'YBR', 'grey', 'inverse' or 'palette'
    bits: int = 8  # of a component
    palette: np.ndarray | None = None  # uint8 (N, 3) BGR of component values from `first`
    first: int = 0

    def bgr(self, components):
        """(H, W) or (H, W, 3) components -> uint8 (H, W, 3) BGR."""
        import cv2

        if self.colour == "palette":
            entries = components.astype(np.int64) - self.first
            return self.palette[entries.clip(0, len(self.palette) - 1)]
        if components.dtype != np.uint8:
            if int(components.max()) >> self.bits:
                raise VideoError(f"pixels need more than the {self.bits} bits of BitsStored")
            components = (components >> max(0, self.bits - 8)).astype(np.uint8)
        if components.ndim == 2:
            grey = 255 - components if self.colour == "inverse" else components
            return np.repeat(grey[:, :, None], 3, axis=2)
        if self.colour == "YBR":  # of full range like OpenCV's, but with Cb and Cr swapped
            return cv2.cvtColor(
                np.ascontiguousarray(components[:, :, [0, 2, 1]]), cv2.COLOR_YCrCb2BGR
            )
        return np.ascontiguousarray(components[:, :, ::-1])


# Photometric interpretation -> declared colour, for three components and for one.
DECLARED = {
    "RGB": ("RGB", "grey"),
    "YBR_RCT": ("RGB", "grey"),  # JPEG 2000's transforms, which its decoder inverts
    "YBR_ICT": ("RGB", "grey"),
    "YBR_FULL": ("YBR", "grey"),
    "YBR_FULL_422": ("YBR", "grey"),
    "MONOCHROME1": ("RGB", "inverse"),
    "MONOCHROME2": ("RGB", "grey"),
    "PALETTE COLOR": ("RGB", "palette"),
}
OTHER = {"RGB": "YBR", "YBR": "RGB", "grey": "inverse", "inverse": "grey"}
NAMES = {
    "RGB": "RGB", "YBR": "YCbCr", "grey": "grey with black = 0", "inverse": "grey with white = 0",
}  # fmt: skip


def choose_rule(photometric, samples, bits, palette, notes):
    """The ColourRule of a file: the declared one, unless the pixels contradict it (with a note).

    samples: components of a few frames; bits: per component; palette: see `read_palette`, or
    None. VideoError if no rule gives plausible colours.
    """
    colour = DECLARED[photometric][samples[0].ndim == 2]
    if colour == "palette":
        first, table = palette
        return ColourRule("palette", palette=table, first=first)
    if samples[0].itemsize > 1:
        check_depth(max(int(x.max()) for x in samples), bits, "pixels")
    declared, other = ColourRule(colour, bits), ColourRule(OTHER[colour], bits)
    if not is_wrong(declared, other, samples):
        return declared
    notes.append(f"read as {NAMES[other.colour]}: as {NAMES[colour]} it does not look like an echo")
    return other


def is_wrong(declared, other, samples):
    """Whether the other ColourRule gives plausible colours and the declared one does not.

    VideoError if neither does.
    """
    pictures = [
        np.concatenate([r.bgr(s).reshape(-1, 3) for s in samples]) for r in (declared, other)
    ]
    if declared.colour in ("grey", "inverse"):
        brightest = pictures[0].max(1)
        return (brightest >= BRIGHT).mean() > 0.5 and (brightest <= DARK).mean() < 0.05
    shares = [share_without_colour(picture) for picture in pictures]
    if max(shares) < PLAUSIBLE and shares[0] < IMPLAUSIBLE:
        raise VideoError("false colour: grey on black neither as RGB nor as YCbCr")
    return shares[1] >= PLAUSIBLE and shares[0] < shares[1] / 2


def share_without_colour(pixels):
    """The share of pixels, uint8 (n, 3), that are near black or near grey."""
    brightest = pixels.max(1)
    return ((brightest <= DARK) | (brightest - pixels.min(1) <= COLOURLESS)).mean()


def check_depth(largest, bits, name):
    """VideoError if `largest`, the largest value, needs more than `bits` bits, or uses neither of
    the two highest (the image would have a quarter of its brightness at most)."""
    used = largest.bit_length()
    if largest and not bits - 2 < used <= bits:
        raise VideoError(f"{name} of {used} bits, but the header declares {bits}")


def read_palette(header):
    """The palette of a header: (first pixel value, uint8 (N, 3) BGR). Raises VideoError."""
    from pydicom.pixels import apply_color_lut

    try:
        entries, first, bits = (int(v) for v in header.RedPaletteColorLookupTableDescriptor)
        entries = entries % 65536 or 65536
        table = apply_color_lut(np.arange(first, first + entries), header)[:, 2::-1]
        # pydicom does not support 8-bit palettes with more entries, or big-endian ones.
        if (table.dtype == np.uint8 and entries > 256) or not header.original_encoding[1]:
            raise ValueError
    except Exception as error:  # numpy and pydicom raise many kinds of errors
        raise VideoError("unreadable palette") from error
    largest = int(table.max())
    if table.dtype == np.uint8 or largest < 256:  # 8-bit entries may be stored in 16 bits
        return first % 65536, table.astype(np.uint8)
    check_depth(largest, bits, "a palette")
    return first % 65536, (table >> (bits - 8)).astype(np.uint8)
