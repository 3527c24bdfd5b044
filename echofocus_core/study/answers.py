"""What evaluate, predict, embed and explain compute from a model and a source of studies."""

import hashlib
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from echofocus_core import __version__
from echofocus_core.base.console import RUN, Collected, UserError, nearest, progress
from echofocus_core.base.files import atomic_path, open_journal
from echofocus_core.base.hdf5 import UNREADABLE, new_hdf5, open_hdf5
from echofocus_core.base.options import FOLDS
from echofocus_core.base.world import World, pick_device
from echofocus_core.study.attribution import clip_baseline, explain_study
from echofocus_core.study.cohort import digest_at_training, match_studies, stored_names
from echofocus_core.study.evaluation import (
    NOT_ASKED,
    UNREADABLE_EMBEDDINGS,
    Studies,
    is_table,
    outcomes_of,
    studies_to_compare,
    study_flow,
    unseen_notes,
)
from echofocus_core.study.explanations import (
    SELECTED,
    explanation_names,
    ranked,
    write_explanations,
)
from echofocus_core.study.faithfulness import read_views, write_curves, write_views
from echofocus_core.study.input_check import DRAWS, InputCheck, Resamples, reach_of
from echofocus_core.study.labels import load_labels
from echofocus_core.study.loading import (
    SEVERAL_RULES,
    as_one,
    label_columns,
    load_named,
    network_digest,
    other_times,
    refuse_readings,
    target_of,
)
from echofocus_core.study.loop import (
    WINDOW,
    Outcome,
    merged,
    report_unreadable,
    run_steps,
    run_studies,
)
from echofocus_core.study.models import LoadedEnsemble, released_task
from echofocus_core.study.network import Readings
from echofocus_core.study.outputs import scale
from echofocus_core.study.predictions import page_folder, prediction_table
from echofocus_core.study.sources import (
    adopt_kinds,
    labelled_ids,
    source_studies,
    start_with_model,
    store_of,
    task_of,
    warn_of_other_input,
)
from echofocus_core.study.splits import (
    folds_for,
    known_to_others,
    seen_weights,
    some_of,
    without_seen,
)
from echofocus_core.video.store import (
    StudyDetails,
    UnreadableStudy,
    VideosAsStudies,
    open_folder,
    read_details,
)


def labelled_folds(model, config, settings, store):
    """(task, label table, fold of each of its studies, how it is known what was seen)."""
    config.pick("task", settings.task)
    adopt_kinds(config, settings.task, model)
    own = settings.dataset == model.record.dataset
    column = model.record.settings.split_column if own else ""
    task, table = load_labels(config, settings.task, settings.dataset, split_column=column)
    table = table.rename(index=stored_names(table.index, store))
    return task, table, *folds_to_test(model, task, table, settings, store)


def folds_to_test(model, task, whole, settings, store, listener=RUN):
    """(fold of each study of a whole label table, how it is known that those of test are unseen, by
    the model and by the encoder of the embeddings)."""
    digest = partial(digest_at_training, model, whole, store, task)
    of_model = (listener, settings.assume_unseen, digest)
    folds, how = folds_for(model, whole, settings.dataset, *of_model)
    encoder = store.encoder_seen(list(whole.index.intersection(list(store.files))), listener)
    known, more = known_to_others(whole, settings, encoder, listener=listener)
    return without_seen(folds, known, listener), "; ".join([how, *more])


def studies_in_fold(model, whole, folds, store, task, settings):
    """Label table rows of the chosen fold that have embeddings."""
    table = match_studies(whole, store, task, first_only=settings.first_study_only)
    wanted = FOLDS if settings.subset == "all" else [settings.subset]
    table = table[folds.reindex(table.index).isin(wanted)]
    if not len(table):
        hint = " (of models that are averaged, a study is test where none has seen its patient, "
        hint += "val where one validated on him and none trained)"
        averaged = isinstance(model, LoadedEnsemble)
        raise UserError(
            f"no study of {settings.dataset} is in the fold {settings.subset}" + hint * averaged
        )
    return table.loc[some_of(table.index, settings.sample_limit)]


