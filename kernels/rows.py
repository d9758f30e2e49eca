"""What the kernels that work row by row share: the launch table, the norm of a row, and rows in eight bits.

A program has a tile of a few whole rows in registers, as float32, so that a row is read once and written once. A row's numbers do not
depend on the rows beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyembed.ops import Quant, Quantised

# A tile: columns (a row is at most that wide), rows, warps. For all dtypes, since the arithmetic is float32: 16 or 32 numbers a thread.
# Not measured.
PIECE = 512  # columns of a tile that need not hold whole rows
TILES = ((256, 8, 4), (512, 4, 4), (1024, 2, 4), (2048, 1, 4), (4096, 1, 8), (8192, 1, 8), (16384, 1, 16))


def tile(width: int, tiles: tuple[tuple[int, int, int], ...] = TILES) -> dict[str, int]:
    """How to launch a kernel whose tiles hold whole rows. Multiply-adds are fused: Triton 3.10 is to change its default."""
    for columns, rows, warps in tiles:
        if width <= columns:
            return {"BLOCK": columns, "ROWS": rows, "num_warps": warps, "enable_fp_fusion": True}
    raise ValueError(f"a row must have at most {tiles[-1][0]} columns, got {width}")


def rows_out(x: Tensor, size: int, quant: Quant | None) -> tuple[Tensor | Quantised, Tensor, Tensor | None]:
    """Room for a result [T, size]: the result itself, its values, its scales."""
    if quant is None:
        out = torch.empty((x.shape[0], size), dtype=x.dtype, device=x.device)
        return out, out, None
    if quant not in ("int8", "fp8"):
        raise ValueError(f"quant must be None, 'int8' or 'fp8', got {quant!r}")
    if quant == "fp8" and x.is_cuda and (capability := torch.cuda.get_device_capability(x.device)) < (8, 9):
        raise ValueError(f"quant='fp8' needs compute capability 8.9, but {x.device} has {capability[0]}.{capability[1]}: use 'int8'")
    values = torch.empty((x.shape[0], size), dtype=torch.int8 if quant == "int8" else torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return Quantised(values, scale), values, scale


@triton.jit
def normed(x, columns, width, weight, bias, eps, dtype: tl.constexpr, LAYER: tl.constexpr, ROUND_FIRST: tl.constexpr):
    """Norm of each row of float32 x [ROWS, BLOCK], which is zero beyond `width`; so is the result."""
    inside = columns < width
    if LAYER:
        x = tl.where(inside[None, :], x - tl.sum(x, 1, keep_dims=True) / width, 0.0)
    x = x * tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / width + eps)
    if ROUND_FIRST:
        x = x.to(dtype).to(tl.float32)
    if weight is not None:
        x = x * tl.load(weight + columns, mask=inside, other=0.0)[None, :]
    if bias is not None:
        x = x + tl.load(bias + columns, mask=inside, other=0.0)[None, :]
    return x


@triton.jit
def store_rows(x, out, scale, rows, columns, count, width, dtype: tl.constexpr):
    """Rounds float32 x [ROWS, BLOCK] to `dtype` and stores it. With `scale`: in eight bits, for which x holds whole rows.

    Divisions are exact ones, so that the eight bits are the reference's.
    """
    x = x.to(dtype)
    if scale is not None:
        x = x.to(tl.float32)
        # Bits of positive numbers sort as the numbers do, and NaN is the largest: it stays.
        largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
        largest = tl.maximum(largest, 1e-12, propagate_nan=tl.PropagateNan.ALL)
        if out.dtype.element_ty == tl.int8:
            step = tl.math.div_rn(largest, 127.0)
            x = tl.math.div_rn(x, step[:, None])
            x = ((x + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 * 2^23: to the nearest integer, ties to even
        else:
            step = tl.math.div_rn(largest, 448.0)
            x = tl.math.div_rn(x, step[:, None]).to(tl.float8e4nv)
        tl.store(scale + rows, step, mask=rows < count)
    kept = (rows < count)[:, None] & (columns < width)[None, :]
    tl.store(out + rows[:, None] * width + columns[None, :], x, mask=kept)
