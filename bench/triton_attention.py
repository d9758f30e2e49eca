"""Measures the launches of the Triton attention on the GPU that is here, and prints the table of kernels/tiles.py for it.

    python bench/triton_attention.py [--forms long short few] [--widths 64 128 256] [--dtypes bfloat16 float32] [-o FILE.json]

Every candidate is held against the reference first; one that is wrong, does not compile or wants more memory than there is, is named and
left out. Of the others the one with the least geometric mean of time over the form's batches wins. Between two calls the second-level
cache is written over, so that nothing is read from there that a forward pass would not find there either.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton_ops import error

from pyembed.kernels import tiles
from pyembed.kernels.attention import attention, schedule
from pyembed.kernels.tiles import Launch
from pyembed.ops import reference

HEADS, GROUPS = 16, 8
TOKENS = 16384  # of a batch, about
# Query lengths of texts, their keys' lengths where those are others, causal or not.
BATCHES: dict[str, list[tuple[list[int], list[int], bool]]] = {
    "long": [
        ([length] * (TOKENS // length), [length] * (TOKENS // length), causal)
        for length in (64, 512, 2048, 8192)
        for causal in (False, True)
    ],
    "short": [([length] * (TOKENS // length), [length] * (TOKENS // length), True) for length in (10, 16, 32)],
    "few": [([1] * (TOKENS // length), [length] * (TOKENS // length), True) for length in (64, 512, 8192)],
}
GATE: dict[str, tuple[list[int], list[int]]] = {
    "long": ([33, 190], [33, 190]),
    "short": ([1, 17, 32], [1, 17, 32]),
    "few": ([1, 1], [40, 170]),
}


def candidates(form: str, size: int) -> Iterator[Launch]:
    """Every launch worth a try for numbers of `size` bytes."""
    if form == "short":
        rows, keys, stages = (32, 64, 128), (32, 64), (1,)
    elif form == "few":
        rows, keys, stages = (16, 32), (32, 64, 128), (1, 2, 3)
    else:
        rows, keys, stages = ((16, 32, 64) if size == 4 else (64, 128)), ((16, 32, 64) if size == 4 else (32, 64, 128)), (1, 2, 3, 4)
    for r, k, s, warps, programs in itertools.product(rows, keys, stages, (1, 2, 4, 8) if form == "few" else (2, 4, 8), (1, 2)):
        if programs == 1 or warps == 8:  # with fewer warps two have the room anyway
            yield Launch(r, k, warps, s, programs)


def tensors(queries: list[int], keys: list[int], width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(sum(queries), HEADS, width, generator=generator, device="cuda").to(dtype)
    k, v = (torch.randn(sum(keys), GROUPS, width, generator=generator, device="cuda").to(dtype) for _ in range(2))
    cu_q, cu_k = (torch.tensor([0, *each], device="cuda").cumsum(0).to(torch.int32) for each in (queries, keys))
    return q, k, v, cu_q, cu_k


def options(form: str, queries: list[int], keys: list[int], width: int, causal: bool) -> dict[str, Any]:
    start = torch.tensor([k - q for q, k in zip(queries, keys, strict=True)], dtype=torch.int32, device="cuda")
    return {"causal": causal, "scale": width**-0.5, "q_start": start if form == "few" else None}


def right(form: str, width: int, dtype: torch.dtype) -> bool:
    """The rule of the tests: twice what the reference loses in the same dtype, and two units in the last place."""
    queries, keys = GATE[form]
    given = tensors(queries, keys, width, dtype)
    for causal in (False, True):
        arguments = options(form, queries, keys, width, causal)
        y = attention(*given, schedule(queries), **arguments)
        same = reference.attention(*given, None, **arguments)
        r = reference.attention(*(x.double() if x.is_floating_point() else x for x in given), None, **arguments)
        if error(y, r) > 2 * error(same, r) + 2 * torch.finfo(dtype).eps:
            return False
    return True


def times(form: str, width: int, dtype: torch.dtype) -> list[float]:
    """Milliseconds of each batch of the form."""
    taken = []
    for queries, keys, causal in BATCHES[form]:
        given, arguments, plan = tensors(queries, keys, width, dtype), options(form, queries, keys, width, causal), schedule(queries)
        taken.append(float(triton.testing.do_bench(lambda: attention(*given, plan, **arguments), return_mode="median")))  # noqa: B023
    return taken


def sweep(form: str, width: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """What each candidate took, the best first."""
    table = tiles.LAUNCHES[form, tiles.card(torch.device("cuda", torch.cuda.current_device())), dtype.itemsize]
    written, found = table[width], []
    for launch in {written: None} | dict.fromkeys(candidates(form, dtype.itemsize)):
        table[width] = launch
        name = f"{form} {width} {dtype} {launch}"
        try:
            if not right(form, width, dtype):
                print(f"wrong: {name}", file=sys.stderr)
                continue
            taken = times(form, width, dtype)
        except Exception as fault:  # of many kinds: of the compiler, the assembler and the driver
            print(f"left out: {name}: {type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}", file=sys.stderr)
            continue
        finally:
            table[width] = written
        mean = math.exp(sum(map(math.log, taken)) / len(taken))
        found.append({"launch": list(astuple(launch)), "mean": mean, "milliseconds": taken})
        print(f"{mean:8.4f} ms  {name}", file=sys.stderr, flush=True)
    return sorted(found, key=lambda each: each["mean"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--widths", nargs="+", type=int, default=[16, 32, 64, 128, 256], choices=[16, 32, 64, 128, 256])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("-o", "--output", type=Path, help="file of all that was measured, as JSON")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    at = tiles.card(torch.device("cuda", torch.cuda.current_device()))
    measured = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "sweeps": {}}
    lines = []
    for dtype, form in itertools.product((getattr(torch, name) for name in given.dtypes), given.forms):
        if (form, at, dtype.itemsize) not in tiles.LAUNCHES:  # float32 has no shared tiles
            continue
        best = []
        for width in given.widths:
            found = sweep(form, width, dtype)
            measured["sweeps"][f"{form} {width} {dtype}"] = found
            best.append(str(tuple(found[0]["launch"])) if found else "no launch works")
            if given.output is not None:
                given.output.write_text(json.dumps(measured, indent=1) + "\n")
        lines.append(f'    ("{form}", {at}, {dtype.itemsize}): _launches({", ".join(best)}),')
    print(f"# {measured['device']}, torch {measured['torch']}, triton {measured['triton']}; head dimension: {given.widths}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
