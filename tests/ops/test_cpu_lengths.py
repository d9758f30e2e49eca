"""Every kernel and variant on 0, 1, 17 and 4097 tokens, with 1, 2 and 3 threads, called from a fresh Python thread.

tests/test_sanitizers.py runs this file a second time, on a build that watches memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_check import DTYPES, assert_right, hostile, normal, offsets
from torch import Tensor

from pyembed.ops import Norm, Quantised, cpu, reference

LENGTHS = [0, 1, 17, 4097]
WIDTH = 36  # no multiple of any vector, and even: heads of 18, 12 and 9

pytestmark = [
    pytest.mark.usefixtures("isa"),
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize("length", LENGTHS),
]
NORM = Norm(normal(WIDTH, seed=1) + 1, normal(WIDTH, seed=2), 1e-5, layer=True)


def norm(ops: Any, x: Tensor) -> Tensor:
    return ops.layer_norm(x, NORM)


def norm_of_sum(ops: Any, x: Tensor) -> Tensor:
    stream = hostile(x.flip(0)) if ops is cpu else x.flip(0)
    return torch.cat([ops.layer_norm(x, NORM, residual=stream), stream], 1)


def embed(ops: Any, x: Tensor) -> Tensor:
    ids = torch.arange(len(x)) * 7 % 50
    return ops.embed(
        ids, normal(50, WIDTH, dtype=x.dtype), positions=ids, position_table=normal(50, WIDTH, dtype=x.dtype, seed=3), norm=NORM
    )


def rope(ops: Any, x: Tensor) -> Tensor:
    y, angles = x.clone(), torch.arange(50)[:, None] * 0.7 ** torch.arange(4)
    ops.qk_norm_rope(y, 2, 1, cos=angles.cos(), sin=angles.sin(), rows=torch.arange(len(x)) % 50, q_norm=Norm(None, None, 1e-6))
    return y


def swiglu(ops: Any, x: Tensor) -> Tensor:
    return ops.swiglu(x)


def gelu(ops: Any, x: Tensor) -> Tensor:
    return ops.gelu(x, tanh=False)


def pool(ops: Any, x: Tensor) -> Tensor:
    """An empty text, and the second half of one."""
    spans = torch.tensor([[0, 0], [len(x) // 2, len(x)]], dtype=torch.int32)
    return ops.pool(x, offsets([0, len(x)]), spans, "mean", norm=NORM, normalize=True)


def attention(ops: Any, x: Tensor) -> Tensor:
    """At most the last 17 queries of the text, since the reference keeps all scores."""
    few = min(len(x), 17)
    q, k, v = x[len(x) - few :].view(few, 4, 9), x[:, :18].unflatten(1, (2, 9)), x[:, 18:].unflatten(1, (2, 9))
    return ops.attention(q, k, v, offsets([few]), offsets([len(x)]), ops.schedule([few]), causal=True, scale=0.3).flatten(1)


KERNELS: list[Callable[[Any, Tensor], Tensor]] = [norm, norm_of_sum, embed, rope, swiglu, gelu, pool, attention]


def in_a_fresh_thread(threads: int, work: Callable[[], Any]) -> Any:
    """What `work` returns in a Python thread of its own that computes with so many."""
    found: list[Any] = []

    def run() -> None:
        torch.set_num_threads(threads)
        found.append(work())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_lengths_threads_and_a_fresh_thread(dtype: torch.dtype, length: int, kernel: Callable[[Any, Tensor], Tensor]) -> None:
    x = normal(length, WIDTH, dtype=dtype)
    alone = kernel(cpu, hostile(x))
    assert_right(alone, kernel(reference, x), kernel(reference, x.double()), dtype)
    for threads in (1, 2, 3):
        assert torch.equal(in_a_fresh_thread(threads, lambda: kernel(cpu, hostile(x))), alone), f"{threads} threads"


@pytest.mark.parametrize("mask", [{"causal": True, "window": (70, -1)}, {"causal": False, "window": (33, 40)}], ids=["causal", "window"])
def test_all_queries_of_a_long_text_are_the_last_ones(dtype: torch.dtype, length: int, mask: dict[str, Any]) -> None:
    """Attention over tiles of many queries, which share keys, gives each the bits that it has alone."""
    q, k, v = (hostile(normal(length, heads, 20, dtype=dtype, seed=heads)) for heads in (6, 2, 2))
    cu, few = offsets([length]), min(length, 17)
    for at in {0, max(0, length // 2 - 10), length - few}:
        starts = torch.tensor([at], dtype=torch.int32)
        last = cpu.attention(q[at : at + few], k, v, offsets([few]), cu, cpu.schedule([few]), q_start=starts, scale=0.3, **mask)
        for threads in (1, 3):
            whole = in_a_fresh_thread(threads, lambda: cpu.attention(q, k, v, cu, cu, cpu.schedule([length]), scale=0.3, **mask))
            assert torch.equal(whole[at : at + few], last)


@pytest.mark.parametrize("quant", ["int8", "fp8"])
def test_eight_bits(dtype: torch.dtype, length: int, quant: Any) -> None:
    x = normal(length, WIDTH, dtype=dtype)
    alone = cpu.layer_norm(hostile(x), NORM, quant=quant)
    expected = reference._maybe_quantise(cpu.layer_norm(x, NORM), dtype, quant)
    assert isinstance(alone, Quantised)
    assert isinstance(expected, Quantised)
    assert torch.equal(alone.values.view(torch.int8), expected.values.view(torch.int8))
    for threads in (1, 2, 3):
        again = in_a_fresh_thread(threads, lambda: cpu.layer_norm(hostile(x), NORM, quant=quant))
        assert torch.equal(again.values.view(torch.int8), alone.values.view(torch.int8))
        assert torch.equal(again.scale, alone.scale)
