"""Files: atomic writes among many processes, tables that spreadsheets open, journals, locks."""

import csv
import functools
import json
import os
import re
import signal
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


def test_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "table.csv"
    with files.atomic_path(path) as temporary:
        temporary.write_text("old")
        assert not path.exists() and temporary.suffix == ".csv"
    with pytest.raises(KeyboardInterrupt), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(path.parent) == ["table.csv"]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for place in (path.parent, tmp_path / "pipe", tmp_path / "link"):
        with pytest.raises(UserError, match="name"), files.atomic_path(place):
            raise AssertionError("no regular file is refused before anything is computed")


def test_what_is_typed_replaces_its_own_kind_alone(tmp_path):
    """Nothing, an empty file and an earlier output; no other file, pipe or folder."""
    check = functools.partial(files.output_path, option="--o", what="x", is_ours=files.begins("x="))
    for name, content in (("a", b"x=1"), ("b", b""), ("c", None), ("new/d", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert check(str(tmp_path / name)) == tmp_path / name
    (tmp_path / "y").write_bytes(b"y=1\xff")
    os.mkfifo(tmp_path / "pipe")
    for name, text in {
        "y": "is there and is no x", "pipe": "no regular file", "": "is a folder", "z/": "is a f",
        "y/b": "y is a file",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=text):
            check(f"{tmp_path}/{name}")


def test_names_in_file_names_stay_in_their_folder_and_apart():
    assert files.in_file_name("age at scan") == "age at scan"
    odd = ["a/b", "a\\b", "a:b", "../../pwn", "ü" * 250, "ü" * 251, "a\nb"]
    found = [files.in_file_name(x) for x in odd]
    assert len(set(found)) == len(odd) and max(len(x.encode()) for x in found) < 100
    assert not any(c in x for x in found for c in "/\\:\n")


def test_writers_of_one_file_do_not_share_a_temporary(tmp_path, monkeypatch):
    """Nor do processes of one number on two machines, or a name of the longest length."""
    path = tmp_path / ("x" * 250 + ".csv")
    with files.atomic_path(path) as a, files.atomic_path(path) as b:
        names = {a.name, b.name}
        monkeypatch.setattr(files.socket, "gethostname", lambda: "another")
        with files.atomic_path(path) as c:
            places = {re.split(r"[.-]", x.name)[-5] for x in (a, b, c)}
            for x in (a, b, c):
                x.write_text("1")
    assert len(names) == 2 and len(places) == 2 and "another" not in c.name


def test_leftovers_of_the_dead_alone_are_deleted(tmp_path):
    """What a living process writes, here or elsewhere, and what is nobody's temporary, stays."""
    code = """
import sys, time
from echofocus_core.base.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print(temporary.name, flush=True)
    time.sleep(600)
"""
    names, processes = [], []
    for name in ("dead.pt", "alive.pt"):
        line = [sys.executable, "-c", code, str(tmp_path / name)]
        processes.append(subprocess.Popen(line, stdout=subprocess.PIPE, cwd=ROOT, text=True))
        names.append(processes[-1].stdout.readline().strip())
    processes[0].send_signal(signal.SIGKILL)
    processes[0].wait()
    try:
        elsewhere = re.sub(r"\.[0-9a-f]{8}-", ".00000000-", names[0])
        for other in (elsewhere, ".mine.tmp.pt", ".x.1234.tmp.csv"):
            (tmp_path / other).write_text("")
        files.clear_leftovers(tmp_path)
        left = {elsewhere, ".mine.tmp.pt", ".x.1234.tmp.csv", names[1]}
        assert set(os.listdir(tmp_path)) == left
        os.utime(tmp_path / elsewhere, (1, 1))
        files.clear_leftovers(tmp_path)
        assert set(os.listdir(tmp_path)) == left - {elsewhere}
    finally:
        processes[1].kill()
        processes[1].communicate()
        processes[0].stdout.close()


def test_what_a_killed_run_left_is_cleared_by_the_next_that_writes(tmp_path):
    """Temporary files and folders alike, of whatever command, at its first write."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old, folder = files.temporary_path(tmp_path / "a.pt"), files.temporary_path(tmp_path / "Model")
    for path in (old, folder):
        gone = path.with_name(path.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-"))
        gone.mkdir() if path is folder else gone.write_text("half")
    with files.atomic_path(tmp_path / "b.csv") as temporary:
        temporary.write_text("1")
    assert os.listdir(tmp_path) == ["b.csv"]


# ------------------------------------------------------------------------------------------ tables

EVIL = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''-x", "-", "\n="]
FINE = ["-5", "+3.5", "-1e-3", "a=b", "", "plain", "'quoted'", "ünï", "1,5", "a\nb"]


def test_formulas_are_quoted_and_come_back(tmp_path):
    frame = pd.DataFrame({"eid": EVIL + FINE, "=x": [1.0] * len(EVIL + FINE)}).set_index("eid")
    files.write_table(frame, tmp_path / "t.csv")
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as f:
        rows = list(csv.reader(f))
    assert rows[0] == ["eid", "'=x"]
    cells = [row[0] for row in rows[1:]]
    assert all(cell.startswith("'") for cell in cells[: len(EVIL)])
    assert cells[len(EVIL) :] == FINE
    assert [files.unquoted(cell) for cell in cells] == EVIL + FINE
    assert len(set(cells)) == len(cells)


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


def started(path, n=3):
    journal = files.Journal(path, WORK)
    for unit in UNITS[:n]:
        journal.add(unit)
    return journal


def same(a, b):
    arrays = zip(a, b, strict=True)
    return all(
        x["eids"] == y["eids"] and x["logits"].tobytes() == y["logits"].tobytes() for x, y in arrays
    )


def test_a_journal_gives_back_what_it_was_given(tmp_path, capsys):
    path = tmp_path / "x" / ".j"
    journal = started(path, 2)
    assert same(journal, UNITS[:2])
    again = files.Journal(path, WORK, "studies")
    assert again.n == 2 and same(again, UNITS[:2])
    assert capsys.readouterr().out == "going on after 2 studies done before\n"
    again.add(UNITS[2])
    assert same(files.Journal(path, WORK), UNITS)
    again.delete()
    assert not path.exists() and files.Journal(path, WORK).n == 0


def test_a_last_line_that_broke_off_is_dropped(tmp_path, capsys):
    whole = started(tmp_path / ".j").path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path = tmp_path / ".cut"
        path.write_bytes(whole[:cut])
        journal = files.Journal(path, WORK)
        n = max(0, sum(cut >= end for end in ends) - 1)
        assert journal.n == n and same(journal, UNITS[:n])
        for unit in UNITS[n:]:
            journal.add(unit)
        assert path.read_bytes() == whole
    assert "anew" not in capsys.readouterr().out


def changed_digit(lines):
    lines[2] = re.sub(r"(n\W+)3", r"\g<1>4", lines[2])


def changed_array(lines):
    lines[1] = lines[1].replace("zczMPQ", "zczMPA")  # the base64 of 0.1


def nan(lines):
    lines[2] = re.sub(r"(n\W+)3", r"\1NaN", lines[2])


def renumbered(lines):
    chain, n, unit = json.loads(lines[3])
    lines[3] = json.dumps([chain, n + 1, unit]) + "\n"


FAULTS = {
    "a changed digit": changed_digit,
    "a changed number of an array": changed_array,
    "NaN": nan,
    "another count": renumbered,
    "a line twice": lambda lines: lines.insert(2, lines[1]),
    "the last line twice": lambda lines: lines.append(lines[-1]),
    "a line missing": lambda lines: lines.pop(1),
    "lines swapped": lambda lines: lines.insert(1, lines.pop(2)),
    "a line of nothing": lambda lines: lines.insert(2, "\n"),
    "nested without end": lambda lines: lines.insert(2, "[" * 100_000 + "\n"),
    "no JSON": lambda lines: lines.insert(2, "ÿ{\n"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_journal_is_begun_anew(tmp_path, capsys, fault):
    path = started(tmp_path / ".j").path
    lines = path.read_text().splitlines(keepends=True)
    before = list(lines)
    FAULTS[fault](lines)
    assert lines != before
    path.write_text("".join(lines))
    journal = files.Journal(path, WORK)
    assert journal.n == 0 and list(journal) == []
    assert capsys.readouterr().out == ".j is damaged: the work is begun anew\n"
    for unit in UNITS:
        journal.add(unit)
    assert path.read_text() == "".join(before)


@pytest.mark.parametrize("kind", ["link", "dead link", "pipe"])
def test_a_journal_is_written_in_no_other_file(tmp_path, kind):
    """Nor one that is added to: what lies at its name is another file's link, or waits for ever."""
    other, path = tmp_path / "precious", tmp_path / ".j"
    if kind != "dead link":
        other.write_text("1\n2\n")
    path.symlink_to(other) if "link" in kind else os.mkfifo(path)
    assert same(started(path), UNITS) and path.is_file() and not path.is_symlink()
    path.unlink()
    path.symlink_to(other) if "link" in kind else os.mkfifo(path)
    with files.open_to_add(path) as f:
        f.write(b"a")
    assert path.read_text() == "a" and not path.is_symlink()
    assert not other.exists() if kind == "dead link" else other.read_text() == "1\n2\n"


def test_a_journal_of_other_work_is_not_used(tmp_path, capsys):
    path = started(tmp_path / ".j").path
    assert files.Journal(path, WORK | {"precision": "bf16"}).n == 0
    assert "is of other work" in capsys.readouterr().out
    assert files.Journal(path, WORK).n == 0  # the old units are gone


# ------------------------------------------------------------------------------------------- locks

HOLD = """
import sys
from concurrent.futures import ThreadPoolExecutor
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


def test_work_ahead_keeps_its_order():
    with ThreadPoolExecutor(3) as pool:
        assert list(map_ahead(pool, lambda x: x * x, range(20), 4)) == [x * x for x in range(20)]


def test_work_ahead_stops_with_its_consumer():
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


def test_a_journal_is_one_process_alone(tmp_path):
    path = tmp_path / ".j"
    with files.open_journal(path, WORK) as journal:
        journal.add(UNITS[0])
        line = [sys.executable, "-c", OPEN, str(path), json.dumps(WORK)]
        found = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        assert "another process is using" in found.stderr
    with files.open_journal(path, WORK) as journal:
        assert same(journal, UNITS[:1])
    assert os.listdir(tmp_path) == [".j"]


OPEN = """
import json, sys
from echofocus_core.base.files import open_journal
with open_journal(sys.argv[1], json.loads(sys.argv[2])):
    pass
"""


LIMITS = [(50, "journal"), (500, "journal"), (1400, "log"), (2000, "table.csv")]
FULL = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from echofocus_core.base import console, files

def main():
    files.Journal("journal", {}).add("x" * 1000)
    with files.open_to_add(Path("log")) as f:
        f.write(b"x" * 1500)
    with files.atomic_path("table.csv") as path:
        path.write_text("x" * 5000)

console.run_main(main, "echofocus.py")
"""


@pytest.mark.parametrize(("size", "name"), LIMITS)
def test_a_disk_without_room_names_the_file_and_what_to_do(tmp_path, size, name):
    """A write that fails knows no name: of a journal as it begins and grows, of a log, a table."""
    line = [sys.executable, "-c", FULL, str(size)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    expected = f"File too large: '{name}'; make room there, the same command goes on from here\n"
    assert done.returncode == 1 and done.stderr == f"echofocus.py: error: [Errno 27] {expected}"


def test_no_memory_for_threads_is_said():
    """Python would wait for ever for a thread that finds no memory to begin in."""
    code = """
import resource, sys
from echofocus_core.base.console import Threads, run_main
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20),) * 2)
run_main(lambda: Threads(1).submit(print, "one began").result(), "p")
run_main(lambda: Threads(8), "p")
"""
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1 and done.stdout == "one began\n"
    assert done.stderr.startswith("p: error: the memory is full") and done.stderr.count("\n") == 1


BAR = """
from echofocus_core.base import console

def main():
    bar = console.progress(total=9, desc="bar", leave=False)
    raise console.UserError(f"no {bar.n}")

console.run_main(main, "p")
"""


def test_an_error_amid_a_bar_is_on_a_line_of_its_own():
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", BAR], env=env, capture_output=True)
    *_, bar, last = done.stderr.decode().strip().split("\n")
    assert "bar" in bar and last == "p: error: no 0"


def test_the_home_folder_in_typed_paths(monkeypatch):
    """What a shell leaves: `--out=~/x`, and in quotes."""
    from echofocus_core.base.console import Parser

    monkeypatch.setenv("HOME", "/h")
    parser = Parser()
    parser.add_argument("--out")
    parser.add_argument("--other")
    found = parser.parse_args(["--out=~/a b", "--other", "~/c"])
    assert vars(found) == {"out": "/h/a b", "other": "/h/c"}
    assert parser.parse_args(["--out", "~x"]).out == "~x"


def test_a_table_in_a_folder_called_tilde(tmp_path, monkeypatch):
    """pandas would take it for the home folder, and leave the half-written table there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    files.write_table(pd.DataFrame({"a": [1]}), "~/t.csv")
    assert (tmp_path / "~" / "t.csv").is_file() and not os.listdir(tmp_path / "home")
