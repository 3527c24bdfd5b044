"""Measurements in physical units."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from echofocus_core.study import metrics as mt
from echofocus_core.study.kinds.base import FEWEST, Label, Metric, Outcome
from echofocus_core.study.scaling import unscale

QUARTERS = 4  # quantile groups of the truth, for which the error is also computed
AGREEMENT = "Agreement"
IN_UNITS = {"heading": "Error", "has_unit": True, "fewest": FEWEST}


class Regression(Label):
    kind, output_kind, is_number = "regression", "regression", True
    metric_name = "median absolute error"

    @staticmethod
    def losses(z, y):
        return (z - y) ** 2

    def readable(self, z, scaling, hazards):
        return unscale(z, [self.name], scaling or {})

    def metric(self, y, p):
        return np.median(abs(y - p)) if len(y) else np.nan

    def score_unit(self, scaling, unit):
        if scaling[self.name]["apply_boxcox"]:
            return 1.0, "standard deviations"  # of the transformed label: its unit is not linear
        name = "points" if unit == "%" else unit or "label's unit"  # differences of percentages
        return float(scaling[self.name]["stdev"]), name

    def outcome(self, y, p, unit="", threshold=None, years=()):
        return RegressionOutcome(self.name, y[:, 0], p[:, 0], unit)


@dataclass(eq=False)
class RegressionOutcome(Outcome):
    """A measurement in `units`: truth and predicted (S,)."""

    units: str = ""

    headline, averages_truths = "median_absolute_error", True
    METRICS: ClassVar = (
        Metric("median_absolute_error", **IN_UNITS),
        Metric("mean_absolute_error", **IN_UNITS),
        Metric("rmse", interval="log", **IN_UNITS),
        Metric("bias", **IN_UNITS),
        Metric("loa_low", AGREEMENT, True, interval="limit_of_agreement", fewest=FEWEST),
        Metric("loa_high", AGREEMENT, True, interval="limit_of_agreement", fewest=FEWEST),
        Metric("r2", AGREEMENT, interval="log_rest", fewest=FEWEST),
        Metric("pearson", AGREEMENT, interval="fisher", fewest=FEWEST),
        Metric("spearman", AGREEMENT, interval="fisher", fewest=FEWEST),
        *(
            Metric(
                f"median_absolute_error_q{q + 1}",
                has_unit=True,
                fewest=FEWEST,
                limit=lambda o, q=q: o.usable & (o.quarter(o.truth) == q),
                undefined="no study in this quarter",
            )
            for q in range(QUARTERS)
        ),
    )
    figures = ("scatter_plots", "bland_altman")
    methods = (
        "Agreement of measurements was assessed by the median and mean absolute error, root mean "
        "squared error, R\u00b2, correlation, and bias with 95 % limits of agreement."
    )

    def why_undefined(self):
        if self.n == 1:
            return "only one study"
        if np.ptp(self.truth[self.usable]) == 0:
            return "the truth is the same in all studies"
        if np.ptp(self.predicted[self.usable]) == 0:
            return "the prediction is the same in all studies"
        return ""

    @cached_property
    def edges(self):
        """(QUARTERS + 1,): quantiles of the truth, the limits of the quarters q1, q2, ..."""
        truth = self.truth[self.usable]
        return np.quantile(truth, np.linspace(0, 1, QUARTERS + 1)) if len(truth) else np.array([])

    def quarter(self, truth):
        return np.searchsorted(self.edges[1:-1], truth, side="left")

    def compute(self, weights):
        y, f = self.pairs()
        metrics = mt.errors(y, f, weights) | {"spearman": mt.spearman(y, f, weights)}
        metrics["median_absolute_error"] = mt.weighted_median(abs(f - y), weights)
        part = self.quarter(y)
        for q in range(QUARTERS):
            name, rows = f"median_absolute_error_q{q + 1}", np.flatnonzero(part == q)
            metrics[name] = mt.weighted_median(abs(f - y)[rows], weights[rows])
        return metrics
