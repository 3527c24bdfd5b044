"""The clip-embedding file and the stores: folders, shards, packs; what is damaged or means harm."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import write_embeddings

from echofocus_core.base import hdf5
from echofocus_core.base.console import RUN, Collected, UserError
from echofocus_core.base.files import kept_errors
from echofocus_core.base.options import Settings
from echofocus_core.study import attention as packed
from echofocus_core.study.cohort import tell_copies
from echofocus_core.study.loop import plan_batches, read_batches
from echofocus_core.study.network import StudyModel
from echofocus_core.study.sources import refuse_mixed
from echofocus_core.study.splits import Seen
from echofocus_core.video import panecho
from echofocus_core.video import store as st
from echofocus_core.video.record import EncoderRecord

TEXT = h5py.string_dtype()


def clips(seed, V=2, C=4):
    return np.random.default_rng(seed).standard_normal((V, C, 768)).astype(np.float32)


def write_ours(path, seed, copies=1, **attributes):
    """A study file as extraction writes it, of two videos and one that was skipped."""
    arrays = [clips(seed + 100 * k) for k in range(copies)]
    starts = np.arange(4)
    videos = {f"v{v}.avi": (starts, np.stack([a[v] for a in arrays])) for v in range(2)}
    path.parent.mkdir(exist_ok=True)
    files = dict.fromkeys(videos, st.FileRecord()) | {"x.avi": st.FileRecord(result="skipped")}
    st.write_study(path, videos, attributes, files)
    return arrays


def pack(folder, dtype="float32"):
    path = st.packed_path(folder)
    st.write_pack(st.open_folder(folder), path, np.dtype(dtype))
    return path


def reason(folder, eid):
    with pytest.raises(st.UnreadableStudy) as error:
        st.open_folder(folder).read(eid)
    return str(error.value)


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        write_ours(tmp_path / "emb" / f"s{i}.hdf5", i, copies=1 + i, weights_sha256="ab")
    return tmp_path / "emb"


# --------------------------------------------------------------------------- one file, its checksum


def test_a_study_file_reads_back_and_says_what_it_holds(folder):
    store = st.open_folder(folder)
    header = store.header("s2")
    assert (header.copies, header.videos, header.clips) == (3, 2, 4)
    assert [store.size(e) for e in store.files] == [8, 8, 8]
    study = store.read("s2")
    assert study.videos == ["v0.avi", "v1.avi"] and study.made_with == {"weights_sha256": "ab"}
    assert (study.embeddings == clips(2)).all()
    copies = [study.embeddings for study in store.read_all("s2")]
    assert (np.stack(copies) == [clips(2), clips(102), clips(202)]).all()
    drawn = [store.read("s2", np.random.default_rng(k)).embeddings for k in range(40)]
    assert {d[0, 0, 0] for d in drawn} == {c[0, 0, 0] for c in copies}


def test_the_checksum_is_the_one_stated(folder):
    """CRC-32 of the bytes after a JSON list of type, shape and names, by zlib alone."""
    with h5py.File(folder / "s0.hdf5") as f:
        raw, names = f["embeddings"][:], f["videos"].asstr()[:].tolist()
        about = json.dumps(["<f4", [2, 4, 768], names]).encode()
        assert f.attrs["crc32"].tolist() == [zlib.crc32(about + raw.tobytes())]


@pytest.mark.parametrize("packed", [False, True])
def test_the_same_videos_in_two_studies(folder, packed):
    """Found by checksums and numbers; of two patients an error, of one a warning."""
    for name in "tu":
        shutil.copy(folder / "s0.hdf5", folder / f"{name}.hdf5")
    if packed:
        pack(folder)
    found = st.open_store(folder, Collected(), most_videos=1)
    assert found.copies(list(found.files)) == [["s0", "t", "u"]]
    units = st.VideosOf(found)
    assert units.copies([x for x in units.files if x != "s0/v0.avi"]) == [
        ["s0/v1.avi", "t/v0.avi", "u/v0.avi"]
    ]
    for pids, levels in (("abxaa", ["ERROR"]), ("abaac", ["WARNING"]), ("ab", [])):
        heard = Collected()
        tell_copies(pd.Series(list(pids), ["s0", "s1", "t", "u", "s2"][: len(pids)]), found, heard)
        assert [x.level for x in heard.findings] == levels
        assert all("s0 and t and u" in x.text for x in heard.findings)


def test_studies_of_one_checksum_by_chance_are_not_the_same(folder, monkeypatch):
    monkeypatch.setattr(st, "checksum", lambda *_: 7)
    for name, seed in (("x", 5), ("y", 6), ("z", 5)):
        write_ours(folder / f"{name}.hdf5", seed)
    assert st.open_folder(folder).copies(["x", "y"]) == []
    assert st.open_folder(folder).copies(["x", "y", "z"]) == [["x", "z"]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("what", ["number", "name"])
def test_a_changed_byte_is_noticed(folder, packed, what):
    path = pack(folder) if packed else folder / "s0.hdf5"
    raw = bytearray(path.read_bytes())
    wanted = clips(0)[1, 2, 5:8].tobytes() if what == "number" else b"v1.avi"
    assert raw.count(wanted) >= 1
    raw[raw.index(wanted) + 1] ^= 1
    path.write_bytes(raw)
    store = st.open_store(folder, Collected())
    assert isinstance(store, st.PackedEmbeddings) == packed
    with pytest.raises(st.UnreadableStudy, match=r"s0.* is damaged"):
        store.read("s0")
    assert (store.read("s1").embeddings == clips(1)).all()


def test_what_extraction_remembers(folder):
    path, made = folder / "s0.hdf5", {"weights_sha256": "ab"}
    records = st.read_records(path, made, False)
    details = st.read_details(path)
    assert details.starts.keys() == {"v0.avi", "v1.avi"} and details.skipped[0][0] == "x.avi"
    assert (details.starts["v1.avi"] == np.arange(4)).all()
    assert {name: r.result for name, r in records.items()} == {
        "v0.avi": "ok", "v1.avi": "ok", "x.avi": "skipped"
    }  # fmt: skip
    with pytest.raises(UserError, match="--redo"):
        st.read_records(path, {"weights_sha256": "cd"}, False)
    assert st.read_records(path, {"weights_sha256": "cd"}, True) is None
    starts, embeddings = st.read_results(folder / "s2.hdf5", ["v1.avi"])["v1.avi"]
    assert (starts == np.arange(4)).all()
    assert (embeddings == [clips(2)[1], clips(102)[1], clips(202)[1]]).all()
    raw = bytearray(path.read_bytes())
    raw[raw.index(clips(0)[0, 0, :3].tobytes())] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="damaged"):  # and so is made anew
        st.read_results(path, ["v1.avi"])
    path.write_bytes(b"")
    assert st.read_records(path, made, False) is None


@pytest.mark.parametrize("what", ["reason", "attribute", "start"])
def test_a_changed_record_is_noticed(folder, capsys, what):
    """What a study's file remembers beside its numbers decides what is not extracted again."""
    path, made = folder / "s0.hdf5", {"weights_sha256": "ab"}
    with h5py.File(path, "r+") as f:
        if what == "reason":
            rows = f["files"][:]
            rows[2, 3] = b"again"
            f["files"][:] = rows
        elif what == "attribute":
            f.attrs["weights_sha256"] = "ac"
        else:
            f["clip_starts"][0, 0] = 7
    assert st.read_records(path, made | {"weights_sha256": "ac"}, False) is None
    assert st.read_records(path, made, False) is None
    assert st.read_details(path) == st.StudyDetails()  # nor are other frames marked on a page
    assert "s0.hdf5 is damaged" in capsys.readouterr().out
    if what == "attribute":
        assert "not what was written" in reason(folder, "s0")
    else:
        assert (st.open_folder(folder).read("s0").embeddings == clips(0)).all()


