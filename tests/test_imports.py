"""What an import costs and pulls in, who may import whom, and what no file of the repository holds."""

from __future__ import annotations

import ast
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 400  # lines of a file of ours


def fresh(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def files(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern) if "__pycache__" not in path.parts)


def test_import_is_quick(tmp_path, monkeypatch):
    """At most 0.15 s of this process's own time beyond torch; processor time, which other work on the machine moves little.

    With byte code, which the environment may forbid to write, and without the collection of torch's objects that falls due then.
    """
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    timed = "start = time.process_time(); import pyembed; pyembed.Encoder; print(time.process_time() - start)"
    code = f"import gc, time, torch; gc.disable(); {timed}"
    fresh(code)  # writes the byte code
    assert list(tmp_path.rglob("encoder.*.pyc"))
    times = [float(fresh(code)) for _ in range(5)]
    assert statistics.median(times) <= 0.15, times


def test_import_leaves_alone_what_may_be_absent_or_is_slow():
    loaded = set(json.loads(fresh("import json, sys, pyembed; pyembed.Encoder; print(json.dumps(list(sys.modules)))")))
    unwanted = {"triton", "pyembed._cpu", "pyembed._cuda", "transformers", "sentence_transformers", "huggingface_hub", "pyembed.cli"}
    # torch itself may look for triton; what counts is what comes on top
    with_torch = set(json.loads(fresh("import json, sys, torch; print(json.dumps(list(sys.modules)))")))
    assert not unwanted & (loaded - with_torch)


def test_encoding_loads_no_reference_implementation(minilm):
    code = f"import pyembed, sys; pyembed.Encoder({str(minilm)!r}).encode('text'); print([name for name in sys.modules])"
    assert not {"transformers", "sentence_transformers", "huggingface_hub"} & set(ast.literal_eval(fresh(code)))


def test_verifying_imports_the_reference_implementation_only_to_ask_it(minilm):
    code = "import sys, pyembed.verify; from pyembed.cli import main; main(['verify']); print([name for name in sys.modules])"
    assert not {"transformers", "sentence_transformers", "huggingface_hub"} & set(ast.literal_eval(fresh(code).splitlines()[-1]))


def test_nothing_below_imports_what_stands_on_it():
    for path in files("pyembed/**/*.py", "kernels/*.py"):
        if path.relative_to(ROOT).parts[1] in ("adapters", "jobs", "server"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                assert node.level == 0, f"{path}: relative import"
            for name in names:
                assert not re.match(r"pyembed\.(adapters|jobs|server)\b", name), f"{path} imports {name}"
                if re.match(r"(transformers|sentence_transformers)\b", name):
                    inside = node.col_offset > 0 and path.name == "original.py"  # the other side of `pyembed verify`, in functions
                    assert inside, f"{path} imports {name}"


OURS = files("pyembed/**/*.py", "kernels/*.py", "csrc/**/*.cpp", "csrc/**/*.h")


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LIMIT


def test_no_file_names_a_machine():
    """Paths of one machine, and hosts of package indices, have no place in what others run."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![\w.])/(?:home|root|Users|work|opt|tmp|mnt)/\w|(?:--(?:extra-)?index-url|--find-links)\b")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path != Path(__file__).resolve():
            found = pattern.search(path.read_text(encoding="utf-8", errors="replace"))
            assert not found, f"{name}: {found and found[0]}"
