"""The arguments of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyembed
from pyembed.output import FORMATS, STORED


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with INPUT and QUERY also after options, where argparse no longer takes what may be absent."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    plain = not any(word.startswith("-") and word != "-" for word in rest)
    name = {"encode": "input", "info": "model", "verify": "model"}.get(args.command, "")
    if plain and args.command == "search":
        args.query += rest
    elif plain and len(rest) == 1 and getattr(args, name, "given") in ("-", None):
        setattr(args, name, rest[0])
    elif rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="pyembed", description="Text to vectors with LLM embedding models.")
    top.add_argument("--version", action="version", version=f"pyembed {pyembed.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")

    one = commands.add_parser(
        "encode",
        help="texts of a file or pipe to a file of vectors",
        description="Write the vector of each text. While it runs the file is OUT.partial; interrupted, that holds the rows so far.",
    )
    one.add_argument("model", metavar="MODEL", help="folder or hub id")
    one.add_argument("input", metavar="INPUT", nargs="?", default="-", help="a file; - or nothing: standard input")
    formats = f"the vectors: {', '.join(FORMATS)}; safetensors holds one tensor, embeddings; .jsonl one {{\"embedding\": [...]}} a line"
    one.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help=formats)
    one.add_argument("--overwrite", action="store_true", help="replace OUT and OUT.partial")
    one.add_argument("--prompt", help="put this before each text")
    one.add_argument("--prompt-name", help="put the model's prompt of this name before each text")
    one.add_argument("--normalize", action="store_true", help="divide each vector by its length")
    one.add_argument("--precision", choices=tuple(STORED), default="float32", help="of what is written; int8 and uint8 need --ranges")
    one.add_argument("--ranges", type=Path, metavar="FILE.npy", help="least and largest value of each dimension, [2, dim]")
    input_options(one)
    model_options(one)

    two = commands.add_parser(
        "search",
        help="the texts of a file that are nearest to a query",
        description="Embed the texts of a file and answer queries with the nearest ones; without a query, ask for some.",
    )
    two.add_argument("model", metavar="MODEL", help="folder or hub id")
    two.add_argument("corpus", metavar="CORPUS", help="a file; JSONL may name its texts by title or id")
    two.add_argument("query", metavar="QUERY", nargs="*")
    two.add_argument("-k", type=positive, default=5, help="answers to a query (%(default)s)")
    two.add_argument("--index", type=Path, metavar="FILE.npy", help="where the corpus's vectors are, or will be the next time")
    input_options(two)
    model_options(two)

    three = commands.add_parser(
        "info",
        help="what is detected of a model and from which file; without a model, what is supported",
        description="What is detected of a model and from which file. Without MODEL: the architectures and recipes there are.",
    )
    three.add_argument("model", metavar="MODEL", nargs="?", help="folder or hub id")
    model_options(three)

    four = commands.add_parser(
        "verify",
        help="whether a model gives the vectors it should; without a model, which have published numbers",
        description="Probe a model, hold it against numbers published for it, and against its own implementation where that is installed. "
        "Without MODEL: the models with published numbers. Exit code 1: a check failed; 3: what --against names could not be checked.",
    )
    four.add_argument("model", metavar="MODEL", nargs="?", help="folder or hub id")
    against = "only this: the model's own implementation, or published numbers; by default both, and probes"
    four.add_argument("--against", choices=("transformers", "card"), help=against)
    four.add_argument("--as", dest="as_id", metavar="HUB_ID", help="what a folder is a copy of: its recipe and its published numbers")
    model_options(four)
    four.set_defaults(dtype="float32", tokens_per_batch=None)

    five = commands.add_parser(
        "warmup",
        help="compile what a model needs, and say how long that took",
        description="Load a model and run batches of every kind: on CUDA, with --backend kernels, that compiles them, and the next process "
        "finds them.",
    )
    five.add_argument("model", metavar="MODEL", help="folder or hub id")
    model_options(five)
    five.set_defaults(tokens_per_batch=None)

    six = commands.add_parser(
        "convert",
        help="a folder with pickled weights (.bin) to safetensors",
        description="Write the weights of a .bin repository as safetensors.",
    )
    six.add_argument("directory", metavar="DIR", type=Path)
    six.add_argument("-o", "--output", metavar="OUT", type=Path, help="a new folder to write to; by default beside the .bin")
    return top


def input_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("input")
    group.add_argument(
        "--input-format",
        choices=("text", "jsonl"),
        help="text: one text a line, and an empty line is a text too; jsonl: one object a line, blank lines are left out. "
        "By default what the suffix says (.txt or none, .jsonl, .ndjson); text on a pipe",
    )
    group.add_argument("--field", default="text", help="the field of a JSONL object that holds the text (%(default)s)")
    group.add_argument("--tokens-per-batch", type=positive, help="token budget of a batch; by default the device's")
    group.add_argument("--batch-size", type=positive, help="at most so many texts in a batch; by default the token budget decides")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress bar and no summary")


def model_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("model")
    merged = "folder or hub id of a LoRA adapter to merge into the model; repeat it for several, merged in this order"
    group.add_argument("--adapters", metavar="DIR", action="append", default=[], help=merged)
    group.add_argument("--adapter", metavar="NAME", help="of a model with adapters to switch between: the one to use")
    group.add_argument("--device", type=devices, help="cpu, cuda, cuda:1, or several: cuda:0,cuda:1; by default CUDA where there is one")
    dtypes = ("auto", "float32", "bfloat16", "float16", "int8", "fp8")
    group.add_argument("--dtype", choices=dtypes, default="auto", help="of the model (%(default)s); fp8 pays on new CUDA cards alone")
    backend = "kernels: pyembed's own; reference: plain PyTorch; by default the kernels where they have been seen to run: on CPUs"
    group.add_argument("--backend", choices=("kernels", "reference"), help=backend)
    group.add_argument("--deterministic", action="store_true", help="a text has the same bits in any batch, on a GPU as on a CPU anyway")
    graphs = "on a GPU: launch small batches kernel by kernel instead of replaying CUDA graphs"
    group.add_argument("--no-cuda-graphs", dest="cuda_graphs", action="store_false", help=graphs)
    group.add_argument("--share-prefixes", action="store_true", help="run what texts of a batch begin with in common once (causal models)")
    kept = "memory for the states of prompts (causal models), 0 for none; by default 256 MiB on a CPU and 1 GiB on CUDA"
    group.add_argument("--prefix-cache-bytes", metavar="N", type=int, help=kept)
    group.add_argument("--recipe", help="how a model is used whose files do not say so; `pyembed info` lists them")
    group.add_argument("--template", help="a method without training for any causal LM, such as prompteol; or a text with {text} in it")
    group.add_argument("--instruction", help="the task that the model's prompt names, in models that take one")
    group.add_argument("--pooling", help="how hidden states become a vector: mean, lasttoken, cls, ...")
    group.add_argument("--causal", action=argparse.BooleanOptionalAction, help="whether a token sees only those before it")
    group.add_argument("--truncate-dim", type=positive, help="keep the first so many dimensions")
    group.add_argument("--max-seq-length", type=positive, help="tokens a text is cut to; by default the model's")
    group.add_argument("--revision", help="branch, tag or commit of a hub id")
    group.add_argument("--offline", action="store_true", help="use only what is on this machine")


def recipe_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the command line that say how a model is used, under Encoder's names. (`--output` and `--normalize` are other things.)"""
    return {name: getattr(args, name) for name in ("recipe", "template", "pooling", "causal", "instruction")}


def devices(text: str) -> str | list[str]:
    """One device, or a list of those between commas."""
    return text.split(",") if "," in text else text


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
