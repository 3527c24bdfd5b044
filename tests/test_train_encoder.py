"""embed/train.py on phantoms in the three published layouts, by its command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight

from echofocus_core.base.console import RUN, Collected, UserError
from echofocus_core.base.resume import differences
from echofocus_core.encoder import backbones, cohorts, start, train
from echofocus_core.encoder import report as encoder
from echofocus_core.encoder.losses import MultiTaskLoss, class_weights, fill_means
from echofocus_core.video import cache, extract, panecho, store
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
DOCUMENTED = [f"--cohort hospital --output_dir panecho {FRAME} {TINY_CONVNEXT}"] + [
    f"--cohort {cohort} --output_dir {cohort} {line}"
    for cohort in ("echonetdynamic", "echonetpediatric")
    for line in FINE_TUNING.values()
]
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


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    """EchoNet-Dynamic as it is distributed: 44 videos; one is damaged, one is not there."""
    folder, rng, rows = tmp_path_factory.mktemp("dynamic"), np.random.default_rng(0), []
    for i in range(44):
        ef = round(rng.uniform(15, 75), 1)
        draw(folder / "Videos" / f"0X{i:02}.avi", ef, i)
        split = "TRAIN" if i < 28 else "VAL" if i < 36 else "TEST"
        rows.append([f"0X{i:02}", ef, 100 - ef, 100, 40, 48, 30, 12, split])
    (folder / "Videos" / "0X00.avi").write_bytes(b"no video")
    rows.append(["0XGONE", 50, 50, 100, 40, 48, 30, 12, "TRAIN"])
    columns = ["FileName", "EF", "ESV", "EDV", "FrameHeight", "FrameWidth", "FPS"]
    columns += ["NumberOfFrames", "Split"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "FileList.csv", index=False)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(cli, *line):
    words = [w for part in line for w in str(part).split()]
    return cli(*words, main=train.main)


def numbers(text):
    return torch.load(text, weights_only=True)


# ------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize("line", DOCUMENTED)
def test_documented_lines(line):
    """Every line of the table in embed/README.md."""
    parser = train.Parser()
    train.add_options(parser, train.COMMAND, train.EncoderSettings)
    settings = train.resolve_settings(vars(parser.parse_args(line.split())))
    assert settings.reduce_lr == 3 and settings.augment and settings.precision == "bf16"
    assert (settings.max_epochs, settings.patience, settings.batch_size) == (30, 10, 16)
    assert (settings.lr, settings.wd, settings.num_clips, settings.clip_len) == (1e-4, 0, 4, 16)
    assert settings.rand_init == ("--rand_init" in line)
    parsed = vars(parser.parse_args(["--reduce_lr"]))
    assert len(DOCUMENTED) == 11 and parsed["reduce_lr"] == 2


def test_the_readme_has_the_documented_lines():
    text = " ".join((ROOT / "embed" / "README.md").read_text().replace("\\\n", " ").split())
    for line in DOCUMENTED:
        assert line in text, line


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("", "--cohort"),
        ("--cohort echonetdynamic --data_dir nowhere", "no folder nowhere"),
        ("--cohort hospital --rand_init --model_dir_path x", "--model_dir_path"),
        ("--cohort hospital --normalization imagnet", "--normalization"),
    ],
)
def test_options_that_exclude_each_other(cli, here, line, wrong):
    status, _, err = run(cli, line)
    assert status in (1, 2) and wrong in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("line", "package"),
    [
        ("--model_name 3dresnet18", "torchvision"),
        ("--model_name frame_transformer --arch convnextv2_tiny.fcmae", "timm"),
        ("--model_name frame_transformer --arch echo-clip", "open_clip_torch"),
    ],
)
def test_other_backbones_name_their_package(cli, here, dynamic, monkeypatch, line, package):
    for name in ("torchvision", "torchvision.models", "timm", "open_clip"):
        monkeypatch.setitem(sys.modules, name, None)
    limit = "--sample_limit 2 --num_workers 1"
    status, _, err = run(cli, "--cohort echonetdynamic --data_dir", dynamic, line, limit)
    assert status == 1 and f"pip install {package}" in err


def test_a_backbone_with_batch_normalisation(cli, here, dynamic, monkeypatch):
    """Trained, gone on with, reported on and begun from, whatever it counts beside its weights."""

    def build(pretrained):
        parts = torch.nn.Conv3d(3, 8, 3, 4), torch.nn.BatchNorm3d(8), torch.nn.AdaptiveAvgPool3d(1)
        return torch.nn.Sequential(*parts, torch.nn.Flatten())

    monkeypatch.setattr(backbones, "R3D", backbones.Backbone(build, 8))
    line = f"--cohort echonetdynamic --data_dir {dynamic} --model_name 3dresnet18 --size 32 "
    line += "--clip_len 4 --num_clips 1 --batch_size 8 --device cpu --num_workers 1 "
    line += "--n_bootstrap 20 --max_epochs"
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
        assert status == 0 and "1 heads kept" in out, out + err


def test_every_task_of_panecho_can_be_recorded():
    """Those with a bar or brackets in their name too: E|EAvg, RADimensionM-L(cm)."""
    for task in panecho.TASKS:
        assert EncoderTask(**task).entry()["name"] == task["name"]
    for name in ("a/b", "..", ""):
        with pytest.raises(ValueError):
            EncoderTask(name=name, type="regression")


# ------------------------------------------------------------------------------------------- tables


def write_list(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / "FileList.csv", index=False)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"Split": "train2"}, "Split train2"),
        ({"FileName": "0X02"}, "0X02.avi"),
    ],
)
def test_odd_lists(here, dynamic, change, wrong):
    table = pd.read_csv(dynamic / "FileList.csv").head(3)
    for column, value in change.items():
        table.loc[1, column] = value
    write_list(here / "dyn", table)
    with pytest.raises(UserError, match=wrong):
        cohorts.read_cohort("echonetdynamic", "dyn")
    with pytest.raises(UserError, match=r"FileList\.csv has no column 'Splt'; did|has no column"):
        write_list(here / "dyn", table.rename(columns={"Split": "Splt"}))
        cohorts.read_cohort("echonetdynamic", "dyn")


def test_own_tasks(here, dynamic):
    """A task list of one's own; classes by name; values that are not a class."""
    table = pd.read_csv(dynamic / "FileList.csv").head(6)
    table["grade"] = ["mild", "severe", "none", "severe", "awful", ""]
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


