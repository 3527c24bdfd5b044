"""What a kind of label is: how its labels are read and learnt, and how its answers are evaluated.

    kind         its outputs               its target                   loss
    binary       log-odds                  0 or 1                       cross-entropy
    regression   the scaled value          the scaled value             squared error
    multiclass   log-odds, one a class     the number of the class      cross-entropy
    survival     log hazard                a time, and an event 1 or 0  Cox's partial likelihood

Each kind has a file with a subclass of `Label` and one of `Outcome`, and a line in
`study.outputs.KINDS`.

Shapes: S studies, B resamples of the patients.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import ClassVar

import numpy as np

from echofocus_core.base.console import UserError, count_of, printable, some


@dataclass(frozen=True)
class Label:
    """A label of a model. This class itself is for the outputs of PanEcho's heads."""

    name: str
    classes: tuple[str, ...] = ()  # of a multiclass label

    kind: ClassVar[str] = "readings"
    output_kind: ClassVar[str] = "readings"  # how each output is read, also of derived kinds
    task_key: ClassVar[str] = ""  # the key of a task that labels of this kind need
    is_number: ClassVar[bool] = False  # whether a valid_range may be given
    by_step: ClassVar[bool] = False  # whether a study's loss depends on the others of its step
    has_groups: ClassVar[bool] = False  # whether its `contrast` divides studies into groups
    allowed_units: ClassVar[tuple[str, ...]] = ()  # (): any
    metric_name: ClassVar[str] = "AUROC"
    score_name: ClassVar[str] = "log-odds"  # the unit of the network's outputs

    @property
    def outputs(self):
        """Names of its outputs."""
        return [self.name]

    @property
    def columns(self):
        """Names of its target columns in the label table after reading."""
        return [self.name]

    @property
    def more_columns(self):
        """Names of other columns for it in our tables, which no label may have."""
        return []

    # ------------------------------------------------------------------- from the label table

    def read(self, cells, numbers, task, path, listener):
        """{target column: float64 (S,)} from cells of text and the same cells as numbers.

        Unusable cells become NaN and are reported.
        """
        y = numbers[self.name]
        if task.kind(self.name) != "regression" and set(y.dropna().unique()) == {1, 2}:
            listener.error(
                f"{path}, {self.name}: every value is 1 or 2",
                "write 0 and 1 if these mean no and yes; for a measurement put "
                '"type": "regression" into the task',
            )
        faults = {"not numbers": y.isna() & cells[self.name].notna()}
        faults |= self.faults(y, *task.limits(self.name))
        return {self.name: mask_faults(self.name, self.name, y, faults, cells, path, listener)}

    def faults(self, y, low, high):
        """{what is wrong: (S,) bool} of numbers (S,)."""
        return {"out of range": (y < low) | (y > high)}

    def contrast(self, table):
        """The values (S,) that must differ between studies for the label to be learnt."""
        return table[self.name]

    def value_name(self, value):
        return f"{value:g}"

    def counts(self, y):
        """{group: number of studies} of `contrast` values, for the groups that training needs."""
        return {}

    def summary(self, y):
        """A short text on `contrast` values without NaN, for the table of folds."""
        return f"median {y.median():.3g} of {len(y)}" if len(y) else "none"

    def why_constant(self, y):
        """Why `contrast` values, without NaN, do not differ between studies, or ''."""
        if y.nunique() > 1:
            return ""
        return f"always {self.value_name(y.iloc[0])}" if len(y) else "always missing"

    def truths(self, table):
        """Target columns -> one column for each output, to compare with its readable answer."""
        return {self.name: table[self.name]}

    # ------------------------------------------------------------------------------- learning

    @staticmethod
    def losses(z, y):
        """Outputs (S, n) and targets (S, c) without NaN -> the loss of each study (S, 1)."""
        raise NotImplementedError

    def readable(self, z, scaling, hazards):
        """Outputs (S, n) -> probabilities, physical units or centred log hazards."""
        return z

    def metric(self, y, p):
        """A validation metric of targets (S, c) and readable answers (S, n), both without NaN."""
        raise NotImplementedError

    def threshold(self, y, p, rule):
        """The threshold that a rule chooses on a validation fold, or None."""

    def hazard(self, y, p):
        """`metrics.breslow` of a validation fold, or None."""

    def answer_columns(self, p):
        """{column of `predict`: (S,)} in addition to its readable answers (S, n)."""
        return {}

    def more_answers(self, row):
        """[(name, text or probability)] of a row of `predict`, in addition to its outputs."""
        return []

    def score_unit(self, scaling, unit):
        """(factor from the network's unit, name of the unit) of scores of its outputs."""
        return 1.0, self.score_name

    def outcome(self, y, p, unit="", threshold=None, years=()):
        """The Outcome of targets (S, c) and readable answers (S, n)."""
        raise NotImplementedError


