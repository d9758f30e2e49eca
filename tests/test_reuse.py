"""Nothing computed twice: prompts run once, a last layer for the rows that are read, duplicates once; and the same bits as without."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_recipes import PAIRS, of_type  # noqa: F401 - a fixture

from pyembed import Encoder, blocks, engine, prefix, runner
from pyembed.prefix import LEAST, PrefixCache, Run, shared_tokens
from pyembed.recipes import methods, recipes

Directory = Callable[[str], Path]
CAUSAL = [
    *("llama", "mistral", "mistral-window", "qwen2", "qwen3-window", "gemma1", "gemma2", "gemma3", "phi3", "ministral3"),
    *("gpt-neo", "gptj", "gpt-neox", "opt", "opt-post", "bloom"),
]
PROMPT = checkpoints.sentence(25, 5) + " "
TEXTS = checkpoints.sentences((1, 2, 3, 10, 17, 40))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pair(directory: Path, **arguments: Any) -> tuple[Encoder, Encoder]:
    """The same model with reuse and without."""
    on, off = (Encoder(directory, device="cpu", prefix_cache_bytes=size, **arguments) for size in (None, 0))
    return on, off


def same(on: np.ndarray, off: np.ndarray, backend: str | None) -> None:
    """The kernels give the same bits; PyTorch's softmax over keys in two pieces is close."""
    if backend is None:
        assert np.array_equal(on, off)
    else:
        assert checkpoints.error(on, torch.from_numpy(off)).max() <= 1e-5


@pytest.mark.parametrize("pooling", ["lasttoken", "mean", "weightedmean", "max"])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_kept_prompt_gives_the_same_bits(checkpoint: Directory, name: str, pooling: str, backend: str | None) -> None:
    dtype = "bfloat16" if backend is None else "float32"
    on, off = pair(checkpoint(name), dtype=dtype, pooling=pooling, backend=backend)
    expected = off.encode(TEXTS, prompt=PROMPT)
    for _ in range(2):  # the prefix is made, then kept
        same(on.encode(TEXTS, prompt=PROMPT), expected, backend)
    assert on.stats.prefix_tokens >= 2 * 25 * len(TEXTS)
    assert off.stats.prefix_tokens == 0
    alone = np.stack([on.encode(text, prompt=PROMPT) for text in TEXTS])
    assert np.array_equal(alone, on.encode(TEXTS, prompt=PROMPT)), "neighbours matter"
    assert checkpoints.error(on.encode(TEXTS, prompt=PROMPT[:-4]), torch.from_numpy(expected)).max() > 1e-3, "the prompt does not matter"


@pytest.mark.parametrize(("name", "kind"), [each for each in PAIRS if recipes()[each[0]].causal])
def test_every_causal_recipe_gives_the_same_bits(of_type: Any, name: str, kind: str) -> None:  # noqa: F811
    on, off = pair(of_type(kind, False), recipe=name, dtype="float32")
    texts = ["the text", "another one", "x", "the text and more of it, " * 9, "the text"]
    for encode in ("encode_query", "encode_document", "encode"):
        assert np.array_equal(getattr(on, encode)(texts), getattr(off, encode)(texts)), encode
    if name == "bge-icl":
        examples = [("what is it", "a thing " * 30)]
        assert np.array_equal(on.encode_query(texts, examples=examples), off.encode_query(texts, examples=examples))
        assert on.stats.prefix_tokens > 100


