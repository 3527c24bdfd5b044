"""DICOM files with wrong headers are read correctly, or refused with a reason."""

import io
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from helpers import FIXTURES, ROOT, moving_square, write_dicom
from PIL import Image
from pydicom.encaps import encapsulate, generate_frames

from echofocus_core.video import decode as video
from echofocus_core.video import dicom, phantom
from echofocus_core.video.errors import FRAMES

CASES, VIDEOS = FIXTURES / "dicom", FIXTURES / "videos"
TRUTH = np.load(CASES / "truth.npz")["frames"]  # uint8 (6, 120, 160, 3) RGB
GREY = np.ascontiguousarray(TRUTH[..., 0])
ADOBE, JFIF = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0", b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
COLOURS = ("Red", "Green", "Blue")
JPEG, JPEG_2000 = pydicom.uid.JPEGBaseline8Bit, pydicom.uid.JPEG2000Lossless


def read(path):
    """(frames as RGB integers, notes)."""
    notes = []
    frames = np.stack(list(video.iter_frames(path, notes)))
    return frames[..., ::-1].astype(int), "; ".join(notes)


def error_of(path, truth=TRUTH):
    """(mean difference to the true frames in grey levels, notes)."""
    frames, notes = read(path)
    assert frames.shape[:3] == truth.shape[:3]
    return np.abs(frames - truth.astype(int)).mean(), notes


def refusal(path):
    """The reason why a file is refused."""
    with pytest.raises(video.VideoError) as error:
        read(path)
    return str(error.value)


def write_coded(path, coded, syntax, photometric, like=TRUTH, **tags):
    """A DICOM of coded frames; a frame is bytes, or a list of the fragments it is split into."""
    dataset = write_dicom(path, like, photometric, **tags)
    dataset.file_meta.TransferSyntaxUID = syntax
    pieces = [p for frame in coded for p in (frame if isinstance(frame, list) else [frame])]
    dataset.PixelData = encapsulate([p + b"\0" * (len(p) % 2) for p in pieces], has_bot=False)
    dataset["PixelData"].VR = "OB"
    dataset.save_as(path, enforce_file_format=True)
    return path


def save(dataset, path, syntax):
    names = {"big": "ExplicitVRBigEndian", "implicit": "ImplicitVRLittleEndian"}
    if syntax in names:
        dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, names[syntax])
    dataset.preamble = bytes(128)
    encoding = {"implicit_vr": syntax == "implicit", "little_endian": syntax != "big"}
    pydicom.dcmwrite(path, dataset, force_encoding=True, **encoding)


def jpeg_of(frame, components):
    """A JPEG of RGB or YCbCr components without a marker of the colour space."""
    file, options = io.BytesIO(), {"keep_rgb": True} if components == "RGB" else {}
    Image.fromarray(frame).save(file, "JPEG", quality=95, subsampling=0, **options)
    data = file.getvalue()
    return data[:2] + data[4 + int.from_bytes(data[4:6], "big") :]


def j2k_of(frame, transform=True):
    file = io.BytesIO()
    options = {"mct": int(transform)} if frame.ndim == 3 else {}
    Image.fromarray(frame).save(file, "JPEG2000", no_jp2=True, **options)
    return file.getvalue()


def ybr(frames):
    """RGB (n, H, W, 3) or (H, W, 3) as YCbCr of full range."""
    if frames.ndim == 4:
        return np.stack([ybr(frame) for frame in frames])
    return cv2.cvtColor(frames, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]


# ------------------------------------------------------------------------------------------ colours


@pytest.mark.parametrize(
    "name, limit, noted",
    [
        ("jpeg_ybr_labelled_rgb", 3, True),
        ("native_rgb_labelled_ybr422", 0, True),
        ("native_ybr422_true", 1, False),
        ("j2k_mct_labelled_ybr422", 1, True),
        ("palette16_of_8_bits", 0, False),
        ("deflated", 0, False),
    ],
)
def test_wrong_colour_labels(name, limit, noted):
    truth = TRUTH[..., :1] if name.startswith("palette") else TRUTH
    error, notes = error_of(CASES / f"{name}.dcm", truth)
    assert error <= limit and ("read as" in notes) == noted


