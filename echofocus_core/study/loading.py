"""Trained models from folders and files: finding, reading and averaging them."""

import hashlib
import os
from pathlib import Path

import numpy as np

from echofocus_core.base import checkpoints, releases
from echofocus_core.base.console import PROGRAM, RUN, UserError, nearest, some
from echofocus_core.base.files import sha256_file
from echofocus_core.study.config import MODELS, Input, Record, read_record
from echofocus_core.study.end_to_end import ENCODER_FILE
from echofocus_core.study.input_check import Novelty
from echofocus_core.study.models import (
    Ensemble,
    LoadedEnsemble,
    LoadedModel,
    clip_mean_from,
    labels_for,
    network_from,
    outputs_from,
    pooling_of,
)
from echofocus_core.study.network import Readings
from echofocus_core.study.outputs import Outputs
from echofocus_core.study.splits import seen_from
from echofocus_core.video import panecho
from echofocus_core.video.panecho import published_parts
from echofocus_core.video.store import MADE_WITH


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
    if not path.is_file() and (file := encoder_in(folder)):
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


def encoder_in(place):
    """The encoder file of a folder, or a .pt file that is not a study-level model; or None."""
    path = panecho.weights_path(Path(place))
    is_model = path.suffix != ".pt" or path.name.endswith("_checkpoint.pt")
    return path if path.is_file() and not is_model else None


def load_readings(file, device):
    """The heads of an encoder file: panecho.pt, or one that embed/train.py wrote."""
    encoder = panecho.load_panecho(file)
    if not encoder.model.tasks:
        raise UserError(f"{file} is an encoder without a head: it gives embeddings, no readings")
    net = Readings(encoder.model).to(device).eval().requires_grad_(False)
    own, digest = encoder.record, encoder.sha256
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
        file = name.endswith(".pt") and encoder_in(name)
        if file and not is_encoder(checkpoints.load_safely(file)):
            raise UserError(f"no trained model {file}{how_to_get(name, [])}")
        folder = file or model_folder(name, run_id)
        there = (folder / "best_checkpoint.pt").is_file() or folds_in_folder(folder)
        if not (there or encoder_in(folder)):
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


def find_model_file(name):
    """The checkpoint or encoder file of a model name, folder or .pt path; '' is the newest."""
    if name.endswith(".pt") and Path(name).is_file():
        return Path(name)
    if name and (path := encoder_in(model_folder(name))):
        return path
    return find_model_folder(name) / "best_checkpoint.pt"


def origin_of(folder):
    """Where a model is from, its licence and citation: its own record, else the registry's."""
    entry = releases.released(folder)
    entry = {k: entry[k] for k in ("licence", "citation") if k in entry}
    return {k: v for k, v in (entry | releases.read_source(folder)).items() if k != "files"}


def target_of(model):
    """The rule by which its thresholds were chosen."""
    return model.record.settings.target or "youden"


def network_digest(net):
    """SHA-256 of a network's parameters."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


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
