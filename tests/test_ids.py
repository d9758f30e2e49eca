"""Token ids in the place of texts: taken as they are, counted as texts are, and the same bits as the text they came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from test_recipes import of_type  # noqa: F401 - a fixture

from pyembed import Encoder, engine, request
from pyembed.recipes import methods
from pyembed.rows import prepare

Directory = Callable[[str], Path]
TEXTS = checkpoints.sentences((1, 2, 3, 10, 17, 40, 3))
PROMPT = checkpoints.sentence(25, 5) + " "
KINDS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "numpy integers": lambda ids: [np.int64(each) for each in ids],
    **{dtype: lambda ids, dtype=dtype: np.array(ids, dtype) for dtype in ("int16", "int32", "uint32", "int64", ">i4")},
    "strided": lambda ids: np.repeat(np.array(ids), 2)[::2],
    "tensor": torch.tensor,
    "int32 tensor": lambda ids: torch.tensor(ids, dtype=torch.int32),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def encoder(checkpoint: Directory) -> Encoder:
    return Encoder(checkpoint("qwen3"), device="cpu", dtype="float32")


@pytest.mark.parametrize("name", ["bert", "xlm-roberta", "llama", "qwen3", "mistral", "gemma2", "opt", "bloom"])
def test_ids_give_the_bits_of_their_texts(checkpoint: Directory, name: str, backend: str | None) -> None:
    encoder = Encoder(checkpoint(name), device="cpu", dtype="float32", backend=backend, max_seq_length=30)
    ids = encoder.token_ids(TEXTS)
    assert {each.dtype for each in ids} == {np.dtype("int32")}
    assert max(map(len, ids)) == 30
    expected = encoder.encode(TEXTS)
    assert np.array_equal(encoder.encode(ids), expected)
    assert np.array_equal(np.stack(list(encoder.stream(iter(ids)))), expected)
    other = [each[::-1].copy() for each in ids]
    assert checkpoints.error(encoder.encode(other[4:6]), torch.from_numpy(expected[4:6])).min() > 1e-3, "ids do not matter"


def test_real_weights(minilm: Path) -> None:
    encoder = Encoder(minilm, device="cpu")
    texts = ["What is Deep Learning?", "word " * 300, "a"]
    assert np.array_equal(encoder.encode(encoder.token_ids(texts)), encoder.encode(texts))
    ids = encoder.tokenizer.backend.encode(texts[0]).ids
    assert np.array_equal(encoder.encode([ids]), encoder.encode([texts[0]]))


@pytest.mark.parametrize("name", ["llama", "llama-bidirectional"])
def test_prompts_are_in_the_ids(checkpoint: Directory, name: str) -> None:
    """Bits are the same with the prompt's states taken from the cache and without."""
    prompts = {"query": PROMPT, "document": ""}
    encoder = Encoder(checkpoint(name), device="cpu", dtype="float32", prompts=prompts, include_prompt=True)
    for call in ({"prompt_name": "query"}, {"prompt": PROMPT[:-4]}, {"prompt": ""}):
        ids = encoder.token_ids(TEXTS, **call)
        assert np.array_equal(encoder.encode(ids), encoder.encode(TEXTS, **call))
    assert [len(each) for each in encoder.token_ids(TEXTS, "query")] == [25 + len(each) for each in encoder.token_ids(TEXTS)]
    assert np.array_equal(encoder.encode_document(encoder.token_ids(TEXTS)), encoder.encode(TEXTS)), "an empty prompt is none"


