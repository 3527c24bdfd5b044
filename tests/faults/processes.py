"""Areas of commands that are killed, or run twice at the same time.

Each command is then repeated and must give the results of a run without interruption.
"""

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import torch

from echofocus_core.video.phantom import write_video
from tests.faults.changes import choose
from tests.faults.commands import N_STUDIES, PREDICT, Command, complaint_of, copy_cohort

DEFECT = ("--model_name", "defect")
TRAIN = ("train", "--task", "defect", "--checkpoint_minutes", "0")
LINES = {
    "train": [*TRAIN, "--epoch_lim", "3"],
    "folds": [*TRAIN, "--n_folds", "3", "--fold", "all", "--epoch_lim", "2"],
    "end_to_end": [*TRAIN, "--end_to_end", "--weights", "random", "--size", "32", "--clip_len", "4",
                   "--num_clips", "1", "--epoch_lim", "2", "--workers", "1"],
    "predict": PREDICT,
    "embed": ["embed", *DEFECT, "--embed_file", "e.h5"],
    "explain": ["explain", *DEFECT, "--subset", "all"],
    "page": ["explain", *DEFECT, "--subset", "all", "--sample_limit", "8", "--page"],
    "evaluate": ["evaluate", *DEFECT, "--subset", "all"],
    "pack": ["pack"],
}  # fmt: skip
TRAINS = ("train", "folds", "end_to_end")
TIMED = ("train_losses.csv", "history.csv")  # with seconds and dates


def prepare(command, base):
    """Write the input of a command of LINES to the current folder."""
    copy_cohort(base, N_STUDIES)
    if command in TRAINS:
        shutil.rmtree("trained_models")
    if command in ("page", "end_to_end"):
        for i in range(N_STUDIES):
            for v in range(1 + i % 3):
                frames = np.random.default_rng(10 * i + v).integers(0, 90, (8, 40, 48, 3), np.uint8)
                frames[:, 8:24, 10:30] += np.uint8(100)
                write_video(Path(f"videos/s{i}_trim/v{v}.avi"), frames)
        config = json.loads(Path("config.json").read_text())
        config["dataset"]["site"]["video_base_path"] = "videos"
        Path("config.json").write_text(json.dumps(config))


def whole(command, base):
    """(folder of a run without interruption, its seconds); the run is shared by all cases."""
    folder = base / "whole" / command
    if not (folder / "seconds").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        began = time.monotonic()
        with contextlib.chdir(folder):
            prepare(command, base)
            result = Command(*LINES[command]).result()
            assert result.status == 0, result
        (folder / "seconds").write_text(str(time.monotonic() - began))
    return folder, float((folder / "seconds").read_text())


def results_in(folder):
    """Name -> path of a run's output files, without caches, temporary files and locks."""
    paths = (p for p in folder.rglob("*") if p.is_file() and "frame_cache" not in p.parts)
    names = {str(p.relative_to(folder)): p for p in paths if p.suffix != ".lock"}
    return {k: p for k, p in names.items() if k != "seconds" and ".tmp" not in k}


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
