"""`ops/cuda.py` as a backend: what it exports, and when it is taken."""

from __future__ import annotations

import importlib.util
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from pyembed import Encoder, ops
from pyembed.loading import check_kernels, kernels_of
from pyembed.ops import Ops, cuda, reference, select

CUDA = torch.device("cuda", 0)


def test_the_same_names_and_signatures_as_the_reference() -> None:
    names = [name for name in vars(Ops) if not name.startswith("_") and callable(getattr(Ops, name))]
    assert set(names) == set(cuda.__all__)
    assert cuda.FROM_REFERENCE == ("int8", "linear")
    for name in names:
        mine, theirs = getattr(cuda, name), getattr(reference, name)
        assert (mine is theirs) == (name in cuda.FROM_REFERENCE), name
        a, b = inspect.signature(mine), inspect.signature(theirs)
        assert a.parameters == b.parameters, name
        assert a.return_annotation == b.return_annotation or name == "schedule"


def test_taken_where_asked_for_or_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.CUDA_RECORD is None
    assert select(CUDA) is reference
    assert select(CUDA, "kernels") is cuda
    monkeypatch.setattr(ops, "CUDA_RECORD", "bench/results/a-gpu.json")
    assert select(CUDA) is cuda
    assert select(CUDA, "reference") is reference


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest))


@pytest.mark.parametrize(("device", "package"), [("cuda", "triton"), ("cpu", "pyembed._cpu")])
def test_kernels_that_are_not_here(monkeypatch: pytest.MonkeyPatch, device: str, package: str) -> None:
    monkeypatch.setattr(ops, "CUDA_RECORD", "bench/results/a-gpu.json")
    without(monkeypatch, package)
    assert select(torch.device(device)) is reference
    with pytest.raises(ValueError, match=f"backend is 'kernels', but those for '{device}' need {package}"):
        select(torch.device(device), "kernels")


def test_what_serves_instead_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    family: Any = SimpleNamespace(float16=True)
    with pytest.warns(RuntimeWarning, match="No GPU has run pyembed's Triton kernels yet, so plain PyTorch serves"):
        check_kernels(family, CUDA, torch.bfloat16, None)
    monkeypatch.setattr(ops, "CUDA_RECORD", "bench/results/a-gpu.json")
    check_kernels(family, CUDA, torch.bfloat16, None)
    without(monkeypatch, "triton")
    with pytest.warns(RuntimeWarning, match="Triton is not installed, so plain PyTorch serves"):
        check_kernels(family, CUDA, torch.bfloat16, None)
    with pytest.raises(ValueError, match="there are none for float16"):
        check_kernels(family, torch.device("cpu"), torch.float16, "kernels")


def test_cards_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "CUDA_RECORD", "bench/results/a-gpu.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, module in (((7, 5), reference), ((8, 0), cuda)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert kernels_of(CUDA, torch.float32, None) is module
    family: Any = SimpleNamespace(float16=True)
    check_kernels(family, CUDA, torch.float32, "kernels")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"which need compute capability 8\.0; cuda:0 has less"):
        check_kernels(family, CUDA, torch.float32, "kernels")
    with pytest.warns(RuntimeWarning, match=r"cuda:0 is older than compute capability 8\.0"):
        check_kernels(family, CUDA, torch.float32, None)


def test_asked_for_on_a_cpu(minilm: Any) -> None:
    assert "backend=cpu" in repr(Encoder(minilm, device="cpu", backend="kernels"))
