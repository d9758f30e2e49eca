"""Ops on a CPU beside the library's, with pytest-benchmark:  pytest bench/test_ops.py --benchmark-group-by=group

Each group is one shape; its members are ours and the library's. Shapes are those of all-MiniLM-L6-v2 (head_dim 32) and Qwen3-0.6B.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyembed.linear import linear
from pyembed.ops import Norm, cpu, reference

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [16, 512, 2048])
@pytest.mark.parametrize(("inside", "outside"), [(384, 1536), (1536, 384), (1024, 4096)])
@pytest.mark.parametrize("kind", ["packed", "F.linear"])
def test_linear(benchmark, kind, inside, outside, rows, dtype):
    benchmark.group = f"linear {inside}->{outside}, {rows} rows, {dtype}"
    x, weight, bias = torch.randn(rows, inside).to(dtype), torch.randn(outside, inside).to(dtype), torch.randn(outside).to(dtype)
    layer = linear(weight, bias)
    with torch.inference_mode():
        benchmark((lambda: layer.apply(x)) if kind == "packed" else (lambda: F.linear(x, weight, bias)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [32, 128, 512, 1024])
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", ["ours", "sdpa"])
def test_attention(benchmark, kind, causal, width, length, dtype):
    benchmark.group = f"attention head_dim {width}, length {length}, {'causal' if causal else 'full'}, {dtype}"
    heads, texts = 12, 2048 // length
    q, k, v = torch.randn(3, texts * length, heads, width).to(dtype)
    if kind == "sdpa":
        padded = [x.view(texts, length, heads, width).transpose(1, 2) for x in (q, k, v)]
        benchmark(lambda: F.scaled_dot_product_attention(*padded, is_causal=causal))
        return
    cu = torch.arange(0, texts * length + 1, length, dtype=torch.int32)
    plan = cpu.schedule([length] * texts)
    benchmark(lambda: cpu.attention(q, k, v, cu, cu, plan, causal=causal, scale=width**-0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [384, 1024])
@pytest.mark.parametrize("kind", ["ours", "F.layer_norm"])
def test_layer_norm(benchmark, kind, width, dtype):
    benchmark.group = f"x + residual, LayerNorm {width}, 2048 rows, {dtype}"
    x, residual = torch.randn(2, 2048, width).to(dtype)
    weight, bias = torch.randn(2, width)
    norm = Norm(weight, bias, 1e-12, layer=True)
    if kind == "ours":
        benchmark(lambda: cpu.layer_norm(x, norm, residual=residual))
    else:
        benchmark(lambda: F.layer_norm(x + residual, (width,), weight.to(dtype), bias.to(dtype), 1e-12))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [cpu, reference], ids=["ours", "reference"])
def test_swiglu(benchmark, backend, dtype):
    benchmark.group = f"swiglu 2 x 3072, 2048 rows, {dtype}"
    x = torch.randn(2048, 6144).to(dtype)
    benchmark(lambda: backend.swiglu(x))
