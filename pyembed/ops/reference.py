"""Every op in plain PyTorch: runs on any device, states the rounding order, and is the oracle of every kernel test.

Rounding, decided here once: norms, softmax, rotary tables, pooling and L2 are float32 inside; a residual sum is rounded to the
activation dtype before it is normalised; attention's probabilities are rounded to the activation dtype before they meet V while
their sum stays float32. Float64 inputs are computed in float64 throughout, which is what kernel tests compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pyembed.config import ModelConfig
from pyembed.int8 import Int8
from pyembed.linear import linear as linear
from pyembed.ops import DistanceBias, Norm, PoolMode, Prefix, Quant, Quantised
from pyembed.ops.budget import Budget, balance

FROM_REFERENCE: tuple[str, ...] = ()
FP8_MAX = 448.0  # largest float8_e4m3fn
L2_EPS = 1e-12  # torch.nn.functional.normalize's default, which sentence-transformers uses


def _wide(x: Tensor) -> Tensor:
    """The dtype that sums are kept in: float32, or float64 for a float64 oracle."""
    return x if x.dtype == torch.float64 else x.float()


def _maybe_quantise(x: Tensor, dtype: torch.dtype, quant: Quant | None) -> Tensor | Quantised:
    """Round wide `x` to `dtype`; with `quant`, then to eight bits."""
    x = x.to(dtype)
    return x if quant is None else quantised(x, quant)


def quantised(x: Tensor, quant: Quant) -> Quantised:
    """Rows [T, D] in eight bits with one scale each, absmax / largest value. A row that is not finite has a scale that is not."""
    wide, largest = _wide(x), (FP8_MAX if quant == "fp8" else 127.0)
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(1e-12) / largest
    scaled = wide / scale
    values = scaled.to(torch.float8_e4m3fn) if quant == "fp8" else scaled.round().to(torch.int8)
    return Quantised(values, scale.squeeze(-1).float())


def budget(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Budget:
    """What one batch should hold. No promise of speed is made here."""
    return Budget(4096, balance(config, rate=0.5))


def schedule(lengths: Sequence[int]) -> object:
    """What `attention` wants to know about a batch's query lengths, made once and used by every layer. Here: nothing."""
    return None


def embed(
    input_ids: Tensor,  # [T] int64
    tokens: Tensor,  # [V, D]
    *,
    scale: float = 1.0,
    positions: Tensor | None = None,  # [T] int64, row of `position_table` for each token
    position_table: Tensor | None = None,  # [positions, D]
    type_row: Tensor | None = None,  # [D], the embedding of token type 0
    norm: Norm | None = None,
) -> Tensor:  # [T, D] in the dtype of `tokens`
    """tokens[id] * scale + position_table[position] + type_row, then `norm`; one rounding, at the end. `scale` is given as rounded."""
    x = _wide(tokens[input_ids]) * scale
    if position_table is not None:
        assert positions is not None
        x = x + _wide(position_table[positions])
    if type_row is not None:
        x = x + _wide(type_row)
    if norm is not None:
        x = _normed(x, norm, tokens.dtype)
    return x.to(tokens.dtype)


