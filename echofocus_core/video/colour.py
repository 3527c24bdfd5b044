"""Pixels of DICOM frames: from stored bytes to BGR, by what they are, not by what a header claims.

    stored frame -> stream_of: what the bytes themselves say -> components: (H, W) or (H, W, 3)
    a few frames -> choose_reading: how components are colours, tested on the pixels -> Reading

An echo is mostly black and grey. Read in the wrong colour space its black is green or teal, so
that the share of pixels without colour tells which reading is right.
"""

import os
import tempfile
from dataclasses import dataclass

import numpy as np

from echofocus_core.video.errors import NotNow, VideoError

# Shares of pixels that are dark or without colour. Measured on real and simulated ultrasound,
# colour Doppler and tinted maps included: 0.6 or more as it is, 0.2 or less in a wrong reading.
PLAUSIBLE, IMPLAUSIBLE = 0.3, 0.05
COLOURLESS = 32  # grey levels between channels, at most
BLACK, DARK, BRIGHT = 8, 40, 215  # grey levels of the brightest channel

PLUGINS = "pip install 'pylibjpeg[all]'"


# ------------------------------------------------------------------------------------- coded frames


@dataclass(frozen=True)
class Stream:
    """What a coded frame says of itself."""

    kind: str  # 'JPEG' (8 bits), 'JPEG 12 bit', 'JPEG lossless', 'JPEG-LS', 'JPEG 2000', 'HTJ2K'
    rows: int
    columns: int
    samples: int
    bits: int

    @property
    def opencv(self):
        """Whether OpenCV decodes it, always."""
        return self.kind == "JPEG" or (self.kind == "JPEG lossless" and self.bits == 8)


class Broken(ValueError):
    """Why a frame does not decode, in words of ours."""


# Kind of stream -> the transfer syntax under which pydicom decodes all of it.
SYNTAXES = {
    "JPEG 12 bit": "1.2.840.10008.1.2.4.51",
    "JPEG lossless": "1.2.840.10008.1.2.4.57",
    "JPEG-LS": "1.2.840.10008.1.2.4.80",
    "JPEG 2000": "1.2.840.10008.1.2.4.90",
    "HTJ2K": "1.2.840.10008.1.2.4.201",
    "RLE": "1.2.840.10008.1.2.5",
}
J2K, JP2 = b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  "
STARTS = (b"\xff\xd8\xff", J2K, JP2)  # of a frame; a fragment that begins otherwise goes on with it
ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"  # and a byte: 0 components as they are, 1 YCbCr


def stream_of(data):
    """The Stream of a coded frame, None when it has no marks of its own (RLE, or no image)."""
    if data.startswith(STARTS[0]):
        for mark, at in jpeg_segments(data):
            if (0xC0 <= mark <= 0xCF and mark not in (0xC4, 0xC8, 0xCC)) or mark == 0xF7:
                bits, rows, columns = data[at], be(data, at + 1, 2), be(data, at + 3, 2)
                kind = {0xC3: "JPEG lossless", 0xF7: "JPEG-LS"}.get(mark, "JPEG")
                kind = "JPEG 12 bit" if kind == "JPEG" and bits != 8 else kind
                return Stream(kind, rows, columns, data[at + 5], bits)
        return None
    at = data.find(J2K, 0, 4096) if data.startswith((J2K, JP2)) else -1
    if at < 0 or len(data) < at + 43:
        return None
    sides = [be(data, at + 8 + 4 * i, 4) for i in range(4)]  # width, height, and their offsets
    kind = "HTJ2K" if data[at + 6] & 0x40 else "JPEG 2000"
    bits = (data[at + 42] & 0x7F) + 1
    return Stream(kind, sides[1] - sides[3], sides[0] - sides[2], be(data, at + 40, 2), bits)


def be(data, at, n):
    if at + n > len(data):
        raise VideoError("truncated: a frame breaks off in its first bytes")
    return int.from_bytes(data[at : at + n], "big")


