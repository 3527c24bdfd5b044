"""Labels: what cells mean, what looks wrong, how measurements are scaled."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import write_embeddings
from scipy import stats

from echofocus_core.base.console import Collected
from echofocus_core.base.options import Settings
from echofocus_core.base.seen import Seen, seen_levels
from echofocus_core.study import folds as fd
from echofocus_core.study import labels as lb
from echofocus_core.study.config import Record, Task, read_config
from echofocus_core.study.models import LoadedModel
from echofocus_core.study.outputs import Outputs, scale, scaling_fault, unscale

TRAIN = ("train", "--task", "defect", "--epoch_lim", "1")


def warnings(values, **task):
    """What is said of a label with these values, number by study id."""
    table = pd.DataFrame({"L": np.array(values, float)}, index=map(str, range(len(values))))
    listener, unit = Collected(), task.get("units", {}).get("L", "")
    lb.warn_of_suspicious_values("L", table["L"].dropna(), unit, "t.csv", listener)
    return [finding.text for finding in listener.findings]


EF = np.linspace(31, 74, 60).round(1).tolist()


@pytest.mark.parametrize(
    "values, expected",
    [
        ([*EF, 999], "1 values look like a code for 'missing': 999 (study 60)"),
        ([*EF, 99, 99], "2 values look like a code for 'missing': 99 (study 60)"),
        ([*EF, 9999, 999], "2 values look like a code for 'missing': 9999 (study 60), 999"),
        ([*EF, -1], "1 values look like a code for 'missing': -1 (study 60)"),
        ([*EF, -9, 999], "2 values look like a code for 'missing': -9 (study 60), 999"),
        ([0, 1, 0, 1, 9], "1 values look like a code for 'missing': 9 (study 4)"),
        ([0, 1, 1, -1], "1 values look like a code for 'missing': -1 (study 3)"),
        ([-22.5, -17, -12.1, -99], "1 values look like a code for 'missing': -99 (study 3)"),
        (EF, ""),
        ([2.5, 4, 5.5, 7, 8.8, 9], ""),  # 9 is where it would be
        ([-2.0, -1, 0, 0.5, 2], ""),  # a z-score
        ([-22.5, -17, -12.1, -9], ""),  # a strain
        (list(range(100)), ""),  # a percentage up to 99
        ([0.2, 0.5, 0.9, 1.4], ""),
        ([0, 0.5, 3, 40, 100], ""),  # a regurgitant fraction in percent
        ([1, 2, 3], ""),
    ],
)
def test_suspicious_values(values, expected):
    actual = warnings(values)
    assert len(actual) == bool(expected) and all(expected in text for text in actual), actual


def test_beyond_the_unit():
    (actual,) = warnings([*EF, 130], units={"L": "%"})
    assert "1 values are above 100 %: 130 (study 60)" in actual
    assert warnings([*EF, 130], units={"L": "ml"}) == []
    (actual,) = warnings([*EF, 999], units={"L": "%"})  # one fault, said once
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
    """Else the patient's studies would be dealt to two folds."""
    path = tmp_path / "t.csv"
    path.write_text(f"pid,eid\n{one},1\n{other},2\nQ7,3\n10,4\n1.0,5\n100,6\n", "utf-8")
    heard = Collected()
    rows = lb.read_rows(path, [], heard)
    assert rows["pid"].tolist() == [one, one, "Q7", "10", "1", "100"]
    (warning,) = [x.text for x in heard.findings if x.level == "WARNING"]
    assert f"{other} and " in warning and "1 patient ids" in warning


def test_ids_in_another_unicode_normal_form(cohort, cli):
    """Matched where one form stands for one study; two studies that differ by it alone stay two."""
    forms = {"1000": "J\u00f6rg", "1001": "Jo\u0308rg", "1002": "Ra\u0301ul"}
    for old, new in forms.items():
        (cohort / "emb" / f"{old}.hdf5").rename(cohort / "emb" / f"{new}.hdf5")
    table = pd.read_csv(cohort / "labels.csv", dtype=str)
    table["eid"] = table["eid"].replace(forms | {"1002": "R\u00e1ul"})
    table.to_csv(cohort / "labels.csv", index=False)
    status, out, err = cli(*TRAIN)
    assert status == 0, err
    assert "1 studies are matched" in out and "R\u00e1ul" in out
    assert "60 labelled studies" in out
    split = pd.read_csv(cohort / "trained_models" / "defect" / "split.csv", dtype=str)
    assert set(forms.values()) <= set(split["eid"])
    status, out, err = cli("predict", "--task", "defect")
    assert status == 0 and "no embeddings" not in out, err


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
        ([1.0, 1.7e308, 1.7e308], False),
        ([1.0, 2e9, 4e9], False),
        ([1.0, 1.0 + 1e-11, 1.0], False),
        ([1e6, 1e6 + 1e-3, 1e6 + 2e-3], True),
        ([1.0, 1e200, 1.0], True),
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


# ---------------------------------------------------------------------------------- by command line


def set_config(**task):
    config = json.loads(Path("config.json").read_text())
    config["task"]["defect"].update(task)
    Path("config.json").write_text(json.dumps(config))


