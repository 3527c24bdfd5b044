"""The numbers of an evaluation: truths and predictions of studies, their tables, groups and flow.

    studies = Studies(eids, patients, [Binary("VSD", truth, probability, 0.31)])

Nothing here knows models or embedding files: a table with the predictions of any model will do.
The pages are written by report/evaluation.py.
"""

from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from echofocus_core.base.console import RUN, UserError, printable, some
from echofocus_core.base.options import FOLDS
from echofocus_core.base.tables import clean_ids, read_table, to_numbers
from echofocus_core.study import statistics as st
from echofocus_core.study.labels import read_rows
from echofocus_core.study.outputs import Outputs, examples_of
from echofocus_core.study.splits import ALIKE, ASSUMED, ELSEWHERE, ENCODER_UNKNOWN, some_of

COLUMNS = ("label", "metric", "value", "ci_low", "ci_high", "n", "n_positive", "unit", "note")
PUBLISHED = {"auroc": "roc_auc_score", "r2": "r2_score"}  # names in the JSON of the later branch
GROUPS = 12  # of a column, at most
UNREADABLE_EMBEDDINGS = "clip embeddings that cannot be read"
NOT_ASKED = "not asked for (first study only, or sample limit)"
HEADLINE = {
    st.Binary: "auroc",
    st.Regression: "median_absolute_error",
    st.MultiClass: "auroc",
    st.Survival: "c_index",
}
PREDICTED = {
    st.Binary: ("probability",),
    st.Regression: ("values",),
    st.MultiClass: ("probabilities",),
    st.Survival: ("event", "risk"),
}


@dataclass(frozen=True)
class Studies:
    """What is evaluated: outcomes (one a label) of the same S studies, and whose they are."""

    eids: list[str]
    patients: np.ndarray
    outcomes: list

    def __len__(self):
        return len(self.eids)

    def take(self, rows):
        """Those of an index or a mask."""
        rows = np.arange(len(self))[rows]
        outcomes = [select_rows(o, rows) for o in self.outcomes]
        return Studies([self.eids[i] for i in rows], self.patients[rows], outcomes)

    def saveout(self):
        """The published table: PID, Echo_ID, truth and prediction of every label."""
        columns = {"PID": self.patients, "Echo_ID": self.eids}
        for o in self.outcomes:
            columns |= {f"{name}_Correct": column for name, column in true_columns(o).items()}
            columns |= predicted_columns(o)
        return pd.DataFrame(columns)

    def chosen(self, first_only, limit):
        """Those of --first_study_only and --sample_limit, of studies with truth and prediction."""
        if not first_only and not limit:
            return self
        rows = np.flatnonzero(self.known)
        if first_only:
            rows = np.sort(st.first_or_last(self.patients, self.known, "first")[1])
        wanted = set(some_of([self.eids[i] for i in rows], limit))
        return self.take([i for i in rows if self.eids[i] in wanted])

    @property
    def known(self):
        """(S,) bool: studies with truth and prediction of some label."""
        return np.any([o.known for o in self.outcomes], axis=0)

    def at_prevalence(self, prevalence):
        """The same with PPV and NPV of findings at this prevalence too."""
        outcomes = [
            replace(o, prevalence=prevalence) if isinstance(o, st.Binary) else o
            for o in self.outcomes
        ]
        return replace(self, outcomes=outcomes)

    def per_patient(self, how="mean"):
        """(Studies of one row a patient, {label: patients left out}).

        Of each label's studies with a truth and a prediction: see `pool_by_patient`. A row is named
        by the first of a patient's that has some, or by the last where that is taken.
        """
        names, named = np.unique(self.patients, return_index=True)
        end = "last" if how == "last" else "first"
        who, rows = st.first_or_last(self.patients, self.known, end)
        named[np.searchsorted(names, who)] = rows
        pooled, lost = [], {}
        for o in self.outcomes:
            if isinstance(o, st.Survival) and how == "mean":
                raise UserError(f"{o.label}: times are not pooled: --pool first or last")
            sort = not isinstance(o, st.Regression)
            columns, values = PREDICTED[type(o)], o.predicted
            if isinstance(getattr(o, "threshold", None), np.ndarray):  # one a study
                columns, values = (*columns, "threshold"), np.stack([values, o.threshold], axis=1)
            who, truth, values, n = st.pool_by_patient(
                self.patients, o.truth, values, how, classes=sort
            )
            at, lost[o.label] = np.searchsorted(names, who), n
            new = {"truth": spread(truth, at, len(names))}
            each = values.T if len(columns) > 1 else [values]
            for name, column in zip(columns, each, strict=True):
                new[name] = spread(column, at, len(names))
            pooled.append(replace(o, **new))
        eids = [self.eids[i] for i in named]
        return Studies(eids, names, pooled), {k: n for k, n in lost.items() if n}


