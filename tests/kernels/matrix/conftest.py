"""The kernels against the reference: on the card that is here, or in Triton's interpreter, for which TRITON_INTERPRET is 1 when triton
is imported. The tests are the same and name no device: on a card it is the default."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from repairs import repair

HERE = Path(__file__).resolve().parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    repair()
collect_ignore = [] if INTERPRETED else ["test_repairs.py"]


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """Tensors that name no device are made on the card."""
    torch.set_default_device(None if INTERPRETED else "cuda")
    yield
    torch.set_default_device(None)


@pytest.hookimpl(tryfirst=True)  # before tests are left out by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not INTERPRETED and HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
