"""Trained models from folders and files: find, read and average them."""

import os
from pathlib import Path

import numpy as np
import torch

from echofocus_core.base import checkpoints, releases
from echofocus_core.base.console import PROGRAM, RUN, UserError, nearest, some
from echofocus_core.base.files import sha256_file
from echofocus_core.base.options import Settings
from echofocus_core.base.seen import seen_from
from echofocus_core.study.config import MODELS, Input, Record, read_record
from echofocus_core.study.end_to_end import ENCODER_FILE
from echofocus_core.study.input_check import Novelty
from echofocus_core.study.models import Ensemble, LoadedEnsemble, LoadedModel
from echofocus_core.study.network import Readings, build
from echofocus_core.study.outputs import Outputs
from echofocus_core.study.scaling import scaling_fault
from echofocus_core.video import panecho
from echofocus_core.video.encoders.trained import load_trained
from echofocus_core.video.panecho import published_parts
from echofocus_core.video.store import MADE_WITH

# ------------------------------------------------------------------------------------------- find

BEST = "best_checkpoint.pt"


def model_folder(name, run_id=""):
    """`--model_name` (and `--run_id`) -> folder: a name in ./trained_models, or a path as it is."""
    if os.sep in run_id:
        raise UserError(f"--run_id is appended to a name and has no {os.sep}: {run_id}")
    name += f"_{run_id}" if run_id else ""
    if os.sep in name and not (MODELS / name).is_dir():
        return Path(name)
    return MODELS / name


def folds_in_folder(folder):
    """The model folders of a cross-validation, or []."""
    if (folder / BEST).is_file():
        return []
    return sorted(path.parent for path in folder.glob(f"fold_*/{BEST}"))


def find_model(name, run_id="", task="", tasks=()):
    """The folder of a trained model, or an encoder file. Raises UserError.

    name: in ./trained_models, or the path of the folder or of a file in it. Without a name: the
    only model in ./trained_models, of the task if there is one.
    """
    if not name:
        return only_model(task, tasks)
    if Path(name).name == BEST and Path(name).is_file():
        return Path(name).absolute().parent if Path(name) == Path(BEST) else Path(name).parent
    if Path(name).suffix == ".pt" and Path(name).is_file():
        if not is_encoder(checkpoints.load_safely(Path(name))):
            raise UserError(f"make a model folder of {name} first: {PROGRAM} download {name}")
        return Path(name)
    folder = model_folder(name, run_id)
    if (folder / BEST).is_file() or folds_in_folder(folder) or encoder_in(folder):
        return folder
    get = f"; get it with: {PROGRAM} download {name}"
    if name not in releases.registry():
        names = [*(path.parent.name for path in MODELS.glob(f"*/{BEST}")), *releases.registry()]
        get = f"; train it, or get a released one ({PROGRAM} download --list){nearest(name, names)}"
    raise UserError(f"no trained model {folder}{get}")


def only_model(task, tasks):
    """The one folder in ./trained_models, of a task. Raises UserError for none or several."""
    paths = sorted([*MODELS.glob(f"*/{BEST}"), *MODELS.glob(f"*/fold_0/{BEST}")])
    paths = [path for path in paths if not task or is_of_task(path, task, tasks)]
    names = [path.relative_to(MODELS).parts[0] for path in paths]
    of_task = f" of task {task}" if task else ""
    if len(names) > 1:
        raise UserError(
            f"{len(names)} trained models{of_task} are in ./{MODELS}: name one with --model_name "
            f"({', '.join(names)})"
        )
    if names:
        print(f"using model_name = {names[0]} (the only one{of_task} in ./{MODELS})")
        return MODELS / names[0]
    released = [n for n, e in releases.registry().items() if not task or e.get("task") == task]
    get = f"get a released one with `{PROGRAM} download {released[0]}`, or " if released else ""
    raise UserError(
        f"no trained model{of_task} in ./{MODELS}; {get}train one with `{PROGRAM} train`, or name "
        "the path of one with --model_name"
    )


def is_of_task(path, task, tasks):
    """Whether a checkpoint is of a task: by its record, the registry or the number of labels."""
    try:
        record, net = read_network(read_checkpoint(path), path)
    except UserError as error:
        print(f"skipped {path.parent.name}: {error}")
        return False
    name = record.task if record else releases.registry_entry(path.parent).get("task")
    if name or task not in tasks:
        return name == task
    return len(tasks[task].task_labels) == net.n_outputs


def load_named(name, run_id, tasks, task="", device="cpu"):
    """The model of `--model_name`, or the average of several: `a,b,c`, or the folds in a folder.

    tasks: of the config, which name the outputs of a published checkpoint.
    """
    names = name.split(",")
    if len(names) > 1 and not all(map(str.strip, names)):
        raise UserError(f"{name}: a name is missing next to a comma")
    folders = [find_model(x, run_id, task, tasks) for x in names]
    folder = folders[0]
    if len(folders) > 1:
        folder = folder.with_name("+".join(f.name for f in folders)[:100])
    else:
        folders = folds_in_folder(folder) or folders
    members = [load_model(f, tasks, task, device=device) for f in folders]
    return members[0] if len(members) == 1 else ensemble_of(members, folder)


