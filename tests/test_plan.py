"""Batches under a budget: full, bounded, complete; the cost of long texts; sizes that are padded to; a plan that can be looked at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyembed import Encoder, engine, window
from pyembed.batch import COST_PER_TOKEN, padded, plan
from pyembed.ops import cuda
from pyembed.ops.budget import activation_bytes, balance, flops

Directory = Callable[[str], Path]


@given(
    tokens=st.lists(st.integers(1, 300), max_size=60),
    budget=st.integers(1, 400),
    quadratic=st.sampled_from([math.inf, 50.0]),
    max_texts=st.none() | st.integers(1, 5),
)
def test_batches_are_complete_and_within_the_budget(tokens: list[int], budget: int, quadratic: float, max_texts: int | None) -> None:
    factors = [1 + each / quadratic for each in tokens]
    batches = plan(tokens, factors, budget, max_texts)
    assert sorted(n for batch in batches for n in batch) == list(range(len(tokens)))
    for batch in batches:
        assert len(batch) == 1 or sum(tokens[n] for n in batch) <= budget
        assert len(batch) == 1 or sum(tokens[n] * factors[n] for n in batch) <= COST_PER_TOKEN * budget
        assert max_texts is None or len(batch) <= max_texts
        assert tokens[batch[0]] == max(tokens[n] for n in batch)
    if max_texts is None and quadratic == math.inf:  # what is put behind a batch would not have fitted into it
        for number, batch in enumerate(batches):
            room = budget - sum(tokens[n] for n in batch)
            assert all(tokens[n] > room for later in batches[number + 1 :] for n in later)


def test_batches_are_full() -> None:
    """Consecutive texts of a sorted list would leave 40% of each of these empty."""
    tokens = [60] * 10 + [40] * 10 + [1] * 10
    batches = plan(tokens, [1.0] * len(tokens), 100)
    assert [sum(tokens[n] for n in batch) for batch in batches] == [100] * 10 + [10]


def test_long_texts_do_not_stall_a_batch() -> None:
    tokens, at = [2000] * 4 + [10] * 100, 1000.0
    batches = plan(tokens, [1 + each / at for each in tokens], 8192)
    assert [len(batch) for batch in batches] == [2, 102], "6,000 tokens each: a third would cost more than twice 8,192"
    assert len(plan(tokens, [1.0] * len(tokens), 8192)[0]) > 4


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 128, 129, 1000, 4095, 4096, 4097, 100_000])
def test_rows_are_padded_to_few_sizes(rows: int) -> None:
    assert padded(rows) >= max(rows, 16)
    assert padded(rows) % 16 == 0
    assert padded(rows) == padded(padded(rows))
    assert rows < 16 or padded(rows) <= max(rows + 15, rows * 9 / 8)
    assert len({padded(n) for n in range(4097)}) == 48


def test_attention_meets_the_linear_layers_where_their_flops_say(checkpoint: Directory) -> None:
    config = Encoder(checkpoint("qwen3"), device="cpu").spec.model
    heads, keys = config.num_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    linear = 2 * config.hidden_size * (2 * heads + 2 * keys + 3 * config.intermediate_size)
    length = balance(config, rate=1.0)
    seen = (length + 1) / 2  # keys a token sees on average
    assert abs(linear / (4 * heads * seen) - 1) < 0.02
    bidirectional = Encoder(checkpoint("llama-bidirectional"), device="cpu").spec.model
    assert not bidirectional.causal
    assert activation_bytes(config, 4) == 2 * activation_bytes(config, 2)


def test_a_gpus_budget_is_its_cache_and_shrinks_with_its_free_memory(checkpoint: Directory) -> None:
    """The residual stream of a batch takes a third of the cache; all activations of the batches on its streams a quarter of the memory."""
    config = Encoder(checkpoint("qwen3"), device="cpu").spec.model
    each, width = activation_bytes(config, 2), 2 * config.hidden_size
    for cache, tokens in ((0, cuda.LEAST), (3 * 10_000 * width, 9984), (1 << 40, cuda.MOST)):
        assert cuda.budget_of(config, 2, 1 << 50, cache).tokens == tokens
    for free, tokens in ((8 * 5000 * each, 5000), (0, 16)):
        small = cuda.budget_of(config, 2, free, 1 << 40)
        assert (small.tokens, small.streams) == (tokens, 2)
        assert small.graphs <= tokens, "no graph is larger than a batch"


def test_batches_are_recorded_up_to_where_their_products_take_as_long_as_their_launches(checkpoint: Directory) -> None:
    tiny = Encoder(checkpoint("qwen3"), device="cpu").spec.model
    heads = {"num_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    wide = replace(tiny, hidden_size=4096, intermediate_size=14336, num_layers=32, windows=(), **heads)
    narrow = replace(tiny, hidden_size=1024, intermediate_size=3072, num_layers=28, windows=(), **heads | {"num_heads": 16})
    sizes = [cuda.budget_of(each, 2, 100 << 30, 50 << 20) for each in (narrow, wide)]
    assert [each.streams for each in sizes] == [2, 1]
    for config, budget in zip((narrow, wide), sizes, strict=True):
        seconds = flops(config) * budget.graphs / cuda.RATE
        assert seconds <= cuda.LAUNCH * cuda.LAUNCHES * config.num_layers < seconds + flops(config) / cuda.RATE
    assert flops(wide) > 10 * flops(narrow)


def test_a_number_of_tokens_is_taken_as_it_stands(minilm: Path) -> None:
    """The device's budget counts attention in, a caller's own does not."""
    texts = ["word " * 250] * 40
    texts = [f"{n} {text}" for n, text in enumerate(texts)]
    own = Encoder(minilm, device="cpu", tokens_per_batch=10_240).plan(texts)
    assert [each.texts for each in own.batches] == [40]
    assert own.batches[0].cost == own.batches[0].tokens
    devices = Encoder(minilm, device="cpu").plan(texts)
    assert sum(each.cost for each in devices.batches) > 1.1 * devices.tokens


def test_a_plan_is_what_runs(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(minilm, device="cpu", dtype="float32")
    monkeypatch.setattr(engine, "WINDOW_TEXTS", 16)
    texts = [f"text {n % 28} " * (n % 7 + 1) for n in range(40)]
    seen: list[int] = []
    run = engine.run_batch
    monkeypatch.setattr(engine, "run_batch", lambda *given: (seen.append(sum(map(len, given[2].ids))), run(*given))[1])
    made = encoder.plan(texts)
    assert not seen
    encoder.encode(texts)
    assert [each.tokens for each in made.batches] == seen
    assert (made.texts, made.duplicates) == (40, encoder.stats.duplicates)
    assert made.duplicates == 40 - len(set(texts))
    assert made.tokens == sum(seen) == encoder.stats.tokens
    lines = str(made).splitlines()
    ran = f"Tokens: {made.tokens}, of which {made.tokens} are run."
    assert lines[0] == f"Texts: 40 ({made.duplicates} repeat an earlier one). {ran}"
    assert len(lines) == 3 + len(seen)
    assert str(encoder.plan(checkpoints.sentences([3] * 2))).count("\n") == 3


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("tokens", [4, 2048, 8192, 8196, 20000, 31484, 204796])
def test_threads_get_as_many_batches_of_one_size(threads: int, tokens: int) -> None:
    """Where there are two or more for each; else the budget stays what it was."""
    budget, texts = window.even(tokens, 2048, threads), tokens // 4
    sizes = [4 * len(batch) for batch in plan([4] * texts, [1.0] * texts, budget)]
    if threads == 1 or tokens <= 2048 * (2 * threads - 1):
        assert budget == 2048
        return
    assert len(sizes) % threads == 0
    assert max(sizes) <= 2048
    assert min(sizes) >= 0.5 * max(sizes)
