"""NV-Embed: its head against a per-token transcription in float64 that folds nothing, behind transformers' own Mistral."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import ABSENT, DECODER, Case
from torch import Tensor

from pyembed import Encoder, heads, prompts, request
from pyembed.batch import pack
from pyembed.checkpoint import read_checkpoint
from pyembed.cli import main
from pyembed.families import nvembed
from pyembed.model import forward
from pyembed.recipes import recipes

Directory = Callable[[str], Path]
TEXTS = checkpoints.sentences((1, 2, 3, 17, 40, 75))
TEXT = DECODER | {"sliding_window": None, "is_causal": False}  # the Mistral inside
HIDDEN, LATENTS, HEADS, WIDTH = 48, 12, 4, 24
LATENT = {
    "model_type": "latent_attention",
    "num_latents_value": LATENTS,
    "num_cross_heads": HEADS,
    "cross_dim_head": WIDTH,
    "latent_dim": HIDDEN,
    "hidden_dim": HIDDEN,
}
ATTEND, FEED = "cross_attend_blocks.0.", "cross_attend_blocks.1."
SHAPES = {
    "latents": (LATENTS, HIDDEN),
    ATTEND + "fn.to_q.weight": (HEADS * WIDTH, HIDDEN),
    ATTEND + "fn.to_kv.weight": (2 * HEADS * WIDTH, HIDDEN),
    ATTEND + "fn.to_out.weight": (HIDDEN, HEADS * WIDTH),
    ATTEND + "norm.weight": (HIDDEN,),
    ATTEND + "norm.bias": (HIDDEN,),
    ATTEND + "norm_context.weight": (HIDDEN,),
    ATTEND + "norm_context.bias": (HIDDEN,),
    FEED + "fn.net.0.weight": (8 * HIDDEN, HIDDEN),
    FEED + "fn.net.0.bias": (8 * HIDDEN,),
    FEED + "fn.net.2.weight": (HIDDEN, 4 * HIDDEN),
    FEED + "fn.net.2.bias": (HIDDEN,),
    FEED + "norm.weight": (HIDDEN,),
    FEED + "norm.bias": (HIDDEN,),
}


def drawn(name: str) -> Tensor:
    """A parameter of the head at a scale that matters, a bfloat16 number."""
    shape = SHAPES[name]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith("bias"):
        value = 0.3 * noise
    elif len(shape) == 1:
        value = 1 + 0.3 * noise
    elif name == "latents":
        value = noise
    else:
        value = noise * (1.7 if "to_q" in name else 1.2) / math.sqrt(shape[1])
    return value.bfloat16().float()


TENSORS = {name: drawn(name) for name in SHAPES}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder, saved by transformers."""
    return checkpoints.save(Case("Mistral", TEXT, bos=True, eos=True, pooling=("mean",)), tmp_path_factory.mktemp("mistral"))


