"""EchoFocus: one answer per echocardiography study from all of its videos.

    python echofocus.py demo                                  # the whole path on phantoms
    python echofocus.py download EchoFocus_CHD                # a released model; --list names them
    python echofocus.py inspect  EchoFocus_CHD                # what a model is and where it is from
    python echofocus.py train    --task chd                   # learn a task from a label table
    python echofocus.py evaluate --model_name chd             # metrics and figures on the test fold
    python echofocus.py predict  --model_name chd --videos F  # DICOM in, probabilities out
    python echofocus.py embed    --dataset outside            # one 768-vector a study
    python echofocus.py explain                               # the videos that drove an answer
    python echofocus.py check                                 # what a long run would trip over

What is left out has a default, and the tool prints which it took. Files: a config (JSON: tasks and
datasets), a label table (CSV: pid, eid, one column a label), a folder of clip embeddings (HDF5, one
file a study, from embed/extract.py or the published scripts), a model folder below trained_models/.

The file is in the order in which data flows: embedding store and batches -> checkpoints -> the loop
-> training -> evaluate, predict, embed, explain, check -> command line. What comes before (config,
label table, folds) and the network are in common/, what a person looks at is drawn by report/.
Axis letters: S studies, V videos, C clips, N tokens (all clips of a batch), D features, T labels.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections import Counter, deque
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch
from pydantic import FiniteFloat, TypeAdapter

from common import __version__, checkpoints, releases
from common.cohort import (
    cohort_of,
    digest_at_training,
    fold_table,
    match_studies,
    stored_names,
    training_folds,
)
from common.console import (
    EXTRACT,
    PROGRAM,
    RUN,
    Collected,
    Parser,
    Threads,
    UserError,
    duration,
    listed,
    nearest,
    progress,
    run_main,
    some,
)
from common.files import (
    atomic_path,
    begins,
    derive_seed,
    lock,
    open_journal,
    output_path,
    packed_path,
    sha256_file,
    write_table,
)
from common.hdf5 import UNREADABLE, new_hdf5, open_hdf5
from common.labels import (
    load_labels,
    other_unit,
    read_rows,
    scale,
)
from common.models import (
    Ensemble,
    LoadedEnsemble,
    LoadedModel,
    clip_mean_from,
    labels_for,
    network_from,
    outputs_from,
    pooling_of,
    readable,
    released_task,
)
from common.options import (
    ALL_FOLDS,
    EXTRACTION,
    FOLDS,
    OPTIONS,
    RECORDED,
    THROUGH,
    Settings,
    add_options,
    checked_options,
    grid_of,
    options_of,
    validated,
)
from common.outputs import EVENT, Outputs
from common.schema import (
    MODELS,
    Config,
    Dataset,
    Hazard,
    Input,
    Record,
    Task,
    input_options,
    pick_dataset,
    read_config,
    read_record,
    resolve_settings,
)
from common.splits import (
    all_seen,
    folds_for,
    known_to_others,
    refuse_other_folds,
    seen_from,
    seen_weights,
    some_of,
    without_seen,
    write_split,
)
from common.study_model import Readings, StudyModel, study_losses
from common.world import World, from_environment, join_world, pick_device
from embed import EMBED_DIM as D
from embed import extract, panecho
from embed.end_to_end import ENCODER_FILE, EndToEnd, open_videos
from embed.panecho import published_parts
from embed.preview import preview_cohort, preview_extraction
from embed.store import (
    MADE_WITH,
    PackedEmbeddings,
    StudyClips,
    StudyDetails,
    UnreadableStudy,
    VideosAsStudies,
    VideosOf,
    open_folder,
    open_store,
    read_details,
    write_pack,
)
from embed.studies import studies_of_dataset
from report.attribution import clip_baseline, explain_study
from report.demo import cmd_demo
from report.explanations import (
    SELECTED,
    explanation_names,
    ranked,
    video_rows,
    write_explanations,
)
from report.faithfulness import read_views, write_curves, write_views
from report.figures import plot_history
from report.inspect import describe_encoder, describe_model, print_description
from report.maps import make_map, map_rows
from report.predictions import (
    page_folder,
    prediction_table,
    refuse_other_tables,
    report_left_out,
)
from report.trust import (
    DRAWS,
    InputCheck,
    Novelty,
    Resamples,
    TrainingInput,
    reach_of,
    report_warnings,
)

# ---------------------------------------------------------------------------------- embedding store


def cmd_pack(typed):
    """One HDF5 file of a dataset's embeddings, <embedding_path>.packed.h5 (`PackedEmbeddings`)."""
    config = read_config(typed.get("config"), needed=not typed.get("embedding_path"))
    name, _ = pick_dataset(typed, config)
    folder = config.datasets[name].embedding_path
    source, path = open_folder(folder), packed_path(folder)
    try:
        with lock(path, timeout=0):
            unreadable = write_pack(source, path, np.dtype(Settings(**typed).dtype))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot write {path}: {error}; an older pack stays as it is, the same command begins "
            "anew"
        ) from error
    report_unreadable(unreadable)
    packed = len(source.files) - len(unreadable)
    print(f"packed {name}: {packed} studies, {path.stat().st_size / 1e9:.2f} GB in {path.name}")


def store_of(config, settings, name="", listener=RUN):
    """The clip embeddings of a dataset, that of the settings unless another is named."""
    path = config.datasets[name or settings.dataset].embedding_path
    store = open_store(path, listener, settings.max_videos_per_study)
    return of_level(store, config, settings, listener)


def of_level(store, config, settings, listener=RUN):
    """A store of what the task's labels are of: studies, or their videos."""
    task = config.tasks.get(settings.task)
    return VideosOf(store, listener) if task and task.level == "video" else store


def refuse_mixed(store, eids, allowed, findings):
    """An error where studies were made with different encoders or settings, or some do not say.

    With --allow_mixed it is a warning.
    """
    for name, studies in store.made_with(eids).items():
        if len(studies) < 2:
            continue
        kinds = sorted(studies.items(), key=lambda item: -len(item[1]))
        groups = [
            f"{str(kind)[:12] or 'not said'} ({len(e)} studies: {some(e)})" for kind, e in kinds
        ]
        text = f"the embeddings were made with different {name}: {some(groups)}"
        if allowed:
            findings.warning(text, "used all the same (--allow_mixed)")
        else:
            remedy = f"extract all with the same settings ({EXTRACT} --redo), or --allow_mixed"
            findings.error(text, remedy)


# ------------------------------------------------------------------------------------------ batches


@dataclass
class Planned:
    """Studies to be computed together."""

    eids: list[str]
    ends_step: bool  # the last batch of its step


@dataclass
class Batch:
    """Some studies' clips, one after the other: no padding. Empty where none can be read."""

    eids: list[str]
    tokens: torch.Tensor  # (N, D) float32; for an EndToEnd uint8 images (N, L, S, S, 3)
    lengths: list[int]  # clips of each study; sums to N
    n_videos: list[int]
    ends_step: bool
    pull: tuple | None = None  # see `with_pulls`


READERS = min(16, os.cpu_count() or 1)  # threads that read studies
READ_AHEAD = 3  # batches read while another is computed
WINDOW = 256  # studies between two points where results are handed on, outside training


def plan_batches(store, eids, settings, training, world=None):
    """Yield the Planned batches of this process; each step has one that ends it.

    A step is `settings.batch_number` studies in training. Within one, studies of like size share
    a batch, up to the limits in `settings`; the plan depends on nothing but the studies. The
    batches of a step are dealt to the processes of `world`.
    """
    world = world or World()
    step = settings.batch_number if training else WINDOW
    kept = 1 - settings.clip_dropout if training else 1
    for start in range(0, len(eids), step):
        chunk = eids[start : start + step]
        sizes = {eid: kept * store.size(eid) for eid in chunk}
        batches, n = [[]], 0.0
        for eid in sorted(chunk, key=sizes.get, reverse=True):  # the largest first: see memory soon
            full = settings.batch_size and len(batches[-1]) == settings.batch_size
            if batches[-1] and (full or n + sizes[eid] > settings.batch_tokens):
                batches.append([])
                n = 0.0
            batches[-1].append(eid)
            n += sizes[eid]
        *others, last = batches[world.rank :: world.size] or [[]]
        yield from (Planned(batch, False) for batch in others)
        yield Planned(last, True)


def read_batches(store, plan, settings, unreadable, train_seed=None, look=None, pin=False):
    """Yield the Batch of every Planned, in order; threads read ahead, one more joins what is read.

    unreadable: dict that gets study id -> reason for what cannot be read; those are passed over.
    train_seed: for training, what draws (by study) a transformed copy of the videos, if there are
    any, and the clips that `settings.clip_dropout` leaves out; at least one clip stays.
    look: called with the id and the StudyClips of every study that is read.
    pin: join in page-locked memory, which a GPU copies from while it computes.
    """

    def read(eid):
        """(tokens (N, D), number of videos) of a study, or the UnreadableStudy."""
        rng = None
        if train_seed is not None:
            rng = np.random.default_rng(derive_seed("study", train_seed, eid))
        try:
            study = store.read(eid, rng)
        except UnreadableStudy as error:
            return error
        if look:
            look(eid, study)
        tokens = study.embeddings  # (V, C, D), or of images (V, C, L, S, S, 3)
        tokens = tokens.reshape(-1, *tokens.shape[2:])
        if rng is not None and settings.clip_dropout:
            kept = np.flatnonzero(rng.random(len(tokens)) >= settings.clip_dropout)
            tokens = tokens[kept if len(kept) else rng.integers(len(tokens), size=1)]
        return tokens, len(study.videos)

    def collect(planned, futures):
        studies = {eid: f.result() for eid, f in zip(planned.eids, futures, strict=True)}
        failed = {eid: x for eid, x in studies.items() if isinstance(x, UnreadableStudy)}
        unreadable.update((eid, str(error)) for eid, error in failed.items())
        read = {eid: x for eid, x in studies.items() if eid not in failed}
        return collate(read, planned.ends_step, pin)

    ahead = deque()
    with Threads(READERS) as readers, Threads(1) as joiner:
        for planned in plan:
            futures = [readers.submit(read, eid) for eid in planned.eids]
            ahead.append(joiner.submit(collect, planned, futures))
            if len(ahead) > READ_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def collate(studies, ends_step, pin=False):
    """A Batch of studies, a dict of id to (tokens, number of videos)."""
    tokens = [tokens for tokens, _ in studies.values()]
    each = tokens[0].shape[1:] if tokens else (D,)
    kind = torch.uint8 if len(each) > 1 else torch.float32  # images, or embeddings
    joined = torch.empty(sum(map(len, tokens)), *each, dtype=kind, pin_memory=pin)
    if tokens:
        np.concatenate(tokens, out=joined.numpy())
    n_videos = [n for _, n in studies.values()]
    return Batch(list(studies), joined, [len(t) for t in tokens], n_videos, ends_step)


def warn_of_other_input(model, store, eids, listener=RUN, names=MADE_WITH):
    """Tell which studies' embeddings were made otherwise than those that the model was trained on:
    by another encoder, of other clips. Returns what was told: sentence -> studies."""
    name, trained, told = model.folder.name, model.record.input, {}
    encoder = model.record.encoder_sha256
    made = store.made_with(eids)
    for what in names:
        was = str((encoder if what == "weights_sha256" else getattr(trained, what)) or "")
        for given, studies in made[what].items() if was else ():
            if given in ("", was):
                continue
            which = f"{len(studies)} studies ({some(studies)}"
            if what == "weights_sha256":
                text = (
                    f"{name} was trained on embeddings of another encoder than those of {which}; "
                )
                text += f"weights {given[:12]}): its answers mean nothing there"
                remedy = f"extract them with the encoder weights of SHA-256 {was[:12]}"
            else:
                text = f"{name} was trained on embeddings of {what} {was}, those of {which}) are "
                text += f"of {given}: its answers may mean nothing there"
                remedy = "extract them with the settings of those it was trained on"
            listener.warning(text, remedy)
            told[text] = studies
    if not encoder:
        listener.ok(f"{name} does not say which encoder it goes with")
    elif not told:
        listener.ok("the model and the embeddings go with one encoder")
    return told


