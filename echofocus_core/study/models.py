"""Trained study-level models: what a checkpoint says of one, its answers, averages of several.

Reading the file itself is echofocus.py's; here is what follows from what it holds.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import logsigmoid

from echofocus_core import EMBED_DIM as D
from echofocus_core.base import checkpoints, releases
from echofocus_core.base.console import RUN, Collected, UserError, some
from echofocus_core.base.options import MOST_LABELS, MOST_LAYERS
from echofocus_core.study.config import Record
from echofocus_core.study.network import Readings, StudyModel
from echofocus_core.study.outputs import USUAL_YEARS, Outputs, losses_of_outputs, scaling_fault


@dataclass
class LoadedModel:
    """A model folder's checkpoint, ready to predict."""

    folder: Path
    net: StudyModel | Readings
    task: str
    outputs: Outputs  # labels stripped, in output order
    scaling: dict | None  # the published input_norm_dict
    record: Record  # of a published checkpoint: what is known of its input
    units: dict
    seen: list | None = None  # of Seen: own, then ancestors'; None: its file does not say
    encoder_file: Path | None = None  # that it was trained with, where it is in its folder
    clip_mean: torch.Tensor | None = None  # (D,) of the training fold, where it is known
    novelty: object = (
        None  # report.trust.Novelty: how unlike the training fold a study is, where it is known
    )

    @property
    def labels(self):
        """One an output: a label, or label_class of its classes. What is unlearnt, has a threshold
        or is explained is named so."""
        return self.outputs.names

    @property
    def type(self):
        return self.outputs.type

    def losses(self, logits, targets, columns):
        """The loss of each study's answers to some labels, all (S, T)."""
        return losses_of_outputs(logits, targets, [self.kind(self.labels[i]) for i in columns])

    def kind(self, name):
        """What an output is: binary (a finding, or a class), regression or survival."""
        return self.outputs.kind_of[name]

    def unit(self, name):
        """The unit of an answer, '' where it has none."""
        return "" if self.kind(name) == "survival" else self.units.get(name, "")

    def survival(self, logits, years=()):
        """{label_survival_year: (S,)} for these times, or those of USUAL_YEARS that are known."""
        found = {}
        for label in self.outputs.of_kind("survival"):
            (name,) = self.outputs.names_of(label)
            risk, hazard = np.asarray(logits)[:, self.labels.index(name)], self.hazard(name)
            for at in years or [x for x in USUAL_YEARS if hazard and x <= hazard.end]:
                values = np.full(len(risk), np.nan)
                if hazard:
                    values = survival_at(at, risk, **hazard.model_dump())
                if not hazard or not hazard.cumulative[-1]:
                    why = f"the validation fold of {self.folder.name} has no event of {label}"
                    RUN.warning(why, f"{label}_survival_{at:g} stays blank")
                elif at > hazard.end:
                    RUN.warning(
                        f"nobody whom {label} was learnt from was followed for {at:g}",
                        f"{label}_survival_{at:g} stays blank: take --years below {hazard.end:g}",
                    )
                found[f"{label}_survival_{at:g}"] = values
        return found

    def hazard(self, name):
        """The Hazard of a survival output; None where it was not learnt."""
        return None if name in self.record.unlearnt else self.record.hazards.get(name)

    def for_range(self, logits):
        """Outputs (S, T) in the scale in which their range is symmetric."""
        return logits

    def from_range(self, values):
        """An end of such a range -> probabilities or physical units."""
        return self.readable(values.astype(np.float32), Collected())

    def readable(self, logits, listener=RUN):
        """Outputs (S, T) -> probabilities or physical units; NaN for labels never learnt."""
        if isinstance(self.net, Readings):
            return np.asarray(logits)
        values = self.outputs.readable(logits, self.scaling, self.record.hazards)
        unlearnt = np.isin(self.labels, self.record.unlearnt)
        lost = np.isnan(values) & ~np.isnan(np.asarray(logits)) & ~unlearnt
        if lost.any():
            names = some(x for x, y in zip(self.labels, lost.any(axis=0), strict=True) if y)
            listener.warning(
                f"{lost.sum()} answers of {names} lie past the end of the Box-Cox scale",
                "they stay blank",
            )
        return np.where(unlearnt, np.nan, values)


def network_from(state, combine, path):
    """Build the StudyModel that a published state dict fits; its shape is read from the names.

    Its sizes are judged before memory is taken for it. Raises UserError.
    """
    if not all(isinstance(name, str) for name in state) or "ff.weight" not in state:
        raise UserError(f"{path} is not an EchoFocus model: no ff.weight in its state dict")
    layers = {k.split(".")[2] for k in state if k.startswith("encoder.layers.")}
    kind, counted = "standard", ("ff.weight", 0)
    if "query_token" in state:
        kind = "query"
    elif "query_tokens" in state:
        kind, counted = "multiquery", ("query_tokens", 1)
    shape = checkpoints.describe(state[counted[0]])
    n_labels = shape[counted[1]] if isinstance(shape, tuple) and len(shape) > counted[1] else 0
    if not 0 < n_labels <= MOST_LABELS or len(layers) > MOST_LAYERS:
        raise UserError(
            f"{path} is not an EchoFocus model: {counted[0]} is {shape}, {len(layers)} layers"
        )
    with torch.device("meta"):
        net = StudyModel(n_labels, kind, len(layers), combine)
    checkpoints.load_strictly(net, state, path, "an EchoFocus model")
    return net, n_labels


