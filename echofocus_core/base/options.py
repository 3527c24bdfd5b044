"""Options: each declared once, with its default, bounds, group in --help, commands and properties.

`validate_as` checks options, the config and the record of a checkpoint with pydantic, and reports
each fault on one line, with its place.
"""

import json
import re
from argparse import SUPPRESS
from ast import literal_eval
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from echofocus_core.base.console import (
    Joined,
    Switch,
    UsageError,
    UserError,
    nearest,
    printable,
)

FOLDS = ("train", "val", "test")
SEEDS = 2**63  # seeds are below, so that they fit into an attribute of a file
MOST_LABELS, MOST_LAYERS = 10_000, 100  # a file that claims more is damaged


class Entry(BaseModel):
    """A model that refuses unknown keys and takes no text for a number."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


# ------------------------------------------------------------------------------------------- values


def names_in(value):
    """['train,val'], ["('train', 'val')"] or ['train', 'val'] -> ['train', 'val']."""
    names = []
    for word in value if isinstance(value, list) else [value]:
        try:
            parsed = literal_eval(word) if str(word)[:1] in "([" else word
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            parsed = word
        names += parsed if isinstance(parsed, list | tuple) else [parsed]
    return names


def times_in(value):
    """['1,5'], '1 5' or [1, 5] -> [1.0, 5.0]: rising times above 0."""
    words = value if isinstance(value, list) else [value]
    try:
        times = [float(x) for word in words for x in str(word).replace(",", " ").split()]
    except ValueError:
        times = [0]
    if times != sorted(set(times)) or not all(0 < x < float("inf") for x in times):
        raise ValueError(f"expected rising times above 0, as in 1,5, not {shown(value)}")
    return times


def folds_in(value):
    return [x.strip() for w in names_in(value) for x in (w.split(",") if isinstance(w, str) else w)]


ALL_FOLDS = -1


def fold_in(value):
    """'all' -> ALL_FOLDS; a number is unchanged."""
    text = str(value)
    if text == "all":
        return ALL_FOLDS
    return int(text) if isinstance(value, str) and text.isdecimal() else value


def labels_in(value):
    """Label names, see `names_in`; [] for 'all'."""
    words = names_in(value)
    return [] if words == ["all"] else words


def percentages(value):
    """'(64, 16, 20)' or [64, 16, 20] -> '64,16,20'."""
    try:
        words = value.strip("()[] ").split(",") if isinstance(value, str) else list(value)
        numbers = [float(x) for x in words]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 3 or not min(numbers) >= 0 or not abs(sum(numbers) - 100) < 0.2:
        raise ValueError(f"needs three percentages that sum to 100, not {shown(value)}")
    return ",".join(f"{x:.15g}" for x in numbers)


def parse_split(text):
    """'64,16,20' -> (64.0, 16.0, 20.0); for a text of `percentages`."""
    return tuple(map(float, text.split(",")))


def plain_name(name):
    """Refuse a name that would be outside its folder or hidden in it."""
    if not re.fullmatch(r"\w[\w .+-]{0,99}", name):
        raise ValueError(f"{ascii(name)[:60]} is not a name; use letters, digits, . - + and _")
    return name


def readable_text(text):
    if not text.strip() or not text.isprintable():
        raise ValueError(f"{ascii(text)[:60]} is empty or has a character that cannot be printed")
    return text


def usable_path(path):
    if not str(path).isprintable() or path == Path():
        raise ValueError("a path is text that is not empty and can be printed")
    return path


def limit_or_none(value):
    if value != -1 and value < 1:
        raise ValueError(f"expected 1 or more, or -1 for no limit, not {value}")
    return value


Text = Annotated[str, AfterValidator(readable_text)]
Name = Annotated[str, AfterValidator(plain_name)]
Names = Annotated[list[str], BeforeValidator(names_in)]
Location = Annotated[Path, Field(strict=False), AfterValidator(usable_path)]


# ------------------------------------------------------------------------------------------ options

OnResume = Literal["fixed", "reported", "unrecorded"]


@dataclass(frozen=True)
class Group:
    """A group of options in --help."""

    title: str
    in_config: bool = True  # whether a task or dataset of the config may set its options
    needs_videos: bool = False  # whether its options affect only videos
    on_resume: OnResume = "reported"  # see `option`
    moves_folds: bool = False  # whether another value puts other patients into the validation fold


WHAT = Group("task and data", in_config=False, on_resume="unrecorded")
FILES = Group("files", in_config=False, on_resume="unrecorded")
SPLIT = Group("data", on_resume="fixed", moves_folds=True)
CHOICE = Group("data", in_config=False)  # of a command line, not of a task
DATA, COMPUTING, MODEL = Group("data"), Group("computing"), Group("model", on_resume="fixed")
TRAINING, EXPLAINING, OUTPUT = Group("training"), Group("explanation"), Group("output")
MESSAGES = Group("messages", in_config=False, on_resume="unrecorded")
EXTRACTION = Group("extraction", needs_videos=True, on_resume="unrecorded")
VIEWS = Group("views", in_config=False, needs_videos=True, on_resume="unrecorded")
END_TO_END = Group("training through the encoder", needs_videos=True, on_resume="fixed")

WITH_MODEL = "evaluate predict embed explain"
ALL = f"train check {WITH_MODEL}"
EXTRACTS = f"extract {WITH_MODEL} check"
READS_VIDEOS = f"{EXTRACTS} train"
EVERY = f"{ALL} compare extract train_encoder pack download inspect init"


def option(
    default,
    help,
    group,
    commands,
    least=None,
    below=None,
    also="",
    on_resume: OnResume | None = None,
    moves_folds=None,
    common="",
    **argparse_options,
):
    """Declare an option: default, meaning, group in --help, commands, bounds and synonyms.

    common: the commands whose --help shows it; --help_all shows every option.

    on_resume: whether a resumed training refuses another value ("fixed"), or uses and reports it
    ("reported"); "unrecorded" options do not affect the weights and are not saved.
    on_resume, moves_folds: None for the value of the group.
    """
    meta = {
        "group": group,
        "commands": commands.split(),
        "common": common.split(),
        "also": also.split(),
        "on_resume": on_resume or group.on_resume,
        "moves_folds": group.moves_folds if moves_folds is None else moves_folds,
        "argparse": argparse_options,
    }
    return Field(default=default, description=help, ge=least, lt=below, json_schema_extra=meta)


Aggregators = Literal["standard", "query", "multiquery", "mean", "mlp", "attentive", "abmil"]


# fmt: off
class MessageOptions(Entry):
    """What a run prints, see `base.log`."""

    quiet: bool = option(False, "print only warnings and errors", MESSAGES, EVERY)
    verbose: bool = option(
        False, "also print the time of each message, passed checks, and where an error occurred",
        MESSAGES, EVERY
    )
    log: str = option(
        "", "append all messages to this file, with their time; as JSON lines if it ends in .jsonl",
        MESSAGES, EVERY, metavar="FILE"
    )


class CohortOptions(MessageOptions):
    """The labelled videos for training the encoder; `check` reads them too."""

    cohort: Literal["", "hospital", "echonetdynamic", "echonetpediatric"] = option(
        "", "layout of the encoder's training data", WHAT, "train_encoder check",
        common="train_encoder"
    )
    data_dir: str = option(
        "", "folder of the cohort [data/<cohort>]", WHAT, "train_encoder check",
        common="train_encoder", metavar="FOLDER"
    )
    tasks: Names = option(
        [], "PanEcho tasks to learn, or a JSON file of tasks [EF; hospital: every task in the "
        "tables]", WHAT, "train_encoder check", common="train_encoder", metavar="TASK"
    )


class Settings(CohortOptions):
    """Every option. Empty texts and lists are filled from the config and the model, and printed."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, values):
        return one_name(values) if isinstance(values, dict) else values

    config: str = option(
        "", "file of tasks and datasets [config.json, else config-example.json]", WHAT,
        f"{ALL} pack inspect init", common="init", metavar="FILE"
    )
    model_name: str = option(
        "", "folder in ./trained_models, or a path [train: the task's name; others: the only model]"
        "; the answers of several models are averaged", WHAT, f"{ALL} download inspect", nargs="+",
        action=Joined, common="train check evaluate predict embed explain download", metavar="NAME"
    )
    run_id: str = option(
        "", "suffix of the model's name, to separate runs", WHAT, ALL, metavar="SUFFIX"
    )
    task: str = option(
        "", "task in the config [the model's, else the first]", WHAT, ALL, moves_folds=True,
        common="train check compare", metavar="NAME"
    )
    dataset: str = option(
        "", "dataset in the config [the model's, else the first]", WHAT, f"{ALL} pack",
        moves_folds=True,
        common="train check compare evaluate predict embed explain pack", metavar="NAME"
    )
    datasets: Names = option(
        [], "several datasets, instead of --dataset", WHAT, "embed", common="embed", metavar="NAME"
    )
    embedding_path: str = option(
        "", "folder of clip embeddings, instead of the dataset's", WHAT, f"{ALL} pack",
        common="pack", metavar="FOLDER"
    )
    label_path: str = option("", "label table, instead of the dataset's", WHAT, ALL, metavar="FILE")
    path_pattern: str = option(
        "", "regular expression with (?P<pid>...) and (?P<eid>...) that finds the patient and the "
        "study in the paths of label lists, instead of the dataset's", WHAT, ALL, metavar="PATTERN"
    )
    videos: str = option(
        "", "folder of a study's videos, or of studies", WHAT, f"{WITH_MODEL} check train",
        common="check predict embed explain", metavar="FOLDER"
    )
    keep: str = option(
        "", "folder for the clip embeddings of --videos [./clip_embeddings]", WHAT, WITH_MODEL,
        metavar="FOLDER"
    )
    eids: Names = option(
        [], "studies to explain, in any fold", WHAT, "explain", common="explain", metavar="STUDY"
    )
    source: str = option(
        "", "a released model, or a URL, zip, folder or .pt file (inspect: a model)",
        WHAT, "download inspect", nargs="?", common="download inspect", metavar="SOURCE"
    )
    list_: bool = option(False, "list the released models", WHAT, "download", common="download")
    sha256: Annotated[str, Field(pattern="^([0-9a-fA-F]{64})?$")] = option(
        "", "expected SHA-256 of the file", WHAT, "download", common="download", metavar="DIGEST"
    )
    studies: int = option(80, "number of phantom studies", WHAT, "demo", least=22, common="demo")

    subset: Literal[(*FOLDS, "all")] = option(
        "test", "the fold to use", CHOICE, "evaluate explain", common="evaluate explain"
    )
    folds: Annotated[list[Literal[(*FOLDS, "all")]], BeforeValidator(folds_in)] = option(
        [], "several folds, instead of --subset", CHOICE, "evaluate", metavar="FOLD"
    )
    sample_limit: int = option(
        0, "use at most this many studies, chosen by a hash of their ids (check: reads the "
        "numbers of these); 0: all", DATA, ALL,
        least=0, moves_folds=True, common="check explain"
    )
    max_videos_per_study: int = option(
        0, "at most this many videos of a study, chosen at random (in training each epoch); 0: all",
        DATA, ALL, least=0
    )
    split: Annotated[str, BeforeValidator(percentages)] = option(
        "64,16,20", "percentages of patients for training, validation and test", SPLIT, "train",
        metavar="TRAIN,VAL,TEST"
    )
    seed: int = option(
        0, "seed of the split, the study order and dropout; evaluate: of the bootstrap", SPLIT,
        "train evaluate", least=-SEEDS, below=SEEDS
    )
    n_folds: int = option(
        0, "folds of a cross-validation, instead of --split; 0: none", SPLIT, "train",
        common="train"
    )
    fold: Annotated[int, BeforeValidator(fold_in)] = option(
        0, "test fold of --n_folds; the next fold is for validation. 'all': train a model for each "
        "fold, in <model>/fold_<k>", SPLIT, "train", type=str, common="train", metavar="K"
    )
    stratify: str = option(
        "", "split patients by this label, so that each fold has its share of rare findings; "
        "patients added later join the test fold", SPLIT, "train", metavar="LABEL"
    )
    split_column: str = option(
        "", "column of the label table with train, val or test, instead of --split", DATA, "train",
        moves_folds=True, metavar="COLUMN"
    )
    first_study_only: bool = option(
        False, "only the first usable study of each patient, see --order_by", DATA,
        "train evaluate explain", moves_folds=True
    )
    order_by: str = option(
        "", "dates in the label table that order a patient's studies [its only column of dates]",
        DATA, "train evaluate explain", moves_folds=True, metavar="COLUMN"
    )
    assume_unseen: bool = option(
        False, "treat a dataset as unseen by the model and the encoder, if their training "
        "patients are not recorded or other patients have the same ids", DATA,
        "train evaluate explain", on_resume="unrecorded"
    )

    n_boot: int = option(
        1000, "resamples of patients for 95 % intervals; 0: no intervals", DATA, "evaluate compare",
        least=0, also="n_bootstrap", common="compare evaluate"
    )

    target: str = option(
        "", "threshold of a finding: youden, sensitivity=0.95 or specificity=0.95, chosen on the "
        "validation fold [youden; evaluate: the model's]", DATA, "train evaluate",
        common="evaluate", metavar="RULE"
    )
    prevalence: float | None = option(
        None, "also give PPV and NPV at this prevalence", DATA, "evaluate", least=0, below=1,
        metavar="SHARE"
    )
    years: Annotated[list[float], BeforeValidator(times_in)] = option(
        [], "survival: times of survival and AUROC, as in 1,5 [1,5, within the follow-up]", DATA,
        "predict evaluate", metavar="YEAR"
    )
    per: Literal["study", "patient"] = option(
        "study", "unit of analysis: studies, or patients with pooled studies", DATA, "evaluate",
        common="evaluate"
    )
    pool: Literal["mean", "first", "last"] = option(
        "mean", "for --per patient: mean of the predictions, or one study, see --order_by", DATA,
        "evaluate"
    )
    by: Names = option(
        [], "also evaluate groups: columns of the label table, numbers with edges as in age:40,65",
        DATA, "evaluate compare", common="compare evaluate", metavar="COLUMN"
    )
    compare: Names = option(
        [], "models or tables of predictions to compare with on the same studies", WHAT, "evaluate",
        common="evaluate", metavar="MODEL"
    )
    encoders: Names = option(
        [], "compare the embeddings of these encoders, as in panecho=emb/panecho, or "
        "both=emb/panecho,emb/echoprime joined [the dataset's]",
        WHAT, "compare", common="compare", metavar="NAME=FOLDER"
    )
    aggregators: list[Aggregators] = option(
        [], "aggregators to compare: standard, query, multiquery, mean, mlp, attentive, abmil "
        "[standard]", WHAT, "compare", common="compare", metavar="NAME"
    )
    fractions: Annotated[list[float], BeforeValidator(times_in)] = option(
        [], "learning curves: shares of the training patients, as in 0.01 0.1 1", WHAT, "compare",
        common="compare", metavar="SHARE"
    )
    perturbed: Names = option(
        [], "also evaluate on embeddings of changed images (embed/extract.py --perturb), as in "
        "panecho=emb/panecho_shadow", WHAT, "compare", metavar="NAME=FOLDER"
    )
    predictions: str = option(
        "", "table of predictions to evaluate instead of a model", WHAT, "evaluate",
        common="evaluate", metavar="FILE"
    )

    allow_mixed: bool = option(
        False, "train on embeddings of different encoders or settings", DATA, "train check",
        on_resume="unrecorded"
    )

    device: str = option(
        "", "cpu, cuda, cuda:1 [CUDA if available]", COMPUTING, f"{ALL} extract",
        on_resume="unrecorded", common="train check compare predict extract", metavar="DEVICE"
    )
    precision: Literal["fp32", "bf16"] = option(
        "fp32", "floating-point format of the computation", COMPUTING, f"{ALL} extract"
    )
    batch_tokens: int = option(
        4096, "clips per batch; a batch has at least one study", COMPUTING, ALL, least=1
    )
    batch_size: int = option(
        0, "studies per batch at most (see also --batch_number); 0: as --batch_tokens allows",
        COMPUTING, ALL, least=0
    )

    transformer_type: Aggregators = option(
        "standard", "aggregator: the published three, or a baseline: mean of the clips, mlp on the "
        "mean, attentive (one query), abmil (gated attention)", MODEL, "train"
    )
    encoder_depth: int = option(
        1, "transformer layers; 0 is one attention layer", MODEL, "train", least=0,
        below=MOST_LAYERS + 1
    )
    tf_combine: Literal["avg", "max"] = option("avg", "pooling over clips", MODEL, "train")
    train_fraction: float = option(
        1.0, "train on this share of the training patients", MODEL, "train", below=1.000001,
        metavar="SHARE"
    )
    video_sampling: Literal["all", "one"] = option(
        "all", "one: train on one random clip of a study, and average the outputs of its clips, as "
        "probes of single clips do", MODEL, "train"
    )
    init_from: str = option(
        "", "model to start from; its heads are matched by label name", MODEL, "train",
        also="load_transformer_path", moves_folds=True, common="train", metavar="MODEL"
    )

    learning_rate: float = option(
        1e-4, "learning rate of AdamW", TRAINING, "train", least=1e-12, also="lr",
        common="train", metavar="RATE"
    )
    head_learning_rate: float = option(
        0.0, "learning rate of the head (with --end_to_end: of the study-level model); 0: that of "
        "--learning_rate (1e-4)", TRAINING, "train", least=0, on_resume="fixed", metavar="RATE"
    )
    layer_decay: float = option(
        1.0, "learning rate of each layer relative to the layer above it", TRAINING, "train",
        least=1e-3, below=1.0000001, on_resume="fixed", metavar="FACTOR"
    )
    freeze: Literal[
        "", "aggregator", "encoder", "stages:1", "stages:2", "stages:3", "stages:4"
    ] = option(
        "", "part that is not trained: aggregator (a linear probe with --init_from); others need "
        "--end_to_end", TRAINING, "train", on_resume="fixed"
    )
    grid: Names = option(
        [], "train each combination, as in learning_rate=1e-4,1e-5 encoder_depth=1,5", WHAT,
        "train", common="compare", metavar="OPTION=VALUES"
    )
    tensorboard: bool = option(
        False, "also write the history for TensorBoard", COMPUTING, "train check",
        on_resume="unrecorded"
    )
    batch_number: int = option(
        128, "studies per optimiser step", TRAINING, "train", least=1, common="train"
    )
    clip_dropout: float = option(
        0.5, "share of a study's clips dropped in training", TRAINING, "train", least=0, below=1,
        metavar="SHARE"
    )
    epoch_lim: Annotated[int, AfterValidator(limit_or_none)] = option(
        30, "largest number of epochs; -1: no limit", TRAINING, "train",
        also="total_epochs epochs max_epochs", common="train compare"
    )
    epoch_early_stop: int = option(
        10, "stop after this many epochs without improvement", TRAINING, "train", least=1
    )
    checkpoint_minutes: float = option(
        10, "minutes between checkpoints within an epoch; 0: after every step", TRAINING, "train",
        least=0, on_resume="unrecorded", metavar="MINUTES"
    )

    spread: Literal["", "clips", "videos", "none"] = option(
        "", "range of each answer: how much it changes with other clips, or with other "
        "videos; predict takes about 14 times as long [with --page: clips; else none]", OUTPUT,
        "predict explain", common="predict"
    )
    page: bool = option(
        False, "also write a web page with the videos, in a folder", OUTPUT, "predict explain",
        common="predict explain"
    )
    page_mask: Literal["sector", "none"] = option(
        "sector", "clips of the page: black outside the ultrasound sector, or whole frames", OUTPUT,
        "predict explain"
    )
    level: Literal["study", "video"] = option(
        "study", "one vector per study, or one per video", OUTPUT, "embed", common="embed"
    )
    pool_queries: bool = option(
        True, "multiquery models: the mean over labels, or one vector per label", OUTPUT, "embed"
    )
    map: Literal["", "pca", "tsne"] = option(
        "", "also draw a map of the studies: pca (default) or tsne", OUTPUT, "embed", nargs="?",
        const="pca", common="embed"
    )
    color_by: str = option(
        "dataset", "dataset, or a column of the label table", OUTPUT, "embed",
        common="embed", metavar="COLUMN"
    )
    dtype: Literal["float32", "float16"] = option(
        "float32", "number type in the pack", OUTPUT, "pack", common="pack"
    )
    out: str = option(
        "", "table to write [predictions_<dataset>.csv in the model's folder; with "
        "--sample_limit N: predictions_<dataset>.sample_limit-N.csv]", FILES, "predict",
        common="predict", metavar="FILE"
    )
    embed_file: str = option(
        "", "file to write [embeddings_<dataset>_<task>.h5 in the model's folder]", FILES, "embed",
        common="embed", metavar="FILE"
    )
    json_: str = option(
        "", "also write the description to this file, as JSON", FILES, "inspect",
        common="inspect", metavar="FILE"
    )

    explain_n: int = option(5, "top videos in the published table", EXPLAINING, "explain", least=1)
    explain_mode: Literal["pred", "loss"] = option(
        "pred", "explain the prediction or its loss", EXPLAINING, "explain"
    )
    explain_tasks: Annotated[list[str], BeforeValidator(labels_in)] = option(
        [], "labels to explain [all]", EXPLAINING, "explain", common="explain", metavar="LABEL"
    )
    explain_method: Literal[
        "adaptive", "gausslegendre", "riemann_right", "riemann_trapezoid", "leave_one_out",
        "shapley", "attention",
    ] = option(
        "adaptive", "adaptive: integrated gradients, refined to an error of 1 %; the next three: "
        "fixed quadratures; leave_one_out: change without the video; shapley: mean change by "
        "adding the video to others (default with --page); attention: rollout", EXPLAINING,
        "explain", common="explain"
    )
    explain_steps: int = option(64, "steps of a fixed quadrature", EXPLAINING, "explain", least=1)
    baseline: Literal["zero", "mean", "study"] = option(
        "zero", "start of integrated gradients: zero, or the mean clip embedding in training or "
        "of the study", EXPLAINING, "explain"
    )
    curves: bool = option(
        False, "also remove and restore videos by score and at random, and report the answers for "
        "labelled studies", EXPLAINING, "explain"
    )
    select: Literal["all", "confident", "wrong", "balanced"] = option(
        "all", "which studies to explain, the clearest first; --sample_limit sets how many [20]",
        EXPLAINING, "explain", common="explain"
    )

    end_to_end: bool = option(
        False, "train the encoder too, on the videos of --videos or of the dataset's "
        "video_base_path", END_TO_END, "train"
    )
    num_clips: int = option(
        1, "clips per video and step, drawn in each epoch", END_TO_END, "train", least=1
    )
    clips_at_once: int = option(
        8, "clips encoded at a time, which limits memory", END_TO_END, "train", least=1,
        on_resume="unrecorded"
    )
    encoder_learning_rate: float = option(
        1e-6, "learning rate of the encoder", END_TO_END, "train", least=1e-12, metavar="RATE"
    )
    ping_pong: bool = option(
        False, "train the study-level model and the encoder in alternate epochs", END_TO_END,
        "train"
    )
    cache_dir: str = option(
        "frame_cache", "folder for decoded videos", END_TO_END, "train", on_resume="unrecorded",
        metavar="FOLDER"
    )

    encoder: str = option(
        "panecho", "panecho (also for weights of embed/train.py), echoprime, echoclip, "
        "echojepa-l, hf:ORG/MODEL, timm:MODEL, or FILE.py:FUNCTION", EXTRACTION, EXTRACTS,
        common="extract", metavar="NAME"
    )
    weights: str = option(
        "panecho", "encoder weights: a file, a URL, 'panecho' for its release (downloaded once "
        "into torch.hub's cache), or 'random' for a trial", EXTRACTION, READS_VIDEOS,
        common="predict extract", metavar="FILE"
    )
    group: Literal["dicom", "folder", "one"] = option(
        "dicom", "what makes a study: the DICOM StudyInstanceUID (other files: the subfolder), a "
        "subfolder, or the whole source", EXTRACTION, READS_VIDEOS, common="extract"
    )
    study_id: Literal["folder", "uid", "digest"] = option(
        "folder", "name of a study: its folder, the StudyInstanceUID, or a digest of the UID",
        EXTRACTION, READS_VIDEOS
    )
    manifest: list[str] = option(
        [], "lists of videos instead: columns study and path, MIMIC-IV-ECHO's record list, or "
        "EchoNet's FileList; paths are relative to the source", EXTRACTION, READS_VIDEOS,
        common="extract", metavar="FILE"
    )
    mask: Literal["none", "sector"] = option(
        "none", "'sector' blackens everything outside the ultrasound sector, for example names",
        EXTRACTION, EXTRACTS, common="extract"
    )
    perturb: Names = option(
        [], "change the images inside the sector, to test robustness: depth=0.5 shadow=0.3 "
        "speckle=0.2 gain=0.2, shares of the grey scale", EXTRACTION, "extract",
        metavar="CHANGE=SHARE"
    )
    n_clips: int = option(16, "clips per video", EXTRACTION, EXTRACTS, least=1, common="extract")
    clip_len: int = option(
        16, "frames per clip", EXTRACTION, READS_VIDEOS, least=1, on_resume="fixed"
    )
    size: int = option(
        224, "width and height of the encoder's images, in pixels", EXTRACTION, READS_VIDEOS,
        least=32, on_resume="fixed"
    )
    sampling_seed: int = option(
        0, "seed of the random clip starts", EXTRACTION, READS_VIDEOS, least=0, below=SEEDS,
        on_resume="fixed"
    )
    augment: int = option(0, "random transformed copies to add", EXTRACTION, "extract", least=0)
    starts: Literal["modulo", "independent"] = option(
        "modulo", "clip starts of a video: from one residue class modulo 3, which halves the "
        "encoder's work, or independent as published", EXTRACTION, EXTRACTS
    )
    views: Literal["", "echoprime"] = option(
        "", "classify the view of each video into views.csv, with EchoPrime's classifier", VIEWS,
        "extract"
    )
    view_weights: str = option(
        "", "weights of the view classifier: view_classifier.pt, or 'random' for a trial", VIEWS,
        "extract", metavar="FILE"
    )
    image_batch: int = option(0, "images per batch; 0: automatic", EXTRACTION, EXTRACTS, least=0)
    workers: int = option(0, "decoder processes; 0: automatic", EXTRACTION, READS_VIDEOS, least=0)
    shard: str = option(
        "auto", "part of the studies, I/N; 'auto' uses the environment of torchrun or SLURM",
        EXTRACTION, EXTRACTS, metavar="I/N"
    )
    redo: bool = option(
        False, "replace damaged files and files made with other settings", EXTRACTION, EXTRACTS,
        common="extract"
    )
