"""Preview of an extraction: the files that it will skip by their headers, and its run time."""

import time
from collections import Counter
from pathlib import Path

import torch

from echofocus_core.base.console import count_of, duration, progress, reason_lines, some
from echofocus_core.base.world import pick_device
from echofocus_core.video import extract, panecho
from echofocus_core.video.decode import why_skipped
from echofocus_core.video.encoders import is_panecho, open_encoder


def preview_extraction(settings, trained_on, listener):
    """Report on the files of --videos, the encoder's weights and the time of an extraction.

    trained_on: SHA-256 of the encoder of a model, or ''.
    """
    source = Path(settings.videos)
    grouping = settings.group, settings.manifest, settings.study_id
    studies = extract.find_studies(source, *grouping, listener=listener)
    usable, reasons = [], {}
    for study in progress(studies, desc="videos", unit="study"):
        reasons |= {f"{study.name}/{v}": reason for v, reason in study.left_out.items()}
        for video in study.videos:
            if reason := why_skipped(study.source(video)):
                reasons[f"{study.name}/{video}"] = reason
            else:
                usable.append((study, video))
    usual = Counter(reason for reason in reasons.values() if reason.startswith(extract.USUAL))
    skipped = "".join(f"; {n} skipped: {reason}" for reason, n in usual.items())
    listener.ok(
        f"{source}: {count_of(len(studies), 'studies')}, {count_of(len(usable), 'videos')}{skipped}"
    )
    odd = {name: reason for name, reason in reasons.items() if not reason.startswith(extract.USUAL)}
    if odd:
        listener.warning(
            f"{len(odd)} files cannot be used:{reason_lines(odd)}",
            "export them again, or delete them; extraction skips and lists them",
        )
    if empty := sorted({s.name for s in studies} - {s.name for s, _ in usable}):
        report = listener.warning if usable else listener.error
        report(f"{len(empty)} studies have no usable video: {some(empty)}",
               "see the reasons above; these studies get no prediction")  # fmt: skip
    encoder = preview_encoder(settings, trained_on, listener)
    if usable:
        estimate_time(settings, encoder, usable, listener)


def preview_encoder(settings, trained_on, listener):
    """The encoder, or an untrained one for timing if the weights are not downloaded yet."""
    name, weights = settings.encoder, settings.weights
    if (
        is_panecho(name)
        and not panecho.weights_path(weights).is_file()
        and (weights == "panecho" or weights.startswith(("http:", "https:")))
    ):
        listener.warning(
            f"the encoder weights {weights} are not downloaded yet; extraction will download them",
            "run once with a network, or give the file with --weights",
        )
        return open_encoder(name, "random", settings.clip_len, settings.size)
    encoder = extract.encoder_of(settings)
    if trained_on not in ("", encoder.digest()):
        listener.warning(
            "the model was trained on embeddings of another encoder: with these weights its "
            "predictions have no meaning",
            f"give --weights the file with SHA-256 {trained_on[:12]}",
        )
    return encoder


def estimate_time(settings, encoder, usable, listener):
    """Report the estimated run time for (study, video) pairs, from one video and a few images."""
    device, workers = pick_device(settings.device), extract.n_decoders(settings.workers)
    sampling = extract.sampling_of(settings, encoder)
    (((study, name), (reply, seconds)),) = extract.decode(usable[:1], sampling, 1)
    if isinstance(reply, Exception):
        return listener.warning(f"{study.name}/{name}: {reply}", "extraction skips it")
    encoder.model.to(device)
    pieces = encoder.pieces(torch.from_numpy(reply[0].frames).to(device), reply[0].index)
    batch = pieces[: max(1, 8 // encoder.images_of_piece())]
    for _ in range(2):  # the first time is longer
        began = time.perf_counter()
        with torch.inference_mode():
            encoder.encode(batch).cpu()  # waits for a GPU
    encode = (time.perf_counter() - began) * len(pieces) / len(batch)
    total = max(seconds / workers, encode) * len(usable)
    listener.ok(
        f"extraction of {count_of(len(usable), 'videos')}: about {duration(total)} on {device} "
        "(rough estimate from one video and a few images)"
    )
