"""Which videos make a study: by folder, by DICOM tag or by a list; and who extracts which.

A Study is a name and its files; everything else follows from that.
"""

import hashlib
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from common.console import UserError, nearest
from common.world import from_environment, place
from embed.video import find_videos, study_uid

try:
    import fcntl
except ImportError:  # Windows: one worker at a time
    fcntl = None

LISTED = 20  # names on one line of the screen
ECHONET_PEDIATRIC = re.compile(r"^([^-]+-[^-]+)-[^-]+$")  # <patient>-<accession>-<n>


@dataclass
class Study:
    """A study's video files, as POSIX paths relative to its folder."""

    name: str
    folder: Path
    videos: list[str]
    missing: list[str] = field(default_factory=list)  # named in a manifest, but not there


def find_studies(source, group="folder", manifests=()):
    """The studies of a source, sorted by name. Raises UserError when there are none.

    group: 'folder' takes each subfolder of `source` with all files below it, or `source` itself
    if it has no such; 'one' takes `source` as one study; 'dicom' goes by StudyInstanceUID,
    wherever the files lie. manifests: CSV files that say it instead, see `read_manifest`.
    """
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; give a study's folder or a folder of them")
    if manifests:
        files = {}
        for manifest in manifests:
            for study, path in read_manifest(Path(manifest), source.resolve()):
                path = Path(os.path.normpath(path))
                files.setdefault(study, []).append(path)
        return [study_of(name, paths) for name, paths in sorted(files.items())]
    videos, others, closed = find_videos(source)
    notes = passed_over(others, closed)
    if not videos:
        found = "".join(f"; {note}" for note in notes)
        raise UserError(f"no video or DICOM file in {source} or below it{found}")
    for note in notes:
        print(note)
    if group == "one":
        return [Study(source.resolve().name, source, videos)]
    if group == "dicom":
        return by_study_uid(source, videos)
    return by_folder(source, videos)


def passed_over(others, closed):
    """Lines for a person: files that are no videos, and subfolders that cannot be read."""
    if closed:
        yield f"{len(closed)} subfolders cannot be read: {listed(closed)}"
    if others:
        kinds = ", ".join(f"{kind} {n}" for kind, n in others.most_common())
        yield f"{others.total()} files are no videos: {kinds}"


def listed(names):
    """The first of them, and how many more."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def by_folder(source, videos):
    loose = [v for v in videos if "/" not in v]
    if len(loose) == len(videos):
        return [Study(source.resolve().name, source, videos)]
    if loose:
        raise UserError(
            f"{source} holds both study folders and loose videos ({loose[0]}, ...): move the loose "
            "ones into a folder of their own study, or say --group one if all is one study"
        )
    studies = {}
    for video in videos:
        name, _, rest = video.partition("/")
        studies.setdefault(name, Study(name, source / name, [])).videos.append(rest)
    folders = sorted(p.name for p in source.iterdir() if p.is_dir() and p.name[0] != ".")
    if without := [name for name in folders if name not in studies]:
        print(f"{len(without)} folders hold no video: {listed(without)}")
    return list(studies.values())


def by_study_uid(source, videos):
    studies, without = {}, []
    for video in videos:
        uid = study_uid(source / video)
        if uid:
            studies.setdefault(uid, []).append(source / video)
        else:
            without.append(video)
    if without:
        raise UserError(
            f"{len(without)} files below {source} have no StudyInstanceUID ({without[0]}, ...); "
            "move them away, or group by folder or manifest"
        )
    return [study_of(uid, paths) for uid, paths in sorted(studies.items())]


def study_of(name, paths):
    """A study from its files' paths; its folder is the deepest that holds them all."""
    if not re.fullmatch(r"[^/\\\0]+", name) or name.startswith("."):
        raise UserError(f"'{name}' cannot be a study's name: it names the output file")
    folder = Path(os.path.commonpath([p.parent for p in paths]))
    there = [p.relative_to(folder).as_posix() for p in paths if p.is_file()]
    missing = [p.relative_to(folder).as_posix() for p in paths if not p.is_file()]
    return Study(name, folder, sorted(set(there)), sorted(set(missing)))