def join_folds(parts):
    """Studies of several, one after the other, as of the test folds of a cross-validation.

    A finding's threshold becomes one a study, that of its fold; none where a fold has none.
    """
    outcomes = []
    for same in zip(*(part.outcomes for part in parts), strict=True):
        new = {}
        for f in fields(same[0]):
            values = [getattr(o, f.name) for o in same]
            if isinstance(values[0], np.ndarray):
                new[f.name] = np.concatenate(values)
            elif f.name == "threshold" and len(set(values)) > 1:
                each = None if None in values else zip(values, same, strict=True)
                new[f.name] = each and np.concatenate([np.full(len(o.truth), x) for x, o in each])
        outcomes.append(replace(same[0], **new))
    eids = [eid for part in parts for eid in part.eids]
    return Studies(eids, np.concatenate([part.patients for part in parts]), outcomes)


def pair_studies(studies, other, name):
    """(Studies of this model, of the other, notes): what both predict, label by label."""
    place = {eid: i for i, eid in enumerate(other.eids)}
    both = [i for i, eid in enumerate(studies.eids) if eid in place]
    if not both:
        raise UserError(f"--compare {name}: it has no study in common with this evaluation")
    one = studies.take(both)
    other = other.take([place[eid] for eid in one.eids])
    labels = {o.label for o in one.outcomes} & {o.label for o in other.outcomes}
    if not labels:
        raise UserError(f"--compare {name}: it has no label in common with this model")
    each = (
        sorted((o for o in x.outcomes if o.label in labels), key=lambda o: o.label)
        for x in (one, other)
    )
    each = st.on_both(*each)
    notes = []
    for who, outcomes in zip(("this model", name), each, strict=True):
        lack = [o.label for o in outcomes if isinstance(o, st.Binary) and o.threshold is None]
        if lack:
            notes.append(f"{name}: not compared at a threshold, {who} has none of {some(lack)}")
    first, second = (Studies(one.eids, one.patients, outcomes) for outcomes in each)
    return first, second, notes


def true_columns(o):
    """Name -> (S,): an outcome's truths, the name of the class, of survival time and event."""
    if isinstance(o, st.MultiClass):
        known = np.isfinite(o.truth)
        names = np.array(o.classes, object)[np.where(known, o.truth, 0).astype(int)]
        return {o.label: np.where(known, names, None)}
    event = {f"{o.label}_event": o.event} if isinstance(o, st.Survival) else {}
    return {o.label: o.truth} | event


def predicted_columns(o):
    """Column -> (S,) or one number: an outcome's predictions, named as a model's outputs are, and
    its threshold."""
    columns = {o.label: o.predicted}
    if isinstance(o, st.MultiClass):
        names = [f"{o.label}_{x}" for x in o.classes]
        columns = dict(zip(names, o.probabilities.T, strict=True))
    elif isinstance(o, st.Survival):
        columns = {f"{o.label}_risk": o.risk}
    columns = {f"{name}_Predict": column for name, column in columns.items()}
    if getattr(o, "threshold", None) is not None:
        columns[f"{o.label}_threshold"] = o.threshold
    return columns


