"""Texts of one batch run their common beginnings once; and the same bits as without."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_recipes import of_type  # noqa: F401 - a fixture
from test_reuse import CAUSAL, same

from pyembed import Encoder, blocks, engine, planned, prefix, request, runner, weights
from pyembed.batch import KEYS_PER_TOKEN, pack, plan_in_order
from pyembed.config import Template
from pyembed.ops import reference
from pyembed.prefix import LEAST, neighbours, overlaps
from pyembed.recipes import methods

Directory = Callable[[str], Path]
POOLINGS: list[Any] = ["lasttoken", "mean", "weightedmean", "max", ["cls", "lasttoken"]]
PROMPT = checkpoints.sentence(25, 5) + " "
HEAD = checkpoints.sentence(20, 1)
FORK = f"{HEAD} {checkpoints.sentence(11, 2)}"
TEXTS = [
    *(f"{HEAD} {checkpoints.sentence(length, length)}" for length in (1, 2, 9, 30)),
    *(f"{FORK} {checkpoints.sentence(length, length)}" for length in (1, 5, 40)),
    *(FORK, HEAD, HEAD[:-4], "w5", checkpoints.sentence(30, 3)),  # texts that others begin with, one token, nothing in common
    FORK[: 5 * 3],  # too little in common
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pair(directory: Path, **arguments: Any) -> tuple[Encoder, Encoder]:
    """The same model with sharing and without any reuse."""
    off = arguments | {"prefix_cache_bytes": 0}
    return Encoder(directory, device="cpu", share_prefixes=True, **arguments), Encoder(directory, device="cpu", **off)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each forward pass to come."""
    seen: list[int] = []
    forward = runner.forward
    monkeypatch.setattr(runner, "forward", lambda *given, **named: (seen.append(sum(given[1].lengths)), forward(*given, **named))[1])
    return seen


def nodes(ids: list[list[int]]) -> int:
    """Of the trie of these rows."""
    return len({tuple(row[: end + 1]) for row in ids for end in range(len(row))})


@pytest.mark.parametrize("name", CAUSAL)
def test_every_family_gives_the_same_bits(checkpoint: Directory, name: str, backend: str | None) -> None:
    for pooling, dtype in itertools.product(POOLINGS, ["float32", "bfloat16"] if backend is None else ["float32"]):
        on, off = pair(checkpoint(name), dtype=dtype, pooling=pooling, backend=backend)
        for prompt in ("", PROMPT):
            same(on.encode(TEXTS, prompt=prompt), off.encode(TEXTS, prompt=prompt), backend)
        assert on.stats.prefix_tokens > 25 * len(TEXTS) + 2 * 8 * 20


@st.composite
def families_of_texts(draw: st.DrawFn) -> list[str]:
    """Texts that begin as one before them does, up to any word, and go on in their own way."""
    made: list[list[str]] = [[]]
    for seed in range(draw(st.integers(1, 12))):
        parent = draw(st.sampled_from(made))
        cut, more = draw(st.integers(0, len(parent))), draw(st.integers(0, 30))
        made.append(parent[:cut] + checkpoints.sentence(more, seed).split()[:more])
    return [" ".join(words) for words in draw(st.permutations(made[1:]))]