@pytest.mark.parametrize(
    ("classes", "cells", "expected"),
    [
        ("123", "1233", [0, 1, 2, 2]),
        ("123", "0122", [np.nan, 0, 1, 1]),
        ("210", "2100", [0, 1, 2, 2]),
        ("012", "0129", [0, 1, 2, np.nan]),
        (["0.0", "1.0"], "011-", [0, 1, 1, np.nan]),
        (["0.0", "1.0"], ["No", "Yes", None, "-1"], [0, 1, np.nan, np.nan]),
        (["Dilated", "Normal"], ["Yes", "No", "normal", "-1"], [np.nan, np.nan, 1, np.nan]),
        (["Dilated", "Normal"], ["0", "normal"], "mixed with names"),
        (["Dilated", "Normal"], ["1", "1"], "count from 1"),
    ],
)
def test_classes_by_name_or_number(classes, cells, expected):
    task = {"name": "grade", "class_names": list(classes)}
    column = pd.Series(list(cells), dtype=object)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            cohorts.values_of(column, task, "hospital", "train.csv", RUN)
        return
    heard = Collected()
    actual = cohorts.values_of(column, task, "hospital", "train.csv", heard)
    np.testing.assert_array_equal(actual, expected)
    odd = [c for c, v in zip(cells, actual, strict=True) if np.isnan(v) and c not in (None, "-1")]
    assert (f"{len(odd)} values are not" in str(heard.findings)) == bool(odd)


def test_a_class_called_none(here, dynamic):
    """`None` is missing in a table, but not in a column that has a class of that name."""
    table = pd.read_csv(dynamic / "FileList.csv").head(4)
    table["AVStenosis"] = ["None", "Severe", "", "NA"]
    table["LVSize"] = ["None", "Normal", "", "NA"]
    write_list(here / "dyn", table)
    (here / "dyn" / "Videos").symlink_to(dynamic / "Videos")
    actual = cohorts.read_cohort("echonetdynamic", "dyn", ["AVStenosis", "LVSize", "EF"]).labels
    np.testing.assert_array_equal(actual["AVStenosis"], [1, 2, np.nan, np.nan])
    np.testing.assert_array_equal(actual["LVSize"], [np.nan, 2, np.nan, np.nan])