@pytest.mark.parametrize(
    "stored, mark, label",
    [
        ("RGB", JFIF, "YBR_FULL"),
        ("RGB", ADOBE + b"\0", "YBR_FULL_422"),
        ("RGB", ADOBE + b"\1", "RGB"),
        ("YCbCr", b"", "YBR_FULL_422"),
        ("YCbCr", JFIF, "RGB"),
        ("YCbCr", ADOBE + b"\0", "YBR_FULL"),
    ],
)
def test_jpeg_of_any_components_label_and_mark(tmp_path, stored, mark, label):
    jpegs = [jpeg_of(frame, stored) for frame in TRUTH]
    coded = [data[:2] + mark + data[2:] for data in jpegs]
    error, notes = error_of(write_coded(tmp_path / "a", coded, JPEG, label))
    assert error < 1.5
    assert ("read as" in notes) == ((stored == "RGB") != (label == "RGB"))


@pytest.mark.parametrize(
    "stored, label",
    [
        ("RGB", "YBR_RCT"),
        ("transformed", "YBR_FULL"),
        ("YCbCr", "YBR_ICT"),
        ("YCbCr", "YBR_FULL"),
    ],
)
def test_jpeg_2000_of_any_components_and_label(tmp_path, stored, label):
    frames = ybr(TRUTH) if stored == "YCbCr" else TRUTH
    coded = [j2k_of(frame, stored == "transformed") for frame in frames]
    error, notes = error_of(write_coded(tmp_path / "a", coded, JPEG_2000, label))
    assert error < 1
    assert ("read as" in notes) == ((stored == "YCbCr") != (label == "YBR_FULL"))


@pytest.mark.parametrize(
    "stored, label, planar, syntax",
    [
        ("RGB", "RGB", 0, "big"),
        ("RGB", "YBR_FULL", 1, "implicit"),
        ("RGB", "YBR_FULL", 0, "rle"),
        ("YCbCr", "RGB", 0, "little"),
        ("YCbCr", "RGB", 1, "rle"),
        ("YCbCr", "YBR_FULL", 1, "big"),
    ],
)
def test_uncompressed_and_rle(tmp_path, stored, label, planar, syntax):
    frames = TRUTH if stored == "RGB" else ybr(TRUTH)
    dataset = write_dicom(tmp_path / "a", frames, label)
    if syntax == "rle":
        dataset.compress(pydicom.uid.RLELossless)
    elif planar:
        dataset.PixelData = np.moveaxis(frames, 3, 1).tobytes()
    dataset.PlanarConfiguration = planar
    save(dataset, tmp_path / "a", syntax)
    error, notes = error_of(tmp_path / "a")
    assert error < 1
    assert ("read as" in notes) == ((stored == "RGB") != (label == "RGB"))


@pytest.mark.parametrize("stored", ["RGB", "YCbCr"])
def test_blank_frames_do_not_determine_the_colours(tmp_path, stored):
    """The first, middle and last frames are black; the others decide."""
    frames = TRUTH.copy()
    frames[[0, 3, 5]] = 0
    coded = [jpeg_of(frame, stored) for frame in frames]
    assert error_of(write_coded(tmp_path / "a", coded, JPEG, "RGB"), frames)[0] < 1.5
    deep = frames[..., 0].astype(np.uint16) << 4
    write_dicom(tmp_path / "b", deep, "MONOCHROME2", BitsStored=12)
    assert error_of(tmp_path / "b", frames[..., :1]) == (0, "")


