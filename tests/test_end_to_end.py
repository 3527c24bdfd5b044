"""End-to-end training: exact gradients, bounded memory, files, the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT
from sklearn.metrics import roc_auc_score

from echofocus_core.base.checkpoints import save
from echofocus_core.base.console import UserError
from echofocus_core.base.files import sha256_file
from echofocus_core.study import end_to_end, loop
from echofocus_core.study.end_to_end import EndToEnd
from echofocus_core.study.loading import read_checkpoint
from echofocus_core.study.loop import trainable_parameters
from echofocus_core.study.network import StudyModel
from echofocus_core.video import panecho
from echofocus_core.video.phantom import write_video
from echofocus_core.video.store import read_encoder_seen

NARROW = ((4, 1), (8, 1), (8, 1), (768, 1))


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    """PanEcho with a ConvNeXt of four blocks, one layer over frames, and new random weights."""
    monkeypatch.setattr(panecho, "CONVNEXT_TINY", NARROW)
    monkeypatch.setattr(end_to_end, "CONVNEXT_TINY", NARROW)
    monkeypatch.setattr(panecho.FrameTransformer.__init__, "__defaults__", (16, None, 1, 8, 0.0))
    select = panecho.select_tasks
    monkeypatch.setattr(panecho, "select_tasks", lambda t: select("EF" if t == "all" else t))
    yield


def network(**options):
    torch.manual_seed(0)
    full = panecho.load_panecho("random", 4).model
    return EndToEnd(full.encoder, StudyModel(2, depth=1), **options)


def images(n, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (n, 4, 32, 32, 3), dtype=np.uint8))


def gradients(net, clips, lengths, plain=False):
    """Gradients of the logits' sum of squares, with the same draws; plain: all clips at once."""
    net.train()
    rng = np.random.default_rng(5)
    if plain:
        seed = int(rng.integers(2**62))
        logits, _ = net.study(net.encode_group(clips, 0, seed), lengths, rng)
    else:
        logits, _ = net(clips, lengths, rng)
    return torch.autograd.grad(logits.pow(2).sum(), trainable_parameters(net))


@pytest.mark.parametrize("freeze", ["", "stages:2", "aggregator"])
def test_gradients_are_exact(freeze):
    """Equal to those of one plain pass over all clips, stochastic depth and dropout included."""
    clips, lengths = images(7), [3, 4]
    plain = gradients(network(freeze=freeze), clips, lengths, plain=True)
    for at_once in (1, 3):
        actual = gradients(network(clips_at_once=at_once, freeze=freeze), clips, lengths)
        for a, b in zip(plain, actual, strict=True):
            assert float((a - b).abs().max()) <= 1e-5 * max(1e-3, float(a.abs().max()))
    assert max(float(g.abs().max()) for g in actual) > 0


def test_what_is_frozen():
    """Frozen parts have no gradient and stay in evaluation mode; positions are never trained."""
    whole = network()
    names = {k for k, p in whole.named_parameters() if p.requires_grad}
    assert not any("positions" in k for k in names)
    stages = network(freeze="stages:2")
    fixed = {k for k, p in stages.named_parameters() if not p.requires_grad}
    assert fixed == {k for k in names if k.startswith(tuple(
        f"encoder.encoder.model.features.{i}." for i in range(4)))}  # fmt: skip
    frozen = network(freeze="encoder").train()
    assert not frozen.encoder.training and frozen.study.training
    assert all(k.startswith("study.") for k, p in frozen.named_parameters() if p.requires_grad)
    clips = images(2)
    with torch.no_grad():
        a, b = (frozen.encode(clips, np.random.default_rng(i)) for i in range(2))
    assert torch.equal(a, b)
    turns = network(ping_pong=True)
    for number, part in ((1, "study."), (2, "encoder."), (3, "study.")):
        turns.begin_epoch(number)
        assert all(k.startswith(part) for k, p in turns.named_parameters() if p.requires_grad)


