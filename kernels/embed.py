"""tokens[id] * scale + position_table[position] + type_row, then `norm`. Same contract as reference.embed.

Float32 inside, one rounding at the end (a norm that rounds before its weight rounds there too). A row whose id or position is not in its
table is NaN, which is found where the vectors are checked: a launch cannot raise an error, and foreign memory is not read.

Bytes of a number, in a dtype of b bytes: 2 b, 3 b with positions. FLOPs: at most about 10. Bound by memory, and by its latency in rows that
lie apart.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyembed.kernels.checks import activations, check, check_whole, weight_and_bias
from pyembed.kernels.rows import normed, store_rows, tile
from pyembed.ops import Norm


@triton.jit
def looked_up(table, stride, table_rows, at, columns, width, real):
    """Rows of a table [ROWS, BLOCK] in float32, and whether each is in it."""
    known = real & (at >= 0) & (at < table_rows)
    kept = known[:, None] & (columns < width)[None, :]
    return tl.load(table + at[:, None] * stride + columns[None, :], mask=kept, other=0.0).to(tl.float32), known


@triton.jit(do_not_specialize=["count"])
def embed_kernel(
    ids, tokens, tokens_stride, vocabulary, factor, positions, table, table_stride, table_rows, type_row, weight, bias, out,
    count, width, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr, ROUND_FIRST: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    real = rows < count
    x, known = looked_up(tokens, tokens_stride, vocabulary, tl.load(ids + rows, mask=real, other=0), columns, width, real)
    x = x * factor
    if table is not None:
        y, there = looked_up(table, table_stride, table_rows, tl.load(positions + rows, mask=real, other=0), columns, width, real)
        x = x + y
        known = known & there
    if type_row is not None:
        x = x + tl.load(type_row + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    if NORM:
        x = normed(x, columns, width, weight, bias, eps, out.dtype.element_ty, LAYER, ROUND_FIRST)
    x = tl.where(known[:, None], x, float("nan"))
    store_rows(x, out, None, rows, columns, count, width, out.dtype.element_ty)


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
    device = tokens.device
    vocabulary, width = check("tokens", tokens, activations("tokens", tokens), device, -1, -1).shape
    count = check_whole("input_ids", input_ids, torch.int64, device, -1).shape[0]
    table_stride, table_rows = 0, 0
    if position_table is not None:
        if positions is None:
            raise ValueError("position_table was given without positions")
        check_whole("positions", positions, torch.int64, device, count)
        table_rows = check("position_table", position_table, tokens.dtype, device, -1, width).shape[0]
        table_stride = position_table.stride(0)
    if type_row is not None:
        check_whole("type_row", type_row, tokens.dtype, device, width)
    weight, bias = weight_and_bias(norm, width, device)
    launch = tile(width)
    out = torch.empty((count, width), dtype=tokens.dtype, device=device)
    if count == 0:
        return out
    with torch.cuda.device_of(tokens):
        embed_kernel[(triton.cdiv(count, launch["ROWS"]),)](
            input_ids, tokens, tokens.stride(0), vocabulary, scale,
            None if position_table is None else positions, position_table, table_stride, table_rows, type_row, weight, bias, out,
            count, width, 0.0 if norm is None else norm.eps,
            NORM=norm is not None, LAYER=norm is not None and norm.layer, ROUND_FIRST=norm is not None and norm.round_first, **launch,
        )  # fmt: skip
    return out