def test_check(cli, here, dynamic):
    status, out, err = cli("check", "--cohort", "echonetdynamic", "--data_dir", dynamic)
    assert status == 0, err
    assert "43 videos" in out or "44 videos" in out
    assert "0XGONE.avi" in out and "0X00.avi: " in out
    assert "decoding 4" in out
    status, out, _ = cli("check", "--cohort", "hospital", "--data_dir", dynamic)
    assert status == 1 and "no label table" not in out and "train.csv" in out


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
    """A clip from the cache is what decoding, resizing and cropping the file gives; kept small."""
    path = str(dynamic / "Videos" / "0X05.avi")
    store = cache.FrameCache("frames", 32)
    assert store.fill([path], 1) == {}
    frames, sampling = video.read_frames(path), cache.ClipSampling(4, 32)
    clips = store.clips(path, 3, sampling, 7, "x")
    starts = video.clip_starts(len(frames), 3, 4, 7, "x", "independent")
    for clip, numbers in zip(clips, video.clip_frames(starts, len(frames), 4), strict=True):
        expected = [video.crop_centre(video.resize(frames[i], 32), 32) for i in numbers]
        np.testing.assert_array_equal(clip, expected)
    assert cache.FrameCache("frames", 224).fill([path], 1) == {}
    assert cache.FrameCache("frames", 224).frames(path).shape == frames.shape  # not made larger
    long = store.clips(path, 1, cache.ClipSampling(20, 32), 0, "x")[0]
    np.testing.assert_array_equal(long[-1], long[-2])
    stamp = os.stat(path).st_mtime_ns
    os.utime(path, ns=(stamp, stamp + 10**9))
    assert not store.place(path).is_file()  # a changed file is decoded anew
    os.utime(path, ns=(stamp, stamp))


def test_copies_are_known_by_their_frames(tmp_path, dynamic, capsys):
    """Under another name or folder; a blank video is no copy; what is moved stays the same."""
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
        ("hospital", "P", "train", ""),
        ("hospital", "T", "train", "3 videos of different patients or folds"),
        ("hospital", "P", "test", "a and c and d; keep one of each"),
        ("echonetdynamic", "T", "test", ""),
    ):
        table.loc["c", ["patient", "split"]] = patient, split
        cohort = cohorts.VideoCohort(name, [], table, labels)
        if wrong:
            with pytest.raises(UserError, match=wrong):
                cohorts.report_copies(cohort, store.copies(table))
        else:
            cohorts.report_copies(cohort, store.copies(table))
            assert "WARNING: " + name in capsys.readouterr().out
    before, digest = cohort.content_digest(), cohort.digest()
    cohort.videos = table.assign(path="elsewhere").iloc[::-1]
    assert cohort.content_digest() == before
    cohort.videos = table.assign(content=[*content[:5], "other"])
    assert cohort.content_digest() != before and cohort.digest() == digest


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_what_is_missing_in_the_cache_is_decoded_again(tmp_path, dynamic, suffix):
    """As after a run that was killed; a reason why there are no frames is kept."""
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


def test_learns_from_echonet_dynamic(cli, here, dynamic, monkeypatch):
    """Better than the mean on videos never seen; its weights go straight into extraction."""
    line = f"--cohort echonetdynamic --data_dir {dynamic} --output_dir ef {SMALL} --lr 2e-3"
    status, out, err = run(cli, line, "--max_epochs 14 --clip_len 8 --wd 0.01 --adamw")
    assert status == 0, err
    assert "1 videos cannot be used and are left out:\n0X00.avi" in out
    test = pd.read_csv("ef/preds/EF/test_EF_preds.csv")
    train_mean = pd.read_csv(dynamic / "FileList.csv")["EF"][:28].mean()
    assert len(test) == 8
    mse = ((test["prediction"] - test["label"]) ** 2).mean()
    assert mse < 0.7 * ((train_mean - test["label"]) ** 2).mean()
    history = pd.read_csv("ef/history.csv")
    assert list(history["phase"][:2]) == ["train", "val"] and "EF_r2" in history
    metrics = pd.read_csv("ef/metrics_test.csv").set_index("metric")
    assert metrics.at["rmse", "value"] == pytest.approx(mse**0.5, rel=1e-4)
    assert "EF: r2" in Path("ef/test_summary.txt").read_text()
    assert str(here) not in "".join(p.read_text() for p in Path("ef").rglob("*.csv"))

    (weights,) = Path("ef").glob("chkpt_epoch-*.pt")
    record = numbers(weights)["encoder"]
    assert record["tasks"][0]["name"] == "EF" and record["started_from"] == "random"
    (seen,) = panecho.read_encoder(weights).seen
    studies = pd.DataFrame({"pid": "P"}, index=["0X05", "0X30", "0X40"])
    assert seen.levels(studies)[1].tolist() == [2, 1, 0]  # trained, validated, tested
    status, out, err = run(cli, line, "--max_epochs 14 --clip_len 8 --wd 0.01 --adamw")
    assert status == 0 and "is finished" in out
    status, _, err = run(cli, line, "--max_epochs 9")
    assert status == 1 and "clip_len was 8 and is now 4" in err and "--output_dir" in err


