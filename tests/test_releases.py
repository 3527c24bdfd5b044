"""Released models: download, archives, safe reading, use without a config, inspect."""

import functools
import http.server
import json
import shutil
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import (
    ROOT,
    copy_example,
    edit_config,
    normal,
    published_model,
    recorded,
    write_embeddings,
)

from echofocus_core.base import releases
from echofocus_core.base.download import fetch
from echofocus_core.base.files import sha256_file
from echofocus_core.study.config import MODELS
from echofocus_core.study.job import RECIPES
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
    """A zip of one folder with a checkpoint, a table and other files."""
    folder = tmp_path_factory.mktemp("release")
    published_model(folder / "EchoFocus_CHD", 22)
    (folder / "EchoFocus_CHD" / "train_losses.csv").write_text("epochs_trained\n1\n")
    (folder / "EchoFocus_CHD" / "run_me.py").write_text("raise SystemExit")
    (folder / "EchoFocus_CHD" / "source.json").write_text('{"released": "EchoFocus_Measure"}')
    (folder / "EchoFocus_CHD" / ".DS_Store").write_text("x")
    return Path(shutil.make_archive(folder / "EchoFocus_CHD", "zip", folder, "EchoFocus_CHD"))


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves ./elsewhere; cut/NAME drops the connection halfway; counts requests."""

    n_requests = 0

    def do_GET(self):
        Server.n_requests += 1
        if not self.path.startswith("/cut/"):
            return super().do_GET()
        body = Path("elsewhere", self.path.removeprefix("/cut/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(here):
    handler = functools.partial(Server, directory=str(here / "elsewhere"))
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


def check_refusal(cli, source, message, *options):
    """Check that the source is refused in one line and that nothing is left in the folder."""
    status, _, err = cli("download", source, *options)
    assert status == 1 and message in err, err
    errors = [line for line in err.splitlines() if "error:" in line]
    assert len(errors) == 1 and "Traceback" not in err
    assert not MODELS.exists() or not list(MODELS.iterdir())


# ---------------------------------------------------------------------------------------- registry


def test_registry_agrees_with_published_labels_example_config_and_recipes(here, cli):
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
    assert all(name in out and entry["licence"] in out for name, entry in registry.items())


# ---------------------------------------------------------------------------------------- download


def test_download_keeps_only_the_files_of_a_model(server, cli, asset):
    shutil.copy(asset, "elsewhere")
    url = f"{server}/EchoFocus_CHD.zip?token=secret"
    status, out, err = cli("download", url)
    assert status == 0 and "run_me.py" in out, err
    folder = Path("trained_models/EchoFocus_CHD")
    kept = {p.name for p in folder.iterdir()}
    assert kept == {"best_checkpoint.pt", "train_losses.csv", "source.json"}
    assert list(MODELS.iterdir()) == [folder]
    source = json.loads((folder / "source.json").read_text())
    assert source["sha256"] == sha256_file(asset) and not source["sha256_was_known"]
    assert source["from"] == f"{server}/EchoFocus_CHD.zip" and "secret" not in str(source)
    assert source["released"] == "EchoFocus_CHD" and "citation" not in source  # any file
    assert source["licence"] == releases.NOT_VERIFIED
    files = ("best_checkpoint.pt", "train_losses.csv")
    assert source["files"] == {name: sha256_file(folder / name) for name in files}
    status, _, err = cli("download", url)
    assert status == 1 and "trained_models/EchoFocus_CHD exists" in err


def edit_registry(monkeypatch, **changes):
    registry = releases.registry()
    registry["EchoFocus_CHD"] |= changes
    Path("registry.json").write_text(json.dumps(registry))
    monkeypatch.setattr(releases, "REGISTRY", Path("registry.json"))


def test_expected_digest(server, cli, asset, monkeypatch):
    """It is given on the command line or in the registry."""
    shutil.copy(asset, "elsewhere")
    url, digest = f"{server}/EchoFocus_CHD.zip", sha256_file(asset)
    check_refusal(cli, url, f"its SHA-256 is {digest}, not {'0' * 64}", "--sha256", "0" * 64)
    edit_registry(monkeypatch, url=url, sha256="1" * 64)
    check_refusal(cli, "EchoFocus_CHD", f"its SHA-256 is {digest}, not {'1' * 64}")
    assert cli("download", url, "--sha256", digest.upper())[0] == 0
    source = json.loads(Path("trained_models/EchoFocus_CHD/source.json").read_text())
    assert source["sha256_was_known"] and source["licence"] == releases.NOT_VERIFIED
    edit_registry(monkeypatch, sha256=digest)
    shutil.rmtree("trained_models/EchoFocus_CHD")
    assert cli("download", url)[0] == 0
    source = json.loads(Path("trained_models/EchoFocus_CHD/source.json").read_text())
    assert source["licence"] == releases.registry()["EchoFocus_CHD"]["licence"]


def test_downloads_that_fail(server, cli, asset, monkeypatch):
    shutil.copy(asset, "elsewhere/a.zip")
    Path("elsewhere/cut.zip").write_bytes(asset.read_bytes()[:-3000])
    Path("elsewhere/page.zip").write_text("<!DOCTYPE html><p>Log in")
    edit_registry(monkeypatch, url=f"{server}/gone.zip")
    for source, message in {
        f"{server}/gone.zip?secret": "gone.zip: HTTP Error 404",
        f"{server}/cut/a.zip": f"of {asset.stat().st_size} bytes",
        f"{server}/cut.zip": "cut.zip",
        f"{server}/page.zip": "page.zip",
        "http://127.0.0.1:9/a.zip": "127.0.0.1:9/a.zip",
        "ftp://127.0.0.1/a.zip": "ftp://",
        "EchoFocus_CDH": "did you mean EchoFocus_CHD",
        "EchoFocus_CHD": "https://github.com/cavalab/echofocus/releases",
    }.items():
        check_refusal(cli, source, message)


def test_several_processes_fetch_once(server, here):
    Path("elsewhere/a.pt").write_bytes(bytes(1 << 20))
    before = Server.n_requests
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: fetch(f"{server}/a.pt", here / "x" / "a.pt"), range(4)))
    assert (here / "x" / "a.pt").stat().st_size == 1 << 20
    assert [p.name for p in (here / "x").iterdir()] == ["a.pt"]
    assert Server.n_requests == before + 1


def test_panecho_is_downloaded_whole_and_its_digest_recorded(server, here, monkeypatch):
    """A file that changes afterwards is refused."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(here))
    Path("elsewhere/p.pt").write_bytes(b"weights" * 1000)
    monkeypatch.setattr(panecho, "WEIGHTS_URL", f"{server}/cut/p.pt")
    with pytest.raises(panecho.WeightsError):
        panecho.find_weights()
    assert not panecho.weights_path().exists()
    monkeypatch.setattr(panecho, "WEIGHTS_URL", f"{server}/p.pt")
    path = panecho.find_weights()
    assert path.read_bytes() == b"weights" * 1000
    assert path.with_name("panecho.pt.sha256").read_text().startswith(sha256_file(path))
    path.write_bytes(b"something else")
    with pytest.raises(panecho.WeightsError, match="has changed"):
        panecho.find_weights()


