"""The initial network of an encoder training, and the videos its initial weights have seen."""

import math
from pathlib import Path

import torch

from echofocus_core.base.checkpoints import load_strictly
from echofocus_core.base.console import RUN, UserError
from echofocus_core.base.files import derive_seed, sha256_file
from echofocus_core.base.seen import STUDY
from echofocus_core.study.folds import levels_by, without_seen
from echofocus_core.study.labels import other_unit
from echofocus_core.video.backbones import Start, build_backbone
from echofocus_core.video.panecho import (
    DOWNLOADED,
    PanEcho,
    find_weights,
    licence_of,
    read_encoder,
    warn_of_other_clips,
)
from echofocus_core.video.record import EncoderRecord


def build_net(settings, tasks, labels):
    """(PanEcho with these task heads and raw outputs, Start). Raises UserError.

    tasks: entries with `mean`; labels: of the training videos. A new head outputs the training
    mean, a binary head its log-odds.
    """
    pretrained = not settings.rand_init and not settings.model_dir_path
    with torch.random.fork_rng([]):
        torch.manual_seed(derive_seed("weights", settings.seed))
        backbone, start = build_backbone(
            settings.model_name, settings.arch, pretrained, settings.clip_len, settings.n_layers,
            settings.n_heads, settings.transformer_dropout,
        )  # fmt: skip
        net = PanEcho(tasks, False, backbone=backbone, dropout=settings.fc_dropout)
    for task in tasks:
        if task["type"].startswith("binary"):
            n = labels[task["name"]].count()
            share = min(max(task["mean"], 0.5 / (n + 1)), 1 - 0.5 / (n + 1))
            bias = net.get_submodule(f"{task['name']}_head")[1].bias
            torch.nn.init.constant_(bias, math.log(share / (1 - share)))
    if settings.model_dir_path:
        start = load_start(net, settings.model_dir_path, settings)
    return net, start


def load_start(net, source, settings):
    """Load the backbone and the heads of the same tasks from weights; returns the Start."""
    # A folder may be called panecho, otherwise the name of the release.
    path = find_weights(Path(source) if Path(source).is_dir() else source)
    file = read_encoder(path)
    state, record = without_counters(file.state), file.record
    if record or path.name == DOWNLOADED.name:
        refuse_other_network(record or EncoderRecord(tasks=[]), path, settings)
    given = {t["name"]: t for t in file.tasks}
    fresh = net.state_dict()
    kept = []
    for task in net.tasks:
        names = [k for k in fresh if k.startswith(f"{task['name']}_head.")]
        fits = all(k in state and state[k].shape == fresh[k].shape for k in names)
        change = fits and task["name"] in given and task_difference(task, given[task["name"]])
        if change:
            RUN.warning(f"{task['name']} differs in {path.name}: {change}; its head is not loaded")
        if fits and not change:
            kept.append(task["name"])
        else:
            state |= {k: fresh[k] for k in names}
    heads = tuple(f"{t['name']}_head." for t in net.tasks)
    state = {k: v for k, v in state.items() if k.startswith(("encoder.", *heads))}
    load_strictly(net, state, path, "this --model_name and --arch")
    print(
        f"starting from {path.name}: loaded the backbone and {len(kept)} heads, "
        f"{len(net.tasks) - len(kept)} new heads"
    )
    return Start(path.name, sha256_file(path), licence_of(path, record), file.seen, echo=True)


def task_difference(task, before):
    """How two task entries of one name differ in the meaning of their output, as text; or ''."""
    for key in ("type", "class_names"):
        if before[key] != task[key]:
            return f"{key} {before[key]}, not {task[key]}"
    units = before.get("unit", ""), task.get("unit", "")
    differs = other_unit("", *({"": unit} for unit in units))
    return f"in {units[0]}, not {units[1]}" if differs else ""


def without_seen_videos(start, folds, cohort):
    """Remove val and test videos if the initial weights were trained on their patient or study.

    Returns (folds, {fold: notes for its results}). UserError if a fold has no video left.
    """
    seen, name = start.seen, start.name
    notes = []
    if start.echo and not seen:
        notes = [f"{name} has no record of its training patients"]
        print(f"{notes[0]}: all patients count as unseen")
    table = cohort.videos.rename(columns={"patient": "pid", "study": STUDY})
    unseen = without_seen(folds, [(name, levels_by(name, seen, table, RUN))], what="videos")
    fold_notes = {}
    for fold in ("val", "test"):
        n, kept = (int((x == fold).sum()) for x in (folds, unseen))
        if n and not kept:
            raise UserError(
                f"--model_dir_path: {name} has seen the patients or studies of all {n} "
                f"{fold} videos, by their ids: start from other weights, or use other videos (if "
                "only the ids are the same, add the site's name to them)"
            )
        left_out = f"left out: {n - kept} of {n} videos, whose patients or studies {name} has seen"
        fold_notes[fold] = [left_out] * (kept < n) + notes
    return unseen, fold_notes


def without_counters(state):
    """A state dict without the counters of batch normalisation, which are not used."""
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def refuse_other_network(record, path, settings):
    """UserError for weights whose shapes fit but which were trained with other model options."""
    trained = {"model_name": record.model_name, "arch": record.arch}
    trained |= {"n_layers": record.layers, "n_heads": record.heads} if settings.arch else {}
    for name, before in (trained | {"normalization": record.normalization}).items():
        if before != (value := getattr(settings, name)):
            raise UserError(
                f"{path} was trained with {name} = {before or 'none'}, not {value or 'none'}; "
                f"give --{name} {before}, or start from other weights"
            )
    warn_of_other_clips(record, path, settings.size, settings.clip_len, settings.sampling_rate)
