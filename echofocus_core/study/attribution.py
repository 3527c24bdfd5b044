"""The contribution of each clip of a study to the answers of a study-level model.

`net` is a model called as net(tokens (N, D), lengths (S)) -> (outputs (S, T), embeddings), with
`n_outputs`, `turning_point` and `clip_shares`; `model` is a loaded model, with `net`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import comb

import numpy as np
import torch

from echofocus_core.base.console import UserError
from echofocus_core.base.files import derive_seed, sha256_of

PAGE_METHOD = "shapley"  # see benchmarks/RESULTS.md, "Attribution"
NOT_ADDITIVE = ("leave_one_out", "attention")  # scores that do not add up to a change
BASELINES = {  # the answers from which scores start
    "zero": "the answer for clip embeddings of zeros, which no video has",
    "mean": "the answer for the mean clip of the training fold",
    "study": "the answer for the mean clip of this study",
    "training": "the mean answer in the training fold",
    "labels": "the mean of the training labels",  # of measurements
    "singles": "the mean answer for single videos of this study",  # of other labels
}
QUADRATURES = ("gausslegendre", "riemann_right", "riemann_trapezoid")  # Captum's
FIRST_NODES, MAX_NODES = 8, 512  # of the path integral
MAX_NODES_IN_HALF = 64  # more nodes would not make bf16 more exact
COMPLETE = 0.01  # largest error of 'adaptive', as a share of the summed absolute scores
MAX_EXACT = 6  # videos of a study whose Shapley values are exact, over all subsets
FIRST_PAIRS, MAX_PAIRS = 8, 64  # of permutations of the videos of a larger study
PRECISE = 0.05  # their largest standard error, as a share of the summed absolute scores


@dataclass
class Attribution:
    """The contributions of a study's clips to T objectives, in their units."""

    scores: np.ndarray  # (T, V, C) signed, summed over features
    absolute: np.ndarray  # (T, V) sums of absolute values over clips and features
    error: np.ndarray  # (T,) see `incompleteness`; NaN: not defined
    standard_error: np.ndarray  # (T, V) of Shapley values by sampling; NaN: not defined

    @classmethod
    def of_videos(cls, scores, C, error=np.nan, standard_error=np.nan):
        """From scores (T, V) of videos, divided equally among their C clips."""
        return cls(
            np.repeat(scores[:, :, None] / C, C, axis=2), np.abs(scores),
            np.full(len(scores), error), np.broadcast_to(standard_error, scores.shape),
        )  # fmt: skip


def attribute_clips(net, bag, settings, objectives, baseline=None, mean_answer=None):
    """The Attribution of a study by `settings.explain_method`.

    bag: (V, C, D) float32; objectives: logits (S, T_all) -> (S, T) to explain; baseline: (D,) clip
    embedding at which the path starts, None: zero; mean_answer: (T_all,) outputs for no videos, for
    Shapley values.
    """
    method, (V, C, D) = settings.explain_method, bag.shape
    tokens = as_tokens(net, bag)
    if method == "attention":
        shares = net.clip_shares(tokens).expand(net.n_outputs, -1)
        scores = shares[objectives.columns].view(-1, V, C).cpu().numpy()
        undefined = np.full(scores.shape[:2], np.nan)
        return Attribution(scores, scores.sum(2), undefined[:, 0], undefined)
    if method == "leave_one_out":
        answer = objectives(outputs_of(net, [tokens], settings))
        change = answer - objectives(outputs_without(net, bag, settings))
        scores = change.T.cpu().numpy()  # (T, V)
        return Attribution.of_videos(scores, C)
    if method == "shapley":
        scores, standard_error = shapley_values(net, bag, settings, objectives, mean_answer)
        return Attribution.of_videos(scores, C, 0.0, standard_error)
    start = path_start(baseline, tokens)
    integrate = published_gradients if method in QUADRATURES else integrated_gradients
    parts, error = integrate(net, tokens, start, settings, objectives, V)
    parts = parts.view(len(parts), V, C, D)
    scores, absolute = parts.sum(3), parts.abs().sum((2, 3))
    undefined = np.full(absolute.shape, np.nan)
    return Attribution(scores.cpu().numpy(), absolute.cpu().numpy(), error, undefined)


def as_tokens(net, bag):
    """Clip embeddings (V, C, D) -> tokens (V * C, D) on the network's device."""
    bag = np.ascontiguousarray(bag, np.float32)
    return torch.from_numpy(bag).to(device_of(net)).flatten(0, 1)


def path_start(baseline, tokens):
    """The baseline (D,) (None: zero), repeated for each of the tokens (N, D)."""
    start = torch.zeros(tokens.shape[1]) if baseline is None else baseline
    return start.to(tokens).expand_as(tokens)


