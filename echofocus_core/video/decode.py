"""Read videos, opening each file once, and sample clips as published.

    file -> VideoFile.frames: uint8 (H, W, 3) BGR, one after the other -> resize_centre: (S, S, 3)
         -> clip_starts, clip_frames: which frames make the clips -> Clips
    with a mask or transformed copies: resize: (R, R, 3) -> sector_mask
         -> crop_centre or random_transform: (S, S, 3)

This module does not import torch: decoder processes run it as a program, so that a video that
crashes or hangs a decoder does not stop the run.
"""

import hashlib
import os
import pickle
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # run as a script: the repository is the import root
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from echofocus_core.base.console import UserError
from echofocus_core.video.containers import container_rate, iter_container, read_head
from echofocus_core.video.dicom import (
    DicomFile,
    frame_rates,
    is_dicom,
    iter_dicom,
    iter_series,
    region_boxes,
)
from echofocus_core.video.errors import (
    NotNow,
    SourceGone,
    VideoError,
    machine_fault,
    open_file,
    why_packed,
)
from echofocus_core.video.perturb import perturb, read_perturbations

VIDEO_SUFFIXES = {".avi", ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".wmv", ".mpg", ".mpeg"}
VIDEO_SUFFIXES |= {".3gp", ".asf", ".vob", ".ts", ".mts", ".m2ts"}
DICOM_SUFFIXES = {".dcm", ".dicom", ".ima"}

# The published pipeline resizes to 256 x 256 and crops to 224 x 224; other sizes keep this ratio.
RESIZE_OVER_CROP = 256 / 224
SMALLEST = 16  # pixels per side of a usable frame
RATES = (1, 1000)  # plausible frames per second


# ----------------------------------------------------------------------------------------- decoding


class VideoFile:
    """One video, opened once: its frames, content digest, ultrasound regions and frame rate.

    source: a file's path, or the list of paths of a cine's single frames (see `group_stills`).
    Opening reads the header of a DICOM file, or of the first file of a list, into `dicom` (else
    None). Raises VideoError if it cannot be opened. Use it as a context manager, which closes the
    file.
    """

    def __init__(self, source):
        several = isinstance(source, (list, tuple))
        self.source, self.is_series = source, several
        self.path = Path(source[0] if several else source)
        self.dicom = DicomFile(self.path) if is_readable_dicom(self.path) else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.dicom:
            self.dicom.file.close()

    def frames(self, notes=None, needed=None):
        """Decode front to back: yields uint8 (H, W, 3) **BGR**.

        notes: a list to which each contradiction with the header is added.
        needed: a function of the number of frames that returns the numbers of the frames to
        convert. In DICOM, where the number is available before decoding, other frames are only
        checked and are yielded as None. BGR is OpenCV's order and the one the released models were
        trained on. Raises VideoError for stills, M-mode and spectral recordings, and for files that
        are empty, truncated, unreadable or need a decoder that is not installed (possibly after
        some frames).
        """
        notes = [] if notes is None else notes
        if self.is_series:
            frames = iter_series(self.source, notes)
        elif self.dicom:
            frames = iter_dicom(self.dicom, notes, needed)
        else:
            frames = iter_container(self.path, notes)
        for frame in frames:
            if frame is not None and min(frame.shape[:2]) < SMALLEST:
                height, width = frame.shape[:2]
                raise VideoError(f"frames of {width} x {height} pixels: too small")
            yield frame

    @cached_property
    def digest(self):
        """Hex SHA-256 of the bytes of the file, or of all files in order."""
        return content_digest(self.source)

    @cached_property
    def boxes(self):
        """The 2-D ultrasound regions of a DICOM file, see `region_boxes`; [] for other files."""
        return region_boxes(self.dicom.header) if self.dicom else []

    @cached_property
    def rate(self):
        """Frames per second: in DICOM from FrameTime, else FrameTimeVector, CineRate or
        RecommendedDisplayFrameRate. None if the file has no plausible rate.
        """
        rates = frame_rates(self.dicom.header) if self.dicom else [container_rate(self.path)]
        return next((rate for rate in rates if rate and RATES[0] <= rate <= RATES[1]), None)


def iter_frames(source, notes=None, needed=None):
    """The frames of a video, see `VideoFile.frames`."""
    with VideoFile(source) as video:
        yield from video.frames(notes, needed)


