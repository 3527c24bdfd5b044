"""The range of an answer against new extractions, and studies unlike the training data."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import normal, write_embeddings
from scipy import special, stats

from benchmarks.novelty import SCALES, as_study, shares_with_warning
from benchmarks.ranges import SimulatedStudies, coverage
from echofocus_core.base.options import Settings
from echofocus_core.study.config import Record
from echofocus_core.study.input_check import (
    FEWEST,
    TAIL,
    Calibration,
    InputReport,
    Jackknife,
    Novelty,
    interval_half_width,
)
from echofocus_core.study.loop import Results, run_studies
from echofocus_core.study.models import LoadedModel
from echofocus_core.study.network import StudyModel
from echofocus_core.study.outputs import Outputs
from echofocus_core.study.predictions import half_widths_of, prediction_table
from echofocus_core.video.store import open_store


def half_width(embeddings, unit="clips"):
    """Of the answer: the mean over clips of the first feature of embeddings (V, C, D)."""
    videos, clips, _ = embeddings.shape
    jackknife = Jackknife(SimulatedStudies(x=embeddings), unit)
    keys = jackknife.keys("x", videos, clips)
    answers = [jackknife.read(key).embeddings[..., 0].mean() for key in keys]
    return interval_half_width(
        np.reshape(answers, (*jackknife.assignments(videos, clips), 1)), videos
    )[0]


@pytest.mark.parametrize(("V", "C"), [(1, 2), (5, 4), (3, 16), (2, 32)])
def test_the_range_is_exact_if_one_video_determines_the_answer(V, C):
    """The variance is that of the mean of its clips, with C - 1 degrees of freedom."""
    embeddings = np.zeros((V, C, 2), np.float32)
    embeddings[-1, :, 0] = normal(V, C)
    embeddings[..., 1] = normal(V + 1, V, C)
    sizes = C if C <= 16 else 16  # groups of equal size have the variance of their means
    variance = embeddings[-1, :, 0].var(ddof=1) / C / V**2
    expected = stats.t.ppf(0.95, sizes - 1) * np.sqrt(2 * variance)
    assert half_width(embeddings) == pytest.approx(expected, rel=1e-4 if C <= 16 else 0.4)


@pytest.mark.parametrize(("V", "C"), [(4, 2), (2, 4), (4, 16)])
def test_the_range_where_all_videos_count_alike(V, C):
    """The variance of an answer is 1 / (V C); another extraction is in it nine times of ten."""
    rng, n = np.random.default_rng(V), 250
    first, again = rng.standard_normal((2, n, V, C, 1)).astype(np.float32)
    widths = np.array([half_width(x) for x in first])
    change = again.mean((1, 2, 3)) - first.mean((1, 2, 3))
    assert change.std() == pytest.approx(np.sqrt(2 / (V * C)), rel=0.1)
    inside = special.ndtr(widths / np.sqrt(2 / (V * C))) * 2 - 1  # expected, given the width
    assert 0.88 < inside.mean() < 0.95 and 0.86 < (abs(change) <= widths).mean() < 0.97


def test_the_range_with_other_videos():
    """The variance of the mean of V videos, of whatever clips."""
    x = np.repeat(normal(3, 7, 1, 1), 4, axis=1)
    expected = stats.t.ppf(0.95, 6) * np.sqrt(2 * x[:, 0, 0].var(ddof=1) / 7)
    assert half_width(x, "videos") == pytest.approx(expected, rel=1e-4)
    assert half_width(x) == pytest.approx(0, abs=1e-6)


def test_groups_do_not_depend_on_ids_or_the_order_of_clips():
    embeddings = normal(1, 3, 5, 2)
    shuffled = np.stack([x[[4, 0, 3, 2, 1]] for x in embeddings[[2, 0, 1]]])
    assert half_width(shuffled) == pytest.approx(half_width(embeddings), rel=1e-5)
    jackknife = Jackknife(SimulatedStudies(x=embeddings, y=embeddings), "clips")
    M, G = jackknife.assignments(3, 5)
    assert (M, G) == (4, 5) and len(jackknife.keys("x", 3, 5)) == 20
    for m in range(M):
        kept = [jackknife.read(("x", m * G + g)).embeddings[..., 0] for g in range(G)]
        for video, clips in zip(embeddings[..., 0], np.stack(kept, 1), strict=True):
            assert ((clips[..., None] == video).sum((0, 1)) == G - 1).all()
    same = [jackknife.read((eid, 7)).embeddings for eid in "xy"]
    assert (same[0] == same[1]).all()
    assert not jackknife.keys("x", 3, 1) and not Jackknife({}, "videos").keys("x", 1, 5)


@pytest.mark.slow
@pytest.mark.parametrize(("V", "C"), [(1, 4), (5, 4), (5, 2)])
def test_the_coverage_of_ranges_of_a_trained_network(V, C):
    share, error = coverage(V, C)
    assert (share > 0.9 - 3 * error).all() and (share < 0.98).all()


def of_one_site(study):
    """Videos' mean embeddings (V, D) of a study: variation along a few directions, and noise."""
    rng = np.random.default_rng([0, study])
    directions = 3 * normal(5, 8, 768)
    mean = rng.standard_normal((1, 8)) @ directions
    V = rng.integers(2, 7)
    return mean + rng.standard_normal((V, 8)) @ directions + rng.standard_normal((V, 768))


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
    """The same answer after saving; no study in it; an earlier record is ignored."""
    saved = novelty.to_save()
    study = as_study(of_one_site(1234))
    assert Novelty.load(saved)(study) == pytest.approx(novelty(study), abs=1e-3)
    assert sum(x.numel() for x in saved.values()) < 40 * 768
    assert Novelty.load({"mean": saved["mean"], "quantiles": saved["at_scores"]}) is None
    assert Novelty.of([of_one_site(i) for i in range(FEWEST - 1)], range(FEWEST - 1)) is None


