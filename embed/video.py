"""Video in: frames from AVI, MP4/MOV and DICOM cines, and the published clip sampling.

    file -> iter_frames: uint8 (H, W, 3) BGR, one after the other -> resize_crop: (S, S, 3)
         -> clip_starts, clip_frames: which frames make the clips

No torch in here: the file is also the program that the decoder processes run
(`python embed/video.py`), so that a file which crashes or hangs a decoder stops nothing else.
"""

import hashlib
import os
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VIDEO_SUFFIXES = {".avi", ".mp4", ".mov", ".m4v", ".mkv", ".wmv", ".mpg", ".mpeg"}
DICOM_SUFFIXES = {".dcm", ".dicom", ".ima"}

# Resized to 256x256, then the central 224x224: the published ratio, kept for other sizes.
RESIZE_OVER_CROP = 256 / 224

M_MODE, SPECTRAL = 2, 3  # DICOM RegionSpatialFormat (C.8.5.5.1.1); 1 is 2-D, colour Doppler too


class VideoError(ValueError):
    """Why a file gives no clips: a short reason for the list that the user sees."""


# ------------------------------------------------------------------------------------ finding files


def is_dicom(path):
    """Whether the file starts as DICOM Part 10 does: 128 bytes, then 'DICM'."""
    try:
        with open(path, "rb") as f:
            f.seek(128)
            return f.read(4) == b"DICM"
    except OSError:
        return False


def is_candidate(path):
    """Whether a file should be tried as a video: by its ending, or DICOM under any name."""
    if path.name.startswith(".") or path.name == "DICOMDIR":
        return False
    suffix = path.suffix.lower()
    return suffix in VIDEO_SUFFIXES | DICOM_SUFFIXES or is_dicom(path)


def find_videos(folder):
    """All candidate files below `folder`, as sorted POSIX paths relative to it."""
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(where, n) for n in names if is_candidate(Path(where, n))]
    return sorted(p.relative_to(folder).as_posix() for p in found)


# ----------------------------------------------------------------------------------------- decoding


