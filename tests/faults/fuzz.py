"""A coverage-guided fuzzer over the parsers that are our own; needs the package atheris.

    python -m tests.faults.fuzz tables -max_total_time=60        # or checkpoints, containers, ...

What a parser may raise is what its callers catch; anything else is a finding.
"""

import contextlib
import sys
import tempfile
from pathlib import Path

from tests.faults.worker import ROOT

sys.path.insert(0, str(ROOT))


def tables(data, path):
    """common/tables.py: delimiters, encodings, quotes, numbers."""
    from common.console import Collected, UserError
    from common.tables import read_table, to_numbers

    path.write_bytes(data)
    try:
        table = read_table(path, Collected())
        to_numbers(table, path, Collected())
    except UserError:
        pass


def checkpoints(data, path):
    """common/checkpoints.py: the layout of torch.save's archive."""
    from common.checkpoints import Damaged, check_records

    path.write_bytes(b"PK\x03\x04" + data)
    with contextlib.suppress(Damaged):
        check_records(path)


def containers(data, path):
    """embed/containers.py: the boxes of AVI, MP4, MKV and WMV."""
    from embed.containers import is_cut_short

    path.write_bytes(data)
    is_cut_short(path)


def fragments(data, path):
    """embed/frames.py and dicom.py: headers, offset tables, fragments of pixel data."""
    from embed.dicom import check_cine, open_dicom
    from embed.source import VideoError

    path.write_bytes(bytes(128) + b"DICM" + data)
    try:
        with open_dicom(path) as (header, file):
            check_cine(header, file, [])
    except (VideoError, OSError):
        pass


def journals(data, path):
    """common/files.py: the lines of a journal."""
    from common.files import Journal

    path.write_bytes(b'{"work": {}, "sha256": "' + data)
    list(Journal(path, {}))


def options(data, path):
    """common/schema.py: the config."""
    from common.console import UserError
    from common.schema import read_config

    path.write_bytes(data)
    with contextlib.suppress(UserError):
        read_config(path)


PARSERS = {f.__name__: f for f in (tables, checkpoints, containers, fragments, journals, options)}


def main():
    try:
        import atheris
    except ImportError:
        print("skipped: the fuzzer needs atheris (pip install atheris)")
        return
    parser = PARSERS[sys.argv.pop(1)]
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name, "file")
    with atheris.instrument_imports(include=["common", "embed"]):
        parser(b"", path)
    devnull = open("/dev/null", "w")  # noqa: SIM115
    sys.stdout = devnull
    atheris.Setup(sys.argv, lambda data: parser(data, path))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
