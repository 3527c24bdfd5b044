"""Extraction against encoding every clip whole, and what a user meets: odd files, restarts."""

import csv
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import torch
from helpers import ROOT, copy_example, moving_square, relative_error, write_dicom

from echofocus_core.video import decode as video
from echofocus_core.video import extract, panecho, store

OPTIONS = ("--weights", "random", "--size", "56", "--n_clips", "3")


pytestmark = pytest.mark.usefixtures("weights_drawn_once")


def images_by_hand(starts, n_frames):
    """The published clips' images as sets: three successive planes of (channel, frame) each."""
    images = set()
    for start in starts:
        first = start - 1 if start > 0 else 0
        frames = [min(first + i, n_frames - 1) for i in range(16)]
        planes = [(channel, frame) for channel in range(3) for frame in frames]
        images |= {tuple(planes[i : i + 3]) for i in range(0, 48, 3)}
    return images


@pytest.mark.parametrize(
    "n_frames, modulo, independent", [(40, 48, 111), (80, 92, 169), (150, 142, 205)]
)
def test_starts_of_one_class_halve_the_images(n_frames, modulo, independent):
    """The images a video are what a count by hand says, and as many as were measured."""
    for how, expected in (("modulo", modulo), ("independent", independent)):
        found = []
        for number in range(100):
            starts = video.clip_starts(n_frames, 16, 16, 0, f"{how} {number}", how)
            clips = video.clip_frames(starts, n_frames, 16)
            found.append(len(extract.distinct_images(clips)[0]))
            assert found[-1] == len(images_by_hand(starts.tolist(), n_frames))
        assert abs(np.mean(found) - expected) < 4


@pytest.mark.parametrize("n_frames", [18, 20, 40])
@pytest.mark.parametrize("how", ["modulo", "independent"])
def test_each_start_is_as_likely(n_frames, how):
    """First and later draws alike, over many videos; 0 and 1 begin with the same frame."""
    n, n_videos = n_frames - 15, 8000
    drawn = [video.clip_starts(n_frames, 3, 16, 0, f"{i}", how) for i in range(n_videos)]
    expected, spread = n_videos / n, np.sqrt(n_videos / n * (1 - 1 / n))
    for draws in np.transpose(drawn):
        assert np.abs(np.bincount(draws, minlength=n) - expected).max() < 4.5 * spread
    if how == "modulo":
        first = np.maximum(np.array(drawn) - 1, 0)
        assert (first % 3 == first[:, :1] % 3).all()


def test_short_videos_have_clips():
    for how in ("modulo", "independent"):
        assert set(video.clip_starts(9, 16, 16, 0, "a", how).tolist()) == {0}
        assert set(video.clip_starts(17, 99, 16, 0, "a", how).tolist()) == {0, 1}


def test_an_exam_gives_the_same_numbers_under_any_name(source, tmp_path, cli):
    """Seeded by the bytes: neither study, name nor neighbours matter; copies likewise."""
    shutil.copytree(source / "A_1", tmp_path / "other" / "Z" / "deep")
    (tmp_path / "other/Z/deep/x.dcm").rename(tmp_path / "other/Z/deep/w.dcm")
    options = (*OPTIONS, "--augment", "1")
    assert cli(source, "--out", tmp_path / "a", *options, main=extract.main)[0] == 0
    assert cli(tmp_path / "other", "--out", tmp_path / "b", *options, main=extract.main)[0] == 0
    with h5py.File(tmp_path / "a/A_1.hdf5") as a, h5py.File(tmp_path / "b/Z.hdf5") as b:
        assert a.attrs["starts"] == "modulo"
        here, there = (f["videos"].asstr()[:].tolist() for f in (a, b))
        order = [there.index(n) for n in ("deep/IM0001", "deep/series/y.dcm", "deep/w.dcm")]
        assert here == ["IM0001", "series/y.dcm", "x.dcm"]
        np.testing.assert_array_equal(a["clip_starts"][:], b["clip_starts"][:][order])
        assert relative_error(b["embeddings"][:][order], a["embeddings"][:]) < 1e-5
        assert relative_error(b["augmented"][:][:, order], a["augmented"][:]) < 1e-5
    options = (*OPTIONS, "--starts", "independent")
    status, _, error = cli(source, "--out", tmp_path / "a", *options, main=extract.main)
    assert status == 1 and "starts = modulo, not independent" in error


