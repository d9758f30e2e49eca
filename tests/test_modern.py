"""Today's decoders: Ministral 3, EuroBERT, Phi-3, Gemma 1, the models that a class name alone describes, and EmbeddingGemma 2."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
import transformers
from checkpoints import ABSENT, CASES, LONGROPE
from safetensors.torch import load_file, save_file
from test_rope import config_of, original_table, rope_of

from pyembed import Encoder, ops
from pyembed.batch import pack
from pyembed.blocks import norm
from pyembed.checkpoint import read_checkpoint
from pyembed.cli import main
from pyembed.config import Family, ModelConfig
from pyembed.model import forward
from pyembed.rope import table
from pyembed.weights import load

LENGTHS = (1, 2, 3, 17, 31, 32, 40, 75, 130)  # own tokens, on both sides of the original contexts, 32
TOLERANCE = 1e-5
Directory = Callable[[str], Path]
DECODERS = ("eurobert", "ministral3", "ministral3-window", "phi3", "phi3-window", "gemma1")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The models are so small that threads would only wait for each other."""
    torch.set_num_threads(1)


def encoder_of(directory: Path, backend: str | None = None, **arguments: Any) -> Encoder:
    return Encoder(directory, device="cpu", dtype="float32", backend=backend, **arguments)


def vectors_of(directory: Path, texts: list[str], **arguments: Any) -> torch.Tensor:
    return torch.from_numpy(encoder_of(directory, **arguments).encode(texts))


def label(value: Any) -> str:
    if isinstance(value, dict):
        value = "-".join(f"{name}={'absent' if each is ABSENT else each}" for name, each in value.items())
    return str(value)[:60]


# --- one wrong value for every field that decides a vector -----------------------------------------------------------------------

MINISTRAL_ROPE, DEFAULT_ROPE = checkpoints.MINISTRAL_ROPE, {"rope_type": "default", "rope_theta": 600.0}
PHI3_ROPE = checkpoints.PHI3.fields["rope_parameters"]
FIELDS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"rms_norm_eps": 5e-5}) for name in ("eurobert", "ministral3", "phi3", "gemma1")],
    *[(name, {"is_causal": False}) for name in ("ministral3", "ministral3-window", "phi3", "phi3-window", "gemma1")],
    ("ministral3-bidirectional", {"is_causal": ABSENT}),
    ("gemma1-bidirectional", {"is_causal": True}),
    *[(name, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}) for name in ("eurobert", "ministral3", "gemma1")],
    *[(name, {"hidden_act": "gelu"}) for name in ("eurobert", "ministral3", "phi3")],
    ("gemma1", {"hidden_act": "silu"}),
    *[(name, {"rope_parameters": DEFAULT_ROPE}) for name in ("eurobert", "phi3", "gemma1")],
    ("eurobert", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
    *[("ministral3", {"rope_parameters": MINISTRAL_ROPE | change}) for change in (
        {"factor": 8.0},
        {"rope_theta": 600.0},
        {"original_max_position_embeddings": 16},
        {"mscale": 2.0},
        {"mscale_all_dim": 2.0},
        {"beta_fast": 1.1},
        {"beta_slow": 0.1},
        {"llama_4_scaling_beta": 0.0},
        {"llama_4_scaling_beta": 0.8},
    )],
    *[(name, {"sliding_window": size}) for name in ("ministral3-window", "phi3-window") for size in (6, 8, None, ABSENT)],
    ("ministral3-window-bidirectional", {"sliding_window": 6}),
    *[("phi3", {"rope_parameters": PHI3_ROPE | {"partial_rotary_factor": part}}) for part in (0.5, 1.0)],
    *[("phi3-longrope", change) for change in (
        {"original_max_position_embeddings": 16},  # other texts are long
        {"original_max_position_embeddings": ABSENT},  # 4096: none is, and there is no factor
        {"original_max_position_embeddings": ABSENT, "max_position_embeddings": 8192},  # 2 x 4096
        {"max_position_embeddings": 512},  # the factor
        {"rope_parameters": LONGROPE | {"attention_factor": 1.5}},
        {"rope_parameters": LONGROPE | {"factor": 3.0}},
        {"rope_parameters": LONGROPE | {"short_factor": [1.0] * 8}},
        {"rope_parameters": LONGROPE | {"long_factor": [2.0] * 8}},
        {"rope_parameters": LONGROPE | {"short_factor": [1.0] * 6, "long_factor": [3.0] * 6, "partial_rotary_factor": 0.75}},
    )],
]  # fmt: skip


@pytest.fixture(scope="module")
def made(checkpoint: Directory, tmp_path_factory: pytest.TempPathFactory) -> Directory:
    """The cases, and `phi3` with longrope, whose original context is 32."""
    longrope = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}
    edited = checkpoints.edit(checkpoint("phi3"), tmp_path_factory.mktemp("longrope") / "model", **longrope)
    return lambda name: edited if name == "phi3-longrope" else checkpoint(name)


@pytest.mark.parametrize(("name", "wrong"), FIELDS, ids=label)
def test_a_wrong_value_moves_the_vector_as_it_moves_the_original(
    made: Directory, tmp_path: Path, name: str, wrong: dict[str, Any]
) -> None:
    texts = checkpoints.sentences((17, 40, 75))
    edited = checkpoints.edit(made(name), tmp_path / "edited", **wrong)
    right, moved = vectors_of(made(name), texts), vectors_of(edited, texts)
    assert checkpoints.error(moved, right).max() >= 1e-3
    assert checkpoints.error(moved, checkpoints.reference(edited, texts, fresh="longrope" in name)[0]).max() <= TOLERANCE


