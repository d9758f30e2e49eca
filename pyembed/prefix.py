"""What many texts begin with, run once: the keys, values and hidden states of a prompt's tokens, kept for the texts that follow; and of
texts in one batch the tokens that those before them have run.

Only causal models can share: there a token's states depend on nothing that comes after it. Which tokens a text shares with its prompt is
decided by its own ids and its prompt's, never by its neighbours.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from pyembed.batch import PackedBatch, padded
from pyembed.config import ModelSpec
from pyembed.ops import Prefix
from pyembed.transfer import to_device

LEAST = 8  # tokens; a shorter beginning is not worth its bookkeeping
BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # of all prefixes that are kept
Keys = list[tuple[Tensor, Tensor]]  # a layer's keys and values, each [P, G, K]


@dataclass(frozen=True, slots=True)
class Run:
    """The states of one prefix of P tokens."""

    keys: Keys  # one pair a layer
    hidden: Tensor  # [P, D], before the final norm

    @property
    def bytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in (self.hidden, *(part for pair in self.keys for part in pair)))


class PrefixCache:
    """The prefixes used last, by their ids, in at most `limit` bytes; the newest always fits."""

    def __init__(self, limit: int) -> None:
        self.limit, self.runs, self.lock = limit, OrderedDict[bytes, Run](), threading.Lock()
        self.past: list[Run] = []  # given up, and on CUDA perhaps about to be read by the batch that comes now

    def get(self, ids: np.ndarray, make: Callable[[np.ndarray], Run]) -> Run:
        """The run of `ids`, made where it is not kept; meanwhile other threads wait, who will most often want the same."""
        key = ids.tobytes()
        with self.lock:
            if key in self.runs:
                self.runs.move_to_end(key)
                return self.runs[key]
            run = self.runs[key] = make(ids)
            if run.hidden.is_cuda:  # it was made in the order of one stream, and is read in that of another; as are those given up
                torch.cuda.synchronize(run.hidden.device)
                self.past.clear()
            while len(self.runs) > 1 and self.bytes > self.limit:
                self.past.append(self.runs.popitem(last=False)[1])
            if not run.hidden.is_cuda:
                self.past.clear()
            return run

    @property
    def bytes(self) -> int:
        return sum(run.bytes for run in list(self.runs.values()))  # a copy: another thread may be adding one


@dataclass(frozen=True, slots=True)
class Prefixes:
    """The prefixes of a batch's texts."""

    layers: list[Prefix]  # one a layer
    hidden: Tensor  # [P, D]
    starts: list[int]  # [N] each text's first row of `hidden`


def obstacle(spec: ModelSpec) -> str | None:
    """Why texts may not share a beginning; None where they may: what is read of a token depends on it and those before it alone."""
    config = spec.model
    if not config.causal:
        return "its tokens see those after them"
    if any(rope.kind in ("dynamic", "longrope") for rope in config.ropes):
        return "its rotary positions depend on a text's length"
    if config.position_pad is not None:
        return "its positions depend on which tokens are padding"
    if config.per_layer_dim is not None:
        return "its layers mix their tokens' embeddings in, for which it is not built"
    return "it is pooled at the first token" if spec.pooling.modes == ("cls",) else None


def shareable(spec: ModelSpec) -> bool:
    return obstacle(spec) is None


def shared_tokens(ids: np.ndarray, head: np.ndarray) -> int:
    """How many of a text's first ids are those of its prompt `head`; one id is always its own, and fewer than LEAST count as none."""
    most = min(len(head), len(ids) - 1)
    if most < LEAST:
        return 0
    differ = np.flatnonzero(ids[:most] != head[:most])
    count = int(differ[0]) if len(differ) else most
    return count if count >= LEAST else 0


def neighbours(rows: Sequence[int], ids: Sequence[np.ndarray], before: Sequence[int]) -> list[int]:
    """`rows` in an order that puts those with a common beginning next to each other, the shorter one first; `before` as `overlaps`."""
    return sorted(rows, key=lambda n: (before[n], ids[n].astype(">u4").tobytes()))


def overlaps(ids: Sequence[np.ndarray], before: Sequence[int]) -> list[int]:
    """For each text the tokens beyond its first before[n], a prefix that was run, that it shares with the text in front of it.

    In the order of `neighbours` no other text in front of it shares more. Texts with different prefixes share nothing.
    """
    counts = [0] * len(ids)
    for n, ((last, skipped), (own, skip)) in enumerate(pairwise(zip(ids, before, strict=True)), start=1):
        if skip == skipped and np.array_equal(own[:skip], last[:skip]):
            counts[n] = shared_tokens(own[skip:], last[skip:])
    return counts


def gathered(runs: Sequence[tuple[Run, int] | None], device: torch.device) -> Prefixes | None:
    """For each text its run and how many of its tokens count, or None. None for a batch without any."""
    distinct = {(id(each[0]), each[1]): each for each in runs if each is not None}
    if not distinct:
        return None
    parts, order = list(distinct.values()), {key: n for n, key in enumerate(distinct)}
    of = [-1 if each is None else order[id(each[0]), each[1]] for each in runs]
    starts = np.cumsum([0, *(count for _, count in parts)], dtype=np.int32)

    def cat(pieces: list[Tensor]) -> Tensor:
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    sent = to_device({"cu_p": starts, "prefix_of": np.array(of, dtype=np.int32)}, device)
    keys = [[cat([run.keys[n][kind][:count] for run, count in parts]) for kind in (0, 1)] for n in range(len(parts[0][0].keys))]
    layers = [Prefix(k, v, sent["cu_p"], sent["prefix_of"]) for k, v in keys]
    return Prefixes(layers, cat([run.hidden[:count] for run, count in parts]), [int(starts[max(each, 0)]) for each in of])


def joined(hidden: Tensor, batch: PackedBatch, prefixes: Prefixes | None, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, PackedBatch]:
    """Hidden states of whole texts, what each shares before its own rows, as a batch for pooling; `spans` are those of the whole texts."""
    lengths = [before + own for before, own in zip(batch.before, batch.lengths, strict=True)]
    ends = np.cumsum([0, *lengths], dtype=np.int32)
    if prefixes is not None:
        hidden = torch.cat([prefixes.hidden, hidden])
    first = 0 if prefixes is None else len(prefixes.hidden)
    own = np.cumsum([0, *batch.lengths])
    rows = np.zeros(padded(int(ends[-1])), dtype=np.int64)
    for n, (start, end) in enumerate(pairwise(ends)):
        path = np.arange(own[n], own[n + 1]) if batch.paths is None else batch.paths.of_texts[n]
        rows[end - len(path) : end] = first + path
        if prefixes is not None:
            rows[start : end - len(path)] = prefixes.starts[n] + np.arange(end - len(path) - start)
    read = np.array(spans, dtype=np.int32).reshape(len(lengths), 2) + ends[:-1, None]
    sent = to_device({"cu_seqlens": ends, "spans": np.ascontiguousarray(read), "rows": rows}, hidden.device)
    whole = PackedBatch(
        input_ids=batch.input_ids,
        positions=batch.positions,
        cu_seqlens=sent["cu_seqlens"],
        spans=sent["spans"],
        lengths=lengths,
        before=[0] * len(lengths),
        read=[(first, end) for first, end in read.tolist()],
        schedule=None,
    )
    return hidden[sent["rows"]], whole
