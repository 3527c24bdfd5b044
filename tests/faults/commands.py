"""Run command lines in forks, check how they end, and make the cohort of all cases."""

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from tqdm import tqdm

import echofocus
from echofocus_core.base.console import run_main
from echofocus_core.study import end_to_end
from echofocus_core.video import extract, panecho, store
from tests.helpers import FIXTURES

EXTRACT = ["extract", "source", "--out", "out", "--weights", "random", "--size", "32"]
EXTRACT += ["--n_clips", "1", "--clip_len", "2", "--workers", "1", "--device", "cpu"]
PREDICT = ["predict", "--model_name", "defect", "--out", "p.csv"]
N_STUDIES = 24


@dataclass
class Result:
    """How a command line ended."""

    status: int
    out: str
    err: str

    @property
    def text(self):
        return self.out + self.err


def use_narrow_network():
    """Give PanEcho a ConvNeXt of four narrow blocks and one head, so that a case takes seconds."""
    panecho.CONVNEXT_TINY = end_to_end.CONVNEXT_TINY = ((4, 1), (8, 1), (8, 1), (768, 1))
    panecho.FrameTransformer.__init__.__defaults__ = (16, None, 1, 8, 0.0)
    select = panecho.select_tasks
    panecho.select_tasks = lambda tasks: select("EF" if tasks == "all" else tasks)


def start(function, *args):
    """Call a function in a fork with a separate process group; returns its pid."""
    sys.stdout.flush(), sys.stderr.flush()
    if pid := os.fork():
        return pid
    status = 70
    try:
        os.setpgid(0, 0)
        tqdm.set_lock(threading.RLock())  # another thread of the parent may hold the inherited one
        function(*args)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def wait(pid, seconds):
    """The exit status of a fork, negative for a signal; None if it was killed after a timeout."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


class Command:
    """A command line in a fork, such as Command("predict", "--out", "p.csv")."""

    def __init__(self, *line):
        self.line = [str(x) for x in line]
        self.files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self.pid = start(self.call)

    def call(self):
        for descriptor, file in enumerate(self.files, 1):
            os.dup2(file.fileno(), descriptor)
        if self.line[0] == "extract":
            run_main(lambda: extract.main(self.line[1:]), "extract.py")
        else:
            run_main(lambda: echofocus.main(self.line), "echofocus.py")

    def result(self, seconds=300):
        status = wait(self.pid, seconds)
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        if status is None:
            texts[1] += f"\nTraceback: no end after {seconds} s"
        return Result(-9 if status is None else status, *texts)


def run(*line):
    return Command(*line).result()


def complaint_of(result, failed=True):
    """What is wrong with the end of a command, or ''. failed: whether the command may fail."""
    if "Traceback" in result.text:
        return "traceback: " + result.text[result.text.index("Traceback") :][-1500:]
    if result.status == 0:
        return ""
    if result.status not in (1, 2) or not failed:
        return f"status {result.status}: {result.err[-500:]}"
    lines = [x.rpartition("\r")[2] for x in result.err.rstrip().split("\n")]
    if not any("error:" in line for line in lines):
        return f"no error message: {result.err[-300:]!r}"
    return ""


# --------------------------------------------------------------------------------------- cohort


def clips(seed, V=1, C=2):
    """Embeddings (V, C, 768), float32."""
    return np.random.default_rng(seed).standard_normal((V, C, 768)).astype(np.float32)


def make_base(folder):
    """Write labels, embeddings, a model, its predictions, and two videos' embeddings."""
    os.chdir(folder)
    Path("emb").mkdir()
    rows = []
    for i in range(N_STUDIES):
        videos = {
            f"v{v}.avi": (np.arange(2), clips(100 * i + v)[0][None]) for v in range(1 + i % 3)
        }
        files = dict.fromkeys(videos, store.FileRecord())
        store.write_study(Path(f"emb/s{i}.hdf5"), videos, {"weights_sha256": "ab" * 32}, files)
        rows.append({"pid": f"P{i}", "eid": f"s{i}", "finding": i % 2, "size": 3 + i / 7})
    pd.DataFrame(rows).to_csv("labels.csv", index=False)
    recipe = {"encoder_depth": 0, "batch_number": 8, "epoch_lim": 1, "learning_rate": 1e-3}
    task = {"task_labels": ["finding"], "label_path": "labels.csv", "settings": recipe}
    config = {"task": {"defect": task}, "dataset": {"site": {"embedding_path": "emb"}}}
    Path("config.json").write_text(json.dumps(config))
    healthy_source(Path("source"))
    for line in (["train", "--task", "defect"], PREDICT, EXTRACT):
        result = run(*line)
        assert result.status == 0, result


def copy_cohort(base, n=5):
    """Copy the first studies, config, labels and model to the current folder."""
    Path("emb").mkdir()
    for i in range(n):
        shutil.copy2(base / "emb" / f"s{i}.hdf5", "emb")
    for name in ("config.json", "labels.csv"):
        shutil.copy(base / name, name)
    shutil.copytree(base / "trained_models", "trained_models")


def predictions(path="p.csv"):
    return pd.read_csv(path, dtype={"eid": str}, keep_default_na=False).set_index("eid")


def differences(base, studies, damaged=()):
    """'', or which study of p.csv differs; a damaged study may be left out or have a warning."""
    table, expected = predictions(), predictions(base / "p.csv")
    for eid in [*studies, *damaged]:
        if eid not in table.index:
            if eid in damaged:
                continue
            return f"healthy study {eid} is missing"
        error = abs(float(table.loc[eid, "finding"]) - float(expected.loc[eid, "finding"]))
        if error > 2e-5 and not (eid in damaged and table.loc[eid, "warning"]):
            return f"WRONG NUMBER WITHOUT A WARNING: {eid}"
    return ""


def healthy_source(source):
    """Write two studies that stay undamaged: a DICOM cine and a video."""
    files = {
        "well_dicom/a.dcm": "dicom/jpeg_ybr_labelled_rgb.dcm",
        "well_video/a.mp4": "videos/h264.mp4",
    }
    for name, fixture in files.items():
        (source / name).parent.mkdir(parents=True)
        shutil.copy(FIXTURES / fixture, source / name)


def healthy_embeddings(folder):
    """Study -> array, of the undamaged studies."""
    arrays = {}
    for path in Path(folder, "out").glob("well_*.hdf5"):
        with h5py.File(path) as f:
            arrays[path.stem] = f["embeddings"][:]
    return arrays
