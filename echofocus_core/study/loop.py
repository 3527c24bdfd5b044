"""The loop of training and prediction: read studies ahead, batch them, run the network."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch

from echofocus_core import EMBED_DIM as D
from echofocus_core.base.console import RUN, progress, reason_lines
from echofocus_core.base.files import derive_seed
from echofocus_core.base.parallel import map_ahead
from echofocus_core.base.world import World
from echofocus_core.study.outputs import Outputs, study_losses
from echofocus_core.study.step_losses import with_output_grads
from echofocus_core.video.store import UnreadableStudy

READERS = min(16, os.cpu_count() or 1)  # threads that read studies
READ_AHEAD = 3  # batches read while another is computed
WINDOW = 256  # studies of a step outside training, after which results are yielded
LOWEST_RATE = 1e-7  # a non-finite loss does not lower a learning rate below this


@dataclass(frozen=True)
class LoopContext:
    """Everything that a pass over studies needs, except the studies."""

    net: torch.nn.Module
    store: Any
    settings: Any
    targets: dict | None = None  # study id -> targets (C,), NaN if missing
    outputs: Outputs | None = None  # of the targets, see `study.outputs`
    unreadable: dict = field(default_factory=dict)  # gets study id -> reason; these are skipped
    world: World = World()  # the processes that share each step
    look: Callable | None = None  # called with the id and StudyClips of every study

    @property
    def device(self):
        return next(self.net.parameters()).device

    def targets_of(self, eids):
        """The targets of some studies, (S, C) float32."""
        return torch.from_numpy(np.stack([self.targets[eid] for eid in eids]).astype(np.float32))


@dataclass
class Planned:
    """Studies that are computed together."""

    eids: list[str]
    ends_step: bool  # the last batch of its step


@dataclass
class Batch:
    """The clips of several studies, joined without padding. Empty if no study can be read."""

    eids: list[str]
    tokens: torch.Tensor  # (N, D) float32; for an EndToEnd uint8 images (N, L, S, S, 3)
    lengths: list[int]  # clips of each study; sums to N
    n_videos: list[int]
    ends_step: bool
    # Only for losses that depend on the whole step, see `step_losses`:
    losses: torch.Tensor | None = None  # (S,)
    output_grad: torch.Tensor | None = None  # gradient with respect to the outputs, (S, O)


@dataclass
class Results:
    """Results of the loop, one row per study."""

    eids: list[str]
    logits: np.ndarray  # (S, T) float32
    embeddings: np.ndarray  # (S, D) float32; (S, 0) in training and validation
    losses: np.ndarray  # (S,) float32; empty without targets
    n_videos: list[int]
    n_clips: list[int]

    def __len__(self):
        return len(self.eids)

    def take(self, rows):
        """Results of these rows, in this order."""
        columns = []
        for column in (getattr(self, f.name) for f in fields(self)):
            if isinstance(column, np.ndarray):
                columns.append(column[rows] if len(column) else column)
            else:
                columns.append([column[i] for i in rows])
        return Results(*columns)


# ----------------------------------------------------------------------------------------- batches


def plan_batches(store, eids, settings, training, world=None):
    """Yield the Planned batches of this process; the last one of a step has `ends_step`.

    A step is `settings.batch_number` studies in training. Within a step, studies of similar size
    share a batch, up to the limits in `settings`; the plan depends only on the studies. The
    batches of a step are divided among the processes of `world`.
    """
    world = world or World()
    step = settings.batch_number if training else WINDOW
    kept = 1 - settings.clip_dropout if training else 1
    for start in range(0, len(eids), step):
        chunk = eids[start : start + step]
        sizes = {eid: kept * store.size(eid) for eid in chunk}
        batches, n = [[]], 0.0
        for eid in sorted(chunk, key=sizes.get, reverse=True):  # largest first: peak memory early
            full = settings.batch_size and len(batches[-1]) == settings.batch_size
            if batches[-1] and (full or n + sizes[eid] > settings.batch_tokens):
                batches.append([])
                n = 0.0
            batches[-1].append(eid)
            n += sizes[eid]
        *others, last = batches[world.rank :: world.size] or [[]]
        yield from (Planned(batch, False) for batch in others)
        yield Planned(last, True)


def read_batches(store, plan, settings, unreadable, train_seed=None, look=None, pin=False):
    """Yield the Batch of every Planned, in order; threads read ahead, and one thread joins clips.

    unreadable: dict that gets study id -> reason for studies that cannot be read and are skipped.
    train_seed: in training; draws, for each study, a transformed copy of the videos if available,
    and the clips that `settings.clip_dropout` leaves out; at least one clip remains.
    look: called with the id and the StudyClips of every study that is read.
    pin: use page-locked memory, which a GPU copies from while it computes.
    """

    def read(eid):
        """(tokens (N, D), number of videos) of a study, or the UnreadableStudy."""
        rng = None
        if train_seed is not None:
            rng = np.random.default_rng(derive_seed("study", train_seed, eid))
        try:
            study = store.read(eid, rng)
        except UnreadableStudy as error:
            return error
        if look:
            look(eid, study)
        tokens = study.embeddings  # (V, C, D), or of images (V, C, L, S, S, 3)
        tokens = tokens.reshape(-1, *tokens.shape[2:])
        if rng is not None and settings.clip_dropout:
            kept = np.flatnonzero(rng.random(len(tokens)) >= settings.clip_dropout)
            tokens = tokens[kept if len(kept) else rng.integers(len(tokens), size=1)]
        return tokens, len(study.videos)

    def collect(planned, futures):
        studies = {eid: f.result() for eid, f in zip(planned.eids, futures, strict=True)}
        failed = {eid: x for eid, x in studies.items() if isinstance(x, UnreadableStudy)}
        unreadable.update((eid, str(error)) for eid, error in failed.items())
        read = {eid: x for eid, x in studies.items() if eid not in failed}
        return collate(read, planned.ends_step, pin)

    with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(1) as joiner:
        jobs = ((batch, [readers.submit(read, eid) for eid in batch.eids]) for batch in plan)
        yield from map_ahead(joiner, lambda job: collect(*job), jobs, READ_AHEAD + 1)


def collate(studies, ends_step, pin=False):
    """A Batch of studies; studies: id -> (tokens, number of videos)."""
    tokens = [tokens for tokens, _ in studies.values()]
    each = tokens[0].shape[1:] if tokens else (D,)
    kind = torch.uint8 if len(each) > 1 else torch.float32  # images, or embeddings
    joined = torch.empty(sum(map(len, tokens)), *each, dtype=kind, pin_memory=pin)
    if tokens:
        np.concatenate(tokens, out=joined.numpy())
    n_videos = [n for _, n in studies.values()]
    return Batch(list(studies), joined, [len(t) for t in tokens], n_videos, ends_step)


# ---------------------------------------------------------------------------------------- the loop


def run_steps(context, eids, optimizer=None, epoch=0, label=""):
    """Run every study through the net once, in steps (`plan_batches`).

    Yields (Results, number of studies, mean loss) of each step. With an optimiser the net is
    trained: each step ends with an update on the mean of its studies' losses. The batches of a step
    are divided among the processes of `context.world`, which sum their gradients, so that all make
    the same update. Results has only the studies of this process; the number and the mean loss
    are over all processes.

    Random draws depend only on (settings.seed, epoch, study): a resumed epoch continues exactly
    as an uninterrupted one.
    """
    net, world, settings = context.net, context.world, context.settings
    training = optimizer is not None
    seed = derive_seed("dropout", settings.seed, epoch) if training else None
    batches = read_batches(
        context.store, plan_batches(context.store, eids, settings, training, world), settings,
        context.unreadable, derive_seed(settings.seed, epoch) if training else None, context.look,
        pin=context.device.type == "cuda",
    )  # fmt: skip
    if training and context.outputs.by_step:
        batches = with_output_grads(
            batches, lambda batch: forward(context, batch, seed, graph=False)[0], context
        )
    net.train(training)
    rows, total, average = [], None, None
    hidden = not label or world.rank > 0
    with progress(total=len(eids), desc=label, unit="study", leave=False, disable=hidden) as bar:
        compute = partial(run_batch, context, seed=seed)
        for batch, result in compute_parallel(batches, compute, context.device):
            if batch.eids:
                *arrays, gradients = result
                total = add_gradients(total, gradients)
                rows.append((batch.eids, *arrays, batch.n_videos, batch.lengths))
                bar.update(len(batch.eids) if world.size == 1 else 0)
            if not batch.ends_step:
                continue
            results, rows = results_of_rows(rows, net), []
            n, loss = len(results), np.nan
            if training:
                n, loss = update(net, optimizer, total, results.losses, world)
                total = None
                bar.update(n if world.size > 1 else 0)
                if np.isfinite(loss):
                    average = loss if average is None else 0.9 * average + 0.1 * loss
                bar.set_postfix(loss=f"{loss if average is None else average:.4f}", refresh=False)
            yield results, n, loss


def compute_parallel(batches, compute, device):
    """Yield (batch, compute(batch)) in order; on a CPU several batches of a step run at a time.

    Each core computes a separate batch: a product split over the cores waits for the slowest core,
    so that another job on one core would halve the speed.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        yield from ((batch, compute(batch)) for batch in batches)
        return

    def rest_of_step(batch):
        yield batch
        if not batch.ends_step:
            for batch in batches:
                yield batch
                if batch.ends_step:
                    return

    try:
        with ThreadPoolExecutor(threads, "batch", torch.set_num_threads, (1,)) as pool:
            for first in batches:
                step = rest_of_step(first)
                yield from map_ahead(pool, lambda batch: (batch, compute(batch)), step, threads + 1)
    finally:
        torch.set_num_threads(threads)  # new threads take the last number that was set


