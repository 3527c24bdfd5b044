"""DICOM files that say other things than they hold: read right, or refused for what they are."""

import contextlib
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
from helpers import moving_square, write_dicom
from PIL import Image
from pydicom.encaps import encapsulate, generate_frames

from echofocus_core.video import colour as pixels
from echofocus_core.video import decode as video
from echofocus_core.video import dicom, phantom, studies
from echofocus_core.video import errors as source

ROOT = Path(__file__).parent.parent
CASES = Path(__file__).parent / "fixtures" / "dicom"
VIDEOS = CASES.parent / "videos"
TRUTH = np.load(CASES / "truth.npz")["frames"]  # uint8 (6, 120, 160, 3) RGB
ADOBE, JFIF = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0", b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"


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


def test_large_private_elements_are_read_over(tmp_path):
    """Within a sequence of undefined length too, where pydicom reads every value."""
    dataset = write_dicom(tmp_path / "a.dcm", TRUTH, "RGB", StudyInstanceUID="1.2.3")
    item = pydicom.Dataset()
    item.add_new(0x00091002, "OB", bytes(12 << 20))
    dataset.private_block(0x0009, "VENDOR", create=True).add_new(1, "SQ", [item])
    dataset[0x00091001].is_undefined_length = item.is_undefined_length_sequence_item = True
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert error_of(tmp_path / "a.dcm")[0] < 1
    assert dicom.read_header_facts(tmp_path / "a.dcm").study_uid == "1.2.3"


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
    how = {"implicit_vr": syntax == "implicit", "little_endian": syntax != "big"}
    pydicom.dcmwrite(path, dataset, force_encoding=True, **how)


def jpeg_of(frame, components):
    """A JPEG of RGB or YCbCr components without a mark that says which."""
    file, options = io.BytesIO(), {"keep_rgb": True} if components == "RGB" else {}
    Image.fromarray(frame).save(file, "JPEG", quality=95, subsampling=0, **options)
    data = file.getvalue()
    return data[:2] + data[4 + int.from_bytes(data[4:6], "big") :]


def ybr(frame):
    return cv2.cvtColor(frame, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]


# ------------------------------------------------------------------------------------------ colours


@pytest.mark.parametrize(
    "name, limit, note",
    [
        ("jpeg_ybr_labelled_rgb", 3, "read as YCbCr"),
        ("native_rgb_labelled_ybr422", 0, "read as RGB"),
        ("native_ybr422_true", 1, ""),
        ("j2k_mct_labelled_ybr422", 1, "read as RGB"),
        ("palette16_of_8_bits", 0, "palette of 8 bits"),
        ("deflated", 0, ""),
    ],
)
def test_what_the_header_says_wrongly(name, limit, note):
    truth = TRUTH[..., :1] if name.startswith("palette") else TRUTH
    error, notes = error_of(CASES / f"{name}.dcm", truth)
    assert error <= limit
    assert note in notes and bool(note) == bool(notes)


@pytest.mark.parametrize("label", ["RGB", "YBR_FULL", "YBR_FULL_422"])
@pytest.mark.parametrize("mark", [b"", JFIF, ADOBE + b"\0", ADOBE + b"\1"])
@pytest.mark.parametrize("stored", ["RGB", "YCbCr"])
def test_jpeg_of_any_components_label_and_mark(tmp_path, stored, mark, label):
    jpegs = [jpeg_of(frame, stored) for frame in TRUTH]
    coded = [data[:2] + mark + data[2:] for data in jpegs]
    path = write_coded(tmp_path / "a", coded, pydicom.uid.JPEGBaseline8Bit, label)
    error, notes = error_of(path)
    assert error < 1.5
    assert ("read as" in notes) == ((stored == "RGB") != (label == "RGB"))


@pytest.mark.parametrize("label", ["RGB", "YBR_FULL", "YBR_RCT", "YBR_ICT"])
@pytest.mark.parametrize("stored", ["RGB", "transformed", "YCbCr"])
def test_jpeg_2000_of_any_components_and_label(tmp_path, stored, label):
    coded = []
    for frame in TRUTH:
        file = io.BytesIO()
        image = Image.fromarray(ybr(frame) if stored == "YCbCr" else frame)
        image.save(file, "JPEG2000", no_jp2=True, mct=int(stored == "transformed"))
        coded.append(file.getvalue())
    path = write_coded(tmp_path / "a", coded, pydicom.uid.JPEG2000Lossless, label)
    error, notes = error_of(path)
    assert error < 1
    assert ("read as" in notes) == ((stored == "YCbCr") != (label == "YBR_FULL"))


