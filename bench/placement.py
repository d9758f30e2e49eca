"""Part `threads`: one batch on all threads or one batch on each, and how many tokens a batch should have."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from contest import CUT, Run, ours, shape_of_06b
from measure import AGAIN, Case, Notes, interleaved, noise, spread

import pyembed
from pyembed import engine

BUDGETS = {"MiniLM": (512, 1024, 2048, 4096, 8192), "0.6B": (1024, 2048, 4096)}
TEXTS = {"MiniLM": 600, "0.6B": 80}
ROUNDS = {"MiniLM": 3, "0.6B": 2}


def sharing(encoder: pyembed.Encoder, tokens: int) -> pyembed.Encoder:
    """Another encoder on the same weights, with its own lock and so many tokens a batch (long texts still cost more)."""
    twin = object.__new__(pyembed.Encoder)  # copy() would load the weights again
    vars(twin).update(vars(encoder))
    twin._engine = engine.local(replace(encoder._loaded, lock=threading.Lock()), encoder.tokenizer)
    twin._engine.budget = replace(twin._engine.budget, tokens=tokens)
    return twin


def apart(encoders: Sequence[pyembed.Encoder], texts: list[str]) -> Callable[[], np.ndarray]:
    """Every thread encodes its share of the texts, one in turn, on one torch thread."""
    count = len(encoders)

    def one(number: int, out: np.ndarray) -> None:
        torch.set_num_threads(1)
        out[number::count] = encoders[number].encode(texts[number::count])

    def work() -> np.ndarray:
        out = np.empty((len(texts), encoders[0].dim), dtype=np.float32)
        with ThreadPoolExecutor(count) as pool:
            for each in [pool.submit(one, number, out) for number in range(count)]:
                each.result()
        return out

    return work


def sweep(name: str, encoder: pyembed.Encoder, texts: list[str], threads: int, rounds: int) -> dict[str, Any]:
    """All budgets by both ways; their vectors have the same bits."""
    cases: dict[str, Case] = {}
    for tokens in BUDGETS[name]:
        within = sharing(encoder, tokens)
        cases[f"{tokens} tokens, {threads} threads in a batch"] = Case(lambda within=within: within.encode(texts))
        cases[f"{tokens} tokens, one batch a thread"] = Case(apart([sharing(encoder, tokens) for _ in range(threads)], texts))
    first = next(iter(cases))
    cases[f"{first}{AGAIN}"] = cases[first]
    expected = cases[first].work()
    for label, case in cases.items():
        if not np.array_equal(case.work(), expected):  # and warm
            raise RuntimeError(f"{name}, {label}: other vectors than {first}.")
    done = interleaved(cases, rounds)
    count = sum(map(len, encoder.token_ids(texts)))
    results = {label: spread(each) | {"tokens_per_second": count / float(np.median(each))} for label, each in done.seconds.items()}
    same = noise(done.seconds) or 0.0
    print(f"\n{name}, {encoder.dtype}, {len(texts)} texts, {count} tokens; two runs of the same thing differ by {same:.1%}")
    for label, each in sorted(results.items(), key=lambda item: -item[1]["tokens_per_second"]):
        print(f"{each['tokens_per_second']:10.0f} tokens/s  {label}")
    return {"texts": len(texts), "tokens": count, "seconds": done.seconds, "results": results, "noise": same}


def threads(run: Run) -> dict[str, Any]:
    """MiniLM and the 0.6B shape, by dtype."""
    notes = Notes()
    found = {}
    for dtype, encoder in ours(run.model, ("bfloat16", "int8"), notes).items():
        found[f"MiniLM {dtype}"] = sweep("MiniLM", encoder, run.sample(TEXTS["MiniLM"]), run.threads, run.rounds or ROUNDS["MiniLM"])
    with tempfile.TemporaryDirectory() as folder:
        encoders = ours(shape_of_06b(folder, run.corpus), ("bfloat16", "int8"), notes, max_seq_length=CUT)
    for dtype, encoder in encoders.items():
        found[f"0.6B {dtype}"] = sweep("0.6B", encoder, run.sample(TEXTS["0.6B"]), run.threads, run.rounds or ROUNDS["0.6B"])
    return {"cases": found, **vars(notes)}