SMALL = """
import resource, sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
import test_end_to_end as t
from echofocus_core.study import end_to_end
from echofocus_core.video import panecho
panecho.CONVNEXT_TINY = end_to_end.CONVNEXT_TINY = t.NARROW
panecho.FrameTransformer.__init__.__defaults__ = (16, None, 1, 8, 0.0)
"""
PEAK = """
net, n = t.network(clips_at_once=2), int(sys.argv[1])
t.gradients(net, t.images(n).repeat(1, 1, 2, 2, 1), [n])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def with_small_network(path, code):
    """The source of a program that runs `code` with the changes of `small_network`."""
    path.write_text(SMALL.format(tests=str(ROOT / "tests"), root=str(ROOT)) + code)
    return str(path)


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    """From 5 to 50 clips per study, peak memory grows little more than the size of the images."""
    program = with_small_network(tmp_path / "peak.py", PEAK)

    def peak(n):
        line = [sys.executable, program, str(n)]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout) * 1024

    assert peak(50) - peak(5) < 20e6


@pytest.fixture
def site(tmp_path, monkeypatch):
    """12 studies of 2 short videos: `bright` is how bright a moving square is."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(12):
        for k in range(2):
            frames = rng.integers(0, 30, (8, 40, 40, 3), dtype=np.uint8)
            for t in range(8):
                frames[t, 10 + t : 22 + t, 8 + k : 20 + k] += np.uint8(40 + 120 * (i % 2))
            write_video(tmp_path / "vids" / f"e{i}_trim" / f"v{k}.avi", frames)
    (tmp_path / "vids" / "e0_trim" / "v1.avi").write_bytes(b"damaged")
    write_labels("bright", ["train"] * 8 + ["val"] * 2 + ["test"] * 2)
    return tmp_path


def write_labels(label, folds):
    """A label table and config of as many studies e0, e1, ...: the odd ones have the label."""
    table = pd.DataFrame({"fold": folds})
    table["pid"], table["eid"] = [[f"{x}{i}" for i in table.index] for x in "Pe"]
    table.assign(**{label: table.index % 2}).to_csv("labels.csv", index=False)
    task = {"task_labels": [label], "label_path": "labels.csv", "split_column": "fold"}
    data = {"embedding_path": "emb", "video_base_path": "vids"}
    Path("config.json").write_text(json.dumps({"task": {"t": task}, "dataset": {"d": data}}))


LINE = "train --end_to_end --weights random --size 32 --clip_len 4 --num_clips 1 --clips_at_once 3 "
LINE += "--encoder_learning_rate 1e-4 --head_learning_rate 1e-3 --batch_number 4 --clip_dropout 0 "
LINE += "--device cpu --workers 1"


def test_a_model_and_its_encoder(site, cli):
    """Killed and restarted to the bit; a model folder with encoder.pt, which predict takes."""
    line = [*LINE.split(), "--checkpoint_minutes", "0"]
    status, out, err = cli(*line, "--epoch_lim", "2")
    assert status == 0, err
    assert "extracted: loss" in out
    assert "1 video cannot be used:\ne0/v1.avi: " in out
    folder = Path("trained_models/t")
    whole = read_checkpoint(folder / "last_checkpoint.pt")
    assert whole["echofocus"]["settings"]["end_to_end"] is True
    assert "weights" not in whole["echofocus"]["settings"]
    best = read_checkpoint(folder / "best_checkpoint.pt")
    assert best["echofocus"]["encoder_sha256"] == sha256_file(folder / "encoder.pt")
    before = panecho.load_panecho("random", 4).model.state_dict()
    after = panecho.read_encoder(folder / "encoder.pt").state
    assert all(k.startswith("encoder.") for k in after)  # no heads over what they did not learn
    assert any(not torch.equal(before[k], after[k]) for k in after)
    (seen,) = panecho.read_encoder(folder / "encoder.pt").seen
    assert len(seen.train) == 16 and len(seen.val) == 4  # patients and studies
    assert panecho.seen_by(folder)[0].key == seen.key  # as a training that begins with it asks
    assert read_encoder_seen(folder / "clip_embeddings")[best["echofocus"]["encoder_sha256"]]

    files = {eid: folder / "clip_embeddings" / f"{eid}.hdf5" for eid in ("e8", "e9")}
    for path in files.values():  # as an earlier best epoch left them
        with h5py.File(path, "a") as f:
            f.attrs["weights_sha256"] = "0"
    chosen = best["echofocus"]["thresholds"]
    best["echofocus"]["thresholds"] = {}
    save(best, folder / "best_checkpoint.pt")
    status, out, err = cli(*line, "--epoch_lim", "2")
    assert status == 0 and "extracted: loss" in out, err
    best = read_checkpoint(folder / "best_checkpoint.pt")
    assert chosen and best["echofocus"]["thresholds"] == chosen
    with h5py.File(files["e8"]) as f:
        assert f.attrs["weights_sha256"].decode() == best["echofocus"]["encoder_sha256"]

    update, calls = loop.update, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return update(*args)

    loop.update = dies
    try:
        assert cli(*line, "--epoch_lim", "2", "--run_id", "again")[0] == 130
    finally:
        loop.update = update
    status, out, err = cli(*line, "--epoch_lim", "2", "--run_id", "again")
    assert status == 0 and "resuming" in out, err
    again = read_checkpoint(Path("trained_models/t_again/last_checkpoint.pt"))
    for part in ("model_state_dict", "encoder_state_dict"):
        torch.testing.assert_close(again[part], whole[part], rtol=0, atol=0)

    status, out, err = cli("predict", "--model_name", "t", "--videos", "vids", "--out", "p.csv")
    assert status == 0 and out.count("WARNING") == 1 and "WARNING: 1 file skipped" in out, err
    assert len(pd.read_csv("p.csv")) == 12


