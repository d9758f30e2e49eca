"""The C++ attention against the reference: every mask, bias and layout, and that a text's bits depend on that text only."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import attention_cases
import pytest
import torch
from attention_cases import Case, a_bias, a_prefix, any_call
from hypothesis import HealthCheck, given, settings
from op_check import DTYPES, offsets
from torch import Tensor

from pyembed.ops import DistanceBias, Prefix, cpu

pytestmark = pytest.mark.usefixtures("isa")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
run, check = partial(attention_cases.run, cpu), partial(attention_cases.check, cpu)

LENGTHS = [1, 3, 0, 16, 64, 65, 130, 17]


@dtypes
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("heads", "groups", "width"), [(2, 2, 16), (3, 1, 20), (12, 12, 32), (4, 2, 64), (5, 5, 77), (2, 1, 256)])
def test_shapes(dtype: torch.dtype, heads: int, groups: int, width: int, causal: bool) -> None:
    case = Case(dtype, LENGTHS, LENGTHS, heads, groups, width).change(causal=causal)
    check(case, {"causal": not causal}, {"scale": 1.1 * width**-0.5})


@dtypes
def test_options(dtype: torch.dtype) -> None:
    case = Case(dtype, LENGTHS, LENGTHS)
    check(case.change(window=(9, 5)), {"window": (8, 5)}, {"window": (9, 6)}, {"window": (5, 9)}, {"window": None})
    check(case.change(window=(9, -1)), {"window": (10, -1)}, {"window": (9, 9)})
    check(case.change(window=(-1, 0)), {"window": (-1, 1)})
    check(case.change(window=(70, 3), causal=True), {"causal": False}, {"window": None})
    check(case.change(window=(0, 0)), {"window": (1, 0)})
    check(case.change(softcap=2.0), {"softcap": None}, {"softcap": 3.0})
    check(case.change(softcap=50.0, scale=1.0), {"softcap": None})
    check(case.change(bias=a_bias(4, 12)), {"bias": None}, {"bias": a_bias(4, 11)}, {"bias": DistanceBias(a_bias(4, 12).table.flip(1))})
    check(case.change(bias=a_bias(4, 0)))
    check(case.change(bias=a_bias(4, 300), softcap=2.0, causal=True), {"softcap": None}, {"bias": None}, {"causal": False})
    check(case.change(scale=-0.2), {"scale": 0.2})
    check(case.change(scale=0.0), {"scale": 0.2})


@dtypes
def test_fewer_queries_than_keys(dtype: torch.dtype) -> None:
    queries = [1, 1, 0, 3, 64, 1, 70, 0]
    case = Case(dtype, LENGTHS, queries, heads=6)
    check(case)
    check(case.change(causal=True))
    starts = torch.tensor([0, 1, 0, 5, 0, 60, 2, 9], dtype=torch.int32)
    check(case.change(causal=True, q_start=starts), {"q_start": None}, {"q_start": starts + 1})
    check(case.change(window=(4, 4), q_start=starts), {"q_start": starts + 1})


@dtypes
def test_prefix(dtype: torch.dtype) -> None:
    case = Case(dtype, LENGTHS, LENGTHS, heads=4)
    prefix = a_prefix(case, [5, 0, 70], [0, 2, 2, 1, -1, 0, 2, -1])
    without, other = replace(prefix, prefix_of=prefix.prefix_of * 0 - 1), replace(prefix, prefix_of=prefix.prefix_of.flip(0).contiguous())
    for options in ({}, {"causal": True}, {"window": (20, 3)}, {"bias": a_bias(4, 90)}):
        check(case.change(prefix=prefix, **options), {"prefix": None}, {"prefix": without}, {"prefix": other})
    starts = torch.tensor([0, 3, 0, 1, 2, 3, 4, 5], dtype=torch.int32)  # positions count the prefix
    check(case.change(prefix=prefix, causal=True, q_start=starts), {"q_start": None})


@dtypes
def test_a_prefix_is_the_text_written_out(dtype: torch.dtype) -> None:
    """Keys computed once and keys computed with the text give the same bits."""
    case = Case(dtype, [90], [90], heads=4)
    q, k, v = case.tensors()
    for shared in (1, 40, 64, 89):
        prefix = Prefix(k[:shared], v[:shared], offsets([shared]), torch.zeros(1, dtype=torch.int32))
        rest = offsets([90 - shared])
        whole = cpu.attention(q, k, v, offsets([90]), offsets([90]), cpu.schedule([90]), causal=True, scale=0.2)
        split = cpu.attention(
            q[shared:], k[shared:], v[shared:], rest, rest, cpu.schedule([90 - shared]), causal=True, scale=0.2, prefix=prefix
        )  # fmt: skip
        assert torch.equal(split, whole[shared:])


@dtypes
def test_queries_without_keys_get_zeros(dtype: torch.dtype) -> None:
    case = Case(dtype, [0, 3, 2], [4, 5, 2]).change(causal=True)  # two queries come before the first key
    y = run(case)
    assert not y[:6].any()
    assert y[6:].any(-1).all()
    check(case)
    late = case.change(window=(1, 1), causal=False, q_start=torch.tensor([0, 50, 2], dtype=torch.int32))
    assert not run(late)[:9].any()
    check(late)
    assert run(Case(dtype, [], [])).shape == (0, 4, 32)
    assert run(Case(dtype, [0, 0], [0, 0])).shape == (0, 4, 32)


@dtypes
def test_a_bias_of_minus_infinity_hides(dtype: torch.dtype) -> None:
    table = torch.zeros(4, 9)
    table[1] = -torch.inf  # all keys, from one head
    table[2, :4] = -torch.inf  # keys before the query, from another
    check(Case(dtype, LENGTHS, LENGTHS).change(bias=DistanceBias(table)))


@dtypes
@pytest.mark.parametrize("size", [1e2, 1e3, 3e4, 1e5])
def test_scores_beyond_all_reason(dtype: torch.dtype, size: float) -> None:
    """One key: whatever its score, its weight is one. The largest score and its own weight are rounded alike."""
    q, k, v = (torch.full((1, 1, 64), x, dtype=dtype) for x in (size, size, 1.0))
    cu = offsets([1])
    y = cpu.attention(q, k, v, cu, cu, cpu.schedule([1]), causal=True, scale=0.987)
    assert torch.equal(y, v)


@dtypes
def test_rows_of_nobody_reach_nothing(dtype: torch.dtype) -> None:
    case = Case(dtype, LENGTHS, LENGTHS)
    spare = [torch.cat([x, torch.full_like(x[:5], torch.nan)]) for x in case.tensors()]
    cu = offsets(LENGTHS)
    y = cpu.attention(*spare, cu, cu, cpu.schedule(LENGTHS), **case.arguments())
    assert torch.equal(y[: sum(LENGTHS)], run(case))


@dtypes
def test_nan_is_not_swallowed(dtype: torch.dtype) -> None:
    q, k, v = Case(dtype, [40, 70], [40, 70]).tensors()
    cu, tiles = offsets([40, 70]), cpu.schedule([40, 70])
    for x in (q, k, v):
        kept = x[45].clone()
        x[45] = torch.nan
        y = cpu.attention(q, k, v, cu, cu, tiles, causal=False, scale=0.2)
        assert y[:40].isfinite().all()
        assert y[45].isnan().all()
        assert y[41].isnan().all() == (x is not q)
        x[45] = kept


@dtypes
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": (30, 2)}, {"bias": a_bias(4, 40), "softcap": 3.0}], ids=lambda o: "-".join(o)
)
def test_a_text_has_the_same_bits_anywhere(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Alone, in a batch, after other neighbours, with 1, 2 and 3 threads, and query by query."""
    lengths = [70, 1, 150, 33]
    arguments = {"causal": False, "scale": 0.3} | options
    q, k, v = Case(dtype, lengths, lengths).tensors()

    def attend(rows: slice, parts: list[int]) -> Tensor:
        cu = offsets(parts)
        return cpu.attention(q[rows], k[rows], v[rows], cu, cu, cpu.schedule(parts), **arguments)

    torch.set_num_threads(1)
    together = attend(slice(None), lengths)
    for start, length in zip(offsets(lengths).tolist(), lengths, strict=False):
        rows = slice(start, start + length)
        assert torch.equal(attend(rows, [length]), together[rows])
        assert torch.equal(attend(slice(max(0, start - 1), start + length), [1, length][-min(start + 1, 2) :])[-length:], together[rows])
        cu_k = offsets([length])
        for i in range(length):
            one = cpu.attention(
                q[start + i : start + i + 1], k[rows], v[rows], offsets([1]), cu_k, cpu.schedule([1]),
                q_start=torch.tensor([i], dtype=torch.int32), **arguments,
            )  # fmt: skip
            assert torch.equal(one[0], together[start + i])
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(attend(slice(None), lengths), together)
    torch.set_num_threads(1)
    for x in (q, k, v):
        x[:70] = torch.nan
        x[71:221] = torch.nan
    assert torch.equal(attend(slice(None), lengths)[221:], together[221:])


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**any_call(140, 80, 70, DTYPES))
def test_any_mask(**call: Any) -> None:
    attention_cases.check_any(cpu, **call)
