"""Areas kill and machine: commands that are killed, or run where something is lacking.

A command runs in a fork of the worker, which has everything imported: it is at work at once.
"""

import contextlib
import ctypes
import errno
import faulthandler
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from tests.faults import images
from tests.faults.stores import home, small_cohort
from tests.faults.worker import ROOT, Case, Result, one_line

LINES = {
    "train": ["train", "--task", "defect", "--epoch_lim", "3", "--checkpoint_minutes", "0"],
    "predict": ["predict", "--model_name", "defect", "--out", "p.csv"],
    "embed": ["embed", "--model_name", "defect", "--embed_file", "e.h5"],
    "explain": ["explain", "--model_name", "defect", "--subset", "all"],
    "evaluate": ["evaluate", "--model_name", "defect", "--subset", "all"],
    "pack": ["pack"],
    "extract": ["source", "--out", "out", *images.HOW],
    "download": ["download", "./z.zip", "--model_name", "z"],
    "folds": ["train", "--task", "defect", "--n_folds", "3", "--fold", "all", "--epoch_lim", "2",
              "--checkpoint_minutes", "0"],
    "grid": ["train", "--task", "defect", "--epoch_lim", "2", "--checkpoint_minutes", "0",
             "--grid", "learning_rate=1e-3,1e-4"],
    "videos": ["predict", "--model_name", "defect", "--videos", "source", "--out", "p.csv",
               "--page", *images.HOW],
    "page": ["explain", "--model_name", "defect", "--subset", "all", "--sample_limit", "8",
             "--page"],
    "end_to_end": ["train", "--task", "defect", "--end_to_end", "--weights", "random", "--size",
                   "32", "--clip_len", "4", "--num_clips", "1", "--epoch_lim", "2", "--workers",
                   "1", "--checkpoint_minutes", "0"],
    "encoder": ["--cohort", "echonetdynamic", "--data_dir", "dynamic", "--output_dir", "encoder",
                "--rand_init", "--model_name", "frame_transformer", "--arch", "convnext_tiny",
                "--normalization", "imagenet", "--n_layers", "1", "--n_heads", "2", "--size", "32",
                "--clip_len", "4", "--num_clips", "2", "--batch_size", "4", "--num_workers", "1",
                "--max_epochs", "2", "--n_bootstrap", "20"],
}  # fmt: skip
VIDEOS = ("page", "end_to_end")  # commands that look for the studies' videos, by the config


def base(area):
    images.base()
    for name in (
        "matplotlib.pyplot",
        "matplotlib.backends.backend_pdf",
        "sklearn.metrics",
        "captum.attr",
    ):
        __import__(name)
    return home()


def draw(path, seed):
    from echofocus_core.video.phantom import write_video

    frames = np.random.default_rng(seed).integers(0, 90, (8, 40, 48, 3), dtype=np.uint8)
    frames[:, 8:24, 10:30] += np.uint8(100)
    write_video(path, frames)


def small_network():
    """In a fork: PanEcho with a ConvNeXt of four narrow blocks and one head, drawn anew."""
    from echofocus_core.study import end_to_end
    from echofocus_core.video import extract, panecho

    extract.load_panecho = panecho.load_panecho
    panecho.CONVNEXT_TINY = end_to_end.CONVNEXT_TINY = ((4, 1), (8, 1), (8, 1), (768, 1))
    panecho.FrameTransformer.__init__.__defaults__ = (16, None, 1, 8, 0.0)
    panecho.random_digest.cache_clear()
    select = panecho.select_tasks
    panecho.select_tasks = lambda tasks: select("EF" if tasks == "all" else tasks)


