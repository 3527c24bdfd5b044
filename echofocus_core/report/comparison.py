"""The page and tables of `compare`: encoders and aggregators on the same unseen patients."""

from datetime import date

import numpy as np

from echofocus_core import __version__
from echofocus_core.base.console import RUN, some
from echofocus_core.base.figures import MARKERS, OKABE_ITO, PAGE, new_figure, save_figure
from echofocus_core.base.files import write_table
from echofocus_core.report.curves import forest
from echofocus_core.report.display import (
    Cell,
    Table,
    as_base64,
    capital,
    export_tables,
    interval_text,
    metric_name,
    number,
    p_value,
)
from echofocus_core.report.html import page_templates, write_text
from echofocus_core.study.compare import answer_cells, tables_of, train_cells, warnings_of
from echofocus_core.study.evaluation import group_columns
from echofocus_core.study.loading import model_folder


def compare_models(job):
    """Train all combinations, write their tables and page next to them, and return the table.

    None in all processes but the first, and while other processes still train.
    """
    finished, cells = train_cells(job)
    if job.world.rank:
        return None
    folder = model_folder(job.settings.model_name, job.settings.run_id)
    if len(finished) < len(cells):
        missing = some(cell.name for cell in cells if cell not in finished)
        print(f"{len(cells) - len(finished)} of {len(cells)} are not trained yet: {missing}")
        return None
    trained = answer_cells(job, finished)
    tables, headlines, references = tables_of(job, trained, group_columns(job))
    files = []
    for name, table in tables.items():
        write_table(table, folder / f"{name}.csv")
        files.append(f"{name}.csv")
    names = job.task.names if job.task else {}
    figures = draw(folder, trained, headlines, names)
    shown = page_tables(tables, references, names)
    files += export_tables([x for part in shown.values() for x in part], folder / "tables")
    write_page(folder, job, trained, shown, figures)
    cells = tables["cells"][["encoder", "aggregator", "fraction", "label", "metric", "value"]]
    print(cells.to_string(index=False, float_format="{:.3f}".format))
    for text in warnings_of(job, trained):
        RUN.warning(text)
    print(f"wrote {', '.join(files)} and comparison.html to {folder}")
    return tables["cells"]


def draw(folder, trained, headlines, names):
    """Draw a forest plot of each label, and learning curves; returns the figures of the page."""
    figures = []
    labels = dict.fromkeys(label for rows in headlines.values() for label in rows)
    whole = [x.cell for x in trained if x.cell.fraction == 1]
    fractions = sorted({x.cell.fraction for x in trained})
    for label in labels:
        rows = [(cell.name, headlines[cell][label]) for cell in whole if label in headlines[cell]]
        if rows:
            estimate, name = rows[0][1], capital(names.get(label, label))
            title = f"{name}: {metric_name(estimate.metric, estimate.unit)}"
            path = folder / f"forest_{len(figures)}"
            forest(rows, title, path)
            figures.append({"title": title, "png": as_base64(path), "wide": True})
    if len(fractions) > 1:
        label = "mean" if "mean" in labels else next(iter(labels))
        draw_learning_curves(folder / "learning_curves", trained, headlines, label)
        name = names.get(label, label)
        title, path = f"Learning curves, {name}", folder / "learning_curves"
        figures.append({"title": title, "png": as_base64(path), "wide": True})
    return figures


def draw_learning_curves(path, trained, headlines, label):
    """The metric of a label over the share of training patients, a line for each combination."""
    figure, axis = new_figure(figsize=(PAGE, 3.4), layout="constrained")
    lines = dict.fromkeys((x.cell.encoder, x.cell.aggregator) for x in trained)
    for i, line in enumerate(lines):
        cells = [x.cell for x in trained if (x.cell.encoder, x.cell.aggregator) == line]
        rows = [(cell.fraction, headlines[cell][label]) for cell in cells]
        x, y = np.array([(share, e.value) for share, e in rows]).T
        style = dict(color=OKABE_ITO[i % len(OKABE_ITO)], marker=MARKERS[i % len(MARKERS)])
        axis.plot(x, y, label=" ".join(line), **style)
        ends = np.array([(e.ci_low, e.ci_high) for _, e in rows]).T
        axis.vlines(x, *ends, color=style["color"], alpha=0.4)
    metric = next(iter(headlines.values()))[label].metric
    axis.set(xscale="log", xlabel="share of training patients", ylabel=metric_name(metric))
    fractions = sorted({x.cell.fraction for x in trained})
    axis.set_xticks(fractions, [f"{100 * x:g} %" for x in fractions], minor=False)
    axis.minorticks_off()
    axis.legend(bbox_to_anchor=(1.02, 1), loc="upper left")
    save_figure(figure, path)


