"""Label tables: rows to studies, cells to numbers in physical units.

A label table has a row for each study: pid, eid and one column for each label. Problems are
reported to a listener (`base.console`), in a run and by `check`.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from echofocus_core.base.console import RUN, UserError, count_of, nearest, printable, some
from echofocus_core.base.seen import STUDY, id_key
from echofocus_core.base.tables import clean_ids, read_dates, read_table, to_numbers
from echofocus_core.study.config import PUBLISHED_BOXCOX
from echofocus_core.study.kinds.base import examples_of
from echofocus_core.study.label_lists import SPLIT, read_other_labels, read_split
from echofocus_core.study.scaling import fit_scaling, scaling_fault

GIVEN_FOLD = "fold given"  # the column of a label table (as read) with the folds of `split_column`
FOLD_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
FOLD_WORDS |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")


@dataclass(frozen=True)
class LabelFile:
    """A label table's file and how to read it."""

    path: Path | None
    columns: dict[str, str] = field(default_factory=dict)  # our name -> the table's name
    level: str = "study"
    split: Path | None = None  # JSON of patients and their folds, the column SPLIT
    pattern: str = ""  # finds the patient and the study in the path of a video
    order: str | None = None  # sort by this column of dates, '' for the only one; None: do not sort


def label_file(task, dataset, settings=None):
    """The LabelFile of a dataset; sorted if the settings use one study of each patient."""
    path = dataset.label_path or (task.label_path if task else None)
    columns = (task.columns if task else {}) | dataset.columns
    level = task.level if task else "study"
    file = LabelFile(path, columns, level, dataset.split_path, dataset.path_pattern)
    if settings and (
        settings.first_study_only or (settings.per == "patient" and settings.pool != "mean")
    ):
        return replace(file, order=settings.order_by)
    return file


def load_labels(task, dataset, listener=RUN, settings=None, split_column=""):
    """(task with its kinds decided, label table) of a dataset, or (task, None) without a table."""
    file = label_file(task, dataset, settings)
    if file.path is None:
        raise UserError(
            "no label table: give --label_path, or label_path of the task or the dataset"
        )
    task, table = read_labels(file, task, listener, split_column)
    if table is None:
        return task, None
    task = decide_kinds(table, task, file.path, listener)
    for label in task.outputs.each:
        if label.is_number:
            y, unit = table[label.name].dropna(), task.units.get(label.name, "")
            more = "; valid_range excludes some"
            warn_of_suspicious_values(label.name, y, unit, file.path, listener, more)
    return task, table


def read_labels(file, task, listener=RUN, split_column=""):
    """(task with the labels that the table has, label table); None without ids or without labels.

    The table is a DataFrame indexed by study id (text), with columns pid (text) and the targets of
    each label, float64 in physical units (see `Label.columns`); unusable values are missing and
    reported. `split_column` becomes GIVEN_FOLD. file: a LabelFile.
    """
    path = file.path
    columns = [column for label in task.task_labels for column in task.columns_of(label)]
    columns += [split_column] if split_column else []
    cells = read_cells(file, list(dict.fromkeys(columns)), listener, task.classes)
    if cells is None:
        return task, None
    labels = [x for x in task.task_labels if set(task.columns_of(x)) <= set(cells)]
    if task.task_labels and not labels:
        return task, None
    task = task.model_copy(update={"task_labels": labels})
    rows = cells[["pid", "eid", *([STUDY] if STUDY in cells else [])]]
    if labels:
        rows = rows.join(label_values(cells, task, path, listener))
    if split_column in cells:
        rows[GIVEN_FOLD] = given_folds(cells[split_column], path, listener)
    table = one_row_a_study(rows, path, listener)
    if GIVEN_FOLD in table:
        refuse_split_patients(table, split_column, path, listener)
    return task, table


def read_rows(file, columns, listener=RUN):
    """pid and other columns of a LabelFile, as text, one row for each study (the index)."""
    cells = read_cells(file, columns, listener)
    return None if cells is None else one_row_a_study(cells, file.path, listener)