def write_labels(text_of, name="labels.csv", encoding="utf-8"):
    """The cohort's label table, written otherwise: `text_of` makes text of its DataFrame."""
    table = pd.read_csv("labels.csv", dtype=str)
    text = text_of(table)
    Path(name).write_bytes(text.encode(encoding))


def test_a_table_of_a_european_spreadsheet_gives_the_same_model(cohort, cli):
    """Semicolons, decimal commas and UTF-16: the losses of the plain table."""
    line = ("train", "--task", "sizes", "--epoch_lim", "1", "--run_id")
    assert cli(*line, "plain")[0] == 0
    text = (
        pd.read_csv("labels.csv", dtype=str)
        .to_csv(index=False, sep=";", lineterminator="\r\n")
        .replace(".", ",")
    )
    Path("labels.csv").write_bytes(text.encode("utf-16"))
    status, out, err = cli(*line, "other")
    assert status == 0, err
    assert "read as utf-16, cells between semicolons" in out and "decimal commas in size" in out
    losses = [
        pd.read_csv(f"trained_models/sizes_{x}/train_losses.csv")["val_loss"].tolist()
        for x in ("plain", "other")
    ]
    assert losses[0] == losses[1]


def test_words_a_trailing_comma_and_one_point_nought(cohort, cli):
    """Yes/No; a comma more in each row; rows that say the same as 1 and 1.0."""
    table = pd.read_csv("labels.csv", dtype=str)
    again = table[:3].assign(finding=table["finding"][:3] + ".0", size=table["size"][:3] + "0")
    text = pd.concat([table, again]).to_csv(index=False)
    head, *rows = text.splitlines()
    Path("labels.csv").write_text("\n".join([head, *(row + "," for row in rows)]))
    status, out, err = cli(*TRAIN)
    assert status == 0, err
    assert "3 rows repeat another one" in out
    before = pd.read_csv("trained_models/defect/train_losses.csv")["val_loss"]
    table["finding"] = table["finding"].map({"1": "Yes", "0": "NO"})
    table.to_csv("labels.csv", index=False)
    status, out, err = cli(*TRAIN, "--run_id", "words")
    assert status == 0 and out.count("read as 1/0 in finding") == 1, err
    after = pd.read_csv("trained_models/defect_words/train_losses.csv")["val_loss"]
    assert before.tolist() == after.tolist()


def test_excel_gives_the_same_studies(cohort, cli):
    openpyxl = pytest.importorskip("openpyxl")
    book, table = openpyxl.Workbook(), pd.read_csv("labels.csv")
    for row in [list(table), *table.to_numpy().tolist()]:
        book.active.append(row)
    book.save("labels.xlsx")
    set_config(label_path="labels.xlsx")
    status, out, err = cli("check", "--task", "defect")
    assert status == 0 and "60 labelled studies of 40 patients" in out, out + err
    assert "labels.xlsx: read as an Excel sheet" in out


def test_cells_never_move_to_another_column(cohort, cli):
    """The column's neighbour was once trained on; now the line is named."""
    text = Path("labels.csv").read_text().replace("P000,1000", "P000,1000,", 1)
    Path("labels.csv").write_text(text)
    for line in (TRAIN, ("check", "--task", "defect")):
        status, out, err = cli(*line)
        assert status == 1 and "labels.csv, line 2 has 5 fields and the header 4" in out + err


def test_fifty_thousand_rows(cohort, cli, monkeypatch):
    """Thirty labels of 50,000 studies: read, matched and divided in seconds."""
    rng = np.random.default_rng(0)
    labels = [f"L{i}" for i in range(30)]
    table = pd.DataFrame(rng.integers(0, 2, (50_000, 30)), columns=labels)
    table.insert(0, "eid", np.arange(1000, 51_000).astype(str))
    table.insert(0, "pid", np.arange(50_000) // 2)
    table.to_csv("labels.csv", index=False)
    set_config(task_labels=labels)
    write_embeddings(cohort / "emb", "1000", np.ones((1, 1, 768), np.float32))
    config = read_config("config.json")
    began = time.process_time()
    task, table = lb.load_labels(config.tasks["defect"], config.datasets["site"], Collected())
    store = type("Store", (), {"files": dict.fromkeys(table.index), "copies": lambda eids: []})
    table = fd.match_studies(table, store, task, listener=Collected())
    folds = fd.training_folds(table, Settings(), task, listener=Collected())
    fd.cohort_of(task, table, folds, listener=Collected())
    seen = Seen.of(table[["pid"]].assign(fold=folds), "00")
    assert (seen_levels([seen], table) > 0).equals(folds != "test")
    assert time.process_time() - began < 20


def test_answers_past_the_end_of_a_box_cox_scale_are_said(capsys):
    """Never a blank without a reason."""
    s = {"L": {"shift": 0.0, "apply_boxcox": True, "lmbda": -0.5, "mean": 0.5, "stdev": 0.5}}
    model = LoadedModel(Path("m"), None, "t", Outputs.of(["L"], "regression"), s, Record(), {})
    actual = model.readable(np.array([[0.0], [9.0]], np.float32))
    assert np.isfinite(actual[0, 0]) and np.isnan(actual[1, 0])
    assert "1 answers of L are past the end" in capsys.readouterr().out