def _normed(x: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """Norm of wide `x` in its own width; `dtype` is the activation dtype that a `round_first` norm rounds to before its weight."""
    if norm.layer:
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    if norm.round_first:
        y = y.to(dtype).to(x.dtype)
    if norm.weight is not None:
        y = y * norm.weight.to(x.dtype)
    return y if norm.bias is None else y + norm.bias.to(x.dtype)


def _add_norm(x: Tensor, norm: Norm, residual: Tensor | None, quant: Quant | None) -> Tensor | Quantised:
    if residual is not None:
        x = residual.copy_(_wide(residual) + _wide(x))
    return _maybe_quantise(_normed(_wide(x), norm, x.dtype), x.dtype, quant)


def rms_norm(
    x: Tensor,  # [T, D]
    norm: Norm,
    *,
    residual: Tensor | None = None,  # [T, D], overwritten with residual + x
    quant: Quant | None = None,
) -> Tensor | Quantised:  # [T, D]
    """RMSNorm (arXiv 1910.07467) of x, or of residual + x, which is then also what `residual` holds."""
    return _add_norm(x, norm, residual, quant)


def layer_norm(x: Tensor, norm: Norm, *, residual: Tensor | None = None, quant: Quant | None = None) -> Tensor | Quantised:
    """LayerNorm (arXiv 1607.06450); arguments as `rms_norm`."""
    return _add_norm(x, norm, residual, quant)


def qk_norm_rope(
    qkv: Tensor,  # [T, (H + 2 G) * K], overwritten
    num_heads: int,  # H
    num_key_value_heads: int,  # G
    *,
    cos: Tensor | None = None,  # [positions, R / 2] float32; None: no rotation
    sin: Tensor | None = None,  # [positions, R / 2] float32
    rows: Tensor | None = None,  # [T] int64, row of the tables for each token
    interleaved: bool = False,  # pairs (0, 1), (2, 3) ... (GPT-J) instead of (0, R / 2), (1, R / 2 + 1) ...
    q_norm: Norm | None = None,  # per head, weight [K]
    k_norm: Norm | None = None,
) -> None:
    """RMSNorm of each query and key head, rounded, then rotation of its first R dimensions (RoFormer, arXiv 2104.09864), in place."""
    count = num_heads + 2 * num_key_value_heads
    heads = qkv.view(qkv.shape[0], count, qkv.shape[1] // count)
    for part, norm in ((heads[:, :num_heads], q_norm), (heads[:, num_heads : num_heads + num_key_value_heads], k_norm)):
        if norm is not None:
            part.copy_(_normed(_wide(part), norm, qkv.dtype))
        if cos is not None:
            assert sin is not None and rows is not None
            rotated = part[..., : 2 * cos.shape[1]]
            first, second = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, -1)
            a, b = _wide(first), _wide(second)
            c, s = cos[rows].unsqueeze(1).to(a.dtype), sin[rows].unsqueeze(1).to(a.dtype)  # [T, 1, R / 2]
            a, b = a * c - b * s, b * c + a * s
            first.copy_(a)
            second.copy_(b)


def attention(
    q: Tensor,  # [Tq, H, K], any strides with unit last
    k: Tensor,  # [Tk, G, K]
    v: Tensor,  # [Tk, G, K]
    cu_q: Tensor,  # [N + 1] int32
    cu_k: Tensor,  # [N + 1] int32
    schedule: object,
    *,
    causal: bool,
    window: tuple[int, int] | None = None,  # keys from left before to right after the query, both inclusive; -1: unlimited
    scale: float,
    softcap: float | None = None,  # scores become softcap * tanh(scores / softcap)
    bias: DistanceBias | None = None,
    prefix: Prefix | None = None,
    q_start: Tensor | None = None,  # [N] int32, position of each text's first query, its prefix included; None: queries are last
) -> Tensor:  # [Tq, H, K] contiguous; rows at and beyond cu_q[-1] are unspecified
    """Softmax attention within each sequence, query head h reading key/value head h // (H / G).

    Positions are absolute: a text's prefix takes 0 .. p - 1, its own keys follow. `causal` hides keys after the query; the
    window, bias and causal mask all compare positions. A query that may see no key gets zeros.
    """
    out = torch.zeros((q.shape[0], q.shape[1], q.shape[2]), dtype=q.dtype, device=q.device)
    group = q.shape[1] // k.shape[1]
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    for n in range(len(starts_q) - 1):
        qn, kn, vn = q[starts_q[n] : starts_q[n + 1]], k[starts_k[n] : starts_k[n + 1]], v[starts_k[n] : starts_k[n + 1]]
        if prefix is not None and int(prefix.prefix_of[n]) >= 0:
            p = int(prefix.prefix_of[n])
            own = slice(int(prefix.cu_p[p]), int(prefix.cu_p[p + 1]))
            kn, vn = torch.cat([prefix.k[own], kn]), torch.cat([prefix.v[own], vn])
        if len(qn) == 0 or len(kn) == 0:
            continue
        first = len(kn) - len(qn) if q_start is None else int(q_start[n])
        q_heads = _wide(qn).transpose(0, 1)  # [H, Lq, K]
        k_heads = _wide(kn).transpose(0, 1).repeat_interleave(group, 0)  # [H, Lk, K]
        v_heads = _wide(vn).transpose(0, 1).repeat_interleave(group, 0)
        scores = q_heads @ k_heads.transpose(1, 2) * scale  # [H, Lq, Lk]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(len(kn), device=q.device)[None, :] - torch.arange(first, first + len(qn), device=q.device)[:, None]
        if bias is not None:
            scores = scores + bias.table.to(scores.dtype)[:, distance.clamp(-bias.radius, bias.radius) + bias.radius]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if causal:
            hidden |= distance > 0
        if window is not None and window[0] >= 0:
            hidden |= distance < -window[0]
        if window is not None and window[1] >= 0:
            hidden |= distance > window[1]
        scores = scores.masked_fill(hidden, -torch.inf)
        largest = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - largest.masked_fill(largest == -torch.inf, 0.0))
        total = weights.sum(-1, keepdim=True)
        mixed = weights.to(q.dtype).to(weights.dtype) @ v_heads / total.masked_fill(total == 0, 1.0)
        out[starts_q[n] : starts_q[n + 1]] = mixed.transpose(0, 1).to(q.dtype)
    return out


