"""Extraction against encoding every clip by itself; odd files, restarts, several processes."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import torch

from echofocus_core.base.files import lock
from echofocus_core.video import decode as video
from echofocus_core.video import extract, panecho, phantom, store
from echofocus_core.video.encoders.trained import distinct_images
from tests.helpers import ROOT, copy_example, moving_square, relative_error, write_dicom

NARROW = ((4, 1), (8, 1), (8, 1), (768, 1))
OPTIONS = ("--weights", "random", "--size", "56", "--n_clips", "3")
PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from echofocus_core.video import extract, panecho
panecho.CONVNEXT_TINY = {NARROW}
panecho.RANDOM_SHA256 = "ab" * 32
extract.program()
"""


@pytest.fixture(autouse=True)
def narrow_encoder(monkeypatch, weights_drawn_once):
    """A ConvNeXt of four narrow blocks."""
    monkeypatch.setattr(panecho, "CONVNEXT_TINY", NARROW)
    monkeypatch.setattr(panecho, "RANDOM_SHA256", "ab" * 32)


@pytest.fixture
def run(source, tmp_path, cli):
    """Extract `source` into tmp_path/out: (exit status, standard output, error)."""
    return lambda *more: cli(source, "--out", tmp_path / "out", *OPTIONS, *more, main=extract.main)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that the decoders read."""
    names, work = [], extract.DecoderProcess.__call__

    def record(self, function, path, sampling):
        names.append(path.name)
        return work(self, function, path, sampling)

    monkeypatch.setattr(extract.DecoderProcess, "__call__", record)
    return names


def read_log(out, name="extract_log.csv"):
    with open(out / name) as f:
        return {(row["study"], row["video"]): row for row in csv.DictReader(f)}


# ----------------------------------------------------------------------------------- starts, images


def images_by_hand(starts, n_frames):
    """The published clips' images as sets: three successive planes of (channel, frame) each."""
    images = set()
    for start in starts:
        first = start - 1 if start > 0 else 0
        frames = [min(first + i, n_frames - 1) for i in range(16)]
        planes = [(channel, frame) for channel in range(3) for frame in frames]
        images |= {tuple(planes[i : i + 3]) for i in range(0, 48, 3)}
    return images


@pytest.mark.parametrize("n_frames", [40, 150])
def test_distinct_images_are_those_counted_by_hand(n_frames):
    for starts_by in ("modulo", "independent"):
        for number in range(20):
            starts = video.clip_starts(n_frames, 16, 16, 0, f"{number}", starts_by)
            images, _ = distinct_images(video.clip_frames(starts, n_frames, 16))
            assert len(images) == len(images_by_hand(starts.tolist(), n_frames))


@pytest.mark.parametrize("n_frames", [18, 40])
@pytest.mark.parametrize("starts_by", ["modulo", "independent"])
def test_all_starts_are_equally_likely(n_frames, starts_by):
    """This holds for the first and later draws; starts 0 and 1 begin with the same frame."""
    n, n_videos = n_frames - 15, 8000
    drawn = [video.clip_starts(n_frames, 3, 16, 0, f"{i}", starts_by) for i in range(n_videos)]
    expected, spread = n_videos / n, np.sqrt(n_videos / n * (1 - 1 / n))
    for draws in np.transpose(drawn):
        assert np.abs(np.bincount(draws, minlength=n) - expected).max() < 4.5 * spread
    if starts_by == "modulo":
        first = np.maximum(np.array(drawn) - 1, 0)
        assert (first % 3 == first[:, :1] % 3).all()


def test_starts_of_short_videos():
    for starts_by in ("modulo", "independent"):
        assert set(video.clip_starts(9, 16, 16, 0, "a", starts_by).tolist()) == {0}
        assert set(video.clip_starts(17, 99, 16, 0, "a", starts_by).tolist()) == {0, 1}


# -------------------------------------------------------------------------------------- the numbers