def select_rows(outcome, rows):
    """An outcome of some of its studies."""
    arrays = {f.name: getattr(outcome, f.name) for f in fields(outcome)}
    return replace(outcome, **{k: v[rows] for k, v in arrays.items() if isinstance(v, np.ndarray)})


def spread(values, at, n):
    """(n, ...) with values at `at` and NaN elsewhere."""
    out = np.full((n, *np.shape(values)[1:]), np.nan)
    out[at] = values
    return out


def outcomes_of(outputs, truth, predicted, units, thresholds, prevalence=None, years=()):
    """One outcome for each label. truth (S, C) and predicted (S, O), of `study.outputs`, in
    physical units, probabilities and log hazards; years: when the AUROC of survival is given."""
    return [
        label.outcome(
            truth[:, outputs.places[label.name]],
            predicted[:, outputs.slices[label.name]],
            units.get(label.name, ""),
            thresholds.get(label.name),
            prevalence,
            years,
        )
        for label in outputs.each
    ]


def read_predictions(raw, path, labels, units=(), listener=RUN):
    """(predictions, thresholds) of `read_prediction_rows`: DataFrames, a float64 column a label.

    Predictions are `<label>_Predict`, `<label> [unit]` or `<label>`, as `evaluate` and `predict`
    write them: beside one of the former `<label>` is something else, such as the truth. Thresholds
    are `<label>_threshold`. Raises UserError.
    """
    columns = {}
    for label in labels:
        names = (f"{label}_Predict", f"{label} [{dict(units).get(label)}]", label)
        there = [name for name in names if name in raw]
        columns[label] = there[0] if there else None
        if there[1:]:
            listener.note(f"{path}: predictions of {label} are {there[0]}, not {some(there[1:])}")
    if missing := [label for label, column in columns.items() if column is None]:
        raise UserError(
            f"{path} has no predictions of {some(missing)}; a column is called like the label, or "
            f"<label>_Predict (it has: {some(map(printable, raw.columns))})"
        )
    values = numeric_columns(raw, columns.values(), path, listener).set_axis(list(columns), axis=1)
    given = [label for label in labels if f"{label}_threshold" in raw]
    thresholds = numeric_columns(raw, [f"{label}_threshold" for label in given], path, listener)
    return values, thresholds.set_axis(given, axis=1)


def numeric_columns(raw, columns, path, listener):
    """Columns as float64. UserError for a cell that is no number: nobody would miss it."""
    text = raw[list(columns)]
    values = to_numbers(text, path, listener)
    for name in text:
        odd = text[name][values[name].isna() & text[name].notna()]
        if len(odd):
            raise UserError(
                f"{path}, {name}: {len(odd)} cells are no numbers: {examples_of(odd, odd.index)}; "
                "write numbers, or leave these cells empty"
            )
    return values


def read_prediction_rows(path, listener=RUN):
    """The rows of a table of predictions as text, indexed by study id. Raises UserError."""
    raw = read_table(path, listener, "table of predictions")
    eid = next((c for c in ("eid", "Echo_ID") if c in raw), None)
    if eid is None:
        raise UserError(f"{path} has no column of study ids; call it eid")
    raw = rows_with_id(raw, eid, path, listener)
    ids = clean_ids(raw[eid], path, listener)
    if ids.duplicated().any():
        twice = some(map(printable, ids[ids.duplicated()].unique()))
        raise UserError(f"{path} has studies more than once: {twice}; keep one row each")
    return raw.set_axis(pd.Index(ids, name="eid"), axis=0)


def rows_with_id(raw, column, path, listener):
    """The rows that have an id."""
    rows = raw.dropna(subset=[column])
    if lost := len(raw) - len(rows):
        listener.warning(f"{path}: {lost} rows have no {column}", "fill in; they are left out")
    return rows


