"""Grades: one of several classes in order."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from echofocus_core.base.console import UserError
from echofocus_core.study import metrics as mt
from echofocus_core.study.kinds.base import (
    FEWEST,
    Label,
    Metric,
    Outcome,
    mask_faults,
    rarer,
    sigmoid,
)


class Multiclass(Label):
    """An output is the log-odds of a class against all others, so that it reads like a finding."""

    kind, output_kind, task_key, has_groups = "multiclass", "binary", "classes", True

    @property
    def outputs(self):
        return [f"{self.name}_{x}" for x in self.classes]

    def read(self, cells, numbers, task, path, listener):
        y = class_numbers(self.name, cells[self.name], self.classes, path, listener)
        faults = {f"none of {', '.join(self.classes)}": y.isna() & cells[self.name].notna()}
        return {self.name: mask_faults(self.name, self.name, y, faults, cells, path, listener)}

    def value_name(self, value):
        return self.classes[int(value)]

    def counts(self, y):
        return {x: int((y == k).sum()) for k, x in enumerate(self.classes)}

    def summary(self, y):
        return ", ".join(f"{x} {n}" for x, n in self.counts(y).items())

    def truths(self, table):
        y = table[self.name]
        return {x: (y == k).astype(float).mask(y.isna()) for k, x in enumerate(self.outputs)}

    @staticmethod
    def losses(z, y):
        from torch.nn.functional import softplus

        return softplus(-z.gather(1, y.long()))  # -log of the class's probability

    def readable(self, z, scaling, hazards):
        return sigmoid(z)

    def metric(self, y, p):
        return np.mean([mt.auroc(y[:, 0] == k, p[:, k]) for k in range(p.shape[1])])

    def answer_columns(self, p):
        """The most probable class, '' where it is unknown."""
        answered = ~np.isnan(p).any(axis=1)
        best = np.where(answered[:, None], p, 0).argmax(axis=1)
        return {self.name: np.where(answered, np.array(self.classes)[best], "")}

    def outcome(self, y, p, unit="", threshold=None, years=()):
        return MulticlassOutcome(self.name, y[:, 0], p, self.classes)


@dataclass(eq=False)
class MulticlassOutcome(Outcome):
    """Grades: truth 0 .. K-1, predicted: probabilities (S, K) of the K `classes` in order."""

    classes: tuple[str, ...]

    headline = "auroc"
    METRICS: ClassVar = tuple(
        Metric(name, "Grades", fewest=FEWEST) for name in ("auroc", "balanced_accuracy", "kappa")
    )
    figures = ("roc_classes", "confusion_classes")
    methods = "Grades were assessed by one-vs-rest AUROC, balanced accuracy and quadratic kappa."

    def __post_init__(self):
        super().__post_init__()
        self.classes, K = tuple(self.classes), len(self.classes)
        if self.predicted.shape != (len(self.truth), K):
            raise UserError(f"{self.label}: {K} classes, probabilities {self.predicted.shape}")
        if not np.isin(self.truth[np.isfinite(self.truth)], range(K)).all():
            raise UserError(f"{self.label}: a truth is not one of 0 to {K - 1}")

    @property
    def truth_columns(self):
        names = np.array([*self.classes, None], object)
        return {self.label: names[np.where(np.isfinite(self.truth), self.truth, -1).astype(int)]}

    @property
    def predicted_columns(self):
        names = [f"{self.label}_{name}" for name in self.classes]
        return dict(zip(names, self.predicted.T, strict=True))

    def all_metrics(self):
        for k, name in enumerate(self.classes):
            yield Metric(
                f"auroc_{name}",
                interval="wilson",
                denominator=lambda o, k=k: rarer(o, o.truth == k),
            )
        yield from self.METRICS

    def why_undefined(self):
        absent = set(range(len(self.classes))) - set(self.truth[self.usable].astype(int))
        names = ", ".join(self.classes[k] for k in sorted(absent))
        return f"no study of class {names}" if absent else "all studies are of one class"

    def compute(self, weights):
        y, p = self.pairs()
        areas = [mt.auroc(y == k, p[:, k], weights) for k in range(len(self.classes))]
        metrics = {"auroc": np.mean(areas, axis=0)}
        metrics |= {f"auroc_{name}": x for name, x in zip(self.classes, areas, strict=True)}
        table = mt.confusion(y, p.argmax(axis=1), len(self.classes), weights)
        return metrics | mt.agreement(table)


def class_numbers(label, cells, names, path, listener):
    """Cells of text (Series) -> the number of the class, 0 to K - 1, or NaN.

    A cell is the name of a class, in any case, or its number from 0. If names are numbers, only
    names count. Numbers that may count from 1, or that are mixed with names, are an error.
    """
    import pandas as pd

    plain, keys = cells.str.strip().str.casefold(), [str(x).strip().casefold() for x in names]
    by_name = plain.map({key: float(k) for k, key in enumerate(keys)})
    numbers, named = pd.to_numeric(plain, errors="coerce"), pd.to_numeric(pd.Series(keys), "coerce")
    if named.notna().any():
        by_number = {x: float(k) for k, x in enumerate(named) if x == x}
        return by_name.fillna(numbers.map(by_number)).astype(float)
    used = numbers[numbers.notna()]
    if not len(used):
        return by_name.astype(float)
    meaning = ", ".join(f"{k} = {name}" for k, name in enumerate(names))
    doubt = "mixed with names" if by_name.notna().any() else ""
    doubt = doubt or ("without any 0" if not (used == 0).any() else "")
    doubt = doubt or (f"up to {used.max():g}" if used.max() >= len(names) else "")
    if doubt:
        listener.error(
            f"{path}, {label}: numbers for classes {doubt}: do they count from 1? ({meaning} here)",
            "write the names of the classes",
        )
    listener.note(f"{path}, {label}: numbers are read as {meaning}")
    return numbers.where(numbers.isin(range(len(names)))).astype(float)
