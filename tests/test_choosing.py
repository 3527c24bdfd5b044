"""A first config, folds for rare labels, frozen aggregators, failed steps, grid search."""

import json
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import copy_example
from torch import nn

from echofocus_core.base.console import Collected
from echofocus_core.base.options import Settings
from echofocus_core.base.world import World
from echofocus_core.study import network
from echofocus_core.study.config import Task
from echofocus_core.study.folds import split_patients, warn_of_one_class
from echofocus_core.study.loading import read_checkpoint
from echofocus_core.study.loop import update
from echofocus_core.study.network import Aggregator, StudyModel
from echofocus_core.study.outputs import Outputs

MODELS = Path("trained_models")
RARE = Outputs.of(["rare"], "binary")


def fold_settings(fold=0):
    return Settings(n_folds=5, fold=fold, stratify="rare")


@pytest.fixture
def rare():
    """500 patients with two studies each; ten have the finding in one of them."""
    pids = [f"P{i % 500}" for i in range(1000)]
    return pd.DataFrame({"pid": pids, "rare": [float(i < 10) for i in range(1000)]})


def test_every_fold_has_its_share_of_a_rare_label(rare):
    for k in range(5):
        folds = split_patients(rare, fold_settings(k), RARE)
        assert folds.groupby(rare["pid"]).nunique().eq(1).all()
        positives = rare.groupby(folds)["rare"].sum()
        assert positives.to_dict() == {"test": 2, "train": 6, "val": 2}
        assert folds.value_counts()["test"] == 200
    tested = [
        set(rare["pid"][split_patients(rare, fold_settings(k), RARE) == "test"]) for k in range(5)
    ]
    assert sum(map(len, tested)) == len(set.union(*tested)) == 500
    size = rare.assign(rare=np.arange(1000.0) % 500)
    means = size.groupby(split_patients(size, fold_settings(), Outputs.of(["rare"], "regression")))[
        "rare"
    ].mean()
    assert (means - 249.5).abs().max() < 30


def test_a_fold_without_a_positive_is_reported(rare):
    listener = Collected()
    folds = pd.Series(["train"] * 20 + ["val"] * 480 + ["test"] * 500, rare.index)
    folds[9] = "val"
    warn_of_one_class(rare, folds, Task(task_labels=["rare"], type="binary"), listener)
    assert [f.text for f in listener.findings] == [
        "label rare cannot be evaluated in the test fold: always 0"
    ]


