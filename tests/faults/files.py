"""Areas of damaged files. A function takes (rng, base) in an empty folder and returns
(name of the fault, complaint or '')."""

import io
from pathlib import Path

import h5py
import pydicom

from tests.faults.changes import KINDS, NAMES, choose, damage
from tests.faults.commands import (
    EXTRACT,
    PREDICT,
    clips,
    complaint_of,
    copy_cohort,
    differences,
    healthy_embeddings,
    healthy_source,
    run,
)
from tests.helpers import FIXTURES

N_FILES = 8  # damaged files in one run of extraction


def cine(name, number):
    """A DICOM file of the fixtures as study, series and patient `number`."""
    ds = pydicom.dcmread(FIXTURES / "dicom" / name)
    ds.StudyInstanceUID, ds.PatientID = f"1.2.840.99999.{number}", f"P{number}"
    buffer = io.BytesIO()
    ds.save_as(buffer)
    return buffer.getvalue()


def write_damaged(folder, kind, number, rng):
    """Write a damaged file into the folder of its study; returns the fault's name."""
    if kind == "dicom":
        name = choose(rng, sorted(p.name for p in (FIXTURES / "dicom").glob("*.dcm")))
        data, suffix = cine(name, 10 + number), str(rng.choice([".dcm", "", ".avi"]))
    else:
        path = choose(rng, sorted((FIXTURES / "videos").glob("*.*")))
        data, suffix = path.read_bytes(), choose(rng, [path.suffix, ".avi", ".mp4", ".dcm"])
    folder.mkdir(parents=True)
    draw = rng.random()
    if draw < 0.05:
        choose(rng, KINDS)(folder / f"a{suffix}")
        return "not a file"
    if draw < 0.1:
        (folder / f"{choose(rng, NAMES)}{suffix}").write_bytes(data)
        return "name"
    fault, data = damage(data, rng)
    (folder / f"a{suffix}").write_bytes(data)
    return fault


def extraction(kind, rng, base):
    source = Path("source")
    healthy_source(source)
    faults = {f"odd{i}": write_damaged(source / f"odd{i}", kind, i, rng) for i in range(N_FILES)}
    fault = ", ".join(sorted(set(faults.values())))
    result = run(*EXTRACT)
    if complaint := complaint_of(result, failed=False):
        return fault, complaint
    expected, arrays = healthy_embeddings(base), healthy_embeddings(".")
    if arrays.keys() != expected.keys() or any((arrays[k] != expected[k]).any() for k in expected):
        return fault, f"healthy studies differ: {sorted(arrays)}"
    reported = result.text + "".join(p.read_text() for p in Path("out").glob("*.csv"))
    for name in faults:
        if name not in reported and "not videos" not in reported and "left out" not in reported:
            return fault, f"{name} is not reported"
    again = run(*EXTRACT)
    repeated = "" if "0 studies extracted" in again.out else f"extracted again: {again.text[-300:]}"
    return fault, complaint_of(again, failed=False) or repeated


def dicom(rng, base):
    return extraction("dicom", rng, base)


def video(rng, base):
    return extraction("video", rng, base)


# ----------------------------------------------------------------------------------- embeddings


def hdf5(rng, base):
    """Damage the embedding file of one of five studies."""
    copy_cohort(base)
    path, draw = Path("emb/s1.hdf5"), rng.random()
    fault, damaged = "not a file", ("s1",)
    if draw < 0.1:
        path.unlink()
        choose(rng, KINDS)(path)
    elif draw < 0.2:
        path.rename(path.with_name(f"{choose(rng, NAMES)}.hdf5"))
        fault = "name"
    else:
        layout = "ours" if draw < 0.7 else "published"  # the published one has no checksums
        if layout == "published":
            damaged = ()
            with h5py.File(path, "w") as f:
                f["lab/site/s1_trim/v0.avi/emb"] = clips(100)[0]
        fault, data = damage(path.read_bytes(), rng)
        fault = f"{layout}: {fault}"
        path.write_bytes(data)
    result = run(*PREDICT)
    complaint = complaint_of(result, failed=False)
    return fault, complaint or differences(base, ("s0", "s2", "s3", "s4"), damaged)
