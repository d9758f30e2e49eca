"""What bench/gpu.py runs for a model shape: the gate, races on the workloads, latencies, first embedding, memory, NV-Embed's head."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any

import gemm
import numpy as np
import torch
from first_embedding import cold_and_warm
from gpu_ceilings import clocks
from gpu_models import OURS, Bench
from gpu_peers import Packed, Sentences
from measure import AGAIN, Case, cosines, interleaved, noise, of_cosines, refusal, spread
from single import status
from triton_cases import told

from pyembed.latent import Latent, attend
from pyembed.linear import linear
from pyembed.ops import Norm

IDS, TEXT = f"{OURS}, ids", f"{OURS}, text"
FP8, INT8 = f"{OURS} fp8, ids", f"{OURS} int8, ids"
PACKED, COMPILED, SENTENCES = "packed varlen_attn, ids", "packed varlen_attn compiled, ids", "sentence-transformers, text"
LOOSE = 0.98  # mean cosine to ours below which a peer computes something else
GATED = (1, 2, 3, 5, 8, 10, 13, 17, 24, 31, 40, 64, 65, 100, 128, 129, 200, 300, 512, 700, 1025, 2048)  # tokens
QUERIES = (10, 80, 512, 8192)  # tokens of the text whose latency is measured
SECONDS, CALLS = 2.0, 300  # that a member's latency is measured for, at most
SMALL = 1000  # small batches over which memory must not grow

Members = dict[str, Callable[[], Any]]


def gate(bench: Bench, shape: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """Cosines of our vectors, and of the peers', to the float32 reference on ragged texts. `error`: ours are refused."""
    ours, right = bench.ours(shape, dtype), bench.reference(shape)
    ids = ours.token_ids(bench.source(shape).texts([n for n in GATED if n <= bench.largest] * 2))
    reference = right.encode(ids)
    del right
    bench.tidy()
    found = {OURS: of_cosines(ours.encode(ids), reference)}
    record: dict[str, Any] = {"texts": len(ids), "tokens": sum(map(len, ids)), "cosines": found, "failed": {}}
    try:
        found[PACKED] = of_cosines(bench.packed(shape).encode(ids, 8192), reference)
    except Exception as fault:  # of many kinds
        record["failed"][PACKED] = told(fault)
    if (why := refusal(f"{shape}, {dtype}", found[OURS], dtype)) is not None:
        record["error"] = why
    return record


def in_requests(encode: Callable[[Any], np.ndarray], items: Sequence[Any], size: int | None) -> np.ndarray:
    """All in one call, or call after call in their order."""
    if size is None:
        return encode(items)
    return np.concatenate([encode(items[start : start + size]) for start in range(0, len(items), size)])


