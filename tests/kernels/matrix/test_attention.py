"""The Triton attention against the reference: every mask, bias, layout and form of tile, and that a text's bits depend on it alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import attention_cases
import numpy as np
import pytest
import torch
from attention_cases import Case, a_bias, a_prefix, any_call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_check import hostile, offsets
from torch import Tensor
from triton.runtime import interpreter

from pyembed.kernels import attention as ops
from pyembed.kernels import tiles
from pyembed.ops import DistanceBias, Prefix

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [1, 3, 0, 16, 40, 17]  # of every form: shared slots of both sizes, and one or two tiles of their own
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
run = partial(attention_cases.run, ops)


@pytest.fixture(autouse=True, scope="module")
def in_less_time() -> Iterator[None]:
    """The interpreter looks for overflow in every sum of integers."""
    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    with mock.patch.object(interpreter.interpreter_builder, "options", options):
        yield


def check(case: Case, *wrong: dict[str, Any]) -> None:
    """Wrong variants in float32 alone, where the tolerance is closest; of shared tiles, which float32 has not, below."""
    attention_cases.check(ops, case, *(wrong if case.dtype is torch.float32 else ()))


@dtypes
@pytest.mark.parametrize(
    ("heads", "groups", "width"), [(2, 2, 16), (3, 1, 20), (8, 4, 32), (4, 1, 64), (5, 1, 77), (12, 1, 16), (2, 1, 128), (2, 1, 256)]
)
def test_shapes(dtype: torch.dtype, heads: int, groups: int, width: int) -> None:
    """Groups of one head, of an odd number, of more than a tile holds; head dimensions that are no powers of two."""
    case = Case(dtype, LENGTHS, LENGTHS, heads, groups, width)
    check(case)
    check(case.change(causal=True), {"causal": False})


@dtypes
def test_options(dtype: torch.dtype) -> None:
    case = Case(dtype, LENGTHS, LENGTHS, 2, 1)
    check(case.change(window=(9, 5)), {"window": (8, 5)}, {"window": (9, 6)}, {"window": (5, 9)}, {"window": None})
    check(case.change(window=(9, -1)), {"window": (10, -1)}, {"window": (9, 9)})
    check(case.change(window=(-1, 0)), {"window": (-1, 1)})
    check(case.change(window=(20, 3), causal=True), {"causal": False}, {"window": None})
    check(case.change(window=(0, 0)), {"window": (1, 0)})
    check(case.change(softcap=2.0), {"softcap": None}, {"softcap": 3.0})
    check(case.change(softcap=50.0, scale=1.0), {"softcap": None})
    check(case.change(bias=a_bias(2, 12)), {"bias": None}, {"bias": a_bias(2, 11)}, {"bias": DistanceBias(a_bias(2, 12).table.flip(1))})
    check(case.change(bias=a_bias(2, 0)))
    check(case.change(bias=a_bias(2, 300), softcap=2.0, causal=True), {"softcap": None}, {"bias": None}, {"causal": False})
    check(case.change(scale=-0.2), {"scale": 0.2})
    check(case.change(scale=0.0), {"scale": 0.2})


@pytest.mark.parametrize("groups", [1, 2])
def test_wrong_variants_of_shared_tiles(groups: int) -> None:
    case, bias = Case(torch.float16, [1, 3, 0, 16, 17, 32], [1, 3, 0, 16, 17, 32], 2, groups), a_bias(2, 12)
    wrong: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"causal": True}, {"causal": False}),
        ({"window": (9, 5)}, {"window": (8, 5)}),
        ({"window": (9, 5)}, {"window": (9, 6)}),
        ({"softcap": 2.0}, {"softcap": 3.0}),
        ({"bias": bias}, {"bias": DistanceBias(bias.table.flip(1))}),
        ({"prefix": a_prefix(case, [5, 40], [0, 1, 1, 1, -1, 0])}, {"prefix": a_prefix(case, [5, 40], [1, 0, 1, 1, 0, -1])}),
    ]
    for options, other in wrong:
        attention_cases.check(ops, case.change(**options), other)


@dtypes
def test_blocks_without_a_mask(dtype: torch.dtype) -> None:
    """A text of many blocks: windows that end on a block's edge and beside it, masked blocks on both sides of others."""
    case = Case(dtype, [400], [400], 1, 1, 16)
    check(case)
    for window in ((128, 128), (127, 129), (200, 0), (3, 250)):
        check(case.change(window=window), {"window": (window[0] + 1, window[1])}, {"window": (window[0], window[1] + 1)})


