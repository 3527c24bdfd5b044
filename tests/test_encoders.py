"""Other encoders than PanEcho, against their libraries called directly on the same frames."""

import json
import re
from pathlib import Path

import cv2
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import moving_square, relative_error, write_cine

import echofocus_core.video.encoders.hub as hub
from echofocus_core.base.console import RUN, UserError
from echofocus_core.study.faithfulness import read_views
from echofocus_core.video import extract, phantom
from echofocus_core.video.backbones import build_backbone
from echofocus_core.video.clip_tensors import NORMALIZATIONS, as_input
from echofocus_core.video.decode import (
    Pixels,
    Sampling,
    read_clips,
    read_frames,
    window_frames,
)
from echofocus_core.video.encoders import ENCODERS, from_file, open_encoder
from echofocus_core.video.encoders.echojepa import EchoJEPA
from echofocus_core.video.panecho import PanEcho
from echofocus_core.video.store import open_store

ROOT = Path(__file__).resolve().parent.parent


def documented():
    """The example of docs/encoders.md."""
    text = (ROOT / "docs" / "encoders.md").read_text()
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


@pytest.fixture(scope="module")
def torchvision():
    """torchvision, also without its compiled operators, which its models do not use."""
    pytest.importorskip("torchvision") if torch.cuda.is_available() else None
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            operators.define(f"{name}(Tensor boxes, Tensor scores, float most) -> Tensor")
    yield pytest.importorskip("torchvision")
    del operators


@pytest.fixture
def videos(tmp_path):
    """A study of two AVI files, of 40 and of 20 frames."""
    for name, frames in (("long", 40), ("short", 20)):
        cine = phantom.phantom_cine("A4C", frames=frames, size=(90, 122), seed=frames)
        phantom.write_video(tmp_path / "videos" / "s1" / f"{name}.avi", cine)
    return tmp_path / "videos"


@pytest.fixture
def embed(cli, videos, tmp_path):
    """Extract the videos: {video: (clips, width)} and the attributes of the file."""

    def run(*options, out="emb"):
        line = videos, "--out", tmp_path / out, *options
        status, _, err = cli(*line, main=extract.main)
        assert status == 0, err
        with h5py.File(tmp_path / out / "s1.hdf5") as f:
            names = [name.decode() for name in f["videos"]]
            return dict(zip(names, f["embeddings"][()], strict=True)), dict(f.attrs)

    return run


def rgb(path):
    """The frames of an AVI, uint8 (n, H, W, 3) RGB."""
    capture, frames = cv2.VideoCapture(str(path)), []
    while (frame := capture.read()[1]) is not None:
        frames.append(frame[..., ::-1])
    return np.stack(frames)


@torch.inference_mode()
def test_echoprime(torchvision, videos, embed, tmp_path):
    torch.manual_seed(3)
    model = torchvision.models.video.mvit_v2_s()
    model.head[1] = torch.nn.Linear(768, 512)
    torch.save(model.eval().state_dict(), tmp_path / "echo_prime_encoder.pt")
    weights = "--encoder", "echoprime", "--weights", tmp_path / "echo_prime_encoder.pt"
    embeddings, attributes = embed(*weights)
    assert attributes["encoder"] == b"echoprime" and attributes["licence"] == b"MIT"
    mean = torch.tensor([29.110628, 28.076836, 29.096405])
    deviation = torch.tensor([47.989223, 46.456997, 47.20083])
    for name, n in (("long", 40), ("short", 20)):
        frames = rgb(videos / "s1" / f"{name}.avi")
        assert len(frames) == n
        # 122 x 90: the square is columns 16 to 105; a tenth of it is 9 pixels
        cropped = [frame[9:81, 25:97] for frame in frames]
        small = [cv2.resize(x, (224, 224), interpolation=cv2.INTER_CUBIC) for x in cropped]
        clip = torch.zeros(32, 224, 224, 3)
        clip[: min(n, 32)] = (torch.from_numpy(np.stack(small[:32])).float() - mean) / deviation
        expected = model(clip[::2].permute(3, 0, 1, 2)[None]).numpy()
        assert embeddings[f"{name}.avi"].shape == (1, 512)
        assert relative_error(embeddings[f"{name}.avi"], expected) < 1e-5, name