def jpeg_segments(data):
    """(mark, where its content starts) of the segments before a JPEG's first scan."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        mark = data[at + 1]
        if mark == 0xFF:  # a fill byte
            at += 1
            continue
        if mark in (0xDA, 0xD9):
            return
        yield mark, at + 4
        at += 2 + be(data, at + 2, 2)


def with_transform(jpeg, transform):
    """The JPEG marked as of YCbCr (1) or of components that stay as they are (0).

    Decoders believe a JFIF mark, else an Adobe mark, else guess; so the first two are taken out.
    """
    kept, last = [], 2
    for mark, at in jpeg_segments(jpeg):
        if (mark == 0xE0 and jpeg.startswith(b"JFIF\0", at)) or mark == 0xEE:
            kept.append(jpeg[last : at - 4])
            last = at - 2 + be(jpeg, at - 2, 2)
    return b"".join((b"\xff\xd8", ADOBE, bytes([transform]), *kept, jpeg[last:]))


def with_whole_scan(jpeg):
    """A sequential JPEG whose first scan says that it is of all coefficients, 0 to 63.

    No other is possible (ITU T.81, table B.3), yet some encoders write 0 to 0, on which decoders of
    more than 8 bits stop.
    """
    marks = [mark for mark, _ in jpeg_segments(jpeg)]
    scan = jpeg.find(b"\xff\xda", max(at for _, at in jpeg_segments(jpeg)))
    if 0xC1 not in marks or scan < 0 or len(jpeg) < scan + 5:
        return jpeg
    at = scan + 5 + 2 * jpeg[scan + 4]
    return jpeg[:at] + b"\0\x3f\0" + jpeg[at + 3 :]


class Listener:
    """Calls C functions and gives what they return and what they write to standard error."""

    def __init__(self):
        self.said, self.stderr = tempfile.TemporaryFile(), os.dup(2)  # noqa: SIM115
        self.heard = 0  # bytes

    def __call__(self, function, *args):
        os.dup2(self.said.fileno(), 2)
        try:
            result = function(*args)
        finally:
            os.dup2(self.stderr, 2)
        length = os.fstat(self.said.fileno()).st_size - self.heard
        text = os.pread(self.said.fileno(), length, self.heard) if length else b""
        self.heard += length
        return result, text.decode(errors="replace")

    def close(self):
        self.said.close()
        os.close(self.stderr)


def decode_jpeg(jpeg, stream, transform, listener, small=False):
    """A JPEG of 8 bits -> uint8 (H, W, 3) BGR; at transform 0, its components in reverse order.

    small: at an eighth of the size, which is faster. Broken when it is damaged.
    """
    import cv2

    if not jpeg.rstrip(b"\0").endswith(b"\xff\xd9"):  # the end-of-image mark
        raise Broken("broken JPEG")
    how = cv2.IMREAD_REDUCED_COLOR_8 if small else cv2.IMREAD_COLOR
    marked = np.frombuffer(with_transform(jpeg, transform), np.uint8)
    frame, said = listener(cv2.imdecode, marked, how | cv2.IMREAD_IGNORE_ORIENTATION)
    if "nsufficient memory" in said:
        raise MemoryError
    # libjpeg makes up what it cannot decode, and only says so.
    if frame is None or "premature end" in said or "bad Huffman" in said:
        raise Broken("broken JPEG")
    if not small and frame.shape[:2] != (stream.rows, stream.columns):
        raise Broken("broken JPEG")
    return frame


def is_rle(data):
    """Whether a frame starts as run-length encoding does: 1 to 15 segments, the first at 64."""
    return 1 <= int.from_bytes(data[:4], "little") <= 15 and data[4:8] == b"\x40\0\0\0"


def decoder_of(stream):
    """pydicom's decoder of a Stream that OpenCV does not decode. VideoError when there is none."""
    from pydicom.pixels import get_decoder

    decoder = get_decoder(SYNTAXES[stream.kind])
    if not decoder.is_available:
        raise NotNow(f"{stream.kind} needs a decoder: {PLUGINS}")
    return decoder


