"""What the device can do at best: a model's linear layers and nothing else, a large product, a copy."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

import gemm
import torch
from measure import seconds, spread
from triton_ops import ceilings, timed

from pyembed.config import ModelConfig

COLD = 512 << 20  # bytes of weights of a shape, of which the second-level cache keeps little


class Chain:
    """The matrix products of a model, layer after layer, on weights that no cache holds: the ceiling of its forward pass."""

    def __init__(self, config: ModelConfig, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.weights: dict[tuple[int, int], list[torch.Tensor]] = {}
        for (a, b), count in gemm.shapes(config).items():
            copies = min(count, 1 + COLD // (a * b * dtype.itemsize))
            self.weights[a, b] = [(torch.randn(b, a, device=device) * 0.02).to(dtype) for _ in range(copies)]
        self.rows: dict[int, dict[int, torch.Tensor]] = {}  # of each width, by tokens

    def inputs(self, tokens: int) -> dict[int, torch.Tensor]:
        if tokens not in self.rows:
            self.rows[tokens] = {a: torch.randn(tokens, a, device=self.device).to(self.dtype) for a, _ in self.weights}
        return self.rows[tokens]

    def run(self, tokens: int) -> None:
        rows = self.inputs(tokens)
        for n in range(self.config.num_layers):
            for a, b in gemm.layer_shapes(self.config, n).values():
                torch.nn.functional.linear(rows[a], self.weights[a, b][n % len(self.weights[a, b])])

    def rate(self, tokens: int, runs: int = 2) -> float:
        """FLOP/s of whole passes of so many tokens, launched ahead of the device."""
        with torch.inference_mode():
            self.run(tokens)
            if self.device == "cpu":
                taken = min(seconds(lambda: self.run(tokens)) for _ in range(runs))
            else:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(runs):
                    self.run(tokens)
                end.record()
                end.synchronize()
                taken = start.elapsed_time(end) * 1e-3 / runs
        return gemm.flops(self.config, tokens) / taken


def of_shape(chain: Chain, tokens: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """FLOP/s of a model's linear layers at several token counts: of all, and of each shape alone with a cold cache."""
    found: dict[str, Any] = {"flops_a_token": gemm.flops(chain.config, 1), "chain": {}, "shapes": {}}
    with torch.inference_mode():
        for count in tokens:
            rates = [chain.rate(count) for _ in range(rounds)]
            found["chain"][str(count)] = spread(rates)
            for (a, b), weights in chain.weights.items():
                x = chain.inputs(count)[a]
                taken = timed({"gemm": torch.nn.functional.linear}, (x, weights[0]), rounds, chain.device)["gemm"]
                found["shapes"][f"{count} x {a} x {b}"] = spread([2 * count * a * b / each for each in taken])
    found["best"] = max(each["median"] for each in found["chain"].values())
    return found


def of_device(device: str, rounds: int, *, tiny: bool) -> dict[str, Any]:
    """Bytes/s of a copy and FLOP/s of square products in bfloat16: the best of several sizes, and of 8192."""
    size = 64 if tiny else 8192
    with torch.inference_mode():
        rates = ceilings(device, torch.bfloat16, rounds, small=tiny)
        a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        a @ b
        square = [2 * size**3 / each for each in timed({"gemm": torch.mm}, (a, b), rounds, device)["gemm"]]
    return {"copy": rates["copy"], "best_square": rates["gemm"], f"{size}^3": spread(square)}


def clocks(work: Callable[[], Any]) -> dict[str, float] | None:
    """MHz, watts and degrees of the first card while it works; None where no nvidia-smi answers."""
    fields = ("clocks.sm", "power.draw", "temperature.gpu")
    words = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"]
    until = time.monotonic() + 10
    try:
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as asked:
            while asked.poll() is None and time.monotonic() < until:
                work()
            asked.kill()
            told, _ = asked.communicate()
        return dict(zip(("mhz", "watts", "celsius"), map(float, told.split(",")), strict=True))
    except (OSError, ValueError):
        return None