def test_local_sources(here, cli, asset):
    """The source is an archive without a folder in it, a folder, or a .pt file of any name."""
    shutil.unpack_archive(asset, "elsewhere")
    folder = here / "elsewhere" / "EchoFocus_CHD"
    archive = shutil.make_archive("elsewhere/mine", "zip", folder)  # './best_checkpoint.pt'
    file = shutil.copy(folder / "best_checkpoint.pt", "elsewhere/some.pt")
    for i, source in enumerate((archive, folder, file)):
        status, _, err = cli("download", source, "--model_name", f"m{i}")
        assert status == 0, err
        assert sha256_file(f"trained_models/m{i}/best_checkpoint.pt") == sha256_file(file)
        text = Path(f"trained_models/m{i}/source.json").read_text()
        assert str(here) not in text and json.loads(text)["released"] is None
    assert len(list(MODELS.iterdir())) == 3


def test_extraction_uses_the_downloaded_panecho(here, cli, monkeypatch, weights_drawn_once):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(here / "hub"))
    state = panecho.random_weights()
    torch.save({"weights": state}, "elsewhere/panecho.pt")
    status, _, err = cli("download", "elsewhere/panecho.pt")
    assert status == 0, err
    assert panecho.find_weights() == panecho.DOWNLOADED
    status, out, err = cli("inspect", "PanEcho", "--json", "a.json")
    assert status == 0 and "LVWallThickness" in out, err
    description = json.loads(Path("a.json").read_text())
    assert len(description["labels"]) == 40
    assert description["source"]["licence"] == releases.NOT_VERIFIED  # random weights
    assert description["architecture"]["parameters"] == sum(t.numel() for t in state.values())
    nan = {"EF_head.1.bias": torch.tensor([float("nan")])}
    torch.save({"weights": state | nan}, "elsewhere/nan.pt")
    status, _, err = cli("download", "elsewhere/nan.pt")
    assert status == 1 and "not finite (EF_head.1.bias)" in err


# ---------------------------------------------------------------------------------------- archives