@pytest.mark.parametrize("bits, shift", [(16, 8), (16, 0), (8, 0)])
def test_palettes(tmp_path, bits, shift):
    values, palette = np.arange(256), {}
    tints = {"Red": values, "Green": values * 3 // 4, "Blue": values // 2}
    for colour, table in tints.items():
        palette[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        data = (table << shift).astype(f"<u{bits // 8}").tobytes()
        palette[f"{colour}PaletteColorLookupTableData"] = data
    dataset = write_dicom(tmp_path / "a", GREY, "PALETTE COLOR", **palette)
    truth = np.stack([t[GREY] for t in tints.values()], axis=-1)
    assert error_of(tmp_path / "a", truth)[0] == 0
    save(dataset, tmp_path / "a", "big")
    assert "palette" in refusal(tmp_path / "a")


@pytest.mark.parametrize(
    "part, label, tint",
    [
        ("within", "YBR_FULL", (1, 0.75, 0.45)),
        ("whole", "YBR_FULL", (1, 0.55, 0.15)),
        ("within", "RGB", (0.45, 0.7, 1)),
        ("whole", "RGB", (0.3, 1, 0.4)),
    ],
)
def test_tinted_greyscale_is_not_changed(tmp_path, part, label, tint):
    """Sepia, blue and green maps are kept, also of only the tissue."""
    frames = TRUTH[:, 40:80, 50:100] if part == "within" else TRUTH
    frames = (frames.max(-1, keepdims=True) * np.array(tint)).astype(np.uint8)
    write_dicom(tmp_path / "a", ybr(frames) if label == "YBR_FULL" else frames, label)
    error, notes = error_of(tmp_path / "a", frames)
    assert error < 1 and notes == ""


@pytest.mark.parametrize("name", ["rgb_color", "palette_color", "jpeg2k"])
def test_real_ultrasound_is_read_as_pydicom_reads_it(tmp_path, name):
    dataset = getattr(pydicom.examples, name)
    dataset.NumberOfFrames = 3  # the same still three times
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        (still,) = generate_frames(dataset.PixelData, number_of_frames=1)
        dataset.PixelData = encapsulate([still] * 3)
    else:
        dataset.PixelData = dataset.PixelData * 3
    dataset.save_as(tmp_path / "a")
    expected = next(pydicom.pixels.iter_pixels(tmp_path / "a"))
    if name == "palette_color":
        expected = pydicom.pixels.apply_color_lut(expected, dataset) >> 8
    frames, notes = read(tmp_path / "a")
    assert len(frames) == 3 and notes == "" and np.abs(frames[0] - expected).max() <= 2


def test_colour_doppler_and_an_ecg_are_not_changed(tmp_path):
    for view in ("A4C", "PSAX"):
        frames = phantom.phantom_cine(view, frames=6, shows_defect=True, seed=5)
        frames[:, 100:104, :, :] = (0, 255, 0)  # a bright green trace
        write_dicom(tmp_path / "a", frames[..., ::-1].copy(), "RGB")
        error, notes = error_of(tmp_path / "a", frames[..., ::-1])
        assert error == 0 and notes == ""


def test_noise_and_black_frames_are_refused(tmp_path):
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)], np.uint8)
    noise = colours[np.random.default_rng(0).integers(0, 4, (4, 40, 40))]
    write_dicom(tmp_path / "a", noise, "RGB")
    write_dicom(tmp_path / "b", np.zeros((4, 40, 40, 3), np.uint8), "RGB")
    assert "false colour" in refusal(tmp_path / "a")
    assert "all frames are black" in refusal(tmp_path / "b")


# ------------------------------------------------------------------------------- layout and numbers


def chroma_422(frames):
    """RGB frames as uncompressed 4:2:2."""
    y, b, r = np.moveaxis(ybr(frames), 3, 0)
    return np.stack([y[:, :, ::2], y[:, :, 1::2], b[:, :, ::2], r[:, :, ::2]], -1)