def race(bench: Bench, shape: str, name: str) -> dict[str, Any]:
    """A workload from ids and from text, ours and the peers' in turns; the ceiling is measured in every round."""
    bench.passed(shape)
    work, failed, settings = bench.work(shape, name), {}, {}
    ours = bench.ours(shape)
    mean = work.tokens / len(work.ids)
    members: Members = {}

    def add(label: str, make: Callable[[], Callable[[], Any]]) -> None:
        try:
            members[label] = make()
            bench.say(f"{shape} {name}: {label}")
            vectors[label] = members[label]()  # warm
        except Exception as fault:  # of many kinds: of compilers, of the driver, and refusals
            traceback.print_exc()
            members.pop(label, None)
            failed[label] = told(fault)
            bench.tidy()

    def packed(compiled: bool) -> Callable[[], Any]:
        model: Packed = bench.packed(shape, compiled=compiled)
        best = model.best(work.ids)
        settings[COMPILED if compiled else PACKED] = {"best": best.settings, "searched": best.searched}
        return lambda: in_requests(best.encode, work.ids, work.request)

    def sentences() -> Callable[[], Any]:
        model: Sentences = bench.sentences(shape)
        best = model.best(work.texts, mean)
        settings[SENTENCES] = {"best": best.settings, "searched": best.searched}
        return lambda: in_requests(best.encode, work.texts, work.request)

    def eight_bits(label: str, dtype: str) -> Callable[[], Any]:
        other, checked = bench.ours(shape, dtype), gate(bench, shape, dtype)
        settings[label] = {"cosines": checked["cosines"][OURS]}
        if "error" in checked:
            raise RuntimeError(checked["error"])
        return lambda: in_requests(other.encode, work.ids, work.request)

    vectors: dict[str, np.ndarray] = {}
    before = bench.memory()
    bench.reset_peak()
    counted = ours.stats
    add(IDS, lambda: lambda: in_requests(ours.encode, work.ids, work.request))
    if IDS in failed:
        return {"error": failed[IDS]}
    peak = bench.peak() - before
    from_text, own = partial(ours.encode, prompt=work.prompt), [each[len(work.prompt) :] for each in work.texts]
    add(TEXT, lambda: lambda: in_requests(from_text, own, work.request))
    add(PACKED, lambda: packed(False))
    add(SENTENCES, sentences)
    if name in bench.compiled:
        add(COMPILED, lambda: packed(True))
    if name == "S128":
        members[f"{IDS}{AGAIN}"] = members[IDS]
        for label, dtype in ((FP8, "fp8"), (INT8, "int8")):
            add(label, partial(eight_bits, label, dtype))
    agreement = {}
    for label in [each for each in vectors if each != IDS]:
        found = cosines(vectors[label], vectors[IDS])
        agreement[label] = {"mean": float(found.mean()), "min": float(found.min())}
        if not agreement[label]["mean"] >= LOOSE:
            failed[label] = f"wrong: its mean cosine to ours is {agreement[label]['mean']:.4f}, expected at least {LOOSE}"
            del members[label]
    config = ours.spec.model
    size = min(ours.plan(work.ids[:2]).budget, work.tokens)
    ceiling: list[float] = []
    rounds = bench.affordable(members)
    done = interleaved(
        {label: Case(each) for label, each in members.items()}, rounds, lambda: ceiling.append(bench.chain(shape).rate(size))
    )
    skipped = ours.stats.since(counted)
    if skipped.duplicates or (skipped.prefix_tokens and not work.prompt):
        raise RuntimeError(f"{skipped.duplicates} repeated texts and {skipped.prefix_tokens} shared tokens were not computed.")
    top = float(np.median(ceiling))
    read = len(work.ids) if config.causal else None
    results = {}
    for label, taken in done.seconds.items():
        middle = float(np.median(taken))
        results[label] = spread(taken) | {
            "tokens_per_second": work.tokens / middle,
            "gemm_share": gemm.flops(config, work.tokens) / middle / top,
            "executed_gemm_share": gemm.flops(config, work.tokens, read if label.startswith(OURS) else None) / middle / top,
        }
    return {
        "texts": len(work.ids),
        "tokens": work.tokens,
        "layers": config.num_layers,
        "rounds": rounds,
        "ceiling": {"tokens": size, "flops_per_second": ceiling},
        "results": results,
        "seconds": done.seconds,
        "noise": noise(done.seconds),
        "cosines_to_ours": agreement,
        "settings": settings,
        "peak_beyond_loaded": peak,
        "clocks": clocks(members[IDS]) if bench.device != "cpu" else None,
        "failed": failed,
    }


Span = tuple[float, float]  # start and end


def on_card(calls: Sequence[Span], work: Sequence[Span]) -> dict[str, float] | None:
    """Of what a card did inside each call: from its first start to its last end, and while it worked; medians. None: it did nothing."""
    spans, busy = [], []
    for begin, end in calls:
        inside = sorted(each for each in work if begin <= each[0] <= end)
        if inside:
            at, worked = begin, 0.0
            for start, stop in inside:
                worked += max(0.0, stop - max(start, at))
                at = max(at, stop)
            spans.append(at - inside[0][0])
            busy.append(worked)
    return {"span": float(np.median(spans)), "busy": float(np.median(busy))} if spans else None


def device_times(work: Callable[[], Any], calls: int) -> dict[str, float] | None:
    """Milliseconds of a call on the card. The profiler slows launches down, so the span of what is launched one by one is at most that."""
    from torch.profiler import ProfilerActivity, profile, record_function

    name, cuda = "one call", torch.autograd.DeviceType.CUDA
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            with record_function(name):
                work()
                torch.cuda.synchronize()
    spans: dict[bool, list[Span]] = {False: [], True: []}
    for each in seen.events():
        if (each.name == name) != (each.device_type == cuda):  # the card's events, and the host's marks alone
            spans[each.name == name].append((each.time_range.start / 1e3, each.time_range.end / 1e3))
    return on_card(spans[True], spans[False])


def on_each(encode: Callable[[Any], Any], items: Sequence[Any]) -> Callable[[int], Any]:
    """Of a text's number."""
    return lambda n: encode([items[n]])


