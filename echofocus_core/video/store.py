"""The clip-embedding file and datasets of such files: write, read, pack.

A Store is a dataset's clip embeddings in any of three forms (EmbeddingFolder, EmbeddingShards,
PackedEmbeddings; `open_store` selects):

    files             study id -> file it is read from, sorted by id
    header(eid)       a Header: number of copies, videos and clips, and settings
    size(eid)         number of clips of the study; 0 where it cannot be read
    read(eid, rng)    its StudyClips; with rng, of a random copy
    read_all(eid)     its plain StudyClips, then those of the transformed copies
    digest(eids)      SHA-256 of ids and contents: the same for a folder and a pack of it
    copies(eids)      lists of studies that hold the same videos, by the files' checksums
    made_with(eids)   the settings of the studies, and which studies have which

header, read and read_all raise UnreadableStudy with the reason; a damaged file never stops a run.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

import h5py
import numpy as np
import torch

from echofocus_core import EMBED_DIM, __version__
from echofocus_core.base.checkpoints import load_safely, save
from echofocus_core.base.console import EXTRACT, RUN, UserError, clean_text, progress, some
from echofocus_core.base.files import atomic_path, derive_seed, packed_path, sha256_of, stamp_of
from echofocus_core.base.hdf5 import (
    MOST_BYTES,
    UNREADABLE,
    check_dataset,
    find_datasets,
    new_hdf5,
    open_dataset,
    open_hdf5,
    read_attributes,
    read_texts,
    shortest_distinct,
)
from echofocus_core.base.seen import Seen, all_seen

# Attributes that decide what a clip embedding is: alike in a dataset, and in a model's input.
CHECKED = ("weights_sha256", "size", "clip_len", "sampling", "mask")  # also in the checksums
MADE_WITH = (*CHECKED, "encoder", "perturb")
REPORTED = ("weights", "weights_seen", "starts", "names_patient")  # also in a Header
LONGEST_NAME = 4096  # characters of a file's name, relative to its study's folder

# ------------------------------------------------------------------------------------------ writing


def encoder_text(made_with):
    """The encoder and its weights in words, from the attributes of clip embeddings (a dict)."""
    weights, digest = str(made_with.get("weights", "")), made_with.get("weights_sha256", "")[:12]
    name = made_with.get("encoder") or "PanEcho"
    if is_untrained(made_with):
        return f"{name}, untrained (random weights)"
    if not weights and not digest:
        return "not recorded"
    return f"{name}, weights {weights} {digest}".rstrip()


def is_untrained(made_with):
    """Whether clip embeddings are of random weights: `--weights random`, or those of the demo."""
    return str(made_with.get("weights", "")).startswith(("random", "untrained"))


def study_path(out, study):
    return Path(out) / f"{study.name}.hdf5"


def empty_path(out, study):
    """The record of a study without a usable video, outside the dataset's files."""
    return Path(out) / ".empty" / f"{study.name}.hdf5"


@dataclass
class FileRecord:
    """A row of the HDF5 dataset `files`, after the file's name; all text."""

    stamp: str = ""  # a digest of its size and time: another one may be another file
    content: str = ""  # SHA-256 of its bytes, if it gave clips
    # 'ok', 'skipped', 'again' (skipped, to be tried again) or 'repeat' (of another file)
    result: str = "ok"
    frames: str = ""
    reason: str = ""  # why it was skipped, or notes
    pixels: str = ""  # a digest of its frames, see `decode.frames_digest`


