"""The Triton kernels that work row by row (norms, activations, embed) against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from op_check import assert_misses, assert_right, hostile, normal
from torch import Tensor

from pyembed.kernels.activation import geglu, gelu, quantised, swiglu
from pyembed.kernels.embed import embed
from pyembed.kernels.layer_norm import layer_norm
from pyembed.kernels.rms_norm import rms_norm
from pyembed.ops import Norm, Quant, Quantised, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 7, 33, 384]
ROWS = [0, 1, 11]
OLD_CARD = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9)  # has no float8
QUANTS: list[Quant] = ["int8"] if OLD_CARD else ["int8", "fp8"]
NORMS: list[dict[str, bool]] = [{}, {"round_first": True}, {"layer": True}]
OURS = SimpleNamespace(embed=embed, geglu=geglu, gelu=gelu, layer_norm=layer_norm, rms_norm=rms_norm, swiglu=swiglu)

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def a_norm(width: int, **kwargs: Any) -> Norm:
    return Norm(normal(width, seed=1) + 1, normal(width, seed=2) if kwargs.get("layer") else None, 1e-5, **kwargs)


def norm_op(kind: dict[str, bool]) -> Callable[..., Any]:
    return layer_norm if kind.get("layer") else rms_norm


@by_dtype
@pytest.mark.parametrize(("rows", "width"), [*((rows, width) for rows in ROWS for width in WIDTHS), (3, 1500), (2, 9000)])
@pytest.mark.parametrize("kind", NORMS, ids=str)
def test_norms(dtype: torch.dtype, kind: dict[str, bool], width: int, rows: int) -> None:
    op, norm = norm_op(kind), a_norm(width, **kind)
    x = normal(rows, width, dtype=dtype, scale=3.0) + 1
    same, r = getattr(reference, op.__name__)(x, norm), reference._normed(x.double(), norm, dtype)
    assert_right(op(hostile(x), norm), same, r, dtype)
    if rows == 11 and width > 7:
        for wrong in (replace(norm, weight=None), replace(norm, layer=not norm.layer), replace(norm, eps=1.0)):
            assert_misses(op(x, wrong), same, r, dtype)
        if norm.bias is not None:
            assert_misses(op(x, replace(norm, bias=None)), same, r, dtype)


@by_dtype
def test_round_first_rounds(dtype: torch.dtype) -> None:
    x, norm = normal(64, 96, dtype=dtype), a_norm(96)
    exact, rounded = rms_norm(x, norm), rms_norm(x, replace(norm, round_first=True))
    assert torch.equal(exact, rounded) == (dtype is torch.float32)
    plain = rms_norm(x, replace(norm, weight=None))
    assert torch.equal(rounded, (plain.float() * norm.weight).to(dtype))


@by_dtype
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", NORMS, ids=str)
def test_residual_is_rounded_then_normalised(dtype: torch.dtype, kind: dict[str, bool], width: int) -> None:
    op, norm = norm_op(kind), a_norm(width, **kind)
    x, stream = normal(9, width, dtype=dtype), normal(9, width, dtype=dtype, seed=5, scale=9.0)
    mine, theirs = hostile(stream), stream.clone()
    y, same = op(hostile(x), norm, residual=mine), getattr(reference, op.__name__)(x, norm, residual=theirs)
    assert torch.equal(mine, theirs)  # the stream itself, bit for bit
    assert mine._base is not None
    assert int(mine._base.isnan().sum()) == mine._base.numel() - mine.numel()  # and nothing around it was written
    assert_right(y, same, reference._normed(theirs.double(), norm, dtype), dtype)
    if width > 7:
        assert_misses(op(x, norm), same, reference._normed(theirs.double(), norm, dtype), dtype)
    if width > 100 and dtype is not torch.float32:
        unrounded = op(x.float() + stream.float(), norm)  # the norm of a sum that was not rounded
        assert not torch.equal(unrounded.to(dtype), y)


def assert_quantised(got: Any, expected: Any) -> None:
    """Bit for bit. Expected is what the reference makes on the CPU: on a card torch multiplies by 1 / 127 where it divides here."""
    assert isinstance(got, Quantised)
    assert isinstance(expected, Quantised)
    assert torch.equal(got.scale.cpu(), expected.scale)
    assert got.values.dtype == expected.values.dtype
    assert torch.equal(got.values.view(torch.int8).cpu(), expected.values.view(torch.int8))


@by_dtype
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("width", [*WIDTHS, 700])
def test_quantised_rows(dtype: torch.dtype, width: int, quant: Any) -> None:
    x, norm = hostile(normal(17, width, dtype=dtype, scale=4.0)), a_norm(width)
    x[3] = 0
    gated = hostile(normal(17, 2 * width, dtype=dtype, scale=4.0))
    calls: list[Callable[[Any], Any]] = [
        lambda q: rms_norm(x, norm, quant=q),
        lambda q: layer_norm(x, replace(norm, layer=True), quant=q),
        lambda q: layer_norm(x, norm, residual=gated[:, :width].clone(), quant=q),
        lambda q: swiglu(gated, quant=q),
        lambda q: geglu(gated, tanh=True, quant=q),
        lambda q: gelu(gated, tanh=False, quant=q),
    ]
    for call in calls:
        assert_quantised(call(quant), reference._maybe_quantise(call(None).cpu(), dtype, quant))


@by_dtype
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("width", [*WIDTHS, 700])
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_rows_as_they_are_in_eight_bits(dtype: torch.dtype, width: int, quant: Any) -> None:
    x = hostile(normal(17, width, dtype=dtype, scale=4.0))
    x[3] = 0
    assert_quantised(quantised(x, quant), reference.quantised(x.cpu(), quant))
    x[5, 0] = torch.nan
    assert quantised(x, quant).scale.isfinite().tolist() == [n != 5 for n in range(17)]
    assert quantised(x[:0], quant).values.shape == (0, width)


@by_dtype
@pytest.mark.skipif(OLD_CARD, reason="this card has no float8")
def test_every_fp8_number(dtype: torch.dtype) -> None:
    """All 256 numbers, their midpoints and what lies next to them; one column of 448 makes the scale 1."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values
    between = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, between, between * (1 + 2**-7), between * (1 - 2**-7)]).to(dtype)
    x = torch.stack([x, torch.full_like(x, 448.0)], dim=1)
    ones = torch.cat([torch.full_like(x, 100.0), x], dim=1)  # silu(100) is 100
    assert_quantised(swiglu(ones, quant="fp8"), reference.swiglu(ones.cpu(), quant="fp8"))


