"""How much a device takes at once, from the model's shape."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyembed.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Budget:
    """What a backend asks for: batches that are worth their launches and no longer than that."""

    tokens: int  # of a batch
    balance: float = math.inf  # tokens of a text at which attention takes as long as all else: a token of S costs 1 + S / balance
    windows: int = 1  # times the usual number of texts that are sorted together
    graphs: int = 0  # tokens up to which a batch's launches are recorded and replayed (graphs.py); 0: never
    streams: int = 1  # of the device, on which batches run side by side

    def factor(self, length: int) -> float:
        """What a token of a text of this length costs."""
        return 1 + length / self.balance


def balance(config: ModelConfig, rate: float) -> float:
    """Where attention's time meets that of the linear layers, if its arithmetic runs at `rate` times their speed."""
    linear = attention = 0
    for n in range(config.num_layers):
        groups, width = config.heads_at(n)
        heads = config.num_heads * width
        linear += config.hidden_size * (2 * heads + 2 * groups * width + (3 if config.gated else 2) * config.intermediate_size)
        if not config.windows or config.windows[n] is None:
            attention += heads if config.causal else 2 * heads  # q k^T and p v, of half the keys on average under a causal mask
    return math.inf if attention == 0 else rate * linear / attention


def flops(config: ModelConfig) -> int:
    """Of the linear layers, for one token."""
    total = 0
    for n in range(config.num_layers):
        groups, width = config.heads_at(n)
        heads = (2 * config.num_heads + 2 * groups) * width
        total += 2 * config.hidden_size * (heads + (3 if config.gated else 2) * config.intermediate_size)
    return total


def activation_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes a token takes while a layer is run: the residual stream and its norm, the projections, attention's output, the MLP."""
    shapes = [config.heads_at(n) for n in range(config.num_layers)]
    heads = max((2 * config.num_heads + 2 * groups) * width for groups, width in shapes)
    return itemsize * (4 * config.hidden_size + heads + (3 if config.gated else 2) * config.intermediate_size)
