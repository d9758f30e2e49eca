"""The Triton kernels beside the library's, on the GPU that is here: shares of what memory and tensor cores give, and the targets.

    python bench/triton_ops.py [--seconds 540] [--rounds 25] [--only attention swiglu ...] [--group 1] [--gluon] -o bench/results/NAME.json

Memory's rate is that of a copy, and that of the tensor cores a square product in bfloat16; both are measured first. A case's members take
turns within a round, and medians count. Before each call the second-level cache is written over, and the device is kept busy until the
host has launched all of it, so that a time is the device's alone. What a member makes is held against the reference in float64 before it
is timed: ours by the rule of the tests, the others by four times that. A member that is wrong or fails is named with its error. After
--seconds no case is begun, and those that are left are named.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import about, print_targets, seconds, spread, target, write
from torch import Tensor
from triton_cases import OURS, ROWS, SHAPES, Case, Member, all_cases, told

FLUSH = 256 << 20  # bytes, several times what any second-level cache holds
BUSY = 1_000_000  # cycles, about half a millisecond
LOOSE = 4  # times the rule, for the others


def error(y: Tensor, r: Tensor) -> float:
    """As the tests have it: the largest over rows of max|y - r| / max|r|; infinite where y is not finite."""
    if y.shape != r.shape:
        raise ValueError(f"a result has shape {list(y.shape)}, expected {list(r.shape)}")
    off, top = (y.double() - r).abs().amax(-1), r.abs().amax(-1)
    return float(torch.where(off == 0, 0.0, off / top).nan_to_num(nan=math.inf).max())


def gate(case: Case) -> tuple[dict[str, Member], dict[str, float], dict[str, str]]:
    """The members that may be timed, the errors of all in units of what ours may lose, and why the others may not."""
    same, r = case.oracle(lambda x: x), case.oracle(lambda x: x.double() if x.is_floating_point() else x)
    limit = 2 * error(same, r) + 2 * torch.finfo(same.dtype).eps
    right, errors, failed = {}, {}, dict(case.failed)
    for name, member in case.members.items():
        try:
            errors[name] = error(member.read(member.work(*(x.clone() for x in case.given)))[: len(r)], r) / limit
        except Exception as fault:  # of many kinds: of compilers, of the driver, and refusals
            failed[name] = told(fault)
            continue
        allowed = 1 if name == OURS else LOOSE
        if errors[name] <= allowed:
            right[name] = member
        else:
            failed[name] = f"wrong: its error is {errors[name]:.3g} times what ours may lose, expected at most {allowed}"
    return right, errors, failed


def timed(members: dict[str, Callable[..., Any]], given: Sequence[Tensor], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every call, A B C A B C ..., each of which has been called before."""
    if device == "cpu":
        return {name: [seconds(lambda: work(*given)) for _ in range(rounds)] for name, work in members.items()}  # noqa: B023
    cache, events = torch.empty(FLUSH, dtype=torch.int8, device=device), {name: [] for name in members}
    for _ in range(rounds):
        for name, work in members.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.zero_()
            torch.cuda._sleep(BUSY)
            start.record()
            work(*given)
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) * 1e-3 for start, end in each] for name, each in events.items()}


