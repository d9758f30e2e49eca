"""What the engine adds to the forward pass, and what it saves: duplicates, tokenisation, the last layer, and streams of any length.

    python bench/line.py MODEL_DIR CORPUS.jsonl [--rounds 7] [--threads 2] [--sizes 1000 10000 ...] [-o FILE.json] [--plot FILE.png]

MODEL_DIR is all-MiniLM-L6-v2. Members of a case run one after the other in every round; medians. Streams run in a process each, with a
tiny causal model; their memory is the process's own (VmRSS), looked at after every window.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from made import made
from measure import cpu_name, seconds

import pyembed
from pyembed import blocks, model

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def compare(cases: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case in every round, after a first one that does not count."""
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for name, work in cases.items():
            taken = seconds(work)
            if number:
                found[name].append(taken)
    base = median(next(iter(found.values())))
    for name, each in found.items():
        print(f"  {median(each):8.3f} s  {median(each) / base:6.3f} of the first  {name}", flush=True)
    return dict(found)


def duplicated(texts: list[str], share: float) -> list[str]:
    """The texts, and copies of some so that `share` of all are copies, shuffled."""
    dice = random.Random(1)
    copies = dice.choices(texts, k=round(len(texts) * share / (1 - share)))
    return dice.sample(texts + copies, len(texts) + len(copies))


def duplicates(encoder: pyembed.Encoder, texts: list[str], rounds: int) -> dict[str, Any]:
    print(f"\n40% duplicates: {len(texts):,} different docstrings")
    more = duplicated(texts, 0.4)
    vectors, index = encoder.encode(texts), {text: n for n, text in enumerate(texts)}
    assert np.array_equal(encoder.encode(more), vectors[[index[text] for text in more]])
    cases = {
        "without": lambda: encoder.encode(texts),
        "without, again": lambda: encoder.encode(texts),
        f"with, {len(more):,} texts": lambda: encoder.encode(more),
        f"with, {len(more):,} texts, stream": lambda: list(encoder.stream(more)),
    }
    return {"seconds": compare(cases, rounds)}


def overlap(encoder: pyembed.Encoder, texts: list[str], rounds: int) -> dict[str, Any]:
    ids = encoder.token_ids(texts)
    print(f"\nTokenisation: {len(texts):,} docstrings, {sum(map(len, ids)):,} tokens")
    assert np.array_equal(encoder.encode(ids), encoder.encode(texts))
    cases = {
        "token ids": lambda: encoder.encode(ids),
        "token ids, again": lambda: encoder.encode(ids),
        "texts": lambda: encoder.encode(texts),
        "tokenising alone": lambda: encoder.token_ids(texts),
    }
    return {"seconds": compare(cases, rounds)}


def last_layer(texts: list[str], corpus: list[str], rounds: int) -> dict[str, Any]:
    """A layer's time in a 0.6B causal shape of 4 layers, one row read per text."""
    taken: dict[int, list[float]] = defaultdict(list)
    plain, number = blocks.BLOCKS["pre"], 0

    def timed(*given: Any) -> Any:
        nonlocal number
        start = time.perf_counter()
        out = plain(*given)
        taken[number % 4].append(time.perf_counter() - start)
        number += 1
        return out

    with tempfile.TemporaryDirectory() as folder:
        encoder = pyembed.Encoder(made(Path(folder), 4, corpus, vocabulary=16384), device="cpu", dtype="bfloat16", max_seq_length=512)
        model.BLOCKS["pre"] = timed
        try:
            for turn in range(rounds + 1):
                if turn == 1:
                    taken.clear()
                    number = 0
                encoder.encode(texts, batch_size=32)
        finally:
            model.BLOCKS["pre"] = plain
    sums = [sum(taken[n]) for n in range(4)]
    share = sums[3] / (sum(sums[1:3]) / 2)
    print(f"\nLast layer: {share:.3f} of the two before it, {len(texts)} docstrings cut at 512 tokens, 32 in a batch")
    return {"seconds by layer": sums, "share": share}


