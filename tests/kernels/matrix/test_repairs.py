"""The repaired interpreter against torch: conversions between all dtypes, and products of bfloat16."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
FP8 = torch.float8_e4m3fn


@triton.jit
def copy(x, y, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < size, other=0.0).to(y.dtype.element_ty), mask=at < size)


@triton.jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x, y = tl.load(a + m[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(x, y, input_precision="ieee"))


@triton.jit
def sum_of(x, y):
    tl.store(x, tl.load(x) + tl.load(y))


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    copy[(1,)](x, y, x.numel(), BLOCK=triton.next_power_of_2(x.numel()))
    return y


def every(dtype: torch.dtype) -> torch.Tensor:
    """All numbers of a dtype; of float32 those of the others, their midpoints and what lies next to them."""
    if dtype is torch.float32:
        x = torch.cat([every(each).float() for each in (torch.bfloat16, torch.float16, FP8)])
        x = x[x.isfinite()].unique()
        between = (x[1:].double() + x[:-1].double()).div(2).float()
        up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
        return torch.cat([x, between, between.nextafter(up), between.nextafter(down), special])
    bits = torch.arange(2 ** (8 * dtype.itemsize))
    return bits.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype)


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Bit for bit, signed zeros included; one NaN is another."""
    x, y = x.float(), y.float()
    return torch.equal(x.nan_to_num(nan=7e7), y.nan_to_num(nan=7e7)) and torch.equal(x.signbit()[~x.isnan()], y.signbit()[~y.isnan()])


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("to", [*FLOATS, FP8], ids=str)
@pytest.mark.parametrize("source", [*FLOATS, FP8], ids=str)
def test_conversions(source: torch.dtype, to: torch.dtype) -> None:
    x = every(source)
    expected = x.float().clamp(-448, 448).to(to) if to is FP8 else x.to(to)
    assert same(converted(x, to), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64], ids=str)
def test_integers_and_bfloat16(dtype: torch.dtype) -> None:
    x = torch.arange(-100, 101).to(dtype)
    assert torch.equal(converted(x, torch.bfloat16), x.bfloat16())
    assert torch.equal(converted(x.bfloat16() + 0.5, dtype), (x.bfloat16() + 0.5).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((16, 64), (64, 32)))
    c = torch.empty(16, 32)
    product[(1,)](a, b, c, 16, 32, 64)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_bfloat16_arithmetic_is_refused() -> None:
    x = torch.ones(1, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="convert to float32 first"):
        sum_of[(1,)](x, x)