def thresholds_of(table, predicted, path, listener=RUN):
    """label -> its threshold in a table: a number, or one a study (S,) where they differ.

    Blank cells of studies with a prediction are told: one number holds for these too, different
    ones are not used.
    """
    found = {}
    for label, values in table.loc[predicted.index].items():
        asked = predicted[label].notna()
        known, blank = values.dropna().unique(), int(values[asked].isna().sum())
        if len(known) == 1:
            found[label] = float(known[0])
        elif len(known) and not blank:
            found[label] = values.to_numpy()
        if len(known) and blank:
            used = f"{found[label]:g} is used for all" if label in found else "not used"
            text = f"{path}, {label}_threshold: {blank} of {asked.sum()} blank, {used}"
            listener.warning(text, "fill them in")
    return found


def studies_of_labels(path, task, table):
    """Studies of a table of predictions and a label table (see `read_labels`), in its order."""
    outputs = task.outputs
    predicted, thresholds = read_predictions(
        read_prediction_rows(path), path, outputs.names, task.units
    )
    there = table.index.intersection(predicted.index)
    if not len(there):
        raise UserError(
            f"{path} has no study of the label table (its ids: "
            f"{some(map(printable, predicted.index))}; there: {some(map(printable, table.index))})"
        )
    if others := len(predicted) - len(there):
        RUN.warning(f"{others} studies of {path} are not in the label table", "they are left out")
    kept, predicted = table.loc[there], predicted.loc[there]
    own, truth = thresholds_of(thresholds, predicted, path), kept[outputs.columns].to_numpy()
    outcomes = outcomes_of(outputs, truth, predicted.to_numpy(), task.units, own)
    return Studies(list(there), kept["pid"].to_numpy(), outcomes)


def warn_of_truths(path, outcomes):
    """Tell of labels whose predictions are the truths: another column may have been meant."""
    plain = [o for o in outcomes if isinstance(o, st.Binary | st.Regression) and o.n]
    same = [o for o in plain if np.array_equal(o.truth[o.known], o.predicted[o.known])]
    if same:
        names = some(o.label for o in same)
        RUN.warning(f"{path}: every prediction of {names} is the truth", "are these predictions?")


def studies_with_truths(path):
    """Studies of a table that holds its truths (`saveout_*`), or None: it does not."""
    raw = read_prediction_rows(path)
    pid = next((c for c in ("PID", "pid") if c in raw), None)
    labels = [c.removesuffix("_Correct") for c in raw if c.endswith("_Correct")]
    if pid is None or not labels:
        return None
    other = [x for x in labels if f"{x}_Predict" not in raw and x not in raw]
    if other:
        raise UserError(
            f"{path} has truths of {some(map(printable, other))} and no prediction called so: "
            "classes and times are evaluated by a label table, which --task names"
        )
    raw = rows_with_id(raw, pid, path, RUN)
    truth = numeric_columns(raw, [f"{x}_Correct" for x in labels], path, RUN).to_numpy()
    predicted, thresholds = read_predictions(raw, path, labels)
    outcomes, own = [], thresholds_of(thresholds, predicted, path)
    for i, label in enumerate(labels):
        y = truth[:, i]
        kind = "binary" if np.isin(y[np.isfinite(y)], (0, 1)).all() else "regression"
        values = predicted[[label]].to_numpy()
        outputs = Outputs.of([label], kind)
        outcomes += outcomes_of(outputs, truth[:, [i]], values, {}, own)
    pids = clean_ids(raw[pid], path, RUN).to_numpy()
    return Studies(list(raw.index), pids, outcomes)