# -------------------------------------------------------------------------------------- checkpoints


def read_checkpoint(path):
    """The dict in a checkpoint file, read without running anything in it. Raises UserError."""
    saved = checkpoints.load_safely(path)
    if isinstance(saved, dict) and (parts := published_parts(saved.get("model_state_dict"))):
        saved["model_state_dict"] = parts["study"]  # published, trained through the encoder
        saved["end_to_end"] = True
    if not isinstance(saved, dict) or not isinstance(saved.get("model_state_dict"), dict):
        hint = "; it is an encoder: give it as --weights" if is_encoder(saved) else ""
        raise UserError(f"{path} is not a checkpoint: it has no model_state_dict{hint}")
    return saved


def is_encoder(saved):
    return isinstance(saved, dict) and isinstance(saved.get("weights"), dict)


def load_model(folder, config, task="", which="best", device="cpu"):
    """Load a model folder's checkpoint, published or our own, or PanEcho. Raises UserError."""
    path = folder / f"{which}_checkpoint.pt"
    if not path.is_file() and (file := panecho.encoder_in(folder)):
        return load_readings(file, device)
    releases.check_source(path)
    saved = read_checkpoint(path)
    record = read_record(saved, path)
    net, n_labels = network_from(saved["model_state_dict"], pooling_of(record), path)
    task, labels, units, origin = labels_for(folder, record, n_labels, config, task)
    if not record:
        print(f"labels of {folder.name}: task {task} of {origin} ({n_labels})")
    outputs, scaling = outputs_from(saved, record, labels, path)
    net.groups = outputs.groups
    net.to(device).eval().requires_grad_(False)
    encoder_file = path if saved.get("end_to_end") else folder / ENCODER_FILE
    encoder_file = encoder_file if encoder_file.is_file() else None
    if not record:
        record = Record(input=Input(size=224, clip_len=16))  # as published models were
        if encoder_file == path:
            record.input.weights_sha256 = record.encoder_sha256 = sha256_file(path)
    return LoadedModel(
        folder, net, task, outputs, scaling, record, units,
        seen_from(saved, folder), encoder_file, clip_mean_from(saved, path),
        novelty_from(saved, path),
    )  # fmt: skip


def load_named(name, run_id, config, task="", device="cpu"):
    """The model of `--model_name`, or the average of several: `a,b,c`, or the folds in a folder."""
    names = name.split(",")
    if len(names) > 1 and not all(map(str.strip, names)):
        raise UserError(f"{name}: a name is missing beside a comma")
    folders = [find_model_folder(x, run_id, task, config) for x in names]
    folder = folders[0]
    if len(folders) == 1:
        folders = folds_in_folder(folder) or folders
    if len(folders) == 1:
        return load_model(folder, config, task, device=device)
    if "," in name:
        folder = folder.with_name("+".join(f.name for f in folders)[:100])
    members = [load_model(f, config, task, device=device) for f in folders]
    return ensemble_of(members, folder)


def folds_in_folder(folder):
    """The model folders of a cross-validation, or []."""
    if (folder / "best_checkpoint.pt").is_file():
        return []
    return sorted(p.parent for p in folder.glob("fold_*/best_checkpoint.pt"))


def other_times(model, survival, units):
    """Sentences on survival labels whose times come from other columns than the model's, where not
    both say their unit. survival: label -> columns."""
    found = []
    for label, columns in model.record.survival.items():
        time, said = survival.get(label, columns)[0], model.units.get(label) and units.get(label)
        if time != columns[0] and not said:
            found.append(
                f"times of {label} are in the column {time} and were in {columns[0]} for "
                f"{model.folder.name}: nothing says that both are in one unit (units of the task)"
            )
    return found


SEVERAL_RULES = "several rules"  # for `target` of models whose thresholds are not averaged


def ensemble_of(members, folder):
    """A LoadedEnsemble. Raises UserError for models of different labels or encoders."""
    first = members[0]
    for m in members[1:]:
        for what, one, other in (
            ("labels", first.labels, m.labels),
            ("type", first.outputs.kinds, m.outputs.kinds),
            ("level", first.record.level, m.record.level),
            ("units", first.units, m.units),
            ("encoder", first.record.encoder_sha256, m.record.encoder_sha256),
            *((x, getattr(first.record.input, x), getattr(m.record.input, x)) for x in MADE_WITH),
        ):
            if one != other and None not in (one, other):
                raise UserError(
                    f"{first.folder.name} and {m.folder.name} differ in {what}: not averaged"
                )
        if texts := other_times(first, m.record.survival, m.units):
            raise UserError(f"{m.folder.name}, {texts[0]}: not averaged")
    if first.type == "readings":
        raise UserError("PanEcho's readings are one model's: they are not averaged")
    known = [m.seen is not None for m in members]
    ours = [bool(m.record.labels) for m in members]
    if any(ours) and not all(known):
        who = members[known.index(False)].folder.name
        raise UserError(
            f"{who} does not say whom it was trained on: leave it out, or put its split.csv there"
        )
    seen = [part for m in members for part in m.seen] if all(known) else None
    rules = dict.fromkeys(target_of(m) for m in members if m.record.thresholds)
    settings = first.record.settings
    if len(rules) > 1:
        settings = settings.model_copy(update={"target": SEVERAL_RULES})
        RUN.warning(
            f"the thresholds of these models were chosen by {SEVERAL_RULES} ({some(rules)}): the "
            "average decides nothing",
            "evaluate --target chooses new ones on the validation fold",
        )
    thresholds = {
        label: float(np.mean([m.record.thresholds[label] for m in members]))
        for label in first.labels
        if len(rules) < 2 and all(label in m.record.thresholds for m in members)
    }
    unlearnt = [x for x in first.labels if all(x in m.record.unlearnt for m in members)]
    record = first.record.model_copy(
        update={"thresholds": thresholds, "unlearnt": unlearnt, "settings": settings}
    )
    print(f"averaging {len(members)} models: {some(m.folder.name for m in members)}")
    net = Ensemble([m.net for m in members]).eval().requires_grad_(False)
    return LoadedEnsemble(
        folder, net, first.task, first.outputs, first.scaling, record, first.units,
        seen, encoder_file=first.encoder_file, clip_mean=first.clip_mean, novelty=first.novelty,
        members=members,
    )  # fmt: skip


def novelty_from(saved, path):
    """The Novelty in a checkpoint, or None. Raises UserError."""
    try:
        return saved.get("novelty") and Novelty.load(saved["novelty"])
    except ValueError as error:
        raise UserError(f"{path}: its novelty is damaged: {error}") from error


def load_readings(file, device):
    """The heads of an encoder file: panecho.pt, or one that embed/train.py wrote."""
    encoder, digest = panecho.load_panecho(file)
    if not encoder.tasks:
        raise UserError(f"{file} is an encoder without a head: it gives embeddings, no readings")
    net = Readings(encoder).to(device).eval().requires_grad_(False)
    own = panecho.read_encoder(file)[1]
    size = {"size": own.size, "clip_len": own.clip_len} if own else {}
    record = Record(encoder_sha256=digest, input=Input(weights_sha256=digest, **size))
    outputs = Outputs.of(net.columns, "readings")
    return LoadedModel(file.parent, net, "panecho", outputs, None, record, {})


def model_folder(name, run_id=""):
    """`--model_name` (and `--run_id`) -> folder: a path as it is, a name in ./trained_models."""
    if os.sep in run_id:
        raise UserError(f"--run_id is appended to a name and has no {os.sep}: {run_id}")
    name += f"_{run_id}" if run_id else ""
    return Path(name) if os.sep in name else MODELS / name


def find_model_folder(name, run_id="", task="", config=None):
    """The folder of a trained model; without a name the newest in ./trained_models (of a task).

    The name may also be a path of the folder or of the checkpoint in it.
    """
    if Path(name).name == "best_checkpoint.pt" and Path(name).is_file():
        folder = Path(name).parent
        return folder if folder.name else Path(os.pardir, Path.cwd().name)  # one that has a name
    if name:
        file = name.endswith(".pt") and panecho.encoder_in(name)
        if file and not is_encoder(checkpoints.load_safely(file)):
            raise UserError(f"no trained model {file}{how_to_get(name, [])}")
        folder = file or model_folder(name, run_id)
        there = (folder / "best_checkpoint.pt").is_file() or folds_in_folder(folder)
        if not (there or panecho.encoder_in(folder)):
            known = [p.parent.name for p in MODELS.glob("*/best_checkpoint.pt")]
            raise UserError(f"no trained model {folder}{how_to_get(name, known)}")
        return folder
    found = [*MODELS.glob("*/best_checkpoint.pt"), *MODELS.glob("*/fold_0/best_checkpoint.pt")]
    found.sort(key=lambda p: p.stat().st_mtime)
    if task:
        found = [p for p in found if is_of_task(p.parent, task, config)]
    if not found:
        get = next((n for n, e in releases.registry().items() if e.get("task") == task), "")
        get = f"{PROGRAM} download {get}, " if task and get else ""
        raise UserError(
            f"no trained model{' of task ' + task if task else ''} in ./{MODELS}; {get}train one "
            "first, or name one with --model_name"
        )
    folder = MODELS / found[-1].relative_to(MODELS).parts[0]
    print(f"using model_name = {folder.name} (the newest in ./{MODELS})")
    return folder


def how_to_get(name, known):
    """The end of 'no trained model X': what else is there, or how to get a released one."""
    if name.endswith(".pt") and Path(name).is_file():
        return f"; make a model folder of the file: {PROGRAM} download {name}"
    if name in releases.registry():
        return f"; get it with: {PROGRAM} download {name}"
    return (
        f"{nearest(name, [*known, *releases.registry()])}; train it, or get a released one "
        f"({PROGRAM} download --list)"
    )


def is_of_task(folder, task, config):
    """Whether a folder's model is of a task: by its own word, the registry or the label count."""
    path = folder / "best_checkpoint.pt"
    try:
        saved = read_checkpoint(path)
        record = read_record(saved, path)
        _, n_labels = network_from(saved["model_state_dict"], "avg", path)
    except UserError as error:
        print(f"passed over {folder.name}: {error}")
        return False
    own = record.task if record else releases.released(folder).get("task")
    if own or not config or task not in config.tasks:
        return own == task
    return len(config.tasks[task].task_labels) == n_labels


# ------------------------------------------------------------------------------ download, inspect


def cmd_download(typed):
    """Put a released model, or one from a URL, zip, folder or .pt file, into ./trained_models.

    It is refused when it cannot be read safely, and its SHA-256 is recorded and checked ever after.
    """
    settings = Settings(**typed)
    if settings.list_ or not settings.source:
        print_released()
        return
    if settings.sha256 and not re.fullmatch("[0-9a-fA-F]{64}", settings.sha256):
        raise UserError(f"--sha256 takes 64 hexadecimal digits, not {settings.sha256}")
    folder, record, others = releases.install(
        settings.source, MODELS, settings.model_name, settings.sha256, check_download
    )
    if others:
        print(f"left out, no part of a model: {', '.join(others[:10])}")
    if record["sha256"]:
        known = "as it should be" if record["sha256_was_known"] else "not known before: recorded"
        print(f"SHA-256 {record['sha256']} ({known})")
    for key in ("licence", "citation"):
        if key in record:
            print(f"{key}: {record[key]}")
    print(f"the model is {folder}; {PROGRAM} inspect {folder.name} says what it holds")


