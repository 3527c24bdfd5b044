"""One training run of a study-level model: its state, epochs and checkpoints."""

import json
import platform
import re
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pydantic import FiniteFloat, TypeAdapter

from echofocus_core import __version__
from echofocus_core.base import checkpoints
from echofocus_core.base.console import RUN, UserError
from echofocus_core.base.figures import plot_history
from echofocus_core.base.files import atomic_path, derive_seed, write_table
from echofocus_core.base.options import (
    RECORDED,
    Settings,
    is_fixed,
)
from echofocus_core.base.seen import all_seen
from echofocus_core.base.world import World, pick_device
from echofocus_core.study.config import (
    Hazard,
    Input,
    Record,
    read_record,
)
from echofocus_core.study.end_to_end import EndToEnd
from echofocus_core.study.folds import refuse_other_folds, write_split
from echofocus_core.study.input_check import TrainingInput
from echofocus_core.study.labels import other_unit
from echofocus_core.study.loading import (
    read_checkpoint,
)
from echofocus_core.study.loop import report_unreadable, run_steps, run_studies
from echofocus_core.study.network import StudyModel


def is_finished(losses, settings):
    """Whether a training with these validation losses, one an epoch, has come to its end."""
    stale = len(losses) - 1 - int(np.argmin(losses)) if losses else 0
    return 0 < settings.epoch_lim <= len(losses) or stale >= settings.epoch_early_stop


def fresh_network(settings, outputs, begun_from=None, units=()):
    """A StudyModel by these settings, its weights drawn by the seed or those of another model."""
    names = outputs.names
    with torch.random.fork_rng([]):
        torch.manual_seed(derive_seed("weights", settings.seed))
        net = StudyModel(
            len(names), settings.transformer_type, settings.encoder_depth, settings.tf_combine,
            outputs.groups,
        )  # fmt: skip
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
        facts = ("task", "dataset", "labels", "type", "classes", "level")
        pairs = {n: (getattr(before, n), getattr(now, n)) for n in facts}
        pairs |= {n: (getattr(then, n), v) for n, v in self.used().items()}
        for name, (was, value) in pairs.items():
            if was == value:
                continue
            if name in facts or is_fixed(name):
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
        from echofocus_core.study.validation import metric_line, thresholds_and_hazards

        cohort, outputs = self.cohort, self.cohort.outputs
        truth = cohort.table.loc[val.eids, outputs.columns].to_numpy()
        about = truth, outputs.readable(val.logits, cohort.scaling, {}), outputs
        learnt = [label for label in outputs.labels if label not in cohort.unlearnt]
        if best:
            rule = self.settings.target or "youden"
            self.thresholds, hazards = thresholds_and_hazards(*about, learnt, rule)
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
