"""What a long run would fail on, each finding with its remedy."""

import shutil
import time
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from echofocus_core import EMBED_DIM as D
from echofocus_core.base.console import Collected, UserError, duration, progress
from echofocus_core.base.files import derive_seed
from echofocus_core.base.options import options_of
from echofocus_core.base.world import pick_device
from echofocus_core.study.answers import folds_to_test
from echofocus_core.study.cohort import (
    cohort_of,
    fold_table,
    match_studies,
    stored_names,
    training_folds,
)
from echofocus_core.study.config import MODELS, resolve_settings
from echofocus_core.study.labels import load_labels, other_unit
from echofocus_core.study.loading import (
    folds_in_folder,
    load_named,
    model_folder,
    other_times,
    read_checkpoint,
)
from echofocus_core.study.loop import report_unreadable, run_studies
from echofocus_core.study.network import StudyModel
from echofocus_core.study.outputs import Outputs
from echofocus_core.study.sources import adopt_kinds, refuse_mixed, store_of, warn_of_other_input
from echofocus_core.study.splits import known_to_others, some_of
from echofocus_core.study.train_command import check_settings
from echofocus_core.video.store import PackedEmbeddings, UnreadableStudy
from echofocus_core.video.studies import studies_of_dataset


def end_check(levels):
    """The last line of `check`; UserError where a run would fail. levels: see `check_section`."""
    print(f"{levels['ERROR']} errors, {levels['WARNING']} warnings")
    if levels["ERROR"]:
        raise UserError("a run would fail; see the lines marked ERROR")


@contextmanager
def check_section(levels, title, remedy):
    """A listener for one part of `check`; what it heard is printed in the end, UserErrors too.

    levels: Counter that gets how many findings of each level there were. remedy: of an error that
    says none.
    """
    heard = Collected()
    try:
        yield heard
    except UserError as error:
        text, said = str(error), ""
        if "\n" not in text:  # else a list of faults
            text, _, said = text.partition("; ")
        heard.error(text, said or remedy)
    if heard.findings:
        print(title)
    for finding in heard.findings:
        levels[finding.level] += 1
        print(f"  {finding.level:8} " + finding.text.replace("\n", "\n" + 11 * " "))
        if finding.remedy:
            print(f"  {'':8} -> {finding.remedy}")


def check_model(typed, config, listener):
    """The model of --model_name, or the one that `train` would go on with; None without one."""
    name, run_id = typed.get("model_name"), typed.get("run_id", "")
    task = config.pick("task", typed["task"]) if typed.get("task") else ""
    if not name and not config.tasks:
        return listener.ok("none looked at; --model_name names one")
    if not name:
        name = task or config.pick("task", "")
        folder = model_folder(name, run_id)
        if not (folder / "best_checkpoint.pt").is_file() and not folds_in_folder(folder):
            return listener.ok(f"no model {name} yet, none looked at; --model_name names one")
    model = load_named(name, run_id, config, task, pick_device(typed.get("device", "")))
    folder = model.folder
    listener.ok(f"{folder.name}: task {model.task}, {len(model.labels)} labels")
    labels = model.outputs.labels
    if model.task in config.tasks and config.tasks[model.task].task_labels != labels:
        listener.error(
            f"task {model.task} of {config.path} has other labels than {folder.name}: predict "
            "works, evaluate does not",
            f"give the task the model's labels, in their order: {', '.join(labels)}",
        )
    elif model.task in config.tasks:
        own = config.tasks[model.task]
        for label in labels:
            if other_unit(label, own.units, model.units):
                listener.error(
                    f"{label} is in {own.units[label]} in task {model.task} of {config.path}, in "
                    f"{model.units[label]} in {folder.name}",
                    "convert the labels, and say so in the task's units",
                )
        for text in other_times(model, own.survival, own.units):
            listener.warning(text, "say the unit in both, or give the column of the same times")
    if (folder / "last_checkpoint.pt").is_file():
        read_checkpoint(folder / "last_checkpoint.pt")
    return model


def check_choice(typed, config, model, listener):
    """The Settings that a run would take; None where only --videos is looked at."""
    made = any(d.embedding_path.is_dir() for d in config.datasets.values())
    if typed.get("videos") and not typed.get("dataset") and not made:
        return listener.ok("no dataset is extracted yet: only --videos is looked at")
    typed = {k: v for k, v in typed.items() if k in options_of("train") and k != "videos"}
    settings = resolve_settings("train", typed, config, model)
    check_settings(settings)
    if settings.task in config.tasks:
        listener.ok(f"task {settings.task} on dataset {settings.dataset}")
    else:
        listener.warning(
            f"{config.path} has no task {settings.task}: predict works, evaluate does not",
            "add the task with the model's labels",
        )
    return settings


