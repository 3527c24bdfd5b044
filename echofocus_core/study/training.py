"""One training run of a study-level model: its network, state, epochs and checkpoints."""

import json
import platform
import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from echofocus_core import EMBED_DIM, __version__
from echofocus_core.base import checkpoints
from echofocus_core.base.console import UserError
from echofocus_core.base.epochs import EpochProgress, EpochTraining, refuse_finished_model
from echofocus_core.base.figures import plot_history
from echofocus_core.base.files import atomic_path, derive_seed, write_table
from echofocus_core.base.options import RECORDED, Settings, is_fixed
from echofocus_core.base.seen import all_seen
from echofocus_core.base.world import pick_device
from echofocus_core.study.config import Hazard, Input, Record, read_record
from echofocus_core.study.end_to_end import EncoderStart, EndToEnd
from echofocus_core.study.folds import refuse_other_folds
from echofocus_core.study.input_check import TrainingInput
from echofocus_core.study.labels import other_unit
from echofocus_core.study.loop import LoopContext, report_unreadable, run_all_steps, train_steps
from echofocus_core.study.network import build
from echofocus_core.study.sources import embeddings_name
from echofocus_core.study.validation import metric_line, validation_metrics

# The name of the training data where a resumed run has other data
DATA = "clip embeddings or videos (--allow_mixed accepts copies without a checksum)"

# ----------------------------------------------------------------------------------- the network


def fresh_network(settings, outputs, parent=None, units=(), width=EMBED_DIM):
    """The network of these settings with random weights from the seed, or those of a parent.

    parent: LoadedModel to start from, or None; units: of the labels; width: see `build`.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(derive_seed("weights", settings.seed))
        net = build(settings, len(outputs.names), outputs.groups, width)
    if parent and parent.record.width != width:
        raise UserError(
            f"{parent.folder.name} reads clip embeddings of {parent.record.width} features, not "
            f"{width}: it cannot be the start of this training"
        )
    if parent:
        copy_weights(net, outputs, parent, dict(units))
    if settings.freeze and not settings.end_to_end:  # otherwise EndToEnd freezes its parts
        for name, p in net.named_parameters():
            p.requires_grad_(net.is_head(name))
    return net


def rate_groups(net, settings):
    """Parameter groups of the optimiser, one per learning rate, with the head last."""
    rate, groups = settings.learning_rate, {}

    def rate_of(name):
        if net.is_head(name):
            return settings.head_learning_rate or rate
        return rate * settings.layer_decay ** net.layers_above(name)

    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    if settings.head_learning_rate:
        named.sort(key=lambda item: net.is_head(item[0]))
    for name, p in named:
        groups.setdefault(rate_of(name), []).append(p)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def copy_weights(net, outputs, parent, units):
    """Copy a parent model's weights; those of a label only if name, kind and unit are the same."""
    labels, kinds = outputs.names, parent.outputs.kind_of
    state, axes = net.state_dict(), net.label_axes()
    shared = [
        label
        for label in labels
        if kinds.get(label) == outputs.kind_of[label] and not other_unit(label, units, parent.units)
    ]
    to, origin = [labels.index(x) for x in shared], [parent.outputs.names.index(x) for x in shared]
    for name, tensor in parent.net.state_dict().items():
        if name in axes:
            rows, others = (x.movedim(axes[name], 0) for x in (state[name], tensor))
            rows[to] = others[origin].to(rows.device)
        else:
            state[name] = tensor
    net.load_state_dict(state)
    fresh = len(labels) - len(shared)
    print(f"starting from {parent.folder.name}: loaded {len(shared)} heads, {fresh} new heads")


# ---------------------------------------------------------------------------------- the training


def is_finished(losses, settings):
    """Whether a training with these validation losses, one per epoch, is finished."""
    since_best = len(losses) - 1 - int(np.argmin(losses)) if losses else 0
    return 0 < settings.epoch_lim <= len(losses) or since_best >= settings.epoch_early_stop


def refuse_model_without_checkpoint(folder):
    """UserError if training would overwrite the model in a folder instead of resuming it."""
    refuse_finished_model(
        folder, folder / "best_checkpoint.pt", folder / "run.json", folder / "train_losses.csv",
        f"train under another --model_name, with --init_from {folder.name} to start from it",
    )  # fmt: skip


