"""Options, the config, a checkpoint's record: refused values, and precedence."""

import json
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import copy_example
from pydantic import ValidationError

import echofocus as ef
from echofocus_core.base.console import UserError
from echofocus_core.base.options import OPTIONS, RECORDED, Settings, options_of, validate_as
from echofocus_core.study import config as schema
from echofocus_core.study.job import resolve_settings
from echofocus_core.study.loading import read_checkpoint
from echofocus_core.video import extract, panecho
from echofocus_core.video.decode import Sampling
from echofocus_core.video.store import open_store

TASK = {"task_labels": ["a", "b"], "label_path": "labels.csv"}
CONFIG = {"task": {"t": TASK}, "dataset": {"site": {"embedding_path": "emb"}}}


def write_config(tmp_path, task=None, dataset=None, **more):
    """config.json with the keys of task t and dataset site changed."""
    config = {"task": {"t": TASK | (task or {})}}
    config["dataset"] = {"site": {"embedding_path": "emb"} | (dataset or {})}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | more))
    return path


# ------------------------------------------------------------------------------------------- config

FAULTS = {  # changes of the config, and parts of the line about it
    "fold to use": (dict(task={"subset": "val"}), "unknown key 'subset'"),
    "unknown key": (dict(task={"task_label": ["a"]}), "task t: unknown key 'task_label'; did you"),
    "kind": (dict(task={"label_path": 5}), "task t, label_path is not a valid path"),
    "null": (dict(task={"task_labels": None}), "task t, task_labels should be a valid list"),
    "labels are objects": (dict(task={"task_labels": [{"name": "a"}, "b"]}), "item 1 should"),
    "label twice": (dict(task={"task_labels": ["a", "a "]}), "none twice"),
    "no label": (dict(task={"task_labels": []}), "at least one label"),
    "unprintable": (dict(task={"task_labels": ["a", "\x1b[2J"]}), "cannot be printed"),
    "unit of no label": (dict(task={"units": {"bb": "cm"}}), "units has bb, which is not a label"),
    "our column": (dict(task={"task_labels": ["a", "n_clips"]}), "share the column n_clips"),
    "our ending": (dict(task={"task_labels": ["a_low", "a"]}), "share the column a_low"),
    "one column": (
        dict(task={"task_labels": ["a", "a [%]"], "units": {"a": "%"}}), "the column a [%]",
    ),
    "upside down": (dict(task={"valid_range": {"a": [9, 1]}}), "valid_range, a: [low, high] is up"),
    "range is text": (dict(task={"valid_range": {"a": "0"}}), "valid_range, a: [low, high], null"),
    "type": (dict(task={"type": "binry"}), "one of binary, regression, multiclass, survival"),
    "types": (dict(task={"type": ["binary"]}), '{"VSD": "binary"}'),
    "setting unknown": (dict(task={"settings": {"learningrate": 1}}), "did you mean learning_rate"),
    "setting's bound": (dict(task={"clip_dropout": 1}), "settings, clip_dropout should be less"),
    "setting's choice": (dict(dataset={"precision": "fp8"}), "be 'fp32' or 'bf16'"),
    "setting is true": (dict(task={"settings": {"epoch_lim": True}}), "should be a valid integer"),
    "not for the config": (dict(task={"settings": {"run_id": "x"}}), "run_id: for the"),
    "twice": (dict(task={"lr": 1, "settings": {"learning_rate": 2}}), "is given twice"),
    "path empty": (dict(dataset={"embedding_path": ""}), "a path is text that is not empty"),
    "leads out": (dict(dataset={"video_subdir_format": "../{echo_id}"}), "a folder's name with"),
    "runs code": (dict(dataset={"video_subdir_format": "{echo_id.__class__}"}), "a folder's name"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_config_is_one_line_with_its_place(tmp_path, fault):
    changes, message = FAULTS[fault]
    with pytest.raises(UserError) as error:
        schema.read_config(write_config(tmp_path, **changes))
    text = str(error.value)
    assert message in text and "\n" not in text and text.isprintable()
    assert text.startswith(str(tmp_path / "config.json"))


@pytest.mark.parametrize("name", ["..", "a/b", "", ".hidden", "a\n"])
def test_names_stay_in_their_folder(tmp_path, name):
    for kind, entry in (("task", TASK), ("dataset", {"embedding_path": "emb"})):
        with pytest.raises(UserError, match="is not a name") as error:
            schema.read_config(write_entry(tmp_path, kind, name, entry))
        assert "\n" not in str(error.value)


def write_entry(tmp_path, kind, name, entry):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | {kind: {name: entry}}))
    return path


