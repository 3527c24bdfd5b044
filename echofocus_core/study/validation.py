"""Results of the validation fold: thresholds, baseline hazards, and the metrics of an epoch."""

import numpy as np

from echofocus_core.study.scaling import scale


def thresholds_and_hazards(truth, values, outputs, learnt, rule):
    """(finding -> threshold by `rule`, survival output -> `breslow`'s dict), if they exist.

    truth: target columns (S, C), values: readable answers (S, O), of `outputs`; learnt: labels.
    """
    thresholds, hazards = {}, {}
    for label in outputs.each:
        y, p = truth[:, outputs.places[label.name]], values[:, outputs.slices[label.name]]
        if label.name in learnt:
            thresholds[label.name] = label.threshold(y, p, rule)
            hazards[label.outputs[0]] = label.hazard(y, p)
    return [{k: x for k, x in each.items() if x is not None} for each in (thresholds, hazards)]


def metric_line(truth, values, outputs, learnt, scaling):
    """One metric for each kind of label, as text: the median over its labels. The error of a single
    measurement is in its unit, of several in standard deviations. Arguments as above."""
    measured, metrics = outputs.of_kind("regression"), {}
    for label in outputs.each:
        if label.name not in learnt:
            continue
        y, p = truth[:, outputs.places[label.name]], values[:, outputs.slices[label.name]]
        rows = np.isfinite(y).all(axis=1) & np.isfinite(p).all(axis=1)
        y, p, name = y[rows], p[rows], label.metric_name
        if label.name in measured and len(measured) > 1:
            y, p = (scale(x, [label.name], scaling) for x in (y, p))
            name += " in SD"
        metrics.setdefault(name, []).append(label.metric(y, p))
    texts = []
    for name, each in metrics.items():
        each = [x for x in each if not np.isnan(x)]
        text = f"{np.median(each):.3f}" if each else "not defined"
        texts.append(f"{name} {text}" + f" (median of {len(each)} labels)" * (len(each) > 1))
    return ", ".join(texts)
