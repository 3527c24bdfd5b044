"""Models from elsewhere: download, archives, safe reading, use without a config, inspect."""

import functools
import gzip
import http.server
import io
import json
import os
import pickle
import shutil
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT, copy_example, normal, published_model, recorded, write_embeddings

from echofocus_core.base import checkpoints, download, releases
from echofocus_core.base.console import UserError
from echofocus_core.base.files import sha256_file
from echofocus_core.study.config import MODELS, RECIPES
from echofocus_core.study.network import StudyModel
from echofocus_core.video import panecho


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, with files to take models from in ./elsewhere."""
    monkeypatch.chdir(tmp_path)
    Path("elsewhere").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def asset(tmp_path_factory):
    """What a release may look like: a zip of one folder with a checkpoint, tables and more."""
    folder = tmp_path_factory.mktemp("release")
    published_model(folder / "EchoFocus_CHD", 22)
    (folder / "EchoFocus_CHD" / "train_losses.csv").write_text("epochs_trained\n1\n")
    (folder / "EchoFocus_CHD" / "run_me.py").write_text("raise SystemExit")
    (folder / "EchoFocus_CHD" / "source.json").write_text('{"released": "EchoFocus_Measure"}')
    (folder / "EchoFocus_CHD" / ".DS_Store").write_text("x")
    return Path(shutil.make_archive(folder / "EchoFocus_CHD", "zip", folder, "EchoFocus_CHD"))


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves ./elsewhere; can drop connections, ignore ranges, and remembers what was asked."""

    drops, ranges, etag, asked = 0, True, '"1"', []

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if path.name == "moved.zip":
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1/EchoFocus_CHD.zip")
            return self.end_headers()
        if not path.is_file():
            return self.send_error(404)
        body, wanted = path.read_bytes(), self.headers.get("Range")
        Server.asked.append(wanted)
        same = self.headers.get("If-Range", Server.etag) == Server.etag
        start = int(wanted[6:-1]) if wanted and Server.ranges and same else 0
        if start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("ETag", Server.etag)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = len(body)
        if Server.drops:
            Server.drops, end = Server.drops - 1, (start + len(body)) // 2
        self.wfile.write(body[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(here):
    Server.drops, Server.ranges, Server.etag, Server.asked = 0, True, '"1"', []
    handler = functools.partial(Server, directory=str(here / "elsewhere"))
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


def left():
    """What lies in ./trained_models, hidden files too."""
    return sorted(p.name for p in Path("trained_models").glob("*")) if MODELS.exists() else []


def refused(cli, source, message, *options):
    """The source is refused in one line, and nothing stays."""
    status, _, err = cli("download", source, *options)
    assert status == 1 and message in err, err
    errors = [line for line in err.splitlines() if "error:" in line]
    assert len(errors) == 1 and "Traceback" not in err
    assert left() == []


# ---------------------------------------------------------------------------------------- registry


def test_registry_agrees_with_what_is_written_elsewhere(here, cli):
    """One truth: the labels recorded from the published code, the example config, the recipes."""
    registry, labels = releases.registry(), recorded("labels.json")
    example = json.loads((ROOT / "config-example.json").read_text())["task"]
    for name, task in (("EchoFocus_CHD", "chd"), ("EchoFocus_Measure", "measure")):
        expected = [label.strip() for label in labels[task]]
        assert registry[name]["labels"] == expected
        assert [label.strip() for label in example[task]["task_labels"]] == expected
        assert registry[name]["recipe"] == RECIPES[task] and registry[name]["task"] == task
    assert registry["PanEcho"]["url"] == panecho.WEIGHTS_URL
    assert MODELS / "PanEcho" / registry["PanEcho"]["file"] == panecho.DOWNLOADED
    status, out, _ = cli("download", "--list")
    assert status == 0 and out == cli("download")[1]
    for name, entry in registry.items():
        line = next(line for line in out.splitlines() if line.startswith(name))
        assert "not here" in line and entry["licence"] in line and entry["citation"] in line


# ---------------------------------------------------------------------------------------- download


def test_download_resumes_and_records_where_from(server, cli, asset):
    shutil.copy(asset, "elsewhere")
    Server.drops = 1
    url = f"{server}/EchoFocus_CHD.zip?token=secret"
    status, _, err = cli("download", url)
    assert status == 1 and "run the command again to resume" in err and "secret" not in err
    assert all(name.startswith(".") for name in left())
    status, out, err = cli("download", url)
    assert status == 0, err
    size = asset.stat().st_size
    assert Server.asked == [None, f"bytes={size // 2}-"]
    folder = Path("trained_models/EchoFocus_CHD")
    kept = {p.name for p in folder.iterdir()}
    assert kept == {"best_checkpoint.pt", "train_losses.csv", "source.json"} and len(left()) == 1
    assert "run_me.py" in out
    source = json.loads((folder / "source.json").read_text())
    assert source["sha256"] == sha256_file(asset) and not source["sha256_was_known"]
    assert source["from"] == f"{server}/EchoFocus_CHD.zip" and "secret" not in str(source)
    assert source["released"] == "EchoFocus_CHD" and source["licence"] == "CC BY-NC-SA 4.0"
    files = ("best_checkpoint.pt", "train_losses.csv")
    assert source["files"] == {name: sha256_file(folder / name) for name in files}

    status, _, err = cli("download", url)
    assert status == 1 and "trained_models/EchoFocus_CHD exists" in err


@pytest.mark.parametrize("change", ["no ranges", "another file", "nothing beyond"])
def test_resume_never_mixes_two_files(server, cli, asset, change):
    shutil.copy(asset, "elsewhere/a.zip")
    Server.drops = 1
    assert cli("download", f"{server}/a.zip")[0] == 1
    if change == "no ranges":
        Server.ranges = False
    elif change == "nothing beyond":  # a part as long as the file, or longer
        with open(next(MODELS.glob(".*.part")), "ab") as f:
            f.write(bytes(asset.stat().st_size))
    else:  # with another beginning
        Server.etag = '"2"'
        with zipfile.ZipFile(asset) as a, zipfile.ZipFile("elsewhere/a.zip", "w") as b:
            for name in sorted(a.namelist(), reverse=True):
                b.writestr(name, a.read(name))
    status, _, err = cli("download", f"{server}/a.zip")
    assert status == 0, err
    found = json.loads(next(MODELS.glob("*/source.json")).read_text())
    assert found["sha256"] == sha256_file("elsewhere/a.zip")


def test_digest_known_before(server, cli, asset):
    shutil.copy(asset, "elsewhere")
    url, digest = f"{server}/EchoFocus_CHD.zip", sha256_file(asset)
    refused(cli, url, f"its SHA-256 is {digest}, not {'0' * 64}", "--sha256", "0" * 64)
    refused(cli, url, "64 hexadecimal digits", "--sha256", "abc")
    assert cli("download", url, "--sha256", digest.upper())[0] == 0
    assert json.loads(Path("trained_models/EchoFocus_CHD/source.json").read_text())[
        "sha256_was_known"
    ]


def test_what_a_server_may_do(server, cli, asset):
    """Not there, truncated for good, a web page, an address that leads elsewhere, no server."""
    refused(cli, f"{server}/gone.zip", "gone.zip is not there (HTTP 404)")
    refused(cli, f"{server}/moved.zip", "it redirects to ftp://127.0.0.1/EchoFocus_CHD.zip")
    Path("elsewhere/cut.zip").write_bytes(asset.read_bytes()[:-3000])
    refused(cli, f"{server}/cut.zip", "cut.zip cannot be unpacked")
    Path("elsewhere/page.zip").write_text("<!DOCTYPE html><p>Log in")
    refused(cli, f"{server}/page.zip", "it is a web page")
    refused(cli, f"{server.replace('http', 'https')}/a.zip", "fetch it on a machine with a network")
    refused(cli, "http://127.0.0.1:9/a.zip", "download ./a.zip")
    refused(cli, "ftp://127.0.0.1/a.zip", "no http or https address")
    refused(cli, "EchoFocus_CDH", "did you mean EchoFocus_CHD")


@pytest.mark.parametrize("fault", [OSError(37, "No locks available"), None])
def test_several_workers_fetch_once(server, here, monkeypatch, fault):
    """Those that start together wait for one; on a disk without locks each goes on alone."""
    Path("elsewhere/a.pt").write_bytes(bytes(1 << 20))

    def no_lock(path):
        raise fault

    if fault:
        monkeypatch.setattr(download, "lock", no_lock)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: download.fetch(f"{server}/a.pt", here / "x" / "a.pt"), range(4)))
    assert (here / "x" / "a.pt").stat().st_size == 1 << 20
    assert [p.name for p in (here / "x").iterdir()] == ["a.pt"]
    assert len(Server.asked) == 1 or fault


