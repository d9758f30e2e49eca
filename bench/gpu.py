"""pyembed on a GPU beside the others, and beside what the card can do: one driver for a machine that is there for minutes.

    python bench/gpu.py [--seconds 560] [--only 0.6B] [--layers 7B=8] -o bench/results/NAME.json

Models are made at the start: Qwen3-Embedding-0.6B's and Mistral-7B's shapes with random weights in bfloat16, and a tokenizer trained on the
docstrings of Python's library, which are the texts. Cases, the most telling first:

    device   a copy, square products
    gate     cosines of our vectors to the float32 reference on ragged texts; without it nothing of that shape is timed
    linear   the model's own linear layers and nothing else: the ceiling
    S128 W1 W1i W2 W3 W4 W5   workloads (bench/gpu_work.py) from ids and from text: ours, sentence-transformers in bfloat16 with SDPA, and
             the packed PyTorch peer with and without torch.compile, each at the best of its settings, in turns; in S128 also ours in
             eight bits
    latency  one text of 10, 80, 512, 8192 tokens
    modes    ours without CUDA graphs, on one stream, and with deterministic=True; whether a text alone has the bits it has in a batch
    first embedding   in a new process with nothing compiled, and in the next one
    memory   while loading, of one batch, of many, over 1,000 small ones
    head     NV-Embed's head beside the trunk

Each case is written to -o when it is done, and one that is there is not run again: the next run goes on where this one ended. No case is
begun that might end after --seconds. A case or a peer that fails is named with its error. The table and the targets are printed last.
The exit status is 1 where the gate refused our vectors.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_ceilings
import gpu_modes
import gpu_report
import torch
from docstrings import docstrings
from gpu_models import SHAPES, Bench, Settings
from measure import about, write
from triton_cases import told

SEED = 0
Make = Callable[[Bench], dict[str, Any]]


def linear(bench: Bench, shape: str) -> dict[str, Any]:
    bench.passed(shape)
    return gpu_ceilings.of_shape(bench.chain(shape), bench.shapes[shape].batches, bench.rounds)


def raced(name: str, shape: str) -> tuple[str, Make]:
    return f"{shape} {name}", partial(gpu_cases.race, shape=shape, name=name)


CASES: dict[str, Make] = dict(
    [
        ("device", lambda bench: gpu_ceilings.of_device(bench.device, bench.rounds, tiny=bench.tiny)),
        ("0.6B gate", partial(gpu_cases.gate, shape="0.6B")),
        ("0.6B linear", partial(linear, shape="0.6B")),
        raced("S128", "0.6B"),
        ("0.6B latency", partial(gpu_cases.latency, shape="0.6B")),
        ("0.6B first embedding", partial(gpu_cases.first, shape="0.6B")),
        raced("W1", "0.6B"),
        ("0.6B modes", partial(gpu_modes.modes, shape="0.6B")),
        raced("W2", "0.6B"),
        ("7B gate", partial(gpu_cases.gate, shape="7B")),
        ("7B linear", partial(linear, shape="7B")),
        raced("S128", "7B"),
        ("0.6B memory", partial(gpu_cases.memory, shape="0.6B")),
        ("7B head", partial(gpu_cases.head, shape="7B")),
        raced("W1i", "0.6B"),
        raced("W5", "0.6B"),
        raced("W3", "0.6B"),
        raced("W4", "0.6B"),
        ("7B latency", partial(gpu_cases.latency, shape="7B")),
        *(raced(name, "7B") for name in ("W2", "W1", "W3", "W4", "W5")),
        ("7B modes", partial(gpu_modes.modes, shape="7B")),
        ("7B memory", partial(gpu_cases.memory, shape="7B")),
    ]
)


def begun(output: Path | None, record: dict[str, Any]) -> dict[str, Any]:
    """The cases of an earlier run that need not be run again: those that did not fail. ValueError where it ran something else."""
    if output is None or not output.exists():
        return {}
    earlier = json.loads(output.read_text(encoding="utf-8"))
    same = ("device", "backend", "tiny", "layers", "scale")
    for key in (*same, "gpu", "versions"):
        was, now = ((each["settings"] if key in same else each)[key] for each in (earlier, record))
        if was != now:
            raise ValueError(f"{output.name} was made with {key} {was}, this run has {now}; give another file with -o.")
    return {name: case for name, case in earlier["cases"].items() if "error" not in case}


def one(bench: Bench, name: str) -> dict[str, Any]:
    """A case of the record."""
    bench.say(f"case {name}")
    start = time.perf_counter()
    torch.manual_seed(SEED)
    try:
        case = CASES[name](bench)
    except Exception as fault:  # of many kinds
        traceback.print_exc()
        case = {"error": told(fault)}
    return case | {"took": time.perf_counter() - start}


def run(bench: Bench, record: dict[str, Any], names: Sequence[str], until: float, output: Path | None) -> None:
    """The cases that are not there yet, into the record, which is written after each. What it does not get to is named in it."""
    record["not_run"], usable = [], True
    for name in names:
        if name in record["cases"]:
            bench.say(f"case {name} is there already")
            continue
        if not usable or time.monotonic() + bench.settings.case > until:
            record["not_run"].append(name)
            continue
        record["cases"][name] = one(bench, name)
        usable = bench.usable()
        if not usable:
            bench.say("the device computes no more; run this again for the other cases")
        for line in gpu_report.lines(name, record["cases"][name]):
            bench.say(line)
        if output is not None:
            write(record, output)
    if output is not None:
        write(record, output)


def described(device: str, settings: Settings) -> dict[str, Any]:
    """The record before the first case."""
    record = about(torch.get_num_threads()) | {"settings": vars(settings) | {"compiled": list(settings.compiled)}, "gpu": None, "cases": {}}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        capability = [properties.major, properties.minor]
        record["gpu"] = {"name": properties.name, "capability": capability, "memory": properties.total_memory}
    record["versions"] |= {"triton": version("triton"), "cuda": str(torch.version.cuda)}
    return record


def layers_of(text: str) -> tuple[str, int]:
    shape, _, count = text.partition("=")
    if shape not in SHAPES or not count.isdigit() or int(count) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape and its layers; expected one of {', '.join(SHAPES)}, as in 7B=8")
    return shape, int(count)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=560, help="after which all is to be done (default: %(default)s)")
    parser.add_argument("--case", type=float, default=80, help="seconds that a case is to take at most (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose names begin so: '0.6B', '7B S128' (default: all)")
    parser.add_argument("--layers", nargs="+", type=layers_of, default=[], help="7B=8: fewer layers than the shape has")
    parser.add_argument("--scale", type=float, default=1.0, help="of the tokens of a workload (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="at most (default: %(default)s)")
    parser.add_argument("--compiled", nargs="*", default=["S128", "W2"], help="workloads with the compiled peer (default: S128 W2)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--backend", default="kernels", choices=["kernels", "reference"], help="of ours (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="models of two small layers, to see that all of this works")
    parser.add_argument("--corpus", type=Path, help="JSONL with a text field (default: the docstrings of this Python's library)")
    parser.add_argument("--folder", type=Path, help="where models are made, 16 GB (default: a temporary one)")
    parser.add_argument("-o", "--output", type=Path, help="file of all that was measured, as JSON")
    options = parser.parse_args(arguments)
    until = time.monotonic() + options.seconds
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny shows that the driver works")
    names = [name for name in CASES if any(name.startswith(each) for each in options.only)]
    if not names:
        parser.error(f"no case begins with {' or '.join(options.only)}; expected one of: {', '.join(CASES)}")
    settings = Settings(
        *(options.device, options.backend, options.tiny, dict(options.layers), options.scale, options.rounds, options.case),
        tuple(options.compiled),
    )
    record = described(options.device, settings)
    try:
        record["cases"] = begun(options.output, record)
    except ValueError as error:
        parser.error(str(error))
    if options.corpus is not None:
        corpus = [json.loads(line)["text"] for line in options.corpus.read_text(encoding="utf-8").splitlines()]
    else:
        corpus = [text for _, text in docstrings()]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run(Bench(settings, corpus, Path(folder), record["cases"]), record, names, until, options.output)
    print(gpu_report.summary(record))
    return int(any(name.endswith("gate") and "cosines" in case and "error" in case for name, case in record["cases"].items()))


if __name__ == "__main__":
    sys.exit(main())