def write_study(path, videos, attributes, files):
    """Write a study's HDF5 file.

    videos: name -> (clip starts (C,), embeddings (1 + K copies, C, 768)), of those with clips.
    files: name -> FileRecord, of all. Texts have fixed lengths, so that no global heap is needed.
    The attribute `crc32` has the `checksum` of the plain embeddings and of each copy.
    """
    videos = dict(sorted(videos.items()))
    rows = [(name, *astuple(record)) for name, record in sorted(files.items())]
    skipped = [(name, r.reason) for name, r in sorted(files.items()) if r.result != "ok"]
    with new_hdf5(path) as f:
        if videos:
            embeddings = np.stack([e for _, e in videos.values()], axis=1)  # (1 + K, V, C, 768)
            f["embeddings"] = embeddings[0]
            starts = np.stack([starts for starts, _ in videos.values()])
            f.create_dataset("clip_starts", data=starts, fletcher32=True)
            if len(embeddings) > 1:
                f["augmented"] = embeddings[1:]
            names = [clean_text(name) for name in videos]
            crc32 = [checksum(copy, names, attributes) for copy in embeddings]
            f.attrs["crc32"] = np.array(crc32, np.uint32)
        f["videos"] = fixed_texts(videos, (len(videos),))
        f["skipped"] = fixed_texts(skipped, (len(skipped), 2))
        rows = fixed_texts(rows, (len(rows), 7))
        f.create_dataset("files", data=rows, fletcher32=rows.size > 0 or None)
        for name, value in attributes.items():
            f.attrs[name] = fixed_texts([value], ()) if isinstance(value, str) else value


def fixed_texts(texts, shape):
    """Texts as an array of UTF-8 of one length, for HDF5."""
    coded = [text.encode() for text in np.ravel(list(texts)).tolist()]
    dtype = h5py.string_dtype("utf-8", max(1, *map(len, coded), 1))
    return np.array(coded, dtype).reshape(shape)


def checksum(embeddings, videos, attributes):
    """CRC-32 of embeddings (V, C, D), their type and shape, the videos' names and the settings.

    attributes: a dict, of which CHECKED counts. CRC-32 of a JSON list of all these, then of the
    numbers.
    """
    made_with = {name: attributes[name] for name in CHECKED if name in attributes}
    facts = [embeddings.dtype.str, embeddings.shape, videos, made_with]
    start = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
    return zlib.crc32(np.ascontiguousarray(embeddings), start)


# ------------------------------------------------------------------------------------------ a study


@dataclass
class StudyDetails:
    """The content of a study's file except its embeddings; empty in published files."""

    attributes: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)  # name -> FileRecord
    starts: dict = field(default_factory=dict)  # video -> clip starts as drawn, (C,)

    @property
    def skipped(self):
        """[(file, why it gave no clip)]"""
        return [(name, r.reason) for name, r in self.files.items() if r.result != "ok"]


def load_details(path):
    """A file's StudyDetails, empty for a published file. Raises one of UNREADABLE."""
    with open_hdf5(path) as f:
        if "files" not in f:
            return StudyDetails()
        rows = read_texts(f, "files", (None, 7), LONGEST_NAME).tolist()
        videos = read_texts(f, "videos", (None,), LONGEST_NAME).tolist()
        starts = open_dataset(f, "clip_starts", "i")[()] if videos else []
        files = {name: FileRecord(*row) for name, *row in rows}
        return StudyDetails(
            read_attributes(f, set(f.attrs) - {"crc32"}),
            files,
            dict(zip(videos, starts, strict=True)),
        )


def load_copies(path):
    """The embeddings of all copies in a file of ours: (1 + K, V, C, 768), the plain ones first.

    Raises one of UNREADABLE, also for a damaged file.
    """
    with open_hdf5(path) as f:
        study = open_extracted(f)
        return np.stack([study.clips(k).embeddings for k in range(study.header.copies)])


# Two videos of a study are almost the same if the distance of their mean clip embeddings is below
# this share of the embeddings' length, or of the median distance in the study. Measured between
# copies (JPEG of quality 75 to 95, AVI, MP4) and between other loops (benchmarks/RESULTS.md): at
# most 0.006 and at least 0.0098 of the length by an untrained encoder; at most 0.079 and at least
# 0.65 of the median distance by the standardised encoder of the demo.
ALMOST_OF_LENGTH, ALMOST_OF_DISTANCE = 0.008, 0.15
MOST_COMPARED = 1000  # videos


