"""The clip-embedding file and the stores: folders, shards, packs; damaged and odd files."""

import json
import os
import shutil
import warnings
import zlib
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from echofocus_core.base.console import RUN, Collected, UserError
from echofocus_core.base.options import Settings
from echofocus_core.base.seen import Seen
from echofocus_core.study import attention
from echofocus_core.study.folds import report_copies
from echofocus_core.study.loop import LoopContext, plan_batches, read_batches
from echofocus_core.study.network import StudyModel
from echofocus_core.study.sources import refuse_mixed
from echofocus_core.video import panecho
from echofocus_core.video import store as st
from echofocus_core.video.record import EncoderRecord
from echofocus_core.video.single_videos import VideosOf
from tests.helpers import normal, write_embeddings

TEXT = h5py.string_dtype()


def clips(seed, V=2, C=4):
    return np.random.default_rng(seed).standard_normal((V, C, 768)).astype(np.float32)


def write_ours(path, seed, copies=1, **attributes):
    """Write the file of a study with two videos and a skipped one, as extraction does."""
    arrays = [clips(seed + 100 * k) for k in range(copies)]
    videos = {f"v{v}.avi": (np.arange(4), np.stack([a[v] for a in arrays])) for v in range(2)}
    path.parent.mkdir(exist_ok=True)
    files = dict.fromkeys(videos, st.FileRecord())
    files["x.avi"] = st.FileRecord("0stamp0", result="skipped", reason="still image")
    st.write_study(path, videos, attributes, files)
    return arrays


def pack(folder, dtype="float32"):
    path = st.packed_path(folder)
    st.write_pack(st.open_folder(folder), path, np.dtype(dtype))
    return path


def flip(path, pattern, at=1):
    """Change one byte in the first occurrence of a byte pattern."""
    raw = bytearray(path.read_bytes())
    raw[raw.index(pattern) + at] ^= 1
    path.write_bytes(raw)


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


def test_a_study_file_reads_back(folder):
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


def test_our_files_have_no_text_of_varying_length(folder):
    """It would be in HDF5's global heap, where a damaged byte can make a reader hang."""
    assert b"GCOL" not in (folder / "s0.hdf5").read_bytes()
    assert b"GCOL" not in pack(folder).read_bytes()


def test_the_checksum_is_the_one_documented(folder):
    """It is the CRC-32 of a JSON list of type, shape, names and settings, and of the numbers."""
    with h5py.File(folder / "s0.hdf5") as f:
        raw, names = f["embeddings"][:], f["videos"].asstr()[:].tolist()
        facts = json.dumps(["<f4", [2, 4, 768], names, {"weights_sha256": "ab"}]).encode()
        assert f.attrs["crc32"].tolist() == [zlib.crc32(facts + raw.tobytes())]


@pytest.mark.parametrize("packed", [False, True])
def test_the_same_videos_in_two_studies(folder, packed):
    """Copies of two patients are an error, copies of one patient a warning."""
    for name in "tu":
        shutil.copy(folder / "s0.hdf5", folder / f"{name}.hdf5")
    if packed:
        pack(folder)
    store = st.open_store(folder, Collected(), most_videos=1)
    assert store.copies(list(store.files)) == [["s0", "t", "u"]]
    videos = VideosOf(store)
    assert videos.copies([x for x in videos.files if x != "s0/v0.avi"]) == [
        ["s0/v1.avi", "t/v0.avi", "u/v0.avi"]
    ]
    for pids, levels in (("abxaa", ["ERROR"]), ("abaac", ["WARNING"]), ("ab", [])):
        listener = Collected()
        ids = ["s0", "s1", "t", "u", "s2"][: len(pids)]
        report_copies(pd.Series(list(pids), ids), store, listener)
        assert [x.level for x in listener.findings] == levels
        assert all("s0 and t and u" in x.text for x in listener.findings)


def test_studies_with_equal_checksums_by_chance_are_not_copies(folder, monkeypatch):
    monkeypatch.setattr(st, "checksum", lambda *_: 7)
    for name, seed in (("x", 5), ("y", 6), ("z", 5)):
        write_ours(folder / f"{name}.hdf5", seed)
    assert st.open_folder(folder).copies(["x", "y"]) == []
    assert st.open_folder(folder).copies(["x", "y", "z"]) == [["x", "z"]]


