"""One window of texts: stations 2 and 3 before its batches are run, 7 and 8 after."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyembed import prompts
from pyembed.batch import KEYS_PER_TOKEN, plan, plan_in_order
from pyembed.config import ModelSpec
from pyembed.job import Engine, Input, Job, Stats, wordings
from pyembed.prefix import neighbours, overlaps, shared_tokens
from pyembed.rows import Text
from pyembed.rows import prepare as prepared
from pyembed.runner import Made, Rows, Shared
from pyembed.sparse import SparseVector

LEAST = 256  # tokens that are worth another lane
PLENTY = 2  # batches for each thread of a CPU from which a window is run with one batch on each
SLACK = 0.01  # batches are not filled to the last token


Marked = tuple[set[int], set[int]]  # numbers of texts that were cut, and of those that were repaired


@dataclass(slots=True)
class Work:
    """Consecutive texts on their way. A text has as many rows as templates and variants."""

    numbers: np.ndarray  # [texts] of each text among all of the call
    counts: list[int]  # rows of each text
    owner: np.ndarray  # [rows] the text of each row
    texts: list[Text]  # per variant
    rows: prompts.Prepared
    shared: list[Shared]  # per row
    overlap: dict[int, int] | None  # per row that is run, tokens it shares with the row in front of it; None where rows do not share
    twins: dict[int, int]  # rows that repeat another one, which alone is run
    batches: list[list[int]]  # rows
    cut: set[int]  # texts that were cut
    repaired: set[int]  # texts whose lone surrogates became U+FFFD
    vectors: Tensor | None = None  # [rows, D] float32
    states: dict[int, Tensor] = field(default_factory=dict)  # per row [length, D]
    sparse: dict[int, SparseVector] = field(default_factory=dict)  # per row
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class Window:
    """Results of consecutive texts, in their order."""

    vectors: Tensor  # [n, dim] float32 on the CPU
    numbers: np.ndarray  # [n] place of each text among all of the call
    repeats: Sequence[tuple[int, int]]  # places of texts that repeat an earlier one, and of that one; they have no vector here
    ids: list[np.ndarray]  # [length] int32 per row
    states: list[Tensor]  # [length, D] per row, where they were computed; empty unless the job asks for them
    sparse: list[SparseVector]  # per text; empty unless the job asks for them, and then `vectors` has no columns
    truncated: int  # texts that were cut
    replaced: int  # texts whose lone surrogates became U+FFFD


def prepare(engine: Engine, job: Job, inputs: Sequence[Input], numbers: Sequence[int], *, only: bool = False) -> Work:
    """Token ids, what is shared, and batches. `numbers` are the places of the inputs among all of the call.

    The batches of a call's `only` window are as small as gives every lane one.
    """
    groups = [wordings(each) for each in inputs]
    rows = prepared(engine.tokenizer, job.form, groups, numbers, engine.spec.model.vocab_size, words=job.sparse is not None)
    counts = [len(group) * len(job.form.templates) for group in groups]
    places = np.array(numbers)
    owner = np.repeat(np.arange(len(groups)), counts)
    check_rows(engine.spec, rows.ids, places[owner])
    shared = beginnings(engine, job, rows)
    twins = duplicates(rows) if job.sparse is None else {}
    alone = [row for row in range(len(rows.ids)) if row not in twins]
    before = [count for _, count in shared]
    if job.share_prefixes:
        alone = neighbours(alone, rows.ids, before)
    own = [len(rows.ids[row]) - before[row] for row in alone]
    factors = [job.budget.factor(len(rows.ids[row])) for row in alone]
    budget = engine.most(job)
    if only and len(engine.lanes) > 1:
        budget = min(budget, max(LEAST, -(-sum(own) // len(engine.lanes))))
    elif engine.share is not None:
        budget = even(sum(own), budget, torch.get_num_threads())
    overlap = None
    if job.share_prefixes:
        shares = overlaps([rows.ids[row] for row in alone], [before[row] for row in alone])
        overlap = dict(zip(alone, shares, strict=True))
        batches = plan_in_order(own, shares, factors, budget, job.max_texts)
    else:
        batches = plan(own, factors, budget, job.max_texts)
    # variants of a text are texts to the templates, so that either is told by the index of its input
    cut, repaired = ({int(owner[row * len(job.form.templates)]) for row in found} for found in (rows.truncated, rows.replaced))
    planned = [[alone[n] for n in batch] for batch in batches]
    texts = [text for group in groups for text in group]
    return Work(places, counts, owner, texts, rows, shared, overlap, twins, planned, cut, repaired)


def even(tokens: int, budget: int, threads: int) -> int:
    """At most `budget`: what gives every thread as many batches, of one size, where there are batches enough for each to have its own."""
    count = -(-tokens // budget)
    if threads == 1 or count < PLENTY * threads:
        return budget
    count = -(-count // threads) * threads
    return min(budget, math.ceil(tokens / count * (1 + min(SLACK, 1 / (4 * count)))))


def beginnings(engine: Engine, job: Job, rows: prompts.Prepared) -> list[Shared]:
    """For each row what its texts begin with, and how many of its tokens need not be run again."""
    if not engine.reuses or job.tokens:
        return [(rows.ids[0][:0], 0)] * len(rows.ids)
    of_templates = prompts.beginnings(engine.tokenizer, job.form)
    each = [of_templates[n % len(of_templates)] for n in range(len(rows.ids))]
    return [(start, shared_tokens(ids, start)) for start, ids in zip(each, rows.ids, strict=True)]


def duplicates(rows: prompts.Prepared) -> dict[int, int]:
    """Rows that repeat an earlier one, ids and span: row to that earlier row."""
    first: dict[tuple[bytes, tuple[int, int]], int] = {}
    keys = [(ids.tobytes(), span) for ids, span in zip(rows.ids, rows.spans, strict=True)]
    return {n: first[key] for n, key in enumerate(keys) if first.setdefault(key, n) != n}


def check_rows(spec: ModelSpec, ids: Sequence[np.ndarray], inputs: np.ndarray) -> None:
    """ValueError that names the input for a row that the model cannot take."""
    config = spec.model
    lengths = [len(row) for row in ids]
    fit = config.position_offset is None or max(lengths) <= config.max_positions
    if min(lengths) and fit and np.concatenate(ids).max() < config.vocab_size:
        return
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


def overlap_of(work: Work, batch: Sequence[int]) -> list[int] | None:
    """Tokens that each row of a batch shares with the one in front of it; None where rows do not share."""
    return None if work.overlap is None else [0, *(work.overlap[row] for row in batch[1:])]


def given(work: Work, batch: Sequence[int]) -> list[int]:
    """Tokens of each row of a batch that need not be run: a prompt or other rows give their states."""
    overlap = overlap_of(work, batch) or [0] * len(batch)
    return [work.shared[row][1] + more for row, more in zip(batch, overlap, strict=True)]


def room(work: Work, batch: Sequence[int]) -> int:
    """What a batch takes of the tokens that fit: those that have to be run, or its share of keys where rows share most of theirs."""
    keys = sum(len(work.rows.ids[row]) - work.shared[row][1] for row in batch)
    return max(keys - sum(overlap_of(work, batch) or ()), keys // KEYS_PER_TOKEN)


def rows_of(work: Work, batch: Sequence[int]) -> Rows:
    """What a lane is given of a batch."""
    ids, spans = [work.rows.ids[row] for row in batch], [work.rows.spans[row] for row in batch]
    return Rows(ids, spans, [work.shared[row] for row in batch], overlap_of(work, batch))


def place(engine: Engine, job: Job, work: Work, batch: Sequence[int], made: Made) -> Stats:
    """Put a batch's results to their rows; what it adds to the counts. ValueError that names the input for what is not finite."""
    vectors = made.vectors
    finite = torch.isfinite(vectors).all(1)
    if not bool(finite.all()):
        bad = work.numbers[work.owner[batch[int((~finite).nonzero()[0])]]]
        out = "its weights or activations overflow" if engine.dtype == torch.float32 else "try dtype='float32'"
        raise ValueError(f"Input {bad} gives a vector with NaN or infinite values in {engine.dtype}; {out}.")
    if job.sparse is not None:
        sparse = job.sparse(vectors, [str(work.texts[row]) for row in batch])
        work.sparse.update(zip(batch, sparse, strict=True))
        vectors = vectors[:, :0]
    with work.lock:
        if work.vectors is None:
            work.vectors = torch.empty((len(work.owner), vectors.shape[1]), dtype=torch.float32, device="cpu")
    work.vectors[list(batch)] = vectors
    work.states.update(zip(batch, made.states, strict=False))
    done = counted(work, batch, prefix_tokens=sum(given(work, batch)))
    done.busy = made.seconds
    return done


