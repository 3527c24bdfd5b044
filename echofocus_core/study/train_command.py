"""The command `train`: settings, folds, one model, cross-validation or a grid."""

import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from echofocus_core.base import checkpoints, releases
from echofocus_core.base.console import RUN, UserError, nearest
from echofocus_core.base.files import lock, write_table
from echofocus_core.base.options import (
    ALL_FOLDS,
    grid_of,
    needs_videos,
)
from echofocus_core.base.world import pick_device
from echofocus_core.study.cohort import (
    cohort_of,
    digest_at_training,
    match_studies,
    stored_names,
    training_folds,
)
from echofocus_core.study.config import (
    MODELS,
    read_config,
    read_record,
    resolve_settings,
)
from echofocus_core.study.end_to_end import open_videos
from echofocus_core.study.labels import load_labels, other_unit
from echofocus_core.study.loading import (
    find_model_folder,
    folds_in_folder,
    load_model,
    model_folder,
    read_checkpoint,
)
from echofocus_core.study.loop import report_unreadable, run_studies
from echofocus_core.study.network import StudyModel
from echofocus_core.study.outputs import EVENT
from echofocus_core.study.sources import refuse_mixed, store_of, warn_of_other_input
from echofocus_core.study.splits import known_to_others
from echofocus_core.study.training import Training, is_finished
from echofocus_core.video import extract, panecho
from echofocus_core.video.store import open_store


def search(typed, world):
    """`train --grid`: each combination into <model>/grid_<i>, and a table by validation loss.

    As one of a SLURM array it trains the combination of its index alone. No test fold is read.
    """
    config = read_config(typed.get("config"))
    name = typed.get("model_name") or config.pick("task", typed.get("task", ""))
    folder = model_folder(name, typed.get("run_id", ""))
    combinations = grid_of(typed["grid"])
    mine = os.environ.get("SLURM_ARRAY_TASK_ID")
    if mine is not None and not (mine.isdecimal() and int(mine) < len(combinations)):
        raise UserError(f"SLURM_ARRAY_TASK_ID {mine}: the grid has 0 to {len(combinations) - 1}")
    rest = {k: v for k, v in typed.items() if k not in ("grid", "run_id")}
    rows = []
    for i, combination in enumerate(combinations):
        place = folder.absolute() / f"grid_{i}"
        if mine is None or int(mine) == i:
            text = ", ".join(f"{k} = {v}" for k, v in combination.items())
            print(f"grid {i} of {len(combinations)}: {text}")
            searched(place, combination)
            line = rest | combination | {"model_name": os.path.relpath(place)}
            train_model(line, world, searching=True)
        if best := searched(place, combination):
            rows.append({"model": f"{folder.name}/grid_{i}", **combination} | best)
    if rows and not world.rank:
        table = pd.DataFrame(rows).sort_values("val_loss", kind="stable")
        write_table(table, folder / "grid.csv")
        print(
            table.to_string(index=False) + f"\nwrote {folder / 'grid.csv'}; no test was looked at"
        )


def searched(place, combination):
    """The best epoch of a grid's model as a dict, or None: it is not finished. Raises UserError
    where the folder holds another combination's."""
    path = place / "last_checkpoint.pt"
    if not path.is_file():
        return None
    saved = read_checkpoint(path)
    trained = read_record(saved, path).settings
    for name, value in combination.items():
        if getattr(trained, name) != value:
            raise UserError(
                f"{place.parent.name}/{place.name} was trained with {name} = "
                f"{getattr(trained, name)}, not {value}: take another --model_name for this grid"
            )
    losses = [row[2] for row in saved["perf_log"]]
    if not is_finished(losses, trained):
        return None
    return {"val_loss": min(losses), "epoch": 1 + int(np.argmin(losses))}


