"""Files: atomic writes, tables, journals, locks, digests, full disks."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT

from echofocus_core.base import files
from echofocus_core.base.console import UserError
from echofocus_core.base.parallel import map_ahead

# ---------------------------------------------------------------------------------- atomic writing


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "table.csv"
    with files.atomic_path(path) as temporary:
        temporary.write_text("old")
        assert not path.exists() and temporary.suffix == ".csv"
    with pytest.raises(KeyboardInterrupt), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(path.parent) == ["table.csv"]
    with pytest.raises(OSError, match="Is a directory"), files.atomic_path(path.parent) as t:
        t.write_text("table")


def test_an_output_replaces_only_an_earlier_output(tmp_path):
    """An empty file is replaced too; other files and folders are not."""
    for name, content in (("a", b"x=1"), ("b", b""), ("y", b"y=1\xff")):
        (tmp_path / name).write_bytes(content)
    for name in "abc":
        path = files.output_path(str(tmp_path / name), "x", files.begins("x="))
        assert path == tmp_path / name
    for name in ("y", ""):
        with pytest.raises(UserError, match=r"name another|give a file"):
            files.output_path(tmp_path / name, "x", files.begins("x="))


def test_names_in_file_names_stay_in_their_folder_and_apart():
    assert files.in_file_name("age at scan") == "age at scan"
    odd = ["a/b", "a\\b", "a:b", "../../pwn", "ü" * 250, "ü" * 251, "a\nb"]
    names = [files.in_file_name(x) for x in odd]
    assert len(set(names)) == len(odd) and max(len(x.encode()) for x in names) < 100
    assert not any(c in x for x in names for c in "/\\:\n")


# ------------------------------------------------------------------------------------------ tables


def test_text_is_written_unchanged(tmp_path):
    ids = ["-A7", "=1+1", "+1", "'x", "a,b", 'say "x"', "ünï", "007"]
    files.write_table(pd.DataFrame({"eid": ids, "p": 1.0}).set_index("eid"), tmp_path / "t.csv")
    assert list(pd.read_csv(tmp_path / "t.csv", dtype=str)["eid"]) == ids
    assert b"\r" not in (tmp_path / "t.csv").read_bytes()


def test_numbers_have_six_digits(tmp_path):
    frame = pd.DataFrame({"p": [1 / 3, -2e-7 / 3, np.nan, -np.inf], "n": [12345678, 1, 2, -3]})
    files.write_table(frame, tmp_path / "t.csv")
    text = (tmp_path / "t.csv").read_text()
    assert text == "p,n\n0.333333,12345678\n-6.66667e-08,1\n,2\n-inf,-3\n"


# ----------------------------------------------------------------------------------------- journals

WORK = {"model": "a" * 64, "precision": "fp32"}
UNITS = [
    {"eids": ["a"], "logits": np.array([[0.1, np.nan]], np.float32)},
    {"eids": ["b", "ü"], "logits": np.float32([[1e-30, np.inf], [0.3, 2]]), "n": 3},
    {"eids": [], "logits": np.zeros((0, 2))},
]


def new_journal(path, n=3):
    journal = files.Journal(path, WORK)
    for unit in UNITS[:n]:
        journal.add(unit)
    return journal


def same(a, b):
    arrays = zip(a, b, strict=True)
    return all(
        x["eids"] == y["eids"] and x["logits"].tobytes() == y["logits"].tobytes() for x, y in arrays
    )


def test_units_of_a_journal_are_read_back(tmp_path, capsys):
    path = tmp_path / "x" / ".j"
    journal = new_journal(path, 2)
    assert same(journal, UNITS[:2])
    again = files.Journal(path, WORK)
    assert again.n == 2 and same(again, UNITS[:2])
    assert "2 studies" in capsys.readouterr().out
    again.add(UNITS[2])
    assert same(files.Journal(path, WORK), UNITS)
    again.delete()
    assert not path.exists() and files.Journal(path, WORK).n == 0


def test_an_incomplete_last_line_is_dropped(tmp_path):
    whole = new_journal(tmp_path / ".j").path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(0, len(whole) + 1, 7):
        path = tmp_path / ".cut"
        path.write_bytes(whole[:cut])
        journal = files.Journal(path, WORK)
        n = max(0, sum(cut >= end for end in ends) - 1)
        assert journal.n == n and same(journal, UNITS[:n])
        for unit in UNITS[n:]:
            journal.add(unit)
        assert path.read_bytes() == whole


def test_a_journal_of_another_run_is_not_used(tmp_path, capsys):
    path = new_journal(tmp_path / ".j").path
    assert files.Journal(path, WORK | {"precision": "bf16"}).n == 0
    assert "different run" in capsys.readouterr().out
    assert files.Journal(path, WORK).n == 0  # the old units are gone


# ------------------------------------------------------------------------------------------- locks

HOLD = """
import sys
from echofocus_core.base.files import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_holds_a_lock(tmp_path):
    path = tmp_path / "panecho.pt"
    line = [sys.executable, "-c", HOLD, str(path)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(line, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is using"), files.lock(path, timeout=0.1):
            pass
        process.stdin.close()
        process.wait()
    with files.lock(path, timeout=5):
        assert os.listdir(tmp_path) == ["panecho.pt.lock"]
    assert os.listdir(tmp_path) == []


def test_map_ahead_keeps_the_order_and_stops_at_an_error():
    with ThreadPoolExecutor(3) as pool:
        assert list(map_ahead(pool, lambda x: x * x, range(20), 4)) == [x * x for x in range(20)]
    items = iter(range(100))
    with ThreadPoolExecutor(1) as pool:
        results = map_ahead(pool, lambda x: 1 // (x - 2), items, 3)
        assert [next(results), next(results)] == [-1, -1]
        with pytest.raises(ZeroDivisionError):
            next(results)
    assert next(items) < 6


def test_a_digest_depends_on_type_shape_and_parts():
    numbers = np.arange(6.0)
    parts = [("ab", "c"), ("a", "bc"), ("abc",), (b"abc", 1), (numbers,), (numbers.reshape(2, 3),)]
    parts += [(numbers.astype(np.float32),), ({"a": 1},), (numbers.tobytes(),)]
    assert len({files.sha256_of(*part) for part in parts}) == len(parts)
    assert files.sha256_of({"b": 1, "a": 2}) == files.sha256_of({"a": 2, "b": 1})
    assert files.sha256_of(numbers[::2]) == files.sha256_of(numbers[::2].copy())


def test_a_journal_is_open_in_one_process_only(tmp_path):
    path = tmp_path / ".j"
    with files.open_journal(path, WORK) as journal:
        journal.add(UNITS[0])
        with pytest.raises(UserError), files.open_journal(path, WORK):
            pass
    with files.open_journal(path, WORK) as journal:
        assert same(journal, UNITS[:1])
    assert os.listdir(tmp_path) == [".j"]


# ------------------------------------------------------------------------------------- full disk


FULL = """
import resource, torch
resource.setrlimit(resource.RLIMIT_FSIZE, (1000,) * 2)
from echofocus_core.base import checkpoints, console
console.run_main(lambda: checkpoints.save({"a": torch.zeros(9999)}, "best.pt"), "echofocus.py")
"""


def test_a_full_disk_is_one_line_with_the_file(tmp_path):
    """The error of torch.save itself would not name the file."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    line = [sys.executable, "-c", FULL]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "'best.pt'" in done.stderr
    assert os.listdir(tmp_path) == []
