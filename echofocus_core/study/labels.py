"""Labels: a label table to numbers in physical units, and those to what a network learns.

A label table has a row a study: pid, eid and one column a label. What is odd in it is told to a
listener (`base.console`), in a run and in `check` alike; nothing is changed without a word.
"""

import numpy as np
import pandas as pd

from echofocus_core.base.console import RUN, UserError, nearest, printable, some
from echofocus_core.base.tables import as_seen, clean_ids, look_alike, read_table, to_numbers
from echofocus_core.study.outputs import EVENT
from echofocus_core.study.splits import GIVEN_FOLD, STUDY, given_folds, refuse_split_patients

PUBLISHED_BOXCOX = ("LD05", "LM12", "LS04", "LA34", "RA06")
PUBLISHED_RANGES = {"EF05": (0, None), "LM12": (0, None)}  # outside is a typing error: missing


def load_labels(config, task_name, dataset_name, listener=RUN, split_column=""):
    """(task with its type decided, label table) of a dataset, or (task, None) without a table.

    The task is a copy; what is found on the way is told to the listener.
    """
    task, dataset = config.tasks[task_name].model_copy(), config.datasets[dataset_name]
    path = dataset.label_path or task.label_path
    if path is None:
        raise UserError("no label table: set label_path of the task or the dataset in the config")
    table = read_labels(path, task, listener, split_column)
    if table is not None:
        decide_type(table, task, path, listener)
    if table is not None:
        warn_of_suspicious(table, task, path, listener)
    return task, table


def read_labels(path, task, listener=RUN, split_column=""):
    """The label table: DataFrame indexed by study id (text), columns pid (text) and the labels.

    Labels are float64 in physical units; of multiclass the number of the class, of survival the
    time, and the event (0 or 1) in a column label + EVENT. Values that are no numbers, out of
    range, none of the classes or, for a finding, not 0 or 1 become missing and are told; a label
    that the table lacks is taken from `task.task_labels` once the listener has heard of it.
    `split_column` becomes GIVEN_FOLD. None where a column of ids is missing.
    """
    columns = [column for label in task.task_labels for column in task.columns_of(label)]
    columns += [split_column] if split_column else []
    cells = read_cells(path, list(dict.fromkeys(columns)), listener, task.level, task.classes)
    if cells is None:
        return None
    task.task_labels = [x for x in task.task_labels if set(task.columns_of(x)) <= set(cells)]
    rows = cells[["pid", "eid", *([STUDY] if STUDY in cells else [])]]
    if task.task_labels:
        rows = rows.join(label_values(cells, task, path, listener))
    if split_column in cells:
        rows[GIVEN_FOLD] = given_folds(cells[split_column], path, listener)
    table = one_row_a_study(rows, path, listener)
    warn_of_look_alikes(table["pid"], path, listener)
    if GIVEN_FOLD in table:
        refuse_split_patients(table, split_column, path, listener)
    return table


def read_rows(path, columns, listener=RUN, level="study"):
    """pid and some more columns of a label table, as text, one row a study (the index)."""
    cells = read_cells(path, columns, listener, level)
    return None if cells is None else one_row_a_study(cells, path, listener)


