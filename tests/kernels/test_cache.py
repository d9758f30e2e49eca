"""What Triton needs beside a GPU: a cache that the next process finds kernels in, and a C compiler with Python's headers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from test_compiled import VERSIONS, older
from triton.runtime import build

from pyembed import compiler, runner
from pyembed.compiler import NoCompiler, building, obstacle
from pyembed.ops import reference
from pyembed.runner import Loaded

HERE = Path(__file__).resolve().parent
KERNELS = ("attention", "norm", "rope", "embed", "swiglu", "pool", "pool in pieces")
COMPILE = f"""
import json, os, sys
sys.path[:0] = [{str(HERE)!r}]
import test_compiled, ahead, triton
hits = []
triton.knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
for name in {KERNELS!r}:
    for launch in ahead.launches(lambda: test_compiled.SIZES[name](int(sys.argv[1])), 90):
        ahead.compiled(launch, 90, os.environ["TRITON_CACHE_DIR"])
print(json.dumps([triton.__version__, hits]))
"""
VARIES = """
import os
import triton, triton.language as tl
PROCESS = tl.constexpr(os.getpid())
@triton.jit
def varies_kernel(x):
    tl.store(x, PROCESS)
"""


def told(code: str, tokens: int, cache: Path, **variables: str) -> Any:
    command = [sys.executable, "-W", "ignore", "-c", code, str(tokens)]
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache), **variables}
    return json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_next_process_compiles_nothing(tmp_path: Path, version: str) -> None:
    """Of another batch, with other hashes of strings and another folder to work in."""
    found, first = told(COMPILE, 17, tmp_path, PYTHONHASHSEED="1", **older(version))
    assert found == "3.6.0" or version == "installed"
    assert len(first) >= len(KERNELS) and not any(first)
    before = files(tmp_path)
    _, second = told(COMPILE, 40, tmp_path, PYTHONHASHSEED="2", **older(version))
    assert second == [True] * len(first)
    assert files(tmp_path) == before


def test_a_kernel_that_varies_from_process_to_process_is_seen(tmp_path: Path) -> None:
    """What the test above rests on."""
    (tmp_path / "varies.py").write_text(VARIES)
    call = "sys.path.append({!r}); import torch, varies; SIZES = {{'attention': lambda n: varies.varies_kernel[(1,)](torch.empty(n))}}"
    code = COMPILE.replace(repr(KERNELS), "('attention',)").replace("hits = []", f"hits = []; {call.format(str(tmp_path))}")
    code = code.replace("test_compiled.SIZES", "SIZES")
    assert [told(code, 17, tmp_path / "cache")[1] for _ in range(2)] == [[False], [False]]


# The compiler


SOURCE = """
#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "trivial"};
PyObject *PyInit_trivial(void) { return PyModule_Create(&definition); }
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with nothing in it, and a Triton that has not looked for a compiler yet."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    getattr(getattr(build, "_find_compiler", None), "cache_clear", lambda: None)()
    return tmp_path / "cache"


def broken(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take away what Triton needs; the sentence that says so."""
    if kind == "no compiler":
        monkeypatch.setenv("PATH", str(folder))
        return r"there is no gcc and no clang on the PATH\. `apt-get install gcc`"
    if kind == "CC":
        monkeypatch.setenv("CC", "no-such-compiler")
        return r"CC is 'no-such-compiler', which is no program here"
    if kind == "no program":
        monkeypatch.setenv("CC", str(folder / "text"))
        (folder / "text").write_bytes(b"\0")
        (folder / "text").chmod(0o755)
        return r"text does not run: Exec format error"
    if kind == "no headers":
        paths = sysconfig.get_paths
        monkeypatch.setattr(sysconfig, "get_paths", lambda *_, **given: {**paths(**given), "include": str(folder)})
        return rf"{folder} has no Python\.h\. `apt-get install python3-dev`"
    (folder / "cc").write_text("#!/bin/sh\necho 'fatal error: stdlib.h: No such file' >&2\nexit 1\n")
    (folder / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(folder / "cc"))
    return r"cc cannot build with them: fatal error: stdlib\.h: No such file\. `apt-get install build-essential`"


KINDS = ("no compiler", "CC", "no program", "no headers", "no libc")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_missing_is_a_sentence(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Of Triton's own build, in this process."""
    assert obstacle() is None
    wanted = broken(kind, tmp_path, monkeypatch)
    with pytest.raises(NoCompiler, match=f"^Triton needs a C compiler and .* once, .*{wanted}") as raised, building():
        build.compile_module_from_src(SOURCE, "trivial")
    assert isinstance(raised.value, RuntimeError) and raised.value.__cause__ is not None
    assert not list(cache.rglob("*.so"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_built_needs_no_compiler(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    build.compile_module_from_src(SOURCE, "trivial")
    (kept,) = cache.rglob("*.so")
    assert compiler.cache() == cache and kept.parent in compiler.compiled()
    broken(kind, tmp_path, monkeypatch)
    with building():
        assert build.compile_module_from_src(SOURCE, "trivial").__name__ == "trivial"


def test_a_build_that_fails_for_another_reason(cache: Path) -> None:
    with pytest.raises(NoCompiler, match=r"and that failed; what the compiler said .* exit status 1\.\)$"), building():
        build.compile_module_from_src("no C at all", "trivial")
    assert not cache.exists() or not list(cache.rglob("*.so"))


def test_other_errors_stay_what_they_are() -> None:
    for error in (RuntimeError("Failed to find C compiler"), FileNotFoundError("gcc"), subprocess.CalledProcessError(1, ["gcc"])):
        with pytest.raises(type(error)) as raised, building():
            raise error
        assert raised.value is error


@pytest.mark.usefixtures("cache")
def test_a_batch_on_a_card_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever launches the first kernel: a probe at load or a batch; a lock is not left shut."""
    model: Any = Loaded(None, None, reference, torch.device("cuda", 0), torch.bfloat16)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    wanted = broken("no compiler", tmp_path, monkeypatch)
    for _ in range(2):
        with pytest.raises(NoCompiler, match=wanted), runner.device_of(model):
            build.compile_module_from_src(SOURCE, "trivial")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_of_triton_says_it(tmp_path: Path, version: str) -> None:
    code = f"""
import json, pyembed.compiler, triton
from triton.runtime import build
try:
    with pyembed.compiler.building():
        build.compile_module_from_src({SOURCE!r}, "trivial")
except RuntimeError as error:
    print(json.dumps([triton.__version__, type(error).__name__, str(error)]))
"""
    found, kind, sentence = told(code, 0, tmp_path, **older(version), PATH=str(tmp_path), CC="")
    assert found == "3.6.0" or version == "installed"
    assert kind == "NoCompiler" and "CC is '', which is no program here" in sentence
