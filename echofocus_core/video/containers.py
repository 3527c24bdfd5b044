"""Video files in: AVI, MP4/MOV, MKV/WebM, WMV, MPEG; and the streams that DICOM holds in one piece.

    file -> iter_container: uint8 (H, W, 3) BGR, one after the other

How many frames there are is what decodes: a container's own count is a guess of whoever wrote it.
"""

import os
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from echofocus_core.video.errors import FRAMES, VideoError, check_budget, open_file

# FFmpeg might follow what a file refers to; a video is one file. So it may open files alone, and
# none as a playlist, a list of images or a script: these demuxers read what they are given.
DEMUXERS = "avi,mov,matroska,asf,mpeg,mpegts,mpegvideo,m4v,h264,hevc"
os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = f"protocol_whitelist;file|format_whitelist;{DEMUXERS}"

RETRIES = 32  # reads after one that fails, before it is taken for the end
AVI_CHUNKS = 20 * FRAMES  # looked at, of frames and sound
NO_VIDEO = "cannot be opened as a video"


def iter_container(path, notes):
    """Decode a video file front to back: yields uint8 (H, W, 3) BGR; notes: see `iter_frames`.

    Raises VideoError when nothing, one frame or less than half decodes before a damaged one, or the
    file was cut short.
    """
    import cv2

    with plain_name(path) as name:
        capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG)
        try:
            if not capture.isOpened():
                cut = is_cut_short(path)
                raise VideoError("truncated: the file breaks off" if cut else NO_VIDEO)
            sides = capture.get(cv2.CAP_PROP_FRAME_HEIGHT), capture.get(cv2.CAP_PROP_FRAME_WIDTH)
            check_budget(1, *sides)
            declared = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
            n = 0
            for frame in pictures(capture, path):
                n += 1
                check_budget(n, *frame.shape[:2])
                yield frame
            there = with_those_after(capture, n)
        finally:
            capture.release()
    agrees = abs(n - declared) <= max(2, declared // 50)  # containers round their count
    if not agrees and (held := avi_frames(path)) > n + max(2, held // 50):
        there = max(there, held)
    if (n < 2 or not agrees or has_no_count(path)) and is_cut_short(path):
        raise VideoError(f"truncated: the file breaks off, {n} frames decode")
    damage = f"damaged: decoding stops after {n} of {there} frames"
    if n < there / 2:
        raise VideoError(damage)
    if n == 0:
        raise VideoError("no frame can be decoded")
    if n == 1:
        many = declared > 1
        raise VideoError(f"one frame of {declared} decodes: damaged" if many else "still image")
    if there > n:
        notes.append(damage)
    elif not agrees and declared > 0:
        notes.append(f"the container's count of frames is wrong: {n} decode")


def container_rate(path):
    """Frames a second as the container has it."""
    import cv2

    with plain_name(path) as name:
        capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG)
        try:
            return capture.get(cv2.CAP_PROP_FPS)
        finally:
            capture.release()


def pictures(capture, path):
    """The frames of an open capture, up to the first that does not decode.

    Uncompressed pixels that lie bottom up, as most programs write them, are turned here: OpenCV
    (4.13 to 5.0) writes beyond its memory over them and ends the process.
    """
    import cv2

    turned = int(capture.get(cv2.CAP_PROP_CODEC_PIXEL_FORMAT)) == BGR24 and lies_bottom_up(path)
    if turned:
        capture.set(cv2.CAP_PROP_FORMAT, -1)  # the packets as they are in the file
    H, W = (int(capture.get(x)) for x in (cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH))
    row = (3 * W + 3) // 4 * 4  # bytes, to a multiple of four
    while True:
        decodes, frame = capture.read()
        if not decodes or (turned and frame.size < H * row):
            return
        if turned:
            rows = frame.ravel()[: H * row].reshape(H, row)[::-1, : 3 * W]
            frame = np.ascontiguousarray(rows).reshape(H, W, 3)
        yield frame


BGR24 = int.from_bytes(b"BGR\x18", "little")  # FFmpeg's code of such pixels


def lies_bottom_up(path):
    """Whether an AVI's video has its lowest row first: a height above 0 in its BITMAPINFOHEADER."""
    with open_file(path) as f:
        head = f.read(1 << 16)
    at = head.find(b"strf", head.find(b"vids")) + 16
    return head[:4] == b"RIFF" and int.from_bytes(head[at : at + 4], "little", signed=True) > 0


def with_those_after(capture, n):
    """How many frames there are, where n decode and then one does not: n if nothing follows it."""
    there, more, failed = n, 0, 0
    while failed < RETRIES and more < FRAMES:
        if capture.grab():
            more, failed = more + 1, 0
            there = n + 1 + more
        else:
            failed += 1
    return there


def avi_frames(path):
    """Frames that an AVI file holds, empty ones (which repeat the last) not counted; 0 for others.

    The largest number of chunks of a video stream in the lists 'movi'.
    """
    streams = Counter()
    with open_file(path) as f:
        size = os.fstat(f.fileno()).st_size
        if f.read(4) != b"RIFF":
            return 0
        at = 0
        for _ in range(AVI_CHUNKS):
            f.seek(at)
            head = f.read(12)
            if at + 8 > size or len(head) < 8:
                break
            if head[:4] == b"RIFF" or (head[:4] == b"LIST" and head[8:] in (b"movi", b"rec ")):
                at += 12  # into it
                continue
            length = int.from_bytes(head[4:8], "little")
            if head[2:4] in (b"dc", b"db") and length:
                streams[head[:2]] += 1
            at += 8 + length + length % 2
    return max(streams.values(), default=0)


@contextmanager
def plain_name(path):
    """A name of the file that FFmpeg can open: one that is UTF-8 and no pattern or protocol."""
    name = os.path.abspath(path)
    try:
        name.encode()
        odd = "%" in name
    except UnicodeEncodeError:
        odd = True
    if not odd:
        yield name
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, "video")
        link.symlink_to(name)
        yield str(link)


