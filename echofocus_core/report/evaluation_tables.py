"""The tables of the page of an evaluation, from what a `report.evaluation.Report` computed."""

from datetime import date

import numpy as np

from echofocus_core import __version__
from echofocus_core.base.files import in_file_name
from echofocus_core.report.display import (
    Cell,
    Table,
    capital,
    cell_of,
    interval_text,
    metric_name,
    number,
    p_value,
)
from echofocus_core.study.kinds.binary import AT_THRESHOLD, BinaryOutcome

FEW_LABELS = 6  # for which the page compares all metrics with other models
SETTINGS = {  # fact -> its name on the page; facts that the page has elsewhere are not here
    "task": "Task",
    "dataset": "Data set",
    "fold": "Fold",
    "averaged": "Averaged models",
    "per": "Unit of analysis",
    "pool": "Studies of a patient",
    "target": "Rule of thresholds",
    "prevalence": "Prevalence for PPV and NPV",
    "first_study_only": "First study of each patient only",
    "n_folds": "Folds",
    "unseen": "Evidence that the studies are unseen",
    "labels_sha256": "SHA-256 of the label table",
    "predictions_sha256": "SHA-256 of the predictions",
}


def page_sections(report, described):
    """Section of the page -> its Tables. described: of `Report.describe`."""
    return {
        "participants": described.get("cohort", []),
        "model": described.get("model", []),
        "results": [
            *result_tables(report),
            *([fold_table(report)] if report.folds else []),
            *([survival_table(report)] if report.survival_rows else []),
            *report.recalibration,
            *(group_table(report, column) for column in report.by),
            *([comparison_table(report)] if report.comparison else []),
        ],
        "settings": [settings_table(report)],
        "metrics": [metrics_table(report)],
    }


def result_tables(report):
    """A Table for each kind of label and heading of its metrics."""
    by_key, tables = {(x.label, x.metric): x for x in report.estimates}, []
    for kind in dict.fromkeys(map(type, report.studies.outcomes)):
        outcomes = [o for o in report.studies.outcomes if type(o) is kind and o.n]
        metrics = [m for m in kind.METRICS if not all(o.lacks(m) for o in outcomes)]
        for heading in dict.fromkeys(m.heading for m in metrics if m.heading):
            shown = [m for m in metrics if m.heading == heading]
            head = ["Label", "n", "Positive", "Threshold"]
            rows = [
                [row_name(report, o), o.n, positive_text(o),
                 threshold_text(o) if heading == AT_THRESHOLD else "",
                 *(cell_of(by_key[o.label, m.name]) for m in shown)]
                for o in outcomes if not o.lacks(shown[0])
            ]  # fmt: skip
            head += [metric_name(m.name) for m in shown]
            if rows:
                tables.append(Table(heading, head, rows).without_empty_columns())
    return tables


def fold_table(report):
    return Table(
        f"Over the {len(report.folds)} folds of the cross-validation",
        ["Label", "Metric", "Pooled", "Mean of folds", "SD of folds"],
        [
            [report.plain(x.label), metric_name(x.metric, x.unit), cell_of(x), *map(number, pair)]
            for x, *pair in zip(report.estimates, *report.of_folds.values(), strict=True)
            if report.headlines.get(x.label) == x
        ],
        "Pooled: all test predictions together. Scores of different models are not on one "
        "scale, so that a pooled AUROC is biased downwards (Airola et al., Comput Stat Data "
        "Anal 2011;55:1828). Mean and SD: over the test folds.", n_text=2,
    )  # fmt: skip


def survival_table(report):
    return Table(
        "Calibration of survival",
        ["Label", "Years", "Group", "n", "Events by then", "Predicted", "Observed"],
        [
            [report.plain(r["label"]), f"{r['year']:g}", r["group"], r["n"], r["events"],
             number(r["predicted"]),
             Cell(number(r["observed"]), interval_text(r["ci_low"], r["ci_high"]))]
            for r in report.survival_rows
        ],
        "Observed (Kaplan-Meier, Greenwood's 95 % interval) and mean predicted survival at "
        "each year, by groups of predicted survival from low to high, of the first study of "
        "each patient. n/a: the follow-up of the group ends earlier.",
    )  # fmt: skip


