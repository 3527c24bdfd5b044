"""Metrics and intervals against scikit-learn, scipy, slow obvious versions and manual results."""

import json
import math

import numpy as np
import pytest
from scipy import optimize, special
from scipy import stats as scipy_stats
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

from echofocus_core.base.console import UserError
from echofocus_core.study import metrics as mt
from echofocus_core.study import statistics as st
from echofocus_core.study.kinds.binary import BinaryOutcome
from echofocus_core.study.kinds.multiclass import MulticlassOutcome
from echofocus_core.study.kinds.regression import RegressionOutcome
from echofocus_core.study.kinds.survival import SurvivalOutcome

NAN = math.nan


def studies(seed, n, ties=False):
    """(patients, finding, its probability, measurement, its prediction) of n studies."""
    rng = np.random.default_rng(seed)
    patients = rng.integers(0, max(1, n // 2), n)
    latent = rng.normal(size=n) + 0.5 * rng.normal(size=n)[patients % n]
    truth = (latent + rng.normal(size=n) > 0.8).astype(float)
    probability = special.expit(1.5 * latent - 1)
    ef, actual = 60 + 8 * latent, 58 + 7 * latent + 3 * rng.normal(size=n)
    if ties:
        probability, ef, actual = probability.round(1), ef.round(-1), actual.round(-1)
    return patients, truth, probability, ef, actual


def repeated(weights, *arrays):
    """The resample of a column of weights, study by study."""
    return [np.repeat(a, weights.astype(int), axis=0) for a in arrays]


def each_resample(patients, n_boot=12):
    """Weights (S, B), float32, as in the bootstrap."""
    return np.concatenate(list(st.resamples(patients, n_boot, seed=3)), axis=1)


def in_both_precisions(outcome, patients):
    """Yield (metrics of one resample, its weights, tolerance): all studies, then resamples."""
    with np.errstate(all="ignore"):
        whole, weights = outcome.metrics(np.ones((len(patients), 1))), each_resample(patients)
        some = outcome.metrics(weights)
    yield {k: v[0] for k, v in whole.items()}, np.ones(len(patients)), 1e-9
    for b in range(weights.shape[1]):
        yield {k: v[b] for k, v in some.items()}, weights[:, b], 2e-4


# ------------------------------------------------------------------- each metric, in each resample


def residual(intercept, x, truth):
    return (truth - special.expit(intercept + x)).sum()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [40, 3000])
def test_findings_against_scikit_learn(n, ties):
    patients, y, p, *_ = studies(1, n, ties)
    outcome = BinaryOutcome("VSD", y, p, threshold=0.35, prevalence=0.02)
    for metrics, weights, tolerance in in_both_precisions(outcome, patients):
        y_, p_ = repeated(weights, y, p)
        called = p_ >= 0.35
        (tn, fp), (fn, tp) = sk.confusion_matrix(y_, called)
        positive, negative = sk.class_likelihood_ratios(y_, called)
        sens, spec = tp / (tp + fn), tn / (tn + fp)
        p_in = np.clip(p_, 1e-6, 1 - 1e-6)
        x = special.logit(p_in)[:, None]
        fit = LogisticRegression(C=np.inf, tol=1e-10, max_iter=500).fit(x, y_)
        large = optimize.brentq(residual, -20, 20, args=(x[:, 0], y_))
        bins = np.digitize(p_, np.arange(1, 10) / 10)
        ece = sum(
            abs(y_[bins == b].mean() - p_[bins == b].mean()) * (bins == b).mean()
            for b in np.unique(bins)
        )
        expected = {
            "auroc": sk.roc_auc_score(y_, p_),
            "average_precision": sk.average_precision_score(y_, p_),
            "brier": sk.brier_score_loss(y_, p_),
            "calibration_slope": fit.coef_[0, 0],
            "calibration_intercept": large,
            "ece": ece,
            "sensitivity": sk.recall_score(y_, called),
            "specificity": sk.recall_score(1 - y_, ~called),
            "ppv": sk.precision_score(y_, called),
            "npv": sk.precision_score(1 - y_, ~called),
            "lr_positive": positive,
            "lr_negative": negative,
            "f1": sk.f1_score(y_, called),
            "true_positive": tp,
            "false_positive": fp,
            "true_negative": tn,
            "false_negative": fn,
            "ppv_at_prevalence": sens * 0.02 / (sens * 0.02 + (1 - spec) * 0.98),
            "npv_at_prevalence": spec * 0.98 / (spec * 0.98 + (1 - sens) * 0.02),
        }
        assert set(metrics) == set(expected)
        for name, value in expected.items():
            rel = max(tolerance, 1e-5) if name == "calibration_slope" else tolerance  # its oracle's
            assert metrics[name] == pytest.approx(value, rel=rel, abs=tolerance), name


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [30, 2000])
def test_measurements_against_scikit_learn_and_scipy(n, ties):
    patients, _, _, y, f = studies(2, n, ties)
    outcome = RegressionOutcome("EF", y, f, "%")
    edges = np.quantile(y, [0, 0.25, 0.5, 0.75, 1])
    for metrics, weights, tolerance in in_both_precisions(outcome, patients):
        y_, f_ = repeated(weights, y, f)
        e, sd = f_ - y_, np.std(f_ - y_, ddof=1)
        expected = {
            "median_absolute_error": sk.median_absolute_error(y_, f_),
            "mean_absolute_error": sk.mean_absolute_error(y_, f_),
            "rmse": sk.root_mean_squared_error(y_, f_),
            "r2": sk.r2_score(y_, f_),
            "pearson": scipy_stats.pearsonr(y_, f_)[0],
            "spearman": scipy_stats.spearmanr(y_, f_)[0],
            "bias": e.mean(),
            "loa_low": e.mean() - 1.96 * sd,
            "loa_high": e.mean() + 1.96 * sd,
        }
        for q in range(4):
            low = -np.inf if q == 0 else edges[q]
            part = abs(e[(y_ > low) & (y_ <= edges[q + 1])])
            expected[f"median_absolute_error_q{q + 1}"] = np.median(part) if len(part) else NAN
        assert set(metrics) == set(expected)
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(
                value, rel=tolerance, abs=tolerance, nan_ok=True
            ), name


