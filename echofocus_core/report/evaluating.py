"""`evaluate` around its numbers: what is asked of which studies, tables of anyone's predictions.

The answers of models come from echofocus.py.
"""

from pathlib import Path

from echofocus_core.base.console import UserError
from echofocus_core.base.options import Settings, validated
from echofocus_core.report import evaluation
from echofocus_core.study.config import read_config, resolve_settings
from echofocus_core.study.labels import load_labels, read_rows


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
    whole = None if by_config else evaluation.studies_with_truth(path)
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
        studies = evaluation.studies_of_table(path, task, table)
    evaluation.warn_of_truths(path, studies.outcomes)
    reasons = {} if table is None else dict.fromkeys(table.index, "no prediction")
    reasons |= dict.fromkeys(studies.eids, evaluation.NOT_ASKED)
    studies = studies.chosen(settings.first_study_only, settings.sample_limit)
    if not studies.known.any():
        raise UserError(f"{path}: no study has both a truth and a prediction")
    reasons |= dict.fromkeys(studies.eids, "")
    flow = [] if table is None else evaluation.flow_of(table, reasons)
    asked = {"subset": "test", "target": ""}  # of models to compare with, each by its own rule
    settings = settings.model_copy(update=asked)
    columns = columns_by(settings.by, config, settings) if settings.task else {}
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

    columns: of `columns_by`; others: what to compare with -> (Studies, notes).
    """
    pairs, notes = {}, evaluation.notes_of(settings.subset, about.get("unseen"))
    notes += filter(None, [about.get("warning")])
    for other, (found, more) in others.items():
        *pairs[other], lacking = evaluation.paired(studies, found, other)
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
    report = evaluation.Report(
        folder, name, studies, facts | about, flow, by, pairs, settings.n_boot, settings.seed,
        notes,
    )  # fmt: skip
    print("\n".join(report.write()))


def columns_by(texts, config, settings):
    """Column -> (its cells as text by study id, edges) of `--by`. Raises UserError."""
    wanted = {}
    for column, edges in map(evaluation.read_by, texts):
        if column == "eid":
            raise UserError("--by eid: each study would be a group; name a column that groups them")
        if column in wanted:
            raise UserError(f"--by {column} is said twice")
        wanted[column] = edges
    if not wanted:
        return {}
    dataset, task = config.datasets[settings.dataset], config.tasks[settings.task]
    path = dataset.label_path or task.label_path
    rows = read_rows(path, list(wanted), level=task.level)
    return {column: (rows[column], edges) for column, edges in wanted.items()}


def is_table(name):
    """Whether an entry of --compare is a table of predictions."""
    return Path(name).suffix.lower() in (".csv", ".tsv", ".txt", ".xlsx")
