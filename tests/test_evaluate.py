"""evaluate as a user types it: tables, figures and the page, of a model and of any predictions."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import blank
from scipy import optimize, special
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

import echofocus as ef
from echofocus_core.base.console import UserError
from echofocus_core.report import curves
from echofocus_core.report.cohort import describe_labels, describe_people
from echofocus_core.report.display import Table, latex_document
from echofocus_core.report.evaluation import MAX_LINES, Report, on_screen
from echofocus_core.report.methods import methods_paragraph
from echofocus_core.report.recalibration import fit_recalibration
from echofocus_core.study import evaluation
from echofocus_core.study import statistics as st
from echofocus_core.study.config import Task
from echofocus_core.study.folds import sample_ids
from echofocus_core.study.kinds.binary import BinaryOutcome
from echofocus_core.study.kinds.multiclass import MulticlassOutcome
from echofocus_core.study.kinds.regression import RegressionOutcome

FEW = ("--n_boot", "200")


@pytest.fixture(scope="module")
def table():
    """300 studies of 200 patients: a finding, a size, and what to group them by."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=300)
    finding = (rng.random(300) < 1 / (1 + np.exp(1.5 - 1.5 * x))).astype(int)
    return pd.DataFrame(
        {"pid": [f"P{i % 200:03}" for i in range(300)], "eid": [f"S{i:03}" for i in range(300)]}
        | {"finding": finding, "size": 5 + x, "age": rng.integers(0, 90, 300)}
        | {
            "sex": rng.choice(["F", "M"], 300),
            "p": 1 / (1 + np.exp(1 - x)),
            "noise": rng.random(300),
        }
        | {"guess": 5 + 0.8 * x + rng.normal(size=300) * 0.3}
    )


@pytest.fixture
def site(table, tmp_path, monkeypatch):
    """The current folder: a config of two tasks, the label table, and anyone's predictions."""
    monkeypatch.chdir(tmp_path)
    table[["pid", "eid", "finding", "size", "age", "sex"]].to_csv("labels.csv", index=False)
    task = {"label_path": "labels.csv"}
    config = {"task": {"defect": {"task_labels": ["finding"], **task}}, "dataset": {}}
    config["task"]["sizes"] = {"task_labels": ["size"], "units": {"size": "cm"}, **task}
    config["dataset"]["site"] = {"embedding_path": "emb"}
    Path("config.json").write_text(json.dumps(config))
    theirs = table.iloc[:280].assign(finding=table["p"], size=table["guess"])
    theirs[["eid", "finding", "size"]].to_csv("theirs.csv", index=False)
    table.assign(finding=table["noise"])[["eid", "finding"]].to_csv("noise.csv", index=False)
    return tmp_path


def metrics_of(path):
    return pd.read_csv(path).set_index(["label", "metric"])


@pytest.mark.figures
def test_anyones_predictions_by_groups_and_against_others(site, table, cli):
    status, out, err = cli(
        "evaluate", "--predictions", "theirs.csv", "--by", "sex", "age:18,65",
        "--compare", "noise.csv", "--prevalence", "0.01", *FEW,
    )  # fmt: skip
    assert status == 0, err
    folder = site / "theirs_evaluation"
    part = table.iloc[:280]
    metrics = metrics_of(folder / "metrics_all_site.csv").loc["finding"]
    assert metrics["value"]["auroc"] == pytest.approx(sk.roc_auc_score(part["finding"], part["p"]))
    assert metrics["ci_low"]["auroc"] < metrics["value"]["auroc"] < metrics["ci_high"]["auroc"]
    assert metrics["n"].eq(280).all() and metrics["n_positive"].eq(part["finding"].sum()).all()
    assert metrics["note"]["sensitivity"] == "no threshold is stored with the model"

    saved = json.loads((folder / "metrics_all_site.json").read_text())
    assert {"run_id", "model_name", "task", "dataset", "fold", "n_bootstrap"} <= set(saved)
    label = saved["metrics"]["finding"]
    assert label["n_samples"] == 280 and label["roc_auc_score"]["n_bootstrap_effective"] == 200
    assert label["roc_auc_score"]["value"] == pytest.approx(metrics["value"]["auroc"], rel=1e-5)
    assert {"value", "ci_lower", "ci_upper"} <= set(label["average_precision"])
    flow = [(box["text"], box["studies"]) for box in saved["flow"]]
    assert flow == [("in the label table", 300), ("no prediction", 20), ("evaluated", 280)]

    by = pd.read_csv(folder / "by_age_all_site.csv")
    by = by[by["metric"] == "auroc"].set_index("group")
    bands = {"< 18": (0, 18), "18 to < 65": (18, 65), ">= 65": (65, 999)}
    assert list(by.index) == list(bands)
    for group, (low, high) in bands.items():
        group_rows = part[part["age"].between(low, high, inclusive="left")]
        assert by["n"][group] == len(group_rows)
        assert by["value"][group] == pytest.approx(
            sk.roc_auc_score(group_rows["finding"], group_rows["p"])
        )
    assert (folder / "forest_by_sex_all_site.pdf").stat().st_size > 1000

    against = pd.read_csv(folder / "comparison_all_site.csv").set_index("metric").loc["auroc"]
    other = sk.roc_auc_score(part["finding"], part["noise"])
    assert against["difference"] == pytest.approx(metrics["value"]["auroc"] - other, abs=1e-5)
    assert against["p_value"] < 0.001 and "noise.csv" in out
    check_page((folder / "report_all_site.html").read_text())
    assert against["this_value"] - against["other_value"] == pytest.approx(against["difference"])
    tables = (folder / "tables_all_site.html").read_text()
    female, sizes = (part.drop_duplicates("pid")["sex"] == "F").sum(), part["pid"].value_counts()
    people = part.sort_values("age").groupby("pid")["age"].head(1)  # the lowest of each patient
    ages = "{:.3g} ({:.3g} to {:.3g})".format(*people.quantile([0.5, 0.25, 0.75]))
    positive = f"{part['finding'].sum()} of 280 ({part['finding'].mean():.1%})".replace("%", " %")
    for cells in (["Studies", "280"], ["Patients", "200"],
                  ["Age of patients at the first study in years, median (quartiles)", ages],
                  ["Studies per patient, median (range)", f"{sizes.median():g} (1 to 2)"],
                  ["Female patients, n (%)", f"{female} ({female / 2:.0f} %)"],
                  ["Finding", positive]):  # fmt: skip
        assert cells in rows_of(tables), cells


