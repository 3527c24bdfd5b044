"""Metrics of outcomes with 95 % intervals, and their differences between two models.

    outcomes = [BinaryOutcome("VSD", truth, p, threshold=0.31), RegressionOutcome("EF", ef, f, "%")]
    for estimate in estimates(outcomes, patients): print(estimate.row())

An outcome (`study.kinds`) computes its metrics from `weights` (S, B): how often each of S studies
occurs in each of B resamples. The value is the same computation with weights of one, so that value
and interval are consistent. Patients are resampled, not studies: a resample has all studies of a
patient, or none.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import special
from threadpoolctl import threadpool_limits

from echofocus_core.base.console import UserError
from echofocus_core.study.kinds.base import FEWEST, rarer
from echofocus_core.study.kinds.binary import BinaryOutcome

CHUNK_BYTES = 2**24  # of weights, to fit the cache; a metric needs several arrays of this size


@dataclass(frozen=True)
class Estimate:
    """A metric of a label with its 95 % interval.

    value, ci_low, ci_high are NaN if not defined; `note` then gives the reason. n: number of
    studies; n_positive: those with the finding or event (-1: does not apply); n_boot: number of
    resamples with a value; p_value: only for a difference.
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


# ------------------------------------------------------------------------ resamples and intervals


def resamples(patients, n_boot, seed=0, chunk_bytes=CHUNK_BYTES):
    """Yield weights (S, b), float32, in chunks of at most `chunk_bytes`: `n_boot` resamples in all.

    A resample draws as many patients as the studies have, with replacement; a study counts as often
    as its patient is drawn. patients (S,): any identifiers. The draws depend only on patients and
    seed.
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
    patients, the same for all outcomes."""
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


@dataclass
class Sampled:
    """A metric with its resamples, and what limits the precision of its interval."""

    value: float
    resamples: np.ndarray  # (B,) those with a value
    n_patients: int  # that limit its precision, such as those of the rarer class
    size: int = 0  # number of patients of which it is a proportion
    others: dict = field(default_factory=dict)  # metric -> (1 + n_boot,) of the same label

    @property
    def z(self):
        """Quantile of Student's t, widened for the variance of resamples of few patients
        (Hesterberg, Am Stat 2015;69:371)."""
        n = self.n_patients
        return np.sqrt(n / (n - 1)) * special.stdtrit(n - 1, 0.975)

    @property
    def sd(self):
        return self.resamples.std(dtype=np.float64)


def percentile(x):
    """Percentiles of the resamples, also of infinite ones."""
    levels = special.ndtr([-x.z, x.z])
    return np.quantile(x.resamples, levels, method="inverted_cdf")


def normal(x):
    """Symmetric. Half the distance between the percentiles 16 and 84 is the standard error: it is
    not moved by the few resamples in which a fit has nearly separated the classes."""
    low, high = np.quantile(x.resamples, special.ndtr([-1, 1]))
    return x.value - x.z * (high - low) / 2, x.value + x.z * (high - low) / 2


def logit(x):
    """Symmetric on the scale of log-odds, for a value between 0 and 1; Wilson's at the ends."""
    if not 0 < x.value < 1:
        return wilson(x)
    half = x.z * x.sd / (x.value * (1 - x.value))
    return special.expit(special.logit(x.value) + np.array([-half, half]))


def log(x):
    """Symmetric on the scale of the logarithm, for a value above 0."""
    return x.value * np.exp(x.z * x.sd / x.value * np.array([-1, 1])) if x.value > 0 else (0, 0)


def log_rest(x):
    """Symmetric on the scale of the logarithm of 1 - value, for a value below 1."""
    if x.value >= 1:
        return np.nan, np.nan
    return 1 - (1 - x.value) * np.exp(x.z * x.sd / (1 - x.value) * np.array([1, -1]))


def fisher(x):
    """Of a correlation: symmetric on Fisher's scale, the inverse hyperbolic tangent."""
    half = x.z * x.sd / (1 - x.value**2)
    return np.tanh(np.arctanh(x.value) + np.array([-half, half]))


def effective_size(p, sd, size):
    """The number of independent studies in which a proportion p has the standard error sd."""
    return p * (1 - p) / sd**2 if sd > 1e-6 and 0 < p < 1 else size


def wilson(x):
    """Wilson's interval of a proportion with the effective sample size from its variance over
    resamples (Dean & Pagano, J Surv Stat Methodol 2015;3:484)."""
    z, size = x.z, effective_size(x.value, x.sd, x.size or x.n_patients)
    centre, scale = x.value + z**2 / (2 * size), 1 + z**2 / size
    half = z * np.sqrt(x.value * (1 - x.value) / size + z**2 / (4 * size**2))
    return max(0, centre - half) / scale, min(1, (centre + half) / scale)


