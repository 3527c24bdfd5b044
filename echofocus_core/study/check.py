"""Problems of a long run, each with its remedy."""

import time
from collections import Counter
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from echofocus_core.base.console import (
    PROGRAM,
    Collected,
    UserError,
    count_of,
    duration,
    progress,
    some,
)
from echofocus_core.base.files import derive_seed
from echofocus_core.base.options import options_of
from echofocus_core.base.world import pick_device
from echofocus_core.study.config import Config, read_config
from echofocus_core.study.fold_answers import folds_to_test, task_for
from echofocus_core.study.folds import (
    cohort_of,
    fold_table,
    is_at_home,
    match_studies,
    sample_ids,
    seen_elsewhere,
    stored_names,
    training_folds,
)
from echofocus_core.study.input_check import Jackknife
from echofocus_core.study.job import Job, check_settings, resolve_settings
from echofocus_core.study.labels import load_labels
from echofocus_core.study.loading import (
    folds_in_folder,
    load_named,
    model_folder,
    other_times,
    read_checkpoint,
)
from echofocus_core.study.loop import LoopContext, report_unreadable, run_studies, train_steps
from echofocus_core.study.network import build
from echofocus_core.study.outputs import Outputs
from echofocus_core.study.sources import (
    CLIP_EMBEDDINGS,
    open_embeddings,
    refuse_mixed,
    warn_of_other_input,
)
from echofocus_core.video.preview import preview_extraction
from echofocus_core.video.store import UnreadableStudy
from echofocus_core.video.studies import studies_of_dataset


def check_run(typed, preview_cohort):
    """The command `check`; preview_cohort: of `encoder.preview`. UserError if a run would fail."""
    levels = Counter()
    section = partial(check_section, levels)
    if typed.get("cohort"):  # for embed/train.py, which needs no config
        remedy = "correct the tables, or give their folder with --data_dir"
        with section("cohort", remedy) as listener:
            preview_cohort(typed, listener)
    else:
        check_studies(typed, section)
    print(f"{count_of(levels['ERROR'], 'errors')}, {count_of(levels['WARNING'], 'warnings')}")
    if levels["ERROR"]:
        raise UserError("a run would fail; see the lines marked ERROR")


def check_studies(typed, section):
    """Check config, model, options, data and videos."""
    config = model = job = None
    with section("config", f"correct the config; {PROGRAM} init writes one") as listener:
        config = read_config(typed.get("config"), needed=not typed.get("videos"))
        names = some(config.tasks, 9), some(config.datasets, 9)
        text = f"{config.path}: tasks {names[0]}; datasets {names[1]}"
        listener.ok(text if config.tasks else "no config, which --videos does not need")
    if config:
        with section("model", "name another --model_name, or train it again") as listener:
            model = check_model(typed, config, listener)
    if model and model.task in config.tasks:
        with section("task", "give the task the model's labels, in order and unit") as listener:
            task = config.tasks[model.task]
            task_for(model, task)  # which raises UserError for other labels
            remedy = "declare the unit in both, or give the column of the same times"
            for text in other_times(model, task.survival, task.units):
                listener.warning(text, remedy)
            listener.ok("the config has the model's labels")
    if config:
        with section("options", "correct the option or the config") as listener:
            job = choose_job(typed, config, model, listener)
    if job:
        check_data(job, section, typed.get("sample_limit", 0))
    with section("videos", "see --videos") as listener:
        check_videos(typed, config or Config(), model, listener)


@contextmanager
def check_section(levels, title, remedy):
    """Yield a listener for one part of `check`; print its findings and a UserError afterwards.

    levels: Counter of findings by level, which is updated. remedy: for an error without one.
    """
    listener = Collected()
    try:
        yield listener
    except UserError as error:
        text, own_remedy = str(error), ""
        if "\n" not in text:  # else a list of faults
            text, _, own_remedy = text.partition("; ")
        listener.error(text, own_remedy or remedy)
    if listener.findings:
        print(title)
    for finding in listener.findings:
        levels[finding.level] += 1
        text = finding.text.replace("\n", "\n" + 11 * " ")
        remedy = f"\n  {'':8} -> {finding.remedy}" * bool(finding.remedy)
        print(f"  {finding.level:8} {text}{remedy}")