@pytest.mark.parametrize("wrong", [{"is_causal": True}, {"use_bidirectional_attention": False}, {"sliding_window": 3}], ids=label)
def test_eurobert_is_bidirectional_without_a_window_whatever_its_file_says(
    checkpoint: Directory, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    texts = checkpoints.sentences((17, 40))
    edited = checkpoints.edit(checkpoint("eurobert"), tmp_path / "edited", **wrong)
    assert (vectors_of(edited, texts) == vectors_of(checkpoint("eurobert"), texts)).all()
    assert checkpoints.error(vectors_of(edited, texts), checkpoints.reference(edited, texts)[0]).max() <= TOLERANCE


def test_eurobert_cannot_be_made_causal(checkpoint: Directory) -> None:
    with pytest.raises(ValueError, match="eurobert models are bidirectional"):
        encoder_of(checkpoint("eurobert"), causal=True)


SHAPES: list[tuple[str, dict[str, Any]]] = [
    *[
        (name, change)
        for name in ("eurobert", "ministral3", "phi3", "gemma1")
        for change in (
            {"vocab_size": 63},
            {"hidden_size": 44},
            {"intermediate_size": 81},
            {"num_attention_heads": 2},
            {"num_key_value_heads": 4},
            {"num_hidden_layers": 2},
            {"head_dim": 12},
        )
    ],
    ("eurobert", {"attention_bias": True}),
    ("eurobert", {"mlp_bias": True}),
    ("eurobert-biases", {"attention_bias": False}),
    ("eurobert-biases", {"mlp_bias": False}),
    ("gemma1", {"attention_bias": True}),
    ("gemma1", {"model_type": "gemma2"}),  # two norms more
    ("phi3", {"model_type": "llama", "rope_parameters": DEFAULT_ROPE}),  # not merged
    ("ministral3", {"model_type": "phi3", "rope_parameters": DEFAULT_ROPE}),
]


@pytest.mark.parametrize(("name", "wrong"), SHAPES, ids=label)
def test_a_shape_that_does_not_fit_the_tensors_is_refused(checkpoint: Directory, tmp_path: Path, name: str, wrong: dict[str, Any]) -> None:
    edited = checkpoints.edit(checkpoint(name), tmp_path / "edited", **wrong)
    with pytest.raises(ValueError, match=r"do not fit its config\.json|says that hidden states|no even number"):
        encoder_of(edited)


@pytest.mark.parametrize(
    ("name", "wrong", "sentence"),
    [
        ("ministral3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "lacks the field rope_parameters.llama_4_scaling_beta"),
        ("ministral3", {"rope_parameters": DEFAULT_ROPE | {"llama_4_scaling_beta": 0.1}}, "needs a positive original_max"),
        ("ministral3", {"rope_parameters": MINISTRAL_ROPE | {"partial_rotary_factor": 0.5}}, "rotates whole heads"),
        ("eurobert", {"partial_rotary_factor": 0.5}, "rotates whole heads"),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "'linear' is not for phi3"),
        ("phi3", {"rope_parameters": PHI3_ROPE | {"partial_rotary_factor": 0.1}}, "no even number of dimensions"),
        ("phi3", {"rope_parameters": PHI3_ROPE | {"partial_rotary_factor": 1.5}}, "no even number of dimensions"),
        ("phi3", {"rope_parameters": LONGROPE | {"short_factor": ABSENT}}, "lacks the field rope_scaling.short_factor"),
        ("phi3", {"rope_parameters": LONGROPE | {"long_factor": [1.0] * 7}}, "long_factor is .*expected 8 positive numbers"),
        ("phi3", {"rope_parameters": LONGROPE | {"short_factor": [1.0] * 7 + [0]}}, "short_factor is .*expected 8 positive numbers"),
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 1}, "original context of 2 tokens or more"),
    ],
    ids=label,
)
def test_what_is_not_supported_is_refused(checkpoint: Directory, tmp_path: Path, name: str, wrong: dict[str, Any], sentence: str) -> None:
    wrong = {name: {k: v for k, v in each.items() if v is not ABSENT} if isinstance(each, dict) else each for name, each in wrong.items()}
    with pytest.raises(ValueError, match=sentence):
        encoder_of(checkpoints.edit(checkpoint(name), tmp_path / "edited", **wrong))


# --- spellings -------------------------------------------------------------------------------------------------------------------

OLD = {"rope_parameters": ABSENT, "rope_theta": 500.0}
OLD_MINISTRAL = {name: each for name, each in MINISTRAL_ROPE.items() if name != "rope_theta"}
# transformers wants the original context inside for "su", although it then reads the one outside
OLD_LONGROPE = {name: LONGROPE[name] for name in ("short_factor", "long_factor")} | {"original_max_position_embeddings": 99}
SPELLINGS: list[tuple[str, dict[str, Any]]] = [
    *[(name, OLD | {"rope_scaling": None}) for name in ("eurobert", "gemma1")],
    ("ministral3", OLD | {"rope_scaling": OLD_MINISTRAL}),
    ("ministral3", OLD | {"rope_scaling": {"type" if name == "rope_type" else name: each for name, each in OLD_MINISTRAL.items()}}),
    ("phi3", OLD | {"rope_scaling": None, "partial_rotary_factor": 0.75}),
    ("phi3", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0, "partial_rotary_factor": 0.75}),
    *[("phi3-longrope", OLD | {"rope_scaling": OLD_LONGROPE | {"type": kind}}) for kind in ("longrope", "su", "yarn")],
    # inside the object it is not read, as the field outside is always there
    ("phi3-longrope", {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 99}}),
    ("gemma1", {"hidden_act": "gelu"}),
    ("gemma1", {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "silu"}),
    ("gemma1", {"hidden_act": ABSENT}),
    ("ministral3", {"sliding_window": ABSENT}),
]


