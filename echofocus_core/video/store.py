"""The clip-embedding file: writing, reading and packing, in one room.

A store is a dataset's clip embeddings, whatever they lie in (EmbeddingFolder, EmbeddingShards,
PackedEmbeddings; `open_store` finds which):

    files             study id -> where it is read from, in the order of ids
    header(eid)       a Header: how many copies, videos and clips, and how they were made
    size(eid)         the study's clips; 0 where they cannot be known
    read(eid, rng)    its StudyClips; with rng, of a copy that it draws
    read_all(eid)     its plain StudyClips, then those of the transformed copies
    digest(eids)      which data that is, as text: the same for a folder and a pack of it
    copies(eids)      which of them are the same videos, by the checksums that the files carry
    made_with(eids)   how they were made, and which studies so

header, read and read_all raise UnreadableStudy, with the reason; nothing else of a study's file
ends a run.
"""

import hashlib
import json
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np
import torch

from echofocus_core import EMBED_DIM as D
from echofocus_core import __version__
from echofocus_core.base.checkpoints import load_safely, save
from echofocus_core.base.console import (
    EXTRACT,
    Findings,
    UserError,
    clean_text,
    escaped,
    listed,
    printable,
    progress,
    some,
)
from echofocus_core.base.files import atomic_path, derive_seed, packed_path, stamp_of
from echofocus_core.base.hdf5 import (
    MOST_BYTES,
    MOST_TEXT,
    UNREADABLE,
    checked,
    find_datasets,
    new_hdf5,
    open_hdf5,
    own_attributes,
    own_dataset,
    own_texts,
    read_texts,
    shortest_distinct,
)
from echofocus_core.study.splits import Seen, all_seen

# ------------------------------------------------------------------------------------------ writing


def study_path(out, study):
    return Path(out) / f"{study.name}.hdf5"


def empty_path(out, study):
    """Where a study without a usable video is remembered: no place where embeddings are sought."""
    return Path(out) / ".empty" / f"{study.name}.hdf5"


@dataclass
class FileRecord:
    """What is remembered of a file of a study; all text, as its HDF5 dataset `files` has it."""

    stamp: str = ""  # a digest of its size and time, which tells whether it is another one
    content: str = ""  # SHA-256 of its bytes, where it gave clips
    result: str = "ok"  # or 'skipped', or 'again': skipped for a reason that may pass
    frames: str = ""
    reason: str = ""  # why it was skipped, or what was noted


def write_study(path, videos, attributes, files):
    """videos: dict of name to (clip starts, [plain, copies...] embeddings), of those with clips;
    files: dict of name to FileRecord, of all.

    The attribute `crc32` has a checksum of the plain embeddings and of each copy (`checksum`),
    `attributes_crc32` one of the attributes, `records_crc32` one of all else (`text_checksum`).
    """
    videos = dict(sorted(videos.items()))
    skipped = [(v, r.reason) for v, r in sorted(files.items()) if r.result != "ok"]
    rows = [(name, *vars(record).values()) for name, record in sorted(files.items())]
    remembered = [
        list(map(as_read, videos)),
        *([list(map(as_read, row)) for row in x] for x in (skipped, rows)),
    ]
    remembered.append([starts.tolist() for starts, _ in videos.values()])
    text = h5py.string_dtype()
    with new_hdf5(path) as f:
        if videos:
            embeddings = np.stack([e for _, e in videos.values()], axis=1)  # (1 + K, V, C, 768)
            f["embeddings"] = embeddings[0]
            f["clip_starts"] = np.stack([starts for starts, _ in videos.values()])
            if len(embeddings) > 1:
                f["augmented"] = embeddings[1:]
            names = [clean_text(name) for name in videos]
            f.attrs["crc32"] = np.array([checksum(copy, names) for copy in embeddings], np.uint32)
        f.create_dataset("videos", (len(videos),), data=list(videos) or None, dtype=text)
        f.create_dataset("skipped", (len(skipped), 2), data=skipped or None, dtype=text)
        f.create_dataset("files", (len(rows), 6), data=rows or None, dtype=text)
        f.attrs.update(attributes)
        f.attrs["attributes_crc32"] = text_checksum(own_attributes(f, ATTRIBUTES))
        f.attrs["records_crc32"] = text_checksum(remembered)


def checksum(embeddings, videos):
    """CRC-32 of a study's embeddings (V, C, D) with their type, shape and the videos' names."""
    about = json.dumps([embeddings.dtype.str, embeddings.shape, videos])
    return zlib.crc32(np.ascontiguousarray(embeddings), zlib.crc32(about.encode()))


def as_read(text):
    return clean_text(text, LONGEST_NAME)


def text_checksum(values):
    """CRC-32 of what has been read of a file: lists and dicts of text and numbers."""
    return np.uint32(zlib.crc32(json.dumps(values, sort_keys=True).encode()))


def check_text(values, f, name):
    """Raise ValueError when what was read has not the checksum that the file keeps for it.

    Files of earlier versions keep none.
    """
    kept = own_attributes(f, [name]).get(name)
    if kept is not None and kept != text_checksum(values):
        raise ValueError(
            "it is damaged, what it says is not what was written: extract or copy it again"
        )


LONGEST_NAME = 4096  # of a file, relative to its study's folder