def test_an_exam_gives_the_same_numbers_under_any_name(source, tmp_path, cli, run):
    """The bytes are the seed: study, name, other studies, batches and workers do not matter."""
    shutil.copytree(source / "A_1", tmp_path / "other" / "Z" / "deep")
    (tmp_path / "other/Z/deep/x.dcm").rename(tmp_path / "other/Z/deep/w.dcm")
    assert run("--augment", "1")[0] == 0
    line = (tmp_path / "other", "--out", tmp_path / "b", *OPTIONS, "--augment", "1")
    assert cli(*line, "--image-batch", "5", "--workers", "2", main=extract.main)[0] == 0
    with h5py.File(tmp_path / "out/A_1.hdf5") as a, h5py.File(tmp_path / "b/Z.hdf5") as b:
        names, others = (f["videos"].asstr()[:].tolist() for f in (a, b))
        assert names == ["IM0001", "series/y.dcm", "x.dcm"]
        order = [others.index(n) for n in ("deep/IM0001", "deep/series/y.dcm", "deep/w.dcm")]
        np.testing.assert_array_equal(a["clip_starts"][:], b["clip_starts"][:][order])
        assert relative_error(b["embeddings"][:][order], a["embeddings"][:]) < 1e-5
        assert relative_error(b["augmented"][:][:, order], a["augmented"][:]) < 1e-5


def whole_clips(path, starts, size):
    """Each clip is prepared and encoded by itself, as for the published models."""
    model = panecho.load_panecho("random").model
    mean, std = (np.array(v, np.float32) for v in (panecho.MEAN, panecho.STD))
    frames = video.read_frames(path)
    out = []
    for start in starts:
        first = max(start - 1, 0)
        clip = [frames[min(first + i, len(frames) - 1)] for i in range(16)]
        clip = np.stack([video.crop_centre(video.resize(f, size), size) for f in clip])
        clip = clip.astype(np.float32) / 255
        x = torch.from_numpy((clip - mean) / std).permute(3, 0, 1, 2)[None]  # (1, 3, 16, H, W)
        with torch.inference_mode():
            out.append(model.encoder(x)[0].numpy())
    return np.stack(out)


def test_extract(source, tmp_path, run):
    out = tmp_path / "out"
    status, text, _ = run()
    assert status == 0 and "RANDOM WEIGHTS" in text
    with h5py.File(out / "A_1.hdf5") as f:
        assert f["videos"].asstr()[:].tolist() == ["IM0001", "series/y.dcm", "x.dcm"]
        assert f["embeddings"].shape == (3, 3, 768) and f["embeddings"].dtype == np.float32
        for i, name in enumerate(f["videos"].asstr()):
            expected = whole_clips(source / "A_1" / name, f["clip_starts"][i], 56)
            assert relative_error(f["embeddings"][i], expected) < 1e-4
    with h5py.File(out / "B.hdf5") as f:
        assert f["videos"].asstr()[:].tolist() == ["real.dcm"]
        assert {v for v, _ in f["skipped"].asstr()[:]} == {"still.dcm", "notes.dcm"}
    attributes = store.load_details(out / "B.hdf5").attributes
    assert attributes["weights"].startswith("random") and attributes["weights_sha256"] == "ab" * 32
    assert attributes["weights_seen"] == "elsewhere" and attributes["starts"] == "modulo"
    assert (attributes["clip_len"], attributes["n_clips"], attributes["size"]) == (16, 3, 56)
    assert str(tmp_path) not in str(attributes)
    log = read_log(out)
    assert len(log) == 6 and log["A_1", "series/y.dcm"]["frames"] == "40"
    assert log["A_1", "x.dcm"]["result"] == "ok" and float(log["A_1", "x.dcm"]["seconds"]) > 0
    spent = [float(log["A_1", v]["encode_seconds"]) for v in ("x.dcm", "IM0001")]
    assert min(spent) > 0 and extract.extraction_seconds(out) > sum(spent) / 2
    assert log["B", "still.dcm"]["result"] == "skipped"
    assert log["B", "still.dcm"]["reason"] == "still image"
    assert str(tmp_path) not in (out / "extract_log.csv").read_text()