def check_model(typed, config, listener):
    """The model of --model_name, or the one that `train` would resume; None if there is none."""
    name, run_id = typed.get("model_name"), typed.get("run_id", "")
    task = config.pick("task", typed["task"]) if typed.get("task") else ""
    if not name and not config.tasks:
        return listener.ok("no model checked; --model_name names one")
    if not name:
        name = task or config.pick("task", "")
        folder = model_folder(name, run_id)
        if not (folder / "best_checkpoint.pt").is_file() and not folds_in_folder(folder):
            return listener.ok(f"no model {name} yet, none checked; --model_name names one")
    model = load_named(name, run_id, config.tasks, task, pick_device(typed.get("device", "")))
    folder = model.folder
    listener.ok(f"{folder.name}: task {model.task}, {len(model.outputs.names)} labels")
    if (folder / "last_checkpoint.pt").is_file():
        read_checkpoint(folder / "last_checkpoint.pt")
    return model


def choose_job(typed, config, model, listener):
    """The Job of a run; None if only --videos can be checked."""
    paths = [path for d in config.datasets.values() for path in d.embedding_paths]
    extracted = any(path.exists() for path in paths)
    if typed.get("videos") and not typed.get("dataset") and not extracted:
        return listener.ok("no dataset is extracted yet: only --videos is checked")
    names = set(options_of("train")) - {"videos", "sample_limit"}  # see `check_data`
    typed = {k: v for k, v in typed.items() if k in names}
    settings, dataset = resolve_settings("train", typed, config, model)
    check_settings(settings)
    task = config.tasks.get(settings.task)
    if task:
        listener.ok(f"task {settings.task} on dataset {settings.dataset}")
    else:
        listener.warning(
            f"{config.path} has no task {settings.task}: predict works, evaluate does not",
            "add the task with the model's labels",
        )
    return Job(settings, task, dataset, model)


def check_videos(typed, config, model, listener):
    """Check the folder of --videos: files, encoder and time."""
    if not typed.get("videos"):
        return listener.ok("none checked; name their folder with --videos")
    options = {name: typed[name] for name in typed if name in options_of("extract")}
    settings, _ = resolve_settings("extract", options, config, model)
    trained_on = model.record.encoder_sha256 if model else ""
    settings = settings.model_copy(update={"videos": typed["videos"]})
    preview_extraction(settings, trained_on, listener)
    listener.ok(
        f"predict keeps their clip embeddings in ./{CLIP_EMBEDDINGS}; --keep names a folder"
    )


def check_data(job, section, limit):
    """Check labels, embeddings, folds and time of a run. limit: the embeddings to read, 0: all."""
    settings, dataset, model = job.settings, job.dataset, job.model
    task = table = store = studies = folds = None
    headers = {}
    if job.task:
        with section("labels", "correct the label table") as listener:
            task, table = check_labels(job, listener)
    if job.reads_videos:
        with section("videos", "") as listener:
            place = dataset.video_base_path, dataset.video_subdir_format
            studies = studies_of_dataset(*place, listener=listener)
            n = sum(len(study.videos) for study in studies)
            text = f"{place[0]}: {count_of(len(studies), 'studies')}, {count_of(n, 'videos')}"
            listener.ok(
                f"{text}; predict, evaluate, embed and explain extract their clip embeddings"
            )
        return
    with section("embeddings", "see embedding_path in the config") as listener:
        store = open_embeddings(dataset, job.task, settings, listener)
        headers = check_embeddings(store, limit, listener)
    if model and store:
        with section("encoder", "") as listener:
            warn_of_other_input(model, store, list(headers), listener)
    if table is not None and store:
        with section("labels and embeddings", "") as listener:
            table = table.rename(index=stored_names(table.index, store, listener))
            most, first_only = settings.sample_limit, settings.first_study_only
            studies = match_studies(table, store, task, most, first_only, listener)
            labelled = [eid for eid in studies.index if eid in headers]
            refuse_mixed(store, labelled, settings.allow_mixed, listener)
    if studies is not None and len(studies):
        with section("split", "see --split") as listener:
            folds = check_folds(job, (task, table, studies, store), listener)
    if headers and (model or task):
        with section("time", "") as listener:
            n_outputs = len(model.outputs.names if model else task.outputs.names)
            check_time(n_outputs, store, sorted(headers), folds, settings, listener)