class Training(EpochTraining):
    """The training of one study-level model."""

    read_record = staticmethod(read_record)
    items, history_key, remedy = "studies", "perf_log", "use another --model_name or --run_id"

    def __init__(self, folder, settings, cohort, store, parent=None, world=None, encoder_seen=()):
        super().__init__(folder, settings, world)  # history: [epoch, train_loss, val_loss, lr, s]
        self.cohort, self.task, self.store = cohort, cohort.task, store
        self.width = EMBED_DIM if settings.end_to_end else store.width(cohort.table.index)
        self.study = fresh_network(settings, cohort.outputs, parent, cohort.task.units, self.width)
        self.encoders = {}  # name -> Input, where several are joined
        self.encoder_start = EncoderStart.of(settings) if settings.end_to_end else None
        if self.encoder_start:
            encoder = self.encoder_start.loaded.model.encoder
            self.net = EndToEnd(
                encoder, self.study, settings.clips_at_once, settings.freeze, settings.ping_pong
            )
            groups = self.net.rate_groups(settings)
            self.training_input = TrainingInput(self.encoder_start.input(), None, None)
        else:
            self.net, groups = self.study, rate_groups(self.study, settings)
            patients = dict(cohort.table["pid"].loc[cohort.eids["train"]])
            self.training_input = TrainingInput.of(store, patients)
            if len(store.parts) > 1:
                for name, part in store.parts.items():
                    mine = {eid: pid for eid, pid in patients.items() if eid in part.files}
                    self.encoders[name] = TrainingInput.of(part, mine).input
        self.input = Input() if self.encoders else self.training_input.input
        self.net.to(pick_device(settings.device))
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, patience=3, factor=0.5
        )
        self.dropped = {}  # epoch -> steps that were skipped because their loss was not finite
        self.val_metrics = {}  # epoch -> {metric: value} of its validation
        self.thresholds = {}  # label -> probability, at the best epoch
        self.hazards = {}  # label -> Hazard, at the best epoch
        self.seen = all_seen([cohort.seen()], parent and parent.seen, encoder_seen)
        self.unreadable = {}
        self.plotted = 0.0  # when the curves were last drawn

    def losses_of(self, history):
        return [(row[1], row[2]) for row in history]

    @property
    def scores(self):
        return [-row[2] for row in self.history]

    @property
    def finished(self):
        return is_finished([row[2] for row in self.history], self.settings)

    def best_file(self):
        return self.folder / "best_checkpoint.pt"

    # ------------------------------------------------------------------------- record and resume

    def recorded_settings(self):
        """The settings that determine the weights, without paths, for files that may be shared."""
        settings = {name: getattr(self.settings, name) for name in RECORDED}
        return settings | {"init_from": Path(self.settings.init_from).name}

    def record(self):
        """What a checkpoint records about the training: see `Record`."""
        s, cohort = self.settings, self.cohort
        pairs = cohort.outputs.by_output.items()
        unlearnt = [output for output, label in pairs if label.name in cohort.unlearnt]
        learnt = cohort.table.loc[cohort.eids["train"], cohort.outputs.of_kind("regression")]
        ends = learnt.agg(["min", "max"]).dropna(axis=1)
        return Record(
            version=__version__, task=s.task, dataset=s.dataset, labels=cohort.labels,
            level=self.task.level, type=self.task.type, classes=self.task.classes,
            survival=self.task.survival, units=self.task.units, unlearnt=unlearnt,
            thresholds=self.thresholds, hazards=self.hazards, labels_sha256=cohort.digest,
            ranges={label: tuple(map(float, ends[label])) for label in ends},
            train_patients=cohort.table["pid"].loc[cohort.eids["train"]].nunique(),
            width=self.width, encoders=self.encoders, 
            embeddings="" if s.end_to_end else embeddings_name(self.store),
            encoder_sha256=self.input.weights_sha256 or "", input=self.input,
            settings=Settings(**self.recorded_settings()), loss_over_all_labels=True,
        )  # fmt: skip

    @cached_property
    def data_sha256(self):
        """SHA-256 of the data of all studies: see Store.digest."""
        return self.store.digest(self.cohort.table.index)

    def facts(self, record, saved):
        """name -> value of everything that a resumed run compares."""
        names = ("task", "dataset", "labels", "type", "classes", "level")
        facts = {name: getattr(record, name) for name in names}
        facts |= {name: getattr(record.settings, name) for name in RECORDED}
        facts["widths of the clip embeddings"] = record.width
        facts["values of the labels"] = record.labels_sha256
        facts["scaling of the labels (boxcox or --init_from)"] = saved["input_norm_dict"]
        return facts | {DATA: saved["embeddings_sha256"]}

    def is_fixed(self, name):
        """Whether a resume is refused if this fact has changed."""
        if name == DATA:
            return not self.settings.allow_mixed
        return name not in RECORDED or is_fixed(name)

    def state(self):
        """Everything that a checkpoint contains, with the names and shapes of published ones."""
        unused = ("numpy_random_state", "torch_random_state", "cuda_random_state")
        state = {
            "model_state_dict": self.study.state_dict(),
            "perf_log": self.history,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.scheduler.state_dict(),
            "input_norm_dict": self.cohort.scaling,
            **dict.fromkeys(unused),  # every draw depends only on the seed, epoch and study
            "progress": asdict(self.progress),
            "dropped": self.dropped,
            "val_metrics": self.val_metrics,
            "embeddings_sha256": self.data_sha256,
            "seen": [part.saved() for part in self.seen],
            "clip_mean": self.training_input.clip_mean,
            "novelty": self.training_input.novelty and self.training_input.novelty.to_save(),
            "echofocus": self.record().to_save(),
        }
        if self.encoder_start:
            state["encoder_state_dict"] = self.net.encoder.state_dict()
        return state

    def restore(self, saved, record):
        """Restore the state of a checkpoint."""
        refuse_other_folds(self.folder, self.cohort.folds)
        self.study.load_state_dict(saved["model_state_dict"])
        if self.encoder_start:
            self.net.encoder.load_state_dict(saved["encoder_state_dict"])
        self.optimizer.load_state_dict(saved["optimizer_state_dict"])
        self.scheduler.load_state_dict(saved["scheduler_state_dict"])
        self.history, self.dropped = list(saved["perf_log"]), dict(saved["dropped"])
        self.val_metrics = dict(saved.get("val_metrics", {}))
        self.thresholds, self.hazards = record.thresholds, record.hazards
        if record.settings.learning_rate != self.settings.learning_rate and not self.encoder_start:
            groups = zip(
                self.optimizer.param_groups, rate_groups(self.net, self.settings), strict=True
            )
            for group, fresh in groups:
                group["lr"] = fresh["lr"]

    def refuse_finished_model(self):
        refuse_model_without_checkpoint(self.folder)

    # -------------------------------------------------------------------------------- the epochs

    def context(self):
        """The LoopContext of training and validation."""
        return LoopContext(
            self.net, self.store, self.settings, self.cohort.targets, self.cohort.outputs,
            self.unreadable, self.world,
        )  # fmt: skip

    def one_epoch(self):
        """Train on every study once, validate, write checkpoints, history and curves."""
        number = self.epoch + 1
        self.start_clock()
        self.finish_epoch(number)
        validation = run_all_steps(self.context(), self.cohort.eids["val"])
        progress, rate = self.progress, self.optimizer.param_groups[0]["lr"]
        if not progress.n + progress.dropped or not len(validation):
            report_unreadable(self.unreadable)
            raise UserError("no study of the training or validation fold can be read")
        if not progress.n or not np.isfinite(validation.losses).all():
            raise UserError(
                f"the loss of epoch {number} is not finite: lower --learning_rate; the best "
                f"checkpoint is kept, and last_checkpoint.pt in {self.folder} is from the epoch "
                "before"
            )
        train_loss = progress.losses / progress.n
        loss = float(validation.losses.mean(dtype=np.float64))
        self.history.append([number, train_loss, loss, rate, time.time() - self.epoch_began])
        if progress.dropped:
            self.dropped[number] = progress.dropped
        self.progress = EpochProgress()
        self.scheduler.step(loss)
        if self.epochs_since_best == 0:
            self.decide(validation)
        metrics = validation_metrics(self.answers(validation), self.cohort.scaling)
        self.val_metrics[number] = {name: value for name, (value, _) in metrics.items()}
        print(
            f"{self.epoch_name(number)}: train loss {train_loss:.4f}, validation loss {loss:.4f}, "
            f"{metric_line(metrics)}, lr {rate:g}"
        )
        self.save()

    def epoch_name(self, number):
        """An epoch on screen, with its fold in a cross-validation."""
        s = self.settings
        return f"fold {s.fold} of {s.n_folds}, epoch {number}" if s.n_folds else f"epoch {number}"

    def finish_epoch(self, number):
        """Train on the studies of an epoch that `progress` does not count yet."""
        progress, step = self.progress, self.settings.batch_number
        if self.encoder_start:
            self.net.begin_epoch(number)
        eids, name = self.cohort.eids["train"], self.epoch_name(number)
        rest = self.rest_of_epoch(eids, number)
        for n, loss in train_steps(self.context(), rest, self.optimizer, number, name):
            progress.items = min(progress.items + step, len(eids))
            if np.isfinite(loss):
                progress.n, progress.losses = progress.n + n, progress.losses + n * loss
            else:
                progress.dropped += 1
                print(f"{name}: loss not finite; skipped the step, halved learning rates")
            self.save_if_due()

    def answers(self, validation):
        """[(label, targets (S, c), readable answers (S, n))] of Results, for labels that are
        learnt."""
        cohort, outputs = self.cohort, self.cohort.outputs
        truth = cohort.table.loc[validation.eids, outputs.columns].to_numpy()
        values = outputs.readable(validation.logits, cohort.scaling, {})
        return [
            part for part in outputs.parts(truth, values) if part[0].name not in cohort.unlearnt
        ]

    def decide(self, validation, target=None):
        """Choose thresholds and baseline hazards on the validation fold; target: the rule."""
        target = (self.settings.target if target is None else target) or "youden"
        self.thresholds, self.hazards = {}, {}
        for label, y, p in self.answers(validation):
            if (threshold := label.threshold(y, p, target)) is not None:
                self.thresholds[label.name] = threshold
            if (hazard := label.hazard(y, p)) is not None:
                self.hazards[label.outputs[0]] = Hazard(**hazard)

    def metrics(self, validation):
        """The metrics of a validation, as text."""
        return metric_line(validation_metrics(self.answers(validation), self.cohort.scaling))

    # ------------------------------------------------------------------------------------- files

    def write_start(self, resumed):
        """Write split.csv, the settings, versions and digests."""
        if not resumed:
            write_table(self.cohort.split.rename_axis("eid"), self.folder / "split.csv")
        names = {"model_name": self.folder.name, "task": self.settings.task}
        names |= {"dataset": self.settings.dataset} | self.recorded_settings()
        write_table(pd.DataFrame([names]), self.folder / "train_args.csv")
        run = {
            "settings": names,
            "settings_from_epoch": self.epoch + 1,  # a resume may have changed some
            "labels": self.cohort.labels,
            "studies": {fold: len(eids) for fold, eids in self.cohort.eids.items()},
            "labels_sha256": self.cohort.digest,
            "embeddings_sha256": self.data_sha256,
            "encoder_sha256": self.input.weights_sha256 or "",
            "device": str(next(self.study.parameters()).device),
            "processes": self.world.size,
            "versions": {"echofocus": __version__, "torch": torch.__version__}
            | {"numpy": np.__version__, "python": platform.python_version()},
        }
        with atomic_path(self.folder / "run.json") as temporary:
            temporary.write_text(json.dumps(run, indent=2))

    def write_best(self):
        if self.encoder_start:
            self.input = self.encoder_start.write(self.folder, self.seen)
        state = {k: v for k, v in self.state().items() if k != "encoder_state_dict"}
        checkpoints.save(state, self.best_file())

    def run(self):
        super().run()
        self.record_mean_answer()

    def record_mean_answer(self):
        """Add the outputs (T,) of the mean answer in the training fold to the best checkpoint, if
        they are not there yet: the answer for no videos, see `attribution.shapley_values`."""
        saved = checkpoints.load_safely(self.best_file())
        if self.encoder_start or "mean_answers" in saved:
            return
        last = {name: tensor.clone() for name, tensor in self.study.state_dict().items()}
        self.study.load_state_dict(saved["model_state_dict"])
        context = LoopContext(self.study, self.store, self.settings, world=self.world)
        outputs = run_all_steps(context, self.cohort.eids["train"]).logits
        self.study.load_state_dict(last)
        if self.world.rank == 0 and len(outputs):
            mean = self.cohort.outputs.mean(outputs, self.cohort.scaling)
            saved["mean_answers"] = torch.from_numpy(mean).float()
            checkpoints.save(saved, self.best_file())
        self.world.gather(None)  # the file is complete for every process

    def write_history(self):
        """Write the table and curves of all epochs."""
        columns = ["epochs_trained", "train_loss", "val_loss", "lr", "epoch_time"]
        history = pd.DataFrame(self.history, columns=columns)
        history["dropped_steps"] = [self.dropped.get(row[0], 0) for row in self.history]
        metrics = pd.DataFrame([self.val_metrics.get(row[0], {}) for row in self.history])
        history = history.join(metrics.add_prefix("val_"))
        write_table(history, self.folder / "train_losses.csv")
        if time.time() - self.plotted > 10 or self.finished:
            plot_history(history, self.folder / "training_progress", self.folder.name)
            self.plotted = time.time()
        if self.settings.tensorboard:
            write_tensorboard(history.iloc[-1], self.folder)


def write_tensorboard(row, folder):
    """Write the last epoch as scalars, into <folder>/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder / "tensorboard") as writer:
        for name in row.index.drop("epochs_trained"):
            writer.add_scalar(name, row[name], int(row["epochs_trained"]))