ODD_ADDRESSES = [
    "http://[::1/a.zip",
    "http://h:port/a.zip",
    "http://h:99999/a.zip",
    "http://h/ä.zip",
]
ODD_ADDRESSES += [
    "http://u:secret@h h/a.zip?secret",
    "http://u:secret@127.0.0.1:9/a.zip",
    "https://u:sec?secret@127.0.0.1/a.zip",
    "http://secret@127.0.0.1:9/a@b.zip",
    "https://",
    "http://h/\x1b[2J.zip",
    "file://x",
]


@pytest.mark.parametrize("address", ODD_ADDRESSES)
def test_odd_addresses(here, cli, address):
    status, _, err = cli("download", address)
    assert status == 1 and err.count("\n") == 1 and "secret" not in err, err
    assert err.rstrip().isprintable() and left() == []
    with pytest.raises(UserError):
        panecho.find_weights("http://" + address.partition("//")[2])


def test_a_path_with_an_at_sign_holds_no_user_name():
    assert download.split_url("https://h/m@v1.pt").path == "/m@v1.pt"
    with pytest.raises(UserError, match=r"v 1\.pt is no address"):
        download.split_url("https://h/m@v 1.pt")
    with pytest.raises(UserError, match="user names"):
        download.split_url("https://h:p/w@h/m.pt")