def short_texts(count: int, corpus: list[str]) -> Iterator[str]:
    """Different texts of a few words."""
    words = [word for text in corpus[:500] for word in text.split()]
    dice = random.Random(2)
    for number in range(count):
        yield f"{number} " + " ".join(dice.choices(words, k=dice.randrange(2, 9)))


def resident() -> float:
    """MB of this process's memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def stream(directory: str, corpus: list[str], count: int, threads: int) -> dict[str, Any]:
    """Run in a process of its own: tokens/s, and memory over the texts done."""
    torch.set_num_threads(threads)
    encoder = pyembed.Encoder(directory, device="cpu", dtype="float32")
    list(encoder.stream(short_texts(2000, corpus)))
    memory, times, total = [(0, resident())], [], np.zeros(64)
    for turn in range(max(1, 30_000 // count)):  # short ones several times
        before, done, start = encoder.stats.tokens, 0, time.perf_counter()
        for vector in encoder.stream(short_texts(count, corpus)):
            total += vector
            done += 1
            if done % 1000 == 0 and turn == 0:
                memory.append((done, resident()))
        times.append(time.perf_counter() - start)
        assert done == count
    tokens, taken = encoder.stats.tokens - before, median(times)
    memory = memory[:: max(1, len(memory) // 200)]
    return {"texts": count, "tokens": tokens, "seconds": times, "tokens/s": tokens / taken, "memory": memory}


def streams(options: argparse.Namespace, corpus: list[str]) -> list[dict[str, Any]]:
    print("\nStreams of short texts, a tiny model")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        made(Path(folder), 2, corpus, shape=TINY, vocabulary=8000)
        for count in options.sizes:
            command = [sys.executable, __file__, folder, options.corpus, "--one-stream", str(count), "--threads", str(options.threads)]
            each = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
            found.append(each)
            after = [size for done, size in each["memory"] if done >= 1000]
            print(
                f"  {count:9,} texts  {each['tokens/s']:9,.0f} tokens/s  {after[0]:7.1f} MB after a window, {max(after):7.1f} MB at most",
                flush=True,
            )
    return found


def plot(found: list[dict[str, Any]], to: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot([each["texts"] for each in found], [each["tokens/s"] / 1000 for each in found], "o-", color="#1f77b4")
    left.set(xscale="log", xlabel="texts in the stream", ylabel="thousand tokens/s", title="Speed", ylim=(0, None))
    for each in found:
        right.plot(*zip(*each["memory"], strict=True), label=f"{each['texts']:,} texts")
    right.set(xscale="symlog", xlabel="texts done", ylabel="MB resident", title="Memory of the process", ylim=(0, None))
    right.set_xlim(0, found[-1]["texts"])
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(to, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of all-MiniLM-L6-v2")
    parser.add_argument("corpus", help="JSONL with a text field (bench/docstrings.py writes one)")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1000, 10_000, 100_000, 1_000_000], help="of the streams")
    parser.add_argument("--one-stream", type=int, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    corpus = [json.loads(line)["text"] for line in Path(options.corpus).read_text(encoding="utf-8").splitlines()]
    if options.one_stream:
        print(json.dumps(stream(options.model, corpus, options.one_stream, options.threads)))
        return
    torch.set_num_threads(options.threads)
    texts = random.Random(0).sample(list(dict.fromkeys(corpus)), options.texts)
    encoder = pyembed.Encoder(options.model, device="cpu")
    record: dict[str, Any] = {
        "command": f"python bench/line.py MODEL CORPUS --texts {options.texts} --rounds {options.rounds}",
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "threads": options.threads},
        "versions": {"pyembed": pyembed.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "dtype": str(encoder.dtype),
        "duplicates": duplicates(encoder, texts, options.rounds),
        "overlap": overlap(encoder, texts, options.rounds),
        "last layer": last_layer([text for text in texts if len(text) > 200][:128], corpus, max(2, options.rounds // 2)),
        "streams": streams(options, corpus) if options.sizes else [],
    }
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    if options.plot and record["streams"]:
        plot(record["streams"], options.plot)


if __name__ == "__main__":
    main()
