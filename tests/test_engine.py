"""The line of windows: order, faults, interrupts, and the threads it leaves behind (none)."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch

from pyembed import Encoder, engine, runner
from pyembed.runner import LaneLost, Loaded, Reads, Rows, Stop, Stopped, Turns

TEXTS = [f"{checkpoints.sentence(n % 23 + 1, n)} w{n % 50}" for n in range(120)]
FULL = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."
RunBatch = Callable[[Loaded, Reads, Rows, Stop], Any]


@pytest.fixture(scope="module")
def made(checkpoint_of_module: Path) -> Encoder:
    return Encoder(checkpoint_of_module, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def checkpoint_of_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(checkpoints.CASES["qwen3"], tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def encoder(made: Encoder, monkeypatch: pytest.MonkeyPatch) -> Encoder:
    """One whose windows have 10 texts and whose batches have few tokens."""
    monkeypatch.setattr(engine, "WINDOW_TEXTS", 10)
    monkeypatch.setitem(made._arguments, "tokens_per_batch", 64)
    monkeypatch.setattr(made, "_engine", replace(made._engine, stats=type(made.stats)(), fits=None, share=None))
    return made


@pytest.fixture(scope="module")
def expected(made: Encoder) -> np.ndarray:
    return np.stack([made.encode(text) for text in TEXTS])


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    end = time.monotonic() + 10  # those of a stream that is closed end by themselves
    while set(threading.enumerate()) != before and time.monotonic() < end:
        time.sleep(0.02)
    assert set(threading.enumerate()) == before


def several(encoder: Encoder, count: int) -> None:
    """Serve by `count` lanes of the same model."""
    own = encoder._engine
    encoder._engine = replace(own, lanes=own.lanes * count, devices=own.devices * count)


def patched(monkeypatch: pytest.MonkeyPatch, change: Callable[[RunBatch], RunBatch]) -> None:
    monkeypatch.setattr(engine, "run_batch", change(engine.run_batch))


@pytest.mark.parametrize(("lanes", "shares", "cores"), [(1, False, 1), (3, False, 1), (1, True, 1), (1, True, 2), (1, True, 3)])
def test_the_line_gives_the_bits_of_single_texts_in_order(
    encoder: Encoder, made: Encoder, expected: np.ndarray, lanes: int, shares: bool, cores: int
) -> None:
    several(encoder, lanes)
    torch.set_num_threads(cores)
    if shares:
        encoder._engine.share = engine.local(made._loaded, made.tokenizer).share
        assert encoder._engine.share is not None
    assert np.array_equal(encoder.encode(TEXTS), expected)
    assert np.array_equal(np.stack(list(encoder.stream(iter(TEXTS)))), expected)
    assert encoder.stats.texts == 2 * len(TEXTS)
    assert encoder.stats.busy > 0


def test_a_call_of_one_window_starts_no_thread(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    patched(monkeypatch, lambda run: lambda *given: (seen.append(threading.current_thread()), run(*given))[1])
    encoder.encode(TEXTS[:9])
    assert set(seen) == {threading.current_thread()}
    encoder.encode(TEXTS)
    assert len(set(seen)) == 2


def test_calls_at_the_same_time_share_the_cores(
    encoder: Encoder, made: Encoder, monkeypatch: pytest.MonkeyPatch, expected: np.ndarray
) -> None:
    """Two calls with a batch on each of two cores run two batches at a time, not four, and are not busy for longer than it takes."""
    running, most, counting, plain = 0, 0, threading.Lock(), runner.forward

    def counted(*given: Any, **more: Any) -> Any:
        nonlocal running, most
        with counting:
            running += 1
            most = max(most, running)
        time.sleep(0.005)
        made = plain(*given, **more)
        with counting:
            running -= 1
        return made

    monkeypatch.setattr(runner, "forward", counted)
    encoder._engine.share = engine.local(made._loaded, made.tokenizer).share
    torch.set_num_threads(2)
    found: list[np.ndarray] = []
    before, start = encoder.stats.busy, time.perf_counter()
    calls = [threading.Thread(target=lambda: found.append(encoder.encode(TEXTS))) for _ in range(3)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert encoder.stats.busy - before <= time.perf_counter() - start
    assert most == 2
    assert all(np.array_equal(each, expected) for each in found)
    assert len(found) == 3


def test_a_text_that_does_not_fit_beside_others_is_run_alone(encoder: Encoder, made: Encoder, expected: np.ndarray) -> None:
    share = engine.local(made._loaded, made.tokenizer).share
    assert share is not None

    def short_of_memory(reads: Reads, rows: Rows, stop: Stop, most: int) -> Any:
        if len(rows.ids) == 1 and len(rows.ids[0]) == max(map(len, made.token_ids(TEXTS))):
            raise MemoryError
        return share(reads, rows, stop, most)

    encoder._engine.share = short_of_memory
    torch.set_num_threads(2)
    assert np.array_equal(encoder.encode(TEXTS, batch_size=1), expected)


def test_many_cores_read_larger_windows(encoder: Encoder, made: Encoder, monkeypatch: pytest.MonkeyPatch, expected: np.ndarray) -> None:
    sizes, plain = [], engine.prepare

    def told(engine: Any, job: Any, inputs: list[Any], *given: Any, **more: Any) -> Any:
        sizes.append(len(inputs))
        return plain(engine, job, inputs, *given, **more)

    monkeypatch.setattr(engine, "prepare", told)
    encoder._engine.share = engine.local(made._loaded, made.tokenizer).share
    torch.set_num_threads(engine.CORES + 1)
    assert np.array_equal(encoder.encode(TEXTS), expected)
    assert sizes[0] == 2 * engine.WINDOW_TEXTS


@pytest.mark.parametrize("cores", [1, 2])
def test_on_a_cpu_each_core_has_a_batch_where_there_are_enough(
    encoder: Encoder, made: Encoder, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    """The caller's thread prepares; few batches it runs itself, with all threads in each."""
    seen: dict[str, list[tuple[threading.Thread, int]]] = {"prepare": [], "run_batch": []}
    for name, calls in seen.items():
        plain = getattr(engine, name)

        def told(*given: Any, plain: Any = plain, calls: list[Any] = calls, **more: Any) -> Any:
            calls.append((threading.current_thread(), torch.get_num_threads()))
            return plain(*given, **more)

        monkeypatch.setattr(engine, name, told)
    encoder._engine.share = engine.local(made._loaded, made.tokenizer).share
    torch.set_num_threads(cores)
    here = (threading.current_thread(), cores)
    encoder.encode(TEXTS)
    assert set(seen["prepare"]) == {here}
    others = set(seen["run_batch"]) - {here}
    assert {threads for _, threads in others} == ({1} if cores == 2 else set())
    assert here[0] not in {thread for thread, _ in others}
    assert len(others) == (2 if cores == 2 else 0)
    seen["run_batch"].clear()
    encoder.encode(TEXTS[:2])
    assert set(seen["run_batch"]) == {here}


