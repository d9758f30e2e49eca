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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch

from pyembed.job import Lane
from pyembed.ops.budget import Budget
from pyembed.options import cores
from pyembed.runner import POLL, LaneLost, Made, Reads, Rows, Stop, Stopped, check
from pyembed.worker import Failed, Flat, Place, send

PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from pyembed.worker import main; main(int(sys.argv[1]))"
Loaded = tuple[Budget, dict[str, float]]  # how much a worker takes at once, and the errors of its linear layers in eight bits
PATIENCE = 2.0  # seconds that a worker has to end by itself

logger = logging.getLogger("pyembed")


class WorkerTraceback(Exception):
    """Where in a worker an error was raised: the cause of that error in this process."""


@dataclass(slots=True)
class Worker:
    """A worker process of ours."""

    process: subprocess.Popen[bytes]
    channel: Connection
    device: torch.device
    loaded: bool = False
    owed: int = 1  # answers that are to come: to loading, then to a batch, which may have been given up


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
            worker = self.workers[number] = Worker(process, Connection(ours.detach()), device)
        with suppress(BrokenPipeError):  # who waits for it will see that it has ended
            send(worker.channel, place)
            send(worker.channel, self.model | {"device": device})
        return worker

    def run(self, number: int, reads: Reads, rows: Rows, stop: Stop) -> Made:
        """Run a batch on the worker of this number, which is started anew where it has died. Token states come on the CPU.

        LaneLost where it dies over the batch. Stopped where `stop` says so; the worker then ends the batch between two layers.
        """
        with self.locks[number]:
            worker = self.ready(number, stop)
            try:
                while worker.owed:
                    take(worker, stop)
                send(worker.channel, (reads, rows))
                worker.owed += 1
                try:
                    message = take(worker, stop)
                except Stopped:
                    send(worker.channel, None)
                    raise
            except (EOFError, OSError) as error:
                raise LaneLost(self.bury(worker, number)) from error
        vectors, states, seconds = opened(message)
        return Made(tensor(vectors), [tensor(each) for each in states], seconds)

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

    def bury(self, worker: Worker, number: int) -> str:
        """Forget a worker that has ended; how it did, as a sentence."""
        self.workers[number] = None
        worker.channel.close()
        said = ended(worker)
        logger.error("%s A new one takes its place.", said)  # an error that is mended: also told where warnings wait for a summary
        return said


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
    own, count = cores(), sum(each.type == "cpu" for each in devices)
    shares = [own[n * len(own) // count : (n + 1) * len(own) // count] for n in range(count)]
    out, pinned = [], hasattr(os, "sched_setaffinity")
    for device in devices:
        if device.type == "cpu":
            share = shares.pop(0)
            threads = min(len(share), max(1, torch.get_num_threads() // count))
            out.append(Place(tuple(share) if pinned else (), threads))
        else:
            out.append(Place((), max(1, torch.get_num_threads() // len(devices))))
    return out


def take(worker: Worker, stop: Stop | None = None) -> Any:
    """The worker's next answer. EOFError or OSError where it has ended, Stopped where `stop` says so."""
    while not worker.channel.poll(POLL):
        check(stop)
        if worker.process.poll() is not None and not worker.channel.poll():
            raise EOFError  # where somebody else holds the other end of the socket
    data = worker.channel.recv_bytes()
    worker.owed -= 1
    return pickle.loads(data)


def finish_loading(worker: Worker, stop: Stop | None = None) -> Loaded:
    """Wait until the worker has loaded. What it raised over it; LaneLost where it ended."""
    try:
        message = take(worker, stop)
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