def almost_the_same(embeddings):
    """Pairs (i, j), i < j, of videos with almost the same embeddings (V, C, D), each j once.

    Studies of more than 1000 videos are not compared.
    """
    if not 1 < len(embeddings) <= MOST_COMPARED:
        return []
    means = embeddings.mean(1, dtype=np.float64)
    squares = (means**2).sum(1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * means @ means.T, 0))
    median = np.median(distances[np.triu_indices(len(means), 1)])
    bound = max(ALMOST_OF_LENGTH * np.sqrt(np.median(squares)), ALMOST_OF_DISTANCE * median)
    near = np.triu(distances < bound, 1)
    return [(int(near[:, j].argmax()), int(j)) for j in np.flatnonzero(near.any(0))]


# ---------------------------------------------------------------- the training patients of encoders

ENCODER_SEEN = "encoder_seen.pt"  # in a folder of embeddings; next to a pack


def seen_path(folder, packed=False):
    """The file with these lists: in a folder of embeddings, or next to its pack."""
    pack = packed_path(Path(folder))
    return pack.with_name(f"{pack.name}.{ENCODER_SEEN}") if packed else Path(folder) / ENCODER_SEEN


def read_encoder_seen(folder):
    """SHA-256 of an encoder -> list of Seen, its training patients. Raises UserError."""
    lists = {}
    for path in (seen_path(folder, packed=True), seen_path(folder)):
        saved = load_safely(path) if path.is_file() else {}
        for digest, parts in saved.items():
            if parts:
                lists[digest] = [Seen.load(part, path) for part in parts]
    return lists


def write_encoder_seen(folder, lists, packed=False):
    """Add lists to those of a folder, and write all into the folder or next to its pack."""
    if lists := read_encoder_seen(folder) | lists:
        saved = {digest: [part.saved() for part in seen] for digest, seen in lists.items()}
        save(saved, seen_path(folder, packed))


# ------------------------------------------------------------------------------- reading embeddings

BEYOND = 1e9  # clip embeddings are far smaller; the squares of larger numbers overflow


class UnreadableStudy(Exception):
    """A study's embeddings cannot be used; the text has the reason."""


@dataclass
class StudyClips:
    embeddings: np.ndarray  # (V, C, D) float32
    videos: list[str]  # (V,) names, no absolute paths
    made_with: dict = field(default_factory=dict)  # of MADE_WITH and REPORTED
    encoders: tuple = ()  # the `made_with` of each, where several are joined

    def by_encoder(self):
        """The StudyClips of each encoder, with no video where an encoder has none; [self] for one
        encoder."""
        if not (K := len(self.encoders)):
            return [self]
        number, parts = self.embeddings[:, 0, -K:].argmax(1), []
        for k, made_with in enumerate(self.encoders):
            rows = np.flatnonzero(number == k)
            videos = [self.videos[i] for i in rows]
            parts.append(StudyClips(self.embeddings[rows, :, :-K], videos, made_with))
        return parts


@dataclass(frozen=True)
class Header:
    """The content of a study's file except its embeddings."""

    copies: int  # the plain embeddings and the transformed copies
    videos: int
    clips: int  # of a video
    width: int  # features of a clip embedding
    made_with: dict = field(default_factory=dict)  # of MADE_WITH and REPORTED
    crc32: tuple = ()  # of each copy, see `checksum`; () in published files

    @classmethod
    def of(cls, shape, made_with, copies=1, crc32=()):
        """The Header of embeddings of this shape. Raises ValueError if it is not (V, C, D)."""
        if len(shape) != 3:
            raise ValueError(f"its embeddings have shape {shape}, not (videos, clips, features)")
        if 0 in shape:
            raise ValueError("it holds no video")
        return cls(copies, *shape, made_with, crc32)