@pytest.mark.parametrize("packed", [False, True])
def test_a_changed_number_is_detected(folder, packed):
    path = pack(folder) if packed else folder / "s0.hdf5"
    flip(path, clips(0)[1, 2, 5:8].tobytes())
    store = st.open_store(folder, Collected())
    assert isinstance(store, st.PackedEmbeddings) == packed
    with pytest.raises(st.UnreadableStudy, match=r"s0.* is damaged"):
        store.read("s0")
    assert (store.read("s1").embeddings == clips(1)).all()


def test_a_changed_name_or_setting_is_detected(folder):
    flip(pack(folder), b"v1.avi")
    with pytest.raises(UserError):  # the index of the pack as a whole is refused
        st.PackedEmbeddings(folder)
    flip(folder / "s0.hdf5", b"v1.avi")
    with h5py.File(folder / "s1.hdf5", "r+") as f:
        f.attrs["weights_sha256"] = "ac"
    assert all("is damaged" in reason(folder, eid) for eid in ("s0", "s1"))


def test_details_and_results_of_extraction(folder):
    path = folder / "s0.hdf5"
    details = st.load_details(path)
    assert details.attributes == {"weights_sha256": "ab"}
    assert details.skipped == [("x.avi", "still image")]
    results = {name: record.result for name, record in details.files.items()}
    assert results == {"v0.avi": "ok", "v1.avi": "ok", "x.avi": "skipped"}
    assert (details.starts["v1.avi"] == np.arange(4)).all()
    assert (st.load_copies(folder / "s2.hdf5") == [clips(2), clips(102), clips(202)]).all()
    flip(path, b"0stamp0")  # a damaged record: the video is extracted again
    with pytest.raises(OSError):
        st.load_details(path)
    flip(folder / "s1.hdf5", clips(1)[0, 0, :3].tobytes())
    with pytest.raises(ValueError, match="damaged"):
        st.load_copies(folder / "s1.hdf5")


# -------------------------------------------------------------------------------- names of studies


def test_study_ids_are_file_names_without_the_published_ending(tmp_path):
    names = {"a_1.hdf5": "a_1", "a_2_embed.hdf5": "a_2", "a_3_trim_embed.hdf5": "a_3",
             "a_trim.h5": "a_trim", "_embed.hdf5": "_embed"}  # fmt: skip
    for name in names:
        with h5py.File(tmp_path / name, "w") as f:
            f["lab/site/a/v/emb"] = clips(0)[0]
    (tmp_path / "0.hdf5").write_bytes(b"damaged")
    store = st.open_folder(tmp_path)
    assert set(store.files) == {"0", *names.values()} and store.size("0") == 0
    assert (store.read("a_3").embeddings == clips(0)[:1]).all() and store.size("a_3") == 4


def test_two_files_of_one_study_are_named(folder):
    shutil.copy(folder / "s0.hdf5", folder / "s0_trim_embed.hdf5")
    with pytest.raises(UserError, match=r"s0\.hdf5 and s0_trim_embed\.hdf5"):
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


# -------------------------------------------------------------------------------------- odd files


def replace(name, link=None, **options):
    def change(f):
        del f[name]
        if link:
            f[name] = link
        else:
            f.create_dataset(name, **options)

    return change


def without_checksum(array):
    """Published embeddings have no checksum."""

    def change(f):
        del f.attrs["crc32"], f["augmented"], f["embeddings"]
        f["embeddings"] = array

    return change


