"""Figures of an evaluation: each function draws one outcome on one axis.

A figure has one panel per label, at most `MAX_PANELS`. Bands and bars are 95 % intervals over
patients. Each kind of label lists its figures (`study.kinds`); PANELS describes them.
"""

import warnings
from dataclasses import dataclass

import numpy as np

from echofocus_core.base.figures import COLUMN, OKABE_ITO, PAGE, new_figure, save_figure
from echofocus_core.report.display import metric_name, number, with_interval
from echofocus_core.report.methods import FEWEST, SPAN
from echofocus_core.study import metrics as mt
from echofocus_core.study import statistics as st

MAX_PANELS, MAX_ROWS = 12, 60  # of a figure and of a forest plot
BAND_BOOT = 200  # resamples of a curve
GRID = np.linspace(0, 1, 101)  # on which the curves of resamples are averaged
BLUE, ORANGE, GREEN, GREY = *OKABE_ITO[:3], "0.6"
MAX_POINTS = 1000  # of a scatter plot; more are drawn as density
SPARSE = 5  # studies of a point of a smooth curve


def title_of(estimate, name=""):
    """'VSD (n = 120, 34 +)' and 'AUROC 0.912 (0.853 to 0.951)' in two lines. name: of the label."""
    unit = f" {estimate.unit}" if estimate.unit else ""
    positive = "" if estimate.n_positive < 0 else f", {estimate.n_positive} +"
    label = name or estimate.label
    label = label if len(label) < 33 else label[:30] + "..."
    value = f"{metric_name(estimate.metric)} {with_interval(estimate)}{unit}"
    return f"{label} (n = {estimate.n}{positive})\n{value}"


# --------------------------------------------------------------------------- curves over resamples


def every_cut(y, p, weights=None):
    """(true positives, false positives) at each distinct score, from no study positive to all:
    (G + 1,), or (G + 1, B) for weights (S, B)."""
    order = np.argsort(-p, kind="stable")
    last = np.diff(p[order], append=-np.inf) != 0  # of equal scores
    counts = mt.weights_or_ones(weights, len(y))[order]
    none = np.zeros((1, counts.shape[1]))
    of_class = (np.cumsum(counts * (y[order] == k)[:, None], axis=0)[last] for k in (1, 0))
    true, false = (np.concatenate([none, x]) for x in of_class)
    return (true[:, 0], false[:, 0]) if weights is None else (true, false)


def curves(truth, score, weights):
    """(sensitivity at each 1 - specificity of GRID, precision at each sensitivity of GRID), each
    (G, B)."""
    true, false = every_cut(truth, score, weights)
    roc, precision = np.full((2, len(GRID), weights.shape[1]), np.nan)
    for b in np.flatnonzero((true[-1] > 0) & (false[-1] > 0)):
        roc[:, b] = np.interp(GRID, false[:, b] / false[-1, b], true[:, b] / true[-1, b])
        positive = GRID[1:] * true[-1, b]
        precision[1:, b] = positive / (positive + np.interp(positive, true[:, b], false[:, b]))
    return roc, precision


def lowess(x, y, at, weights, span=SPAN):
    """(G, B): the mean of y (S,) at the points `at` (G,) of x, by local linear regression in each
    resample. weights (S, B).

    Cleveland (J Am Stat Assoc 1979;74:829): tricube weights that reach to the nearest `span` of the
    studies; without iterations against outliers, which would hide rare findings (Austin and
    Steyerberg, Stat Med 2014;33:517). NaN where the weights are those of fewer than SPARSE studies
    (Kish's effective number).
    """
    away = x - at[:, None]
    nearest = int(np.ceil(span * len(x)))
    reach = np.partition(abs(away), nearest - 1, axis=1)[:, nearest - 1, None] * (1 + 1e-9)
    kernel = np.clip(1 - (abs(away) / np.maximum(reach, 1e-9)) ** 3, 0, None) ** 3
    s0, s1, s2 = (kernel * away**k @ weights for k in range(3))
    t0, t1 = (kernel * away**k * y @ weights for k in range(2))
    area = s0 * s2 - s1**2
    with np.errstate(all="ignore"):
        fit = np.where(area > 1e-6 * s0 * s2, (s2 * t0 - s1 * t1) / area, t0 / s0)
        fit[kernel.sum(axis=1) ** 2 < SPARSE * (kernel**2).sum(axis=1)] = np.nan
    return fit


