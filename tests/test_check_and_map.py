"""`embed` by video and its map, and `check`: every fault planted in a small cohort is named."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import copy_example, write_embeddings
from PIL import Image
from scipy.spatial.distance import cdist
from test_commands import edit_config, published_model

import echofocus as ef
from report import figures


def by_hand(net, clips):
    """Study embedding (768,) of clips (N, 768) of the standard kind, by torch's own encoder."""
    with torch.no_grad():
        return net.encoder(torch.from_numpy(clips)[None]).mean(1)[0].numpy()


def test_video_embeddings(cohort, cli):
    """Each is what the model makes of that video alone; what cannot be read is listed."""
    published_model(cohort / "trained_models" / "defect", 1)
    (cohort / "emb" / "1003.hdf5").write_bytes(b"not HDF5")
    for options in ((), ("--batch_tokens", "1")):  # all of a study's at once, or one by one
        status, out, err = cli("embed", "--level", "video", *options)
        assert status == 0, err
        assert "1 studies left out" in out and "1003.hdf5" in out
        with h5py.File("trained_models/defect/video_embeddings_site_defect.h5") as f:
            assert len(f) == 59 and f.attrs["level"] == "video" and f.attrs["dataset"] == "site"
            found = {eid: group["embeddings"][:] for eid, group in f.items()}
            videos = {eid: group["videos"].asstr()[:].tolist() for eid, group in f.items()}
        folder = cohort / "trained_models" / "defect"
        net = ef.load_model(folder, ef.read_config("config.json")).net
        for eid in ("1000", "1001", "1059"):
            with h5py.File(cohort / "emb" / f"{eid}.hdf5") as f:
                bag, names = f["embeddings"][:], f["videos"].asstr()[:].tolist()
            assert videos[eid] == names and found[eid].shape == (len(bag), 768)
            for v, clips in enumerate(bag):
                np.testing.assert_allclose(found[eid][v], by_hand(net, clips), atol=1e-5)
    assert sum(map(len, found.values())) > 59  # several videos a study, then


def test_embedding_nothing_leaves_no_file(cohort, cli):
    published_model(cohort / "trained_models" / "defect", 1)
    for file in (cohort / "emb").iterdir():
        file.write_bytes(b"not HDF5")
    for level in ("study", "video"):
        status, _, err = cli("embed", "--level", level)
        assert status == 1 and "no study could be read" in err
    assert not list((cohort / "trained_models" / "defect").glob("*.h5"))


@pytest.fixture
def two_sites(cohort):
    """A model and two more datasets: `far`, off by a constant, and `near`, like `site`."""
    published_model(cohort / "trained_models" / "defect", 1)
    config = json.loads((cohort / "config.json").read_text())
    for name, offset in (("far", 0.4), ("near", 0.0)):
        rng = np.random.default_rng(len(name))
        for i in range(25):
            bag = rng.standard_normal((2, 4, 768)) + offset
            write_embeddings(cohort / name, f"{name}{i}", bag.astype(np.float32))
        config["dataset"][name] = {"embedding_path": name, "label_path": "none.csv"}
    config["dataset"]["like_near"] = {"embedding_path": "like_near"}
    for i in range(25):
        bag = np.random.default_rng(100 + i).standard_normal((2, 4, 768))
        write_embeddings(cohort / "like_near", f"l{i}", bag.astype(np.float32))
    (cohort / "config.json").write_text(json.dumps(config))
    return cohort / "trained_models" / "defect"


