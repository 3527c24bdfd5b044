"""Labels: what cells mean, what looks wrong, how measurements are scaled."""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import edit_config
from scipy import stats

from echofocus_core.base.console import Collected, UserError
from echofocus_core.base.options import Settings
from echofocus_core.base.seen import Seen, seen_levels
from echofocus_core.study import folds as fd
from echofocus_core.study import labels as lb
from echofocus_core.study.config import Record, Task, read_config
from echofocus_core.study.models import LoadedModel
from echofocus_core.study.outputs import Outputs
from echofocus_core.study.scaling import scale, scaling_fault, unscale


def warnings(values, **task):
    """The warnings for a label with these values, number by study id."""
    table = pd.DataFrame({"L": np.array(values, float)}, index=map(str, range(len(values))))
    listener, unit = Collected(), task.get("units", {}).get("L", "")
    lb.warn_of_suspicious_values("L", table["L"].dropna(), unit, "t.csv", listener)
    return [finding.text for finding in listener.findings]


EF = np.linspace(31, 74, 60).round(1).tolist()


@pytest.mark.parametrize(
    "values, expected",
    [
        ([*EF, 999], "1 value looks like a code for 'missing': 999 (study 60)"),
        ([*EF, 9999, 999], "2 values look like a code for 'missing': 9999 (study 60), 999"),
        ([*EF, -9], "1 value looks like a code for 'missing': -9 (study 60)"),
        ([0, 1, 0, 1, 9], "1 value looks like a code for 'missing': 9 (study 4)"),
        ([-22.5, -17, -12.1, -99], "1 value looks like a code for 'missing': -99 (study 3)"),
        (EF, ""),
        ([2.5, 4, 5.5, 7, 8.8, 9], ""),  # 9 is where it would be
        ([-2.0, -1, 0, 0.5, 2], ""),  # a z-score
        ([-22.5, -17, -12.1, -9], ""),  # a strain
        (list(range(100)), ""),  # a percentage up to 99
    ],
)
def test_suspicious_values(values, expected):
    actual = warnings(values)
    assert len(actual) == bool(expected) and all(expected in text for text in actual), actual


def test_beyond_the_unit():
    (actual,) = warnings([*EF, 130], units={"L": "%"})
    assert "1 value is above 100 %: 130 (study 60)" in actual
    assert warnings([*EF, 130], units={"L": "ml"}) == []
    (actual,) = warnings([*EF, 999], units={"L": "%"})  # one fault, reported once
    assert "code for 'missing'" in actual


# ------------------------------------------------------------------------------------------ scaling


def scaling_of(values, boxcox):
    table, listener = pd.DataFrame({"L": np.array(values, float)}), Collected()
    task = Task(task_labels=["L"], type="regression", boxcox=["L"] if boxcox else [])
    return lb.scaling_of(table, task, listener=listener), [f.text for f in listener.findings]


@pytest.mark.parametrize(
    "one, other",
    [("Jo\u0308rg", "J\u00f6rg"), ("\uff30\uff11", "P1"), ("P\u00a01", "P  1"), ("p1", "P1"),
     ("0012", "12")],
)  # fmt: skip
def test_a_patient_in_two_forms_is_one(tmp_path, one, other):
    """Otherwise, the patient's studies would be split over two folds."""
    path = tmp_path / "t.csv"
    path.write_text(f"pid,eid\n{one},1\n{other},2\nQ7,3\n10,4\n1.0,5\n100,6\n", "utf-8")
    heard = Collected()
    rows = lb.read_rows(lb.LabelFile(path), [], heard)
    assert rows["pid"].tolist() == [one, one, "Q7", "10", "1", "100"]
    (warning,) = [x.text for x in heard.findings if x.level == "WARNING"]
    assert f"{other} and " in warning and "1 patient ids" in warning


