"""The commands as a user types them, on a small cohort and on files in the published format."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import (
    N_VIDEOS,
    ROOT,
    by_rule,
    copy_example,
    edit_config,
    moving_square,
    normal,
    published_model,
    recorded,
    relative_error,
    write_dicom,
    write_embeddings,
)
from sklearn.metrics import roc_auc_score

import echofocus as ef
from echofocus_core.base.console import UserError
from echofocus_core.base.files import lock
from echofocus_core.base.options import ALL_FOLDS, Settings, options_of
from echofocus_core.encoder.settings import EncoderSettings
from echofocus_core.encoder.train import main as encoder_main
from echofocus_core.study.loading import read_checkpoint
from echofocus_core.study.train_command import folder_to_train_in
from echofocus_core.video import extract


@pytest.mark.parametrize(("option", "expected"), [("--help", 0), ("--lerning_rate", 2)])
def test_help_and_misspelt_options_import_little(option, expected):
    """Neither imports torch, pandas, or modules that only some commands need."""
    code = f"""
import sys, runpy
sys.argv = ["echofocus.py", "train", {option!r}]
try:
    runpy.run_path({str(ROOT / "echofocus.py")!r}, run_name="__main__")
except SystemExit as stop:
    heavy = {{"torch", "pandas", "numpy", "scipy", "matplotlib", "cv2", "pydicom", "h5py"}}
    assert not heavy & set(sys.modules), heavy & set(sys.modules)
    sys.exit(stop.code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == expected, done.stderr
    assert "--learning_rate" in done.stdout + done.stderr


def test_help_fits_on_a_screen(cli, monkeypatch):
    """Common options first; --help_all shows each option, with a readable name of its value."""
    monkeypatch.setenv("COLUMNS", "80")
    programs = [(ef.main, name, (name,)) for name in ef.COMMANDS]
    programs += [(extract.main, "extract", ()), (encoder_main, "train_encoder", ())]
    for main, command, line in programs:
        status, out, _ = cli(*line, "--help", main=main)
        assert status == 0 and len(out.splitlines()) <= 40, out
        assert out.startswith("usage: ") and out.splitlines()[1] == "" and "example: " in out
        every = cli(*line, "--help-all", main=main)[1]
        shown = [x for x in every.splitlines() if x.startswith("  --")]
        fields = EncoderSettings if command == "train_encoder" else Settings
        options = options_of(command, fields).items()
        hidden = [n for n, f in options if command not in f.json_schema_extra["common"]]
        assert len(shown) >= len(options) - ("source" in dict(options)), command
        assert (f"{len(hidden)} more options" in out) == bool(hidden)
        assert not re.search(r" [A-Z]+_[A-Z_]*\b", "\n".join(shown))


def test_wrong_lines_are_one_line(cohort, cli):
    (cohort / "Exams").mkdir()
    for line, text in (
        (["train", "--lr", "abc"], "abc"),
        (["train", "--epoch-lim", "0.5"], "0.5"),
        (["predict", "Exams"], "--videos Exams"),
        (["predict", "emb"], "--embedding_path emb"),
        (["pedict"], "did you mean predict?"),
        (["predict", "--dry-run"], "unknown argument --dry-run"),
        (["train", "--tf_combine", "sum"], "avg"),
    ):
        status, out, err = cli(*line)
        assert status == 2 and text in err and err.count("\n") == 1 and not out, err


def test_quiet_verbose_and_log(trained, cli):
    """The file has all messages; the screen has fewer, or more with times."""
    (trained / "emb" / "1003.hdf5").write_bytes(b"not HDF5")
    line = ("predict", "--sample_limit", "0")
    status, plain, _ = cli(*line)
    assert status == 0 and "next: " in plain.splitlines()[-1] and "explain" in plain
    status, out, err = cli(*line, "--quiet", "--log", "a/run.jsonl")
    assert (status, err) == (0, "") and out.startswith("WARNING: 1 study left out")
    assert out.count("\n") == 2 and "1003.hdf5: it is not an HDF5 file" in out
    entries = [json.loads(x) for x in Path("a/run.jsonl").read_text().splitlines()]
    assert "\n".join(x["message"] for x in entries).split() == plain.split()
    status, out, err = cli("evaluate", "--dataset", "sitt", "--verbose", "--log", "run.log")
    text = Path("run.log").read_text()
    assert status == 1 and re.search(r"^20\d\d-.* ERROR .*has no dataset sitt", text, re.MULTILINE)
    assert "Traceback" in text and "did you mean site" in err
    Path("holter.csv").write_text("2024-01-01 10:00:00,72\n")
    for name in ("labels.csv", "holter.csv"):
        status, _, err = cli(*line, "--log", name)
        assert status == 1 and f"{name} exists" in err
    assert cli("inspect", "--log", "run.log")[0] == 0 and text in Path("run.log").read_text()
    handlers = logging.getLogger("echofocus").handlers
    assert not [x for x in handlers if type(x) is logging.FileHandler]


def test_train_evaluate_predict_embed_explain(cohort, cli):
    status, out, err = cli("train", "--task", "defect")
    assert status == 0, err
    assert "dataset = site (the config's first)" in out
    folder = cohort / "trained_models" / "defect"
    names = {"best_checkpoint.pt", "last_checkpoint.pt", "split.csv", "train_losses.csv"}
    assert names | {"training_progress.pdf", "train_args.csv"} <= {p.name for p in folder.iterdir()}
    losses = pd.read_csv(folder / "train_losses.csv")
    columns = ["epochs_trained", "train_loss", "val_loss", "lr", "epoch_time", "dropped_steps"]
    assert list(losses) == [*columns, "val_AUROC"]
    split = pd.read_csv(folder / "split.csv", dtype=str)
    assert (split.groupby("pid")["fold"].nunique() == 1).all()

    status, out, err = cli("evaluate")
    assert status == 0 and "model_name = defect (the only one" in out, err
    saved = pd.read_csv(folder / "saveout_test_site.csv", dtype={"Echo_ID": str, "PID": str})
    assert set(saved["Echo_ID"]) == set(split["eid"][split["fold"] == "test"])
    metrics = pd.read_csv(folder / "metrics_test_site.csv").set_index("metric")
    truth, probability = saved["finding_Correct"], saved["finding_Predict"]
    assert probability.between(0, 1).all()
    assert metrics["value"]["auroc"] == pytest.approx(roc_auc_score(truth, probability), rel=1e-5)
    assert (metrics["n"] == len(saved)).all() and metrics["value"]["auroc"] > 0.8
    assert (folder / "roc_curves_test_site.pdf").exists()

    assert cli("predict", "--model-name", "defect")[0] == 0
    predicted = pd.read_csv(folder / "predictions_site.csv", dtype={"eid": str}).set_index("eid")
    columns = ["n_videos", "n_clips", "finding", "finding_decision", "finding_threshold"]
    columns += ["novelty", "warning"]
    assert list(predicted) == columns and len(predicted) == 60
    np.testing.assert_allclose(predicted.loc[saved["Echo_ID"], "finding"], probability, rtol=1e-5)
    assert (predicted["n_clips"] == 4 * predicted["n_videos"]).all()

    assert cli("embed", "--dataset", "site")[0] == 0
    with h5py.File(folder / "embeddings_site_defect.h5") as f:
        assert dict(f.attrs) == {"dataset": "site", "model_name": "defect", "task": "defect"}
        assert len(f) == 60 and f["1000"].shape == (768,)
        head = read_checkpoint(folder / "best_checkpoint.pt")["model_state_dict"]
        logit = head["ff.weight"].numpy() @ f["1000"][:] + head["ff.bias"].numpy()
        probability = 1 / (1 + np.exp(-logit[0]))
        assert predicted.loc["1000", "finding"] == pytest.approx(probability, rel=1e-4)

    status, out, err = cli("explain", "--explain_n", "3")
    assert status == 0, err
    videos = pd.read_csv(folder / "explanation_test_site.csv", dtype={"eid": str})
    columns = ["eid", "label", "y_true", "prediction", "video", "score", "score_abs", "rank"]
    columns += ["without", "baseline", "baseline_name", "convergence_error", "score_unit"]
    columns += ["score_warning"]
    assert list(videos) == columns
    assert set(videos["eid"]) == set(saved["Echo_ID"])
    assert len(videos) == predicted.loc[saved["Echo_ID"], "n_videos"].sum()
    for _, study in videos.groupby("eid"):
        assert list(study["rank"]) == list(range(1, len(study) + 1))
        assert study["score_abs"].is_monotonic_decreasing
    top = pd.read_csv(folder / "explanation_test_site.explain_n-3.mode-pred.csv").iloc[0]
    first = videos[(videos["eid"] == str(top["echo_id"])) & (videos["rank"] == 1)].iloc[0]
    assert top["top_video_1"] == first["video"]
    assert top["top_video_1_score"] == pytest.approx(first["score_abs"])
    positive = videos[videos["prediction"] > 0.5]
    many = positive[positive.groupby("eid")["eid"].transform("size") > 1]
    assert (many[many["rank"] == 1]["video"] == "v00.avi").mean() > 0.7  # where the pattern is


def test_regression_in_physical_units(cohort, cli):
    assert cli("train", "--task", "sizes", "--epoch_lim", "8", "--tf_combine", "max")[0] == 0
    status, _, err = cli("evaluate", "--subset", "all")
    assert status == 0, err
    folder = cohort / "trained_models" / "sizes"
    saved = pd.read_csv(folder / "saveout_all_site.csv")
    labels = pd.read_csv("labels.csv").set_index("eid").loc[saved["Echo_ID"], "size"]
    np.testing.assert_allclose(saved["size_Correct"], labels, rtol=1e-5)  # not scaled
    metrics = pd.read_csv(folder / "metrics_all_site.csv").set_index("metric")
    error = (saved["size_Predict"] - saved["size_Correct"]).abs()
    assert metrics["value"]["median_absolute_error"] == pytest.approx(error.median(), rel=1e-4)
    assert metrics["unit"]["rmse"] == "cm" and metrics["value"]["r2"] > 0.5
    assert (folder / "scatter_plots_all_site.pdf").exists()
    assert cli("explain", "--explain_mode", "loss", "--sample_limit", "2")[0] == 0
    tops = pd.read_csv(folder / "explanation_test_site.sample_limit-2.explain_n-5.mode-loss.csv")
    truth = pd.read_csv("labels.csv").set_index("eid").loc[tops["echo_id"], "size"]
    np.testing.assert_allclose(tops["y_true"], truth, rtol=1e-5)


def test_another_dataset_leaves_out_trained_patients(trained, cli):
    config = json.loads((trained / "config.json").read_text())
    config["dataset"]["other"] = {"embedding_path": "emb"}
    (trained / "config.json").write_text(json.dumps(config))
    status, out, _ = cli("evaluate", "--dataset", "other")
    split = pd.read_csv("trained_models/defect/split.csv", dtype=str)
    seen = split["fold"].isin(["train", "val"]).sum()
    assert status == 0 and f"not test studies: {seen} labelled studies" in out
    saved = pd.read_csv("trained_models/defect/saveout_test_other.csv", dtype=str)
    assert set(saved["Echo_ID"]) == set(split["eid"][split["fold"] == "test"])


@pytest.mark.parametrize(("layout", "numpy_1"), [("ours", False), ("published", True)])
def test_published_files(tmp_path, monkeypatch, cli, layout, numpy_1):
    """Released checkpoints on embeddings in either layout give the recorded numbers."""
    monkeypatch.chdir(tmp_path)
    config = json.loads((ROOT / "config-example.json").read_text())
    for dataset in config["dataset"].values():
        dataset["embedding_path"] = "emb"
    config["task"]["twelve"] = {"task_labels": [f"label {i}" for i in range(12)]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for i, n in enumerate(N_VIDEOS[:4]):
        write_embeddings(tmp_path / "emb", f"s{i}", normal(100 + i, n, 16, 768), layout)
    published_model(tmp_path / "trained_models/EchoFocus_CHD", 22, numpy_1=numpy_1)
    scaling = recorded("measure_norm.json")
    published_model(tmp_path / "trained_models/EchoFocus_Measure", 18, scaling, numpy_1)
    published_model(tmp_path / "trained_models/site_query", 12, numpy_1=numpy_1, kind="query")
    numbers, measured = recorded("study_parity.npz"), recorded("measure_parity.npz")

    status, _, err = cli("predict", "--model_name", "EchoFocus_CHD", "--out", "chd.csv")
    assert status == 0, err
    table = pd.read_csv("chd.csv").set_index("eid")
    labels = [label.strip() for label in recorded("labels.json")["chd"]]
    assert list(table)[2:-1] == labels
    assert cli("predict", "--model_name", "EchoFocus_Measure", "--out", "measure.csv")[0] == 0
    values = pd.read_csv("measure.csv").set_index("eid")
    assert cli("predict", "--model_name", "site_query", "--out", "query.csv")[0] == 0
    queried = pd.read_csv("query.csv").set_index("eid")
    for i in range(4):
        expected = 1 / (1 + np.exp(-numbers[f"Q/{i}/out"].astype(float)))
        assert relative_error(queried.loc[f"s{i}"][2:-1], expected) < 1e-4
        assert table.loc[f"s{i}", "n_videos"] == N_VIDEOS[i]
        expected = 1 / (1 + np.exp(-numbers[f"A/{i}/out_f64"]))
        assert relative_error(table.loc[f"s{i}"][2:-1], expected) < 1e-4
        assert relative_error(values.loc[f"s{i}"][2:-1], measured["measure/out_unnorm"][i]) < 1e-4

    (tmp_path / "config.json").write_text(
        json.dumps(config | {"task": {k: v for k, v in config["task"].items() if k != "chd"}})
    )
    shutil.copytree("trained_models/EchoFocus_CHD", "trained_models/unknown")
    status, _, err = cli("predict", "--model_name", "unknown")
    assert status == 1 and "22 outputs" in err


def test_predict_from_dicom(trained, cli):
    """One command from a folder with a real DICOM cine to a table; skipped files are listed."""
    folder = trained / "patients" / "visit1"
    folder.mkdir(parents=True)
    copy_example(folder / "cine.dcm")
    copy_example(folder / "still.dcm", "rgb_color")
    options = ("--weights", "random", "--size", "56", "--n_clips", "2", "--out", "p.csv")
    status, out, err = cli("predict", "--videos", "patients", *options)
    assert status == 0, err
    assert "visit1/still.dcm: still image" in out
    table = pd.read_csv("p.csv").iloc[0]
    assert (table["eid"], table["n_videos"], table["n_clips"]) == ("visit1", 1, 2)
    assert 0 < table["finding"] < 1


def test_predictions_of_two_folders_of_one_name(trained, cli):
    """Two sources whose folders have the same name get separate tables of predictions."""
    for hospital in ("a", "b"):
        (trained / hospital / "dicom").mkdir(parents=True)
    copy_example(trained / "a" / "dicom" / "1.dcm")
    write_dicom(trained / "b/dicom/1.dcm", moving_square()[..., ::-1].copy(), "RGB")
    options = ("--weights", "random", "--size", "56", "--n_clips", "1")
    actual = []
    for hospital in ("a", "b"):
        line = ("predict", "--videos", f"{hospital}/dicom", "--out", f"{hospital}.csv")
        assert cli(*line, *options)[0] == 0
        actual.append(pd.read_csv(f"{hospital}.csv")["finding"][0])
    assert actual[0] != actual[1]


def test_a_missing_input_is_one_line(cohort, cli):
    for name, message in (("emb", "embedding_path"), ("config.json", "no config config.json")):
        shutil.move(name, f"{name}.moved")
        status, _, err = cli("train", "--task", "defect")
        assert status == 1 and name in err and message in err and err.count("\n") == 1, err


def test_the_second_run_in_a_folder_stops(trained, cli):
    for held, line in (
        ("trained_models/defect", ["train", "--task", "defect", "--epoch_lim", "2"]),
        ("emb.packed.h5", ["pack"]),
        ("trained_models/defect/.explanation_test_site.csv.journal", ["explain"]),
    ):
        with lock(held, timeout=0):
            status, _, err = cli(*line)
            assert status == 1 and f"another process is using {held}" in err, err
            assert err.splitlines()[-1].startswith("echofocus.py: error")
        assert cli(*line)[0] == 0
    assert not list(Path().rglob("*.lock"))


def test_full_memory_is_one_line(cli):
    def fails(_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    status, _, err = cli(main=fails)
    assert status == 1 and "memory" in err and err.count("\n") == 1


def test_a_terminal_without_unicode(cohort):
    line = [sys.executable, ROOT / "echofocus.py", "check", "--config", "Ω.json"]
    actual = subprocess.run(
        line, env=os.environ | {"PYTHONIOENCODING": "latin-1"}, capture_output=True
    )
    assert actual.returncode == 1 and b"no config \\u03a9.json" in actual.stdout, actual.stderr


def test_several_models_and_no_name(add_model, cli):
    """They are listed; a single model, or the only one for a task, is used."""
    add_model("defect", "--epoch_lim", "2")
    add_model("sizes", "--epoch_lim", "2")
    for command in ("predict", "evaluate", "embed", "explain"):
        status, _, err = cli(command)
        assert status == 1 and "--model_name (defect, sizes)" in err, err
    status, out, err = cli("predict", "--task", "sizes")
    assert status == 0 and "using model_name = sizes" in out, err


def test_tensorboard_without_its_package(cohort, cli, monkeypatch):
    monkeypatch.setattr("echofocus_core.study.job.find_spec", lambda name: None)
    for command in ("train", "check"):
        status, out, err = cli(command, "--task", "defect", "--tensorboard")
        assert status == 1 and 'pip install "tensorboard"' in out + err
    assert not Path("trained_models").exists()


def test_wrong_options(cohort, cli):
    for line, message in (
        (["train", "--task", "defects"], "no task defects; did you mean defect"),
        (["train", "--split", "60,20,30"], "sum to 100"),
        (["train", "--device", "gpu"], "--device gpu is not available here"),
        (["evaluate"], "download EchoFocus_CHD"),
        (["evaluate", "--model_name", "defekt"], "no trained model trained_models/defekt"),
    ):
        status, _, err = cli(*line)
        assert status in (1, 2) and message in err, line


def test_a_shared_model_is_not_overwritten_by_training(trained, cli):
    """Nor are shared folds; a run that was killed between its first checkpoints starts again."""
    folder = trained / "trained_models" / "defect"
    (folder / "last_checkpoint.pt").unlink()
    before = (folder / "best_checkpoint.pt").read_bytes()
    status, _, err = cli("train", "--task", "defect", "--seed", "5")
    assert status == 1 and "contains a trained model" in err
    fold = trained / "trained_models" / "cv" / "fold_1"
    fold.mkdir(parents=True)
    shutil.copy(folder / "best_checkpoint.pt", fold)
    settings = Settings(model_name="cv", fold=ALL_FOLDS, n_folds=3)
    with pytest.raises(UserError, match="fold_1 contains a trained model"):
        folder_to_train_in(settings)
    (folder / "train_losses.csv").unlink()
    assert folder_to_train_in(Settings(model_name="defect")) == Path("trained_models/defect")
    assert (folder / "best_checkpoint.pt").read_bytes() == before


def test_invalid_model_names(trained, cli):
    for name in ("defect,", ",defect", "defect,,defect"):
        status, _, err = cli("predict", "--model_name", name)
        assert status == 1 and "a name is missing next to a comma" in err
    status, _, err = cli("evaluate", "--compare", "")
    assert status == 1 and "--compare has an empty name" in err


def test_unreadable_studies_are_listed(cohort, cli):
    (cohort / "emb" / "1003.hdf5").write_bytes(b"not HDF5")
    with h5py.File(cohort / "emb" / "1004.hdf5", "a") as f:
        f["embeddings"][0, 0, 0] = np.nan
    line = ("train", "--task", "defect", "--epoch_lim", "1", "--first_study_only")
    status, out, err = cli(*line)
    assert status == 0 and "40 labelled studies of 40 patients" in out, err
    write_embeddings(cohort / "emb", "1005", normal(0, 2, 3, 512))
    status, out, _ = cli("predict", "--out", "p.csv")
    left_out = pd.read_csv("p_left_out.csv", dtype=str).set_index("eid")["reason"]
    assert status == 0 and left_out.index.tolist() == ["1003", "1004", "1005"]
    assert "NaN" in left_out["1004"] and "768" in left_out["1005"]
    assert len(pd.read_csv("p.csv")) == 57


def test_malicious_checkpoint_is_refused(cohort, cli):
    class Evil:
        def __reduce__(self):
            return (open, (str(cohort / "ran"), "w"))

    folder = cohort / "trained_models" / "evil"
    folder.mkdir(parents=True)
    torch.save(
        {"model_state_dict": by_rule(n_outputs=1).state_dict(), "x": Evil()}, folder / "b.pt"
    )
    (folder / "b.pt").rename(folder / "best_checkpoint.pt")
    status, _, err = cli("predict", "--model_name", "evil")
    assert status == 1 and "refused" in err and "io.open" in err
    assert not (cohort / "ran").exists()


def test_labels_that_cannot_be_learnt_are_reported_and_blank(cohort, cli):
    table = pd.read_csv("labels.csv")
    table["constant"], table["rare"] = 0, (table.index % 15 == 0).astype(int)
    table.to_csv("labels.csv", index=False)
    edit_config(task_labels=["finding", "constant", "rare"])
    status, out, err = cli("train", "--task", "defect", "--epoch_lim", "2")
    assert status == 0, err
    assert "label constant cannot be learnt: always 0" in out
    assert "label rare is hard to learn: few examples in the training fold" in out
    assert cli("predict")[0] == 0
    predicted = pd.read_csv("trained_models/defect/predictions_site.csv")
    assert predicted["constant"].isna().all() and predicted["finding"].notna().all()
    status, _, err = cli("evaluate")
    assert status == 0, err


def test_start_from_another_model(trained, cli):
    """Heads are matched by label name; without learning, a loaded head predicts as before."""
    assert cli("predict")[0] == 0
    before = pd.read_csv("trained_models/defect/predictions_site.csv")
    table = pd.read_csv("labels.csv")
    table["other"] = (table["size"] > 5).astype(int)
    table.to_csv("labels.csv", index=False)
    edit_config(task_labels=["other", "finding"])
    options = ("--init_from", "defect", "--model_name", "next", "--learning_rate", "1e-9")
    status, out, err = cli("train", "--task", "defect", *options, "--epoch_lim", "1")
    assert status == 0, err
    assert "starting from defect: loaded 1 heads, 1 new heads" in out
    assert cli("predict", "--model_name", "next")[0] == 0
    after = pd.read_csv("trained_models/next/predictions_site.csv")
    np.testing.assert_allclose(after["finding"], before["finding"], atol=1e-3)
    split = pd.read_csv("trained_models/next/split.csv", dtype=str)
    parent = pd.read_csv("trained_models/defect/split.csv", dtype=str)
    tested = set(split["eid"][split["fold"] == "test"])
    assert tested and tested <= set(parent["eid"][parent["fold"] == "test"])
    status, _, err = cli("train", "--task", "defect", *options, "--encoder_depth", "3")
    assert status == 1 and "--init_from has encoder_depth = 1, not 3" in err


def test_units_are_compared(cohort, cli):
    """Different units are refused in evaluation; with --init_from they cause a new head."""
    assert cli("train", "--task", "sizes", "--epoch_lim", "1")[0] == 0
    config = json.loads(Path("config.json").read_text())
    config["task"]["mm"] = config["task"]["sizes"] | {"units": {"size": "mm"}}
    config["task"]["CM"] = config["task"]["sizes"] | {"units": {"size": "CM "}}
    Path("config.json").write_text(json.dumps(config))
    line = ("--model_name", "sizes", "--task", "mm")
    status, _, err = cli("evaluate", *line)
    assert status == 1 and "has size in mm, sizes in cm" in err
    assert cli("evaluate", "--model_name", "sizes", "--task", "CM", "--n_boot", "5")[0] == 0
    table = pd.read_csv("labels.csv")
    table["size"] *= 10
    table.to_csv("labels.csv", index=False)
    status, out, err = cli("train", "--task", "mm", "--init_from", "sizes", "--epoch_lim", "1")
    assert status == 0 and "loaded 0 heads, 1 new heads" in out, err
    assert cli("train", "--task", "mm", "--run_id", "fresh", "--epoch_lim", "1")[0] == 0
    assert ef.load("mm").scaling == ef.load("mm_fresh").scaling
    config["task"]["sizes"]["units"] = {"size": "mm"}
    Path("config.json").write_text(json.dumps(config))
    status, out, _ = cli("check", "--model_name", "sizes")
    assert status == 1 and "has size in mm, sizes in cm" in out


def test_embeddings_of_other_settings_are_reported(trained, cli):
    """By evaluate (also in its table and page), embed, explain, and train --init_from."""
    for path in Path("emb").glob("*.hdf5"):
        with h5py.File(path, "a") as f:
            f.attrs["clip_len"] = 8
    saved = torch.load("trained_models/defect/best_checkpoint.pt", weights_only=True)
    saved["echofocus"]["input"]["clip_len"] = 16
    torch.save(saved, "trained_models/defect/best_checkpoint.pt")
    text = "defect was trained on embeddings of clip_len 16"
    for line in (
        ["evaluate", "--model_name", "defect", "--n_boot", "5"],
        ["embed", "--model_name", "defect"],
        ["explain", "--model_name", "defect", "--sample_limit", "1"],
        ["train", "--init_from", "defect", "--model_name", "next", "--epoch_lim", "1"],
    ):
        status, out, err = cli(*line)
        assert status == 0 and text in out and "have 8" in out, out + err
    folder = Path("trained_models/defect")
    assert pd.read_csv(folder / "metrics_test_site.csv")["warning"].str.contains(text).all()
    assert text in (folder / "report_test_site.html").read_text()
    (table,) = folder.glob("explanation_*.sample_limit-1.csv")
    assert pd.read_csv(table)["warning"].str.contains(text).all()
    with h5py.File(folder / "embeddings_site_defect.h5") as f:
        assert text in f.attrs["warning"]


def test_the_best_checkpoint_is_of_the_run(trained, cli):
    """A best checkpoint that is missing or from another run is an error."""
    line, folder = ["train", "--task", "defect", "--epoch_lim"], Path("trained_models/defect")
    best = folder / "best_checkpoint.pt"
    before = {p: (folder / p).read_bytes() for p in ("run.json", "train_args.csv")}
    status, out, _ = cli(*line, "2", "--learning_rate", "5", "--target", "sensitivity=0.9")
    assert status == 0 and "changed options are ignored" in out
    assert before == {p: (folder / p).read_bytes() for p in before}
    for other in ("sizes", ""):
        if other:
            assert cli("train", "--task", "sizes", "--epoch_lim", "1")[0] == 0
            shutil.copy(f"trained_models/{other}/best_checkpoint.pt", best)
        else:
            best.unlink()
        status, _, err = cli(*line, "3")
        assert status == 1 and "missing or from another run" in err


def test_run_record_and_changes_on_resume(cohort, cli):
    assert cli("train", "--task", "defect", "--epoch_lim", "1")[0] == 0
    record = json.loads(Path("trained_models/defect/run.json").read_text())
    assert record["settings"]["learning_rate"] == 1e-3 and record["versions"]["torch"]
    assert sum(record["studies"].values()) == 60
    status, out, _ = cli("train", "--task", "defect", "--epoch_lim", "2", "--learning_rate", "5e-4")
    assert status == 0 and "changed on resume: learning_rate was 0.001 and is now 0.0005" in out
    assert pd.read_csv("trained_models/defect/train_losses.csv")["lr"].tolist() == [1e-3, 5e-4]
    assert (
        json.loads(Path("trained_models/defect/run.json").read_text())["settings_from_epoch"] == 2
    )
    write_embeddings(cohort / "emb", "1000", np.ones((1, 4, 768), np.float32))
    line = ("train", "--task", "defect", "--epoch_lim", "3")
    status, _, err = cli(*line, "--encoder_depth", "2")
    assert status == 1 and "encoder_depth was 1 and is now 2" in err
    status, _, err = cli(*line)
    assert status == 1 and "different clip embeddings" in err and "--allow_mixed" in err
    table = pd.read_csv("labels.csv")
    table.loc[0, "finding"] = 1 - table.loc[0, "finding"]
    table.to_csv("labels.csv", index=False)
    status, _, err = cli(*line)
    assert status == 1 and "different values of the labels" in err
