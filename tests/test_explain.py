"""Attribution: against recorded numbers, brute force, and what scores must add up to."""

import json
import os
import subprocess
import sys
from itertools import combinations
from math import factorial
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import (
    ROOT,
    by_rule,
    copy_example,
    normal,
    published_model,
    recorded,
    relative_error,
    study,
    write_embeddings,
)

import echofocus as ef
from echofocus_core.base.options import Settings
from echofocus_core.report.page_labels import by_importance
from echofocus_core.study import attribution
from echofocus_core.study.attribution import Objectives, attribute_clips, explain_study
from echofocus_core.study.outputs import label_of, losses_of_outputs
from echofocus_core.video.store import open_store


def attributed(
    net, bag, columns=(0,), targets=None, kind="binary", baseline=None, mean=None, **options
):
    def losses(logits, targets, columns):
        return losses_of_outputs(logits, targets, [label_of("x", kind)] * len(columns))

    objectives = Objectives(list(columns), targets, losses)
    return attribute_clips(net, np.asarray(bag), Settings(**options), objectives, baseline, mean)


def test_published_integrated_gradients():
    """With the published quadrature (64 right Riemann steps) the published attributions."""
    numbers, net = recorded("study_parity.npz"), by_rule(n_outputs=22)
    published = dict(explain_method="riemann_right", explain_steps=64)
    actual = attributed(net, study(2), **published)
    clips = numbers["ig/A/2/attributions"].sum(2)
    assert relative_error(actual.scores[0], clips) < 1e-4
    assert relative_error(actual.absolute[0], numbers["ig/A/2/sum_abs"]) < 1e-4
    assert relative_error(actual.scores[0].sum(1), numbers["ig/A/2/sum"]) < 1e-4
    loss = attributed(net, study(2), targets=np.array([1.0]), **published)
    assert relative_error(loss.absolute[0], numbers["ig/A/2/loss_bce_y1_sum_abs"]) < 1e-4


MODELS = [
    dict(n_outputs=3),
    dict(n_outputs=3, depth=3),
    dict(n_outputs=3, depth=0),
    dict(n_outputs=3, combine="max"),
    dict(n_outputs=3, kind="query"),
    dict(n_outputs=3, kind="multiquery", depth=2),
]


@pytest.mark.parametrize("model", MODELS)
def test_scores_add_up_to_the_change_in_the_answer(model):
    """From zero and from another baseline, for all labels at once, on models by rule."""
    net, bag = by_rule(**model), study(1)[:, :6]
    for baseline in (None, torch.from_numpy(normal(7, 768))):
        actual = attributed(net, bag, range(3), baseline=baseline)
        start = torch.zeros(768) if baseline is None else baseline
        tokens = bag.flatten(0, 1)
        change = net(tokens, [12])[0] - net(start.expand(12, 768), [12])[0]
        missed = abs(actual.scores.sum((1, 2)) - change[0].numpy())
        assert (missed / abs(actual.scores.sum(2)).sum(1) < 0.011).all() and (
            actual.error < 0.01
        ).all()


def test_the_substitution_of_the_path():
    """Each video's score against Captum's own engine along alpha = u^5, 64 Gauss-Legendre nodes."""
    from captum.attr import IntegratedGradients

    net, bag = by_rule(n_outputs=22), study(2)[:, :8]
    actual = attributed(net, bag, [0, 5])
    x = bag.flatten(0, 1)

    def fifth_power(y):
        return net((y * (y / x).nan_to_num() ** 4).flatten(0, 1), [len(x)] * len(y))[0]

    for k, column in enumerate((0, 5)):
        expected = IntegratedGradients(fifth_power).attribute(
            x[None], target=column, n_steps=64, method="gausslegendre", internal_batch_size=8
        )
        expected = expected[0].view(bag.shape).sum((1, 2)).numpy()
        assert relative_error(actual.scores[k].sum(1), expected) < 0.02


def test_leave_one_out_is_the_change_without_the_video():
    net, bag = by_rule(n_outputs=4, depth=2), study(2)[:, :3]
    actual = attributed(net, bag, [1, 3], explain_method="leave_one_out", batch_tokens=40)
    whole = net(bag.flatten(0, 1), [21])[0][0, [1, 3]]
    for v in range(7):
        rest = torch.cat([bag[:v], bag[v + 1 :]]).flatten(0, 1)
        expected = whole - net(rest, [18])[0][0, [1, 3]]
        np.testing.assert_allclose(actual.scores[:, v].sum(1), expected, atol=1e-5)
    np.testing.assert_allclose(actual.absolute, abs(actual.scores.sum(2)), atol=1e-6)


