"""A video as a clip that browsers play: WebM (VP8), at its frame rate, less what lies outside the
ultrasound sector."""

from dataclasses import dataclass

from echofocus_core.base.files import atomic_path
from echofocus_core.video.decode import VideoFile, resized, sector_mask
from echofocus_core.video.errors import VideoError

LONGEST_SIDE = 384  # pixels of a clip for the screen
USUAL_RATE = 30.0  # frames a second of a video that does not say


@dataclass(frozen=True)
class Playback:
    """What is in a clip that was written."""

    frames: int
    rate: float  # frames a second
    rate_is_known: bool
    width: int
    height: int


def write_playback(source, path, mask="sector"):
    """Write a video (see `iter_frames`) to `path` (.webm); returns its Playback.

    mask: 'sector' blacks out what lies outside the ultrasound sector, burned-in names for one;
    'none' keeps it. Raises VideoError, also where there is no sector or no encoder.
    """
    with VideoFile(source) as video:
        return write_clip(video, path, mask)


def write_clip(video, path, mask):
    """Write a VideoFile as a clip, see `write_playback`."""
    import cv2

    shown, small = [], []
    for frame in video.frames():
        scale = min(1, LONGEST_SIDE / max(frame.shape[:2]))
        height, width = (max(2, round(scale * side / 2) * 2) for side in frame.shape[:2])
        shown.append(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA))
        if mask == "sector":
            small.append(resized(frame))
    height, width = shown[0].shape[:2]
    if mask == "sector":
        inside = sector_mask(small, video.boxes)
        inside = cv2.resize(inside, (width, height), interpolation=cv2.INTER_NEAREST)[..., None]
        shown = [frame * inside for frame in shown]
    rate = video.rate
    with atomic_path(path) as temporary:
        how = cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"VP80"), rate or USUAL_RATE, (width, height)
        writer = cv2.VideoWriter(str(temporary), *how)
        if not writer.isOpened():
            raise VideoError("no clip: this OpenCV cannot write VP8, opencv-python-headless can")
        for frame in shown:
            writer.write(frame)
        writer.release()
    return Playback(len(shown), rate or USUAL_RATE, rate is not None, width, height)