DEEP = GREY.astype(np.uint16) << 4
KINDS = {
    "RGB": lambda p: write_dicom(p, TRUTH, "RGB"),
    "planar": lambda p: write_dicom(p, TRUTH, "RGB", PlanarConfiguration=1,
                                    PixelData=np.moveaxis(TRUTH, 3, 1).tobytes()),
    "4:2:2": lambda p: write_dicom(p, TRUTH, "YBR_FULL_422", PixelData=chroma_422(TRUTH).tobytes()),
    "RGB as 4:2:2": lambda p: write_dicom(p, TRUTH, "YBR_FULL_422"),
    "deep": lambda p: write_dicom(p, DEEP, "MONOCHROME2", BitsStored=12),
    "RLE": lambda p: compress(write_dicom(p, TRUTH, "RGB"), p),
    "deep RLE": lambda p: compress(write_dicom(p, DEEP, "MONOCHROME2", BitsStored=12), p),
    "JPEG": lambda p: write_coded(p, [jpeg_of(f, "YCbCr") for f in TRUTH], JPEG, "YBR_FULL"),
    "JPEG 2000": lambda p: write_coded(p, [j2k_of(f) for f in TRUTH], JPEG_2000, "YBR_RCT"),
    "deep JPEG 2000": lambda p: write_coded(p, [j2k_of(f) for f in DEEP], JPEG_2000, "MONOCHROME2",
                                            like=DEEP, BitsStored=12),
}  # fmt: skip
WRONG = {
    "Rows": (119, 121, 60, 80, 180, 240, 160, 360, 40),
    "Columns": (159, 161, 80, 106, 240, 320, 120, 480, 53),
    "NumberOfFrames": (1, 5, 7, 12, 3, 18, 2, 9, 4),
    "BitsAllocated": (8, 16, 32),
    "BitsStored": (7, 8, 10, 13, 16),
    "HighBit": (6, 7, 12, 15),
    "SamplesPerPixel": (1, 3, 4),
    "PlanarConfiguration": (0, 1),
    "PixelRepresentation": (1,),
}


def compress(dataset, path):
    dataset.compress(pydicom.uid.RLELossless)
    dataset.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("kind", KINDS)
def test_any_one_wrong_number_is_refused_or_harmless(tmp_path, kind):
    """The frames are the true ones, or the file is refused."""
    path, truth = tmp_path / "a", TRUTH[..., :1] if kind.startswith("deep") else TRUTH
    KINDS[kind](path)
    assert error_of(path, truth)[0] < 1.5
    dataset, refused = pydicom.dcmread(path), 0
    for tag, values in WRONG.items():
        right = dataset[tag].value if tag in dataset else None
        for value in set(values) - {right}:
            dataset[tag] = pydicom.DataElement(
                tag, "IS" if tag == "NumberOfFrames" else "US", value
            )
            dataset.save_as(path, enforce_file_format=True)
            try:
                error, _ = error_of(path, truth)
                assert error < 1.5, (tag, value)
            except video.VideoError:
                refused += 1
        if right is None:
            del dataset[tag]
        else:
            dataset[tag].value = right
    assert refused > 10


@pytest.mark.parametrize("kind", ["RGB", "deep RLE"])
def test_exchanged_rows_and_columns_are_refused(tmp_path, kind):
    KINDS[kind](tmp_path / "a")
    dataset = pydicom.dcmread(tmp_path / "a")
    dataset.Rows, dataset.Columns = 160, 120
    dataset.save_as(tmp_path / "a", enforce_file_format=True)
    assert "Rows and Columns" in refusal(tmp_path / "a")


@pytest.mark.parametrize("planar", [0, 1])
def test_wrong_planar_configuration_of_a_real_echo_is_refused(tmp_path, planar):
    frames = np.stack([pydicom.examples.rgb_color.pixel_array] * 2)
    data = (np.moveaxis(frames, 3, 1) if planar else frames).tobytes()
    tags = {"PixelData": data, "PlanarConfiguration": planar}
    dataset = write_dicom(tmp_path / "a", frames, "RGB", **tags)
    assert error_of(tmp_path / "a", frames) == (0, "")
    dataset.PlanarConfiguration = 1 - planar
    dataset.save_as(tmp_path / "a", enforce_file_format=True)
    assert "the header is wrong" in refusal(tmp_path / "a")