def device_of(net):
    return next(net.parameters()).device


def integrated_gradients(net, tokens, start, settings, objectives, V):
    """Integrated gradients of T objectives in tokens (N, D): (T, N, D), and their errors (T,).

    Sundararajan, Taly and Yan, "Axiomatic Attribution for Deep Networks", ICML 2017. Because of the
    first LayerNorm, nearly all of the answer's change is in the first hundredths of the path. So
    the path is parametrised by alpha = a sinh(u asinh(1/a)), with a from `turning_point`: linear
    in alpha near the start, linear in log alpha beyond. Gauss-Legendre nodes in u then converge
    fast; their number is doubled for objectives that are not yet complete. All objectives share
    one forward pass for each node.
    """
    ends = objectives(outputs_of(net, [start, tokens], settings)).double()
    change, target = tokens - start, ends[1] - ends[0]
    a, n_nodes = net.turning_point(start, tokens), FIRST_NODES
    parts = torch.zeros(len(target), *tokens.shape, device=tokens.device)
    error = torch.full_like(target, torch.inf)
    unfinished = torch.arange(len(target))
    while len(unfinished):
        u, weights = np.polynomial.legendre.leggauss(n_nodes)
        stretch = np.arcsinh(1 / a)
        v = (u + 1) / 2 * stretch
        alphas, weights = a * np.sinh(v), weights / 2 * a * stretch * np.cosh(v)
        sums = path_integral(net, start, change, alphas, weights, settings, objectives, unfinished)
        parts[unfinished] = sums.mul_(change)
        error[unfinished] = incompleteness(parts[unfinished], target[unfinished], V)
        n_nodes *= 2
        if n_nodes > (MAX_NODES if settings.precision == "fp32" else MAX_NODES_IN_HALF):
            break
        unfinished = torch.flatten((error >= COMPLETE).nonzero()).cpu()
    return parts, error.cpu().numpy()


