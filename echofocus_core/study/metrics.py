"""Metrics of many resamples at once: functions of truths, predictions and weights.

weights (S, B): how often each of S studies occurs in each of B resamples; a function returns (B,),
one value per resample. One column of ones gives the plain metric. Sums of weights are integers,
exact in float32 up to 16 million.

A bootstrap that sorts every resample is slow. Here each label is sorted once; a resample needs only
running sums and products of the weights with a sparse matrix (which study is in which group).
"""

import warnings

import numpy as np
from scipy import sparse, special

from echofocus_core.base.console import UserError

NODES = 512  # of the grid on which the calibration curve of a resample is fitted
BINS = 10  # of the expected calibration error, of equal width
NEAREST = 1e-6  # smallest distance of a probability from 0 and 1, for its logit
MAX_KNOTS = 400  # times of a baseline hazard


# --------------------------------------------------------------------------------- building blocks


def sums(columns, weights):
    """(k, B): the weighted sums of k columns (S,)."""
    return np.stack([np.asarray(c, weights.dtype) for c in columns]) @ weights


def sum_by_group(group, n_groups, weights, rows=None):
    """(n_groups, B): weights summed by group. `rows`: the studies of `group`; by default all."""
    rows = np.arange(len(group)) if rows is None else rows
    one = np.ones(len(rows), weights.dtype)
    return sparse.csr_matrix((one, (group, rows)), (n_groups, len(weights))) @ weights