def counted(work: Work, batch: Sequence[int], *, prefix_tokens: int = 0, duplicates: int = 0) -> Stats:
    """Counts of rows that are done; a text counts with its last row."""
    owner = work.owner
    texts = sum(bool(row + 1 == len(owner) or owner[row + 1] != owner[row]) for row in batch)
    return Stats(texts, sum(len(work.rows.ids[row]) for row in batch), prefix_tokens=prefix_tokens, duplicates=duplicates)


def finish(engine: Engine, job: Job, work: Work | None, repeats: Sequence[tuple[int, int]], marked: Marked) -> tuple[Window, Stats]:
    """Station 7, once all batches are placed: duplicates, the mean over a text's rows, the cut, L2; what this adds to the counts.

    `work` None: there are repeats alone. `marked` takes the numbers of texts that were cut and repaired, for repeats to come.
    """
    if work is None:
        vectors, numbers, ids, states, sparse, done = torch.empty((0, 0), device="cpu"), np.zeros(0, dtype=int), [], [], [], Stats()
    else:
        assert work.vectors is not None
        for row, source in work.twins.items():
            work.vectors[row] = work.vectors[source]
            if job.tokens:
                work.states[row] = work.states[source].clone()
        vectors, numbers, ids = averaged(work.vectors, work.counts, job, normalize=engine.spec.normalize), work.numbers, work.rows.ids
        states = [work.states[row] for row in sorted(work.states)]
        sparse = [work.sparse[row] for row in sorted(work.sparse)]
        done = counted(work, list(work.twins), duplicates=len(work.twins))
        done.truncated, done.replaced = len(work.cut), len(work.repaired)
        for numbers_of, found in zip(marked, (work.cut, work.repaired), strict=True):
            numbers_of.update(int(numbers[text]) for text in found)
    done.texts += len(repeats)
    done.duplicates += len(repeats)
    done.truncated += sum(earlier in marked[0] for _, earlier in repeats)
    done.replaced += sum(earlier in marked[1] for _, earlier in repeats)
    return Window(vectors, numbers, repeats, ids, states, sparse, done.truncated, done.replaced), done


def averaged(vectors: Tensor, counts: list[int], job: Job, *, normalize: bool) -> Tensor:
    """[rows, D] to [texts, dim]: the mean over a text's rows (L2 again where the model's vectors have it), the cut, L2."""
    if len(counts) != len(vectors):
        means = [each[0] if len(each) == 1 else each.mean(0) for each in vectors.split(counts)]
        again = [F.normalize(mean, dim=-1) if normalize and count > 1 else mean for mean, count in zip(means, counts, strict=True)]
        vectors = torch.stack(again)
    if job.dim is not None:
        vectors = vectors[:, : job.dim]
    return F.normalize(vectors, dim=-1) if job.normalize else vectors