def by_all_subsets(net, bag, mean):
    """Shapley values (V, T) by their definition."""
    V, scores = len(bag), np.zeros((len(bag), len(mean)))

    def value(videos):
        x = bag[list(videos)].flatten(0, 1)
        return (net(x, [len(x)])[0][0] if len(x) else mean).double().numpy()

    for v in range(V):
        for n in range(V):
            for rest in combinations([i for i in range(V) if i != v], n):
                weight = factorial(n) * factorial(V - n - 1) / factorial(V)
                scores[v] += weight * (value(sorted([*rest, v])) - value(rest))
    return scores


@pytest.mark.parametrize("V", [1, 2, 5, 7])
def test_shapley_values(V, monkeypatch):
    """Against the sum over all subsets: exact, and by sampling within 4 standard errors; they add
    up to the change from the answer for no videos."""
    net, bag, mean = by_rule(n_outputs=3, depth=2), study(2)[:V, :2], torch.tensor([0.3, -1, 2])
    expected, answer = by_all_subsets(net, bag, mean), net(bag.flatten(0, 1), [2 * V])[0][0]
    options = dict(explain_method="shapley", mean=mean, batch_tokens=20, batch_size=3)
    for most in (V, 0):
        monkeypatch.setattr(attribution, "MAX_EXACT", most)
        actual = attributed(net, bag, range(3), **options)
        scores, error = actual.scores.sum(2).T, actual.standard_error.T
        np.testing.assert_allclose(scores.sum(0), answer - mean, atol=1e-5)
        assert (abs(scores - expected) <= 4 * error + 1e-5).all()
        assert (error.max(0) <= 0.05 * abs(scores).sum(0)).all() and (most == 0 or not error.any())


def test_shapley_values_depend_on_the_videos_not_on_their_order():
    net, bag, mean = by_rule(n_outputs=2), study(2)[:, :2], torch.zeros(2)
    first = attributed(net, bag, range(2), explain_method="shapley", mean=mean)
    order = [3, 0, 6, 2, 5, 1, 4]
    second = attributed(net, bag[order], range(2), explain_method="shapley", mean=mean)
    assert len(bag) == 7 > attribution.MAX_EXACT and first.standard_error.any()
    np.testing.assert_array_equal(first.scores[:, order], second.scores)


class RandomGames(torch.nn.Module):
    """Independent random answers to each subset of 7 videos, whose clips are one-hot."""

    n_outputs = 300

    def __init__(self):
        super().__init__()
        self.answers = torch.nn.Parameter(torch.from_numpy(normal(3, 128, self.n_outputs)))

    def forward(self, tokens, lengths):
        subsets = torch.stack([x.sum(0) for x in tokens.split(lengths)])
        return self.answers[(subsets @ 2.0 ** torch.arange(7)).long()], tokens


def test_standard_errors_of_few_permutations(monkeypatch):
    """They are not too small, although permutations are added only until they are small."""
    monkeypatch.setattr(attribution, "PRECISE", np.inf)
    net, bag = RandomGames().requires_grad_(False), torch.eye(7)[:, None]
    mean = net.answers[0]
    expected = by_all_subsets(net, bag, mean)
    actual = attributed(net, bag, range(300), explain_method="shapley", mean=mean)
    missed = abs(actual.scores.sum(2).T - expected) / actual.standard_error.T
    assert (missed > 3).mean() < 0.04  # of two pairs, 20 %


def test_shapley_values_of_the_loss():
    net, bag, mean = by_rule(n_outputs=1), study(2)[:4, :2], torch.tensor([0.5])
    options = dict(explain_method="shapley", mean=mean, targets=np.array([1.0]))
    change = -torch.nn.functional.logsigmoid(net(bag.flatten(0, 1), [8])[0])
    change += torch.nn.functional.logsigmoid(mean)
    scores = attributed(net, bag, **options).scores
    np.testing.assert_allclose(scores.sum(), change.item(), atol=1e-5)


class LargestClip(torch.nn.Module):
    """The answer is the largest first feature of a study's clips."""

    n_outputs = 1

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens, lengths):
        largest = [x[:, 0].max() for x in tokens.split(lengths)]
        return torch.stack(largest)[:, None], tokens


