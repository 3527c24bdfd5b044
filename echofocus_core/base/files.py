"""Files: written whole or not at all, tables, journals of long work, locks, digests."""

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import socket
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import filelock
import numpy as np

from echofocus_core.base.console import NO_ROOM, UserError

# ---------------------------------------------------------------------------------- atomic writing

TEMPORARY = re.compile(r"\..+\.(?P<place>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.tmp(\.\w+)?")
ABANDONED = 7 * 86400  # seconds after which a temporary file of another machine is nobody's


def machine():
    """Eight digits that tell apart machines, and containers on them: where a pid means something.

    A digest, so that no machine's name stands in a folder that is shared.
    """
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        namespace = ""
    return hashlib.sha256(f"{socket.gethostname()}|{namespace}".encode()).hexdigest()[:8]


@contextmanager
def named_where_full(path, temporary=None):
    """In the block, a disk without room, which a write alone says without a name, is of this file.

    `temporary` is a name that nobody knows.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM and error.filename in (None, temporary and str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def atomic_path(path):
    """A temporary path to write; it becomes `path` when the block ends, and vanishes on error.

    Raises UserError, before anything is written, where `path` is a folder, a pipe or a device.
    """
    path = Path(path)
    refuse_special(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_once(path.parent.absolute())
    temporary = temporary_path(path)
    try:
        with named_where_full(path, temporary):
            yield temporary
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path):
    """A name beside `path` that `clear_leftovers` knows, should this process be killed."""
    own = f"{machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    # The suffix stays, since writers choose a format by it; the stem is cut to what a name may be.
    return path.with_name(f".{path.stem[:50]}.{own}.tmp{path.suffix}")


@cache
def clear_once(folder):
    """`clear_leftovers`, the first time that this process writes into the folder."""
    clear_leftovers(folder)


def clear_leftovers(folder):
    """Delete what lies at a `temporary_path` in a folder and whose writers were killed.

    Those of processes that live, here or on another machine, stay.
    """
    for path in Path(folder).glob(".*.tmp*"):
        if not (match := TEMPORARY.fullmatch(path.name)):
            continue
        with contextlib.suppress(FileNotFoundError):  # its writer has just finished
            if match["place"] == machine():
                left = not is_alive(int(match["pid"]))
            else:
                left = time.time() - path.stat().st_mtime > ABANDONED
            if left and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif left:
                path.unlink()


def is_alive(pid):
    """Whether a process of this machine runs; True where one cannot ask."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


class Kept(io.FileIO):
    """A file that keeps its first error and takes no more.

    With `reads_back` the first error is also raised, once, while `raises`; and what is written
    after it goes into memory, where it is found: HDF5 must end its work, and crashes the
    interpreter over what it has written and does not read back.
    """

    def __init__(self, path, mode, reads_back=False):
        super().__init__(path, mode)
        self.error, self.reads_back, self.raises, self.lost = None, reads_back, reads_back, {}

    def write(self, data):
        data, at, done = memoryview(data).cast("B"), self.tell(), 0
        try:
            while done < len(data) and not self.error:
                done += super().write(data[done:])
        except OSError as error:
            self.error = error
            if self.raises:
                self.keep(at, data)
                raise
        if self.error:
            self.keep(at, data)
        return len(data)

    def keep(self, at, data):
        if self.reads_back:
            self.lost.pop(at, None)  # the last is the last to be read
            self.lost[at] = bytes(data)
            self.seek(at + len(data))

    def readinto(self, buffer):
        at, n = self.tell(), super().readinto(buffer)
        if not self.lost:
            return n
        view = memoryview(buffer).cast("B")
        view[n:] = bytes(len(view) - n)
        for start, data in self.lost.items():
            first, last = max(start, at), min(start + len(data), at + len(view))
            if first < last:
                view[first - at : last - at] = data[first - start : last - start]
        self.seek(at + len(view))
        return len(view)

    def seek(self, offset, whence=os.SEEK_SET):
        end = super().seek(offset, whence)
        if whence == os.SEEK_END and self.lost:
            end = super().seek(max(end, *(at + len(data) for at, data in self.lost.items())))
        return end

    def truncate(self, size=None):
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size


