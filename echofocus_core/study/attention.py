"""torch's transformer layers over packed studies: tokens joined without padding.

x is (N, D): the tokens of several studies; `lengths`: the number of tokens of each. Parameters and
results are those of torch.nn.TransformerEncoderLayer and MultiheadAttention.
"""

from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

MOST_WEIGHTS = 1 << 26  # attention weights in memory in training on a CPU: 256 MB in fp32


def pool(x, lengths, combine="avg"):
    """x (N, D) of studies of these lengths -> (S, D): the mean ('avg') or maximum over each."""
    lengths = torch.tensor(lengths).to(x.device, non_blocking=True)
    return torch.segment_reduce(
        x, {"avg": "mean"}.get(combine, "max"), lengths=lengths, unsafe=True
    )


def encoder_layer(layer, x, lengths, n_queries=0, rng=None):
    """torch's post-norm TransformerEncoderLayer over packed studies, x (N, D).

    With n_queries, only the first n_queries tokens of each study are computed, and the others are
    only keys and values: the same results with less work.
    """
    attended = attend(layer.self_attn, x, lengths, n_queries, rng)
    if n_queries:
        x = torch.cat([study[:n_queries] for study in x.split(lengths)])
    x = layer.norm1(x + drop(attended, layer.dropout1, rng))
    hidden = drop(F.relu(layer.linear1(x)), layer.dropout, rng)
    return layer.norm2(x + drop(layer.linear2(hidden), layer.dropout2, rng))


def drop(x, dropout, rng):
    """Apply a dropout module; with `rng`, by 16 random bits per number, faster than torch's."""
    if not dropout.training or rng is None:
        return dropout(x)
    bits = np.frombuffer(rng.bytes(2 * x.numel()), np.uint16)
    kept = torch.from_numpy(bits >= round(dropout.p * 2**16)).view(x.shape)
    return x * kept.to(x.dtype).div_(1 - dropout.p)


def attend(mha, x, lengths, n_queries=0, rng=None):
    """Self-attention within each study of x (N, D); the weights are a MultiheadAttention's.

    Returns (N, D), or with n_queries only the first n_queries tokens of each study.
    """
    if n_queries:
        D = mha.embed_dim
        wq, wkv = mha.in_proj_weight.split([D, 2 * D])
        bq, bkv = mha.in_proj_bias.split([D, 2 * D])
        first = torch.cat([study[:n_queries] for study in x.split(lengths)])
        q, q_lengths = F.linear(first, wq, bq), [n_queries] * len(lengths)
        k, v = F.linear(x, wkv, bkv).chunk(2, dim=1)
    else:
        q, k, v = F.linear(x, mha.in_proj_weight, mha.in_proj_bias).chunk(3, dim=1)
        q_lengths = lengths
    dropout = nn.Dropout(mha.dropout).train(mha.training)
    out = attention(q, k, v, mha.num_heads, q_lengths, lengths, dropout, rng)
    return mha.out_proj(out)


def attention(q, k, v, heads, q_lengths, lengths, dropout, rng):
    """softmax(q k' / sqrt(d)) v within each study: q (M, D), k and v (N, D) -> (M, D)."""
    D = q.shape[1]
    if q.device.type == "cuda":
        return packed_attention(q, k, v, heads, q_lengths, lengths, dropout, rng)
    if len(set(lengths)) == 1:  # equal lengths run as one batch
        q, k, v = (t.view(len(lengths), -1, heads, D // heads).transpose(1, 2) for t in (q, k, v))
        return weighted_values(q, k, v, dropout, rng).transpose(1, 2).reshape(-1, D)
    out = []
    for qkv in zip(q.split(q_lengths), k.split(lengths), v.split(lengths), strict=True):
        # Contiguous: twice as fast on a CPU, since rows 9 kB apart compete for cache lines.
        qkv = (t.view(1, -1, heads, D // heads).transpose(1, 2).contiguous() for t in qkv)
        out.append(weighted_values(*qkv, dropout, rng).transpose(1, 2).reshape(-1, D))
    return torch.cat(out)


def packed_attention(q, k, v, heads, q_lengths, lengths, dropout, rng):
    """`attention` as one kernel over studies of any lengths, in fp32 or bf16.

    torch's public variable-length attention supports neither fp32 nor dropout; this is the kernel
    of its nested tensors. One kernel per study would leave a GPU idle between launches, and in bf16
    torch would plan a new kernel for every length.
    """
    q_ends, ends = (
        torch.tensor([0, *accumulate(n)], dtype=torch.int32).to(q.device, non_blocking=True)
        for n in (q_lengths, lengths)
    )
    D = q.shape[1]
    q, k, v = (t.view(1, -1, heads, D // heads) for t in (q, k, v))
    p = dropout.p if dropout.training else 0.0
    kernel = torch.ops.aten._efficient_attention_forward
    longest = max(q_lengths), max(lengths)
    out, *_ = kernel(q, k, v, None, q_ends, ends, *longest, p, 0, torch.is_grad_enabled())
    return out.view(-1, D)


def weighted_values(q, k, v, dropout, rng):
    """softmax(q k' / sqrt(d)) v of (S, heads, N, d), with dropout of the weights in training.

    On a CPU, torch's dropout needs all N x N weights in memory. If these exceed MOST_WEIGHTS, the
    queries are split into pieces, and each piece is computed again for its gradient.
    """
    if not dropout.training:
        return F.scaled_dot_product_attention(q, k, v)

    def piece(q, k, v, seed):
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        rng = None if seed is None else np.random.default_rng(seed)
        return drop(weights, dropout, rng).to(v.dtype) @ v

    def draw():
        return None if rng is None else int(rng.integers(2**62))

    rows = max(1, MOST_WEIGHTS // (q.shape[0] * q.shape[1] * k.shape[2]))
    if rows >= q.shape[2]:
        return piece(q, k, v, draw())
    pieces = [
        checkpoint(piece, x, k, v, draw(), use_reentrant=False, preserve_rng_state=rng is None)
        for x in q.split(rows, 2)
    ]
    return torch.cat(pieces, dim=2)