def test_patients_of_table_1():
    """Patients are counted once; other and unknown sexes have a row; a single value has no SD."""
    pids = pd.Series(list("aabcd"), index=list("vwxyz"))
    sexes = pd.Series(["f", "f", "divers", None, "m"], index=pids.index)
    people = pd.DataFrame({"age": [3.0, 1, 7, None, 9], "sex": sexes}, pids.index)
    assert dict(describe_people(people, pids)) == {
        "Age of patients at the first study in years, median (quartiles)": "7 (4 to 8)",
        "Female patients, n (%)": "1 (33 %)", "Male patients, n (%)": "1 (33 %)",
        "Other patients, n (%)": "1 (33 %)", "Patients without a known age": "1",
        "Patients without a known sex": "1",
    }  # fmt: skip
    task = Task(task_labels=["size"], type="regression")
    size = pd.DataFrame({"pid": ["a"], "size": [2.5]}, ["v"])
    assert dict(describe_labels(task, size)) == {"size": "2.5"}


def test_rows_of_latex_that_look_like_options():
    """No \\\\ or \\toprule is followed by a character that LaTeX reads as its option."""
    text = latex_document([Table("T", ["[a]", "n"], [["*b", "1"], ["[c]", "2"]])])
    assert not re.search(r"(\\\\|rule)\s*[*\[]", text) and text.count("{}") == 3