def whole_clips(path, starts, size):
    """The published way: every clip read, prepared and encoded by itself."""
    model = panecho.load_panecho("random").model
    mean, std = (np.array(v, np.float32) for v in (panecho.MEAN, panecho.STD))
    frames = video.read_frames(path)
    out = []
    for start in starts:
        first = max(start - 1, 0)
        clip = [frames[min(first + i, len(frames) - 1)] for i in range(16)]
        clip = np.stack([video.central(video.resized(f, size), size) for f in clip])
        clip = clip.astype(np.float32) / 255
        x = torch.from_numpy((clip - mean) / std).permute(3, 0, 1, 2)[None]  # (1, 3, 16, H, W)
        with torch.inference_mode():
            out.append(model.encoder(x)[0].numpy())
    return np.stack(out)


def test_extract(source, tmp_path, cli):
    out = tmp_path / "out"
    status, text, _ = cli(source, "--out", out, *OPTIONS, main=extract.main)
    assert status == 0
    assert "RANDOM WEIGHTS" in text
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
        attributes = dict(f.attrs)
    assert attributes["weights"].startswith("random")
    assert attributes["weights_sha256"] == panecho.load_panecho("random").sha256
    assert attributes["weights_seen"] == "elsewhere"
    assert (attributes["clip_len"], attributes["n_clips"], attributes["size"]) == (16, 3, 56)
    assert str(tmp_path) not in str(attributes)

    # Finished studies are left alone; what was made in another way is not mixed in.
    before = (out / "A_1.hdf5").stat().st_mtime_ns
    (out / "B.hdf5").unlink()
    status, text, _ = cli(source, "--out", out, *OPTIONS, main=extract.main)
    assert status == 0 and "1 studies extracted, 1 already there" in text
    assert (out / "A_1.hdf5").stat().st_mtime_ns == before
    # A study that has got another video, and a damaged file, are made again.
    shutil.copy(source / "A_1" / "x.dcm", source / "A_1" / "z.dcm")
    (out / "B.hdf5").write_bytes(b"damaged")
    status, text, _ = cli(source, "--out", out, *OPTIONS, main=extract.main)
    assert status == 0 and "2 studies extracted, 0 already there" in text
    with h5py.File(out / "A_1.hdf5") as f:
        assert len(f["videos"]) == 4
    status, _, error = cli(source, "--out", out, *OPTIONS[:4], main=extract.main)
    assert status == 1 and "n_clips = 3, not 16" in error and "Traceback" not in error


def test_one_study_and_order_independence(source, tmp_path, cli):
    """A folder of files is one study; what shares a run or a batch changes no embedding."""
    shutil.move(source / "A_1" / "series" / "y.dcm", source / "A_1" / "y.dcm")
    assert cli(source, "--out", tmp_path / "all", *OPTIONS, main=extract.main)[0] == 0
    options = (*OPTIONS, "--image-batch", "5", "--workers", "2")
    assert cli(source / "A_1", "--out", tmp_path / "one", *options, main=extract.main)[0] == 0
    with h5py.File(tmp_path / "all/A_1.hdf5") as a, h5py.File(tmp_path / "one/A_1.hdf5") as b:
        np.testing.assert_array_equal(a["clip_starts"], b["clip_starts"])
        assert relative_error(a["embeddings"], b["embeddings"][:]) < 1e-5


def test_a_decoder_that_crashes_or_hangs_is_one_file_lost(tmp_path, monkeypatch):
    write_dicom(tmp_path / "a.dcm", moving_square(), "RGB")
    sampling = video.Sampling(n_clips=1, size=56)
    decoder = extract.DecoderProcess()
    try:
        assert isinstance(
            decoder(video.read_clips, tmp_path / "a.dcm", sampling)[0][0], video.Clips
        )
        os.kill(decoder.process.pid, signal.SIGKILL)
        reply, _ = decoder(video.read_clips, tmp_path / "a.dcm", sampling)
        assert isinstance(reply, video.VideoError) and "crashed" in str(reply)
        assert isinstance(
            decoder(video.read_clips, tmp_path / "a.dcm", sampling)[0][0], video.Clips
        )

        os.kill(decoder.process.pid, signal.SIGSTOP)  # as if it hung
        monkeypatch.setattr(extract, "DECODE_SECONDS", 1)
        reply, _ = decoder(video.read_clips, tmp_path / "a.dcm", sampling)
        assert isinstance(reply, video.VideoError) and "no result after 1 s" in str(reply)
    finally:
        decoder.close()