def test_integers_are_rounded_to_even() -> None:
    """Halves between all pairs of integers; one column of 127 makes the scale 1."""
    x = torch.arange(-127, 127.5, 0.5)[:, None]
    x = torch.cat([torch.full_like(x, 127.0), x], 1)
    got = swiglu(torch.cat([torch.full_like(x, 100.0), x], 1), quant="int8")
    assert isinstance(got, Quantised)
    assert torch.equal(got.values[:, 1], x[:, 1].round().to(torch.int8))


@by_dtype
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_in_eight_bits(dtype: torch.dtype, bad: float) -> None:
    x = normal(3, 40, dtype=dtype)
    x[1, 17] = bad
    for quant in QUANTS:
        got = gelu(x, tanh=False, quant=quant)
        assert isinstance(got, Quantised)
        assert got.scale.isfinite().tolist() == [True, False, True]
        expected = reference._maybe_quantise(gelu(x, tanh=False).cpu(), dtype, quant)
        assert isinstance(expected, Quantised)
        assert torch.equal(got.scale[::2].cpu(), expected.scale[::2])


def close(op: Callable[..., Any], x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """op on hostile memory is right by the rule; returns the reference's result in the same dtype and the oracle."""
    same = getattr(reference, op.__name__)(x, **kwargs)
    r = getattr(reference, op.__name__)(x.double(), **kwargs)
    assert_right(op(hostile(x), **kwargs), same, r, x.dtype)
    return same, r


@by_dtype
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [*WIDTHS, 700])
def test_activations(dtype: torch.dtype, width: int, rows: int) -> None:
    x = normal(rows, 2 * width, dtype=dtype, scale=3.0)
    swapped = torch.cat([x[:, width:], x[:, :width]], dim=1)
    same, r = close(swiglu, x)
    misses = rows == 11 and width == 33
    if misses:
        assert_misses(swiglu(swapped), same, r, dtype)
        assert_misses(geglu(x, tanh=False), same, r, dtype)
    for tanh in (False, True):
        same, r = close(geglu, x, tanh=tanh)
        if misses:
            assert_misses(geglu(swapped, tanh=tanh), same, r, dtype)
        same, r = close(gelu, x, tanh=tanh)
        if misses:
            assert_misses(gelu(-x, tanh=tanh), same, r, dtype)