def rows_of(page):
    """Texts of the cells of each row of a page's tables."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>([^<]*)", row) for row in rows]


def check_page(page):
    """One file, nothing from the network, and what a reader looks for."""
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "<script" not in page
    assert not re.search(r"https?://", page) and page.count("data:image/png;base64,") >= 5
    for text in ("Participants", "no prediction", "Methods paragraph", "TRIPOD+AI"):
        assert text in page


def test_the_first_study_by_date(site, table, cli):
    """Of a label table with the newest study first, the earliest with a prediction counts."""
    labels, day = pd.read_csv("labels.csv", dtype=str), pd.Timestamp("2021-01-01")
    labels["seen"] = [(day + pd.Timedelta(days=i)).strftime("%d.%m.%Y") for i in range(len(labels))]
    labels[::-1].to_csv("labels.csv", index=False)
    part = table.iloc[:280]
    line = ("evaluate", "--predictions", "theirs.csv", "--task", "defect", "--n_boot", "0")
    for options, keep in (
        (("--first_study_only",), "first"),
        (("--per", "patient", "--pool", "first"), "first"),
        (("--per", "patient", "--pool", "last"), "last"),
    ):
        assert cli(*line, *options)[0] == 0
        metrics = metrics_of("theirs_evaluation/metrics_all_site.csv").loc["finding"]
        one = part.drop_duplicates("pid", keep=keep)
        expected = sk.roc_auc_score(one["finding"], one["p"])
        assert metrics["value"]["auroc"] == pytest.approx(expected)
        assert metrics["n"]["auroc"] == len(one) < len(part)


def test_groups_as_hospitals_write_them(site, table, cli):
    """Words of a sex, ages as in DICOM and decimal commas give the groups of plain values."""
    line = ("evaluate", "--predictions", "theirs.csv", "--task", "defect", "--n_boot", "0", "--by",
            "sex", "age:1,18")  # fmt: skip
    plain = pd.read_csv("labels.csv", dtype=str)
    sexes, ages = np.array(["M", "F"]), np.array([0.5, 12.5, 45])
    row = np.arange(len(plain))
    groups = []
    for sex, age in (
        (sexes, ages.astype(str)),
        (np.array(["M", "m", "Male", "m\u00e4nnlich", "f", "W", "female", "F"]),
         np.array(["006M", "12,5", "045Y"])),
    ):  # fmt: skip
        which = row % 2 * (len(sex) // 2) + row // 2 % (len(sex) // 2)
        plain.assign(sex=sex[which], age=age[row % 3]).to_csv("labels.csv", index=False)
        status, out, err = cli(*line)
        assert status == 0, err
        by = [pd.read_csv(f"theirs_evaluation/by_{x}_all_site.csv") for x in ("sex", "age")]
        groups.append([x[["n", "n_positive", "value"]] for x in by])
    for actual, expected in zip(groups[1], groups[0], strict=True):
        assert sorted(map(str, actual.to_numpy())) == sorted(map(str, expected.to_numpy()))
    assert "count as" in out and "read as years" in out and "decimal commas in age" in out
    folder = Path("theirs_evaluation")  # the next evaluation leaves no file of this one
    (folder / "by_mine_all_site.csv").write_text("")
    assert (folder / "forest_by_age_all_site.png").is_file()
    assert cli("evaluate", "--predictions", "theirs.csv", *FEW)[0] == 0
    assert [path.name for path in folder.glob("*by_*")] == ["by_mine_all_site.csv"]
    saved = json.loads((folder / "metrics_all_site.json").read_text())
    assert {*saved["files"], "by_mine_all_site.csv"} == {path.name for path in folder.iterdir()}


def test_survival_of_a_table_at_the_years_of_the_option(site, table, cli):
    rng, n = np.random.default_rng(2), len(table)
    risk = rng.normal(size=n)
    died, left = rng.exponential(4 * np.exp(-risk)), rng.uniform(1, 9, n)
    labels = table[["pid", "eid", "sex"]].assign(time=np.minimum(died, left), died=died <= left)
    labels.astype({"died": int}).to_csv("times.csv", index=False)
    config = json.loads(Path("config.json").read_text())
    config["task"]["death"] = {
        "task_labels": ["death"], "survival": {"death": ["time", "died"]},
        "units": {"death": "years"}, "label_path": "times.csv",
    }  # fmt: skip
    Path("config.json").write_text(json.dumps(config))
    survival = {f"death_survival_{t}": np.exp(-t / 4 * np.exp(risk)) for t in (1, 3)}
    theirs = table[["eid"]].assign(death_risk=risk, **survival)
    theirs.to_csv("risks.csv", index=False)
    args = ("--task", "death", "--years", "1,3", "--by", "sex", *FEW)
    assert cli("evaluate", "--predictions", "risks.csv", *args)[0] == 0
    folder = Path("risks_evaluation")
    metrics = metrics_of(folder / "metrics_all_site.csv").loc["death"]
    assert set(metrics.index) == {"c_index", "auroc_at_1", "auroc_at_3"}
    calibration = pd.read_csv(folder / "survival_calibration_all_site.csv")
    assert calibration["year"].unique().tolist() == [1, 3] and calibration["n"].sum() == 400
    inside = calibration["predicted"].between(calibration["ci_low"], calibration["ci_high"])
    assert inside.mean() > 0.7  # the predictions are the true probabilities
    groups = pd.read_csv(folder / "by_sex_all_site.csv").query("metric == 'c_index'")
    (a, b), scale = groups.to_dict("records"), lambda p: np.log(p / (1 - p))
    width = [(scale(x["ci_high"]) - scale(x["ci_low"])) / 3.92 for x in (a, b)]
    z = (scale(a["value"]) - scale(b["value"])) / np.hypot(*width)
    assert a["p_interaction"] == pytest.approx(math.erfc(abs(z) / 2**0.5), rel=0.01)
    page = (folder / "report_all_site.html").read_text()
    assert "at 1 and 3 years" in page and "Calibration of survival" in page


def test_the_methods_paragraph_is_true(table):
    outcome = BinaryOutcome("defect", table["finding"], table["p"], 0.3)
    studies = evaluation.Studies(list(table["eid"]), table["pid"].to_numpy(), [outcome])
    facts = {"target": "youden", "averaged": "chd/fold_0, chd/fold_1", "mean_thresholds": True}

    def paragraph(**changes):
        report = Report(Path(), "x", changes.pop("studies", studies), **changes)
        report.estimates = st.estimates(report.studies.outcomes, report.studies.patients, 200)
        report.comparison = []
        return methods_paragraph(report)

    text = paragraph(facts=facts)
    assert "mean over the models chd/fold_0, chd/fold_1" in text and "their mean" in text
    assert "Wilson" in text and "Simel" in text and "ece" not in text.split("Methods of the")[1]
    text = paragraph(facts={"target": "youden"}, folds=[studies.take(slice(0, 150))] * 2)
    assert "2 models" in text and "own threshold" in text and "Airola" in text
    pooled, _ = studies.at_prevalence(0.02).per_patient("mean")
    text = paragraph(facts={"per": "patient", "pool": "mean", "prevalence": 0.02}, studies=pooled)
    assert f"{pooled.outcomes[0].n} (defect)" in text and "prevalence of 0.02" in text
    assert "given with the predictions" in text and "all studies of a patient" not in text


@pytest.mark.figures
def test_regression_in_units_pooled_by_patient(site, table, cli):
    args = ("--task", "sizes", "--per", "patient", *FEW)
    assert cli("evaluate", "--predictions", "theirs.csv", *args)[0] == 0
    part = table.iloc[:280].groupby("pid")[["size", "guess"]].mean()
    metrics = metrics_of("theirs_evaluation/metrics_all_site.csv").loc["size"]
    error = (part["guess"] - part["size"]).abs()
    assert metrics["value"]["median_absolute_error"] == pytest.approx(error.median(), rel=1e-4)
    assert metrics["unit"]["median_absolute_error"] == "cm" and metrics["n"].eq(len(part)).all()
    for name in ("scatter_plots", "bland_altman"):
        for end in ("png", "pdf"):
            assert Path(f"theirs_evaluation/{name}_all_site.{end}").stat().st_size > 1000
    assert "the mean over a patient" in Path("theirs_evaluation/report_all_site.html").read_text()


def test_a_table_that_holds_its_truths_needs_no_config(site, table, cli):
    cells = {"PID": table["pid"], "Echo_ID": table["eid"]}
    cells |= {"x_Correct": table["finding"], "x_Predict": table["p"], "x_threshold": 0.4}
    pd.DataFrame(cells).to_csv("saveout.csv", index=False)
    Path("config.json").unlink()
    status, _, err = cli("evaluate", "--predictions", "saveout.csv", *FEW)
    assert status == 0, err
    metrics = metrics_of("saveout_evaluation/metrics_all_saveout.csv").loc["x"]
    ppv = table["finding"][table["p"] >= 0.4].mean()
    assert metrics["value"]["ppv"] == pytest.approx(ppv, rel=1e-5)
    status, _, err = cli("evaluate", "--predictions", "saveout.csv", "--compare", "chd")
    assert status == 1 and "label table" in err


def test_predictions_that_cannot_be_used(site, table, cli):
    tables = {
        "twice.csv": ({"eid": ["S001", "S001"], "finding": [0.1, 0.2]}, "S001"),
        "label.csv": ({"eid": ["S001"], "other": [0.1]}, "finding"),
        "logits.csv": ({"eid": ["S001"], "finding": [-3.2]}, "logits"),
        "ids.csv": ({"study": ["S001"], "finding": [0.2]}, "eid"),
    }
    lines = {(file,): text for file, (_, text) in tables.items()} | {
        ("theirs.csv", "--target", "sensitivity=0.9"): "<label>_threshold",
        ("theirs.csv", "--by", "age"): "87 different values",
        ("theirs.csv", "--by", "weight"): "weight",
        ("theirs.csv", "--by", "eid"): "eid",
        ("theirs.csv", "--compare", "label.csv"): "finding",
        ("theirs.csv", "--subset", "test"): "--subset",
    }
    for file, (cells, _) in tables.items():
        pd.DataFrame(cells).to_csv(file)
    for line, text in lines.items():
        status, _, err = cli("evaluate", "--predictions", *line, *FEW)
        assert status == 1 and text in err and "Traceback" not in err, err


def test_the_studies_asked_for_and_no_others(site, table, cli):
    config = json.loads(Path("config.json").read_text())
    config["task"]["defect"]["settings"] = {"target": "sensitivity=0.9"}  # of a training
    Path("config.json").write_text(json.dumps(config))
    pd.read_csv("theirs.csv").assign(finding_threshold=0.4).to_csv("theirs.csv", index=False)
    line = ("evaluate", "--predictions", "theirs.csv", "--n_boot", "0")
    assert cli(*line, "--first_study_only")[0] == 0
    assert metrics_of("theirs_evaluation/metrics_all_site.csv")["n"].eq(200).all()
    saved = json.loads(Path("theirs_evaluation/metrics_all_site.json").read_text())
    flow = [(box["text"], box["studies"]) for box in saved["flow"]]
    assert (evaluation.NOT_ASKED, 80) in flow and flow[-1] == ("evaluated", 200)
    assert cli(*line, "--first_study_only", "--sample_limit", "50")[0] == 0
    assert metrics_of("theirs_evaluation/metrics_all_site.csv")["n"].eq(50).all()
    page = Path("theirs_evaluation/report_all_site.html").read_text()
    assert "given with the predictions" in page and "validation fold" not in page
    kept = sample_ids(table["eid"], 50)
    assert len(kept) == 50 and kept == sorted(kept) != list(table["eid"][:50])
    assert set(sample_ids(table["eid"], 20)) < set(kept)


def test_a_table_says_which_columns_are_predictions(tmp_path, capsys):
    path = tmp_path / "theirs.csv"
    x = BinaryOutcome("x", [0, 1], [0.4, 0.5], threshold=0.2)
    studies = evaluation.Studies(["a", "b"], np.array(["p", "q"]), [x])
    assert list(studies.saveout()["x_threshold"]) == [0.2, 0.2]

    def compared(cells):
        pd.DataFrame({"eid": ["a", "b"]} | cells).to_csv(path, index=False)
        return evaluation.studies_to_compare(path, studies.outcomes, studies).outcomes[0]

    for cells, threshold in (
        ({"x": [0, 1], "x_Predict": [0.3, 0.7]}, None),
        ({"x": [0.3, 0.7], "x_threshold": 0.6}, 0.6),
        ({"x": [0.3, 0.7], "x_threshold": [0.6, 0.5]}, [0.6, 0.5]),
    ):
        other = compared(cells)
        assert list(other.predicted) == [0.3, 0.7] and list(other.truth) == [0, 1]
        assert np.array_equal(other.threshold, threshold)
    with pytest.raises(UserError, match="x_threshold: 1 of 2"):
        compared({"x": [0.3, 0.7], "x_threshold": [0.6, None]})
    for odd in (">0.9", "93%", "inf"):
        with pytest.raises(UserError, match=f"x: 1 cell .*{odd} .study b."):
            compared({"x": ["0.1", odd]})
    capsys.readouterr()


def test_tables_of_truths_without_patients_or_with_copies_are_reported(tmp_path, capsys):
    cells = {"PID": ["p", None, None], "Echo_ID": ["a", "b", "c"], "x_Correct": [0, 1, 1]}
    pd.DataFrame(cells | {"x_Predict": [0.1, 0.8, 0.9]}).to_csv(tmp_path / "s.csv", index=False)
    assert evaluation.studies_with_truths(tmp_path / "s.csv").eids == ["a"]
    assert "2 rows have no PID" in capsys.readouterr().out
    cells = {"PID": ["p", "q"], "Echo_ID": ["a", "b"], "x_Correct": [0, 1], "x_Predict": [0, 1]}
    pd.DataFrame(cells).to_csv(tmp_path / "s.csv", index=False)
    evaluation.warn_of_truths("s.csv", evaluation.studies_with_truths(tmp_path / "s.csv").outcomes)
    assert "all predictions of x equal the truth" in capsys.readouterr().out


def test_a_patient_is_named_by_the_study_that_is_taken():
    cuts = np.array([0.1, 0.1, 0.1, 0.9])
    x = BinaryOutcome("x", [np.nan, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], threshold=cuts)
    studies = evaluation.Studies(list("abcd"), np.array(["p", "p", "p", "q"]), [x])
    for rule, eids, p in (("first", ["b", "d"], [0.2, 0.4]), ("last", ["c", "d"], [0.3, 0.4])):
        pooled, _ = studies.per_patient(rule)
        assert pooled.eids == eids and list(pooled.outcomes[0].predicted) == p
        assert list(pooled.outcomes[0].threshold) == [0.1, 0.9]  # that of the patient's fold


def test_patients_are_compared_on_the_studies_that_both_have():
    ones, p = np.ones(3), np.array([0.2, 0.6, 0.4])
    one = evaluation.Studies(list("abc"), np.array(["p", "p", "q"]), [
        BinaryOutcome("x", ones, p, threshold=0.5)
    ])  # fmt: skip
    other = evaluation.Studies(
        list("cb"), np.array(["q", "p"]), [BinaryOutcome("x", [1, 1], [0, 0])]
    )
    *both, notes = evaluation.pair_studies(one, other, "theirs")
    assert notes == ["theirs: not compared at a threshold; theirs has none of x"]
    pooled = [studies.per_patient()[0] for studies in both]
    assert [s.eids for s in pooled] == [["b", "c"]] * 2
    assert list(pooled[0].outcomes[0].predicted) == [0.6, 0.4]
    metrics = st.compare(both[0].outcomes, both[1].outcomes, both[0].patients, 0)
    (note,) = (e.note for e in metrics if e.metric == "sensitivity")
    assert note == "the other: no threshold is stored with the model"


def test_two_hundred_labels_are_a_bounded_number_of_panels(tmp_path):
    rng = np.random.default_rng(0)
    y, p = (rng.random((200, 60)) < 0.3).astype(float), rng.random((200, 60))
    outcomes = [BinaryOutcome(f"label {k}", y[k], p[k], threshold=0.5) for k in range(200)]
    shown = curves.select_panels(outcomes)
    size = [min(o.n_positive, o.n - o.n_positive) for o in outcomes]
    assert len(shown) == curves.MAX_PANELS
    assert sum(min(o.n_positive, o.n - o.n_positive) for o in shown) == sum(sorted(size)[-12:])
    studies = evaluation.Studies(list(map(str, range(60))), np.arange(60), outcomes[:30])
    estimates = st.estimates(studies.outcomes, studies.patients, 0)
    lines = on_screen(evaluation.headlines_of(studies, estimates))
    assert len(lines) == MAX_LINES + 1 and lines[-1].endswith("5 more labels")


def test_roc_band_against_a_loop(table):
    """Sensitivity at each 1 - specificity, by drawing patients one by one."""
    y, p = table["finding"].to_numpy(float), table["p"].to_numpy()
    weights = next(st.resamples(table["pid"], 5, seed=3))
    roc, precision = curves.curves(y, p, weights)
    for b in range(5):
        rows = np.repeat(np.arange(300), weights[:, b].astype(int))
        false, true, _ = sk.roc_curve(y[rows], p[rows], drop_intermediate=False)
        np.testing.assert_allclose(roc[:, b], np.interp(curves.GRID, false, true), atol=1e-6)
        n, at = y[rows].sum(), curves.GRID[50]
        below = np.interp(at, true, false * (len(rows) - n))
        assert precision[50, b] == pytest.approx(at * n / (at * n + below), rel=1e-5)


def test_a_calibration_curve_against_a_loop(table):
    """The line through each point's neighbours, by numpy, in resamples of patients."""
    y, p = table["finding"].to_numpy(float), table["p"].to_numpy()
    weights = next(st.resamples(table["pid"], 4, seed=1))
    at = np.linspace(p.min(), p.max(), 9)
    smooth = curves.lowess(p, y, at, weights)
    for point, fits in zip(at, smooth, strict=True):
        away = abs(p - point)
        kernel = (1 - np.minimum(away / np.sort(away)[225 - 1], 1) ** 3) ** 3
        for b, fit in enumerate(fits):
            _, level = np.polyfit(p - point, y, 1, w=np.sqrt(kernel * weights[:, b]))
            assert fit == pytest.approx(level, abs=1e-5)
    assert np.isnan(
        curves.lowess(np.r_[np.zeros(9), 1.0], np.ones(10), np.array([1.0]), np.ones((10, 1)))
    )