@pytest.mark.slow
def test_two_processes_learn_as_one(site):
    """The losses of each epoch, though each process computes the gradients of half the studies."""
    program = with_small_network(
        site / "train.py", "import echofocus\nechofocus.main(sys.argv[1:])"
    )
    torchrun = ["-m", "torch.distributed.run", "--log-dir", "torchrun", "--rdzv-backend=c10d"]
    torchrun += ["--rdzv-endpoint=127.0.0.1:0"]
    losses = []
    for n in (1, 2):
        line = [*torchrun, f"--nproc_per_node={n}", program, *LINE.split(), "--epoch_lim", "2"]
        done = subprocess.run(
            [sys.executable, *line, "--run_id", str(n)], capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        folder = Path(f"trained_models/t_{n}")
        losses.append(pd.read_csv(folder / "train_losses.csv")[["train_loss", "val_loss"]])
        assert "extracted: loss" in done.stdout and (folder / "encoder.pt").is_file()
    pd.testing.assert_frame_equal(*losses, rtol=1e-4)


def test_published_form(site, cli):
    """Exported with the published names, and read back as a model and as an encoder."""
    assert cli(*LINE.split(), "--epoch_lim", "1")[0] == 0
    Path("trained_models/pub").mkdir()
    file = "trained_models/pub/best_checkpoint.pt"
    for _ in range(2):
        end_to_end.main(["export", "trained_models/t", file])
    with pytest.raises(UserError, match="is not a published end-to-end checkpoint"):
        end_to_end.main(["export", "trained_models/t", "trained_models/t/best_checkpoint.pt"])
    saved = torch.load(file, weights_only=True)
    names = set(saved["model_state_dict"])
    assert {"transformer.ff.weight", "panecho.model.encoder.model.features.0.0.weight"} <= names
    del saved["echofocus"]  # a stranger's
    saved["model_state_dict"]["panecho.model.time_encoder.pe"] = torch.zeros(1, 16, 768)
    torch.save(saved, file)
    line = "predict --task t --videos vids --size 32 --clip_len 4 --model_name"
    tables = []
    for name in ("t", "pub"):
        status, out, err = cli(*line.split(), name, "--out", f"{name}.csv")
        assert status == 0, out + err
        tables.append(pd.read_csv(f"{name}.csv")["bright"])
    assert np.allclose(*tables, atol=1e-4)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("train --freeze encoder", "--end_to_end"),
        ("train --end_to_end --freeze all", "stages:1"),
        ("train --end_to_end --weights nowhere.pt", "no weights file nowhere.pt"),
        ("train --end_to_end --weights random --videos nowhere", "nowhere"),
    ],
)
def test_one_clear_line(site, cli, line, wrong):
    status, _, err = cli(*line.split())
    assert status in (1, 2) and wrong in err and "Traceback" not in err