def print_released():
    """The registry, one model a line, and what each asks of its users."""
    for name, entry in releases.registry().items():
        there = "downloaded" if (MODELS / name / entry["file"]).is_file() else "not here"
        print(f"{name:18} {there:11} {entry['about']}; {entry['licence']}; {entry['citation']}")
    print(f"get one: {PROGRAM} download NAME (research use only, under its licence)")


def check_download(folder, entry):
    """UserError for a downloaded model that cannot be used. entry: of the registry, or {}."""
    for path in sorted(folder.glob("*_checkpoint.pt")):
        saved = read_checkpoint(path)
        record = read_record(saved, path)
        _, n_labels = network_from(saved["model_state_dict"], "avg", path)
        if not record and n_labels != len(entry.get("labels", range(n_labels))):
            raise UserError(f"{path} has {n_labels} outputs, not {len(entry['labels'])}")
    if (folder / "panecho.pt").is_file():
        panecho.load_panecho(folder / "panecho.pt")


def cmd_inspect(typed):
    """Print what a model folder or .pt file holds: architecture, labels, history, origin."""
    settings = Settings(**typed)
    if settings.json_:
        described = begins(r'\{\s+"name": .*\s+"file": ')
        output_path(settings.json_, "--json", "description by inspect", described)
    path = find_model_file(settings.source or settings.model_name)
    releases.check_source(path)
    if is_encoder(checkpoints.load_safely(path)):
        facts = describe_encoder(panecho.load_panecho(path)[0])
    else:
        facts = model_facts(path, read_config(settings.config, needed=False))
    facts = {"name": path.parent.resolve().name, "file": path.name} | facts
    facts |= {"sha256": sha256_file(path), "source": origin_of(path.parent)}
    files = sorted(path.parent.iterdir()) if path.name in releases.CHECKPOINTS else [path]
    facts["files"] = {p.name: p.stat().st_size for p in files if p.is_file()}
    print_description(facts)
    if settings.json_:
        with atomic_path(settings.json_) as temporary:
            temporary.write_text(json.dumps(facts, indent=2, default=str) + "\n")
        print(f"wrote {settings.json_}")


def find_model_file(name):
    """The checkpoint or encoder file of a model name, folder or .pt path; '' is the newest."""
    if name.endswith(".pt") and Path(name).is_file():
        return Path(name)
    if name and (path := panecho.encoder_in(model_folder(name))):
        return path
    return find_model_folder(name) / "best_checkpoint.pt"


def origin_of(folder):
    """Where a model is from, its licence and citation: its own record, else the registry's."""
    entry = releases.released(folder)
    entry = {k: entry[k] for k in ("licence", "citation") if k in entry}
    return {k: v for k, v in (entry | releases.read_source(folder)).items() if k != "files"}


def model_facts(path, config):
    """What a checkpoint says of itself; labels that nobody names are numbered."""
    saved = read_checkpoint(path)
    record = read_record(saved, path)
    net, n_labels = network_from(saved["model_state_dict"], pooling_of(record), path)
    facts = {}
    try:
        task, labels, units, origin = labels_for(path.parent, record, n_labels, config)
        outputs, scaling = outputs_from(saved, record, labels, path)
    except UserError as error:
        task, units, origin, scaling = "", {}, "nobody", None
        labels, facts["labels_missing"] = [f"output {i + 1}" for i in range(n_labels)], str(error)
        outputs = Outputs.of(labels, "regression" if saved.get("input_norm_dict") else "binary")
    facts |= {"task": task, "labels_from": origin}
    return facts | describe_model(
        net, saved, record.to_save() if record else {}, outputs, units, scaling
    )


# ----------------------------------------------------------------------------------------- the loop


@dataclass
class Outcome:
    """What the loop found, a row a study."""

    eids: list[str]
    logits: np.ndarray  # (S, T) float32
    embeddings: np.ndarray  # (S, D) float32; (S, 0) in training and validation
    losses: np.ndarray  # (S,) float32; empty without targets
    n_videos: list[int]
    n_clips: list[int]

    def __len__(self):
        return len(self.eids)

    def take(self, rows):
        """The rows of these numbers, in their order."""
        losses = self.losses[rows] if len(self.losses) else self.losses
        lists = ([x[i] for i in rows] for x in (self.eids, self.n_videos, self.n_clips))
        eids, n_videos, n_clips = lists
        return Outcome(eids, self.logits[rows], self.embeddings[rows], losses, n_videos, n_clips)


def run_steps(
    net, store, eids, settings, *, targets=None, outputs=None, optimizer=None, epoch=0,
    unreadable=None, label="", world=None, look=None,
):  # fmt: skip
    """The one loop: every study through the net once, in steps (`plan_batches`).

    Yields (Outcome, number of studies, mean loss) of each step.

    targets: dict of study id to what to learn (C,), NaN where missing, of these `outputs` (see
    `common.outputs`). With an optimiser the net is trained: each step ends with an update on the
    mean of its studies' losses. The batches of a step are dealt to the processes of `world`, which
    add up their gradients and so update alike; an Outcome has the process's own studies, number and
    mean loss are over all processes.
    All randomness comes from (settings.seed, epoch, study), none is kept: the rest of the studies
    alone gives what the whole epoch gives from there on.
    """
    training, world = optimizer is not None, world or World()
    device = next(net.parameters()).device
    unreadable = {} if unreadable is None else unreadable
    train_seed = derive_seed(settings.seed, epoch) if training else None
    plan = plan_batches(store, eids, settings, training, world)
    compute = partial(
        run_batch, net, settings=settings, targets=targets, outputs=outputs,
        seed=derive_seed("dropout", settings.seed, epoch) if training else None,
    )  # fmt: skip
    rows, total, average = [], None, None
    net.train(training)
    quiet = not label or world.rank > 0
    with progress(total=len(eids), desc=label, unit="study", leave=False, disable=quiet) as bar:
        pin = device.type == "cuda"
        batches = read_batches(store, plan, settings, unreadable, train_seed, look, pin)
        if training and outputs.by_step:
            batches = with_pulls(batches, compute, net, world)
        for batch, found in side_by_side(batches, compute, device):
            if batch.eids:
                logits, embeddings, losses, gradients = found
                total = add(total, gradients)
                rows.append((batch.eids, logits, embeddings, losses, batch.n_videos, batch.lengths))
                bar.update(len(batch.eids) if world.size == 1 else 0)
            if not batch.ends_step:
                continue
            outcome, rows = gather(rows, net), []
            n, loss = len(outcome), np.nan
            if training:
                n, loss = update(net, optimizer, total, outcome.losses, world)
                total = None
                bar.update(n if world.size > 1 else 0)
                if np.isfinite(loss):
                    average = loss if average is None else 0.9 * average + 0.1 * loss
                bar.set_postfix(loss=f"{loss if average is None else average:.4f}", refresh=False)
            yield outcome, n, loss


def side_by_side(batches, compute, device):
    """Yield (batch, what `compute` makes of it) in order, a step's batches several at a time.

    On a CPU each core has a batch of its own: products that are split over the cores wait for the
    slowest of them, so that another job on one core would halve the speed.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        yield from ((batch, compute(batch)) for batch in batches)
        return
    ahead = deque()
    try:
        with Threads(threads, "batch", torch.set_num_threads, (1,)) as pool:
            for batch in batches:
                ahead.append((batch, pool.submit(compute, batch)))
                while ahead and (batch.ends_step or len(ahead) > threads):
                    first, future = ahead.popleft()
                    yield first, future.result()
    finally:
        torch.set_num_threads(threads)  # of threads to come, which torch gives the last number set


def with_pulls(batches, compute, net, world):
    """Batches with `pull`, (losses (S,), their gradient in the outputs (S, O)), for labels of which
    a study's loss depends on all studies of the step.

    Each step is run twice: once for its outputs, those of all processes, and then, by `run_batch`,
    for the gradients, which are exact. A step's clips (through the encoder: its images) are in
    memory together, its activations are not.
    """
    step, (targets, outputs) = [], (compute.keywords[x] for x in ("targets", "outputs"))
    for batch in batches:
        step.append(batch)
        if not batch.ends_step:
            continue
        found = [compute(b, first=True) for b in step if b.eids]
        own = torch.cat([x.cpu() for x in found]) if found else torch.zeros(0, net.n_labels)
        eids = [eid for b in step for eid in b.eids]
        everyone = world.gather((eids, own.numpy()))
        first = sum(len(x) for x, _ in everyone[: world.rank])
        logits = torch.tensor(np.concatenate([x for _, x in everyone]), requires_grad=True)
        wanted = np.array([targets[eid] for x, _ in everyone for eid in x], np.float32)
        if len(logits):
            with torch.enable_grad():
                losses = study_losses(logits, torch.from_numpy(wanted), outputs)
            (pulls,) = torch.autograd.grad(losses.sum(), logits)
        for b in step:
            rows, first = slice(first, first + len(b.eids)), first + len(b.eids)
            yield replace(b, pull=(losses[rows].detach(), pulls[rows]) if b.eids else None)
        step = []


def run_batch(net, batch, settings, targets, outputs, seed, first=False):
    """(logits, embeddings, losses, gradients) of a Batch, on the net's device; None if empty.

    seed: of the dropout, in training, which alone has gradients: a list as trained(net).
    Embeddings are (S, 0) where there are targets; first: the logits alone, see `with_pulls`.
    """
    if not batch.eids:
        return None
    device, training = next(net.parameters()).device, seed is not None
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")
    graph = training and not first
    with torch.set_grad_enabled(graph), autocast, seeded(seed, batch.eids[0], device) as rng:
        tokens = batch.tokens
        if tokens.is_floating_point():  # images go to the device a group of clips at a time
            tokens = tokens.to(device, non_blocking=True).float()
        logits, embeddings = net(tokens, batch.lengths, rng)
        logits, losses = logits.float(), torch.zeros(0)
        if first:
            return logits
        if targets is not None:
            embeddings = embeddings[:, :0]
        if batch.pull:
            losses, pull = (x.to(device) for x in batch.pull)
        elif training:
            wanted = torch.tensor(np.stack([targets[eid] for eid in batch.eids]))
            losses = study_losses(logits, wanted.float().to(device), outputs)
    gradients = None
    if training:
        along = (logits, pull) if batch.pull else (losses.sum(), None)
        gradients = torch.autograd.grad(along[0], trained(net), along[1])
    return logits.detach(), embeddings.detach().float(), losses.detach(), gradients


@contextmanager
def seeded(seed, eid, device):
    """What dropout draws from in a block: a numpy Generator, or on a GPU torch's own, None.

    torch's generators are afterwards as they were.
    """
    if seed is None:
        yield None
    elif device.type == "cpu":
        yield np.random.default_rng(derive_seed(seed, eid))
    else:
        with torch.random.fork_rng([device]):
            torch.manual_seed(derive_seed(seed, eid))
            yield None


def trained(net):
    """The parameters that are not frozen."""
    return [p for p in net.parameters() if p.requires_grad]


def add(total, gradients):
    """Sum of two lists of tensors, either of which may be None; in place of the first."""
    if total is None or gradients is None:
        return gradients if total is None else total
    torch._foreach_add_(total, gradients)
    return total


LEAST_RATE = 1e-7  # below which a loss that is no number halves the learning rate no further


def update(net, optimizer, gradients, losses, world):
    """One optimiser step on the mean gradient over the studies of all processes.

    gradients: their sum over this process's studies, None if it had none. Returns the number of
    all studies and their mean loss. Where that or a gradient is no finite number the step is
    dropped, the rates are halved, and the loss returned is NaN.
    """
    gradients = gradients or [torch.zeros_like(p) for p in trained(net)]
    about = torch.tensor([len(losses), losses.sum(dtype=np.float64)], device=gradients[0].device)
    about = about.to(gradients[0].dtype)
    if world.size > 1:
        flat = world.sum(torch.cat([g.flatten() for g in (*gradients, about)]))
        *parts, about = flat.split([g.numel() for g in (*gradients, about)])
        gradients = [x.view_as(g) for x, g in zip(parts, gradients, strict=True)]
    n, loss = about.tolist()
    finite = np.isfinite(loss) and torch.stack(torch._foreach_norm(gradients)).isfinite().all()
    if n and not finite:
        for group in optimizer.param_groups:
            group["lr"] = max(group["lr"] / 2, min(group["lr"], LEAST_RATE))
        return int(n), np.nan
    if n:
        for p, gradient in zip(trained(net), gradients, strict=True):
            p.grad = gradient.div_(n)
        optimizer.step()
    optimizer.zero_grad()
    return int(n), loss / max(n, 1)


def run_studies(net, store, eids, settings, world=None, **options):
    """All of `run_steps`: one Outcome with a row for every readable study, in the order given.

    With targets it has the studies' losses, of which those of survival depend on all of them.
    """
    steps = run_steps(net, store, eids, settings, world=world, **options)
    found = merged([outcome for outcome, _, _ in steps], eids, net, world)
    if (targets := options.get("targets")) is not None and len(found):
        wanted = torch.tensor(np.stack([targets[eid] for eid in found.eids])).float()
        losses = study_losses(torch.from_numpy(found.logits), wanted, options["outputs"])
        found = replace(found, losses=losses.numpy())
    return found


def merged(outcomes, eids, net, world=None):
    """Outcomes of several steps and processes as one, in the order of `eids`."""
    outcomes = chain(*(world or World()).gather(outcomes))
    found = gather([[getattr(x, f.name) for f in fields(x)] for x in outcomes], net)
    place = {eid: i for i, eid in enumerate(eids)}
    return found.take(sorted(range(len(found)), key=lambda i: place[found.eids[i]]))


def gather(rows, net):
    """Rows as `Outcome` has them, of tensors or arrays -> one Outcome."""
    rows = [row for row in rows if row[0]]  # steps of which nothing could be read
    if not rows:
        return Outcome([], np.zeros((0, net.n_labels)), np.zeros((0, 0)), np.zeros(0), [], [])
    eids, *arrays, n_videos, n_clips = zip(*rows, strict=True)
    logits, embeddings, losses = (
        np.concatenate([x.cpu().numpy() if torch.is_tensor(x) else x for x in column])
        for column in arrays
    )
    return Outcome(
        list(chain(*eids)),
        logits,
        embeddings,
        losses,
        list(chain(*n_videos)),
        list(chain(*n_clips)),
    )


def report_unreadable(unreadable, listener=RUN):
    """Tell which studies could not be read, and why."""
    if unreadable:
        listener.warning(
            f"{len(unreadable)} studies cannot be read:{listed(unreadable, 50)}",
            "delete these files and extract them again; a run leaves the studies out",
        )


# ----------------------------------------------------------------------------------------- training


def cmd_train(typed):
    """Learn a task: best and last checkpoints, split, history and curves in the model's folder."""
    with join_world(pick_device(typed.get("device", "")), "share each optimiser step") as world:
        if typed.get("grid"):
            search(typed, world)
        else:
            train_model(typed, world)


