"""Installed by pip: commands from any folder, `import echofocus`, and no other name on the path."""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from helpers import ROOT, normal, published_model, write_embeddings

pytestmark = pytest.mark.xdist_group("packaging")  # one process: one installation
NOT_SOURCES = (".*", "build", "demo", "*.egg-info", "__pycache__", "embeddings", "config.json")


@pytest.fixture(autouse=True)
def few_draws():
    """As many as the installed program draws, whose tables are compared."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder like site-packages, with EchoFocus installed from its source distribution."""
    folder = tmp_path_factory.mktemp("install")
    tree, site = folder / "tree", folder / "site"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*NOT_SOURCES), symlinks=True)
    build = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    done = run([sys.executable, "-c", build], tree)
    archive = done.stdout.split()[-1]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(site)]
    run([sys.executable, "-m", "pip", "install", *options, archive], folder)
    shutil.rmtree(tree)
    return site


def run(line, cwd, **variables):
    """Run a program as a stranger to this repository would."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_what_is_installed(site):
    names = {p.name for p in site.iterdir() if p.suffix != ".dist-info"}
    assert names - {"__pycache__"} == {"echofocus.py", "echofocus_core", "bin"}
    package = ROOT / "echofocus_core"  # every file of it, templates too
    files = {p.relative_to(ROOT) for p in package.rglob("*") if p.is_file()}
    files = {p for p in files if "__pycache__" not in p.parts}
    assert {p for p in files if not (site / p).is_file()} == set()


def test_commands_from_another_folder(site, tmp_path, monkeypatch, cli):
    assert {p.name for p in (site / "bin").iterdir()} == {"echofocus", "echofocus-extract"}
    echofocus = site / "bin" / "echofocus"
    published_model(tmp_path / "trained_models" / "EchoFocus_CHD", 22)
    write_embeddings(tmp_path / "emb", "s1", normal(0, 2, 3, 768))
    config = {"task": {"t": {"task_labels": ["a"]}}, "dataset": {"d": {"embedding_path": "emb"}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = ["predict", "--model_name", "EchoFocus_CHD", "--out", "p.csv"]
    run([echofocus, *line], tmp_path, PYTHONPATH=str(site))
    monkeypatch.chdir(tmp_path)
    assert cli(*line[:-1], "q.csv")[0] == 0
    pd.testing.assert_frame_equal(pd.read_csv("p.csv"), pd.read_csv("q.csv"))


def test_videos_are_decoded_by_an_installed_worker(site, tmp_path):
    """The decoder is a process of its own, which must find the rooms too."""
    import pydicom

    (tmp_path / "visits" / "a").mkdir(parents=True)
    shutil.copy(pydicom.examples.get_path("ybr_color"), tmp_path / "visits" / "a" / "x.dcm")
    options = ["--weights", "random", "--size", "56", "--n_clips", "2", "--out", "e"]
    line = [site / "bin" / "echofocus-extract", "visits", *options]
    run(line, tmp_path, PYTHONPATH=str(site))
    assert (tmp_path / "e" / "a.hdf5").is_file()


GENERIC = ("common", "embed", "report", "base", "video", "study", "utils", "models")
SNIPPET = """
import sys
before = list(sys.path)
import echofocus
assert sys.path == before
assert "model_name" in echofocus.load.__code__.co_varnames
import common, embed, report, base, video, study, utils, models
assert common.mine == models.mine == 1
print("fine")
"""


def test_import_beside_modules_of_generic_names(site, tmp_path):
    for name in GENERIC:
        (tmp_path / f"{name}.py").write_text("mine = 1\n")
    done = run([sys.executable, "-c", SNIPPET], tmp_path, PYTHONPATH=str(site))
    assert done.stdout == "fine\n"


def test_yaml_files_are_well_formed():
    """CITATION.cff, issue forms and workflows: read by the parsers of others, never by us."""
    files = [ROOT / "CITATION.cff", *ROOT.glob(".github/**/*.yml")]
    read = {path.relative_to(ROOT).as_posix(): yaml.safe_load(path.read_text()) for path in files}
    citation = read.pop("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    workflow = read.pop(".github/workflows/ci.yml")
    (job,) = workflow["jobs"].values()
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
    assert len(read) >= 3
    for name, form in read.items():
        if name.endswith("config.yml"):
            continue
        assert {"name", "description", "body"} <= set(form), name
        ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
        assert len(ids) == len(set(ids)) > 0


@pytest.mark.parametrize("name", ["Dockerfile", "SECURITY.md", "CONTRIBUTING.md", "CITATION.cff"])
def test_public_files_name_no_place_of_ours(name):
    text = (ROOT / name).read_text()
    assert [word for word in ("/work", "shared/", "index-url", "TODO") if word in text] == []


def test_the_image_gets_what_an_installation_needs():
    """The module, the package and the scripts, and no data or model of one's own."""
    first, *taken = [x for x in (ROOT / ".dockerignore").read_text().splitlines() if x[0] != "#"]
    assert first == "*" and {"!echofocus.py", "!echofocus_core", "!embed"} < set(taken)
    assert [x for x in taken if "trained_models" in x] == []