# fmt: on


OPTIONS = Settings.model_fields
SYNONYMS = {word: name for name, f in OPTIONS.items() for word in f.json_schema_extra["also"]}
IN_CONFIG = {n for n, f in OPTIONS.items() if f.json_schema_extra["group"].in_config}


def options_of(command, settings=Settings):
    """Option -> declaration, for the options of a command in `settings`.

    `compare` has its own and those of `train` that choose neither one model nor videos.
    """
    fields, options = settings.model_fields.items(), {}
    for name, f in fields:
        meta = f.json_schema_extra
        trains = "train" in meta["commands"] and not meta["group"].needs_videos
        if command in meta["commands"] or (command == "compare" and trains and name not in CELL):
            options[name] = f
    return options


CELL = ("transformer_type", "train_fraction", "n_folds", "fold", "init_from", "freeze")


# What a checkpoint's record keeps of the settings: what decides the weights, and no path.
RECORDED = [
    name
    for name, f in options_of("train").items()
    if f.json_schema_extra["on_resume"] != "unrecorded"
]


def is_fixed(name):
    """Whether a resumed training refuses another value of this option."""
    return OPTIONS[name].json_schema_extra["on_resume"] == "fixed"


def needs_videos(name):
    """Whether this option affects only videos, not clip embeddings."""
    return OPTIONS[name].json_schema_extra["group"].needs_videos


