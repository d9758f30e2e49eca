"""Logits of the vocabulary against transformers' causal language models, and what PromptReps makes of them against its formulas."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
import transformers
from checkpoints import ABSENT, CASES, Case
from torch import Tensor

from pyembed import Encoder, heads, prompts, request, sparse, weights
from pyembed.batch import pack
from pyembed.loading import add_vocabulary
from pyembed.model import forward

VOCABULARY = checkpoints.VOCABULARY
TEXTS = checkpoints.sentences((1, 2, 3, 17, 40, 75))
MODELS: dict[str, Case] = {
    "llama": CASES["llama"],
    "qwen3-tied": CASES["qwen3"].but(tie_word_embeddings=True),
    "gemma2": CASES["gemma2"].but(final_logit_softcapping=2.5),  # tied by default
    "gemma2-default-cap": CASES["gemma2"],  # 30
    "gemma2-no-cap": CASES["gemma2"].but(final_logit_softcapping=None),
    "gemma3": CASES["gemma3"],
    "gemma1": CASES["gemma1"],
    "phi3": CASES["phi3"],
    "gpt-neo": CASES["gpt-neo"],
    "gptj": CASES["gptj"],  # its head has a bias
    "gpt-neox": CASES["gpt-neox"],
    "opt": CASES["opt"],
    "opt-350m": checkpoints.OPT_350M,  # tied to a table that is narrower than the model
    "bloom": CASES["bloom"],
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A language model with its head, saved by transformers: no modules.json."""
    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in made:
            case = MODELS[name]
            prefix = "Gemma3" if case.architecture == "Gemma3Text" else case.architecture
            model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{case.architecture}Config")(**case.fields))
            checkpoints.redraw(model, plus_one=case.architecture.startswith("Gemma"))
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
            checkpoints.tokenizer(case).save_pretrained(made[name])
        return made[name]

    return directory


def loaded(directory: Path, backend: str | None = None, dtype: str = "float32") -> Encoder:
    """The model with its vocabulary."""
    encoder = Encoder(directory, device="cpu", dtype=dtype, backend=backend, pooling="lasttoken")
    assert encoder._loaded.weights.vocabulary is None
    add_vocabulary(encoder._loaded, encoder._stack, encoder._family)
    return encoder


def ours(encoder: Encoder, texts: list[str] = TEXTS) -> Tensor:
    model = encoder._loaded
    with torch.inference_mode():
        batch = pack(encoder.tokenizer.encode(texts, None).ids, None, model.ops, model.device)
        hidden = forward(model.weights, batch, model.ops)
        hidden[sum(batch.lengths) :] = torch.nan
        return heads.logits(hidden, model.weights, batch, model.ops)


def theirs(directory: Path, texts: list[str] = TEXTS, dtype: torch.dtype = torch.float32) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    with torch.inference_mode():
        return torch.stack([model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].float() for text in texts])


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_transformers(saved: Callable[[str], Path], name: str, backend: str | None) -> None:
    right = theirs(saved(name))
    model = loaded(saved(name), backend)
    found = ours(model)
    assert (found.shape, found.dtype) == ((len(TEXTS), VOCABULARY), torch.float32)
    assert checkpoints.error(found, right).max() <= 1e-5
    tied = name not in ("llama", "phi3", "gptj", "gpt-neox", "opt-350m")
    assert (model._loaded.weights.vocabulary.weight is model._loaded.weights.tokens) == tied  # no second copy
    for text, row in zip(TEXTS, found, strict=True):
        assert torch.equal(ours(model, [text])[0], row), "other bits in another batch"


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_bfloat16_loses_no_more_than_twice_what_transformers_loses(saved: Callable[[str], Path], name: str, backend: str | None) -> None:
    texts = [text for seed in range(4) for text in checkpoints.sentences((3, 17, 40), seed)]
    right, low = theirs(saved(name), texts), theirs(saved(name), texts, torch.bfloat16)
    lost, allowed = (
        checkpoints.error(each, right).square().mean().sqrt() for each in (ours(loaded(saved(name), backend, "bfloat16"), texts), low)
    )
    assert 1e-4 < allowed < 0.3
    assert lost <= 2 * allowed


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": ABSENT}),  # 30
        ("gemma2-default-cap", {"final_logit_softcapping": None}),
        ("gemma3", {"final_logit_softcapping": 2.0}),
    ],
)
def test_a_wrong_value_moves_logits_as_it_moves_transformers(
    saved: Callable[[str], Path], tmp_path: Path, name: str, wrong: dict[str, Any]
) -> None:
    edited = checkpoints.edit(saved(name), tmp_path / "edited", **wrong)
    moved = ours(loaded(edited))
    assert checkpoints.error(moved, ours(loaded(saved(name)))).min() >= 1e-3
    assert checkpoints.error(moved, theirs(edited)).max() <= 1e-5


