"""Baseline aggregators, and embeddings of any width."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from echofocus_core.base.options import Settings
from echofocus_core.study.network import build, n_heads

BASELINES = ("mean", "mlp", "attentive", "abmil")
WIDTH = 48
LENGTHS = [1, 5, 12]


def network(kind, **options):
    torch.manual_seed(3)
    return build(Settings(transformer_type=kind, **options), 2, width=WIDTH).eval()


def softmax(x):
    e = np.exp(x - x.max(0))
    return e / e.sum(0)


def slow_answer(state, kind, x):
    """The outputs (2,) for the clips x (N, WIDTH) of one study, clip by clip in float64."""
    p = {name: value.double().numpy() for name, value in state.items()}

    def linear(name, y):
        return p[f"{name}.weight"] @ y + p[f"{name}.bias"]

    if kind == "mean":
        pooled = sum(x) / len(x)
    elif kind == "mlp":
        z = linear("hidden.0", sum(x) / len(x))
        pooled = np.array([0.5 * v * (1 + torch.erf(torch.tensor(v / 2**0.5)).item()) for v in z])
    elif kind == "attentive":
        keys = np.array([linear("key", clip).reshape(16, -1) for clip in x])
        values = np.array([linear("value", clip).reshape(16, -1) for clip in x])
        query = p["query"].reshape(16, -1)
        parts = []
        for head in range(16):
            weights = softmax(keys[:, head] @ query[head] / np.sqrt(WIDTH / 16))
            parts.append(weights @ values[:, head])
        pooled = linear("out", np.concatenate(parts))
    else:
        scores = []
        for clip in x:
            gate = 1 / (1 + np.exp(-linear("gate", clip)))
            scores.append(linear("weight", np.tanh(linear("content", clip)) * gate)[0])
        pooled = softmax(np.array(scores)) @ x
    return linear("ff", pooled)


@pytest.mark.parametrize("kind", BASELINES)
def test_baselines_against_a_slow_version(kind):
    net = network(kind)
    x = torch.randn(sum(LENGTHS), WIDTH)
    with torch.no_grad():
        outputs, embeddings = net(x, LENGTHS)
    assert embeddings.shape == (3, WIDTH)
    studies = np.split(x.double().numpy(), np.cumsum(LENGTHS)[:-1])
    for study, row in zip(studies, outputs, strict=True):
        assert row.numpy() == pytest.approx(slow_answer(net.state_dict(), kind, study), abs=1e-5)


@pytest.mark.parametrize("kind", ["standard", "multiquery", *BASELINES])
def test_a_model_of_single_clips_averages_their_outputs(kind):
    net = network(kind, video_sampling="one")
    x = torch.randn(sum(LENGTHS), WIDTH)
    with torch.no_grad():
        outputs, embeddings = net(x, LENGTHS)
        each = net(x, [1] * len(x))
    for k, (got, rows) in enumerate(zip((outputs, embeddings), each, strict=True)):
        expected = torch.stack([part.mean(0) for part in rows.split(LENGTHS)])
        assert torch.allclose(got, expected, atol=1e-5), k


def test_shares_of_clips():
    for kind in ("attentive", "abmil"):
        shares = network(kind).clip_shares(torch.randn(7, WIDTH))
        assert shares.shape == (1, 7) and float(shares.sum()) == pytest.approx(1)


def test_heads_divide_the_width():
    assert [n_heads(w) for w in (768, 512, 1024, 1408, 384, 770, 7)] == [6, 8, 8, 8, 8, 7, 7]


# ------------------------------------------------------------------------------- the command line


def narrow(folder):
    """Keep the first WIDTH features of every file of a folder of embeddings."""
    for path in folder.glob("*.hdf5"):
        with h5py.File(path, "r+") as f:
            numbers = f["embeddings"][..., :WIDTH]
            del f["embeddings"]
            f["embeddings"] = numbers


@pytest.fixture
def narrow_cohort(cohort):
    shutil.copytree(cohort / "emb", cohort / "wide")
    narrow(cohort / "emb")
    return cohort


@pytest.mark.parametrize("kind", ["standard", "abmil"])
def test_another_width_from_training_to_explanation(narrow_cohort, cli, kind):
    line = ("train", "--task", "defect", "--epoch_lim", 2, "--transformer_type", kind)
    status, _, err = cli(*line)
    assert status == 0, err
    (model,) = Path("trained_models").iterdir()
    saved = torch.load(model / "best_checkpoint.pt", weights_only=True)
    assert saved["echofocus"]["width"] == WIDTH
    name = ("--model_name", model.name)
    assert cli("pack", "--dataset", "outside")[0] in (0, 1)
    status, _, err = cli("predict", *name, "--spread", "clips", "--out", "p.csv")
    assert status == 0, err
    table = pd.read_csv("p.csv")
    assert len(table) and table.filter(like="_low").notna().to_numpy().all()
    for command in (("evaluate",), ("embed", "--map"), ("explain", "--sample_limit", 2)):
        status, _, err = cli(*command, *name)
        assert status == 0, (command, err)


def test_other_widths_are_refused(narrow_cohort, cli):
    assert cli("train", "--task", "defect", "--epoch_lim", 1)[0] == 0
    (model,) = Path("trained_models").iterdir()
    config = json.loads(Path("config.json").read_text())
    config["dataset"]["wide"] = {"embedding_path": "wide"}
    Path("config.json").write_text(json.dumps(config))
    name = ("--model_name", model.name, "--dataset", "wide")
    status, out, err = cli("predict", *name, "--out", "p.csv")
    assert status == 1 and "768" in out + err and str(WIDTH) in out + err
    shutil.copy(next(Path("wide").iterdir()), Path("emb") / "other.hdf5")
    first = next(Path("wide").iterdir()).name
    shutil.copy(Path("wide") / first, Path("emb") / first)
    status, _, err = cli("train", "--task", "defect", "--run_id", "mixed", "--epoch_lim", 1)
    assert status == 1 and "768" in err and str(WIDTH) in err
