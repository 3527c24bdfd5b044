"""A model's answers for the studies of one fold of a labelled dataset, with their labels."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from echofocus_core.base.console import RUN, Collected, UserError
from echofocus_core.base.options import FOLDS
from echofocus_core.study.config import MISSING_LABELS
from echofocus_core.study.evaluation import (
    NOT_ASKED,
    UNREADABLE_EMBEDDINGS,
    Studies,
    outcomes_of,
    studies_to_compare,
    study_flow,
    unseen_notes,
    with_survival,
)
from echofocus_core.study.folds import (
    folds_for,
    is_at_home,
    match_studies,
    sample_ids,
    seen_elsewhere,
    stored_names,
    without_seen,
)
from echofocus_core.study.labels import label_file, load_labels, other_unit, read_rows
from echofocus_core.study.loading import SEVERAL_RULES, other_times
from echofocus_core.study.loop import report_unreadable, run_studies
from echofocus_core.study.metrics import choose_threshold, read_target
from echofocus_core.study.models import LoadedEnsemble
from echofocus_core.study.sources import (
    Source,
    open_embeddings,
    refuse_other_embeddings,
    warn_of_other_input,
)


def task_for(model, task):
    """The task with the model's label types. Raises UserError if task and model differ."""
    outputs, name = model.outputs, model.folder.name
    for what, one, other in (
        ("labels", task.task_labels, outputs.labels),
        ("classes", task.classes, outputs.classes),
        ("survival", set(task.survival), set(outputs.of_kind("survival"))),
        ("level", task.level, model.record.level),
    ):
        if one != other:
            raise UserError(f"the task in the config and {name} have different {what}")
    for label in outputs.labels:
        if other_unit(label, task.units, model.units):
            raise UserError(
                f"the task in the config has {label} in {task.units[label]}, {name} in "
                f"{model.units[label]}: convert the labels and change the task's units"
            )
    return task.model_copy(update={"type": outputs.kinds})


def labelled_folds(job):
    """(task, label table, fold of each study, evidence that the test studies are unseen)."""
    model, settings, store = job.model, job.settings, job.source.store
    if job.task is None:
        raise UserError(f"the config has no task {settings.task} with the model's labels")
    task, column = task_for(model, job.task), model.record.settings.split_column
    if column:  # which only the dataset of the training has
        ids = read_rows(label_file(task, job.dataset), [], Collected())
        if ids is None or not is_at_home(model, ids, settings.dataset):
            column = ""
    task, table = load_labels(task, job.dataset, settings=settings, split_column=column)
    table = table.rename(index=stored_names(table.index, store))
    return task, table, *folds_to_test(job, task, table, store)


def folds_to_test(job, task, whole, store, listener=RUN):
    """(fold of each study of a label table, evidence that the model and the encoder have not seen
    the test studies)."""
    model, settings = job.model, job.settings
    folds, evidence = folds_for(model, whole, settings.dataset, listener, settings.assume_unseen)
    encoder = store.encoder_seen(list(whole.index.intersection(list(store.files))), listener)
    series, more = seen_elsewhere(whole, settings, encoder, listener=listener)
    return without_seen(folds, series, listener), "; ".join([evidence, *more])


@dataclass(frozen=True)
class FoldAnswers:
    """A model's answers for the studies of a fold, and the cohort of which the fold is a part."""

    studies: Studies
    flow: list  # of `study_flow`
    evidence: str  # that the studies are unseen
    warnings: list[str]  # about the answers
    task: object  # with the kinds of its labels
    cohort: pd.DataFrame  # pid and targets of all labelled studies with embeddings
    folds: pd.Series  # of these studies


def studies_in_fold(settings, cohort, folds, averaged):
    """The rows of a cohort in the chosen fold. averaged: whether the model is an average."""
    table = cohort[folds.isin(chosen_folds(settings))]
    if not len(table):
        hint = " (test: none of the averaged models has seen the patient)" * averaged
        if settings.subset == "val":
            hint = ": the model was validated on none of these patients"
        raise UserError(f"no study of {settings.dataset} is in the fold {settings.subset}{hint}")
    return table.loc[sample_ids(table.index, settings.sample_limit)]


def chosen_folds(settings):
    return FOLDS if settings.subset == "all" else [settings.subset]