@dataclass(frozen=True)
class OpenStudy:
    """An open study's Header, and how to read it."""

    header: Header
    read_copy: Callable  # number of a copy -> (V, C, D) array as stored
    read_videos: Callable  # -> names
    encoders: tuple = ()  # see StudyClips

    def clips(self, number):
        """StudyClips of a copy. Raises ValueError when they are not what was written."""
        embeddings, videos = np.ascontiguousarray(self.read_copy(number)), self.read_videos()
        crc32, made_with = self.header.crc32, self.header.made_with
        if crc32 and checksum(embeddings, videos, made_with) != crc32[number]:
            raise ValueError("it is damaged: its content has changed; extract or copy it again")
        if embeddings.dtype != np.float32:  # by torch, which is ten times as fast as numpy
            embeddings = torch.from_numpy(embeddings).float().numpy()
        largest = max(embeddings.max(), -embeddings.min())  # NaN, where there is one
        if np.isnan(largest):
            raise ValueError("it holds NaN")
        if not 0 < largest < BEYOND:
            raise ValueError(f"its numbers are not embeddings, the largest is {largest:g}")
        return StudyClips(embeddings, videos, made_with, self.encoders)


def open_extracted(f):
    """The OpenStudy of an open file that extraction wrote."""
    embeddings = open_dataset(f, "embeddings")
    copies = open_dataset(f, "augmented", most=64 * MOST_BYTES) if "augmented" in f else None
    if copies is not None and copies.shape[1:] != embeddings.shape:
        raise ValueError(f"augmented copies {copies.shape} of embeddings {embeddings.shape}")
    crc32 = tuple(read_attributes(f, ["crc32"], ndim=1).get("crc32", ()))
    made_with, n = (
        read_attributes(f, (*MADE_WITH, *REPORTED)),
        1 if copies is None else 1 + len(copies),
    )
    header = Header.of(embeddings.shape, made_with, n, crc32)
    if crc32 and len(crc32) != n:
        raise ValueError(f"it has {len(crc32)} checksums for {n} copies of the embeddings")
    names = open_dataset(f, "videos", "text")
    if names.shape != (header.videos,):
        raise ValueError(f"{header.videos} videos and {names.shape} names differ in number")
    return OpenStudy(
        header,
        lambda number: copies[number - 1] if number else embeddings[()],
        lambda: read_texts(f, "videos", names.shape).tolist(),
    )


def open_published(f):
    """The OpenStudy of an open published file. The groups above each `emb` spell an absolute path:
    a video's name is its last part, or as many parts as distinguish the videos."""
    paths = find_datasets(f, "emb")
    arrays = [check_dataset(f[path], "emb") for path in paths]
    if len(shapes := {array.shape for array in arrays}) != 1:
        raise ValueError(f"it holds no video, or videos of different shapes: {some(shapes)}")
    if (size := sum(array.nbytes for array in arrays)) > MOST_BYTES:
        raise ValueError(f"it has {size / 1e9:.3g} GB")
    return OpenStudy(
        Header.of((len(arrays), *arrays[0].shape), read_attributes(f, MADE_WITH)),
        lambda number: np.stack([array[()] for array in arrays]),
        lambda: shortest_distinct([path.removesuffix(b"/emb") for path in paths]),
    )


def draw_copy(rng, copies):
    """The number of a random copy, all equally likely; 0 (the plain embeddings) without rng."""
    return int(rng.integers(copies)) if rng is not None and copies > 1 else 0


def draw_videos(eid, n, most, rng=None):
    """Numbers of at most `most` (0: all) of a study's n videos, sorted; by its id without rng."""
    if not most or n <= most:
        return np.arange(n)
    rng = rng or np.random.default_rng(derive_seed("videos", eid))
    return np.sort(rng.choice(n, most, replace=False))


# ----------------------------------------------------------------------------------------- datasets