def iter_frames(path):
    """Decode a cine once, front to back: yields its frames, uint8 (H, W, 3), **BGR**.

    BGR is OpenCV's order and the one the released models were trained on. Raises VideoError for
    stills, M-mode and spectral recordings, and for files that are empty, truncated, unreadable
    or in a transfer syntax that no installed decoder knows (possibly after some frames).
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise VideoError("empty file")
    except OSError as error:
        raise VideoError(f"cannot be read: {error.strerror}") from error
    if is_dicom(path):
        yield from _iter_dicom(path)
    elif path.suffix.lower() in DICOM_SUFFIXES:
        raise VideoError("not a DICOM file: the 'DICM' mark at byte 128 is missing")
    else:
        yield from _iter_opencv(path)


def read_frames(path):
    """A whole cine at once: uint8 (n, H, W, 3) BGR. Raises VideoError as `iter_frames`."""
    return np.stack(list(iter_frames(path)))


def _iter_opencv(path):
    import cv2

    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise VideoError("cannot be opened as a video")
        declared = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        if declared == 1:
            raise VideoError("still image")
        n = 0
        while True:
            ok, frame = capture.read()
            if not ok:
                break
            n += 1
            yield frame
    finally:
        capture.release()
    if n == 0:
        raise VideoError("no frame can be decoded")
    if n == 1:
        raise VideoError("still image")
    # Containers round their frame count; more than that is missing data.
    if n < declared - max(2, declared // 50):
        raise VideoError(f"truncated: {n} of {declared} frames decode")


def _iter_dicom(path):
    import pydicom
    from pydicom.pixels import apply_color_lut, iter_pixels

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        n_frames = check_cine(header)
        check_decoder(header)
    except VideoError:
        raise
    except Exception as error:  # pydicom raises many kinds on malformed headers
        raise VideoError(f"unreadable DICOM header: {_first_line(error)}") from error

    palette = header.PhotometricInterpretation == "PALETTE COLOR"
    n = 0
    try:
        for pixels in iter_pixels(path):  # RGB for RGB and YBR alike: not to be converted again
            if palette:
                pixels = apply_color_lut(pixels, header)
            yield to_bgr(pixels, header)
            n += 1
    except VideoError:
        raise
    except Exception as error:
        raise VideoError(
            f"frame {n + 1} of {n_frames} does not decode: {_first_line(error)}"
        ) from (error)
    if n != n_frames:
        raise VideoError(f"truncated: {n} of {n_frames} frames decode")


def check_cine(header):
    """Frames of a DICOM header (int), or VideoError when it is not a 2-D cine."""
    formats = {int(r.get("RegionSpatialFormat", 0)) for r in _regions(header)}
    if M_MODE in formats:
        raise VideoError("M-mode, not a cine")
    if SPECTRAL in formats:
        raise VideoError("spectral Doppler, not a cine")
    if "Rows" not in header or "PhotometricInterpretation" not in header:
        raise VideoError("DICOM without image data")
    declared = header.get("NumberOfFrames")
    n_frames = 1 if declared is None else int(declared)
    if n_frames < 1:
        raise VideoError("NumberOfFrames is 0")
    if n_frames == 1:
        raise VideoError("still image")
    return n_frames


def check_decoder(header):
    """VideoError when the transfer syntax has no decoder here, naming what to install."""
    from pydicom.pixels import get_decoder

    syntax = header.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise VideoError(f"transfer syntax {syntax.name} is not supported") from None
    if not decoder.is_available:
        raise VideoError(
            f"transfer syntax {syntax.name} needs a plugin: pip install 'echofocus[dicom]'"
        )


def to_bgr(pixels, header):
    """Decoded DICOM pixels, (H, W) or (H, W, 3) RGB -> uint8 (H, W, 3) BGR.

    More than 8 bits are scaled down by the bits stored (a palette's entries by 16).
    """
    photometric = header.PhotometricInterpretation
    if photometric.startswith("MONOCHROME") and header.get("PixelRepresentation"):
        raise VideoError("signed grey values are not ultrasound images")
    if pixels.dtype != np.uint8:
        bits = 8 * pixels.itemsize if photometric == "PALETTE COLOR" else int(header.BitsStored)
        pixels = (pixels >> max(0, bits - 8)).clip(0, 255).astype(np.uint8)
    if photometric == "MONOCHROME1":
        pixels = 255 - pixels
    if pixels.ndim == 2:
        return np.repeat(pixels[:, :, None], 3, axis=2)
    return np.ascontiguousarray(pixels[:, :, 2::-1])


def _regions(header):
    return header.get("SequenceOfUltrasoundRegions") or []


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --------------------------------------------------------------------- the published clip sampling


def resize_crop(frame, size=224):
    """Frame (H, W, 3) -> (size, size, 3) uint8: area resize (aspect not kept), central crop."""
    import cv2

    full = round(size * RESIZE_OVER_CROP)
    frame = cv2.resize(frame, (full, full), interpolation=cv2.INTER_AREA)
    edge = round((full - size) / 2)
    return frame[edge : edge + size, edge : edge + size]


def clip_starts(n_frames, n_clips, clip_len, seed, key):
    """Random clip starts, int64 (n_clips,), uniform over 0..n_frames - clip_len.

    Seeded by `seed` and the video's `key` ("study/path") alone: neither order nor worker matters.
    """
    words = np.frombuffer(hashlib.sha256(key.encode()).digest(), dtype=np.uint32)
    rng = np.random.default_rng([seed, *words.tolist()])
    return rng.integers(0, max(0, n_frames - clip_len) + 1, size=n_clips)


def clip_frames(starts, n_frames, clip_len):
    """Frame numbers of each clip, int64 (n_clips, clip_len), as the published reader takes them.

    It seeks to start - 1, so a start s reads s - 1 .. s + clip_len - 2 (0 .. clip_len - 1 for
    s = 0), and repeats the last frame of a video that is too short.
    """
    first = np.maximum(np.asarray(starts) - 1, 0)  # as the released models were trained
    return np.minimum(first[:, None] + np.arange(clip_len), n_frames - 1)


@dataclass
class Sampling:
    """How a video becomes clips."""

    n_clips: int = 16
    clip_len: int = 16  # frames
    size: int = 224  # pixels, square
    seed: int = 0


@dataclass
class Clips:
    """The clips of one video, each frame held once."""

    frames: np.ndarray  # uint8 (F, size, size, 3) BGR: the distinct frames that the clips use
    index: np.ndarray  # int64 (n_clips, clip_len) into frames
    starts: np.ndarray  # int64 (n_clips,), as drawn
    n_frames: int  # frames in the file


def read_clips(path, key, sampling):
    """Decode a video and sample its clips. Raises VideoError.

    Decoding is front to back and once; each frame is resized as it comes, so that memory is
    that of the small frames.
    """
    small = [resize_crop(frame, sampling.size) for frame in iter_frames(path)]
    starts = clip_starts(len(small), sampling.n_clips, sampling.clip_len, sampling.seed, key)
    numbers = clip_frames(starts, len(small), sampling.clip_len)
    used, index = np.unique(numbers, return_inverse=True)
    frames = np.stack([small[i] for i in used])
    return Clips(frames, index.reshape(numbers.shape), starts, len(small))


def serve():
    """Answer `read_clips` calls, pickled on standard input, until it closes.

    Replies are a Clips or a VideoError. What libraries print goes to standard error.
    """
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            call = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply = read_clips(*call)
        except VideoError as error:
            reply = error
        except Exception as error:  # an odd file must not end the run
            reply = VideoError(f"unreadable: {_first_line(error)}")
        pickle.dump(reply, replies, protocol=5)
        replies.flush()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from embed.video import serve  # so that replies are embed.video's classes, not __main__'s

    serve()
