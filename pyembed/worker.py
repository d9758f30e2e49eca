"""A worker process, from inside: it loads a model and runs the batches that come through a socket, until that is closed.

Its first message says where it runs, its second what to load; then come batches, each answered once. A None ends the batch under way.
torch is imported inside functions, after the process is pinned to its cores.
"""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pyembed.runner import Loaded, Made

Flat = tuple["torch.dtype", "np.ndarray"]  # a tensor's dtype and its bytes, which numpy may not have a dtype for


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker runs."""

    cores: tuple[int, ...]  # that it is pinned to; empty: any
    threads: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer to what raised an error."""

    error: Exception
    trace: str


def send(channel: Connection, message: Any) -> None:
    """`Connection.send` would put torch's tensors into shared memory, which containers are short of."""
    channel.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def receive(channel: Connection) -> Any:
    """EOFError or OSError where the other side is gone."""
    return pickle.loads(channel.recv_bytes())


def main(handle: int) -> None:
    """Serve the socket `handle`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    channel = Connection(handle)
    try:
        place, given = receive(channel), channel.recv_bytes()
        if place.cores:
            os.sched_setaffinity(0, place.cores)
        serve(channel, place.threads, given)
    except (EOFError, ConnectionError):
        pass  # nobody asks any more
    os._exit(0)  # there is nothing to clean up, and whoever waits for the end waits less


def serve(channel: Connection, threads: int, given: bytes) -> None:
    """Load what was `given`, pickled, and answer batches. EOFError or ConnectionError once nobody asks any more."""
    import torch

    from pyembed.loading import load

    torch.set_num_threads(threads)
    try:
        arguments = pickle.loads(given)
        if arguments["device"].type == "cuda":
            torch.cuda.set_device(arguments["device"])  # else the first GPU would hold a context for every worker
        model = load(**arguments)
    except Exception as error:
        send(channel, failed(error))
        return
    send(channel, (model.ops.budget(model.spec.model, model.dtype, model.device), model.errors))

    def given_up() -> bool:
        return channel.poll() and receive(channel) is None

    while True:
        asked = receive(channel)
        if asked is not None:  # else it was for a batch that had just ended
            reads, rows = asked
            send(channel, answer(model, reads, rows, given_up))


def answer(model: Loaded, reads: Any, rows: Any, stop: Any) -> tuple[Flat, list[Flat], float] | Failed:
    """What the batch gives, or why not."""
    import torch

    from pyembed import runner

    try:
        return flat(runner.run_batch(model, reads, rows, stop).landed())
    except EOFError:
        raise
    except Exception as error:
        out = failed(error)
    if model.device.type == "cuda" and runner.out_of_memory(out.error):
        torch.cuda.empty_cache()
    return out


def failed(error: Exception) -> Failed:
    """An error as it can be sent: itself where pickle brings it back, else a RuntimeError that names its type."""
    trace = "".join(traceback.format_exception(error))
    try:
        same = pickle.loads(pickle.dumps(error))
        if (type(same), str(same)) == (type(error), str(error)):
            return Failed(same, trace)
    except Exception as problem:  # of any type: it comes from the code of any exception class
        trace += f"\nIt could not be pickled: {problem}"
    return Failed(RuntimeError(f"{type(error).__name__}: {error}"), trace)


def flat(made: Made) -> tuple[Flat, list[Flat], float]:
    import torch

    vectors, *states = ((each.dtype, each.cpu().contiguous().view(torch.uint8).numpy()) for each in (made.vectors, *made.states))
    return vectors, states, made.seconds
