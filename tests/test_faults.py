"""One small case of each area of the fault campaign; `python -m tests.faults` runs more of them."""

import subprocess
import sys

from helpers import ROOT

from tests.faults.commands import Result, complaint_of


def test_a_case_of_each_area():
    line = [sys.executable, "-m", "tests.faults", "--cases", "1", "--seed", "2"]
    run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(": 1 cases, 0 failed") == 10


def test_how_a_command_may_end():
    for result, complaint in (
        (Result(1, "", "Traceback (most recent call last):\n"), "traceback"),
        (Result(1, "", "x: error: something\n"), "the file is not named"),
        (Result(1, "", "something\n"), "no error message"),
        (Result(-11, "", ""), "status -11"),
    ):
        assert complaint_of(result, "a.csv").startswith(complaint)
    assert complaint_of(Result(1, "", "x: error: a.csv has no column 'eid'\n"), "a.csv") == ""
    assert complaint_of(Result(0, "60 studies", ""), "a.csv") == ""
