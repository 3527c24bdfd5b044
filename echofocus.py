"""EchoFocus: one answer per echocardiography study from all of its videos.

    python echofocus.py demo                                  # the whole path on phantoms
    python echofocus.py train    --task chd                   # learn a task from a label table
    python echofocus.py evaluate --model_name chd             # metrics and figures on the test fold
    python echofocus.py predict  --model_name chd --videos F  # DICOM in, probabilities out
    python echofocus.py embed    --dataset outside            # one 768-vector a study
    python echofocus.py explain                               # the videos that drove an answer

What is left out has a default, and the tool prints which it took. Files: a config (JSON: tasks and
datasets), a label table (CSV: pid, eid, one column a label), a folder of clip embeddings (HDF5, one
file a study, from embed/extract.py or the published scripts), a model folder below trained_models/.

The file is in the order in which data flows: config -> labels, scaling, patient splits -> embedding
store and batches -> model -> checkpoints -> the loop -> training -> metrics -> evaluate, predict,
embed, explain -> figures -> demo -> command line.
Axis letters: S studies, V videos, C clips, N tokens (all clips of a batch), D features, T labels.
"""

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import zlib
from argparse import SUPPRESS
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from itertools import chain
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from embed import __version__, extract
from embed.common import Parser, UserError, atomic_path, nearest, pick_device, progress, run_main

MODELS = Path("trained_models")
FOLDS = ("train", "val", "test")
CONFIGS = (Path("config.json"), Path("config-example.json"))

# ---------------------------------------------------------------------------------------- settings


def option(default, help, commands, least=None, **argparse_options):
    """A settings field: its default, meaning, least value and commands, in one place."""
    metadata = {"help": help, "commands": commands.split(), "argparse": argparse_options}
    metadata["least"] = least
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


WITH_MODEL = "evaluate predict embed explain"
ALL = f"train {WITH_MODEL}"