def test_trained_weights_go_into_extraction(cli, here, dynamic, monkeypatch):
    """A run's folder as --weights: its newest epoch, by its own heads; another architecture not."""
    monkeypatch.undo()
    monkeypatch.chdir(here)
    tasks = [dict(t) for t in panecho.TASKS if t["name"] == "EF"]
    state = {k: v for k, v in panecho.random_weights().items() if "_head" not in k or "EF_h" in k}
    Path("run").mkdir()
    split = pd.DataFrame({"pid": ["P"], "fold": ["train"]}, index=["e"])
    for n, arch in ((3, "resnet18"), (12, "convnext_tiny")):
        record = train.EncoderRecord(tasks=[train.EncoderTask(**t) for t in tasks], arch=arch)
        saved = {"weights": state, "encoder": record.to_save()}
        saved["seen"] = [train.Seen.of(split, "00").saved()]
        torch.save(saved, f"run/chkpt_epoch-{n}.pt")
    options = "--out emb --size 32 --n_clips 1 --clip_len 2 --workers 1 --manifest few.csv"
    words = [dynamic / "Videos", *options.split(), "--weights"]
    pd.DataFrame({"study": ["s"], "path": ["0X01.avi"]}).to_csv("few.csv", index=False)
    status, _, err = cli(*words, "run", main=extract.main)
    assert status == 0, err
    with h5py.File("emb/s.hdf5") as f:
        assert f["embeddings"].shape == (1, 1, 768)
        digest = f.attrs["weights_sha256"].decode()
    assert digest == backbones.sha256_file("run/chkpt_epoch-12.pt")
    store.write_pack(store.open_store(Path("emb")), store.packed_path(Path("emb")), np.dtype("f4"))
    assert set(store.encoders_seen("emb")) == {digest}
    for folder_exists in (True, False):  # the pack alone has the list too
        (seen,) = store.encoders_seen("emb")[digest]
        assert store.open_store(Path("emb")).header("s").made_with["weights_seen"] == "listed"
        assert seen.levels(split)[0].tolist() == [2]
        Path("emb").rename("emb.gone") if folder_exists else Path("emb.gone").rename("emb")
    status, _, err = cli(*words, "run/chkpt_epoch-3.pt", main=extract.main)
    assert status == 1 and "PanEcho's architecture" in err
    assert panecho.load_panecho("run").model.columns() == ["EF [%]"]
    status, out, err = cli("inspect", "run/chkpt_epoch-12.pt")
    assert status == 0 and "labels: 1\n" in out and "GLS" not in out, out + err
    saved["encoder"]["tasks"][0]["name"] = "../EF"
    torch.save(saved, "run/chkpt_epoch-20.pt")
    status, _, err = cli(*words, "run", main=extract.main)
    assert status == 1 and "cannot be a task's name" in err


class Killed(Exception):
    pass


def test_killed_and_restarted(cli, here, dynamic, monkeypatch):
    """Bit for bit the weights, optimiser and history of the run that was never stopped."""
    line = f"--cohort echonetdynamic --data_dir {dynamic} {SMALL} --max_epochs 2 --sample_limit 8"
    line += " --checkpoint_minutes 0"
    line += " --fc_dropout 0.25 --augment --reduce_lr --batch_size 3"
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
    for name, tensor in whole["weights"].items():
        assert torch.equal(tensor, killed["weights"][name]), name
    for i, state in whole["optimizer"]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, killed["optimizer"]["state"][i][name]), (i, name)
    same = [pd.DataFrame(run["history"]).drop(columns="seconds") for run in (whole, killed)]
    assert same[0].equals(same[1])
    assert Path("whole/test_summary.txt").read_text() == Path("killed/test_summary.txt").read_text()
    assert run(cli, line, "--output_dir none --resume")[0] == 1