def search(typed, world):
    """`train --grid`: each combination into <model>/grid_<i>, and a table by validation loss.

    As one of a SLURM array it trains the combination of its index alone. No test fold is read.
    """
    config = read_config(typed.get("config"))
    name = typed.get("model_name") or config.pick("task", typed.get("task", ""))
    folder = model_folder(name, typed.get("run_id", ""))
    combinations = grid_of(typed["grid"])
    mine = os.environ.get("SLURM_ARRAY_TASK_ID")
    if mine is not None and not (mine.isdecimal() and int(mine) < len(combinations)):
        raise UserError(f"SLURM_ARRAY_TASK_ID {mine}: the grid has 0 to {len(combinations) - 1}")
    rest = {k: v for k, v in typed.items() if k not in ("grid", "run_id")}
    rows = []
    for i, combination in enumerate(combinations):
        place = folder.absolute() / f"grid_{i}"
        if mine is None or int(mine) == i:
            text = ", ".join(f"{k} = {v}" for k, v in combination.items())
            print(f"grid {i} of {len(combinations)}: {text}")
            searched(place, combination)
            line = rest | combination | {"model_name": os.path.relpath(place)}
            train_model(line, world, searching=True)
        if best := searched(place, combination):
            rows.append({"model": f"{folder.name}/grid_{i}", **combination} | best)
    if rows and not world.rank:
        table = pd.DataFrame(rows).sort_values("val_loss", kind="stable")
        write_table(table, folder / "grid.csv")
        print(
            table.to_string(index=False) + f"\nwrote {folder / 'grid.csv'}; no test was looked at"
        )


def searched(place, combination):
    """The best epoch of a grid's model as a dict, or None: it is not finished. Raises UserError
    where the folder holds another combination's."""
    path = place / "last_checkpoint.pt"
    if not path.is_file():
        return None
    saved = read_checkpoint(path)
    trained = read_record(saved, path).settings
    for name, value in combination.items():
        if getattr(trained, name) != value:
            raise UserError(
                f"{place.parent.name}/{place.name} was trained with {name} = "
                f"{getattr(trained, name)}, not {value}: take another --model_name for this grid"
            )
    losses = [row[2] for row in saved["perf_log"]]
    if not is_finished(losses, trained):
        return None
    return {"val_loss": min(losses), "epoch": 1 + int(np.argmin(losses))}


def is_finished(losses, settings):
    """Whether a training with these validation losses, one an epoch, has come to its end."""
    stale = len(losses) - 1 - int(np.argmin(losses)) if losses else 0
    return 0 < settings.epoch_lim <= len(losses) or stale >= settings.epoch_early_stop


def train_model(typed, world, searching=False):
    """What each process of `train` does, for one model or one cross-validation."""
    config = read_config(typed.get("config"))
    settings = training_settings(typed, config)
    if searching and settings.fold == ALL_FOLDS:
        raise UserError("--grid and --fold all are two searches: choose first, then cross-validate")
    begun_from = model_to_start_from(typed, settings, config)
    column = settings.split_column
    task, table = load_labels(config, settings.task, settings.dataset, split_column=column)
    if settings.stratify and settings.stratify not in task.task_labels:
        hint = nearest(settings.stratify, task.task_labels)
        raise UserError(f"--stratify {settings.stratify} is no label of {settings.task}{hint}")
    if settings.end_to_end and task.level == "video":
        raise UserError("--end_to_end learns labels of studies, not of single videos")
    if settings.end_to_end:
        store = open_videos(settings, config.datasets[settings.dataset], list(table.index), world)
    else:
        refuse_through(typed)
        store = store_of(config, settings)
    folder = folder_to_train_in(settings)
    whole = table.rename(index=stored_names(table.index, store))
    table = match_studies(whole, store, task, settings.sample_limit, settings.first_study_only)
    refuse_mixed(store, list(table.index), settings.allow_mixed, RUN)
    if begun_from and not settings.end_to_end:
        warn_of_other_input(begun_from, store, list(table.index))
    end_to_end, ids = settings.end_to_end, list(table.index)
    encoder = panecho.seen_by(settings.weights) if end_to_end else store.encoder_seen(ids, RUN)
    digest = partial(digest_at_training, begun_from, whole, store, task)
    known, how = known_to_others(whole, settings, encoder, begun_from, digest=digest)
    parts = range(settings.n_folds) if settings.fold == ALL_FOLDS else [settings.fold]
    cohorts = {}
    for k in parts:  # all before any is trained: what is wrong with one is said now
        own = settings.model_copy(update={"fold": k})
        if len(parts) > 1:
            print(f"fold {k} of {len(parts)}")
        folds = training_folds(table, own, task, known)
        refuse_small_steps(own, task, table[folds == "train"])
        cohorts[k] = own, cohort_of(task, table, folds, inherited_scaling(begun_from, task))
    for k, (own, cohort) in cohorts.items():
        place = folder / f"fold_{k}" if len(parts) > 1 else folder
        with nullcontext() if world.rank else lock(place, timeout=0):
            run = Training(place, own, cohort, store, begun_from, world, encoder[0])
            train_cohort(run)
        if settings.end_to_end:
            validate_extracted(run, config)
    if len(parts) > 1 and not world.rank:
        pool_folds(folder, settings, config, {k: c for k, (_, c) in cohorts.items()}, store, how)


def training_settings(typed, config):
    """The Settings of a training, judged together before any work is done."""
    config.pick("task", typed.get("task"))
    own = {k: v for k, v in typed.items() if k != "videos"}  # which name no dataset here
    settings = resolve_settings("train", own, config)
    settings.videos = typed.get("videos", "")
    if settings.end_to_end and not settings.batch_size:
        settings.batch_size = 1  # a study's images are large
    check_settings(settings)
    return settings


def model_to_start_from(typed, settings, config):
    """The LoadedModel of --init_from, whose architecture the settings take over, or None."""
    if not settings.init_from:
        return None
    folder = find_model_folder(settings.init_from)
    own = "" if releases.released(folder) else settings.task  # a released one has its own
    begun_from = load_model(folder, config, own)
    if not isinstance(begun_from.net, StudyModel):
        raise UserError(f"{settings.init_from} is no study-level model to start from")
    adopt_architecture(settings, begun_from.net, typed)
    if settings.end_to_end and begun_from.encoder_file and "weights" not in typed:
        settings.weights = str(begun_from.encoder_file)
        print(f"starting from the encoder of {folder.name} too")
    return begun_from


def folder_to_train_in(settings):
    """The model's folder. Raises UserError for one that holds another kind of thing."""
    folder = model_folder(settings.model_name, settings.run_id)
    if "," in settings.model_name:
        raise UserError(f"train makes one model, not {settings.model_name}")
    if folder.resolve() in (Path.cwd(), MODELS.resolve()):
        raise UserError(f"--model_name {settings.model_name} is no name for a model's folder")
    if folds_in_folder(folder) and settings.fold != ALL_FOLDS:
        raise UserError(f"{folder} is a cross-validation: go on with --fold all, or another name")
    if (folder / "best_checkpoint.pt").is_file() and settings.fold == ALL_FOLDS:
        raise UserError(f"{folder} is one model: take another --model_name for --fold all")
    if releases.read_source(folder):
        raise UserError(
            f"{folder} was downloaded and stays as it is: train under another --model_name, with "
            f"--init_from {folder.name} to start from it"
        )
    for place in [folder, *folds_in_folder(folder)]:
        refuse_finished_elsewhere(place)
    return folder


def refuse_finished_elsewhere(folder):
    """UserError for a folder with a model and nothing to go on from, as a model is shared, which a
    training would replace.

    A run that was killed between its first two checkpoints has said how it was begun, and has no
    history yet: it begins anew.
    """
    best, last = folder / "best_checkpoint.pt", folder / "last_checkpoint.pt"
    killed = (folder / "run.json").is_file() and not (folder / "train_losses.csv").is_file()
    if best.is_file() and not last.is_file() and not killed:
        raise UserError(
            f"{folder} holds a model and nothing to go on from: train under another --model_name, "
            f"with --init_from {folder.name} to start from it"
        )


def train_cohort(run):
    """One training to its end, from where it was left."""
    run.begin()
    while not run.finished:
        run.one_epoch()
    print(
        f"best validation loss {run.best:.4f} after epoch {run.best_epoch} of {run.epoch}; the "
        f"model is {run.folder}"
    )
    for unreadable in run.world.gather(run.unreadable):
        run.unreadable |= unreadable
    report_unreadable(run.unreadable)


def refuse_through(typed):
    """UserError for an option that has no effect without --end_to_end."""
    for name in typed:
        if OPTIONS[name].json_schema_extra["group"] in (THROUGH, EXTRACTION) or name == "videos":
            raise UserError(f"train takes --{name} with --end_to_end alone")