def calibration_curve(truth, probability, weights):
    """(points (G,), observed frequency at these (G, B)) by `lowess`, between 0 and 1."""
    at = np.linspace(probability.min(), probability.max(), 51)
    return at, np.clip(lowess(probability, truth, at, weights), 0, 1)


def has_calibration_curve(truth, probability):
    return len(truth) >= FEWEST and 0 < truth.sum() < len(truth) and np.ptp(probability) > 0


def bands(outcomes, patients, seed=0):
    """label -> [ROC (G, 2), precision (G, 2), calibration (G, 2) or nothing]: pointwise 95 % bands
    of findings."""
    chunks = {o.label: [] for o in outcomes}
    for weights in st.resamples(patients, BAND_BOOT, seed):
        for o in outcomes:
            (y, p), w = o.pairs(), weights[o.usable]
            smooth = [calibration_curve(y, p, w)[1]] if has_calibration_curve(y, p) else []
            chunks[o.label].append([*curves(y, p, w), *smooth])
    limits = {}
    for label, parts in chunks.items():
        each = [np.concatenate(part, axis=1) for part in zip(*parts, strict=True)]
        if each and np.isfinite(each[0]).any():
            each[0][0] = np.nan  # the curve is vertical there
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # points without a value
                limits[label] = [np.nanquantile(c, (0.025, 0.975), axis=1).T for c in each]
    return limits


# ------------------------------------------------------------------------------- panels of findings


def unit_square(axis, xlabel, ylabel):
    axis.set(xlabel=xlabel, ylabel=ylabel, aspect="equal")
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))


def draw_roc(axis, outcome, band=None, **_):
    y, p = outcome.pairs()
    axis.plot([0, 1], [0, 1], color=GREY, lw=0.8)
    if band is not None:
        axis.fill_between(GRID, *band[0].T, color=BLUE, alpha=0.2, lw=0)
    if 0 < y.sum() < len(y):
        true, false = every_cut(y, p)
        axis.plot(false / false[-1], true / true[-1], color=BLUE)
        if outcome.threshold is not None:
            positive = outcome.positive[outcome.usable]
            axis.plot(positive[y == 0].mean(), positive[y == 1].mean(), "o", color=ORANGE, ms=5)
    unit_square(axis, "1 \u2212 specificity", "sensitivity")


def draw_precision(axis, outcome, band=None, **_):
    y, p = outcome.pairs()
    if band is not None:
        axis.fill_between(GRID, *band[1].T, color=BLUE, alpha=0.2, lw=0)
    if 0 < y.sum() < len(y):
        true, false = (x[1:] for x in every_cut(y, p))
        axis.step(true / true[-1], true / (true + false), where="pre", color=BLUE)
        axis.axhline(y.mean(), color=GREY, lw=0.8)
    axis.set(xlabel="sensitivity (recall)", ylabel="PPV (precision)")
    axis.set(xlim=(-0.02, 1.02), ylim=(0, 1.04))


def draw_reliability(axis, outcome, band=None, recalibrated=None, **_):
    """A smooth calibration curve, and a histogram of the probabilities. recalibrated: name ->
    BinaryOutcome, whose curves are drawn instead of the band."""
    y, p = outcome.pairs()
    axis.plot([0, 1], [0, 1], color=GREY, lw=0.8)
    if has_calibration_curve(y, p):
        at, smooth = calibration_curve(y, p, np.ones((len(y), 1)))
        if band is not None and len(band) > 2 and not recalibrated:
            axis.fill_between(at, *band[2].T, color=BLUE, alpha=0.2, lw=0)
        axis.plot(at, smooth[:, 0], color=BLUE, label="original")
    styles = zip((ORANGE, GREEN), ("--", "-."), strict=True)
    for (name, other), (colour, dashes) in zip((recalibrated or {}).items(), styles, strict=False):
        q = other.pairs()[1]
        if has_calibration_curve(y, q):
            at, smooth = calibration_curve(y, q, np.ones((len(y), 1)))
            axis.plot(at, smooth[:, 0], color=colour, ls=dashes, label=name)
    if recalibrated and axis.get_legend_handles_labels()[0]:
        axis.legend(loc="upper left")
    elif len(y) and not recalibrated:
        counts, ends = np.histogram(p, 25, (0, 1))
        axis.bar(ends[:-1], counts / counts.max() * 0.15, 0.04, align="edge", color=GREY, alpha=0.6)
    unit_square(axis, "predicted probability", "observed frequency")