class Store:
    """The base of all stores; each defines `open`. See the top of the file."""

    most_videos = 0  # at most this many videos of a study are read; 0: all

    def __init__(self, folder, files):
        self.folder, self.files, self.headers = folder, files, {}

    @property
    def parts(self):
        """Name -> Store of each encoder; '' for the only one."""
        return {"": self}

    @contextmanager
    def open_study(self, eid):
        """Yield the study's OpenStudy; an error in the block is raised as UnreadableStudy."""
        try:
            with self.open(eid) as study:
                yield study
        except UNREADABLE as error:
            where = f"study {eid} of {self.files[eid].name}"
            raise UnreadableStudy(f"{where}: {reason_of(error, self.files[eid])}") from error

    def header(self, eid):
        """A study's Header, read once. Raises UnreadableStudy."""
        if eid not in self.headers:
            try:
                with self.open_study(eid) as study:
                    self.headers[eid] = study.header
            except UnreadableStudy as error:
                self.headers[eid] = str(error)
        if isinstance(self.headers[eid], str):
            raise UnreadableStudy(self.headers[eid])
        return self.headers[eid]

    def readable_headers(self, eids):
        """(study id, Header) for studies with a readable header."""
        for eid in progress(eids, desc="headers", unit="study", delay=2):
            with suppress(UnreadableStudy):
                yield eid, self.header(eid)

    def width(self, eids):
        """The number of features of these studies' clip embeddings. UserError if they differ."""
        studies = defaultdict(list)
        for eid, header in self.readable_headers(eids):
            studies[header.width].append(eid)
        if len(studies) > 1:
            groups = (f"{width} ({len(e)} studies: {some(e)})" for width, e in studies.items())
            raise UserError(
                f"{self.folder.name} has clip embeddings of different widths: {some(groups)}; keep "
                "those of each encoder in a folder of its own"
            )
        return next(iter(studies), EMBED_DIM)

    def size(self, eid):
        """The number of a study's clips; 0 if its file cannot be read."""
        try:
            header = self.header(eid)
        except UnreadableStudy:
            return 0
        return min(header.videos, self.most_videos or header.videos) * header.clips

    def read(self, eid, rng=None):
        """A study's StudyClips. Raises UnreadableStudy.

        rng: a numpy Generator that draws the plain embeddings or one of the transformed copies, all
        equally likely; then the videos, if there are more than `most_videos`. Without rng the
        result is always the same.
        """
        with self.open_study(eid) as study:
            clips = study.clips(draw_copy(rng, study.header.copies))
        numbers = draw_videos(eid, len(clips.videos), self.most_videos, rng)
        if len(numbers) == len(clips.videos):
            return clips
        videos = [clips.videos[i] for i in numbers]
        return replace(clips, embeddings=clips.embeddings[numbers], videos=videos)

    def read_all(self, eid):
        """Yield a study's plain StudyClips, then those of its transformed copies, one at a time."""
        for number in range(self.header(eid).copies):
            with self.open_study(eid) as study:
                clips = study.clips(number)
            yield clips  # after the block: an error of the caller is not an unreadable study

    def stamp(self, eid):
        """Size and time of a study's file; [0, 0] when it is missing."""
        return stamp_of(self.files[eid]) or [0, 0]

    def content(self, eid):
        """A text that identifies a study's embeddings: the checksums in its file, or the size and
        time of a file without checksums (a published one)."""
        return str(self.stamp(eid))

    def digest(self, eids):
        """SHA-256 of study ids and contents; packing does not change it, extracting again does."""
        lines = [f"{eid} {self.content(eid)}" for eid in eids]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def copies(self, eids):
        """Lists of the studies that have the same embeddings and names of videos.

        The files' checksums select them; the embeddings are compared, since checksums can collide.
        """
        by_checksum, by_numbers = defaultdict(list), defaultdict(list)
        for eid, header in self.readable_headers(eids):
            if header.crc32:
                by_checksum[header.crc32[0], header.videos, header.clips].append(eid)
        for same in by_checksum.values():
            for eid in same if len(same) > 1 else ():
                with suppress(UnreadableStudy):
                    by_numbers[sha256_of(next(self.read_all(eid)).embeddings)].append(eid)
        return [same for same in by_numbers.values() if len(same) > 1]

    def made_with(self, eids):
        """Settings of the studies: name of MADE_WITH -> {value as text: study ids}.

        The value is '' where a file does not have it; unreadable files are ignored.
        """
        values = {name: defaultdict(list) for name in MADE_WITH}
        for eid, header in self.readable_headers(eids):
            for name in MADE_WITH:
                values[name][str(header.made_with.get(name, ""))].append(eid)
        return values

    def encoder_seen(self, eids, listener=RUN):
        """(list of Seen: the training patients of these studies' encoders; whether it is complete).

        The listener gets a warning if the list is missing in the folder although the weights had
        one, by the files' attribute `weights_seen`.
        """
        lists, encoders, lost = read_encoder_seen(self.folder), set(), {}
        for eid, header in self.readable_headers(eids):
            digest = header.made_with.get("weights_sha256")
            if digest in lists:
                encoders.add(digest)
            elif header.made_with.get("weights_seen") == "listed":
                lost[eid] = header.made_with.get("weights", "")
        if lost:
            listener.warning(
                f"the training patients of the encoder of {len(lost)} studies "
                f"({some(sorted(set(lost.values())))}) are not listed here: they may be among the "
                "test patients",
                f"put {ENCODER_SEEN} of the extraction next to them, or extract them again",
            )
        return all_seen(*(lists[digest] for digest in sorted(encoders))), not lost