@contextmanager
def kept_errors(path, mode="w+b", reads_back=False):
    """A file for a library that writes it and has no word for a full disk: yields a `Kept`.

    Raises OSError in the end, with the system's reason, where something could not be written.
    """
    with Kept(path, mode, reads_back) as file:
        try:
            yield file
        except Exception:  # a library that reads back what was never written
            if not file.error:
                raise
        if file.error:
            raise OSError(file.error.errno, file.error.strerror, str(path))


def refuse_special(path, option=""):
    """UserError for a path to write that is a folder, or no regular file: a pipe, a device."""
    path, name = Path(path), f"{option} {path}".lstrip()
    if path.is_dir():
        raise UserError(f"{name} is a folder; name the file to write in it")
    if path.exists() and not path.is_file():
        raise UserError(f"{name} is no regular file; name another to write")


def output_path(text, option, what, is_ours):
    """A file name that was typed -> Path. UserError, before any work, where it is a folder, a
    device, or a file that the option did not write: an input, say. See `refuse_others`."""
    path = Path(text)
    if text.endswith(("/", os.sep)):
        raise UserError(f"{option} {text} is a folder; name the file to write in it")
    refuse_special(path, option)
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"{option} {text}: {above.name} is a file; name a file in a folder")
    refuse_others(path, what, is_ours, option)
    return path


def refuse_others(path, what, is_ours, option=""):
    """UserError for a file that would be replaced and is not empty, nor of the kind that is written
    there: no `what`, as `is_ours`, a function of a Path, knows it."""
    if path.is_file() and path.stat().st_size and not is_ours(path):
        name = f"{option} {path}".lstrip()
        raise UserError(f"{name} is there and is no {what}; name another, or move it away")


def begins(pattern):
    """A function: whether the file of a path begins as a regular expression says."""

    def is_so(path):
        with open(path, "rb") as f:
            return re.match(pattern, f.read(4096).decode(errors="replace")) is not None

    return is_so


def in_file_name(text):
    """Text of any kind, such as a column's name, as a part of a file's name."""
    kept = re.sub(r"[^\w .+-]", "_", text)[:40]
    if kept == text:
        return text
    return f"{kept}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


# ------------------------------------------------------------------------------------------ tables

FORMULA = re.compile(r"'*[=+\-@\t\r\n]")  # how a cell begins that a spreadsheet would run


def quoted(text):
    """Text with an apostrophe before it where a spreadsheet would take it for a formula (OWASP).

    Text that is a number stays as it is. `unquoted` takes back what this does.
    """
    if not isinstance(text, str) or not FORMULA.match(text) or is_number(text):
        return text
    return "'" + text


def unquoted(text):
    """The text that `quoted` made `text` of."""
    if isinstance(text, str) and text.startswith("'") and FORMULA.match(text):
        return text[1:]
    return text


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return text == text.strip()


def write_table(frame, path, digits=6):
    """Write a DataFrame (with its index, if that has a name) as CSV: whole or not at all, UTF-8.

    Numbers have so many significant digits; cells that a spreadsheet would run are `quoted`.
    """
    frame = frame if frame.index.name is None else frame.reset_index()
    frame = frame.rename(columns=quoted)
    text = frame.select_dtypes(exclude=["number", "bool"]).map(quoted)
    odd = text.map(lambda cell: isinstance(cell, str) and "\r" in cell).to_numpy().any()
    with atomic_path(path) as temporary:
        frame.assign(**text).to_csv(
            temporary.absolute(),  # pandas takes a folder that is called ~ for another
            index=False,
            float_format=f"%.{digits}g",
            encoding="utf-8",
            lineterminator="\r\n" if odd else "\n",  # csv quotes what is in its line end
        )


# -------------------------------------------------------------------------- files that are added to


def clear_links(path):
    """Delete what is no file of this program's at the name of one: a link, which writing would
    follow to some other file, a pipe."""
    if path.is_symlink() or (path.exists() and not path.is_file() and not path.is_dir()):
        path.unlink()


@contextmanager
def open_to_add(path):
    """A file of this program's own, open to add bytes to; see `clear_links`. Raises OSError, which
    names the file."""
    clear_links(path)
    no_follow = getattr(os, "O_NOFOLLOW", 0)
    opener = lambda name, flags: os.open(name, flags | no_follow, 0o666)  # noqa: E731
    with named_where_full(path), open(path, "ab", opener=opener) as f:
        yield f


# ----------------------------------------------------------------------------------------- journals


@contextmanager
def open_journal(path, work, what="units"):
    """The Journal of a path for the block. UserError when another process is at the same work."""
    with lock(path, timeout=0):
        yield Journal(path, work, what)