def check_data(settings, config, model, section):
    """Labels, embeddings, folds, disk and time of a run with these settings."""
    dataset = config.datasets[settings.dataset]
    task = table = store = studies = folds = None
    headers = {}
    if settings.task in config.tasks:
        with section("labels", "mend the label table") as listener:
            task, table = check_labels(settings, config, model, listener)
    if dataset.is_of_videos and not settings.embedding_path:
        with section("videos", "") as listener:
            where = dataset.video_base_path, dataset.video_subdir_format
            found = studies_of_dataset(*where, listener=listener)
            n = sum(len(study.videos) for study in found)
            listener.ok(
                f"{where[0]}: {len(found)} studies, {n} videos; no clip embeddings yet, which "
                "predict, evaluate, embed and explain make"
            )
        return
    with section("embeddings", "see embedding_path in the config") as listener:
        store = store_of(config, settings, listener=listener)
        headers = check_embeddings(dataset.embedding_path, store, settings, listener)
    if model and store:
        with section("encoder", "") as listener:
            warn_of_other_input(model, store, list(headers), listener)
    if table is not None and store:
        with section("labels and embeddings", "") as listener:
            table = table.rename(index=stored_names(table.index, store, listener))
            limit, first_only = settings.sample_limit, settings.first_study_only
            studies = match_studies(table, store, task, limit, first_only, listener)
    if studies is not None and len(studies):
        with section("split", "see --split") as listener:
            folds = check_folds(settings, config, model, (task, table, studies, store), listener)
    labels = model.labels if model else task.outputs.names if task else []
    if not labels:
        return
    net = StudyModel(
        len(labels), settings.transformer_type, settings.encoder_depth, settings.tf_combine
    )
    with section("disk", "") as listener:  # weights and two moments, best and last
        size = 2 * 3 * 4 * sum(p.numel() for p in net.parameters())
        check_room("checkpoints", MODELS, size, listener.error, listener)
        if headers and not isinstance(store, PackedEmbeddings):
            size = sum(4 * D * h.copies * h.videos * h.clips for h in headers.values())
            folder = dataset.embedding_path.parent
            check_room("a packed copy", folder, size, listener.warning, listener)
    if headers:
        with section("time", "") as listener:
            check_time(net, store, sorted(headers), folds, settings, listener)


def check_labels(settings, config, model, listener):
    """(task, label table) as a run reads them; a model needs none to predict."""
    task = config.tasks[settings.task]
    if model and task.task_labels == model.outputs.labels:
        adopt_kinds(config, settings.task, model)
    path = config.datasets[settings.dataset].label_path or task.label_path
    if model and (path is None or not path.is_file()):
        listener.warning(
            f"no label table{f' {path}' if path else ''}: predict and embed need none, train and "
            "evaluate do",
            "set label_path of the task or the dataset in the config",
        )
        return task, None
    names = settings.task, settings.dataset
    return load_labels(config, *names, listener, settings.split_column)


def check_embeddings(path, store, settings, listener):
    """Study -> header of those that can be read: all headers, and the numbers of all or some."""
    headers, unreadable = {}, {}
    for eid in progress(store.files, desc="headers", unit="study"):
        try:
            headers[eid] = store.header(eid)
        except UnreadableStudy as error:
            unreadable[eid] = str(error)
    refuse_mixed(store, list(headers), settings.allow_mixed, listener)
    eids = some_of(headers, settings.sample_limit)
    for eid in progress(eids, desc="read", unit="study"):
        try:
            store.read(eid)
        except UnreadableStudy as error:
            unreadable[eid] = str(error)
            del headers[eid]
    videos = sum(header.videos for header in headers.values())
    text = f"{path}: {len(headers)} readable studies, {videos} videos (headers of all read, "
    text += f"numbers of {len(eids)} studies)"
    if headers:
        listener.ok(text)
    else:
        listener.error(text, "extract the studies again")
    report_unreadable(unreadable, listener)
    return headers


def check_folds(settings, config, model, data, listener):
    """The folds of a run and what can be learnt; None where nothing of it is for training."""
    task, table, studies, store = data
    if model:
        folds, _ = folds_to_test(model, task, table, settings, store, listener)
        folds = folds.loc[studies.index]
        listener.ok("labels by fold\n" + fold_table(studies, folds, task).to_string(max_rows=60))
        if settings.dataset != model.record.dataset:
            return None
    else:
        encoder = store.encoder_seen(list(studies.index), listener)
        known, _ = known_to_others(table, settings, encoder, listener=listener)
        folds = training_folds(studies, settings, task, known, listener)
    cohort_of(task, studies, folds, listener=listener)
    return folds


def check_room(what, folder, size, shortage, listener):
    """Whether a folder's disk has room for `size` bytes; `shortage` is told where it has not."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    text = f"{what} in {folder}: {size / 1e9:.2f} GB, {free / 1e9:.1f} GB are free"
    if size > free:
        shortage(text, "free some, or work on another disk")
    else:
        listener.ok(text)


def check_time(net, store, eids, folds, settings, listener):
    """How long an epoch and a prediction take, from eight studies on this machine."""
    device, n = pick_device(settings.device), len(eids)
    eids = sorted(eids, key=lambda eid: derive_seed("time", eid))[:8]
    net = net.to(device)
    outputs = Outputs.of(list(map(str, range(net.n_labels))), "binary")
    targets = dict.fromkeys(eids, np.zeros(net.n_labels))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-9)
    run = partial(run_studies, net, store, eids, settings)
    steps = {
        "train": partial(run, targets=targets, outputs=outputs, optimizer=optimizer),
        "predict": run,
    }
    each = {}
    for name, step in steps.items():
        step()  # the first one warms up
        began = time.perf_counter()
        step()
        each[name] = (time.perf_counter() - began) / len(eids)
    listener.ok(f"predicting {n} studies: about {duration(each['predict'] * n)} on {device}")
    if folds is not None:
        train, val = ((folds == fold).sum() for fold in ("train", "val"))
        epoch = train * each["train"] + val * each["predict"]
        whole, n = "", settings.epoch_lim
        if n > 0:
            whole = f", {n} epochs: {duration(epoch * n)}"
        listener.ok(
            f"an epoch of training on {train} studies: about {duration(epoch)} on {device}"
            f"{whole} (rough)"
        )
