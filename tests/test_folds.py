"""Who trains and who tests: folds by patient, given splits, and what a model has seen before."""

import json
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import edit_config, write_embeddings

from echofocus_core.base.console import Collected, UserError
from echofocus_core.base.options import FOLDS, Settings
from echofocus_core.base.seen import Seen, seen_levels
from echofocus_core.study import folds as fd
from echofocus_core.study.config import Record
from echofocus_core.study.explanations import explained_studies
from echofocus_core.study.folds import training_folds
from echofocus_core.study.outputs import Outputs
from echofocus_core.video.store import write_encoder_seen

DEFECT = ("train", "--task", "defect", "--epoch_lim", "1")
MODELS = Path("trained_models")


def add_dataset(name, **entry):
    config = json.loads(Path("config.json").read_text())
    config["dataset"][name] = {"embedding_path": "emb", **entry}
    Path("config.json").write_text(json.dumps(config))


def copy_alone(model, to):
    """The checkpoint of a model in a folder of its own, as it is sent to a colleague."""
    (MODELS / to).mkdir()
    shutil.copy(MODELS / model / "best_checkpoint.pt", MODELS / to)
    return to


def split_of(model):
    return pd.read_csv(MODELS / model / "split.csv", dtype=str).set_index("eid")


def studies_tested(cli, model, *options, dataset="site"):
    """Ids of the studies that `evaluate` takes for the test fold."""
    status, out, err = cli("evaluate", "--model_name", model, "--dataset", dataset, *options)
    assert status == 0, out + err
    path = MODELS / model / f"saveout_test_{dataset}.csv"
    return set(pd.read_csv(path, dtype=str)["Echo_ID"]), out


@pytest.fixture
def trained(cohort, add_model):
    add_model("defect", "--epoch_lim", "1")
    split = split_of("defect")
    return {fold: set(split.index[split["fold"] == fold]) for fold in FOLDS}


# ---------------------------------------------------------------------------- what a model has seen


def test_a_copied_model_is_not_tested_on_its_training_patients(trained, cli):
    """On its own dataset the test fold is that of the training, without split.csv."""
    tested, _ = studies_tested(cli, copy_alone("defect", "copy"))
    assert tested == trained["test"]


def test_a_copied_model_as_initial_weights(cohort, cli):
    """Under another seed, and again from that, no study that an ancestor knows is a test."""
    wide = ("--split", "30,35,35")
    assert cli(*DEFECT, *wide, "--model_name", "first")[0] == 0
    learnt, validated, model = set(), set(), copy_alone("first", "copy")
    split = split_of("first")
    for seed in (1, 3):
        learnt |= set(split.index[split["fold"] == "train"])
        validated |= set(split.index[split["fold"] == "val"])
        name = f"child{seed}"
        line = (*DEFECT, *wide, "--init_from", model, "--model_name", name, "--seed", seed)
        status, out, err = cli(*line)
        assert status == 0, err
        assert "has seen the patients" in out
        split = split_of(name)
        val, test = (set(split.index[split["fold"] == fold]) for fold in ("val", "test"))
        assert test and not test & (learnt | validated) and not val & learnt
        model = copy_alone(name, f"copy{seed}")
        assert studies_tested(cli, model)[0] == test


def test_the_same_studies_under_another_name(trained, cli):
    """Re-coded patients are recognised by their studies, and so are their new studies."""
    table = pd.read_csv("labels.csv", dtype=str)
    table["pid"] = "X" + table["pid"]
    new = table[:40].assign(eid=[f"new{i}" for i in range(40)])  # one more of every patient
    pd.concat([table, new]).to_csv("recoded.csv", index=False)
    for eid in new["eid"]:
        write_embeddings(Path("emb"), eid, np.ones((1, 4, 768), np.float32))
    add_dataset("other", label_path="recoded.csv")
    everybody = table.set_index("eid")["pid"]
    seen = set(everybody[sorted(trained["train"] | trained["val"])])
    expected = {e for e, p in zip(new["eid"], new["pid"], strict=True) if p not in seen}
    for model in ("defect", copy_alone("defect", "copy")):
        tested, out = studies_tested(cli, model, dataset="other")
        assert tested == trained["test"] | expected
        assert f"not test studies: {100 - len(tested)} labelled studies" in out


