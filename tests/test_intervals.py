"""Intervals of metrics: closed forms for independent studies, and coverage in simulated cohorts."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.coverage import FINDINGS, coverage, finding
from echofocus_core.study.kinds.binary import BinaryOutcome
from echofocus_core.study.kinds.multiclass import MulticlassOutcome
from echofocus_core.study.kinds.regression import RegressionOutcome
from echofocus_core.study.statistics import compare, estimates


def by_metric(outcome, n_boot=4000, patients=None):
    patients = np.arange(len(outcome.truth)) if patients is None else patients
    return {x.metric: x for x in estimates([outcome], patients, n_boot)}


def counted(tp, fn, fp, tn):
    """A finding with these counts at the threshold 0.5."""
    y = np.repeat([1.0, 1, 0, 0], [tp, fn, fp, tn])
    return BinaryOutcome("VSD", y, np.repeat([0.9, 0.2, 0.8, 0.1], [tp, fn, fp, tn]), 0.5)


def test_likelihood_ratios_have_simels_intervals():
    rows = by_metric(counted(80, 20, 60, 240))
    t = stats.t.ppf(0.975, 99)
    for name, (a, n), (b, m) in (
        ("lr_positive", (0.8, 100), (0.2, 300)),
        ("lr_negative", (0.2, 100), (0.8, 300)),
    ):
        half = t * np.sqrt((1 - a) / (a * n) + (1 - b) / (b * m))
        assert rows[name].value == pytest.approx(a / b)
        expected = [a / b * np.exp(-half), a / b * np.exp(half)]
        assert [rows[name].ci_low, rows[name].ci_high] == pytest.approx(expected, rel=0.04)


def test_an_infinite_ratio_has_a_lower_limit():
    row = by_metric(counted(16, 4, 0, 80))["lr_positive"]
    assert row.value == row.ci_high == np.inf
    assert 3 < row.ci_low < 40  # with 0.5 added: 16.5 / 21 over 0.5 / 81 is 127
    assert by_metric(counted(20, 0, 10, 80))["lr_negative"].ci_low == 0


def test_limits_of_agreement_have_bland_and_altmans_standard_error():
    rng = np.random.default_rng(0)
    truth = rng.normal(60, 8, 50)
    error = rng.normal(0, 5, 50)
    rows = by_metric(RegressionOutcome("EF", truth, truth + error, "%"))
    s, n = error.std(ddof=1), 50
    half = stats.t.ppf(0.975, n - 1) * s * np.sqrt(1 / n + 1.96**2 / (2 * (n - 1)))
    for name, sign in (("loa_low", -1), ("loa_high", 1)):
        middle = error.mean() + sign * 1.96 * s
        assert rows[name].ci_low == pytest.approx(middle - half, abs=0.03 * half)
        assert rows[name].ci_high == pytest.approx(middle + half, abs=0.03 * half)


def test_few_positives_widen_the_interval_of_the_area():
    """Wilson's interval with the bootstrap's variance, and Student's t for 5 positive patients."""
    _, outcome = finding(np.random.default_rng(1), 300, 0.02)
    row = by_metric(outcome)["auroc"]
    assert outcome.n_positive == 5
    z = np.sqrt(5 / 4) * stats.t.ppf(0.975, 4)
    sd = np.sqrt(variance_of_area(outcome.truth, outcome.predicted))
    size = row.value * (1 - row.value) / sd**2
    centre, scale = row.value + z**2 / (2 * size), 1 + z**2 / size
    half = z * np.sqrt(row.value * (1 - row.value) / size + z**2 / (4 * size**2))
    expected = [(centre - half) / scale, (centre + half) / scale]
    assert [row.ci_low, row.ci_high] == pytest.approx(expected, abs=0.06)


def variance_of_area(y, p):
    """DeLong's variance without the correction n / (n - 1), as a bootstrap estimates it."""
    wins = (p[y == 1][:, None] > p[y == 0]) + 0.5 * (p[y == 1][:, None] == p[y == 0])
    return wins.mean(1).var() / (y == 1).sum() + wins.mean(0).var() / (y == 0).sum()


