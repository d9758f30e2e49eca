"""ALiBi (arXiv 2108.12409): attention scores that fall with distance, by a slope a head; a table grown as longer texts arrive."""

from __future__ import annotations

import torch
from torch import Tensor

from pyembed.batch import PackedBatch
from pyembed.ops import DistanceBias


def slopes(heads: int) -> Tensor:
    """[H] float64: 2 ** (-8 i / P) for i = 1 .. P, the largest power of two not above H, then every other slope of 2 P heads."""
    power = 1 << (heads.bit_length() - 1)
    exponents = [i / power for i in range(1, power + 1)] + [i / (2 * power) for i in range(1, 2 * (heads - power), 2)]
    return torch.tensor([2 ** (-8 * each) for each in exponents], dtype=torch.float64, device="cpu")


class Alibi:
    """The table of one model on one device: slope * (key position - query position).

    BLOOM adds slope * key position. That differs by a constant in each query's row, which the softmax does not see, also where a
    query sees keys after it.
    """

    def __init__(self, heads: int, device: torch.device) -> None:
        self.slopes, self.device = slopes(heads), device
        self.table = DistanceBias(torch.zeros(heads, 1, device=device))
        self.outgrown: list[DistanceBias] = []  # on CUDA: graphs and other streams may read them

    def bias(self, batch: PackedBatch) -> DistanceBias:
        """The bias of all distances within the batch's texts, and of longer ones."""
        longest, table = batch.longest, self.table
        if longest > table.radius + 1:
            radius = (1 << (longest - 1).bit_length()) - 1
            if self.device.type == "cuda":
                self.outgrown.append(table)
            distances = torch.arange(-radius, radius + 1, dtype=torch.float64, device="cpu")
            table = self.table = DistanceBias((self.slopes[:, None] * distances).float().to(self.device))
        return table
