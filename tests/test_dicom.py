"""DICOM files that say other things than they hold: read right, or refused for what they are."""

import os
from pathlib import Path

import pydicom

from embed import dicom
from tests.test_video import moving_square, write_dicom


def write_series(folder, frames, **tags):
    """Single frames of one series, file names in reverse order; returns their paths in order."""
    folder.mkdir(exist_ok=True)
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
        dataset.save_as(path)
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
