"""deterministic=True: every product of a model has the same number of rows, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyembed import Encoder, loading
from pyembed.linear import Dense, Linear
from pyembed.model import linears
from pyembed.ops import Quant, reference
from pyembed.ops.reference import quantised
from pyembed.steady import LEAST, MOST, Steady, rows_for, steady
from pyembed.symmetric import symmetric

TEXTS = checkpoints.sentences((3, 40, 1, 17, 90, 25))


def test_rows_fill_a_card_in_the_narrowest_product() -> None:
    assert [rows_for(width) for width in (64, 384, 1024, 4096, 8192, 1 << 16)] == [MOST, MOST, 2048, 512, 256, LEAST]


@given(rows=st.integers(0, 70), step=st.sampled_from([16, 32]), quant=st.sampled_from([None, "fp8", "int8"]))
def test_pieces_are_put_together(rows: int, step: int, quant: Quant | None) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=generator) for shape in ((48, 32), (48,), (rows, 32)))
    inner: Linear | None = Dense(weight, bias, packed=False) if quant is None else symmetric(weight, bias, quant, reference)
    assert inner is not None
    given_: Any = x if quant is None else quantised(x.bfloat16(), quant)
    y = steady(inner, step).apply(given_)
    assert y.shape == (rows, 48)
    assert torch.allclose(y.float(), inner.apply(given_).float(), atol=1e-5)


def test_a_layer_is_wrapped_once() -> None:
    inner = Dense(torch.zeros(3, 4), None, packed=False)
    once = steady(inner, 16)
    assert isinstance(once, Steady)
    assert steady(once, 16) is once
    assert (once.wants, once.fuses) == (inner.wants, inner.fuses)


APPLY = Dense.apply


def by_its_rows(self: Dense, x: Tensor, *, act: str | None = None) -> Tensor:
    """A library whose products of more rows are others."""
    return APPLY(self, x, act=act) * (1 + len(x) / 4096)


def vectors(encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([encoder.encode(text) for text in TEXTS]), encoder.encode(TEXTS)


@pytest.mark.parametrize("name", ["llama", "qwen3", "bert", "gemma3"])
def test_a_text_has_the_same_bits_alone_and_in_a_batch(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Though the library's products have not."""
    monkeypatch.setattr(Dense, "apply", by_its_rows)
    monkeypatch.setattr(loading, "rows_for", lambda width: 32)
    given_: Any = {"device": "cpu", "dtype": "float32", "backend": "reference", "prefix_cache_bytes": 0}
    monkeypatch.setattr(loading, "ROW_BY_ROW", ())
    alone, together = vectors(Encoder(checkpoint(name), **given_))
    assert np.abs(alone - together).max() > 1e-3
    alone, together = vectors(Encoder(checkpoint(name), deterministic=True, **given_))
    assert np.array_equal(alone, together)


def test_every_linear_layer_is_steady_where_the_library_is_not(checkpoint: Callable[[str], Path]) -> None:
    for dtype, wrapped in (("float32", False), ("bfloat16", False), ("int8", False), ("float16", True)):
        encoder = Encoder(checkpoint("llama"), device="cpu", dtype=dtype, deterministic=True)
        assert {isinstance(each, Steady) for each in linears(encoder._loaded.weights)} == {wrapped}, dtype