def likelihood_ratio(x, shares):
    """Symmetric on the scale of the logarithm (Simel, J Clin Epidemiol 1991;44:763).

    shares: functions of sensitivity and of specificity whose ratio it is; their effective sizes
    replace the numbers of studies. 0.5 is added to all counts if one is zero.
    """
    rates = [x.others[name] for name in ("sensitivity", "specificity")]
    cells = ("true_positive", "false_negative"), ("true_negative", "false_positive")
    counts = [sum(x.others[name][0] for name in pair) for pair in cells]
    sizes = [
        effective_size(rate[0], np.nanstd(rate[1:], dtype=float), n)
        for rate, n in zip(rates, counts, strict=True)
    ]
    shares = [share(rate[0]) for share, rate in zip(shares, rates, strict=True)]
    add = 0.5 if min(shares) <= 0 or max(shares) >= 1 else 0
    (a, n), (b, m) = (
        ((p * k + add) / (k + 2 * add), k + 2 * add) for p, k in zip(shares, sizes, strict=True)
    )
    half = x.z * np.sqrt((1 - a) / (a * n) + (1 - b) / (b * m))
    low, high = a / b * np.exp(-half), a / b * np.exp(half)
    return (0.0 if x.value == 0 else low), (np.inf if np.isinf(x.value) else high)


def lr_positive(x):
    return likelihood_ratio(
        x, (lambda sensitivity: sensitivity, lambda specificity: 1 - specificity)
    )


def lr_negative(x):
    return likelihood_ratio(
        x, (lambda sensitivity: 1 - sensitivity, lambda specificity: specificity)
    )


def limit_of_agreement(x):
    """By the standard error of Bland & Altman (Lancet 1986;1:307), sqrt(s^2 / n + 1.96^2 s^2 / (2
    (n - 1))), where n is the effective number of studies by the variance of the bias."""
    s = (x.others["loa_high"][0] - x.others["loa_low"][0]) / (2 * 1.96)
    n = max(2.0, (s / np.std(x.others["bias"][1:], dtype=np.float64)) ** 2) if s > 0 else 2.0
    half = special.stdtrit(x.n_patients - 1, 0.975) * s * np.sqrt(1 / n + 1.96**2 / (2 * (n - 1)))
    return x.value - half, x.value + half


INTERVALS = {f.__name__: f for f in (percentile, normal, logit, log, log_rest, fisher)}
INTERVALS |= {f.__name__: f for f in (wilson, lr_positive, lr_negative, limit_of_agreement)}


LEAST = 100  # resamples with a value, for an interval


def interval(values, n_patients, method="percentile", size=0, others=None):
    """(low, high, n_boot): the 95 % interval from (1 + n_boot,), the value and its resamples.

    method: of INTERVALS, or none; n_patients, size, others: see `Sampled`. Coverage in simulated
    cohorts is in benchmarks/RESULTS.md. NaN for one patient, for fewer than 100 resamples with a
    value, or if these are all equal.
    """
    value, resamples = values[0], values[1:][~np.isnan(values[1:])]
    n_boot = len(resamples)
    if method == "none" or np.isnan(value) or n_patients < 2 or n_boot < LEAST:
        return np.nan, np.nan, n_boot
    sampled = Sampled(float(value), resamples, n_patients, size, others or {})
    with np.errstate(all="ignore"):
        low, high = INTERVALS[method](sampled)
    if np.isnan(low) or np.isnan(high) or low == high or high - low <= 1e-6 * abs(value) < np.inf:
        return np.nan, np.nan, n_boot
    return float(low), float(high), n_boot


def count_patients(patients, mask):
    return len(np.unique(np.asarray(patients)[mask]))


