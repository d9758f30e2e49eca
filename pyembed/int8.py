"""Linear layers in int8 on a CPU: weights per output channel, activations per token, in plain PyTorch. The oracle of the kernel's tests.
A GPU's int8 is symmetric.py.

    rows:     lo = min(0, min x), hi = max(0, max x), range = max(hi - lo, TINY); inverse = 255 / range, scale = range / 255
              zero = round(-lo * inverse); q = clamp(round(x * inverse) + zero, 0, 255), so that x is about (q - zero) * scale
    weights:  scale[o] = max(max |w[o]|, TINY) / 127; values = round(w / scale), from -127 to 127; sums[o] = sum of values[o]
    product:  y = float32(q values^T - zero * sums) * (scale_x * scale_w) + bias, then the activation, then one rounding to x's dtype

Everything between is float32 but the products, which are exact in int32; round is to the nearest, half to even; no two operations are
contracted into one. A row whose range is not finite gives NaN throughout. A token's row knows of no other, so that its results do not
depend on its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pyembed.linear import FUSED, Input
from pyembed.ops import Quantised

TINY = 1e-30  # least range of a row: one of zeros is exact, and nothing is divided by zero
LEVELS, LARGEST = 255, 127  # of activations, uint8; of weights, int8
MOST_INPUTS = (2**31 - 1) // (LEVELS * LARGEST)  # beyond it a sum of products may not fit into int32
TOO_FEW = 16  # rows of a product: on CUDA torch._int_mm takes more than that
CHUNK = 1 << 18  # weights that are quantised at a time, so that they stay in the cache


@dataclass(frozen=True, slots=True)
class Int8:
    """y = x W^T + b with W in int8. O outputs, I inputs."""

    chains: ClassVar[bool] = False
    wants: ClassVar[None] = None  # its rows have a zero beside the scale, and are made here
    values: Tensor  # [O, I] int8
    scale: Tensor  # [O] float32
    sums: Tensor  # [O] int32, of each row of `values`
    bias: Tensor | None  # [O] float32
    gated: bool = False  # W is [gate; up] of a gated MLP, whose activation is an op of its own

    @property
    def fuses(self) -> frozenset[str]:
        """The activations that `apply` takes."""
        return frozenset() if self.gated else frozenset(FUSED)

    def apply(self, x: Input, *, act: str | None = None) -> Tensor:
        """x [rows, I] to [rows, O] in the dtype of x, with `act`, one of `fuses`, on top."""
        assert not isinstance(x, Quantised)
        q, zero, scale = quantise_rows(x)
        whole = exact_product(q, self.values, self.sums) - zero[:, None] * self.sums
        y = whole.float() * (scale[:, None] * self.scale)
        if self.bias is not None:
            y = y + self.bias
        if act == "relu":
            y = torch.relu(y)
        elif act is not None:
            y = F.gelu(y, approximate=FUSED[act][1])
        return y.to(x.dtype)


def int8(weight: Tensor, bias: Tensor | None) -> Int8:
    """An Int8 of a weight [O, I] and a bias [O] of any float dtype, with which it shares no memory. ValueError for too many inputs."""
    values, scale, sums = quantise_weight(weight)
    return Int8(values, scale, sums, None if bias is None else bias.to(torch.float32, copy=True))


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [O, I] as values [O, I] int8, their scales [O] float32 and sums [O] int32. ValueError for too many inputs."""
    out, inputs = weight.shape
    if inputs > MOST_INPUTS:
        raise ValueError(
            f"A linear layer has {inputs:,} inputs; in int8 at most {MOST_INPUTS:,} can be summed in 32 bits. Use dtype='bfloat16'."
        )
    values = torch.empty((out, inputs), dtype=torch.int8, device=weight.device)
    scale = torch.empty(out, dtype=torch.float32, device=weight.device)
    sums = torch.empty(out, dtype=torch.int32, device=weight.device)
    rows = max(1, CHUNK // inputs)
    for part, q, s, total in zip(weight.split(rows), values.split(rows), scale.split(rows), sums.split(rows), strict=True):
        wide = part.float()
        torch.div(wide.abs().amax(1).clamp_min_(TINY), LARGEST, out=s)
        wide = (wide / s[:, None]).round_()
        q.copy_(wide)
        total.copy_(wide.sum(1))  # whole numbers below 2**24: exact
    return values, scale, sums


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows x [T, I] as values [T, I] uint8, their zeros [T] int32 and scales [T] float32. NaN is the scale of a row that is not finite."""
    wide = x.float()
    low, high = wide.aminmax(dim=1)
    low, high = low.clamp_max(0), high.clamp_min(0)
    span = (high - low).clamp_min(TINY)
    finite = span.isfinite()
    inverse = torch.where(finite, torch.full_like(span, LEVELS) / span, 0.0)  # a number / tensor is computed as a product
    zero = torch.where(finite, (-low * inverse).round(), 0.0)
    q = ((wide * inverse[:, None]).round_() + zero[:, None]).clamp_(0, LEVELS).nan_to_num_(0.0)
    return q.to(torch.uint8), zero.int(), torch.where(finite, span / LEVELS, torch.nan)


def exact_product(q: Tensor, values: Tensor, sums: Tensor) -> Tensor:
    """q [T, I] uint8 times values [O, I] int8, transposed: [T, O] int32. `sums` [O] are those of the rows of `values`."""
    return signed_product((q ^ 128).view(torch.int8), values) + 128 * sums  # of q - 128


def signed_product(rows: Tensor, values: Tensor) -> Tensor:
    """rows [T, I] int8 times values [O, I] int8, transposed: [T, O] int32, contiguous. Exact. On CUDA I and O must be multiples of 8.

    On a CPU with VNNI oneDNN's product is exact, but for a single input, which it gets wrong; without VNNI its sums of two products
    saturate at 16 bits. There float64 serves. On CUDA torch takes no fewer rows than 17: those that are missing are zeros, 32 in all.
    """
    if not rows.is_cuda and not (rows.shape[1] > 1 and torch.cpu._is_vnni_supported() and torch.backends.mkldnn.is_available()):
        return (rows.double() @ values.double().T).int()
    count = rows.shape[0]
    if count <= TOO_FEW:
        rows = F.pad(rows, (0, 0, 0, 32 - count))
    return torch._int_mm(rows, values.T)[:count]
