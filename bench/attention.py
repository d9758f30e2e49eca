"""Attention beside torch's scaled_dot_product_attention, on texts of one length, and the long texts of the Qwen3-0.6B shape.

    python bench/attention.py [--rounds 9] [--threads 2] [--dtype bfloat16] [-o FILE.json]

Ours and torch's take turns within a round, each for at least 10 ms; medians. torch gets its tensors as contiguous as a model has them,
ours the slices of one projection. FLOPs are 4 * S * S * H * K a text, half of it where a mask is causal; the GEMM is measured in the same
rounds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from measure import cpu_name

from pyembed import _cpu
from pyembed.ops import cpu

LENGTHS = (10, 16, 32, 40, 64, 100, 128, 256, 300, 512, 1024)
TOKENS, HEADS = 2048, 12
LONG = (512, 2048, 8192)  # one text: 16 query heads, 8 key/value heads, head_dim 128


def members(length: int, texts: int, heads: int, groups: int, width: int, causal: bool, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """What is timed: the library's attention and ours."""
    tokens = texts * length
    qkv = torch.randn(tokens, heads + 2 * groups, width).to(dtype)
    mine = qkv.split((heads, groups, groups), dim=1)
    theirs = [x.contiguous().view(texts, length, -1, width).transpose(1, 2) for x in mine]
    cu, plan = torch.arange(0, tokens + 1, length, dtype=torch.int32), cpu.schedule([length] * texts)

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(*theirs, is_causal=causal, enable_gqa=heads != groups)

    def ours() -> torch.Tensor:
        return cpu.attention(*mine, cu, cu, plan, causal=causal, scale=width**-0.5)

    far = (sdpa().transpose(1, 2).reshape(tokens, heads, width).float() - ours().float()).abs().max()
    if not far < 0.05:
        raise AssertionError(f"the two differ by {far}")
    return {"sdpa": sdpa, "ours": ours}


def take_turns(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of each, in every round."""
    repeats, found = {}, {name: [] for name in work}
    for name, call in work.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(0.01 / (time.perf_counter() - start)))
    for _ in range(rounds):
        for name, call in work.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            found[name].append((time.perf_counter() - start) / repeats[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    result: dict[str, Any] = {
        "command": f"python bench/attention.py --rounds {options.rounds} --threads {options.threads} --dtype {options.dtype}",
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "threads": options.threads, "kernels": _cpu.isa()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "equal_lengths": [],
        "long": [],
    }
    for causal in (False, True):
        for width in (32, 64, 128):
            for length in LENGTHS:
                texts = max(1, TOKENS // length)
                seconds = take_turns(members(length, texts, HEADS, HEADS, width, causal, dtype), options.rounds)
                theirs, mine = median(seconds["sdpa"]), median(seconds["ours"])
                rate = 4e-9 * texts * length**2 * HEADS * width / (2 if causal else 1) / mine
                case = {"head_dim": width, "length": length, "texts": texts, "heads": HEADS, "causal": causal, "gflops": rate}
                result["equal_lengths"].append({**case, "times": theirs / mine, "seconds": seconds})
                mask = "causal" if causal else "full"
                print(f"head_dim {width:3d}, {length:4d} tokens, {mask:6s}: {theirs / mine:5.2f} x sdpa, {rate:5.0f} GFLOP/s", flush=True)
    a, b = torch.randn(2048, 1024).to(dtype), torch.randn(4096, 1024).to(dtype)
    for length in LONG:
        work = members(length, 1, 16, 8, 128, True, dtype) | {"gemm": lambda: F.linear(a, b)}
        seconds = take_turns(work, options.rounds)
        flops = {"sdpa": 2 * length**2 * 16 * 128, "ours": 2 * length**2 * 16 * 128, "gemm": 2 * 2048 * 1024 * 4096}
        rates = {name: flops[name] / median(each) * 1e-9 for name, each in seconds.items()}
        result["long"].append({"length": length, "gflops": rates, "seconds": seconds})
        print(
            f"16 heads of 8, head_dim 128, causal, {length} tokens: " + ", ".join(f"{n} {r:.0f} GFLOP/s" for n, r in rates.items()),
            flush=True,
        )
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
