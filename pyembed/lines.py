"""Texts from a file or a pipe, line by line: plain text, or JSONL. A line that is not what it should be is an error with its number."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Literal

Format = Literal["text", "jsonl"]
SUFFIXES: dict[str, Format] = {"": "text", ".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl"}


def format_of(path: str, chosen: Format | None) -> Format:
    """The format asked for, else that of the suffix; text on a pipe ("-"). ValueError where the suffix does not say."""
    if chosen is not None or path == "-":
        return chosen or "text"
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} ends in {suffix}, which does not say what it holds; pass --input-format text or jsonl.")
    return SUFFIXES[suffix]


def open_input(path: str) -> AbstractContextManager[BinaryIO]:
    """A file, or standard input for "-", as bytes: only newline ends a line, whatever else Unicode knows."""
    return nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb")


def count(path: str, form: Format) -> int | None:
    """How many texts a file holds, for the progress bar; None for a pipe."""
    if not Path(path).is_file():
        return None
    with open(path, "rb") as file:
        return sum(1 for line in file if form == "text" or not line.isspace())


def read(file: BinaryIO, name: str, form: Format, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(text, the JSON object it came in) per line: every line of a text file, empty ones too; every line of JSONL that is not blank."""
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        where = f"{name}, line {number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: byte {error.start + 1} is not UTF-8 ({error.reason}); convert the file first.") from error
        if form == "text":
            yield text.removesuffix("\n").removesuffix("\r"), {}
        elif not text.isspace():
            record = parse(text, where, field)
            yield record[field], record


def parse(text: str, where: str, field: str) -> dict[str, Any]:
    """One line of JSONL: an object whose `field` is a string."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}).") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a JSON {type(record).__name__}; expected an object with the field {field!r}.")
    if field not in record:
        raise ValueError(f"{where} has no field {field!r}; it has {', '.join(map(repr, record)) or 'none'}. Name the field with --field.")
    if not isinstance(record[field], str):
        raise ValueError(f"{where}: {field!r} is {json.dumps(record[field])[:40]}; expected a string.")
    return record