def answered(model, config, settings, store, thresholds):
    """(Studies of the fold with the model's answers, their flow, how it is known what was seen,
    sentences on what makes the answers doubtful)."""
    task, whole, folds, how = labelled_folds(model, config, settings, store)
    table = studies_in_fold(model, whole, folds, store, task, settings)
    told = warn_of_other_input(model, store, list(table.index))
    for text in other_times(model, task.survival, task.units):
        RUN.warning(text, "say the unit in both, or give the column of the same times")
        told[text] = list(table.index)
    unreadable = {}
    found = run_studies(
        model.net, store, list(table.index), settings, unreadable=unreadable, label="evaluate"
    )
    report_unreadable(unreadable)
    if not len(found):
        raise UserError("no study could be read: nothing to evaluate")
    wanted = FOLDS if settings.subset == "all" else [settings.subset]
    reasons = folds.map(lambda fold: "" if fold in wanted else fold_in_words(fold))
    for reason, lost in (
        ("no label", whole[task.task_labels].isna().all(axis=1)),
        ("no clip embeddings", ~whole.index.isin(list(store.files))),
        (NOT_ASKED, ~whole.index.isin(table.index)),
        (UNREADABLE_EMBEDDINGS, ~whole.index.isin(found.eids)),
    ):
        reasons = reasons.mask(lost & (reasons == ""), reason)
    flow = study_flow(whole, reasons)
    studies = studies_of_answers(model, table, found, thresholds, settings)
    order = np.argsort(whole.index.get_indexer(studies.eids))  # the label table's
    return studies.take(order), flow, how, list(told)


def studies_of_answers(model, table, found, thresholds, settings):
    """Studies of an Outcome and the label table."""
    table = table.loc[found.eids]
    truth, predicted = table[model.outputs.columns], model.readable(found.logits)
    outcomes = outcomes_of(
        model.outputs, truth.to_numpy(), predicted, model.units, thresholds,
        settings.prevalence, settings.years,
    )  # fmt: skip
    return Studies(found.eids, table["pid"].to_numpy(), outcomes)


def fold_in_words(fold):
    given = "without a fold in the split column" if fold == "left out" else fold
    return f"in the {fold} fold" if fold in FOLDS else given


def thresholds_for(model, config, settings, store):
    """Label -> threshold: the model's, or those that --target chooses on its validation fold."""
    from echofocus_core.study.metrics import choose_threshold, read_target

    rule = settings.target or target_of(model)
    if rule != SEVERAL_RULES:
        read_target(rule)
    if rule == target_of(model) or not model.outputs.of_kind("binary"):
        return model.record.thresholds
    if settings.dataset != model.record.dataset:
        raise UserError(
            f"--target {rule}: thresholds are chosen on the validation fold, and that of "
            f"{model.folder.name} is in another dataset; train with this --target"
        )
    chosen_on = settings.model_copy(update={"subset": "val", "sample_limit": 0})
    studies, *_ = answered(model, config, chosen_on, store, {})
    findings = [o for o in studies.outcomes if o.label in model.outputs.of_kind("binary")]
    found = {o.label: choose_threshold(o.truth, o.probability, rule) for o in findings}
    return {label: cut for label, cut in found.items() if cut is not None}


def compared(config, settings, studies):
    """What to compare with -> what `other_studies` gives."""
    return {name: other_studies(name, config, settings, studies) for name in settings.compare}


def other_studies(name, config, settings, studies):
    """(Studies of a model, or of a table of predictions, to compare with these; notes).

    A model answers its own studies of the fold, at thresholds by the same rule.
    """
    if not name:
        raise UserError("--compare: a name is empty")
    if is_table(name):
        return studies_to_compare(Path(name), studies.outcomes, studies), []
    model = load_named(name, "", config, device=pick_device(settings.device))
    refuse_readings("evaluate --compare", model)
    if model.task not in config.tasks:
        path = config.tasks[settings.task].label_path
        config.tasks[model.task] = task_of(model, label_path=path)
    own, notes = settings.model_copy(update={"task": model.task}), []
    store = store_of(config, own)
    try:
        thresholds = thresholds_for(model, config, own, store)
    except UserError as error:
        thresholds, notes = {}, [f"not compared at a threshold: {error}"]
    found, _, how, told = answered(model, config, own, store, thresholds)
    seen = unseen_notes(own.subset, how if own.subset == "test" else "")
    return found, [*notes, *told, *seen]


def predict_page(path, model, source, config, settings, table, left_out):
    """The page of predictions, beside their table; the scores of all labels are computed for it."""
    folder, eids = page_folder(path), list(table["eid"])
    if isinstance(model.net, Readings):  # there is nothing to attribute
        make_page(folder, model, source, config, settings, table, left_out)
        return
    model = as_one(model)
    columns = label_columns(model)
    with ExitStack() as held:
        path = journal_path(folder)
        journal = explain_studies(model, source.store, eids, settings, path, held, columns)
        make_page(folder, model, source, config, settings, table, left_out, journal)
        journal.delete()


def journal_path(path):
    return path.with_name(f".{path.name}.journal")


