"""The Triton norm and rotation of query and key heads against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from op_check import assert_misses, assert_right, hostile, normal
from torch import Tensor

from pyembed.kernels.qk_norm_rope import qk_norm_rope
from pyembed.ops import Norm, reference

HEADS, GROUPS = 3, 2
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def turned(op: Any, qkv: Tensor, heads: int = HEADS, groups: int = GROUPS, **kwargs: Any) -> Tensor:
    out = qkv.clone() if op is reference else hostile(qkv)
    (reference.qk_norm_rope if op is reference else op)(out, heads, groups, **kwargs)
    if op is not reference:
        assert out._base is not None
        assert int(out._base.isnan().sum()) == out._base.numel() - out.numel()  # nothing around it was written
    return out


def tables(rows: int, rotary: int) -> dict[str, Tensor]:
    angles = torch.arange(20)[:, None] * 0.7 ** torch.arange(rotary // 2)
    return {"cos": hostile(angles.cos()), "sin": hostile(angles.sin()), "rows": (torch.arange(rows) * 3 + 1) % 20}


def a_norm(head: int, seed: int, **kwargs: bool) -> Norm:
    return Norm(normal(head, seed=seed) + 1, normal(head, seed=seed + 5) if kwargs.get("layer") else None, 1e-6, **kwargs)


@dtypes
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(("head", "rotary"), [(16, 16), (32, 8), (40, 20), (64, 64), (96, 34), (128, 128), (256, 64)])
def test_rotary(dtype: torch.dtype, head: int, rotary: int, interleaved: bool) -> None:
    rows, heads = 5, (5, HEADS + 2 * GROUPS, head)
    qkv = normal(rows, (HEADS + 2 * GROUPS) * head, dtype=dtype)
    norms = {"q_norm": a_norm(head, 1, round_first=True), "k_norm": a_norm(head, 2)}
    usual = tables(rows, rotary) | {"interleaved": interleaved}
    for extra in ({}, norms, {"q_norm": norms["q_norm"]}, {"k_norm": a_norm(head, 3, layer=True)}):
        kwargs = usual | extra
        same, r = turned(reference, qkv, **kwargs), turned(reference, qkv.double(), **kwargs)
        y = turned(qk_norm_rope, qkv, **kwargs)
        assert_right(y.reshape(heads), same.view(heads), r.view(heads), dtype)
        assert torch.equal(y[:, (HEADS + GROUPS) * head :], qkv[:, (HEADS + GROUPS) * head :])  # values are not touched
        if dtype is not torch.float32:
            continue
        for wrong in (
            {"interleaved": not interleaved},
            {"rows": (usual["rows"] + 1) % 20},
            {"sin": -usual["sin"]},
            {"q_norm": None if extra else norms["q_norm"]},
        ):
            if kwargs.get("q_norm") is not None or wrong.get("q_norm", 0) is not None:
                assert_misses(turned(qk_norm_rope, qkv, **kwargs | wrong), same, r, dtype)


@dtypes
@pytest.mark.parametrize("head", [16, 20, 128])
def test_norms_without_rotation(dtype: torch.dtype, head: int) -> None:
    heads = (7, HEADS + 2 * GROUPS, head)
    qkv = normal(7, (HEADS + 2 * GROUPS) * head, dtype=dtype, scale=3.0) + 1
    for kind in ({}, {"round_first": True}, {"layer": True}, {"layer": True, "round_first": True}):
        norms = {"q_norm": a_norm(head, 1, **kind), "k_norm": a_norm(head, 2, **kind)}
        same, r = turned(reference, qkv, **norms), turned(reference, qkv.double(), **norms)
        assert_right(turned(qk_norm_rope, qkv, **norms).reshape(heads), same.view(heads), r.view(heads), dtype)
        if dtype is torch.float32:
            for wrong in ({"q_norm": norms["k_norm"]}, {"k_norm": replace(norms["k_norm"], eps=1.0)}, {"k_norm": None}):
                assert_misses(turned(qk_norm_rope, qkv, **norms | wrong), same, r, dtype)
    bare = {"q_norm": Norm(None, None, 1e-6)}
    same, r = turned(reference, qkv, **bare), turned(reference, qkv.double(), **bare)
    assert_right(turned(qk_norm_rope, qkv, **bare).reshape(heads), same.view(heads), r.view(heads), dtype)
    assert torch.equal(turned(qk_norm_rope, qkv), qkv)  # nothing to do


def test_round_first_rounds() -> None:
    qkv, norm = normal(9, 7 * 64, dtype=torch.bfloat16), a_norm(64, 1)
    exact, rounded = (turned(qk_norm_rope, qkv, q_norm=replace(norm, round_first=first))[:, :192] for first in (False, True))
    assert not torch.equal(exact, rounded)
    plain = turned(qk_norm_rope, qkv, q_norm=replace(norm, weight=None))[:, :192]
    assert norm.weight is not None
    assert torch.equal(rounded, (plain.float().view(9, 3, 64) * norm.weight).bfloat16().view(9, 192))


@dtypes
@pytest.mark.parametrize("tokens", [0, 1, 11, 200])
def test_lengths_and_parts(dtype: torch.dtype, tokens: int) -> None:
    """Queries or keys alone, as a last layer has them, and more heads than one program."""
    kwargs = tables(tokens, 16) | {"q_norm": a_norm(16, 1), "k_norm": a_norm(16, 2)}
    for heads, groups in ((3, 0), (0, 2), (4, 1)):
        qkv = normal(tokens, (heads + 2 * groups) * 16, dtype=dtype)
        shape = (tokens, heads + 2 * groups, 16)
        same, r = (turned(reference, x, heads, groups, **kwargs) for x in (qkv, qkv.double()))
        assert_right(turned(qk_norm_rope, qkv, heads, groups, **kwargs).reshape(shape), same.view(shape), r.view(shape), dtype)


@dtypes
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_a_row_has_the_same_bits_anywhere(dtype: torch.dtype, interleaved: bool) -> None:
    qkv, lone = normal(37, 9 * 24, dtype=dtype), 23
    norms = {"q_norm": a_norm(24, 1), "k_norm": a_norm(24, 2, layer=True), "interleaved": interleaved}
    usual = tables(37, 20) | norms

    def at(x: Tensor, rows: slice) -> Tensor:
        out = x[rows].clone()
        qk_norm_rope(out, 5, 2, **usual | {"rows": usual["rows"][rows]})
        return out

    alone = at(qkv, slice(lone, lone + 1))[0]
    assert torch.equal(at(qkv, slice(None))[lone], alone)
    changed = torch.full_like(qkv, torch.nan)
    changed[lone] = qkv[lone]
    assert torch.equal(at(changed, slice(None))[lone], alone)


def test_errors_are_sentences() -> None:
    qkv, usual = torch.zeros(3, 7 * 16), tables(3, 16)
    with pytest.raises(ValueError, match=r"must be bfloat16, float16 or float32, got torch\.float64"):
        qk_norm_rope(qkv.double(), 3, 2)
    with pytest.raises(ValueError, match=r"qkv has 112 columns, which are not 5 \+ 2 \* 2 heads"):
        qk_norm_rope(qkv, 5, 2, **usual)
    with pytest.raises(ValueError, match="1 to 256 dimensions, got 300"):
        qk_norm_rope(torch.zeros(3, 300), 1, 0, **usual)
    with pytest.raises(ValueError, match="cos was given without sin or rows"):
        qk_norm_rope(qkv, 3, 2, cos=usual["cos"])
    with pytest.raises(ValueError, match="cos has 10 columns, which rotate 20 dimensions, but a head has 16"):
        qk_norm_rope(qkv, 3, 2, **tables(3, 20))
    with pytest.raises(ValueError, match="rows must have shape"):
        qk_norm_rope(qkv, 3, 2, **usual | {"rows": usual["rows"][:2]})
    with pytest.raises(ValueError, match=r"norm\.weight must have shape"):
        qk_norm_rope(qkv, 3, 2, q_norm=a_norm(15, 1))
    with pytest.raises(ValueError, match="qkv is written, so its rows must not overlap"):
        qk_norm_rope(torch.zeros(1, 112).expand(3, 112), 3, 2)
