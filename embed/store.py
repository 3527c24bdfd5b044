"""The clip-embedding file: writing, reading and packing, in one room."""

import hashlib
import io
import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from common.console import UserError, progress
from common.files import read_lines, stamp_of
from embed import EMBED_DIM as D

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
    files: dict of name to FileRecord, of all."""
    videos = dict(sorted(videos.items()))
    skipped = [(v, r.reason) for v, r in sorted(files.items()) if r.result != "ok"]
    rows = [(name, *vars(record).values()) for name, record in sorted(files.items())]
    text, file = h5py.string_dtype(), io.BytesIO()  # HDF5's own errors do not say "disk full"
    with h5py.File(file, "w") as f:
        if videos:
            embeddings = np.stack([e for _, e in videos.values()], axis=1)  # (1 + K, V, C, 768)
            f["embeddings"] = embeddings[0]
            f["clip_starts"] = np.stack([starts for starts, _ in videos.values()])
            if len(embeddings) > 1:
                f["augmented"] = embeddings[1:]
        f.create_dataset("videos", (len(videos),), data=list(videos) or None, dtype=text)
        f.create_dataset("skipped", (len(skipped), 2), data=skipped or None, dtype=text)
        f.create_dataset("files", (len(rows), 6), data=rows or None, dtype=text)
        f.attrs.update(attributes)
    path.write_bytes(file.getbuffer())


def read_records(path, attributes, redo):
    """What a study's file remembers: dict of name to FileRecord; None when it is to be made.

    That is when it is not there, or damaged. UserError when it was made in another way and not
    `redo`. A file of an earlier version has no stamps: its videos count as they are.
    """
    try:
        with h5py.File(path, "r") as f:
            found = dict(f.attrs)
            videos, skipped = f["videos"].asstr()[:].tolist(), f["skipped"].asstr()[:].tolist()
            rows = f["files"].asstr()[:].tolist() if "files" in f else []
    except (OSError, KeyError):
        return None
    for name, value in attributes.items():
        made = found.get(name, "independent" if name == "starts" else None)
        if name not in ("version", "weights") and made != value:
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
    """Of some videos of a study's file: dict of name to (clip starts, (1 + K, C, 768))."""
    if not names:
        return {}
    with h5py.File(path, "r") as f:
        parts = [f["embeddings"][:][None], *([f["augmented"][:]] if "augmented" in f else [])]
        embeddings, starts = np.concatenate(parts), f["clip_starts"][:]
        places = {name: i for i, name in enumerate(f["videos"].asstr()[:])}
    return {name: (starts[places[name]], embeddings[:, places[name]]) for name in names}


# ------------------------------------------------------------------------------------------ reading


class UnreadableStudy(Exception):
    """Why a study's embeddings cannot be used."""


@dataclass
class Bag:
    """A study's clip embeddings."""

    embeddings: np.ndarray  # (V, C, D) float32, or float16 from a pack of that
    videos: list[str]  # (V,) names, no absolute paths
    made: dict = field(default_factory=dict)  # MADE_WITH of its file, where it says so


# Attributes that decide what a clip embedding is: alike in a dataset, and in a model's input.
MADE_WITH = ("weights_sha256", "size", "clip_len", "sampling", "mask")


def open_store(path):
    """The clip embeddings of a dataset: what `pack` made of the folder, or the folder itself.

    A pack that lacks studies of the folder, or has others, is not used. Raises UserError.
    """
    packed = packed_path(path)
    if not (packed / "pack.json").is_file():
        return EmbeddingFolder(path)
    store = PackedEmbeddings(packed)
    if path.is_dir():
        folder = EmbeddingFolder(path)
        others = set(folder.files) != set(store.files) | set(store.unreadable)
        if others or is_stale(store, folder):
            print(f"{packed.name} is out of date and not used: run pack again")
            return folder
    print(f"reading {packed.name}")
    return store