def work_of(model, store, eids, settings, **more):
    """What the results of a command depend on, for its Journal."""
    work = {"model": network_digest(model.net), "studies": store.digest(eids)}
    work |= {"precision": settings.precision, "version": __version__, "form": 2}
    work |= {"most_videos": settings.max_videos_per_study, "spread": settings.spread}
    return work | more


def answer_studies(model, store, eids, settings, journal=None):
    """(table, why the others have no answer, warnings) of studies, see `prediction_table`.

    The journal gets a unit a window of studies (`plan_batches`), whole or not at all: what is
    computed after a restart is computed in the same company as without.
    """
    check = InputCheck(model.record.input.model_dump(exclude_none=True), model.novelty)
    windows, unreadable = list(journal or ()), {}
    rest = eids[WINDOW * len(windows) :]
    steps = run_steps(
        model.net, store, rest, settings, unreadable=unreadable, label="predict", look=check
    )
    for number, (outcome, _, _) in enumerate(steps):
        own = rest[WINDOW * number : WINDOW * (number + 1)]
        outcome = replace(outcome, embeddings=outcome.embeddings[:, :0])  # not needed here
        window = vars(outcome) | {"reach": reaches(model, store, outcome, settings, check.found)}
        window |= {name: {e: x[e] for e in own if e in x} for name, x in vars(check.found).items()}
        window["unreadable"] = {eid: unreadable[eid] for eid in own if eid in unreadable}
        windows.append(window)
        if journal is not None:
            journal.add(window)
    for window in windows:
        unreadable |= window["unreadable"]
        for name, found in vars(check.found).items():
            found |= window[name]
    found = merged([outcome_of(window) for window in windows], eids, model.net)
    note_cut_studies(store, found, check.found)
    rows = [
        dict(zip(w["eids"], w["reach"], strict=True)) for w in windows if w["reach"] is not None
    ]
    rows = {eid: row for part in rows for eid, row in part.items()}
    reach = np.array([rows[eid] for eid in found.eids]) if rows else None
    years = settings.years
    table, no_number = prediction_table(model, found, check.found, reach, years)
    return table, unreadable | no_number, check.found.warnings


def reaches(model, store, outcome, settings, told):
    """How far each answer of an Outcome moves with other clips: see `trust.reach_of`, or None."""
    if settings.spread == "none" or isinstance(model.net, Readings) or not len(outcome):
        return None
    keys = [(eid, k) for eid in outcome.eids for k in range(DRAWS)]
    drawn = run_studies(model.net, Resamples(store, settings.spread), keys, settings)
    draws = np.full((len(keys), len(model.labels)), np.nan)  # blank where a file vanished since
    place = {key: i for i, key in enumerate(keys)}
    draws[[place[key] for key in drawn.eids]] = model.for_range(drawn.logits)
    draws = draws.reshape(len(outcome), DRAWS, -1)
    clips = np.divide(outcome.n_clips, outcome.n_videos)
    modulo = [told.modulo[eid] for eid in outcome.eids]
    return reach_of(draws, outcome.n_videos, clips, modulo, settings.spread == "videos")


def note_cut_studies(store, found, told):
    """Note in an InputFound the studies of which `--max_videos_per_study` left videos out."""
    if getattr(store, "most_videos", 0):
        for eid, n in zip(found.eids, found.n_videos, strict=True):
            if n < (whole := store.header(eid).videos):
                told.notes[eid] = f"from {n} of its {whole} videos (--max_videos_per_study)"


def outcome_of(window):
    """A unit of the journal -> Outcome."""
    return Outcome(**{f.name: window[f.name] for f in fields(Outcome)})


def is_embedded(path):
    """Whether a file is one that `embed` wrote."""
    try:
        with open_hdf5(path) as f:
            return {"dataset", "task", "model_name"} <= set(f.attrs)
    except UNREADABLE:
        return False


def embed_source(source, model, settings):
    """Write the embeddings of a source's studies; returns the file's path."""
    dataset, store = source.name, source.store
    eids = some_of(source.eids, settings.sample_limit)
    told = warn_of_other_input(model, store, eids)
    write = embed_studies if settings.level == "study" else embed_videos
    name = f"{'' if settings.level == 'study' else 'video_'}embeddings_{dataset}"
    path = Path(settings.embed_file or model.folder / f"{name}_{settings.task}.h5")
    unreadable = {}
    with atomic_path(path) as temporary, new_hdf5(temporary) as f:
        n = write(f, model, store, eids, settings, unreadable)
        f.attrs["dataset"], f.attrs["task"] = dataset, settings.task
        f.attrs["model_name"] = model.folder.name
        if told:
            f.attrs["warning"] = "; ".join(told)
        report_unreadable(unreadable)
        if not n:
            raise UserError("no study could be read")
    print(f"wrote {n} {settings.level} embeddings to {path}")
    return path