def validate_extracted(run, config):
    """The validation of a model that was trained through its encoder, on the published number of
    clips: extracted into the model's folder, as every later command extracts. The thresholds of
    the best checkpoint are those of this validation.

    What an earlier best epoch's encoder extracted there is replaced.
    """
    best = load_model(
        run.folder, config, run.settings.task, device=pick_device(run.settings.device)
    )
    how = vars(run.settings) | {"weights": str(best.encoder_file), "redo": True}
    studies = [run.store.files[eid] for eid in run.cohort.eids["val"]]
    folder = run.folder / "clip_embeddings"
    extract.extract(studies, folder, extract.settings_from(how))
    run.world.gather(None)
    store = open_store(folder)
    eids = [eid for eid in run.cohort.eids["val"] if eid in store.files]
    data = {"targets": run.cohort.targets, "outputs": run.cohort.outputs}
    val = run_studies(best.net, store, eids, run.settings, **data)
    metric = run.validated(val)
    if not run.world.rank:
        path, record = run.folder / "best_checkpoint.pt", best.record
        record.thresholds, record.hazards = run.thresholds, run.hazards
        checkpoints.save(read_checkpoint(path) | {"echofocus": record.to_save()}, path)
    print(f"validation on {len(val)} studies of {run.settings.n_clips} clips a video, extracted: "
          f"loss {val.losses.mean():.4f}, {metric}")  # fmt: skip


def pool_folds(folder, settings, config, cohorts, store, how=()):
    """The evaluation of a cross-validation: each study by the fold that has not seen it.

    how: of `known_to_others`, how it is known that nothing else has.
    """
    from report import evaluation

    parts, unreadable = [], {}
    for k, cohort in cohorts.items():
        model = load_model(folder / f"fold_{k}", config, device=pick_device(settings.device))
        found = run_studies(
            model.net,
            store,
            cohort.eids["test"],
            settings,
            unreadable=unreadable,
            label=f"fold {k}",
        )
        if not len(found):
            raise UserError(f"fold {k} has no study to test: take fewer --n_folds")
        parts.append(
            studies_of_answers(model, cohort.table, found, model.record.thresholds, settings)
        )
    report_unreadable(unreadable)
    studies = evaluation.joined(parts)
    table = next(iter(cohorts.values())).table
    flow = evaluation.flow_of_folds(table, [c.folds for c in cohorts.values()], studies.eids)
    name = f"cv_{settings.dataset}"
    write_table(studies.saveout(), folder / f"saveout_{name}.csv")
    facts = {n: getattr(settings, n) for n in ("run_id", "task", "dataset", "n_folds")}
    facts["target"] = target_of(model)
    facts |= {"model_name": folder.name, "fold": f"every fold of {len(parts)} (cross-validation)"}
    report = evaluation.Report(
        folder, name, studies, facts, flow, n_boot=settings.n_boot, seed=settings.seed,
        notes=[*evaluation.notes_of("test", "; ".join(how)), *evaluation.notes_of_folds(parts)],
        folds=parts,
    )  # fmt: skip
    print("\n".join(report.write()))


def refuse_small_steps(settings, task, training):
    """Cox's partial likelihood compares the studies of a step: refuse steps of one, and tell where
    many have no event."""
    for label in task.outputs.of_kind("survival"):
        if settings.batch_number < 2:
            raise UserError(
                f"{label} is learnt from the studies of a step: --batch_number 2 or more"
            )
        events = training[label + EVENT].mean() * settings.batch_number
        if events < 3:
            RUN.warning(
                f"a step of {settings.batch_number} studies has {events:.2g} events of {label}: "
                "nothing is learnt from one that has none",
                "a larger --batch_number",
            )


def adopt_architecture(settings, net, typed):
    """Take the architecture of the model to start from; UserError when another was typed."""
    own = dict(transformer_type=net.kind, encoder_depth=net.depth, tf_combine=net.combine)
    for name, value in own.items():
        if typed.get(name, value) != value:
            raise UserError(f"--init_from has {name} = {value}, not {typed[name]}")
        setattr(settings, name, value)


def check_settings(settings):
    """UserError for numbers that do not go together, before any work is done."""
    n, fold = settings.n_folds, settings.fold
    if n and not (n >= 3 and (0 <= fold < n or fold == ALL_FOLDS)):
        raise UserError(
            f"--n_folds must be 3 or more and --fold below it or all, not {n} and {fold}"
        )
    if settings.freeze and not settings.end_to_end:
        if settings.freeze != "aggregator":
            raise UserError(f"--freeze {settings.freeze} is for --end_to_end")
        if not settings.init_from:
            raise UserError(
                "--freeze aggregator keeps a model's weights: say which, by --init_from"
            )
    if settings.stratify and settings.split_column:
        raise UserError("--stratify and split_column both say the folds: leave one out")
    if settings.end_to_end and fold == ALL_FOLDS:
        raise UserError("--fold all reads clip embeddings: train end to end a fold at a time")
    if fold == ALL_FOLDS and not n:
        raise UserError("--fold all is for cross-validation: say --n_folds 5")
    if settings.n_folds and settings.split_column:
        raise UserError(
            f"--n_folds and split_column ({settings.split_column}) both say the folds: leave one "
            "out"
        )


def inherited_scaling(begun_from, task):
    """Label -> scaling of the model to start from, of those that it has learnt and the task has."""
    if not begun_from or not begun_from.scaling:
        return {}
    wanted = set(task.outputs.of_kind("regression")) - set(begun_from.record.unlearnt)
    return {
        label: entry
        for label, entry in begun_from.scaling.items()
        if label in wanted and not other_unit(label, task.units, begun_from.units)
    }


def fresh_network(settings, outputs, begun_from=None, units=()):
    """A StudyModel by these settings, its weights drawn by the seed or those of another model."""
    names = outputs.names
    with torch.random.fork_rng([]):
        torch.manual_seed(derive_seed("weights", settings.seed))
        net = StudyModel(
            len(names), settings.transformer_type, settings.encoder_depth, settings.tf_combine
        )
    net.groups = outputs.groups
    if begun_from:
        start_from(net, outputs, begun_from, dict(units))
    if settings.freeze and not settings.end_to_end:  # which freezes by itself
        for name, p in net.named_parameters():
            p.requires_grad_(is_head(name))
    return net


def is_head(name):
    """Whether a parameter is of a label's own: the last layer, or a label's query token."""
    return name.split(".")[0] in ("ff", "query_tokens")


def rate_groups(net, settings):
    """The optimiser's groups: by their rates, the head's last."""
    rate, groups = settings.learning_rate, {}

    def rate_of(name):
        if is_head(name):
            return settings.head_learning_rate or rate
        layer = re.match(r"encoder\.layers\.(\d+)\.", name)
        return rate * settings.layer_decay ** (net.depth - int(layer[1]) if layer else net.depth)

    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    if settings.head_learning_rate:
        named.sort(key=lambda item: is_head(item[0]))
    for name, p in named:
        groups.setdefault(rate_of(name), []).append(p)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def start_from(net, outputs, begun_from, units):
    """Copy another model's weights; heads by the output's name, kind and unit, the rest stays
    fresh."""
    labels, kinds = outputs.names, begun_from.outputs.kind_of
    state, given = net.state_dict(), begun_from.net.state_dict()
    by_label = ["query_tokens"] if net.kind == "multiquery" else ["ff.weight", "ff.bias"]
    both = [
        label
        for label in labels
        if kinds.get(label) == outputs.kind_of[label]
        and not other_unit(label, units, begun_from.units)
    ]
    to, origin = [labels.index(x) for x in both], [begun_from.labels.index(x) for x in both]
    for name, tensor in given.items():
        if name == "query_tokens":
            state[name][:, to] = tensor[:, origin].to(state[name].device)
        elif name in by_label:
            state[name][to] = tensor[origin].to(state[name].device)
        else:
            state[name] = tensor
    net.load_state_dict(state)
    fresh = [label for label in labels if label not in both]
    print(f"starting from {begun_from.folder.name}: {len(both)} heads kept, {len(fresh)} fresh")


THROUGH_FIXED = ("init_from", "end_to_end", "num_clips", "freeze", "ping_pong", "size", "clip_len")
THROUGH_FIXED += ("encoder_learning_rate", "head_learning_rate", "sampling_seed")


@dataclass
class Position:
    """How far an epoch is, as a checkpoint within it holds."""

    studies: int = 0  # of the epoch's order
    losses: float = 0.0  # their sum
    n: int = 0  # how many of them could be read
    seconds: float = 0.0
    dropped: int = 0  # steps whose loss was no number


HISTORY = TypeAdapter(list[tuple[int, FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]])