@torch.inference_mode()
def test_views(torchvision, videos, embed, cli, tmp_path):
    """EchoPrime's classifier on frame 0; a second run keeps the rows, which explain reads."""
    torch.manual_seed(4)
    model = torchvision.models.convnext_base()
    model.classifier[2] = torch.nn.Linear(1024, 11)
    torch.nn.init.normal_(model.classifier[2].weight, std=0.5)
    torch.save(model.eval().state_dict(), tmp_path / "view_classifier.pt")
    (tmp_path / "mine.py").write_text(documented())
    options = "--encoder", f"{tmp_path / 'mine.py'}:brightness", "--views", "echoprime"
    options += "--view_weights", tmp_path / "view_classifier.pt"
    embed(*options)
    table = pd.read_csv(tmp_path / "emb" / "views.csv")
    mean, deviation = np.array([29.110628, 28.076836, 29.096405]), [47.989223, 46.456997, 47.20083]
    views = "A2C A3C A4C A5C Apical_Doppler Doppler_Parasternal_Long Doppler_Parasternal_Short"
    views = f"{views} Parasternal_Long Parasternal_Short SSN Subcostal".split()
    assert table["video"].tolist() == ["long.avi", "short.avi"]
    for row in table.itertuples():
        frame = rgb(videos / "s1" / row.video)[0][9:81, 25:97]
        small = cv2.resize(frame, (224, 224), interpolation=cv2.INTER_CUBIC)
        x = torch.from_numpy((small - mean) / deviation).float().permute(2, 0, 1)
        expected = model(x[None]).softmax(1)[0]
        assert row.view == views[expected.argmax()]
        assert row.probability == pytest.approx(float(expected.max()), abs=1e-4)
    table["view"] = "kept"
    table.to_csv(tmp_path / "emb" / "views.csv", index=False)
    cine = phantom.phantom_cine("PLAX", frames=18, size=(90, 122), seed=9)
    phantom.write_video(videos / "s1" / "short.avi", cine)
    embed(*options)
    table = read_views(tmp_path / "emb" / "views.csv", RUN, open_store(tmp_path / "emb"), ["s1"])
    assert table[("s1", "long.avi")] == "kept"
    assert table[("s1", "short.avi")] in views


def small_jepa(transformers):
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "crop_size": 32}
    shape |= {"frames_per_clip": 16, "pred_hidden_size": 24, "pred_num_attention_heads": 2}
    config = transformers.VJEPA2Config(**shape, pred_num_hidden_layers=1)
    torch.manual_seed(5)
    return transformers.VJEPA2Model(config).eval()


@torch.inference_mode()
def test_a_v_jepa_2_of_the_hub_s_format(torchvision, videos, embed, tmp_path):
    """Its own processor and network, on frames 0, 2, ..., 30; two windows of the longer video."""
    transformers = pytest.importorskip("transformers")
    model = small_jepa(transformers)
    processor = transformers.VJEPA2VideoProcessor(crop_size=32)
    model.save_pretrained(tmp_path / "jepa")
    processor.save_pretrained(tmp_path / "jepa")
    embeddings, attributes = embed("--encoder", f"hf:{tmp_path / 'jepa'}", "--n_clips", "2")
    assert attributes["clip_len"] == 16 and attributes["size"] == 32
    last = np.minimum(np.arange(0, 32, 2), 19)  # the last frame of a short video is repeated
    expected = {"long": (np.arange(0, 32, 2), np.arange(9, 40, 2)), "short": (last, last)}
    for name, windows in expected.items():
        frames = rgb(videos / "s1" / f"{name}.avi").transpose(0, 3, 1, 2)
        for number, window in enumerate(windows):
            pixels = processor(torch.from_numpy(frames[window].copy()), return_tensors="pt")
            tokens = model.get_vision_features(pixels["pixel_values_videos"])
            # Its resize is by torch, which rounds one pixel in 1000 otherwise than Pillow.
            actual = embeddings[f"{name}.avi"][number]
            assert relative_error(actual, tokens.mean(1)[0].numpy()) < 1e-3, (name, number)


