"""Who is in a training: labelled studies with embeddings, in folds, and what can be learnt of them.

One reader for a run and for `check`: what it leaves out or cannot use it tells a listener.
"""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from echofocus_core.base.console import RUN, Collected, escaped, printable, some
from echofocus_core.base.options import FOLDS
from echofocus_core.base.tables import as_seen
from echofocus_core.study.config import Task
from echofocus_core.study.labels import scaling_of
from echofocus_core.study.outputs import scale
from echofocus_core.study.splits import (
    STUDY,
    Seen,
    some_of,
    split_patients,
    studies_in,
    without_seen,
)


@dataclass
class Cohort:
    """A labelled dataset in folds, ready to learn from."""

    task: Task  # its type decided
    table: pd.DataFrame  # index study id; pid and the labels, in physical units
    folds: pd.Series  # study id -> train, val, test, or why it is in none
    unlearnt: list[str]  # labels that training cannot learn
    scaling: dict | None  # of measurements: the published input_norm_dict
    targets: dict  # study id -> (C,) what to learn, see `study.outputs`, NaN where missing
    eids: dict[str, list[str]]  # fold -> its studies; those of train and val have a target

    @property
    def labels(self):
        return self.task.task_labels

    @cached_property
    def outputs(self):
        return self.task.outputs

    @cached_property
    def digest(self):
        return labels_digest(self.table)

    @property
    def split(self):
        """pid and fold by study id."""
        ids = ["pid", STUDY] if STUDY in self.table else ["pid"]
        return self.table[ids].assign(fold=self.folds)

    def seen(self):
        """The patients and studies of the training and validation fold, hashed."""
        return Seen.of(self.split, hashlib.sha256(self.digest.encode()).hexdigest()[:32])


def stored_names(ids, store, listener=RUN):
    """Id -> the store's, of ids that look the same as one of its (`as_seen`), or that it escapes.

    File systems and spreadsheets write one word in several forms (e and an accent, or one letter).
    Where a form stands for two ids, of the table or the store, each stays what it is.
    """
    pairs = {}
    for form in (lambda name: as_seen(escaped(name)), as_seen):
        forms = defaultdict(lambda: (set(), set()))
        for place, names in enumerate((ids, store.files)):
            for name in names:
                forms[form(name)][place].add(name)
        found = [(*a, *b) for a, b in forms.values() if len(a) == len(b) == 1 and a != b]
        pairs = dict(found) | pairs
    if pairs:
        listener.note(
            f"{len(pairs)} studies are written in another form of letters, spaces or dashes in the "
            f"label table: {some(map(printable, pairs))}"
        )
    return pairs


def match_studies(table, store, task, limit=0, first_only=False, listener=RUN):
    """The rows of the label table with embeddings and a label, sorted; the rest is told.

    first_only: of each patient the first of these alone, in the table's order. limit: `some_of`.
    """
    labelled = table[task.task_labels].notna().any(axis=1)
    found = table[labelled & table.index.isin(list(store.files))]
    for text, eids, remedy in (
        ("studies of the label table have no embeddings", set(table.index) - set(store.files),
         "extract them"),
        ("embedded studies are not in the label table", set(store.files) - set(table.index),
         "add their rows"),
        ("studies have no label at all", table.index[~labelled], "fill them in"),
    ):  # fmt: skip
        if len(eids):
            examples = some(map(printable, sorted(eids)))
            listener.warning(f"{len(eids)} {text}: {examples}", f"{remedy}; they are left out")
    if first_only:
        studies = pd.Series(studies_in(found), found.index)
        found = found[studies == studies.groupby(found["pid"]).transform("first")]
    if limit:
        found = found.loc[some_of(found.index, limit)]
    tell_copies(found["pid"], store, listener)
    text = f"{len(found)} labelled studies of {found['pid'].nunique()} patients with embeddings"
    if len(found):
        listener.note(text)
    else:
        listener.error(
            f"no study is both labelled and embedded (eid: {some(map(printable, table.index))}; "
            f"files: {some(map(printable, sorted(store.files)))})",
            "make the eid column and the names of the embedding files agree",
        )
    return found.sort_index()


def tell_copies(pids, store, listener):
    """Tell which studies are the same videos: an error where they are of two patients, since one
    may be in training and the other in the test. pids: study id -> patient."""
    copies = store.copies(list(pids.index))
    for tell, same, whose, remedy in (
        (listener.error, [x for x in copies if pids[x].nunique() > 1], "of different patients are",
         "leave all but one out of the label table, or give them one patient if they are"),
        (listener.warning, [x for x in copies if pids[x].nunique() == 1], "of one patient are",
         "leave all but one out of the label table; the videos count twice"),
    ):  # fmt: skip
        if same:
            pairs = some(" and ".join(map(printable, eids[:3])) for eids in same)
            n = sum(map(len, same))
            tell(f"{n} studies {whose} the same videos, with the same embeddings: {pairs}", remedy)


def labels_digest(table):
    """SHA-256 of the studies, patients and labels that a run is given."""
    return hashlib.sha256(table.to_csv().encode(errors="surrogatepass")).hexdigest()