@pytest.mark.parametrize("big_endian", [False, True])
def test_grey_of_any_depth(tmp_path, big_endian):
    """Values of 8, 12 and 16 bits are read in both byte orders; another depth is refused."""
    for shift, stored in ((4, 12), (8, 16), (0, 8), (0, 12), (4, 10)):
        dataset = write_dicom(tmp_path / "a", GREY.astype(np.uint16) << shift, "MONOCHROME2")
        dataset.BitsStored, dataset.HighBit = stored, stored - 1
        if big_endian:
            dataset.PixelData = (GREY.astype(">u2") << shift).astype(">u2").tobytes()
        save(dataset, tmp_path / "a", "big" if big_endian else "little")
        if stored == shift + 8:
            assert error_of(tmp_path / "a", GREY[..., None]) == (0, "")
        else:
            assert f"the header declares {stored}" in refusal(tmp_path / "a")


def test_exchanged_bytes_and_high_bits_are_refused(tmp_path):
    write_dicom(tmp_path / "a", DEEP.byteswap(), "MONOCHROME2")
    assert "byte order" in refusal(tmp_path / "a")
    overlay = DEEP.copy()
    overlay[4, 10:12, 10:60] |= 1 << 15  # in no frame that is judged beforehand
    write_dicom(tmp_path / "b", overlay, "MONOCHROME2", BitsStored=12)
    assert "12 bits" in refusal(tmp_path / "b")


def test_frames_in_several_fragments_are_counted(tmp_path):
    path, coded = tmp_path / "a", [jpeg_of(frame, "YCbCr") for frame in TRUTH]
    write_coded(path, [[c[:1000], c[1000:2000], c[2000:]] for c in coded], JPEG, "YBR_FULL")
    dataset = pydicom.dcmread(path)
    dataset.NumberOfFrames = 12
    dataset.save_as(path, enforce_file_format=True)
    assert "truncated: 6 of 12 frames" in refusal(path)
    dataset.NumberOfFrames = 2
    dataset.save_as(path, enforce_file_format=True)
    error, notes = error_of(path)
    assert error < 1.5 and "NumberOfFrames is wrong: 6" in notes


@pytest.mark.parametrize("kind", ["RGB", "JPEG", "JPEG 2000", "RLE"])
def test_truncated_files_are_refused(tmp_path, kind):
    KINDS[kind](tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    for keep in (len(data) - 10, int(0.95 * len(data)), len(data) // 2):
        (tmp_path / "cut").write_bytes(data[:keep])
        reason = refusal(tmp_path / "cut")
        assert "truncated" in reason or "unreadable DICOM header" in reason


# -------------------------------------------------------------------------------- kinds of objects


@pytest.mark.parametrize(
    "sop_class, modality, reason",
    [("2.1", "US", "Enhanced CT Image"), ("3.1", "XA", "XA"), ("6.2", "US", "Enhanced US Volume")],
)
def test_other_modalities_and_volumes_are_skipped(tmp_path, sop_class, modality, reason):
    sop_class = f"1.2.840.10008.5.1.4.1.1.{sop_class}"
    write_dicom(tmp_path / "a", TRUTH, "RGB", SOPClassUID=sop_class, Modality=modality)
    assert refusal(tmp_path / "a") == f"not an ultrasound cine: {reason}"
    assert reason in video.why_skipped(tmp_path / "a")


def test_secondary_captures_and_private_classes_are_read_with_a_note(tmp_path):
    for sop_class, modality in (("1.2.840.10008.5.1.4.1.1.7.4", "OT"), ("1.2.3.4", "SMITH")):
        write_dicom(tmp_path / "a", TRUTH, "RGB", SOPClassUID=sop_class, Modality=modality)
        notes = read(tmp_path / "a")[1]
        assert notes and "SMITH" not in notes


@pytest.mark.parametrize(
    "syntax, name",
    [("100.1", "mpeg2.m2v"), ("102", "h264.mp4"), ("103", "h264.ts"), ("108", "hevc.mp4")],
)
def test_video_streams_in_dicom(tmp_path, monkeypatch, syntax, name):
    """The temporary copy has no file name, so that a killed reader leaves no pixels on disk."""
    (tmp_path / "copies").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "copies"))
    data, square = (VIDEOS / name).read_bytes(), moving_square(24, 48, 64)[..., ::-1]
    pieces = [data[:1000], data[1000:]] if syntax.endswith(".1") else data
    for declared in (24, 3):
        path = write_coded(
            tmp_path / "a", [pieces], f"1.2.840.10008.1.2.4.{syntax}", "YBR_PARTIAL_420",
            like=square, NumberOfFrames=declared,
        )  # fmt: skip
        error, notes = error_of(path, square)
        assert error < 3
        assert ("24 frames decode" in notes) == (declared == 3)
    assert video.why_skipped(path) == ""
    if Path("/proc/self/fd").is_dir():  # Linux has files without a name
        frames = video.iter_frames(path)
        assert next(frames).shape == (48, 64, 3)
        assert not list((tmp_path / "copies").iterdir())


