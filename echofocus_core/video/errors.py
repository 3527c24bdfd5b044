"""Shared by all readers of videos: reasons why a file is skipped, and size limits."""

import errno
import os
from pathlib import Path

# Limits of one video: larger videos are refused before memory is allocated.
FRAMES = 5_000  # 256 x 256 pixels each: 1 GB
FRAME_PIXELS = 1 << 24  # of one stored frame, 4096 x 4096
OPENCV_NO_MEMORY = -4  # an error code of OpenCV


class VideoError(ValueError):
    """A short reason why a file has no clips, for the list of skipped files."""


class NotNow(VideoError):
    """A temporary reason, such as a decoder that is not installed; the next run tries again."""


class SourceGone(NotNow):
    """A file is no longer available, for example after a mount was removed."""


def machine_fault(error):
    """The reason if the machine caused an error (or one of its causes); '' if the file did."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "code", 0) == OPENCV_NO_MEMORY:
            return "not enough memory to decode it"
        if isinstance(error, OSError) and error.errno not in (
            None,
            errno.EINVAL,
        ):  # EINVAL: a bad position
            return f"cannot be decoded now: {os.strerror(error.errno)}"
        error = error.__cause__
    return ""


def open_file(path):
    """Open a regular file for reading. OSError; VideoError for a pipe, device or folder."""
    if Path(path).exists() and not Path(path).is_file():
        raise VideoError("not a regular file")
    return open(path, "rb")


ARCHIVES = {b"PK\3\4": "zip", b"\x1f\x8b": "gzip", b"7z\xbc\xaf": "7z", b"Rar!": "rar",
            b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # fmt: skip
OTHER_ZIPS = {".docx", ".xlsx", ".pptx", ".odt", ".ods", ".jar", ".npz", ".pt", ".whl"}


def why_packed(path):
    """What to do with a file that packs other files; '' if it does not."""
    path = Path(path)
    try:
        with open_file(path) as f:
            head = f.read(2048)
    except (OSError, VideoError):
        return ""
    kind = next((kind for mark, kind in ARCHIVES.items() if head.startswith(mark)), "")
    if head[257:262] == b"ustar":
        kind = "tar"
    if kind and path.suffix.lower() not in OTHER_ZIPS:
        return f"packed ({kind}): unpack it"
    start = head.lstrip().lower()
    if start.startswith((b"--", b"content-type: multipart")) and b"application/dicom" in start:
        return "a DICOMweb server's response: save its parts as files, or export the study as DICOM"
    zlib = head[8:10] in (b"x\x01", b"x\x5e", b"x\x9c", b"x\xda")  # after the size in 8 bytes
    if head.startswith(b"SQLite format 3") or (zlib and head[5:8] == bytes(3)):
        return "from an image archive's database (Orthanc, ...): export the study as DICOM files"
    return ""


def check_budget(frames=1, rows=1, columns=1):
    """VideoError if a video has too many or too large frames."""
    if frames > FRAMES:
        raise VideoError(f"more than {FRAMES:,} frames: cut it into shorter cines")
    if rows * columns > FRAME_PIXELS:
        raise VideoError(f"frames of more than {FRAME_PIXELS >> 20} million pixels")
