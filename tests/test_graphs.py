"""Forms of small batches, and which graphs are recorded, kept and given away. What a graph replays: kernels/matrix/test_graphs.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyembed import Encoder, graphs, info, loading, ops
from pyembed.batch import kept_layout, laid_out
from pyembed.config import Rope
from pyembed.graphs import Form, Given, Graphs, arrays, bucket, form_of, power
from pyembed.kernels import tiles
from pyembed.ops import reference

LIMIT = 128
Launch = Callable[[], Tensor]


@given(st.integers(0, 1 << 15))
def test_buckets(rows: int) -> None:
    assert bucket(rows) % 16 == 0
    assert bucket(rows) == bucket(bucket(rows))
    assert max(rows, 16) <= bucket(rows) <= max(rows + 15, rows * 5 / 4, 16)
    assert power(rows) >= rows > power(rows) // 2 or rows <= 1 == power(rows)


def test_buckets_are_few() -> None:
    assert len({bucket(n) for n in range(1, 4097)}) == 8 + 4 * 5


LENGTHS = st.lists(st.integers(0, 200), min_size=1, max_size=40)


@given(LENGTHS)
def test_no_batch_of_a_form_has_more_tiles_than_its_graph(lengths: list[int]) -> None:
    """Whatever list attention asks for, it fits into what the outline says."""
    schedule = tiles.schedule(lengths)
    outline = tiles.outline(schedule)
    for form, queries in (("long", 64), ("long", 16), ("few", 16), ("few", 4), ("short", 128), ("short", 32)):
        most = outline.most(form, queries, bucket(sum(lengths)))
        found = schedule.listed(form, queries)
        assert len(found) <= most
        assert most <= 2 * (len(found) + 1) + bucket(sum(lengths)) // queries + 2 * len(lengths), "and not by much"


def test_a_graph_without_a_list_that_is_asked_for_says_so() -> None:
    blank = tiles.outline(tiles.schedule([40])).blank(1, {})
    with pytest.raises(RuntimeError, match="'long' of 64 queries, of which this graph has no list"):
        blank.tiles("long", 64, torch.device("cpu"))


# Which batches have a form


def batch(*lengths: int, before: int = 0, run: object = None, overlap: list[int] | None = None) -> Given:
    ids = [np.arange(each + before, dtype=np.int32) for each in lengths]
    layout = laid_out(ids, None, [before] * len(ids), overlap)
    kept = kept_layout(layout, "lasttoken")
    runs: Any = [None if run is None else (run, before)] * len(ids)
    return Given(layout, kept, tiles.schedule(layout.lengths), tiles.schedule(kept.lengths), runs)


@pytest.fixture
def encoder(checkpoint: Callable[[str], Path]) -> Encoder:
    return Encoder(checkpoint("llama"), device="cpu", dtype="float32", backend="reference", tokens_per_batch=1024)


def test_forms(encoder: Encoder) -> None:
    spec = encoder.spec

    def form(given: Given) -> Form | None:
        return form_of(given, spec, LIMIT)

    assert form(batch(3, 9)) == form(batch(2, 12)) != form(batch(3, 9, 1))
    assert form(batch(3, 9)) == Form(16, 2, tiles.Outline(0, 2, 2), 16, tiles.Outline(0, 2, 2), 0, 0)
    assert form(batch(100)) is not None
    assert form(batch(129)) is None, "too many tokens"
    assert form(batch(9, 9, overlap=[0, 3])) is None, "texts that share what they begin with"
    one, other = object(), object()
    assert form(batch(9, before=3, run=one)) != form(batch(9, before=3, run=other)) != form(batch(9))
    assert form(batch(9, before=3, run=one)) != form(batch(9, before=4, run=one)), "as many of its tokens"
    both = batch(9, 9, before=3, run=one)
    assert form(replace(both, runs=[(one, 3), (other, 3)])) is None, "two prompts"  # type: ignore[list-item]
    assert form(replace(both, runs=[(one, 3), None])) is not None


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rotation_that_depends_on_a_texts_length_has_no_form(encoder: Encoder, kind: Any) -> None:
    rope: Rope = replace(encoder.spec.model.ropes[0], kind=kind, original_max_position=64)
    spec = replace(encoder.spec, model=replace(encoder.spec.model, ropes=(rope,)))
    assert form_of(batch(64), spec, LIMIT) is not None
    assert form_of(batch(65), spec, LIMIT) is None
    assert form_of(batch(40, before=40, run=object()), spec, LIMIT) is None


@given(LENGTHS.filter(any))
def test_arrays_have_the_sizes_of_their_form(lengths: list[int]) -> None:
    given_ = batch(*lengths)
    form = Form(
        bucket(sum(lengths)), power(len(lengths)), tiles.outline(tiles.schedule(lengths)), 1024, tiles.outline(tiles.schedule([1])), 0, 0
    )
    found = arrays(form, given_, (("few", 16),), ())
    assert found["input_ids"].shape == found["positions"].shape == (form.rows,)
    assert found["cu_seqlens"].shape == (form.texts + 1,)
    assert (found["cu_seqlens"][len(lengths) :] == sum(lengths)).all(), "texts that fill it up have no tokens"
    assert not found["spans"][len(lengths) :].any()
    assert (found["tiles('few', 16)"][len(tiles.schedule(lengths).listed("few", 16)) :] == -1).all()


# Which graphs there are


@pytest.fixture
def recorded(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> tuple[Encoder, Graphs, list[Launch]]:
    """An encoder whose graphs launch again what was recorded, by plain PyTorch."""
    monkeypatch.setattr(reference, "schedule", tiles.schedule)
    monkeypatch.setattr(encoder._engine, "share", None)
    loaded, seen = encoder._loaded, list[Launch]()
    given = (loaded.spec, loaded.weights, loaded.ops, loaded.device, LIMIT)
    own = Graphs(*given, lambda launch: (seen.append(launch), launch)[1], loaded.prefixes)
    loaded.graphs = (own,)
    return encoder, own, seen


def texts(*lengths: int, seed: int = 0) -> list[str]:
    return checkpoints.sentences(lengths, seed)


def test_a_graph_is_recorded_when_a_form_is_met_again(recorded: tuple[Encoder, Graphs, list[Launch]]) -> None:
    encoder, own, seen = recorded
    encoder._loaded.graphs = ()
    right = encoder.encode(texts(3, 9))
    encoder._loaded.graphs = (own,)
    for n, (met, made, count) in enumerate([(1, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)]):
        vectors = encoder.encode(texts(3 + n, 10 - n))
        assert (len(own.met), len(own.made), len(seen)) == (met, made, count)
    assert np.abs(encoder.encode(texts(3, 9)) - right).max() <= 1e-6
    assert np.isfinite(vectors).all()
    encoder.encode([*texts(3, 9), *texts(100, 110)])
    assert len(own.made) == 1, "too large for a graph"


def test_the_graphs_that_are_used_most_are_kept(recorded: tuple[Encoder, Graphs, list[Launch]], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, own, seen = recorded
    monkeypatch.setattr(graphs, "MOST", 2)
    one, two, four = (texts(*range(2, 3 + n)) for n in (0, 1, 3))
    for each in (one, two, one, two, one, four, four, four, four):
        encoder.encode(each)
    assert [form.texts for form in own.made] == [1, 2], "the third was met 4 times, and the second twice: not more than 2 times as often"
    encoder.encode(four)
    assert [form.texts for form in own.made] == [1, 4]
    assert len(seen) == 3
    encoder.encode(two)
    assert len(seen) == 3, "what was given away is not recorded again with the next batch"


def test_what_is_not_met_any_more_is_forgotten(recorded: tuple[Encoder, Graphs, list[Launch]], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, own, _ = recorded
    monkeypatch.setattr(graphs, "MOST", 1)
    monkeypatch.setattr(graphs, "AGE", 4)
    for _ in range(8):
        encoder.encode(texts(3))
    for length in range(20, 110, 12):
        encoder.encode(texts(length))
        assert len(own.met) <= 1 + graphs.AGE
    assert [form.rows for form in own.made] == [16]
    for _ in range(4):
        encoder.encode(texts(100))
    assert [form.rows for form in own.made] == [bucket(100)], "what was met long ago counts less"


def test_traffic_of_more_forms_than_graphs_records_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """500 forms as often as one another, and in a third of the batches 20 more: those keep their graphs, whatever the others are."""
    own: Any = Graphs(None, None, reference, torch.device("cpu"), LIMIT, lambda launch: launch, None)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    recorded = list[int]()

    def begun(form: Form, given: Given) -> Tensor:
        recorded.append(form.rows)
        own.made[form] = replayed
        own.tidy()
        return torch.empty(0)

    replayed = SimpleNamespace(prompt=None, run=lambda given: torch.empty(0))
    monkeypatch.setattr(Graphs, "begun", lambda _, form, given: begun(form, given))
    empty: Any = Given(None, None, None, None, [])  # type: ignore[arg-type]
    hits = 0
    for _ in range(20_000):
        often = rng.random() < 1 / 3
        number = int(rng.integers(20) if often else rng.integers(20, 520))
        form = Form(number, 1, tiles.Outline(0, 0, 0), 0, None, 0, 0)
        hits += often and form in own.made
        if own.run(form, empty) is None:
            own.saw(form, empty)
    assert hits > 0.95 * 20_000 / 3
    assert len(recorded) < 800, "of 13,000 batches of the others, half of which a cache of those used last would record"
    assert len(own.made) == graphs.MOST


def test_a_recording_that_fails_is_told_once(recorded: tuple[Encoder, Graphs, list[Launch]], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, own, _ = recorded
    right = encoder.encode(texts(3, 9))

    def fails(launch: Launch) -> Launch:
        raise RuntimeError("operation not permitted when stream is capturing")

    own.record = fails
    with pytest.warns(UserWarning, match=r"No CUDA graph could be recorded, .* RuntimeError: operation not permitted"):
        assert np.array_equal(encoder.encode(texts(3, 9)), right)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(encoder.encode(texts(3, 9)), right)
    assert not own.made
    assert own.form(batch(3, 9)) is None
    monkeypatch.setattr(encoder._loaded, "device", torch.device("cuda"))
    assert info.launching(encoder._engine).endswith("(0 recorded; RuntimeError: operation not permitted when stream is capturing)")


def test_graphs_of_prompts_that_are_gone_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often they were used."""
    prompts = SimpleNamespace(runs={})
    own: Any = Graphs(None, None, reference, torch.device("cpu"), LIMIT, lambda launch: launch, prompts)  # type: ignore[arg-type]
    monkeypatch.setattr(graphs, "MOST", 2)

    class Made:
        def __init__(self, form: Form, given: Given, lists: object, of: Graphs) -> None:
            self.prompt = next(iter(given.runs), (None,))[0]

        def run(self, given: Given) -> Tensor:
            return torch.empty(0)

        def recorded(self, of: Graphs) -> None:
            pass

    monkeypatch.setattr(graphs, "Graph", Made)
    old, new = object(), object()

    def meet(rows: int, prompt: object) -> None:
        form = Form(rows, 1, tiles.Outline(0, 0, 0), 0, None, id(prompt), 1)
        given: Any = Given(None, None, None, None, [(prompt, 1)])  # type: ignore[arg-type]
        if own.run(form, given) is None:
            own.saw(form, given)

    prompts.runs = {"a": old}
    for _ in range(20):
        meet(16, old)
        meet(32, old)
    assert len(own.made) == 2
    prompts.runs = {"b": new}
    for _ in range(2):
        meet(16, new)
    assert [form.run for form in own.made] == [id(new)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory")])
def test_memory_that_runs_out_in_a_recording_is_taken_from_other_graphs(
    recorded: tuple[Encoder, Graphs, list[Launch]], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    encoder, own, _ = recorded
    monkeypatch.setattr(graphs, "AGE", 8)
    right = encoder.encode(texts(3, 9))
    for _ in range(2):
        encoder.encode(texts(50))
    assert len(own.made) == 1

    def full(launch: Launch) -> Launch:
        raise error

    plain, own.record = own.record, full
    with pytest.warns(UserWarning, match="recorded, so the next 8 small batches are launched kernel by kernel.*out of memory"):
        assert np.array_equal(encoder.encode(texts(3, 9)), right)
    assert not own.made
    assert not own.failure
    assert encoder._engine.fits is None, "batches may be as large as before"
    own.record = plain
    for n in range(9):
        assert (len(own.made) == 1) == (n == 8)
        encoder.encode(texts(3, 9))
    assert own.places() == 2, "one as when memory ran out, and one more since"


def test_a_pool_ends_with_a_recording_that_fails_as_its_first(monkeypatch: pytest.MonkeyPatch) -> None:
    device, said = torch.device("cuda", 3), list[torch.device]()

    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    own: Any = Graphs(None, None, reference, device, LIMIT, fails, None)  # type: ignore[arg-type]
    monkeypatch.setattr(graphs, "Graph", fails)
    monkeypatch.setattr(graphs, "record_on", lambda device: said.append(device))
    form, empty = Form(16, 1, tiles.Outline(0, 0, 0), 0, None, 0, 0), Given(None, None, None, None, [])  # type: ignore[arg-type]
    own.saw(form, empty)
    with pytest.warns(UserWarning, match="next 1,024 small batches"):
        assert own.run(form, empty) is None
    assert said == [device]


def test_a_void_recording_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch cannot end it, its allocator would take it for one under way."""
    said = list[Any]()

    class CUDAGraph:
        def capture_begin(self, **given: Any) -> None:
            said.append(("begin", given["pool"]))

        def capture_end(self) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    def launch() -> Tensor:
        raise ValueError("of the forward pass")

    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *given: said.append(given))
    record = graphs.record_on(torch.device("cuda", 3))
    with pytest.raises(ValueError, match="of the forward pass"):
        record(launch)
    with pytest.raises(RuntimeError, match="previous error"):
        record(lambda: torch.empty(0))
    assert said == [("begin", (0, 7)), (3, (0, 7))] * 2


def test_the_settings(checkpoint: Callable[[str], Path]) -> None:
    for name in ("deterministic", "cuda_graphs"):
        with pytest.raises(ValueError, match=f"{name} is 1; expected True or False"):
            Encoder(checkpoint("llama"), device="cpu", **{name: 1})
    assert ", deterministic," in repr(Encoder(checkpoint("llama"), device="cpu", deterministic=True))
    device, kernels = torch.device("cuda"), object()
    loading.check_deterministic(device, kernels, shares=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="plain PyTorch serves cuda"):
        loading.check_deterministic(device, ops.select(device, "reference"), shares=False)
    with pytest.raises(ValueError, match="share_prefixes=True were both given"):
        loading.check_deterministic(device, kernels, shares=True)  # type: ignore[arg-type]
    loading.check_deterministic(torch.device("cpu"), reference, shares=True)
