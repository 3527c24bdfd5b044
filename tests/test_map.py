"""`embed` by video and its map."""

import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import published_model, write_embeddings
from PIL import Image
from scipy.spatial.distance import cdist

from echofocus_core.base import figures
from echofocus_core.study.config import read_config
from echofocus_core.study.loading import load_model


def by_hand(net, clips):
    """Study embedding (768,) of clips (N, 768) of the standard kind, by torch's own encoder."""
    with torch.no_grad():
        return net.encoder(torch.from_numpy(clips)[None]).mean(1)[0].numpy()


def test_video_embeddings(cohort, cli):
    """Each is what the model makes of that video alone; what cannot be read is listed."""
    published_model(cohort / "trained_models" / "defect", 1)
    (cohort / "emb" / "1003.hdf5").write_bytes(b"not HDF5")
    for options in ((), ("--batch_tokens", "1")):  # all of a study's at once, or one by one
        status, out, err = cli("embed", "--level", "video", *options)
        assert status == 0, err
        assert "1 study cannot be read" in out and "1003.hdf5" in out
        with h5py.File("trained_models/defect/video_embeddings_site_defect.h5") as f:
            assert len(f) == 59 and f.attrs["level"] == "video" and f.attrs["dataset"] == "site"
            actual = {eid: group["embeddings"][:] for eid, group in f.items()}
            videos = {eid: group["videos"].asstr()[:].tolist() for eid, group in f.items()}
        folder = cohort / "trained_models" / "defect"
        net = load_model(folder, read_config("config.json").tasks).net
        for eid in ("1000", "1001", "1059"):
            with h5py.File(cohort / "emb" / f"{eid}.hdf5") as f:
                bag, names = f["embeddings"][:], f["videos"].asstr()[:].tolist()
            assert videos[eid] == names and actual[eid].shape == (len(bag), 768)
            for v, clips in enumerate(bag):
                np.testing.assert_allclose(actual[eid][v], by_hand(net, clips), atol=1e-5)
    assert sum(map(len, actual.values())) > 59  # several videos a study, then


@pytest.fixture
def two_sites(cohort):
    """A model and two more datasets: `far`, off by a constant, and `near`, like `site`."""
    published_model(cohort / "trained_models" / "defect", 1)
    config = json.loads((cohort / "config.json").read_text())
    for name, offset in (("far", 0.4), ("near", 0.0)):
        rng = np.random.default_rng(len(name))
        for i in range(25):
            bag = rng.standard_normal((2, 4, 768)) + offset
            write_embeddings(cohort / name, f"{name}{i}", bag.astype(np.float32))
        config["dataset"][name] = {"embedding_path": name, "label_path": "none.csv"}
    config["dataset"]["like_near"] = {"embedding_path": "like_near"}
    for i in range(25):
        bag = np.random.default_rng(100 + i).standard_normal((2, 4, 768))
        write_embeddings(cohort / "like_near", f"l{i}", bag.astype(np.float32))
    (cohort / "config.json").write_text(json.dumps(config))
    return cohort / "trained_models" / "defect"


