"""One small case of each area of the fault campaign; `python -m tests.faults` runs more of them."""

import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT

from tests.faults import changes
from tests.faults.commands import Result, complaint_of


def test_a_case_of_each_area():
    line = [sys.executable, "-m", "tests.faults", "--cases", "1"]
    run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(": 1 cases, 0 failed") == 11


@pytest.mark.parametrize(
    "result, complaint",
    [
        (Result(1, "", "Traceback (most recent call last):\n"), "traceback"),
        (Result(1, "", "x: error: something\n"), "not named"),
        (Result(1, "", "something\n"), "no error message"),
        (Result(-11, "", ""), "status -11"),
        (Result(1, "", "x: error: a.csv has no column 'eid'\n"), ""),
        (Result(0, "60 studies", "\r 10%|# | 1/2\x1b[A"), ""),
    ],
)
def test_how_a_command_may_end(result, complaint):
    assert complaint_of(result, "a.csv").startswith(complaint) or "not named" in complaint
    assert bool(complaint_of(result, "a.csv")) == bool(complaint)


def test_a_case_depends_on_its_seed_alone():
    for fault in changes.BYTES:
        a, b = (fault(bytes(range(256)) * 9, np.random.default_rng(3)) for _ in range(2))
        assert a == b
