"""A window on its way through the engine's threads, and the batches of it that a device was told to run."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

from pyembed.job import Input
from pyembed.runner import Made
from pyembed.window import Work


@dataclass(slots=True)
class Chunk:
    """Consecutive inputs, as they are read: those of one window."""

    inputs: list[Input] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)  # of each input among all of the call
    repeats: list[tuple[int, int]] = field(default_factory=list)  # numbers of inputs that repeat an earlier text, and of that one


@dataclass(slots=True)
class Ticket:
    """A window under way."""

    chunk: Chunk
    work: Work | None = None
    left: int = 0  # rows to place
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def expect(self, batches: list[list[int]]) -> None:
        """Before they are run: what is to be placed until the window is done."""
        self.left = sum(map(len, batches))

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self.done.set()

    def check(self) -> None:
        """Raise what went wrong, and forget it: an exception holds the frames that it went through, and they this ticket."""
        error, self.error = self.error, None
        try:
            if error is not None:
                raise error
        finally:
            del error


Flight = tuple[Ticket, list[int], int, Made]  # a batch that a device was told to run, and how many lanes were lost over it before


class Flights(threading.local):
    """Those of one thread, which tells a device of the next batch before it waits for the last one."""

    def __init__(self) -> None:
        self.queue: deque[Flight] = deque()