def add_options(parser, command, settings=Settings):
    """Add the options of a command to a Parser: the common ones, and the others in groups.

    The result of parsing has only the options that are given.
    """
    groups, options = {}, options_of(command, settings).items()
    for name, f in sorted(options, key=lambda x: x[1].json_schema_extra["group"] is MESSAGES):
        meta, kind, place = f.json_schema_extra, f.annotation, parser
        if command not in meta["common"]:
            title = meta["group"].title
            place = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        default = "" if f.default in ("", [], False, None) else f" [{f.default}]"
        keywords = {"help": (f.description + default).replace("%", "%%"), "default": SUPPRESS}
        if kind is bool:
            keywords |= {"action": Switch, "on": f.default}
        elif get_origin(kind) is list:
            keywords |= {"type": str, "nargs": "+"}
        elif get_origin(kind) is Literal:
            keywords |= {"type": str, "choices": [x for x in get_args(kind) if x]}
        else:
            kind = float if kind == float | None else kind
            keywords |= {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "TEXT")}
        keywords |= meta["argparse"]
        words = [f"--{word}" for word in (name.rstrip("_"), *meta["also"])]
        if name == "source":  # a word without --
            place.add_argument(name, **keywords)
        else:
            place.add_argument(*words, dest=name, **keywords)


