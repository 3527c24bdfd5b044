"""What several tests need: recorded numbers, inputs and weights by rule, the command line."""

import base64
import contextlib
import json
import os
import shutil
import sys
import zlib
from pathlib import Path

# Tests run side by side, a core each; threads of their own would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import h5py
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import echofocus  # noqa: E402
from echofocus_core.base.console import run_main  # noqa: E402
from echofocus_core.study import input_check as trust  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"


os.fsync = lambda descriptor: (
    None
)  # what lies on the disk after a crash of the machine is no test's


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    reasons = []
    if not config.getoption("--slow"):
        reasons.append(("slow", "takes minutes: run with --slow"))
    if not torch.cuda.is_available():
        reasons.append(("gpu", "needs a CUDA device"))
    for item in items:
        for marker, reason in reasons:
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


BLANK = base64.b64decode(  # a picture of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


@pytest.fixture(autouse=True)
def blank_figures(request, monkeypatch):
    """Figures are drawn in the tests that look at them (`figures`): all else is quicker."""
    if "figures" not in request.keywords:
        blank(monkeypatch)


def blank(monkeypatch):
    """From here on figures are blank."""
    from matplotlib.figure import Figure

    def save(self, file, **options):
        if hasattr(file, "write"):
            file.write(BLANK)
        else:
            Path(file).write_bytes(BLANK)

    monkeypatch.setattr(Figure, "savefig", save)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """A range is of three resamplings of a study, not 16; files that look at ranges undo this."""
    monkeypatch.setattr("echofocus_core.study.answers.DRAWS", 3)
    monkeypatch.setattr(trust, "DRAWS", 3)


def normal(seed, *shape):
    """The rule for inputs: standard normal numbers, float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rule_weights(shapes):
    """The rule for study-level weights: state-dict name to shape -> name to tensor."""
    state = {}
    for name, shape in shapes.items():
        r = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape))
        w = (r * 0.03).astype(np.float32)
        plus_one = name.endswith(("norm1.weight", "norm2.weight"))
        state[name] = torch.from_numpy(w + np.float32(1) if plus_one else w)
    return state


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


def recorded(name):
    path = FIXTURES / name
    return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)


@pytest.fixture
def cli(capfd):
    """Run a command line as a user does; returns (exit status, standard output, error)."""

    def run(*args, main=echofocus.main):
        status = 0
        try:
            run_main(lambda: main([str(a) for a in args]), "echofocus.py")
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capfd.readouterr()
        return status, out, err

    return run


def copy_example(path, name="ybr_color", study="1.2.9"):
    """One of pydicom's own files: ybr_color is a real cine, rgb_color a still; as of this study."""
    ds = pydicom.dcmread(pydicom.examples.get_path(name))
    ds.StudyInstanceUID, ds.PatientID = study, "P"
    ds.save_as(path)


def write_embeddings(folder, eid, embeddings, layout="ours"):
    """One study's HDF5 file in our layout or the published one (groups spell a path)."""
    folder.mkdir(parents=True, exist_ok=True)
    videos = [f"v{i:02}.avi" for i in range(len(embeddings))]
    if layout == "ours":
        with h5py.File(folder / f"{eid}.hdf5", "w") as f:
            f["embeddings"] = embeddings
            f.create_dataset("videos", data=videos, dtype=h5py.string_dtype())
        return
    with h5py.File(folder / f"{eid}_trim_embed.hdf5", "w") as f:
        for video, array in zip(videos, embeddings, strict=True):
            f[f"lab-share/site/{eid}_trim/{video}/emb"] = array


@pytest.fixture(scope="session")
def one_cohort(tmp_path_factory):
    """The files of `cohort`, written once."""
    folder = tmp_path_factory.mktemp("cohort")
    rng = np.random.default_rng(0)
    pattern, direction = rng.standard_normal((2, 768))
    rows = []
    for i in range(60):
        finding, size = int(rng.random() < 0.5), rng.uniform(2, 8)
        bag = rng.standard_normal((rng.integers(1, 5), 4, 768))
        bag += (size - 5) * direction * 0.5
        bag[0] += 2 * finding * pattern
        rows.append(
            {"pid": f"P{i % 40:03}", "eid": f"{1000 + i}", "finding": finding, "size": size}
        )
        write_embeddings(folder / "emb", rows[-1]["eid"], bag.astype(np.float32))
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    settings = {"learning_rate": 1e-3, "batch_number": 8, "epoch_lim": 4}
    entry = {"label_path": "labels.csv", "settings": settings}
    config = {
        "task": {
            "defect": {"task_labels": ["finding"], **entry},
            "sizes": {"task_labels": ["size"], "units": {"size": "cm"}, **entry},
        },
        "dataset": {"site": {"embedding_path": "emb"}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def cohort(one_cohort, tmp_path, monkeypatch):
    """A small cohort in the current folder: 60 studies of 40 patients, config, labels, embeddings.

    `finding` is 1 where some clips carry a pattern; `size` is a measurement written into all.
    """
    shutil.copytree(one_cohort, tmp_path, dirs_exist_ok=True, copy_function=shutil.copy)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def one_trained(one_cohort, tmp_path_factory):
    """The files of `trained`, made once."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(one_cohort, folder, dirs_exist_ok=True)
    with contextlib.chdir(folder):
        echofocus.main(["train", "--task", "defect", "--epoch_lim", "2"])
    return folder


@pytest.fixture
def trained(one_trained, tmp_path, monkeypatch):
    """`cohort` with a model of its task `defect`, of two epochs, in the current folder."""
    shutil.copytree(one_trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
