"""The documentation: its commands run, its configs are valid, and its tables name all columns.

Each page's blocks run one after the other, in a folder that all pages share. A comment before a
block says what happens: `not run: reason`, `run:NAME` (another test runs it), `config of the
examples`, `file: NAME` (the block is written to this file). Downloads are copied from generated
files. Of commands that do not run, the options are checked.
"""

import ast
import contextlib
import csv
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import h5py
import pytest
import torch
from helpers import ROOT

import echofocus
from echofocus_core.base import releases
from echofocus_core.base.options import Settings, add_options, validate_as
from echofocus_core.encoder.settings import COMMAND, EncoderSettings, resolve_settings
from echofocus_core.study.config import read_config
from echofocus_core.video import extract, panecho
from echofocus_core.video.store import MADE_WITH

sys.path.append(str(ROOT / "docs" / "tutorials"))
import practice

pytestmark = pytest.mark.xdist_group("docs")
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))]
PAGES.remove("docs/python.md")  # tests/test_library.py runs it
BLOCK = re.compile(
    r"(?:^<!-- (?P<comment>[^>]*) -->\n+)?^```(?P<language>\w+)\n(?P<text>.*?)^```", re.S | re.M
)
NOT_RUN = ("not run: ", "run:")
FEW = {"epoch_lim": 1}  # settings of the example's task


def blocks(page):
    """(comment, language, text) of each code block of a page."""
    return [
        (m["comment"] or "", m["language"], m["text"])
        for m in BLOCK.finditer((ROOT / page).read_text())
    ]


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """A folder with the files that the pages name, and a model of the task `chd`."""
    folder = tmp_path_factory.mktemp("docs")
    with contextlib.chdir(folder):
        (text,) = (t for c, _, t in blocks("docs/configure.md") if c == "config of the examples")
        config = json.loads(text)
        config["task"]["chd"]["settings"] = FEW
        Path("config.json").write_text(json.dumps(config))
        table, other = practice.draw_labels(40), practice.draw_labels(12, first=200100)
        Path("labels").mkdir()
        table.to_csv("labels/chd.csv", index=False)
        other.to_csv("labels/outside.csv", index=False)
        for name in ("emb/panecho", "emb/panecho_shadow"):
            practice.write_embeddings(name, table)
        practice.write_embeddings("emb/echoprime", table, width=512)
        practice.write_embeddings("embeddings/published", table[3:4], layout="published")
        practice.write_exams("videos", ["100901", "100902"], views=1)
        practice.write_exams("exams", table["eid"][:10], views=1)
        practice.write_exams("visits", ["visit_1"], views=1)
        practice.write_echonet("EchoNet-Dynamic", 10)
        practice.write_stand_in("EchoFocus_CHD.zip")
        table[["eid", "ASD", "VSD_ADJ"]].assign(ASD=0.4, VSD_ADJ=0.6).to_csv(
            "theirs.csv", index=False
        )
        torch.save({"weights": panecho.random_weights()}, "panecho.pt")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(releases, "fetch", fetch)
            for name in ("EchoFocus_CHD", "PanEcho"):
                echofocus.main(["download", name])
        extract.main(["videos", "--out", "embeddings/bch_internal"])
        with h5py.File("embeddings/bch_internal/100901.hdf5") as f:
            settings = {name: f.attrs[name] for name in MADE_WITH if name in f.attrs}
        practice.write_embeddings("embeddings/bch_internal", table, settings=settings)
        practice.write_embeddings("embeddings/outside", other, settings=settings)
        echofocus.main(["train", "--task", "chd"])
    return folder