@given(
    name=st.sampled_from(["llama", "mistral-window", "gemma3", "bloom", "opt", "gpt-neo", "ministral3"]),
    texts=families_of_texts(),
    prompts=st.lists(st.integers(0, 40), min_size=1, max_size=2),
    budget=st.integers(1, 300),
    window=st.integers(1, 12),
    pooling=st.sampled_from(POOLINGS),
    include=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    cache=st.sampled_from([None, 0]),
    least=st.sampled_from([1, LEAST]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_texts_prompts_budgets_and_windows(
    checkpoint: Directory,
    name: str,
    texts: list[str],
    prompts: list[int],
    budget: int,
    window: int,
    pooling: Any,
    include: bool,
    dtype: str,
    cache: int | None,
    least: int,
) -> None:
    arguments = {"dtype": dtype, "pooling": pooling, "include_prompt": include, "tokens_per_batch": budget}
    off = Encoder(checkpoint(name), device="cpu", prefix_cache_bytes=0, **arguments)
    on = Encoder(checkpoint(name), device="cpu", prefix_cache_bytes=cache, share_prefixes=True, **arguments)
    if not off.tokenizer.prefix + off.tokenizer.suffix:
        texts = [text or "w6" for text in texts]  # without a special token an empty text is refused
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "WINDOW_TEXTS", window)
        patch.setattr(prefix, "LEAST", least)
        for length in prompts:
            prompt = checkpoints.sentence(length, 99) + " " if length else ""
            assert np.array_equal(on.encode(texts, prompt=prompt), off.encode(texts, prompt=prompt))


@given(texts=families_of_texts())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_runs_is_the_trie(checkpoint: Directory, texts: list[str]) -> None:
    encoder = Encoder(checkpoint("mistral"), device="cpu", dtype="float32", share_prefixes=True)
    texts = [text for text in texts if text] or ["w5"]
    ids = [each.tolist() for each in encoder.tokenizer.encode(texts, None).ids]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "LEAST", 1)
        seen = counted(patch)
        encoder.encode(texts)
    assert seen == [nodes(ids)]
    assert encoder.stats.prefix_tokens == sum(map(len, {tuple(row): row for row in ids}.values())) - nodes(ids)


