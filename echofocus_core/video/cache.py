"""Decoded videos on disk: each decoded once to small frames, clips of which are read at random.

    fill: files -> decoder processes -> <folder>/<2 digits>/<key>.npy, uint8 (n, H, W, 3) BGR
    clips: which frames of it, resized, transformed or cropped -> uint8 (C, L, S, S, 3)

A file's key is a digest of its path, size and time, so that a changed video is decoded anew. Frames
smaller than what is asked of them are kept as they are: fewer bytes, and resizing them when read
gives the same pixels. Several processes may fill one folder. Each file ends with the CRC-32 of what
is before it, which `fill` compares (3 to 10 s for 10 GB, and the disk's time): what is damaged is
decoded anew.
"""

import hashlib
import zlib
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echofocus_core.base.console import Threads, UserError, progress
from echofocus_core.base.download import CHUNK
from echofocus_core.base.files import atomic_path, clear_leftovers, clear_links, stamp_of
from echofocus_core.video.decode import (
    NotNow,
    VideoError,
    central,
    clip_starts,
    first_frames,
    random_transform,
    resized,
    seeded,
    small_frames,
)
from echofocus_core.video.errors import open_file
from echofocus_core.video.extract import decoders, in_processes


@dataclass(frozen=True)
class ClipSampling:
    """How training takes clips of a video."""

    clip_len: int = 16  # frames
    size: int = 224  # pixels, square
    rate: int = 1  # every rate-th frame
    augment: bool = False  # the published training transforms, drawn for each clip


class FrameCache:
    """The small frames of videos, below a folder, for images of `size` pixels."""

    def __init__(self, folder, size=224):
        self.folder, self.size = Path(folder), size

    def place(self, path):
        """Where a video's frames lie; UserError when the video is gone.

        path: of its file, or a tuple of those of its single frames.
        """
        key = self.key(path, FORM)
        return self.folder / key[:2] / f"{key[2:]}.npy"

    def key(self, path, form):
        """What stands for a video as it is now, in a form of the cache."""
        parts = [Path(part) for part in (path if isinstance(path, tuple) else (path,))]
        stamps = [stamp_of(part) for part in parts]
        if None in stamps:
            gone = parts[stamps.index(None)]
            raise UserError(f"{gone} is gone; put it back, or leave it out of the tables")
        text = f"{[str(part.absolute()) for part in parts]}|{stamps}|{self.size}|{form}"
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]

    def fill(self, paths, workers=0, label="decode", quiet=False):
        """Decode what is not there yet, or damaged; path -> reason of the videos that cannot be
        used."""
        reasons, wanted = {}, []
        with Threads(decoders(workers)) as pool:
            for path, found in zip(paths, pool.map(self.reason, paths), strict=True):
                if found is None:
                    wanted.append(path)
                elif found:
                    reasons[path] = found
        if self.folder.is_dir():
            for part in self.folder.glob("??"):
                clear_leftovers(part)
        calls = ((path, (small_frames, path, self.size)) for path in wanted)
        with progress(total=len(wanted), desc=label, unit="video", disable=quiet) as bar:
            for path, (reply, _) in in_processes(calls, decoders(workers)):
                bar.update()
                if isinstance(reply, VideoError):
                    reasons[path] = str(reply)
                self.put(path, reply)
        return reasons

    def reason(self, path):
        """Why a video has no frames, '' where it has some; None when neither is there and whole."""
        place = self.place(path)
        if is_sealed(place.with_suffix(".txt")):
            return place.with_suffix(".txt").read_bytes()[:-SEAL].decode()
        return "" if is_sealed(place) else None

    def content(self, path):
        """The checksum of a video's frames, as `fill` has found or made it; '' without frames."""
        try:
            with open_file(self.place(path)) as f:
                f.seek(-SEAL, 2)
                return f.read().decode()
        except (OSError, VideoError):
            return ""

    def copies(self, videos):
        """Lists of the names of videos with the same frames, blank ones apart. videos: DataFrame
        with path and content; where checksums agree the frames are compared."""
        sets = []
        known = videos[videos["content"] != ""]
        for _, alike in known[known["content"].duplicated(keep=False)].groupby("content"):
            same = defaultdict(list)
            for name, path in alike["path"].items():
                frames = self.frames(path)
                if np.ptp(frames) > BLANK:
                    same[frames.shape, hashlib.sha256(frames).digest()].append(name)
            sets += [names for names in same.values() if len(names) > 1]
        return sets

    def digest(self, named):
        """SHA-256 of (name, path) pairs: of the names, and of paths, sizes and times."""
        lines = [f"{name} {self.key(path, 1)[2:]}.npy" for name, path in named]
        return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()

    def put(self, path, reply):
        """Write a video's frames, or why there are none, if that will not pass."""
        place = self.place(path)
        if isinstance(reply, NotNow):
            return
        try:
            if isinstance(reply, VideoError):
                clear_links(place.with_suffix(".txt"))
                with atomic_path(place.with_suffix(".txt")) as temporary:
                    temporary.write_bytes(str(reply).encode())
                    seal(temporary)
            else:
                clear_links(place)
                with atomic_path(place) as temporary:
                    np.save(temporary, reply)
                    seal(temporary)
        except OSError as error:
            why = error.strerror or error  # numpy has no number for a disk without room
            raise UserError(
                f"cannot write decoded frames to {self.folder}: {why}; make room, or name another "
                "folder; the same command goes on from here"
            ) from error

    def frames(self, path):
        """A video's small frames, uint8 (n, H, W, 3) BGR, mapped from the file. UserError."""
        place = self.place(path)
        if not place.is_file() and (reasons := self.fill([path], 1, quiet=True)):
            raise UserError(f"{path}: {reasons[path]}")
        try:
            frames = np.load(place, mmap_mode="r")
            if frames.dtype != np.uint8 or frames.ndim != 4 or 0 in frames.shape:
                raise ValueError("no frames")
        except (OSError, ValueError) as error:  # since `fill`
            raise UserError(
                f"{place} is damaged; run the command again: it is made anew"
            ) from error
        return frames

    def clips(self, path, n_clips, sampling, seed, key):
        """Random clips of a video, uint8 (n_clips, L, S, S, 3) BGR, drawn by `seed` and `key`."""
        return clips_of(self.frames(path), n_clips, sampling, seed, key)


