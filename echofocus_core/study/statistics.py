"""Metrics with 95 % intervals from truths and predictions: pure functions of arrays.

    outcomes = [BinaryOutcome("VSD", truth, p, threshold=0.31), RegressionOutcome("EF", ef, f, "%")]
    for estimate in estimates(outcomes, patients): print(estimate.row())

An outcome is a label with its truths and predictions. Its `metrics(weights)` are computed from
`weights` (S, B): how often each of S studies occurs in each of B resamples. The value is the same
computation with weights of one, so that value and interval are consistent. Patients are resampled,
not studies: a resample has all studies of a patient, or none.

Truths are NaN if missing; such studies are ignored.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import special
from threadpoolctl import threadpool_limits

from echofocus_core.base.console import UserError
from echofocus_core.study import metrics as mt

CHUNK_BYTES = 2**24  # of weights, to fit the cache; a metric needs several arrays of this size
QUARTERS = 4  # quantile groups of the truth, for which a regression's error is also computed
COUNTS = ("true_positive", "false_positive", "true_negative", "false_negative")
DISCRIMINATION = (
    *("auroc", "average_precision", "brier"),
    *("calibration_slope", "calibration_intercept", "ece"),
)
AT_THRESHOLD = ("sensitivity", "specificity", "ppv", "npv", "lr_positive", "lr_negative", "f1")
AT_PREVALENCE = ("ppv_at_prevalence", "npv_at_prevalence")


@dataclass(frozen=True)
class Estimate:
    """A metric of a label with its 95 % interval.

    value, ci_low, ci_high are NaN if not defined; `note` then gives the reason. n: number of
    studies; n_positive: those with the finding or event (-1: does not apply); n_boot: number of
    resamples with a value; p_value: only of a difference.
    """

    label: str
    metric: str
    value: float
    ci_low: float = np.nan
    ci_high: float = np.nan
    n: int = 0
    n_positive: int = -1
    unit: str = ""
    note: str = ""
    n_boot: int = 0
    p_value: float = np.nan

    def row(self):
        """A dict for a table or JSON; numbers that are not finite are None."""
        row = {
            k: v if isinstance(v, str) or np.isfinite(v) else None for k, v in vars(self).items()
        }
        return row | {"n_positive": None if self.n_positive < 0 else self.n_positive}


# ---------------------------------------------------------------------------------------- outcomes


@dataclass(eq=False)
class Outcome:
    """A label with its truths and predictions. `truth` (S,), NaN if missing.

    A subclass for a kind of label declares its main metric (`headline`), the metrics in the tables
    of the page by heading, and its figures (of `report.curves`).
    """

    label: str
    truth: np.ndarray

    kind = headline = ""
    tables = ()
    figures = ()
    n_positive = -1
    threshold = None

    @property
    def predicted(self):
        """(S,) or (S, K)."""
        raise NotImplementedError

    @property
    def truth_columns(self):
        """Name -> (S,): the truths of the table `saveout`."""
        return {self.label: self.truth}

    @property
    def predicted_columns(self):
        """Name -> (S,): the predictions of the table `saveout`, named like a model's outputs."""
        return {self.label: self.predicted}

    @cached_property
    def usable(self):
        """(S,) bool: studies with a truth and a prediction."""
        return np.isfinite(self.truth) & finite_rows(self.predicted)

    @property
    def n(self):
        return int(self.usable.sum())

    def pairs(self):
        """(truths, predictions) of the usable studies."""
        return self.truth[self.usable], self.predicted[self.usable]

    def unit(self, metric):
        return ""

    def metrics(self, weights):
        """Metric -> (B,): its value in each resample. weights (S, B), see above."""
        with np.errstate(all="ignore"):  # an undefined value is NaN, and estimate() reports it
            return self.compute(weights if self.usable.all() else weights[self.usable])

    def compute(self, weights):
        """`metrics` of the usable studies, with their weights (n, B)."""
        raise NotImplementedError

    def denominator_mask(self, metric):
        """(S,) bool: the denominator, if the metric is a proportion of studies; else None."""
        return None

    def why_missing(self, metric):
        """Why a metric is not defined for these studies."""
        return "no study has both a truth and a prediction" if not self.n else ""

    def arrays(self):
        """Field -> array, for the fields that have one row per study."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: v for name, v in values.items() if isinstance(v, np.ndarray)}

    def take(self, rows):
        """The outcome of some studies. rows: an index or a mask."""
        return replace(self, **{name: values[rows] for name, values in self.arrays().items()})

    def by_patient(self, patients, rule):
        """(outcome with one row per patient, in sorted order; number of patients without a truth
        because their studies differ). rule: mean, first or last of the patient's usable studies."""
        patients, usable = np.asarray(patients), self.usable
        table = pd.concat(
            {name: pd.DataFrame(x[usable]) for name, x in self.arrays().items()}, axis=1
        )
        groups, names = table.groupby(patients[usable]), np.unique(patients)
        rows = getattr(groups, rule)().reindex(names)
        pooled = {
            name: rows[name].to_numpy().reshape(-1, *values.shape[1:])
            for name, values in self.arrays().items()
        }
        mixed = np.zeros(len(names), bool)
        if rule == "mean" and not isinstance(self, RegressionOutcome):
            truths = pd.Series(self.truth[usable]).groupby(patients[usable]).nunique()
            mixed = truths.reindex(names).to_numpy() > 1
        pooled["truth"] = np.where(mixed, np.nan, pooled["truth"])
        return replace(self, **pooled), int(mixed.sum())


