"""The command `compare`: encoders and aggregators on the same folds and unseen patients."""

import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from echofocus_core.base.files import lock, packed_path
from echofocus_core.video.store import open_folder, write_pack

LINE = ("compare", "--task", "t", "--n_boot", 200, "--epoch_lim", 8, "--learning_rate", "3e-3",
        "--batch_number", 16)  # fmt: skip


def write_cohort(folder, width, signal, n=240, seed=0):
    """Embeddings of n studies of 6 videos: in positive ones, one video has a pattern of one sign,
    and in negative ones, two videos have half of it, so that the mean tells nothing."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    truth = (np.arange(n) % 2 == 0).astype(int)
    for i in range(n):
        clips = rng.normal(size=(6, 2, width)).astype(np.float32)
        strength = 4.0 * signal
        if truth[i]:
            clips[0, :, :8] += strength
        else:
            clips[:2, :, :8] += strength / 2
        clips = clips[rng.permutation(6)]
        with h5py.File(folder / f"s{i}.hdf5", "w") as f:
            f["embeddings"] = clips
            names = [f"v{k}.avi" for k in range(6)]
            f.create_dataset("videos", data=names, dtype=h5py.string_dtype())
    write_pack(open_folder(folder), packed_path(folder), np.dtype("float32"))  # faster to read
    return truth


def write_config(truth, sex=None):
    table = pd.DataFrame({"pid": [f"p{i}" for i in range(len(truth))],
                          "eid": [f"s{i}" for i in range(len(truth))], "VSD": truth})  # fmt: skip
    table["sex"] = np.where(np.arange(len(truth)) % 3 == 0, "f", "m")
    table.to_csv("labels.csv", index=False)
    task = {"task_labels": ["VSD"], "type": "binary", "label_path": "labels.csv"}
    dataset = {"embedding_path": "emb"}
    Path("config.json").write_text(json.dumps({"task": {"t": task}, "dataset": {"d": dataset}}))


@pytest.fixture
def planted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(write_cohort(tmp_path / "emb", 32, 1.0))
    write_cohort(tmp_path / "weak", 32, 0.1)
    write_cohort(tmp_path / "noise", 16, 0.0)
    return tmp_path


def test_an_aggregator_that_sees_single_videos_beats_the_mean(planted, cli):
    """By at least 0.1 with an interval above 0; an encoder without signal does not."""
    status, _, err = cli(
        *LINE, "--aggregators", "mean", "standard", "--split", "50,20,30",
        "--encoders", "good=emb", "bad=noise", "--by", "sex", "--perturbed", "good=weak",
    )  # fmt: skip
    assert status == 0, err
    folder = Path("trained_models/t")
    cells = pd.read_csv(folder / "cells.csv").set_index(["encoder", "aggregator"])
    assert len(cells) == 4 and cells["n"].nunique() == 1
    assert cells.loc[("good", "standard"), "value"] > cells.loc[("good", "mean"), "value"] + 0.1
    rows = pd.read_csv(folder / "differences.csv")
    row = rows.query("encoder == 'good' and aggregator == 'standard' and minus == 'good_mean'")
    assert row["ci_low"].item() > 0 and row["p_holm"].item() < 0.05
    bad = rows.query("encoder == 'bad' and aggregator == 'standard' and minus == 'good_mean'")
    assert bad["ci_low"].item() < 0 or bad["value"].item() < 0
    assert (rows["p_holm"] >= rows["p_value"]).all()
    weaker = pd.read_csv(folder / "perturbed.csv").set_index("aggregator")
    assert weaker.loc["standard", "ci_high"] < 0 and set(weaker["encoder"]) == {"good"}
    groups = pd.read_csv(folder / "groups.csv")
    assert set(groups["group"]) == {"f", "m"}
    page = (folder / "comparison.html").read_text()
    assert "good" in page and "<img" in page and "http" not in page.replace("http-equiv", "")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.pt")}
    assert cli(*LINE, "--aggregators", "mean", "standard", "--split", "50,20,30",
               "--encoders", "good=emb", "bad=noise")[0] == 0  # fmt: skip
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.pt")} == before
    assert pd.read_csv(folder / "cells.csv").set_index(["encoder", "aggregator"]).equals(cells)
    refuses_other_data(cli, "--split", "50,20,30")


def refuses_other_data(cli, *options):
    """Finished models are neither kept for other labels or embeddings, nor used on those of another
    encoder."""
    line = (*LINE, "--aggregators", "mean", "standard", *options)
    status, _, err = cli(*line, "--encoders", "good=weak", "bad=noise")
    assert status == 1 and "different clip embeddings" in err, err
    labels = pd.read_csv("labels.csv")
    labels.assign(VSD=1 - labels["VSD"]).to_csv("labels.csv", index=False)
    status, _, err = cli(*line, "--encoders", "good=emb", "bad=noise")
    assert status == 1 and "different values of the labels" in err, err
    labels.to_csv("labels.csv", index=False)
    config = Path("config.json")
    for folder, text in (
        ("weak", "was trained on the clip embeddings in emb"),
        ("noise", "in emb"),
    ):
        config.write_text(config.read_text().replace('"emb"', f'"{folder}"'))
        status, _, err = cli("evaluate", "--model_name", "t/good_mean")
        assert status == 1 and text in err, err
        config.write_text(config.read_text().replace(f'"{folder}"', '"emb"'))
    given = ("--dataset", "d", "--embedding_path")
    status, _, err = cli("predict", "--model_name", "t/good_mean", *given, "noise")
    assert status == 1 and "32 features; noise has 16" in err, err
    assert cli("evaluate", "--model_name", "t/good_mean", *given, "emb")[0] == 0


def test_nobody_wins_without_a_signal(planted, cli):
    line = (*LINE, "--epoch_lim", 2, "--split", "50,20,30", "--encoders", "none=noise")
    log = "study,video,frames,seconds,encode_seconds,result,reason\ns0,a,9,1.5,2,ok,\n"
    Path("noise/extract_log.csv").write_text(log + "s0,b,9,0.5,1,ok,\ns1,a,9,1,2,ok,\n")
    status, _, err = cli(*line, "--aggregators", "mean", "standard", "attentive", "abmil")
    assert status == 0, err
    rows = pd.read_csv("trained_models/t/differences.csv")
    assert len(rows) in (3, 6) and (rows["p_holm"] > 0.05).all()
    assert (pd.read_csv("trained_models/t/cells.csv")["extract_seconds"] == 4).all()


def test_learning_curves_and_grids(planted, cli, monkeypatch):
    """Each share of the training patients has those of the smaller one; the grid's best model by
    validation loss represents its combination; array jobs share the work."""
    line = (*LINE, "--epoch_lim", 2, "--aggregators", "mean", "--fractions", "0.3", "1",
            "--grid", "batch_number=16,64", "--split", "60,20,20")  # fmt: skip
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    with lock(Path("trained_models/t/emb_mean_0.3/grid_0").absolute(), timeout=0):
        status, out, err = cli(*line)  # another process trains this one
    assert status == 0 and "emb_mean_0.3" in out.splitlines()[-1], (out, err)
    assert not Path("trained_models/t/cells.csv").exists()
    status, out, err = cli(*line)
    assert status == 0, err
    folder = Path("trained_models/t")
    cells = pd.read_csv(folder / "cells.csv")
    assert list(cells["fraction"]) == [0.3, 1.0]
    split = {
        name: pd.read_csv(folder / name / "grid_0" / "split.csv").set_index("pid")["fold"]
        for name in ("emb_mean_0.3", "emb_mean")
    }
    small, whole = (set(s.index[s == "train"]) for s in split.values())
    assert small < whole and 0.15 < len(small) / len(whole) < 0.45
    assert (folder / "learning_curves.png").is_file()
    losses = {
        k: pd.read_csv(folder / "emb_mean" / f"grid_{k}" / "train_losses.csv") for k in range(2)
    }
    least = min(x.filter(like="val").iloc[:, 0].min() for x in losses.values())
    assert cells["val_loss"].iloc[1] == pytest.approx(least, rel=1e-5)


def test_mistakes(planted, cli):
    line = (*LINE, "--epoch_lim", 1)
    assert cli(*line, "--aggregators", "mean", "--model_name", "done")[0] == 0
    page = Path("trained_models/done/comparison.html").read_text()
    assert "emb_mean was still falling when --epoch_lim 1" in page
    for options, text in (
        (("--aggregators", "mean", "--model_name", "done", "--seed", "5"), "seed was 0"),
        (("--aggregators", "mlp", "--model_name", "done"), "emb_mean"),
        (("--aggregators", "mean", "--model_name", "done", "--grid", "lr=1e-3,1e-4"), "without"),
        (("--encoders", "a=emb", "b=nowhere"), "nowhere"),
        (("--grid", "transformer_type=mean,mlp"), "--aggregators"),
        (("--encoders", "emb"), "panecho=emb/p"),
        (("--fractions", "2"), "--fractions"),
        (("--fractions", "1e-9", "--model_name", "no"), "fraction of the patients above 1e-09"),
        (("--perturbed", "other=noise"), "--perturbed"),
        (("--aggregators", "median"), "--aggregators"),
    ):
        status, _, err = cli(*line, *options)
        assert status in (1, 2) and text in err, err


def test_models_of_a_comparison_are_named_as_in_its_table(planted, cli):
    assert cli(*LINE, "--epoch_lim", 1, "--aggregators", "mean", "--grid", "lr=1e-3")[0] == 0
    (name,) = pd.read_csv("trained_models/t/cells.csv")["model"]
    assert name == "t/emb_mean/grid_0"
    for line in (("predict", "--model_name", name, "--out", "p.csv"), ("inspect", name)):
        status, _, err = cli(*line)
        assert status == 0, err