def read_remembered(f):
    """[videos, skipped, files, clip starts] of an open study's file, as lists."""
    has_files, has_starts = "files" in f, "clip_starts" in f
    return [
        own_texts(f, "videos", (None,), LONGEST_NAME).tolist(),
        own_texts(f, "skipped", (None, 2), LONGEST_NAME).tolist(),
        own_texts(f, "files", (None, 6), LONGEST_NAME).tolist() if has_files else [],
        own_dataset(f, "clip_starts", "i")[()].tolist() if has_starts else [],
    ]


def checked_records(f):
    """(attributes, what `read_remembered` gives) of an open study's file. Raises one of UNREADABLE,
    also when either is not what was written."""
    found, remembered = own_attributes(f, ATTRIBUTES), read_remembered(f)
    check_text(found, f, "attributes_crc32")
    check_text(remembered, f, "records_crc32")
    return found, remembered


def read_records(path, attributes, redo):
    """What a study's file remembers: dict of name to FileRecord; None when it is to be made.

    That is when it is not there, or damaged. UserError when it was made in another way and not
    `redo`. A file of an earlier version has no stamps: its videos count as they are.
    """
    try:
        with open_hdf5(path) as f:
            found, (videos, skipped, rows, _) = checked_records(f)
    except UNREADABLE:
        return None
    for name, value in attributes.items():
        made = found.get(name, "independent" if name == "starts" else None)
        if name not in ("version", "weights", "weights_seen") and made != value:
            if redo:
                return None
            raise UserError(
                f"{path} was made with {name} = {made}, not {value}; use another folder "
                "for the embeddings, or --redo to make such files anew"
            )
    records = {v: FileRecord() for v in videos}
    records |= {v: FileRecord(result="skipped", reason=reason) for v, reason in skipped}
    return records | {name: FileRecord(*row) for name, *row in rows}


def read_results(path, names):
    """Of some videos of a study's file: dict of name to (clip starts, (1 + K, C, 768)).

    Raises one of UNREADABLE when the file is damaged.
    """
    if not names:
        return {}
    with open_hdf5(path) as f:
        study = describe_own(f)
        embeddings = np.stack([study(k).embeddings for k in range(study.header.copies)])
        starts = own_dataset(f, "clip_starts", "i")[()]
        videos = own_texts(f, "videos", (None,), LONGEST_NAME)
        places = {name: i for i, name in enumerate(videos)}
    return {name: (starts[places[name]], embeddings[:, places[name]]) for name in names}


@dataclass
class StudyDetails:
    """What a study's file says of its videos beside the numbers; empty where it does not."""

    clip_len: int = 0  # frames
    starts: dict = field(default_factory=dict)  # video -> clip starts as drawn, (C,)
    contents: dict = field(default_factory=dict)  # video -> SHA-256 of its bytes
    skipped: list = field(default_factory=list)  # (file, why it gave no clip)


def read_details(path):
    """The StudyDetails in a study's file: none in a published one, nor, with a warning, in one that
    is damaged."""
    try:
        with open_hdf5(path) as f:
            if "skipped" not in f and "records_crc32" not in f.attrs:
                return StudyDetails()
            found, (videos, skipped, rows, starts) = checked_records(f)
            starts = dict(zip(videos, map(np.array, starts), strict=False))
            records = [(name, FileRecord(*row)) for name, *row in rows]
    except UNREADABLE:
        print(
            f"WARNING: {printable(path)} is damaged: the page neither marks its clips nor says "
            "what was left out; extract or copy it again"
        )
        return StudyDetails()
    clip_len = found.get("clip_len")
    clip_len = clip_len if isinstance(clip_len, int) else 0
    contents = {name: record.content for name, record in records if record.content}
    return StudyDetails(clip_len, starts, contents, skipped)


# ---------------------------------------------------------------------------- whom an encoder knows

ENCODER_SEEN = "encoder_seen.pt"  # in a folder of embeddings; a pack has it beside it
TRAINED_HERE = re.compile(r"chkpt_epoch-\d+\.pt|encoder\.pt")  # weights by their name


def read_encoder_seen(path):
    """SHA-256 of an encoder -> list of Seen, whom it was trained on; {} where there is no file.

    Raises UserError for a damaged file.
    """
    if not path.is_file():
        return {}
    try:
        return {
            digest: [Seen.load(part, path) for part in parts]
            for digest, parts in load_safely(path).items()
        }
    except (UserError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} is damaged; delete it and extract again with the same weights (or pack again, "
            "what is extracted stays); nothing else is lost"
        ) from error


def write_encoder_seen(path, known):
    save({digest: [part.saved() for part in seen] for digest, seen in known.items()}, path)


def keep_encoder_seen(folder, digest, seen):
    """Write beside the embeddings whom the encoder that makes them was trained on."""
    path = Path(folder) / ENCODER_SEEN
    known = read_encoder_seen(path)
    if not known.get(digest):
        write_encoder_seen(path, known | {digest: seen})


def encoders_seen(folder):
    """As `read_encoder_seen`, by a folder of embeddings or its pack."""
    found = {}
    for path in (packed_seen(packed_path(Path(folder))), Path(folder) / ENCODER_SEEN):
        found |= {digest: seen for digest, seen in read_encoder_seen(path).items() if seen}
    return found