def test_odd_sources(here, cli):
    os.mkfifo("elsewhere/best_checkpoint.pt")
    refused(cli, "elsewhere/best_checkpoint.pt", "is no file or folder")
    refused(cli, "elsewhere", "is a link or device")
    Path("elsewhere", "y" * 200 + ".zip").write_bytes(zip_with("best_checkpoint.pt"))
    refused(cli, "elsewhere/" + "y" * 200 + ".zip", "cannot name a model folder")
    refused(cli, "z" * 5000, "cannot name a model folder")
    refused(cli, "z" * 5000, "File name too long", "--model_name", "z")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", "{", '{"files": 1}', '{"files": {"a": "b"}}']
)
def test_a_record_that_cannot_be_used(here, cli, asset, text):
    assert cli("download", asset)[0] == 0
    path = Path("trained_models/EchoFocus_CHD/source.json")
    for data in (text.encode(), b"\xff" + text.encode(), None):
        path.unlink()
        os.mkfifo(path) if data is None else path.write_bytes(data)  # one waits for ever
        status, _, err = cli("inspect")
        assert status == 1 and err.count("\n") == 1 and "source.json" in err, err
        assert "download the model again" in err


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"a": 1}', '{"a": {"url": "x", "x": 2}}'])
def test_a_registry_that_cannot_be_used(here, cli, monkeypatch, text):
    Path("registry.json").write_text(text)
    monkeypatch.setattr(releases, "REGISTRY", Path("registry.json"))
    refused(cli, "EchoFocus_CHD", "registry.json cannot be used")


# ------------------------------------------------------------------------------------------- forge


class Forge(Server):
    """Answers as a forge's API does; `answers`: path and query -> (status, headers, body)."""

    answers: ClassVar = {}

    def do_GET(self):
        if self.path not in Forge.answers:
            return super().do_GET()
        status, headers, body = Forge.answers[self.path]
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


LIST = "/repos/a/b/releases?per_page=100"


@pytest.fixture
def forge(here, monkeypatch, asset):
    """A forge whose releases are what a test lists; the registry's addresses hold nothing."""
    Forge.answers, Server.drops = {}, 0
    handler = functools.partial(Forge, directory=str(here / "elsewhere"))
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{running.server_port}"
    registry = releases.registry()
    for name in ("EchoFocus_CHD", "EchoFocus_Measure"):
        registry[name] |= {"url": f"{url}/gone.zip", "api": f"{url}/repos/a/b/releases"}
    Path("registry.json").write_text(json.dumps(registry))
    monkeypatch.setattr(releases, "REGISTRY", Path("registry.json"))
    shutil.copy(asset, "elsewhere/chd.zip")
    shutil.unpack_archive(asset, "elsewhere")
    yield url
    running.shutdown()


def release(url, tag, *names, **more):
    """A release as the API shows it, with fields that we do not use. names: asset=file or asset."""
    assets = []
    for name, _, path in (text.partition("=") for text in names):
        address = f"{url}/{path or name}"
        assets.append({"name": name, "browser_download_url": address, "size": 1, "id": 7})
    return {"tag_name": tag, "name": None, "draft": False, "assets": assets, "id": 1} | more


def test_a_release_is_found_by_its_forge(forge, cli, asset):
    """On the second page, behind a moved repository; a draft and a candidate are passed over."""
    other = "EchoFocus_Measure.zip"
    moved, second = f"{forge}/repositories/1/releases", f"{forge}/repositories/1/releases?page=2"
    Forge.answers[LIST] = 301, {"Location": moved}, b""
    Forge.answers["/repositories/1/releases"] = (
        200,
        {"Link": f'<{second}>; rel="next", <{second}>; rel="last"'},
        [
            release(forge, "v4", "EchoFocus-CHD-v4.zip=gone.zip", draft=True),
            release(forge, "v3", "EchoFocus-CHD-v3.zip=gone.zip", prerelease=True),
            release(forge, "v2", other, "notes.pdf", "example_data.zip"),
        ],
    )
    found = release(forge, "v0.1", other, "weights_echofocus-chd.zip=away", "checksums.txt")
    found["assets"][1]["digest"] = f"sha256:{sha256_file(asset)}"
    Forge.answers["/repositories/1/releases?page=2"] = 200, {}, [found]
    Forge.answers["/away"] = 302, {"Location": f"{forge}/chd.zip"}, b""
    status, out, err = cli("download", "EchoFocus_CHD")
    assert status == 0, err
    assert "taking weights_echofocus-chd.zip of release v0.1" in out
    source = json.loads(Path("trained_models/EchoFocus_CHD/source.json").read_text())
    assert source["release"] == "v0.1" and source["from"] == f"{forge}/away"
    assert source["sha256"] == sha256_file(asset) and source["sha256_was_known"]
    assert source["released"] == "EchoFocus_CHD" and left() == ["EchoFocus_CHD"]

    shutil.rmtree("trained_models")
    found["assets"][1]["digest"] = "sha256:" + "0" * 64
    refused(cli, "EchoFocus_CHD", f"SHA-256 is {sha256_file(asset)}, not 0000")


