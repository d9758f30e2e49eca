"""The table and the targets of bench/gpu.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from first_embedding import line
from gpu_cases import COMPILED, FP8, IDS, INT8, PACKED, SENTENCES, TEXT
from gpu_models import SHAPES
from measure import target

Verdict = dict[str, Any] | str  # a target, or a sentence on why it is not known whether it is met
SHORT = {TEXT: "text", PACKED: "packed", COMPILED: "packed compiled", SENTENCES: "s-t", FP8: "fp8", INT8: "int8"}
SAME_MEMORY = 1.1  # times one batch's that many batches may take
CREEP = 2 << 20  # bytes, the least that torch's allocator takes from the driver


def middle(case: dict[str, Any], member: str) -> float:
    return float(case["results"][member]["median"])


def lines(name: str, case: dict[str, Any]) -> Iterator[str]:
    """A case in a line or a few."""
    if "error" in case:
        yield f"{name:12s} FAILED: {case['error']}"
    elif "cosines" in case:
        told = [f"{member} mean {each['mean']:.5f} min {each['min']:.5f}" for member, each in case["cosines"].items()]
        yield f"{name:12s} {', '.join(told)}"
    elif "copy" in case:
        size, square = next((key, each) for key, each in case.items() if "^3" in key)
        tera = case["best_square"] * 1e-12
        yield f"{name:12s} copy {case['copy'] * 1e-9:.0f} GB/s, {size} {square['median'] * 1e-12:.1f}, best square {tera:.1f} TFLOP/s"
    elif "chain" in case:
        yield f"{name:12s} " + ", ".join(f"{each['median'] * 1e-12:.1f} TFLOP/s at {count}" for count, each in case["chain"].items())
    elif "results" in case:
        ours = case["results"][IDS]
        others = [f"{short} {middle(case, member) / ours['median']:.2f}x" for member, short in SHORT.items() if member in case["results"]]
        yield (
            f"{name:12s} {ours['tokens_per_second'] / 1e3:8.1f}k tokens/s {ours['gemm_share']:4.0%} of the linear layers' rate; "
            f"time of others: {', '.join(others)}; {case['tokens']} tokens, {case['layers']} layers, {case['rounds']} rounds"
            + ("" if case["noise"] is None else f", noise {case['noise']:.1%}")
        )
    elif "milliseconds" in case:
        for tokens, row in case["milliseconds"].items():
            told = [f"{member} {each['p50']:.3f}/{each['p95']:.3f}" for member, each in row.items() if each and "p50" in each]
            device = row.get("on the device")
            told += [f"on the device {device['span']:.3f}, busy {device['busy']:.3f}"] if device else []
            yield f"{name:12s} {tokens} tokens, p50/p95 ms: {', '.join(told)}"
    elif "modes" in case:
        for work, each in case["modes"].items():
            first, *others = each
            ratios = ", ".join(f"{label} {each[label]['median'] / each[first]['median']:.2f}x" for label in others)
            yield f"{name:12s} {work}: {each[first]['median']:.4f} s, time of others: {ratios}"
        same, graphs = case["same_bits"], case["graphs"]
        yield (
            f"{name:12s} deterministic: {same['alone']} of {same['texts']} texts have the same bits alone, {same['reversed']} in the other "
            f"order; {graphs['recorded']} graphs up to {graphs['tokens']} tokens, {case['streams']} streams"
        )
    elif "warm" in case:
        compiled = f"{case['compiled']} kernels and launchers compiled, {case['compiled_by_the_next']} by the next process"
        yield f"{name:12s} {compiled} ({case['layers']} layers)"
        yield line("cold", [case["cold"]])
        yield line(f"warm, {len(case['warm'])} processes", case["warm"])
    elif "growth" in case:
        mega = {
            key: value / 2**20 for key, value in (case | case["beyond_loaded"] | case["growth"]).items() if isinstance(value, int | float)
        }
        yield (
            f"{name:12s} file {mega['file']:.0f} MB, loaded {mega['loaded']:.0f}, at most {mega['while_loading']:.0f} while loading; "
            f"beyond: one batch {mega['one batch']:.1f}, {case['batches']} batches {mega['many batches']:.1f}; over {case['calls']} calls: "
            f"allocated {mega['allocated']:+.1f}, peak {mega['peak']:+.1f}, reserved {mega['reserved']:+.1f}"
        )
    elif "seconds_a_token" in case:
        each = case["seconds_a_token"]
        yield f"{name:12s} {each['head'] / each['trunk']:.2%} of the trunk's time ({case['layers']} layers)"


def targets(record: dict[str, Any]) -> Iterator[Verdict]:
    """What is to be reached, and whether it is."""
    cases = {name: case for name, case in record["cases"].items() if "error" not in case}

    def ratio(row: str, what: str, name: str, above: str, below: str, wanted: float, *, least: bool = True) -> Verdict:
        """Of the median times of two members."""
        if name not in cases:
            return f"{row}: {what}; the case {name} is not there"
        for each in (above, below):
            if each not in cases[name]["results"]:
                return f"{row}: {what}; {each} was not timed: {cases[name]['failed'].get(each, 'it was not asked for')}"
        return target(row, what, middle(cases[name], above) / middle(cases[name], below), wanted, least=least)

    def whole(name: str) -> bool:
        """Whether a case is there and no layer was left out: else milliseconds, and shares of a trunk, mean nothing."""
        return name in cases and cases[name]["layers"] == SHAPES[name.split()[0]].layers

    for shape, wanted in (("0.6B", 0.75), ("7B", 0.80)):
        case = cases.get(f"{shape} S128")
        row, what = f"{shape} S128", "GEMM FLOPs / time, of the rate at its own shapes"
        yield target(row, what, case["results"][IDS]["gemm_share"], wanted) if case else f"{row}: {what}; it is not there"
    for shape, wanted in (("0.6B", 1.25), ("7B", 1.45)):
        yield ratio(f"{shape} S128", "fp8, times as fast as bfloat16", f"{shape} S128", IDS, FP8, wanted)
    if whole("7B head"):
        each = cases["7B head"]["seconds_a_token"]
        yield target("7B", "NV-Embed's head / trunk", each["head"] / each["trunk"], 0.03, least=False)
    else:
        yield "7B: NV-Embed's head / trunk; not measured on all layers"
    for name, what, wanted in (("W1", "queries", 3), ("W2", "passages", 1.7)):
        yield ratio(f"0.6B {name}", f"{what}, times as fast as sentence-transformers", f"0.6B {name}", SENTENCES, TEXT, wanted)
    for shape, wanted in (("0.6B", 1.4), ("7B", 1.1)):
        for name in ("S128", "W2"):
            for peer in (PACKED, COMPILED):
                told = f"times as fast as the {SHORT[peer]} PyTorch peer"
                yield ratio(f"{shape} {name}", told, f"{shape} {name}", peer, IDS, wanted)
    row = cases["0.6B latency"]["milliseconds"].get("10") if whole("0.6B latency") else None
    device = row.get("on the device") if row else None
    yield (
        target("0.6B", "ms of a 10-token query on the device", device["span"], 0.9, least=False)
        if device
        else ("0.6B: ms of a 10-token query on the device; not measured")
    )
    yield (
        target("0.6B", "ms of a 10-token query from text", row[TEXT]["p50"], 1.5, least=False)
        if row
        else ("0.6B: ms of a 10-token query from text; not measured")
    )
    for name in ("S128", "W2"):
        yield ratio(f"0.6B {name}", "time from text / from ids", f"0.6B {name}", TEXT, IDS, 1.1, least=False)
    for shape in ("0.6B", "7B"):
        case = cases.get(f"{shape} memory")
        if case is None:
            yield f"{shape}: memory; it is not there"
            continue
        beyond, growth = case["beyond_loaded"], case["growth"]
        many, alone = beyond["many batches"], beyond["one batch"]
        what = "memory beyond the weights, many batches / one"
        yield target(shape, what, many / alone, SAME_MEMORY, least=False) if alone else f"{shape}: {what}; one batch took none"
        most = max(growth[key] for key in ("allocated", "peak", "reserved"))
        yield target(shape, f"bytes that {case['calls']} small batches leave", most, CREEP, least=False)
    for shape in ("0.6B", "7B"):
        case = cases.get(f"{shape} modes")
        what = "texts whose bits deterministic=True keeps alone and in another order, of all"
        if case is None:
            yield f"{shape}: {what}; it is not there"
        else:
            same = case["same_bits"]
            yield target(shape, what, min(same["alone"], same["reversed"]) / same["texts"], 1.0)
    yield "every family's tiny model within twice torch's error: pytest -m gpu shows it"


def summary(record: dict[str, Any]) -> str:
    """The table, why members failed, and the targets."""
    gpu, settings = record["gpu"], record["settings"]
    told = ["", f"{gpu['name'] if gpu else record['machine']['cpu']}, torch {record['versions']['torch']}, {settings}"]
    for name, case in record["cases"].items():
        told += lines(name, case)
    whys: dict[str, list[str]] = {}
    for name, case in record["cases"].items():
        for member, why in case.get("failed", {}).items():
            whys.setdefault(f"{member}: {why}", []).append(name)
    told += [f"  failed ({', '.join(names)})  {why}" for why, names in whys.items()]
    if record["not_run"]:
        told.append(f"  no time was left for: {', '.join(record['not_run'])}")
    for each in targets(record):
        if isinstance(each, str) or settings["tiny"] or gpu is None:
            told.append(
                f"  UNKNOWN {each if isinstance(each, str) else each['row'] + ': ' + each['what'] + '; not of a GPU and a whole model'}"
            )
        else:
            told.append(
                f"  {'met' if each['met'] else 'MISSED':7s} {each['reached']:8.3f} (wanted {each['wanted']}) {each['row']}: {each['what']}"
            )
    return "\n".join(told)
