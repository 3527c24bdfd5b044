"""Small generated files for the tutorials and for the examples of the documentation.

No real patient is in them: videos are simulated (`echofocus_core.video.phantom`), embeddings and
labels are random numbers with a pattern that a model can learn.
"""

import os
import tempfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pydicom
import torch
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage, generate_uid

from echofocus_core.base.releases import registry
from echofocus_core.study.network import StudyModel
from echofocus_core.video.phantom import phantom_cine, write_video

VIEWS = ("A4C", "PLAX", "PSAX", "SUBC")


def start(name):
    """Make an empty folder for a tutorial and enter it."""
    os.chdir(tempfile.mkdtemp(prefix=f"{name}-"))
    print("the files of this tutorial are in", Path.cwd())


# ------------------------------------------------------------------------------------------- videos


def write_dicom(path, frames, study, patient):
    """Write BGR frames uint8 (n, H, W, 3) as an uncompressed ultrasound cine."""
    ds = pydicom.Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = UltrasoundMultiFrameImageStorage
    uid = generate_uid(entropy_srcs=[str(path)])
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = uid
    ds.StudyInstanceUID = generate_uid(entropy_srcs=[study])
    ds.PatientID, ds.Modality, ds.FrameTime = patient, "US", "33.3"
    ds.NumberOfFrames, ds.Rows, ds.Columns, ds.SamplesPerPixel = frames.shape
    ds.PhotometricInterpretation, ds.PlanarConfiguration = "RGB", 0
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation = 7, 0
    ds.PixelData = np.ascontiguousarray(frames[..., ::-1]).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)


def write_exams(folder, names, views=2):
    """Write simulated exams, a folder of DICOM cines each: `folder/name/IM0001.dcm`, ..."""
    for number, name in enumerate(names):
        for i, view in enumerate(VIEWS[:views]):
            cine = phantom_cine(view, 30 + 4 * number, number == 0, 16, seed=(number, i))
            write_dicom(Path(folder, name, f"IM{i + 1:04}.dcm"), cine, name, f"patient {number}")


def write_echonet(folder, n):
    """Write `FileList.csv` and `Videos/` in the layout of EchoNet-Dynamic: n videos of one view."""
    ef = np.random.default_rng(0).uniform(15, 75, n).round(1)
    names = [f"0X{i:04X}" for i in range(n)]
    for i, name in enumerate(names):
        cine = phantom_cine("A4C", ef[i], frames=16, size=(56, 56), seed=i)
        write_video(Path(folder, "Videos", f"{name}.avi"), cine)
    split = ["TRAIN", "TRAIN", "TRAIN", "VAL", "TEST"] * (n // 5 + 1)
    table = pd.DataFrame({"FileName": names, "EF": ef, "ESV": 100 - ef, "EDV": 100.0})
    table.assign(FrameHeight=56, FrameWidth=56, FPS=30, NumberOfFrames=16, Split=split[:n]).to_csv(
        Path(folder, "FileList.csv"), index=False
    )


def write_mimic(folder, n):
    """Write `files/` and `echo-record-list.csv` in the layout of MIMIC-IV-ECHO: n studies of n / 2
    patients, with two cines each. Returns the studies: subject_id, study_id, ef."""
    records, studies = [], []
    for i in range(n):
        patient, study = 10000001 + i // 2, 90000001 + i
        ef = float(np.random.default_rng(i).uniform(15, 75))
        for k, view in enumerate(VIEWS[:2]):
            path = f"files/p{patient // 10**6}/p{patient}/s{study}/{study}_{k + 1:04}.dcm"
            cine = phantom_cine(view, ef, frames=16, size=(64, 64), seed=(i, k))
            write_dicom(Path(folder, path), cine, str(study), str(patient))
            records.append((patient, study, "2150-01-01 10:00:00", path))
        studies.append((patient, study, ef))
    columns = ["subject_id", "study_id", "acquisition_datetime", "dicom_filepath"]
    table = pd.DataFrame(records, columns=columns)
    table.to_csv(Path(folder, "echo-record-list.csv"), index=False)
    return pd.DataFrame(studies, columns=["subject_id", "study_id", "ef"])


# --------------------------------------------------------------------------------------- embeddings


def draw_labels(n, first=100200, labels=("ASD", "VSD_ADJ")):
    """A label table of n studies of about 3 n / 4 patients: pid, eid, sex, age and findings."""
    rng = np.random.default_rng(first)
    patients = [f"P{first + i // 4 * 3 + max(i % 4 - 1, 0)}" for i in range(n)]
    rows = {"pid": patients, "eid": [str(first + i) for i in range(n)]}
    rows |= {"sex": rng.choice(["F", "M"], n), "age": rng.integers(1, 80, n)}
    return pd.DataFrame(rows | {name: rng.integers(0, 2, n) for name in labels})


def write_embeddings(
    folder, table, labels=("ASD", "VSD_ADJ"), width=768, layout="ours", settings=None
):
    """Write clip embeddings of each study of a label table, one HDF5 file per study.

    Some clips of a study with a finding have the finding's pattern. layout: "ours", or "published"
    for that of the published scripts; settings: attributes of the files.
    """
    patterns = np.random.default_rng(1).standard_normal((len(labels), width))
    Path(folder).mkdir(parents=True, exist_ok=True)
    for row in table.to_dict("records"):
        rng = np.random.default_rng(int(row["eid"]))
        clips = rng.standard_normal((rng.integers(2, 4), 4, width))
        for label, pattern in zip(labels, patterns, strict=True):
            clips[0] += 0.1 * row[label] * pattern
        names = [f"{view}.avi" for view in VIEWS[: len(clips)]]
        if layout == "published":
            with h5py.File(Path(folder, f"{row['eid']}_trim_embed.hdf5"), "w") as f:
                for name, video in zip(names, clips.astype(np.float32), strict=True):
                    f[f"data/exports/{row['eid']}_trim/{name}/emb"] = video
            continue
        with h5py.File(Path(folder, f"{row['eid']}.hdf5"), "w") as f:
            f["embeddings"] = clips.astype(np.float32)
            f.attrs.update(settings or {})
            f.create_dataset("videos", data=names, dtype=h5py.string_dtype())


# ------------------------------------------------------------------------------------------- models


def write_stand_in(path, name="EchoFocus_CHD"):
    """Write a zip file like that of a released model, with random weights: its answers mean
    nothing."""
    entry = registry()[name]
    torch.manual_seed(0)
    net = StudyModel(len(entry["labels"]), depth=entry["recipe"]["encoder_depth"])
    saved = {"model_state_dict": net.state_dict(), "perf_log": [], "optimizer_state_dict": {}}
    saved |= {"scheduler_state_dict": {}, "input_norm_dict": None}
    with (
        zipfile.ZipFile(path, "w") as archive,
        archive.open(f"{name}/best_checkpoint.pt", "w") as f,
    ):
        torch.save(saved, f)
