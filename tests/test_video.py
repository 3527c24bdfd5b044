"""Decoding against expected pixels, sampling against its published description, odd files."""

import hashlib
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from helpers import ROOT, moving_square, write_cine, write_dicom
from pydicom.encaps import generate_frames

from echofocus_core.video import decode as video
from echofocus_core.video import phantom, studies

REAL = pydicom.examples.get_path("ybr_color")
VIDEOS = Path(__file__).parent / "fixtures" / "videos"  # of moving_square(24, 48, 64)


@pytest.mark.parametrize("name, fourcc", [("a.avi", "MJPG"), ("a.mov", "mp4v")])
def test_containers(tmp_path, name, fourcc):
    frames = moving_square()
    phantom.write_video(tmp_path / name, frames, fourcc=fourcc)
    result = video.read_frames(tmp_path / name)
    assert result.shape == frames.shape and result.dtype == np.uint8
    inside, outside = result[5, 25:35, 14:26], result[5, 45:, 40:]
    assert np.abs(inside.mean((0, 1)) - (200, 120, 60)).max() < 12  # BGR, lossy codec
    assert np.abs(outside.mean((0, 1)) - 40).max() < 5


def test_inverse_greyscale(tmp_path):
    grey = moving_square()[..., :1]
    write_dicom(tmp_path / "a", 255 - grey[..., 0], "MONOCHROME1")
    np.testing.assert_array_equal(video.read_frames(tmp_path / "a"), np.repeat(grey, 3, -1))


def test_digest_regions_and_frame_rate_of_a_file():
    with video.VideoFile(REAL) as file:
        assert len(list(file.frames())) == len(list(file.frames())) == 30
        assert file.digest == hashlib.sha256(REAL.read_bytes()).hexdigest()
        assert file.boxes == []  # they are outside the image, which was shrunk
        assert file.rate == pytest.approx(1000 / pydicom.dcmread(REAL).FrameTime)


def test_real_echocardiogram_is_not_tinted():
    """The pixels of JPEG YBR_FULL_422 are those of OpenCV's JPEG decoder."""
    result = video.read_frames(REAL)
    jpegs = generate_frames(pydicom.dcmread(REAL).PixelData, number_of_frames=30)
    expected = [cv2.imdecode(np.frombuffer(j, np.uint8), cv2.IMREAD_COLOR) for j in jpegs]
    assert result.shape == (30, 240, 320, 3)
    assert np.abs(result.astype(int) - np.stack(expected)).max() <= 1


@pytest.mark.parametrize(
    "name, n, noted",
    [
        ("vfr.mkv", 24, True),
        ("vfr.webm", 24, True),
        ("vfr.wmv", 24, True),
        ("trimmed.mp4", 16, True),  # by its edit list
        ("mpeg2.mpg", 24, True),
        ("h264.mp4", 24, False),
        ("hevc.mp4", 24, False),
        ("h264.ts", 24, False),
        ("mpeg2.m2v", 24, False),
    ],
)
def test_decoded_frames_count_not_the_declared_number(tmp_path, name, n, noted):
    path = shutil.copy(VIDEOS / name, tmp_path / name.upper())
    notes = []
    frames = np.stack(list(video.iter_frames(path, notes)))
    assert len(frames) == n and bool(notes) == noted
    assert np.abs(frames.astype(int) - moving_square(24, 48, 64)[-n:]).mean() < 3


def test_an_avi_that_declares_one_frame(tmp_path):
    phantom.write_video(tmp_path / "a.avi", moving_square())
    data = bytearray((tmp_path / "a.avi").read_bytes())
    for mark, at in ((b"avih", 24), (b"strh", 40)):
        at += data.index(mark)
        data[at : at + 4] = (1).to_bytes(4, "little")
    (tmp_path / "a.avi").write_bytes(data)
    notes = []
    assert len(list(video.iter_frames(tmp_path / "a.avi", notes))) == 20
    assert notes == ["count of frames differs: 20 frames decode, the container declares 1"]