def bundle(path):
    """Both released models in one archive."""
    published_model(Path("both/EchoFocus_Measure"), 18, recorded("measure_norm.json"))
    shutil.copytree("elsewhere/EchoFocus_CHD", "both/EchoFocus_CHD")
    shutil.make_archive(path, "zip", "both")


@pytest.mark.parametrize(
    ("tag", "names"),
    [
        ("echofocus-chd-1.0", ["best_checkpoint.pt", "last_checkpoint.pt", "train_args.csv"]),
        ("v1", ["CHD_best_checkpoint.pt=best_checkpoint.pt", "CHD_train_args.csv=train_args.csv"]),
        ("v1", ["best_checkpoint.pt", "train_args.csv", "EchoFocus_Measure.zip"]),
        ("v1", ["models.zip=both.zip", "EchoFocus.pdf"]),
        ("v1", ["EchoFocus_CHD+Measure.zip=both.zip"]),
    ],
)
def test_loose_files_and_bundles(forge, cli, tag, names):
    for name in ("best_checkpoint.pt", "train_losses.csv"):
        shutil.copy(f"elsewhere/EchoFocus_CHD/{name}", "elsewhere")
    Path("elsewhere/train_args.csv").write_text("task\nchd\n")
    bundle("elsewhere/both")
    measure = release(forge, "echofocus-measure-1.1", "best_checkpoint.pt=gone", "train_args.csv")
    Forge.answers[LIST] = 200, {}, [measure, release(forge, tag, *names)]
    status, _, err = cli("download", "EchoFocus_CHD")
    assert status == 0, err
    files = json.loads(Path("trained_models/EchoFocus_CHD/source.json").read_text())["files"]
    assert files["best_checkpoint.pt"] == sha256_file("elsewhere/best_checkpoint.pt")
    assert ("train_args.csv" in files) == any("train_args" in name for name in names)
    assert left() == ["EchoFocus_CHD"]


def test_several_that_fit_are_listed(forge, cli):
    names = ["EchoFocus_CHD_small.zip=chd.zip", "EchoFocus_CHD_large.zip=chd.zip"]
    Forge.answers[LIST] = 200, {}, [release(forge, "v1", *names)]
    status, _, err = cli("download", "EchoFocus_CHD")
    assert status == 1 and err.count(f"\n  {forge}/chd.zip") == 2 and "name one" in err, err
    assert left() == []
    assert cli("download", f"{forge}/chd.zip", "--model_name", "EchoFocus_CHD")[0] == 0
    source = json.loads(Path("trained_models/EchoFocus_CHD/source.json").read_text())
    assert source["released"] == "EchoFocus_CHD"


