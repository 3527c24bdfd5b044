"""The report of an evaluation: tables, figures and one HTML file.

studies = Studies(eids, patients, [BinaryOutcome("VSD", truth, probability, 0.31)])
Report(folder, "test_site", studies, facts={"model_name": "chd"}).write()
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from glob import escape
from itertools import groupby
from pathlib import Path
from string import ascii_uppercase

import numpy as np
import pandas as pd

from echofocus_core import __version__
from echofocus_core.base.console import RUN, Collected, UserError, count_of, some
from echofocus_core.base.figures import plot_history
from echofocus_core.base.files import atomic_path, in_file_name, sha256_file, write_table
from echofocus_core.base.world import pick_device
from echofocus_core.report import curves
from echofocus_core.report.cohort import FOLD_NAMES, cohort_table, flow_chart, read_people
from echofocus_core.report.curves import title_of
from echofocus_core.report.display import (
    as_base64,
    capital,
    export_tables,
    metric_name,
    number,
    with_interval,
)
from echofocus_core.report.evaluation_tables import chart_ends, page_sections
from echofocus_core.report.html import page_templates, write_text
from echofocus_core.report.methods import methods_paragraph, model_table
from echofocus_core.report.recalibration import (
    METHODS,
    recalibrate_folds,
    recalibration_rows,
    recalibration_table,
)
from echofocus_core.study import metrics as mt
from echofocus_core.study import statistics as st
from echofocus_core.study.evaluation import (
    COLUMNS,
    NOT_ASKED,
    Studies,
    fold_flow,
    fold_notes,
    group_columns,
    headlines_of,
    join_folds,
    metrics_json,
    pair_studies,
    studies_of_labels,
    studies_with_truths,
    study_flow,
    subgroups,
    unseen_notes,
    warn_of_truths,
)
from echofocus_core.study.fold_answers import (
    answer_fold,
    answer_validation,
    compared_studies,
    studies_of_answers,
    thresholds_for,
)
from echofocus_core.study.folds import stored_names
from echofocus_core.study.kinds.base import rarer
from echofocus_core.study.kinds.binary import BinaryOutcome
from echofocus_core.study.labels import label_file, load_labels
from echofocus_core.study.loading import load_model, released_task
from echofocus_core.study.loop import report_unreadable, run_studies
from echofocus_core.study.models import LoadedEnsemble

SVG = "http://www.w3.org/2000/svg"  # the namespace of a file
FEW = 100  # patients of the rarer class: fewer give uncertain estimates (Stat Med 2016;35:214)
MAX_LINES = 25  # labels on screen
FOREST = "Squares: the value; lines: 95 % intervals over patients."


@dataclass
class Report:
    """An evaluation. Its files are in `folder`, and their names end with `name`, such as test_site.

    facts: name -> text or number, for the JSON and the table of settings; by: column -> (cells in
    the order of the studies, edges); others: name of another model -> (Studies of this model, of
    the other model) by `pair_studies`; notes: warnings for the reader; folds: Studies of each fold
    of a cross-validation, to report the mean and SD over folds; names: label -> its plain name;
    describe: function that returns the Tables of the cohort and of the model; history: of
    `Training`, to plot, or that of each fold by its name; validation: function that returns the
    Studies of the validation folds, one of each model, to fit a recalibration.
    """

    folder: Path
    name: str
    studies: Studies
    facts: dict = field(default_factory=dict)
    flow: list = field(default_factory=list)
    by: dict = field(default_factory=dict)
    others: dict = field(default_factory=dict)
    n_boot: int = 1000
    seed: int = 0
    notes: list = field(default_factory=list)
    folds: list = field(default_factory=list)
    saveout: pd.DataFrame | None = None  # the answers and truths of each study, to write
    names: dict = field(default_factory=dict)
    describe: Callable | None = None
    history: pd.DataFrame | dict | None = None
    validation: Callable | None = None

    def compute(self):
        """Compute `estimates` and `tables`: metrics, by_<column> of each group, comparison."""
        studies = self.studies
        self.estimates = st.estimates(studies.outcomes, studies.patients, self.n_boot, self.seed)
        self.headlines = headlines_of(studies, self.estimates)
        self.of_folds = self.fold_columns()
        doubts = {name: self.facts[name] for name in ("unseen", "warning") if name in self.facts}
        metrics = pd.DataFrame([x.row() for x in self.estimates], columns=list(COLUMNS))
        self.tables = {"metrics": metrics.assign(**doubts, **self.of_folds)}
        self.groups = {column: self.groups_of(column) for column in self.by}
        if rows := [row for name in self.others for row in self.compare(name)]:
            table = pd.DataFrame(rows)
            table["p_holm"] = holm_by(table, "metric")
            self.tables["comparison"] = table

    def write(self):
        """Write tables, figures and the page; return the lines for the screen."""
        self.compute()
        self.figures, self.files = [], [f"metrics_{self.name}.json"]
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.saveout is not None:
            self.write_table("saveout", self.saveout)
        for name, table in self.tables.items():
            self.write_table(name, table)
        self.recalibrate()
        self.draw_panels()
        self.draw_forests()
        for column in self.by:
            self.draw_groups(column)
        rows = self.tables.get("comparison", pd.DataFrame()).to_dict("records")
        self.comparison = [{k: None if v != v else v for k, v in row.items()} for row in rows]
        self.write_more_tables()
        self.write_page()
        self.replace_record()
        lines = on_screen(self.headlines, [x for x in self.estimates if x.label == "mean"])
        headlines = {x.metric for x in self.headlines.values()}
        lines += [compared_line(row) for row in self.comparison if row["metric"] in headlines]
        lines += [f"note: {text}" for text in self.notes]
        lines = [line.replace("\u2212", "-") for line in lines]  # some terminals have no minus
        shown = [file for file in self.files if not file.endswith((".pdf", ".png"))]
        return [*lines, f"wrote {', '.join(shown)} to {self.folder}"]

    def replace_record(self):
        """Write the JSON with the metrics and the names of all files, and delete files of an
        earlier evaluation, by its JSON, that this one did not write."""
        path = self.folder / self.files[0]
        try:
            earlier = list(json.loads(path.read_text(encoding="utf-8"))["files"])
        except (OSError, ValueError, KeyError, TypeError):  # none, or of an earlier version
            earlier = []
        facts = {"n_bootstrap": self.n_boot, "seed": self.seed, "flow": self.flow}
        whole = metrics_json(self.estimates, self.facts | facts | {"files": self.files})
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(whole, indent=1, allow_nan=False))
        for file in self.folder.glob(f"*_{escape(self.name)}.*"):
            if file.name in earlier and file.name not in self.files:
                file.unlink()

    def plain(self, label):
        """The plain name of a label."""
        return capital(self.names.get(label, label))

    def fold_columns(self):
        """fold_mean and fold_sd for each row of the metrics of a cross-validation."""
        if not self.folds:
            return {}
        folds = [st.estimates(part.outcomes, part.patients, 0) for part in self.folds]
        values = pd.DataFrame([{(x.label, x.metric): x.value for x in fold} for fold in folds])
        values = values.reindex(columns=[(x.label, x.metric) for x in self.estimates])
        values = values.replace([np.inf, -np.inf], np.nan)
        return {"fold_mean": values.mean().to_numpy(), "fold_sd": values.std().to_numpy()}

    def write_table(self, name, rows):
        write_table(rows, self.folder / f"{name}_{self.name}.csv")
        self.files.append(f"{name}_{self.name}.csv")

    # ------------------------------------------------------------------------------------- figures

    def figure(self, file, title, draw, legend=FOREST, n_panels=1):
        """Draw a figure with draw(path=), and add it to the page."""
        path = self.folder / f"{file}_{self.name}"
        draw(path=path)
        self.files += [f"{path.name}.pdf", f"{path.name}.png"]
        self.figures.append({
            "title": title, "file": path.name, "png": as_base64(path), "legend": legend,
            "wide": n_panels > 1,
        })  # fmt: skip

    def draw_panels(self):
        """Draw the figures in PANELS that the kinds of labels have."""
        patients, bands = self.studies.patients, {}
        for file, panel in curves.PANELS.items():
            outcomes, more = [o for o in self.studies.outcomes if file in o.figures and o.n], {}
            if file == "confusion":
                outcomes = [o for o in outcomes if o.threshold is not None]
            if file == "recalibration":
                outcomes = [o for o in self.studies.outcomes if o.label in self.recalibrated]
                more = {
                    label: {"recalibrated": {METHODS[m].lower(): each[m] for m in shown}}
                    for label, each in self.recalibrated.items()
                    if (shown := [m for m in ("slope", "isotonic") if m in each])
                }
            if not outcomes:
                continue
            shown, title = curves.select_panels(outcomes), panel.title
            if file == "roc_curves":
                bands = curves.bands(shown, patients, self.seed)
            if len(shown) < len(outcomes):
                title += f" ({len(shown)} of {len(outcomes)} labels: those with the most examples)"
            titles = {x.label: x for x in self.estimates if x.metric == panel.metric}
            names = {o.label: self.plain(o.label) for o in shown}
            draw = partial(
                curves.panel_figure, shown, panel.draw, titles, patients=patients, bands=bands,
                names=names, more=more,
            )  # fmt: skip
            self.figure(file, title, draw, panel.legend, len(shown))

    def draw_forests(self):
        """Draw a forest plot for each headline metric that several labels have in one unit."""
        outcomes = [o for o in self.studies.outcomes if np.isfinite(self.headlines[o.label].value)]
        for metric in dict.fromkeys(o.headline for o in outcomes):
            rows = [self.headlines[o.label] for o in outcomes if o.headline == metric]
            if len(rows) > 1 and len({x.unit for x in rows}) == 1:
                name = metric_name(metric, rows[0].unit)
                more = f" of the first {curves.MAX_ROWS} labels" * (len(rows) > curves.MAX_ROWS)
                draw = partial(curves.forest, [(self.plain(x.label), x) for x in rows], name)
                self.figure(f"forest_{metric}", f"{name}{more}", draw, n_panels=2)

    # -------------------------------------------------------------------------------------- tables

    def recalibrate(self):
        """Recalibrate findings on the validation fold, and write the table."""
        self.recalibrated, self.recalibration = {}, []
        if self.validation and (validations := self.validation()):
            parts = self.folds or [self.studies]
            self.recalibrated, fitted = recalibrate_folds(parts, validations)
            findings = [o for o in self.studies.outcomes if isinstance(o, BinaryOutcome) and o.n]
            if absent := [o.label for o in findings if o.label not in self.recalibrated]:
                text = "No recalibration: a validation fold has only studies with, or without,"
                self.notes.append(f"{text} the finding: {some(absent)}")
        if self.recalibrated:
            patients, boot = self.studies.patients, (self.n_boot, self.seed)
            rows = recalibration_rows(self.recalibrated, self.estimates, patients, *boot)
            self.recalibration = [recalibration_table(rows, fitted, self.plain)]
            table = [
                {"method": m, "fitted_on": o.n, "fitted_positive": o.n_positive} | x.row()
                for label, m, each in rows
                for o in [fitted[label]]
                for x in each.values()
            ]
            self.write_table("recalibration", pd.DataFrame(table).drop(columns="p_value"))

    def write_more_tables(self):
        """Write the net benefit of findings and the calibration of survival."""
        self.survival_rows, benefits, cuts = [], [], np.linspace(0.01, 0.99, 99)
        for o in self.studies.outcomes:
            y, p = o.pairs()
            if "decision_curves" in o.figures and len(y):
                curves_of = {"model": p, "all": p * 0 + 1}
                columns = {name: mt.net_benefit(y, x, cuts) for name, x in curves_of.items()}
                rows = {"label": o.label, "threshold": cuts.round(2), **columns, "none": 0.0}
                benefits.append(pd.DataFrame(rows))
            if "survival_calibration" in o.figures:
                rows = o.calibration(self.studies.patients)
                self.survival_rows += [{"label": o.label} | row for row in rows]
        if benefits:
            self.write_table("decision_curves", pd.concat(benefits))
        if self.survival_rows:
            self.write_table("survival_calibration", pd.DataFrame(self.survival_rows))

    def groups_of(self, column):
        """The [(group, Estimate of a headline metric)] of a column; adds its table."""
        cells, edges = self.by[column]
        groups = subgroups(self.studies, cells, edges, self.n_boot, self.seed)
        rows = [{"column": column, "group": group} | x.row() for group, x in groups]
        table = pd.DataFrame(rows, columns=["column", "group", *COLUMNS])
        table = table.join(interactions(groups, self.studies.outcomes), on=["label", "metric"])
        self.tables[f"by_{in_file_name(column)}"] = table
        headlines = [(o.label, o.headline) for o in self.studies.outcomes if o.n]
        groups = [(g, x) for g, x in groups if (x.label, x.metric) in headlines]
        return sorted(groups, key=lambda pair: headlines.index((pair[1].label, pair[1].metric)))

    def draw_groups(self, column):
        """Draw the forest plots of a column's groups."""
        by, groups = f"by_{in_file_name(column)}", self.groups[column]
        shown = curves.select_panels([o for o in self.studies.outcomes if o.n])
        shown = [self.headlines[o.label] for o in shown]
        axes = sorted({(x.metric, x.unit) for x in shown})
        for metric, unit in axes:
            lines = []
            for whole in shown:
                if (whole.metric, whole.unit) == (metric, unit):
                    lines.append((self.plain(whole.label), whole))
                    lines += [(f"{column} {g}", x) for g, x in groups if x.label == whole.label]
            reference = lines[0][1].value if len(shown) == 1 else None
            name, labels = metric_name(metric, unit), [self.plain(x.label) for x in shown]
            draw = partial(curves.forest, lines, name, reference=reference, headings=labels)
            file = f"forest_{by}" + (f"_{metric}" if len(axes) > 1 else "")
            self.figure(file, f"{name} by {column}", draw, n_panels=2)

    def compare(self, name):
        """Rows with this model's metrics minus another's, on the studies that both predict."""
        first, second = self.others[name]
        differences = st.compare(
            first.outcomes, second.outcomes, first.patients, self.n_boot, self.seed
        )
        values, others = (
            {(e.label, e.metric): e.row()["value"] for e in st.estimates(x.outcomes, x.patients, 0)}
            for x in (first, second)
        )
        rows = []
        for x in differences:
            row, key = x.row(), (x.label, x.metric)
            both = {"this_value": values[key], "other_value": others[key]}
            rows.append({"other": name} | both | {"difference": row.pop("value")} | row)
        return rows

    def subtitle(self):
        """The fold and the task."""
        fold, task = self.facts.get("fold", "all"), self.facts.get("task")
        text = f"{capital(fold)} fold" if fold in FOLD_NAMES else capital(fold)
        return ("All studies" if fold == "all" else text) + (f", task {task}" if task else "")

    # ---------------------------------------------------------------------------------------- page

    def write_page(self):
        """Write the page, one file without scripts, links or network requests, and its tables for
        papers."""
        sections = page_sections(self, self.describe() if self.describe else {})
        tables = [table for part in sections.values() for table in part]
        self.files += export_tables(tables, self.folder / f"tables_{self.name}")
        chart = flow_chart(self.flow, chart_ends(self)) if self.flow else ""
        if chart:
            svg = chart.replace("<svg ", f'<svg xmlns="{SVG}" ', 1)
            write_text(self.folder / f"flow_{self.name}.svg", svg)
            self.files.append(f"flow_{self.name}.svg")
        curve = None
        if self.history is not None:
            draw = partial(plot_history, self.history, name=self.folder.name)
            whole = isinstance(self.history, dict)
            first = next(iter(self.history.values())) if whole else self.history
            n_panels = sum(x.startswith("val_") for x in first)
            title = (
                "Training (dashed) and validation of each fold; circles: best epochs"
                if whole
                else "Training"
            )
            self.figure("training", title, draw, "", n_panels=n_panels)
            curve = self.figures.pop()
        env = page_templates()
        env.filters["some"] = lambda labels: some(labels, 8)
        model = self.facts.get("model_name", "predictions")
        dataset = self.facts.get("dataset")
        page = env.get_template("evaluation.html").render(
            report=self, few=FEW, **uncertain_labels(self), sections=sections,
            title=f"Evaluation of model {model}" + (f" on dataset {dataset}" if dataset else ""),
            methods=methods_paragraph(self), chart=chart,
            curve=curve, version=__version__, today=date.today().isoformat(),
            subtitle=self.subtitle(), letters=[letter_of(k) for k in range(len(self.figures))],
        )  # fmt: skip
        write_text(self.folder / f"report_{self.name}.html", page)
        self.files.append(f"report_{self.name}.html")


