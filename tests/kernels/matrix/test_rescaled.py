"""The Triton kernel behind a product of int8, against the reference; and a layer of rows in eight bits, their product and it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_check import assert_misses, assert_right, hostile, normal
from torch import Tensor

from pyembed.kernels.activation import quantised
from pyembed.kernels.rescaled import rescaled
from pyembed.ops import Quantised, reference

SIZES = [(0, 16), (1, 1), (11, 7), (11, 33), (16, 384), (5, 1500), (3, 0)]
BF16 = torch.bfloat16


def given(rows: int, outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A product with sums of every size that there is, scales as far apart, a bias as large as what it meets."""
    product = (normal(rows, outputs).double() * torch.logspace(0, 8, max(1, rows), dtype=torch.float64)[:rows, None]).round()
    scales, output_scales = normal(rows, seed=1).abs() * 1e-2 + 1e-4, normal(outputs, seed=2).abs() * 1e-3 + 1e-5
    return product.to(torch.int32), scales, output_scales, normal(outputs, seed=3).bfloat16()


@pytest.mark.parametrize(("rows", "outputs"), SIZES)
@pytest.mark.parametrize("biased", [True, False])
def test_rescaled(rows: int, outputs: int, biased: bool) -> None:
    """The reference's bits, and near to float64; wrong variants are not."""
    product, scales, output_scales, shift = given(rows, outputs)
    bias = shift if biased else None
    y, same = rescaled(product, scales, output_scales, bias), reference.rescaled(product, scales, output_scales, bias)
    r = reference.rescaled(product, scales.double(), output_scales.double(), bias)
    assert (y.dtype, r.dtype) == (BF16, torch.float64)
    assert torch.equal(y, same)
    assert_right(y, same, r, BF16)
    if rows == 11 and outputs == 33:
        unit = torch.ones_like
        for wrong in (
            rescaled(product, scales.flip(0), output_scales, bias),
            rescaled(product, scales, output_scales.flip(0), bias),
            rescaled(product, unit(scales), output_scales, bias),
            rescaled(product, scales, unit(output_scales), bias),
            rescaled(product, scales, output_scales, None if biased else shift),
            rescaled(product + 2**16, scales, output_scales, bias),
        ):
            assert_misses(wrong, same, r, BF16)


def test_one_rounding() -> None:
    """After the bias; and whole numbers that float32 does not have are rounded to the nearest."""
    product, scales, output_scales, bias = given(64, 384)
    y = rescaled(product, scales, output_scales, bias)
    twice = rescaled(product, scales, output_scales, None) + bias
    assert not torch.equal(y, twice)
    largest = torch.tensor([[2**31 - 1, -(2**31), 2**24 + 1, -(2**24) - 1, 127 * 127]], dtype=torch.int32)
    one = torch.ones(5)
    assert rescaled(largest, torch.ones(1), one, None).tolist() == [[2.0**31, -(2.0**31), 2.0**24, -(2.0**24), 16128.0]]


def test_rows_that_are_not_finite_are_nan_and_alone_in_that() -> None:
    product, scales, output_scales, bias = given(6, 33)
    right = rescaled(product, scales, output_scales, bias)
    product[1] = 0
    scales[1], scales[2], scales[4] = torch.inf, torch.nan, torch.inf
    y = rescaled(product, scales, output_scales, bias)
    assert y[[1, 2, 4]].isnan().all()
    assert torch.equal(y[[0, 3, 5]], right[[0, 3, 5]])
    assert torch.equal(y.nan_to_num(7.0), reference.rescaled(product, scales, output_scales, bias).nan_to_num(7.0))


def test_a_row_has_the_same_bits_anywhere_and_what_lies_around_is_not_read() -> None:
    product, scales, output_scales, bias = given(37, 90)
    right, lone = rescaled(product, scales, output_scales, bias), 23
    assert torch.equal(rescaled(product[lone : lone + 1], scales[lone : lone + 1], output_scales, bias)[0], right[lone])
    changed = torch.full_like(scales, torch.nan)
    changed[lone] = scales[lone]
    assert torch.equal(rescaled(product, changed, output_scales, bias)[lone], right[lone])
    inner = [hostile(each[None])[0] for each in (output_scales, bias)]
    assert torch.equal(rescaled(product, hostile(scales[None])[0], *inner), right)


def test_a_layer_of_both() -> None:
    """Rows and weights in eight bits, their exact product, rescaled: near to the layer in float64, which a wrong one is not."""
    x, w, b = normal(40, 96, dtype=BF16), normal(48, 96, dtype=BF16, seed=1), normal(48, dtype=BF16, seed=2)
    rows, weight = quantised(x, "int8"), quantised(w, "int8")

    def layer(rows: Quantised, weight: Quantised) -> Tensor:
        product = (rows.values.double() @ weight.values.double().T).to(torch.int32)
        return rescaled(product, rows.scale, weight.scale, b)

    r = x.double() @ w.double().T + b.double()
    lost: Callable[[Tensor], float] = lambda y: float((y.double() - r).norm() / r.norm())  # noqa: E731
    assert lost(layer(rows, weight)) <= 0.015
    assert lost(layer(rows, Quantised(weight.values, weight.scale.flip(0)))) >= 0.1


def test_wrong_arguments_are_told_in_a_sentence() -> None:
    product, scales, output_scales, bias = given(4, 8)
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("product must be a torch.int32 tensor", lambda: rescaled(product.long(), scales, output_scales, bias)),
        ("product must be contiguous", lambda: rescaled(product[:, :4], scales, output_scales[:4], bias[:4])),
        ("rows must have shape [4]", lambda: rescaled(product, scales[:3], output_scales, bias)),
        ("outputs must have shape [8]", lambda: rescaled(product, scales, output_scales[:7], bias)),
        ("outputs must be a torch.float32 tensor", lambda: rescaled(product, scales, output_scales.double(), bias)),
        ("bias must be a torch.bfloat16 tensor", lambda: rescaled(product, scales, output_scales, bias.float())),
        ("rows must have unit stride", lambda: rescaled(product, torch.ones(8)[::2], output_scales, bias)),
    ]
    for sentence, call in wrong:
        with pytest.raises(ValueError) as told:
            call()
        assert sentence in str(told.value)