@by_dtype
def test_tanh_is_not_erf(dtype: torch.dtype) -> None:
    x = torch.linspace(-4, 4, 999).to(dtype)[:, None]  # one column: each number is a row with its own limit
    for tanh in (False, True):
        same, r = reference.gelu(x, tanh=tanh), reference.gelu(x.double(), tanh=tanh)
        near = x[:, 0].float() > -1  # below, 1 + erf cancels and the rule's relative error is the reference's too
        assert_right(gelu(x, tanh=tanh)[near], same[near], r[near], dtype)
        if dtype is torch.float32:
            assert_misses(gelu(x, tanh=not tanh)[near], same[near], r[near], dtype)


@by_dtype
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_extremes(dtype: torch.dtype) -> None:
    """Saturated, tiny, infinite and undefined inputs give what the reference gives."""
    largest = torch.finfo(dtype).max / 4
    x = torch.tensor([[-largest, -300.0, -90.0, -1e-30, 0.0, 1e-30, 90.0, 300.0, largest, -torch.inf]]).to(dtype)
    calls: list[Callable[[Any, Tensor], Any]] = [
        lambda o, z: o.gelu(z, tanh=False),
        lambda o, z: o.gelu(z, tanh=True),
        lambda o, z: o.swiglu(torch.cat([z, torch.ones_like(z)], 1)),
    ]
    for call in calls:
        torch.testing.assert_close(call(OURS, x), call(reference, x), rtol=2 * torch.finfo(dtype).eps, atol=1e-5, equal_nan=True)
        assert call(OURS, torch.tensor([[torch.nan]], dtype=dtype)).isnan().all()
        assert call(OURS, torch.tensor([[torch.inf]], dtype=dtype)).isinf().all()


def embedded(ops: Any, dtype: torch.dtype, rows: int, width: int, convert: Callable[[Tensor], Tensor], **changes: Any) -> Tensor:
    ids, positions = torch.arange(rows) * 7 % 50, torch.arange(rows) % 11
    tokens, table, type_row = normal(50, width, dtype=dtype), normal(11, width, dtype=dtype, seed=3), normal(width, dtype=dtype, seed=4)
    kwargs = {"scale": 1.5, "positions": positions, "position_table": convert(table), "type_row": type_row.to(convert(tokens).dtype)}
    return ops.embed(ids, convert(tokens), **kwargs | {"norm": a_norm(width, layer=True)} | changes)


@by_dtype
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
def test_embed(dtype: torch.dtype, width: int, rows: int) -> None:
    def run(ops: Any, convert: Callable[[Tensor], Tensor], **changes: Any) -> Tensor:
        return embedded(ops, dtype, rows, width, convert, **changes)

    for changes in (
        {},
        {"norm": a_norm(width)},
        {"norm": None},
        {"norm": None, "type_row": None},
        {"positions": None, "position_table": None, "type_row": None, "norm": None},
    ):
        same, r = run(reference, lambda x: x, **changes), run(reference, lambda x: x.double(), **changes)
        assert_right(run(OURS, hostile, **changes), same, r, dtype)
    if rows > 1 and width > 7:
        same, r = run(reference, lambda x: x), run(reference, lambda x: x.double())
        for wrong in ({"scale": 1.0}, {"norm": None}, {"type_row": None}, {"positions": (torch.arange(rows) % 11).roll(1)}):
            assert_misses(run(OURS, lambda x: x, **wrong), same, r, dtype)


