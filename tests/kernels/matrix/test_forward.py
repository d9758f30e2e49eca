"""Whole models through `ops/cuda.py`: the reference's vectors."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import checkpoints
import numpy as np
import pytest
import torch
from test_latent import directory, mistral  # noqa: F401 - fixtures

from pyembed import Encoder, loading, ops, quantising
from pyembed.kernels import pool
from pyembed.ops import Quantised, cuda
from pyembed.ops.budget import Budget
from pyembed.options import FP8_CARDS
from pyembed.symmetric import Symmetric

LENGTHS = (1, 2, 17, 40, 33)
Encode = Callable[..., np.ndarray]


def encode(
    place: str, model: Path, texts: list[str], dtype: str, backend: Any = "kernels", prompt: str | None = None, **given: Any
) -> np.ndarray:
    encoder = Encoder(model, device=place, dtype=dtype, backend=backend, **given)
    assert ("backend=cuda" in repr(encoder)) == (backend == "kernels")
    y = encoder.encode(texts, prompt=prompt)
    assert prompt is None or encoder.stats.prefix_tokens > 0
    return y


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Encode:
    """Vectors of texts on the card; interpreted, its backend serves the CPU."""
    torch.set_default_device(None)
    if os.environ.get("TRITON_INTERPRET") != "1":
        return partial(encode, "cuda")
    monkeypatch.setattr(ops, "select", lambda device, backend=None: cuda if backend == "kernels" else ops.reference)
    monkeypatch.setattr(cuda, "budget", lambda config, dtype, device: Budget(128, 1))
    return partial(encode, "cpu")


def off(y: np.ndarray, r: np.ndarray) -> float:
    return float((np.linalg.norm(y - r, axis=1) / np.linalg.norm(r, axis=1)).max())


@pytest.mark.parametrize("name", ["llama", "gemma2", "embeddinggemma", "bert", "xlm-roberta", "bloom", "gptj"])
def test_vectors(encoded: Encode, checkpoint: Callable[[str], Path], name: str) -> None:
    texts = checkpoints.sentences(LENGTHS)
    right = encoded(checkpoint(name), texts, "float32", "reference")
    assert off(encoded(checkpoint(name), texts, "float32"), right) <= 1e-5
    lost = off(encoded(checkpoint(name), texts, "bfloat16", "reference"), right)
    assert off(encoded(checkpoint(name), texts, "bfloat16"), right) <= 2 * lost + 2 * torch.finfo(torch.bfloat16).eps


OLD = torch.cuda.is_available() and torch.cuda.get_device_capability() < FP8_CARDS
QUANTS = ["int8", pytest.param("fp8", marks=pytest.mark.skipif(OLD, reason="this card multiplies no fp8"))]


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(("name", "own"), [("llama", 0), ("gptj", 0), ("bert", 7)])
def test_eight_bits(
    encoded: Encode, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str, own: int, quant: str
) -> None:
    """The kernels give rows in eight bits, all but `own` of ten layers', and vectors are nearer to the reference's than float32's.

    In int8 attention's three output projections are layers too, which make their rows themselves.
    """
    monkeypatch.setattr(quantising, "LIMIT", math.inf)
    monkeypatch.setattr(quantising, "is_symmetric", lambda *_: True)  # interpreted on a CPU
    monkeypatch.setattr(loading, "check_eight_bits", lambda *_: None)
    texts, count = checkpoints.sentences(LENGTHS), 13 if quant == "int8" else 10
    right = encoded(checkpoint(name), texts, "float32", "reference")
    expected = encoded(checkpoint(name), texts, quant, "reference")
    calls, run = [], Symmetric.apply
    monkeypatch.setattr(Symmetric, "apply", lambda self, x, act=None: (calls.append(isinstance(x, Quantised)), run(self, x))[1])
    y = encoded(checkpoint(name), texts, quant)
    assert calls[:count] == [False] * count  # trials
    assert calls[count : 2 * count].count(False) == own + count - 10
    assert off(y, expected) <= 0.5 * off(expected, right)


def test_nv_embeds_head(encoded: Encode, request: pytest.FixtureRequest) -> None:
    """Latent attention, its means in parts of columns, and a prompt that is not read."""
    texts = checkpoints.sentences((3, 40, 17))
    model = request.getfixturevalue("directory")
    given: dict[str, Any] = {"recipe": "nv-embed", "instruction": "Find: "}
    right = encoded(model, texts, "float32", "reference", **given)
    with mock.patch.object(pool, "WIDEST", 32):
        assert off(encoded(model, texts, "float32", **given), right) <= 1e-5


def test_a_prompt_that_was_kept(encoded: Encode, checkpoint: Callable[[str], Path]) -> None:
    """Its keys and values are a prefix, of texts in tiles of their own and in shared ones, and of a last layer's few queries."""
    texts, prompt = checkpoints.sentences((1, 3, 40, 17)), checkpoints.sentence(25, 5) + " "
    right = encoded(checkpoint("llama"), texts, "float32", "reference", prompt=prompt)
    y = encoded(checkpoint("llama"), texts, "float32", prompt=prompt)
    assert off(y, right) <= 1e-5
    assert off(encoded(checkpoint("llama"), texts, "float32", prompt=prompt[:-4]), right) > 1e-3
