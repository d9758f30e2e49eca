"""Linear layers in fp8: weights with a scale per output channel, rows of activations with a scale each, the library's product.

    values = round(x / scale) in float8_e4m3fn, scale = max(max |x|, 1e-12) / 448      `reference.quantised`, of a weight and of rows alike
    product:  y = float32(q values^T) * (scale_x * scale_w) + bias, rounded to bfloat16 once

The product is `torch._scaled_mm`, whose order of float32 operations is the library's own. A row's scale is its own, so that its results do
not depend on its batch; a row that is not finite gives NaN throughout.

Rows come in eight bits from the norm or activation before the layer where that can be (`wants`), else they are made here, in passes of
their own. Both round to bfloat16 first, so they are the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyembed.linear import Input
from pyembed.ops import Quant, Quantised
from pyembed.ops.reference import quantised

MULTIPLE = 16  # of a layer's inputs and outputs: on CUDA torch._scaled_mm takes no others
WIDEST = 16384  # columns of a row that every kernel can give in eight bits
CHUNK = 1 << 24  # weights that are quantised at a time, in float32


@dataclass(frozen=True, slots=True)
class Fp8:
    """y = x W^T + b with W in fp8. O outputs, I inputs."""

    chains: ClassVar[bool] = False
    values: Tensor  # [O, I] float8_e4m3fn
    scale: Tensor  # [1, O] float32
    bias: Tensor | None  # [O] bfloat16

    @property
    def wants(self) -> Quant | None:
        """In what the op before it should give its rows, if it can; None: as they are."""
        return "fp8" if self.values.shape[1] <= WIDEST else None

    @property
    def fuses(self) -> frozenset[str]:
        """No activation."""
        return frozenset()

    def apply(self, x: Input, *, act: str | None = None) -> Tensor:
        """x [rows, I], bfloat16 or fp8, to [rows, O] bfloat16."""
        assert act is None, act
        rows = x if isinstance(x, Quantised) else quantised(x, "fp8")
        return torch._scaled_mm(
            rows.values,
            self.values.T,
            scale_a=rows.scale[:, None],
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
        )


def fp8(weight: Tensor, bias: Tensor | None) -> Fp8 | None:
    """An Fp8 of a weight [O, I] and a bias [O] of any float dtype, with which it shares no memory. None where O or I is not a MULTIPLE."""
    out, inputs = weight.shape
    if out % MULTIPLE or inputs % MULTIPLE:
        return None
    values = torch.empty((out, inputs), dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(out, dtype=torch.float32, device=weight.device)
    rows = max(1, CHUNK // inputs)
    for part, q, s in zip(weight.split(rows), values.split(rows), scale.split(rows), strict=True):
        made = quantised(part, "fp8")
        q.copy_(made.values)
        s.copy_(made.scale)
    return Fp8(values, scale[None, :], None if bias is None else bias.to(torch.bfloat16, copy=True))