def weights_seen(seen):
    """What an extraction notes of its weights: of a list of Seen, or None (see `read_encoder`)."""
    return "not said" if seen is None else "listed" if seen else "elsewhere"


def packed_seen(path):
    return path.with_name(f"{path.name}.{ENCODER_SEEN}")


# ------------------------------------------------------------------------------------------ a study


BEYOND = 1e9  # what no clip embedding reaches; the squares of more overflow


class UnreadableStudy(Exception):
    """Why a study's embeddings cannot be used."""


@dataclass
class StudyClips:
    """A study's clip embeddings."""

    embeddings: np.ndarray  # (V, C, D) float32
    videos: list[str]  # (V,) names, no absolute paths
    made_with: dict = field(default_factory=dict)  # of MADE_WITH, what its file says


# Attributes that decide what a clip embedding is: alike in a dataset, and in a model's input.
MADE_WITH = ("weights_sha256", "size", "clip_len", "sampling", "mask")
TOLD = ("weights", "weights_seen", "starts")  # what else a reader is told of these
ATTRIBUTES = (*MADE_WITH, "encoder", "weights", "precision", "n_clips", "seed", "starts")
ATTRIBUTES += ("augment", "weights_seen", "version")  # all that an extraction notes of itself


@dataclass(frozen=True)
class Header:
    """What is known of a study without reading its numbers."""

    copies: int  # the plain embeddings and the transformed copies
    videos: int
    clips: int  # of a video
    made_with: dict = field(default_factory=dict)  # MADE_WITH and TOLD, where the file says so
    crc32: tuple = ()  # of each copy, see `checksum`; () where the file has none

    def __post_init__(self):
        if not (self.videos and self.clips):
            raise ValueError("it holds no video")


@dataclass(frozen=True)
class OpenStudy:
    """An open study's Header, and how to read it."""

    header: Header
    read_copy: Callable  # number of a copy -> (V, C, D) array as stored
    read_videos: Callable  # -> names

    def __call__(self, number):
        """StudyClips of a copy. Raises ValueError when they are not what was written."""
        header = self.header
        embeddings, videos = np.ascontiguousarray(self.read_copy(number)), self.read_videos()
        if header.crc32 and checksum(embeddings, videos) != header.crc32[number]:
            raise ValueError(
                "it is damaged, its numbers are not those that were written: extract or copy it "
                "again"
            )
        embeddings = as_float32(embeddings)
        largest = max(embeddings.max(), -embeddings.min())  # NaN, where there is one
        if np.isnan(largest):
            raise ValueError("it holds NaN")
        if not 0 < largest < BEYOND:
            raise ValueError(f"its numbers are no encoder's, the largest is {largest:g}")
        return StudyClips(embeddings, videos, header.made_with)


def as_float32(array):
    """An array of numbers as float32; torch's conversion is ten times as fast as numpy's."""
    return array if array.dtype == np.float32 else torch.from_numpy(array).float().numpy()


def describe(f):
    """An open study file -> OpenStudy; ours or, by its groups, one of the published scripts'."""
    return describe_own(f) if "embeddings" in f else describe_published(f)


def describe_own(f):
    embeddings = own_dataset(f, "embeddings")
    copies = own_dataset(f, "augmented", most=64 * MOST_BYTES) if "augmented" in f else None
    check_shape(embeddings.shape)
    if copies is not None and copies.shape[1:] != embeddings.shape:
        raise ValueError(
            f"augmented copies are of shape {copies.shape}, embeddings of {embeddings.shape}"
        )
    V, C, _ = embeddings.shape
    attributes = own_attributes(f, ATTRIBUTES)
    check_text(attributes, f, "attributes_crc32")
    attributes = {k: v for k, v in attributes.items() if k in (*MADE_WITH, *TOLD)}
    crc32 = tuple(own_attributes(f, ["crc32"], ndim=1).get("crc32", ()))
    n_copies = 1 if copies is None else 1 + len(copies)
    if crc32 and len(crc32) != n_copies:
        raise ValueError(f"it has {len(crc32)} checksums for {n_copies} copies of the embeddings")
    names = own_dataset(f, "videos", "text", MOST_TEXT)
    if names.shape != (V,):
        raise ValueError(f"{V} videos and {names.shape} names differ in number")
    return OpenStudy(
        Header(n_copies, V, C, attributes, crc32),
        lambda number: copies[number - 1] if number else embeddings[()],
        lambda: read_texts(names, "videos", (V,)).tolist(),
    )


def describe_published(f):
    """The groups above each `emb` spell an absolute path of the site that made the file; only its
    last part is kept, or more of it where that is not enough to tell videos apart."""
    paths = find_datasets(f, "emb")
    arrays = [checked(f[path], "emb") for path in paths]
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise ValueError(f"its videos differ in shape: {some(shapes)}")
    if sum(array.nbytes for array in arrays) > MOST_BYTES:
        raise ValueError(f"it claims {sum(a.nbytes for a in arrays) / 1e9:.3g} GB")
    check_shape((len(arrays), *(shapes[0] if shapes else (0, D))))
    return OpenStudy(
        Header(1, len(arrays), shapes[0][0] if shapes else 0, own_attributes(f, MADE_WITH)),
        lambda number: np.stack([array[()] for array in arrays]),
        lambda: shortest_distinct([path.removesuffix(b"/emb") for path in paths]),
    )


