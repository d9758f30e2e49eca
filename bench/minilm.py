"""all-MiniLM-L6-v2 on standard-library docstrings, text in to vectors out, beside sentence-transformers: interleaved rounds, medians.

    python bench/minilm.py MODEL_DIR CORPUS.jsonl [--texts 3000] [--rounds 5] [--threads 2] [-o bench/results/NAME.json]

The peer runs at its default batch size and at the best of {4, 8, 32, 128}, found on a tenth of the texts in the same process. Vectors
are compared before anything is timed; the GEMM ceiling is measured in the same run. Figures are real tokens (no padding) per second.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

import pyembed

PEER_BATCHES = (4, 8, 32, 128)


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def gemm_ceiling(dtype: torch.dtype) -> float:
    """TFLOP/s of a 2048 x 1536 x 384 product, the model's largest shape."""
    x, w = torch.randn(2048, 384).to(dtype), torch.randn(1536, 384).to(dtype)
    torch.nn.functional.linear(x, w)
    times = [seconds(lambda: torch.nn.functional.linear(x, w)) for _ in range(30)]
    return 2 * 2048 * 1536 * 384 / statistics.median(times) / 1e12


def worst_cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of all-MiniLM-L6-v2")
    parser.add_argument("corpus", help="JSONL with a text field (bench/docstrings.py writes one)")
    parser.add_argument("--texts", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with open(options.corpus, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    texts = random.Random(0).sample(texts, options.texts)

    ours = {name: pyembed.Encoder(options.model, device="cpu", dtype=name) for name in ("float32", "bfloat16")}
    peers = {
        name: SentenceTransformer(options.model, device="cpu", model_kwargs={"dtype": name}) for name in ("float32", "bfloat16")
    }
    tokens = sum(map(len, ours["float32"].tokenizer.encode(texts, ours["float32"].max_seq_length).ids))

    sample = texts[: options.texts // 10]
    reference = peers["float32"].encode(sample, batch_size=8)
    cosines = {f"pyembed {name}": worst_cosine(ours[name].encode(sample), reference) for name in ours}
    cosines["sentence-transformers bfloat16"] = worst_cosine(peers["bfloat16"].encode(sample, batch_size=8), reference)
    assert cosines["pyembed float32"] >= 0.99999, cosines
    assert cosines["pyembed bfloat16"] >= 0.9995, cosines
    best = {}
    for name, peer in peers.items():
        times = {size: seconds(lambda peer=peer, size=size: peer.encode(sample, batch_size=size)) for size in PEER_BATCHES}
        best[name] = min(times, key=times.__getitem__)

    cases: dict[str, Callable[[], Any]] = {
        "pyembed float32": lambda: ours["float32"].encode(texts),
        "pyembed bfloat16": lambda: ours["bfloat16"].encode(texts),
        "sentence-transformers as it comes (float32, batch 32)": lambda: peers["float32"].encode(texts),
        f"sentence-transformers float32, best batch ({best['float32']})": lambda: peers["float32"].encode(
            texts, batch_size=best["float32"]
        ),
        f"sentence-transformers bfloat16, best batch ({best['bfloat16']})": lambda: peers["bfloat16"].encode(
            texts, batch_size=best["bfloat16"]
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    ceilings: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for encoder in ours.values():
        encoder.encode(sample)
    with tqdm(total=options.rounds * len(cases), unit=" runs") as bar:
        for _ in range(options.rounds):
            for name in ceilings:
                ceilings[name].append(gemm_ceiling(getattr(torch, name)))
            for name, work in cases.items():
                times[name].append(seconds(work))
                bar.update()
    rates = {name: tokens / statistics.median(each) for name, each in times.items()}

    import sentence_transformers
    import transformers

    record = {
        "command": "python bench/minilm.py " + " ".join(["MODEL", "CORPUS", f"--texts {options.texts}", f"--rounds {options.rounds}"]),
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "threads": options.threads, "isa": torch.backends.cpu.get_cpu_capability()},
        "versions": {
            "pyembed": pyembed.__version__,
            "torch": torch.__version__,
            "sentence-transformers": sentence_transformers.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "texts": len(texts),
        "tokens": tokens,
        "worst_cosine_to_peer_float32": cosines,
        "gemm_tflops": {name: statistics.median(each) for name, each in ceilings.items()},
        "seconds": times,
        "tokens_per_second": rates,
    }
    print(f"\n{len(texts)} texts, {tokens} tokens, {options.threads} threads, median of {options.rounds} interleaved rounds")
    for name, rate in rates.items():
        print(f"{rate:10.0f} tokens/s  {name}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