def test_batches_on_each_core_leave_other_threads_their_number(encoder: Encoder, made: Encoder) -> None:
    encoder._engine.share = engine.local(made._loaded, made.tokenizer).share
    torch.set_num_threads(2)
    encoder.encode(TEXTS)
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [2] == [torch.get_num_threads()]


def test_a_bad_text_comes_after_the_windows_before_it_on_each_core(encoder: Encoder, made: Encoder, expected: np.ndarray) -> None:
    encoder._engine.share = engine.local(made._loaded, made.tokenizer).share
    torch.set_num_threads(2)
    given: list[np.ndarray] = []
    with pytest.raises(TypeError, match="25"):
        given.extend(encoder.stream(iter([*TEXTS[:25], 7])))  # type: ignore[list-item]
    assert np.array_equal(np.stack(given), expected[: len(given)])
    assert len(given) == 20


def test_who_wants_all_threads_is_let_in_before_those_that_share() -> None:
    turns, order = Turns(), []
    turns.enter(2)

    def whole() -> None:
        with turns.door, turns.room:
            order.append("whole")

    def share() -> None:
        turns.enter(2)
        order.append("share")
        turns.leave()

    first = threading.Thread(target=whole)
    first.start()
    while not turns.door.locked():
        time.sleep(0.001)
    second = threading.Thread(target=share)
    second.start()
    time.sleep(0.02)
    assert order == []
    turns.leave()
    first.join()
    second.join()
    assert order == ["whole", "share"]
    assert not turns.room.locked()