def studies_to_compare(path, outcomes, studies):
    """Studies of another table of predictions and its thresholds, with the truths of these."""
    units = {o.label: o.unit("bias") for o in outcomes}
    predicted, thresholds = read_predictions(read_prediction_rows(path), path, list(units), units)
    rows = [i for i, eid in enumerate(studies.eids) if eid in predicted.index]
    part = studies.take(rows)
    values = predicted.loc[part.eids]
    thresholds = thresholds_of(thresholds, values, path)
    made = []
    for o in part.outcomes:
        if not isinstance(o, st.Binary | st.Regression):
            raise UserError(f"{path}: a table is compared for findings and measurements alone")
        new = {PREDICTED[type(o)][0]: values[o.label].to_numpy()}
        if isinstance(o, st.Binary):
            new["threshold"] = thresholds.get(o.label)
        made.append(replace(o, **new))
    return replace(part, outcomes=made)


def read_by(text):
    """'age:40,65' -> ('age', [40.0, 65.0]); 'sex' -> ('sex', [])."""
    column, _, edges = text.partition(":")
    try:
        found = [float(x) for x in edges.split(",")] if edges else []
    except ValueError:
        found = None
    rising = found is not None and sorted(set(found)) == found and np.isfinite(found).all()
    if not column or not rising:
        raise UserError(f"--by {text}: a column, or a column and rising edges as in age:40,65")
    return column, found


def group_names(cells, edges):
    """(names in order, (S,) place of each study or -1) of a column's text, cut at `edges`.

    Raises UserError where there are more than GROUPS of them, or numbers are none.
    """
    name, known = cells.name, cells.notna().to_numpy()
    if edges:
        numbers = pd.to_numeric(cells, errors="coerce").to_numpy(float)
        if odd := int((np.isnan(numbers) & known).sum()):
            examples = some(map(printable, cells[np.isnan(numbers) & known].unique()))
            raise UserError(f"--by {name}: {odd} cells are no numbers: {examples}")
        place = np.where(known, np.searchsorted(edges, numbers, side="right"), -1)
        ends = [f"{x:g}" for x in edges]
        middle = [f"{a} to < {b}" for a, b in pairwise(ends)]
        return [f"< {ends[0]}", *middle, f">= {ends[-1]}"], place
    names = sorted(cells[known].unique())
    if len(names) > GROUPS:
        raise UserError(
            f"--by {name}: {len(names)} different values; numbers are cut at edges, as in "
            f"--by {name}:40,65"
        )
    place = {name: k for k, name in enumerate(names)}  # a blank cell has none
    return [printable(x)[:40] for x in names], np.array([place.get(x, -1) for x in cells])


def subgroups(studies, cells, edges, n_boot, seed):
    """[(group, Estimate)] of every group of a column and label; 'missing' is a group too."""
    names, place = group_names(cells, edges)
    found = []
    for k, name in [*enumerate(names), (-1, "missing")]:
        part = studies.take(place == k)
        if len(part) or k >= 0:
            each = st.estimates(part.outcomes, part.patients, n_boot, seed)
            found += [(name, x) for x in each if "_q" not in x.metric and x.label != "mean"]
    return found


def study_flow(table, reasons):
    """[{"text", "studies", "patients", "left_out"}]: the label table, who was left out and why in
    the order of `reasons`, and who was evaluated.

    table: pid, indexed by study id; reasons: study id -> text, '' where it was evaluated. A patient
    counts as left out where none of his studies is left.
    """
    reasons = pd.Series(reasons).reindex(table.index).fillna("")
    there = table["pid"]
    rows = [box("in the label table", there, False)]
    for reason in dict.fromkeys(x for x in reasons if x):
        lost = there[reasons.loc[there.index] == reason]
        kept = there.drop(lost.index)
        rows.append(box(reason, lost[~lost.isin(kept)], True) | {"studies": len(lost)})
        there = kept
    return [*rows, box("evaluated", there, False)]


def fold_flow(table, folds, tested):
    """The same of a cross-validation; folds: a Series of study -> fold a part."""
    reasons = dict.fromkeys(table.index, UNREADABLE_EMBEDDINGS)
    for part in folds:
        reasons |= dict(part[~part.isin(FOLDS)])
    return study_flow(table, reasons | dict.fromkeys(tested, ""))