@pytest.mark.parametrize("V", [5, 12])
def test_videos_with_the_same_finding_share_it(V):
    """Leave-one-out gives both nothing; Shapley values give each half of it."""
    bag = torch.zeros(V, 2, 4)
    bag[[1, 3], :, 0] = 4
    bag[:, :, 1] = torch.arange(V)[:, None]
    assert not attributed(LargestClip(), bag, explain_method="leave_one_out").scores.any()
    actual = attributed(LargestClip(), bag, explain_method="shapley", mean=torch.zeros(1))
    scores, error = actual.scores[0].sum(1), actual.standard_error[0]
    assert (abs(scores[[1, 3]] - 2) <= 4 * error[[1, 3]] + 1e-6).all()
    assert abs(np.delete(scores, [1, 3])).max() < 1e-6 and scores.sum() == pytest.approx(4)
    without = np.where(np.arange(V) == 0, 3.9, 4.0)  # the page shows both first all the same
    x = SimpleNamespace(scores=scores, fault="", answer=4.0, without=without)
    assert set(by_importance(x)[:2]) == {1, 3}
    assert by_importance(SimpleNamespace(**vars(x) | {"fault": "no study has it"}))[0] == 0


@pytest.mark.parametrize("model", MODELS)
def test_attention_rollout(model):
    """Against torch's own modules: their weights, half of each the residual, multiplied."""
    net, bag = by_rule(**model), study(1)[:, :5]
    actual = attributed(net, bag, range(3), explain_method="attention").scores
    n_queries = 0 if net.queries is None else len(net.queries)
    x = bag.flatten(0, 1) if not n_queries else torch.cat([net.queries, bag.flatten(0, 1)])
    flow = torch.eye(len(x))
    for layer in net.encoder.layers if net.depth else [None]:
        mha = layer.self_attn if layer else net.encoder
        _, weights = mha(x[None], x[None], x[None], need_weights=True)
        flow = (weights[0] + torch.eye(len(x)) if layer else weights[0]) @ flow
        x = layer(x[None])[0] if layer else x
    rows = flow[:n_queries] if n_queries else flow.mean(0, keepdim=True)
    shares = rows[:, n_queries:] / rows[:, n_queries:].sum(1, keepdim=True)
    assert relative_error(actual, shares.expand(3, -1).view(3, 2, 5)) < 1e-4


# ------------------------------------------------------------------------------------- the command


