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


def rarer_class(outcome):
    return rarer(outcome, outcome.truth == 1)


def clipped(outcome):
    """What probabilities of exactly 0 or 1 do to the calibration slope, in words; '' for none."""
    y, p = outcome.pairs()
    extreme = (p == 0) | (p == 1)
    if not extreme.any():
        return ""
    with np.errstate(all="ignore"):
        rest = mt.calibration(y[~extreme], p[~extreme], np.ones(((~extreme).sum(), 1)))
    return (
        f"{extreme.sum()} probabilities of exactly 0 or 1 count as {mt.NEAREST:g} from it; without "
        f"them the slope is {rest['calibration_slope'][0]:.3g}"
    )


def expected_error(outcome):
    """The expected calibration error of a calibrated model with these probabilities, in words."""
    _, p = outcome.pairs()
    part = np.minimum((p * mt.BINS).astype(int), mt.BINS - 1)
    variances = np.bincount(part, p * (1 - p), mt.BINS)
    expected = np.sqrt(2 / np.pi * variances).sum() / max(len(p), 1)
    return (
        f"{mt.BINS} bins of equal width; never below 0, so no interval: a calibrated model would "
        f"have about {expected:.2g} by chance"
    )


RANKING, AT_THRESHOLD = "Discrimination and calibration", "At the threshold"
FIT = {
    "undefined": "no finite fit: the probabilities are all equal or separate the classes",
    "interval": "normal",
    "remark": clipped,
}
CUT = {
    "needs": {"threshold": "no threshold is stored with the model"},
    "undefined": "division by zero: all or none of the studies are positive at the threshold",
}
BAYES = CUT | {"needs": CUT["needs"] | {"prevalence": "no prevalence is given"}}
RATE = CUT | {"interval": "wilson"}
VALUE = RATE | {"limit": rarer_class}
RATIO = CUT | {"limit": rarer_class}


@dataclass(eq=False)
class BinaryOutcome(Outcome):
    """A finding: truth 0 or 1, predicted: its probability, positive from `threshold` on.

    threshold: one number, or (S,) one per study: each fold of a cross-validation has its own.
    """

    threshold: float | np.ndarray | None = None
    prevalence: float | None = None

    headline = "auroc"
    groups: ClassVar = {"with the finding": with_finding, "without the finding": without_finding}
    METRICS: ClassVar = (
        Metric("auroc", RANKING, interval="wilson", denominator=rarer_class),
        Metric("average_precision", RANKING, interval="logit", limit=rarer_class),
        Metric("brier", RANKING, interval="logit"),
        Metric("calibration_slope", RANKING, limit=rarer_class, **FIT),
        Metric("calibration_intercept", RANKING, **FIT),
        Metric("ece", RANKING, interval="none", remark=expected_error),
        Metric("sensitivity", AT_THRESHOLD, denominator=with_finding, **RATE),
        Metric("specificity", AT_THRESHOLD, denominator=without_finding, **RATE),
        Metric("ppv", AT_THRESHOLD, denominator=lambda o: o.usable & o.positive, **VALUE),
        Metric("npv", AT_THRESHOLD, denominator=lambda o: o.usable & ~o.positive, **VALUE),
        Metric("lr_positive", AT_THRESHOLD, interval="lr_positive", **RATIO),
        Metric("lr_negative", AT_THRESHOLD, interval="lr_negative", **RATIO),
        Metric("f1", AT_THRESHOLD, denominator=lambda o: o.usable, **VALUE),
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
