"""Time to the first embedding in a new process, beside sentence-transformers: interleaved processes, medians.

    python bench/first_embedding.py MODEL_DIR [--device cuda] [--rounds 7] [-o bench/results/NAME.json]

On CUDA with our kernels ours is there twice: cold, with an empty TRITON_CACHE_DIR, and warm, with one that an earlier process has filled.
Files of the model and of Python's packages are in the system's cache in either case. Seconds are those of the whole process; of ours also
those of its stages.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import about, write

STAGES = ("import torch", "import pyembed", "load", "first text", "second text")
OURS = """
import json, sys, time
model, settings = sys.argv[1], json.loads(sys.argv[2])
marks = [time.perf_counter()]
import torch
marks.append(time.perf_counter())
from pyembed import Encoder
marks.append(time.perf_counter())
encoder = Encoder(model, **settings)
marks.append(time.perf_counter())
for text in ("hello", "hello again"):
    encoder.encode(text)
    marks.append(time.perf_counter())
print(json.dumps([after - before for before, after in zip(marks, marks[1:])]))
"""
THEIRS = """
import json, sys
from sentence_transformers import SentenceTransformer
SentenceTransformer(sys.argv[1], device=json.loads(sys.argv[2])["device"]).encode("hello")
print("[]")
"""


def process(code: str, model: Path, settings: dict[str, Any], cache: str, limit: float | None = None) -> dict[str, float]:
    """Seconds of a new process and of its stages. RuntimeError with the last line of its errors where it fails or takes `limit` seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-c", code, str(model.resolve()), json.dumps(settings)]
    env = {**os.environ, "TRITON_CACHE_DIR": cache}
    try:  # in a folder that has no package of ours
        done = subprocess.run(command, env=env, cwd=cache, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"a new process had no embedding after {limit:.0f} s") from None
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"a new process failed: {(done.stderr.strip() or 'without a word').splitlines()[-1]}")
    return {"process": seconds} | dict(zip(STAGES, json.loads(done.stdout.splitlines()[-1]), strict=False))


def cold_and_warm(model: Path, settings: dict[str, Any], rounds: int, seconds: float) -> dict[str, Any]:
    """One process that finds nothing compiled, then as many that find what it left as fit into `seconds`; one at least.

    RuntimeError where the first takes two thirds of them, or the second the rest.
    """
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as cache:
        cold = process(OURS, model, settings, cache, seconds * 2 / 3)
        compiled = len(os.listdir(cache))
        warm: list[dict[str, float]] = []
        while not warm or (len(warm) < rounds and time.monotonic() + 1.5 * warm[-1]["process"] < until):
            warm.append(process(OURS, model, settings, cache, max(1.0, until - time.monotonic())))
        return {"cold": cold, "warm": warm, "compiled": compiled, "compiled_by_the_next": len(os.listdir(cache)) - compiled}


def medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {stage: statistics.median(each[stage] for each in runs) for stage in runs[0]}


def line(name: str, runs: Sequence[dict[str, float]]) -> str:
    """A member in a line: the process and its stages."""
    middle = medians(runs)
    stages = ", ".join(f"{stage} {middle[stage]:.2f}" for stage in STAGES if stage in middle)
    return f"{middle['process']:7.2f} s  {name}" + (f": {stages}" if stages else "")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backend", default="kernels", choices=["kernels", "reference"], help="of ours (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    settings = {"device": options.device, "backend": options.backend}
    compiles = options.device == "cuda" and options.backend == "kernels"
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as kept:
        for number in range(options.rounds + 1):  # the first round reads files into the system's cache, and compiles
            with tempfile.TemporaryDirectory() as empty:
                members = {"pyembed, cold": (OURS, empty)} if compiles else {}
                members |= {"pyembed, warm" if compiles else "pyembed": (OURS, kept), "sentence-transformers": (THEIRS, kept)}
                for name, (code, cache) in members.items():
                    took = process(code, options.model, settings, cache)
                    if number:
                        runs.setdefault(name, []).append(took)
    for name, each in runs.items():
        print(line(name, each))
    if options.output:
        record = about(0) | {"command": "python bench/first_embedding.py MODEL", "settings": settings, "seconds": runs}
        del record["machine"]["threads"]
        write(record, options.output)


if __name__ == "__main__":
    main()
