"""GPT-Neo, GPT-J, GPT-NeoX, OPT and BLOOM: what test_families.py asks of every family, and what only these have."""

from __future__ import annotations

import argparse
import math
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
from checkpoints import ABSENT, CASES
from test_families import LENGTHS, SHAPES, TOLERANCE, label
from torch import Tensor

from pyembed import Encoder, info, ops, weights
from pyembed.alibi import Alibi, slopes
from pyembed.batch import pack
from pyembed.checkpoint import read_checkpoint
from pyembed.heads import pool
from pyembed.linear import linear, packable
from pyembed.model import forward
from pyembed.ops import reference
from pyembed.options import tokenizer_of

Directory = Callable[[str], Path]
CPU = torch.device("cpu")
NAMES = ("gpt-neo", "gptj", "gpt-neox", "opt", "bloom")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The models are so small that threads would only wait for each other."""
    torch.set_num_threads(1)


def vectors(directory: Path, texts: list[str], **arguments: Any) -> Tensor:
    return torch.from_numpy(Encoder(directory, device="cpu", **{"dtype": "float32"} | arguments).encode(texts))


@pytest.mark.parametrize("name", [*NAMES, "opt-post", "gpt-neox-sequential", "bloom-bidirectional"])
def test_bfloat16_loses_no_more_than_twice_what_transformers_loses(checkpoint: Directory, name: str, backend: str | None) -> None:
    texts = [text for seed in range(4) for text in checkpoints.sentences(LENGTHS, seed)]
    right, _ = checkpoints.reference(checkpoint(name), texts)
    theirs, _ = checkpoints.reference(checkpoint(name), texts, torch.bfloat16)
    ours = vectors(checkpoint(name), texts, dtype="bfloat16", backend=backend)
    lost, allowed = (checkpoints.error(each, right).square().mean().sqrt() for each in (ours, theirs))
    assert 1e-4 < allowed < 0.2, "the comparison says nothing"
    assert lost <= 2 * allowed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["weightedmean", "mean", "lasttoken", "cls", "max"])
def test_every_pooling(checkpoint: Directory, tmp_path: Path, name: str, mode: str, backend: str | None) -> None:
    directory = checkpoints.edit(checkpoint(name), tmp_path / "pooled", "1_Pooling/config.json", pooling_mode=mode)
    texts = checkpoints.sentences(LENGTHS)
    assert checkpoints.error(vectors(directory, texts, backend=backend), checkpoints.reference(directory, texts)[0]).max() <= TOLERANCE


# One wrong value for every field that decides a vector.
def rope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5} | changes}


FIELDS: list[tuple[str, dict[str, Any]]] = [
    *[
        ("gpt-neo", change)
        for change in (
            {"layer_norm_epsilon": 5e-5},
            {"layer_norm_epsilon": ABSENT},
            {"num_heads": 3},
            {"activation_function": "relu"},
            {"window_size": 4},
            {"window_size": 6},
            {"window_size": ABSENT},  # 256
            {"attention_layers": ["global", "global", "local"]},
            {"attention_layers": ABSENT, "attention_types": [[["local", "global"], 1], [["local"], 1]]},
            {"attention_layers": ABSENT, "attention_types": [[["global"], 3]]},
        )
    ],
    *[
        ("gptj", change)
        for change in (
            {"layer_norm_epsilon": 5e-5},
            {"layer_norm_epsilon": ABSENT},
            {"n_head": 4},
            {"rotary_dim": 8},
            {"rotary_dim": 16},
            {"activation_function": "relu"},
            {"is_causal": False},
        )
    ],
    ("gptj-bidirectional", {"is_causal": ABSENT}),
    *[
        (name, change)
        for name in ("gpt-neox", "gpt-neox-sequential")
        for change in (
            {"layer_norm_eps": 5e-5},
            {"layer_norm_eps": ABSENT},
            {"num_attention_heads": 4},
            {"hidden_act": "relu"},
            rope(rope_theta=600.0),
            rope(partial_rotary_factor=0.4),
            rope(partial_rotary_factor=1.0),
            rope(rope_type="linear", factor=4.0),
            rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
            {"rope_parameters": ABSENT},  # 10000 and 0.25
            {"rope_parameters": ABSENT, "rotary_emb_base": 500.0},
            {"rope_parameters": ABSENT, "rotary_pct": 0.5},
        )
    ],
    ("gpt-neox", {"is_causal": False}),
    ("gpt-neox", {"use_parallel_residual": False}),
    ("gpt-neox-sequential", {"use_parallel_residual": ABSENT}),
    ("gpt-neox-sequential", {"is_causal": ABSENT}),
    *[("opt", change) for change in ({"num_attention_heads": 6}, {"activation_function": "gelu"}, {"is_causal": False})],
    *[("opt-post", change) for change in ({"num_attention_heads": 6}, {"activation_function": ABSENT}, {"is_causal": False})],
    ("opt-no-final-norm", {"do_layer_norm_before": False}),
    *[
        (name, change)
        for name in ("bloom", "bloom-bidirectional")
        for change in ({"layer_norm_epsilon": 5e-5}, {"layer_norm_epsilon": ABSENT}, {"n_head": 3})
    ],
    ("bloom", {"is_causal": False}),
    ("bloom-bidirectional", {"is_causal": ABSENT}),
]
GELUS: list[tuple[str, dict[str, Any]]] = [
    ("gpt-neo", {"activation_function": "gelu"}),
    ("gptj", {"activation_function": "gelu"}),
    ("gpt-neox", {"hidden_act": "gelu_new"}),
    ("gpt-neox-sequential", {"hidden_act": "gelu"}),
]


@pytest.mark.parametrize(("name", "wrong"), [*FIELDS, *GELUS], ids=label)
def test_a_wrong_value_moves_the_vector_as_it_moves_the_original(
    checkpoint: Directory, tmp_path: Path, name: str, wrong: dict[str, Any]
) -> None:
    least = 3e-5 if (name, wrong) in GELUS else 1e-3  # the two GELUs are nowhere further apart than 5e-4
    texts = checkpoints.sentences((17, 40))
    edited = checkpoints.edit(checkpoint(name), tmp_path / "edited", **wrong)
    right, moved = vectors(checkpoint(name), texts), vectors(edited, texts)
    assert checkpoints.error(moved, right).min() >= least
    assert checkpoints.error(moved, checkpoints.reference(edited, texts)[0]).max() <= TOLERANCE


SPELLINGS: list[tuple[str, dict[str, Any]]] = [
    ("gpt-neo", {"num_heads": ABSENT, "num_attention_heads": 4, "num_layers": ABSENT, "num_hidden_layers": 3}),
    ("gpt-neo", {"attention_layers": ABSENT}),
    ("gpt-neo", {"activation_function": ABSENT}),
    ("gpt-neo", {"activation_function": "gelu_fast"}),
    ("gptj", {"n_embd": ABSENT, "hidden_size": 48, "n_head": ABSENT, "num_attention_heads": 3}),
    ("gptj", {"n_layer": ABSENT, "num_hidden_layers": 3, "n_positions": ABSENT, "max_position_embeddings": 128}),
    ("gptj", {"activation_function": ABSENT}),
    ("gptj-bidirectional", {"n_inner": ABSENT}),
    ("gptj-bidirectional", {"n_inner": 192}),
    ("gpt-neox", {"rope_parameters": ABSENT, "rotary_pct": 0.5, "rotary_emb_base": 500}),
    ("gpt-neox", {"rope_parameters": ABSENT, "rotary_pct": 0.5, "rotary_emb_base": 500, "rope_theta": 77.0}),  # rope_theta is not read
    ("gpt-neox", {"rope_parameters": ABSENT, "rotary_pct": 0.5, "rotary_emb_base": 500, "rope_scaling": {"type": "default"}}),
    ("gpt-neox", {"rotary_pct": 0.25, "rotary_emb_base": 77, "partial_rotary_factor": 0.25}),  # rope_parameters wins
    ("gpt-neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rotary_pct": 0.5}),
    ("gpt-neox", {"use_parallel_residual": ABSENT, "attention_bias": ABSENT, "hidden_act": ABSENT}),
    ("gpt-neox-sequential", {"hidden_act": "gelu_new"}),
    ("opt", {"word_embed_proj_dim": ABSENT, "enable_bias": ABSENT, "activation_function": ABSENT, "layer_norm_elementwise_affine": ABSENT}),
    ("opt", {"do_layer_norm_before": ABSENT, "_remove_final_layer_norm": ABSENT}),
    ("bloom", {"hidden_size": ABSENT, "n_embed": 48}),
    ("bloom", {"n_layer": ABSENT, "num_hidden_layers": 3, "n_head": ABSENT, "num_attention_heads": 6}),
    ("bloom", {"apply_residual_connection_post_layernorm": ABSENT, "pretraining_tp": 4, "offset_alibi": 100}),
]


@pytest.mark.parametrize(("name", "spelled"), SPELLINGS, ids=label)
def test_old_and_new_spellings_of_a_config_say_the_same(checkpoint: Directory, tmp_path: Path, name: str, spelled: dict[str, Any]) -> None:
    texts = checkpoints.sentences((17, 40))
    edited = checkpoints.edit(checkpoint(name), tmp_path / "edited", **spelled)
    same = vectors(edited, texts)
    assert torch.equal(vectors(checkpoint(name), texts), same)
    assert checkpoints.error(same, checkpoints.reference(edited, texts)[0]).max() <= TOLERANCE


MISFITS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"vocab_size": 63}) for name in NAMES],
    *[(name, {"hidden_size": 60, "n_embd": ABSENT}) for name in NAMES],
    ("gpt-neo", {"intermediate_size": ABSENT}),
    ("gpt-neo", {"max_position_embeddings": 127}),
    ("gpt-neo", {"num_layers": 2, "attention_layers": ["global", "local"]}),
    ("gpt-neo", {"model_type": "gptj", "n_layer": 3, "n_head": 4, "rotary_dim": 8, "n_inner": 80}),
    ("gptj", {"n_inner": ABSENT}),
    ("gptj", {"n_layer": 4}),
    ("gpt-neox", {"attention_bias": False}),
    ("gpt-neox-sequential", {"attention_bias": ABSENT}),
    ("gpt-neox", {"intermediate_size": 81}),
    ("gpt-neox", {"num_hidden_layers": 2}),
    ("opt", {"max_position_embeddings": 130}),
    ("opt", {"enable_bias": False}),
    ("opt-post", {"enable_bias": True}),
    ("opt", {"_remove_final_layer_norm": True}),
    ("opt", {"do_layer_norm_before": False}),
    ("opt", {"word_embed_proj_dim": 20}),
    ("opt", {"ffn_dim": 81}),
    ("bloom", {"n_layer": 2}),
]


@pytest.mark.parametrize(("name", "wrong"), MISFITS, ids=label)
def test_a_shape_that_does_not_fit_the_tensors_is_refused(checkpoint: Directory, tmp_path: Path, name: str, wrong: dict[str, Any]) -> None:
    assert (name, wrong) not in SHAPES
    edited = checkpoints.edit(checkpoint(name), tmp_path / "edited", **wrong)
    with pytest.raises(ValueError, match=r"do not fit its config\.json|says that hidden states|says that token states"):
        Encoder(edited, device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("name", "wrong", "sentence"),
    [
        ("gpt-neo", {"activation_function": "silu"}, "'silu' is not supported without a gate"),
        ("gpt-neo", {"is_causal": False}, "causal whatever is said"),
        ("gpt-neo", {"num_heads": 5}, "48 is not a multiple of the number of heads 5"),
        ("gpt-neo", {"attention_layers": ["global", "local"]}, "expected 3 times global or local"),
        ("gpt-neo", {"attention_layers": ["global", "local", "strided"]}, "expected 3 times global or local"),
        ("gpt-neo", {"attention_layers": ABSENT, "attention_types": [[["global", "local"], 12]]}, "expected 3 times"),
        ("gpt-neo", {"attention_layers": ABSENT, "attention_types": [[["global"], 10**9]]}, "expected 3 times"),
        ("gpt-neo", {"attention_layers": ABSENT, "attention_types": ABSENT}, "expected 3 times"),  # 24 layers
        ("gpt-neo", {"attention_layers": ABSENT, "attention_types": [["global", "local"]]}, "expected pairs"),
        ("gpt-neo", {"attention_layers": ABSENT, "attention_types": [["global"], 1.5]}, "expected pairs"),
        ("gpt-neo", {"num_attention_heads": 6}, "num_heads 4 and num_attention_heads 6 are two names of one field"),
        ("gptj", {"rotary_dim": None}, "rotary_dim is null"),
        ("gptj", {"rotary_dim": ABSENT}, "64 dimensions of a head would be rotated; expected an even number from 2 to 16"),
        ("gptj", {"rotary_dim": 9}, "9 dimensions"),
        ("gptj", {"activation_function": "quick_gelu"}, "'quick_gelu' is not supported"),
        ("gptj", {"hidden_size": 60}, "two names of one field"),
        ("gpt-neox", rope(partial_rotary_factor=0.2), "3 dimensions of a head would be rotated"),
        ("gpt-neox", rope(partial_rotary_factor=0.1), "1 dimensions"),
        ("gpt-neox", rope(partial_rotary_factor=1.5), "24 dimensions"),
        ("gpt-neox", rope(rope_theta=0.5), "expected a number above 1"),
        ("gpt-neox", {"layer_norm_eps": -1.0}, "not negative"),
        ("opt", {"layer_norm_elementwise_affine": False}, "norms with weights"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is true"),
        ("bloom", {"n_embed": 60}, "hidden_size 48 and n_embed 60 are two names"),
    ],
    ids=label,
)
def test_what_is_not_supported_is_refused(checkpoint: Directory, tmp_path: Path, name: str, wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Encoder(checkpoints.edit(checkpoint(name), tmp_path / "edited", **wrong), device="cpu", dtype="float32")


def test_dynamic_rotation_of_part_of_a_head(checkpoint: Directory, tmp_path: Path, backend: str | None) -> None:
    """The base grows with a text beyond the original length by the number of rotated dimensions, not by the head's."""
    dynamic = rope(rope_type="dynamic", factor=4.0)
    edited = checkpoints.edit(checkpoint("gpt-neox"), tmp_path / "edited", max_position_embeddings=16, **dynamic)
    texts = checkpoints.sentences((3, 17, 40))
    right, _ = checkpoints.reference(edited, texts, fresh=True, limit=64)
    plain, _ = checkpoints.reference(checkpoint("gpt-neox"), texts)
    assert checkpoints.error(plain, right)[1:].min() >= 1e-3
    assert checkpoints.error(vectors(edited, texts, max_seq_length=64, backend=backend), right).max() <= TOLERANCE