class Training:
    """A run: its state is what the last checkpoint holds, so that it can go on from there."""

    def __init__(
        self, folder, settings, cohort, store, begun_from=None, world=None, encoder_seen=()
    ):
        self.folder, self.settings, self.store = folder, settings, store
        self.cohort, self.task, self.world = cohort, cohort.task, world or World()
        self.study = fresh_network(settings, cohort.outputs, begun_from, cohort.task.units)
        if settings.end_to_end:
            self.net = EndToEnd.of(settings, self.study)
            groups = self.net.groups(settings)
        else:
            self.net = self.study
            groups = rate_groups(self.net, settings)
        self.net.to(pick_device(settings.device))
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, patience=3, factor=0.5
        )
        self.history = []  # rows [epoch, train_loss, val_loss, lr, seconds]
        self.position = Position()
        self.dropped = {}  # epoch -> steps that were dropped, their loss being no number
        self.thresholds = {}  # label -> probability, at the best epoch
        self.hazards = {}  # label -> Hazard, at the best epoch
        if settings.end_to_end:
            self.about = TrainingInput(Input(**self.net.input()), None, None)
        else:
            patients = cohort.table["pid"].loc[cohort.eids["train"]]
            self.about = TrainingInput.of(store, dict(patients))
        self.input = self.about.input
        self.seen = all_seen([cohort.seen()], begun_from and begun_from.seen, encoder_seen)
        self.unreadable = {}
        self.plotted = 0.0  # when the curves were last drawn

    @property
    def epoch(self):
        """Epochs trained so far."""
        return len(self.history)

    @property
    def best_epoch(self):
        return 1 + int(np.argmin([row[2] for row in self.history])) if self.history else 0

    @property
    def best(self):
        return min((row[2] for row in self.history), default=np.inf)

    @property
    def stale(self):
        """Epochs since the validation loss was last improved."""
        return self.epoch - self.best_epoch

    @property
    def finished(self):
        return is_finished([row[2] for row in self.history], self.settings)

    def used(self):
        """The settings that decide the weights, for files that may be shared: names, no paths."""
        used = {name: getattr(self.settings, name) for name in RECORDED}
        return used | {"init_from": Path(self.settings.init_from).name}

    @property
    def unlearnt(self):
        """The outputs of the labels that training cannot learn."""
        return [x for label in self.cohort.unlearnt for x in self.cohort.outputs.names_of(label)]

    def record(self):
        """What the checkpoint says of itself: see `Record`."""
        s = self.settings
        return Record(
            version=__version__, task=s.task, dataset=s.dataset, labels=self.cohort.labels,
            level=self.task.level, type=self.task.type, classes=self.task.classes,
            survival=self.task.survival,
            units=self.task.units, unlearnt=self.unlearnt, thresholds=self.thresholds,
            hazards=self.hazards, labels_sha256=self.cohort.digest,
            encoder_sha256=self.input.weights_sha256 or "", input=self.input,
            settings=Settings(**self.used()),
        )  # fmt: skip

    def begin(self):
        """Resume from the last checkpoint, or start: split and settings are written first."""
        path = self.folder / "last_checkpoint.pt"
        resumed = path.is_file()
        if resumed:
            self.resume(path)
        if len(set(self.world.gather((self.epoch, self.position.studies)))) > 1:
            raise UserError(f"the processes see different files at {path}: is the folder shared?")
        if self.world.rank:
            return
        if self.history:  # the run may have stopped between the checkpoint and these
            self.write_history()
        if not resumed:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_split(self.folder, self.cohort.split)
        elif self.finished and (self.folder / "run.json").is_file():
            return  # which says what it was trained with
        names = {"model_name": self.folder.name, "task": self.settings.task}
        names |= {"dataset": self.settings.dataset} | self.used()
        write_table(pd.DataFrame([names]), self.folder / "train_args.csv")
        run = {
            "settings": names,
            "labels": self.cohort.labels,
            "studies": {fold: len(eids) for fold, eids in self.cohort.eids.items()},
            "labels_sha256": self.cohort.digest,
            "embeddings_sha256": self.data_sha256,
            "encoder_sha256": self.input.weights_sha256 or "",
            "device": str(self.study.ff.weight.device),
            "processes": self.world.size,
            "versions": {"echofocus": __version__, "torch": torch.__version__}
            | {"numpy": np.__version__, "python": platform.python_version()},
        }
        with atomic_path(self.folder / "run.json") as temporary:
            temporary.write_text(json.dumps(run, indent=2))

    def resume(self, path):
        saved = read_checkpoint(path)
        before = read_record(saved, path)
        if not before:
            raise UserError(f"{path} was not made by this program; use another --model_name")
        self.refuse_changes(before)
        self.refuse_other_data(saved)
        try:
            self.restore(saved)
        except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise UserError(
                f"{path} is damaged, no run can go on from it; use another --model_name"
            ) from error
        changed = before.settings.learning_rate != self.settings.learning_rate
        if changed and not self.settings.end_to_end:
            for group, fresh in zip(
                self.optimizer.param_groups, rate_groups(self.net, self.settings), strict=True
            ):
                group["lr"] = fresh["lr"]
        self.refuse_other_best()
        self.thresholds, self.hazards = before.thresholds, before.hazards
        if self.finished:
            self.settings = self.settings.model_copy(update={"target": before.settings.target})
            print(f"{self.folder} is trained to its end: other options have no effect")
            return
        begun = f" and {self.position.studies} studies" if self.position.studies else ""
        print(f"resuming {self.folder} after epoch {self.epoch}{begun}")

    def refuse_other_best(self):
        """UserError unless the best checkpoint is of the best epoch of this run, or of the one that
        was being finished when the run was stopped."""
        path, history = self.folder / "best_checkpoint.pt", [row[:3] for row in self.history]
        if not history:
            return
        try:
            log = read_checkpoint(path)["perf_log"] if path.is_file() else []
            rows = [list(row[:3]) for row in HISTORY.validate_python(log)]
        except (KeyError, ValueError):
            rows = []
        n = len(rows)
        if n not in (self.best_epoch, self.epoch + 1) or rows[: self.epoch] != history[:n]:
            raise UserError(
                f"{path} is gone, or of another run than last_checkpoint.pt beside it: put it "
                "back, or train under another --model_name"
            )

    def restore(self, saved):
        """Take over a checkpoint's state, all of which is of the kind and shape of this run's."""
        parts = {"model_state_dict": self.study}
        if self.settings.end_to_end:
            parts["encoder_state_dict"] = self.net.encoder
        for name, part in parts.items():
            checkpoints.check_like(saved[name], dict(part.state_dict()))
        moments, groups = saved["optimizer_state_dict"], self.optimizer.state_dict()["param_groups"]
        parameters = enumerate(p for g in self.optimizer.param_groups for p in g["params"])
        moved, step = moments["state"], torch.zeros(())  # what is frozen has no moments
        like = {i: {"step": step, "exp_avg": p, "exp_avg_sq": p} for i, p in parameters}
        checkpoints.check_like(moved, {i: like[i] for i in moved})
        for group, given in zip(groups, moments["param_groups"], strict=True):
            checkpoints.check_like(given["lr"], group["lr"])
            group["lr"] = given["lr"]
        plan, given = self.scheduler.state_dict(), saved["scheduler_state_dict"]
        known = {k: given[k] for k in plan if k in given and plan[k] is not None}
        checkpoints.check_like(known, {k: plan[k] for k in known})
        self.history = list(map(list, HISTORY.validate_python(saved["perf_log"])))
        position = vars(Position(**saved.get("position", {})))  # no other names
        self.position = TypeAdapter(Position).validate_python(position)
        if [row[0] for row in self.history] != list(range(1, len(self.history) + 1)):
            raise ValueError("epochs are missing")
        if not 0 <= self.position.n <= self.position.studies <= len(self.cohort.eids["train"]):
            raise ValueError("a position beyond the studies")
        self.dropped = TypeAdapter(dict[int, int]).validate_python(saved.get("dropped", {}))
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        self.optimizer.load_state_dict({"state": moved, "param_groups": groups})
        self.scheduler.load_state_dict(plan | known)

    def refuse_changes(self, before):
        """What a resumed run may not change: its model, labels, and any patient's fold."""
        now, then = self.record(), before.settings
        fixed = ("transformer_type", "encoder_depth", "tf_combine", "seed", "split", "n_folds",
                 "stratify", "freeze", "head_learning_rate", "layer_decay")  # fmt: skip
        pairs = {n: (getattr(before, n), getattr(now, n)) for n in ("task", "dataset", "labels")}
        pairs |= {n: (getattr(before, n), getattr(now, n)) for n in ("type", "classes", "level")}
        pairs |= {n: (getattr(then, n), v) for n, v in self.used().items()}
        for name, (was, value) in pairs.items():
            if was == value:
                continue
            if name in (*fixed, *THROUGH_FIXED, "task", "dataset", "labels", "type",
                        "classes", "level", "fold"):  # fmt: skip
                raise UserError(
                    f"{self.folder} was trained with {name} = {was}, not {value}; use another "
                    "--model_name or --run_id"
                )
            print(f"changed on resume: {name} = {value}, was {was}")
        if before.labels_sha256 != self.cohort.digest:
            raise UserError(
                f"the label table has changed since {self.folder} was begun; use another "
                "--model_name or --run_id"
            )
        refuse_other_folds(self.folder, self.cohort.folds)

    @cached_property
    def data_sha256(self):
        """What the run reads, of all its studies: see Store.digest."""
        return self.store.digest(self.cohort.table.index)

    def refuse_other_data(self, saved):
        """A resumed run reads the same numbers, and scales its labels alike."""
        if saved.get("input_norm_dict") != self.cohort.scaling:
            raise UserError(
                f"{self.folder} was trained with another scaling of its labels (boxcox, or what "
                "it began from); use another --model_name or --run_id"
            )
        if saved.get("embeddings_sha256", self.data_sha256) == self.data_sha256:
            return
        what = "videos" if self.settings.end_to_end else "clip embeddings"
        text = f"the {what} have changed since {self.folder} was begun"
        if not self.settings.allow_mixed:
            raise UserError(
                f"{text}; use another --model_name or --run_id (--allow_mixed goes on, as for "
                "files that were only copied and carry no checksum)"
            )
        RUN.warning(text, "the run goes on with them (--allow_mixed)")

    def one_epoch(self):
        """Train on every study once, validate, write checkpoints, history and curves."""
        began, before, number = time.time(), self.position.seconds, self.epoch + 1
        self.train_through(number, began - before)
        val = run_studies(self.net, self.store, self.cohort.eids["val"], self.settings, **self.data)
        done, rate = self.position, self.optimizer.param_groups[0]["lr"]
        if not done.n + done.dropped or not len(val):
            report_unreadable(self.unreadable)
            raise UserError("no study of the training or validation fold can be read")
        if not done.n or not np.isfinite(val.losses).all():
            raise UserError(
                f"the loss of epoch {number} is not a number: lower --learning_rate; the best "
                f"checkpoint stays, last_checkpoint.pt in {self.folder} is of the epoch before"
            )
        row = [number, done.losses / done.n, float(val.losses.mean(dtype=np.float64)), rate]
        self.history.append([*row, before + time.time() - began])
        if done.dropped:
            self.dropped[number] = done.dropped
        self.position = Position()
        self.scheduler.step(row[2])
        print(
            f"epoch {number}: train loss {row[1]:.4f}, validation loss {row[2]:.4f}, "
            f"{self.validated(val, self.stale == 0)}, lr {rate:g}"
        )
        self.save()

    @property
    def data(self):
        """What training and validation give the loop alike."""
        return dict(
            targets=self.cohort.targets, outputs=self.cohort.outputs, unreadable=self.unreadable,
            world=self.world,
        )  # fmt: skip

    def train_through(self, number, since):
        """The rest of epoch `number`, from `position` on; a checkpoint every so many minutes.

        since: when the epoch would have begun, had it not been interrupted (seconds).
        """
        done, saved = self.position, time.time()
        if self.settings.end_to_end:
            self.net.begin_epoch(number)
        rng = np.random.default_rng(derive_seed("order", self.settings.seed, number))
        eids = self.cohort.eids["train"]
        order = [eids[i] for i in rng.permutation(len(eids))]
        for _, n, loss in run_steps(
            self.net, self.store, order[done.studies :], self.settings, optimizer=self.optimizer,
            epoch=number, label=f"epoch {number}", **self.data,
        ):  # fmt: skip
            done.studies = min(done.studies + self.settings.batch_number, len(order))
            if np.isfinite(loss):
                done.n, done.losses = done.n + n, done.losses + n * loss
            else:
                done.dropped += 1
                print(f"a step of epoch {number} has no finite loss: dropped, rates halved")
            if time.time() - saved >= 60 * self.settings.checkpoint_minutes:
                done.seconds = time.time() - since
                self.save_checkpoint("last")
                saved = time.time()

    def validated(self, val, best=True):
        """The metric of a validation as text; where it is the best epoch's, what it decides is
        kept: thresholds and baseline hazards."""
        from report.validation import chosen, metric_line

        cohort, outputs = self.cohort, self.cohort.outputs
        truth = cohort.table.loc[val.eids, outputs.columns].to_numpy()
        about = truth, readable(val.logits, outputs, cohort.scaling, {}), outputs
        learnt = [label for label in outputs.labels if label not in cohort.unlearnt]
        if best:
            rule = self.settings.target or "youden"
            self.thresholds, hazards = chosen(*about, learnt, rule)
            self.hazards = {name: Hazard(**found) for name, found in hazards.items()}
        return metric_line(*about, learnt, cohort.scaling)

    def save_checkpoint(self, name):
        """Write <name>_checkpoint.pt; the first process does it for all."""
        if self.world.rank:
            return
        more = {}
        if self.settings.end_to_end and name == "last":
            more = {"encoder_state_dict": self.net.encoder.state_dict()}
        elif self.settings.end_to_end:
            self.input = Input(**self.net.write(self.folder, self.seen))
        state = {
            "model_state_dict": self.study.state_dict(),
            "perf_log": self.history,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.scheduler.state_dict(),
            "input_norm_dict": self.cohort.scaling,
            "numpy_random_state": None,  # every draw is derived from the seed, epoch and study
            "torch_random_state": None,
            "cuda_random_state": None,
            "position": asdict(self.position),
            "dropped": self.dropped,
            "embeddings_sha256": self.data_sha256,
            "seen": [part.saved() for part in self.seen],
            "clip_mean": self.about.clip_mean,
            "novelty": self.about.novelty and self.about.novelty.to_save(),
            "echofocus": self.record().to_save(),
        } | more
        checkpoints.save(state, self.folder / f"{name}_checkpoint.pt")

    def save(self):
        """Checkpoints (best first: last says that the epoch is done), history and curves."""
        if self.stale == 0:
            self.save_checkpoint("best")
        self.save_checkpoint("last")
        if self.world.rank:
            return
        history = self.write_history()
        if self.settings.tensorboard:
            write_tensorboard(history.iloc[-1], self.folder)

    def write_history(self):
        """The table and curves of all epochs; returns the table."""
        columns = ["epochs_trained", "train_loss", "val_loss", "lr", "epoch_time"]
        history = pd.DataFrame(self.history, columns=columns)
        history["dropped_steps"] = [self.dropped.get(row[0], 0) for row in self.history]
        write_table(history, self.folder / "train_losses.csv")
        if time.time() - self.plotted > 10 or self.finished:
            plot_history(history, self.folder)
            self.plotted = time.time()
        return history


