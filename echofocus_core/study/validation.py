"""The metrics of an epoch's validation."""

import numpy as np

from echofocus_core.study.scaling import scale


def validation_metrics(answers, scaling):
    """name -> (value, number of labels): a metric for each kind of label, the median over its
    labels; NaN if it is not defined.

    answers: [(label, targets (S, c), readable answers (S, n))]. The error of a single measurement
    is in its unit, of several measurements in standard deviations.
    """
    several, metrics = sum(label.output_kind == "regression" for label, *_ in answers) > 1, {}
    for label, y, p in answers:
        rows = np.isfinite(y).all(axis=1) & np.isfinite(p).all(axis=1)
        y, p, name = y[rows], p[rows], label.metric_name
        if several and label.output_kind == "regression":
            y, p = (scale(x, [label.name], scaling) for x in (y, p))
            name += " in SD"
        metrics.setdefault(name, []).append(label.metric(y, p))
    defined = {name: [x for x in each if not np.isnan(x)] for name, each in metrics.items()}
    return {
        name: (float(np.median(each)) if each else np.nan, len(each))
        for name, each in defined.items()
    }


def metric_line(metrics):
    """`validation_metrics` as text."""
    texts = []
    for name, (value, n) in metrics.items():
        text = f"{value:.3f}" if n else "not defined"
        texts.append(f"{name} {text}" + f" (median of {n} labels)" * (n > 1))
    return ", ".join(texts)
