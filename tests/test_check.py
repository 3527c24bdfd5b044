"""`check` reports every planted fault, with the same message as a run."""

import hashlib
import os
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from helpers import copy_example, edit_config, published_model, write_embeddings

import echofocus as ef
from echofocus_core.base.options import FOLDS
from echofocus_core.study import train_command
from echofocus_core.video.store import checksum


def tree(folder):
    """Every path below a folder with its time of change and the SHA-256 of its bytes."""
    return {
        str(p): (p.stat().st_mtime_ns, p.is_file() and hashlib.sha256(p.read_bytes()).hexdigest())
        for p in [folder, *folder.rglob("*")]
    }


def findings(out):
    """Lines that are not ok, each with what follows up to and including its remedy."""
    parts = re.split(r"^  (?=ok  |WARNING|ERROR)", out, flags=re.M)
    return [part for part in parts if part.startswith(("WARNING", "ERROR"))]


def test_check_of_a_sound_cohort_writes_nothing(cohort, cli):
    folder = cohort / "videos" / "visit1"
    folder.mkdir(parents=True)
    copy_example(folder / "cine.dcm")
    copy_example(folder / "still.dcm", "rgb_color")
    for task in ("defect", "sizes"):
        assert cli("train", "--task", task, "--epoch_lim", "1")[0] == 0
    assert cli("pack")[0] == 0
    before = tree(cohort)
    options = ("--videos", "videos", "--weights", "random", "--size", "56", "--n_clips", "1")
    for task, more in (("defect", options), ("sizes", ("--sample_limit", "1"))):
        status, out, err = cli("check", "--task", task, *more)
        assert status == 0 and findings(out) == [] and "0 errors, 0 warnings" in out, out + err
        assert "60 studies of 40 patients" in out and "an epoch of training" in out
        if task == "defect":
            assert "1 skipped: still image" in out and "extraction of 1 video: about" in out
    assert tree(cohort) == before

    split = pd.read_csv("trained_models/defect/split.csv", dtype=str).set_index("eid")["fold"]
    labels = pd.read_csv("labels.csv", dtype={"eid": str}).set_index("eid")["finding"]
    counts = [
        f"{y.sum()} of {len(y)} ({y.mean():.1%})" for y in (labels[split == f] for f in FOLDS)
    ]
    status, out, _ = cli("check", "--task", "defect")
    row = next(line for line in out.splitlines() if line.strip().startswith("finding "))
    assert re.split(r"\s{2,}", row.strip()) == ["finding", *counts]


def edit_labels(**cells):
    """Set cells of the label table by row: column = {row: text}."""
    table = pd.read_csv("labels.csv", dtype=str)
    for column, values in cells.items():
        for row, text in values.items():
            table.loc[row, column] = text
    table.to_csv("labels.csv", index=False)


def repeat_rows(**changes):
    table = pd.read_csv("labels.csv", dtype=str)
    pd.concat([table, table[:3].assign(**changes)]).to_csv("labels.csv", index=False)


PARTS = {i: ("train", "train", "train", "val", "test")[i % 5] for i in range(60)}


def set_number(eid, value):
    with h5py.File(f"emb/{eid}.hdf5", "a") as f:
        f["embeddings"][0, 1, 2] = value


def copy_study(eid, to):
    """A study's file, with the checksum that extraction writes, in place of another's."""
    with h5py.File(f"emb/{eid}.hdf5", "a") as f:
        names = f["videos"].asstr()[:].tolist()
        f.attrs["crc32"] = np.array([checksum(f["embeddings"][()], names, {})], np.uint32)
    shutil.copy(f"emb/{eid}.hdf5", f"emb/{to}.hdf5")


def set_encoder(digest, n=60):
    for i in range(n):
        with h5py.File(f"emb/{1000 + i}.hdf5", "a") as f:
            f.attrs["weights_sha256"] = digest * 32