# ---------------------------------------------------------------------------------------- outcomes


# Patients for an interval: the range of fewer values contains the true median less than 95 times in
# 100, and the percentiles of resamples of very few patients are only their extremes.
FEWEST = 6


@dataclass(frozen=True)
class Metric:
    """A metric of a kind of label: its place in tables, and why it may be missing."""

    name: str
    heading: str = ""  # of the table of the report that has it; '': only the CSV has it
    has_unit: bool = False  # whether it has the unit of the label
    is_count: bool = False  # a count has no interval, mean or difference
    interval: str = "percentile"  # of `statistics.INTERVALS`
    # of an outcome: (S,) bool, the studies of which the metric is a proportion
    denominator: Callable | None = None
    limit: Callable | None = None  # of an outcome: (S,) bool, the studies that limit its precision
    fewest: int = 2  # patients for an interval
    remark: Callable | None = None  # of an outcome: what a reader should know of the value, or ''
    needs: dict[str, str] = field(default_factory=dict)  # field of an outcome -> why it is missing
    undefined: str = ""  # why it has no value for usable studies


@dataclass(eq=False)
class Outcome:
    """A label with its truths and predictions, NaN where they are missing.

    truth: (S,); predicted: readable answers (S,) or (S, K), in physical units, probabilities or
    log hazards.
    """

    label: str
    truth: np.ndarray
    predicted: np.ndarray

    headline: ClassVar[str]  # the metric that represents the kind
    METRICS: ClassVar[tuple[Metric, ...]]
    figures: ClassVar[tuple[str, ...]]  # of `report.curves.PANELS`
    methods: ClassVar[str]  # a sentence for the methods section of a paper
    truth_fields: ClassVar[tuple[str, ...]] = ("truth",)
    averages_truths: ClassVar[bool] = False  # whether a patient's truth may be a mean
    groups: ClassVar[dict] = {}  # name -> function of the outcome: (S,) bool, its studies
    n_positive = -1
    threshold = None
    units = ""

    def __post_init__(self):
        """Convert to float arrays. Raises UserError if they cannot be evaluated."""
        names = (*self.truth_fields, "predicted")
        arrays = [np.asarray(getattr(self, name), float) for name in names]
        if arrays[0].ndim != 1 or any(len(x) != len(arrays[0]) for x in arrays):
            shapes = ", ".join(str(x.shape) for x in arrays)
            raise UserError(f"{self.label}: truths and predictions have different shapes: {shapes}")
        if any(np.isinf(x).any() for x in arrays):
            raise UserError(f"{self.label}: a truth or a prediction is infinite")
        vars(self).update(zip(names, arrays, strict=True))

    @property
    def truth_columns(self):
        """Name -> (S,): the truths in the table `saveout`."""
        return {self.label: self.truth}

    @property
    def predicted_columns(self):
        """Name -> (S,): the predictions in the table `saveout`, named like a model's outputs."""
        return {self.label: self.predicted}

    @cached_property
    def usable(self):
        """(S,) bool: studies with a truth and a prediction."""
        return np.isfinite(self.truth) & finite_rows(self.predicted)

    @property
    def n(self):
        return int(self.usable.sum())

    @property
    def n_examples(self):
        """The number of studies on which the uncertainty of its metrics depends."""
        return self.n

    def pairs(self):
        """(truths, predictions) of the usable studies."""
        return self.truth[self.usable], self.predicted[self.usable]

    def metrics(self, weights):
        """Metric -> (B,): its value in each resample. weights (S, B), see `study.metrics`."""
        with np.errstate(all="ignore"):  # an undefined value is NaN, and has a note
            return self.compute(weights if self.usable.all() else weights[self.usable])

    def compute(self, weights):
        """`metrics` of the usable studies, with their weights (n, B)."""
        raise NotImplementedError

    def all_metrics(self):
        """METRICS, and those that depend on the label, such as the AUROC of each class."""
        return self.METRICS

    def metric(self, name):
        return next(m for m in self.all_metrics() if m.name == name)

    def unit(self, name):
        return self.units if self.metric(name).has_unit else ""

    def lacks(self, metric):
        """Why a Metric cannot be computed without another value, such as a threshold, or ''."""
        reasons = (why for name, why in metric.needs.items() if getattr(self, name) is None)
        return next(reasons, "")

    def why_missing(self, name):
        """Why a metric is not defined for these studies."""
        if not self.n:
            return "no study has both a truth and a prediction"
        metric = self.metric(name)
        return self.lacks(metric) or self.why_undefined() or metric.undefined

    def why_undefined(self):
        """Why metrics are not defined for the usable studies, at least one, or ''."""
        return ""

    def arrays(self):
        """Field -> array, for the fields that have one row per study."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: v for name, v in values.items() if isinstance(v, np.ndarray)}

    def take(self, rows):
        """The outcome of some studies. rows: an index or a mask."""
        return replace(self, **{name: values[rows] for name, values in self.arrays().items()})

    def by_patient(self, patients, rule):
        """(outcome with one row per patient, in sorted order; number of patients without a truth
        because their studies differ). rule: mean, first or last of the patient's usable studies."""
        import pandas as pd

        patients, usable = np.asarray(patients), self.usable
        table = pd.concat(
            {name: pd.DataFrame(x[usable]) for name, x in self.arrays().items()}, axis=1
        )
        groups, names = table.groupby(patients[usable]), np.unique(patients)
        rows = getattr(groups, rule)().reindex(names)
        pooled = {
            name: rows[name].to_numpy().reshape(-1, *values.shape[1:])
            for name, values in self.arrays().items()
        }
        mixed = np.zeros(len(names), bool)
        if rule == "mean" and not self.averages_truths:
            mixed = groups["truth"].nunique().reindex(names).to_numpy()[:, 0] > 1
        pooled["truth"] = np.where(mixed, np.nan, pooled["truth"])
        return replace(self, **pooled), int(mixed.sum())


