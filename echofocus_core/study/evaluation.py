"""The numbers of an evaluation: truths and predictions of studies, their tables, groups and flow.

    studies = Studies(eids, patients, [BinaryOutcome("VSD", truth, probability, 0.31)])

The predictions may come from any model: no function here needs a network or clip embeddings.
report/evaluation.py writes the pages.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pandas as pd

from echofocus_core.base.console import RUN, UserError, count_of, printable, some
from echofocus_core.base.options import FOLDS
from echofocus_core.base.tables import ages_to_years, clean_ids, read_dates, read_table, to_numbers
from echofocus_core.study import statistics as st
from echofocus_core.study.folds import ASSUMED, ELSEWHERE, ENCODER_UNKNOWN, sample_ids
from echofocus_core.study.kinds.base import examples_of, finite_rows
from echofocus_core.study.kinds.binary import BinaryOutcome
from echofocus_core.study.kinds.regression import RegressionOutcome
from echofocus_core.study.kinds.survival import SurvivalOutcome
from echofocus_core.study.labels import label_file, read_rows

COLUMNS = ("label", "metric", "value", "ci_low", "ci_high", "n", "n_positive", "unit", "note")
PUBLISHED = {"auroc": "roc_auc_score", "r2": "r2_score"}  # names in the JSON of the later branch
MAX_GROUPS = 12  # of a column
UNREADABLE_EMBEDDINGS = "clip embeddings that cannot be read"
NOT_ASKED = "not asked for (first study only, or sample limit)"


@dataclass(frozen=True)
class Studies:
    """S studies to evaluate: their ids, their patients (S,) and an Outcome for each label."""

    eids: list[str]
    patients: np.ndarray
    outcomes: list

    def __len__(self):
        return len(self.eids)

    @property
    def usable(self):
        """(S,) bool: studies with a truth and a prediction for at least one label."""
        return np.any([o.usable for o in self.outcomes], axis=0)

    def take(self, rows):
        """The studies of an index or a mask."""
        rows = np.arange(len(self))[rows]
        outcomes = [o.take(rows) for o in self.outcomes]
        return Studies([self.eids[i] for i in rows], self.patients[rows], outcomes)

    def saveout(self):
        """The published table: PID, Echo_ID, truth and prediction of every label."""
        columns = {"PID": self.patients, "Echo_ID": self.eids}
        for o in self.outcomes:
            columns |= {f"{name}_Correct": values for name, values in o.truth_columns.items()}
            columns |= {f"{name}_Predict": values for name, values in o.predicted_columns.items()}
            if o.threshold is not None:
                columns[f"{o.label}_threshold"] = o.threshold
        return pd.DataFrame(columns)

    def subset(self, first_only, limit):
        """The usable studies that the options select; all studies without these options."""
        if not first_only and not limit:
            return self
        rows = np.flatnonzero(self.usable)
        if first_only:
            rows = rows[~pd.Series(self.patients[rows]).duplicated()]
        eids = set(sample_ids([self.eids[i] for i in rows], limit))
        return self.take([i for i in rows if self.eids[i] in eids])

    def at_prevalence(self, prevalence):
        """These Studies with a prevalence, for PPV and NPV of findings."""
        outcomes = [
            replace(o, prevalence=prevalence) if isinstance(o, BinaryOutcome) else o
            for o in self.outcomes
        ]
        return replace(self, outcomes=outcomes)

    def per_patient(self, rule="mean"):
        """(Studies with a row for each patient, {label: patients left out}); `Outcome.by_patient`.

        A row has the id of the patient's first usable study (rule last: the last one), or of the
        first study if none is usable.
        """
        rows, usable = pd.Series(range(len(self))), self.usable
        row = rows.groupby(self.patients).first()
        of_usable = rows[usable].groupby(self.patients[usable])
        row.update(of_usable.agg("last" if rule == "last" else "first"))
        pooled = [o.by_patient(self.patients, rule) for o in self.outcomes]
        eids, outcomes = [self.eids[int(i)] for i in row], [o for o, _ in pooled]
        return Studies(eids, row.index.to_numpy(), outcomes), {o.label: n for o, n in pooled if n}


def join_folds(parts):
    """Join the Studies of the test folds of a cross-validation.

    The threshold of a finding becomes an array with that of each study's fold, or None if a fold
    has no threshold.
    """
    outcomes = []
    for folds in zip(*(part.outcomes for part in parts), strict=True):
        names = folds[0].arrays()
        joined = {name: np.concatenate([o.arrays()[name] for o in folds]) for name in names}
        thresholds = [o.threshold for o in folds]
        if len(set(thresholds)) > 1:
            each = np.repeat(thresholds, [len(o.truth) for o in folds])
            joined["threshold"] = None if None in thresholds else each
        outcomes.append(replace(folds[0], **joined))
    eids = [eid for part in parts for eid in part.eids]
    return Studies(eids, np.concatenate([part.patients for part in parts]), outcomes)


def pair_studies(studies, other, name):
    """(Studies of this model, of the other model, notes), with the studies and labels of both."""
    place = {eid: i for i, eid in enumerate(other.eids)}
    first = studies.take([i for i, eid in enumerate(studies.eids) if eid in place])
    if not len(first):
        raise UserError(f"--compare {name}: has no study in common with this evaluation")
    second = other.take([place[eid] for eid in first.eids])
    labels = {o.label for o in first.outcomes} & {o.label for o in second.outcomes}
    if not labels:
        raise UserError(f"--compare {name}: it has no label in common with this model")
    pair = st.on_both(*(
        sorted((o for o in x.outcomes if o.label in labels), key=lambda o: o.label)
        for x in (first, second)
    ))  # fmt: skip
    notes = []
    for model, outcomes in zip(("this model", name), pair, strict=True):
        missing = [
            o.label for o in outcomes if isinstance(o, BinaryOutcome) and o.threshold is None
        ]
        if missing:
            notes.append(
                f"{name}: not compared at a threshold; {model} has none of {some(missing)}"
            )
    return *(Studies(first.eids, first.patients, outcomes) for outcomes in pair), notes


def outcomes_of(outputs, truth, predicted, units, thresholds, years=()):
    """One Outcome for each label. truth (S, C); predicted (S, O): readable answers; see
    `study.outputs`; years: times of the AUROC of survival."""
    return [
        label.outcome(y, p, units.get(label.name, ""), thresholds.get(label.name), years)
        for label, y, p in outputs.parts(truth, predicted)
    ]


def with_survival(outcomes, columns):
    """The outcomes with the predicted probability of survival to their `years`, where a column
    `<label>_survival_<year>` (S,) of `predict` has it."""
    outcomes = list(outcomes)
    for i, o in enumerate(outcomes):
        if isinstance(o, SurvivalOutcome):
            blank = np.full(len(o.truth), np.nan)
            each = [columns.get(f"{o.label}_survival_{year:g}", blank) for year in o.years]
            outcomes[i] = replace(o, survival=np.stack(each, axis=1))
    return outcomes


# -------------------------------------------------------------------------- predictions of a table


def read_prediction_rows(path):
    """The rows of a table of predictions as text, indexed by study id. Raises UserError."""
    rows = read_table(path, RUN, "table of predictions")
    column = next((c for c in ("eid", "Echo_ID") if c in rows), None)
    if column is None:
        raise UserError(f"{path} has no column of study ids; name it eid")
    rows = rows_with_id(rows, column, path)
    ids = clean_ids(rows[column], path, RUN)
    if ids.duplicated().any():
        repeated = some(map(printable, ids[ids.duplicated()].unique()))
        raise UserError(f"{path} has studies more than once: {repeated}; keep one row each")
    return rows.set_axis(pd.Index(ids, name="eid"), axis=0)


def rows_with_id(rows, column, path):
    if blank := int(rows[column].isna().sum()):
        RUN.warning(
            f"{path}: {count_of(blank, 'rows have')} no {column}",
            "fill them in; the rows are ignored",
        )
    return rows.dropna(subset=[column])


def read_predictions(rows, path, labels, units=()):
    """(predictions, thresholds) of `read_prediction_rows`: DataFrames, a float64 column a label.

    The column of a label is `<label>_Predict`, `<label> [unit]` or `<label>`, the names that
    `evaluate` and `predict` write; if there are several, the first, because `<label>` may be the
    truth. Thresholds are `<label>_threshold`. Raises UserError.
    """
    columns = {}
    for label in labels:
        names = (f"{label}_Predict", f"{label} [{dict(units).get(label)}]", label)
        columns[label], *others = [name for name in names if name in rows] or [None]
        if others:
            RUN.note(f"{path}: predictions of {label} are {columns[label]}, not {some(others)}")
    if missing := [label for label, column in columns.items() if column is None]:
        raise UserError(
            f"{path} has no predictions of {some(missing)}; name the column after the label, or "
            f"<label>_Predict (it has: {some(map(printable, rows.columns))})"
        )
    values = numeric_columns(rows, columns.values(), path).set_axis(list(columns), axis=1)
    decided = [label for label in labels if f"{label}_threshold" in rows]
    thresholds = numeric_columns(rows, [f"{label}_threshold" for label in decided], path)
    return values, thresholds.set_axis(decided, axis=1)


def numeric_columns(rows, columns, path):
    """Columns as float64. Raises UserError for a cell that is not a number."""
    text = rows[list(columns)]
    values = to_numbers(text, path, RUN)
    for name in text:
        invalid = text[name][values[name].isna() & text[name].notna()]
        if len(invalid):
            raise UserError(
                f"{path}, {name}: {count_of(len(invalid), 'cells are not numbers')}: "
                f"{examples_of(invalid, invalid.index)}; write numbers, or leave these cells empty"
            )
    return values


def numeric_survival(rows, outcomes, path):
    """{<label>_survival_<year>: (S,)} of the columns that a table of predictions has."""
    names = [
        f"{o.label}_survival_{year:g}"
        for o in outcomes
        if isinstance(o, SurvivalOutcome)
        for year in o.years
    ]
    values = numeric_columns(rows, [name for name in names if name in rows], path)
    return {name: values[name].to_numpy() for name in values}


def thresholds_of(table, predicted, path):
    """label -> its threshold in a table: a number, or (S,) if studies have different ones.

    Raises UserError if some studies with a prediction have no threshold.
    """
    thresholds = {}
    for label, values in table.loc[predicted.index].dropna(axis=1, how="all").items():
        needed, numbers = predicted[label].notna(), values.dropna().unique()
        if blank := int(values[needed].isna().sum()):
            raise UserError(
                f"{path}, {label}_threshold: {blank} of {needed.sum()} are blank; fill them in"
            )
        thresholds[label] = float(numbers[0]) if len(numbers) == 1 else values.to_numpy()
    return thresholds


def studies_of_labels(path, task, table, years=()):
    """Studies of a table of predictions and a label table (see `read_labels`), in its order.

    years: times of the AUROC of survival.
    """
    outputs = task.outputs
    rows = read_prediction_rows(path)
    predicted, thresholds = read_predictions(rows, path, outputs.names, task.units)
    eids = table.index.intersection(predicted.index)
    if not len(eids):
        ids, expected = (some(map(printable, x.index)) for x in (predicted, table))
        raise UserError(
            f"{path} has no study of the label table (its ids: {ids}; the label table: {expected})"
        )
    if others := len(predicted) - len(eids):
        RUN.warning(
            f"{count_of(others, 'studies are')} in {path} and not in the label table", "ignored"
        )
    predicted, truth = predicted.loc[eids], table.loc[eids, outputs.columns].to_numpy()
    thresholds = thresholds_of(thresholds, predicted, path)
    outcomes = outcomes_of(outputs, truth, predicted.to_numpy(), task.units, thresholds, years)
    outcomes = with_survival(outcomes, numeric_survival(rows.loc[eids], outcomes, path))
    return Studies(list(eids), table.loc[eids, "pid"].to_numpy(), outcomes)


def warn_of_truths(path, outcomes):
    """Report labels whose predictions equal the truths: the column may be the wrong one."""
    equal = [o for o in outcomes if o.n and np.array_equal(*o.pairs())]
    if equal:
        names = some(o.label for o in equal)
        RUN.warning(f"{path}: all predictions of {names} equal the truth", "are these predictions?")


def studies_with_truths(path):
    """Studies of a table that contains its truths (`saveout_*`), or None if it does not."""
    rows = read_prediction_rows(path)
    pid = next((c for c in ("PID", "pid") if c in rows), None)
    labels = [c.removesuffix("_Correct") for c in rows if c.endswith("_Correct")]
    if pid is None or not labels:
        return None
    other = [x for x in labels if f"{x}_Predict" not in rows and x not in rows]
    if other:
        raise UserError(
            f"{path} has truths of {some(map(printable, other))} and no prediction of that name: "
            "classes and times need a label table; name its --task"
        )
    rows = rows_with_id(rows, pid, path)
    truth = numeric_columns(rows, [f"{x}_Correct" for x in labels], path)
    predicted, thresholds = read_predictions(rows, path, labels)
    outcomes, thresholds = [], thresholds_of(thresholds, predicted, path)
    for label in labels:
        y, p = truth[f"{label}_Correct"].to_numpy(), predicted[label].to_numpy()
        if np.isin(y[np.isfinite(y)], (0, 1)).all():
            outcomes.append(BinaryOutcome(label, y, p, thresholds.get(label)))
        else:
            outcomes.append(RegressionOutcome(label, y, p))
    return Studies(list(rows.index), clean_ids(rows[pid], path, RUN).to_numpy(), outcomes)


def studies_to_compare(path, outcomes, studies):
    """Studies of another table of predictions and its thresholds, with the truths of `studies`."""
    if not all(isinstance(o, BinaryOutcome | RegressionOutcome) for o in outcomes):
        raise UserError(f"{path}: only findings and measurements can be compared with a table")
    units = {o.label: o.units for o in outcomes}
    predicted, thresholds = read_predictions(read_prediction_rows(path), path, list(units), units)
    part = studies.take([i for i, eid in enumerate(studies.eids) if eid in predicted.index])
    predicted = predicted.loc[part.eids]
    thresholds = thresholds_of(thresholds, predicted, path)
    others = []
    for o in part.outcomes:
        changes = {"predicted": predicted[o.label].to_numpy()}
        if isinstance(o, BinaryOutcome):
            changes["threshold"] = thresholds.get(o.label)
        others.append(replace(o, **changes))
    return replace(part, outcomes=others)


# ---------------------------------------------------------------------------------------- subgroups


def read_by(text):
    """'age:40,65' -> ('age', [40.0, 65.0]); 'sex' -> ('sex', [])."""
    column, _, numbers = text.partition(":")
    try:
        edges = [float(x) for x in numbers.split(",")] if numbers else []
    except ValueError:
        edges = [np.nan]
    if column in ("", "eid") or sorted(set(edges)) != edges or not np.isfinite(edges).all():
        raise UserError(
            f"--by {text}: give a column, or a column and increasing edges as in age:40,65"
        )
    return column, edges


def group_columns(job):
    """Column -> (its cells as text by study id, edges) of `--by`. Raises UserError."""
    edges = dict(map(read_by, job.settings.by))
    if not edges:
        return {}
    if not job.task:
        raise UserError("--by reads the label table: name a --task of the config")
    file = label_file(job.task, job.dataset)
    rows = read_rows(file, list(edges))
    if dates := [column for column in edges if read_dates(rows[column])[1]]:
        raise UserError(
            f"--by: {some(dates)} holds dates; add a column with numbers, such as the year, or "
            "with groups, such as before and after"
        )
    return {
        column: ((numeric_groups if numbers else merge_words)(rows[column], file.path), numbers)
        for column, numbers in edges.items()
    }


SEX = {"m": "m", "male": "m", "männlich": "m", "maennlich": "m", "man": "m", "homme": "m"}
SEX |= {"masculin": "m", "masculino": "m", "f": "f", "female": "f", "w": "f", "weiblich": "f"}
SEX |= {"woman": "f", "femme": "f", "féminin": "f", "femenino": "f"}
SEX |= {x: x for x in ("o", "other", "u", "unknown", "d", "divers")}


def numeric_groups(cells, path):
    """A column of text as numbers; ages as in DICOM, such as 011M, in years. Raises UserError."""
    years = ages_to_years(cells)
    if n := years.notna().sum():
        RUN.note(f"{path}, {cells.name}: {n} ages such as 018Y and 011M are read as years")
    rest = cells.mask(years.notna()).to_frame()
    return numeric_columns(rest, rest.columns, path)[cells.name].fillna(years)


def merge_words(cells, path):
    """A column of text in which words with one meaning (the case differs, or both are words for a
    sex) are replaced by the most frequent of them."""
    keys = cells.str.strip().str.casefold()
    if keys.dropna().isin(list(SEX)).all():
        keys = keys.map(SEX)
    names = cells.groupby(keys).agg(lambda words: words.value_counts().index[0])
    merged = keys.map(names)
    for name, others in cells[cells.notna() & (cells != merged)].groupby(merged):
        words = some(map(printable, sorted(others.unique())))
        RUN.note(f"{path}, {cells.name}: {words} count as {printable(name)}")
    return merged


def groups_of(cells, edges):
    """(names in order, (S,) the group of each study or -1) of a column of text, or of numbers that
    are cut at `edges`. Raises UserError for more than MAX_GROUPS groups."""
    column, filled = cells.name, cells.notna().to_numpy()
    if edges:
        place = np.where(filled, np.searchsorted(edges, cells, side="right"), -1)
        ends = [f"{x:g}" for x in edges]
        middle = [f"{a} to < {b}" for a, b in pairwise(ends)]
        return [f"< {ends[0]}", *middle, f">= {ends[-1]}"], place
    names = sorted(cells[filled].unique())
    if len(names) > MAX_GROUPS:
        raise UserError(
            f"--by {column}: {len(names)} different values; group numbers by edges, as in "
            f"--by {column}:40,65"
        )
    return [printable(x)[:40] for x in names], pd.Categorical(cells, names).codes


def subgroups(studies, cells, edges, n_boot, seed):
    """[(group, Estimate)] for each group of a column, and for studies where it is missing."""
    names, place = groups_of(cells, edges)
    rows = []
    for k, name in [*enumerate(names), (-1, "missing")]:
        part = studies.take(place == k)
        if len(part) or k >= 0:
            estimates = st.estimates(part.outcomes, part.patients, n_boot, seed)
            rows += [(name, x) for x in estimates if "_q" not in x.metric and x.label != "mean"]
    return rows


# --------------------------------------------------------------------------------- flow of studies


def study_flow(table, reasons):
    """[{"text", "studies", "patients", "left_out"}]: the label table, the studies left out for each
    reason in the order of `reasons`, and the studies evaluated.

    table: pid, indexed by study id; reasons: study id -> text, '' for evaluated studies. A patient
    counts as left out if none of their studies remains.
    """
    reasons = pd.Series(reasons).reindex(table.index).fillna("")
    pids = table["pid"]
    rows = [flow_box("in the label table", pids, False)]
    for reason in dict.fromkeys(x for x in reasons if x):
        lost = pids[reasons.loc[pids.index] == reason]
        pids = pids.drop(lost.index)
        box = flow_box(reason, lost[~lost.isin(pids)], True)
        rows.append(box | {"studies": len(lost)})
    return [*rows, flow_box("evaluated", pids, False)]


def fold_flow(table, folds, tested):
    """`study_flow` of a cross-validation; folds: for each part a Series of study -> fold."""
    reasons = dict.fromkeys(table.index, UNREADABLE_EMBEDDINGS)
    for part in folds:
        reasons |= dict(part[~part.isin(FOLDS)])
    return study_flow(table, reasons | dict.fromkeys(tested, ""))


def flow_box(text, pids, left_out):
    counts = {"studies": len(pids), "patients": int(pids.nunique())}
    return {"text": text} | counts | {"left_out": left_out}


# -------------------------------------------------------------------------------- tables and notes


def metrics_json(estimates, facts):
    """The table of metrics as nested dicts, with the keys of the published later branch."""
    labels = {}
    for x in estimates:
        row, label = x.row(), labels.setdefault(x.label, {"n_samples": x.n})
        if x.n_positive >= 0:
            label["n_positive"] = x.n_positive
        label[PUBLISHED.get(x.metric, x.metric)] = {
            "value": row["value"], "ci_lower": row["ci_low"], "ci_upper": row["ci_high"],
            "n_bootstrap_effective": x.n_boot, "unit": x.unit, "note": x.note,
        }  # fmt: skip
    return facts | {"metrics": labels}


def headlines_of(studies, estimates):
    """label -> the Estimate of the metric that represents its kind."""
    metrics = {o.label: o.headline for o in studies.outcomes}
    return {x.label: x for x in estimates if metrics.get(x.label) == x.metric}


UNSEEN_NOTES = {
    ELSEWHERE: "The model was trained elsewhere; it is assumed not to have seen these patients",
    ASSUMED: "The user states that the model has not seen these patients; not compared",
    ENCODER_UNKNOWN: "It is not recorded which patients the encoder of the embeddings was trained "
    "on; it is assumed not to have seen these patients",
}


def unseen_notes(fold, unseen):
    """Sentences on whether the model has seen these studies. unseen: of `study.folds`, or None."""
    if fold != "test" and unseen is not None:
        return [f"Studies of the {fold} fold: the model was trained on them or chosen by them."]
    parts = [text.partition(": ") for text in (unseen or "").split("; ")]
    return [
        UNSEEN_NOTES[evidence] + (f" ({detail} by the ids)." if detail else ".")
        for evidence, _, detail in parts
        if evidence in UNSEEN_NOTES
    ]


def fold_notes(parts):
    """Sentences on labels that a fold of a cross-validation could not learn, or that have no
    threshold in it."""
    for folds in zip(*(part.outcomes for part in parts), strict=True):
        label = folds[0].label
        blank = [k for k, o in enumerate(folds) if not finite_rows(o.predicted).any()]
        if blank:
            n = sum(int(np.isfinite(folds[k].truth).sum()) for k in blank)
            yield f"{label}: not learnt in fold {some(blank)}, whose {n} test studies are ignored"
        missing = [k for k, o in enumerate(folds) if o.threshold is None]
        if 0 < len(missing) < len(folds):
            yield f"{label}: no threshold in fold {some(missing)}, so none is applied"
