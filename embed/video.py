"""Video in: frames from AVI, MP4/MOV and DICOM cines, and the published clip sampling.

    file -> iter_frames: uint8 (H, W, 3) BGR, one after the other -> resized: (R, R, 3)
         -> sector_mask, if asked for -> clip_starts, clip_frames: which frames make the clips
         -> central: (S, S, 3), or random_transform for transformed copies

No torch in here: the file is also the program that the decoder processes run
(`python embed/video.py`), so that a file which crashes or hangs a decoder stops nothing else.
"""

import hashlib
import os
import pickle
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # run as a script: the repository is the import root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from embed.dicom import NotNow, SourceGone, VideoError, is_dicom, open_file

VIDEO_SUFFIXES = {".avi", ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".wmv", ".mpg", ".mpeg"}
DICOM_SUFFIXES = {".dcm", ".dicom", ".ima"}

# Resized to 256x256, then the central 224x224: the published ratio, kept for other sizes.
RESIZE_OVER_CROP = 256 / 224

M_MODE, SPECTRAL = 2, 3  # DICOM RegionSpatialFormat (C.8.5.5.1.1); 1 is 2-D, colour Doppler too


# ------------------------------------------------------------------------------------ finding files


def read_dicom(path, **options):
    """pydicom.dcmread, of files without the DICOM start too.

    Without a transfer syntax the pixels are taken for uncompressed, the standard's default;
    VideoError when they cannot be.
    """
    import pydicom

    dicom = pydicom.dcmread(path, force=True, **options)
    if "TransferSyntaxUID" not in dicom.file_meta:
        if "PixelData" in dicom and dicom["PixelData"].is_undefined_length:
            raise VideoError("compressed, but the file does not say how: no transfer syntax")
        implicit, _ = dicom.original_encoding
        syntax = "ImplicitVRLittleEndian" if implicit else "ExplicitVRLittleEndian"
        dicom.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    return dicom


# ----------------------------------------------------------------------------------------- decoding


def iter_frames(source, notes=None):
    """Decode a cine once, front to back: yields its frames, uint8 (H, W, 3), **BGR**.

    source: a file's path, or the list of paths of a cine's single frames, see `group_stills`.
    notes: a list that gets a line for everything that was read otherwise than the file says.
    BGR is OpenCV's order and the one the released models were trained on. Raises VideoError for
    stills, M-mode and spectral recordings, and for files that are empty, truncated, unreadable
    or in a transfer syntax that no installed decoder knows (possibly after some frames).
    """
    if isinstance(source, (list, tuple)):
        raise VideoError("single frames of a series are not read yet")
    path = Path(source)
    try:
        with open_file(path) as f:
            if not f.read(1):
                raise VideoError("empty file")
    except PermissionError as error:
        raise NotNow("no permission to read it") from error
    except OSError as error:
        raise SourceGone(f"cannot be read: {error.strerror}") from error
    if is_dicom(path):
        yield from _iter_dicom(path)
    elif path.suffix.lower() in DICOM_SUFFIXES:
        raise VideoError("not a DICOM file: neither the 'DICM' mark nor a first element")
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
    try:
        header = read_dicom(path, stop_before_pixels=True)
        n_frames = check_cine(header)
        check_decoder(header)
    except VideoError:
        raise
    except Exception as error:  # pydicom raises many kinds on malformed headers
        raise VideoError(f"unreadable DICOM header: {_first_line(error)}") from error

    n = 0
    try:
        for frame in _decode_jpeg(path, header) or _decode_pydicom(path, header):
            yield frame
            n += 1
    except VideoError:
        raise
    except Exception as error:  # decoders raise many kinds
        if "PixelData" in str(error):
            raise VideoError("truncated: the pixel data are missing or break off") from error
        reason = f"frame {n + 1} of {n_frames} does not decode: {_first_line(error)}"
        raise VideoError(reason) from error
    if n < n_frames:
        raise VideoError(f"truncated: {n} of {n_frames} frames decode")
    if n > n_frames:
        raise VideoError(f"{n} frames, though NumberOfFrames is {n_frames}")


