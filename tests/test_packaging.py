"""The package installed by pip: commands from any folder and `import echofocus`."""

import os
import shutil
import subprocess
import sys

import pandas as pd
import pydicom
import pytest
import yaml
from helpers import ROOT, normal, published_model, write_embeddings

pytestmark = pytest.mark.xdist_group("packaging")  # one process: one installation
NOT_SOURCES = (".*", "build", "demo", "*.egg-info", "__pycache__", "embeddings", "config.json")
GENERIC = ("common", "embed", "report", "base", "video", "study", "utils", "models")


def run(line, cwd, **variables):
    """Run a program without this repository on its path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder like site-packages, with EchoFocus installed from its source distribution."""
    folder = tmp_path_factory.mktemp("install")
    tree, site = folder / "tree", folder / "site"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*NOT_SOURCES), symlinks=True)
    build = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    archive = run([sys.executable, "-c", build], tree).split()[-1]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(site)]
    run([sys.executable, "-m", "pip", "install", *options, archive], folder)
    shutil.rmtree(tree)
    return site


def test_installed_files(site):
    names = {p.name for p in site.iterdir() if p.suffix != ".dist-info"}
    assert names - {"__pycache__"} == {"echofocus.py", "echofocus_core", "bin"}
    programs = {"echofocus", *(f"echofocus-{x}" for x in ("extract", "train-encoder", "export"))}
    assert {p.name for p in (site / "bin").iterdir()} == programs
    files = {p.relative_to(ROOT) for p in (ROOT / "echofocus_core").rglob("*") if p.is_file()}
    files = {p for p in files if "__pycache__" not in p.parts}
    assert [p for p in files if not (site / p).is_file()] == []


def test_commands_from_another_folder(site, tmp_path, monkeypatch, cli):
    published_model(tmp_path / "trained_models" / "EchoFocus_CHD", 22)
    write_embeddings(tmp_path / "emb", "s1", normal(0, 2, 3, 768))
    out = run([site / "bin" / "echofocus", "init"], tmp_path, PYTHONPATH=str(site))
    assert out.splitlines()[-1].startswith("next: echofocus download")
    line = ["predict", "--model_name", "EchoFocus_CHD", "--out", "p.csv"]
    run([site / "bin" / "echofocus", *line], tmp_path, PYTHONPATH=str(site))
    monkeypatch.chdir(tmp_path)
    assert cli(*line[:-1], "q.csv")[0] == 0
    pd.testing.assert_frame_equal(pd.read_csv("p.csv"), pd.read_csv("q.csv"))


def test_extraction_when_installed(site, tmp_path):
    """The decoder is a separate process, which must find the package too."""
    (tmp_path / "visits" / "a").mkdir(parents=True)
    shutil.copy(pydicom.examples.get_path("ybr_color"), tmp_path / "visits" / "a" / "x.dcm")
    options = ["--weights", "random", "--size", "56", "--n_clips", "2", "--out", "e"]
    line = [site / "bin" / "echofocus-extract", "visits", *options]
    run(line, tmp_path, PYTHONPATH=str(site))
    assert (tmp_path / "e" / "a.hdf5").is_file()


def test_imports_next_to_modules_with_common_names(site, tmp_path):
    """echofocus and torch.hub use none of the modules that other projects often have."""
    for name in GENERIC:
        (tmp_path / f"{name}.py").write_text("here = 1\n")
    imports = f"import {', '.join(GENERIC)}; assert common.here == models.here == 1"
    code = f"import sys; before = list(sys.path); import echofocus; {imports}"
    code += "; assert sys.path == before and echofocus.load and echofocus.predict"
    run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(site))
    code = f"import torch; {imports}; net = torch.hub.load({str(ROOT)!r}, 'PanEcho', "
    code += "source='local', pretrained=False, image_encoder_only=True); "
    code += "print(tuple(net(torch.zeros(1, 3, 32, 32)).shape))"
    assert run([sys.executable, "-c", code], tmp_path) == "(1, 768)\n"


def test_yaml_files_are_well_formed():
    """Only other programs read CITATION.cff, the issue forms and the workflows."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    for path in ROOT.glob(".github/**/*.yml"):
        assert yaml.safe_load(path.read_text()), path