def read_cells(file, columns, listener, words=None):
    """pid, eid and those of `columns` that exist, as text; the index is the line in the file.

    At level 'video', a row is for a video, and the table also has a column `video`: eid becomes
    study/video, and STUDY is the study. words: see `read_table`. Rows without ids are left out.
    None if a column of ids is missing, or no row has ids.
    """
    path, level = file.path, file.level
    raw = read_other_labels(path, file.pattern)
    if raw is None:
        raw = read_table(path, listener, "label table", words)
    whole = raw.drop(columns=[x for x in file.columns if x in raw])
    whole = whole.assign(**{x: raw[name] for x, name in file.columns.items() if name in raw})
    if file.split and "pid" in whole:
        whole[SPLIT] = whole["pid"].map(read_split(file.split))
    ids = ("pid", "eid", "video") if level == "video" else ("pid", "eid")
    missing = [column for column in (*ids, *columns) if column not in whole]
    for column in missing:
        name, remedy = file.columns.get(column, column), missing_column(column, whole)
        listener.error(f"{path} has no column '{name}'", remedy)
    if set(ids) & set(missing):
        return None
    raw = whole[list(dict.fromkeys([*ids, *(c for c in columns if c not in missing)]))]
    rows = raw.dropna(subset=list(ids)).copy()
    for column in ("pid", "eid"):
        rows[column] = clean_ids(rows[column], path, listener)
    rows["pid"] = one_form(rows["pid"], path, listener)
    if blank := len(raw) - len(rows):
        report = listener.warning if len(rows) else listener.error
        report(
            f"{path}: {count_of(blank, 'rows have')} no {' or no '.join(ids)}",
            "fill them in; they are left out",
        )
    if not len(rows):
        return None
    if file.order is not None:
        rows = sorted_by_date(rows, whole.loc[rows.index], file, listener)
    if level == "video":
        rows[STUDY], rows["eid"] = rows["eid"], rows["eid"] + "/" + rows["video"].str.strip()
    return rows


def missing_column(column, table):
    """The remedy for a column that is missing in a label table."""
    if name := next((x for x in table if (table[x] == column).any()), ""):
        return (
            f"it has a row for each study and measurement ({column} is a value in '{name}'): "
            "make one row of each study, with a column for each label"
        )
    close = nearest(column, table.columns).removeprefix("; ")
    return (
        f"{close} " * bool(close) + "rename the column, or name it in the task of the config: "
        f'"columns": {{"{column}": "..."}} (the table has {some(map(printable, table), 12)})'
    )


def sorted_by_date(rows, whole, file, listener):
    """Rows in the order of a column of dates of the `whole` table, see `LabelFile.order`."""
    repeated = rows["eid"].groupby(rows["pid"]).transform("nunique") > 1
    if not repeated.any():
        return rows
    names = [file.order] if file.order else whole.columns.difference(["pid", "eid", "video"])
    if file.order and file.order not in whole:
        listener.error(f"{file.path} has no column '{file.order}'", "correct --order_by")
        return rows
    if not file.order:  # a date of birth is the same in all studies of a patient
        names = [x for x in names if (whole[x].groupby(rows["pid"]).nunique() > 1).any()]
    columns = {x: read_dates(whole[x]) for x in names}
    columns = {x: (dates, form) for x, (dates, form) in columns.items() if form or file.order}
    if len(columns) != 1:
        several = f"several columns hold dates of studies: {some(columns)}"
        reason = several if columns else "no column holds dates of studies"
        listener.warning(
            f"{file.path}: the first study of a patient is the first row, because {reason}",
            "name one with --order_by",
        )
        return rows
    ((name, (dates, form)),) = columns.items()
    if dates is None:
        examples = some(map(printable, whole[name].dropna()))
        text = f"{form} dates" if form else "no dates"
        listener.error(f"{file.path}: {name} holds {text}: {examples}", "write them as 2020-12-31")
        return rows
    listener.note(f"{file.path}: studies of a patient are in the order of {name} ({form})")
    if n := int((dates.isna() & repeated).sum()):
        listener.warning(
            f"{file.path}: {count_of(n, 'studies have')} no {name}", "they count as the last ones"
        )
    return rows.loc[dates.sort_values(kind="stable").index]