def test_new_studies_of_training_patients_are_left_out(trained, cli):
    """On another dataset, by patient alone; --assume_unseen takes them all, and says so."""
    table = pd.read_csv("labels.csv", dtype=str)
    table.assign(eid="n" + table["eid"]).to_csv("later.csv", index=False)
    for eid in table["eid"]:
        shutil.copy(f"emb/{eid}.hdf5", f"emb/n{eid}.hdf5")
    add_dataset("later", label_path="later.csv")
    tested, _ = studies_tested(cli, copy_alone("defect", "copy"), dataset="later")
    assert tested == {f"n{eid}" for eid in trained["test"]}
    tested, out = studies_tested(cli, "copy", "--assume_unseen", dataset="later")
    assert len(tested) == 60 and "WARNING" in out and "(--assume_unseen)" in out


def test_a_published_model_was_trained_elsewhere(trained, cli):
    """It can be evaluated; the table records that its training data are unknown."""
    copy_alone("defect", "published")
    path = MODELS / "published" / "best_checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in saved.items() if k not in ("echofocus", "seen")}, path)
    tested, out = studies_tested(cli, "published", "--task", "defect")
    assert len(tested) == 60 and "was trained elsewhere" in out
    metrics = pd.read_csv(MODELS / "published" / "metrics_test_site.csv")
    assert set(metrics["unseen"]) == {"trained elsewhere, not compared"}
    studies_tested(cli, "defect")
    metrics = pd.read_csv(MODELS / "defect" / "metrics_test_site.csv")
    assert set(metrics["unseen"]) == {"by patient and study id"}


def test_a_checkpoint_contains_no_patient_id(trained, cli):
    """Its list is short, without ids, and no plain digest of one; a damaged one is refused."""
    path = MODELS / "defect" / "best_checkpoint.pt"
    (seen,) = torch.load(path, weights_only=True)["seen"]
    n = {fold: len(trained[fold]) for fold in ("train", "val")}
    pids = {fold: split_of("defect").loc[list(trained[fold]), "pid"].nunique() for fold in n}
    assert {fold: seen[fold].shape for fold in n} == {f: (n[f] + pids[f],) for f in n}
    assert all(seen[fold].dtype == torch.int64 for fold in n)
    with zipfile.ZipFile(path) as archive:  # the tensors hold random bytes
        (pickled,) = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    texts = [b"\x04\x00\x00\x00" + eid.encode() for eid in trained["train"]]  # not within a digest
    assert b"seen" in pickled and not any(text in pickled for text in texts)
    for damage in ([], [{"key": "zz"}], [seen | {"train": "x"}], [seen | {"val": seen["val"][0]}]):
        torch.save(torch.load(path, weights_only=True) | {"seen": damage}, path)
        status, _, err = cli("evaluate", "--model_name", "defect")
        assert status == 1 and "list of seen patients is damaged" in err and "Trace" not in err


def test_an_average_is_not_validated_on_its_members_training_patients():
    table = pd.DataFrame({"pid": list("abcde")}, index=list("12345"))
    each = [["train", "val", "val", "test", "val"], ["val", "val", "train", "test", "test"]]
    seen = [Seen.of(table.assign(fold=fold), "0a") for fold in each]
    record = Record(labels=["x"], dataset="site")
    model = SimpleNamespace(seen=seen, record=record, folder=Path("a+b"), members=[1, 2])
    folds, _ = fd.folds_for(model, table, "site")
    assert list(folds) == ["train", "val", "train", "test", "val"]


def test_two_runs_have_lists_that_cannot_be_matched():
    split = pd.DataFrame({"pid": ["a", "b"], "fold": ["train", "val"]}, index=["1", "2"])
    one, two = Seen.of(split, "00"), Seen.of(split, "01")
    assert not set(one.train) & set(two.train)
    table = pd.DataFrame({"pid": ["a", "x", "x", "2", "b"]}, index=["9", "1", "8", "a", "7"])
    for part in (one, two):  # by patient, by study, with him, an id of the other kind, validated
        assert seen_levels([part], table).tolist() == [2, 2, 2, 0, 1]