def draw_decision(axis, outcome, **_):
    """Net benefit of the model, of treating all and of treating none."""
    y, p = outcome.pairs()
    if len(y):
        cuts = np.linspace(0.01, 0.99, 99)
        axis.plot(cuts, mt.net_benefit(y, p, cuts), color=BLUE, label="model")
        axis.plot(cuts, mt.net_benefit(y, p * 0 + 1, cuts), color=GREY, label="all", lw=1)
        axis.axhline(0, color="black", lw=0.8, ls=":", label="none")
        top = max(y.mean(), 0.01)
        axis.set_xlim(0, min(1, max(0.2, 1.05 * p.max())))
        axis.set_ylim(-0.25 * top, 1.1 * top)
        axis.legend()
    axis.set(xlabel="threshold probability", ylabel="net benefit")


def draw_confusion(axis, outcome, **_):
    """Counts by truth (rows) and prediction, shaded by the share of the row."""
    y, p = outcome.pairs()
    if p.ndim == 2:
        names, predicted = outcome.classes, p.argmax(axis=1)
    else:
        names, predicted = ("absent", "present"), outcome.positive[outcome.usable]
    table = mt.confusion(y, predicted, len(names))[..., 0]
    part = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    axis.imshow(part, cmap="Blues", vmin=0, vmax=1)
    for (i, j), n in np.ndenumerate(table):
        colour = "white" if part[i, j] > 0.55 else "black"
        text = f"{n:.0f}\n{part[i, j]:.0%}"
        axis.text(j, i, text, ha="center", va="center", color=colour)
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names, rotation=90, va="center")
    axis.spines[:].set_visible(True)
    axis.set(xlabel="predicted", ylabel="truth")


# ------------------------------------------------------- panels of measurements, grades and events


def points(axis, x, y):
    """A scatter plot, or a density plot of many points."""
    if len(x) <= MAX_POINTS:
        axis.scatter(x, y, s=14, alpha=0.65, color=BLUE, lw=0)
    else:
        axis.hexbin(x, y, gridsize=45, cmap="Blues", bins="log", mincnt=1, lw=0)


def draw_scatter(axis, outcome, **_):
    y, f = outcome.pairs()
    unit = f" [{outcome.units}]" if outcome.units else ""
    if len(y):
        points(axis, y, f)
        ends = np.array([min(y.min(), f.min()), max(y.max(), f.max())])
        ends += np.array([-0.03, 0.03]) * (np.ptp(ends) or 1)
        axis.plot(ends, ends, color=GREY, lw=0.8)
        axis.set(xlim=ends, ylim=ends)
    axis.set(xlabel=f"measured{unit}", ylabel=f"predicted{unit}", aspect="equal")


def draw_bland_altman(axis, outcome, **_):
    y, f = outcome.pairs()
    unit = f" [{outcome.units}]" if outcome.units else ""
    if len(y):
        points(axis, (y + f) / 2, f - y)
        errors = mt.errors(y, f, np.ones((len(y), 1)))
        for name, style in (("bias", "-"), ("loa_low", "--"), ("loa_high", "--")):
            level = errors[name][0]
            if np.isfinite(level):
                axis.axhline(level, color=ORANGE, lw=1, ls=style)
                axis.text(0.99, level, number(level), transform=axis.get_yaxis_transform(),
                          fontsize=7, ha="right", va="bottom", color="#8a5a00")  # fmt: skip
        axis.axhline(0, color=GREY, lw=0.8)
    axis.set(xlabel=f"mean of both{unit}", ylabel=f"predicted \u2212 measured{unit}")


def draw_classes(axis, outcome, **_):
    """A ROC curve for each class against the others."""
    y, p = outcome.pairs()
    axis.plot([0, 1], [0, 1], color=GREY, lw=0.8)
    for k, name in enumerate(outcome.classes):
        if 0 < (y == k).sum() < len(y):
            true, false = every_cut((y == k).astype(float), p[:, k])
            text = f"{name} {mt.auroc(y == k, p[:, k]):.2f} ({(y == k).sum()})"
            colour = OKABE_ITO[k % len(OKABE_ITO)]
            axis.plot(false / false[-1], true / true[-1], color=colour, label=text)
    axis.set(xlabel="1 \u2212 specificity", ylabel="sensitivity", aspect="equal")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="lower right")


