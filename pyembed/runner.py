"""Stations 4 to 6 on one device: the texts of one batch to their vectors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyembed import heads
from pyembed.batch import kept_layout, kept_on, laid_out, pack, placed
from pyembed.compiler import building
from pyembed.config import ModelSpec
from pyembed.graphs import Given, Graphs
from pyembed.model import Weights, forward
from pyembed.ops import Ops
from pyembed.prefix import PrefixCache, Run, gathered, joined
from pyembed.transfer import TELLING, to_host

Shared = tuple[np.ndarray, int]  # what a text begins with, and how many of its tokens are taken from there
Stop = Callable[[], bool]  # whether nobody waits for the result any more
GIVEN_UP = "The call was given up: it was closed, or its thread and the main thread have ended."
POLL = 0.2  # seconds after which a thread that waits asks that again


class Stopped(RuntimeError):
    """Nobody waits for this batch any more."""


class LaneLost(Exception):
    """What ran this batch has ended under it, and will be there again for the next one. `sure`: no other batch may have been the reason."""

    def __init__(self, said: str, *, sure: bool = True) -> None:
        super().__init__(said)
        self.sure = sure


@dataclass(frozen=True, slots=True)
class Reads:
    """What is read of a batch's texts, beyond their spans."""

    narrow: bool = False  # pooling may read less than a text's tokens, whatever the prompt is
    tokens: bool = False  # also the hidden states of every token
    logits: bool = False  # the vocabulary's logits at the last token instead of a vector


@dataclass(frozen=True, slots=True)
class Rows:
    """The texts of one batch."""

    ids: Sequence[np.ndarray]  # [length] int32 each
    spans: Sequence[tuple[int, int]]  # first and last + 1 token that pooling reads
    shared: Sequence[Shared]
    overlap: Sequence[int] | None = None  # tokens after those that each text shares with the one in front of it


class Made(NamedTuple):
    """What a batch gives. With `arrival` it is still on its way: `landed` waits for it."""

    vectors: Tensor  # [n, dim] float32 on the CPU; logits [n, V] where they were asked for
    states: list[Tensor]  # [length, D] each, or none
    seconds: float  # that the device was taken
    arrival: Callable[[], Made] | None = None  # waits for the device, and gives what is there then

    def landed(self) -> Made:
        return self if self.arrival is None else self.arrival()


NOTHING = torch.empty(0)  # the vectors of a batch that is on its way


class Turns:
    """A device's turns: one batch on all of its threads, or several side by side on one each. Who wants all of it is let in first."""

    def __init__(self) -> None:
        self.door, self.room, self.counting = threading.Lock(), threading.Lock(), threading.Condition()
        self.inside = 0

    def enter(self, most: int) -> None:
        """Begin a batch beside others, `most` with it. In threads that no interrupt reaches: one in here would leave the door shut."""
        with self.door, self.counting:
            while self.inside >= most:
                self.counting.wait()
            self.inside += 1
            if self.inside == 1:
                self.room.acquire()

    def leave(self) -> None:
        with self.counting:
            self.inside -= 1
            self.counting.notify()
            if self.inside == 0:
                self.room.release()


@dataclass(slots=True)
class Loaded:
    """A model on one device."""

    spec: ModelSpec
    weights: Weights
    ops: Ops
    device: torch.device
    dtype: torch.dtype
    adapter: str | None = None  # of those to switch between
    prefixes: PrefixCache | None = None  # None: every text is run whole
    errors: dict[str, float] = field(default_factory=dict)  # of each linear layer in eight bits (quantising.py)
    turns: Turns = field(default_factory=Turns)
    deterministic: bool = False
    streams: tuple[torch.cuda.Stream, ...] = ()  # of a CUDA device, which batches take in turn
    graphs: tuple[Graphs, ...] = ()  # of each stream; none where no batch is so small
    turn: int = 0  # number of the stream that was taken last
    idle_since: float = 0.0  # when the last batch that has landed did


@contextmanager
def device_of(model: Loaded, *, share: int = 0) -> Iterator[None]:
    """The model's device for one thread at a time, or for so many that share it; in the dtype it was loaded in whatever autocast and
    torch's switches say around us.
    """
    if share:
        model.turns.enter(share)
        try:
            with torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
                yield
        finally:
            model.turns.leave()
    else:  # locks alone, with nothing between that an interrupt could leave half done
        with model.turns.door, model.turns.room, torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
            if model.device.type == "cpu":
                yield
            else:
                with TELLING, products(splits=not model.deterministic), torch.cuda.device(model.device), building():
                    yield