def test_recalibration_against_other_implementations(table):
    y, p = table["finding"].to_numpy(float), table["p"].to_numpy() ** 2
    x, new = special.logit(p), np.linspace(0.01, 0.8, 7)
    assert list(fit_recalibration(y[:199], p[:199])) == ["intercept", "slope"]
    methods = fit_recalibration(y, p)
    shift = optimize.brentq(lambda a: special.expit(a + x).sum() - y.sum(), -9, 9)
    np.testing.assert_allclose(methods["intercept"](new), special.expit(shift + special.logit(new)))
    logistic = LogisticRegression(C=np.inf, tol=1e-12, max_iter=999).fit(x[:, None], y)
    expected = logistic.predict_proba(special.logit(new)[:, None])[:, 1]
    np.testing.assert_allclose(methods["slope"](new), expected, atol=1e-6)
    order = np.argsort(p)
    total = np.r_[0, np.cumsum(y[order])]
    means = [[(total[b] - total[a]) / (b - a) for b in range(a + 1, 301)] for a in range(300)]
    monotone = [max(min(means[a][i - a :]) for a in range(i + 1)) for i in range(0, 300, 30)]
    np.testing.assert_allclose(methods["isotonic"](p[order[::30]]), monotone, atol=1e-9)
    assert fit_recalibration(y * 0, p) == {}
    both, none = ([BinaryOutcome("VSD", truth, p)] for truth in (y, y * 0))
    both, none = (evaluation.Studies(list(table["eid"]), table["pid"], o) for o in (both, none))
    report = Report(Path(), "x", both, n_boot=0, validation=lambda: [none])
    report.recalibrate()
    assert not report.recalibration and report.notes[0].endswith("the finding: VSD")