def read_manifest(manifest, source):
    """Yield (study, path) of a CSV list of videos; relative paths start at `source`.

    Known by their columns: study, path; MIMIC-IV-ECHO's record list (study_id, dicom_filepath);
    the FileList of EchoNet-Dynamic (each video a study) and -Pediatric (each accession a study).
    """
    import pandas as pd

    try:
        table = pd.read_csv(manifest, dtype=str)
    except OSError as error:
        raise UserError(f"no manifest {manifest}") from error
    except ValueError as error:
        raise UserError(f"{manifest} is not a CSV table: {error}") from error
    columns = set(table.columns)
    if {"study", "path"} <= columns:
        pairs = table[["study", "path"]]
    elif {"study_id", "dicom_filepath"} <= columns:
        pairs = table[["study_id", "dicom_filepath"]]
    elif "FileName" in columns:
        names = table["FileName"].dropna().str.removesuffix(".avi")
        base = "Videos" if (manifest.parent / "Videos").is_dir() else ""
        files = [str(manifest.parent.resolve() / base / f"{name}.avi") for name in names]
        studies = [m[1] if (m := ECHONET_PEDIATRIC.match(n)) else n for n in names]
        pairs = pd.DataFrame({"study": studies, "path": files})
    else:
        raise UserError(
            f"{manifest} has columns {', '.join(table.columns)}; a manifest has study and path"
            f"{nearest('path', columns)}"
        )
    for row, (study, path) in enumerate(pairs.itertuples(index=False), start=2):
        if not isinstance(study, str) or not isinstance(path, str):
            raise UserError(f"{manifest}, line {row}: study or path is empty")
        yield study.strip(), source / path.strip()


# ------------------------------------------------------------------------------------ many workers


def shard_from(text, environment=os.environ):
    """`--shard i/n` (i from 0) -> (i, n); 'auto' reads torchrun's or SLURM's environment."""
    if text != "auto":
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or int(match[1]) >= int(match[2]):
            raise UserError(f"--shard is i/n with i from 0 to n - 1, not {text}")
        return int(match[1]), int(match[2])
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return place("RANK", "WORLD_SIZE", environment)
    read = partial(from_environment, environment=environment)
    if "SLURM_ARRAY_TASK_ID" in environment:
        index = read("SLURM_ARRAY_TASK_ID", 0) - read("SLURM_ARRAY_TASK_MIN", 0)
        if index < 0:
            raise UserError("SLURM_ARRAY_TASK_ID is below SLURM_ARRAY_TASK_MIN; give --shard i/n")
        return index, max(index + 1, read("SLURM_ARRAY_TASK_COUNT", 1, least=1))
    if "SLURM_NTASKS" in environment and "SLURM_PROCID" in environment:
        return place("SLURM_PROCID", "SLURM_NTASKS", environment)
    return 0, 1


def own_first(studies, index, count):
    """All studies, this worker's share first: what the others leave undone comes after it."""
    return [s for k in range(count) for s in studies[(index + k) % count :: count]]


class Claims:
    """Which studies this process may work on: a byte-range lock each, in one file.

    The system drops the locks of a process that dies, so that nothing is left to clean up and
    nobody has to wait. POSIX locks work across nodes wherever the file system supports them.
    """

    def __init__(self, folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = open(folder / ".claims", "a+b")  # noqa: SIM115 - open as long as the locks
        except OSError as error:
            why = error.strerror
            raise UserError(f"cannot write into {folder}: {why}; choose another folder") from error

    def take(self, name):
        """Whether the study is this process's now; never waits."""
        if fcntl is None:
            return True
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self.position(name))
        except OSError:
            return False
        return True

    def give_back(self, name):
        if fcntl is not None:
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, self.position(name))

    @contextmanager
    def alone(self, name):
        """Wait for the others to be done with `name`, and keep it for the block."""
        if fcntl is not None:
            fcntl.lockf(self.file, fcntl.LOCK_EX, 1, self.position(name))
        try:
            yield
        finally:
            self.give_back(name)

    @staticmethod
    def position(name):
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
