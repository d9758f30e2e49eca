"""deterministic=True: a text's vector has the same bits alone and in any batch, on a GPU too.

Our kernels compute a text's rows the same way in any batch; the library's products need not, since it picks a kernel by the number of
rows. Here every product has the same number of rows: batches are cut into pieces of so many, the last one filled up with zeros. It may not
split sums either (`runner.products`), and there are no atomics. What stays is that the library computes equal rows of one product alike,
wherever they lie in it: not promised by anybody, tested by `pytest -m gpu` on the card that is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pyembed.linear import Dense, Input, Linear
from pyembed.ops import Quant, Quantised

FULL = 1 << 21  # rows x outputs of a product that fill a large card: 128 tiles of 128 x 128. A prediction, not measured
LEAST, MOST = 256, 4096  # rows
AMX_ROWS = 32  # of a product of oneDNN's in AMX: with more, the order of its sums depends on how many rows and threads there are


def rows_for(hidden_size: int) -> int:
    """Rows of every product of a model: as few as fill a card in the narrowest one. A power of two."""
    return min(MOST, max(LEAST, 1 << (FULL // hidden_size - 1).bit_length()))


@dataclass(frozen=True, slots=True)
class Steady:
    """A linear layer whose products all have `rows` rows."""

    chains: ClassVar[bool] = False
    inner: Linear
    rows: int

    @property
    def wants(self) -> Quant | None:
        return self.inner.wants

    @property
    def fuses(self) -> frozenset[str]:
        return self.inner.fuses

    def apply(self, x: Input, *, act: str | None = None) -> Tensor:
        count = (x.values if isinstance(x, Quantised) else x).shape[0]
        parts = [self.inner.apply(piece(x, start, self.rows), act=act) for start in range(0, count, self.rows)]
        if not parts:
            return self.inner.apply(piece(x, 0, self.rows), act=act)[:0]
        return parts[0][:count] if len(parts) == 1 else torch.cat(parts)[:count]


def piece(x: Input, start: int, rows: int) -> Input:
    """Rows `start` to start + rows, zeros where there are none."""
    if isinstance(x, Quantised):
        values = piece(x.values.view(torch.uint8), start, rows)  # not every torch pads fp8
        scale = piece(x.scale[:, None], start, rows)
        assert isinstance(values, Tensor) and isinstance(scale, Tensor)
        return Quantised(values.view(x.values.dtype), scale[:, 0].contiguous())
    part = x[start : start + rows]
    return F.pad(part, (0, 0, 0, rows - len(part))) if len(part) < rows else part


def steady(inner: Linear, rows: int) -> Linear:
    return inner if isinstance(inner, Steady) else Steady(inner, rows)


def steady_in_amx(layer: Linear) -> Linear:
    """A layer with few rows a product where oneDNN multiplies it in AMX, any other as it is."""
    packed = isinstance(layer, Dense) and layer.packed and layer.weight.dtype == torch.bfloat16
    return steady(layer, AMX_ROWS) if packed and torch.cpu._is_amx_tile_supported() else layer