def write_tensorboard(row, folder):
    """The last epoch as scalars, into <folder>/tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError('--tensorboard needs its package: pip install "tensorboard"') from error
    with SummaryWriter(folder / "tensorboard") as writer:
        for name in row.index.drop("epochs_trained"):
            writer.add_scalar(name, row[name], int(row["epochs_trained"]))


# --------------------------------------------------------------------- evaluate, predict and embed


def start_with_model(command, typed, world=None):
    """What commands that use a model begin with: (settings, config, model, source).

    Videos are extracted by the processes of `world` together.
    """
    if typed.get("videos") and typed.get("dataset"):
        raise UserError("--videos and --dataset are two sources: give one")
    needed = not (typed.get("videos") or typed.get("embedding_path"))
    config = read_config(typed.get("config"), needed)
    task = typed.get("task", "")
    if task and not released_task(task):
        config.pick("task", task)
    names = typed.get("model_name", ""), typed.get("run_id", "")
    model = load_named(*names, config, task, pick_device(typed.get("device", "")))
    if command in ("evaluate", "explain"):
        refuse_readings(command, model)
    if model.task not in config.tasks and model.type != "readings":
        config.tasks[model.task] = task_of(model)
    if model.record.level == "video" and (command == "explain" or typed.get("page")):
        raise UserError(f"{model.folder.name} answers for single videos: there are none to choose")
    settings = resolve_settings(command, typed, config, model)
    model.net.to(pick_device(settings.device))  # which the config may say
    if settings.videos or is_of_videos(settings, config):
        source = extracted(typed, settings, config, model, world or World())
    else:
        refuse_video_options(typed)
        source = Source(settings.dataset, store_of(config, settings))
    if settings.label_path:
        config.datasets[source.name].label_path = Path(settings.label_path)
    return settings, config, model, source


def task_of(model, **more):
    """The Task that a model answers, as a config would have it."""
    o, record = model.outputs, model.record
    return Task(
        task_labels=o.labels, type=o.kinds, classes=o.classes, survival=record.survival,
        level=record.level, units=model.units, **more,
    )  # fmt: skip


def is_of_videos(settings, config):
    """Whether a run is given a dataset that has videos and no clip embeddings yet."""
    return not settings.embedding_path and config.datasets[settings.dataset].is_of_videos


@dataclass
class Source:
    """The studies that a command is given: a dataset's, or those of a folder of videos."""

    name: str  # in the names of what is written about them
    store: object
    wanted: list[str] | None = None  # of a folder of videos: its studies, also unusable ones
    studies: list = field(default_factory=list)  # the videos of each, where they are at hand

    @property
    def eids(self):
        """The studies that have embeddings."""
        return list(self.store.files)

    def unusable(self):
        """Study id -> why a study of a folder of videos has no embeddings."""
        absent = sorted(set(self.wanted or ()) - set(self.store.files))
        return dict.fromkeys(absent, "no usable video: see extract_log.csv")


CLIP_EMBEDDINGS = Path("clip_embeddings")


def extracted(typed, settings, config, model, world):
    """The Source of `--videos`, or of a dataset's: clip embeddings, extracted once for all models.

    They lie in a folder of their own for each source, encoder and way of sampling. The dataset of
    `--videos` is put into the config, under the name of that folder. Raises UserError.
    """
    warn_of_another_input(model, settings, typed)
    how, dataset = extract.settings_from(vars(settings)), config.datasets.get(settings.dataset)
    if settings.videos:
        videos = Path(settings.videos)
        named = [settings.group, settings.manifest, settings.study_id]
        studies = extract.find_studies(videos, *named)
        limit = 0 if settings.select != "all" else settings.sample_limit  # that are explained
        wanted = some_of([s.name for s in studies], limit)
        studies = [s for s in studies if s.name in wanted]
    else:
        videos, named = dataset.video_base_path, [dataset.video_subdir_format]
        print(f"{settings.dataset} has no clip embeddings yet; its videos in {videos} are read")
        studies = studies_of_dataset(videos, *named)
    made = extract.attributes_of(how, panecho.weights_digest(how.weights))
    made = {k: v for k, v in made.items() if k not in ("version", "weights")}
    place = json.dumps([str(videos.resolve()), named, made], sort_keys=True)
    key = hashlib.sha256(place.encode()).hexdigest()[:8]
    name = f"{videos.resolve().name}_{key}"
    folder = Path(settings.keep or CLIP_EMBEDDINGS) / name
    name = name if settings.videos else settings.dataset
    summary = extract.together(world.gather(extract.extract(studies, folder, how)))
    summary.print()
    summary.refuse_nothing(videos)
    size = sum(file.stat().st_size for file in folder.glob("*.hdf5"))
    print(
        f"clip embeddings are kept in {folder} ({size / 1e6:.1f} MB), for other models too; delete "
        "that folder to clear them"
    )
    if settings.videos:
        config.datasets[name] = Dataset(embedding_path=folder)
        settings.dataset = name
    else:
        config.datasets[name] = dataset.model_copy(update={"embedding_path": folder})
    store, wanted = (
        open_store(folder, RUN, settings.max_videos_per_study),
        sorted(s.name for s in studies),
    )
    store.files = {eid: store.files[eid] for eid in wanted if eid in store.files}  # no older ones
    units = of_level(store, config, settings)
    if units is not store:
        wanted = [*units.files, *(eid for eid in wanted if eid not in store.files)]
    return Source(name, units, wanted, studies)


def warn_of_another_input(model, settings, typed):
    """Say before any video is read that a model was trained on videos extracted otherwise.

    Raises UserError for another encoder that nobody asked for.
    """
    trained, digest = model.record.encoder_sha256, ""
    if trained:
        try:
            digest = panecho.weights_digest(settings.weights)
        except checkpoints.WeightsError as error:
            raise UserError(
                f"{model.folder.name} was trained on embeddings of the encoder {trained[:12]}; "
                f"give its file with --weights ({error})"
            ) from error
    if digest != trained:
        text = f"{model.folder.name} was trained on embeddings of another encoder (weights "
        text += f"{trained[:12]}, {settings.weights} is {digest[:12]})"
        if "weights" not in typed:
            raise UserError(f"{text}; give its file with --weights")
        print(f"WARNING: {text}: its answers mean nothing here")
    for name, was in input_options(model.record.input).items():
        if getattr(settings, name) != was and name != "weights":
            now = getattr(settings, name)
            print(f"WARNING: --{name} {now}: {model.folder.name} was trained with {was}")


def adopt_kinds(config, name, model):
    """Read a task's labels as the model does. Raises UserError where they are others."""
    task, own = config.tasks[name], model.outputs
    for what, one, other in (
        ("labels", task.task_labels, own.labels),
        ("classes", task.classes, own.classes),
        ("survival", set(task.survival), set(own.of_kind("survival"))),
        ("level", task.level, model.record.level),
    ):
        if one != other:
            raise UserError(
                f"task {name} of {config.path} and {model.folder.name} differ in {what}"
            )
    for label in own.labels:
        if other_unit(label, task.units, model.units):
            raise UserError(
                f"task {name} of {config.path} has {label} in {task.units[label]}, "
                f"{model.folder.name} in {model.units[label]}: convert the labels, and say so"
            )
    task.type = own.kinds


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


def cmd_evaluate(typed):
    """Metrics with intervals, tables, figures and a page: of a model's fold, or of predictions."""
    from report import evaluating

    if typed.get("predictions"):
        refuse_video_options(typed)
        return evaluating.evaluate_file(typed, compared)
    settings, config, model, source = start_with_model("evaluate", typed)
    timed = model.outputs.of_kind("survival")
    if timed and (settings.per, settings.pool) == ("patient", "mean"):
        raise UserError(f"{timed[0]}: times are not pooled: --pool first or last")
    columns = {
        column: (cells.rename(stored_names(cells.index, source.store)), edges)
        for column, (cells, edges) in evaluating.columns_by(settings.by, config, settings).items()
    }
    for fold in dict.fromkeys(settings.folds or [settings.subset]):
        own = settings.model_copy(update={"subset": fold})
        evaluate_fold(own, config, model, source.store, columns)


def evaluate_fold(settings, config, model, store, columns):
    """`evaluate` on the fold `settings.subset`."""
    from report import evaluating

    settings = settings.model_copy(update={"target": settings.target or target_of(model)})
    thresholds = thresholds_for(model, config, settings, store)
    studies, flow, how, told = answered(model, config, settings, store, thresholds)
    name = f"{settings.subset}_{settings.dataset}"
    write_table(studies.saveout(), model.folder / f"saveout_{name}.csv")
    about = {"run_id": settings.run_id, "model_name": model.folder.name}
    about |= {"unseen": how if settings.subset == "test" else ""}
    about |= {"warning": "; ".join(told)} if told else {}
    others = compared(config, settings, studies)
    evaluating.report_evaluation(
        model.folder, name, studies, flow, about, settings, columns, others
    )


def answered(model, config, settings, store, thresholds):
    """(Studies of the fold with the model's answers, their flow, how it is known what was seen,
    sentences on what makes the answers doubtful)."""
    from report import evaluation

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
        (evaluation.NOT_ASKED, ~whole.index.isin(table.index)),
        (evaluation.UNREADABLE, ~whole.index.isin(found.eids)),
    ):
        reasons = reasons.mask(lost & (reasons == ""), reason)
    flow = evaluation.flow_of(whole, reasons)
    studies = studies_of_answers(model, table, found, thresholds, settings)
    order = np.argsort(whole.index.get_indexer(studies.eids))  # the label table's
    return studies.take(order), flow, how, list(told)


def studies_of_answers(model, table, found, thresholds, settings):
    """evaluation.Studies of an Outcome and the label table."""
    from report import evaluation

    table = table.loc[found.eids]
    truth, predicted = table[model.outputs.columns], model.readable(found.logits)
    outcomes = evaluation.outcomes_of(
        model.outputs, truth.to_numpy(), predicted, model.units, thresholds,
        settings.prevalence, settings.years,
    )  # fmt: skip
    return evaluation.Studies(found.eids, table["pid"].to_numpy(), outcomes)


def fold_in_words(fold):
    given = "without a fold in the split column" if fold == "left out" else fold
    return f"in the {fold} fold" if fold in FOLDS else given


def target_of(model):
    """The rule by which its thresholds were chosen."""
    return model.record.settings.target or "youden"


def thresholds_for(model, config, settings, store):
    """Label -> threshold: the model's, or those that --target chooses on its validation fold."""
    from report.metrics import choose_threshold, read_target

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
    """(evaluation.Studies of a model, or of a table of predictions, to compare with these; notes).

    A model answers its own studies of the fold, at thresholds by the same rule.
    """
    from report.evaluating import is_table
    from report.evaluation import notes_of, studies_from_table

    if not name:
        raise UserError("--compare: a name is empty")
    if is_table(name):
        return studies_from_table(Path(name), studies.outcomes, studies), []
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
    seen = notes_of(own.subset, how if own.subset == "test" else "")
    return found, [*notes, *told, *seen]


