"""Kinds of label: classes and times to an event, alone and next to findings and measurements."""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import by_rule, edit_config, write_embeddings
from torch.nn import functional as F

import echofocus as ef
from echofocus_core.base.console import Collected, UserError
from echofocus_core.base.options import Settings, validate_as
from echofocus_core.study.config import Record, Task, read_config
from echofocus_core.study.folds import split_patients
from echofocus_core.study.kinds.multiclass import Multiclass, class_numbers
from echofocus_core.study.kinds.regression import Regression
from echofocus_core.study.kinds.survival import EVENT, cox_losses
from echofocus_core.study.labels import load_labels
from echofocus_core.study.loading import ensemble_of
from echofocus_core.study.loop import LoopContext, train_steps
from echofocus_core.study.metrics import breslow, c_index
from echofocus_core.study.models import LoadedModel, survival_at
from echofocus_core.study.network import StudyModel
from echofocus_core.study.outputs import KINDS, Outputs, losses_of_outputs, study_losses
from echofocus_core.study.training import rate_groups

pytestmark = pytest.mark.xdist_group("outputs")  # one process: a model that several tests ask
MIXED = Outputs.of(
    ["g", "s", "b", "m"],
    {"g": "multiclass", "s": "survival", "b": "binary", "m": "regression"},
    {"g": ["none", "mild", "severe"]},
)


def test_the_places_of_outputs_and_targets():
    assert MIXED.names == ["g_none", "g_mild", "g_severe", "s_risk", "b", "m"]
    assert MIXED.columns == ["g", "s", "s" + EVENT, "b", "m"] and MIXED.type == "mixed"
    assert MIXED.slices["s"] == slice(3, 4) and MIXED.places["b"] == slice(3, 4)
    assert Outputs.of(["g"], "multiclass", {"g": ["a", "b"]}).type == "binary"


def slow_cox(risk, time, event):
    """Each event by itself: minus the log of its share of the hazard of all still there."""
    losses = np.zeros(len(risk))
    for i in range(len(risk)):
        if event[i]:
            losses[i] = np.log(np.exp(risk[time >= time[i]]).sum()) - risk[i]
    return losses


def test_cox_partial_likelihood():
    rng = np.random.default_rng(0)
    risk, time = rng.normal(size=40), rng.integers(1, 12, 40).astype(float)  # with ties
    event = (rng.random(40) < 0.5).astype(float)
    time[3], event[5] = np.nan, np.nan
    present = np.isfinite(time) & np.isfinite(event)
    expected = np.zeros(40)
    expected[present] = slow_cox(risk[present], time[present], event[present])
    actual = cox_losses(*(torch.tensor(x) for x in (risk, time, event))).numpy()
    np.testing.assert_allclose(actual * event[present].sum() / present.sum(), expected, atol=1e-9)
    none = cox_losses(torch.tensor(risk), torch.tensor(time), torch.zeros(40))
    assert not none.any()


def test_losses_of_mixed_labels():
    """Each label's loss, as torch has it on the raw scores of the classes; missing ones add 0."""
    rng = np.random.default_rng(1)
    net, grouped = by_rule(n_outputs=6), by_rule(n_outputs=6, groups=MIXED.groups)
    x, lengths = torch.tensor(rng.normal(size=(20, 768)), dtype=torch.float32), [4] * 5
    raw, _ = net(x, lengths)
    logits, _ = grouped(x, lengths)
    torch.testing.assert_close(logits[:, :3].sigmoid(), raw[:, :3].softmax(1))
    torch.testing.assert_close(logits[:, 3:], raw[:, 3:])
    y = torch.tensor([[0, 1.0, 1, 0, 0.5], [2, 2, 0, 1, -1], [1, 3, 1, torch.nan, 0]] * 2)[:5]
    y[4, 0] = torch.nan
    parts = torch.stack(
        [
            F.cross_entropy(raw[:, :3], y[:, 0].nan_to_num().long(), reduction="none"),
            cox_losses(raw[:, 3], y[:, 1], y[:, 2]),
            F.binary_cross_entropy_with_logits(raw[:, 4], y[:, 3].nan_to_num(), reduction="none"),
            (raw[:, 5] - y[:, 4]) ** 2,
        ],
        dim=1,
    )
    present = torch.ones(5, 4)
    present[2, 2] = present[4, 0] = 0
    expected = (parts * present).sum(1) / 4
    torch.testing.assert_close(study_losses(logits, y, MIXED), expected)


