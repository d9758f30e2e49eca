"""The C compiler that Triton needs once, to build what loads its kernels; what that and the kernels become is kept in Triton's cache.

Triton takes CC, else gcc or clang of the PATH, and the headers of this Python. Where its cache holds what it would build, it needs neither,
so nothing is refused beforehand: what fails is told as it fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WANTED = "Triton needs a C compiler and this Python's headers once, to build what loads its kernels"


class NoCompiler(RuntimeError):
    """Triton cannot build what loads its kernels."""


@contextmanager
def building() -> Iterator[None]:
    """NoCompiler, with the reason and the way out, where a build of Triton's fails inside."""
    try:
        yield
    except Exception as error:
        if not of_build(error):
            raise
        why = obstacle() or f"{WANTED}, and that failed; what the compiler said stands above. ({' '.join(str(error).split())})"
        raise NoCompiler(why) from error


def of_build(error: Exception) -> bool:
    """Whether an error was raised while Triton built C code: by no compiler, by one that fails, by a cache that cannot be written."""
    build = getattr(sys.modules.get("triton.runtime.build"), "__file__", None)
    return any(frame.f_code.co_filename == build for frame, _ in traceback.walk_tb(error.__traceback__))


def obstacle() -> str | None:
    """Why Triton could not build C code for this Python, found by doing what it would do; None: it could."""
    from triton import knobs

    if knobs.build.impl is not None:
        return None  # whoever set it builds
    named = os.environ.get("CC")
    compiler = shutil.which("gcc") or shutil.which("clang") if named is None else shutil.which(named)
    if compiler is None:
        came = "there is no gcc and no clang on the PATH" if named is None else f"CC is {named!r}, which is no program here"
        return f"{WANTED}, and {came}. `apt-get install gcc` brings one; CC may name any."
    folder = sysconfig.get_paths(scheme="posix_prefix" if (usual := sysconfig.get_default_scheme()) == "posix_local" else usual)["include"]
    with tempfile.TemporaryDirectory() as place:
        source = Path(place, "probe.c")
        source.write_text("#include <stdlib.h>\n#include <Python.h>\nPyObject *probe(void) { return PyLong_FromLong(labs(-1)); }\n")
        command = [compiler, str(source), "-shared", "-fPIC", "-o", str(source.with_suffix(".so")), f"-I{folder}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
        except OSError as error:
            return f"{WANTED}, and {compiler} does not run: {error.strerror}. CC may name another."
    if done.returncode == 0:
        return None
    said = next((line for line in done.stderr.splitlines() if "error" in line), f"exit status {done.returncode}")
    if "Python.h" in said:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"{WANTED}, and {folder} has no Python.h. `apt-get install python3-dev` (python{version}-dev) brings a system Python's."
    return f"{WANTED}, and {compiler} cannot build with them: {said.strip()}. `apt-get install build-essential` brings what C needs."


def cache() -> Path:
    """Where Triton keeps what it has compiled: TRITON_CACHE_DIR, or .triton/cache at home."""
    from triton import knobs

    return Path(knobs.cache.dir)


def compiled() -> set[Path]:
    """The folders of Triton's cache, one for each kernel with its launch, and for what was built in C."""
    return set(cache().iterdir()) if cache().is_dir() else set()
