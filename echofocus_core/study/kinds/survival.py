"""Times to an event, some of them censored."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from echofocus_core.base.console import UserError
from echofocus_core.study import metrics as mt
from echofocus_core.study.kinds.base import (
    Label,
    Metric,
    Outcome,
    examples_of,
    mask_faults,
    rarer,
)

USUAL_YEARS = (1, 5)  # times of survival if no others are given
PER_YEAR = {"days": 365.25, "weeks": 365.25 / 7, "months": 12.0, "years": 1.0}
FIFTHS = 100  # events from which calibration is by fifths instead of thirds
LONGEST = 100  # years of follow-up; a longer time is in another unit, or a date
EVENT = " (event)"  # after a survival label's name: its second target column


class Survival(Label):
    kind, task_key, is_number, by_step, metric_name = "survival", "survival", True, True, "C"
    output_kind, score_name = "survival", "log hazard"
    has_groups = True  # by its events
    allowed_units = tuple(PER_YEAR)

    @property
    def outputs(self):
        return [f"{self.name}_risk"]

    @property
    def columns(self):
        return [self.name, self.name + EVENT]

    @property
    def more_columns(self):
        return [self.name + EVENT, f"{self.name}_event"]

    def read(self, cells, numbers, task, path, listener):
        """If one of a time and its event is missing, both become NaN."""
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
        """Times (S,) in the label's unit; dates and times above LONGEST are errors."""
        y, unit = numbers[source], task.units.get(self.name, "")
        invalid = cells[source][y.isna()].dropna()
        if len(invalid) and invalid.str.contains(r"^\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}").any():
            examples = examples_of(invalid, cells.loc[invalid.index, "eid"])
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
            y = decode_events(cells[source], codes)
        else:
            y = numbers[source]
        invalid = cells[source][cells[source].notna() & ~y.isin([0, 1])]
        if len(invalid):
            listener.error(
                f"{path}, {self.name}: {len(invalid)} events in {source} are neither 0 (censored) "
                f"nor 1: {examples_of(invalid, cells.loc[invalid.index, 'eid'])}",
                'write 0 and 1, or map them in the task of the config: "events": {"1": 0, "2": 1}',
            )
        return y.where(y.isin([0, 1]))

    def contrast(self, table):
        return table[self.name + EVENT]

    def counts(self, y):
        return {"events": int(y.sum())}

    def summary(self, y):
        return f"{y.sum():.0f} events of {len(y)}" + (f" ({y.mean():.1%})" if len(y) else "")

    def why_constant(self, y):
        return "" if y.any() else "no event" if len(y) else "always missing"

    def truths(self, table):
        return {self.outputs[0]: table[self.name] * np.nan}

    @staticmethod
    def losses(z, y):
        return cox_losses(z[:, 0], *y.T)[:, None]

    def readable(self, z, scaling, hazards):
        hazard = hazards.get(self.outputs[0])
        return z - hazard.mean if hazard else z

    def metric(self, y, p):
        return mt.c_index(y[:, 0], y[:, 1] == 1, p[:, 0]) if len(y) else np.nan

    def hazard(self, y, p):
        return mt.breslow(*y.T, p[:, 0])

    def more_answers(self, row):
        start = f"{self.name}_survival_"
        times = {k.removeprefix(start): v for k, v in row.items() if k.startswith(start)}
        return [
            (f"no {self.name} within {time} year{'s' * (time != '1')}", p)
            for time, p in times.items()
        ]

    def outcome(self, y, p, unit="", threshold=None, years=()):
        years = tuple(years or USUAL_YEARS)
        return SurvivalOutcome(
            self.name, y[:, 0], p[:, 0], y[:, 1], years, unit or "years", per_year(unit)
        )