def reason_of(error, path):
    """An error with a file as text, without its folder."""
    text = clean_text(str(error).replace(f"{path.parent}{os.sep}", ""))
    return "it is not an HDF5 file" if "file signature not found" in text else text


def open_store(path, findings=RUN, most_videos=0):
    """The Store of a dataset: its pack, or its folder. Raises UserError.

    A pack that is damaged or older than a file of the folder is not used, with a warning.
    most_videos: see Store.read.
    """
    store = open_pack(path, findings) or open_folder(path)
    if isinstance(store, EmbeddingShards) and store.transform:
        findings.warning(
            f"{path.name} was made with the transform {clean_text(store.transform)}: if it "
            "is random, it has one augmented copy of each video",
            "evaluate on embeddings without it",
        )
    store.most_videos = most_videos
    return store


def open_pack(folder, findings):
    """The pack of a folder, or None without a pack that can be used."""
    name = packed_path(folder).name
    if not packed_path(folder).exists():
        return None
    try:
        store = PackedEmbeddings(folder)
        if folder.exists() and not store.is_of(open_folder(folder)):
            raise UserError(f"{name} is out of date and not used")
    except UserError as error:
        if not folder.exists():
            raise
        findings.warning(str(error), "run pack again")
        return None
    findings.note(f"reading {name}")
    return store


def holds_embeddings(path):
    """Whether a path is a file or a folder of clip embeddings, and not one of videos."""
    names = ("*.hdf5", "*.h5", "cache_index.json", "*.npy", "*.pt", "*/*.npy", "*/*.pt")
    return path.is_file() or any(next(path.glob(name), None) for name in names)


def open_folder(path):
    """The Store of a folder or a file that is not packed. Raises UserError."""
    if not path.exists():
        raise UserError(f"no clip embeddings {path}; see embedding_path in the config")
    if (path / "cache_index.json").exists():
        return EmbeddingShards(path)
    if path.is_file() or not any(path.glob("*.h*5")):
        from echofocus_core.video.other_files import open_other  # it imports this module

        if store := open_other(path):
            return store
    return EmbeddingFolder(path)