def test_an_encoder_that_was_shared_alone_is_not_trained_over(here):
    """A published run's folder, say; a run that was killed early starts again."""
    run = train.Run.__new__(train.Run)
    run.folder, run.settings = here, SimpleNamespace(resume=False)
    (here / "chkpt_epoch-7.pt").write_bytes(b"theirs")
    with pytest.raises(UserError, match="contains a trained model"):
        run.refuse_finished_model()
    (here / "encoder.json").write_text("{}")
    run.refuse_finished_model()


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
    words = [sys.executable, "launch.py", *line.split(), "--output_dir", "two", "--batch_size", "2"]
    environment = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29731",
    }
    to = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen(words, env=environment | {"RANK": str(r)}, **to) for r in range(2)]
    outs = [p.communicate(timeout=200)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], outs
    one, two = (pd.read_csv(f"{run}/history.csv") for run in ("one", "two"))
    assert np.allclose(one["loss"], two["loss"], rtol=1e-4)
    one, two = (pd.read_csv(f"{run}/preds/EF/val_EF_preds.csv") for run in ("one", "two"))
    assert len(two) == 7 and np.allclose(one["prediction"], two["prediction"], rtol=1e-3)


def test_pediatric_views_and_folds(cli, here, monkeypatch):
    """Both views of an accession are one answer; finished folds are skipped; folds are pooled."""
    for module in (cohorts, train):
        monkeypatch.setattr(module, "PEDIATRIC_FOLDS", 3)
    for view in ("A4C", "PSAX"):
        rows = []
        for i in range(9):
            name, ef = f"CR{i:02}-CA{i:02}-00000{1 + (view == 'PSAX')}.avi", 40.0 + 3 * i
            draw(here / "ped" / view / "Videos" / name, ef, i)
            rows.append({"FileName": name, "EF": ef, "Sex": "F", "Age": 5, "Split": i % 3})
        write_list(here / "ped" / view, rows[: 9 if view == "A4C" else 6])
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
    assert "r2" in Path("out/echonet-pediatric_summary.txt").read_text()


@pytest.fixture
def hospital(here):
    """Three CSVs: a finding, a grade and EF, some missing (-1); two videos an accession."""
    rng = np.random.default_rng(1)
    for split, n in (("train", 8), ("val", 6), ("test", 6)):
        rows = []
        for i in range(n):
            ef = float(round(rng.uniform(15, 75)))
            for k in range(2):
                draw(here / "site" / "vids" / f"{split}{i}_{k}.avi", ef, 100 * i + k)
                rows.append(
                    {"fname": f"{split}{i}_{k}.avi", "video_dir": "vids", "acc_num": f"{split}{i}",
                     "video_num": k, "simple_view_pred": "A4C", "doppler": 0,
                     "EF": ef if i else -1, "AVStructure": i % 2, "LVSize": i % 3}
                )  # fmt: skip
        pd.DataFrame(rows).to_csv(here / "site" / f"{split}.csv", index=False)
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

    def reported(level, *words, **changes):
        return any(
            text.startswith(level) and all(w in text for w in words) for text in findings(**changes)
        )

    assert not any(text.startswith("ERROR") for text in findings())
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
    patients["test"].loc[0, "patient"] = None  # known by the other row
    assert reported("WARNING", "test.csv", "1 rows have no patient", **patients)
    assert not any(text.startswith("ERROR") for text in findings(**patients))
    Path("site/links").symlink_to("vids")
    twice = whole["test"].copy()
    twice.loc[0, ["fname", "video_dir"]] = "train0_0.avi", "links"
    with pytest.raises(UserError, match=r"train0_0\.avi"):
        findings(test=twice)


