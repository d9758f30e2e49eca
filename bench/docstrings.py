"""The docstrings of the Python standard library: about 7,500 real texts, of 1 to 1,500 words, that need no download.

    python bench/docstrings.py -o docstrings.jsonl      # one {"id": "json.dumps", "text": "Serialize ..."} a line

The files are read with `ast` and never imported. Order and content depend on the Python release alone.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages"}  # not the library's own prose
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings() -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every module, class and function that has one, in sorted order, each text once."""
    root = Path(sysconfig.get_paths()["stdlib"])
    seen = set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED & set(parts):
            continue
        with warnings.catch_warnings():  # invalid escapes in old files
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        for name, text in of_node(tree, ".".join(parts).removesuffix(".__init__")):
            if text and text not in seen:
                seen.add(text)
                yield name, text


def of_node(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """The docstrings of a node and of what is defined in it, by any depth of `if` and `try`."""
    if isinstance(node, Documented):
        yield name, (ast.get_docstring(node) or "").strip()
    for child in ast.iter_child_nodes(node):
        inner = f"{name}.{child.name}" if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) else name
        yield from of_node(child, inner)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="the JSONL file to write")
    path = parser.parse_args().output
    lines = [json.dumps({"id": name, "text": text}, ensure_ascii=False) for name, text in docstrings()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines):,} docstrings in {path}")


if __name__ == "__main__":
    main()