def train_model(typed, world, searching=False):
    """What each process of `train` does, for one model or one cross-validation.

    Returns the arguments of `report.evaluation.evaluate_folds` after a cross-validation.
    """
    config = read_config(typed.get("config"))
    settings = training_settings(typed, config)
    if searching and settings.fold == ALL_FOLDS:
        raise UserError("--grid and --fold all are two searches: choose first, then cross-validate")
    begun_from = model_to_start_from(typed, settings, config)
    column = settings.split_column
    task, table = load_labels(config, settings.task, settings.dataset, split_column=column)
    if settings.stratify and settings.stratify not in task.task_labels:
        hint = nearest(settings.stratify, task.task_labels)
        raise UserError(f"--stratify {settings.stratify} is no label of {settings.task}{hint}")
    if settings.end_to_end and task.level == "video":
        raise UserError("--end_to_end learns labels of studies, not of single videos")
    if settings.end_to_end:
        store = open_videos(settings, config.datasets[settings.dataset], list(table.index), world)
    else:
        refuse_through(typed)
        store = store_of(config, settings)
    folder = folder_to_train_in(settings)
    whole = table.rename(index=stored_names(table.index, store))
    table = match_studies(whole, store, task, settings.sample_limit, settings.first_study_only)
    refuse_mixed(store, list(table.index), settings.allow_mixed, RUN)
    if begun_from and not settings.end_to_end:
        warn_of_other_input(begun_from, store, list(table.index))
    end_to_end, ids = settings.end_to_end, list(table.index)
    if end_to_end:
        encoder = list(panecho.seen_by(settings.weights)), True
    else:
        encoder = store.encoder_seen(ids, RUN)
    digest = partial(digest_at_training, begun_from, whole, store, task)
    known, how = known_to_others(whole, settings, encoder, begun_from, digest=digest)
    parts = range(settings.n_folds) if settings.fold == ALL_FOLDS else [settings.fold]
    cohorts = {}
    for k in parts:  # all before any is trained: what is wrong with one is said now
        own = settings.model_copy(update={"fold": k})
        if len(parts) > 1:
            print(f"fold {k} of {len(parts)}")
        folds = training_folds(table, own, task, known)
        refuse_small_steps(own, task, table[folds == "train"])
        cohorts[k] = own, cohort_of(task, table, folds, inherited_scaling(begun_from, task))
    for k, (own, cohort) in cohorts.items():
        place = folder / f"fold_{k}" if len(parts) > 1 else folder
        with nullcontext() if world.rank else lock(place, timeout=0):
            run = Training(place, own, cohort, store, begun_from, world, encoder[0])
            train_cohort(run)
        if settings.end_to_end:
            validate_extracted(run, config)
    if len(parts) > 1 and not world.rank:
        return folder, settings, config, {k: c for k, (_, c) in cohorts.items()}, store, how
    return None


def training_settings(typed, config):
    """The Settings of a training, judged together before any work is done."""
    config.pick("task", typed.get("task"))
    own = {k: v for k, v in typed.items() if k != "videos"}  # which name no dataset here
    settings = resolve_settings("train", own, config)
    settings.videos = typed.get("videos", "")
    if settings.end_to_end and not settings.batch_size:
        settings.batch_size = 1  # a study's images are large
    check_settings(settings)
    return settings


def model_to_start_from(typed, settings, config):
    """The LoadedModel of --init_from, whose architecture the settings take over, or None."""
    if not settings.init_from:
        return None
    folder = find_model_folder(settings.init_from)
    own = "" if releases.released(folder) else settings.task  # a released one has its own
    begun_from = load_model(folder, config, own)
    if not isinstance(begun_from.net, StudyModel):
        raise UserError(f"{settings.init_from} is no study-level model to start from")
    adopt_architecture(settings, begun_from.net, typed)
    if settings.end_to_end and begun_from.encoder_file and "weights" not in typed:
        settings.weights = str(begun_from.encoder_file)
        print(f"starting from the encoder of {folder.name} too")
    return begun_from


def folder_to_train_in(settings):
    """The model's folder. Raises UserError for one that holds another kind of thing."""
    folder = model_folder(settings.model_name, settings.run_id)
    if "," in settings.model_name:
        raise UserError(f"train makes one model, not {settings.model_name}")
    if folder.resolve() in (Path.cwd(), MODELS.resolve()):
        raise UserError(f"--model_name {settings.model_name} is no name for a model's folder")
    if folds_in_folder(folder) and settings.fold != ALL_FOLDS:
        raise UserError(f"{folder} is a cross-validation: go on with --fold all, or another name")
    if (folder / "best_checkpoint.pt").is_file() and settings.fold == ALL_FOLDS:
        raise UserError(f"{folder} is one model: take another --model_name for --fold all")
    if releases.read_source(folder):
        raise UserError(
            f"{folder} was downloaded and stays as it is: train under another --model_name, with "
            f"--init_from {folder.name} to start from it"
        )
    for place in [folder, *folds_in_folder(folder)]:
        refuse_finished_elsewhere(place)
    return folder


def refuse_finished_elsewhere(folder):
    """UserError for a folder with a model and nothing to go on from, as a model is shared, which a
    training would replace.

    A run that was killed between its first two checkpoints has said how it was begun, and has no
    history yet: it begins anew.
    """
    best, last = folder / "best_checkpoint.pt", folder / "last_checkpoint.pt"
    killed = (folder / "run.json").is_file() and not (folder / "train_losses.csv").is_file()
    if best.is_file() and not last.is_file() and not killed:
        raise UserError(
            f"{folder} holds a model and nothing to go on from: train under another --model_name, "
            f"with --init_from {folder.name} to start from it"
        )