def read_cells(path, columns, listener, level="study", words=None):
    """pid, eid and those of `columns` that are there, as text; the index is the line in the file.

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
            f"{close} " * bool(close) + "rename the column, or mend the config (a label table has "
            f"{', '.join(ids)} and one column a label)",
        )
    if set(ids) & set(missing):
        return None
    raw = raw[list(dict.fromkeys([*ids, *(c for c in columns if c not in missing)]))]
    rows = raw.dropna(subset=list(ids)).copy()
    for column in ("pid", "eid"):
        rows[column] = clean_ids(rows[column], path, listener)
    rows["pid"] = one_form(rows["pid"], path, listener)
    if lost := len(raw) - len(rows):
        text = f"{path}: {lost} rows have no {' or no '.join(ids)}"
        tell = listener.warning if len(rows) else listener.error
        tell(text, "fill in; they are left out")
    if not len(rows):
        return None
    if level == "video":
        rows[STUDY], rows["eid"] = rows["eid"], rows["eid"] + "/" + rows["video"].str.strip()
    return rows


def one_form(pids, path, listener):
    """Patient ids of which some look the same (`as_seen`), those in one form."""
    plain = pids.map(as_seen)
    several = plain.isin(written_in_several_ways(pids, plain).index)
    if several.any():
        names = some(map(printable, plain[several].unique()))
        listener.note(
            f"{path}: patients written in several ways that look the same are one: {names}"
        )
    return pids.mask(several, plain)


def warn_of_look_alikes(pids, path, listener):
    """Warn of patients who may be one: their ids differ in case or in zeros alone, say."""
    pids = pids.drop_duplicates()
    several = written_in_several_ways(pids, pids.map(look_alike))
    if len(several):
        pairs = some(" and ".join(map(printable, ids)) for ids in several)
        listener.warning(
            f"{path}: {len(several)} patients may be written in several ways: {pairs}; these count "
            "as different ones, and may be in training and in the test",
            "write a patient's id in one way",
        )


def written_in_several_ways(pids, keys):
    """Key -> the different ids that have it, of keys with more than one."""
    found = pids.groupby(keys).unique()
    return found[found.map(len) > 1]


def one_row_a_study(rows, path, listener):
    """Rows with pid and eid -> one a study, its id the index; contradictions are errors."""
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
            "keep one row a study",
        )
    table = rows.drop_duplicates("eid").set_index("eid")
    listener.ok(f"{path}: {len(table)} studies of {table['pid'].nunique()} patients")
    return table


def lines_of(rows):
    """The first studies of some rows and their lines in the file, as text."""
    return some((f"{printable(eid)} (line {line})" for line, eid in rows["eid"].items()), 6)


def cells_of(cells, eids):
    """The first of some cells and their studies, as text."""
    pairs = zip(cells[:4], eids[:4], strict=True)
    return some(f"{printable(cell)[:40]} (study {printable(eid)})" for cell, eid in pairs)


def label_values(cells, task, path, listener):
    """The target columns of all labels (DataFrame float64), NaN for what cannot be used, which is
    told."""
    columns = {x: task.columns_of(x) for x in task.task_labels if task.kind(x) != "multiclass"}
    plain = list(dict.fromkeys(column for own in columns.values() for column in own))
    numbers = to_numbers(cells[plain], path, listener) if plain else None
    values = {}
    for label in task.task_labels:
        if task.kind(label) == "survival":
            found = times_and_events(label, task, numbers, cells, path, listener)
            values |= {label: found[0], label + EVENT: found[1]}
            continue
        if task.kind(label) == "multiclass":
            y = class_numbers(label, cells[label], task.classes[label], path, listener)
            faults = {f"none of {', '.join(task.classes[label])}": y.isna() & cells[label].notna()}
        else:
            y = numbers[label]
            faults = {"no numbers": y.isna() & cells[label].notna()}
            faults |= faults_of_values(label, y, task, path, listener)
        values[label] = told_and_missing(label, label, y, faults, cells, path, listener)
    return pd.DataFrame(values)


def faults_of_values(label, y, task, path, listener):
    """{what is wrong: where (S,)} of the numbers of a finding or measurement."""
    if task.kind(label) == "binary":
        warn_of_one_and_two(label, y, path, listener)
        return {"not 0 or 1": y.notna() & ~y.isin([0, 1])}
    low, high = limits_of(label, task)
    return {"out of range": (y < low) | (y > high)}


def limits_of(label, task):
    """The least and the greatest value that a label may have, by the task's `valid_range`."""
    ranges = PUBLISHED_RANGES if task.valid_range is None else task.valid_range
    low, high = ranges.get(label, (None, None))
    return -np.inf if low is None else low, np.inf if high is None else high


def told_and_missing(label, column, y, faults, cells, path, listener):
    """y with NaN where a fault is, each of which is told with examples of its cells."""
    for fault, where in faults.items():
        if where.any():
            examples = cells_of(cells.loc[where, column].fillna(""), cells.loc[where, "eid"])
            listener.warning(
                f"{path}, {label}: {where.sum()} values are {fault}: {examples}",
                "correct them; they count as missing",
            )
            y = y.mask(where)
    return y


def times_and_events(label, task, numbers, cells, path, listener):
    """(time, event) of a survival label; both are missing where one is or cannot be used."""
    found, columns = [], task.columns_of(label)
    low, high = limits_of(label, task)
    for column, faults_of in (
        (columns[0], lambda y: {"below zero": y < 0, "out of range": (y < low) | (y > high)}),
        (columns[1], lambda y: {"neither 0 (censored) nor 1": y.notna() & ~y.isin([0, 1])}),
    ):
        y = numbers[column]
        faults = {"no numbers": y.isna() & cells[column].notna()} | faults_of(y)
        found.append(told_and_missing(label, column, y, faults, cells, path, listener))
    time, event = found
    if n := int((time.isna() ^ event.isna()).sum()):
        listener.warning(
            f"{path}, {label}: {n} studies have {columns[0]} or {columns[1]} and not the other",
            "fill in; they count as missing",
        )
    return time.mask(event.isna()), event.mask(time.isna())


