"""A video as a clip that browsers play: WebM (VP8), at its frame rate, less what lies outside the
ultrasound sector."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echofocus_core.base.files import atomic_path
from echofocus_core.video.containers import plain_name
from echofocus_core.video.decode import (
    iter_frames,
    readable_dicom,
    region_boxes,
    resized,
    sector_mask,
)
from echofocus_core.video.dicom import open_dicom
from echofocus_core.video.errors import VideoError
from echofocus_core.video.frames import number

LONGEST_SIDE = 384  # pixels of a clip for the screen
USUAL_RATE = 30.0  # frames a second of a video that does not say
RATES = (1, 1000)  # frames a second that are plausible


@dataclass(frozen=True)
class Playback:
    """What is in a clip that was written."""

    frames: int
    rate: float  # frames a second
    rate_is_known: bool
    width: int
    height: int


def frame_rate(source):
    """Frames a second as the file says: DICOM's FrameTime, else FrameTimeVector, CineRate or
    RecommendedDisplayFrameRate; a container's own. None where it says none that is plausible."""
    path = Path(source[0] if isinstance(source, (list, tuple)) else source)
    rate = dicom_rate(path) if readable_dicom(path) else container_rate(path)
    return rate if rate and RATES[0] <= rate <= RATES[1] else None


def dicom_rate(path):
    tags = ("FrameTime", "FrameTimeVector", "CineRate", "RecommendedDisplayFrameRate")
    with open_dicom(path, tags, pixels=False) as (header, _):
        try:
            times = np.atleast_1d(np.asarray(header["FrameTime"].value, float))
        except Exception:  # absent, or text that is no number
            times = np.zeros(1)
        try:
            vector = np.asarray(header["FrameTimeVector"].value, float)
        except Exception:
            vector = np.zeros(1)
        milliseconds = [float(times[0]), float(vector[1:].mean()) if vector.size > 1 else 0.0]
        rates = [1000 / t if math.isfinite(t) and t > 0 else 0 for t in milliseconds]
        rates += [number(header, "CineRate"), number(header, "RecommendedDisplayFrameRate")]
    return next((rate for rate in rates if rate and RATES[0] <= rate <= RATES[1]), None)


def container_rate(path):
    import cv2

    with plain_name(path) as name:
        capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG)
        try:
            return capture.get(cv2.CAP_PROP_FPS)
        finally:
            capture.release()


def write_playback(source, path, mask="sector"):
    """Write a video (see `iter_frames`) to `path` (.webm); returns its Playback.

    mask: 'sector' blacks out what lies outside the ultrasound sector, burned-in names for one;
    'none' keeps it. Raises VideoError, also where there is no sector or no encoder.
    """
    import cv2

    shown, small = [], []
    for frame in iter_frames(source):
        scale = min(1, LONGEST_SIDE / max(frame.shape[:2]))
        height, width = (max(2, round(scale * side / 2) * 2) for side in frame.shape[:2])
        shown.append(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA))
        if mask == "sector":
            small.append(resized(frame))
    height, width = shown[0].shape[:2]
    if mask == "sector":
        inside = sector_mask(small, region_boxes(source))
        inside = cv2.resize(inside, (width, height), interpolation=cv2.INTER_NEAREST)[..., None]
        shown = [frame * inside for frame in shown]
    rate = frame_rate(source)
    with atomic_path(path) as temporary:
        how = cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"VP80"), rate or USUAL_RATE, (width, height)
        writer = cv2.VideoWriter(str(temporary), *how)
        if not writer.isOpened():
            raise VideoError("no clip: this OpenCV cannot write VP8, opencv-python-headless can")
        for frame in shown:
            writer.write(frame)
        writer.release()
    return Playback(len(shown), rate or USUAL_RATE, rate is not None, width, height)
