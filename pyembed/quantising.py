"""dtype="int8" at load: which linear layers run in int8. Each is measured once, on what reaches it when a probe text is read in bfloat16.

A layer's error is the mean over the probe's tokens of |y8 - y| / max(|y - m|, the median of that over the tokens), where y8 is its
output in int8, y in bfloat16, and m the median of y over the tokens, output by output: what int8 changes as a share of what tells one
token from another. m counts because a few huge activations that are the same for all tokens ("massive activations") fill the range of
the eight bits and yet say nothing; beside their part of y, which is as huge, what is lost would look small.

Above LIMIT a layer stays bfloat16. docs/int8.md has the measurements behind that number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from pyembed.batch import pack
from pyembed.blocks import Layer, PerLayer
from pyembed.int8 import int8
from pyembed.linear import Linear, Read
from pyembed.model import Weights, forward
from pyembed.ops import Ops
from pyembed.tensorfile import shorten
from pyembed.tokenizer import Tokenizer

LIMIT = 0.05
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1969, two astronauts walked on the Moon for the first time; about 600 million people watched.",
    "def add(a, b): return a + b",
    "Please read the instructions carefully before you open the box, and call us if anything is missing.",
)
DISTINCT = 24  # ids that the texts must have; a tokenizer that does not know their words is given as many of its own
MOST_TOKENS = 128


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
    ops: Ops
    tokens: int  # of the probe: the first rows, which count
    read: Read
    gated: bool
    made: Linear | None = None
    error: float = 0.0

    @property
    def fuses(self) -> frozenset[str]:
        return frozenset()

    def apply(self, x: Tensor, *, act: str | None = None) -> Tensor:
        """x [rows, in_features] bfloat16 to [rows, out_features]."""
        assert act is None, act
        weight, bias = self.read()
        quantised = int8(weight, bias)
        right = F.linear(x, weight, bias)
        self.error = error(quantised.apply(x)[: self.tokens].float(), right[: self.tokens].float())
        good = self.error <= LIMIT
        self.made = self.ops.int8(quantised, gated=self.gated) if good else self.ops.linear(weight, bias, gated=self.gated)
        return right


def error(ours: Tensor, right: Tensor) -> float:
    """How far rows are from the right ones, as a share of how far these are from each other; NaN or infinite where that is not known."""
    apart = (right - right.median(dim=0).values).norm(dim=1)
    return float(((ours - right).norm(dim=1) / apart.clamp_min(float(apart.median()))).mean())


def settle(weights: Weights, ids: Sequence[np.ndarray], ops: Ops) -> tuple[Weights, dict[str, float]]:
    """Weights whose linear layers are Trials, with what each of them comes to be, and the error of each by its name.

    `ids` are those of `probe`. They are read once, layer by layer, so that the process never holds more than one layer in bfloat16
    beside the int8 ones.
    """
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


def summary(errors: Mapping[str, float]) -> str:
    """How many linear layers run in int8, and which do not."""
    others = stayed(errors)
    beside = f"; in bfloat16: {shorten(others)}" if others else ""
    return f"{len(errors) - len(others)} of {len(errors)} linear layers{beside}"
