"""The pages of an evaluation: figures, headings, sentences and one HTML file.

studies = Studies(eids, patients, [Binary("VSD", truth, probability, 0.31)])
Report(folder, "test_site", studies, facts={"model_name": "chd"}).write()
"""

import base64
import json
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from echofocus_core import __version__
from echofocus_core.base.console import UserError, some
from echofocus_core.base.files import atomic_path, in_file_name, write_table
from echofocus_core.base.options import Settings, validated
from echofocus_core.base.world import pick_device
from echofocus_core.report import curves
from echofocus_core.report.curves import NAMES, number, title_of, with_interval
from echofocus_core.study import statistics as st
from echofocus_core.study.answers import answered, compared, studies_of_answers, thresholds_for
from echofocus_core.study.config import read_config, resolve_settings
from echofocus_core.study.evaluation import (
    COLUMNS,
    HEADLINE,
    NOT_ASKED,
    Studies,
    fold_flow,
    fold_notes,
    group_columns,
    headlines_of,
    is_table,
    join_folds,
    metrics_json,
    metrics_table,
    pair_studies,
    studies_of_labels,
    studies_with_truths,
    study_flow,
    subgroups,
    unseen_notes,
    warn_of_truths,
)
from echofocus_core.study.labels import load_labels
from echofocus_core.study.loading import load_model, target_of
from echofocus_core.study.loop import report_unreadable, run_studies

