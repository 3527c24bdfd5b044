"""Embeddings and labels in the files of other projects."""

import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from echofocus_core.base.console import UserError
from echofocus_core.video.store import UnreadableStudy, open_store

D = 24


@pytest.fixture
def mimic(tmp_path, monkeypatch):
    """40 studies of 30 patients as one array of clips, with a label, a split and a config.

    The studies' clips are not next to each other; the label is in the first feature.
    """
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    study = np.repeat(np.arange(40), rng.integers(2, 6, 40))
    rng.shuffle(study)
    patient = 10000000 + study % 30
    truth = (rng.random(30) < 0.5).astype(int)[study % 30]
    clips = rng.normal(size=(len(study), D)).astype(np.float32)
    clips[:, 0] += 3 * truth
    folder = Path("mimic")
    (folder / "labels").mkdir(parents=True)
    paths = [f"s3://x/files/p{p}/s{s}/{s}_{i:04}.dcm" for i, (p, s) in
             enumerate(zip(patient, 90000000 + study, strict=True))]  # fmt: skip
    np.savez(folder / "panecho.npz", embeddings=clips, labels=np.zeros(len(study)),
             paths=np.full(len(study), ""))  # fmt: skip
    np.savez(folder / "clip_index.npz", s3_paths=np.array(paths), patient_ids=patient,
             study_ids=90000000 + study)  # fmt: skip
    rows = np.flatnonzero(study < 38)
    np.savez(folder / "labels" / "death.npz", indices=rows, labels=truth[rows].astype(float))
    folds = {str(p): ("train", "val", "test")[int(p % 10 > 5) + int(p % 10 > 7)]
             for p in np.unique(patient)}  # fmt: skip
    (folder / "patient_split.json").write_text(json.dumps(folds))
    dataset = {
        "embedding_path": "mimic/panecho.npz", "label_path": "mimic/labels/death.npz",
        "split_path": "mimic/patient_split.json",
    }  # fmt: skip
    task = {"task_labels": ["death"], "type": "binary"}
    Path("config.json").write_text(json.dumps({"task": {"t": task}, "dataset": {"m": dataset}}))
    return study, clips, truth, folds


def test_an_array_of_clips(mimic):
    study, clips, *_ = mimic
    store = open_store(Path("mimic/panecho.npz"))
    assert len(store.files) == 40
    for i in (0, 17, 39):
        got = store.read(str(90000000 + i))
        assert np.array_equal(got.embeddings[:, 0], clips[study == i])
        assert got.embeddings.shape == ((study == i).sum(), 1, D)
        assert all(x.startswith(f"{90000000 + i}_") for x in got.videos)


def test_the_array_is_trained_and_predicted(mimic, cli):
    """From .npz files alone; the folds are those of the JSON file, and a pack gives the same."""
    study, _, truth, folds = mimic
    assert cli("check")[0] == 0
    line = ("train", "--epoch_lim", 40, "--learning_rate", "1e-3", "--transformer_type", "mean")
    status, _, err = cli(*line)
    assert status == 0, err
    (model,) = Path("trained_models").iterdir()
    split = pd.read_csv(model / "split.csv", dtype=str).set_index("eid")
    assert len(split) == 38
    assert all(folds[row.pid] == row.fold for row in split.itertuples())
    assert cli("predict", "--out", "p.csv")[0] == 0
    table = pd.read_csv("p.csv", dtype={"eid": str}).set_index("eid")
    labels = pd.Series(truth, study).groupby(level=0).first()
    labels.index = (90000000 + labels.index).astype(str)
    tested = split.index[split["fold"] == "test"]
    right = (table.loc[tested, "death"] > 0.5) == (labels[tested] == 1)
    assert right.mean() > 0.8
    assert cli("evaluate")[0] == 0
    assert cli("pack")[0] == 0
    assert cli("predict", "--out", "q.csv")[0] == 0
    assert np.allclose(pd.read_csv("q.csv")["death"], pd.read_csv("p.csv")["death"], atol=1e-6)