@pytest.mark.xdist_group("page")
def test_the_report_fits_screens_and_paper(tmp_path, table, chromium):
    """No column is cut on a desktop, a phone, A4 and Letter, and all texts have contrast."""
    names = {"finding": "ventricular septal defect", "size": "left atrial diameter"}
    columns = {"threshold": 0.3, "prevalence": 0.01}
    outcomes = [
        BinaryOutcome("finding", table["finding"], table["p"], **columns),
        BinaryOutcome("never", table["finding"] * 0, table["p"], **columns),
        RegressionOutcome("size", table["size"], table["guess"], "cm"),
    ]
    studies = evaluation.Studies(list(table["eid"]), table["pid"].to_numpy(), outcomes)
    flow = evaluation.study_flow(table.set_index("eid"), dict.fromkeys(studies.eids, ""))
    Report(
        tmp_path, "x", studies, {"model_name": "m", "dataset": "site", "labels_sha256": "0" * 64},
        flow, {"sex": (table.set_index("eid")["sex"], [])}, {"other": (studies, studies)}, 100,
        names=names, validation=lambda: [studies],
    ).write()  # fmt: skip
    faults = Path(__file__).with_name("page_faults.js").read_text()
    for width, scheme, medium in (
        (1280, "light", "screen"), (1280, "dark", "screen"), (390, "light", "screen"),
        (703, "light", "print"), (725, "light", "print"),
    ):  # fmt: skip
        page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.emulate_media(media=medium)
        page.goto((tmp_path / "report_x.html").as_uri())
        assert page.evaluate(faults) == []
        texts = page.locator("thead th").all_inner_texts() if width == 1280 else []
        assert not texts or {"LR\u2212", "Brier score", "R\u00b2"} <= set(texts)
        assert "Ventricular septal defect" in page.inner_text("body")
        page.close()


