"""Run one case of each area of the fault campaign; `python -m tests.faults` runs more."""

import subprocess
import sys

from helpers import ROOT


def test_a_case_of_each_area():
    line = [sys.executable, "-m", "tests.faults", "--cases", "1", "--seed", "2"]
    run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(": 1 cases, 0 failed") == 6
