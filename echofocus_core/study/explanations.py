"""The studies that `explain` selects, and the contribution of each video to each answer."""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import pandas as pd

from echofocus_core import __version__
from echofocus_core.base.console import RUN, Collected, UserError, count_of, nearest, progress
from echofocus_core.base.files import sha256_of
from echofocus_core.base.seen import seen_levels
from echofocus_core.study.attribution import NOT_ADDITIVE, explain_study
from echofocus_core.study.fold_answers import labelled_folds
from echofocus_core.study.folds import sample_ids
from echofocus_core.study.loop import run_studies
from echofocus_core.study.models import LoadedEnsemble
from echofocus_core.study.scaling import scale
from echofocus_core.study.sources import labelled_ids
from echofocus_core.video.store import UnreadableStudy

USUAL = 4  # standard deviations of a measurement
SELECTED = 20  # studies that --select takes without --sample_limit


def label_columns(model, labels=None):
    """Label names (default: all learnt ones) -> their numbers. Raises UserError."""
    unlearnt, name = model.record.unlearnt, model.folder.name
    for label in labels or ():
        if label in unlearnt:
            raise UserError(f"{name} has not learnt {label}: nothing to explain")
        if label not in model.outputs.names:
            raise UserError(f"no label {label} in {name}{nearest(label, model.outputs.names)}")
    labels = labels or [label for label in model.outputs.names if label not in unlearnt]
    return [model.outputs.names.index(label) for label in labels]


# ---------------------------------------------------------------------------------------- studies


def explained_studies(job):
    """(ids of the studies to explain, their labels in physical units or NaN, study id -> patient
    from the label table).

    Studies without labels are explained too; those that neither the model nor the encoder has seen
    belong to the test fold.
    """
    model, settings, eids = job.model, job.settings, job.source.eids
    truths = no_truths(model, eids)
    folds, patients = pd.Series("test", index=truths.index), {}
    labelled = job.dataset.label_path or labelled_ids(job)
    encoder, _ = job.source.store.encoder_seen(eids, Collected() if labelled else RUN)
    if seen := [*(model.seen or ()), *([] if settings.assume_unseen else encoder)]:
        by_study = truths.assign(pid=[f"study {eid}" for eid in eids])  # patients are unknown
        folds = seen_levels(seen, by_study).map({0: "test", 1: "val", 2: "train"})
    if labelled:
        _, table, folds_of_table, _ = labelled_folds(job)
        names = table.index.intersection(eids)
        patients = dict(table["pid"])
        truths.loc[names] = model.outputs.truths(table.loc[names])
        folds[names] = folds_of_table[names]
    elif settings.explain_mode == "loss":
        raise UserError("--explain_mode loss needs labels: set label_path in the config")
    if settings.eids:
        for eid in settings.eids:
            if eid not in truths.index:
                raise UserError(f"no study {eid} in {settings.dataset}{nearest(eid, eids)}")
        return list(dict.fromkeys(settings.eids)), truths, patients
    if settings.subset != "all":
        eids = [eid for eid in eids if folds[eid] == settings.subset]
    if not eids:
        raise UserError(
            f"no study of {settings.dataset} is in the fold {settings.subset}; --subset all "
            f"includes those that {model.folder.name} has seen"
        )
    return sorted(eids), truths, patients


def no_truths(model, eids):
    return pd.DataFrame(np.nan, index=pd.Index(eids, name="eid"), columns=model.outputs.names)


def select_studies(job, eids, truths, columns):
    """The studies that `--select` chooses, best first. Raises UserError."""
    model, settings, select = job.model, job.settings, job.settings.select
    if select == "all":
        return sample_ids(eids, settings.sample_limit)
    kinds = {model.kind(model.outputs.names[i]) for i in columns}
    if len(kinds) > 1:
        raise UserError(
            f"--select {select} needs labels of one type; choose them with --explain_tasks"
        )
    if kinds != {"binary"} and (select != "wrong" or kinds != {"regression"}):
        raise UserError(f"--select {select} does not support labels of type {kinds.pop()}")
    results = run_studies(model.net, job.source.store, eids, settings, label="select")
    answers = model.readable(results.logits)[:, columns]
    truth = truths.loc[results.eids].to_numpy()[:, columns]
    labels = [model.outputs.names[i] for i in columns]
    if kinds == {"binary"}:
        cuts = np.array([model.record.thresholds.get(label, 0.5) for label in labels])
        order = rank_findings(log_odds(answers), truth, log_odds(cuts), select)
    else:
        scaled = (scale(x, labels, model.scaling) for x in (answers, truth))
        order = rank_errors(*scaled)
    chosen = [results.eids[i] for i in order][: settings.sample_limit or SELECTED]
    if not chosen:
        raise UserError(f"--select {select} selects no study")
    print(f"explaining {len(chosen)} of {count_of(len(eids), 'studies')}: {select}")
    return chosen


