"""Results of the encoder's training: predictions, metrics with intervals, figures, summaries.

Files in a run's folder, for val and test: preds/<task>/<fold>_<task>_preds.csv (one row per study)
and _video_preds.csv, metrics_<fold>.csv, figures, <fold>_summary.txt.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from echofocus_core.base.figures import plot_history
from echofocus_core.base.files import atomic_path, write_table
from echofocus_core.report.curves import PANELS, panel_figure, select_panels
from echofocus_core.report.display import metric_name, with_interval
from echofocus_core.study.outputs import label_of
from echofocus_core.study.statistics import estimates

MEANS = {  # published column -> (kind of task, metric)
    "mean_classification_auroc": ("classification", "auroc"),
    "mean_classification_ap": ("classification", "average_precision"),
    "mean_regression_r2": ("regression", "r2"),
    "mean_regression_mse": ("regression", "mse"),
    "mean_regression_mae": ("regression", "mean_absolute_error"),
}
KINDS = {  # type of a task -> kind of label
    "binary_classification": "binary",
    "multi-class_classification": "multiclass",
    "regression": "regression",
}
SHOWN = ("auroc", "average_precision", "r2", "mean_absolute_error", "median_absolute_error", "rmse")


def outcomes_of(tasks, predicted, truths):
    """One Outcome per task. predicted: DataFrame, columns (task, output); truths: column task."""
    return [
        label_of(task["name"], KINDS[task["type"]], task["class_names"]).outcome(
            truths[[task["name"]]].to_numpy(), predicted[task["name"]].to_numpy(),
            task.get("unit", ""),
        )
        for task in tasks
    ]  # fmt: skip


def validation_row(tasks, predicted, truths):
    """Metrics of one epoch as a dict: the published means over tasks, then each task's metrics."""
    means, each = {column: [] for column in MEANS}, {}
    for task, outcome in zip(tasks, outcomes_of(tasks, predicted, truths), strict=True):
        kind = "regression" if task["type"] == "regression" else "classification"
        values = outcome.metrics(np.ones((len(predicted), 1)))
        values = {name: float(value[0]) for name, value in values.items()}
        if kind == "regression":
            values["mse"] = values["rmse"] ** 2
        for column, (of_kind, metric) in MEANS.items():
            if of_kind == kind and metric in values:
                means[column].append(values[metric])
                each[f"{task['name']}_{metric}"] = values[metric]
    row = {
        column: float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
        for column, values in means.items()
    }
    return {"mean_auroc_r2": score_of(row)} | row | each


def score_of(row):
    """The mean of mean AUROC and mean R2, or the one that is defined."""
    both = row["mean_classification_auroc"], row["mean_regression_r2"]
    return float(np.nanmean(both)) if np.isfinite(both).any() else float("nan")


def write_results(run, fold, predictions):
    """Write the files of one fold. run: a train.Run; predictions: its Predictions."""
    tasks, truths = run.tasks, run.truths(predictions.studies)
    videos = run.cohort.videos
    for task in tasks:
        folder = run.folder / "preds" / task["name"]
        name = f"{fold}_{task['name']}"
        labels = run.labels.loc[predictions.videos.index]
        per_video = prediction_table(task, predictions.videos, labels)
        per_video.insert(0, "acc_num", videos.loc[per_video.index, "study"])
        write_table(per_video.rename_axis("video"), folder / f"{name}_video_preds.csv")
        per_study = prediction_table(task, predictions.studies, truths)
        write_table(per_study.rename_axis("acc_num"), folder / f"{name}_preds.csv")
    patients = videos.groupby("study")["patient"].first().loc[predictions.studies.index]
    outcomes = outcomes_of(tasks, predictions.studies, truths)
    computed = estimates(outcomes, patients.to_numpy(), run.settings.n_bootstrap)
    plot_predictions(outcomes, computed, run.folder, fold)
    history = pd.DataFrame(run.history).pivot(index="epoch", columns="phase", values="loss")
    history = history.rename_axis(index="epochs_trained").reset_index()
    history = history.rename(columns={"train": "train_loss", "val": "val_loss"})
    plot_history(history, run.folder / "training_progress")
    title = (
        f"{fold}: {len(predictions.studies)} studies, {len(predictions.videos)} videos, "
        f"best epoch {run.best_epoch}"
    )
    table, summary = run.folder / f"metrics_{fold}.csv", run.folder / f"{fold}_summary.txt"
    write_metrics(computed, table, summary, [title, *run.notes[fold]])


def prediction_table(task, predicted, truths):
    """DataFrame of a task's label and its prediction, or one probability per class."""
    values = predicted[task["name"]]
    table = pd.DataFrame({"label": truths[task["name"]]}, predicted.index)
    if task["type"].startswith("multi"):
        for i, name in enumerate(task["class_names"]):
            table[f"probability {name}"] = values[i]
    elif task["type"] == "regression":
        table["prediction"] = values[0]
    else:
        table[f"probability {task['class_names'][1]}"] = values[0]
    return table


def write_metrics(computed, table, summary, lines):
    """Write Estimates as a table, and the main ones below `lines` as text."""
    write_table(pd.DataFrame([estimate.row() for estimate in computed]), table)
    for x in computed:
        if x.metric in SHOWN:
            value = with_interval(x) if np.isfinite(x.value) else f"not defined ({x.note})"
            line = f"{x.label}: {metric_name(x.metric, x.unit)} {value}"
            lines = [*lines, line.replace("\u2212", "-")]
    with atomic_path(summary) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def plot_predictions(outcomes, computed, folder, fold):
    """Draw roc_curves_<fold>, scatter_plots_<fold> and roc_classes_<fold>."""
    for name in ("roc_curves", "scatter_plots", "roc_classes"):
        if shown := select_panels([o for o in outcomes if name in o.figures]):
            panel = PANELS[name]
            titles = {e.label: e for e in computed if e.metric == panel.metric}
            panel_figure(shown, panel.draw, titles, folder / f"{name}_{fold}")


def write_pooled(folder, runs, tasks, n_bootstrap, notes=()):
    """Write the pooled test predictions of all folds, with metrics and a summary per task.

    A task is left out if a fold could not learn it.
    """
    files = {t["name"]: Path("preds", t["name"], f"test_{t['name']}_preds.csv") for t in tasks}
    tasks = [t for t in tasks if all((run / files[t["name"]]).is_file() for run in runs)]
    for entry in tasks:
        task = entry["name"]
        parts = [pd.read_csv(run / files[task], dtype={"acc_num": str}) for run in runs]
        values = pd.concat([part.drop(columns=["acc_num", "label"]) for part in parts])
        table = pd.concat([p.assign(fold=k) for k, p in enumerate(parts)])
        write_table(table, folder / f"echonet-pediatric_{task}_preds.csv")
        truths = table[["label"]].set_axis([task], axis=1)
        outcomes = outcomes_of([entry], {task: values}, truths)
        patients = table["acc_num"].str.split("-").str[0].to_numpy()
        name = f"_{task}" if entry is not tasks[0] else ""
        title = f"{task} over {len(runs)} folds, {len(table)} studies"
        write_metrics(
            estimates(outcomes, patients, n_bootstrap),
            folder / f"echonet-pediatric_{task}_metrics.csv",
            folder / f"echonet-pediatric{name}_summary.txt", [title, *notes],
        )  # fmt: skip
