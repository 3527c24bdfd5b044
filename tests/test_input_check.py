"""The range of an answer against new extractions, and studies unlike the training data."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import by_rule, normal, write_embeddings

from echofocus_core.base.options import Settings
from echofocus_core.study.config import Record
from echofocus_core.study.input_check import (
    DRAWS,
    FEWEST,
    InputReport,
    Novelty,
    Resamples,
    interval_half_width,
)
from echofocus_core.study.loop import Results, run_studies
from echofocus_core.study.models import LoadedModel
from echofocus_core.study.network import StudyModel
from echofocus_core.study.outputs import Outputs
from echofocus_core.study.predictions import half_widths_of, prediction_table
from echofocus_core.video.store import StudyClips, open_store

SHAPE = (6, 8, 768)  # videos, clips, features


def draw_clips(study, extraction):
    """Clips of a study's videos, as one of several extractions would draw them."""
    videos = normal(100 + study, SHAPE[0], 1, SHAPE[2])
    return videos + 0.5 * normal(1000 * study + extraction + 7, *SHAPE)


def answers(net, bags):
    tokens = torch.from_numpy(np.concatenate([b.reshape(-1, 768) for b in bags]))
    return net(tokens, [b.shape[0] * b.shape[1] for b in bags])[0].detach().numpy()


class DrawnStore:
    def read(self, study):
        return StudyClips(draw_clips(study, 0), list("abcdef"))


def test_another_extraction_is_in_the_range_nine_times_of_ten():
    net, studies = by_rule(n_outputs=4).eval(), range(12)
    resamples = Resamples(DrawnStore(), "clips")
    drawn = [resamples.read((s, k)).embeddings for s in studies for k in range(DRAWS)]
    half_width = interval_half_width(answers(net, drawn).reshape(12, DRAWS, 4), [6] * 12, [8] * 12)
    first = answers(net, [draw_clips(s, 0) for s in studies])
    covered = []
    for extraction in range(1, 9):
        again = answers(net, [draw_clips(s, extraction) for s in studies])
        covered.append(np.abs(again - first) <= half_width)
    assert 0.84 < np.mean(covered) < 0.96


@pytest.mark.parametrize(("V", "C"), [(1, 3), (2, 4), (4, 16)])
def test_the_range_from_few_clips(V, C):
    """An answer that is the mean of its clips is in it nine times of ten, for few clips too."""
    rng = np.random.default_rng(V)
    first, again = rng.standard_normal((2, 4000, V, C))
    picked = rng.integers(C, size=(4000, DRAWS, V, C))
    draws = np.take_along_axis(first[:, None], picked, axis=3).mean((2, 3))[..., None]
    half_width = interval_half_width(draws, [V] * 4000, [C] * 4000)[:, 0]
    change = np.abs(again.mean((1, 2)) - first.mean((1, 2)))
    assert 0.88 < (change <= half_width).mean() < 0.93


def test_resampling_keeps_to_a_video_or_draws_videos_too():
    whole = draw_clips(3, 0)
    same = Resamples(DrawnStore(), "clips").read((3, 1)).embeddings
    for video, clips in zip(whole, same, strict=True):
        assert all((clip == video).all(axis=1).any() for clip in clips)
    by_name = SimpleNamespace(read=lambda name: DrawnStore().read(int(name)))
    assert (same == Resamples(by_name, "clips").read(("3", 1)).embeddings).all()
    other = Resamples(DrawnStore(), "videos").read((3, 1)).embeddings
    taken = {next(v for v in range(6) if (x[0] == whole[v]).all(1).any()) for x in other}
    assert len(taken) < 6  # with replacement


def of_one_site(study):
    """Videos' mean embeddings (V, D) of a study: variation along a few directions, and noise."""
    rng = np.random.default_rng([0, study])
    directions = 3 * normal(5, 8, 768)
    mean = rng.standard_normal((1, 8)) @ directions
    V = rng.integers(2, 7)
    return mean + rng.standard_normal((V, 8)) @ directions + rng.standard_normal((V, 768))


def as_study(videos):
    return StudyClips(videos[:, None].astype(np.float32), [str(i) for i in range(len(videos))])


@pytest.fixture(scope="module")
def novelty():
    studies = [of_one_site(i) for i in range(120)]
    return Novelty.of(studies, [f"P{i // 2}" for i in range(120)])


def test_held_out_studies_of_the_same_site_are_usual(novelty):
    shares = np.array([novelty(as_study(of_one_site(i))) for i in range(1000, 1150)])
    assert 0.35 < shares.mean() < 0.65 and (shares > 0.99).mean() < 0.06


