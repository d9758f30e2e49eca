"""What is not computed twice, on a 0.6B causal shape with random weights: prompts run once, a last layer for the rows that are read.

    python bench/reuse.py CORPUS.jsonl [--layers 28] [--texts 64] [--rounds 5] [--threads 2] [--peer] [--encoder DIR] [-o FILE.json]

Ten-token queries under a 25-token instruction and under a 300-token few-shot prefix: with the prefix kept, with it made anew, without
reuse, without reuse and pruning, and (--peer) sentence-transformers in bfloat16 at its best batch of {4, 16, 64}. Members of a case run
one after the other in every round, medians; vectors are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made import made, of_tokens
from measure import cpu_name, seconds, worst_cosine

import pyembed
from pyembed import runner


def unpruned(encoder: pyembed.Encoder, texts: list[str], prompt: str | None) -> Any:
    """Vectors with a last layer that computes every row."""
    keep, runner.keep = runner.keep, lambda *_: None  # type: ignore[assignment]
    try:
        return encoder.encode(texts, prompt=prompt)
    finally:
        runner.keep = keep


def cases_of(
    on: pyembed.Encoder, off: pyembed.Encoder, peer: Any, queries: list[str], prompt: str, *, noise: bool
) -> dict[str, Callable[[], Any]]:
    """What is compared under one prompt; vectors are checked first. `noise`: also the same thing twice, and what pruning gains."""

    def anew() -> Any:
        on._loaded.prefixes.runs.clear()  # type: ignore[union-attr]
        return on.encode(queries, prompt=prompt)

    cases: dict[str, Callable[[], Any]] = {
        "prefix kept": lambda: on.encode(queries, prompt=prompt),
        "prefix made anew": anew,
        "no reuse": lambda: off.encode(queries, prompt=prompt),
    }
    if noise:
        cases["no reuse again"] = lambda: off.encode(queries, prompt=prompt)
        cases["no reuse, no pruning"] = lambda: unpruned(off, queries, prompt)
    right = unpruned(off, queries, prompt)
    for each in ("prefix kept", "no reuse"):
        assert worst_cosine(cases[each](), right) > 0.9999, each
    if peer is not None:
        times = {size: seconds(lambda size=size: peer.encode(queries, prompt=prompt, batch_size=size)) for size in (4, 16, 64)}
        best = min(times, key=times.__getitem__)
        assert worst_cosine(peer.encode(queries, prompt=prompt, batch_size=best), right) > 0.99
        cases[f"sentence-transformers, best batch ({best})"] = lambda: peer.encode(queries, prompt=prompt, batch_size=best)
    return cases


def measure(cases: dict[str, Callable[[], Any]], rounds: int, base: str, texts: int) -> dict[str, list[float]]:
    """Seconds of each case in every round, printed beside those of `base`."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, work in cases.items():
            found[name].append(seconds(work))
    for name, each in found.items():
        middle = statistics.median(each)
        print(f"  {middle:8.3f} s  {texts / middle:8.1f} texts/s  {statistics.median(found[base]) / middle:6.2f} x  {name}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="JSONL with a text field (bench/docstrings.py writes one)")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--encoder", help="directory of all-MiniLM-L6-v2: also the gain of pruning for an encoder pooled at its first token"
    )
    parser.add_argument("--peer", action="store_true", help="also sentence-transformers")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    corpus = [json.loads(line)["text"] for line in Path(options.corpus).read_text(encoding="utf-8").splitlines()]
    record: dict[str, Any] = {
        "command": f"python bench/reuse.py CORPUS --layers {options.layers} --texts {options.texts} --rounds {options.rounds}",
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "threads": options.threads},
        "versions": {"pyembed": pyembed.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        directory = made(Path(folder), options.layers, corpus)
        on = pyembed.Encoder(directory, device="cpu", dtype="bfloat16")
        off = pyembed.Encoder(directory, device="cpu", dtype="bfloat16", prefix_cache_bytes=0)
        peer: Any = None
        if options.peer:
            from sentence_transformers import SentenceTransformer

            peer = SentenceTransformer(str(directory), device="cpu", model_kwargs={"dtype": "bfloat16"})
        queries = of_tokens(on, corpus, 10, options.texts)
        for name, count in (("instruction of 25 tokens", 25), ("few-shot prefix of 300 tokens", 300)):
            prompt = of_tokens(on, corpus, count, 1)[0]
            cases = cases_of(on, off, peer, queries, prompt, noise=count == 25)
            print(f"\n{name}, {len(queries)} queries of 10 tokens, {options.layers} layers, medians of {options.rounds} rounds")
            measured = measure(cases, options.rounds, "no reuse", len(queries))
            equal = np.array_equal(on.encode(queries, prompt=prompt), off.encode(queries, prompt=prompt))
            record["cases"][name] = {"equal bits": bool(equal), "seconds": measured}
    if options.encoder:
        encoder, texts = pyembed.Encoder(options.encoder, device="cpu", pooling="cls"), corpus[:1000]
        print(f"\n{encoder.spec.model.num_layers}-layer encoder pooled at its first token, {len(texts)} docstrings")
        cases = {
            "pruned": lambda: encoder.encode(texts),
            "pruned again": lambda: encoder.encode(texts),
            "whole": lambda: unpruned(encoder, texts, None),
        }
        record["cases"]["encoder, cls"] = {"seconds": measure(cases, options.rounds, "whole", len(texts))}
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