def draw_kaplan_meier(axis, outcome, patients, **_):
    """Survival by thirds of risk, with Greenwood's intervals, of each patient's first study."""
    rows = np.flatnonzero(outcome.usable)
    rows = rows[np.sort(np.unique(np.asarray(patients)[rows], return_index=True)[1])]
    time, risk, event = (x[rows] for x in (outcome.truth, outcome.predicted, outcome.event))
    third = np.searchsorted(np.quantile(risk, (1 / 3, 2 / 3)), risk) if len(risk) else risk
    names = ("low risk", "middle", "high risk")
    for k, (name, colour) in enumerate(zip(names, (GREEN, BLUE, ORANGE), strict=True)):
        rows = third == k
        if rows.any():
            times, survival, low, high = mt.kaplan_meier(time[rows], event[rows])
            text = f"{name} ({event[rows].sum():.0f} of {rows.sum()})"
            axis.step(times, survival, where="post", color=colour, label=text)
            axis.fill_between(times, low, high, step="post", color=colour, alpha=0.15, lw=0)
    axis.set(xlabel=outcome.units, ylabel="survival", ylim=(0, 1.02))
    if len(risk):
        axis.legend(loc="lower left")


def draw_survival_calibration(axis, outcome, patients, **_):
    """Observed against predicted survival at each year, by groups of predicted survival."""
    rows = outcome.calibration(patients)
    axis.plot([0, 1], [0, 1], color=GREY, lw=0.8)
    for k, year in enumerate(dict.fromkeys(row["year"] for row in rows)):
        names = ("predicted", "observed", "ci_low", "ci_high")
        shown = np.array([[row[x] for x in names] for row in rows if row["year"] == year]).T
        x, y, low, high = np.where(np.isnan(shown), shown[1], shown)
        colour, bars = OKABE_ITO[k % len(OKABE_ITO)], [np.maximum(y - low, 0), high - y]
        axis.errorbar(x, y, bars, fmt="o-", color=colour, ms=4, lw=1, label=f"{year:g} years")
    if rows:
        axis.legend(loc="upper left")
    unit_square(axis, "predicted survival", "observed survival")


@dataclass(frozen=True)
class Panel:
    """A figure of one kind of outcome: the function that draws a panel, and its title's metric."""

    title: str
    draw: object
    metric: str
    legend: str