def ceilings(device: str, dtype: torch.dtype, rounds: int, small: bool = False) -> dict[str, float]:
    """Bytes/s of a copy, FLOP/s of a product: the best of several sizes each."""
    rates = {"copy": 0.0, "gemm": 0.0}
    for size in (1 << 16,) if small else (1 << 28, 1 << 29, 1 << 30):
        x = torch.randn(size // dtype.itemsize, device=device).to(dtype)
        y = torch.empty_like(x)
        y.copy_(x)
        taken = timed({"copy": y.copy_}, (x,), rounds, device)["copy"]
        rates["copy"] = max(rates["copy"], 2 * x.nbytes / median(taken))
    for size in (64,) if small else (4096, 8192, 16384):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        a @ b
        rates["gemm"] = max(rates["gemm"], 2 * size**3 / median(timed({"gemm": torch.mm}, (a, b), rounds, device)["gemm"]))
    return rates


def measured(case: Case, rounds: int, device: str, rates: dict[str, float]) -> dict[str, Any]:
    """A row of the record."""
    right, errors, failed = gate(case)
    taken = timed({name: each.work for name, each in right.items()}, case.given, rounds, device)
    rate, ceiling = (case.bytes, rates["copy"]) if case.bytes else (case.flops, rates["gemm"])
    found = {
        name: {"seconds": spread(each), "rate": rate / median(each), "share": rate / median(each) / ceiling} for name, each in taken.items()
    }
    row = {"op": case.op, "shape": case.shape, "bytes": case.bytes, "flops": case.flops, "members": found}
    return row | {"errors": errors, "failed": failed, "wanted": case.wanted, "against": case.against}


def verdict(row: dict[str, Any]) -> dict[str, Any] | str | None:
    """Whether the row's target is met; a sentence where that is not known; None where there is no target."""
    name, members, against = f"{row['op']} {row['shape']}", row["members"], row["against"]
    if row["wanted"] is None:
        return None
    for each in (OURS, against):
        if each != "copy" and each not in members:
            return f"{name}: {each} was not timed"
    if against == "copy":
        return target(name, "share of the copy's rate", members[OURS]["share"], row["wanted"])
    return target(name, f"times as fast as {against}", median_of(members[against]) / median_of(members[OURS]), row["wanted"])


def median_of(member: dict[str, Any]) -> float:
    return float(member["seconds"]["median"])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a case."""
    lines = []
    for row in rows:
        ours, name = row["members"].get(OURS), f"{row['op']} {row['shape']}"
        if ours is None:
            lines.append(f"{name:52s} ours FAILED: {row['failed'].get(OURS, 'it is not there')}")
            continue
        unit = f"{ours['rate'] * 1e-9:6.0f} GB/s" if row["bytes"] else f"{ours['rate'] * 1e-12:6.1f} TFLOP/s"
        others = [f"{other} {median_of(each) / median_of(ours):.2f}x" for other, each in row["members"].items() if other != OURS]
        others += [f"{other} failed" for other in row["failed"]]
        lines.append(f"{name:52s} {median_of(ours) * 1e6:8.1f} us {unit} {ours['share']:4.0%}  {', '.join(others)}")
    return "\n".join(lines)


def summary(record: dict[str, Any]) -> None:
    """Printed last: the rates, a line a case, why members failed, and the targets."""
    print(f"\n{record['gpu']}: copy {record['rates']['copy'] * 1e-9:.0f} GB/s, GEMM {record['rates']['gemm'] * 1e-12:.0f} TFLOP/s")
    print("Ours: time, rate, share of the copy's or the GEMM's. The others: their time in units of ours.")
    print(table(record["rows"]))
    whys = dict.fromkeys(f"{name}: {why}" for row in record["rows"] for name, why in row["failed"].items())
    print("\n".join(f"  failed: {why}" for why in whys))
    verdicts = [each for row in record["rows"] if (each := verdict(row)) is not None]
    print_targets([each for each in verdicts if not isinstance(each, str)])
    print("\n".join(f"  UNKNOWN {each}" for each in verdicts if isinstance(each, str)))
    if record["not_run"]:
        print(f"  no time was left for {len(record['not_run'])} cases: {', '.join(record['not_run'])}")


def run(cases: Sequence[tuple[str, Callable[[], Case]]], rounds: int, device: str, rates: dict[str, float], until: float) -> Iterator[Any]:
    """Rows of the record, and names of cases for which no time was left."""
    for name, make in cases:
        if time.monotonic() > until:
            yield name
            continue
        try:
            yield measured(make(), rounds, device, rates)
        except Exception as fault:  # no memory, for one
            empty = {"bytes": 0, "flops": 0, "members": {}, "errors": {}, "wanted": None, "against": ""}
            yield {"op": name, "shape": "", **empty, "failed": {OURS: told(fault)}}


def fill(
    record: dict[str, Any], cases: Sequence[tuple[str, Callable[[], Case]]], rounds: int, device: str, until: float, to: Path | None = None
) -> None:
    """Rates and rows into the record, which is written after each, in case this ends early. On a CPU: to see that all of it works."""
    with torch.inference_mode():
        record |= {"rates": ceilings(device, torch.bfloat16, rounds, small=device == "cpu"), "rows": [], "not_run": []}
        for row in run(cases, rounds, device, record["rates"], until):
            if isinstance(row, str):
                record["not_run"].append(row)
            else:
                record["rows"].append(row)
                print(table([row]), file=sys.stderr, flush=True)
            if to is not None:
                write(record, to)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=540, help="after which no case is begun (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--tokens", type=int, default=16384, help="of a batch of attention (default: %(default)s)")
    parser.add_argument("--group", type=int, default=1, help="query heads to a key/value head in attention (default: %(default)s)")
    parser.add_argument("--gluon", action="store_true", help="bench/gluon_attention.py too, which has never run: a mistake in it may hang")
    parser.add_argument("--only", nargs="+", default=[*ROWS, "attention"], choices=[*ROWS, "attention"])
    parser.add_argument("-o", "--output", type=Path, help="file of all that was measured, as JSON")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here, and this measures one")
    until = time.monotonic() + options.seconds
    torch.manual_seed(0)
    torch._dynamo.config.cache_size_limit = 1000  # what is compiled is one function for many shapes
    properties = torch.cuda.get_device_properties("cuda")
    record = about(torch.get_num_threads()) | {
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "gpu": properties.name,
        "capability": [properties.major, properties.minor],
        "memory": properties.total_memory,
    }
    record["versions"] |= {"triton": version("triton"), "cuda": str(torch.version.cuda)}
    compiled = partial(torch.compile, dynamic=False)
    cases = all_cases(SHAPES, options.tokens, 2048, options.group, "cuda", torch.bfloat16, compiled, options.gluon)
    fill(record, [(name, make) for name, op, make in cases if op in options.only], options.rounds, "cuda", until, options.output)
    summary(record)


if __name__ == "__main__":
    main()
