"""Who was studied: the table of patients and the flow chart of a report."""

from html import escape
from textwrap import wrap

import numpy as np
import pandas as pd

from echofocus_core.base.console import Collected
from echofocus_core.base.tables import ages_to_years
from echofocus_core.report.display import Table, capital
from echofocus_core.study.evaluation import SEX
from echofocus_core.study.labels import label_file, read_rows

AGE = ("age", "Age", "AGE", "age_years", "patient_age", "Alter", "alter")
SEXES = ("sex", "Sex", "SEX", "gender", "Gender", "Geschlecht", "geschlecht")
SEX_NAMES = {"Female": ["f"], "Male": ["m"], "Other": ["o", "other", "d", "divers"]}  # of SEX
FOLD_NAMES = {"train": "Training", "val": "Validation", "test": "Test"}


def read_people(task, dataset):
    """DataFrame of age in years and sex (of SEX, unless unknown) by study id, from the columns of
    the label table with such names; a column without a value is left out."""
    file, people = label_file(task, dataset), pd.DataFrame()
    rows = read_rows(file, [*AGE, *SEXES], Collected()) if file.path else None
    for column in () if rows is None else rows.columns.intersection([*AGE, *SEXES]):
        text, name = rows[column].str.strip(), "age" if column in AGE else "sex"
        numbers = pd.to_numeric(text.str.replace(",", "."), errors="coerce")
        values = ages_to_years(text).fillna(numbers) if name == "age" else None
        values = text.str.casefold().map(SEX) if values is None else values
        values = values.mask(values.isin(["u", "unknown"]))
        if values.notna().any() and name not in people:
            people[name] = values
    return people


def cohort_table(task, table, groups, people, names):
    """Table 1: each group's patients and labels.

    table: label table; groups: name -> study ids; people: of `read_people`; names: label -> its
    plain name.
    """
    rows = {"Studies": [], "Patients": [], "Studies per patient, median (range)": []}
    for eids in groups.values():
        part = table.loc[eids]
        sizes = part["pid"].value_counts()
        rows["Studies"].append(f"{len(part)}")
        rows["Patients"].append(f"{len(sizes)}")
        per_patient = f"{sizes.median():g} ({sizes.min()} to {sizes.max()})" if len(sizes) else ""
        rows["Studies per patient, median (range)"].append(per_patient)
        for name, text in [*describe_people(people, part["pid"]), *describe_labels(task, part)]:
            rows.setdefault(names.get(name, name), []).append(text)
    title = "Studies and patients" + " by fold" * (len(groups) > 1)
    return Table(
        title, ["", *groups], [[capital(name), *cells] for name, cells in rows.items()],
        "Findings: studies with the finding of those where it is known. Measurements: mean (SD).",
    )  # fmt: skip


def describe_people(people, pids):
    """[(row, text)] of the age at the first study and the sex of each patient.

    pids: patient by study id. Of a patient's studies, the lowest age and the first sex count.
    """
    rules = {name: {"age": "min", "sex": "first"}[name] for name in people}
    by_patient = people.reindex(pids.index).groupby(pids.to_numpy())
    patients = by_patient.agg(rules) if rules else people
    if "age" in rules:
        low, middle, high = patients["age"].quantile([0.25, 0.5, 0.75])
        text = f"{middle:.3g} ({low:.3g} to {high:.3g})" if middle == middle else ""
        yield "Age of patients at the first study in years, median (quartiles)", text
    if "sex" in rules:
        total = max(patients["sex"].count(), 1)
        for name, values in SEX_NAMES.items():
            n = patients["sex"].isin(values).sum()
            if name != "Other" or people["sex"].isin(values).any():
                yield f"{name} patients, n (%)", f"{n} ({n / total:.0%})".replace("%", " %")
    for name in rules:
        yield f"Patients without a known {name}", f"{patients[name].isna().sum()}"


def describe_labels(task, table):
    """[(label, text)]: prevalence, or mean and SD of a measurement."""
    for label in task.outputs.each:
        y = label.contrast(table).dropna()
        if label.kind == "regression":
            unit = task.units.get(label.name, "")
            deviation = f" ({y.std():.2g})" if len(y) > 1 else ""
            yield label.name, f"{y.mean():.3g}{deviation} {unit}".rstrip() if len(y) else ""
        else:
            yield label.name, label.summary(y).replace("%", " %")


# --------------------------------------------------------------------------------------- flow chart

WIDE, GAP, LINE = 205, 22, 17  # px of a box, between boxes, of a line
WRAP = 29  # letters of a line
BRANCH = 235  # left edge of the boxes of studies that are left out


def flow_chart(flow, ends=()):
    """SVG of the flow of participants (STARD), as text. flow: of `study_flow`; ends: [lines] of the
    boxes into which the last one divides."""
    parts, y, middle = [], 0, WIDE / 2
    before = 0  # lower edge of the last box on the main line
    for k, box in enumerate(flow):
        text = ("Left out: " if box["left_out"] else "Studies ") + box["text"]
        if k == len(flow) - 1:
            text = "Evaluated"
        counts = f"studies: {box['studies']}, patients: {box['patients']}"
        lines = [*wrap(text, WRAP), counts]
        height = LINE * len(lines) + 12
        if box["left_out"]:
            parts += [svg_box(BRANCH, y, lines), svg_arrow(middle, y + height / 2, BRANCH)]
        else:
            parts.append(svg_box(0, y, lines))
            if k:
                parts.append(svg_arrow(middle, before, middle, y))
            before = y + height
        y += height + GAP
    for k, lines in enumerate(ends):
        x = k * BRANCH
        parts.append(svg_box(x, y, lines))
        parts.append(svg_arrow(middle, before, x + middle, y))
    y += max((LINE * len(lines) + 12 + GAP for lines in ends), default=0)
    (n, m), wide = (flow[i]["studies"] for i in (0, -1)), BRANCH + WIDE + 2
    return (
        f'<svg viewBox="-1 -1 {wide} {y - GAP + 2}" width="{wide}" role="img" '
        f'aria-label="Flow of participants: {n} studies, {m} evaluated" fill="none" '
        'stroke="currentColor" font-family="Arial, sans-serif" font-size="13">\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


def svg_box(x, y, lines):
    """A box with lines of text; its title is the whole text, for screen readers and searches."""
    text = "".join(f'<tspan x="{x + 8}" dy="{LINE}">{escape(line)}</tspan>' for line in lines)
    return (
        f"<g><title>{escape(' '.join(lines))}</title>"
        f'<rect x="{x}" y="{y}" width="{WIDE}" height="{LINE * len(lines) + 12}" rx="3"/>'
        f'<text y="{y + 3}" fill="currentColor" stroke="none">{text}</text></g>'
    )


def svg_arrow(x, y, to_x, to_y=None):
    """A line with a head; right-angled where the ends differ in both directions."""
    to_y = y if to_y is None else to_y
    down = to_y != y
    path = f"M{x} {y}" + (f"V{(y + to_y) / 2}H{to_x}V{to_y}" if down else f"H{to_x}")
    a, b = (np.array([[-4, -7], [4, -7]]) if down else np.array([[-7, -4], [-7, 4]])) + [to_x, to_y]
    head = f"M{a[0]} {a[1]}L{to_x} {to_y}L{b[0]} {b[1]}Z"
    return f'<path d="{path}"/><path d="{head}" fill="currentColor"/>'
