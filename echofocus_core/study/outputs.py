"""What a model's outputs mean: its labels in order, each of a kind.

    kind         its outputs               its target                   loss
    binary       log-odds                  0 or 1                       cross-entropy
    regression   the scaled value          the scaled value             squared error
    multiclass   log-odds, one a class     the number of the class      cross-entropy
    survival     log hazard                a time, and an event 1 or 0  Cox's partial likelihood

The log-odds of a class are those of it against all others: its output is read as a finding's is.
"""

from dataclasses import dataclass, field
from functools import cached_property

USUAL_YEARS = (1, 5)  # at which survival is given, where no times are asked for
KINDS = ("binary", "regression", "multiclass", "survival")
EVENT = " (event)"  # after a label: the second column of its target


@dataclass(frozen=True)
class Outputs:
    """T labels, their O outputs and their C target columns."""

    labels: list[str]
    kinds: dict[str, str]  # of each label
    classes: dict[str, list[str]] = field(default_factory=dict)  # of the multiclass ones

    @classmethod
    def of(cls, labels, type_, classes=()):
        """type_: a kind for all labels, or a dict of each one's."""
        kinds = type_ if isinstance(type_, dict) else dict.fromkeys(labels, type_)
        kinds = {label: kinds[label] for label in labels}
        return cls(list(labels), kinds, {k: v for k, v in dict(classes).items() if k in kinds})

    def of_kind(self, *kinds):
        return [label for label in self.labels if self.kinds[label] in kinds]

    @cached_property
    def names(self):
        """One an output: the label, label_class of each class, label_risk of survival."""
        return [name for label in self.labels for name in self.names_of(label)]

    def names_of(self, label):
        if self.kinds[label] == "multiclass":
            return [f"{label}_{name}" for name in self.classes[label]]
        return [f"{label}_risk" if self.kinds[label] == "survival" else label]

    @cached_property
    def kind_of(self):
        """Output -> its kind, which of a class is binary."""
        found = {name: self.kinds[x] for x in self.labels for name in self.names_of(x)}
        return {name: "binary" if x == "multiclass" else x for name, x in found.items()}

    @cached_property
    def slices(self):
        """Label -> slice of the outputs."""
        return spans(self.labels, [len(self.names_of(label)) for label in self.labels])

    @cached_property
    def groups(self):
        """The outputs of each multiclass label, slices."""
        return [self.slices[label] for label in self.of_kind("multiclass")]

    @cached_property
    def columns(self):
        """One a target column: the label, and of survival the event after it."""
        ends = {"survival": ("", EVENT)}
        return [x + end for x in self.labels for end in ends.get(self.kinds[x], ("",))]

    @cached_property
    def places(self):
        """Label -> slice of the target columns."""
        return spans(self.labels, [1 + (self.kinds[x] == "survival") for x in self.labels])

    @property
    def type(self):
        """What all outputs are, binary (classes are that too), regression or survival; or mixed."""
        found = set(self.kind_of.values())
        return found.pop() if len(found) == 1 else "mixed"

    def truths(self, table):
        """Target columns (DataFrame) -> a column an output: 1 and 0 of classes, NaN of survival."""
        found = {}
        for label in self.labels:
            y = table[label]
            if self.kinds[label] == "multiclass":
                for k, name in enumerate(self.names_of(label)):
                    found[name] = (y == k).astype(float).mask(y.isna())
            else:
                found[self.names_of(label)[0]] = (
                    y * float("nan") if self.kinds[label] == "survival" else y
                )
        return type(table)(found, table.index)

    @property
    def by_step(self):
        """Whether a study's loss depends on the others of its optimiser step."""
        return "survival" in self.kinds.values()


def spans(names, widths):
    found, start = {}, 0
    for name, width in zip(names, widths, strict=True):
        found[name] = slice(start, start + width)
        start += width
    return found