# -------------------------------------------------------------------------- series of single frames


def write_series(folder, frames, **tags):
    """Single frames of one series, file names in reverse order; returns their paths in order."""
    folder.mkdir(parents=True, exist_ok=True)
    series = tags.pop("SeriesInstanceUID", pydicom.uid.generate_uid())
    paths = [folder / f"IM{len(frames) - i:04}" for i in range(len(frames))]
    for i, path in enumerate(paths):
        dataset = write_dicom(
            path, frames[i : i + 1, ..., ::-1].copy(), "RGB", StudyInstanceUID="1.2.3",
            SeriesInstanceUID=series, InstanceNumber=i + 1,
            SOPInstanceUID=pydicom.uid.generate_uid(), **tags,
        )  # fmt: skip
        del dataset.NumberOfFrames
        dataset.save_as(path, enforce_file_format=True)
    return paths


def group(folder):
    files = [p for p in sorted(Path(folder).rglob("*")) if p.is_file()]
    facts = {p.relative_to(folder).as_posix(): dicom.read_header_facts(p) for p in files}
    return dicom.group_stills(facts)


def test_single_frames_of_a_series_are_one_cine(tmp_path):
    frames = np.random.default_rng(0).integers(0, 60, (60, 80, 1), dtype=np.uint8)
    frames = np.maximum(moving_square(), frames)
    paths = write_series(tmp_path / "cine", frames, SeriesInstanceUID="1.2.34567")
    ((name, files),) = group(tmp_path).items()
    assert name.startswith("cine/series-") and "34567" not in name
    assert files == [p.relative_to(tmp_path).as_posix() for p in paths]
    (clips,) = video.read_clips(paths, video.Sampling(size=56))
    assert clips.n_frames == 20 and clips.note == "single frames of one series: 20"
    np.testing.assert_array_equal(video.read_frames(paths), frames)
    assert "still image" in refusal(paths[0])
    masked = video.read_clips(paths, video.Sampling(size=56, mask="sector"))
    assert masked[0].frames.shape == clips.frames.shape


def test_stills_are_not_read_as_a_cine(tmp_path):
    """They are in separate series, in a series with a cine, or in one series of equal headers."""
    stills = [
        phantom.phantom_cine(v, frames=2, seed=s)[:1] for s in range(3) for v in phantom.VIEWS
    ]
    for i, still in enumerate(stills):
        write_series(tmp_path / "apart" / str(i), still)
    assert group(tmp_path / "apart") == {}
    write_series(tmp_path / "mixed", np.concatenate(stills), SeriesInstanceUID="1.2.9")
    write_dicom(tmp_path / "mixed" / "cine", TRUTH, "RGB", StudyInstanceUID="1.2.3",
                SeriesInstanceUID="1.2.9", InstanceNumber=50)  # fmt: skip
    assert group(tmp_path / "mixed") == {}
    paths = write_series(tmp_path / "one", np.concatenate(stills))
    assert len(group(tmp_path / "one")) == 1  # by their headers
    assert "still images of one series: 12" in refusal(paths)


