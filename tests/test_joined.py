"""Datasets and models of two encoders."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import write_embeddings

import echofocus
from echofocus_core.base.console import UserError
from echofocus_core.base.options import Settings
from echofocus_core.study.network import build
from echofocus_core.video.joined import open_stores
from echofocus_core.video.store import FileRecord, UnreadableStudy, write_study

WIDTHS = {"first": 24, "second": 16}
CLIPS = {"first": 4, "second": 1}
KINDS = ("standard", "query", "multiquery", "mean", "mlp", "attentive", "abmil")
WITHOUT_SECOND, WITHOUT_FIRST = [f"S{i:03}" for i in range(0, 30, 3)], ["S001", "S004"]


@pytest.fixture(scope="module")
def two_encoders(tmp_path_factory):
    """200 studies whose label is the sign of a sum of two numbers, one in the embeddings of each
    encoder; some studies lack one encoder."""
    folder, rng = tmp_path_factory.mktemp("two"), np.random.default_rng(1)
    patterns, rows = {name: rng.standard_normal(width) for name, width in WIDTHS.items()}, []
    for i in range(200):
        eid, numbers, V = f"S{i:03}", rng.choice([-1, 1], 2) * rng.uniform(0.5, 2, 2), i % 3 + 1
        rows.append({"pid": f"P{i}", "eid": eid, "finding": int(numbers.sum() > 0)})
        missing = {"first": WITHOUT_FIRST, "second": WITHOUT_SECOND}
        for (name, width), number in zip(WIDTHS.items(), numbers, strict=True):
            if eid not in missing[name]:
                bag = 0.3 * rng.standard_normal((V, CLIPS[name], width)) + number * patterns[name]
                write_embeddings(folder / "emb" / name, eid, bag.astype(np.float32))
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    settings = {"learning_rate": 1e-2, "batch_number": 8, "epoch_lim": 6, "clip_dropout": 0.2}
    task = {"task_labels": ["finding"], "label_path": "labels.csv", "settings": settings}
    datasets = {name: f"emb/{name}" for name in WIDTHS}
    datasets |= {"both": list(datasets.values()), "swapped": [*datasets.values()][::-1]}
    datasets = {name: {"embedding_path": path} for name, path in datasets.items()}
    (folder / "config.json").write_text(json.dumps({"task": {"t": task}, "dataset": datasets}))
    return folder


@pytest.fixture
def here(two_encoders, tmp_path, monkeypatch):
    shutil.copytree(two_encoders, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(cli, dataset, name, *options):
    status, out, err = cli("train", "--dataset", dataset, "--model_name", name, *options)
    assert status == 0, err
    return out + err


def test_tokens_have_a_block_for_each_encoder(here):
    store = open_stores([Path("emb/first"), Path("emb/second")])
    first, second = store.parts.values()
    assert store.width(["S005"]) == [24, 16] and len(store.files) == 200
    joined, a, b = store.read("S005"), first.read("S005"), second.read("S005")
    V = len(a.videos)
    assert joined.videos == [f"first/{v}" for v in a.videos] + [f"second/{v}" for v in b.videos]
    assert joined.embeddings.shape == (2 * V, 4, 24 + 16 + 2)
    assert store.header("S005").width == 42 and store.size("S005") == 2 * V * 4
    of_a, of_b = joined.embeddings[:V], joined.embeddings[V:]
    assert np.array_equal(of_a[..., :24], a.embeddings) and not of_a[..., 24:40].any()
    repeated = np.repeat(b.embeddings, 4, axis=1)
    assert np.array_equal(of_b[..., 24:40], repeated) and not of_b[..., :24].any()
    assert (of_a[..., 40:] == [1, 0]).all() and (of_b[..., 40:] == [0, 1]).all()
    parts = joined.by_encoder()
    assert np.array_equal(parts[0].embeddings[..., :24], a.embeddings)
    assert parts[1].videos == [f"second/{v}" for v in b.videos]
    alone = store.read("S000")
    assert len(alone.by_encoder()[1].videos) == 0 and alone.embeddings.shape[1] == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_aggregator_reads_projected_tokens_with_types(kind, precision):
    torch.manual_seed(0)
    settings = Settings(transformer_type=kind)
    net = build(settings, 2, width=[24, 16]).eval()
    plain = build(settings, 2, width=24).eval()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k != "front.weight"})
    weight = net.front.weight.detach()
    a, b = torch.randn(5, 24), torch.randn(3, 16)
    tokens = torch.zeros(8, 42)
    tokens[:5, :24], tokens[5:, 24:40], tokens[:5, 40], tokens[5:, 41] = a, b, 1, 1
    projected = torch.cat(
        [a @ weight[:, :24].T + weight[:, 40], b @ weight[:, 24:40].T + weight[:, 41]]
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
        outputs, embeddings = net(tokens, [8])
        expected, _ = plain(projected, [8])
    assert embeddings.shape == (1, 24)
    tolerance = 1e-5 if precision == "fp32" else 0.05
    assert torch.allclose(outputs.float(), expected.float(), atol=tolerance)
    if precision == "fp32" and net.has_attention:
        assert torch.allclose(net.clip_shares(tokens), plain.clip_shares(projected), atol=1e-5)
    assert net.label_axes() == plain.label_axes()


def auroc(y, p):
    pairs = np.subtract.outer(p[y == 1], p[y == 0])
    return float(np.mean(np.sign(pairs) + 1) / 2)


def test_two_encoders_that_each_have_half_of_the_signal(here, cli):
    labels, scores = pd.read_csv("labels.csv", index_col="eid")["finding"], {}
    assert cli("pack", "--dataset", "both")[0] == 0  # faster to read
    for dataset in ("first", "second", "both"):
        out = train(cli, dataset, dataset, "--transformer_type", "mean")
        if dataset == "both":
            assert "10 studies have no clip embeddings of second" in out and "S027" in out
            assert "2 studies have no clip embeddings of first" in out and "S004" in out
        status, _, err = cli("predict", "--model_name", dataset, "--out", f"{dataset}.csv")
        assert status == 0, err
        table = pd.read_csv(f"{dataset}.csv", index_col="eid")
        split = pd.read_csv(f"trained_models/{dataset}/split.csv", index_col="eid")
        unseen = [eid for eid in split.index[split["fold"] != "train"] if eid in table.index]
        unseen = [eid for eid in unseen if eid not in WITHOUT_FIRST + WITHOUT_SECOND]
        scores[dataset] = auroc(labels[unseen].to_numpy(), table.loc[unseen, "finding"].to_numpy())
    assert scores["both"] > max(scores["first"], scores["second"]) + 0.1, scores
    assert len(table) == 200
    lacks = table["warning"].fillna("")
    assert set(lacks.index[lacks.str.contains("no clip embeddings of second")]) == set(
        WITHOUT_SECOND
    )
    assert set(lacks.index[lacks.str.contains("no clip embeddings of first")]) == set(WITHOUT_FIRST)
    record = torch.load("trained_models/both/best_checkpoint.pt", weights_only=True)["echofocus"]
    assert record["width"] == [24, 16] and list(record["encoders"]) == ["first", "second"]
    assert record["encoders"]["second"]["n_clips"] == 1

    whole = echofocus.predict(echofocus.load("both"), ["emb/first", "emb/second"])
    assert whole.set_index("eid")["finding"].to_numpy() == pytest.approx(table["finding"], abs=1e-6)
    with pytest.raises(UserError):
        echofocus.predict(echofocus.load("both"), np.ones((2, 4, 24)))

    for model, dataset in (("both", "first"), ("first", "both"), ("both", "swapped")):
        line = ("predict", "--model_name", model, "--dataset", dataset, "--out", "p.csv")
        status, _, err = cli(*line)
        assert status == 1 and err.count("\n") < 3 and "24 features" in err, err
    for options in (("--init_from", "first"), ("--init_from", "both", "--dataset", "swapped")):
        line = ("train", "--dataset", "both", "--model_name", "new", *options)
        status, _, err = cli(*line)
        assert status == 1 and "24 features" in err, err
    status, _, err = cli("predict", "--model_name", "both", "--videos", "emb", "--out", "p.csv")
    assert status == 1 and "first and second" in err


def test_every_command_works_on_two_encoders(here, cli):
    name = ("--model_name", "both")
    train(cli, "both", "both", "--transformer_type", "attentive", "--epoch_lim", 2)
    before = Path("trained_models/both/run.json").read_text()
    for line in (
        ("check", *name, "--dataset", "both"),
        ("evaluate", *name),
        ("embed", *name, "--map"),
        ("pack", "--dataset", "both"),
        ("predict", *name, "--spread", "clips", "--page", "--out", "p.csv"),
        ("inspect", "both"),
        ("explain", *name, "--sample_limit", 3, "--page"),
        ("explain", *name, "--sample_limit", 3, "--explain_method", "attention"),
        ("explain", *name, "--sample_limit", 3, "--explain_method", "shapley"),
        ("explain", *name, "--sample_limit", 3, "--baseline", "mean"),
        ("train", "--dataset", "both", *name, "--epoch_lim", 3, "--transformer_type", "attentive"),
    ):
        status, out, err = cli(*line)
        assert status == 0, (line, out, err)
    assert (here / "emb" / "second.packed.h5").exists()
    after = Path("trained_models/both/run.json").read_text()
    digests = [json.loads(x)["embeddings_sha256"] for x in (before, after)]
    assert digests[0] == digests[1]
    files = list(Path("trained_models/both").glob("explanation*.csv"))
    videos = {v for file in files for v in pd.read_csv(file).get("video", pd.Series(dtype=str))}
    assert {v.partition("/")[0] for v in videos} == {"first", "second"}
    errors = [pd.read_csv(file).get("convergence_error", pd.Series()).max() for file in files]
    assert np.nanmax(errors) < 0.01
    table = pd.read_csv("p.csv")
    assert table["finding_low"].notna().mean() > 0.9 and table["novelty"].between(0, 1).all()


def test_compare_with_joined_encoders(here, cli):
    status, _, err = cli(
        "compare", "--dataset", "first", "--aggregators", "mean", "--epoch_lim", 1,
        "--encoders", "first=emb/first", "both=emb/first,emb/second",
        "--perturbed", "both=emb/first,emb/second",
    )  # fmt: skip
    assert status == 0, err
    same = pd.read_csv("trained_models/t/perturbed.csv")
    assert set(same["encoder"]) == {"both"} and (same["value"] == 0).all()
    cells = pd.read_csv("trained_models/t/cells.csv").set_index("encoder")
    assert cells["width"].to_dict() == {"first": 24, "both": 42}


def test_a_damaged_file_makes_its_study_unreadable(here):
    path = Path("emb/second/S005.hdf5")
    path.write_bytes(path.read_bytes()[:100])
    store = open_stores([Path("emb/first"), Path("emb/second")])
    with pytest.raises(UnreadableStudy, match=r"S005 of S005\.hdf5"):
        store.read("S005")


def test_a_resumed_training_is_the_same_to_the_bit(here, cli):
    options = ("--seed", 3, "--max_videos_per_study", 3)
    train(cli, "both", "whole", *options, "--epoch_lim", 2)
    train(cli, "both", "parts", *options, "--epoch_lim", 1)
    train(cli, "both", "parts", *options, "--epoch_lim", 2)
    whole, parts = (
        torch.load(f"trained_models/{name}/last_checkpoint.pt", weights_only=True)
        for name in ("whole", "parts")
    )
    for name, tensor in whole["model_state_dict"].items():
        assert torch.equal(tensor, parts["model_state_dict"][name]), name
    assert "front.weight" in whole["model_state_dict"]


def test_studies_that_are_copies_for_one_encoder_are_reported(here):
    for eid in ("S101", "S102", "S103"):
        bag = np.full((1, 1, 16), 1 if eid == "S101" else 2, np.float32)
        videos = {"v.avi": (np.zeros(1, int), bag)}
        write_study(Path(f"emb/second/{eid}.hdf5"), videos, {}, {"v.avi": FileRecord()})
    store = open_stores([Path("emb/first"), Path("emb/second")])
    assert store.copies(list(store.files)) == [["S102", "S103"]]


def test_labels_of_videos_need_one_encoder(here, cli):
    config = json.loads(Path("config.json").read_text())
    config["task"]["t"]["level"] = "video"
    Path("config.json").write_text(json.dumps(config))
    pd.read_csv("labels.csv").assign(video="v00.avi").to_csv("labels.csv", index=False)
    status, _, err = cli("train", "--dataset", "both")
    assert status == 1 and "one embedding_path" in err, err


def test_odd_lists_of_folders_are_refused(here, cli):
    for path, text in (
        ([], "embedding_path"), (["emb/first", 3], "embedding_path"),
        (["emb/first", "emb/first"], "twice"), (["emb/first", "none"], "none"),
    ):  # fmt: skip
        config = json.loads(Path("config.json").read_text())
        config["dataset"]["both"]["embedding_path"] = path
        Path("config.json").write_text(json.dumps(config))
        status, _, err = cli("train", "--dataset", "both")
        assert status == 1 and text in err, (path, err)