def running_sum(weights, block=32):
    """np.cumsum along the first axis, several times faster on wide rows."""
    n_blocks = -(-len(weights) // block)
    padded = np.empty((n_blocks * block, weights.shape[1]), weights.dtype)
    padded[: len(weights)], padded[len(weights) :] = weights, 0
    part = padded.reshape(n_blocks, block, weights.shape[1])
    for i in range(1, block):
        part[:, i] += part[:, i - 1]
    part[1:] += np.cumsum(part[:-1, -1], axis=0)[:, None]
    return padded[: len(weights)]


def squares_about_mean(total, total_of_squares, n):
    """Sum of squares about the mean; NaN if it is only rounding error, as for equal values."""
    squares = total_of_squares - total**2 / n
    rounding = 100 * np.finfo(squares.dtype).eps * total_of_squares
    return np.where(squares > rounding, squares, np.nan)


def standardise(values):
    """((values - mean) / SD, SD), whose sums lose no digits in float32; an SD of 0 counts as 1."""
    sd = (values.std() if len(values) else 0) or 1
    return (values - values.mean()) / sd if len(values) else values, sd


def weights_at_cuts(key, left, right, weights, left_weights=None, also=()):
    """(cuts, at, below, tied): the weights of two groups of studies at the values of the left one.

    key (S,); left, right: rows of the two groups; cuts (G,): the distinct keys of `left` and of
    `also`; at, below, tied (G, B): the weight of `left` at each cut, of `right` below and at it.
    With weights of 1, left keys 0.2, 0.6, 0.6 and right keys 0.1, 0.6, 0.9:

        cut  at  below  tied
        0.2   1      1     0
        0.6   2      1     1    # AUROC = sum of at * (below + tied / 2) / (3 * 3) = 4 / 9
    """
    cuts = np.unique(np.concatenate([key[left], also]))
    slot = np.searchsorted(cuts, key[right], side="right")  # cuts[slot - 1] <= key < cuts[slot]
    below = running_sum(sum_by_group(slot, len(cuts) + 1, weights, right))[:-1]
    tie = np.flatnonzero(slot)
    tie = tie[cuts[slot[tie] - 1] == key[right[tie]]]
    tied = sum_by_group(slot[tie] - 1, len(cuts), weights, right[tie])
    place = np.searchsorted(cuts, key[left])
    if left_weights is None:
        return cuts, sum_by_group(place, len(cuts), weights, left), below, tied
    return cuts, sum_by_group(place, len(cuts), left_weights), below, tied


def dot(a, b):
    """(B,): the dot products of the columns of a and b, each (G, B)."""
    return np.einsum("gb,gb->b", a, b)


def weights_or_ones(weights, n):
    return np.ones((n, 1)) if weights is None else weights


# ----------------------------------------------------------------------------------------- findings


def auroc(truth, score, weights=None):
    """Area under the ROC curve, where ties count half: a float, or (B,) for weights; NaN for one
    class."""
    truth, score = np.asarray(truth), np.asarray(score)
    with np.errstate(all="ignore"):
        area = ranking(truth, score, weights_or_ones(weights, len(truth)))["auroc"]
    return float(area[0]) if weights is None else area


def ranking(truth, score, weights):
    """auroc and average_precision, each (B,). Average precision is the sum over cuts of precision
    times the step in recall, without interpolation."""
    left, right = np.flatnonzero(truth == 1), np.flatnonzero(truth == 0)
    _, at, below, tied = weights_at_cuts(score, left, right, weights)
    positive, negative = at.sum(axis=0), sums([truth == 0], weights)[0]
    true_positive = positive - running_sum(at) + at
    called = true_positive + negative - below
    precision = np.divide(true_positive, called, out=np.zeros_like(called), where=called > 0)
    both = (positive > 0) & (negative > 0)
    area = dot(at, below + tied / 2) / (positive * negative)
    return {
        "auroc": np.where(both, area, np.nan),
        "average_precision": np.where(both, dot(at, precision) / positive, np.nan),
    }


def calibration(truth, probability, weights):
    """brier, calibration_slope, calibration_intercept, ece: each (B,).

    Slope: of a logistic regression of the truth on the probability's logit; intercept: with slope
    1, "in the large" (Van Calster, J Clin Epidemiol 2016;74:167). Expected calibration
    error: |frequency - mean probability| in bins of equal width, weighted by size (Naeini 2015).
    """
    n, brier = sums([np.ones(len(truth)), (probability - truth) ** 2], weights)
    part = np.minimum((probability * BINS).astype(int), BINS - 1)
    gaps = sums([(part == b) * (probability - truth) for b in range(BINS)], weights)
    x = special.logit(np.clip(probability, NEAREST, 1 - NEAREST))
    nodes, at = share_on_grid(x, weights)
    target = sums([truth, truth * x], weights)
    return {
        "brier": brier / n,
        "calibration_slope": fit_logistic(nodes, at, target, slope_is_1=False)[1],
        "calibration_intercept": fit_logistic(nodes, at, target, slope_is_1=True)[0],
        "ece": abs(gaps).sum(axis=0) / n,
    }


def share_on_grid(x, weights):
    """(nodes (G,), weights at the nodes (G, B)), for sums of smooth functions of x.

    The nodes are the distinct values if these are few or there is one resample. Otherwise, the
    weight of a study is split between the two nearest nodes of a grid; the error of a logistic
    function of x is then the spacing squared / 80, at most 1e-5.
    """
    distinct, value = np.unique(x, return_inverse=True)
    if len(distinct) <= 2 * NODES or weights.shape[1] == 1:
        return distinct, sum_by_group(value, len(distinct), weights)
    nodes = np.linspace(distinct[0], distinct[-1], NODES)
    place = (x - nodes[0]) / (nodes[1] - nodes[0])
    lower = np.minimum(place.astype(int), NODES - 2)
    share = (place - lower).astype(weights.dtype)
    cells = (np.concatenate([lower, lower + 1]), np.tile(np.arange(len(x)), 2))
    shared = sparse.csr_matrix((np.concatenate([1 - share, share]), cells), (NODES, len(x)))
    return nodes, shared @ weights


def fit_logistic(x, weights, target, slope_is_1):
    """(2, B): intercept and slope by Newton's method; NaN where no finite solution exists.

    x (G,), weights (G, B); target (2, B): weighted sums of truth and of truth times x. All
    resamples start from the fit of their sum; those that have converged are not computed again.
    Example: x = (-1, 1), weights (4, 4), 1 and 3 positive studies. The target is (4, 2), and the
    fit is intercept 0, slope log(3), with predicted sums 4 (p1 + p2) = 4 and 4 (p2 - p1) = 2.
    """
    fit = np.zeros_like(target)
    fit[1] = slope_is_1
    if weights.shape[1] > 1:
        total, goal = weights.sum(axis=1, keepdims=True), target.sum(axis=1, keepdims=True)
        fit[:] = np.nan_to_num(fit_logistic(x, total, goal, slope_is_1), nan=slope_is_1)
    powers = np.stack([x**0, x, x**2]).astype(weights.dtype)
    active, eps = np.arange(weights.shape[1]), np.finfo(weights.dtype).eps
    for _ in range(30):
        w = weights[:, active] if len(active) < weights.shape[1] else weights
        p = 1 / (1 + np.exp(-(fit[0, active] + fit[1, active] * powers[1][:, None])))
        w = w * p
        s0, s1 = target[:, active] - powers[:2] @ w
        h0, h1, h2 = powers @ (w - w * p)
        if slope_is_1:
            step = np.stack([s0 / h0, 0 * s0])
        else:
            area = h0 * h2 - h1**2
            area[area <= 100 * eps * h0 * h2] = np.nan  # all probabilities are equal
            step = np.stack([h2 * s0 - h1 * s1, h0 * s1 - h1 * s0]) / area
        fit[:, active] += step
        # Newton's method converges quadratically: the next error is about the step squared.
        active = active[abs(step).max(axis=0) > eps ** (1 / 3) * (1 + abs(fit[1, active]))]
        if not len(active):
            break
    fit[:, active] = np.nan
    return fit


def operating(true_positive, false_positive, true_negative, false_negative, prevalence=None):
    """Metrics of the four counts, arrays of one shape: dict; inf or NaN if undefined.

    With a prevalence, also PPV and NPV at that prevalence (Bayes).
    """
    sensitivity = true_positive / (true_positive + false_negative)
    specificity = true_negative / (true_negative + false_positive)
    before = np.nan if prevalence is None else prevalence
    ppv_at = sensitivity * before, (1 - specificity) * (1 - before)
    npv_at = specificity * (1 - before), (1 - sensitivity) * before
    has = np.where(true_positive + false_negative > 0, 1, np.nan)
    return {
        "sensitivity": sensitivity,
        "specificity": specificity,
        "ppv": true_positive / (true_positive + false_positive),
        "npv": true_negative / (true_negative + false_negative),
        "lr_positive": sensitivity / (1 - specificity),
        "lr_negative": (1 - sensitivity) / specificity,
        "f1": has * 2 * true_positive / (2 * true_positive + false_positive + false_negative),
        "true_positive": true_positive,
        "false_positive": false_positive,
        "true_negative": true_negative,
        "false_negative": false_negative,
        "ppv_at_prevalence": ppv_at[0] / sum(ppv_at),
        "npv_at_prevalence": npv_at[0] / sum(npv_at),
    }


def net_benefit(truth, probability, cuts):
    """(len(cuts),): (true positives - false positives * cut / (1 - cut)) / number of studies.

    The decision curve of Vickers & Elkin, Med Decis Making 2006;26:565. For "treat all", set every
    probability to 1.
    """
    gain = [(probability >= c) * (truth - (1 - truth) * c / (1 - c)) for c in cuts]
    return np.mean(gain, axis=1)


def choose_threshold(truth, probability, rule="youden"):
    """The lowest probability of a positive study, chosen on these studies; or None.

    rule: "youden", the largest sensitivity + specificity (Youden, Cancer 1950;3:32);
    "sensitivity=0.95", the highest threshold that reaches it; "specificity=0.95", the lowest. The
    threshold is halfway to the next lower probability, so that rounding has no effect. None if
    there is only one class, or if no threshold is better than chance (youden) or detects a positive
    study (specificity).
    """
    goal, target = read_target(rule)
    usable = np.isfinite(truth) & np.isfinite(probability)
    y, p = np.asarray(truth)[usable], np.asarray(probability, float)[usable]
    if not 0 < y.sum() < len(y):
        return None
    cuts, place = np.unique(-p, return_inverse=True)  # descending probabilities
    true = np.cumsum(np.bincount(place, y))
    false = np.cumsum(np.bincount(place, 1 - y))
    if goal == "youden":
        gain = true / true[-1] - false / false[-1]
        i = int(np.argmax(gain > gain.max() - 1e-12))
        if gain[i] < 1e-12:
            return None
    elif goal == "sensitivity":
        i = int(np.argmax(true >= target * true[-1] - 1e-9))
    else:
        i = int((false <= (1 - target) * false[-1] + 1e-9).sum()) - 1
        if i < 0 or not true[i]:
            return None
    lower = -cuts[i + 1] if i + 1 < len(cuts) else 0.0
    return float((-cuts[i] + lower) / 2)


def read_target(rule):
    """Parse `--target`: ("youden", None) or, for example, ("sensitivity", 0.95)."""
    goal, _, number = rule.partition("=")
    try:
        if rule == "youden":
            return "youden", None
        if goal in ("sensitivity", "specificity") and 0 < float(number) <= 1:
            return goal, float(number)
    except ValueError:
        pass
    raise UserError(f"--target {rule}: give youden, sensitivity=0.95 or specificity=0.95")


# ------------------------------------------------------------------------------------- measurements


def errors(truth, values, weights):
    """mean_absolute_error, rmse, bias (mean of value - truth), loa_low, loa_high (bias -+ 1.96 SD,
    Bland & Altman, Lancet 1986;1:307), r2 (1 - squared error / variance), pearson: each (B,)."""
    (y, scale), (f, _), e = standardise(truth), standardise(values), values - truth
    middle = e.mean() if len(e) else 0  # subtracted first: its square would lose digits
    off, e = (e - middle) / scale, e / scale
    columns = [np.ones(len(y)), y, y**2, f, f**2, y * f, off, off**2, e**2, abs(e)]
    n, sy, syy, sf, sff, syf, so, soo, see, sae = sums(columns, weights)
    squares, bias = squares_about_mean(sy, syy, n), middle + scale * so / n
    sd = scale * np.sqrt(np.maximum(soo - so**2 / n, 0) / np.where(n > 1, n - 1, np.nan))
    return {
        "mean_absolute_error": scale * sae / n,
        "rmse": scale * np.sqrt(see / n),
        "r2": 1 - see / squares,
        "pearson": (syf - sy * sf / n) / np.sqrt(squares * squares_about_mean(sf, sff, n)),
        "bias": bias,
        "loa_low": bias - 1.96 * sd,
        "loa_high": bias + 1.96 * sd,
    }


def spearman(truth, values, weights):
    """(B,): the correlation of mid-ranks, which are computed in each resample."""
    (x, sxx), (y, syy) = mid_ranks(truth, weights), mid_ranks(values, weights)
    correlation = np.einsum("sb,sb,sb->b", weights, x, y) / np.sqrt(sxx) / np.sqrt(syy)
    return np.where((sxx > 0) & (syy > 0), correlation, np.nan)


def mid_ranks(values, weights):
    """(mid-ranks (S, B) minus their mean, their weighted sum of squares (B,))."""
    distinct, place = np.unique(values, return_inverse=True)
    half = sum_by_group(place, len(distinct), weights)
    ranks = running_sum(half)
    ranks -= half.sum(axis=0) / 2
    half *= 0.5  # in place: these arrays are large
    ranks -= half
    return np.take(ranks, place, axis=0), 2 * np.einsum("gb,gb,gb->b", half, ranks, ranks)


def weighted_median(values, weights):
    """(B,): the median of values (S,) repeated by weights (S, B); the mean of two middle values."""
    if not len(values):
        return np.full(weights.shape[1], np.nan)
    order = np.argsort(values)
    running, values = running_sum(weights[order]), np.append(values[order], np.nan)
    half = running[-1] / 2  # without weights, the median is the NaN at the end
    return (values[(running < half).sum(axis=0)] + values[(running <= half).sum(axis=0)]) / 2


# ------------------------------------------------------------------------------------------- grades


def confusion(truth, predicted, n_classes, weights=None):
    """(K, K, B): weight of studies by truth (rows) and predicted class, both integers (S,)."""
    weights = weights_or_ones(weights, len(truth))
    cell = np.asarray(truth, int) * n_classes + np.asarray(predicted, int)
    return sum_by_group(cell, n_classes**2, weights).reshape(n_classes, n_classes, -1)


def agreement(table):
    """balanced_accuracy (the mean recall over classes) and kappa with quadratic weights (Cohen,
    Psychol Bull 1968;70:213), each (B,), from the table (K, K, B) of `confusion`."""
    of_truth, of_predicted, n = table.sum(axis=1), table.sum(axis=0), table.sum(axis=(0, 1))
    k = np.arange(len(table))
    distance = ((k[:, None] - k) ** 2)[..., None]
    by_chance = (distance * of_truth[:, None] * of_predicted[None]).sum(axis=(0, 1)) / n
    recall = table[k, k] / of_truth
    kappa = 1 - (distance * table).sum(axis=(0, 1)) / np.where(by_chance > 0, by_chance, np.nan)
    return {"balanced_accuracy": recall.mean(axis=0), "kappa": kappa}


# ----------------------------------------------------------------------------------------- survival


def c_index(time, event, risk, weights=None):
    """Harrell's C (JAMA 1982;247:2543): a float, or (B,) for weights.

    The share of comparable pairs in which the study with the earlier event has the higher risk;
    equal risks count half. A pair is comparable if the shorter time ends in an event; at equal
    times, if exactly one of the two does.

    The pairs are counted as in a radix sort, O(S log2 S) per resample: the highest differing bit
    of two places in time determines their order, so each bit compares studies with events in the
    lower half of a block with studies in its upper half. For times 1, 2, 3 (places 0, 1, 2; all
    events), bit 0 compares place 0 with 1, and bit 1 compares places 0 and 1 with 2.
    """
    single, weights = weights is None, weights_or_ones(weights, len(time))
    time, event = np.asarray(time, float), np.asarray(event, bool)
    place = np.unique(np.stack([time, ~event], axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    rank = np.unique(risk, return_inverse=True)[1]
    at = sum_by_group(place, place.max(initial=0) + 1, weights)
    later = at.sum(axis=0) - running_sum(at)
    events = np.flatnonzero(event)
    comparable = dot(sum_by_group(place[events], len(at), weights, events), later)
    won = np.zeros(weights.shape[1])
    for bit in range(int(place.max(initial=0)).bit_length()):
        upper = (place >> bit) & 1
        left, right = np.flatnonzero(event & (upper == 0)), np.flatnonzero(upper)
        start = (place >> (bit + 1)) * (len(rank) + 1)  # separates the blocks on one axis of keys
        key = start + rank + 1
        cuts, at, below, tied = weights_at_cuts(
            key, left, right, weights, also=np.unique(start[left])
        )
        earlier_blocks = sum_by_group(np.searchsorted(cuts, start[left]), len(cuts), weights, left)
        won += dot(at, below + tied / 2) - dot(earlier_blocks, below)
    with np.errstate(all="ignore"):
        share = np.where(comparable > 0, won / comparable, np.nan)
    return float(share[0]) if single else share


def dynamic_auroc(time, event, risk, at, weights):
    """(B,): AUROC of studies with the event by time `at` against studies with a longer follow-up.

    Cumulative cases, dynamic controls; cases weighted by 1 / probability of not being censored
    before their time (Uno, J Am Stat Assoc 2007;102:527), estimated in each resample.
    """
    case, control = np.flatnonzero(event & (time <= at)), np.flatnonzero(time > at)
    distinct, place = np.unique(time, return_inverse=True)
    at_risk = sum_by_group(place, len(distinct), weights)
    at_risk = at_risk.sum(axis=0) - running_sum(at_risk) + at_risk
    ends = np.flatnonzero(event)
    at_risk -= sum_by_group(place[ends], len(distinct), weights, ends)  # events precede censoring
    censored = np.flatnonzero(~event)
    censored = sum_by_group(place[censored], len(distinct), weights, censored)
    stays = 1 - np.divide(censored, at_risk, out=np.zeros_like(censored), where=at_risk > 0)
    uncensored = np.concatenate([np.ones((1, stays.shape[1])), np.cumprod(stays, axis=0)])
    uncensored = uncensored[place[case]].astype(weights.dtype)
    w = weights[case]
    w = np.divide(w, uncensored, out=np.zeros_like(w), where=uncensored > 0)
    _, cases, below, tied = weights_at_cuts(risk, case, control, weights, w)
    with np.errstate(all="ignore"):
        pairs = cases.sum(axis=0) * sums([time > at], weights)[0]
        return np.where(pairs > 0, dot(cases, below + tied / 2) / pairs, np.nan)


def breslow(time, event, risk):
    """The baseline hazard, which converts log hazards to survival, as a dict: `mean` (of `risk`),
    `times`, and `cumulative`, the cumulative hazard at these times for a study of mean risk. The
    times are 0, the times of events (with more than MAX_KNOTS events, that many quantiles) and the
    longest time, rounded to three digits.

    Breslow's estimate (J R Stat Soc B 1972;34:216). None if no time is above 0. See
    `study.models.survival_at`.
    """
    usable = np.isfinite(time) & np.isfinite(event) & np.isfinite(risk)
    time, event, risk = (np.asarray(x, float)[usable] for x in (time, event, risk))
    if not len(time) or time.max() <= 0:
        return None
    mean, order = risk.mean(), np.argsort(time, kind="stable")
    time, event, hazard = time[order], event[order], np.exp(risk[order] - risk.mean())
    at_risk = np.cumsum(hazard[::-1])[::-1][np.searchsorted(time, time, side="left")]
    total = np.concatenate([[0.0], np.cumsum(event / at_risk)])
    knots = time[event == 1]
    if len(knots) > MAX_KNOTS:
        knots = np.quantile(knots, np.linspace(0, 1, MAX_KNOTS))
    knots = np.unique([float(f"{x:.3g}") for x in (0, *knots, time[-1])])
    cumulative = total[np.searchsorted(time, knots * (1 + 1e-9), side="right")]
    cumulative[-1] = total[-1]
    return {"mean": float(mean), "times": knots.tolist(), "cumulative": cumulative.tolist()}


def kaplan_meier(time, event):
    """(times, survival, low, high), each (G,), from time 0: the product-limit estimate with
    Greenwood's 95 % interval on the scale of log(-log), NaN where survival is 1 or 0.

    Studies are assumed independent: pass one per patient.
    """
    time, event = np.asarray(time, float), np.asarray(event, bool)
    from scipy import stats

    survival = stats.ecdf(stats.CensoredData(uncensored=time[event], right=time[~event])).sf
    with warnings.catch_warnings():  # it is not defined at 0 and 1
        warnings.simplefilter("ignore", RuntimeWarning)
        ends = survival.confidence_interval(method="log-log")
    low, high = (np.r_[np.nan, end.probabilities] for end in (ends.low, ends.high))
    return np.r_[0.0, survival.quantiles], np.r_[1.0, survival.probabilities], low, high
