"""embed/train.py on phantoms in the three published layouts, with its command line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight

from echofocus_core.base.console import Collected, UserError
from echofocus_core.base.resume import differences
from echofocus_core.encoder import cohorts, start, train
from echofocus_core.encoder import report as encoder
from echofocus_core.encoder.losses import MultiTaskLoss, class_weights, fill_means
from echofocus_core.video import backbones, cache, extract, panecho, store
from echofocus_core.video import decode as video
from echofocus_core.video.clip_tensors import draw_factors
from echofocus_core.video.phantom import phantom_cine, write_video
from echofocus_core.video.record import EncoderTask

FRAME = "--model_name frame_transformer --fc_dropout 0.25 --augment --reduce_lr 3 --amp"
TINY_CONVNEXT = "--arch convnext_tiny --normalization imagenet"
FINE_TUNING = {
    "PanEcho": f"--model_dir_path panecho {FRAME} {TINY_CONVNEXT}",
    "scratch": f"--rand_init {FRAME} {TINY_CONVNEXT}",
    "ImageNet": f"{FRAME} {TINY_CONVNEXT}",
    "EchoCLIP": f"{FRAME} --arch echo-clip --normalization echo-clip",
    "Kinetics": "--model_name 3dresnet18 --normalization kinetics --augment --reduce_lr 3 --amp",
}
COHORTS = ("echonetdynamic", "echonetpediatric")
SMALL = "--model_name frame_transformer --arch convnext_tiny --normalization imagenet --n_layers 1 "
SMALL += "--n_heads 2 --rand_init --size 32 --clip_len 4 --num_clips 2 --batch_size 6 --device cpu "
SMALL += "--n_bootstrap 100 --num_workers 1"
NARROW = ((8, 1), (16, 1), (32, 1), (32, 1))


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    """A ConvNeXt of four narrow blocks, and no figures: a step takes milliseconds."""
    monkeypatch.setattr(panecho, "CONVNEXT_TINY", NARROW)
    monkeypatch.setattr(panecho, "EMBED_DIM", 32)
    monkeypatch.setattr(panecho.ImageEncoder, "width", 32)
    for name in ("plot_predictions", "plot_history"):
        monkeypatch.setattr(encoder, name, lambda *_: None)


def draw(path, ef, seed):
    write_video(path, phantom_cine("A4C", ef, frames=16, size=(40, 48), seed=seed))


def write_list(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / "FileList.csv", index=False)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    """EchoNet-Dynamic as it is distributed: 44 videos, one of them damaged, and a missing one."""
    folder, rng = tmp_path_factory.mktemp("dynamic"), np.random.default_rng(0)
    efs = rng.uniform(15, 75, 44).round(1)
    for i, ef in enumerate(efs):
        draw(folder / "Videos" / f"0X{i:02}.avi", ef, i)
    (folder / "Videos" / "0X00.avi").write_bytes(b"no video")
    table = pd.DataFrame({"FileName": [f"0X{i:02}" for i in range(44)] + ["0XGONE"]})
    table["EF"], table["EDV"] = [*efs, 50], 100
    table["ESV"] = 100 - table["EF"]
    table["Split"] = ["TRAIN"] * 28 + ["VAL"] * 8 + ["TEST"] * 8 + ["TRAIN"]
    write_list(folder, table)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(cli, *line):
    words = [w for part in line for w in str(part).split()]
    return cli(*words, main=train.main)


def dynamic_line(folder):
    """Options of a small network and EchoNet-Dynamic in a folder."""
    return (
        f"--cohort echonetdynamic --data_dir {folder} --size 32 --clip_len 4 --num_clips 1 "
        "--batch_size 8 --device cpu --num_workers 1 --n_bootstrap 20"
    )


def numbers(text):
    return torch.load(text, weights_only=True)


# ------------------------------------------------------------------------------------ command line


def test_documented_lines():
    """Every line of the tables in docs/train-encoder.md, and no other."""
    text = (ROOT / "docs" / "train-encoder.md").read_text()
    lines = re.findall(r"\| `(--[^`]*--reduce_lr 3[^`]*)` \|", text)
    hospital = f"--cohort hospital --output_dir panecho {FRAME} {TINY_CONVNEXT}"
    assert lines == [hospital, *FINE_TUNING.values()]
    parser = train.Parser()
    train.add_options(parser, train.COMMAND, train.EncoderSettings)
    starts = [f"--cohort {c} --output_dir {c} " for c in COHORTS]
    for line in [hospital, *(a + b for a in starts for b in FINE_TUNING.values())]:
        settings = train.resolve_settings(vars(parser.parse_args(line.split())))
        assert settings.reduce_lr == 3 and settings.augment and settings.precision == "bf16"
        assert (settings.max_epochs, settings.patience, settings.batch_size) == (30, 10, 16)
        assert (settings.lr, settings.wd, settings.num_clips, settings.clip_len) == (1e-4, 0, 4, 16)
        assert settings.rand_init == ("--rand_init" in line)
    assert vars(parser.parse_args(["--reduce_lr"]))["reduce_lr"] == 2


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("", "--cohort"),
        ("--cohort echonetdynamic --data_dir nowhere", "no folder nowhere"),
        ("--cohort hospital --rand_init --model_dir_path x", "--model_dir_path"),
    ],
)
def test_odd_options(cli, here, line, wrong):
    status, _, err = run(cli, line)
    assert status == 1 and wrong in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("line", "package"),
    [
        ("--model_name 3dresnet18", "torchvision"),
        ("--model_name frame_transformer --arch convnextv2_tiny.fcmae", "timm"),
    ],
)
def test_other_backbones_name_their_package(cli, here, dynamic, monkeypatch, line, package):
    for name in ("torchvision", "torchvision.models", "timm"):
        monkeypatch.setitem(sys.modules, name, None)
    status, _, err = run(cli, dynamic_line(dynamic), line, "--sample_limit 2")
    assert status == 1 and f"pip install {package}" in err


def test_a_backbone_with_batch_normalisation(cli, here, dynamic, monkeypatch):
    """It is trained, resumed, evaluated and used as initial weights, despite its counters."""

    def build(name, pretrained):
        parts = torch.nn.Conv3d(3, 8, 3, 4), torch.nn.BatchNorm3d(8), torch.nn.AdaptiveAvgPool3d(1)
        return torch.nn.Sequential(*parts, torch.nn.Flatten())

    monkeypatch.setattr(backbones, "from_torchvision", build)
    monkeypatch.setitem(backbones.TORCHVISION, "r3d_18", ("", 8))
    line = f"{dynamic_line(dynamic)} --model_name 3dresnet18 --max_epochs"
    for epochs in ("1", "2"):
        status, out, err = run(cli, line, epochs, "--output_dir a --rand_init")
        assert status == 0, out + err
    assert "resuming a after epoch 1" in out and Path("a/metrics_test.csv").is_file()
    (file,) = Path("a").glob("chkpt_epoch-*.pt")
    saved = numbers(file)
    assert not any(k.endswith("num_batches_tracked") for k in saved["weights"])
    saved["weights"]["encoder.model.1.num_batches_tracked"] = torch.tensor(7)  # as published
    torch.save(saved, "theirs.pt")
    for weights in ("a", "theirs.pt"):
        to = f"--output_dir from_{weights} --model_dir_path {weights} --lr 1e-12"
        status, out, err = run(cli, line, "1", to)
        assert status == 0 and "loaded the backbone and 1 heads" in out, out + err


def test_every_task_of_panecho_can_be_recorded():
    """Those with a bar or brackets in their name too: E|EAvg, RADimensionM-L(cm)."""
    for task in panecho.TASKS:
        assert EncoderTask(**task).entry()["name"] == task["name"]
    for name in ("a/b", "..", ""):
        with pytest.raises(ValueError):
            EncoderTask(name=name, type="regression")


# ------------------------------------------------------------------------------------------- tables


def test_odd_lists(here, dynamic):
    table = pd.read_csv(dynamic / "FileList.csv").head(3)
    for changed, wrong in (
        (table.replace({"Split": "TRAIN"}, "train2"), "Split train2"),
        (table.assign(FileName="0X02"), r"0X02\.avi"),
        (table.rename(columns={"Split": "Splt"}), "no column 'Split'"),
    ):
        write_list(here / "dyn", changed)
        with pytest.raises(UserError, match=wrong):
            cohorts.read_cohort("echonetdynamic", "dyn")


def test_own_tasks(here, dynamic):
    """A JSON task list; classes by name, one of them None; values that are not a class."""
    table = pd.read_csv(dynamic / "FileList.csv").head(6)
    table["grade"] = ["mild", "severe", "none", "severe", "awful", ""]
    table["AVStenosis"] = ["None", "Severe", "", "NA", "", ""]
    table["LVSize"] = ["None", "Normal", "", "NA", "", ""]
    write_list(here / "dyn", table)
    (here / "dyn" / "Videos").symlink_to(dynamic / "Videos")
    task = {"name": "grade", "type": "multi-class", "classes": ["none", "mild", "severe"]}
    (here / "tasks.json").write_text(json.dumps([task]))
    cohort = cohorts.read_cohort("echonetdynamic", "dyn", ["tasks.json"])
    assert cohort.labels["grade"].dropna().tolist() == [1, 2, 0, 2]
    for fault in ({"classes": ["a", "b"]}, {"type": "other"}, {"klasses": []}):
        (here / "tasks.json").write_text(json.dumps([task | fault]))
        with pytest.raises(UserError, match=r"tasks\.json"):
            cohorts.read_cohort("echonetdynamic", "dyn", ["tasks.json"])
    actual = cohorts.read_cohort("echonetdynamic", "dyn", ["AVStenosis", "LVSize", "EF"]).labels
    np.testing.assert_array_equal(actual["AVStenosis"][:4], [1, 2, np.nan, np.nan])
    np.testing.assert_array_equal(actual["LVSize"][:4], [np.nan, 2, np.nan, np.nan])


@pytest.mark.parametrize(
    ("classes", "cells", "expected"),
    [
        ("012", "0129", [0, 1, 2, np.nan]),
        (["0.0", "1.0"], "011-", [0, 1, 1, np.nan]),
        (["0.0", "1.0"], ["No", "Yes", None, "-1"], [0, 1, np.nan, np.nan]),
        (["Dilated", "Normal"], ["Yes", "No", "normal", "-1"], [np.nan, np.nan, 1, np.nan]),
    ],
)
def test_values_of_a_task(classes, cells, expected):
    """What is neither a class nor missing is reported."""
    task, heard = {"name": "grade", "class_names": list(classes)}, Collected()
    column = pd.Series(list(cells), dtype=object)
    actual = cohorts.values_of(column, task, "hospital", "train.csv", heard)
    np.testing.assert_array_equal(actual, expected)
    odd = [c for c, v in zip(cells, actual, strict=True) if np.isnan(v) and c not in (None, "-1")]
    assert (f"{len(odd)} values are not" in str(heard.findings)) == bool(odd)


def test_check(cli, here, dynamic):
    status, out, err = cli("check", "--cohort", "echonetdynamic", "--data_dir", dynamic)
    assert status == 0, err
    assert "0XGONE.avi" in out and "0X00.avi: " in out and "decoding 4" in out
    status, out, _ = cli("check", "--cohort", "hospital", "--data_dir", dynamic)
    assert status == 1 and "train.csv" in out


# ------------------------------------------------------------------------------------------- losses


def test_losses_against_scikit_learn():
    """Masked, weighted, divided by the training mean; the parts of a batch add up to it."""
    rng, n = np.random.default_rng(0), 40
    tasks = [
        {"name": "b", "type": "binary_classification", "class_names": ["no", "yes"]},
        {"name": "m", "type": "multi-class_classification", "class_names": ["x", "y", "z"]},
        {"name": "r", "type": "regression", "class_names": []},
        {"name": "absent", "type": "regression", "class_names": []},
    ]
    y = pd.DataFrame({"b": rng.random(n) < 0.2, "m": rng.integers(0, 3, n)}).astype(float)
    y["r"], y["absent"] = rng.normal(50, 9, n), np.nan
    y = y.mask(rng.random(y.shape) < 0.3)
    tasks = fill_means(tasks, y)
    weights = {t["name"]: class_weights(t, y[t["name"]]) for t in tasks}
    for name, k in (("b", 2), ("m", 3)):
        labels = y[name].dropna()
        expected = compute_class_weight("balanced", classes=np.arange(k), y=labels)
        assert np.allclose(weights[name], expected)
    loss = MultiTaskLoss(tasks, weights)
    out = {"b": torch.randn(n, 1), "m": torch.randn(n, 3), "r": 50 + torch.randn(n, 1)}
    out["absent"] = torch.randn(n, 1)
    targets = torch.tensor(y.to_numpy(np.float32, copy=True))
    divisors = loss.divisors(y.to_numpy())
    actual = loss.mean(loss.sums(out, targets), divisors)

    b, m, r = (y[name].notna().to_numpy() for name in "bmr")
    p = torch.sigmoid(out["b"][torch.tensor(b), 0]).double().clone().numpy()
    yb, w = y["b"][b].to_numpy(), weights["b"].numpy()
    each = -(yb * np.log(p) * w[1] / w.min() + (1 - yb) * np.log(1 - p))
    q, ym = out["m"][m].double().softmax(1).numpy(), y["m"][m].to_numpy().astype(int)
    cross = log_loss(ym, q, sample_weight=weights["m"].numpy()[ym], labels=[0, 1, 2])
    square = ((out["r"][r, 0].numpy() - y["r"][r]) ** 2).mean() / y["r"].mean()
    assert float(actual) == pytest.approx((each.mean() + cross + square) / 3, rel=1e-5)

    half = {k: v[: n // 2] for k, v in out.items()}, {k: v[n // 2 :] for k, v in out.items()}
    parts = (loss.sums(o, t) for o, t in zip(half, targets.split(n // 2), strict=True))
    total = sum(float(loss.mean(s, divisors)) for s in parts)
    assert total == pytest.approx(float(actual), rel=1e-5)


# ------------------------------------------------------------------------------------------- frames


def test_cached_clips_are_the_frames(here, dynamic):
    """A clip from the cache equals the decoded, resized and cropped file."""
    path = str(dynamic / "Videos" / "0X05.avi")
    store = cache.FrameCache("frames", 32)
    assert store.fill([path], 1) == {}
    frames, sampling = video.read_frames(path), cache.ClipSampling(4, 32)
    clips = store.clips(path, 3, sampling, 7, "x")
    starts = video.clip_starts(len(frames), 3, 4, 7, "x", "independent")
    for clip, numbers in zip(clips, video.clip_frames(starts, len(frames), 4), strict=True):
        expected = [video.crop_centre(video.resize(frames[i], 32), 32) for i in numbers]
        np.testing.assert_array_equal(clip, expected)
    assert cache.FrameCache("frames", 224).frames(path).shape == frames.shape  # not made larger
    long = store.clips(path, 1, cache.ClipSampling(20, 32), 0, "x")[0]
    np.testing.assert_array_equal(long[-1], long[-2])
    stamp = os.stat(path).st_mtime_ns
    os.utime(path, ns=(stamp, stamp + 10**9))
    assert not store.place(path).is_file()  # a changed file is decoded again
    os.utime(path, ns=(stamp, stamp))


def test_copies_have_the_same_frames(tmp_path, dynamic, capsys):
    """Under another name or folder; a blank video is not a copy."""
    videos, store = dynamic / "Videos", cache.FrameCache(tmp_path / "frames", 32)
    for name, source in (("a", "0X05"), ("b", "0X06"), ("c", "0X05"), ("d", "0X05")):
        shutil.copy(videos / f"{source}.avi", tmp_path / f"{name}.avi")
    for name in "ef":
        write_video(tmp_path / f"{name}.avi", np.zeros((4, 32, 32, 3), np.uint8))
    paths = [str(tmp_path / f"{name}.avi") for name in "abcdef"]
    assert store.fill(paths, 1) == {}
    content = [store.content(path) for path in paths]
    assert content[0] == content[2] == content[3] != content[1] and content[4] == content[5]
    table = pd.DataFrame({"path": paths, "content": content}, list("abcdef"))
    assert store.copies(table) == [["a", "c", "d"]]
    table = table.assign(study=list("abcdef"), patient=list("PQPPRS"), split="train")
    labels = pd.DataFrame({"EF": 50.0}, table.index)
    for name, patient, split, wrong in (
        ("hospital", "P", "train", False),
        ("hospital", "T", "train", True),
        ("hospital", "P", "test", True),
        ("echonetdynamic", "T", "test", False),
    ):
        table.loc["c", ["patient", "split"]] = patient, split
        cohort = cohorts.VideoCohort(name, [], table, labels)
        if wrong:
            with pytest.raises(UserError, match="a and c and d"):
                cohorts.report_copies(cohort, store.copies(table))
        else:
            cohorts.report_copies(cohort, store.copies(table))
            out = capsys.readouterr().out
            assert "WARNING" in out and f"videos of {name}" in out
    before, digest = cohort.content_digest(), cohort.digest()
    cohort.videos = table.assign(path="elsewhere").iloc[::-1]
    assert cohort.content_digest() == before
    cohort.videos = table.assign(content=[*content[:5], "other"])
    assert cohort.content_digest() != before and cohort.digest() == digest


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_what_is_missing_in_the_cache_is_decoded_again(tmp_path, dynamic, suffix):
    """For example after a killed run; the reason of an unusable video is kept."""
    good, bad = dynamic / "Videos" / "0X05.avi", tmp_path / "bad.avi"
    bad.write_bytes(b"nothing")
    store = cache.FrameCache(tmp_path / "frames", 32)
    reasons = store.fill([good, bad], 1)
    assert list(reasons) == [bad]
    expected, content = np.array(store.frames(good)), store.content(good)
    store.place(good, suffix).unlink()
    assert store.content(good) == ""
    assert store.fill([good, bad], 1) == reasons
    np.testing.assert_array_equal(store.frames(good), expected)
    assert store.content(good) == content
    store.place(good).write_bytes(store.place(good).read_bytes()[:-9])
    with pytest.raises(UserError, match=r"\.npy is damaged"):
        store.frames(good)


# ----------------------------------------------------------------------------------------- training


def test_learns_from_echonet_dynamic(cli, here, dynamic):
    """Better than the mean on videos that it has not seen; a changed option is refused."""
    line = f"{dynamic_line(dynamic)} --output_dir ef {SMALL} --lr 2e-3 --wd 0.01 --adamw"
    status, out, err = run(cli, line, "--max_epochs 14 --clip_len 8")
    assert status == 0, err
    assert "1 video cannot be used:\n0X00.avi" in out
    test = pd.read_csv("ef/preds/EF/test_EF_preds.csv")
    train_mean = pd.read_csv(dynamic / "FileList.csv")["EF"][:28].mean()
    assert len(test) == 8
    mse = ((test["prediction"] - test["label"]) ** 2).mean()
    assert mse < 0.7 * ((train_mean - test["label"]) ** 2).mean()
    history = pd.read_csv("ef/history.csv")
    assert list(history["phase"][:2]) == ["train", "val"] and "EF_r2" in history
    metrics = pd.read_csv("ef/metrics_test.csv").set_index("metric")
    assert metrics.at["rmse", "value"] == pytest.approx(mse**0.5, rel=1e-4)
    assert "EF: R²" in Path("ef/test_summary.txt").read_text()
    assert str(here) not in "".join(p.read_text() for p in Path("ef").rglob("*.csv"))

    (weights,) = Path("ef").glob("chkpt_epoch-*.pt")
    record = numbers(weights)["encoder"]
    assert record["tasks"][0]["name"] == "EF" and record["started_from"] == "random"
    (seen,) = panecho.read_encoder(weights).seen
    studies = pd.DataFrame({"pid": "P"}, index=["0X05", "0X30", "0X40"])
    assert seen.levels(studies)[1].tolist() == [2, 1, 0]  # trained, validated, tested
    status, out, err = run(cli, line, "--max_epochs 14 --clip_len 8")
    assert status == 0 and "is finished" in out
    status, _, err = run(cli, line, "--max_epochs 9")
    assert status == 1 and "clip_len was 8 and is now 4" in err and "--output_dir" in err


def test_trained_weights_go_into_extraction(cli, here, dynamic, monkeypatch):
    """A run's folder as --weights: its highest epoch and heads; PanEcho's architecture alone where
    nothing else is supported."""
    monkeypatch.undo()
    monkeypatch.chdir(here)
    tasks = [EncoderTask(**t) for t in panecho.TASKS if t["name"] == "EF"]
    state = {k: v for k, v in panecho.random_weights().items() if "_head" not in k or "EF_h" in k}
    Path("run").mkdir()
    split = pd.DataFrame({"pid": ["P"], "fold": ["train"]}, index=["e"])
    for n, arch in ((3, "resnet18"), (12, "convnext_tiny")):
        saved = {"weights": state, "seen": [train.Seen.of(split, "00").saved()]}
        saved["encoder"] = train.EncoderRecord(tasks=tasks, arch=arch).to_save()
        torch.save(saved, f"run/chkpt_epoch-{n}.pt")
    options = "--out emb --size 32 --n_clips 1 --clip_len 2 --workers 1 --manifest few.csv"
    words = [dynamic / "Videos", *options.split(), "--weights"]
    pd.DataFrame({"study": ["s"], "path": ["0X01.avi"]}).to_csv("few.csv", index=False)
    status, _, err = cli(*words, "run", main=extract.main)
    assert status == 0, err
    embedded = store.open_store(Path("emb"))
    digest = embedded.header("s").made_with["weights_sha256"]
    assert embedded.read("s").embeddings.shape == (1, 1, 768)
    assert digest == backbones.sha256_file("run/chkpt_epoch-12.pt")
    (seen,) = store.read_encoder_seen("emb")[digest]
    assert embedded.header("s").made_with["weights_seen"] == "listed"
    assert seen.levels(split)[0].tolist() == [2]
    with pytest.raises(panecho.WeightsError, match="PanEcho's architecture"):
        panecho.load_panecho("run/chkpt_epoch-3.pt")
    assert panecho.load_panecho("run").model.columns() == ["EF [%]"]
    status, out, err = cli("inspect", "run/chkpt_epoch-12.pt")
    assert status == 0 and "labels: 1\n" in out and "GLS" not in out, out + err


class Killed(Exception):
    pass


def test_killed_and_restarted(cli, here, dynamic, monkeypatch):
    """Bit for bit the weights, optimiser and history of the run that was never stopped."""
    line = f"--cohort echonetdynamic --data_dir {dynamic} {SMALL} --max_epochs 2 --sample_limit 8"
    line += " --checkpoint_minutes 0 --fc_dropout 0.25 --augment --reduce_lr --batch_size 3"
    assert run(cli, line, "--output_dir whole")[0] == 0
    step, save_last, calls = train.Run.step, train.Run.save_last, []

    def dies(self, *args):
        calls.append(1)
        if len(calls) in (3, 9):
            raise Killed
        return (step if len(args) else save_last)(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(train.Run, "step", dies)
        patched.setattr(train.Run, "save_last", dies)
        for _ in range(2):
            with pytest.raises(Killed):
                run(cli, line, "--output_dir killed")
    status, out, _ = run(cli, line, "--output_dir killed")
    assert status == 0 and "resuming killed after epoch" in out
    whole, killed = (numbers(f"{name}/last_checkpoint.pt") for name in ("whole", "killed"))
    for part in ("weights", "optimizer"):
        torch.testing.assert_close(killed[part], whole[part], rtol=0, atol=0)
    same = [pd.DataFrame(run["history"]).drop(columns="seconds") for run in (whole, killed)]
    assert same[0].equals(same[1])
    assert Path("whole/test_summary.txt").read_text() == Path("killed/test_summary.txt").read_text()
    assert run(cli, line, "--output_dir none --resume")[0] == 1
    Path("killed/last_checkpoint.pt").unlink()  # a published run's folder, say
    Path("killed/encoder.json").unlink()
    status, _, err = run(cli, line, "--output_dir killed")
    assert status == 1 and "without last_checkpoint.pt" in err


LAUNCH = """
import sys
sys.path.insert(0, {root!r})
from echofocus_core.video import panecho
panecho.CONVNEXT_TINY, panecho.EMBED_DIM = {narrow}, 32
panecho.ImageEncoder.width = 32
from echofocus_core.base.console import run_main
from echofocus_core.encoder import train
run_main(lambda: train.main(sys.argv[1:]), "train.py")
"""


@pytest.mark.slow
def test_two_processes_are_one(cli, here, dynamic):
    """The same losses and predictions, no validation video counted twice; an odd last batch."""
    line = f"--cohort echonetdynamic --data_dir {dynamic} {SMALL} --max_epochs 1 --sample_limit 7"
    line += " --fc_dropout 0.25 --augment"
    assert run(cli, line, "--output_dir one --batch_size 4")[0] == 0
    (here / "launch.py").write_text(LAUNCH.format(root=str(ROOT), narrow=NARROW))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words += ["launch.py", *line.split(), "--output_dir", "two", "--batch_size", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (pd.read_csv(f"{run}/history.csv") for run in ("one", "two"))
    assert np.allclose(one["loss"], two["loss"], rtol=1e-4)
    one, two = (pd.read_csv(f"{run}/preds/EF/val_EF_preds.csv") for run in ("one", "two"))
    assert len(two) == 7 and np.allclose(one["prediction"], two["prediction"], rtol=1e-3)


def test_pediatric_views_and_folds(cli, here, monkeypatch):
    """Both views of an accession give one answer; finished folds are skipped; folds are pooled."""
    for module in (cohorts, train):
        monkeypatch.setattr(module, "PEDIATRIC_FOLDS", 3)
    for view, n in (("A4C", 9), ("PSAX", 6)):
        names = [f"CR{i:02}-CA{i:02}-00000{1 + (view == 'PSAX')}.avi" for i in range(n)]
        table = pd.DataFrame({"FileName": names, "EF": 40.0 + 3 * np.arange(n)})
        for i, (name, ef) in enumerate(table.to_numpy()):
            draw(here / "ped" / view / "Videos" / name, ef, i)
        write_list(here / "ped" / view, table.assign(Split=table.index % 3))
    line = f"--cohort echonetpediatric --data_dir ped --output_dir out {SMALL} --max_epochs 1"
    status, out, err = run(cli, line, "--fold 0")
    assert status == 0, err
    first = pd.read_csv("out/fold_0/preds/EF/test_EF_preds.csv")
    videos = pd.read_csv("out/fold_0/preds/EF/test_EF_video_preds.csv")
    assert list(first["acc_num"]) == ["CR00-CA00", "CR03-CA03", "CR06-CA06"]
    assert len(videos) == 5 and first["label"].tolist() == [40, 49, 58]
    means = videos.groupby("acc_num")["prediction"].mean()
    assert np.allclose(means, first["prediction"], rtol=1e-4)
    before = os.stat("out/fold_0/last_checkpoint.pt").st_mtime_ns
    status, out, err = run(cli, line)
    assert status == 0 and "fold_0 is finished" in out, err
    assert os.stat("out/fold_0/last_checkpoint.pt").st_mtime_ns == before
    pooled = pd.read_csv("out/echonet-pediatric_EF_preds.csv")
    assert sorted(pooled["acc_num"]) == [f"CR{i:02}-CA{i:02}" for i in range(9)]
    assert "R²" in Path("out/echonet-pediatric_summary.txt").read_text()


@pytest.fixture
def hospital(here):
    """Three CSVs: a finding, a grade and EF, some missing (-1); two videos an accession."""
    rng = np.random.default_rng(1)
    for split, n in (("train", 8), ("val", 6), ("test", 6)):
        table = pd.DataFrame({"acc_num": [f"{split}{i}" for i in range(n) for _ in range(2)]})
        table["fname"] = [f"{split}{i}_{k}.avi" for i in range(n) for k in range(2)]
        efs = rng.uniform(15, 75, n).round()
        for i, (name, ef) in enumerate(zip(table["fname"], efs.repeat(2), strict=True)):
            draw(here / "site" / "vids" / name, ef, 100 * n + i)
        table["EF"], i = [-1, -1, *efs[1:].repeat(2)], np.arange(n).repeat(2)
        table = table.assign(video_dir="vids", AVStructure=i % 2, LVSize=i % 3)
        table.to_csv(here / "site" / f"{split}.csv", index=False)
    return here / "site"


def test_hospital_multitask(cli, here, hospital):
    line = f"--cohort hospital --data_dir site --output_dir h {SMALL} --max_epochs 1"
    status, out, err = run(cli, line, "--use_class_weights")
    assert status == 0, err
    assert "3 tasks" in out
    history = pd.read_csv("h/history.csv").iloc[-1]
    both = history["mean_classification_auroc"], history["mean_regression_r2"]
    assert history["mean_auroc_r2"] == pytest.approx(np.mean(both), rel=1e-4)
    grades = pd.read_csv("h/preds/LVSize/test_LVSize_preds.csv")
    classes = [c for c in grades if c.startswith("probability")]
    assert len(grades) == 6 and np.allclose(grades[classes].sum(axis=1), 1, atol=1e-5)
    assert pd.read_csv("h/preds/EF/test_EF_preds.csv")["label"].isna().sum() == 1
    saved = numbers(next(Path("h").glob("chkpt*")))
    means = {t["name"]: t["mean"] for t in saved["encoder"]["tasks"]}
    labels = pd.read_csv(hospital / "train.csv")
    assert means["EF"] == pytest.approx(labels["EF"][labels["EF"] >= 0].mean())

    val = pd.read_csv(hospital / "val.csv")
    val.loc[0, "acc_num"] = "train0"
    val.to_csv(hospital / "val.csv", index=False)
    status, _, err = run(cli, line)
    assert status == 1 and "in several folds: train0" in err


def test_hospital_tables(here, hospital):
    """Two files of one name in an accession; patients in some tables; labels that differ; a study
    of two patients; codes for missing; folds in two units; a video by two paths."""
    val = pd.read_csv("site/val.csv")
    Path("site/more").mkdir()
    Path("site/vids/val0_1.avi").rename("site/more/val0_0.avi")
    val.loc[1, ["fname", "video_dir"]] = "val0_0.avi", "more"
    val.to_csv("site/val.csv", index=False)
    names = cohorts.read_cohort("hospital", "site").videos.index
    assert {"val0/vids/val0_0.avi", "val0/more/val0_0.avi", "val1/val1_0.avi"} <= set(names)
    whole = {split: pd.read_csv(f"site/{split}.csv") for split in ("train", "val", "test")}

    def findings(**changes):
        listener = Collected()
        for split, table in (whole | changes).items():
            table.to_csv(f"site/{split}.csv", index=False)
        cohorts.read_cohort("hospital", "site", (), listener)
        return [f"{finding.level} {finding.text}" for finding in listener.findings]

    def reported(*words, **changes):
        return any(all(w in text for w in words) for text in findings(**changes))

    assert not reported("ERROR")
    assert reported("ERROR", "val", "patient", val=val.assign(patient="P"))
    labels = val.assign(LVSize=val["LVSize"].mask(val.index == 0, 1))
    assert reported("ERROR", "LVSize", "val0", val=labels)
    per_cent = val.assign(EF=val["EF"].where(val["EF"] < 0, val["EF"] / 100))
    assert reported("WARNING", "EF", "medians", val=per_cent)
    train_ = whole["train"]
    code = train_.assign(EF=train_["EF"].mask(train_["acc_num"] == "train1", 999))
    assert reported("WARNING", "EF", "999", "train1", train=code)
    patients = {k: t.assign(patient=t["acc_num"]) for k, t in whole.items()}
    patients["test"].loc[0, "patient"] = "other"
    assert reported("ERROR", "several patients", "test0", **patients)
    patients["test"].loc[0, "patient"] = None  # that of the other row
    assert reported("WARNING", "test.csv", "1 row has no patient", **patients)
    assert not reported("ERROR", **patients)
    Path("site/links").symlink_to("vids")
    twice = whole["test"].copy()
    twice.loc[0, ["fname", "video_dir"]] = "train0_0.avi", "links"
    with pytest.raises(UserError, match=r"train0_0\.avi"):
        findings(test=twice)


def test_changes_on_resume(cli, here, dynamic):
    """Changes that affect the meaning of the weights, or the training, are refused."""

    def facts(unit="", **changes):
        task = {"name": "EF", "type": "regression", "unit": unit}
        record = train.EncoderRecord(tasks=[task], **changes)
        return train.Run.facts(None, record, {"scheduler": {}})

    names = list(differences(facts("mm", videos_sha256="a"), facts("cm")))
    assert names == ["pixels of some video", "unit of EF"]
    assert not differences(facts("mm"), facts()) and not differences(facts(), facts("mm"))
    table = pd.read_csv(dynamic / "FileList.csv")
    write_list(here / "dyn", table.assign(EF=np.arange(len(table)) % 3))
    (here / "dyn" / "Videos").symlink_to(dynamic / "Videos")
    line = f"--cohort echonetdynamic --data_dir dyn --tasks t.json --output_dir run {SMALL}"
    line += " --sample_limit 3 --cos_anneal --max_epochs"
    grades = ["low", "mid", "high"]
    task = {"name": "EF", "type": "multi-class", "classes": grades}
    Path("t.json").write_text(json.dumps([task]))
    assert run(cli, line, 1)[0] == 0
    Path("run/encoder.json").write_text("as it was")  # a finished run keeps it
    for classes, epochs, wrong in (
        (grades[::-1], 1, "classes of the tasks was [['low', 'mid', 'high']]"),
        (grades, 2, "max_epochs was 1 and is now 2"),
        (grades, 1, ""),
    ):
        Path("t.json").write_text(json.dumps([task | {"classes": classes}]))
        status, _, err = run(cli, line, epochs)
        assert (status == 1 and wrong in err) if wrong else status == 0, err
    assert Path("run/encoder.json").read_text() == "as it was"
    Path("run/chkpt_epoch-1.pt").unlink()
    status, _, err = run(cli, line, 1)
    assert status == 1 and "best checkpoint of run is missing" in err


def test_weights_of_another_run_are_not_reported_as_those_of_this_one(tmp_path):
    """Missing, exchanged, or a later epoch next to a finished run's best; not so where a run was
    killed before it recorded its last epoch."""
    run, mine = train.Run.__new__(train.Run), [0.5, 0.3, 0.4, 0.4]
    run.folder, run.scores = tmp_path, [np.nan, 0.3]
    assert run.best_epoch == 2  # an epoch without a metric is not the best
    run.scores, run.history = [0.3, 0.2], [{"loss": loss} for loss in mine]

    def refused(most, epochs, losses):
        """Whether chkpt_epoch-N.pt with these losses is, in a run of so many epochs at most."""
        run.settings = SimpleNamespace(max_epochs=most, patience=9)
        for old in tmp_path.iterdir():
            old.unlink()
        if epochs:
            saved = {"weights": {}, "history": [{"loss": loss} for loss in losses]}
            torch.save(saved, tmp_path / f"chkpt_epoch-{epochs}.pt")
        try:
            run.check_best()
        except UserError:
            return True

    later = [0.1, 0.1]
    assert not refused(2, 1, mine[:2]) and not refused(4, 3, [*mine, *later])
    for case in ((0, []), (1, [0.5, 0.31]), (2, mine), (3, [*mine, *later])):
        assert refused(2, *case), case
    assert refused(4, 3, [*mine[:3], 0.1, *later])


def test_steps_for_all_processes():
    """With shared batch statistics, every process has a video in each step."""
    order = list("abcdefghi")
    assert train.steps_of(order, 4) == [list("abcd"), list("efgh"), ["i"]]
    assert train.steps_of(order, 4, 2) == [list("abcd"), list("efghi")]
    assert train.steps_of([], 4) == []
    with pytest.raises(UserError, match="too few for 16 processes"):
        train.steps_of(order, 32, 16)


def test_pooled_folds_of_every_kind(here):
    """Classes are evaluated as classes; a task that a fold lacks is not in the summary."""
    tasks = [
        {"name": "b", "type": "binary_classification", "class_names": ["no", "yes"]},
        {"name": "m", "type": "multi-class_classification", "class_names": ["x", "y", "z"]},
        {"name": "gone", "type": "regression", "class_names": []},
    ]
    rng = np.random.default_rng(0)
    for k in range(2):
        for task, names in ((tasks[0], ["yes"]), (tasks[1], ["x", "y", "z"])):
            table = pd.DataFrame({"acc_num": [f"P{i}-{k}" for i in range(9)]})
            table["label"] = np.arange(9) % len(task["class_names"])
            values = rng.dirichlet(np.ones(3), 9)[:, : len(names)]
            table[[f"probability {n}" for n in names]] = values
            path = Path(f"fold_{k}/preds/{task['name']}/test_{task['name']}_preds.csv")
            path.parent.mkdir(parents=True)
            table.to_csv(path, index=False)
    encoder.write_pooled(here, [Path("fold_0"), Path("fold_1")], tasks, 20)
    assert "AUROC" in Path("echonet-pediatric_summary.txt").read_text()
    assert "auroc" in Path("echonet-pediatric_m_metrics.csv").read_text()
    assert not list(here.glob("*gone*"))


# ------------------------------------------------------------------------------------------- starts


def test_start_from_imagenet(cli, here, dynamic, monkeypatch):
    """torchvision's names and digest; other files are refused; without a network, one line."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(here / "hub"))
    line = f"--cohort echonetdynamic --data_dir {dynamic} --output_dir i --max_epochs 1"
    line += f" --sample_limit 2 {SMALL.replace('--rand_init', '')}"
    monkeypatch.setattr(backbones, "IMAGENET_URL", "http://127.0.0.1:9/convnext_tiny-983f1562.pth")
    status, _, err = run(cli, line)
    assert status == 1 and "--rand_init" in err
    state = panecho.ConvNeXt().state_dict()
    state["classifier.2.weight"], state["classifier.2.bias"] = torch.ones(9, 32), torch.ones(9)
    path = here / "hub" / "checkpoints" / "convnext_tiny-983f1562.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    status, _, err = run(cli, line)
    assert status == 1 and "not the published file" in err
    digest = backbones.sha256_file(path)
    monkeypatch.setattr(backbones, "IMAGENET_URL", f"http://127.0.0.1:9/c-{digest[:8]}.pth")
    path.rename(path.with_name(f"c-{digest[:8]}.pth"))
    images, start = backbones.build_images("convnext_tiny", True)
    assert start.sha256 == digest and "torchvision" in start.licence
    for name, tensor in images.model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_start_from_a_published_run(here, capsys):
    """Uses its highest epoch and the heads of the same tasks; other networks are refused."""
    tasks = [dict(t, mean=1.0) for t in panecho.TASKS if t["name"] == "EF"]
    theirs = panecho.PanEcho(tasks, False, 4)
    Path("panecho").mkdir()
    pe = {"encoder.time_encoder.pe": torch.zeros(1, 16, 768)}
    for n in (2, 10):
        torch.save({"weights": theirs.state_dict() | pe}, f"panecho/chkpt_epoch-{n}.pt")
    settings = train.EncoderSettings(arch="convnext_tiny")
    for other, kept in (({}, 1), ({"unit": "cm"}, 0), ({"unit": ""}, 1), ({"type": "binary"}, 0)):
        net = panecho.PanEcho([tasks[0] | other, {**tasks[0], "name": "ESV"}], False, 4)
        theirs_start = start.load_start(net, "panecho", settings)
        assert theirs_start.name == "chkpt_epoch-10.pt" and theirs_start.licence == "not known"
        assert torch.equal(net.EF_head[1].weight, theirs.EF_head[1].weight) == bool(kept)
        assert ("EF differs in chkpt_epoch-10.pt" in capsys.readouterr().out) == (not kept)
    with pytest.raises(UserError, match="does not fit"):
        other = panecho.FrameTransformer(4, None, 2)
        start.load_start(panecho.PanEcho(tasks, False, backbone=other), "panecho", settings)
    with pytest.raises(UserError, match="no weights file nowhere"):
        start.load_start(net, "nowhere", settings)
    record = train.EncoderRecord(tasks=[], clip_len=32)
    torch.save({"weights": theirs.state_dict(), "encoder": record.to_save()}, "ours.pt")
    torch.save({"weights": theirs.state_dict()}, "panecho.pt")
    options = {"arch": "convnext_tiny", "normalization": "imagenet", "n_heads": 8}
    options["model_name"] = "frame_transformer"
    for file in ("ours.pt", "panecho.pt"):  # what fits its shapes and means something else
        for name, value, was in (("normalization", "", "imagenet"), ("n_heads", 4, 8)):
            with pytest.raises(UserError, match=f"with {name} = {was}, not"):
                start.load_start(net, file, train.EncoderSettings(**options | {name: value}))
    start.load_start(net, "ours.pt", train.EncoderSettings(**options))
    assert "clip_len was 32 and is now 16" in capsys.readouterr().out


