"""Several devices: worker processes that give the bits of one process, whatever happens to them, and that leave nothing behind."""

from __future__ import annotations

import gc
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import checkpoints
import faulty_worker as faults
import numpy as np
import psutil
import pytest
import torch

from pyembed import Encoder, engine, options, verify, worker, workers
from pyembed.cli import main
from pyembed.probes import ProbeError

TWO = ["cpu", "cpu"]
TEXTS = [checkpoints.sentence(n % 23 + 1, seed=n).replace("w4", "w5") for n in range(80)]  # no text has w40 to w49
PROMPT = "w9 w8 w7 w6 w10 w11 w12 w13 w14 w15 w16 "
FAULTY = workers.PROGRAM.replace("pyembed.worker", "faulty_worker")
Directory = Callable[[str], Path]

pytestmark = pytest.mark.skipif(len(options.cores()) < 2, reason="two workers need two cores")


def pids(encoder: Encoder) -> list[int]:
    found: list[Any] = [lane.func.__self__.workers[n].process.pid for n, lane in enumerate(encoder._engine.lanes)]  # type: ignore[attr-defined]
    return found


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def within(seconds: float, happens: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not happens():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(checkpoints.CASES["qwen3"], tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def one(directory: Path) -> Encoder:
    return Encoder(directory, device=["cpu"], dtype="float32")


@pytest.fixture(scope="module")
def two(directory: Path) -> Encoder:
    return Encoder(directory, device=TWO, dtype="float32", token="secret", tokens_per_batch=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the faulty workers leave a note of what they did."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module", params=[0, 2], ids=["one at a time", "ahead"])
def odd(directory: Path, folder: Path, request: pytest.FixtureRequest) -> Iterator[Encoder]:
    """One whose workers have faults. Ahead: they are told of further batches before they answer, as a GPU's are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(workers.AHEAD, "cpu", request.param)
        patch.setenv("FAULTS", str(folder))
        patch.setattr(workers, "PROGRAM", FAULTY)
        yield Encoder(directory, device=TWO, dtype="float32", tokens_per_batch=64)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "WINDOW_TEXTS", 10)


# What comes out


def test_vectors_have_the_bits_of_one_process(one: Encoder, two: Encoder, small_windows: None) -> None:
    before = one.stats, two.stats
    for arguments in ({}, {"prompt": PROMPT}, {"truncate_dim": 7, "normalize_embeddings": True}):
        assert np.array_equal(one.encode(TEXTS, **arguments), two.encode(TEXTS, **arguments))
    assert np.array_equal(np.stack(list(two.stream(iter(TEXTS)))), np.stack(list(one.stream(iter(TEXTS)))))
    ours, theirs = (now.stats for now in (one, two))
    for name in ("texts", "tokens", "prefix_tokens", "duplicates"):
        assert getattr(ours, name) - getattr(before[0], name) == getattr(theirs, name) - getattr(before[1], name), name
    assert ours.prefix_tokens > 0
    assert theirs.busy > before[1].busy
    assert np.array_equal(two.encode(TEXTS[0]), one.encode(TEXTS[0]))
    assert np.array_equal(two.encode(TEXTS, convert_to_tensor=True).numpy(), one.encode(TEXTS))
    assert two.encode([]).shape == (0,)


def test_token_states_and_bfloat16_come_through(directory: Path) -> None:
    one, two = (Encoder(directory, device=device, dtype="bfloat16", share_prefixes=True) for device in ("cpu", TWO))
    assert np.array_equal(one.encode([PROMPT + text for text in TEXTS]), two.encode([PROMPT + text for text in TEXTS]))
    assert two.stats.prefix_tokens > 0
    assert np.array_equal(one.encode(TEXTS), two.encode(TEXTS))
    ours, theirs = (each.encode(TEXTS, output_value="token_embeddings") for each in (one, two))
    assert {each.dtype for each in theirs} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    theirs[0] += 1  # writable, and nobody else's memory
    ours, theirs = (each.encode(TEXTS[:3], output_value=None, prompt=PROMPT) for each in (one, two))
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_one_window_is_divided_among_the_lanes(two: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def lane(number: int) -> Any:
        return lambda reads, rows, stop: (ran.append((number, sum(map(len, rows.ids)))), own[number](reads, rows, stop))[1]

    own, ran = two._engine.lanes, []  # type: ignore[var-annotated]
    monkeypatch.setattr(two._engine, "lanes", tuple(map(lane, range(2))))
    monkeypatch.setitem(two._arguments, "tokens_per_batch", None)
    two.encode(TEXTS)
    assert {number for number, _ in ran} == {0, 1}
    assert max(tokens for _, tokens in ran) < 0.6 * sum(tokens for _, tokens in ran)
    ran.clear()
    two.encode(TEXTS[:5])
    assert len(ran) == 1, "a few tokens are not worth another lane"


def test_a_worker_is_told_of_batches_before_it_answers(odd: Encoder, one: Encoder, small_windows: None) -> None:
    pool = odd._engine.lanes[0].func.__self__  # type: ignore[attr-defined]
    most, take = [0], pool.take

    def counted(number: int, worker: workers.Worker, stop: Any) -> None:
        most.append(len(worker.owed))
        take(number, worker, stop)

    pool.take = counted
    try:
        assert np.array_equal(odd.encode(TEXTS), one.encode(TEXTS))
        assert np.array_equal(np.stack(list(odd.stream(iter(TEXTS)))), one.encode(TEXTS))
    finally:
        del pool.take
    ahead = pool.workers[0].ahead
    assert min(2, 1 + ahead) <= max(most) <= 1 + ahead


def test_messages_that_no_socket_holds_pass_each_other(odd: Encoder, one: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is sent while the worker sends its last answer, each a megabyte: neither waits for the other to read."""
    monkeypatch.setattr(engine, "WINDOW_TEXTS", 60_000)
    monkeypatch.setattr(engine, "WINDOW_CHARACTERS", 1 << 30)
    monkeypatch.setitem(odd._arguments, "tokens_per_batch", 16_384)
    dice = np.random.default_rng(0)
    ids = [each.astype(np.int32) for each in dice.integers(4, 40, (60_000, 4))]
    with ThreadPoolExecutor(1) as thread:
        sent = thread.submit(odd.encode, ids)
        try:
            vectors = sent.result(timeout=120)
        except TimeoutError:
            for pid in pids(odd):  # what waits for them ends
                os.kill(pid, signal.SIGKILL)
            raise
    assert np.array_equal(vectors[:5], one.encode(ids[:5]))


def test_threads_may_encode_at_once(one: Encoder, two: Encoder) -> None:
    expected = one.encode(TEXTS)
    with ThreadPoolExecutor(5) as threads:
        found = list(threads.map(lambda n: two.encode(TEXTS[n:], batch_size=1 + n), range(10)))
    assert all(np.array_equal(each, expected[n:]) for n, each in enumerate(found))


@pytest.mark.parametrize("odd", [pytest.param(0, id="one at a time")], indirect=True)
def test_calls_at_once_share_the_lanes(odd: Encoder, folder: Path, one: Encoder) -> None:
    """While a call keeps one lane, another one takes the other: it does not wait for the first lane."""
    (folder / "hangs").unlink(missing_ok=True)
    with ThreadPoolExecutor(1) as thread:
        hanging = thread.submit(odd.encode, f"w{faults.HANG}")
        try:
            assert within(30, (folder / "hangs").exists)
            for n in range(4):
                assert np.array_equal(odd.encode(TEXTS[n]), one.encode(TEXTS[n]))
            assert not hanging.done()
        finally:
            (folder / "release").touch()
        assert np.array_equal(hanging.result(), one.encode(f"w{faults.HANG}"))
        (folder / "release").unlink()


def test_what_it_says_of_itself(one: Encoder, two: Encoder) -> None:
    assert "device=cpu x 2 (worker processes), dtype=float32" in repr(two)
    assert "device=cpu, dtype" in repr(one)
    assert (two.device, two.devices) == (torch.device("cpu"), (torch.device("cpu"),) * 2)
    assert one.devices == (torch.device("cpu"),)
    assert one._engine.local is not None, "a list of one device needs no worker"
    assert two._engine.local is None
    for refused in (lambda: two.encode_sparse(["w4"], words=str.split), lambda: verify.probe(two)):
        with pytest.raises(ValueError, match=r"works on one device, but device= lists 2"):
            refused()


def test_a_pickle_keeps_the_list_and_workers_are_told_no_secret(two: Encoder) -> None:
    _, (arguments, _) = two.__reduce__()  # type: ignore[misc]
    assert arguments["device"] == TWO
    pool = two._engine.lanes[0].func.__self__  # type: ignore[attr-defined]
    said = pickle.dumps(pool.model)
    assert len(said) < 20_000
    assert b"secret" not in said
    for pid in pids(two):
        assert b"secret" not in Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()


def test_encode_moves_the_model(directory: Path, one: Encoder) -> None:
    encoder = Encoder(directory, device="cpu", dtype="float32")
    assert np.array_equal(encoder.encode(TEXTS, device=TWO), one.encode(TEXTS))
    first = pids(encoder)
    encoder.encode(TEXTS, device=TWO)
    assert pids(encoder) == first, "it is there already"
    stream = encoder.stream(TEXTS)
    next(stream)
    encoder.encode("w4", device="cpu")
    assert not any(map(gone, first)), "a call uses them"
    assert len(list(stream)) == len(TEXTS) - 1
    del stream
    assert within(5, lambda: all(map(gone, first)))
    assert encoder._engine.local is not None


def test_the_command_line_takes_several(directory: Path, one: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_text("\n".join(TEXTS))
    out = tmp_path / "out.npy"
    command = ["encode", str(directory), str(tmp_path / "in.txt"), "-o", str(out), "--device", "cpu,cpu", "--dtype", "float32"]
    assert main(command) == 0, capsys.readouterr().err
    assert np.array_equal(np.load(out), one.encode(TEXTS))
    assert main(["info", str(directory), "--device", "cpu,cpu"]) == 0
    assert "cpu x 2 (worker processes) in" in capsys.readouterr().out


# Faults


def test_a_worker_that_was_killed_while_idle_is_replaced(
    one: Encoder, two: Encoder, caplog: pytest.LogCaptureFixture, small_windows: None
) -> None:
    first = pids(two)
    os.kill(first[1], signal.SIGKILL)
    assert within(5, lambda: gone(first[1]))
    with caplog.at_level(logging.WARNING, logger="pyembed"):
        assert np.array_equal(two.encode(TEXTS), one.encode(TEXTS))
    assert f"Worker process {first[1]} on cpu was killed by SIGKILL. A new one takes its place." in caplog.text
    now = pids(two)
    assert now[0] == first[0]
    assert now[1] != first[1]


def test_a_worker_that_is_killed_in_a_batch_loses_nothing(
    one: Encoder, odd: Encoder, folder: Path, caplog: pytest.LogCaptureFixture, small_windows: None
) -> None:
    (folder / "killed").unlink(missing_ok=True)
    texts = [*TEXTS[:33], f"w{faults.KILL_ONCE} w5", *TEXTS[33:]]
    before = odd.stats.texts
    assert np.array_equal(np.stack(list(odd.stream(texts))), one.encode(texts))
    assert (folder / "killed").exists()
    assert odd.stats.texts - before == len(texts)
    assert caplog.text.count("was killed by SIGKILL") == 1


def test_a_text_that_kills_every_worker_is_named(odd: Encoder, one: Encoder) -> None:
    with pytest.raises(RuntimeError, match=r"Input 2 ends every worker process that runs it; the last: Worker process \d+ on cpu"):
        odd.encode(["w4", "w5", f"w{faults.KILL}"], batch_size=1)
    assert np.array_equal(odd.encode(TEXTS), one.encode(TEXTS))


def test_what_a_worker_raises_is_raised_here(odd: Encoder) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        odd.encode(["w4", f"w{faults.BROKEN}"])
    assert (caught.value.errno, caught.value.filename) == (2, "gone.bin")
    assert isinstance(caught.value.__cause__, workers.WorkerTraceback)
    assert "faulty_worker.py" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match=r"^Strange: odd: thing$") as strange:
        odd.encode(f"w{faults.STRANGE}")
    assert "could not be pickled" in str(strange.value.__cause__)


@pytest.mark.parametrize("word", [faults.FULL, faults.FULL_ON_CPU])
def test_memory_that_runs_out_in_a_worker_halves_the_batch(one: Encoder, odd: Encoder, word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*TEXTS[:20], f"w{word}", *TEXTS[20:30]]
    try:
        assert np.array_equal(odd.encode(texts), one.encode(texts))
        assert odd._engine.fits is not None
    finally:
        odd._engine.fits = None


def test_a_stream_that_is_left_stops_its_workers_between_two_layers(one: Encoder, odd: Encoder, folder: Path) -> None:
    odd.encode("w4")
    first = pids(odd)
    (folder / "hangs").unlink(missing_ok=True)
    stream = odd.stream(source(f"w{faults.HANG}"))
    next(stream)
    assert within(30, (folder / "hangs").exists)
    start = time.monotonic()
    stream.close()  # type: ignore[attr-defined]
    assert np.array_equal(odd.encode(TEXTS), one.encode(TEXTS))
    assert time.monotonic() - start < 10
    assert pids(odd) == first


def source(last: str) -> Iterator[str]:
    """A window of its own, then one that ends badly."""
    yield from ["w4"] * engine.WINDOW_TEXTS
    while True:
        yield last


def test_an_answer_that_comes_too_late_is_dropped(one: Encoder, odd: Encoder, folder: Path) -> None:
    first = pids(odd)
    (folder / "deaf").unlink(missing_ok=True)
    stream = odd.stream(source(f"w{faults.DEAF} w20 w30"))
    next(stream)
    assert within(30, (folder / "deaf").exists)
    stream.close()  # type: ignore[attr-defined]
    for _ in range(3):
        assert np.array_equal(odd.encode(TEXTS), one.encode(TEXTS))
    assert pids(odd) == first


# Loading


def test_an_error_at_load_is_the_one_of_one_process(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "model")
    checkpoints.edit(tmp_path / "model", tmp_path / "other", intermediate_size=96)
    said = []
    for device in ("cpu", TWO):
        with pytest.raises(ValueError) as caught:
            Encoder(tmp_path / "other", device=device)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "intermediate_size" in said[0] or "shape" in said[0] or "[" in said[0]
    error = worker.failed(ProbeError("mask", "The mask probe failed.")).error
    assert (type(error), str(error)) == (ProbeError, "The mask probe failed.")
    assert isinstance(error, ProbeError)
    assert error.probe == "mask"


def test_a_new_worker_that_cannot_load_says_why(directory: Path, tmp_path: Path, one: Encoder) -> None:
    """The error of loading, at each call, and no loss of lanes for ever; once it can load, it serves."""
    model = tmp_path / "model"
    shutil.copytree(directory, model)
    encoder = Encoder(model, device=TWO, dtype="float32")
    for pid in pids(encoder):
        os.kill(pid, signal.SIGKILL)
    (file,) = model.rglob("model.safetensors")
    file.rename(tmp_path / "away")
    for _ in range(2):  # the one, then the other
        with pytest.raises((OSError, ValueError), match="safetensors"):
            encoder.encode(TEXTS[0])
    (tmp_path / "away").rename(file)
    assert np.array_equal(encoder.encode(TEXTS[0]), one.encode(TEXTS[0]))


def test_a_worker_that_dies_while_it_loads_is_an_error(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PROGRAM", "import sys; sys.exit(7)")
    with pytest.raises(RuntimeError, match=r"Worker process \d+ on cpu ended with exit code 7. It was loading the model."):
        Encoder(directory, device=TWO)


def test_lists_that_are_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "cores", lambda: [0, 3, 5])
    many = ["cpu"] * 4
    with pytest.raises(ValueError, match="lists 'cpu' 4 times, but this process may use 3 cores"):
        Encoder(directory, device=many)
    for wrong in ([], [None, "cpu"]):
        with pytest.raises(ValueError, match=r"expected one device, or a list of them such as \['cuda:0'"):
            Encoder(directory, device=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"device is 'abacus'"):
        Encoder(directory, device=["cpu", "abacus"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="lists cuda:0 2 times"):
        Encoder(directory, device=["cuda", "cuda:0"])
    own = {"cpu": torch.float32, "cuda": torch.bfloat16}
    monkeypatch.setattr(options, "native_dtype", lambda device: own[device.type])
    with pytest.raises(ValueError, match="dtype 'auto' is float32 on cpu, bfloat16 on cuda:1; say which"):
        Encoder(directory, device=["cpu", "cuda:1"])


def test_warnings_come_once_nothing_is_printed_and_what_is_dropped_ends(
    directory: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    encoder = Encoder(directory, device=TWO, dtype="float16")
    encoder.encode(TEXTS)
    assert caplog.text.count("float16 on a CPU is computed by plain PyTorch") == 1
    assert "backend=reference" in repr(encoder)
    found = pids(encoder)
    gc.disable()
    try:
        start = time.monotonic()
        del encoder
        assert not any(map(psutil.pid_exists, found)), "neither alive nor a zombie, without a collection"
        assert time.monotonic() - start < 1.5
    finally:
        gc.enable()
    assert capfd.readouterr() == ("", "")


# Cores, and ends


def test_workers_divide_the_cores(two: Encoder, odd: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.sched_getaffinity(0)
    shares = [os.sched_getaffinity(pid) for pid in pids(two)]
    assert shares[0] | shares[1] == own
    assert not shares[0] & shares[1]
    with pytest.raises(LookupError, match="threads=1 1"):
        odd.encode(f"w{faults.THREADS}")
    assert os.sched_getaffinity(0) == own

    monkeypatch.setattr(workers, "cores", lambda: [0, 1, 2, 5, 6, 7, 8])
    monkeypatch.setitem(workers.AHEAD, "cpu", 0)
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    for threads, expected in ((6, [2, 2, 2]), (2, [1, 1, 1]), (30, [2, 2, 3])):
        torch.set_num_threads(threads)
        found = workers.places([cpu, cpu, cpu])
        assert [each.cores for each in found] == [(0, 1), (2, 5), (6, 7, 8)]
        assert [each.threads for each in found] == expected
    torch.set_num_threads(8)
    assert workers.places([cpu, cuda]) == [worker.Place((0, 1, 2, 5, 6, 7, 8), 7, 0), worker.Place((), 4, 2)]


SCRIPT = """
import os, signal, sys, time
from pyembed import Encoder
encoder = Encoder(sys.argv[1], device=["cpu", "cpu"], dtype="float32")
print(*(worker.process.pid for worker in encoder._engine.lanes[0].func.__self__.workers), flush=True)
vector = encoder.encode("w4 w5")
"""


def script(directory: Path, code: str, **options: Any) -> subprocess.Popen[str]:
    """A script without a guard around what it does."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    path = directory.parent / f"script{time.monotonic_ns()}.py"
    path.write_text(SCRIPT + code)
    return subprocess.Popen([sys.executable, str(path), str(directory)], **pipes, **options)


def started(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    return [int(word) for word in process.stdout.readline().split()]


def test_a_parent_that_is_killed_leaves_no_worker(directory: Path) -> None:
    """Not even where a child that it forked lives on with copies of its files."""
    process = script(directory, "if os.fork() == 0: time.sleep(20); os._exit(0)\nprint('here', flush=True)\ntime.sleep(60)")
    found = started(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    children = psutil.Process(process.pid).children()
    assert not any(map(gone, found))
    process.kill()
    process.wait()
    assert within(5, lambda: all(map(gone, found)))
    for child in children:
        if child.pid not in found:
            assert child.is_running()
            child.kill()


def test_ctrl_c_and_forked_children_leave_the_workers_and_the_exit_ends_them(directory: Path) -> None:
    code = """
def tell():
    print((encoder.encode("w4 w5") == vector).all(), *(each.process.pid for each in encoder._engine.lanes[0].func.__self__.workers))
texts = (f"w{n % 50} w{n % 7} " * 20 for n in range(10**9))
try:
    for number, row in enumerate(encoder.stream(texts)):
        if number == 0:
            print("go", flush=True)
except KeyboardInterrupt:
    tell()
sys.stdout.flush()
if os.fork() == 0:
    try:
        encoder.encode("w4 w5")
    except RuntimeError as error:
        print(error, flush=True)
    del encoder
    sys.exit(0)
os.wait()
tell()
"""
    process = script(directory, code, start_new_session=True)
    found = started(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    os.killpg(process.pid, signal.SIGINT)
    for pid in found:
        os.kill(pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    same = " ".join(["True", *map(str, found)])
    first, child, last = out.splitlines()
    assert (first, last) == (same, same)
    assert child.startswith("This Encoder was made before the process forked")
    assert err == ""
    assert all(map(gone, found))