def test_the_baseline_hazard():
    """Without risk it is Nelson and Aalen's; survival of a study of twice the hazard is squared."""
    time, event = np.array([1.0, 2, 2, 3, 4]), np.array([1, 1, 0, 1, 0])
    actual = breslow(time, event, np.zeros(5))
    assert actual["times"] == [0, 1, 2, 3, 4]
    assert actual["cumulative"] == pytest.approx([0, 1 / 5, 1 / 5 + 1 / 4, 0.45 + 1 / 2, 0.95])
    at = survival_at(2, np.array([0, np.log(2)]), **actual)
    assert at == pytest.approx([np.exp(-0.45), np.exp(-0.9)])
    assert np.isnan(survival_at(5, np.zeros(1), **actual)).all()  # nobody was followed so long
    nothing = breslow(time, np.zeros(5), np.zeros(5))
    assert np.isnan(survival_at(1, np.zeros(1), **nothing)).all()


@pytest.mark.parametrize(
    "names, cells, numbers",
    [
        (["none", "mild"], ["Mild", " none", "x", None], [1, 0, np.nan, np.nan]),
        (["none", "mild"], ["1", "0", "1.0"], [1, 0, 1]),
        (["1", "2", "3"], ["1", "3", "2.0", "0", None], [0, 2, 1, np.nan, np.nan]),
        (["0", "1"], ["1", "0"], [1, 0]),
    ],
)
def test_cells_of_classes(names, cells, numbers):
    actual = class_numbers("g", pd.Series(cells), names, "t.csv", Collected())
    np.testing.assert_equal(actual.to_numpy(), numbers)


@pytest.mark.parametrize(
    "cells, text",
    [
        (["1", "2", "3"], "without any 0"),  # of a clinic that counts from 1
        (["0", "3"], "up to 3"),
        (["0", "mild"], "mixed with names"),
        (["0", "1"], ""),
    ],
)
def test_numbers_of_classes_are_not_shifted(cells, text):
    heard = Collected()
    class_numbers("g", pd.Series(cells), ["none", "mild", "severe"], "t.csv", heard)
    errors = [x.text for x in heard.findings if x.level == "ERROR"]
    assert bool(errors) == bool(text) and text in "".join(errors)
    assert any("0 = none, 1 = mild, 2 = severe" in x.text for x in heard.findings)


SITE = {
    "task": {
        "outlook": {
            "task_labels": ["grade", "death", "finding", "size"],
            "type": {"grade": "multiclass", "death": "survival", "finding": "binary",
                     "size": "regression"},
            "classes": {"grade": ["None", "mild", "severe"]},
            "survival": {"death": ["years", "died"]},
            "units": {"size": "cm", "death": "years"},
            "names": {"size": "left <ventricle>"},
            "label_path": "labels.csv",
        }
    },
    "dataset": {"site": {"embedding_path": "emb"}},
}  # fmt: skip