def forward(context, batch, seed, graph):
    """(logits (S, O), embeddings) of a Batch on the net's device; seed: of the dropout."""
    device = context.device
    half = context.settings.precision == "bf16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)
    with torch.set_grad_enabled(graph), autocast, dropout_rng(seed, batch.eids, device) as rng:
        tokens = batch.tokens
        if tokens.is_floating_point():  # images go to the device a group of clips at a time
            tokens = tokens.to(device, non_blocking=True).float()
        logits, embeddings = context.net(tokens, batch.lengths, rng)
        return logits.float(), embeddings


def run_batch(context, batch, seed=None):
    """(logits, embeddings, losses, gradients) of a Batch, on the net's device; None if empty.

    seed: of the dropout, in training. Losses (S,) and gradients (of `trainable_parameters`) are
    only computed in training. Embeddings are (S, 0) if there are targets.
    """
    if not batch.eids:
        return None
    training = seed is not None
    logits, embeddings = forward(context, batch, seed, graph=training)
    losses, gradients = torch.zeros(0), None
    if training:
        parameters = trainable_parameters(context.net)
        if batch.output_grad is not None:
            losses, output_grad = (x.to(context.device) for x in (batch.losses, batch.output_grad))
            gradients = torch.autograd.grad(logits, parameters, output_grad)
        else:
            targets = context.targets_of(batch.eids).to(context.device)
            with torch.enable_grad():
                losses = study_losses(logits, targets, context.outputs)
            gradients = torch.autograd.grad(losses.sum(), parameters)
    if context.targets is not None:
        embeddings = embeddings[:, :0]
    return logits.detach(), embeddings.detach().float(), losses.detach(), gradients