def test_faults_of_an_array(mimic, cli):
    np.savez("mimic/labels/death.npz", indices=[0, 10**6], labels=[0.0, 1.0])
    status, _, err = cli("train")
    assert status == 1 and "death.npz" in err and "rows" in err
    study = mimic[0]
    np.savez("mimic/labels/death.npz", indices=range(len(study)), labels=range(len(study)))
    status, _, err = cli("train")
    assert status == 1 and "different labels" in err
    np.savez_compressed("mimic/panecho.npz", embeddings=np.ones((len(study), D), np.float32))
    with pytest.raises(UserError, match="compressed"):
        open_store(Path("mimic/panecho.npz"))
    np.savez("mimic/panecho.npz", embeddings=np.ones((3, D), np.float32))
    with pytest.raises(UserError, match="3 rows"):
        open_store(Path("mimic/panecho.npz"))
    np.savez("mimic/clip_index.npz", study_ids=np.array([object()] * 3), patient_ids=[1, 2, 3])
    with pytest.raises(UserError, match=r"clip_index.npz"):
        open_store(Path("mimic/panecho.npz"))


def test_more_faults_of_an_array(mimic, cli):
    """Each is one line, before any patient is assigned to another one's study."""
    study = mimic[0]
    folder, ids = Path("mimic"), 90000000 + study
    split = json.loads((folder / "patient_split.json").read_text())
    first = next(iter(split))
    text = json.dumps(split)[:-1] + f', "{first}": "test", "{first}": "train"}}'
    (folder / "patient_split.json").write_text(text)
    status, _, err = cli("train")
    assert status == 1 and first in err and "two folds" in err
    np.savez(folder / "clip_index.npz", study_ids=ids, patient_ids=study[:-1])
    with pytest.raises(UserError, match="length"):
        open_store(folder / "panecho.npz")
    whole = (folder / "panecho.npz").read_bytes()
    (folder / "panecho.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated"):
        open_store(folder / "panecho.npz")


def test_rows_of_one_path_are_clips_of_a_video(tmp_path):
    x = np.arange(6 * D, dtype=np.float32).reshape(6, D)
    np.savez(tmp_path / "x.npz", embeddings=x)
    paths = ["a/2.dcm", "a/1.dcm", "a/1.dcm", "a/2.dcm", "b/1.dcm", "b/2.dcm"]
    np.savez(tmp_path / "clip_index.npz", study_ids=np.array([7.0] * 4 + [8.0] * 2),
             patient_ids=[1] * 6, s3_paths=paths)  # fmt: skip
    store = open_store(tmp_path / "x.npz")
    assert list(store.files) == ["7", "8"]
    got = store.read("7")
    assert got.videos == ["1.dcm", "2.dcm"] and np.array_equal(got.embeddings[1], x[[0, 3]])


def test_files_of_videos(tmp_path):
    rng = np.random.default_rng(1)
    arrays = {("a", "v1"): rng.normal(size=D), ("a", "v2"): rng.normal(size=D)}
    for (eid, video), x in arrays.items():
        (tmp_path / eid).mkdir(exist_ok=True)
        np.save(tmp_path / eid / f"{video}.npy", x.astype(np.float32))
    pooled = torch.randn(D)
    frames = torch.randn(3, D).half()
    torch.save(
        {"video_id": "x", "embedding_per_frame": frames, "embedding_pooled": pooled},
        tmp_path / "b.pt",
    )
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "1.pt").touch()
    (tmp_path / "a" / "._v1.npy").touch()
    (tmp_path / "c").mkdir()
    np.save(tmp_path / "c" / "1.npy", np.ones((2, D)))
    np.save(tmp_path / "c" / "2.npy", np.ones((3, D)))
    store = open_store(tmp_path)
    assert list(store.files) == ["a", "b", "c", "d"]
    with pytest.raises(UnreadableStudy, match="truncated"):
        store.read("d")
    got = store.read("a")
    assert got.videos == ["v1", "v2"]
    assert np.allclose(got.embeddings[1, 0], arrays["a", "v2"], atol=1e-6)
    assert np.array_equal(store.read("b").embeddings[0, 0], pooled.numpy())
    with pytest.raises(UnreadableStudy, match="different shapes"):
        store.read("c")