@pytest.mark.parametrize("name", ["gptj", "gpt-neox", "opt", "bloom"])
def test_the_argument_overrules_the_mask_of_the_files(checkpoint: Directory, tmp_path: Path, name: str, backend: str | None) -> None:
    texts = checkpoints.sentences(LENGTHS)
    flagged = checkpoints.edit(checkpoint(name), tmp_path / "flagged", is_causal=False)
    causal, bidirectional = (checkpoints.reference(each, texts)[0] for each in (checkpoint(name), flagged))
    assert checkpoints.error(causal, bidirectional)[3:].min() >= 1e-3, "the wrong mask would pass"
    for directory, argument, right in ((flagged, True, causal), (checkpoint(name), False, bidirectional)):
        assert checkpoints.error(vectors(directory, texts, causal=argument, backend=backend), right).max() <= TOLERANCE


def test_an_argument_cannot_make_gpt_neo_bidirectional(checkpoint: Directory) -> None:
    with pytest.raises(ValueError, match="say causal"):
        Encoder(checkpoint("gpt-neo"), device="cpu", causal=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_bare_decoders_pooling_is_not_guessed(checkpoint: Directory, tmp_path: Path, name: str) -> None:
    bare = shutil.copytree(checkpoint(name), tmp_path / "bare")
    (bare / "modules.json").unlink()
    with pytest.raises(ValueError, match="nothing says how its hidden states become a vector"):
        Encoder(bare, device="cpu")
    texts = checkpoints.sentences((17,))
    mode = CASES[name].pooling[0]
    assert torch.equal(vectors(bare, texts, pooling=mode), vectors(checkpoint(name), texts))


BUFFER = {
    "gpt-neo": ("transformer.", ("lm_head.weight", "transformer.h.0.attn.attention.bias", "transformer.h.2.attn.attention.masked_bias")),
    "gptj": ("transformer.", ("lm_head.weight", "lm_head.bias", "transformer.h.0.attn.bias", "transformer.h.2.attn.masked_bias")),
    "gpt-neox": (
        "gpt_neox.",
        (
            "embed_out.weight",
            "lm_head.weight",
            "gpt_neox.layers.0.attention.bias",
            "gpt_neox.layers.2.attention.masked_bias",
            "gpt_neox.layers.1.attention.rotary_emb.inv_freq",
        ),
    ),
    "opt": ("model.", ("lm_head.weight",)),
    "opt-post": ("model.", ("lm_head.weight",)),
    "bloom": ("transformer.", ("lm_head.weight",)),
}


@pytest.mark.parametrize("name", BUFFER)
def test_prefixed_names_and_tensors_without_use(checkpoint: Directory, tmp_path: Path, name: str) -> None:
    shutil.copytree(checkpoint(name), tmp_path / "renamed")
    prefix, beside = BUFFER[name]
    checkpoints.rename(tmp_path / "renamed", prefix, **{each: torch.full((3,), 9.0) for each in beside})
    texts = checkpoints.sentences(LENGTHS)
    assert torch.equal(vectors(checkpoint(name), texts), vectors(tmp_path / "renamed", texts))


@pytest.mark.parametrize("name", ["gpt-neo", "gptj", "gpt-neox", "bloom", "opt"])
def test_no_other_tensor_is_skipped(checkpoint: Directory, tmp_path: Path, name: str) -> None:
    """A pattern for the legacy buffers (`attn.bias`) that took a projection's bias with it, or a layer's, would show here."""
    for extra in ("h.0.attn.attention.k_proj.bias", "h.1.mlp.bias", "layers.0.attention.dense.scale", "decoder.bias", "inv_freq"):
        shutil.rmtree(tmp_path / "more", ignore_errors=True)
        shutil.copytree(checkpoint(name), tmp_path / "more")
        checkpoints.rename(tmp_path / "more", "", **{extra: torch.zeros(3)})
        with pytest.raises(ValueError, match=f"not expected: {extra}"):
            Encoder(tmp_path / "more", device="cpu")


@pytest.mark.parametrize("name", ["gpt-neo", "gptj", "gpt-neox", "gpt-neox-sequential", "opt", "opt-post", "bloom"])
def test_every_parameter_matters(checkpoint: Directory, tmp_path: Path, name: str) -> None:
    """A tensor that is read but not used, or used in part, would show here: each one is shifted alone. First and last layer."""
    directory = shutil.copytree(checkpoint(name), tmp_path / "changed")
    texts = checkpoints.sentences((17, 40))
    right = vectors(directory, texts)
    path = directory / "model.safetensors"
    tensors = checkpoints.load_file(path)
    for key, tensor in tensors.items():
        if re.search(r"\b(h|layers)\.1\.", key) or key.endswith("k_proj.bias"):  # softmax is blind to a bias of all keys
            continue
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        checkpoints.save_file(tensors | {key: tensor + 0.1 * noise}, path)
        assert checkpoints.error(vectors(directory, texts), right).min() >= 1e-4, key


def run(directory: Path, texts: list[str], names: dict[str, Any] | None = None, **changes: Any) -> Tensor:
    """Vectors from the stations themselves, with another config or other tensor names than the files say."""
    spec, family = read_checkpoint(directory)
    spec = replace(spec, model=replace(spec.model, **changes))
    backend = ops.select(CPU)
    loaded = weights.load(directory, spec.model, replace(family.tensors, **names or {}), (), CPU, torch.float32)
    batch = pack(tokenizer_of(directory, spec).encode(texts, None).ids, None, backend, CPU)
    with torch.inference_mode():
        return pool(forward(loaded, batch, backend), spec, loaded, batch, backend)


# What a config does not spell, done as the neighbouring model does it: (case, changes of ModelConfig, of TensorNames).
NEIGHBOURS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("gpt-neo", {"attention_scale": 12**-0.5}, {}),
    ("gpt-neo", {"position_offset": 1}, {}),
    ("gpt-neo", {"windows": (None, (5, 0), (5, 0))}, {}),
    ("gpt-neo", {"windows": ((4, 0), None, None)}, {}),
    ("gpt-neo", {"causal": False}, {}),
    ("gptj", {"block": "pre"}, {}),
    ("gptj", {"attention_scale": 1.0}, {}),
    ("gptj", {"causal": False}, {}),
    ("gpt-neox", {"block": "pre"}, {}),
    ("gpt-neox", {}, {"qkv_by_head": False}),
    ("gpt-neox", {}, {"mlp_norm": "input_layernorm"}),
    ("gpt-neox", {"causal": False}, {}),
    ("opt", {"position_offset": 0}, {}),
    ("opt", {"position_offset": 1}, {}),
    ("opt", {"norm_eps": 1e-2}, {}),
    ("opt", {"causal": False}, {}),
    ("opt", {}, {"attention_norm": "final_layer_norm", "mlp_norm": "self_attn_layer_norm"}),
    ("bloom", {"alibi": False}, {}),
    ("bloom", {"attention_scale": 1.0}, {}),
    ("bloom", {"causal": False}, {}),
    ("bloom", {}, {"qkv_by_head": False}),
]


