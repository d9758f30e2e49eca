"""Stations 3 and 4: lengths to batches under a token budget, and the texts of one batch to packed tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyembed.ops import Ops, PoolMode

ROW_MULTIPLE = 16  # with this, a row of torch's CPU GEMMs has the same bits whatever else is in the batch


def padded(rows: int) -> int:
    """A number of rows with the spare ones that make it a multiple of ROW_MULTIPLE, at least one of these."""
    return max(1, -(-rows // ROW_MULTIPLE)) * ROW_MULTIPLE


@dataclass(frozen=True, slots=True)
class PackedBatch:
    input_ids: Tensor  # [T] int64, all sequences end to end; T is a multiple of ROW_MULTIPLE, spare rows belong to nobody
    positions: Tensor  # [T] int64, restart for each sequence, after its prefix
    cu_seqlens: Tensor  # [N + 1] int32, start of each sequence; the last entry is at most T
    spans: Tensor  # [N, 2] int32, first and last + 1 token that pooling reads
    lengths: list[int]  # [N] on the host, so that no launch has to read the device
    before: list[int]  # [N] tokens of a prefix that was run before, which a sequence's queries see
    read: list[tuple[int, int]]  # `spans` on the host
    schedule: object  # what ops.schedule(lengths) made

    @property
    def longest(self) -> int:
        """Tokens of the longest text, its prefix included."""
        return max((before + own for before, own in zip(self.before, self.lengths, strict=True)), default=1)


@dataclass(frozen=True, slots=True)
class Kept:
    """The rows of a batch that pooling reads, R of them: all that a last layer has to compute."""

    rows: Tensor  # [R] int64, a multiple of ROW_MULTIPLE; spare ones repeat the first row
    first: Tensor  # [N] int32, position of each text's first kept row
    batch: PackedBatch  # the kept rows as a batch of their own, whose spans are all of them


def plan(costs: Sequence[float], budget: float, max_texts: int | None = None) -> list[list[int]]:
    """Indices of texts, dearest first, in batches that cost at most `budget` and have at most `max_texts` texts, but one at least."""
    batches: list[list[int]] = []
    cost = 0.0
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        full = cost + costs[index] > budget or (max_texts is not None and bool(batches) and len(batches[-1]) >= max_texts)
        if not batches or full:
            batches.append([])
            cost = 0.0
        batches[-1].append(index)
        cost += costs[index]
    return batches


def pack(
    ids: Sequence[np.ndarray],
    spans: Sequence[tuple[int, int]] | None,
    ops: Ops,
    device: torch.device,
    before: Sequence[int] | None = None,
) -> PackedBatch:
    """Texts' ids end to end. `spans[n]` are the first and last + 1 token of text n that pooling reads; None: all of every text.

    `before[n]` tokens at the start of text n were run already and are left out; of its span what lies beyond them is kept.
    """
    run = [0] * len(ids) if before is None else list(before)
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
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids).to(device),
        positions=torch.from_numpy(positions).to(device),
        cu_seqlens=torch.from_numpy(starts).to(device),
        spans=torch.from_numpy(np.ascontiguousarray(read)).to(device),
        lengths=lengths,
        before=run,
        read=[(first, end) for first, end in read.tolist()],
        schedule=ops.schedule(lengths),
    )


def keep(batch: PackedBatch, mode: PoolMode, ops: Ops) -> Kept:
    """What the last layer computes for a pooling that reads `mode` of each span: its first row, its last one, or all of it."""
    narrow = {"cls": lambda first, end: (first, min(first + 1, end)), "lasttoken": lambda first, end: (max(end - 1, first), end)}
    read = [narrow[mode](*span) if mode in narrow else span for span in batch.read]
    lengths = [end - first for first, end in read]
    starts = np.zeros(len(read) + 1, dtype=np.int32)
    np.cumsum(lengths, out=starts[1:])
    rows = np.zeros(padded(int(starts[-1])), dtype=np.int64)
    if read:
        rows[: starts[-1]] = np.concatenate([np.arange(first, end) for first, end in read])
    device = batch.input_ids.device
    index = torch.from_numpy(rows).to(device)
    texts = np.cumsum([0, *batch.lengths[:-1]]) if batch.lengths else np.zeros(0)
    spans = np.stack([starts[:-1], starts[1:]], axis=1)
    kept = PackedBatch(
        input_ids=batch.input_ids[index],
        positions=batch.positions[index],
        cu_seqlens=torch.from_numpy(starts).to(device),
        spans=torch.from_numpy(np.ascontiguousarray(spans)).to(device),
        lengths=lengths,
        before=[0] * len(lengths),
        read=[(first, end) for first, end in spans.tolist()],
        schedule=ops.schedule(lengths),
    )
    first = np.array([first for first, _ in read], dtype=np.int32) - texts.astype(np.int32) + np.array(batch.before, dtype=np.int32)
    return Kept(index, torch.from_numpy(first).to(device), kept)
