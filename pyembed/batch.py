"""Stations 3 and 4: lengths to batches under a token budget, and the texts of one batch to packed tensors."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from pyembed.ops import Ops, PoolMode
from pyembed.transfer import to_device

COST_PER_TOKEN = 2  # of the budget: long texts may make a batch take so many times as long as short ones
KEYS_PER_TOKEN = 8  # of the budget: keys of texts that share tokens are gathered in every layer, and cost memory without being run
ROW_MULTIPLE = 16  # with this, a row of torch's CPU GEMMs has the same bits whatever else is in the batch


def padded(rows: int) -> int:
    """A number of rows with the spare ones that make it a multiple of ROW_MULTIPLE, and beyond 128 rows one of eight sizes an octave.

    oneDNN builds a GEMM for every number of rows: milliseconds and most of a megabyte each.
    """
    step = max(ROW_MULTIPLE, 1 << max(rows - 1, 1).bit_length() >> 4)
    return max(1, -(-rows // step)) * step


@dataclass(frozen=True, slots=True)
class Paths:
    """The rows of each text's tokens where texts share some: those of texts before it, then its own. What a prefix holds is not in it."""

    rows: Tensor  # [Tk] int64, text after text
    cu_k: Tensor  # [N + 1] int32, start of each text's rows
    of_texts: list[np.ndarray]  # [N] the same on the host


@dataclass(frozen=True, slots=True)
class PackedBatch:
    input_ids: Tensor  # [T] int64, all sequences end to end; T is a multiple of ROW_MULTIPLE, spare rows belong to nobody
    positions: Tensor  # [T] int64, restart for each sequence, after what is before it
    cu_seqlens: Tensor  # [N + 1] int32, start of each sequence; the last entry is at most T
    spans: Tensor  # [N, 2] int32, first and last + 1 token that pooling reads
    lengths: list[int]  # [N] on the host, so that no launch has to read the device
    before: list[int]  # [N] tokens of a prefix that was run before and of other texts, which a sequence's queries see
    read: list[tuple[int, int]]  # `spans` on the host
    schedule: object  # what ops.schedule(lengths) made
    paths: Paths | None = None  # None: texts share no tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest text, what is before it included."""
        return max((before + own for before, own in zip(self.before, self.lengths, strict=True)), default=1)


@dataclass(frozen=True, slots=True)
class Kept:
    """The rows of a batch that pooling reads, R of them: all that a last layer has to compute."""

    rows: Tensor  # [R] int64, a multiple of ROW_MULTIPLE; spare ones repeat the first row
    first: Tensor  # [N] int32, position of each text's first kept row
    batch: PackedBatch  # the kept rows as a batch of their own, whose spans are all of them


def plan(tokens: Sequence[int], factors: Sequence[float], budget: int, max_texts: int | None = None) -> list[list[int]]:
    """Indices of texts in batches of at most `budget` tokens, COST_PER_TOKEN * budget of cost and `max_texts` texts, but one at least.

    A text's cost is its tokens times its factor. Each batch begins with the longest text that is left and takes the longest that fit
    beside it, so that all but the last are about full: batches of one size run the same GEMMs.
    """
    left = sorted(range(len(tokens)), key=lambda n: (tokens[n], -n))
    sizes = [tokens[n] for n in left]
    batches: list[list[int]] = []
    while left:
        room, cost, at = budget, 0.0, len(left) - 1
        batches.append([])
        while at >= 0 and (max_texts is None or len(batches[-1]) < max_texts):
            cost += sizes[at] * factors[left[at]]
            if batches[-1] and cost > COST_PER_TOKEN * budget:
                break
            room -= sizes.pop(at)
            batches[-1].append(left.pop(at))
            at = bisect_right(sizes, room, hi=at) - 1
    return batches


def plan_in_order(
    tokens: Sequence[int], shares: Sequence[int], factors: Sequence[float], budget: int, max_texts: int | None = None
) -> list[list[int]]:
    """The same for texts that stay in their order, of which shares[n] tokens are not run behind text n - 1, but are at a batch's start.

    Their tokens, shared or not, are at most KEYS_PER_TOKEN * budget in a batch.
    """
    batches: list[list[int]] = []
    run, cost, held = 0, 0.0, 0
    for index, (own, share, factor) in enumerate(zip(tokens, shares, factors, strict=True)):
        more = own - share
        full = run + more > budget or cost + more * factor > COST_PER_TOKEN * budget or held + own > KEYS_PER_TOKEN * budget
        if not batches or full or (max_texts is not None and len(batches[-1]) >= max_texts):
            batches.append([])
            run, cost, held, more = 0, 0.0, 0, own
        batches[-1].append(index)
        run, cost, held = run + more, cost + more * factor, held + own
    return batches


