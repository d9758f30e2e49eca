"""The C++ kernels that work row by row (embed, norms, activations, rotary embedding) against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from op_check import DTYPES, assert_misses, assert_right, hostile, normal
from torch import Tensor

from pyembed.ops import Norm, Quantised, cpu, reference

WIDTHS = [1, 7, 16, 33, 384]
ROWS = [0, 1, 5]

pytestmark = [pytest.mark.usefixtures("isa"), pytest.mark.parametrize("dtype", DTYPES, ids=str)]


def a_norm(width: int, **kwargs: Any) -> Norm:
    layer = kwargs.get("layer", False)
    return Norm(normal(width, seed=1) + 1, normal(width, seed=2) if layer else None, 1e-5, **kwargs)


NORMS = [{}, {"round_first": True}, {"layer": True}]


def close(op: Callable[..., Any], x: Tensor, *rest: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """op on hostile memory is right by the rule; returns the reference's result in the same dtype and the oracle."""
    same = getattr(reference, op.__name__)(x, *rest, **kwargs)
    r = getattr(reference, op.__name__)(x.double(), *rest, **kwargs)
    assert_right(op(hostile(x), *rest, **kwargs), same, r, x.dtype)
    return same, r


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", NORMS, ids=str)
def test_norms(dtype: torch.dtype, kind: dict[str, bool], width: int, rows: int) -> None:
    op = cpu.layer_norm if kind.get("layer") else cpu.rms_norm
    x, norm = normal(rows, width, dtype=dtype, scale=3.0) + 1, a_norm(width, **kind)
    same, r = _normed(op, x, norm)
    if rows and width > 7:
        for wrong in (replace(norm, weight=None), replace(norm, layer=not norm.layer), replace(norm, eps=1.0)):
            assert_misses(op(x, wrong), same, r, dtype)
        if norm.bias is not None:
            assert_misses(op(x, replace(norm, bias=None)), same, r, dtype)


