"""Norm and rotation (RoFormer, arXiv 2104.09864) of query and key heads, in place: same contract as `reference.qk_norm_rope`.

    x = round(norm(x));    (a, b) = (a * cos - b * sin, b * cos + a * sin),    pairs (a, b) = (x[i], x[i + R / 2]) or (x[2 i], x[2 i + 1])

In float32 but for two roundings to the activation dtype, after the norm and at the end (a third in the norm where it rounds before its
weight). Of a head with R < K the last K - R dimensions are not turned; value heads are not touched.

A program has ROWS heads of neighbouring tokens, all queries or all keys, and reads each number once, before it writes it. A head's numbers
do not depend on the heads beside it. Bytes: 2 b for each number of a query or key head, in a dtype of b bytes. FLOPs: about 4 with a norm,
3 with rotation. Bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyembed.kernels.checks import activations, check, check_whole, weight_and_bias
from pyembed.ops import Norm
from pyembed.ops.checks import check_rows_apart

# Heads and warps of a program, by head dimension rounded up to a power of two: 32 numbers a thread, half a warp or a warp to a head of 128
# or 256. For all dtypes and cards, since memory is what bounds it. Predictions, not measured.
LAUNCHES = {16: (256, 4), 32: (128, 4), 64: (64, 4), 128: (32, 4), 256: (16, 4)}


@triton.jit
def _normed(
    a, b, rest, i, j, weight, bias, eps, dtype: tl.constexpr,
    WIDTH: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Norm of heads of the dimensions a and b, which make pairs, and rest; all are zero where there is no dimension, also after it."""
    pairs = (i < HALF)[None, :]
    others = (j < WIDTH - 2 * HALF)[None, :]
    if NORM & 2:
        mean = ((tl.sum(a, 1) + tl.sum(b, 1) + tl.sum(rest, 1)) / WIDTH)[:, None]
        a = tl.where(pairs, a - mean, 0.0)
        b = tl.where(pairs, b - mean, 0.0)
        rest = tl.where(others, rest - mean, 0.0)
    square = tl.sum(a * a, 1) + tl.sum(b * b, 1) + tl.sum(rest * rest, 1)
    factor = tl.rsqrt(square / WIDTH + eps)[:, None]
    a = a * factor
    b = b * factor
    rest = rest * factor
    if NORM & 4:
        a = a.to(dtype).to(tl.float32)
        b = b.to(dtype).to(tl.float32)
        rest = rest.to(dtype).to(tl.float32)
    first = i
    second = HALF + i
    if INTERLEAVED:
        first = 2 * i
        second = 2 * i + 1
    if weight is not None:
        a = a * tl.load(weight + first, mask=i < HALF, other=0.0)[None, :]
        b = b * tl.load(weight + second, mask=i < HALF, other=0.0)[None, :]
        rest = rest * tl.load(weight + 2 * HALF + j, mask=j < WIDTH - 2 * HALF, other=0.0)[None, :]
    if bias is not None:
        a = a + tl.load(bias + first, mask=i < HALF, other=0.0)[None, :]
        b = b + tl.load(bias + second, mask=i < HALF, other=0.0)[None, :]
        rest = rest + tl.load(bias + 2 * HALF + j, mask=j < WIDTH - 2 * HALF, other=0.0)[None, :]
    return a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32), rest.to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "q_programs", "q_heads", "k_heads", "k_first"])
def _kernel(
    qkv, row_stride, tokens, q_programs, q_heads, k_heads, k_first, cos, cos_stride, sin, sin_stride, rows,
    q_weight, q_bias, q_eps, k_weight, k_bias, k_eps,
    WIDTH: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = qkv.dtype.element_ty
    of_q = tl.program_id(0) < q_programs
    heads = tl.where(of_q, q_heads, k_heads)
    at = (tl.program_id(0) - tl.where(of_q, 0, q_programs)) * ROWS + tl.arange(0, ROWS)
    token = at // heads
    head = at % heads + tl.where(of_q, 0, k_first)
    there = (token < tokens)[:, None]
    x = qkv + (token.to(tl.int64) * row_stride + head * WIDTH)[:, None]

    i = tl.arange(0, BLOCK_PAIRS)
    j = tl.arange(0, BLOCK_REST)
    pairs = there & (i < HALF)[None, :]
    others = there & (j < WIDTH - 2 * HALF)[None, :]
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK_PAIRS)
        whole = tl.load(x + both[None, :], mask=there & (both < 2 * HALF)[None, :], other=0.0)
        a, b = tl.split(tl.reshape(whole, [ROWS, BLOCK_PAIRS, 2]))
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    else:
        a = tl.load(x + i[None, :], mask=pairs, other=0.0).to(tl.float32)
        b = tl.load(x + HALF + i[None, :], mask=pairs, other=0.0).to(tl.float32)
    rest = tl.load(x + 2 * HALF + j[None, :], mask=others, other=0.0).to(tl.float32)

    if of_q:
        if Q_NORM:
            a, b, rest = _normed(a, b, rest, i, j, q_weight, q_bias, q_eps, dtype, WIDTH, HALF, INTERLEAVED, Q_NORM)
    else:
        if K_NORM:
            a, b, rest = _normed(a, b, rest, i, j, k_weight, k_bias, k_eps, dtype, WIDTH, HALF, INTERLEAVED, K_NORM)

    if cos is not None:
        row = tl.load(rows + token, mask=token < tokens, other=0)[:, None]
        c = tl.load(cos + row * cos_stride + i[None, :], mask=pairs, other=0.0)
        s = tl.load(sin + row * sin_stride + i[None, :], mask=pairs, other=0.0)
        a, b = a * c - b * s, b * c + a * s

    if INTERLEAVED:
        whole = tl.reshape(tl.join(a.to(dtype), b.to(dtype)), [ROWS, 2 * BLOCK_PAIRS])
        tl.store(x + both[None, :], whole, mask=there & (both < 2 * HALF)[None, :])
    else:
        tl.store(x + i[None, :], a.to(dtype), mask=pairs)
        tl.store(x + HALF + i[None, :], b.to(dtype), mask=pairs)
    tl.store(x + 2 * HALF + j[None, :], rest.to(dtype), mask=others)


