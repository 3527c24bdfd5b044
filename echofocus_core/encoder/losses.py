"""Losses of several tasks with missing labels.

Outputs are raw: no sigmoid, softmax or flipping (`panecho.activate` applies those).
"""

import numpy as np
import torch
import torch.nn.functional as F


def class_weights(task, labels):
    """scikit-learn's "balanced" class weights from training labels (N,), NaN if missing.

    (K,) float32, n / (K_present n_k), 0 for an absent class; None for a regression or a single
    class.
    """
    classes, labels = len(task["class_names"]), np.asarray(labels)
    counts = np.bincount(labels[~np.isnan(labels)].astype(int), minlength=classes)[:classes]
    if not classes or (counts > 0).sum() < 2:
        return None
    weights = counts.sum() / ((counts > 0).sum() * np.maximum(counts, 1)) * (counts > 0)
    return torch.tensor(weights, dtype=torch.float32)


def fill_means(tasks, labels):
    """The task entries with `mean` over training labels (DataFrame, one column per task)."""
    values = [labels[task["name"]].dropna() for task in tasks]
    return [
        task | {"mean": float(y.mean()) if len(y) else 0.0}
        for task, y in zip(tasks, values, strict=True)
    ]


class MultiTaskLoss:
    """Each task's mean loss over its labels, averaged over the tasks in a batch.

    Binary: cross-entropy with logits, the second class weighted by w1 / min(w). Multi-class:
    weighted cross-entropy. Regression: squared error divided by the training mean. A batch may be
    split: `sums` are per part, `divisors` per batch, so that the parts add up to the batch's loss.
    """

    def __init__(self, tasks, weights=None):
        """tasks: entries with `mean`; weights: task name -> (K,) class weights, or None."""
        self.tasks, self.weights = tasks, weights or {}

    def divisors(self, targets):
        """The divisor of each task's sum, (T,) float64, for targets (B, T); 0: no labels."""
        out = []
        for task, y in zip(self.tasks, targets.T, strict=True):
            y, w = y[~np.isnan(y)], self.weights.get(task["name"])
            weighted = task["type"].startswith("multi") and w is not None
            out.append(float(w.numpy()[y.astype(int)].sum()) if weighted else float(len(y)))
        return np.array(out)

    def sums(self, outputs, targets):
        """Sums of losses over labels, (T,). outputs: dict of task to (B, n); targets (B, T)."""
        sums = []
        for task, y in zip(self.tasks, targets.T, strict=True):
            given = ~y.isnan()
            out, y = outputs[task["name"]].float()[given], y[given]
            weight = self.weights.get(task["name"])
            weight = weight.to(out.device) if weight is not None else None
            if task["type"] == "regression":
                each = (out[:, 0] - y) ** 2 / (abs(task["mean"]) or 1.0)
            elif task["type"].startswith("multi"):
                each = F.cross_entropy(out, y.long(), weight, reduction="none")
            else:
                positive = weight[1] / weight[weight > 0].min() if weight is not None else None
                each = F.binary_cross_entropy_with_logits(
                    out[:, 0], y, pos_weight=positive, reduction="none"
                )
            sums.append(each.sum())
        return torch.stack(sums)

    def mean(self, sums, divisors):
        """The loss of a batch (or its part) from its sums and the whole batch's divisors."""
        present = divisors > 0
        if not present.any():
            return sums.sum()  # 0, with gradients
        scale = torch.zeros(len(divisors), device=sums.device)
        scale[torch.from_numpy(present)] = torch.tensor(
            1 / (divisors[present] * present.sum()), dtype=torch.float32
        ).to(sums.device)
        return (sums * scale).sum()
