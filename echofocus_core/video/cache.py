"""Decoded videos on disk: each is decoded once to small frames, and random clips are read from it.

    fill: files -> decoder processes -> <folder>/<2 digits>/<key>.npy, uint8 (n, H, W, 3) BGR, and
          <key>.json, written last: the SHA-256 of the frames, or the reason why there are none
    clips: these frames, resized, transformed or cropped -> uint8 (C, L, S, S, 3)

A key is a digest of a file's path, size and time, so that a changed video is decoded again. Frames
smaller than requested are stored unresized, which needs fewer bytes; resizing them later gives the
same pixels. Several processes may fill one folder.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echofocus_core.base.console import UserError, progress
from echofocus_core.base.files import atomic_path, sha256_of, stamp_of
from echofocus_core.video.decode import (
    NotNow,
    VideoError,
    clip_starts,
    crop_centre,
    first_frames,
    random_generator,
    random_transform,
    resize,
    small_frames,
)
from echofocus_core.video.extract import map_in_processes

BLANK = 16  # grey levels: a video with a smaller range is blank


@dataclass(frozen=True)
class ClipSampling:
    """How training samples clips of a video."""

    clip_len: int = 16  # frames
    size: int = 224  # pixels, square
    rate: int = 1  # temporal stride, in frames
    augment: bool = False  # the published training transforms, drawn for each clip


class FrameCache:
    """The small frames of videos, in a folder, for images of `size` pixels.

    In all methods, a video is the path of its file, or a tuple of the paths of its single frames.
    """

    def __init__(self, folder, size=224):
        self.folder, self.size = Path(folder), size

    def key(self, video):
        """Digest of the size and of a video's files (path, size, time). Raises UserError."""
        parts = [Path(part) for part in (video if isinstance(video, tuple) else (video,))]
        stamps = [stamp_of(part) for part in parts]
        if None in stamps:
            missing = parts[stamps.index(None)]
            raise UserError(f"{missing} is missing; put it back, or leave it out of the tables")
        return sha256_of([str(part.absolute()) for part in parts], stamps, self.size)[:32]

    def place(self, video, suffix=".npy"):
        """The path of a video's frames (.npy) or of their record (.json)."""
        key = self.key(video)
        return self.folder / key[:2] / f"{key[2:]}{suffix}"

    def record(self, video):
        """{"sha256": of the frames} or {"reason": why it has none}; {} before `fill`."""
        try:
            record = json.loads(self.place(video, ".json").read_text())
        except (OSError, ValueError):
            return {}
        return record if "reason" in record or self.place(video).is_file() else {}

    def fill(self, videos, workers=0, quiet=False):
        """Decode videos that are not in the cache; returns video -> reason of unusable ones."""
        records = {video: self.record(video) for video in videos}
        reasons = {
            video: record["reason"] for video, record in records.items() if "reason" in record
        }
        missing = [video for video, record in records.items() if not record]
        calls = ((video, (small_frames, video, self.size)) for video in missing)
        with progress(total=len(missing), desc="decode", unit="video", disable=quiet) as bar:
            for video, (reply, _) in map_in_processes(calls, workers):
                bar.update()
                if isinstance(reply, VideoError):
                    reasons[video] = str(reply)
                self.put(video, reply)
        return reasons

    def put(self, video, reply):
        """Write a video's frames, or the reason why it has none, unless that is temporary."""
        if isinstance(reply, NotNow):
            return
        if isinstance(reply, VideoError):
            record = {"reason": str(reply)}
        else:
            record = {"sha256": sha256_of(reply)}
            with atomic_path(self.place(video)) as temporary:
                np.save(temporary, reply)
        with atomic_path(self.place(video, ".json")) as temporary:
            temporary.write_text(json.dumps(record))

    def content(self, video):
        """SHA-256 of a video's frames; '' if it has none."""
        return self.record(video).get("sha256", "")

    def copies(self, videos):
        """Lists of the names of videos with the same frames, except blank ones.

        videos: DataFrame with path and content, indexed by name.
        """
        names = defaultdict(list)
        for name, content in videos["content"].items():
            names[content].append(name)
        return [
            same
            for content, same in names.items()
            if content and len(same) > 1 and np.ptp(self.frames(videos.at[same[0], "path"])) > BLANK
        ]

    def frames(self, video):
        """A video's small frames, uint8 (n, H, W, 3) BGR, memory-mapped. Raises UserError."""
        place = self.place(video)
        if not place.is_file() and (reasons := self.fill([video], 1, quiet=True)):
            raise UserError(f"{video}: {reasons[video]}")
        try:
            return np.load(place, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{place} is damaged; delete it and run the command again") from error

    def clips(self, video, n_clips, sampling, seed, key):
        """Random clips of a video, uint8 (n_clips, L, S, S, 3) BGR, drawn by `seed` and `key`.

        Starts are uniform over the video; a video that is too short repeats its last frame.
        """
        frames, L, size = self.frames(video), sampling.clip_len, sampling.size
        length = (L - 1) * sampling.rate + 1
        starts = clip_starts(len(frames), n_clips, length, seed, key, "independent")
        numbers = first_frames(starts)[:, None] + sampling.rate * np.arange(L)
        rng = random_generator(seed, f"{key}#transform")
        clips = np.empty((n_clips, L, size, size, 3), np.uint8)
        for clip, chosen in zip(clips, np.minimum(numbers, len(frames) - 1), strict=True):
            images = [resize(np.asarray(frames[i]), size) for i in chosen]
            if sampling.augment:
                clip[:] = random_transform(images, size, rng)
            else:
                clip[:] = [crop_centre(image, size) for image in images]
        return clips
