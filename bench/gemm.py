"""The FLOPs of a model's linear layers, and the rate at which the library's GEMM runs those layers: the ceiling of a forward pass."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch

from pyembed.config import ModelConfig

ROWS = (512, 1024, 2048)  # of the activations; the best rate counts
REPEATS = 5


def layer_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """(in, out) of a layer's matrices, as they are merged: qkv in one, gate and up in one."""
    groups, head = config.heads_at(layer)
    width, inner = config.hidden_size, config.intermediate_size
    return {
        "qkv": (width, (config.num_heads + 2 * groups) * head),
        "out": (config.num_heads * head, width),
        "up": (width, (2 if config.gated else 1) * inner),
        "down": (inner, width),
    }


def shapes(config: ModelConfig) -> Counter[tuple[int, int]]:
    """How often each (in, out) occurs."""
    return Counter(shape for n in range(config.num_layers) for shape in layer_shapes(config, n).values())


def flops(config: ModelConfig, tokens: int, read: int | None = None) -> int:
    """Of the linear layers, for so many tokens. With `read` the last layer computes all but keys and values for so many rows alone."""
    total = 2 * tokens * sum(count * a * b for (a, b), count in shapes(config).items())
    if read is None:
        return total
    groups, head = config.heads_at(config.num_layers - 1)
    last = sum(a * b for a, b in layer_shapes(config, config.num_layers - 1).values()) - config.hidden_size * 2 * groups * head
    return total - 2 * (tokens - read) * last


def ceiling(config: ModelConfig, dtype: str) -> float:
    """FLOP/s (int8: operations) of the model's linear layers alone, each at the best rate that oneDNN reaches through torch.

    Every shape is run at ROWS rows with torch's thread count: F.linear and the packed GEMM in float32 and bfloat16, `_int_mm` and
    qlinear_pointwise in int8, where the result is not even scaled. Nothing but the product is in it, and its operands are warm.
    """
    work = taken = 0.0
    for (a, b), count in shapes(config).items():
        best = max(rate(rows, a, b, dtype) for rows in ROWS)
        work += 2 * a * b * count
        taken += 2 * a * b * count / best
    return work / taken


def rate(rows: int, a: int, b: int, dtype: str) -> float:
    """FLOP/s of one product, [rows, a] by [a, b]: the fastest of REPEATS runs of the fastest way."""
    with torch.inference_mode():
        if dtype == "int8":
            x, w = torch.randint(-127, 128, (rows, a), dtype=torch.int8), torch.randint(-127, 128, (b, a), dtype=torch.int8)
            columns = w.t()
            ways = [lambda: torch._int_mm(x, columns)]
            packed = torch.ops.onednn.qlinear_prepack(w, list(x.shape))
            scale, zero = torch.ones(b), torch.zeros(b, dtype=torch.int32)
            unsigned = x.view(torch.uint8)
            given: tuple[Any, ...] = (1.0, 0, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], "")
            ways.append(lambda: torch.ops.onednn.qlinear_pointwise(unsigned, *given))
        else:
            x, w = torch.randn(rows, a).to(getattr(torch, dtype)), torch.randn(b, a).to(getattr(torch, dtype))
            packed = torch.ops.mkldnn._reorder_linear_weight(w, None)
            ways = [lambda: torch.nn.functional.linear(x, w)]
            if packed.is_mkldnn:
                ways.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
        best = float("inf")
        for way in ways:
            way()
            for _ in range(REPEATS):
                start = time.perf_counter()
                way()
                best = min(best, time.perf_counter() - start)
    return 2 * rows * a * b / best
