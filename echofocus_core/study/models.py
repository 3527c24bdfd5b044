"""Trained study-level models: outputs of a network as readable answers, and averages of models."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from echofocus_core.base.console import RUN, Collected, some
from echofocus_core.study.config import Record
from echofocus_core.study.input_check import Novelty
from echofocus_core.study.kinds.base import sigmoid
from echofocus_core.study.kinds.survival import USUAL_YEARS, per_year
from echofocus_core.study.network import Aggregator, Readings
from echofocus_core.study.outputs import Outputs, losses_of_outputs
from echofocus_core.study.scaling import least_value

IMPLAUSIBLE = "far beyond the training data or impossibly negative"
FAR = 30  # standard deviations of a measurement in training: ten times a usual range of +-3


@dataclass(repr=False)
class LoadedModel:
    """A model folder's checkpoint, ready to predict."""

    folder: Path
    net: Aggregator | Readings
    task: str
    outputs: Outputs  # labels stripped, in output order
    scaling: dict | None  # the published input_norm_dict
    record: Record  # of a published checkpoint: only what was published of its input
    units: dict
    seen: list | None = None  # of Seen: its own, then ancestors'; None: its file has no list
    encoder_file: Path | None = None  # the encoder of its training, if that is in its folder
    clip_mean: torch.Tensor | None = None  # (D,) of the training fold, if it is recorded
    novelty: Novelty | None = None  # measures how different a study is from the training fold
    mean_answer: torch.Tensor | None = None  # (T,) outputs of the mean answer in the training fold

    def __repr__(self):
        """One line, without weights and hashes of patients."""
        return f"{type(self).__name__}({self.folder}: task {self.task}, {some(self.outputs.names)})"

    @property
    def type(self):
        return self.outputs.type

    @property
    def target(self):
        """The rule by which its thresholds were chosen."""
        return self.record.settings.target or "youden"

    def losses(self, logits, targets, columns):
        """The loss of each study's answers to some labels, all (S, T)."""
        return losses_of_outputs(
            logits, targets, [self.outputs.by_output[self.outputs.names[i]] for i in columns]
        )

    def kind(self, name):
        """What an output is: binary (a finding, or a class), regression or survival."""
        return self.outputs.kind_of[name]

    def unit(self, name):
        """The unit of an answer, '' where it has none."""
        return "" if self.kind(name) == "survival" else self.units.get(name, "")

    def member_columns(self, logits, values):
        """Columns of a prediction table about averaged members: none of a single model."""
        return {}

    def survival(self, logits, years=()):
        """{label_survival_year: (S,)} for these years, or those of USUAL_YEARS that are covered."""
        columns = {}
        for label in self.outputs.of_kind("survival"):
            (name,) = self.outputs.names[self.outputs.slices[label]]
            risk, hazard = np.asarray(logits)[:, self.outputs.names.index(name)], self.hazard(name)
            year = per_year(self.units.get(label, ""))
            for at in years or [x for x in USUAL_YEARS if hazard and x * year <= hazard.end]:
                values = np.full(len(risk), np.nan)
                if hazard:
                    values = survival_at(at * year, risk, **hazard.model_dump())
                if not hazard or not hazard.cumulative[-1]:
                    why = f"the validation fold of {self.folder.name} has no event of {label}"
                    RUN.warning(why, f"{label}_survival_{at:g} stays blank")
                elif at * year > hazard.end:
                    RUN.warning(
                        f"no training patient was followed for {at:g} years until {label}",
                        f"{label}_survival_{at:g} stays blank: use --years below "
                        f"{hazard.end / year:g}",
                    )
                columns[f"{label}_survival_{at:g}"] = values
        return columns

    def hazard(self, name):
        """The Hazard of a survival output; None where it was not learnt."""
        return None if name in self.record.unlearnt else self.record.hazards.get(name)

    def implausible(self, logits):
        """(S, T): where an answer is far beyond the training data, for example by damaged weights.

        A measurement: outside an interval ten times as wide as that of the training fold, around
        its middle; without a record of it beyond FAR; or negative although no value of the training
        fold is. A log-odds or log hazard: beyond 100.
        """
        outputs = np.asarray(logits, float)
        if isinstance(self.net, Readings):  # probabilities and sizes
            return outputs < 0
        values = self.outputs.readable(outputs, self.scaling, self.record.hazards)
        far = abs(outputs) > 100
        for label in self.outputs.of_kind("regression"):
            i = self.outputs.names.index(label)
            low, high = self.record.ranges.get(label, (least_value(label, self.scaling),) * 2)
            of_value = abs(values[:, i] - (low + high) / 2) > 5 * (high - low)
            far[:, i] = of_value if high > low else abs(outputs[:, i]) > FAR
            far[:, i] |= (values[:, i] < 0) & (low >= 0)
        return far & np.isfinite(outputs) & ~np.isin(self.outputs.names, self.record.unlearnt)

    def readable(self, logits, listener=RUN):
        """Outputs (S, T) -> probabilities or physical units; NaN for labels never learnt."""
        values = np.asarray(logits)
        if not isinstance(self.net, Readings):
            values = self.outputs.readable(values, self.scaling, self.record.hazards)
        unlearnt = np.isin(self.outputs.names, self.record.unlearnt)
        beyond = np.isnan(values) & ~np.isnan(np.asarray(logits)) & ~unlearnt
        for where, text, remedy in (
            (beyond, "past the end of the Box-Cox scale", "they stay blank"),
            (self.implausible(logits), IMPLAUSIBLE, "do not use them"),
        ):
            if where.any():
                names = some(np.array(self.outputs.names)[where.any(axis=0)])
                listener.warning(f"{where.sum()} answers of {names} are {text}", remedy)
        return np.where(unlearnt, np.nan, values)

    def range_values(self, logits):
        """Outputs (S, ...) -> the values (S, T) in which the range of an answer is symmetric."""
        return np.asarray(logits)

    def from_range_values(self, values):
        """The inverse, as readable answers (S, T)."""
        return self.readable(np.asarray(values, np.float32), Collected())