def box(text, pids, left_out):
    return {
        "text": text,
        "studies": len(pids),
        "patients": int(pids.nunique()),
        "left_out": left_out,
    }


def metrics_table(estimates):
    """DataFrame: a row a label and metric."""
    return pd.DataFrame([x.row() for x in estimates], columns=list(COLUMNS))


def metrics_json(estimates, about):
    """The same as nested dicts, with the keys of the published later branch."""
    labels = {}
    for x in estimates:
        row, label = x.row(), labels.setdefault(x.label, {"n_samples": x.n})
        if x.n_positive >= 0:
            label["n_positive"] = x.n_positive
        label[PUBLISHED.get(x.metric, x.metric)] = {
            "value": row["value"], "ci_lower": row["ci_low"], "ci_upper": row["ci_high"],
            "n_bootstrap_effective": x.n_boot, "unit": x.unit, "note": x.note,
        }  # fmt: skip
    return about | {"metrics": labels}


def headlines_of(studies, estimates):
    """label -> the Estimate of the metric that speaks for its kind."""
    wanted = {o.label: HEADLINE[type(o)] for o in studies.outcomes}
    return {x.label: x for x in estimates if wanted.get(x.label) == x.metric}


def unseen_notes(fold, unseen):
    """Sentences about whether the model knew these studies. unseen: of `study.splits`, or None."""
    if fold != "test" and unseen is not None:
        return [f"Studies of the {fold} fold: the model was trained on them or chosen by them."]
    notes = []
    for how in (unseen or "").split("; "):
        how, _, but = how.partition(": ")
        if how == ELSEWHERE:
            notes.append(
                "The model was trained elsewhere; that it has not seen these patients is assumed."
            )
        elif how == ASSUMED:
            why = f" ({but} by the ids)" * bool(but)
            notes.append(
                "That the model has not seen these patients was said by the user, not "
                f"compared{why}."
            )
        elif how == ALIKE:
            notes.append(f"{but[0].upper()}{but[1:]}; they count as unseen here.")
        elif how == ENCODER_UNKNOWN:
            notes.append(
                "Nothing says whom the encoder of the embeddings was trained on; that it has not "
                "seen these patients is assumed."
            )
    return notes


def fold_notes(parts):
    """Sentences about labels that some fold of a cross-validation could not learn or call."""
    for same in zip(*(part.outcomes for part in parts), strict=True):
        blank = [k for k, o in enumerate(same) if not st.finite_rows(o.predicted).any()]
        if blank:
            lost = sum(int(np.isfinite(same[k].truth).sum()) for k in blank)
            yield (
                f"{same[0].label}: not learnt in fold {some(blank)}, whose {lost} test studies "
                "count nowhere"
            )
        cuts = [getattr(o, "threshold", 0) is None for o in same]
        if any(cuts) and not all(cuts):
            missing = some(k for k, none in enumerate(cuts) if none)
            yield f"{same[0].label}: no threshold in fold {missing}, so none is applied"


def group_columns(texts, config, settings):
    """Column -> (its cells as text by study id, edges) of `--by`. Raises UserError."""
    wanted = {}
    for column, edges in map(read_by, texts):
        if column == "eid":
            raise UserError("--by eid: each study would be a group; name a column that groups them")
        if column in wanted:
            raise UserError(f"--by {column} is said twice")
        wanted[column] = edges
    if not wanted:
        return {}
    dataset, task = config.datasets[settings.dataset], config.tasks[settings.task]
    path = dataset.label_path or task.label_path
    rows = read_rows(path, list(wanted), level=task.level)
    return {column: (rows[column], edges) for column, edges in wanted.items()}


def is_table(name):
    """Whether an entry of --compare is a table of predictions."""
    return Path(name).suffix.lower() in (".csv", ".tsv", ".txt", ".xlsx")
