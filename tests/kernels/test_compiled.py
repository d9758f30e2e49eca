"""Every Triton kernel compiled for three generations of cards, none of which is here: tests/kernels/ahead.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl
from ahead import CASES, SHARED, compiled, faults, launches
from ahead_attention import attend, turn
from ahead_rows import BF16, Call, after_product, empty, pooled, some_norm

from pyembed.kernels import activation, embed, latent_attention, rms_norm

AHEAD = Path(__file__).resolve().parent / "ahead.py"


OLDER = Path(sys.prefix) / "triton-3.6"  # where make puts the Triton of torch 2.11
VERSIONS = ["installed", pytest.param("3.6", marks=pytest.mark.skipif(not OLDER.exists(), reason="`make test` installs Triton 3.6"))]


def older(version: str) -> dict[str, str]:
    """The environment in which a process has that version of Triton."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(OLDER), os.environ.get("PYTHONPATH")]))} if version == "3.6" else {}


@pytest.fixture(scope="module", params=VERSIONS)
def compilers(request: pytest.FixtureRequest) -> Iterator[dict[int, subprocess.Popen[str]]]:
    """A process for each compute capability, all at once, with one version of Triton."""
    command = [sys.executable, "-W", "ignore", str(AHEAD)]
    env = {**os.environ, **older(request.param)}
    given: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env}
    started = {each: subprocess.Popen([*command, str(each)], **given) for each in SHARED}
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.parametrize("capability", SHARED)
def test_no_spills_and_no_narrow_offsets(
    request: pytest.FixtureRequest, compilers: dict[int, subprocess.Popen[str]], capability: int
) -> None:
    told, _ = compilers[capability].communicate()
    print(told)
    assert compilers[capability].returncode == 0, told[-4000:]
    assert told.startswith(f"Triton {triton.__version__ if 'installed' in request.node.name else '3.6.0'}"), told[:100]
    assert not [line for line in told.splitlines() if "WRONG" in line]
    assert all(name in told for name in CASES if "fp8" not in name or capability > 80)


@triton.jit
def narrow_kernel(x, stride):
    tl.store(x + tl.program_id(0) * stride, 0.0)


@triton.jit
def wide_kernel(x, stride):
    tl.store(x + tl.program_id(0).to(tl.int64) * stride, 0.0)


@triton.jit
def greedy_kernel(x, BLOCK: tl.constexpr):
    at = x + tl.arange(0, BLOCK)
    y = tl.load(at)
    tl.store(at, y / tl.sum(y, 0))


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")
def test_faults_are_found() -> None:
    x = torch.empty(8192)

    def found(call: Call) -> str:
        (launch,) = launches(call, 90)
        return "".join(faults(launch, 90))

    assert "32-bit product" in found(lambda: narrow_kernel[(9,)](x, 7))
    assert found(lambda: wide_kernel[(9,)](x, 7)) == ""
    assert "spills" in found(lambda: greedy_kernel[(1,)](x, BLOCK=8192, num_warps=1))
    assert found(lambda: greedy_kernel[(1,)](x, BLOCK=8192, num_warps=8)) == ""
    with mock.patch.dict(SHARED, {90: 0}):
        assert "bytes of shared memory" in found(lambda: greedy_kernel[(1,)](x, BLOCK=8192, num_warps=8))


@pytest.mark.parametrize("name", ["norm 1024", "embed 1024", "swiglu", "geglu tanh", "latent attention 512", "rope 64", "rope 128"])
def test_numbers_are_fetched_and_stored_sixteen_bytes_at_a_time(tmp_path: Path, name: str) -> None:
    (launch,) = launches(CASES.get(name) or CASES[f"{name} torch.bfloat16"], 90)
    assembly = compiled(launch, 90, str(tmp_path)).asm["sass"]
    assert set(re.findall(r"\bSTG\.\S+", assembly)) == {"STG.E.128"}
    fetched = re.findall(r"\bLDG\.\S+", assembly)
    assert "LDG.E.128" in fetched
    assert set(fetched) <= {"LDG.E.128", "LDG.E.64"}  # indices are 8 bytes


def test_what_follows_an_integer_product_is_the_references_arithmetic(tmp_path: Path) -> None:
    """No multiply-add is one operation. Sixteen bytes at a time but for the scales of rows."""
    (launch,) = launches(CASES["rescaled 512"], 90)
    assembly = compiled(launch, 90, str(tmp_path)).asm["sass"]
    assert "FMUL" in assembly and "FADD" in assembly and "FFMA" not in assembly
    assert set(re.findall(r"\bSTG\.\S+", assembly)) == {"STG.E.128"}
    assert len(re.findall(r"\bLDG\.E\.128\b", assembly)) >= 5  # 16 sums a thread, and its outputs' scales


def test_eight_bit_floats_need_a_card_that_has_them() -> None:
    with pytest.raises(Exception, match="fp8e4nv not supported"):
        faults(launches(CASES["norm fp8"], 80)[0], 80)


SIZES: dict[str, Callable[[int], Any]] = {
    "norm": lambda n: rms_norm.rms_norm(empty(n, 1024), some_norm(1024), residual=empty(n, 1024), quant="int8"),
    "swiglu": lambda n: activation.swiglu(empty(n, 6144)),
    "quantised": lambda n: activation.quantised(empty(n, 1024), "int8"),
    "rescaled": lambda n: after_product(1024, tokens=n)(),
    "embed": lambda n: embed.embed(torch.zeros(n, dtype=torch.int64), empty(5, 1024)),
    "attention": lambda n: attend("long", 64, BF16, queries=n + 32)(),
    "attention of short texts": lambda n: attend("short", 64, BF16, queries=n)(),
    "attention of few queries": lambda n: attend("few", 64, BF16, queries=n)(),
    "rope": lambda n: turn(64, BF16, 64, False, some_norm(64), None, n)(),
    "latent attention": lambda n: latent_attention.latent_attention(empty(n, 4096), 8),
    "pool": lambda n: pooled(1024, BF16, "mean", n + 256, n)(),
    "pool in pieces": lambda n: pooled(1024, BF16, "mean", n % 5 + 1, n + 128)(),
}


@pytest.mark.parametrize("name", SIZES)
def test_no_batch_compiles_anything_anew(name: str) -> None:
    """Not its tokens, not its texts."""
    keys = [[(each.source.hash(), each.options) for each in launches(lambda n=n: SIZES[name](n), 90)] for n in (1, 16, 17, 24)]
    assert all(each == keys[0] for each in keys)