MIXED_SITE = Outputs.of(
    SITE["task"]["outlook"]["task_labels"],
    SITE["task"]["outlook"]["type"],
    SITE["task"]["outlook"]["classes"],
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """220 studies of 110 patients: a pattern's strength is the grade; death comes sooner by it."""
    folder = tmp_path_factory.mktemp("outlook")
    rng, rows = np.random.default_rng(0), []
    pattern, other = rng.normal(size=(2, 768)) / np.sqrt(768) * 3
    for n in range(220):
        grade, size = rng.integers(3), rng.normal(5, 1)
        x = rng.normal(size=(3, 2, 768)).astype(np.float32) * 0.3
        x[rng.integers(3)] += grade * pattern
        x += (size - 5) * other
        write_embeddings(folder / "emb", str(1000 + n), x.astype(np.float32))
        until, censored = rng.exponential(6 * 0.25**grade), rng.uniform(0, 8)
        rows.append(
            {"pid": f"p{n // 2}", "eid": 1000 + n, "grade": ["None", "mild", "severe"][grade],
             "years": min(until, censored), "died": "yes" if until < censored else "no",
             "finding": int(grade == 2), "size": size, "hazard": grade}
        )  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    (folder / "config.json").write_text(json.dumps(SITE))
    return folder, pd.DataFrame(rows).set_index("eid")


def copied(folder, to, monkeypatch):
    shutil.copytree(folder, to, dirs_exist_ok=True)
    monkeypatch.chdir(to)


@pytest.fixture
def outlook(written, tmp_path, monkeypatch):
    copied(written[0], tmp_path, monkeypatch)
    return written[1]


@pytest.fixture(scope="module")
def trained_there(written, tmp_path_factory):
    """A copy of the folder with a model: (folder, what was printed)."""
    folder, out = tmp_path_factory.mktemp("learnt"), io.StringIO()
    shutil.copytree(written[0], folder, dirs_exist_ok=True)
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        ef.main(TRAIN)
    return folder, out.getvalue()


@pytest.fixture
def learnt(trained_there, written, tmp_path, monkeypatch):
    copied(trained_there[0], tmp_path, monkeypatch)
    return written[1]


TRAIN = ("train", "--task", "outlook", "--epoch_lim", "5", "--learning_rate", "5e-4")
TRAIN += ("--batch_number", "32", "--tf_combine", "max")


def test_a_mixed_task_is_learnt(learnt, trained_there, cli):
    outlook, out = learnt, trained_there[1]
    assert "AUROC" in out and "C 0." in out and "median absolute error" in out
    status, out, err = cli("evaluate", "--n_boot", "50", "--years", "2")
    assert status == 0, err
    folder = Path("trained_models/outlook")
    metrics = pd.read_csv(folder / "metrics_test_site.csv").set_index(["label", "metric"])["value"]
    assert metrics["death", "c_index"] > 0.7 and metrics["grade", "auroc"] > 0.85
    assert metrics["finding", "auroc"] > 0.85 and metrics["death", "auroc_at_2"] > 0.7
    saved = pd.read_csv(folder / "saveout_test_site.csv", keep_default_na=False)
    saved = saved.set_index("Echo_ID")
    truths = outlook.loc[saved.index]
    assert (saved["grade_Correct"] == truths["grade"]).all()
    np.testing.assert_allclose(saved["death_Correct"], truths["years"], rtol=1e-5)
    actual = c_index(truths["years"], truths["died"] == "yes", saved["death_risk_Predict"])
    assert actual == pytest.approx(metrics["death", "c_index"], rel=1e-5)

    status, out, err = cli("predict", "--years", "1,3", "--spread", "clips", "--out", "p.csv")
    assert status == 0, err
    table = pd.read_csv("p.csv", keep_default_na=False).set_index("eid")
    classes = table[["grade_None", "grade_mild", "grade_severe"]].astype(float)
    np.testing.assert_allclose(classes.sum(axis=1), 1, rtol=1e-5)
    assert (table["grade"] == classes.idxmax(axis=1).str.removeprefix("grade_")).all()
    soon, late = (table[f"death_survival_{x}"].astype(float) for x in (1, 3))
    assert (soon >= late).all() and soon.between(0, 1).all()
    assert (soon.rank() == (-table["death_risk"].astype(float)).rank()).all()
    assert (table["grade_None_low"] <= table["grade_None"]).all() and "size [cm]" in table
    by_grade = late.groupby(outlook["hazard"]).mean()  # the truth: exp(-3 / (6 * 0.25**grade))
    assert by_grade[0] > 0.5 > by_grade[1] > by_grade[2]

    status, out, err = cli("predict", "--years", "40", "--out", "q.csv")
    assert status == 0 and "followed for 40" in err + out
    assert pd.read_csv("q.csv")["death_survival_40"].isna().all()


def test_classes_and_risks_are_explained(learnt, cli):
    status, _, err = cli("explain", "--sample_limit", "3", "--page")
    assert status == 0, err
    folder = Path("trained_models/outlook")
    videos = pd.read_csv(folder / "explanation_test_site.sample_limit-3.shapley.csv")
    classes = {"grade_None", "grade_mild", "grade_severe"}
    assert set(videos["label"]) == classes | {"death_risk", "finding", "size"}
    units = videos.groupby("label")["score_unit"].first()
    assert units["grade_mild"] == "points" and units["death_risk"] == "log hazard"
    assert units["size"] == "cm" and (videos["convergence_error"] < 0.01).all()
    page = (folder / "explanation_test_site.sample_limit-3.shapley" / "index.html").read_text()
    study = (folder / "explanation_test_site.sample_limit-3.shapley/studies/1.html").read_text()
    classes = videos[videos["eid"] == min(videos["eid"])].groupby("label")["prediction"].first()
    top = classes[classes.index.str.startswith("grade_")].idxmax().removeprefix("grade_")
    assert f"Grade: {top} " in study.replace("grade: ", "Grade: ")
    lines = [
        line for line in study.splitlines() if "most probable" in line and "</summary>" in line
    ]
    assert len(lines) == 1 and f"{top} " in lines[0].replace("<", " ")
    assert "grade_severe" in page and "death_risk" in page
    assert "Left &lt;ventricle&gt;" in page
    status, _, err = cli("explain", "--explain_mode", "loss", "--sample_limit", "2")
    assert status == 0, err


def test_a_step_of_survival_does_not_depend_on_its_batches(outlook):
    """The loss of a step is of all its studies, however they are dealt to batches."""
    from echofocus_core.video.store import open_store

    store, eids = open_store(Path("emb")), [str(1000 + n) for n in range(40)]
    outputs = Outputs.of(["death"], "survival")
    targets = {
        eid: np.array([outlook.loc[int(eid), "years"], outlook.loc[int(eid), "died"] == "yes"])
        for eid in eids
    }

    def gradients(tokens):
        net = by_rule(n_outputs=1).requires_grad_(True)
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(module, torch.nn.MultiheadAttention):
                module.dropout = 0.0
        before = [p.detach().clone() for p in net.parameters()]
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        settings = Settings(batch_number=40, batch_tokens=tokens)
        context = LoopContext(net, store, settings, targets, outputs)
        ((n, loss),) = train_steps(context, eids, optimizer)
        assert n == 40
        after = [p.detach() for p in net.parameters()]
        return loss, torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])

    (one, whole), (many, parts) = gradients(10_000), gradients(24)
    assert one == pytest.approx(many, rel=1e-5)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"classes": {}, "type": "multiclass"}, "multiclass of grade: one is missing"),
        ({"classes": {"grade": ["none"]}}, "two classes or more"),
        ({"classes": {"grade": ["Mild", "mild", "none"]}}, "none twice"),
        ({"survival": {"death": ["years"]}}, "at least 2 items"),
        ({"type": {"grade": "multclass"}}, "mean multiclass?"),
        ({"task_labels": ["grade", "death", "grade_mild"]}, "share the column grade_mild"),
        ({"task_labels": ["grade", "death_event", "death"]}, "share the column death_event"),
        ({"task_labels": ["death_survival_1", "death", "grade"]}, "share the column death_surv"),
        ({"boxcox": ["death"]}, "boxcox has no effect on death"),
    ],
)
def test_faults_of_kinds(change, text):
    entry = SITE["task"]["outlook"] | {"type": "", "units": {}, "names": {}}
    with pytest.raises(UserError) as error:
        validate_as(Task, entry | change, "config.json")
    assert text in str(error.value)