# ------------------------------------------------------------------------------------------- read


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


def load_model(folder, tasks=(), task="", device="cpu"):
    """Load the checkpoint in a model folder, or PanEcho. Raises UserError."""
    path = folder / BEST
    if not path.is_file() and (file := encoder_in(folder)):
        return load_readings(file, device)
    releases.check_source(path)
    saved = read_checkpoint(path)
    record, net = read_network(saved, path)
    task, labels, units, origin = labels_for(folder, record, net.n_outputs, tasks, task)
    if not record:
        print(f"labels of {folder.name}: task {task} of {origin} ({net.n_outputs})")
    outputs, scaling = outputs_from(saved, record, labels, path)
    encoder_file = path if saved.get("end_to_end") else folder / ENCODER_FILE
    encoder_file = encoder_file if encoder_file.is_file() else None
    if not record:
        published = Input(size=224, clip_len=16)  # of the released models' training
        record = Record(input=published)
        if encoder_file == path:
            digest = sha256_file(path)
            published = published.model_copy(update={"weights_sha256": digest})
            record = Record(input=published, encoder_sha256=digest)
    net.to(device).eval().requires_grad_(False)
    novelty = Novelty.load(saved["novelty"]) if saved.get("novelty") else None
    return LoadedModel(
        folder, net, task, outputs, scaling, record, units, seen_from(saved, folder), encoder_file,
        saved.get("clip_mean"), novelty, saved.get("mean_answers"),
    )  # fmt: skip


def encoder_in(place):
    """The encoder file of a folder, or a .pt file that is not a study-level model; or None."""
    path = panecho.weights_path(Path(place))
    is_model = path.suffix != ".pt" or path.name.endswith("_checkpoint.pt")
    return path if path.is_file() and not is_model else None


def load_readings(file, device):
    """The heads of an encoder file: panecho.pt, or one that embed/train.py wrote."""
    encoder = load_trained(file)
    if not encoder.model.tasks:
        raise UserError(f"{file} is an encoder without a head: it gives embeddings, no readings")
    net = Readings(encoder.model).to(device).eval().requires_grad_(False)
    trained, digest = encoder.record, encoder.sha256
    size = {"size": trained.size, "clip_len": trained.clip_len} if trained else {}
    record = Record(encoder_sha256=digest, input=Input(weights_sha256=digest, **size))
    outputs = Outputs.of(net.columns, "readings")
    return LoadedModel(file.parent, net, "panecho", outputs, None, record, {})


def read_network(saved, path):
    """(Record or None, Aggregator) of a checkpoint's dict. Raises UserError."""
    record, state = read_record(saved, path), saved["model_state_dict"]
    if record:
        network = record.settings, len(record.outputs.names), record.outputs.groups, record.width
    else:
        network = published_architecture(state, path)
    with torch.device("meta"):
        net = build(*network)
    checkpoints.load_strictly(net, state, path, "an EchoFocus model")
    return record, net


def published_architecture(state, path):
    """(Settings, number of outputs) from the names and shapes in a published state dict."""
    if "ff.weight" not in state:
        raise UserError(f"{path} is not an EchoFocus model: no ff.weight in its state dict")
    kind, n_outputs = "standard", len(state["ff.weight"])
    if "query_token" in state:
        kind = "query"
    elif "query_tokens" in state:
        kind, n_outputs = "multiquery", state["query_tokens"].shape[1]
    layers = {k.split(".")[2] for k in state if k.startswith("encoder.layers.")}
    return Settings(transformer_type=kind, encoder_depth=len(layers)), n_outputs


def outputs_from(saved, record, labels, path):
    """(Outputs, scaling of its measurements or None) of a checkpoint. Raises UserError."""
    kind = "regression" if saved.get("input_norm_dict") else "binary"
    outputs = record.outputs if record and record.type else Outputs.of(labels, kind)
    measured, scaling = outputs.of_kind("regression"), saved.get("input_norm_dict")
    if bool(measured) != bool(scaling):
        without = "without" if measured else "with"
        raise UserError(f"{path}: a {outputs.type} model {without} label scaling")
    if not scaling:
        return outputs, None
    scaling = {k.strip(): v for k, v in scaling.items()}
    for label in measured:
        if not isinstance(entry := scaling.get(label), dict):
            raise UserError(f"{path} has no scaling for label {label}")
        if fault := scaling_fault(entry):
            raise UserError(f"{path}: scaling of {label}: {fault}")
    return outputs, scaling


def released_task(task):
    """The registry entry of a released model with that task, or {}."""
    return next((e for e in releases.registry().values() if e.get("task") == task), {})


