"""Exact gradients, batch by batch, of losses that depend on all studies of an optimiser step.

With outputs z_s of each study s of a step and parameters w, the loss L(z_1, ..., z_S) has

    dL/dw = sum over s of (dL/dz_s) (dz_s/dw)

so two passes are enough: the first computes all z without a graph, which gives dL/dz; the second
computes each batch again with its graph, for its part of the sum. Both passes use the same
dropout. All clips of a step (images, if the encoder is trained) are in memory at once, but not
their activations.
"""

from dataclasses import replace

import numpy as np
import torch

from echofocus_core.study.outputs import study_losses


def with_output_grads(batches, compute_logits, context):
    """Yield the batches with `losses` (S,) and `output_grad` (S, O), the gradient of the loss.

    compute_logits: Batch -> logits (S, O), without a graph. context: a LoopContext; a step contains
    the studies of all processes.
    """
    step = []
    for batch in batches:
        step.append(batch)
        if batch.ends_step:
            yield from step_with_output_grads(step, compute_logits, context)
            step = []


def step_with_output_grads(step, compute_logits, context):
    """The batches of one step, see `with_output_grads`."""
    logits = [compute_logits(batch).cpu() for batch in step if batch.eids]
    logits = torch.cat(logits) if logits else torch.zeros(0, context.net.n_outputs)
    eids = [eid for batch in step for eid in batch.eids]
    processes = context.world.gather((eids, logits.numpy()))
    every_eid = [eid for eids, _ in processes for eid in eids]
    if not every_eid:
        yield from step
        return
    logits = torch.tensor(np.concatenate([x for _, x in processes]), requires_grad=True)
    with torch.enable_grad():
        losses = study_losses(logits, context.targets_of(every_eid), context.outputs)
    (grads,) = torch.autograd.grad(losses.sum(), logits)
    row = sum(len(eids) for eids, _ in processes[: context.world.rank])
    for batch in step:
        rows = slice(row, row + len(batch.eids))
        yield replace(batch, losses=losses[rows].detach(), output_grad=grads[rows])
        row = rows.stop
