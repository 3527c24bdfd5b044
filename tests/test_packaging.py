"""The package installed by pip in an environment of its own: commands and `import echofocus`."""

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import tomllib
import zipfile

import pandas as pd
import pydicom
import pytest
import test_docs
import yaml
from helpers import ROOT, normal, published_model, write_embeddings

from echofocus_core import __version__

pytestmark = pytest.mark.xdist_group("packaging")  # one process: one installation
NOT_SOURCES = (".*", "build", "demo", "*.egg-info", "__pycache__", "embeddings", "config.json")
GENERIC = ("common", "embed", "report", "base", "video", "study", "utils", "models")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(line, cwd, **variables):
    """Run a program without this repository on its path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the source distribution."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*NOT_SOURCES), symlinks=True)
    build = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    archive = run([sys.executable, "-c", build], tree).split()[-1]
    shutil.rmtree(tree)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    run([sys.executable, "-m", "pip", "wheel", *options, archive], folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory):
    """The bin folder of a new environment with the wheel, and the libraries of this one."""
    env = tmp_path_factory.mktemp("install") / "env"
    run([sys.executable, "-m", "venv", "--without-pip", env], ROOT)
    libraries = "\n".join([*site.getsitepackages(), site.getusersitepackages()])
    next(env.glob("lib/python*/site-packages")).joinpath("libraries.pth").write_text(libraries)
    options = ["--no-deps", "--no-index", "--quiet"]
    pip = [sys.executable, "-m", "pip", "--python", env / "bin" / "python"]
    run([*pip, "install", *options, wheel], env)
    return env / "bin"


def test_files_of_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {x.split("/")[0] for x in names if ".dist-info/" not in x} == {
        "echofocus.py",
        "echofocus_core",
    }
    files = {x.relative_to(ROOT) for x in (ROOT / "echofocus_core").rglob("*") if x.is_file()}
    assert {str(x) for x in files if "__pycache__" not in x.parts} <= names


def test_programs_from_an_empty_folder(programs, tmp_path):
    assert run([programs / "echofocus", "--version"], tmp_path).strip() == __version__
    assert set(PROJECT["scripts"]) <= {path.name for path in programs.iterdir()}
    for name in ("echofocus-train-encoder", "echofocus-export"):  # other tests run the others
        out = run([programs / name, "--help"], tmp_path)
        assert out.lower().startswith(f"usage: {name}")


def test_commands_from_another_folder(programs, tmp_path, monkeypatch, cli):
    published_model(tmp_path / "trained_models" / "EchoFocus_CHD", 22)
    write_embeddings(tmp_path / "emb", "s1", normal(0, 2, 3, 768))
    out = run([programs / "echofocus", "init"], tmp_path)
    assert out.splitlines()[-1].startswith("next: echofocus download")
    line = ["predict", "--model_name", "EchoFocus_CHD", "--out", "p.csv"]
    run([programs / "echofocus", *line], tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli(*line[:-1], "q.csv")[0] == 0
    pd.testing.assert_frame_equal(pd.read_csv("p.csv"), pd.read_csv("q.csv"))


def test_extraction_when_installed(programs, tmp_path):
    """The decoder is a separate process, which must find the package too."""
    (tmp_path / "visits" / "a").mkdir(parents=True)
    shutil.copy(pydicom.examples.get_path("ybr_color"), tmp_path / "visits" / "a" / "x.dcm")
    options = ["--weights", "random", "--size", "56", "--n_clips", "2", "--out", "e"]
    run([programs / "echofocus-extract", "visits", *options], tmp_path)
    assert (tmp_path / "e" / "a.hdf5").is_file()


def test_imports_next_to_modules_with_common_names(programs, tmp_path):
    """echofocus and torch.hub use none of the modules that other projects often have."""
    for name in GENERIC:
        (tmp_path / f"{name}.py").write_text("here = 1\n")
    imports = f"import {', '.join(GENERIC)}; assert common.here == models.here == 1"
    code = f"import sys; before = list(sys.path); import echofocus; {imports}"
    code += "; assert sys.path == before and echofocus.load and echofocus.predict"
    run([programs / "python", "-c", code], tmp_path)
    code = f"import torch; {imports}; net = torch.hub.load({str(ROOT)!r}, 'PanEcho', "
    code += "source='local', pretrained=False, image_encoder_only=True); "
    code += "print(tuple(net(torch.zeros(1, 3, 32, 32)).shape))"
    assert run([sys.executable, "-c", code], tmp_path) == "(1, 768)\n"


def test_files_for_other_programs():
    """CITATION.cff, issue forms, workflows and the conda recipe, which this code does not read."""
    for path in ROOT.glob(".github/**/*.yml"):
        assert yaml.safe_load(path.read_text()), path
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    latest = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert latest.groups() == (citation["version"], str(citation["date-released"]))
    recipe = yaml.safe_load((ROOT / "packaging" / "recipe.yaml").read_text())
    assert __version__ == citation["version"] == recipe["context"]["version"]
    scripts = recipe["build"]["python"]["entry_points"]
    assert scripts == [f"{name} = {target}" for name, target in PROJECT["scripts"].items()]
    needs = {x.replace(">=", " >=") for x in PROJECT["dependencies"]}
    other = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
    other |= {"opencv-python-headless": "py-opencv"}
    needs = {" ".join([other.get(x.split()[0], x.split()[0]), x.split()[1]]) for x in needs}
    assert needs == set(recipe["requirements"]["run"][1:])


newcomer = test_docs.newcomer
OF_PIP = {"echofocus.py": "echofocus", "embed/extract.py": "echofocus-extract"}
ELSEWHERE = ("not run: ", "run:demo", "run:test")


@pytest.mark.docs
def test_the_readme_after_pip_install(programs, newcomer):
    """The lines of its quickstarts, in a folder that has only a new user's files."""
    home = {"TORCH_HOME": str(newcomer)}  # which has untrained weights
    lines = {}  # each once
    for comment, language, text in test_docs.blocks("README.md"):
        if language == "python":
            lines[programs / "python", "-c", text] = None
        elif not comment.startswith(ELSEWHERE):
            for line in text.splitlines():
                _, script, *words = shlex.split(line, comments=True)
                if words == ["download", "EchoFocus_CHD"]:  # which needs a network
                    words[1] = "./EchoFocus_CHD.zip"
                lines[programs / OF_PIP[script], *words] = None
    for line in lines:
        run(line, newcomer, **home)
    assert list(newcomer.glob("trained_models/EchoFocus_CHD/predictions_visits*/index.html"))
    assert list(newcomer.glob("trained_models/findings/report_test_*.html"))