def class_numbers(label, cells, names, path, listener):
    """Cells of text (Series) -> the number of the class, 0 to K - 1; NaN for none.

    A cell is a class's name, in any case, or its number from 0; where names are numbers themselves,
    their names alone. That numbers are read is told; numbers that may count from 1, or stand among
    names, are an error.
    """
    plain, keys = cells.str.strip().str.casefold(), [str(x).strip().casefold() for x in names]
    found = plain.map({key: float(k) for k, key in enumerate(keys)})
    numbers, own = pd.to_numeric(plain, errors="coerce"), pd.to_numeric(pd.Series(keys), "coerce")
    if own.notna().any():
        by_number = {x: float(k) for k, x in enumerate(own) if x == x}
        return found.fillna(numbers.map(by_number)).astype(float)
    used = numbers[numbers.notna()]
    if not len(used):
        return found.astype(float)
    meant = ", ".join(f"{k} = {name}" for k, name in enumerate(names))
    odd = "beside names" if found.notna().any() else ""
    odd = odd or ("that never say 0" if not (used == 0).any() else "")
    odd = odd or (f"up to {used.max():g}" if used.max() >= len(names) else "")
    if odd:
        listener.error(
            f"{path}, {label}: numbers for classes {odd}: do they count from 1? ({meant} here)",
            "write the names of the classes",
        )
    listener.note(f"{path}, {label}: numbers are read as {meant}")
    return numbers.where(numbers.isin(range(len(names)))).astype(float)


def decide_type(table, task, path, listener):
    """Set task.type. Of labels whose kind is not said: 'binary' when every value of all of them is
    0, 1 or missing, else 'regression'."""
    open_ = [label for label in task.task_labels if not task.kind(label)]
    kinds = {label: task.kind(label) for label in task.task_labels}
    binary = {label: table[label].dropna().isin([0, 1]) for label in open_}
    if open_:
        kind = "binary" if all(where.all() for where in binary.values()) else "regression"
        kinds |= dict.fromkeys(open_, kind)
        which = "the task is" if len(open_) == len(kinds) else f"{some(open_)}:"
        listener.note(f"{which} {kind}, by the values of its labels")
    same = set(kinds.values())
    task.type = same.pop() if len(same) == 1 else kinds
    for label, where in binary.items():
        if kind == "regression" and where.mean() > 0.8:
            odd = table.loc[where.index[~where], label]
            because = f" because of {cells_of(odd.map('{:g}'.format), odd.index)}"
            listener.warning(
                f"{path}, {label}: {where.mean():.0%} of the values are 0 or 1, yet the task is a "
                f"regression{because * (len(odd) > 0)}",
                'say "type": "binary" in the task, or correct the values',
            )


def other_unit(label, units, others):
    """Whether two tasks give a label two units."""
    both = [x.get(label, "").replace(" ", "").casefold() for x in (units, others)]
    return all(both) and both[0] != both[1]


def warn_of_suspicious(table, task, path, listener):
    """Values that may mean something else than they say; they are used as they are."""
    for label in task.outputs.of_kind("regression", "survival"):
        unit, more = task.units.get(label, ""), " (valid_range of the task refuses some)"
        warn_of_suspicious_values(label, table[label].dropna(), unit, path, listener, more)


def warn_of_suspicious_values(label, y, unit, path, listener, more=""):
    """The same of one measurement's known values, by study id; more: what a user can do."""
    warn_of_one_and_two(label, y, path, listener)
    codes = y.isin(missing_codes(y.to_numpy()))
    rest = y[~codes]
    small, large = rest[(rest > 0) & (rest <= 1)], rest[rest > 1]
    mixed = len(small) and len(large) and large.max() <= 110 and large.min() > 10 * small.max()
    mixed = mixed and large.min() / 2 < 100 * small.median() < 2 * large.max()
    percent = unit.startswith("%")
    for odd, text, remedy in (
        (y[codes], "look like a code for 'missing'", "leave these cells empty"),
        (rest[rest > 100 if percent else rest > np.inf], "are above 100 %", "correct them"),
        (small if mixed else small[:0], "look like fractions among percentages", "use one"),
        (
            rest if percent and len(small) and rest.max() <= 1 else rest[:0],
            "are 1 or less, though the unit is %",
            "give them in percent, or mend the unit of the task",
        ),
    ):
        if len(odd):
            examples = cells_of(odd.map("{:g}".format), odd.index)
            listener.warning(
                f"{path}, {label}: {len(odd)} values {text}: {examples}",
                f"{remedy}; they are taken as they are{more}",
            )


def warn_of_one_and_two(label, y, path, listener):
    if set(y.dropna().unique()) == {1, 2}:
        listener.warning(
            f"{path}, {label}: every value is 1 or 2", "write 0 and 1, if these are no and yes"
        )


CODES = {int(digit * n) for digit in "789" for n in range(2, 7)} | {9}
CODES |= {-1} | {-x for x in CODES}