def check_arrays(label, *arrays):
    """Float arrays of one length, the truth (S,) first. Raises UserError with the label's name."""
    arrays = [np.asarray(x, float) for x in arrays]
    if arrays[0].ndim != 1 or any(len(x) != len(arrays[0]) for x in arrays):
        shapes = ", ".join(str(x.shape) for x in arrays)
        raise UserError(f"{label}: truths and predictions have different shapes: {shapes}")
    if any(np.isinf(x).any() for x in arrays):
        raise UserError(f"{label}: a truth or a prediction is infinite")
    return arrays


def finite_rows(values):
    """(S,) bool of (S,) or (S, K)."""
    return np.isfinite(values) if values.ndim == 1 else np.isfinite(values).all(axis=1)


def smaller(a, b):
    return a if a.sum() <= b.sum() else b


@dataclass(eq=False)
class BinaryOutcome(Outcome):
    """A finding: truth 0 or 1, probability (S,). A study is positive from `threshold` on.

    threshold: one number, or (S,) one per study: each fold of a cross-validation has its own.
    """

    probability: np.ndarray
    threshold: float | np.ndarray | None = None
    prevalence: float | None = None

    kind, headline = "binary", "auroc"
    tables = (
        ("Discrimination and calibration", DISCRIMINATION),
        ("At the threshold", AT_THRESHOLD),
    )
    figures = ("roc_curves", "pr_curves", "reliability", "decision_curves", "confusion")

    def __post_init__(self):
        self.truth, self.probability = check_arrays(self.label, self.truth, self.probability)
        if not np.isin(self.truth[np.isfinite(self.truth)], (0, 1)).all():
            raise UserError(f"{self.label}: a truth is neither 0, 1 nor missing")
        if np.any((self.probability < 0) | (self.probability > 1)):
            raise UserError(
                f"{self.label}: a probability is not between 0 and 1; are these logits?"
            )
        cuts = np.atleast_1d(0.0 if self.threshold is None else self.threshold)
        if (cuts < 0).any() or (cuts > 1).any():
            raise UserError(f"{self.label}: a threshold is not between 0 and 1")

    @property
    def predicted(self):
        return self.probability

    @property
    def n_positive(self):
        return int(self.truth[self.usable].sum())

    @property
    def positive(self):
        """(S,) bool: positive at the threshold; none without a threshold."""
        return self.probability >= (np.inf if self.threshold is None else self.threshold)

    def denominator_mask(self, metric):
        with_finding, without = (self.usable & (self.truth == y) for y in (1, 0))
        return {
            "auroc": smaller(with_finding, without),
            "sensitivity": with_finding,
            "specificity": without,
            "ppv": self.usable & self.positive,
            "npv": self.usable & ~self.positive,
        }.get(metric)

    def why_missing(self, metric):
        if text := super().why_missing(metric):
            return text
        if metric in AT_THRESHOLD + COUNTS + AT_PREVALENCE and self.threshold is None:
            return "no threshold is stored with the model"
        if not self.n_positive:
            return "no positive study"
        if self.n_positive == self.n:
            return "no negative study"
        if metric in AT_PREVALENCE and self.prevalence is None:
            return "no prevalence is given"
        if metric.startswith("calibration"):
            return "no finite fit: the probabilities are all equal or separate the classes"
        return "division by zero: all or none of the studies are positive at the threshold"

    def compute(self, weights):
        y, p, positive = (x[self.usable] for x in (self.truth, self.probability, self.positive))
        metrics = mt.ranking(y, p, weights) | mt.calibration(y, p, weights)
        cells = [positive * y, positive * (1 - y), ~positive * (1 - y), ~positive * y]
        counts = mt.sums(cells, weights)
        if self.threshold is None:
            counts = np.full_like(counts, np.nan)
        return metrics | mt.operating(*counts, self.prevalence)


