"""A process that makes cases and judges them; and who watches it.

The worker takes {"area", "seed", "number"} a line and answers {"fault", "complaint", ...} a line.
What a case may not do is seen by an audit hook (writing outside, programs, the network) and by a
canary; how much memory it took, its children's too, by the system; how long, by who watches.
"""

import contextlib
import importlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 60  # that a command may take
MEMORY = 2 << 30  # bytes more than before that a case may take: one file's budget is 1 GB
AREAS = {
    "dicom": "images", "video": "images", "manifests": "images", "hdf5": "stores",
    "packs": "stores", "journals": "stores", "checkpoints": "models", "archives": "models",
    "tables": "tables", "kill": "processes", "machine": "processes", "numbers": "numbers",
    "privacy": "privacy",
}  # fmt: skip


@dataclass
class Result:
    """What a command line did."""

    status: int
    out: str
    err: str
    crash: str = ""  # a traceback
    seconds: float = 0.0  # of this process: a machine that others use is no fault

    @property
    def said(self):
        return self.out + self.err


@dataclass
class Case:
    """What a case found: the fault's name, how many files it stood for, and what is wrong ('')."""

    fault: str
    complaint: str = ""
    n: int = 1
    faults: dict = field(default_factory=dict)  # name -> how many, where n > 1


# ------------------------------------------------------------------------------- in the worker


class Watch:
    """What the process does that a hostile file might have made it do."""

    def __init__(self):
        self.allowed, self.seen = (), []
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if not self.allowed:
            return
        if event == "open" and isinstance(args[0], str | bytes) and isinstance(args[2], int):
            path = os.path.abspath(os.fsdecode(args[0]))
            if args[2] & (os.O_WRONLY | os.O_RDWR) and not path.startswith(self.allowed):
                self.seen.append(f"wrote {path[:200]}")
        elif event in ("os.system", "os.exec", "socket.connect"):
            self.seen.append(f"{event} {args!r}"[:200])
        elif event == "subprocess.Popen" and str(args[0]) != sys.executable:
            self.seen.append(f"started {args[0]!r}"[:200])


@contextlib.contextmanager
def captured():
    """Standard output and error of this process, by their descriptors: yields a list of the two."""
    texts, kept = [], [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        try:
            yield texts
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            for i, file in enumerate((out, err)):
                os.dup2(kept[i], i + 1), os.close(kept[i])
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))


def run(*line, main=None):
    """A command line in this process, as a user types it: Result."""
    import echofocus
    from echofocus_core.base.console import run_main

    status, crash, began = 0, "", time.process_time()
    with captured() as texts:
        try:
            run_main(lambda: (main or echofocus.main)([str(x) for x in line]), "echofocus.py")
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            status, crash = -1, traceback.format_exc()
    return Result(status, *texts, crash, time.process_time() - began)


def one_line(result, *names):
    """What is wrong with how a command ended, whatever it was given; '' if nothing.

    names: of which the line of an error must hold one.
    """
    if result.crash or "Traceback" in result.said:
        return "traceback: " + (result.crash or result.said)[-1500:]
    if result.seconds > SECONDS:
        return f"hang: {result.seconds:.0f} s"
    if odd := re.search(
        "[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f\u202e]|\x1b(?!\\[A)", result.said
    ):
        return f"a character that steers the terminal: {odd[0]!r}"
    if warned := re.search(r"^.*\b(\w+Warning): .*$", result.err, re.M):
        return f"a warning of a library: {warned[0][:300]}"
    if result.status == 0:
        return ""
    lines = [x.rpartition("\r")[2] for x in result.err.rstrip().split("\n")]
    while len(lines) > 1 and lines[-1].startswith("  "):
        lines.pop()  # a list of faults below the line
    last = lines[-1]
    if result.status not in (1, 2) or "error:" not in last:
        return f"no line of an error: status {result.status}, {result.err[-300:]!r}"
    if len(last) > 2100:  # of the message 2,000 at most
        return f"a line of {len(last)} characters"
    if names and not any(name in result.said for name in names):
        return f"the file is not named: {last[:300]}"
    return ""