def test_a_moved_patient_is_refused(trained, cli):
    """A training study that now belongs to somebody else: also by the checkpoint alone."""
    eid = min(trained["train"])
    table = pd.read_csv("labels.csv", dtype=str)
    table.loc[table["eid"] == eid, "pid"] = "P999"
    table.to_csv("labels.csv", index=False)
    for model in ("defect", copy_alone("defect", "copy")):
        status, _, err = cli("evaluate", "--model_name", model)
        expected = f"1 study to other patients than when the model was trained ({eid})"
        assert status == 1 and expected in err


def test_patients_in_the_training_of_the_encoder(trained, cli):
    """They leave validation and test, by patient or study, in training and in later tests."""
    tests, val = sorted(trained["test"]), sorted(trained["val"])
    patients = pd.read_csv("labels.csv", dtype=str).set_index("eid")["pid"]
    seen_ids = {"pid": ["none", patients[val[0]], "none"], "fold": ["train"] * 2 + ["val"]}
    seen_ids = pd.DataFrame(seen_ids, index=[tests[0], "elsewhere", tests[-1]])
    for path in Path("emb").glob("*.hdf5"):
        with h5py.File(path, "a") as f:
            f.attrs["weights_sha256"] = "ab"
    write_encoder_seen("emb", {"ab": [Seen.of(seen_ids, "00")]})
    write_encoder_seen("emb", {"other": [Seen.of(patients.to_frame().assign(fold="train"), "00")]})
    gone = patients.index[patients.isin(patients[[tests[0], tests[-1], val[0]]])]
    warning = f"left out {len(gone)} studies of val and test: the encoder has seen the patients"
    for line in (("check", "--task", "defect", "--run_id", "b"), (*DEFECT, "--run_id", "b")):
        status, out, err = cli(*line)
        assert status == 0 and warning in out, out + err
    split = split_of("defect_b")["fold"]
    assert set(split.index[split == "known to the encoder"]) == set(gone)
    unseen, out = studies_tested(cli, "defect")  # trained without the encoder's list
    assert unseen == trained["test"] - set(gone) and "the encoder has seen the patients" in out
    assert "known to the encoder" in (MODELS / "defect/report_test_site.html").read_text()
    all_tested, out = studies_tested(cli, "defect", "--assume_unseen")
    assert all_tested == trained["test"] and "studies are known to the encoder, by the ids" in out
    evidence = set(pd.read_csv(MODELS / "defect/metrics_test_site.csv")["unseen"])
    more = f"{len(gone)} studies are known to the encoder"
    assert evidence == {f"by patient and study id; assumed: {more}"}
    assert f"not compared ({more} by the ids)" in out
    again = (*DEFECT, "--run_id", "b", "--epoch_lim", "2")
    status, _, err = cli(*again, "--assume_unseen")
    assert status == 1 and f"{len(gone)} studies are in other folds than when" in err
    status, out, err = cli(*again)
    assert status == 0 and "resuming" in out, err
    shutil.copytree("emb", "emb2"), Path("emb2/encoder_seen.pt").unlink()
    add_dataset("other", embedding_path="emb2", label_path="labels.csv")
    for path in Path("emb2").glob("*.hdf5"):
        with h5py.File(path, "a") as f:
            f.attrs.update(weights="chkpt_epoch-3.pt", weights_seen="listed")
    tested, out = studies_tested(cli, copy_alone("defect_b", "c"), dataset="other")
    assert tested == unseen
    assert "the encoder of 60 studies (chkpt_epoch-3.pt) are not listed" in out
    evidence = set(pd.read_csv(MODELS / "c" / "metrics_test_other.csv")["unseen"])
    assert evidence == {"by patient and study id; the encoder's patients are not known"}


def table_of(pids, eids):
    return pd.DataFrame({"pid": list(pids)}, index=pd.Index(list(eids), name="eid"))