@dtypes
def test_fewer_queries_than_keys(dtype: torch.dtype) -> None:
    queries = [1, 1, 0, 3, 33, 1]
    case = Case(dtype, LENGTHS, queries, 3, 1)
    check(case)
    check(case.change(causal=True))
    starts = torch.tensor([0, 1, 0, 5, 0, 14], dtype=torch.int32)
    check(case.change(causal=True, q_start=starts), {"q_start": None}, {"q_start": starts + 1})
    check(case.change(window=(4, 4), q_start=starts), {"q_start": starts + 1})


@dtypes
def test_prefix(dtype: torch.dtype) -> None:
    case = Case(dtype, LENGTHS, LENGTHS, 2, 1)
    prefix = a_prefix(case, [5, 0, 70], [0, 2, 2, 1, 2, -1])
    without, other = replace(prefix, prefix_of=prefix.prefix_of * 0 - 1), replace(prefix, prefix_of=prefix.prefix_of.flip(0).contiguous())
    for options in ({}, {"causal": True}, {"window": (20, 3)}, {"bias": a_bias(2, 90)}):
        check(case.change(prefix=prefix, **options), {"prefix": None}, *(() if options else ({"prefix": without}, {"prefix": other})))
    starts = torch.tensor([0, 3, 0, 1, 2, 3], dtype=torch.int32)  # positions count the prefix
    check(case.change(prefix=prefix, causal=True, q_start=starts), {"q_start": None})


@dtypes
def test_queries_without_keys_get_zeros(dtype: torch.dtype) -> None:
    case = Case(dtype, [0, 3, 2, 2], [4, 5, 2, 40]).change(causal=True)  # queries that come before the first key
    y = run(case)
    assert not y[:6].any()
    assert y[6:11].any(-1).all()
    assert not y[11:49].any()
    check(case)
    late = case.change(window=(1, 1), causal=False, q_start=torch.tensor([0, 50, 2, 1], dtype=torch.int32))
    assert not run(late)[:9].any()
    check(late)
    assert run(Case(dtype, [], [])).shape == (0, 4, 32)
    assert run(Case(dtype, [0, 0], [0, 0])).shape == (0, 4, 32)
    assert not run(Case(dtype, [0, 0], [1, 40])).any()


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
    size = min(size, torch.finfo(dtype).max)
    q, k, v = (torch.full((1, 1, 64), x, dtype=dtype) for x in (size, size, 1.0))
    cu = offsets([1])
    assert torch.equal(ops.attention(q, k, v, cu, cu, ops.schedule([1]), causal=True, scale=0.987), v)


@dtypes
def test_rows_of_nobody_reach_nothing(dtype: torch.dtype) -> None:
    case = Case(dtype, LENGTHS, LENGTHS, 2, 1)
    spare = [torch.cat([x, torch.full_like(x[:5], torch.nan)]) for x in case.tensors()]
    cu = offsets(LENGTHS)
    y = ops.attention(*spare, cu, cu, ops.schedule(LENGTHS), **case.arguments())
    assert torch.equal(y[: sum(LENGTHS)], run(case))