def comparison_table(report):
    """Differences of the metrics with a heading, of many labels only of the headlines."""
    outcomes = report.studies.outcomes
    shown = {o.headline for o in outcomes}
    if len(outcomes) <= FEW_LABELS:
        shown |= {m.name for o in outcomes for m in o.METRICS if m.heading}
    return Table(
        "Comparison with other models",
        ["Label", "Other model", "Metric", "n", "This model", "Other", "Difference", "p",
         "p (Holm)"],
        [
            [report.plain(r["label"]), r["other"], metric_name(r["metric"], r["unit"]), r["n"],
             number(r["this_value"]), number(r["other_value"]),
             Cell(number(r["difference"]), interval_text(r["ci_low"], r["ci_high"])),
             p_value(r["p_value"]), p_value(r["p_holm"])]
            for r in report.comparison if r["difference"] is not None and r["metric"] in shown
        ],
        "Difference: this model minus the other, on the studies that both predict. Holm: p "
        "adjusted for the number of labels and models. All metrics are in "
        f"comparison_{report.name}.csv.", n_text=3,
    ).without_empty_columns()  # fmt: skip


def group_table(report, column):
    """The headline metrics of a column's groups, with the tests of interaction."""
    table, groups = report.tables[f"by_{in_file_name(column)}"], report.groups[column]
    tests = {(row.label, row.metric): row for row in table.itertuples(index=False)}
    return Table(
        f"Results by {column}",
        ["Label", capital(column), "n", "Positive", "Metric", "Value",
         "p (interaction)", "p (Holm)"],
        [
            [report.plain(x.label), group, x.n, positive_text(x), metric_name(x.metric, x.unit),
             cell_of(x), *map(p_value, tests[x.label, x.metric][-2:])]
            for group, x in groups
        ],
        "p (interaction): the probability of such differences between groups if all had the "
        "same value (Altman and Bland 2003), without studies where the value is missing; blank "
        "unless two groups have an interval, and for values of exactly 0 or 1 on the log-odds "
        "scale. Holm: adjusted for the number of labels.", n_text=2,
    ).without_empty_columns()  # fmt: skip


def chart_ends(report):
    """[lines] of the last boxes of the flow chart: one finding's results at its threshold."""
    (o, *others), boxes = report.studies.outcomes, []
    if others or not isinstance(o, BinaryOutcome) or o.threshold is None:
        return []
    for name, mask in (("positive", o.positive), ("negative", ~o.positive)):
        y = o.truth[o.usable & mask]
        counts = f"finding present: {y.sum():.0f}", f"finding absent: {(y == 0).sum()}"
        boxes.append([f"Index test {name}: {len(y)}", *counts])
    return boxes


def settings_table(report):
    per_patient = report.facts.get("per") == "patient"
    rows = [
        [name, report.facts.get(key)]
        for key, name in SETTINGS.items()
        if (key != "pool" or per_patient)
        and (key != "target" or any(o.threshold is not None for o in report.studies.outcomes))
    ]
    rows += [["Bootstrap resamples, seed", f"{report.n_boot}, {report.seed}"]]
    rows += [["Program", f"EchoFocus {__version__}"], ["Date", date.today().isoformat()]]
    rows = [[name, "yes" if x is True else x] for name, x in rows if x not in (None, "", False)]
    return Table("Settings", ["", ""], rows, n_text=2)


def metrics_table(report):
    rows = [
        [report.plain(x.label), metric_name(x.metric, x.unit), x.note, x.n,
         f"{x.value:.0f}" if x.note == "a count" else cell_of(x, note=False)]
        for x in report.estimates
    ]  # fmt: skip
    return Table("All metrics", ["Label", "Metric", "Note", "n", "Value"], rows, n_text=3)


def row_name(report, outcome):
    return report.plain(outcome.label) + (f" ({outcome.units})" if outcome.units else "")


def threshold_text(outcome):
    """Its threshold as text, '' without one."""
    if isinstance(outcome.threshold, np.ndarray):
        return "of each fold"
    return "" if outcome.threshold is None else number(outcome.threshold)


def positive_text(x):
    """The number of positive studies of an Outcome or Estimate, '' where it does not apply."""
    return x.n_positive if x.n_positive >= 0 else ""