def neighbour(value: Any) -> str:
    return label(value) if value != {} else "-"


@pytest.mark.parametrize(("name", "changes", "names"), NEIGHBOURS, ids=neighbour)
def test_the_neighbouring_models_way_is_told_apart(
    checkpoint: Directory, tmp_path: Path, name: str, changes: dict[str, Any], names: dict[str, Any]
) -> None:
    texts = checkpoints.sentences((17, 40))
    right, _ = checkpoints.reference(checkpoint(name), texts)
    assert checkpoints.error(run(checkpoint(name), texts), right).max() <= TOLERANCE
    directory = checkpoint(name)
    if names and "norm" in next(iter(names)) and name == "gpt-neox":  # then no tensor stands for the second norm
        directory = shutil.copytree(directory, tmp_path / "one-norm")
        tensors = checkpoints.load_file(directory / "model.safetensors")
        checkpoints.save_file(
            {key: tensor for key, tensor in tensors.items() if "post_attention_layernorm" not in key}, directory / "model.safetensors"
        )
    assert checkpoints.error(run(directory, texts, names, **changes), right).min() >= 1e-3


def test_pairs_of_gptj_are_neighbours(checkpoint: Directory) -> None:
    texts = checkpoints.sentences((17, 40))
    right, _ = checkpoints.reference(checkpoint("gptj"), texts)
    spec, _ = read_checkpoint(checkpoint("gptj"))
    halves = tuple(replace(each, interleaved=False) for each in spec.model.ropes)
    assert checkpoints.error(run(checkpoint("gptj"), texts, ropes=halves), right).min() >= 1e-3


