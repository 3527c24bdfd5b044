"""A video as a clip that browsers play, WebM (VP8) at its frame rate, and its first frame as JPEG;
masked to the ultrasound sector."""

import hashlib
import json
from dataclasses import asdict, dataclass

from echofocus_core import __version__
from echofocus_core.base.files import atomic_path
from echofocus_core.video.decode import VideoFile, resize, sector_mask
from echofocus_core.video.errors import VideoError

LONGEST_SIDE = 384  # pixels of a clip for the screen
POSTER_QUALITY = 75  # of the JPEG, up to 100
USUAL_RATE = 30.0  # frames per second if a video declares no rate


@dataclass(frozen=True)
class Playback:
    """The properties of a written clip."""

    frames: int
    rate: float  # frames per second
    rate_is_known: bool
    width: int
    height: int


def stored_clip(source, folder, mask, content=""):
    """(file name, Playback) of a video's clip in `folder`, which is written if it does not exist.

    Next to the clip are its first frame (.jpg) and its Playback (.json).
    content: SHA-256 of the video that was embedded, '' if it is not recorded. Raises VideoError,
    also if the video has changed since.
    """
    with VideoFile(source) as video:
        if content and video.digest != content:
            raise VideoError("the source video has changed since it was embedded")
        key = f"{video.digest} {mask} {__version__}".encode()
        path = folder / f"{hashlib.sha256(key).hexdigest()[:16]}.webm"
        record = path.with_suffix(".json")
        exists = path.is_file() and path.with_suffix(".jpg").is_file()
        playback = read_playback(record) if exists else None
        if playback is None:
            playback = write_clip(video, path, mask)
            with atomic_path(record) as temporary:
                temporary.write_text(json.dumps(asdict(playback)))
    return path.name, playback


def read_playback(record):
    """The Playback of a clip from its JSON file; None if that is damaged or missing."""
    try:
        return Playback(**json.loads(record.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_clip(video, path, mask):
    """Write a VideoFile to `path` (.webm) and its first frame (.jpg); returns its Playback.

    mask: 'sector' blacks out the part outside the ultrasound sector, such as burned-in names;
    'none' keeps it. Raises VideoError, also if there is no sector or no encoder.
    """
    import cv2

    frames, small = [], []
    for frame in video.frames():
        scale = min(1, LONGEST_SIDE / max(frame.shape[:2]))
        height, width = (max(2, round(scale * side / 2) * 2) for side in frame.shape[:2])
        frames.append(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA))
        if mask == "sector":
            small.append(resize(frame))
    height, width = frames[0].shape[:2]
    if mask == "sector":
        inside = sector_mask(small, video.boxes, [])
        inside = cv2.resize(inside, (width, height), interpolation=cv2.INTER_NEAREST)[..., None]
        frames = [frame * inside for frame in frames]
    rate, quality = video.rate, [cv2.IMWRITE_JPEG_QUALITY, POSTER_QUALITY]
    with atomic_path(path.with_suffix(".jpg")) as temporary:
        temporary.write_bytes(cv2.imencode(".jpg", frames[0], quality)[1])
    with atomic_path(path) as temporary:
        codec = cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"VP80")
        writer = cv2.VideoWriter(str(temporary), *codec, rate or USUAL_RATE, (width, height))
        if not writer.isOpened():
            raise VideoError("no clip: this OpenCV cannot write VP8, opencv-python-headless can")
        for frame in frames:
            writer.write(frame)
        writer.release()
    return Playback(len(frames), rate or USUAL_RATE, rate is not None, width, height)
