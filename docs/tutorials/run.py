"""Execute the tutorials: `python docs/tutorials/run.py`. Results are in build/tutorials/.

Each notebook has a kernel of this Python; an error in a cell, or a command that fails, ends the run
with status 1. The commands `echofocus` and `echofocus-extract` are those of this repository.
"""

import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SCRIPTS = {"echofocus": "echofocus.py", "echofocus-extract": "embed/extract.py"}


def run(path):
    """Execute a notebook, write it with its results, and return whether it succeeded."""
    start, notebook = time.monotonic(), nbformat.read(path, as_version=4)
    options = {"timeout": 300, "extra_arguments": ["--log-level=ERROR"]}
    client = NotebookClient(notebook, resources={"metadata": {"path": str(HERE)}}, **options)
    try:
        client.execute()
        error = ""
    except CellExecutionError as failure:
        error = str(failure)
    out = ROOT / "build" / "tutorials" / path.name
    out.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, out)
    print(f"{path.stem}: {error or 'ok'} ({time.monotonic() - start:.0f} s)", flush=True)
    return not error


def main():
    with tempfile.TemporaryDirectory() as folder:
        for name, script in SCRIPTS.items():
            command = Path(folder, name)
            command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / script}" "$@"\n')
            command.chmod(0o755)
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(HERE)])
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        with ThreadPoolExecutor(2) as pool:
            longest_first = sorted(HERE.glob("*.ipynb"), key=lambda path: -path.stat().st_size)
            results = list(pool.map(run, longest_first))
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