@pytest.mark.parametrize("order", ["qkv", "kqv"])
def test_a_fused_projection_in_the_order_q_k_v(checkpoint: Directory, tmp_path: Path, order: str) -> None:
    """Three tensors as the rows of one, which `qkv` then names alone: the same bits; in another order, other vectors."""
    directory = shutil.copytree(checkpoint("opt"), tmp_path / "fused")
    tensors = checkpoints.load_file(directory / "model.safetensors")
    for n in range(3):
        at = f"decoder.layers.{n}.self_attn."
        for kind in ("weight", "bias"):
            parts = {each: tensors.pop(f"{at}{each}_proj.{kind}") for each in "qkv"}
            tensors[f"{at}qkv.{kind}"] = torch.cat([parts[each] for each in order])
    checkpoints.save_file(tensors, directory / "model.safetensors")
    texts = checkpoints.sentences(LENGTHS)
    apart, fused = run(checkpoint("opt"), texts), run(directory, texts, {"qkv": ("self_attn.qkv",)})
    assert torch.equal(apart, fused) == (order == "qkv")
    assert order == "qkv" or checkpoints.error(fused, apart)[3:].min() >= 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_alone_in_any_batch_in_any_order(checkpoint: Directory, name: str, dtype: str, backend: str | None) -> None:
    """Bit for bit; the texts come from the shortest to the longest, so that a table of positions or distances grows on the way."""
    texts = checkpoints.sentences((1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 40, 64, 75, 100))
    encoder = Encoder(checkpoint(name), device="cpu", dtype=dtype, backend=backend)
    alone = np.stack([encoder.encode(text) for text in texts])
    assert np.isfinite(alone).all()
    assert len(np.unique(alone, axis=0)) == len(texts)
    assert (encoder.encode(texts) == alone).all()
    assert (encoder.encode(texts[::-1]) == alone[::-1]).all()
    assert (encoder.encode(texts * 3, batch_size=5) == np.tile(alone, (3, 1))).all()
    fresh = Encoder(checkpoint(name), device="cpu", dtype=dtype, backend=backend, tokens_per_batch=50)
    assert (fresh.encode(texts) == alone).all()
    for text, state in zip(texts, encoder.encode(texts, output_value="token_embeddings"), strict=True):
        assert torch.equal(state, encoder.encode(text, output_value="token_embeddings"))
    if backend is None:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert (encoder.encode(texts) == alone).all()


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_nobody_reach_no_output(checkpoint: Directory, name: str, backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the rows that pad a batch, from the embedding on, changes no bit."""
    text = checkpoints.sentence(17)
    encoder = Encoder(checkpoint(name), device="cpu", dtype="float32", backend=backend)
    right = encoder.encode(text)
    module = encoder._loaded.ops
    embed, length = module.embed, len(encoder.tokenizer.encode([text], None).ids[0])

    def spoiled(*args: Any, **kwargs: Any) -> Tensor:
        out = embed(*args, **kwargs)
        assert len(out) > length
        out[length:] = torch.nan
        return out

    monkeypatch.setattr(module, "embed", spoiled)
    assert (encoder.encode(text) == right).all()


@pytest.mark.parametrize("heads", [*range(1, 26), 32, 40, 112])
def test_alibi_slopes_are_transformers(heads: int) -> None:
    theirs = transformers.models.bloom.modeling_bloom._get_alibi_slopes(heads, CPU)
    ours = slopes(heads)
    assert ours.shape == theirs.shape
    assert ((ours - theirs).abs() <= 1e-5 * theirs).all()
    plain = 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)  # the formula for powers of two, for any number
    assert torch.allclose(ours.float(), plain) == math.log2(heads).is_integer()


def test_the_table_of_distances_grows_with_the_longest_text() -> None:
    alibi, seen = Alibi(6, CPU), []
    for lengths in ((1,), (3, 2), (3,), (100, 7), (128,), (129,), (5,)):
        batch = pack([np.zeros(length, dtype=np.int32) for length in lengths], None, reference, CPU)
        bias = alibi.bias(batch)
        assert bias.radius >= max(lengths) - 1
        reach = torch.arange(-(max(lengths) - 1), max(lengths))
        expected = (slopes(6)[:, None] * reach.double()).float()
        assert torch.equal(bias.table[:, reach + bias.radius], expected)
        seen.append(bias.radius)
    assert seen == [0, 3, 3, 127, 127, 255, 255]


def test_alibi_reaches_texts_beyond_what_the_model_was_trained_on(checkpoint: Directory, backend: str | None) -> None:
    """No table limits a BLOOM: 2,048 tokens are only the default."""
    texts = checkpoints.sentences((2100,))
    encoder = Encoder(checkpoint("bloom"), device="cpu", dtype="float32", backend=backend, max_seq_length=2200)
    assert Encoder(checkpoint("bloom"), device="cpu").max_seq_length == 2048
    assert checkpoints.error(encoder.encode(texts), checkpoints.reference(checkpoint("bloom"), texts)[0]).max() <= TOLERANCE


def test_learned_positions_end(checkpoint: Directory, backend: str | None) -> None:
    """The last row is used: 128 tokens, and OPT's table has 130 rows. One token more is cut."""
    for name in ("gpt-neo", "opt"):
        specials = CASES[name].bos + CASES[name].eos
        whole = checkpoints.sentence(128 - specials)
        right, _ = checkpoints.reference(checkpoint(name), [whole])
        encoder = Encoder(checkpoint(name), device="cpu", dtype="float32", backend=backend)
        assert encoder.max_seq_length == 128
        assert checkpoints.error(torch.from_numpy(encoder.encode([whole])), right).max() <= TOLERANCE
        assert (encoder.encode(whole + " w9") == encoder.encode(whole)).all()
        with pytest.raises(ValueError, match="max_seq_length is 129"):
            Encoder(checkpoint(name), device="cpu", max_seq_length=129)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu_in_the_gemm_has_the_bits_of_relu_after_it(dtype: torch.dtype) -> None:
    if not packable(CPU, dtype):
        pytest.skip("oneDNN's GEMM is not there")
    generator = torch.Generator().manual_seed(0)
    layer = linear(torch.randn(80, 48, generator=generator).to(dtype), torch.randn(80, generator=generator).to(dtype))
    x = torch.randn(32, 48, generator=generator).to(dtype)
    assert torch.equal(layer.apply(x, act="relu"), torch.relu(layer.apply(x)))
    assert (layer.apply(x) < 0).any()


@pytest.mark.parametrize("name", ["opt", "opt-post", "gpt-neox"])
def test_without_onednn_the_activation_is_an_op_of_its_own(
    checkpoint: Directory, name: str, monkeypatch: pytest.MonkeyPatch, backend: str | None
) -> None:
    for module in ("linear", "weights"):
        monkeypatch.setattr(f"pyembed.{module}.packable", lambda device, dtype: False)
    texts = checkpoints.sentences(LENGTHS)
    encoder = Encoder(checkpoint(name), device="cpu", dtype="float32", backend=backend)
    assert not encoder._loaded.weights.layers[0].up.fuses
    assert checkpoints.error(encoder.encode(texts), checkpoints.reference(checkpoint(name), texts)[0]).max() <= TOLERANCE


@pytest.fixture(scope="module")
def opt_350m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the shape of opt-350m: post-norm, no final norm, a narrow token table and projections in and out."""
    return checkpoints.save(checkpoints.OPT_350M, tmp_path_factory.mktemp("opt-350m"))


def test_opt_350m(opt_350m: Path, backend: str | None) -> None:
    texts = checkpoints.sentences(LENGTHS)
    right, states = checkpoints.reference(opt_350m, texts)
    encoder = Encoder(opt_350m, device="cpu", dtype="float32", backend=backend)
    assert encoder.dim == 20
    assert checkpoints.error(encoder.encode(texts), right).max() <= TOLERANCE
    for ours, theirs in zip(encoder.encode(texts, output_value="token_embeddings"), states, strict=True):
        assert checkpoints.error(ours, theirs).max() <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opt_350m_up_to_its_last_projection(
    opt_350m: Path, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, backend: str | None
) -> None:
    """project_in is folded into the token table, a row of which is rounded once, also where the table comes in several parts."""
    monkeypatch.setattr(weights, "FOLDED_ROWS", 10)
    directory = shutil.copytree(opt_350m, tmp_path / "without")
    tensors = checkpoints.load_file(directory / "model.safetensors")
    del tensors["decoder.project_out.weight"]
    checkpoints.save_file(tensors, directory / "model.safetensors")
    config = read_checkpoint(checkpoints.edit(directory, tmp_path / "read", "1_Pooling/config.json", embedding_dimension=48))[0].model
    assert (config.token_dim, config.projection_dim) == (20, 20)
    module = ops.select(CPU, backend)
    family = read_checkpoint(tmp_path / "read")[1]
    loaded = weights.load(directory, replace(config, projection_dim=None), family.tensors, (), CPU, dtype)
    exact = tensors["decoder.embed_tokens.weight"].double() @ tensors["decoder.project_in.weight"].double().T
    assert (loaded.tokens.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()

    model = transformers.OPTModel.from_pretrained(opt_350m, attn_implementation="eager", dtype=torch.float32)
    ids = torch.randint(4, 60, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model.decoder.project_out = None
        right = model(ids).last_hidden_state[0]
        ours = forward(loaded, pack([ids[0].numpy().astype(np.int32)], None, module, CPU), module)[:40]
    assert checkpoints.error(ours, right).max() <= (TOLERANCE if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        (
            "gpt-neo",
            (
                r"gpt_neo, 3 layers of 48, MLP gelu_tanh 80, pre-norm LayerNorm",
                r"attention +4 heads of 12, scores not scaled",
                r"mask +causal, 2 of 3 layers see 4 keys before and 0 after",
                r"positions +learned, a table of 128 rows, used from row 0 on",
            ),
        ),
        ("gptj", (r"attention beside MLP, LayerNorm", r"positions +RoPE interleaved, theta 10,000, 10 of 16 dimensions; up to 128")),
        ("gpt-neox", (r"attention beside MLP, LayerNorm", r"QKV bias", r"positions +RoPE, theta 500, 8 of 16 dimensions; up to 128")),
        ("gpt-neox-sequential", (r"pre-norm LayerNorm", r"mask +bidirectional")),
        ("opt", (r"MLP relu 80, pre-norm LayerNorm", r"positions +learned, a table of 130 rows, used from row 2 on")),
        ("opt-post", (r"post-norm LayerNorm",)),
        ("bloom", (r"bloom, 3 layers of 48, MLP gelu_tanh 192", r"positions +ALiBi, a slope for each of 6 heads")),
    ],
)
def test_info_says_what_the_axes_are(checkpoint: Directory, name: str, rows: tuple[str, ...]) -> None:
    args = argparse.Namespace(
        model=str(checkpoint(name)), recipe=None, template=None, instruction=None, pooling=None, causal=None, truncate_dim=None,
        max_seq_length=None,
        device="cpu", dtype="auto", revision=None, offline=True, adapters=(), adapter=None, backend=None,
    )  # fmt: skip
    table = info.describe(args)
    for row in rows:
        assert re.search(row, table), (row, table)