FEW = 100  # positives below which an interval is said to be wide (Collins, Stat Med 2016;35:214)
SHOWN = 25  # labels on screen


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
    (cells as text in the studies' order, edges). others: name -> what `pair_studies` gave of
    Studies of another model. notes: what a reader must know. folds: Studies of each part of a
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


def evaluate_file(typed, compared):
    """`evaluate --predictions`: a table with predictions of anyone's model, named by study id.

    The truths are in it (<label>_Correct and PID, as `evaluate` writes), or in the label table.
    compared: a function of config, settings and Studies that gives those of --compare.
    """
    for name in ("model_name", "run_id", "subset", "folds", "target", "videos", "keep"):
        if typed.get(name) and (name, typed[name]) != ("subset", "all"):
            where = " (thresholds are its columns <label>_threshold)" * (name == "target")
            raise UserError(f"--predictions is a table of answers: leave out --{name}{where}")
    config, path = read_config(typed.get("config"), needed=False), Path(typed["predictions"])
    models = [name for name in typed.get("compare", ()) if not is_table(name)]
    by_config = models or typed.get("task") or typed.get("label_path")
    whole = None if by_config else studies_with_truths(path)
    table = None
    if whole:
        settings, studies = validated(Settings, typed), whole
    else:
        if not config.tasks:
            raise UserError(
                f"{path} is evaluated by a label table, which a config must name (without one, it "
                "has columns PID and <label>_Correct and is compared with tables alone)"
            )
        settings = resolve_settings("evaluate", typed, config)
        task, table = load_labels(config, settings.task, settings.dataset)
        studies = studies_of_labels(path, task, table)
    warn_of_truths(path, studies.outcomes)
    reasons = {} if table is None else dict.fromkeys(table.index, "no prediction")
    reasons |= dict.fromkeys(studies.eids, NOT_ASKED)
    studies = studies.chosen(settings.first_study_only, settings.sample_limit)
    if not studies.known.any():
        raise UserError(f"{path}: no study has both a truth and a prediction")
    reasons |= dict.fromkeys(studies.eids, "")
    flow = [] if table is None else study_flow(table, reasons)
    asked = {"subset": "test", "target": ""}  # of models to compare with, each by its own rule
    settings = settings.model_copy(update=asked)
    columns = group_columns(settings.by, config, settings) if settings.task else {}
    if settings.by and not columns:
        raise UserError("--by reads the label table: name a --task of the config")
    if settings.prevalence:
        studies = studies.at_prevalence(settings.prevalence)
    folder = path.with_name(f"{path.stem}_evaluation")
    name = f"all_{settings.dataset or path.stem}"
    about = {"run_id": "", "model_name": path.stem, "fold": "all"}
    others = compared(config, settings, studies)
    report_evaluation(folder, name, studies, flow, about, settings, columns, others)


def report_evaluation(folder, name, studies, flow, about, settings, columns, others):
    """Write the evaluation of some studies, pooled by patient if asked for, and print it.

    columns: of `group_columns`; others: what to compare with -> (Studies, notes).
    """
    pairs, notes = {}, unseen_notes(settings.subset, about.get("unseen"))
    notes += filter(None, [about.get("warning")])
    for other, (found, more) in others.items():
        *pairs[other], lacking = pair_studies(studies, found, other)
        notes += [f"{other}: {note}" for note in more] + lacking
    if settings.per == "patient":  # compared on the same studies of a patient
        pairs = {x: [s.per_patient(settings.pool)[0] for s in both] for x, both in pairs.items()}
        studies, lost = studies.per_patient(settings.pool)
        notes += [
            f"{label}: {n} patients whose studies differ in truth" for label, n in lost.items()
        ]
    names = ("task", "dataset", "per", "pool", "target", "prevalence", "first_study_only")
    facts = {n: getattr(settings, n) for n in names} | {"fold": settings.subset}
    by = {name: (cells.reindex(studies.eids), edges) for name, (cells, edges) in columns.items()}
    report = Report(
        folder, name, studies, facts | about, flow, by, pairs, settings.n_boot, settings.seed,
        notes,
    )  # fmt: skip
    print("\n".join(report.write()))


def evaluate_fold(settings, config, model, store, columns):
    """`evaluate` on the fold `settings.subset`."""
    settings = settings.model_copy(update={"target": settings.target or target_of(model)})
    thresholds = thresholds_for(model, config, settings, store)
    studies, flow, how, told = answered(model, config, settings, store, thresholds)
    name = f"{settings.subset}_{settings.dataset}"
    write_table(studies.saveout(), model.folder / f"saveout_{name}.csv")
    about = {"run_id": settings.run_id, "model_name": model.folder.name}
    about |= {"unseen": how if settings.subset == "test" else ""}
    about |= {"warning": "; ".join(told)} if told else {}
    others = compared(config, settings, studies)
    report_evaluation(model.folder, name, studies, flow, about, settings, columns, others)


def evaluate_folds(folder, settings, config, cohorts, store, how=()):
    """The evaluation of a cross-validation: each study by the fold that has not seen it.

    how: of `known_to_others`, how it is known that nothing else has.
    """
    parts, unreadable = [], {}
    for k, cohort in cohorts.items():
        model = load_model(folder / f"fold_{k}", config, device=pick_device(settings.device))
        found = run_studies(
            model.net,
            store,
            cohort.eids["test"],
            settings,
            unreadable=unreadable,
            label=f"fold {k}",
        )
        if not len(found):
            raise UserError(f"fold {k} has no study to test: take fewer --n_folds")
        parts.append(
            studies_of_answers(model, cohort.table, found, model.record.thresholds, settings)
        )
    report_unreadable(unreadable)
    studies = join_folds(parts)
    table = next(iter(cohorts.values())).table
    flow = fold_flow(table, [c.folds for c in cohorts.values()], studies.eids)
    name = f"cv_{settings.dataset}"
    write_table(studies.saveout(), folder / f"saveout_{name}.csv")
    facts = {n: getattr(settings, n) for n in ("run_id", "task", "dataset", "n_folds")}
    facts["target"] = target_of(model)
    facts |= {"model_name": folder.name, "fold": f"every fold of {len(parts)} (cross-validation)"}
    report = Report(
        folder, name, studies, facts, flow, n_boot=settings.n_boot, seed=settings.seed,
        notes=[*unseen_notes("test", "; ".join(how)), *fold_notes(parts)],
        folds=parts,
    )  # fmt: skip
    print("\n".join(report.write()))
