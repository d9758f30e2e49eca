"""Runs every op, in every variant, on tensors that end where readable memory ends. Prints the variants that survived.

Outputs are torch's to allocate, so they are not guarded; what the ops write in place (residual, qkv) is. Layers in panels step through
memory by more than a row: their tensors, the result among them, also start where readable memory starts.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from pyembed import _cpu
from pyembed.int8 import int8
from pyembed.ops import DistanceBias, Norm, Prefix, cpu, panels

PAGE = mmap.PAGESIZE
protect = ctypes.CDLL(None, use_errno=True).mprotect
kept = []  # maps must outlive their tensors


def guarded(x: Tensor, *, before: bool = False) -> Tensor:
    """A copy of x whose last byte is the last of its page, and whose next page cannot be read; `before`: the first, and the page before."""
    x = x.contiguous()
    size = x.numel() * x.element_size()
    pages = -(-size // PAGE) + 1
    memory = mmap.mmap(-1, pages * PAGE)
    kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if protect(ctypes.c_void_p(start if before else start + (pages - 1) * PAGE), ctypes.c_size_t(PAGE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    y = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=PAGE if before else (pages - 1) * PAGE - size)
    return y.view(x.shape).copy_(x)


def every_op(dtype: torch.dtype, width: int) -> None:
    def some(*shape: int) -> Tensor:
        return guarded(torch.randn(shape).to(dtype))

    norm = Norm(guarded(torch.ones(width)), guarded(torch.ones(width)), 1e-5, layer=True)
    ids = guarded(torch.tensor([2, 2]))
    for quant in (None, "int8", "fp8"):
        cpu.layer_norm(some(2, width), norm, residual=some(2, width), quant=quant)
        cpu.swiglu(some(2, 2 * width), quant=quant)
        cpu.gelu(some(2, width), tanh=True, quant=quant)
    cpu.embed(ids, some(3, width), positions=ids, position_table=some(3, width), type_row=some(width), norm=norm)
    cu = guarded(torch.tensor([0, 1, 70], dtype=torch.int32))
    spans = guarded(torch.tensor([[0, 1], [3, 70]], dtype=torch.int32))
    for mode in ("max", "weightedmean"):
        cpu.pool(some(70, width), cu, spans, mode, norm=norm, normalize=True, dim=width - 1)
        cpu.pool(some(70, width), cu, spans, mode, dim=width - 1)
    for interleaved in (False, True):
        cos, sin = (guarded(torch.rand(3, width // 4)) for _ in range(2))
        cpu.qk_norm_rope(some(2, 4 * width), 2, 1, cos=cos, sin=sin, rows=ids, interleaved=interleaved, q_norm=norm)
    prefix = Prefix(some(5, 1, width), some(5, 1, width), guarded(offsets(5)), guarded(torch.zeros(2, dtype=torch.int32)))
    for extra in ({}, {"prefix": prefix, "bias": DistanceBias(guarded(torch.rand(2, 7))), "q_start": guarded(offsets(5))}):
        cpu.attention(
            some(70, 2, width),
            some(70, 1, width),
            some(70, 1, width),
            cu,
            cu,
            guarded(cpu.schedule([1, 69])),
            causal=True,
            scale=1.0,
            **extra,
        )


def every_layer(width: int, before: bool) -> None:
    """Layers from `width` to `width` + 17 columns and on to `width`, alone and as a pair; the result begins or ends with its memory."""

    def own(x: Tensor) -> Tensor:
        return guarded(x, before=before)

    def panelled(out: int, inputs: int, eight: bool, gated: bool) -> panels.Panels:
        weight, bias = torch.randn(out, inputs).bfloat16(), torch.randn(out).bfloat16()
        made = panels.int8(int8(weight, bias), gated=gated) if eight else panels.in_panels(weight, None, None, bias, gated)
        assert isinstance(made, panels.Panels)
        inside = {name: own(x) for name in ("words", "bias", "scale", "sums") if (x := getattr(made, name)) is not None}
        return replace(made, **inside)

    norm = Norm(own(torch.ones(width)), own(torch.ones(width)), 1e-5, layer=True)
    between = width + 17
    plain = torch.empty
    for eight in (False, True) if width % 2 == 0 else (True,):
        for gated in (False, True):
            first = panelled(between * (1 + gated), width, eight, gated)
            second = panelled(width, between, eight or between % 2 == 1, False)
            for rows in (1, 13, panels.PAIR_ROWS + 5):
                x, stream = (own(torch.randn(rows, width).bfloat16()) for _ in range(2))
                with mock.patch.object(torch, "empty", lambda *size, **rest: own(plain(*size, **rest))):
                    first.apply(x, act="gelu")
                    first.chain(x, act="gelu", second=second, norm=norm, residual=stream)
                    first.chain(x, act="gelu_tanh", second=second)


def offsets(length: int) -> Tensor:
    return torch.tensor([0, length], dtype=torch.int32)


if __name__ == "__main__":
    for isa in _cpu.isas():
        _cpu.force_isa(isa)
        for dtype in (torch.float32, torch.bfloat16):
            for width in (17, 21, 32, 47):
                every_op(dtype, width)
        for width in (15, 17, 32, 46):
            for before in (False, True):
                every_layer(width, before)
        print(_cpu.last_isa())
