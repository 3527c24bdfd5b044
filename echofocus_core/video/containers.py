"""Read video files (AVI, MP4/MOV, MKV/WebM, WMV, MPEG) and video streams in DICOM.

    file -> iter_container: uint8 (H, W, 3) BGR, one after the other

The frames that decode are counted: the count in a container is often an estimate.
"""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from echofocus_core.video.errors import VideoError, check_budget, open_file

# FFmpeg might follow what a file refers to; a video is one file. So it may only open files, and
# none as a playlist, a list of images or a script: these demuxers read what they are given.
DEMUXERS = "avi,mov,matroska,asf,mpeg,mpegts,mpegvideo,m4v,h264,hevc"
os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = f"protocol_whitelist;file|format_whitelist;{DEMUXERS}"
BGR24 = int.from_bytes(b"BGR\x18", "little")  # FFmpeg's code of uncompressed pixels


@contextmanager
def open_capture(path):
    """OpenCV's reader of a video file. VideoError if it cannot be opened."""
    import cv2

    with plain_name(path) as name:
        capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG)
        try:
            if not capture.isOpened():
                raise VideoError("cannot be opened as a video: of another kind, or truncated")
            yield capture
        finally:
            capture.release()


def container_rate(path):
    """Frames per second from the container."""
    import cv2

    with open_capture(path) as capture:
        return capture.get(cv2.CAP_PROP_FPS)


def iter_container(path, notes):
    """Decode a video file front to back: yields uint8 (H, W, 3) BGR; notes: see `VideoFile.frames`.

    Raises VideoError when nothing or one frame decodes, for a file that ends before its declared
    size, and for an AVI of which less than half decodes: it counts its frames, where others
    estimate them.
    """
    import cv2

    check_size(path)
    n, avi = 0, avi_head(path)
    with open_capture(path) as capture:
        check_budget(
            1, capture.get(cv2.CAP_PROP_FRAME_HEIGHT), capture.get(cv2.CAP_PROP_FRAME_WIDTH)
        )
        declared = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        for frame in read_pictures(capture, bool(avi) and is_bottom_up(avi)):
            n += 1
            check_budget(n, *frame.shape[:2])
            yield frame
    count = f"{n} frames decode, the container says {declared}"
    if n < 2 or (avi and n < declared / 2):
        raise VideoError("still image" if n == 1 >= declared else f"damaged: {count}")
    if declared > 0 and abs(n - declared) > max(2, declared // 50):  # containers round their count
        notes.append(f"count of frames differs: {count}")  # the part before the colon is a kind


def read_pictures(capture, turn):
    """The frames of an open capture, up to the first that does not decode.

    turn: uncompressed pixels have their lowest row first and are turned here, since OpenCV
    (4.13 to 5.0) writes beyond its memory over them and ends the process.
    """
    import cv2

    turn = turn and int(capture.get(cv2.CAP_PROP_CODEC_PIXEL_FORMAT)) == BGR24
    if turn:
        capture.set(cv2.CAP_PROP_FORMAT, -1)  # the packets as they are in the file
    H, W = (int(capture.get(x)) for x in (cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH))
    row = (3 * W + 3) // 4 * 4  # bytes, to a multiple of four
    while True:
        decodes, frame = capture.read()
        if not decodes or (turn and frame.size < H * row):
            return
        if turn:
            rows = frame.ravel()[: H * row].reshape(H, row)[::-1, : 3 * W]
            frame = np.ascontiguousarray(rows).reshape(H, W, 3)
        yield frame


def avi_head(path):
    """The first bytes of an AVI file, b'' for other files."""
    with open_file(path) as f:
        head = f.read(1 << 16)
    return head if head[:4] == b"RIFF" else b""


SEGMENT = b"\x18\x53\x80\x67"  # of Matroska: the element that holds the rest of the file
ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def check_size(path):
    """VideoError for a container that ends before its declared size."""
    end, size = declared_end(path), os.path.getsize(path)
    if end > size:
        raise VideoError(f"truncated: {size:,} of {end:,} bytes")


def declared_end(path):
    """The size of a container in bytes, as its header has it; 0 where it has none.

    Of AVI the RIFF size, of Matroska that of the segment, of MP4 the end of the last box, of ASF
    the file's size.
    """
    with open_file(path) as f:
        head = f.read(1 << 12)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return end_of_boxes(f)
    if head.startswith(b"RIFF"):
        return 8 + int.from_bytes(head[4:8], "little")
    if head.startswith(b"\x1a\x45\xdf\xa3") and (at := head.find(SEGMENT) + 4) > 3:
        length = 9 - head[at].bit_length()  # bytes of the size: leading zero bits count them
        size = int.from_bytes(head[at : at + length], "big") & ((1 << 7 * length) - 1)
        unknown = size == (1 << 7 * length) - 1  # of a recording that was not finished
        return 0 if unknown else at + length + size
    if (at := head.find(ASF_PROPERTIES)) > 0:
        return int.from_bytes(head[at + 40 : at + 48], "little")
    return 0


def end_of_boxes(f):
    """The end of an MP4 file's last box."""
    at, size = 0, f.seek(0, os.SEEK_END)
    while at < size:
        f.seek(at)
        head = f.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        if length < 8 or not head[4:8].isascii():  # to the end of the file, or something else
            return 0
        at += length
    return at


def is_bottom_up(head):
    """Whether an AVI's video has its lowest row first: a height above 0 in its BITMAPINFOHEADER."""
    at = head.find(b"strf", head.find(b"vids")) + 16
    return int.from_bytes(head[at : at + 4], "little", signed=True) > 0


@contextmanager
def plain_name(path):
    """A name of the file that FFmpeg can open: one that is UTF-8 and no pattern or protocol."""
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