def outputs_from(saved, record, labels, path):
    """(Outputs, scaling of its measurements or None) of a checkpoint. Raises UserError."""
    kind = "regression" if saved.get("input_norm_dict") else "binary"
    outputs = record.outputs if record and record.type else Outputs.of(labels, kind)
    measured = outputs.of_kind("regression")
    if bool(measured) != bool(saved.get("input_norm_dict")):
        how = "without" if measured else "with"
        raise UserError(f"{path}: a {outputs.type} model {how} label scaling")
    return outputs, scaling_from(saved, measured, path)


def scaling_from(saved, labels, path):
    """The published input_norm_dict of these labels, keys stripped, or None. Raises UserError."""
    scaling = saved.get("input_norm_dict")
    if not scaling:
        return None
    if not isinstance(scaling, dict) or not all(isinstance(k, str) for k in scaling):
        raise UserError(f"{path}: its input_norm_dict is not a dict of labels")
    scaling = {k.strip(): v for k, v in scaling.items()}
    for label in labels:
        if not isinstance(entry := scaling.get(label), dict):
            raise UserError(f"{path} has no scaling for label {label}")
        if fault := scaling_fault(entry):
            raise UserError(f"{path}: scaling of {label}: {fault}")
    return scaling


class Ensemble(nn.Module):
    """Several networks of the same labels: their outputs side by side, embeddings averaged."""

    def __init__(self, nets):
        super().__init__()
        self.nets = nn.ModuleList(nets)
        self.n_labels = sum(net.n_labels for net in nets)

    def forward(self, tokens, lengths, rng=None):
        """As a StudyModel's, with logits (S, networks * T)."""
        logits, embeddings = zip(*(net(tokens, lengths, rng) for net in self.nets), strict=True)
        return torch.cat(logits, dim=1), torch.stack(embeddings).mean(dim=0)


@dataclass
class LoadedEnsemble(LoadedModel):
    """Models of the same labels, as of the folds of a cross-validation, whose answers are averaged.

    Each answers in its own scale; a threshold is the mean of theirs.
    """

    members: list = ()

    def answers(self, logits, listener=RUN):
        """(networks, S, T): readable answers of each."""
        parts = np.split(np.asarray(logits), len(self.members), axis=1)
        return np.stack([m.readable(x, listener) for m, x in zip(self.members, parts, strict=True)])

    def readable(self, logits, listener=RUN):
        """The mean over the networks that learnt a label; blank where one of these has no answer,
        for what is left out lies at an end of the scale."""
        answers = self.answers(logits, listener)
        learnt = np.stack([~np.isin(self.labels, m.record.unlearnt) for m in self.members])[:, None]
        total, n = np.where(learnt, answers, 0).sum(axis=0), learnt.sum(axis=0)
        return np.divide(total, n, out=np.full(total.shape, np.nan), where=n > 0)

    def survival(self, logits, years=()):
        """The mean over the networks that learnt a label, at times that all of these know."""
        parts = np.split(np.asarray(logits), len(self.members), axis=1)
        found = {}
        for label in self.outputs.of_kind("survival"):
            (risk,) = self.outputs.names_of(label)
            each = [
                m.survival(x, years)
                for m, x in zip(self.members, parts, strict=True)
                if m.hazard(risk)
            ]
            for name in [x for x in each[0] if x.startswith(f"{label}_survival_")] if each else ():
                if all(name in own for own in each):
                    found[name] = np.mean([own[name] for own in each], axis=0)
        return found

    def for_range(self, logits):
        """The averaged answers (S, T), findings in log-odds: each network draws alike."""
        values = self.readable(logits, Collected()).astype(np.float64)
        return np.where(self.findings, torch.from_numpy(values).logit(1e-7).numpy(), values)

    def from_range(self, values):
        return np.where(self.findings, torch.from_numpy(values).sigmoid().numpy(), values)

    @property
    def findings(self):
        return np.array([self.kind(name) == "binary" for name in self.labels])

    def averaged(self):
        """The average as one model, to be explained: its outputs are `for_range`'s values."""
        return LoadedAverage(
            self.folder, Averaged(self).eval(), self.task, self.outputs, None, self.record,
            self.units, self.seen, clip_mean=self.clip_mean, novelty=self.novelty,
        )  # fmt: skip

    def spread(self, logits):
        """(S, T): the standard deviation of the answers."""
        return (
            pd.DataFrame(self.answers(logits, Collected()).reshape(len(self.members), -1))
            .std()
            .to_numpy()
        )


class LoadedAverage(LoadedModel):
    """See `LoadedEnsemble.averaged`; measurements are in physical units."""

    def readable(self, logits, listener=RUN):
        """Averaged answers (S, T): findings as probabilities."""
        findings = np.array([self.kind(name) == "binary" for name in self.labels])
        logits = np.asarray(logits)
        return np.where(findings, torch.from_numpy(logits).sigmoid().numpy(), logits)