def test_weights_of_echojepa_in_the_names_of_its_training(monkeypatch, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small_jepa(transformers)
    monkeypatch.setattr(EchoJEPA, "config", model.config.to_dict())
    theirs, parts = {}, {}
    for name, tensor in model.encoder.state_dict().items():
        name = name.replace("embeddings.patch_embeddings.", "patch_embed.")
        name = name.replace("layernorm.", "norm.").replace("layer.", "blocks.")
        name = name.replace("attention.", "attn.")
        if match := re.search(r"\b(query|key|value)\b", name):
            parts.setdefault(name.replace(match[0], "qkv"), {})[match[0]] = tensor
        else:
            theirs[f"module.backbone.{name}"] = tensor
    for name, three in parts.items():
        qkv = torch.cat([three[part] for part in ("query", "key", "value")])
        theirs[f"module.backbone.{name}"] = qkv
    torch.save({"target_encoder": theirs, "epoch": 3}, tmp_path / "jepa.pt")
    loaded = open_encoder("echojepa-l", str(tmp_path / "jepa.pt"))
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(loaded.model.encoder.state_dict()[name], tensor), name
    torch.save({"target_encoder": {"conv.weight": torch.ones(2)}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="V-JEPA 2"):
        open_encoder("echojepa-l", str(tmp_path / "other.pt"))


@torch.inference_mode()
def test_an_image_model_of_timm(torchvision, videos, embed):
    """The mean over frames 0, 2, ..., 30 of its features after timm's own transform."""
    timm, name = pytest.importorskip("timm"), "resnet10t.c3_in1k"
    from PIL import Image

    embeddings, attributes = embed("--encoder", f"timm:{name}", "--weights", "random")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    config = timm.data.resolve_data_config({}, model=model)
    transform = timm.data.create_transform(**config)
    assert attributes["encoder"] == f"timm:{name}".encode()
    frames = rgb(videos / "s1" / "long.avi")[0:32:2]
    images = torch.stack([transform(Image.fromarray(frame)) for frame in frames])
    actual = embeddings["long.avi"]
    assert relative_error(actual, model(images).mean(0, keepdim=True).numpy()) < 1e-5


@torch.inference_mode()
def test_an_image_model_of_transformers(torchvision, videos, embed, tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
    torch.manual_seed(6)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**shape)).eval()
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    processor = transformers.BitImageProcessor(**sizes)
    model.save_pretrained(tmp_path / "dino")
    processor.save_pretrained(tmp_path / "dino")
    embeddings, _ = embed("--encoder", f"hf:{tmp_path / 'dino'}")
    frames = rgb(videos / "s1" / "long.avi")[0:32:2]
    pixels = processor([frame for frame in frames], return_tensors="pt")["pixel_values"]
    expected = model(pixels).pooler_output.mean(0, keepdim=True)
    assert relative_error(embeddings["long.avi"], expected.numpy()) < 1e-3  # see above


@torch.inference_mode()
def test_echoclip(torchvision, videos, embed, monkeypatch):
    """A frame is resized to 224 by its shorter side; its features have length 1, then the mean."""
    pytest.importorskip("open_clip")
    from PIL import Image

    visual = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 32, 32), torch.nn.Flatten())
    clip_model = type("Clip", (), {"visual": visual})
    monkeypatch.setattr(hub.EchoCLIP, "width", 245)
    monkeypatch.setattr("open_clip.create_model", lambda *args, **kwargs: clip_model)
    embeddings, _ = embed("--encoder", "echoclip")
    features = []
    for frame in rgb(videos / "s1" / "long.avi")[0:32:2]:
        image = Image.fromarray(frame).resize((303, 224), Image.Resampling.BICUBIC)
        x = np.asarray(image)[:, 40:264].transpose(2, 0, 1) / 255.0  # 40: of 39.5, to even
        x = (x - np.reshape(hub.CLIP_MEAN, (3, 1, 1))) / np.reshape(hub.CLIP_DEVIATION, (3, 1, 1))
        y = visual(torch.from_numpy(x).float()[None])
        features.append((y / y.square().sum().sqrt()).numpy())
    assert relative_error(embeddings["long.avi"], np.mean(features, axis=0)) < 1e-5


@pytest.mark.parametrize("model_name", ["frame_transformer", "3dresnet18"])
@torch.inference_mode()
def test_encoders_of_training_extract(torchvision, videos, embed, tmp_path, model_name):
    """Every architecture of embed/train.py, on PanEcho's clips with its own normalization."""
    torch.manual_seed(7)
    shape = (16, 1, 4) if model_name == "frame_transformer" else ()
    backbone = build_backbone(model_name, "resnet18", False, *shape)[0]
    net = PanEcho([], backbone=backbone).eval()
    for module in net.modules():
        if hasattr(module, "running_mean"):
            module.running_mean.normal_(0, 0.1)
    record = {"tasks": [], "model_name": model_name, "arch": "resnet18", "layers": 1, "heads": 4}
    record |= {"normalization": "kinetics", "size": 64}
    torch.save({"weights": net.state_dict(), "encoder": record}, tmp_path / "own.pt")
    options = "--weights", tmp_path / "own.pt", "--size", "64", "--n_clips", "3"
    embeddings, attributes = embed(*options)
    name = {"frame_transformer": b"trained/resnet18"}.get(model_name, b"trained/3dresnet18")
    assert attributes["encoder"] == name
    for video, actual in embeddings.items():
        clips = read_clips(videos / "s1" / video, Sampling(n_clips=3, size=64))[0]
        batch = as_input(torch.from_numpy(clips.frames[clips.index]), "kinetics")
        assert relative_error(actual, net.encoder(batch).numpy()) < 1e-4, video
    assert NORMALIZATIONS["kinetics"][0] != NORMALIZATIONS["imagenet"][0]


