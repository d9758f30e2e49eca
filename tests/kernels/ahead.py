"""Compiles the Triton kernels for a card that is not here, as their wrappers launch them.

    python tests/kernels/ahead.py 90 [every]

prints the registers and the shared memory of launches, and what is wrong with them; `every`: of all in attention's tables, which takes
minutes. With another Triton, such as a GPU machine has:

    pip install --no-deps --target DIR triton==3.6.0
    PYTHONPATH=DIR python tests/kernels/ahead.py 90

A row of `cases` in ahead_rows.py and ahead_attention.py is a name and a call of a wrapper. Its launches are not run but compiled, with the
arguments and options that they have. None may spill registers, want more shared memory than a block gets, multiply an argument (a row's
stride) in 32 bits, or leave a Hopper's asynchronous products of tensor cores unused where they fit.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import ahead_attention
import ahead_rows
import triton
from ahead_rows import Call
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from pyembed.kernels import tiles

SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of a block, by compute capability; 80: of the least card from 8.0 to 8.9
FIRST_FP8 = 89
WGMMA_ROWS = 64  # of a product of Hopper's, at least
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


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

    with mock.patch.object(JITFunction, "__getitem__", launcher), mock.patch.object(tiles, "card", return_value=capability):
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


def compiled(launch: Launch, capability: int, folder: str) -> Any:
    """Here and now. Its asm["sass"] is there while the folder is."""
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        return triton.compile(launch.source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def faults(launch: Launch, capability: int) -> list[str]:
    """What is wrong with a launch, once compiled."""
    with tempfile.TemporaryDirectory() as folder:
        made = compiled(launch, capability, folder)
        used, shared = resources(made.asm["cubin"], folder), made.metadata.shared
    place = f"sm_{capability} {launch.source.name}"
    print(f"{place}: {used['REG']} registers, {shared} bytes shared, {launch.options['num_warps']} warps")
    wrong = [f"32-bit product: {each}" for each in narrow_products(made.asm["ttir"])]
    if used["STACK"] > 0:
        wrong.append(f"spills: {used['STACK']} bytes of stack")
    if shared > SHARED[capability]:
        wrong.append(f"{shared} bytes of shared memory, a block gets {SHARED[capability]}")
    wide = [rows for rows in re.findall(r" tt\.dot .*: tensor<(\d+)x\d+xb?f16>", made.asm["ttir"]) if int(rows) >= WGMMA_ROWS]
    if capability == 90 and (made.asm["ptx"].count("wgmma.mma_async") < len(wide) or (wide and "HGMMA" not in made.asm["sass"])):
        wrong.append("products without wgmma")
    return [f"{place}: {each}" for each in wrong]


CASES = dict([*ahead_rows.cases(), *ahead_attention.cases()])


def main(capability: int, every: bool) -> None:
    print(f"Triton {triton.__version__}")
    chosen = CASES | dict(ahead_attention.cases(every=True)) if every else CASES
    for name, call in chosen.items():
        if "fp8" in name and capability < FIRST_FP8:
            continue
        for launch in launches(call, capability):
            print(f"{name:50}", end="")
            for fault in faults(launch, capability):
                print(f"WRONG {fault}")


if __name__ == "__main__":
    main(int(sys.argv[1]), "every" in sys.argv[2:])
