"""The page and tables of `compare`: encoders and aggregators on the same unseen patients."""

import base64

import numpy as np

from echofocus_core import __version__
from echofocus_core.base.console import RUN, some
from echofocus_core.base.figures import MARKERS, OKABE_ITO, new_figure, save_figure
from echofocus_core.base.files import write_table
from echofocus_core.report.curves import forest, metric_name, number
from echofocus_core.report.html import page_templates, write_text
from echofocus_core.study.compare import answer_cells, tables_of, train_cells
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
    figures = draw(folder, trained, headlines)
    write_page(folder, job, trained, tables, references, figures)
    shown = tables["cells"][["encoder", "aggregator", "fraction", "label", "metric", "value"]]
    print(shown.to_string(index=False, float_format="{:.3f}".format))
    for text in sorted({text for x in trained for text in x.warnings}):
        RUN.warning(text)
    print(f"wrote {', '.join(files)} and comparison.html to {folder}")
    return tables["cells"]


def draw(folder, trained, headlines):
    """Draw a forest plot of each label, and learning curves; [(title, PNG as base64)]."""
    figures = []
    labels = dict.fromkeys(label for rows in headlines.values() for label in rows)
    whole = [x.cell for x in trained if x.cell.fraction == 1]
    fractions = sorted({x.cell.fraction for x in trained})
    for label in labels:
        rows = [(cell.name, headlines[cell][label]) for cell in whole if label in headlines[cell]]
        if rows:
            title = f"{label}: {metric_name(rows[0][1].metric)}"
            forest(rows, title, folder / f"forest_{len(figures)}")
            figures.append((title, as_base64(folder / f"forest_{len(figures)}.png")))
    if len(fractions) > 1:
        label = "mean" if "mean" in labels else next(iter(labels))
        draw_learning_curves(folder / "learning_curves", trained, headlines, label)
        title = f"Learning curves, {label}"
        figures.append((title, as_base64(folder / "learning_curves.png")))
    return figures


def as_base64(path):
    return base64.b64encode(path.read_bytes()).decode()


def draw_learning_curves(path, trained, headlines, label):
    """The metric of a label over the share of training patients, a line for each combination."""
    figure, axis = new_figure(figsize=(6, 4), layout="constrained")
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
    axis.legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
    save_figure(figure, path)


def write_page(folder, job, trained, tables, references, figures):
    """Write comparison.html: one file without scripts, links or network requests."""
    env = page_templates()
    env.filters["number"] = lambda x: "n/a" if x is None else number(x)
    env.globals["metric_name"] = metric_name
    patients = np.unique(trained[0].studies.patients)
    warnings = {text for x in trained for text in x.warnings}
    if len({(x.cell.fraction, x.facts["train_studies"]) for x in trained}) > len(
        {x.cell.fraction for x in trained}
    ):
        warnings.add("Encoders without embeddings of some studies were trained on fewer studies.")
    page = env.get_template("comparison.html").render(
        settings=job.settings, version=__version__, first=references[0].cell,
        best=references[-1].cell,
        cells=tables["cells"].to_dict("records"), figures=figures,
        differences=tables["differences"].to_dict("records") if "differences" in tables else [],
        groups=tables["groups"].to_dict("records") if "groups" in tables else [],
        perturbed=tables["perturbed"].to_dict("records") if "perturbed" in tables else [],
        n_studies=len(trained[0].studies), n_patients=len(patients),
        warnings=sorted(warnings),
    )  # fmt: skip
    write_text(folder / "comparison.html", page)
