"""Kinds of label: what each reads from the label table, learns, and answers.

    kind         its outputs               its target                   loss
    binary       log-odds                  0 or 1                       cross-entropy
    regression   the scaled value          the scaled value             squared error
    multiclass   log-odds, one a class     the number of the class      cross-entropy
    survival     log hazard                a time, and an event 1 or 0  Cox's partial likelihood

The log-odds of a class are against all other classes, so its output reads like a binary label's.
A new kind is a subclass of `Label` and a line in `KINDS`.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np

from echofocus_core.base.console import printable, some

USUAL_YEARS = (1, 5)  # times of survival where no others are asked for
PER_YEAR = {"days": 365.25, "weeks": 365.25 / 7, "months": 12.0, "years": 1.0}
LONGEST = 100  # years that a patient may be followed; longer is another unit, or a date
EVENT = " (event)"  # after a survival label's name: its second target column


@dataclass(frozen=True)
class Label:
    """One label of a model; the subclasses are its kinds."""

    name: str
    classes: tuple[str, ...] = ()  # of a multiclass label

    kind: ClassVar[str] = "readings"  # of PanEcho's own heads, which are not trained here
    output_kind: ClassVar[str] = "readings"  # how each output is read, also of derived kinds
    task_key: ClassVar[str] = ""  # the key of a task that labels of this kind need
    is_number: ClassVar[bool] = False  # whether a valid_range may be given
    by_step: ClassVar[bool] = False  # whether a study's loss depends on the others of its step
    is_finding: ClassVar[bool] = False  # whether studies are in groups, not along a scale
    metric_name: ClassVar[str] = "AUROC"
    score_name: ClassVar[str] = "log-odds"  # the network's unit

    @property
    def outputs(self):
        """Names of its outputs."""
        return [self.name]

    @property
    def columns(self):
        """Its target columns in the label table (as read)."""
        return [self.name]

    # ------------------------------------------------------------------- from the label table

    def read(self, cells, numbers, task, path, listener):
        """{target column: float64 (S,)} from cells of text and the same as numbers.

        What cannot be used becomes NaN and is reported.
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
        """{what is wrong: where} of numbers (S,)."""
        return {"out of range": (y < low) | (y > high)}

    def contrast(self, table):
        """The values (S,) that must differ between studies for the label to be learned."""
        return table[self.name]

    def value_name(self, value):
        return f"{value:g}"

    def counts(self, y):
        """{group: studies} of `contrast` values, of the groups that a training needs."""
        return {}

    def summary(self, y):
        """`contrast` values without NaN, in a few words for the table of folds."""
        return f"median {y.median():.3g} of {len(y)}" if len(y) else "none"

    def why_unlearnable(self, y):
        """Why `contrast` values of the training fold, without NaN, teach nothing, or ''."""
        if y.nunique() > 1:
            return ""
        return f"always {self.value_name(y.iloc[0])}" if len(y) else "always missing"

    def why_unjudgeable(self, y):
        """Why no metric exists for `contrast` values of a fold, without NaN, or ''."""
        return ""

    def truths(self, table):
        """Target columns -> one column for each output, as a reader would compare it."""
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
        from echofocus_core.study.metrics import auroc

        return auroc(y[:, 0], p[:, 0])

    def threshold(self, y, p, rule):
        """The threshold by a rule on a validation fold, or None; arguments as `outcome`."""

    def hazard(self, y, p):
        """`metrics.breslow` of a validation fold, or None; arguments as `outcome`."""

    def answer_columns(self, p):
        """{column of `predict`: (S,)} beside its readable answers (S, n)."""
        return {}

    def more_answers(self, row):
        """[(what, text or probability)] of a row of `predict`, beside its outputs."""
        return []

    def score_unit(self, scaling, unit):
        """(factor from the network's units, name of the unit) of scores of its outputs."""
        return 1.0, self.score_name

    def outcome(self, y, p, unit="", threshold=None, prevalence=None, years=()):
        """The outcome of `study.statistics` that evaluates targets (S, c) and answers (S, n)."""
        raise NotImplementedError


