"""Aggregators, networks that read a study's clips, and PanEcho's task heads."""

import re

import torch
import torch.nn.functional as F
from torch import nn

from echofocus_core import EMBED_DIM
from echofocus_core.study.attention import attend, encoder_layer, pool

PUBLISHED_HEADS = 6  # of attention, for EMBED_DIM features
MOST_HEADS = 8
DROPOUT = 0.2
PROBE_HEADS = 16  # of the attentive probe
GATE_WIDTH = 128  # of gated attention


class Aggregator(nn.Module):
    """A network from a study's clips, an unordered set, to its labels.

    A new kind is a subclass with `read`, a line in AGGREGATORS, and a value of the option.
    Its layers, where it has several, are named `...layers.0.` to `...layers.<depth - 1>.`.
    """

    heads = ("ff",)  # parts that belong to labels: --freeze aggregator trains only these
    embeds_labels = False  # whether `read` gives one embedding per label
    has_attention = False  # whether `clip_shares` is available

    def __init__(
        self, n_outputs, kind="standard", depth=1, combine="avg", groups=(), width=EMBED_DIM
    ):
        """groups: slices of the outputs, each with the classes of one label; width: D, the number
        of features of a clip embedding."""
        super().__init__()
        self.width = self.token_width = width
        self.front = nn.Identity()  # from clip embeddings to tokens, see `join`
        self.n_outputs, self.kind, self.depth, self.combine = n_outputs, kind, depth, combine
        self.groups = groups
        self.single_clips = False  # whether the answer is the mean of the answers of single clips

    @property
    def architecture(self):
        """The options of its architecture."""
        sampling = "one" if self.single_clips else "all"
        return {
            "transformer_type": self.kind, "encoder_depth": self.depth,
            "tf_combine": self.combine, "video_sampling": sampling,
        }  # fmt: skip

    def read(self, tokens, lengths, rng):
        """As `forward`: logits (S, T) and embeddings (S, D) or (S, T, D)."""
        raise NotImplementedError

    def join(self, widths):
        """Read the clips of several encoders, of these widths, as `video.joined` joins them.

        One linear layer is a projection of each encoder and its type vector, since every encoder
        has features of its own.
        """
        n_features = sum(widths) + len(widths)
        self.front, self.width = nn.Linear(n_features, self.width, bias=False), n_features

    def forward(self, tokens, lengths, rng=None, pool_queries=True):
        """tokens (N, D) of S studies, lengths (S) -> outputs (S, T), study embeddings (S, D).

        Returns the mean of the embeddings of the labels; without `pool_queries` all, (S, T, D).
        Outputs of classes are log-odds, see `study.outputs`.
        rng: a numpy Generator for dropout in training; None: torch's generator.
        """
        tokens = self.front(tokens)
        of_clips = self.single_clips and len(tokens) > len(lengths)
        logits, embeddings = self.read(tokens, [1] * len(tokens) if of_clips else lengths, rng)
        if of_clips:
            logits = pool(logits, lengths)
            embeddings = pool(embeddings.flatten(1), lengths).view(-1, *embeddings.shape[1:])
        if self.embeds_labels and pool_queries:
            embeddings = embeddings.mean(1)
        return against_rest(logits, self.groups) if self.groups else logits, embeddings

    def is_head(self, name):
        """Whether a parameter belongs to labels."""
        return name.split(".")[0] in self.heads

    def layers_above(self, name):
        """How many layers a parameter is below the head."""
        layer = re.search(r"\blayers\.(\d+)\.", name)
        return self.depth - int(layer[1]) if layer else self.depth

    def label_axes(self):
        """Parameter -> its axis of labels, for parameters that have one."""
        with torch.device("meta"):
            options = self.kind, self.depth, self.combine
            more = type(self)(self.n_outputs + 1, *options, width=self.token_width)
            more.front = self.front
        pairs = zip(self.state_dict().items(), more.state_dict().values(), strict=True)
        differ = {k: [a != b for a, b in zip(x.shape, y.shape, strict=True)] for (k, x), y in pairs}
        return {name: axes.index(True) for name, axes in differ.items() if any(axes)}

    def turning_point(self, start, tokens):
        """The point on the path (0 to 1) from start to tokens, both (N, D), from which the tokens
        determine the answers."""
        return 1.0


def n_heads(width):
    """The number of attention heads: the published one, or the largest divisor up to 8."""
    if width == EMBED_DIM:
        return PUBLISHED_HEADS
    return max(n for n in range(1, MOST_HEADS + 1) if width % n == 0)