class Ensemble(nn.Module):
    """Several networks of the same labels: their outputs side by side, embeddings averaged."""

    def __init__(self, nets):
        super().__init__()
        self.nets = nn.ModuleList(nets)
        self.n_outputs, self.width = sum(net.n_outputs for net in nets), nets[0].width
        self.has_attention = all(net.has_attention for net in nets)

    def forward(self, tokens, lengths, rng=None):
        """As an Aggregator's, with logits (S, networks * T)."""
        logits, embeddings = zip(*(net(tokens, lengths, rng) for net in self.nets), strict=True)
        return torch.cat(logits, dim=1), torch.stack(embeddings).mean(dim=0)


@dataclass(repr=False)
class LoadedEnsemble(LoadedModel):
    """Models of the same labels, such as those of a cross-validation, whose answers are averaged.

    Each member has its own scaling; a threshold is the mean of the members'. Logits are
    (S, members * T).
    """

    members: list = ()

    def split(self, logits):
        """(member, its logits (S, T)) of each."""
        return zip(self.members, np.split(np.asarray(logits), len(self.members), 1), strict=True)

    def answers(self, logits, listener=RUN):
        """(members, S, T): readable answers of each."""
        return np.stack([m.readable(x, listener) for m, x in self.split(logits)])

    def readable(self, logits, listener=RUN):
        """The mean over the members that learnt a label; NaN where one of these has no answer,
        since its answer is at an end of the scale."""
        answers = self.answers(logits, listener)
        learnt = np.stack([~np.isin(self.outputs.names, m.record.unlearnt) for m in self.members])[
            :, None
        ]
        total, n = np.where(learnt, answers, 0).sum(axis=0), learnt.sum(axis=0)
        return np.divide(total, n, out=np.full(total.shape, np.nan), where=n > 0)

    @property
    def findings(self):
        return np.array([self.kind(name) == "binary" for name in self.outputs.names])

    def range_values(self, logits):
        """The averaged answers, findings in log-odds; a resample is the same for all members."""
        values = self.readable(logits, Collected()).astype(np.float64)
        p = np.clip(values, 1e-7, 1 - 1e-7)
        return np.where(self.findings, np.log(p) - np.log1p(-p), values)

    def from_range_values(self, values):
        return np.where(self.findings, sigmoid(values), values)

    def implausible(self, logits):
        """(S, T): where the answer of a member is implausible."""
        return np.any([m.implausible(x) for m, x in self.split(logits)], axis=0)

    def survival(self, logits, years=()):
        """The mean over the members that learnt a label, at times that all of these cover."""
        columns = {}
        for label in self.outputs.of_kind("survival"):
            (risk,) = self.outputs.names[self.outputs.slices[label]]
            each = [m.survival(x, years) for m, x in self.split(logits) if m.hazard(risk)]
            for name in [x for x in each[0] if x.startswith(f"{label}_survival_")] if each else ():
                if all(name in values for values in each):
                    columns[name] = np.mean([values[name] for values in each], axis=0)
        return columns

    def member_columns(self, logits, values):
        """label_sd -> (S,): the SD of the members' answers, NaN where `values` (S, T) is."""
        answers = np.ma.masked_invalid(self.answers(logits, Collected()))
        sd = np.where(np.isnan(values), np.nan, answers.std(axis=0, ddof=1).filled(np.nan))
        return {
            f"{label}_sd": column for label, column in zip(self.outputs.names, sd.T, strict=True)
        }


def survival_at(at, risk, mean, times, cumulative):
    """The probability (S,) of no event until `at` for log hazards (S,), by `breslow`'s dict; NaN
    beyond its times, or where it has no event."""
    if at > times[-1] or not cumulative[-1]:
        return np.full(np.shape(risk), np.nan)
    until = cumulative[np.searchsorted(times, at * (1 + 1e-9), side="right") - 1]
    return np.exp(-until * np.exp(np.asarray(risk, float) - mean))