def estimate(outcome, metric, values, patients):
    """Estimate of one metric, with its `note`. values: metric -> its bootstrap (1 + n_boot,)."""
    others, values, described = values, values[metric], outcome.metric(metric)
    masks = [f(outcome) for f in (described.denominator, described.limit) if f]
    n_patients = min(count_patients(patients, mask) for mask in [*masks, outcome.usable])
    if described.is_count:
        values = values[:1]
    size = count_patients(patients, masks[0]) if described.denominator else 0
    method = described.interval if n_patients >= described.fewest else "none"
    low, high, n_boot = interval(values, n_patients, method, size, others)
    note = ""
    if np.isnan(values[0]):
        note = outcome.why_missing(metric)
    elif described.is_count:
        note = "a count"
    elif np.isinf(values[0]):
        note = "infinite: division by zero"
    elif n_patients < described.fewest:
        few = described.fewest
        group = [x for x, f in outcome.groups.items() if count_patients(patients, f(outcome)) < few]
        note = " ".join(["no interval: fewer than", str(few), "patients", " or ".join(group)])
        note = note.rstrip()
    elif described.interval != "none" and np.isnan(low):
        note = f"no interval: fewer than {LEAST} resamples have a value, or all are equal"
    elif n_boot < len(values) - 1:
        note = f"interval from the {n_boot} of {len(values) - 1} resamples that have a value"
    if described.remark and not np.isnan(values[0]):
        note = "; ".join(filter(None, [note, described.remark(outcome)]))
    n, positive, unit = outcome.n, outcome.n_positive, outcome.unit(metric)
    value = float(values[0])
    return Estimate(outcome.label, metric, value, low, high, n, positive, unit, note, n_boot)


def estimates(outcomes, patients, n_boot=1000, seed=0):
    """[Estimate]: every metric of every outcome, then the means over labels, with intervals.

    outcomes: one per label, for the same studies; patients (S,): the patient of each study.
    """
    values = bootstrap(outcomes, patients, n_boot, seed)
    rows = []
    for o in outcomes:
        of_label = {metric: x for (label, metric), x in values.items() if label == o.label}
        rows += [estimate(o, metric, of_label, patients) for metric in of_label]
    return rows + macro_means(outcomes, values, patients)


def mean_method(outcome, metric, n_patients):
    """The method of the interval of a mean over labels, or of a difference between models."""
    none = outcome.metric(metric).interval == "none" or n_patients < FEWEST
    return "none" if none else "percentile"


def macro_means(outcomes, values, patients):
    """[Estimate] labelled "mean", for each metric that two or more labels have in the same unit.

    values: from `bootstrap`. A resample's mean is over the labels that have a value in it. Labels
    without a value on all studies are left out; `note` gives the number of labels in the mean.
    """
    rows = []
    counts = {m.name for o in outcomes for m in o.METRICS if m.is_count}
    for metric in sorted({metric for _, metric in values} - counts):
        defined = [o for o in outcomes if np.isfinite(values.get((o.label, metric), [np.nan])[0])]
        units = {o.unit(metric) for o in defined}
        if len(defined) < 2 or len(units) > 1:
            continue
        stacked = np.stack([values[o.label, metric] for o in defined])
        finite = np.isfinite(stacked)
        with np.errstate(invalid="ignore"):
            mean = np.where(finite, stacked, 0).sum(axis=0) / finite.sum(axis=0)
        usable = np.any([o.usable for o in defined], axis=0)
        n_patients = count_patients(patients, usable)
        method = mean_method(defined[0], metric, n_patients)
        low, high, n_boot = interval(mean, n_patients, method)
        note, n = f"mean of {len(defined)} of {len(outcomes)} labels", int(usable.sum())
        value, unit = float(mean[0]), units.pop()
        rows.append(Estimate("mean", metric, value, low, high, n, -1, unit, note, n_boot))
    return rows


# ------------------------------------------------------------------------------ tests of subgroups

SCALES = dict.fromkeys(("wilson", "logit"), special.logit)
SCALES |= dict.fromkeys(("log", "lr_positive", "lr_negative"), np.log)
SCALES |= {"log_rest": lambda x: -np.log1p(-x), "fisher": np.arctanh}


def interaction(groups, method):
    """The p value of a test that a metric is equal in independent groups, from their Estimates.

    Altman & Bland (BMJ 2003;326:219): the difference of two values against the standard error of
    their intervals, on the scale of the interval `method`; for more groups, Cochran's Q. NaN unless
    two groups have an interval.
    """
    limits = np.array([(x.value, x.ci_low, x.ci_high) for x in groups], float).reshape(-1, 3)
    with np.errstate(all="ignore"):
        value, low, high = SCALES.get(method, np.asarray)(limits).T
        weight = ((high - low) / (2 * special.ndtri(0.975))) ** -2.0
    use = np.isfinite(value) & np.isfinite(weight)
    value, weight = value[use], weight[use]
    if len(value) < 2:
        return np.nan
    q = (weight * (value - (weight * value).sum() / weight.sum()) ** 2).sum()
    return float(special.chdtrc(len(value) - 1, q))


def holm(p):
    """(n,): p values adjusted for their number (Holm, Scand J Stat 1979;6:65); NaN stays NaN."""
    p = np.asarray(p, float)
    order = np.argsort(p)[: np.isfinite(p).sum()]
    adjusted = np.full(len(p), np.nan)
    steps = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1))
    adjusted[order] = np.minimum(1, steps)
    return adjusted