def test_calibration_error_has_no_interval_but_its_expected_value():
    """A calibrated model has that error on average over cohorts."""
    rng, values, notes = np.random.default_rng(2), [], []
    for _ in range(60):
        p = rng.uniform(size=120)
        row = by_metric(BinaryOutcome("VSD", (rng.random(120) < p) * 1.0, p), 100)["ece"]
        assert np.isnan(row.ci_low)
        values.append(row.value)
        notes.append(float(row.note.split("about ")[1].split()[0]))
    assert np.mean(notes) == pytest.approx(np.mean(values), rel=0.08)


def test_probabilities_of_0_or_1_are_counted():
    rng = np.random.default_rng(3)
    p = rng.uniform(0.05, 0.95, 200)
    y = (rng.random(200) < p) * 1.0
    rows = by_metric(BinaryOutcome("VSD", y, p), 100)
    clipped = np.append(p, [0, 0, 1])
    row = by_metric(BinaryOutcome("VSD", np.append(y, [1, 0, 1]), clipped), 100)
    assert rows["calibration_slope"].note == ""
    note = row["calibration_slope"].note
    assert note.startswith("3 probabilities")
    assert f"{rows['calibration_slope'].value:.3g}" in note
    assert row["calibration_slope"].value < 0.75 * rows["calibration_slope"].value


def test_few_patients_have_no_interval():
    rng = np.random.default_rng(4)
    truth = rng.normal(60, 8, 12)
    rows = by_metric(RegressionOutcome("EF", truth, truth + rng.normal(0, 5, 12), "%"))
    assert np.isfinite(rows["median_absolute_error"].ci_low)
    assert np.isnan(rows["median_absolute_error_q1"].ci_low)  # of 3 patients
    grades = np.array([0, 1, 0, 1.0]), np.eye(2)[[0, 1, 1, 1]] * 0.8 + 0.1
    pair = RegressionOutcome("EF", truth[:4], truth[:4] + np.array([1, -2, 3, 0]), "%")
    patients = np.array([0, 0, 1, 1])  # whose extremes the percentiles would be
    for few in (pair, MulticlassOutcome("grade", *grades, ("no", "yes"))):
        for row in by_metric(few, 200, patients).values():
            if np.isfinite(row.value) and row.metric in [m.name for m in few.METRICS]:
                assert np.isnan(row.ci_low) and row.note == "no interval: fewer than 6 patients"
    other = RegressionOutcome("EF", truth[:4], truth[:4] + np.array([2, 1, 0, 3]), "%")
    assert all(np.isnan(row.ci_low) for row in compare([pair], [other], patients, 200))


def test_a_difference_of_areas_uses_the_rarer_class():
    rng = np.random.default_rng(5)
    patients, a = finding(rng, 200, 0.03)
    b = BinaryOutcome(a.label, a.truth, rng.random(len(a.truth)), a.threshold)
    row = next(x for x in compare([a], [b], patients, 200) if x.metric == "auroc")
    sd = (row.ci_high - row.ci_low) / 2 / stats.t.ppf(0.975, a.n_positive - 1)
    assert row.p_value == pytest.approx(2 * stats.t.sf(row.value / sd, a.n_positive - 1))


def test_coverage_with_few_positives():
    rates = coverage(finding, FINDINGS["300 patients, 2 %"], 60, n_boot=300)
    for metric in ("auroc", "average_precision", "lr_positive", "calibration_slope"):
        assert rates[metric][0] >= 0.88, metric  # three standard errors below 0.95


@pytest.mark.slow
@pytest.mark.parametrize("scenario", FINDINGS)
def test_coverage(scenario):
    rates = coverage(finding, FINDINGS[scenario], 400)
    if "rounded" in scenario:  # the slope depends on how near to 0 and 1 probabilities count
        del rates["calibration_slope"]
    assert len(rates) >= 11
    assert {metric: rate for metric, (rate, _) in rates.items() if rate < 0.93} == {}