def test_explain_needs_no_labels(tmp_path, monkeypatch, cli):
    """A released model on a dataset without a label table: the published scores per video."""
    monkeypatch.chdir(tmp_path)
    labels = recorded("labels.json")["chd"]
    config = {"task": {"chd": {"task_labels": labels}}, "dataset": {"x": {"embedding_path": "emb"}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_embeddings(tmp_path / "emb", "s2", normal(102, 7, 16, 768), "published")
    published_model(tmp_path / "trained_models/EchoFocus_CHD", 22)
    options = ("--explain_method", "riemann_right", "--explain_steps", "64")
    status, _, err = cli("explain", "--explain_tasks", "ASD", *options)
    assert status == 0, err
    actual = pd.read_csv(
        "trained_models/EchoFocus_CHD/explanation_test_x.labels-ASD.riemann_right.csv"
    ).sort_values("video")
    numbers = recorded("study_parity.npz")
    assert relative_error(actual["score_abs"], numbers["ig/A/2/sum_abs"]) < 1e-4
    assert relative_error(actual["score"], numbers["ig/A/2/sum"]) < 1e-4
    assert actual["video"].iloc[0] == "v00.avi"  # no absolute path
    assert "y_true" not in actual and (actual["score_unit"] == "log-odds").all()


FOLDER = Path("trained_models/defect")


def table(name, folder=FOLDER):
    return pd.read_csv(folder / name, dtype={"eid": str, "echo_id": str})


def test_no_choice_overwrites_another(trained, cli):
    lines = (
        ("--explain_method", "leave_one_out"),
        ("--explain_method", "leave_one_out", "--explain_mode", "loss"),
        ("--eids", "1000"),
        ("--eids", "1000", "--baseline", "mean"),
        ("--select", "confident", "--sample_limit", "1"),
    )
    before = {}
    for line in lines:
        status, _, err = cli("explain", *line)
        assert status == 0, err
        now = {p.name: p.stat().st_mtime_ns for p in FOLDER.glob("explanation_*")}
        assert len(now) == len(before) + 3 and before.items() <= now.items(), line
        before = now


def test_columns_of_the_long_table(trained, cli):
    """The answer without each video and at the baseline, by predicting those studies."""
    assert cli("explain")[0] == 0
    actual = table("explanation_test_site.csv").set_index("eid")
    labels = pd.read_csv("labels.csv", dtype={"eid": str}).set_index("eid")["finding"]
    assert (actual["y_true"] == labels[actual.index]).all()
    assert (actual["convergence_error"] < 0.01).all()
    logit = np.log(actual[["prediction", "baseline"]] / (1 - actual[["prediction", "baseline"]]))
    change = (logit["prediction"] - logit["baseline"]).groupby(level=0).first()
    sums = actual["score"].groupby(level=0).agg(["sum", lambda x: x.abs().sum()])
    assert ((change - sums["sum"]).abs() < 0.01 * sums.iloc[:, 1] + 1e-3).all()
    model = ef.load("defect")
    store = open_store(Path("emb"))
    eid = next(eid for eid in actual.index if len(store.read(eid).videos) == 3)
    bag = store.read(eid)
    for video, row in actual.loc[eid].set_index("video").iterrows():
        rest = bag.embeddings[[v != video for v in bag.videos]]
        answer = ef.predict(model, {"x": rest})["finding"][0]
        assert row["without"] == pytest.approx(answer, rel=1e-4)
    alone = actual[actual.groupby(level=0)["video"].transform("size") == 1]
    assert len(alone) and alone["without"].isna().all()
    with h5py.File(FOLDER / "explanation_test_site.clips.h5") as f:
        assert f[eid]["scores"].shape == (1, 3, 4)
        scores = dict(zip(f[eid]["videos"].asstr()[:], f[eid]["scores"][0].sum(1), strict=True))
    by_video = actual.loc[eid].set_index("video")["score"]
    assert by_video.to_dict() == pytest.approx(scores, rel=1e-4)


def test_scores_of_a_measurement_are_in_its_unit(add_model, cli):
    """A baseline outside the training labels, which no study has, is reported."""
    folder = add_model("sizes", "--epoch_lim", "2")
    status, out, err = cli("explain")
    assert status == 0, err
    actual = table("explanation_test_site.csv", folder)
    split = pd.read_csv(folder / "split.csv", dtype=str).set_index("eid")["fold"]
    labels = pd.read_csv("labels.csv", dtype={"eid": str}).set_index("eid")["size"]
    low, high = labels[split.index[split == "train"]].agg(["min", "max"])
    outside = ~actual["baseline"].between(low, high)
    assert outside.any() and (actual["score_warning"].notna() == outside).all()
    assert "size: scores start from an answer that no training study has" in out + err
    saved = torch.load(folder / "best_checkpoint.pt", weights_only=True)
    del saved["mean_answers"]
    torch.save(saved, folder / "best_checkpoint.pt")
    bag = open_store(Path("emb")).read("1000").embeddings
    rows = ef.explain(ef.load("sizes"), bag, explain_method="shapley")
    mean = labels[split.index[split == "train"]].mean()
    assert rows["baseline"].to_numpy() == pytest.approx(mean) and not rows["score_warning"].any()
    assert label_of("EF", "regression").score_unit(
        {"EF": {"apply_boxcox": False, "stdev": 9}}, "%"
    ) == (9, "points")
    change = actual.groupby("eid")[["prediction", "baseline"]].first()
    sums = actual.groupby("eid")["score"].agg(["sum", lambda x: x.abs().sum()])
    assert (actual["score_unit"] == "cm").all()
    missed = (change["prediction"] - change["baseline"] - sums["sum"]).abs()
    assert (missed < 0.01 * sums.iloc[:, 1] + 1e-3).all()


def test_unlabelled_studies_are_explained(trained, cli):
    """A new study, of no label table, is of the test fold; labels only add the truth."""
    write_embeddings(Path("emb"), "new", normal(5, 3, 4, 768))
    assert cli("explain")[0] == 0
    actual = table("explanation_test_site.csv").groupby("eid")["y_true"].first()
    assert np.isnan(actual["new"]) and actual.drop("new").notna().all()
    split = pd.read_csv(FOLDER / "split.csv", dtype=str)
    assert set(actual.index) == {*split["eid"][split["fold"] == "test"], "new"}


def test_selections(trained, cli):
    assert cli("predict")[0] == 0
    rows = pd.read_csv(FOLDER / "predictions_site.csv", dtype={"eid": str}).set_index("eid")
    truth = pd.read_csv("labels.csv", dtype={"eid": str}).set_index("eid")["finding"]
    split = pd.read_csv(FOLDER / "split.csv", dtype=str).set_index("eid")["fold"]
    logit = np.log(rows["finding"] / (1 - rows["finding"]))
    cut = rows["finding_threshold"].iloc[0]
    margin = (logit - np.log(cut / (1 - cut))).abs()
    test = margin.index[margin.index.map(split) == "test"]

    def chosen(select):
        for old in FOLDER.glob("explanation_*"):
            old.unlink()
        status, _, err = cli("explain", "--select", select, "--sample_limit", "4")
        assert status == 0, err
        (path,) = FOLDER.glob(f"explanation_test_site.{select}-????????.csv")
        return table(path.name)["eid"].unique().tolist()

    assert chosen("confident") == margin[test].nlargest(4).index.tolist()
    wrong = test[rows.loc[test, "finding_decision"] != truth[test]]
    assert chosen("wrong") == margin[wrong].nlargest(4).index.tolist()
    assert truth[chosen("balanced")].tolist() == [1, 0, 1, 0]
    status, _, err = cli("explain", "--eids", "100")
    assert status == 1 and "no study 100 in site; did you mean 10" in err


def test_a_stopped_run_resumes(trained, cli, monkeypatch):
    """The same tables to the last bit, and no study is explained twice."""
    assert cli("explain")[0] == 0
    names = ["explanation_test_site.csv", "explanation_test_site.explain_n-5.mode-pred.csv"]
    whole = {name: (FOLDER / name).read_bytes() for name in names}
    explain, asked = explain_study, []

    def stops(model, eid, *args, **kwargs):
        asked.append(eid)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return explain(model, eid, *args, **kwargs)

    monkeypatch.setattr("echofocus_core.study.explanations.explain_study", stops)
    assert cli("explain")[0] == 130
    status, out, err = cli("explain")
    assert status == 0 and "resuming after 4 studies" in out, err
    assert len(asked) == len(set(asked)) + 1
    assert whole == {name: (FOLDER / name).read_bytes() for name in names}
    assert not list(FOLDER.glob(".*journal"))


def test_shapley_values_start_from_the_mean_answer_in_training(trained, cli):
    """Or from that of the study's single videos, where the checkpoint does not have it."""
    model, store = ef.load("defect"), open_store(Path("emb"))
    split = pd.read_csv(FOLDER / "split.csv", dtype=str)
    bags = [store.read(eid).embeddings for eid in split["eid"][split["fold"] == "train"]]
    answers = [model.net(torch.tensor(x).flatten(0, 1), [x[..., 0].size])[0] for x in bags]
    mean = torch.cat(answers).sigmoid().mean().item()
    assert model.mean_answer.sigmoid().item() == pytest.approx(mean, abs=1e-5)
    status, _, err = cli("explain", "--explain_method", "shapley")
    assert status == 0, err
    rows = table("explanation_test_site.shapley.csv")
    assert (rows["baseline_name"] == "the mean answer in the training fold").all()
    assert rows["score_warning"].isna().all()
    np.testing.assert_allclose(rows["baseline"], mean, rtol=1e-4)
    assert (rows["standard_error"] >= 0).all() and (rows["score_unit"] == "points").all()
    points = 100 * mean + rows.groupby("eid")["score"].transform("sum")
    np.testing.assert_allclose(100 * rows["prediction"], points, atol=1e-3)
    saved = torch.load(FOLDER / "best_checkpoint.pt", weights_only=True)
    del saved["mean_answers"]
    torch.save(saved, FOLDER / "best_checkpoint.pt")
    bag = next(x for x in bags if len(x) > 1)
    singles = [model.net(torch.tensor(x), [len(x)])[0].sigmoid().item() for x in bag]
    actual = ef.explain(ef.load("defect"), bag, explain_method="shapley")
    assert "single videos" in actual["baseline_name"][0]
    assert actual["baseline"][0] == pytest.approx(np.mean(singles), rel=1e-4)
    expected = by_all_subsets(
        lambda x, n: (model.net(x, n)[0].sigmoid(),),
        torch.tensor(bag),
        torch.tensor([np.mean(singles)]),
    )[:, 0]
    np.testing.assert_allclose(
        actual["score"], 100 * expected[np.argsort(-abs(expected))], rtol=1e-4
    )
    assert cli("train", "--task", "defect", "--epoch_lim", "2")[0] == 0  # it is finished
    np.testing.assert_array_equal(ef.load("defect").mean_answer, model.mean_answer)


def test_the_mean_baseline_is_refused_where_it_is_unknown(trained, cli):
    assert cli("explain", "--baseline", "mean")[0] == 0
    model, store = ef.load("defect"), open_store(Path("emb"))
    split = pd.read_csv(FOLDER / "split.csv", dtype=str)
    training = split["eid"][split["fold"] == "train"]
    means = [store.read(eid).embeddings.mean((0, 1)) for eid in training]
    np.testing.assert_allclose(model.clip_mean, np.mean(means, 0), atol=1e-5)
    saved = torch.load(FOLDER / "best_checkpoint.pt", weights_only=True)
    del saved["clip_mean"]
    torch.save(saved, FOLDER / "best_checkpoint.pt")
    status, _, err = cli("explain", "--baseline", "mean")
    assert status == 1 and "has no mean clip embedding" in err
    bag = store.read(training.iloc[0]).embeddings
    rows = ef.explain(ef.load("defect"), bag, baseline="study")
    expected = ef.predict(model, {"x": bag.mean((0, 1), keepdims=True)})["finding"][0]
    assert rows["baseline"][0] == pytest.approx(expected, rel=1e-4)
    rows = ef.explain(model, bag, explain_method="leave_one_out")
    assert rows["baseline"].isna().all() and not rows["baseline_name"].any()


@pytest.mark.slow
def test_several_processes(trained, cli):
    """The tables of one process."""
    assert cli("explain")[0] == 0
    name = "explanation_test_site.csv"
    one = table(name)
    (FOLDER / name).unlink()
    line = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--log-dir", "torchrun"]
    line += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", ROOT / "echofocus.py"]
    done = subprocess.run(
        [sys.executable, *map(str, line), "explain", "--device", "cpu"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 processes share the studies" in done.stdout and done.stdout.count("wrote") == 3
    two = table(name)
    pd.testing.assert_frame_equal(one, two, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------- folders of videos


VIDEOS = ("--videos", "visits", "--weights", "random", "--size", "56", "--n_clips", "2")


def test_videos_are_decoded_once_for_all_commands_and_models(
    trained, add_model, cli, weights_drawn_once
):
    """predict, embed, explain, evaluate; a second model; the same numbers as by --dataset."""
    add_model("sizes", "--epoch_lim", "2")
    Path("visits/1000").mkdir(parents=True)
    copy_example("visits/1000/cine.dcm")
    Path("config.json").rename("other.json")  # no config is needed
    status, out, err = cli("predict", "--model_name", "defect", *VIDEOS, "--out", "p.csv")
    assert status == 0 and "1 study extracted" in out, err
    (kept,) = Path("clip_embeddings").iterdir()
    assert kept.name.startswith("visits_") and f"kept in {kept}" in out and "MB" in out
    for line in (
        ("predict", "--model_name", "sizes", *VIDEOS, "--out", "s.csv"),
        ("embed", "--model_name", "defect", *VIDEOS),
        ("explain", "--model_name", "defect", *VIDEOS),
        ("evaluate", "--model_name", "defect", *VIDEOS, "--label_path", "labels.csv",
         "--subset", "all", "--n_boot", "0"),
    ):  # fmt: skip
        status, out, err = cli(*line)
        assert status == 0 and "0 studies extracted, 1 already there" in out, err
    actual = table(f"explanation_test_{kept.name}.csv").iloc[0]
    predicted = pd.read_csv("p.csv").iloc[0]
    assert actual["prediction"] == pytest.approx(predicted["finding"], rel=1e-4)
    saved = pd.read_csv(FOLDER / f"saveout_all_{kept.name}.csv").iloc[0]
    assert saved["finding_Predict"] == pytest.approx(predicted["finding"], rel=1e-4)
    assert len(list(Path("clip_embeddings").iterdir())) == 1


def test_the_limit_of_select_is_of_what_is_explained(trained, cli, weights_drawn_once):
    """Not of what is extracted: the most confident of all videos, not of the first."""
    for i in range(2):
        Path(f"visits/{i}").mkdir(parents=True)
        copy_example(f"visits/{i}/cine.dcm", study=f"1.2.{i}")
    line = ("explain", *VIDEOS, "--select", "confident", "--sample_limit", "1", "--keep", "k")
    status, out, err = cli(*line)
    assert status == 0 and "explaining 1 of 2 studies: confident" in out, err
    assert len(list(Path("k").iterdir())) == 1
