"""`check`: every planted fault is named, in the words in which a run names it."""

import hashlib
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
from helpers import copy_example, edit_config, published_model, write_embeddings

import echofocus as ef
from echofocus_core.base.options import FOLDS
from echofocus_core.study.training import Training
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
    for task, more in (("defect", options), ("sizes", ())):
        status, out, err = cli("check", "--task", task, *more)
        assert status == 0 and findings(out) == [] and "0 errors, 0 warnings" in out, out + err
        assert "60 studies of 40 patients" in out and "an epoch of training" in out
        if more:
            assert "1 skipped: still image" in out and "extraction of 1 videos: about" in out
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


def measure(low, high):
    """`finding` becomes a measurement: 50 to 60, its first value `low`, its last one `high`."""
    values = np.linspace(50, 60, 60).round(2).tolist()
    if low > 1e5 or high > 1e5:  # all of them far out
        values = np.linspace(low, high, 60).tolist()
    edit_labels(finding=dict(enumerate(map(repr, [low, *values[1:-1], high]))))


PARTS = {i: ("train", "train", "train", "val", "test")[i % 5] for i in range(60)}


def drop_rows(n):
    pd.read_csv("labels.csv", dtype=str)[n:].to_csv("labels.csv", index=False)


def set_number(eid, value):
    with h5py.File(f"emb/{eid}.hdf5", "a") as f:
        f["embeddings"][0, 1, 2] = value


def copy_study(eid, to):
    """A study's file, with the checksum that extraction writes, in place of another's."""
    with h5py.File(f"emb/{eid}.hdf5", "a") as f:
        names = f["videos"].asstr()[:].tolist()
        f.attrs["crc32"] = np.array([checksum(f["embeddings"][()], names)], np.uint32)
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