def test_a_patient_is_recognised_by_a_study_that_is_left_out():
    """The study that identifies the patient may lack embeddings or a label."""
    whole = table_of("aabb", "1234")
    encoder = [Seen.of(table_of("x", "1").assign(fold="train"), "00")], True
    begun_from = SimpleNamespace(
        seen=[Seen.of(table_of("y", "3").assign(fold="val"), "00")],
        record=Record(labels=["x"], dataset="other"), folder=Path("m"),
    )  # fmt: skip
    seen_lists, _ = fd.seen_elsewhere(whole, Settings(), encoder, begun_from)
    folds = pd.Series(["test", "test"], index=["4", "2"])
    assert list(fd.without_seen(folds, seen_lists)) == ["known to m", "known to the encoder"]


def test_assume_unseen_overrules_ids_that_collide(capsys):
    """For the encoder's list, an ancestor's of other datasets, and on the model's own dataset for
    those of ancestors; never for its own training."""
    table = table_of("abc", "123")
    a, b = (Seen.of(table_of(p, e).assign(fold="train"), "00") for p, e in ("a1", "b2"))
    record = Record(labels=["x"], dataset="s", settings=Settings(split="0,0,100"))
    model = SimpleNamespace(seen=[a, b], record=record, folder=Path("m"))
    settings = Settings(dataset="s", assume_unseen=True)
    seen_lists, evidence = fd.seen_elsewhere(table, settings, ([b], True), model)
    assert [name for name, _ in seen_lists] == ["m"]
    assert evidence == ["assumed: 1 study is known to the encoder"]
    elsewhere = settings.model_copy(update={"dataset": "t"})
    seen_lists, evidence = fd.seen_elsewhere(table, elsewhere, ([], False), model)
    assert not seen_lists and evidence == [
        "assumed: 2 studies are known to m", "the encoder's patients are not known"
    ]  # fmt: skip
    for assumed, fold in ((False, "seen by an ancestor"), (True, "test")):
        folds, evidence = fd.folds_for(model, table, "s", assume_unseen=assumed)
        assert list(folds) == ["train", fold, "test"]
    assert evidence == "assumed: 1 study is known to m"
    assert "WARNING: 1 study is known to m, by the ids" in capsys.readouterr().out


@pytest.mark.parametrize(
    "dataset, stratify, new", [("s", "", "train"), ("s", "x", "test"), ("other", "", "test")]
)
def test_folds_of_a_labelled_dataset(dataset, stratify, new):
    """The table of `folds_for`: trained on, validated on, seen by an ancestor, new."""
    table = table_of("abcd", "1234")
    parent = Seen.of(table[:2].assign(fold=["train", "val"]), "00")
    ancestor = Seen.of(table[1:3].assign(fold="train"), "01")
    settings = Settings(split="100,0,0", stratify=stratify)
    record = Record(labels=["x"], dataset="s", settings=settings)
    model = SimpleNamespace(seen=[parent, ancestor], record=record, folder=Path("m"))
    folds, evidence = fd.folds_for(model, table, dataset, Collected())
    assert list(folds) == ["train", "val", "seen by an ancestor", new]
    assert evidence == "by patient and study id"
    folds, evidence = fd.folds_for(model, table, dataset, Collected(), assume_unseen=True)
    at_home = dataset == "s"
    assert list(folds) == (["train", "val", new, new] if at_home else ["test"] * 4)
    assert evidence == f"assumed: {'1 study is' if at_home else '3 studies are'} known to m"


def test_another_dataset_with_the_name_of_the_training_is_elsewhere(trained, cli):
    """An external cohort whose folder has the same name: all its studies are test data."""
    table = pd.read_csv("labels.csv", dtype=str)
    table.assign(pid="ext" + table["pid"], eid="ext" + table["eid"]).to_csv("ext.csv", index=False)
    Path("other").mkdir()
    for path in Path("emb").iterdir():
        shutil.copy(path, f"other/ext{path.name}")
    line = ("--dataset", "site", "--embedding_path", "other", "--label_path", "ext.csv")
    status, out, err = cli("evaluate", *line, "--n_boot", 0)
    assert status == 0 and "WARNING: site has the name of the training dataset" in out, err
    assert len(pd.read_csv("trained_models/defect/saveout_test_site.csv")) == 60
    assert not Path("trained_models/defect/recalibration_test_site.csv").exists()
    assert "no study of site is in the fold val" in cli("evaluate", *line, "--subset", "val")[2]


