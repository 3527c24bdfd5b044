"""Settings and the config: what may be said, and who wins."""

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from common.console import UserError, nearest

MODELS = Path("trained_models")

FOLDS = ("train", "val", "test")

CONFIGS = (Path("config.json"), Path("config-example.json"))


# ------------------------------------------------------------------------------------------ options


def option(default, help, commands, least=None, **argparse_options):
    """A settings field: its default, meaning, least value and commands, in one place."""
    metadata = {"help": help, "commands": commands.split(), "argparse": argparse_options}
    metadata["least"] = least
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


WITH_MODEL = "evaluate predict embed explain"

ALL = f"train check {WITH_MODEL}"


@dataclass
class Settings:
    """Every option. An empty text or list is found from the others; what was taken is printed."""

    config: str = option(
        "", "tasks and datasets [config.json, else config-example.json]", f"{ALL} pack inspect"
    )
    model_name: str = option(
        "",
        "folder in ./trained_models, or a path [train: the task; else the newest]",
        f"{ALL} download inspect",
    )
    dataset: str = option(
        "", "a dataset of the config [the model's, else the first]", f"{ALL} pack"
    )
    task: str = option("", "a task of the config [the model's, else the first]", ALL)
    run_id: str = option("", "appended to the model's name, to keep runs apart", ALL)
    device: str = option("", "cpu, cuda, cuda:1 [CUDA if there is one]", ALL)
    sample_limit: int = option(0, "use so many studies at most; 0 is all", ALL, least=0)
    batch_size: int = option(
        0, "studies computed together at most; 0: as batch_tokens says", ALL, least=0
    )
    batch_tokens: int = option(
        4096, "clips computed together, but a whole study at least", ALL, least=1
    )

    seed: int = option(0, "of the split, the order and the dropout", "train")
    split: str = option("64,16,20", "percent of patients to train,val,test", "train")
    split_column: str = option(
        "", "column of the label table with train, val or test, instead of --split", "train"
    )
    checkpoint_minutes: float = option(
        10, "between checkpoints within an epoch; 0: after every step", "train", least=0
    )
    n_folds: int = option(0, "cross-validation instead of --split; 0: none", "train")
    fold: int = option(0, "of --n_folds: the test fold; the next one validates", "train")
    first_study_only: bool = option(
        False,
        "only the first usable study of each patient",
        "train evaluate explain",
        action="store_true",
    )
    assume_unseen: bool = option(
        False,
        "take a dataset as unseen by a model where its file does not say whom it was trained on",
        "train evaluate explain",
        action="store_true",
    )
    allow_mixed: bool = option(
        False, "train on embeddings of different encoders or settings", "train check",
        action="store_true",
    )  # fmt: skip
    init_from: str = option("", "model to start from; heads matched by label name", "train")
    precision: str = option("fp32", "of the computation", ALL, choices=("fp32", "bf16"))
    transformer_type: str = option(
        "standard", "aggregator", "train", choices=("standard", "query", "multiquery")
    )
    encoder_depth: int = option(1, "transformer layers; 0 is one attention layer", "train", least=0)
    tf_combine: str = option("avg", "pooling over clips", "train", choices=("avg", "max"))
    clip_dropout: float = option(
        0.5, "share of a study's clips dropped in training", "train", least=0
    )
    learning_rate: float = option(1e-4, "of AdamW", "train", least=1e-12)
    batch_number: int = option(128, "studies an optimiser step", "train", least=1)
    epoch_lim: int = option(30, "epochs at most", "train", least=1)
    epoch_early_stop: int = option(
        10, "stop after so many epochs without improvement", "train", least=1
    )

    subset: str = option("test", "the fold to use", "evaluate explain", choices=(*FOLDS, "all"))
    out: str = option("", "table to write [predictions_<dataset>.csv beside the model]", "predict")
    videos: str = option(
        "", "folder of a study's videos or of studies, to start from", f"{WITH_MODEL} check"
    )
    keep: str = option(
        "", "folder for the clip embeddings of --videos [./clip_embeddings]", WITH_MODEL
    )
    label_path: str = option("", "label table, instead of the config's", "evaluate explain")
    embed_file: str = option(
        "", "file to write [embeddings_<dataset>_<task>.h5 beside the model]", "embed"
    )
    level: str = option(
        "study", "one vector a study, or one a video", "embed", choices=("study", "video")
    )
    datasets: list = option([], "several datasets, instead of --dataset", "embed", nargs="+")
    map: str = option(
        "", "also draw the studies in a plane: pca (if not said) or tsne", "embed",
        choices=("pca", "tsne"), nargs="?", const="pca",
    )  # fmt: skip
    color_by: str = option("dataset", "dataset, or a column of the label table", "embed")
    explain_n: int = option(5, "top videos in the published table", "explain", least=1)
    explain_mode: str = option(
        "pred", "explain the prediction or its loss", "explain", choices=("pred", "loss")
    )
    explain_tasks: list = option([], "labels to explain [all]", "explain", nargs="+")
    explain_method: str = option(
        "adaptive",
        "adaptive: integrated gradients, refined until complete to 1 %%; the next three: a fixed "
        "quadrature of them; leave_one_out: the change without the video; attention: rollout",
        "explain",
        choices=(
            *("adaptive", "gausslegendre", "riemann_right", "riemann_trapezoid"),
            *("leave_one_out", "attention"),
        ),
    )
    explain_steps: int = option(64, "steps of a fixed quadrature", "explain", least=1)
    baseline: str = option(
        "zero",
        "where integrated gradients start: zero, or the mean clip embedding in training",
        "explain",
        choices=("zero", "mean"),
    )
    eids: list = option([], "studies to explain, whatever their fold", "explain", nargs="+")
    select: str = option(
        "all",
        "studies to explain, best first, --sample_limit of them [20]",
        "explain",
        choices=("all", "confident", "wrong", "balanced"),
    )
    dtype: str = option("float32", "of the packed numbers", "pack", choices=("float32", "float16"))
    studies: int = option(100, "phantom studies to make", "demo", least=1)
    source: str = option(
        "",
        "download: a released model, URL, zip, folder or .pt file; inspect: as --model_name",
        "download inspect",
        nargs="?",
    )
    list_: bool = option(False, "name the released models", "download", action="store_true")
    sha256: str = option("", "the file's SHA-256, where you know it", "download")
    json: str = option("", "file to write the same to, for programs", "inspect")


