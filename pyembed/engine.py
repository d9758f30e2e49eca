"""The one scheduler: texts arrive in windows, which are prepared in the background and run batch by batch while the caller reads on.

The caller's thread reads the inputs and takes results in order; one thread tokenises and plans; each lane (a device, or a worker
process) has a thread that runs batches. On a CPU of this process the caller's thread tokenises and plans, and of a window with batches
enough each core runs one at a time: threads that work on one batch wait for each other at every op. Few batches are run in the caller's
thread, one after the other, with all threads in each.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import torch

from pyembed.job import Engine, Input, Job, Stats, wordings
from pyembed.rows import extent, kept
from pyembed.runner import GIVEN_UP, POLL, LaneLost, Loaded, Made, Reads, Rows, Stop, Stopped, check, run_batch
from pyembed.ticket import Chunk, Flights, Ticket
from pyembed.tokenizer import Tokenizer
from pyembed.transfer import out_of_memory
from pyembed.window import PLENTY, Marked, Window, finish, place, prepare, room, rows_of

WINDOW_TEXTS = 1024  # texts in flight: what an interrupt loses, and what a stream reads before its first vector
WINDOW_CHARACTERS = 1 << 18
AHEAD = 2  # windows under way: one that is run, and one that is read and prepared meanwhile
CORES = 8  # threads of a CPU that a window of so many texts keeps busy; one that has more reads larger ones
AIRBORNE = 2  # batches that a device is still to run when the next one is prepared: one for each of its streams
LOSSES = 3  # lanes that may be lost over a text, with others and alone, before it is an error

Advance = Callable[[Stats], Any]
logger = logging.getLogger("pyembed")


def local(model: Loaded, tokenizer: Tokenizer) -> Engine:
    """An engine for a model in this process."""

    def lane(reads: Reads, rows: Rows, stop: Stop) -> Made:
        return run_batch(model, reads, rows, stop)

    def share(reads: Reads, rows: Rows, stop: Stop, most: int) -> Made:
        return run_batch(model, reads, rows, stop, share=most)

    budget, reuses = model.ops.budget(model.spec.model, model.dtype, model.device), model.prefixes is not None
    given = (model.spec, tokenizer, (lane,), (model.device,), (model.ops,), model.dtype, model.adapter, budget, reuses, model)
    return Engine(*given, share=share if model.device.type == "cpu" else None, errors=model.errors, deterministic=model.deterministic)


def windows(inputs: Iterable[Input], most: int = 1, *, growing: bool = False, once: bool = False) -> Iterator[tuple[Chunk, bool]]:
    """Chunks that end at `most` times WINDOW_TEXTS inputs or WINDOW_CHARACTERS, and whether there may be more. `growing`: the first ones
    are smaller, so that a device has something to run while the others are prepared.

    With `once` a text that was read before is not an input but a repeat. A slow iterator is left now and then, with an empty chunk, for
    finished windows to be handed out. What it raises comes after the inputs that it gave before.
    """
    chunk, characters, number, times = Chunk(), 0, -1, 1 if growing else most
    seen: dict[str, int] = {}
    looked = time.monotonic()
    try:
        for number, each in enumerate(inputs):
            if once and isinstance(each, str) and (earlier := seen.setdefault(each, number)) != number:
                chunk.repeats.append((number, earlier))
                continue
            chunk.inputs.append(kept(each))
            chunk.numbers.append(number)
            characters += sum(map(extent, wordings(each)))
            if time.monotonic() - looked > POLL:
                yield Chunk(), True
                looked = time.monotonic()
            if len(chunk.inputs) == WINDOW_TEXTS * times or characters >= WINDOW_CHARACTERS * times:
                yield chunk, True
                chunk, characters, times = Chunk(), 0, min(most, 2 * times)
    except Exception as error:
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"Raised by the iterable of inputs, instead of input {number + 1}.")
        if chunk.inputs or chunk.repeats:
            yield chunk, True
        raise
    if chunk.inputs or chunk.repeats:
        yield chunk, False


def check_process(engine: Engine) -> None:
    """RuntimeError in a forked child, where OpenMP's and the tokenizer's threads are missing and a call would hang."""
    if os.getpid() != engine.pid:
        raise RuntimeError(
            "This Encoder was made before the process forked, and its threads did not come along. Make the Encoder in the "
            "child, or start it with the 'spawn' method."
        )


def run(
    engine: Engine, job: Job, inputs: Iterable[Input], advance: Advance | None = None, *, once: bool = False
) -> Generator[Window, None, None]:
    """Results window by window, memory independent of how many texts there are. `advance` is told what each finished batch adds.

    With `once` a text that repeats an earlier one of the call is left to the caller (`Window.repeats`), for which all texts are kept. An
    exception comes after the results of the windows before it.
    """
    line = Line(engine, job, advance)
    times = 1 if engine.share is None else -(-torch.get_num_threads() // CORES)
    source = windows(inputs, max(job.budget.windows, times), growing=engine.share is None, once=once)
    more, begun, failure = True, False, None
    under_way: deque[Ticket] = deque()
    waits = True
    try:
        while more or under_way:
            while more and len(under_way) < AHEAD and not (under_way and under_way[0].done.is_set()):
                check_process(engine)
                try:
                    chunk, more = next(source, (Chunk(), False))
                except Exception as error:
                    failure, more = error, False
                    break
                if chunk.inputs or chunk.repeats:
                    under_way.append(line.start(chunk, only=not more and not begun))
                    begun = True
            if under_way:
                check_process(engine)
                yield line.result(under_way.popleft())
    except GeneratorExit:  # perhaps of the garbage collector, which may run anywhere: then a join could wait for this very thread
        waits = False
        raise
    finally:
        line.close()
        if waits:
            line.join()
    if failure is not None:
        raise failure


class Line:
    """The threads of one call, started when there is enough for them to do."""

    def __init__(self, engine: Engine, job: Job, advance: Advance | None) -> None:
        self.engine, self.job, self.advance = engine, job, advance
        self.windows: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.batches: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.threads: list[threading.Thread] = []
        self.caller = threading.current_thread()
        self.closed = False
        self.deserted = False  # a thread has ended before the call
        self.lock, self.ready = threading.Lock(), threading.Semaphore(0)
        self.marked: Marked = (set(), set())
        self.flights = Flights()

    def start(self, chunk: Chunk, *, only: bool) -> Ticket:
        """Send a window on its way; run it here where threads gain nothing: on this process's own cores, and one window on one lane."""
        ticket = Ticket(chunk)
        if not chunk.inputs:
            ticket.done.set()
            return ticket
        threads = torch.get_num_threads()
        if self.engine.share is not None or (only and len(self.engine.lanes) == 1):
            try:
                self.run_here(ticket, threads, only=only)
            except Exception as error:  # told when it is this window's turn
                self.drop()
                ticket.fail(error)
            except BaseException:  # an interrupt
                self.closed = True
                self.drop()
                raise
            return ticket
        self.employ([(self.windows, threads), *[(self.batches, threads)] * len(self.engine.lanes)])
        self.windows.put(partial(self.prepare, ticket, only))
        return ticket

    def run_here(self, ticket: Ticket, threads: int, *, only: bool) -> None:
        """Prepare a window in the caller's thread, and run what of it is not run side by side."""
        ticket.work = prepare(self.engine, self.job, ticket.chunk.inputs, ticket.chunk.numbers, only=True)
        shares = self.engine.share is not None and threads > 1
        batches = self.side_by_side(ticket, threads, only=only) if shares else ticket.work.batches
        if batches:
            ticket.expect(batches)
        for batch in batches:
            self.run_batch(ticket, batch)
        self.land(all_of=True)

    def side_by_side(self, ticket: Ticket, threads: int, *, only: bool) -> list[list[int]]:
        """Have a window's batches run one on each thread, where all will end at about the same time; returns the others."""
        assert ticket.work is not None
        batches = ticket.work.batches
        if len(batches) < PLENTY * threads and not self.threads:
            return batches
        count = len(batches) // threads * threads if only else len(batches)
        self.employ([(self.batches, 1)] * threads)
        ticket.expect(batches[:count])
        for batch in batches[:count]:
            self.batches.put(partial(self.step, ticket, batch))
        if count < len(batches):  # they want all threads, and those are taken until then
            self.wait(ticket)
            ticket.done.clear()
        return batches[count:]

    def employ(self, tasks: list[tuple[SimpleQueue[Callable[[], None]], int]]) -> None:
        """Start the call's threads, unless they are there: each takes from a queue, and computes on so many threads of its own."""
        usual, before = torch.get_num_threads(), len(self.threads)
        try:
            for queue, threads in [] if self.threads else tasks:
                thread = threading.Thread(target=self.loop, args=(queue, threads))
                thread.start()
                self.threads.append(thread)
        finally:  # what a thread sets for itself is also where threads that start later begin: ours is set again, last
            for _ in self.threads[before:]:
                self.ready.acquire()
            torch.set_num_threads(usual)

    def result(self, ticket: Ticket) -> Window:
        """What a window gave, once it is done."""
        self.caller = threading.current_thread()
        self.wait(ticket)
        assert ticket.work is not None or not ticket.chunk.inputs
        window, counts = finish(self.engine, self.job, ticket.work, ticket.chunk.repeats, self.marked)
        self.report(counts)
        return window

    def wait(self, ticket: Ticket) -> None:
        """Until the window's batches on other threads are done; raises what went wrong."""
        while not ticket.done.wait(POLL):
            if self.deserted:
                raise Stopped(GIVEN_UP)
        ticket.check()

    def close(self) -> None:
        """Have the threads end; they stop between two layers of a batch."""
        self.closed = True
        for _ in self.threads:  # wake those that wait
            self.windows.put(lambda: None)
            self.batches.put(lambda: None)

    def join(self) -> None:
        """Wait until the threads have ended. A forked child has none."""
        if os.getpid() == self.engine.pid:
            for thread in self.threads:
                thread.join()

    def stopped(self) -> bool:
        """Whether nobody waits any more: closed, or the process ends while a stream was left as it stood."""
        return self.closed or not (self.caller.is_alive() or threading.main_thread().is_alive())

    def loop(self, tasks: SimpleQueue[Callable[[], None]], threads: int) -> None:
        torch.set_num_threads(threads)
        torch.get_num_threads()  # from here on the thread has its own number: asked for the first time, it is the last one that was set
        self.ready.release()
        while not self.stopped():
            try:
                task = tasks.get_nowait() if self.flights.queue else tasks.get(timeout=POLL)
            except Empty:
                self.land()
                continue
            task()
        self.drop()
        self.deserted = not self.closed

    def drop(self) -> None:
        """Let go of batches on their way: a worker is told that nobody waits, and a device's memory is not left before it is done."""
        while self.flights.queue:
            with suppress(Exception):
                self.flights.queue.popleft()[-1].landed()

    def prepare(self, ticket: Ticket, only: bool) -> None:
        try:
            ticket.work = prepare(self.engine, self.job, ticket.chunk.inputs, ticket.chunk.numbers, only=only)
        except BaseException as error:
            ticket.fail(error)
            return
        ticket.expect(ticket.work.batches)
        for batch in ticket.work.batches:
            self.batches.put(partial(self.step, ticket, batch))

    def step(self, ticket: Ticket, batch: list[int]) -> None:
        try:
            self.run_batch(ticket, batch)
        except BaseException as error:
            ticket.fail(error)

    def run_batch(self, ticket: Ticket, batch: list[int], losses: int = 0, *, whole: bool = False) -> None:
        """Run a batch on the next free lane, and place what comes once it is there; in halves where memory runs out or lanes are lost over
        it. `whole`: with no other beside it.
        """
        assert ticket.work is not None
        work = ticket.work
        tokens, fits = room(work, batch), self.engine.fits
        if fits is not None and tokens > fits and len(batch) > 1:
            return self.halves(ticket, batch, losses)
        beside = not whole and self.engine.share is not None and threading.current_thread() in self.threads
        try:
            made = self.on_a_lane(rows_of(work, batch), beside=beside)
        except (LaneLost, RuntimeError, MemoryError) as error:
            return self.run_again(ticket, batch, losses, error, beside=beside)
        if made.arrival is None:
            return self.placed(ticket, batch, made)
        self.flights.queue.append((ticket, batch, losses, made))
        return self.land() if len(self.flights.queue) > AIRBORNE else None

    def run_again(self, ticket: Ticket, batch: list[int], losses: int, error: Exception, *, beside: bool = False) -> None:
        """A batch over which a lane was lost or memory ran out: as it is or in halves. Any other error is raised."""
        assert ticket.work is not None
        tokens = room(ticket.work, batch)
        alone = f"Input {ticket.work.numbers[ticket.work.owner[batch[0]]]}" if len(batch) == 1 else ""
        if isinstance(error, LaneLost):
            count = losses + error.sure
            if alone and count >= LOSSES:
                raise RuntimeError(f"{alone} ends every worker process that runs it; the last: {error}") from error
            again = alone or count <= 1  # whatever happened to the lane, it may not have been the batch
            return self.run_batch(ticket, batch, count) if again else self.halves(ticket, batch, losses)
        if not out_of_memory(error):
            raise error
        traceback.clear_frames(error.__traceback__)  # they hold what the batch had taken
        if alone and beside:  # the others may have taken the memory
            return self.run_batch(ticket, batch, losses, whole=True)
        if alone:
            raise MemoryError(f"{alone} alone, {tokens:,} tokens, does not fit into memory; lower max_seq_length. ({error})") from error
        self.shrink(tokens)
        return self.halves(ticket, batch, losses)

    def land(self, *, all_of: bool = False) -> None:
        """Wait for the batch that has been on its way for longest, if there is one, and place it; or for all."""
        while self.flights.queue:
            ticket, batch, losses, made = self.flights.queue.popleft()
            try:
                try:
                    made = made.landed()
                except (LaneLost, RuntimeError, MemoryError) as error:
                    self.run_again(ticket, batch, losses, error)
                else:
                    self.placed(ticket, batch, made)
            except BaseException as error:
                if threading.current_thread() not in self.threads:
                    raise
                ticket.fail(error)
            if not all_of:
                break

    def placed(self, ticket: Ticket, batch: list[int], made: Made) -> None:
        """Put a batch's results to their rows; the window is done with the last."""
        assert ticket.work is not None
        self.report(place(self.engine, self.job, ticket.work, batch, made))
        with self.lock:
            ticket.left -= len(batch)
            if ticket.left == 0:
                ticket.done.set()

    def on_a_lane(self, rows: Rows, *, beside: bool) -> Made:
        """Run a batch on a lane that no other call uses, or beside others. One lane has a lock of its own."""
        lanes, ours = self.engine.lanes, threading.current_thread() in self.threads
        if beside:
            assert self.engine.share is not None
            made = self.engine.share(self.job.reads, rows, self.stopped, len(self.threads))
            return made._replace(seconds=made.seconds / len(self.threads))
        if len(lanes) == 1:
            # not `stopped` in the caller's own thread: an interrupt inside is_alive makes Python take a thread for dead
            return lanes[0](self.job.reads, rows, self.stopped if ours else lambda: self.closed)
        number = self.free_lane()
        try:
            return lanes[number](self.job.reads, rows, self.stopped)
        finally:
            self.engine.free.put(number)

    def free_lane(self) -> int:
        """The number of a lane that no call uses; the caller puts it back."""
        while True:
            check(self.stopped)
            with suppress(Empty):
                return self.engine.free.get(timeout=POLL)

    def shrink(self, tokens: int) -> None:
        """Remember that so many tokens did not fit."""
        with self.engine.lock:
            fits = self.engine.fits = min(self.engine.fits or tokens, max(1, tokens // 2))
        logger.warning("A batch of %d tokens did not fit into memory; from now on batches have at most %d.", tokens, fits)
        if any(each.type == "cuda" for each in self.engine.devices) and self.engine.local is not None:
            torch.cuda.empty_cache()

    def halves(self, ticket: Ticket, batch: list[int], losses: int) -> None:
        middle = len(batch) // 2
        self.run_batch(ticket, batch[:middle], losses)
        self.run_batch(ticket, batch[middle:], losses)

    def report(self, done: Stats) -> None:
        self.engine.count(done)
        if self.advance is not None:
            with self.lock:
                self.advance(done)