def test_a_model_of_ours_without_its_list_is_refused():
    table = table_of("ab", "12")
    model = SimpleNamespace(
        seen=None, record=Record(labels=["x"], dataset="s"), folder=Path("m"), members=()
    )
    with pytest.raises(UserError, match="does not list"):
        fd.folds_for(model, table, "s", Collected())
    assert fd.folds_for(model, table, "other", Collected(), assume_unseen=True)[1] == "assumed"


def test_studies_without_labels_are_no_test_where_the_encoder_knows_them():
    seen, encoder = ([Seen.of(table_of("x", eid).assign(fold="train"), "00")] for eid in ("1", "2"))
    nothing = SimpleNamespace(
        label_path=None, columns={}, level="study", split_path=None, path_pattern=""
    )
    store = SimpleNamespace(encoder_seen=lambda *_: (encoder, True))
    source = SimpleNamespace(eids=["1", "2", "3"], store=store)
    model = SimpleNamespace(seen=seen, outputs=Outputs.of(["x"], "binary"))
    for assumed, tested in ((False, ["3"]), (True, ["2", "3"])):
        settings = Settings(task="t", dataset="s", subset="test", assume_unseen=assumed)
        job = SimpleNamespace(
            settings=settings, model=model, source=source, task=nothing, dataset=nothing
        )
        assert explained_studies(job)[0] == tested


@pytest.mark.parametrize(
    "trained, later, same",
    [
        ("P {}", " p\u00a0{}", True),
        ("\uff30{}", "P{}", True),
        ("0000{}", "{}", True),  # as a spreadsheet writes it
        ("Rene\u0301 {}", "Ren\u00e9 {}", True),
        ("P{}", "Q{}", False),
    ],
)
def test_ids_in_another_form_are_the_same(trained, later, same, capsys):
    """By patient or by study, in the dataset of the training and elsewhere; no match is noted."""
    before, now = (table_of(map(x.format, (1, 1, 2)), "abc") for x in (trained, later))
    now = now.set_axis(["new1", "new2", "new3"])
    seen = [Seen.of(before.assign(fold=["train", "train", "val"]), "00")]
    assert (seen_levels(seen, now) > 0).all() == same
    by_study = before.assign(pid=["x", "y", "z"]).set_axis(map(later.format, (1, 1, 2)))
    as_studies = Seen.of(before.set_axis(map(trained.format, (1, 1, 2))).assign(fold="train"), "0a")
    assert (seen_levels([as_studies], by_study) > 0).all() == same
    fd.seen_elsewhere(now, Settings(), (seen, True))
    assert ("no id in this table occurs" in capsys.readouterr().out) != same
    fd.seen_elsewhere(now, Settings(), ([], True))
    assert not capsys.readouterr().out


def test_a_fold_that_the_encoder_knows_has_its_own_remedy():
    task = SimpleNamespace(outputs=Outputs.of(["x"], "binary"))
    whole = table_of("abc", "123").assign(x=[0.0, 1, 1])
    settings = Settings(split="0,100,0")
    seen_lists = [("the encoder", pd.Series(2, whole.index))]
    heard = Collected()
    training_folds(whole, settings, task, seen_lists, heard)
    (text,) = [f"{x.text}; {x.remedy}" for x in heard.findings if "into the val" in x.text]
    assert "those of the split are known to the encoder" in text and "--split_column" in text


# ------------------------------------------------------------------------------------ given splits


def write_split_column(words=("TRAIN", "Validation", "test"), **cells):
    """A column `part`: patients P000 to P029 train, to P034 validate, the others test."""
    table = pd.read_csv("labels.csv", dtype=str)
    number = table["pid"].str[1:].astype(int)
    table["part"] = np.select([number < 30, number < 35], words[:2], words[2])
    for row, word in cells.items():
        table.loc[int(row[1:]), "part"] = word
    table.to_csv("labels.csv", index=False)
    return table