def latency(bench: Bench, shape: str) -> dict[str, Any]:
    """p50 and p95 in milliseconds of one text at a time, different ones in turn, by its tokens."""
    bench.passed(shape)
    ours, found, failed = bench.ours(shape), {}, {}
    for tokens in [each for each in QUERIES if each <= bench.largest]:
        texts = bench.source(shape).exactly(tokens, 8 if tokens <= 512 else 2)
        ids = ours.token_ids(texts)
        members: dict[str, Callable[[int], Any]] = {IDS: on_each(ours.encode, ids), TEXT: on_each(ours.encode, texts)}
        makes = {
            PACKED: lambda ids=ids: on_each(partial(bench.packed(shape).encode, budget=1), ids),
            SENTENCES: lambda texts=texts: on_each(partial(bench.sentences(shape).encode, batch=1), texts),
        }
        for label, make in makes.items():
            try:
                members[label] = make()
                members[label](0)
            except Exception as fault:  # of many kinds
                members.pop(label, None)
                failed[label] = told(fault)
        for each in members.values():
            for n in range(len(texts)):
                each(n)
        taken: dict[str, list[float]] = {label: [] for label in members}
        until = time.monotonic() + min(SECONDS * len(members), bench.settings.case / 8)
        for n in islice(cycle(range(len(texts))), CALLS if not bench.tiny else 4):
            for label, each in members.items():
                start = time.perf_counter()
                each(n)
                taken[label].append(1e3 * (time.perf_counter() - start))
            if time.monotonic() > until:
                break
        row: dict[str, Any] = {
            label: {"p50": float(np.median(each)), "p95": float(np.percentile(each, 95)), "calls": len(each)}
            for label, each in taken.items()
        }
        if bench.device != "cpu":
            row["on the device"] = device_times(lambda ids=ids: ours.encode([ids[0]]), 20)
        found[str(tokens)] = row
    return {"layers": ours.spec.model.num_layers, "milliseconds": found, "failed": failed}


def first(bench: Bench, shape: str) -> dict[str, Any]:
    """Seconds to the first embedding in a new process that finds nothing compiled, and in later ones."""
    bench.passed(shape)
    settings = {"device": bench.device, "dtype": "bfloat16", "backend": bench.settings.backend, "max_seq_length": bench.largest}
    found = cold_and_warm(bench.directory(shape), settings, bench.rounds, bench.settings.case)
    return {"layers": bench.ours(shape).spec.model.num_layers} | found


def memory(bench: Bench, shape: str) -> dict[str, Any]:
    """Bytes: of the weights, while loading, beyond the weights for one batch and for many, and growth over small batches.

    On a CPU they are the process's, and no target is held against them.
    """
    bench.passed(shape)
    ours, loading = bench.ours(shape), bench.loading[shape]
    work = bench.work(shape, "S128")
    first = ours.plan(work.ids).batches[0].texts
    peaks = {}
    for label, ids in (("one batch", work.ids[:first]), ("many batches", work.ids)):
        ours.encode(ids)
        before = bench.memory()
        bench.reset_peak()
        ours.encode(ids)
        peaks[label] = bench.peak() - before
    counts = [1 + 13 * n % 60 for n in range(8 * 50)]
    texts = ours.token_ids(bench.source(shape).texts(counts))
    batches = [texts[8 * n : 8 * n + 8] for n in range(50)]
    calls = SMALL if not bench.tiny else 20
    marks = []
    for n in range(calls):
        if n in (calls // 10, calls - 1):
            marks.append(
                {"allocated": bench.memory(), "peak": bench.peak(), "reserved": bench.reserved(), "resident": status("VmRSS") * 2**20}
            )
        if n == 0:
            bench.reset_peak()
        ours.encode(batches[n % len(batches)])
    growth = {name: marks[1][name] - marks[0][name] for name in marks[0]}
    return loading | {"beyond_loaded": peaks, "batches": len(ours.plan(work.ids).batches), "calls": calls, "growth": growth}


def head(bench: Bench, shape: str) -> dict[str, Any]:
    """NV-Embed's head at its published sizes on as many tokens as a batch has, and the trunk's pass over S128: seconds a token of each."""
    bench.passed(shape)
    ours, work = bench.ours(shape), bench.work(shape, "S128")
    kernels, config = ours._loaded.ops, ours.spec.model
    width, folded, inner = config.hidden_size, 8 * (512 if not bench.tiny else 16), 4 * config.hidden_size

    def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return (torch.randn(shape, device=bench.device) * 0.02).to(dtype)

    def norm() -> Norm:
        return Norm(torch.ones(width, device=bench.device), torch.zeros(width, device=bench.device), 1e-5, layer=True)

    with torch.inference_mode():
        latent = Latent(
            norm=norm(),
            scores=linear(drawn(folded, width), None),
            mix=linear(drawn(width, folded), None),
            mlp_norm=norm(),
            up=linear(drawn(2 * inner, width), drawn(2 * inner)),
            down=linear(drawn(width, inner, dtype=torch.float32), drawn(width, dtype=torch.float32)),
            heads=8,
        )
        tokens = min(ours.plan(work.ids).budget, work.tokens)
        states = drawn(tokens, width)

    def run() -> None:
        with torch.inference_mode():
            for _ in range(4):
                attend(states, latent, kernels)
            bench.wait()

    members: Members = {"head": run, "trunk": lambda: ours.encode(work.ids)}
    done = interleaved({name: Case(each) for name, each in members.items()}, bench.affordable(members))
    each = {"head": 4 * tokens, "trunk": work.tokens}
    return {
        "layers": config.num_layers,
        "seconds_a_token": {name: float(np.median(taken)) / each[name] for name, taken in done.seconds.items()},
        "seconds": done.seconds,
    }
