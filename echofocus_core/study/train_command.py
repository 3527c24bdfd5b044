"""The command `train`: folds, one model, cross-validation or a grid."""

import os
from contextlib import nullcontext

import numpy as np
import pandas as pd

from echofocus_core.base import checkpoints, releases
from echofocus_core.base.console import PROGRAM, RUN, UserError, nearest, print_next
from echofocus_core.base.files import lock, write_table
from echofocus_core.base.options import ALL_FOLDS, grid_of
from echofocus_core.base.world import pick_device
from echofocus_core.study.config import read_record
from echofocus_core.study.end_to_end import open_videos
from echofocus_core.study.folds import (
    cohort_of,
    match_studies,
    seen_elsewhere,
    stored_names,
    training_folds,
)
from echofocus_core.study.job import check_settings, refuse_other_architecture
from echofocus_core.study.kinds.survival import EVENT
from echofocus_core.study.labels import load_labels, other_unit
from echofocus_core.study.loading import folds_in_folder, load_model, model_folder, read_checkpoint
from echofocus_core.study.loop import report_unreadable, run_studies
from echofocus_core.study.sources import open_embeddings, refuse_mixed, warn_of_other_input
from echofocus_core.study.training import Training, is_finished, refuse_model_without_checkpoint
from echofocus_core.video import extract, panecho
from echofocus_core.video.store import open_store


def search(job):
    """`train --grid`: each combination into <model>/grid_<i>, and a table by validation loss.

    In a SLURM array, each job trains only the combination of its index. No test fold is read.
    """
    folder = model_folder(job.settings.model_name, job.settings.run_id)
    combinations = grid_of(job.settings.grid)
    index = os.environ.get("SLURM_ARRAY_TASK_ID")
    if index is not None and not (index.isdecimal() and int(index) < len(combinations)):
        raise UserError(f"SLURM_ARRAY_TASK_ID {index}: the grid has 0 to {len(combinations) - 1}")
    rows = []
    for i, combination in enumerate(combinations):
        place = folder.absolute() / f"grid_{i}"
        if index is None or int(index) == i:
            text = ", ".join(f"{k} = {v}" for k, v in combination.items())
            print(f"grid {i} of {len(combinations)}: {text}")
            best_of(place, combination)  # refuses the folder of another combination
            one = job.but(**combination, model_name=os.path.relpath(place), run_id="")
            check_settings(one.settings)
            train_model(one)
        if best := best_of(place, combination):
            rows.append({"model": f"{folder.name}/grid_{i}", **combination} | best)
    if rows and not job.world.rank:
        table = pd.DataFrame(rows).sort_values("val_loss", kind="stable")
        write_table(table, folder / "grid.csv")
        print(
            table.to_string(index=False) + f"\nwrote {folder / 'grid.csv'}; no test fold was read"
        )
        print_next(f"{PROGRAM} evaluate --model_name {table['model'].iloc[0]}")


def best_of(place, combination):
    """The best epoch of a grid's model as a dict; None before its training is finished. Raises
    UserError if the folder has the model of another combination."""
    path = place / "last_checkpoint.pt"
    if not path.is_file():
        return None
    saved = read_checkpoint(path)
    trained = read_record(saved, path).settings
    for name, value in combination.items():
        if getattr(trained, name) != value:
            raise UserError(
                f"{place.parent.name}/{place.name} was trained with {name} = "
                f"{getattr(trained, name)}, not {value}: use another --model_name for this grid"
            )
    losses = [row[2] for row in saved["perf_log"]]
    if not is_finished(losses, trained):
        return None
    return {"val_loss": min(losses), "epoch": 1 + int(np.argmin(losses))}


def train_model(job):
    """Train one model or one cross-validation; every process calls this.

    Returns the arguments of `report.evaluation.evaluate_folds` after a cross-validation.
    """
    settings, start, world = job.settings, job.model, job.world
    refuse_other_architecture(settings, start)
    task, whole, store = read_labels_and_store(job)
    folder = folder_to_train_in(settings)
    table = match_studies(whole, store, task, settings.sample_limit, settings.first_study_only)
    encoder = seen_by_encoder(job, store, list(table.index))
    seen, evidence = seen_elsewhere(whole, settings, encoder, start)
    parts = range(settings.n_folds) if settings.fold == ALL_FOLDS else [settings.fold]
    cohorts = {}
    for k in parts:  # all before the first training, so that faults are reported now
        of_fold = settings.model_copy(update={"fold": k})
        if len(parts) > 1:
            print(f"fold {k} of {len(parts)}")
        folds = training_folds(table, of_fold, task, seen)
        refuse_small_steps(settings, task, table[folds == "train"])
        cohorts[k] = of_fold, cohort_of(task, table, folds, inherited_scaling(start, task))
    for k, (of_fold, cohort) in cohorts.items():
        place = folder / f"fold_{k}" if len(parts) > 1 else folder
        with nullcontext() if world.rank else lock(place, timeout=0):
            run = Training(place, of_fold, cohort, store, start, world, encoder[0])
            train_cohort(run)
        if settings.end_to_end:
            validate_extracted(run)
    if len(parts) > 1 and not world.rank:
        return folder, job, {k: cohort for k, (_, cohort) in cohorts.items()}, store, evidence
    return None


