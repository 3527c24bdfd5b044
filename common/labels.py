"""Labels: a label table to numbers in physical units, and those to what a network learns.

A label table has a row a study: pid, eid and one column a label. What is odd in it is told to a
listener (`common.console`), in a run and in `check` alike; nothing is changed without a word.
"""

import numpy as np

from common.console import RUN, UserError, nearest, printable, some
from common.splits import GIVEN_FOLD, given_folds, refuse_split_patients
from common.tables import clean_ids, read_table, to_numbers

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
    if table is not None and not task.type:
        decide_type(table, task, path, listener)
    if table is not None:
        warn_of_suspicious(table, task, path, listener)
    return task, table


def read_labels(path, task, listener=RUN, split_column=""):
    """The label table: DataFrame indexed by study id (text), columns pid (text) and the labels.

    Labels are float64 in physical units. Values that are no numbers, out of range or, for a binary
    task, not 0 or 1 become missing and are told; a label that the table lacks is taken from
    `task.task_labels` once the listener has heard of it. `split_column` becomes GIVEN_FOLD.
    None where a column of ids is missing.
    """
    columns = [*task.task_labels, *([split_column] if split_column else [])]
    cells = read_cells(path, columns, listener)
    if cells is None:
        return None
    task.task_labels = [label for label in task.task_labels if label in cells]
    rows = cells[["pid", "eid"]]
    if task.task_labels:
        values = to_numbers(cells[task.task_labels], path, listener)
        rows = rows.join(usable_values(values, cells, task, path, listener))
    if split_column in cells:
        rows[GIVEN_FOLD] = given_folds(cells[split_column], path, listener)
    table = one_row_a_study(rows, path, listener)
    if GIVEN_FOLD in table:
        refuse_split_patients(table, split_column, path, listener)
    return table


def read_rows(path, columns, listener=RUN):
    """pid and some more columns of a label table, as text, one row a study (the index)."""
    cells = read_cells(path, columns, listener)
    return None if cells is None else one_row_a_study(cells, path, listener)


def read_cells(path, columns, listener):
    """pid, eid and those of `columns` that are there, as text; the index is the line in the file.

    Rows without ids are left out. None where there is no pid or no eid.
    """
    raw = read_table(path, listener, "label table")
    missing = [column for column in ("pid", "eid", *columns) if column not in raw]
    for column in missing:
        close = nearest(column, raw.columns).removeprefix("; ")
        listener.error(
            f"{path} has no column '{column}'",
            f"{close} " * bool(close) + "rename the column, or mend the config (a label table has "
            "pid, eid and one column a label)",
        )
    if {"pid", "eid"} & set(missing):
        return None
    raw = raw[["pid", "eid", *(c for c in columns if c not in missing)]]
    rows = raw.dropna(subset=["pid", "eid"]).copy()
    for column in ("pid", "eid"):
        rows[column] = clean_ids(rows[column], path, listener)
    if lost := len(raw) - len(rows):
        listener.warning(f"{path}: {lost} rows have no pid or no eid", "fill in; they are left out")
    return rows


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


def usable_values(values, cells, task, path, listener):
    """Values (DataFrame, a column a label) with NaN for what cannot be used, which is told."""
    values = values.copy()
    ranges = PUBLISHED_RANGES if task.valid_range is None else task.valid_range
    for label, y in values.items():
        faults = {"no numbers": y.isna() & cells[label].notna()}
        if task.type == "binary":
            faults["not 0 or 1"] = y.notna() & ~y.isin([0, 1])
            warn_of_one_and_two(label, y, path, listener)
        else:
            low, high = (-np.inf if x is None else x for x in ranges.get(label, (None, None)))
            high = np.inf if high == -np.inf else high
            faults["out of range"] = (y < low) | (y > high)
        for fault, where in faults.items():
            if where.any():
                examples = cells_of(cells.loc[where, label], cells.loc[where, "eid"])
                listener.warning(
                    f"{path}, {label}: {where.sum()} values are {fault}: {examples}",
                    "correct them; they count as missing",
                )
            values.loc[where, label] = np.nan
    return values


def decide_type(table, task, path, listener):
    """Set task.type: 'binary' when every value of every label is 0, 1 or missing."""
    binary = {label: table[label].dropna().isin([0, 1]) for label in task.task_labels}
    task.type = "binary" if all(where.all() for where in binary.values()) else "regression"
    listener.note(f"the task is {task.type}, by the values of its labels")
    for label, where in binary.items():
        if task.type == "regression" and where.mean() > 0.8:
            odd = table.loc[where.index[~where], label]
            because = f" because of {cells_of(odd.map('{:g}'.format), odd.index)}"
            listener.warning(
                f"{path}, {label}: {where.mean():.0%} of the values are 0 or 1, yet the task is a "
                f"regression{because * (len(odd) > 0)}",
                'say "type": "binary" in the task, or correct the values',
            )


def warn_of_suspicious(table, task, path, listener):
    """Values that may mean something else than they say; they are used as they are."""
    for label in task.task_labels if task.type == "regression" else ():
        y = table[label].dropna()
        warn_of_one_and_two(label, y, path, listener)
        codes = y.isin(missing_codes(y.to_numpy()))
        rest = y[~codes]
        small, large = rest[(rest > 0) & (rest <= 1)], rest[rest > 1]
        mixed = len(small) and len(large) and large.max() <= 110 and large.min() > 10 * small.max()
        mixed = mixed and large.min() / 2 < 100 * small.median() < 2 * large.max()
        percent = task.units.get(label, "").startswith("%")
        for odd, text, remedy in (
            (y[codes], "look like a code for 'missing'", "leave these cells empty"),
            (rest[rest > 100 if percent else rest > np.inf], "are above 100 %", "correct them"),
            (small if mixed else small[:0], "look like fractions among percentages", "use one"),
            (
                rest if percent and len(small) and rest.max() <= 1 else rest[:0],
                "are 1 or less, though the unit is %",
                "give them in percent, or mend the unit in the config",
            ),
        ):
            if len(odd):
                examples = cells_of(odd.map("{:g}".format), odd.index)
                listener.warning(
                    f"{path}, {label}: {len(odd)} values {text}: {examples}",
                    f"{remedy}; they are taken as they are (valid_range of the task refuses some)",
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
    for label in task.task_labels:
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

    A value below what a label's Box-Cox can take becomes NaN.
    """
    out = np.array(values, dtype=np.float64)
    for i, label in enumerate(labels):
        s = scaling[label]
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
        s = scaling[label]
        z = out[:, i] * s["stdev"] + s["mean"]
        if s["apply_boxcox"]:
            lmbda = s["lmbda"]
            base = z * lmbda + 1
            base = np.maximum(base, 1e-6) if lmbda > 0 else np.where(base > 0, base, np.nan)
            z = np.exp(z) if lmbda == 0 else base ** (1 / lmbda)
        out[:, i] = z - s["shift"]
    return out