def peak(pid="self"):
    """The most memory that a process had since `forget_peak`, in bytes."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) << 10 if found else 0


def forget_peak():
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def children_peak():
    import resource

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10


def do_case(area, seed, number, watch):
    """Make a case in a folder of its own and judge it: dict for the answer."""
    module = importlib.import_module(f"tests.faults.{AREAS[area]}")
    rng = np.random.default_rng([seed, number, *area.encode()])
    with tempfile.TemporaryDirectory(prefix="faults-") as outer:
        here = Path(outer, "here")
        here.mkdir()
        Path(outer, "canary").write_text("as it was")
        os.chdir(here)
        forget_peak()
        before, children = peak(), children_peak()
        base = module.base(area)
        assert not os.listdir(here)
        watch.allowed = tuple(
            [
                outer,
                "/dev/null",
                "/proc/self",
                str(tempfile.gettempdir()),
                os.path.expanduser("~/."),
            ]
        )
        watch.seen.clear()
        began = time.perf_counter()
        try:
            case = getattr(module, area)(rng, here, base)
        except Exception:
            case = Case("the campaign itself", "traceback: " + traceback.format_exc()[-1500:])
        seconds = time.perf_counter() - began
        watch.allowed = ()
        os.chdir(ROOT)
        more = max(peak() - before, children_peak() if children_peak() > children else 0)
        if not case.complaint:
            case.complaint = outside(Path(outer), watch, more)
        for path in here.rglob("*"):
            with contextlib.suppress(OSError):
                path.chmod(0o700) if path.is_dir() and not path.is_symlink() else None
    return vars(case) | {"seconds": seconds, "memory": more}


def outside(outer, watch, more):
    if watch.seen:
        return f"outside: {watch.seen[0]}"
    if sorted(p.name for p in outer.iterdir()) != ["canary", "here"]:
        return f"outside: {sorted(p.name for p in outer.iterdir())}"
    if (outer / "canary").read_text() != "as it was":
        return "outside: the canary was written to"
    return f"memory: {more >> 20} MB" if more > MEMORY else ""


def serve():
    """Answer cases until standard input closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(ROOT))
    watch = Watch()
    for line in sys.stdin:
        answers.write(json.dumps(do_case(**json.loads(line), watch=watch)) + "\n")
        answers.flush()


# ------------------------------------------------------------------------------- who watches it


class Worker:
    """A worker process, begun anew when it hangs or dies."""

    def __init__(self):
        self.process = None
        self.cache = tempfile.mkdtemp(prefix="faults-base-")

    def begin(self):
        names = ("WORLD_SIZE", "RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_ARRAY_TASK_ID")
        environment = {k: v for k, v in os.environ.items() if k not in names}
        environment |= {"OMP_NUM_THREADS": "1", "FAULTS_BASE": self.cache, "COLUMNS": "80"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
            start_new_session=True,
        )  # fmt: skip

    def __call__(self, area, seed, number, seconds=4 * SECONDS):
        """The answer to a case; the first one may take longer, for what all share is made."""
        if self.process is None:
            self.begin()
        self.process.stdin.write(json.dumps(dict(area=area, seed=seed, number=number)) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        status = self.process.poll()
        self.close(keep=True)
        told = f"the interpreter ended: {status}" if ready else f"hang: no end in {seconds} s"
        return {"fault": "not known", "complaint": told, "n": 1, "faults": {}, "seconds": seconds}

    def close(self, keep=False):
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, 9)
            self.process.communicate()
            self.process = None
        if not keep:
            shutil.rmtree(self.cache, ignore_errors=True)


if __name__ == "__main__":
    from tests.faults.worker import serve as serve_cases

    serve_cases()