def fetch(url, path):
    """Instead of a download: the generated file with this name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(url.rpartition("/")[2], path)


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """A folder with videos, embeddings and labels, as a new user has: no config and no model."""
    folder = tmp_path_factory.mktemp("readme")
    with contextlib.chdir(folder):
        table = practice.draw_labels(24)
        table.to_csv("labels.csv", index=False)
        practice.write_embeddings("embeddings", table)
        practice.write_exams("visits", ["visit_1"], views=1)
        practice.write_stand_in("EchoFocus_CHD.zip")
        Path("hub/checkpoints").mkdir(parents=True)
        torch.save({"weights": panecho.random_weights()}, "hub/checkpoints/panecho.pt")
    return folder


@pytest.fixture(scope="module")
def finished():
    """The lines that have run."""
    return set()


@pytest.mark.docs
@pytest.mark.parametrize("page", PAGES)
def test_page(page, request, finished, monkeypatch, weights_drawn_once):
    folder = request.getfixturevalue("newcomer" if page == "README.md" else "hospital")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(releases, "fetch", fetch)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder / "hub"))
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    for comment, language, text in blocks(page):
        if comment.startswith("file: "):
            Path(comment.removeprefix("file: ")).write_text(text)
        elif language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    run_command(words, monkeypatch, page, comment.startswith(NOT_RUN), finished)
        elif language == "json":
            check_config(text)
        elif language == "python" and not comment.startswith(NOT_RUN):
            exec(compile(text, page, "exec"), {})
    assert (folder / "config.json").is_file()


def run_command(words, monkeypatch, page, only_options, finished):
    """Run a line such as `python echofocus.py train ...` once; or only check its options."""
    scripts = [
        i for i, word in enumerate(words) if (ROOT / word).is_file() and word.endswith(".py")
    ]
    if not scripts:
        assert only_options, f"{page}: {shlex.join(words)}: not a command of this project"
        return
    script, *rest = words[scripts[0] :]
    if only_options:
        return check_options(script, rest)
    assert words[0] == "python", words
    line = shlex.join(words)
    if (Path.cwd(), line) in finished or Path("trained_models", rest[-1]).is_dir():
        return  # the folder has the results already
    finished.add((Path.cwd(), line))
    kept = rest[:1] == ["init"] and Path("config.json").is_file()
    if kept:  # init refuses to replace a config
        Path("config.json").rename("config.kept")
    monkeypatch.setattr(sys, "argv", [script, *rest])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, f"{page}: {line}"
    if kept:
        Path("config.kept").replace("config.json")


def check_options(script, words):
    if script == "echofocus.py":
        validate_as(
            Settings,
            {
                k: v
                for k, v in vars(echofocus.build_parser().parse_args(words)).items()
                if k != "command"
            },
        )
        return
    parser = echofocus.Parser()
    kind, command = (
        (EncoderSettings, COMMAND) if script == "embed/train.py" else (Settings, "extract")
    )
    add_options(parser, command, kind)
    if kind is EncoderSettings:
        resolve_settings(vars(parser.parse_args(words)))
    else:
        parser.add_argument("source")
        parser.add_argument("--out")
        parser.parse_args(words)


def check_config(text):
    """A whole config, or an entry of one, is valid."""
    text = text if text.lstrip().startswith("{") else "{" + text + "}"
    values = json.loads(text)
    if not values.keys() & {"task", "dataset"}:
        values = {"task": values}
    path = Path("fragment.json")
    others = {"task": {"t": {"task_labels": ["a"]}}, "dataset": {"d": {"embedding_path": "emb"}}}
    path.write_text(json.dumps(others | values))
    read_config(str(path))


@pytest.mark.docs
def test_every_column_is_documented(hospital):
    """After the pages: docs/outputs.md names each column of each table that they wrote."""
    text = "".join((ROOT / "docs" / name).read_text() for name in ("outputs.md", "compare.md"))
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    documented = {*re.findall(r"`([^`]+)`", text), *Settings.model_fields}
    labels = {"ASD", "VSD_ADJ", *releases.registry()["EchoFocus_CHD"]["labels"], "EF"}
    tables, missing = 0, {}
    for path in (hospital / "trained_models").rglob("*.csv"):
        if path.name == "train_args.csv" or path.parent.name == "PanEcho":
            continue  # options; readings of its own
        tables += 1
        header = path.read_text().partition("\n")[0]
        assert header, path
        for column in next(csv.reader([header])):
            label = max((x for x in labels if column.startswith(x)), key=len, default="")
            plain = f"<label>{column[len(label) :]}" if label else column
            plain = re.sub("^top_video_[0-9]+", "top_video_1", plain)
            plain = re.sub("^val_(?!loss$).*", "val_<metric>", plain)
            if plain not in documented and column not in documented:
                missing.setdefault(path.name, []).append(column)
    assert tables > 5 and not missing


def test_messages_are_those_of_the_program():
    """docs/messages.md quotes texts that the code has; `...` is a value."""
    texts = []
    for path in (ROOT / "echofocus.py", *ROOT.glob("echofocus_core/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (x.value if isinstance(x, ast.Constant) else "..." for x in node.values)
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    code = "\n".join(texts)
    rows = re.findall(r"^\| `([^`]+)`", (ROOT / "docs" / "messages.md").read_text(), re.M)
    parts = [part.strip(" ;") for row in rows for part in row.split("...")]
    assert len(rows) > 20 and [part for part in parts if part not in code] == []


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1200
    prose = re.sub(r"^```.*?^```|^<!--.*?-->|^[|#!].*?$", "", text, flags=re.S | re.M)
    sentences = [x.split() for x in re.split(r"[.:;] |\.\n|\n\n", prose) if x.strip()]
    assert sum(map(len, sentences)) / len(sentences) <= 20
