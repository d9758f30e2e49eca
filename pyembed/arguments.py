"""Options that several commands share."""

from __future__ import annotations

import argparse
from typing import Any


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
    group.add_argument("--dtype", choices=dtypes, default="auto", help="of the model (%(default)s); fp8 on new CUDA cards alone")
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
