"""The encoder against recorded numbers, its weights files, and torch.hub."""

import re
import runpy

import numpy as np
import pytest
import torch
from helpers import ROOT, normal, recorded, relative_error

from echofocus_core.base.files import sha256_file
from echofocus_core.video import panecho


@pytest.fixture(scope="module")
def model():
    return panecho.load_panecho("random").model


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """A file like the published one: a dict 'weights', with the position code in it."""
    path = tmp_path_factory.mktemp("weights") / "panecho.pt"
    pe = {"encoder.time_encoder.pe": torch.zeros(1, 16, 768)}
    torch.save({"weights": panecho.random_weights() | pe}, path)
    return path


def test_state_dict_names_and_shapes(model):
    shapes = recorded("panecho_state_shapes.json")
    for net, part in ((model, "full"), (model.encoder, "backbone")):
        expected = {name: shape for name, shape in shapes[part] if "time_encoder.pe" not in name}
        assert {k: list(v.shape) for k, v in net.state_dict().items()} == expected


def test_random_weights_follow_the_rule(model):
    """Their sums are those of the weights with which the parity numbers were recorded."""
    numbers = recorded("panecho_parity.npz")
    names = [name for name, _ in recorded("panecho_state_shapes.json")["full"]]
    state = model.state_dict()
    for name, total in zip(names, numbers["param_sum_f64"], strict=True):
        if name in state:
            assert float(state[name].double().sum()) == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize(
    "name, seed, shape",
    [
        ("backbone_rng7_224", 7, (2, 3, 16, 224, 224)),
        ("backbone_rng8_112", 8, (1, 3, 16, 112, 112)),
        ("backbone_rng9_112_clip32", 9, (1, 3, 32, 112, 112)),
        ("backbone_rng12_112_8frames", 12, (1, 3, 8, 112, 112)),
    ],
)
@torch.inference_mode()
def test_published_clip_embeddings(model, name, seed, shape):
    actual = model.encoder(torch.from_numpy(normal(seed, *shape)))
    assert relative_error(actual, recorded("panecho_parity.npz")[name]) < 1e-4


@torch.inference_mode()
def test_published_image_features_and_heads(model, monkeypatch):
    numbers = recorded("panecho_parity.npz")
    actual = model.encoder.encoder(torch.from_numpy(normal(10, 2, 3, 112, 112)))
    assert relative_error(actual, numbers["image_encoder_rng10_112"]) < 1e-4
    embeddings = model.encoder(torch.from_numpy(normal(11, 1, 3, 16, 112, 112)))
    for activations in (True, False):
        monkeypatch.setattr(model, "activations", activations)
        outputs = model.read(embeddings)
        assert len(outputs) == 40
        for task, actual in outputs.items():
            expected = numbers[f"multitask_act{activations}/{task}"]
            assert relative_error(actual, expected) < 1e-4, task


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@torch.inference_mode()
def test_packed_for_a_cpu(model, dtype, most):
    """Packed weights and fused products give the numbers of the plain model."""
    if not panecho.can_pack(dtype):
        pytest.skip(f"this CPU's torch packs no {dtype}")
    packed = panecho.load_panecho("random").model.encoder.encoder
    packed.model.pack(dtype, 64)
    for n, size in ((3, 64), (2, 150)):
        images = torch.from_numpy(normal(size, n, 3, size, size))
        assert relative_error(packed(images), model.encoder.encoder(images)) < most


def test_position_code():
    expected = recorded("panecho_parity.npz")["pe32"]
    assert relative_error(panecho.frame_positions(32), expected) < 1e-6


def test_weights_file_loads_strictly(weights_file, tmp_path):
    loaded = panecho.load_panecho(weights_file)
    model = loaded.model
    assert loaded.sha256 == sha256_file(weights_file)
    state = torch.load(weights_file, weights_only=True)["weights"]
    assert torch.equal(model.EF_head[1].weight, state["EF_head.1.weight"])

    state["encoder.surprise"] = state.pop("EF_head.1.bias")
    torch.save({"weights": state}, tmp_path / "odd.pt")
    with pytest.raises(panecho.WeightsError, match=r"missing EF_head\.1\.bias") as error:
        panecho.load_panecho(tmp_path / "odd.pt")
    assert "unexpected encoder.surprise" in str(error.value)


