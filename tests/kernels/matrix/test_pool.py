"""The Triton pooling against the reference, in one launch and in two."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from op_check import assert_misses, assert_right, hostile, normal, offsets
from torch import Tensor

import pyembed.kernels.pool as module
from pyembed import heads
from pyembed.kernels.pool import pool
from pyembed.ops import POOL_MODES, Norm, PoolMode, cuda, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [1, 20, 7, 0, 70, 9]
LEFT_OUT = [0, 3, 7, 0, 11, 1]  # tokens of a prompt; the third text has nothing else
Ways = Callable[..., Tensor]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_mode = pytest.mark.parametrize("mode", POOL_MODES)


@pytest.fixture
def both_ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    """`pool` in one launch and in two, of pieces of 32 rows: the same bits."""
    launched: list[str] = []
    for name in ("pool_kernel", "partial_kernel", "combine_kernel"):
        hook = partial(lambda name, *_, **__: launched.append(name), name)
        monkeypatch.setattr(getattr(module, name), "pre_run_hooks", [hook])
    monkeypatch.setattr(module, "PIECE", 32)

    def run(x: Tensor, cu: Tensor, read: Tensor, mode: PoolMode, **options: Any) -> Tensor:
        results = []
        for few in (0, 256):
            launched.clear()
            monkeypatch.setattr(module, "FEW", few)
            results.append(pool(x, cu, read, mode, **options))
            split = few > 0 and mode not in ("cls", "lasttoken") and len(x) > 32
            assert launched == (["partial_kernel", "combine_kernel"] if split else ["pool_kernel"])
        assert torch.equal(*(each.nan_to_num(nan=7e7) for each in results))
        return results[0]

    return run


def spans(lengths: list[int] = LENGTHS, left_out: list[int] = LEFT_OUT) -> Tensor:
    cu = offsets(lengths)
    return torch.stack([cu[:-1] + torch.tensor(left_out, dtype=torch.int32), cu[1:]], dim=1).contiguous()


def norms(width: int) -> list[Norm | None]:
    weight, bias = normal(width, seed=1) + 1, normal(width, seed=2)
    return [None, Norm(weight, None, 1e-6), Norm(weight, bias, 1e-5, layer=True)]


@by_dtype
@by_mode
@pytest.mark.parametrize("width", [1, 19, 300])
def test_modes(both_ways: Ways, dtype: torch.dtype, mode: PoolMode, width: int) -> None:
    x = normal(sum(LENGTHS) + 5, width, dtype=dtype) + 0.5
    if width == 1:  # of which a norm leaves the sign, and sums of signs may be next to nothing, with any error relative to it
        x = x.abs()
    x[sum(LENGTHS) :] = torch.nan
    half = (width + 1) // 2
    for norm in norms(width)[:: 2 if width > 19 else 1]:
        for kwargs in ({}, {"normalize": True, "dim": half}) if width > 19 else ({"normalize": True}, {"dim": half}):
            options: dict[str, Any] = {"norm": norm} | kwargs
            same, r = (reference.pool(each, offsets(LENGTHS), spans(), mode, **options) for each in (x, x.double()))
            y = both_ways(hostile(x), offsets(LENGTHS), spans(), mode, **options)
            assert y.dtype == torch.float32
            assert not y[2:4].any()  # nothing to read: zeros
            assert_right(y, same, r, torch.float32)


@by_mode
def test_what_is_next_door_is_noticed(mode: PoolMode) -> None:
    x, cu = normal(sum(LENGTHS), 200) + 0.5, offsets(LENGTHS)
    for norm in norms(200)[::2]:
        for normalize in (False, True):
            options: dict[str, Any] = {"norm": norm, "normalize": normalize}
            same, r = (reference.pool(each, cu, spans(), mode, **options) for each in (x, x.double()))
            others = [other for other in POOL_MODES if other != mode and not normalize]
            wrong = [pool(x, cu, spans(), other, **options) for other in others]
            wrong += [pool(x, cu, spans(), mode, **options | {"normalize": not normalize})]
            wrong += [pool(x, cu, spans(), mode, **options | {"norm": norms(200)[1 if norm is None else 0]})]
            wrong += [pool(x, cu, spans(left_out=[0, 4, 7, 0, 12, 2]), mode, **options)] * (mode != "lasttoken")
            for each in wrong:
                assert_misses(each, same, r, torch.float32)


@by_dtype
def test_a_norm_is_not_rounded(dtype: torch.dtype) -> None:
    x, norm = normal(9, 64, dtype=dtype), Norm(normal(64, seed=1) + 1, None, 1e-6, round_first=True)
    cu = offsets([9])
    y = pool(x, cu, spans([9], [0]), "mean", norm=norm)
    r = reference.pool(x.double(), cu, spans([9], [0]), "mean", norm=norm)
    assert_right(y, r.float(), r, torch.float32)


@by_dtype
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
def test_max_keeps_what_is_not_finite(both_ways: Ways, dtype: torch.dtype) -> None:
    x = normal(80, 20, dtype=dtype)
    x[41, 3], x[50, 4], x[60, 5] = torch.nan, torch.inf, -torch.inf
    x[:, 6] = -torch.inf
    x[:, 7] = torch.nan
    r = reference.pool(x, offsets([80]), spans([80], [0]), "max")
    assert torch.equal(both_ways(x, offsets([80]), spans([80], [0]), "max").nan_to_num(nan=7e7), r.nan_to_num(nan=7e7))


@by_mode
def test_a_vector_that_is_not_finite_stays_so(both_ways: Ways, mode: PoolMode) -> None:
    x = normal(80, 20)
    x[:, 3] = torch.nan
    assert both_ways(x, offsets([80]), spans([80], [0]), mode, normalize=True).isnan().all()


@by_mode
def test_a_text_has_the_same_bits_anywhere(both_ways: Ways, mode: PoolMode) -> None:
    x, norm = normal(sum(LENGTHS), 50, dtype=torch.bfloat16), Norm(normal(50, seed=1) + 1, None, 1e-6)
    start, length = sum(LENGTHS[:4]), LENGTHS[4]
    alone = both_ways(x[start : start + length], offsets([length]), spans([length], [11]), mode, norm=norm, normalize=True)
    changed = torch.full_like(x, torch.nan)
    changed[start : start + length] = x[start : start + length]
    for each in (x, changed):
        assert torch.equal(both_ways(each, offsets(LENGTHS), spans(), mode, norm=norm, normalize=True)[4], alone[0])


def test_pieces_of_the_size_that_is_shipped() -> None:
    lengths = [1, module.PIECE, 0, 2 * module.PIECE + 1, 3, module.PIECE - 1]
    x, cu, read = normal(sum(lengths), 24), offsets(lengths), spans(lengths, [0, 0, 0, 5, 1, 0])
    same, r = (reference.pool(each, cu, read, "weightedmean") for each in (x, x.double()))
    assert_right(pool(hostile(x), cu, read, "weightedmean"), same, r, torch.float32)


@by_dtype
def test_no_texts_and_no_tokens(dtype: torch.dtype) -> None:
    none = torch.empty(0, 2, dtype=torch.int32)
    assert pool(normal(5, 8, dtype=dtype), offsets([]), none, "mean").shape == (0, 8)
    empty = torch.zeros(2, 2, dtype=torch.int32)
    assert torch.equal(pool(normal(0, 8, dtype=dtype), offsets([0, 0]), empty, "max", normalize=True), torch.zeros(2, 8))


def test_a_span_outside_of_its_text_gives_nan(both_ways: Ways) -> None:
    x, cu = normal(70, 20), offsets([40, 30])
    for outside in ([-1, 5], [3, 41], [60, 65], [0, 2**30]):
        read = torch.tensor([outside, [40, 70]], dtype=torch.int32)
        y = both_ways(x, cu, read, "mean", normalize=True)
        assert y.isnan().all(1).tolist() == [True, False]
    y = both_ways(x, offsets([40, 31]), torch.tensor([[0, 40], [40, 71]], dtype=torch.int32), "max")
    assert y.isnan().all(1).tolist() == [False, True]


def test_wrong_arguments_are_told_in_a_sentence() -> None:
    x, cu, read = torch.ones(4, 8), offsets([4]), spans([4], [0])
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("x must be bfloat16, float16 or float32, got torch.float64", lambda: pool(x.double(), cu, read, "mean")),
        ("mode must be one of cls, max", lambda: pool(x, cu, read, "median")),
        ("dim must be between 1 and the 8 columns of x, got 9", lambda: pool(x, cu, read, "mean", dim=9)),
        ("dim must be between 1 and the 8 columns of x, got 0", lambda: pool(x, cu, read, "mean", dim=0)),
        ("spans must be a torch.int32 tensor", lambda: pool(x, cu, read.long(), "mean")),
        ("cu_seqlens must have shape [2]", lambda: pool(x, offsets([4, 0]), read, "mean")),
        ("norm.weight must have shape [8]", lambda: pool(x, cu, read, "mean", norm=Norm(torch.ones(7), None, 1e-6))),
    ]
    for sentence, call in wrong:
        with pytest.raises(ValueError) as told:
            call()
        assert sentence in str(told.value)


@by_mode
def test_more_columns_than_a_tile_takes(monkeypatch: pytest.MonkeyPatch, mode: PoolMode) -> None:
    """In parts where they do not need each other, as the gated width of NV-Embed's head; else refused."""
    x, cu, read = hostile(normal(sum(LENGTHS), 50)), offsets(LENGTHS), spans()
    whole, cut = pool(x, cu, read, mode), pool(x, cu, read, mode, dim=35)
    monkeypatch.setattr(module, "WIDEST", 16)
    assert torch.equal(pool(x, cu, read, mode), whole)
    assert torch.equal(pool(x, cu, read, mode, dim=35), cut)
    with pytest.raises(ValueError, match="a row must have at most 8192 columns, got 8193"):
        pool(normal(2, 8193), offsets([2]), spans([2], [0]), mode, normalize=True)


def test_rows_of_length_one() -> None:
    """Of vectors that heads have made: the same bits alone, and what torch makes of them."""
    x = torch.randn(37, 200, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    y = heads.unit_rows(x, cuda)
    assert torch.allclose(y, torch.nn.functional.normalize(x, dim=-1), atol=1e-6)
    assert torch.equal(torch.cat([heads.unit_rows(row[None], cuda) for row in x]), y)