def test_a_flow_counts_patients_once():
    table = pd.DataFrame({"pid": list("aabbcd")}, index=list("123456"))
    reasons = {"1": "no label", "3": "no label", "4": "in the train fold", "6": "no label"}
    flow = evaluation.study_flow(table, reasons)
    assert [(x["text"], x["studies"], x["patients"]) for x in flow] == [
        ("in the label table", 6, 4),
        ("no label", 3, 1),  # d alone: a and b have another study
        ("in the train fold", 1, 1),
        ("evaluated", 2, 2),
    ]


def test_names_from_elsewhere_are_text_in_the_page(tmp_path):
    name = '<img src="x"> 50 % & a_b'
    outcome = BinaryOutcome(name, np.tile([0.0, 1.0], 20), np.linspace(0, 1, 40))
    studies = evaluation.Studies([str(i) for i in range(40)], np.arange(40), [outcome])
    Report(tmp_path, "x", studies, {"model_name": "<b>"}, n_boot=100).write()
    for file in ("report_x.html", "tables_x.html"):
        page = (tmp_path / file).read_text()
        assert '<img src="x"' not in page and "&lt;img src" in page and "<b></b>" not in page
    lines = (tmp_path / "tables_x.tex").read_text().splitlines()
    row = next(line for line in lines if line.startswith("{}$<$"))
    assert r"50 \% \& a\_b" in row and row.endswith(r" \\")
    (head,) = (line for line in lines if "Brier score" in line and "Average" in line)
    assert len(re.findall(r"(?<!\\)&", row)) == len(re.findall("&", head)) == 8


