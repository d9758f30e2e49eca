"""The one scheduler: texts arrive in windows, are tokenised, planned, run batch by batch, and placed in the caller's order."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyembed import heads, prompts
from pyembed.batch import PackedBatch, keep, pack, plan
from pyembed.config import ModelSpec
from pyembed.model import Weights, forward
from pyembed.ops import Ops
from pyembed.prefix import PrefixCache, Run, gathered, joined, shareable, shared_tokens
from pyembed.rows import Text, extent, prepare
from pyembed.sparse import SparseVector
from pyembed.tokenizer import Tokenizer

WINDOW_TEXTS = 1024  # texts in flight: what an interrupt loses, and what a stream reads before its first vector
WINDOW_CHARACTERS = 1 << 18
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 16384}  # CPU: `python bench/budget.py`, two Zen4 cores; CUDA: not measured


@dataclass(frozen=True, slots=True)
class Wordings:
    """A text in several wordings, whose vectors are averaged."""

    texts: tuple[str, ...]


Input = Text | Wordings  # a text, its token ids, or a text in several wordings


@dataclass(slots=True)
class Stats:
    """What an encoder has done since it was loaded."""

    texts: int = 0
    tokens: int = 0  # specials included
    truncated: int = 0  # texts that were cut to max_seq_length
    replaced: int = 0  # texts whose lone surrogates became U+FFFD
    prefix_tokens: int = 0  # of `tokens`, those whose states a prompt had already given
    duplicates: int = 0  # rows that repeated another of their window
    busy: float = 0.0  # seconds that a device computed, summed over devices

    def add(self, more: Stats) -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(more, each.name))


@dataclass(slots=True)
class Loaded:
    """A model on its device, with what its stations need."""

    spec: ModelSpec
    tokenizer: Tokenizer
    weights: Weights
    ops: Ops
    device: torch.device
    dtype: torch.dtype
    adapter: str | None = None  # of those to switch between
    prefixes: PrefixCache | None = None  # None: every text is run whole
    fits: int | None = None  # tokens of a batch: half of the smallest that ran out of memory
    lock: threading.Lock = field(default_factory=threading.Lock)  # around stations 4 to 7
    pid: int = field(default_factory=os.getpid)
    stats: Stats = field(default_factory=Stats)


@dataclass(frozen=True, slots=True)
class Job:
    """What one call asks for."""

    form: prompts.Form  # what is put around the texts
    budget: int  # tokens in a batch
    max_texts: int | None  # texts in a batch
    dim: int | None  # cut vectors to this many dimensions
    normalize: bool  # L2 after the cut
    narrow: bool = False  # pooling may read less than a text's tokens, whatever the prompt is
    tokens: bool = False  # also return the hidden states of every token
    sparse: Callable[[Tensor, list[str]], list[SparseVector]] | None = None  # makes vectors of logits [n, V] and texts instead


@dataclass(frozen=True, slots=True)
class Window:
    """Results of consecutive texts, in their order."""

    vectors: Tensor  # [n, dim] float32 on the CPU
    texts: int
    ids: list[np.ndarray]  # [length] int32 per row: a text has as many rows as templates and variants
    states: list[Tensor]  # [length, D] per row on the device; empty unless the job asks for them
    sparse: list[SparseVector]  # per text; empty unless the job asks for them, and then `vectors` has no rows
    truncated: int  # texts that were cut
    replaced: int  # texts whose lone surrogates became U+FFFD


def wordings(each: Input) -> tuple[Text, ...]:
    return each.texts if isinstance(each, Wordings) else (each,)


def windows(inputs: Iterable[Input]) -> Iterator[list[Input]]:
    """Consecutive inputs in lists that end at WINDOW_TEXTS inputs or WINDOW_CHARACTERS characters."""
    window: list[Input] = []
    characters = 0
    for each in inputs:
        window.append(each)
        characters += sum(map(extent, wordings(each)))
        if len(window) == WINDOW_TEXTS or characters >= WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


@contextmanager
def device_of(model: Loaded) -> Iterator[None]:
    """The model's device for one thread at a time, in the dtype it was loaded in whatever autocast says around us."""
    with model.lock, torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
        yield


def check_process(model: Loaded) -> None:
    """RuntimeError in a forked child, where OpenMP's and the tokenizer's threads are missing and a call would hang."""
    if os.getpid() != model.pid:
        raise RuntimeError(
            "This Encoder was made before the process forked, and its threads did not come along. Make the Encoder in the "
            "child, or start it with the 'spawn' method."
        )


