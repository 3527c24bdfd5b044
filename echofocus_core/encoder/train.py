"""Train the video encoder: videos with labels -> an encoder for `embed/extract.py --weights`.

    python embed/train.py --cohort echonetdynamic --data_dir EchoNet-Dynamic --output_dir runs/ef
    torchrun --nproc_per_node=8 embed/train.py --cohort hospital --output_dir panecho \\
        --model_name frame_transformer --arch convnext_tiny --fc_dropout 0.25 \\
        --normalization imagenet --augment --reduce_lr 3 --amp

The way of the data: cohorts.read_cohort (tables) -> cache.FrameCache (each video decoded once) ->
clips, read ahead by threads -> backbone and heads -> masked multi-task loss -> history, weights,
predictions and metrics in --output_dir. A run that was stopped goes on with the same command.
Axis letters: B clips of a batch, L frames, T tasks.
"""

import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import AfterValidator

from echofocus_core import __version__
from echofocus_core.base.checkpoints import load_safely, load_strictly, save
from echofocus_core.base.console import RUN, Parser, UserError, listed, progress, run_main
from echofocus_core.base.files import (
    atomic_path,
    derive_seed,
    sha256_file,
    write_table,
)
from echofocus_core.base.options import (
    COMPUTING,
    DATA,
    FOLDS,
    MODEL,
    MOST_BATCH,
    MOST_CLIPS,
    MOST_LAYERS,
    MOST_RATE,
    MOST_SIDE,
    MOST_WORKERS,
    OUTPUT,
    SEEDS,
    TRAINING,
    WHAT,
    CohortOptions,
    add_options,
    option,
    validated,
)
from echofocus_core.base.parallel import map_ahead
from echofocus_core.base.seen import STUDY, Seen
from echofocus_core.base.world import World, exact_convolutions, join_world, pick_device
from echofocus_core.encoder.backbones import (
    NAMES,
    NORMALIZATIONS,
    Start,
    as_input,
    build_backbone,
    draw_factors,
)
from echofocus_core.encoder.cohorts import PEDIATRIC_FOLDS, read_cohort, tell_copies
from echofocus_core.encoder.losses import MultiTaskLoss, class_weights, fill_means

# This program stands above the rooms, as echofocus.py does: results are the report's business.
from echofocus_core.encoder.report import score_of, validation_row, write_pooled, write_results
from echofocus_core.study.folds import levels_by, sample_ids, without_seen
from echofocus_core.study.labels import other_unit
from echofocus_core.video.cache import ClipSampling, FrameCache
from echofocus_core.video.panecho import (
    DOWNLOADED,
    TASKS,
    PanEcho,
    activate,
    find_weights,
    licence_of,
    read_encoder,
    warn_of_other_clips,
    weights_path,
)
from echofocus_core.video.record import EncoderRecord, EncoderTask, record_of

THIS = "train_encoder"


def known_normalization(name):
    if name not in NORMALIZATIONS:
        raise ValueError(f"{', '.join(filter(None, NORMALIZATIONS))} or '', not {name}")
    return name