def test_studies_of_another_site_are_unusual(novelty):
    usual = [of_one_site(i) for i in range(2000, 2020)]
    for odd in (
        [x + 0.5 for x in usual],
        [x + 3 * normal(9, 1, 768) for x in usual],
        [x * 2 for x in usual],
        [3 * normal(i, 4, 768) for i in range(20)],
    ):
        assert np.mean([novelty(as_study(v)) > 0.99 for v in odd]) >= 0.9


def test_the_stored_novelty(novelty):
    """The same answer after saving; no study in it; damage is refused."""
    saved = novelty.to_save()
    study = as_study(of_one_site(1234))
    assert Novelty.load(saved)(study) == pytest.approx(novelty(study), abs=1e-3)
    assert sum(x.numel() for x in saved.values()) < 40 * 768
    assert Novelty.of([of_one_site(i) for i in range(FEWEST - 1)], range(FEWEST - 1)) is None


def table(path):
    return pd.read_csv(path, dtype={"eid": str}, keep_default_na=False).set_index("eid")


def test_the_columns_of_predict(add_model, cli):
    """Range and novelty; warnings of unusual and of cut studies."""
    add_model("sizes", "--epoch_lim", "2")
    for path in sorted(Path("emb").iterdir())[30:]:
        path.unlink()
    write_embeddings(Path("emb"), "odd", 1 + normal(1, 3, 4, 768))
    write_embeddings(Path("emb"), "one", normal(2, 3, 1, 768))
    assert cli("predict", "--out", "p.csv", "--spread", "clips")[0] == 0
    rows = table("p.csv")
    numbers = rows.drop("one").astype({f"size{end} [cm]": float for end in ("", "_low", "_high")})
    assert (numbers["size_low [cm]"] < numbers["size [cm]"]).all()
    assert (numbers["size [cm]"] < numbers["size_high [cm]"]).all()
    assert rows.loc["one", "size_low [cm]"] == ""  # undefined for one clip in each video
    assert rows.loc["odd", "novelty"] == 1 and rows.loc["odd", "warning"]
    usual = rows.drop(["odd", "one"])
    assert (usual["warning"] != "").sum() < 3 and usual["novelty"].between(0.1, 0.9).sum() > 15
    assert cli("predict", "--out", "q.csv", "--spread", "clips")[0] == 0
    assert Path("p.csv").read_bytes() == Path("q.csv").read_bytes()
    line = ("predict", "--out", "q.csv", "--max_videos_per_study", "2")
    assert cli(*line)[0] == 0
    assert "size_low [cm]" not in table("q.csv")
    assert "from 2 of its 3 videos (--max_videos_per_study)" in table("q.csv")["warning"]["odd"]


def test_a_study_that_vanishes_has_no_range(cohort):
    """Between its answer and its resamples; other studies keep theirs."""
    store, net = open_store(cohort / "emb"), StudyModel(2).eval()
    model = LoadedModel(
        Path("m"), net, "t", Outputs.of("ab", "binary"), None, Record(labels=["a", "b"]), {}
    )
    settings, eids = Settings(spread="clips"), ["1000", "1001"]
    results = run_studies(net, store, eids, settings)
    report = InputReport(modulo=dict.fromkeys(eids, False))
    before = half_widths_of(model, store, results, settings, report)
    (cohort / "emb" / "1000.hdf5").unlink()
    after = half_widths_of(model, store, results, settings, report)
    assert np.isnan(after[0]).all()
    np.testing.assert_allclose(after[1], before[1], rtol=1e-4)


def test_the_end_of_a_box_cox_scale_is_a_warning():
    """With lambda -1 the Box-Cox scale ends at 1: an output beyond has no value."""
    plain = {"apply_boxcox": False, "shift": 0.0, "mean": 0.0, "stdev": 1.0}
    scaling = {"a": plain | {"apply_boxcox": True, "lmbda": -1.0}, "b": plain}
    record = Record(labels=["a", "b"])
    model = LoadedModel(Path("m"), None, "t", Outputs.of("ab", "regression"), scaling, record, {})
    results = Results(["x", "y"], np.float32([[5, 1], [0, 1]]), None, [], [1, 1], [4, 4])
    rows, _ = prediction_table(model, results, InputReport(), np.full((2, 2), 0.1))
    assert rows["warning"].tolist() == ["a: past the end of the Box-Cox scale", ""]
    assert np.isnan(rows["a"][0]) and rows["a_low"][1] < rows["a"][1] < rows["a_high"][1]