@pytest.mark.parametrize("name", methods())
def test_every_method_gives_the_same_bits(of_type: Any, name: str) -> None:  # noqa: F811
    on, off = pair(of_type("llama", True), template=name, dtype="float32")
    texts = ["the text", "another one", "a third, " * 20]
    assert np.array_equal(on.encode_query(texts), off.encode_query(texts))
    assert np.array_equal(on.encode_document(texts), off.encode_document(texts))
    assert on.stats.prefix_tokens > 0
    if name == "promptreps":
        ours, theirs = (each.encode_document(texts, output_value="token_embeddings") for each in (on, off))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@given(
    name=st.sampled_from(["mistral-window", "gemma3", "bloom", "opt"]),
    prompts=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=12),
    budget=st.integers(1, 300),
    window=st.integers(1, 12),
    pooling=st.sampled_from(["lasttoken", "mean", "weightedmean"]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_texts_prompts_budgets_and_windows(
    checkpoint: Directory,
    name: str,
    prompts: list[int],
    lengths: list[int],
    budget: int,
    window: int,
    pooling: str,
) -> None:
    texts = [checkpoints.sentence(length, seed) for seed, length in enumerate(lengths)]
    on, off = pair(checkpoint(name), dtype="float32", pooling=pooling, tokens_per_batch=budget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "WINDOW_TEXTS", window)
        for length in prompts:
            prompt = checkpoints.sentence(length, 99) + " " if length else "w5"  # a text of its own where it is empty
            assert np.array_equal(on.encode(texts, prompt=prompt), off.encode(texts, prompt=prompt))


@pytest.mark.parametrize("name", ["llama-bidirectional", "mistral-window-bidirectional", "embeddinggemma", "bert", "xlm-roberta"])
def test_a_model_that_looks_ahead_never_shares(checkpoint: Directory, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(checkpoint(name), device="cpu", dtype="float32", prefix_cache_bytes=1 << 30)
    assert encoder._loaded.prefixes is None
    right = encoder.encode(TEXTS, prompt=PROMPT)
    assert encoder.stats.prefix_tokens == 0
    monkeypatch.setattr(prefix, "shareable", lambda spec: True)  # what would come of it
    encoder._loaded.prefixes = PrefixCache(1 << 30)
    encoder._engine = engine.local(encoder._loaded, encoder.tokenizer)
    if "bert" not in name and "roberta" not in name:
        assert checkpoints.error(encoder.encode(TEXTS, prompt=PROMPT), torch.from_numpy(right)).max() > 1e-3


def test_positions_that_depend_on_the_length_are_not_shared(checkpoint: Directory, tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}
    directory = checkpoints.edit(checkpoint("llama"), tmp_path / "dynamic", rope_parameters=scaling)
    assert Encoder(directory, device="cpu")._loaded.prefixes is None


def test_how_many_tokens_are_shared() -> None:
    head = np.arange(20, dtype=np.int32)
    assert shared_tokens(np.arange(30, dtype=np.int32), head) == 20
    assert shared_tokens(head, head) == 19, "one token is the text's own"
    other = np.arange(30, dtype=np.int32)
    other[12] = 99
    assert shared_tokens(other, head) == 12
    other[LEAST - 1] = 99
    assert shared_tokens(other, head) == 0
    assert shared_tokens(head, head[:0]) == 0


def test_the_cache_keeps_what_was_used_last_within_its_bytes() -> None:
    made: list[int] = []

    def make(ids: np.ndarray) -> Run:
        made.append(int(ids[0]))
        return Run([], torch.zeros(int(ids[1]), 10))  # 40 bytes a row

    cache = PrefixCache(1000)
    for ids in ((1, 10), (2, 10), (1, 10), (3, 10)):  # 400 bytes each: the second is dropped
        cache.get(np.array(ids, dtype=np.int32), make)
    assert (made, cache.bytes) == ([1, 2, 3], 800)
    cache.get(np.array((2, 10), dtype=np.int32), make)
    cache.get(np.array((4, 100), dtype=np.int32), make)  # larger than all room: kept alone
    assert (made, cache.bytes) == ([1, 2, 3, 2, 4], 4000)
    cache.get(np.array((1, 10), dtype=np.int32), make)
    assert cache.bytes == 400


def test_the_prefix_is_run_once_and_dropped_with_the_weights(checkpoint: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = runner.forward
    monkeypatch.setattr(runner, "forward", lambda *given, **named: (seen.append(len(given[1].lengths)), forward(*given, **named))[1])
    encoder = Encoder(checkpoint("llama"), device="cpu", dtype="float32")
    seen.clear()
    encoder.encode(TEXTS, prompt=PROMPT)
    encoder.encode(TEXTS, prompt=PROMPT)
    assert seen == [1, len(TEXTS), len(TEXTS)]
    encoder.set_adapter(None)
    seen.clear()
    encoder.encode(TEXTS, prompt=PROMPT)
    assert seen == [1, len(TEXTS)]
    for wrong in (-1, True, "1"):
        with pytest.raises(ValueError, match="expected a number of bytes"):
            Encoder(checkpoint("llama"), device="cpu", prefix_cache_bytes=wrong)


def test_threads_with_prompts_of_their_own(checkpoint: Directory) -> None:
    on, off = pair(checkpoint("qwen3"), dtype="float32")
    prompts = [checkpoints.sentence(20 + n, n) + " " for n in range(4)]
    found: dict[int, list[np.ndarray]] = {n: [] for n in range(4)}

    def work(n: int) -> None:
        torch.set_num_threads(1)
        for _ in range(3):
            found[n].append(on.encode(TEXTS, prompt=prompts[n]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for n, several in found.items():
        expected = off.encode(TEXTS, prompt=prompts[n])
        assert all(np.array_equal(each, expected) for each in several)


# The last layer


@pytest.mark.parametrize(
    ("name", "pooling", "kept"),
    [
        ("llama", "lasttoken", 1),
        ("bert", "cls", 1),
        ("gemma2", "lasttoken", 1),
        ("gptj", "lasttoken", 1),
        ("opt-post", "cls", 1),
        ("qwen3-bidirectional", "mean", None),
    ],
)
def test_the_last_layer_computes_what_is_read(
    checkpoint: Directory, name: str, pooling: str, kept: int | None, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(checkpoint(name), device="cpu", dtype="float32", pooling=pooling, backend=backend)
    rows: list[int] = []
    mlp = blocks.mlp
    monkeypatch.setattr(blocks, "mlp", lambda x, *rest, **more: (rows.append(len(x)), mlp(x, *rest, **more))[1])
    pruned = encoder.encode(TEXTS)
    layers = encoder.spec.model.num_layers
    assert rows[: layers - 1] == [rows[0]] * (layers - 1)
    assert rows[layers - 1] == (rows[0] if kept is None else 16), "rows are padded to 16"
    monkeypatch.setattr(runner, "kept_layout", lambda *_: None)
    whole = encoder.encode(TEXTS)
    same(pruned, whole, backend)


def test_a_mean_without_its_prompt_is_all_that_the_last_layer_computes(checkpoint: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(checkpoint("llama-bidirectional"), device="cpu", dtype="float32", include_prompt=False)
    rows: list[int] = []
    mlp = blocks.mlp
    monkeypatch.setattr(blocks, "mlp", lambda x, *rest, **more: (rows.append(len(x)), mlp(x, *rest, **more))[1])
    texts = checkpoints.sentences((3, 10, 19))
    pruned = encoder.encode(texts, prompt=PROMPT)
    assert (rows[0], rows[-1]) == (112, 32)  # 75 + 32 tokens, and 32 of them
    monkeypatch.setattr(runner, "kept_layout", lambda *_: None)
    assert np.array_equal(pruned, encoder.encode(texts, prompt=PROMPT))


# Duplicates


def test_duplicates_are_run_once(checkpoint: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    run_batch = engine.run_batch
    monkeypatch.setattr(engine, "run_batch", lambda *given: (seen.append(len(given[2].ids)), run_batch(*given))[1])
    encoder = Encoder(checkpoint("qwen3"), device="cpu", dtype="float32")
    order = [0, 1, 0, 2, 2, 0, 5, 1]
    found = encoder.encode([TEXTS[n] for n in order])
    assert sum(seen) == 4
    assert (encoder.stats.texts, encoder.stats.duplicates) == (8, 4)
    assert np.array_equal(found, encoder.encode(TEXTS)[order])
    states = encoder.encode([TEXTS[n] for n in order], output_value="token_embeddings")
    assert all(torch.equal(state, states[order.index(n)]) for n, state in zip(order, states, strict=True))
    averaged = encoder.encode([TEXTS[0], TEXTS[1]], variants=[[TEXTS[1]], [TEXTS[0]]])
    assert np.abs(averaged[0] - averaged[1]).max() < 1e-6


def test_the_same_text_under_another_prompt_is_another_text(checkpoint: Directory) -> None:
    """Equal ids with other spans are not the same row."""
    encoder = Encoder(checkpoint("llama-bidirectional"), device="cpu", dtype="float32", include_prompt=False)
    first, second = encoder.encode("w9 w10", prompt="w7 w8 "), encoder.encode("w8 w9 w10", prompt="w7 ")
    assert np.abs(first - second).max() > 1e-3