@pytest.mark.parametrize(("name", "spelled"), SPELLINGS, ids=label)
def test_old_and_new_spellings_of_a_config_say_the_same(made: Directory, tmp_path: Path, name: str, spelled: dict[str, Any]) -> None:
    texts = checkpoints.sentences((17, 75))
    edited = checkpoints.edit(made(name), tmp_path / "edited", **spelled)
    assert (vectors_of(edited, texts) == vectors_of(made(name), texts)).all()
    assert checkpoints.error(vectors_of(edited, texts), checkpoints.reference(edited, texts, fresh=True)[0]).max() <= TOLERANCE


def test_ministral_without_a_rope_has_the_rope_of_its_configuration_class(checkpoint: Directory, tmp_path: Path) -> None:
    texts = checkpoints.sentences((17, 75))
    silent = checkpoints.edit(checkpoint("ministral3"), tmp_path / "edited", rope_parameters=ABSENT)
    assert checkpoints.error(vectors_of(silent, texts), checkpoints.reference(silent, texts)[0]).max() <= TOLERANCE
    model = encoder_of(silent).spec.model
    assert (model.query_scale, model.query_scale_period, model.ropes[0].factor, model.ropes[0].theta) == (0.1, 16384, 16.0, 1e6)


RESAVED = ("llama", "mistral-window", "qwen2-window", "qwen3-window", "gemma2", "gemma3", "embeddinggemma", *DECODERS, "phi3-longrope")


@pytest.mark.parametrize("name", RESAVED)
def test_a_config_that_transformers_saves_again_says_the_same(made: Directory, tmp_path: Path, name: str) -> None:
    """Twice: a Gemma 3 halves its bidirectional window on reading and doubles it on writing."""
    again = shutil.copytree(made(name), tmp_path / "again")
    for _ in range(2):
        transformers.AutoConfig.from_pretrained(again).save_pretrained(again)
    assert (again / "config.json").read_text() != (made(name) / "config.json").read_text() or name != "phi3-longrope"
    texts = checkpoints.sentences((17, 75))
    assert (vectors_of(again, texts) == vectors_of(made(name), texts)).all()


# --- what depends on a text's length ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["phi3-longrope", "ministral3", "ministral3-bidirectional"])
def test_long_and_short_texts_in_one_batch_are_a_fresh_original_each(made: Directory, name: str, backend: str | None) -> None:
    texts = checkpoints.sentences(LENGTHS)
    encoder = encoder_of(made(name), backend)
    right, states = checkpoints.reference(made(name), texts, fresh=True)
    assert checkpoints.error(encoder.encode(texts), right).max() <= TOLERANCE
    for ours, theirs in zip(encoder.encode(texts, output_value="token_embeddings"), states, strict=True):
        assert checkpoints.error(ours, theirs).max() <= TOLERANCE


@pytest.mark.parametrize("name", ["phi3-longrope", "ministral3"])
def test_a_text_has_the_same_bits_alone_and_beside_longer_ones(made: Directory, name: str, backend: str | None) -> None:
    texts = checkpoints.sentences((130, 3, 31, 32, 33, 75, 17))
    encoder = encoder_of(made(name), backend)
    together = encoder.encode(texts)
    for text, vector in zip(texts, together, strict=True):
        assert (encoder.encode(text) == vector).all()
        assert (encoder_of(made(name), backend).encode(text) == vector).all()