@pytest.fixture(scope="module")
def directory(mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as an NV-Embed: its config nested as published, its tensors prefixed, no modules.json."""
    to = tmp_path_factory.mktemp("nvembed") / "model"
    text = json.loads((mistral / "config.json").read_text())
    outer = dict.fromkeys(text, ABSENT) | {
        "model_type": "nvembed",
        "architectures": ["NVEmbedModel"],
        "auto_map": {"AutoModel": "modeling_nvembed.NVEmbedModel"},
        "text_config": {name: value for name, value in text.items() if name != "is_causal"} | {"model_type": "bidir_mistral"},
        "latent_attention_config": LATENT,
        "add_eos": True,
        "add_pad_token": True,
        "is_mask_instruction": True,
        "mask_type": "b",
        "padding_side": "right",
    }
    checkpoints.edit(mistral, to, **outer)
    checkpoints.rename(to, "embedding_model.", **{f"latent_attention_model.{name}": tensor for name, tensor in TENSORS.items()})
    (to / "modules.json").unlink()
    tokenizer = json.loads((to / "tokenizer.json").read_text())
    tokenizer["post_processor"]["single"].pop()  # </s>, which NV-Embed's own code writes after the text
    (to / "tokenizer.json").write_text(json.dumps(tokenizer))
    return to


def loaded(directory: Path, backend: str | None = None, dtype: str = "float32", **arguments: Any) -> Encoder:
    return Encoder(directory, device="cpu", dtype=dtype, backend=backend, recipe="nv-embed", **arguments)


def head(h: Tensor, t: dict[str, Tensor] = TENSORS, *, heads: int = HEADS, wrong: str = "") -> Tensor:
    """models.md 2.7, token by token: final states [n, D] to z [n, D] in the dtype of h. `wrong` takes the variant next door."""
    t = {name: tensor.to(h.dtype) for name, tensor in t.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        bias = None if wrong == f"no bias of {name}" else t[f"{name}.bias"]
        return F.layer_norm(x, (x.shape[-1],), t[f"{name}.weight"], bias, 1e-12 if wrong == "eps" else 1e-5)

    q = norm(h, ATTEND + "norm") @ t[ATTEND + "fn.to_q.weight"].T
    k, v = (norm(t["latents"], ATTEND + "norm_context") @ t[ATTEND + "fn.to_kv.weight"].T).chunk(2, -1)
    if wrong == "values first":
        k, v = v, k
    width = q.shape[1] // heads
    split = list(zip(*(x.split(width, 1) for x in (q, k, v)), strict=True))
    parts = [(qi @ ki.T * (width * heads if wrong == "scale" else width) ** -0.5, vi) for qi, ki, vi in split]
    if wrong == "one softmax":
        together = torch.softmax(torch.cat([scores for scores, _ in parts], -1), -1).chunk(heads, -1)
        attended = torch.cat([p @ vi for p, (_, vi) in zip(together, parts, strict=True)], -1)
    else:
        attended = torch.cat([torch.softmax(scores, -1) @ vi for scores, vi in parts], -1)
    y = attended @ t[ATTEND + "fn.to_out.weight"].T + (0 if wrong == "no first residual" else h)
    x, gate = (norm(y, FEED + "norm") @ t[FEED + "fn.net.0.weight"].T + t[FEED + "fn.net.0.bias"]).chunk(2, -1)
    if wrong == "halves":
        x, gate = gate, x
    gated = x * F.gelu(gate, approximate="tanh" if wrong == "tanh" else "none")
    out = gated @ t[FEED + "fn.net.2.weight"].T + (0 if wrong == "no last bias" else t[FEED + "fn.net.2.bias"])
    return out + (0 if wrong == "no second residual" else y)


def vectors(states: list[Tensor], **arguments: Any) -> Tensor:
    return torch.stack([F.normalize(head(each.double(), **arguments).mean(0), dim=-1) for each in states]).float()


def test_vectors_and_token_states(mistral: Path, directory: Path, backend: str | None) -> None:
    _, states = checkpoints.reference(mistral, TEXTS)
    encoder = loaded(directory, backend)
    assert encoder.dim == HIDDEN
    assert f"pooling=mean without prompt, {LATENTS} latents, L2" in repr(encoder)
    assert not encoder.spec.pooling.include_prompt
    assert checkpoints.error(encoder.encode(TEXTS), vectors(states)).max() <= 1e-5
    raw = torch.stack([head(each.double()).mean(0) for each in states]).float()
    assert checkpoints.error(loaded(directory, backend, normalize=False).encode(TEXTS), raw).max() <= 1e-5
    for ours, theirs in zip(encoder.encode(TEXTS, output_value="token_embeddings"), states, strict=True):
        assert checkpoints.error(ours, head(theirs.double()).float()).max() <= 1e-5


VARIANTS = [
    *("values first", "scale", "one softmax", "halves", "no first residual", "no second residual", "no last bias"),
    *(f"no bias of {each}" for each in (ATTEND + "norm", ATTEND + "norm_context", FEED + "norm")),
]


@pytest.mark.parametrize("wrong", VARIANTS)
def test_the_variant_next_door_is_told_apart(mistral: Path, wrong: str) -> None:
    _, states = checkpoints.reference(mistral, TEXTS)
    assert checkpoints.error(vectors(states, wrong=wrong), vectors(states)).min() >= 1e-2


def test_the_tanh_gelu_is_told_apart(mistral: Path) -> None:
    _, states = checkpoints.reference(mistral, TEXTS)
    assert checkpoints.error(vectors(states, wrong="tanh"), vectors(states)).min() >= 3e-5  # the two are nowhere further apart than 5e-4


def test_epsilon(mistral: Path, directory: Path, tmp_path: Path, backend: str | None) -> None:
    """Latents so small that 1e-5 is of their variance's size."""
    tensors = TENSORS | {"latents": 0.004 * TENSORS["latents"]}
    to = checkpoints.edit(directory, tmp_path / "small")
    stored = checkpoints.load_file(to / "model.safetensors")
    checkpoints.save_file(stored | {"latent_attention_model.latents": tensors["latents"]}, to / "model.safetensors")
    _, states = checkpoints.reference(mistral, TEXTS)
    assert checkpoints.error(loaded(to, backend).encode(TEXTS), vectors(states, t=tensors)).max() <= 1e-5
    assert checkpoints.error(vectors(states, t=tensors, wrong="eps"), vectors(states, t=tensors)).min() >= 1e-3


def test_bfloat16_loses_no_more_than_twice_what_the_unfolded_head_loses(mistral: Path, directory: Path, backend: str | None) -> None:
    texts = [text for seed in range(4) for text in checkpoints.sentences((1, 2, 17, 40), seed)]
    _, states = checkpoints.reference(mistral, texts)
    _, low = checkpoints.reference(mistral, texts, torch.bfloat16)
    theirs = torch.stack([F.normalize(head(each.bfloat16()).float().mean(0), dim=-1) for each in low])
    ours = loaded(directory, backend, "bfloat16").encode(texts)
    lost, allowed = (checkpoints.error(each, vectors(states)).square().mean().sqrt() for each in (ours, theirs))
    assert 1e-4 < allowed < 0.2, "the comparison says nothing"
    assert lost <= 2 * allowed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_has_the_same_bits_alone(directory: Path, backend: str | None, dtype: str) -> None:
    encoder = loaded(directory, backend, dtype)
    together = encoder.encode(TEXTS)
    assert all(np.array_equal(encoder.encode(text), row) for text, row in zip(TEXTS, together, strict=True))


def test_only_the_spans_are_read(mistral: Path, directory: Path, backend: str | None) -> None:
    """Tokens that are left out are seen by the others; a span of nothing gives zeros."""
    encoder = loaded(directory, backend)
    model = encoder._loaded
    ids = prompts.prepare(encoder.tokenizer, request.job(encoder).form, TEXTS).ids
    _, states = checkpoints.reference(mistral, TEXTS)
    skip = [0, 4, 2, 3, 0, 30]  # the second text has four tokens

    def run(left_out: list[int], normalize: bool = True) -> Tensor:
        with torch.inference_mode():
            spans = [(min(n, len(each)), len(each)) for n, each in zip(left_out, ids, strict=True)]
            batch = pack(ids, spans, model.ops, model.device)
            hidden = forward(model.weights, batch, model.ops)
            hidden[sum(batch.lengths) :] = torch.nan  # spare rows
            return heads.pool(hidden, replace(model.spec, normalize=normalize), model.weights, batch, model.ops)

    right = vectors([each[n:] for each, n in zip(states, skip, strict=True) if n < len(each)])
    there = [0, 2, 3, 4, 5]
    for normalize in (True, False):
        found = run(skip, normalize)
        assert (found[1] == 0).all()
        assert checkpoints.error(F.normalize(found[there], dim=-1), right).max() <= 1e-5
    off = run([max(0, n - 1) for n in skip])
    assert checkpoints.error(off[[2, 3, 5]], right[[1, 2, 4]]).min() >= 1e-3
    assert (run([len(each) for each in ids]) == 0).all()


def test_every_parameter_of_the_head_matters(directory: Path, tmp_path: Path) -> None:
    to = checkpoints.edit(directory, tmp_path / "changed")
    tensors = checkpoints.load_file(to / "model.safetensors")
    right = torch.from_numpy(loaded(to).encode(TEXTS))
    for name in SHAPES:
        key = f"latent_attention_model.{name}"
        noise = torch.randn(tensors[key].shape, generator=torch.Generator().manual_seed(1))
        checkpoints.save_file(tensors | {key: tensors[key] + 0.1 * noise}, to / "model.safetensors")
        assert checkpoints.error(loaded(to).encode(TEXTS), right).min() >= 1e-4, name


# The fields of the file, and what the transcription takes for them.
FIELDS: list[tuple[dict[str, Any], dict[str, Any], int]] = [
    ({"latent_attention_config": LATENT | {"num_cross_heads": 2, "cross_dim_head": 2 * WIDTH}}, {}, 2),  # the same shapes
    ({}, {"rms_norm_eps": 5e-5}, HEADS),
    ({}, {"rope_theta": 600.0}, HEADS),
    ({}, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}, HEADS),
    ({}, {"hidden_act": "gelu"}, HEADS),
]