@pytest.mark.parametrize(
    "ids, files, expected",
    [
        (["a\u00a0b", "p1"], ["a b", "P1"], {"a\u00a0b": "a b", "p1": "P1"}),
        (["a\u00a0b", "a b"], ["a b"], {}),  # two studies of the table
        (["P 1"], ["P 1", "P  1"], {}),  # two files
        (["P1"], ["01", "P01"], {}),
    ],
)
def test_ids_as_the_embeddings_are_called(ids, files, expected):
    store, heard = SimpleNamespace(files=dict.fromkeys(files)), Collected()
    assert fd.stored_names(ids, store, heard) == expected
    assert len(heard.findings) == bool(expected)


def test_scaling_is_as_published_and_turns_back():
    """Shift |mean| - min, Box-Cox by scipy's own, z-score; in the training fold mean 0, sd 1."""
    y = np.random.default_rng(0).gamma(2, 3, 500)
    for boxcox in (True, False):
        scaling, reason = scaling_of(y, boxcox)
        z = y + abs(y.mean()) - y.min()
        z = stats.boxcox(z)[0] if boxcox else z
        expected = (z - z.mean()) / z.std()
        actual = scale(y[:, None], ["L"], scaling)
        np.testing.assert_allclose(actual[:, 0], expected, atol=1e-5)
        np.testing.assert_allclose(unscale(actual, ["L"], scaling)[:, 0], y, rtol=1e-6)
        assert not reason


def test_box_cox_of_a_label_with_mean_0():
    y = np.r_[-np.arange(1, 51), np.arange(1, 51)].astype(float)
    scaling, reason = scaling_of(y, True)
    actual = scale(y[:, None], ["L"], scaling)
    assert not reason and np.isfinite(actual).all() and abs(actual.std() - 1) < 1e-9
    np.testing.assert_allclose(unscale(actual, ["L"], scaling)[:, 0], y, atol=1e-6)


@pytest.mark.parametrize(
    "values, boxcox",
    [
        ([1.0, 1e300, 2e300], False),
        ([1.0, 1.0 + 1e-11, 1.0], False),
        ([1e6, 1e6 + 1e-3, 1e6 + 2e-3], True),
    ],
)
def test_labels_that_no_model_could_be_loaded_with(values, boxcox):
    """What is fitted is refused by the rule by which a checkpoint's scaling is refused."""
    scaling, (reason,) = scaling_of(values, boxcox)
    assert "label L cannot be scaled" in reason and scaling_fault(scaling["L"])


def test_outside_of_a_box_cox_there_is_no_value():
    """Not 1e12: past the asymptote of a negative lambda, and below the least of the training."""
    s = {"L": {"shift": 0.0, "apply_boxcox": True, "lmbda": -0.5, "mean": 0.5, "stdev": 0.5}}
    at = -1 / s["L"]["lmbda"]  # where it ends
    z = np.array([[(at - 0.5 - 1e-3) / 0.5], [(at - 0.5) / 0.5], [10.0]])
    actual = unscale(z, ["L"], s)[:, 0]
    assert np.isfinite(actual[0]) and np.isnan(actual[1:]).all()
    assert np.isnan(scale(np.array([[-1.0], [0.0]]), ["L"], s)).all()


# -------------------------------------------------------------------------------------- tables


def load(task="defect", heard=None, **changes):
    """(task, label table) of the cohort in the current folder."""
    config = read_config()
    task = config.tasks[task].model_copy(update=changes)
    return lb.load_labels(task, config.datasets["site"], heard or Collected())


def test_a_table_of_a_european_spreadsheet_gives_the_same_labels(cohort):
    """Semicolons, decimal commas, UTF-16."""
    _, plain = load("sizes")
    text = pd.read_csv("labels.csv", dtype=str).to_csv(index=False, sep=";", lineterminator="\r\n")
    Path("labels.csv").write_bytes(text.replace(".", ",").encode("utf-16"))
    pd.testing.assert_frame_equal(load("sizes")[1], plain)