def read_labels_and_store(job):
    """(task with the kinds of its labels, label table, store of the training data)."""
    settings = job.settings
    task, table = load_labels(
        job.task, job.dataset, settings=settings, split_column=settings.split_column
    )
    if settings.stratify and settings.stratify not in task.task_labels:
        hint = nearest(settings.stratify, task.task_labels)
        raise UserError(f"--stratify {settings.stratify} is not a label of {settings.task}{hint}")
    if settings.end_to_end and task.level == "video":
        raise UserError("--end_to_end learns labels of studies, not of single videos")
    if settings.end_to_end:
        labelled = table.index[table[task.task_labels].notna().any(axis=1)]
        store = open_videos(settings, job.dataset, list(labelled), job.world)
        if settings.sample_limit:
            table = table[table.index.isin(list(store.files))]
    else:
        store = open_embeddings(job.dataset, task, settings)
    return task, table.rename(index=stored_names(table.index, store)), store


def seen_by_encoder(job, store, eids):
    """(list of Seen of the encoder, whether it is recorded), see `seen_elsewhere`; reports
    embeddings that were made in different ways."""
    if job.settings.end_to_end:
        return list(panecho.seen_by(job.settings.weights)), True
    refuse_mixed(store, eids, job.settings.allow_mixed, RUN)
    if job.model:
        warn_of_other_input(job.model, store, eids)
    return store.encoder_seen(eids, RUN)


def folder_to_train_in(settings):
    """The model's folder. Raises UserError if it has something else."""
    folder = model_folder(settings.model_name, settings.run_id)
    best, every_fold = folder / "best_checkpoint.pt", settings.fold == ALL_FOLDS
    other = f"train under another --model_name, with --init_from {folder.name} to start from it"
    for wrong, text in (
        ("," in settings.model_name, f"train makes one model, not {settings.model_name}"),
        (folds_in_folder(folder) and not every_fold,
         f"{folder} is a cross-validation: resume it with --fold all, or use another name"),
        (best.is_file() and every_fold,
         f"{folder} is one model: use another --model_name for --fold all"),
        (releases.read_source(folder), f"{folder} was downloaded and is not changed: {other}"),
    ):  # fmt: skip
        if wrong:
            raise UserError(text)
    for place in [folder, *folds_in_folder(folder)]:
        refuse_model_without_checkpoint(place)
    return folder


def train_cohort(run):
    """Train to the end, or resume a training, and report it."""
    run.run()
    falling = run.best_epoch == run.epoch == run.settings.epoch_lim
    print(
        f"best validation loss {-max(run.scores):.4f} after epoch {run.best_epoch} of {run.epoch}"
        + ", still falling: a larger --epoch_lim may help" * falling
        + f"; the model is {run.folder}"
    )
    for unreadable in run.world.gather(run.unreadable):
        run.unreadable |= unreadable
    report_unreadable(run.unreadable)


def validate_extracted(run):
    """Validate a model that was trained through its encoder on the published number of clips,
    extracted into the model's folder. The best checkpoint gets the thresholds of this validation.

    Embeddings of an earlier best epoch are replaced.
    """
    best = load_model(run.folder, device=pick_device(run.settings.device))
    options = {"weights": str(best.encoder_file), "redo": True}
    studies = [run.store.files[eid] for eid in run.cohort.eids["val"]]
    folder = run.folder / "clip_embeddings"
    extract.extract(studies, folder, run.settings.model_copy(update=options))
    run.world.gather(None)
    store = open_store(folder)
    eids = [eid for eid in run.cohort.eids["val"] if eid in store.files]
    data = {"targets": run.cohort.targets, "outputs": run.cohort.outputs}
    val = run_studies(best.net, store, eids, run.settings, **data)
    run.decide(val, best.record.settings.target)
    if not run.world.rank:
        path, changes = run.folder / "best_checkpoint.pt", {"thresholds": run.thresholds}
        record = best.record.model_copy(update=changes | {"hazards": run.hazards})
        checkpoints.save(read_checkpoint(path) | {"echofocus": record.to_save()}, path)
    print(f"validation on {len(val)} studies of {run.settings.n_clips} clips a video, extracted: "
          f"loss {val.losses.mean():.4f}, {run.metrics(val)}")  # fmt: skip


def refuse_small_steps(settings, task, training):
    """Refuse steps of one study for survival labels, and warn if many steps have no event: Cox's
    partial likelihood compares the studies of a step."""
    for label in task.outputs.of_kind("survival"):
        if settings.batch_number < 2:
            raise UserError(
                f"{label} is learnt from the studies of a step: --batch_number 2 or more"
            )
        events = training[label + EVENT].mean() * settings.batch_number
        if events < 3:
            RUN.warning(
                f"a step of {settings.batch_number} studies has {events:.2g} events of {label}: "
                "the model learns nothing from a step without an event",
                "use a larger --batch_number",
            )


def inherited_scaling(start, task):
    """Label -> scaling of the model to start from, for labels of the task that it has learnt."""
    if not start or not start.scaling:
        return {}
    labels = set(task.outputs.of_kind("regression")) - set(start.record.unlearnt)
    return {
        label: entry
        for label, entry in start.scaling.items()
        if label in labels and not other_unit(label, task.units, start.units)
    }