def test_killed_run_leaves_no_half_file(source, tmp_path, cli):
    out = tmp_path / "out"
    line = [sys.executable, ROOT / "embed" / "extract.py", source, "--out", out, *OPTIONS]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if list(out.glob("A_1.hdf5")) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    for path in out.glob("*.hdf5"):
        with h5py.File(path) as f:
            assert np.isfinite(f["embeddings"][:]).all()
    assert cli(*line[2:], main=extract.main)[0] == 0
    assert {p.name for p in out.glob("[!.]*.hdf5")} == {"A_1.hdf5", "B.hdf5"}


def read_log(out):
    with open(out / "extract_log.csv") as f:
        return list(csv.DictReader(f))


@pytest.mark.slow
def test_workers_share_the_work(tmp_path):
    """Four workers, two of them killed: the rest do every study once, nothing is half-written."""
    for i in range(60):
        folder = tmp_path / "videos" / f"S{i:02}"
        folder.mkdir(parents=True)
        write_dicom(folder / "a.dcm", moving_square(17 + i % 5)[..., ::-1].copy(), "RGB")
    out = tmp_path / "out"
    options = ("--weights", "random", "--size", "32", "--n_clips", "1", "--workers", "1")
    line = [sys.executable, ROOT / "embed" / "extract.py", tmp_path / "videos", "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [*line, *options, "--shard", f"{i}/4"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for i in range(4)
    ]
    deadline = time.time() + 120
    while len(list(out.glob("S*.hdf5"))) < 4 and time.time() < deadline:
        time.sleep(0.02)
    for worker in workers[:2]:
        worker.kill()
    for worker in workers[2:]:
        assert worker.wait(120) == 0
    names = sorted(p.stem for p in out.glob("S*.hdf5"))
    assert names == [f"S{i:02}" for i in range(60)]
    for path in out.glob("S*.hdf5"):
        with h5py.File(path) as f:
            assert np.isfinite(f["embeddings"][:]).all()
    assert sorted(row["study"] for row in read_log(out)) == names  # whoever was killed, and when


def test_log_and_settings(source, tmp_path, cli):
    out = tmp_path / "out"
    assert cli(source, "--out", out, *OPTIONS, main=extract.main)[0] == 0
    rows = {(r["study"], r["video"]): r for r in read_log(out)}
    assert len(rows) == 6
    assert rows["A_1", "series/y.dcm"]["frames"] == "40"
    assert rows["A_1", "x.dcm"]["result"] == "ok" and float(rows["A_1", "x.dcm"]["seconds"]) > 0
    assert rows["B", "still.dcm"]["result"] == "skipped"
    assert rows["B", "still.dcm"]["reason"] == "still image"
    assert str(tmp_path) not in (out / "extract_log.csv").read_text()

    options = (*OPTIONS, "--mask", "sector")
    status, _, error = cli(source, "--out", out, *options, main=extract.main)
    assert status == 1 and "mask = none, not sector" in error
    status, text, _ = cli(source, "--out", out, *options, "--redo", main=extract.main)
    assert status == 0 and "2 studies extracted" in text
    with h5py.File(out / "A_1.hdf5") as f:
        assert f.attrs["mask"] == "sector"