def test_a_path_goes_through_several_texts(checkpoint: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    on, off = pair(checkpoint("qwen3-window"), dtype="float32")
    seen = counted(monkeypatch)
    words = checkpoints.sentence(60, 4).split()
    stairs = [" ".join(words[:length]) for length in (10, 20, 30, 41, 60)]
    assert np.array_equal(on.encode(stairs), off.encode(stairs))
    assert seen[0] == len(on.tokenizer.encode([stairs[-1]], None).ids[0]) + 4 * len(on.tokenizer.suffix)
    assert seen[1] == sum(len(ids) for ids in on.tokenizer.encode(stairs, None).ids)


def test_a_few_tokens_are_not_worth_sharing(checkpoint: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(checkpoint("opt"), device="cpu", dtype="float32", share_prefixes=True)
    seen = counted(monkeypatch)
    specials = len(encoder.tokenizer.prefix) + len(encoder.tokenizer.suffix)
    for common, runs in ((LEAST - 2, 2 * (LEAST - 1)), (LEAST - 1, LEAST + 1)):  # one more is <s>
        seen.clear()
        encoder.encode([" ".join(["w9"] * common + [last]) for last in ("w5", "w6")])
        assert seen == [runs + 2 * specials if common < LEAST - 1 else runs + specials]


def test_neighbours_and_what_they_share() -> None:
    def rows(*texts: list[int]) -> list[np.ndarray]:
        return [np.array(text, dtype=np.int32) for text in texts]

    long = list(range(300, 330))
    ids = rows([*long, 7], long, [*long[:12], 9], [256, 1], [2, 500], long[:3])
    order = neighbours(range(6), ids, [0] * 6)
    assert order == [4, 3, 5, 2, 1, 0]
    assert overlaps([ids[n] for n in order], [0] * 6) == [0, 0, 0, 0, 12, 30]
    assert overlaps(rows(long, long), [0, 0]) == [0, 29], "one token is the text's own"
    assert overlaps(rows(long, long), [5, 5]) == [0, 24]
    assert overlaps(rows(long, long), [8, 10]) == [0, 0], "prefixes of other lengths"
    assert overlaps(rows([1, *long], [2, *long]), [1, 1]) == [0, 0], "other prefixes"
    assert neighbours([2, 0, 1], rows([5], [4], [3]), [0, 9, 0]) == [2, 0, 1]


def test_paths() -> None:
    ids = [np.arange(length, dtype=np.int32) for length in (3, 5, 4, 6)]
    batch = pack(ids, None, reference, torch.device("cpu"), [1, 1, 1, 0], [0, 2, 1, 0])
    assert batch.lengths == [2, 2, 2, 6]
    assert batch.before == [1, 3, 2, 0]
    assert batch.positions[:12].tolist() == [1, 2, 3, 4, 2, 3, *range(6)]
    assert batch.paths is not None
    assert batch.paths.rows.tolist() == [0, 1, 0, 1, 2, 3, 0, 4, 5, *range(6, 12)]
    assert batch.paths.cu_k.tolist() == [0, 2, 6, 9, 15]
    assert pack(ids, None, reference, torch.device("cpu"), None, [0] * 4).paths is None


def test_the_budget_counts_what_runs_and_bounds_the_keys() -> None:
    tens, one = [10] * 4, [1.0] * 4
    assert plan_in_order(tens, [0, 8, 5, 5], one, 20) == [[0, 1, 2], [3]], "10 + 2 + 5, and a batch's first text runs whole"
    assert plan_in_order(tens, [0, 8, 5, 0], one, 20) == [[0, 1, 2], [3]]
    assert plan_in_order([20, 10, 10], [0, 9, 0], one[:3], 20) == [[0], [1, 2]], "10 + 10, not 1 + 10"
    assert plan_in_order(tens, [0, 8, 8, 8], one, 20, 2) == [[0, 1], [2, 3]]
    assert plan_in_order([3, 5, 4], [0] * 3, one[:3], 20) == [[0, 1, 2]], "the order stays"
    assert plan_in_order(tens, [0] * 4, [3.0] * 4, 20) == [[0], [1], [2], [3]], "a text that costs 30 leaves no room for one more in 40"
    batches = plan_in_order([100] * 50, [0] + [99] * 49, [1.0] * 50, 150)
    assert max(map(len, batches)) == KEYS_PER_TOKEN * 150 // 100


def test_batches_are_filled_by_what_runs(checkpoint: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(checkpoint("gemma1"), device="cpu", dtype="float32", share_prefixes=True, tokens_per_batch=100)
    seen = counted(monkeypatch)
    texts = [f"{checkpoints.sentence(60, 7)} w{number}" for number in range(10, 30)]
    assert len(encoder.tokenizer.encode(texts, None).ids[0]) == 62, "<s>"
    encoder.encode(texts)
    assert seen == [62 + 11, 62 + 7], "20 texts would be 81 tokens, but 1240 keys; 12 are 744"


def test_a_plan_says_what_runs(checkpoint: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(checkpoint("mistral"), device="cpu", dtype="float32", share_prefixes=True, tokens_per_batch=100)
    made = planned.plan(encoder._engine, request.job(encoder, prompt=PROMPT), TEXTS)
    seen = counted(monkeypatch)
    encoder.encode(TEXTS, prompt=PROMPT)
    assert seen[1:] == [each.tokens for each in made.batches], "the first is the prompt"
    assert made.shared == encoder.stats.prefix_tokens
    assert len(made.batches) > 1
    assert all(each.tokens <= 100 for each in made.batches)


@pytest.mark.parametrize("name", methods())
def test_templates_with_beginnings_of_their_own(of_type: Any, name: str) -> None:  # noqa: F811
    """Several templates a text: the same words after other prefixes are not the same tokens."""
    texts = ["the text and more of it, and then some, " + more for more in ("again", "one", "and on", "and on and on")]
    for cache in (None, 0):
        arguments = {"template": name, "dtype": "float32", "device": "cpu"}
        on = Encoder(of_type("llama", True), share_prefixes=True, prefix_cache_bytes=cache, **arguments)
        off = Encoder(of_type("llama", True), prefix_cache_bytes=0, **arguments)
        assert np.array_equal(on.encode_query(texts), off.encode_query(texts))
        assert np.array_equal(on.encode_document(texts, variants=[texts] * 4), off.encode_document(texts, variants=[texts] * 4))
        assert on.stats.prefix_tokens > 0


def test_the_token_that_is_read_may_be_another_texts(checkpoint: Directory, backend: str | None) -> None:
    template = Template(("{text}", "w7 w8"), read=(0,))
    on, off = pair(checkpoint("llama"), dtype="float32", pooling="lasttoken", template=template, backend=backend)
    text = checkpoints.sentence(10, 8)
    same(on.encode([text, text + " w7 w5"]), off.encode([text, text + " w7 w5"]), backend)
    assert on.stats.prefix_tokens == 11, "the end of the first text, which is all that is read of it, is run by the second"


def test_the_last_layer_computes_what_is_read(checkpoint: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    on, off = pair(checkpoint("llama"), dtype="float32", pooling="lasttoken")
    rows: list[int] = []
    mlp = blocks.mlp
    monkeypatch.setattr(blocks, "mlp", lambda x, *rest: (rows.append(len(x)), mlp(x, *rest))[1])
    assert np.array_equal(on.encode(TEXTS), off.encode(TEXTS))
    assert rows[0] > 100
    assert rows[2] == 16, "one for each of the 13 texts, padded"


def test_logits_and_duplicates(of_type: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def head(directory: Path, config: Any, names: Any, tokens: torch.Tensor, adapters: Any = ()) -> Any:
        return weights.Dense(tokens, None, packed=False)

    monkeypatch.setattr(weights, "load_vocabulary", head)
    on, off = pair(of_type("llama", True), template="promptreps", dtype="float32")
    texts = ["the text and more of it", "the text and more of it", "the text and more of all", "one"]
    ours, theirs = (each.encode_sparse(texts, words=str.split).to_dense() for each in (on, off))
    assert torch.equal(ours, theirs)
    assert on.stats.prefix_tokens > 0


def test_states_of_every_token_are_run_whole(checkpoint: Directory) -> None:
    on, off = pair(checkpoint("gemma2"), dtype="float32")
    ours, theirs = (each.encode(TEXTS, output_value="token_embeddings") for each in (on, off))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert on.stats.prefix_tokens == 0


def test_running_out_of_memory_shares_within_each_half(checkpoint: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    on, off = pair(checkpoint("mistral"), dtype="float32")
    expected = off.encode(TEXTS)
    forward, ran, refused = runner.forward, list[int](), list[int]()

    def scarce(model: Any, batch: Any, *rest: Any, **named: Any) -> Any:
        tokens = sum(batch.lengths)
        if tokens > 80:
            refused.append(tokens)
            raise torch.OutOfMemoryError("CUDA out of memory")
        ran.append(tokens)
        return forward(model, batch, *rest, **named)

    monkeypatch.setattr(runner, "forward", scarce)
    assert np.array_equal(on.encode(TEXTS), expected)
    assert len(ran) > 2
    assert sum(ran) + on.stats.prefix_tokens == on.stats.tokens
    assert on.stats.prefix_tokens > 20, "texts of a half still share"
    assert on._engine.fits == min(refused) // 2
    before = len(refused)
    assert np.array_equal(on.encode(TEXTS), expected)
    assert len(refused) == before, "the next call begins with batches that fit"


def test_a_kept_prompt_that_pooling_leaves_out_still_counts(checkpoint: Directory) -> None:
    """A weighted mean numbers a text's tokens from its start, the prompt's included."""
    for pooling in (*POOLINGS, ["mean", "weightedmean"]):
        arguments = {"device": "cpu", "dtype": "float32", "pooling": pooling, "include_prompt": False}
        on, off = (Encoder(checkpoint("llama"), prefix_cache_bytes=size, **arguments) for size in (None, 0))
        texts = checkpoints.sentences((3, 10, 17))
        assert np.array_equal(on.encode(texts, prompt=PROMPT), off.encode(texts, prompt=PROMPT)), pooling
        assert on.stats.prefix_tokens == 3 * 25


@pytest.mark.parametrize(
    ("name", "arguments", "why"),
    [
        ("bert", {}, "see those after them"),
        ("llama-bidirectional", {}, "see those after them"),
        ("llama", {"causal": False}, "see those after them"),
        ("llama", {"pooling": "cls"}, "first token"),
    ],
)
def test_a_model_that_cannot_share_says_so(checkpoint: Directory, name: str, arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Encoder(checkpoint(name), device="cpu", share_prefixes=True, **arguments)


def test_positions_by_length_say_so(checkpoint: Directory, tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}
    directory = checkpoints.edit(checkpoint("llama"), tmp_path / "dynamic", rope_parameters=scaling)
    with pytest.raises(ValueError, match="depend on a text's length"):
        Encoder(directory, device="cpu", share_prefixes=True)


def test_the_argument(checkpoint: Directory) -> None:
    for wrong in (1, None, "yes"):
        with pytest.raises(ValueError, match="expected True or False"):
            Encoder(checkpoint("llama"), device="cpu", share_prefixes=wrong)  # type: ignore[arg-type]
    encoder = pickle.loads(pickle.dumps(Encoder(checkpoint("llama"), device="cpu", share_prefixes=True)))
    encoder.encode(TEXTS)
    assert encoder.stats.prefix_tokens > 0
    plain = Encoder(checkpoint("llama"), device="cpu")
    plain.encode(TEXTS)
    assert plain.stats.prefix_tokens == 0, "it has to be asked for"
