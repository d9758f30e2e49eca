"""The Triton kernels against the reference, on the CPU: tests/kernels/interpreted in a process where triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_every_kernel_interpreted() -> None:
    # numpy and torch work on small pieces here, where threads cost more than they bring
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", str(HERE / "interpreted")]
    done = subprocess.run(command, cwd=HERE.parent.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout, done.stdout[-4000:]
