"""Options of the encoder's training, under their published names."""

from typing import Literal

from echofocus_core.base.console import UserError
from echofocus_core.base.options import (
    COMPUTING,
    DATA,
    MODEL,
    MOST_LAYERS,
    OUTPUT,
    SEEDS,
    TRAINING,
    WHAT,
    CohortOptions,
    option,
    validate_as,
)
from echofocus_core.encoder.cohorts import PEDIATRIC_FOLDS
from echofocus_core.video.backbones import NAMES
from echofocus_core.video.clip_tensors import NORMALIZATIONS

COMMAND = "train_encoder"


# fmt: off
class EncoderSettings(CohortOptions):
    """Every option of the encoder's training, under its published name."""

    output_dir: str = option(
        "encoder", "folder of the run", WHAT, COMMAND, on_resume="unrecorded",
        common=COMMAND, metavar="FOLDER"
    )
    model_dir_path: str = option(
        "", "initial weights: a run's folder, a .pt file, or 'panecho' for the release", WHAT,
        COMMAND, also="weights", on_resume="unrecorded", common=COMMAND, metavar="FILE"
    )
    resume: bool = option(
        False, "fail if there is no run to resume (an existing run is always resumed)", WHAT,
        COMMAND, on_resume="unrecorded"
    )

    fold: int = option(
        -1, "echonetpediatric: the fold to test; -1: all ten, one after the other", DATA, COMMAND,
        least=-1, below=PEDIATRIC_FOLDS, on_resume="unrecorded", metavar="K"
    )
    clip_len: int = option(16, "frames per clip", DATA, COMMAND, least=1)
    num_clips: int = option(4, "clips per video in validation and test", DATA, COMMAND, least=1)
    sampling_rate: int = option(1, "temporal stride, in frames", DATA, COMMAND, least=1)
    size: int = option(224, "side of the encoder's input, in pixels", DATA, COMMAND, least=32)
    augment: bool = option(False, "zoom, crop, flip and rotate training clips", DATA, COMMAND)
    cache_dir: str = option(
        "frame_cache", "folder for decoded videos", DATA, COMMAND, on_resume="unrecorded",
        metavar="FOLDER"
    )
    sample_limit: int = option(0, "most videos per fold; 0: all", DATA, COMMAND, least=0)

    model_name: Literal["3dresnet18", "frame_transformer"] = option(
        "3dresnet18", "a 3-D network, or an image encoder with a transformer over frames", MODEL,
        COMMAND, common=COMMAND
    )
    arch: Literal[("", *NAMES)] = option(
        "", "image encoder of frame_transformer", MODEL, COMMAND, choices=("", *NAMES),
        common=COMMAND, metavar="NAME"
    )
    n_layers: int = option(
        4, "layers of the frame transformer", MODEL, COMMAND, least=1, below=MOST_LAYERS + 1
    )
    n_heads: int = option(8, "attention heads of the frame transformer", MODEL, COMMAND, least=1)
    pooling: Literal["mean"] = option("mean", "pooling over frames", MODEL, COMMAND)
    transformer_dropout: float = option(
        0, "dropout in the frame transformer", MODEL, COMMAND, least=0, below=1, metavar="SHARE"
    )
    fc_dropout: float = option(
        0, "dropout before the task heads", MODEL, COMMAND, least=0, below=1, metavar="SHARE"
    )
    normalization: Literal[(*NORMALIZATIONS,)] = option(
        "", "mean and deviation of the input; '': none", MODEL, COMMAND, choices=(*NORMALIZATIONS,)
    )
    rand_init: bool = option(False, "random initial weights", MODEL, COMMAND)

    max_epochs: int = option(
        30, "largest number of epochs", TRAINING, COMMAND, least=1, on_resume="unrecorded",
        common=COMMAND
    )
    patience: int = option(
        10, "epochs without improvement before training stops", TRAINING, COMMAND, least=1,
        on_resume="unrecorded"
    )
    batch_size: int = option(
        16, "videos per process and step", TRAINING, COMMAND, least=1, common=COMMAND
    )
    lr: float = option(
        1e-4, "learning rate", TRAINING, COMMAND, least=1e-12, common=COMMAND, metavar="RATE"
    )
    wd: float = option(0, "weight decay", TRAINING, COMMAND, least=0)
    adamw: bool = option(False, "use AdamW instead of Adam", TRAINING, COMMAND)
    cos_anneal: bool = option(False, "cosine schedule over --max_epochs", TRAINING, COMMAND)
    eta_min: float = option(
        1e-6, "final learning rate of the cosine schedule", TRAINING, COMMAND, least=0,
        metavar="RATE"
    )
    reduce_lr: int = option(
        0, "epochs without improvement before the learning rate is halved [2 without a number]; "
        "0: never", TRAINING, COMMAND, least=0, nargs="?", const=2
    )
    use_class_weights: bool = option(
        False, "weight classes by their inverse frequency", TRAINING, COMMAND
    )
    seed: int = option(
        0, "seed of the order, clips, dropout and random weights", TRAINING, COMMAND, least=-SEEDS,
        below=SEEDS
    )
    checkpoint_minutes: float = option(
        10, "minutes between checkpoints within an epoch; 0: after every step", TRAINING, COMMAND,
        least=0, on_resume="unrecorded", metavar="MINUTES"
    )

    device: str = option(
        "", "cpu, cuda, cuda:1 [CUDA if available]", COMPUTING, COMMAND, on_resume="unrecorded",
        metavar="DEVICE"
    )
    amp: bool = option(False, "half precision: bf16, or --precision fp16", COMPUTING, COMMAND)
    precision: Literal["fp32", "bf16", "fp16"] = option(
        "fp32", "number format; fp16 scales the loss", COMPUTING, COMMAND
    )
    num_workers: int = option(
        0, "threads and processes that read videos; 0: one per core, at most six", COMPUTING,
        COMMAND, least=0, also="workers", on_resume="unrecorded"
    )
    n_bootstrap: int = option(
        1000, "resamples of patients for confidence intervals", OUTPUT, COMMAND, least=1,
        on_resume="unrecorded"
    )
# fmt: on


# Options that a run records and that must not change on resume.
RECORDED = [
    name
    for name, f in EncoderSettings.model_fields.items()
    if f.json_schema_extra["on_resume"] != "unrecorded"
]


def resolve_settings(typed):
    """Command-line options -> EncoderSettings. Raises UserError for conflicting options."""
    settings = validate_as(EncoderSettings, typed)
    if not settings.cohort:
        raise UserError("--cohort is missing: hospital, echonetdynamic or echonetpediatric")
    if settings.model_dir_path and settings.rand_init:
        raise UserError("--model_dir_path and --rand_init cannot be combined")
    if settings.cos_anneal and settings.reduce_lr:
        raise UserError("--cos_anneal and --reduce_lr cannot be combined")
    if settings.model_name == "frame_transformer" and not settings.arch:
        raise UserError(f"--model_name frame_transformer needs --arch: {', '.join(NAMES)}")
    if settings.model_name == "3dresnet18" and settings.arch:
        raise UserError("--arch is for --model_name frame_transformer")
    if settings.amp and settings.precision == "fp32":
        settings.precision = "bf16"
    settings.data_dir = settings.data_dir or f"data/{settings.cohort}"
    return settings