def one_form(pids, path, listener):
    """Patient ids; ids with the same `id_key` are replaced by the first of them, because one
    patient's studies must not be in two folds."""
    keys = pids.map(id_key)
    first = keys.map(pids.groupby(keys).first())
    if len(others := pids[pids != first].unique()):
        pairs = some(
            f"{printable(pid)} and {printable(first[pids == pid].iloc[0])}" for pid in others
        )
        listener.warning(
            f"{path}: {len(others)} patient ids differ from others only in case, spaces or leading "
            f"zeros: {pairs}; they count as one patient each",
            "write a patient's id in one way, and different patients' ids differently",
        )
    return first


def given_folds(cells, path, listener):
    """The cells of a split column (text) -> train, val, test or None; other words are an error."""
    folds = cells.str.lower().map(FOLD_WORDS)
    invalid = cells[folds.isna() & cells.notna()]
    if len(invalid):
        listener.error(
            f"{path}, {cells.name}: not folds: {some(map(printable, invalid.unique()))} "
            f"(line {some(invalid.index)})",
            f"use train, val and test ({', '.join(FOLD_WORDS)} are understood)",
        )
    return folds.astype(object)


def refuse_split_patients(table, column, path, listener):
    """Report an error if a given split puts a patient's studies into two folds."""
    folds = table.dropna(subset=[GIVEN_FOLD]).groupby("pid")[GIVEN_FOLD].nunique()
    both = folds.index[folds > 1]
    if len(both):
        listener.error(
            f"{path}, {column}: {count_of(len(both), 'patients are')} in two folds (studies "
            f"{some(table.index[table['pid'].isin(both)])})",
            "give all studies of a patient one fold",
        )
    if blank := int(table[GIVEN_FOLD].isna().sum()):
        listener.warning(
            f"{path}, {column}: {count_of(blank, 'studies have')} no fold", "they are left out"
        )


def one_row_a_study(rows, path, listener):
    """Rows with pid and eid -> one row for each study id (the index); contradictions are errors."""
    repeated = rows[rows.duplicated()]
    if len(repeated):
        listener.warning(
            f"{path}: {count_of(len(repeated), 'rows are')} repeated: {lines_of(repeated)}",
            "delete repeated rows; each is read once",
        )
    rows = rows.drop_duplicates()
    conflicting = rows[rows["eid"].duplicated(keep=False)].sort_values("eid", kind="stable")
    if len(conflicting):
        differ = (conflicting.groupby("eid").agg(lambda x: x.nunique(dropna=False)) > 1).any()
        studies = count_of(conflicting["eid"].nunique(), "studies")
        listener.error(
            f"{path}: rows contradict each other for {studies}: {lines_of(conflicting)}",
            f"keep one row for each study; they differ in {some(differ.index[differ])}",
        )
    table = rows.drop_duplicates("eid").set_index("eid")
    patients = count_of(table["pid"].nunique(), "patients")
    listener.ok(f"{path}: {count_of(len(table), 'studies')} of {patients}")
    return table


def lines_of(rows):
    """The first studies of some rows and their lines in the file, as text."""
    return some((f"{printable(eid)} (line {line})" for line, eid in rows["eid"].items()), 6)


def label_values(cells, task, path, listener):
    """The target columns of all labels (DataFrame float64), NaN for unusable cells."""
    columns = [x for name in task.task_labels for x in task.columns_of(name)]
    plain = [x for x in dict.fromkeys(columns) if x not in task.classes]
    numbers = to_numbers(cells[plain], path, listener) if plain else None
    values = {}
    for label in task.outputs.each:
        values |= label.read(cells, numbers, task, path, listener)
    return pd.DataFrame(values)


