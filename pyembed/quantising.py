"""dtype="int8" or "fp8" at load: which linear layers run in eight bits. Each is measured once, on what reaches it when a probe text is read
in bfloat16.

A layer's error is the mean over the probe's tokens of |y8 - y| / max(|y - m|, the median of that over the tokens), where y8 is its
output in eight bits, y in bfloat16, and m the median of y over the tokens, output by output: what eight bits change as a share of what
tells one token from another. m counts because a few huge activations that are the same for all tokens ("massive activations") fill the
range of the eight bits and yet say nothing; beside their part of y, which is as huge, what is lost would look small.

Above LIMIT a layer stays bfloat16. docs/int8.md has the measurements behind that number. A CPU's int8 is int8.py; fp8 and a GPU's int8 are
symmetric.py, and a layer that `symmetric` does not take stays bfloat16 too. So does in fp8 attention's output projection, whose rows hold
all heads under one scale; it is never tried and not counted. In int8 it is a layer like any other (docs/int8.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from pyembed.batch import pack
from pyembed.blocks import Layer, PerLayer
from pyembed.int8 import Int8, int8
from pyembed.linear import Input, Linear, Read, linear
from pyembed.model import Weights, forward
from pyembed.ops import Ops, Quantised
from pyembed.steady import steady_in_amx
from pyembed.symmetric import symmetric
from pyembed.tensorfile import shorten
from pyembed.tokenizer import Tokenizer

LIMIT = 0.05
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)  # the dtypes that are decided here
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1969, two astronauts walked on the Moon for the first time; about 600 million people watched.",
    "def add(a, b): return a + b",
    "Please read the instructions carefully before you open the box, and call us if anything is missing.",
)
DISTINCT = 24  # ids that the texts must have; a tokenizer that does not know their words is given as many of its own
MOST_TOKENS = 128


def is_symmetric(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the eight bits of a dtype, one of EIGHT_BITS, are symmetric on a device."""
    return dtype == torch.float8_e4m3fn or device.type == "cuda"


def probe(tokenizer: Tokenizer, vocab_size: int) -> list[np.ndarray]:
    """The ids of the probe's texts, [length] int32 each."""
    ids = tokenizer.encode(TEXTS, MOST_TOKENS // len(TEXTS)).ids
    if len(np.unique(np.concatenate(ids))) < DISTINCT:
        drawn = np.random.default_rng(0).integers(0, min(tokenizer.vocab_size, vocab_size), (len(TEXTS), 16))
        ids = [np.array([*tokenizer.prefix, *own, *tokenizer.suffix], dtype=np.int32) for own in drawn]
    return ids


@dataclass(slots=True)
class Trial:
    """A linear layer before it is known how it will run. `apply` reads its weight, decides, and gives the output in bfloat16."""

    chains: ClassVar[bool] = False
    wants: ClassVar[None] = None
    ops: Ops
    dtype: torch.dtype  # one of EIGHT_BITS
    tokens: int  # of the probe: the first rows, which count
    read: Read
    gated: bool
    made: Linear | None = None
    error: float = 0.0

    @property
    def fuses(self) -> frozenset[str]:
        return frozenset()

    def apply(self, x: Input, *, act: str | None = None) -> Tensor:
        """x [rows, in_features] bfloat16 to [rows, out_features]."""
        assert act is None and not isinstance(x, Quantised)
        weight, bias = self.read()
        eight: Linear | None
        if is_symmetric(self.dtype, weight.device):
            eight = symmetric(weight, bias, "int8" if self.dtype == torch.int8 else "fp8", self.ops)
        else:
            eight = int8(weight, bias)
        right = steady_in_amx(linear(weight, bias)).apply(x)  # spare rows may hold NaN, and what is decided must not depend on threads
        self.error = math.inf if eight is None else error(eight.apply(x)[: self.tokens].float(), right[: self.tokens].float())
        if eight is None or not self.error <= LIMIT:
            self.made = self.ops.linear(weight, bias, gated=self.gated)
        else:
            self.made = self.ops.int8(eight, gated=self.gated) if isinstance(eight, Int8) else eight
        return right

    def in_bfloat16(self) -> Linear:
        """The layer without a trial."""
        return self.ops.linear(*self.read(), gated=self.gated)


def error(ours: Tensor, right: Tensor) -> float:
    """How far rows are from the right ones, as a share of how far these are from each other; NaN or infinite where that is not known."""
    apart = (right - right.median(dim=0).values).norm(dim=1)
    return float(((ours - right).norm(dim=1) / apart.clamp_min(float(apart.median()))).mean())


def settle(weights: Weights, ids: Sequence[np.ndarray], ops: Ops, dtype: torch.dtype) -> tuple[Weights, dict[str, float]]:
    """Weights whose linear layers are Trials, with what each of them comes to be, and the error of each by its name.

    `ids` are those of `probe`. They are read once, layer by layer, so that the process never holds more than one layer in bfloat16
    beside those in eight bits.
    """
    if dtype == torch.float8_e4m3fn:
        outs = (cast("Trial", layer.out).in_bfloat16() for layer in weights.layers)
        weights = replace(weights, layers=tuple(replace(layer, out=out) for layer, out in zip(weights.layers, outs, strict=True)))
    forward(weights, pack(ids, None, ops, weights.tokens.device), ops)
    errors: dict[str, float] = {}
    layers = tuple(cast("Layer", settled(layer, f"layers.{n}", errors)) for n, layer in enumerate(weights.layers))
    return replace(weights, layers=layers), errors


def settled(part: Layer | PerLayer, name: str, errors: dict[str, float]) -> Layer | PerLayer:
    """A layer, or a sub-block of it, with what its Trials made; their errors go into `errors`."""

    def made(value: Any, name: str) -> Any:
        if isinstance(value, Trial):
            assert value.made is not None, name
            errors[name] = value.error
            return value.made
        if isinstance(value, tuple) and any(isinstance(each, Trial) for each in value):
            names = [name] if len(value) == 1 else [f"{name}.{n}" for n in range(len(value))]
            return tuple(made(each, its) for each, its in zip(value, names, strict=True))
        return settled(value, name, errors) if isinstance(value, PerLayer) else value

    return replace(part, **{each.name: made(getattr(part, each.name), f"{name}.{each.name}") for each in fields(part)})


def stayed(errors: Mapping[str, float]) -> list[str]:
    """The names of the layers that are bfloat16."""
    return [name for name, error in errors.items() if not error <= LIMIT]


def summary(errors: Mapping[str, float], dtype: torch.dtype) -> str:
    """How many linear layers run in eight bits, and which do not."""
    others = stayed(errors)
    tried = "linear layers beside attention's output projections" if dtype == torch.float8_e4m3fn else "linear layers"
    beside = f"; in bfloat16: {shorten(others)}" if others else ""
    return f"{len(errors) - len(others)} of {len(errors)} {tried}{beside}"