@pytest.mark.parametrize("syntax", ["little", "big", "implicit", "rle"])
@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("label", ["RGB", "YBR_FULL"])
@pytest.mark.parametrize("stored", ["RGB", "YCbCr"])
def test_uncompressed_and_rle(tmp_path, stored, label, planar, syntax):
    frames = TRUTH if stored == "RGB" else np.stack([ybr(f) for f in TRUTH])
    path = tmp_path / "a"
    dataset = write_dicom(path, frames, label)
    if syntax == "rle":
        dataset.compress(pydicom.uid.RLELossless)
    elif planar:
        dataset.PixelData = np.moveaxis(frames, 3, 1).tobytes()
    dataset.PlanarConfiguration = planar
    save(dataset, path, syntax)
    error, notes = error_of(path)
    assert error < 1
    assert ("read as" in notes) == ((stored == "RGB") != (label == "RGB"))


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize(
    "shift, stored",
    [(0, 16), (0, 12), (0, 10), (2, 12), (2, 16), (4, 12), (4, 16), (6, 16), (8, 16), (4, 8)],
)
def test_grey_of_any_depth_and_claim(tmp_path, shift, stored, big_endian):
    """The bits that are used decide: 8 in 16, 12 in 16, more than claimed; either byte order."""
    grey = TRUTH[..., 0]
    assert grey.max() >= 128
    dataset = write_dicom(tmp_path / "a", grey.astype(np.uint16) << shift, "MONOCHROME2")
    dataset.BitsStored, dataset.HighBit = stored, stored - 1
    if big_endian:
        dataset.PixelData = (grey.astype(">u2") << shift).astype(">u2").tobytes()
    save(dataset, tmp_path / "a", "big" if big_endian else "little")
    error, notes = error_of(tmp_path / "a", grey[..., None])
    assert error == 0
    assert ("bits" in notes) == (stored != shift + 8)


@pytest.mark.parametrize("syntax", ["little", "big"])
@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("label", ["RGB", "YBR_FULL"])
@pytest.mark.parametrize("scene", ["speckle", "echo", "phantom"])
def test_planar_configuration_that_is_wrong(tmp_path, scene, label, planar, syntax):
    frames = {
        "speckle": lambda: TRUTH,
        "echo": lambda: np.stack([pydicom.examples.rgb_color.pixel_array] * 2),
        "phantom": lambda: phantom.phantom_cine("A4C", 3, True, seed=5)[..., ::-1],
    }[scene]()
    stored = frames if label == "RGB" else np.stack([ybr(f) for f in frames])
    dataset = write_dicom(tmp_path / "a", np.ascontiguousarray(stored), label)
    if planar:
        dataset.PixelData = np.moveaxis(stored, 3, 1).tobytes()
    dataset.PlanarConfiguration = 1 - planar
    save(dataset, tmp_path / "a", syntax)
    error, notes = error_of(tmp_path / "a", frames)
    assert error < 1
    how = "one after the other" if planar else "pixel by pixel"
    assert notes == f"colours stored {how}, the header says otherwise"


@pytest.mark.parametrize("stored", ["RGB", "YCbCr"])
def test_frames_that_show_nothing_do_not_decide(tmp_path, stored):
    """The first, middle and last frame black: colours and blackness are judged by the others."""
    frames = TRUTH.copy()
    frames[[0, 3, 5]] = 0
    coded = [jpeg_of(frame, stored) for frame in frames]
    path = write_coded(tmp_path / "a", coded, pydicom.uid.JPEGBaseline8Bit, "RGB")
    assert error_of(path, frames)[0] < 1.5
    deep = frames[..., 0].astype(np.uint16) << 4
    write_dicom(tmp_path / "b", deep, "MONOCHROME2", BitsStored=12)
    assert error_of(tmp_path / "b", frames[..., :1]) == (0, "")


