"""Train the video encoder: labelled videos -> an encoder for `embed/extract.py --weights`.

    python embed/train.py --cohort echonetdynamic --data_dir EchoNet-Dynamic --output_dir runs/ef
    torchrun --nproc_per_node=8 embed/train.py --cohort hospital --output_dir panecho \\
        --model_name frame_transformer --arch convnext_tiny --fc_dropout 0.25 \\
        --normalization imagenet --augment --reduce_lr 3 --amp

Data flow: cohorts.read_cohort (tables) -> cache.FrameCache (each video decoded once) -> clips, read
ahead by threads -> backbone and heads -> masked multi-task loss -> history, weights, predictions
and metrics in --output_dir. Repeat the command to resume a stopped run.
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
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from echofocus_core import __version__
from echofocus_core.base.checkpoints import save
from echofocus_core.base.console import (
    EXTRACT,
    RUN,
    TRAIN_ENCODER,
    Parser,
    UserError,
    count_of,
    print_next,
    progress,
    reason_lines,
    run_main,
)
from echofocus_core.base.epochs import EpochProgress, EpochTraining, refuse_finished_model
from echofocus_core.base.files import atomic_path, derive_seed, write_table
from echofocus_core.base.log import message_log
from echofocus_core.base.options import FOLDS, add_options
from echofocus_core.base.parallel import map_ahead
from echofocus_core.base.seen import Seen
from echofocus_core.base.world import World, exact_convolutions, join_world, pick_device
from echofocus_core.encoder.cohorts import PEDIATRIC_FOLDS, read_cohort, report_copies
from echofocus_core.encoder.losses import MultiTaskLoss, class_weights, fill_means
from echofocus_core.encoder.report import score_of, validation_row, write_pooled, write_results
from echofocus_core.encoder.settings import COMMAND, RECORDED, EncoderSettings, resolve_settings
from echofocus_core.encoder.start import build_net, without_counters, without_seen_videos
from echofocus_core.study.folds import sample_ids
from echofocus_core.video.cache import ClipSampling, FrameCache
from echofocus_core.video.clip_tensors import as_input, draw_factors
from echofocus_core.video.panecho import activate, read_encoder, weights_path
from echofocus_core.video.record import EncoderRecord, EncoderTask, record_of

EXAMPLE = "--cohort echonetdynamic --data_dir EchoNet-Dynamic --output_dir runs/ef"  # of --help
READERS = 6  # threads; more read no faster and delay the steps (benchmarks/RESULTS.md)


@dataclass
class Predictions:
    """Activated outputs, columns (task, number of the output)."""

    videos: pd.DataFrame  # one row per video
    studies: pd.DataFrame  # the mean over a study's videos
    loss: float  # over videos
    task_losses: dict


class Run(EpochTraining):
    """The training of one encoder."""

    read_record = staticmethod(record_of)
    items, history_key, remedy = "videos", "history", "use another --output_dir"

    def __init__(self, folder, settings, cohort, folds, cache, world):
        super().__init__(folder, settings, world)  # history: two rows per epoch, `validation_row`
        self.cohort, self.cache = cohort, cache
        self.names = names_of(folds, settings)
        for fold in ("train", "val"):
            if not self.names.get(fold):
                raise UserError(f"no usable video in the {fold} fold of {cohort.name}")
        labels = cohort.labels.loc[self.names["train"]]
        self.tasks = fill_means(learnable_tasks(cohort.tasks, labels), labels)
        self.labels = cohort.labels[[t["name"] for t in self.tasks]]
        weighted = self.tasks if settings.use_class_weights else []
        weights = {t["name"]: class_weights(t, labels[t["name"]].to_numpy()) for t in weighted}
        self.loss = MultiTaskLoss(self.tasks, weights)
        net, self.start = build_net(settings, self.tasks, labels)
        unseen, self.notes = without_seen_videos(self.start, folds, cohort)
        self.names, self.left_out = names_of(unseen, settings), int((unseen != folds).sum())
        self.device = pick_device(settings.device)
        self.net = net.to(self.device)
        norms = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        self.synced = self.world.size > 1 and self.device.type == "cuda" and bool(norms)
        if self.synced:
            self.net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.net)
        kind = torch.optim.AdamW if settings.adamw else torch.optim.Adam
        self.optimizer = kind(self.net.parameters(), lr=settings.lr, weight_decay=settings.wd)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.scheduler = self.make_scheduler()
        self.by_metric = cohort.by_metric and self.metric_is_defined()
        self.scores = []  # one per epoch, higher is better

    def make_scheduler(self):
        s = self.settings
        if s.cos_anneal:
            return torch.optim.lr_scheduler.CosineAnnealingLR(
                self.optimizer, T_max=s.max_epochs, eta_min=s.eta_min
            )
        if s.reduce_lr:  # scores may be negative losses: a relative threshold would be wrong
            return torch.optim.lr_scheduler.ReduceLROnPlateau(
                self.optimizer, mode="max", patience=s.reduce_lr, factor=0.5,
                threshold=1e-4, threshold_mode="abs",
            )  # fmt: skip
        return None

    def metric_is_defined(self):
        """Whether AUROC or R2 of some task is defined on the validation fold; warns if not."""
        if (self.labels.loc[self.names["val"]].nunique() > 1).any():
            return True
        RUN.warning(
            "no label of the validation fold has two values; early stopping uses its loss instead"
        )
        return False

    # ---------------------------------------------------------------------------- record and resume

    def losses_of(self, history):
        losses = [row["loss"] for row in history]
        return list(zip(losses[::2], losses[1::2], strict=True))

    @property
    def finished(self):
        s = self.settings
        return self.epoch >= s.max_epochs or self.epochs_since_best >= s.patience

    def best_file(self):
        return weights_path(self.folder)

    def record(self):
        s = self.settings
        return EncoderRecord(
            tasks=[EncoderTask(**task) for task in self.tasks], version=__version__,
            cohort=self.cohort.name, model_name=s.model_name, arch=s.arch,
            normalization=s.normalization, size=s.size, clip_len=s.clip_len, layers=s.n_layers,
            heads=s.n_heads, epoch=self.best_epoch, started_from=self.start.name,
            started_sha256=self.start.sha256, licence=self.start.licence,
            labels_sha256=self.cohort.digest(), videos_sha256=self.cohort.content_digest(),
            left_out=self.left_out, settings={name: getattr(s, name) for name in RECORDED},
        )  # fmt: skip

    def facts(self, record, saved):
        """name -> value of everything that a resumed run compares."""
        facts = {
            "labels, folds or usable videos": record.labels_sha256,
            "pixels of some video": record.videos_sha256,
            "initial weights": record.started_sha256,
            "number of videos that the initial weights have seen": record.left_out,
            "tasks": [task.name for task in record.tasks],
            "types of the tasks": [task.type for task in record.tasks],
            "classes of the tasks": [task.classes for task in record.tasks],
        } | record.settings
        for task in record.tasks:
            if task.unit:
                facts[f"unit of {task.name}"] = task.unit.replace(" ", "").casefold()
        if "T_max" in saved["scheduler"]:  # the length of a cosine schedule
            facts["max_epochs"] = saved["scheduler"]["T_max"]
        return facts

    def state(self):
        """Everything that the last checkpoint contains."""
        return {
            "weights": without_counters(self.net.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else {},
            "scaler": self.scaler.state_dict(), "history": self.history, "scores": self.scores,
            "progress": asdict(self.progress), "encoder": self.record().to_save(),
        }  # fmt: skip

    def restore(self, saved, record):
        """Restore the state of a checkpoint."""
        self.net.load_state_dict(saved["weights"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        if self.scheduler:
            self.scheduler.load_state_dict(saved["scheduler"])
        self.history, self.scores = list(saved["history"]), list(saved["scores"])

    def refuse_finished_model(self):
        if self.settings.resume:
            raise UserError(f"--resume: there is no run in {self.folder} to resume")
        start, history = self.folder / "encoder.json", self.folder / "history.csv"
        refuse_finished_model(self.folder, self.best_file(), start, history, self.remedy)

    # -------------------------------------------------------------------------------------- batches

    def batches(self, steps, n_clips, sampling, seed):
        """Yield (names, clips uint8 (len * n_clips, L, S, S, 3)) of each list of names, read ahead
        by threads; the clips of a video are consecutive."""
        threads = self.settings.num_workers or max(1, min(READERS, os.cpu_count() or 1))
        paths, names = self.cohort.videos["path"], [name for step in steps for name in step]

        def read(name):
            return self.cache.clips(paths[name], n_clips, sampling, seed, name)

        most = 1 + 2 * threads + 2 * max(map(len, steps), default=0)
        with ThreadPoolExecutor(threads, "clips") as pool:
            clips = map_ahead(pool, read, names, most)
            for step in steps:
                began = time.perf_counter()
                step_clips = [next(clips) for _ in step]
                self.progress.waited += time.perf_counter() - began
                yield step, torch.from_numpy(np.concatenate(step_clips)) if step else None

    def forward(self, clips, keys=None, seed=0):
        """Raw outputs of uint8 clips, dict of task to (B, n); keys: seed the draws in training."""
        s = self.settings
        x = as_input(clips.to(self.device, non_blocking=True), s.normalization)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(s.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            if keys is None:
                return self.net(x)
            encoder, n_tasks = self.net.encoder, len(self.tasks)
            depth, heads = draw_factors(encoder, keys, seed, s.clip_len, s.fc_dropout, n_tasks)
            embeddings = encoder(x) if depth is None else encoder(x, depth)
            return self.net.read(embeddings, heads)

    # ------------------------------------------------------------------------------------- training

    def one_epoch(self):
        """Train on every video once, validate, write weights, history and curves."""
        number = self.epoch + 1
        self.start_clock()
        self.finish_epoch(number)
        done, images = self.progress, len(self.names["train"]) * self.settings.clip_len
        train_loss = done.losses / len(self.names["train"])
        seconds, waited = max(done.seconds, 1e-9), done.waited
        validation, lr = self.predict("val"), self.optimizer.param_groups[0]["lr"]
        row = validation_row(self.tasks, validation.studies, self.truths(validation.studies))
        score = score_of(row) if self.by_metric else -validation.loss
        shared = {"lr": lr, "seconds": seconds}
        self.history.append({"epoch": number, "phase": "train", "loss": train_loss} | shared)
        row = {"epoch": number, "phase": "val", "loss": validation.loss} | row
        self.history.append(row | validation.task_losses | shared)
        self.scores.append(score)
        self.progress = EpochProgress()
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(score)
        elif self.scheduler:
            self.scheduler.step()
        print(
            f"epoch {number}: train loss {train_loss:.4f}, validation loss {validation.loss:.4f}, "
            f"{'AUROC and R2' if self.by_metric else 'score'} {score:.4f}, lr {lr:g}, "
            f"{images / seconds:.0f} images/s, {waited / seconds:.0%} of the time waiting for "
            "videos"
        )
        self.save()

    def finish_epoch(self, number):
        """Train on the videos of an epoch that `progress` does not count yet."""
        s, done, world = self.settings, self.progress, self.world
        seed, rest = derive_seed(s.seed, number), self.rest_of_epoch(self.names["train"], number)
        steps = steps_of(rest, s.batch_size * world.size, world.size if self.synced else 1)
        parts = [step[world.rank :: world.size] for step in steps]
        sampling = ClipSampling(s.clip_len, s.size, s.sampling_rate, s.augment)
        self.net.train()
        bar = progress(
            zip(steps, self.batches(parts, 1, sampling, seed), strict=True),
            desc=f"epoch {number}", total=len(steps), unit="step", leave=False,
            disable=world.rank > 0,
        )  # fmt: skip
        for step, (names, clips) in bar:
            loss = self.step(step, names, clips, seed)
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss of epoch {number} is not finite: lower --lr, or leave out --amp; "
                    f"last_checkpoint.pt in {self.folder} is from an earlier step"
                )
            done.items += len(step)
            done.losses += loss * len(step)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self.save_if_due()

    def step(self, step, names, clips, seed):
        """One optimiser step on the videos `step`, of which this process computes `names`.

        Returns the loss.
        """
        divisors = self.loss.divisors(self.labels.loc[step].to_numpy())
        loss = torch.zeros((), device=self.device)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # for layers that use torch's generator
            torch.manual_seed(derive_seed("step", seed, step[0], self.world.rank))
            if names:
                targets = self.labels.loc[names].to_numpy(np.float32, copy=True)
                outputs = self.forward(clips, names, seed)
                sums = self.loss.sums(outputs, torch.from_numpy(targets).to(self.device))
                loss = self.loss.mean(sums, divisors)
                self.scaler.scale(loss).backward()
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        if self.world.size > 1:
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            for p, gradient in zip(parameters, self.world.sum_each(gradients), strict=True):
                p.grad = gradient
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return float(self.world.sum(loss.detach().double()))

    # ---------------------------------------------------------------------------------- predictions

    @torch.no_grad()
    def predict(self, fold):
        """The Predictions of a fold's videos; the processes share the work."""
        names, world, s = self.names[fold], self.world, self.settings
        part = names[world.rank :: world.size]
        each = max(1, s.batch_size // s.num_clips)
        steps = [part[i : i + each] for i in range(0, len(part), each)]
        sampling = ClipSampling(s.clip_len, s.size, s.sampling_rate)
        self.net.eval()
        batches = self.batches(steps, s.num_clips, sampling, derive_seed("clips", s.seed))
        batches = progress(
            batches, desc=fold, total=len(steps), unit="step", leave=False, disable=world.rank > 0
        )
        means = {}
        for step, clips in batches:
            outputs = self.forward(clips)
            flat = torch.cat([outputs[t["name"]].float() for t in self.tasks], 1)
            mean = flat.view(len(step), s.num_clips, -1).mean(1).cpu().numpy()
            means |= zip(step, mean, strict=True)
        means = {k: v for part in world.gather(means) for k, v in part.items()}
        return self.predictions(pd.DataFrame(np.stack([means[name] for name in names]), names))

    def predictions(self, raw):
        """Predictions from raw outputs, one row per video."""
        names, targets = list(self.labels), self.labels.loc[raw.index].to_numpy()
        sizes = [len(t["class_names"]) if t["type"].startswith("multi") else 1 for t in self.tasks]
        outputs = torch.tensor(raw.to_numpy()).split(sizes, dim=1)
        outputs = dict(zip(names, outputs, strict=True))
        divisors = self.loss.divisors(targets)
        sums = self.loss.sums(outputs, torch.tensor(targets).float())
        losses = {
            f"{name}_loss": float(total) / float(n) if n else math.nan
            for name, total, n in zip(names, sums, divisors, strict=True)
        }
        parts = {}  # values in units, probabilities of classes, or of the second class
        for t in self.tasks:
            z = outputs[t["name"]]
            is_binary = t["type"].startswith("binary")
            parts[t["name"]] = (torch.sigmoid(z) if is_binary else activate(z, t)).numpy()
        columns = [(name, i) for name, part in parts.items() for i in range(part.shape[1])]
        values = np.concatenate(list(parts.values()), axis=1)
        videos = pd.DataFrame(values, raw.index, pd.MultiIndex.from_tuples(columns))
        study = self.cohort.videos.loc[raw.index, "study"]
        loss = float(self.loss.mean(sums, divisors))
        return Predictions(videos, videos.groupby(study).mean(), loss, losses)

    def truths(self, studies):
        """Labels of studies: the first value among a study's videos."""
        return self.labels.groupby(self.cohort.videos["study"]).first().loc[studies.index]

    # ---------------------------------------------------------------------------------------- files

    def write_start(self, resumed=False):
        """Write encoder.json, for human readers."""
        with atomic_path(self.folder / "encoder.json") as temporary:
            temporary.write_text(json.dumps(self.record().to_save(), indent=2) + "\n")

    def write_best(self):
        """Write chkpt_epoch-N.pt; delete the previous best file and its results."""
        path = self.folder / f"chkpt_epoch-{self.epoch}.pt"
        state = {k: v for k, v in self.state().items() if k in ("weights", "encoder", "history")}
        videos = [self.cohort.videos.loc[self.names[f]].assign(fold=f) for f in ("train", "val")]
        split = pd.concat(videos).set_index("study").rename(columns={"patient": "pid"})
        seen = [Seen.of(split, self.cohort.digest()[:32]), *self.start.seen]
        save(state | {"seen": [part.saved() for part in seen]}, path)
        self.write_start()
        for old in (*self.folder.glob("chkpt_epoch-*.pt"), *self.folder.glob("*_summary.txt")):
            if old != path:
                old.unlink()

    def write_history(self):
        write_table(pd.DataFrame(self.history), self.folder / "history.csv")

    def write_results(self):
        """Write predictions, metrics and figures of the best weights, unless they exist."""
        folds = [fold for fold in ("val", "test") if self.names.get(fold)]
        summaries = [self.folder / f"{fold}_summary.txt" for fold in folds]
        if all(path.is_file() for path in summaries):  # a new best epoch deletes them
            print(f"{self.folder} is finished")
            return
        best = self.folder / f"chkpt_epoch-{self.best_epoch}.pt"
        self.net.load_state_dict(read_encoder(best).state)
        print(f"best: epoch {self.best_epoch} of {self.epoch}")
        for fold in folds:
            predictions = self.predict(fold)
            if not self.world.rank:
                write_results(self, fold, predictions)
        self.world.gather(None)


def learnable_tasks(tasks, labels):
    """The tasks with different training labels; warns about the others."""
    kept = []
    for task in tasks:
        if labels[task["name"]].nunique() > 1:
            kept.append(task)
        else:
            RUN.warning(f"{task['name']} cannot be learnt: all its training labels are equal")
    if not kept:
        raise UserError(
            "no task can be learnt: a task needs at least two different training labels"
        )
    return kept


def steps_of(order, each, least=1):
    """Lists of `each` names. The last may be shorter; with fewer than `least` names it is joined
    to the one before, since processes that share batch statistics need a video in every step.
    """
    if 0 < len(order) < least:
        raise UserError(
            f"{len(order)} training videos are too few for {least} processes that share batch "
            "statistics: use fewer processes"
        )
    steps = [order[i : i + each] for i in range(0, len(order), each)]
    if steps and len(steps[-1]) < least:
        steps[-2:] = [steps[-2] + steps[-1]]
    return steps


def names_of(folds, settings):
    """Fold -> the names of its videos, at most --sample_limit, chosen by a hash of the names."""
    each = {fold: folds.index[folds == fold] for fold in FOLDS}
    return {k: sample_ids(sorted(v), settings.sample_limit) for k, v in each.items() if len(v)}


# ------------------------------------------------------------------------------------- command line


def train(settings, world=None):
    """Train, validate and test; every process calls this."""
    world = world or World()
    cohort = read_cohort(settings.cohort, settings.data_dir, settings.tasks)
    cache = FrameCache(settings.cache_dir, settings.size)
    cohort = decode_cohort(cohort, cache, settings, world)
    numbered = settings.cohort == "echonetpediatric"
    folds = range(PEDIATRIC_FOLDS) if numbered and settings.fold < 0 else [max(settings.fold, 0)]
    folders, notes = [], []
    for k in folds:
        folder = Path(settings.output_dir, f"fold_{k}") if numbered else Path(settings.output_dir)
        run = Run(folder, settings, cohort, cohort.folds(k), cache, world)
        run.run()
        run.write_results()
        folders.append(folder)
        notes += [note for note in run.notes["test"] if note not in notes]
    if len(folders) > 1 and not world.rank:
        write_pooled(Path(settings.output_dir), folders, cohort.tasks, settings.n_bootstrap, notes)
    print(f"the encoder is in {folder}")
    print_next(f"{EXTRACT} videos --out embeddings --weights {folder}")


def decode_cohort(cohort, cache, settings, world):
    """Decode each video once; the processes share the work. Returns the cohort of usable videos,
    with checksums of their frames."""
    paths = list(cohort.videos["path"])
    part = paths[world.rank :: world.size]
    reasons = cache.fill(part, settings.num_workers, quiet=world.rank > 0)
    reasons = {k: v for part in world.gather(reasons) for k, v in part.items()}
    names = cohort.videos.index[cohort.videos["path"].isin(list(reasons))]
    if len(names):
        why = {name: reasons[cohort.videos.at[name, "path"]] for name in names}
        RUN.warning(f"{count_of(len(names), 'videos')} cannot be used:{reason_lines(why)}")
    content = {path: cache.content(path) for path in part}
    content = {k: v for part in world.gather(content) for k, v in part.items()}
    cohort.videos = cohort.videos.assign(content=cohort.videos["path"].map(content))
    cohort = cohort.without(names)
    report_copies(cohort, cache.copies(cohort.videos))
    return cohort


def main(argv=None):
    parser = Parser("", TRAIN_ENCODER, __doc__.split("\n\n")[0], EXAMPLE)
    add_options(parser, COMMAND, EncoderSettings)
    settings = resolve_settings(vars(parser.parse_args(argv)))
    device = pick_device(settings.device)
    exact = exact_convolutions() if settings.precision == "fp32" else nullcontext()
    with message_log(settings), exact, join_world(device, "train the encoder") as world:
        train(settings, world)


def program():
    """Run the command line."""
    run_main(main, Path(sys.argv[0]).name)