def test_the_documented_encoder(cli, videos, embed, tmp_path, monkeypatch):
    """The example of docs/encoders.md: its values, its record, and no mixing with others."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(documented())
    embeddings, attributes = embed("--encoder", "mine.py:brightness")
    assert attributes["encoder"] == b"mine.py:brightness" and attributes["citation"] == b"none"
    small = [
        cv2.resize(frame[:, 16:106], (112, 112), interpolation=cv2.INTER_AREA)
        for frame in rgb(videos / "s1" / "short.avi").astype(np.float32)
    ]
    clip = np.zeros((8, 112, 112))
    clip[:7] = np.mean(small, axis=3)[0:20:3] / 255 * 2 - 1
    # the picture is the central 112 of 128 pixels of the shorter side
    grid = clip.reshape(8, 4, 28, 4, 28).mean((0, 2, 4)).ravel()
    assert embeddings["short.avi"].shape == (1, 16)
    assert np.corrcoef(embeddings["short.avi"][0], grid)[0, 1] > 0.8
    line = videos, "--encoder", "mine.py:brightness", "--out"
    assert cli(*line, "brighter", "--perturb", "gain=0.2", main=extract.main)[0] == 0
    with h5py.File("brighter/s1.hdf5") as f:
        assert f.attrs["perturb"] == b"gain=0.2"
        i = f["videos"].asstr()[:].tolist().index("short.avi")
        assert (f["embeddings"][i, 0] >= embeddings["short.avi"][0]).all()
        assert f["embeddings"][i, 0].max() > embeddings["short.avi"].max() + 0.1
    line = *line, "emb"
    with open("mine.py", "a") as f:
        f.write("# changed\n")
    status, _, err = cli(*line, main=extract.main)
    assert status == 1 and "weights_sha256" in err
    assert cli(*line, "--redo", main=extract.main)[0] == 0
    made_with = open_store(Path("emb")).made_with(["s1"])
    assert list(made_with["encoder"]) == ["mine.py:brightness"]


@pytest.fixture
def hospital(tmp_path, monkeypatch):
    """Ten studies of one video, with labels, in the current folder; the documented encoder."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(documented())
    rows = ["pid,eid,ill"]
    for i in range(10):
        cine = phantom.phantom_cine("A4C", frames=18, size=(64, 64), seed=i)
        phantom.write_video(Path(f"videos/s{i}/a.avi"), cine)
        rows.append(f"p{i},s{i},{i % 2}")
    Path("labels.csv").write_text("\n".join(rows))
    task = {"task_labels": ["ill"], "type": "binary", "label_path": "labels.csv"}
    dataset = {"embedding_path": "emb"}
    config = {"task": {"ill": task}, "dataset": {"site": dataset}}
    Path("config.json").write_text(json.dumps(config))


def test_a_model_predicts_with_the_encoder_of_its_training(hospital, cli, monkeypatch):
    make = from_file(Path("mine.py"), "brightness", "").__class__
    monkeypatch.setattr(make, "name", "grid")
    monkeypatch.setitem(ENCODERS, "grid", lambda weights: make())
    line = "videos", "--out", "emb", "--n_clips", "2", "--encoder"
    status, _, err = cli(*line, "grid", main=extract.main)
    assert status == 0, err
    train = "train", "--task", "ill", "--split", "40,30,30", "--epoch_lim", "1"
    status, _, err = cli(*train)
    assert status == 0, err
    (model,) = Path("trained_models").iterdir()
    status, _, err = cli("predict", "--out", "stored.csv", "--model_name", model.name)
    assert status == 0, err
    predict = "predict", "--videos", "videos", "--model_name", model.name, "--out", "new.csv"
    status, _, err = cli(*predict)
    assert status == 0, err
    stored, new = (pd.read_csv(f, index_col="eid")["ill"] for f in ("stored.csv", "new.csv"))
    assert len(new) == 10 and new.equals(stored.reindex(new.index))
    (file,) = Path("clip_embeddings").glob("*/s3.hdf5")
    with h5py.File(file) as f:
        assert f.attrs["encoder"] == b"grid" and f["embeddings"].shape == (1, 2, 16)
    status, _, err = cli(*line, "panecho", "--weights", "random", main=extract.main)
    assert status == 1 and "encoder was grid and is now PanEcho" in err