def embed_studies(f, model, store, eids, settings, unreadable):
    """A dataset (768,) a study into the open HDF5 file, as published; returns how many.

    Without pooled queries (labels, 768), the attribute `labels` naming the rows.
    """
    if not settings.pool_queries:
        f.attrs["labels"] = model.labels
    found = run_studies(model.net, store, eids, settings, unreadable=unreadable, label="embed")
    for eid, embedding in zip(found.eids, found.embeddings, strict=True):
        f[eid] = embedding
    return len(found)


def embed_videos(f, model, store, eids, settings, unreadable):
    """A group a study with `embeddings` (V, 768) and `videos` (V,); returns how many videos.

    A video's embedding is the study embedding of that video alone. One study is held at a time:
    a cohort's videos would not fit into memory.
    """
    f.attrs["level"], n = "video", 0
    for eid in progress(eids, desc="embed", unit="study"):
        try:
            bag = store.read(eid)
        except UnreadableStudy as error:
            unreadable[eid] = str(error)
            continue
        found = run_studies(model.net, VideosAsStudies(bag), range(len(bag.videos)), settings)
        f[f"{eid}/embeddings"] = found.embeddings
        f[eid].create_dataset("videos", data=bag.videos, dtype=h5py.string_dtype())
        n += len(found)
    return n


def explain(typed, world, held):
    """What each process of `explain` does; held: ExitStack that keeps the journal's lock."""
    settings, config, model, source = start_with_model("explain", typed, world)
    answering, model = model, as_one(model)
    columns = label_columns(model, settings.explain_tasks)
    eids, truths, patients = explained_studies(answering, config, settings, source)
    told = warn_of_other_input(model, source.store, eids)
    eids = select_studies(model, source.store, eids, truths, columns, settings)
    path = config.datasets[source.name].views
    views = read_views(path, RUN, source.store, eids) if path else {}  # first: it may refuse
    names = explanation_names(model, settings, source.name, columns, eids)
    path = journal_path(model.folder / names["videos"])
    journal = explain_studies(
        model, source.store, eids, settings, path, held, columns, truths, world
    )
    if journal:
        videos = write_explanations(
            model, journal, truths, settings, source.name, names, report_unreadable, told
        )
        beside = model.folder / names["videos"].removesuffix(".csv")
        if views:
            write_views(videos, views, patients, beside)
            print(f"wrote {beside}.views.csv, .png and .pdf")
        if settings.curves:
            targets = dict(zip(truths.index, normalised(model, truths), strict=True))
            areas = write_curves(model, source.store, journal, targets, patients, settings, beside)
            print(areas.to_string(index=False, float_format="{:.3g}".format))
            print(f"wrote {beside}.curves.csv, .curve_areas.csv, .png and .pdf")
        if settings.page:
            table, reasons, _ = answer_studies(answering, source.store, eids, settings)
            left_out = source.unusable() | reasons
            make_page(beside, model, source, config, settings, table, left_out, journal, truths)
        journal.delete()


def explain_studies(model, store, eids, settings, path, held, columns, truths=None, world=None):
    """The Journal at `path` of what `explain_study` finds of each study, open as long as `held`
    (ExitStack); None in other processes of `world` than the first."""
    world, baseline = world or World(), clip_baseline(model, settings)
    if truths is None:
        truths = pd.DataFrame(np.nan, index=pd.Index(eids, name="eid"), columns=model.labels)
    targets = dict(zip(truths.index, normalised(model, truths), strict=True))
    journal = None
    if not world.rank:
        ways = ("explain_mode", "explain_method", "explain_steps", "baseline")
        work = work_of(
            model, store, eids, settings, columns=columns,
            truths=hashlib.sha256(truths.loc[eids].to_csv().encode()).hexdigest(),
            **{name: getattr(settings, name) for name in ways},
        )  # fmt: skip
        journal = held.enter_context(open_journal(path, work, "studies"))
    done = world.gather(journal.n if journal else 0)[0]
    explain_one = partial(
        explain_study, model, columns=columns, settings=settings, baseline=baseline
    )
    rounds = range(done, len(eids), world.size)
    for first in progress(rounds, desc="explain", unit="study", disable=world.rank > 0):
        unit = None
        if first + world.rank < len(eids):
            eid = eids[first + world.rank]
            try:
                unit = explain_one(eid, store.read(eid), truths=targets[eid])
            except UnreadableStudy as error:
                unit = {"eid": eid, "columns": [], "unreadable": str(error)}
        for finished in filter(None, world.gather(unit)):
            if journal:
                journal.add(finished)
    return journal