def log_odds(p):
    p = np.clip(np.asarray(p, np.float64), 1e-12, 1 - 1e-12)
    return np.log(p / (1 - p))


def rank_errors(values, truth):
    """Rows with an error, largest first; values and truth (S, T) in standard deviations."""
    if np.isnan(truth).all():
        raise UserError("--select wrong needs labels: set label_path in the config")
    wrong = np.nan_to_num(np.abs(values - truth)).max(axis=1)
    return [i for i in np.argsort(-wrong, kind="stable") if wrong[i] > 0]


def rank_findings(answers, truth, cuts, select):
    """Rows of the studies that `select` chooses, best first; answers (S, T) and cuts in log-odds.

    confident: farthest from the thresholds; wrong: decision differs from the label, farthest first;
    balanced: alternately with and without a finding (by label, or else by decision).
    """
    margins = answers - cuts
    decided = margins >= 0
    wrong = np.where(np.isnan(truth) | (decided == (truth == 1)), 0, margins)
    if select == "wrong":
        return rank_errors(wrong, np.where(np.isnan(truth), np.nan, 0))
    order = np.argsort(-np.abs(margins).max(axis=1), kind="stable")
    if select == "balanced":
        present = np.where(np.isnan(truth), decided, truth == 1).any(axis=1)
        groups = [[i for i in order if present[i]], [i for i in order if not present[i]]]
        order = list(chain(*zip(*groups, strict=False)))
    return order


# ----------------------------------------------------------------------------------- explanations


def explain_studies(job, eids, columns, truths=None, first=0):
    """Yield the explanation of each study from number `first` on, see `explain_study`.

    The processes of the job share the work; each of them yields all explanations.
    """
    model, store, settings, world = job.model, job.source.store, job.settings, job.world
    truths = no_truths(model, eids) if truths is None else truths
    rounds = range(first, len(eids), world.size)
    for start in progress(rounds, desc="explain", unit="study", disable=world.rank > 0):
        explanation = None
        if start + world.rank < len(eids):
            eid = eids[start + world.rank]
            truth = truths.loc[eid].to_numpy()
            try:
                explanation = explain(model, eid, store.read(eid), columns, settings, truth)
            except UnreadableStudy as error:
                explanation = {"eid": eid, "columns": [], "unreadable": str(error)}
        yield from filter(None, world.gather(explanation))


def explain(model, eid, bag, columns, settings, truths=None):
    """The explanation of a study, see `explain_study`; for averaged models, their mean.

    truths: (T,) labels in physical units, NaN if missing.
    """
    if isinstance(model, LoadedEnsemble):
        each = [explain(m, eid, bag, columns, settings, truths) for m in model.members]
        return mean_explanation(model, each, settings)
    truths = np.full(len(model.outputs.names), np.nan) if truths is None else truths
    targets = normalised(model, truths[None])[0]
    return explain_study(model, eid, bag, columns, settings, targets)


def mean_explanation(model, each, settings):
    """The mean of the members' explanations of a study, for each label over members that learnt it.

    Scores of a measurement are converted to the scale of the first member, which the average uses.
    Standard errors are averaged too, since members share the permutations: an upper bound.
    Answers are kept for each member, since `model.readable` averages them.
    """
    columns = [i for i in each[0]["columns"] if all(i in x["columns"] for x in each)]
    result = {"eid": each[0]["eid"], "columns": columns, "videos": each[0]["videos"]}
    if not columns:
        return result
    weights = np.array([weights_of(model, m, columns, settings) for m in model.members])
    weights /= (weights > 0).sum(axis=0)
    for name in ("scores", "absolute", "ends", "standard_error", "error"):
        parts = [x[name][[x["columns"].index(i) for i in columns]] for x in each]
        shares = weights if name != "error" else (weights > 0) / (weights > 0).sum(axis=0)
        result[name] = sum((w * part.T).T for w, part in zip(shares, parts, strict=True))
    for name in ("answer", "baseline", "without"):
        result[name] = np.concatenate([x[name] for x in each], axis=1)
    result["losses"] = np.mean([x["losses"] for x in each], axis=0)
    names = dict.fromkeys(x["baseline_name"] for x in each)
    return result | {"baseline_name": " or ".join(names), "truths": each[0]["truths"]}


