"""The one loop: studies read ahead, batched, run through the network, trained or not."""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain

import numpy as np
import torch

from echofocus_core import EMBED_DIM as D
from echofocus_core.base.console import RUN, listed, progress
from echofocus_core.base.files import derive_seed
from echofocus_core.base.world import World
from echofocus_core.study.outputs import study_losses
from echofocus_core.video.store import UnreadableStudy


@dataclass
class Planned:
    """Studies to be computed together."""

    eids: list[str]
    ends_step: bool  # the last batch of its step


@dataclass
class Batch:
    """Some studies' clips, one after the other: no padding. Empty where none can be read."""

    eids: list[str]
    tokens: torch.Tensor  # (N, D) float32; for an EndToEnd uint8 images (N, L, S, S, 3)
    lengths: list[int]  # clips of each study; sums to N
    n_videos: list[int]
    ends_step: bool
    pull: tuple | None = None  # see `with_pulls`


READERS = min(16, os.cpu_count() or 1)  # threads that read studies


READ_AHEAD = 3  # batches read while another is computed


WINDOW = 256  # studies between two points where results are handed on, outside training


def plan_batches(store, eids, settings, training, world=None):
    """Yield the Planned batches of this process; each step has one that ends it.

    A step is `settings.batch_number` studies in training. Within one, studies of like size share
    a batch, up to the limits in `settings`; the plan depends on nothing but the studies. The
    batches of a step are dealt to the processes of `world`.
    """
    world = world or World()
    step = settings.batch_number if training else WINDOW
    kept = 1 - settings.clip_dropout if training else 1
    for start in range(0, len(eids), step):
        chunk = eids[start : start + step]
        sizes = {eid: kept * store.size(eid) for eid in chunk}
        batches, n = [[]], 0.0
        for eid in sorted(chunk, key=sizes.get, reverse=True):  # the largest first: see memory soon
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
    """Yield the Batch of every Planned, in order; threads read ahead, one more joins what is read.

    unreadable: dict that gets study id -> reason for what cannot be read; those are passed over.
    train_seed: for training, what draws (by study) a transformed copy of the videos, if there are
    any, and the clips that `settings.clip_dropout` leaves out; at least one clip stays.
    look: called with the id and the StudyClips of every study that is read.
    pin: join in page-locked memory, which a GPU copies from while it computes.
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

    ahead = deque()
    with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(1) as joiner:
        for planned in plan:
            futures = [readers.submit(read, eid) for eid in planned.eids]
            ahead.append(joiner.submit(collect, planned, futures))
            if len(ahead) > READ_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def collate(studies, ends_step, pin=False):
    """A Batch of studies, a dict of id to (tokens, number of videos)."""
    tokens = [tokens for tokens, _ in studies.values()]
    each = tokens[0].shape[1:] if tokens else (D,)
    kind = torch.uint8 if len(each) > 1 else torch.float32  # images, or embeddings
    joined = torch.empty(sum(map(len, tokens)), *each, dtype=kind, pin_memory=pin)
    if tokens:
        np.concatenate(tokens, out=joined.numpy())
    n_videos = [n for _, n in studies.values()]
    return Batch(list(studies), joined, [len(t) for t in tokens], n_videos, ends_step)


@dataclass
class Outcome:
    """What the loop found, a row a study."""

    eids: list[str]
    logits: np.ndarray  # (S, T) float32
    embeddings: np.ndarray  # (S, D) float32; (S, 0) in training and validation
    losses: np.ndarray  # (S,) float32; empty without targets
    n_videos: list[int]
    n_clips: list[int]

    def __len__(self):
        return len(self.eids)

    def take(self, rows):
        """The rows of these numbers, in their order."""
        losses = self.losses[rows] if len(self.losses) else self.losses
        lists = ([x[i] for i in rows] for x in (self.eids, self.n_videos, self.n_clips))
        eids, n_videos, n_clips = lists
        return Outcome(eids, self.logits[rows], self.embeddings[rows], losses, n_videos, n_clips)


def run_steps(
    net, store, eids, settings, *, targets=None, outputs=None, optimizer=None, epoch=0,
    unreadable=None, label="", world=None, look=None,
):  # fmt: skip
    """The one loop: every study through the net once, in steps (`plan_batches`).

    Yields (Outcome, number of studies, mean loss) of each step.

    targets: dict of study id to what to learn (C,), NaN where missing, of these `outputs` (see
    `study.outputs`). With an optimiser the net is trained: each step ends with an update on the
    mean of its studies' losses. The batches of a step are dealt to the processes of `world`, which
    add up their gradients and so update alike; an Outcome has the process's own studies, number and
    mean loss are over all processes.
    All randomness comes from (settings.seed, epoch, study), none is kept: the rest of the studies
    alone gives what the whole epoch gives from there on.
    """
    training, world = optimizer is not None, world or World()
    device = next(net.parameters()).device
    unreadable = {} if unreadable is None else unreadable
    train_seed = derive_seed(settings.seed, epoch) if training else None
    plan = plan_batches(store, eids, settings, training, world)
    compute = partial(
        run_batch, net, settings=settings, targets=targets, outputs=outputs,
        seed=derive_seed("dropout", settings.seed, epoch) if training else None,
    )  # fmt: skip
    rows, total, average = [], None, None
    net.train(training)
    quiet = not label or world.rank > 0
    with progress(total=len(eids), desc=label, unit="study", leave=False, disable=quiet) as bar:
        pin = device.type == "cuda"
        batches = read_batches(store, plan, settings, unreadable, train_seed, look, pin)
        if training and outputs.by_step:
            batches = with_pulls(batches, compute, net, world)
        for batch, found in side_by_side(batches, compute, device):
            if batch.eids:
                logits, embeddings, losses, gradients = found
                total = add(total, gradients)
                rows.append((batch.eids, logits, embeddings, losses, batch.n_videos, batch.lengths))
                bar.update(len(batch.eids) if world.size == 1 else 0)
            if not batch.ends_step:
                continue
            outcome, rows = gather(rows, net), []
            n, loss = len(outcome), np.nan
            if training:
                n, loss = update(net, optimizer, total, outcome.losses, world)
                total = None
                bar.update(n if world.size > 1 else 0)
                if np.isfinite(loss):
                    average = loss if average is None else 0.9 * average + 0.1 * loss
                bar.set_postfix(loss=f"{loss if average is None else average:.4f}", refresh=False)
            yield outcome, n, loss


def side_by_side(batches, compute, device):
    """Yield (batch, what `compute` makes of it) in order, a step's batches several at a time.

    On a CPU each core has a batch of its own: products that are split over the cores wait for the
    slowest of them, so that another job on one core would halve the speed.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        yield from ((batch, compute(batch)) for batch in batches)
        return
    ahead = deque()
    try:
        with ThreadPoolExecutor(threads, "batch", torch.set_num_threads, (1,)) as pool:
            for batch in batches:
                ahead.append((batch, pool.submit(compute, batch)))
                while ahead and (batch.ends_step or len(ahead) > threads):
                    first, future = ahead.popleft()
                    yield first, future.result()
    finally:
        torch.set_num_threads(threads)  # of threads to come, which torch gives the last number set