COMBINATION = {"encoder": "Encoder", "aggregator": "Aggregator"}
MEASURED = {"label": "Label", "metric": "Metric"}
RESULTS = COMBINATION | {"fraction": "Share of patients"} | MEASURED
RESULTS |= {"value": "Value", "n": "n", "n_positive": "Positive"}
MODELS = COMBINATION | {
    "model": "Model", "fraction": "Share of patients", "train_studies": "Training studies",
    "width": "Features", "parameters": "Parameters", "train_seconds": "Training, s",
    "extract_seconds": "Extraction, s per study",
    "epochs": "Epochs",
}  # fmt: skip
DIFFERENCES = COMBINATION | {"minus": "Minus"} | MEASURED
DIFFERENCES |= {"value": "Difference", "p_value": "p", "p_holm": "Adjusted p"}
PERTURBED = COMBINATION | {"perturbed": "Images"} | MEASURED | {"value": "Change"}
GROUPS = COMBINATION | {"fraction": "Share of patients", "by": "Column", "group": "Group"}
GROUPS |= MEASURED | {"value": "Value", "n": "n"}
TEXTS = (*COMBINATION, "model", "minus", "perturbed", "fraction", "by", "group", *MEASURED)


def page_tables(tables, references, names):
    """Heading of the page -> its Tables. tables: of `tables_of`; names: label -> plain name."""
    first, best = references[0].cell.name, references[-1].cell.name
    note = f"Each combination minus {first}, the first"
    if best != first:
        note += f", and minus {best}, the best on these studies by mean rank over labels. The best "
        note += "was chosen on these test studies, so its result is optimistic"
    note += (
        ". AUROC by DeLong's test for clustered data, other metrics by the paired bootstrap; for "
        "errors, a negative difference is better. The adjusted p-value is Holm's over all "
        "differences from the same combination."
    )
    cells = tables["cells"].sort_values("label", kind="stable")
    models = cells.drop_duplicates(list(MODELS))
    sections = {
        "Results": [
            table_of(cells, RESULTS, "Results on the test studies", names),
            table_of(models, MODELS, "Models", names),
        ],
    }
    if "differences" in tables:
        table = table_of(tables["differences"], DIFFERENCES, "Differences", names, note)
        sections["Differences"] = [table]
    if "perturbed" in tables:
        note = "The metric on embeddings of changed images minus that on the plain ones, by the "
        note += "same model on the same studies."
        table = table_of(tables["perturbed"], PERTURBED, "Changed images", names, note)
        sections["Robustness"] = [table]
    if "groups" in tables:
        sections["Groups"] = [table_of(tables["groups"], GROUPS, "Results by group", names)]
    return sections


def table_of(frame, columns, title, names, note=""):
    """A Table of the columns {name: heading} of a DataFrame of estimates; `value` with its
    interval and note."""
    rows = []
    if "fraction" in frame and (frame["fraction"] == 1).all():
        columns = {name: text for name, text in columns.items() if name != "fraction"}
    for row in frame.to_dict("records"):
        shown = {name: cell_text(name, row.get(name)) for name in columns}
        if "value" in columns:
            limits = interval_text(row["ci_low"], row["ci_high"])
            shown["value"] = Cell(number(row["value"]), limits, row["note"] or "")
        if "metric" in columns:
            shown["metric"] = metric_name(row["metric"], row["unit"])
        if "label" in columns:
            shown["label"] = capital(names.get(row["label"], row["label"]))
        rows.append(list(shown.values()))
    n_text = sum(x in TEXTS for x in columns)
    return Table(title, list(columns.values()), rows, note, n_text).without_empty_columns()


def cell_text(name, value):
    """A cell of these tables as text; '' for a missing value."""
    if value is None or value != value:
        return ""
    if name == "fraction":
        return f"{100 * value:g} %"
    if name in ("p_value", "p_holm"):
        return p_value(value)
    if name == "extract_seconds":
        return f"{value:.2g}"
    return f"{value:.0f}" if name in ("n_positive", "train_seconds") else f"{value}"


def write_page(folder, job, trained, sections, figures):
    """Write comparison.html: one file without scripts, links or network requests."""
    patients = np.unique(trained[0].studies.patients)
    page = page_templates().get_template("comparison.html").render(
        settings=job.settings, version=__version__, sections=sections, figures=figures,
        n_studies=len(trained[0].studies), n_patients=len(patients),
        warnings=warnings_of(job, trained), today=date.today().isoformat(),
    )  # fmt: skip
    write_text(folder / "comparison.html", page)