def one_name(values, others=None):
    """Rename synonyms to option names, keep other keys; ValueError if an option is given twice."""
    named = dict(others or {})
    for key, value in values.items():
        name = SYNONYMS.get(key, key)
        if name in named:
            raise ValueError(f"{name} is given twice")
        named[name] = value
    return named


# ------------------------------------------------------------------------------------------- faults


def validate_as(kind, values, file=""):
    """`values` as a `kind`. Raises UserError with a line for each fault and its place in `file`.

    Without a file, the values are typed options: raises UsageError.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        faults = [x for e in error.errors(include_url=False) for x in fault_lines(e, kind, file)]
    faults = list(dict.fromkeys(faults))
    if len(faults) > 1:
        faults = [f"{file or 'options'}: {len(faults)} faults", *(f"  {text}" for text in faults)]
    raise (UserError if file else UsageError)("\n".join(faults))


def fault_lines(error, kind, file):
    """A fault from pydantic, as lines with its place: 'config.json, task chd, item 1'."""
    place = [key for key in error["loc"] if key != "[key]"]
    words = [f"item {x + 1}" if isinstance(x, int) else printable(x)[:60] for x in place]
    if file and len(words) > 1 and words[0] in ("task", "dataset"):
        words[:2] = [" ".join(words[:2])]
    *above, last = [file, *words] if file else [f"--{place[0].rstrip('_')}"]
    above, where = ", ".join(above), ", ".join([*above, last])
    if error["type"] == "value_error":
        return [f"{where}: {line}" for line in str(error["ctx"]["error"]).splitlines()]
    if error["type"] == "extra_forbidden":
        return [f"{above}: unknown key '{last}'{nearest(place[-1], keys_at(kind, place[:-1]))}"]
    if error["type"] == "missing":
        return [f"{where} is missing"]
    rule = re.sub("^(Input|String) ", "", error["msg"])
    return [f"{where} {rule}, not {shown(error['input'])}"]


def shown(value):
    """A short form of a value from a file, for messages."""
    text = json.dumps(value, skipkeys=True, default=lambda x: f"a {type(x).__name__}")
    return printable(text if len(text) <= 40 else text[:40] + "...")


def keys_at(kind, place):
    """The valid keys at a place in the pydantic model `kind`."""
    for key in place:
        inner = get_args(kind)  # of dict[name, entry] or list[entry]
        kind = inner[-1] if inner else kind.model_fields[key].annotation
    keys = sorted(IN_CONFIG) if kind is Settings else list(kind.model_fields)
    return [*keys, *sorted(IN_CONFIG)] if hasattr(kind, "plain_options") else keys


def grid_of(texts):
    """['learning_rate=1e-4,1e-5', 'encoder_depth=1,5'] -> every combination, dicts of options."""
    axes = {}
    for text in texts:
        name, _, values = text.partition("=")
        name = SYNONYMS.get(name, name)
        comparable = [x for x in RECORDED if not OPTIONS[x].json_schema_extra["moves_folds"]]
        if name not in comparable or not values:
            raise UsageError(
                f"--grid {text}: expected an option of train that does not change the folds, and "
                f"its values, as in lr=1e-4,1e-5{nearest(name, comparable)}"
            )
        axes[name] = [number_or_text(x) for x in values.split(",")]
    combinations = [dict(zip(axes, x, strict=True)) for x in product(*axes.values())]
    return [validate_as(Settings, x).model_dump(exclude_unset=True) for x in combinations]


def number_or_text(text):
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text
