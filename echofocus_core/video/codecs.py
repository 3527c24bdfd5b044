"""Compressed DICOM frames: their format and their components.

    frame's bytes -> read_format: FrameFormat -> decode_jpeg or decode_other: (H, W) or (H, W, 3)

The markers in a frame's bytes determine the decoder, not the header.
"""

import os
import struct
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache

import numpy as np

from echofocus_core.video.errors import NotNow, VideoError

PLUGINS = "pip install 'pylibjpeg[all]'"
# Kind of frame -> a transfer syntax with which pydicom decodes all frames of this kind.
SYNTAXES = {
    "JPEG 12 bit": "1.2.840.10008.1.2.4.51",
    "JPEG lossless": "1.2.840.10008.1.2.4.57",
    "JPEG-LS": "1.2.840.10008.1.2.4.80",
    "JPEG 2000": "1.2.840.10008.1.2.4.90",
    "HTJ2K": "1.2.840.10008.1.2.4.201",
    "RLE": "1.2.840.10008.1.2.5",
}
JPEG, J2K, JP2 = b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  "
# Adobe's marker, then one byte: 0 for unconverted components, 1 for YCbCr.
ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"


class FrameError(ValueError):
    """Why a frame does not decode; the text contains no data from the file."""


@dataclass(frozen=True)
class FrameFormat:
    """The format that a compressed frame declares; RLE declares only its kind."""

    kind: str  # 'JPEG' (8 bits) or a key of SYNTAXES
    rows: int = 0
    columns: int = 0
    samples: int = 0
    bits: int = 0

    @property
    def opencv(self):
        """Whether OpenCV decodes this format."""
        return self.kind == "JPEG" or (self.kind == "JPEG lossless" and self.bits == 8)


def is_start(data):
    """Whether a fragment starts a frame; others continue the previous frame."""
    return is_rle(data) or data.startswith((JPEG, J2K, JP2))


def is_rle(data):
    """Whether a frame starts with an RLE header: 1 to 15 segments, the first at byte 64."""
    return 1 <= int.from_bytes(data[:4], "little") <= 15 and data[4:8] == b"\x40\0\0\0"


def read_format(data):
    """The FrameFormat of a frame. Raises FrameError if it cannot be read."""
    try:
        if data.startswith(JPEG):
            return jpeg_format(data)
        if data.startswith((J2K, JP2)):
            return j2k_format(data)
    except (struct.error, IndexError, KeyError):
        raise FrameError("it ends within its header") from None
    if not is_rle(data):
        raise FrameError("its compression is unknown")
    return FrameFormat("RLE")


def jpeg_format(data):
    kinds = {0xC3: "JPEG lossless", 0xF7: "JPEG-LS"}
    for mark, at in jpeg_segments(data):
        if (0xC0 <= mark <= 0xCF and mark not in (0xC4, 0xC8, 0xCC)) or mark == 0xF7:
            bits, rows, columns, samples = struct.unpack_from(">BHHB", data, at)
            kind = kinds.get(mark, "JPEG" if bits == 8 else "JPEG 12 bit")
            return FrameFormat(kind, rows, columns, samples, bits)
    raise FrameError("broken JPEG")


def j2k_format(data):
    from pydicom.pixels.utils import get_j2k_parameters

    at = data.index(J2K[2:]) + 4  # the content of the SIZ segment, ISO 15444-1 A.5.1
    capabilities, width, height, left, top = struct.unpack_from(">H4I", data, at)
    (samples,) = struct.unpack_from(">H", data, at + 34)
    kind = "HTJ2K" if capabilities & 0x4000 else "JPEG 2000"
    parameters = get_j2k_parameters(data)
    if parameters["is_signed"]:
        raise VideoError("signed pixel values: not an ultrasound image")
    return FrameFormat(kind, height - top, width - left, samples, parameters["precision"])