def has_no_count(path):
    """Whether a file is an MPEG stream, of which the count of frames is made up from its end."""
    with open_file(path) as f:
        head = f.read(200)
    return head.startswith(PACK) or packet_size(head) > 0


PACK, SYNC = b"\0\0\1\xba", 0x47  # what MPEG's program and transport streams begin with


def packet_size(head):
    """Bytes of a transport stream's packets, from its first 200; 0 for another kind of file."""
    sizes = [(188, 0), (192, 4)]  # 4: after a time code, in the files of cameras
    found = (n for n, at in sizes if len(head) > n + at and head[at] == head[at + n] == SYNC)
    return next(found, 0)


def is_cut_short(path):
    """Whether the last part of a container reaches beyond the end of the file, as it says itself.

    False where the kind of file, or this one, does not say: bare streams do not, and an MPEG stream
    that was cut between two packets looks whole.
    """
    with open_file(path) as f:
        size = os.fstat(f.fileno()).st_size
        head = f.read(200)
        if packet := packet_size(head):
            return size % packet > 0
        if head[:4] == b"RIFF":
            step = riff_chunk
        elif head[:4] == b"\x1a\x45\xdf\xa3":
            step = ebml_element
        elif head[:8] == bytes.fromhex("3026b2758e66cf11"):
            step = asf_object
        elif head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            step = mp4_box
        elif head.startswith(PACK):
            step = mpeg_packet
        else:
            return False
        at = 0
        while 0 <= at < size:
            f.seek(at)
            length = step(f.read(24))
            if not length:  # to the end of the file, or not known
                return False
            at += length
    return at > size


def riff_chunk(head):
    """Bytes of the RIFF chunk that starts so, 0 if not said; as the three functions below."""
    length = int.from_bytes(head[4:8], "little")
    return 8 + length + length % 2 if length else 0


def mp4_box(head):
    length = int.from_bytes(head[:4], "big")
    if length == 1:
        length = int.from_bytes(head[8:16], "big")
    return length if length >= 8 else 0


def asf_object(head):
    length = int.from_bytes(head[16:24], "little")
    return length if length >= 24 else 0


def mpeg_packet(head):
    """Of a program stream (ISO 13818-1, 2.5.3)."""
    if not head.startswith(b"\0\0\1") or len(head) < 4 or head[3] < 0xB9:
        return 0
    if head.startswith(PACK):  # MPEG-2's ends with stuffing
        return 14 + (head[13] & 7 if len(head) > 13 else 0) if head[4:5] >= b"\x40" else 12
    return 6 + int.from_bytes(head[4:6], "big") if head[3] > PACK[3] else 4


def ebml_element(head):
    at = 4  # bytes of the identifier: of EBML, Segment and Cluster
    width = 9 - head[at].bit_length() if len(head) > at and head[at] else 9
    length = int.from_bytes(head[at : at + width], "big") & ((1 << 7 * width) - 1)
    return 0 if width > 8 or length == (1 << 7 * width) - 1 else at + width + length
