"""The kernels against the reference: on the card that is here, or in Triton's interpreter, for which TRITON_INTERPRET is 1 when triton
is imported. The tests are the same and name no device: on a card it is the default."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from repairs import repair

from pyembed import Encoder, ops
from pyembed.graphs import Graphs
from pyembed.ops import cuda
from pyembed.ops.budget import Budget

HERE = Path(__file__).resolve().parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LIMIT = 256  # tokens of a batch that is replayed from a graph

if INTERPRETED:
    repair()
collect_ignore = [] if INTERPRETED else ["test_repairs.py"]


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """Tensors that name no device are made on the card."""
    torch.set_default_device(None if INTERPRETED else "cuda")
    yield
    torch.set_default_device(None)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Encoder]:
    """An encoder whose small batches are replayed from graphs, on the card, or interpreted from tapes."""
    torch.set_default_device(None)
    if INTERPRETED:
        monkeypatch.setattr(ops, "select", lambda device, backend=None: cuda if backend == "kernels" else ops.reference)
    budget = Budget(1024, graphs=LIMIT, streams=1)
    monkeypatch.setattr(cuda, "budget", lambda config, dtype, device: budget)

    def make(model: Path, **given: Any) -> Encoder:
        given = {"dtype": "float32", "backend": "kernels"} | given
        encoder = Encoder(model, device="cpu" if INTERPRETED else "cuda", **given)
        loaded, engine = encoder._loaded, encoder._engine
        if INTERPRETED:
            from tape import record

            engine.share = None
            loaded.graphs = (Graphs(loaded.spec, loaded.weights, loaded.ops, loaded.device, LIMIT, record, loaded.prefixes),)
        return encoder

    return make


@pytest.hookimpl(tryfirst=True)  # before tests are left out by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not INTERPRETED and HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