def labels_for(folder, record, n_outputs, tasks, task=""):
    """(task, labels, units, origin of these) of a model with `n_outputs`. Raises UserError.

    They are in its record. A published checkpoint has no record: the labels of a released one are
    in the registry; others have those of `task`, of the task with the name of the folder, or of the
    only task of the config with this number of labels.
    """
    if record:
        return record.task, record.labels, record.units, "its own file"
    entry = releases.registry_entry(folder)
    if not entry and task not in tasks:
        entry = released_task(task)
    if (
        entry.get("task") == (task or entry.get("task"))
        and len(entry.get("labels", ())) == n_outputs
    ):
        return entry["task"], entry["labels"], {}, "the registry of released models"
    candidates = [name for name in tasks if name == task or not task]
    fits = [name for name in candidates if len(tasks[name].task_labels) == n_outputs]
    if not fits:
        raise UserError(
            f"{folder.name} has {n_outputs} outputs and the config has no task"
            f"{' ' + task if task else ''} with this number of labels; add it, in output order"
        )
    if folder.name in fits:
        fits = [folder.name]
    if len(fits) > 1:
        raise UserError(f"{folder.name} fits {' and '.join(fits)}: name one with --task")
    return fits[0], tasks[fits[0]].task_labels, tasks[fits[0]].units, "the config"


def check_download(folder, entry):
    """UserError for a downloaded model that cannot be used. entry: of the registry, or {}."""
    for path in sorted(folder.glob("*_checkpoint.pt")):
        record, net = read_network(read_checkpoint(path), path)
        labels = entry.get("labels", range(net.n_outputs))
        if not record and net.n_outputs != len(labels):
            raise UserError(f"{path} has {net.n_outputs} outputs, not {len(labels)}")
    if (folder / "panecho.pt").is_file():
        panecho.load_panecho(folder / "panecho.pt")


# ---------------------------------------------------------------------------------------- average

SEVERAL_RULES = "several rules"  # the target of models whose thresholds are not averaged


def other_times(model, survival, units):
    """Warnings for survival labels read from a different time column, unless both units are
    declared. survival: label -> columns."""
    texts = []
    for label, columns in model.record.survival.items():
        time, declared = (
            survival.get(label, columns)[0],
            model.units.get(label) and units.get(label),
        )
        if time != columns[0] and not declared:
            texts.append(
                f"times of {label} are in the column {time} and were in {columns[0]} for "
                f"{model.folder.name}: nothing says that both are in one unit (units of the task)"
            )
    return texts


def ensemble_of(members, folder):
    """A LoadedEnsemble. Raises UserError for models of different labels or encoders."""
    first = members[0]
    for model in members[1:]:
        refuse_other_model(first, model)
    if first.type == "readings":
        raise UserError("PanEcho's readings cannot be averaged")
    unknown = [m.folder.name for m in members if m.seen is None]
    if unknown and any(m.record.labels for m in members):
        raise UserError(
            f"{unknown[0]} has no list of its training patients: leave it out, or put its "
            "split.csv there"
        )
    rules = dict.fromkeys(m.target for m in members if m.record.thresholds)
    thresholds, settings = {}, first.record.settings
    if len(rules) > 1:
        settings = settings.model_copy(update={"target": SEVERAL_RULES})
        RUN.warning(
            f"the thresholds of these models were chosen by {SEVERAL_RULES} ({some(rules)}): the "
            "average has no thresholds",
            "evaluate --target chooses new thresholds on the validation fold",
        )
    else:
        for label in first.outputs.names:
            cuts = [m.record.thresholds.get(label) for m in members]
            if None not in cuts:
                thresholds[label] = float(np.mean(cuts))
    unlearnt = [x for x in first.outputs.names if all(x in m.record.unlearnt for m in members)]
    changes = {"thresholds": thresholds, "unlearnt": unlearnt, "settings": settings}
    print(f"averaging {len(members)} models: {some(m.folder.name for m in members)}")
    return LoadedEnsemble(
        folder, Ensemble([m.net for m in members]).eval().requires_grad_(False), first.task,
        first.outputs, first.scaling, first.record.model_copy(update=changes), first.units,
        None if unknown else [part for m in members for part in m.seen], first.encoder_file,
        first.clip_mean, first.novelty, members=members,
    )  # fmt: skip


def refuse_other_model(first, model):
    """UserError for a model with other labels, units or input than the first one."""

    def facts(m):
        values = {"labels": m.outputs.names, "type": m.outputs.kinds, "level": m.record.level}
        values |= {"units": m.units, "encoder": m.record.encoder_sha256}
        values |= {"encoders": list(m.record.encoders), "width": m.record.width}
        return values | {name: getattr(m.record.input, name) for name in MADE_WITH}

    pairs = zip(facts(first).items(), facts(model).values(), strict=True)
    for (name, value), other in pairs:
        if value != other and None not in (value, other):
            raise UserError(
                f"{first.folder.name} and {model.folder.name} differ in {name}: not averaged"
            )
    for text in other_times(first, model.record.survival, model.units):
        raise UserError(f"{model.folder.name}, {text}: not averaged")