def test_one_forest_plot_for_findings_and_grades(tmp_path):
    """Both kinds have the AUROC as their main metric: two figures of one name would be one."""
    rng = np.random.default_rng(0)
    truth, p = rng.integers(2, size=40), rng.random(40)
    outcomes = [BinaryOutcome(label, truth, p) for label in "ab"]
    for label in "cd":
        outcomes.append(MulticlassOutcome(label, truth, np.stack([1 - p, p], 1), ("no", "yes")))
    studies = evaluation.Studies([str(i) for i in range(40)], np.arange(40), outcomes)
    report = Report(tmp_path, "x", studies, n_boot=20)
    report.write()
    files = [figure["file"] for figure in report.figures if figure["file"].startswith("forest")]
    assert files == ["forest_auroc_x"]


def test_folds_of_a_cross_validation_say_who_is_missing():
    table = pd.DataFrame({"pid": list("abcd")}, index=list("1234"))
    parts = [["train", "test", "val", "known to m"], ["test", "train", "test", "train"]]
    folds = [pd.Series(x, table.index) for x in parts]
    flow = evaluation.fold_flow(table, folds, ["1", "2"])
    assert [x["studies"] for x in flow] == [4, 1, 1, 2]
    assert [x["text"] for x in flow[1:3]] == [evaluation.UNREADABLE_EMBEDDINGS, "known to m"]
    parts = [
        evaluation.Studies(list("12"), np.arange(2), [BinaryOutcome("x", [0, 1], p, threshold=cut)])
        for p, cut in (([0.2, 0.6], 0.5), ([np.nan, np.nan], None))
    ]
    assert len(list(evaluation.fold_notes(parts))) == 2
    assert list(evaluation.fold_notes(parts[:1])) == []
    joined = evaluation.join_folds([parts[0]] * 2)
    assert joined.eids == list("1212") and joined.outcomes[0].threshold == 0.5
    assert evaluation.join_folds(parts).outcomes[0].threshold is None


def test_blank_cells_are_a_group_and_columns_lead_nowhere(site, table, cli):
    """By words and by numbers; a column may be called as a path, or be very long."""
    labels = pd.read_csv("labels.csv", dtype=str)
    names = ["../../pwn", "a/b", "a\\b", "x" * 240]
    labels = labels.assign(**dict.fromkeys(names, labels["sex"]))
    labels.loc[[1, 3], ["sex", "age"]] = None
    labels.to_csv("labels.csv", index=False)
    before = set(site.iterdir())
    args = ("--by", "sex", "age:40", *names, "--n_boot", "0")
    status, _, err = cli("evaluate", "--predictions", "theirs.csv", *args)
    assert status == 0, err
    folder = site / "theirs_evaluation"
    for column, groups in {"sex": ["F", "M"], "age": ["< 40", ">= 40"]}.items():
        by = pd.read_csv(folder / f"by_{column}_all_site.csv").query("metric == 'auroc'")
        assert by["group"].tolist() == [*groups, "missing"] and by["n"].sum() == 280
        assert by["n"].iloc[-1] == 2
    assert set(site.iterdir()) - before == {folder} and all(x.is_file() for x in folder.iterdir())
    assert len(list(folder.glob("by_*.csv"))) == 6