def test_the_models_own_prompt_is_not_put_before_ids(checkpoint: Directory) -> None:
    plain = Encoder(checkpoint("llama"), device="cpu", dtype="float32")
    prompted = Encoder(checkpoint("llama"), device="cpu", dtype="float32", prompts={"query": PROMPT}, default_prompt_name="query")
    bare = plain.token_ids(TEXTS)
    assert np.array_equal(prompted.encode(bare), plain.encode(TEXTS))
    assert np.array_equal(prompted.encode(prompted.token_ids(TEXTS)), prompted.encode(TEXTS))
    assert prompted.stats.prefix_tokens > 25 * len(TEXTS), "ids that begin with the prompt share it"
    mixed = prompted.encode([bare[0], TEXTS[0], bare[5], TEXTS[5]])
    assert np.array_equal(mixed[[0, 2]], plain.encode([TEXTS[0], TEXTS[5]]))
    assert np.array_equal(mixed[[1, 3]], prompted.encode([TEXTS[0], TEXTS[5]]))


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_ids(encoder: Encoder, kind: str) -> None:
    expected = encoder.encode(TEXTS)
    given = [KINDS[kind](each.tolist()) for each in encoder.token_ids(TEXTS)]
    assert np.array_equal(encoder.encode(given), expected)
    assert np.array_equal(encoder.encode(iter(given)), expected)
    assert np.array_equal(encoder.encode(given[3:4]), expected[3:4])
    mixed = [given[0], *TEXTS[1:3], *given[3:5], TEXTS[5], given[6]]
    assert np.array_equal(encoder.encode(mixed, batch_size=2), expected)


@pytest.mark.parametrize("kind", ["list", "int32", "tensor"])
def test_rows_of_a_table(encoder: Encoder, kind: str) -> None:
    ids = [each.tolist() for each in encoder.token_ids(checkpoints.sentences((9, 9, 9, 9)))]
    assert np.array_equal(encoder.encode(KINDS[kind](ids)), encoder.encode(checkpoints.sentences((9, 9, 9, 9))))
    assert encoder.encode(np.zeros((0, 5), int)).shape == (0,)


def test_ids_are_counted_and_doubles_found(encoder: Encoder) -> None:
    ids = encoder.token_ids(TEXTS[:3])
    before = encoder.stats
    encoder.encode([ids[0], TEXTS[0], ids[2], ids[2].tolist()])
    after = encoder.stats
    assert after.texts - before.texts == 4
    assert after.tokens - before.tokens == 2 * len(ids[0]) + 2 * len(ids[2])
    assert after.duplicates - before.duplicates == 2
    assert after.truncated == before.truncated


def test_texts_beside_ids_are_cut_and_repaired_and_told_of(encoder: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    encoder.max_seq_length = 8
    ids = encoder.token_ids(TEXTS[:2])
    encoder.encode([ids[0], TEXTS[5], ids[1], "w5 \ud800", TEXTS[4]])
    assert (encoder.stats.truncated, encoder.stats.replaced) == (2, 1)
    mixed = [[each] for each in (ids[0], TEXTS[5], ids[1], "w5 \ud800", TEXTS[4])]
    rows = prepare(encoder.tokenizer, request.job(encoder).form, mixed, range(5), 64, words=False)
    assert (rows.truncated, rows.replaced) == ([1, 4], [3])
    assert [len(each) for each in rows.ids] == [2, 8, 3, 3, 8]
    assert rows.spans == [(0, len(each)) for each in rows.ids]
    caplog.clear()
    assert [len(each) for each in encoder.token_ids([TEXTS[0], TEXTS[5], "w5 \ud800"])] == [2, 8, 3]
    assert "1 of 3 texts were cut to 8 tokens" in caplog.text
    assert "1 of 3 texts held lone surrogates" in caplog.text


def test_token_states_and_features(encoder: Encoder) -> None:
    ids = encoder.token_ids(TEXTS)
    for ours, theirs in zip(*(encoder.encode(each, output_value="token_embeddings") for each in (ids, TEXTS)), strict=True):
        assert torch.equal(ours, theirs)
    assert encoder.encode([ids[3], "w5"], output_value=None)[0]["input_ids"].tolist() == ids[3].tolist()


def test_a_window_ends_with_many_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "WINDOW_CHARACTERS", 100)
    for row in ([5] * 20, np.full(20, 5), torch.full((20,), 5), tuple([5] * 20), "x" * 80):
        assert [len(chunk.inputs) for chunk, _ in engine.windows([row] * 5)] == [2, 2, 1]


