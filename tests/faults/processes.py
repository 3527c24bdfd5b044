"""Areas of commands that are killed, or run twice at the same time.

Each command is then repeated and must give the results of a run without interruption.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch

from echofocus_core.video.phantom import write_video
from tests.faults.changes import choose
from tests.faults.commands import (
    EXTRACT,
    N_STUDIES,
    PREDICT,
    Command,
    complaint_of,
    copy_cohort,
    healthy_source,
)
from tests.faults.files import cine

DEFECT = ("--model_name", "defect")
TRAIN = ("train", "--task", "defect", "--checkpoint_minutes", "0")
LINES = {
    "train": [*TRAIN, "--epoch_lim", "3"],
    "folds": [*TRAIN, "--n_folds", "3", "--fold", "all", "--epoch_lim", "2"],
    "end_to_end": [*TRAIN, "--end_to_end", "--weights", "random", "--size", "32", "--clip_len", "4",
                   "--num_clips", "1", "--epoch_lim", "2", "--workers", "1"],
    "encoder": ["encoder", "--cohort", "echonetdynamic", "--data_dir", "dynamic", "--output_dir",
                "encoder", "--rand_init", "--model_name", "frame_transformer", "--arch",
                "convnext_tiny", "--normalization", "imagenet", "--n_layers", "1", "--n_heads",
                "2", "--size", "32", "--clip_len", "4", "--num_clips", "2", "--batch_size", "4",
                "--num_workers", "1", "--max_epochs", "2", "--n_bootstrap", "20"],
    "predict": PREDICT,
    "embed": ["embed", *DEFECT, "--embed_file", "e.h5"],
    "explain": ["explain", *DEFECT, "--subset", "all"],
    "page": ["explain", *DEFECT, "--subset", "all", "--sample_limit", "8", "--page"],
    "evaluate": ["evaluate", *DEFECT, "--subset", "all"],
    "pack": ["pack"],
    "extract": EXTRACT,
}  # fmt: skip
TRAINS = ("train", "folds", "end_to_end")
TIMED = ("train_losses.csv", "history.csv", "extract_log.csv")  # with seconds and dates


def write_cine(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.random.default_rng(seed).integers(0, 90, (8, 40, 48, 3), dtype=np.uint8)
    frames[:, 8:24, 10:30] += np.uint8(100)
    write_video(path, frames)


def prepare(command, base):
    """Write the input of a command of LINES to the current folder."""
    if command == "encoder":
        rows = []
        for i in range(20):
            write_cine(Path(f"dynamic/Videos/x{i}.avi"), i)
            rows.append((f"x{i}", 20 + 2 * i, 1, 2, ("TRAIN", "TRAIN", "VAL", "TEST")[i // 5]))
        table = pd.DataFrame(rows, columns=["FileName", "EF", "ESV", "EDV", "Split"])
        table.to_csv("dynamic/FileList.csv", index=False)
    elif command == "extract":
        healthy_source(Path("source"))
        for i in range(4):
            Path(f"source/more{i}").mkdir()
            Path(f"source/more{i}/a.dcm").write_bytes(cine("jpeg_ybr_labelled_rgb.dcm", 50 + i))
    else:
        copy_cohort(base, N_STUDIES)
        if command in TRAINS:
            shutil.rmtree("trained_models")
        if command in ("page", "end_to_end"):
            for i in range(N_STUDIES):
                for v in range(1 + i % 3):
                    write_cine(Path(f"videos/s{i}_trim/v{v}.avi"), 10 * i + v)
            config = json.loads(Path("config.json").read_text())
            config["dataset"]["site"]["video_base_path"] = "videos"
            Path("config.json").write_text(json.dumps(config))


def run_whole(command, base):
    prepare(command, base)
    result = Command(*LINES[command]).result()
    assert result.status == 0, result


@functools.cache
def whole(command, base):
    """(folder of a run without interruption, its seconds); made once for all cases."""
    folder = base / "whole" / command
    if not (folder / "seconds").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        began = time.monotonic()
        with contextlib.chdir(folder):
            run_whole(command, base)
        (folder / "seconds").write_text(str(time.monotonic() - began))
    return folder, float((folder / "seconds").read_text())


def results_in(folder):
    """Name -> path of a run's output files, except those that depend on place or time."""
    paths = (p for p in folder.rglob("*") if p.is_file() and "frame_cache" not in p.parts)
    names = {re.sub("source_[0-9a-f]{8}", "source", str(p.relative_to(folder))): p for p in paths}
    return {
        k: p
        for k, p in names.items()
        if k != "seconds" and ".tmp" not in k and not k.endswith(".lock")
    }


def content_of(path):
    """The content that must be equal in the files of two runs."""
    if path.suffix == ".pt":
        saved = torch.load(path, weights_only=True)
        parts = ("model_state_dict", "encoder_state_dict", "weights")
        return {f"{part} {k}": v.numpy().tobytes() for part in parts
                for k, v in saved.get(part, {}).items()}  # fmt: skip
    if path.suffix in (".h5", ".hdf5"):
        arrays = {}

        def add(name, node):
            if isinstance(node, h5py.Dataset) and node.dtype.kind == "f":
                arrays[name] = node[()].tobytes()

        with h5py.File(path) as f:
            f.visititems(add)
        return arrays
    if path.name.endswith(TIMED):
        return len(path.read_text().splitlines())
    return path.read_bytes() if path.suffix in (".csv", ".html", ".npy") else None


def difference(expected):
    """'', or the first file in which the current folder differs from that of a whole run."""
    files, whole_files = results_in(Path.cwd()), results_in(expected)
    if files.keys() != whole_files.keys():
        return f"files differ: {sorted(files.keys() ^ whole_files.keys())[:5]}"
    for name in sorted(files):
        if content_of(files[name]) != content_of(whole_files[name]):
            return f"{name} differs"
    return ""


def repeated(command, base):
    """Run the command again to its end; returns a complaint or ''."""
    result = Command(*LINES[command]).result()
    return complaint_of(result, failed=False) or difference(whole(command, base)[0])


def kill(rng, base):
    """Stop a command by SIGKILL or SIGTERM at random moments, then run the same line again."""
    command, name = choose(rng, LINES), choose(rng, ["SIGKILL", "SIGTERM"])
    _, seconds = whole(command, base)
    prepare(command, base)
    for _ in range(int(rng.integers(1, 4))):
        running = Command(*LINES[command])
        time.sleep(float(rng.uniform(0, 1.05 * seconds)))
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.pid, getattr(signal, name))
        if running.result().status == 0:
            break
    return f"{command}: {name}", repeated(command, base)


def two_at_once(rng, base):
    """The second process stops with an error, or has no effect on the results."""
    command = choose(rng, LINES)
    expected, seconds = whole(command, base)
    prepare(command, base)
    first = Command(*LINES[command])
    time.sleep(float(rng.uniform(0, 0.5 * seconds)))
    second = Command(*LINES[command])
    results = first.result(), second.result()
    complaint = next(filter(None, map(complaint_of, results)), "")
    if not complaint and all(r.status for r in results):
        complaint = f"both stopped: {results[0].err[-200:]} {results[1].err[-200:]}"
    return f"two at once: {command}", complaint or difference(expected)
