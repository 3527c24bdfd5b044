"""Cross-validation with one command, and models whose answers are averaged."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import write_embeddings
from scipy import optimize
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score

import echofocus as ef
from echofocus_core.base.console import UserError
from echofocus_core.base.options import Settings
from echofocus_core.study.config import Record
from echofocus_core.study.fold_answers import thresholds_for
from echofocus_core.study.job import Job
from echofocus_core.study.loading import ensemble_of
from echofocus_core.study.metrics import NEAREST
from echofocus_core.study.models import LoadedModel
from echofocus_core.study.network import StudyModel
from echofocus_core.study.outputs import Outputs
from echofocus_core.study.predictions import answer_studies
from echofocus_core.video.store import open_store

MODELS = Path("trained_models")
LINE = ("train", "--task", "defect", "--n_folds", "3", "--fold", "all", "--epoch_lim", "2",
        "--encoder_depth", "0")  # fmt: skip
IDS = {"eid": str, "pid": str, "Echo_ID": str, "PID": str}


def test_folds_pooled_and_averaged(cohort, cli):
    status, out, err = cli(*LINE)
    assert status == 0, err
    assert all(f"fold {k} of 3, epoch 2: train loss" in out for k in range(3))
    folder = MODELS / "defect"
    splits = [pd.read_csv(folder / f"fold_{k}" / "split.csv", dtype=IDS) for k in range(3)]
    tested = [x[x["fold"] == "test"] for x in splits]
    assert sorted(pd.concat(tested)["eid"]) == sorted(splits[0]["eid"])  # each once
    assert not set(tested[0]["pid"]) & set(tested[1]["pid"])

    pooled = pd.read_csv(folder / "saveout_cv_site.csv", dtype=IDS).set_index("Echo_ID")
    models = [ef.load(folder / f"fold_{k}") for k in range(3)]
    each = [ef.predict(one, "emb").set_index("eid")["finding"] for one in models]
    by_hand = pd.concat(each[k][tested[k]["eid"]] for k in range(3))
    np.testing.assert_allclose(pooled["finding_Predict"][by_hand.index], by_hand, rtol=1e-4)
    metrics = pd.read_csv(folder / "metrics_cv_site.csv").set_index("metric")
    area = roc_auc_score(pooled["finding_Correct"], pooled["finding_Predict"])
    assert metrics["value"]["auroc"] == pytest.approx(area, rel=1e-5)
    parts = [pooled.loc[x["eid"]] for x in tested]
    areas = [roc_auc_score(x["finding_Correct"], x["finding_Predict"]) for x in parts]
    assert metrics["fold_mean"]["auroc"] == pytest.approx(np.mean(areas), rel=1e-5)
    assert metrics["fold_sd"]["auroc"] == pytest.approx(np.std(areas, ddof=1), rel=1e-5)
    called = pooled["finding_Predict"].astype(object)
    for k in range(3):
        cut = models[k].record.thresholds["finding"]
        called[tested[k]["eid"]] = called[tested[k]["eid"]] >= cut
    sensitivity = called[pooled["finding_Correct"] == 1].astype(float).mean()
    assert metrics["value"]["sensitivity"] == pytest.approx(sensitivity, rel=1e-5)

    truths, parts = pooled["finding_Correct"], []
    for answers, split, test in zip(each, splits, tested, strict=True):
        val = split[split["fold"] == "val"]["eid"]
        x = logit(answers.clip(NEAREST, 1 - NEAREST))
        parts.append(expit(intercept(truths[val], x[val]) + x[test["eid"]]))
    shifted = pd.concat(parts)
    recalibration = pd.read_csv(folder / "recalibration_cv_site.csv")
    recalibration = recalibration.set_index(["method", "metric"])["value"]
    brier = ((shifted - truths[shifted.index]) ** 2).mean()
    assert recalibration["intercept", "brier"] == pytest.approx(brier, rel=1e-3)
    assert "validation of each fold" in (folder / "report_cv_site.html").read_text()

    before = (folder / "fold_1" / "best_checkpoint.pt").stat().st_mtime
    (folder / "fold_2" / "best_checkpoint.pt").unlink()
    (folder / "fold_2" / "last_checkpoint.pt").unlink()
    status, out, err = cli(*LINE)  # trains what is missing
    assert status == 0 and "fold_1 has finished" in out, err
    assert (folder / "fold_1" / "best_checkpoint.pt").stat().st_mtime == before
    again = pd.read_csv(folder / "saveout_cv_site.csv", dtype=IDS).set_index("Echo_ID")
    np.testing.assert_allclose(again["finding_Predict"], pooled["finding_Predict"], rtol=1e-5)

    averaged(cli, folder, each)
    explained(cli, folder, models)
    unseen_alone_are_test(cli, folder)


def intercept(truths, log_odds):
    """The shift with which the probabilities add up to the studies with the finding."""
    return optimize.brentq(lambda a: expit(a + log_odds).sum() - truths.sum(), -30, 30)


def explained(cli, folder, models):
    """A video's score is the mean of the members' scores; the answer is averaged too."""
    few = ("--subset", "all", "--sample_limit", "4")
    status, _, err = cli("explain", "--model_name", "defect", *few, "--page")
    assert status == 0, err
    path = folder / "explanation_all_site.sample_limit-4.shapley"
    rows = pd.read_csv(f"{path}.csv", dtype={"eid": str})
    table = ef.predict(ef.load(folder), "emb").set_index("eid")
    first = rows.groupby("eid").first()
    np.testing.assert_allclose(first["prediction"], table["finding"][first.index], rtol=1e-4)
    eid = first.index[0]
    bag = open_store(Path("emb")).read(eid)
    method = {"explain_method": "shapley"}
    study = {eid: dict(zip(bag.videos, bag.embeddings, strict=True))}
    each = [ef.explain(model, study, **method).set_index("video")["score"] for model in models]
    scores = rows[rows["eid"] == eid].set_index("video")["score"]
    mean = sum(each) / len(each)
    np.testing.assert_allclose(scores, mean[scores.index], rtol=1e-3, atol=1e-5)
    assert (rows["convergence_error"] < 0.01).all()
    assert (path / "index.html").is_file()


def averaged(cli, folder, each):
    """predict with the folder, and with a list of models: mean and SD of the answers of `each`."""
    assert cli("predict", "--model_name", "defect")[0] == 0
    predicted = pd.read_csv(folder / "predictions_site.csv", dtype=IDS).set_index("eid")
    each = [answers[predicted.index] for answers in each]
    np.testing.assert_allclose(predicted["finding"], np.mean(each, axis=0), rtol=1e-4)
    np.testing.assert_allclose(predicted["finding_sd"], np.std(each, axis=0, ddof=1), atol=1e-5)
    names = (folder / "fold_0", folder / "fold_2", "--out", "two.csv")
    assert cli("predict", "--model_name", *names)[0] == 0
    two = pd.read_csv("two.csv", dtype=IDS).set_index("eid")
    np.testing.assert_allclose(two["finding"], np.mean([each[0], each[2]], axis=0), rtol=1e-4)
    assert cli("embed", "--model_name", "defect")[0] == 0
    status, _, err = cli("explain", "--model_name", "defect")
    assert status == 1 and "--subset all" in err


def unseen_alone_are_test(cli, folder):
    """Some fold has seen every patient: only new patients are test."""
    status, _, err = cli("evaluate", "--model_name", "defect", "--n_boot", "0")
    assert status == 1 and "none of the averaged models has seen" in err
    rng = np.random.default_rng(5)
    rows = pd.read_csv("labels.csv", dtype=IDS)
    new = [{"pid": f"N{i}", "eid": f"N{i}", "finding": i % 2, "size": 5} for i in range(6)]
    new.append({"pid": "P001", "eid": "N6", "finding": 1, "size": 5})  # a new study of a known one
    for row in new:
        write_embeddings(Path("emb"), row["eid"], rng.standard_normal((2, 4, 768)).astype("f4"))
    pd.concat([rows, pd.DataFrame(new)]).to_csv("labels.csv", index=False)
    status, _, err = cli("evaluate", "--model_name", "defect", "--n_boot", "0")
    assert status == 0, err
    tested = pd.read_csv(folder / "saveout_test_site.csv", dtype=IDS)["Echo_ID"]
    assert set(tested) == {f"N{i}" for i in range(6)}
    folder = folder / "fold_1"  # four of the new patients are of its test fold
    one = ("--model_name", folder, "--compare", "defect", "--n_boot", "0")
    status, _, err = cli("evaluate", *one)
    assert status == 0, err
    assert pd.read_csv(folder / "comparison_test_site.csv")["n"].eq(4).all()
    status, _, err = cli("evaluate", *one, "--target", "sensitivity=0.6")
    assert status == 0, err
    page = (folder / "report_test_site.html").read_text()
    assert "defect: not compared at a threshold: no study of site is in the fold val" in page


def test_thresholds_by_two_rules_are_not_averaged(capsys):
    """But their answers are averaged."""
    a, b = (
        LoadedModel(
            Path(rule), StudyModel(1, depth=0), "t", Outputs.of("x", "binary"), None,
            Record(labels=["x"], thresholds={"x": 0.5}, settings=Settings(target=rule)), {}, [],
        ) for rule in ("youden", "sensitivity=0.9")
    )  # fmt: skip
    both = ensemble_of([a, b], Path("a+b"))
    assert not both.record.thresholds and ensemble_of([a, a], Path("a")).record.thresholds
    assert capsys.readouterr().out.count("WARNING") == 1
    assert thresholds_for(Job(Settings(), model=both)) == {}
    with pytest.raises(UserError, match="in another dataset"):  # it would choose new ones
        thresholds_for(Job(Settings(target="youden", dataset="s"), model=both))


def test_the_range_is_that_of_the_averaged_answer(tmp_path):
    """Two members that move in opposite ways: each has a range, their average does not move."""
    rng = np.random.default_rng(0)
    for eid in ("a", "b"):
        write_embeddings(tmp_path, eid, rng.standard_normal((3, 4, 768)).astype("f4"))
    members = []
    for sign in (1, -1):
        net = StudyModel(1, depth=0).eval().requires_grad_(False)
        if members:
            net.load_state_dict(members[0].net.state_dict())
        net.ff.weight *= sign
        net.ff.bias *= 0
        record = Record(labels=["x"], type="binary")
        members.append(
            LoadedModel(tmp_path, net, "t", Outputs.of("x", "binary"), None, record, {}, [])
        )
    settings, store = Settings(spread="clips"), open_store(tmp_path)
    one, both = (
        answer_studies(m, store, ["a", "b"], settings)[0]
        for m in (members[0], ensemble_of(members, tmp_path))
    )
    assert (one["x_high"] - one["x_low"] > 0.01).all()
    np.testing.assert_allclose(both[["x", "x_low", "x_high"]], 0.5, atol=1e-6)


def test_models_of_other_things_are_not_averaged():
    """Answers for a video and for a study; times in another column, whose unit nothing says."""

    def model(units=None, **more):
        kind = "survival" if "survival" in more else "binary"
        record, outputs = Record(labels=["x"], type=kind, **more), Outputs.of("x", kind)
        net = StudyModel(1, depth=0)
        return LoadedModel(Path("m"), net, "t", outputs, None, record, units or {}, [])

    with pytest.raises(UserError, match="differ in level"):
        ensemble_of([model(), model(level="video")], Path("a+b"))
    columns = [{"x": ["years", "died"]}, {"x": ["months", "died"]}]
    with pytest.raises(UserError, match="months"):
        ensemble_of([model(survival=x) for x in columns], Path("a+b"))
    ensemble_of([model({"x": "a"}, survival=x) for x in columns], Path("a+b"))


def test_what_does_not_go_together(cohort, cli):
    for args, text in {
        ("--fold", "all"): "--n_folds 5",
        ("--n_folds", "2", "--fold", "all"): "3 or more",
        ("--n_folds", "5", "--fold", "every"): "--fold should be",
        ("--model_name", "a", "b"): "train makes one model",
    }.items():
        status, _, err = cli("train", "--task", "defect", *args)
        assert status in (1, 2) and text in err, err