@dataclass(eq=False)
class RegressionOutcome(Outcome):
    """A measurement in `units`: truth and values (S,)."""

    values: np.ndarray
    units: str = ""

    kind, headline = "regression", "median_absolute_error"
    tables = (
        ("Error", ("median_absolute_error", "mean_absolute_error", "rmse", "bias")),
        ("Agreement", ("loa_low", "loa_high", "r2", "pearson", "spearman")),
    )
    figures = ("scatter_plots", "bland_altman")

    def __post_init__(self):
        self.truth, self.values = check_arrays(self.label, self.truth, self.values)

    @property
    def predicted(self):
        return self.values

    def unit(self, metric):
        return "" if metric in ("r2", "pearson", "spearman") else self.units

    def why_missing(self, metric):
        if text := super().why_missing(metric):
            return text
        if self.n == 1:
            return "only one study"
        if np.ptp(self.truth[self.usable]) == 0:
            return "the truth is the same in all studies"
        if np.ptp(self.values[self.usable]) == 0:
            return "the prediction is the same in all studies"
        return "no study in this quarter"

    @cached_property
    def edges(self):
        """(QUARTERS + 1,): quantiles of the truth, the limits of the quarters q1, q2, ..."""
        truth = self.truth[self.usable]
        return np.quantile(truth, np.linspace(0, 1, QUARTERS + 1)) if len(truth) else np.array([])

    def compute(self, weights):
        y, f = self.pairs()
        metrics = mt.errors(y, f, weights) | {"spearman": mt.spearman(y, f, weights)}
        metrics["median_absolute_error"] = mt.weighted_median(abs(f - y), weights)
        part = np.searchsorted(self.edges[1:-1], y, side="left")
        for q in range(QUARTERS):
            name, rows = f"median_absolute_error_q{q + 1}", np.flatnonzero(part == q)
            metrics[name] = mt.weighted_median(abs(f - y)[rows], weights[rows])
        return metrics