def test_bytes_of_a_component_the_other_way_round(tmp_path):
    swapped = (TRUTH[..., 0].astype(np.uint16) << 4).byteswap()
    write_dicom(tmp_path / "a", swapped, "MONOCHROME2", BitsStored=12)
    assert error_of(tmp_path / "a", TRUTH[..., :1])[0] == 0


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("bits, shift", [(16, 8), (16, 0), (16, 4), (8, 0)])
def test_palettes(tmp_path, bits, shift, big_endian):
    values = np.arange(256)
    order = ">" if big_endian else "<"
    palette = {}
    tints = {"Red": values, "Green": values * 3 // 4, "Blue": values // 2}
    for colour, table in tints.items():
        data = (table << shift).astype(f"{order}u{bits // 8}").tobytes()
        if big_endian and bits == 8:  # two a word
            data = np.frombuffer(data, "u2").byteswap().tobytes()
        palette[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        palette[f"{colour}PaletteColorLookupTableData"] = data
    dataset = write_dicom(tmp_path / "a", TRUTH[..., 0], "PALETTE COLOR", **palette)
    if big_endian:
        save(dataset, tmp_path / "a", "big")
    truth = np.stack([t[TRUTH[..., 0]] for t in tints.values()], axis=-1)
    assert error_of(tmp_path / "a", truth)[0] == 0


def tinted(frames, tint, scale=1.0):
    grey = frames.max(-1, keepdims=True).astype(float) * scale
    return (grey * tint).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "tint", [(1, 1, 1), (1, 0.75, 0.45), (1, 0.55, 0.15), (0.45, 0.7, 1), (0.3, 1, 0.4)]
)
@pytest.mark.parametrize("part", ["whole", "within"])
def test_tinted_greyscale_is_left_as_it_is(tmp_path, part, tint):
    """Sepia, blue and green maps, also of the tissue alone."""
    frames = TRUTH[:, 40:80, 50:100] if part == "within" else TRUTH
    for name, stored in (("RGB", tinted(frames, tint)), ("YBR_FULL", tinted(frames, tint))):
        stored = np.stack([ybr(f) for f in stored]) if name == "YBR_FULL" else stored
        write_dicom(tmp_path / "a", stored, name)
        error, notes = error_of(tmp_path / "a", tinted(frames, tint))
        assert error < 1 and notes == ""


@pytest.mark.parametrize("name", ["rgb_color", "palette_color", "jpeg2k", "ybr_color"])
def test_real_ultrasound_is_read_as_pydicom_reads_it(tmp_path, name):
    dataset = getattr(pydicom.examples, name)
    frames = int(dataset.get("NumberOfFrames", 1))
    if frames == 1:  # a still, three times
        dataset.NumberOfFrames = 3
        if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
            (still,) = generate_frames(dataset.PixelData, number_of_frames=1)
            dataset.PixelData = encapsulate([still] * 3)
        else:
            dataset.PixelData = dataset.PixelData * 3
    dataset.save_as(tmp_path / "a")
    expected = next(pydicom.pixels.iter_pixels(tmp_path / "a"))
    if name == "palette_color":
        expected = pydicom.pixels.apply_color_lut(expected, dataset) >> 8
    found, notes = read(tmp_path / "a")
    assert len(found) == max(3, frames) and notes == ""
    assert np.abs(found[0] - expected).max() <= 2


def test_what_another_decoder_may_read_is_tried_again(tmp_path):
    """Once a plugin is installed, the same line reads it: it is no fault of the file for good."""
    sample = pydicom.data.get_testdata_file("JPGExtended.dcm")
    dataset = pydicom.dcmread(sample)
    (still,) = generate_frames(dataset.PixelData, number_of_frames=1)
    write_coded(tmp_path / "a", [still] * 2, "1.2.840.10008.1.2.4.51", "MONOCHROME2",
                like=np.zeros((2, 1024, 256), np.uint16))  # fmt: skip
    with contextlib.suppress(source.NotNow):  # with a plugin it decodes
        assert len(read(tmp_path / "a")[0]) == 2


def test_a_scan_that_is_said_to_hold_no_coefficient():
    """pydicom's sample: 12 bits, 'scan start must be zero and scan stop must be 63'."""
    dataset = pydicom.dcmread(pydicom.data.get_testdata_file("JPEG-lossy.dcm"))
    (still,) = generate_frames(dataset.PixelData, number_of_frames=1)
    mended = pixels.with_whole_scan(still)
    at = mended.index(b"\xff\xda") + 7
    assert mended[at : at + 3] == b"\0\x3f\0" and still[at : at + 3] == bytes(3)
    assert mended[:at] + mended[at + 3 :] == still[:at] + still[at + 3 :]
    assert pixels.with_whole_scan(mended) == mended


def test_colour_doppler_and_an_ecg_are_left_as_they_are(tmp_path):
    for view in ("A4C", "PSAX"):
        frames = phantom.phantom_cine(view, frames=6, shows_defect=True, seed=5)
        frames[:, 100:104, :, :] = (0, 255, 0)  # a bright green trace
        phantom.write_dicom(tmp_path / "a", frames, jpeg=False)
        error, notes = error_of(tmp_path / "a", frames[..., ::-1])
        assert error == 0 and notes == ""


def test_no_reading_makes_an_echo(tmp_path):
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)], np.uint8)
    noise = colours[np.random.default_rng(0).integers(0, 4, (4, 40, 40))]
    write_dicom(tmp_path / "a", noise, "RGB")
    write_dicom(tmp_path / "b", np.zeros((4, 40, 40, 3), np.uint8), "RGB")
    for name, reason in (("a", "false colour"), ("b", "all is black")):
        with pytest.raises(video.VideoError, match=reason):
            read(tmp_path / name)