def jpeg_segments(data):
    """(marker, start of its content) of the segments before a JPEG's first scan."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        mark = data[at + 1]
        if mark == 0xFF:  # a fill byte
            at += 1
            continue
        if mark in (0xDA, 0xD9):
            return
        yield mark, at + 4
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def with_transform(jpeg, transform):
    """A JPEG's bytes with a mark: YCbCr (1) or components without a transform (0).

    Decoders use a JFIF marker, else an Adobe marker, else they guess. So both are replaced.
    """
    parts, last = [], 2
    for mark, at in jpeg_segments(jpeg):
        if (mark == 0xE0 and jpeg.startswith(b"JFIF\0", at)) or mark == 0xEE:
            parts.append(jpeg[last : at - 4])
            last = at - 2 + int.from_bytes(jpeg[at - 2 : at], "big")
    return b"".join((b"\xff\xd8", ADOBE, bytes([transform]), *parts, jpeg[last:]))


@cache
def stderr_file():
    return tempfile.TemporaryFile()


def call_with_stderr(function, *args):
    """(return value of a C function, its output on standard error)."""
    copy, terminal = stderr_file(), os.dup(2)
    copy.seek(0)
    copy.truncate()
    os.dup2(copy.fileno(), 2)
    try:
        result = function(*args)
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
    copy.seek(0)
    return result, copy.read().decode(errors="replace")


def decode_jpeg(jpeg, frame_format, transform, small=False):
    """8-bit JPEG -> uint8 (H, W, 3) BGR; with transform 0, its components in reverse order.

    small: decode at an eighth of the size, which is faster. Raises FrameError if it is damaged.
    """
    import cv2

    if not jpeg.rstrip(b"\0").endswith(b"\xff\xd9"):  # the end-of-image mark
        raise FrameError("broken JPEG")
    mode = cv2.IMREAD_REDUCED_COLOR_8 if small else cv2.IMREAD_COLOR
    data = np.frombuffer(with_transform(jpeg, transform), np.uint8)
    frame, errors = call_with_stderr(cv2.imdecode, data, mode | cv2.IMREAD_IGNORE_ORIENTATION)
    if "nsufficient memory" in errors:
        raise MemoryError
    # libjpeg fills in what it cannot decode and only prints a warning.
    if frame is None or "premature end" in errors or "bad Huffman" in errors:
        raise FrameError("broken JPEG")
    if not small and frame.shape[:2] != (frame_format.rows, frame_format.columns):
        raise FrameError("broken JPEG")
    return frame


def find_decoder(frame_format):
    """pydicom's decoder for frames that OpenCV does not decode. NotNow if it is not installed."""
    from pydicom.pixels import get_decoder

    decoder = get_decoder(SYNTAXES[frame_format.kind])
    if not decoder.is_available:
        raise NotNow(f"{frame_format.kind} needs a decoder: {PLUGINS}")
    return decoder


def decode_other(data, form):
    """A compressed frame -> its stored components, (H, W) or (H, W, 3).

    form: its FrameFormat; for RLE, completed from the header.
    """
    from pydicom.encaps import encapsulate

    decoder = find_decoder(form)
    best = form.kind == "RLE" or {"pylibjpeg", "gdcm"} & set(decoder.available_plugins)
    bits = 8 if form.bits <= 8 else 16
    try:
        with warnings.catch_warnings():
            if form.kind == "RLE":  # pydicom cuts a frame of another size and only warns
                warnings.simplefilter("error", UserWarning)
            return decoder.as_array(
                encapsulate([data]),
                raw=True,
                rows=form.rows,
                columns=form.columns,
                number_of_frames=1,
                samples_per_pixel=form.samples,
                bits_allocated=bits,
                bits_stored=form.bits,
                pixel_representation=0,
                photometric_interpretation="MONOCHROME2" if form.samples == 1 else "RGB",
                planar_configuration=0,
                pixel_keyword="PixelData",
            )[0]
    except Exception as error:  # decoders raise many kinds of errors
        if best:
            raise
        raise NotNow(f"{form.kind}: damaged, or needs another decoder: {PLUGINS}") from error