class EmbeddingFolder:
    """A folder of one HDF5 file a study, from embed/extract.py or the published scripts.

    Ours are <study>.hdf5; the published ones <study>_trim_embed.hdf5, their study id being the
    name up to the first '_'.
    """

    def __init__(self, path):
        if not path.is_dir():
            raise UserError(
                f"no folder of clip embeddings {path}; see embedding_path in the config"
            )
        names = [p for p in sorted(path.iterdir()) if p.suffix in (".hdf5", ".h5")]
        names = [p for p in names if not p.name.startswith(".")]
        if not names:
            raise UserError(f"{path} holds no .hdf5 file; make them with embed/extract.py")
        whole = any(map(is_ours, names[:20]))
        self.files, self.sizes = {}, {}
        for file in names:
            published = file.stem.endswith("_trim_embed") or not whole
            eid = file.stem.split("_")[0] if published else file.stem
            if eid in self.files:
                raise UserError(f"{path}: {self.files[eid].name} and {file.name} are one study")
            self.files[eid] = file

    def read(self, eid, rng=None):
        """A study's Bag. Raises UnreadableStudy.

        rng: a numpy Generator that draws, each alike, the plain embeddings or one of the randomly
        transformed copies, if the file has any.
        """
        try:
            with h5py.File(self.files[eid], "r") as f:
                if "embeddings" in f:
                    copies = own_numbers(f, "augmented") if "augmented" in f else ()
                    copy = draw_copy(rng, len(copies))
                    arrays = copies[copy - 1] if copy else own_numbers(f, "embeddings")[:]
                    if f["videos"].shape != (len(arrays),):
                        raise ValueError("videos and embeddings differ in number")
                    videos = f["videos"].asstr()[:].tolist()
                else:
                    arrays, videos = read_published(f)
                names = (*MADE_WITH, "weights")
                made = {name: plain(f.attrs[name]) for name in names if name in f.attrs}
        except UNREADABLE as error:
            text = str(error).replace(f"{self.files[eid].parent}{os.sep}", "")
            raise UnreadableStudy(f"{self.files[eid].name}: {text}") from error
        if len(arrays) == 0:
            raise UnreadableStudy(f"{self.files[eid].name} holds no video")
        if len({np.shape(a) for a in arrays}) > 1 or np.ndim(arrays[0]) != 2:
            raise UnreadableStudy(f"{self.files[eid].name}: videos differ in shape")
        if np.shape(arrays[0])[1] != D or not np.shape(arrays[0])[0]:
            raise UnreadableStudy(
                f"{self.files[eid].name}: clips are {np.shape(arrays[0])}, expected (clips, {D})"
            )
        if len(videos) != len(arrays):
            raise UnreadableStudy(f"{self.files[eid].name}: videos and embeddings differ in number")
        try:
            bag = Bag(np.asarray(arrays, dtype=np.float32), videos, made)
        except ValueError as error:
            raise UnreadableStudy(f"{self.files[eid].name}: not numbers") from error
        if not np.isfinite(bag.embeddings).all():
            raise UnreadableStudy(f"{self.files[eid].name} holds NaN or infinite numbers")
        return bag

    def read_all(self, eid):
        """A study's plain Bag and its transformed copies, as a list of Bags."""
        first = self.read(eid)
        with h5py.File(self.files[eid], "r") as f:
            copies = f["augmented"][:] if "augmented" in f else []
        return [first, *(Bag(copy, first.videos, first.made) for copy in copies)]

    def size(self, eid):
        """About how many clips a study has: from its file's size, since nothing is opened."""
        if eid not in self.sizes:
            stamp = stamp_of(self.files[eid]) or [0]  # gone: `read` will say so
            self.sizes[eid] = max(1, stamp[0] // (4 * D))
        return self.sizes[eid]

    def encoder_digest(self):
        """The SHA-256 of the encoder weights, from the first file's attributes, or ''."""
        try:
            with h5py.File(next(iter(self.files.values())), "r") as f:
                return str(f.attrs.get("weights_sha256", ""))
        except OSError:
            return ""


def plain(value):
    """An HDF5 attribute as a Python number or text."""
    return value.item() if isinstance(value, np.generic) else value


def listing_digest(store, eids):
    """SHA-256 of the studies' ids and sizes: tells which data was used, without reading it all."""
    listing = "\n".join(f"{eid} {store.size(eid)}" for eid in eids)
    return hashlib.sha256(listing.encode()).hexdigest()


# What h5py raises on files that are damaged, or made to do harm.
UNREADABLE = (OSError, KeyError, RuntimeError, TypeError, AttributeError, ValueError, MemoryError)

MOST_BYTES = 4 << 30  # of a study's embeddings: 100 times the largest


def own_numbers(f, name):
    """An HDF5 dataset of numbers, that lies in the file itself and is of a sane size.

    A link, an external or a virtual dataset would read another file. Raises ValueError.
    """
    dataset = f[name]
    inside = isinstance(f.get(name, getlink=True), h5py.HardLink)
    if not inside or dataset.external or dataset.is_virtual or dataset.dtype.kind != "f":
        raise ValueError(f"{name} is no plain array of floating-point numbers")
    if dataset.nbytes > MOST_BYTES:
        raise ValueError(f"{name} claims {dataset.nbytes / 1e9:.0f} GB")
    return dataset


def draw_copy(rng, copies):
    """0 for the plain embeddings, or the number of a transformed copy; always 0 without rng."""
    return int(rng.integers(copies + 1)) if rng is not None and copies else 0


def is_ours(path):
    try:
        with h5py.File(path, "r") as f:
            return "embeddings" in f
    except OSError:
        return False


def read_published(f):
    """Every dataset 'emb' below an HDF5 file's root: list of (C, D) arrays, list of video names.

    The groups above it spell an absolute path of the site that made the file; only its last part
    is kept, or more of it where that is not enough to tell videos apart.
    """
    found = []
    f.visititems(lambda name, node: found.append(name) if is_embedding(name, node) else None)
    found.sort()
    paths = [name.split("/")[:-1] for name in found]
    keep = next(
        n
        for n in range(1, 100)
        if n > max(map(len, paths), default=0) or len({tuple(p[-n:]) for p in paths}) == len(paths)
    )
    return [own_numbers(f, name)[:] for name in found], ["/".join(p[-keep:]) for p in paths]


def is_embedding(name, node):
    return isinstance(node, h5py.Dataset) and name.split("/")[-1] == "emb"


def read_header(path):
    """((videos, clips), MADE_WITH attributes as text) of a file. Raises UnreadableStudy."""
    try:
        with h5py.File(path, "r") as f:
            about = {name: str(f.attrs.get(name, "")) for name in MADE_WITH}
            if "embeddings" in f:
                shapes = {f["embeddings"].shape[1:]}
                n, n_names = len(f["embeddings"]), len(f["videos"])
            else:
                found = []
                f.visititems(lambda k, x: found.append(x.shape) if is_embedding(k, x) else None)
                shapes, n, n_names = set(found), len(found), len(found)
    except UNREADABLE as error:
        raise UnreadableStudy(f"{path.name}: {error}") from error
    shape = next(iter(shapes), ())
    if n != n_names or len(shapes) != 1 or len(shape) != 2 or shape[1] != D or not shape[0]:
        raise UnreadableStudy(
            f"{path.name}: {n} videos of shape {' and '.join(map(str, shapes))} with {n_names} "
            f"names, expected (clips, {D}) and a name for each"
        )
    return (n, shape[0]), about


# -------------------------------------------------------------------------------------------- packs


def packed_path(folder):
    return folder.with_name(folder.name + ".packed")


def is_stale(store, folder):
    """Whether a file of the folder is not the one that was packed."""
    lines = store.files | store.unreadable
    return any(lines[eid].get("source") != stamp_of(file) for eid, file in folder.files.items())


class PackedEmbeddings:
    """A dataset in one file; see `cmd_pack` for its format.

    Read by position (pread): threads share the handle, and pages of the file do not count as
    memory of the process, as those of a memory map would.
    """

    def __init__(self, path):
        self.path = path
        about = json.loads((path / "pack.json").read_text())
        self.dtype, self.digest = np.dtype(about["dtype"]), about["weights_sha256"]
        self.files, self.unreadable = {}, {}
        for line in read_lines(path / "index.jsonl"):
            (self.unreadable if "reason" in line else self.files)[line["eid"]] = line
        self.file = open(path / "embeddings.bin", "rb", buffering=0)  # noqa: SIM115 - for reads

    def read(self, eid, rng=None):
        """As EmbeddingFolder.read; numbers are not checked again, `pack` has done it."""
        line = self.files[eid]
        copies, *shape = line["shape"]
        bag = np.empty(shape, self.dtype)
        at = line["offset"] + draw_copy(rng, copies - 1) * bag.nbytes
        if os.preadv(self.file.fileno(), [bag], at) != bag.nbytes:
            raise UnreadableStudy(f"{self.path.name} ends before study {eid}: run pack again")
        return Bag(bag, line["videos"], line["made"])

    def size(self, eid):
        """Clips of a study."""
        _, V, C, _ = self.files[eid]["shape"]
        return V * C

    def encoder_digest(self):
        return self.digest


def append_studies(path, folder, dtype):
    """Append the studies that the index does not have; a broken end is cut off first."""
    (path / "embeddings.bin").touch()
    there = (path / "embeddings.bin").stat().st_size
    lines = [
        x for x in read_lines(path / "index.jsonl") if x["offset"] + x.get("bytes", 0) <= there
    ]
    stamps = {eid: stamp_of(file) for eid, file in folder.files.items()}
    lines = [x for x in lines if x["eid"] in stamps and x.get("source") == stamps[x["eid"]]]
    end = max((x["offset"] + x["bytes"] for x in lines if "bytes" in x), default=0)
    with open(path / "index.jsonl", "w") as index, open(path / "embeddings.bin", "ab") as data:
        index.writelines(json.dumps(line) + "\n" for line in lines)
        data.truncate(end)
        todo = sorted(set(folder.files) - {line["eid"] for line in lines})
        for eid in progress(todo, desc="pack", unit="study"):
            line = {"eid": eid, "offset": end, "source": stamps[eid]}
            try:
                bags = folder.read_all(eid)
                block = np.stack([bag.embeddings for bag in bags]).astype(dtype)
                if not np.isfinite(block).all():
                    raise UnreadableStudy(f"{eid} has numbers beyond {dtype.name}")
            except UnreadableStudy as error:
                line["reason"] = str(error)
            else:
                line |= {"shape": block.shape, "videos": bags[0].videos, "bytes": block.nbytes}
                line["made"] = bags[0].made
                line["crc32"] = zlib.crc32(block.tobytes())
                data.write(block.tobytes())
                data.flush()  # the data first: a line says that its block is there
                end += block.nbytes
            index.write(json.dumps(line) + "\n")
            index.flush()


def check_pack(path):
    """Read every block back and compare its CRC-32. Raises UserError."""
    with open(path / "embeddings.bin", "rb") as data:
        for line in progress(read_lines(path / "index.jsonl"), desc="check", unit="study"):
            if "bytes" not in line:
                continue
            data.seek(line["offset"])
            if zlib.crc32(data.read(line["bytes"])) != line["crc32"]:
                raise UserError(f"{path}: study {line['eid']} reads back wrong; delete it, repack")


class VideosAsStudies:
    """A study's Bag as a store: each of its videos, by number, is a study of its own."""

    def __init__(self, bag):
        self.bag = bag

    def read(self, number, rng=None):
        return Bag(self.bag.embeddings[[number]], [self.bag.videos[number]])

    def size(self, number):
        return self.bag.embeddings.shape[1]