@dataclass
class Settings:
    """Every option. An empty text or list is found from the others; what was taken is printed."""

    config: str = option(
        "", "tasks and datasets [config.json, else config-example.json]", f"{ALL} pack"
    )
    model_name: str = option(
        "", "folder in ./trained_models, or a path [train: the task; else the newest]", ALL
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
    n_folds: int = option(0, "cross-validation instead of --split; 0: none", "train")
    fold: int = option(0, "of --n_folds: the test fold; the next one validates", "train")
    first_study_only: bool = option(
        False, "only the first row of each patient", "train", action="store_true"
    )
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
    videos: str = option("", "folder of a study's videos or of studies, to start from", "predict")
    embed_file: str = option(
        "", "file to write [embeddings_<dataset>_<task>.h5 beside the model]", "embed"
    )
    explain_n: int = option(5, "top videos in the published table", "explain", least=1)
    explain_mode: str = option(
        "pred", "explain the prediction or its loss", "explain", choices=("pred", "loss")
    )
    explain_tasks: list = option([], "labels to explain [all]", "explain", nargs="+")
    explain_method: str = option(
        "adaptive",
        "quadrature: adaptive is Gauss-Legendre with nodes doubled until complete to 1 %%",
        "explain",
        choices=("adaptive", "gausslegendre", "riemann_right", "riemann_trapezoid"),
    )
    explain_steps: int = option(
        64, "integration steps (adaptive: to begin with)", "explain", least=1
    )
    dtype: str = option("float32", "of the packed numbers", "pack", choices=("float32", "float16"))
    studies: int = option(100, "phantom studies to make", "demo", least=1)


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


def derive_seed(*parts):
    """A 63-bit seed from anything printable: the same on every machine, no state kept."""
    text = "|".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


# ------------------------------------------------------------------------------------------ config


@dataclass
class Task:
    """What to learn: label names in order and how to read them."""

    task_labels: list[str]
    label_path: Path | None = None
    type: str = ""  # binary or regression; '' is decided by the values
    units: dict = field(default_factory=dict)  # label -> unit, for tables and figures
    boxcox: list | None = None  # labels made normal by Box-Cox; None: the published five
    valid_range: dict | None = None  # label -> [low, high]; None: the published two
    settings: dict = field(default_factory=dict)  # option -> value, for this task


@dataclass
class Dataset:
    """Where a cohort's clip embeddings lie, and its own label table if it has one."""

    embedding_path: Path
    label_path: Path | None = None


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


def read_config(path):
    """Read and check the JSON config; paths in it are relative to its folder. Raises UserError."""
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
        check_keys(entry, TASK_KEYS, where, ["task_labels"])
        check_settings_entry(entry.get("settings", {}), f"{where}, settings")
        if entry.get("type", "") not in ("", "binary", "regression"):
            raise UserError(f"{where}: type is binary or regression")
        labels = [str(label).strip() for label in entry["task_labels"]]
        if not labels or len(set(labels)) < len(labels):
            raise UserError(f"{where}: task_labels must name at least one label, and none twice")
        if {"pid", "eid"} & set(labels):
            raise UserError(f"{where}: pid and eid are ids and cannot be labels")
        for key in ("units", "boxcox", "valid_range"):
            for label in entry.get(key, ()):
                if label not in labels:
                    raise UserError(f"{where}, {key}: no label {label}{nearest(label, labels)}")
        for label, ends in entry.get("valid_range", {}).items():
            if not is_range(ends):
                raise UserError(f"{where}, valid_range of {label}: [low, high], null for no limit")
        tasks[name] = Task(**(located(entry) | {"task_labels": labels}))
    for name, entry in raw["dataset"].items():
        check_keys(entry, DATASET_KEYS, f"{path}, dataset {name}", ["embedding_path"])
        datasets[name] = Dataset(**located(entry))
    return Config(path, tasks, datasets)


def is_range(ends):
    numbers = isinstance(ends, list) and len(ends) == 2
    return numbers and all(x is None or type(x) in (int, float) for x in ends)


TASK_KEYS = {"task_labels": list, "label_path": str, "type": str, "units": dict, "boxcox": list}
TASK_KEYS |= {"valid_range": dict, "settings": dict}
DATASET_KEYS = {"embedding_path": str, "label_path": str}
JSON_NAMES = {list: "a list", str: "text", dict: "an object", int: "a number", float: "a number"}


def check_settings_entry(entry, where):
    """UserError for settings of a task that `train` has not, or of the wrong kind."""
    options = {f.name: f for f in options_of("train") if f.metadata["commands"] == ["train"]}
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


# ------------------------------------------------------------------------------------------ labels

PUBLISHED_BOXCOX = ("LD05", "LM12", "LS04", "LA34", "RA06")
PUBLISHED_RANGES = {"EF05": (0, None), "LM12": (0, None)}  # outside is a typing error: missing


def read_labels(path, task):
    """The label table: DataFrame indexed by study id (text), columns pid (text) and the labels.

    Values that are no numbers, out of range or, for a binary task, not 0 or 1 become missing and
    are counted on screen. Raises UserError for a missing file or column, and for a study whose
    rows contradict each other.
    """
    if path is None:
        raise UserError("no label table: set label_path of the task or the dataset in the config")
    try:
        raw = pd.read_csv(path, dtype=str, skipinitialspace=True, encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"no label table {path}") from error
    except (ValueError, pd.errors.ParserError) as error:
        raise UserError(f"{path} is not a CSV table: {error}") from error
    raw.columns = raw.columns.str.strip()
    if raw.columns.has_duplicates:
        twice = raw.columns[raw.columns.duplicated()][0]
        raise UserError(f"{path} has two columns '{twice}'")
    for column in ("pid", "eid", *task.task_labels):
        if column not in raw:
            raise UserError(
                f"{path} has no column '{column}'{nearest(column, raw.columns)} (a label table "
                "has pid, eid and one column a label)"
            )
    if lost := int(raw[["pid", "eid"]].isna().any(axis=1).sum()):
        print(f"{path}: {lost} rows have no pid or no eid and are left out")
    raw = raw[["pid", "eid", *task.task_labels]].dropna(subset=["pid", "eid"])
    for column in ("pid", "eid"):  # as text; a spreadsheet may have made 123 into 123.0
        raw[column] = raw[column].str.strip().str.replace(r"^(\d+)\.0$", r"\1", regex=True)
    raw = raw.drop_duplicates()
    twice = raw[raw["eid"].duplicated(keep=False)].sort_values("eid", kind="stable")
    if len(twice):
        lines = ", ".join(f"{e} (line {i + 2})" for i, e in twice["eid"].head(6).items())
        raise UserError(
            f"{path}: rows contradict each other for {twice['eid'].nunique()} studies: {lines}; "
            "keep one row a study"
        )
    table = raw.set_index("eid")
    for label in task.task_labels:
        table[label] = clean_values(table[label], label, task, path)
    return table


def clean_values(text, label, task, path):
    """One label's column of text -> float64 with NaN for what cannot be used, said on screen."""
    values = pd.to_numeric(text, errors="coerce").astype(float)
    values[np.isinf(values)] = np.nan
    if bad := int((values.isna() & text.notna()).sum()):
        print(f"{path}, {label}: {bad} values are no numbers and count as missing")
    if task.type == "binary":
        bad = values.notna() & ~values.isin([0, 1])
    else:
        ranges = PUBLISHED_RANGES if task.valid_range is None else task.valid_range
        low, high = ranges.get(label, (None, None))
        bad = (values < (-np.inf if low is None else low)) | (
            values > (np.inf if high is None else high)
        )
    if bad.any():
        allowed = "not 0 or 1" if task.type == "binary" else "out of range"
        print(f"{path}, {label}: {bad.sum()} values are {allowed} and count as missing")
    return values.mask(bad)


def decide_type(table, task):
    """'binary' when every value of every label is 0, 1 or missing, else 'regression'."""
    values = table[task.task_labels].to_numpy()
    return "binary" if np.isin(values[~np.isnan(values)], (0, 1)).all() else "regression"


def load_labels(config, task_name, dataset_name):
    """(task with its type decided, label table) of a dataset."""
    task, dataset = config.tasks[task_name], config.datasets[dataset_name]
    table = read_labels(dataset.label_path or task.label_path, task)
    if not task.type:
        task.type = decide_type(table, task)
        print(f"task {task_name} is {task.type}, by the values of its labels")
    return task, table


# ------------------------------------------------------------------------------------------ scaling


def fit_scaling(table, task, unlearnable=()):
    """The published `input_norm_dict` from training labels (DataFrame, physical units).

    Per label: shift = |mean| - min; Box-Cox of value + shift for some (Box and Cox, 1964, lambda
    by maximum likelihood); then the mean and standard deviation of that.
    """
    from scipy.stats import boxcox_normmax

    chosen = PUBLISHED_BOXCOX if task.boxcox is None else task.boxcox
    scaling = {"type": "boxcox"}
    for label in task.task_labels:
        y = table[label].dropna().to_numpy()
        if label in unlearnable:
            scaling[label] = {"shift": 0.0, "apply_boxcox": False, "mean": 0.0, "stdev": 1.0}
            continue
        entry = {"shift": float(abs(y.mean()) - y.min()), "apply_boxcox": label in chosen}
        z = y + entry["shift"]
        if entry["apply_boxcox"]:
            entry["lmbda"] = float(boxcox_normmax(z, method="mle"))
            z = boxcox(z, entry["lmbda"])
        scaling[label] = entry | {"mean": float(z.mean()), "stdev": float(z.std())}
    return scaling


def boxcox(x, lmbda):
    return np.log(x) if lmbda == 0 else (x**lmbda - 1) / lmbda


def scale(values, labels, scaling):
    """Physical units (S, T) -> normalised (S, T), a new array; NaN stays."""
    out = np.array(values, dtype=np.float64)
    for i, label in enumerate(labels):
        s = scaling[label]
        z = out[:, i] + s["shift"]
        if s["apply_boxcox"]:
            z = boxcox(np.maximum(z, 1e-6), s["lmbda"])  # unseen values may lie below the minimum
        out[:, i] = (z - s["mean"]) / s["stdev"]
    return out


def unscale(values, labels, scaling):
    """Normalised (S, T) -> physical units (S, T), a new array; the inverse of `scale`."""
    out = np.array(values, dtype=np.float64)
    for i, label in enumerate(labels):
        s = scaling[label]
        z = out[:, i] * s["stdev"] + s["mean"]
        if s["apply_boxcox"]:
            lmbda = s["lmbda"]
            z = np.exp(z) if lmbda == 0 else np.maximum(z * lmbda + 1, 1e-6) ** (1 / lmbda)
        out[:, i] = z - s["shift"]
    return out


# ------------------------------------------------------------------------------------------- splits


def fold_of(pid, seed, percent, n_folds=0, test_fold=0):
    """The fold of a patient: by a seeded hash of the id, so that new patients move nobody.

    With n_folds the patients fall into so many equal parts: part `test_fold` is the test fold,
    the next one validates, the others train.
    """
    share = derive_seed("split", seed, pid) / 2**63
    if n_folds:
        part = (int(share * n_folds) - test_fold) % n_folds
        return {0: "test", 1: "val"}.get(part, "train")
    position = share * sum(percent)
    for fold, edge in zip(FOLDS, np.cumsum(percent), strict=True):
        if position < edge:
            return fold
    return FOLDS[-1]


def parse_split(text):
    """'64,16,20' -> (64.0, 16.0, 20.0)."""
    try:
        percent = tuple(float(x) for x in text.split(","))
    except ValueError:
        percent = ()
    if len(percent) != 3 or min(percent) < 0 or sum(percent) <= 0:
        raise UserError(f"--split takes three percentages as in 64,16,20, not {text}")
    return percent


def split_patients(table, made):
    """Label table -> Series of study id to fold, by patient; `made`: seed, split, n_folds, fold."""
    rule = made["seed"], parse_split(made["split"]), made["n_folds"], made["fold"]
    folds = {pid: fold_of(pid, *rule) for pid in table["pid"].unique()}
    return table["pid"].map(folds).rename("fold")


def write_split(folder, table, folds, begun_from=None):
    """split.csv; patients that the model to start from was trained on are in it as 'seen'."""
    split = table[["pid"]].assign(fold=folds)
    before = read_split(begun_from.folder) if begun_from else None
    if before is not None:
        split = pd.concat([split, before[before["fold"] != "test"].assign(fold="seen")])
    with atomic_path(folder / "split.csv") as path:
        split.to_csv(path, index_label="eid")


def read_split(folder):
    """The model folder's split as DataFrame (index eid; pid, fold), or None: trained elsewhere."""
    path = folder / "split.csv"
    return pd.read_csv(path, dtype=str, index_col="eid") if path.is_file() else None


def refuse_moved(written, table):
    """UserError when a label table gives a study of a written split to another patient."""
    both = written.index.intersection(table.index)
    moved = both[written.loc[both, "pid"] != table.loc[both, "pid"]]
    if len(moved):
        raise UserError(
            f"the label table gives {len(moved)} studies to other patients than when the model was "
            f"trained ({', '.join(moved[:3])}): a training patient could turn up in the test fold"
        )


def folds_for(model, table, dataset):
    """Study id -> fold of a labelled dataset, as the model's own split says.

    On the training dataset every patient keeps the fold written at training, new patients get
    theirs by the same hash. Any other dataset is all test, less the patients the model has seen
    in training or validation.
    """
    written = read_split(model.folder)
    if written is None:
        print(f"{model.folder.name} has no split.csv: every study of {dataset} counts as test")
        return pd.Series("test", index=table.index)
    own = written[written["fold"] != "seen"]
    known = pd.concat([own, written]).drop_duplicates("pid").set_index("pid")["fold"]
    folds = table["pid"].map(known)
    if dataset == model.made_with.get("dataset"):
        refuse_moved(own, table)
        return folds.fillna(split_patients(table, model.made_with))
    seen = folds.notna() & (folds != "test")
    if seen.any():
        print(
            f"left out {seen.sum()} studies of {dataset}: the model was trained on their patients"
        )
    return folds.where(seen, "test")


# ---------------------------------------------------------------------------------- embedding store


class UnreadableStudy(Exception):
    """Why a study's embeddings cannot be used."""


@dataclass
class Bag:
    """A study's clip embeddings."""

    embeddings: np.ndarray  # (V, C, D) float32
    videos: list[str]  # (V,) names, no absolute paths


def open_store(path):
    """The clip embeddings of a dataset: what `pack` made of the folder, or the folder itself.

    A pack that lacks studies of the folder, or has others, is not used. Raises UserError.
    """
    packed = packed_path(path)
    if not (packed / "pack.json").is_file():
        return EmbeddingFolder(path)
    store = PackedEmbeddings(packed)
    if path.is_dir():
        folder = EmbeddingFolder(path)
        others = set(folder.files) != set(store.files) | set(store.unreadable)
        if others or is_stale(packed, folder):
            print(f"{packed.name} is out of date and not used: run pack again")
            return folder
    print(f"reading {packed.name}")
    return store


class EmbeddingFolder:
    """A folder of one HDF5 file a study, from embed/extract.py or the published scripts.

    Ours are <study>.hdf5; the published ones <study>_trim_embed.hdf5, their study id being the
    name up to the first '_'.
    """

    def __init__(self, path):
        if not path.is_dir():
            raise UserError(
                f"no folder of clip embeddings {path}; see embedding_path in the config"
            )
        names = [p for p in sorted(path.iterdir()) if p.suffix in (".hdf5", ".h5")]
        names = [p for p in names if not p.name.startswith(".")]
        if not names:
            raise UserError(f"{path} holds no .hdf5 file; make them with embed/extract.py")
        whole = any(map(is_ours, names[:20]))
        self.files = {}
        for file in names:
            published = file.stem.endswith("_trim_embed") or not whole
            eid = file.stem.split("_")[0] if published else file.stem
            if eid in self.files:
                raise UserError(f"{path}: {self.files[eid].name} and {file.name} are one study")
            self.files[eid] = file

    def read(self, eid, rng=None):
        """A study's Bag. Raises UnreadableStudy.

        rng: a numpy Generator that draws, each alike, the plain embeddings or one of the randomly
        transformed copies, if the file has any.
        """
        try:
            with h5py.File(self.files[eid], "r") as f:
                if "embeddings" in f:
                    copy = draw_copy(rng, len(f["augmented"]) if "augmented" in f else 0)
                    arrays = f["augmented"][copy - 1] if copy else f["embeddings"][:]
                    videos = f["videos"].asstr()[:].tolist()
                else:
                    arrays, videos = read_published(f)
        except (OSError, KeyError, RuntimeError, TypeError, AttributeError, ValueError) as error:
            raise UnreadableStudy(f"{self.files[eid].name}: {error}") from error
        if len(arrays) == 0:
            raise UnreadableStudy(f"{self.files[eid].name} holds no video")
        if len({np.shape(a) for a in arrays}) > 1 or np.ndim(arrays[0]) != 2:
            raise UnreadableStudy(f"{self.files[eid].name}: videos differ in shape")
        if np.shape(arrays[0])[1] != D or not np.shape(arrays[0])[0]:
            raise UnreadableStudy(
                f"{self.files[eid].name}: clips are {np.shape(arrays[0])}, expected (clips, {D})"
            )
        if len(videos) != len(arrays):
            raise UnreadableStudy(f"{self.files[eid].name}: videos and embeddings differ in number")
        try:
            bag = Bag(np.asarray(arrays, dtype=np.float32), videos)
        except ValueError as error:
            raise UnreadableStudy(f"{self.files[eid].name}: not numbers") from error
        if not np.isfinite(bag.embeddings).all():
            raise UnreadableStudy(f"{self.files[eid].name} holds NaN or infinite numbers")
        return bag

    def read_all(self, eid):
        """A study's plain Bag and its transformed copies, as a list of Bags."""
        first = self.read(eid)
        with h5py.File(self.files[eid], "r") as f:
            copies = f["augmented"][:] if "augmented" in f else []
        return [first, *(Bag(copy, first.videos) for copy in copies)]

    def encoder_digest(self):
        """The SHA-256 of the encoder weights, from the first file's attributes, or ''."""
        try:
            with h5py.File(next(iter(self.files.values())), "r") as f:
                return str(f.attrs.get("weights_sha256", ""))
        except OSError:
            return ""


def draw_copy(rng, copies):
    """0 for the plain embeddings, or the number of a transformed copy; always 0 without rng."""
    return int(rng.integers(copies + 1)) if rng is not None and copies else 0


def packed_path(folder):
    return folder.with_name(folder.name + ".packed")


def is_stale(packed, folder):
    """Whether a file of the folder was written after the pack was finished."""
    finished = (packed / "pack.json").stat().st_mtime_ns
    return any(file.stat().st_mtime_ns > finished for file in folder.files.values())


class PackedEmbeddings:
    """A dataset in one file, read through a memory map; see `cmd_pack` for its format."""

    def __init__(self, path):
        self.path = path
        about = json.loads((path / "pack.json").read_text())
        self.dtype, self.digest = np.dtype(about["dtype"]), about["weights_sha256"]
        self.files, self.unreadable = {}, {}
        for line in read_index(path):
            (self.unreadable if "reason" in line else self.files)[line["eid"]] = line
        self.map = np.memmap(path / "embeddings.bin", self.dtype, "r")

    def read(self, eid, rng=None):
        """As EmbeddingFolder.read; nothing is checked again, `pack` has done it."""
        line = self.files[eid]
        copies, V, C, D = line["shape"]
        at = line["offset"] // self.dtype.itemsize + draw_copy(rng, copies - 1) * V * C * D
        flat = np.array(self.map[at : at + V * C * D], dtype=np.float32)
        return Bag(flat.reshape(V, C, D), line["videos"])

    def encoder_digest(self):
        return self.digest


def read_index(path):
    """The lines of a pack's index.jsonl; a last line that a killed run left broken is dropped."""
    lines = []
    if (path / "index.jsonl").is_file():
        for text in (path / "index.jsonl").read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
    return lines


def cmd_pack(typed):
    """One memory-mappable file of a dataset's embeddings, <embedding_path>.packed/.

    embeddings.bin: study after study, each (1 + copies, V, C, 768) in float32 or float16;
    index.jsonl: a line a study with its eid, offset in bytes, shape, videos and CRC-32, or the
    reason why it could not be read; pack.json: written last, once all has been read back.
    """
    config = read_config(typed.get("config"))
    name = config.pick("dataset", typed.get("dataset"))
    dtype = np.dtype(typed.get("dtype", Settings.dtype))
    folder = EmbeddingFolder(config.datasets[name].embedding_path)
    path = packed_path(config.datasets[name].embedding_path)
    path.mkdir(exist_ok=True)
    about = {"dtype": dtype.name, "weights_sha256": folder.encoder_digest(), "version": __version__}
    if (path / "pack.json").is_file() and json.loads((path / "pack.json").read_text()) != about:
        raise UserError(f"{path} holds another pack (dtype or encoder); delete it to pack anew")
    if (path / "pack.json").is_file() and is_stale(path, folder):
        (path / "index.jsonl").unlink()  # studies have been made anew: begin again
    (path / "pack.json").unlink(missing_ok=True)
    try:
        append_studies(path, folder, dtype)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; the same command goes on") from error
    check_pack(path, dtype)
    with atomic_path(path / "pack.json") as temporary:
        temporary.write_text(json.dumps(about))
    lines = read_index(path)
    report_unreadable({line["eid"]: line["reason"] for line in lines if "reason" in line})
    size = (path / "embeddings.bin").stat().st_size
    print(f"packed {name}: {len(lines)} studies, {size / 1e9:.2f} GB in {path.name}")


def append_studies(path, folder, dtype):
    """Append the studies that the index does not have; a broken end is cut off first."""
    (path / "embeddings.bin").touch()
    there = (path / "embeddings.bin").stat().st_size
    lines = [x for x in read_index(path) if x["offset"] + x.get("bytes", 0) <= there]
    lines = [x for x in lines if x["eid"] in folder.files]
    end = max((x["offset"] + x["bytes"] for x in lines if "bytes" in x), default=0)
    with open(path / "index.jsonl", "w") as index, open(path / "embeddings.bin", "ab") as data:
        index.writelines(json.dumps(line) + "\n" for line in lines)
        data.truncate(end)
        todo = sorted(set(folder.files) - {line["eid"] for line in lines})
        for eid in progress(todo, desc="pack", unit="study"):
            line = {"eid": eid, "offset": end}
            try:
                bags = folder.read_all(eid)
                block = np.stack([bag.embeddings for bag in bags]).astype(dtype)
                if not np.isfinite(block).all():
                    raise UnreadableStudy(f"{eid} has numbers beyond {dtype.name}")
            except UnreadableStudy as error:
                line["reason"] = str(error)
            else:
                line |= {"shape": block.shape, "videos": bags[0].videos, "bytes": block.nbytes}
                line["crc32"] = zlib.crc32(block.tobytes())
                data.write(block.tobytes())
                data.flush()  # the data first: a line says that its block is there
                end += block.nbytes
            index.write(json.dumps(line) + "\n")
            index.flush()


def check_pack(path, dtype):
    """Read every block back and compare its CRC-32. Raises UserError."""
    data = np.memmap(path / "embeddings.bin", np.uint8, "r")
    for line in progress(read_index(path), desc="check", unit="study"):
        if "bytes" in line:
            block = data[line["offset"] : line["offset"] + line["bytes"]]
            if zlib.crc32(block) != line["crc32"]:
                raise UserError(f"{path}: study {line['eid']} reads back wrong; delete it, repack")


def is_ours(path):
    try:
        with h5py.File(path, "r") as f:
            return "embeddings" in f
    except OSError:
        return False


def read_published(f):
    """Every dataset 'emb' below an HDF5 file's root: list of (C, D) arrays, list of video names.

    The groups above it spell an absolute path of the site that made the file; only its last part
    is kept, or more of it where that is not enough to tell videos apart.
    """
    found = []
    f.visititems(lambda name, node: found.append(name) if is_embedding(name, node) else None)
    found.sort()
    paths = [name.split("/")[:-1] for name in found]
    keep = next(
        n
        for n in range(1, 100)
        if n > max(map(len, paths), default=0) or len({tuple(p[-n:]) for p in paths}) == len(paths)
    )
    return [f[name][:] for name in found], ["/".join(p[-keep:]) for p in paths]


def is_embedding(name, node):
    return isinstance(node, h5py.Dataset) and name.split("/")[-1] == "emb"


# ------------------------------------------------------------------------------------------ batches


@dataclass
class Batch:
    """Some studies' clips, one after the other: no padding."""

    eids: list[str]
    tokens: torch.Tensor  # (N, D)
    lengths: list[int]  # clips of each study; sums to N
    n_videos: list[int]


def read_batches(store, eids, settings, unreadable, train_seed=None):
    """Yield Batches of the studies in the order given, under the limits in `settings`.

    unreadable: dict that gets study id -> reason for what cannot be read; those are passed over.
    train_seed: for training, what draws (by study) a transformed copy of the videos, if there are
    any, and the clips that `settings.clip_dropout` leaves out; at least one clip stays.
    """
    batch, n = [], 0
    for eid in eids:
        rng = None
        if train_seed is not None:
            rng = np.random.default_rng(derive_seed("study", train_seed, eid))
        try:
            bag = store.read(eid, rng)
        except UnreadableStudy as error:
            unreadable[eid] = str(error)
            continue
        tokens = torch.from_numpy(bag.embeddings).flatten(0, 1)  # (V * C, D)
        if rng is not None and settings.clip_dropout:
            kept = np.flatnonzero(rng.random(len(tokens)) >= settings.clip_dropout)
            tokens = tokens[kept if len(kept) else rng.integers(len(tokens), size=1)]
        full = settings.batch_size and len(batch) == settings.batch_size
        if batch and (full or n + len(tokens) > settings.batch_tokens):
            yield collate(batch)
            batch, n = [], 0
        batch.append((eid, tokens, len(bag.videos)))
        n += len(tokens)
    if batch:
        yield collate(batch)


def collate(studies):
    eids, tokens, n_videos = zip(*studies, strict=True)
    return Batch(list(eids), torch.cat(tokens), [len(t) for t in tokens], list(n_videos))


# -------------------------------------------------------------------------------------------- model

D = 768  # numbers in a clip embedding
HEADS = 6
DROPOUT = 0.2


class StudyModel(nn.Module):
    """The set transformer: a study's clips, an unordered set, to its labels.

    standard: encoder over the clips, mean or max over them, linear head.
    query: a learned query token joins the clips, its output goes to the head.
    multiquery: one query a label, one shared head.
    Parameters are named as in the published checkpoints. Depth 0 is one attention layer.
    """

    def __init__(self, n_labels, kind="standard", depth=1, combine="avg"):
        super().__init__()
        self.kind, self.depth, self.combine = kind, depth, combine
        if kind == "query":
            self.query_token = nn.Parameter(torch.randn(1, 1, D) * 0.02)
        if kind == "multiquery":
            self.query_tokens = nn.Parameter(torch.randn(1, n_labels, D) * 0.02)
        if depth:
            layer = nn.TransformerEncoderLayer(D, HEADS, D, DROPOUT, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        else:
            self.encoder = nn.MultiheadAttention(D, HEADS, DROPOUT, batch_first=True)
        self.ff = nn.Linear(D, 1 if kind == "multiquery" else n_labels)

    @property
    def queries(self):
        """The learned query tokens (Q, D); none for the standard kind."""
        if self.kind == "standard":
            return None
        return (self.query_token if self.kind == "query" else self.query_tokens)[0]

    def forward(self, tokens, lengths):
        """tokens (N, D) of S studies, lengths (S) -> logits (S, T), study embeddings (S, D)."""
        S, queries = len(lengths), self.queries
        if queries is not None:  # each study's queries stand before its clips
            parts = [x for study in tokens.split(lengths) for x in (queries, study)]
            tokens, lengths = torch.cat(parts), [n + len(queries) for n in lengths]
        x = self.encode(tokens, lengths, 0 if queries is None else len(queries))
        if self.kind == "standard":
            pool = (lambda s: s.mean(0)) if self.combine == "avg" else (lambda s: s.amax(0))
            pooled = torch.stack([pool(study) for study in x.split(lengths)])
            return self.ff(pooled), pooled
        x = x.view(S, len(queries), D)
        if self.kind == "query":
            return self.ff(x[:, 0]), x[:, 0]
        return self.ff(x).squeeze(-1), x.mean(1)

    def encode(self, x, lengths, n_queries):
        """All tokens through the encoder; with queries only theirs come out: (S * Q, D)."""
        if not self.depth:
            return attend(self.encoder, x, lengths, n_queries)
        for i, layer in enumerate(self.encoder.layers):
            last = i == self.depth - 1
            x = encoder_layer(layer, x, lengths, n_queries if last else 0)
        return x


def encoder_layer(layer, x, lengths, n_queries=0):
    """torch's post-norm TransformerEncoderLayer over packed studies, x (N, D).

    With n_queries only the first so many tokens of each study are computed: the others serve as
    keys and values alone. Same numbers, a fraction of the work.
    """
    attended = attend(layer.self_attn, x, lengths, n_queries)
    if n_queries:
        x = torch.cat([study[:n_queries] for study in x.split(lengths)])
    x = layer.norm1(x + layer.dropout1(attended))
    hidden = layer.dropout(F.relu(layer.linear1(x)))
    return layer.norm2(x + layer.dropout2(layer.linear2(hidden)))


def attend(mha, x, lengths, n_queries=0):
    """Self-attention within each study of x (N, D); the weights are a MultiheadAttention's.

    Returns (N, D), or with n_queries only the first so many tokens of each study.
    """
    if n_queries:
        wq, wkv = mha.in_proj_weight.split([D, 2 * D])
        bq, bkv = mha.in_proj_bias.split([D, 2 * D])
        first = torch.cat([study[:n_queries] for study in x.split(lengths)])
        q, q_lengths = F.linear(first, wq, bq), [n_queries] * len(lengths)
        k, v = F.linear(x, wkv, bkv).chunk(2, dim=1)
    else:
        q, k, v = F.linear(x, mha.in_proj_weight, mha.in_proj_bias).chunk(3, dim=1)
        q_lengths = lengths
    dropout = mha.dropout if mha.training else 0.0
    if len(set(lengths)) == 1:  # equal lengths run as one batch
        q, k, v = (t.view(len(lengths), -1, HEADS, D // HEADS).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        out = out.transpose(1, 2).reshape(-1, D)
    else:
        out = []
        studies = zip(q.split(q_lengths), k.split(lengths), v.split(lengths), strict=True)
        for qkv in studies:
            heads = (t.view(1, -1, HEADS, D // HEADS).transpose(1, 2) for t in qkv)
            y = F.scaled_dot_product_attention(*heads, dropout_p=dropout)
            out.append(y.transpose(1, 2).reshape(-1, D))
        out = torch.cat(out)
    return mha.out_proj(out)


def study_losses(logits, targets, task_type):
    """Loss of each study (S,): the mean over its labels that are not missing (NaN); 0 if all are.

    Binary: cross-entropy with logits. Regression: squared error of normalised labels.
    """
    known = ~targets.isnan()
    filled = targets.nan_to_num()
    if task_type == "binary":
        each = F.binary_cross_entropy_with_logits(logits, filled, reduction="none")
    else:
        each = F.mse_loss(logits, filled, reduction="none")
    return (each * known).sum(1) / known.sum(1).clamp(min=1)


# -------------------------------------------------------------------------------------- checkpoints


@dataclass
class LoadedModel:
    """A model folder's checkpoint, ready to predict."""

    folder: Path
    net: StudyModel
    task: str
    labels: list[str]  # stripped, in output order
    type: str  # binary or regression
    scaling: dict | None  # the published input_norm_dict
    made_with: dict  # settings at training; {} for a published checkpoint
    units: dict

    def readable(self, logits):
        """Outputs (S, T) -> probabilities or physical units; NaN for labels never learnt."""
        values = readable(logits, self.labels, self.scaling)
        return np.where(np.isin(self.labels, self.made_with.get("unlearnt", [])), np.nan, values)


def readable(logits, labels, scaling):
    """Outputs (S, T) -> probabilities, or values in physical units where there is a scaling."""
    if scaling is None:
        return torch.sigmoid(torch.as_tensor(logits)).numpy()
    return unscale(logits, labels, scaling)


def safe_pickle_globals():
    """What a published checkpoint's pickle names beyond tensors: numpy arrays and scalars.

    numpy 1 spelt the module numpy.core. Nothing here can run code of the file.
    """
    import _codecs

    multiarray = np._core.multiarray
    allowed = [np.ndarray, np.dtype, np.dtypes.UInt32DType, np.dtypes.Float64DType]
    allowed += [np.dtypes.Float32DType, np.dtypes.Int64DType, (_codecs.encode, "_codecs.encode")]
    for name in ("_reconstruct", "scalar"):
        for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
            allowed.append((getattr(multiarray, name), f"{module}.{name}"))
    return allowed


def read_checkpoint(path):
    """The dict in a checkpoint file, read without running anything in it. Raises UserError."""
    try:
        with torch.serialization.safe_globals(safe_pickle_globals()):
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint {path}") from error
    except Exception as error:  # whatever a file that is no checkpoint makes the reader raise
        lines = [line for line in str(error).splitlines() if "GLOBAL" in line.upper()]
        detail = lines[0].strip() if lines else "damaged, or not a checkpoint at all"
        raise UserError(f"{path} cannot be read safely and was refused: {detail}") from error
    if not isinstance(saved, dict) or "model_state_dict" not in saved:
        raise UserError(f"{path} is not a checkpoint: it has no model_state_dict")
    return saved


def network_from(state, combine, path):
    """Build the StudyModel that a published state dict fits; its shape is read from the names."""
    if "ff.weight" not in state:
        raise UserError(f"{path} is not an EchoFocus model: no ff.weight in its state dict")
    layers = {k.split(".")[2] for k in state if k.startswith("encoder.layers.")}
    kind, n_labels = "standard", len(state["ff.weight"])
    if "query_token" in state:
        kind = "query"
    elif "query_tokens" in state:
        kind, n_labels = "multiquery", state["query_tokens"].shape[1]
    net = StudyModel(n_labels, kind, len(layers), combine)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit: {' '.join(str(error).split())[:300]}") from error
    return net, n_labels


def load_model(folder, config, task="", which="best", device="cpu"):
    """Load a model folder's checkpoint, published or our own. Raises UserError.

    A published checkpoint does not say its labels: they are the config's task of that name, or
    of that many labels, and the count must agree.
    """
    path = folder / f"{which}_checkpoint.pt"
    saved = read_checkpoint(path)
    made_with = saved.get("echofocus", {})
    combine = made_with.get("tf_combine", "avg")  # the released models ignore their tf_combine
    net, n_labels = network_from(saved["model_state_dict"], combine, path)
    scaling = saved.get("input_norm_dict") or None
    if made_with:
        try:
            task, labels, units = (made_with[k] for k in ("task", "labels", "units"))
        except KeyError as error:
            raise UserError(f"{path} lacks {error} in its 'echofocus' entry") from error
    else:
        names = [task] if task else list(config.tasks)
        fits = [n for n in names if len(config.tasks[n].task_labels) == n_labels]
        if not fits:
            raise UserError(
                f"{path} has {n_labels} outputs and {config.path} has no task"
                f"{' ' + task if task else ''} with so many labels; add it, in output order"
            )
        task, labels, units = (
            fits[0],
            config.tasks[fits[0]].task_labels,
            config.tasks[fits[0]].units,
        )
        print(f"labels of {folder.name}: task {task} of {config.path.name} ({n_labels})")
    if scaling:
        scaling = {k.strip(): v for k, v in scaling.items()}
        if missing := [label for label in labels if label not in scaling]:
            raise UserError(f"{path} has no scaling for label {missing[0]}")
    kind = made_with.get("type") or ("regression" if scaling else "binary")
    net.to(device).eval().requires_grad_(False)
    return LoadedModel(folder, net, task, list(labels), kind, scaling, made_with, units)


def model_folder(name, run_id=""):
    """`--model_name` (and `--run_id`) -> folder: a path as it is, a name in ./trained_models."""
    name += f"_{run_id}" if run_id else ""
    return Path(name) if os.sep in name else MODELS / name


def find_model_folder(name, run_id="", task=""):
    """The folder of a trained model; without a name the newest in ./trained_models (of a task)."""
    if name:
        folder = model_folder(name, run_id)
        if not (folder / "best_checkpoint.pt").is_file():
            known = [p.parent.name for p in MODELS.glob("*/best_checkpoint.pt")]
            raise UserError(
                f"no trained model {folder}{nearest(name, known)}; train it, or unpack a released "
                "one there (best_checkpoint.pt)"
            )
        return folder
    found = sorted(MODELS.glob("*/best_checkpoint.pt"), key=lambda p: p.stat().st_mtime)
    if task:
        found = [p for p in found if read_checkpoint(p).get("echofocus", {}).get("task") == task]
    if not found:
        raise UserError(
            f"no trained model{' of task ' + task if task else ''} in ./{MODELS}; train one first, "
            "or name one with --model_name"
        )
    print(f"using model_name = {found[-1].parent.name} (the newest in ./{MODELS})")
    return found[-1].parent


# ----------------------------------------------------------------------------------------- the loop


@dataclass
class Outcome:
    """What the loop found: rows in the order in which studies were read."""

    eids: list[str]
    logits: np.ndarray  # (S, T) float32
    embeddings: np.ndarray  # (S, D) float32
    losses: np.ndarray  # (S,) float32; empty without targets
    n_videos: list[int]
    n_clips: list[int]

    def __len__(self):
        return len(self.eids)


def run_studies(
    net, store, eids, settings, *, targets=None, task_type="", optimizer=None, epoch=0,
    unreadable=None, label="",
):  # fmt: skip
    """The one loop: every study through the net once, in the order given.

    targets: dict of study id to normalised labels (T,), NaN where missing. With an optimiser the
    net is trained: a step after every `settings.batch_number` studies, on the mean of their
    losses. All randomness comes from (settings.seed, epoch, position), none is kept.
    """
    training = optimizer is not None
    unreadable = {} if unreadable is None else unreadable
    device = net.ff.weight.device
    step = settings.batch_number if training else len(eids) or 1
    train_seed = derive_seed(settings.seed, epoch) if training else None
    rows = []  # (eids, logits, embeddings, losses, n_videos, n_clips) of each batch
    net.train(training)
    with progress(total=len(eids), desc=label, unit="study", leave=False, disable=not label) as bar:
        for start in range(0, len(eids), step):
            chunk = eids[start : start + step]
            n_losses = 0
            for batch in read_batches(store, chunk, settings, unreadable, train_seed):
                torch.manual_seed(derive_seed("dropout", settings.seed, epoch, batch.eids[0]))
                autocast = torch.autocast(
                    device.type, torch.bfloat16, enabled=settings.precision == "bf16"
                )
                with torch.set_grad_enabled(training), autocast:
                    logits, embeddings = net(batch.tokens.to(device), batch.lengths)
                    logits = logits.float()
                    losses = torch.zeros(0)
                    if targets is not None:
                        wanted = torch.tensor(np.stack([targets[e] for e in batch.eids]))
                        losses = study_losses(logits, wanted.float().to(device), task_type)
                if training:
                    losses.sum().backward()
                n_losses += len(losses)
                found = (t.detach().float().cpu().numpy() for t in (logits, embeddings, losses))
                rows.append((batch.eids, *found, batch.n_videos, batch.lengths))
                bar.update(len(batch.eids))
            if training and n_losses:
                for p in net.parameters():
                    p.grad /= n_losses
                optimizer.step()
                optimizer.zero_grad()
    return gather(rows, net)


def gather(rows, net):
    if not rows:
        n_labels = net.ff.out_features
        return Outcome([], np.zeros((0, n_labels)), np.zeros((0, D)), np.zeros(0), [], [])
    eids, logits, embeddings, losses, n_videos, n_clips = zip(*rows, strict=True)
    return Outcome(
        list(chain(*eids)),
        np.concatenate(logits),
        np.concatenate(embeddings),
        np.concatenate(losses),
        list(chain(*n_videos)),
        list(chain(*n_clips)),
    )


def report_unreadable(unreadable):
    """List the studies that could not be read, on screen."""
    if unreadable:
        print(f"{len(unreadable)} studies left out, their embeddings cannot be read:")
        for eid, reason in unreadable.items():
            print(f"  {eid}: {reason}")


# ----------------------------------------------------------------------------------------- training


def cmd_train(typed):
    """Learn a task: best and last checkpoints, split, history and curves in the model's folder."""
    config = read_config(typed.get("config"))
    config.pick("task", typed.get("task"))
    settings = resolve_settings("train", typed, config)
    check_settings(settings)
    begun_from = None
    if settings.init_from:
        begun_from = load_model(find_model_folder(settings.init_from), config, settings.task)
        adopt_architecture(settings, begun_from.net, typed)
    task, table = load_labels(config, settings.task, settings.dataset)
    if settings.first_study_only:
        table = table.drop_duplicates("pid")
    store = open_store(config.datasets[settings.dataset].embedding_path)
    table = match_studies(table, store, task, settings.sample_limit)
    folder = model_folder(settings.model_name, settings.run_id)
    folds = split_patients(table, asdict(settings))
    if begun_from:
        folds = keep_apart(folds, table, begun_from)
    print_folds(table, folds, task)

    run = Training(folder, settings, task, store, table, folds, begun_from)
    run.begin()
    while not run.finished:
        run.one_epoch()
    print(
        f"best validation loss {run.best:.4f} after epoch {run.best_epoch} of {run.epoch}; the "
        f"model is {folder}"
    )
    report_unreadable(run.unreadable)


def adopt_architecture(settings, net, typed):
    """Take the architecture of the model to start from; UserError when another was typed."""
    own = dict(transformer_type=net.kind, encoder_depth=net.depth, tf_combine=net.combine)
    for name, value in own.items():
        if typed.get(name, value) != value:
            raise UserError(f"--init_from has {name} = {value}, not {typed[name]}")
        setattr(settings, name, value)


def keep_apart(folds, table, begun_from):
    """Folds without the val and test patients that the model to start from was trained on."""
    written = read_split(begun_from.folder)
    if written is None:
        return folds
    before = table["pid"].map(written.drop_duplicates("pid").set_index("pid")["fold"])
    lost = (before == "train") & (folds != "train") | (before == "val") & (folds == "test")
    if lost.any():
        print(f"left out {lost.sum()} studies of val and test: {begun_from.folder.name} knows them")
    return folds.mask(lost, "left out")


def unlearnable_labels(table, task):
    """Labels whose training values do not differ; says so, and which have few positives."""
    out = []
    for label in task.task_labels:
        y = table[label].dropna()
        if y.nunique() < 2:
            kind = f"always {y.iloc[0]:g}" if len(y) else "always missing"
            print(f"label {label} cannot be learnt: {kind} in the training fold; it stays blank")
            out.append(label)
        elif task.type == "binary" and min(y.sum(), len(y) - y.sum()) < 5:
            print(f"label {label}: few examples in the training fold, {y.sum():.0f} of {len(y)} +")
    if len(out) == len(task.task_labels):
        raise UserError("no label can be learnt: each has but one value in the training fold")
    return out


def check_settings(settings):
    """UserError for numbers that make no sense, before any work is done."""
    parse_split(settings.split)
    if settings.n_folds and not (settings.n_folds >= 3 and 0 <= settings.fold < settings.n_folds):
        raise UserError(
            f"--n_folds must be 3 or more and --fold below it, not {settings.n_folds} and "
            f"{settings.fold}"
        )
    if settings.clip_dropout >= 1:
        raise UserError(f"--clip_dropout must be below 1, not {settings.clip_dropout}")


def match_studies(table, store, task, limit):
    """The rows of the label table with embeddings and a label; says what is left out."""
    without = table.index.difference(list(store.files))
    unlabelled = len(set(store.files) - set(table.index))
    labelled = table[task.task_labels].notna().any(axis=1)
    found = table[labelled & table.index.isin(list(store.files))]
    print(
        f"{len(found)} studies of {found['pid'].nunique()} patients; {len(without)} labelled "
        f"studies have no embeddings, {unlabelled} with embeddings are not in the label table, "
        f"{(~labelled).sum()} have no label"
    )
    if not len(found):
        raise UserError(
            "no study is both labelled and embedded: do the eid column and the file names agree? "
            f"(eid: {', '.join(table.index[:3])}; files: {', '.join(list(store.files)[:3])})"
        )
    if limit:
        found = found.loc[sorted(found.index, key=lambda eid: derive_seed("limit", eid))[:limit]]
    return found.sort_index()


def print_folds(table, folds, task):
    """Studies, patients and prevalence of each fold."""
    for fold in FOLDS:
        part = table[folds == fold]
        text = f"  {fold:5} {len(part)} studies of {part['pid'].nunique()} patients"
        if task.type == "binary" and len(part):
            counts = [f"{label} {part[label].sum():.0f}" for label in task.task_labels]
            text += "; positive: " + ", ".join(counts)
        print(text)


def start_from(net, labels, begun_from):
    """Copy another model's weights; heads by label name, the rest of the heads stays fresh."""
    state, given = net.state_dict(), begun_from.net.state_dict()
    by_label = ["query_tokens"] if net.kind == "multiquery" else ["ff.weight", "ff.bias"]
    both = [label for label in labels if label in begun_from.labels]
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


class Training:
    """A run: its state is what the last checkpoint holds, so that it can go on from there."""

    def __init__(self, folder, settings, task, store, table, folds, begun_from=None):
        self.folder, self.settings, self.task, self.store = folder, settings, task, store
        self.table, self.folds, self.begun_from = table, folds, begun_from
        self.labels_sha256 = hashlib.sha256(table.to_csv().encode()).hexdigest()
        self.eids = {fold: list(table.index[folds == fold]) for fold in FOLDS}
        for fold in ("train", "val"):
            if not self.eids[fold]:
                raise UserError(f"no study falls into the {fold} fold; change --split or --seed")
        labels, training = task.task_labels, table[folds == "train"]
        self.unlearnt = unlearnable_labels(training, task)
        self.scaling = None
        values = table[labels].mask(folds.isna()).to_numpy()
        if task.type == "regression":
            self.scaling = fit_scaling(training, task, self.unlearnt)
            if begun_from and begun_from.scaling:  # so that its heads mean what they meant
                known = {k: v for k, v in begun_from.scaling.items() if k in labels}
                self.scaling |= known
            values = scale(values, labels, self.scaling)
        values = np.where(np.isin(labels, self.unlearnt), np.nan, values)
        self.targets = dict(zip(table.index, values, strict=True))
        torch.manual_seed(derive_seed("weights", settings.seed))
        self.net = StudyModel(
            len(labels), settings.transformer_type, settings.encoder_depth, settings.tf_combine
        ).to(pick_device(settings.device))
        if begun_from:
            start_from(self.net, labels, begun_from)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=settings.learning_rate, weight_decay=0.01
        )
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, patience=3, factor=0.5
        )
        self.history = []  # rows [epoch, train_loss, val_loss, lr, seconds]
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
        limit = self.settings.epoch_lim
        return self.epoch >= limit or self.stale >= self.settings.epoch_early_stop

    def portable_settings(self):
        """The settings for files that may be shared: names, no paths."""
        paths = {n: Path(getattr(self.settings, n)).name for n in ("config", "init_from")}
        return asdict(self.settings) | paths | {"model_name": self.folder.name}

    def begin(self):
        """Resume from the last checkpoint, or start: split and settings are written first."""
        path = self.folder / "last_checkpoint.pt"
        if path.is_file():
            self.resume(path)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_split(self.folder, self.table, self.folds, self.begun_from)
        with atomic_path(self.folder / "train_args.csv") as temporary:
            pd.DataFrame([self.portable_settings()]).to_csv(temporary, index=False)
        record = {
            "settings": self.portable_settings(),
            "labels": self.task.task_labels,
            "studies": {fold: len(eids) for fold, eids in self.eids.items()},
            "labels_sha256": self.labels_sha256,
            "encoder_sha256": self.store.encoder_digest(),
            "device": str(self.net.ff.weight.device),
            "versions": {"echofocus": __version__, "torch": torch.__version__}
            | {"numpy": np.__version__, "python": platform.python_version()},
        }
        with atomic_path(self.folder / "run.json") as temporary:
            temporary.write_text(json.dumps(record, indent=2))

    def resume(self, path):
        saved = read_checkpoint(path)
        before = saved.get("echofocus")
        if not before:
            raise UserError(f"{path} was not made by this program; use another --model_name")
        self.refuse_changes(before)
        self.net.load_state_dict(saved["model_state_dict"])
        self.optimizer.load_state_dict(saved["optimizer_state_dict"])
        self.scheduler.load_state_dict(saved["scheduler_state_dict"])
        if before["learning_rate"] != self.settings.learning_rate:
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.learning_rate
        self.history = [list(row) for row in saved["perf_log"]]
        print(f"resuming {self.folder} after epoch {self.epoch}")

    def refuse_changes(self, before):
        """What a resumed run may not change: its model, labels, and any patient's fold."""
        fixed = ("task", "dataset", "transformer_type", "encoder_depth", "tf_combine", "seed")
        now = self.portable_settings() | {"labels": self.task.task_labels}
        now |= {"type": self.task.type}
        for name in (*fixed, "labels", "type", "split", "n_folds", "fold", "init_from"):
            if before.get(name) != now[name]:
                raise UserError(
                    f"{self.folder} was trained with {name} = {before.get(name)}, not "
                    f"{now[name]}; use another --model_name or --run_id"
                )
        for name, value in self.portable_settings().items():
            if name in before and before[name] != value and name not in ("device", "config"):
                print(f"changed on resume: {name} = {value}, was {before[name]}")
        if before.get("labels_sha256") != self.labels_sha256:
            raise UserError(
                f"the label table has changed since {self.folder} was begun; use another "
                "--model_name or --run_id"
            )
        written = read_split(self.folder)
        if written is not None:
            written = written[written["fold"] != "seen"]
        kept = written["fold"].reindex(self.folds.index) if written is not None else None
        if kept is None or (kept != self.folds).any() or len(written) != len(self.folds):
            raise UserError(
                f"the studies or patients have changed since {self.folder} was begun; use another "
                "--model_name or --run_id"
            )

    def one_epoch(self):
        """Train on every study once, validate, write checkpoints, history and curves."""
        began, number = time.time(), self.epoch + 1
        rng = np.random.default_rng(derive_seed("order", self.settings.seed, number))
        order = [self.eids["train"][i] for i in rng.permutation(len(self.eids["train"]))]
        common = dict(targets=self.targets, task_type=self.task.type, unreadable=self.unreadable)
        train = run_studies(
            self.net, self.store, order, self.settings, optimizer=self.optimizer,
            epoch=number, label=f"epoch {number}", **common,
        )  # fmt: skip
        val = run_studies(self.net, self.store, self.eids["val"], self.settings, **common)
        if not len(train) or not len(val):
            report_unreadable(self.unreadable)
            raise UserError("no study of the training or validation fold can be read")
        rate = self.optimizer.param_groups[0]["lr"]
        row = [number, float(train.losses.mean()), float(val.losses.mean()), rate]
        self.history.append([*row, time.time() - began])
        self.scheduler.step(row[2])
        print(
            f"epoch {number}: train loss {row[1]:.4f}, validation loss {row[2]:.4f}, "
            f"{self.validation_metric(val)}, lr {rate:g}"
        )
        self.save()

    def validation_metric(self, val):
        """The mean over labels of AUROC or of the median absolute error, as text."""
        truth = self.table.loc[val.eids, self.task.task_labels].to_numpy()
        predicted = readable(val.logits, self.task.task_labels, self.scaling)
        name = "auroc" if self.task.type == "binary" else "median_absolute_error"
        found = [
            label_metrics(truth[:, i], predicted[:, i], self.task.type)[name]
            for i, label in enumerate(self.task.task_labels)
            if label not in self.unlearnt
        ]
        found = [x for x in found if not np.isnan(x)]
        text = f"{np.mean(found):.3f}" if found else "not defined"
        return f"{'mean ' if len(found) > 1 else ''}{name.replace('_', ' ')} {text}"

    def save(self):
        """Checkpoints (best first: last says that the epoch is done), history and curves."""
        state = {
            "model_state_dict": self.net.state_dict(),
            "perf_log": self.history,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.scheduler.state_dict(),
            "input_norm_dict": self.scaling,
            "numpy_random_state": None,  # every draw is derived from the seed and the epoch
            "torch_random_state": None,
            "cuda_random_state": None,
            "echofocus": self.portable_settings()
            | {
                "version": __version__,
                "labels_sha256": self.labels_sha256,
                "labels": self.task.task_labels,
                "type": self.task.type,
                "units": self.task.units,
                "encoder_sha256": self.store.encoder_digest(),
                "unlearnt": self.unlearnt,
            },
        }
        names = ["best", "last"] if self.stale == 0 else ["last"]
        for name in names:
            with atomic_path(self.folder / f"{name}_checkpoint.pt") as temporary:
                torch.save(state, temporary)
        columns = ["epochs_trained", "train_loss", "val_loss", "lr", "epoch_time"]
        history = pd.DataFrame(self.history, columns=columns)
        with atomic_path(self.folder / "train_losses.csv") as temporary:
            history.to_csv(temporary, index=False)
        if time.time() - self.plotted > 10 or self.finished:
            plot_history(history, self.folder)
            self.plotted = time.time()


# ------------------------------------------------------------------------------------------ metrics


def label_metrics(y, p, kind):
    """Metrics of one label, NaN truths left out: dict; a metric that is not defined is NaN.

    Binary: p is a probability; area under the ROC curve, average precision (scikit-learn's).
    Regression: median and mean absolute error in the label's unit, R2.
    """
    from sklearn import metrics

    known = ~(np.isnan(y) | np.isnan(p))
    y, p = y[known], p[known]
    if kind == "binary":
        out = {"n": len(y), "n_positive": int(y.sum())}
        both = 0 < y.sum() < len(y)
        out["auroc"] = metrics.roc_auc_score(y, p) if both else np.nan
        out["average_precision"] = metrics.average_precision_score(y, p) if both else np.nan
        return out
    return {
        "n": len(y),
        "median_absolute_error": float(np.median(abs(y - p))) if len(y) else np.nan,
        "mean_absolute_error": float(np.mean(abs(y - p))) if len(y) else np.nan,
        "r2": metrics.r2_score(y, p) if len(y) > 1 else np.nan,
    }


# --------------------------------------------------------------------- evaluate, predict and embed


def start_with_model(command, typed):
    """What commands that use a model begin with: (settings, config, model)."""
    config = read_config(typed.get("config"))
    task = typed.get("task", "")
    if task:
        config.pick("task", task)
    folder = find_model_folder(typed.get("model_name", ""), typed.get("run_id", ""), task)
    model = load_model(folder, config, task, device=pick_device(typed.get("device", "")))
    return resolve_settings(command, typed, config, model), config, model


def warn_of_another_encoder(model, store):
    """Say so when embeddings come from other encoder weights than the model was trained on."""
    trained, given = model.made_with.get("encoder_sha256"), store.encoder_digest()
    if trained and given and trained != given:
        print(
            f"WARNING: {model.folder.name} was trained on embeddings of another encoder (weights "
            f"{trained[:12]}, these are {given[:12]}): its answers mean nothing here"
        )


def labelled_studies(model, config, settings, store):
    """The label table's rows (physical units) of the chosen fold that have embeddings."""
    task = config.tasks[config.pick("task", settings.task)]
    if task.task_labels != model.labels:
        raise UserError(
            f"task {settings.task} of {config.path} and {model.folder.name} differ in labels"
        )
    task.type = model.type
    task, table = load_labels(config, settings.task, settings.dataset)
    folds = folds_for(model, table, settings.dataset)
    table = match_studies(table, store, task, 0)
    wanted = FOLDS if settings.subset == "all" else [settings.subset]
    table = table[folds.reindex(table.index).isin(wanted)]
    if not len(table):
        raise UserError(f"no study of {settings.dataset} is in the fold {settings.subset}")
    return table[: settings.sample_limit or None]


def cmd_evaluate(typed):
    """Metrics per label, the table of predictions, and figures, on a fold of a labelled dataset."""
    settings, config, model = start_with_model("evaluate", typed)
    store = open_store(config.datasets[settings.dataset].embedding_path)
    warn_of_another_encoder(model, store)
    table = labelled_studies(model, config, settings, store)
    unreadable = {}
    found = run_studies(
        model.net, store, list(table.index), settings, unreadable=unreadable, label="evaluate"
    )
    report_unreadable(unreadable)
    if not len(found):
        raise UserError("no study could be read: nothing to evaluate")
    table = table.loc[found.eids]
    truth, predicted = table[model.labels].to_numpy(), model.readable(found.logits)

    columns = {"PID": table["pid"].to_numpy(), "Echo_ID": found.eids}
    rows = []
    for i, label in enumerate(model.labels):
        columns[f"{label}_Correct"] = truth[:, i]
        columns[f"{label}_Predict"] = predicted[:, i]
        metrics = label_metrics(truth[:, i], predicted[:, i], model.type)
        rows.append({"label": label, "unit": model.units.get(label, ""), **metrics})
    rows = pd.DataFrame(rows)
    name = f"{settings.subset}_{settings.dataset}"
    for file, frame in (
        (f"saveout_{name}.csv", pd.DataFrame(columns)),
        (f"metrics_{name}.csv", rows),
    ):
        with atomic_path(model.folder / file) as temporary:
            frame.to_csv(temporary, index=False)
    figure = plot_evaluation(model, truth, predicted, rows, name)
    print(rows.to_string(index=False, float_format="{:.3f}".format))
    print(f"wrote saveout_{name}.csv, metrics_{name}.csv and {figure} to {model.folder}")


def cmd_predict(typed):
    """One row a study: eid, n_videos, n_clips, then a column a label. No labels needed."""
    if typed.get("videos"):
        source = Path(typed["videos"])
        studies = extract.find_studies(source, typed["group"], typed["manifest"])
        dataset = source.resolve().name
        settings, config, model = start_with_model("predict", typed)
        key = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:8]
        folder = model.folder / f"clip_embeddings_{dataset}_{key}"  # another source, another folder
        summary = extract.extract(studies, folder, extract.settings_from(typed))
        summary.print()
        if not summary.written and not summary.finished:
            raise UserError(f"no study in {source} has a usable video")
        names = {s.name for s in studies}
    else:
        settings, config, model = start_with_model("predict", typed)
        dataset, names = settings.dataset, None
        folder = config.datasets[dataset].embedding_path
    store = open_store(folder)
    warn_of_another_encoder(model, store)
    eids = [e for e in store.files if names is None or e in names]
    eids = eids[: settings.sample_limit or None]
    unreadable = {}
    found = run_studies(model.net, store, eids, settings, unreadable=unreadable, label="predict")
    report_unreadable(unreadable)
    table = pd.DataFrame(
        {"eid": found.eids, "n_videos": found.n_videos, "n_clips": found.n_clips}
        | dict(zip(model.labels, model.readable(found.logits).T, strict=True))
    )
    path = Path(settings.out or model.folder / f"predictions_{dataset}.csv")
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)
    print(table.head(10).to_string(index=False, float_format="{:.3f}".format))
    print(f"wrote {len(table)} studies to {path}")
    if not len(found):
        raise UserError("no study could be read")


def cmd_embed(typed):
    """Study embeddings, one 768-vector a study, as an HDF5 file."""
    settings, config, model = start_with_model("embed", typed)
    store = open_store(config.datasets[settings.dataset].embedding_path)
    warn_of_another_encoder(model, store)
    eids = list(store.files)[: settings.sample_limit or None]
    unreadable = {}
    found = run_studies(model.net, store, eids, settings, unreadable=unreadable, label="embed")
    report_unreadable(unreadable)
    if not len(found):
        raise UserError("no study could be read")
    name = f"embeddings_{settings.dataset}_{settings.task}.h5"
    path = Path(settings.embed_file or model.folder / name)
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as f:
        for eid, embedding in zip(found.eids, found.embeddings, strict=True):
            f[eid] = embedding
        f.attrs["dataset"], f.attrs["task"] = settings.dataset, settings.task
        f.attrs["model_name"] = model.folder.name
    print(f"wrote {len(found)} study embeddings to {path}")


# ------------------------------------------------------------------------------------------ explain


def attribute(net, bag, objective, settings):
    """Integrated gradients of one output with respect to a study's clips, zero baseline.

    Sundararajan, Taly and Yan, "Axiomatic Attribution for Deep Networks", ICML 2017, by Captum.
    bag: (V, C, D); objective: logits (S, T) -> (S,). Returns attributions (V, C, D) and the
    convergence error: |sum of attributions - (f(bag) - f(0))|, as a share of the summed absolute
    scores of the videos.

    The integrand changes fastest near the baseline. Gauss-Legendre nodes crowd towards the ends;
    'adaptive' doubles them until the error is below 1 % (256 at most).
    """
    from captum.attr import IntegratedGradients

    x = torch.from_numpy(bag).to(net.ff.weight.device)[None]  # (1, V, C, D)
    n = x.shape[1] * x.shape[2]

    def forward(bags):
        logits, _ = net(bags.reshape(-1, D), [n] * len(bags))
        return objective(logits)

    with torch.no_grad():
        change = float(forward(x) - forward(torch.zeros_like(x)))
    adaptive = settings.explain_method == "adaptive"
    steps = settings.explain_steps
    while True:
        attributions = IntegratedGradients(forward).attribute(
            x,
            n_steps=steps,
            method="gausslegendre" if adaptive else settings.explain_method,
            internal_batch_size=max(1, settings.batch_tokens // n),
        )
        scores = attributions[0].double().sum((1, 2))  # (V,)
        error = abs(float(scores.sum()) - change) / max(float(scores.abs().sum()), 1e-9)
        if not adaptive or error < 0.01 or steps >= 256:
            return attributions[0].detach().float().cpu().numpy(), error
        steps *= 2


def objective_for(model, index, mode, target):
    """logits (S, T) -> (S,): the output of a label, or its loss towards a normalised target."""
    if mode == "pred":
        return lambda logits: logits[:, index]
    target = torch.tensor([[target]], dtype=torch.float32, device=model.net.ff.weight.device)
    return lambda logits: study_losses(
        logits[:, [index]], target.expand(len(logits), 1), model.type
    )


def explained_studies(model, config, settings, store):
    """Studies to explain, as a label table; without labels every study, its truths missing."""
    dataset = config.datasets[settings.dataset]
    task = config.tasks[config.pick("task", settings.task)]
    if dataset.label_path or task.label_path:
        return labelled_studies(model, config, settings, store)
    if settings.explain_mode == "loss":
        raise UserError("--explain_mode loss needs labels: set label_path in the config")
    print("no label table: every study of the dataset is explained")
    eids = list(store.files)[: settings.sample_limit or None]
    return pd.DataFrame(np.nan, index=eids, columns=model.labels).assign(pid="")


def cmd_explain(typed):
    """The contribution of every video to every answer, and the published table of the top n."""
    settings, config, model = start_with_model("explain", typed)
    store = open_store(config.datasets[settings.dataset].embedding_path)
    warn_of_another_encoder(model, store)
    wanted = settings.explain_tasks or model.labels
    for label in wanted:
        if label not in model.labels:
            raise UserError(
                f"no label {label} in {model.folder.name}{nearest(label, model.labels)}"
            )
    table = explained_studies(model, config, settings, store)
    targets = table[model.labels].to_numpy()
    if model.type == "regression":
        targets = scale(targets, model.labels, model.scaling)
    targets = dict(zip(table.index, targets, strict=True))

    videos, tops, unreadable = [], [], {}
    for eid in progress(table.index, desc="explain", unit="study"):
        try:
            bag = store.read(eid)
        except UnreadableStudy as error:
            unreadable[eid] = str(error)
            continue
        with torch.inference_mode():
            tokens = torch.from_numpy(bag.embeddings).flatten(0, 1).to(model.net.ff.weight.device)
            logits = model.net(tokens, [len(tokens)])[0].cpu().numpy()
        values = model.readable(logits)[0]
        for label in wanted:
            i = model.labels.index(label)
            target = targets[eid][i]
            if settings.explain_mode == "loss" and np.isnan(target):
                continue
            objective = objective_for(model, i, settings.explain_mode, target)
            scores, error = attribute(model.net, bag.embeddings, objective, settings)
            rows = video_rows(eid, label, values[i], bag.videos, scores, error)
            loss = study_losses(
                torch.tensor(logits[:, [i]]), torch.tensor([[target]]).float(), model.type
            )
            videos += rows
            tops.append(
                {"echo_id": eid, "measure": label, "y_true": table.loc[eid, label]}
                | {"y_pred": values[i], "loss": np.nan if np.isnan(target) else float(loss)}
                | top_columns(rows, settings.explain_n)
                | {"dataset": settings.dataset}
            )
    report_unreadable(unreadable)
    if not videos:
        raise UserError("nothing could be explained")
    mode = f"explain_n-{settings.explain_n}.mode-{settings.explain_mode}"
    top_name = f"explanation_{settings.subset}_{settings.dataset}.{mode}.csv"
    suffix = "" if settings.explain_mode == "pred" else f".mode-{settings.explain_mode}"
    video_name = f"explanation_{settings.dataset}{suffix}.csv"
    for name, frame in ((video_name, videos), (top_name, tops)):
        with atomic_path(model.folder / name) as temporary:
            pd.DataFrame(frame).to_csv(temporary, index=False)
        print(f"wrote {model.folder / name}")


def video_rows(eid, label, prediction, videos, scores, error):
    """One dict a video, best first: attributions (V, C, D) summed over clips and features."""
    signed, absolute = scores.sum((1, 2)), np.abs(scores).sum((1, 2))
    order = np.argsort(-absolute, kind="stable")
    return [
        {
            "eid": eid,
            "label": label,
            "prediction": prediction,
            "video": videos[v],
            "score": signed[v],
            "score_abs": absolute[v],
            "rank": rank,
            "convergence_error": error,
        }
        for rank, v in enumerate(order, start=1)
    ]


def top_columns(rows, n):
    """The first n of `video_rows` as columns; blank where a study has fewer videos."""
    columns = {}
    for k in range(n):
        row = rows[k] if k < len(rows) else {"video": "", "score_abs": np.nan}
        columns[f"top_video_{k + 1}"] = row["video"]
        columns[f"top_video_{k + 1}_score"] = row["score_abs"]
    return columns


# ------------------------------------------------------------------------------------------ figures


def new_figure(*args, **kwargs):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(*args, **kwargs)


def save_figure(figure, path):
    """As PDF and PNG."""
    import matplotlib.pyplot as plt

    for suffix in (".pdf", ".png"):
        with atomic_path(path.with_name(path.name + suffix)) as temporary:
            figure.savefig(temporary, dpi=120)
    plt.close(figure)


def plot_history(history, folder):
    """Losses over epochs: training_progress.pdf and .png."""
    figure, axis = new_figure(figsize=(6, 4), layout="constrained")
    axis.plot(history["epochs_trained"], history["train_loss"], label="training")
    axis.plot(history["epochs_trained"], history["val_loss"], label="validation")
    axis.set(xlabel="epoch", ylabel="loss")
    axis.legend()
    save_figure(figure, folder / "training_progress")


def plot_evaluation(model, truth, predicted, rows, name):
    """A panel a label: ROC curves, or predicted against measured; returns the PDF's name."""
    n = len(model.labels)
    columns = min(n, 4)
    figure, axes = new_figure(
        -(-n // columns), columns, figsize=(3.6 * columns, 3.4 * -(-n // columns)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[n:]:
        axis.axis("off")
    for i, (axis, label) in enumerate(zip(axes.flat, model.labels, strict=False)):
        known = ~np.isnan(truth[:, i] + predicted[:, i])
        y, p, row = truth[known, i], predicted[known, i], rows.iloc[i]
        if model.type == "binary":
            draw_roc(axis, y, p)
            axis.set_title(f"{label}: AUROC {row['auroc']:.2f} (n = {len(y)}, {y.sum():.0f} +)")
        else:
            unit = f" [{model.units[label]}]" if label in model.units else ""
            axis.scatter(y, p, s=10, alpha=0.6)
            if len(y):
                axis.axline((y.mean(), y.mean()), slope=1, color="grey", lw=0.8)
            axis.set(xlabel=f"measured{unit}", ylabel=f"predicted{unit}")
            axis.set_title(
                f"{label}: median error {row['median_absolute_error']:.3g}, n = {len(y)}"
            )
        axis.title.set_fontsize(9)
    file = f"{'roc_curves' if model.type == 'binary' else 'scatter_plots'}_{name}"
    save_figure(figure, model.folder / file)
    return file + ".pdf"


def draw_roc(axis, y, p):
    from sklearn.metrics import roc_curve

    axis.plot([0, 1], [0, 1], color="grey", lw=0.8)
    if 0 < y.sum() < len(y):
        false_positive, true_positive, _ = roc_curve(y, p)
        axis.plot(false_positive, true_positive)
    axis.set(xlabel="1 - specificity", ylabel="sensitivity", aspect="equal")


# --------------------------------------------------------------------------------------------- demo

DEMO_SETTINGS = {"label_path": "labels.csv", "settings": {"batch_number": 8, "epoch_lim": 30}}
DEMO_CONFIG = {
    "task": {
        "ef": {"task_labels": ["EF"], "units": {"EF": "%"}, "type": "regression"},
        "defect": {"task_labels": ["VSD"], "type": "binary"},
    },
    "dataset": {"phantoms": {"embedding_path": "embeddings"}},
}
DEMO_RATES = {"ef": 3e-4, "defect": 1e-4}


def cmd_demo(typed):
    """Phantoms and a real DICOM cine through the public commands, in ./demo, printing each."""
    folder, settings = Path("demo"), Settings(**typed)
    check_least(settings)
    weights = make_demo(folder, settings.studies)
    extraction = ["--weights", weights, "--size", "112", "--n_clips", "1"]
    for line in (
        ["embed/extract.py", "videos", "--out", "embeddings", *extraction],
        ["echofocus.py", "train", "--task", "ef"],
        ["echofocus.py", "train", "--task", "defect"],
        ["echofocus.py", "evaluate", "--task", "ef"],
        ["echofocus.py", "evaluate", "--task", "defect"],
        ["echofocus.py", "predict", "--task", "ef", "--videos", "real", *extraction],
        ["echofocus.py", "embed", "--task", "ef", "--dataset", "phantoms"],
        ["echofocus.py", "explain", "--task", "defect"],
    ):
        print(f"\n$ python ../{shlex.join(line)}", flush=True)
        program = Path(__file__).resolve().parent / line[0]
        if subprocess.run([sys.executable, program, *line[1:]], cwd=folder).returncode:
            raise UserError(f"the demo stopped: {shlex.join(line)} failed (see above)")
    summarise_demo(folder)


def make_demo(folder, studies):
    """Phantoms, a real cine, a config; returns the encoder weights to use, as typed."""
    import pydicom

    from embed import panecho, phantom, video

    print(f"making {studies} phantom studies in ./{folder}")
    bar = partial(progress, desc="phantoms", unit="study")
    phantom.make_cohort(folder, studies, progress=bar)
    real = folder / "real" / "sonosite"  # an echocardiogram that comes with pydicom
    real.mkdir(parents=True, exist_ok=True)
    shutil.copy(pydicom.examples.get_path("ybr_color"), real / "cine.dcm")
    for name, task in DEMO_CONFIG["task"].items():
        task.update(DEMO_SETTINGS)
        task["settings"] = task["settings"] | {"learning_rate": DEMO_RATES[name]}
    (folder / "config.json").write_text(json.dumps(DEMO_CONFIG, indent=2))
    if panecho.cached_weights().is_file():
        print("encoder weights: the released ones, from torch.hub's cache")
        return "panecho"
    print("encoder weights: RANDOM (the released ones are not in the cache); standardised on a few")
    clips = []
    for path in sorted(folder.glob("videos/*/*.avi"))[:24]:
        sampled, *_ = video.read_clips(path, path.name, video.Sampling(n_clips=1, size=112))
        frames = torch.from_numpy(sampled.frames[sampled.index[0]])
        clips.append(panecho.normalise(frames.permute(3, 0, 1, 2), torch.arange(3)[:, None]))
    panecho.save_untrained(folder / "untrained.pt", clips)
    return "untrained.pt"


def summarise_demo(folder):
    """What the demo measured, beside what guessing would give, and the files to look at."""
    models, ids = folder / MODELS, {"eid": str, "Echo_ID": str}
    split = pd.read_csv(models / "ef" / "split.csv", dtype=str).set_index("eid")["fold"]
    labels = pd.read_csv(folder / "labels.csv", dtype=ids).set_index("eid")
    guess = labels["EF"].reindex(split.index[split == "train"]).median()
    ef = pd.read_csv(models / "ef" / "saveout_test_phantoms.csv", dtype=ids)
    defect = pd.read_csv(models / "defect" / "saveout_test_phantoms.csv", dtype=ids)
    auroc = pd.read_csv(models / "defect" / "metrics_test_phantoms.csv")["auroc"][0]
    videos = pd.read_csv(models / "defect" / "explanation_phantoms.csv", dtype=ids)
    videos = videos.merge(pd.read_csv(folder / "findings.csv", dtype=ids), on=["eid", "video"])
    videos = videos[videos.groupby("eid")["shows_defect"].transform("max") == 1]
    top = videos[videos["rank"] == 1]["shows_defect"]
    plot_demo(ef, defect, videos, folder / "demo")
    print(
        f"\nEjection fraction, {len(ef)} test studies: median error "
        f"{(ef['EF_Predict'] - ef['EF_Correct']).abs().median():.1f} % (guessing the training "
        f"median: {(guess - ef['EF_Correct']).abs().median():.1f} %)"
        f"\nSeptal defect, {len(defect)} test studies: AUROC {auroc:.2f} (guessing: 0.5)"
        f"\nThe top video of a study with a defect shows it in {top.sum()} of {len(top)} studies "
        f"(a video taken blindly: {videos['shows_defect'].mean():.0%})"
        f"\n\nLook at, in {folder}:"
        "\n  demo.png                                                these results"
        "\n  trained_models/ef/scatter_plots_test_phantoms.png       predicted against true"
        "\n  trained_models/defect/explanation_phantoms.csv          every video in every answer"
        "\n  trained_models/ef/predictions_real.csv                  the real echocardiogram"
        "\n  trained_models/ef/embeddings_phantoms_ef.h5             one 768-vector a study"
    )


def plot_demo(ef, defect, videos, path):
    """Ejection fraction, defect ROC, and the scores of videos with and without the finding."""
    figure, (left, middle, right) = new_figure(1, 3, figsize=(11, 3.6), layout="constrained")
    left.axline((45, 45), slope=1, color="grey", lw=0.8)
    left.scatter(ef["EF_Correct"], ef["EF_Predict"], s=14)
    left.set(xlabel="true ejection fraction [%]", ylabel="predicted [%]")
    draw_roc(middle, defect["VSD_Correct"], defect["VSD_Predict"])
    middle.set_title("septal defect", fontsize=10)
    for k, (shown, colour) in enumerate(((1, "C3"), (0, "C0"))):
        part = videos[videos["shows_defect"] == shown]
        spread = np.linspace(-0.2, 0.2, len(part))
        right.scatter(k + spread, part["score"], s=14, color=colour)
    right.axhline(0, color="grey", lw=0.8)
    right.set_xticks([0, 1], ["videos that show\nthe defect", "other videos\nof these studies"])
    right.set(ylabel="score (change in log-odds)", xlim=(-0.6, 1.6))
    save_figure(figure, path)


# ------------------------------------------------------------------------------------- command line

COMMANDS = {
    "train": cmd_train,
    "evaluate": cmd_evaluate,
    "predict": cmd_predict,
    "embed": cmd_embed,
    "explain": cmd_explain,
    "pack": cmd_pack,
    "demo": cmd_demo,
}


def build_parser():
    parser = Parser(prog="echofocus.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, function in COMMANDS.items():
        summary = " ".join(function.__doc__.split("\n\n")[0].split())
        sub = commands.add_parser(command, help=summary, description=summary)
        for f in options_of(command):
            kind = {} if f.type in (list, bool) else {"type": f.type}
            given = "" if f.default in ("", MISSING, False) else f" [{f.default}]"
            if f.type is not bool and "choices" not in f.metadata["argparse"]:
                kind["metavar"] = f.name.upper()
            sub.add_argument(
                f"--{f.name}",
                default=SUPPRESS,  # what is not typed is decided in resolve_settings
                help=f.metadata["help"] + given,
                **kind,
                **f.metadata["argparse"],
            )
        if command == "predict":
            extract.add_options(sub)
    return parser


def main(argv=None):
    typed = vars(build_parser().parse_args(argv))
    COMMANDS[typed.pop("command")](typed)


if __name__ == "__main__":
    run_main(main, "echofocus.py")