def finite_rows(values):
    """(S,) bool of (S,) or (S, K)."""
    return np.isfinite(values) if values.ndim == 1 else np.isfinite(values).all(axis=1)


def rarer(outcome, case):
    """(S,) bool: the smaller group of the usable studies, those of `case` (S,) or the others."""
    case, other = outcome.usable & case, outcome.usable & ~case
    return case if case.sum() <= other.sum() else other


# ----------------------------------------------------------------------------------------- helpers


def sigmoid(z):
    """Computed by torch, so that probabilities equal those of the published code."""
    import torch

    return torch.sigmoid(torch.as_tensor(np.asarray(z))).numpy()


MAKE_NUMBERS = {
    "not numbers": "write numbers; if these are grades, list them in order in the task: "
    '"classes": {"<label>": ["none", "mild", "severe"]}'
}


def mask_faults(label, column, y, faults, cells, path, listener):
    """y (S,) with NaN where a fault is; each fault is reported with examples of its cells.

    It is an error if a label has no usable cell.
    """
    usable = y.notna().any() and not np.all(y.isna() | np.any(list(faults.values()), axis=0))
    report = listener.warning if usable else listener.error
    for fault, mask in faults.items():
        if mask.any():
            examples = examples_of(cells.loc[mask, column].fillna(""), cells.loc[mask, "eid"])
            report(
                f"{path}, {label}: {'' if usable else 'all '}"
                f"{count_of(mask.sum(), f'values are {fault}')}: {examples}",
                "correct them; they count as missing"
                if usable
                else MAKE_NUMBERS.get(fault, "correct them"),
            )
            y = y.mask(mask)
    return y


def examples_of(cells, eids):
    """The first of some cells and their studies, as text."""
    pairs = zip(cells[:4], eids[:4], strict=True)
    return some(f"{printable(cell)[:40]} (study {printable(eid)})" for cell, eid in pairs)