def test_an_archive_of_several_models(here, cli, asset):
    shutil.unpack_archive(asset, "both")
    published_model(Path("both/EchoFocus_Measure"), 18, recorded("measure_norm.json"))
    path = shutil.make_archive("elsewhere/both", "zip", "both")
    check_refusal(cli, path, "EchoFocus_CHD, EchoFocus_Measure")
    assert cli("download", path, "--model_name", "EchoFocus_CHD")[0] == 0
    digest = sha256_file("both/EchoFocus_CHD/best_checkpoint.pt")
    assert sha256_file("trained_models/EchoFocus_CHD/best_checkpoint.pt") == digest


def test_archives_write_only_into_the_model_folder(here, cli):
    path = Path("elsewhere/a.zip")
    for name, mode in {
        "m/../../best_checkpoint.pt": 0o100644,
        "/tmp/best_checkpoint.pt": 0o100644,
        "best_checkpoint.pt": 0o120777,  # a link
        "README.md": 0o100644,
    }.items():
        with zipfile.ZipFile(path, "w") as archive:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, b"x")
        check_refusal(cli, path, "a.zip")
    path.write_bytes(b"hello")
    check_refusal(cli, path, "a.zip")
    assert sorted(p.name for p in here.iterdir()) == ["elsewhere", "trained_models"]


def checkpoint(weights=(), **changes):
    """A checkpoint in the format of this program."""
    entry = {"format": 1, "task": "t", "labels": ["a", "b", "c"], "units": {}, "type": "binary"}
    state = StudyModel(3).state_dict() | dict(weights)
    return {"model_state_dict": state, "echofocus": entry | changes}


