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
from threadpoolctl import threadpool_limits

from echofocus_core.base.console import RUN, count_of, progress, reason_lines
from echofocus_core.base.files import derive_seed
from echofocus_core.base.parallel import map_ahead
from echofocus_core.base.world import World
from echofocus_core.study.outputs import Outputs, study_losses
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
class Batch:
    """The clips of several studies, joined without padding. Empty if no study can be read."""

    eids: list[str]
    tokens: torch.Tensor  # (N, D) float32; for an EndToEnd uint8 images (N, L, S, S, 3)
    lengths: list[int]  # clips of each study; sums to N
    n_videos: list[int]
    ends_step: bool
    # Only for losses that depend on the whole step, see `with_output_grads`:
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

    def columns(self):
        return [getattr(self, f.name) for f in fields(self)]

    def take(self, rows):
        """Results of these rows, in this order."""
        columns = []
        for column in self.columns():
            if isinstance(column, np.ndarray):
                columns.append(column[rows] if len(column) else column)
            else:
                columns.append([column[i] for i in rows])
        return Results(*columns)


# ----------------------------------------------------------------------------------------- batches


def plan_batches(context, eids, training):
    """Yield (study ids, whether it ends a step) of each batch of this process.

    A step is `settings.batch_number` studies in training. Within a step, studies of similar size
    share a batch, up to the limits in `settings`; the plan depends only on the studies. The
    batches of a step are divided among the processes.
    """
    settings, world = context.settings, context.world
    step = settings.batch_number if training else WINDOW
    kept = 1 - settings.clip_dropout if training else 1
    single = training and settings.video_sampling == "one"
    for start in range(0, len(eids), step):
        studies = eids[start : start + step]
        sizes = {eid: 1 if single else kept * context.store.size(eid) for eid in studies}
        batches, n = [[]], 0.0
        for eid in sorted(sizes, key=sizes.get, reverse=True):  # largest first: peak memory early
            full = settings.batch_size and len(batches[-1]) == settings.batch_size
            if batches[-1] and (full or n + sizes[eid] > settings.batch_tokens):
                batches.append([])
                n = 0.0
            batches[-1].append(eid)
            n += sizes[eid]
        *others, last = batches[world.rank :: world.size] or [[]]
        yield from ((batch, False) for batch in others)
        yield last, True


def read_batches(context, plan, seed=None):
    """Yield the Batch of every item of `plan_batches`; threads read ahead, one thread joins clips.

    seed: in training; draws, for each study, a transformed copy of the videos if available,
    and the clips that `settings.clip_dropout` leaves out; at least one clip remains.
    """
    dropout, pin = context.settings.clip_dropout, context.device.type == "cuda"

    def read(eid):
        """(tokens (N, D), number of videos) of a study, or the UnreadableStudy."""
        rng = None if seed is None else np.random.default_rng(derive_seed("study", seed, eid))
        try:
            study = context.store.read(eid, rng)
        except UnreadableStudy as error:
            return error
        tokens = study.embeddings  # (V, C, D), or of images (V, C, L, S, S, 3)
        if tokens.ndim == 3 and tokens.shape[2] != context.net.width:
            text = f"study {eid}: its clip embeddings have {tokens.shape[2]} features"
            return UnreadableStudy(f"{text}; the model reads {context.net.width}")
        if context.look:
            context.look(eid, study)
        tokens = tokens.reshape(-1, *tokens.shape[2:])
        if rng is not None and context.settings.video_sampling == "one":
            tokens = tokens[rng.integers(len(tokens), size=1)]
        elif rng is not None and dropout:
            kept = np.flatnonzero(rng.random(len(tokens)) >= dropout)
            tokens = tokens[kept if len(kept) else rng.integers(len(tokens), size=1)]
        return tokens, len(study.videos)

    def join(job):
        eids, ends_step, futures = job
        studies = {}
        for eid, future in zip(eids, futures, strict=True):
            if isinstance(study := future.result(), UnreadableStudy):
                context.unreadable[eid] = str(study)
            else:
                studies[eid] = study
        return collate(studies, ends_step, pin)

    one_thread = threadpool_limits(1, "blas")  # small products; the readers are threads themselves
    with one_thread, ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(1) as joiner:
        jobs = ((eids, ends, [readers.submit(read, eid) for eid in eids]) for eids, ends in plan)
        yield from map_ahead(joiner, join, jobs, READ_AHEAD + 1)


def collate(studies, ends_step, pin=False):
    """A Batch of studies; studies: id -> (tokens, number of videos)."""
    tokens = [tokens for tokens, _ in studies.values()]
    each = tokens[0].shape[1:] if tokens else (0,)
    kind = torch.uint8 if len(each) > 1 else torch.float32  # images, or embeddings
    joined = torch.empty(sum(map(len, tokens)), *each, dtype=kind, pin_memory=pin)
    if tokens:
        np.concatenate(tokens, out=joined.numpy())
    n_videos = [n for _, n in studies.values()]
    return Batch(list(studies), joined, [len(t) for t in tokens], n_videos, ends_step)


# ---------------------------------------------------------------------------------------- the loop