def run(model: Loaded, job: Job, inputs: Iterable[Input], advance: Callable[[Stats], Any] | None = None) -> Iterator[Window]:
    """Results window by window, memory independent of how many texts there are. `advance` is told what each batch adds to the stats."""
    done = 0
    for window in windows(inputs):
        yield run_window(model, job, window, done, advance)
        done += len(window)


def run_window(model: Loaded, job: Job, inputs: list[Input], first: int, advance: Callable[[Stats], Any] | None) -> Window:
    """Stations 2 to 8 for the texts of one window; `first` is the index of its first text, for errors."""
    check_process(model)
    groups = [wordings(each) for each in inputs]
    rows = prepare(model.tokenizer, job.form, groups, first, model.spec.model.vocab_size, words=job.sparse is not None)
    texts = [text for group in groups for text in group]
    counts = [len(group) * len(job.form.templates) for group in groups]
    owner = np.repeat(np.arange(len(groups)), counts)  # the input of each row
    check_rows(model, rows.ids, owner + first)
    shared = beginnings(model, job, rows)
    twins = duplicates(rows) if job.sparse is None else {}
    token_states = [torch.empty(0, device="cpu")] * len(rows.ids) if job.tokens else []
    vectors: Tensor | None = None
    sparse: dict[int, SparseVector] = {}

    def place(indices: list[int]) -> None:
        nonlocal vectors
        given = [rows.ids[i] for i in indices], [rows.spans[i] for i in indices], [shared[i] for i in indices]
        made, states, seconds = run_batch(model, job, *given)
        if not bool(torch.isfinite(made).all()):
            bad = owner[indices[int((~torch.isfinite(made).all(1)).nonzero()[0])]]
            raise ValueError(f"Input {first + bad} gives a vector with NaN or infinite values in {model.dtype}; try dtype='float32'.")
        if job.sparse is not None:
            sparse.update(zip(indices, job.sparse(made, [str(texts[i]) for i in indices]), strict=True))
            made = made[:, :0]
        if vectors is None:
            vectors = torch.empty((len(rows.ids), made.shape[1]), dtype=torch.float32, device="cpu")
        vectors[indices] = made
        for i, state in zip(indices, states, strict=False):
            token_states[i] = state
        count(indices, seconds)

    def count(indices: list[int], seconds: float = 0.0) -> None:
        lasts = sum(bool(i + 1 == len(owner) or owner[i + 1] != owner[i]) for i in indices)  # an input counts with its last row
        tokens = sum(len(rows.ids[i]) for i in indices)
        saved = sum(shared[i][1] for i in indices if i not in twins)
        add(Stats(lasts, tokens, prefix_tokens=saved, duplicates=sum(i in twins for i in indices), busy=seconds))

    def add(more: Stats) -> None:
        with model.lock:
            model.stats.add(more)
        if advance is not None:
            advance(more)

    alone = [i for i in range(len(rows.ids)) if i not in twins]
    lengths = [len(rows.ids[i]) - shared[i][1] for i in alone]

    def too_large(batch: list[int]) -> None:
        model.fits = min(model.fits or job.budget, max(1, sum(lengths[n] for n in batch) // 2))

    for batch in plan(lengths, min(job.budget, model.fits or job.budget), job.max_texts):
        halving(lambda part: place([alone[n] for n in part]), batch, model.device, too_large)
    assert vectors is not None
    for i, source in twins.items():
        vectors[i] = vectors[source]
        if job.tokens:
            token_states[i] = token_states[source]
    count(list(twins))
    # variants of a text are texts to the templates, so that either is told by the index of its input
    cut, repaired = ({int(owner[row * len(job.form.templates)]) for row in found} for found in (rows.truncated, rows.replaced))
    add(Stats(truncated=len(cut), replaced=len(repaired)))
    in_order = [sparse[i] for i in sorted(sparse)]
    finished = finish(vectors, counts, job, normalize=model.spec.normalize)
    return Window(finished, len(inputs), rows.ids, token_states, in_order, len(cut), len(repaired))


def beginnings(model: Loaded, job: Job, rows: prompts.Prepared) -> list[tuple[np.ndarray, int]]:
    """For each row what its texts begin with, and how many of its tokens need not be run again."""
    if model.prefixes is None or job.tokens or not shareable(model.spec):
        return [(rows.ids[0][:0], 0)] * len(rows.ids)
    of_templates = prompts.beginnings(model.tokenizer, job.form)
    each = [of_templates[n % len(of_templates)] for n in range(len(rows.ids))]
    return [(start, shared_tokens(ids, start)) for start, ids in zip(each, rows.ids, strict=True)]


def duplicates(rows: prompts.Prepared) -> dict[int, int]:
    """Rows that repeat an earlier one, ids and span: row to that earlier row."""
    first: dict[tuple[bytes, tuple[int, int]], int] = {}
    keys = [(ids.tobytes(), span) for ids, span in zip(rows.ids, rows.spans, strict=True)]
    return {n: first[key] for n, key in enumerate(keys) if first.setdefault(key, n) != n}


def check_rows(model: Loaded, ids: list[np.ndarray], inputs: np.ndarray) -> None:
    """ValueError that names the input for a row that the model cannot take."""
    config = model.spec.model
    for row, index in zip(ids, inputs, strict=True):
        if len(row) == 0:
            raise ValueError(f"Input {index} has no token and this model adds none; leave it out.")
        if (row >= config.vocab_size).any():
            raise ValueError(
                f"Input {index} has the token id {row.max()}, but the model's embedding table has {config.vocab_size} rows: tokenizer and "
                "weights are not of the same model."
            )
        if config.position_offset is not None and len(row) > config.max_positions:
            raise ValueError(
                f"Input {index} has {len(row)} tokens with its template, but the model has positions for {config.max_positions}; lower "
                "max_seq_length, or take a shorter template."
            )


def finish(vectors: Tensor, counts: list[int], job: Job, *, normalize: bool) -> Tensor:
    """Station 7: [rows, dim] to [inputs, dim]: the mean over an input's rows (L2 again where the model's vectors have it), the cut, L2."""
    if len(counts) != len(vectors):
        vectors = torch.stack([each.mean(0) for each in vectors.split(counts)])
        vectors = F.normalize(vectors, dim=-1) if normalize else vectors
    if job.dim is not None:
        vectors = vectors[:, : job.dim]
    return F.normalize(vectors, dim=-1) if job.normalize else vectors


def run_batch(
    model: Loaded, job: Job, ids: list[np.ndarray], spans: list[tuple[int, int]], shared: list[tuple[np.ndarray, int]]
) -> tuple[Tensor, list[Tensor], float]:
    """Stations 4 to 6 for one batch: vectors [n, dim] or logits [n, V], float32 on the CPU; token states if the job asks for them; and
    the seconds it took the device, without the wait for it.

    `shared` is what each text begins with, and how many of its tokens are taken from the prefixes that were run before.
    """
    with device_of(model):
        start = time.perf_counter()
        if job.sparse is not None:
            spans = [(0, len(each)) for each in ids]
        before = [count for _, count in shared]
        prefixes = gathered([(prefix_of(model, head), count) if count else None for head, count in shared], model.device)
        batch: PackedBatch = pack(ids, spans, model.ops, model.device, before)
        mode = heads.reads(model.spec, sparse=job.sparse is not None, narrow=job.narrow)
        inside = mode == "lasttoken" or all(first >= count for (first, _), count in zip(spans, before, strict=True))
        kept = keep(batch, mode, model.ops) if mode is not None and inside and not job.tokens else None
        hidden = forward(model.weights, batch, model.ops, kept, prefixes=prefixes)
        if prefixes is not None and not inside:
            hidden, batch = joined(hidden, batch, prefixes, spans)
        make = heads.logits if job.sparse is not None else partial(heads.pool, spec=model.spec)
        vectors = make(hidden, weights=model.weights, batch=batch if kept is None else kept.batch, ops=model.ops)
        states = heads.token_vectors(hidden, model.weights, batch, model.ops) if job.tokens else []
        return vectors.cpu(), states, time.perf_counter() - start


def prefix_of(model: Loaded, ids: np.ndarray) -> Run:
    """The states of a prefix, run now if they are not kept."""

    def make(ids: np.ndarray) -> Run:
        captured: list[tuple[Tensor, Tensor]] = []
        batch = pack([ids], None, model.ops, model.device)
        hidden = forward(model.weights, batch, model.ops, captured=captured)
        return Run([(k[: len(ids)].clone(), v[: len(ids)].clone()) for k, v in captured], hidden[: len(ids)].clone())

    assert model.prefixes is not None
    return model.prefixes.get(ids, make)


def halving(work: Callable[[list[int]], None], indices: list[int], device: torch.device, failed: Callable[[list[int]], None]) -> None:
    """Do `work`, in halves where memory runs out, which `failed` is told. One text that does not fit is an error that says so."""
    try:
        work(indices)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        if len(indices) == 1:
            raise MemoryError(f"One text alone does not fit into the memory of {device}; lower max_seq_length.") from error
    else:
        return
    failed(indices)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    middle = len(indices) // 2
    halving(work, indices[:middle], device, failed)
    halving(work, indices[middle:], device, failed)


def out_of_memory(error: BaseException) -> bool:
    """CUDA has an exception of its own; the CPU allocator raises a RuntimeError with this text."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error) or "can't allocate memory" in str(error)