@pytest.mark.parametrize(
    "files, expected",
    [
        (["panecho.pt", "chkpt_epoch-3.pt"], "panecho.pt"),
        (["encoder.pt", "best_checkpoint.pt"], "encoder.pt"),
        (["chkpt_epoch-9.pt", "chkpt_epoch-10.pt", "last_checkpoint.pt"], "chkpt_epoch-10.pt"),
        (["best_checkpoint.pt"], None),
    ],
)
def test_the_weights_of_a_folder(tmp_path, files, expected):
    for name in files:
        (tmp_path / name).touch()
    path = panecho.weights_path(tmp_path)
    assert (path.name if path.is_file() else None) == expected


@pytest.fixture
def hub_cache(weights_file, tmp_path, monkeypatch):
    """The weights in torch.hub's cache."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "panecho.pt").symlink_to(weights_file)


def test_hub(hub_cache, model):
    """torch.hub gives models with the published options."""

    def load(**kwargs):
        return torch.hub.load(str(ROOT), "PanEcho", source="local", **kwargs).eval()

    x = torch.from_numpy(normal(11, 1, 3, 16, 64, 64))
    with torch.inference_mode():
        outputs = load(tasks=["EF", "AVStenosis", "RASize"], clip_len=16)(x)
        assert set(outputs) == {"EF", "AVStenosis", "RASize"}
        assert outputs["AVStenosis"].sum() == pytest.approx(1, abs=1e-5)
        raw = load(activations=False, tasks="RASize")(x)["RASize"]
        assert outputs["RASize"].item() == pytest.approx(1 - raw.sigmoid().item(), abs=1e-6)
        embedding = load(backbone_only=True)(x)
        assert torch.allclose(embedding, model.encoder(x), atol=1e-5)
        assert load(pretrained=False, clip_len=4)(x[:, :, :4])["EF"].shape == (1, 1)


def test_the_documented_snippet(hub_cache, monkeypatch):
    """It runs on smaller images."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "released.md").read_text()
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", text, re.S) if "torch.hub" in c]
    assert code.count('source="local"') == 6
    actual = {}
    with torch.no_grad():
        exec(code.replace("224, 224", "64, 64"), actual)
        assert actual["longer"](torch.rand(1, 3, 32, 64, 64))["EF"].shape == (1, 1)
    assert len(actual["readings"]) == len(actual["raw"]) == 40
    assert list(actual["few"]) == ["EF", "AVStenosis"]
    assert actual["embedding"].shape == actual["features"].shape == (1, 768)


def test_clip_planes_are_the_reshape():
    """The table of planes is the reshape of (3, L) to (L, 3), for any L."""
    for clip_len in (1, 8, 16, 32):
        channel, frame = np.meshgrid(np.arange(3), np.arange(clip_len), indexing="ij")
        code = torch.from_numpy(100 * channel + frame).reshape(clip_len, 3).numpy()
        planes = panecho.clip_planes(clip_len)
        np.testing.assert_array_equal(100 * planes[..., 0] + planes[..., 1], code)


def test_a_folder_that_looks_like_an_option(tmp_path, monkeypatch):
    """embed/panecho.py passes a folder on as a value, also if its name begins with a hyphen."""
    script = runpy.run_path(str(ROOT / "embed" / "panecho.py"))
    lines = []
    monkeypatch.setattr("subprocess.call", lines.append)
    (tmp_path / "panecho.pt").touch()
    with pytest.raises(SystemExit):
        script["main"](["predict", "--weights", str(tmp_path), "--out=--redo", "--", "-x"])
    words = [word for word in map(str, lines[0]) if word.startswith("-")]
    assert {"--videos=-x", "--out=--redo"} <= set(words)
    assert not {"-x", "--redo"} & set(words)