@dataclass(eq=False)
class SurvivalOutcome(Outcome):
    """Time to an event: truth: the time, predicted: the risk, higher for an earlier event; all
    (S,).

    event: 1 or 0 (censored); years: times at which the cumulative/dynamic AUROC is computed; a year
    has `per_year` units; survival (S, years): predicted probability of no event until then, None
    or NaN if unknown.
    """

    event: np.ndarray
    years: tuple[float, ...] = ()
    units: str = "years"
    per_year: float = 1.0
    survival: np.ndarray | None = None

    headline, truth_fields = "c_index", ("truth", "event")
    METRICS: ClassVar = (
        Metric(
            "c_index", "Survival", interval="wilson",
            denominator=lambda o: o.usable & (o.event == 1),
            undefined="no comparable pair of studies",
        ),
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if not np.isin(self.event[np.isfinite(self.event)], (0, 1)).all():
            raise UserError(f"{self.label}: an event is neither 0, 1 nor missing")
        if (self.truth < 0).any():
            raise UserError(f"{self.label}: a time is below zero")

    @cached_property
    def usable(self):
        return np.isfinite(self.truth) & np.isfinite(self.predicted) & np.isfinite(self.event)

    @property
    def truth_columns(self):
        return {self.label: self.truth, f"{self.label}_event": self.event}

    @property
    def predicted_columns(self):
        return {f"{self.label}_risk": self.predicted}

    @property
    def has_survival(self):
        """Whether survival is predicted for some year."""
        return self.survival is not None and bool(np.isfinite(self.survival[self.usable]).any())

    @property
    def figures(self):
        return ("kaplan_meier", "survival_calibration")[: 1 + self.has_survival]

    @property
    def methods(self):
        years = " and ".join(f"{year:g}" for year in self.years)
        text = (
            "Time to event was assessed by Harrell's C, by the cumulative/dynamic AUROC with "
            f"inverse probability of censoring weights (Uno 2007) at {years} years, and by "
            "Kaplan-Meier curves of thirds of predicted risk (one study per patient)"
        )
        if self.has_survival:
            text += "; calibration by observed (Kaplan-Meier) against predicted survival in groups"
        return text + "."

    def calibration(self, patients):
        """[{year, group, n, events, predicted, observed, ci_low, ci_high}]: mean predicted survival
        and the Kaplan-Meier estimate at each year, by fifths of predicted survival (thirds with
        fewer than FIFTHS events), of the first usable study of each patient.

        Observed survival is NaN beyond the follow-up of a group (Harrell, Regression Modeling
        Strategies, 2015, chapter 20).
        """
        rows = []
        for k, year in enumerate(self.years if self.survival is not None else ()):
            use = np.flatnonzero(self.usable & np.isfinite(self.survival[:, k]))
            use = use[np.sort(np.unique(np.asarray(patients)[use], return_index=True)[1])]
            p, time, event = self.survival[use, k], self.truth[use], self.event[use] == 1
            n_groups = 5 if event.sum() >= FIFTHS else 3
            edges = np.quantile(p, np.arange(1, n_groups) / n_groups) if len(use) else []
            group, end = np.searchsorted(edges, p), year * self.per_year
            for g in np.unique(group):
                of_group = group == g
                times, *curves = mt.kaplan_meier(time[of_group], event[of_group])
                at = np.searchsorted(times, end * (1 + 1e-9), side="right") - 1
                ends = time[of_group].max() < end and curves[0][-1] > 0
                observed, low, high = (np.nan if ends else float(c[at]) for c in curves)
                rows.append({
                    "year": year, "group": int(g) + 1, "n": int(of_group.sum()),
                    "events": int((event & (time <= end))[of_group].sum()),
                    "predicted": float(p[of_group].mean()), "observed": observed,
                    "ci_low": low, "ci_high": high,
                })  # fmt: skip
        return rows

    @property
    def n_positive(self):
        return int(self.event[self.usable].sum())

    def by_patient(self, patients, rule):
        if rule == "mean":
            raise UserError(f"{self.label}: times cannot be averaged; use --pool first or last")
        return super().by_patient(patients, rule)

    def all_metrics(self):
        yield from self.METRICS
        for year in self.years:
            end = year * self.per_year
            yield Metric(
                f"auroc_at_{year:g}",
                interval="wilson",
                denominator=lambda o, end=end: rarer(o, (o.event == 1) & (o.truth <= end)),
                undefined="no event before this time, or no follow-up beyond it",
            )

    def why_undefined(self):
        return "" if self.n_positive else "no event"

    def compute(self, weights):
        time, risk = self.pairs()
        event = self.event[self.usable] == 1
        metrics = {"c_index": mt.c_index(time, event, risk, weights)}
        for year in self.years:
            auroc = mt.dynamic_auroc(time, event, risk, year * self.per_year, weights)
            metrics[f"auroc_at_{year:g}"] = auroc
        return metrics


def per_year(unit):
    """The number of units of time in a year; '' is years."""
    return PER_YEAR[unit.strip().casefold() or "years"]


def decode_events(cells, codes):
    """Cells of text -> the values of their codes {text: value}; NaN for others. 1.0 is code 1."""
    plain = cells.str.strip().str.casefold().str.replace(r"^(\d+)\.0+$", r"\1", regex=True)
    return plain.map({x.strip().casefold(): float(y) for x, y in codes.items()}).astype(float)


def cox_losses(risk, time, event):
    """Minus the log partial likelihood (Cox 1972, ties by Breslow) of each event, (S,); 0 without
    an event. It is scaled: its mean over known studies is the mean over events.

    risk: log hazards (S,); time, event (S,): NaN if unknown.
    """
    import torch

    has_value = ~(time.isnan() | event.isnan())
    out, n_events = torch.zeros_like(risk), (event[has_value] == 1).sum()
    if not n_events:
        return out + 0 * risk.sum()
    order = torch.argsort(time[has_value], descending=True)
    r, t, e = (x[has_value][order] for x in (risk.double(), time, event))
    at_risk = r.logcumsumexp(0)  # of studies with the same or a longer time
    last = torch.searchsorted(-t, -t, right=True) - 1
    losses = (at_risk[last] - r) * (e == 1) * (len(r) / n_events)
    rows = has_value.nonzero()[:, 0][order]
    return out.index_put((rows,), losses.to(out.dtype))
