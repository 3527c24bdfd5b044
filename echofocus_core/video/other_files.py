"""Clip embeddings in the files of other projects, read as they are.

    X.npz, with clip_index.npz next to it   `embeddings` (N, D), a row a clip; in the index
                                            `study_ids`, `patient_ids` and `s3_paths` (N,)
    a folder of .npy or .pt files           one a video, in a folder a study
    a table (.csv or .parquet)              eid, video, then a column a feature; a row a clip

A file of .pt is a tensor, or a dict with `embedding_pooled` (D,). Videos of a study must have the
same number of clips.
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
    files = sorted(x for x in path.rglob("*") if x.suffix.lower() in VIDEO_FILES)
    return VideoFiles(path, files) if files else None


# --------------------------------------------------------------------------- an array of all clips


def find_array(path, name):
    """(offset, dtype, shape) of a two-dimensional array of floats in a .npz file.

    Raises UserError, also if it is compressed.
    """
    with zipfile.ZipFile(path) as archive:
        try:
            info = archive.getinfo(f"{name}.npy")
        except KeyError:
            raise UserError(f"{path.name} has no array '{name}' (it has: "
                            f"{some(archive.namelist())})") from None  # fmt: skip
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(
                f"{path.name} is compressed, so that its rows cannot be read one by one: write it "
                "again with numpy.savez"
            )
        with archive.open(info) as member:
            version = np.lib.format.read_magic(member)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
            header = header or np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(member)
            length = member.tell()
    with open(path, "rb") as f:  # the local header of the member has a length of its own
        f.seek(info.header_offset + 26)
        sizes = np.frombuffer(f.read(4), "<u2")
    offset = info.header_offset + 30 + int(sizes.sum()) + length
    if dtype.kind != "f" or len(shape) != 2 or fortran:
        raise UserError(f"{path.name}: '{name}' is {dtype} of shape {shape}, not floats (clips, D)")
    return offset, dtype, shape


def index_next_to(path):
    """clip_index.npz in a file's folder or the one above: DataFrame of text, a row a clip.

    Columns: eid, pid and video. Raises UserError.
    """
    places = [folder / CLIP_INDEX for folder in (path.parent, path.parent.parent)]
    file = next((x for x in places if x.is_file()), None)
    if file is None:
        raise UserError(f"no {CLIP_INDEX} next to {path.name}: it has the study of each clip")
    with np.load(file, allow_pickle=False) as index:
        names = set(index.files)
        if missing := {"study_ids", "patient_ids"} - names:
            raise UserError(f"{file.name} has no {some(sorted(missing))}")
        try:
            columns = {"eid": index["study_ids"], "pid": index["patient_ids"]}
        except ValueError as error:  # an array of objects would run code
            raise UserError(f"{file.name}: write its ids as numbers or text ({error})") from error
        n = len(columns["eid"])
        try:
            paths = pd.Series(index["s3_paths"] if "s3_paths" in names else [], dtype=str)
        except ValueError:
            paths = pd.Series([], dtype=str)
    table = pd.DataFrame({name: pd.Series(x).astype(str) for name, x in columns.items()})
    numbers = table.groupby("eid").cumcount().map("{:03}".format)
    video = paths.str.rsplit("/", n=1).str[-1].where(lambda x: x != "")
    table["video"] = video.reindex(range(n)).fillna(numbers)
    repeated = table.duplicated(["eid", "video"], keep=False)
    table.loc[repeated, "video"] += "#" + numbers[repeated]
    return table


class ClipArray(Store):
    """One array of all clips. A row is the mean of a video, so its only clip.

    Rows are read by their position in the file, so that memory does not depend on their number.
    """

    def __init__(self, path):
        self.offset, self.dtype, (n, self.n_features) = find_array(path, "embeddings")
        index = index_next_to(path)
        if len(index) != n:
            raise UserError(
                f"{path.name} has {n} rows, {CLIP_INDEX} has {len(index)}: they belong to "
                "different files"
            )
        self.file = open(path, "rb")  # noqa: SIM115
        self.names, self.rows = index["video"].to_numpy(), index.groupby("eid").indices
        super().__init__(path, dict.fromkeys(self.rows, path))

    @contextmanager
    def open(self, eid):
        rows = self.rows[eid]
        yield OpenStudy(
            Header.of((len(rows), 1, self.n_features), {}),
            lambda number: self.read_rows(rows)[:, None],
            lambda: self.names[rows].tolist(),
        )

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
        array = np.load(file, allow_pickle=False)
    else:
        import torch

        try:
            saved = torch.load(file, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise ValueError(f"{file.name} holds more than tensors") from error
        if isinstance(saved, dict):
            saved = saved.get(POOLED)
        if not isinstance(saved, torch.Tensor):
            raise ValueError(f"{file.name} is no tensor and no dict with {POOLED}")
        array = saved.float().numpy()
    return np.atleast_2d(array)


# ----------------------------------------------------------------------------------------- a table


class EmbeddingTable(Store):
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
            raise UserError(f"{path.name}: every column but eid and video is a number") from error
        self.names, self.rows = ids["video"].to_numpy(), ids.groupby("eid").indices
        super().__init__(path, dict.fromkeys(self.rows, path))

    @contextmanager
    def open(self, eid):
        rows = self.rows[eid]
        videos, counts = np.unique(self.names[rows], return_counts=True)
        if len(set(counts)) > 1:
            raise ValueError(f"its videos have different numbers of rows: {some(set(counts))}")
        order = rows[np.argsort(self.names[rows], kind="stable")]
        array = self.array[order].reshape(len(videos), counts[0], -1)
        yield OpenStudy(Header.of(array.shape, {}), lambda number: array, videos.tolist)
