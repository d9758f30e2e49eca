"""Templates and recipes in use: odd texts, limits, prompts and instructions, arguments that overrule a recipe, pickles, refusals."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from templated import LONG, TEXTS, Peer, encoder, expected, peer, prepared
from tokenizers_made import mistral_like

from pyembed import Encoder
from pyembed.config import Template
from pyembed.info import of_model, of_text, of_vector
from pyembed.recipes import methods, recipes

EXTRA = ["<instruct>", "<query>", "<response>", "<bos>", "<eos>", "<|endoftext|>", *(f"<s{n}>" for n in range(1, 17))]
RETRIEVAL = "Given a web search query, retrieve relevant passages that answer the query"
OF_TYPE = {"mistral": "mistral", "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt_neo": "gpt-neo", "gemma2": "gemma2"}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Peer]:
    made: dict[Any, Peer] = {}

    def get(case: str = "mistral", *, causal: bool = True) -> Peer:
        if (case, causal) not in made:
            made[case, causal] = peer(tmp_path_factory.mktemp(case), case, mistral_like("<s> $A", EXTRA), causal=causal)
        return made[case, causal]

    return get


def named(make: Callable[..., Peer], name: str, **arguments: Any) -> Encoder:
    """The encoder of a recipe or method, on a model of a type that it is for."""
    if name in methods():
        return encoder(make("llama"), template=name, **arguments)
    case = next(OF_TYPE[kind] for kind in recipes()[name].model_types if kind in OF_TYPE)
    return encoder(make(case), recipe=name, **arguments)


TEMPLATED = ["gritlm", "llm2vec-mistral", "echo-meantoken", "llara", "bge-icl", "promptriever", "sgpt-specb", *methods()]
ODD = [
    "",
    " ",
    "{text} {prompt} {examples} {instruction} {",
    "</s> <s> [/INST] \\n %%text%%",
    'in one word:"',
    "!@#$%^&*() !@#$%^&*()",
    "\0 nul",
    "日本語\u200d",
    "x" * 600,
]


@pytest.mark.parametrize("name", TEMPLATED)
def test_odd_texts_are_texts(make: Callable[..., Peer], name: str) -> None:
    """Alone, in a batch and in any order: the same bits, finite, whatever looks like a slot."""
    ours = named(make, name)
    vectors = ours.encode(ODD)
    assert np.isfinite(vectors).all()
    assert all((ours.encode(text) == vector).all() for text, vector in zip(ODD, vectors, strict=True))
    assert (ours.encode(ODD[::-1], batch_size=2)[::-1] == vectors).all()
    asked = ours.encode_query(ODD)
    assert (asked[::-1] == ours.encode_query(ODD[::-1], batch_size=3)).all()
    assert len(np.unique(asked[2:], axis=0)) == len(ODD) - 2
    rows = prepared(ours, ODD, "query")
    each = len(rows.ids) // len(ODD)
    assert all(0 <= first <= end <= len(ids) for ids, (first, end) in zip(rows.ids, rows.spans, strict=True))
    assert "{text} {prompt} {examples}" in decoded(ours, rows.ids[2 * each])


def decoded(ours: Encoder, ids: np.ndarray) -> str:
    return str(ours.tokenizer.backend.decode(ids.tolist(), skip_special_tokens=False))


@pytest.mark.parametrize("name", TEMPLATED)
def test_surrogates_and_cuts_are_counted_once_an_input(make: Callable[..., Peer], name: str, caplog: pytest.LogCaptureFixture) -> None:
    longest = max(len(ids) for ids in prepared(named(make, name), ["a"], "query").ids)
    ours = named(make, name, max_seq_length=longest + 20)
    texts = ["a", "b \ud800 \udfff", (LONG + " ") * 12, "c", "\ud900" + (LONG + " ") * 12]
    fixed = [text.replace("\ud800", "\ufffd").replace("\udfff", "\ufffd").replace("\ud900", "\ufffd") for text in texts]
    with caplog.at_level(logging.WARNING, logger="pyembed"):
        vectors = ours.encode_query(texts)
    assert (ours.stats.truncated, ours.stats.replaced, ours.stats.texts) == (2, 2, 5)
    assert f"2 of 5 texts were cut to {longest + 20} tokens" in caplog.text
    assert "2 of 5 texts held lone surrogates" in caplog.text
    assert (vectors == ours.encode_query(fixed)).all()
    assert ours.stats.replaced == 2
    if name not in ("bge-icl", "llara", "promptreps", "promptreps-phi-3", "promptreps-mistral", "echo-meantoken"):
        assert max(map(len, prepared(ours, texts, "query").ids)) <= longest + 20
    before = ours.stats
    ours.encode(["a", "c"], variants=[[texts[2], texts[2], texts[1]], []])
    assert (ours.stats.truncated - before.truncated, ours.stats.replaced - before.replaced, ours.stats.texts - before.texts) == (1, 1, 2)


# Instructions

TAKES = {
    "e5-mistral": "Instruct: Find.\nQuery: ",
    "gritlm": "<|user|>\nFind.\n<|embed|>\n",
    "gte-qwen2": "Instruct: Find.\nQuery: ",
    "echo-lasttoken": "Find.",
    "llm2vec-mistral": "Find.",
    "bge-icl": "<instruct>Find.\n<query>",
    "bge-gemma2": "<instruct>Find.\n<query>",
    "promptriever": " Find.",
    "bge-code": "<instruct>Find.\n<query>",
    "llama-embed-nemotron": "Instruct: Find.\nQuery: ",
    "qwen3-embedding": "Instruct: Find.\nQuery:",
    "kalm-v2": "Instruct: Find. \n Query: ",
}


@pytest.mark.parametrize("name", TAKES)
def test_instructions(make: Callable[..., Peer], name: str) -> None:
    ours = named(make, name)
    asked = ours.encode_query(TEXTS, instruction="Find.")
    assert (asked == ours.encode(TEXTS, prompt_name="query", prompt=TAKES[name])).all()
    assert (asked != ours.encode_query(TEXTS)).any(axis=1).all()
    odd = ours.encode_query("a", instruction="{text} {instruction}")
    assert (odd == ours.encode("a", prompt_name="query", prompt=TAKES[name].replace("Find.", "{text} {instruction}"))).all()
    without = ours.encode_query("a", instruction="")
    assert (without == ours.encode("a", prompt_name="query", prompt=ours.prompts["document"])).all()
    for more in ({"prompt": "x"}, {"prompt_name": "query"}, {"prompt": ""}):
        with pytest.raises(ValueError, match="cannot be given together with prompt or prompt_name"):
            ours.encode_query("a", instruction="Find.", **more)
    with pytest.raises(TypeError, match="instruction is 3; expected a str"):
        ours.encode_query("a", instruction=3)
    with pytest.raises(ValueError, match=r"'document' prompt, .* has no place for an instruction; give prompt= instead"):
        ours.encode_document("a", instruction="Find.")
    told = named(make, name, instruction="Find.")
    assert (told.encode_query(TEXTS) == asked).all()
    assert told.spec.sources["prompts"] == "argument"
    assert {row[2] for row in of_text(told.spec, told.tokenizer, None) if row[0] == "prompt"} == {"argument"}


@pytest.mark.parametrize("name", ["repllama", "sgpt-specb", "llara", "nv-retriever", "prompteol", "promptreps", "echo"])
def test_models_without_a_place_for_an_instruction(make: Callable[..., Peer], name: str) -> None:
    ours = named(make, name)
    with pytest.raises(ValueError, match=r"'query' prompt, .* has no place for an instruction"):
        ours.encode_query("a", instruction="Find.")


@pytest.mark.parametrize("name", ["sgpt-specb", "llara", *methods()])
def test_a_prompt_that_the_template_has_no_place_for_is_refused(make: Callable[..., Peer], name: str) -> None:
    ours = named(make, name)
    for call in (lambda: ours.encode("a", prompt="x: "), lambda: ours.encode_query("a", prompt="x: ")):
        with pytest.raises(ValueError, match=r"The prompt 'x: ' has no place in this model's template, .*; give prompt='' to leave it out"):
            call()
    assert (ours.encode_query("a", prompt="") == ours.encode_query("a")).all()


# A template of one's own


def test_a_string_with_a_text_in_it(make: Callable[..., Peer], backend: str | None) -> None:
    made = make("llama")
    ours = encoder(made, backend, template='In {short}: {{"{text}"}} is', pooling="lasttoken")
    texts = [*TEXTS, "{text}"]
    rows = prepared(ours, texts)
    for text, ids in zip(texts, rows.ids, strict=True):
        assert ids.tolist() == made.ids('In {short}: {{"' + text + '"}} is', special=True)
    assert ours.spec.recipe.says("templates") == "argument"
    ours.max_seq_length = len(rows.ids[1]) + 4
    for text, ids in zip(texts, prepared(ours, texts).ids, strict=True):
        shown = decoded(ours, ids).removeprefix("<s> ")
        assert shown.startswith('In {short}: {{"'), text
        assert shown.endswith('"}} is'), text
        assert len(ids) <= ours.max_seq_length


def test_a_string_with_a_prompt_in_it(make: Callable[..., Peer]) -> None:
    made = make("llama")
    form = {"template": "{prompt}says {text}.", "pooling": "mean", "prompts": {"query": "He {instruction} "}, "instruction": "still"}
    ours = encoder(made, **form)
    assert prepared(ours, ["{prompt}"], "query").ids[0].tolist() == made.ids("He still says {prompt}.", special=True)
    assert prepared(ours, ["a"], prompt="{text} ").ids[0].tolist() == made.ids("{text} says a.", special=True)
    assert (ours.encode_query("a", instruction="often") == ours.encode("a", prompt="He often ")).all()
    left = encoder(made, **form, include_prompt=False)
    skip = len(made.ids("He still says ", special=True))
    assert prepared(left, ["a"], "query").spans == [(skip, len(made.ids("He still says a.", special=True)))]


PARTS = ("<s>Q: ", "{prompt}", "<{text}>", " again ", "{text}", "</s>")


@pytest.mark.parametrize("limit", [None, 40, 24])
@pytest.mark.parametrize("cut", ["end", "text", "piece"])
def test_a_template_of_several_parts(make: Callable[..., Peer], cut: Any, limit: int | None) -> None:
    made = make("llama")
    ours = encoder(made, template=Template(PARTS, special=True, read=(2, 3, 4), cut=cut), pooling="mean", normalize=False)
    ours.max_seq_length = limit
    rows = prepared(ours, ["a", LONG * 2], prompt="p")
    for text, ids, span in zip(["a", LONG * 2], rows.ids, rows.spans, strict=True):
        pieces = [made.ids(part.replace("{prompt}", "p").replace("{text}", text)) for part in PARTS]
        whole = [1, *(id for piece in pieces for id in piece)]
        starts = np.cumsum([1, *map(len, pieces)]).tolist()
        if limit is None or len(whole) <= limit:
            assert (ids.tolist(), span) == (whole, (starts[2], starts[5]))
        elif cut == "end":
            assert (ids.tolist(), span) == (whole[:limit], (starts[2], min(limit, starts[5])))
        elif cut == "text":  # the brackets and all that is not the text stay
            shown = decoded(ours, ids)
            assert len(ids) <= limit and ids[-1] == 2
            assert shown.count(">") >= 2 and " again" in shown
        else:
            assert all(len(piece) <= limit for piece in pieces) or len(ids) < len(whole)
    assert rows.truncated == ([] if limit is None else [1])


WRONG = [
    ("prompteool", "expected one of prompteol"),
    ("a {prompt} without the text", "or a string with {text} in it"),
    (3, "template is 3"),
    ("{text} and {text}", "expected {text} once in a part"),
    (Template(("a", "{text}{text}")), "expected {text} once in a part"),
    (Template(("a", "{text}"), read=(0, 2)), "numbers of parts that follow each other"),
    (Template(("a", "{text}"), read=(2,)), "numbers of parts that follow each other"),
    (Template(("a", "{text}"), cut="decoded"), "are for templates of one part"),
    (Template(("a", "{text}"), unread="before_text"), "are for templates of one part"),
    (Template(("a {text}",), after="a"), "behind the {text}"),
]


@pytest.mark.parametrize(("template", "sentence"), WRONG, ids=range(len(WRONG)))
def test_templates_that_cannot_be(make: Callable[..., Peer], template: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence.replace("{", r"\{")):
        encoder(make("llama"), template=template, pooling="mean")


def test_arguments_that_a_template_leaves_no_room_for(make: Callable[..., Peer]) -> None:
    for name in ("echo-lasttoken", "sgpt-specb"):
        with pytest.raises(ValueError, match=r"append was given, but .* template writes its special tokens itself"):
            named(make, name, append=["</s>"])
    for name in ("echo-lasttoken", "llara", "geneol"):
        with pytest.raises(ValueError, match=r"include_prompt=False was given, but .* template says itself which tokens are pooled"):
            named(make, name, include_prompt=False)
    with pytest.raises(ValueError, match="a method's template is a recipe of its own"):
        encoder(make(), recipe="gritlm", template="prompteol")


def test_tokens_that_a_template_writes_must_be_tokens(tmp_path: Path) -> None:
    made = peer(tmp_path, "llama", mistral_like("<s> $A", [f"<s{n}>" for n in range(1, 16)]))
    with pytest.raises(ValueError, match=r"Recipe 'llara' writes <s16> around a text, which the tokenizer \(.*\) does not have as tokens"):
        encoder(made, recipe="llara")
    with pytest.raises(ValueError, match=r"'llm2vec-llama-3' writes <\|start_header_id\|>, <\|end_header_id\|>, <\|eot_id\|> around"):
        encoder(made, recipe="llm2vec-llama-3")
    encoder(made, recipe="llm2vec-llama-2")
    encoder(made, template="promptreps")  # written as text where they are not tokens


# Arguments before recipes


def test_every_field_of_a_recipe_is_overruled(make: Callable[..., Peer], backend: str | None) -> None:
    made, both = make(), make(causal=False)

    def ids(text: str) -> list[int]:
        return made.ids(text, special=True)

    def check(of: Peer, ours: Encoder, rule: Any, **call: Any) -> None:
        vectors = torch.from_numpy(ours.encode(TEXTS, **call))
        right = torch.stack([expected(of, ours, rule, text) for text in TEXTS])
        assert checkpoints.error(vectors, right).max() <= 1e-5
        plain = torch.from_numpy(base.encode(TEXTS, **({} if "prompt" in call else call)))
        if vectors.shape == plain.shape:
            assert checkpoints.error(plain, right).max() >= 1e-3

    base = encoder(made, backend, recipe="e5-mistral")

    def whole(text: str) -> tuple[list[int], list[int]]:
        out = [*ids(text), 2]
        return out, list(range(len(out)))

    check(made, encoder(made, backend, recipe="e5-mistral", pooling="mean"), whole)
    check(made, encoder(made, backend, recipe="e5-mistral", pooling=["mean", "weightedmean"]), whole)
    check(both, encoder(made, backend, recipe="e5-mistral", causal=False), whole)
    check(made, encoder(made, backend, recipe="e5-mistral", normalize=False), whole)
    eos = encoder(made, backend, recipe="e5-mistral", append=["<eos>"])
    check(made, eos, lambda text: ([*ids(text), eos.tokenizer.id_of("<eos>")], list(range(len(ids(text)) + 1))))
    bos = encoder(made, backend, recipe="e5-mistral", prepend=["<bos>"])
    check(made, bos, lambda text: ([bos.tokenizer.id_of("<bos>"), *ids(text), 2], list(range(len(ids(text)) + 2))))
    prompt = f"Instruct: {RETRIEVAL}\nQuery: "
    left = encoder(made, backend, recipe="e5-mistral", pooling="mean", include_prompt=False)

    def without(text: str) -> tuple[list[int], list[int]]:
        return whole(prompt + text)[0], list(range(len(ids(prompt)), len(ids(prompt + text)) + 1))

    check(made, left, without, prompt_name="query")
    cut = encoder(made, backend, recipe="e5-mistral", max_seq_length=6)
    check(made, cut, lambda text: ([*ids(text)[:5], 2], list(range(min(6, len(ids(text)) + 1)))))
    other = encoder(made, backend, recipe="e5-mistral", prompts={"query": "Q {instruction}: ", "extra": "X "}, instruction="this")
    assert (other.prompts["query"], other.prompts["extra"], other.prompts["document"]) == ("Q this: ", "X ", "")
    check(made, other, lambda text: whole("Q this: " + text), prompt_name="query")
    default = encoder(made, backend, recipe="e5-mistral", default_prompt_name="query")
    check(made, default, lambda text: whole(prompt + text))
    assert [each.says("pooling") for each in (left.spec.recipe, cut.spec.recipe)] == ["argument", "recipe e5-mistral"]
    said = encoder(made, recipe="e5-mistral", pooling="mean", causal=False, normalize=False, instruction="x")
    told = {label: where for label, _, where in (*of_model(said.spec, ""), *of_vector(said.spec), *of_text(said.spec, said.tokenizer, 9))}
    assert {told[label] for label in ("mask", "pooling", "vector", "max length", "prompt")} == {"argument"}
    assert "mask=bidirectional, pooling=mean, dim=48" in repr(said).replace(",\n ", ",").replace("mean,  dim", "mean, dim")


def test_a_sliding_window_is_left_out(checkpoint: Any) -> None:
    directory = checkpoint("mistral-window")
    text = checkpoints.sentence(40)
    windowed, full = (
        Encoder(directory, dtype="float32", device="cpu", pooling="lasttoken", **each) for each in ({}, {"full_attention": True})
    )
    model = checkpoints.original(directory)
    theirs = torch.tensor(model.encode([text]))
    model[0].auto_model.config.sliding_window = None
    assert checkpoints.error(windowed.encode([text]), theirs) <= 1e-5
    assert checkpoints.error(full.encode([text]), theirs) >= 1e-3
    assert full.spec.model.windows == (None,) * 3


# Pickles and tokens


def test_pickles(make: Callable[..., Peer]) -> None:
    given = [
        named(make, "gritlm"),
        named(make, "metaeol"),
        named(make, "bge-icl", pooling=["mean", "lasttoken"], normalize=False, instruction="Own."),
        encoder(make("llama"), template="{prompt}is {text}", pooling="mean", include_prompt=False, prompts={"query": "Q {instruction} "}),
        encoder(make("llama"), template=Template(("a ", "{text}"), read=(1,)), pooling="mean", normalize=True),
        encoder(make(), recipe="echo-lasttoken", max_seq_length=12, default_prompt_name="query"),
    ]
    for ours in given:
        again = pickle.loads(pickle.dumps(ours))
        assert (again.encode_query(TEXTS) == ours.encode_query(TEXTS)).all()
        assert (again.encode(TEXTS) == ours.encode(TEXTS)).all()
        assert repr(again) == repr(ours)
        assert again.spec == ours.spec
        if ours.spec.forms:
            assert (again.encode_query(TEXTS, instruction="Find.") == ours.encode_query(TEXTS, instruction="Find.")).all()


def test_what_was_set_since_is_pickled(make: Callable[..., Peer]) -> None:
    ours = named(make, "gritlm")
    ours.prompts["late"] = "Late: "
    ours.default_prompt_name, ours.max_seq_length, ours.truncate_dim = "late", 9, 7
    again = pickle.loads(pickle.dumps(ours))
    assert (again.default_prompt_name, again.max_seq_length, again.truncate_dim, again.prompts) == ("late", 9, 7, ours.prompts)
    ours.default_prompt_name = ours.max_seq_length = ours.truncate_dim = None
    again = pickle.loads(pickle.dumps(ours))
    assert (again.default_prompt_name, again.max_seq_length, again.truncate_dim) == (None, None, None)
    assert (again.encode(TEXTS) == ours.encode(TEXTS)).all()


def test_token_embeddings(make: Callable[..., Peer], backend: str | None) -> None:
    ours = named(make, "echo-meantoken", backend=backend)
    made = make()
    ids = prepared(ours, TEXTS, "query").ids
    states = ours.encode_query(TEXTS, output_value="token_embeddings")
    for row, state in zip(ids, states, strict=True):
        right = made.states(row.tolist())
        assert checkpoints.error(state, right).max() <= 1e-5
    found = ours.encode_query(TEXTS[0], output_value=None)
    assert found["input_ids"].tolist() == ids[0].tolist()
    several = named(make, "metaeol")
    for output in ("token_embeddings", None):
        with pytest.raises(ValueError, match="gives one text's tokens; with variants or several templates there are more"):
            several.encode("a", output_value=output)
        with pytest.raises(ValueError, match="gives one text's tokens"):
            ours.encode("a", output_value=output, variants=["b"])


def test_a_tuple_among_the_texts_is_no_text_with_variants(make: Callable[..., Peer]) -> None:
    ours = encoder(make("llama"), pooling="mean")
    for call in (ours.encode, lambda texts: list(ours.stream(texts))):
        with pytest.raises(TypeError, match="Input 1 is a tuple with a str in it"):
            call(["x", ("dog", "cat")])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"variants": "abc"}, "variants of text 0 are 'abc'; expected a list"),
        ({"variants": 5}, "variants of text 0 are 5"),
        ({"variants": [["a", "b"]]}, r"variants of text 0 are \[\['a', 'b'\]\]; expected a list of str"),
        ({"variants": ["a", 3]}, "expected a list of str"),
        ({"examples": "ab"}, "examples is 'ab'"),
        ({"examples": {"text": "a", "response": "b"}}, "examples is {'text'"),
        ({"prompt_name": ["a"]}, r"prompt_name is \['a'\]"),
    ],
)
def test_wrong_arguments_of_a_call_are_sentences(make: Callable[..., Peer], arguments: dict[str, Any], sentence: str) -> None:
    ours = encoder(make("llama"), template="prompteol")
    with pytest.raises((TypeError, ValueError), match=sentence):
        ours.encode("dog", **arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prepend": 5}, "prepend is 5"),
        ({"append": {"</s>": 1}}, "append is {'</s>': 1}"),
        ({"adapters": 5}, "adapters is 5"),
        ({"adapters": [5]}, r"adapters is \[5\]"),
        ({"adapters": {"a": 1}}, "adapters is {'a': 1}"),
        ({"adapter": ["a"]}, r"adapter is \['a'\]"),
        ({"adapter": True}, "adapter is True"),
    ],
)
def test_wrong_arguments_of_an_encoder_are_sentences(make: Callable[..., Peer], arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        encoder(make("llama"), pooling="mean", **arguments)
    with pytest.raises(TypeError, match="model is 5; expected a directory or a hub id"):
        Encoder(5)  # type: ignore[arg-type]


def test_an_unknown_similarity_is_refused_where_it_is_used(make: Callable[..., Peer]) -> None:
    ours = encoder(make("llama"), pooling="mean")
    ours.similarity_fn_name = "dot_product"
    with pytest.raises(ValueError, match="similarity_fn_name is 'dot_product'"):
        ours.similarity([[1.0, 2.0]], [[3.0, 4.0]])
    with pytest.raises(ValueError, match="2 and 3 vectors"):
        encoder(make("llama"), pooling="mean").similarity_pairwise(np.ones((2, 4)), np.ones((3, 4)))


def test_an_instruction_without_a_place_is_refused(make: Callable[..., Peer]) -> None:
    with pytest.raises(ValueError, match="no prompt of this model has a place for it"):
        encoder(make("llama"), pooling="mean", instruction="find")
    assert encoder(make("llama"), pooling="mean", instruction="find", prompts={"query": "{instruction}: "}).prompts["query"] == "find: "


def test_output_and_layers_are_overruled(make: Callable[..., Peer]) -> None:
    made = make("llama")
    plain, rounded = (encoder(made, pooling="mean", output=output) for output in (None, "tanh_int8"))
    assert np.array_equal(rounded.encode(TEXTS), np.rint(127 * np.tanh(plain.encode(TEXTS))))
    shorter = encoder(made, pooling="lasttoken", drop_layers=1)
    right = torch.stack([made.states(ids.tolist(), -2)[-1] for ids in prepared(shorter, TEXTS).ids])
    assert checkpoints.error(shorter.encode(TEXTS), right).max() <= 1e-5
    whole = encoder(made, template="pretended-cot", drop_layers=0)
    assert whole.spec.model.unread_layers == 0
    for wrong in ({"output": "int4"}, {"drop_layers": -1}, {"drop_layers": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            encoder(made, pooling="mean", **wrong)


def test_a_stream_takes_examples(make: Callable[..., Peer]) -> None:
    ours = encoder(make("llama"), template="prompteol")
    examples = [("a dog", "Animal")]
    assert np.array_equal(np.stack(list(ours.stream(TEXTS, examples=examples))), ours.encode(TEXTS, examples=examples))
