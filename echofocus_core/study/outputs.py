"""The outputs of a model and the targets that they learn, label by label, and their losses."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from echofocus_core.study.kinds.base import Label
from echofocus_core.study.kinds.binary import Binary
from echofocus_core.study.kinds.multiclass import Multiclass
from echofocus_core.study.kinds.regression import Regression
from echofocus_core.study.kinds.survival import Survival
from echofocus_core.study.scaling import scale

KINDS = {kind.kind: kind for kind in (Binary, Regression, Multiclass, Survival)}


@dataclass(frozen=True)
class Outputs:
    """T labels, their O outputs and their C target columns."""

    each: tuple[Label, ...]

    @classmethod
    def of(cls, labels, type_, classes=()):
        """labels: names; type_: a kind for all, or label -> kind; classes: label -> names."""
        kinds = type_ if isinstance(type_, dict) else dict.fromkeys(labels, type_)
        return cls(tuple(label_of(x, kinds[x], dict(classes).get(x, ())) for x in labels))

    @property
    def labels(self):
        """Names of the labels."""
        return [label.name for label in self.each]

    @property
    def kinds(self):
        """Label -> its kind."""
        return {label.name: label.kind for label in self.each}

    @property
    def classes(self):
        """Multiclass label -> names of its classes."""
        return {label.name: list(label.classes) for label in self.each if label.classes}

    def of_kind(self, kind):
        """Names of the labels of a kind, and of kinds derived from it."""
        return [label.name for label in self.each if isinstance(label, KINDS[kind])]

    @cached_property
    def by_output(self):
        """Output -> its Label."""
        return {name: label for label in self.each for name in label.outputs}

    @cached_property
    def names(self):
        """Names of the outputs: label, label_class for each class, label_risk of survival."""
        return [name for label in self.each for name in label.outputs]

    @cached_property
    def kind_of(self):
        """Output -> how it is read: binary (classes too), regression or survival."""
        return {name: label.output_kind for name, label in self.by_output.items()}

    @cached_property
    def slices(self):
        """Label -> slice of the outputs."""
        return spans({label.name: len(label.outputs) for label in self.each})

    @cached_property
    def groups(self):
        """Slices with the outputs of each multiclass label."""
        return [self.slices[label] for label in self.of_kind("multiclass")]

    @cached_property
    def columns(self):
        """All target columns."""
        return [column for label in self.each for column in label.columns]

    @cached_property
    def places(self):
        """Label -> slice of the target columns."""
        return spans({label.name: len(label.columns) for label in self.each})

    @property
    def type(self):
        """How all outputs are read (see `kind_of`), or mixed."""
        kinds = set(self.kind_of.values())
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def by_step(self):
        """Whether a study's loss depends on the others of its optimiser step."""
        return any(label.by_step for label in self.each)

    def parts(self, targets, answers):
        """[(label, targets (S, c), answers (S, n))] of each label, from (S, C) and (S, O)."""
        return [
            (label, targets[:, self.places[label.name]], answers[:, self.slices[label.name]])
            for label in self.each
        ]

    def truths(self, table):
        """Target columns -> DataFrame (S, O): 1 and 0 for classes, NaN for survival."""
        columns = {k: y for label in self.each for k, y in label.truths(table).items()}
        return type(table)(columns, table.index)

    def mean(self, logits, scaling):
        """Outputs (S, O) -> (O,): those whose answers are the means of the studies' answers."""
        logits = np.asarray(logits, np.float64)
        answers, mean = self.readable(logits, scaling, {}), logits.mean(0)
        p = np.clip(answers.mean(0), 1e-7, 1 - 1e-7)
        binary = [kind == "binary" for kind in self.kind_of.values()]
        mean = np.where(binary, np.log(p) - np.log1p(-p), mean)
        of_values = scale(np.nanmean(answers, 0, keepdims=True), self.names, scaling or {})[0]
        return np.where(np.isin(self.names, self.of_kind("regression")), of_values, mean)

    def readable(self, logits, scaling, hazards):
        """Outputs (S, O) -> probabilities, physical units or centred log hazards: float64."""
        logits = np.asarray(logits)
        out = np.empty(logits.shape)
        for label in self.each:
            at = self.slices[label.name]
            out[:, at] = label.readable(logits[:, at], scaling, hazards)
        return out


def label_of(name, kind, classes=()):
    """A Label of a kind; of an undecided kind ('') a Regression, which reads any number."""
    return {"": Regression, "readings": Label, **KINDS}[kind](name, tuple(classes))


def spans(widths):
    """{name: number of places} -> {name: slice}."""
    ends = np.cumsum(list(widths.values())).tolist()
    return {x: slice(end - n, end) for (x, n), end in zip(widths.items(), ends, strict=True)}


def study_losses(logits, targets, outputs):
    """Loss of each study (S,): the sum over its known labels, divided by the number of all labels.

    A missing label (NaN) adds 0. Division by the number of known labels would give a label more
    weight in studies where others are missing, and bias its probabilities if missingness is
    informative.

    logits (S, O), targets (S, C). For survival, the S studies are those of one step, because the
    loss of a study depends on all of them.
    """
    import torch

    has_value = ~targets[:, [place.start for place in outputs.places.values()]].isnan()
    kinds = {type(label) for label in outputs.each}
    if kinds in ({Binary}, {Regression}):  # all labels at once
        losses = kinds.pop().losses(logits, targets.nan_to_num())
    else:
        parts = outputs.parts(targets, logits)
        losses = [label.losses(z, y if label.by_step else y.nan_to_num()) for label, y, z in parts]
        losses = torch.cat(losses, dim=1)
    return (losses * has_value).sum(1) / len(outputs.each)


def losses_of_outputs(logits, targets, labels):
    """The loss of each output (S, O); NaN where the target (S, O) is, and for survival, whose loss
    depends on several studies."""
    import torch

    columns = []
    for label, z, y in zip(labels, logits.T, targets.T, strict=True):
        kind = label.kind if len(label.outputs) == 1 else label.output_kind  # a class is binary
        alone = kind in KINDS and not label.by_step
        losses = KINDS[kind].losses(z, y.nan_to_num()) if alone else z * torch.nan
        columns.append(torch.where(y.isnan(), torch.nan, losses))
    return torch.stack(columns, dim=1)
