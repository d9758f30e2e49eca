"""The Triton softmax over latents against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_check import assert_misses, assert_right, hostile, normal
from torch import Tensor

from pyembed.kernels.latent_attention import latent_attention
from pyembed.ops import reference

# Rows beyond the last are -inf throughout, and so are heads without a score; numpy tells of their NaN, and of -max - max.
pytestmark = [pytest.mark.filterwarnings(f"ignore:{each} encountered in subtract") for each in ("invalid value", "overflow")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def scores(rows: int, heads: int, latents: int, dtype: torch.dtype) -> Tensor:
    """Far from zero, with another sum in each head."""
    return (normal(rows, heads, latents, scale=3.0) + 20.0 * normal(rows, heads, 1, seed=1)).flatten(1).to(dtype)


def by_head(x: Tensor, heads: int) -> Tensor:
    """Each head is a row with its own limit."""
    return x.unflatten(1, (heads, -1)).flatten(0, 1)


@by_dtype
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("latents", [1, 3, 17, 512])
def test_sizes(dtype: torch.dtype, latents: int, heads: int, rows: int) -> None:
    x = scores(rows, heads, latents, dtype)
    y = latent_attention(hostile(x), heads)
    assert y.is_contiguous()
    assert y.dtype is dtype
    assert y.shape == x.shape
    if rows:
        same, r = (by_head(reference.latent_attention(each, heads), heads) for each in (x, x.double()))
        assert_right(by_head(y, heads), same, r, dtype)


@by_dtype
@pytest.mark.parametrize("latents", [700, 1500, 16384])
def test_many_latents(dtype: torch.dtype, latents: int) -> None:
    """Of every kind of tile, up to the most that there may be."""
    x = scores(1, 2, latents, dtype)
    same, r = (by_head(reference.latent_attention(each, 2), 2) for each in (x, x.double()))
    assert_right(by_head(latent_attention(hostile(x), 2), 2), same, r, dtype)


@by_dtype
def test_what_is_next_door_is_noticed(dtype: torch.dtype) -> None:
    x = scores(5, 8, 17, dtype)
    same, r = (by_head(reference.latent_attention(each, 8), 8) for each in (x, x.double()))
    for wrong in (
        latent_attention(x, 1),  # over all heads at once
        latent_attention(x, 4),
        latent_attention(x, 17),  # over heads
        latent_attention(x * 17**-0.5, 8),  # scaled once more
        latent_attention(x.unflatten(1, (8, 17)).transpose(1, 2).flatten(1), 8),  # latents outside, heads inside
        latent_attention(x.roll(1, 1), 8),
        x.softmax(0),
    ):
        assert_misses(by_head(wrong, 8), same, r, dtype)


@by_dtype
def test_columns_of_a_wider_tensor(dtype: torch.dtype) -> None:
    wide = normal(6, 100, dtype=dtype)
    part = wide[::2, 11 : 11 + 51]
    assert torch.equal(latent_attention(part, 3), latent_attention(part.contiguous(), 3))


@by_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_head(dtype: torch.dtype, bad: float) -> None:
    x = scores(5, 8, 17, dtype)
    right = latent_attention(x, 8)
    x[2, 3 * 17 + 5] = bad
    y = latent_attention(x, 8)
    hit = torch.zeros_like(y, dtype=torch.bool)
    hit[2, 3 * 17 : 4 * 17] = True
    assert torch.equal(y.isnan(), hit)
    assert torch.equal(reference.latent_attention(x, 8).isnan(), hit)
    assert torch.equal(y[~hit], right[~hit])


@by_dtype
def test_minus_infinity_hides_a_latent(dtype: torch.dtype) -> None:
    x = scores(4, 2, 19, dtype)
    x[1, 4:9] = -torch.inf
    x[2, 20:] = -torch.inf  # all but one
    x[3, :19] = -torch.inf  # all
    y, same = latent_attention(hostile(x), 2), reference.latent_attention(x, 2)
    assert not y[1, 4:9].any()
    assert y[2, 19] == 1
    assert y[3].isnan().tolist() == same[3].isnan().tolist() == [True] * 19 + [False] * 19
    there = torch.arange(8) != 6
    r = by_head(reference.latent_attention(x.double(), 2), 2)[there]
    assert_right(by_head(y, 2)[there], by_head(same, 2)[there], r, dtype)


@by_dtype
def test_scores_beyond_all_reason(dtype: torch.dtype) -> None:
    """Nothing overflows: the largest score's exponential is one."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([[largest, -largest, largest, 0.0], [-largest, -largest, -largest, -largest]]).to(dtype)
    assert latent_attention(x, 1).tolist() == [[0.5, 0.0, 0.5, 0.0], [0.25] * 4]


@by_dtype
def test_a_row_has_the_same_bits_anywhere(dtype: torch.dtype) -> None:
    x, lone = scores(37, 3, 50, dtype), 23
    changed = torch.full_like(x, torch.nan)
    changed[lone] = x[lone]
    alone = latent_attention(x[lone : lone + 1], 3)[0]
    assert torch.equal(latent_attention(x, 3)[lone], alone)
    assert torch.equal(latent_attention(changed, 3)[lone], alone)


def test_wrong_arguments_are_told_in_a_sentence() -> None:
    x = torch.ones(4, 24)
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("scores must be bfloat16, float16 or float32, got torch.float64", lambda: latent_attention(x.double(), 8)),
        ("scores must have shape [-1, -1]", lambda: latent_attention(x[0], 8)),
        ("scores must have unit stride in its last dimension", lambda: latent_attention(x.T, 2)),
        ("got 24 columns for 7 heads", lambda: latent_attention(x, 7)),
        ("got 24 columns for 0 heads", lambda: latent_attention(x, 0)),
        ("got 0 columns for 2 heads", lambda: latent_attention(x[:, :0], 2)),
        ("a head must have at most 16384 latents, got 16385", lambda: latent_attention(torch.ones(1, 2 * 16385), 2)),
    ]
    for sentence, call in wrong:
        with pytest.raises(ValueError) as told:
            call()
        assert sentence in str(told.value)