def make_page(folder, model, source, config, settings, table, left_out, units=(), truths=None):
    """The page of the studies in a prediction table: see report/page.py."""
    from echofocus_core.report.page import Page, PageStudy, write_page

    units = {unit["eid"]: unit for unit in units if unit["columns"]}
    sources = source_studies(source, config, list(table["eid"]))
    path, studies = config.datasets[source.name].embedding_path, []
    files = open_folder(path).files if path.is_dir() else {}
    for row in table.to_dict("records"):
        eid = row["eid"]
        unit = units.get(eid)
        names = unit["videos"] if unit else source.store.read(eid).videos
        truth = None if truths is None else truths.loc[eid].to_numpy()
        details = read_details(files[eid]) if eid in files else StudyDetails()
        studies.append(PageStudy(eid, row, names, unit, truth, details, sources.get(eid)))
    plain = plain_names(model, config)
    print(f"wrote {write_page(Page(folder, model, settings, studies, left_out, plain))}")


def plain_names(model, config):
    """Label -> what a reader calls it: by the registry of released models, and by the config."""
    task = config.tasks.get(model.task)
    return released_task(model.task).get("names", {}) | (task.names if task else {})


def explained_studies(model, config, settings, source):
    """(ids of the studies to explain, their labels in physical units, NaN where there is none,
    the patients of those that a label table names).

    Studies that no label table names are explained too: those that neither the model nor the
    encoder has seen are of the test fold.
    """
    there = source.eids
    truths = pd.DataFrame(np.nan, index=pd.Index(there, name="eid"), columns=model.labels)
    folds, patients = pd.Series("test", index=truths.index), {}
    own = config.datasets[source.name].label_path
    labelled = own or labelled_ids(config, settings, source.store)
    encoder, _ = source.store.encoder_seen(there, Collected() if labelled else RUN)
    if seen := [*(model.seen or ()), *([] if settings.assume_unseen else encoder)]:
        nobody = truths.assign(pid=[f"study {eid}" for eid in there])  # known by study alone
        folds = seen_weights(seen, nobody).map({0: "test", 1: "val", 2: "train"})
    if labelled:
        _, table, of_table, _ = labelled_folds(model, config, settings, source.store)
        named = table.index.intersection(there)
        patients = dict(table["pid"])
        truths.loc[named] = model.outputs.truths(table.loc[named])
        folds[named] = of_table[named]
    elif settings.explain_mode == "loss":
        raise UserError("--explain_mode loss needs labels: set label_path in the config")
    if settings.eids:
        for eid in settings.eids:
            if eid not in truths.index:
                raise UserError(f"no study {eid} in {source.name}{nearest(eid, there)}")
        return list(dict.fromkeys(settings.eids)), truths, patients
    if settings.subset != "all":
        there = [eid for eid in there if folds[eid] == settings.subset]
    if not there:
        hint = "; --subset all takes those that the models have seen too"
        hint *= isinstance(model, LoadedEnsemble)
        raise UserError(f"no study of {source.name} is in the fold {settings.subset}{hint}")
    return sorted(there), truths, patients


def select_studies(model, store, eids, truths, columns, settings):
    """The studies that `--select` names, best first (`explanations.ranked`). Raises UserError."""
    if settings.select == "all":
        return some_of(eids, settings.sample_limit)
    kinds = {model.kind(model.labels[i]) for i in columns}
    if len(kinds) > 1:
        raise UserError(f"--select {settings.select} is for one kind of label: --explain_tasks")
    if kinds != {"binary"} and (settings.select != "wrong" or kinds != {"regression"}):
        raise UserError(f"--select {settings.select} is not for labels of type {kinds.pop()}")
    found = run_studies(model.net, store, eids, settings, label="select")
    targets = normalised(model, truths.loc[found.eids])
    order = ranked(model, found.logits, targets, columns, settings.select)
    chosen = [found.eids[i] for i in order][: settings.sample_limit or SELECTED]
    if not chosen:
        raise UserError(f"--select {settings.select} finds no study")
    print(f"{len(chosen)} of {len(eids)} studies are explained: {settings.select}")
    return chosen


def normalised(model, truths):
    """Labels (S, T) in physical units -> as the network's outputs are."""
    return scale(truths.to_numpy(), model.labels, model.scaling or {})
