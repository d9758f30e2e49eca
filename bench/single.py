"""Parts `latency` and `long`: one short text, and one of 8k tokens."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from contest import Run, ours, shape_of_06b
from made import of_tokens
from measure import AGAIN, Case, Notes, interleaved, noise, of_cosines, refusal, spread, target
from tqdm import tqdm

import pyembed

SHORT = 10  # tokens, specials included
CALLS = {"MiniLM": 100, "0.6B": 10}  # a round
LENGTHS = (2048, 4096, 8192)
MEMORY = Path("/proc/self")


def milliseconds(cases: dict[str, Callable[[str], Any]], texts: Sequence[str], calls: int, name: str) -> dict[str, list[float]]:
    """A B C A B C ..., a text a call, each case on all texts in turn."""
    for work in cases.values():
        for text in texts[:5]:
            work(text)
    found: dict[str, list[float]] = {each: [] for each in cases}
    for text in tqdm(islice(cycle(texts), calls), total=calls, desc=f"{name}, one text", unit=" calls", dynamic_ncols=True):
        for each, work in cases.items():
            start = time.perf_counter()
            work(text)
            found[each].append(round(1000 * (time.perf_counter() - start), 4))
    return found


def one_model(run: Run, name: str, directory: str, notes: Notes) -> dict[str, Any]:
    """Latencies of one model."""
    encoders = ours(directory, ("bfloat16", "int8"), notes)
    encoder = encoders["bfloat16"]
    specials = len(encoder.tokenizer.prefix) + len(encoder.tokenizer.suffix)
    texts = of_tokens(encoder, run.corpus, SHORT - specials, 16)
    theirs = {"as it comes": peers.transformer(directory, None)}
    other = "bfloat16" if peers.dtype_of(theirs["as it comes"]) == "float32" else "float32"
    theirs[other] = peers.transformer(directory, other)
    float32 = theirs["as it comes"] if other == "bfloat16" else theirs["float32"]
    reference = float32.encode(texts, batch_size=1)
    cases: dict[str, Callable[[str], Any]] = {}
    cosines = {}
    for dtype, each in encoders.items():
        cosines[f"pyembed {dtype}"] = of_cosines(np.asarray(each.encode(texts)), reference)
        if (why := refusal(f"{name}, pyembed {dtype}", cosines[f"pyembed {dtype}"], dtype)) is not None:
            notes.refused.append(why)
            continue
        cases[f"pyembed {dtype}"] = each.encode
    for settings, model in theirs.items():
        label = f"sentence-transformers {settings}" + (f" ({peers.dtype_of(model)})" if settings == "as it comes" else "")
        cosines[label] = of_cosines(model.encode(texts, batch_size=1), reference)
        cases[label] = lambda text, model=model: model.encode(text)
        if settings == "as it comes" and "pyembed bfloat16" in cases:  # not beside the first: its weights would still be in the cache
            cases[f"pyembed bfloat16{AGAIN}"] = cases["pyembed bfloat16"]
    taken = milliseconds(cases, texts, (run.rounds or 3) * CALLS[name], name)
    tails = {each: {"p50": statistics.median(times), "p90": float(np.percentile(times, 90))} for each, times in taken.items()}
    results = {each: spread(times) | tails[each] for each, times in taken.items()}
    p50 = {label: each["p50"] for label, each in results.items()}
    row, own = (
        f"{name}, one text of {SHORT} tokens, p50",
        [label for label in p50 if label.startswith("pyembed") and not label.endswith(AGAIN)],
    )
    others = [label for label in p50 if label.startswith("sentence")]
    targets = [target(row, f"{label} / {other}", p50[label] / p50[other], 0.5, least=False) for label in own for other in others]
    record = {"cosines_before_timing": cosines, "milliseconds": taken, "results": results, "noise": noise(taken)}
    return record | {"targets": targets}


def latency(run: Run) -> dict[str, Any]:
    """p50 and p90 of one text of SHORT tokens, from text to vector."""
    notes = Notes()
    models = {"MiniLM": one_model(run, "MiniLM", run.model, notes)}
    with tempfile.TemporaryDirectory() as folder:
        models["0.6B"] = one_model(run, "0.6B", str(shape_of_06b(folder, run.corpus)), notes)
    targets = [each for model in models.values() for each in model.pop("targets")]
    return {"tokens": SHORT, "models": models, "targets": targets, **vars(notes)}


def documents(encoder: pyembed.Encoder, corpus: Sequence[str], length: int, count: int) -> list[np.ndarray]:
    """Ids of different documents of exactly so many tokens: docstrings end to end, the last token the model's own."""
    step = len(corpus) // count
    found = []
    for n in range(count):
        parts = islice(cycle(corpus), n * step, n * step + length // 16 + 8)
        ids = encoder.token_ids(["\n\n".join(parts)])[0]
        if len(ids) < length:
            raise ValueError(f"The corpus gives documents of {len(ids)} tokens; {length} were asked for.")
        found.append(np.concatenate([ids[: length - 1], ids[-1:]]))
    return found


def status(name: str) -> float:
    """MB of a line of this process's status."""
    line = next(line for line in (MEMORY / "status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def memory(directory: str, dtype: str, length: int, threads: int, corpus: Sequence[str]) -> dict[str, float]:
    """MB that a document takes at most beyond the loaded model. Run in a process of its own."""
    torch.set_num_threads(threads)
    encoder = pyembed.Encoder(directory, device="cpu", dtype=dtype)
    document = documents(encoder, corpus, length, 1)
    encoder.encode(documents(encoder, corpus, 64, 1))
    (MEMORY / "clear_refs").write_text("5")  # the peak is counted from here
    before = status("VmRSS")
    encoder.encode(document)
    return {"tokens": length, "loaded": before, "peak": status("VmHWM"), "most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def linear(found: Sequence[dict[str, float]]) -> float:
    """The memory a token takes from the middle length to the longest, beside that from the shortest to the middle one: 1 is linear."""
    small, middle, large = found
    early = (middle["peak"] - middle["loaded"] - small["peak"] + small["loaded"]) / (middle["tokens"] - small["tokens"])
    late = (large["peak"] - large["loaded"] - middle["peak"] + middle["loaded"]) / (large["tokens"] - middle["tokens"])
    return late / early


def long(run: Run) -> dict[str, Any]:
    """A document of 8k tokens beside 16 of 512: time a token, and memory at 2k, 4k and 8k."""
    notes = Notes()
    with tempfile.TemporaryDirectory() as folder:
        directory = shape_of_06b(folder, run.corpus)
        corpus = Path(folder) / "corpus.json"
        corpus.write_text(json.dumps(run.corpus))
        encoders = ours(directory, ("bfloat16", "int8"), notes)
        cases = {}
        for dtype, encoder in encoders.items():
            for length in (512, LENGTHS[-1]):
                ids = documents(encoder, run.corpus, length, LENGTHS[-1] // length)
                name = f"pyembed {dtype}, {len(ids)} x {length}"
                cases[name] = Case(lambda encoder=encoder, ids=ids: encoder.encode(ids))
                if dtype == "bfloat16" and length == 512:
                    cases[f"{name}{AGAIN}"] = cases[name]
            encoder.encode(documents(encoder, run.corpus, 512, 2))
        done = interleaved(cases, run.rounds or 3)
        kept: dict[str, list[dict[str, float]]] = {}
        for dtype in tqdm(list(encoders), desc="memory in new processes", unit="", dynamic_ncols=True):
            for length in LENGTHS:
                words = [sys.executable, __file__, str(directory), dtype, str(length), str(run.threads), str(corpus)]
                child = subprocess.run(words, capture_output=True, text=True, check=False)
                if child.returncode:
                    raise RuntimeError(f"The process that measures memory failed: {child.stderr[-500:]}")
                kept.setdefault(dtype, []).append(json.loads(child.stdout.splitlines()[-1]))
    results = {name: spread(each) | {"tokens_per_second": LENGTHS[-1] / statistics.median(each)} for name, each in done.seconds.items()}
    targets, middle = [], {name: each["median"] for name, each in results.items()}
    for dtype in encoders:
        short, whole = f"pyembed {dtype}, {LENGTHS[-1] // 512} x 512", f"pyembed {dtype}, 1 x {LENGTHS[-1]}"
        row = f"0.6B, document of {LENGTHS[-1]} tokens, {dtype}"
        targets.append(target(row, "time a token / that of 512 tokens", middle[whole] / middle[short], 2.4, least=False))
        targets.append(target(row, "memory a token, 4k to 8k / 2k to 4k", linear(kept[dtype]), 1.25, least=False))
    record = {"seconds": done.seconds, "results": results, "memory_mb": kept, "noise": noise(done.seconds)}
    return {"input": "token ids that were made before", **record, "targets": targets, **vars(notes)}


if __name__ == "__main__":
    given = sys.argv[1:]
    print(json.dumps(memory(given[0], given[1], int(given[2]), int(given[3]), json.loads(Path(given[4]).read_text()))))