def interactions(groups, outcomes):
    """DataFrame indexed by (label, metric): p_interaction between the groups of a column, and its
    adjustment p_holm for the labels that have the metric. groups: [(group, Estimate)]."""
    rows = []
    for o in outcomes:
        estimates = [x for group, x in groups if x.label == o.label and group != "missing"]
        for metric in dict.fromkeys(x.metric for x in estimates):
            of_metric = [x for x in estimates if x.metric == metric]
            p = st.interaction(of_metric, o.metric(metric).interval)
            rows.append({"label": o.label, "metric": metric, "p_interaction": p})
    table = pd.DataFrame(rows, columns=["label", "metric", "p_interaction"])
    table["p_holm"] = holm_by(table.rename(columns={"p_interaction": "p_value"}), "metric")
    return table.set_index(["label", "metric"])


def holm_by(table, column):
    """(n,): `p_value` adjusted by Holm within the rows that agree in a column."""
    p = pd.to_numeric(table["p_value"])
    return p.groupby(table[column]).transform(lambda x: st.holm(x.to_numpy()))


def on_screen(headlines, means=()):
    """Lines for the screen: labels with their headline metric, at most MAX_LINES, then means."""
    lines = [title_of(x).replace("\n", ": ") for x in list(headlines.values())[:MAX_LINES]]
    if len(headlines) > MAX_LINES:
        lines.append(f"... and {len(headlines) - MAX_LINES} more labels")
    metrics = {x.metric for x in headlines.values()}
    for x in means:
        if x.metric in metrics:
            lines.append(f"{x.note}: {metric_name(x.metric)} {with_interval(x)} {x.unit}".rstrip())
    return lines