class Code:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_no_code_runs_from_a_file_of_a_video(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("e").mkdir()
    torch.save({"embedding_pooled": Code()}, "e/a.pt")
    np.save("e/b.npy", np.array([Code()]), allow_pickle=True)
    store = open_store(Path("e"))
    for eid in "ab":
        with pytest.raises(UnreadableStudy):
            store.read(eid)
    assert not Path("ran").exists()


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_of_embeddings(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow")
    rng = np.random.default_rng(2)
    table = pd.DataFrame(rng.normal(size=(6, D)), columns=[f"f{i}" for i in range(D)])
    table.insert(0, "video", ["v2", "v1", "v1", "v2", "x", "y"])
    table.insert(0, "eid", ["7", "7", "7", "7", "8", "8"])
    path = tmp_path / f"e{suffix}"
    table.to_csv(path, index=False) if suffix == ".csv" else table.to_parquet(path)
    store = open_store(path)
    got = store.read("7")
    assert got.videos == ["v1", "v2"] and got.embeddings.shape == (2, 2, D)
    assert np.allclose(got.embeddings[0], table.iloc[[1, 2], 2:].to_numpy(float), atol=1e-5)
    assert store.read("8").embeddings.shape == (2, 1, D)


def test_lists_of_videos(tmp_path, monkeypatch, cli):
    """The patient and the study are in the path; z-scores become the unit of the measurement."""
    monkeypatch.chdir(tmp_path)
    rng, ef = np.random.default_rng(3), {}
    Path("emb").mkdir()
    Path("lvef").mkdir()
    for fold, pids in (("train", range(0, 20)), ("val", range(20, 26)), ("test", range(26, 32))):
        lines = []
        for pid in pids:
            eid = 90000000 + pid
            ef[str(eid)], fraction = fold, rng.normal()
            for k in range(2):
                path = f"files/p10/p100000{pid:02}/s{eid}/{eid}_{k:04}.mp4"
                lines.append(f"{path} {fraction:.6f}")
            with h5py.File(f"emb/{eid}.hdf5", "w") as f:
                numbers = rng.normal(size=(2, 1, D)).astype(np.float32)
                numbers[:, :, 0] = fraction
                f["embeddings"] = numbers
                f.create_dataset("videos", data=["a", "b"], dtype=h5py.string_dtype())
        Path(f"lvef/{fold}.csv").write_text("\n".join(lines) + "\n")
    Path("lvef/zscore_params.json").write_text('{"target_mean": 55.0, "target_std": 10.0}')
    task = {"task_labels": ["lvef"], "type": "regression", "units": {"lvef": "%"}}
    dataset = {"embedding_path": "emb", "label_path": "lvef"}
    Path("config.json").write_text(json.dumps({"task": {"t": task}, "dataset": {"m": dataset}}))
    status, _, err = cli("train", "--epoch_lim", 1, "--transformer_type", "mean")
    assert status == 0, err
    (model,) = Path("trained_models").iterdir()
    split = pd.read_csv(model / "split.csv", dtype=str).set_index("eid")
    assert dict(split["fold"]) == ef
    status, _, err = cli("evaluate")
    assert status == 0, err
    saved = next(Path("trained_models").rglob("saveout*.csv"))
    truths = pd.read_csv(saved)["lvef_Correct"]
    assert truths.min() > 30 and truths.max() < 80
    Path("lvef/val.csv").write_text("p2/s90000020/video1.mp4 0.5\n")
    status, _, err = cli("train", "--run_id", "again")
    assert status == 1 and "val.csv, line 1" in err
    pattern = r"p(?P<pid>\d+)/s(?P<eid>\d+)/"
    status, _, err = cli("check", "--path_pattern", pattern)
    assert "val.csv, line 1" not in err
