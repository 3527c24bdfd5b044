"""Clip embeddings in the files of other projects, read as they are.

    X.npz, with clip_index.npz next to it   `embeddings` (N, D), a row a video; in the index
                                            `study_ids`, `patient_ids` and `s3_paths` (N,)
    a folder of .npy or .pt files           one a video, in a folder a study
    a table (.csv or .parquet)              eid, video, then a column a feature; a row a clip

A file of .pt is a tensor, or a dict with `embedding_pooled` (D,). Rows with the same video are its
clips; videos of a study must have the same number of clips.
"""

import os
import pickle
import zipfile
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pandas as pd

from echofocus_core.base.console import Collected, UserError, some
from echofocus_core.base.tables import read_table
from echofocus_core.video.store import Header, OpenStudy, Store

CLIP_INDEX = "clip_index.npz"
POOLED = "embedding_pooled"  # of a .pt file that also has the embedding of each frame
VIDEO_FILES = (".npy", ".pt")


def open_other(path):
    """The Store of another project's files at a path, or None if it is nothing of the kind."""
    suffix = path.suffix.lower()
    if path.is_file():
        readers = {".npz": ClipArray, ".csv": EmbeddingTable, ".parquet": EmbeddingTable}
        if suffix not in readers:
            raise UserError(f"{path}: clip embeddings are a folder, or a file {some(readers)}")
        return readers[suffix](path)
    files = sorted(
        x for x in path.rglob("*") if x.suffix.lower() in VIDEO_FILES and x.name[0] != "."
    )
    return VideoFiles(path, files) if files else None


# --------------------------------------------------------------------------- an array of all clips


def find_array(path, name):
    """(offset, dtype, shape) of a two-dimensional array of floats in a .npz file.

    Raises UserError, also if it is compressed.
    """
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path.name} is not a .npz file, or it is truncated") from error
    with archive:
        if f"{name}.npy" not in archive.namelist():
            raise UserError(
                f"{path.name} has no array '{name}' (it has: {some(archive.namelist())})"
            )
        info = archive.getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(
                f"{path.name} is compressed, so that its rows cannot be read one by one: write it "
                "again with numpy.savez"
            )
        with archive.open(info) as member:
            if np.lib.format.read_magic(member) == (1, 0):
                header = np.lib.format.read_array_header_1_0(member)
            else:
                header = np.lib.format.read_array_header_2_0(member)
            (shape, fortran, dtype), length = header, member.tell()
    with open(path, "rb") as f:  # the local header of the member has a length of its own
        f.seek(info.header_offset + 26)
        sizes = np.frombuffer(f.read(4), "<u2")
    offset = info.header_offset + 30 + int(sizes.sum()) + length
    if dtype.kind != "f" or len(shape) != 2 or fortran:
        order = ", stored by columns" if fortran else ""
        raise UserError(
            f"{path.name}: '{name}' is {dtype} of shape {shape}{order}; it must be a float array "
            "(videos, D), stored by rows"
        )
    return offset, dtype, shape


def index_next_to(path):
    """clip_index.npz in a file's folder or the one above: DataFrame of text, a row a clip.

    Columns: eid, pid and video. Raises UserError.
    """
    places = [folder / CLIP_INDEX for folder in (path.parent, path.parent.parent)]
    file = next((x for x in places if x.is_file()), None)
    if file is None:
        raise UserError(f"no {CLIP_INDEX} next to {path.name}: it has the study of each clip")
    columns = {}
    for name, key in (("eid", "study_ids"), ("pid", "patient_ids"), ("video", "s3_paths")):
        values = load_array(file, key, needed=name != "video")
        if values is not None:
            columns[name] = pd.Series(values.tolist(), dtype=object).map(id_text)
    if len({len(x) for x in columns.values()}) > 1:
        raise UserError(f"{file.name}: study_ids, patient_ids and s3_paths differ in length")
    table = pd.DataFrame(columns)
    if (table[["eid", "pid"]] == "").any(axis=None):
        raise UserError(f"{file.name} has rows without a study or a patient")
    numbers = table.groupby("eid").cumcount().map("{:03}".format)
    names = table.get("video", numbers).str.rsplit("/", n=1).str[-1]
    return table.assign(video=names.where(names != "", numbers))