RECIPES = {  # how the published models were trained
    "chd": {"encoder_depth": 1, "learning_rate": 1e-4, "batch_number": 128, "epoch_lim": 30},
    "measure": {"encoder_depth": 5, "learning_rate": 1e-5, "batch_number": 32, "epoch_lim": 12},
}


def options_of(command):
    """The Settings fields that a command takes."""
    return [f for f in fields(Settings) if command in f.metadata["commands"]]


def resolve_settings(command, typed, config, model=None):
    """Who wins: what is typed, the model's own, the config's task, the published recipe, defaults.

    typed: dict of the options given; model: a LoadedModel or None. Returns Settings and prints
    what was taken that nobody typed.
    """
    task = typed.get("task") or (model.task if model else config.pick("task", ""))
    if typed.get("videos"):
        dataset = Path(typed["videos"]).resolve().name
    else:
        trained_on = model.made_with.get("dataset", "") if model else ""
        dataset = config.pick("dataset", typed.get("dataset") or trained_on)
    layers = [
        ("typed", typed),
        ("in the config", config.tasks[task].settings if task in config.tasks else {}),
        (f"the published {task} recipe", RECIPES.get(task, {})),
        ("the model's" if model else "the config's first", {"task": task, "dataset": dataset}),
        ("the task's name", {} if model else {"model_name": task}),
    ]
    settings, taken = Settings(config=str(config.path)), [f"config = {config.path.name}"]
    for f in options_of(command):
        for source, values in layers:
            if values.get(f.name) not in (None, ""):
                setattr(settings, f.name, values[f.name])
                if source != "typed":
                    taken.append(f"{f.name} = {values[f.name]} ({source})")
                break
    print("using " + "; ".join(taken))
    check_least(settings)
    return settings


def check_least(settings):
    """UserError for a number below what its option allows, before any work is done."""
    for f in fields(settings):
        least, value = f.metadata["least"], getattr(settings, f.name)
        if least is not None and not (value >= least and value < np.inf):
            raise UserError(f"--{f.name} must be {least:g} or more, not {value}")


# ------------------------------------------------------------------------------------------- config


@dataclass
class Task:
    """What to learn: label names in order and how to read them."""

    task_labels: list[str]
    label_path: Path | None = None
    type: str = ""  # binary or regression; '' is decided by the values
    units: dict = field(default_factory=dict)  # label -> unit, for tables and figures
    boxcox: list | None = None  # labels made normal by Box-Cox; None: the published five
    valid_range: dict | None = None  # label -> [low, high]; None: the published two
    split_column: str = ""  # of the label table: train, val or test
    settings: dict = field(default_factory=dict)  # option -> value, for this task


@dataclass
class Dataset:
    """Where a cohort's clip embeddings lie, and its own label table if it has one."""

    embedding_path: Path
    label_path: Path | None = None
    split_column: str = ""  # of the label table: train, val or test


@dataclass
class Config:
    path: Path
    tasks: dict[str, Task]
    datasets: dict[str, Dataset]

    def pick(self, kind, name):
        """The name of a task or dataset, the first when none is named. Raises UserError."""
        known = self.tasks if kind == "task" else self.datasets
        if not name:
            return next(iter(known))
        if name not in known:
            raise UserError(
                f"{self.path} has no {kind} {name}{nearest(name, known)} (it has: "
                f"{', '.join(known)})"
            )
        return name