OUTSIDE = {"shape": (2, 4, 768), "dtype": "f4", "external": [("secret.txt", 0, 24576)]}
ODD = {
    "a link": (replace("embeddings", h5py.ExternalLink("secret.h5", "numbers")), "embeddings is"),
    "numbers of another file": (replace("embeddings", **OUTSIDE), "embeddings is"),
    "too few names": (replace("videos", data=["a"], dtype=TEXT), "differ in number"),
    "huge": (
        replace("embeddings", shape=(10**6, 16, 768), dtype="f4", chunks=(1, 16, 768)),
        "has 49.2 GB",
    ),
    "copies of another number": (
        replace("augmented", data=np.zeros((2, 2, 4, 768), "f4")),
        "2 checksums for 3 copies",
    ),
    "too large": (without_checksum(np.full((2, 4, 768), 1e30, "f4")), r"largest is 1e\+30"),
    "NaN": (without_checksum(np.full((2, 4, 768), np.nan, "f4")), "it holds NaN"),
    "all 0": (without_checksum(np.zeros((2, 4, 768), "f4")), "largest is 0"),
    "nothing": (lambda f: f.clear(), "no video"),
}


@pytest.mark.parametrize("kind", ODD)
def test_only_the_study_of_an_odd_file_is_left_out(folder, kind, monkeypatch):
    """Every store gives the reason, reads nothing outside of it, and reads the other studies."""
    monkeypatch.chdir(folder)
    Path("secret.txt").write_bytes(b"name of a patient" * 2000)
    with h5py.File("../secret.h5", "w") as f:
        f["numbers"] = clips(0)
    change, text = ODD[kind]
    write_ours(folder / "a.hdf5", 0, copies=2)
    with h5py.File(folder / "a.hdf5", "r+") as f:
        change(f)
    pack(folder)
    for store in st.open_folder(folder), st.PackedEmbeddings(folder):
        assert (store.read("s1").embeddings == clips(1)).all()
        with pytest.raises(st.UnreadableStudy, match=text) as error:
            store.read("a")
        assert str(error.value).startswith("study a of a.hdf5: ")
        assert str(folder) not in str(error.value)


# ------------------------------------------------------------------------------------------- shards


def write_cache(folder, shards=3, **index):
    """Write an embedding cache like the published later branch; returns id -> (V, C, 768)."""
    folder.mkdir()
    studies = {str(i): clips(i, V=1 + i % 3).astype(np.float16) for i in range(10, 17)}
    for i in range(shards):
        with h5py.File(folder / f"shard_{i:05d}.h5", "w") as f:
            for eid, numbers in studies.items():
                if int(eid) % shards == i:
                    f.create_dataset(f"{eid}/emb", data=numbers, compression="lzf")
    facts = {"version": 1, "num_shards": shards, "shard_format": "hdf5", "dtype": "float16"}
    facts |= {"num_clips": 4, "clip_len": 16, "eids": [int(eid) for eid in studies]}
    (folder / "cache_index.json").write_text(json.dumps(facts | index))
    return studies


def test_a_cache_in_shards_is_a_dataset(tmp_path):
    studies = write_cache(tmp_path / "cache")
    for is_packed in (False, True):
        if is_packed:
            pack(tmp_path / "cache")
        store = st.open_store(tmp_path / "cache")
        assert list(store.files) == list(studies)
        for eid, numbers in studies.items():
            study = store.read(eid)
            assert study.embeddings.dtype == np.float32 and (study.embeddings == numbers).all()
            assert study.videos == [f"{i:03}" for i in range(len(numbers))]
            assert store.size(eid) == 4 * len(numbers) and study.made_with == {"clip_len": 16}


def test_a_cache_of_augmented_draws_is_reported(tmp_path):
    for transform, n in (("train", 1), ("none", 0), (None, 0), (["crop", 0.5], 1)):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        write_cache(tmp_path / "cache", transform=transform)
        listener = Collected()
        st.open_store(tmp_path / "cache", listener)
        assert [f.level for f in listener.findings] == ["WARNING"] * n


def test_index_and_shards_that_disagree_are_refused(tmp_path):
    for i, (index, change, text) in enumerate(
        (
            ({"eids": [10, 11, 99]}, None, "12, 13"),
            ({"eids": [*range(10, 17), 99]}, None, "99"),
            ({}, lambda f: f.copy("11", f, "10"), "on the studies 10"),
        )
    ):
        folder = tmp_path / f"c{i}"
        write_cache(folder, **index)
        if change:
            with h5py.File(folder / "shard_00002.h5", "r+") as f:
                change(f)
        with pytest.raises(UserError, match=text):
            st.open_store(folder)
    (tmp_path / "c0" / "cache_index.json").write_text("")
    with pytest.raises(UserError, match=r"cache_index\.json"):
        st.open_store(tmp_path / "c0")
    (tmp_path / "c1" / "shard_00001.h5").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"shard_00001\.h5 cannot be read"):
        st.open_store(tmp_path / "c1")


