"""Linear layers: weight, bias and `apply`; the one object whose inner layout depends on device and dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from pyembed.ops import Norm, Quant, Quantised

# oneDNN's names of the activations that its GEMM computes on the float32 accumulators, before the one rounding
FUSED = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}
# Inputs that oneDNN reads at a time in AMX. Where a row ends earlier it reads on in the next row, and NaN there survives a product by zero.
AMX_INPUTS = 32

Input = Tensor | Quantised  # eight bits only for a layer that wants them
Read = Callable[[], tuple[Tensor, Tensor | None]]  # a weight, which the next call may overwrite, and a bias


class Linear(Protocol):
    """y = x W^T + b, whatever it is stored in."""

    chains: ClassVar[bool]  # whether it is a Chain

    @property
    def wants(self) -> Quant | None:
        """In what the op before it should give its rows, if it can; None: as they are."""

    @property
    def fuses(self) -> frozenset[str]:
        """The activations that `apply` takes."""

    def apply(self, x: Input, *, act: str | None = None) -> Tensor:
        """x [rows, in_features] to [rows, out_features], with `act` on top; `act` must be in `fuses`."""


class Chain(Linear, Protocol):
    """One that also computes what comes after it, while the rows are in cache."""

    def chain(
        self, x: Tensor, *, act: str | None = None, second: Chain | None = None, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """`apply`; then, where they are given, `second`, and the norm of residual + that, which then also stands in `residual`."""


def wanted(layers: Sequence[Linear]) -> Quant | None:
    """In what an op should give the rows that all of `layers` read."""
    first = layers[0].wants
    return first if all(each.wants == first for each in layers[1:]) else None


def chained(layer: Linear) -> TypeGuard[Chain]:
    """Whether a layer is a Chain: told by a flag, since isinstance of a Protocol takes as long as a small layer."""
    return layer.chains


@dataclass(frozen=True, slots=True)
class Dense:
    """y = x W^T + b by a GEMM of the library. `packed`: the weight is in oneDNN's blocked layout, which only its own GEMM reads."""

    chains: ClassVar[bool] = False
    wants: ClassVar[None] = None
    weight: Tensor  # [out_features, in_features], or that packed, perhaps with inputs that are zero behind it
    bias: Tensor | None  # [out_features]
    packed: bool
    gated: bool = False  # W is [gate; up] of a gated MLP, whose activation is an op of its own

    @property
    def fuses(self) -> frozenset[str]:
        """The activations that `apply` takes."""
        return frozenset(FUSED) if self.packed and not self.gated else frozenset()

    def apply(self, x: Input, *, act: str | None = None) -> Tensor:
        """x [rows, in_features] to [rows, out_features], with `act` on top; `act` must be in `fuses`."""
        assert not isinstance(x, Quantised)
        if not self.packed:
            assert act is None, act
            return F.linear(x, self.weight, self.bias)
        if short := self.weight.shape[1] - x.shape[1]:
            x = F.pad(x, (0, short))
        name, algorithm = ("none", "") if act is None else FUSED[act]
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)  # type: ignore[no-any-return]


def packable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed GEMM serves. Against `F.linear` on two Zen4 cores (`pytest bench/test_ops.py -k linear`): 1.2 to 1.5x in
    float32 and 1.06 to 1.2x in bfloat16 at 512 rows and more, 1.1 to 2.9x at 16 rows, with the same bits for a row in any batch. (In
    float32 a row that is multiplied alone has others beyond 1,024 inputs; batches have 16 rows at least.)
    """
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and dtype in (torch.float32, torch.bfloat16)


def linear(weight: Tensor, bias: Tensor | None, *, gated: bool = False) -> Dense:
    """A Dense layer of a weight [out_features, in_features] on its device, packed once where that measures faster.

    What is packed never shares memory with `weight`, which the caller may use again.
    """
    packed = packable(weight.device, weight.dtype)
    if packed:
        short = -weight.shape[1] % AMX_INPUTS
        if short and weight.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
            weight = F.pad(weight, (0, short))  # by 0 it would be a copy too
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        weight = reordered if reordered.is_mkldnn else weight.clone()
    return Dense(weight, bias, packed, gated)