@dataclass(eq=False)
class MulticlassOutcome(Outcome):
    """Grades: truth 0 .. K-1, probabilities (S, K), `classes` their K names in order."""

    probabilities: np.ndarray
    classes: tuple[str, ...]

    kind, headline = "multiclass", "auroc"
    tables = (("Grades", ("auroc", "balanced_accuracy", "kappa")),)
    figures = ("roc_classes", "confusion_classes")

    def __post_init__(self):
        self.truth, self.probabilities = check_arrays(self.label, self.truth, self.probabilities)
        self.classes, K = tuple(self.classes), len(self.classes)
        if self.probabilities.shape != (len(self.truth), K):
            shape = self.probabilities.shape
            raise UserError(f"{self.label}: {K} classes, probabilities {shape}")
        if not np.isin(self.truth[np.isfinite(self.truth)], range(K)).all():
            raise UserError(f"{self.label}: a truth is not one of 0 to {K - 1}")

    @property
    def predicted(self):
        return self.probabilities

    @property
    def truth_columns(self):
        names = np.array([*self.classes, None], object)
        return {self.label: names[np.where(np.isfinite(self.truth), self.truth, -1).astype(int)]}

    @property
    def predicted_columns(self):
        names = [f"{self.label}_{name}" for name in self.classes]
        return dict(zip(names, self.probabilities.T, strict=True))

    def denominator_mask(self, metric):
        for k, name in enumerate(self.classes):
            if metric == f"auroc_{name}":
                of_class = self.usable & (self.truth == k)
                return smaller(of_class, self.usable & ~of_class)
        return None

    def why_missing(self, metric):
        if text := super().why_missing(metric):
            return text
        absent = set(range(len(self.classes))) - set(self.truth[self.usable].astype(int))
        names = ", ".join(self.classes[k] for k in sorted(absent))
        return f"no study of class {names}" if absent else "all studies are of one class"

    def compute(self, weights):
        y, p = self.pairs()
        areas = [mt.auroc(y == k, p[:, k], weights) for k in range(len(self.classes))]
        metrics = {"auroc": np.mean(areas, axis=0)}
        metrics |= {f"auroc_{name}": x for name, x in zip(self.classes, areas, strict=True)}
        table = mt.confusion(y, p.argmax(axis=1), len(self.classes), weights)
        return metrics | mt.agreement(table)


@dataclass(eq=False)
class SurvivalOutcome(Outcome):
    """Time to an event: truth = time (S,), event 1 or 0 (censored), risk (S,): higher is earlier.

    `years`: the times at which the cumulative/dynamic AUROC is given; a year is `per_year` units.
    """

    event: np.ndarray
    risk: np.ndarray
    years: tuple[float, ...] = ()
    units: str = "years"
    per_year: float = 1.0

    kind, headline = "survival", "c_index"
    tables = (("Survival", ("c_index",)),)
    figures = ("kaplan_meier",)

    def __post_init__(self):
        arrays = check_arrays(self.label, self.truth, self.event, self.risk)
        self.truth, self.event, self.risk = arrays
        if not np.isin(self.event[np.isfinite(self.event)], (0, 1)).all():
            raise UserError(f"{self.label}: an event is neither 0, 1 nor missing")
        if (self.truth < 0).any():
            raise UserError(f"{self.label}: a time is below zero")

    @property
    def predicted(self):
        return np.stack([self.event, self.risk], axis=1)

    @property
    def truth_columns(self):
        return {self.label: self.truth, f"{self.label}_event": self.event}

    @property
    def predicted_columns(self):
        return {f"{self.label}_risk": self.risk}

    @property
    def n_positive(self):
        return int(self.event[self.usable].sum())

    def by_patient(self, patients, rule):
        if rule == "mean":
            raise UserError(f"{self.label}: times cannot be averaged; use --pool first or last")
        return super().by_patient(patients, rule)

    def denominator_mask(self, metric):
        with_event = self.usable & (self.event == 1)
        if metric == "c_index":
            return with_event
        at = float(metric.removeprefix("auroc_at_")) * self.per_year
        case = with_event & (self.truth <= at)
        return smaller(case, self.usable & ~case)

    def why_missing(self, metric):
        if text := super().why_missing(metric):
            return text
        if not self.n_positive:
            return "no event"
        if metric == "c_index":
            return "no comparable pair of studies"
        return "no event before this time, or no follow-up beyond it"

    def compute(self, weights):
        time, risk = self.truth[self.usable], self.risk[self.usable]
        event = self.event[self.usable] == 1
        metrics = {"c_index": mt.c_index(time, event, risk, weights)}
        for year in self.years:
            auroc = mt.dynamic_auroc(time, event, risk, year * self.per_year, weights)
            metrics[f"auroc_at_{year:g}"] = auroc
        return metrics


# ------------------------------------------------------------------------ resamples and intervals