@contextmanager
def products(*, splits: bool) -> Iterator[None]:
    """cuBLAS's float32 products in float32, its sums of 16-bit ones too; `splits`: it may cut a sum into parts. As it was, afterwards."""
    switches = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    precision, sums = switches.fp32_precision, [(getattr(switches, name), getattr(switches, f"{name}_split_k")) for name in names]
    accumulates = switches.allow_fp16_accumulation
    try:
        switches.fp32_precision, switches.allow_fp16_accumulation = "ieee", False
        for name in names:
            setattr(switches, name, (False, splits))
        yield
    finally:
        switches.fp32_precision, switches.allow_fp16_accumulation = precision, accumulates
        for name, was in zip(names, sums, strict=True):
            setattr(switches, name, was)


@contextmanager
def stream_of(model: Loaded) -> Iterator[Graphs | None]:
    """The next of the model's streams, and its graphs; with the device taken."""
    model.turn = (model.turn + 1) % max(1, len(model.streams))
    graphs = model.graphs[model.turn] if model.graphs else None
    with torch.cuda.stream(model.streams[model.turn]) if model.streams else nullcontext():
        yield graphs


def run_batch(model: Loaded, reads: Reads, rows: Rows, stop: Stop | None = None, *, share: int = 0) -> Made:
    """Vectors or logits of the rows, and their token states if asked for; on CUDA they may be on their way. Stopped where `stop` says so
    between two layers. `share`: so many batches may run at once, this one among them; 0: it runs alone.
    """
    with device_of(model, share=share), stream_of(model) as graphs:
        begun = time.perf_counter()
        spans = [(0, len(each)) for each in rows.ids] if reads.logits else rows.spans
        runs = [(prefix_of(model, head, stop), count) if count else None for head, count in rows.shared]
        layout = laid_out(rows.ids, spans, [count for _, count in rows.shared], rows.overlap)
        mode = heads.reads(model.spec, sparse=reads.logits, narrow=reads.narrow)
        # the first token that is read; a weighted mean (no mode) numbers them from the text's start, so it needs every text whole
        begin = [max(end - 1, first) if mode == "lasttoken" else first for first, end in spans]
        inside = mode is not None and all(at >= count for at, count in zip(begin, layout.before, strict=True))
        of_kept = kept_layout(layout, mode) if mode is not None and inside and not reads.tokens else None
        schedule = model.ops.schedule(layout.lengths)
        given = Given(layout, of_kept, schedule, None if of_kept is None else model.ops.schedule(of_kept.lengths), runs)
        whole = inside or not any(layout.before)
        form = None
        if graphs is not None and whole and not reads.tokens and not reads.logits:
            form = graphs.form(given)
        vectors, states = None if graphs is None or form is None else graphs.run(form, given), list[Tensor]()
        if vectors is None:
            prefixes = gathered(runs, model.device)
            batch = placed(layout, schedule, model.device)
            kept = None if of_kept is None else kept_on(batch, of_kept, given.kept_schedule)
            hidden = forward(model.weights, batch, model.ops, kept, prefixes=prefixes, between=partial(check, stop))
            if not whole:
                hidden, batch = joined(hidden, batch, prefixes, spans)
            make = heads.logits if reads.logits else partial(heads.pool, spec=model.spec)
            vectors = make(hidden, weights=model.weights, batch=batch if kept is None else kept.batch, ops=model.ops)
            states = heads.token_vectors(hidden, model.weights, batch, model.ops) if reads.tokens else []
            if graphs is not None and form is not None:
                graphs.saw(form, given)
        return returned(model, vectors, states, begun)


def returned(model: Loaded, vectors: Tensor, states: list[Tensor], begun: float) -> Made:
    """A batch on its way back from the device."""
    there, landed = to_host(vectors)
    if landed is None:
        assert there is not None
        return Made(there, states, time.perf_counter() - begun)
    for each in states:
        each.record_stream(torch.cuda.default_stream(model.device))  # where the caller will most likely read them

    def arrival() -> Made:
        there = landed()
        now, before = time.perf_counter(), model.idle_since
        model.idle_since = now
        return Made(there, states, now - max(begun, before))  # while another batch ran, this one waited

    return Made(NOTHING, states, 0.0, arrival)


def check(stop: Stop | None) -> None:
    if stop is not None and stop():
        raise Stopped(GIVEN_UP)


def prefix_of(model: Loaded, ids: np.ndarray, stop: Stop | None) -> Run:
    """The states of a prefix, run now if they are not kept."""

    def make(ids: np.ndarray) -> Run:
        captured: list[tuple[Tensor, Tensor]] = []
        batch = pack([ids], None, model.ops, model.device)
        hidden = forward(model.weights, batch, model.ops, captured=captured, between=partial(check, stop))
        return Run([(k[: len(ids)].clone(), v[: len(ids)].clone()) for k, v in captured], hidden[: len(ids)].clone())

    assert model.prefixes is not None
    return model.prefixes.get(ids, make)
