"""From predictions of labelled studies to what is read: tables, figures and one page.

    studies = Studies(eids, patients, [Binary("VSD", truth, probability, 0.31)])
    Report(folder, "test_site", studies, about={"model_name": "chd"}).write()

Nothing here knows of models or files of embeddings: predictions of anyone's model will do.
"""

import base64
import json
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from echofocus_core import __version__
from echofocus_core.base.console import RUN, UserError, printable, some
from echofocus_core.base.files import atomic_path, in_file_name, write_table
from echofocus_core.base.options import FOLDS
from echofocus_core.base.tables import clean_ids, read_table, to_numbers
from echofocus_core.report import curves
from echofocus_core.report.curves import HEADLINE, NAMES, number, title_of, with_interval
from echofocus_core.study import statistics as st
from echofocus_core.study.labels import cells_of
from echofocus_core.study.outputs import USUAL_YEARS, Outputs
from echofocus_core.study.splits import ALIKE, ASSUMED, ELSEWHERE, ENCODER_UNKNOWN, some_of

COLUMNS = ("label", "metric", "value", "ci_low", "ci_high", "n", "n_positive", "unit", "note")
PUBLISHED = {"auroc": "roc_auc_score", "r2": "r2_score"}  # names in the JSON of the later branch
FEW = 100  # positives below which an interval is said to be wide (Collins, Stat Med 2016;35:214)
GROUPS = 12  # of a column, at most
SHOWN = 25  # labels on screen
UNREADABLE = "clip embeddings that cannot be read"
NOT_ASKED = "not asked for (first study only, or sample limit)"
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
        outcomes = [rows_of(o, rows) for o in self.outcomes]
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


def joined(parts):
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


def paired(studies, other, name):
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


def rows_of(outcome, rows):
    """An outcome of some of its studies."""
    arrays = {f.name: getattr(outcome, f.name) for f in fields(outcome)}
    return replace(outcome, **{k: v[rows] for k, v in arrays.items() if isinstance(v, np.ndarray)})


def spread(values, at, n):
    """(n, ...) with values at `at` and NaN elsewhere."""
    out = np.full((n, *np.shape(values)[1:]), np.nan)
    out[at] = values
    return out


def outcomes_of(outputs, truth, predicted, units, thresholds, prevalence=None, years=()):
    """One outcome a label. truth (S, C) and predicted (S, O), of `study.outputs`, in physical
    units, probabilities and log hazards; years: when the AUROC of survival is given."""
    found = []
    for label, kind in outputs.kinds.items():
        y, p = truth[:, outputs.places[label]], predicted[:, outputs.slices[label]]
        if kind == "binary":
            cut = thresholds.get(label)
            found.append(st.Binary(label, y[:, 0], p[:, 0], threshold=cut, prevalence=prevalence))
        elif kind == "multiclass":
            found.append(st.MultiClass(label, y[:, 0], p, outputs.classes[label]))
        elif kind == "survival":
            when = tuple(years or USUAL_YEARS)
            found.append(st.Survival(label, *y.T, p[:, 0], when, units.get(label, "")))
        else:
            found.append(st.Regression(label, y[:, 0], p[:, 0], units.get(label, "")))
    return found


# --------------------------------------------------------------------------- anyone's predictions