def seen_of(videos, fold):
    """A list of Seen, of a run that had these videos of a cohort in this fold."""
    split = videos.set_index("study").rename(columns={"patient": "pid"}).assign(fold=fold)
    return (train.Seen.of(split, "00"),)


def test_patients_of_the_initial_weights_are_not_tested(capsys):
    """By patient or study; validation patients only leave the test; no record is reported."""
    videos = pd.DataFrame({"study": list("abcdef"), "patient": list("ABCDEE")}, list("uvwxyz"))
    cohort = SimpleNamespace(videos=videos)
    folds = pd.Series(["train", "train", "val", "val", "test", "test"], videos.index)

    def left(seen, folds=folds):
        weights = backbones.Start("s.pt", "0", "", seen, True)
        return start.without_seen_videos(weights, folds, cohort)

    actual, notes = left(seen_of(videos.loc[["w"]], "train") + seen_of(videos.loc[["x"]], "val"))
    assert actual.tolist() == ["train", "train", "known to s.pt", "val", "test", "test"]
    assert notes["val"] == ["left out: 1 of 2 videos, whose patients or studies s.pt has seen"]
    assert notes["test"] == []
    assert "left out 1 video of val and test: s.pt has seen" in capsys.readouterr().out
    with pytest.raises(UserError, match="all 2 test videos"):
        left(seen_of(videos.loc[["y"]], "val"))  # the other one is of the same patient
    assert left(seen_of(videos, "train"), folds.map(lambda _: "train"))[0].eq("train").all()
    actual, notes = left(())
    assert actual.equals(folds) and "has no record of its training patients" in notes["val"][0]
    imagenet = backbones.Start("imagenet", "0")
    assert start.without_seen_videos(imagenet, folds, cohort)[1]["test"] == []


def test_stochastic_depth_is_torchvisions():
    """The expectation does not change; a clip's draws do not depend on its batch."""
    net = panecho.PanEcho("EF", False, 4)
    assert np.allclose(net.encoder.drop_rates, np.linspace(0, 0.1, 4))
    alone, _ = draw_factors(net.encoder, ["a"], 0, 4)
    company, heads = draw_factors(net.encoder, ["b", "a"], 0, 4, 0.25, 1)
    assert torch.equal(alone, company[:, 4:]) and heads.shape == (1, 2, 32)
    many, heads = draw_factors(net.encoder, map(str, range(500)), 0, 4, 0.25, 1)
    assert np.allclose(many.mean(1), 1, atol=0.03) and float(heads.mean()) == pytest.approx(1, 0.01)
    x = torch.randn(2, 3, 4, 32, 32)
    ones = torch.ones(4, 8)
    assert torch.allclose(net.encoder(x), net.encoder(x, ones), atol=1e-6)