@pytest.mark.parametrize("name", ["a.avi", "a.mkv", "a.webm", "a.mp4", "fast.mp4"])
def test_a_truncated_container(tmp_path, name):
    if name == "fast.mp4":  # its index is before the pictures
        data = (VIDEOS / "h264.mp4").read_bytes()
    else:
        fourcc = {"avi": "MJPG", "webm": "VP80"}.get(name[2:], "mp4v")
        phantom.write_video(tmp_path / name, phantom.phantom_cine(frames=16), fourcc=fourcc)
        data = (tmp_path / name).read_bytes()
    for cut in (1, len(data) // 50, len(data) // 16, len(data) // 6):
        (tmp_path / name).write_bytes(data[:-cut])
        with pytest.raises(video.VideoError, match="truncated"):
            video.read_frames(tmp_path / name)
        assert "truncated" in video.why_skipped(tmp_path / name)  # as `check` reports it


def write_plain_avi(path, frames, top_down=False):
    """Write an AVI of uncompressed BGR; its rows are padded to a multiple of four bytes."""
    n, h, w, _ = frames.shape
    row = (3 * w + 3) // 4 * 4
    rows = np.zeros((n, h, row), np.uint8)
    rows[:, :, : 3 * w] = (frames if top_down else frames[:, ::-1]).reshape(n, h, 3 * w)

    def chunk(name, data):
        return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)

    main = struct.pack("<14I", 40_000, 0, 0, 16, n, 0, 1, 0, w, h, 0, 0, 0, 0)
    stream = b"vids" + struct.pack("<4s3I8I4H", b"", 0, 0, 0, 1, 25, 0, n, 0, 0, 0, 0, 0, 0, w, h)
    height = -h if top_down else h
    form = struct.pack("<IiiHH4sIiiII", 40, w, height, 1, 24, b"", h * row, 0, 0, 0, 0)
    stream = chunk(b"LIST", b"strl" + chunk(b"strh", stream) + chunk(b"strf", form))
    head = chunk(b"LIST", b"hdrl" + chunk(b"avih", main) + stream)
    body = chunk(b"LIST", b"movi" + b"".join(chunk(b"00dc", x.tobytes()) for x in rows))
    path.write_bytes(chunk(b"RIFF", b"AVI " + head + body))