@pytest.mark.parametrize(("outer", "inner", "count"), FIELDS, ids=["heads", "eps", "theta", "head_dim", "act"])
def test_a_wrong_value_moves_the_vector_as_it_moves_the_original(
    mistral: Path, directory: Path, tmp_path: Path, outer: dict[str, Any], inner: dict[str, Any], count: int
) -> None:
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": inner["rope_theta"]}} if "rope_theta" in inner else inner
    text = json.loads((directory / "config.json").read_text())["text_config"] | plain
    edited = checkpoints.edit(directory, tmp_path / "edited", **outer, text_config=text)
    _, states = checkpoints.reference(checkpoints.edit(mistral, tmp_path / "plain", **plain), TEXTS[3:])
    right, moved = (torch.from_numpy(loaded(each).encode(TEXTS[3:])) for each in (directory, edited))
    assert checkpoints.error(moved, right).min() >= 1e-3
    assert checkpoints.error(moved, vectors(states, heads=count)).max() <= 1e-5


def test_a_window_in_the_file_is_ignored_and_old_spellings_say_the_same(directory: Path, tmp_path: Path) -> None:
    text = json.loads((directory / "config.json").read_text())["text_config"]
    right = loaded(directory).encode(TEXTS)
    for n, changed in enumerate(
        (
            text | {"sliding_window": 4},
            {name: value for name, value in text.items() if name != "rope_parameters"} | {"rope_theta": 500.0},
            text | {"model_type": "mistral"},
        )
    ):
        edited = checkpoints.edit(directory, tmp_path / str(n), text_config=changed)
        assert np.array_equal(loaded(edited).encode(TEXTS), right)
    silent = checkpoints.edit(directory, tmp_path / "silent", **dict.fromkeys(nvembed.ONLY, ABSENT))
    assert np.array_equal(loaded(silent).encode(TEXTS), right)