# ------------------------------------------------------------------------------------ what it is of


@pytest.mark.parametrize(
    "sop_class, modality, reason",
    [
        ("2.1", "CT", "Enhanced CT Image"),
        ("2.1", "US", "Enhanced CT Image"),
        ("3.1", "XA", "X-ray angiography"),
        ("12.1", "XA", "X-Ray Angiographic Image"),
        ("20", "NM", "Nuclear Medicine Image"),
        ("4.1", "MR", "Enhanced MR Image"),
        ("66.4", "SEG", "Segmentation"),
        ("481.2", "RTDOSE", "RT Dose"),
        ("77.1.5.4", "OPT", "Ophthalmic Tomography Image"),
        ("6.2", "US", "Enhanced US Volume"),
        ("7", "CT", "computed tomography"),
    ],
)
def test_what_is_no_echo_is_skipped_by_name(tmp_path, sop_class, modality, reason):
    sop_class = f"1.2.840.10008.5.1.4.1.1.{sop_class}"
    write_dicom(tmp_path / "a", TRUTH, "RGB", SOPClassUID=sop_class, Modality=modality)
    with pytest.raises(video.VideoError, match=f"not an ultrasound cine: {reason}"):
        read(tmp_path / "a")
    assert reason in video.why_skipped(tmp_path / "a")


def test_secondary_capture_is_taken_with_a_note(tmp_path):
    for sop_class in ("7", "7.4"):
        sop_class = f"1.2.840.10008.5.1.4.1.1.{sop_class}"
        write_dicom(tmp_path / "a", TRUTH, "RGB", SOPClassUID=sop_class, Modality="OT")
        assert read(tmp_path / "a")[1] == "secondary capture"
    write_dicom(tmp_path / "a", TRUTH, "RGB", SOPClassUID="1.2.3.4", Modality="SMITH")
    assert read(tmp_path / "a")[1] == "the header does not say that it is ultrasound"


# ----------------------------------------------------------------------------------- how long it is


@pytest.mark.parametrize("declared", [None, 1, 2, 5, 7, 600, 0, -3, 10**6])
@pytest.mark.parametrize("kind", ["native", "jpeg", "fragments", "rle"])
def test_frames_are_counted_in_the_pixel_data(tmp_path, kind, declared):
    path = tmp_path / "a"
    if kind == "native":
        write_dicom(path, TRUTH, "RGB")
    elif kind == "rle":
        dataset = write_dicom(path, TRUTH, "RGB")
        dataset.compress(pydicom.uid.RLELossless)
        dataset.save_as(path, enforce_file_format=True)
    else:
        coded = [jpeg_of(f, "YCbCr") for f in TRUTH]
        if kind == "fragments":
            coded = [[c[:1000], c[1000:2000], c[2000:]] for c in coded]
        write_coded(path, coded, pydicom.uid.JPEGBaseline8Bit, "YBR_FULL")
    dataset = pydicom.dcmread(path)
    if declared is None:
        del dataset.NumberOfFrames
    else:
        dataset.NumberOfFrames = declared
    dataset.save_as(path, enforce_file_format=True)
    error, notes = error_of(path)
    assert error < 1.5
    assert notes == "NumberOfFrames is wrong: 6 frames in the pixel data"


@pytest.mark.parametrize("bit", [12, 15, 8])
@pytest.mark.parametrize("over", ["few", "declared", "all"])
def test_bits_beyond_those_of_the_image_are_left_out(tmp_path, over, bit):
    """An overlay within the pixels, declared or not, or a bit that is always set."""
    stored = 8 if bit == 8 else 12
    deep = TRUTH[..., 0].astype(np.uint16) << (stored - 8)
    where = np.s_[:, 10:12, 10:60] if over == "few" else np.s_[:, 10:] if over != "all" else ...
    deep[where] |= np.uint16(1 << bit)
    dataset = write_dicom(tmp_path / "a", deep, "MONOCHROME2", BitsStored=stored)
    if over == "declared":
        dataset.add_new(0x60020100, "US", 16)
        dataset.add_new(0x60020102, "US", bit)
        dataset.save_as(tmp_path / "a", enforce_file_format=True)
    error, notes = error_of(tmp_path / "a", TRUTH[..., :1])
    assert error == 0
    said = "" if over == "declared" else f"bits beyond the {stored} of the image left out"
    assert notes == said


