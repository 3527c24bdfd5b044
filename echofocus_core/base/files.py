"""Files: atomic writes, tables, journals of long runs, locks, digests."""

import base64
import hashlib
import json
import os
import re
import secrets
from contextlib import contextmanager
from pathlib import Path

import filelock
import numpy as np

from echofocus_core.base.console import UserError, count_of

# ---------------------------------------------------------------------------------- atomic writing


@contextmanager
def atomic_path(path):
    """Yield a temporary path to write; it becomes `path` when the block ends.

    On error it is deleted. Raises OSError, which names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Keep the suffix, since writers choose a format by it.
    temporary = path.with_name(f".{path.stem[:50]}.{secrets.token_hex(8)}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder):
    """Delete what killed runs left half-written in a folder that no other process writes to."""
    for path in Path(folder).glob(".*.tmp*"):
        path.unlink(missing_ok=True)


def output_path(path, what, is_ours):
    """The Path of a file to write. Raises UserError for a folder, and for a file with other
    content, such as an input.

    is_ours: a function of a Path that recognises an earlier output, see `begins`.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file in it")
    if path.is_file() and path.stat().st_size and not is_ours(path):
        raise UserError(f"{path} exists and is not a {what}; name another file, or move this one")
    return path


def begins(pattern):
    """A function of a Path: whether the beginning of the file matches a regular expression."""

    def matches(path):
        with open(path, "rb") as f:
            return re.match(pattern, f.read(4096).decode(errors="replace")) is not None

    return matches


def in_file_name(text):
    """Any text, such as the name of a column, as part of a file name."""
    plain = re.sub(r"[^\w .+-]", "_", text)[:40]
    return text if plain == text else f"{plain}-{sha256_of(text)[:8]}"


def write_table(frame, path, digits=6):
    """Write a DataFrame (and its index, if that has a name) atomically as CSV in UTF-8.

    Numbers have `digits` significant digits; text is written unchanged.
    """
    frame = frame if frame.index.name is None else frame.reset_index()
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False, float_format=f"%.{digits}g", lineterminator="\n")


# ---------------------------------------------------------------------------------------- journals


@contextmanager
def open_journal(path, work):
    """Yield the Journal at `path`. UserError if another process is using it."""
    with lock(path, timeout=0):
        yield Journal(path, work)


class Journal:
    """The finished studies of a long run, one JSON line each, so that a stopped run can resume.

    The first line has a digest of everything that the results depend on; a file with another
    digest is replaced. An incomplete last line is dropped. Arrays are restored exactly.
    """

    def __init__(self, path, work):
        """work: a dict of everything the results depend on."""
        self.path, self.n = Path(path), 0
        self.header = json.dumps({"sha256": sha256_of(encode(work))}).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        end = self.scan() if self.path.is_file() else 0
        if self.n:
            print(f"resuming after {count_of(self.n, 'studies')}")
        with open(self.path, "ab") as f:
            f.truncate(end)
            if not end:
                f.write(self.header)

    def scan(self):
        """Count the complete entries of an earlier run; returns the byte at which they end."""
        with open(self.path, "rb") as f:
            if f.readline() != self.header:
                print(f"{self.path.name} belongs to a different run; starting over")
                return 0
            end = len(self.header)
            for line in f:
                if line.endswith(b"\n"):
                    self.n += 1
                    end += len(line)
        return end

    def add(self, entry):
        """Append a finished entry."""
        with open(self.path, "a") as f:
            f.write(encode(entry) + "\n")
        self.n += 1

    def __iter__(self):
        """The finished entries, read from the file one by one."""
        with open(self.path) as f:
            f.readline()
            for line in f:
                yield json.loads(line, object_hook=decode_array)

    def delete(self):
        """Delete the file; call this when the results have been written."""
        self.path.unlink(missing_ok=True)


def encode(entry):
    return json.dumps(entry, default=encode_array)


def encode_array(array):
    if isinstance(array, np.generic):
        return array.item()
    text = base64.b64encode(np.ascontiguousarray(array)).decode()
    return {"array": text, "dtype": array.dtype.str, "shape": array.shape}


def decode_array(entry):
    if set(entry) != {"array", "dtype", "shape"}:
        return entry
    numbers = np.frombuffer(base64.b64decode(entry["array"]), np.dtype(entry["dtype"]))
    return numbers.reshape(entry["shape"]).copy()


# -------------------------------------------------------------------------------------------- locks


class InUse(UserError):
    """Another process holds a lock."""


@contextmanager
def lock(path, timeout=-1):
    """Hold the lock of a path in the block; a file <name>.lock next to it exists meanwhile.

    timeout: seconds to wait, -1 without limit. Raises InUse if another process holds it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(path.name + ".lock")
    try:
        with filelock.FileLock(file, timeout=timeout):
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
    except filelock.Timeout as error:
        raise InUse(
            f"another process is using {path}; wait until it ends (if no process is running, "
            f"delete {file.name})"
        ) from error


# ---------------------------------------------------------------------------------- digests, seeds


def sha256_file(path):
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_of(*parts):
    """Hex SHA-256 of some values, in order: text, bytes, arrays and JSON values."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            part = np.ascontiguousarray(part)
        elif isinstance(part, str):
            part = part.encode(errors="surrogatepass")
        elif not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True).encode()
        digest.update(f"|{memoryview(part).nbytes}|".encode())  # separates the parts
        digest.update(part)
    return digest.hexdigest()


def derive_seed(*parts):
    """A 63-bit seed from values that str() accepts, the same on every machine."""
    text = "|".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stamp_of(path):
    """[size, modification time] of a file, to detect that it was replaced; None if missing."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def packed_path(folder):
    """The path of the pack of a folder of clip embeddings, see video/store.py."""
    return folder.with_name(folder.name + ".packed.h5")