def test_changes_on_resume(cli, here, dynamic):
    """Refused: what changes the meaning of a run's weights, or how they were learnt."""

    def facts(unit="", **changes):
        task = {"name": "EF", "type": "regression", "unit": unit}
        record = train.EncoderRecord(tasks=[task], **changes)
        return train.Run.facts(None, record, {"scheduler": {}})

    names = [x.name for x in differences(facts("mm", videos_sha256="a"), facts("cm"))]
    assert names == ["pixels of some video", "unit of EF"]
    assert not differences(facts("mm"), facts()) and not differences(facts(), facts("mm"))
    table = pd.read_csv(dynamic / "FileList.csv")
    write_list(here / "dyn", table.assign(EF=np.arange(len(table)) % 3))
    (here / "dyn" / "Videos").symlink_to(dynamic / "Videos")
    line = f"--cohort echonetdynamic --data_dir dyn --tasks t.json --output_dir run {SMALL}"
    line += " --sample_limit 3 --cos_anneal --max_epochs"
    task = {"name": "EF", "type": "multi-class", "classes": ["low", "mid", "high"]}
    for classes, epochs, wrong in (
        (["low", "mid", "high"], 1, ""),
        (["low", "mid", "high"], 2, "max_epochs was 1 and is now 2"),
        (["low", "high", "mid"], 1, "classes of the tasks was [['low', 'mid', 'high']]"),
    ):
        Path("t.json").write_text(json.dumps([task | {"classes": classes}]))
        status, _, err = run(cli, line, epochs)
        assert (status == 1 and wrong in err) if wrong else status == 0, err
    Path("t.json").write_text(json.dumps([task]))
    Path("run/encoder.json").write_text("as it was")  # a finished run is not described again
    status, _, err = run(cli, line, 1)
    assert status == 0 and Path("run/encoder.json").read_text() == "as it was", err
    Path("run/chkpt_epoch-1.pt").unlink()
    status, _, err = run(cli, line, 1)
    assert status == 1 and "best checkpoint of run is missing" in err


def test_an_epoch_without_a_metric_is_not_the_best():
    run = train.Run.__new__(train.Run)
    run.scores = [np.nan, 0.3]
    assert run.best_epoch == 2


def test_weights_of_another_run_are_not_reported_as_this_ones(tmp_path):
    """Missing, exchanged, or a later epoch beside a finished run's best; not so where a run was
    killed before it recorded its last epoch."""
    run, mine = train.Run.__new__(train.Run), [0.5, 0.3, 0.4, 0.4]
    run.folder, run.scores, run.settings = tmp_path, [0.3, 0.2], None
    run.settings = SimpleNamespace(max_epochs=2, patience=9)
    run.history = [{"loss": loss} for loss in mine]

    def check(epochs, losses):
        """Of chkpt_epoch-N.pt with these losses, N the number of epochs."""
        for old in tmp_path.iterdir():
            old.unlink()
        if epochs:
            saved = {"weights": {}, "history": [{"loss": loss} for loss in losses]}
            torch.save(saved, tmp_path / f"chkpt_epoch-{epochs}.pt")
        run.check_best()

    check(1, mine[:2])
    for epochs, losses in ((0, []), (1, [0.5, 0.31]), (2, mine), (3, [*mine, 0.1, 0.1])):
        with pytest.raises(UserError, match="missing or from another run"):
            check(epochs, losses)
    run.settings.max_epochs = 4
    check(3, [*mine, 0.1, 0.1])
    with pytest.raises(UserError, match="missing or from another run"):
        check(3, [*mine[:3], 0.1, 0.1, 0.1])
    run.scores, run.history = [], []
    check(0, [])


def test_steps_for_all_processes():
    """Where batch statistics are shared, no process is without a video in a step."""
    order = list("abcdefghi")
    assert train.steps_of(order, 4) == [list("abcd"), list("efgh"), ["i"]]
    assert train.steps_of(order, 4, 2) == [list("abcd"), list("efghi")]
    assert train.steps_of([], 4) == []
    with pytest.raises(UserError, match="too few for 16 processes"):
        train.steps_of(order, 32, 16)


