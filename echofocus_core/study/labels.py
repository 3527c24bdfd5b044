"""Label tables: rows to studies, cells to numbers in physical units.

A label table has a row for each study: pid, eid and one column for each label. What is odd in it is
reported to a listener (`base.console`), in a run and in `check` alike.
"""

import numpy as np
import pandas as pd

from echofocus_core.base.console import RUN, UserError, nearest, printable, some
from echofocus_core.base.seen import STUDY, id_key
from echofocus_core.base.tables import clean_ids, read_table, to_numbers
from echofocus_core.study.config import PUBLISHED_BOXCOX
from echofocus_core.study.outputs import examples_of, fit_scaling, scaling_fault

GIVEN_FOLD = "fold given"  # the column of a label table (as read) with the folds of `split_column`
FOLD_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
FOLD_WORDS |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")


def load_labels(task, dataset, listener=RUN, split_column=""):
    """(task with its kinds decided, label table) of a dataset, or (task, None) without a table."""
    path = dataset.label_path or task.label_path
    if path is None:
        raise UserError("no label table: set label_path of the task or the dataset in the config")
    task, table = read_labels(path, task, listener, split_column)
    if table is not None:
        task = decide_kinds(table, task, path, listener)
        for label in task.outputs.each:
            if label.is_number:
                unit, more = task.units.get(label.name, ""), "; valid_range excludes some"
                warn_of_suspicious_values(
                    label.name, table[label.name].dropna(), unit, path, listener, more
                )
    return task, table


def read_labels(path, task, listener=RUN, split_column=""):
    """(task with the labels that the table has, label table); None for a table without ids.

    The table is a DataFrame indexed by study id (text), with columns pid (text) and the targets of
    each label, float64 in physical units (see `Label.columns`); values that cannot be used are
    missing and reported. `split_column` becomes GIVEN_FOLD.
    """
    columns = [column for label in task.task_labels for column in task.columns_of(label)]
    columns += [split_column] if split_column else []
    cells = read_cells(path, list(dict.fromkeys(columns)), listener, task.level, task.classes)
    if cells is None:
        return task, None
    labels = [x for x in task.task_labels if set(task.columns_of(x)) <= set(cells)]
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


def read_rows(path, columns, listener=RUN, level="study"):
    """pid and some more columns of a label table, as text, one row for each study (the index)."""
    cells = read_cells(path, columns, listener, level)
    return None if cells is None else one_row_a_study(cells, path, listener)


def read_cells(path, columns, listener, level="study", words=None):
    """pid, eid and those of `columns` that exist, as text; the index is the line in the file.

    Of level 'video' a row is a video's, by a column `video` too: eid is study/video, and STUDY the
    study. words: see `read_table`. Rows without ids are left out. None where a column of ids is
    missing, or ids in every row.
    """
    raw = read_table(path, listener, "label table", words)
    ids = ("pid", "eid", "video") if level == "video" else ("pid", "eid")
    missing = [column for column in (*ids, *columns) if column not in raw]
    for column in missing:
        close = nearest(column, raw.columns).removeprefix("; ")
        listener.error(
            f"{path} has no column '{column}'",
            f"{close} " * bool(close) + "rename the column, or change the config (a label table "
            f"has {', '.join(ids)} and one column for each label)",
        )
    if set(ids) & set(missing):
        return None
    raw = raw[list(dict.fromkeys([*ids, *(c for c in columns if c not in missing)]))]
    rows = raw.dropna(subset=list(ids)).copy()
    for column in ("pid", "eid"):
        rows[column] = clean_ids(rows[column], path, listener)
    rows["pid"] = one_form(rows["pid"], path, listener)
    if lost := len(raw) - len(rows):
        report = listener.warning if len(rows) else listener.error
        report(
            f"{path}: {lost} rows have no {' or no '.join(ids)}", "fill them in; they are left out"
        )
    if not len(rows):
        return None
    if level == "video":
        rows[STUDY], rows["eid"] = rows["eid"], rows["eid"] + "/" + rows["video"].str.strip()
    return rows


def one_form(pids, path, listener):
    """Patient ids, those with the same `id_key` in the form of the first: else the studies of one
    patient could be in two folds."""
    keys = pids.map(id_key)
    first = keys.map(pids.groupby(keys).first())
    if len(odd := pids[pids != first].unique()):
        pairs = some(f"{printable(pid)} and {printable(first[pids == pid].iloc[0])}" for pid in odd)
        listener.warning(
            f"{path}: {len(odd)} patient ids differ from others only in case, spaces or leading "
            f"zeros: {pairs}; they count as one patient each",
            "write a patient's id in one way, and different patients' ids differently",
        )
    return first


def given_folds(cells, path, listener):
    """The cells of a split column (text) -> train, val, test or None; other words are an error."""
    folds = cells.str.lower().map(FOLD_WORDS)
    odd = cells[folds.isna() & cells.notna()]
    if len(odd):
        listener.error(
            f"{path}, {cells.name}: not folds: {some(map(printable, odd.unique()))} "
            f"(line {some(odd.index)})",
            f"use train, val and test ({', '.join(FOLD_WORDS)} are understood)",
        )
    return folds.astype(object)


