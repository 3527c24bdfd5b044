"""Figures of an evaluation: each function draws one outcome on one axis.

A figure has one panel per label, at most `MAX_PANELS`. Bands and bars are 95 % intervals over
patients. Each kind of label lists its figures (`study.kinds`); PANELS describes them.
"""

from dataclasses import dataclass

import numpy as np

from echofocus_core.base.figures import OKABE_ITO, new_figure, save_figure
from echofocus_core.study import metrics as mt
from echofocus_core.study import statistics as st

MAX_PANELS, MAX_ROWS = 12, 60  # of a figure and of a forest plot
BAND_BOOT = 200  # resamples of a curve
GRID = np.linspace(0, 1, 101)  # on which the curves of resamples are averaged
BLUE, ORANGE, GREEN, GREY = *OKABE_ITO[:3], "0.6"
MAX_POINTS = 1000  # of a scatter plot; more are drawn as density
NAMES = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "median_absolute_error": "median error",
    "c_index": "C index",
}


def number(value, like=0.0):
    """A number as text with three digits, and as many decimals as `like` would have."""
    if not np.isfinite(value):
        return "n/a" if np.isnan(value) else "infinite"
    size = max(abs(value), abs(like) if np.isfinite(like) else 0)
    digits = 3 if size <= 1 else 2 if size < 10 else 1 if size < 100 else 0
    return f"{value:.{digits}f}"


def with_interval(estimate):
    """'0.912 (0.853 to 0.951)'; only the value if the interval is not defined."""
    text = number(estimate.value, estimate.ci_high)
    if np.isfinite(estimate.ci_low):
        ends = (number(x, estimate.ci_high) for x in (estimate.ci_low, estimate.ci_high))
        text += " ({} to {})".format(*ends)
    return text


def metric_name(metric, unit=""):
    return NAMES.get(metric, metric.replace("_", " ")) + (f" [{unit}]" if unit else "")


def title_of(estimate):
    """'VSD (n = 120, 34 +)' and 'AUROC 0.912 (0.853 to 0.951)' in two lines."""
    unit = f" {estimate.unit}" if estimate.unit else ""
    positive = "" if estimate.n_positive < 0 else f", {estimate.n_positive} +"
    label = estimate.label if len(estimate.label) < 33 else estimate.label[:30] + "..."
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


def bands(outcomes, patients, seed=0):
    """label -> (ROC (G, 2), precision (G, 2)): pointwise 95 % bands of findings."""
    chunks = {o.label: [] for o in outcomes}
    for weights in st.resamples(patients, BAND_BOOT, seed):
        for o in outcomes:
            chunks[o.label].append(curves(*o.pairs(), weights[o.usable]))
    limits = {}
    for label, parts in chunks.items():
        both = [np.concatenate(part, axis=1) for part in zip(*parts, strict=True)]
        if both and np.isfinite(both[0]).any():
            ends = [np.nanquantile(c[1:], (0.025, 0.975), axis=1).T for c in both]
            limits[label] = [np.vstack([np.full((1, 2), np.nan), e]) for e in ends]
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
    unit_square(axis, "1 - specificity", "sensitivity")


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


def draw_reliability(axis, outcome, patients=None, **_):
    """Observed frequency in ten groups of equal size, with Wilson's intervals; a histogram."""
    from scipy import stats  # takes a second to import

    y, p = outcome.pairs()
    axis.plot([0, 1], [0, 1], color=GREY, lw=0.8)
    if len(y):
        edges = np.unique(np.quantile(p, np.linspace(0, 1, 11)))
        part = np.clip(np.searchsorted(edges, p, side="right") - 1, 0, max(len(edges) - 2, 0))
        patient = np.asarray(patients)[outcome.usable]
        for k in np.unique(part):
            n, mean = len(np.unique(patient[part == k])), y[part == k].mean()
            low, high = stats.binomtest(round(mean * n), n).proportion_ci(method="wilson")
            bars = [[max(0, mean - low)], [max(0, high - mean)]]
            axis.errorbar(p[part == k].mean(), mean, bars, fmt="o", color=BLUE, ms=4, lw=1)
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
        axis.legend(fontsize=7, frameon=False)
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
        axis.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8, rotation=90, va="center")
    axis.set(xlabel="predicted", ylabel="truth")