def test_a_second_run_extracts_only_the_rest(tmp_path, run):
    """Damaged files are extracted again; other settings are refused, or replace the files with
    --redo."""
    out = tmp_path / "out"
    assert run()[0] == 0
    before, logged = (out / "A_1.hdf5").stat().st_mtime_ns, read_log(out)
    (out / "B.hdf5").write_bytes(b"damaged")
    status, text, _ = run()
    assert status == 0 and "1 study extracted, 1 already there" in text
    assert (out / "A_1.hdf5").stat().st_mtime_ns == before
    log = read_log(out)
    assert len(log) == 6 and log["A_1", "x.dcm"] == logged["A_1", "x.dcm"]
    for name, recorded, present in (
        ("n_clips", "3", "16"), ("starts", "modulo", "independent"), ("mask", "none", "sector"),
    ):  # fmt: skip
        status, _, error = run(f"--{name}", present)
        assert status == 1 and all(x in error for x in (name, recorded, present, "--redo"))
    status, text, _ = run("--mask", "sector", "--redo")
    assert status == 0 and "2 studies extracted" in text
    assert store.load_details(out / "A_1.hdf5").attributes["mask"] == "sector"


def test_perturbed_images(source, tmp_path, cli, run):
    """The change is recorded and repeatable, and images of both kinds are not one dataset."""
    change = ("--perturb", "gain=0.3", "depth=0.5")
    line = (source, "--out", tmp_path / "dark", *OPTIONS, *change)
    assert run()[0] == 0 and cli(*line, main=extract.main)[0] == 0
    plain, dark = (store.open_store(tmp_path / name) for name in ("out", "dark"))
    a, b = plain.read("A_1"), dark.read("A_1")
    assert b.made_with["perturb"] == "depth=0.5 gain=0.3" and "perturb" not in a.made_with
    assert np.abs(a.embeddings - b.embeddings).max() > 1e-3
    (tmp_path / "dark" / "A_1.hdf5").unlink()
    assert cli(*line, main=extract.main)[0] == 0
    again = store.open_store(tmp_path / "dark").read("A_1").embeddings
    assert np.array_equal(again, b.embeddings)
    shutil.copy(tmp_path / "out" / "A_1.hdf5", tmp_path / "dark" / "C.hdf5")
    assert len(store.open_store(tmp_path / "dark").made_with(["A_1", "C"])["perturb"]) == 2


def test_augmented_copies_and_precision(source, tmp_path, cli):
    files = {}
    for name, more in (("a", ("--augment", "2")), ("b", ()), ("c", ("--precision", "bf16"))):
        line = (source / "B", "--out", tmp_path / name, *OPTIONS, *more)
        assert cli(*line, main=extract.main)[0] == 0
        files[name] = h5py.File(tmp_path / name / "B.hdf5")
    plain = files["b"]["embeddings"][:]
    assert files["a"]["augmented"].shape == (2, 1, 3, 768)
    assert relative_error(files["a"]["embeddings"], plain) < 1e-5
    assert relative_error(files["a"]["augmented"][0], plain) > 1e-3
    assert 1e-6 < relative_error(files["c"]["embeddings"], plain) < 0.05


# ---------------------------------------------------------------------------- crashes, several runs


def test_only_one_file_is_lost_if_a_decoder_crashes_or_hangs(tmp_path, monkeypatch):
    write_dicom(tmp_path / "a.dcm", moving_square(), "RGB")
    call = video.read_clips, tmp_path / "a.dcm", video.Sampling(n_clips=1, size=56)
    decoder = extract.DecoderProcess()
    try:
        assert isinstance(decoder(*call)[0][0], video.Clips)
        os.kill(decoder.process.pid, signal.SIGKILL)
        reply, _ = decoder(*call)
        assert isinstance(reply, video.NotNow) and "crashed" in str(reply)
        assert isinstance(decoder(*call)[0][0], video.Clips)
        os.kill(decoder.process.pid, signal.SIGSTOP)  # as if it hung
        monkeypatch.setattr(extract, "DECODE_SECONDS", 1)
        reply, _ = decoder(*call)
        assert isinstance(reply, video.NotNow) and "no result after 1 s" in str(reply)
    finally:
        decoder.close()


