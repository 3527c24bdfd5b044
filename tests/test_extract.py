"""Extraction against encoding every clip whole, and what a user meets: odd files, restarts."""

import csv
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import get_args

import h5py
import numpy as np
import pytest
import torch

from echofocus_core.base.files import lock
from echofocus_core.base.options import Settings
from echofocus_core.video import decode as video
from echofocus_core.video import extract, panecho, phantom, store
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
def narrow_encoder(monkeypatch):
    """A ConvNeXt of four narrow blocks, whose untrained weights are drawn once."""
    monkeypatch.setattr(panecho, "CONVNEXT_TINY", NARROW)
    monkeypatch.setattr(panecho, "random_weights", narrow_weights)
    monkeypatch.setattr(panecho, "RANDOM_SHA256", "ab" * 32)


@functools.cache
def narrow_weights(draw=panecho.random_weights):
    return draw()


@pytest.fixture
def run(source, tmp_path, cli):
    """Extract `source` into tmp_path/out: (exit status, standard output, error)."""
    return lambda *more: cli(source, "--out", tmp_path / "out", *OPTIONS, *more, main=extract.main)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that the decoders are asked for."""
    names, work = [], extract.DecoderProcess.__call__

    def note(self, function, path, sampling):
        names.append(path.name)
        return work(self, function, path, sampling)

    monkeypatch.setattr(extract.DecoderProcess, "__call__", note)
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


@pytest.mark.parametrize("n_frames, modulo, independent", [(40, 48, 111), (150, 142, 205)])
def test_starts_of_one_class_halve_the_images(n_frames, modulo, independent):
    """The images of a video are those of a count by hand, and as many as were measured."""
    for starts_by, expected in (("modulo", modulo), ("independent", independent)):
        counts = []
        for number in range(100):
            key = f"{starts_by} {number}"
            starts = video.clip_starts(n_frames, 16, 16, 0, key, starts_by)
            clips = video.clip_frames(starts, n_frames, 16)
            counts.append(len(extract.distinct_images(clips)[0]))
            assert counts[-1] == len(images_by_hand(starts.tolist(), n_frames))
        assert abs(np.mean(counts) - expected) < 4


@pytest.mark.parametrize("n_frames", [18, 40])
@pytest.mark.parametrize("starts_by", ["modulo", "independent"])
def test_each_start_is_as_likely(n_frames, starts_by):
    """First and later draws alike, over many videos; 0 and 1 begin with the same frame."""
    n, n_videos = n_frames - 15, 8000
    drawn = [video.clip_starts(n_frames, 3, 16, 0, f"{i}", starts_by) for i in range(n_videos)]
    expected, spread = n_videos / n, np.sqrt(n_videos / n * (1 - 1 / n))
    for draws in np.transpose(drawn):
        assert np.abs(np.bincount(draws, minlength=n) - expected).max() < 4.5 * spread
    if starts_by == "modulo":
        first = np.maximum(np.array(drawn) - 1, 0)
        assert (first % 3 == first[:, :1] % 3).all()


def test_each_way_to_draw_starts_has_the_text_that_is_recorded():
    starts_by = Settings.model_fields["starts"].annotation
    assert get_args(starts_by) == tuple(video.SAMPLINGS)
    with pytest.raises(ValueError, match="even"):
        video.clip_starts(40, 3, 16, 0, "a", "even")


def test_short_videos_have_clips():
    for starts_by in ("modulo", "independent"):
        assert set(video.clip_starts(9, 16, 16, 0, "a", starts_by).tolist()) == {0}
        assert set(video.clip_starts(17, 99, 16, 0, "a", starts_by).tolist()) == {0, 1}


# -------------------------------------------------------------------------------------- the numbers


def test_an_exam_gives_the_same_numbers_under_any_name(source, tmp_path, cli, run):
    """Seeded by the bytes: neither study, name nor neighbours matter; copies likewise."""
    shutil.copytree(source / "A_1", tmp_path / "other" / "Z" / "deep")
    (tmp_path / "other/Z/deep/x.dcm").rename(tmp_path / "other/Z/deep/w.dcm")
    assert run("--augment", "1")[0] == 0
    line = (tmp_path / "other", "--out", tmp_path / "b", *OPTIONS, "--augment", "1")
    assert cli(*line, main=extract.main)[0] == 0
    with h5py.File(tmp_path / "out/A_1.hdf5") as a, h5py.File(tmp_path / "b/Z.hdf5") as b:
        names, others = (f["videos"].asstr()[:].tolist() for f in (a, b))
        assert names == ["IM0001", "series/y.dcm", "x.dcm"]
        order = [others.index(n) for n in ("deep/IM0001", "deep/series/y.dcm", "deep/w.dcm")]
        np.testing.assert_array_equal(a["clip_starts"][:], b["clip_starts"][:][order])
        assert relative_error(b["embeddings"][:][order], a["embeddings"][:]) < 1e-5
        assert relative_error(b["augmented"][:][:, order], a["augmented"][:]) < 1e-5


def whole_clips(path, starts, size):
    """The published way: every clip read, prepared and encoded by itself."""
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
    assert "B/still.dcm: still image" in text and "B/notes.dcm: not a DICOM file" in text
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


def test_a_second_run_does_what_is_left(source, tmp_path, run):
    """Complete studies are kept; studies with a new video or a damaged file are extracted again;
    other settings are refused, or replace the files with --redo."""
    out = tmp_path / "out"
    assert run()[0] == 0
    before = (out / "A_1.hdf5").stat().st_mtime_ns
    (out / "B.hdf5").unlink()
    status, text, _ = run()
    assert status == 0 and "1 studies extracted, 1 already there" in text
    assert (out / "A_1.hdf5").stat().st_mtime_ns == before
    shutil.copy(source / "A_1" / "x.dcm", source / "A_1" / "z.dcm")
    (out / "B.hdf5").write_bytes(b"damaged")
    status, text, _ = run()
    assert status == 0 and "2 studies extracted, 0 already there" in text
    with h5py.File(out / "A_1.hdf5") as f:
        assert len(f["videos"]) == 3  # z.dcm repeats x.dcm
    for name, recorded, present in (
        ("n_clips", "3", "16"), ("starts", "modulo", "independent"), ("mask", "none", "sector"),
    ):  # fmt: skip
        status, _, error = run(f"--{name}", present)
        assert status == 1 and all(x in error for x in (name, recorded, present, "--redo"))
    status, text, _ = run("--mask", "sector", "--redo")
    assert status == 0 and "2 studies extracted" in text
    assert store.load_details(out / "A_1.hdf5").attributes["mask"] == "sector"


def test_one_study_and_order_independence(source, tmp_path, cli, run):
    """A folder of files is one study; what shares a run or a batch changes no embedding."""
    shutil.move(source / "A_1" / "series" / "y.dcm", source / "A_1" / "y.dcm")
    assert run()[0] == 0
    options = (*OPTIONS, "--image-batch", "5", "--workers", "2")
    assert cli(source / "A_1", "--out", tmp_path / "one", *options, main=extract.main)[0] == 0
    with h5py.File(tmp_path / "out/A_1.hdf5") as a, h5py.File(tmp_path / "one/A_1.hdf5") as b:
        np.testing.assert_array_equal(a["clip_starts"], b["clip_starts"])
        assert relative_error(a["embeddings"], b["embeddings"][:]) < 1e-5


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


def test_a_decoder_that_crashes_or_hangs_is_one_file_lost(tmp_path, monkeypatch):
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
        row.pop("seconds")
    assert logs[0] == logs[1] and logs[0]["C0", "repeat.dcm"]["result"] == "skipped"


def test_shards_share_the_studies(source, tmp_path, run):
    """Each worker does its own part and has its own log; a second one of a shard is refused."""
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
    assert run("--shard", "3/4")[0] == 0  # more workers than studies


def test_log(source, tmp_path, run):
    """A row a file, also of studies that were complete before."""
    (source / "E").mkdir()
    copy_example(source / "E" / "e.dcm", "rgb_color", study="1.2.8")
    out = tmp_path / "out"
    status, text, _ = run()
    assert status == 0 and "1 studies without a usable video: E" in text
    log = read_log(out)
    assert len(log) == 7
    assert log["A_1", "series/y.dcm"]["frames"] == "40"
    assert log["A_1", "x.dcm"]["result"] == "ok" and float(log["A_1", "x.dcm"]["seconds"]) > 0
    assert log["B", "still.dcm"]["result"] == "skipped"
    assert log["B", "still.dcm"]["reason"] == "still image"
    assert str(tmp_path) not in (out / "extract_log.csv").read_text()
    assert run()[0] == 0
    again = read_log(out)
    assert again.keys() == log.keys() and {row["seconds"] for row in again.values()} == {""}


# -------------------------------------------------------------------------- what is read again


def test_only_what_changed_is_read_again(source, tmp_path, run, decoded):
    """By size and time, then by bytes; the rest of the study keeps its numbers."""
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
    names, more, text = embeddings()
    assert names == ["IM0002"] and more.keys() == first.keys()
    assert embeddings()[0] == []
    (source / "A_1" / "IM0001").unlink()  # what the copy repeats is gone
    names, fewer, _ = embeddings()
    assert names == ["IM0002"] and fewer.keys() == first.keys() - {"IM0001"} | {"IM0002"}
    assert relative_error(fewer["IM0002"], first["IM0001"]) < 1e-5


def test_the_same_frames_count_once(source, tmp_path, run):
    """In one study, and reported in two: on the screen, also when they are complete, and logged."""
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
    """A copy as MP4: in the log and on the screen, also after a kill; other loops are not."""
    for seed in range(3):
        cine = phantom.phantom_cine(("A4C", "PSAX", "PLAX")[seed], frames=16, seed=seed)
        phantom.write_video(tmp_path / "in" / "A" / f"{seed}.avi", cine)
    out, line = tmp_path / "out", (tmp_path / "in", "--out", tmp_path / "out", *OPTIONS)
    assert cli(*line, main=extract.main)[0] == 0
    assert {row["reason"] for row in read_log(out).values()} == {""}
    phantom.write_video(tmp_path / "in" / "A" / "copy.mp4", cine, fourcc="mp4v")
    for _ in range(2):
        _, text, _ = cli(*line, main=extract.main)
        assert "1 videos have almost the same embeddings" in text
        notes = {video: row["reason"] for (_, video), row in read_log(out).items()}
        assert notes.pop("copy.mp4") == "almost the same as another video: 2.avi"
        assert set(notes.values()) == {""}
    (tmp_path / "in" / "A" / "2.avi").unlink()
    cli(*line, main=extract.main)
    assert {row["reason"] for row in read_log(out).values()} == {""}


@pytest.mark.parametrize("more", [True, False])
def test_damaged_numbers_are_extracted_again(source, tmp_path, run, decoded, more):
    """A changed byte among the embeddings: with --redo, or when the study has changed anyway."""
    file = tmp_path / "out" / "A_1.hdf5"
    shutil.rmtree(source / "B")
    assert run()[0] == 0
    with h5py.File(file) as f:
        position, first = f["embeddings"].id.get_offset() + 7, f["embeddings"][:]
    raw = bytearray(file.read_bytes())
    raw[position] ^= 1
    file.write_bytes(raw)
    if more:
        shutil.copy(source / "A_1" / "x.dcm", source / "A_1" / "z.dcm")
    decoded.clear()
    status, text, _ = run(*([] if more else ["--redo"]))
    assert status == 0 and "1 studies extracted" in text and len(decoded) == 3 + more
    with h5py.File(file) as f:
        assert relative_error(f["embeddings"][:3], first) < 1e-5


def test_what_may_pass_is_tried_again(source, tmp_path, run, decoded, monkeypatch):
    """A decoder that fails, then works; a still image is not read again, but with --redo."""
    failing, work = {"y.dcm", "real.dcm"}, extract.DecoderProcess.__call__

    def fail(self, function, path, sampling):
        if path.name in failing:
            decoded.append(path.name)
            return video.NotNow("transfer syntax X needs a plugin"), 0.0
        return work(self, function, path, sampling)

    monkeypatch.setattr(extract.DecoderProcess, "__call__", fail)

    def again(*more):
        decoded.clear()
        status, text, _ = run(*more)
        assert status == 0
        return sorted(decoded), text

    assert "1 studies without a usable video: B" in again()[1]
    names, text = again()
    assert names == ["real.dcm", "y.dcm"] and "0 studies extracted, 1 already there" in text
    assert "A_1/series/y.dcm: transfer syntax X needs a plugin" in text
    assert len(again("--redo")[0]) == 4  # B has no embeddings: all of it
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
    monkeypatch.setattr(extract.DecoderProcess, "__call__", work)
    status, text, _ = run()
    assert status == 0 and "1 studies extracted, 1 already there" in text


def test_a_vanished_source_costs_only_its_study(source, tmp_path, run, monkeypatch):
    """The mount goes while the run is under way: what is done is kept, nothing is half-done."""
    begin = extract.Run.begin

    def begin_and_lose(self, study, bar):
        if study.name == "B":
            shutil.rmtree(source)
        yield from begin(self, study, bar)

    monkeypatch.setattr(extract.Run, "begin", begin_and_lose)
    shutil.copytree(source, tmp_path / "copy")
    status, _, error = run("--workers", "1")
    assert status == 1 and "can no longer be reached" in error
    assert not (tmp_path / "out" / "B.hdf5").exists()
    monkeypatch.setattr(extract.Run, "begin", begin)
    shutil.copytree(tmp_path / "copy", source)
    assert run()[0] == 0
    with h5py.File(tmp_path / "out" / "B.hdf5") as f:
        assert f["videos"].asstr()[:].tolist() == ["real.dcm"]


def test_nothing_identifying_in_any_output(tmp_path, cli):
    """Names and ids planted in a DICOM's tags reach neither the files nor the screen."""
    folder = tmp_path / "in" / "S1"
    folder.mkdir(parents=True)
    secrets = ("DOE^JANE", "MRN-4711", "19700101")
    tags = dict(PatientName=secrets[0], PatientID=secrets[1], PatientBirthDate=secrets[2])
    write_dicom(folder / "a.dcm", moving_square()[..., ::-1].copy(), "RGB", **tags)
    write_dicom(folder / "b.dcm", moving_square()[..., ::-1].copy(), "ODD", **tags)
    line = (tmp_path / "in", "--out", tmp_path / "out", *OPTIONS)
    status, text, error = cli(*line, main=extract.main)
    assert status == 0
    written = b"".join(p.read_bytes() for p in (tmp_path / "out").iterdir() if p.is_file())
    for secret in (*secrets, str(tmp_path / "in")):
        assert secret.encode() not in written and secret not in text + error