@by_dtype
def test_embed_rounds_before_the_weight_of_such_a_norm(dtype: torch.dtype) -> None:
    plain = embedded(OURS, dtype, 11, 33, hostile, norm=Norm(None, None, 1e-5))
    norm = a_norm(33, round_first=True)
    assert norm.weight is not None
    assert torch.equal(embedded(OURS, dtype, 11, 33, hostile, norm=norm), (plain.float() * norm.weight).to(dtype))


def test_a_row_that_no_table_has_is_nan() -> None:
    tokens, table = hostile(normal(50, 20)), hostile(normal(11, 20))
    ids, positions = torch.tensor([3, -1, 50, 3, 3, 2**40]), torch.tensor([0, 0, 0, 11, -1, 0])
    for norm in (None, a_norm(20, layer=True)):
        y = embed(ids, tokens, positions=positions, position_table=table, norm=norm)
        assert y.isnan().all(1).tolist() == [False, True, True, True, True, True]
        assert y[0].isfinite().all()


@by_dtype
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_a_row_has_the_same_bits_anywhere(dtype: torch.dtype) -> None:
    x, lone = normal(37, 90, dtype=dtype), 23
    ids, table = torch.arange(37), normal(37, 90, dtype=dtype)
    calls: list[Callable[[Tensor, Tensor], Any]] = [
        lambda z, i: rms_norm(z, a_norm(90)),
        lambda z, i: layer_norm(z, a_norm(90, layer=True)),
        lambda z, i: swiglu(z),
        lambda z, i: geglu(z, tanh=True),
        lambda z, i: gelu(z, tanh=False),
        lambda z, i: embed(i, table, norm=a_norm(90, layer=True)),
        lambda z, i: rms_norm(z, a_norm(90), quant="int8").values,
        lambda z, i: swiglu(z, quant=QUANTS[-1]).values.view(torch.int8),
        lambda z, i: quantised(z, QUANTS[-1]).values.view(torch.int8),
    ]
    changed = torch.full_like(x, torch.nan)
    changed[lone] = x[lone]
    for call in calls:
        alone = call(x[lone : lone + 1], ids[lone : lone + 1])[0]
        assert torch.equal(call(x, ids)[lone], alone)
        assert torch.equal(call(changed, ids)[lone], alone)


def test_wrong_arguments_are_told_in_a_sentence() -> None:
    x, norm, ids = torch.ones(4, 8), a_norm(8), torch.zeros(4, dtype=torch.int64)
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("x must be bfloat16, float16 or float32, got torch.float64", lambda: rms_norm(x.double(), norm)),
        ("x must have unit stride in its last dimension", lambda: rms_norm(torch.ones(8, 4).T, norm)),
        ("norm.weight must have shape [8]", lambda: rms_norm(x, a_norm(9))),
        ("norm.bias must have unit stride", lambda: layer_norm(x, replace(norm, bias=torch.ones(16)[::2]))),
        ("residual must have shape [4, 8]", lambda: rms_norm(x, norm, residual=torch.ones(5, 8))),
        (f"residual must be a torch.float32 tensor on {x.device}", lambda: rms_norm(x, norm, residual=x.bfloat16())),
        ("residual is written, so its rows must not overlap", lambda: rms_norm(x, norm, residual=torch.ones(8).expand(4, 8))),
        ("quant must be None, 'int8' or 'fp8', got 'int4'", lambda: rms_norm(x, norm, quant="int4")),
        ("quant must be None, 'int8' or 'fp8', got 'int4'", lambda: quantised(x, "int4")),  # type: ignore[arg-type]
        ("a row must have at most 32768 columns, got 32769", lambda: quantised(torch.ones(1, 32769), "int8")),
        ("an odd number of columns: 7", lambda: swiglu(torch.ones(4, 7))),
        ("a row must have at most 16384 columns, got 16385", lambda: rms_norm(torch.ones(1, 16385), Norm(None, None, 1e-5))),
        ("position_table was given without positions", lambda: embed(ids, x, position_table=x)),
        ("positions must have shape [4]", lambda: embed(ids, x, positions=ids[:3], position_table=x)),
        ("input_ids must be a torch.int64 tensor", lambda: embed(ids.int(), x)),
    ]
    for sentence, call in wrong:
        with pytest.raises(ValueError) as told:
            call()
        assert sentence in str(told.value)
