"""The metrics of an epoch's validation as one line of text."""

import numpy as np

from echofocus_core.study.scaling import scale


def metric_line(answers, scaling):
    """One metric for each kind of label, as text: the median over its labels.

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
    texts = []
    for name, each in metrics.items():
        each = [x for x in each if not np.isnan(x)]
        text = f"{np.median(each):.3f}" if each else "not defined"
        texts.append(f"{name} {text}" + f" (median of {len(each)} labels)" * (len(each) > 1))
    return ", ".join(texts)