def test_words_and_repeated_rows_give_the_same_labels(cohort):
    """Yes/No, and rows that say the same as 1 and 1.0."""
    _, plain = load()
    table, heard = pd.read_csv("labels.csv", dtype=str), Collected()
    again = table[:3].assign(finding=table["finding"][:3] + ".0")
    pd.concat([table, again]).to_csv("labels.csv", index=False)
    pd.testing.assert_frame_equal(load(heard=heard)[1], plain)
    assert any("3 rows are repeated" in x.text for x in heard.findings)
    table["finding"] = table["finding"].map({"1": "Yes", "0": "NO"})
    table.to_csv("labels.csv", index=False)
    pd.testing.assert_frame_equal(load()[1], plain)


def test_cells_never_move_to_another_column(cohort):
    text = Path("labels.csv").read_text().replace("P000,1000", "P000,1000,", 1)
    Path("labels.csv").write_text(text)
    with pytest.raises(UserError, match="line 2 has 5 fields"):
        load()


@pytest.mark.parametrize(
    "values, kind", [([0, 1, 1, None], "binary"), ([0, 1, 2, 3], "regression")]
)
def test_values_decide_a_kind_that_is_not_given(cohort, values, kind):
    table = pd.read_csv("labels.csv", dtype=str)[:4]
    table.assign(finding=values).to_csv("labels.csv", index=False)
    task, table = load()
    assert task.type == kind and read_config().tasks["defect"].type == ""
    np.testing.assert_equal(table["finding"].to_numpy(), np.array(values, float))


TRAIN = ("train", "--task", "defect", "--epoch_lim", "1")


def from_one(table):
    return table.assign(finding=table["finding"].astype(int) + 1)