def decide_kinds(table, task, path, listener):
    """The task with a kind for each label. Labels whose kind is not given are binary if all values
    of all of them are 0, 1 or missing, else regression."""
    kinds = {label: task.kind(label) for label in task.task_labels}
    undecided = [label for label, kind in kinds.items() if not kind]
    binary = {label: table[label].dropna().isin([0, 1]) for label in undecided}
    kind = "binary" if all(x.all() for x in binary.values()) else "regression"
    if undecided:
        kinds |= dict.fromkeys(undecided, kind)
        which = "the task is" if len(undecided) == len(kinds) else f"{some(undecided)}:"
        listener.note(f"{which} {kind}, by the values of its labels")
    for label, is_binary in binary.items():
        if kind == "regression" and is_binary.mean() > 0.8:
            others = table.loc[is_binary.index[~is_binary], label]
            because = f" because of {examples_of(others.map('{:g}'.format), others.index)}"
            listener.warning(
                f"{path}, {label}: {is_binary.mean():.0%} of the values are 0 or 1, but the task "
                f"is a regression{because * (len(others) > 0)}",
                'put "type": "binary" into the task, or correct the values',
            )
    same = set(kinds.values())
    return task.model_copy(update={"type": same.pop() if len(same) == 1 else kinds})


def other_unit(label, units, others):
    """Whether a label has different units in two tasks."""
    both = [x.get(label, "").replace(" ", "").casefold() for x in (units, others)]
    return all(both) and both[0] != both[1]


def warn_of_suspicious_values(label, y, unit, path, listener, more=""):
    """Report codes for 'missing' and percentages above 100 among the values of a measurement.

    y: by study id; more: another remedy, after "; ". The values are used as they are.
    """
    codes = y.isin(missing_codes(y.to_numpy()))
    for values, text, remedy in (
        (y[codes], "look like a code for 'missing'", "leave these cells empty"),
        (y[~codes & (y > (100 if unit.startswith("%") else np.inf))], "are above 100 %",
         "correct them"),
    ):  # fmt: skip
        if len(values):
            examples = examples_of(values.map("{:g}".format), values.index)
            listener.warning(
                f"{path}, {label}: {count_of(len(values), f'values {text}')}: {examples}",
                f"{remedy}; they are used as they are{more}",
            )


CODES = {int(digit * n) for digit in "789" for n in range(2, 7)} | {9}
CODES |= {-1} | {-x for x in CODES}


def missing_codes(y):
    """Values at the end of a label's range and far from the others, such as 99 and -9."""
    values, counts = np.unique(y, return_counts=True)
    codes, values, counts = [], list(values), list(counts)
    while len(values) > 1 and values[-1] in CODES and values[-1] > 0:
        gap, spread = values[-1] - values[-2], values[-2] - values[0]
        if gap <= (0.1 if counts[-1] > 1 else 0.25) * spread:
            break
        codes.append(values.pop())
        counts.pop()
    while len(values) > 1 and values[0] in CODES and values[0] < 0:
        gap, spread = values[1] - values[0], values[-1] - values[1]
        if values[1] < 0 and gap <= 0.25 * spread:
            break
        codes.append(values.pop(0))
    return codes


def scaling_of(table, task, unlearnt=(), listener=RUN):
    """The published `input_norm_dict` from training labels (DataFrame, physical units), or None.

    A scaling with which no model could be loaded is an error.
    """
    measured = task.outputs.of_kind("regression")
    boxcox = PUBLISHED_BOXCOX if task.boxcox is None else task.boxcox
    scaling = {"type": "boxcox"}
    for label in measured:
        scaling[label] = {"shift": 0.0, "apply_boxcox": False, "mean": 0.0, "stdev": 1.0}
        if label in unlearnt:
            continue
        with np.errstate(all="ignore"):
            scaling[label] = entry = fit_scaling(table[label].dropna().to_numpy(), label in boxcox)
        if fault := scaling_fault(entry):
            remedy = "leave it out of boxcox in the task" if entry["apply_boxcox"] else ""
            listener.error(
                f"label {label} cannot be scaled: {fault}",
                remedy or "give it in another unit, or correct its values",
            )
    return scaling if measured else None
