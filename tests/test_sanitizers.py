"""The extension built with AddressSanitizer and UndefinedBehaviorSanitizer: every kernel and variant, in a process of its own.

torch allocates with malloc here, so that a kernel that leaves a tensor, its input or its result, ends the process with a report.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = [f"tests/ops/test_cpu_{name}.py" for name in ("lengths", "linear_lengths", "linear", "attention", "pool")]
CHOICE = "lengths or odd_width or two_layers_are or test_options or test_prefix or test_queries_without_keys or test_a_norm_is_not_rounded"

# Puts the extension at sys.argv[1] in the place of the usual one.
INSTEAD = """
import importlib.util, sys
import torch, pyembed
spec = importlib.util.spec_from_file_location("pyembed._cpu", sys.argv[1])
_cpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_cpu)
sys.modules["pyembed._cpu"] = pyembed._cpu = _cpu
from pyembed.ops import cpu
assert cpu._cpu.__file__ == sys.argv[1]
"""


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def library(name: str) -> str | None:
    """The compiler's own copy of a library."""
    path = subprocess.run([str(compiler()), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    return path if Path(path).is_absolute() else None


def missing() -> str | None:
    if compiler() is None:
        return "no C++ compiler"
    return None if library("libasan.so") else "the compiler has no libasan"


MISSING = missing()
pytestmark = pytest.mark.skipif(MISSING is not None and os.environ.get("PYEMBED_REQUIRE_NATIVE") != "1", reason=f"no sanitizers: {MISSING}")


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sanitized build, in a directory of its own."""
    assert MISSING is None, f"PYEMBED_REQUIRE_NATIVE=1, but {MISSING}"
    to = tmp_path_factory.mktemp("sanitized")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(to), "--build-temp", str(to / "objects")]
    env = {**os.environ, "PYEMBED_SANITIZE": "1", "PYEMBED_REQUIRE_NATIVE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return next(to.glob("pyembed/_cpu*.so"))


def run(extension: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # libstdc++ is there from the start, because libasan looks for the function that throws when it starts
    preload = f"{library('libasan.so')} {library('libstdc++.so')}"
    env = {
        **os.environ,
        "OMP_WAIT_POLICY": "passive",
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-c", INSTEAD + code, str(extension), *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_every_kernel_and_variant(extension: Path) -> None:
    code = "import pytest; sys.exit(pytest.main(sys.argv[2:]))"
    done = run(extension, code, "-q", "-x", "-p", "no:cacheprovider", "-k", CHOICE, *TESTS)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
    assert "ERROR: " not in done.stderr, done.stderr[-4000:]


# Calls that say more than there is, each in a child for each variant: (exit status, what it said).
LIES = """
import json, os, tempfile
x, y, more, ids = torch.ones(4, 16), torch.empty(4, 16), torch.ones(9, 16), torch.zeros(4, dtype=torch.int64)
norm = lambda x, y, rows: _cpu.norm(0, 1, x.data_ptr(), rows, 16, 16, 0, 0, (0, 0, 1e-5, False, False), y.data_ptr(), 0, 0)
embed = lambda at: _cpu.embed(0, 1, ids.data_ptr() + at, 1, 16, x.data_ptr(), 16, 4, 1.0, 0, 0, 0, 0, 0, None, y.data_ptr())
calls = {
    "honest": lambda: (norm(x, y, 4), embed(0)),
    "read": lambda: norm(x, more, 5),
    "write": lambda: norm(more, y, 5),
    "misaligned": lambda: embed(4),
}
told = {}
for isa in _cpu.isas():
    _cpu.force_isa(isa)
    for name, call in calls.items():
        with tempfile.TemporaryFile() as said:
            child = os.fork()
            if child == 0:
                os.dup2(said.fileno(), 2)
                call()
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            said.seek(0)
            told[f"{isa} {name}"] = status, said.read().decode()
print(json.dumps(told))
"""
SAYS = {
    "read": ("AddressSanitizer: heap-buffer-overflow", "READ of size"),
    "write": ("AddressSanitizer: heap-buffer-overflow", "WRITE of size"),
    "misaligned": ("runtime error: load of misaligned address",),
}


def test_what_is_wrong_is_reported(extension: Path) -> None:
    """The instrumentation is alive in every variant."""
    done = run(extension, LIES)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout)
    from pyembed import _cpu

    assert len(told) == len(_cpu.isas()) * (1 + len(SAYS))
    for name, (status, said) in told.items():
        expected = SAYS.get(name.split()[1], ())
        assert (status != 0) == bool(expected), f"{name}: {said[-2000:]}"
        assert all(each in said for each in expected), f"{name}: {said[-2000:]}"


def test_it_never_replaces_the_extension_in_place() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=ROOT, env={**os.environ, "PYEMBED_SANITIZE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "does not replace the extension in place" in done.stderr