def train_steps(context, eids, optimizer, epoch=0, label=""):
    """Train the net on every study once. Yields (number of studies, mean loss) of each step.

    Each step ends with an update on the mean of its studies' losses. The batches of a step are
    divided among the processes, which sum their gradients, so that all make the same update.

    Random draws depend only on (settings.seed, epoch, study): a resumed epoch continues exactly
    as an uninterrupted one.
    """
    average = None
    with study_bar(context, eids, label) as bar:
        for results, gradients in run_steps(context, eids, epoch):
            n, loss = update(context.net, optimizer, gradients, results.losses, context.world)
            if np.isfinite(loss):
                average = loss if average is None else 0.9 * average + 0.1 * loss
            bar.update(n)
            bar.set_postfix(loss=f"{loss if average is None else average:.4f}", refresh=False)
            yield n, loss


def run_steps(context, eids, epoch=None):
    """Run every study through the net once, in steps (`plan_batches`).

    Yields (Results, summed gradients or None) of each step, of the studies of this process.
    epoch: its number, in training.
    """
    training, settings, dropout_seed, read_seed = epoch is not None, context.settings, None, None
    if training:
        dropout_seed = derive_seed("dropout", settings.seed, epoch)
        read_seed = derive_seed(settings.seed, epoch)
    batches = read_batches(context, plan_batches(context, eids, training), read_seed)
    if training and context.outputs.by_step:
        batches = with_output_grads(context, batches, dropout_seed)
    context.net.train(training)
    rows, total = [], None
    compute = partial(run_batch, context, seed=dropout_seed)
    for batch, (row, gradients) in compute_parallel(batches, compute, context.device):
        rows.append(row)
        if total is None:
            total = gradients
        elif gradients:
            torch._foreach_add_(total, gradients)
        if batch.ends_step:
            yield results_of_rows(rows, context.net), total
            rows, total = [], None


def predict_steps(context, eids, label=""):
    """Yield the Results of each step of studies, without training."""
    with study_bar(context, eids, label) as bar:
        for results, _ in run_steps(context, eids):
            bar.update(len(results))
            yield results


def study_bar(context, eids, label):
    """The progress bar over studies of the first process; none without a label."""
    hidden = not label or context.world.rank > 0
    return progress(total=len(eids), desc=label, unit="study", disable=hidden)


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
    """(row with the fields of Results, gradients) of a Batch, on the net's device.

    seed: of the dropout, in training. Losses (S,) and gradients (of `trainable_parameters`) are
    only computed in training. Embeddings are (S, 0) if there are targets.
    """
    if not batch.eids:
        return ([],), None
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
    arrays = logits.detach(), embeddings.detach().float(), losses.detach()
    return (batch.eids, *arrays, batch.n_videos, batch.lengths), gradients


def with_output_grads(context, batches, seed):
    """Yield the batches with `losses` (S,) and `output_grad` (S, O), for losses of a whole step.

    With outputs z_s of each study s of a step and parameters w, the loss L(z_1, ..., z_S) has

        dL/dw = sum over s of (dL/dz_s) (dz_s/dw)

    so two passes are enough: this one computes all z without a graph, which gives dL/dz; then each
    batch is computed again with its graph and the same dropout, for its part of the sum. A step has
    the studies of all processes. All its clips are in memory at once, but not their activations.
    """
    world, step = context.world, []
    for batch in batches:
        step.append(batch)
        if not batch.ends_step:
            continue
        logits = [forward(context, x, seed, graph=False)[0].cpu() for x in step if x.eids]
        logits = torch.cat(logits) if logits else torch.zeros(0, context.net.n_outputs)
        processes = world.gather(([eid for x in step for eid in x.eids], logits.numpy()))
        eids = [eid for part, _ in processes for eid in part]
        if eids:
            logits = torch.tensor(np.concatenate([x for _, x in processes]), requires_grad=True)
            with torch.enable_grad():
                losses = study_losses(logits, context.targets_of(eids), context.outputs)
            (grads,) = torch.autograd.grad(losses.sum(), logits)
            row = sum(len(part) for part, _ in processes[: world.rank])
            for x in step:
                rows = slice(row, row + len(x.eids))
                x.losses, x.output_grad = losses[rows].detach(), grads[rows]
                row = rows.stop
        yield from step
        step = []


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


def update(net, optimizer, gradients, losses, world):
    """One optimiser step on the mean gradient over the studies of all processes.

    gradients: their sum over this process's studies, None without studies. Returns the number of
    all studies and their mean loss. If the loss or a gradient is not finite, the step is skipped,
    the learning rates are halved, and the returned loss is NaN.
    """
    parameters = trainable_parameters(net)
    gradients = gradients or [torch.zeros_like(p) for p in parameters]
    n_and_loss = torch.tensor([len(losses), losses.sum(dtype=np.float64)]).to(gradients[0])
    *gradients, n_and_loss = world.sum_each([*gradients, n_and_loss])
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
    """Results with a row for each readable study, in the given order, without training.

    With targets it includes the studies' losses; survival losses depend on all studies.
    """
    results = merge_results(predict_steps(context, eids, label), eids, context)
    if context.targets is not None and len(results):
        targets = context.targets_of(results.eids)
        losses = study_losses(torch.from_numpy(results.logits), targets, context.outputs)
        results = replace(results, losses=losses.numpy())
    return results


def merge_results(steps, eids, context):
    """Join the Results of several steps, and of all processes, in the order of `eids`."""
    steps = chain(*context.world.gather(list(steps)))
    results = results_of_rows((x.columns() for x in steps), context.net)
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
            f"{count_of(len(unreadable), 'studies')} cannot be read:{reason_lines(unreadable, 50)}",
            "copy or extract damaged files again; the studies are left out",
        )