@pytest.mark.figures
def test_a_models_fold_thresholds_and_another_model(cohort, add_model, cli, monkeypatch):
    folder = add_model("defect", "--epoch_lim", "2", "--target", "sensitivity=0.9")
    add_model("defect", "--epoch_lim", "2", "--model_name", "other", "--seed", "3")
    args = ("--compare", "other", "--target", "specificity=0.8")
    status, _, err = cli("evaluate", "--model_name", "defect", *args, *FEW)
    assert status == 0, err
    for name in ("roc_curves", "pr_curves", "reliability", "decision_curves", "confusion"):
        assert (folder / f"{name}_test_site.png").stat().st_size > 1000
    blank(monkeypatch)
    assert cli("evaluate", "--model_name", "defect", "--subset", "val", *FEW)[0] == 0
    metrics = metrics_of(folder / "metrics_val_site.csv").loc["finding"]["value"]
    assert metrics["sensitivity"] >= 0.9  # stored with the model, on this very fold
    history = pd.read_csv(folder / "train_losses.csv")
    best = history["val_AUROC"][history["val_loss"].idxmin()]
    assert best == pytest.approx(metrics["auroc"], rel=1e-5)
    page = (folder / "report_val_site.html").read_text()
    assert "was trained on them or chosen by them" in page and "reach a sensitivity of 0.9" in page
    args = ("--subset", "val", "--target", "specificity=0.8")
    assert cli("evaluate", "--model_name", "defect", *args, *FEW)[0] == 0
    metrics = metrics_of(folder / "metrics_val_site.csv").loc["finding"]["value"]
    assert metrics["specificity"] >= 0.8

    paths = [folder.parent / name / "split.csv" for name in ("defect", "other")]
    splits = [pd.read_csv(path, dtype=str) for path in paths]
    tested = [set(split["eid"][split["fold"] == "test"]) for split in splits]
    against = pd.read_csv(folder / "comparison_test_site.csv")
    assert against["n"].eq(len(tested[0] & tested[1])).all()  # unseen by both
    check_recalibration(folder)

    saved = json.loads((folder / "metrics_val_site.json").read_text())
    assert saved["target"] == "specificity=0.8"
    labels = pd.read_csv("labels.csv")[::-1]
    labels.to_csv("labels.csv", index=False)
    assert cli("evaluate", "--model_name", "defect", *FEW)[0] == 0  # by the rule of its training
    stored = ef.load("defect").record.thresholds["finding"]
    saveout = pd.read_csv(folder / "saveout_test_site.csv")
    metrics = metrics_of(folder / "metrics_test_site.csv").loc["finding"]["value"]
    order = [str(x) for x in labels["eid"]]
    assert list(saveout["Echo_ID"].astype(str)) == [x for x in order if x in tested[0]]
    assert saveout["finding_threshold"].to_numpy() == pytest.approx(stored, rel=1e-5)
    called = saveout["finding_Predict"][saveout["finding_Correct"] == 1] >= stored
    assert metrics["sensitivity"] == pytest.approx(called.mean(), rel=1e-5)

    args = ("--model_name", "other", "--compare", "other", "--target", "sensitivity=0.3")
    assert cli("evaluate", *args, *FEW)[0] == 0
    against = pd.read_csv(folder.parent / "other" / "comparison_test_site.csv")
    assert against["difference"].dropna().eq(0).all()  # itself, at one threshold

    labels[["eid", "finding"]].assign(finding=0.5).to_csv("theirs.csv", index=False)
    status, _, err = cli("evaluate", "--predictions", "theirs.csv", "--compare", "defect", *FEW)
    assert status == 0, err
    against = pd.read_csv("theirs_evaluation/comparison_all_site.csv")
    assert against["n"].eq(len(tested[0])).all()  # of its test fold, not of its training


def check_recalibration(folder):
    """The table against other fits to the predictions of the two folds."""
    val, test = (pd.read_csv(folder / f"saveout_{fold}_site.csv") for fold in ("val", "test"))
    y, p, truth, q = (x[f"finding_{k}"] for x in (val, test) for k in ("Correct", "Predict"))
    x, new = special.logit(p), special.logit(q)
    shift = optimize.brentq(lambda a: special.expit(a + x).sum() - y.sum(), -30, 30)
    expected = {"original": q, "intercept": special.expit(shift + new)}
    if p[y == 0].max() > p[y == 1].min():  # otherwise the slope is infinite
        fit = LogisticRegression(C=np.inf, tol=1e-12, max_iter=9999).fit(x.to_frame(), y)
        expected["slope"] = fit.predict_proba(new.to_frame())[:, 1]
    table = pd.read_csv(folder / "recalibration_test_site.csv").set_index("metric").loc["brier"]
    assert (table["fitted_on"] == len(val)).all() and (table["fitted_positive"] == y.sum()).all()
    page = (folder / "report_test_site.html").read_text()
    shown = "logistic with intercept" + ", logistic with intercept and slope" * (
        "slope" in expected
    )
    assert f"Recalibration ({shown}) was fitted on" in page and "No isotonic fit" in page
    assert f"{len(val)} ({y.sum()})" in page
    assert set(table["method"]) == set(expected)
    for method, value in zip(table["method"], table["value"], strict=True):
        assert value == pytest.approx(((expected[method] - truth) ** 2).mean(), rel=1e-3), method