def test_lanes_have_the_callers_number_of_threads(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    patched(monkeypatch, lambda run: lambda *given: (seen.add(torch.get_num_threads()), run(*given))[1])
    torch.set_num_threads(3)
    encoder.encode(TEXTS)
    assert seen == {3}
    assert torch.get_num_threads() == 3


def test_windows_are_prepared_while_others_run(encoder: Encoder, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second window is tokenised before the first one's only batch ends, or this would wait in vain."""
    prepared = threading.Event()
    prepare = engine.prepare

    def second(*given: Any, **named: Any) -> Any:
        out = prepare(*given, **named)
        if given[3][0] == 10:
            prepared.set()
        return out

    def waits(run: RunBatch) -> RunBatch:
        def wrapped(*given: Any) -> Any:
            assert prepared.wait(30)
            return run(*given)

        return wrapped

    monkeypatch.setattr(engine, "prepare", second)
    patched(monkeypatch, waits)
    assert np.array_equal(encoder.encode(TEXTS), expected)


def test_a_stream_reads_a_few_windows_ahead_and_no_more(encoder: Encoder) -> None:
    read = 0

    def source() -> Iterator[str]:
        nonlocal read
        for text in TEXTS:
            read += 1
            yield text

    stream = encoder.stream(source())
    for done in range(60):
        next(stream)
        assert read <= done // 10 * 10 + 10 * (engine.AHEAD + 1)
    stream.close()  # type: ignore[attr-defined]
    assert read < len(TEXTS)


# Faults


def take(stream: Iterator[np.ndarray], rows: list[np.ndarray]) -> None:
    for row in stream:
        rows.append(row)  # one by one: list.extend would lose them


@pytest.mark.parametrize("at", [0, 7, 10, 37])
def test_what_the_iterator_raises_comes_after_what_it_gave(encoder: Encoder, expected: np.ndarray, at: int) -> None:
    def source() -> Iterator[str]:
        yield from TEXTS[:at]
        raise KeyError("the disk is gone")

    rows: list[np.ndarray] = []
    with pytest.raises(KeyError, match="the disk is gone") as caught:
        take(encoder.stream(source()), rows)
    assert caught.value.__notes__ == [f"Raised by the iterable of inputs, instead of input {at}."]
    assert np.array_equal(np.array(rows).reshape(at, 48), expected[:at])


def test_what_is_no_text_is_named_after_the_windows_before_it(encoder: Encoder, expected: np.ndarray) -> None:
    rows: list[np.ndarray] = []
    with pytest.raises(TypeError, match="Input 33 is a NoneType"):
        take(encoder.stream([*TEXTS[:33], None, *TEXTS[33:]]), rows)  # type: ignore[list-item]
    assert np.array_equal(np.stack(rows), expected[:30])


def test_an_exception_in_a_batch_reaches_the_caller(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: RunBatch) -> RunBatch:
        def wrapped(model: Loaded, reads: Reads, rows: Rows, stop: Stop) -> Any:
            if len(done) == 5:
                raise OSError("the bus is gone")
            done.append(len(rows.ids))
            return run(model, reads, rows, stop)

        return wrapped

    done: list[int] = []
    patched(monkeypatch, broken)
    with pytest.raises(OSError, match="the bus is gone"):
        encoder.encode(TEXTS)


def test_a_vector_that_is_not_finite_is_named_in_any_window(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(run: RunBatch) -> RunBatch:
        def wrapped(model: Loaded, reads: Reads, rows: Rows, stop: Stop) -> Any:
            made = run(model, reads, rows, stop)
            vectors = made.vectors.clone()
            for n, ids in enumerate(rows.ids):
                if len(ids) == length:
                    vectors[n, 3] = torch.inf
            return made._replace(vectors=vectors)

        return wrapped

    texts = [*TEXTS[:70], "w1 " * 41, *TEXTS[70:]]
    length = len(encoder.tokenizer.encode([texts[70]], None).ids[0])
    patched(monkeypatch, bad)
    with pytest.raises(ValueError, match="Input 70 gives a vector with NaN"):
        encoder.encode(texts)


def faulty(run: RunBatch, chance: float, seed: int, error: Callable[[], Exception], ran: Counter[bytes]) -> RunBatch:
    """Fails at random, before or after it has computed; counts the rows that it gives back."""
    dice, lock = random.Random(seed), threading.Lock()

    def wrapped(model: Loaded, reads: Reads, rows: Rows, stop: Stop) -> Any:
        with lock:
            early, late = dice.random() < chance, dice.random() < chance
        if early:
            raise error()
        made = run(model, reads, rows, stop)
        if late and len(rows.ids) > 1:
            raise error()
        ran.update(each.tobytes() for each in rows.ids)
        return made

    return wrapped


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_lanes_lost_at_random_lose_and_double_nothing(
    encoder: Encoder, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch, seed: int, lanes: int
) -> None:
    several(encoder, lanes)
    ran: Counter[bytes] = Counter()
    monkeypatch.setattr(engine, "LOSSES", 1000)
    patched(monkeypatch, lambda run: faulty(run, 0.3, seed, lambda: LaneLost("killed"), ran))
    assert np.array_equal(np.stack(list(encoder.stream(TEXTS))), expected)
    assert encoder.stats.texts == len(TEXTS)
    rows = Counter(each.tobytes() for each in encoder.tokenizer.encode(TEXTS, None).ids)
    assert ran.keys() == rows.keys()
    assert all(ran[row] <= rows[row] for row in rows)


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_memory_that_runs_out_at_random_loses_and_doubles_nothing(
    encoder: Encoder, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch, seed: int, lanes: int
) -> None:
    def scarce(run: RunBatch) -> RunBatch:
        inner = faulty(run, 0.4, seed, lambda: RuntimeError(FULL), ran)
        return lambda *given: run(*given) if len(given[2].ids) == 1 else inner(*given)

    several(encoder, lanes)
    ran: Counter[bytes] = Counter()
    patched(monkeypatch, scarce)
    assert np.array_equal(np.stack(list(encoder.stream(TEXTS))), expected)
    assert encoder.stats.texts == len(TEXTS)
    assert encoder._engine.fits is not None
    assert encoder._engine.fits < 64


def test_a_text_that_ends_every_lane_is_named(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def deadly(run: RunBatch) -> RunBatch:
        def wrapped(model: Loaded, reads: Reads, rows: Rows, stop: Stop) -> Any:
            if any(np.array_equal(ids, poison) for ids in rows.ids):
                deaths.append(len(rows.ids))
                raise LaneLost("process 7 was killed (SIGKILL)")
            return run(model, reads, rows, stop)

        return wrapped

    deaths: list[int] = []
    texts = [*TEXTS[:57], "w3 w2 w1 w2 w3", *TEXTS[57:]]
    poison = encoder.tokenizer.encode([texts[57]], None).ids[0]
    patched(monkeypatch, deadly)
    with pytest.raises(RuntimeError, match=r"Input 57 ends every worker process that runs it; the last: process 7 was killed"):
        encoder.encode(texts)
    assert deaths[-2:] == [1, 1]
    assert len(deaths) <= 3 + 1 + 5


# Stopping


def test_a_stream_that_is_left_stops_within_a_batch(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that has begun ends between two layers, not after the last one."""
    began, ended = threading.Event(), []

    def slow(run: RunBatch) -> RunBatch:
        def wrapped(model: Loaded, reads: Reads, rows: Rows, stop: Stop) -> Any:
            if first:
                first.clear()
                return run(model, reads, rows, stop)
            began.set()
            while not stop():
                time.sleep(0.01)
            try:
                return run(model, reads, rows, stop)
            except Stopped:
                ended.append(True)
                raise

        return wrapped

    first = [True]
    monkeypatch.setitem(encoder._arguments, "tokens_per_batch", 10_000)
    patched(monkeypatch, slow)
    stream = encoder.stream(iter(TEXTS))
    next(stream)
    assert began.wait(30)
    stream.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 10
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended == [True]


SCRIPT = """
import signal, sys, threading, time
from pyembed import Encoder, engine, runner
engine.WINDOW_TEXTS = 8
encoder = Encoder(sys.argv[1], device="cpu", dtype="float32")
encoder._engine.share = None
texts = (f"w{n % 50} w{n % 7} " * 20 for n in range(10**9))
"""


@pytest.mark.parametrize("serves", ["encoder._engine.share = None", "import torch; torch.set_num_threads(2)"])
def test_ctrl_c_ends_a_call_and_leaves_no_thread(checkpoint_of_module: Path, serves: str) -> None:
    script = SCRIPT.replace("encoder._engine.share = None", serves) + textwrap.dedent(
        """
        threading.Timer(1.0, signal.raise_signal, [signal.SIGINT]).start()
        try:
            for row in encoder.stream(texts):
                pass
        except KeyboardInterrupt:
            end = time.monotonic() + 5  # where the interrupt met the consumer, they end by themselves
            while threading.active_count() > 1 and time.monotonic() < end:
                time.sleep(0.02)
            others = [each for each in threading.enumerate() if each is not threading.main_thread()]
            left = [each.name for each in others if not isinstance(each, threading.Timer)]
            print("interrupted", left, encoder.stats.texts > 0, len(encoder.encode("w1 w2")))
        """
    )
    done = subprocess.run([sys.executable, "-c", script, checkpoint_of_module], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("interrupted [] True"), done.stdout


def test_a_stream_that_is_left_as_it_stands_does_not_keep_the_process(checkpoint_of_module: Path) -> None:
    """Batches that last an hour, unless they are told that the process ends."""
    script = SCRIPT + textwrap.dedent(
        """
        run, calls = engine.run_batch, []
        def slow(model, reads, rows, stop):
            calls.append(1)
            while len(calls) > 3 and not stop():
                time.sleep(0.05)
            return run(model, reads, rows, stop)
        engine.run_batch = slow
        stream = encoder.stream(texts)
        print(len(next(stream)), len(threading.enumerate()))
        """
    )
    done = subprocess.run([sys.executable, "-c", script, checkpoint_of_module], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "3", done.stdout
    assert not done.stderr


def interrupted(encoder: Encoder, texts: list[str], at: int) -> bool:
    """Whether `encode` comes to its line number `at` in the engine or the runner, where it is interrupted."""
    lines = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.endswith(("pyembed/engine.py", "pyembed/runner.py")):
            return None
        lines += event == "line"
        if lines == at:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        encoder.encode(texts)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("shares", [False, True], ids=["in the caller's thread", "a batch on each core"])
def test_an_interrupt_anywhere_leaves_the_encoder_usable(
    encoder: Encoder, made: Encoder, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    texts = TEXTS[:9] if shares else TEXTS[:3]
    if shares:
        monkeypatch.setattr(engine, "PLENTY", 1)
        encoder._engine.share = engine.local(made._loaded, made.tokenizer).share
        torch.set_num_threads(2)
    right, count = encoder.encode(texts), 0
    for at in range(1, 400, 3):
        count += interrupted(encoder, texts, at)
        assert np.array_equal(encoder.encode(texts), right)
    assert count > 20


def test_a_thread_that_cannot_start_is_the_error_that_is_told(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    start, calls = threading.Thread.start, 0

    def second_fails(thread: threading.Thread) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", second_fails)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        encoder.encode(TEXTS)


def test_a_stream_is_read_on_in_another_thread(checkpoint_of_module: Path) -> None:
    """Also where the thread that began it, and the main thread, have ended."""
    script = SCRIPT + textwrap.dedent(
        """
        stream = encoder.stream([f"w{n % 50}" for n in range(100)])
        first = threading.Thread(target=lambda: next(stream))
        first.start()
        first.join()
        def rest():
            print(sum(1 for _ in stream))
        threading.Thread(target=rest).start()
        """
    )
    done = subprocess.run([sys.executable, "-c", script, checkpoint_of_module], capture_output=True, text=True, timeout=100)
    assert done.stdout == "99\n", done.stderr


def test_an_exception_keeps_no_encoder_alive(checkpoint_of_module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(checkpoint_of_module, device="cpu", dtype="float32")
    monkeypatch.setattr(engine, "WINDOW_TEXTS", 4)
    gone = weakref.ref(encoder)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(TypeError):
            encoder.encode([*TEXTS[:9], None])  # type: ignore[list-item]
        del encoder
        assert gone() is None
    finally:
        gc.enable()


# What the caller changes meanwhile


def test_a_list_that_becomes_shorter_is_told(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = list(TEXTS)
    patched(monkeypatch, lambda run: lambda *given: (texts.__delitem__(slice(50, None)), run(*given))[1])
    with pytest.raises(ValueError, match=r"The inputs were 120 when the call began and \d+ when they were read"):
        encoder.encode(texts)


def test_an_array_that_is_filled_anew_is_not_read_again(encoder: Encoder) -> None:
    rows = [np.arange(6) + 5 + n for n in range(8)]

    def reused() -> Iterator[np.ndarray]:
        buffer = np.zeros(6, dtype=np.int64)
        for row in rows:
            buffer[:] = row
            yield buffer

    assert np.array_equal(encoder.encode(reused()), encoder.encode(rows))


def test_a_slow_iterator_does_not_hold_back_finished_windows(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def slow() -> Iterator[str]:
        nonlocal read
        for n, text in enumerate(TEXTS[:40]):
            if n >= 10:
                time.sleep(0.12)
            read += 1
            yield text

    stream = encoder.stream(slow())
    next(stream)
    assert read < 20
    stream.close()  # type: ignore[attr-defined]


def test_repeats_are_counted_like_their_first(encoder: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    before, encoder.max_seq_length = encoder.max_seq_length, 6
    texts = ["w1 " * 9, "w5 \ud800", "w6", "w5 \ud800", "w1 " * 9, "w5 \ud800"]
    encoder.encode(texts)
    encoder.max_seq_length = before
    assert (encoder.stats.texts, encoder.stats.truncated, encoder.stats.replaced, encoder.stats.duplicates) == (6, 2, 3, 3)
    assert "2 of 6 texts were cut to 6 tokens" in caplog.text
    assert "3 of 6 texts held lone surrogates" in caplog.text


def test_variants_of_one_text_leave_the_others_alone(encoder: Encoder) -> None:
    alone = encoder.encode(TEXTS[:9])
    together = encoder.encode(TEXTS[:9], variants=[*[[]] * 8, ["w7 w8"]])
    assert np.array_equal(together[:8], alone[:8])
    assert not np.array_equal(together[8], alone[8])