class Binary(Label):
    kind, output_kind, is_finding = "binary", "binary", True

    def faults(self, y, low, high):
        return {"not 0 or 1": y.notna() & ~y.isin([0, 1])}

    def counts(self, y):
        return {"-": int((y == 0).sum()), "+": int((y == 1).sum())}

    def summary(self, y):
        return f"{y.sum():.0f} of {len(y)}" + (f" ({y.mean():.1%})" if len(y) else "")

    def why_unjudgeable(self, y):
        return "" if y.nunique() > 1 else f"no {'negative' if y.iloc[0] else 'positive'}"

    @staticmethod
    def losses(z, y):
        from torch.nn.functional import binary_cross_entropy_with_logits

        return binary_cross_entropy_with_logits(z, y, reduction="none")

    def readable(self, z, scaling, hazards):
        return sigmoid(z)

    def threshold(self, y, p, rule):
        from echofocus_core.study.metrics import choose_threshold

        return choose_threshold(y[:, 0], p[:, 0], rule)

    def outcome(self, y, p, unit="", threshold=None, prevalence=None, years=()):
        from echofocus_core.study.statistics import BinaryOutcome

        return BinaryOutcome(
            self.name, y[:, 0], p[:, 0], threshold=threshold, prevalence=prevalence
        )


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
        return float(scaling[self.name]["stdev"]), unit or "label's unit"

    def outcome(self, y, p, unit="", threshold=None, prevalence=None, years=()):
        from echofocus_core.study.statistics import RegressionOutcome

        return RegressionOutcome(self.name, y[:, 0], p[:, 0], unit)


class Multiclass(Label):
    kind, output_kind, task_key, is_finding = "multiclass", "binary", "classes", True

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

    def why_unjudgeable(self, y):
        return "" if y.nunique() > 1 else f"only studies of {self.value_name(y.iloc[0])}"

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
        return np.mean(
            [super(Multiclass, self).metric(y == k, p[:, [k]]) for k in range(p.shape[1])]
        )

    def answer_columns(self, p):
        """The most probable class, '' where it is unknown."""
        answered = ~np.isnan(p).any(axis=1)
        best = np.where(answered[:, None], p, 0).argmax(axis=1)
        return {self.name: np.where(answered, np.array(self.classes)[best], "")}

    def more_answers(self, row):
        return [(f"{self.name}, most probable class", row.get(self.name))]

    def outcome(self, y, p, unit="", threshold=None, prevalence=None, years=()):
        from echofocus_core.study.statistics import MulticlassOutcome

        return MulticlassOutcome(self.name, y[:, 0], p, self.classes)


