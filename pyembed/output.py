"""Vectors to a file as they come: .npy, .safetensors or .jsonl, in memory that does not grow with their number.

Rows go to NAME.partial, which becomes NAME when all are there. The header has room for any number of rows and is rewritten in place, so
what was written before an interrupt, an error or a full disk stays readable.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
FORMATS = (".npy", ".safetensors", ".jsonl")
HEADER = {".npy": 128, ".safetensors": 128, ".jsonl": 0}  # bytes; both binary formats pad theirs with spaces
CHUNK = 1 << 20  # bytes of rows gathered before they are written
STORED = {"float32": "float32", "int8": "int8", "uint8": "uint8", "binary": "int8", "ubinary": "uint8"}  # precision -> dtype of the file
SAFETENSORS = {"float32": "F32", "int8": "I8", "uint8": "U8"}


def check_path(path: Path, *, overwrite: bool) -> None:
    """ValueError or OSError, before anything is computed, for an output that cannot be written."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'!r}; an output is one of {', '.join(FORMATS)}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} to.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file.")
    for there in (path, partial(path)):
        if there.exists() and not overwrite:
            raise FileExistsError(f"{there} exists already; move it away or pass --overwrite.")


def partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


class Output:
    """A file that vectors [dim] are appended to. End it with `finish`, which gives it its name, or with `keep`."""

    def __init__(self, path: Path, dim: int, dtype: np.dtype[Any], *, overwrite: bool) -> None:
        check_path(path, overwrite=overwrite)
        self.path, self.dim, self.dtype = path, dim, dtype
        # Rows and bytes in the file, and the rows that wait for it: replaced in one assignment, so that an interrupt, which may come
        # between any two, neither loses rows nor writes them twice.
        self._state: tuple[int, int, list[Array]] = (0, HEADER[path.suffix], [])
        self._file = open(partial(path), "w+b" if overwrite else "x+b", buffering=0)  # noqa: SIM115 - closed by finish and keep

    @property
    def rows(self) -> int:
        """Whole rows in the file."""
        return self._state[0]

    def append(self, row: Array) -> None:
        waiting = self._state[2]
        waiting.append(row)
        if len(waiting) * self.dim * self.dtype.itemsize >= CHUNK:
            self._flush()

    def finish(self) -> None:
        """Write what is waiting and rename the file. From there on no interrupt leaves it half done."""
        self._flush()
        with uninterrupted():
            os.fsync(self._file.fileno())
            self._file.close()
            partial(self.path).replace(self.path)

    def keep(self) -> None:
        """Leave NAME.partial with the whole rows that fit, under a header that counts them; with no rows, leave nothing."""
        with uninterrupted():
            if self._file.closed:
                return
            with suppress(OSError):  # a full disk: what fits counts
                try:
                    self._flush()
                except OSError:
                    while self._state[2]:
                        self._flush(1)
            self._file.truncate(self._state[1])
            self._write(header(self.path.suffix, self.rows, self.dim, self.dtype), 0)
            self._file.close()
            if not self.rows:
                partial(self.path).unlink()

    def _flush(self, count: int | None = None) -> None:
        """Write the waiting rows, or the first `count`, and then the header that counts them."""
        before, size, waiting = self._state
        rows = np.stack(waiting[:count]) if waiting else np.empty((0, self.dim), self.dtype)
        assert rows.shape[1:] == (self.dim,), (rows.shape, self.dim)
        assert rows.dtype == self.dtype, (rows.dtype, self.dtype)
        content = lines(rows) if self.path.suffix == ".jsonl" else rows.tobytes()
        self._write(content, size)
        self._state = (before + len(rows), size + len(content), waiting[len(rows) :])
        self._write(header(self.path.suffix, self.rows, self.dim, self.dtype), 0)

    def _write(self, content: bytes, at: int) -> None:
        self._file.seek(at)
        left = memoryview(content)
        while left:
            left = left[self._file.write(left) :]


def header(suffix: str, rows: int, dim: int, dtype: np.dtype[Any]) -> bytes:
    """The first HEADER[suffix] bytes of a file of [rows, dim] numbers."""
    if suffix == ".npy":
        text = repr({"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows, dim)})
        size = HEADER[suffix] - 10  # what the magic and the length leave
        return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + text.ljust(size - 1).encode("latin1") + b"\n"
    if suffix == ".safetensors":
        tensor = {"dtype": SAFETENSORS[dtype.name], "shape": [rows, dim], "data_offsets": [0, rows * dim * dtype.itemsize]}
        size = HEADER[suffix] - 8
        return size.to_bytes(8, "little") + json.dumps({"embeddings": tensor}, separators=(",", ":")).ljust(size).encode("ascii")
    return b""


def lines(rows: Array) -> bytes:
    """One {"embedding": [...]} per row; nine digits are what a float32 needs to come back as it was."""
    number = "%.9g" if rows.dtype.kind == "f" else "%d"
    line = '{"embedding": [' + ", ".join([number] * rows.shape[1]) + "]}\n"
    return "".join(line % tuple(row) for row in rows.tolist()).encode("ascii")


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and a polite kill wait outside."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