def test_few_bright_pixels_of_an_understated_depth_are_kept(tmp_path):
    """They are bright where their surroundings are: no overlay."""
    y, x = np.mgrid[:120, :160]
    spot = 3000 * np.exp(-((y - 60) ** 2 + (x - 80) ** 2) / 40)
    frames = np.stack([np.roll(spot, i, 1) for i in range(6)]).astype(np.uint16)
    assert 0 < (frames >= 1024).mean() < pixels.FEW
    write_dicom(tmp_path / "a", frames, "MONOCHROME2", BitsStored=10)
    error, notes = error_of(tmp_path / "a", (frames >> 4)[..., None])
    assert error == 0 and notes == "pixels of 12 bits, the header says otherwise"


@pytest.mark.parametrize("scene", ["speckle", "echo"])
def test_the_pixels_decide_whether_the_layout_or_the_number_of_frames_is_wrong(tmp_path, scene):
    """Whole frames fill the data both in the declared layout and in that of the declared number."""
    frames = TRUTH
    if scene == "echo":
        frames = read(pydicom.examples.get_path("ybr_color"))[0][:6].astype(np.uint8)
    grey = frames[..., 0]
    y, b, r = np.moveaxis(np.stack([ybr(f) for f in frames]), 3, 0)
    halved = np.stack([y[:, :, ::2], y[:, :, 1::2], b[:, :, ::2], r[:, :, ::2]], -1)
    stored = {
        "grey": (grey, {}),
        "deep": (grey.astype(np.uint16) << 4, {"BitsStored": 12}),
        "colour": (frames, {}),
        "planar": (np.moveaxis(frames, 3, 1), {"PlanarConfiguration": 1}),
        "halved": (halved, {}),
    }
    labels = {"grey": "MONOCHROME2", "deep": "MONOCHROME2", "halved": "YBR_FULL_422"}
    for name, (data, tags) in stored.items():
        truth, label = grey[..., None] if name in ("grey", "deep") else frames, labels.get(name)
        for declared in (2, 3, 4, 9, 12, 18, 36):
            like = data if name in ("grey", "deep") else frames
            dataset = write_dicom(tmp_path / "a", like, label or "RGB", **tags)
            dataset.PixelData, dataset.NumberOfFrames = data.tobytes(), declared
            dataset.save_as(tmp_path / "a", enforce_file_format=True)
            error, notes = error_of(tmp_path / "a", truth)
            assert error < 3 and notes == "NumberOfFrames is wrong: 6 frames in the pixel data"
    for name, label, samples, bits in (
        ("grey", "RGB", 3, 8),
        ("grey", "MONOCHROME2", 1, 16),
        ("deep", "MONOCHROME2", 1, 8),
        ("deep", "RGB", 3, 8),
        ("colour", "MONOCHROME2", 1, 8),
        ("colour", "MONOCHROME2", 1, 16),
        ("colour", "YBR_FULL_422", 3, 8),
        ("halved", "YBR_FULL", 3, 8),
    ):  # the number is right
        dataset = write_dicom(tmp_path / "a", frames, label, SamplesPerPixel=samples)
        dataset.PixelData, dataset.BitsAllocated = stored[name][0].tobytes(), bits
        dataset.save_as(tmp_path / "a", enforce_file_format=True)
        truth = grey[..., None] if name in ("grey", "deep") else frames
        assert error_of(tmp_path / "a", truth)[0] < 3


def test_pixels_of_four_components_are_refused(tmp_path):
    """Unless the data are of three, and only the header says four."""
    four = np.concatenate([TRUTH, TRUTH[..., :1]], -1)
    write_dicom(tmp_path / "a", four, "RGB")
    with pytest.raises(video.VideoError, match="pixels of 4 components"):
        read(tmp_path / "a")
    write_dicom(tmp_path / "a", TRUTH, "RGB", SamplesPerPixel=4)
    assert error_of(tmp_path / "a") == (0, "frames of another size than the header says")


