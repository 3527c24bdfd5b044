"""Area privacy: a mark in every text tag and in the folders above; no output may hold it."""

import io
import os
from pathlib import Path

from tests.faults import images
from tests.faults.stores import home
from tests.faults.worker import Case, one_line, run

MARK = "Qzmarkqz"
ADDED = ("PatientName", "PatientID", "AccessionNumber", "StudyDescription", "InstitutionName")
ADDED += ("OperatorsName", "PatientBirthDate", "StationName", "StudyDate", "ProtocolName")
TEXT_VRS = [
    "AE",
    "AS",
    "CS",
    "DA",
    "DS",
    "DT",
    "IS",
    "LO",
    "LT",
    "PN",
    "SH",
    "ST",
    "TM",
    "UC",
    "UI",
    "UR",
    "UT",
]


def base(area):
    images.base()
    return home()


def marked(data, rng):
    """Every text element of a DICOM file with the mark in it, and some that it had not."""
    import pydicom

    ds = pydicom.dcmread(io.BytesIO(data), force=True)
    needed = ["PhotometricInterpretation", "Modality", "NumberOfFrames", "SOPClassUID"]
    odd, keep = str(rng.choice([*needed, ""])), {"StudyInstanceUID", *needed}
    for name in ADDED:
        setattr(ds, name, "")
    for element in list(ds):
        if element.VR in TEXT_VRS and (element.keyword not in keep or element.keyword == odd):
            raw = pydicom.dataelem.RawDataElement(
                element.tag, element.VR, 8, MARK.encode(), 0, False, True
            )
            ds._dict[element.tag] = raw
    ds.add_new(0x00091010, "LO", MARK)
    buffer = io.BytesIO()
    ds.save_as(buffer)
    data = buffer.getvalue()
    return images.shifted(data, rng) if rng.random() < 0.4 else data


def privacy(rng, here, base):
    from echofocus_core.video import extract

    above = here / f"{MARK}_above"
    source = above / "source"
    images.healthy(source)
    names = images.sources("dicom")
    for i in range(6):
        data = images.cine(names[int(rng.integers(len(names)))], 20 + i)
        (source / f"study{i}").mkdir()
        (source / f"study{i}" / "a").write_bytes(marked(data, rng))
    os.symlink(base / "trained_models", above / "trained_models")
    for name in ("config.json", "labels.csv"):
        (above / name).write_bytes((base / name).read_bytes())
    os.chdir(above)
    results = [
        run("source", "--out", "out", *images.HOW, main=extract.main),
        run("check", "--videos", "source", "--device", "cpu"),
        run("predict", "--model_name", "defect", "--embedding_path", "out", "--out", "p.csv"),
        run("embed", "--model_name", "defect", "--embedding_path", "out", "--embed_file", "e.h5"),
    ]
    complaint = next(filter(None, map(one_line, results)), "")
    for result in results:
        if MARK in result.said and not complaint:
            at = result.said.index(MARK)
            complaint = f"the mark is on the screen: {result.said[max(0, at - 200) : at + 50]!r}"
    outputs = [p for p in [*Path("out").rglob("*"), Path("p.csv"), Path("e.h5")] if p.is_file()]
    for path in outputs:
        if MARK.encode() in path.read_bytes() and not complaint:
            complaint = f"the mark is in {path}"
    return Case("a mark in every text tag and above", complaint)
