"""Files that torch.save wrote, read without trust: no code of theirs runs, damage is noticed.

torch.load compares no checksum, and its reader takes a zip archive more loosely than others do. So
the archive must be laid out as torch.save lays it out, each record must have the CRC-32 that was
recorded for it, and only then its tensors are read, through torch's reader of weights.
"""

import io
import os
import struct
import warnings
import zlib
from dataclasses import dataclass

import torch

from echofocus_core.base.console import UserError
from echofocus_core.base.files import atomic_path, kept_errors
from echofocus_core.base.pickles import MOST_PICKLE, STAND_INS, Unsafe, check_pickle, numpys_own

MOST_BYTES = 8 << 30  # of a file, and of what an archive unpacks to; the released are below 1 GB
MOST_RECORDS = 100_000
OLD_PICKLES = 5  # a magic number, a version, a machine, the tensors, the names of their storages
CHUNK = 1 << 20


class WeightsError(UserError):
    """A model file that cannot be had or used; the message names the file and the remedy."""


class Damaged(Exception):
    """What is wrong with an archive, to be completed by its name and the remedy."""


def save(saved, path):
    """Write a checkpoint whole or not at all. Raises OSError.

    Through a file of Python's: torch's own names the temporary file in the archive.
    """
    with atomic_path(path) as temporary, kept_errors(temporary) as f:
        torch.save(saved, f)


def check_like(given, own):
    """Raise ValueError unless two values are of a kind: types, names, lengths, shapes, all finite.

    Dicts and lists are looked into; a whole number will do for another one.
    """
    if isinstance(own, torch.Tensor):
        good = describe(given) == tuple(own.shape) and bool(given.isfinite().all())
    elif isinstance(own, dict):
        good = isinstance(given, dict) and given.keys() == own.keys()
        for key in own if good else ():
            check_like(given[key], own[key])
    elif isinstance(own, list):
        good = isinstance(given, list) and len(given) == len(own)
        for pair in zip(given, own, strict=True) if good else ():
            check_like(*pair)
    elif type(own) in (int, float):
        good = type(given) in (int, float) and given == given
    else:
        good = type(given) is type(own)
    if not good:
        raise ValueError("it does not hold what this program saved")


def load_safely(path):
    """What torch.save wrote, read without running anything in it.

    Raises WeightsError for a file that is damaged or no such file, naming what a refused one would
    have imported.
    """
    try:
        size = path.stat().st_size if path.is_file() else 0
        check_bytes(size, path)
        if size and is_zip(path):
            check_records(path)
        else:
            check_old(path)
        stand_ins = [(value, name) for name, value in STAND_INS.items()]
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of what the file holds
            saved = numpys_own(torch.load(path, map_location="cpu", weights_only=True))
        if not is_zip(path):
            print(f"{path}: in torch's old format, without checksums: damage would go unnoticed")
        return saved
    except (WeightsError, PermissionError):
        raise
    except FileNotFoundError as error:
        raise WeightsError(f"no checkpoint {path}") from error
    except Damaged as error:
        raise WeightsError(
            f"{path} is damaged, or was made to deceive ({error}); it was refused: restore it from "
            "a backup, download it again, or train again"
        ) from error
    except Exception as error:  # whatever a file that is no checkpoint makes the reader raise
        detail = error if isinstance(error, Unsafe) else "damaged, or not a checkpoint at all"
        raise WeightsError(f"{path} cannot be read safely and was refused: {detail}") from error


def check_old(path):
    """Walk the pickles that begin a file of torch's old format. Raises as `check_pickle`."""
    with open(path, "rb") as f:
        for _ in range(OLD_PICKLES):
            check_pickle(f)
            if not f.read(1):
                break
            f.seek(-1, os.SEEK_CUR)


# ----------------------------------------------------------------------------------------- archive


def is_zip(path):
    """By its first bytes, as torch.load decides."""
    with open(path, "rb") as f:
        return f.read(4) == b"PK\x03\x04"


@dataclass
class Record:
    """An archive's entry for a file: where it begins, how long it is and its CRC-32."""

    name: bytes
    start: int  # of its header
    size: int
    crc: int


def check_records(path):
    """Raise Damaged unless a file is laid out as torch.save does and every record has its CRC-32.

    The layout (PKWARE's APPNOTE 6.3): stored records one after the other from the first byte,
    each named once; the directory; its end, in the last bytes. Nothing in it may be read in two
    ways, since torch's reader is not this one.
    """
    with open(path, "rb") as f:
        size = f.seek(0, os.SEEK_END)
        n, length, directory = read_end(f, size)
        f.seek(directory)
        records = read_directory(f.read(length), n)
        names = {record.name.lower() for record in records}  # torch's reader takes A and a for one
        if len(names) < len(records):
            raise Damaged("it holds a record twice")
        ends = [record.start for record in records[1:]] + [directory]
        end = 0
        for record, limit in zip(records, ends, strict=True):
            if not end <= record.start < limit or (end == 0) != (record.start == 0):
                raise Damaged("its records overlap")
            end = check_record(f, record)
            if end > limit:
                raise Damaged("its records overlap")
            if record.name.lower().endswith(b"data.pkl"):  # which torch reads as <first folder>/...
                f.seek(end - record.size)
                check_pickle(io.BytesIO(f.read(min(record.size, MOST_PICKLE + 1))))


