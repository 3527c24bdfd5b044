"""Study and video embeddings of a model, as HDF5 files."""

from pathlib import Path

import h5py

from echofocus_core.base.console import UserError, progress
from echofocus_core.base.files import atomic_path
from echofocus_core.base.hdf5 import UNREADABLE, new_hdf5, open_hdf5
from echofocus_core.study.folds import sample_ids
from echofocus_core.study.loop import report_unreadable, run_studies
from echofocus_core.study.network import EachQuery
from echofocus_core.study.sources import warn_of_other_input
from echofocus_core.video.single_videos import VideosAsStudies
from echofocus_core.video.store import UnreadableStudy


def is_embedded(path):
    """Whether `embed` wrote a file."""
    try:
        with open_hdf5(path) as f:
            return {"dataset", "task", "model_name"} <= set(f.attrs)
    except UNREADABLE:
        return False


def check_options(job):
    """UserError for options of `embed` that do not fit together or the model."""
    settings = job.settings
    if settings.map and settings.level == "video":
        raise UserError("--map plots studies: omit --level video")
    each = getattr(job.model.net, "embeds_labels", False)
    if not settings.pool_queries and (settings.map or not each):
        raise UserError("--no_pool_queries works only with multiquery models, and not with --map")


def embed_source(job):
    """Write the embeddings of a job's studies; returns the file's path."""
    model, settings, unreadable, n = job.model, job.settings, {}, 0
    eids = sample_ids(job.source.eids, settings.sample_limit)
    warnings = warn_of_other_input(model, job.source.store, eids)
    name = f"{'' if settings.level == 'study' else 'video_'}embeddings_{settings.dataset}"
    path = Path(settings.embed_file or model.folder / f"{name}_{settings.task}.h5")
    with atomic_path(path) as temporary, new_hdf5(temporary) as f:
        for eid, names, embeddings in embeddings_of(job, eids, unreadable):
            n += 1 if settings.level == "study" else len(names)
            if settings.level == "study":
                f[eid] = embeddings
                continue
            f[f"{eid}/embeddings"] = embeddings
            f[eid].create_dataset("videos", data=names, dtype=h5py.string_dtype())
        if settings.level == "video":
            f.attrs["level"] = "video"
        elif not settings.pool_queries:
            f.attrs["labels"] = model.outputs.names
        f.attrs["dataset"], f.attrs["task"] = settings.dataset, settings.task
        f.attrs["model_name"] = model.folder.name
        if warnings:
            f.attrs["warning"] = "; ".join(warnings)
        report_unreadable(unreadable)
        if not n:
            raise UserError("no study could be read")
    print(f"wrote {n} {settings.level} embeddings to {path}")
    return path


def embeddings_of(job, eids, unreadable):
    """Yield (study id, names, embeddings) of some studies of a job; fills `unreadable`.

    Of studies: None and (768,), as published; without pooled queries the labels and (T, 768). Of
    videos: their names and (V, 768). A video's embedding is the study embedding of a study with
    only this video; one study at a time is in memory, since a cohort might not fit.
    """
    net, store, settings = job.model.net, job.source.store, job.settings
    if settings.level == "study":
        net, names = (
            (net, None) if settings.pool_queries else (EachQuery(net), job.model.outputs.names)
        )
        outcome = run_studies(net, store, eids, settings, unreadable=unreadable, label="embed")
        yield from (
            (eid, names, x) for eid, x in zip(outcome.eids, outcome.embeddings, strict=True)
        )
        return
    for eid in progress(eids, desc="embed", unit="study"):
        try:
            bag = store.read(eid)
        except UnreadableStudy as error:
            unreadable[eid] = str(error)
            continue
        outcome = run_studies(net, VideosAsStudies(bag), range(len(bag.videos)), settings)
        yield eid, bag.videos, outcome.embeddings