def train_cohort(run):
    """One training to its end, from where it was left."""
    run.begin()
    while not run.finished:
        run.one_epoch()
    print(
        f"best validation loss {run.best:.4f} after epoch {run.best_epoch} of {run.epoch}; the "
        f"model is {run.folder}"
    )
    for unreadable in run.world.gather(run.unreadable):
        run.unreadable |= unreadable
    report_unreadable(run.unreadable)


def refuse_through(typed):
    """UserError for an option that has no effect without --end_to_end."""
    for name in typed:
        if needs_videos(name) or name == "videos":
            raise UserError(f"train takes --{name} with --end_to_end alone")


def validate_extracted(run, config):
    """The validation of a model that was trained through its encoder, on the published number of
    clips: extracted into the model's folder, as every later command extracts. The thresholds of
    the best checkpoint are those of this validation.

    What an earlier best epoch's encoder extracted there is replaced.
    """
    best = load_model(
        run.folder, config, run.settings.task, device=pick_device(run.settings.device)
    )
    how = vars(run.settings) | {"weights": str(best.encoder_file), "redo": True}
    studies = [run.store.files[eid] for eid in run.cohort.eids["val"]]
    folder = run.folder / "clip_embeddings"
    extract.extract(studies, folder, extract.settings_from(how))
    run.world.gather(None)
    store = open_store(folder)
    eids = [eid for eid in run.cohort.eids["val"] if eid in store.files]
    data = {"targets": run.cohort.targets, "outputs": run.cohort.outputs}
    val = run_studies(best.net, store, eids, run.settings, **data)
    metric = run.validated(val)
    if not run.world.rank:
        path, record = run.folder / "best_checkpoint.pt", best.record
        record.thresholds, record.hazards = run.thresholds, run.hazards
        checkpoints.save(read_checkpoint(path) | {"echofocus": record.to_save()}, path)
    print(f"validation on {len(val)} studies of {run.settings.n_clips} clips a video, extracted: "
          f"loss {val.losses.mean():.4f}, {metric}")  # fmt: skip


def refuse_small_steps(settings, task, training):
    """Cox's partial likelihood compares the studies of a step: refuse steps of one, and tell where
    many have no event."""
    for label in task.outputs.of_kind("survival"):
        if settings.batch_number < 2:
            raise UserError(
                f"{label} is learnt from the studies of a step: --batch_number 2 or more"
            )
        events = training[label + EVENT].mean() * settings.batch_number
        if events < 3:
            RUN.warning(
                f"a step of {settings.batch_number} studies has {events:.2g} events of {label}: "
                "nothing is learnt from one that has none",
                "a larger --batch_number",
            )


def adopt_architecture(settings, net, typed):
    """Take the architecture of the model to start from; UserError when another was typed."""
    own = dict(transformer_type=net.kind, encoder_depth=net.depth, tf_combine=net.combine)
    for name, value in own.items():
        if typed.get(name, value) != value:
            raise UserError(f"--init_from has {name} = {value}, not {typed[name]}")
        setattr(settings, name, value)


def check_settings(settings):
    """UserError for numbers that do not go together, before any work is done."""
    n, fold = settings.n_folds, settings.fold
    if n and not (n >= 3 and (0 <= fold < n or fold == ALL_FOLDS)):
        raise UserError(
            f"--n_folds must be 3 or more and --fold below it or all, not {n} and {fold}"
        )
    if settings.freeze and not settings.end_to_end:
        if settings.freeze != "aggregator":
            raise UserError(f"--freeze {settings.freeze} is for --end_to_end")
        if not settings.init_from:
            raise UserError(
                "--freeze aggregator keeps a model's weights: say which, by --init_from"
            )
    if settings.stratify and settings.split_column:
        raise UserError("--stratify and split_column both say the folds: leave one out")
    if settings.end_to_end and fold == ALL_FOLDS:
        raise UserError("--fold all reads clip embeddings: train end to end a fold at a time")
    if fold == ALL_FOLDS and not n:
        raise UserError("--fold all is for cross-validation: say --n_folds 5")
    if settings.n_folds and settings.split_column:
        raise UserError(
            f"--n_folds and split_column ({settings.split_column}) both say the folds: leave one "
            "out"
        )


def inherited_scaling(begun_from, task):
    """Label -> scaling of the model to start from, of those that it has learnt and the task has."""
    if not begun_from or not begun_from.scaling:
        return {}
    wanted = set(task.outputs.of_kind("regression")) - set(begun_from.record.unlearnt)
    return {
        label: entry
        for label, entry in begun_from.scaling.items()
        if label in wanted and not other_unit(label, task.units, begun_from.units)
    }
