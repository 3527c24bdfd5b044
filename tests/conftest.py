"""Fixtures: the command line, a small cohort, trained models, videos to extract."""

import contextlib
import functools
import json
import os
import shutil

# The tests run in one process per core; more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import blank, copy_example, moving_square, write_dicom, write_embeddings

import echofocus
from echofocus_core.base.console import run_main
from echofocus_core.video import panecho


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--docs", action="store_true", help="also run the pages of the documentation")


def pytest_collection_modifyitems(config, items):
    reasons = []
    if not config.getoption("--slow"):
        reasons.append(("slow", "takes minutes: run with --slow"))
    if not config.getoption("--docs"):
        reasons.append(("docs", "the documentation: run with --docs"))
    if not torch.cuda.is_available():
        reasons.append(("gpu", "needs a CUDA device"))
    for item in items:
        for marker, reason in reasons:
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def blank_figures(request, monkeypatch):
    """Draw figures only in tests marked `figures`, which saves 15 % of the time."""
    if "figures" not in request.keywords:
        blank(monkeypatch)


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

    `finding` is 1 if some clips have a pattern; `size` is a measurement encoded in all clips.
    """
    shutil.copytree(one_cohort, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def train_once(one_cohort, tmp_path_factory):
    """train_once(task, *options): the model folder, trained on `cohort` once per command line."""

    @functools.cache
    def train(task, *options):
        folder = tmp_path_factory.mktemp("trained") / "cohort"
        shutil.copytree(one_cohort, folder)
        with contextlib.chdir(folder):
            echofocus.main(["train", "--task", task, *options])
        (model,) = (folder / "trained_models").iterdir()
        return model

    return train


@pytest.fixture
def add_model(cohort, train_once):
    """add_model(task, *options): copy a model of `train_once` into ./trained_models."""

    def add(task, *options):
        model = train_once(task, *options)
        return shutil.copytree(model, cohort / "trained_models" / model.name)

    return add


@pytest.fixture
def trained(cohort, add_model):
    """`cohort` in the current folder, with a model of its task `defect` trained for two epochs."""
    add_model("defect", "--epoch_lim", "2")
    return cohort


@pytest.fixture
def weights_drawn_once(monkeypatch):
    """Draw the untrained encoder's weights once, since they are the same every time."""
    monkeypatch.setattr(panecho, "random_weights", lambda: draw_weights(panecho.CONVNEXT_TINY))


@functools.cache
def draw_weights(blocks, draw=panecho.random_weights):
    return draw()


@pytest.fixture
def source(tmp_path):
    """Two studies: three cines (one nested, one without suffix); a real cine and unusable files."""
    a, b = tmp_path / "videos" / "A_1", tmp_path / "videos" / "B"
    (a / "series").mkdir(parents=True)
    b.mkdir()
    for path, n in ((a / "x.dcm", 17), (a / "series" / "y.dcm", 40), (a / "IM0001", 9)):
        write_dicom(path, moving_square(n)[..., ::-1].copy(), "RGB")
    copy_example(b / "real.dcm")
    copy_example(b / "still.dcm", "rgb_color")
    (b / "notes.dcm").write_text("not a DICOM file")
    (b / "report.txt").write_text("not a video")
    return tmp_path / "videos"


@pytest.fixture(scope="session")
def chromium():
    """The browser for tests of pages; these run in one process, by the mark xdist_group("page")."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if not program:
        pytest.skip("needs chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()