def resamples(patients, n_boot, seed=0, chunk_bytes=CHUNK_BYTES):
    """Yield weights (S, b), float32, in chunks of at most `chunk_bytes`: `n_boot` resamples in all.

    A resample draws as many patients as there are, with replacement; a study counts as often as its
    patient was drawn. patients (S,): any identifiers. The draws depend only on patients and seed.
    """
    names, patient = np.unique(np.asarray(patients), return_inverse=True)
    rng = np.random.default_rng(seed % 2**64)  # numpy takes no negative seed
    at_once = max(1, chunk_bytes // (4 * max(len(patient), 1)))
    for start in range(0, n_boot if len(names) else 0, at_once):
        b = min(at_once, n_boot - start)
        drawn = rng.integers(len(names), size=(b, len(names)))
        cell = drawn * b + np.arange(b)[:, None]
        counts = np.bincount(cell.ravel(), minlength=b * len(names)).astype(np.float32)
        yield counts.reshape(len(names), b)[patient]


def bootstrap(outcomes, patients, n_boot=1000, seed=0):
    """{(label, metric): (1 + n_boot,)}: the value on all studies, then on each resample of the
    patients. All outcomes use the same resamples."""
    threads = max(1, min(len(outcomes), os.cpu_count() or 1, 8))  # one label per thread
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:

        def metrics(weights):
            by_label = pool.map(lambda o: o.metrics(weights), outcomes)
            pairs = zip(outcomes, by_label, strict=True)
            return {(o.label, name): v for o, values in pairs for name, v in values.items()}

        parts = [metrics(np.ones((len(patients), 1)))]
        parts += [metrics(weights) for weights in resamples(patients, n_boot, seed)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def mean_interval(values, patients, n_boot=1000):
    """(low, high): 95 % percentile interval of the mean of values (S,), over patients (S,)."""
    if len(set(patients)) < 2:
        return np.nan, np.nan
    weights = np.concatenate(list(resamples(patients, n_boot)), axis=1)
    return tuple(np.quantile(values @ weights / weights.sum(axis=0), [0.025, 0.975]))


def interval(values, n_patients, proportion_of=0):
    """(low, high, n_boot): the 95 % interval from (1 + n_boot,), the value and its resamples.

    Percentiles of the resamples, at levels widened by Student's t for the number of patients
    (Hesterberg, Am Stat 2015;69:371). A proportion of `proportion_of` patients (0: another metric)
    has Wilson's interval with the effective sample size from its variance over resamples (Dean &
    Pagano, J Surv Stat Methodol 2015;3:484). For a sensitivity of 0.9 in 40 patients with several
    studies each, percentiles covered the true value 78 times in 100, Wilson's interval 96 times;
    and for 15 correct of 15 it is not "1.00 to 1.00". The expected calibration error is biased
    upwards in small samples, and so is its interval: coverage is 90 % with 150 patients. NaN for
    one patient, for less than 100 resamples with a value, or if all these are equal.
    """
    value, resampled = values[0], values[1:][~np.isnan(values[1:])]
    n_boot = len(resampled)
    if np.isnan(value) or n_patients < 2 or n_boot < 100:
        return np.nan, np.nan, n_boot
    z = np.sqrt(n_patients / (n_patients - 1)) * special.stdtrit(n_patients - 1, 0.975)
    if proportion_of:
        sd = resampled.std(dtype=np.float64)
        size = value * (1 - value) / sd**2 if sd > 1e-6 and 0 < value < 1 else proportion_of
        centre, scale = value + z**2 / (2 * size), 1 + z**2 / size
        half = z * np.sqrt(value * (1 - value) / size + z**2 / (4 * size**2))
        return float(max(0, centre - half) / scale), float(min(1, (centre + half) / scale)), n_boot
    levels = special.ndtr([-z, z])
    low, high = np.quantile(resampled, levels, method="inverted_cdf")  # also of infinite values
    if low == high or high - low <= 1e-6 * abs(value):
        return np.nan, np.nan, n_boot
    return float(low), float(high), n_boot


def count_patients(patients, mask):
    return len(np.unique(np.asarray(patients)[mask]))


def estimate(outcome, metric, values, patients):
    """Estimate of one metric from its bootstrap (1 + n_boot,), with its `note`."""
    if metric in COUNTS:
        values = values[:1]
    mask, n_patients = outcome.denominator_mask(metric), count_patients(patients, outcome.usable)
    proportion_of = 0 if mask is None else count_patients(patients, mask)
    low, high, n_boot = interval(values, n_patients, proportion_of)
    note = ""
    if np.isnan(values[0]):
        note = outcome.why_missing(metric)
    elif metric in COUNTS:
        note = "a count"
    elif np.isinf(values[0]):
        note = "infinite: division by zero"
    elif n_patients < 2:
        note = "one patient: no interval"
    elif np.isnan(low):
        note = "no interval: too few resamples have a value, or all values are equal"
    elif n_boot < len(values) - 1:
        note = f"interval from the {n_boot} of {len(values) - 1} resamples that have a value"
    n, positive, unit = outcome.n, outcome.n_positive, outcome.unit(metric)
    value = float(values[0])
    return Estimate(outcome.label, metric, value, low, high, n, positive, unit, note, n_boot)


def estimates(outcomes, patients, n_boot=1000, seed=0):
    """[Estimate]: every metric of every outcome, then the means over labels, with intervals.

    outcomes: one per label, for the same studies; patients (S,): the patient of each study.
    """
    values, of_label = bootstrap(outcomes, patients, n_boot, seed), {o.label: o for o in outcomes}
    rows = [estimate(of_label[label], m, x, patients) for (label, m), x in values.items()]
    return rows + macro_means(outcomes, values, patients)


def macro_means(outcomes, values, patients):
    """[Estimate] labelled "mean", for each metric that two or more labels have in the same unit.

    values: of `bootstrap`. A resample's mean is over the labels that have a value in it. Labels
    without a value on all studies are left out; `note` gives the number of labels in the mean.
    """
    rows = []
    for metric in sorted({metric for _, metric in values} - set(COUNTS)):
        defined = [o for o in outcomes if np.isfinite(values.get((o.label, metric), [np.nan])[0])]
        units = {o.unit(metric) for o in defined}
        if len(defined) < 2 or len(units) > 1:
            continue
        stacked = np.stack([values[o.label, metric] for o in defined])
        finite = np.isfinite(stacked)
        with np.errstate(invalid="ignore"):
            mean = np.where(finite, stacked, 0).sum(axis=0) / finite.sum(axis=0)
        usable = np.any([o.usable for o in defined], axis=0)
        low, high, n_boot = interval(mean, count_patients(patients, usable))
        note = f"mean of {len(defined)} of {len(outcomes)} labels"
        row = Estimate("mean", metric, float(mean[0]), low, high, int(usable.sum()))
        rows.append(replace(row, unit=units.pop(), note=note, n_boot=n_boot))
    return rows


# -------------------------------------------------------------------------------------- two models


def compare(first, second, patients, n_boot=1000, seed=0):
    """[Estimate]: the differences first - second between two models on the same studies.

    Each label uses the studies that both models predict. The AUROC of findings uses `delong`, with
    a p_value; other metrics use the same resamples for both. UserError if labels or truths differ.
    """
    first, second = on_both(first, second)
    values, others = (bootstrap(o, patients, n_boot, seed) for o in (first, second))
    pairs = {a.label: (a, b) for a, b in zip(first, second, strict=True)}
    shared = [key for key in values if key in others and key[1] not in COUNTS]
    return [
        difference(*pairs[label], metric, values[label, metric], others[label, metric], patients)
        for label, metric in shared
    ]


def difference(a, b, metric, values, others, patients):
    """Estimate of a metric of outcome a minus that of b; values, others (1 + n_boot,)."""
    with np.errstate(invalid="ignore"):
        less = values - others
    low, high, n_boot = interval(less, count_patients(patients, a.usable))
    row = Estimate(a.label, metric, float(less[0]), low, high, a.n, a.n_positive, a.unit(metric))
    row = replace(row, n_boot=n_boot)
    if metric == "auroc" and isinstance(a, BinaryOutcome):
        low, high, p_value = delong_difference(a, b, patients)
        row = replace(row, ci_low=low, ci_high=high, p_value=p_value, n_boot=0)
    if np.isnan(row.value):
        missing, whose = (a, "") if np.isnan(values[0]) else (b, "the other: ")
        return replace(row, note=whose + missing.why_missing(metric))
    if np.isnan(row.ci_low):
        return replace(row, note="no interval: too few patients, or all resamples are equal")
    return row


def on_both(first, second):
    """Two models' outcomes, with truths only for the studies that both predict.

    UserError if labels or truths differ.
    """
    if [o.label for o in first] != [o.label for o in second]:
        raise UserError("the two models do not have the same labels")
    pairs = []
    for a, b in zip(first, second, strict=True):
        truths = type(a) is type(b) and [(a.truth, b.truth)]
        if truths and isinstance(a, SurvivalOutcome):
            truths.append((a.event, b.event))
        if not truths or not all(np.array_equal(*pair, equal_nan=True) for pair in truths):
            raise UserError(f"{a.label}: the two models have different truths for the same studies")
        truth = np.where(a.usable & b.usable, a.truth, np.nan)
        pairs.append((replace(a, truth=truth), replace(b, truth=truth)))
    return [list(x) for x in zip(*pairs, strict=True)]


def delong_difference(a, b, patients):
    """(low, high, p value) of AUROC(a) - AUROC(b); NaN if the variance is not defined."""
    usable = a.usable
    scores = np.stack([a.probability[usable], b.probability[usable]], axis=1)
    area, covariance = delong(a.truth[usable], scores, np.asarray(patients)[usable])
    contrast = np.array([1, -1])
    less, sd = contrast @ area, np.sqrt(max(contrast @ covariance @ contrast, 0))
    if not sd > 0:
        return np.nan, np.nan, np.nan
    low, high = less + special.ndtri([0.025, 0.975]) * sd
    return float(low), float(high), float(2 * special.ndtr(-abs(less / sd)))


def delong(truth, scores, patients=None):
    """(AUROCs (M,), their covariance (M, M)) of M models on the same studies; scores (S, M).

    DeLong (Biometrics 1988;44:837) by mid-ranks (Sun & Xu, IEEE Signal Process Lett 2014;21:1389).
    With `patients`, whose studies are not independent, sums over patients replace single studies
    (Obuchowski, Biometrics 1997;53:567); with one study per patient both are equal. NaN if a class
    has fewer than two patients.
    """
    scores, truth = np.asarray(scores, float).reshape(len(truth), -1), np.asarray(truth)
    positive, negative = scores[truth == 1], scores[truth == 0]
    m, n = len(positive), len(negative)
    if not m or not n:
        return np.full(scores.shape[1], np.nan), np.full((scores.shape[1],) * 2, np.nan)
    from scipy.stats import rankdata  # scipy.stats takes a second to import

    ranks = rankdata(scores, axis=0)
    of_positive = (ranks[truth == 1] - rankdata(positive, axis=0)) / n
    of_negative = 1 - (ranks[truth == 0] - rankdata(negative, axis=0)) / m
    area = of_positive.mean(axis=0)
    patient = np.arange(m + n) if patients is None else np.unique(patients, return_inverse=True)[1]
    k = patient.max() + 1
    a, b = np.zeros((k, len(area))), np.zeros((k, len(area)))
    np.add.at(a, patient[truth == 1], of_positive - area)
    np.add.at(b, patient[truth == 0], of_negative - area)
    n_a, n_b = len(np.unique(patient[truth == 1])), len(np.unique(patient[truth == 0]))
    if min(n_a, n_b) < 2:
        return area, np.full((len(area),) * 2, np.nan)
    cross = k / (k - 1) * (a.T @ b) / (m * n)
    parts = n_a / (n_a - 1) * (a.T @ a) / m**2 + n_b / (n_b - 1) * (b.T @ b) / n**2
    return area, parts + cross + cross.T
