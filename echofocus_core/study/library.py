"""The arguments of the functions of `import echofocus` as the Job of a command."""

import os
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from echofocus_core.base.console import (
    RUN,
    UsageError,
    UserError,
    clean_text,
    count_of,
    nearest,
    reason_lines,
    some,
)
from echofocus_core.base.log import message_log
from echofocus_core.base.options import SYNONYMS, Settings, options_of, validate_as
from echofocus_core.base.world import World, pick_device
from echofocus_core.study.config import Dataset, Task, read_config
from echofocus_core.study.job import evaluation_job, model_job, training_job
from echofocus_core.study.loading import load_named, released_task
from echofocus_core.study.models import LoadedModel
from echofocus_core.video.store import holds_embeddings, write_study

LONGEST_ID = 200  # bytes of a study id, which is part of a file's name
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
    others = typed.get("compare")
    if any(
        isinstance(x, pd.DataFrame) for x in [others, *(others if type(others) is list else ())]
    ):
        raise UserError(
            "compare: names of models and paths of tables; write the DataFrame to a CSV"
        )
    RUN.notes.clear()
    with message_log(validate_as(Settings, typed)), TemporaryDirectory() as folder:
        RUN.folder = f"{folder}{os.sep}"
        try:
            yield make_job(command, typed, source, labels, task, model, Path(folder))
        except UserError as error:
            raise type(error)(str(error).replace(RUN.folder, "")) from error
        finally:
            RUN.folder = ""


def report_left_out(left_out, answered):
    """Report studies without a row (study id -> reason). UserError if no study is `answered`."""
    if not answered:
        reasons = some(f"{eid}: {reason}" for eid, reason in left_out.items())
        raise UserError(f"no study could be read: {reasons or 'there is none'}")
    if left_out:
        RUN.warning(f"{count_of(len(left_out), 'studies')} left out:{reason_lines(left_out)}")


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
    if not isinstance(task, str | list | tuple | dict):
        raise UserError(f"task: a list of labels, a dict or a name, not {type(task).__name__}")
    if not isinstance(task, str):
        name = Path(typed.get("model_name", "model")).name
        keys = task if isinstance(task, dict) else {"task_labels": list(task)}
        config = replace(config, tasks=config.tasks | {name: validate_as(Task, keys, "task")})
        task = name
    if task and not config.tasks and not released_task(task):
        raise UserError(f'no config with a task {task}; for a label of this name: task=["{task}"]')
    if task:
        typed["task"] = task
    elif not config.tasks and not model:
        raise UserError('task: name the labels, as in task=["ASD", "VSD"], or write a config')
    if command == "compare":
        if not (source is None or (isinstance(source, dict) and source)):
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
    if ids := {"pid", "eid"} & set(table.index.names) - set(table):
        table = table.reset_index(level=list(ids))
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
    studies = source if isinstance(source, dict) else {"study": source}
    if not studies:
        raise UserError("source: the dict has no study")
    refuse_repeats("study ids", studies)
    for eid, videos in studies.items():
        text = str(eid)
        plain = text.isprintable() and text[:1] not in ("", ".") and os.sep not in text
        if not plain or len(text.encode()) > LONGEST_ID:
            raise UserError(
                f"study {clean_text(text, 60)!r}: an id has 1 to {LONGEST_ID} bytes that "
                f"can be printed, does not contain {os.sep}, and does not begin with a dot"
            )
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
        if isinstance(arrays, list | tuple):
            arrays = list(map(as_array, arrays))
            if len(shapes := {x.shape for x in arrays}) > 1:
                raise UserError(
                    f"study {eid}: its videos have different shapes, {some(sorted(shapes))}; give "
                    "every video the same number of clips"
                )
        array = as_array(arrays)
    except (TypeError, ValueError) as error:
        raise UserError(f"study {eid}: not an array of clip embeddings: {error}") from error
    if array.ndim != 3 or not array.size or width not in (None, array.shape[2]):
        raise UserError(
            f"study {eid}: expected clip embeddings of shape (videos, clips, "
            f"{width or 'features'}); the shape is {array.shape}"
        )
    if not np.isfinite(array).all():
        raise UserError(
            f"study {eid}: {(~np.isfinite(array)).sum()} of its numbers are NaN or infinite; leave "
            "out these videos, or extract them again"
        )
    digits = len(str(len(array) - 1))  # names are sorted in the file
    if not isinstance(videos, dict):
        return [f"video {v:0{digits}}" for v in range(len(array))], array
    refuse_repeats(f"videos of study {eid}", videos)
    return list(map(str, videos)), array


def as_array(values):
    """A float32 array of numbers, an array or a tensor."""
    values = values.detach().cpu().float() if hasattr(values, "detach") else values
    return np.asarray(values, np.float32)


def refuse_repeats(what, keys):
    """UserError for keys of a dict that are the same text, such as 1 and "1"."""
    texts = pd.Series(list(map(str, keys)))
    if texts.duplicated().any():
        raise UserError(f"two {what} are {some(texts[texts.duplicated()])} when written as text")
