"""Check the data of an encoder training: `check --cohort`."""

import time

from echofocus_core.base.console import duration, progress, reason_lines
from echofocus_core.base.files import derive_seed
from echofocus_core.encoder.cohorts import read_cohort
from echofocus_core.video.decode import small_frames, why_skipped
from echofocus_core.video.extract import map_in_processes


def preview_cohort(typed, listener):
    """Report on a cohort. typed: the options cohort, data_dir and tasks."""
    name = typed["cohort"]
    folder = typed.get("data_dir") or f"data/{name}"
    cohort = read_cohort(name, folder, typed.get("tasks", ()), listener)
    paths = cohort.videos["path"]
    reasons = {
        video: reason
        for video, path in progress(paths.items(), desc="videos", total=len(paths), unit="video")
        if (reason := why_skipped(path))
    }
    for fold, labels in cohort.labels.groupby(cohort.videos["split"]):
        counts = "; ".join(
            f"{task} {y.count()} labels, mean {y.mean():.3g}" if y.count() else f"{task} no labels"
            for task, y in labels.items()
        )
        listener.ok(f"{fold}: {len(labels)} videos: {counts[:400]}")
    sample = paths.drop(list(reasons)).drop_duplicates()
    sample = sample.iloc[sample.map(derive_seed).argsort()[:200]]
    n, began = 0, time.perf_counter()
    calls = ((video, (small_frames, path, 224)) for video, path in sample.items())
    for video, (reply, _) in map_in_processes(calls, 0):
        if isinstance(reply, Exception):
            reasons[video] = str(reply)
        else:
            n += 1
    if reasons:
        listener.warning(
            f"{len(reasons)} videos cannot be used:{reason_lines(reasons)}",
            "export them again; training leaves them out",
        )
    if not n:
        return listener.error("no video of the cohort can be decoded", "see the reasons above")
    each = (time.perf_counter() - began) / len(sample)
    listener.ok(f"decoding {len(paths)} videos once: about {duration(each * len(paths))} (rough)")