class Averaged(nn.Module):
    """The networks of a LoadedEnsemble as one, whose outputs (S, T) are its averaged answers."""

    def __init__(self, ensemble):
        super().__init__()
        self.nets, self.members = ensemble.net.nets, ensemble.members
        self.kinds = [ensemble.kind(name) for name in ensemble.labels]
        self.n_labels, self.depth = len(self.kinds), min(net.depth for net in self.nets)
        self.learnt = torch.tensor(
            [[x not in m.record.unlearnt for x in ensemble.labels] for m in self.members]
        )

    def forward(self, tokens, lengths, rng=None):
        """As a StudyModel's: the log-odds of the mean probability, the mean of other answers."""
        logits, embeddings = zip(*(net(tokens, lengths, rng) for net in self.nets), strict=True)
        z, learnt = torch.stack(logits).float(), self.learnt.to(tokens.device)[:, None]
        out = []
        for i, kind in enumerate(self.kinds):
            column, there = z[:, :, i], learnt[:, :, i]
            if kind == "binary":
                lost = torch.where(there, 0.0, -torch.inf)
                odds = [(logsigmoid(x) + lost).logsumexp(0) for x in (column, -column)]
                out.append(odds[0] - odds[1])
            else:
                values = [self.in_units(m, i, x) for m, x in zip(self.members, column, strict=True)]
                total = torch.where(there, torch.stack(values), 0.0).sum(0)
                out.append(total / there.sum(0))
        return torch.stack(out, dim=1), torch.stack(embeddings).mean(dim=0)

    def in_units(self, member, i, z):
        """A network's output (S,) in physical units, as `unscale` has it; log hazards centred."""
        name = member.labels[i]
        if self.kinds[i] == "survival":
            return z - member.record.hazards[name].mean if name in member.record.hazards else z
        s = member.scaling[name]
        z = z * s["stdev"] + s["mean"]
        if s["apply_boxcox"]:
            lmbda = s["lmbda"]
            z = z.exp() if lmbda == 0 else (z * lmbda + 1).clamp(min=1e-6) ** (1 / lmbda)
        return z - s["shift"]

    def first_norm_input(self, tokens):
        """What the first LayerNorms see, of all networks."""
        return torch.cat([net.first_norm_input(tokens) for net in self.nets])


def clip_mean_from(saved, path):
    """The mean clip embedding (D,) of the training fold in a checkpoint, or None."""
    mean = saved.get("clip_mean")
    if mean is None:
        return None
    fits = torch.is_tensor(mean) and mean.shape == (D,) and mean.dtype == torch.float32
    if not fits or not mean.isfinite().all():
        raise UserError(f"{path}: its clip_mean is no clip embedding")
    return mean


def pooling_of(record):
    """How a model pools over clips; the released models ignore their tf_combine."""
    return record.settings.tf_combine if record else "avg"


def released_task(task):
    """The registry entry of a released model with that task, or {}."""
    return next((e for e in releases.registry().values() if e.get("task") == task), {})


def labels_for(folder, record, n_labels, config, task=""):
    """(task, labels, units, who says so) of a model with so many outputs. Raises UserError.

    Its own file says it. A published checkpoint does not: a released one (by its folder's record
    or name) has the registry's labels; any other those of the task that is named, of the task
    called like the folder, or of the one task of the config with so many labels.
    """
    if record:
        n = len(record.outputs.names) if record.type else len(record.labels)
        if n != n_labels:
            raise UserError(f"{folder.name} has {n_labels} outputs and names {n} labels")
        return record.task, record.labels, record.units, "its own file"
    known = releases.released(folder)
    if not known and task not in config.tasks:
        known = released_task(task)
    if (
        known.get("task") == (task or known.get("task"))
        and len(known.get("labels", ())) == n_labels
    ):
        return known["task"], known["labels"], {}, "the registry of released models"
    tasks = {name: t for name, t in config.tasks.items() if name == task or not task}
    fits = [name for name, t in tasks.items() if len(t.task_labels) == n_labels]
    if not fits:
        raise UserError(
            f"{folder.name} has {n_labels} outputs and the config ({config.path}) has no task"
            f"{' ' + task if task else ''} with so many labels; add it, in output order"
        )
    if folder.name in fits:
        fits = [folder.name]
    if len(fits) > 1:
        raise UserError(f"{folder.name} fits {' and '.join(fits)}: name one with --task")
    return fits[0], tasks[fits[0]].task_labels, tasks[fits[0]].units, config.path.name


def survival_at(at, risk, mean, times, cumulative):
    """The probability (S,) of no event until `at` for log hazards (S,), by `breslow`'s dict; NaN
    beyond its times, or where it knows of no event."""
    if at > times[-1] or not cumulative[-1]:
        return np.full(np.shape(risk), np.nan)
    until = cumulative[np.searchsorted(times, at * (1 + 1e-9), side="right") - 1]
    return np.exp(-until * np.exp(np.asarray(risk, float) - mean))