def test_a_killed_run_resumes_to_the_same_numbers(source, tmp_path, cli, run):
    for i in range(6):
        (source / f"C{i}").mkdir()
        write_dicom(source / f"C{i}" / "a.dcm", moving_square(17 + i), "RGB")
        shutil.copy(source / f"C{i}" / "a.dcm", source / f"C{i}" / "repeat.dcm")
    out = tmp_path / "killed"
    line = [sys.executable, "-c", PROGRAM, source, "--out", out, *OPTIONS, "--workers", "1"]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if list(out.glob("[!.]*.hdf5")) or process.poll() is not None:
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    status, _, error = cli(source, "--out", out, *OPTIONS, main=extract.main)
    assert status == 0, error
    assert run()[0] == 0
    names = sorted(p.name for p in (tmp_path / "out").glob("*.hdf5"))
    assert len(names) == 8 and sorted(p.name for p in out.glob("[!.]*.hdf5")) == names
    for name in names:
        with h5py.File(out / name) as a, h5py.File(tmp_path / "out" / name) as b:
            np.testing.assert_array_equal(a["clip_starts"], b["clip_starts"])
            assert relative_error(a["embeddings"], b["embeddings"][:]) < 1e-5
    logs = [read_log(folder) for folder in (out, tmp_path / "out")]
    for row in [*logs[0].values(), *logs[1].values()]:
        del row["seconds"], row["encode_seconds"]
    assert logs[0] == logs[1] and logs[0]["C0", "repeat.dcm"]["result"] == "skipped"


def test_shards_divide_the_studies(source, tmp_path, run):
    """Each worker extracts its part and has a log; a second worker of a shard is refused."""
    (source / "E").mkdir()
    copy_example(source / "E" / "e.dcm", study="1.2.8")
    out = tmp_path / "out"
    assert run("--shard", "0/2")[0] == 0
    assert {p.stem for p in out.glob("*.hdf5")} == {"A_1", "E"}
    with lock(out / ".extract_1of2"):
        status, _, error = run("--shard", "1/2")
        assert status == 1 and "another process" in error
    assert run("--shard", "1/2")[0] == 0
    assert {p.stem for p in out.glob("*.hdf5")} == {"A_1", "B", "E"}
    logs = [read_log(out, f"extract_log_{i}of2.csv") for i in range(2)]
    assert [{study for study, _ in log} for log in logs] == [{"A_1", "E"}, {"B"}]


# --------------------------------------------------------------------- files that are read again


def test_only_changed_files_are_read_again(source, tmp_path, run, decoded):
    """A file has changed if its size or time and its bytes differ; others keep their numbers."""
    shutil.rmtree(source / "B")

    def embeddings():
        decoded.clear()
        status, text, error = run()
        assert status == 0, error
        with h5py.File(tmp_path / "out" / "A_1.hdf5") as f:
            by_name = dict(zip(f["videos"].asstr(), f["embeddings"][:], strict=True))
        return sorted(decoded), by_name, text

    names, first, _ = embeddings()
    assert names == ["IM0001", "x.dcm", "y.dcm"]
    os.utime(source / "A_1" / "x.dcm", (1, 1))  # another time, the same bytes
    names, _, text = embeddings()
    assert names == [] and "1 already there" in text
    write_dicom(source / "A_1" / "x.dcm", moving_square(19)[..., ::-1].copy(), "RGB")
    names, changed, _ = embeddings()
    assert names == ["x.dcm"] and (changed["x.dcm"] != first["x.dcm"]).any()
    np.testing.assert_array_equal(changed["IM0001"], first["IM0001"])
    shutil.copy(source / "A_1" / "IM0001", source / "A_1" / "IM0002")
    names, more, _ = embeddings()
    assert names == ["IM0002"] and more.keys() == first.keys()
    (source / "A_1" / "IM0001").unlink()  # the copy repeats it
    names, fewer, _ = embeddings()
    assert names == ["IM0002"] and fewer.keys() == first.keys() - {"IM0001"} | {"IM0002"}
    assert relative_error(fewer["IM0002"], first["IM0001"]) < 1e-5


