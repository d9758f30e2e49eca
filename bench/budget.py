"""Which token budget a batch should have: one model, one corpus, interleaved rounds over several budgets.

    python bench/budget.py MODEL_DIR CORPUS.jsonl [--texts 1000] [--rounds 3] [--dtype bfloat16] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

import torch

from pyembed import Encoder

BUDGETS = (512, 1024, 2048, 4096, 8192, 16384)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("corpus")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with open(options.corpus, encoding="utf-8") as file:
        texts = random.Random(0).sample([json.loads(line)["text"] for line in file], options.texts)
    encoders = {budget: Encoder(options.model, device="cpu", dtype=options.dtype, tokens_per_batch=budget) for budget in BUDGETS}
    times: dict[int, list[float]] = {budget: [] for budget in BUDGETS}
    for each in range(options.rounds + 1):  # the first round warms up
        for budget, encoder in encoders.items():
            start = time.perf_counter()
            encoder.encode(texts)
            if each:
                times[budget].append(time.perf_counter() - start)
    tokens = encoders[BUDGETS[0]].stats.tokens / (options.rounds + 1)
    for budget, each in times.items():
        print(f"{budget:6d} tokens a batch: {tokens / statistics.median(each):8.0f} tokens/s")


if __name__ == "__main__":
    main()