@pytest.mark.parametrize("length", [1, 32, 33, 64, 200])
@pytest.mark.parametrize("given", [{}, {"factor": 3.0}, {"factor": 0.5}, {"attention_factor": 1.4}], ids=label)
def test_table_of_a_longrope(given: dict[str, float], length: int) -> None:
    """The frequencies and the factor of a fresh Llama, whose original context is 32 of 64."""
    config = config_of(LONGROPE | {"original_max_position_embeddings": 32} | given)
    for ours, theirs in zip(table(rope_of(config), length, length), original_table(config, length), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_longrope_looks_at_the_whole_text_with_its_specials(made: Directory) -> None:
    """31 words and </s> are 32 tokens, which is within the original context; one more is not."""
    directory = made("phi3-longrope")
    encoder = encoder_of(directory)
    rotary = encoder.spec.model.ropes[0]
    assert (rotary.kind, rotary.original_max_position, rotary.dim) == ("longrope", 32, 16)
    short, long = checkpoints.sentences((31, 32))
    for changed, moves in (({"short_factor": [5.0] * 8}, (True, False)), ({"long_factor": [5.0] * 8}, (False, True))):
        model = encoder.spec.model
        other = replace(model, ropes=(replace(rotary, **{f"{name}s": tuple(each) for name, each in changed.items()}),))
        found = [states_of(directory, other, encoder_family(directory), [text], None)[0] for text in (short, long)]
        same = [states_of(directory, model, encoder_family(directory), [text], None)[0] for text in (short, long)]
        assert tuple(not torch.equal(a, b) for a, b in zip(found, same, strict=True)) == moves


@pytest.mark.parametrize("name", ["eurobert", "ministral3", "phi3-longrope", "gemma1"])
def test_bfloat16_loses_no_more_than_twice_what_transformers_loses(made: Directory, name: str, backend: str | None) -> None:
    texts = [text for seed in range(4) for text in checkpoints.sentences(LENGTHS, seed)]
    right, _ = checkpoints.reference(made(name), texts)
    theirs, _ = checkpoints.reference(made(name), texts, torch.bfloat16)
    ours = Encoder(made(name), device="cpu", dtype="bfloat16", backend=backend).encode(texts)
    lost, allowed = (checkpoints.error(each, right).square().mean().sqrt() for each in (ours, theirs))
    assert 1e-4 < allowed < 0.3, "the comparison says nothing"
    assert lost <= 2 * allowed


# --- class names -----------------------------------------------------------------------------------------------------------------

AUTO = "auto_map"
RELABELLED: list[tuple[str, dict[str, Any], bool]] = [
    # a checkpoint, what its config.json says instead, whether it is bidirectional then
    ("llama", {"model_type": "llama_bidirec"}, True),
    ("llama", {"model_type": "llama_bidirec", "architectures": ["LlamaBidirectionalModel"]}, True),
    ("llama", {"architectures": ["LlamaBidirectionalModel"]}, True),
    ("llama", {"architectures": ["LlamaBidirectionalModel"], "is_causal": True}, True),  # the class does not look
    ("llama", {AUTO: {"AutoModel": "llama_bidirectional_model.LlamaBidirectionalModel"}}, True),
    ("llama", {AUTO: {"AutoModel": "nvidia/some-model--llama_bidirectional_model.LlamaBidirectionalModel"}}, True),
    ("llama", {AUTO: {"AutoModel": "modeling_llama_encoder.LlamaEncoderModel"}}, True),
    ("llama", {"architectures": ["LlamaBiModel"]}, True),
    ("mistral", {"architectures": ["MistralBiModel"]}, True),
    ("mistral", {AUTO: {"AutoModel": "modeling_mistral_encoder.MistralEncoderModel"}}, True),
    ("qwen2", {"architectures": ["Qwen2BiModel"]}, True),
    ("gemma1", {"architectures": ["GemmaBiModel"]}, True),
    ("qwen2", {AUTO: {"AutoModel": "modeling_qwen.Qwen2Model"}}, True),
    ("qwen2", {AUTO: {"AutoModel": "modeling_qwen.Qwen2Model"}, "is_causal": True}, False),
    ("qwen2", {AUTO: {"AutoModel": "modeling_qwen.Qwen2Model"}, "is_causal": False}, True),
    ("qwen3", {"model_type": "bidirectional_pplx_qwen3"}, True),
    (
        "qwen3",
        {
            "model_type": "bidirectional_pplx_qwen3",
            "architectures": ["PPLXQwen3Model"],
            "use_bidirectional_attention": True,
            AUTO: {"AutoConfig": "configuration.PPLXQwen3Config", "AutoModel": "modeling.PPLXQwen3Model"},
        },
        True,
    ),
    ("qwen3", {"model_type": "jina_embeddings_v5", AUTO: {"AutoModel": "modeling_jina_embeddings_v5.JinaEmbeddingsV5Model"}}, False),
    ("qwen3", {"architectures": ["JinaEmbeddingsV5Model"]}, False),
    ("eurobert", {"model_type": "jina_embeddings_v5", AUTO: {"AutoModel": "modeling_jina_embeddings_v5.JinaEmbeddingsV5Model"}}, True),
    ("llama", {"architectures": ["LlamaForCausalLM"]}, False),
    ("qwen3", {"architectures": ["Qwen3ForCausalLM"]}, False),
]


@pytest.mark.parametrize(("name", "labels", "both_ways"), RELABELLED, ids=label)
def test_a_class_name_decides_the_mask(checkpoint: Directory, tmp_path: Path, name: str, labels: dict[str, Any], both_ways: bool) -> None:
    texts = checkpoints.sentences((2, 17, 40))
    relabelled = checkpoints.edit(checkpoint(name), tmp_path / "relabelled", **labels)
    plain = checkpoints.edit(checkpoint(name), tmp_path / "plain", is_causal=not both_ways)

    def states(**arguments: Any) -> torch.Tensor:
        """Of all tokens, since a model_type may imply a recipe with a pooling, an output and prompts of its own."""
        return torch.cat(encoder_of(relabelled, **arguments).encode(texts, output_value="token_embeddings", prompt=""))

    ours = states()
    assert checkpoints.error(ours, torch.cat(checkpoints.reference(plain, texts)[1])).max() <= TOLERANCE
    if name != "eurobert":  # which has no causal form
        other = checkpoints.edit(checkpoint(name), tmp_path / "other", is_causal=both_ways)
        right = torch.cat(checkpoints.reference(other, texts)[1])
        assert checkpoints.error(ours, right).max() >= 1e-3
        assert checkpoints.error(states(causal=both_ways), right).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "labels", "sentence"),
    [
        ("llama", {AUTO: {"AutoModel": "modeling_other.LlamaOtherModel"}}, "never runs"),
        ("llama", {AUTO: {"AutoModel": "modeling_qwen.Qwen2Model"}}, "model_type is 'llama'; a model of that class is 'qwen2'"),
        ("llama", {"architectures": ["PPLXQwen3Model"], AUTO: {"AutoModel": "a.LlamaBidirectionalModel"}}, "names of different models"),
        ("llama", {"model_type": "bidirectional_pplx_qwen3"}, "do not fit"),  # norms of queries and keys
        ("llama", {"model_type": "jina_embeddings_v5", "mlp_bias": ABSENT, "pretraining_tp": ABSENT}, "does not say which"),
        ("qwen3", {"model_type": "jina_embeddings_v5", "mlp_bias": False}, "does not say which"),
        ("gemma3", {"model_type": "gemma3"}, "has no text_config"),
    ],
    ids=label,
)
def test_names_that_say_nothing_or_too_much_are_refused(
    checkpoint: Directory, tmp_path: Path, name: str, labels: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        encoder_of(checkpoints.edit(checkpoint(name), tmp_path / "edited", **labels))


def bare(directory: Path, to: Path, **labels: Any) -> Path:
    """A copy without the files of sentence-transformers."""
    copy = checkpoints.edit(directory, to, **labels)
    for path in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (copy / path).unlink(missing_ok=True)
    return copy


@pytest.mark.parametrize(
    ("field", "spelled", "mode"),
    [
        ("pooling", "avg", "mean"),
        ("pooling", "mean", "mean"),
        ("pooling", "cls", "cls"),
        ("pooling", "last", "lasttoken"),
        ("emb_pooler", "mean", "mean"),
        ("emb_pooler", "cls", "cls"),
    ],
)
def test_config_json_names_the_pooling_where_no_modules_json_does(
    checkpoint: Directory, tmp_path: Path, field: str, spelled: str, mode: str
) -> None:
    texts = checkpoints.sentences((2, 17))
    encoder = encoder_of(bare(checkpoint("ministral3"), tmp_path / "bare", **{field: spelled}))
    assert (encoder.spec.pooling.modes, encoder.spec.sources["pooling"]) == ((mode,), "config.json")
    right = checkpoints.edit(checkpoint("ministral3"), tmp_path / "right", "1_Pooling/config.json", pooling_mode=mode)
    assert checkpoints.error(encoder.encode(texts), checkpoints.reference(right, texts)[0]).max() <= TOLERANCE
    other = bare(checkpoint("ministral3"), tmp_path / "other", **{field: spelled})
    assert encoder_of(other, pooling="max").spec.pooling.modes == ("max",)  # the argument wins


def test_modules_json_wins_over_the_pooling_of_config_json(checkpoint: Directory, tmp_path: Path) -> None:
    encoder = encoder_of(checkpoints.edit(checkpoint("ministral3"), tmp_path / "edited", pooling="cls"))
    assert (encoder.spec.pooling.modes, encoder.spec.sources["pooling"]) == (("mean",), "modules.json")


def test_an_unknown_pooling_in_config_json_is_refused(checkpoint: Directory, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pooling is 'weighted_avg'; expected one of avg, mean, cls"):
        encoder_of(bare(checkpoint("llama"), tmp_path / "bare", pooling="weighted_avg"))


def test_a_bare_eurobert_is_mean_pooled(checkpoint: Directory, tmp_path: Path) -> None:
    assert encoder_of(bare(checkpoint("eurobert"), tmp_path / "bare")).spec.pooling.modes == ("mean",)


# --- a text model inside a larger one --------------------------------------------------------------------------------------------


def wrapped(directory: Path, to: Path, outer: str, prefix: str, *beside: str, **root: Any) -> Path:
    """A text checkpoint as the text part of a larger one, whose other tensors are in `beside`."""
    shutil.copytree(directory, to)
    config = json.loads((to / "config.json").read_text())
    config = {"model_type": outer, "architectures": ["Any"], "text_config": config, "vision_config": {"hidden_size": 3}} | root
    (to / "config.json").write_text(json.dumps(config))
    checkpoints.rename(to, prefix, **{name: torch.full((3,), 9.0) for name in beside})
    return to


VISION = ("vision_tower.vision_model.post_layernorm.weight", "multi_modal_projector.mm_soft_emb_norm.weight")


@pytest.mark.parametrize(
    ("prefix", "beside"),
    [
        ("language_model.", VISION),
        ("model.language_model.", (*(f"model.{name}" for name in VISION), "lm_head.weight")),
        ("language_model.model.", (*VISION, "language_model.lm_head.weight")),
    ],
)
@pytest.mark.parametrize("name", ["gemma3", "embeddinggemma"])
def test_gemma3_with_a_vision_tower(checkpoint: Directory, tmp_path: Path, name: str, prefix: str, beside: tuple[str, ...]) -> None:
    texts = checkpoints.sentences((2, 17, 40))
    outer = wrapped(checkpoint(name), tmp_path / "outer", "gemma3", prefix, *beside)
    assert (vectors_of(outer, texts) == vectors_of(checkpoint(name), texts)).all()


def test_an_unknown_tensor_beside_the_text_model_is_refused(checkpoint: Directory, tmp_path: Path) -> None:
    outer = wrapped(checkpoint("gemma3"), tmp_path / "outer", "gemma3", "language_model.", "vision_head.weight")
    with pytest.raises(ValueError, match=r"not expected: vision_head\.weight"):
        encoder_of(outer)


def test_the_pooling_and_the_classes_of_the_outer_file_count(checkpoint: Directory, tmp_path: Path) -> None:
    outer = wrapped(bare(checkpoint("gemma3"), tmp_path / "bare"), tmp_path / "outer", "gemma3", "language_model.", pooling="avg")
    assert encoder_of(outer).spec.pooling.modes == ("mean",)
    remote = wrapped(checkpoint("gemma3"), tmp_path / "remote", "gemma3", "", auto_map={"AutoModel": "modeling_x.OtherModel"})
    with pytest.raises(ValueError, match="never runs"):
        encoder_of(remote)


def tiny_vision() -> transformers.PreTrainedConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.SiglipVisionConfig(**sizes, image_size=28, patch_size=14)


def test_gemma3_as_transformers_saves_it(checkpoint: Directory, tmp_path: Path, backend: str | None) -> None:
    text = transformers.Gemma3TextConfig(**CASES["gemma3"].fields)
    config = transformers.Gemma3Config(text_config=text, vision_config=tiny_vision(), image_token_index=10_000, mm_tokens_per_image=4)
    model = transformers.Gemma3Model(config).eval()
    checkpoints.redraw(model, plus_one=True)
    directory = shutil.copytree(checkpoint("gemma3"), tmp_path / "model")
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory)
    texts = checkpoints.sentences((2, 17, 40))
    encoder = encoder_of(directory, backend)
    for words, ours in zip(texts, encoder.encode(texts, output_value="token_embeddings"), strict=True):
        ids = torch.tensor([encoder.tokenizer.encode([words], None).ids[0].tolist()])
        with torch.no_grad():
            theirs = model(input_ids=ids).last_hidden_state[0]
        assert checkpoints.error(ours, theirs).max() <= TOLERANCE


# --- a projection of every token ---------------------------------------------------------------------------------------------------



def encoder_family(directory: Path) -> Family:
    return read_checkpoint(directory)[1]


def states_of(directory: Path, config: ModelConfig, family: Family, texts: list[str], backend: str | None) -> list[torch.Tensor]:
    """Each text's states after the final norm, before any projection, from one batch."""
    ignored = (*family.tensors.ignored, rf"{family.tensors.projection}\.weight")
    device = torch.device("cpu")
    kernels = ops.select(device, backend)
    weights = load(directory, replace(config, projection_dim=None), replace(family.tensors, ignored=ignored), (), device, torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    batch = pack([np.array(tokenizer(text)["input_ids"], dtype=np.int32) for text in texts], None, kernels, device)
    assert weights.final_norm is not None
    with torch.inference_mode():
        states = norm(forward(weights, batch, kernels), weights.final_norm, kernels)
    return [each.clone() for each in states[: sum(batch.lengths)].split(batch.lengths)]


@pytest.fixture(scope="module")
def projected(tmp_path_factory: pytest.TempPathFactory) -> Directory:
    """The cases of checkpoints.PROJECTED, made once."""
    kept: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in kept:
            kept[name] = checkpoints.save(checkpoints.PROJECTED[name], tmp_path_factory.mktemp(name))
        return kept[name]

    return directory


def compare_states(directory: Path, texts: list[str], backend: str | None, *, within: Path | None = None) -> float:
    """The largest error of our token states, multiplied by the projection here."""
    spec, family = read_checkpoint(directory)
    _, right = checkpoints.reference(within or directory, texts)
    tensors = load_file(directory / "model.safetensors")
    projection = next(tensor for name, tensor in tensors.items() if name.endswith("embedding_projection.weight") and "vision" not in name)
    ours = states_of(directory, spec.model, family, texts, backend)
    return max(float(checkpoints.error(a @ projection.T, b).max()) for a, b in zip(ours, right, strict=True))


@pytest.mark.parametrize("name", checkpoints.PROJECTED)
def test_states_before_a_projection_are_the_originals(projected: Directory, name: str, backend: str | None) -> None:
    assert compare_states(projected(name), checkpoints.sentences((0, *LENGTHS)), backend) <= TOLERANCE


@pytest.mark.parametrize("name", checkpoints.PROJECTED)
def test_projected_vectors_are_the_originals(projected: Directory, name: str, backend: str | None) -> None:
    texts = checkpoints.sentences((0, *LENGTHS))
    right, _ = checkpoints.reference(projected(name), texts)
    assert checkpoints.error(encoder_of(projected(name), backend).encode(texts), right).max() <= TOLERANCE


TWO_BASES, WIDE = checkpoints.TWO_BASES, {"head_dim": 24, "num_key_value_heads": 1}
PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 3000.0}
GEMMA2_FIELDS: list[tuple[str, dict[str, Any]]] = [
    *[("embedding_gemma2", change) for change in (
        {"rms_norm_eps": 5e-5},
        {"hidden_activation": "silu"},
        {"sliding_window": 4},  # off by one
        {"sliding_window": 6},
        {"sliding_window": 2},  # halved
        {"sliding_window": ABSENT},  # 512
        {"rope_parameters": TWO_BASES | {"full_attention": {"rope_type": "default", "rope_theta": 4000.0}}},
        {"rope_parameters": TWO_BASES | {"sliding_attention": {"rope_type": "default", "rope_theta": 60.0}}},
        {"rope_parameters": TWO_BASES | {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3000.0}}},
        {"rope_parameters": TWO_BASES | {"full_attention": PROPORTIONAL}},
        {"rope_parameters": TWO_BASES | {"full_attention": PROPORTIONAL | {"factor": 8.0}}},
        {"rope_parameters": ABSENT},  # 1e6 and 1e4
    )],
    *[("embedding_gemma2-even", change) for change in (
        {"layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"]},
        {"layer_types": ["sliding_attention"] * 4},  # the last is full nevertheless
        {"layer_types": ABSENT, "sliding_window_pattern": 3},
        {"layer_types": ABSENT},  # 6: only the last is full
    )],
]  # fmt: skip


