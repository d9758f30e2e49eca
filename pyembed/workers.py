"""Worker processes, from outside: one for each device of a list, each with the model's weights, started anew where it dies.

They are started with a program of their own, not by multiprocessing, so that nothing of the caller's is imported again. Each has a socket
to this process; its end is the worker's end too, whatever happens to this process.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch

from pyembed.job import Lane
from pyembed.ops.budget import Budget
from pyembed.options import cores
from pyembed.runner import NOTHING, POLL, LaneLost, Made, Reads, Rows, Stop, Stopped, check
from pyembed.worker import Failed, Flat, Place, send

PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from pyembed.worker import main; main(int(sys.argv[1]))"
Loaded = tuple[Budget, dict[str, float]]  # how much a worker takes at once, and the errors of its linear layers in eight bits
AHEAD = {"cpu": 0, "cuda": 2}  # batches that a worker takes before the last one is answered; a CPU is busy with one
PATIENCE = 2.0  # seconds that a worker has to end by itself

logger = logging.getLogger("pyembed")


class WorkerTraceback(Exception):
    """Where in a worker an error was raised: the cause of that error in this process."""


@dataclass(slots=True, eq=False)
class Answer:
    """What a worker is to answer to a batch."""

    number: int
    message: Any = None
    lost: LaneLost | None = None  # the worker has ended instead


@dataclass(slots=True)
class Worker:
    """A worker process of ours."""

    process: subprocess.Popen[bytes]
    channel: Connection
    device: torch.device
    ahead: int  # batches that it takes before the last one is answered
    loaded: bool = False
    owed: deque[Answer] = field(default_factory=deque)  # those to come, in order, those to batches that were given up among them


class Pool:
    """A worker for each device. When nothing refers to the pool or its lanes any more, they end.

    `model` are the arguments of loading.load but the device. The constructor returns once all have loaded it; it raises what a worker
    raises over it, and RuntimeError where one dies over it.
    """

    def __init__(self, model: dict[str, Any], devices: Sequence[torch.device]) -> None:
        self.model, self.devices = model, tuple(devices)
        self.places = places(devices)
        self.workers: list[Worker | None] = [None] * len(devices)
        self.locks = [threading.Lock() for _ in devices]
        self.numbers = count()
        self.close = weakref.finalize(self, end, self.workers, os.getpid())
        POOLS.add(self)
        try:
            waiting, answers = [self.start(number) for number in range(len(devices))], []
            while waiting:
                ready = wait([each.channel for each in waiting], POLL)
                for each in [each for each in waiting if each.channel in ready or each.process.poll() is not None]:
                    waiting.remove(each)
                    answers.append(finish_loading(each))
        except BaseException as error:
            self.close()
            if isinstance(error, LaneLost):
                raise RuntimeError(str(error)) from error
            raise
        self.budget = min((budget for budget, _ in answers), key=lambda each: each.tokens)  # what every worker has room for
        self.errors = answers[0][1]  # on one machine the same in all

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """What runs batches, one for each device."""
        return tuple(partial(self.run, number) for number in range(len(self.devices)))

    def start(self, number: int) -> Worker:
        """Start the worker of this number, which begins to load."""
        place, device = self.places[number], self.devices[number]
        paths = [each for each in sys.path if isinstance(each, str)]
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(theirs.fileno()), *paths],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": str(place.threads)},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # out of reach of a terminal's Ctrl-C from the first moment
            )
            worker = self.workers[number] = Worker(process, Connection(ours.detach()), device, place.ahead)
        with suppress(BrokenPipeError):  # who waits for it will see that it has ended
            send(worker.channel, place)
            send(worker.channel, self.model | {"device": device})
        return worker

    def run(self, number: int, reads: Reads, rows: Rows, stop: Stop) -> Made:
        """Have a batch run by the worker of this number, which is started anew where it has died; on a GPU it may be on its way yet. Token
        states come on the CPU.

        LaneLost, here or when it is waited for, where the worker dies over it or one before it. Stopped where `stop` says so; the worker
        then ends the batch between two layers.
        """
        with self.locks[number]:
            worker = self.ready(number, stop)
            while len(worker.owed) > worker.ahead:
                self.take(number, worker, stop)
            answer = Answer(next(self.numbers))
            try:
                send(worker.channel, (answer.number, reads, rows))
            except OSError as error:
                raise self.bury(worker, number) from error
            worker.owed.append(answer)

        def arrival() -> Made:
            with self.locks[number]:
                while answer in worker.owed:
                    try:
                        self.take(number, worker, stop)
                    except Stopped:
                        with suppress(OSError):  # where it has ended, it has ended the batch
                            send(worker.channel, answer.number)
                        raise
            if answer.lost is not None:
                raise answer.lost
            vectors, states, seconds = opened(answer.message)
            return Made(tensor(vectors), [tensor(each) for each in states], seconds)

        return Made(NOTHING, [], 0.0, arrival) if worker.ahead else arrival()

    def take(self, number: int, worker: Worker, stop: Stop) -> None:
        """Wait for the worker's next answer; LaneLost where it has ended, of which all who wait for one are told."""
        try:
            message = receive(worker, stop)
        except (EOFError, OSError) as error:
            raise self.bury(worker, number) from error
        worker.owed.popleft().message = message

    def ready(self, number: int, stop: Stop) -> Worker:
        """The worker of this number, loaded; a new one where the last one has died."""
        worker = self.workers[number]
        if worker is not None and worker.process.poll() is not None:
            self.bury(worker, number)
            worker = None
        if worker is None:
            worker = self.start(number)
        if not worker.loaded:
            try:
                finish_loading(worker, stop)
            except Stopped:
                raise
            except BaseException:
                end([worker], os.getpid())
                self.workers[number] = None
                raise
        return worker

    def bury(self, worker: Worker, number: int) -> LaneLost:
        """Forget a worker that has ended; what all who wait for it are told. Where several do, nobody knows whose batch it was: the next
        one has one batch at a time.
        """
        self.workers[number] = None
        worker.channel.close()
        said, sure = ended(worker), len(worker.owed) <= 1
        if not sure:
            self.places[number] = replace(self.places[number], ahead=0)
        while worker.owed:
            worker.owed.popleft().lost = LaneLost(said, sure=sure)
        logger.error("%s A new one takes its place.", said)  # an error that is mended: also told where warnings wait for a summary
        return LaneLost(said, sure=sure)


