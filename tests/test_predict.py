"""`predict`: decisions, warnings, what is left out, files that are not replaced."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import copy_example, normal, write_embeddings

from echofocus_core.study.config import Record
from echofocus_core.study.input_check import InputReport
from echofocus_core.study.job import Job
from echofocus_core.study.loading import read_checkpoint
from echofocus_core.study.loop import Results
from echofocus_core.study.models import LoadedModel
from echofocus_core.study.network import StudyModel
from echofocus_core.study.outputs import Outputs
from echofocus_core.study.predictions import prediction_table
from echofocus_core.video import panecho
from echofocus_core.video.store import EmbeddingFolder


def table(path="trained_models/defect/predictions_site.csv"):
    return pd.read_csv(path, dtype={"eid": str}, keep_default_na=False).set_index("eid")


def test_no_row_is_blank_without_a_reason(trained, cli, monkeypatch):
    """A study whose answer is NaN is left out with the reason, without a decision."""
    read = EmbeddingFolder.read

    def poisoned(self, eid, rng=None):
        bag = read(self, eid, rng)
        if eid == "1003":
            bag.embeddings[0, 0, 0] = np.nan
        return bag

    monkeypatch.setattr(EmbeddingFolder, "read", poisoned)
    status, out, _ = cli("predict", "--out", "p.csv")
    assert status == 0 and "1003: the model gives no number" in out
    assert "1003" not in table("p.csv").index and len(table("p.csv")) == 59
    assert pd.read_csv("p_left_out.csv", dtype=str)["eid"].tolist() == ["1003"]


def test_one_answer_that_is_not_a_number_is_blank_with_a_warning():
    net = StudyModel(2)
    record = Record(labels=["a", "b"], thresholds={"a": 0.5, "b": 0.4})
    model = LoadedModel(Path("m"), net, "t", Outputs.of(["a", "b"], "binary"), None, record, {})
    results = Results(["x", "y"], np.float32([[2, np.nan], [-1, 1]]), None, [], [1, 1], [4, 4])
    rows, left_out = prediction_table(model, results, InputReport({"x": "odd"}))
    assert left_out == {} and rows["warning"].tolist() == ["odd; b: no number", ""]
    assert rows["b_decision"].isna().tolist() == [True, False] and rows["b_decision"][1] == 1
    assert rows["a_decision"].tolist() == [1, 0] and (rows["b_threshold"] == 0.4).all()


def test_out_that_is_a_folder(trained, cli, monkeypatch):
    """The error comes before any computation."""
    monkeypatch.setattr(Job, "with_source", lambda *_: pytest.fail("too late"))
    for out in (".", "emb"):
        status, _, err = cli("predict", "--out", out)
        assert status == 1 and f"{out} is a folder" in err
    for out in ("p.xlsx", "p.parquet"):
        status, _, err = cli("predict", "--out", out)
        assert status == 1 and f"{out}: predictions are written as CSV" in err


def test_outputs_replace_no_input(trained, cli, monkeypatch):
    """The error comes before any computation; an option may replace its earlier output."""
    assert cli("predict", "--out", "p.csv")[0] == 0
    Path("q_left_out.csv").write_text("mine\n")
    Path("r_page").mkdir()
    Path("r_page/index.html").write_text("<!doctype html><html>mine")
    folder = "trained_models/defect"
    lines = [["embed", "--embed_file"], ["inspect", "defect", "--json"]]
    for line, out in zip(lines, ("e.h5", "d.json"), strict=True):
        assert cli(*line, out)[0] == 0 and cli(*line, out)[0] == 0
    files = ["labels.csv", "config.json", "emb/1000.hdf5", f"{folder}/best_checkpoint.pt"]
    cases = [(line, x) for line in [["predict", "--out"], *lines] for x in files]
    cases += [(["predict", "--page", "--out"], x) for x in (f"{folder}/split.csv", "r.csv")]
    cases += [(["predict", "--out"], x) for x in ("e.h5", "q.csv")]
    whole = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with monkeypatch.context() as patched:
        patched.setattr(Job, "with_source", lambda *_: pytest.fail("too late"))
        for line, out in cases:
            status, _, err = cli(*line, out)
            assert status == 1 and "exists and is not" in err and err.count("\n") == 1, (line, out)
    assert whole == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert cli("predict", "--out", "p.csv")[0] == 0


def test_ids_are_written_unchanged(trained, cli):
    os.rename("emb/1000.hdf5", "emb/-A7.hdf5")
    assert cli("predict", "--out", "p.csv")[0] == 0
    assert "-A7" in table("p.csv").index


def test_decisions_at_the_threshold_of_the_validation_fold(trained, cli):
    """The cut with the largest sensitivity + specificity, found here by trying all."""
    assert cli("predict")[0] == 0
    saved = read_checkpoint(Path("trained_models/defect/best_checkpoint.pt"))["echofocus"]
    threshold = saved["thresholds"]["finding"]
    predicted = table()
    decided = predicted["finding_decision"] == 1
    assert (decided == (predicted["finding"] >= threshold)).all() and 0 < decided.mean() < 1
    split = pd.read_csv("trained_models/defect/split.csv", dtype=str).set_index("eid")["fold"]
    truth = pd.read_csv("labels.csv", dtype={"eid": str}).set_index("eid")["finding"]
    val = split.index[split == "val"]
    assert predicted["finding_threshold"].unique() == pytest.approx([threshold], rel=1e-5)
    y, p = truth[val].to_numpy(), predicted.loc[val, "finding"].to_numpy(float)

    def youden(cut):
        return (p[y == 1] >= cut).mean() + (p[y == 0] < cut).mean()

    assert youden(threshold) == pytest.approx(max(youden(cut - 1e-6) for cut in p))


def test_input_unlike_the_training_input_is_marked_in_the_table(trained, cli):
    with h5py.File("emb/1003.hdf5", "a") as f:
        f["embeddings"][...] *= 3
    status, out, _ = cli("predict")
    assert status == 0 and "WARNING: 1 study is unlike the training data of defect" in out
    warned = table()["warning"]
    assert "norm of clip embeddings" in warned["1003"] and (warned != "").sum() == 1


def test_a_repeated_video_is_marked(trained, cli):
    """In the column warning; the study is not unlike the training data."""
    with h5py.File("emb/1003.hdf5") as f:
        bag = f["embeddings"][:]
    write_embeddings(Path("emb"), "1003", np.concatenate([bag, bag[:1] * np.float32(1.001)]))
    assert cli("predict")[0] == 0
    warned = table()["warning"]
    assert f"1 video almost the same as others: v{len(bag):02}.avi and v00.avi" in warned["1003"]
    assert not warned.drop("1003").str.contains("almost").any()


def test_an_absurd_weight_is_reported(add_model, cli):
    """By the range of the training fold, and without a record of it by the scaling."""
    path = add_model("sizes", "--epoch_lim", "2") / "best_checkpoint.pt"
    add_model("defect", "--epoch_lim", "2")
    saved = read_checkpoint(path)
    sizes = pd.read_csv("labels.csv")["size"]
    low, high = saved["echofocus"]["ranges"]["size"]
    assert sizes.min() <= low < high <= sizes.max()
    assert cli("predict", "--task", "sizes", "--out", "p.csv")[0] == 0
    assert not table("p.csv")["warning"].str.contains("far beyond").any()
    for bias, ranges in ((3e38, {"size": (low, high)}), (30, {"size": (low, high)}), (3e38, {})):
        saved["model_state_dict"]["ff.bias"][:] = bias
        saved["echofocus"]["ranges"] = ranges
        torch.save(saved, path)
        status, out, err = cli("predict", "--task", "sizes", "--out", "p.csv")
        assert status == 0 and "WARNING: 60 answers of size are far beyond" in out, err
        assert table("p.csv")["warning"].str.contains("size: far beyond the training data").all()


def test_a_negative_size_is_reported(add_model, cli):
    """No value of the training fold is negative, by its record or by the published scaling."""
    path = add_model("sizes", "--epoch_lim", "2") / "best_checkpoint.pt"
    add_model("defect", "--epoch_lim", "2")
    saved = read_checkpoint(path)
    scaling = saved["input_norm_dict"]["size"]
    saved["model_state_dict"]["ff.weight"][:] = 0
    saved["model_state_dict"]["ff.bias"][:] = (
        -(scaling["mean"] - scaling["shift"] + 0.1) / scaling["stdev"]
    )
    for ranges in (saved["echofocus"]["ranges"], {}):
        saved["echofocus"]["ranges"] = ranges
        torch.save(saved, path)
        assert cli("predict", "--task", "sizes", "--out", "p.csv")[0] == 0
        values = table("p.csv")
        assert values["size [cm]"].astype(float).to_numpy() == pytest.approx(-0.1, abs=1e-3)
        assert values["warning"].str.contains("size: .*negative").all()


def test_another_clip_length_is_marked(cohort, cli):
    for path in Path("emb").iterdir():
        with h5py.File(path, "a") as f:
            f.attrs["clip_len"] = 16
    assert cli("train", "--task", "defect", "--epoch_lim", "1")[0] == 0
    with h5py.File("emb/1005.hdf5", "a") as f:
        f.attrs["clip_len"] = 32
    assert cli("pack")[0] == 0 and cli("predict")[0] == 0
    assert table()["warning"]["1005"] == "clip_len is 32, but 16 in training"


def test_units_and_what_cannot_be_read(cohort, cli):
    assert cli("train", "--task", "sizes", "--epoch_lim", "1")[0] == 0
    Path("emb/1003.hdf5").write_bytes(b"not HDF5")
    status, out, _ = cli("predict", "--out", "p.csv")
    assert status == 0 and "1003.hdf5" in out
    columns = ["n_videos", "n_clips", "size [cm]", "novelty", "warning"]
    assert list(table("p.csv")) == columns
    assert cli("predict", "--out", "q.csv", "--spread", "clips")[0] == 0
    assert list(table("q.csv")) == [*columns[:3], "size_low [cm]", "size_high [cm]", *columns[3:]]
    left_out = pd.read_csv("p_left_out.csv", dtype=str)
    assert left_out["eid"].tolist() == ["1003"] and "1003.hdf5" in left_out["reason"][0]
    Path("emb/1004.hdf5").unlink()
    status, out, _ = cli("predict", "--out", "p.csv")
    assert status == 0 and "1004: no embeddings" in out
    assert set(pd.read_csv("p_left_out.csv", dtype=str)["eid"]) == {"1003", "1004"}


def test_options_without_effect_are_refused(trained, cli):
    status, _, err = cli("predict", "--videos", "emb", "--dataset", "site")
    assert status == 1 and "give only one" in err
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        status, _, err = cli("predict")
        assert status == 1 and "leave out torchrun" in err
    status, _, err = cli("predict", "--mask", "sector")
    assert status == 1 and "--mask is for videos" in err
    Path("config.json").unlink()
    Path("visits").mkdir()
    for options, text in (((), "no label table: give it"), (("--label_path", "x.csv"), "x.csv")):
        status, _, err = cli("evaluate", "--videos", "visits", *options)
        assert status == 1 and text in err and "--label_path" in err, err


def test_panecho_readings_from_stored_embeddings(tmp_path, monkeypatch, cli):
    """The full model on the clips, averaged over clips and videos; no video is read again."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "trained_models" / "PanEcho"
    folder.mkdir(parents=True)
    torch.save({"weights": panecho.random_weights()}, folder / "panecho.pt")
    model = panecho.load_panecho("random", clip_len=4).model
    clips = torch.from_numpy(normal(3, 6, 3, 4, 32, 32))  # two studies: 2 and 1 videos of 2 clips
    with torch.inference_mode():
        embeddings, outputs = model.encoder(clips).numpy(), model(clips)
    write_embeddings(tmp_path / "emb", "a", embeddings[:4].reshape(2, 2, 768))
    write_embeddings(tmp_path / "emb", "b", embeddings[4:].reshape(1, 2, 768), "published")
    (tmp_path / "emb" / "b_trim_embed.hdf5").rename(tmp_path / "emb" / "b.hdf5")
    task = {"x": {"task_labels": ["y"]}}
    config = {"task": task, "dataset": {"site": {"embedding_path": "emb"}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, _, err = cli("predict", "--model_name", "PanEcho", "--out", "p.csv")
    assert status == 0, err
    results = pd.read_csv("p.csv").set_index("eid")
    for eid, rows in (("a", slice(0, 4)), ("b", slice(4, 6))):
        mean = {name: out[rows].mean(0).tolist() for name, out in outputs.items()}
        row = results.loc[eid]
        assert row["EF [%]"] == pytest.approx(mean["EF"][0], rel=1e-4)
        assert row["E|EAvg"] == pytest.approx(mean["E|EAvg"][0], rel=1e-4)
        assert row["AVStenosis: Severe"] == pytest.approx(mean["AVStenosis"][2], rel=1e-4)
        assert row["AVStructure: Bicuspid"] == pytest.approx(mean["AVStructure"][0], rel=1e-4)
        assert row["LVWallMotionAbnormalities: Present"] == pytest.approx(
            mean["LVWallMotionAbnormalities"][0], rel=1e-4
        )
        assert row["LVOT20mmHg"] == pytest.approx(mean["LVOT20mmHg"][0], rel=1e-4)
    assert len(results.columns) == 2 + sum(out.shape[1] for out in outputs.values()) + 1
    status, _, err = cli("embed", "--model_name", "PanEcho")
    with h5py.File(folder / "embeddings_site_panecho.h5") as f:
        np.testing.assert_allclose(f["a"][:], embeddings[:4].mean(0), rtol=1e-4, atol=1e-6)
    assert status == 0, err


def test_grandchildren_are_not_tested_on_what_an_ancestor_learnt(cohort, cli):
    line = ("train", "--task", "defect", "--epoch_lim", "1", "--split", "30,35,35")
    assert cli(*line, "--model_name", "a")[0] == 0
    assert cli(*line, "--model_name", "b", "--init_from", "a", "--seed", "1")[0] == 0
    status, out, err = cli(*line, "--model_name", "c", "--init_from", "b", "--seed", "3")
    assert status == 0 and "left out" in out, err
    splits = [pd.read_csv(f"trained_models/{m}/split.csv") for m in ("a", "b", "c")]
    learnt = set().union(*(set(s["pid"][s["fold"] == "train"]) for s in splits[:2]))
    held = splits[2]["fold"].isin(["val", "test"])
    assert held.any() and not learnt & set(splits[2]["pid"][held])


def test_studies_without_a_learnable_label_do_not_count(cohort, cli):
    """A label that is constant in training is not a target of the validation either."""
    labels = pd.read_csv("labels.csv", dtype={"eid": str})
    assert cli("train", "--task", "defect", "--epoch_lim", "1", "--run_id", "a")[0] == 0
    split = pd.read_csv("trained_models/defect_a/split.csv", dtype=str).set_index("eid")["fold"]
    fold = labels["eid"].map(split)
    labels["rare"] = (fold == "val").astype(int)
    labels.loc[fold == "val", "finding"] = np.nan
    labels.to_csv("labels.csv", index=False)
    config = json.loads(Path("config.json").read_text())
    config["task"]["defect"]["task_labels"] = ["finding", "rare"]
    Path("config.json").write_text(json.dumps(config))
    status, _, err = cli("train", "--task", "defect", "--epoch_lim", "1", "--run_id", "b")
    assert status == 1 and "no study of the val fold has a label that can be learnt" in err


def test_a_dataset_that_has_videos_and_no_embeddings(trained, cli):
    """As the published configs name them; extracted once, and found again by the next command."""
    for i, eid in enumerate(("1000", "77")):
        (trained / "films" / f"{eid}_trim").mkdir(parents=True)
        copy_example(trained / "films" / f"{eid}_trim" / "a.dcm", study=f"1.2.{i}")
    config = json.loads((trained / "config.json").read_text())
    config["dataset"]["film"] = {"embedding_path": "not_yet", "video_base_path": "films"}
    (trained / "config.json").write_text(json.dumps(config))
    options = ("--dataset", "film", "--weights", "random", "--size", "56", "--n_clips", "1")
    status, out, err = cli("check", "--task", "defect", "--dataset", "film")
    assert "2 studies, 2 videos; predict" in out, err
    status, out, err = cli("predict", "--task", "defect", *options)
    assert status == 0 and "2 studies extracted" in out, err
    assert list(table("trained_models/defect/predictions_film.csv").index) == ["1000", "77"]
    status, out, err = cli("explain", "--task", "defect", *options, "--subset", "all")
    assert status == 0 and "2 already there" in out, err


def test_a_part_of_the_studies_does_not_replace_the_whole_table(trained, cli):
    assert cli("predict")[0] == 0 and len(table()) == 60
    assert cli("predict", "--sample_limit", "3")[0] == 0 and len(table()) == 60
    assert len(table("trained_models/defect/predictions_site.sample_limit-3.csv")) == 3
