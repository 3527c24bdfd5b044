"""The set transformer that reads a study's clips, and PanEcho's task heads."""

import torch
import torch.nn.functional as F
from torch import nn

from echofocus_core import EMBED_DIM as D
from echofocus_core.study.attention import attend, encoder_layer, pool

HEADS = 6
DROPOUT = 0.2


class StudyModel(nn.Module):
    """The set transformer: from a study's clips, an unordered set, to its labels.

    standard: encoder over the clips, mean or maximum over clips, linear head.
    query: a learned query token joins the clips; the head reads its output.
    multiquery: one query per label, one shared head.
    Parameters are named as in the published checkpoints. Depth 0 is one attention layer.
    """

    def __init__(self, n_labels, kind="standard", depth=1, combine="avg", groups=()):
        """groups: slices of the outputs, each with the classes of one label."""
        super().__init__()
        self.n_labels, self.kind, self.depth, self.combine = n_labels, kind, depth, combine
        self.groups = groups
        if kind == "query":
            self.query_token = nn.Parameter(torch.randn(1, 1, D) * 0.02)
        if kind == "multiquery":
            self.query_tokens = nn.Parameter(torch.randn(1, n_labels, D) * 0.02)
        if depth:
            layer = nn.TransformerEncoderLayer(D, HEADS, D, DROPOUT, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        else:
            self.encoder = nn.MultiheadAttention(D, HEADS, DROPOUT, batch_first=True)
        self.ff = nn.Linear(D, 1 if kind == "multiquery" else n_labels)

    @property
    def queries(self):
        """The learned query tokens (Q, D); None for the standard kind."""
        if self.kind == "standard":
            return None
        return (self.query_token if self.kind == "query" else self.query_tokens)[0]

    def forward(self, tokens, lengths, rng=None, pool_queries=True):
        """tokens (N, D) of S studies, lengths (S) -> outputs (S, T), study embeddings (S, D).

        A multiquery model's embedding is the mean over its labels; without `pool_queries` there is
        one per label, (S, T, D). Outputs of classes are log-odds, see `study.outputs`.
        rng: a numpy Generator for dropout in training; None: torch's generator.
        """
        logits, embeddings = self.read(tokens, lengths, rng)
        if self.kind == "multiquery" and pool_queries:
            embeddings = embeddings.mean(1)
        return against_rest(logits, self.groups) if self.groups else logits, embeddings

    def read(self, tokens, lengths, rng):
        S, queries = len(lengths), self.queries
        if queries is not None:  # each study's queries precede its clips
            parts = [x for study in tokens.split(lengths) for x in (queries, study)]
            tokens, lengths = torch.cat(parts), [n + len(queries) for n in lengths]
        x = self.encode(tokens, lengths, 0 if queries is None else len(queries), rng)
        if self.kind == "standard":
            pooled = pool(x, lengths, self.combine)
            return self.ff(pooled), pooled
        x = x.view(S, len(queries), D)
        if self.kind == "query":
            return self.ff(x[:, 0]), x[:, 0]
        return self.ff(x).squeeze(-1), x

    def first_norm_input(self, tokens):
        """The input of the first LayerNorm for a study's tokens (N, D): (queries or tokens, D)."""
        x = tokens if self.queries is None else torch.cat([self.queries, tokens])
        n_queries = len(x) - len(tokens) if self.depth == 1 else 0
        attended = attend(self.encoder.layers[0].self_attn, x, [len(x)], n_queries)
        return x[: n_queries or None] + attended

    def attention_maps(self, tokens):
        """Each layer's attention among a study's tokens (N, D), preceded by the queries.

        Yields ((N, N) mean over heads, whether the layer has a residual path: not at depth 0).
        """
        x = tokens if self.queries is None else torch.cat([self.queries, tokens])
        for layer in self.encoder.layers if self.depth else [None]:
            mha = layer.self_attn if layer else self.encoder
            q, k, _ = F.linear(x, mha.in_proj_weight, mha.in_proj_bias).chunk(3, dim=1)
            q, k = (t.view(-1, HEADS, D // HEADS).transpose(0, 1) for t in (q, k))
            yield (q @ k.transpose(1, 2) * (D // HEADS) ** -0.5).softmax(-1).mean(0), bool(layer)
            x = encoder_layer(layer, x, [len(x)]) if layer else x

    def encode(self, x, lengths, n_queries, rng=None):
        """Run all tokens through the encoder; with queries, return only those: (S * Q, D)."""
        if not self.depth:
            return attend(self.encoder, x, lengths, n_queries, rng)
        for i, layer in enumerate(self.encoder.layers):
            last = i == self.depth - 1
            x = encoder_layer(layer, x, lengths, n_queries if last else 0, rng)
        return x


class EachQuery(nn.Module):
    """A multiquery StudyModel with one study embedding per label, (S, T, D)."""

    def __init__(self, net):
        super().__init__()
        self.net, self.n_labels = net, net.n_labels

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
        self.n_labels = len(self.columns)
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