# fmt: off
class EncoderSettings(CohortOptions):
    """Every option of the encoder's training, under its published name."""

    output_dir: str = option("encoder", "folder of the run", WHAT, THIS, on_resume="unrecorded")
    model_dir_path: str = option(
        "", "start from weights: a run's folder, a .pt file, or 'panecho' for the release", WHAT,
        THIS, also="weights", on_resume="unrecorded"
    )
    resume: bool = option(
        False, "insist that there is a run to go on with (what there is goes on anyway)", WHAT,
        THIS, on_resume="unrecorded"
    )

    fold: int = option(
        -1, "echonetpediatric: the fold to test; -1: all ten, one after the other", DATA, THIS,
        least=-1, below=PEDIATRIC_FOLDS, on_resume="unrecorded"
    )
    clip_len: int = option(16, "frames a clip", DATA, THIS, least=1, below=MOST_CLIPS + 1)
    num_clips: int = option(
        4, "clips a video at validation and test", DATA, THIS, least=1, below=MOST_CLIPS + 1
    )
    sampling_rate: int = option(
        1, "every so-manieth frame", DATA, THIS, least=1, below=MOST_CLIPS + 1
    )
    size: int = option(
        224, "pixels a side that the encoder sees", DATA, THIS, least=32, below=MOST_SIDE + 1
    )
    augment: bool = option(False, "zoom, crop, flip and rotate in training", DATA, THIS)
    cache_dir: str = option(
        "frame_cache", "folder for decoded videos", DATA, THIS, on_resume="unrecorded"
    )
    sample_limit: int = option(0, "so many videos a fold at most; 0 is all", DATA, THIS, least=0)

    model_name: Literal["3dresnet18", "frame_transformer"] = option(
        "3dresnet18", "images and a transformer over frames, or a 3-D network", MODEL, THIS
    )
    arch: Literal[("", *NAMES)] = option(
        "", "image encoder of frame_transformer", MODEL, THIS, choices=("", *NAMES)
    )
    n_layers: int = option(
        4, "of the frame transformer", MODEL, THIS, least=1, below=MOST_LAYERS + 1
    )
    n_heads: int = option(8, "of the frame transformer", MODEL, THIS, least=1)
    pooling: Literal["mean"] = option("mean", "over frames", MODEL, THIS)
    transformer_dropout: float = option(0, "between frames", MODEL, THIS, least=0, below=1)
    fc_dropout: float = option(0, "before the heads", MODEL, THIS, least=0, below=1)
    normalization: Annotated[str, AfterValidator(known_normalization)] = option(
        "", "imagenet, kinetics, echo-clip, or '' for none", MODEL, THIS
    )
    rand_init: bool = option(False, "start at random", MODEL, THIS)

    max_epochs: int = option(30, "epochs at most", TRAINING, THIS, least=1, on_resume="unrecorded")
    patience: int = option(
        10, "stop after so many epochs without improvement", TRAINING, THIS, least=1,
        on_resume="unrecorded"
    )
    batch_size: int = option(
        16, "videos a process and step", TRAINING, THIS, least=1, below=MOST_BATCH + 1
    )
    lr: float = option(1e-4, "learning rate", TRAINING, THIS, least=1e-12, below=MOST_RATE)
    wd: float = option(0, "weight decay", TRAINING, THIS, least=0, below=MOST_RATE)
    adamw: bool = option(False, "AdamW instead of Adam", TRAINING, THIS)
    cos_anneal: bool = option(False, "cosine schedule over max_epochs", TRAINING, THIS)
    eta_min: float = option(1e-6, "where the cosine ends", TRAINING, THIS, least=0, below=MOST_RATE)
    reduce_lr: int = option(
        0, "halve the rate after so many epochs without improvement [2, if no number is given]; 0: "
        "never", TRAINING, THIS, least=0, nargs="?", const=2
    )
    use_class_weights: bool = option(False, "weigh classes by their rarity", TRAINING, THIS)
    seed: int = option(
        0, "of the order, clips, dropout and fresh weights", TRAINING, THIS, least=-SEEDS,
        below=SEEDS
    )
    checkpoint_minutes: float = option(
        10, "between checkpoints within an epoch; 0: after every step", TRAINING, THIS, least=0,
        on_resume="unrecorded"
    )

    device: str = option(
        "", "cpu, cuda, cuda:1 [CUDA if there is one]", COMPUTING, THIS, on_resume="unrecorded"
    )
    amp: bool = option(False, "half precision: bf16, or as --precision says", COMPUTING, THIS)
    precision: Literal["fp32", "bf16", "fp16"] = option(
        "fp32", "of the computation; fp16 with its loss scaled", COMPUTING, THIS
    )
    num_workers: int = option(
        0, "threads and processes that read videos; 0: by cores, six threads at most", COMPUTING,
        THIS, least=0, below=MOST_WORKERS + 1, also="workers", on_resume="unrecorded"
    )
    n_bootstrap: int = option(
        1000, "resamples of patients for intervals", OUTPUT, THIS, least=1, below=MOST_BATCH + 1,
        on_resume="unrecorded"
    )
# fmt: on


READERS = (
    6  # threads; more read no faster, and slow what launches the steps (benchmarks/RESULTS.md)
)

# What a run records of its options; a resumed one refuses other values.
RECORDED = [
    name
    for name, f in EncoderSettings.model_fields.items()
    if f.json_schema_extra["on_resume"] != "unrecorded"
]


def resolved(typed):
    """Options as typed -> EncoderSettings. Raises UserError for what does not go together."""
    settings = validated(EncoderSettings, typed)
    if not settings.cohort:
        raise UserError("--cohort hospital, echonetdynamic or echonetpediatric says what to read")
    if settings.model_dir_path and settings.rand_init:
        raise UserError("--model_dir_path and --rand_init are two starts: give one")
    if settings.cos_anneal and settings.reduce_lr:
        raise UserError("--cos_anneal and --reduce_lr are two schedules: give one")
    if settings.model_name == "frame_transformer" and not settings.arch:
        raise UserError(f"--model_name frame_transformer needs --arch: {', '.join(NAMES)}")
    if settings.model_name == "3dresnet18" and settings.arch:
        raise UserError("--arch is for --model_name frame_transformer")
    if settings.amp and settings.precision == "fp32":
        settings.precision = "bf16"
    settings.data_dir = settings.data_dir or f"data/{settings.cohort}"
    return settings


# ------------------------------------------------------------------------------------------ the net


