"""The campaign of faults (tests/faults) at a small size, and that it finds what it looks for."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT

from tests.faults import fuzz, mutations
from tests.faults.__main__ import campaign
from tests.faults.worker import AREAS, Result, Worker, one_line

CASES = {"dicom": 20, "video": 20, "kill": 2, "machine": 3, "numbers": 2, "privacy": 1}


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.close()


@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize("area", AREAS)
def test_a_small_campaign(worker, area):
    tried, failed = campaign(area, CASES.get(area, 5), 1, worker, lambda _: None)
    assert tried.total() >= CASES.get(area, 5)
    assert not failed, failed


# ------------------------------------------------------------------ that the campaign would see it

PLANT = """
import sys, numpy as np
{plant}
from tests.faults import worker
watch = worker.Watch()
found = [worker.do_case({area!r}, 3, number, watch)["complaint"] for number in range({n})]
print(*filter(None, found), sep="\\n")
"""
PLANTED = {
    "no checksum of a checkpoint": (
        "checkpoints",
        "from echofocus_core.base import checkpoints; checkpoints.check_records = lambda _: None",
        "WRONG IN SILENCE|has another number", 80,
    ),
    "pickles are run": (
        "checkpoints", "import torch; load = torch.load; torch.load = lambda path, **_: "
        "load(path, weights_only=False); from echofocus_core.base import checkpoints; "
        "checkpoints.check_pickle = lambda f: None", "CODE OF THE FILE RAN|outside: os.system", 40,
    ),
    "a crash": (
        "hdf5",
        "from echofocus_core.video import store; store.UNREADABLE = (KeyError,)", "traceback", 8,
    ),
    "names as they are": (
        "tables",
        "from echofocus_core.base import console; console.printable = str; console.STEERING = {}; "
        "console.clean_text = lambda text, *_: str(text)",
        "steers the terminal|a line of", 40,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTED)
def test_planted_faults_are_found(plant, tmp_path):
    area, code, text, n = PLANTED[plant]
    line = [sys.executable, "-c", PLANT.format(area=area, plant=code, n=n)]
    environment = os.environ | {"FAULTS_BASE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    found = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert any(part in found.stdout for part in text.split("|")), found.stdout + found.stderr


@pytest.mark.parametrize(
    "result, text",
    [
        (Result(1, "", "Traceback (most recent call last):\n"), "traceback"),
        (Result(0, "a\x1b[2Jb", ""), "steers the terminal"),
        (Result(1, "", "x: error: something\n"), "not named"),
        (Result(1, "", "something\n"), "no line of an error"),
        (Result(0, "", "a.py:3: RuntimeWarning: overflow\n"), "a warning of a library"),
        (Result(1, "", "x: error: a.csv is odd\n"), ""),
        (Result(0, "all is well", "\r 10%|# | 1/2\x1b[A"), ""),
    ],
)
def test_the_judge(result, text):
    found = one_line(result, "a.csv")
    assert text in found and bool(text) == bool(found)


def test_cases_are_made_again_alike():
    for fault in mutations.BYTES:
        a, b = (fault(bytes(range(256)) * 9, np.random.default_rng(3)) for _ in range(2))
        assert a == b
    assert fuzz.PARSERS.keys() >= {"tables", "checkpoints", "containers", "fragments"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("parser", fuzz.PARSERS)
def test_our_parsers_take_any_bytes(parser, tmp_path, capsys):
    """The fuzzer's targets on a few hundred inputs of a seed, without its guidance."""
    rng, whole = np.random.default_rng(5), fuzz.whole_file(parser, tmp_path / "file")
    for _ in range(200):
        fuzz.PARSERS[parser](mutations.damaged(whole, rng)[1], tmp_path / "file")