@pytest.mark.parametrize(("name", "wrong"), GEMMA2_FIELDS, ids=label)
def test_a_wrong_value_moves_embedding_gemma2_as_it_moves_the_original(
    projected: Directory, tmp_path: Path, name: str, wrong: dict[str, Any]
) -> None:
    texts = checkpoints.sentences((17, 40))
    edited = checkpoints.edit(projected(name), tmp_path / "edited", **wrong)
    if "layer_types" in wrong:  # without per_layer_config the full layers would be the published model's
        checkpoints.edit(edited, tmp_path / "even", per_layer_config={})
        edited = tmp_path / "even"
    assert compare_states(edited, texts, None) <= TOLERANCE
    assert compare_states(edited, texts, None, within=projected(name)) >= 1e-3


@pytest.mark.parametrize(
    "spelled",
    [
        {"per_layer_config": {"01": WIDE, "03": WIDE}},  # zero-padded, as published
        {"per_layer_config": ABSENT, "global_head_dim": 24, "num_global_key_value_heads": 1},
        {"is_causal": True},
        {"use_bidirectional_attention": False},
        {"hidden_activation": ABSENT},
    ],
    ids=label,
)
def test_spellings_of_embedding_gemma2(projected: Directory, tmp_path: Path, spelled: dict[str, Any]) -> None:
    edited = checkpoints.edit(projected("embedding_gemma2"), tmp_path / "edited", **spelled)
    assert read_checkpoint(edited)[0].model == read_checkpoint(projected("embedding_gemma2"))[0].model
    assert compare_states(edited, checkpoints.sentences((17, 40)), None) <= TOLERANCE