REFUSED = {  # how the label table is changed; type of the task; parts of the message
    "1 and 2": (from_one, "", ("every value is 1 or 2", "write 0 and 1")),
    "1 and 2, binary": (from_one, "binary", ("every value is 1 or 2", "write 0 and 1")),
    "unknown words": (lambda t: t.assign(finding="siehe Befund"), "", ("all 60", "siehe Befund")),
    "all out of range": (lambda t: t.assign(finding="7"), "binary", ("all 60", "not 0 or 1")),
    "other names": (
        lambda t: t.rename(columns={"pid": "Patient", "eid": "Untersuchung"}), "",
        ("no column 'pid'", '"columns": {"pid"', "Untersuchung"),
    ),
    "a row for each measurement": (
        lambda t: t.melt(["pid", "eid"], var_name="name"), "", ("'finding'", "value in 'name'")
    ),
    "two rows for a study": (
        lambda t: pd.concat([t, t[:1].assign(finding="0"), t[:1].assign(finding="1")]), "",
        ("1000", "line 2", "differ in finding"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_tables_that_are_refused_with_a_remedy(cohort, cli, case):
    change, kind, parts = REFUSED[case]
    change(pd.read_csv("labels.csv", dtype=str)).to_csv("labels.csv", index=False)
    edit_config(type=kind)
    for line in (TRAIN, ("check", "--task", "defect")):
        status, out, err = cli(*line)
        assert status == 1 and all(part in out + err for part in parts), out + err
    assert not Path("trained_models/defect/best_checkpoint.pt").exists()


def test_columns_and_words_of_another_language(cohort, cli):
    _, plain = load()
    table = pd.read_csv("labels.csv", dtype=str)
    table["finding"] = table["finding"].map({"1": "Ja", "0": "nein"})
    table["pid"], table["eid"], table["Nr"] = range(60), range(60), table["pid"] + "x"
    table["Patient"], table["Untersuchung"] = plain["pid"].to_numpy(), plain.index
    table.to_csv("labels.csv", index=False)
    edit_config(columns={"pid": "Patient", "eid": "Untersuchung"})
    pd.testing.assert_frame_equal(load()[1], plain)
    status, out, err = cli(*TRAIN)
    assert status == 0 and "ja = 1; nein = 0" in out, err
    status, out, err = cli("evaluate", "--task", "defect", "--by", "Patient:20")
    assert status == 1 and "not numbers" in err


def first_studies(cli, *options):
    """(exit status, eid of each patient's study in training, output)."""
    status, out, err = cli(*TRAIN, "--first_study_only", *options)
    path = Path("trained_models/defect/split.csv")
    split = pd.read_csv(path, dtype=str) if status == 0 else pd.DataFrame(columns=["pid", "eid"])
    return status, split.set_index("pid")["eid"].to_dict(), out + err


def test_the_first_study_is_the_earliest(cohort, cli):
    """A table with the newest first: by the dates of the studies, not those of birth."""
    table = pd.read_csv("labels.csv", dtype=str)
    earliest = table.drop_duplicates("pid").set_index("pid")["eid"].to_dict()
    days = pd.date_range("2020-01-25", periods=60, freq="9D")
    born = "3.5." + table["pid"].str[1:].astype(int).add(1960).astype(str)
    table = table.assign(born=born, seen=days.strftime("%d/%m/%Y"))[::-1]
    table.to_csv("labels.csv", index=False)
    status, actual, out = first_studies(cli)
    assert status == 0 and actual == earliest and "in the order of seen (day first)" in out, out
    shutil.rmtree("trained_models")
    again = days + pd.Timedelta(days=1)
    table["entered"] = again.strftime("%Y-%m-%d")[::-1]
    table.to_csv("labels.csv", index=False)
    status, actual, out = first_studies(cli)  # two columns of dates: the first row
    assert status == 0 and actual["P000"] == "1040" != earliest["P000"] and "--order_by" in out
    shutil.rmtree("trained_models")
    status, actual, out = first_studies(cli, "--order_by", "entered")
    assert status == 0 and actual == earliest, out
    table.assign(entered="01/02/2020").to_csv("labels.csv", index=False)
    for column, text in (("entered", "ambiguous dates"), ("size", "no dates"), ("x", "no column")):
        status, _, out = first_studies(cli, "--order_by", column, "--run_id", "b")
        assert status == 1 and text in out


def test_fifty_thousand_rows(cohort):
    """Thirty labels of 50,000 studies: read, matched and divided in seconds."""
    rng = np.random.default_rng(0)
    labels = [f"L{i}" for i in range(30)]
    table = pd.DataFrame(rng.integers(0, 2, (50_000, 30)), columns=labels)
    table.insert(0, "eid", np.arange(1000, 51_000).astype(str))
    table.insert(0, "pid", np.arange(50_000) // 2)
    table.to_csv("labels.csv", index=False)
    began = time.process_time()
    task, table = load(task_labels=labels)
    store = type("Store", (), {"files": dict.fromkeys(table.index), "copies": lambda eids: []})
    table = fd.match_studies(table, store, task, listener=Collected())
    folds = fd.training_folds(table, Settings(), task, listener=Collected())
    fd.cohort_of(task, table, folds, listener=Collected())
    seen = Seen.of(table[["pid"]].assign(fold=folds), "00")
    assert (seen_levels([seen], table) > 0).equals(folds != "test")
    assert time.process_time() - began < 20


def test_answers_past_the_end_of_a_box_cox_scale_are_reported(capsys):
    """No answer is blank without a reason."""
    s = {"L": {"shift": 0.0, "apply_boxcox": True, "lmbda": -0.5, "mean": 0.5, "stdev": 0.5}}
    model = LoadedModel(Path("m"), None, "t", Outputs.of(["L"], "regression"), s, Record(), {})
    actual = model.readable(np.array([[0.0], [9.0]], np.float32))
    assert np.isfinite(actual[0, 0]) and np.isnan(actual[1, 0])
    assert "1 answers of L are past the end" in capsys.readouterr().out