def test_all_faults_at_once(cohort, cli):
    config = json.loads(Path("config.json").read_text())
    config["task"]["defect"] |= {"type": "binry", "units": {"finding": 3}, "boxcoks": []}
    config["dataset"]["site"]["embedding_path"] = None
    Path("config.json").write_text(json.dumps(config))
    for command in ("train", "check"):
        status, out, err = cli(command, "--task", "defect")
        text = out + err
        assert status == 1 and "config.json: 4 faults" in text and "Traceback" not in text
        for place in ("defect, type", "defect, units, finding", "'boxcoks'", "embedding_path"):
            assert place in text


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"task": {"t": {}, "t": {}}}', "the key 't' is repeated"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1, 2]", "should be a valid dict"),
        ("{'a': 1}", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
    ],
)
def test_files_that_are_not_a_config(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        schema.read_config(path)
    assert "\n" not in str(error.value)


def test_paths_are_relative_to_the_config_and_labels_lose_blanks(tmp_path):
    path = write_config(
        tmp_path,
        task={"task_labels": ["a ", 1450], "units": {"a ": "%"}, "valid_range": {"a": [0, None]}},
        dataset={"video_base_path": "videos"},
    )
    path.write_text("\ufeff" + path.read_text())
    config = schema.read_config(path)
    task, dataset = config.tasks["t"], config.datasets["site"]
    assert task.task_labels == ["a", "1450"] and task.units == {"a": "%"}
    assert task.label_path == tmp_path / "labels.csv"
    assert dataset.embedding_path == tmp_path / "emb"
    assert dataset.video_base_path == tmp_path / "videos"
    assert dataset.video_subdir_format == "{echo_id}_trim"


# --------------------------------------------------------------------------------------- precedence


def resolved(config, *line, model=None):
    """The settings of a command line, by the real parser."""
    typed = vars(ef.build_parser().parse_args([*line]))
    command = typed.pop("command")
    return resolve_settings(
        command, validate_as(Settings, typed).model_dump(exclude_unset=True), config, model
    )[0]


def test_precedence_of_settings(tmp_path):
    """Precedence: command line, dataset, task (in settings or as a key), recipe, default."""
    config = schema.read_config(
        write_entry(
            tmp_path,
            "task",
            "measure",
            TASK
            | {"settings": {"precision": "bf16", "seed": 7}, "lr": 3e-3}
            | {"split": [80, 10, 10]},
        )
    )
    settings = resolved(config, "train")
    assert (settings.precision, settings.seed, settings.learning_rate) == ("bf16", 7, 3e-3)
    assert settings.split == "80,10,10"
    assert (settings.encoder_depth, settings.batch_number) == (5, 32)  # the recipe
    assert settings.clip_dropout == 0.5  # the default
    config.datasets["site"] = schema.Dataset(embedding_path="emb", seed=8, batch_number=4)
    settings = resolved(config, "train", "--batch_number", "2", "--precision", "fp32")
    assert (settings.precision, settings.seed, settings.batch_number) == ("fp32", 8, 2)


def test_a_model_of_another_dataset_falls_back_to_the_first(trained, cli):
    config = json.loads(Path("config.json").read_text())
    config["dataset"] = {"elsewhere": {"embedding_path": "emb"}}
    Path("config.json").write_text(json.dumps(config))
    status, out, err = cli("predict")
    assert status == 0, err
    assert "dataset = elsewhere (the config's first; the model's site is not in it)" in out


def test_paths_on_the_command_line(cohort, cli):
    """--embedding_path and --label_path replace those of the dataset, or define an unnamed one."""
    Path("emb").rename("other")
    Path("labels.csv").rename("table.csv")
    line = ("--task", "defect", "--label_path", "table.csv", "--embedding_path", "other")
    status, out, err = cli("train", *line, "--dataset", "site", "--epoch_lim", "1")
    assert status == 0, err
    status, out, err = cli("evaluate", *line, "--dataset", "site")
    assert status == 0, err
    Path("config.json").unlink()
    status, out, err = cli("predict", "--embedding_path", "other")
    assert status == 0 and "dataset = other (the folder of --embedding_path)" in out, err
    assert Path("trained_models/defect/predictions_other.csv").is_file()


def test_published_spellings():
    """The command-line spellings of the later published branch."""
    parse = ef.build_parser().parse_args

    def typed(*line):
        actual = vars(parse(list(line)))
        del actual["command"]
        return validate_as(Settings, actual).model_dump(exclude_unset=True)

    assert typed("train", "--split", "(64,16,20)") == {"split": "64,16,20"}
    assert typed("train", "--split", "[64.5, 15.5, 20]") == {"split": "64.5,15.5,20"}
    assert typed("train", "--total_epochs", "-1") == {"epoch_lim": -1}
    assert typed("train", "--lr", "1e-5", "--epochs", "3") == {
        "learning_rate": 1e-5,
        "epoch_lim": 3,
    }
    assert typed("train", "--load-transformer-path", "x") == {"init_from": "x"}
    for words in (["('train','val','test')"], ["train,val,test"], ["train", "val", "test"]):
        assert typed("evaluate", "--folds", *words) == {"folds": ["train", "val", "test"]}
    assert typed("explain", "--explain_tasks", "all") == {"explain_tasks": []}
    assert typed("explain", "--explain_tasks", "('a b', 'c')") == {"explain_tasks": ["a b", "c"]}
    assert typed("explain", "--explain_tasks", "a, b") == {"explain_tasks": ["a, b"]}
    for words, value in (([], True), (["True"], True), (["False"], False), (["false"], False)):
        assert typed("train", "--first_study_only", *words) == {"first_study_only": value}
        assert typed("embed", "--pool_queries", *words) == {"pool_queries": value}
    assert typed("embed", "--pool_queries=False") == {"pool_queries": False}
    assert typed("embed", "--no-pool-queries", "--map") == {"pool_queries": False, "map": "pca"}
    assert typed("download", "--list", "EchoFocus_CHD") == {
        "list_": True,
        "source": "EchoFocus_CHD",
    }


@pytest.mark.parametrize(
    "line, status, message",
    [
        (["train", "--split", "(64,16,x)"], 2, "three percentages"),
        (
            ["train", "--epoch_lim", "-2"],
            2,
            "--epoch_lim: expected 1 or more, or -1 for no limit, not -2",
        ),
        (["evaluate", "--folds", "tests"], 2, "--folds should be"),
        (["train", "--learning_rate", "inf"], 2, "--learning_rate should be a finite number"),
        (["predict", "--size", "5"], 2, "--size should be greater than or equal to 32, not 5"),
        (["train", "--epoch_lim", "ten"], 2, "invalid int value: 'ten'"),
        (["train", "--learning_rat", "3"], 2, "did you mean --learning_rate?"),
        (["train", "--subset", "val"], 2, "it is an option of evaluate, explain"),
        (["predict", "--lr", "1"], 2, "it is an option of train"),
    ],
)
def test_options_that_are_wrong(cli, line, status, message):
    actual, _, err = cli(*line)
    assert (actual, message in err) == (status, True), err
    assert "Traceback" not in err and err.count("\n") == 1


def test_all_wrong_options_at_once(cli):
    status, _, err = cli("train", "--batch_number", "0", "--clip_dropout", "1")
    assert status == 2 and "options: 2 faults" in err
    assert "--batch_number should" in err and "--clip_dropout should" in err


def test_every_option_belongs_to_a_command():
    commands = {*ef.COMMANDS, "extract", "train_encoder"}
    for name, f in OPTIONS.items():
        assert f.description and set(f.json_schema_extra["commands"]) <= commands, name
    assert extract.sampling_of(Settings(), mock.Mock(sampling=lambda s, _: s)) == Sampling()
    assert "weights" in options_of("extract") and "learning_rate" not in options_of("extract")


# ---------------------------------------------------------------------------- a checkpoint's record


RECORD = schema.Record(
    task="t", dataset="site", labels=["a", "g", "s"],
    type={"a": "binary", "g": "multiclass", "s": "survival"}, classes={"g": ["none", "mild"]},
    survival={"s": ["years", "died"]}, units={"s": "years"}, thresholds={"a": 0.4},
    hazards={"s_risk": {"mean": 0.1, "times": [0.0, 4.0], "cumulative": [0.0, 0.4]}},
    unlearnt=["g_mild"], input={"size": 224, "weights": "panecho.pt"},
    settings=Settings(seed=3, learning_rate=1e-3),
)  # fmt: skip


def test_a_record_is_read_as_it_was_saved():
    again = schema.read_record({"echofocus": RECORD.to_save()}, "x")
    assert again == RECORD and set(RECORD.to_save()["settings"]) == set(RECORDED)
    assert again.outputs.names == ["a", "g_none", "g_mild", "s_risk"]
    with pytest.raises(ValidationError, match="frozen"):
        again.type = "binary"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"classes": {}}, "classes and type multiclass of g"),
        ({"type": {"g": "multiclass", "s": "survival"}}, "type of label a is missing"),
        ({"thresholds": {"x": 0.5}}, "thresholds has x"),
        ({"unlearnt": ["g_severe"]}, "unlearnt has g_severe"),
        ({"hazards": {"s_risk": {"mean": 0.0, "times": [0.0, 1.0], "cumulative": [1.0, 0.0]}}},
         "never falls"),
        ({"labels": []}, "at least one label"),
    ],
)  # fmt: skip
def test_records_that_contradict_themselves(change, message):
    with pytest.raises(UserError, match=message):
        schema.read_record({"echofocus": RECORD.to_save() | change}, "best.pt")