@pytest.mark.parametrize("differ", [False, True])
def test_a_series_of_images_of_different_depth_is_refused(tmp_path, differ):
    paths = [tmp_path / str(i) for i in range(12)]
    for i, frame in enumerate(np.concatenate([GREY, GREY])):
        shift = 4 * (i % 2) if differ else 0
        stored = frame[None].astype(np.uint16) << shift
        write_dicom(paths[i], stored, "MONOCHROME2", InstanceNumber=i + 1, BitsStored=8 + shift)
    if differ:
        assert "images in different formats" in refusal(paths)
    else:
        assert len(read(paths)[0]) == 12


def test_header_facts_of_odd_files(tmp_path):
    """Reading them neither fails nor waits, and gives no text with control characters."""
    (tmp_path / "text").write_text("hello")
    os.mkfifo(tmp_path / "pipe.dcm")
    for name in ("text", "pipe.dcm", "gone"):
        assert dicom.read_header_facts(tmp_path / name) == dicom.HeaderFacts()
    with pydicom.config.disable_value_validation():
        write_dicom(tmp_path / "odd", TRUTH, "RGB", StudyInstanceUID="1.2\x1b[31m")
    facts = dicom.read_header_facts(tmp_path / "odd")
    assert facts.study_uid == "" and facts.bad_uid and facts.rows == 120


# ---------------------------------------------------------------------------------- damaged files


def test_too_large_and_too_many_frames_are_refused(tmp_path):
    """Frames of 12,000 x 12,000 pixels are refused by the header or by the JPEG 2000 stream."""
    write_dicom(tmp_path / "size", TRUTH, "RGB", Rows=12_000, Columns=12_000)
    vast = bytearray(j2k_of(TRUTH[0]))
    vast[8:16] = struct.pack(">II", 12_000, 12_000)
    write_coded(tmp_path / "j2k", [bytes(vast)] * 6, JPEG_2000, "RGB")
    many = np.zeros((FRAMES + 1, 1, 1), np.uint8)
    write_dicom(tmp_path / "many", many, "MONOCHROME2")
    for name in ("size", "j2k", "many"):
        assert "more than" in refusal(tmp_path / name)


def test_no_value_of_a_header_is_printed(tmp_path):
    """Warnings of pydicom, which quote values, are not shown."""
    mark = "SMITH^J"
    tags = dict.fromkeys(("StudyInstanceUID", "Modality", "PatientName", "SOPClassUID"), mark)
    with pydicom.config.disable_value_validation():
        write_dicom(tmp_path / "a.dcm", moving_square(6), mark, ImageType=[mark] * 3, **tags)
    data = (tmp_path / "a.dcm").read_bytes()
    at = data.index(b"\x28\0\x08\0IS") + 8
    (tmp_path / "b.dcm").write_bytes(data[:at] + b"SM" + data[at + 2 :])
    (tmp_path / "c.dcm").write_bytes(data[:300] + data[301:])
    (tmp_path / "d.dcm").write_bytes(data.replace(b"SMITH^J ", b"SMITH^\0\x1b", 2))
    script = (
        "import logging, sys; logging.basicConfig()\n"
        "from echofocus_core.video import decode as video, dicom\n"
        "for p in sys.argv[1:]: print(video.why_skipped(p)); dicom.read_header_facts(p)"
    )
    line = [sys.executable, "-c", script, *map(str, sorted(tmp_path.glob("*.dcm")))]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == ""
    assert "SMITH" not in done.stdout and "unknown photometric" in done.stdout