class Survival(Label):
    kind, task_key, is_number, by_step, metric_name = "survival", "survival", True, True, "C"
    output_kind, score_name = "survival", "log hazard"
    is_finding = True  # by its events

    @property
    def outputs(self):
        return [f"{self.name}_risk"]

    @property
    def columns(self):
        return [self.name, self.name + EVENT]

    def read(self, cells, numbers, task, path, listener):
        """A time and its event are both NaN where one is."""
        sources = task.columns_of(self.name)
        time = self.read_times(sources[0], cells, numbers, task, path, listener)
        event = self.read_events(sources[1], cells, numbers, task, path, listener)
        if n := int((time.isna() ^ event.isna()).sum()):
            blank_is_censored = event.dropna().eq(1).all() and (time.notna() & event.isna()).any()
            report = listener.error if blank_is_censored else listener.warning
            report(
                f"{path}, {self.name}: {n} studies have {sources[0]} or {sources[1]}, not both"
                + f", and {sources[1]} has no 0 for censored studies" * bool(blank_is_censored),
                "fill in the other; they count as missing",
            )
        values = time.mask(event.isna()), event.mask(time.isna())
        return dict(zip(self.columns, values, strict=True))

    def read_times(self, source, cells, numbers, task, path, listener):
        """Times (S,) in the label's unit; dates, and more years than anyone lives, are errors."""
        y, unit = numbers[source], task.units.get(self.name, "")
        odd = cells[source][y.isna()].dropna()
        if len(odd) and odd.str.contains(r"^\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}").any():
            examples = examples_of(odd, cells.loc[odd.index, "eid"])
            listener.error(
                f"{path}, {self.name}: {source} holds dates: {examples}",
                "write the time from the echo to the event or the end of follow-up as a number",
            )
        if y.max() > LONGEST * per_year(unit):
            listener.error(
                f"{path}, {self.name}: {source} reaches {y.max():g} {unit or 'years'}, above "
                f"{LONGEST} years",
                f'give the unit in the task: "units": {{"{self.name}": "days"}} '
                f"(or {', '.join(PER_YEAR)})",
            )
        elif not unit:
            listener.warning(
                f"{path}, {self.name}: the times in {source} have no unit: years are assumed",
                f'put "units": {{"{self.name}": "years"}} (or days, months) into the task',
            )
        low, high = task.limits(self.name)
        faults = {"not numbers": y.isna() & cells[source].notna(), "below zero": y < 0}
        faults["out of range"] = (y < low) | (y > high)
        return mask_faults(self.name, source, y, faults, cells, path, listener)

    def read_events(self, source, cells, numbers, task, path, listener):
        """Events (S,), 1 or 0; another code is an error, since it may mean either."""
        codes = task.events.get(self.name, task.events)
        if codes := {x: y for x, y in codes.items() if not isinstance(y, dict)}:
            y = coded(cells[source], codes)
        else:
            y = numbers[source]
        odd = cells[source][cells[source].notna() & ~y.isin([0, 1])]
        if len(odd):
            listener.error(
                f"{path}, {self.name}: {len(odd)} events in {source} are neither 0 (censored) nor "
                f"1: {examples_of(odd, cells.loc[odd.index, 'eid'])}",
                'write 0 and 1, or map them in the task of the config: "events": {"1": 0, "2": 1}',
            )
        return y.where(y.isin([0, 1]))

    def contrast(self, table):
        return table[self.name + EVENT]

    def counts(self, y):
        return {"events": int(y.sum())}

    def summary(self, y):
        return f"{y.sum():.0f} events of {len(y)}" + (f" ({y.mean():.1%})" if len(y) else "")

    def why_unlearnable(self, y):
        return "" if y.any() else "no event" if len(y) else "always missing"

    def why_unjudgeable(self, y):
        return "" if y.any() else "no event"

    def truths(self, table):
        return {self.outputs[0]: table[self.name] * np.nan}

    @staticmethod
    def losses(z, y):
        return cox_losses(z[:, 0], *y.T)[:, None]

    def readable(self, z, scaling, hazards):
        hazard = hazards.get(self.outputs[0])
        return z - hazard.mean if hazard else z

    def metric(self, y, p):
        from echofocus_core.study.metrics import c_index

        return c_index(y[:, 0], y[:, 1] == 1, p[:, 0]) if len(y) else np.nan

    def hazard(self, y, p):
        from echofocus_core.study.metrics import breslow

        return breslow(*y.T, p[:, 0])

    def more_answers(self, row):
        start = f"{self.name}_survival_"
        times = {k.removeprefix(start): v for k, v in row.items() if k.startswith(start)}
        return [(f"no {self.name} until {time}", p) for time, p in times.items()]

    def outcome(self, y, p, unit="", threshold=None, prevalence=None, years=()):
        from echofocus_core.study.statistics import SurvivalOutcome

        years = tuple(years or USUAL_YEARS)
        return SurvivalOutcome(self.name, *y.T, p[:, 0], years, unit, per_year(unit))


KINDS = {kind.kind: kind for kind in (Binary, Regression, Multiclass, Survival)}


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

    @cached_property
    def each(self):
        """A Label each, in order."""
        return [label_of(x, self.kinds[x], self.classes.get(x, ())) for x in self.labels]

    def of_kind(self, kind):
        """Names of the labels of a kind, and of kinds derived from it."""
        return [label.name for label in self.each if isinstance(label, KINDS[kind])]

    @cached_property
    def names(self):
        """One for each output: the label, label_class of each class, label_risk of survival."""
        return [name for label in self.each for name in label.outputs]

    @cached_property
    def by_output(self):
        """Output -> its Label."""
        return {name: label for label in self.each for name in label.outputs}

    def names_of(self, label):
        return self.names[self.slices[label]]

    @cached_property
    def kind_of(self):
        """Output -> how it is read: binary (classes too), regression or survival."""
        return {name: label.output_kind for label in self.each for name in label.outputs}

    @cached_property
    def slices(self):
        """Label -> slice of the outputs."""
        return spans(self.labels, [len(label.outputs) for label in self.each])

    @cached_property
    def groups(self):
        """The outputs of each multiclass label, slices."""
        return [self.slices[label] for label in self.of_kind("multiclass")]

    @cached_property
    def columns(self):
        """All target columns."""
        return [column for label in self.each for column in label.columns]

    @cached_property
    def places(self):
        """Label -> slice of the target columns."""
        return spans(self.labels, [len(label.columns) for label in self.each])

    @property
    def type(self):
        """How all outputs are read, see `kind_of`, or mixed."""
        kinds = set(self.kind_of.values())
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def by_step(self):
        """Whether a study's loss depends on the others of its optimiser step."""
        return any(label.by_step for label in self.each)

    def truths(self, table):
        """Target columns (DataFrame) -> a column an output: 1 and 0 of classes, NaN of survival."""
        columns = {k: y for label in self.each for k, y in label.truths(table).items()}
        return type(table)(columns, table.index)

    def readable(self, logits, scaling, hazards):
        """Outputs (S, O) -> probabilities, physical units, log hazards less their mean: float64."""
        logits = np.asarray(logits)
        out = np.empty(logits.shape)
        for label in self.each:
            at = self.slices[label.name]
            out[:, at] = label.readable(logits[:, at], scaling, hazards)
        return out