def change_outlook(change, **keys):
    """Change the label table, and keys of the task."""
    table = pd.read_csv("labels.csv", dtype=str, keep_default_na=False)
    change(table).to_csv("labels.csv", index=False)
    entry = SITE["task"]["outlook"] | keys
    Path("config.json").write_text(json.dumps(SITE | {"task": {"outlook": entry}}))


def as_in_r(table):
    return table.assign(died=table["died"].map({"no": "1", "yes": "2"}))


@pytest.mark.parametrize("codes", [{"1": 0, "2": 1}, {"death": {"1": 0, "2": 1}}])
def test_events_of_another_code(outlook, cli, codes):
    """1 = censored, 2 = dead, as in R: the same labels with a mapping, an error without."""
    config = read_config()
    _, plain = load_labels(config.tasks["outlook"], config.datasets["site"], Collected())
    change_outlook(as_in_r)
    for line in (TRAIN, ("check", "--task", "outlook")):
        status, out, err = cli(*line)
        assert status == 1 and '"events": {"1": 0, "2": 1}' in out + err
    change_outlook(lambda t: t, events=codes)
    config = read_config()
    _, actual = load_labels(config.tasks["outlook"], config.datasets["site"], Collected())
    pd.testing.assert_frame_equal(actual, plain)
    with pytest.raises(UserError, match="codes and their meaning"):
        validate_as(Task, SITE["task"]["outlook"] | {"events": {"1": 2}}, "config.json")