FORM = 2  # of the files; another is decoded anew
BLANK = 16  # grey levels: frames that differ by no more show nothing
SEAL = 8  # hex digits at the end of a file: the CRC-32 of what is before them


def checksum(f, size):
    """The SEAL of the next bytes of a file."""
    crc = 0
    for left in range(size, 0, -CHUNK):
        crc = zlib.crc32(f.read(min(left, CHUNK)), crc)
    return b"%08x" % crc


def seal(path):
    with open(path, "rb+") as f:
        size = f.seek(0, 2)
        f.seek(0)
        found = checksum(f, size)
        f.seek(size)
        f.write(found)


def is_sealed(path):
    """Whether a file is there and as it was written."""
    try:
        with open_file(path) as f:
            size = f.seek(0, 2) - SEAL
            f.seek(0)
            return checksum(f, size) == f.read(SEAL)
    except (OSError, VideoError):
        return False


def clips_of(frames, n_clips, sampling, seed, key):
    """Random clips of small frames: see `FrameCache.clips`.

    Starts are drawn alike over the video; a video that is too short repeats its last frame.
    """
    L, size, rate = sampling.clip_len, sampling.size, sampling.rate
    starts = clip_starts(len(frames), n_clips, (L - 1) * rate + 1, seed, key, "independent")
    numbers = first_frames(starts)[:, None] + rate * np.arange(L)
    rng = seeded(seed, f"{key}#transform")
    clips = np.empty((n_clips, L, size, size, 3), np.uint8)
    for clip, wanted in zip(clips, np.minimum(numbers, len(frames) - 1), strict=True):
        images = [resized(np.asarray(frames[i]), size) for i in wanted]
        if sampling.augment:
            clip[:] = random_transform(images, size, rng)
        else:
            clip[:] = [central(image, size) for image in images]
    return clips


def ahead(read, jobs, threads, most):
    """Yield `read(job)` of each job in order, `most` of them read ahead by threads."""
    waiting = deque()
    with Threads(threads, "clips") as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(read, job))
                if len(waiting) > most:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