def build_net(settings, tasks, labels):
    """(PanEcho with these heads and raw outputs, Start) as the options say. Raises UserError.

    tasks: entries with `mean`; labels: of the training videos. A fresh head answers the training
    mean, a binary one its log-odds, before it has learnt anything.
    """
    pretrained = not settings.rand_init and not settings.model_dir_path
    with torch.random.fork_rng([]):
        torch.manual_seed(derive_seed("weights", settings.seed))
        backbone, start = build_backbone(
            settings.model_name, settings.arch, pretrained, settings.clip_len, settings.n_layers,
            settings.n_heads, settings.transformer_dropout,
        )  # fmt: skip
        net = PanEcho(tasks, False, backbone=backbone, dropout=settings.fc_dropout)
    for task in tasks:
        head, share = net.get_submodule(f"{task['name']}_head")[1], task["mean"]
        if task["type"].startswith("binary"):
            n = labels[task["name"]].count()
            share = min(max(share, 0.5 / (n + 1)), 1 - 0.5 / (n + 1))
            torch.nn.init.constant_(head.bias, math.log(share / (1 - share)))
    if settings.model_dir_path:
        start = start_from(net, settings.model_dir_path, settings)
    return net, start


def start_from(net, source, settings):
    """Load a weights file's backbone and the heads of tasks that are the same; the Start."""
    if Path(source).is_dir():  # also one called panecho
        source = Path(source)
        if not weights_path(source).is_file():
            raise UserError(f"{source} holds no chkpt_epoch-N.pt; name a run's folder or a file")
    path = find_weights(source)
    file = read_encoder(path)
    state, record = numbers(file.state), file.record  # published ones hold them
    refuse_other_network(
        record or (path.name == DOWNLOADED.name and EncoderRecord(tasks=[])), path, settings
    )
    given = {t["name"]: t for t in ([x.entry() for x in record.tasks] if record else TASKS)}
    own = net.state_dict()
    kept = []
    for task in net.tasks:
        head = f"{task['name']}_head."
        names = [k for k in own if k.startswith(head)]
        fits = all(k in state and state[k].shape == own[k].shape for k in names)
        other = fits and task["name"] in given and other_task(task, given[task["name"]])
        if other:
            print(f"WARNING: {task['name']} is another task in {path.name}: {other}; a fresh head")
        kept += [task["name"]] if fits and not other else []
        if task["name"] not in kept:
            state |= {k: own[k] for k in names}
    heads = tuple(f"{t['name']}_head." for t in net.tasks)
    state = {k: v for k, v in state.items() if k.startswith(("encoder.", *heads))}
    load_strictly(net, state, path, "this --model_name and --arch")
    print(
        f"starting from {path.name}: the backbone and {len(kept)} heads kept, "
        f"{len(net.tasks) - len(kept)} fresh"
    )
    return Start(path.name, sha256_file(path), licence_of(path, record), file.seen, echo=True)


def other_task(task, was):
    """How an entry of a name differs from another in what its head tells, as text; or ''."""
    for key in ("type", "class_names"):
        if was[key] != task[key]:
            return f"{key} {was[key]}, not {task[key]}"
    one, other = task.get("unit", ""), was.get("unit", "")
    return f"in {other}, not {one}" if other_unit("", {"": one}, {"": other}) else ""


def unknown_to(start, folds, cohort):
    """(folds less the val and test videos whose patient or study the start has seen, by fold what
    its results say of that). UserError where none is left.
    """
    seen, name = start.seen, start.name
    notes = []
    if start.echo and not seen:
        notes.append(f"{name} was trained elsewhere, on patients it does not name")
        print(f"{notes[0]}: all count as unseen")
    table = cohort.videos.rename(columns={"patient": "pid", "study": STUDY})
    left = without_seen(folds, [(name, levels_by(name, seen, table, RUN))], what="videos")
    said = {}
    for fold in ("val", "test"):
        n, lost = int((folds == fold).sum()), int(((folds == fold) & (left != fold)).sum())
        if lost == n > 0:
            raise UserError(
                f"--model_dir_path: {name} has seen the patients or studies of all {n} {fold} "
                "videos, by the ids: start elsewhere, or give others (where only the ids happen to "
                "be the same, put the site's name before them)"
            )
        said[fold] = [f"left out: {lost} of {n} videos, whose patients or studies {name} has seen"]
        said[fold] = said[fold] * (lost > 0) + notes
    return left, said


def numbers(state):
    """A state dict without the batches that batch normalisation counts, which nothing reads."""
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def refuse_other_network(record, path, settings):
    """UserError where weights mean something else in this network, though they fit its shapes.

    record: of the weights, the release's by its defaults; None or False where nothing is known.
    """
    if not record:
        return
    asked = {"model_name": "model_name", "arch": "arch", "n_layers": "layers", "n_heads": "heads"}
    for option_name, name in (asked | {"normalization": "normalization"}).items():
        was, value = getattr(record, name), getattr(settings, option_name)
        if was != value and (settings.arch or not option_name.startswith("n_")):
            raise UserError(
                f"{path} was trained with {option_name} = {was or 'none'}, not {value or 'none'}; "
                f"give --{option_name} {was}, or start elsewhere"
            )
    warn_of_other_clips(record, path, settings.size, settings.clip_len, settings.sampling_rate)