def test_embedding_gemma2_saved_again_says_the_same(projected: Directory, tmp_path: Path) -> None:
    again = shutil.copytree(projected("embedding_gemma2"), tmp_path / "again")
    for _ in range(2):
        transformers.AutoConfig.from_pretrained(again).save_pretrained(again)
    assert read_checkpoint(again)[0].model == read_checkpoint(projected("embedding_gemma2"))[0].model


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"per_layer_config": {"1": WIDE}}, "do not fit its config"),
        ({"per_layer_config": {"1": WIDE, "3": WIDE | {"num_key_value_heads": 2}}}, "do not fit its config"),
        ({"per_layer_config": {"4": WIDE}}, "per_layer_config.4 is not one of the 4 layers"),
        ({"per_layer_config": {"1": {"sliding_window": 3}}}, "per_layer_config.1.sliding_window is not supported"),
        ({"per_layer_config": {"1": {"num_key_value_heads": 3}}}, "layer 1 has 3 key/value heads"),
        ({"per_layer_config": {"1": {"head_dim": 15}}}, "layer 1 has 2 key/value heads of 15"),
        ({"hidden_size_per_layer_input": 24}, "do not fit its config"),
        ({"hidden_size": 44}, "do not fit its config|says that hidden states"),
        ({"attention_bias": True}, "biases"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5.0}}}, "lacks the field rope_parameters.sliding"),
        ({"model_type": "gemma3_text", "per_layer_config": ABSENT}, "do not fit its config"),
    ],
    ids=label,
)
def test_an_embedding_gemma2_that_does_not_fit_is_refused(
    projected: Directory, tmp_path: Path, wrong: dict[str, Any], sentence: str
) -> None:
    edited = checkpoints.edit(projected("embedding_gemma2"), tmp_path / "edited", **wrong)
    with pytest.raises(ValueError, match=sentence):
        compare_states(edited, ["w9"], None, within=projected("embedding_gemma2"))


