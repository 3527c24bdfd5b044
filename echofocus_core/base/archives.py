"""Zip archives and folders with a model in them: judged as a whole, then only what a model needs.

What is sent is not trusted: nothing is written before everything that the archive claims was seen.
"""

import contextlib
import errno
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

from echofocus_core.base.checkpoints import CHUNK, WeightsError, check_bytes, is_zip, load_safely
from echofocus_core.base.console import UserError, printable, some

CHECKPOINTS = ("best_checkpoint.pt", "last_checkpoint.pt", "panecho.pt")
USED = (CHECKPOINTS[0], CHECKPOINTS[2])  # a model folder has one of them
TABLES = ("train_args.csv", "train_losses.csv", "split.csv", "run.json")
TEXTS = re.compile(r"(README|LICEN[SC]E|NOTICE|CITATION)[\w-]*(\.(md|txt|cff))?", re.IGNORECASE)
MOST_FILES = 1000
MOST_SHRUNK = 100  # weights hardly compress, tables do; an archive that holds more is a bomb


@dataclass
class Member:
    """A member of a folder or zip, nothing of which is unpacked yet."""

    name: str
    size: int  # bytes, unpacked, as claimed
    kind: str  # file, folder, or what else it is
    open: Callable


@contextlib.contextmanager
def open_members(asset):
    """Yields the members of a folder or zip, one at a time."""
    if asset.is_dir():
        yield map(folder_member, sorted(asset.iterdir()))
    else:
        check_directory(asset)
        with zipfile.ZipFile(asset) as archive:
            yield (zip_member(archive, info) for info in archive.infolist())


def folder_member(path):
    about = path.lstat()
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder"}
    kind = kinds.get(stat.S_IFMT(about.st_mode), "a link or device")
    return Member(
        path.name, about.st_size if kind == "file" else 0, kind, partial(open, path, "rb")
    )


def zip_member(archive, info):
    form = stat.S_IFMT(info.external_attr >> 16)
    kind = "folder" if info.is_dir() else "file"
    if form not in (0, stat.S_IFREG, stat.S_IFDIR):
        kind = "a link or device"
    return Member(info.orig_filename, info.file_size, kind, partial(archive.open, info))


def check_directory(path):
    """Refuse a zip whose directory alone, which zipfile reads whole, holds too many members."""
    with open(path, "rb") as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - 65557))
        tail = f.read()
    end = tail.rfind(b"PK\x05\x06")
    if end >= 0 and int.from_bytes(tail[end + 12 : end + 16], "little") > MOST_FILES * 1024:
        raise WeightsError(f"it holds more than {MOST_FILES} files")


def is_model_file(path):
    """Whether a file is what torch.save wrote: a zip of data.pkl first, or a pickle."""
    if not is_zip(path):
        return path.suffix in (".pt", ".pth")
    with open(path, "rb") as f:
        header = f.read(30)
        name = f.read(int.from_bytes(header[26:28], "little"))
    return re.fullmatch(rb"[^/]*/data\.pkl", name) is not None


def model_file_name(path):
    saved = load_safely(path)
    return USED[1] if isinstance(saved, dict) and "weights" in saved else USED[0]


def refuse_other_forms(path):
    """What is neither a zip nor a model file, by its first bytes."""
    with open(path, "rb") as f:
        start = f.read(512)
    if start.lstrip()[:1] == b"<":
        raise WeightsError("it is a web page: check the address")
    if start[:2] == b"\x1f\x8b" or start[257:262] == b"ustar":
        raise WeightsError("it is a tar archive; unpack it, then give the folder")
    if not is_zip(path):
        raise WeightsError("it is no .zip or .pt file, or damaged: fetch it again")


def checked_members(members, packed):
    """The files of an archive, as (path, member); what no honest archive holds is refused.

    packed: the archive's bytes, 0 for a folder of one's own. Nothing is written before: not a path
    that leads elsewhere, a link, a device, two of a name, or more bytes or members than a model
    has, whatever kind they are of.
    """
    files, names, total = [], set(), 0
    for n, member in enumerate(members, 1):
        name, shown = member.name, repr(member.name[:100])
        parts = PurePosixPath(name).parts
        odd = name.startswith("/") or ".." in parts or ":" in name or "\\" in name or not parts
        if packed and (odd or not name.isprintable()):
            raise WeightsError(f"{shown} in it leads out of the folder")
        if member.kind not in ("file", "folder"):
            raise WeightsError(f"{shown} in it is {member.kind}")
        key = "/".join(parts).casefold()  # some disks take A and a for one name
        if key in names:
            raise WeightsError(f"it holds {shown} twice")
        names.add(key)
        total += member.size
        check_bytes(total, "it")
        if packed and total > packed * MOST_SHRUNK + CHUNK:
            raise WeightsError(f"it unpacks to more than {MOST_SHRUNK} times its size")
        if n > MOST_FILES:
            raise WeightsError(f"it holds more than {MOST_FILES} files")
        if member.kind == "file" and parts[0] != "__MACOSX" and not parts[-1].startswith("."):
            files.append((PurePosixPath(*parts), member))
    return files


def table_name(name):
    """Which of TABLES a file is, whatever stands before; None when it is none."""
    return next((table for table in TABLES if name.casefold().endswith(table)), None)


def is_kept(name):
    return name in (*CHECKPOINTS, *TABLES) or TEXTS.fullmatch(name) is not None


def model_home(files, fits):
    """The folder in an archive that holds the model; of several the one that fits the name."""
    homes = sorted({str(path.parent) for path, *_ in files if path.name in USED})
    fitting = [home for home in homes if fits(home)] if len(homes) > 1 else homes
    if len(fitting) != 1:
        held = some(homes or [path for path, *_ in files], 5)[:300] or "nothing"
        raise WeightsError(
            f"it holds {'several models' if homes else f'no {USED[0]}'} (but {held})"
        )
    return fitting[0]


def unpack(asset, folder, shown, fits):
    """Write what a model folder needs of an asset into `folder`; returns the names of the others.

    shown: the asset's name in messages. fits: whether a folder's name is that of the model, for an
    archive of several. Raises WeightsError.
    """
    try:
        if asset.is_file() and is_model_file(asset):
            shutil.copyfile(asset, folder / model_file_name(asset))
            return []
        if table := table_name(shown):
            shutil.copyfile(asset, folder / table)
            return []
        if asset.is_file():
            refuse_other_forms(asset)
        with open_members(asset) as members:
            files = checked_members(members, asset.stat().st_size if asset.is_file() else 0)
            home, others = model_home(files, fits), []
            for path, member in files:
                if str(path.parent) == home and is_kept(path.name):
                    write_member(member, folder / path.name)
                else:
                    others.append(printable(path)[:100])
        return others
    except UserError as error:
        raise WeightsError(
            f"{shown} was refused: {str(error).replace(str(asset), shown)}"
        ) from error
    except Exception as error:  # whatever a damaged archive makes the readers raise
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # no place before the start
            raise
        reason = printable(error)[:100] or type(error).__name__
        raise WeightsError(
            f"{shown} cannot be unpacked ({reason}): it is damaged; fetch it again"
        ) from error


def write_member(member, path):
    with member.open() as incoming, open(path, "xb") as out:
        shutil.copyfileobj(incoming, out, CHUNK)
        if out.tell() != member.size:
            raise EOFError(f"{path.name} ends early")
        out.flush()
        os.fsync(out.fileno())
