"""Fixtures of the kernel tests. The tests' folder goes on sys.path for the helpers that they share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

BUILT = find_spec("pyembed._cpu") is not None or os.environ.get("PYEMBED_REQUIRE_NATIVE") == "1"
if not BUILT:
    collect_ignore_glob = ["test_cpu_*.py"]


def isas() -> list[str]:
    if not BUILT:
        return []
    import torch  # noqa: F401  first, so that the extension finds torch's libgomp and shares its threads

    from pyembed import _cpu

    return list(_cpu.isas())


@pytest.fixture(params=isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces one variant of the kernels; the test fails if another one ran, or none.

    One thread unless the test asks for more: threads that wait for each other spin, which takes minutes on a busy machine.
    """
    import torch

    from pyembed import _cpu

    torch.set_num_threads(1)

    usual = _cpu.isa()
    _cpu.force_isa(request.param)
    yield request.param
    ran = _cpu.last_isa()
    _cpu.force_isa(usual)
    assert ran == request.param, f"forced {request.param}, but '{ran}' ran"