FILL = """
import resource, sys
import numpy as np
from echofocus_core.base.console import run_main
from echofocus_core.base.files import atomic_path
from echofocus_core.base.hdf5 import new_hdf5

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)

def main():
    with atomic_path(sys.argv[1]) as temporary, new_hdf5(temporary) as f:
        for i in range(40):
            print(i)
            f[str(i)] = np.ones((10, 768))
            f.flush()

run_main(main, "x")
"""


@pytest.mark.parametrize("size", [10, 3000, 70_000, 1_000_000])
def test_a_full_disk_is_one_line(tmp_path, size):
    """However far HDF5 came: it writes at its close too, and would crash at the end of Python.

    The work ends at the first write that fails, not with the last."""
    line = [sys.executable, "-c", FILL, str(tmp_path / "a.h5"), str(size)]
    found = subprocess.run(line, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert found.returncode == 1 and found.stderr.count("\n") == 1, found.stderr
    assert "File too large" in found.stderr and os.listdir(tmp_path) == []
    assert len(found.stdout.split()) <= size // 61440 + 1


def test_what_a_full_disk_did_not_take_is_read_back(tmp_path):
    """As HDF5 does while it closes; it crashed over memory that nothing had been read into."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    text, whole = bytearray(60), io.BytesIO()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
        with pytest.raises(OSError, match="File too large"), kept_errors(
            tmp_path / "a", reads_back=True
        ) as file:  # fmt: skip
            for at, data in ((0, b"a" * 30), (40, b"b" * 9), (25, b"c" * 20), (2, b"d")):
                for f in (file, whole):
                    f.seek(at)
                    with contextlib.suppress(OSError):
                        f.write(data)
            assert file.error and file.seek(0, os.SEEK_END) == whole.seek(0, os.SEEK_END) == 49
            file.seek(0)
            assert file.readinto(text) == 60 and text.rstrip(b"\0") == whole.getvalue()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# -------------------------------------------------------------------------------- names of studies


@pytest.mark.parametrize(
    "name, eid",
    [
        ("a_1.hdf5", "a_1"),
        ("a_1_embed.hdf5", "a_1"),
        ("a_1_trim_embed.hdf5", "a_1"),
        ("a_trim.h5", "a_trim"),
        ("a_embed_b.hdf5", "a_embed_b"),
        ("_embed.hdf5", "_embed"),
        ("a\nb.hdf5", "a\\nb"),
        (os.fsdecode(b"caf\xe9.hdf5"), "caf\\udce9"),
    ],
)
def test_study_ids_lose_the_published_ending_alone(tmp_path, name, eid):
    """Whatever the file holds, and whether or not its neighbours open."""
    folder = tmp_path / "emb"
    folder.mkdir()
    (folder / "0.hdf5").write_bytes(b"damaged")
    with h5py.File(folder / "f.h5", "w") as f:
        f["lab/site/a/v/emb"] = clips(0)[0]
    (folder / "f.h5").rename(folder / name)
    store = st.open_folder(folder)
    assert set(store.files) == {"0", eid}
    assert (store.read(eid).embeddings == clips(0)[:1]).all() and store.size(eid) == 4
    assert store.size("0") == 0


def test_two_files_of_one_study_are_named(folder):
    shutil.copy(folder / "s0.hdf5", folder / "s0_trim_embed.hdf5")
    with pytest.raises(UserError, match=r"s0\.hdf5 and s0_trim_embed\.hdf5 are both study s0"):
        st.open_folder(folder)


def test_the_published_layout(tmp_path):
    write_embeddings(tmp_path / "emb", "7_x", clips(3, V=3), layout="published")
    with h5py.File(tmp_path / "emb" / "twins_embed.hdf5", "w") as f:
        for i, side in enumerate(("left", "right")):
            f[f"home/somebody/{side}/v.avi/emb"] = clips(4)[i]
    store = st.open_folder(tmp_path / "emb")
    study = store.read("7_x")
    assert study.videos == ["v00.avi", "v01.avi", "v02.avi"]
    assert (study.embeddings == clips(3, V=3)).all()
    assert store.read("twins").videos == ["left/v.avi", "right/v.avi"]


# -------------------------------------------------------------------------------------- what is odd


def huge_attribute(f):
    f.attrs.create("sampling", np.bytes_(b"x" * 60000))
    del f.attrs["attributes_crc32"]  # a file of an earlier version


def odd(change):
    """A study file of ours, after `change(h5py.File)`."""

    def write(path):
        write_ours(path, 0, copies=2)
        with h5py.File(path, "r+") as f:
            change(f)

    return write


def replaced(name, **options):
    def change(f):
        del f[name]
        f.create_dataset(name, **options)

    return odd(change)


def linked(name, link):
    def change(f):
        del f[name]
        f[name] = link

    return odd(change)


def virtual(f):
    layout = h5py.VirtualLayout((2,), TEXT)
    layout[:] = h5py.VirtualSource("secret.h5", "lines", (2,))
    del f["videos"]
    f.create_virtual_dataset("videos", layout)


def references(f):
    names = np.array([f["videos"].ref, f["skipped"].ref], h5py.ref_dtype)
    del f["videos"]
    f.create_dataset("videos", data=names, dtype=h5py.ref_dtype)


def one_text_many_times(f):
    """200 names of 1 MB that are stored once: 200 MB when read."""
    del f["videos"], f["embeddings"], f["augmented"], f.attrs["crc32"]
    f["embeddings"] = np.zeros((200, 1, 768), np.float32)
    names = f.create_dataset("videos", (200,), TEXT)
    names[0] = "x" * 1_000_000
    at, path = names.id.get_offset(), f.filename
    f.flush()
    entry = Path(path).read_bytes()[at : at + 16]
    with open(path, "r+b") as raw:
        raw.seek(at)
        raw.write(entry * 200)


def nested(path):
    with h5py.File(path, "w") as f:
        group = f
        for _ in range(2000):
            group = group.create_group("g")
        group["emb"] = clips(0)[0]


def looped(path):
    with h5py.File(path, "w") as f:
        f["a/v/emb"] = clips(0)[0]
        f["a/v/again"] = f["a"]
        f["b"] = h5py.SoftLink("/a")


def with_attributes(**values):
    return odd(lambda f: f.attrs.update(values))


def unsigned(array):
    """Embeddings without a checksum, as the published ones have none."""

    def change(f):
        del f.attrs["crc32"], f["augmented"], f["embeddings"]
        f["embeddings"] = array

    return odd(change)


def of_floats(f):
    del f.attrs["crc32"]
    f.attrs["crc32"] = ["a", "b"]


def blank_heap(path):
    """A block of zeros in the texts: HDF5 2.0 would look for their end for ever."""
    write_ours(path, 0)
    data = path.read_bytes()
    heap = data.index(b"GCOL") + 16
    path.write_bytes(data[:heap] + bytes(64) + data[heap + 64 :])


def test_many_marks_of_heaps_are_no_hang(folder):
    with h5py.File(folder / "marks.h5", "w") as f:
        f["numbers"] = np.frombuffer(b"GCOL1234" * 100_000, np.uint8)
        f["heaps"] = np.frombuffer(b"GCOL\1\0\0\0\0\0\x10\0\0\0\0\0" * 30_000, np.uint8)
        f.attrs["size"] = "a"
    with h5py.File(folder / "marks.h5") as f, pytest.raises(ValueError, match="without end"):
        hdf5.own_attributes(f, ["size"])


ODD = {
    "external link": (
        linked("embeddings", h5py.ExternalLink("secret.h5", "numbers")),
        "embeddings is no dataset of the file itself",
    ),
    "soft link": (linked("videos", h5py.SoftLink("/skipped")), "videos is no dataset of the file"),
    "external names": (
        replaced("videos", shape=(2,), dtype="S9", external=[("secret.txt", 0, 18)]),
        "videos is no dataset of the file itself",
    ),
    "external numbers": (
        replaced("embeddings", shape=(2, 4, 768), dtype="f4", external=[("secret.txt", 0, 24576)]),
        "embeddings is no dataset of the file itself",
    ),
    "virtual names": (odd(virtual), "videos is no dataset of the file itself"),
    "references": (odd(references), "videos is not text"),
    "names that are numbers": (replaced("videos", data=[1.0, 2.0]), "videos is not text"),
    "too few names": (replaced("videos", data=["a"], dtype=TEXT), "differ in number"),
    "huge": (
        replaced("embeddings", shape=(10**6, 16, 768), dtype="f4", chunks=(1, 16, 768)),
        "claims 49.2 GB",
    ),
    "never written": (replaced("embeddings", shape=(2, 4, 768), dtype="f4"), "never written"),
    "pieces of a number": (
        replaced("embeddings", data=np.zeros((5, 40, 768), "f4"), chunks=(1, 1, 768)),
        "pieces of",
    ),
    "a piece larger than all": (
        replaced(
            "embeddings", shape=(2, 4, 768), dtype="f4", chunks=(2**10, 2**10, 768),
            maxshape=(None, None, 768),
        ),
        "pieces of",
    ),
    "objects": (replaced("embeddings", data=["a"], dtype=TEXT), "embeddings is not numbers"),
    "whole numbers": (replaced("embeddings", data=np.ones((2, 4, 768), int)), "int64"),
    "copies of another shape": (
        replaced("augmented", data=np.zeros((1, 2, 3, 768), "f4")),
        r"augmented copies are of shape \(1, 2, 3, 768\)",
    ),
    "copies of another number": (
        replaced("augmented", data=np.zeros((2, 2, 4, 768), "f4")),
        "2 checksums for 3 copies",
    ),
    "width": (
        replaced("embeddings", data=np.zeros((2, 4, 512), "f4")),
        r"expected \(videos, clips, 768\)",
    ),
    "empty": (replaced("embeddings", data=np.zeros((0, 4, 768), "f4")), "augmented"),
    "huge attribute": (
        odd(huge_attribute),
        None,
    ),
    "attribute of references": (
        odd(lambda f: f.attrs.create("mask", f.ref, dtype=h5py.ref_dtype)),
        "attribute mask",
    ),
    "attribute of compounds": (
        odd(lambda f: f.attrs.create("size", np.zeros(2, [("a", int), ("b", "f4")]))),
        "attribute size",
    ),
    "checksums that are text": (odd(of_floats), "attribute crc32"),
    "checksums that are fractions": (with_attributes(crc32=[1.5, 2.5]), "attribute crc32"),
    "one checksum": (with_attributes(crc32=1), "attribute crc32"),
    "two sizes": (with_attributes(size=[224, 112]), "attribute size"),
    "numbers of no encoder": (unsigned(np.full((2, 4, 768), 1e30, "f4")), "largest is 1e[+]30"),
    "a number that is none": (unsigned(np.full((2, 4, 768), np.nan, "f4")), "it holds NaN"),
    "all 0": (unsigned(np.zeros((2, 4, 768), "f4")), "largest is 0"),
    "one name 200 times": (odd(one_text_many_times), "texts of 200 MB"),
    "groups without end": (nested, "without end"),
    "a heap without end": (blank_heap, "its texts are damaged"),
    "a circle of groups": (looped, "links, which are not followed"),
    "nothing": (lambda path: h5py.File(path, "w").close(), "no video"),
    "a folder": (lambda path: path.mkdir(), "no regular file"),
    "a FIFO": (os.mkfifo, "no regular file"),
    "a link to nothing": (lambda path: path.symlink_to("gone"), "no regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "no regular file"),
    "zeros": (lambda path: path.write_bytes(bytes(5000)), "signature"),
}  # fmt: skip


def test_attributes_and_names_as_other_programs_write_them(tmp_path, monkeypatch):
    """Lists of one; names in a dataset that can grow, packed or not, whatever the file's size."""
    monkeypatch.setattr(hdf5, "MOST_TEXT", 100_000)
    names = [f"v{i}.avi" for i in range(60)]
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["emb"] = np.zeros(10_000)
        f.attrs["clip_len"] = np.array([16])
        f.attrs.create("mask", ["fan"], dtype=TEXT)
        f.create_dataset("grows", data=names, dtype=TEXT, maxshape=(None,))
        f.create_dataset("packed", data=names, dtype=TEXT, compression="gzip")
        f.create_dataset("pairs", data=[names, names], dtype=TEXT, maxshape=(None, 60))
        f.create_dataset("long", data=["x" * 2000] * 60, dtype=TEXT, maxshape=(None,))
    with hdf5.open_hdf5(tmp_path / "a.h5") as f:
        found = hdf5.own_attributes(f, ["clip_len", "mask"])
        assert repr(found) == "{'clip_len': 16, 'mask': 'fan'}"
        for name in ("grows", "packed"):
            assert hdf5.own_texts(f, name, (None,)).tolist() == names
        assert hdf5.own_texts(f, "pairs", (None, 60)).tolist() == [names, names]
        with pytest.raises(ValueError, match="long holds texts of"):
            hdf5.own_texts(f, "long", (None,))


@pytest.mark.parametrize("kind", ODD)
def test_odd_files_cost_their_study_alone(folder, kind, monkeypatch):
    """Listed with the reason, whatever store; nothing outside is read; the others are."""
    monkeypatch.chdir(folder)
    Path("secret.txt").write_bytes(b"name of a patient" * 2000)
    with h5py.File("secret.h5.part", "w") as f:
        f["numbers"] = clips(0)
        f.create_dataset("lines", data=["secret", "secret"], dtype=TEXT)
    Path("secret.h5.part").rename("secret.h5")
    monkeypatch.setattr(hdf5, "MOST_CHUNKS", 100)
    make, text = ODD[kind]
    make(folder / "a.hdf5")
    Path("secret.h5").rename("../secret.h5")
    assert (st.open_folder(folder).read("s1").embeddings == clips(1)).all()
    if text is None:
        assert len(st.open_folder(folder).read("a").made_with["sampling"]) == 200
        return
    with pytest.raises(st.UnreadableStudy, match=text) as error:
        st.open_folder(folder).read("a")
    assert str(error.value).startswith("a.hdf5: ") and str(folder) not in str(error.value)
    pack(folder)
    packed = st.open_store(folder, Collected())
    assert isinstance(packed, st.PackedEmbeddings)
    with pytest.raises(st.UnreadableStudy) as again:
        packed.read("a")
    assert str(again.value) == str(error.value)
    assert (packed.read("s1").embeddings == clips(1)).all()


def test_names_are_cut_and_made_printable(folder):
    write_ours(folder / "s0.hdf5", 0)
    with h5py.File(folder / "s0.hdf5", "r+") as f:
        del f["videos"], f.attrs["crc32"]
        f.create_dataset("videos", data=["a\x1b[2J\nb", "x" * 300_000], dtype=TEXT)
    first, second = st.open_folder(folder).read("s0").videos
    assert first == "a?[2J?b" and len(second) == 200 and second.startswith("xxx")


# ------------------------------------------------------------------------------------------- shards


def write_cache(folder, shards=3, **index):
    """An embedding cache as the published later branch makes it; returns id -> (V, C, 768)."""
    folder.mkdir()
    studies = {str(i): clips(i, V=1 + i % 3).astype(np.float16) for i in range(10, 17)}
    for i in range(shards):
        with h5py.File(folder / f"shard_{i:05d}.h5", "w") as f:
            for eid, numbers in studies.items():
                if int(eid) % shards == i:
                    f.create_dataset(f"{eid}/emb", data=numbers, compression="lzf")
    about = {"version": 1, "num_shards": shards, "shard_format": "hdf5", "dtype": "float16"}
    about |= {"num_clips": 4, "clip_len": 16, "eids": [int(eid) for eid in studies]}
    (folder / "cache_index.json").write_text(json.dumps(about | index))
    return studies


def test_a_cache_in_shards_is_a_dataset(tmp_path):
    studies = write_cache(tmp_path / "cache")
    for store in (
        st.open_store(tmp_path / "cache"),
        pack(tmp_path / "cache") and st.open_store(tmp_path / "cache"),
    ):
        assert list(store.files) == list(studies)
        for eid, numbers in studies.items():
            study = store.read(eid)
            assert study.embeddings.dtype == np.float32 and (study.embeddings == numbers).all()
            assert study.videos == [f"{i:03}" for i in range(len(numbers))]
            assert store.size(eid) == 4 * len(numbers) and study.made_with == {"clip_len": 16}


@pytest.mark.parametrize("clip_len", [16.0, "16"])
def test_a_whole_number_in_other_words_is_one(tmp_path, clip_len):
    write_cache(tmp_path / "cache", clip_len=clip_len)
    store = st.open_store(tmp_path / "cache")
    assert repr(store.read("10").made_with) == "{'clip_len': 16}"


def test_a_cache_of_augmented_draws_is_said(tmp_path):
    for transform, warned in (("train\x1b", 1), ("none", 0), (None, 0), (["crop", 0.5], 1)):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        write_cache(tmp_path / "cache", transform=transform)
        listener = Collected()
        st.open_store(tmp_path / "cache", listener)
        said = [f.text for f in listener.findings]
        assert len(said) == warned and all("one augmented draw" in t for t in said)
        assert "\x1b" not in "".join(said)


def test_index_and_shards_that_disagree_are_refused(tmp_path):
    for i, (index, change, text) in enumerate(
        (
            ({"eids": [10, 11, 99]}, None, r"1 of its studies are in no shard \(99\)"),
            ({"eids": [10, 11]}, None, "5 studies of the shards are not in it"),
            ({"num_shards": 4}, None, "shard_00003.h5 cannot be read"),
            ({"num_shards": 10**9}, None, "needs num_shards"),
            ({"eids": [[1]]}, None, "eids, a list"),
            ({"clip_len": -5}, None, "needs a clip_len"),
            ({"clip_len": 10**400}, None, "needs a clip_len"),
            ({"clip_len": [16]}, None, "needs a clip_len"),
            ({"clip_len": 16.5}, None, "needs a clip_len"),
            ({"clip_len": "all"}, None, "needs a clip_len"),
            ({"clip_len": float("inf")}, None, "needs a clip_len"),
            ({}, lambda f: f.copy("11", f, "10"), "study 10 is in"),
        )
    ):
        folder = tmp_path / f"c{i}"
        write_cache(folder, **index)
        if change:
            with h5py.File(folder / "shard_00002.h5", "r+") as f:
                change(f)
        with pytest.raises(UserError, match=text):
            st.open_store(folder)
    for text in ("", "[" * 100_000, "{}", "null"):
        (tmp_path / "c0" / "cache_index.json").write_text(text)
        with pytest.raises(UserError, match="no index of embeddings"):
            st.open_store(tmp_path / "c0")
    (tmp_path / "c0" / "cache_index.json").unlink()
    os.mkfifo(tmp_path / "c0" / "cache_index.json")  # it would be waited for
    with pytest.raises(UserError, match="no index of embeddings"):
        st.open_store(tmp_path / "c0")
    write_cache(tmp_path / "d", num_clips=16)
    assert "study 10 of shard_00001.h5: it has 4 clips" in reason(tmp_path / "d", "10")


# -------------------------------------------------------------------------------------------- packs


def test_a_pack_is_an_ordinary_file_of_the_same_numbers(folder):
    path = pack(folder)
    with h5py.File(path) as f:  # as anybody would read it
        rows, row = f["embeddings"][:], f["index/row"][:]
        eids, shape = f["index/eid"].asstr()[:], f["index/shape"][:]
        first, names = f["index/first_video"][:], f["videos"].asstr()[:]
    assert eids.tolist() == ["s0", "s1", "s2"] and shape[2].tolist() == [3, 2, 4]
    for i in range(3):
        end = row[i] + shape[i].prod()
        assert (rows[row[i] : end].reshape(-1, 2, 4, 768)[0] == clips(i)).all()
        assert names[first[i] : first[i] + 2].tolist() == ["v0.avi", "v1.avi"]
    packed, plain = st.open_store(folder), st.open_folder(folder)
    assert isinstance(packed, st.PackedEmbeddings)
    for eid in plain.files:
        assert packed.header(eid) == plain.header(eid) and packed.size(eid) == plain.size(eid)
        for a, b in zip(packed.read_all(eid), plain.read_all(eid), strict=True):
            assert (a.embeddings == b.embeddings).all() and a.videos == b.videos
    assert packed.digest(plain.files) == plain.digest(plain.files)


def test_the_digest_changes_when_a_study_is_made_again(folder, tmp_path):
    before = st.open_folder(folder).digest(["s0", "s1"])
    shutil.copytree(folder, tmp_path / "elsewhere")  # other times, the same data
    os.utime(tmp_path / "elsewhere" / "s0.hdf5", (1, 1))
    assert st.open_folder(tmp_path / "elsewhere").digest(["s0", "s1"]) == before
    stamp = os.stat(folder / "s0.hdf5")
    write_ours(folder / "s0.hdf5", 50, weights_sha256="ab")
    os.utime(folder / "s0.hdf5", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert st.open_folder(folder).digest(["s0", "s1"]) != before
    write_embeddings(folder, "p", clips(0), layout="published")
    published = st.open_folder(folder).digest(["p"])
    os.utime(folder / "p_trim_embed.hdf5", (1, 1))
    assert st.open_folder(folder).digest(["p"]) != published


def test_who_reads_a_pack_goes_on_with_it_when_it_is_made_anew(folder):
    pack(folder)
    reader = st.open_store(folder)
    for i in range(3):
        write_ours(folder / f"s{i}.hdf5", 10 + i)
    write_ours(folder / "a.hdf5", 77)
    pack(folder)
    assert [(reader.read(f"s{i}").embeddings == clips(i)).all() for i in range(3)] == [True] * 3
    assert (st.open_store(folder).read("s0").embeddings == clips(10)).all()


def test_packs_that_are_not_used(folder):
    """One line each, then the folder; without a folder, an error."""
    path, touch = pack(folder), lambda file: os.utime(file, (1, 1))
    whole = path.read_bytes()

    def edit(change):
        def apply():
            with h5py.File(path, "r+") as f:
                change(f)

        return apply

    def set_item(name, value):
        def change(f):
            f[name][0] = value

        return edit(change)

    for change, text in (
        (lambda: path.write_bytes(b""), "damaged"),
        (lambda: path.write_bytes(whole[: len(whole) // 2]), "damaged"),
        (lambda: shutil.copy(folder / "s0.hdf5", path), "its format is not echofocus pack 1"),
        (set_item("index/row", 8), "its index is not the one that was written"),
        (set_item("index/eid", "other"), "its index is not"),
        (set_item("index/shape", [1, 4, 2]), "its index is not"),
        (edit(lambda f: f.__delitem__("index/reason")), "damaged"),
        (edit(lambda f: f.attrs.create("format", "echofocus pack 2")), "its format is not"),
        (lambda: (path.unlink(), os.mkfifo(path)), "no regular file"),
        (lambda: (path.unlink(), path.write_bytes(whole), touch(folder / "s1.hdf5")), "out of"),
    ):  # fmt: skip
        findings = Collected()
        if path.is_file():
            path.write_bytes(whole)
        change()
        store = st.open_store(folder, findings)
        assert isinstance(store, st.EmbeddingFolder), text
        (finding,) = findings.findings
        assert finding.level == "WARNING" and text in finding.text, finding
        assert finding.text.startswith("emb.packed.h5 is ") and finding.remedy == "run pack again"
    folder.rename(folder.with_name("gone"))
    path.write_bytes(whole[:1000])
    with pytest.raises(UserError, match=r"emb\.packed\.h5 is damaged"):
        st.open_store(folder)


def test_an_index_that_points_out_of_the_file_is_refused(folder):
    """With a checksum that fits: not damage, but harm."""
    path = pack(folder)
    whole = path.read_bytes()
    for name, value in (
        ("row", -9), ("row", 10**15), ("shape", [1, 10**6, 10**6]), ("shape", [-1, 2, 4]),
        ("first_video", 10**9), ("made_with", 5),
    ):  # fmt: skip
        path.write_bytes(whole)
        with h5py.File(path, "r+") as f:
            f[f"index/{name}"][0] = value
            index = {k: f[f"index/{k}"][()] for k in st.COLUMNS}
            for k, (kind, _) in st.COLUMNS.items():
                index[k] = f[f"index/{k}"].asstr()[:] if kind is str else index[k]
            settings = f["settings"].asstr()[:].tolist()
            f.attrs["index_sha256"] = st.index_digest(index, settings, f["embeddings"], f["videos"])
        with pytest.raises(UserError, match="points out of the file"):
            st.PackedEmbeddings(path)


def test_old_packs_are_said_and_not_used(folder):
    old = folder.with_name("emb.packed")
    old.mkdir()
    findings = Collected()
    assert isinstance(st.open_store(folder, findings), st.EmbeddingFolder)
    assert "emb.packed is of an earlier version" in findings.findings[0].text


def test_a_pack_that_is_stopped_leaves_the_old_one(folder, monkeypatch):
    path = pack(folder)
    before = path.read_bytes()
    write_ours(folder / "s0.hdf5", 9)
    monkeypatch.setattr(st, "end_pack", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(OSError, match="No space"):
        pack(folder)
    assert path.read_bytes() == before and len(list(folder.parent.iterdir())) == 2


def test_half_precision_packs(folder):
    with h5py.File(folder / "big.hdf5", "w") as f:
        f["embeddings"] = np.full((1, 4, 768), 1e5, np.float32)
        f.create_dataset("videos", data=["v"], dtype=TEXT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy's own would come before ours
        pack(folder, "float16")
    store = st.open_store(folder)
    study = store.read("s1")
    assert study.embeddings.dtype == np.float32
    assert (study.embeddings == clips(1).astype(np.float16)).all()
    with pytest.raises(st.UnreadableStudy, match="beyond float16"):
        store.read("big")
    assert store.digest(["s1"]) != st.open_folder(folder).digest(["s1"])


# ----------------------------------------------------------------------- by the real command line


# ---------------------------------------------------------------------------- whom an encoder knows


def some_seen(key="00"):
    split = pd.DataFrame({"pid": ["p"], "fold": ["train"]}, index=["e"])
    return [Seen.of(split, key)]


@pytest.mark.parametrize(
    ("name", "said", "warned"),
    [
        ("mine.pt", "listed", "put encoder_seen.pt of the extraction beside them"),
        ("mine.pt", "not said", "keep its patients out yourself"),
        ("chkpt_epoch-3.pt", "elsewhere", ""),
        ("chkpt_epoch-3.pt", None, "again (--redo)"),
        ("encoder.pt", None, "again (--redo)"),
        ("panecho.pt", None, ""),
    ],
)
def test_embeddings_say_whether_their_weights_have_a_list(tmp_path, name, said, warned):
    """Whatever the weights are called; by the name in older files alone. A pack says the same."""
    about = {"weights": name, "weights_sha256": "ab"} | ({"weights_seen": said} if said else {})
    for eid in "ab":
        write_ours(tmp_path / "emb" / f"{eid}.hdf5", 0, **about)
    write_ours(tmp_path / "emb" / "c.hdf5", 0, **about | {"weights_seen": said or "elsewhere"})
    eids = ["a", "b"]
    for store in (st.open_folder(tmp_path / "emb"), st.PackedEmbeddings(pack(tmp_path / "emb"))):
        store.place, heard = tmp_path / "emb", Collected()
        assert store.encoder_seen(eids, heard) == ([], not warned)
        text = "".join(x.text + x.remedy for x in heard.findings)
        assert warned in text and bool(text) == bool(warned)
        refuse_mixed(store, ["a", "c"], False, RUN)  # it is no difference of input
    st.keep_encoder_seen(tmp_path / "emb", "ab", some_seen())
    heard = Collected()
    (seen,), whole = store.encoder_seen(eids, heard)
    assert whole and not heard.findings and seen.key == "00"
    attributes = {k: v for k, v in about.items() if k != "weights_seen"}
    again = attributes | {"weights_seen": "another"}
    assert st.read_records(tmp_path / "emb" / "a.hdf5", again, redo=False)


def test_a_folder_has_a_list_of_its_own_beside_its_packs(folder):
    """One of them may be copied alone; an empty entry counts as none."""
    st.keep_encoder_seen(folder, "ab", some_seen())
    sidecar = st.packed_seen(pack(folder))
    own = folder / st.ENCODER_SEEN
    for before in (None, {"ab": []}):
        own.unlink()
        if before:
            torch.save(before, own)
        assert set(st.encoders_seen(folder)) == {"ab"}
        st.keep_encoder_seen(folder, "ab", some_seen())
        assert len(st.read_encoder_seen(own)["ab"]) == 1
    assert sidecar.is_file()


@pytest.mark.parametrize("damage", [b"", b"junk", [1], {"ab": [{"key": "zz"}]}, {"ab": 3}])
def test_a_damaged_list_is_made_anew(folder, damage):
    own = folder / st.ENCODER_SEEN
    own.write_bytes(damage) if isinstance(damage, bytes) else torch.save(damage, own)
    for read in (lambda: st.encoders_seen(folder), lambda: st.keep_encoder_seen(folder, "ab", [])):
        with pytest.raises(UserError, match=r"delete it and extract again.*nothing else is lost"):
            read()
    own.unlink()
    st.keep_encoder_seen(folder, "ab", some_seen())
    assert st.encoders_seen(folder)


def test_weights_say_whose_they_are(tmp_path):
    state = {"encoder.x": torch.zeros(1)}
    record = EncoderRecord(tasks=[]).to_save()
    listed = {"encoder": record, "seen": [x.saved() for x in some_seen()]}
    for more, said in (({}, "elsewhere"), ({"encoder": record}, "not said"), (listed, "listed")):
        torch.save({"weights": state} | more, tmp_path / "w.pt")
        assert st.weights_seen(panecho.read_encoder(tmp_path / "w.pt")[2]) == said


def states(model):
    saved = torch.load(f"trained_models/{model}/last_checkpoint.pt", weights_only=False)
    record = json.loads(Path(f"trained_models/{model}/run.json").read_text())
    return saved["model_state_dict"], record["embeddings_sha256"]


def test_packed_and_unpacked_train_identically(cohort, cli):
    """To the bit, with an unreadable study, one of NaN, and transformed copies."""
    (cohort / "emb" / "1003.hdf5").write_bytes(b"not HDF5")
    with h5py.File(cohort / "emb" / "1004.hdf5", "a") as f:
        f["embeddings"][0, 0, 0] = np.nan
    with h5py.File(cohort / "emb" / "1005.hdf5", "a") as f:
        f["augmented"] = f["embeddings"][:][None] + 1
    line = ("train", "--task", "defect", "--epoch_lim", "1", "--batch_tokens", "40", "--run_id")
    assert cli(*line, "a")[0] == 0
    assert cli("predict", "--out", "plain.csv")[0] == 0
    status, out, err = cli("pack")
    assert status == 0 and "58 studies" in out and "1003.hdf5" in out and "1004" in out, err
    status, out, _ = cli(*line, "b")
    assert status == 0 and "reading emb.packed.h5" in out
    (plain, digest), (packed, packed_digest) = states("defect_a"), states("defect_b")
    assert digest == packed_digest
    assert all(torch.equal(plain[k], packed[k]) for k in plain)
    assert cli("predict", "--out", "packed.csv")[0] == 0
    pd.testing.assert_frame_equal(pd.read_csv("plain.csv"), pd.read_csv("packed.csv"))
    left_out = pd.read_csv("packed_left_out.csv", dtype=str)
    assert sorted(left_out["eid"]) == ["1003", "1004"]
    pd.testing.assert_frame_equal(left_out, pd.read_csv("plain_left_out.csv", dtype=str))
    shutil.move("emb", "gone")
    assert cli("predict", "--out", "packed.csv")[0] == 0


def test_every_command_reads_a_half_precision_pack(trained, cli):
    assert cli("predict", "--out", "plain.csv")[0] == 0
    assert cli("pack", "--dtype", "float16")[0] == 0
    for line in (
        ["train", "--task", "defect", "--epoch_lim", "1", "--run_id", "half"],
        ["predict", "--out", "half.csv"], ["evaluate", "--subset", "all"], ["embed"],
        ["embed", "--level", "video"], ["check"],
        ["explain", "--subset", "all", "--sample_limit", "2"],
    ):  # fmt: skip
        status, out, err = cli(*line, *(() if line[0] == "train" else ("--model_name", "defect")))
        assert status == 0 and "emb.packed.h5" in out, (line, err)
    half, plain = pd.read_csv("half.csv"), pd.read_csv("plain.csv")
    np.testing.assert_allclose(half["finding"], plain["finding"], atol=2e-3)


def test_windows_of_nothing(trained, cli, monkeypatch):
    """Many unreadable studies in a row: the others are answered; all: one line."""
    for module in ("loop", "answers"):
        monkeypatch.setattr(f"echofocus_core.study.{module}.WINDOW", 8)
    for i in range(20):
        (trained / "emb" / f"{1010 + i}.hdf5").write_bytes(b"")
    assert cli("predict", "--out", "p.csv")[0] == 0 and len(pd.read_csv("p.csv")) == 40
    assert cli("embed")[0] == 0
    status, out, err = cli("evaluate", "--subset", "all")
    assert status == 0 and "1010.hdf5" in out, err
    line = ("train", "--task", "defect", "--epoch_lim", "1", "--run_id", "b", "--batch_number", "2")
    assert cli(*line)[0] == 0
    for path in (trained / "emb").iterdir():
        path.write_bytes(b"")
    for command in ("predict", "embed", "evaluate"):
        status, _, err = cli(command, "--model_name", "defect")
        assert status == 1 and "no study could be read" in err and err.count("\n") == 1


def test_mixed_encoders_are_refused_in_training(cohort, cli):
    def set_encoder(value, eids):
        for eid in eids:
            with h5py.File(cohort / "emb" / f"{eid}.hdf5", "a") as f:
                f.attrs["weights_sha256"] = value
                f.attrs["starts"] = f"{eid}"  # how starts are drawn is no difference

    def record(model):
        return torch.load(f"trained_models/{model}/best_checkpoint.pt", weights_only=False)[
            "echofocus"
        ]

    eids = range(1000, 1060)
    line = ("train", "--task", "defect", "--epoch_lim", "1", "--run_id")
    set_encoder("aa", eids[:50])
    status, _, err = cli(*line, "a")
    assert status == 1 and "different weights_sha256: aa (50 studies" in err
    assert "not said (10 studies: 1050" in err and "--allow_mixed" in err
    set_encoder("bb", eids[50:])
    assert cli(*line, "a")[0] == 1
    assert cli("check")[0] == 1
    status, out, _ = cli(*line, "a", "--allow_mixed")
    assert status == 0 and "WARNING: the embeddings were made with different" in out
    assert record("defect_a")["encoder_sha256"] == ""
    set_encoder("aa", eids)
    assert cli(*line, "b")[0] == 0
    assert record("defect_b")["encoder_sha256"] == "aa"
    set_encoder("bb", eids[-2:])  # not the first file
    for command in ("predict", "evaluate", "embed"):
        more = ("--subset", "all") if command == "evaluate" else ()
        status, out, _ = cli(command, "--model_name", "defect_b", *more)
        assert status == 0 and "another encoder than those of 2 studies (1058, 1059;" in out


def test_a_study_of_thousands_of_videos_trains_in_bounded_memory():
    """Attention in pieces is attention: the same output and gradients as all at once."""
    torch.manual_seed(0)
    net = StudyModel(1, "standard", 1)
    x, found = torch.randn(300, 768), []
    for most in (1 << 26, 300 * 6 * 37):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packed, "MOST_WEIGHTS", most)
            patch.setattr(packed, "drop", lambda x, dropout, rng: x)
            net.train().zero_grad()
            logits, _ = net(x, [300])
            logits.sum().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:  # a piece drops the same when computed again
        patch.setattr(packed, "MOST_WEIGHTS", 300 * 6 * 37)
        q, k, v = torch.randn(3, 1, 6, 300, 128, dtype=torch.float64)
        v.requires_grad_()
        dropout, rng = torch.nn.Dropout(0.2).train(), np.random.default_rng(1)
        out = packed.weighted_values(q, k, v, dropout, rng)
        out.sum().backward()
        # The output is linear in v: <v, gradient> is the output itself.
        assert float((v * v.grad).sum()) == pytest.approx(float(out.sum()), rel=1e-9)


def test_batches_hold_true_counts(cohort):
    store = st.open_store(cohort / "emb")
    eids, settings = list(store.files), Settings(batch_tokens=12, clip_dropout=0.0)
    plan = list(plan_batches(store, eids, settings, False))
    for planned in plan:
        n = [len(h5py.File(store.files[e])["embeddings"]) * 4 for e in planned.eids]
        assert sum(n) <= 12 or len(n) == 1
    assert sorted(e for p in plan for e in p.eids) == eids
    assert [p.ends_step for p in plan] == [False] * (len(plan) - 1) + [True]
    batches = list(read_batches(store, plan, settings, {}))
    assert [b.eids for b in batches] == [p.eids for p in plan]
    assert all(b.lengths == [store.size(e) for e in b.eids] for b in batches)