def test_a_still_that_is_said_to_be_a_cine(tmp_path):
    """All frames in one fragment: decoders see the first alone, which is no plain still."""
    whole = b"".join(jpeg_of(frame, "YCbCr") for frame in TRUTH)
    write_coded(tmp_path / "a", [whole], pydicom.uid.JPEGBaseline8Bit, "ybr_full")
    with pytest.raises(video.VideoError, match="still image, though the header says more"):
        read(tmp_path / "a")
    write_dicom(tmp_path / "b", TRUTH, "rgb")
    assert error_of(tmp_path / "b") == (0, "")


def test_odd_frames_and_padding(tmp_path):
    odd = np.ascontiguousarray(TRUTH[:5, :17, :17])
    odd[:, 1] = 200
    write_dicom(tmp_path / "a", odd, "RGB")  # 4335 bytes
    data = pydicom.dcmread(tmp_path / "a")
    data.PixelData = odd.tobytes() + b"\0"
    data.save_as(tmp_path / "a", enforce_file_format=True)
    frames, notes = read(tmp_path / "a")
    assert notes == "" and (frames == odd).all()


def test_a_file_that_breaks_off_is_truncated(tmp_path):
    write_dicom(tmp_path / "a", TRUTH, "RGB")
    coded = [jpeg_of(f, "YCbCr") for f in TRUTH]
    write_coded(tmp_path / "b", coded, pydicom.uid.JPEGBaseline8Bit, "YBR_FULL")
    for name in "ab":
        data = (tmp_path / name).read_bytes()
        for keep in (0.95, 0.5):
            (tmp_path / "cut").write_bytes(data[: int(keep * len(data))])
            with pytest.raises(video.VideoError, match="truncated"):
                read(tmp_path / "cut")
    data = (tmp_path / "b").read_bytes()[:-8]  # no end mark: all the same, all frames are there
    (tmp_path / "cut").write_bytes(data)
    assert read(tmp_path / "cut")[1] == ""
    last = data.rindex(b"\xfe\xff\0\xe0")
    (tmp_path / "cut").write_bytes(data[:last])
    with pytest.raises(video.VideoError, match="truncated"):
        read(tmp_path / "cut")


@pytest.mark.parametrize(
    "syntax, name",
    [
        ("100", "mpeg2.mpg"),
        ("101", "mpeg2.m2v"),
        ("100.1", "mpeg2.m2v"),
        ("102", "h264.mp4"),
        ("103", "h264.ts"),
        ("104", "h264.h264"),
        ("106.1", "h264.mp4"),
        ("107", "hevc.mp4"),
        ("108", "hevc.mp4"),
    ],
)
def test_video_streams_in_dicom(tmp_path, syntax, name):
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


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="files without a name: Linux")
def test_no_copy_of_a_stream_outlives_its_reader(tmp_path, monkeypatch):
    """A reader that is killed in the middle leaves no pixels behind: there is no name to leave."""
    data = (VIDEOS / "h264.mp4").read_bytes()
    path = write_coded(
        tmp_path / "a", [data], "1.2.840.10008.1.2.4.102", "YBR_PARTIAL_420",
        like=moving_square(24, 48, 64), NumberOfFrames=24,
    )  # fmt: skip
    (tmp_path / "copies").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "copies"))
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
        write_dicom(
            path, frames[i : i + 1, ..., ::-1].copy(), "RGB", StudyInstanceUID="1.2.3",
            SeriesInstanceUID=series, InstanceNumber=i + 1,
            SOPInstanceUID=pydicom.uid.generate_uid(), **tags,
        )  # fmt: skip
        dataset = pydicom.dcmread(path)
        del dataset.NumberOfFrames
        dataset.save_as(path, enforce_file_format=True)
    return paths


def group(folder):
    files = [p for p in sorted(Path(folder).rglob("*")) if p.is_file()]
    facts = {p.relative_to(folder).as_posix(): dicom.read_header_facts(p) for p in files}
    return dicom.group_stills(facts)


def test_single_frames_of_a_series_are_one_cine(tmp_path):
    frames = moving_square()
    paths = write_series(tmp_path / "cine", frames, SeriesInstanceUID="1.2.34567")
    ((name, files),) = group(tmp_path).items()
    assert name.startswith("cine/series-") and "34567" not in name
    assert files == [p.relative_to(tmp_path).as_posix() for p in paths]