def _kind(norm: Norm | None) -> int:
    """What the kernel is compiled for: a norm at all, LayerNorm, rounded before its weight."""
    return 0 if norm is None else 1 + 2 * norm.layer + 4 * norm.round_first


def qk_norm_rope(
    qkv: Tensor,  # [T, (H + 2 G) * K], overwritten
    num_heads: int,  # H
    num_key_value_heads: int,  # G
    *,
    cos: Tensor | None = None,  # [positions, R / 2] float32; None: no rotation
    sin: Tensor | None = None,  # [positions, R / 2] float32
    rows: Tensor | None = None,  # [T] int64, row of the tables for each token
    interleaved: bool = False,
    q_norm: Norm | None = None,  # per head, weight [K]
    k_norm: Norm | None = None,
) -> None:
    device = qkv.device
    tokens, columns = check("qkv", qkv, activations("qkv", qkv), device, -1, -1).shape
    check_rows_apart("qkv", qkv)
    width, over = divmod(columns, max(1, num_heads + 2 * num_key_value_heads))
    if over or num_heads < 0 or num_key_value_heads < 0:
        raise ValueError(f"qkv has {columns} columns, which are not {num_heads} + 2 * {num_key_value_heads} heads")
    block = max(16, triton.next_power_of_2(width))
    if block not in LAUNCHES:
        raise ValueError(f"a head must have 1 to {max(LAUNCHES)} dimensions, got {width}")
    if tokens * (num_heads + num_key_value_heads) >= 2**31:
        raise ValueError(f"qkv must hold fewer than 2**31 query and key heads, got {tokens} rows of {num_heads} + {num_key_value_heads}")
    half, cos_stride, sin_stride = 0, 0, 0
    if cos is not None:
        if sin is None or rows is None:
            raise ValueError("cos was given without sin or rows")
        positions, half = check("cos", cos, torch.float32, device, -1, -1).shape
        check("sin", sin, torch.float32, device, positions, half)
        if 2 * half > width:
            raise ValueError(f"cos has {half} columns, which rotate {2 * half} dimensions, but a head has {width}")
        check_whole("rows", rows, torch.int64, device, tokens)
        cos_stride, sin_stride = cos.stride(0), sin.stride(0)
    q_weight, q_bias = weight_and_bias(q_norm, width, device)
    k_weight, k_bias = weight_and_bias(k_norm, width, device)

    # Heads that nothing is done to get no programs.
    q_heads = num_heads if cos is not None or q_norm is not None else 0
    k_heads = num_key_value_heads if cos is not None or k_norm is not None else 0
    heads, warps = LAUNCHES[block]
    q_programs = triton.cdiv(tokens * q_heads, heads)
    programs = q_programs + triton.cdiv(tokens * k_heads, heads)
    if programs == 0:
        return
    with torch.cuda.device_of(qkv):
        _kernel[(programs,)](
            qkv, qkv.stride(0), tokens, q_programs, q_heads, k_heads, num_heads, cos, cos_stride, sin, sin_stride, rows,
            q_weight, q_bias, 0.0 if q_norm is None else q_norm.eps, k_weight, k_bias, 0.0 if k_norm is None else k_norm.eps,
            WIDTH=width, HALF=half, ROWS=heads, BLOCK_PAIRS=triton.next_power_of_2(max(1, half)),
            BLOCK_REST=triton.next_power_of_2(max(1, width - 2 * half)), INTERLEAVED=interleaved and half > 0,
            Q_NORM=_kind(q_norm), K_NORM=_kind(k_norm), num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
