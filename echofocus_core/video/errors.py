"""What every reader of a video shares: why a file gives no clips, and what it may cost."""

import errno
import os
from pathlib import Path

# The budget of one video: larger ones are refused before memory is allocated.
FRAMES = 5_000  # 256 x 256 pixels each: 1 GB
FRAME_PIXELS = 1 << 24  # of one frame as stored, 4096 x 4096
OPENCV_NO_MEMORY = -4  # an error code of OpenCV


class VideoError(ValueError):
    """Why a file gives no clips: a short reason for the list that the user sees."""


class NotNow(VideoError):
    """A reason that may pass, such as a decoder that is not installed: tried again another time."""


class SourceGone(NotNow):
    """A file cannot be reached any more, as when a mount vanishes: not its fault."""


def machine_fault(error):
    """What the machine lacked, by an error or its causes; '' where the file is at fault."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "code", 0) == OPENCV_NO_MEMORY:
            return "too little memory to decode it"
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # bad positions
            return f"cannot be decoded now: {os.strerror(error.errno)}"
        error = error.__cause__
    return ""


def open_file(path):
    """Open a regular file for reading. OSError; VideoError for a pipe, device or folder."""
    if Path(path).exists() and not Path(path).is_file():
        raise VideoError("not a regular file")
    return open(path, "rb")


def check_budget(frames=1, rows=1, columns=1):
    """VideoError for more, or larger, frames than one video may have."""
    if frames > FRAMES:
        raise VideoError(f"more than {FRAMES:,} frames: cut it into shorter cines")
    if rows * columns > FRAME_PIXELS:
        raise VideoError(f"frames of more than {FRAME_PIXELS >> 20} million pixels")