def test_a_series_is_read_in_its_order(tmp_path):
    frames = np.random.default_rng(0).integers(0, 60, (60, 80, 1), dtype=np.uint8)
    frames = np.maximum(moving_square(), frames)
    paths = write_series(tmp_path / "cine", frames)
    (clips,) = video.read_clips(paths, video.Sampling(size=56))
    assert clips.n_frames == 20 and clips.note == "single frames of one series: 20"
    np.testing.assert_array_equal(video.read_frames(paths), frames)
    with pytest.raises(video.VideoError, match="still image"):
        read(paths[0])
    masked = video.read_clips(paths, video.Sampling(size=56, mask="sector"))
    assert masked[0].frames.shape == clips.frames.shape


def test_stills_are_no_cine(tmp_path):
    """Of series of their own, of one series with other sizes or cines, and of one that could be."""
    stills = [
        phantom.phantom_cine(v, frames=2, seed=s)[:1] for s in range(3) for v in phantom.VIEWS
    ]
    for i, still in enumerate(stills):
        write_series(tmp_path / "own" / str(i), still)
    assert group(tmp_path / "own") == {}
    write_series(tmp_path / "mixed", np.concatenate(stills), SeriesInstanceUID="1.2.9")
    write_dicom(tmp_path / "mixed" / "cine", TRUTH, "RGB", StudyInstanceUID="1.2.3",
                SeriesInstanceUID="1.2.9", InstanceNumber=50)  # fmt: skip
    assert group(tmp_path / "mixed") == {}
    paths = write_series(tmp_path / "one", np.concatenate(stills))
    assert len(group(tmp_path / "one")) == 1  # as far as headers say
    with pytest.raises(video.VideoError, match="still images of one series: 12"):
        read(paths)


