"""Which study is in which fold, which were seen elsewhere, and what a training learns from them.

No patient may be in two folds. The folds are a seeded hash of the patient, or given by a column of
the label table. Patients that a model, its ancestors or the encoder were trained on are not tested.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from echofocus_core.base.console import RUN, UserError, count_of, printable, some
from echofocus_core.base.files import derive_seed, sha256_of
from echofocus_core.base.options import FOLDS, parse_split
from echofocus_core.base.seen import STUDY, Seen, normal_form, seen_levels, studies_in
from echofocus_core.base.tables import read_table
from echofocus_core.study.config import Task
from echofocus_core.study.labels import GIVEN_FOLD, scaling_of
from echofocus_core.study.scaling import scale

# The evidence that a test study is unseen; several are joined by '; '.
BY_ID, ELSEWHERE = "by patient and study id", "trained elsewhere, not compared"
ASSUMED, ENCODER_UNKNOWN = "assumed", "the encoder's patients are not known"

# ----------------------------------------------------------------------------------- rules of folds


def sample_ids(ids, limit):
    """As many ids as --sample_limit allows, chosen by a hash, in the order given; 0 is all."""
    ids = list(ids)
    chosen = set(sorted(ids, key=lambda x: derive_seed("limit", x))[: limit or None])
    return [x for x in ids if x in chosen]


def fold_at(share, percent, n_folds=0, test_fold=0):
    """The fold at a place from 0 to 1 among the patients.

    With n_folds the patients are divided into equal parts: part `test_fold` is the test fold,
    the next one validates, the others train.
    """
    if n_folds:
        part = (int(share * n_folds) - test_fold) % n_folds
        return {0: "test", 1: "val"}.get(part, "train")
    position = share * sum(percent)
    for fold, edge in zip(FOLDS, np.cumsum(percent), strict=True):
        if position < edge:
            return fold
    return FOLDS[-1]


def split_patients(table, settings, outputs=None):
    """Label table -> Series of study id to fold, by patient, as the settings of a training say.

    outputs: of the labels, for `stratify`. A column GIVEN_FOLD decides instead; where it is blank
    the study is 'left out'. Otherwise a seeded hash of the patient's id decides, independent of the
    other patients.
    """
    if GIVEN_FOLD in table:
        return table[GIVEN_FOLD].fillna("left out").rename("fold")
    rule, patients = (parse_split(settings.split), settings.n_folds, settings.fold), table["pid"]
    hashes = {pid: derive_seed("split", settings.seed, pid) for pid in patients.unique()}
    if settings.stratify:
        label = outputs.each[outputs.labels.index(settings.stratify)]
        folds = stratified_folds(label, table, hashes, rule)
    else:
        folds = {pid: fold_at(x / 2**63, *rule) for pid, x in hashes.items()}
    return patients.map(folds).rename("fold")


def stratified_folds(label, table, hashes, rule):
    """Patient -> fold: each stratum is divided by the split, in order of the hash.

    Strata: patients with a positive study (or the event), with none, or without the label; of
    classes, the patient's highest; of a measurement, the thirds of the patients' means. Later
    patients would change the folds of others, unlike with the hash alone: the folds of a training
    are recorded, and later patients are in the test fold.
    """
    y = label.contrast(table).groupby(table["pid"]).agg("max" if label.has_groups else "mean")
    stratum = y
    if not label.has_groups:
        stratum = y.where(y.isna(), np.searchsorted(y.quantile([1 / 3, 2 / 3]), y))
    folds = {}
    for _, patients in y.groupby(stratum.fillna(-1)):
        order = sorted(patients.index, key=hashes.get)
        places = (np.arange(len(order)) + 0.5) / len(order)
        folds |= {pid: fold_at(x, *rule) for pid, x in zip(order, places, strict=True)}
    return folds


def refuse_other_folds(folder, folds):
    """UserError where a resumed run has other studies in its folds than its split.csv."""
    path = folder / "split.csv"
    written = read_table(path, RUN) if path.is_file() else pd.DataFrame()
    if not {"eid", "fold"} <= set(written):
        raise UserError(f"{path} is missing or damaged; use another --model_name or --run_id")
    before, now = written.set_index("eid")["fold"], folds.astype(str)
    moved = sorted({eid for eid, _ in set(before.items()) ^ set(now.items())})
    if moved:
        raise UserError(
            f"{count_of(len(moved), 'studies are')} in other folds than when {folder} was started "
            f"({some(map(printable, moved))}): restore the label table, encoder_seen.pt, "
            "--init_from and --assume_unseen, or use another --model_name or --run_id"
        )


# ----------------------------------------------------------------------------------- seen elsewhere


def seen_by_model(model, dataset, assume_unseen):
    """(list of Seen to leave out of a test, evidence). Raises UserError if there is no evidence.

    A published model was trained elsewhere, and nothing can be compared. A model of this program
    lists its patients; without that list the user must give `--assume_unseen`.
    """
    name = model.folder.name
    if model.seen is not None:
        return model.seen, BY_ID
    if not model.record.labels:
        print(f"{name} was trained elsewhere, on patients it does not list: all count as unseen")
        return [], ELSEWHERE
    if assume_unseen:
        RUN.warning(f"{dataset} counts as unseen by {name} (--assume_unseen)")
        return [], ASSUMED
    raise UserError(
        f"{name} does not list the patients it was trained on: studies of {dataset} may be among "
        "them; use --assume_unseen if you know that none is"
    )


def levels_by(name, seen, table, listener):
    """`seen_levels`, with a note where no id matches, which may mean that ids have another form."""
    levels = seen_levels(seen, table)
    if seen and not levels.any():
        listener.note(
            f"no id in this table occurs in the training data of {name}: check that the ids have "
            "the same format"
        )
    return levels


def is_at_home(model, table, dataset):
    """Whether a label table is of the dataset of a model's training: by its name, and by a patient
    or study that the model has seen. The dataset of averaged models is elsewhere."""
    same_name = dataset == model.record.dataset and not getattr(model, "members", ())
    return same_name and (not model.seen or bool(seen_levels(model.seen[:1], table).any()))


def folds_for(model, table, dataset, listener=RUN, assume_unseen=False):
    """(study id -> fold of a labelled dataset, evidence that its test studies are unseen).

        seen by the model    in the dataset of its training    elsewhere
        in its training      its fold                          its fold *
        by an ancestor       no fold *                         no fold *
        not at all           by the rule of its training       test

    * with `assume_unseen` as not seen at all. See `is_at_home`; each of averaged models counts: a
    study is test where none has seen its patient, and val where none trained on it. Where the
    training was stratified, new patients are in the test fold.
    """
    name, members = model.folder.name, len(getattr(model, "members", ()))
    seen, evidence = seen_by_model(model, dataset, assume_unseen)
    levels_by(name, seen, table, listener)
    at_home = is_at_home(model, table, dataset)
    if dataset == model.record.dataset and not at_home and not members:
        listener.warning(
            f"{dataset} has the name of the training dataset of {name}, but no patient or study "
            "that the model has seen: all its studies are test data",
            "if it is the same dataset, check that its ids have not changed",
        )
    if at_home and seen:
        refuse_moved(seen[0], table, listener)
    n_lists = len(seen) if members else 1
    by_training, by_ancestors = (seen_levels(x, table) for x in (seen[:n_lists], seen[n_lists:]))
    rule = pd.Series("test", table.index, name="fold")
    if at_home and not model.record.settings.stratify:
        rule = split_patients(table, model.record.settings)
    folds = rule.mask(by_ancestors > 0, "seen by an ancestor")
    folds = folds.mask(by_training == 1, "val").mask(by_training == 2, "train")
    keep_fold = (by_training > 0) & at_home
    avoidable = ((by_training > 0) | (by_ancestors > 0)) & ~keep_fold
    if assume_unseen and avoidable.any():
        return folds.mask(avoidable, rule), count_as_unseen(avoidable, name, listener)
    if avoidable.any() and not at_home:
        listener.note(
            f"not test studies: {count_of(avoidable.sum(), 'labelled studies')}, whose patients "
            f"{name} was trained on, by the ids"
        )
    return folds, evidence


def count_as_unseen(seen, name, listener):
    """Warn of studies that `name` has seen but --assume_unseen includes; returns the evidence."""
    text = f"{count_of(seen.sum(), 'studies are')} known to {name}"
    listener.warning(f"{text}, by the ids, but counted as unseen (--assume_unseen)")
    return f"{ASSUMED}: {text}"


def refuse_moved(seen, table, listener):
    """An error when the table gives a study of the training to a patient who was not in it."""
    by_patient, by_study = seen.levels(table)
    moved = table.index[(by_study > 0) & (by_patient == 0)]
    if len(moved):
        listener.error(
            f"the label table gives {count_of(len(moved), 'studies')} to other patients "
            f"than when the model was trained ({some(moved)}): a training patient could turn up "
            "in the test fold",
            "restore the pids, or train under a new name",
        )


def seen_elsewhere(whole, settings, encoder, begun_from=None, listener=RUN):
    """([(name, `seen_levels`)] of the model to start from and of the encoder, caveats as text).

    whole: the label table before any study is left out, since each study may identify a patient;
    encoder: see `Store.encoder_seen`. What only --assume_unseen includes is a caveat.
    """
    (by_encoder, is_complete), assumed, caveats = encoder, settings.assume_unseen, []
    sources = [("the encoder", by_encoder, assumed)]
    if begun_from:
        seen, evidence = seen_by_model(begun_from, settings.dataset, assumed)
        caveats += [evidence] if evidence == ASSUMED else []
        elsewhere = settings.dataset != begun_from.record.dataset
        sources.insert(0, (begun_from.folder.name, seen, assumed and elsewhere))
    kept = []
    for name, seen, counts_as_unseen in sources:
        levels = levels_by(name, seen, whole, listener)
        if not counts_as_unseen:
            kept.append((name, levels))
        elif levels.any():
            caveats.append(count_as_unseen(levels > 0, name, listener))
    return kept, caveats + ([] if is_complete else [ENCODER_UNKNOWN])


def without_seen(folds, seen, listener=RUN, what="studies"):
    """Folds without the val and test patients that were seen, see `seen_elsewhere`.

    what: the rows of the folds: studies or videos.
    """
    for name, levels in seen:
        levels = levels.loc[folds.index]
        used = (levels == 2) & folds.isin(["val", "test"]) | (levels == 1) & (folds == "test")
        if used.any():
            listener.note(
                f"left out {count_of(used.sum(), what)} of val and test: {name} has seen the "
                f"patients ({some(map(printable, used.index[used]))})"
            )
        folds = folds.mask(used, f"known to {name}")
    return folds


# ------------------------------------------------------------------------------ a training's cohort


@dataclass
class Cohort:
    """A labelled dataset in folds, ready to learn from."""

    task: Task  # its kinds decided
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
        """SHA-256 of the studies, patients and labels."""
        return sha256_of(self.table.to_csv())

    @property
    def split(self):
        """pid and fold by study id."""
        ids = ["pid", STUDY] if STUDY in self.table else ["pid"]
        return self.table[ids].assign(fold=self.folds)

    def seen(self):
        """The patients and studies of the training and validation fold, hashed."""
        return Seen.of(self.split, sha256_of(self.digest)[:32])


def stored_names(ids, store, listener=RUN):
    """Id -> the store's, of ids written in another form (see `normal_form`) than the store's.

    A form that two ids have, of the table or the store, matches nothing.
    """
    forms = defaultdict(lambda: ([], []))
    for place, names in enumerate((dict.fromkeys(ids), store.files)):
        for name in names:
            forms[normal_form(name)][place].append(name)
    pairs = {a[0]: b[0] for a, b in forms.values() if len(a) == len(b) == 1 and a != b}
    if pairs:
        listener.note(
            f"{count_of(len(pairs), 'studies are')} matched although the label table writes "
            f"the ids in another form: {some(map(printable, pairs))}"
        )
    return pairs


def match_studies(table, store, task, limit=0, first_only=False, listener=RUN):
    """The rows of the label table with embeddings and a label, sorted; the rest is reported.

    first_only: of each patient only the first of these, in the table's order. limit: `sample_ids`.
    """
    labelled = table[task.task_labels].notna().any(axis=1)
    rows = table[labelled & table.index.isin(list(store.files))]
    stored, named = set(store.files), set(table.index)
    for text, eids, remedy in (
        ("studies have no embeddings", named - stored, "extract the videos"),
        ("embedded studies are not in the label table", stored - named, "add rows"),
        ("studies have no label at all", set(table.index[~labelled]), "fill in labels"),
    ):
        if eids:
            examples = some(map(printable, sorted(eids)))
            listener.warning(f"{count_of(len(eids), text)}: {examples}", f"left out; {remedy}")
    if first_only:
        studies = pd.Series(studies_in(rows), rows.index)
        rows = rows[studies == studies.groupby(rows["pid"]).transform("first")]
    if limit:
        rows = rows.loc[sample_ids(rows.index, limit)]
    report_copies(rows["pid"], store, listener)
    if len(rows):
        patients = count_of(rows["pid"].nunique(), "patients")
        studies = count_of(len(rows), "labelled studies")
        listener.note(f"{studies} of {patients} with embeddings")
    elif not labelled.any():
        listener.error(
            f"{some(task.task_labels)}: the label table has no usable value", "fill in the labels"
        )
    else:
        listener.error(
            f"no study is both labelled and embedded (eid: {some(map(printable, table.index))}; "
            f"files: {some(map(printable, sorted(store.files)))})",
            "make the eid column and the names of the embedding files agree",
        )
    return rows.sort_index()


def report_copies(pids, store, listener):
    """Report studies that are the same videos: an error where they are of two patients, since one
    may be in training and the other in the test. pids: study id -> patient."""
    copies = store.copies(list(pids.index))
    same = "are the same videos, with the same embeddings"
    report_copies_in(
        copies, [pids[eids].nunique() > 1 for eids in copies],
        (listener.error, f"studies of different patients {same}",
         "leave all but one out of the label table, or give them one patient if they are"),
        (listener.warning, f"studies of one patient {same}",
         "leave all but one out of the label table, since the videos count twice"),
    )  # fmt: skip


def report_copies_in(copies, apart, if_apart, if_not):
    """Report lists of ids with the same content, in two groups.

    apart: for each list, whether it is of several patients or folds. if_apart, if_not: (function of
    a listener, text, remedy).
    """
    for group, (report, text, remedy) in ((True, if_apart), (False, if_not)):
        if same := [ids for ids, x in zip(copies, apart, strict=True) if x == group]:
            pairs = some(" and ".join(map(printable, ids[:3])) for ids in same)
            report(f"{sum(map(len, same))} {text}: {pairs}", remedy)


def training_folds(table, settings, task, seen=(), listener=RUN):
    """Study id -> fold of a training, or why it is in none.

    seen: by the model to start from and the encoder, see `seen_elsewhere`.
    """
    rule = split_patients(table, settings, task.outputs)
    folds = without_seen(rule, seen, listener)
    if settings.train_fraction < 1:  # the patients of a share are also in every larger one
        draws = table["pid"].map(lambda pid: derive_seed("fraction", settings.seed, pid) / 2**63)
        folds[(folds == "train") & (draws >= settings.train_fraction)] = "left out"
    for fold in ("train", "val"):
        if not (folds == fold).any():
            text, remedy = f"no study falls into the {fold} fold", "change --split, --seed"
            if fold == "train" and settings.train_fraction < 1:
                remedy = f"use a fraction of the patients above {settings.train_fraction:g}"
            elif why := sorted(set(folds[rule == fold])):
                text += f": those of the split are {some(why)}"
                remedy = "use a --split_column with the folds of that training, or --split, --seed"
            listener.error(text, remedy)
    listener.note("labels by fold\n" + fold_table(table, folds, task).to_string(max_rows=60))
    warn_of_one_class(table, folds, task, listener)
    return folds


def warn_of_one_class(table, folds, task, listener):
    """Report labels that cannot be evaluated in a fold, since all its studies have one value."""
    outputs = task.outputs
    for label in outputs.each:
        y = label.contrast(table)
        if y[folds == "train"].nunique() < 2:
            continue  # it cannot be learned, which is reported
        for fold in ("val", "test"):
            values = y[folds == fold].dropna()
            if len(values) and label.has_groups and (why := label.why_constant(values)):
                chooses = label.by_step and len(outputs.labels) == 1 and fold == "val"
                report = listener.error if chooses else listener.warning  # no epoch is the best
                report(
                    f"label {label.name} cannot be evaluated in the {fold} fold: {why}",
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

    inherited: label -> scaling of the model to start from, which keeps the meaning of its heads.
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
        if why := label.why_constant(y):
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
    columns, places = task.outputs.columns, task.outputs.places
    values = table[columns].mask(~folds.isin(FOLDS)).to_numpy(copy=True)
    had_value = ~np.isnan(values)
    values = scale(values, columns, scaling or {})
    for label, n in zip(columns, (had_value & np.isnan(values)).sum(0), strict=True):
        if n:
            listener.warning(
                f"label {label}: {count_of(n, 'values are')} below the range of its Box-Cox "
                "transform",
                "leave it out of boxcox in the task; they count as missing",
            )
    for label in unlearnt:
        values[:, places[label]] = np.nan
    eids = {fold: list(table.index[folds == fold]) for fold in FOLDS}
    usable = set(table.index[~np.isnan(values).all(axis=1)])
    for fold in ("train", "val"):  # a study with none of the learned labels would have loss 0
        had, eids[fold] = eids[fold], [eid for eid in eids[fold] if eid in usable]
        if had and not eids[fold] and len(unlearnt) < len(places):
            listener.error(
                f"no study of the {fold} fold has a label that can be learnt", "change --split"
            )
    return dict(zip(table.index, values, strict=True)), eids
