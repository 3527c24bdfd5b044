"""Read video files (AVI, MP4/MOV, MKV/WebM, WMV, MPEG) and video streams in DICOM.

    file -> iter_container: uint8 (H, W, 3) BGR, one after the other

Frames are counted by decoding them: the count that a container declares is often an estimate.
"""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from echofocus_core.video.errors import VideoError, check_budget, open_file

# A video is one file, but FFmpeg can follow references to others (playlists, image lists, scripts).
# So it may only open files, and only with these demuxers, which follow no references.
DEMUXERS = "avi,mov,matroska,asf,mpeg,mpegts,mpegvideo,m4v,h264,hevc"
os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = f"protocol_whitelist;file|format_whitelist;{DEMUXERS}"
BGR24 = int.from_bytes(b"BGR\x18", "little")  # FFmpeg's code for uncompressed pixels


@contextmanager
def open_capture(path):
    """OpenCV's reader of a video file. Raises VideoError if it cannot be opened."""
    import cv2

    with plain_name(path) as name:
        capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG)
        try:
            if not capture.isOpened():
                raise VideoError("cannot be opened as a video: truncated, or not a video")
            yield capture
        finally:
            capture.release()


def container_rate(path):
    """The frames per second that a container declares."""
    import cv2

    with open_capture(path) as capture:
        return capture.get(cv2.CAP_PROP_FPS)


def iter_container(path, notes):
    """Decode a video file front to back: yields uint8 (H, W, 3) BGR; notes: see `VideoFile.frames`.

    Raises VideoError if fewer than two frames decode, if the file ends before its declared size,
    and if less than half of an AVI's declared frames decode: its count is exact, those of other
    containers can be estimates.
    """
    import cv2

    n, head = 0, read_head(path)
    avi = head.startswith(b"RIFF")
    with open_capture(path) as capture:
        check_budget(
            1, capture.get(cv2.CAP_PROP_FRAME_HEIGHT), capture.get(cv2.CAP_PROP_FRAME_WIDTH)
        )
        declared = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        for frame in capture_frames(capture, avi and is_bottom_up(head)):
            n += 1
            check_budget(n, *frame.shape[:2])
            yield frame
    count = f"{n} frames decode, the container declares {declared}"
    if n < 2 or (avi and n < declared / 2):
        raise VideoError("still image" if n == 1 >= declared else f"damaged: {count}")
    if declared > 0 and abs(n - declared) > max(2, declared // 50):  # containers round their count
        notes.append(f"count of frames differs: {count}")  # reports show the part before the colon


def capture_frames(capture, bottom_up):
    """The frames of an open capture, up to the first that does not decode.

    bottom_up: uncompressed pixels are stored with the lowest row first. They are flipped here,
    since OpenCV (4.13 to 5.0) writes outside its memory when it flips them, and crashes.
    """
    import cv2

    flip = bottom_up and int(capture.get(cv2.CAP_PROP_CODEC_PIXEL_FORMAT)) == BGR24
    if flip:
        capture.set(cv2.CAP_PROP_FORMAT, -1)  # read the stored packets
    H, W = (int(capture.get(x)) for x in (cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH))
    row = (3 * W + 3) // 4 * 4  # bytes of a row, padded to a multiple of four
    while True:
        decodes, frame = capture.read()
        if not decodes or (flip and frame.size < H * row):
            return
        if flip:
            rows = frame.ravel()[: H * row].reshape(H, row)[::-1, : 3 * W]
            frame = np.ascontiguousarray(rows).reshape(H, W, 3)
        yield frame


SEGMENT = b"\x18\x53\x80\x67"  # Matroska's element that holds the rest of the file
ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def read_head(path):
    """The first bytes of a container. Raises VideoError if it ends before its declared size.

    AVI declares the size of its RIFF chunk, Matroska that of its segment, MP4 those of its boxes,
    ASF that of the file.
    """
    end = 0
    with open_file(path) as f:
        head, size = f.read(1 << 16), f.seek(0, os.SEEK_END)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            end = end_of_boxes(f, size)
    if head.startswith(b"RIFF"):
        end = 8 + int.from_bytes(head[4:8], "little")
    elif head.startswith(b"\x1a\x45\xdf\xa3") and (at := head.find(SEGMENT) + 4) > 3:
        length = 9 - head[at].bit_length()  # of the size in bytes: 1 + leading zero bits
        unknown = (1 << 7 * length) - 1  # the recording was not finished
        segment = int.from_bytes(head[at : at + length], "big") & unknown
        end = 0 if segment == unknown else at + length + segment
    elif (at := head.find(ASF_PROPERTIES)) > 0:
        end = int.from_bytes(head[at + 40 : at + 48], "little")
    if end > size:
        raise VideoError(f"truncated: {size:,} of {end:,} bytes")
    return head


def end_of_boxes(f, size):
    """The end of an MP4 file's last box."""
    at = 0
    while at < size:
        f.seek(at)
        head = f.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        if length < 8 or not head[4:8].isascii():  # up to the end of the file, or not a box
            return 0
        at += length
    return at


def is_bottom_up(head):
    """Whether an AVI stores its lowest row first: its BITMAPINFOHEADER has a height > 0."""
    at = head.find(b"strf", head.find(b"vids")) + 16
    return int.from_bytes(head[at : at + 4], "little", signed=True) > 0


@contextmanager
def plain_name(path):
    """A path that FFmpeg can open: valid UTF-8 and not a pattern; if necessary, that of a link."""
    name = os.path.abspath(path)
    try:
        name.encode()
        plain = "%" not in name
    except UnicodeEncodeError:
        plain = False
    if plain:
        yield name
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, "video")
        link.symlink_to(name)
        yield str(link)
