"""`make bench-cpu`: what pyembed shows on a CPU beside the others, each at its best settings.

    python bench/cpu.py MODEL_DIR CORPUS.jsonl [--only minilm,qwen,...] [--rounds N] [--texts N] [--threads 2] [-o bench/results/NAME.json]

MODEL_DIR is all-MiniLM-L6-v2, CORPUS what bench/docstrings.py writes. Parts, each below 10 minutes on two Zen 4 cores:

    minilm   3,000 docstrings; sentence-transformers, OpenVINO, ONNX Runtime
    qwen     200 docstrings at the shape of Qwen3-Embedding-0.6B with random weights; sentence-transformers
    latency  one text of 10 tokens, both models; p50 and p90
    long     a document of 8k tokens at that shape: time and memory
    profile  where our time goes
    threads  one batch on all threads or one on each, by tokens a batch

Vectors are compared with sentence-transformers' in float32 before anything is timed. Contestants run one after the other in every round,
slow ones in fewer rounds; medians. Ours is timed twice in every round for the noise, and the GEMM ceiling is measured in every round.
Several parts run in a process each. With -o the raw seconds are written as JSON and drawn as a PNG of the same name. The peers are in the
bench extra; one that is not installed, or a dtype that the installed pyembed refuses, is named as left out. The exit status is 1 where
the gate refused one of ours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import contest
import placement
import shares
import single
import torch
from contest import Run
from measure import about, print_targets, write

PARTS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "minilm": contest.minilm,
    "qwen": contest.qwen,
    "latency": single.latency,
    "long": single.long,
    "profile": shares.profile,
    "threads": placement.threads,
}


def parts_of(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no part; expected some of {','.join(PARTS)}")
    return names


def show(name: str, record: dict[str, Any]) -> None:
    """What a part found, in lines."""
    print(f"\n{name}: {record.get('model', '')}")
    for label, each in sorted(record.get("results", {}).items(), key=lambda item: -item[1]["tokens_per_second"]):
        share = f"{each['gemm_share_of_ceiling']:6.1%} of the GEMM ceiling" if "gemm_share_of_ceiling" in each else ""
        cosine = record.get("cosines", record.get("cosines_before_timing", {})).get(label)
        shown = f"cosine mean {cosine['mean']:.5f}, min {cosine['min']:.5f}" if cosine else ""
        print(f"{each['tokens_per_second']:10.0f} tokens/s  {share}  {label:45s} {shown}  {record.get('settings', {}).get(label, '')}")
    for model, found in record.get("models", {}).items():
        for label, each in found["results"].items():
            print(f"{each['p50']:10.2f} ms p50 {each['p90']:10.2f} ms p90  {model}, {label}")
        if found["noise"] is not None:
            print(f"  {model}: two runs of the same thing differ by {found['noise']:.1%}")
    for dtype, found in record.get("memory_mb", {}).items():
        print(
            f"  {dtype}: "
            + ", ".join(f"{each['peak'] - each['loaded']:.0f} MB beyond the model at {each['tokens']} tokens" for each in found)
        )
    if record.get("noise") is not None:
        print(f"  two runs of the same thing differ by {record['noise']:.1%}")
    print_targets(record.get("targets", []))
    for each in (*record["left_out"], *record["refused"]):
        print(f"  LEFT OUT  {each}")


def in_processes(names: Sequence[str], arguments: Sequence[str]) -> dict[str, Any]:
    """The record of several parts, each run by a process of its own."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            to = Path(folder) / f"{name}.json"
            child = subprocess.run([sys.executable, __file__, *arguments, "--only", name, "-o", str(to)], check=False)
            if not to.exists():
                raise SystemExit(f"Part {name} failed with exit status {child.returncode}; what it says is above.")
            record = json.loads(to.read_text())
            found |= {key: value for key, value in record.items() if key != "parts"}
            found.setdefault("parts", {}).update(record["parts"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of all-MiniLM-L6-v2")
    parser.add_argument("corpus", help="JSONL with a text field (bench/docstrings.py writes one)")
    parser.add_argument("--only", type=parts_of, default=list(PARTS), help="parts, separated by commas")
    parser.add_argument("--rounds", type=int, help="of every part")
    parser.add_argument("--texts", type=int, help="of every part that takes texts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, help="JSON; the chart stands beside it")
    options = parser.parse_args()
    given = {"--rounds": options.rounds, "--texts": options.texts, "--threads": options.threads}
    settings = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    if len(options.only) > 1:
        record = in_processes(options.only, [options.model, options.corpus, *settings])
    else:
        torch.set_num_threads(options.threads)
        lines = Path(options.corpus).read_text(encoding="utf-8").splitlines()
        corpus = list(dict.fromkeys(json.loads(line)["text"] for line in lines))
        run, name, start = Run(options.model, corpus, options.threads, options.rounds, options.texts), options.only[0], time.perf_counter()
        part = PARTS[name](run)
        part["command"] = " ".join(["python bench/cpu.py MODEL CORPUS --only", name, *settings])
        part["minutes"] = round((time.perf_counter() - start) / 60, 2)
        record = about(options.threads) | {"parts": {name: part}}
        show(name, part)
    if options.output:
        import charts

        write(record, options.output)
        charts.plot(record, options.output.with_suffix(".png"))
    sys.exit(1 if any(part["refused"] for part in record["parts"].values()) else 0)


if __name__ == "__main__":
    main()
