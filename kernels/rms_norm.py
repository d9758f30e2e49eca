"""RMSNorm (arXiv 1910.07467) of x, or of residual + x, which then is what `residual` holds. Same contract as reference.rms_norm.

    s = round(residual + x);  y = s / sqrt(mean(s^2) + eps);  out = round(round_first(y) * weight + bias)

`layer_norm` is the same kernel: s - mean(s) takes the place of s. All in float32 but for the roundings to the activation dtype: of the
sum, of y where the norm rounds before its weight, and of the result; then to eight bits where they are asked for.

Bytes of a number, in a dtype of b bytes: 2 b, 4 b with a residual stream; b + 1 and 3 b + 1 in eight bits. FLOPs of a number: about 6,
12 in eight bits. Bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyembed.kernels.checks import activations, check, weight_and_bias
from pyembed.kernels.rows import normed, rows_out, store_rows, tile
from pyembed.ops import Norm, Quant, Quantised
from pyembed.ops.checks import check_rows_apart


@triton.jit(do_not_specialize=["count"])
def norm_kernel(
    x, x_stride, residual, residual_stride, weight, bias, out, scale, count, width, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LAYER: tl.constexpr, ROUND_FIRST: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    kept = (rows < count)[:, None] & (columns < width)[None, :]
    y = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=kept, other=0.0).to(tl.float32)
    if residual is not None:
        at = residual + rows[:, None] * residual_stride + columns[None, :]
        y = (y + tl.load(at, mask=kept, other=0.0).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(at, y, mask=kept)
        y = y.to(tl.float32)
    y = normed(y, columns, width, weight, bias, eps, x.dtype.element_ty, LAYER, ROUND_FIRST)
    store_rows(y, out, scale, rows, columns, count, width, x.dtype.element_ty)


def add_norm(x: Tensor, norm: Norm, residual: Tensor | None, quant: Quant | None) -> Tensor | Quantised:
    """Both norms: `norm.layer` says which."""
    count, width = check("x", x, activations("x", x), x.device, -1, -1).shape
    if residual is not None:
        check_rows_apart("residual", check("residual", residual, x.dtype, x.device, count, width))
    weight, bias = weight_and_bias(norm, width, x.device)
    launch = tile(width)
    result: Tensor | Quantised
    result, out, scale = rows_out(x, width, quant)
    if count == 0:
        return result
    with torch.cuda.device_of(x):
        norm_kernel[(triton.cdiv(count, launch["ROWS"]),)](
            x, x.stride(0), residual, 0 if residual is None else residual.stride(0), weight, bias, out, scale, count, width, norm.eps,
            LAYER=norm.layer, ROUND_FIRST=norm.round_first, **launch,
        )  # fmt: skip
    return result


def rms_norm(
    x: Tensor,  # [T, D]
    norm: Norm,
    *,
    residual: Tensor | None = None,  # [T, D], overwritten with residual + x
    quant: Quant | None = None,
) -> Tensor | Quantised:  # [T, D]
    return add_norm(x, norm, residual, quant)