def test_tied_and_untied_differ(saved: Callable[[str], Path], tmp_path: Path) -> None:
    edited = checkpoints.edit(saved("llama"), tmp_path / "tied", tie_word_embeddings=True)
    assert checkpoints.error(ours(loaded(edited)), ours(loaded(saved("llama")))).min() >= 0.1


def test_a_bias_of_the_head_is_read(saved: Callable[[str], Path], tmp_path: Path) -> None:
    directory = checkpoints.edit(saved("llama"), tmp_path / "biased")
    tensors = checkpoints.load_file(directory / "model.safetensors")
    bias = torch.arange(VOCABULARY) / 10.0
    right = ours(loaded(directory)) + bias
    checkpoints.save_file(tensors | {"lm_head.bias": bias}, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"not expected: lm_head\.bias"):  # this architecture has none
        Encoder(directory, device="cpu", dtype="float32", pooling="lasttoken")
    plain = Encoder(saved("llama"), device="cpu", dtype="float32", pooling="lasttoken")
    model = plain._loaded
    with torch.inference_mode():
        head = weights.load_vocabulary(directory, model.spec.model, plain._family.tensors, model.weights.tokens)
    model.weights = replace(model.weights, vocabulary=head)
    assert checkpoints.error(ours(plain), right).max() <= 1e-6


def test_a_head_that_is_not_there_or_does_not_fit_is_refused(
    saved: Callable[[str], Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"has no lm_head\.weight.*saved with its language-model head"):
        loaded(checkpoint("llama"))
    with pytest.raises(ValueError, match="knows no head that gives logits of the vocabulary for bert"):
        loaded(checkpoint("bert"))
    directory = checkpoints.edit(saved("llama"), tmp_path / "short")
    tensors = checkpoints.load_file(directory / "model.safetensors")
    checkpoints.save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"][:-1].contiguous()}, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight in model\.safetensors has shape \[63, 48\]"):
        loaded(directory)
    with pytest.raises(ValueError, match="final_logit_softcapping is 0"):
        loaded(checkpoints.edit(saved("gemma2"), tmp_path / "cap", final_logit_softcapping=0))


# PromptReps


def transcribed(row: list[float], ids: set[int], expand: int = 0, candidates: set[int] = frozenset()) -> dict[int, int]:
    """models.md 2.7, in Python's floats."""
    value = [math.log(1 + max(x, 0.0)) for x in row]
    ranked = sorted(ids or range(len(row)), key=lambda i: -value[i])
    chosen = ranked[: min(len(ids), 128) if ids else 10]
    chosen += sorted(candidates - ids, key=lambda i: -value[i])[:expand]
    return {i: round(100 * value[i]) for i in chosen}


def drawn(size: int, seed: int = 0) -> Tensor:
    return 4 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def as_dict(made: sparse.SparseVector) -> dict[int, int]:
    assert made.ids.unique().numel() == made.ids.numel()
    assert (made.weights == made.weights.round()).all()
    return dict(zip(made.ids.tolist(), made.weights.int().tolist(), strict=True))


@pytest.mark.parametrize("count", [0, 1, 7, 127, 128, 129, 300])
def test_the_largest_of_the_text(count: int) -> None:
    row = drawn(1000) + 12 * (count > 128)  # all positive, so that no two are alike
    ids = set(torch.randperm(1000, generator=torch.Generator().manual_seed(count))[:count].tolist())
    made = sparse.vector(row, ids)
    assert as_dict(made) == transcribed(row.tolist(), ids)
    assert len(made.ids) == (min(count, 128) or 10)
    assert (made.weights.diff() <= 0).all()
    if count == 7:
        assert 0 in as_dict(made).values()  # a negative logit stays, at 0
        assert as_dict(made) != {i: round(100 * math.log(1 + abs(row[i]))) for i in ids}


def test_expansion() -> None:
    row, ids, candidates = drawn(200).abs(), {3, 4, 5}, set(range(0, 200, 2))
    for expand in (1, 5, 500):
        assert as_dict(sparse.vector(row, ids, candidates=candidates, expand=expand)) == transcribed(row.tolist(), ids, expand, candidates)
    assert as_dict(sparse.vector(row, ids, candidates=candidates)) == transcribed(row.tolist(), ids)
    # what the fallback has already is there once
    assert as_dict(sparse.vector(row, set(), candidates=candidates, expand=20)) == transcribed(row.tolist(), set(), 20, candidates)


