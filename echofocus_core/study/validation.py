"""What a validation fold decides: thresholds, baseline hazards, and the line of an epoch."""

import numpy as np

from echofocus_core.study.labels import scale
from echofocus_core.study.metrics import auroc, breslow, c_index, choose_threshold


def chosen(truth, values, outputs, learnt, rule):
    """(finding -> threshold by `rule`, survival output -> `breslow`'s dict), where there are some.

    truth: target columns (S, C), values: readable answers (S, O), of `outputs`; learnt: labels.
    """
    thresholds, hazards = {}, {}
    for label in learnt:
        y, p = truth[:, outputs.places[label]], values[:, outputs.slices[label].start]
        if outputs.kinds[label] == "binary":
            thresholds[label] = choose_threshold(y[:, 0], p, rule)
        elif outputs.kinds[label] == "survival":
            (name,) = outputs.names_of(label)
            hazards[name] = breslow(*y.T, p)
    return [{k: x for k, x in found.items() if x is not None} for found in (thresholds, hazards)]


def metric_line(truth, values, outputs, learnt, scaling):
    """A metric of each kind of label as text, the median over its labels: errors of one measurement
    in its unit, of several in standard deviations. Arguments as of `chosen`."""
    several = len(outputs.of_kind("regression")) > 1
    names = {"regression": "median absolute error" + " in SD" * several, "survival": "C"}
    found = {}
    for label in learnt:
        kind, y = outputs.kinds[label], truth[:, outputs.places[label]]
        p = values[:, outputs.slices[label]]
        rows = np.isfinite(y).all(axis=1) & np.isfinite(p).all(axis=1)
        y, p = y[rows], p[rows]
        if kind == "regression":
            if several:
                y, p = (scale(x, [label], scaling) for x in (y, p))
            value = np.median(abs(y - p)) if len(y) else np.nan
        elif kind == "survival":
            value = c_index(y[:, 0], y[:, 1] == 1, p[:, 0]) if len(y) else np.nan
        elif kind == "multiclass":
            value = np.mean([auroc(y[:, 0] == k, column) for k, column in enumerate(p.T)])
        else:
            value = auroc(y[:, 0], p[:, 0])
        found.setdefault(names.get(kind, "AUROC"), []).append(value)
    texts = []
    for name, each in found.items():
        each = [x for x in each if not np.isnan(x)]
        text = f"{np.median(each):.3f}" if each else "not defined"
        texts.append(f"{name} {text}" + f" (median of {len(each)} labels)" * (len(each) > 1))
    return ", ".join(texts)