def weights_of(model, member, columns, settings):
    """Factors that convert a member's scores to the scale of the average; 0: not learnt."""
    labels = [model.outputs.names[i] for i in columns]
    factors = [
        score_unit(member, x, settings)[0] / score_unit(model, x, settings)[0] for x in labels
    ]
    return np.where(np.isin(labels, member.record.unlearnt), 0.0, factors)


def score_unit(model, label, settings):
    """(factor from the network's units, name of the unit) of a label's scores."""
    if settings.explain_method == "attention":
        return 1.0, "share"
    if settings.explain_mode == "loss":
        return 1.0, "loss"
    if settings.explain_method == "shapley" and model.kind(label) == "binary":
        return 100.0, "points"  # of a probability
    return model.outputs.by_output[label].score_unit(model.scaling, model.unit(label))


@dataclass
class LabelExplanation:
    """The explanation of one answer, in readable units."""

    label: str
    answer: float
    unit: str  # of the scores: log-odds, points (percentage points), the label's unit, loss, share
    of_clips: np.ndarray  # (V, C) scores
    absolute: np.ndarray  # (V,) sums of absolute values over clips and features
    standard_error: np.ndarray  # (V,) of Shapley values by sampling; NaN: not defined
    without: np.ndarray  # (V,) the answer without each video; NaN if it is the only one
    adds_up: bool  # whether the scores add up to the change from the baseline to the answer
    error: float  # the difference of their sum from it, as a share of summed absolute scores
    baseline: float  # the answer from which the scores start; NaN: not defined
    baseline_name: str  # what that answer is, in words
    ends: tuple[float, float]  # baseline and answer in the unit of the scores, from any zero
    fault: str  # why the scores have no meaning, since no study has the baseline's answer; or ''

    @property
    def scores(self):
        """(V,) scores of the videos."""
        return self.of_clips.sum(1, dtype=np.float64)


def label_explanation(model, explanation, k, settings):
    """The LabelExplanation of the k-th of the labels of `explain_study`."""
    i = explanation["columns"][k]
    label, name = model.outputs.names[i], explanation["baseline_name"]
    factor, unit = score_unit(model, label, settings)
    answer, baseline, without = (
        model.readable(explanation[x], Collected())[:, i] for x in ("answer", "baseline", "without")
    )
    low, high = plausible_range(model, label)
    fault = ""
    if name and not low <= baseline[0] <= high:
        fault = (
            f"The scores start from {baseline[0]:.4g} {model.unit(label)} ({name}), outside the "
            f"range of the training labels, {low:.4g} to {high:.4g}: they have no meaning"
        )
    return LabelExplanation(
        label, answer[0], unit, factor * explanation["scores"][k],
        factor * explanation["absolute"][k], factor * explanation["standard_error"][k], without,
        settings.explain_method not in NOT_ADDITIVE, float(explanation["error"][k]),
        baseline[0], name, tuple(factor * explanation["ends"][k].astype(float)), fault,
    )  # fmt: skip


def plausible_range(model, label):
    """The range of a label in training: for a finding 0 to 1; for a measurement that of the
    training fold, or 4 standard deviations around its mean where the checkpoint has no record."""
    if model.kind(label) == "binary":
        return 0.0, 1.0
    if model.kind(label) != "regression":
        return -np.inf, np.inf
    if label in model.record.ranges:
        return model.record.ranges[label]
    ends = np.array([[-USUAL], [USUAL]])
    values = model.outputs.by_output[label].readable(ends, model.scaling, {})[:, 0]
    return tuple(np.nan_to_num(values, nan=np.inf))  # NaN: past the end of the Box-Cox scale


def normalised(model, truths):
    """Labels (S, T) in physical units -> in the units of the network's outputs."""
    return scale(np.asarray(truths), model.outputs.names, model.scaling or {})


def journal_header(job, eids, columns, truths):
    """Everything that explanations depend on; a stopped run resumes only if all is unchanged."""
    settings = job.settings
    weights = {name: x.cpu().numpy() for name, x in job.model.net.state_dict().items()}
    names = ("precision", "max_videos_per_study", "explain_mode", "explain_method",
             "explain_steps", "baseline")  # fmt: skip
    header = {name: getattr(settings, name) for name in names}
    members = getattr(job.model, "members", [job.model])
    means = [m.mean_answer.numpy() for m in members if m.mean_answer is not None]
    return header | {
        "model": sha256_of(*chain(*weights.items())), "studies": job.source.store.digest(eids),
        "columns": columns, "truths": sha256_of(truths.loc[eids].to_csv()), "version": __version__,
        "mean_answers": sha256_of(*means),
    }  # fmt: skip