@dataclass(frozen=True, slots=True)
class Layout:
    """A batch as the host has it."""

    input_ids: np.ndarray  # [T] int64
    positions: np.ndarray  # [T] int64
    starts: np.ndarray  # [N + 1] int32
    read: np.ndarray  # [N, 2] int32, the spans
    lengths: list[int]  # [N]
    before: list[int]  # [N]
    overlap: list[int] | None  # [N] tokens that a text shares with the one before it; None where none does

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What the device is given."""
        return {"input_ids": self.input_ids, "positions": self.positions, "cu_seqlens": self.starts, "spans": self.read}


def laid_out(
    ids: Sequence[np.ndarray],
    spans: Sequence[tuple[int, int]] | None,
    before: Sequence[int] | None = None,
    overlap: Sequence[int] | None = None,
) -> Layout:
    """Texts' ids end to end; arguments as those of `pack`."""
    run = [0] * len(ids) if before is None else list(before)
    if overlap is not None:
        run = [count + more for count, more in zip(run, overlap, strict=True)]
    ids = [each[count:] for each, count in zip(ids, run, strict=True)]
    lengths = [len(each) for each in ids]
    starts = np.zeros(len(ids) + 1, dtype=np.int32)
    np.cumsum(lengths, out=starts[1:])
    total = int(starts[-1])
    rows = padded(total)
    input_ids = np.zeros(rows, dtype=np.int64)
    positions = np.zeros(rows, dtype=np.int64)
    if total:
        input_ids[:total] = np.concatenate(ids)
        positions[:total] = np.arange(total) - np.repeat(starts[:-1] - np.array(run), lengths)
    read = np.stack([starts[:-1], starts[1:]], axis=1)
    if spans is not None:
        beyond = np.maximum(np.array(spans, dtype=np.int32).reshape(len(ids), 2) - np.array(run, dtype=np.int32)[:, None], 0)
        read = beyond + starts[:-1, None]
    shared = None if overlap is None or not any(overlap) else list(overlap)
    return Layout(input_ids, positions, starts, np.ascontiguousarray(read), lengths, run, shared)


def pack(
    ids: Sequence[np.ndarray],
    spans: Sequence[tuple[int, int]] | None,
    ops: Ops,
    device: torch.device,
    before: Sequence[int] | None = None,
    overlap: Sequence[int] | None = None,
) -> PackedBatch:
    """Texts' ids end to end. `spans[n]` are the first and last + 1 token of text n that pooling reads; None: all of every text.

    `before[n]` tokens at the start of text n were run already, and the `overlap[n]` after them are those of the text before it: they are
    left out, and of its span what lies beyond them is kept.
    """
    layout = laid_out(ids, spans, before, overlap)
    return placed(layout, ops.schedule(layout.lengths), device)


def placed(layout: Layout, schedule: object, device: torch.device) -> PackedBatch:
    """A layout on a device. `schedule` is what ops.schedule made of its lengths."""
    return PackedBatch(
        **to_device(layout.arrays, device),
        lengths=layout.lengths,
        before=layout.before,
        read=[(first, end) for first, end in layout.read.tolist()],
        schedule=schedule,
        paths=None if layout.overlap is None else paths(layout.starts, layout.overlap, device),
    )


def paths(starts: np.ndarray, overlap: Sequence[int], device: torch.device) -> Paths:
    """The rows of each text's tokens: the first overlap[n] of the text before it, then its own, from starts[n] to starts[n + 1]."""
    of_texts: list[np.ndarray] = []
    for n, shared in enumerate(overlap):
        own = np.arange(starts[n], starts[n + 1], dtype=np.int64)
        of_texts.append(np.concatenate([of_texts[-1][:shared], own]) if shared else own)
    ends = np.cumsum([0, *map(len, of_texts)], dtype=np.int32)
    sent = to_device({"rows": np.concatenate(of_texts), "ends": ends}, device)
    return Paths(sent["rows"], sent["ends"], of_texts)


@dataclass(frozen=True, slots=True)
class KeptLayout:
    """The rows that pooling reads, as the host has them; `Kept` on a device."""

    rows: np.ndarray  # [R] int64
    starts: np.ndarray  # [N + 1] int32
    spans: np.ndarray  # [N, 2] int32
    first: np.ndarray  # [N] int32
    lengths: list[int]  # [N]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {"rows": self.rows, "first": self.first, "cu_seqlens": self.starts, "spans": self.spans}


def kept_layout(layout: Layout, mode: PoolMode) -> KeptLayout:
    """What the last layer computes for a pooling that reads `mode` of each span: its first row, its last one, or all of it."""
    narrow = {"cls": lambda first, end: (first, min(first + 1, end)), "lasttoken": lambda first, end: (max(end - 1, first), end)}
    read = [narrow[mode](first, end) if mode in narrow else (first, end) for first, end in layout.read.tolist()]
    lengths = [end - first for first, end in read]
    starts = np.zeros(len(read) + 1, dtype=np.int32)
    np.cumsum(lengths, out=starts[1:])
    rows = np.zeros(padded(int(starts[-1])), dtype=np.int64)
    if read:
        rows[: starts[-1]] = np.concatenate([np.arange(first, end) for first, end in read])
    first = np.array([first for first, _ in read], dtype=np.int32) - layout.starts[:-1] + np.array(layout.before, dtype=np.int32)
    return KeptLayout(rows, starts, np.ascontiguousarray(np.stack([starts[:-1], starts[1:]], axis=1)), first, lengths)


def reads_all(lengths: Sequence[int], read: Sequence[tuple[int, int]]) -> bool:
    """Whether the spans are all of every text."""
    return list(read) == list(pairwise(accumulate(lengths, initial=0)))


def kept_on(batch: PackedBatch, layout: KeptLayout, schedule: object) -> Kept:
    """The rows of a batch that `layout` names, on the batch's device. `schedule` is what ops.schedule made of its lengths."""
    sent = to_device(layout.arrays, batch.input_ids.device)
    return kept_of(batch, sent, layout.lengths, [(first, end) for first, end in layout.spans.tolist()], schedule)


def kept_of(batch: PackedBatch, sent: dict[str, Tensor], lengths: list[int], read: list[tuple[int, int]], schedule: object) -> Kept:
    """`Kept` of a batch, from a KeptLayout's arrays on its device."""
    rows = sent["rows"]
    part = PackedBatch(
        input_ids=batch.input_ids[rows],
        positions=batch.positions[rows],
        cu_seqlens=sent["cu_seqlens"],
        spans=sent["spans"],
        lengths=lengths,
        before=[0] * len(lengths),
        read=read,
        schedule=schedule,
    )
    return Kept(rows, sent["first"], part)