@contextmanager
def dropout_rng(seed, eids, device):
    """Yield the generator for dropout: a numpy Generator; on a GPU None, for torch's generator.

    The state of torch's generators is restored after the block.
    """
    if seed is None:
        yield None
    elif device.type == "cpu":
        yield np.random.default_rng(derive_seed(seed, eids[0]))
    else:
        with torch.random.fork_rng([device]):
            torch.manual_seed(derive_seed(seed, eids[0]))
            yield None


def trainable_parameters(net):
    """The parameters that are not frozen."""
    return [p for p in net.parameters() if p.requires_grad]


def add_gradients(total, gradients):
    """Add the second list of tensors to the first, in place; either may be None."""
    if total is None or gradients is None:
        return gradients if total is None else total
    torch._foreach_add_(total, gradients)
    return total


def update(net, optimizer, gradients, losses, world):
    """One optimiser step on the mean gradient over the studies of all processes.

    gradients: their sum over this process's studies, None without studies. Returns the number of
    all studies and their mean loss. If the loss or a gradient is not finite, the step is skipped,
    the learning rates are halved, and the returned loss is NaN.
    """
    parameters = trainable_parameters(net)
    gradients = gradients or [torch.zeros_like(p) for p in parameters]
    n_and_loss = torch.tensor([len(losses), losses.sum(dtype=np.float64)]).to(gradients[0])
    if world.size > 1:
        parts = [*gradients, n_and_loss]
        flat = world.sum(torch.cat([part.flatten() for part in parts]))
        *parts, n_and_loss = flat.split([part.numel() for part in parts])
        gradients = [x.view_as(g) for x, g in zip(parts, gradients, strict=True)]
    n, loss = n_and_loss.tolist()
    finite = np.isfinite(loss) and torch.stack(torch._foreach_norm(gradients)).isfinite().all()
    if n and not finite:
        for group in optimizer.param_groups:
            group["lr"] = max(group["lr"] / 2, min(group["lr"], LOWEST_RATE))
        return int(n), np.nan
    if n:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient.div_(n)
        optimizer.step()
    optimizer.zero_grad()
    return int(n), loss / max(n, 1)