@pytest.mark.parametrize(
    ("row", "error", "sentence"),
    [
        ([], ValueError, "Input 1 has no token id"),
        (np.array([]), ValueError, "Input 1 has no token id"),
        (torch.tensor([], dtype=torch.int64), ValueError, "Input 1 has no token id"),
        ([5, -1], ValueError, "Input 1 has the token id -1; expected 0 to 63"),
        ([5, 64], ValueError, "Input 1 has the token id 64; expected 0 to 63"),
        (np.array([5, 64]), ValueError, "Input 1 has the token id 64"),
        (np.array([5, 2**32 + 5]), ValueError, "Input 1 has the token id 4294967301"),
        ([2**70], ValueError, "Input 1 has the token id 1180591620717411303424"),
        ([5] * 21, ValueError, "Input 1 has 21 token ids; max_seq_length is 20, and ids are never cut.* raise max_seq_length"),
        ([True, False], TypeError, "Input 1 is a list with a bool in it; expected a text"),
        ([5, True], TypeError, "Input 1 is a list with a bool"),
        ([5, 6.0], TypeError, "Input 1 is a list with a float"),
        ([5, "w5"], TypeError, "Input 1 is a list with a str"),
        ([[5, 6]], TypeError, "Input 1 is a list with a list"),
        (np.array([True]), TypeError, r"Input 1 is a ndarray of bool, shape \(1,\)"),
        (np.array([5.0]), TypeError, "Input 1 is a ndarray of float64"),
        (np.array([[5]]), TypeError, r"Input 1 is a ndarray of int64, shape \(1, 1\)"),
        (torch.tensor([5.0]), TypeError, "Input 1 is a Tensor of torch.float32"),
        (torch.tensor([True]), TypeError, "Input 1 is a Tensor of torch.bool"),
        (torch.tensor([[5]]), TypeError, "Input 1 is a Tensor of torch.int64"),
        (5, TypeError, r"Input 1 is a int; .* The ids of one text are passed as a list of one, encode\(\[ids\]\)"),
        (np.int64(5), TypeError, r"Input 1 is a int64; .* encode\(\[ids\]\)"),
        (torch.tensor(5), TypeError, r"Input 1 is a Tensor; .* encode\(\[ids\]\)"),
        (5.0, TypeError, r"Input 1 is a float; expected a text \(str\) or its token ids"),
        ({5}, TypeError, "Input 1 is a set; expected a text"),
    ],
)
def test_ids_that_are_none(checkpoint: Directory, row: Any, error: type[Exception], sentence: str) -> None:
    encoder = Encoder(checkpoint("qwen3"), device="cpu", dtype="float32", max_seq_length=20)
    assert encoder.spec.model.vocab_size == 64
    encoder.encode(["w5", [5] * 20, [0, 63]])
    before = encoder.stats
    for inputs in (["w5", row, "w6"], iter(["w5", row])):
        with pytest.raises(error, match=sentence):
            encoder.encode(inputs)
    assert encoder.stats == before


@pytest.mark.parametrize(
    "inputs", [np.array([5, 6, 7]), torch.tensor([5, 6, 7]), np.array(5), torch.tensor(5), np.zeros((2, 2, 2), int), np.zeros(3)]
)
def test_a_column_of_numbers_is_no_text(encoder: Encoder, inputs: Any) -> None:
    with pytest.raises(TypeError, match=r"inputs is a \w+ of numbers, shape .* passed as a list of one, encode\(\[ids\]\)"):
        encoder.encode(inputs)
    if inputs.ndim == 1 and inputs.dtype not in (np.float64,):
        for flat in (inputs.tolist(), tuple(inputs.tolist()), iter(inputs.tolist())):
            with pytest.raises(TypeError, match=r"Input 0 is a int; .* passed as a list of one, encode\(\[ids\]\)"):
                encoder.encode(flat)
    with pytest.raises(TypeError, match="Input 0 is a ndarray of float64"):
        encoder.encode(np.zeros((2, 3)))