def test_ordinary_studies_seldom_have_a_warning():
    shares = shares_with_warning("the same directions", 60, 2, new=60, sizes=(2, 5, 20, 100))
    assert max(shares.pop(V) for V in (2, 5, 20, 100)) <= 0.02
    assert min(shares.values()) > 0.9, shares


def test_novelty_of_embeddings_of_any_width():
    rng = np.random.default_rng(0)
    for width in (1, 5, 1024):
        novelty = Novelty.of([rng.normal(size=(3, width)) for _ in range(60)], range(60))
        shares = [novelty(as_study(rng.normal(size=(3, width)))) for _ in range(50)]
        assert 0.35 < np.mean(shares) < 0.65 and novelty(as_study(np.full((2, width), 9))) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("n", [25, 60, 400])
@pytest.mark.parametrize("name", SCALES)
def test_the_share_of_warnings(name, n):
    shares = shares_with_warning(name, n, 3 if n == 400 else 15)
    odd = [shares.pop(x) for x in list(shares) if isinstance(x, str)]
    assert max(shares.values()) <= 0.025, shares  # 0.02, and the error of these simulations
    assert min(odd) > (0.65 if n == 25 else 0.9) or name == "heavy tails", odd


def test_a_score_beyond_all_others():
    """By Student's t for each of two distances; within the others by its rank."""
    distances = np.random.default_rng(0).normal([3, 5], [1, 2], (99, 2))
    calibration = Calibration.of(distances)
    scores = ((distances - calibration.mean) / calibration.sd).max(1)
    for i in (0, 49, 97, 98):  # i + 1 of 99
        study = distances[scores.argsort()[i]]
        assert calibration(study) == pytest.approx((i + 1) / 100, abs=0.003)
    beyond = calibration(calibration.mean + calibration.sd * [0, 6])
    assert 1 - beyond == pytest.approx(2 * stats.t.sf(6 / np.sqrt(1 + 1 / 99), TAIL)) and beyond < 1


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
    assert (usual["warning"] != "").sum() < 3 and usual["novelty"].between(0.05, 0.95).sum() > 15
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