PANELS = {
    "roc_curves": Panel(
        "ROC curves", draw_roc, "auroc",
        "Shaded: pointwise 95 % band over patients. Dot: the threshold.",
    ),
    "pr_curves": Panel(
        "Precision and recall", draw_precision, "average_precision",
        "Shaded: pointwise 95 % band over patients. Grey line: the prevalence.",
    ),
    "reliability": Panel(
        "Calibration", draw_reliability, "calibration_slope",
        f"Line, from {FEWEST} studies: LOWESS (local linear, span {SPAN}) with a pointwise 95 % "
        "band over patients; on the diagonal, predicted and observed risk are equal. Bars: number "
        "of studies by probability.",
    ),
    "recalibration": Panel(
        "Recalibration", draw_reliability, "calibration_slope",
        f"LOWESS (span {SPAN}, from {FEWEST} studies) before and after recalibration, which was "
        "fitted on the validation fold. Titles: before recalibration.",
    ),
    "decision_curves": Panel(
        "Decision curves", draw_decision, "auroc",
        "Net benefit (Vickers and Elkin 2006) of treating by the model, of treating all and of "
        "treating none.",
    ),
    "scatter_plots": Panel(
        "Predicted against measured", draw_scatter, "median_absolute_error",
        "On the line, both are equal.",
    ),
    "bland_altman": Panel(
        "Agreement (Bland and Altman)", draw_bland_altman, "bias",
        "Solid: mean difference; dashed: limits of agreement (1.96 SD).",
    ),
    "roc_classes": Panel(
        "ROC curves, each class against the others", draw_classes, "auroc",
        "Legend: the AUROC and the number of studies of each class.",
    ),
    "kaplan_meier": Panel(
        "Survival by thirds of risk", draw_kaplan_meier, "c_index",
        "With Greenwood's 95 % intervals, the first study of each patient. Legend: events of "
        "patients.",
    ),
    "survival_calibration": Panel(
        "Calibration of survival", draw_survival_calibration, "c_index",
        "Kaplan-Meier estimate with Greenwood's 95 % interval against the mean predicted survival, "
        "by thirds of predicted survival (fifths from 100 events), the first study of each "
        "patient. On the diagonal, both are equal.",
    ),
    "confusion": Panel(
        "Confusion matrix", draw_confusion, "f1",
        "Rows: truth. Columns: predicted at the threshold.",
    ),
    "confusion_classes": Panel(
        "Confusion matrix of grades", draw_confusion, "balanced_accuracy",
        "Rows: truth. Columns: the most probable class.",
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------ whole figures


def select_panels(outcomes):
    """The MAX_PANELS outcomes with the most examples, in their order."""
    rows = sorted(range(len(outcomes)), key=lambda i: -outcomes[i].n_examples)[:MAX_PANELS]
    return [outcomes[i] for i in sorted(rows)]


def panel_figure(outcomes, draw, titles, path, patients=None, bands=None, names=None, more=None):
    """Draw one panel per outcome, as wide as a column or a page of a journal.

    titles: label -> Estimate; bands: of `bands`, by label; names: label -> its plain name; more:
    label -> options of `draw`.
    """
    n = len(outcomes)
    columns = 1 if n == 1 else 2 if n in (2, 4) else 3
    rows = -(-n // columns)
    wide = COLUMN if n == 1 else PAGE
    top = 0.36 if columns < 3 else 0.47  # inches of the title: a narrow panel has three lines
    high = (wide / columns + top - 0.21) * rows
    edges = dict(left=0.6 / wide, right=1 - 0.1 / wide, bottom=0.42 / high, top=1 - top / high)
    gaps = {"wspace": (0.28, 0.28, 0.36)[columns - 1], "hspace": (0.5, 0.4, 0.62)[columns - 1]}
    figure, axes = new_figure(
        rows, columns, figsize=(wide, high), squeeze=False, gridspec_kw=edges | gaps
    )
    for axis in axes.flat[n:]:
        axis.axis("off")
    for axis, outcome in zip(axes.flat, outcomes, strict=False):
        label = outcome.label
        options = (more or {}).get(label, {})
        draw(axis, outcome, patients=patients, band=(bands or {}).get(label), **options)
        title = title_of(titles[label], (names or {}).get(label))
        axis.set_title(title.replace(" (n", "\n(n") if columns == 3 else title, fontsize=7)
    save_figure(figure, path)


def forest(rows, title, path, reference=None, headings=()):
    """Draw a forest plot as wide as a page. rows: (text, Estimate), of which those without a value
    are left out; headings: texts in bold."""
    rows = [row for row in rows if np.isfinite(row[1].value)][:MAX_ROWS]
    height = 0.55 + 0.2 * max(len(rows), 1)
    figure, axis = new_figure(figsize=(PAGE, height))
    figure.subplots_adjust(0.33, 0.42 / height, 0.66, 1 - 0.05 / height)
    style = dict(transform=axis.get_yaxis_transform(), va="center", fontsize=7.5)
    limits = []
    for i, (text, x) in enumerate(rows):
        bold = "bold" if text in headings else "normal"
        text = text if len(text) < 45 else text[:42] + "..."
        axis.text(-0.02, i, text, ha="right", fontweight=bold, **style)
        ends = [e if np.isfinite(e) else x.value for e in (x.ci_low, x.ci_high)]
        limits += ends
        axis.plot(ends, [i, i], color=BLUE)
        axis.plot(x.value, i, "s", color=BLUE, ms=4)
        positive = "" if x.n_positive < 0 else f", {x.n_positive} +"
        axis.text(1.02, i, f"{with_interval(x)}   n = {x.n}{positive}", ha="left", **style)
    if reference is not None and np.isfinite(reference):
        axis.axvline(reference, color=GREY, lw=0.8, ls="--")
    if limits:
        low, high = min(limits), max(limits)
        margin = 0.05 * (high - low) or 0.05 * abs(low) or 0.05
        axis.set_xlim(low - margin, high + margin)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_yticks([])
    axis.set_xlabel(title)
    axis.spines["left"].set_visible(False)
    save_figure(figure, path)