def with_pulls(batches, compute, net, world):
    """Batches with `pull`, (losses (S,), their gradient in the outputs (S, O)), for labels of which
    a study's loss depends on all studies of the step.

    Each step is run twice: once for its outputs, those of all processes, and then, by `run_batch`,
    for the gradients, which are exact. A step's clips (through the encoder: its images) are in
    memory together, its activations are not.
    """
    step, (targets, outputs) = [], (compute.keywords[x] for x in ("targets", "outputs"))
    for batch in batches:
        step.append(batch)
        if not batch.ends_step:
            continue
        found = [compute(b, first=True) for b in step if b.eids]
        own = torch.cat([x.cpu() for x in found]) if found else torch.zeros(0, net.n_labels)
        eids = [eid for b in step for eid in b.eids]
        everyone = world.gather((eids, own.numpy()))
        first = sum(len(x) for x, _ in everyone[: world.rank])
        logits = torch.tensor(np.concatenate([x for _, x in everyone]), requires_grad=True)
        wanted = np.array([targets[eid] for x, _ in everyone for eid in x], np.float32)
        if len(logits):
            with torch.enable_grad():
                losses = study_losses(logits, torch.from_numpy(wanted), outputs)
            (pulls,) = torch.autograd.grad(losses.sum(), logits)
        for b in step:
            rows, first = slice(first, first + len(b.eids)), first + len(b.eids)
            yield replace(b, pull=(losses[rows].detach(), pulls[rows]) if b.eids else None)
        step = []


def run_batch(net, batch, settings, targets, outputs, seed, first=False):
    """(logits, embeddings, losses, gradients) of a Batch, on the net's device; None if empty.

    seed: of the dropout, in training, which alone has gradients: a list as trained(net).
    Embeddings are (S, 0) where there are targets; first: the logits alone, see `with_pulls`.
    """
    if not batch.eids:
        return None
    device, training = next(net.parameters()).device, seed is not None
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")
    graph = training and not first
    with torch.set_grad_enabled(graph), autocast, seeded(seed, batch.eids[0], device) as rng:
        tokens = batch.tokens
        if tokens.is_floating_point():  # images go to the device a group of clips at a time
            tokens = tokens.to(device, non_blocking=True).float()
        logits, embeddings = net(tokens, batch.lengths, rng)
        logits, losses = logits.float(), torch.zeros(0)
        if first:
            return logits
        if targets is not None:
            embeddings = embeddings[:, :0]
        if batch.pull:
            losses, pull = (x.to(device) for x in batch.pull)
        elif training:
            wanted = torch.tensor(np.stack([targets[eid] for eid in batch.eids]))
            losses = study_losses(logits, wanted.float().to(device), outputs)
    gradients = None
    if training:
        along = (logits, pull) if batch.pull else (losses.sum(), None)
        gradients = torch.autograd.grad(along[0], trained(net), along[1])
    return logits.detach(), embeddings.detach().float(), losses.detach(), gradients