def test_equal_values_take_the_lower_ids_and_foreign_ids_are_refused() -> None:
    assert sparse.vector(torch.zeros(50), set()).ids.tolist() == list(range(10))
    with pytest.raises(ValueError, match="token id 50; the logits are of 50 tokens"):
        sparse.vector(torch.zeros(50), {50})


def test_what_may_expand() -> None:
    blanks = ["\u2581", "\u2581word", "\u2581\u2581word", "\u25817", "\u0120word", " word", " ", ""]
    vocabulary = ["word", "Word", "w0rd", "7", "\u00e9t\u00e9", "\u00dft", "a", "z\u00e9", "-a", *blanks]
    found = sparse.expansions({token: index for index, token in enumerate(vocabulary)})
    assert [vocabulary[index] for index in sorted(found)] == ["word", "a", "z\u00e9", "\u2581word", " word"]


def test_from_texts_to_tensors_and_dicts(saved: Callable[[str], Path]) -> None:
    """All steps at once, with words given by a function."""
    model = loaded(saved("llama"))
    texts = ["w9 w5 W9 w7 and w6", "and and", "w12"]
    prompts = [f"w30 w31 {text} w32" for text in texts]
    logits = ours(model, prompts)

    def words(text: str) -> list[str]:
        return [word for word in text.lower().split() if word != "and"]

    rows = sparse.vectors(logits, texts, model.tokenizer, words=words)
    ids = [{9, 5, 7, 6}, set(), {12}]
    right = [transcribed(row.tolist(), each) for row, each in zip(theirs(saved("llama"), prompts), ids, strict=True)]
    assert [as_dict(row) for row in rows] == right
    tokens = model.tokenizer.backend.id_to_token
    assert sparse.as_dicts(rows, model.tokenizer) == [{tokens(i): weight for i, weight in each.items()} for each in right]

    made = sparse.as_tensor(rows, VOCABULARY)
    assert made.is_sparse
    assert made.is_coalesced()
    assert (made.dtype, made.shape) == (torch.float32, (3, VOCABULARY))
    dense = torch.zeros(3, VOCABULARY)
    for n, each in enumerate(right):
        for i, weight in each.items():
            dense[n, i] = weight
    assert torch.equal(made.to_dense(), dense)
    assert torch.equal(made.indices(), dense.to_sparse().indices())  # no zeros are stored
    assert sparse.as_tensor([], VOCABULARY).shape == (0, VOCABULARY)
    assert sparse.as_dicts([], model.tokenizer) == []

    wider = sparse.vectors(logits, texts, model.tokenizer, words=words, expand=4)
    assert [as_dict(row) for row in wider] == [as_dict(row) for row in rows]  # w4 and the like are neither letters nor digits
    assert np.array_equal([len(row.ids) for row in rows], [4, 10, 1])


NLTK = """
import json, sys
import nltk
from pyembed import sparse
nltk.data.path[:] = []
try:
    sparse.nltk_words()
except ValueError as error:
    refused = str(error)
nltk.data.path[:] = [sys.argv[1]]
print(json.dumps([refused, list(sparse.nltk_words()(sys.argv[2]))]))
sys.modules["nltk"] = None
try:
    sparse.nltk_words()
except ValueError as error:
    print(json.dumps(str(error)))
"""


def test_words_of_nltk(tmp_path: Path) -> None:
    """With the data's real layout and a few entries of our own."""
    punkt = tmp_path / "tokenizers/punkt_tab/english"
    punkt.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (punkt / name).touch()
    (tmp_path / "corpora/stopwords").mkdir(parents=True)
    (tmp_path / "corpora/stopwords/english").write_text("the\nover\nit\n")
    text = 'The quick "Brown" fox, over it... Isn\'t'
    command = [sys.executable, "-c", NLTK, str(tmp_path), text]
    first, second = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    refused, words = json.loads(first)
    assert "python -m nltk.downloader punkt_tab stopwords" in refused
    assert "pass words=" in refused
    assert words == ["quick", "``", "brown", "''", "fox", "...", "is", "n't"]  # NLTK's quotation marks are two characters and stay
    assert "not installed" in json.loads(second)