def missing_codes(y):
    """Values of a label at the end of its range, and apart from the rest, such as 99 and -9."""
    values, counts = np.unique(y, return_counts=True)
    found, values, counts = [], list(values), list(counts)
    while len(values) > 1 and values[-1] in CODES and values[-1] > 0:
        gap, spread = values[-1] - values[-2], values[-2] - values[0]
        if gap <= (0.1 if counts[-1] > 1 else 0.25) * spread:
            break
        found.append(values.pop())
        counts.pop()
    while len(values) > 1 and values[0] in CODES and values[0] < 0:
        gap, spread = values[1] - values[0], values[-1] - values[1]
        if values[1] < 0 and gap <= 0.25 * spread:
            break
        found.append(values.pop(0))
    return found


def fit_scaling(table, task, unlearnable=(), listener=RUN):
    """The published `input_norm_dict` from training labels (DataFrame, physical units).

    Per label: shift = |mean| - min; Box-Cox of value + shift for some (Box and Cox, 1964, lambda
    by maximum likelihood); then the mean and standard deviation of that. A label that gives
    numbers no model could be loaded with is an error.
    """
    chosen = PUBLISHED_BOXCOX if task.boxcox is None else task.boxcox
    scaling = {"type": "boxcox"}
    for label in task.outputs.of_kind("regression"):
        scaling[label] = {"shift": 0.0, "apply_boxcox": False, "mean": 0.0, "stdev": 1.0}
        if label in unlearnable:
            continue
        with np.errstate(all="ignore"):
            scaling[label] = entry = fit_label(table[label].dropna().to_numpy(), label in chosen)
        if fault := scaling_fault(entry):
            remedy = "leave it out of boxcox in the task" if entry["apply_boxcox"] else ""
            listener.error(
                f"label {label} cannot be scaled: {fault}",
                remedy or "give it in another unit, or correct its values",
            )
    return scaling


def fit_label(y, apply_boxcox):
    """One label's entry of the `input_norm_dict`, from its values in the training fold."""
    from scipy.stats import boxcox_normmax

    # Box-Cox takes positive numbers alone: the mean may be 0.
    least = 1e-3 * y.std() if apply_boxcox else 0.0
    entry = {"shift": float(max(abs(y.mean()), least) - y.min()), "apply_boxcox": apply_boxcox}
    z = y + entry["shift"]
    if apply_boxcox:
        try:
            entry["lmbda"] = float(boxcox_normmax(z, method="mle"))
        except (ValueError, OverflowError):
            entry["lmbda"] = np.nan
        z = boxcox(z, entry["lmbda"])
    return entry | {"mean": float(z.mean()), "stdev": float(z.std())}


def scaling_fault(entry):
    """Why a label's scaling cannot be used, or ''."""
    for name in ("shift", "mean", "stdev", *(["lmbda"] if entry.get("apply_boxcox") else [])):
        value = entry.get(name)
        if not isinstance(value, int | float | np.number) or not np.isfinite(value):
            return f"no finite number '{name}'"
        if abs(value) > 1e9 or (name == "stdev" and value < 1e-9):
            return f"{name} cannot be {value:g}"
    return ""


def boxcox(x, lmbda):
    return np.log(x) if lmbda == 0 else (x**lmbda - 1) / lmbda


def scale(values, labels, scaling):
    """Physical units (S, T) -> normalised (S, T), a new array; NaN stays.

    A value below what a label's Box-Cox can take becomes NaN; what has no scaling stays.
    """
    out = np.array(values, dtype=np.float64)
    for i, label in enumerate(labels):
        if not isinstance(s := scaling.get(label), dict):
            continue
        z = out[:, i] + s["shift"]
        if s["apply_boxcox"]:  # unseen values may lie below the training minimum
            z = boxcox(np.where(z > 0, z, np.nan), s["lmbda"])
        out[:, i] = (z - s["mean"]) / s["stdev"]
    return out


def unscale(values, labels, scaling):
    """Normalised (S, T) -> physical units (S, T), a new array; the inverse of `scale`.

    With a negative lambda Box-Cox ends at -1 / lambda: past it there is no value but NaN.
    """
    out = np.array(values, dtype=np.float64)
    for i, label in enumerate(labels):
        if not isinstance(s := scaling.get(label), dict):
            continue
        z = out[:, i] * s["stdev"] + s["mean"]
        if s["apply_boxcox"]:
            lmbda = s["lmbda"]
            base = z * lmbda + 1
            base = np.maximum(base, 1e-6) if lmbda > 0 else np.where(base > 0, base, np.nan)
            z = np.exp(z) if lmbda == 0 else base ** (1 / lmbda)
        out[:, i] = z - s["shift"]
    return out
