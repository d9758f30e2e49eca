"""Calls of attention that the tests of its kernels share, and what the reference makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from op_check import assert_misses, assert_right, error, hostile, limit, normal, offsets
from torch import Tensor

from pyembed.ops import DistanceBias, Prefix, reference


@dataclass(frozen=True)
class Case:
    """One call; `queries` are the last of each text unless q_start says otherwise."""

    dtype: torch.dtype
    keys: list[int]  # per text
    queries: list[int]
    heads: int = 4
    groups: int = 2
    width: int = 32
    seed: int = 0
    options: tuple[tuple[str, Any], ...] = ()

    def arguments(self) -> dict[str, Any]:
        return {"causal": False, "scale": self.width**-0.5} | dict(self.options)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        of = ((self.queries, self.heads), (self.keys, self.groups), (self.keys, self.groups))
        q, k, v = (normal(sum(n), h, self.width, dtype=self.dtype, seed=self.seed + i) for i, (n, h) in enumerate(of))
        return q * 2, k, v

    def change(self, **options: Any) -> Case:
        return replace(self, options=tuple((dict(self.options) | options).items()))


def run(ops: Any, case: Case) -> Tensor:
    """What a module of kernels makes of a case, in hostile memory."""
    q, k, v = (hostile(x) for x in case.tensors())
    return ops.attention(q, k, v, offsets(case.queries), offsets(case.keys), ops.schedule(case.queries), **case.arguments())


def expected(case: Case, dtype: torch.dtype) -> Tensor:
    q, k, v = (x.to(dtype) for x in case.tensors())
    arguments = case.arguments()
    if arguments.get("prefix") is not None:
        p = arguments["prefix"]
        arguments["prefix"] = replace(p, k=p.k.to(dtype), v=p.v.to(dtype))
    return reference.attention(q, k, v, offsets(case.queries), offsets(case.keys), None, **arguments)


def check(ops: Any, case: Case, *wrong: dict[str, Any]) -> None:
    """The case is right by the rule, and each wrong variant next door would be noticed."""
    same, r = expected(case, case.dtype), expected(case, torch.float64)
    assert_right(run(ops, case), same, r, case.dtype)
    for options in wrong:
        assert_misses(run(ops, case.change(**options)), same, r, case.dtype)


def any_call(longest: int, reach: int, widest: int, dtypes: list[torch.dtype]) -> dict[str, st.SearchStrategy[Any]]:
    """What hypothesis draws for `check_any`: texts of (keys, queries, q_start, prefix), and options."""
    text = st.tuples(st.integers(0, longest), st.integers(0, longest), st.integers(0, longest + 10), st.integers(-1, 1))
    return {
        "texts": st.lists(text, min_size=1, max_size=4),
        "group": st.integers(1, 3),
        "width": st.integers(16, widest),
        "causal": st.booleans(),
        "window": st.one_of(st.none(), st.tuples(st.integers(-1, reach), st.integers(-1, reach))),
        "softcap": st.sampled_from([None, 1.5]),
        "radius": st.one_of(st.none(), st.integers(0, 60)),
        "placed": st.booleans(),
        "shared": st.one_of(st.none(), st.integers(0, 80)),
        "dtype": st.sampled_from(dtypes),
    }


def check_any(
    ops: Any, texts: list[tuple[int, int, int, int]], group: int, width: int, causal: bool, window: tuple[int, int] | None,
    softcap: float | None, radius: int | None, placed: bool, shared: int | None, dtype: torch.dtype,
) -> None:  # fmt: skip
    """A call that `any_call` drew is right, and rows that see nothing are zeros."""
    keys, queries, starts, of = (list(each) for each in zip(*texts, strict=True))
    case = Case(dtype, keys, queries, 2 * group, 2, width).change(causal=causal, window=window, softcap=softcap)
    if radius is not None:
        case = case.change(bias=a_bias(2 * group, radius))
    if placed:
        case = case.change(q_start=torch.tensor(starts, dtype=torch.int32))
    if shared is not None:
        case = case.change(prefix=a_prefix(case, [shared, 7], of))
    y, same, r = run(ops, case), expected(case, dtype), expected(case, torch.float64)
    blind = (r == 0).all(-1)
    assert not y[blind].any()
    assert error(y[~blind], r[~blind]) <= limit(same[~blind], r[~blind], dtype)


def a_bias(heads: int, radius: int) -> DistanceBias:
    return DistanceBias(normal(heads, 2 * radius + 1, seed=9))


def a_prefix(case: Case, lengths: list[int], of: list[int]) -> Prefix:
    k, v = (hostile(normal(sum(lengths), case.groups, case.width, dtype=case.dtype, seed=20 + i)) for i in range(2))
    return Prefix(k, v, offsets(lengths), torch.tensor(of, dtype=torch.int32))