def test_nothing_can_be_asked_to_stand_before_ids(checkpoint: Directory, of_type: Any) -> None:  # noqa: F811
    encoder = Encoder(checkpoint("llama"), device="cpu", dtype="float32", prompts={"query": PROMPT, "document": ""})
    calls: list[Callable[[Any], Any]] = [
        lambda texts: encoder.encode(texts, prompt="w5 "),
        lambda texts: encoder.encode(texts, prompt_name="query"),
        lambda texts: list(encoder.stream(texts, prompt_name="query")),
        encoder.encode_query,
    ]
    for call in calls:
        for inputs in ([[5, 6]], ["w5", [5, 6]]):
            with pytest.raises(ValueError, match=f"Input {len(inputs) - 1} is token ids, and nothing is put before ids"):
                call(inputs)
    icl = Encoder(of_type("mistral", False), recipe="bge-icl", default_prompt_name="query", device="cpu", dtype="float32")
    icl.encode([[5, 6]])
    with pytest.raises(ValueError, match="nothing is put before ids"):
        icl.encode([[5, 6]], examples=[("a", "b")])
    with pytest.raises(ValueError, match="nothing is put before ids"):
        icl.encode_query([[5, 6]])
    named = Encoder(of_type("llama", True), template="promptreps", device="cpu", dtype="float32")
    assert not any(named.prompts.values()), "its names choose templates"
    named.encode([[5, 6]])
    with pytest.raises(ValueError, match="nothing is put before ids"):
        named.encode_query([[5, 6]])


def test_ids_do_not_tell_what_is_pooled(checkpoint: Directory, of_type: Any) -> None:  # noqa: F811
    left_out = Encoder(checkpoint("llama-bidirectional"), device="cpu", dtype="float32", include_prompt=False)
    echo = Encoder(of_type("llama", True), template="echo", device="cpu", dtype="float32")
    for encoder in (left_out, echo):
        with pytest.raises(ValueError, match=r"Input 0 is token ids, but this model pools a part of its tokens only.*give texts"):
            encoder.encode([[5, 6]])
        assert encoder.token_ids(["the text"])[0].size > 0
    assert "metaeol" in methods()
    several = Encoder(of_type("llama", True), template="metaeol", device="cpu", dtype="float32")
    with pytest.raises(ValueError, match=r"Input 0 is token ids, but this model's vector is the mean of \d templates; give texts"):
        several.encode([[5, 6]])
    with pytest.raises(ValueError, match=r"puts a text into \d templates"):
        several.token_ids(["the text"])


def test_templates_are_in_the_ids(of_type: Any) -> None:  # noqa: F811
    encoder = Encoder(of_type("llama", True), template="prompteol", device="cpu", dtype="float32")
    texts = ["the text", "another one", "a third, " * 20]
    assert np.array_equal(encoder.encode(encoder.token_ids(texts)), encoder.encode(texts))
    assert len(encoder.token_ids(texts)[0]) > len(encoder.tokenizer.encode(texts, None).ids[0])


def test_words_are_needed(checkpoint: Directory, of_type: Any, tmp_path: Path) -> None:  # noqa: F811
    encoder = Encoder(checkpoint("qwen3"), device="cpu", dtype="float32")
    with pytest.raises(TypeError, match="Input 1 is a list; with variants expected a str"):
        encoder.encode(["w5", [5, 6]], variants=[["w6"], ["w7"]])
    with pytest.raises(TypeError, match=r"variants of text 0 are \[\[5, 6\]\]; expected a list of str"):
        encoder.encode(["w5"], variants=[[[5, 6]]])
    tied = checkpoints.edit(of_type("llama", True), tmp_path / "tied", tie_word_embeddings=True)
    sparse = Encoder(tied, template="promptreps", device="cpu", dtype="float32")
    for inputs in ([[5, 6]], iter(["the text", [5, 6]])):
        with pytest.raises(TypeError, match=r"Input \d is token ids; a sparse vector needs the text's words"):
            sparse.encode_sparse(inputs, words=str.split)  # type: ignore[arg-type]


def test_what_token_ids_takes(encoder: Encoder) -> None:
    assert encoder.token_ids([]) == []
    assert [each.tolist() for each in encoder.token_ids(iter(["w5 w6"]))] == [[5, 6, 3]]
    with pytest.raises(TypeError, match="token_ids takes several texts"):
        encoder.token_ids("w5")
    with pytest.raises(TypeError, match="Input 1 is a list; expected str"):
        encoder.token_ids(["w5", [5]])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="prompt is 5; expected a str"):
        encoder.token_ids(["w5"], prompt=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no prompt named 'nope'"):
        encoder.token_ids(["w5"], "nope")
