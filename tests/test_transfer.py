"""What is sent to a device and comes back: one buffer for many arrays, and batches that are on their way while the next one is prepared."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyembed import Encoder, engine
from pyembed.runner import Made, products
from pyembed.transfer import APART, Sheet, out_of_memory, to_device, to_host

TEXTS = [f"{checkpoints.sentence(n % 23 + 1, n)} w{n % 50}" for n in range(120)]
ARRAYS = st.lists(
    st.tuples(st.sampled_from([np.int32, np.int64]), st.lists(st.integers(0, 5), min_size=1, max_size=2)), min_size=1, max_size=6
)


# Arrays


@given(ARRAYS)
def test_arrays_side_by_side_are_what_they_were(forms: list[tuple[Any, list[int]]]) -> None:
    generator = np.random.default_rng(0)
    arrays = {str(n): generator.integers(-(2**31), 2**31, shape).astype(dtype) for n, (dtype, shape) in enumerate(forms)}
    sheet = Sheet.of({name: (each.shape, each.dtype) for name, each in arrays.items()})
    buffer = torch.full((sheet.size,), 255, dtype=torch.uint8)
    sheet.fill(buffer, arrays)
    for name, view in sheet.views(buffer).items():
        assert view.storage_offset() * view.element_size() % APART == 0
        assert np.array_equal(view.numpy(), arrays[name])
        assert view.numpy().dtype == arrays[name].dtype


def test_arrays_of_other_forms_are_refused() -> None:
    sheet = Sheet.of({"a": ((3,), np.dtype(np.int32))})
    buffer = torch.empty(sheet.size, dtype=torch.uint8)
    with pytest.raises(TypeError, match="int64"):
        sheet.fill(buffer, {"a": np.arange(3)})
    with pytest.raises(ValueError, match="broadcast"):
        sheet.fill(buffer, {"a": np.arange(4, dtype=np.int32)})


def test_on_a_cpu_nothing_is_copied() -> None:
    array = np.arange(5)
    assert to_device({"a": array}, torch.device("cpu"))["a"].data_ptr() == array.ctypes.data
    x = torch.arange(5)
    assert to_host(x) == (x, None)


# Batches that are on their way


class Sky:
    """A device that is told what to run and has run it when somebody waits for it: until then results are NaN."""

    def __init__(self, run: Callable[..., Made]) -> None:
        self.run, self.most, self.air, self.lock = run, 0, 0, threading.Lock()
        self.order: list[int] = []
        self.fault: Callable[[int], None] = lambda number: None

    def __call__(self, *given: Any, **named: Any) -> Made:
        made = self.run(*given, **named)
        vectors = torch.full(made.vectors.shape, torch.nan)
        with self.lock:
            number = len(self.order)
            self.order.append(number)
            self.air += 1
            self.most = max(self.most, self.air)

        def arrival() -> Made:
            with self.lock:
                self.air -= 1
            self.fault(number)
            vectors.copy_(made.vectors)
            return Made(vectors, made.states, 0.25)

        return made._replace(vectors=vectors, seconds=0.0, arrival=arrival)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    directory = checkpoints.save(checkpoints.CASES["qwen3"], tmp_path_factory.mktemp("qwen3"))
    made = Encoder(directory, device="cpu", dtype="float32")
    return directory, np.stack([made.encode(text) for text in TEXTS])


@pytest.fixture
def flown(expected: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> tuple[Encoder, Sky]:
    """An encoder whose windows are small and whose device is behind."""
    monkeypatch.setattr(engine, "WINDOW_TEXTS", 10)
    sky = Sky(engine.run_batch)
    monkeypatch.setattr(engine, "run_batch", sky)
    encoder = Encoder(expected[0], device="cpu", dtype="float32", tokens_per_batch=64)
    encoder._engine = replace(encoder._engine, share=None)
    return encoder, sky


@pytest.mark.parametrize("lanes", [1, 2])
def test_the_next_batch_is_prepared_while_others_run(flown: tuple[Encoder, Sky], expected: tuple[Path, np.ndarray], lanes: int) -> None:
    encoder, sky = flown
    own = encoder._engine
    encoder._engine = replace(own, lanes=own.lanes * lanes, devices=own.devices * lanes)
    assert np.array_equal(encoder.encode(TEXTS), expected[1])
    most = engine.AIRBORNE + 1  # the last one is told before the first is waited for
    assert sky.most == most if lanes == 1 else most <= sky.most <= lanes * most
    assert sky.air == 0
    assert encoder.stats.busy == 0.25 * len(sky.order)
    assert np.array_equal(np.stack(list(encoder.stream(iter(TEXTS)))), expected[1])
    assert np.array_equal(encoder.encode(TEXTS[3]), expected[1][3]), "in the caller's thread"
    assert sky.air == 0


def test_a_fault_on_the_device_is_told_in_its_turn(flown: tuple[Encoder, Sky], expected: tuple[Path, np.ndarray]) -> None:
    encoder, sky = flown

    def fault(number: int) -> None:
        if number == len(sky.order) - 1 > 25:
            raise RuntimeError("the device has failed")

    sky.fault = fault
    got: list[np.ndarray] = []
    with pytest.raises(RuntimeError, match="the device has failed"):
        got.extend(encoder.stream(TEXTS))
    assert len(got) % 10 == 0
    assert np.array_equal(np.stack(got), expected[1][: len(got)])
    sky.fault = lambda number: None
    assert np.array_equal(encoder.encode(TEXTS), expected[1]), "the next call is none the worse for it"


def test_a_fault_in_the_callers_thread_leaves_nothing_behind(flown: tuple[Encoder, Sky], expected: tuple[Path, np.ndarray]) -> None:
    encoder, sky = flown

    def fault(number: int) -> None:
        raise RuntimeError("the device has failed")

    sky.fault = fault
    with pytest.raises(RuntimeError, match="the device has failed"):
        encoder.encode(TEXTS[:9])
    sky.fault = lambda number: None
    assert np.array_equal(encoder.encode(TEXTS[:9]), expected[1][:9])


def test_memory_that_runs_out_while_others_are_on_their_way(
    flown: tuple[Encoder, Sky], expected: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, sky = flown
    plain = sky.run

    def full(*given: Any, **named: Any) -> Made:
        if sum(map(len, given[2].ids)) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(*given, **named)

    monkeypatch.setattr(sky, "run", full)
    assert np.array_equal(encoder.encode(TEXTS), expected[1])
    assert encoder._engine.fits is not None


def test_windows_grow_where_a_device_waits_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "WINDOW_TEXTS", 10)

    def sizes(**named: bool) -> list[int]:
        return [len(chunk.inputs) for chunk, _ in engine.windows(TEXTS, 4, **named)]

    assert sizes(growing=True) == [10, 20, 40, 40, 10]
    assert sizes() == [40, 40, 40]


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "Triton Error [CUDA]: out of memory", "CUDA driver error: out of memory"])
def test_memory_that_has_run_out_is_known_by_its_text(text: str) -> None:
    assert out_of_memory(RuntimeError(text))
    assert not out_of_memory(ValueError(text))
    assert not out_of_memory(RuntimeError("an illegal memory access was encountered"))


# torch's switches


@pytest.mark.parametrize("accumulates", [False, True])
def test_products_are_summed_in_float32_and_the_switches_are_put_back(request: pytest.FixtureRequest, accumulates: bool) -> None:
    switches = torch.backends.cuda.matmul
    request.addfinalizer(partial(setattr, switches, "allow_fp16_accumulation", switches.allow_fp16_accumulation))
    switches.allow_fp16_accumulation = accumulates

    def state() -> tuple[Any, ...]:
        sums = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
        precision = switches.fp32_precision, switches.allow_fp16_accumulation
        return *precision, *((getattr(switches, each), getattr(switches, f"{each}_split_k")) for each in sums)

    before = state()
    with products(splits=True):
        assert state() == ("ieee", False, (False, True), (False, True))
        with products(splits=False):
            assert state() == ("ieee", False, (False, False), (False, False))
        assert state() == ("ieee", False, (False, True), (False, True))
    assert state() == before
    assert before[1] is accumulates
    with pytest.raises(KeyError), products(splits=False):
        raise KeyError
    assert state() == before