def test_every_parameter_of_embedding_gemma2_matters(projected: Directory, tmp_path: Path) -> None:
    """First and last layer; a tensor that is read but not used, or used in part, would show."""
    directory = shutil.copytree(projected("embedding_gemma2"), tmp_path / "changed")
    spec, family = read_checkpoint(directory)
    text = checkpoints.sentences((17,))
    right = states_of(directory, spec.model, family, text, None)[0]
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for key, tensor in tensors.items():
        if ".1." in key or ".2." in key or key == "embedding_projection.weight":
            continue
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        save_file(tensors | {key: tensor + 0.1 * noise}, path)
        assert checkpoints.error(states_of(directory, spec.model, family, text, None)[0], right).max() >= 1e-4, key


@pytest.mark.parametrize("towers", [False, True], ids=["text", "towers"])
def test_embedding_gemma2_as_transformers_saves_it(projected: Directory, tmp_path: Path, towers: bool, backend: str | None) -> None:
    """The whole model's tensor names, with and without a vision tower and its projection."""
    fields = checkpoints.EMBEDDING_GEMMA2.fields
    text = transformers.EmbeddingGemma2TextConfig(**fields)
    beyond = {name: 10_000 + n for n, name in enumerate(("image_token_id", "video_token_id", "audio_token_id"))}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    vision = {"model_type": "gemma4_vision", **sizes, "num_key_value_heads": 2} if towers else None
    model = transformers.EmbeddingGemma2Model(transformers.EmbeddingGemma2Config(text_config=text, vision_config=vision, **beyond)).eval()
    checkpoints.redraw(model, plus_one=False)
    directory = shutil.copytree(projected("embedding_gemma2"), tmp_path / "model")
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory)
    names = load_file(directory / "model.safetensors").keys()
    assert any("vision_tower" in name for name in names) == towers
    spec, family = read_checkpoint(directory)
    assert family.name == "embedding_gemma2"
    ids = torch.tensor([transformers.PreTrainedTokenizerFast.from_pretrained(directory)(checkpoints.sentence(40))["input_ids"]])
    with torch.no_grad():
        right = model(input_ids=ids).last_hidden_state[0]
        ours = states_of(directory, spec.model, family, [checkpoints.sentence(40)], backend)[0]
        assert checkpoints.error(ours @ model.language_model.embedding_projection.weight.T, right).max() <= TOLERANCE