@pytest.mark.parametrize("top_down", [True, False])
def test_uncompressed_avi_with_rows_in_either_order(tmp_path, top_down):
    """It is read in a separate process, since OpenCV may crash on rows from bottom to top."""
    frames = np.random.default_rng(0).integers(0, 256, (5, 20, 17, 3), dtype=np.uint8)
    write_plain_avi(tmp_path / "a.avi", frames, top_down)
    code = "import sys, numpy as np; from echofocus_core.video.decode import read_frames\n"
    code += "np.save(sys.argv[2], read_frames(sys.argv[1]))"
    line = [sys.executable, "-c", code, tmp_path / "a.avi", tmp_path / "a.npy"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (np.load(tmp_path / "a.npy") == frames).all()


def test_a_damaged_frame_in_an_avi(tmp_path):
    """Decoding stops there: the file is refused before half of the frames, else there is a note."""
    path = tmp_path / "a.avi"
    phantom.write_video(path, moving_square())
    data, at, starts = path.read_bytes(), 0, []
    while (at := data.find(b"00dc", max(at + 4, data.index(b"movi")), data.rindex(b"idx1"))) > 0:
        starts.append(at + 8)
    assert len(starts) == 20 == len(video.read_frames(path))
    for i, refused in ((5, True), (15, False)):
        odd = bytearray(data)
        odd[starts[i] : starts[i + 1] - 8] = bytes(starts[i + 1] - 8 - starts[i])
        path.write_bytes(odd)
        notes, message = [], f"{i} frames decode, the container declares 20"
        if refused:
            with pytest.raises(video.VideoError, match=message):
                video.read_frames(path)
        else:
            assert len(list(video.iter_frames(path, notes))) == i
            assert notes == [f"count of frames differs: {message}"]


def test_file_names_that_are_not_utf8_or_look_like_a_pattern(tmp_path):
    phantom.write_video(tmp_path / "a.avi", moving_square())
    for name in (b"caf\xe9.avi", b"%03d.avi", "e\u0301.avi".encode()):
        path = Path(os.fsdecode(bytes(tmp_path) + b"/" + name))
        shutil.copy(tmp_path / "a.avi", path)
        assert len(video.read_frames(path)) == 20


@pytest.mark.parametrize("name", ["a.avi", "a.mp4", "a.ts"])
def test_playlists_open_no_other_file(tmp_path, name):
    """A list may name a playlist, which may name any file; both are refused."""
    shutil.copy(VIDEOS / "h264.ts", tmp_path / "other.ts")
    listed = (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{tmp_path}/other.ts\n#EXT-X-ENDLIST\n"
    )
    (tmp_path / "list.m3u8").write_text(listed)
    (tmp_path / name).write_text("ffconcat version 1.0\nfile list.m3u8\n")
    for path in (tmp_path / name, tmp_path / "list.m3u8"):
        with pytest.raises(video.VideoError, match="cannot be opened as a video"):
            video.read_frames(path)


def test_sampling_is_that_of_the_published_models():
    """Start s reads frames s - 1 to s + 14, start 0 frames 0 to 15; the last frame is repeated."""
    expected = [range(16), range(16), range(1, 17), range(63, 79)]
    np.testing.assert_array_equal(video.clip_frames([0, 1, 2, 64], 80, 16), expected)
    np.testing.assert_array_equal(video.clip_frames([0], 10, 16)[0], [*range(10)] + [9] * 6)
    starts = video.clip_starts(80, 4000, 16, seed=0, key="a", method="independent")
    assert starts.min() == 0 and starts.max() == 64  # 0 .. n - 16, both ends
    assert np.bincount(starts).min() > 20  # uniform: 61 expected each
    again = video.clip_starts(80, 4000, 16, seed=0, key="a", method="independent")
    np.testing.assert_array_equal(starts, again)
    for seed, key in ((0, "b"), (1, "a")):
        assert (starts != video.clip_starts(80, 4000, 16, seed, key, "independent")).any()


def test_resize_and_crop():
    """Resizing by area ignores the aspect ratio: each output pixel is the mean of a block."""
    frame = np.random.default_rng(0).integers(0, 256, (512, 768, 3), dtype=np.uint8)
    blocks = frame.reshape(256, 2, 256, 3, 3).mean((1, 3))[16:240, 16:240]
    result = video.crop_centre(video.resize(frame))
    assert result.shape == (224, 224, 3)
    assert np.abs(result - blocks).max() <= 0.51


def test_resizing_only_the_centre_gives_the_same_numbers():
    """Its edges are between pixels or within a pixel, and frames are shrunk or enlarged."""
    rng = np.random.default_rng(0)
    sides = [(600, 800), (768, 1024), (708, 1016), (240, 320), (512, 100)]
    for height, width in [*sides, *rng.integers(200, 900, (12, 2))]:
        frame = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for size in (224, 112, 160):
            expected = video.crop_centre(video.resize(frame, size), size)
            np.testing.assert_array_equal(video.resize_centre(frame, size), expected)


def test_damage_in_frames_that_no_clip_uses_is_detected(tmp_path):
    """These frames are not decoded if there is no mask."""
    sampling = video.Sampling(n_clips=1, clip_len=4)
    (clips,) = video.read_clips(REAL, sampling)
    every = video.read_frames(REAL)
    expected = [
        video.crop_centre(video.resize(every[i]))
        for i in np.unique(clips.starts - 1 + np.arange(4))
    ]
    np.testing.assert_array_equal(clips.frames, expected)
    corrupt_frame(tmp_path / "a.dcm")
    with pytest.raises(video.VideoError, match="of 30 does not decode"):
        list(video.iter_frames(tmp_path / "a.dcm", needed=lambda n: []))


def test_a_note_if_all_frames_are_black(tmp_path):
    notes = []
    for level in (0, 90):
        frames = np.full((8, 40, 40, 3), level, np.uint8)
        phantom.write_video(tmp_path / "a.avi", frames)
        (clips,) = video.read_clips(tmp_path / "a.avi", video.Sampling(2, 4, 32))
        notes.append(clips.note)
    assert notes == ["all frames are black", ""]


def test_read_clips_keeps_each_frame_once(tmp_path):
    frames = moving_square()
    write_dicom(tmp_path / "a.dcm", np.ascontiguousarray(frames[..., ::-1]), "RGB")
    (clips,) = video.read_clips(tmp_path / "a.dcm", video.Sampling(size=56))
    assert clips.n_frames == 20 and clips.index.shape == (16, 16) and clips.starts.max() <= 4
    whole = np.stack([video.crop_centre(video.resize(f, 56), 56) for f in frames])
    numbers = video.clip_frames(clips.starts, 20, 16)
    np.testing.assert_array_equal(clips.frames[clips.index], whole[numbers])
    assert len(clips.frames) == len(np.unique(numbers))


def corrupt_frame(path):
    data = bytearray(REAL.read_bytes())
    middle = data.index(b"\xff\xd8\xff", len(data) // 2)  # a JPEG's start
    data[middle : middle + 400] = bytes(400)
    path.write_bytes(data)


def damage_frame(path):
    """600 random bytes within a JPEG with valid markers: decoders continue after them."""
    data = bytearray(REAL.read_bytes())
    end = data.index(b"\xff\xd9", len(data) // 2)
    data[end - 3000 : end - 2400] = np.random.default_rng(0).bytes(600)
    path.write_bytes(data)


ODD_FILES = {
    "small.dcm": (
        lambda p: write_dicom(p, moving_square()[:, :2, :2], "RGB"),
        "2 x 2 pixels: too small",
    ),
    "empty.dcm": (lambda p: p.touch(), "empty file"),
    "text.dcm": (lambda p: p.write_text("hello"), "not a DICOM file"),
    "text.avi": (lambda p: p.write_text("hello"), "cannot be opened as a video"),
    "hole.dcm": (corrupt_frame, "does not decode"),
    "pipe.dcm": (os.mkfifo, "not a regular file"),
    "damage.dcm": (damage_frame, "frame 13 of 30 does not decode: broken JPEG"),
    "signed.dcm": (
        lambda p: write_dicom(p, moving_square()[..., 0], "MONOCHROME2", PixelRepresentation=1),
        "signed pixel values",
    ),
    "still.dcm": (lambda p: shutil.copy(pydicom.examples.get_path("rgb_color"), p), "still image"),
    "odd.dcm": (lambda p: write_dicom(p, moving_square(), "ODD"), "unknown photometric"),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_odd_files_give_a_reason(tmp_path, name):
    make, reason = ODD_FILES[name]
    make(tmp_path / name)
    with pytest.raises(video.VideoError, match=reason):
        video.read_frames(tmp_path / name)


@pytest.mark.parametrize("code, reason", [(2, "M-mode"), (3, "spectral")])
def test_m_mode_and_spectral_are_skipped(tmp_path, code, reason):
    write_dicom(tmp_path / "a.dcm", moving_square(), "RGB", **region(79, 59, code))
    with pytest.raises(video.VideoError, match=reason):
        video.read_frames(tmp_path / "a.dcm")


def test_dicom_without_preamble(tmp_path):
    """The 128 bytes, 'DICM' and the transfer syntax are missing, and names have no ending."""
    write_dicom(tmp_path / "a.dcm", moving_square(), "RGB")
    data = (tmp_path / "a.dcm").read_bytes()
    (tmp_path / "JPEG").write_bytes(REAL.read_bytes()[132:])
    (tmp_path / "BARE").write_bytes(data[132:])
    (tmp_path / "random").write_bytes(np.random.default_rng(0).bytes(5000))
    assert studies.find_videos(tmp_path)[0] == ["BARE", "JPEG", "a.dcm"]
    expected = video.read_frames(tmp_path / "a.dcm")
    np.testing.assert_array_equal(video.read_frames(tmp_path / "BARE"), expected)
    np.testing.assert_array_equal(video.read_frames(tmp_path / "JPEG"), video.read_frames(REAL))


def test_pixel_data_without_padding(tmp_path):
    frames = moving_square(19, 21, 61)
    write_dicom(tmp_path / "a.dcm", frames[..., ::-1].copy(), "RGB")
    data = (tmp_path / "a.dcm").read_bytes()
    (tmp_path / "b.dcm").write_bytes(data[:-1])  # the number of bytes is odd
    np.testing.assert_array_equal(video.read_frames(tmp_path / "b.dcm"), frames)
    (tmp_path / "b.dcm").write_bytes(data[:-3])
    with pytest.raises(video.VideoError, match="truncated"):
        video.read_frames(tmp_path / "b.dcm")


def sector_cine(width=200, height=150, n=20):
    """A fan of changing speckle on black, and the same with a name outside the fan."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    angle, depth = np.arctan2(x - width / 2, y + 1), np.hypot(x - width / 2, y)
    fan = (abs(angle) < 0.6) & (depth < height - 5)
    frames = (rng.integers(40, 200, (n, height, width, 1)) * fan[None, :, :, None]).repeat(3, -1)
    plain = frames.astype(np.uint8)
    named = plain.copy()
    for frame in named:
        cv2.putText(frame, "DOE JANE", (2, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255))
        cv2.putText(frame, "1970", (165, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255))
    return plain, named


def region(x1, y1, code=1):
    """Tags of an ultrasound region from the first pixel to (x1, y1); code 1 is 2-D."""
    box = pydicom.Dataset()
    box.RegionSpatialFormat = code
    box.RegionLocationMinX0, box.RegionLocationMinY0 = 0, 0
    box.RegionLocationMaxX1, box.RegionLocationMaxY1 = x1, y1
    return {"SequenceOfUltrasoundRegions": [box]}


def masked_frames(path, frames, tags, mask="sector", size=224):
    """The distinct frames of the clips of these BGR frames, written as DICOM."""
    write_dicom(path, frames[..., ::-1].copy(), "RGB", **tags)
    sampling = video.Sampling(size=size, mask=mask, n_clips=99, starts="independent")
    return video.read_clips(path, sampling)[0].frames


@pytest.mark.parametrize("with_regions", [False, True])
def test_masking_removes_names_outside_the_sector(tmp_path, with_regions):
    """With --mask sector a planted name changes no pixel that the encoder sees."""
    plain, named = sector_cine()
    tags = region(199, 149) if with_regions else {}
    frames = {
        (name, mask): masked_frames(tmp_path / "a.dcm", cine, tags, mask, 112)
        for name, cine in (("plain", plain), ("named", named))
        for mask in ("none", "sector")
    }
    assert (frames["plain", "none"] != frames["named", "none"]).any()
    np.testing.assert_array_equal(frames["plain", "sector"], frames["named", "sector"])
    visible = (frames["named", "sector"] > 0).any((0, 3)).mean()
    assert visible > 0.8 * (frames["plain", "none"] > 0).any((0, 3)).mean()


@pytest.mark.parametrize("scrolls, with_regions", [(False, True), (True, False)])
def test_masking_with_an_ecg_that_touches_the_sector(tmp_path, scrolls, with_regions):
    """A thick trace crosses the bottom of the sector and grows or scrolls. Names outside the
    sector change no pixel, and 95 % of the sector is kept, with the parts that do not move."""
    H, W, n = 300, 480, 24
    fan = phantom.phantom_cine("A4C", frames=n, size=(H, W), seed=0)
    plain = fan.copy()
    x = np.arange(W)
    for i, frame in enumerate(plain):
        beat = (x + 9 * i * scrolls) % 45 / 45
        r_wave = 35 * np.exp(-(((beat - 0.3) / 0.03) ** 2))
        y = 268 - r_wave - 7 * np.exp(-(((beat - 0.6) / 0.06) ** 2))
        seen = slice(0, W if scrolls else W * (i + 1) // n)
        trace = np.stack([x, y], 1)[seen].astype(np.int32)
        cv2.polylines(frame, [trace], False, (60, 255, 60), 4)
    named = plain.copy()
    for frame in named:
        for text, at in (("DOE JANE", (5, 20)), ("1970", (5, 200)), ("MRN 4711", (390, 20)),
                         ("GP DOE", (5, 297)), ("HOSPITAL", (390, 297))):  # fmt: skip
            cv2.putText(frame, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1)
    tags = region(W - 1, H - 1) if with_regions else {}
    masked = [masked_frames(tmp_path / "a.dcm", frames, tags) for frames in (plain, named)]
    np.testing.assert_array_equal(*masked)
    truth = masked_frames(tmp_path / "a.dcm", fan, {}, "none")
    truth, visible = ((frames > 0).any((0, 3)) for frames in (truth, masked[1]))
    assert (visible & truth).sum() > 0.95 * truth.sum()


def test_masking_the_real_cine():
    """Its regions are outside the image (it was shrunk), so the motion decides."""
    plain = video.read_clips(REAL, video.Sampling())[0].frames
    masked = video.read_clips(REAL, video.Sampling(mask="sector"))[0].frames
    inside = (masked > 0).any((0, 3))
    np.testing.assert_array_equal(masked[:, inside], plain[:, inside])
    assert 0.3 < inside.mean() < 0.95


@pytest.mark.parametrize("boxes", [[(2, 2, 77, 59), (82, 2, 157, 59)], []])
def test_masking_keeps_every_sector(tmp_path, boxes):
    """At least 0.9 of the moving pixels of each of two sectors are kept."""
    rng, frames = np.random.default_rng(0), np.zeros((12, 60, 160, 3), np.uint8)
    y, x = np.mgrid[:58, :76]
    fan = (np.abs(x - 38) < 4 + 0.6 * y)[..., None]
    for left in (2, 82):
        frames[:, 2:60, left : left + 76] = rng.integers(20, 220, (12, 58, 76, 1)) * fan
    write_cine(tmp_path / "a.dcm", frames, regions=boxes)
    plain, masked = (
        video.read_clips(tmp_path / "a.dcm", video.Sampling(mask=mask))[0]
        for mask in ("none", "sector")
    )
    assert masked.note.startswith("mask: 9")
    moving, kept = ((np.ptp(c.frames.max(3), 0) > 12) for c in (plain, masked))
    for half in (slice(0, 112), slice(112, None)):
        assert kept[:, half].sum() > 0.9 * moving[:, half].sum()


def test_a_mask_that_removes_much_has_a_note(tmp_path):
    frames, _ = sector_cine()
    write_dicom(tmp_path / "a.dcm", frames, "RGB", **region(80, 149))
    (clips,) = video.read_clips(tmp_path / "a.dcm", video.Sampling(mask="sector"))
    assert clips.note.startswith(video.TOO_MUCH)


def test_a_still_scene_cannot_be_masked(tmp_path):
    still = np.repeat(moving_square(1), 20, axis=0)
    write_dicom(tmp_path / "a.dcm", still, "RGB")
    with pytest.raises(video.VideoError, match="nothing moves"):
        video.read_clips(tmp_path / "a.dcm", video.Sampling(mask="sector"))


def test_transformed_copies_differ_and_are_reproducible():
    sampling = video.Sampling(n_clips=2, size=56, augment=2)
    copies = video.read_clips(REAL, sampling)
    assert len(copies) == 3
    for a, b in zip(copies, video.read_clips(REAL, sampling), strict=True):
        np.testing.assert_array_equal(a.frames, b.frames)
    first, second = (c.frames[c.index] for c in copies[1:])
    assert first.shape == (2, 16, 56, 56, 3) and (first != second).any()


def test_range_of_the_random_transform():
    """Half of the draws are flipped, angles are at most 15 degrees, the centre stays in view."""
    frame = np.zeros((64, 64, 3), np.uint8)
    frame[28:36, 20:44, :2], frame[28:36, 20:44, 2] = 90, 200  # a bar, 24 wide and 8 high
    frame[28:36, 40:44] = 255  # with a bright right end
    flips, angles = 0, []
    for seed in range(200):
        out = video.random_transform([frame], 56, np.random.default_rng(seed))[0, :, :, 0]
        (y, x), (by, bx) = (np.argwhere(out > level).mean(0) for level in (50, 250))
        flips += bx < x
        dy, dx = (by - y) * np.sign(bx - x), abs(bx - x)
        angles.append(np.degrees(np.arctan2(dy, dx)))
    assert 70 < flips < 130
    assert 12 < max(np.abs(angles)) < 19  # pixels are coarse


@pytest.mark.parametrize(
    "fault, is_temporary",
    [
        (OSError(28, "No space left on device"), True),
        (MemoryError(), True),
        (OSError("broken data stream"), False),
    ],
)
def test_a_file_is_read_again_after_the_machine_ran_out_of_space(monkeypatch, fault, is_temporary):
    """Faults of the file itself are permanent."""

    def fail(*_):
        raise fault

    monkeypatch.setattr("echofocus_core.video.codecs.decode_jpeg", fail)
    reply = video.answer(video.read_frames, [Path(REAL)])
    assert isinstance(reply, video.VideoError)
    assert isinstance(reply, video.NotNow) == is_temporary