def test_log_has_one_row_a_video(source, tmp_path, cli, monkeypatch):
    """After reruns, --redo, a death between log and study, and a line that broke off."""
    out = tmp_path / "out"
    (source / "E").mkdir()
    copy_example(source / "E" / "e.dcm", "rgb_color", study="1.2.8")
    decoded = []
    work = extract.DecoderProcess.__call__
    monkeypatch.setattr(
        extract.DecoderProcess,
        "__call__",
        lambda self, function, path, how: (
            decoded.append(str(path.relative_to(source))),
            work(self, function, path, how),
        )[1],
    )

    def run(*more):
        decoded.clear()
        status, text, _ = cli(source, "--out", out, *OPTIONS, *more, main=extract.main)
        assert status == 0 and "1 studies without a usable video: E" in text
        rows = [(r["study"], r["video"]) for r in read_log(out)]
        assert len(rows) == len(set(rows)) == 7
        return set(decoded)

    assert len(run()) == 7
    assert run() == set()  # the empty study is known
    assert run("--redo") == {"E/e.dcm"}  # and tried again when asked to
    (out / "B.hdf5").unlink()  # as if the process had died after its rows were logged
    assert run() == {"B/real.dcm", "B/still.dcm", "B/notes.dcm"}
    log = out / "extract_log.csv"
    log.write_text(log.read_text()[:-20])  # B's rows are the last
    (out / "B.hdf5").unlink()
    run()


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that the decoders are asked for."""
    names, work = [], extract.DecoderProcess.__call__

    def note(self, function, path, how):
        names.append(path.name)
        return work(self, function, path, how)

    monkeypatch.setattr(extract.DecoderProcess, "__call__", note)
    return names


def test_only_what_changed_is_read_again(source, tmp_path, cli, decoded):
    """By size and time, then by bytes; the rest of the study keeps its numbers."""
    out = tmp_path / "out"
    shutil.rmtree(source / "B")

    def run():
        decoded.clear()
        status, text, error = cli(source, "--out", out, *OPTIONS, main=extract.main)
        assert status == 0, error
        with h5py.File(out / "A_1.hdf5") as f:
            embeddings = dict(zip(f["videos"].asstr(), f["embeddings"][:], strict=True))
            said = {row[0]: row[5] for row in f["files"].asstr()}
        assert [(r["video"], r["reason"]) for r in read_log(out)] == sorted(said.items())
        return sorted(decoded), embeddings, text

    names, first, _ = run()
    assert names == ["IM0001", "x.dcm", "y.dcm"]
    os.utime(source / "A_1" / "x.dcm", (1, 1))  # another time, the same bytes
    names, _, text = run()
    assert names == [] and "1 already there" in text
    write_dicom(source / "A_1" / "x.dcm", moving_square(19)[..., ::-1].copy(), "RGB")
    names, changed, _ = run()
    assert names == ["x.dcm"] and (changed["x.dcm"] != first["x.dcm"]).any()
    np.testing.assert_array_equal(changed["IM0001"], first["IM0001"])
    shutil.copy(source / "A_1" / "IM0001", source / "A_1" / "copy.dcm")
    names, more, text = run()
    assert names == ["copy.dcm"]
    assert "the same bytes as another file 1" in text  # on the screen by its kind
    assert relative_error(more["copy.dcm"], first["IM0001"]) < 1e-5
    (source / "A_1" / "copy.dcm").unlink()
    names, fewer, _ = run()
    assert names == [] and fewer.keys() == first.keys()


def test_files_of_the_same_bytes_in_two_studies_are_told(tmp_path):
    """On the screen, also where both were there before; in the log by the study that came later."""
    contents = {"s0": {"a": "1", "b": "2"}, "s1": {"c": "2", "d": "3"}, "s2": {"e": ""}}
    log = {
        study: {name: store.FileRecord(content=64 * x) for name, x in files.items()}
        for study, files in contents.items()
    }
    run = extract.Run(tmp_path, {}, False)
    found = {study: run.in_other_studies(study, records) for study, records in log.items()}
    assert found == {"s0": {}, "s1": {"c": "s0"}, "s2": {}}
    assert run.summary.shared == [("s1", "s0")]


def test_damaged_numbers_are_made_anew(source, tmp_path, cli, decoded):
    """A changed byte among the embeddings: with --redo, or when the study is touched anyway."""
    out = tmp_path / "out"
    shutil.rmtree(source / "B")
    assert cli(source, "--out", out, *OPTIONS, main=extract.main)[0] == 0
    good = (out / "A_1.hdf5").read_bytes()
    with h5py.File(out / "A_1.hdf5") as f:
        at = f["embeddings"].id.get_offset()
        first = f["embeddings"][:]
    for touch in (("--redo",), ()):
        (out / "A_1.hdf5").write_bytes(good[: at + 7] + b"\x99" + good[at + 8 :])
        if not touch:
            shutil.copy(source / "A_1" / "x.dcm", source / "A_1" / "z.dcm")
        decoded.clear()
        status, text, _ = cli(source, "--out", out, *OPTIONS, *touch, main=extract.main)
        assert status == 0 and "1 studies extracted" in text
        assert len(decoded) == (3 if touch else 4)
        with h5py.File(out / "A_1.hdf5") as f:
            assert relative_error(f["embeddings"][:3], first) < 1e-5


def test_what_may_pass_is_tried_again(source, tmp_path, cli, decoded, monkeypatch):
    """A decoder that dies, then works; a still image is not looked at again."""
    out, dies = tmp_path / "out", {"y.dcm", "real.dcm"}
    work = extract.DecoderProcess.__call__

    def die(self, function, path, how):
        if path.name in dies:
            decoded.append(path.name)
            return video.NotNow("transfer syntax X needs a plugin"), 0.0
        return work(self, function, path, how)

    monkeypatch.setattr(extract.DecoderProcess, "__call__", die)

    def run():
        decoded.clear()
        status, text, _ = cli(source, "--out", out, *OPTIONS, main=extract.main)
        return status, sorted(decoded), text

    status, _, text = run()
    assert status == 0 and "1 studies without a usable video: B" in text
    status, names, text = run()
    assert names == ["real.dcm", "y.dcm"] and "0 studies extracted, 1 already there" in text
    assert "A_1/series/y.dcm: transfer syntax X needs a plugin" in text
    dies.clear()
    status, names, text = run()
    assert names == ["real.dcm", "y.dcm"] and "2 studies extracted" in text
    assert run()[1] == [] and not list((out / ".empty").glob("*"))
    with h5py.File(out / "A_1.hdf5") as f:
        assert len(f["videos"]) == 3 and len(f["skipped"]) == 0


def test_a_file_that_changes_while_it_is_read(source, tmp_path, cli, monkeypatch):
    work = extract.DecoderProcess.__call__

    def change(self, function, path, how):
        reply = work(self, function, path, how)
        if path.name == "x.dcm":
            os.utime(path, (1, 1))
        return reply

    monkeypatch.setattr(extract.DecoderProcess, "__call__", change)
    status, text, _ = cli(source, "--out", tmp_path / "o", *OPTIONS, main=extract.main)
    assert status == 0 and "A_1/x.dcm: it changed while it was read" in text
    monkeypatch.undo()
    status, text, _ = cli(source, "--out", tmp_path / "o", *OPTIONS, main=extract.main)
    assert status == 0 and "1 studies extracted, 1 already there" in text


def test_a_folder_of_an_earlier_version_goes_on(source, tmp_path, cli):
    """Its files know no stamps and no way of drawing the starts: the independent one."""
    options = (*OPTIONS, "--starts", "independent")
    assert cli(source, "--out", tmp_path / "o", *options, main=extract.main)[0] == 0
    for path in (tmp_path / "o").glob("*.hdf5"):
        with h5py.File(path, "r+") as f:
            del f["files"]
            for name in ("starts", "attributes_crc32", "records_crc32"):
                del f.attrs[name]
    status, text, _ = cli(source, "--out", tmp_path / "o", *options, main=extract.main)
    assert status == 0 and "0 studies extracted, 2 already there" in text
    status, _, error = cli(source, "--out", tmp_path / "o", *OPTIONS, main=extract.main)
    assert status == 1 and "starts = independent, not modulo" in error


def test_a_vanished_source_costs_only_its_study(source, tmp_path, cli, monkeypatch):
    """The mount goes while the run is under way: what is done stays, nothing is half-done."""
    begin = extract.Run.begin

    def begin_and_lose(run, study, bar):
        if study.name == "B":
            shutil.rmtree(source)
        yield from begin(run, study, bar)

    monkeypatch.setattr(extract.Run, "begin", begin_and_lose)
    options = (*OPTIONS, "--workers", "1")
    shutil.copytree(source, tmp_path / "copy")
    status, _, error = cli(source, "--out", tmp_path / "out", *options, main=extract.main)
    assert status == 1 and "cannot be reached any more" in error
    assert not (tmp_path / "out" / "B.hdf5").exists()
    monkeypatch.undo()
    shutil.copytree(tmp_path / "copy", source)
    assert cli(source, "--out", tmp_path / "out", *options, main=extract.main)[0] == 0
    with h5py.File(tmp_path / "out" / "B.hdf5") as f:
        assert f["videos"].asstr()[:].tolist() == ["real.dcm"]


@pytest.mark.slow
def test_a_full_disk_is_one_line(source, tmp_path):
    """The system refuses files beyond 5 KiB; once it does not, the same command goes on."""
    out = tmp_path / "out"
    line = [sys.executable, ROOT / "embed" / "extract.py", source, "--out", out, *OPTIONS]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 1024, resource.RLIM_INFINITY))

    done = subprocess.run(line, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "A_1.hdf5: " in done.stderr and "File too large" in done.stderr
    assert "goes on from here" in done.stderr
    assert not list(out.glob("*.hdf5")) and not list(out.glob(".*tmp*"))
    assert subprocess.run(line, capture_output=True).returncode == 0
    assert len(read_log(out)) == 6


@pytest.mark.slow
def test_augmented_copies_and_precision(source, tmp_path, cli):
    options = (*OPTIONS, "--augment", "2")
    assert cli(source / "B", "--out", tmp_path / "a", *options, main=extract.main)[0] == 0
    assert cli(source / "B", "--out", tmp_path / "b", *OPTIONS, main=extract.main)[0] == 0
    half = (*OPTIONS, "--precision", "bf16")
    assert cli(source / "B", "--out", tmp_path / "c", *half, main=extract.main)[0] == 0
    with (
        h5py.File(tmp_path / "a/B.hdf5") as a,
        h5py.File(tmp_path / "b/B.hdf5") as b,
        h5py.File(tmp_path / "c/B.hdf5") as c,
    ):
        assert a["augmented"].shape == (2, 1, 3, 768)
        assert relative_error(a["embeddings"], b["embeddings"][:]) < 1e-5
        assert np.isfinite(a["augmented"][:]).all()
        assert relative_error(a["augmented"][0], b["embeddings"][:]) > 1e-3
        assert c.attrs["precision"] == "bf16"
        assert 1e-6 < relative_error(c["embeddings"], b["embeddings"][:]) < 0.05


def test_nothing_identifying_in_any_output(tmp_path, cli):
    """Names and ids planted in a DICOM's tags reach neither the files nor the screen."""
    folder = tmp_path / "in" / "S1"
    folder.mkdir(parents=True)
    secrets = ("DOE^JANE", "MRN-4711", "19700101")
    tags = dict(PatientName=secrets[0], PatientID=secrets[1], PatientBirthDate=secrets[2])
    write_dicom(folder / "a.dcm", moving_square()[..., ::-1].copy(), "RGB", **tags)
    write_dicom(folder / "b.dcm", moving_square()[..., ::-1].copy(), "ODD", **tags)
    status, text, error = cli(
        tmp_path / "in", "--out", tmp_path / "out", *OPTIONS, main=extract.main
    )
    assert status == 0
    written = b"".join(p.read_bytes() for p in (tmp_path / "out").iterdir())
    for secret in (*secrets, str(tmp_path / "in")):
        assert secret.encode() not in written and secret not in text + error


def test_a_damaged_log_is_made_anew(source, tmp_path, cli):
    """Bytes that are no text, a cell that never ends: what can be read stays, once a video."""
    out = tmp_path / "out"
    (source / "A_1" / "=1+1.dcm").write_bytes((source / "A_1" / "x.dcm").read_bytes())
    assert cli(source, "--out", out, *OPTIONS, main=extract.main)[0] == 0
    log = out / "extract_log.csv"
    assert "\nA_1,'=1+1.dcm," in log.read_text()  # nothing that a spreadsheet would run
    log.write_bytes(log.read_bytes() + b'B,"caf\xe9\0\r,x\nC\xff')
    (source / "A_1" / "x.dcm").unlink()
    assert cli(source, "--out", out, *OPTIONS, main=extract.main)[0] == 0
    rows = [(r["study"], r["video"]) for r in read_log(out)]
    assert len(rows) == len(set(rows)) == 6 and ("A_1", "'=1+1.dcm") in rows
