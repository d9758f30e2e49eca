"""Part `threads`: one batch on all threads or one batch on each, and how many tokens a batch should have."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from typing import Any

import numpy as np
from contest import CUT, Run, ours, shape_of_06b
from measure import AGAIN, Case, Notes, interleaved, noise, spread

import pyembed
from pyembed import engine

BUDGETS = {"MiniLM": (512, 1024, 2048, 4096, 8192), "0.6B": (1024, 2048, 4096)}
TEXTS = {"MiniLM": 600, "0.6B": 80}
ROUNDS = {"MiniLM": 3, "0.6B": 2}


def twin(encoder: pyembed.Encoder, tokens: int) -> pyembed.Encoder:
    """Another encoder on the same weights, with so many tokens a batch (long texts still cost more)."""
    made = object.__new__(pyembed.Encoder)  # copy() would load the weights again
    vars(made).update(vars(encoder))
    made._engine = engine.local(encoder._loaded, encoder.tokenizer)
    made._engine.budget = replace(made._engine.budget, tokens=tokens)
    return made


def placed(encoder: pyembed.Encoder, texts: list[str], plenty: float) -> np.ndarray:
    """Vectors of the texts, with one batch on each thread from so many batches a thread on."""
    usual = engine.PLENTY
    engine.PLENTY = plenty  # type: ignore[assignment]
    try:
        return np.asarray(encoder.encode(texts))
    finally:
        engine.PLENTY = usual


def sweep(name: str, encoder: pyembed.Encoder, texts: list[str], threads: int, rounds: int) -> dict[str, Any]:
    """All budgets by both ways; their vectors have the same bits."""
    cases: dict[str, Case] = {}
    for tokens in BUDGETS[name]:
        own = twin(encoder, tokens)
        cases[f"{tokens} tokens, {threads} threads in a batch"] = Case(lambda own=own: placed(own, texts, math.inf))
        cases[f"{tokens} tokens, one batch a thread"] = Case(lambda own=own: placed(own, texts, engine.PLENTY))
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