def check_shape(shape):
    if len(shape) != 3 or shape[2] != D:
        raise ValueError(f"its numbers are of shape {shape}, expected (videos, clips, {D})")


def draw_copy(rng, copies):
    """The number of a copy, each alike; always 0, the plain embeddings, without rng."""
    return int(rng.integers(copies)) if rng is not None and copies > 1 else 0


# ----------------------------------------------------------------------------------------- datasets


class Store:
    """What stores have in common; each says how it opens a study. See the top of this file."""

    most_videos = 0  # of a study that has more, so many are read; 0: all

    def __init__(self, folder, files):
        self.folder, self.files, self.headers = folder, files, {}
        self.place = folder  # the dataset's; a pack's is the folder that it was made of

    @contextmanager
    def opened(self, eid):
        """The study's OpenStudy; what goes wrong until the block ends is an UnreadableStudy."""
        try:
            with self.open(eid) as study:
                yield study
        except UNREADABLE as error:
            reason = reason_of(error, self.folder)
            raise UnreadableStudy(f"{self.source_name(eid)}: {reason}") from error

    def header(self, eid):
        """A study's Header, read once. Raises UnreadableStudy."""
        if eid not in self.headers:
            try:
                with self.opened(eid) as study:
                    self.headers[eid] = study.header
            except UnreadableStudy as error:
                self.headers[eid] = str(error)
        if isinstance(self.headers[eid], str):
            raise UnreadableStudy(self.headers[eid])
        return self.headers[eid]

    def size(self, eid):
        """Clips of a study, counted; 0 where its file does not say."""
        try:
            header = self.header(eid)
        except UnreadableStudy:
            return 0
        return min(header.videos, self.most_videos or header.videos) * header.clips

    def read(self, eid, rng=None):
        """A study's StudyClips. Raises UnreadableStudy.

        rng: a numpy Generator that draws, each alike, the plain embeddings or one of the randomly
        transformed copies, if there are any; then which videos, where there are more than
        `most_videos`. Without it these are always the same ones.
        """
        with self.opened(eid) as study:
            clips = study(draw_copy(rng, study.header.copies))
        n, most = len(clips.videos), self.most_videos
        if not most or n <= most:
            return clips
        rng = rng or np.random.default_rng(derive_seed("videos", eid))
        taken = np.sort(rng.choice(n, most, replace=False))
        videos = [clips.videos[i] for i in taken]
        return replace(clips, embeddings=clips.embeddings[taken], videos=videos)

    def read_all(self, eid):
        """Yield a study's plain StudyClips, then those of its transformed copies, one at a time."""
        for number in range(self.header(eid).copies):
            with self.opened(eid) as study:
                clips = study(number)
            yield clips  # outside: what its taker does wrong is not the study's fault

    def stamp(self, eid):
        """Size and time of the file that a study lies in; [0, 0] when it is gone."""
        return stamp_of(self.files[eid]) or [0, 0]

    def content(self, eid):
        """What tells a study's embeddings from others: the checksums that its file carries or,
        where there are none (the published files), the file's size and time."""
        try:
            crc32 = self.header(eid).crc32
        except UnreadableStudy:
            crc32 = ()
        return "crc32 " + " ".join(f"{x:08x}" for x in crc32) if crc32 else str(self.stamp(eid))

    def digest(self, eids):
        """SHA-256 of study ids and contents; packing does not change it, extracting again does."""
        lines = [f"{eid} {self.content(eid)}" for eid in eids]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def copies(self, eids):
        """Lists of the studies that have the same embeddings and names of videos.

        Found by the files' checksums, then by the numbers: a checksum may be the same by chance.
        """
        found, numbers = defaultdict(list), defaultdict(list)
        for eid in progress(eids, desc="headers", unit="study", leave=False, delay=2):
            with suppress(UnreadableStudy):
                header = self.header(eid)
                found[header.crc32[:1], header.videos, header.clips].append(eid)
        for (crc32, *_), same in found.items():
            for eid in same if crc32 and len(same) > 1 else ():
                with suppress(UnreadableStudy):
                    read = np.ascontiguousarray(next(self.read_all(eid)).embeddings)
                    numbers[crc32, hashlib.sha256(read).digest()].append(eid)
        return [same for same in numbers.values() if len(same) > 1]

    def made_with(self, eids):
        """How the studies were made: name of MADE_WITH -> {value as text: study ids}.

        The value is '' where a file does not say; what cannot be read is passed over.
        """
        found = {name: defaultdict(list) for name in MADE_WITH}
        for eid in progress(eids, desc="headers", unit="study", leave=False, delay=2):
            try:
                made_with = self.header(eid).made_with
            except UnreadableStudy:
                continue
            for name in MADE_WITH:
                found[name][str(made_with.get(name, ""))].append(eid)
        return found

    def encoder_seen(self, eids, listener=None):
        """(Whom the encoders of these studies were trained on: a list of Seen; is that all?).

        Where an encoder was trained by this program and nothing says on whom, the listener is told.
        By the files' `weights_seen`; by the weights' name, where earlier versions wrote no such.
        """
        listed, found, whole = encoders_seen(self.place), [], True
        for digest, studies in self.made_with(eids)["weights_sha256"].items():
            about = [self.header(eid).made_with for eid in studies]
            name = printable(about[0].get("weights", ""))
            said = {str(x.get("weights_seen", "")) for x in about} - {""}
            if seen := listed.get(digest):
                found += seen
            elif said & {"listed", "not said"} or (not said and TRAINED_HERE.fullmatch(name)):
                remedy = f"put {ENCODER_SEEN} of the extraction beside them, or extract them again"
                remedy += " (--redo)" * (not said)
                if "not said" in said:
                    remedy = "keep its patients out yourself, or train it anew with this version"
                (listener or Findings()).warning(
                    f"nothing says whom the encoder of {len(studies)} studies ({name}) was trained "
                    "on: studies of its training may be tests",
                    remedy,
                )
                whole = False
        return all_seen(found), whole