def digest_at_training(model, table, store, task):
    """`labels_digest` of this label table, if a model of an older version was trained with it."""
    made = model.record.settings
    limit, first_only = made.sample_limit, made.first_study_only
    return labels_digest(match_studies(table, store, task, limit, first_only, Collected()))


def training_folds(table, settings, task, known=(), listener=RUN):
    """Study id -> fold for training; else why it is in none: 'left out' by a given split, or known.

    known: to the model to start from and the encoder, see `known_to_others`.
    """
    rule = split_patients(table, vars(settings), task.outputs)
    folds = without_seen(rule, known, listener)
    for fold in ("train", "val"):
        if not (folds == fold).any():
            text, remedy = f"no study falls into the {fold} fold", "change --split, --seed"
            if why := sorted(set(folds[rule == fold])):
                text += f": those that would are {some(why)}"
                remedy = "take a --split_column with the folds of that training, or --split, --seed"
            listener.error(text, remedy)
    listener.note("labels by fold\n" + fold_table(table, folds, task).to_string(max_rows=60))
    warn_of_one_class(table, folds, task, listener)
    return folds


def warn_of_one_class(table, folds, task, listener):
    """Report labels that cannot be evaluated in a fold: all its studies are alike."""
    outputs = task.outputs
    for label in outputs.each:
        y = label.contrast(table)
        if y[folds == "train"].nunique() < 2:
            continue  # it cannot be learned, which is reported
        for fold in ("val", "test"):
            known = y[folds == fold].dropna()
            if len(known) and (lacks := label.why_unjudgeable(known)):
                chooses = label.by_step and len(outputs.labels) == 1 and fold == "val"
                report = listener.error if chooses else listener.warning  # no epoch is the best
                report(
                    f"label {label.name} has {lacks} in the {fold} fold: it cannot be judged there",
                    f"--stratify {label.name}, or fewer folds",
                )


def fold_table(table, folds, task):
    """A row for each label, a column for each fold: see `Label.summary`."""
    columns = {}
    for fold in FOLDS:
        part, word = table[folds == fold], "videos" if STUDY in table else "studies"
        columns[fold] = {word: len(part), "patients": part["pid"].nunique()}
        for label in task.outputs.each:
            columns[fold][label.name] = label.summary(label.contrast(part).dropna())
    return pd.DataFrame(columns)


def cohort_of(task, table, folds, inherited=None, listener=RUN):
    """The Cohort of a table (of `match_studies`) in folds (of `training_folds`).

    inherited: label -> scaling of the model to start from, so that its heads mean what they meant.
    """
    training = table[folds == "train"]
    unlearnt = unlearnable_labels(training, task, listener)
    scaling = scaling_of(training, task, unlearnt, listener)
    if scaling:
        scaling |= inherited or {}
    targets, eids = targets_of(table, folds, task, scaling, unlearnt, listener)
    return Cohort(task, table, folds, unlearnt, scaling, targets, eids)


def unlearnable_labels(table, task, listener=RUN):
    """Labels whose training values do not differ; reports them, and those with few examples."""
    unlearnable = []
    for label in task.outputs.each:
        y = label.contrast(table).dropna()
        counts = label.counts(y)
        if why := label.why_unlearnable(y):
            listener.warning(
                f"label {label.name} cannot be learnt: {why} in the training fold",
                "add such studies, or drop it; it stays blank",
            )
            unlearnable.append(label.name)
        elif counts and min(counts.values()) < 5:
            rarest = min(counts, key=counts.get)
            listener.warning(
                f"label {label.name} is hard to learn: few examples in the training fold, "
                f"{counts[rarest]} of {len(y)} {rarest}",
                "add such studies, or drop it",
            )
    if len(unlearnable) == len(task.task_labels):
        listener.error("no label can be learnt", "labels need two values in the training fold")
    return unlearnable


def targets_of(table, folds, task, scaling, unlearnt, listener=RUN):
    """(study id -> what to learn (C,), NaN where missing; fold -> the studies that have some)."""
    labels, columns = task.task_labels, task.outputs.columns
    values = table[columns].mask(~folds.isin(FOLDS)).to_numpy(copy=True)
    if scaling:
        known = ~np.isnan(values)
        values = scale(values, columns, scaling)
        for label, lost in zip(columns, (known & np.isnan(values)).sum(0), strict=True):
            if lost:
                listener.warning(
                    f"label {label}: {lost} values lie below what its Box-Cox can take",
                    "leave it out of boxcox in the task; they count as missing",
                )
    for label in unlearnt:
        values[:, task.outputs.places[label]] = np.nan
    eids = {fold: list(table.index[folds == fold]) for fold in FOLDS}
    usable = set(table.index[~np.isnan(values).all(axis=1)])
    for fold in ("train", "val"):  # a study of unlearnable labels alone would count as loss 0
        had, eids[fold] = eids[fold], [eid for eid in eids[fold] if eid in usable]
        if had and not eids[fold] and len(unlearnt) < len(labels):
            listener.error(
                f"no study of the {fold} fold has a label that can be learnt", "change --split"
            )
    return dict(zip(table.index, values, strict=True)), eids