@pytest.mark.parametrize("latent", [{"model_type": "latent_attention"}, ABSENT], ids=["type-only", "absent"])
def test_the_published_config_means_the_published_sizes(directory: Path, tmp_path: Path, latent: Any) -> None:
    """latent_attention_config holds a model_type alone, and the sizes of a Mistral 7B may be left to its class."""
    to = checkpoints.edit(directory, tmp_path / "published", latent_attention_config=latent, text_config={"model_type": "bidir_mistral"})
    spec, family = read_checkpoint(to, recipe=recipes()["nv-embed"])
    assert family.name == "nvembed"
    model, head = spec.model, spec.model.latent
    assert head is not None
    assert (head.latents, head.heads, head.head_dim, head.mlp_size) == (512, 8, 4096, 16384)
    assert (model.hidden_size, model.num_layers, model.num_heads, model.num_key_value_heads, model.head_dim) == (4096, 32, 32, 8, 128)
    assert (model.causal, set(model.windows), spec.full_dim, spec.normalize) == (False, {None}, 4096, True)


def test_folding_leaves_a_third_of_the_work() -> None:
    """FLOPs of the head at the published sizes; pyembed/latent.py states them."""
    width, latents, heads_of, inner, mlp = 4096, 512, 8, 8 * 4096, 16384
    feed_up, feed_down = 2 * width * 2 * mlp, 2 * mlp * width
    scores_and_values = 2 * (2 * latents * inner)
    before = 2 * (2 * width * inner) + scores_and_values + feed_up + feed_down
    after = 2 * (2 * width * heads_of * latents) + feed_up
    assert (before, after) == (1_006_632_960, 335_544_320)
    assert before == 3 * after
    assert 2 * latents * width * 2 * inner == 274_877_906_944  # keys and values, a text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"padding_side": "left"}, "padding_side is 'left'"),
        ({"mask_type": "l"}, "mask_type is 'l'"),
        ({"is_mask_instruction": False}, "is_mask_instruction is False"),
        ({"add_eos": False}, "add_eos is False"),
        ({"text_config": None}, "lacks the field text_config"),
        ({"latent_attention_config": LATENT | {"output_normalize": False}}, "normalize=False"),
        ({"latent_attention_config": LATENT | {"latent_dim": 4096}}, "latent_dim is 4096; expected text_config's hidden_size, 48"),
        ({"latent_attention_config": LATENT | {"hidden_dim": 40}}, "hidden_dim is 40"),
        ({"latent_attention_config": LATENT | {"num_latents_value": LATENTS + 1}}, r"do not fit its config\.json"),
        ({"latent_attention_config": LATENT | {"num_cross_heads": 2}}, r"do not fit its config\.json"),
        ({"latent_attention_config": LATENT | {"cross_dim_head": 2 * WIDTH}}, r"do not fit its config\.json"),
        ({"latent_attention_config": LATENT | {"num_cross_heads": 0}}, "num_cross_heads is 0"),
    ],
)
def test_what_does_not_fit_or_is_not_supported_is_refused(directory: Path, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        loaded(checkpoints.edit(directory, tmp_path / "edited", **changes))


def test_info_names_the_head(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(directory), "--recipe", "nv-embed"]) == 0
    assert f"attention to {LATENTS} latents, {HEADS} heads of {WIDTH}" in capsys.readouterr().out


def test_other_refusals(directory: Path, tmp_path: Path) -> None:
    by_type = Encoder(directory, device="cpu", dtype="float32")  # nothing else has that model_type: a local copy needs no recipe
    assert by_type.spec == loaded(directory).spec
    with pytest.raises(ValueError, match="followed by mean pooling"):
        loaded(directory, pooling="lasttoken")
    to = checkpoints.edit(directory, tmp_path / "changed")
    tensors = checkpoints.load_file(to / "model.safetensors")
    key = "latent_attention_model." + ATTEND + "fn.to_q.weight"
    for changed, sentence in (
        ({name: each for name, each in tensors.items() if name != key}, "missing: latent_attention_model"),
        (tensors | {"latent_attention_model.more": torch.ones(1)}, "not expected: latent_attention_model.more"),
        (tensors | {key: tensors[key] / 0}, "NaN or infinite values"),
    ):
        checkpoints.save_file(changed, to / "model.safetensors")
        with pytest.raises(ValueError, match=sentence):
            loaded(to)
