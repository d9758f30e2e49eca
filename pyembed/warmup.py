"""Batches of every kind before the first that matters: on CUDA they compile what a model needs, for this process and for the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pyembed import compiler, info, prompts, request
from pyembed.compiler import NoCompiler
from pyembed.loading import kernels_of
from pyembed.ops import Backend
from pyembed.options import dtype_name
from pyembed.prefix import LEAST

if TYPE_CHECKING:
    from pyembed.encoder import Encoder

SHORT = ("When was that?", "Who says so?", "Where is it from?")
TEXT = "The first batch of a kind waits for what is built for it, and those that follow find it there. "
LONG = 160  # tokens: more than share a tile of attention, and more rows than pooling sums in one piece
PROMPT = "Instruct: Given a question, find the passages that answer it\nQuery: "  # for models that keep prompts and have none of their own

Kind = tuple[list[str], dict[str, Any]]  # texts of a call, and the arguments that say what is put before them


@dataclass(frozen=True, slots=True)
class Warmed:
    """Seconds that batches of every kind took."""

    first: float  # one short text, from the text to its vector
    others: float  # a batch of every kind, until each device and stream has met it, and recorded it where it records
    again: float  # a batch of every kind once more
    kinds: int


def warmup(encoder: Encoder) -> Warmed:
    """Run batches of every kind. Errors as `Encoder.encode`."""
    start = time.perf_counter()
    run(encoder, ([SHORT[0]], {}))
    first = time.perf_counter() - start
    every, engine = kinds(encoder), encoder._engine
    # Calls of one batch take lanes and streams in turn. The second batch of a form is what records its graph.
    turns = len(engine.lanes) * (2 * engine.budget.streams if on_cuda(encoder) else 1)
    for kind in every:
        for _ in range(turns):
            run(encoder, kind)
    others = time.perf_counter() - start - first
    for kind in every:
        run(encoder, kind)
    return Warmed(first, others, time.perf_counter() - start - first - others, len(every))


def run(encoder: Encoder, kind: Kind) -> None:
    texts, arguments = kind
    encoder.encode(texts, show_progress_bar=False, **arguments)


def on_cuda(encoder: Encoder) -> bool:
    return any(device.type == "cuda" for device in encoder.devices)


def kinds(encoder: Encoder) -> list[Kind]:
    """Short texts, a long one and both together: with nothing asked for, as queries, as documents, and after a prompt that is kept."""
    tokens = max(1, min(LONG, (encoder.max_seq_length or 2 * LONG) // 2))
    long = pieces(encoder, tokens, -(-LONG // tokens))
    texts = ([SHORT[0]], long[:1], [*SHORT, *long])
    return [(each, arguments) for arguments in calls(encoder) for each in texts]


def pieces(encoder: Encoder, tokens: int, count: int) -> list[str]:
    """So many texts of so many tokens without special ones, no two of which begin alike."""
    text = TEXT * (tokens + count)  # a word is a token at least
    ends = [0, *encoder.tokenizer.ends(text)]
    return [text[ends[n] : ends[n + tokens]] for n in range(count)]


def calls(encoder: Encoder) -> list[dict[str, Any]]:
    """Arguments of `encode`, one for each thing that calls put around texts."""
    named = [prompts.named(encoder.spec, encoder.prompts, names, None, {}) for names in (("query",), ("document", "passage", "corpus"))]
    found: dict[Any, tuple[prompts.Form, dict[str, Any]]] = {}
    for arguments in ({}, *named, {"prompt": PROMPT}):
        if "prompt" in arguments and (not encoder._engine.reuses or any(keeps(encoder, form) for form, _ in found.values())):
            continue
        with suppress(ValueError):  # its template has no place for a prompt, so no call puts one there
            form = request.form(encoder, max_length=encoder.max_seq_length, **arguments)
            found.setdefault((form.templates, form.prompt), (form, arguments))
    return [arguments for _, arguments in found.values()]


def keeps(encoder: Encoder, form: prompts.Form) -> bool:
    """Whether texts of a form begin with tokens whose states are kept."""
    return any(len(ids) >= LEAST for ids in prompts.beginnings(encoder.tokenizer, form))


def report(make: Callable[[], Encoder], devices: Sequence[torch.device], backend: Backend | None, start: float) -> str:
    """What `pyembed warmup` prints, of the encoder that `make` loads; the clock has run since `start`.

    NoCompiler before anything is loaded where nothing is compiled yet and nothing can be.
    """
    triton = "pyembed.ops.cuda" in [kernels_of(device, torch.float32, backend).__name__ for device in devices]
    before = compiler.compiled() if triton else set()
    if triton and not before and (why := compiler.obstacle()) is not None:
        raise NoCompiler(why)
    encoder = make()
    loaded = time.perf_counter() - start
    took = warmup(encoder)
    backends = " + ".join(dict.fromkeys(info.kernels(each) for each in encoder._engine.backends))
    rows = [
        ("runs on", f"{info.places(encoder.devices)} in {dtype_name(encoder.dtype)}, kernels: {backends}"),
        ("load", f"{loaded:8.2f} s  with what is imported"),
        ("first embedding", f"{took.first:8.2f} s  {loaded + took.first:.2f} s after the start"),
        ("other batches", f"{took.others:8.2f} s  of {took.kinds} kinds"),
        ("once more", f"{took.again:8.2f} s"),
    ]
    if triton:
        after, folder = compiler.compiled(), compiler.cache()
        rows.append(("compiled", f"{len(after - before):,} kernels and launchers, {len(before):,} were there, in {folder}"))
        rows.append(("next process", "finds them there; TRITON_CACHE_DIR names another folder"))
    elif on_cuda(encoder):
        rows.append(("next process", "finds nothing: no kernel of pyembed's serves, and what PyTorch's libraries load, each process loads"))
    else:
        rows.append(("next process", "finds nothing: what oneDNN builds for the sizes of batches, each process builds anew"))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:{width}}  {what}" for label, what in rows)