def test_pooled_folds_of_every_kind(here):
    """Classes are judged as classes; a task that a fold lacks is in no summary."""
    tasks = [
        {"name": "b", "type": "binary_classification", "class_names": ["no", "yes"]},
        {"name": "m", "type": "multi-class_classification", "class_names": ["x", "y", "z"]},
        {"name": "gone", "type": "regression", "class_names": []},
    ]
    rng = np.random.default_rng(0)
    for k in range(2):
        for task in tasks[:2]:
            names = ["yes"] if task["name"] == "b" else task["class_names"]
            table = pd.DataFrame({"acc_num": [f"P{i}-{k}" for i in range(9)]})
            table["label"] = np.arange(9) % (2 if task["name"] == "b" else 3)
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
    """torchvision's names and digest; another file is refused; no network is one line."""
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
    """Its highest epoch; heads of the same task are kept, others fresh; the wrong one refused."""
    tasks = [dict(t, mean=1.0) for t in panecho.TASKS if t["name"] == "EF"]
    theirs = panecho.PanEcho(tasks, False, 4)
    Path("panecho").mkdir()
    pe = {"encoder.time_encoder.pe": torch.zeros(1, 16, 768)}
    for n in (2, 10):
        torch.save({"weights": theirs.state_dict() | pe, "optimizer": {}},
                   f"panecho/chkpt_epoch-{n}.pt")  # fmt: skip
    net = panecho.PanEcho([*tasks, {**tasks[0], "name": "ESV"}], False, 4)
    settings = train.EncoderSettings(arch="convnext_tiny")
    theirs_start = start.load_start(net, "panecho", settings)
    assert theirs_start.name == "chkpt_epoch-10.pt" and theirs_start.licence == "not known"
    assert torch.equal(net.EF_head[1].weight, theirs.EF_head[1].weight)
    for other, kept in (({"unit": "cm"}, 0), ({"unit": ""}, 1), ({"type": "binary"}, 0)):
        net = panecho.PanEcho([tasks[0] | other], False, 4)
        start.load_start(net, "panecho", settings)
        assert torch.equal(net.EF_head[1].weight, theirs.EF_head[1].weight) == bool(kept)
        assert ("EF differs in chkpt_epoch-10.pt" in capsys.readouterr().out) == (not kept)
    with pytest.raises(UserError, match="does not fit"):
        other = panecho.FrameTransformer(4, None, 2)
        start.load_start(panecho.PanEcho(tasks, False, backbone=other), "panecho", settings)
    Path("empty").mkdir()
    with pytest.raises(UserError, match="no weights file empty"):
        start.load_start(net, "empty", settings)
    record = train.EncoderRecord(tasks=[], clip_len=32)
    saved = {"weights": theirs.state_dict(), "encoder": record.to_save()}
    torch.save(saved, "ours.pt")
    torch.save({"weights": theirs.state_dict()}, "panecho.pt")
    for file in ("ours.pt", "panecho.pt"):  # what fits its shapes and means something else
        for name, value, was in (("normalization", "", "imagenet"), ("n_heads", 4, 8)):
            options = {"arch": "convnext_tiny", "normalization": "imagenet", name: value}
            options["model_name"] = "frame_transformer"
            with pytest.raises(UserError, match=f"with {name} = {was}, not"):
                start.load_start(net, file, train.EncoderSettings(**options))
    settings = train.EncoderSettings(**options | {"n_heads": 8})
    capsys.readouterr()
    start.load_start(net, "ours.pt", settings)
    assert "was trained with clip_len = 32 and gets 16 here" in capsys.readouterr().out


def seen_of(videos, fold):
    """A list of Seen, of a run that had these videos of a cohort in this fold."""
    split = videos.set_index("study").rename(columns={"patient": "pid"}).assign(fold=fold)
    return (train.Seen.of(split, "00"),)


def test_whom_the_start_has_seen_is_in_no_test(capsys):
    """By patient or study, validated ones in the test alone; a start that does not say is told."""
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
    assert "left out 1 videos of val and test: s.pt has seen" in capsys.readouterr().out
    with pytest.raises(UserError, match="all 2 test videos"):
        left(seen_of(videos.loc[["y"]], "val"))  # the other one is of the same patient
    assert left(seen_of(videos, "train"), folds.map(lambda _: "train"))[0].eq("train").all()
    actual, notes = left(())
    assert actual.equals(folds) and "was trained elsewhere" in notes["val"][0]
    imagenet = backbones.Start("imagenet", "0")
    assert start.without_seen_videos(imagenet, folds, cohort)[1]["test"] == []


def test_stochastic_depth_is_torchvisions():
    """In expectation nothing changes; a clip's draws do not depend on its company."""
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
