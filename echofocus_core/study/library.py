"""The arguments of the functions of `import echofocus` as the Job of a command."""

import os
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from echofocus_core.base.console import RUN, UsageError, UserError, nearest
from echofocus_core.base.log import message_log
from echofocus_core.base.options import SYNONYMS, Settings, options_of, validate_as
from echofocus_core.base.world import World, pick_device
from echofocus_core.study.config import Dataset, Task, read_config
from echofocus_core.study.job import evaluation_job, model_job, training_job
from echofocus_core.study.loading import load_named
from echofocus_core.study.models import LoadedModel
from echofocus_core.video.store import holds_embeddings, write_study

ONLY_FILES = ("out", "embed_file", "page", "map", "curves")  # options of files, not of tables
OF_ARGUMENTS = ("label_path", "embedding_path", "videos", "predictions", "datasets", "encoders")
TRAINS = ("train", "compare")


@contextmanager
def library_job(command, options, source=None, labels=None, task="", model=None):
    """Yield the Job of a command for the arguments of a library function, see echofocus.py.

    DataFrames and arrays are written to a temporary folder, which exists in the block. Raises
    UserError.
    """
    arguments = OF_ARGUMENTS if command in TRAINS else (*OF_ARGUMENTS, "model_name", "run_id")
    allowed = options_of(command).keys() - {*ONLY_FILES, *arguments}
    for name in options:
        if SYNONYMS.get(name, name) not in allowed:
            raise UsageError(f"{command}() has no option {name}{nearest(name, allowed)}")
    typed = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in options.items()}
    RUN.notes.clear()
    with message_log(validate_as(Settings, typed)), TemporaryDirectory() as folder:
        try:
            yield make_job(command, typed, source, labels, task, model, Path(folder))
        except UserError as error:
            raise type(error)(str(error).replace(f"{folder}{os.sep}", "")) from error


def make_job(command, typed, source, labels, task, model, folder):
    """The Job for the arguments of `library_job`; adds them to the typed options."""
    config = read_config(typed.get("config", ""), needed=False)
    if isinstance(model, pd.DataFrame):
        typed["predictions"], model = path_of(model, folder / "predictions.csv"), None
    elif command not in TRAINS:
        model = model_of(model, config.tasks, typed.get("device", ""))
        typed.setdefault("device", str(next(model.net.parameters()).device))
    if labels is not None:
        typed["label_path"] = path_of(labels, folder / "labels.csv")
    if not isinstance(task, str):
        name = Path(typed.get("model_name", "model")).name
        keys = task if isinstance(task, dict) else {"task_labels": list(task)}
        config = replace(config, tasks=config.tasks | {name: validate_as(Task, keys, "task")})
        task = name
    if task:
        typed["task"] = task
    elif not config.tasks and not model:
        raise UserError('task: name the labels, as in task=["ASD", "VSD"], or write a config')
    if command == "compare":
        if not isinstance(source, dict | None):
            raise UserError("encoders: name them, as in {'panecho': 'emb/panecho'}")
        paths = {name: paths_of(each, folder / name) for name, each in (source or {}).items()}
        typed["encoders"] = [f"{name}={','.join(x)}" for name, x in paths.items()]
        source = next(iter(paths.values()), None)
    if source is not None:
        config = add_source(command, source, typed, config, folder, model)
    elif not config.datasets and "predictions" not in typed:
        raise UserError("source: give the studies' clip embeddings or videos, or write a config")
    typed = validate_as(Settings, typed).model_dump(exclude_unset=True)
    if command in TRAINS:
        return training_job(command, typed, World(), config)
    make = evaluation_job if command == "evaluate" else model_job
    return make(command, typed, World(), config, model)


def model_of(model, tasks, device):
    """A LoadedModel, from its name or path too. Raises UserError."""
    if isinstance(model, str | os.PathLike):
        return load_named(os.fspath(model), "", tasks, device=pick_device(device))
    if not isinstance(model, LoadedModel):
        kind = type(model).__name__
        raise UserError(f"expected a model of echofocus.load, its name or its path, not a {kind}")
    return model


def path_of(table, path):
    """The path of a table; a DataFrame is written to `path` as CSV, with the ids in its index."""
    if isinstance(table, str | os.PathLike):
        return os.fspath(table)
    if not isinstance(table, pd.DataFrame):
        raise UserError(f"expected a DataFrame or a path, not a {type(table).__name__}")
    if {"pid", "eid"} & set(table.index.names):
        table = table.reset_index()
    table.to_csv(path, index=False)
    return str(path)


def add_source(command, source, typed, config, folder, model):
    """Add the source of studies to the typed options; returns the Config, with a Dataset for
    several encoders. Raises UserError."""
    is_path = isinstance(source, str | os.PathLike)
    encodes = command not in TRAINS or typed.get("end_to_end")
    if is_path and encodes and not holds_embeddings(Path(source)):
        typed["videos"] = os.fspath(source)
        return config
    paths = paths_of(source, folder / typed.get("dataset", "arrays"), model)
    if len(paths) == 1:
        typed["embedding_path"] = paths[0]
        return config
    name = typed.setdefault("dataset", "+".join(Path(x).stem for x in paths))
    dataset = validate_as(Dataset, {"embedding_path": paths}, "source")
    return replace(config, datasets=config.datasets | {name: dataset})


def paths_of(source, folder, model=None):
    """The paths of a source of clip embeddings; arrays are written into `folder`. A model gives the
    number of features. Raises UserError."""
    if isinstance(source, str | os.PathLike):
        return [os.fspath(source)]
    if isinstance(source, list) and all(isinstance(x, str | os.PathLike) for x in source):
        return [os.fspath(x) for x in source]
    if model and (encoders := list(model.record.encoders)):
        raise UserError(
            f"{model.folder.name} reads the clip embeddings of {' and '.join(encoders)}: give a "
            "list of their folders, not an array"
        )
    folder.mkdir(parents=True)
    for eid, videos in (source if isinstance(source, dict) else {"study": source}).items():
        if str(eid).startswith(".") or os.sep in str(eid):
            raise UserError(f"study {eid}: an id must not contain {os.sep} or begin with a dot")
        names, array = clips_of(eid, videos, model.net.width if model else None)
        starts = np.zeros(array.shape[1], np.int64)
        rows = {name: (starts, clips[None]) for name, clips in zip(names, array, strict=True)}
        write_study(folder / f"{eid}.hdf5", rows, {}, {})
    return [str(folder)]


def clips_of(eid, videos, width=None):
    """(names of videos, float32 array (V, C, D)) of a study's array, or of a dict of videos.

    width: D, None for any. Raises UserError.
    """
    arrays = list(videos.values()) if isinstance(videos, dict) else videos
    try:
        array = arrays.detach().cpu() if hasattr(arrays, "detach") else arrays
        array = np.asarray(array, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"study {eid}: not an array of clip embeddings: {error}") from error
    fits = array.ndim == 3 and array.size and width in (None, array.shape[2])
    if not fits or not np.isfinite(array).all():
        raise UserError(
            f"study {eid}: expected finite clip embeddings of shape (videos, clips, "
            f"{width or 'features'}); the shape is {array.shape}"
        )
    digits = len(str(len(array) - 1))  # names are sorted in the file
    numbers = [f"video {v:0{digits}}" for v in range(len(array))]
    return list(videos) if isinstance(videos, dict) else numbers, array
