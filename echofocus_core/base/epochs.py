"""Shared by the training of models and of the encoder: epochs, checkpoints, resume."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from echofocus_core.base.checkpoints import load_safely, save
from echofocus_core.base.console import UserError
from echofocus_core.base.files import derive_seed, remove_temporaries
from echofocus_core.base.resume import check_resume, restoring
from echofocus_core.base.world import World

LAST = "last_checkpoint.pt"


@dataclass
class EpochProgress:
    """The progress within an epoch, as a checkpoint records it."""

    items: int = 0  # studies or videos done, in the epoch's order
    n: int = 0  # number of items that `losses` sums over
    losses: float = 0.0
    dropped: int = 0  # optimiser steps that were skipped because their loss was not finite
    seconds: float = 0.0
    waited: float = 0.0  # seconds of waiting for clips


class EpochTraining:
    """Training in epochs. The last checkpoint has the whole state, so a resume is exact.

    A subclass defines `items` (plural noun for what an epoch counts), `remedy` (for a run that
    cannot be resumed), history_key (in a checkpoint), losses_of (a history), scores, finished,
    best_file, one_epoch, state, read_record, facts, restore, write_best, write_history,
    write_start and refuse_finished_model.
    """

    def __init__(self, folder, settings, world=None):
        self.folder, self.settings, self.world = Path(folder), settings, world or World()
        self.history = []
        self.progress = EpochProgress()
        self.epoch_began = self.last_saved = time.time()

    @property
    def epoch(self):
        """The number of completed epochs."""
        return len(self.scores)

    @property
    def best_epoch(self):
        """The number of the epoch with the highest score, from 1; 0 before the first epoch ends."""
        scores = np.nan_to_num(self.scores, nan=-np.inf)  # NaN: no metric was defined
        return 1 + int(np.argmax(scores)) if self.scores else 0

    @property
    def losses(self):
        """(training, validation) loss of each epoch."""
        return self.losses_of(self.history)

    @property
    def epochs_since_best(self):
        return self.epoch - self.best_epoch

    def run(self):
        """Train until finished, from the last checkpoint if it exists."""
        self.begin()
        while not self.finished:
            self.one_epoch()

    def begin(self):
        """Resume from the last checkpoint, or start. Raises UserError."""
        path = self.folder / LAST
        resumed = path.is_file()
        if resumed:
            self.resume(path)
        else:
            self.refuse_finished_model()
        if len(set(self.world.gather((self.epoch, self.progress.items)))) > 1:
            raise UserError(
                f"the processes read different versions of {path}; put the model in a folder that "
                "all machines share"
            )
        if self.world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_temporaries(self.folder)
            if self.epoch:  # the run may have been killed after the checkpoint, before this
                self.write_history()
            if not self.finished:
                self.write_start(resumed)

    def resume(self, path):
        """Compare the checkpoint with this run, then restore its state. Raises UserError."""
        saved = load_safely(path)
        record = self.read_record(saved, path) if isinstance(saved, dict) else None
        if not record:
            raise UserError(f"{path} was not written by this program; {self.remedy}")
        state = self.state()
        with restoring(path, self.remedy):
            recorded = self.facts(record, saved)
            current = self.facts(self.read_record(state, path), state)
            check_resume(self.folder, recorded, current, remedy=self.remedy, is_fixed=self.is_fixed)
            self.restore(saved, record)
            self.progress = TypeAdapter(EpochProgress).validate_python(saved["progress"])
        self.check_best()
        if self.finished:
            print(f"{self.folder} has finished training; changed options are ignored")
            return
        items = f" and {self.progress.items} {self.items}" if self.progress.items else ""
        print(f"resuming {self.folder} after epoch {self.epoch}{items}")

    def is_fixed(self, name):
        """Whether a resume is refused if this one of the `facts` has changed."""
        return True

    def check_best(self):
        """UserError unless the best checkpoint is from this run and its best epoch.

        It may be from the next epoch, if the run was stopped just before it recorded that epoch.
        """
        path = self.best_file()
        try:
            saved = load_safely(path) if path and path.is_file() else {}
            losses = self.losses_of(saved[self.history_key])
        except (LookupError, TypeError, ValueError):
            losses = []
        allowed = {self.best_epoch} if self.finished else {self.best_epoch, self.epoch + 1}
        if len(losses) not in allowed or losses[: self.epoch] != self.losses[: len(losses)]:
            raise UserError(
                f"the best checkpoint of {self.folder} is missing or from another run than "
                f"{LAST}; restore it, or {self.remedy}"
            )

    def rest_of_epoch(self, items, number):
        """The items that `progress` does not count yet, in the order of epoch `number`."""
        rng = np.random.default_rng(derive_seed("order", self.settings.seed, number))
        return [items[i] for i in rng.permutation(len(items))[self.progress.items :]]

    def start_clock(self):
        self.last_saved = time.time()
        self.epoch_began = self.last_saved - self.progress.seconds

    def save_if_due(self):
        """Write a checkpoint if the last one is `checkpoint_minutes` old."""
        self.progress.seconds = time.time() - self.epoch_began
        if time.time() - self.last_saved >= 60 * self.settings.checkpoint_minutes:
            self.save_last()
            self.last_saved = time.time()

    def save_last(self):
        """Write the last checkpoint; the first process writes for all."""
        if self.world.rank == 0:
            save(self.state(), self.folder / LAST)

    def save(self):
        """Write the checkpoints of an epoch: best first, then last, which completes the epoch."""
        if self.world.rank == 0:
            if self.best_epoch == self.epoch:
                self.write_best()
            self.save_last()
            self.write_history()
        self.world.gather(None)  # the files are complete for every process


def refuse_finished_model(folder, weights, start, history, remedy):
    """UserError if training would overwrite a model that cannot be resumed.

    weights, start, history: files in the folder. A run that was killed before its first checkpoint
    has written `start` but not `history`; it starts again.
    """
    killed_early = start.is_file() and not history.is_file()
    if weights.is_file() and not (folder / LAST).is_file() and not killed_early:
        raise UserError(f"{folder} contains a trained model without {LAST}: {remedy}")
