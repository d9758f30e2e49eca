"""Linear layers in symmetric eight bits, fp8 or a GPU's int8: a scale for each output of the weight, a scale for each row of activations.

    values = round(x / scale), scale = max(max |x|, 1e-12) / largest      `reference.quantised`, of a weight and of rows alike
    product:  y = float32(q values^T) * (scale_x * scale_w) + bias, rounded to bfloat16 once

fp8: values in float8_e4m3fn, the largest is 448; the product is `torch._scaled_mm`, whose order of float32 operations is the library's own.
int8: from -127 to 127; the product is exact in int32 (`torch._int_mm`), and what follows it is one op, `rescaled`.

A row's scale is its own, so that its results do not depend on its batch; a row that is not finite gives NaN throughout.

Rows come in eight bits from the norm or activation before the layer where that can be (`wants`), else they are made here, in a pass of
their own. Both round to bfloat16 first, so they are the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyembed.int8 import LARGEST, signed_product
from pyembed.linear import Input
from pyembed.ops import Ops, Quant, Quantised, reference

MULTIPLE = 16  # of a layer's inputs and outputs: on CUDA torch._scaled_mm takes no others, and torch._int_mm multiples of 8
WIDEST = 16384  # columns of a row that every kernel can give in eight bits
MOST_INPUTS = (2**31 - 1) // LARGEST**2  # beyond it a sum of products of int8 may not fit into int32
CHUNK = 1 << 24  # weights that are quantised at a time, in float32


@dataclass(frozen=True, slots=True)
class Symmetric:
    """y = x W^T + b with W in eight bits. O outputs, I inputs."""

    chains: ClassVar[bool] = False
    ops: Ops
    quant: Quant
    values: Tensor  # [O, I] float8_e4m3fn or int8
    scale: Tensor  # [O] float32
    bias: Tensor | None  # [O] bfloat16

    @property
    def wants(self) -> Quant | None:
        """In what the op before it should give its rows, if it can; None: as they are."""
        return self.quant if self.values.shape[1] <= WIDEST else None

    @property
    def fuses(self) -> frozenset[str]:
        """No activation: the op that computes it also gives the next layer's rows in eight bits."""
        return frozenset()

    def apply(self, x: Input, *, act: str | None = None) -> Tensor:
        """x [rows, I], bfloat16 or in eight bits, to [rows, O] bfloat16."""
        assert act is None, act
        rows = x if isinstance(x, Quantised) else self.rows_of(x)
        if self.quant == "int8":
            return self.ops.rescaled(signed_product(rows.values, self.values), rows.scale, self.scale, self.bias)
        return torch._scaled_mm(
            rows.values,
            self.values.T,
            scale_a=rows.scale[:, None],
            scale_b=self.scale[None, :],
            bias=self.bias,
            out_dtype=torch.bfloat16,
        )

    def rows_of(self, x: Tensor) -> Quantised:
        """x [rows, I] in eight bits."""
        return reference.quantised(x, self.quant) if self.values.shape[1] > WIDEST else self.ops.quantised(x, self.quant)


def symmetric(weight: Tensor, bias: Tensor | None, quant: Quant, ops: Ops) -> Symmetric | None:
    """A layer of a weight [O, I] and a bias [O] of any float dtype, with which it shares no memory.

    None where O or I is not a MULTIPLE, or where I is beyond MOST_INPUTS in int8.
    """
    out, inputs = weight.shape
    if out % MULTIPLE or inputs % MULTIPLE or (quant == "int8" and inputs > MOST_INPUTS):
        return None
    values = torch.empty((out, inputs), dtype=torch.int8 if quant == "int8" else torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(out, dtype=torch.float32, device=weight.device)
    rows = max(1, CHUNK // inputs)
    for part, q, s in zip(weight.split(rows), values.split(rows), scale.split(rows), strict=True):
        made = reference.quantised(part, quant)
        q.copy_(made.values)
        s.copy_(made.scale)
    return Symmetric(ops, quant, values, scale, None if bias is None else bias.to(torch.bfloat16, copy=True))
