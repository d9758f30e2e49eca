"""The Triton kernels against the reference, on the CPU: tests/kernels/matrix in a process where triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SLOW = ("test_attention.py", "test_bench.py", "test_forward.py")  # about half of the time


@pytest.fixture(scope="module")
def interpreters() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Two processes at once: numpy and torch work on small pieces here, where threads cost more than they bring."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    files = sorted((HERE / "matrix").glob("test_*.py"))
    parts = {"slow": [each for each in files if each.name in SLOW], "others": [each for each in files if each.name not in SLOW]}
    assert len(parts["slow"]) == len(SLOW)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5"]
    started = {
        name: subprocess.Popen(
            [*command, *map(str, part)], cwd=HERE.parent.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name, part in parts.items()
    }
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("part", ["slow", "others"])
def test_every_kernel_interpreted(interpreters: dict[str, subprocess.Popen[str]], part: str) -> None:
    told, _ = interpreters[part].communicate()
    assert interpreters[part].returncode == 0, told[-12000:]
    assert " passed" in told
    assert "skipped" not in told, told[-4000:]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_a_card_gets_the_same_tests(tmp_path: Path) -> None:
    """Those marked gpu, where there is a device, which here is made up: all that are interpreted but those of the interpreter."""
    (tmp_path / "a_card.py").write_text(
        "import torch\ntorch.cuda.is_available = lambda: True\ntorch.cuda.get_device_capability = lambda *_: (9, 0)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only"]

    def collected(*options: str, **variables: str) -> list[str]:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
        done = subprocess.run([*command, *options, str(HERE / "matrix")], cwd=HERE.parent.parent, env=env, capture_output=True, text=True)
        return [line for line in done.stdout.splitlines() if "::" in line]

    card = collected("-p", "a_card", "-m", "gpu", PYTHONPATH=str(tmp_path))
    interpreted = collected(TRITON_INTERPRET="1")
    assert len(card) > 100
    assert card == [each for each in interpreted if "test_repairs" not in each]
    assert len(interpreted) > len(card)