def drawn(path, colour, opacity=0.75):
    """Pixels of a PNG in the colour that a marker of some opacity has on white."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    image = np.asarray(Image.open(path).convert("RGB")).astype(float)
    return (np.abs(image - (opacity * rgb + (1 - opacity) * 255)).max(-1) < 8).sum()


def purity(points):
    """Share of studies whose nearest neighbour on the map is of the same dataset."""
    away = cdist(points[["x", "y"]], points[["x", "y"]])
    np.fill_diagonal(away, np.inf)
    names = points["dataset"].to_numpy()
    return (names[away.argmin(1)] == names).mean()


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_map_shows_a_shift_between_sites(two_sites, cli, method):
    line = ("embed", "--datasets", "near", "far", "--map", method)
    status, out, err = cli(*line)
    assert status == 0, err
    path = two_sites / f"map_{method}_near_far.csv"
    points = pd.read_csv(path)
    assert list(points) == ["eid", "dataset", "value", "x", "y"] and len(points) == 50
    assert (points["value"] == points["dataset"]).all() and "P0" not in path.read_text()
    assert purity(points) > 0.97
    assert "telling the datasets apart: AUROC 1.00" in out
    for colour in figures.OKABE_ITO[:2]:
        assert drawn(path.with_suffix(".png"), colour) > 300
    assert path.with_suffix(".pdf").stat().st_size > 5000
    assert cli(*line)[0] == 0
    pd.testing.assert_frame_equal(pd.read_csv(path), points)  # the same map again


def test_map_of_sites_alike_shows_none(two_sites, cli):
    status, out, err = cli("embed", "--datasets", "near", "like_near", "--map")
    assert status == 0, err
    auroc = float(out.split("AUROC ")[1].split()[0])
    assert 0.3 < auroc < 0.7
    assert purity(pd.read_csv(two_sites / "map_pca_near_like_near.csv")) < 0.75


def test_map_by_a_column(two_sites, cli):
    """A label, text and numbers; what is missing stays grey; positions do not depend on it."""
    table = pd.read_csv("labels.csv", dtype=str)
    table["machine"] = np.where(table.index % 2, "A", "B")
    table.loc[:9, "size"] = None
    table.to_csv("labels.csv", index=False)
    found = {}
    for column in ("finding", "machine", "size"):
        status, out, err = cli("embed", "--datasets", "site", "far", "--map", "--color_by", column)
        assert status == 0, err
        assert "no colours: no label table none.csv" in out
        found[column] = pd.read_csv(two_sites / f"map_pca_site_far_by_{column}.csv")
        site = found[column][found[column]["dataset"] == "site"].set_index("eid")["value"]
        wanted = table.set_index("eid")[column]
        if column == "machine":
            assert (site == wanted[site.index]).all()
        else:
            np.testing.assert_allclose(site, wanted[site.index].astype(float))
        png = two_sites / f"map_pca_site_far_by_{column}.png"
        assert drawn(png, figures.MISSING_GREY, 1) > 300
    for column in ("machine", "size"):
        np.testing.assert_array_equal(found[column][["x", "y"]], found["finding"][["x", "y"]])
    assert found["size"]["value"].isna().sum() == 35


def test_maps_that_cannot_be(two_sites, cli):
    for options, message in (
        (["--map", "--color_by", "findin"], "has no column 'findin'; did you mean finding"),
        (["--map", "--color_by", "pid"], "not shown by colour"),
        (["--map", "--level", "video"], "leave out --level video"),
        (["--map", "--sample_limit", "3"], "four studies"),
        (["--datasets", "near", "fa"], "no dataset fa; did you mean far"),
        (["--datasets", "near", "far", "--embed_file", "x.h5"], "--embed_file is one file"),
    ):
        status, _, err = cli("embed", *options)
        assert status == 1 and message in err and err.count("\n") == 1, (options, err)


# -------------------------------------------------------------------------------------------- check


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
        f"{y.sum()} of {len(y)} ({y.mean():.1%})" for y in (labels[split == f] for f in ef.FOLDS)
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


def drop_rows(n):
    pd.read_csv("labels.csv", dtype=str)[n:].to_csv("labels.csv", index=False)


def set_number(eid, value):
    with h5py.File(f"emb/{eid}.hdf5", "a") as f:
        f["embeddings"][0, 1, 2] = value


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
        lambda: edit_labels(finding={4: "yes"}),
        0,
        [
            ("WARNING", "1 values are no numbers: yes (study 1004)", "correct them"),
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
            ("ERROR", "no study is both labelled and embedded (eid: x0, x1", "agree"),
            ("WARNING", "60 studies of the label table", "extract"),
            ("WARNING", "60 embedded studies", "add"),
        ],
    ),
    "no label table": (
        lambda: edit_config(label_path="label.csv"),
        1,
        [("ERROR", "no label table label.csv", "set label_path")],
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
        [("WARNING", "1003.hdf5: 2 videos of shape (3, 512) with 2 names", "extract them again")],
    ),
    "NaN": (
        lambda: set_number(1003, np.nan),
        0,
        [("WARNING", "1003: 1003.hdf5 holds NaN", "extract them again")],
    ),
    "no file can be read": (
        lambda: [p.write_bytes(b"") for p in Path("emb").iterdir()],
        1,
        [("ERROR", "emb: 0 readable studies", "again"), ("WARNING", "60 studies cannot", "again")],
    ),
    "two encoders in one folder": (
        lambda: (set_encoder("aa"), set_encoder("bb", 2)),
        0,
        [("WARNING", "weights_sha256: aaaaaaaaaaaa (58 studies: 1002", "--redo")],
    ),
    "model of another encoder": (
        train_then_change_encoder,
        0,
        [
            (
                "WARNING",
                "defect was trained on embeddings of another encoder than those of 60",
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
        [("WARNING", "emb.packed is out of date and not used", "pack --dataset site")],
    ),
    "damaged pack": (
        lambda: (ef.main(["pack"]), Path("emb.packed/pack.json").write_text("{")),
        1,
        [("ERROR", "emb.packed is damaged", "delete it")],
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
def test_check_names_a_planted_fault(cohort, cli, capfd, fault):
    """Each with its level and remedy, nothing else, and the exit status that a run would have."""
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