def test_encode_sparse(saved: Callable[[str], Path], backend: str | None) -> None:
    """Through the Encoder: the template's last token, the words of the bare text, in any batch."""
    texts = [*checkpoints.sentences((3, 40, 7)), ""]
    encoder = Encoder(saved("llama"), device="cpu", dtype="float32", backend=backend, template="promptreps")
    found = encoder.encode_sparse(texts, prompt_name="document", words=str.split)
    assert (found.shape, found.layout, found.is_coalesced()) == ((4, VOCABULARY), torch.sparse_coo, True)
    rows = prompts.prepare(encoder.tokenizer, request.job(encoder, prompt_name="document").form, texts)
    model = transformers.AutoModelForCausalLM.from_pretrained(saved("llama"), attn_implementation="eager")
    for text, ids, row in zip(texts, rows.ids, found.to_dense(), strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([ids.tolist()])).logits[0, -1]
        own = {encoder.tokenizer.id_of(word) for word in text.split()} or set(logits.topk(10).indices.tolist())
        right = torch.zeros(VOCABULARY)
        for token in own:
            right[token] = 100 * math.log1p(max(0.0, float(logits[token])))
        assert (row - right).abs().max() <= 0.501
    for batch_size in (None, 1):
        again = encoder.encode_sparse(texts[::-1], prompt_name="document", words=str.split, batch_size=batch_size)
        assert torch.equal(again.to_dense().flip(0), found.to_dense())
    query = encoder.encode_sparse(texts[0], prompt_name="query", words=str.split)
    assert query.shape == (VOCABULARY,)
    (weights_of,) = encoder.encode_sparse(texts[:1], prompt_name="document", words=str.split, as_dict=True)
    assert set(weights_of) == set(texts[0].split())


def test_encode_sparse_refuses(saved: Callable[[str], Path], checkpoint: Callable[[str], Path]) -> None:
    several = Encoder(saved("llama"), device="cpu", dtype="float32", template="metaeol")
    with pytest.raises(ValueError, match="one template's last token"):
        several.encode_sparse(["w5"], words=str.split)
    headless = Encoder(checkpoint("llama"), device="cpu", dtype="float32")  # no lm_head in the file
    with pytest.raises(ValueError, match="so there are no logits"):
        headless.encode_sparse(["w5"], words=str.split)
    with pytest.raises(ValueError, match="bidirectional and predicts none"):
        Encoder(checkpoint("bert"), device="cpu", dtype="float32").encode_sparse(["w5"], words=str.split)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"words": 5}, "words is 5; expected a function"),
        ({"words": lambda text: "dog"}, "words gave 'dog' for a text; expected a list"),
        ({"words": lambda text: [1]}, "expected a list of str"),
        ({"words": str.split, "expand": -1}, "expand is -1"),
        ({"words": str.split, "expand": True}, "expand is True"),
    ],
)
def test_encode_sparse_says_what_it_expects(saved: Callable[[str], Path], arguments: dict[str, Any], sentence: str) -> None:
    encoder = Encoder(saved("llama"), device="cpu", dtype="float32", template="promptreps")
    with pytest.raises((TypeError, ValueError), match=sentence):
        encoder.encode_sparse(["w5 w6"], **arguments)
    with pytest.raises(ValueError, match="leaves the last layer out"):
        Encoder(saved("llama"), device="cpu", dtype="float32", template="pretended-cot").encode_sparse(["w5"], words=str.split)


def test_rows_of_the_table_without_a_token_are_no_words(saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(saved("llama"), device="cpu", dtype="float32", template="promptreps")
    monkeypatch.setattr(encoder.tokenizer, "vocab_size", 20)
    (found,) = encoder.encode_sparse([""], words=str.split, as_dict=True)
    assert len(found) == 10 and None not in found and "None" not in found
    assert max(encoder.tokenizer.id_of(token) for token in found) < 20


def test_sparse_vectors_are_scored_by_their_dot_product(saved: Callable[[str], Path]) -> None:
    encoder = Encoder(saved("llama"), device="cpu", dtype="float32", template="promptreps")
    found = encoder.encode_sparse(TEXTS, words=str.split)
    dense = found.to_dense()
    assert torch.allclose(encoder.similarity(found, found), dense @ dense.T)
    assert torch.allclose(encoder.similarity_pairwise(found, found), (dense * dense).sum(1))
    one = encoder.encode_sparse(TEXTS[1], words=str.split)
    assert torch.allclose(encoder.similarity(one, found), dense[1:2] @ dense.T)
    with pytest.raises(TypeError, match="sparse and the other is not"):
        encoder.similarity(found, dense)