ODD = [None, 5, -1, 2.5, float("nan"), True, "", "\x1b[2J", "../x", b"x", [], [1], ["a", "a"], {}]
ODD += [{"a": 1}, {1: 2}, torch.zeros(2), np.float64(1)]


def odd_records():
    """Records with one key, at any depth, replaced by an odd value or left out."""
    good = RECORD.to_save()
    for key in good:
        yield {k: v for k, v in good.items() if k != key}
        for odd in ODD:
            yield good | {key: odd}
    for part in ("settings", "input", "thresholds", "units"):
        for key in [*good[part], "unknown"]:
            for odd in ODD:
                yield good | {part: good[part] | {key: odd}}


def test_odd_records_are_refused_in_one_line():
    """One line that names the file, or a record with values of the right types."""
    refused = read = 0
    for raw in [*odd_records(), None, 5, [1], torch.zeros(1)]:
        try:
            record = schema.read_record({"echofocus": raw}, "best.pt")
            read += 1
        except UserError as error:
            lines = str(error).split("\n")
            assert lines[0].startswith("best.pt"), raw
            assert all(line.isprintable() and len(line) < 300 for line in lines), raw
            refused += 1
            continue
        assert all(isinstance(x, str) for x in (record.task, *record.labels)), raw
        assert all(isinstance(x, float) for x in record.thresholds.values()), raw
        json.dumps(record.to_save())
    assert refused > 400 and read > 50