# ----------------------------------------------------------------------------------------- results


def run_studies(net, store, eids, settings, label="", **options):
    """See `run_all_steps`; options: of LoopContext."""
    return run_all_steps(LoopContext(net, store, settings, **options), eids, label)


def run_all_steps(context, eids, label=""):
    """Collect `run_steps`: Results with a row for each readable study, in the given order.

    With targets it includes the studies' losses; survival losses depend on all studies.
    """
    steps = [results for results, _, _ in run_steps(context, eids, label=label)]
    results = merge_results(steps, eids, context.net, context.world)
    if context.targets is not None and len(results):
        targets = context.targets_of(results.eids)
        losses = study_losses(torch.from_numpy(results.logits), targets, context.outputs)
        results = replace(results, losses=losses.numpy())
    return results


def merge_results(steps, eids, net, world=None):
    """Join the Results of several steps and processes, in the order of `eids`."""
    steps = chain(*(world or World()).gather(steps))
    results = results_of_rows([[getattr(x, f.name) for f in fields(x)] for x in steps], net)
    place = {eid: i for i, eid in enumerate(eids)}
    return results.take(sorted(range(len(results)), key=lambda i: place[results.eids[i]]))


def results_of_rows(rows, net):
    """Join rows with the fields of Results, tensors or arrays, into Results."""
    rows = [row for row in rows if row[0]]  # without steps in which nothing could be read
    if not rows:
        return Results([], np.zeros((0, net.n_outputs)), np.zeros((0, 0)), np.zeros(0), [], [])
    columns = []
    for column in zip(*rows, strict=True):
        if isinstance(column[0], list):
            columns.append(list(chain(*column)))
        else:
            columns.append(np.concatenate([torch.as_tensor(x).cpu().numpy() for x in column]))
    return Results(*columns)


def report_unreadable(unreadable, listener=RUN):
    """Report which studies could not be read, and why."""
    if unreadable:
        listener.warning(
            f"{len(unreadable)} studies cannot be read:{reason_lines(unreadable, 50)}",
            "copy or extract damaged files again; the studies are left out",
        )