@pytest.mark.parametrize("differ", ["depth", "allocated", "palette", "nothing"])
def test_a_series_of_images_that_need_different_readings_is_refused(tmp_path, differ):
    """It was read by the first one's depth and palette."""
    paths = []
    for i, frame in enumerate(np.concatenate([TRUTH[:, :, :, 0]] * 2)):
        odd, tags = i % 2, {}
        stored = frame[None].astype(np.uint16)
        if differ == "depth":
            stored, tags = stored << 4 * odd, {"BitsStored": 8 + 4 * odd, "HighBit": 7 + 4 * odd}
        elif differ == "allocated":
            stored = stored.astype(np.uint8) if odd else stored << 8
        else:
            table = np.arange(256) * (200 - 10 * i if differ == "palette" else 200) // 200
            for colour in ("Red", "Green", "Blue"):
                tags[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
                tags[f"{colour}PaletteColorLookupTableData"] = table.astype(np.uint8).tobytes()
            stored = frame[None]
        label = "PALETTE COLOR" if "RedPaletteColorLookupTableData" in tags else "MONOCHROME2"
        paths.append(tmp_path / str(i))
        write_dicom(paths[-1], stored, label, InstanceNumber=i + 1, **tags)
    if differ == "nothing":
        assert len(read(paths)[0]) == 12
        return
    with pytest.raises(video.VideoError, match="a series of unlike images"):
        read(paths)


def test_header_facts_of_odd_files(tmp_path):
    """Never an exception, nor a text that could harm what it is written to, nor a wait."""
    (tmp_path / "text").write_text("hello")
    os.mkfifo(tmp_path / "pipe.dcm")
    for name in ("text", "pipe.dcm", "gone"):
        assert dicom.read_header_facts(tmp_path / name) == dicom.HeaderFacts()
    square = moving_square()
    with pydicom.config.disable_value_validation():
        write_dicom(tmp_path / "odd", square, "RGB", StudyInstanceUID="1.2\x1b[31m" * 90_000)
    data = bytearray((tmp_path / "odd").read_bytes())
    at = data.index(b"\x28\0\x08\0IS") + 8
    data[at : at + 2] = b"no"  # NumberOfFrames
    (tmp_path / "odd").write_bytes(data)
    facts = dicom.read_header_facts(tmp_path / "odd")
    assert len(facts.study_uid) == 64 and facts.study_uid.isalnum()
    assert (facts.n_frames, facts.rows, facts.columns) == (1, 60, 80)


# ------------------------------------------------------------------------------------ hostile files


def test_pipes_and_devices_are_no_source(tmp_path):
    for name in ("pipe.avi", "pipe.dcm", "pipe"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    for name in ("pipe.avi", "pipe.dcm", "zero.mp4"):
        with pytest.raises(video.VideoError, match="not a regular file"):
            read(tmp_path / name)
    assert studies.find_videos(tmp_path)[0] == []


def test_more_than_the_budget_is_refused_before_it_is_taken(tmp_path):
    """Frames of 12,000 x 12,000, as header and as JPEG 2000 say; more frames than fit."""
    write_dicom(tmp_path / "size", TRUTH, "RGB", Rows=12_000, Columns=12_000)
    file = io.BytesIO()
    Image.fromarray(TRUTH[0]).save(file, "JPEG2000", no_jp2=True)
    vast = bytearray(file.getvalue())
    vast[8:16] = struct.pack(">II", 12_000, 12_000)
    write_coded(tmp_path / "j2k", [bytes(vast)] * 3, pydicom.uid.JPEG2000Lossless, "RGB")
    jpeg = bytearray(jpeg_of(TRUTH[0], "YCbCr"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    write_coded(tmp_path / "jpeg", [bytes(jpeg)] * 3, pydicom.uid.JPEGBaseline8Bit, "YBR_FULL")
    many = np.zeros((source.FRAMES + 1, 1, 1), np.uint8)
    write_dicom(tmp_path / "many", many, "MONOCHROME2")
    for name in ("size", "j2k", "jpeg", "many"):
        with pytest.raises(video.VideoError, match="more than"):
            read(tmp_path / name)


def test_a_deflated_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom, "INFLATED_BYTES", 200_000)
    with pytest.raises(video.VideoError, match="too large"):
        read(CASES / "deflated.dcm")


def test_the_header_of_a_deflated_file_is_read_without_its_pixels(tmp_path, monkeypatch):
    facts = dicom.read_header_facts(CASES / "deflated.dcm")
    monkeypatch.setattr(dicom, "HEADER_BYTES", 20_000)
    assert dicom.read_header_facts(CASES / "deflated.dcm") == facts and facts.rows == 120
    monkeypatch.setattr(dicom, "INFLATION", 1)
    with pytest.raises(video.VideoError, match="too large"):
        read(CASES / "deflated.dcm")


@pytest.mark.parametrize("name", ["ybr_color", "rgb", "rle", "deflated"])
def test_damaged_files_end_in_a_reason(tmp_path, name):
    """Bits flipped, parts cut out, put in twice or blanked: a reason, or images; nothing else."""
    if name == "ybr_color":
        data = pydicom.examples.get_path(name).read_bytes()
    elif name == "deflated":
        data = (CASES / "deflated.dcm").read_bytes()
    else:
        dataset = write_dicom(tmp_path / "a", TRUTH[:3, :40, :40], "RGB", PatientName="SECRET")
        if name == "rle":
            dataset.compress(pydicom.uid.RLELossless)
            dataset.save_as(tmp_path / "a", enforce_file_format=True)
        data = (tmp_path / "a").read_bytes()
    rng = np.random.default_rng(0)
    for case in range(60):
        odd, within = bytearray(data), 2000 if case % 2 else len(data)  # in the header, anywhere
        for _ in range(rng.integers(1, 8)):
            at, length = rng.integers(132, within), int(rng.integers(1, 300))
            match rng.integers(4):
                case 0:
                    odd[at % len(odd)] ^= 1 << rng.integers(8)
                case 1:
                    del odd[at : at + length]
                case 2:
                    odd[at:at] = odd[at : at + length]
                case 3:
                    odd[at : at + length] = bytes(len(odd[at : at + length]))
        (tmp_path / "odd.dcm").write_bytes(odd)
        try:
            for frame in video.iter_frames(tmp_path / "odd.dcm"):
                assert frame.dtype == np.uint8 and frame.shape[2] == 3
        except video.VideoError as error:
            assert "SECRET" not in str(error) and len(str(error)) < 200
        assert isinstance(dicom.read_header_facts(tmp_path / "odd.dcm"), dicom.HeaderFacts)


def test_nothing_of_a_header_is_shown(tmp_path):
    """No tag's value on the screen, whatever stands in it: pydicom quotes values in warnings."""
    mark = "SMITH^J"
    square = moving_square(6)
    with pydicom.config.disable_value_validation():
        dataset = write_dicom(
            tmp_path / "a.dcm", square, mark, StudyInstanceUID=mark, Modality=mark,
            PatientName=mark, ImageType=[mark] * 3, SOPClassUID=mark,
        )  # fmt: skip
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
        dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
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
    paths = [str(p) for p in sorted(tmp_path.glob("*.dcm"))]
    done = subprocess.run(
        [sys.executable, "-c", script, *paths], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and done.stderr == ""
    assert "SMITH" not in done.stdout and "an unknown value" in done.stdout