POOLS: weakref.WeakSet[Pool] = weakref.WeakSet()


def close_in_child() -> None:
    """A forked child must not keep workers waiting for it when their own process is gone."""
    for pool in POOLS:
        for worker in pool.workers:
            if worker is not None:
                worker.channel.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=close_in_child)


def places(devices: Sequence[torch.device]) -> list[Place]:
    """The cores of this process divided among the workers on a CPU, and threads: no more than this thread's in all, and one each."""
    own, shared = cores(), sum(each.type == "cpu" for each in devices)
    shares = [own[n * len(own) // shared : (n + 1) * len(own) // shared] for n in range(shared)]
    out, pinned = [], hasattr(os, "sched_setaffinity")
    for device in devices:
        if device.type == "cpu":
            share = shares.pop(0)
            threads = min(len(share), max(1, torch.get_num_threads() // shared))
            out.append(Place(tuple(share) if pinned else (), threads, AHEAD["cpu"]))
        else:
            out.append(Place((), max(1, torch.get_num_threads() // len(devices)), AHEAD[device.type]))
    return out


def receive(worker: Worker, stop: Stop | None = None) -> Any:
    """The worker's next message. EOFError or OSError where it has ended, Stopped where `stop` says so."""
    while not worker.channel.poll(POLL):
        check(stop)
        if worker.process.poll() is not None and not worker.channel.poll():
            raise EOFError  # where somebody else holds the other end of the socket
    return pickle.loads(worker.channel.recv_bytes())


def finish_loading(worker: Worker, stop: Stop | None = None) -> Loaded:
    """Wait until the worker has loaded. What it raised over it; LaneLost where it ended."""
    try:
        message = receive(worker, stop)
    except (EOFError, OSError) as error:
        raise LaneLost(f"{ended(worker)} It was loading the model.") from error
    loaded = opened(message)
    worker.loaded = True
    return cast("Loaded", loaded)


def opened(message: Any) -> Any:
    """An answer, or the error that it is."""
    if isinstance(message, Failed):
        raise message.error from WorkerTraceback(f"in a worker process:\n{message.trace}")
    return message


def tensor(flat: Flat) -> torch.Tensor:
    dtype, values = flat
    return torch.from_numpy(values).view(dtype)


def ended(worker: Worker) -> str:
    """How a worker whose socket is closed has ended, as a sentence."""
    code = stop_process(worker.process)
    killer = next((each.name for each in signal.Signals if each == -code), f"signal {-code}")
    how = f"was killed by {killer}" if code < 0 else f"ended with exit code {code}"
    return f"Worker process {worker.process.pid} on {worker.device} {how}."


def stop_process(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process that is to end by itself, not too long; its exit code."""
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def end(workers: list[Worker | None] | list[Worker], pid: int) -> None:
    """End workers of the process `pid`, and none in a process forked from it."""
    there = [each for each in workers if each is not None]
    if os.getpid() == pid:
        for worker in there:
            worker.channel.close()
        for worker in there:
            stop_process(worker.process)