class StudyModel(Aggregator):
    """The set transformer: from a study's clips, an unordered set, to its labels.

    standard: encoder over the clips, mean or maximum over clips, linear head.
    query: a learned query token joins the clips; the head reads its output.
    multiquery: one query per label, one shared head.
    Parameters are named as in the published checkpoints. Depth 0 is one attention layer.
    """

    heads, has_attention = ("ff", "query_tokens"), True

    def __init__(self, n_outputs, kind="standard", *args, **options):
        super().__init__(n_outputs, kind, *args, **options)
        D, heads, depth = self.width, n_heads(self.width), self.depth
        self.embeds_labels = kind == "multiquery"
        if kind == "query":
            self.query_token = nn.Parameter(torch.randn(1, 1, D) * 0.02)
        if kind == "multiquery":
            self.query_tokens = nn.Parameter(torch.randn(1, n_outputs, D) * 0.02)
        if depth:
            layer = nn.TransformerEncoderLayer(D, heads, D, DROPOUT, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        else:
            self.encoder = nn.MultiheadAttention(D, heads, DROPOUT, batch_first=True)
        self.ff = nn.Linear(D, 1 if kind == "multiquery" else n_outputs)

    @property
    def queries(self):
        """The learned query tokens (Q, D); None for the standard kind."""
        if self.kind == "standard":
            return None
        return (self.query_token if self.kind == "query" else self.query_tokens)[0]

    def read(self, tokens, lengths, rng):
        S, queries = len(lengths), self.queries
        if queries is not None:  # each study's queries precede its clips
            parts = [x for study in tokens.split(lengths) for x in (queries, study)]
            tokens, lengths = torch.cat(parts), [n + len(queries) for n in lengths]
        x = self.encode(tokens, lengths, 0 if queries is None else len(queries), rng)
        if self.kind == "standard":
            pooled = pool(x, lengths, self.combine)
            return self.ff(pooled), pooled
        x = x.view(S, len(queries), -1)
        if self.kind == "query":
            return self.ff(x[:, 0]), x[:, 0]
        return self.ff(x).squeeze(-1), x

    def first_norm_input(self, tokens):
        """The input of the first LayerNorm for a study's tokens (N, D): (queries or tokens, D)."""
        x = tokens if self.queries is None else torch.cat([self.queries, tokens])
        n_queries = len(x) - len(tokens) if self.depth == 1 else 0
        attended = attend(self.encoder.layers[0].self_attn, x, [len(x)], n_queries)
        return x[: n_queries or None] + attended

    @torch.no_grad()
    def turning_point(self, start, tokens):
        """The point at which the tokens dominate the first LayerNorm.

        The median over tokens of the norm of its input at the start, divided by the norm of the
        change of that input: before it the start determines its output, after it the tokens.
        """
        if not self.depth:
            return 1.0
        inputs = (self.first_norm_input(self.front(x)) for x in (start, tokens))
        before, after = (x - x.mean(1, keepdim=True) for x in inputs)
        ratio = before.norm(dim=1) / (after - before).norm(dim=1).clamp(min=1e-12)
        return float(ratio.median().clamp(1e-4, 1))

    @torch.no_grad()
    def clip_shares(self, tokens):
        """The share of each token in the answers by attention rollout: (1, N), or (T, N) if each
        label has its query.

        Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020: attention
        averaged over heads, half of it the residual path, multiplied from layer to layer.
        """
        queries, tokens = self.queries, self.front(tokens)
        x = tokens if queries is None else torch.cat([queries, tokens])
        rollout = identity = torch.eye(len(x), device=x.device)
        for layer in self.encoder.layers if self.depth else [None]:
            mha = layer.self_attn if layer else self.encoder
            q, k, _ = F.linear(x, mha.in_proj_weight, mha.in_proj_bias).chunk(3, dim=1)
            q, k = (t.view(len(t), mha.num_heads, -1).transpose(0, 1) for t in (q, k))
            weights = (q @ k.transpose(1, 2) * q.shape[2] ** -0.5).softmax(-1).mean(0)
            if layer:  # depth 0 has no residual path
                weights, x = (weights + identity) / 2, encoder_layer(layer, x, [len(x)])
            rollout = weights @ rollout
        n = len(x) - len(tokens)
        shares = rollout[:n] if n else rollout.mean(0, keepdim=True)
        return shares[:, n:] / shares[:, n:].sum(1, keepdim=True)

    def encode(self, x, lengths, n_queries, rng=None):
        """Run all tokens through the encoder; with queries, return only those: (S * Q, D)."""
        if not self.depth:
            return attend(self.encoder, x, lengths, n_queries, rng)
        for i, layer in enumerate(self.encoder.layers):
            last = i == self.depth - 1
            x = encoder_layer(layer, x, lengths, n_queries if last else 0, rng)
        return x


class Pooled(Aggregator):
    """Baselines without attention: the mean (or maximum) of the clips, then a linear layer (mean),
    or a hidden layer and a linear layer (mlp)."""

    def __init__(self, n_outputs, kind="mean", *args, **options):
        super().__init__(n_outputs, kind, *args, **options)
        hidden = (nn.Linear(self.width, self.width), nn.GELU())
        self.hidden = nn.Sequential(*hidden if kind == "mlp" else ())
        self.ff = nn.Linear(self.width, n_outputs)

    def read(self, tokens, lengths, rng):
        pooled = self.hidden(pool(tokens, lengths, self.combine))
        return self.ff(pooled), pooled


class Weighted(Aggregator):
    """Baselines that weigh each clip by itself: the study is the weighted mean of its clips.

    A subclass gives `weigh`: the weights' logits (N, H) for H heads, and the values (N, D).
    """

    has_attention = True

    def __init__(self, n_outputs, *args, **options):
        super().__init__(n_outputs, *args, **options)
        self.ff = nn.Linear(self.width, n_outputs)

    def weigh(self, tokens):
        raise NotImplementedError

    def read(self, tokens, lengths, rng):
        logits, values = self.weigh(tokens)
        weights = torch.cat([study.softmax(0) for study in logits.split(lengths)])  # (N, H)
        values = values.unflatten(1, (weights.shape[1], -1)) * weights[:, :, None]
        pooled = torch.stack([study.sum(0) for study in values.flatten(1).split(lengths)])
        pooled = self.project(pooled)
        return self.ff(pooled), pooled

    def project(self, pooled):
        return pooled

    @torch.no_grad()
    def clip_shares(self, tokens):
        return self.weigh(self.front(tokens))[0].softmax(0).mean(1)[None]


class AttentiveProbe(Weighted):
    """One learned query attends to the clips, which do not attend to each other.

    The probe of depth 1 by which video encoders are compared (V-JEPA: Bardes et al., TMLR 2024).
    """

    def __init__(self, n_outputs, *args, **options):
        super().__init__(n_outputs, *args, **options)
        self.n_heads = PROBE_HEADS if self.width % PROBE_HEADS == 0 else n_heads(self.width)
        self.query = nn.Parameter(torch.randn(self.width) * 0.02)
        self.key, self.value, self.out = (nn.Linear(self.width, self.width) for _ in range(3))

    def weigh(self, tokens):
        keys = self.key(tokens).unflatten(1, (self.n_heads, -1))
        queries = self.query.view(self.n_heads, -1)
        return (keys * queries).sum(2) * queries.shape[1] ** -0.5, self.value(tokens)

    def project(self, pooled):
        return self.out(pooled)


class GatedAttention(Weighted):
    """Attention-based multiple-instance learning with a gate (Ilse et al., ICML 2018)."""

    def __init__(self, n_outputs, *args, **options):
        super().__init__(n_outputs, *args, **options)
        self.content, self.gate = (nn.Linear(self.width, GATE_WIDTH) for _ in range(2))
        self.weight = nn.Linear(GATE_WIDTH, 1)

    def weigh(self, tokens):
        return self.weight(self.content(tokens).tanh() * self.gate(tokens).sigmoid()), tokens


AGGREGATORS = {"standard": StudyModel, "query": StudyModel, "multiquery": StudyModel}
AGGREGATORS |= {"mean": Pooled, "mlp": Pooled, "attentive": AttentiveProbe, "abmil": GatedAttention}


def build(settings, n_outputs, groups=(), width=EMBED_DIM):
    """The Aggregator of these settings; groups, width: see Aggregator.

    width: or a list, of several encoders; that of the first is the width of all tokens.
    """
    kind, depth = settings.transformer_type, settings.encoder_depth
    widths = width if isinstance(width, list) else [width]
    net = AGGREGATORS[kind](n_outputs, kind, depth, settings.tf_combine, groups, widths[0])
    net.single_clips = settings.video_sampling == "one"
    if len(widths) > 1:
        net.join(widths)
    return net


class EachQuery(nn.Module):
    """An Aggregator with one study embedding per label, (S, T, D)."""

    def __init__(self, net):
        super().__init__()
        self.net, self.n_outputs, self.width = net, net.n_outputs, net.width

    def forward(self, tokens, lengths, rng=None):
        return self.net(tokens, lengths, rng, pool_queries=False)


class Readings(nn.Module):
    """PanEcho's readings from stored clip embeddings, which are the input of its task heads.

    A study's reading is the mean of the activated outputs over its clips and videos. Called like a
    StudyModel: tokens (N, D), lengths (S) -> readings (S, T) and mean clip embeddings (S, D).
    """

    def __init__(self, encoder):
        super().__init__()
        self.heads, self.columns = encoder, encoder.columns()
        self.n_outputs, self.width = len(self.columns), EMBED_DIM
        del self.heads.encoder  # no video is encoded

    def forward(self, tokens, lengths, rng=None):
        outputs = torch.cat(list(self.heads.read(tokens).values()), dim=1)
        return pool(outputs, lengths), pool(tokens, lengths)


def against_rest(logits, groups):
    """Replace the logits (S, O) of each group of classes (a slice) by log-odds against the rest.

    softmax(z)_k / (1 - softmax(z)_k) = exp(z_k) / (the sum of exp(z_j), j != k).
    """
    parts, at = [], 0
    for group in groups:
        z = logits[:, group]
        others = z[:, None].expand(-1, z.shape[1], -1)
        others = others.masked_fill(torch.eye(z.shape[1], device=z.device, dtype=bool), -torch.inf)
        parts += [logits[:, at : group.start], z - others.logsumexp(2)]
        at = group.stop
    return torch.cat([*parts, logits[:, at:]], dim=1)
