"""One vector per text: final norm, pooling over the text's span, cut, L2. Same contract as reference.pool.

    mean: sum / count;  mean_sqrt_len_tokens: sum / sqrt(count);  weightedmean: sum of i * row i / sum of i, i from 1 at the text's start
    max: NaN stays;  cls, lasttoken: one row.  Then the first `dim` columns, divided by max(|v|, 1e-12) where asked for

All in float32, nothing rounded; no atomics. Rows are summed in pieces of PIECE from the span's first, and the pieces in order: a text's
sums are in one order, whatever lies beside it and in either of two ways to launch:
 - many texts: one launch, a program for a text;
 - few, perhaps long: a program for a piece writes its sum, a second launch adds them up. (The host does not know how long the spans are,
   so that the first grid has room for any; programs beyond a text's last piece end at once.)
An empty span gives zeros. A span that is not in its text gives NaN, which is found where the vectors are checked: a launch cannot raise
an error, and foreign memory is not read.

Bytes: b a number that is read, 4 a number of the result, 8 a number of each piece where there are two launches. FLOPs: 1 a number that is
read, about 7 with a norm. Bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyembed.kernels.checks import activations, check, check_whole, weight_and_bias
from pyembed.kernels.rows import normed, tile
from pyembed.ops import POOL_MODES, Norm, PoolMode

# As rows.TILES, with more rows on their way at a time, since a program goes through many. Not measured.
TILES = ((512, 4, 4), (1024, 4, 8), (2048, 2, 8), (4096, 2, 8), (8192, 1, 8))
WIDEST = TILES[-1][0]
PIECE = 128  # rows; not measured
FEW = 256  # texts, below which a program for each leaves much of a card idle if one of them is long; not measured
ONE_ROW = ("cls", "lasttoken")


@triton.jit
def span_of(n, cu, spans, count, MODE: tl.constexpr):
    """First and last + 1 row that text n reads, where the text starts, and whether its span is in it."""
    start, stop = tl.load(cu + n), tl.load(cu + n + 1)
    first, last = tl.load(spans + 2 * n), tl.load(spans + 2 * n + 1)
    known = (first >= last) | ((start >= 0) & (start <= first) & (last <= stop) & (stop <= count))
    last = tl.where(known, last, first)
    if MODE == "cls":
        last = tl.minimum(last, first + 1)
    if MODE == "lasttoken":
        first = tl.maximum(first, last - 1)
    return first, last, start, known


@triton.jit
def nothing(BLOCK: tl.constexpr, MODE: tl.constexpr):
    return tl.full((BLOCK,), float("-inf") if MODE == "max" else 0.0, tl.float32)


@triton.jit
def joined(a, b, MODE: tl.constexpr):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL) if MODE == "max" else a + b


@triton.jit
def piece(
    x, x_stride, first, last, start, columns, width, weight, bias, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    """Sum, or largest, of rows first to last - 1: [BLOCK]."""
    empty = nothing(BLOCK, MODE)[None, :]
    some = tl.broadcast_to(empty, (ROWS, BLOCK))
    for at in range(first, last, ROWS):
        rows = at + tl.arange(0, ROWS)
        read = (rows < last)[:, None] & (columns < width)[None, :]
        y = tl.load(x + rows.to(tl.int64)[:, None] * x_stride + columns[None, :], mask=read, other=0.0).to(tl.float32)
        if NORM:
            y = normed(y, columns, width, weight, bias, eps, tl.float32, LAYER, False)
        if MODE == "weightedmean":
            y = y * (rows - start + 1).to(tl.float32)[:, None]
        some = joined(some, tl.where(read, y, empty), MODE)
    if MODE == "max":
        broken = tl.max((some != some).to(tl.int32), 0) > 0  # tl.max leaves NaN out
        whole = tl.where(broken, float("nan"), tl.max(some, 0))
    else:
        whole = tl.sum(some, 0)
    return whole


@triton.jit
def finish(total, first, last, start, known, n, out, columns, kept, MODE: tl.constexpr, NORMALIZE: tl.constexpr):
    rows = (last - first).to(tl.float32)
    if MODE == "mean":
        total = tl.math.div_rn(total, rows)
    if MODE == "mean_sqrt_len_tokens":
        total = tl.math.div_rn(total, tl.math.sqrt_rn(rows))
    if MODE == "weightedmean":
        total = tl.math.div_rn(total, rows * (first + last + 1 - 2 * start).to(tl.float32) * 0.5)
    inside = columns < kept
    total = tl.where(inside & (first < last), total, 0.0)
    if NORMALIZE:
        size = tl.math.sqrt_rn(tl.sum(total * total, 0))
        total = tl.math.div_rn(total, tl.maximum(size, 1e-12, propagate_nan=tl.PropagateNan.ALL))
    total = tl.where(known, total, float("nan"))
    tl.store(out + n.to(tl.int64) * kept + columns, total, mask=inside)


@triton.jit(do_not_specialize=["count"])
def pool_kernel(
    x, x_stride, cu, spans, weight, bias, out, count, width, kept, eps,
    PIECE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    MODE: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """A program: a text."""
    n = tl.program_id(0)
    first, last, start, known = span_of(n, cu, spans, count, MODE)
    columns = tl.arange(0, BLOCK)
    total = nothing(BLOCK, MODE)
    for at in range(first, last, PIECE):
        end = tl.minimum(at + PIECE, last)
        some = piece(x, x_stride, at, end, start, columns, width, weight, bias, eps, ROWS, BLOCK, MODE, NORM, LAYER)
        total = joined(total, some, MODE)
    finish(total, first, last, start, known, n, out, columns, kept, MODE, NORMALIZE)


@triton.jit
def slot_of(n, start, PIECE: tl.constexpr):
    """Row of `partials` for a text's first piece: texts that follow each other, each with one piece more than it fills, never meet."""
    return (start // PIECE + n).to(tl.int64)


@triton.jit(do_not_specialize=["count"])
def partial_kernel(
    x, x_stride, cu, spans, weight, bias, partials, count, width, eps,
    PIECE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    MODE: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    """A program: a piece of a text."""
    n, i = tl.program_id(0), tl.program_id(1)
    first, last, start, _ = span_of(n, cu, spans, count, MODE)
    columns = tl.arange(0, BLOCK)
    at = first + i * PIECE
    if at < last:
        end = tl.minimum(at + PIECE, last)
        some = piece(x, x_stride, at, end, start, columns, width, weight, bias, eps, ROWS, BLOCK, MODE, NORM, LAYER)
        tl.store(partials + (slot_of(n, start, PIECE) + i) * width + columns, some, mask=columns < width)


@triton.jit(do_not_specialize=["count"])
def combine_kernel(
    partials, cu, spans, out, count, width, kept,
    PIECE: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """A program: a text."""
    n = tl.program_id(0)
    first, last, start, known = span_of(n, cu, spans, count, MODE)
    columns = tl.arange(0, BLOCK)
    total = nothing(BLOCK, MODE)
    slot = slot_of(n, start, PIECE)
    for _ in range(first, last, PIECE):
        total = joined(total, tl.load(partials + slot * width + columns, mask=columns < width, other=0.0), MODE)
        slot += 1
    finish(total, first, last, start, known, n, out, columns, kept, MODE, NORMALIZE)


def pool(
    x: Tensor,  # [T, D], before the final norm
    cu_seqlens: Tensor,  # [N + 1] int32
    spans: Tensor,  # [N, 2] int32, first and last + 1 row that is read
    mode: PoolMode,
    *,
    norm: Norm | None = None,
    normalize: bool = False,
    dim: int | None = None,
) -> Tensor:  # [N, dim or D] float32
    count, columns = check("x", x, activations("x", x), x.device, -1, -1).shape
    texts = check_whole("spans", spans, torch.int32, x.device, -1, 2).shape[0]
    check_whole("cu_seqlens", cu_seqlens, torch.int32, x.device, texts + 1)
    if mode not in POOL_MODES:
        raise ValueError(f"mode must be one of {', '.join(POOL_MODES)}, got {mode!r}")
    kept = columns if dim is None else dim
    if not 0 < kept <= columns:
        raise ValueError(f"dim must be between 1 and the {columns} columns of x, got {dim}")
    weight, bias = weight_and_bias(norm, columns, x.device)
    width = kept if norm is None else columns  # columns that are read
    if width > WIDEST and norm is None and not normalize:  # columns do not need each other
        return torch.cat([pool(part, cu_seqlens, spans, mode) for part in x[:, :kept].split(WIDEST, 1)], 1)
    launch = tile(width, TILES)
    out = torch.empty((texts, kept), dtype=torch.float32, device=x.device)
    if texts == 0:
        return out
    eps = 0.0 if norm is None else norm.eps
    kind = {"PIECE": PIECE, "MODE": mode, "NORM": norm is not None, "LAYER": norm is not None and norm.layer}
    with torch.cuda.device_of(x):
        if mode in ONE_ROW or texts >= FEW or count <= PIECE:
            pool_kernel[(texts,)](
                x, x.stride(0), cu_seqlens, spans, weight, bias, out, count, width, kept, eps, NORMALIZE=normalize, **kind, **launch
            )
            return out
        partials = torch.empty((count // PIECE + texts, width), dtype=torch.float32, device=x.device)
        partial_kernel[(texts, triton.cdiv(count, PIECE))](
            x, x.stride(0), cu_seqlens, spans, weight, bias, partials, count, width, eps, **kind, **launch
        )
        combine_kernel[(texts,)](
            partials, cu_seqlens, spans, out, count, width, kept,
            PIECE=PIECE, MODE=mode, NORMALIZE=normalize, BLOCK=launch["BLOCK"], num_warps=launch["num_warps"],
            enable_fp_fusion=True,
        )  # fmt: skip
    return out
