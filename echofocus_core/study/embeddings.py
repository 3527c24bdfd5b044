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


def embed_source(job):
    """Write the embeddings of a job's studies; returns the file's path."""
    model, settings, store = job.model, job.settings, job.source.store
    eids = sample_ids(job.source.eids, settings.sample_limit)
    warnings = warn_of_other_input(model, store, eids)
    write = embed_studies if settings.level == "study" else embed_videos
    name = f"{'' if settings.level == 'study' else 'video_'}embeddings_{settings.dataset}"
    path = Path(settings.embed_file or model.folder / f"{name}_{settings.task}.h5")
    unreadable = {}
    with atomic_path(path) as temporary, new_hdf5(temporary) as f:
        n = write(f, model, store, eids, settings, unreadable)
        f.attrs["dataset"], f.attrs["task"] = settings.dataset, settings.task
        f.attrs["model_name"] = model.folder.name
        if warnings:
            f.attrs["warning"] = "; ".join(warnings)
        report_unreadable(unreadable)
        if not n:
            raise UserError("no study could be read")
    print(f"wrote {n} {settings.level} embeddings to {path}")
    return path


def embed_studies(f, model, store, eids, settings, unreadable):
    """Write one dataset (768,) per study, as published; returns the number of studies.

    Without pooled queries (labels, 768); the attribute `labels` has the names of the rows.
    """
    net = model.net
    if not settings.pool_queries:
        net, f.attrs["labels"] = EachQuery(net), model.outputs.names
    outcome = run_studies(net, store, eids, settings, unreadable=unreadable, label="embed")
    for eid, embedding in zip(outcome.eids, outcome.embeddings, strict=True):
        f[eid] = embedding
    return len(outcome)


def embed_videos(f, model, store, eids, settings, unreadable):
    """Write `embeddings` (V, 768) and `videos` (V,) per study; returns the number of videos.

    A video's embedding is the study embedding of a study with only this video. Only one study at a
    time is in memory, since a cohort might not fit.
    """
    f.attrs["level"], n = "video", 0
    for eid in progress(eids, desc="embed", unit="study"):
        try:
            bag = store.read(eid)
        except UnreadableStudy as error:
            unreadable[eid] = str(error)
            continue
        outcome = run_studies(model.net, VideosAsStudies(bag), range(len(bag.videos)), settings)
        f[f"{eid}/embeddings"] = outcome.embeddings
        f[eid].create_dataset("videos", data=bag.videos, dtype=h5py.string_dtype())
        n += len(outcome)
    return n
