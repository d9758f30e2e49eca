"""The C++ pooling against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_check import DTYPES, assert_misses, assert_right, hostile, normal, offsets
from torch import Tensor

from pyembed.ops import POOL_MODES, Norm, PoolMode, cpu, reference

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.parametrize("dtype", DTYPES, ids=str)]

LENGTHS = [1, 40, 7, 0, 300, 33]
LEFT_OUT = [0, 3, 7, 0, 11, 1]  # tokens of a prompt; the third text has nothing else


def spans(lengths: list[int] = LENGTHS, left_out: list[int] = LEFT_OUT) -> Tensor:
    cu = offsets(lengths)
    return torch.stack([cu[:-1] + torch.tensor(left_out, dtype=torch.int32), cu[1:]], dim=1).contiguous()


@pytest.mark.parametrize("mode", POOL_MODES)
@pytest.mark.parametrize("width", [1, 19, 200])
def test_modes(dtype: torch.dtype, mode: PoolMode, width: int) -> None:
    x = normal(sum(LENGTHS) + 5, width, dtype=dtype) + 0.5
    x[sum(LENGTHS) :] = torch.nan
    norms = (None, Norm(normal(width, seed=1) + 1, None, 1e-6), Norm(normal(width, seed=1) + 1, normal(width, seed=2), 1e-5, layer=True))
    for norm in norms:
        for kwargs in ({}, {"normalize": True}, {"normalize": True, "dim": (width + 1) // 2}, {"dim": (width + 1) // 2}):
            options: dict[str, Any] = {"norm": norm} | kwargs
            same, r = (reference.pool(each, offsets(LENGTHS), spans(), mode, **options) for each in (x, x.double()))
            y = cpu.pool(hostile(x), offsets(LENGTHS), spans(), mode, **options)
            assert y.dtype == torch.float32
            assert not y[2].any()  # nothing to read: zeros
            assert_right(y, same, r, torch.float32)
            if width < 19:
                continue
            wrong = [{"normalize": not options.get("normalize", False)}, {"norm": norms[1] if norm is None else None}]
            for each in wrong:
                assert_misses(cpu.pool(x, offsets(LENGTHS), spans(), mode, **options | each), same, r, torch.float32)
            for other in POOL_MODES:
                if other != mode and not {"normalize": True}.items() <= options.items():
                    assert_misses(cpu.pool(x, offsets(LENGTHS), spans(), other, **options), same, r, torch.float32)
            if mode != "lasttoken" and (mode != "max" or width == 200):  # one token more or less need not hold a maximum
                shifted = spans(left_out=[0, 4, 7, 0, 12, 2])
                assert_misses(cpu.pool(x, offsets(LENGTHS), shifted, mode, **options), same, r, torch.float32)


def test_a_norm_is_not_rounded(dtype: torch.dtype) -> None:
    x, norm = normal(9, 64, dtype=dtype), Norm(normal(64, seed=1) + 1, None, 1e-6, round_first=True)
    cu = offsets([9])
    y = cpu.pool(x, cu, spans([9], [0]), "mean", norm=norm)
    assert_right(y, y, reference.pool(x.double(), cu, spans([9], [0]), "mean", norm=norm), torch.float32)


def test_max_keeps_what_is_not_finite(dtype: torch.dtype) -> None:
    x = normal(80, 20, dtype=dtype)
    x[41, 3], x[50, 4], x[60, 5] = torch.nan, torch.inf, -torch.inf
    x[:, 6] = -torch.inf
    r = reference.pool(x, offsets([80]), spans([80], [0]), "max")
    assert torch.equal(cpu.pool(x, offsets([80]), spans([80], [0]), "max").nan_to_num(nan=7e7), r.nan_to_num(nan=7e7))


@pytest.mark.parametrize("mode", POOL_MODES)
def test_a_text_has_the_same_bits_anywhere(dtype: torch.dtype, mode: PoolMode) -> None:
    x, norm = normal(sum(LENGTHS), 50, dtype=dtype), Norm(normal(50, seed=1) + 1, None, 1e-6)
    torch.set_num_threads(1)
    start, length = sum(LENGTHS[:4]), LENGTHS[4]
    alone = cpu.pool(x[start : start + length], offsets([length]), spans([length], [11]), mode, norm=norm, normalize=True)
    changed = torch.full_like(x, torch.nan)
    changed[start : start + length] = x[start : start + length]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for each in (x, changed):
            assert torch.equal(cpu.pool(each, offsets(LENGTHS), spans(), mode, norm=norm, normalize=True)[4], alone[0])