def test_a_file_runs_only_if_the_user_names_it(hospital, cli):
    named = "--encoder", "mine.py:brightness"
    assert cli("videos", "--out", "emb", *named, main=extract.main)[0] == 0
    train = "train", "--task", "ill", "--split", "40,30,30", "--epoch_lim", "1"
    assert cli(*train)[0] == 0
    predict = "predict", "--videos", "videos", "--out", "p.csv"
    status, _, err = cli(*predict)
    assert status == 1 and "mine.py:brightness" in err and "--encoder" in err
    status, _, err = cli(*predict, *named)
    assert status == 0 and Path("p.csv").is_file(), err
    other = Path("other.py")
    other.write_text(Path("mine.py").read_text())
    one = "videos/s1", "--group", "one", "--out", "two", "--encoder", "other.py:brightness"
    assert cli(*one, main=extract.main)[0] == 0
    next(Path("two").glob("*.hdf5")).replace("emb/s1.hdf5")
    status, _, err = cli(*train, "--run_id", "mixed")
    assert status == 1 and "different encoder" in err and "s1" in err


def test_a_mask_blackens_the_frames_before_they_are_cropped(tmp_path):
    """A still text beside a moving square is black; the digest is that of the unmasked frames."""
    frames = moving_square(20, 120, 160)
    frames[:, 100:110, 4:40] = 255
    write_cine(tmp_path / "a.dcm", frames)
    pixels = Pixels(size=64, resize=64)
    plain, masked = (
        read_clips(tmp_path / "a.dcm", Sampling(1, 16, 64, mask=mask, pixels=pixels))[0]
        for mask in ("none", "sector")
    )
    assert plain.pixels == masked.pixels and plain.frames.shape == masked.frames.shape
    assert plain.frames[0, 54:58].max() > 200 and masked.frames[0, 54:58].max() == 0
    assert masked.frames.max() > 100


def test_windows_by_hand():
    sampling = Sampling(n_clips=3, clip_len=4, stride=2, padding="zeros")
    expected = [[0, 2, 4, 6], [2, 4, 6, 8], [3, 5, 7, 9]]  # starts 0, 1.5 (to even), 3
    assert window_frames(10, sampling).tolist() == expected
    assert window_frames(5, sampling).tolist() == [[0, 2, 4, -1]] * 3


def test_colours_of_dicom_and_of_other_files(tmp_path):
    """EchoPrime reads DICOM as BGR, and other files as RGB."""
    frames = phantom.phantom_cine("A4C", frames=17, size=(64, 64), seed=1)
    frames[..., 0] //= 2  # less blue
    write_cine(tmp_path / "a.dcm", frames)
    pixels = Pixels(size=64, order="RGB except DICOM")
    decoded = read_frames(tmp_path / "a.dcm")
    assert np.array_equal(pixels.picture(decoded[0], True), decoded[0])
    assert np.array_equal(pixels.picture(decoded[0], False), decoded[0][..., ::-1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--encoder echoprme", "did you mean echoprime?"),
        ("--encoder echoprime", "echofocus[encoders]"),
        ("--encoder absent.py:make", "no file absent.py"),
        ("--encoder hf:a/b", "echofocus[encoders]"),
    ],
)
def test_a_missing_library_or_name_is_one_line(cli, videos, tmp_path, monkeypatch, options, words):
    for name in ("torchvision", "torchvision.models", "transformers"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    line = videos, "--out", tmp_path / "emb", *options.split()
    status, _, err = cli(*line, main=extract.main)
    assert status == 1 and words in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("self.model = Grid()", "pass", "a torch module as `model`"),
        ("width = 16", "width = 0", "`width` above 0"),
        ("def brightness(weights)", "def brightness()", "brightness must take one argument"),
        ("return self.model(clips)", "return self.model(clips).numpy()", "returns ndarray"),
    ],
)
def test_an_unfinished_encoder_is_one_line(cli, videos, tmp_path, before, after, words):
    assert before in documented()
    (tmp_path / "mine.py").write_text(documented().replace(before, after))
    line = videos, "--out", tmp_path / "emb", "--encoder", f"{tmp_path / 'mine.py'}:brightness"
    status, _, err = cli(*line, main=extract.main)
    assert status == 1 and words in err and "Traceback" not in err


def test_wrong_pixels_are_refused():
    for options, text in (
        ({"order": "GBR"}, "GBR"),
        ({"size": 32, "resize": 16}, "16"),
        ({"cut": 0.5}, "cut"),
    ):
        with pytest.raises(UserError, match=text):
            Pixels(**options)
