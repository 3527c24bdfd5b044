"""The runner: see tests/faults/__init__.py."""

import argparse
import json
import os
import resource
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from tests.faults import files
from tests.faults.commands import make_base, start, use_narrow_network, wait
from tests.faults.privacy import privacy
from tests.faults.processes import kill, two_at_once

AREAS = {
    area.__name__: area
    for area in (files.dicom, files.video, files.hdf5, kill, two_at_once, privacy)
}
SECONDS = 1800  # for a case with all its commands
MEMORY = 3 << 20  # kB that a process may take


def watch(outer):
    """Record in outer/outside if a case starts programs or writes to other folders."""
    allowed = (str(outer), "/dev/", "/proc/", tempfile.gettempdir(), os.path.expanduser("~/."))
    opened = os.open(outer / "outside", os.O_CREAT | os.O_WRONLY)

    def hook(event, args):
        fault = event in ("os.system", "os.exec", "socket.connect")
        fault |= event == "subprocess.Popen" and str(args[0]) != sys.executable
        if event == "open" and isinstance(args[0], str | bytes) and isinstance(args[2], int):
            path = os.path.abspath(os.fsdecode(args[0]))
            fault = args[2] & (os.O_WRONLY | os.O_RDWR) and not path.startswith(allowed)
        if fault:
            os.write(opened, f"{event} {args!r}\n"[:300].encode())

    sys.addaudithook(hook)


def do_case(area, seed, number, base, outer):
    """In a fork: run a case in outer/here and write its result to outer/answer."""
    (outer / "here").mkdir()
    os.chdir(outer / "here")
    watch(outer)
    fault, complaint = AREAS[area](np.random.default_rng([seed, number, *area.encode()]), base)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    if not complaint and (outer / "outside").stat().st_size:
        complaint = "outside: " + (outer / "outside").read_text()[:500]
    elif not complaint and peak > MEMORY:
        complaint = f"memory: {peak >> 10} MB"
    (outer / "answer").write_text(json.dumps([fault, complaint]))


def case(area, seed, number, base):
    """(name of the fault, complaint or '')."""
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        status = wait(start(do_case, area, seed, number, base, Path(folder)), SECONDS)
        answer = Path(folder, "answer")
        if answer.exists():
            return json.loads(answer.read_text())
        return "unknown", f"no answer: status {status}"


def campaign(area, cases, seed, base):
    """Run the cases of an area and print those that fail; returns their number."""
    tried, failed = Counter(), 0
    for number in cases:
        fault, complaint = case(area, seed, number, base)
        tried[fault.split(":")[0]] += 1
        if complaint:
            failed += 1
            print(f"{area} --seed {seed} --number {number}: {fault}: {complaint}", flush=True)
    print(f"{area}: {tried.total()} cases, {failed} failed ({dict(tried)})", flush=True)
    return failed


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--area", nargs="+", default=list(AREAS), choices=list(AREAS))
    parser.add_argument("--cases", type=int, default=20, help="of each area")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, help="only this case")
    args = parser.parse_args()
    cases = range(args.cases) if args.number is None else [args.number]
    use_narrow_network()
    with tempfile.TemporaryDirectory(prefix="faults-base-") as folder:
        if status := wait(start(make_base, folder), SECONDS):
            sys.exit(f"the shared cohort could not be made: status {status}")
        failed = sum(campaign(area, cases, args.seed, Path(folder)) for area in args.area)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
