"""Linear layers of csrc/cpu/linear.h: weights in panels, bfloat16 or int8, with the activation or the sum and norm that follow.

Same results as `Linear` or `Int8` and the ops one after the other, but for one rounding less before an activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import pyembed._cpu as _cpu
from pyembed.int8 import Int8
from pyembed.linear import Chain, Input, Linear
from pyembed.linear import linear as by_library
from pyembed.ops import Norm, Quantised
from pyembed.ops.checks import GATED, PLAIN, check, norm_argument, residual_argument

PANEL: int = _cpu.PANEL
PAIR_ROWS = 96  # a thread: rows below which two layers are run one after the other, so that columns can be divided too
_NONE = 6  # of Act in csrc/params.h


@dataclass(frozen=True, slots=True)
class Panels:
    """y = x W^T + b with W [O, I]; of a `gated` layer, W = [gate; up], act(gate x) * up x [rows, O / 2]."""

    chains: ClassVar[bool] = True
    wants: ClassVar[None] = None
    words: Tensor  # [panels, words, PANEL] int32, two bfloat16 or four int8 in each
    bias: Tensor | None  # [panels * PANEL] float32
    scale: Tensor | None  # [panels * PANEL] float32, of int8 weights
    sums: Tensor | None  # [panels * PANEL] int32, of int8 weights
    in_features: int
    out_features: int  # of the result
    gated: bool

    @property
    def fuses(self) -> frozenset[str]:
        """The activations that `apply` takes; a gated layer needs one of them."""
        return frozenset(GATED if self.gated else PLAIN)

    def apply(self, x: Input, *, act: str | None = None) -> Tensor:
        """x [rows, in_features] bfloat16 to [rows, out_features]."""
        assert not isinstance(x, Quantised)
        return run(x, self, act, None, None, None)

    def chain(
        self, x: Tensor, *, act: str | None = None, second: Chain | None = None, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """`apply`, then `second`, then the norm of residual + that, which then also stands in `residual`."""
        assert second is None or isinstance(second, Panels)
        if second is not None and x.shape[0] < PAIR_ROWS * torch.get_num_threads():
            return run(run(x, self, act, None, None, None), second, None, None, norm, residual)
        return run(x, self, act, second, norm, residual)

    def argument(self, act: str | None) -> tuple[int, ...]:
        number = GATED[str(act)] if self.gated else _NONE if act is None else PLAIN[act]
        rest = (0 if each is None else each.data_ptr() for each in (self.scale, self.sums, self.bias))
        return self.words.data_ptr(), self.in_features, self.out_features, len(self.words), self.scale is not None, *rest, number


def run(x: Tensor, first: Panels, act: str | None, second: Panels | None, norm: Norm | None, residual: Tensor | None) -> Tensor:
    rows = check("x", x, torch.bfloat16, -1, first.in_features).shape[0]
    out = first.out_features if second is None else second.out_features
    if second is not None and second.in_features != first.out_features:
        raise ValueError(f"the second layer takes {second.in_features} columns, but the first gives {first.out_features}")
    if residual is not None and norm is None:
        raise ValueError("residual was given without a norm")
    stream = residual_argument(residual, torch.bfloat16, rows, out)
    y = torch.empty((rows, out), dtype=torch.bfloat16, device="cpu")
    _cpu.linear(
        torch.get_num_threads(), x.data_ptr(), rows, x.stride(0), first.argument(act), None if second is None else second.argument(None),
        *stream, norm_argument(norm, out), y.data_ptr(),
    )  # fmt: skip
    return y


def native() -> bool:
    """Whether bfloat16 is multiplied in pairs here, by AVX-512 or AMX."""
    return _cpu.isa() in ("avx512_bf16", "amx")


def linear(weight: Tensor, bias: Tensor | None, *, gated: bool = False) -> Linear:
    """The layer of a weight [O, I], on which it keeps no hold: in panels where these are faster, else the library's."""
    if weight.dtype != torch.bfloat16 or weight.shape[1] % 2 or not native():
        return by_library(weight, bias, gated=gated)
    return in_panels(weight, None, None, bias, gated)


def int8(layer: Int8, *, gated: bool = False) -> Linear:
    """An int8 layer in panels."""
    return in_panels(layer.values, layer.scale, layer.sums, layer.bias, gated)


def in_panels(weight: Tensor, scale: Tensor | None, sums: Tensor | None, bias: Tensor | None, gated: bool) -> Panels:
    out, width = weight.shape
    columns = panel_columns(out, gated)

    def placed(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if values is None else torch.cat([values.to(dtype), values.new_zeros(1, dtype=dtype)])[columns]

    per_word = 4 // weight.element_size()
    rows = weight.new_zeros((out + 1, -(-width // per_word) * per_word))  # the last is what fills a panel
    rows[:out, :width] = weight
    words = rows.view(torch.int32)[columns].view(len(columns) // PANEL, PANEL, -1).transpose(1, 2).contiguous()
    given = (placed(bias, torch.float32), placed(scale, torch.float32), placed(sums, torch.int32))
    return Panels(words, *given, width, out // 2 if gated else out, gated)


def panel_columns(out: int, gated: bool) -> Tensor:
    """[panels * PANEL] int64: which row of the weight a column of the panels is; `out` is none. Half a panel is gates if `gated`."""
    if not gated:
        return torch.arange(-(-out // PANEL) * PANEL).clamp(max=out)
    half, run = out // 2, PANEL // 2
    gates = torch.arange(-(-half // run) * run)
    gates, ups = (torch.where(gates < half, gates + start, out).view(-1, run) for start in (0, half))
    return torch.cat([gates, ups], dim=1).flatten()