def read_end(f, size):
    """(number of records, bytes of the directory, where it begins) by the last bytes of a zip."""
    f.seek(max(0, size - 98))
    tail = f.read(98).rjust(98, b"\0")
    sign, *disks, n, n_again, length, start, comment = struct.unpack("<IHHHHIIH", tail[-22:])
    if sign != 0x06054B50 or any(disks) or comment:
        raise Damaged("its end is missing")
    end = size - 22
    if tail[-42:-38] == b"PK\x06\x07":
        *disks, end, _ = struct.unpack("<IQI", tail[-38:-22])
        if end != size - 98 or tail[:4] != b"PK\x06\x06":
            raise Damaged("its end contradicts itself")
        short = n, n_again, length, start
        n, n_again, length, start = struct.unpack("<QQQQ", tail[24:56])
        saturated = (min(n, 0xFFFF), min(n, 0xFFFF), min(length, 2**32 - 1), min(start, 2**32 - 1))
        if short != saturated:
            raise Damaged("its end contradicts itself")
    if n != n_again or not 0 < n <= MOST_RECORDS or length > n * 1024 or start + length != end:
        raise Damaged("its directory is not where it should be")
    return n, length, start


def read_directory(data, n):
    """The n records that a zip's directory lists, in its order."""
    records, at = [], 0
    for _ in range(n):
        if data[at : at + 4] != b"PK\x01\x02" or len(data) < at + 46:
            raise Damaged("its directory is cut short")
        (
            _,
            _,
            flags,
            method,
            _,
            _,
            crc,
            packed,
            size,
            n_name,
            n_extra,
            n_comment,
            disk,
            _,
            _,
            start,
        ) = struct.unpack("<HHHHHHIIIHHHHHII", data[at + 4 : at + 46])
        name = data[at + 46 : at + 46 + n_name]
        extra = data[at + 46 + n_name : at + 46 + n_name + n_extra]
        at += 46 + n_name + n_extra + n_comment
        if 2**32 - 1 in (size, packed, start):
            size, packed, start = long_values(extra, size, packed, start)
        if method or packed != size:
            raise Damaged("its records are compressed, which torch.save never does")
        if flags & 0x2041 or disk or n_comment or not name or b"\0" in name:
            raise Damaged("its directory holds what torch.save never writes")
        records.append(Record(name, start, size, crc))
    if at != len(data):
        raise Damaged("its directory is longer than its records")
    return records


def long_values(extra, *values):
    """Sizes of 4 GB and more, which stand in the first block of a record's extra field."""
    n = sum(value == 2**32 - 1 for value in values)
    if len(extra) < 4 + 8 * n or struct.unpack("<HH", extra[:4]) != (1, 8 * n):
        raise Damaged("its directory holds what torch.save never writes")
    long = iter(struct.unpack(f"<{n}Q", extra[4 : 4 + 8 * n]))
    return [next(long) if value == 2**32 - 1 else value for value in values]


def check_record(f, record):
    """Compare a record's own header and bytes with the directory; returns where it ends."""
    f.seek(record.start)
    header = f.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04" or header[8:10] != b"\0\0":
        raise Damaged("a record is not where its directory says")
    n_name, n_extra = struct.unpack("<HH", header[26:])
    if f.read(n_name) != record.name:
        raise Damaged("a record is not where its directory says")
    f.seek(n_extra, os.SEEK_CUR)
    left, crc = record.size, 0
    while left:
        chunk = f.read(min(left, CHUNK))
        if not chunk:
            raise Damaged("a record is cut short")
        crc = zlib.crc32(chunk, crc)
        left -= len(chunk)
    if crc != record.crc:
        name = record.name.decode("ascii", "replace")[:60]
        raise Damaged(f"the bytes of {ascii(name)[1:-1]} do not have their checksum")
    return f.tell()


def check_bytes(n, what):
    if n > MOST_BYTES:
        raise WeightsError(f"{what} holds more than {MOST_BYTES >> 30} GB and was refused")


# ----------------------------------------------------------------------------------------- tensors


def load_strictly(model, state, path, kind):
    """Load `state` into `model`, made on the meta device; float32 whatever the file has.

    What the model counts in whole numbers (batches, by batch normalisation) begins anew.

    Raises WeightsError for every missing, unexpected or misshapen name, for what is no plain
    tensor of floating-point numbers, and for numbers that are not finite.
    """
    own = {k: tuple(v.shape) for k, v in model.state_dict().items() if v.is_floating_point()}
    given = {k: describe(v) for k, v in state.items()}
    wrong = [f"missing {k}" for k in own if k not in given]
    wrong += [f"unexpected {ascii(str(k))[1:-1][:60]}" for k in given if k not in own]
    wrong += [f"{k} is {given[k]}, not {own[k]}" for k in own if k in given and own[k] != given[k]]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise WeightsError(f"{path} does not fit {kind}: {'; '.join(wrong[:5])}{more}")
    model.load_state_dict({k: v.detach().to(torch.float32) for k, v in state.items()}, assign=True)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise WeightsError(
                f"{path} holds NaN or infinite weights ({name}): damaged, or of a training that "
                "diverged; nothing can be predicted with it"
            )


def describe(value):
    """The shape of a plain tensor of floating-point numbers; of anything else what it is."""
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested
    if not plain or not value.is_floating_point():
        return f"a tensor of {value.dtype} on {value.device.type}, {value.layout}"
    return tuple(value.shape)