@pytest.mark.parametrize("where", ["option", "dataset"])
def test_split_column(cohort, cli, where):
    """It decides in training, and in evaluation by the checkpoint alone."""
    table = write_split_column()
    options = ("--split_column", "part") if where == "option" else ()
    if where == "dataset":
        add_dataset("site", split_column="part")
    status, _, err = cli(*DEFECT, *options)
    assert status == 0, err
    split = split_of("defect")["fold"]
    words = {"TRAIN": "train", "Validation": "val", "test": "test"}
    given = table.set_index("eid")["part"].map(words)
    assert (split == given[split.index]).all() and len(split) == 60
    assert studies_tested(cli, copy_alone("defect", "copy"))[0] == set(given.index[given == "test"])


@pytest.mark.parametrize(
    "cells, expected",
    [
        (dict(r0="holdout"), "part: not folds: holdout (line 2)"),
        (dict(r0="test"), "part: 1 patient is in two folds (studies 1000, 1040)"),
    ],
)
def test_given_splits_that_cannot_be(cohort, cli, cells, expected):
    write_split_column(**cells)
    edit_config(split_column="part")
    status, _, err = cli(*DEFECT)
    assert status == 1 and expected in err and err.count("\n") == 1


def test_a_study_without_a_given_fold_is_left_out(cohort, cli):
    write_split_column(r25=None, r39="")
    status, out, err = cli(*DEFECT, "--split_column", "part")
    assert status == 0 and "2 studies have no fold" in out, err
    assert split_of("defect").loc[["1025", "1039"], "fold"].tolist() == ["left out"] * 2
    status, out, err = cli(
        "train", "--task", "defect", "--split_column", "part", "--epoch_lim", "2"
    )
    assert status == 0 and "resuming" in out, err
    status, _, err = cli(*DEFECT, "--split_column", "parts", "--run_id", "b")
    assert status == 1 and "no column 'parts'; did you mean part" in err
    status, _, err = cli(*DEFECT, "--split_column", "part", "--n_folds", "3", "--run_id", "c")
    assert status == 1 and "leave one out" in err


# ----------------------------------------------------------------------------------------- matching


def test_the_first_usable_study_of_each_patient(cohort, cli):
    """P000's first study was never embedded, P001's has no label, P002's is repeated."""
    Path("emb/1000.hdf5").unlink()
    table = pd.read_csv("labels.csv", dtype=str)
    table.loc[1, "finding"] = None
    pd.concat([table, table[2:3]]).to_csv("labels.csv", index=False)
    status, out, err = cli(*DEFECT, "--first_study_only")
    assert status == 0, err
    split = split_of("defect")
    first = {p: e for e, p in split["pid"].items()}
    assert len(split) == 40 and [first[f"P00{i}"] for i in range(3)] == ["1040", "1041", "1002"]
    assert "40 labelled studies of 40 patients" in out
    edit_config(settings={"first_study_only": True, "learning_rate": 1e-3})
    status, out, _ = cli("check", "--task", "defect", "--run_id", "none")
    assert status == 0 and "40 labelled studies of 40 patients" in out, out
    edit_config(settings={})
    tested, _ = studies_tested(cli, "defect", "--first_study_only")
    assert tested == set(split.index[split["fold"] == "test"])
    assert len(studies_tested(cli, "defect")[0]) > len(tested)


def test_split_is_by_patient_and_stable():
    table, rule = pd.DataFrame({"pid": [f"P{i // 3}" for i in range(3000)]}), Settings()
    folds = fd.split_patients(table, rule)
    assert (folds.groupby(table["pid"]).nunique() == 1).all()
    shares = folds.value_counts(normalize=True)
    assert abs(shares - pd.Series({"train": 0.64, "val": 0.16, "test": 0.20})).max() < 0.05
    fewer = fd.split_patients(table[::7], rule)
    assert (folds[fewer.index] == fewer).all()
    assert (folds != fd.split_patients(table, Settings(seed=1))).mean() > 0.3
