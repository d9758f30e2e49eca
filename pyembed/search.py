"""Nearest texts, and how a terminal shows them."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pyembed.encoder import Encoder

Array = np.ndarray[Any, Any]
WIDEST = 100  # columns; longer lines are hard to read
LINES = 3  # of a text
BOLD, DIM, CYAN = "1", "2", "36"
REMEDY = "Delete the file, or name another."


@dataclass(frozen=True, slots=True)
class Entry:
    """One text of the corpus and what it is called."""

    name: str
    text: str


def fingerprint(entries: Sequence[Entry]) -> str:
    """SHA-256 of the texts in their order."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(entry.text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def digest_of(index: Path) -> Path:
    """Where the fingerprint of the corpus stands that an index was made from."""
    return index.with_name(index.name + ".sha256")


def check_index(path: Path, encoder: Encoder, entries: Sequence[Entry]) -> Array:
    """The vectors stored at `path`. ValueError unless they are those of this corpus by this model, as far as a sample shows."""
    try:
        vectors = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not an .npy file ({error}).") from error
    if not isinstance(vectors, np.ndarray) or vectors.dtype != np.float32 or vectors.shape != (len(entries), encoder.dim):
        found = f"{vectors.dtype} {list(vectors.shape)}" if isinstance(vectors, np.ndarray) else "an archive"
        raise ValueError(f"{path} holds {found}; this corpus and model give float32 {[len(entries), encoder.dim]}. {REMEDY}")
    if digest_of(path).is_file() and digest_of(path).read_text().strip() != fingerprint(entries):
        raise ValueError(f"{path} was made from other texts: {digest_of(path).name} is not that of this corpus. {REMEDY}")
    sample = np.unique(np.linspace(0, len(entries) - 1, num=4, dtype=int)) if entries else np.empty(0, int)
    fresh = encoder.encode_document([entries[i].text for i in sample])
    for i, vector in zip(sample, fresh, strict=True):
        if not np.allclose(vectors[i], vector, rtol=0, atol=0.1 * np.abs(vector).max()):  # bfloat16 against float32 is well below
            raise ValueError(f"{path}: vector {i} is not that of {entries[i].name} by this model. {REMEDY}")
    return vectors


def nearest(encoder: Encoder, query: str, vectors: Array, k: int) -> list[tuple[float, int]]:
    """(score, index) of the k texts nearest to a query, the best first."""
    scores = encoder.similarity(encoder.encode_query(query), vectors)[0]
    best, where = scores.topk(min(k, len(vectors)))
    return list(zip(best.tolist(), where.tolist(), strict=True))


def show(query: str, found: Sequence[tuple[float, int]], entries: Sequence[Entry]) -> str:
    """A query and its answers as lines for the terminal."""
    width = min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)
    out = ["", styled(BOLD, fitted(query, width)[0])]
    for rank, (score, index) in enumerate(found, 1):
        entry, number = entries[index], f"{rank:>{len(str(len(found)))}}"
        margin = " " * (len(number) + 2)
        title = fitted(entry.name, max(width - len(margin) - 8, 8))[0]
        out += ["", f"{styled(DIM, number)}  {styled(CYAN, title)}  {styled(DIM, f'{score:.3f}')}"]
        out += [margin + line for line in fitted(entry.text, width - len(margin), LINES)]
    return "\n".join(out)


def fitted(text: str, width: int, lines: int = 1) -> list[str]:
    """The start of a text in at most so many lines of so many columns, with an ellipsis where it was cut.

    Line breaks and control characters become spaces: a text must not move the cursor or change colours.
    """
    shown = text[: (width + 1) * (lines + 1) * 4]  # enough, and a text may have a megabyte
    words = "".join(c if c.isprintable() else " " for c in shown).split()
    out, used = [""], 0
    for word in words:
        gap = 1 if used else 0
        if used and used + gap + columns(word) > width:
            out.append("")
            used = gap = 0
        out[-1] += " " * gap
        used += gap
        for c in word:
            if used + columns(c) > width:
                out.append("")
                used = 0
            out[-1] += c
            used += columns(c)
        if len(out) > lines:
            break
    if len(out) > lines:
        last = out[lines - 1]
        while columns(last) > width - 2:
            last = last.rpartition(" ")[0] or last[:-1]
        out[lines - 1 :] = [last + " …"]
    return out


def columns(text: str) -> int:
    """How wide a terminal shows a text: two columns for wide East Asian characters and emoji, none for combining marks."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def styled(code: str, text: str) -> str:
    """In colour on a terminal, unless NO_COLOR is set."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{code}m{text}\x1b[0m"