def test_embedding_gemma2_is_never_float16_and_never_causal(projected: Directory) -> None:
    with pytest.raises(ValueError, match="float16"):
        Encoder(projected("embedding_gemma2"), device="cpu", dtype="float16")
    with pytest.raises(ValueError, match="are bidirectional"):
        encoder_of(projected("embedding_gemma2"), causal=True)


@pytest.mark.parametrize(
    "labels",
    [
        {AUTO: {"AutoModel": "modeling_qwen3_bidirectional.Qwen3BidirectionalModel"}, "architectures": ["Qwen3ForCausalLM"]},
        {"architectures": ["VoyageQwen3BidirectionalEmbedModel"]},
    ],
    ids=label,
)
def test_voyage_is_a_bidirectional_qwen3_with_a_projection(
    checkpoint: Directory, tmp_path: Path, labels: dict[str, Any], backend: str | None
) -> None:
    texts = checkpoints.sentences((2, 17, 40))
    directory = checkpoints.edit(checkpoint("qwen3-bidirectional"), tmp_path / "voyage", is_causal=ABSENT, num_labels=56, **labels)
    projection = torch.randn(56, 48, generator=torch.Generator().manual_seed(1))
    checkpoints.rename(directory, "model.", **{"linear.weight": projection})
    spec, family = read_checkpoint(directory)
    assert (spec.model.projection_dim, spec.model.causal) == (56, False)
    _, states = checkpoints.reference(checkpoint("qwen3-bidirectional"), texts)
    for ours, theirs in zip(states_of(directory, spec.model, family, texts, backend), states, strict=True):
        assert checkpoints.error(ours, theirs).max() <= TOLERANCE
    by_labels = checkpoints.edit(directory, tmp_path / "labels", num_labels=ABSENT, id2label={str(n): f"LABEL_{n}" for n in range(56)})
    assert read_checkpoint(by_labels)[0].model.projection_dim == 56
    silent = checkpoints.edit(directory, tmp_path / "silent", num_labels=ABSENT, id2label=ABSENT)
    with pytest.raises(ValueError, match="lacks the field num_labels"):
        read_checkpoint(silent)


def test_voyage_projects_what_is_pooled(checkpoint: Directory, tmp_path: Path, backend: str | None) -> None:
    texts = checkpoints.sentences((2, 17, 40))
    labels = {AUTO: {"AutoModel": "modeling_qwen3_bidirectional.Qwen3BidirectionalModel"}, "num_labels": 56}
    directory = checkpoints.edit(checkpoint("qwen3-bidirectional"), tmp_path / "voyage", is_causal=ABSENT, **labels)
    projection = torch.randn(56, 48, generator=torch.Generator().manual_seed(1))
    checkpoints.rename(directory, "model.", **{"linear.weight": projection})
    _, states = checkpoints.reference(checkpoint("qwen3-bidirectional"), texts)
    right = torch.nn.functional.normalize(torch.stack([each[-1] for each in states]) @ projection.T)
    assert checkpoints.error(encoder_of(directory, backend).encode(texts), right).max() <= TOLERANCE


def test_a_qwen3_with_a_linear_that_no_class_explains_is_refused(checkpoint: Directory, tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoint("qwen3"), tmp_path / "linear")
    checkpoints.rename(directory, "", **{"linear.weight": torch.ones(56, 48)})
    with pytest.raises(ValueError, match=r"not expected: linear\.weight"):
        encoder_of(directory)


# --- what `pyembed info` says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("ministral3", [r"attention .*queries grow by 0\.4 ln\(1 \+ position // 32\)", r"positions .*RoPE yarn x4, theta 500, 16 of 16"]),
        ("eurobert", [r"model +eurobert, 3 layers", r"mask +bidirectional"]),
        ("phi3", [r"positions +RoPE, theta 500, 12 of 16 dimensions"]),
        ("phi3-longrope", [r"positions +RoPE longrope x8, theta 500, 16 of 16 dimensions"]),
        ("gemma1", [r"model +gemma1, .*MLP gated gelu_tanh 80, pre-norm RMSNorm \(1 \+ w\)"]),
        (
            "embedding_gemma2",
            [
                r"sandwich-norm RMSNorm \(float32\)",
                r"4 heads of 16, 2 for keys and values in 2 layers; 4 heads of 24, 1 for keys and values in 2 layers",
                r"scores not scaled, QK norm, V norm",
                r"mask +bidirectional, 2 of 4 layers see 5 keys before and 5 after",
                r"theta 50, 16 of 16 dimensions in 2 layers; RoPE, theta 3,000, 24 of 24 dimensions in 2 layers",
                r"embeddings +mixed into every layer once more, 20 wide",
                r"projection +48 to 56, every token",
            ],
        ),
    ],
)
def test_info(made: Directory, projected: Directory, capsys: pytest.CaptureFixture[str], name: str, lines: list[str]) -> None:
    directory = projected(name) if name in checkpoints.PROJECTED else made(name)
    assert main(["info", str(directory)]) == 0
    printed = capsys.readouterr().out
    for line in lines:
        assert re.search(line, printed), (line, printed)