def in_days(table):
    return table.assign(years=table["years"].astype(float) * 365.25)


@pytest.mark.parametrize(
    "change, unit, status, text",
    [
        (in_days, "", 1, '"units": {"death": "days"}'),
        (in_days, "years", 1, "above 100 years"),
        (in_days, "days", 0, ""),
        (lambda t: t, "", 0, "years are assumed"),
        (lambda t: t.assign(years="2021-03-04"), "years", 1, "holds dates: 2021-03-04"),
        (lambda t: t.assign(years="4.3.2021"), "years", 1, "holds dates"),
        (lambda t: t.replace({"died": {"no": ""}}), "years", 1, "has no 0 for censored"),
        (lambda t: t, "heartbeats", 1, "days, weeks, months, years"),
    ],
)
def test_times_have_a_unit(outlook, cli, change, unit, status, text):
    change_outlook(change, units={"death": unit} if unit else {})
    actual, out, err = cli("check", "--task", "outlook")
    assert actual == status and text in out + err, out + err
    assert status or ("years are assumed" in out) == (not unit)


def test_years_are_converted(learnt, trained_there, cli):
    """A model of times in days answers and is evaluated for --years as one of years is."""
    years = ("--years", "1,3", "--spread", "none", "--out")
    assert cli("predict", *years, "y.csv")[0] == 0
    path = Path("trained_models/outlook/best_checkpoint.pt")
    saved = torch.load(path, weights_only=False)
    record = saved["echofocus"]
    record["units"]["death"] = "days"
    hazard = record["hazards"]["death_risk"]
    hazard["times"] = [x * 365.25 for x in hazard["times"]]
    torch.save(saved, path)
    change_outlook(in_days, units={"size": "cm", "death": "days"})
    assert cli("predict", *years, "d.csv")[0] == 0
    pd.testing.assert_frame_equal(pd.read_csv("y.csv"), pd.read_csv("d.csv"), rtol=1e-4)
    status, _, err = cli("evaluate", "--n_boot", "0", "--years", "2")
    assert status == 0, err
    metrics = pd.read_csv("trained_models/outlook/metrics_test_site.csv").set_index("metric")
    assert metrics["value"]["auroc_at_2"] > 0.7
    status, _, err = cli("predict", "--years", "0.0001", "--spread", "none")
    assert status == 1 and "is 1 for all studies" in err