def test_the_same_frames_count_once(source, tmp_path, run):
    """A repeat in the study is skipped; one in another study is printed and in the log."""
    shutil.copy(source / "A_1" / "IM0001", source / "A_1" / "copy.dcm")
    (source / "C").mkdir()
    shutil.copy(source / "A_1" / "x.dcm", source / "C" / "c.dcm")
    for _ in range(2):
        status, text, _ = run("--group", "folder")
        assert status == 0
        assert "A_1/copy.dcm: a repeat" in text and "1 files have the same frames" in text
        log = read_log(tmp_path / "out")
        assert log["A_1", "copy.dcm"]["reason"] == "a repeat: the same frames as IM0001"
        assert log["C", "c.dcm"]["reason"] == "the same frames as in another study: A_1/x.dcm"
        assert log["A_1", "x.dcm"]["reason"] == ""


def test_videos_that_are_almost_the_same_are_noted(tmp_path, cli):
    """A copy as MP4 has a note in the log and on the screen; other loops have none."""
    for seed in range(3):
        cine = phantom.phantom_cine(("A4C", "PSAX", "PLAX")[seed], frames=16, seed=seed)
        phantom.write_video(tmp_path / "in" / "A" / f"{seed}.avi", cine)
    out, line = tmp_path / "out", (tmp_path / "in", "--out", tmp_path / "out", *OPTIONS)
    assert cli(*line, main=extract.main)[0] == 0
    assert {row["reason"] for row in read_log(out).values()} == {""}
    phantom.write_video(tmp_path / "in" / "A" / "copy.mp4", cine, fourcc="mp4v")
    _, text, _ = cli(*line, main=extract.main)
    assert "1 videos have almost the same embeddings" in text
    notes = {video: row["reason"] for (_, video), row in read_log(out).items()}
    assert notes.pop("copy.mp4") == "almost the same as another video: 2.avi"
    assert set(notes.values()) == {""}


def test_temporary_faults_are_tried_again(source, tmp_path, run, decoded, monkeypatch):
    """A decoder fails, then works; a still image is not read again."""
    failing, work = {"y.dcm", "real.dcm"}, extract.DecoderProcess.__call__

    def fail(self, function, path, sampling):
        if path.name in failing:
            decoded.append(path.name)
            return video.NotNow("transfer syntax X needs a plugin"), 0.0
        return work(self, function, path, sampling)

    monkeypatch.setattr(extract.DecoderProcess, "__call__", fail)

    def again():
        decoded.clear()
        status, text, _ = run()
        assert status == 0
        return sorted(decoded), text

    assert "1 study without a usable video: B" in again()[1]
    names, text = again()
    assert names == ["real.dcm", "y.dcm"] and "0 studies extracted, 1 already there" in text
    assert "A_1/series/y.dcm: transfer syntax X needs a plugin" in text
    failing.clear()
    names, text = again()
    assert names == ["real.dcm", "y.dcm"] and "2 studies extracted" in text
    assert again()[0] == [] and not list((tmp_path / "out" / ".empty").glob("*"))
    with h5py.File(tmp_path / "out" / "A_1.hdf5") as f:
        assert len(f["videos"]) == 3 and len(f["skipped"]) == 0


def test_a_file_that_changes_while_it_is_read(run, monkeypatch):
    work = extract.DecoderProcess.__call__

    def change(self, function, path, sampling):
        reply = work(self, function, path, sampling)
        if path.name == "x.dcm":
            os.utime(path, (1, 1))
        return reply

    monkeypatch.setattr(extract.DecoderProcess, "__call__", change)
    status, text, _ = run()
    assert status == 0 and "A_1/x.dcm: it changed while it was read" in text


def test_a_source_that_disappears_during_the_run(source, tmp_path, run, monkeypatch):
    """The run stops without writing the study that it cannot read."""
    begin = extract.Run.begin

    def begin_and_lose(self, study, bar):
        if study.name == "B":
            shutil.rmtree(source)
        yield from begin(self, study, bar)

    monkeypatch.setattr(extract.Run, "begin", begin_and_lose)
    status, _, error = run("--workers", "1")
    assert status == 1 and "can no longer be reached" in error
    assert not (tmp_path / "out" / "B.hdf5").exists()