def label_of(name, kind, classes=()):
    """A Label of a kind; '' is a kind that is not decided yet, whose values are numbers."""
    return {"": Regression, "readings": Label, **KINDS}[kind](name, tuple(classes))


def spans(names, widths):
    """Names and how many places each takes -> name to slice."""
    ends = np.cumsum(widths).tolist()
    return {x: slice(end - n, end) for x, n, end in zip(names, widths, ends, strict=True)}


# ------------------------------------------------------------------------------------------ losses


def study_losses(logits, targets, outputs):
    """Loss of each study (S,): the sum over its known labels, divided by the number of all labels.

    A missing label (NaN) adds 0. Dividing by the number of known labels instead would weigh a label
    more in studies where others are missing, and bias its probabilities where missingness is
    informative.

    logits (S, O), targets (S, C). Of survival the S studies are those of one step: the loss of one
    depends on them all.
    """
    import torch

    has_value = ~targets[:, [outputs.places[label].start for label in outputs.labels]].isnan()
    filled, kinds = targets.nan_to_num(), {type(label) for label in outputs.each}
    if kinds in ({Binary}, {Regression}):  # all at once
        losses = kinds.pop().losses(logits, filled)
    else:
        parts = []
        for label in outputs.each:
            y = (targets if label.by_step else filled)[:, outputs.places[label.name]]
            parts.append(label.losses(logits[:, outputs.slices[label.name]], y))
        losses = torch.cat(parts, dim=1)
    return (losses * has_value).sum(1) / len(outputs.labels)


def losses_of_outputs(logits, targets, labels):
    """The loss of each output by itself, (S, O); NaN where the target (S, O) is, and of survival,
    whose loss is not of one study."""
    import torch

    columns = []
    for label, z, y in zip(labels, logits.T, targets.T, strict=True):
        kind = label.kind if len(label.outputs) == 1 else label.output_kind  # a class is binary
        alone = kind in KINDS and not label.by_step
        losses = KINDS[kind].losses(z, y.nan_to_num()) if alone else z * torch.nan
        columns.append(torch.where(y.isnan(), torch.nan, losses))
    return torch.stack(columns, dim=1)


def cox_losses(risk, time, event):
    """Minus the log partial likelihood (Cox 1972, ties by Breslow) of each event, (S,), 0 where
    there is none; scaled so that its mean over the known studies is that over events.

    risk: log hazards (S,), time and event (S,), NaN where unknown.
    """
    import torch

    has_value = ~(time.isnan() | event.isnan())
    out, n_events = torch.zeros_like(risk), (event[has_value] == 1).sum()
    if not n_events:
        return out + 0 * risk.sum()
    order = torch.argsort(time[has_value], descending=True)
    r, t, e = (x[has_value][order] for x in (risk.double(), time, event))
    at_risk = r.logcumsumexp(0)  # of all whose time is as long or longer, ties included
    last = torch.searchsorted(-t, -t, right=True) - 1
    losses = (at_risk[last] - r) * (e == 1) * (len(r) / n_events)
    rows = has_value.nonzero()[:, 0][order]
    return out.index_put((rows,), losses.to(out.dtype))


# ----------------------------------------------------------------------------------------- scaling


def sigmoid(z):
    """As torch computes it, so that probabilities are those of the published code."""
    import torch

    return torch.sigmoid(torch.as_tensor(np.asarray(z))).numpy()


def boxcox(x, lmbda):
    return np.log(x) if lmbda == 0 else (x**lmbda - 1) / lmbda


def scale(values, names, scaling):
    """Physical units (S, T) -> normalised (S, T), a new array; NaN stays.

    A value below what a label's Box-Cox can take becomes NaN; what has no scaling stays.
    """
    out = np.array(values, dtype=np.float64)
    for i, name in enumerate(names):
        if not isinstance(s := scaling.get(name), dict):
            continue
        z = out[:, i] + s["shift"]
        if s["apply_boxcox"]:  # new values may be below the training minimum
            z = boxcox(np.where(z > 0, z, np.nan), s["lmbda"])
        out[:, i] = (z - s["mean"]) / s["stdev"]
    return out