class EmbeddingFolder(Store):
    """A folder with one HDF5 file per study, from embed/extract.py or the published scripts.

    A study's id is its file's name without the published endings _embed and _trim_embed.
    """

    def __init__(self, path):
        names, files = [e.name for e in os.scandir(path) if not e.name.startswith(".")], {}
        for name in sorted(name for name in names if name.endswith((".hdf5", ".h5"))):
            eid = re.sub(r"(?<=.)(_trim)?_embed$", "", name.rpartition(".")[0])
            if eid in files:
                both = f"{files[eid].name} and {clean_text(name)}"
                raise UserError(f"{path}: {both} are both study {eid}; keep one of them")
            files[eid] = path / name
        if not files:
            raise UserError(f"{path} contains no .hdf5 file; create them with {EXTRACT}")
        super().__init__(path, files)

    @contextmanager
    def open(self, eid):
        with open_hdf5(self.files[eid]) as f:
            yield open_extracted(f) if "embeddings" in f else open_published(f)

    def content(self, eid):
        """As `Store.content`; it reads one attribute (0.3 ms a file of a local disk)."""
        crc32 = ()
        with suppress(*UNREADABLE), open_hdf5(self.files[eid]) as f:
            crc32 = read_attributes(f, ["crc32"], ndim=1).get("crc32", ())
        texts = [f"{x:08x}" for x in crc32]
        return "crc32 " + " ".join(texts) if texts else super().content(eid)


class EmbeddingShards(Store):
    """The embedding cache of the published later branch, read as a dataset.

    cache_index.json lists the studies (`eids`); shard_00000.h5 and so on hold a group a study with
    `emb` (V, C, D) float16. Videos have no names there and are numbered from 000.
    """

    def __init__(self, path):
        names, listed, files, file = [], [], {}, path / "cache_index.json"
        try:
            index = json.loads(file.read_bytes())
            listed = [clean_text(eid) for eid in index["eids"]]
            for file in sorted(path.glob("shard_*.h5")):
                with open_hdf5(file) as f:
                    names += [clean_text(name) for name in f]
                    files |= {name: file for name in f}
        except UNREADABLE as error:
            raise UserError(
                f"{path.name}/{file.name} cannot be read ({reason_of(error, file)}); create the "
                "cache again"
            ) from error
        names, listed = Counter(names), Counter(listed)
        if others := sorted((names - listed) + (listed - names)):
            raise UserError(
                f"{path.name}/cache_index.json and its shards disagree on the studies "
                f"{some(others)}; create the cache again"
            )
        transform, clip_len = index.get("transform"), index.get("clip_len")
        self.transform = "" if transform in (None, "none") else transform
        self.settings = {"clip_len": clip_len} if isinstance(clip_len, int) else {}
        super().__init__(path, dict(sorted(files.items())))

    @contextmanager
    def open(self, eid):
        with open_hdf5(self.files[eid]) as f:
            if not isinstance(f.get(eid, getlink=True), h5py.HardLink):
                raise ValueError("it is a link, which is not followed")
            embeddings = open_dataset(f[eid], "emb")
            yield OpenStudy(
                Header.of(embeddings.shape, self.settings),
                lambda number: embeddings[()],
                lambda: [f"{number:03}" for number in range(len(embeddings))],
            )


# -------------------------------------------------------------------------------------------- packs

PACK_FORMAT = "echofocus pack 1"


@dataclass
class PackedStudy:
    """A study's entry in the index of a pack."""

    row: int  # of `embeddings`, its first
    shape: list  # copies, videos, clips of a video
    stamp: list  # size and time of the file that it was packed from
    content: str  # see `Store.content`, of that file
    crc32: list = field(default_factory=list)  # of each copy, see `checksum`
    videos: list = field(default_factory=list)  # names
    made_with: dict = field(default_factory=dict)
    reason: str = ""  # why its numbers are missing, else ''


