"""What the engine works with: the inputs, what one call asks for, what serves it, and the counts it keeps."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from queue import SimpleQueue

import torch
from torch import Tensor

from pyembed import prompts
from pyembed.config import ModelSpec
from pyembed.ops import Ops
from pyembed.ops.budget import Budget
from pyembed.rows import Text
from pyembed.runner import Loaded, Made, Reads, Rows, Stop
from pyembed.sparse import SparseVector
from pyembed.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Wordings:
    """A text in several wordings, whose vectors are averaged."""

    texts: tuple[str, ...]


Input = Text | Wordings  # a text, its token ids, or a text in several wordings
Lane = Callable[[Reads, Rows, Stop], Made]  # what runs one batch at a time: a device of this process, or a worker process
Share = Callable[[Reads, Rows, Stop, int], Made]  # what runs a batch beside others, at most so many at a time


def wordings(each: Input) -> tuple[Text, ...]:
    return each.texts if isinstance(each, Wordings) else (each,)


@dataclass(slots=True)
class Stats:
    """What an encoder has done since it was loaded."""

    texts: int = 0
    tokens: int = 0  # of the texts that were tokenised, specials included; repeats in a list are not
    truncated: int = 0  # texts that were cut to max_seq_length
    replaced: int = 0  # texts whose lone surrogates became U+FFFD
    prefix_tokens: int = 0  # of `tokens`, those whose states a prompt or another text of the batch had already given
    duplicates: int = 0  # texts of a list, or rows of a window, that repeated an earlier one
    busy: float = 0.0  # seconds in which a device computed, summed over the devices

    def since(self, before: Stats) -> Stats:
        """What was added to `before`."""
        return Stats(*(getattr(self, each.name) - getattr(before, each.name) for each in fields(self)))

    def add(self, more: Stats) -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(more, each.name))


@dataclass(frozen=True, slots=True)
class Job:
    """What one call asks for."""

    form: prompts.Form  # what is put around the texts
    budget: Budget  # of a batch
    max_texts: int | None  # texts in a batch
    dim: int | None  # cut vectors to this many dimensions
    normalize: bool  # L2 after the cut
    narrow: bool = False  # pooling may read less than a text's tokens, whatever the prompt is
    tokens: bool = False  # also return the hidden states of every token
    share_prefixes: bool = False  # texts of a batch run their common beginnings once
    sparse: Callable[[Tensor, list[str]], list[SparseVector]] | None = None  # makes vectors of logits [n, V] and texts instead

    @property
    def reads(self) -> Reads:
        return Reads(narrow=self.narrow, tokens=self.tokens, logits=self.sparse is not None)


@dataclass(slots=True)
class Engine:
    """What serves an encoder's calls."""

    spec: ModelSpec
    tokenizer: Tokenizer
    lanes: tuple[Lane, ...]
    devices: tuple[torch.device, ...]  # of the lanes
    backends: tuple[Ops, ...]  # of the lanes
    dtype: torch.dtype
    adapter: str | None
    budget: Budget
    reuses: bool  # a prompt's states are kept, and texts that begin with it share them
    local: Loaded | None  # the model, where it is in this process
    share: Share | None = None  # of this process's CPU: a batch on one thread, beside others; no threads tokenise beside these
    errors: dict[str, float] = field(default_factory=dict)  # of each linear layer in eight bits (quantising.py)
    deterministic: bool = False  # asked for
    fits: int | None = None  # tokens of a batch: half of the smallest that ran out of memory
    stats: Stats = field(default_factory=Stats)
    lock: threading.Lock = field(default_factory=threading.Lock)  # around `fits` and `stats`
    pid: int = field(default_factory=os.getpid)
    free: SimpleQueue[int] = field(init=False)  # numbers of lanes that no call uses

    def __post_init__(self) -> None:
        self.free = SimpleQueue()
        for number in range(len(self.lanes)):
            self.free.put(number)

    def most(self, job: Job) -> int:
        """Tokens that a batch of the job may have: its budget, or what has fitted into memory."""
        return min(job.budget.tokens, self.fits or job.budget.tokens)

    def count(self, done: Stats) -> None:
        with self.lock:
            self.stats.add(done)