def read_frames(source):
    """All frames of a video: uint8 (n, H, W, 3) BGR. Raises VideoError, see `VideoFile.frames`."""
    return np.stack(list(iter_frames(source)))


@contextmanager
def reachable():
    """Convert system errors in the block to NotNow."""
    try:
        yield
    except PermissionError as error:
        raise NotNow("no permission to read it") from error
    except OSError as error:
        raise SourceGone(f"cannot be read: {error.strerror}") from error


def is_readable_dicom(path):
    """Whether to read a video as DICOM. VideoError if it cannot be opened or is empty."""
    with reachable(), open_file(path) as f:
        if not f.read(1):
            raise VideoError("empty file")
    if is_dicom(path):
        return True
    if packed := why_packed(path):
        raise VideoError(packed)
    if path.suffix.lower() in DICOM_SUFFIXES:
        raise VideoError("not a DICOM file: it has no 'DICM' mark and no element at its start")
    return False


def first_picture(source):
    """The first frame of a video, uint8 (64, 64, 3); None if it cannot be read."""
    import cv2

    try:
        with VideoFile(source) as video:
            frame = next(video.frames())
            return cv2.resize(frame, (64, 64), interpolation=cv2.INTER_AREA)
    except (VideoError, OSError):
        return None


def first_frame(source, pixels):
    """The first frame of a video, converted by `pixels` (a Pixels). Raises VideoError."""
    with VideoFile(source) as video:
        return pixels.picture(next(video.frames(needed=lambda n: [0])), bool(video.dicom))


def why_skipped(source):
    """Why a video (see `VideoFile`) will give no clips, by its header and a few frames; '' if
    there is no reason."""
    try:
        with VideoFile(source) as video:
            if video.dicom:
                next(video.frames(), None)  # checks the kind, the layout and the colours
            else:
                read_head(video.path)
    except VideoError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return ""


# --------------------------------------------------------------------- the published clip sampling


def resize(frame, size=224):
    """Resize a frame (H, W, 3) by area to uint8 (R, R, 3), R = 256 for size 224; the aspect ratio
    is not kept."""
    import cv2

    full = round(size * RESIZE_OVER_CROP)
    return cv2.resize(frame, (full, full), interpolation=cv2.INTER_AREA)


def crop_centre(image, size=224):
    """The central (size, size) of an image (R, R, ...)."""
    edge = round((len(image) - size) / 2)
    return image[edge : edge + size, edge : edge + size]


def resize_centre(frame, size=224):
    """The same result as crop_centre(resize(frame)), (size, size, 3), in less time.

    If the frame shrinks and the centre consists of whole pixels of the frame, only the centre is
    resized: each pixel of an area resize is the mean of one area of the frame.
    """
    import cv2

    full = round(size * RESIZE_OVER_CROP)
    sides, edge = np.array(frame.shape[:2]), round((full - size) / 2)
    if min(sides) < full or (edge * sides % full).any() or (size * sides % full).any():
        return crop_centre(resize(frame, size), size)
    (top, left), (bottom, right) = edge * sides // full, (edge + size) * sides // full
    centre = frame[top:bottom, left:right]
    return cv2.resize(centre, (size, size), interpolation=cv2.INTER_AREA)


ORDERS = ("RGB", "BGR", "RGB except DICOM")  # of the channels of an encoder's pictures