def refuse_split_patients(table, column, path, listener):
    """A patient whose studies a given split puts into two folds is an error."""
    folds = table.dropna(subset=[GIVEN_FOLD]).groupby("pid")[GIVEN_FOLD].nunique()
    both = folds.index[folds > 1]
    if len(both):
        listener.error(
            f"{path}, {column}: {len(both)} patients are in two folds (studies "
            f"{some(table.index[table['pid'].isin(both)])})",
            "give all studies of a patient one fold",
        )
    if blank := int(table[GIVEN_FOLD].isna().sum()):
        listener.warning(f"{path}, {column}: {blank} studies have no fold", "they are left out")


def one_row_a_study(rows, path, listener):
    """Rows with pid and eid -> one for each study, its id the index; contradictions are errors."""
    again = rows[rows.duplicated()]
    if len(again):
        listener.warning(
            f"{path}: {len(again)} rows repeat another one: {lines_of(again)}",
            "delete them; each is read once",
        )
    rows = rows.drop_duplicates()
    twice = rows[rows["eid"].duplicated(keep=False)].sort_values("eid", kind="stable")
    if len(twice):
        listener.error(
            f"{path}: rows contradict each other for {twice['eid'].nunique()} studies: "
            f"{lines_of(twice)}",
            "keep one row for each study",
        )
    table = rows.drop_duplicates("eid").set_index("eid")
    listener.ok(f"{path}: {len(table)} studies of {table['pid'].nunique()} patients")
    return table


def lines_of(rows):
    """The first studies of some rows and their lines in the file, as text."""
    return some((f"{printable(eid)} (line {line})" for line, eid in rows["eid"].items()), 6)


def label_values(cells, task, path, listener):
    """The target columns of all labels (DataFrame float64), NaN for what cannot be used."""
    columns = [x for name in task.task_labels for x in task.columns_of(name)]
    plain = [x for x in dict.fromkeys(columns) if x not in task.classes]
    numbers = to_numbers(cells[plain], path, listener) if plain else None
    values = {}
    for label in task.outputs.each:
        values |= label.read(cells, numbers, task, path, listener)
    return pd.DataFrame(values)


def decide_kinds(table, task, path, listener):
    """The task with a kind for each label: of those whose kind is not given, 'binary' when every
    value of all of them is 0, 1 or missing, else 'regression'."""
    kinds = {label: task.kind(label) for label in task.task_labels}
    undecided = [label for label, kind in kinds.items() if not kind]
    binary = {label: table[label].dropna().isin([0, 1]) for label in undecided}
    kind = "binary" if all(where.all() for where in binary.values()) else "regression"
    if undecided:
        kinds |= dict.fromkeys(undecided, kind)
        which = "the task is" if len(undecided) == len(kinds) else f"{some(undecided)}:"
        listener.note(f"{which} {kind}, by the values of its labels")
    for label, where in binary.items():
        if kind == "regression" and where.mean() > 0.8:
            odd = table.loc[where.index[~where], label]
            because = f" because of {examples_of(odd.map('{:g}'.format), odd.index)}"
            listener.warning(
                f"{path}, {label}: {where.mean():.0%} of the values are 0 or 1, yet the task is a "
                f"regression{because * (len(odd) > 0)}",
                'put "type": "binary" into the task, or correct the values',
            )
    same = set(kinds.values())
    return task.model_copy(update={"type": same.pop() if len(same) == 1 else kinds})


def other_unit(label, units, others):
    """Whether two tasks give a label two units."""
    both = [x.get(label, "").replace(" ", "").casefold() for x in (units, others)]
    return all(both) and both[0] != both[1]


def warn_of_suspicious_values(label, y, unit, path, listener, more=""):
    """Report codes for 'missing' and percentages above 100 among the values of a measurement.

    y: by study id; more: what else a user can do. The values are used as they are.
    """
    codes = y.isin(missing_codes(y.to_numpy()))
    for odd, text, remedy in (
        (y[codes], "look like a code for 'missing'", "leave these cells empty"),
        (y[~codes & (y > (100 if unit.startswith("%") else np.inf))], "are above 100 %",
         "correct them"),
    ):  # fmt: skip
        if len(odd):
            examples = examples_of(odd.map("{:g}".format), odd.index)
            listener.warning(
                f"{path}, {label}: {len(odd)} values {text}: {examples}",
                f"{remedy}; they are used as they are{more}",
            )


CODES = {int(digit * n) for digit in "789" for n in range(2, 7)} | {9}
CODES |= {-1} | {-x for x in CODES}


def missing_codes(y):
    """Values of a label at the end of its range, and apart from the rest, such as 99 and -9."""
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

    A label whose numbers no model could be loaded with is an error.
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