class PackedEmbeddings(Store):
    """The pack of a folder of embeddings: a dataset in one HDF5 file.

    `embeddings` is a flat array (rows, D) of float32 or float16: study after study, copy after
    copy, video after video. `index` is JSON, in bytes: study id -> fields of PackedStudy. Numbers
    are read by their position in the file (preadv), so that threads do not wait for HDF5's lock.
    The file is kept open: readers are not affected when a new pack replaces it.
    """

    def __init__(self, folder):
        path = packed_path(folder)
        try:
            with open_hdf5(path) as f:
                if read_attributes(f, ["format"]).get("format") != PACK_FORMAT:
                    raise ValueError(f"its format is not {PACK_FORMAT}")
                embeddings = open_dataset(f, "embeddings", "f", np.inf)
                index = json.loads(open_dataset(f, "index", "u", np.inf)[()].tobytes())
                self.offset, self.dtype = embeddings.id.get_offset(), embeddings.dtype
                self.n_features = embeddings.shape[1]
            self.index = {eid: PackedStudy(**entry) for eid, entry in index.items()}
            self.file = open(path, "rb")  # noqa: SIM115
        except UNREADABLE as error:
            reason = reason_of(error, path)
            raise UserError(f"{path.name} cannot be used as a pack: {reason}") from error
        super().__init__(folder, dict.fromkeys(self.index, path))

    @contextmanager
    def open(self, eid):
        study = self.index[eid]
        if study.reason:
            raise UnreadableStudy(study.reason)
        copies, V, C = study.shape

        def read_copy(number):
            array = np.empty((V, C, self.n_features), self.dtype)
            position = (
                self.offset + (study.row + number * V * C) * self.n_features * self.dtype.itemsize
            )
            if os.preadv(self.file.fileno(), [array.view(np.uint8)], position) != array.nbytes:
                raise ValueError("the pack is truncated: run pack again")
            return array

        header = Header(copies, V, C, self.n_features, study.made_with, tuple(study.crc32))
        yield OpenStudy(header, read_copy, lambda: study.videos)

    def is_of(self, folder):
        """Whether it agrees with the files of a Store: with their sizes and times, then with their
        checksums, since another file can have the same size and time."""
        index = self.index
        return (
            folder.files.keys() == index.keys()
            and all(folder.stamp(eid) == study.stamp for eid, study in index.items())
            and all(folder.content(eid) == study.content for eid, study in index.items())
        )

    def content(self, eid):
        text = self.index[eid].content
        return text if self.dtype == np.float32 else f"{text} as float16"


def write_pack(source, path, dtype):
    """Write a Store as one HDF5 file, see PackedEmbeddings.

    Returns study id -> reason of those whose numbers cannot be read. An existing pack is replaced
    when the new one is complete. Raises OSError.
    """
    index, width, rows = {}, source.width(source.files), 0
    for _, header in source.readable_headers(source.files):
        rows += header.copies * header.videos * header.clips
    if rows * width * np.dtype(dtype).itemsize > shutil.disk_usage(path.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as f:
        embeddings, row = f.create_dataset("embeddings", (max(rows, 1), width), dtype), 0
        for eid in progress(source.files, desc="pack", unit="study"):
            index[eid] = pack_study(source, eid, embeddings, row)
            row += math.prod(index[eid].shape)
        text = json.dumps({eid: vars(study) for eid, study in index.items()}).encode()
        f.create_dataset("index", data=np.frombuffer(text, np.uint8), fletcher32=True)
        f.attrs["format"] = np.bytes_(PACK_FORMAT)
        f.attrs["version"] = np.bytes_(__version__)
    write_encoder_seen(source.folder, {}, packed=True)
    return {eid: study.reason for eid, study in index.items() if study.reason}


def pack_study(source, eid, embeddings, row):
    """Copy a study into the dataset `embeddings`, from `row` on; its PackedStudy."""
    study = PackedStudy(row, [0, 0, 0], source.stamp(eid), source.content(eid))
    try:
        header, crc32 = source.header(eid), []
        n = header.videos * header.clips
        for clips in source.read_all(eid):
            with np.errstate(over="ignore"):  # checked below
                block = clips.embeddings.astype(embeddings.dtype)
            if not np.isfinite(block).all():
                raise UnreadableStudy(f"study {eid} has numbers beyond {block.dtype.name}")
            crc32.append(checksum(block, clips.videos, header.made_with))
            embeddings[row : row + n] = block.reshape(n, -1)
            row += n
        study.shape, study.crc32 = [header.copies, header.videos, header.clips], crc32
        study.videos, study.made_with = clips.videos, header.made_with
    except UnreadableStudy as error:
        study.reason = str(error)
    return study
