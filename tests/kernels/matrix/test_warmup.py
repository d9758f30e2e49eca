"""Warming up meets every variant of a kernel that later calls launch. Interpreted, what would be compiled is told by the arguments."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch

from pyembed import Encoder, warmup
from pyembed.kernels import pool
from pyembed.kernels.attention import attention_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HOSTS = ("grid", "warmup")  # arguments of a launch, not of a kernel
Make = Callable[..., Encoder]
Variants = set[Any]


def of_argument(name: str, value: Any, constant: bool, unspecialised: bool) -> Any:
    """What of an argument a kernel is compiled for."""
    if constant or value is None or isinstance(value, bool):
        return value
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "float"
    assert isinstance(value, int), (name, value)
    wide = not -(2**31) <= value < 2**31
    return ("int", wide) if unspecialised else ("int", wide, value == 1, value % 16 == 0)


def watched(monkeypatch: pytest.MonkeyPatch) -> Variants:
    """The variants of kernels that are launched from now on. Interpreted, none is run, and what is not written is zero."""
    seen: Variants = set()
    kind = type(attention_kernel)  # of functions that are compiled, or interpreted
    run = kind.run

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        constant = self.fn.__annotations__
        free = (self.kwargs["do_not_specialize"] if INTERPRETED else self.do_not_specialize) or ()
        given = {**dict(zip(self.arg_names, args, strict=False)), **{name: x for name, x in kwargs.items() if name not in HOSTS}}
        told = [(name, of_argument(name, x, name in constant or name not in self.arg_names, name in free)) for name, x in given.items()]
        seen.add((self.fn.__name__, *sorted(told, key=str)))
        if not INTERPRETED:
            return run(self, *args, **kwargs)
        for x in args:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                x.nan_to_num_()
        return None

    monkeypatch.setattr(kind, "run", launch)
    return seen


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card, in words that the checkpoints have, and with few texts that are as many as pooling asks for."""
    monkeypatch.setattr(warmup, "on_cuda", lambda encoder: True)
    monkeypatch.setattr(warmup, "SHORT", tuple(checkpoints.sentences((3, 4, 5))))
    monkeypatch.setattr(warmup, "TEXT", checkpoints.sentence(23) + " ")
    monkeypatch.setattr(warmup, "PROMPT", checkpoints.sentence(12) + " ")
    monkeypatch.setattr(warmup, "LONG", 80)
    monkeypatch.setattr(pool, "FEW", 6)
    monkeypatch.setattr(pool, "PIECE", 64)


def later(encoder: Encoder) -> None:
    """What may come: short texts, long ones, both, few and many, prompts that are kept and one that is not."""
    for lengths in ((1,), (16,), (32,), (33,), (90,), (1, 2, 17, 40), (70, 33), (3, 9, 2, 30, 5, 7, 12), (50, 40, 3, 60, 8, 9)):
        encoder.encode(checkpoints.sentences(lengths, 7))
    for words in (5, 12, 40):
        for lengths in ((1,), (20, 31), (36,), (1, 3, 40, 17, 5, 6)):
            encoder.encode(checkpoints.sentences(lengths, 8), prompt=checkpoints.sentence(words, words) + " ")


CASES = [("llama", {}), ("llama", {"pooling": "mean", "dtype": "bfloat16"}), ("gemma2", {"dtype": "bfloat16"}), ("bert", {})]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("name", "given"), CASES)
def test_nothing_is_compiled_afterwards(
    made: Make, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str, given: dict[str, Any]
) -> None:
    encoder = made(checkpoint(name), **given)
    variants = watched(monkeypatch)
    took = encoder.warmup()
    assert min(took.first, took.others, took.again) > 0
    warm = set(variants)
    later(encoder)
    assert not variants - warm


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("without", ["a long text", "a prompt", "a short text"])
def test_every_kind_counts(
    made: Make, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    """Without one of them something is left to compile."""
    right = warmup.kinds

    def some(encoder: Encoder) -> list[warmup.Kind]:
        return [
            (texts, arguments)
            for texts, arguments in right(encoder)
            if not (without == "a long text" and any(len(text.split()) > 32 for text in texts))
            and not (without == "a prompt" and "prompt" in arguments)
            and not (without == "a short text" and len(texts[0].split()) <= 32)
        ]

    encoder = made(checkpoint("llama"), pooling="mean", dtype="bfloat16")
    monkeypatch.setattr(warmup, "kinds", some)
    variants = watched(monkeypatch)
    encoder.warmup()
    warm = set(variants)
    later(encoder)
    assert variants - warm


@pytest.mark.usefixtures("few")
def test_graphs_are_recorded(made: Make, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = made(checkpoint("llama"))
    watched(monkeypatch)
    encoder.warmup()
    graphs = encoder._loaded.graphs[0]
    assert len(graphs.made) >= 6 and set(graphs.met) == set(graphs.made)
    texts, before = checkpoints.sentences((3,)), set(graphs.made)
    encoder.encode(texts)
    assert set(graphs.made) == before