CHECKPOINTS = {
    "no head": (lambda: {"model_state_dict": {"a": torch.zeros(1)}}, "no ff.weight"),
    "NaN": (lambda: checkpoint({"ff.bias": torch.full((3,), np.nan)}), "not finite"),
    "too few labels": (lambda: checkpoint(labels=["a"]), "ff.weight is (3, 768), not (1, 768)"),
    "regression without scaling": (lambda: checkpoint(type="regression"), "without label scaling"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints_that_are_refused(here, cli, case):
    """A model folder or an archive gives one line and leaves no file."""
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
    archive = shutil.make_archive("elsewhere/bad", "zip", folder)
    shutil.rmtree("trained_models")
    if case not in ("too few labels", "regression without scaling"):
        check_refusal(cli, archive, message)


def test_a_released_model_with_other_outputs_is_refused(here, cli):
    published_model(here / "elsewhere" / "EchoFocus_CHD", 5)
    check_refusal(cli, "elsewhere/EchoFocus_CHD", "has 5 outputs, not 22")


# --------------------------------------------------------------------------------------------- use


def test_predictions_without_a_config(here, cli, asset, weights_drawn_once):
    """Two commands in an empty folder are enough: download a model, then predict two visits."""
    for i, visit in enumerate("ab"):
        Path("visits", visit).mkdir(parents=True)
        copy_example(f"visits/{visit}/cine.dcm", study=f"1.{i}")
    options = ("--weights", "random", "--size", "56", "--n_clips", "2")
    line = ("predict", "--model_name", "EchoFocus_CHD", "--videos", "visits", *options)
    status, _, err = cli(*line)
    assert status == 1 and "python echofocus.py download EchoFocus_CHD" in err
    assert cli("download", asset)[0] == 0
    status, _, err = cli(*line)
    assert status == 0, err
    (path,) = Path("trained_models/EchoFocus_CHD").glob("predictions_visits_*.csv")
    table = pd.read_csv(path).set_index("eid")
    assert list(table.index) == ["a", "b"]
    assert list(table)[2:-1] == [label.strip() for label in recorded("labels.json")["chd"]]
    assert table.iloc[:, 2:-1].stack().between(0, 1).all()
    status, _, err = cli(
        "predict", "--task", "chd", "--videos", "visits", *options, "--out", "p.csv"
    )
    assert status == 0, err
    pd.testing.assert_frame_equal(pd.read_csv("p.csv").set_index("eid"), table)
    status, _, err = cli("evaluate", "--model_name", "EchoFocus_CHD")
    assert status == 1 and "config.json" in err


def test_a_changed_checkpoint_is_refused(here, cli, asset):
    assert cli("download", asset)[0] == 0
    path = Path("trained_models/EchoFocus_CHD/best_checkpoint.pt")
    recorded_digest = sha256_file(path)
    published_model(here / "other", 22, numpy_1=True)
    shutil.copy(here / "other" / "best_checkpoint.pt", path)
    Path("elsewhere/x.avi").touch()
    for command in (["predict", "--videos", "elsewhere"], ["inspect"]):
        status, _, err = cli(*command)
        assert status == 1 and err.count("\n") == 1, err
        assert recorded_digest in err and sha256_file(path) in err


def test_task_finds_published_models_by_label_count(cohort, cli):
    """A checkpoint of the published code has no task name; its number of labels decides."""
    published_model(cohort / "trained_models" / "old", 1)
    published_model(cohort / "trained_models" / "EchoFocus_CHD", 22)
    (cohort / "trained_models" / "broken").mkdir()
    (cohort / "trained_models" / "broken" / "best_checkpoint.pt").write_bytes(b"x")
    few = ("--task", "defect", "--sample_limit", "4")
    status, out, err = cli("predict", *few, "--out", "p.csv")
    assert status == 0 and "model_name = old" in out and "skipped broken" in out, err
    assert list(pd.read_csv("p.csv"))[3] == "finding"
    path = "trained_models/old/best_checkpoint.pt"
    assert cli("predict", *few, "--model_name", path, "--out", "q.csv")[0] == 0
    assert Path("p.csv").read_text() == Path("q.csv").read_text()
    status, _, err = cli("predict", "--model_name", "old")
    assert status == 1 and "defect and sizes" in err and "--task" in err


def test_start_from_a_released_model(cohort, cli):
    """Its heads have the registry's labels for any new task."""
    published_model(cohort / "trained_models" / "EchoFocus_CHD", 22)
    edit_config(task_labels=["ASD"])
    pd.read_csv("labels.csv").rename(columns={"finding": "ASD"}).to_csv("labels.csv", index=False)
    line = ("train", "--task", "defect", "--init_from", "EchoFocus_CHD", "--epoch_lim", "1")
    status, out, err = cli(*line, "--sample_limit", "24")
    assert status == 0 and "loaded 1 heads, 0 new heads" in out, err


# ----------------------------------------------------------------------------------------- inspect


def test_inspect_a_published_model(here, cli):
    scaling = recorded("measure_norm.json")
    published_model(here / "trained_models" / "EchoFocus_Measure", 18, scaling)
    status, out, err = cli("inspect", "EchoFocus_Measure", "--json", "description.json")
    assert status == 0, err
    description = json.loads(Path("description.json").read_text())
    n_parameters = sum(p.numel() for p in StudyModel(18).parameters())
    assert description["architecture"]["encoder_depth"] == 1
    assert description["architecture"]["parameters"] == n_parameters
    labels = [row["label"] for row in description["labels"]]
    assert labels == releases.registry()["EchoFocus_Measure"]["labels"]
    for row in description["labels"]:
        assert row["stdev"] == pytest.approx(scaling[row["label"]]["stdev"])
    assert description["history"] == {"epochs": 1, "best_validation_loss": 0.6, "best_epoch": 1}
    path = Path("trained_models/EchoFocus_Measure/best_checkpoint.pt")
    assert description["type"] == "regression" and description["sha256"] == sha256_file(path)
    assert all(text in out for text in ("EF05", releases.NOT_VERIFIED, description["sha256"]))
    shutil.copy(path, "bare.pt")
    status, out, err = cli("inspect", "bare.pt")
    assert status == 0 and "output 18" in out, err


def test_inspect_and_share_a_trained_model(add_model, cli):
    folder = add_model("sizes", "--epoch_lim", "2")
    status, _, err = cli("inspect", "--json", "description.json")
    assert status == 0, err
    description = json.loads(Path("description.json").read_text())
    history, losses = description["history"], pd.read_csv(folder / "train_losses.csv")
    best = losses.loc[losses["val_loss"].idxmin()]
    assert history["best_epoch"] == best["epochs_trained"]
    assert history["best_validation_loss"] == pytest.approx(best["val_loss"], rel=1e-4)
    assert description["labels"][0]["label"] == "size" and description["labels"][0]["unit"] == "cm"
    assert description["settings"]["learning_rate"] == 1e-3
    record = torch.load(folder / "best_checkpoint.pt", weights_only=True)["echofocus"]
    assert description["input"]["norm_mean"] == pytest.approx(record["input"]["norm_mean"])

    assert cli("download", "trained_models/sizes", "--model_name", "colleague")[0] == 0
    for name in ("sizes", "colleague"):
        assert cli("predict", "--model_name", name, "--out", f"{name}.csv")[0] == 0
    assert Path("sizes.csv").read_text() == Path("colleague.csv").read_text()
    status, _, err = cli("train", "--task", "sizes", "--model_name", "colleague")
    assert status == 1 and "--init_from colleague" in err
