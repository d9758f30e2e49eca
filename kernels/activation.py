"""swiglu (arXiv 2002.05202), geglu, gelu (arXiv 1606.08415), and rows in eight bits as they are. Same contracts as reference.swiglu, geglu,
gelu, quantised.

    silu(x) = x / (1 + exp(-x));  gelu(x) = x / 2 * (1 + erf(x / sqrt(2)))
    by tanh: x / 2 * (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) * (x + 0.044715 x^3)

The gated ones multiply by the other half of a merged projection [gate | up]. Float32 inside, one rounding at the end; then to eight bits
where they are asked for.

Bytes of a number of the result, in a dtype of b bytes: 3 b gated, 2 b plain; 2 b + 1 and b + 1 in eight bits. FLOPs: about 10 to 30, 6 of
`quantised`.
Bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyembed.kernels.checks import activations, check
from pyembed.kernels.rows import PIECE, TILES, rows_out, store_rows, tile
from pyembed.ops import Quant, Quantised

# In eight bits: whole rows, wider ones where an activation leaves room in registers, which erf does not. Not measured.
WIDE = (*TILES, (32768, 1, 16))


@triton.jit
def activated(x, KIND: tl.constexpr):
    if KIND == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "none":
        y = x
    else:
        tl.static_assert(KIND == "gelu_tanh")
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    return y


@triton.jit(do_not_specialize=["count"])
def activation_kernel(
    x, x_stride, out, scale, count, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = (rows < count)[:, None] & (columns < width)[None, :]
    at = x + rows[:, None] * x_stride + columns[None, :]
    y = activated(tl.load(at, mask=kept, other=0.0).to(tl.float32), KIND)
    if GATED:
        y = y * tl.load(at + width, mask=kept, other=0.0).to(tl.float32)
    store_rows(y, out, scale, rows, columns, count, width, x.dtype.element_ty)


def _activation(kind: str, x: Tensor, gated: bool, quant: Quant | None) -> Tensor | Quantised:
    count, columns = check("x", x, activations("x", x), x.device, -1, -1).shape
    if gated and columns % 2:
        raise ValueError(f"x must hold gate and up side by side, got an odd number of columns: {columns}")
    width = columns // 2 if gated else columns
    launch = tile(min(width, PIECE)) if quant is None else tile(width, TILES if kind == "gelu" else WIDE)
    result: Tensor | Quantised
    result, out, scale = rows_out(x, width, quant)
    if count == 0 or width == 0:
        return result
    with torch.cuda.device_of(x):
        activation_kernel[(triton.cdiv(count, launch["ROWS"]), triton.cdiv(width, launch["BLOCK"]))](
            x, x.stride(0), out, scale, count, width, KIND=kind, GATED=gated, **launch
        )
    return result


def swiglu(x: Tensor, *, quant: Quant | None = None) -> Tensor | Quantised:
    """x [T, 2 F] = [gate | up] -> [T, F]."""
    return _activation("silu", x, True, quant)


def geglu(x: Tensor, *, tanh: bool, quant: Quant | None = None) -> Tensor | Quantised:
    """x [T, 2 F] = [gate | up] -> [T, F]."""
    return _activation("gelu_tanh" if tanh else "gelu", x, True, quant)


def gelu(x: Tensor, *, tanh: bool, quant: Quant | None = None) -> Tensor | Quantised:
    """[T, F] -> [T, F]."""
    return _activation("gelu_tanh" if tanh else "gelu", x, False, quant)


def quantised(x: Tensor, quant: Quant) -> Quantised:
    """[T, D] -> [T, D]."""
    result = _activation("none", x, False, quant)
    assert isinstance(result, Quantised)
    return result
