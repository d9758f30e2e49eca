"""What the errors by which layers stay bfloat16 (pyembed/quantising.py) are worth in cosines, on all-MiniLM-L6-v2.

    python bench/int8_limit.py MODEL CORPUS.jsonl [--texts 300] [-o bench/results/NAME.json]

First all layers in int8 with fewer and fewer levels for activations. Then the worst error when texts of the corpus are the probe. Then
copies of the model that compute the same with outliers in them, with the rule and without: a unit of the third layer's MLP that is a
constant for every token, which the bias after it takes away again, and a column of values in its attention that is larger by a factor,
with weights after it that are as much smaller. Cosines are to the same files in float32; the products are plain PyTorch's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import cpu_name
from safetensors.torch import load_file, save_file

import pyembed
from pyembed import int8, quantising

LEVELS = (255, 127, 63, 31, 15)
AT, UNIT = "encoder.layer.2.", 5
Tensors = dict[str, torch.Tensor]


def constant(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{AT}intermediate.dense.weight"][UNIT], tensors[f"{AT}intermediate.dense.bias"][UNIT] = 0, value
        tensors[f"{AT}output.dense.bias"] -= value * tensors[f"{AT}output.dense.weight"][:, UNIT]

    return change


def factor(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for part in ("weight", "bias"):
            tensors[f"{AT}attention.self.value.{part}"][UNIT] *= value
        tensors[f"{AT}attention.output.dense.weight"][:, UNIT] /= value

    return change


def row(directory: Path, texts: list[str], right: np.ndarray, dtype: str = "int8") -> dict[str, Any]:
    encoder = pyembed.Encoder(directory, device="cpu", dtype=dtype, backend="reference")
    cosines, errors = (encoder.encode(texts) * right).sum(1), encoder._engine.errors
    found: dict[str, Any] = {"mean": round(float(cosines.mean()), 5), "least": round(float(cosines.min()), 5)}
    if errors:
        worst = max(errors, key=errors.__getitem__)
        found |= {"mean error": round(float(np.mean(list(errors.values()))), 4), "worst error": round(errors[worst], 4), "worst": worst}
        found["in bfloat16"] = quantising.stayed(errors)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of all-MiniLM-L6-v2")
    parser.add_argument("corpus", help="JSONL with a text field (bench/docstrings.py writes one)")
    parser.add_argument("--texts", type=int, default=300)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    with open(options.corpus, encoding="utf-8") as file:
        texts = random.Random(0).sample([json.loads(line)["text"] for line in file], options.texts)
    limit, levels, tables = quantising.LIMIT, int8.LEVELS, {"levels": {}, "outliers": {}}  # type: dict[str, Any]
    right = pyembed.Encoder(options.model, device="cpu", dtype="float32").encode(texts)
    quantising.LIMIT = math.inf
    for int8.LEVELS in LEVELS:
        tables["levels"][int8.LEVELS] = row(options.model, texts, right)
        print(int8.LEVELS, tables["levels"][int8.LEVELS])
    int8.LEVELS = levels
    probe, worst = quantising.TEXTS, []
    for seed in range(20):
        quantising.TEXTS = tuple(random.Random(seed).sample(texts, len(probe)))
        errors = pyembed.Encoder(options.model, device="cpu", dtype="int8")._engine.errors
        worst.append(round(max(errors.values()), 4))
    quantising.TEXTS, tables["worst error under other probes"] = probe, worst
    cases = {f"constant {value}": constant(value) for value in (30, 100, 300)}
    cases |= {f"factor {value}": factor(value) for value in (100, 1000, 0.01, 0.001)}
    for name, change in cases.items():
        with tempfile.TemporaryDirectory() as place:
            model = Path(place) / "model"
            shutil.copytree(options.model, model)
            tensors = {
                key: each.float() if each.is_floating_point() else each for key, each in load_file(model / "model.safetensors").items()
            }
            change(tensors)
            save_file(tensors, model / "model.safetensors")
            right = pyembed.Encoder(model, device="cpu", dtype="float32").encode(texts)
            found = {"bfloat16": row(model, texts, right, "bfloat16")}
            for label, quantising.LIMIT in (("without the rule", math.inf), ("with it", limit)):
                found[label] = row(model, texts, right)
        tables["outliers"][name] = found
        print(name, found)
    if options.output:
        record = {
            "command": f"python bench/int8_limit.py all-MiniLM-L6-v2 CORPUS --texts {options.texts}",
            "date": datetime.date.today().isoformat(),
            "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "isa": torch.backends.cpu.get_cpu_capability()},
            "versions": {"pyembed": pyembed.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "limit": limit,
        }
        options.output.write_text(json.dumps(record | tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