def read_config(path, needed=True):
    """Read and check the JSON config; paths in it are relative to its folder. Raises UserError.

    Where it is not needed and there is none, the result has no task and no dataset.
    """
    if not path and not needed and not any(p.is_file() for p in CONFIGS):
        return Config(Path("(none)"), {}, {})
    path = Path(path) if path else next((p for p in CONFIGS if p.is_file()), CONFIGS[0])
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"no config {path}; copy config-example.json and edit it") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    check_keys(raw, {"task": dict, "dataset": dict}, path)
    for kind in ("task", "dataset"):
        if not raw.get(kind):
            raise UserError(f"{path} needs a section '{kind}' with at least one {kind}")

    def located(entry):
        return {k: path.parent / v if k.endswith("_path") else v for k, v in entry.items()}

    tasks, datasets = {}, {}
    for name, entry in raw["task"].items():
        where = f"{path}, task {name}"
        check_name(name, f"{path}, task")
        check_keys(entry, TASK_KEYS, where, ["task_labels"])
        check_settings_entry(entry.get("settings", {}), f"{where}, settings")
        if entry.get("type", "") not in ("", "binary", "regression"):
            raise UserError(f"{where}: type is binary or regression")
        labels = [str(label).strip() for label in entry["task_labels"]]
        if not labels or len(set(labels)) < len(labels):
            raise UserError(f"{where}: task_labels must name at least one label, and none twice")
        if taken := reserved(labels):
            raise UserError(f"{where}: {taken} is a column of our tables and cannot be a label")
        units = entry.get("units", {}).values()
        if any(not isinstance(unit, str) for unit in units):
            raise UserError(f"{where}: units are text")
        if odd := [text for text in (*labels, *units) if not text.isprintable()]:
            raise UserError(f"{where}: {odd[0]!a} holds a character that cannot be printed")
        for key in ("units", "boxcox", "valid_range"):
            for label in entry.get(key, ()):
                if label not in labels:
                    raise UserError(f"{where}, {key}: no label {label}{nearest(label, labels)}")
        for label, ends in entry.get("valid_range", {}).items():
            if not is_range(ends):
                raise UserError(f"{where}, valid_range of {label}: [low, high], null for no limit")
        tasks[name] = Task(**(located(entry) | {"task_labels": labels}))
    for name, entry in raw["dataset"].items():
        check_name(name, f"{path}, dataset")
        check_keys(entry, DATASET_KEYS, f"{path}, dataset {name}", ["embedding_path"])
        datasets[name] = Dataset(**located(entry))
    return Config(path, tasks, datasets)


def check_name(name, what):
    """UserError for a name that would lead out of its folder or hide in it."""
    if not re.fullmatch(r"\w[\w .+-]*", name):
        raise UserError(f"{what}: {ascii(name)[:60]} is no name; use letters, digits, . - + and _")


def reserved(labels):
    """A label that one of our own columns is called, or ''."""
    own = {"pid", "eid", "n_videos", "n_clips", "warning"}
    own |= {f"{x}_{what}" for x in labels for what in ("decision", "threshold")}
    return next((label for label in labels if label in own), "")


def is_range(ends):
    numbers = isinstance(ends, list) and len(ends) == 2
    return numbers and all(x is None or (type(x) in (int, float) and x == x) for x in ends)


TASK_KEYS = {"task_labels": list, "label_path": str, "type": str, "units": dict, "boxcox": list}

TASK_KEYS |= {"valid_range": dict, "settings": dict, "split_column": str}

DATASET_KEYS = {"embedding_path": str, "label_path": str, "split_column": str}

JSON_NAMES = {list: "a list", str: "text", dict: "an object", int: "a number", float: "a number"}


def check_settings_entry(entry, where):
    """UserError for settings of a task that `train` has not, or of the wrong kind."""
    options = {f.name: f for f in options_of("train") if "check" not in f.metadata["commands"]}
    check_keys(entry, {name: f.type for name, f in options.items()}, where)
    for name, value in entry.items():
        choices = options[name].metadata["argparse"].get("choices", (value,))
        if value not in choices:
            raise UserError(f"{where}: {name} is one of {', '.join(choices)}, not {value}")


def check_keys(entry, valid, where, required=()):
    """UserError for a key that is not known or of the wrong type, or a required one missing.

    valid: key to type.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object {{...}}, got {json.dumps(entry)[:40]}")
    for key, value in entry.items():
        if key not in valid:
            raise UserError(f"{where}: unknown key '{key}'{nearest(key, valid)}")
        kind = (int, float) if valid[key] is float else valid[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and valid[key] is not bool):
            wanted = JSON_NAMES.get(valid[key], valid[key].__name__)
            raise UserError(f"{where}: '{key}' must be {wanted}, not {json.dumps(value)[:40]}")
    for key in required:
        if key not in entry:
            raise UserError(f"{where}: '{key}' is missing")