def cmd_predict(typed):
    """One row a study: eid, n_videos, n_clips, then a column a label. No labels needed."""
    if typed.get("out"):
        refuse_other_tables(typed)
    settings, config, model, source = start_with_model("predict", typed)
    store = source.store
    labelled = () if source.wanted else labelled_ids(config, settings, store)
    absent = source.unusable() | dict.fromkeys(
        sorted(set(labelled) - set(store.files)), "no embeddings"
    )
    path = Path(settings.out or model.folder / f"predictions_{source.name}.csv")
    eids = some_of(source.eids, settings.sample_limit)
    warn_of_other_input(model, store, eids, names=MADE_WITH[:1])
    work = work_of(model, store, eids, settings)
    with open_journal(journal_path(path), work, f"windows of {WINDOW} studies") as journal:
        table, reasons, warnings = answer_studies(model, store, eids, settings, journal)
        left_out = absent | reasons
        report_left_out(left_out, path)
        if not len(table):
            raise UserError("no study could be read")
        write_table(table, path)
        journal.delete()
    if settings.page:
        predict_page(path, model, source, config, settings, table, left_out)
    shown = table.head(10).dropna(axis=1, how="all").drop(columns="warning")
    print(shown.to_string(index=False, float_format="{:.4g}".format, max_cols=12))
    report_warnings(warnings, model.folder.name)
    print(f"wrote {len(table)} studies to {path}")


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


def refuse_video_options(typed):
    """UserError for an option of videos, which would have no effect on clip embeddings."""
    for name in typed:
        if OPTIONS[name].json_schema_extra["group"] == EXTRACTION:
            raise UserError(
                f"--{name} is for videos: it needs --videos, or a dataset that has videos and no "
                "embeddings yet"
            )


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


def labelled_ids(config, settings, store):
    """The study ids of the dataset's label table, where there is one that is about its studies."""
    task, dataset = config.tasks.get(settings.task), config.datasets[settings.dataset]
    path = dataset.label_path or (task.label_path if task else None)
    if path is None or not path.is_file():
        return []
    ids = read_rows(path, [], level=task.level if task else "study").index
    ids = list(ids.to_series().replace(stored_names(ids, store)))
    if dataset.label_path or set(ids) & set(store.files):
        return ids
    print(f"{path.name} names none of these studies: they count as unlabelled")
    return []


def outcome_of(window):
    """A unit of the journal -> Outcome."""
    return Outcome(**{f.name: window[f.name] for f in fields(Outcome)})


def network_digest(net):
    """SHA-256 of a network's parameters."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def cmd_embed(typed):
    """Embeddings of the model as an HDF5 file, one 768-vector a study or a video; and their map."""
    if len(typed.get("datasets", ())) > 1 and typed.get("embed_file"):
        raise UserError("--embed_file is one file: leave it out with several --datasets")
    if typed.get("map") and typed.get("level") == "video":
        raise UserError("--map shows studies: leave out --level video")
    if typed.get("datasets"):
        typed = typed | {"dataset": typed["datasets"][0]}
    if typed.get("datasets") and typed.get("videos"):
        raise UserError("--videos and --datasets are two sources: give one")
    if typed.get("embed_file"):
        output_path(typed["embed_file"], "--embed_file", "file of study embeddings", is_embedded)
    settings, config, model, source = start_with_model("embed", typed)
    if not settings.pool_queries:
        if settings.map or getattr(model.net, "kind", "") != "multiquery":
            raise UserError("--no_pool_queries is for multiquery models, and for no map")
        model.net.pool_queries = False
    datasets = [config.pick("dataset", name) for name in settings.datasets or [source.name]]
    rows = map_rows(config, settings, datasets) if settings.map else None  # first: it may refuse
    files = {}
    for name in dict.fromkeys(datasets):
        if name != source.name:
            source = Source(name, store_of(config, settings, name))
        files[name] = embed_source(source, model, settings)
        if rows and rows[name] is not None:
            own = stored_names(rows[name].index, source.store, Collected())
            rows[name] = rows[name].rename(index=own)
    if settings.map:
        make_map(files, rows, model, settings)


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


# ------------------------------------------------------------------------------------------ explain


def refuse_readings(command, model):
    """UserError for PanEcho, whose readings stand for no label table."""
    if isinstance(model.net, Readings):
        name = model.folder.name
        raise UserError(f"{command} takes a study-level model; {name} has readings alone")


def as_one(model):
    """The model whose outputs are explained: an average of several as one."""
    return model.averaged() if isinstance(model, LoadedEnsemble) else model


def label_columns(model, labels=None):
    """Label names (default: all that were learnt) -> their numbers. Raises UserError."""
    if not labels:
        labels = [label for label in model.labels if label not in model.record.unlearnt]
    for label in labels:
        if label in model.record.unlearnt:
            raise UserError(f"{model.folder.name} has not learnt {label}: nothing to explain")
        if label not in model.labels:
            raise UserError(
                f"no label {label} in {model.folder.name}{nearest(label, model.labels)}"
            )
    return [model.labels.index(label) for label in labels]


def cmd_explain(typed):
    """The contribution of every video to every answer, and the published table of the top n."""
    device = pick_device(typed.get("device", ""))
    with join_world(device, "share the studies") as world, ExitStack() as held:
        explain(typed, world, held)


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
    from report.page import Page, PageStudy, write_page

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


def source_studies(source, config, eids):
    """Study id -> the Study that its videos are, where they are at hand."""
    dataset = config.datasets[source.name]
    if not source.studies and dataset.video_base_path:
        source.studies = studies_of_dataset(
            dataset.video_base_path, dataset.video_subdir_format, eids
        )
    return {study.name: study for study in source.studies}


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


# ------------------------------------------------------------------------------------- as a library


def load(model_name, task="", device=""):
    """A model for the functions below, by its name in ./trained_models or a path: LoadedModel.

    task: of the config, where a published checkpoint does not say which labels it has; device:
    as --device. Raises UserError.
    """
    config = read_config("", needed=False)
    return load_named(str(model_name), "", config, task, pick_device(device))


def predict(model, source, **options):
    """One row a study with the model's answers: DataFrame, see `prediction_table`.

    source: see `studies_of`. options: those of `predict`, e.g. precision="bf16". The studies
    without an answer are in `.attrs["left_out"]`, a dict of study to reason. Raises UserError.
    """
    settings, store, eids = studies_of(model, source, options)
    table, left_out, _ = answer_studies(model, store, eids, settings)
    table.attrs["left_out"] = left_out
    return table


def study_embeddings(model, source, **options):
    """One 768-vector a study: DataFrame (S, 768) by study id; otherwise as `predict`."""
    settings, store, eids = studies_of(model, source, options)
    unreadable = {}
    found = run_studies(model.net, store, eids, settings, unreadable=unreadable)
    table = pd.DataFrame(found.embeddings, index=pd.Index(found.eids, name="eid"))
    table.attrs["left_out"] = unreadable
    return table


def attribute(model, study, labels=None, **options):
    """What each video of a study counted for in each answer: DataFrame, see `video_rows`.

    study: (V videos, C clips, 768) clip embeddings, or StudyClips; labels: names, default all;
    options: those of `explain`, e.g. explain_method="leave_one_out". Raises UserError.
    """
    settings, model = validated(Settings, options), as_one(model)
    bag = study if isinstance(study, StudyClips) else bag_of("study", study)
    columns = label_columns(model, labels)
    unit = explain_study(model, "study", bag, columns, settings, clip_baseline(model, settings))
    return video_rows(model, unit, settings).drop(columns="eid")


def studies_of(model, source, options):
    """(Settings, store, study ids) of what a user has: a dict of study id to clip embeddings
    (V videos, C clips, 768), a folder of embedding files or of videos, or a store.

    Videos are extracted as `--videos` does, into ./clip_embeddings; options may hold its options.
    """
    settings = validated(Settings, input_options(model.record.input) | options)
    if isinstance(source, dict):
        store = Arrays(source)
    elif not isinstance(source, str | os.PathLike):
        store = source
    elif any(Path(source).glob("*.hdf5")) or any(Path(source).glob("*.h5")):
        store = open_store(Path(source), most_videos=settings.max_videos_per_study)
    else:
        settings.videos = str(source)
        source = extracted(options, settings, Config(), model)
        return settings, source.store, source.eids
    eids = some_of(store.files, settings.sample_limit)
    if hasattr(store, "made_with"):
        warn_of_other_input(model, store, eids)
    return settings, store, eids


class Arrays:
    """Clip embeddings in memory as a store: dict of study id to (V videos, C clips, 768)."""

    def __init__(self, arrays):
        self.files = {str(eid): bag_of(eid, array) for eid, array in arrays.items()}

    def read(self, eid, rng=None):
        return self.files[eid]

    def size(self, eid):
        V, C, _ = self.files[eid].embeddings.shape
        return V * C


def bag_of(eid, array):
    """StudyClips of an array (V, C, 768); its videos are numbered. Raises UserError."""
    array = np.asarray(array, np.float32)
    if array.ndim != 3 or array.shape[2] != D or not array.size or not np.isfinite(array).all():
        raise UserError(
            f"study {eid}: expected finite clip embeddings (videos, clips, {D}), got {array.shape}"
        )
    return StudyClips(array, [f"video {v}" for v in range(len(array))])


# -------------------------------------------------------------------------------------------- check


def cmd_check(typed):
    """What a long run would trip over, each with its remedy, and how long it would take.

    Has no rule of its own: it calls what reads the config, labels, embeddings and models in a run,
    and listens. Goes on after an error with whatever can still be checked, and writes no file.
    """
    levels, videos = Counter(), typed.get("videos")
    section = partial(check_section, levels)
    config = model = settings = None
    if typed.get("cohort"):  # for embed/train.py, which needs nothing of the rest
        with section("cohort", "mend the tables, or name the folder with --data_dir") as listener:
            size = preview_cohort(typed, listener)
            check_room("decoded videos", Path(), size, listener.error, listener)
        return end_check(levels)
    with section("config", "mend the config; config-example.json shows one") as listener:
        config = read_config(typed.get("config"), needed=not videos)
        names = some(config.tasks, 9), some(config.datasets, 9)
        listener.ok(f"{config.path}: tasks {names[0]}; datasets {names[1]}")
    if config:
        with section("model", "name another --model_name, or train it anew") as listener:
            model = check_model(typed, config, listener)
        with section("choice", "mend the option or the config") as listener:
            settings = check_choice(typed, config, model, listener)
    if settings:
        check_data(settings, config, model, section)
    with section("videos", "see --videos") as listener:
        if videos:
            typed = {name: typed[name] for name in typed if name in options_of("extract")}
            options = resolve_settings("extract", typed, config or Config(), model)
            trained_on = model.record.encoder_sha256 if model else ""
            size = preview_extraction(vars(options) | {"videos": videos}, trained_on, listener)
            check_room("clip embeddings of --videos", MODELS, size, listener.error, listener)
        else:
            listener.ok("none looked at; --videos names a folder")
    end_check(levels)


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


# ------------------------------------------------------------------------------------- command line

COMMANDS = {
    "train": cmd_train,
    "evaluate": cmd_evaluate,
    "predict": cmd_predict,
    "embed": cmd_embed,
    "explain": cmd_explain,
    "check": cmd_check,
    "pack": cmd_pack,
    "download": cmd_download,
    "inspect": cmd_inspect,
    "demo": cmd_demo,
}


def build_parser():
    parser = Parser(prog="echofocus.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, function in COMMANDS.items():
        summary = " ".join(function.__doc__.split("\n\n")[0].split())
        sub = commands.add_parser(command, help=summary, description=summary)
        add_options(sub, command)
    return parser


def main(argv=None):
    typed = vars(build_parser().parse_args(argv))
    command = typed.pop("command")
    typed = checked_options(typed)
    if command not in ("train", "explain") and from_environment("WORLD_SIZE", 1, least=1) > 1:
        raise UserError(f"{command} runs in one process: leave out torchrun")
    COMMANDS[command](typed)


def program():
    """What the command line runs, from the clone or installed."""
    run_main(main, Path(sys.argv[0]).name)


if __name__ == "__main__":
    program()