def _decode_pydicom(path, header):
    """Frames of any DICOM, uint8 (H, W, 3) BGR, by pydicom and its plugins."""
    from pydicom.pixels import apply_color_lut, iter_pixels

    palette = header.PhotometricInterpretation == "PALETTE COLOR"
    for pixels in iter_pixels(
        pixel_source(path)
    ):  # RGB for RGB and YBR alike: not to be converted again
        yield to_bgr(apply_color_lut(pixels, header) if palette else pixels, header)


def pixel_source(path):
    """The path, to be read frame by frame, or all of a file that pydicom does not stream."""
    import pydicom

    try:
        standard = "TransferSyntaxUID" in pydicom.filereader.read_file_meta_info(path)
    except pydicom.errors.InvalidDicomError:
        standard = False
    return path if standard else read_dicom(path)


def _decode_jpeg(path, header):
    """Frames of the commonest kind of cine, JPEG baseline in YBR, by OpenCV: four times as fast.

    None when the file is of another kind, or when the first frame is not what pydicom makes of it.
    """
    import cv2
    import pydicom
    from pydicom.encaps import generate_frames

    if header.file_meta.TransferSyntaxUID != pydicom.uid.JPEGBaseline8Bit:
        return None
    if header.PhotometricInterpretation not in ("YBR_FULL_422", "YBR_FULL"):
        return None
    pixel_data = read_dicom(path).PixelData
    encoded = list(generate_frames(pixel_data, number_of_frames=int(header.NumberOfFrames)))

    def decode(jpeg):
        if not jpeg.rstrip(b"\0").endswith(b"\xff\xd9"):  # the end-of-image mark
            raise ValueError("broken JPEG")
        frame, said = heard(cv2.imdecode, np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
        # libjpeg makes up what it cannot decode, and only says so.
        broken = "premature end" in said or "bad Huffman" in said
        if broken or frame is None or frame.shape[:2] != (header.Rows, header.Columns):
            raise ValueError("broken JPEG")
        return frame

    expected = next(_decode_pydicom(path, header)).astype(np.int16)
    if np.abs(decode(encoded[0]) - expected).max() > 2:
        return None
    return map(decode, encoded)


def heard(function, *args):
    """(What a C library's function returns, what it writes to standard error meanwhile)."""
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            result = function(*args)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        said.seek(0)
        return result, said.read().decode(errors="replace")


def check_cine(header):
    """Frames of a DICOM header (int), or VideoError when it is not a 2-D cine."""
    formats = {int(r.get("RegionSpatialFormat", 0)) for r in _regions(header)}
    if M_MODE in formats:
        raise VideoError("M-mode, not a cine")
    if SPECTRAL in formats:
        raise VideoError("spectral Doppler, not a cine")
    if header.get("PixelRepresentation"):
        raise VideoError("signed pixel values: not an ultrasound image")
    if "Rows" not in header or "PhotometricInterpretation" not in header:
        raise VideoError("DICOM without image data, or cut short")
    declared = header.get("NumberOfFrames")
    n_frames = 1 if declared is None else int(declared)
    if n_frames < 1:
        raise VideoError(f"NumberOfFrames is {n_frames}")
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
        raise NotNow(
            f"transfer syntax {syntax.name} needs a plugin: pip install 'echofocus[dicom]'"
        )


def to_bgr(pixels, header):
    """Decoded DICOM pixels, (H, W) or (H, W, 3) RGB -> uint8 (H, W, 3) BGR.

    More than 8 bits are scaled down by the bits stored (a palette's entries by 16).
    """
    photometric = header.PhotometricInterpretation
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


def resized(frame, size=224):
    """Frame (H, W, 3) -> (R, R, 3) uint8, R = 256 for size 224: area resize, aspect not kept."""
    import cv2

    full = round(size * RESIZE_OVER_CROP)
    return cv2.resize(frame, (full, full), interpolation=cv2.INTER_AREA)


def central(image, size=224):
    """The central (size, size) of an image (R, R, ...)."""
    edge = round((len(image) - size) / 2)
    return image[edge : edge + size, edge : edge + size]


def clip_starts(n_frames, n_clips, clip_len, seed, key, how="modulo"):
    """Random clip starts, int64 (n_clips,), each alike over 0..n_frames - clip_len.

    how: 'independent' draws, or 'modulo': all from the starts of one residue class, those whose
    first frames (see `clip_frames`) agree modulo 3, since such clips share most of their images
    (see `panecho.clip_planes`). The class is that of a start drawn from all, so that each start
    stays as likely; only the draws of one video are no longer independent of each other.
    Seeded by `seed` and the text `key` alone: neither order nor worker matters.
    """
    rng, starts = seeded(seed, key), np.arange(max(0, n_frames - clip_len) + 1)
    if how == "modulo":
        residues = first_frames(starts) % 3
        starts = starts[residues == rng.choice(residues)]
    return rng.choice(starts, size=n_clips)


def seeded(seed, key):
    """A numpy Generator that is a function of a number and a text."""
    words = np.frombuffer(hashlib.sha256(key.encode()).digest(), dtype="<u4")
    return np.random.default_rng([seed, *words.tolist()])


def first_frames(starts):
    """The frame that a clip begins with: the published reader seeks to start - 1."""
    return np.maximum(np.asarray(starts) - 1, 0)  # as the released models were trained


def clip_frames(starts, n_frames, clip_len):
    """Frame numbers of each clip, int64 (n_clips, clip_len), as the published reader takes them.

    A start s reads s - 1 .. s + clip_len - 2 (0 .. clip_len - 1 for s = 0); the last frame of a
    video that is too short is repeated.
    """
    return np.minimum(first_frames(starts)[:, None] + np.arange(clip_len), n_frames - 1)


@dataclass
class Sampling:
    """How a video becomes clips."""

    n_clips: int = 16
    clip_len: int = 16  # frames
    size: int = 224  # pixels, square
    seed: int = 0
    starts: str = "modulo"  # or 'independent', see clip_starts
    mask: str = "none"  # 'sector' blacks out what lies outside the ultrasound sector
    augment: int = 0  # randomly transformed copies beside the plain one


@dataclass
class Clips:
    """The clips of one video (or of one transformed copy), each frame held once."""

    frames: np.ndarray  # uint8 (F, size, size, 3) BGR: the distinct frames that the clips use
    index: np.ndarray  # int64 (n_clips, clip_len) into frames
    starts: np.ndarray  # int64 (n_clips,), as drawn
    n_frames: int  # frames in the file
    note: str = ""  # what was read otherwise than the file says
    content: str = ""  # SHA-256 of the file's bytes, which the draws are seeded by


def content_digest(source):
    """Hex SHA-256 of a video's bytes; `source` may be a list of files, taken in order."""
    digest = hashlib.sha256()
    try:
        for part in source if isinstance(source, list) else [source]:
            with open_file(part) as f:
                while block := f.read(1 << 20):
                    digest.update(block)
    except PermissionError as error:
        raise NotNow("no permission to read it") from error
    except OSError as error:
        raise SourceGone(f"cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def read_clips(source, sampling):
    """Decode a video and sample its clips: [plain, transformed copies...]. Raises VideoError.

    The draws are seeded by the video's bytes, so that an exam gives the same clips under whatever
    name it lies. A copy's starts are drawn independently: each of its clips is transformed by
    itself, so that none share an image. Decoding is front to back and once; each frame is resized
    as it comes, so that memory is that of the small frames.
    """
    notes = []
    frames = [resized(frame, sampling.size) for frame in iter_frames(source, notes)]
    note = "; ".join(notes)
    if sampling.mask == "sector":
        inside = sector_mask(frames, region_boxes(source))
        frames = [frame * inside for frame in frames]
    n_frames, content = len(frames), content_digest(source)

    def sample(key, how):
        drawn = (sampling.n_clips, sampling.clip_len, sampling.seed, key, how)
        starts = clip_starts(n_frames, *drawn)
        return starts, clip_frames(starts, n_frames, sampling.clip_len)

    starts, numbers = sample(content, sampling.starts)
    used, index = np.unique(numbers, return_inverse=True)
    plain = np.stack([central(frames[i], sampling.size) for i in used])
    copies = [Clips(plain, index.reshape(numbers.shape), starts, n_frames, note, content)]
    for copy in range(1, sampling.augment + 1):
        starts, numbers = sample(f"{content}#{copy}", "independent")
        rng = seeded(sampling.seed, f"{content}#{copy}#transform")
        changed = [random_transform([frames[i] for i in c], sampling.size, rng) for c in numbers]
        index = np.arange(numbers.size).reshape(numbers.shape)
        copies.append(Clips(np.concatenate(changed), index, starts, n_frames, note, content))
    return copies


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


# ------------------------------------------------------------------------------- the sector alone

MOTION = 12  # grey levels by which a pixel that moves changes over a cine, at least
LIT = 4  # grey levels of a pixel that is no black background, at least


def region_boxes(source):
    """The 2-D ultrasound regions of a DICOM as (x0, y0, x1, y1), shares of the image's sides.

    Empty when the file has none, or when one does not lie within the image (some exports shrink
    the image and leave the tags).
    """
    path = source[0] if isinstance(source, (list, tuple)) else source
    if not is_dicom(path):
        return []
    header = read_dicom(path, stop_before_pixels=True)
    names = [f"RegionLocation{n}" for n in ("MinX0", "MinY0", "MaxX1", "MaxY1")]
    boxes = []
    for region in _regions(header):
        if region.get("RegionSpatialFormat") != 1 or any(n not in region for n in names):
            continue
        x0, y0, x1, y1 = (int(region[n].value) for n in names)
        if not (0 <= x0 < x1 < header.Columns and 0 <= y0 < y1 < header.Rows):
            return []
        w, h = header.Columns, header.Rows
        boxes.append((x0 / w, y0 / h, (x1 + 1) / w, (y1 + 1) / h))
    return boxes


def sector_mask(frames, boxes):
    """uint8 (R, R, 1): 1 inside the ultrasound sector of small frames (n, R, R, 3), 0 outside.

    The sector is the convex hull of the largest thick area of which parts move, within the DICOM's
    regions (`boxes`, see `region_boxes`) if it has any: burned-in text stands still, and an ECG is
    thin, or dark at any one place most of the time. Pixels whose area may reach across the edge
    count as outside. Raises VideoError when nothing moves.
    """
    import cv2

    full, n = len(frames[0]), len(frames)
    grey = np.sort(np.stack([f.max(2) for f in frames]), axis=0)
    low, high = grey[n // 5], grey[-1 - n // 5]  # of most frames: a trace that passes is in neither
    moving = (high - low >= MOTION).astype(np.uint8)
    area = moving | (high >= LIT).astype(np.uint8)
    edge = np.concatenate([area[0], area[-1], area[:, 0], area[:, -1]])
    if edge.mean() > 0.5:  # the background is not black
        area = moving
    inside = region_mask(boxes, full)
    area = cv2.morphologyEx(area & inside, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    for thick in (full // 10, full // 28, 3):  # pixels; the thicker, the surer that it is tissue
        thick_area = cv2.morphologyEx(area, cv2.MORPH_OPEN, np.ones((thick, thick), np.uint8))
        _, labels = cv2.connectedComponents(thick_area)
        moves = np.bincount(labels[(moving & inside & thick_area) > 0], minlength=1)
        if moves.any():
            break
    else:
        raise VideoError("no ultrasound sector found to mask: nothing moves")
    points = np.argwhere(labels == moves.argmax())[:, ::-1].astype(np.int32)
    hull = cv2.fillConvexPoly(np.zeros_like(moving), cv2.convexHull(points), 1)
    hull = cv2.erode(hull, np.ones((3, 3), np.uint8))
    return (hull & inside)[:, :, None]


def region_mask(boxes, full):
    """uint8 (full, full): 1 within any of the boxes, all 1 without boxes."""
    inside = np.full((full, full), not boxes, np.uint8)
    for box in boxes:
        x0, y0 = np.ceil(np.multiply(box[:2], full)).astype(int)
        x1, y1 = np.floor(np.multiply(box[2:], full)).astype(int)
        inside[y0:y1, x0:x1] = 1
    return inside


def serve():
    """Answer `read_clips` calls, pickled on standard input, until it closes.

    Replies are (list of Clips or a VideoError, seconds). What libraries print goes to standard
    error.
    """
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            call = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        began = time.perf_counter()
        try:
            reply = read_clips(*call)
        except VideoError as error:
            reply = error
        except Exception as error:  # an odd file must not end the run
            reply = VideoError(f"unreadable: {_first_line(error)}")
        pickle.dump((reply, time.perf_counter() - began), replies, protocol=5)
        replies.flush()


if __name__ == "__main__":
    from embed.video import serve  # so that replies are embed.video's classes, not __main__'s

    serve()