def path_integral(net, start, change, alphas, weights, settings, objectives, columns):
    """Weighted sum over nodes of the gradients of some objectives (W,): (W, N, D).

    `settings.batch_tokens` and `batch_size` limit the nodes in one forward pass.
    """
    N, sums = len(change), torch.zeros(len(columns), *change.shape, device=change.device)
    together = max(1, min(settings.batch_tokens // N, settings.batch_size or len(alphas)))
    for k in range(0, len(alphas), together):
        alpha = torch.tensor(alphas[k : k + together]).to(change)
        weight = torch.tensor(weights[k : k + together]).to(change)
        points = (start + alpha[:, None, None] * change).requires_grad_(True)  # (K, N, D)
        with torch.enable_grad():
            values = objectives(outputs_of(net, points, settings, grad=True))  # (K, T)
        for i, t in enumerate(columns.tolist()):
            keep = i + 1 < len(columns)
            (gradient,) = torch.autograd.grad(values[:, t] @ weight, points, retain_graph=keep)
            sums[i] += gradient.sum(0)
    return sums


def incompleteness(parts, change, V):
    """|sum of attributions - change of the objective| as a share of the summed absolute scores of
    the V videos; parts (T, N, D), change (T,) -> (T,)."""
    scores = parts.view(len(parts), V, -1).double().sum(2)
    return (scores.sum(1) - change).abs() / scores.abs().sum(1).clamp(min=1e-9)


def outputs_of(net, bags, settings, grad=False):
    """Outputs (S, T) in float32 of some studies' tokens, each (N, D)."""
    device = device_of(net).type
    half = torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16")
    with torch.set_grad_enabled(grad), half:
        return net(torch.cat(list(bags)), [len(b) for b in bags])[0].float()


def published_gradients(net, tokens, start, settings, objectives, V):
    """`integrated_gradients` by one of Captum's quadratures, one objective at a time."""
    from captum.attr import IntegratedGradients

    ends = objectives(outputs_of(net, [start, tokens], settings)).double()
    parts = []
    for t in range(ends.shape[1]):

        def forward(bags, t=t):
            grad = torch.is_grad_enabled()
            return objectives(outputs_of(net, bags, settings, grad))[:, t]

        together = min(settings.batch_tokens // len(tokens), settings.batch_size or 10**9)
        options = {"n_steps": settings.explain_steps, "method": settings.explain_method}
        options["internal_batch_size"] = max(1, together)
        gradients = IntegratedGradients(forward)
        parts.append(gradients.attribute(tokens[None], start[None], **options)[0])
    parts = torch.stack(parts).detach().float()
    return parts, incompleteness(parts, ends[1] - ends[0], V).cpu().numpy()


def outputs_without(net, bag, settings):
    """Outputs (V, T) of a study (V, C, D) without each of its videos; NaN if it has only one."""
    V, C, _ = bag.shape
    device = device_of(net)
    if V == 1:
        return torch.full((1, net.n_outputs), torch.nan, device=device)
    bag, outputs = torch.from_numpy(np.ascontiguousarray(bag, np.float32)).to(device), []
    together = max(1, min(settings.batch_tokens // ((V - 1) * C), settings.batch_size or V))
    for first in range(0, V, together):
        left_out = range(first, min(V, first + together))
        rest = [torch.cat([bag[:v], bag[v + 1 :]]).flatten(0, 1) for v in left_out]
        outputs.append(outputs_of(net, rest, settings))
    return torch.cat(outputs)


def shapley_values(net, bag, settings, objectives, mean_answer):
    """Shapley values of a study's videos (V, C, D), and their standard errors: (T, V) each.

    The value of some videos is the answer for them alone; that of none is the answer mean_answer
    (T_all,). Exact for up to MAX_EXACT videos (standard error 0). Otherwise means over random
    permutations (Castro, Gomez and Tejada, Comput Oper Res 2009), each with its reverse, whose
    errors partly cancel (Mitchell et al., JMLR 2022). The number of pairs is doubled until each
    label's largest standard error is below PRECISE of its summed absolute scores. The sum of the
    scores is the answer minus that for no videos. Permutations depend only on the embeddings.
    """
    bag = np.ascontiguousarray(bag, np.float32)
    digests, V = [sha256_of(video) for video in bag], len(bag)
    order = np.argsort(digests, kind="stable")
    value = CoalitionValues(net, bag[order], settings, objectives, mean_answer)
    if V <= MAX_EXACT:
        subsets = (np.arange(2**V)[:, None] >> np.arange(V) & 1).astype(bool)
        values, sizes = value(subsets), subsets.sum(1)
        weights = np.array([1 / (V * comb(V - 1, max(n - 1, 0))) for n in sizes])
        without = np.array([1 / (V * comb(V - 1, min(n, V - 1))) for n in sizes])
        scores = np.where(subsets, weights[:, None], -without[:, None]).T @ values  # (V, T)
        standard_error = np.zeros_like(scores)
    else:
        rng = np.random.default_rng(derive_seed("shapley", *np.sort(digests)))
        pairs, n_pairs = [], FIRST_PAIRS
        while True:
            new = [rng.permutation(V) for _ in range(n_pairs - len(pairs))]
            orders = np.array([x for p in new for x in (p, p[::-1])])
            places = orders.argsort(1)  # (P, V)
            prefixes = places[:, None] < np.arange(V + 1)[:, None]  # (P, V + 1, V)
            values = value(prefixes.reshape(-1, V)).reshape(len(orders), V + 1, -1)
            changes = np.take_along_axis(np.diff(values, axis=1), places[:, :, None], axis=1)
            pairs += [*changes.reshape(-1, 2, V, changes.shape[2]).mean(1)]
            scores = np.mean(pairs, axis=0)
            standard_error = np.std(pairs, axis=0, ddof=1) / np.sqrt(n_pairs)
            n_pairs *= 2
            precise = standard_error.max(0) <= PRECISE * np.abs(scores).sum(0)
            if precise.all() or n_pairs > MAX_PAIRS:
                break
    back = order.argsort()
    return scores[back].T, standard_error[back].T


class CoalitionValues:
    """Objectives of the answers for some of a study's videos; each subset is computed once."""

    def __init__(self, net, bag, settings, objectives, mean_answer):
        self.net, self.settings, self.objectives = net, settings, objectives
        self.videos = as_tokens(net, bag).unflatten(0, bag.shape[:2])
        empty = torch.as_tensor(mean_answer).to(self.videos)[None]
        none = np.zeros(len(bag), bool)
        self.values = {none.tobytes(): objectives(empty)[0].double().cpu().numpy()}

    def __call__(self, subsets):
        """subsets (n, V) of bool -> (n, T) float64."""
        unknown = {x.tobytes(): x for x in subsets if x.tobytes() not in self.values}
        unknown = sorted(unknown.items(), key=lambda item: item[1].sum())
        limit = self.settings.batch_size or len(unknown)
        while unknown:
            size = unknown[-1][1].sum() * self.videos.shape[1]  # largest first
            n = max(1, min(self.settings.batch_tokens // size, limit))
            batch, unknown = unknown[-n:], unknown[:-n]
            bags = [self.videos[x].flatten(0, 1) for _, x in batch]
            values = self.objectives(outputs_of(self.net, bags, self.settings))
            keys = [key for key, _ in batch]
            self.values |= zip(keys, values.double().cpu().numpy(), strict=True)
        return np.stack([self.values[x.tobytes()] for x in subsets])


@dataclass
class Objectives:
    """logits (S, T_all) -> (S, T): the outputs of some labels, or their losses.

    columns: numbers of the labels; to explain the loss, targets: (T,) normalised, and losses:
    (logits, targets, columns) -> losses, all (S, T). findings: (T,) bool, the labels whose outputs
    are log-odds to convert to probabilities.
    """

    columns: list[int]
    targets: np.ndarray | None = None
    losses: Callable | None = None
    findings: np.ndarray | None = None

    def __call__(self, logits):
        logits = logits[:, self.columns]
        if self.findings is not None:
            return logits.sigmoid().where(torch.tensor(self.findings).to(logits.device), logits)
        if self.targets is None:
            return logits
        targets = torch.tensor(self.targets, dtype=logits.dtype, device=logits.device)
        return self.losses(logits, targets.expand_as(logits), self.columns)


def clip_baseline(model, bag, settings):
    """The clip embedding of `--baseline` for a study (V, C, D): (D,) tensor, None for zero. Raises
    UserError."""
    if settings.baseline == "zero":
        return None
    if settings.baseline == "study":
        return torch.from_numpy(bag.mean((0, 1), dtype=np.float64)).float()
    if model.clip_mean is None:
        raise UserError(
            f"{model.folder.name} has no mean clip embedding of its training fold, since it was "
            "not trained by EchoFocus; use --explain_method shapley, or --baseline study"
        )
    return model.clip_mean


def baseline_answer(model, bag, settings, clip):
    """(outputs (T_all,) from which the scores of a study (V, C, D) start, what they are in words).

    NaN and '' for methods whose scores do not add up to a change.

    clip: of `clip_baseline`. Shapley values: the answer for no videos.
    """
    net, method = model.net, settings.explain_method
    if method in NOT_ADDITIVE:
        return torch.full((net.n_outputs,), torch.nan), ""
    if method != "shapley":
        start = path_start(clip, as_tokens(net, bag))
        return outputs_of(net, [start], settings)[0], BASELINES[settings.baseline]
    if model.mean_answer is not None:
        return model.mean_answer, BASELINES["training"]
    subsets, every = np.eye(len(bag), dtype=bool), Objectives(list(range(net.n_outputs)))
    values = CoalitionValues(net, bag, settings, every, torch.zeros(net.n_outputs))(subsets)
    is_scaled = np.isin(model.outputs.names, model.outputs.of_kind("regression"))
    mean = model.outputs.mean(values, {})
    outputs = np.where(is_scaled, 0, mean)  # 0: the mean, by the scaling of the labels
    names = {BASELINES["labels" if x else "singles"]: None for x in is_scaled}
    return torch.from_numpy(outputs), " or ".join(names)


def explain_study(model, eid, bag, columns, settings, truths):
    """The explanation of one study for some labels: a dict of Attribution's arrays and answers.

    baseline: (1, T_all) outputs from which the scores start; baseline_name: what they are;
    ends: (T, 2) objectives of the baseline and of the study. Shapley values of a finding are of its
    probability. truths: (T_all,) normalised labels, NaN if missing, for the loss.
    """
    net = model.net
    targets = None
    if settings.explain_mode == "loss":
        columns = [i for i in columns if not np.isnan(truths[i])]
        targets = truths[columns]
    explanation = {"eid": eid, "columns": columns, "videos": bag.videos}
    if not columns:
        return explanation
    clip = clip_baseline(model, bag.embeddings, settings)
    answer = outputs_of(net, [as_tokens(net, bag.embeddings)], settings)
    losses = model.losses(answer, torch.tensor(truths).to(answer)[None], range(net.n_outputs))
    baseline, name = baseline_answer(model, bag.embeddings, settings, clip)
    baseline = baseline.to(answer)[None]
    findings = None
    if targets is None and settings.explain_method == "shapley":
        findings = np.array([model.kind(model.outputs.names[i]) == "binary" for i in columns])
    objectives = Objectives(columns, targets, model.losses, findings)
    attribution = attribute_clips(
        net, bag.embeddings, settings, objectives, clip, mean_answer=baseline[0]
    )
    without = outputs_without(net, bag.embeddings, settings)
    answers = {"answer": answer, "baseline": baseline, "without": without}
    answers |= {"ends": objectives(torch.cat([baseline, answer])).T, "losses": losses[0]}
    answers = {name: x.cpu().numpy() for name, x in answers.items()}
    return explanation | answers | {"baseline_name": name, "truths": truths} | vars(attribution)
