"""Compiles the Triton kernels for a card that is not here, as their wrappers launch them.

A row of `cases` is a name and a call of a wrapper. Its launches are not run but compiled, with the arguments and options that they have.
None may spill registers, want more shared memory than a block gets, or multiply an argument (a row's stride) in 32 bits.
`python tests/kernels/ahead.py 90` prints the registers and the shared memory of every launch, and what is wrong with it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from pyembed.kernels import activation, embed, layer_norm, pool, rms_norm, rows
from pyembed.ops import POOL_MODES, Norm

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of a block, by compute capability
FIRST_FP8 = 89
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

Call = Callable[[], Any]


@dataclass(frozen=True)
class Launch:
    """What a launch would compile, and with which options."""

    source: ASTSource
    options: dict[str, Any]


def launches(call: Call, capability: int) -> list[Launch]:
    """The launches of a wrapper, which are not run."""
    found: list[Launch] = []
    backend = make_backend(GPUTarget("cuda", capability, 32))

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            bound, special, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **kwargs)
            options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, special, None)
            found.append(Launch(ASTSource(kernel, signature, constants, attributes), options.__dict__))

        return launch

    with mock.patch.object(JITFunction, "__getitem__", launcher):
        call()
    assert found, "the call launched nothing"
    return found


def resources(cubin: bytes, folder: str) -> dict[str, int]:
    """REG, STACK (what is spilled lies there; LOCAL is 0 even then) and so on, as the assembler counted them."""
    path = Path(folder, "kernel.cubin")
    path.write_bytes(cubin)
    told = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", told[told.index("Function ") :])}


def narrow_products(ttir: str) -> list[str]:
    """32-bit products with an argument of the kernel, a stride for one, in which a row's offset overflows."""
    (head,) = re.findall(r"tt\.func public .*", ttir)
    arguments = set(re.findall(r"(%[\w$.-]+): i(?:32|64)\b", head))
    narrow = []
    for line in ttir.splitlines():
        if same := re.search(r"(%[\w$.#-]+) = (?:tt\.splat|tt\.broadcast|tt\.expand_dims|arith\.extsi|arith\.trunci) (%[\w$.#-]+)", line):
            if same[2] in arguments:
                arguments.add(same[1])
        elif (product := re.search(r"= arith\.muli (%[\w$.#-]+), (%[\w$.#-]+).*? : (?:tensor<[\dx]*x)?i32\b", line)) and (
            product[1] in arguments or product[2] in arguments
        ):
            narrow.append(line.strip())
    return narrow


def faults(launch: Launch, capability: int) -> list[str]:
    """What is wrong with a launch, once compiled: here and now, with fused multiply-add, as Triton 3.6 and 3.9 have it."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder, TRITON_DEFAULT_FP_FUSION="1"):
        made = triton.compile(launch.source, target=GPUTarget("cuda", capability, 32), options=launch.options)
        used, shared = resources(made.asm["cubin"], folder), made.metadata.shared
    place = f"sm_{capability} {launch.source.name}"
    print(f"{place}: {used['REG']} registers, {shared} bytes shared, {launch.options['num_warps']} warps")
    wrong = [f"32-bit product: {each}" for each in narrow_products(made.asm["ttir"])]
    if used["STACK"] > 0:
        wrong.append(f"spills: {used['STACK']} bytes of stack")
    if shared > SHARED[capability]:
        wrong.append(f"{shared} bytes of shared memory, a block gets {SHARED[capability]}")
    return [f"{place}: {each}" for each in wrong]


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
    for dtype in (BF16, FP16, FP32):
        x = empty(3, 6144, dtype=dtype)
        yield f"swiglu {dtype}", partial(activation.swiglu, x)
        yield f"geglu tanh {dtype}", partial(activation.geglu, x, tanh=True)
        yield f"gelu {dtype}", partial(activation.gelu, x, tanh=False)
    yield "norm float16", norm_of_sum(1024, FP16, None, round_first=True)
    yield "layer norm odd", lambda: layer_norm.layer_norm(empty(3, 387), some_norm(387, layer=True))
    yield "norm fp8", norm_of_sum(4096, BF16, "fp8", round_first=True)
    yield "swiglu fp8", lambda: activation.swiglu(empty(3, 2 * 14336), quant="fp8")
    yield "embed plain", lambda: embed.embed(torch.zeros(3, dtype=torch.int64), empty(5, 1024), scale=32.0)
    for mode in POOL_MODES:
        yield f"pool {mode}", pooled(1024, FP16, mode, 300)


CASES = dict(cases())


def main(capability: int) -> None:
    for name, call in CASES.items():
        if "fp8" in name and capability < FIRST_FP8:
            continue
        for launch in launches(call, capability):
            print(f"{name:32}", end="")
            for fault in faults(launch, capability):
                print(f"WRONG {fault}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