def check_labels(job, listener):
    """(task, label table), read as in a run; predictions need no label table."""
    task, model = job.task, job.model
    if model and task.task_labels == model.outputs.labels:
        task = task_for(model, task)
    path = job.dataset.label_path or task.label_path
    if model and (path is None or not path.is_file()):
        listener.warning(
            f"no label table{f' {path}' if path else ''}: predict and embed need none, train and "
            "evaluate do",
            "set label_path of the task or the dataset in the config",
        )
        return task, None
    return load_labels(task, job.dataset, listener, job.settings, job.settings.split_column)


def check_embeddings(store, limit, listener):
    """Study -> header of readable studies. Reads all headers, and the numbers of `limit` studies
    (0: of all)."""
    headers, unreadable = {}, {}
    for eid in progress(store.files, desc="headers", unit="study", delay=2):
        try:
            headers[eid] = store.header(eid)
        except UnreadableStudy as error:
            unreadable[eid] = str(error)
    eids = sample_ids(headers, limit)
    for eid in progress(eids, desc="read", unit="study", delay=2):
        try:
            store.read(eid)
        except UnreadableStudy as error:
            unreadable[eid] = str(error)
            del headers[eid]
    videos = sum(header.videos for header in headers.values())
    text = f"{store.folder}: {count_of(len(headers), 'readable studies')}, "
    text += f"{count_of(videos, 'videos')} (headers of all read, "
    text += f"numbers of {count_of(len(eids), 'studies')})"
    if headers:
        listener.ok(text)
    else:
        listener.error(text, "extract the studies again")
    report_unreadable(unreadable, listener)
    return headers


def check_folds(job, data, listener):
    """Check the folds. Returns them, or None if the dataset is not the one of the training."""
    (task, table, studies, store), settings, model = data, job.settings, job.model
    if model:
        folds, _ = folds_to_test(job, task, table, store, listener)
        folds = folds.loc[studies.index]
        listener.ok("labels by fold\n" + fold_table(studies, folds, task).to_string(max_rows=60))
        if not is_at_home(model, table, settings.dataset):
            return None
    else:
        encoder = store.encoder_seen(list(studies.index), listener)
        series, _ = seen_elsewhere(table, settings, encoder, listener=listener)
        folds = training_folds(studies, settings, task, series, listener)
    cohort_of(task, studies, folds, listener=listener)
    return folds


def seconds_of(step):
    """The time of a function's second call; the first call warms up."""
    step()
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def check_time(n_outputs, store, eids, folds, settings, listener):
    """Estimate the time of an epoch and of a prediction, from eight studies on this machine."""
    device, n = pick_device(settings.device), len(eids)
    eids = sorted(eids, key=lambda eid: derive_seed("time", eid))[:8]
    net = build(settings, n_outputs, width=store.width(eids)).to(device)
    outputs = Outputs.of(list(map(str, range(n_outputs))), "binary")
    targets = dict.fromkeys(eids, np.zeros(n_outputs))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-9)
    context = LoopContext(net, store, settings, targets, outputs)
    steps = {
        "train": lambda: list(train_steps(context, eids, optimizer)),
        "predict": lambda: run_studies(net, store, eids, settings),
    }
    jackknife, headers = Jackknife(store, "clips"), {eid: store.header(eid) for eid in eids[:2]}
    keys = [key for eid, x in headers.items() for key in jackknife.keys(eid, x.videos, x.clips)]
    each = {name: seconds_of(step) / len(eids) for name, step in steps.items()}
    ranges = seconds_of(lambda: run_studies(net, jackknife, keys, settings)) / len(headers)
    listener.ok(
        f"predicting {count_of(n, 'studies')}: about {duration(each['predict'] * n)} on {device}; "
        f"with ranges (--page or --spread): {duration((each['predict'] + ranges) * n)}"
    )
    if folds is not None:
        train, val = ((folds == fold).sum() for fold in ("train", "val"))
        epoch, limit = train * each["train"] + val * each["predict"], settings.epoch_lim
        whole = f", {count_of(limit, 'epochs')}: {duration(epoch * limit)}" if limit > 0 else ""
        listener.ok(
            f"an epoch of training on {count_of(int(train), 'studies')}: about "
            f"{duration(epoch)} on {device}{whole} (rough)"
        )