@dataclass(frozen=True)
class Pixels:
    """Conversion of frames to the input of an encoder other than PanEcho, (size, size, 3) uint8."""

    size: int = 224
    square: bool = False  # first crop the central square
    cut: float = 0.0  # then remove this share of the width and height at each side
    resize: int = 0  # then resize the shorter side to this and crop; 0: resize to the size
    filter: str = "bicubic"  # Pillow's name, or OpenCV's such as INTER_CUBIC
    floor: bool = False  # round the last crop's edge down (like transformers), not to the nearest
    order: str = "RGB"  # "BGR", or "RGB except DICOM"

    def __post_init__(self):
        """Raises UserError."""
        for wrong, text in (
            (self.order not in ORDERS, f"order {self.order!r}: one of {', '.join(ORDERS)}"),
            (0 < self.resize < self.size, f"resize {self.resize} is below size {self.size}"),
            (not 0 <= self.cut < 0.5, f"cut {self.cut} is not between 0 and 0.5"),
        ):
            if wrong:
                raise UserError(f"Pixels: {text}")

    def picture(self, frame, is_dicom=False):
        """uint8 (H, W, 3) BGR -> (size, size, 3) in the order of channels of `order`."""
        if self.order == "RGB" or (self.order != "BGR" and not is_dicom):
            frame = frame[..., ::-1]
        height, width = frame.shape[:2]
        if self.square:
            edge = round(abs(height - width) / 2)
            frame = frame[:, edge : width - edge] if width > height else frame[edge : height - edge]
        if self.cut:
            y, x = (int(side * self.cut) for side in frame.shape[:2])
            frame = frame[y : len(frame) - y, x : frame.shape[1] - x]
        shape = self.size, self.size  # width, height
        if self.resize:
            height, width = frame.shape[:2]
            shape = tuple(self.resize * side // min(height, width) for side in (width, height))
        frame = self.scale(np.ascontiguousarray(frame), shape)
        edges = [(side - self.size) / 2 for side in frame.shape[:2]]
        y, x = map(int if self.floor else round, edges)
        return frame[y : y + self.size, x : x + self.size]

    def scale(self, frame, shape):
        """Resize a frame to `shape`, (width, height)."""
        if self.filter.startswith("INTER_"):
            import cv2

            return cv2.resize(frame, shape, interpolation=getattr(cv2, self.filter))
        from PIL import Image

        return np.asarray(
            Image.fromarray(frame).resize(shape, Image.Resampling[self.filter.upper()])
        )


# Method of drawing clip starts -> recorded text. Studies with the same text may be used together.
SAMPLINGS = dict.fromkeys(
    ("modulo", "independent"),
    "random starts; frames start-1..start+clip_len-2; BGR; area resize, crop",
)


def clip_starts(n_frames, n_clips, clip_len, seed, key, method="modulo"):
    """Random clip starts, int64 (n_clips,), each uniform over 0..n_frames - clip_len.

    method: 'independent' draws each start by itself. 'modulo' draws all of them from one residue
    class, the starts whose first frames (see `clip_frames`) are equal modulo 3, since such clips
    share most of their images (see `panecho.clip_planes`). The class is that of a uniformly drawn
    start, so that all starts remain equally likely; only the starts of one video depend on each
    other. The draws depend only on `seed` and the text `key`, not on order or worker.
    """
    rng, starts = random_generator(seed, key), np.arange(max(0, n_frames - clip_len) + 1)
    if method == "modulo":
        residues = first_frames(starts) % 3
        starts = starts[residues == rng.choice(residues)]
    elif method != "independent":
        raise ValueError(f"unknown method of drawing clip starts: {method}")
    return rng.choice(starts, size=n_clips)


def random_generator(seed, key):
    """A numpy Generator that depends only on a number and a text."""
    words = np.frombuffer(hashlib.sha256(key.encode()).digest(), dtype="<u4")
    return np.random.default_rng([seed, *words.tolist()])


def first_frames(starts):
    """The first frames of clips with these starts: the published reader seeks to start - 1."""
    return np.maximum(np.asarray(starts) - 1, 0)  # as the released models were trained


def clip_frames(starts, n_frames, clip_len):
    """Frame numbers of each clip, int64 (n_clips, clip_len), the same as in the published reader.

    A clip with start s has the frames s - 1 .. s + clip_len - 2 (0 .. clip_len - 1 for s = 0). If
    the video is too short, its last frame is repeated.
    """
    return np.minimum(first_frames(starts)[:, None] + np.arange(clip_len), n_frames - 1)


@dataclass
class Sampling:
    """Settings for sampling clips of a video."""

    n_clips: int = 16
    clip_len: int = 16  # frames
    size: int = 224  # pixels, square
    seed: int = 0
    starts: str = "modulo"  # or 'independent', see clip_starts
    mask: str = "none"  # 'sector' blacks out the part outside the ultrasound sector
    perturb: str = ""  # changes inside the sector, see `video.perturb`
    augment: int = 0  # number of randomly transformed copies added to the plain one
    pixels: Pixels | None = None  # of an encoder whose clips are windows, see `sample_windows`
    stride: int = 1  # from one frame of a window to the next
    padding: str = "repeat"  # frames of a window after the last one: "repeat" it, or "zeros"


@dataclass
class Clips:
    """The clips of one video or of one transformed copy; each frame is stored once."""

    frames: np.ndarray  # uint8 (F, size, size, 3) BGR: the distinct frames that the clips use
    index: np.ndarray  # int64 (n_clips, clip_len) into frames; -1: zeros after normalisation
    starts: np.ndarray  # int64 (n_clips,), as drawn
    n_frames: int  # frames in the file
    note: str = ""  # contradictions with the header
    content: str = ""  # SHA-256 of the file's bytes, a seed of the draws
    pixels: str = ""  # a digest of the frames, see `frames_digest`


def content_digest(source):
    """Hex SHA-256 of a video's bytes; `source` may be a list of files, taken in order."""
    digest = hashlib.sha256()
    with reachable():
        for part in source if isinstance(source, (list, tuple)) else [source]:
            with open_file(part) as f:
                while block := f.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def read_clips(source, sampling):
    """Decode a video and sample its clips: [plain, transformed copies...]. Raises VideoError.

    The draws are seeded by the video's bytes, so that a study gives the same clips under any name.
    The starts of a copy are drawn independently, since its clips share no images: each clip is
    transformed by itself. Each frame is decoded once and resized at once, so that memory holds only
    small frames. A frame that no clip uses is only checked for damage.
    """
    with VideoFile(source) as video:
        return (sample_windows if sampling.pixels else sample_clips)(video, sampling)


def sample_clips(video, sampling):
    """The clips of a VideoFile, see `read_clips`."""
    notes, content = [], video.digest

    def sample(n_frames, key, method):
        starts = clip_starts(
            n_frames, sampling.n_clips, sampling.clip_len, sampling.seed, key, method
        )
        return starts, clip_frames(starts, n_frames, sampling.clip_len)

    def needed(n_frames):
        used = sample(n_frames, content, sampling.starts)[1]
        return np.union1d(used, compared_frames(n_frames))

    if sampling.mask == "sector" or sampling.augment or sampling.perturb:
        frames = [resize(frame, sampling.size) for frame in video.frames(notes)]
    else:
        frames = [
            None if frame is None else resize_centre(frame, sampling.size)
            for frame in video.frames(notes, needed)
        ]
    n_frames, pixels = len(frames), frames_digest(frames, sampling.size)
    if sampling.mask == "sector" or sampling.perturb:
        inside = sector_mask(frames, video.boxes, notes)
        frames = change_sector(frames, inside, sampling, content)
    starts, numbers = sample(n_frames, content, sampling.starts)
    used, index = np.unique(numbers, return_inverse=True)
    plain = np.stack([crop_centre(frames[i], sampling.size) for i in used])
    if plain.max() < LIT:
        notes.append("all frames are black")
    details = n_frames, "; ".join(notes), content, pixels
    copies = [Clips(plain, index.reshape(numbers.shape), starts, *details)]
    for copy in range(1, sampling.augment + 1):
        starts, numbers = sample(n_frames, f"{content}#{copy}", "independent")
        rng = random_generator(sampling.seed, f"{content}#{copy}#transform")
        clips = [random_transform([frames[i] for i in c], sampling.size, rng) for c in numbers]
        index = np.arange(numbers.size).reshape(numbers.shape)
        copies.append(Clips(np.concatenate(clips), index, starts, *details))
    return copies


def change_sector(frames, inside, sampling, content):
    """Apply the mask and the perturbations of a Sampling to frames; inside: see `sector_mask`."""
    if sampling.mask == "sector":
        frames = [frame * inside for frame in frames]
    if sampling.perturb:
        strengths = read_perturbations(sampling.perturb.split())
        rng = random_generator(sampling.seed, f"{content}#perturb")
        frames = perturb(frames, inside, strengths, rng)
    return frames


def window_frames(n_frames, sampling):
    """Frame numbers of each window, int64 (n_clips, clip_len); -1 for a frame of zeros.

    The starts are evenly spaced: the first window starts at frame 0, the last one ends with the
    video.
    """
    steps = sampling.stride * np.arange(sampling.clip_len)
    last = max(0, n_frames - 1 - steps[-1])
    starts = np.linspace(0, last, sampling.n_clips).round().astype(np.int64)
    numbers = starts[:, None] + steps
    filling = -1 if sampling.padding == "zeros" else n_frames - 1
    return np.where(numbers < n_frames, numbers, filling)


def sample_windows(video, sampling):
    """Sample the clips of an encoder with its own `pixels`: a list of one Clips, see `read_clips`.

    Only the frames of the windows are converted. With a mask, all frames are held in memory.
    """
    notes, content, pixels = [], video.digest, sampling.pixels
    is_dicom = bool(video.dicom)
    masks = sampling.mask == "sector" or bool(sampling.perturb)

    def needed(n_frames):
        return np.union1d(window_frames(n_frames, sampling), compared_frames(n_frames))

    frames = [
        frame if frame is None or masks else pixels.picture(frame, is_dicom)
        for frame in video.frames(notes, None if masks else needed)
    ]
    if masks:
        import cv2

        compared = set(compared_frames(len(frames)))
        digest = frames_digest(  # before the change, as for PanEcho
            [pixels.picture(f, is_dicom) if i in compared else f for i, f in enumerate(frames)],
            pixels.size,
        )

        inside = sector_mask([resize(frame) for frame in frames], video.boxes, notes)
        shape = frames[0].shape[1::-1]
        whole = cv2.resize(inside, shape, interpolation=cv2.INTER_NEAREST)[:, :, None]
        frames = change_sector(frames, whole, sampling, content)
        frames = [pixels.picture(frame, is_dicom) for frame in frames]
    numbers = window_frames(len(frames), sampling)
    used = np.unique(numbers[numbers >= 0])
    index = np.where(numbers < 0, -1, np.searchsorted(used, numbers))
    plain = np.stack([frames[i] for i in used])
    if plain.max() < LIT:
        notes.append("all frames are black")
    digest = digest if masks else frames_digest(frames, pixels.size)
    return [Clips(plain, index, numbers[:, 0], len(frames), "; ".join(notes), content, digest)]


def compared_frames(n_frames):
    """The frames that are compared to recognise copies of a video: 0, 1, 2, 4, 8, 16, ..."""
    return [i for i in range(n_frames) if i & (i - 1) == 0]


def frames_digest(frames, size):
    """SHA-256 of a few small frames, (size, size) pixels as in the clips, and of their number."""
    digest = hashlib.sha256(str(len(frames)).encode())
    for i in compared_frames(len(frames)):
        centre = frames[i] if len(frames[i]) == size else crop_centre(frames[i], size)
        digest.update(centre.tobytes())
    return digest.hexdigest()


def small_frames(source, size):
    """All frames of a video for a cache, uint8 (n, H, W, 3) BGR, resized if that makes them
    smaller: `resize` gives the same from these as from the video. Raises VideoError."""
    full = round(size * RESIZE_OVER_CROP)
    frames = iter_frames(source)
    return np.stack([x if x.size < 3 * full**2 else resize(x, size) for x in frames])


def random_transform(frames, size, rng):
    """The published training transforms, drawn once for all frames of a clip.

    frames: list of uint8 (R, R, 3). Zoom-out by 1 to 1.2 onto black (p 0.5), random crop,
    horizontal flip (p 0.5), rotation within 15 degrees. Returns uint8 (L, size, size, 3).
    """
    import cv2

    full = len(frames[0])
    canvas, x, y = full, 0, 0
    if rng.random() < 0.5:
        canvas = int(full * rng.uniform(1, 1.2))
        x, y = rng.integers(0, canvas - full + 1, size=2)
    left, top = rng.integers(0, canvas - size + 1, size=2)
    flip = rng.random() < 0.5
    middle = (size - 1) / 2
    turn = cv2.getRotationMatrix2D((middle, middle), rng.uniform(-15, 15), 1)
    out = np.zeros((len(frames), size, size, 3), np.uint8)
    for frame, result in zip(frames, out, strict=True):
        wide = np.zeros((canvas, canvas, 3), np.uint8)
        wide[y : y + full, x : x + full] = frame
        crop = wide[top : top + size, left : left + size]
        crop = np.ascontiguousarray(crop[:, ::-1] if flip else crop)
        cv2.warpAffine(crop, turn, (size, size), dst=result, flags=cv2.INTER_NEAREST)
    return out


# ------------------------------------------------------------------------------------- the sector

MOTION = 12  # grey levels by which a moving pixel changes over a cine, at least
LIT = 4  # grey levels of a pixel that is not black background, at least
LARGE = 0.2  # moving pixels of a sector, at least, as a share of those of the largest
TOO_MUCH = "mask removes moving pixels"  # the start of a note
MOST_REMOVED = 0.1  # share of the moving pixels that a mask may remove without a warning


def sector_mask(frames, boxes, notes):
    """uint8 (R, R, 1): 1 inside the ultrasound sectors of small frames (n, R, R, 3), 0 outside.

    Sectors are detected in each of the DICOM's regions (`boxes`, see `region_boxes`), or in the
    whole image if there are none. They are the convex hulls of thick areas that partly move.
    Burned-in text does not move, and an ECG trace is thin, or each of its pixels is dark most of
    the time. Pixels whose area may cross the edge count as outside. notes: a list to which the
    share of moving pixels that are kept is added. Raises VideoError if nothing moves.
    """
    grey = np.sort(np.stack([f.max(2) for f in frames]), axis=0)
    n, full = grey.shape[:2]
    low, high = grey[n // 5], grey[-1 - n // 5]  # in most frames; a passing trace is in neither
    moving = (high - low >= MOTION).astype(np.uint8)
    area = moving | (high >= LIT).astype(np.uint8)
    edge = np.concatenate([area[0], area[-1], area[:, 0], area[:, -1]])
    if edge.mean() > 0.5:  # the background is not black
        area = moving
    regions = [region_mask(box, full) for box in boxes or [(0, 0, 1, 1)]]
    inside = np.maximum.reduce([sectors(area, moving, region) for region in regions])
    if not inside.any():
        raise VideoError("no ultrasound sector to mask: nothing moves")
    kept = (moving & inside).sum() / moving.sum()
    kind = TOO_MUCH if kept < 1 - MOST_REMOVED else "mask"
    notes.append(f"{kind}: {kept:.1%} of moving pixels kept")
    return inside[:, :, None]


def sectors(area, moving, region):
    """uint8 (R, R): 1 inside the sectors of a region; all 0 if nothing in it moves."""
    import cv2

    full, inside = len(area), np.zeros_like(area)
    area = cv2.morphologyEx(area & region, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    for thick in (full // 10, full // 28, 3):  # pixels; thicker areas are more surely tissue
        thick_area = cv2.morphologyEx(area, cv2.MORPH_OPEN, np.ones((thick, thick), np.uint8))
        _, labels = cv2.connectedComponents(thick_area)
        moves = np.bincount(labels[(moving & region & thick_area) > 0], minlength=1)
        if moves.any():
            break
    for label in np.flatnonzero(moves > moves.max() * LARGE):
        points = np.argwhere(labels == label)[:, ::-1].astype(np.int32)
        hull = cv2.fillConvexPoly(np.zeros_like(area), cv2.convexHull(points), 1)
        inside |= cv2.erode(hull, np.ones((3, 3), np.uint8))
    return inside & region


def region_mask(box, full):
    """uint8 (full, full): 1 inside a box (x0, y0, x1, y1) in shares of the sides."""
    inside = np.zeros((full, full), np.uint8)
    x0, y0 = np.ceil(np.multiply(box[:2], full)).astype(int)
    x1, y1 = np.floor(np.multiply(box[2:], full)).astype(int)
    inside[y0:y1, x0:x1] = 1
    return inside


def answer(function, arguments):
    """The result of a function, or a VideoError: NotNow if the machine caused the error."""
    try:
        return function(*arguments)
    except NotNow as error:
        return error
    except Exception as error:  # a malformed file must not end the run
        if reason := machine_fault(error):
            return NotNow(reason)
        return error if isinstance(error, VideoError) else VideoError("unreadable")


def serve():
    """Run calls, (function, *arguments) pickled on standard input, until it closes.

    Replies are (result or VideoError, seconds), pickled on standard output. The output of libraries
    goes to standard error.
    """
    import cv2

    cv2.setNumThreads(1)  # several decoder processes run in parallel
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            function, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        start = time.perf_counter()
        reply = answer(function, arguments)
        pickle.dump((reply, time.perf_counter() - start), replies, protocol=5)
        replies.flush()


if __name__ == "__main__":
    from echofocus_core.video.decode import serve

    serve()