@contextmanager
def seeded(seed, eid, device):
    """What dropout draws from in a block: a numpy Generator, or on a GPU torch's own, None.

    torch's generators are afterwards as they were.
    """
    if seed is None:
        yield None
    elif device.type == "cpu":
        yield np.random.default_rng(derive_seed(seed, eid))
    else:
        with torch.random.fork_rng([device]):
            torch.manual_seed(derive_seed(seed, eid))
            yield None


def trained(net):
    """The parameters that are not frozen."""
    return [p for p in net.parameters() if p.requires_grad]


def add(total, gradients):
    """Sum of two lists of tensors, either of which may be None; in place of the first."""
    if total is None or gradients is None:
        return gradients if total is None else total
    torch._foreach_add_(total, gradients)
    return total


LEAST_RATE = 1e-7  # below which a loss that is no number halves the learning rate no further


def update(net, optimizer, gradients, losses, world):
    """One optimiser step on the mean gradient over the studies of all processes.

    gradients: their sum over this process's studies, None if it had none. Returns the number of
    all studies and their mean loss. Where that or a gradient is no finite number the step is
    dropped, the rates are halved, and the loss returned is NaN.
    """
    gradients = gradients or [torch.zeros_like(p) for p in trained(net)]
    about = torch.tensor([len(losses), losses.sum(dtype=np.float64)], device=gradients[0].device)
    about = about.to(gradients[0].dtype)
    if world.size > 1:
        flat = world.sum(torch.cat([g.flatten() for g in (*gradients, about)]))
        *parts, about = flat.split([g.numel() for g in (*gradients, about)])
        gradients = [x.view_as(g) for x, g in zip(parts, gradients, strict=True)]
    n, loss = about.tolist()
    finite = np.isfinite(loss) and torch.stack(torch._foreach_norm(gradients)).isfinite().all()
    if n and not finite:
        for group in optimizer.param_groups:
            group["lr"] = max(group["lr"] / 2, min(group["lr"], LEAST_RATE))
        return int(n), np.nan
    if n:
        for p, gradient in zip(trained(net), gradients, strict=True):
            p.grad = gradient.div_(n)
        optimizer.step()
    optimizer.zero_grad()
    return int(n), loss / max(n, 1)


def run_studies(net, store, eids, settings, world=None, **options):
    """All of `run_steps`: one Outcome with a row for every readable study, in the order given.

    With targets it has the studies' losses, of which those of survival depend on all of them.
    """
    steps = run_steps(net, store, eids, settings, world=world, **options)
    found = merged([outcome for outcome, _, _ in steps], eids, net, world)
    if (targets := options.get("targets")) is not None and len(found):
        wanted = torch.tensor(np.stack([targets[eid] for eid in found.eids])).float()
        losses = study_losses(torch.from_numpy(found.logits), wanted, options["outputs"])
        found = replace(found, losses=losses.numpy())
    return found


def merged(outcomes, eids, net, world=None):
    """Outcomes of several steps and processes as one, in the order of `eids`."""
    outcomes = chain(*(world or World()).gather(outcomes))
    found = gather([[getattr(x, f.name) for f in fields(x)] for x in outcomes], net)
    place = {eid: i for i, eid in enumerate(eids)}
    return found.take(sorted(range(len(found)), key=lambda i: place[found.eids[i]]))


def gather(rows, net):
    """Rows as `Outcome` has them, of tensors or arrays -> one Outcome."""
    rows = [row for row in rows if row[0]]  # steps of which nothing could be read
    if not rows:
        return Outcome([], np.zeros((0, net.n_labels)), np.zeros((0, 0)), np.zeros(0), [], [])
    eids, *arrays, n_videos, n_clips = zip(*rows, strict=True)
    logits, embeddings, losses = (
        np.concatenate([x.cpu().numpy() if torch.is_tensor(x) else x for x in column])
        for column in arrays
    )
    return Outcome(
        list(chain(*eids)),
        logits,
        embeddings,
        losses,
        list(chain(*n_videos)),
        list(chain(*n_clips)),
    )


def report_unreadable(unreadable, listener=RUN):
    """Tell which studies could not be read, and why."""
    if unreadable:
        listener.warning(
            f"{len(unreadable)} studies cannot be read:{listed(unreadable, 50)}",
            "delete these files and extract them again; a run leaves the studies out",
        )