def test_faults_of_their_values(outlook):
    table = pd.read_csv("labels.csv", keep_default_na=False)
    table.loc[0, "years"], table.loc[1, "died"], table.loc[2, "grade"] = -1, None, "terrible"
    table.to_csv("labels.csv", index=False)
    listener, config = Collected(), read_config()
    _, table = load_labels(config.tasks["outlook"], config.datasets["site"], listener)
    text = "\n".join(x.text for x in listener.findings)
    assert "death: 1 value is below zero" in text and "terrible" in text
    assert table["death"].isna().sum() == 2 and table["grade"].isna().sum() == 1
    assert table["death" + EVENT].isna().sum() == 2


@pytest.fixture
def views(cohort):
    """The cohort's videos with a view each: of even number the pattern `view` is in their clips."""
    rng, rows = np.random.default_rng(3), []
    pattern = rng.normal(size=768)
    patients = pd.read_csv("labels.csv", dtype=str).set_index("eid")["pid"]
    for path in sorted((cohort / "emb").glob("*.hdf5")):
        x = rng.normal(size=(4, 2, 768)).astype(np.float32)
        is_view = rng.random(4) < 0.5
        x[is_view] += 2 * pattern
        write_embeddings(cohort / "emb", path.stem, x.astype(np.float32))
        rows += [
            {"pid": patients[path.stem], "eid": path.stem, "video": f"v{n:02}.avi",
             "view": ["other", "apical"][int(apical)]} for n, apical in enumerate(is_view)
        ]  # fmt: skip
    pd.DataFrame(rows).to_csv("views.csv", index=False)
    config = json.loads(Path("config.json").read_text())
    task = {"task_labels": ["view"], "level": "video", "type": "multiclass"}
    task |= {"classes": {"view": ["other", "apical"]}, "label_path": "views.csv"}
    config["task"]["view"] = task | {"learning_rate": 1e-3, "batch_number": 16, "epoch_lim": 3}
    Path("config.json").write_text(json.dumps(config))
    return pd.DataFrame(rows)


def test_labels_of_videos(views, cli):
    status, out, err = cli("train", "--task", "view")
    assert status == 0, err
    assert "240 labelled" in out
    split = pd.read_csv("trained_models/view/split.csv")
    assert split.groupby("pid")["fold"].nunique().max() == 1 and len(split) == 240
    status, _, err = cli("evaluate")
    assert status == 0, err
    metrics = pd.read_csv("trained_models/view/metrics_test_site.csv").set_index("metric")
    assert metrics["value"]["auroc"] > 0.95
    assert metrics["n"]["auroc"] == (split["fold"] == "test").sum()
    status, _, err = cli("predict", "--out", "p.csv")
    assert status == 0, err
    table = pd.read_csv("p.csv").set_index("eid")
    truth = views.set_index(views["eid"] + "/" + views["video"])["view"]
    assert (table["view"] == truth.loc[table.index]).mean() > 0.9
    status, _, err = cli("explain")
    assert status == 1 and "predicts single videos" in err
    status, out, err = cli("check", "--task", "view", "--model_name", "view")
    assert status == 0, out + err

    os.rename("emb", "emb2")  # the same studies under other patients' names: still known
    config = json.loads(Path("config.json").read_text())
    config["dataset"] = {"other": {"embedding_path": "emb2"}}
    Path("config.json").write_text(json.dumps(config))
    views.assign(pid="Q" + views["pid"]).to_csv("views.csv", index=False)
    status, out, err = cli("evaluate", "--dataset", "other", "--model_name", "view")
    assert status == 0, err
    metrics = pd.read_csv("trained_models/view/metrics_test_other.csv").set_index("metric")
    assert metrics["n"]["auroc"] <= (split["fold"] == "test").sum()


