"""Launches that ahead.py compiles: norms, activations, embedding and pooling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyembed.kernels import activation, embed, latent_attention, layer_norm, pool, rescaled, rms_norm, rows
from pyembed.ops import POOL_MODES, Norm

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

Call = Callable[[], Any]


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def some_norm(width: int, **kind: bool) -> Norm:
    return Norm(empty(width, dtype=FP32), empty(width, dtype=FP32) if kind.get("layer") else None, 1e-6, **kind)


def norm_of_sum(width: int, dtype: torch.dtype, quant: Any, **kind: bool) -> Call:
    norm = some_norm(width, **kind)
    return lambda: rms_norm.rms_norm(empty(3, width, dtype=dtype), norm, residual=empty(3, width, dtype=dtype), quant=quant)


def embedding(width: int, dtype: torch.dtype) -> Call:
    ids = torch.zeros(3, dtype=torch.int64)
    tables = {"position_table": empty(5, width, dtype=dtype), "type_row": empty(width, dtype=dtype)}
    return lambda: embed.embed(ids, empty(5, width, dtype=dtype), positions=ids, **tables, norm=some_norm(width, layer=True))


def pooled(width: int, dtype: torch.dtype, mode: Any, texts: int, tokens: int = 200) -> Call:
    cu, spans = torch.zeros(texts + 1, dtype=torch.int32), torch.zeros(texts, 2, dtype=torch.int32)
    norm = some_norm(width, layer=True)
    return lambda: pool.pool(empty(tokens, width, dtype=dtype), cu, spans, mode, norm=norm, normalize=True)


def after_product(outputs: int, biased: bool = True, tokens: int = 3) -> Call:
    product, scales = empty(tokens, outputs, dtype=torch.int32), empty(tokens, dtype=FP32)
    return lambda: rescaled.rescaled(product, scales, empty(outputs, dtype=FP32), empty(outputs) if biased else None)


def cases() -> Iterator[tuple[str, Call]]:
    for width, _, _ in rows.TILES:
        for dtype in (BF16, FP32):
            yield f"norm {width} {dtype}", norm_of_sum(width, dtype, None, layer=True)
            yield f"norm int8 {width} {dtype}", norm_of_sum(width, dtype, "int8", layer=True)
            yield f"embed {width} {dtype}", embedding(width, dtype)
    for width, _, _ in pool.TILES:
        for dtype in (BF16, FP32):
            yield f"pool {width} {dtype}", pooled(width, dtype, "weightedmean", 300)
            yield f"pool in pieces {width} {dtype}", pooled(width, dtype, "max", 2)
    for width, _, _ in activation.WIDE:
        for dtype in (BF16, FP32):
            x, erf = empty(3, 2 * width, dtype=dtype), width <= rows.TILES[-1][0]
            yield f"geglu int8 {width} {dtype}", partial(activation.geglu, x, tanh=not erf, quant="int8")
            yield f"quantised int8 {width} {dtype}", partial(activation.quantised, x[:, :width], "int8")
    for width, _, _ in rows.TILES:
        for dtype in (BF16, FP32):
            yield f"latent attention {width} {dtype}", partial(latent_attention.latent_attention, empty(3, 2 * width, dtype=dtype), 2)
    yield "latent attention odd", partial(latent_attention.latent_attention, empty(3, 5 * 17, dtype=FP16), 5)
    for dtype in (BF16, FP16, FP32):
        x = empty(3, 6144, dtype=dtype)
        yield f"swiglu {dtype}", partial(activation.swiglu, x)
        yield f"geglu tanh {dtype}", partial(activation.geglu, x, tanh=True)
        yield f"gelu {dtype}", partial(activation.gelu, x, tanh=False)
    for width in (256, rows.PIECE):
        yield f"rescaled {width}", after_product(width)
    yield "rescaled without bias, odd", after_product(387, biased=False)
    yield "norm float16", norm_of_sum(1024, FP16, None, round_first=True)
    yield "layer norm odd", lambda: layer_norm.layer_norm(empty(3, 387), some_norm(387, layer=True))
    yield "norm fp8", norm_of_sum(4096, BF16, "fp8", round_first=True)
    yield "quantised fp8", lambda: activation.quantised(empty(3, 4096), "fp8")
    yield "swiglu fp8", lambda: activation.swiglu(empty(3, 2 * 14336), quant="fp8")
    yield "embed plain", lambda: embed.embed(torch.zeros(3, dtype=torch.int64), empty(5, 1024), scale=32.0)
    for mode in POOL_MODES:
        yield f"pool {mode}", pooled(1024, FP16, mode, 300)