def unscale(values, names, scaling):
    """Normalised (S, T) -> physical units (S, T), a new array; the inverse of `scale`.

    With a negative lambda Box-Cox ends at -1 / lambda: past it the value is NaN.
    """
    out = np.array(values, dtype=np.float64)
    for i, name in enumerate(names):
        if not isinstance(s := scaling.get(name), dict):
            continue
        z = out[:, i] * s["stdev"] + s["mean"]
        if s["apply_boxcox"]:
            lmbda = s["lmbda"]
            base = z * lmbda + 1
            base = np.maximum(base, 1e-6) if lmbda > 0 else np.where(base > 0, base, np.nan)
            z = np.exp(z) if lmbda == 0 else base ** (1 / lmbda)
        out[:, i] = z - s["shift"]
    return out


def fit_scaling(y, apply_boxcox):
    """One label's entry of the published `input_norm_dict`, from its values in training (S,).

    shift = |mean| - min; Box-Cox of value + shift for some labels (Box and Cox, 1964, lambda by
    maximum likelihood); then the mean and standard deviation of that.
    """
    from scipy.stats import boxcox_normmax

    # Box-Cox takes only positive numbers, and the mean may be 0.
    least = 1e-3 * y.std() if apply_boxcox else 0.0
    entry = {"shift": float(max(abs(y.mean()), least) - y.min()), "apply_boxcox": apply_boxcox}
    z = y + entry["shift"]
    if apply_boxcox:
        try:
            entry["lmbda"] = float(boxcox_normmax(z, method="mle"))
        except (ValueError, OverflowError):
            entry["lmbda"] = np.nan
        z = boxcox(z, entry["lmbda"])
    return entry | {"mean": float(z.mean()), "stdev": float(z.std())}


def scaling_fault(entry):
    """Why a label's scaling cannot be used, or ''."""
    for name in ("shift", "mean", "stdev", *(["lmbda"] if entry.get("apply_boxcox") else [])):
        value = entry.get(name)
        if not isinstance(value, int | float | np.number) or not np.isfinite(value):
            return f"{name} is not a finite number"
        if abs(value) > 1e9 or (name == "stdev" and value < 1e-9):
            return f"{name} cannot be {value:g}"
    return ""


# ------------------------------------------------------------------------------------------- cells


def mask_faults(label, column, y, faults, cells, path, listener):
    """y (S,) with NaN where a fault is; each fault is reported with examples of its cells.

    A label without one cell that can be used is an error.
    """
    usable = y.notna().any() and not np.all(y.isna() | np.any(list(faults.values()), axis=0))
    report = listener.warning if usable else listener.error
    for fault, where in faults.items():
        if where.any():
            examples = examples_of(cells.loc[where, column].fillna(""), cells.loc[where, "eid"])
            report(
                f"{path}, {label}: {'' if usable else 'all '}{where.sum()} values are {fault}: "
                f"{examples}",
                "correct them" + "; they count as missing" * bool(usable),
            )
            y = y.mask(where)
    return y


def per_year(unit):
    """How many of a unit of time a year has; no unit is years."""
    return PER_YEAR[unit.strip().casefold() or "years"]


def coded(cells, codes):
    """Cells of text -> the values of their codes {text: value}; NaN for others. 1.0 is code 1."""
    plain = cells.str.strip().str.casefold().str.replace(r"^(\d+)\.0+$", r"\1", regex=True)
    return plain.map({x.strip().casefold(): float(y) for x, y in codes.items()}).astype(float)


def examples_of(cells, eids):
    """The first of some cells and their studies, as text."""
    pairs = zip(cells[:4], eids[:4], strict=True)
    return some(f"{printable(cell)[:40]} (study {printable(eid)})" for cell, eid in pairs)


def class_numbers(label, cells, names, path, listener):
    """Cells of text (Series) -> the number of the class, 0 to K - 1; NaN for none of them.

    A cell is a class's name, in any case, or its number from 0. Where names are numbers, only names
    count. Numbers that may count from 1, or that are mixed with names, are an error.
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
    odd = "mixed with names" if by_name.notna().any() else ""
    odd = odd or ("without any 0" if not (used == 0).any() else "")
    odd = odd or (f"up to {used.max():g}" if used.max() >= len(names) else "")
    if odd:
        listener.error(
            f"{path}, {label}: numbers for classes {odd}: do they count from 1? ({meaning} here)",
            "write the names of the classes",
        )
    listener.note(f"{path}, {label}: numbers are read as {meaning}")
    return numbers.where(numbers.isin(range(len(names)))).astype(float)