def predictions_in(raw, path, labels, units=(), listener=RUN):
    """Rows of `named_rows` -> (predictions, thresholds): DataFrames, a column a label (float64).

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
    values = numbers_in(raw, columns.values(), path, listener).set_axis(list(columns), axis=1)
    given = [label for label in labels if f"{label}_threshold" in raw]
    thresholds = numbers_in(raw, [f"{label}_threshold" for label in given], path, listener)
    return values, thresholds.set_axis(given, axis=1)


def numbers_in(raw, columns, path, listener):
    """Columns as float64. UserError for a cell that is no number: nobody would miss it."""
    text = raw[list(columns)]
    values = to_numbers(text, path, listener)
    for name in text:
        odd = text[name][values[name].isna() & text[name].notna()]
        if len(odd):
            raise UserError(
                f"{path}, {name}: {len(odd)} cells are no numbers: {cells_of(odd, odd.index)}; "
                "write numbers, or leave these cells empty"
            )
    return values


def named_rows(path, listener=RUN):
    """The rows of a table of predictions as text, indexed by study id. Raises UserError."""
    raw = read_table(path, listener, "table of predictions")
    eid = next((c for c in ("eid", "Echo_ID") if c in raw), None)
    if eid is None:
        raise UserError(f"{path} has no column of study ids; call it eid")
    raw = with_ids(raw, eid, path, listener)
    ids = clean_ids(raw[eid], path, listener)
    if ids.duplicated().any():
        twice = some(map(printable, ids[ids.duplicated()].unique()))
        raise UserError(f"{path} has studies more than once: {twice}; keep one row each")
    return raw.set_axis(pd.Index(ids, name="eid"), axis=0)


def with_ids(raw, column, path, listener):
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


def studies_of_table(path, task, table):
    """Studies of a table of predictions and a label table (see `read_labels`), in its order."""
    outputs = task.outputs
    predicted, thresholds = predictions_in(named_rows(path), path, outputs.names, task.units)
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


def studies_with_truth(path):
    """Studies of a table that holds its truths (`saveout_*`), or None: it does not."""
    raw = named_rows(path)
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
    raw = with_ids(raw, pid, path, RUN)
    truth = numbers_in(raw, [f"{x}_Correct" for x in labels], path, RUN).to_numpy()
    predicted, thresholds = predictions_in(raw, path, labels)
    outcomes, own = [], thresholds_of(thresholds, predicted, path)
    for i, label in enumerate(labels):
        y = truth[:, i]
        kind = "binary" if np.isin(y[np.isfinite(y)], (0, 1)).all() else "regression"
        values = predicted[[label]].to_numpy()
        outputs = Outputs.of([label], kind)
        outcomes += outcomes_of(outputs, truth[:, [i]], values, {}, own)
    pids = clean_ids(raw[pid], path, RUN).to_numpy()
    return Studies(list(raw.index), pids, outcomes)


def studies_from_table(path, outcomes, studies):
    """Studies of another table of predictions and its thresholds, with the truths of these."""
    units = {o.label: o.unit("bias") for o in outcomes}
    predicted, thresholds = predictions_in(named_rows(path), path, list(units), units)
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


# ---------------------------------------------------------------------------------------- subgroups


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


def groups_of(cells, edges):
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
    names, place = groups_of(cells, edges)
    found = []
    for k, name in [*enumerate(names), (-1, "missing")]:
        part = studies.take(place == k)
        if len(part) or k >= 0:
            each = st.estimates(part.outcomes, part.patients, n_boot, seed)
            found += [(name, x) for x in each if "_q" not in x.metric and x.label != "mean"]
    return found


# --------------------------------------------------------------------------------- flow of studies


def flow_of(table, reasons):
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


def flow_of_folds(table, folds, tested):
    """The same of a cross-validation; folds: a Series of study -> fold a part."""
    reasons = dict.fromkeys(table.index, UNREADABLE)
    for part in folds:
        reasons |= dict(part[~part.isin(FOLDS)])
    return flow_of(table, reasons | dict.fromkeys(tested, ""))


def box(text, pids, left_out):
    return {
        "text": text,
        "studies": len(pids),
        "patients": int(pids.nunique()),
        "left_out": left_out,
    }


# ------------------------------------------------------------------------------------------- tables


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


def on_screen(headlines, means=()):
    """Lines: a label with its headline metric, SHOWN at most."""
    lines = [title_of(x).replace("\n", ": ") for x in list(headlines.values())[:SHOWN]]
    if len(headlines) > SHOWN:
        lines.append(f"... and {len(headlines) - SHOWN} more labels")
    wanted = {x.metric for x in headlines.values()}
    for x in means:
        if x.metric in wanted:
            name = NAMES.get(x.metric, x.metric)
            lines.append(f"{x.note}: {name} {with_interval(x)}{x.unit and ' ' + x.unit}")
    return lines


# ----------------------------------------------------------------------------------------- a report

FIGURES = (  # file, title, kind of outcome, how a panel is drawn, the metric of its title
    ("roc_curves", "ROC curves", st.Binary, curves.draw_roc, "auroc"),
    ("pr_curves", "Precision and recall", st.Binary, curves.draw_precision, "average_precision"),
    ("reliability", "Calibration", st.Binary, curves.draw_reliability, "calibration_slope"),
    ("decision_curves", "Decision curves", st.Binary, curves.draw_decision, "auroc"),
    ("scatter_plots", "Predicted against measured", st.Regression, curves.draw_scatter,
     "median_absolute_error"),
    ("bland_altman", "Agreement (Bland and Altman)", st.Regression, curves.draw_bland_altman,
     "bias"),
    ("roc_classes", "ROC curves, each class against the rest", st.MultiClass,
     curves.draw_classes, "auroc"),
    ("kaplan_meier", "Survival by thirds of risk", st.Survival, curves.draw_kaplan_meier,
     "c_index"),
    ("confusion", "Truth and call", st.Binary, curves.draw_confusion, "f1"),
    ("confusion_classes", "Truth and call of grades", st.MultiClass, curves.draw_confusion,
     "balanced_accuracy"),
)  # fmt: skip
LEGENDS = {
    "roc_curves": "Shaded: pointwise 95 % band over patients. Dot: at the threshold.",
    "pr_curves": "Shaded: pointwise 95 % band over patients. Grey line: the prevalence.",
    "reliability": "Ten parts of equal size with 95 % bars; on the diagonal a predicted risk is "
    "the observed one. Grey: how many studies have each probability.",
    "decision_curves": "Net benefit (Vickers and Elkin 2006) of calling by the model, of calling "
    "all and of calling nobody.",
    "confusion_classes": "Rows: truth. Columns: the most probable class.",
    "confusion": "Rows: truth. Columns: called at the threshold.",
    "scatter_plots": "Equal axes; the line is equality.",
    "bland_altman": "Solid: mean difference; broken: limits of agreement (1.96 SD).",
    "roc_classes": "With the area and the number of studies of each class.",
    "kaplan_meier": "With Greenwood's 95 % intervals, and events of studies.",
    "forest": "Squares: the value; lines: 95 % intervals over patients.",
}


@dataclass
class Report:
    """An evaluation that is written into a folder under `name`, such as test_site.

    about: facts for the JSON and the table of settings: name -> text or number. by: column ->
    (cells as text in the studies' order, edges). others: name -> what `paired` gave of Studies of
    another model. notes: what a reader must know. folds: Studies of each part of a
    cross-validation, of which mean and SD are given beside.
    """

    folder: Path
    name: str
    studies: Studies
    about: dict = field(default_factory=dict)
    flow: list = field(default_factory=list)
    by: dict = field(default_factory=dict)
    others: dict = field(default_factory=dict)
    n_boot: int = 1000
    seed: int = 0
    notes: list = field(default_factory=list)
    folds: list = field(default_factory=list)

    def write(self):
        """Tables, figures and the page; returns the lines for the screen."""
        studies = self.studies
        self.figures, self.files = [], []
        self.estimates = st.estimates(studies.outcomes, studies.patients, self.n_boot, self.seed)
        self.headlines = headlines_of(studies, self.estimates)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.table("metrics", metrics_table(self.estimates).assign(**self.doubts, **self.by_fold))
        with atomic_path(self.folder / f"metrics_{self.name}.json") as temporary:
            facts = self.about | {"n_bootstrap": self.n_boot, "seed": self.seed, "flow": self.flow}
            whole = metrics_json(self.estimates, facts)
            temporary.write_text(json.dumps(whole, indent=1, allow_nan=False))
        self.draw()
        self.groups = {column: self.subgroup(column) for column in self.by}
        self.comparison = [row for name in self.others for row in self.compared(name)]
        if self.comparison:
            self.table("comparison", pd.DataFrame(self.comparison))
        self.write_page()
        means = [x for x in self.estimates if x.label == "mean"]
        lines = on_screen(self.headlines, means)
        for row in self.comparison:
            if row["metric"] in {x.metric for x in self.headlines.values()}:
                p = "" if row["p_value"] is None else f", p = {row['p_value']:.3g}"
                ends = "{} to {}".format(*(number_or_na(row[k]) for k in ("ci_low", "ci_high")))
                lines.append(
                    f"{row['label']}: {row['metric']} less that of {row['other']} "
                    f"{number_or_na(row['difference'])} ({ends}{p})"
                )
        lines += [f"note: {text}" for text in self.notes]
        return [*lines, f"wrote {', '.join(self.files)} to {self.folder}"]

    @property
    def by_fold(self):
        """fold_mean and fold_sd of every row of the table of metrics, of a cross-validation."""
        if not self.folds:
            return {}
        each = [st.estimates(part.outcomes, part.patients, 0) for part in self.folds]
        each = [{(x.label, x.metric): x.value for x in found} for found in each]
        rows = [[f.get((x.label, x.metric), np.nan) for f in each] for x in self.estimates]
        rows = pd.DataFrame(rows).replace([np.inf, -np.inf], np.nan)
        return {"fold_mean": rows.mean(axis=1), "fold_sd": rows.std(axis=1)}

    @property
    def doubts(self):
        """Columns of the table of metrics: how it is known that a test study is unseen, and what
        makes the answers doubtful."""
        return {k: v for k, v in self.about.items() if k in ("unseen", "warning")}

    def table(self, what, rows):
        write_table(rows, self.folder / f"{what}_{self.name}.csv")
        self.files.append(f"{what}_{self.name}.csv")

    def figure(self, file, title, draw, legend=""):
        """Make a figure by draw(path), and keep it for the page."""
        path = self.folder / f"{file}_{self.name}"
        draw(path)
        png = base64.b64encode(path.with_name(path.name + ".png").read_bytes()).decode()
        self.figures.append(
            {"title": title, "file": path.name, "png": png, "legend": LEGENDS.get(legend, "")}
        )

    def draw(self):
        """The figures of each kind of label, and the forest of all labels."""
        for file, title, kind, draw, metric in FIGURES:
            of = [o for o in self.studies.outcomes if type(o) is kind]
            if file == "confusion":
                of = [o for o in of if o.threshold is not None]
            self.panels(file, title, draw, metric, of)
        for kind, metric in HEADLINE.items():
            of = [self.headlines[o.label] for o in self.studies.outcomes if type(o) is kind]
            if len(of) > 1 and len({x.unit for x in of}) == 1:
                name = NAMES[metric] + (f" [{of[0].unit}]" if of[0].unit else "")
                rows = [(x.label, x) for x in of]
                more = f" of the first {curves.ROWS} labels" * (len(of) > curves.ROWS)
                self.figure(
                    f"forest_{metric}", f"{name}{more}",
                    partial(curves.forest, rows, name), "forest",
                )  # fmt: skip

    def panels(self, file, title, draw, metric, outcomes):
        if not outcomes:
            return
        shown, extra = curves.drawn(outcomes), {}
        titles = {x.label: x for x in self.estimates if x.metric == metric}
        if file == "roc_curves":
            self.bands = curves.bands(shown, self.studies.patients, self.seed)
        if file in ("roc_curves", "pr_curves"):
            extra = {label: {"band": band} for label, band in self.bands.items()}
        if file == "reliability":
            extra = {o.label: {"patients": self.studies.patients} for o in shown}
        if len(shown) < len(outcomes):
            title += f" ({len(shown)} of {len(outcomes)} labels: those with the most examples)"
        self.figure(
            file, title,
            partial(curves.panel_figure, shown, draw, titles, extra=extra), file,
        )  # fmt: skip

    def subgroup(self, column):
        """The table of a column's groups, its forest plot, and rows for the page."""
        cells, edges = self.by[column]
        found = subgroups(self.studies, cells, edges, self.n_boot, self.seed)
        rows = [{"column": column, "group": group} | x.row() for group, x in found]
        columns = ["column", "group", *COLUMNS]
        by = f"by_{in_file_name(column)}"
        self.table(by, pd.DataFrame(rows, columns=columns))
        lines, labels = [], []
        for o in curves.drawn(self.studies.outcomes):
            own = [(g, x) for g, x in found if (x.label, x.metric) == (o.label, HEADLINE[type(o)])]
            labels.append((o, own))
        kinds = {(HEADLINE[type(o)], o.unit(HEADLINE[type(o)])) for o, _ in labels}
        for metric, unit in sorted(kinds):
            lines = []
            for o, own in labels:
                if (HEADLINE[type(o)], o.unit(HEADLINE[type(o)])) == (metric, unit):
                    lines += [(o.label, self.headlines[o.label])]
                    lines += [(f"{column} {g}", x) for g, x in own]
            heads = [o.label for o, _ in labels]
            name = NAMES[metric] + (f" [{unit}]" if unit else "")
            one = lines[0][1].value if len(labels) == 1 else None
            self.figure(
                f"forest_{by}" + (f"_{metric}" if len(kinds) > 1 else ""),
                f"{name} by {column}",
                partial(curves.forest, lines, name, reference=one, headings=heads),
                "forest",
            )
        wanted = {(o.label, HEADLINE[type(o)]) for o in self.studies.outcomes}
        return [(g, x) for g, x in found if (x.label, x.metric) in wanted]

    def compared(self, name):
        """Rows of this model less another, on the studies that both predict."""
        one, other = self.others[name]
        found = st.compare(one.outcomes, other.outcomes, one.patients, self.n_boot, self.seed)
        return [
            {"other": name, "difference": r.pop("value")} | r | {"p_value": p}
            for x in found
            for r, p in [(x.row(), x.row()["p_value"])]
        ]

    def write_page(self):
        """The page: one file without scripts, links or anything from the network."""
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        where = FileSystemLoader(Path(__file__).parent / "templates")
        env = Environment(loader=where, autoescape=True, undefined=StrictUndefined)
        env.filters |= {"number": number_or_na, "interval": with_interval}
        env.globals |= {"names": NAMES}
        page = env.get_template("evaluation.html").render(
            report=self, version=__version__, rows=page_rows(self), methods=methods(self),
            cautions=[*self.notes, *cautions(self)],
        )  # fmt: skip
        with atomic_path(self.folder / f"report_{self.name}.html") as temporary:
            temporary.write_text(page, encoding="utf-8")
        self.files.append(f"report_{self.name}.html")


def number_or_na(value):
    if isinstance(value, np.ndarray):
        return "of each fold"
    return "n/a" if value is None else number(value)


SECTIONS = {  # what the page's tables show of each kind; the rest is in the CSV
    st.Binary: {
        "Discrimination and calibration": (
            *("auroc", "average_precision", "brier"),
            *("calibration_slope", "calibration_intercept", "ece"),
        ),
        "At the threshold": (
            *("sensitivity", "specificity", "ppv", "npv", "lr_positive", "lr_negative", "f1"),
        ),
    },
    st.Regression: {
        "Error": ("median_absolute_error", "mean_absolute_error", "rmse", "bias"),
        "Agreement": ("loa_low", "loa_high", "r2", "pearson", "spearman"),
    },
    st.MultiClass: {"Grades": ("auroc", "balanced_accuracy", "kappa")},
    st.Survival: {"Survival": ("c_index",)},
}


def page_rows(report):
    """[(title, metrics, [(label, threshold, {metric: Estimate})])] for the page's tables."""
    of = {(x.label, x.metric): x for x in report.estimates}
    tables = []
    for kind, sections in SECTIONS.items():
        outcomes = [o for o in report.studies.outcomes if type(o) is kind]
        for title, metrics in sections.items():
            if kind is st.Binary and title == "At the threshold":
                outcomes = [o for o in outcomes if o.threshold is not None]
                if any(o.prevalence for o in outcomes):
                    metrics += ("ppv_at_prevalence", "npv_at_prevalence")
            if outcomes:
                rows = [(o, {m: of[o.label, m] for m in metrics}) for o in outcomes]
                tables.append((title, metrics, rows))
    return tables


def notes_of(fold, unseen):
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


def notes_of_folds(parts):
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


def cautions(report):
    """Sentences that a reader must not miss."""
    few = [
        f"{o.label} ({o.n_positive} of {o.n})"
        for o in report.studies.outcomes
        if isinstance(o, st.Binary) and 0 < min(o.n_positive, o.n - o.n_positive) < FEW
    ]
    if few:
        yield (
            f"Fewer than {FEW} studies with, or without, the finding: {some(few, 8)}. Estimates of "
            "such size move with single patients; see the intervals."
        )
    absent = Counter(
        x.note for x in report.headlines.values() if not np.isfinite(x.value) and x.note
    )
    for note, n in absent.items():
        labels = [x.label for x in report.headlines.values() if x.note == note]
        yield f"Not defined for {n} of the labels ({some(labels, 8)}): {note}."
    left = [x.label for x in report.headlines.values() if np.isfinite(x.value)]
    wide = [k for k in left if not np.isfinite(report.headlines[k].ci_low)]
    if wide and report.n_boot:
        yield f"Without an interval: {some(wide, 8)}; see the notes in the table."


def methods(report):
    """Sentences for a paper's methods section, in TRIPOD+AI's terms (BMJ 2024;385:e078378)."""
    kinds = {type(o) for o in report.studies.outcomes}
    studies, about = report.studies, report.about
    n, patients = len(studies), len(np.unique(studies.patients))
    yield (
        f"Performance of the model was evaluated in {n} "
        f"{'patients' if about.get('per') == 'patient' else 'studies'} of {patients} patients "
        f"({about.get('fold', 'all')} fold of {about.get('dataset', 'the data set')})."
    )
    if about.get("per") == "patient":
        how = {"mean": "the mean over a patient's studies", "first": "a patient's first study"}
        how = how.get(about.get("pool"), "a patient's last study")
        yield f"Predictions were pooled by patient: {how}."
    if st.Binary in kinds:
        yield (
            "Discrimination was measured by the area under the receiver operating characteristic "
            "curve (AUROC) and average precision; calibration by the Brier score, calibration "
            "slope and intercept, expected calibration error and a calibration plot; clinical "
            "utility by decision curves."
        )
        if any(getattr(o, "threshold", None) is not None for o in studies.outcomes):
            rule = about.get("target") or ""
            goal = "maximise Youden's index" if rule == "youden" else f"reach a {rule}"
            how = f"chosen to {goal.replace('=', ' of ')} in the validation fold"
            how = how if rule else "given with the predictions"
            yield (
                "Sensitivity, specificity, predictive values and likelihood ratios are given at "
                f"the threshold {how}."
            )
    if st.Regression in kinds:
        yield (
            "Agreement of measurements was assessed by the median and mean absolute error, root "
            "mean squared error, R2, correlation, and bias with 95 % limits of agreement."
        )
    if st.MultiClass in kinds:
        yield ("Grades were assessed by one-vs-rest AUROC, balanced accuracy and quadratic kappa.")
    if st.Survival in kinds:
        yield "Time to event was assessed by Harrell's C and survival by thirds of predicted risk."
    if report.n_boot:
        yield (
            f"95 % confidence intervals are from {report.n_boot} bootstrap resamples of patients "
            f"(seed {report.seed}), all studies of a patient together: percentile intervals, "
            "Wilson's interval with the bootstrap's effective size for proportions and AUROC."
        )
    if report.by:
        yield f"Subgroups by {', '.join(report.by)} were evaluated in the same way."
    if report.others:
        yield (
            f"Models ({', '.join(report.others)}) were compared on the same studies: AUROC by "
            "DeLong's test for clustered data, other metrics by the paired bootstrap."
        )
    yield f"Computed with EchoFocus {__version__}."