def test_a_record_of_a_later_program_is_refused():
    with pytest.raises(UserError, match="format 2, this program reads 1; update it"):
        schema.read_record({"echofocus": {"format": 2}}, "best.pt")
    assert schema.read_record({}, "best.pt") is None  # as published


def test_a_record_keeps_no_path_and_only_what_training_used(cohort, cli):
    Path("runs").mkdir()
    line = ("train", "--task", "defect", "--epoch_lim", "1")
    assert cli(*line)[0] == 0
    folder = cohort / "trained_models/defect"
    status, _, err = cli(*line, "--init_from", folder, "--model_name", cohort / "runs" / "next")
    assert status == 0, err
    saved = read_checkpoint(Path("runs/next/last_checkpoint.pt"))["echofocus"]
    assert saved["format"] == 1 and set(saved["settings"]) == set(RECORDED)
    assert saved["settings"]["init_from"] == "defect" and saved["input"]["n_clips"] == 4
    texts = [Path("runs/next", x).read_text() for x in ("run.json", "train_args.csv")]
    assert not any(str(cohort) in text for text in (json.dumps(saved), *texts))
    damaged = read_checkpoint(folder / "last_checkpoint.pt")
    for key, value in (("progress", {"items": "x"}), ("perf_log", 5), ("optimizer_state_dict", [])):
        torch.save(damaged | {key: value}, folder / "last_checkpoint.pt")
        status, _, err = cli(*line)
        assert status == 1 and "is damaged" in err and err.count("\n") == 1


def test_no_limit_of_epochs(cohort, cli):
    line = ("train", "--task", "defect", "--total_epochs", "-1", "--epoch_early_stop", "1")
    # At so high a rate the loss soon rises.
    status, out, err = cli(*line, "--learning_rate", "0.1", "--sample_limit", "20")
    assert status == 0 and "best validation loss" in out, err
    assert cli("check", "--task", "defect", "--sample_limit", "5")[0] == 0


# ---------------------------------------------------------------------- published ways of working


def test_several_folds_at_once(trained, cli):
    status, _, err = cli("evaluate", "--folds", "('train','val','test')")
    assert status == 0, err
    split = pd.read_csv("trained_models/defect/split.csv", dtype=str)
    for fold in ("train", "val", "test"):
        actual = pd.read_csv(f"trained_models/defect/saveout_{fold}_site.csv", dtype=str)
        assert set(actual["Echo_ID"]) == set(split["eid"][split["fold"] == fold])