# ----------------------------------------------------------------------------------------- the loop


@dataclass
class Position:
    """How far an epoch is, as a checkpoint within it holds."""

    videos: int = 0  # of the epoch's order
    losses: float = 0.0  # their sum
    seconds: float = 0.0
    waited: float = 0.0  # of these, for clips


class Run:
    """The training of one encoder; its state is what the last checkpoint holds."""

    def __init__(self, folder, settings, cohort, folds, cache, world):
        self.folder, self.settings, self.cohort = Path(folder), settings, cohort
        self.cache, self.world = cache, world
        self.names = names_of(folds, settings)
        for fold in ("train", "val"):
            if not self.names.get(fold):
                raise UserError(f"no usable video in the {fold} fold of {cohort.name}")
        labels = cohort.labels.loc[self.names["train"]]
        self.tasks = learnable(cohort.tasks, labels)
        self.tasks = fill_means(self.tasks, labels)
        weights = {}
        if settings.use_class_weights:
            weights = {
                t["name"]: class_weights(t, labels[t["name"]].to_numpy()) for t in self.tasks
            }
        self.loss = MultiTaskLoss(self.tasks, weights)
        net, self.start = build_net(settings, self.tasks, labels)
        left, self.notes = unknown_to(self.start, folds, cohort)
        self.names, self.left_out = names_of(left, settings), int((left != folds).sum())
        self.device = pick_device(settings.device)
        self.net = net.to(self.device)
        self.synced = world.size > 1 and self.device.type == "cuda" and has_batch_norm(net)
        if self.synced:
            self.net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.net)
        kind = torch.optim.AdamW if settings.adamw else torch.optim.Adam
        self.optimizer = kind(self.net.parameters(), lr=settings.lr, weight_decay=settings.wd)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.by_metric = cohort.by_metric and self.metric_is_defined()
        self.scheduler = self.schedule()
        self.history = []  # a dict a phase and epoch, see `validation_row`
        self.scores = []  # an epoch each, higher is better
        self.position = Position()
        self.waited = 0.0  # seconds, for clips

    def schedule(self):
        s = self.settings
        if s.cos_anneal:
            return torch.optim.lr_scheduler.CosineAnnealingLR(
                self.optimizer, T_max=s.max_epochs, eta_min=s.eta_min
            )
        if s.reduce_lr:  # scores of losses are negative, for which a relative threshold is wrong
            return torch.optim.lr_scheduler.ReduceLROnPlateau(
                self.optimizer, mode="max", patience=s.reduce_lr, factor=0.5,
                threshold=1e-4, threshold_mode="abs",
            )  # fmt: skip
        return None

    def metric_is_defined(self):
        """Whether AUROC or R2 of some task is defined on the validation fold; said if not."""
        labels = self.cohort.labels.loc[self.names["val"], [t["name"] for t in self.tasks]]
        if (labels.nunique() > 1).any():
            return True
        print("WARNING: no label of the validation fold has two values; its loss stops training")
        return False

    # ------------------------------------------------------------------------------------ progress

    @property
    def epoch(self):
        return len(self.scores)

    @property
    def best_epoch(self):
        scores = np.nan_to_num(self.scores, nan=-np.inf)  # where no metric was defined
        return 1 + int(np.argmax(scores)) if self.scores else 0

    @property
    def finished(self):
        s = self.settings
        return self.epoch >= s.max_epochs or self.epoch - self.best_epoch >= s.patience

    @property
    def reported(self):
        """Whether the results of the best epoch are written; the summary comes last."""
        of_this = f"best epoch {self.best_epoch}"
        files = [self.folder / f"{fold}_summary.txt" for fold in self.result_folds]
        return all(
            f.is_file() and f.read_text(encoding="utf-8").partition("\n")[0].endswith(f" {of_this}")
            for f in files
        )

    @property
    def result_folds(self):
        return [fold for fold in ("val", "test") if self.names.get(fold)]

    def record(self):
        s = self.settings
        settings = {name: getattr(s, name) for name in RECORDED}
        return EncoderRecord(
            tasks=[EncoderTask(**task) for task in self.tasks], version=__version__,
            cohort=self.cohort.name, model_name=s.model_name, arch=s.arch,
            normalization=s.normalization, size=s.size, clip_len=s.clip_len, layers=s.n_layers,
            heads=s.n_heads, epoch=self.best_epoch, started_from=self.start.name,
            started_sha256=self.start.sha256, licence=self.start.licence,
            labels_sha256=self.cohort.digest(), videos_sha256=self.cohort.content_digest(),
            left_out=self.left_out, settings=settings,
        )  # fmt: skip

    def seen(self):
        """Whom this training and those before it have seen: a list of Seen, its own first."""
        videos = [self.cohort.videos.loc[self.names[f]].assign(fold=f) for f in ("train", "val")]
        split = pd.concat(videos).set_index("study").rename(columns={"patient": "pid"})
        return [Seen.of(split, self.cohort.digest()[:32]), *self.start.seen]

    def begin(self):
        """Resume from the last checkpoint, or start."""
        path = self.folder / "last_checkpoint.pt"
        if path.is_file():
            self.go_on(path)
        elif self.settings.resume:
            raise UserError(f"--resume: there is no run in {self.folder} to go on with")
        elif weights_path(self.folder).is_file() and not self.was_killed_early:
            raise UserError(
                f"{self.folder} holds an encoder and nothing to go on from; use another "
                "--output_dir"
            )
        if len(set(self.world.gather((self.epoch, self.position.videos)))) > 1:
            raise UserError(f"the processes see different files at {path}: is the folder shared?")
        if not self.world.rank:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.finished:
                self.write_record()

    @property
    def was_killed_early(self):
        """Whether a run of this program's stopped between its first two checkpoints."""
        begun, history = self.folder / "encoder.json", self.folder / "history.csv"
        return begun.is_file() and not history.is_file()

    def write_record(self):
        with atomic_path(self.folder / "encoder.json") as temporary:
            temporary.write_text(json.dumps(self.record().to_save(), indent=2) + "\n")

    def go_on(self, path):
        saved = load_safely(path)
        before = record_of(saved, path) if isinstance(saved, dict) else None
        if not before:
            raise UserError(f"{path} was not made by this program; use another --output_dir")
        if other := difference(before, self.record()):
            raise UserError(f"{self.folder} was begun with {other}; use another --output_dir")
        try:
            over = saved["scheduler"].get("T_max", self.settings.max_epochs)
            if over != self.settings.max_epochs:
                raise UserError(
                    f"{self.folder} was begun with max_epochs = {over}, over which --cos_anneal "
                    f"runs, not {self.settings.max_epochs}; use another --output_dir"
                )
            self.net.load_state_dict(saved["weights"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
            if self.scheduler:
                self.scheduler.load_state_dict(saved["scheduler"])
            self.history, self.scores = saved["history"], saved["scores"]
            self.position = Position(**saved["position"])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{path} is damaged, no run can go on from it; use another --output_dir"
            ) from error
        self.refuse_other_best()
        begun = f" and {self.position.videos} videos" if self.position.videos else ""
        print(f"resuming {self.folder} after epoch {self.epoch}{begun}")

    def refuse_other_best(self):
        """UserError where the folder's newest weights are not those of the best epoch: these are
        gone, or another run's. A run that died may have left those of the epoch that is next."""
        found = weights_path(self.folder)
        found = found if found.is_file() else None
        best, more = (
            self.folder / f"chkpt_epoch-{n}.pt" for n in (self.best_epoch, self.epoch + 1)
        )
        allowed = [best] if self.finished else [best, more]
        faults = [f"{file} is of another run, with {other}" for file in allowed
                  if file.is_file() and (other := self.other_run(file))]  # fmt: skip
        if self.scores and not best.is_file() and found != more:
            faults.append(f"{best}, of the best epoch, is gone")
        elif found and found not in allowed:
            faults.append(f"{found} is not of the best epoch, {self.best_epoch}")
        if faults:
            raise UserError(
                f"{faults[0]}: have the right file there alone, or use another --output_dir"
            )

    def other_run(self, file):
        """What tells that weights are of another run or epoch than their name says, or ''."""
        saved = load_safely(file)
        record = record_of(saved, file) if isinstance(saved, dict) else None
        if not record:
            return "no record"
        epoch = "" if file.stem == f"chkpt_epoch-{record.epoch}" else f"epoch {record.epoch}"
        return difference(record, self.record()) or epoch

    # -------------------------------------------------------------------------------------- batches

    def read(self, name, n_clips, sampling, seed):
        path = self.cohort.videos.at[name, "path"]
        return self.cache.clips(path, n_clips, sampling, seed, name)

    def batches(self, steps, n_clips, sampling, seed):
        """Yield (names, clips uint8 (len * n_clips, L, S, S, 3)) of each list of names, read ahead
        by threads; the clips of a video stand together."""
        threads = self.settings.num_workers or max(1, min(READERS, os.cpu_count() or 1))
        read = partial(self.read, n_clips=n_clips, sampling=sampling, seed=seed)
        names = [name for own in steps for name in own]
        most = 2 * threads + 2 * max(map(len, steps), default=0)
        with ThreadPoolExecutor(threads, "clips") as pool:
            clips = map_ahead(pool, read, names, most + 1)
            for own in steps:
                began = time.perf_counter()
                read_now = [next(clips) for _ in own]
                self.waited += time.perf_counter() - began
                yield own, torch.from_numpy(np.concatenate(read_now)) if own else None

    def forward(self, clips, keys=None, seed=0):
        """Raw outputs, dict of task to (B, n), of uint8 clips; keys: of the draws in training."""
        s = self.settings
        x = as_input(clips.to(self.device, non_blocking=True), s.normalization)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(s.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            if keys is None:
                return self.net(x)
            depth, heads = draw_factors(self.net, keys, seed, s.clip_len, s.fc_dropout)
            embeddings = self.net.encoder(x) if depth is None else self.net.encoder(x, depth)
            return self.net.read(embeddings, heads)

    # ------------------------------------------------------------------------------------- training

    def one_epoch(self):
        """Train on every video once, validate, write weights, history and curves."""
        number, done, began = self.epoch + 1, self.position, time.time()
        before, saved = done.seconds, time.time()
        seed = derive_seed(self.settings.seed, number)
        rng = np.random.default_rng(derive_seed("order", self.settings.seed, number))
        order = [self.names["train"][i] for i in rng.permutation(len(self.names["train"]))]
        each = self.settings.batch_size * self.world.size
        least = self.world.size if self.synced else 1
        steps = steps_of(order[done.videos :], each, least)
        own = [step[self.world.rank :: self.world.size] for step in steps]
        s = self.settings
        sampling = ClipSampling(s.clip_len, s.size, s.sampling_rate, s.augment)
        self.net.train()
        self.waited = done.waited
        bar = progress(
            zip(steps, self.batches(own, 1, sampling, seed), strict=True), desc=f"epoch {number}",
            total=len(steps), unit="step", leave=False, disable=self.world.rank > 0,
        )  # fmt: skip
        for step, (names, clips) in bar:
            loss = self.step(step, names, clips, seed)
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss of epoch {number} is not a number: lower --lr, or leave out --amp; "
                    f"last_checkpoint.pt in {self.folder} is of before"
                )
            done.videos += len(step)
            done.losses += loss * len(step)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            if time.time() - saved >= 60 * s.checkpoint_minutes:
                done.seconds, done.waited = before + time.time() - began, self.waited
                self.save_last()
                saved = time.time()
        done.seconds, done.waited = before + time.time() - began, self.waited
        self.end_epoch(done.losses / len(order), done)

    def step(self, step, names, clips, seed):
        """One optimiser step on the videos `step`, of which this process has `names`; the loss."""
        columns = [t["name"] for t in self.tasks]
        divisors = self.loss.divisors(self.cohort.labels.loc[step, columns].to_numpy())
        loss = torch.zeros((), device=self.device)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # of layers that draw by themselves
            torch.manual_seed(derive_seed("step", seed, step[0], self.world.rank))
            if names:
                targets = self.cohort.labels.loc[names, columns].to_numpy(np.float32, copy=True)
                outputs = self.forward(clips, names, seed)
                sums = self.loss.sums(outputs, torch.from_numpy(targets).to(self.device))
                loss = self.loss.mean(sums, divisors)
                self.scaler.scale(loss).backward()
        if self.world.size > 1:
            self.add_gradients()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return float(self.world.sum(loss.detach().double()))

    def add_gradients(self):
        """Each parameter's gradient becomes the sum over the processes."""
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        zeros = (torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
        flat = self.world.sum(torch.cat([g.flatten() for g in zeros]))
        for p, g in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = g.view_as(p)

    def end_epoch(self, train_loss, done):
        found, seconds = self.predict("val"), max(done.seconds, 1e-9)
        lr = self.optimizer.param_groups[0]["lr"]
        number = self.epoch + 1
        row = validation_row(self.tasks, found.studies, self.truths(found.studies))
        row = {"epoch": number, "phase": "val", "loss": found.loss} | row | found.task_losses
        self.history.append({"epoch": number, "phase": "train", "loss": train_loss, "lr": lr,
                             "seconds": seconds})  # fmt: skip
        self.history.append(row | {"lr": lr, "seconds": seconds})
        score = score_of(row) if self.by_metric else -found.loss
        self.scores.append(score)
        self.position = Position()
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(score)
        elif self.scheduler:
            self.scheduler.step()
        images = len(self.names["train"]) * self.settings.clip_len
        print(
            f"epoch {number}: train loss {train_loss:.4f}, validation loss {found.loss:.4f}, "
            f"{'AUROC and R2' if self.by_metric else 'score'} {score:.4f}, lr {lr:g}, "
            f"{images / seconds:.0f} images/s, {done.waited / seconds:.0%} of the time waiting for "
            "videos"
        )
        self.save()

    # -------------------------------------------------------------------------------------- answers

    @torch.no_grad()
    def predict(self, fold):
        """The Predictions of a fold's videos, each from its clips, by all processes."""
        names, world, s = self.names[fold], self.world, self.settings
        own = names[world.rank :: world.size]
        each = max(1, s.batch_size // s.num_clips)
        steps = [own[i : i + each] for i in range(0, len(own), each)]
        sampling = ClipSampling(s.clip_len, s.size, s.sampling_rate)
        seed, found = derive_seed("clips", s.seed), []
        self.net.eval()
        batches = progress(
            self.batches(steps, s.num_clips, sampling, seed), desc=fold, total=len(steps),
            unit="step", leave=False, disable=world.rank > 0,
        )  # fmt: skip
        for step, clips in batches:
            outputs = self.forward(clips)
            flat = torch.cat([outputs[t["name"]].float() for t in self.tasks], 1)
            means = flat.view(len(step), s.num_clips, -1).mean(1).cpu().numpy()
            found += zip(step, means, strict=True)
        found = dict(pair for part in world.gather(found) for pair in part)
        raw = pd.DataFrame(np.stack([found[name] for name in names]), names)
        return self.predictions(raw)

    def predictions(self, raw):
        """Predictions from raw outputs, a row a video."""
        targets = self.cohort.labels.loc[raw.index, [t["name"] for t in self.tasks]].to_numpy()
        outputs = split_outputs(self.tasks, torch.tensor(raw.to_numpy()))
        divisors = self.loss.divisors(targets)
        sums = self.loss.sums(outputs, torch.tensor(targets).float())
        losses = {
            f"{t['name']}_loss": float(total) / float(n) if n else math.nan
            for t, total, n in zip(self.tasks, sums, divisors, strict=True)
        }
        parts = {t["name"]: activated(outputs[t["name"]], t) for t in self.tasks}
        columns = [(name, i) for name, part in parts.items() for i in range(part.shape[1])]
        values = np.concatenate(list(parts.values()), axis=1)
        videos = pd.DataFrame(values, raw.index, pd.MultiIndex.from_tuples(columns))
        study = self.cohort.videos.loc[raw.index, "study"]
        loss = float(self.loss.mean(sums, divisors))
        return Predictions(videos, videos.groupby(study).mean(), loss, losses)

    def truths(self, studies):
        """Labels of studies: the first known one of its videos."""
        labels = self.cohort.labels.groupby(self.cohort.videos["study"]).first()
        return labels.loc[studies.index]

    # --------------------------------------------------------------------------------------- saving

    def save_last(self):
        """Write last_checkpoint.pt, all that going on needs; the first process does it for all."""
        if self.world.rank:
            return
        state = {
            "weights": numbers(self.net.state_dict()), "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else {},
            "scaler": self.scaler.state_dict(), "history": self.history, "scores": self.scores,
            "position": asdict(self.position), "encoder": self.record().to_save(),
        }  # fmt: skip
        save(state, self.folder / "last_checkpoint.pt")

    def save(self):
        """The best weights (first: last says that the epoch is done), last checkpoint, history."""
        if not self.world.rank:
            self.write()
        self.world.gather(None)  # the files are there for all

    def write(self):
        if self.best_epoch == self.epoch:
            path = self.folder / f"chkpt_epoch-{self.epoch}.pt"
            saved = {"weights": numbers(self.net.state_dict()), "encoder": self.record().to_save()}
            save(saved | {"seen": [part.saved() for part in self.seen()]}, path)
            self.write_record()
        self.save_last()
        for old in self.folder.glob("chkpt_epoch-*.pt"):
            if old.name != f"chkpt_epoch-{self.best_epoch}.pt":
                old.unlink()
        write_table(pd.DataFrame(self.history), self.folder / "history.csv")

    def finish(self):
        """Predictions, metrics and figures of the best weights; nothing where they are written."""
        if self.reported:
            print(f"{self.folder} is finished")
            return
        path = self.folder / f"chkpt_epoch-{self.best_epoch}.pt"
        state = read_encoder(path).state
        self.net.load_state_dict(state)
        print(f"best: epoch {self.best_epoch} of {self.epoch}")
        for fold in self.result_folds:
            found = self.predict(fold)
            if not self.world.rank:
                write_results(self, fold, found)
        self.world.gather(None)


def difference(before, now):
    """What makes two records those of different runs, as text; '' where nothing does."""
    if before.labels_sha256 != now.labels_sha256:
        return "other tables, or other videos that can be used"
    if before.videos_sha256 and before.videos_sha256 != now.videos_sha256:
        return "other pixels in some video"
    pairs = {k: (before.settings.get(k), v) for k, v in now.settings.items()}
    pairs["start"] = before.started_sha256, now.started_sha256
    pairs["videos left out that the start has seen"] = before.left_out, now.left_out
    pairs["tasks"], pairs["tasks' kinds"], pairs["tasks' classes"] = zip(
        *([[getattr(t, k) for t in r.tasks] for k in ("name", "type", "classes")]
          for r in (before, now)), strict=True,
    )  # fmt: skip
    units = [{t.name: t.unit for t in r.tasks} for r in (before, now)]
    pairs |= {f"the unit of {k}": (units[0][k], u) for k, u in units[1].items()
              if other_unit(k, *units)}  # fmt: skip
    for name, (was, value) in pairs.items():
        if was != value:
            return f"{name} = {was}, not {value}"
    return ""


@dataclass
class Predictions:
    """Activated outputs, columns (task, number of the output); see `panecho.activate`."""

    videos: pd.DataFrame  # a row a video
    studies: pd.DataFrame  # the mean over a study's videos
    loss: float  # over videos
    task_losses: dict


def split_outputs(tasks, flat):
    """(N, outputs of all tasks) -> dict of task to (N, n)."""
    sizes = [len(t["class_names"]) if t["type"].startswith("multi") else 1 for t in tasks]
    names = [t["name"] for t in tasks]
    return dict(zip(names, flat.split(sizes, dim=1), strict=True))


def activated(raw, task):
    """Raw outputs (N, n) -> values in units, probabilities of classes, or of the second class."""
    if task["type"].startswith("binary"):
        return torch.sigmoid(raw).numpy()
    return activate(raw, task).numpy()


def learnable(tasks, labels):
    """The tasks whose training labels differ; the others are told, as nothing can be learnt."""
    kept = []
    for task in tasks:
        if labels[task["name"]].nunique() > 1:
            kept.append(task)
        else:
            print(f"WARNING: {task['name']} cannot be learnt: its training labels do not differ")
    if not kept:
        raise UserError("no task can be learnt: the training labels need two values")
    return kept


def has_batch_norm(net):
    return any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in net.modules())


def steps_of(order, each, least=1):
    """Lists of `each` names; the last has less, or joins the one before where it has not `least`.

    Where processes wait for each other's statistics, each needs a video in every step.
    """
    if 0 < len(order) < least:
        raise UserError(
            f"{len(order)} training videos are too few for {least} processes whose batch "
            "statistics are one: take fewer processes"
        )
    steps = [order[i : i + each] for i in range(0, len(order), each)]
    if steps and len(steps[-1]) < least:
        steps[-2:] = [steps[-2] + steps[-1]]
    return steps


def names_of(folds, settings):
    """Fold -> so many of its videos as --sample_limit says, by a hash of their names."""
    each = {fold: folds.index[folds == fold] for fold in FOLDS}
    return {k: sample_ids(sorted(v), settings.sample_limit) for k, v in each.items() if len(v)}


# ------------------------------------------------------------------------------------- command line


def train(settings, world=None):
    """Everything that a command line does, in each process."""
    world = world or World()
    cohort = read_cohort(settings.cohort, settings.data_dir, settings.tasks)
    cache = FrameCache(settings.cache_dir, settings.size)
    cohort = decoded(cohort, cache, settings, world)
    numbered = settings.cohort == "echonetpediatric"
    wanted = range(PEDIATRIC_FOLDS) if numbered and settings.fold < 0 else [max(settings.fold, 0)]
    runs, notes = [], []
    for k in wanted:
        folder = Path(settings.output_dir, f"fold_{k}") if numbered else Path(settings.output_dir)
        run = Run(folder, settings, cohort, cohort.folds(k), cache, world)
        run.begin()
        while not run.finished:
            run.one_epoch()
        run.finish()
        runs.append(folder)
        notes += [note for note in run.notes["test"] if note not in notes]
    if len(runs) > 1 and not world.rank:
        write_pooled(Path(settings.output_dir), runs, cohort.tasks, settings.n_bootstrap, notes)
    print(f"the encoder is in {runs[-1]}: embed/extract.py --weights {runs[-1]}")


def decoded(cohort, cache, settings, world):
    """The cohort less the videos that cannot be decoded, each decoded once by some process, and
    with the checksums of the frames."""
    paths = list(cohort.videos["path"])
    reasons = cache.fill(
        paths[world.rank :: world.size], settings.num_workers, quiet=world.rank > 0
    )
    reasons = {k: v for part in world.gather(reasons) for k, v in part.items()}
    names = cohort.videos.index[cohort.videos["path"].isin(list(reasons))]
    if len(names):
        why = {name: reasons[cohort.videos.at[name, "path"]] for name in names}
        print(f"WARNING: {len(names)} videos cannot be used and are left out:{listed(why)}")
    own = {path: cache.content(path) for path in paths[world.rank :: world.size]}
    content = {k: v for part in world.gather(own) for k, v in part.items()}
    cohort.videos = cohort.videos.assign(content=cohort.videos["path"].map(content))
    cohort = cohort.without(names)
    tell_copies(cohort, cache.copies(cohort.videos))
    return cohort


def main(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_options(parser, THIS, EncoderSettings)
    settings = resolved(vars(parser.parse_args(argv)))
    device = pick_device(settings.device)
    exact = exact_convolutions() if settings.precision == "fp32" else nullcontext()
    with exact, join_world(device, "train the encoder") as world:
        train(settings, world)


def program():
    """What the command line runs."""
    run_main(main, Path(sys.argv[0]).name)