@dtypes
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_text(dtype: torch.dtype, bad: float) -> None:
    """And is not swallowed: in tiles of their own and in shared ones."""
    lengths = [33, 40, 9, 20, 9]
    q, k, v = Case(dtype, lengths, lengths, 2, 1).tensors()
    cu, tiles = offsets(lengths), ops.schedule(lengths)
    right = ops.attention(q, k, v, cu, cu, tiles, causal=False, scale=0.2)
    for text in (1, 3):
        start, end = int(cu[text]), int(cu[text + 1])
        for x in (q, k, v):
            kept = x[start + 5].clone()
            x[start + 5] = bad
            y = ops.attention(q, k, v, cu, cu, tiles, causal=False, scale=0.2)
            assert torch.equal(y[:start], right[:start])
            assert torch.equal(y[end:], right[end:])
            assert not y[start + 5].isfinite().any()
            if bad != bad:
                assert y[start + 1].isnan().all() == (x is not q)
            x[start + 5] = kept


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (20, 2)},
        {"bias": True, "softcap": 3.0},
        {"prefix": True},
        {"prefix": True, "causal": True},
    ],
    ids=lambda o: "-".join(o),
)
def test_a_text_has_the_same_bits_anywhere(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Alone, in a batch, in another order, and with neighbours that are not finite."""
    options = options | ({"bias": a_bias(2, 40)} if "bias" in options else {})  # made here, on the device
    shared = options.pop("prefix", False)
    lengths = [70, 1, 16, 9, 33, 32, 17, 5]
    q, k, v = Case(dtype, lengths, lengths, 2, 1).tensors()
    starts, of = offsets(lengths).tolist(), [0, 1, 1, -1, 1, 0, -1, 1]
    prefix = a_prefix(Case(dtype, lengths, lengths, 2, 1), [40, 5], of)

    def attend(texts: list[int]) -> list[Tensor]:
        rows = torch.cat([torch.arange(starts[n], starts[n + 1]) for n in texts])
        sizes = [lengths[n] for n in texts]
        own = replace(prefix, prefix_of=prefix.prefix_of[texts]) if shared else None
        y = ops.attention(
            q[rows], k[rows], v[rows], offsets(sizes), offsets(sizes), ops.schedule(sizes),
            **{"causal": False, "scale": 0.3} | options, prefix=own,
        )  # fmt: skip
        return list(y.split(sizes))

    together = attend(list(range(8)))
    order = [3, 7, 6, 0, 2, 5, 4, 1]
    for n, y in zip(order, attend(order), strict=True):
        assert torch.equal(y, together[n])
    for n in range(8):
        assert torch.equal(attend([n])[0], together[n])
    for x in (q, k, v):
        for n in (0, 2, 5, 7):
            x[starts[n] : starts[n + 1]] = torch.nan
    prefix.v[:40] = torch.inf  # which text 5 alone has
    for n, y in enumerate(attend(list(range(8)))):
        assert torch.equal(y, together[n]) == (n in (1, 3, 4, 6))


@dtypes
def test_queries_placed_have_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    """The form of a last layer: a few queries of each text, at `q_start`."""
    keys, queries, places = [70, 20, 5, 90], [1, 3, 1, 33], [69, 2, 0, 50]
    q, k, v = Case(dtype, keys, queries, 2, 1).tensors()
    starts_q, starts_k = offsets(queries).tolist(), offsets(keys).tolist()

    def attend(texts: list[int]) -> list[Tensor]:
        rows_q, rows_k = (torch.cat([torch.arange(at[n], at[n + 1]) for n in texts]) for at in (starts_q, starts_k))
        sizes_q, sizes_k = [queries[n] for n in texts], [keys[n] for n in texts]
        y = ops.attention(
            q[rows_q], k[rows_k], v[rows_k], offsets(sizes_q), offsets(sizes_k), ops.schedule(sizes_q), causal=True, scale=0.3,
            q_start=torch.tensor([places[n] for n in texts], dtype=torch.int32),
        )  # fmt: skip
        return list(y.split(sizes_q))

    together = attend([0, 1, 2, 3])
    for n in range(4):
        assert torch.equal(attend([n])[0], together[n])


@dtypes
def test_parts_of_one_tensor(dtype: torch.dtype) -> None:
    """Queries, keys and values side by side, as a projection leaves them."""
    case = Case(dtype, LENGTHS, LENGTHS)
    side_by_side = hostile(torch.cat(case.tensors(), 1).flatten(1)).unflatten(1, (8, 32))
    cu = offsets(LENGTHS)
    y = ops.attention(*side_by_side.split((4, 2, 2), 1), cu, cu, ops.schedule(LENGTHS), **case.arguments())
    assert torch.equal(y, run(case))


@dtypes
def test_empty_tiles(dtype: torch.dtype) -> None:
    """Lists filled up with tiles of no text, as a launch of fixed size has them."""
    lengths = [70, 20, 1, 40]
    right = run(Case(dtype, lengths, lengths))
    prefix = a_prefix(Case(dtype, lengths, lengths), [5], [0, 0, 0, 0])
    longer = run(Case(dtype, lengths, lengths).change(prefix=prefix))
    plain = tiles.Schedule.tiles

    def filled(self: tiles.Schedule, form: str, queries: int, device: torch.device) -> Tensor:
        made = plain(self, form, queries, device)
        return torch.cat([made, torch.full_like(made[:1], -1), torch.full_like(made[:1], -1)])

    with mock.patch.object(tiles.Schedule, "tiles", filled):
        assert torch.equal(run(Case(dtype, lengths, lengths)), right)
        assert torch.equal(run(Case(dtype, lengths, lengths).change(prefix=prefix)), longer)


@given(st.lists(st.integers(0, 150), max_size=30), st.integers(1, 9), st.sampled_from([2, 4]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_tiles_hold_every_query_once(lengths: list[int], queries: int, units: int) -> None:
    made = tiles.schedule(lengths)
    assert made.queries == sum(lengths)
    sizes = np.asarray(lengths, dtype=np.int64)
    assert sorted([*made.long, *made.short]) == [n for n, length in enumerate(lengths) if length > 0]
    assert (np.diff(sizes[made.long]) <= 0).all()
    assert all((length > tiles.SHORT) == (n in made.long) for n, length in enumerate(lengths) if length)
    seen = [(int(text), int(first) + i) for text, first in tiles.apart(sizes, made.long, queries) for i in range(queries)]
    assert sorted(each for each in seen if each[1] < lengths[each[0]]) == [(n, i) for n in sorted(made.long) for i in range(lengths[n])]
    apart = tiles.apart(sizes, made.long, queries)
    assert all(a[0] != b[0] or a[1] == b[1] + queries for a, b in itertools.pairwise(apart))
    together = tiles.together(sizes, made.short, units).reshape(-1)
    for n in made.short:
        (at,) = np.nonzero(together == n)
        assert len(at) == 1 + (lengths[n] > tiles.UNIT)
        assert len(at) == 1 or (at[0] % 2 == 0 and at[1] == at[0] + 1)
    assert (together >= 0).sum() == sum(1 + (lengths[n] > tiles.UNIT) for n in made.short)


def test_tiles_of_groups() -> None:
    """Every head of a group has its row, in as few and as even parts as a tile's rows allow."""
    tables = [(form, at, size, False) for form, at, size in tiles.LAUNCHES] + [(form, 90, size, True) for form, size in tiles.BIASED]
    for form, at, size, biased in tables:
        for width, group in itertools.product((1, 16, 80, 128, 256), (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 71)):
            one = tiles.tile(form, at, size, width, group, biased)
            assert one.queries * one.heads <= one.rows
            assert one.rows & (one.rows - 1) == 0
            assert one.registers * one.warps * 32 <= tiles.REGISTERS
            parts = -(-group // one.heads)
            assert (parts - 1) * one.heads < group <= parts * one.heads
            if form == "short":
                assert one.queries == one.keys
                assert one.keys % tiles.SHORT == 0


def test_errors_are_sentences() -> None:
    case = Case(torch.float32, [3], [3])
    (q, k, v), cu, plan = case.tensors(), offsets([3]), ops.schedule([3])

    def call(*tensors: Any, **options: Any) -> None:
        ops.attention(*tensors, **{"causal": True, "scale": 1.0} | options)

    with pytest.raises(ValueError, match=r"must be bfloat16, float16 or float32, got torch.float64"):
        call(q.double(), k, v, cu, cu, plan)
    with pytest.raises(ValueError, match=r"k must be a torch.float32 tensor on cpu, got torch.bfloat16"):
        call(q, k.bfloat16(), v, cu, cu, plan)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        call(q, torch.zeros(3, 3, 32), torch.zeros(3, 3, 32), cu, cu, plan)
    with pytest.raises(ValueError, match="1 to 256 dimensions, got 300"):
        call(torch.zeros(3, 1, 300), torch.zeros(3, 1, 300), torch.zeros(3, 1, 300), cu, cu, plan)
    with pytest.raises(ValueError, match=r"what schedule\(lengths\) of this module returned, got NoneType"):
        call(q, k, v, cu, cu, None)
    with pytest.raises(ValueError, match="made for 2 texts with 7 queries, but cu_q has 1 texts and q 3 rows"):
        call(q, k, v, cu, cu, ops.schedule([3, 4]))
    with pytest.raises(ValueError, match="softcap must be positive or None, got 0"):
        call(q, k, v, cu, cu, plan, softcap=0.0)
    with pytest.raises(ValueError, match="odd number of columns, got 4"):
        call(q, k, v, cu, cu, plan, bias=DistanceBias(torch.zeros(4, 4)))
    with pytest.raises(ValueError, match="q_start must have shape"):
        call(q, k, v, cu, cu, plan, q_start=cu)
    with pytest.raises(ValueError, match=r"prefix.prefix_of must have shape"):
        call(q, k, v, cu, cu, plan, prefix=Prefix(k, v, cu, cu))
    with pytest.raises(ValueError, match="k must have unit stride in its last dimension"):
        call(q, k.transpose(1, 2).contiguous().transpose(1, 2), v, cu, cu, plan)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**any_call(60, 40, 40, DTYPES))
def test_any_mask(**call: Any) -> None:
    attention_cases.check_any(ops, **call)
