"""Findings that are present (1) or absent (0)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from echofocus_core.base.console import UserError
from echofocus_core.study import metrics as mt
from echofocus_core.study.kinds.base import Label, Metric, Outcome, rarer, sigmoid


class Binary(Label):
    kind, output_kind, has_groups = "binary", "binary", True

    def faults(self, y, low, high):
        return {"not 0 or 1": y.notna() & ~y.isin([0, 1])}

    def counts(self, y):
        return {"-": int((y == 0).sum()), "+": int((y == 1).sum())}

    def summary(self, y):
        return f"{y.sum():.0f} of {len(y)}" + (f" ({y.mean():.1%})" if len(y) else "")

    @staticmethod
    def losses(z, y):
        from torch.nn.functional import binary_cross_entropy_with_logits

        return binary_cross_entropy_with_logits(z, y, reduction="none")

    def readable(self, z, scaling, hazards):
        return sigmoid(z)

    def metric(self, y, p):
        return mt.auroc(y[:, 0], p[:, 0])

    def threshold(self, y, p, rule):
        return mt.choose_threshold(y[:, 0], p[:, 0], rule)

    def outcome(self, y, p, unit="", threshold=None, years=()):
        return BinaryOutcome(self.name, y[:, 0], p[:, 0], threshold)


def with_finding(outcome):
    return outcome.usable & (outcome.truth == 1)


def without_finding(outcome):
    return outcome.usable & (outcome.truth == 0)


RANKING, AT_THRESHOLD = "Discrimination and calibration", "At the threshold"
FIT = {"undefined": "no finite fit: the probabilities are all equal or separate the classes"}
CUT = {
    "needs": {"threshold": "no threshold is stored with the model"},
    "undefined": "division by zero: all or none of the studies are positive at the threshold",
}
BAYES = CUT | {"needs": CUT["needs"] | {"prevalence": "no prevalence is given"}}


@dataclass(eq=False)
class BinaryOutcome(Outcome):
    """A finding: truth 0 or 1, predicted: its probability, positive from `threshold` on.

    threshold: one number, or (S,) one per study: each fold of a cross-validation has its own.
    """

    threshold: float | np.ndarray | None = None
    prevalence: float | None = None

    headline = "auroc"
    METRICS: ClassVar = (
        Metric("auroc", RANKING, denominator=lambda o: rarer(o, o.truth == 1)),
        Metric("average_precision", RANKING),
        Metric("brier", RANKING),
        Metric("calibration_slope", RANKING, **FIT),
        Metric("calibration_intercept", RANKING, **FIT),
        Metric("ece", RANKING),
        Metric("sensitivity", AT_THRESHOLD, denominator=with_finding, **CUT),
        Metric("specificity", AT_THRESHOLD, denominator=without_finding, **CUT),
        Metric("ppv", AT_THRESHOLD, denominator=lambda o: o.usable & o.positive, **CUT),
        Metric("npv", AT_THRESHOLD, denominator=lambda o: o.usable & ~o.positive, **CUT),
        Metric("lr_positive", AT_THRESHOLD, **CUT),
        Metric("lr_negative", AT_THRESHOLD, **CUT),
        Metric("f1", AT_THRESHOLD, **CUT),
        Metric("true_positive", is_count=True, **CUT),
        Metric("false_positive", is_count=True, **CUT),
        Metric("true_negative", is_count=True, **CUT),
        Metric("false_negative", is_count=True, **CUT),
        Metric("ppv_at_prevalence", AT_THRESHOLD, **BAYES),
        Metric("npv_at_prevalence", AT_THRESHOLD, **BAYES),
    )
    figures = ("roc_curves", "pr_curves", "reliability", "decision_curves", "confusion")
    methods = (
        "Discrimination was measured by the area under the receiver operating characteristic curve "
        "(AUROC) and average precision; calibration by the Brier score, calibration slope and "
        "intercept, expected calibration error and a calibration plot; clinical utility by "
        "decision curves."
    )

    def __post_init__(self):
        super().__post_init__()
        if not np.isin(self.truth[np.isfinite(self.truth)], (0, 1)).all():
            raise UserError(f"{self.label}: a truth is neither 0, 1 nor missing")
        if np.any((self.predicted < 0) | (self.predicted > 1)):
            raise UserError(
                f"{self.label}: a probability is not between 0 and 1; are these logits?"
            )
        cuts = np.atleast_1d(0.0 if self.threshold is None else self.threshold)
        if (cuts < 0).any() or (cuts > 1).any():
            raise UserError(f"{self.label}: a threshold is not between 0 and 1")

    @property
    def n_positive(self):
        return int(self.truth[self.usable].sum())

    @property
    def n_examples(self):
        return min(self.n_positive, self.n - self.n_positive)

    @property
    def positive(self):
        """(S,) bool: positive at the threshold; none without a threshold."""
        return self.predicted >= (np.inf if self.threshold is None else self.threshold)

    def why_undefined(self):
        if not self.n_positive:
            return "no positive study"
        return "no negative study" if self.n_positive == self.n else ""

    def compute(self, weights):
        y, p, positive = (x[self.usable] for x in (self.truth, self.predicted, self.positive))
        metrics = mt.ranking(y, p, weights) | mt.calibration(y, p, weights)
        cells = [positive * y, positive * (1 - y), ~positive * (1 - y), ~positive * y]
        counts = mt.sums(cells, weights)
        if self.threshold is None:
            counts = np.full_like(counts, np.nan)
        return metrics | mt.operating(*counts, self.prevalence)