RESET = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1900000000"}
ANSWERS = {
    "limit": ((403, RESET, b"{}"), " until "),
    "too many": ((429, {"X-RateLimit-Reset": "soon"}, b""), "rate limit"),
    "not there": ((404, {}, b""), "is not there (HTTP 404)"),
    "broken": ((500, {}, b""), "HTTP 500"),
    "no list": ((200, {}, {"message": "x"}), "cannot be used"),
    "a page": ((200, {}, b"<html>"), "cannot be used"),
    "deep": ((200, {}, b"[" * 100_000), "cannot be used"),
    "not text": ((200, {}, [{"tag_name": "\x1b[2J"}]), "not printable"),
    "empty": ((200, {}, []), "no release holds"),
    "tar": ((200, {}, [release("http://h", "v1", "EchoFocus_CHD.tar.gz")]), "EchoFocus_CHD.tar.gz"),
    "file": ((200, {}, [release("file:///etc", "v1", "chd.zip")]), "an unsafe address"),
    "no address": ((200, {"Link": f'<{LIST}>; rel="next"'}, []), "next page an unsafe address"),
    "elsewhere": ((200, {"Link": '<http://h/x>; rel="next"'}, []), "next page an unsafe address"),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_a_forge_may_answer(forge, cli, answer):
    Forge.answers[LIST], message = ANSWERS[answer]
    refused(cli, "EchoFocus_CHD", message)
    status, _, err = cli("download", "EchoFocus_CHD")
    assert status == 1 and "https://github.com/cavalab/echofocus/releases" in err
    assert "Traceback" not in err and "\x1b" not in err


@pytest.mark.parametrize("form", ["zip", "folder", "file", "url"])
def test_local_sources(here, cli, asset, form):
    """An archive with or without a folder around, a folder, a .pt file of any name."""
    shutil.unpack_archive(asset, "elsewhere")
    folder = here / "elsewhere" / "EchoFocus_CHD"
    source = folder
    if form == "zip":
        source = shutil.make_archive("elsewhere/mine", form, folder)  # './best_checkpoint.pt'
    elif form == "file":
        source = shutil.copy(folder / "best_checkpoint.pt", "elsewhere/some.pt")
    elif form == "url":
        source = Path(shutil.copy(asset, here / "elsewhere")).as_uri()
    status, _, err = cli("download", source, "--model_name", "m")
    assert status == 0, err
    assert left() == ["m"]
    found = sha256_file("trained_models/m/best_checkpoint.pt")
    assert found == sha256_file(folder / "best_checkpoint.pt")
    text = Path("trained_models/m/source.json").read_text()
    assert str(here) not in text and json.loads(text)["released"] is None


def test_panecho_goes_where_extraction_looks(here, cli, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(here / "hub"))
    state = panecho.random_weights()
    torch.save({"weights": state}, "elsewhere/panecho.pt")
    status, _, err = cli("download", "elsewhere/panecho.pt")
    assert status == 0, err
    assert panecho.find_weights() == panecho.DOWNLOADED
    status, out, err = cli("inspect", "PanEcho", "--json", "a.json")
    assert status == 0 and "PanEcho video encoder" in out and "LVWallThickness" in out, err
    about = json.loads(Path("a.json").read_text())
    assert len(about["labels"]) == 40 and "JAMA" in about["source"]["citation"]
    assert about["architecture"]["parameters"] == sum(t.numel() for t in state.values())
    torch.save({"weights": state, "more": 1}, panecho.DOWNLOADED)
    with pytest.raises(panecho.WeightsError, match="has changed since it was downloaded"):
        panecho.find_weights()
    state["EF_head.1.bias"] = torch.tensor([float("nan")])
    torch.save({"weights": state}, "elsewhere/nan.pt")
    status, _, err = cli("download", "elsewhere/nan.pt")
    assert status == 1 and "NaN or infinite weights (EF_head.1.bias)" in err


# ---------------------------------------------------------------------------------------- archives


def zip_with(*names, mode=0o100644, data=b"x"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
    return buffer.getvalue()


def claiming(size):
    """A zip whose directory says that its file is so large."""
    data, real = zip_with("best_checkpoint.pt"), (1).to_bytes(4, "little")
    at = data.rindex(b"PK\x01\x02") + 24
    assert data[at : at + 4] == real
    return data[:at] + size.to_bytes(4, "little") + data[at + 4 :]


ARCHIVES = {
    "parent.zip": (lambda: zip_with("m/../../best_checkpoint.pt"), "leads out of the folder"),
    "absolute.zip": (lambda: zip_with("/tmp/best_checkpoint.pt"), "leads out of the folder"),
    "backslash.zip": (lambda: zip_with("..\\best_checkpoint.pt"), "leads out of the folder"),
    "drive.zip": (lambda: zip_with("C:/best_checkpoint.pt"), "leads out of the folder"),
    "control.zip": (lambda: zip_with("a\x1b[2J/best_checkpoint.pt"), "leads out of the folder"),
    "link.zip": (lambda: zip_with("best_checkpoint.pt", mode=0o120777), "is a link or device"),
    "twice.zip": (lambda: zip_with("a/best_checkpoint.pt", "A/best_checkpoint.pt"), "twice"),
    "several.zip": (lambda: zip_with("a/best_checkpoint.pt", "b/best_checkpoint.pt"), "a, b"),
    "many.zip": (lambda: zip_with(*map(str, range(2000))), "more than 1000 files"),
    "bomb.zip": (lambda: zip_with(*"abc", data=bytes(3 << 20)), "more than"),
    "nothing.zip": (lambda: zip_with("README.md"), "no best_checkpoint.pt (but README.md)"),
    "short.zip": (lambda: claiming(100_000), "cannot be unpacked"),
    "text.zip": (lambda: b"hello", "it is no .zip or .pt file"),
    "empty.zip": (lambda: b"", "it is no .zip or .pt file"),
    "shrunk.zip": (lambda: zip_with("best_checkpoint.pt", data=bytes(7 << 20)), "times its size"),
    "folders.zip": (lambda: zip_with(*(f"{i}/" for i in range(2000))), "more than 1000 files"),
    "folder_of_bytes.zip": (lambda: zip_with("a/", data=bytes(7 << 20)), "times its size"),
    "longer.zip": (lambda: claiming(0), "cannot be unpacked"),
    "long_name.zip": (lambda: zip_with("x" * 60_000 + "\x1b"), "leads out of the folder"),
    "not_utf8.zip": (
        lambda: zip_with("ä/best_checkpoint.pt").replace("ä".encode(), b"\xff\xfe"),
        "cannot be unpacked",
    ),
    "plain.tar": (lambda: bytes(257) + b"ustar\x0000" + bytes(9999), "it is a tar archive; unpack"),
    "packed.tar.gz": (lambda: gzip.compress(b"x"), "it is a tar archive; unpack it, then give"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_are_refused(here, cli, monkeypatch, name):
    make, message = ARCHIVES[name]
    monkeypatch.setattr(checkpoints, "MOST_BYTES", 8 << 20)
    path = Path("elsewhere", name)
    path.write_bytes(make())
    before = sorted(here.rglob("*"))
    refused(cli, path, message)
    assert sorted(here.rglob("*")) == before


class Evil:
    """Writes a file when unpickled."""

    def __reduce__(self):
        return (open, ("ran", "w"))


@functools.cache
def plain_state():
    return dict(StudyModel(3).state_dict())


def good_state(**changes):
    return {"model_state_dict": plain_state() | changes}


def huge(*shape):
    """A tensor that claims a size which its file does not have."""
    return torch.zeros(1).as_strided(shape, (0,) * len(shape))


def own(**changes):
    """A checkpoint in our own format."""
    entry = {"task": "t", "labels": ["a", "b", "c"], "units": {}, "type": "binary"}
    return good_state() | {"echofocus": entry | changes}


CHECKPOINTS = {
    "code": (lambda: good_state() | {"x": Evil()}, "it names io.open"),
    "code in weights": (lambda: {"model_state_dict": Evil()}, "it names io.open"),
    "a class": (lambda: good_state() | {"x": Path("a")}, "it names pathlib"),
    "no dict": (lambda: [1, 2], "no model_state_dict"),
    "weights are a list": (lambda: {"model_state_dict": [1]}, "no model_state_dict"),
    "no head": (lambda: {"model_state_dict": {"a": torch.zeros(1)}}, "no ff.weight"),
    "no names": (lambda: {"model_state_dict": {1: torch.zeros(1)}}, "no ff.weight"),
    "head is text": (lambda: good_state(**{"ff.weight": "x"}), "ff.weight is a str"),
    "head is a number": (lambda: good_state(**{"ff.weight": torch.tensor(1.0)}), "ff.weight is ()"),
    "nested": (lambda: good_state(**{"ff.bias": {"a": torch.zeros(3)}}), "ff.bias is a dict"),
    "huge head": (lambda: good_state(**{"ff.weight": huge(10**12, 768)}), "ff.weight is (10000"),
    "huge part": (lambda: good_state(**{"ff.bias": huge(10**12)}), "ff.bias is (10000"),
    "integers": (
        lambda: good_state(**{"ff.bias": torch.zeros(3, dtype=torch.int64)}),
        "ff.bias is a tensor of torch.int64",
    ),
    "complex": (
        lambda: good_state(**{"ff.bias": torch.zeros(3, dtype=torch.complex64)}),
        "ff.bias is a tensor of torch.complex64",
    ),
    "sparse": (lambda: good_state(**{"ff.bias": torch.zeros(3).to_sparse()}), "_rebuild_sparse_"),
    "many layers": (
        lambda: good_state(**{f"encoder.layers.{i}.x": torch.zeros(1) for i in range(200)}),
        "200 layers",
    ),
    "odd layer": (
        lambda: good_state(**{"encoder.layers.\x1b[2J.x": torch.zeros(1)}),
        "does not fit an EchoFocus model",
    ),
    "NaN": (lambda: good_state(**{"ff.bias": torch.full((3,), np.nan)}), "NaN or infinite weights"),
    "too few labels": (lambda: own(labels=["a"]), "3 outputs and names 1 labels"),
    "labels are numbers": (lambda: own(labels=["a", "b", 3]), "'item 3' must be text"),
    "labels steer the terminal": (lambda: own(labels=["a", "b", "\x1b[2J"]), "cannot be printed"),
    "task is a path": (lambda: own(task="../../x"), "is no name"),
    "record is a list": (lambda: own() | {"echofocus": [1]}, "'echofocus' entry is a list"),
    "no units": (lambda: own(units=[1]), "'units' must be an object, not [1]"),
    "odd pooling": (lambda: own(tf_combine="median"), "'tf_combine' must be 'avg' or 'max'"),
    "regression without scaling": (lambda: own(type="regression"), "without label scaling"),
    "scaling lacks a label": (
        lambda: own(type="regression") | {"input_norm_dict": {"a": {}}},
        "no finite number 'shift'",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints_that_are_refused(here, cli, case):
    """In a folder of ours and in an archive: one line, nothing run, nothing left."""
    make, message = CHECKPOINTS[case]
    folder = Path("trained_models/bad")
    folder.mkdir(parents=True)
    torch.save(make(), folder / "best_checkpoint.pt")
    write_embeddings(here / "emb", "s", normal(0, 1, 2, 768))
    config = {"task": {"t": {"task_labels": ["a", "b", "c"]}}}
    config["dataset"] = {"x": {"embedding_path": "emb"}}
    Path("config.json").write_text(json.dumps(config))
    status, _, err = cli("predict", "--model_name", "bad")
    assert status == 1 and message in err and err.count("\n") == 1, err
    assert err.rstrip().isprintable()
    archive = shutil.make_archive("elsewhere/bad", "zip", folder)
    shutil.rmtree("trained_models")
    if case not in ("too few labels", "regression without scaling", "scaling lacks a label"):
        refused(cli, archive, message)
    assert not Path("ran").exists()


def test_bare_pickles_and_compressed_checkpoints(here, cli):
    Path("elsewhere/pickle.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    refused(cli, "elsewhere/pickle.pt", "cannot be read safely")
    assert not Path("ran").exists()
    torch.save(good_state(), "elsewhere/plain.pt")
    with (
        zipfile.ZipFile("elsewhere/plain.pt") as a,
        zipfile.ZipFile("elsewhere/small.pt", "w", zipfile.ZIP_DEFLATED) as b,
    ):
        for info in a.infolist():
            b.writestr(info.filename, a.read(info) + bytes(1 << 20))
    refused(cli, "elsewhere/small.pt", "its records are compressed")


def test_a_released_model_with_other_outputs_is_refused(here, cli):
    published_model(here / "elsewhere" / "EchoFocus_CHD", 5)
    refused(cli, "elsewhere/EchoFocus_CHD", "has 5 outputs, not 22")


# --------------------------------------------------------------------------------------------- use


def test_new_user_needs_no_config(here, cli, asset):
    """In an empty folder: one line to get a released model, one from three visits to answers."""
    for i, visit in enumerate(("a", "b", "c")):
        Path("visits", visit).mkdir(parents=True)
        copy_example(f"visits/{visit}/cine.dcm", study=f"1.{i}")
    options = ("--weights", "random", "--size", "56", "--n_clips", "2")
    line = ("predict", "--model_name", "EchoFocus_CHD", "--videos", "visits", *options)
    status, _, err = cli(*line)
    assert status == 1 and "python echofocus.py download EchoFocus_CHD" in err
    assert cli("download", asset)[0] == 0
    status, out, err = cli(*line)
    assert status == 0, err
    assert "task chd of the registry" in out
    (path,) = Path("trained_models/EchoFocus_CHD").glob("predictions_visits_*.csv")
    table = pd.read_csv(path).set_index("eid")
    assert list(table.index) == ["a", "b", "c"]
    assert list(table)[2:-1:3] == [label.strip() for label in recorded("labels.json")["chd"]]
    assert table.iloc[:, 2:-1].stack().between(0, 1).all()
    status, _, err = cli(
        "predict", "--task", "chd", "--videos", "visits", *options, "--out", "p.csv"
    )
    assert status == 0, err
    pd.testing.assert_frame_equal(pd.read_csv("p.csv").set_index("eid"), table)
    status, _, err = cli("predict", "--task", "measure", "--videos", "visits", *options)
    assert status == 1 and "download EchoFocus_Measure" in err
    status, _, err = cli("evaluate", "--model_name", "EchoFocus_CHD")
    assert status == 1 and "no config config.json; copy config-example.json" in err


def test_a_changed_checkpoint_is_refused(here, cli, asset):
    assert cli("download", asset)[0] == 0
    path = Path("trained_models/EchoFocus_CHD/best_checkpoint.pt")
    recorded_digest = sha256_file(path)
    published_model(here / "other", 22, numpy_1=True)
    shutil.copy(here / "other" / "best_checkpoint.pt", path)
    for command in (["predict", "--videos", "elsewhere"], ["inspect"]):
        Path("elsewhere/x.avi").touch()
        status, _, err = cli(*command)
        assert status == 1 and err.count("\n") == 1, err
        assert recorded_digest in err and sha256_file(path) in err and "download again" in err


def test_task_finds_published_models_by_label_count(cohort, cli):
    """A published checkpoint of one's own does not name its task: the config's label count does."""
    published_model(cohort / "trained_models" / "old", 1)
    published_model(cohort / "trained_models" / "EchoFocus_CHD", 22)
    (cohort / "trained_models" / "broken").mkdir()
    (cohort / "trained_models" / "broken" / "best_checkpoint.pt").write_bytes(b"x")
    status, out, err = cli("predict", "--task", "defect", "--out", "p.csv")
    assert status == 0 and "model_name = old" in out and "passed over broken" in out, err
    assert list(pd.read_csv("p.csv"))[3] == "finding"
    path = "trained_models/old/best_checkpoint.pt"
    assert cli("predict", "--task", "defect", "--model_name", path, "--out", "q.csv")[0] == 0
    assert Path("p.csv").read_text() == Path("q.csv").read_text()
    status, _, err = cli("predict", "--model_name", shutil.copy(path, "some.pt"))
    assert status == 1 and "python echofocus.py download some.pt" in err
    status, _, err = cli("predict", "--model_name", "old")
    assert status == 1 and "fits defect and sizes: name one with --task" in err
    one = ("--sample_limit", "1", "--model_name", "EchoFocus_CHD")
    for command in (["explain", "--explain_tasks", "ASD"], ["embed"]):  # the config has no chd
        status, _, err = cli(*command, *one)
        assert status == 0, err


def test_start_from_a_released_model(cohort, cli):
    """Its heads are known by the registry's labels, whatever the new task is."""
    published_model(cohort / "trained_models" / "EchoFocus_CHD", 22)
    config = json.loads(Path("config.json").read_text())
    config["task"]["defect"]["task_labels"] = ["ASD"]
    Path("config.json").write_text(json.dumps(config))
    pd.read_csv("labels.csv").rename(columns={"finding": "ASD"}).to_csv("labels.csv", index=False)
    line = ("train", "--task", "defect", "--init_from", "EchoFocus_CHD", "--epoch_lim", "1")
    status, out, err = cli(*line)
    assert status == 0 and "1 heads kept, 0 fresh" in out, err


# ----------------------------------------------------------------------------------------- inspect


def test_inspect_a_published_model(here, cli):
    scaling = recorded("measure_norm.json")
    published_model(here / "trained_models" / "EchoFocus_Measure", 18, scaling)
    status, out, err = cli("inspect", "EchoFocus_Measure", "--json", "about.json")
    assert status == 0, err
    about = json.loads(Path("about.json").read_text())
    net = StudyModel(18)
    assert about["architecture"]["encoder_depth"] == 1
    assert about["architecture"]["parameters"] == sum(p.numel() for p in net.parameters())
    assert [row["label"] for row in about["labels"]] == releases.registry()["EchoFocus_Measure"][
        "labels"
    ]
    for row in about["labels"]:
        assert row["stdev"] == pytest.approx(scaling[row["label"]]["stdev"])
    assert about["history"] == {"epochs": 1, "best_validation_loss": 0.6, "best_epoch": 1}
    assert about["type"] == "regression" and "medRxiv" in about["source"]["citation"]
    path = Path("trained_models/EchoFocus_Measure/best_checkpoint.pt")
    assert about["sha256"] == sha256_file(path) and about["files"][path.name] == path.stat().st_size
    for text in ("EF05", "CC BY-NC-SA 4.0", about["sha256"], "best_validation_loss 0.6"):
        assert text in out

    shutil.copy(path, "bare.pt")
    status, out, err = cli("inspect", "bare.pt")
    assert status == 0 and "output 18" in out and "labels_from: nobody" in out, err


def test_inspect_and_share_an_own_model(cohort, cli):
    assert cli("train", "--task", "sizes", "--epoch_lim", "2")[0] == 0
    status, _, err = cli("inspect", "--json", "about.json")
    assert status == 0, err
    about = json.loads(Path("about.json").read_text())
    losses = pd.read_csv("trained_models/sizes/train_losses.csv")
    best = losses.loc[losses["val_loss"].idxmin()]
    assert about["history"]["best_epoch"] == best["epochs_trained"]
    assert about["history"]["best_validation_loss"] == pytest.approx(best["val_loss"], rel=1e-4)
    assert about["labels"][0]["label"] == "size" and about["labels"][0]["unit"] == "cm"
    assert about["settings"]["learning_rate"] == 1e-3 and about["labels_from"] == "its own file"
    record = torch.load("trained_models/sizes/best_checkpoint.pt", weights_only=True)["echofocus"]
    facts = record | record.get("settings", {})
    told = {*about, *about["settings"], *about["architecture"]}
    empty = {key for key, value in facts.items() if value in ("", [], {}, None)}
    elsewhere = {"units", "unlearnt", "thresholds", "seen", "settings"}  # in rows, or counted
    assert {*facts} - empty - elsewhere <= told
    assert about["input"]["norm_mean"] == pytest.approx(facts["input"]["norm_mean"])

    status, _, err = cli("download", "trained_models/sizes", "--model_name", "colleague")
    assert status == 0, err
    assert cli("predict", "--model_name", "sizes", "--out", "a.csv")[0] == 0
    assert cli("predict", "--model_name", "colleague", "--out", "b.csv")[0] == 0
    assert Path("a.csv").read_text() == Path("b.csv").read_text()
    status, _, err = cli("train", "--task", "sizes", "--model_name", "colleague")
    assert status == 1 and "--init_from colleague" in err