# -------------------------------------------------------------------------------------------- packs


def test_a_pack_is_an_ordinary_file_of_the_same_numbers(folder):
    path = pack(folder)
    with h5py.File(path) as f:  # without the code of this package
        rows, index = f["embeddings"][:], json.loads(f["index"][:].tobytes())
    assert list(index) == ["s0", "s1", "s2"] and index["s2"]["shape"] == [3, 2, 4]
    for i, study in enumerate(index.values()):
        numbers = rows[study["row"] : study["row"] + np.prod(study["shape"])]
        assert (numbers.reshape(-1, 2, 4, 768)[0] == clips(i)).all()
        assert study["videos"] == ["v0.avi", "v1.avi"]
    packed, plain = st.open_store(folder), st.open_folder(folder)
    assert isinstance(packed, st.PackedEmbeddings)
    for eid in plain.files:
        assert packed.header(eid) == plain.header(eid) and packed.size(eid) == plain.size(eid)
        for a, b in zip(packed.read_all(eid), plain.read_all(eid), strict=True):
            assert (a.embeddings == b.embeddings).all() and a.videos == b.videos
    assert packed.digest(plain.files) == plain.digest(plain.files)


def test_the_digest_changes_when_a_study_is_extracted_again(folder, tmp_path):
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


def test_a_reader_keeps_the_pack_that_it_opened(folder):
    pack(folder)
    reader = st.open_store(folder)
    for i in range(3):
        write_ours(folder / f"s{i}.hdf5", 10 + i)
    write_ours(folder / "a.hdf5", 77)
    pack(folder)
    assert [(reader.read(f"s{i}").embeddings == clips(i)).all() for i in range(3)] == [True] * 3
    assert (st.open_store(folder).read("s0").embeddings == clips(10)).all()