def prepare(command, here, base):
    """What the command needs, in a folder of its own."""
    if command == "encoder":
        rows = []
        for i in range(20):
            draw(here / "dynamic" / "Videos" / f"x{i}.avi", i)
            rows.append((f"x{i}", 20 + 2 * i, 1, 2, ("TRAIN", "TRAIN", "VAL", "TEST")[i // 5]))
        table = pd.DataFrame(rows, columns=["FileName", "EF", "ESV", "EDV", "Split"])
        table.to_csv(here / "dynamic" / "FileList.csv", index=False)
        return
    if command == "extract":
        images.healthy(here / "source")
        for i in range(4):
            (here / "source" / f"more{i}").mkdir()
            data = images.cine("jpeg_ybr_labelled_rgb.dcm", 50 + i)
            (here / "source" / f"more{i}" / "a.dcm").write_bytes(data)
        return
    small_cohort(here, base, 24)
    os.unlink(here / "trained_models")
    if command == "videos":
        images.healthy(here / "source")
    if command in VIDEOS:
        for i in range(24):
            for v in range(1 + i % 3):
                draw(here / "vids" / f"s{i}_trim" / f"v{v}.avi", 10 * i + v)
        config = json.loads((here / "config.json").read_text())
        config["dataset"]["site"]["video_base_path"] = "vids"
        (here / "config.json").write_text(json.dumps(config))
    if command == "download":
        shutil.make_archive("z", "zip", base / "trained_models", "defect")
    elif command not in ("train", "folds", "grid", "end_to_end"):
        shutil.copytree(base / "trained_models" / "defect", here / "trained_models" / "defect")


def start(command, change=None):
    """A command of LINES in a fork; returns its pid. change: called in the fork before it."""
    sys.stdout.flush(), sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.environ["FAULTS_CHILD"] = "1"
        for name, fd in (("stdout.txt", 1), ("stderr.txt", 2)):
            os.dup2(os.open(f"../{name}.{os.getpid()}", os.O_CREAT | os.O_RDWR), fd)
        faulthandler.dump_traceback_later(45)
        tqdm.set_lock(threading.RLock())  # a thread of the worker may hold the other
        import echofocus
        from echofocus_core.base.console import run_main
        from echofocus_core.encoder import train
        from echofocus_core.video import extract

        if command in ("end_to_end", "encoder"):
            small_network()
        if change:
            change()
        main = {"extract": extract.main, "encoder": train.main}.get(command, echofocus.main)
        status = 0
        run_main(lambda: main(LINES[command]), "echofocus.py")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 70
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def finish(pid, seconds=60):
    """Result of a fork. A hang is a kill and a crash that says so."""
    end = time.time() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.time() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            told = Path(f"../stderr.txt.{pid}").read_text(errors="replace")
            return Result(-1, "", "", f"hang: {seconds} s {told}")
        time.sleep(0.01)
    texts = []
    for name in ("stdout.txt", "stderr.txt"):
        path = Path(f"../{name}.{pid}")
        texts.append(path.read_text(errors="replace") if path.exists() else "")
        path.unlink(missing_ok=True)
    status = os.waitstatus_to_exitcode(status)
    crash = texts[1][-1500:] if status == 70 else f"signal {-status}" if status < 0 else ""
    return Result(status, *texts, crash)


@cache
def whole(command):
    """(folder of a run never stopped, its seconds)."""
    folder, before = Path(os.environ["FAULTS_BASE"], f"whole-{command}-{os.getpid()}"), os.getcwd()
    (folder / "here").mkdir(parents=True)
    os.chdir(folder / "here")
    prepare(command, folder / "here", home())
    began = time.time()
    result = finish(start(command), 300)
    seconds = time.time() - began
    os.chdir(before)
    assert result.status == 0, result
    return folder / "here", seconds


TIMED = ("train_losses.csv", "history.csv", "extract_log.csv", "grid.csv")  # seconds, dates


def difference(found, expected):
    """The first thing in which a folder differs from that of a run never stopped, or ''."""

    def files(folder):
        """Name -> path; without what is named by where the folder is, or by a file's time."""
        paths = (p for p in folder.rglob("*") if p.is_file() and "frame_cache" not in p.parts)
        return {re.sub("source_[0-9a-f]{8}", "source", str(p.relative_to(folder))): p
                for p in paths}  # fmt: skip

    there, wanted = files(found), files(expected)
    if left := [p for p in there if any(x in p for x in (".tmp", ".lock", ".journal"))]:
        return f"left behind: {left}"
    if there.keys() != wanted.keys():
        return f"files differ: {sorted(there.keys() ^ wanted.keys())[:5]}"
    for name in sorted(wanted):
        a, b = there[name], wanted[name]
        if name.endswith((".html", ".csv")) and not name.endswith(TIMED):
            same = a.read_bytes() == b.read_bytes()
        elif name.endswith(".webm"):  # its writer puts a number into it, anew each time
            same = a.stat().st_size == b.stat().st_size
        elif name.endswith(".csv"):
            same = len(a.read_text().splitlines()) == len(b.read_text().splitlines())
        elif name.endswith(".pt"):
            x, y = map(weights, (a, b))
            same = x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
        elif name.endswith((".h5", ".hdf5")):
            same = numbers(a) == numbers(b)
        else:
            same = True
        if not same:
            return f"{name} differs"
    return ""


def weights(path):
    """Of a checkpoint, whichever network's: what is the same of two runs to the bit."""
    saved = torch.load(path, weights_only=True)
    parts = ("model_state_dict", "encoder_state_dict", "weights")
    found = {f"{part} {k}": v for part in parts for k, v in saved.get(part, {}).items()}
    return found or {"all": torch.tensor(list(repr(saved).encode()))}


def numbers(path):
    found = {}
    with h5py.File(path) as f:
        f.visititems(
            lambda name, node: (
                found.update({name: node[()].tobytes()})
                if isinstance(node, h5py.Dataset) and node.dtype.kind == "f"
                else None
            )
        )
    return found


def processes_left():
    """Processes that a fork started and that did not end with it."""
    end = time.time() + 20
    while time.time() < end:
        left = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if b"FAULTS_CHILD=1" in (path / "environ").read_bytes():
                    left.append((path / "cmdline").read_bytes()[-60:])
        if not left:
            return ""
        time.sleep(0.2)
    return f"processes left: {left}"


def kill(rng, here, base):
    return kill_command(str(rng.choice(list(LINES))), rng, here, base)


def kill_command(command, rng, here, base):
    """SIGKILL or SIGTERM at random moments, then the same line again."""
    expected, seconds = whole(command)
    prepare(command, here, base)
    name, kills = "SIGKILL" if rng.random() < 0.6 else "SIGTERM", int(rng.integers(1, 4))
    for _ in range(kills):
        pid = start(command)
        time.sleep(float(rng.uniform(0, 1.05 * seconds)))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, getattr(signal, name))
        result = finish(pid)
        if result.status == 0:
            break
    if not result.status and command == "download":
        return Case(f"{command}: {name}")
    result = finish(start(command), 120)
    complaint = one_line(result) or (result.status and result.said[-500:])
    complaint = complaint or difference(here, expected) or processes_left()
    return Case(f"{command}: {name}", complaint or "")


# ---------------------------------------------------------------------------------------- machine


@contextlib.contextmanager
def own_disk(here, size):
    """`here` as a file system of its own, where the system lets one: yields whether it does."""
    libc = ctypes.CDLL(None)
    done = libc.mount(b"tmpfs", os.fsencode(here), b"tmpfs", 0, b"size=%d" % size) == 0
    os.chdir(here)
    try:
        yield done
    finally:
        os.chdir(here.parent)
        if done:
            libc.umount2(os.fsencode(here), 2)


def full_disk(rng, here, base):
    """A disk with no more room, or files of no more than so many bytes."""
    command = str(rng.choice([c for c in LINES if c != "download"]))
    expected, _ = whole(command)
    with own_disk(here, 1 << 30) if rng.random() < 0.5 else contextlib.nullcontext() as disk:
        return filled(command, rng, here, base, expected, disk)


def filled(command, rng, here, base, expected, disk):
    prepare(command, here, base)
    size, limit = int(10 ** rng.uniform(1, 7.3)), None
    if disk:
        room = os.statvfs(here).f_bavail * os.statvfs(here).f_bsize
        with open(here / "filler", "wb") as f:
            os.posix_fallocate(f.fileno(), 0, room - size)
    else:
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
    result = finish(start(command, limit))
    (here / "filler").unlink(missing_ok=True)
    complaint = one_line(result)
    if result.status and not any(x in result.err for x in ("make room", "cannot write")):
        complaint = complaint or f"no file and remedy: {result.err[-300:]}"
    if not complaint:
        again = finish(start(command), 120)
        complaint = one_line(again) or (again.status and again.said[-500:])
    kind = "full disk" if disk else "files too large"
    return Case(f"{kind}: {command}", complaint or difference(here, expected))


def read_only(rng, here, base):
    """A folder that nobody may write into, as another user."""
    command = str(rng.choice([c for c in LINES if c != "download"]))
    prepare(command, here, base)
    root = os.geteuid() == 0
    for path in [here.parent, here, *here.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    here.parent.chmod(0o777)
    result = finish(start(command, (lambda: os.setuid(65534)) if root else None))
    for path in [here.parent, here, *here.rglob("*")]:
        path.chmod(0o755)
    complaint = one_line(result)
    if not complaint and result.status == 0:
        complaint = "it wrote where it may not"
    return Case(f"read-only: {command}", complaint)


def vanishing(rng, here, base):
    """A study's file that goes, or becomes another, while the others are read."""
    small_cohort(here, base, 24)
    victim, n, how = here / "emb" / "s9.hdf5", int(rng.integers(1, 20)), rng.integers(3)

    def change():
        from echofocus_core.video.store import Store

        read, count = Store.read, [0]

        def reading(self, *args):
            count[0] += 1
            if count[0] == n:
                if how == 0:
                    victim.unlink(missing_ok=True)
                elif how == 1:
                    victim.write_bytes(victim.read_bytes()[:-500])
                else:
                    shutil.rmtree(here / "emb")
            return read(self, *args)

        Store.read = reading

    result = finish(start("predict", change))
    complaint = one_line(result)
    if not complaint and how < 2 and result.status:
        complaint = result.said[-500:]
    return Case(f"vanishing: {['one file', 'cut', 'the folder'][how]}", complaint)


def no_locks(rng, here, base):
    """A file system that refuses locks."""
    command = str(rng.choice(list(LINES)))
    expected, _ = whole(command)
    prepare(command, here, base)
    number = int(rng.choice([errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS]))

    def change():
        import fcntl

        def refuse(*_):
            raise OSError(number, os.strerror(number))

        fcntl.flock = fcntl.lockf = refuse

    result = finish(start(command, change), 120)
    complaint = one_line(result) or (result.status and result.said[-500:])
    return Case(f"no locks: {command}", complaint or difference(here, expected))


def two_at_once(rng, here, base):
    """The second says so and stops, or does no harm."""
    command = str(rng.choice(list(LINES)))
    expected, seconds = whole(command)
    prepare(command, here, base)
    first = start(command)
    time.sleep(float(rng.uniform(0, 0.5 * seconds)))
    second = start(command)
    results = finish(first, 120), finish(second, 120)
    complaint = next(filter(None, map(one_line, results)), "")
    if not complaint and all(r.status for r in results):
        complaint = f"both stopped: {results[0].err[-200:]} {results[1].err[-200:]}"
    if command == "train" and not complaint and not any(r.status for r in results):
        end = [r.out.splitlines()[-1] for r in results]
        complaint = "" if end[0] == end[1] else f"both trained: {end}"
    return Case(f"two at once: {command}", complaint or difference(here, expected))


def little_memory(rng, here, base):
    """So many bytes more than the program itself needs."""
    command = str(rng.choice([c for c in LINES if c not in ("download", "extract")]))
    prepare(command, here, base)
    more = int(rng.choice([1 << 20, 8 << 20, 30 << 20, 100 << 20, 400 << 20]))

    def change():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

    result = finish(start(command, change), 120)
    complaint = one_line(result)
    if not complaint and result.status == 0:
        complaint = difference(here, whole(command)[0])
    return Case(f"little memory: {command}", complaint)


def environment(rng, here, base):
    """Variables of another machine, before Python starts."""
    small_cohort(here, base, 6)
    changes = [
        {"HOME": None}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"TMPDIR": "/is/not/there", "HOME": "/is/not/there"}, {"TZ": ":/is/not/there"},
        {"PYTHONIOENCODING": "ascii"}, {"COLUMNS": "x", "LINES": ""}, {"TERM": "dumb"},
    ]  # fmt: skip
    change = changes[int(rng.integers(len(changes)))]
    variables = {k: v for k, v in (os.environ | change).items() if v is not None}
    (here / "Ω").mkdir()
    line = [sys.executable, ROOT / "echofocus.py", *LINES["predict"][:-1], "Ω/p.csv"]
    found = subprocess.run(line, env=variables, capture_output=True, timeout=120)
    texts = (x.decode(errors="replace") for x in (found.stdout, found.stderr))
    result = Result(found.returncode, *texts)
    complaint = one_line(result) or (result.status and result.said[-500:])
    same = (here / "Ω" / "p.csv").exists() or complaint
    return Case(f"environment: {' '.join(change)}", complaint or ("" if same else "no table"))


def clock(rng, here, base):
    """A clock that goes back, and files of 1901, 1970 and 2100."""
    command = str(rng.choice(["predict", "train", "extract", "pack"]))
    expected, _ = whole(command)
    prepare(command, here, base)
    for path in here.rglob("*"):
        if path.is_file():
            stamp = float(rng.choice([-(2**31), 0, 1, 4.1e9]))
            os.utime(path, (stamp, stamp))

    def change():
        now = [time.time()]

        def back():
            now[0] -= 3600
            return now[0]

        time.time = back

    result = finish(start(command, change), 120)
    complaint = one_line(result) or (result.status and result.said[-500:])
    return Case(f"clock: {command}", complaint or difference(here, expected))


FAULTS = [full_disk, read_only, vanishing, no_locks, two_at_once, little_memory, environment, clock]


def machine(rng, here, base):
    return FAULTS[int(rng.integers(len(FAULTS)))](rng, here, base)