def reason_of(error, folder):
    """What went wrong, as text without the folder's path."""
    return clean_text(str(error).replace(f"{folder}{os.sep}", ""))


def open_store(path, findings=None, most_videos=0):
    """The clip embeddings of a dataset: what `pack` made of a folder, or the folder itself.

    A pack that is damaged, or older than a file of the folder, is not used: findings is told.
    most_videos: see Store.read.
    """
    store = open_packed_or_folder(path, findings)
    if isinstance(store, EmbeddingShards) and store.index.get("transform") not in (
        None,
        "none",
        "",
    ):
        (findings or Findings()).warning(
            f"{path.name} was made with the transform {printable(store.index['transform'])[:60]}: "
            "if that is the random one of training, it holds one augmented draw of each video",
            "make evaluations on embeddings without it",
        )
    store.most_videos, store.place = most_videos, path
    return store


def open_packed_or_folder(path, findings):
    findings, packed = findings or Findings(), packed_path(path)
    again = "run pack again"
    if path.with_name(f"{path.name}.packed").is_dir():
        old = f"{path.name}.packed is of an earlier version of this program and not used"
        findings.warning(old, f"delete it, {again}")
    if not packed.exists():
        return open_folder(path)
    try:
        store = PackedEmbeddings(packed)
    except UserError as error:
        if not path.is_dir():
            raise
        findings.warning(str(error), again)
        return open_folder(path)
    if path.is_dir():
        folder = open_folder(path)
        if set(folder.files) != set(store.files) or any(
            store.stamp(eid) != folder.stamp(eid) for eid in folder.files
        ):
            findings.warning(f"{packed.name} is out of date and not used", again)
            return folder
    findings.note(f"reading {packed.name}")
    return store


def open_folder(path):
    """The Store of a folder that is not packed. Raises UserError."""
    if not path.is_dir():
        raise UserError(f"no folder of clip embeddings {path}; see embedding_path in the config")
    is_cache = (path / "cache_index.json").exists()
    return EmbeddingShards(path) if is_cache else EmbeddingFolder(path)


class EmbeddingFolder(Store):
    """A folder of one HDF5 file a study, from embed/extract.py or the published scripts.

    A study's id is its file's name; the published endings _embed and _trim_embed do not belong to
    it. Characters that cannot be printed are escaped.
    """

    def __init__(self, path):
        names = sorted(e.name for e in os.scandir(path) if not e.name.startswith("."))
        names = [name for name in names if name.endswith((".hdf5", ".h5"))]
        if not names:
            raise UserError(f"{path} holds no .hdf5 file; make them with {EXTRACT}")
        files = {}
        for name in names:
            eid = study_id(name.rpartition(".")[0])
            if eid in files:
                raise UserError(
                    f"{path}: {files[eid].name} and {printable(name)} are both study {eid}; keep "
                    "one of them"
                )
            files[eid] = path / name
        super().__init__(path, files)

    @contextmanager
    def open(self, eid):
        with open_hdf5(self.files[eid]) as f:
            yield describe(f)

    def source_name(self, eid):
        return self.files[eid].name


def study_id(stem):
    """The study id that the name of an embedding file stands for, without its suffix."""
    return escaped(re.sub(r"(?<=.)(_trim)?_embed$", "", stem))


MOST_SHARDS, LONGEST_CLIP = 100_000, 10_000


