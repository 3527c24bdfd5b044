"""Recalibration of findings: fitted on the validation fold, shown on the evaluated studies."""

from dataclasses import replace

import numpy as np
from scipy import special

from echofocus_core.base.console import some
from echofocus_core.report.display import Table, cell_of, metric_name
from echofocus_core.study import metrics as mt
from echofocus_core.study import statistics as st
from echofocus_core.study.evaluation import join_folds
from echofocus_core.study.kinds.binary import BinaryOutcome

METHODS = {"intercept": "Intercept", "slope": "Intercept and slope", "isotonic": "Isotonic"}
ISOTONIC_FROM = 200  # studies; it overfits below about 1000 (Niculescu-Mizil, Caruana, ICML 2005)
METRICS = ("brier", "calibration_slope", "calibration_intercept", "ece", "auroc")


def log_odds(p):
    return special.logit(np.clip(p, mt.NEAREST, 1 - mt.NEAREST))


def fit_recalibration(y, p):
    """method of METHODS -> function of probabilities, fitted to truths and probabilities (S,).

    Intercept, and intercept and slope: logistic regression of the truth on the log-odds (Cox,
    Biometrika 1958;45:562). Isotonic: the monotone fit of least squares, linear between its points
    (Zadrozny and Elkan, KDD 2002), from ISOTONIC_FROM studies. {} without both classes; a method
    without a finite fit is left out.
    """
    if not 0 < y.sum() < len(y):
        return {}
    x = log_odds(p)
    target, ones, methods = np.array([[y.sum()], [(y * x).sum()]]), np.ones((len(y), 1)), {}
    for name in ("intercept", "slope"):
        with np.errstate(all="ignore"):  # where the classes are separated
            a, b = mt.fit_logistic(x, ones, target, slope_is_1=name == "intercept")[:, 0]
        if np.isfinite(a) and np.isfinite(b):
            methods[name] = lambda p, a=a, b=b: special.expit(a + b * log_odds(p))
    if len(y) < ISOTONIC_FROM:
        return methods
    from sklearn.isotonic import IsotonicRegression  # takes a second to import

    steps = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(p, y)
    return methods | {"isotonic": steps.predict}


def recalibrate(outcomes, validation):
    """label -> {method: BinaryOutcome with recalibrated probabilities}.

    outcomes: findings to recalibrate; validation: outcomes of the validation fold, by label.
    """
    recalibrated = {}
    for o in outcomes:
        methods = fit_recalibration(*validation[o.label].pairs()) if o.label in validation else {}
        finite = np.isfinite(o.predicted)
        for name, function in methods.items():
            p = np.full(len(o.predicted), np.nan)
            p[finite] = function(o.predicted[finite])
            outcome = replace(o, predicted=p, threshold=None, prevalence=None)
            recalibrated.setdefault(o.label, {})[name] = outcome
    return recalibrated


def recalibrate_folds(parts, validations):
    """(label -> {method: BinaryOutcome}, label -> Outcome of the validation): each part, Studies of
    a model's test fold, recalibrated on that model's validation fold, and joined.

    Labels and methods that a fold lacks are left out.
    """
    each = []
    for part, validation in zip(parts, validations, strict=True):
        findings = [o for o in part.outcomes if isinstance(o, BinaryOutcome) and o.n]
        each.append(recalibrate(findings, {o.label: o for o in validation.outcomes}))
    recalibrated = {}
    for label, methods in each[0].items():
        for method in methods:
            if all(method in fold.get(label, {}) for fold in each):
                shown = [
                    replace(part, outcomes=[fold[label][method]])
                    for part, fold in zip(parts, each, strict=True)
                ]
                recalibrated.setdefault(label, {})[method] = join_folds(shown).outcomes[0]
    return recalibrated, {o.label: o for o in join_folds(validations).outcomes}


def recalibration_rows(recalibrated, estimates, patients, n_boot, seed):
    """[(label, method, {metric: Estimate})], the original first. estimates: of the originals."""
    rows, methods = [], list(METHODS)
    by_method = {}
    for method in methods:
        outcomes = [each[method] for each in recalibrated.values() if method in each]
        for x in st.estimates(outcomes, patients, n_boot, seed) if outcomes else ():
            by_method[x.label, method, x.metric] = x
    by_method |= {(x.label, "original", x.metric): x for x in estimates}
    for label in recalibrated:
        for method in ("original", *methods):
            values = {m: by_method.get((label, method, m)) for m in METRICS}
            if all(values.values()):
                rows.append((label, method, values))
    return rows


def recalibration_table(rows, fitted, names):
    """The Table of `recalibration_rows`. fitted: label -> outcome of the validation fold."""
    isotonic = {label for label, method, _ in rows if method == "isotonic"}
    few = [names(x) for x in dict.fromkeys(label for label, *_ in rows) if x not in isotonic]
    return Table(
        "Recalibration fitted on the validation fold",
        ["Label", "Probabilities", "Fitted on (positive)", *map(metric_name, METRICS)],
        [
            [names(label), METHODS.get(method, "Original"),
             f"{fitted[label].n} ({fitted[label].n_positive})" if method in METHODS else "",
             *(cell_of(x, note=False) for x in each.values())]
            for label, method, each in rows
        ],
        "The evaluated studies had no part in the fits. A calibrated model has slope 1 and "
        "intercept 0." + f" No isotonic fit on fewer than {ISOTONIC_FROM} studies: {some(few)}."
        * bool(few), n_text=2,
    )  # fmt: skip
