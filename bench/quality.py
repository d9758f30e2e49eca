"""What a dtype costs in quality: vectors beside the same model's in float32, on real texts.

    python bench/quality.py MODEL CORPUS.jsonl [--texts 2000] [--dtypes bfloat16 int8 gpu-int8 fp8] [-o bench/results/NAME.json]

Cosines of each text's two vectors, and top-10 agreement: of the ten texts nearest to a text in float32, the share that is also among its
ten nearest in the dtype. For int8 and fp8 also the error of each linear layer on the probe (pyembed/quantising.py) and which layers stayed
bfloat16; for int8 how often the plain PyTorch product was called: 0 where kernels multiply. fp8 is plain PyTorch on a CPU, and so is
gpu-int8, the int8 of a CUDA device.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from measure import cpu_name

import pyembed
from pyembed import int8, quantising
from pyembed.verify import agreement

PERCENTILES = (1, 5, 50)
GPU_INT8 = "gpu-int8"
LOADS = 5  # of each dtype, in turns


def compared(vectors: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Distribution of the cosines of rows, and top-10 agreement."""
    cosines, same = agreement(vectors, right)
    found = {"mean": cosines.mean(), "least": cosines.min()} | {f"p{n}": np.percentile(cosines, n) for n in PERCENTILES}
    return {name: round(float(value), 6) for name, value in (found | {"top 10": same}).items()}


def loaded(model: str, dtype: str) -> pyembed.Encoder:
    if dtype == GPU_INT8:
        with mock.patch.object(quantising, "is_symmetric", return_value=True):
            return pyembed.Encoder(model, device="cpu", dtype="int8", backend="reference")
    return pyembed.Encoder(model, device="cpu", dtype=dtype, backend="reference" if dtype == "fp8" else None)


def measured(model: str, dtype: str, texts: list[str], right: np.ndarray) -> dict[str, Any]:
    """A dtype's row of the table."""
    calls, product = 0, int8.exact_product

    def counted(*tensors: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return product(*tensors)

    encoder = loaded(model, dtype)
    int8.exact_product = counted
    try:
        found: dict[str, Any] = {"cosines": compared(encoder.encode(texts), right)}
    finally:
        int8.exact_product = product
    if dtype == "int8":
        found["plain_products"] = calls
    if errors := encoder._engine.errors:
        found["in_bfloat16"] = quantising.stayed(errors)
        found["errors"] = {name: round(error, 4) for name, error in errors.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("corpus", help="JSONL with a text field (bench/docstrings.py writes one)")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with open(options.corpus, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    texts = random.Random(0).sample(texts, options.texts)
    encoder = pyembed.Encoder(options.model, device="cpu", dtype="float32")
    right = encoder.encode(texts)
    rows = {dtype: measured(options.model, dtype, texts, right) for dtype in options.dtypes}
    loads: dict[str, list[float]] = {dtype: [] for dtype in options.dtypes}
    for dtype in options.dtypes * LOADS:
        start = time.perf_counter()
        loaded(options.model, dtype)
        loads[dtype].append(round(time.perf_counter() - start, 3))
    for dtype, row in rows.items():
        print(f"{dtype:10} " + "  ".join(f"{name} {value:.5f}" for name, value in row["cosines"].items()))
    if options.output:
        record = {
            "command": f"python bench/quality.py MODEL CORPUS --texts {options.texts} --dtypes {' '.join(options.dtypes)}",
            "date": datetime.date.today().isoformat(),
            "machine": {"cpu": cpu_name(), "threads": options.threads, "isa": torch.backends.cpu.get_cpu_capability()},
            "versions": {"pyembed": pyembed.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "model": {
                "family": encoder.spec.model.family,
                "layers": encoder.spec.model.num_layers,
                "width": encoder.spec.model.hidden_size,
            },
            "limit": quantising.LIMIT,
            "dtypes": rows,
            "load_seconds": loads,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