def test_a_limit_decodes_no_other_study(site, cli, monkeypatch):
    stores = []
    fill = end_to_end.VideoStore.fill
    monkeypatch.setattr(
        end_to_end.VideoStore, "fill", lambda store, *a: (stores.append(store), fill(store, *a))
    )
    status, out, err = cli(*LINE.split(), "--epoch_lim", "1", "--sample_limit", "9")
    assert status == 0 and "9 labelled studies" in out, out + err
    assert len(stores[0].files) == 9


def write_flutter(folder, n):
    """n studies, half of which flutter: the contrast of a pattern follows 1, -1/2, -1/2 from frame
    to frame, so that three successive frames have the mean that they would have without."""
    rng, x = np.random.default_rng(0), np.arange(36)
    for i in range(n):
        for k in range(2):
            still = 110 + 12 * rng.standard_normal((9, 9)).repeat(4, 0).repeat(4, 1)
            wave = 70 * np.sin(2 * np.pi * x / 9 + rng.uniform(0, 6))
            contrast = i % 2 * np.array([1, -0.5, -0.5])[(np.arange(12) + rng.integers(3)) % 3]
            frames = still + contrast[:, None, None] * wave + rng.normal(0, 3, (12, 36, 36))
            grey = frames.clip(0, 255).astype(np.uint8)[..., None].repeat(3, -1)
            write_video(folder / "vids" / f"e{i}_trim" / f"v{k}.avi", grey)
    folds = np.repeat(["train", "val", "test"], [round(x * n) for x in (0.6, 0.2, 0.2)])
    write_labels("flutter", folds)


def blind_to_order(path):
    """Weights of a random encoder that sees of three successive frames little but their mean."""
    state = panecho.load_panecho("random", 4).model.state_dict()
    name = "encoder.encoder.model.features.0.0.weight"
    scale = torch.tensor(panecho.STD).view(1, 3, 1, 1)  # by which the input is divided
    state[name] = 0.1 * state[name] + 0.9 * (state[name] / scale).mean(1, keepdim=True) * scale
    save({"weights": {k: v for k, v in state.items() if "time_encoder" not in k}}, path)


@pytest.mark.slow
def test_learns_to_see_what_the_frozen_encoder_cannot(tmp_path, monkeypatch, cli):
    """AUROC of studies that neither saw: chance with a frozen encoder, 0.85 through it."""
    monkeypatch.chdir(tmp_path)
    write_flutter(tmp_path, 120)
    blind_to_order(tmp_path / "blind.pt")
    line = "train --end_to_end --weights blind.pt --size 32 --clip_len 6 --num_clips 1 "
    line += "--encoder_learning_rate 1e-3 --head_learning_rate 1e-3 --batch_number 8 --workers 1 "
    line += "--clip_dropout 0 --epoch_lim 14 --epoch_early_stop 14 --device cpu"
    labels = pd.read_csv("labels.csv").set_index("eid")
    test, actual = labels.index[labels["fold"] == "test"], {}
    for eid in test:
        Path("new").mkdir(exist_ok=True)
        Path("new", f"{eid}_trim").symlink_to(tmp_path / "vids" / f"{eid}_trim")
    for name, more in (("frozen", ("--freeze", "encoder")), ("through", ())):
        status, _, err = cli(*line.split(), *more, "--run_id", name)
        assert status == 0, err
        answer = "predict", "--model_name", f"t_{name}", "--videos", "new", "--n_clips", "8"
        status, out, err = cli(*answer, "--out", f"{name}.csv")
        assert status == 0, out + err
        table = pd.read_csv(f"{name}.csv")
        answers = table.set_index(table["eid"].str.removesuffix("_trim"))["flutter"]
        actual[name] = roc_auc_score(labels.loc[test, "flutter"], answers[test])
    assert actual["frozen"] < 0.65 and actual["through"] > 0.78, actual
