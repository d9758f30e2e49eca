"""The C++ extension as a whole: its place in the process, its variants, and what it says to arguments it cannot use."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from op_check import normal, offsets
from torch import Tensor

from pyembed import _cpu
from pyembed.ops import DistanceBias, Norm, Ops, Prefix, cpu, reference, select


def test_the_same_names_and_signatures_as_the_reference() -> None:
    names = [name for name in vars(Ops) if not name.startswith("_") and callable(getattr(Ops, name))]
    assert "attention" in names
    assert cpu.FROM_REFERENCE == ("latent_attention", "quantised", "rescaled")
    for name in names:
        mine, theirs = getattr(cpu, name), getattr(reference, name)
        assert (mine is theirs) == (name in cpu.FROM_REFERENCE), name
        a, b = inspect.signature(mine), inspect.signature(theirs)
        assert a.parameters == b.parameters, name
        assert a.return_annotation == b.return_annotation or name in ("schedule", "linear", "int8")
    assert select(torch.device("cpu")) is cpu


def test_a_cpu_with_more_also_runs_what_is_below() -> None:
    every = ["amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "generic"]
    assert _cpu.isas() in [every[i:] for i in range(len(every))]
    assert _cpu.isa() == _cpu.isas()[0]


def test_forcing_is_seen() -> None:
    x = normal(2, 4)
    cpu.gelu(x, tanh=False)
    assert _cpu.last_isa() == _cpu.isa()
    _cpu.force_isa("generic")
    try:
        assert _cpu.last_isa() == ""
        cpu.gelu(x, tanh=False)
        assert _cpu.last_isa() == "generic"
    finally:
        _cpu.force_isa(_cpu.isas()[0])
    with pytest.raises(ValueError, match=r"this CPU has no kernels for 'mmx'; it has .*generic"):
        _cpu.force_isa("mmx")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_one_libgomp_in_the_process() -> None:
    code = "import torch, pyembed._cpu; print(*{l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l}, sep='\\n')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout.split()
    assert len(found) == 1, found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_fresh_thread_keeps_its_own_thread_count(threads: int) -> None:
    x, started = normal(64, 64), []

    def work() -> None:
        torch.set_num_threads(threads)
        before = set(os.listdir("/proc/self/task"))
        cpu.gelu(x, tanh=False)
        started.append(len(set(os.listdir("/proc/self/task")) - before))

    torch.set_num_threads(2)
    cpu.gelu(x, tanh=False)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert started == [threads - 1]


def test_memory_beyond_a_tensor_is_never_touched() -> None:
    """In a process of its own: a read or write past the end is a segmentation fault there."""
    script = Path(__file__).with_name("guard_pages.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, f"exit {done.returncode}: {done.stdout}{done.stderr}"
    assert done.stdout.split() == _cpu.isas()


def test_schedule_is_longest_first() -> None:
    assert cpu.schedule([3, 130, 0, 64, 65]).tolist() == [[1, 0], [1, 1], [1, 2], [4, 0], [4, 1], [3, 0], [0, 0]]
    assert cpu.schedule([]).shape == (0, 2)
    assert cpu.schedule([0]).dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_floats_are_the_references(dtype: torch.dtype) -> None:
    x, cu = normal(6, 32, dtype=dtype), offsets([6])
    norm = Norm(torch.ones(32), None, 1e-5)
    q, k, v = x.view(6, 4, 8).split((2, 1, 1), 1)

    def rope(ops: Any) -> Tensor:
        y = x.clone()
        ops.qk_norm_rope(y, 2, 1, q_norm=Norm(None, None, 1e-5))
        return y

    calls: list[Callable[[Any], Tensor]] = [
        lambda o: o.rms_norm(x, norm),
        lambda o: o.layer_norm(x, norm),
        lambda o: o.swiglu(x),
        lambda o: o.geglu(x, tanh=True),
        lambda o: o.gelu(x, tanh=True),
        lambda o: o.embed(torch.tensor([3, 0]), x, norm=norm),
        lambda o: o.pool(x, cu, torch.tensor([[1, 6]], dtype=torch.int32), "mean", norm=norm),
        lambda o: o.attention(q, k, v, cu, cu, o.schedule([6]), causal=True, scale=0.3),
        rope,
    ]
    for call in calls:
        assert torch.equal(call(cpu), call(reference))


X, CU, TILES = normal(6, 32), offsets([6]), cpu.schedule([6])
NORM = Norm(torch.ones(32), None, 1e-5)
SPANS = torch.tensor([[0, 6]], dtype=torch.int32)
Q = X.view(6, 4, 8)
IDS = torch.arange(6)


def attend(**changes: Any) -> Tensor:
    given = {"q": Q, "k": Q[:, :2], "v": Q[:, 2:], "cu_q": CU, "cu_k": CU, "schedule": TILES, "causal": False, "scale": 1.0} | changes
    return cpu.attention(**given)


def prefixed(**changes: Any) -> Tensor:
    given = {"k": Q[:, :2], "v": Q[:, :2], "cu_p": CU, "prefix_of": CU[:1]} | changes
    return attend(prefix=Prefix(**given))


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: cpu.rms_norm(X.int(), NORM), "activations must be float32, bfloat16, float16 or float64, got torch.int32"),
    (lambda: cpu.rms_norm(X[0], NORM), r"x must have shape \[-1, -1\] \(-1: any\), got \[32\]"),
    (lambda: cpu.rms_norm(X.t().contiguous().t(), NORM), r"x must have unit stride in its last dimension, got strides \(1, 6\)"),
    (lambda: cpu.rms_norm(X.to("meta"), NORM), "x must be a torch.float32 tensor on the CPU, got torch.float32 on meta"),
    (lambda: cpu.rms_norm(X, Norm(torch.ones(31), None, 1e-5)), r"norm.weight must have shape \[32\] \(-1: any\), got \[31\]"),
    (
        lambda: cpu.rms_norm(X, Norm(torch.ones(32).bfloat16(), None, 1e-5)),
        "norm.weight must be a torch.float32 tensor .* got torch.bfloat16",
    ),
    (lambda: cpu.layer_norm(X, NORM, residual=X[:5]), r"residual must have shape \[6, 32\]"),
    (lambda: cpu.layer_norm(X, NORM, residual=X.bfloat16()), "residual must be a torch.float32 tensor"),
    (lambda: cpu.layer_norm(X, NORM, residual=X[:1].expand(6, 32)), "residual is written, so its rows must not overlap"),
    (lambda: cpu.layer_norm(X, NORM, quant="int4"), "quant must be None, 'int8' or 'fp8', got 'int4'"),
    (lambda: cpu.swiglu(X[:, :7]), "side by side, got an odd number of columns: 7"),
    (lambda: cpu.embed(IDS + 1, X), r"input_ids must be in \[0, 6\), got 6 at index 5"),
    (lambda: cpu.embed(IDS - 1, X), r"input_ids must be in \[0, 6\), got -1 at index 0"),
    (lambda: cpu.embed(IDS.int(), X), "input_ids must be a torch.int64 tensor"),
    (lambda: cpu.embed(IDS[::2], X), "input_ids must have unit stride"),
    (lambda: cpu.embed(IDS, X, position_table=X), "position_table was given without positions"),
    (lambda: cpu.embed(IDS, X, positions=IDS, position_table=X[:5]), r"positions must be in \[0, 5\), got 5 at index 5"),
    (lambda: cpu.embed(IDS, X, positions=IDS, position_table=X.bfloat16()), "position_table must be a torch.float32 tensor"),
    (lambda: cpu.embed(IDS, X, type_row=X[0, :5]), r"type_row must have shape \[32\]"),
    (lambda: cpu.qk_norm_rope(X, 3, 2), r"qkv has 32 columns, which are not 3 \+ 2 \* 2 heads"),
    (lambda: cpu.qk_norm_rope(X, 2, 1, cos=X), "cos was given without sin or rows"),
    (lambda: cpu.qk_norm_rope(X, 2, 1, cos=X, sin=X, rows=IDS), "cos has 32 columns, which rotate 64 dimensions, but a head has 8"),
    (lambda: cpu.qk_norm_rope(X, 2, 1, cos=X[:, :4], sin=X[:, :4], rows=IDS + 1), r"rows must be in \[0, 6\), got 6 at index 5"),
    (lambda: attend(k=Q[:, :3], v=Q[:, :3]), "4 query heads are not a multiple of 3 key/value heads"),
    (lambda: attend(v=Q[:5, 2:]), r"v must have shape \[6, 2, 8\] \(-1: any\), got \[5, 2, 8\]"),
    (lambda: attend(schedule=None), r"schedule must be what schedule\(lengths\) of this module returned, got NoneType"),
    (lambda: attend(schedule=cpu.schedule([70])), r"schedule must be made by schedule\(lengths\) from the lengths of the queries in cu_q"),
    (lambda: attend(schedule=TILES + 1), "schedule must be made by"),
    (lambda: attend(cu_q=CU.long()), "cu_q must be a torch.int32 tensor"),
    (lambda: attend(cu_q=CU[:0]), "cu_q must have one entry more than there are sequences, got none"),
    (lambda: attend(cu_k=CU + 1), r"cu_k must not decrease and must stay in \[0, 6\], got 7 at index 1"),
    (lambda: attend(cu_k=CU.flip(0)), "cu_k must not decrease"),
    (lambda: attend(softcap=0.0), "softcap must be positive or None, got 0.0"),
    (lambda: attend(bias=DistanceBias(torch.zeros(3, 5))), r"bias.table must have shape \[4, -1\]"),
    (lambda: attend(bias=DistanceBias(torch.zeros(4, 6))), "bias.table must have an odd number of columns, got 6"),
    (lambda: attend(q_start=CU), r"q_start must have shape \[1\]"),
    (lambda: attend(q_start=CU[1:] - 7), r"q_start must be a position below 2\^24, got -1 at index 0"),
    (lambda: attend(q_start=CU[1:] + 2**24), r"q_start must be a position below 2\^24, got 16777222 at index 0"),
    (lambda: prefixed(k=Q), r"prefix.k must have shape \[-1, 2, 8\]"),
    (lambda: prefixed(prefix_of=CU[1:]), "prefix_of must be below 1, got 6"),
    (lambda: prefixed(cu_p=CU + 1), r"cu_p must not decrease and must stay in \[0, 6\], got 7 at index 1"),
    (lambda: cpu.pool(X, CU, SPANS + 1, "mean"), r"spans must lie in \[0, 6\], got \(1, 7\) for text 0"),
    (lambda: cpu.pool(X, CU, SPANS, "median"), "mode must be one of cls, max, .*, got 'median'"),  # type: ignore[arg-type]
    (lambda: cpu.pool(X, CU, SPANS, "mean", dim=33), "dim must be between 1 and the 32 columns of x, got 33"),
    (lambda: cpu.pool(X, CU[:1], SPANS, "mean"), r"cu_seqlens must have shape \[2\]"),
]


@pytest.mark.parametrize(("call", "sentence"), REFUSED, ids=[sentence[:40] for _, sentence in REFUSED])
def test_refused_with_a_sentence(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()
