"""Linear layers in panels on 0, 1, 17 and 4097 rows, with 1, 2 and 3 threads, called from a fresh Python thread."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from op_check import hostile, normal
from torch import Tensor

from pyembed.int8 import int8
from pyembed.linear import Linear
from pyembed.ops import panels

pytestmark = pytest.mark.usefixtures("isa")


FIRST, SECOND = normal(50, 34, dtype=torch.bfloat16, seed=1) / 8, normal(20, 50, dtype=torch.bfloat16, seed=2) / 8
BIAS = normal(50, dtype=torch.bfloat16, seed=3)


def layers(kind: str) -> tuple[Linear, Linear]:
    if kind == "int8":
        return panels.int8(int8(FIRST, BIAS)), panels.int8(int8(SECOND, None))
    return panels.in_panels(FIRST, None, None, BIAS, False), panels.in_panels(SECOND, None, None, None, False)


@pytest.mark.parametrize("length", [0, 1, 17, 4097])
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_lengths_threads_and_a_fresh_thread(isa: str, kind: str, length: int) -> None:
    if kind == "bfloat16" and isa not in ("amx", "avx512_bf16"):
        kind = "int8"  # elsewhere the library multiplies bfloat16
    first, second = layers(kind)
    assert isinstance(first, panels.Panels)
    x = normal(length, 34, dtype=torch.bfloat16)

    def work(threads: int) -> tuple[Tensor, Tensor]:
        torch.set_num_threads(threads)
        return first.apply(hostile(x), act="gelu"), first.chain(hostile(x), act="gelu", second=second)

    alone = work(1)
    inside = F.gelu(x.double() @ FIRST.double().T + BIAS.double())
    outside = inside @ SECOND.double().T
    for got, right in zip(alone, (inside, outside), strict=True):
        assert got.shape == right.shape
        assert torch.allclose(got.double(), right, rtol=0.03, atol=0.03)
    for threads in (1, 2, 3):
        found: list[tuple[Tensor, Tensor]] = []
        thread = threading.Thread(target=lambda count=threads, to=found: to.append(work(count)))
        thread.start()
        thread.join()
        assert torch.equal(found[0][0], alone[0])
        assert torch.equal(found[0][1], alone[1])