def train():
    ef.main(["train", "--task", "defect", "--epoch_lim", "1"])


def train_then_change_encoder():
    set_encoder("aa")
    train()
    set_encoder("bb")


def train_then_move():
    train()
    split = pd.read_csv("trained_models/defect/split.csv", dtype=str)
    eid = split["eid"][split["fold"] == "train"].iloc[0]
    table = pd.read_csv("labels.csv", dtype=str)
    table.loc[table["eid"] == eid, "pid"] = "P999"
    table.to_csv("labels.csv", index=False)


def pack_then_add():
    ef.main(["pack"])
    os.utime("emb/1000.hdf5")


def damage_model():
    train()
    Path("trained_models/defect/best_checkpoint.pt").write_bytes(b"PK broken")


def write_videos(*contents):
    folder = Path("videos/visit1")
    folder.mkdir(parents=True)
    copy_example(folder / "cine.dcm")
    for i, content in enumerate(contents):
        (folder / f"bad{i}.dcm").write_bytes(content)


VIDEOS = ("--videos", "videos", "--weights", "random", "--size", "56", "--n_clips", "1")

FAULTS = {  # how to plant it; exit status; level and text of each finding
    "missing label column": (
        lambda: edit_config(task_labels=["finding", "findin"]),
        1,
        [("ERROR", "did you mean finding")],
    ),
    "repeated rows": (repeat_rows, 0, [("WARNING", "1000 (line 62)")]),
    "one study of two patients": (
        lambda: copy_study("1000", "1005"),
        1,
        [("ERROR", "2 studies of different patients")],
    ),
    "contradicting rows": (lambda: repeat_rows(pid="P777"), 1, [("ERROR", "1000 (line 2)")]),
    "rows without id": (
        lambda: edit_labels(pid={3: None}),
        0,
        [("WARNING", "1 row has no pid"), ("WARNING", "study is not in the label")],
    ),
    "not a number": (
        lambda: edit_labels(finding={4: "maybe"}),
        0,
        [("WARNING", "maybe (study 1004)"), ("WARNING", "no label at all: 1004")],
    ),
    "constant label": (
        lambda: edit_labels(finding=dict.fromkeys(range(60), "1")),
        1,
        [("WARNING", "always 1"), ("ERROR", "no label can be learn")],
    ),
    "no label": (
        lambda: edit_labels(finding=dict.fromkeys(range(60))),
        1,
        [("WARNING", "no label at all"), ("ERROR", "finding: the label table has no usable value")],
    ),
    "labels without embeddings": (
        lambda: Path("emb/1007.hdf5").unlink(),
        0,
        [("WARNING", "no embeddings: 1007")],
    ),
    "no study on both sides": (
        lambda: edit_labels(eid={i: f"x{i}" for i in range(60)}),
        1,
        [("WARNING", "60 studies"), ("WARNING", "60 embedded studies"), ("ERROR", "eid: x0, x1")],
    ),
    "patients in two given folds": (
        lambda: (edit_config(split_column="part"), edit_labels(part=PARTS | {40: "val"})),
        1,
        [("ERROR", "studies 1000, 1040")],
    ),
    "wrong width": (
        lambda: write_embeddings(Path("emb"), "1003", np.zeros((2, 3, 512), np.float32)),
        0,
        [("WARNING", "1003.hdf5")],
    ),
    "NaN": (lambda: set_number(1003, np.nan), 0, [("WARNING", "1003.hdf5")]),
    "no file can be read": (
        lambda: [p.write_bytes(b"") for p in Path("emb").iterdir()],
        1,
        [("ERROR", "emb: 0 readable studies"), ("WARNING", "60 studies")],
    ),
    "two encoders in one folder": (
        lambda: (set_encoder("aa"), set_encoder("bb", 2)),
        1,
        [("ERROR", "aaaaaaaaaaaa (58 studies: 1002")],
    ),
    "another encoder of studies without labels": (
        lambda: (set_encoder("aa"), set_encoder("bb", 2), edit_labels(finding={0: None, 1: None})),
        0,
        [("WARNING", "no label at all: 1000, 1001")],
    ),
    "model of another encoder": (
        train_then_change_encoder,
        0,
        [("WARNING", "of the encoder weights")],
    ),
    "moved patient": (train_then_move, 1, [("ERROR", "gives 1 study to other patients")]),
    "damaged model": (damage_model, 1, [("ERROR", "best_checkpoint.pt")]),
    "stale pack": (pack_then_add, 0, [("WARNING", "emb.packed.h5")]),
    "no embeddings folder": (lambda: shutil.move("emb", "gone"), 1, [("ERROR", "emb")]),
    "empty DICOM": (lambda: write_videos(b"", b"text"), 0, [("WARNING", "visit1/bad0.dcm")]),
    "no usable video": (
        lambda: (write_videos(b""), Path("videos/visit1/cine.dcm").unlink()),
        1,
        [("WARNING", "bad0.dcm"), ("ERROR", "no usable video: visit1")],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_names_a_planted_fault(cohort, cli, capfd, monkeypatch, fault):
    """It reports only this fault, with its level, a remedy and the exit status of a run."""
    monkeypatch.setattr(
        "echofocus_core.study.check.check_time", lambda *_: None
    )  # no fault of the input shows there
    plant, expected_status, expected = FAULTS[fault]
    plant()
    capfd.readouterr()
    before = tree(cohort)
    videos = VIDEOS if Path("videos").is_dir() else ()
    status, out, err = cli("check", "--task", "defect", *videos)
    assert status == expected_status and "Traceback" not in err, out + err
    listed = findings(out)
    assert len(listed) == len(expected), out
    for part, (level, text) in zip(listed, expected, strict=True):
        assert part.startswith(level) and text in part and "->" in part, out
    assert tree(cohort) == before


IN_A_RUN = ("contradicting rows", "not a number", "two encoders in one folder")


@pytest.mark.parametrize("fault", IN_A_RUN)
def test_a_run_reports_the_same(cohort, cli, capfd, monkeypatch, fault):
    """Training reports the same faults of labels and embeddings."""
    plant, expected_status, expected = FAULTS[fault]
    plant()
    capfd.readouterr()
    monkeypatch.setattr(train_command, "train_cohort", lambda run: None)
    status, out, err = cli("train", "--task", "defect", "--epoch_lim", "1")
    assert status == expected_status and err.count("\n") <= 1, out + err
    assert all(text in out + err for _, text in expected)


def test_check_continues_after_an_error(cohort, cli):
    """It reports the faults of all parts at once; an error in one does not hide the others."""
    repeat_rows(finding="0.5")
    Path("emb/1003.hdf5").write_bytes(b"")
    write_videos(b"")
    status, out, _ = cli("check", *VIDEOS)
    assert status == 1
    for text in ("contradict each other", "1003.hdf5", "bad0.dcm: empty", "labels by fold"):
        assert text in out
    Path("config.json").write_text("{")
    status, out, _ = cli("check", *VIDEOS)
    assert status == 1 and "not valid JSON" in out and "bad0.dcm: empty" in out


def test_check_of_a_released_model_without_labels(cohort, cli):
    """A missing label table is a warning; a task with another number of labels is an error."""
    published_model(cohort / "trained_models" / "released", 1)
    edit_config(label_path="none.csv")
    status, out, _ = cli("check", "--model_name", "released", "--task", "defect")
    (part,) = findings(out)
    assert status == 0 and part.startswith("WARNING  no label table none.csv"), out
    assert "predicting 60 studies" in out and "an epoch of training" not in out
    edit_config(task_labels=["finding", "more"])
    status, out, _ = cli("check", "--model_name", "released", "--task", "defect")
    assert status == 1 and "has 1 outputs and the config has no task defect" in out