def compared_line(row):
    value, low, high = (number(row[k]) for k in ("difference", "ci_low", "ci_high"))
    p = "" if row["p_value"] is None else f", p = {row['p_value']:.3g}"
    label, metric, other = row["label"], row["metric"], row["other"]
    return f"{label}: {metric} minus that of {other}: {value} ({low} to {high}{p})"


def letter_of(k):
    """A to Z, then AA to ZZ."""
    return (ascii_uppercase[k // 26 - 1] if k > 25 else "") + ascii_uppercase[k % 26]


def uncertain_labels(report):
    """Labels that the page warns about: small (texts; findings), few_patients (texts; others),
    undefined (note -> labels), no_interval (labels)."""
    small, few_patients = [], []
    for o in report.studies.outcomes:
        whole = st.count_patients(report.studies.patients, o.usable)
        if isinstance(o, BinaryOutcome):
            few = st.count_patients(report.studies.patients, rarer(o, o.truth == 1))
            small += [f"{report.plain(o.label)} ({few} of {whole})"] * (0 < few < FEW)
        else:
            few_patients += [f"{report.plain(o.label)} ({whole})"] * (0 < whole < FEW)

    def named(x):
        return f"{metric_name(x.metric)} of {report.plain(x.label)}"

    rows = report.headlines.values()
    undefined = sorted((x.note, named(x)) for x in rows if not np.isfinite(x.value) and x.note)
    undefined = {
        note: [text for _, text in pairs] for note, pairs in groupby(undefined, lambda x: x[0])
    }
    defined = [x for x in rows if np.isfinite(x.value)]
    no_interval = [named(x) for x in defined if report.n_boot and not np.isfinite(x.ci_low)]
    return {
        "small": small, "few_patients": few_patients, "undefined": undefined,
        "no_interval": no_interval,
    }  # fmt: skip


# -------------------------------------------------------------------------------------- evaluations


def evaluation_reports(job):
    """Yield the Report of each fold that `evaluate` evaluates, or of --predictions."""
    if job.settings.predictions:
        yield report_of_file(job)
        return
    job = job.with_source()
    settings = job.settings
    timed = job.model.outputs.of_kind("survival")
    if timed and (settings.per, settings.pool) == ("patient", "mean"):
        raise UserError(f"{timed[0]}: times cannot be averaged; use --pool first or last")
    columns = {
        column: (cells.rename(stored_names(cells.index, job.source.store)), edges)
        for column, (cells, edges) in group_columns(job).items()
    }
    for fold in dict.fromkeys(settings.folds or [settings.subset]):
        yield report_of_fold(job.but(subset=fold), columns)


def report_of_file(job):
    """The Report of a table of study ids and predictions of any model.

    The truths are in the label table, or in this table (<label>_Correct and PID, like the tables
    that `evaluate` writes).
    """
    settings, path, table = job.settings, Path(job.settings.predictions), None
    if job.task:
        task, table = load_labels(job.task, job.dataset, settings=settings)
        studies = studies_of_labels(path, task, table, settings.years)
    else:
        studies = studies_with_truths(path)
        if settings.first_study_only:
            RUN.warning(f"{path}: the first study of a patient is the first row")
    warn_of_truths(path, studies.outcomes)
    reasons = {} if table is None else dict.fromkeys(table.index, "no prediction")
    reasons |= dict.fromkeys(studies.eids, NOT_ASKED)
    studies = studies.subset(settings.first_study_only, settings.sample_limit)
    if not studies.usable.any():
        raise UserError(f"{path}: no study has both a truth and a prediction")
    evaluated = dict.fromkeys(studies.eids, "")
    flow = [] if table is None else study_flow(table, reasons | evaluated)
    columns, describe = group_columns(job), None
    if table is not None:
        describe = partial(describe_evaluated, job, task, table, studies.eids)
    studies = studies.at_prevalence(settings.prevalence)
    folder = path.with_name(f"{path.stem}_evaluation")
    name = f"all_{settings.dataset or path.stem}"
    facts = {"run_id": "", "model_name": path.stem, "fold": "all", "target": ""}
    facts["predictions_sha256"] = sha256_file(path)
    return report_of(folder, name, studies, flow, facts, job, columns, describe=describe)


def describe_evaluated(job, task, table, eids):
    """The Table of the evaluated studies of a label table."""
    people = read_people(task, job.dataset)
    return {"cohort": [cohort_table(task, table, {"Evaluated": eids}, people, task.names)]}


def report_of(folder, name, studies, flow, facts, job, columns, **more):
    """The Report of some studies, pooled by patient if requested.

    columns: of `group_columns`; more: fields of Report.
    """
    settings, pairs = job.settings, {}
    notes = unseen_notes(settings.subset, facts.get("unseen"))
    notes += filter(None, [facts.get("warning")])
    for other, (theirs, messages) in compared_studies(job, studies).items():
        *pairs[other], missing = pair_studies(studies, theirs, other)
        notes += [f"{other}: {note}" for note in messages] + missing
    if settings.per == "patient":  # compared on the same studies of a patient
        pairs = {x: [s.per_patient(settings.pool)[0] for s in both] for x, both in pairs.items()}
        studies, mixed = studies.per_patient(settings.pool)
        notes += [
            f"{x}: {count_of(n, 'patients')} whose studies differ in truth"
            for x, n in mixed.items()
        ]
    names = ("task", "dataset", "per", "pool", "target", "prevalence", "first_study_only")
    facts = {n: getattr(settings, n) for n in names} | {"fold": settings.subset} | facts
    facts |= digest_of_labels(job)
    by = {name: (cells.reindex(studies.eids), edges) for name, (cells, edges) in columns.items()}
    return Report(
        folder, name, studies, facts, flow, by, pairs, settings.n_boot, settings.seed, notes,
        names=plain_names(job), **more,
    )  # fmt: skip


def plain_names(job):
    """label -> its plain name, of the config or of a released model."""
    task = job.model.task if job.model else job.settings.task
    return released_task(task).get("names", {}) | (job.task.names if job.task else {})


def digest_of_labels(job):
    path = label_file(job.task, job.dataset).path if job.dataset else None
    return {"labels_sha256": sha256_file(path)} if path and path.is_file() else {}


def report_of_fold(job, columns):
    """The Report of the fold `settings.subset`. columns: of `group_columns`."""
    model = job.model
    averaged = isinstance(model, LoadedEnsemble)
    own_rule = job.settings.target in ("", model.target)
    job = job.but(target=job.settings.target or model.target)
    settings = job.settings
    answers = answer_fold(job, thresholds_for(job))
    studies, name = answers.studies, f"{settings.subset}_{settings.dataset}"
    facts = {"run_id": settings.run_id, "model_name": model.folder.name}
    facts |= {"unseen": answers.evidence if settings.subset == "test" else ""}
    facts |= {"warning": "; ".join(answers.warnings)} if answers.warnings else {}
    if averaged:
        names = ", ".join(f"{m.folder.parent.name}/{m.folder.name}" for m in model.members)
        facts |= {"averaged": names, "mean_thresholds": own_rule}
    recalibrates = settings.subset == "test" and not settings.sample_limit
    recalibrates = recalibrates and model.outputs.of_kind("binary")
    return report_of(
        model.folder, name, studies, answers.flow, facts, job, columns, saveout=studies.saveout(),
        describe=partial(describe_fold, job, answers), history=read_history(model.folder),
        validation=partial(validation_of, job, answers) if recalibrates else None,
    )  # fmt: skip


def validation_of(job, answers):
    """[Studies] of the validation fold, pooled by patient if requested; [] without any."""
    validation = answer_validation(job, answers.cohort, answers.folds)
    if validation and job.settings.per == "patient":
        validation = validation.per_patient(job.settings.pool)[0]
    return [validation] if validation else []


def describe_fold(job, answers):
    """Tables of the cohort by fold, of which one is of the evaluated studies, and of the model."""
    groups = {FOLD_NAMES[f]: list(answers.folds.index[answers.folds == f]) for f in FOLD_NAMES}
    groups[FOLD_NAMES.get(job.settings.subset, "All folds")] = answers.studies.eids
    groups = {name: eids for name, eids in groups.items() if eids}
    people = read_people(answers.task, job.dataset)
    people = people.rename(index=stored_names(people.index, job.source.store, Collected()))
    names = plain_names(job)
    cohort = cohort_table(answers.task, answers.cohort, groups, people, names)
    return {
        "cohort": [cohort],
        "model": [model_table(job.model, names, read_history(job.model.folder))],
    }


def read_history(folder):
    """The table of a training's epochs, or None for a model without it."""
    path = folder / "train_losses.csv"
    if not path.is_file():
        return None
    history = pd.read_csv(path)
    return history if {"epochs_trained", "train_loss", "val_loss"} <= set(history) else None


def evaluate_folds(folder, job, cohorts, store, evidence=()):
    """Evaluate a cross-validation: the predictions of a study are from the model that has not seen
    it.

    job: of the training; evidence: of `seen_elsewhere`, on whether another model or the encoder has
    seen the studies.
    """
    settings, parts, validations, unreadable = job.settings, [], [], {}
    for k, cohort in cohorts.items():
        model = load_model(folder / f"fold_{k}", device=pick_device(settings.device))
        for fold, thresholds, studies in (
            ("test", model.record.thresholds, parts), ("val", {}, validations)
        ):  # fmt: skip
            answers = run_studies(
                model.net, store, cohort.eids[fold], settings, unreadable=unreadable,
                label=f"{fold} fold {k}",
            )  # fmt: skip
            if not len(answers):
                raise UserError(f"fold {k} has no {fold} study: use a smaller --n_folds")
            studies.append(studies_of_answers(model, cohort.table, answers, thresholds, settings))
    report_unreadable(unreadable)
    histories = {f"fold {k}": read_history(folder / f"fold_{k}") for k in cohorts}
    histories = {fold: table for fold, table in histories.items() if table is not None}
    cohort, names = next(iter(cohorts.values())), job.task.names
    studies, table = join_folds(parts), cohort.table
    flow = fold_flow(table, [c.folds for c in cohorts.values()], studies.eids)
    name = f"cv_{settings.dataset}"
    facts = {n: getattr(settings, n) for n in ("run_id", "task", "dataset", "n_folds")}
    facts |= {"target": model.target, "model_name": folder.name}
    facts["fold"] = f"every fold of {len(parts)} (cross-validation)"
    facts |= digest_of_labels(job)
    notes = [*unseen_notes("test", "; ".join(evidence)), *fold_notes(parts)]
    people = read_people(cohort.task, job.dataset)
    people = people.rename(index=stored_names(people.index, store, Collected()))
    of_cohort = cohort_table(cohort.task, table, {"All folds": studies.eids}, people, names)
    of_model = model_table(model, names, None, of_folds=True)
    report = Report(
        folder, name, studies, facts, flow, n_boot=settings.n_boot, seed=settings.seed,
        notes=notes, folds=parts, saveout=studies.saveout(), names=names,
        describe=lambda: {"cohort": [of_cohort], "model": [of_model]},
        validation=lambda: validations, history=histories or None,
    )  # fmt: skip
    print("\n".join(report.write()))