FAULTS = {  # how to plant it; exit status; each finding: its level, what it says, its remedy
    "missing label column": (
        lambda: edit_config(task_labels=["finding", "findin"]),
        1,
        [("ERROR", "labels.csv has no column 'findin'", "did you mean finding?")],
    ),
    "missing id column": (
        lambda: pd.read_csv("labels.csv").rename(columns={"pid": "id"}).to_csv("labels.csv"),
        1,
        [("ERROR", "no column 'pid'", "rename the column")],
    ),
    "repeated rows": (
        repeat_rows,
        0,
        [("WARNING", "3 rows repeat another one: 1000 (line 62)", "delete them")],
    ),
    "one study of two patients": (
        lambda: copy_study("1000", "1005"),
        1,
        [("ERROR", "2 studies of different patients are the same videos", "leave all but one out")],
    ),
    "one study of a patient twice": (
        lambda: copy_study("1000", "1040"),
        0,
        [("WARNING", "with the same embeddings: 1000 and 1040", "the videos count twice")],
    ),
    "a patient in two spellings": (
        lambda: edit_labels(pid={1: "p000"}),
        0,
        [("WARNING", "1 patients may be written in several ways: P000 and p000", "in one way")],
    ),
    "contradicting rows": (
        lambda: repeat_rows(pid="P777"),
        1,
        [("ERROR", "contradict each other for 3 studies: 1000 (line 2)", "keep one row a study")],
    ),
    "rows without id": (
        lambda: edit_labels(pid={3: None}),
        0,
        [("WARNING", "1 rows have no pid", "fill in"), ("WARNING", "not in the label", "add")],
    ),
    "not a number": (
        lambda: edit_labels(finding={4: "maybe"}),
        0,
        [
            ("WARNING", "1 values are no numbers: maybe (study 1004)", "correct them"),
            ("WARNING", "1 studies have no label at all: 1004", "fill them in"),
        ],
    ),
    "another class": (
        lambda: (edit_config(type="binary"), edit_labels(finding={4: "2"})),
        0,
        [
            ("WARNING", "1 values are not 0 or 1: 2 (study 1004)", "correct them"),
            ("WARNING", "1 studies have no label at all: 1004", "fill them in"),
        ],
    ),
    "another class makes it a regression": (
        lambda: edit_labels(finding={4: "2"}),
        0,
        [("WARNING", "a regression because of 2 (study 1004)", '"type": "binary"')],
    ),
    "out of range": (
        lambda: (edit_config(valid_range={"finding": [0, 1]}), edit_labels(finding={4: "-9"})),
        0,
        [
            ("WARNING", "1 values are out of range: -9 (study 1004)", "correct them"),
            ("WARNING", "1 studies have no label at all: 1004", "fill them in"),
        ],
    ),
    "constant label": (
        lambda: edit_labels(finding=dict.fromkeys(range(60), "1")),
        1,
        [
            ("WARNING", "label finding cannot be learnt: always 1", "add such studies"),
            ("ERROR", "no label can be learnt", "two values"),
        ],
    ),
    "labels without embeddings": (
        lambda: Path("emb/1007.hdf5").unlink(),
        0,
        [("WARNING", "1 studies of the label table have no embeddings: 1007", "extract them")],
    ),
    "embeddings without labels": (
        lambda: drop_rows(2),
        0,
        [
            (
                "WARNING",
                "2 embedded studies are not in the label table: 1000, 1001",
                "add their rows",
            )
        ],
    ),
    "no study on both sides": (
        lambda: edit_labels(eid={i: f"x{i}" for i in range(60)}),
        1,
        [
            ("WARNING", "60 studies of the label table", "extract"),
            ("WARNING", "60 embedded studies", "add"),
            ("ERROR", "no study is both labelled and embedded (eid: x0, x1", "agree"),
        ],
    ),
    "a row that would shift": (
        lambda: Path("labels.csv").write_text("pid,eid,finding\nP0,1000,1,\nP1,1001,0\n"),
        1,
        [("ERROR", "labels.csv, line 2 has 4 fields and the header 3", "needs quotes")],
    ),
    "decimals or thousands": (
        lambda: edit_labels(finding={4: "1,234"}),
        1,
        [
            ("ERROR", "labels.csv, finding: 1,234 (line 6) may be decimals", "decimal point"),
            ("WARNING", "1 values are no numbers: 1,234", "correct them"),
            ("WARNING", "1 studies have no label at all: 1004", "fill them in"),
        ],
    ),
    "ids that a spreadsheet cut": (
        lambda: edit_labels(pid={4: "1.2E+11"}),
        1,
        [("ERROR", "labels.csv, line 6: a spreadsheet has cut the pid to 1.2E+11", "as text")],
    ),
    "no row with its ids": (
        lambda: edit_labels(pid=dict.fromkeys(range(60), "nan")),
        1,
        [("ERROR", "labels.csv: 60 rows have no pid or no eid", "fill in")],
    ),
    "a code for missing": (
        lambda: edit_labels(finding={4: "999", 7: "-9"}),
        0,
        [
            ("WARNING", "finding: 97% of the values are 0 or 1", '"type": "binary"'),
            ("WARNING", "2 values look like a code for 'missing': 999 (study 1004), -9", "empty"),
        ],
    ),
    "one and two": (
        lambda: edit_labels(finding={i: str(1 + i % 2) for i in range(60)}),
        0,
        [("WARNING", "finding: every value is 1 or 2", "write 0 and 1")],
    ),
    "one and two in a binary task": (
        lambda: (
            edit_config(type="binary"),
            edit_labels(finding={i: "2" if i % 2 else "1" for i in range(60)}),
        ),
        1,
        [
            ("WARNING", "finding: every value is 1 or 2", "write 0 and 1"),
            ("WARNING", "30 values are not 0 or 1: 2 (study 1001)", "correct them"),
            ("WARNING", "30 studies have no label at all: 1001", "fill them in"),
            ("WARNING", "finding cannot be learnt: always 1", "add such studies"),
            ("ERROR", "no label can be learnt", "two values"),
        ],
    ),
    "above 100 %": (
        lambda: (edit_config(units={"finding": "%"}), measure(50, 140)),
        0,
        [("WARNING", "1 values are above 100 %: 140 (study 1059)", "correct")],
    ),
    "fractions among percentages": (
        lambda: (edit_config(units={"finding": "%"}), measure(0.55, 50)),
        0,
        [("WARNING", "1 values look like fractions among percentages: 0.55 (study 1000)", "use")],
    ),
    "values that no model could be loaded with": (
        lambda: measure(1, 1e300),
        1,
        [("ERROR", "label finding cannot be scaled: ", "another unit")],
    ),
    "a Box-Cox that does not exist": (
        lambda: (edit_config(boxcox=["finding"]), measure(1e6, 1e6 + 1e-3)),
        1,
        [("ERROR", "label finding cannot be scaled: ", "leave it out of boxcox")],
    ),
    "patients in two given folds": (
        lambda: (edit_config(split_column="part"), edit_labels(part=PARTS | {40: "val"})),
        1,
        [("ERROR", "part: 1 patients are in two folds (studies 1000, 1040)", "one fold")],
    ),
    "no label table": (
        lambda: edit_config(label_path="label.csv"),
        1,
        [("ERROR", "no label table label.csv", "mend its path")],
    ),
    "unreadable file": (
        lambda: Path("emb/1003.hdf5").write_bytes(b"not HDF5"),
        0,
        [
            (
                "WARNING",
                "1 studies cannot be read:\n           1003: 1003.hdf5",
                "extract them again",
            )
        ],
    ),
    "wrong width": (
        lambda: write_embeddings(Path("emb"), "1003", np.zeros((2, 3, 512), np.float32)),
        0,
        [("WARNING", "1003.hdf5: its numbers are of shape (2, 3, 512)", "extract them again")],
    ),
    "NaN": (
        lambda: set_number(1003, np.nan),
        0,
        [("WARNING", "1003: 1003.hdf5: it holds NaN", "extract them again")],
    ),
    "no file can be read": (
        lambda: [p.write_bytes(b"") for p in Path("emb").iterdir()],
        1,
        [("ERROR", "emb: 0 readable studies", "again"), ("WARNING", "60 studies cannot", "again")],
    ),
    "two encoders in one folder": (
        lambda: (set_encoder("aa"), set_encoder("bb", 2)),
        1,
        [("ERROR", "weights_sha256: aaaaaaaaaaaa (58 studies: 1002", "--redo")],
    ),
    "model of another encoder": (
        train_then_change_encoder,
        0,
        [
            (
                "WARNING",
                "defect was trained on embeddings of another encoder than those of",
                "aaaa",
            )
        ],
    ),
    "moved patient": (
        train_then_move,
        1,
        [
            (
                "ERROR",
                "gives 1 studies to other patients than when the model was",
                "restore the pids",
            )
        ],
    ),
    "damaged model": (
        damage_model,
        1,
        [("ERROR", "best_checkpoint.pt cannot be read safely", "train it anew")],
    ),
    "stale pack": (
        pack_then_add,
        0,
        [("WARNING", "emb.packed.h5 is out of date and not used", "run pack again")],
    ),
    "damaged pack": (
        lambda: (ef.main(["pack"]), Path("emb.packed.h5").write_text("{")),
        0,
        [("WARNING", "emb.packed.h5 is damaged", "run pack again")],
    ),
    "config typo": (
        lambda: edit_config(task_label=["finding"]),
        1,
        [("ERROR", "unknown key 'task_label'", "did you mean task_labels?")],
    ),
    "no embeddings folder": (
        lambda: shutil.move("emb", "gone"),
        1,
        [("ERROR", "no folder of clip embeddings emb", "embedding_path")],
    ),
    "empty DICOM": (
        lambda: write_videos(b"", b"text"),
        0,
        [("WARNING", "2 files cannot be used:\n           visit1/bad0.dcm: empty file", "export")],
    ),
    "no usable video": (
        lambda: (write_videos(b""), Path("videos/visit1/cine.dcm").unlink()),
        1,
        [("WARNING", "bad0.dcm: empty file", "export"), ("ERROR", "no usable video: visit1", "")],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_names_a_planted_fault(cohort, cli, capfd, monkeypatch, fault):
    """Each with its level and remedy, nothing else, and the exit status that a run would have."""
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
    found = findings(out)
    assert len(found) == len(expected), out
    for part, (level, text, remedy) in zip(found, expected, strict=True):
        assert part.startswith(level) and text in part and remedy in part.split("->")[1], out
    assert tree(cohort) == before


# A run ends later where nothing can be read, does not know how to get another model, and does not
# look at the headers of all videos before it begins.
NOT_OF_A_RUN = {"no file can be read", "damaged model", "empty DICOM", "no usable video"}
READ_LATE = {"unreadable file", "wrong width", "NaN"}  # when the epoch comes to it


@pytest.mark.parametrize("fault", [f for f in FAULTS if f not in NOT_OF_A_RUN])
def test_a_run_uses_the_same_words(cohort, cli, capfd, monkeypatch, fault):
    """What `check` finds in the config, labels, embeddings and folds, train or evaluate says."""
    plant, expected_status, expected = FAULTS[fault]
    plant()
    capfd.readouterr()
    if fault not in READ_LATE:
        monkeypatch.setattr(Training, "finished", True)
    of_a_model = Path("trained_models/defect/best_checkpoint.pt").is_file()
    line = ["evaluate"] if of_a_model else ["train", "--task", "defect", "--epoch_lim", "1"]
    status, out, err = cli(*line)
    assert status == expected_status, out + err
    errors = [(text, remedy) for level, text, remedy in expected if level == "ERROR"]
    if errors:
        assert err.count("\n") == 1 and errors[0][0] in err and errors[0][1] in err
        return
    assert out.count("WARNING: ") == len(expected), out
    for _, text, remedy in expected:
        after = " ".join(out.split()).split(" ".join(text.split()))[1]
        assert remedy in after.split("WARNING")[0]


def test_check_goes_on_after_an_error(cohort, cli):
    """Faults of every part are named in one go, an error in one does not hide the others."""
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
    """Prediction needs no label table: a warning; a task of another length is an error."""
    published_model(cohort / "trained_models" / "released", 1)
    edit_config(label_path="none.csv")
    status, out, _ = cli("check", "--model_name", "released", "--task", "defect")
    (part,) = findings(out)
    assert status == 0 and part.startswith("WARNING  no label table none.csv"), out
    assert "predicting 60 studies" in out and "an epoch of training" not in out
    edit_config(task_labels=["finding", "more"])
    status, out, _ = cli("check", "--model_name", "released", "--task", "defect")
    assert (
        status == 1
        and "has 1 outputs and the config (config.json) has no task defect with so" in out
    )


def test_check_says_when_the_disk_is_full(cohort, cli, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    status, out, _ = cli("check", "--task", "defect")
    assert status == 1 and len(findings(out)) == 2
    assert "ERROR    checkpoints in trained_models: 0.09 GB, 0.0 GB are free" in out
    assert "WARNING  a packed copy in ." in out