def test_a_step_without_a_finite_loss_is_dropped():
    net = StudyModel(1, depth=0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    before = [p.clone() for p in net.parameters()]
    fine = [torch.ones_like(p) for p in net.parameters()]
    broken = [*fine[:-1], torch.full_like(fine[-1], np.inf)]
    for gradients, losses in ((fine, [1.0, np.nan]), (broken, [1.0, 2.0])):
        n, loss = update(net, optimizer, gradients, np.array(losses), World())
        assert n == 2 and np.isnan(loss)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert optimizer.param_groups[0]["lr"] == 1e-3 / 4
    assert update(net, optimizer, fine, np.array([1.0, 2.0]), World()) == (2, 1.5)
    assert not torch.equal(next(net.parameters()), before[0])


def state(name):
    return read_checkpoint(MODELS / name / "last_checkpoint.pt")["model_state_dict"]


def test_a_frozen_aggregator_and_a_search(cohort, cli):
    one = ("--epoch_lim", "1")
    status, out, err = cli(
        "train", "--task", "defect", "--grid", "lr=1e-3,1e-5", "--stratify", "finding", *one
    )
    assert status == 0, err
    table = pd.read_csv(MODELS / "defect" / "grid.csv")
    assert set(table["learning_rate"]) == {1e-3, 1e-5} and table["val_loss"].is_monotonic_increasing
    for row in table.itertuples():
        losses = pd.read_csv(MODELS / row.model / "train_losses.csv")
        assert row.val_loss == losses["val_loss"].min()
        assert losses["lr"][0] == row.learning_rate
    assert not list(MODELS.rglob("saveout_*")) and "no test fold was read" in out

    grid, before = ("train", "--task", "defect", "--stratify", "finding", *one), table.to_csv()
    status, _, err = cli(*grid, "--grid", "lr=1e-6,1e-7")  # those folders are of other rates
    assert status == 1 and "learning_rate = 0.001, not 1e-06" in err
    assert pd.read_csv(MODELS / "defect" / "grid.csv").to_csv() == before

    start = str(MODELS / "defect" / "grid_0")
    probe = ("train", "--task", "defect", "--model_name", "probe", "--init_from", start, *one)
    assert cli(*probe, "--freeze", "aggregator", "--head_learning_rate", "0.01")[0] == 0
    before, after = state("defect/grid_0"), state("probe")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert set(before) - same == {"ff.weight", "ff.bias"}
    assert pd.read_csv(MODELS / "probe" / "train_losses.csv")["dropped_steps"].eq(0).all()
    for args, text in {
        ("--freeze", "aggregator"): "--init_from",
        ("--grid", "lrr=1,2"): "lrr=1,2",
        ("--grid", "learning_rate=fast"): "--learning_rate should be",
        ("--stratify", "findings"): "not a label",
        ("--grid", "seed=0,1"): "does not change the folds",
    }.items():
        status, _, err = cli("train", "--task", "defect", "--model_name", "new", *args, *one)
        assert status in (1, 2) and text in err, err


class MeanOfClips(Aggregator):
    """Another aggregator, without attention and with another name for its last layer."""

    heads = ("last",)

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.layers = nn.ModuleList(nn.Linear(768, 768) for _ in range(self.depth))
        self.last = nn.Linear(768, self.n_outputs)

    def read(self, tokens, lengths, rng):
        x = torch.stack([study.mean(0) for study in tokens.split(list(lengths))])
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.last(x), x


def test_another_aggregator_is_one_class(cohort, cli, monkeypatch):
    """It is trained, resumed, loaded, described, frozen and explained, or options are refused."""
    assert get_args(Settings.model_fields["transformer_type"].annotation) == tuple(
        network.AGGREGATORS
    )
    monkeypatch.setitem(network.AGGREGATORS, "standard", MeanOfClips)
    line, one = ("train", "--task", "defect"), ("--epoch_lim", "1")
    status, _, err = cli(*line, *one, "--encoder_depth", "2", "--layer_decay", "0.5")
    assert status == 0, err
    probe = ("--model_name", "probe", "--init_from", "defect", "--freeze", "aggregator")
    status, _, err = cli(*line, *probe, *one)
    assert status == 0, err
    before, after = state("defect"), state("probe")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert set(before) - same == {"last.weight", "last.bias"} and len(same) == 4
    model = ("--model_name", "probe")
    for command in ("inspect", "predict", "evaluate", "embed", "explain"):
        status, _, err = cli(command, *model)
        assert status == 0, err
    status, _, err = cli("explain", *model, "--explain_method", "attention")
    assert status == 1 and "has no attention" in err
    assert cli("embed", *model, "--no_pool_queries")[0] == 1


def test_heads_are_copied_by_label_along_the_axis_of_labels():
    axes = {"ff.weight": 0, "ff.bias": 0}
    assert StudyModel(3).label_axes() == StudyModel(3, "query").label_axes() == axes
    assert StudyModel(3, "multiquery").label_axes() == {"query_tokens": 1}


def init(folder, cli, monkeypatch):
    """(output of `init` in a folder, the config that it wrote)."""
    monkeypatch.chdir(folder)
    status, out, err = cli("init")
    assert status == 0, err
    lines = (folder / "config.json").read_text().splitlines()
    return out, json.loads("\n".join(x for x in lines if not x.strip().startswith("//")))


def test_init_on_embeddings_and_a_german_table(one_cohort, tmp_path, cli, monkeypatch):
    """It maps the columns of ids by their values, and proposes a task per kind of label."""
    (tmp_path / "data" / "of" / "site").mkdir(parents=True)
    (tmp_path / "data" / "of" / "site" / "emb").symlink_to(one_cohort / "emb")
    table = pd.read_csv(one_cohort / "labels.csv", dtype={"eid": str})
    n, i = len(table), np.arange(len(table))
    german = pd.DataFrame({"Patient": table["pid"], "Untersuchung": table["eid"]})
    german["VSD"] = table["finding"].map({1: "ja", 0: "nein"})
    german["EF"] = table["size"].map("{:.2f}".format).str.replace(".", ",")
    german["Grad"], german["Geschlecht"] = np.array(["leicht", "schwer"])[i % 2], "w"
    german["Datum"], german["Kommentar"] = "03.04.2020", [f"Text {k}" for k in i]
    german["Nummer"], german["warning"] = 9000 + i, i % 2
    german["NYHA"] = np.array(["0", "I", "II", "III"])[i % 4]
    german["MR"] = np.array(["Mild", "None", "Severe"])[i % 3]
    german["LVEDD [mm]"] = 40.5 + i % 7
    german["Nachname"] = np.array(["Müller", "Weber"])[i // 2 % 2]
    german["Ansprechpartner"] = np.array(["Dr. Fuchs", "Dr. Hahn"])[i % 2]
    german["Tel.-Nr. 1"] = 1700000 + i % 9
    german.to_csv(tmp_path / "Befunde.csv", sep=";", index=False)
    out, config = init(tmp_path, cli, monkeypatch)
    tasks, columns = config["task"], {"pid": "Patient", "eid": "Untersuchung"}
    kinds = {name: (task["type"], task["task_labels"]) for name, task in tasks.items()}
    assert kinds == {
        "findings": ("binary", ["VSD"]),
        "measurements": ("regression", ["EF", "LVEDD"]),
        "grades": ("multiclass", ["Grad", "NYHA", "MR"]),
    }
    assert tasks["grades"]["classes"]["NYHA"] == ["0", "I", "II", "III"]
    assert tasks["grades"]["classes"]["MR"] == ["None", "Mild", "Severe"]
    assert tasks["measurements"].pop("units") == {"LVEDD": "mm"}
    assert tasks["measurements"]["columns"].pop("LVEDD") == "LVEDD [mm]"
    assert all(t["columns"] == columns and t["label_path"] == "Befunde.csv" for t in tasks.values())
    assert not re.search("Weber|Hahn|1700", out + Path("config.json").read_text())
    assert config["dataset"] == {"emb": {"embedding_path": "data/of/site/emb"}}
    assert f"VSD: {table['finding'].sum()} of {n}" in out and "next:" in out.splitlines()[-1]
    before = Path("config.json").read_text()
    status, _, err = cli("init")
    assert (
        status == 1
        and "config.json already exists" in err
        and Path("config.json").read_text() == before
    )
    line = out.splitlines()[-1].partition("echofocus.py ")[2].split()
    status, _, err = cli("init", "--config", "none/c.json")
    assert status == 1 and "no folder none" in err
    status, out, _ = cli(*line)
    assert status == 0 and "60 labelled studies of 40 patients" in out
    Path("config.json").unlink()
    status, _, err = cli("train")
    assert status == 1 and "init writes one" in err
    german["VSD"] = german["VSD"].map({"ja": "vorhanden", "nein": "fehlt"})
    german.to_csv("Befunde.csv", sep=";", index=False)
    task = {"task_labels": ["EF", "VSD"], "label_path": "Befunde.csv", "columns": columns}
    Path("config.json").write_text(json.dumps({"task": {"a": task}, "dataset": config["dataset"]}))
    status, _, err = cli("train", "--epoch_lim", "1")
    assert status == 1 and "VSD: all 60 values" in err and err.count("\n") == 1


def test_init_on_videos_and_on_nothing(tmp_path, cli, monkeypatch):
    exams = tmp_path / "full" / "Exams"
    for study in ("a", "b"):
        (exams / study / "series").mkdir(parents=True)
        copy_example(exams / study / "series" / "IM1")
    out, config = init(tmp_path / "full", cli, monkeypatch)
    (dataset,) = config["dataset"].values()
    assert dataset["video_base_path"] == "Exams"
    assert "download" in out.splitlines()[-1] and "--videos Exams" in out.splitlines()[-1]
    (tmp_path / "full" / "config.json").unlink()
    rows = [{"patient_id": f"P{i}", "exam": study, "EF": 50 + i} for i, study in enumerate("ab")]
    pd.DataFrame(rows).to_csv(tmp_path / "full" / "labels.csv", index=False)
    out, config = init(tmp_path / "full", cli, monkeypatch)
    assert config["task"]["measurements"]["columns"] == {"pid": "patient_id", "eid": "exam"}
    assert out.splitlines()[-1].endswith("Exams --out embeddings/Exams")
    (tmp_path / "full" / "config.json").unlink()
    rows = [{"FileName": f"0X{i}", "EF": 50.5 + i, "Split": "TRAIN"} for i in range(3)]
    pd.DataFrame(rows).to_csv(tmp_path / "full" / "FileList.csv", index=False)
    out, config = init(tmp_path / "full", cli, monkeypatch)
    assert out.splitlines()[-1].endswith("embeddings/Exams --manifest FileList.csv")
    assert "FileList.csv: no column of patients" in out
    assert set(config["task"]) == {"FileList_measurements", "labels_measurements"}
    visits = tmp_path / "patients" / "Export"
    for i, study in enumerate(("s1", "s2", "s3", "s4")):
        (visits / f"P{i // 2}" / study).mkdir(parents=True)
        copy_example(visits / f"P{i // 2}" / study / "IM1", study=f"1.2.{i}")
    table = pd.DataFrame({"Patient": ["P0", "P0", "P1", "P1"], "No": ["s1", "s2", "s3", "s4"]})
    table.assign(EF=[50, 60, 55, 45]).to_csv(tmp_path / "patients" / "labels.csv", index=False)
    out, config = init(tmp_path / "patients", cli, monkeypatch)
    assert config["dataset"] == {"Export": {"embedding_path": "embeddings/Export"}}
    assert config["task"]["measurements"]["columns"] == {"pid": "Patient", "eid": "No"}
    (tmp_path / "empty").mkdir()
    out, config = init(tmp_path / "empty", cli, monkeypatch)
    assert out.splitlines()[-1].endswith("demo") and list(config) == ["task", "dataset"]