def test_one_vector_a_label(cohort, cli):
    """--pool_queries False: each label's vector gives its logit by the shared head."""
    line = ("train", "--task", "defect", "--transformer_type", "multiquery", "--epoch_lim", "1")
    config = json.loads(Path("config.json").read_text())
    config["task"]["defect"]["task_labels"] = ["finding", "other"]
    Path("config.json").write_text(json.dumps(config))
    table = pd.read_csv("labels.csv")
    table.assign(other=(table["size"] > 5).astype(int)).to_csv("labels.csv", index=False)
    assert cli(*line)[0] == 0
    assert cli("embed", "--embed_file", "pooled.h5")[0] == 0
    status, _, err = cli("embed", "--pool_queries", "False", "--embed_file", "each.h5")
    assert status == 0, err
    assert cli("predict", "--out", "p.csv")[0] == 0
    head = read_checkpoint(Path("trained_models/defect/best_checkpoint.pt"))["model_state_dict"]
    with h5py.File("each.h5") as each, h5py.File("pooled.h5") as pooled:
        assert list(each.attrs["labels"]) == ["finding", "other"]
        x = each["1000"][:]
        assert x.shape == (2, 768)
        np.testing.assert_allclose(x.mean(0), pooled["1000"][:], atol=1e-6)
    logits = x @ head["ff.weight"].numpy()[0] + head["ff.bias"].numpy()
    answers = pd.read_csv("p.csv", dtype={"eid": str}).set_index("eid").loc["1000"]
    expected = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(answers[["finding", "other"]].astype(float), expected, rtol=1e-4)
    status, _, err = cli("embed", "--pool_queries", "False", "--map")
    assert status == 1 and "works only with multiquery models" in err


def test_few_videos_of_a_study(cohort):
    """Always the same videos outside training; random ones in training."""
    whole, store = open_store(Path("emb")), open_store(Path("emb"), most_videos=2)
    eid = next(e for e in whole.files if len(whole.read(e).videos) == 4)
    assert store.size(eid) == 8 and whole.size(eid) == 16
    assert store.read(eid).videos == store.read(eid).videos
    drawn = set()
    for k in range(40):
        study = store.read(eid, np.random.default_rng(k))
        places = [whole.read(eid).videos.index(v) for v in study.videos]
        np.testing.assert_array_equal(study.embeddings, whole.read(eid).embeddings[places])
        drawn.add(tuple(study.videos))
    assert len(drawn) == 6  # any 2 of 4


# --------------------------------------------------------------------------- the model's own input


@pytest.fixture
def trained_on_small_images(cohort, cli):
    """A model trained on embeddings with 56 pixels, 3 clips and random weights."""
    digest = panecho.load_panecho("random").sha256
    for path in Path("emb").iterdir():
        with h5py.File(path, "a") as f:
            f.attrs.update(size=56, mask="sector", weights_sha256=digest, clip_len=16)
            f.attrs["weights"] = "random: untrained, not for results"
    assert cli("train", "--task", "defect", "--epoch_lim", "1")[0] == 0
    (cohort / "visits" / "v1").mkdir(parents=True)
    copy_example(cohort / "visits" / "v1" / "cine.dcm")


def test_videos_are_extracted_as_the_model_was_trained(trained_on_small_images, cli):
    status, out, err = cli("predict", "--videos", "visits")
    assert status == 0, err
    for setting in ("size = 56", "mask = sector", "n_clips = 4", "weights = random"):
        assert f"{setting} (as defect was trained)" in out
    (path,) = Path("clip_embeddings").glob("*/v1.hdf5")
    with h5py.File(path) as f:
        assert f.attrs["size"] == 56 and f["embeddings"].shape[1] == 4
    assert "WARNING" not in out.split("1 study extracted")[0]
    status, out, err = cli("predict", "--videos", "visits", "--size", "64", "--redo")
    before = out.split("1 study extracted")[0]
    assert status == 0 and "WARNING: --size 64: defect was trained with 56" in before, err


def test_another_encoder_is_reported_before_extraction(cohort, cli, monkeypatch):
    for path in Path("emb").iterdir():
        with h5py.File(path, "a") as f:
            f.attrs["weights_sha256"] = "ab" * 32
    assert cli("train", "--task", "defect", "--epoch_lim", "1")[0] == 0
    Path("visits/v1").mkdir(parents=True)
    copy_example(Path("visits/v1/cine.dcm"))
    monkeypatch.setattr(panecho, "weights_digest", lambda *_: "cd" * 32)
    monkeypatch.setattr(extract, "extract", lambda *_: pytest.fail("extraction began"))
    status, _, err = cli("predict", "--videos", "visits")
    assert status == 1 and "trained on embeddings of another encoder (weights abab" in err
    assert "give its file with --weights" in err
