"""A worker process, from inside: it loads a model and runs the batches that come through a socket, until that is closed.

Its first message says where it runs, its second what to load; then come batches, each with a number and answered once, in their order. A
number alone ends that batch. torch is imported inside functions, after the process is pinned to its cores.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import traceback
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
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
    ahead: int  # batches that may come before the last one is answered: a GPU is told of them meanwhile


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
        serve(channel, place, given)
    except (EOFError, ConnectionError):
        pass  # nobody asks any more
    os._exit(0)  # there is nothing to clean up, and whoever waits for the end waits less


def serve(channel: Connection, place: Place, given: bytes) -> None:
    """Load what was `given`, pickled, and answer batches. EOFError or ConnectionError once nobody asks any more."""
    import torch

    from pyembed.loading import load

    torch.set_num_threads(place.threads)
    try:
        arguments = pickle.loads(given)
        if arguments["device"].type == "cuda":
            torch.cuda.set_device(arguments["device"])  # else the first GPU would hold a context for every worker
        model = load(**arguments)
    except Exception as error:
        send(channel, failed(error))
        return
    send(channel, (model.ops.budget(model.spec.model, model.dtype, model.device), model.errors))
    answers: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=deliver, args=(channel, answers), daemon=True).start()
    asked: deque[Any] = deque()  # batches to run
    told: deque[Made | Failed] = deque()  # those that the device was told to run
    given_up: set[int] = set()

    def read() -> None:
        message = receive(channel)
        given_up.add(message) if isinstance(message, int) else asked.append(message)

    while True:
        while told and (len(told) > place.ahead or not (asked or channel.poll())):
            answers.put(answer(model, told.popleft()))
        if not asked:
            read()
            continue
        number, reads, rows = asked.popleft()

        def stop(number: int = number) -> bool:
            while channel.poll():
                read()
            return number in given_up

        told.append(begin(model, reads, rows, stop))
        given_up.difference_update([each for each in given_up if each <= number])


def deliver(channel: Connection, answers: SimpleQueue[Any]) -> None:
    """Send what there is. Beside the thread that reads: who asks sends the next batch, and may not read before that is taken."""
    try:
        while True:
            send(channel, answers.get())
    except ConnectionError:
        os._exit(0)  # nobody asks any more
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # without it nobody would ever be answered


def begin(model: Loaded, reads: Any, rows: Any, stop: Any) -> Made | Failed:
    """Run a batch, or tell the device to; or why not."""
    from pyembed import runner

    try:
        return runner.run_batch(model, reads, rows, stop)
    except EOFError:
        raise
    except Exception as error:
        return failed(error)


def answer(model: Loaded, made: Made | Failed) -> tuple[Flat, list[Flat], float] | Failed:
    """What a batch has given, once it is there, or why not."""
    import torch

    from pyembed.transfer import out_of_memory

    try:
        if not isinstance(made, Failed):
            return flat(made.landed())
    except Exception as error:
        made = failed(error)
    if model.device.type == "cuda" and out_of_memory(made.error):
        torch.cuda.empty_cache()
    return made


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