def decode_coded(data, stream, stored):
    """A coded frame -> its components, (H, W) or (H, W, 3), as they are stored.

    stream: the frame's own Stream (for RLE a Stream of the header's claims); stored: BitsStored.
    VideoError when no decoder for it is installed.
    """
    from pydicom.encaps import encapsulate

    if stream.kind == "JPEG 12 bit":
        data = with_whole_scan(data)
    decoder = decoder_of(stream)
    best = stream.kind == "RLE" or {"pylibjpeg", "gdcm"} & set(decoder.available_plugins)
    bits = stream.bits if stream.kind == "RLE" else 8 if stream.bits <= 8 else 16
    try:
        return decoder.as_array(
            encapsulate([data]),
            raw=True,
            rows=stream.rows,
            columns=stream.columns,
            number_of_frames=1,
            samples_per_pixel=stream.samples,
            bits_allocated=bits,
            bits_stored=min(stored, bits) if stream.kind == "RLE" else stream.bits,
            pixel_representation=0,
            photometric_interpretation="MONOCHROME2" if stream.samples == 1 else "RGB",
            planar_configuration=0,
            pixel_keyword="PixelData",
        )[0]
    except Exception as error:  # decoders raise many kinds
        if best:
            raise
        raise NotNow(f"{stream.kind}: damaged, or for another decoder: {PLUGINS}") from error


# ---------------------------------------------------------------------------------- stored as it is


