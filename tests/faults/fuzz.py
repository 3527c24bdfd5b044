"""A coverage-guided fuzzer over the parsers that are our own; needs the package atheris.

    python -m tests.faults.fuzz tables -max_total_time=60        # or checkpoints, containers, ...

What a parser may raise is what its callers catch; anything else is a finding, as are a crash and
what takes too long (libFuzzer's -timeout). It begins with a whole file.
"""

import contextlib
import io
import os
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from tests.faults.worker import ROOT

sys.path.insert(0, str(ROOT))


def tables(data, path):
    """common/tables.py: delimiters, encodings, quotes, numbers."""
    from echofocus_core.base.console import Collected, UserError
    from echofocus_core.base.tables import read_table, to_numbers

    path.write_bytes(data)
    try:
        table = read_table(path, Collected())
        to_numbers(table, path, Collected())
    except UserError:
        pass


def checkpoints(data, path):
    """common/checkpoints.py: the layout of torch.save's archive."""
    from echofocus_core.base.checkpoints import Damaged, check_records

    path.write_bytes(b"PK\x03\x04" + data)
    with contextlib.suppress(Damaged):
        check_records(path)


def pickles(data, path):
    """common/pickles.py: the walk of a pickle and numpy's stand-ins, then torch's reader of it."""
    from echofocus_core.base.checkpoints import WeightsError, load_safely

    with zipfile.ZipFile(path, "w") as f, zipfile.ZipFile(io.BytesIO(archive())) as whole:
        for name in whole.namelist():
            f.writestr(name, data if name.endswith("data.pkl") else whole.read(name))
    with contextlib.suppress(WeightsError):
        load_safely(path)


def studies(data, path):
    """embed/store.py and common/hdf5.py: a study's file, its numbers, texts and heaps."""
    from echofocus_core.base.hdf5 import UNREADABLE, open_hdf5
    from echofocus_core.video.store import describe, read_details

    path.write_bytes(data)
    with contextlib.suppress(*UNREADABLE), open_hdf5(path) as f:
        describe(f)(0)
    read_details(path)


def containers(data, path):
    """embed/containers.py: the boxes of AVI, MP4, MKV and WMV."""
    from echofocus_core.video.containers import is_cut_short

    path.write_bytes(data)
    is_cut_short(path)


def fragments(data, path):
    """embed/frames.py and dicom.py: headers, offset tables, fragments of pixel data."""
    from echofocus_core.video.dicom import check_cine, open_dicom
    from echofocus_core.video.errors import VideoError

    path.write_bytes(bytes(128) + b"DICM" + data)
    try:
        with open_dicom(path) as (header, file):
            check_cine(header, file, [])
    except (VideoError, OSError):
        pass


def journals(data, path):
    """common/files.py: the lines of a journal."""
    from echofocus_core.base.files import Journal

    path.write_bytes(b'{"work": {}, "sha256": "' + data)
    list(Journal(path, {}))


def options(data, path):
    """common/schema.py: the config."""
    from echofocus_core.base.console import UserError
    from echofocus_core.study.config import read_config

    path.write_bytes(data)
    with contextlib.suppress(UserError):
        read_config(path)


PARSERS = [tables, checkpoints, pickles, studies, containers, fragments, journals, options]
PARSERS = {f.__name__: f for f in PARSERS}
AHEAD = {"checkpoints": 4, "fragments": 132, "journals": len('{"work": {}, "sha256": "')}


def archive():
    saved = io.BytesIO()
    names = {"a": torch.arange(3.0), "b": np.arange(2), "c": np.float64(1.5), "d": ["e", None]}
    torch.save({"model_state_dict": names, "echofocus": {"seed": 1}}, saved)
    return saved.getvalue()


def whole_file(parser, path):
    """A file that the parser takes, less what its target writes ahead of it."""
    from echofocus_core.base.files import Journal
    from echofocus_core.video.store import FileRecord, write_study

    fixtures = ROOT / "tests" / "fixtures"
    if parser == "pickles":
        with zipfile.ZipFile(io.BytesIO(archive())) as f:
            return f.read("archive/data.pkl")
    if parser == "studies":
        path.unlink(missing_ok=True)
        videos = {"a.avi": (np.zeros(1, int), np.ones((1, 1, 768), np.float32))}
        write_study(path, videos, {"clip_len": 16}, {"a.avi": FileRecord()})
        return path.read_bytes()
    if parser == "journals":
        path.unlink(missing_ok=True)
        journal = Journal(path, {})
        for unit in ({"eid": "s1", "n": 2}, {"answers": np.arange(3.0)}):
            journal.add(unit)
    data = {
        "tables": lambda: b'pid,eid,"a b"\n1,2,3\n"1",,x\n',
        "checkpoints": archive,
        "containers": (fixtures / "videos" / "h264.mp4").read_bytes,
        "fragments": (fixtures / "dicom" / "jpeg_ybr_labelled_rgb.dcm").read_bytes,
        "journals": path.read_bytes,
        "options": lambda: b'{"task": {"a": {"task_labels": ["b"]}}, "dataset": {}}',
    }[parser]()
    return data[AHEAD.get(parser, 0) :]


def main():
    try:
        import atheris
    except ImportError:
        print("skipped: the fuzzer needs atheris (pip install atheris)")
        return
    name = sys.argv.pop(1)
    folder = tempfile.TemporaryDirectory()
    path, corpus = Path(folder.name, "file"), Path(folder.name, "corpus")
    with atheris.instrument_imports(include=["common", "embed"]):
        PARSERS[name](b"", path)
    corpus.mkdir()
    (corpus / "whole").write_bytes(whole_file(name, path))
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    files = [x for x in sys.argv[1:] if not x.startswith("-")]  # a finding, to see it again
    atheris.Setup(
        sys.argv + ([] if files else [str(corpus)]), lambda data: PARSERS[name](data, path)
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
