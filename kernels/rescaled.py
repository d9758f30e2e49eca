"""What follows an integer product of rows and weights in int8. Same contract as reference.rescaled.

    y = float32(product) * (rows * outputs) + bias, rounded to bfloat16 once

No multiply-add is fused, so that the bits are the reference's. A row whose scale is not finite is NaN.

Bytes of a number: 6. FLOPs: 4. Bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyembed.kernels.checks import check, check_whole
from pyembed.kernels.rows import PIECE, tile


@triton.jit(do_not_specialize=["count"])
def rescaled_kernel(product, scales, output_scales, bias, out, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real, inside = rows < count, columns < width
    kept = real[:, None] & inside[None, :]
    at = rows[:, None] * width + columns[None, :]
    scale = tl.load(scales + rows, mask=real, other=0.0)
    scale = tl.where(tl.abs(scale) < float("inf"), scale, float("nan"))
    steps = scale[:, None] * tl.load(output_scales + columns, mask=inside, other=0.0)[None, :]
    y = tl.load(product + at, mask=kept, other=0).to(tl.float32) * steps
    if bias is not None:
        y = y + tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=kept)


def rescaled(
    product: Tensor,  # [T, O] int32, contiguous
    rows: Tensor,  # [T] float32
    outputs: Tensor,  # [O] float32
    bias: Tensor | None,  # [O] bfloat16
) -> Tensor:  # [T, O] bfloat16
    count, width = check_whole("product", product, torch.int32, product.device, -1, -1).shape
    check("rows", rows, torch.float32, product.device, count)
    check("outputs", outputs, torch.float32, product.device, width)
    if bias is not None:
        check("bias", bias, torch.bfloat16, product.device, width)
    out = torch.empty((count, width), dtype=torch.bfloat16, device=product.device)
    if count == 0 or width == 0:
        return out
    launch = tile(min(width, PIECE)) | {"enable_fp_fusion": False}
    with torch.cuda.device_of(product):
        rescaled_kernel[(triton.cdiv(count, launch["ROWS"]), triton.cdiv(width, launch["BLOCK"]))](
            product, rows, outputs, bias, out, count, width, **launch
        )
    return out