@dataclass(frozen=True)
class Layout:
    """How the bytes of an uncompressed frame are its components."""

    rows: int
    columns: int
    samples: int
    bytes: int  # of a component
    big_endian: bool = False
    planar: bool = False  # one colour after the other
    halved: bool = False  # 4:2:2, two pixels share their chroma: Y Y Cb Cr

    @property
    def size(self):
        """Bytes of a frame."""
        each = 2 if self.halved else self.samples
        return self.rows * self.columns * each * self.bytes

    def components(self, data):
        """A frame's bytes -> (H, W) or (H, W, 3), unsigned."""
        H, W = self.rows, self.columns
        array = np.frombuffer(data, f"{'>' if self.big_endian else '<'}u{self.bytes}")
        if self.halved:
            pairs = array.reshape(H, W // 2, 4)
            chroma = pairs[:, :, None, 2:].repeat(2, axis=2)  # (H, W / 2, 2, 2)
            return np.concatenate([pairs[:, :, :2, None], chroma], axis=3).reshape(H, W, 3)
        if self.samples == 1:
            return array.reshape(H, W)
        if self.planar:
            return np.moveaxis(array.reshape(self.samples, H, W), 0, 2)
        return array.reshape(H, W, self.samples)


# ----------------------------------------------------------------------------- components to colour


@dataclass(frozen=True)
class Reading:
    """How components become colours."""

    colour: str  # 'RGB', 'YBR', 'grey', 'inverse' or 'palette'
    shift: int = 0  # bits that are more than 8
    swapped: bool = False  # the bytes of a component are the other way round
    palette: np.ndarray | None = None  # uint8 (N, 3) BGR of component values from `first`
    first: int = 0
    mask: int = -1  # the bits of a component that are of the image

    def bgr(self, components):
        """(H, W) or (H, W, 3) components -> uint8 (H, W, 3) BGR."""
        import cv2

        if self.swapped:
            components = components.byteswap()
        components = masked(components, self.mask)
        if self.colour == "palette":
            entries = components.astype(np.int64) - self.first
            return self.palette[entries.clip(0, len(self.palette) - 1)]
        if components.dtype != np.uint8:
            components = (components >> self.shift).clip(0, 255).astype(np.uint8)
        if components.ndim == 2:
            grey = 255 - components if self.colour == "inverse" else components
            return np.repeat(grey[:, :, None], 3, axis=2)
        if self.colour == "YBR":  # of full range: OpenCV's, its chroma the other way round
            return cv2.cvtColor(
                np.ascontiguousarray(components[:, :, [0, 2, 1]]), cv2.COLOR_YCrCb2BGR
            )
        return np.ascontiguousarray(components[:, :, ::-1])


# What a photometric interpretation declares: of three components, of one.
DECLARED = {
    "RGB": ("RGB", "grey"),
    "YBR_RCT": ("RGB", "grey"),  # JPEG 2000's own transforms: undone by its decoder
    "YBR_ICT": ("RGB", "grey"),
    "YBR_FULL": ("YBR", "grey"),
    "YBR_FULL_422": ("YBR", "grey"),
    "MONOCHROME1": ("RGB", "inverse"),
    "MONOCHROME2": ("RGB", "grey"),
    "PALETTE COLOR": ("RGB", "palette"),
}
OTHER = {"RGB": "YBR", "YBR": "RGB", "grey": "inverse", "inverse": "grey"}
NAMES = {
    "RGB": "RGB", "YBR": "YCbCr", "grey": "grey, black being 0", "inverse": "grey, white being 0",
    "palette": "a palette",
}  # fmt: skip


def choose_reading(photometric, samples, stored, overlays, palette, every, notes):
    """The Reading of a file: the declared one, unless the pixels say otherwise (then with a note).

    samples: components of a few frames; stored: bits of a component, as declared; overlays: bits
    that hold other things, as declared; palette: see `read_palette`, or None; every: function that
    yields the components of all frames. VideoError where no reading makes an echo of them.
    """
    declared = DECLARED[photometric][samples[0].ndim == 2]
    swapped, shift, mask = byte_order(samples), 0, -1
    if samples[0].itemsize > 1:
        claimed = min(stored, 8 * samples[0].itemsize)
        mask, largest = image_bits(every, swapped, claimed, overlays, notes)
    if declared == "palette":
        first, table, bits = palette
        table = table.byteswap() if byte_order([table]) else table
        shift = excess_bits(int(table.max()), bits, "palette", notes)
        colours = (table >> shift).clip(0, 255).astype(np.uint8)[:, ::-1]
        return Reading("palette", swapped=swapped, palette=colours, first=first, mask=mask)
    if samples[0].itemsize > 1:
        shift = excess_bits(largest, claimed, "pixels", notes)
    readings = [
        Reading(colour, shift, swapped, mask=mask) for colour in (declared, OTHER[declared])
    ]
    return choose_colour(readings, samples, notes)


def choose_colour(readings, samples, notes):
    """Of two Readings, the declared one first, that which makes an echo of the samples."""
    looks = [np.concatenate([r.bgr(s).reshape(-1, 3) for s in samples]) for r in readings]
    declared, other = readings
    if declared.colour in ("grey", "inverse"):
        brightest = looks[0].max(1)
        wrong = (brightest >= BRIGHT).mean() > 0.5 and (brightest <= DARK).mean() < 0.05
    else:
        shares = [share_without_colour(look) for look in looks]
        wrong = shares[1] >= PLAUSIBLE and shares[0] < shares[1] / 2
        if max(shares) < PLAUSIBLE and shares[0] < IMPLAUSIBLE:
            raise VideoError("false colour: neither RGB nor YCbCr makes it grey on black")
    if wrong:
        notes.append(f"read as {NAMES[other.colour]}: as {NAMES[declared.colour]} it is no echo")
    return readings[int(wrong)]


def share_without_colour(pixels):
    """The share of pixels, uint8 (n, 3), that are near black or near grey."""
    brightest = pixels.max(1)
    return ((brightest <= DARK) | (brightest - pixels.min(1) <= COLOURLESS)).mean()


FEW = 0.02  # of the pixels: a graphic, where more would be the image


def image_bits(every, swapped, claimed, overlays, notes):
    """(mask of the bits that are of the image, the largest component of all frames under it).

    Left out are bits beyond the claimed ones in which an overlay is declared, and all of them
    where they are the same throughout, or set in few pixels whose edges vanish without.
    """
    usual = ~sum(1 << bit for bit in set(overlays) if bit >= claimed)
    inner = (1 << claimed) - 1
    union, common, largest, inside, few, n = 0, -1, 0, 0, 0, 0
    rough, without = 0.0, 0.0
    for components in every():
        components = masked(components.byteswap() if swapped else components, usual)
        union |= int(np.bitwise_or.reduce(components, axis=None))
        common &= int(np.bitwise_and.reduce(components, axis=None))
        largest, n = max(largest, int(components.max())), n + components.size
        stored = masked(components, inner)
        inside, beyond = max(inside, int(stored.max())), components != stored
        few += np.count_nonzero(beyond)
        for axis in (0, 1) if beyond.any() else ():
            edges = np.diff(beyond, axis=axis)
            rough += (np.diff(components.astype(float), axis=axis)[edges] ** 2).sum()
            without += (np.diff(stored.astype(float), axis=axis)[edges] ** 2).sum()
    graphic = few < FEW * n and without < rough / 4
    if union > inner and (union >> claimed == common >> claimed or graphic):
        notes.append(f"bits beyond the {claimed} of the image left out")
        return inner, inside
    return usual, largest


def masked(components, mask):
    """The components' bits that are in the mask too."""
    most = np.iinfo(components.dtype).max
    return components if mask & most == most else components & components.dtype.type(mask & most)


def excess_bits(largest, claimed, what, notes):
    """By how many bits values up to `largest` exceed 8: as claimed, unless it cannot be so.

    It cannot when a value is larger, nor when none uses the two highest bits: the image would be
    at a quarter of its brightness, or black.
    """
    used = max(8, largest.bit_length() + largest.bit_length() % 2)  # depths are even
    if used > claimed + 1 or used == 8 < claimed or used <= claimed - 2:
        notes.append(f"{what} of {used} bits, the header says otherwise")
        claimed = used
    return max(0, claimed - 8)


# Of two orders of the components the right one is smoother: measured on real and simulated
# ultrasound, 0.65 of the wrong one's roughness or less.
SMOOTHER = 0.8


def roughness(components):
    """Mean square change from a pixel to the next, down and to the right, of (H, W, 3)."""
    wide = components.astype(np.float32)
    return sum(float((np.diff(wide, axis=axis) ** 2).mean()) for axis in (0, 1))


def byte_order(arrays):
    """Whether the bytes of wide components stand the other way round: then neighbours are alike."""
    if arrays[0].itemsize == 1:
        return False

    def change(array):
        array = array.astype(np.float64)
        spread = array.max() - array.min()
        return np.abs(np.diff(array, axis=0)).mean() / spread if spread else 0.0

    straight, swapped = (
        np.mean([change(a) for a in group]) for group in (arrays, [a.byteswap() for a in arrays])
    )
    return bool(swapped < straight / 2)


def read_palette(header, big_endian):
    """The palette of a header: (first pixel value, uint16 (N, 3) RGB, bits of an entry).

    C.7.6.3.1.5 and .6 of the standard's part 3. Raises many kinds of error when it is malformed.
    """
    from pydicom.pixels import apply_color_lut

    entries, first, bits = (int(v) for v in header.RedPaletteColorLookupTableDescriptor)
    entries = entries % 65536 or 65536
    first = first % 65536
    if "RedPaletteColorLookupTableData" not in header:  # in segments
        values = np.arange(first, first + entries).astype(np.uint16)
        return first, apply_color_lut(values, header)[:, :3].astype(np.uint16), bits
    channels = []
    for colour in ("Red", "Green", "Blue"):
        data = bytes(header[f"{colour}PaletteColorLookupTableData"].value)
        wide = len(data) >= 2 * entries  # 8-bit entries may stand in 16 bits
        order = ">" if big_endian else "<"
        if not wide and big_endian:  # two a word
            data = np.frombuffer(data[: len(data) // 2 * 2], "<u2").byteswap().tobytes()
        channels.append(np.frombuffer(data, f"{order}u2" if wide else "u1", entries))
    table = np.stack(channels, axis=1).astype(np.uint16)
    return first, table, bits if wide else 8