def test_large_values_lose_no_digits_in_a_resample():
    patients, _, _, y, f = studies(3, 500)
    y, f = y + 1e6, f + 3e6
    outcome = RegressionOutcome("", y, f)
    for metrics, weights, _ in in_both_precisions(outcome, patients):
        y_, f_ = repeated(weights, y, f)
        assert metrics["pearson"] == pytest.approx(np.corrcoef(y_, f_)[0, 1], rel=1e-4)
        width = 3.92 * np.std(f_ - y_, ddof=1)
        assert metrics["loa_high"] - metrics["loa_low"] == pytest.approx(width, rel=0.05)


@pytest.mark.parametrize("n", [60, 1500])
def test_grades_against_scikit_learn(n):
    rng = np.random.default_rng(4)
    patients, y = rng.integers(0, n // 2, n), rng.integers(0, 3, n).astype(float)
    p = special.softmax(rng.normal(size=(n, 3)) + 1.5 * np.eye(3)[y.astype(int)], axis=1).round(2)
    p /= p.sum(axis=1, keepdims=True)
    outcome = MulticlassOutcome("grade", y, p, ("none", "mild", "severe"))
    for metrics, weights, tolerance in in_both_precisions(outcome, patients):
        y_, p_ = repeated(weights, y, p)
        called = p_.argmax(axis=1)
        each = [sk.roc_auc_score(y_ == k, p_[:, k]) for k in range(3)]
        expected = {
            "auroc": sk.roc_auc_score(y_, p_, multi_class="ovr"),
            "auroc_none": each[0],
            "auroc_mild": each[1],
            "auroc_severe": each[2],
            "balanced_accuracy": sk.balanced_accuracy_score(y_, called),
            "kappa": sk.cohen_kappa_score(y_, called, weights="quadratic"),
        }
        assert metrics == pytest.approx(expected, rel=tolerance)
    table = mt.confusion(y, p.argmax(axis=1), 3)[..., 0]
    assert np.array_equal(table, sk.confusion_matrix(y, p.argmax(axis=1)))


def slow_c_index(time, event, risk):
    won = comparable = 0
    for i in range(len(time)):
        for j in range(len(time)):
            if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
                comparable += 1
                won += (risk[i] > risk[j]) + (risk[i] == risk[j]) / 2
    return won / comparable


def slow_dynamic_auroc(time, event, risk, at):
    def uncensored_before(t):
        out = 1.0
        for u in sorted(set(time[(time < t) & ~event])):
            here = (time >= u).sum() - ((time == u) & event).sum()
            out *= 1 - ((time == u) & ~event).sum() / here
        return out

    won = all_ = 0
    for i in np.flatnonzero(event & (time <= at)):
        w = 1 / uncensored_before(time[i])
        for j in np.flatnonzero(time > at):
            all_ += w
            won += w * ((risk[i] > risk[j]) + (risk[i] == risk[j]) / 2)
    return won / all_


@pytest.mark.parametrize("ties", [False, True])
def test_survival_against_every_pair(ties):
    rng = np.random.default_rng(5)
    n = 90
    patients, risk = rng.integers(0, 45, n), rng.normal(size=n)
    time, event = rng.exponential(5 * np.exp(-risk)), rng.random(n) < 0.6
    if ties:
        time, risk = time.round(), risk.round()
    outcome = SurvivalOutcome("death", time, risk, event, years=(1, 3))
    for metrics, weights, tolerance in in_both_precisions(outcome, patients):
        resample = repeated(weights, time, event, risk)
        assert metrics["c_index"] == pytest.approx(slow_c_index(*resample), rel=tolerance)
        for at in (1, 3):
            expected = slow_dynamic_auroc(*resample, at)
            assert metrics[f"auroc_at_{at}"] == pytest.approx(expected, rel=tolerance)


def test_kaplan_meier_of_the_leukaemia_trial():
    """6-mercaptopurine arm of Freireich 1963, as worked in Cox & Oakes and every text since."""
    event = [6, 6, 6, 7, 10, 13, 16, 22, 23]
    lost = [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
    time, died = np.array(event + lost), np.repeat([True, False], [len(event), len(lost)])
    times, survival, low, high = mt.kaplan_meier(time, died)
    at = {t: i for i, t in enumerate(times)}
    expected = {0: 1, 6: 0.857, 7: 0.807, 10: 0.753, 13: 0.690, 16: 0.627, 22: 0.538, 23: 0.448}
    for t, s in expected.items():
        assert survival[at[t]] == pytest.approx(s, abs=6e-4)
    assert (low[at[10]], high[at[10]]) == pytest.approx((0.503, 0.889), abs=2e-3)
    assert np.isnan([low[0], high[0]]).all()


# ------------------------------------------------------------------------------------- degenerate


def by_metric(outcome, patients=None, **more):
    patients = np.arange(len(outcome.truth)) if patients is None else patients
    return {e.metric: e for e in st.estimates([outcome], patients, **more)}


def product_limit(time, event, at):
    """Kaplan-Meier by one factor for each event time until `at`."""
    survival = 1.0
    for t in sorted(set(time[(event == 1) & (time <= at)])):
        survival *= 1 - ((time == t) & (event == 1)).sum() / (time >= t).sum()
    return survival


def test_calibration_of_survival_by_a_loop():
    rng = np.random.default_rng(5)
    n, risk = 240, rng.normal(size=240)
    died, left = rng.exponential(6 * np.exp(-risk)), rng.uniform(2, 9, n)
    time, event = np.minimum(died, left), (died <= left).astype(float)
    patients = np.arange(n) // 2 * 2  # two studies of each; the first counts
    predicted = np.exp(-np.exp(risk)[:, None] * np.array([1, 3, 20]) / 6)
    outcome = SurvivalOutcome("death", time, risk, event, (1, 3, 20), survival=predicted)
    rows = outcome.calibration(patients)
    first, n_groups = slice(None, None, 2), 3  # fewer than 100 events
    assert event[first].sum() < 100 and len(rows) == 3 * n_groups
    for k, year in enumerate((1, 3)):
        p, t, e = predicted[first, k], time[first], event[first]
        order = np.argsort(p)
        for g, part in enumerate(np.array_split(order, n_groups)):
            row = rows[k * n_groups + g]
            assert (row["n"], row["year"]) == (len(part), year)
            assert row["events"] == (e[part] * (t[part] <= year)).sum()
            assert row["predicted"] == pytest.approx(p[part].mean())
            assert row["observed"] == pytest.approx(product_limit(t[part], e[part], year))
    assert all(np.isnan(row["observed"]) for row in rows[-2:])  # beyond the follow-up


def test_interaction_by_hand():
    """Altman & Bland 2003: relative risks 0.67 (0.46 to 0.98) and 0.88 (0.71 to 1.08), p = 0.2."""
    pair = [st.Estimate("a", "x", *x) for x in ((0.67, 0.46, 0.98), (0.88, 0.71, 1.08))]
    assert st.interaction(pair, "lr_positive") == pytest.approx(0.2, abs=0.03)
    means = [st.Estimate("a", "x", m, m - 1.96 * s, m + 1.96 * s) for m, s in ((1, 0.5), (3, 0.8))]
    z = 2 / math.hypot(0.5, 0.8)
    assert st.interaction(means, "percentile") == pytest.approx(
        2 * scipy_stats.norm.sf(z), rel=1e-3
    )
    none = st.Estimate("a", "x", 1.0)
    assert st.interaction([*means, none], "normal") == st.interaction(means, "normal")
    assert math.isnan(st.interaction([means[0], none], "percentile"))


def test_interaction_has_its_level_with_equal_groups():
    rng = np.random.default_rng(1)
    values, se = rng.normal(size=(2000, 4)), np.array([0.5, 1, 1.5, 2])
    p = [
        st.interaction(
            [
                st.Estimate("a", "x", v, v - 1.96 * s, v + 1.96 * s)
                for v, s in zip(row, se, strict=True)
            ],
            "",
        )
        for row in values * se
    ]
    assert scipy_stats.kstest(p, "uniform").pvalue > 0.01


def test_holm_by_hand():
    np.testing.assert_allclose(st.holm([0.01, NAN, 0.04, 0.03, 0.9]), [0.04, NAN, 0.09, 0.09, 0.9])
    assert st.holm([0.6, 0.7]).tolist() == [1, 1] and not len(st.holm([]))


@pytest.mark.parametrize("n", [0, 1, 2, 7])
@pytest.mark.parametrize("kind", ["binary", "regression", "multiclass", "survival"])
def test_few_studies_give_no_wrong_number_and_no_warning(kind, n, recwarn):
    one = np.ones(n)
    outcome = {
        "binary": lambda: BinaryOutcome("a", one, one * 0.3, threshold=0.5, prevalence=0.1),
        "regression": lambda: RegressionOutcome("a", one, one * 0.3),
        "multiclass": lambda: MulticlassOutcome("a", one, np.tile([0.2, 0.8], (n, 1)), ("x", "y")),
        "survival": lambda: SurvivalOutcome("a", one, one, one * 0, years=(1,)),
    }[kind]()
    actual = by_metric(outcome, n_boot=200)
    assert not recwarn.list
    for e in actual.values():
        assert e.n == n and e.label == "a"
        assert np.isfinite(e.value) or e.note, e
        assert np.isfinite([e.ci_low, e.ci_high]).all() or e.note, e
        assert e.ci_low != e.ci_high, e  # no certainty from few studies
        json.dumps(e.row(), allow_nan=False)
    never = {"auroc", "average_precision", "r2", "pearson", "spearman", "c_index", "auroc_at_1"}
    assert np.isnan([actual[m].value for m in never & set(actual)]).all()
    if n == 0:
        notes = {e.note for e in actual.values()}
        assert notes <= {"no study has both a truth and a prediction", "a count"}


def test_net_benefit_and_a_single_class():
    y, p = np.array([0.0, 1, 1, 0]), np.array([0.1, 0.3, 0.9, 0.5])
    assert mt.net_benefit(y, p, [0.2])[0] == pytest.approx((2 - 1 / 4) / 4)
    p = np.array([0.2, 0.4, 0.9])
    none = by_metric(BinaryOutcome("a", np.zeros(3), p, threshold=0.5), n_boot=200)
    assert none["auroc"].note == none["sensitivity"].note == "no positive study"
    assert none["specificity"].value == pytest.approx(2 / 3) and none["auroc"].n_positive == 0
    all_ = by_metric(BinaryOutcome("a", np.ones(3), p), n_boot=200)
    assert all_["auroc"].note == "no negative study" and np.isnan(all_["sensitivity"].value)
    y = np.array([3.0, 4, 5])
    actual = by_metric(RegressionOutcome("a", y, y * 0 + 4, "mm"), n_boot=200)
    assert np.isnan(actual["pearson"].value) and actual["r2"].value == pytest.approx(0)
    assert (actual["rmse"].unit, actual["r2"].unit, actual["r2"].n_positive) == ("mm", "", -1)
    one = by_metric(RegressionOutcome("a", np.arange(9.0), np.arange(9.0) ** 1.1), np.zeros(9))
    assert one["rmse"].value > 0 and np.isnan(one["rmse"].ci_low)  # of one patient


def test_outcomes_that_cannot_be_evaluated():
    for make, label in (
        (lambda: BinaryOutcome("VSD", [0, 2.0], [0.1, 0.2]), "VSD"),
        (lambda: BinaryOutcome("VSD", [0, 1.0], [0.1, 4.0]), "logits"),
        (lambda: BinaryOutcome("VSD", [0, 1.0], [0.1]), "VSD"),
        (lambda: RegressionOutcome("EF", [np.inf, 1.0], [1, 2]), "EF"),
        (lambda: MulticlassOutcome("g", [0, 3.0], np.ones((2, 3)), "abc"), "0 to 2"),
        (lambda: SurvivalOutcome("d", [1, -1.0], [0, 1], [0, 1]), "below zero"),
        (lambda: mt.choose_threshold(np.ones(2), np.ones(2), "sensitivity=95"), "youden"),
    ):
        with pytest.raises(UserError, match=label):
            make()


def test_missing_truths_and_predictions_are_ignored():
    _, y, p, ef, f = studies(6, 200)
    rng = np.random.default_rng(6)
    y_, f_ = np.where(rng.random(200) < 0.3, NAN, y), np.where(rng.random(200) < 0.3, NAN, f)
    present = ~np.isnan(y_)
    gaps, full = BinaryOutcome("a", y_, p), BinaryOutcome("a", y[present], p[present])
    assert gaps.n == present.sum()
    ones = np.ones((200, 1))
    assert gaps.metrics(ones)["auroc"] == full.metrics(ones[present])["auroc"]
    assert RegressionOutcome("a", ef, f_).n == (~np.isnan(f_)).sum()


def test_perfect_separation_has_no_slope_and_an_interval_that_is_not_certain():
    y, p = np.repeat([0.0, 1], [8, 7]), np.linspace(0.1, 0.9, 15)
    actual = by_metric(BinaryOutcome("a", y, p, threshold=0.51))
    assert actual["auroc"].value == 1 and actual["auroc"].ci_high == 1
    assert 0.4 < actual["auroc"].ci_low < 0.7  # by seven patients, not certain
    assert np.isnan(actual["calibration_slope"].value) and actual["calibration_slope"].note
    assert actual["sensitivity"].value == 1 and 0.4 < actual["sensitivity"].ci_low < 0.7
    assert np.isinf(actual["lr_positive"].value) and "infinite" in actual["lr_positive"].note
    assert actual["lr_positive"].row()["value"] is None


# -------------------------------------------------------------------------------------- bootstrap


def test_patients_are_drawn_whole_and_the_same_whatever_the_chunks():
    patients = np.array(["b", "a", "b", "c", "a", "b"])
    assert np.isfinite(np.hstack(list(st.resamples(patients, 2, seed=-1)))).all()
    at_once = np.concatenate(list(st.resamples(patients, 500, 7)), axis=1)
    chunks = list(st.resamples(patients, 500, 7, chunk_bytes=4 * 6 * 33))
    assert len(chunks) == 16 and np.array_equal(np.concatenate(chunks, axis=1), at_once)
    assert (at_once[patients == "b"] == at_once[0]).all()
    drawn = at_once[[0, 1, 3]]
    assert (drawn.sum(axis=0) == 3).all() and (drawn.mean(axis=1) > 0.8).all()
    assert not np.array_equal(at_once, np.concatenate(list(st.resamples(patients, 500, 8)), axis=1))


def test_a_study_twice_adds_nothing_when_its_patient_is_given():
    """Three copies of each study do not change the interval; as other patients they narrow it."""
    _, y, p, *_ = studies(8, 150)
    width = {}
    for name, copies, distinct in (("once", 1, False), ("copies", 3, False), ("patients", 3, True)):
        patients = np.arange(150 * copies) if distinct else np.tile(np.arange(150), copies)
        e = by_metric(BinaryOutcome("a", np.tile(y, copies), np.tile(p, copies)), patients)["auroc"]
        width[name] = e.ci_high - e.ci_low
    assert width["copies"] == pytest.approx(width["once"], rel=1e-3)
    assert width["patients"] == pytest.approx(width["once"] / np.sqrt(3), rel=0.15)


def test_macro_means_are_of_the_same_resamples_and_never_of_two_units():
    patients, y, p, ef, f = studies(9, 300)
    of = [
        BinaryOutcome("a", y, p),
        BinaryOutcome("b", y[::-1], p),
        BinaryOutcome("c", y * 0, p),
    ]
    actual = {(e.label, e.metric): e for e in st.estimates(of, patients, n_boot=200)}
    mean = actual["mean", "auroc"]
    assert mean.value == pytest.approx(
        (actual["a", "auroc"].value + actual["b", "auroc"].value) / 2
    )
    assert mean.note == "mean of 2 of 3 labels" and mean.ci_low < mean.value < mean.ci_high
    of = [RegressionOutcome("a", ef, f, "%"), RegressionOutcome("b", ef, f, "mm")]
    named = {e.metric for e in st.estimates(of, patients, n_boot=200) if e.label == "mean"}
    assert "r2" in named and "rmse" not in named


TRUE = {"auroc": 0.9237, "sensitivity": 0.9080, "median_absolute_error": 3.634, "r2": 0.7087}


def cohort(rng, n_patients):
    """One to five studies a patient that resemble each other; TRUE is of 4.5 million of them."""
    patients = np.repeat(np.arange(n_patients), rng.integers(1, 6, n_patients))
    of_patient, scanner = rng.normal(size=(2, n_patients))[:, patients]
    of_study, noise = rng.normal(size=(2, len(patients)))
    latent = 0.8 * of_patient + 0.6 * of_study
    score = 1.2 * latent + 0.6 * scanner + 0.5 * noise
    p = special.expit(2 * score - 2.6)
    ef, actual = 60 + 10 * latent, 60 + 8 * latent + 4 * scanner + 3 * noise
    finding = (latent > 1).astype(float)
    return patients, [
        BinaryOutcome("a", finding, p, threshold=0.2),
        RegressionOutcome("b", ef, actual),
    ]


def coverage(n_cohorts, n_patients, n_boot):
    """{metric: percent of cohorts whose interval contains the true value}."""
    inside = dict.fromkeys(TRUE, 0)
    for i in range(n_cohorts):
        patients, outcomes = cohort(np.random.default_rng(1000 + i), n_patients)
        for e in st.estimates(outcomes, patients, n_boot, seed=i):
            if e.metric in TRUE and e.label != "mean":
                inside[e.metric] += e.ci_low <= TRUE[e.metric] <= e.ci_high
    return {k: 100 * v / n_cohorts for k, v in inside.items()}


def test_intervals_contain_the_true_value():
    for metric, percent in coverage(60, 100, 200).items():
        assert 87 <= percent <= 100, metric


@pytest.mark.slow
def test_intervals_contain_the_true_value_95_times_in_100():
    for metric, percent in coverage(1000, 200, 1000).items():
        assert 93.5 <= percent <= 96.5, metric


# ------------------------------------------------------------------------------------- two models


def slow_delong(y, scores):
    """The covariance of AUROCs by the formulas of DeLong 1988, over all pairs."""
    a, b = scores[y == 1], scores[y == 0]
    won = (a[:, None] > b[None]) + (a[:, None] == b[None]) / 2  # (m, n, M)
    of_a, of_b = won.mean(axis=1), won.mean(axis=0)
    return of_a.mean(axis=0), np.cov(of_a.T) / len(a) + np.cov(of_b.T) / len(b)


def two_models(seed, n=300, ties=False):
    patients, y, p, *_ = studies(seed, n, ties)
    q = special.expit(
        special.logit(np.clip(p, 0.02, 0.98)) + np.random.default_rng(seed).normal(size=n)
    )
    return patients, y, p, q.round(1) if ties else q


@pytest.mark.parametrize("ties", [False, True])
def test_delong_against_every_pair(ties):
    _, y, p, q = two_models(10, ties=ties)
    scores = np.stack([p, q], axis=1)
    area, covariance = st.delong(y, scores)
    expected, expected_covariance = slow_delong(y, scores)
    assert area == pytest.approx(expected) and covariance == pytest.approx(expected_covariance)
    assert area[0] == pytest.approx(sk.roc_auc_score(y, p))
    same = st.delong(y, scores, np.random.default_rng(0).permutation(len(y)))
    assert same[1] == pytest.approx(covariance)


def test_delong_against_the_bootstrap_with_several_studies_a_patient():
    _, y, p, q = two_models(11, 400)
    patients = np.repeat(np.arange(100), 4)
    y = np.repeat(y[::4], 4)  # a patient's studies have the same truth: far from independent
    of = [[BinaryOutcome("a", y, x)] for x in (p, q)]
    difference = {e.metric: e for e in st.compare(*of, patients, n_boot=4000)}["auroc"]
    one, other = (st.bootstrap(o, patients, 4000)["a", "auroc"] for o in of)
    _, covariance = st.delong(y, np.stack([p, q], axis=1), patients)
    expected = np.cov(one[1:], other[1:])
    assert covariance == pytest.approx(expected, rel=0.12)
    assert difference.value == pytest.approx(mt.auroc(y, p) - mt.auroc(y, q))
    sd = np.std(one[1:] - other[1:])
    assert difference.ci_high - difference.ci_low == pytest.approx(3.92 * sd, rel=0.1)
    z = difference.value / sd
    assert difference.p_value == pytest.approx(2 * scipy_stats.norm.sf(abs(z)), abs=0.03)


def test_two_models_are_compared_on_the_studies_of_both():
    patients, _, _, ef, f = studies(12, 200)
    a, b = RegressionOutcome("EF", ef, np.where(np.arange(200) < 50, NAN, f), "%"), f + 2
    actual = {e.metric: e for e in st.compare([a], [RegressionOutcome("EF", ef, b, "%")], patients)}
    assert actual["bias"].value == pytest.approx(-2) and actual["bias"].n == 150
    assert actual["bias"].unit == "%" and actual["pearson"].value == pytest.approx(0, abs=1e-12)
    rmse = [np.sqrt(np.mean((x - ef)[50:] ** 2)) for x in (f, b)]
    assert actual["rmse"].value == pytest.approx(rmse[0] - rmse[1])
    assert actual["rmse"].ci_low < actual["rmse"].value < actual["rmse"].ci_high
    with pytest.raises(UserError, match="EF"):
        st.compare([a], [RegressionOutcome("EF", ef + 1, b)], patients)
    with pytest.raises(UserError, match="label"):
        st.compare([a], [RegressionOutcome("LVEDV", ef, b)], patients)


# ------------------------------------------------------------------------------ thresholds, pooling


@pytest.mark.parametrize("ties", [False, True])
def test_thresholds_against_every_threshold(ties):
    _, y, p, *_ = studies(13, 300, ties)
    p = np.where(np.arange(300) == 5, NAN, p)
    present = ~np.isnan(p)
    cuts = np.unique(p[present])
    sens = np.array([(p[present][y[present] == 1] >= c).mean() for c in cuts])
    spec = np.array([(p[present][y[present] == 0] < c).mean() for c in cuts])
    expected = {
        "youden": cuts[np.argmax((sens + spec).round(12))],
        "sensitivity=0.95": cuts[sens >= 0.95].max(),
        "specificity=0.9": cuts[spec >= 0.9].min(),
    }
    for rule, cut in expected.items():
        actual = mt.choose_threshold(y, p, rule)
        assert actual < cut, rule
        assert actual == pytest.approx((cut + cuts[cuts < cut].max(initial=0)) / 2), rule


def test_thresholds_of_few_or_useless_predictions():
    y, p = np.array([0.0, 0, 1, 1]), np.array([0.1, 0.4, 0.6, 0.8])
    assert mt.choose_threshold(y, p) == pytest.approx(0.5)
    assert mt.choose_threshold(y, 1 - p) is None  # worse than chance
    assert mt.choose_threshold(y, p * 0 + 0.5) is None
    assert mt.choose_threshold(y * 0, p) is None
    assert mt.choose_threshold(y, 1 - p, "specificity=1") is None
    assert mt.choose_threshold(y, p * 0 + 0.5, "sensitivity=0.9") == 0.25  # all are positive
    hundred = np.arange(100) / 100
    actual = mt.choose_threshold(np.repeat([0.0, 1, 1], [80, 1, 19]), hundred, "sensitivity=0.95")
    assert actual == pytest.approx(0.805)  # 19 of 20, however 0.95 is rounded


def test_studies_of_a_patient_are_pooled():
    patients = np.array(["b", "a", "b", "c", "b", "c"])
    truth = np.array([1.0, 0, 1, 0, NAN, 1])
    p = np.array([0.2, 0.5, 0.4, 0.1, 0.9, 0.3])
    finding = BinaryOutcome("x", truth, p)
    for rule, y, q, mixed in (
        ("mean", [0, 1, NAN], [0.5, 0.3, 0.2], 1),
        ("first", [0, 1, 0], [0.5, 0.2, 0.1], 0),
        ("last", [0, 1, 1], [0.5, 0.4, 0.3], 0),
    ):
        pooled, n = finding.by_patient(patients, rule)
        assert np.array_equal(pooled.truth, y, equal_nan=True) and n == mixed
        assert pooled.predicted == pytest.approx(q)
    pooled, n = RegressionOutcome("x", truth * 10, p).by_patient(patients, "mean")
    assert list(pooled.truth) == [0, 10, 5] and n == 0
    grades = MulticlassOutcome("x", truth, np.stack([p, 1 - p], axis=1), "ab")
    pooled, _ = grades.by_patient(patients, "mean")
    assert pooled.predicted == pytest.approx(np.array([[0.5, 0.5], [0.3, 0.7], [0.2, 0.8]]))
    none, _ = BinaryOutcome("x", truth * NAN, p).by_patient(patients, "mean")
    assert np.isnan(none.predicted).all() and len(none.truth) == 3
    with pytest.raises(UserError, match="--pool first or last"):
        SurvivalOutcome("x", truth, p, truth).by_patient(patients, "mean")


def test_p_of_the_bootstrap_is_where_the_interval_ends_at_0():
    less, n = np.random.default_rng(0).normal(0.3, 0.2, 2000), 15
    p = st.percentile_p(less, n)
    z = np.sqrt(n / (n - 1)) * scipy_stats.t.isf(p / 2, n - 1)
    assert 0.1 < p < 0.3 and abs((less <= 0).mean() - scipy_stats.norm.sf(z)) < 1e-9
    assert st.percentile_p(-less, n) == pytest.approx(p)
    assert 0 < st.percentile_p(less + 9, n) < 0.01 and st.percentile_p(less * 0, n) == 1
