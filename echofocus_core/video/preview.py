"""What an extraction would do: the files that it would skip by their headers, and the time."""

import time
from collections import Counter
from pathlib import Path

import torch

from echofocus_core import EMBED_DIM
from echofocus_core.base.console import duration, listed, progress, some
from echofocus_core.base.files import derive_seed
from echofocus_core.base.world import pick_device
from echofocus_core.encoder.cohorts import read_cohort
from echofocus_core.video import extract, panecho
from echofocus_core.video.decode import small_frames, why_skipped

# What any export holds beside cines.
USUAL = ("still image", "M-mode", "spectral Doppler", "not an ultrasound", "DICOM without image")


def preview_extraction(typed, trained_on, listener):
    """Tell a listener (common/console.py) of the videos of --videos; bytes of their embeddings.

    typed: the options of extraction (`extract.add_options`). trained_on: SHA-256 of the encoder
    that a model goes with, or ''.
    """
    source, sampling = Path(typed["videos"]), extract.settings_from(typed).sampling
    how = (typed[name] for name in ("group", "manifest", "study_id"))
    studies = extract.find_studies(source, *how, listener=listener)
    usable, faults = [], {}
    for study in progress(studies, desc="videos", unit="study"):
        reasons = {name: "the manifest's file is missing" for name in study.missing}
        reasons |= {v: why for v in study.videos if (why := why_skipped(study.source(v)))}
        usable += [(study, v) for v in study.videos if v not in reasons]
        faults |= {f"{study.name}/{name}": reason for name, reason in reasons.items()}
    usual = Counter(reason for reason in faults.values() if reason.startswith(USUAL))
    skipped = "".join(f"; {n} skipped: {reason}" for reason, n in usual.items())
    listener.ok(f"{source}: {len(studies)} studies, {len(usable)} videos{skipped}")
    odd = {name: reason for name, reason in faults.items() if not reason.startswith(USUAL)}
    if odd:
        listener.warning(
            f"{len(odd)} files cannot be used:{listed(odd)}",
            "export them again, or delete them; extraction skips and lists them",
        )
    empty = {s.name for s in studies} - {s.name for s, _ in usable}
    if empty:
        tell = listener.warning if usable else listener.error
        tell(
            f"{len(empty)} studies have no usable video: {some(sorted(empty))}",
            "see the reasons above; they get no answer",
        )
    encoder = preview_encoder(typed, sampling, trained_on, listener)
    if usable:
        estimate_time(typed, sampling, encoder, usable, listener)
    return len(usable) * sampling.n_clips * EMBED_DIM * 4


def preview_encoder(typed, sampling, trained_on, listener):
    """The encoder; a random one, for the timing alone, where the weights are yet to be fetched."""
    weights = typed["weights"]
    if weights == "panecho" and not panecho.weights_path().is_file():
        listener.warning(
            "the encoder weights are not in torch.hub's cache: extraction begins by a download",
            "run once with a network, or give the file with --weights",
        )
        weights = "random"
    elif weights.startswith(("http:", "https:")):
        weights = "random"
    encoder = panecho.load_panecho(weights, sampling.clip_len)
    if weights == typed["weights"] and trained_on and trained_on != encoder.sha256:
        listener.warning(
            "the model was trained on embeddings of another encoder: its answers mean nothing "
            "with these weights",
            f"--weights with the file of SHA-256 {trained_on[:12]}",
        )
    return encoder.model


def estimate_time(typed, sampling, encoder, usable, listener):
    """How long the (study, video) pairs take, from one decoded and a few images encoded."""
    device = pick_device(typed.get("device", ""))
    workers = extract.decoders(typed["workers"])
    (((study, name), (reply, seconds)),) = extract.decode(usable[:1], sampling, 1)
    if isinstance(reply, Exception):
        listener.warning(f"{study.name}/{name}: {reply}", "it will be skipped")
        return
    images, _ = extract.distinct_images(reply[0].index)
    batch = torch.zeros(min(8, len(images)), 3, sampling.size, sampling.size, device=device)
    encode = timed(lambda: encoder.encoder.to(device).encode_images(batch))
    each = max(seconds / workers, encode * len(images) / len(batch))
    listener.ok(
        f"extraction of {len(usable)} videos: about {duration(each * len(usable))} on {device} "
        "(rough: from one video decoded and a few images encoded)"
    )


def preview_cohort(typed, listener):
    """Tell a listener of a cohort that the encoder would be trained on (`check --cohort`).

    typed: the options cohort, data_dir and tasks. Returns the bytes that its decoded videos take.
    """
    name = typed["cohort"]
    folder = typed.get("data_dir") or f"data/{name}"
    cohort = read_cohort(name, folder, typed.get("tasks", ()), listener)
    names, paths = list(cohort.videos.index), list(cohort.videos["path"])
    pairs = progress(zip(names, paths, strict=True), desc="videos", total=len(names), unit="video")
    reasons = {name: why for name, path in pairs if (why := why_skipped(path))}
    for fold, labels in cohort.labels.groupby(cohort.videos["split"]):
        known = "; ".join(
            f"{t} {y.count()} known, mean {y.mean():.3g}" if y.count() else f"{t} none"
            for t, y in labels.items()
        )
        listener.ok(f"{fold}: {len(labels)} videos: {known[:400]}")
    sample = sorted(set(paths) - {paths[names.index(n)] for n in reasons}, key=derive_seed)[:200]
    size, began = 0, time.perf_counter()
    calls = ((path, (small_frames, path, 224)) for path in sample)
    for path, (reply, _) in extract.in_processes(calls, extract.decoders(0)):
        if isinstance(reply, Exception):
            reasons[names[paths.index(path)]] = str(reply)
        else:
            size += reply.nbytes
    if reasons:
        listener.warning(
            f"{len(reasons)} videos cannot be used:{listed(reasons)}",
            "export them again; training leaves them out",
        )
    if not size:
        listener.error("no video of the cohort can be decoded", "see the reasons above")
        return 0
    each = (time.perf_counter() - began) / len(sample)
    listener.ok(f"decoding {len(paths)} videos once: about {duration(each * len(paths))} (rough)")
    return size * len(paths) // len(sample)


def timed(function):
    """Seconds that a call takes, the second time; torch's queue emptied."""
    for _ in range(2):
        began = time.perf_counter()
        with torch.inference_mode():
            function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return time.perf_counter() - began