# ------------------------------------------------------- panels of measurements, grades and events


def points(axis, x, y):
    """A scatter plot, or a density plot of many points."""
    if len(x) <= MAX_POINTS:
        axis.scatter(x, y, s=9, alpha=0.5, color=BLUE, lw=0)
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
    axis.set(xlabel=f"mean of both{unit}", ylabel=f"predicted - measured{unit}")


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
    axis.set(xlabel="1 - specificity", ylabel="sensitivity", aspect="equal")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, loc="lower right", frameon=False)


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
        axis.legend(fontsize=7, loc="lower left", frameon=False)


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
        axis.legend(fontsize=7, loc="upper left", frameon=False)
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
        "Ten groups of equal size with 95 % intervals; on the diagonal, predicted and observed "
        "risk are equal. Grey: number of studies by probability.",
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
        "Truth and prediction", draw_confusion, "f1",
        "Rows: truth. Columns: predicted at the threshold.",
    ),
    "confusion_classes": Panel(
        "Truth and prediction of grades", draw_confusion, "balanced_accuracy",
        "Rows: truth. Columns: the most probable class.",
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------ whole figures


def select_panels(outcomes):
    """The MAX_PANELS outcomes with the most examples, in their order."""
    rows = sorted(range(len(outcomes)), key=lambda i: -outcomes[i].n_examples)[:MAX_PANELS]
    return [outcomes[i] for i in sorted(rows)]


def panel_figure(outcomes, draw, titles, path, patients=None, bands=None):
    """Draw one panel per outcome. titles: label -> Estimate; bands: of `bands`, by label."""
    n = len(outcomes)
    columns = {4: 2, 5: 3, 6: 3}.get(n, min(n, 4))
    rows = -(-n // columns)
    wide, high = 3.6 * columns, 3.75 * rows
    edges = dict(left=0.65 / wide, right=1 - 0.2 / wide, bottom=0.55 / high, top=1 - 0.5 / high)
    figure, axes = new_figure(
        rows, columns, figsize=(wide, high), squeeze=False,
        gridspec_kw=edges | {"wspace": 0.3, "hspace": 0.42},
    )  # fmt: skip
    for axis in axes.flat[n:]:
        axis.axis("off")
    for axis, outcome in zip(axes.flat, outcomes, strict=False):
        draw(axis, outcome, patients=patients, band=(bands or {}).get(outcome.label))
        axis.set_title(title_of(titles[outcome.label]), fontsize=8)
        axis.tick_params(labelsize=8)
        axis.xaxis.label.set_size(9)
        axis.yaxis.label.set_size(9)
    save_figure(figure, path)


def forest(rows, title, path, reference=None, headings=()):
    """Draw a forest plot. rows: (text, Estimate); headings: texts in bold."""
    rows = rows[:MAX_ROWS]
    height = 0.9 + 0.25 * len(rows)
    figure, axis = new_figure(figsize=(9, height))
    figure.subplots_adjust(0.27, 0.6 / height, 0.66, 0.98)
    style = dict(transform=axis.get_yaxis_transform(), va="center", fontsize=8)
    limits = []
    for i, (text, x) in enumerate(rows):
        bold = "bold" if text in headings else "normal"
        axis.text(-0.02, i, text, ha="right", fontweight=bold, **style)
        if np.isfinite(x.value):
            ends = [e if np.isfinite(e) else x.value for e in (x.ci_low, x.ci_high)]
            limits += ends
            axis.plot(ends, [i, i], color=BLUE, lw=1.2)
            axis.plot(x.value, i, "s", color=BLUE, ms=5)
        positive = "" if x.n_positive < 0 else f", {x.n_positive} +"
        value = with_interval(x) if np.isfinite(x.value) else f"n/a: {x.note}"
        axis.text(1.02, i, f"{value}   n = {x.n}{positive}", ha="left", **style)
    if reference is not None and np.isfinite(reference):
        axis.axvline(reference, color=GREY, lw=0.8, ls="--")
    if limits:
        low, high = min(limits), max(limits)
        margin = 0.05 * (high - low) or 0.05 * abs(low) or 0.05
        axis.set_xlim(low - margin, high + margin)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_yticks([])
    axis.set_xlabel(title, fontsize=9)
    axis.spines[["left", "right", "top"]].set_visible(False)
    save_figure(figure, path)