class EmbeddingShards(Store):
    """The embedding cache of the published later branch, read as a dataset.

    cache_index.json lists the studies (`eids`) and how many shards there are (`num_shards`);
    shard_00000.h5 and so on hold a group a study with `emb` (V, C, 768) float16. Videos have no
    names there and are called by their number, from 000. Index and shards must agree.
    """

    def __init__(self, path):
        self.folder, self.index = path, read_cache_index(path)
        files = {}
        for number in range(self.index["num_shards"]):
            shard = path / f"shard_{number:05d}.h5"
            try:
                with open_hdf5(shard) as f:
                    found = [printable(name) for name in f]
            except UNREADABLE as error:
                self.refuse(f"{shard.name} cannot be read ({reason_of(error, path)})")
            if twice := sorted(set(found) & set(files)):
                self.refuse(f"study {twice[0]} is in {files[twice[0]].name} and in {shard.name}")
            files |= dict.fromkeys(found, shard)
        listed = {printable(eid) for eid in self.index["eids"]}
        for others, text in (
            (listed - set(files), "of its studies are in no shard"),
            (set(files) - listed, "studies of the shards are not in it"),
        ):
            if others:
                self.refuse(f"{len(others)} {text} ({some(sorted(others))})")
        if not files:
            self.refuse("it holds no study")
        super().__init__(path, dict(sorted(files.items())))

    def refuse(self, text):
        where = f"{self.folder.name}/cache_index.json"
        raise UserError(f"{where} and its shards disagree: {text}; make the cache again")

    @contextmanager
    def open(self, eid):
        with open_hdf5(self.files[eid]) as f:
            if not isinstance(f.get(eid, getlink=True), h5py.HardLink):
                raise ValueError("it is a link, which is not followed")
            embeddings = own_dataset(f[eid], "emb")
            check_shape(embeddings.shape)
            V, C, _ = embeddings.shape
            dtype, clips = self.index.get("dtype"), self.index.get("num_clips")
            if dtype not in (None, embeddings.dtype.name) or clips not in (None, C):
                raise ValueError(
                    f"it has {C} clips in {embeddings.dtype}, the index says {clips} in {dtype}"
                )
            clip_len = self.index.get("clip_len")
            made_with = {} if clip_len is None else {"clip_len": clip_len}
            yield OpenStudy(
                Header(1, V, C, made_with),
                lambda number: embeddings[()],
                lambda: [f"{number:03}" for number in range(V)],
            )

    def source_name(self, eid):
        return f"study {eid} of {self.files[eid].name}"


def read_cache_index(path):
    """The index of a cache of shards, its needed keys checked. Raises UserError."""
    where = f"{path.name}/cache_index.json"
    try:
        index = json.loads((path / "cache_index.json").read_bytes())
        n, eids = index["num_shards"], index["eids"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__} {clean_text(error)}"
        raise UserError(f"{where} is no index of embeddings in shards: {reason}") from error
    ids = isinstance(eids, list) and all(type(eid) in (int, str) for eid in eids)
    if type(n) is not int or not 0 < n <= MOST_SHARDS or not ids:
        raise UserError(
            f"{where} needs num_shards, 1 to {MOST_SHARDS}, and eids, a list of study ids"
        )
    clip_len = index.get("clip_len")
    if isinstance(clip_len, float | str):  # 16.0 and "16", of other writers
        with suppress(ValueError):
            if float(clip_len).is_integer():
                index["clip_len"] = clip_len = int(float(clip_len))
    if clip_len is not None and (type(clip_len) is not int or not 0 < clip_len <= LONGEST_CLIP):
        raise UserError(f"{where} needs a clip_len of 1 to {LONGEST_CLIP} frames, or none")
    return index


# -------------------------------------------------------------------------------------------- packs

PACK_FORMAT = "echofocus pack 1"
COLUMNS = {  # of a pack's index: a row a study, with its number of columns where there are several
    "eid": (str, ()),
    "row": (np.int64, ()),  # of `embeddings`, where it begins
    "shape": (np.int64, (3,)),  # copies, videos, clips of a video; zeros where it has no header
    "first_video": (np.int64, ()),  # in `videos`
    "crc32": (np.uint32, (None,)),  # of each copy, see `checksum`
    "made_with": (np.int64, ()),  # which of `settings`
    "content": (str, ()),  # see `Store.content`, of what was packed
    "source": (np.int64, (2,)),  # size and time of the file that it was packed from
    "reason": (str, ()),  # why its numbers are not there, or ''
}


class PackedEmbeddings(Store):
    """A dataset in one HDF5 file.

    `embeddings` is a flat array (rows, 768) of float32 or float16: study after study, copy after
    copy, video after video; `videos` has the names, `index/` the COLUMNS, `settings` the different
    Header.made_with, as JSON. The attribute `index_sha256` is of all that but embeddings and names,
    which `crc32` covers. Numbers are read by their place in the file (preadv): threads need not
    wait for HDF5's lock. The file stays open: a pack made anew is another file, and who reads this
    one goes on with it.
    """

    def __init__(self, path):
        self.path = path
        try:
            self.file = f = open_hdf5(path)
            if own_attributes(f, ["format"]).get("format") != PACK_FORMAT:
                raise ValueError(f"its format is not {PACK_FORMAT}")
            self.embeddings = Flat(own_dataset(f, "embeddings", "f", np.inf))
            self.videos = Flat(own_dataset(f, "videos", "text", np.inf))
            self.index, settings = read_index(f)
            check_index(self.index, len(settings), self.embeddings, self.videos)
            self.settings = [read_made_with(text) for text in settings]
        except UNREADABLE as error:
            reason = reason_of(error, path.parent)
            raise UserError(
                f"{path.name} is damaged or no pack of this version: {reason}"
            ) from error
        super().__init__(path.parent, {eid: i for i, eid in enumerate(self.index["eid"])})

    @contextmanager
    def open(self, eid):
        study = {name: column[self.files[eid]] for name, column in self.index.items()}
        copies, V, C = study["shape"].tolist()
        if not copies:
            raise UnreadableStudy(study["reason"])
        crc32 = tuple(study["crc32"][:copies].tolist())
        header = Header(copies, V, C, self.settings[study["made_with"]], crc32)

        def read_copy(number):
            if study["reason"]:
                raise UnreadableStudy(study["reason"])
            return self.embeddings.read(study["row"] + number * V * C, V * C).reshape(V, C, D)

        def read_videos():
            return [name.decode() for name in self.videos.read(study["first_video"], V).tolist()]

        yield OpenStudy(header, read_copy, read_videos)

    def source_name(self, eid):
        return f"study {eid} of {self.path.name}"

    def stamp(self, eid):
        return self.index["source"][self.files[eid]].tolist()

    def content(self, eid):
        text = self.index["content"][self.files[eid]]
        return text if self.embeddings.dtype == np.float32 else f"{text} as float16"