def test_an_early_step_of_survival():
    """One in ten die at once: no curve is drawn from birth to the first year."""
    time = np.r_[np.full(200, 0.01), np.linspace(0.1, 20, 1800)]
    actual = breslow(time, time == 0.01, np.zeros(2000))
    assert survival_at(0.082, np.zeros(1), **actual)[0] == pytest.approx(np.exp(-0.1), abs=1e-3)


def test_rare_events_are_dealt_to_every_fold(outlook):
    config = read_config()
    _, table = load_labels(config.tasks["outlook"], config.datasets["site"])
    table.loc[table.index[20:], "death" + EVENT] = 0
    table.loc[table.index[:20], "death" + EVENT] = 1
    for seed in range(20):
        settings = Settings(seed=seed, split="60,20,20", stratify="death")
        folds = split_patients(table, settings, MIXED_SITE)
        events = table["death" + EVENT].groupby(folds).sum()
        assert events["val"] >= 2 and events["test"] >= 2
    table["grade"] = np.where(np.arange(220) < 10, 2, 0)
    folds = split_patients(table, Settings(split="60,20,20", stratify="grade"), MIXED_SITE)
    assert (table["grade"] == 2).groupby(folds).sum()[["val", "test"]].min() >= 2


def test_layer_wise_rates():
    net = StudyModel(2, depth=3)
    options = dict(learning_rate=1e-3, layer_decay=0.5)
    rates = {g["lr"]: g["params"] for g in rate_groups(net, Settings(**options))}
    assert sorted(rates) == pytest.approx([1.25e-4, 2.5e-4, 5e-4, 1e-3])
    lowest = rates[min(rates)]
    assert any(p is net.encoder.layers[0].linear1.weight for p in lowest)
    assert [p.shape for p in rates[1e-3]] == [net.ff.weight.shape, net.ff.bias.shape]
    (whole,) = rate_groups(net, Settings(learning_rate=1e-3))
    assert [id(p) for p in whole["params"]] == [id(p) for p in net.parameters()]


def test_a_mixed_model_is_described(learnt, cli):
    status, out, _ = cli("inspect", "outlook")
    assert status == 0 and "type: mixed" in out and "grade_severe" in out and "death_risk" in out
    status, _, err = cli("evaluate", "--per", "patient")
    assert status == 1 and "death: times cannot be averaged" in err
    status, _, err = cli(*TRAIN, "--batch_number", "1", "--run_id", "b")
    assert status == 1 and "--batch_number 2 or more" in err
    start = ("--init_from", "outlook", "--model_name", "next")
    config = json.loads(Path("config.json").read_text())
    task = config["task"]["outlook"]
    task["type"] |= {"finding": "regression"}  # of another kind: its head is not taken over
    Path("config.json").write_text(json.dumps(config))
    status, out, err = cli(*TRAIN, "--epoch_lim", "1", *start)
    assert status == 0 and "loaded 5 heads, 1 new heads" in out, out + err


def test_models_of_the_earlier_loss_have_a_note(learnt, cli):
    path, page = Path("trained_models/outlook/best_checkpoint.pt"), "report_test_site.html"
    assert "known labels" not in cli("inspect", "outlook")[1]
    saved = torch.load(path, weights_only=True)
    assert saved["echofocus"].pop("loss_over_all_labels")
    torch.save(saved, path)
    assert "if its training table had missing labels" in cli("inspect", "outlook")[1]
    change_outlook(lambda t: t.assign(finding=t["finding"].mask(t.index < 30, "")))
    status, out, err = cli("evaluate", "--n_boot", "100")
    assert status == 0 and "number of known labels" in err + out, err
    assert "number of known labels" in path.with_name(page).read_text()
    assert "Calibration of survival" in path.with_name(page).read_text()


