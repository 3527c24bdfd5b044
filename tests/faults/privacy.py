"""Area of patient data in headers and names of folders."""

import io
import os
from pathlib import Path

import pydicom

from tests.faults.changes import choose
from tests.faults.commands import EXTRACT, complaint_of, copy_cohort, healthy_source, run
from tests.faults.files import cine
from tests.helpers import FIXTURES

MARK = "Qzmarkqz"
ADDED = ("PatientName", "PatientID", "AccessionNumber", "StudyDescription", "InstitutionName")
ADDED += ("OperatorsName", "PatientBirthDate", "StationName", "StudyDate", "ProtocolName")
NEEDED = ("StudyInstanceUID", "PhotometricInterpretation", "Modality", "NumberOfFrames",
          "SOPClassUID")  # fmt: skip
TEXT_VRS = pydicom.valuerep.STR_VR


def with_marks(data, rng):
    """A DICOM file with a mark in every text element, and in some new ones."""
    ds = pydicom.dcmread(io.BytesIO(data), force=True)
    odd = choose(rng, ("", *NEEDED[1:]))
    for name in ADDED:
        setattr(ds, name, "")
    for element in list(ds):
        if element.VR in TEXT_VRS and (element.keyword not in NEEDED or element.keyword == odd):
            ds._dict[element.tag] = pydicom.dataelem.RawDataElement(
                element.tag, element.VR, 8, MARK.encode(), 0, False, True
            )
    ds.add_new(0x00091010, "LO", MARK)
    buffer = io.BytesIO()
    ds.save_as(buffer)
    return buffer.getvalue()


def privacy(rng, base):
    """No output has the mark of text elements and of the name of a parent folder."""
    above = Path(f"{MARK}_above")
    healthy_source(above / "source")
    names = sorted(p.name for p in (FIXTURES / "dicom").glob("*.dcm"))
    for i in range(6):
        (above / "source" / f"study{i}").mkdir()
        data = with_marks(cine(choose(rng, names), 20 + i), rng)
        (above / "source" / f"study{i}" / "a").write_bytes(data)
    os.chdir(above)
    copy_cohort(base)
    model = ("--model_name", "defect", "--embedding_path", "out")
    results = [
        run(*EXTRACT),
        run("check", "--videos", "source", "--device", "cpu"),
        run("predict", *model, "--out", "p.csv"),
        run("embed", *model, "--embed_file", "e.h5"),
    ]
    complaint = next(filter(None, map(complaint_of, results)), "")
    for result in results:
        if MARK in result.text and not complaint:
            at = result.text.index(MARK)
            complaint = f"the mark is printed: {result.text[max(0, at - 200) : at + 50]!r}"
    for path in [*Path("out").rglob("*"), Path("p.csv"), Path("e.h5")]:
        if path.is_file() and MARK.encode() in path.read_bytes() and not complaint:
            complaint = f"the mark is in {path}"
    return "a mark in headers and above", complaint