# -------------------------------------------------------------------------------------- two models


def compare(first, second, patients, n_boot=1000, seed=0):
    """[Estimate]: the differences first - second between two models on the same studies, with a
    p_value.

    Each label uses the studies that both models predict. The AUROC of findings uses `delong`;
    other metrics use the same resamples for both. UserError if labels or truths differ.
    """
    first, second = on_both(first, second)
    values, others = (bootstrap(o, patients, n_boot, seed) for o in (first, second))
    pairs = {a.label: (a, b) for a, b in zip(first, second, strict=True)}
    return [
        difference(*pairs[label], metric, values[label, metric], others[label, metric], patients)
        for label, metric in values
        if (label, metric) in others and not pairs[label][0].metric(metric).is_count
    ]


def difference(a, b, metric, values, others, patients):
    """Estimate of a metric of outcome a minus that of b; values, others (1 + n_boot,)."""
    with np.errstate(invalid="ignore"):
        less = values - others
    n_patients = count_patients(patients, a.usable)
    low, high, n_boot = interval(less, n_patients, mean_method(a, metric, n_patients))
    n, positive, unit = a.n, a.n_positive, a.unit(metric)
    row = Estimate(a.label, metric, float(less[0]), low, high, n, positive, unit, "", n_boot)
    if np.isfinite(low):
        row = replace(row, p_value=percentile_p(less[1:], n_patients))
    if metric == "auroc" and isinstance(a, BinaryOutcome):
        low, high, p_value = delong_difference(a, b, patients)
        row = replace(row, ci_low=low, ci_high=high, p_value=p_value, n_boot=0)
    if np.isnan(values[0]):
        return replace(row, note=a.why_missing(metric))
    if np.isnan(row.value):
        return replace(row, note=f"the other: {b.why_missing(metric)}")
    if np.isnan(row.ci_low):
        return replace(row, note="no interval: too few patients or resamples, or all are equal")
    return row


def percentile_p(resamples, n_patients):
    """The p value of no difference: 1 minus the level at which the interval by `percentile` ends
    at 0."""
    less = resamples[~np.isnan(resamples)]
    tail = max(min((less <= 0).mean(), (less >= 0).mean()), 1 / (len(less) + 1))
    t = special.ndtri(min(tail, 0.5)) * np.sqrt((n_patients - 1) / n_patients)
    return float(2 * special.stdtr(n_patients - 1, t))


def on_both(first, second):
    """The outcomes of two models, with truths only for the studies that both predict.

    UserError if labels or truths differ.
    """
    if [o.label for o in first] != [o.label for o in second]:
        raise UserError("the two models do not have the same labels")
    pairs = []
    for a, b in zip(first, second, strict=True):
        if type(a) is not type(b) or not all(
            np.array_equal(getattr(a, name), getattr(b, name), equal_nan=True)
            for name in a.truth_fields
        ):
            raise UserError(f"{a.label}: the two models have different truths for the same studies")
        truth = np.where(a.usable & b.usable, a.truth, np.nan)
        pairs.append((replace(a, truth=truth), replace(b, truth=truth)))
    return [list(x) for x in zip(*pairs, strict=True)]


def delong_difference(a, b, patients):
    """(low, high, p value) of AUROC(a) - AUROC(b), with Student's t for the patients of the rarer
    class; NaN if the variance is not defined."""
    usable = a.usable
    scores = np.stack([a.predicted[usable], b.predicted[usable]], axis=1)
    area, covariance = delong(a.truth[usable], scores, np.asarray(patients)[usable])
    contrast = np.array([1, -1])
    less, sd = contrast @ area, np.sqrt(max(contrast @ covariance @ contrast, 0))
    if not sd > 0:
        return np.nan, np.nan, np.nan
    n = count_patients(patients, rarer(a, a.truth == 1))
    low, high = np.clip(less + special.stdtrit(n - 1, [0.025, 0.975]) * sd, -1, 1)
    return float(low), float(high), float(2 * special.stdtr(n - 1, -abs(less / sd)))


def delong(truth, scores, patients=None):
    """(AUROCs (M,), their covariance (M, M)) of M models on the same studies; scores (S, M).

    DeLong (Biometrics 1988;44:837) by mid-ranks (Sun & Xu, IEEE Signal Process Lett 2014;21:1389).
    Studies of one patient are not independent: with `patients`, sums over patients replace single
    studies (Obuchowski, Biometrics 1997;53:567). NaN if a class has fewer than two patients.
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