class Journal:
    """The finished units of a long piece of work, a line each, so that a stopped run goes on.

    The first line says what the work is: a file of other work is begun anew, as is one in which
    a line is damaged, repeated or missing (each line holds its number and a digest of itself and
    of all before it). A last line that broke off is dropped. Units are JSON; arrays in them come
    back as arrays, to the bit.
    """

    def __init__(self, path, work, what="units"):
        """work: a dict that says all that the results depend on; what: the units, for a person."""
        self.path, self.n = Path(path), 0
        self.chain = digest_of("", encode(work))
        header = json.dumps({"work": json.loads(encode(work)), "sha256": self.chain})
        clear_links(self.path)
        end, fault = self.scan(header)
        if fault:
            print(f"{self.path.name} {fault}: the work is begun anew")
        elif self.n:
            print(f"going on after {self.n} {what} done before")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open_to_add(self.path) as f:
            f.truncate(end)
            if not end:
                f.write(header.encode() + b"\n")

    def scan(self, header):
        """(bytes up to the last good line, what is wrong with the file or '')."""
        if not self.path.is_file():
            return 0, ""
        with open(self.path, "rb") as f:
            first = f.readline()
            if first != header.encode() + b"\n":
                return 0, "is of other work" if first.endswith(b"\n") else ""
            end, start = f.tell(), self.chain
            for line in f:
                if not line.endswith(b"\n"):
                    break
                try:
                    chain, n, unit = json.loads(line)
                    good = n == self.n and chain == digest_of(self.chain, f"{n} {unit}")
                except (ValueError, TypeError, RecursionError):
                    good = False
                if not good:
                    self.n, self.chain = 0, start
                    return 0, "is damaged"
                self.n, self.chain, end = n + 1, chain, f.tell()
        return end, ""

    def add(self, unit):
        """Append a finished unit."""
        text = encode(unit)
        self.chain = digest_of(self.chain, f"{self.n} {text}")
        line = json.dumps([self.chain, self.n, text]) + "\n"
        with open_to_add(self.path) as f:
            f.write(line.encode())
        self.n += 1

    def __iter__(self):
        """The finished units, read from the file one by one."""
        with open(self.path) as f:
            f.readline()
            for _ in range(self.n):
                yield json.loads(json.loads(f.readline())[2], object_hook=decode_array)

    def delete(self):
        """The work is done and its result written."""
        self.path.unlink(missing_ok=True)


def digest_of(before, text):
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()


def encode(thing):
    return json.dumps(thing, default=encode_array)


def encode_array(array):
    if isinstance(array, np.generic):
        return array.item()
    text = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"array": text, "dtype": array.dtype.str, "shape": array.shape}


def decode_array(entry):
    if set(entry) != {"array", "dtype", "shape"}:
        return entry
    numbers = np.frombuffer(base64.b64decode(entry["array"]), np.dtype(entry["dtype"]))
    return numbers.reshape(entry["shape"]).copy()


# -------------------------------------------------------------------------------------------- locks


@contextmanager
def lock(path, timeout=-1):
    """Hold the lock of a path for the block, a file <name>.lock beside it that exists meanwhile.

    timeout: seconds to wait, -1 without limit. Raises UserError when another process keeps it.
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
        raise UserError(
            f"another process is using {path}; wait until it has ended (if no process is running, "
            f"delete {file.name})"
        ) from error


# ---------------------------------------------------------------------------------- digests, seeds


def sha256_file(path):
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_of(*parts):
    """Hex SHA-256 of some values, in order: text, bytes, arrays, and what JSON can hold."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            part = np.ascontiguousarray(part)
        elif isinstance(part, str):
            part = part.encode(errors="surrogatepass")
        elif not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True).encode()
        digest.update(f"|{memoryview(part).nbytes}|".encode())  # so that parts cannot merge
        digest.update(part)
    return digest.hexdigest()


def derive_seed(*parts):
    """A 63-bit seed from anything printable: the same on every machine, no state kept."""
    text = "|".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stamp_of(path):
    """Size and time of a file, which tell whether it is another one; None when it is gone."""
    try:
        about = path.stat()
    except OSError:
        return None
    return [about.st_size, about.st_mtime_ns]


def packed_path(folder):
    """Where a folder of clip embeddings lies in one file, which embed/store.py writes and reads."""
    return folder.with_name(folder.name + ".packed.h5")