@pytest.mark.parametrize("method", ["leave_one_out", "shapley"])
def test_an_average_is_explained_by_its_members(outlook, method):
    """Classes, risks, findings and measurements: the mean of the members' scores, in one unit."""
    outputs = MIXED_SITE
    linear = {"shift": 0.0, "mean": 2.0, "stdev": 0.7, "apply_boxcox": False}
    members = []
    for seed in range(3):
        torch.manual_seed(seed)
        net = StudyModel(len(outputs.names), groups=outputs.groups).eval().requires_grad_(False)
        record = Record(
            task="t", labels=outputs.labels, type=outputs.kinds, classes=outputs.classes,
            survival={"death": ["years", "died"]},
            hazards={"death_risk": {"mean": seed / 10, "times": [0, 4], "cumulative": [0, 0.4]}},
            unlearnt=["finding"] if seed == 1 else [],
        )  # fmt: skip
        scaling = {"size": linear | {"stdev": 0.7 + seed / 10}}
        members.append(LoadedModel(Path(f"m{seed}"), net, "t", outputs, scaling, record, {}, []))
        members[-1].mean_answer = torch.randn(len(outputs.names)) if seed else None
    model = ensemble_of(members, Path("m"))
    study = np.random.default_rng(0).normal(size=(3, 2, 768)).astype(np.float32)
    each = [ef.explain(m, study, explain_method=method) for m in members]
    rows = ef.explain(model, study, explain_method=method).set_index(["label", "video"])
    for label in outputs.names:
        learnt = [t for t, m in zip(each, members, strict=True) if label not in m.record.unlearnt]
        for column in ("score", "prediction", "without", "baseline"):
            parts = [t[t["label"] == label].set_index("video")[column] for t in learnt]
            mean = pd.concat(parts, axis=1).mean(axis=1)
            actual = rows.loc[label, column]
            np.testing.assert_allclose(actual, mean[actual.index], rtol=1e-3, atol=1e-5)
    x = torch.randn(12, 768)
    logits = model.net(x, [5, 7])[0].numpy()
    assert model.survival(logits, [4])["death_survival_4"].shape == (2,)


class Ordinal(Multiclass):
    """Classes in order, with the key of `Multiclass`."""

    kind = "ordinal"


class Count(Regression):
    kind = "count"

    @staticmethod
    def losses(z, y):
        return abs(z - y)

    def answer_columns(self, p):
        return {f"{self.name}_whole": p[:, 0].round()}

    def more_answers(self, row):
        return [(f"{self.name}, rounded", f"{row[self.name + '_whole']:.0f}")]


def test_another_kind_of_label_is_one_class(cohort, cli, monkeypatch):
    """Two kinds share a key; a derived kind is scaled, answered and evaluated."""
    for kind in (Ordinal, Count):
        monkeypatch.setitem(KINDS, kind.kind, kind)
    classes = {"classes": {"a": ["x", "y"], "b": ["x", "y"]}}
    task = Task(task_labels=["a", "b"], type={"a": "ordinal", "b": "multiclass"}, **classes)
    assert task.outputs.groups == [slice(0, 2), slice(2, 4)]
    with pytest.raises(ValueError, match="multiclass or ordinal of b: one is missing"):
        Task(task_labels=["a", "b"], type={"a": "ordinal", "b": "binary"}, **classes)
    edit_config(task_labels=["size"], type="count")
    assert cli("train", "--task", "defect", "--epoch_lim", "2")[0] == 0
    assert cli("predict")[0] == 0
    table = pd.read_csv("trained_models/defect/predictions_site.csv")
    assert (table["size_whole"] == table["size"].round()).all() and table["size"].median() > 2
    assert cli("evaluate")[0] == cli("explain", "--select", "wrong")[0] == 0
    labels, y = Outputs.of(["n"], "count").each, torch.tensor([[4.0]])
    assert losses_of_outputs(torch.tensor([[1.0]]), y, labels) == 3