def _normed(op: Callable[..., Any], x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """A norm against its oracle, which rounds where the op does: `round_first` rounds to the dtype that the op works in."""
    same = getattr(reference, op.__name__)(x, norm)
    r = reference._normed(x.double(), norm, x.dtype)
    assert_right(op(hostile(x), norm), same, r, x.dtype)
    return same, r


def test_round_first_rounds(dtype: torch.dtype) -> None:
    x, norm = normal(64, 96, dtype=dtype), a_norm(96)
    exact, rounded = cpu.rms_norm(x, norm), cpu.rms_norm(x, replace(norm, round_first=True))
    assert torch.equal(exact, rounded) == (dtype is torch.float32)
    plain = cpu.rms_norm(x, replace(norm, weight=None))
    assert torch.equal(rounded, (plain.float() * norm.weight).to(dtype))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", NORMS, ids=str)
def test_residual_is_rounded_then_normalised(dtype: torch.dtype, kind: dict[str, bool], width: int) -> None:
    op = cpu.layer_norm if kind.get("layer") else cpu.rms_norm
    x, stream, norm = normal(9, width, dtype=dtype), normal(9, width, dtype=dtype, seed=5, scale=9.0), a_norm(width, **kind)
    mine, theirs = hostile(stream), stream.clone()
    y, same = op(hostile(x), norm, residual=mine), getattr(reference, op.__name__)(x, norm, residual=theirs)
    assert torch.equal(mine, theirs)  # the stream itself, bit for bit
    assert mine._base is not None
    assert int(mine._base.isnan().sum()) == mine._base.numel() - mine.numel()  # and nothing around it was written
    assert_right(y, same, reference._normed(theirs.double(), norm, dtype), dtype)
    if width > 7:
        assert_misses(op(x, norm), same, reference._normed(theirs.double(), norm, dtype), dtype)
    if width > 100 and dtype is torch.bfloat16:
        unrounded = op(x.float() + stream.float(), norm)  # the norm of a sum that was not rounded
        assert not torch.equal(unrounded.to(dtype), y)


@pytest.mark.parametrize("quant", ["int8", "fp8"])
@pytest.mark.parametrize("width", WIDTHS)
def test_quantised_rows(dtype: torch.dtype, width: int, quant: Any) -> None:
    x, norm = hostile(normal(17, width, dtype=dtype, scale=4.0)), a_norm(width)
    x[3] = 0
    gated = hostile(normal(17, 2 * width, dtype=dtype, scale=4.0))
    calls = [
        lambda q: cpu.rms_norm(x, norm, quant=q),
        lambda q: cpu.layer_norm(x, replace(norm, layer=True), quant=q),
        lambda q: cpu.swiglu(gated, quant=q),
        lambda q: cpu.geglu(gated, tanh=True, quant=q),
        lambda q: cpu.gelu(gated, tanh=False, quant=q),
    ]
    for call in calls:
        plain, got = call(None), call(quant)
        expected = reference._maybe_quantise(plain, dtype, quant)
        assert isinstance(got, Quantised)
        assert isinstance(expected, Quantised)
        assert torch.equal(got.scale, expected.scale)
        assert got.values.dtype == expected.values.dtype
        assert torch.equal(got.values.view(torch.int8), expected.values.view(torch.int8))


def test_every_fp8_number(dtype: torch.dtype) -> None:
    """All 256 numbers, their midpoints and what lies next to them; one column of 448 makes the scale 1."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values
    between = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, between, between * (1 + 2**-7), between * (1 - 2**-7)]).to(dtype)
    x = torch.stack([x, torch.full_like(x, 448.0)], dim=1)
    ones = torch.cat([torch.full_like(x, 100.0), x], dim=1)  # silu(100) is 100
    got, expected = cpu.swiglu(ones, quant="fp8"), reference.swiglu(ones, quant="fp8")
    assert isinstance(got, Quantised)
    assert isinstance(expected, Quantised)
    assert torch.equal(got.values.view(torch.int8), expected.values.view(torch.int8))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_in_eight_bits(dtype: torch.dtype, bad: float) -> None:
    x = normal(3, 40, dtype=dtype)
    x[1, 17] = bad
    got = cpu.gelu(x, tanh=False, quant="int8")
    assert isinstance(got, Quantised)
    assert got.scale.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
def test_activations(dtype: torch.dtype, width: int, rows: int) -> None:
    x = normal(rows, 2 * width, dtype=dtype, scale=3.0)
    swapped = torch.cat([x[:, width:], x[:, :width]], dim=1)
    same, r = close(cpu.swiglu, x)
    if rows and width > 7:
        assert_misses(cpu.swiglu(swapped), same, r, dtype)
        assert_misses(cpu.geglu(x, tanh=False), same, r, dtype)
    for tanh in (False, True):
        same, r = close(cpu.geglu, x, tanh=tanh)
        if rows and width > 7:
            assert_misses(cpu.geglu(swapped, tanh=tanh), same, r, dtype)
        same, r = close(cpu.gelu, x, tanh=tanh)
        if rows and width > 7:
            assert_misses(cpu.gelu(-x, tanh=tanh), same, r, dtype)


def test_tanh_is_not_erf(dtype: torch.dtype) -> None:
    x = torch.linspace(-4, 4, 999).to(dtype)[:, None]  # one column: each number is a row with its own limit
    for tanh in (False, True):
        same, r = reference.gelu(x, tanh=tanh), reference.gelu(x.double(), tanh=tanh)
        near = x[:, 0].float() > -1  # below, 1 + erf cancels and the rule's relative error is the reference's too
        assert_right(cpu.gelu(x, tanh=tanh)[near], same[near], r[near], dtype)
        if dtype is torch.float32:
            assert_misses(cpu.gelu(x, tanh=not tanh)[near], same[near], r[near], dtype)


def test_extremes(dtype: torch.dtype) -> None:
    """Saturated, tiny, infinite and undefined inputs give what the reference gives."""
    x = torch.tensor([[-1e30, -300.0, -90.0, -1e-30, 0.0, 1e-30, 90.0, 300.0, 1e30]], dtype=dtype)
    for op in (
        lambda o, z: o.gelu(z, tanh=False),
        lambda o, z: o.gelu(z, tanh=True),
        lambda o, z: o.swiglu(torch.cat([z, torch.ones_like(z)], 1)),
    ):
        torch.testing.assert_close(op(cpu, x), op(reference, x), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        assert op(cpu, torch.tensor([[torch.nan]], dtype=dtype)).isnan().all()
        assert op(cpu, torch.tensor([[torch.inf]], dtype=dtype)).isinf().all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
def test_embed(dtype: torch.dtype, width: int, rows: int) -> None:
    ids, positions = torch.arange(rows) * 7 % 50, torch.arange(rows) % 11
    tokens, table, type_row = normal(50, width, dtype=dtype), normal(11, width, dtype=dtype, seed=3), normal(width, dtype=dtype, seed=4)
    norm = a_norm(width, layer=True)

    def run(ops: Any, convert: Callable[[Tensor], Tensor], **changes: Any) -> Tensor:
        kwargs = {"scale": 1.5, "positions": positions, "position_table": convert(table), "type_row": type_row.to(convert(tokens).dtype)}
        return ops.embed(ids, convert(tokens), **kwargs | {"norm": norm} | changes)

    for changes in (
        {},
        {"norm": None},
        {"norm": None, "type_row": None},
        {"positions": None, "position_table": None, "type_row": None, "norm": None},
    ):
        same, r = run(reference, lambda x: x, **changes), run(reference, lambda x: x.double(), **changes)
        assert_right(run(cpu, hostile, **changes), same, r, dtype)
    if rows > 1 and width > 7:
        same, r = run(reference, lambda x: x), run(reference, lambda x: x.double())
        for wrong in ({"scale": 1.0}, {"norm": None}, {"type_row": None}, {"positions": positions.roll(1)}):
            assert_misses(run(cpu, lambda x: x, **wrong), same, r, dtype)


HEADS, GROUPS = 3, 2


def rotated(ops: Any, qkv: Tensor, **kwargs: Any) -> Tensor:
    out = qkv.clone() if ops is reference else hostile(qkv)
    ops.qk_norm_rope(out, HEADS, GROUPS, **kwargs)
    return out


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(("head", "rotary"), [(16, 16), (32, 8), (40, 20), (64, 64), (96, 34), (128, 128)])
def test_rotary(dtype: torch.dtype, head: int, rotary: int, interleaved: bool, rows: int) -> None:
    qkv = normal(rows, (HEADS + 2 * GROUPS) * head, dtype=dtype)
    angles = torch.arange(20)[:, None] * 0.7 ** torch.arange(rotary // 2)
    tables = {"cos": hostile(angles.cos()), "sin": hostile(angles.sin()), "rows": (torch.arange(rows) * 3 + 1) % 20}
    norms = {"q_norm": Norm(normal(head, seed=1) + 1, None, 1e-6, round_first=True), "k_norm": Norm(normal(head, seed=2) + 1, None, 1e-6)}
    for extra in ({}, norms, {"q_norm": norms["q_norm"]}):
        kwargs = tables | {"interleaved": interleaved} | extra
        r = rotated(reference, qkv.double(), **kwargs)
        same = rotated(reference, qkv, **kwargs)
        y = rotated(cpu, qkv, **kwargs)
        heads = (rows, HEADS + 2 * GROUPS, head)
        assert_right(y.reshape(heads), same.view(heads), r.view(heads), dtype)
        assert torch.equal(y[:, (HEADS + GROUPS) * head :], qkv[:, (HEADS + GROUPS) * head :])  # values are not touched
        if rows > 1:
            for wrong in (
                {"interleaved": not interleaved},
                {"rows": (tables["rows"] + 1) % 20},
                {"sin": -angles.sin()},
                {"q_norm": None if extra else norms["q_norm"]},
            ):
                assert_misses(rotated(cpu, qkv, **kwargs | wrong), same, r, dtype)
    same, r = rotated(reference, qkv, **norms), rotated(reference, qkv.double(), **norms)
    assert_right(rotated(cpu, qkv, **norms), same, r, dtype)  # norms without rotation
    assert torch.equal(rotated(cpu, qkv), qkv)  # neither
    cpu.qk_norm_rope(qkv[:0], HEADS, GROUPS, **tables | {"rows": tables["rows"][:0]})  # no tokens at all


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_has_the_same_bits_anywhere(dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(1)
    x, norm, lone = normal(37, 90, dtype=dtype), a_norm(90), 23
    ids, table = torch.arange(37), normal(37, 90, dtype=dtype)
    angles = torch.arange(37)[:, None] * 0.7 ** torch.arange(4)

    def rope(z: Tensor, rows: Tensor) -> Tensor:
        z = z.clone()
        cpu.qk_norm_rope(z, 5, 2, cos=angles.cos(), sin=angles.sin(), rows=rows, q_norm=Norm(None, None, 1e-6))
        return z

    calls: list[Callable[[Tensor, Tensor], Any]] = [
        lambda z, i: cpu.rms_norm(z, norm),
        lambda z, i: cpu.layer_norm(z, norm),
        lambda z, i: cpu.swiglu(z),
        lambda z, i: cpu.geglu(z, tanh=True),
        lambda z, i: cpu.gelu(z, tanh=False),
        lambda z, i: cpu.embed(i, table, norm=norm),
        rope,
    ]
    changed = torch.full_like(x, torch.nan)
    changed[lone] = x[lone]
    for call in calls:
        alone = call(x[lone : lone + 1], ids[lone : lone + 1])[0]
        torch.set_num_threads(threads)
        assert torch.equal(call(x, ids)[lone], alone)
        assert torch.equal(call(changed, ids)[lone], alone)
        torch.set_num_threads(1)
