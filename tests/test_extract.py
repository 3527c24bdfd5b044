"""Extraction against encoding every clip whole, and what a user meets: odd files, restarts."""

import os
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pydicom
import pytest
import torch
from conftest import ROOT, relative_error
from test_video import moving_square, write_dicom

from embed import extract, panecho, video

OPTIONS = ("--weights", "random", "--size", "56", "--n_clips", "3")


@pytest.fixture
def source(tmp_path):
    """Two studies: three cines (one nested, one without ending), and the real one among junk."""
    a, b = tmp_path / "videos" / "A_1", tmp_path / "videos" / "B"
    (a / "series").mkdir(parents=True)
    b.mkdir()
    for path, n in ((a / "x.dcm", 17), (a / "series" / "y.dcm", 40), (a / "IM0001", 9)):
        write_dicom(path, moving_square(n)[..., ::-1].copy(), "RGB")
    shutil.copy(pydicom.examples.get_path("ybr_color"), b / "real.dcm")
    shutil.copy(pydicom.examples.get_path("rgb_color"), b / "still.dcm")
    (b / "notes.dcm").write_text("not a DICOM file")
    (b / "report.txt").write_text("no video at all")
    return tmp_path / "videos"


def whole_clips(path, starts, size):
    """The published way: every clip read, prepared and encoded by itself."""
    model, _ = panecho.load_panecho("random")
    mean, std = (np.array(v, np.float32) for v in (panecho.MEAN, panecho.STD))
    frames = video.read_frames(path)
    out = []
    for start in starts:
        first = max(start - 1, 0)
        clip = [frames[min(first + i, len(frames) - 1)] for i in range(16)]
        clip = np.stack([video.resize_crop(f, size) for f in clip]).astype(np.float32) / 255
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
    assert attributes["weights_sha256"] == panecho.load_panecho("random")[1]
    assert (attributes["clip_len"], attributes["n_clips"], attributes["size"]) == (16, 3, 56)
    assert str(tmp_path) not in str(attributes)

    # Finished studies are left alone; what was made in another way is not mixed in.
    before = (out / "A_1.hdf5").stat().st_mtime_ns
    (out / "B.hdf5").unlink()
    status, text, _ = cli(source, "--out", out, *OPTIONS, main=extract.main)
    assert status == 0 and "1 studies extracted, 1 already there" in text
    assert (out / "A_1.hdf5").stat().st_mtime_ns == before
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


def test_wrong_sources(tmp_path, cli):
    status, _, error = cli(tmp_path, "--out", tmp_path / "o", *OPTIONS, main=extract.main)
    assert status == 1 and "no video or DICOM file" in error
    status, _, error = cli(tmp_path / "x", "--out", tmp_path / "o", main=extract.main)
    assert status == 1 and "is not a folder" in error
    (tmp_path / "mixed" / "study").mkdir(parents=True)
    for path in (tmp_path / "mixed" / "a.avi", tmp_path / "mixed" / "study" / "b.avi"):
        path.write_text("x")
    status, _, error = cli(tmp_path / "mixed", "--out", tmp_path / "o", main=extract.main)
    assert status == 1 and "both study folders and loose videos (a.avi" in error
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.dcm").write_text("no")
    status, text, error = cli(tmp_path / "s", "--out", tmp_path / "o", *OPTIONS, main=extract.main)
    assert status == 1 and "no study" in error and "a.dcm: not a DICOM file" in text
    assert not list((tmp_path / "o").glob("*"))


def test_a_decoder_that_crashes_or_hangs_is_one_file_lost(tmp_path, monkeypatch):
    write_dicom(tmp_path / "a.dcm", moving_square(), "RGB")
    sampling = video.Sampling(n_clips=1, size=56)
    decoder = extract.DecoderProcess()
    try:
        assert isinstance(decoder(tmp_path / "a.dcm", "k", sampling), video.Clips)
        os.kill(decoder.process.pid, signal.SIGKILL)
        reply = decoder(tmp_path / "a.dcm", "k", sampling)
        assert isinstance(reply, video.VideoError) and "crashed" in str(reply)
        assert isinstance(decoder(tmp_path / "a.dcm", "k", sampling), video.Clips)

        os.kill(decoder.process.pid, signal.SIGSTOP)  # as if it hung
        monkeypatch.setattr(extract, "DECODE_SECONDS", 1)
        reply = decoder(tmp_path / "a.dcm", "k", sampling)
        assert isinstance(reply, video.VideoError) and "no result after 1 s" in str(reply)
    finally:
        decoder.close()


def test_killed_run_leaves_no_half_file(source, tmp_path):
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
    assert subprocess.run(line, capture_output=True).returncode == 0
    assert {p.name for p in out.glob("[!.]*.hdf5")} == {"A_1.hdf5", "B.hdf5"}