def swiglu(x: Tensor, *, quant: Quant | None = None) -> Tensor | Quantised:
    """silu(gate) * up (arXiv 2002.05202) on the merged projection: x [T, 2 F] = [gate | up] -> [T, F]; one rounding."""
    gate, up = _wide(x).chunk(2, -1)
    return _maybe_quantise(F.silu(gate) * up, x.dtype, quant)


def geglu(x: Tensor, *, tanh: bool, quant: Quant | None = None) -> Tensor | Quantised:
    """gelu(gate) * up on the merged projection [gate | up], gelu by its tanh approximation or by erf; one rounding."""
    gate, up = _wide(x).chunk(2, -1)
    return _maybe_quantise(F.gelu(gate, approximate="tanh" if tanh else "none") * up, x.dtype, quant)


def gelu(x: Tensor, *, tanh: bool, quant: Quant | None = None) -> Tensor | Quantised:
    """gelu(x) (arXiv 1606.08415), [T, F] -> [T, F]."""
    return _maybe_quantise(F.gelu(_wide(x), approximate="tanh" if tanh else "none"), x.dtype, quant)


def pool(
    x: Tensor,  # [T, D], before the final norm
    cu_seqlens: Tensor,  # [N + 1] int32
    spans: Tensor,  # [N, 2] int32, first and last + 1 row that is read
    mode: PoolMode,
    *,
    norm: Norm | None = None,  # applied to every row that is read, not rounded
    normalize: bool = False,  # L2, after the cut to `dim`
    dim: int | None = None,
) -> Tensor:  # [N, dim or D] float32
    """One vector per text. Weighted means number tokens from 1 at the text's start, whatever the span leaves out (SGPT, arXiv 2202.08904).

    An empty span gives zeros, as sentence-transformers' masked sums do.
    """
    width = x.shape[1] if dim is None else dim
    out = torch.zeros((len(spans), width), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
    starts = cu_seqlens.tolist()
    for n, (first, end) in enumerate(spans.tolist()):
        if first >= end:
            continue
        if mode == "cls":
            end = first + 1
        elif mode == "lasttoken":
            first = end - 1
        rows = _wide(x[first:end])
        if norm is not None:
            rows = _normed(rows, norm, rows.dtype)
        if mode == "max":
            pooled = rows.amax(0)
        elif mode == "weightedmean":
            weights = torch.arange(first - starts[n] + 1, end - starts[n] + 1, device=x.device, dtype=rows.dtype)
            pooled = (rows * weights[:, None]).sum(0) / weights.sum()
        elif mode == "mean_sqrt_len_tokens":
            pooled = rows.sum(0) / (end - first) ** 0.5
        else:
            pooled = rows.mean(0)
        out[n] = pooled[:width]
    return F.normalize(out, dim=-1, eps=L2_EPS) if normalize else out


def latent_attention(scores: Tensor, heads: int) -> Tensor:
    """Softmax over the latents of each head: [T, heads * latents] -> the same shape (NV-Embed, arXiv 2405.17428, with folded constants).

    The products around it are library GEMMs: scores = norm(x) @ (scale * W_q K^T), and what comes back meets V W_o.
    """
    wide = _wide(scores).unflatten(-1, (heads, -1))
    return torch.softmax(wide, -1).flatten(-2).to(scores.dtype)


def rescaled(
    product: Tensor,  # [T, O] int32, of rows in int8 and weights in int8
    rows: Tensor,  # [T] float32, scale of each row
    outputs: Tensor,  # [O] float32, scale of each output
    bias: Tensor | None,  # [O] bfloat16
) -> Tensor:  # [T, O] bfloat16; float64 where the scales are
    """product * (rows * outputs) + bias in float32, no two operations contracted into one, then one rounding.

    A row whose scale is not finite is NaN throughout.
    """
    steps = torch.where(rows.isfinite(), rows, torch.nan)[:, None] * outputs
    y = product.to(rows.dtype) * steps
    if bias is not None:
        y = y + bias.to(rows.dtype)
    return y if y.dtype == torch.float64 else y.to(torch.bfloat16)


def int8(layer: Int8, *, gated: bool = False) -> Int8:
    """The layer that runs in place of `layer`; `gated`: its weight is [gate; up] of a gated MLP."""
    return replace(layer, gated=gated)