def test_a_damaged_or_outdated_pack_is_not_used(folder):
    """There is a warning and the folder is read; without a folder there is an error."""
    path = pack(folder)
    whole = path.read_bytes()
    for change, text in (
        (lambda: path.write_bytes(whole[: len(whole) // 2]), "cannot be used"),
        (lambda: shutil.copy(folder / "s0.hdf5", path), "format is not echofocus pack 1"),
        (lambda: flip(path, b'"row"'), "cannot be used"),
        (lambda: os.utime(folder / "s1.hdf5", (1, 1)), "out of date"),
        (lambda: write_ours(folder / "new.hdf5", 1), "out of date"),
    ):
        path.write_bytes(whole)
        change()
        listener = Collected()
        assert isinstance(st.open_store(folder, listener), st.EmbeddingFolder), text
        (finding,) = listener.findings
        assert finding.level == "WARNING" and text in finding.text, finding
    folder.rename(folder.with_name("gone"))
    path.write_bytes(whole[:1000])
    with pytest.raises(UserError, match=r"emb\.packed\.h5"):
        st.open_store(folder)


def test_a_pack_is_outdated_if_a_study_changes_but_keeps_its_size_and_time(folder):
    """This happens after `cp -p` of a study that was extracted again."""
    pack(folder)
    assert isinstance(st.open_store(folder), st.PackedEmbeddings)
    before = st.open_folder(folder).stamp("s0")
    write_ours(folder / "s0.hdf5", 9, weights_sha256="ab")
    os.utime(folder / "s0.hdf5", ns=(before[1], before[1]))
    store = st.open_store(folder)
    assert store.stamp("s0") == before and isinstance(store, st.EmbeddingFolder)
    assert (store.read("s0").embeddings == clips(9)).all()


def test_half_precision_packs(folder):
    with h5py.File(folder / "big.hdf5", "w") as f:
        f["embeddings"] = np.full((1, 4, 768), 1e5, np.float32)
        f.create_dataset("videos", data=["v"], dtype=TEXT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy would warn first
        pack(folder, "float16")
    store = st.open_store(folder)
    study = store.read("s1")
    assert study.embeddings.dtype == np.float32
    assert (study.embeddings == clips(1).astype(np.float16)).all()
    with pytest.raises(st.UnreadableStudy, match="beyond float16"):
        store.read("big")
    assert store.digest(["s1"]) != st.open_folder(folder).digest(["s1"])


# ---------------------------------------------------------------- the training patients of encoders


def some_seen(key="00"):
    split = pd.DataFrame({"pid": ["p"], "fold": ["train"]}, index=["e"])
    return [Seen.of(split, key)]


@pytest.mark.parametrize(("attribute", "n"), [("listed", 1), ("elsewhere", 0), (None, 0)])
def test_embeddings_record_whether_their_weights_have_a_list(tmp_path, attribute, n):
    """A copy of a folder or pack without the list is reported."""
    facts = {"weights": "w.pt", "weights_sha256": "ab"}
    for eid in "ab":
        more = {"weights_seen": attribute} if attribute else {}
        write_ours(tmp_path / "emb" / f"{eid}.hdf5", 0, **facts, **more)
    write_ours(tmp_path / "emb" / "c.hdf5", 0, **facts, weights_seen="elsewhere")
    pack(tmp_path / "emb")
    for store in (st.open_folder(tmp_path / "emb"), st.PackedEmbeddings(tmp_path / "emb")):
        listener = Collected()
        assert store.encoder_seen(["a", "b"], listener) == ([], not n)
        assert [x.level for x in listener.findings] == ["WARNING"] * n
        refuse_mixed(store, ["a", "c"], False, RUN)  # it is not a difference of input
    st.write_encoder_seen(tmp_path / "emb", {"ab": some_seen()})
    listener = Collected()
    (seen,), complete = store.encoder_seen(["a", "b"], listener)
    assert complete and not listener.findings and seen.key == "00"


def test_a_folder_and_its_pack_each_have_a_list(folder):
    """One of them may be copied without the other."""
    st.write_encoder_seen(folder, {"ab": some_seen()})
    pack(folder)
    sidecar, path = st.seen_path(folder, packed=True), st.seen_path(folder)
    path.unlink()
    assert sidecar.is_file() and set(st.read_encoder_seen(folder)) == {"ab"}
    st.write_encoder_seen(folder, {"ab": some_seen()})
    assert len(torch.load(path, weights_only=True)["ab"]) == 1


@pytest.mark.parametrize("damage", [b"junk", {"ab": [{"key": "zz"}]}])
def test_a_damaged_list_is_refused(folder, damage):
    path = folder / st.ENCODER_SEEN
    path.write_bytes(damage) if isinstance(damage, bytes) else torch.save(damage, path)
    with pytest.raises(UserError, match=r"encoder_seen\.pt"):
        st.read_encoder_seen(folder)


def test_weights_name_their_training_patients(tmp_path):
    state = {"encoder.x": torch.zeros(1)}
    record = EncoderRecord(tasks=[]).to_save()
    for more, n in (({}, 0), ({"encoder": record, "seen": [x.saved() for x in some_seen()]}, 1)):
        torch.save({"weights": state} | more, tmp_path / "w.pt")
        assert len(panecho.read_encoder(tmp_path / "w.pt").seen) == n


# ----------------------------------------------------------------------- by the real command line


def states(model):
    saved = torch.load(f"trained_models/{model}/last_checkpoint.pt", weights_only=False)
    record = json.loads(Path(f"trained_models/{model}/run.json").read_text())
    return saved["model_state_dict"], record["embeddings_sha256"]


def test_packed_and_unpacked_train_identically(cohort, cli):
    """The weights are equal to the bit, also with unreadable studies and transformed copies."""
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
    assert cli("predict", "--model_name", "defect_b", "--out", "packed.csv")[0] == 0
    pd.testing.assert_frame_equal(pd.read_csv("plain.csv"), pd.read_csv("packed.csv"))
    left_out = pd.read_csv("packed_left_out.csv", dtype=str)
    assert sorted(left_out["eid"]) == ["1003", "1004"]
    pd.testing.assert_frame_equal(left_out, pd.read_csv("plain_left_out.csv", dtype=str))
    shutil.move("emb", "gone")
    assert cli("predict", "--model_name", "defect_b", "--out", "packed.csv")[0] == 0


def test_no_readable_study(trained, cli):
    for path in (trained / "emb").iterdir():
        path.write_bytes(b"")
    status, _, err = cli("predict")
    assert status == 1 and err.count("\n") == 1


def test_mixed_encoders_are_refused_in_training(cohort, cli):
    def set_encoder(value, eids):
        for eid in eids:
            with h5py.File(cohort / "emb" / f"{eid}.hdf5", "a") as f:
                f.attrs["weights_sha256"] = value
                f.attrs["starts"] = f"{eid}"  # not a difference

    def trained_on(model):
        path = f"trained_models/{model}/best_checkpoint.pt"
        return torch.load(path, weights_only=False)["echofocus"]["encoder_sha256"]

    eids = range(1000, 1060)
    line = ("train", "--task", "defect", "--epoch_lim", "1", "--run_id")
    set_encoder("aa", eids[:50])
    status, _, err = cli(*line, "a")
    assert status == 1 and "aa (50 studies" in err and "(10 studies: 1050" in err
    set_encoder("bb", eids[50:])
    assert cli("check")[0] == 1
    status, out, _ = cli(*line, "a", "--allow_mixed")
    assert status == 0 and "WARNING" in out and trained_on("defect_a") == ""
    set_encoder("aa", eids)
    assert cli(*line, "b")[0] == 0 and trained_on("defect_b") == "aa"
    set_encoder("bb", eids[-2:])  # not the first file
    status, out, _ = cli("predict", "--model_name", "defect_b")
    assert status == 0 and "1058, 1059" in out


def test_attention_computed_in_pieces():
    """It has the output and gradients of attention computed at once."""
    torch.manual_seed(0)
    net = StudyModel(1, "standard", 1)
    x, results = torch.randn(300, 768), []
    for most in (1 << 26, 300 * 6 * 37):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "MOST_WEIGHTS", most)
            patch.setattr(attention, "drop", lambda x, dropout, rng: x)
            net.train().zero_grad()
            logits, _ = net(x, [300])
            logits.sum().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in net.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:  # a piece drops the same when computed again
        patch.setattr(attention, "MOST_WEIGHTS", 300 * 6 * 37)
        q, k, v = torch.randn(3, 1, 6, 300, 128, dtype=torch.float64)
        v.requires_grad_()
        dropout, rng = torch.nn.Dropout(0.2).train(), np.random.default_rng(1)
        out = attention.weighted_values(q, k, v, dropout, rng)
        out.sum().backward()
        # The output is linear in v: <v, gradient> is the output itself.
        assert float((v * v.grad).sum()) == pytest.approx(float(out.sum()), rel=1e-9)


def test_batches_have_at_most_the_tokens_of_the_settings(cohort):
    store = st.open_store(cohort / "emb")
    eids, settings = list(store.files), Settings(batch_tokens=12, clip_dropout=0.0)
    context = LoopContext(StudyModel(1), store, settings)
    plan = list(plan_batches(context, eids, False))
    for batch, _ in plan:
        n = [len(h5py.File(store.files[e])["embeddings"]) * 4 for e in batch]
        assert sum(n) <= 12 or len(n) == 1
    assert sorted(e for batch, _ in plan for e in batch) == eids
    assert [ends_step for _, ends_step in plan] == [False] * (len(plan) - 1) + [True]
    batches = list(read_batches(context, plan))
    assert [b.eids for b in batches] == [batch for batch, _ in plan]
    assert all(b.lengths == [store.size(e) for e in b.eids] for b in batches)


def test_videos_that_are_almost_the_same():
    bag = normal(0, 5, 4, 768)
    bag[4] = bag[1] + 0.05 * normal(1, 4, 768)
    assert st.almost_the_same(bag) == [(1, 4)]
    assert st.almost_the_same(bag[:4]) == st.almost_the_same(bag[:1]) == []
    pair = np.stack([bag[0], bag[0] * 1.001])
    assert st.almost_the_same(pair) == [(0, 1)]