def answer_fold(job, thresholds):
    """The FoldAnswers of a model for the studies of the fold `settings.subset`."""
    model, settings, store = job.model, job.settings, job.source.store
    task, whole, folds, evidence = labelled_folds(job)
    cohort = match_studies(whole, store, task, first_only=settings.first_study_only)
    of_cohort = folds.reindex(cohort.index)
    table = studies_in_fold(settings, cohort, of_cohort, isinstance(model, LoadedEnsemble))
    warnings = list(warn_of_other_input(model, store, list(table.index)))
    for text in other_times(model, task.survival, task.units):
        RUN.warning(text, "declare the unit in both, or give the column of the same times")
        warnings.append(text)
    if is_at_home(model, whole, settings.dataset) and model.record.biased_if_missing:
        filled = whole[task.task_labels].notna()
        if (filled.any(axis=1) & ~filled.all(axis=1)).any():
            warnings.append(f"The model was {MISSING_LABELS}")
            RUN.warning(f"{model.folder.name}: {MISSING_LABELS}")
    unreadable, eids = {}, list(table.index)
    results = run_studies(model.net, store, eids, settings, unreadable=unreadable, label="evaluate")
    report_unreadable(unreadable)
    if not len(results):
        raise UserError("no study could be read: nothing to evaluate")
    chosen = chosen_folds(settings)
    in_words = {fold: "" if fold in chosen else f"in the {fold} fold" for fold in FOLDS}
    in_words["left out"] = "without a fold in the split column"
    reasons = folds.map(lambda fold: in_words.get(fold, fold))
    for reason, lost in (
        ("no label", whole[task.task_labels].isna().all(axis=1)),
        ("no clip embeddings", ~whole.index.isin(list(store.files))),
        (NOT_ASKED, ~whole.index.isin(table.index)),
        (UNREADABLE_EMBEDDINGS, ~whole.index.isin(results.eids)),
    ):
        reasons = reasons.mask(lost & (reasons == ""), reason)
    flow = study_flow(whole, reasons)
    studies = studies_of_answers(model, table, results, thresholds, settings)
    order = np.argsort(whole.index.get_indexer(studies.eids))  # as in the label table
    return FoldAnswers(studies.take(order), flow, evidence, warnings, task, cohort, of_cohort)


def answer_validation(job, cohort, folds):
    """Studies of the validation fold of a cohort, for a model in the dataset of its training; None
    if there are none."""
    rows = cohort[folds == "val"]
    if not len(rows) or job.settings.dataset != job.model.record.dataset:
        return None
    unreadable = {}
    results = run_studies(
        job.model.net, job.source.store, list(rows.index), job.settings, unreadable=unreadable,
        label="validation fold",
    )  # fmt: skip
    report_unreadable(unreadable)
    return studies_of_answers(job.model, rows, results, {}, job.settings) if len(results) else None


def studies_of_answers(model, table, results, thresholds, settings):
    """The `Studies` of Results with their rows of the label table."""
    table, predicted = table.loc[results.eids], model.readable(results.logits)
    truth = table[model.outputs.columns].to_numpy()
    outcomes = outcomes_of(model.outputs, truth, predicted, model.units, thresholds, settings.years)
    outcomes = with_survival(outcomes, model.survival(results.logits, settings.years))
    studies = Studies(results.eids, table["pid"].to_numpy(), outcomes)
    return studies.at_prevalence(settings.prevalence)


def thresholds_for(job):
    """Label -> threshold: the model's, or those that --target chooses on its validation fold."""
    model, settings = job.model, job.settings
    rule = settings.target or model.target
    if rule != SEVERAL_RULES:
        read_target(rule)
    findings = model.outputs.of_kind("binary")
    if rule == model.target or not findings:
        return model.record.thresholds
    if settings.dataset != model.record.dataset:
        raise UserError(
            f"--target {rule}: thresholds are chosen on the validation fold, but the validation "
            f"fold of {model.folder.name} is in another dataset; train with this --target"
        )
    studies = answer_fold(job.but(subset="val", sample_limit=0), {}).studies
    cuts = {
        o.label: choose_threshold(o.truth, o.predicted, rule)
        for o in studies.outcomes
        if o.label in findings
    }
    return {label: cut for label, cut in cuts.items() if cut is not None}


def compared_studies(job, studies):
    """--compare: name -> (Studies of a model or of a table of predictions, notes).

    Each model answers the studies that are in this fold for it, at thresholds by the same rule.
    """
    others = {}
    for name, other in job.others.items():
        if other is None:
            others[name] = studies_to_compare(Path(name), studies.outcomes, studies), []
            continue
        settings, notes = job.settings.model_copy(update={"task": other.settings.task}), []
        source = Source(settings.dataset, open_embeddings(job.dataset, other.task, settings))
        refuse_other_embeddings(other.model, source)
        other = replace(other, settings=settings, dataset=job.dataset, source=source)
        try:
            thresholds = thresholds_for(other)
        except UserError as error:
            thresholds, notes = {}, [f"not compared at a threshold: {error}"]
        answers = answer_fold(other, thresholds)
        unseen = answers.evidence if settings.subset == "test" else ""
        notes += [*answers.warnings, *unseen_notes(settings.subset, unseen)]
        others[name] = answers.studies, notes
    return others