class Flat:
    """An HDF5 dataset that lies in its file in one piece, read by place."""

    def __init__(self, dataset):
        self.at, self.shape, self.dtype = dataset.id.get_offset(), dataset.shape, dataset.dtype
        self.descriptor = dataset.file.id.get_vfd_handle()
        known = self.dtype in (np.float32, np.float16) or self.dtype.kind == "S"
        if self.at is None or not known:
            raise ValueError(f"{dataset.name} is stored in pieces, or as {self.dtype}")

    def read(self, first, n):
        """Rows first to first + n, as an array."""
        rows = np.empty((n, *self.shape[1:]), self.dtype)
        at = self.at + int(first) * (rows.nbytes // max(n, 1))
        if n and os.preadv(self.descriptor, [rows.view(np.uint8)], at) != rows.nbytes:
            raise ValueError("the file is cut short: run pack again")
        return rows


def read_index(f):
    """A pack's index, dict of COLUMNS name to array, and its settings. Raises ValueError."""
    index = {}
    for name, (kind, _) in COLUMNS.items():
        if kind is str:
            index[name] = own_texts(f["index"], name, (None,), longest=1 << 16)
        else:
            index[name] = own_dataset(f["index"], name, np.dtype(kind).kind)[()]
    settings = own_texts(f, "settings", (None,), longest=1 << 16).tolist()
    found = index_digest(index, settings, f["embeddings"], f["videos"])
    if own_attributes(f, ["index_sha256"]).get("index_sha256") != found:
        raise ValueError("its index is not the one that was written")
    return index, settings


def read_made_with(text):
    """A Header's made_with, of its JSON. Raises ValueError."""
    made_with = json.loads(text)
    plain = isinstance(made_with, dict) and all(
        isinstance(value, str | int | float) for value in made_with.values()
    )
    if not plain:
        raise ValueError("how its studies were made is not said in text and numbers")
    return {k: clean_text(v) if isinstance(v, str) else v for k, v in made_with.items()}


def index_digest(index, settings, embeddings, videos):
    parts = [[*embeddings.shape, embeddings.dtype.str], [*videos.shape, videos.dtype.str], settings]
    parts += [[name, str(x.dtype), x.tolist()] for name, x in index.items()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def check_index(index, n_settings, embeddings, videos):
    """ValueError for an index that points out of the file: who made it may have meant harm."""
    S, most = len(index["eid"]), max(index["shape"][:, 0], default=0)
    shapes = {"shape": (S, 3), "source": (S, 2), "crc32": (S, max(most, 1))}
    if any(column.shape != shapes.get(name, (S,)) for name, column in index.items()):
        raise ValueError("its index has columns of different length")
    if embeddings.shape[1:] != (D,) or len(videos.shape) != 1 or len(set(index["eid"])) < S:
        raise ValueError("its index does not fit")
    copies, V, C = index["shape"].T.astype(object)  # Python's numbers have no end to run over
    read = index["reason"] == ""
    inside = (index["row"] >= 0) & (index["row"] + copies * V * C <= embeddings.shape[0])
    inside &= (index["first_video"] >= 0) & (index["first_video"] + V <= videos.shape[0])
    inside &= (index["shape"] > 0).all(1) & (V * C * D * embeddings.dtype.itemsize <= MOST_BYTES)
    pointed = (index["made_with"] >= 0) & (index["made_with"] < n_settings)
    if (read & ~inside.astype(bool)).any() or not pointed.all() or (index["shape"] < 0).any():
        raise ValueError("its index points out of the file")


def write_pack(source, path, dtype):
    """Write a Store as one HDF5 file, see PackedEmbeddings.

    Returns study id -> reason of those whose numbers cannot be read. A pack that is there is
    replaced when the new one is whole; what was stopped is begun anew. Raises OSError.
    """
    rows, known = 0, encoders_seen(source.folder)
    for eid in progress(source.files, desc="headers", unit="study", leave=False):
        with suppress(UnreadableStudy):
            header = source.header(eid)
            rows += header.copies * header.videos * header.clips
    with atomic_path(path) as temporary:
        at, row = begin_pack(temporary, rows, dtype), 0
        index, settings, names = [], [], []
        with open(temporary, "r+b", buffering=0) as data:
            for eid in progress(source.files, desc="pack", unit="study"):

                def write(number, block, eid=eid, row=row):
                    first = row + number * (block.size // D)
                    if first + block.size // D > rows:
                        raise OSError(f"the file of study {eid} has changed meanwhile")
                    write_all(data.fileno(), block, at + first * D * dtype.itemsize)

                study = {"eid": eid, "row": row, "first_video": len(names)}
                names += pack_study(source, eid, dtype, study, settings, write)
                row += 0 if study["reason"] else int(np.prod(study["shape"]))
                index.append(study)
        end_pack(temporary, index, settings, names)
    if known:
        write_encoder_seen(packed_seen(path), known)
    return {study["eid"]: study["reason"] for study in index if study["reason"]}


def pack_study(source, eid, dtype, study, settings, write):
    """Hand a study's copies to `write` (number, block); fills in its columns of the index.

    Returns the names of its videos; none, where something could not be read.
    """
    study |= {"shape": [0, 0, 0], "crc32": [], "made_with": 0, "reason": ""}
    study |= {"source": source.stamp(eid), "content": source.content(eid)}
    made_with, videos = {}, []
    try:
        header = source.header(eid)
        study["shape"], made_with = [header.copies, header.videos, header.clips], header.made_with
        for number, clips in enumerate(source.read_all(eid)):
            with np.errstate(over="ignore"):  # said below, with the study
                block = clips.embeddings.astype(dtype)
            videos = clips.videos
            if not np.isfinite(block).all():
                raise UnreadableStudy(f"study {eid} has numbers beyond {dtype.name}")
            write(number, block)
            study["crc32"].append(checksum(block, videos))
    except UnreadableStudy as error:
        study |= {"reason": str(error), "crc32": []}
        videos = []
    text = json.dumps(made_with)
    if text not in settings:
        settings.append(text)
    study["made_with"] = settings.index(text)
    return videos


def begin_pack(path, rows, dtype):
    """An HDF5 file with room for the embeddings; returns where in it they begin."""
    created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    created.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    created.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with new_hdf5(path) as f:
        kind, space = h5py.h5t.py_create(dtype), h5py.h5s.create_simple((max(rows, 1), D))
        return h5py.h5d.create(f.id, b"embeddings", kind, space, created).get_offset()


def end_pack(path, index, settings, names):
    """Write what a pack has beside the embeddings."""
    names = [name.encode() for name in names] or [b"-"]  # an empty array has no place
    longest = max(1, *map(len, names))
    most = max((len(study["crc32"]) for study in index), default=0)
    columns = {}
    for name, (kind, width) in COLUMNS.items():
        column = [study[name] for study in index]
        if width == (None,):
            column = [[*values, *[0] * (max(most, 1) - len(values))] for values in column]
        columns[name] = np.array(column, object if kind is str else kind)
    with new_hdf5(path, "r+") as f:
        for name, column in columns.items():
            kind = h5py.string_dtype() if column.dtype == object else column.dtype
            f.create_dataset(f"index/{name}", data=column, dtype=kind)
        f.create_dataset("settings", data=settings, dtype=h5py.string_dtype())
        f["videos"] = np.array(names, h5py.string_dtype("utf-8", longest))
        f.attrs["index_sha256"] = index_digest(columns, settings, f["embeddings"], f["videos"])
        f.attrs.update({"format": PACK_FORMAT, "version": __version__})


def write_all(descriptor, array, at):
    left = memoryview(array).cast("B")
    while len(left):
        n = os.pwrite(descriptor, left, at)
        left, at = left[n:], at + n


class VideosOf(Store):
    """The videos of a store's studies, each a unit of its own, by the id study/video."""

    def __init__(self, store, findings=None):
        super().__init__(store.folder, {})
        self.store, self.place, self.units, lost = store, store.place, {}, {}
        self.whole = lru_cache(maxsize=64)(self.read_study)
        for eid in progress(store.files, desc="videos", unit="study", leave=False, delay=2):
            try:
                with store.opened(eid) as study:
                    names = list(study.read_videos())
            except UnreadableStudy as error:
                lost[eid] = str(error)
                continue
            if len(set(names)) < len(names):
                lost[eid] = "two of its videos have one name"
                continue
            for number, name in enumerate(names):
                self.units[f"{eid}/{name}"] = eid, number
                self.files[f"{eid}/{name}"] = store.files[eid]
        if lost:
            (findings or Findings()).warning(
                f"the videos of {len(lost)} studies are left out:{listed(lost, 50)}",
                "extract these again",
            )

    def read_study(self, eid, copy):
        with self.store.opened(eid) as study:
            return study(copy)

    def header(self, unit):
        return replace(self.store.header(self.units[unit][0]), videos=1, crc32=())

    def read(self, unit, rng=None):
        eid, number = self.units[unit]
        clips = self.whole(eid, draw_copy(rng, self.store.header(eid).copies))
        own = clips.embeddings[[number]]
        return replace(clips, embeddings=own, videos=[clips.videos[number]])

    def read_all(self, unit):
        eid, number = self.units[unit]
        for clips in self.store.read_all(eid):
            own = clips.embeddings[[number]]
            yield replace(clips, embeddings=own, videos=[clips.videos[number]])

    def copies(self, units):
        """Of whole studies, each by the first of its videos."""
        first = {}
        for unit in units:
            first.setdefault(self.units[unit][0], unit)
        return [[first[eid] for eid in same] for same in self.store.copies(list(first))]

    def stamp(self, unit):
        return self.store.stamp(self.units[unit][0])

    def content(self, unit):
        eid, number = self.units[unit]
        return f"{self.store.content(eid)} {number}"


class VideosAsStudies:
    """A study's StudyClips as a store: each of its videos, by number, is a study of its own."""

    def __init__(self, study):
        self.study = study

    def read(self, number, rng=None):
        return StudyClips(self.study.embeddings[[number]], [self.study.videos[number]])

    def size(self, number):
        return self.study.embeddings.shape[1]