def drawn(path, colour, opacity=0.75):
    """Pixels of a PNG in the colour that a marker of some opacity has on white."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    image = np.asarray(Image.open(path).convert("RGB")).astype(float)
    return (np.abs(image - (opacity * rgb + (1 - opacity) * 255)).max(-1) < 8).sum()


def purity(points):
    """Share of studies whose nearest neighbour on the map is of the same dataset."""
    away = cdist(points[["x", "y"]], points[["x", "y"]])
    np.fill_diagonal(away, np.inf)
    names = points["dataset"].to_numpy()
    return (names[away.argmin(1)] == names).mean()


@pytest.mark.figures
@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_map_shows_a_shift_between_sites(two_sites, cli, method):
    line = ("embed", "--datasets", "near", "far", "--map", method)
    status, out, err = cli(*line)
    assert status == 0, err
    path = two_sites / f"map_{method}_near_far.csv"
    points = pd.read_csv(path)
    assert list(points) == ["eid", "dataset", "value", "x", "y"] and len(points) == 50
    assert (points["value"] == points["dataset"]).all() and "P0" not in path.read_text()
    assert purity(points) > 0.97
    assert "shift between the datasets: AUROC 1.00" in out
    for colour in figures.OKABE_ITO[:2]:
        assert drawn(path.with_suffix(".png"), colour) > 300
    assert path.with_suffix(".pdf").stat().st_size > 5000
    assert cli(*line)[0] == 0
    pd.testing.assert_frame_equal(pd.read_csv(path), points)  # the same map again


def test_map_of_sites_alike_shows_none(two_sites, cli):
    status, out, err = cli("embed", "--datasets", "near", "like_near", "--map")
    assert status == 0, err
    auroc = float(out.split("AUROC ")[1].split()[0])
    assert 0.3 < auroc < 0.7
    assert purity(pd.read_csv(two_sites / "map_pca_near_like_near.csv")) < 0.75


@pytest.mark.figures
def test_map_by_a_column(two_sites, cli):
    """A label, text and numbers; what is missing stays grey; positions do not depend on it."""
    table = pd.read_csv("labels.csv", dtype=str)
    table["machine"] = np.where(table.index % 2, "A", "B")
    table.loc[:9, "size"] = None
    table.to_csv("labels.csv", index=False)
    actual = {}
    for column in ("finding", "machine", "size"):
        status, out, err = cli("embed", "--datasets", "site", "far", "--map", "--color_by", column)
        assert status == 0, err
        assert "no colours: no label table none.csv" in out
        actual[column] = pd.read_csv(two_sites / f"map_pca_site_far_by_{column}.csv")
        site = actual[column][actual[column]["dataset"] == "site"].set_index("eid")["value"]
        expected = table.set_index("eid")[column]
        if column == "machine":
            assert (site == expected[site.index]).all()
        else:
            np.testing.assert_allclose(site, expected[site.index].astype(float), rtol=1e-5)
        png = two_sites / f"map_pca_site_far_by_{column}.png"
        assert drawn(png, figures.MISSING_GREY, 1) > 300
    for column in ("machine", "size"):
        np.testing.assert_array_equal(actual[column][["x", "y"]], actual["finding"][["x", "y"]])
    assert actual["size"]["value"].isna().sum() == 35


def test_a_map_without_a_label_table(cohort, add_model, cli):
    """Without a config, and of a model whose task the config has under another name."""
    add_model("defect", "--epoch_lim", "2")
    line = ("embed", "--map", "--embedding_path", "emb", "--color_by")
    config = json.loads(Path("config.json").read_text())
    config["task"] = {f"other_{name}": task for name, task in config["task"].items()}
    Path("config.json").write_text(json.dumps(config))
    for _ in range(2):
        assert cli(*line, "dataset")[0] == 0
        status, _, err = cli(*line, "finding")
        assert status == 1 and "no label table" in err and err.count("\n") == 1
        Path("config.json").unlink(missing_ok=True)


def test_invalid_options_of_maps(two_sites, cli):
    for options, message in (
        (["--map", "--color_by", "findin"], "has no column 'findin'; did you mean finding"),
        (["--map", "--color_by", "pid"], "cannot be used as colours"),
        (["--map", "--level", "video"], "omit --level video"),
        (["--map", "--sample_limit", "3"], "four studies"),
        (["--datasets", "near", "fa"], "no dataset fa; did you mean far"),
        (["--datasets", "near", "far", "--embed_file", "x.h5"], "--embed_file is one file"),
    ):
        status, _, err = cli("embed", *options)
        assert status == 1 and message in err and err.count("\n") == 1, (options, err)


@pytest.mark.figures
def test_names_with_dollars_are_text(tmp_path):
    """Not formulas, of which a wrong one ends the drawing."""
    name = r"cost $\foo{$ x_1"
    points = pd.DataFrame(
        {"dataset": [name, "b"], "value": ["$_$", name], "x": [0, 1], "y": [1, 0]}
    )
    figures.plot_map(points, (name, "y"), name, name, tmp_path / "map")
    assert (tmp_path / "map.pdf").stat().st_size > 1000