def load_array(file, key, needed=True):
    """An array of a .npz file that runs no code; None if it is missing. Raises UserError."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if key in arrays.files:
                return arrays[key]
            names = arrays.files
    except ValueError as error:  # an array of objects, which would run code
        raise UserError(f"{file.name}: write {key} as numbers or text ({error})") from error
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{file.name} is not a .npz file, or it is truncated") from error
    if needed:
        raise UserError(f"{file.name} has no {key} (it has: {some(names)})")
    return None


def id_text(x):
    """An id as text: 14 and not 14.0; bytes decoded."""
    if isinstance(x, bytes):
        x = x.decode()
    return str(int(x) if isinstance(x, float) and x.is_integer() else x).strip()


class Rows(Store):
    """Rows of clips with the study and the video of each: `index` has the columns eid and video."""

    def __init__(self, path, index):
        self.names, self.rows = index["video"].to_numpy(), index.groupby("eid").indices
        super().__init__(path, dict.fromkeys(self.rows, path))

    def read_rows(self, rows):
        """(len(rows), D) of row numbers."""
        raise NotImplementedError

    @contextmanager
    def open(self, eid):
        rows = self.rows[eid]
        videos, counts = np.unique(self.names[rows].astype(str), return_counts=True)
        if len(set(counts)) > 1:
            raise ValueError(f"its videos have different numbers of rows: {some(set(counts))}")
        order = np.argsort(self.names[rows].astype(str), kind="stable")
        shape = len(videos), int(counts[0]), self.n_features
        yield OpenStudy(
            Header.of(shape, {}),
            lambda number: self.read_rows(rows)[order].reshape(shape),
            videos.tolist,
        )


class ClipArray(Rows):
    """One array of all clips, whose rows are read by their position in the file, so that memory
    does not depend on their number."""

    def __init__(self, path):
        self.offset, self.dtype, (n, self.n_features) = find_array(path, "embeddings")
        index = index_next_to(path)
        if len(index) != n:
            raise UserError(
                f"{path.name} has {n} rows, {CLIP_INDEX} has {len(index)}: they belong to "
                "different files"
            )
        self.file = open(path, "rb")  # noqa: SIM115
        super().__init__(path, index)

    def read_rows(self, rows):
        """(len(rows), D) of rising row numbers; rows in sequence are read at once."""
        array = np.empty((len(rows), self.n_features), self.dtype)
        ends = [*np.flatnonzero(np.diff(rows) != 1) + 1, len(rows)]
        for start, end in pairwise([0, *ends]):
            block = array[start:end]
            position = self.offset + int(rows[start]) * array[0].nbytes
            if os.preadv(self.file.fileno(), [block.view(np.uint8)], position) != block.nbytes:
                raise ValueError("the array is truncated")
        return array


# ------------------------------------------------------------------------------ a file for a video


class VideoFiles(Store):
    """A folder of .npy or .pt files: <study>/<video>, or a study of one video at the top."""

    def __init__(self, path, files):
        self.videos = {}
        for file in files:
            folder = file.parent.relative_to(path)
            eid = folder.as_posix() if folder.parts else file.stem
            self.videos.setdefault(eid, []).append(file)
        super().__init__(path, {eid: videos[0] for eid, videos in self.videos.items()})

    def content(self, eid):
        return str([(x.name, x.stat().st_size, x.stat().st_mtime_ns) for x in self.videos[eid]])

    @contextmanager
    def open(self, eid):
        arrays = [load_video(file) for file in self.videos[eid]]
        if len(shapes := {x.shape for x in arrays}) > 1:
            raise ValueError(f"its videos have different shapes: {some(sorted(shapes))}")
        array = np.stack(arrays)
        names = [file.stem for file in self.videos[eid]]
        yield OpenStudy(Header.of(array.shape, {}), lambda number: array, lambda: names)


def load_video(file):
    """(C, D) of a file for a video. Raises ValueError."""
    if file.suffix.lower() == ".npy":
        try:
            return np.atleast_2d(np.load(file, allow_pickle=False))
        except EOFError as error:
            raise ValueError(f"{file.name} is empty") from error
    import torch

    try:
        saved = torch.load(file, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file.name} is truncated, or holds more than tensors") from error
    if isinstance(saved, dict):
        saved = saved.get(POOLED)
    if not isinstance(saved, torch.Tensor):
        raise ValueError(f"{file.name} is neither a tensor nor a dict with {POOLED}")
    return np.atleast_2d(saved.detach().float().numpy())


# ----------------------------------------------------------------------------------------- a table


class EmbeddingTable(Rows):
    """A table with the columns eid and video, and a number in every other column."""

    def __init__(self, path):
        if path.suffix.lower() == ".parquet":
            try:
                table = pd.read_parquet(path)
            except ImportError as error:
                raise UserError(f"{path}: install pyarrow to read .parquet files") from error
        else:
            table = read_table(path, Collected(), "table of clip embeddings")
        if missing := {"eid", "video"} - set(table):
            raise UserError(f"{path.name} has no column {some(sorted(missing))}")
        table = table.reset_index(drop=True)
        ids = table[["eid", "video"]].astype(str)
        try:
            self.array = table.drop(columns=["eid", "video"]).to_numpy(np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{path.name}: every column except eid and video must be numeric"
            ) from error
        self.n_features = self.array.shape[1]
        super().__init__(path, ids)

    def read_rows(self, rows):
        return self.array[rows]
