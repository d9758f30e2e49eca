"""dtype="fp8": the arithmetic of one layer, who makes its rows, which layers stay bfloat16, whole models, and where it is refused."""

from __future__ import annotations

import math
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from checkpoints import error
from safetensors.torch import load_file, save_file
from test_int8 import outlier_in_bert
from torch import Tensor

from pyembed import Encoder, quantising, symmetric, verify
from pyembed.cli import main
from pyembed.int8 import int8
from pyembed.linear import Dense, linear, wanted
from pyembed.ops import Quant, Quantised, reference
from pyembed.options import check_dtype, check_eight_bits, cores, dtype_name
from pyembed.steady import Steady
from pyembed.symmetric import Symmetric

LENGTHS = (1, 2, 5, 17, 33, 40, 64, 75)
QUANTS: tuple[Quant, ...] = ("fp8", "int8")


def data(tokens: int = 37, inputs: int = 96, outputs: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of sizes from 0.1 to 10, outputs of sizes that differ as much, a bias; bfloat16."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inputs, generator=draw) * torch.logspace(-1, 1, tokens)[:, None]
    w = torch.randn(outputs, inputs, generator=draw) * torch.logspace(-2, 0, outputs)[:, None]
    return x.bfloat16(), w.bfloat16(), torch.randn(outputs, generator=draw).bfloat16()


def made(weight: Tensor, bias: Tensor | None, quant: Quant = "fp8") -> Symmetric:
    layer = symmetric.symmetric(weight, bias, quant, reference)
    assert layer is not None
    return layer


def loaded(directory: Path) -> Encoder:
    return Encoder(directory, device="cpu", dtype="fp8", backend="reference")


def distance(directory: Path, dtype: str) -> float:
    """The mean distance of vectors from those in float32."""
    texts = checkpoints.sentences(LENGTHS)
    right = torch.from_numpy(Encoder(directory, device="cpu", dtype="float32").encode(texts))
    return float(error(Encoder(directory, device="cpu", dtype=dtype, backend="reference").encode(texts), right).mean())


# One layer


def e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest numbers of four bits of exponent, from -6 on, and three of mantissa; ties to even."""
    exponent = np.maximum(np.frexp(x)[1] - 1, -6)
    return np.round(np.ldexp(x, 3 - exponent)) * np.ldexp(1.0, exponent - 3)


def test_rows_by_hand() -> None:
    q = reference.quantised(torch.tensor([[448.0, 1.0625, 1.1875, -0.0011, 0.0009], [0.0, -4.48, 2.24, 0.01, 0.0], [0.0] * 5]), "fp8")
    assert (q.values.dtype, q.scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert q.values[0].tolist() == [448, 1, 1.25, -(2**-9), 0]  # two ties, to the even mantissa; the smallest number there is, and less
    assert q.values[1].tolist() == [0, -448, 224, 1, 0]
    assert q.values[2].tolist() == [0] * 5
    assert q.scale.tolist() == pytest.approx([1, 0.01, 1e-12 / 448])


def test_the_arithmetic() -> None:
    """Values and scales bit for bit, y to the order of a sum, against numpy; variants next door are off."""
    x, w, b = data()
    layer = made(w, b)

    def transcribed(rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        wide = rows.float().numpy()
        scale = np.abs(wide).max(1) / np.float32(448)
        return e4m3(wide / scale[:, None]), scale

    (q, scale), (values, scales) = transcribed(x), transcribed(w)
    assert np.array_equal(layer.values.float().numpy(), values)
    assert np.array_equal(layer.scale.numpy(), scales)
    rows = reference.quantised(x, "fp8")
    assert np.array_equal(rows.values.float().numpy(), q)
    assert np.array_equal(rows.scale.numpy(), scale)

    product = q.astype(np.float64) @ values.astype(np.float64).T
    bias = b.double().numpy()
    y = layer.apply(x)
    assert y.dtype == torch.bfloat16

    def off(right: np.ndarray) -> float:
        """The share of numbers that are not the nearest bfloat16."""
        return float((y != torch.from_numpy(right).bfloat16()).double().mean())

    whole = product * scale[:, None] * scales
    assert off(whole + bias) <= 0.005
    variants = {
        "no bias": whole,
        "rounded before the bias": torch.from_numpy(whole).bfloat16().double().numpy() + bias,
        "scales of other rows": product * scale[::-1, None] * scales + bias,
        "scales of other outputs": product * scale[:, None] * scales[::-1] + bias,
        "one scale of rows": product * scale.max() * scales + bias,
        "weights as they were": (q * scale[:, None]).astype(np.float64) @ w.double().numpy().T + bias,
        "rows as they were": x.double().numpy() @ (values * scales[:, None]).T.astype(np.float64) + bias,
    }
    for name, wrong in variants.items():
        assert off(wrong) >= 0.1, name


def test_rows_that_are_given_are_those_that_are_made() -> None:
    x, w, b = data()
    layer = made(w, b)
    assert torch.equal(layer.apply(reference.quantised(x, "fp8")), layer.apply(x))
    assert not torch.equal(layer.apply(reference.quantised(x.flip(0), "fp8")), layer.apply(x))
    with pytest.raises(AssertionError):
        linear(w, b).apply(reference.quantised(x, "fp8"))


def test_the_largest_number_of_a_row_is_never_beyond_what_there_is() -> None:
    """Beyond 464 is NaN; a scale that is rounded down puts the largest number a little beyond 448."""
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(20_000, 3, generator=draw) * torch.logspace(-8, 30, 20_000)[:, None]).bfloat16()
    q = reference.quantised(x, "fp8")
    beyond = (x.float().abs().amax(1) / q.scale) > 448
    assert beyond.any()
    assert (q.values.float().abs().amax(1) == 448).all()


def test_rows_that_are_not_finite_are_nan_and_alone_in_that() -> None:
    x, w, b = data(9)
    layer = made(w, b)
    right = layer.apply(x)
    x[1, 3], x[2, 4], x[3, 0] = math.nan, math.inf, -math.inf
    x[4], x[5] = math.nan, math.inf
    x[6], x[7] = 0, -0.0
    for rows in (x, reference.quantised(x, "fp8")):
        ours = layer.apply(rows)
        assert ours[1:6].isnan().all()
        assert torch.equal(ours[6:8], b.expand(2, -1))
        assert torch.equal(ours[[0, 8]], right[[0, 8]])


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    x, w, b = data(64)
    layer = made(w, b)
    right = layer.apply(x)
    for rows in (slice(0, 16), slice(5, 21), slice(16, 64)):
        assert torch.equal(layer.apply(x[rows]), right[rows])


def test_a_weight_is_quantised_in_pieces_like_whole_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    _, w, b = data()
    whole = made(w, b)
    monkeypatch.setattr(symmetric, "CHUNK", 7 * 96 + 1)
    w_again, b_again = w.clone(), b.clone()
    pieces = made(w_again, b_again)
    w_again.zero_(), b_again.zero_()
    assert torch.equal(pieces.values.view(torch.uint8), whole.values.view(torch.uint8))
    assert torch.equal(pieces.scale, whole.scale)
    assert torch.equal(pieces.bias, b)
    assert made(w, None).bias is None


@pytest.mark.parametrize(("outputs", "inputs"), [(40, 32), (32, 40), (31, 33)])
def test_shapes_that_a_card_does_not_take_are_not_made(outputs: int, inputs: int) -> None:
    for quant in QUANTS:
        assert symmetric.symmetric(torch.ones(outputs, inputs), None, quant, reference) is None
        assert made(torch.ones(48, 16), None, quant).apply(torch.ones(1, 16).bfloat16()).tolist() == [[16.0] * 48]


def test_what_layers_want(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.ones(32, 32)
    eight, half = made(w, None), linear(w, None)
    assert (eight.wants, half.wants, int8(w, None).wants) == ("fp8", None, None)
    assert wanted([eight]) == wanted([eight, eight]) == "fp8"
    assert wanted([half]) is wanted([half, eight]) is wanted([eight, half]) is None
    monkeypatch.setattr(symmetric, "WIDEST", 31)
    assert eight.wants is None  # no kernel gives rows so wide


# Who makes the rows


def layer_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Filled by each Symmetric layer that runs: whether it was given rows in eight bits."""
    calls: list[bool] = []
    run = Symmetric.apply

    def seen(self: Symmetric, x: Tensor | Quantised, *, act: str | None = None) -> Tensor:
        calls.append(isinstance(x, Quantised))
        return run(self, x, act=act)

    monkeypatch.setattr(Symmetric, "apply", seen)
    return calls


# Of all Symmetric layers, in order: (qkv, up, down), in the last layer (queries, keys and values, up, down).
GIVEN = {
    "llama": [True] * 10,
    "gemma2": [True] * 10,
    "gpt-neox": [True] * 10,  # a norm each for attention and MLP
    "gptj": [True] * 10,  # one norm for both
    "bert": [False, False, True] * 2 + [False, False, False, True],  # what its norms give is also the residual
    "opt": [True, True, False] * 2 + [True, True, True, False],  # relu is no op of ours
}


@pytest.mark.parametrize("name", GIVEN)
def test_the_op_before_makes_the_rows_and_the_bits_are_the_same(
    name: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantising, "LIMIT", math.inf)
    torch.set_num_threads(1)
    encoder = loaded(checkpoint(name))
    texts = checkpoints.sentences(LENGTHS)
    calls = layer_calls(monkeypatch)
    vectors = encoder.encode(texts)
    assert calls == GIVEN[name]
    monkeypatch.setattr(Symmetric, "wants", None)
    del calls[:]
    assert np.array_equal(encoder.encode(texts), vectors)
    assert calls == [False] * 10


def test_one_layer_in_bfloat16_beside_one_in_fp8(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both read a norm's rows: in bfloat16."""
    real = quantising.error
    count = 0

    def first_queries_fail(ours: Tensor, right: Tensor) -> float:
        nonlocal count
        count += 1
        return math.inf if count == 7 else real(ours, right)  # after three of each of two layers

    monkeypatch.setattr(quantising, "error", first_queries_fail)
    encoder = loaded(checkpoint("llama"))
    assert quantising.stayed(encoder._engine.errors) == ["layers.2.qkv.0"]
    calls = layer_calls(monkeypatch)
    vectors = encoder.encode(checkpoints.sentences(LENGTHS))
    assert np.isfinite(vectors).all()
    assert calls == [True] * 6 + [False, True, True]


# The rule


def test_attentions_output_stays_and_the_rest_does_not(checkpoint: Callable[[str], Path]) -> None:
    encoder = loaded(checkpoint("qwen3"))
    assert "dtype=fp8 (10 of 10 linear layers beside attention's output projections), mask" in repr(encoder)
    for layer in encoder._loaded.weights.layers:
        assert isinstance(layer.out.inner if isinstance(layer.out, Steady) else layer.out, Dense)
        assert layer.out.apply(torch.ones(16, 64).bfloat16()).dtype == torch.bfloat16
        assert all(isinstance(each, Symmetric) for each in (*layer.qkv, layer.up, layer.down))


def test_layers_that_a_card_does_not_take_stay(tmp_path: Path) -> None:
    directory = checkpoints.save(checkpoints.LLAMA.but(intermediate_size=72), tmp_path)
    encoder = loaded(directory)
    assert quantising.stayed(encoder._engine.errors) == ["layers.0.down", "layers.1.down", "layers.2.down"]
    assert "(7 of 10 linear layers beside attention's output projections; in bfloat16: layers.0.down, layers.1.down" in repr(encoder)
    assert distance(directory, "fp8") <= 20 * distance(directory, "bfloat16")


def test_massive_activations_into_the_down_projection() -> None:
    """Units a thousand times as large: in one token they cost that token alone little; in all tokens the rule sees what they cost."""
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 512, generator=draw), torch.randn(128, 512, generator=draw)

    def lost(rows: Tensor) -> float:
        right = rows.bfloat16().float() @ w.bfloat16().float().T
        return quantising.error(made(w.bfloat16(), None).apply(rows.bfloat16()).float(), right)

    plain = lost(x)
    assert 0.03 <= plain <= 0.045
    some = x.clone()
    some[0, 7] = 3000.0
    assert abs(lost(some) - plain) <= 0.005
    assert 0.01 <= lost(some[:1].expand(2, -1) * torch.tensor([[1.0], [-1.0]])) <= 0.045  # that token's own error
    assert lost(x * 1000) == pytest.approx(plain, rel=0.05)
    x[:, 7] = 3000.0
    assert lost(x) >= 10 * quantising.LIMIT


def test_a_model_with_them_keeps_that_layer(checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint("bert"), model)
    tensors = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    outlier_in_bert(tensors)
    save_file(tensors, model / "model.safetensors")
    errors = loaded(model)._engine.errors
    assert errors["layers.1.down"] >= 10 * quantising.LIMIT
    assert "layers.1.down" in quantising.stayed(errors)
    with_rule = distance(model, "fp8")
    assert with_rule <= 1.5 * distance(checkpoint("bert"), "fp8")
    monkeypatch.setattr(quantising, "LIMIT", math.inf)
    assert distance(model, "fp8") >= 8 * with_rule


# Models


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "gemma2", "embeddinggemma", "bert", "gptj", "gpt-neox", "opt", "bloom"])
def test_families(name: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four bits of mantissa less than bfloat16 has: 16 times its rounding, in the layers alone."""
    monkeypatch.setattr(quantising, "LIMIT", math.inf)
    lost, ours = distance(checkpoint(name), "bfloat16"), distance(checkpoint(name), "fp8")
    assert 5 * lost <= ours <= 20 * lost

    def swapped(weight: Tensor, bias: Tensor | None, *how: Any) -> Symmetric:
        layer = made(weight, bias)
        return replace(layer, scale=layer.scale.flip(0))

    monkeypatch.setattr(quantising, "symmetric", swapped)
    assert distance(checkpoint(name), "fp8") >= 1.5 * ours


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "bert"])
def test_alone_in_any_batch_in_any_order(name: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantising, "LIMIT", math.inf)
    torch.set_num_threads(1)
    texts = checkpoints.sentences(LENGTHS)
    encoder = loaded(checkpoint(name))
    alone = np.stack([encoder.encode(text) for text in texts])
    order = random.Random(0).sample(range(len(texts)), len(texts))
    assert (encoder.encode(texts) == alone).all()
    assert (encoder.encode([texts[i] for i in order], batch_size=3) == alone[order]).all()


def test_minilm(minilm: Path, docstrings: list[str]) -> None:
    texts = docstrings[::60]
    right = Encoder(minilm, device="cpu", dtype="float32").encode(texts)
    encoder = loaded(minilm)
    assert quantising.stayed(encoder._engine.errors) == ["layers.0.down"]
    cosines = (encoder.encode(texts) * right).sum(1)
    assert cosines.mean() >= 0.997
    assert cosines.min() >= 0.99


def test_the_dtype_says_fp8_and_activations_are_bfloat16(checkpoint: Callable[[str], Path]) -> None:
    encoder = Encoder(checkpoint("qwen3"), device="cpu", dtype=torch.float8_e4m3fn, backend="reference")
    assert encoder.dtype == torch.float8_e4m3fn
    assert encoder.encode("w5 w6", output_value="token_embeddings").dtype == torch.bfloat16
    assert encoder.encode("w5 w6").dtype == np.float32
    assert encoder._loaded.weights.tokens.dtype == torch.bfloat16
    assert dtype_name(torch.float8_e4m3fn) == "fp8"
    assert check_dtype("fp8") == check_dtype(torch.float8_e4m3fn) == torch.float8_e4m3fn


def test_pickles_and_workers_keep_it(checkpoint: Callable[[str], Path]) -> None:
    texts = checkpoints.sentences(LENGTHS)
    encoder = loaded(checkpoint("qwen3"))
    right = encoder.encode(texts)
    again = pickle.loads(pickle.dumps(encoder))
    assert again.dtype == torch.float8_e4m3fn
    assert np.array_equal(again.encode(texts), right)
    if len(cores()) > 1:
        assert np.array_equal(encoder.encode(texts, device=["cpu", "cpu"]), right)
        assert "dtype=fp8 (10 of 10 linear layers" in repr(encoder)


def test_agreement_by_hand() -> None:
    """Rows on a circle, a degree apart: the ten nearest of one in the middle are five on each side."""
    angles = np.radians(np.arange(40.0))
    right = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    cosines, same = verify.agreement(3 * right, right)
    assert cosines == pytest.approx(np.ones(40))
    assert same == 1
    other = right.copy()
    other[20] = -other[20]  # nobody's neighbour any more, and its own are the ten at the ends
    cosines, same = verify.agreement(other, right)
    assert cosines.min() == pytest.approx(-1)
    assert np.argmin(cosines) == 20
    assert same == pytest.approx(1 - (10 + 10) / 400)


def test_verify_says_how_near_to_float32_it_is(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = loaded(minilm)
    check = verify.beside_float32(encoder)
    assert (check.name, check.outcome) == ("beside float32", "pass")
    assert "38 texts: mean cosine 0.99" in check.detail
    assert 0.85 <= float(check.detail.rpartition("top-10 agreement ")[2]) < 1
    monkeypatch.setattr(verify, "encode", lambda encoder, texts: np.eye(len(texts))[:: -1 if encoder.dtype == torch.float32 else 1])
    assert verify.beside_float32(encoder).outcome == "FAIL"

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(verify, "encode", full)
    assert verify.beside_float32(encoder).outcome == "not checkable"


@pytest.mark.parametrize(("dtype", "there"), [("int8", True), ("fp8", True), ("bfloat16", False)])
def test_verify_asks_it_of_eight_bits(dtype: str, there: bool, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "against_original", lambda answers: [])
    model = checkpoint("qwen3")
    found = verify.verify(lambda: Encoder(model, device="cpu", dtype=dtype, backend="reference"), str(model), as_id=None, against=None)[1]
    assert any(each.name == "beside float32" for each in found) == there


# Refusals


def card(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> list[torch.device]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[torch.device(device).index])
    return [torch.device("cuda", n) for n in range(len(capabilities))]


def test_old_cards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_eight_bits(torch.float8_e4m3fn, card(monkeypatch, (8, 9), (9, 0), (12, 0)), None)
    sentence = r"dtype is 'fp8', which needs compute capability 8\.9 or newer, but cuda:1 has 8\.6\. Use dtype='int8' or 'bfloat16'\."
    with pytest.raises(ValueError, match=sentence):
        check_eight_bits(torch.float8_e4m3fn, card(monkeypatch, (9, 0), (8, 6)), None)
    sentence = r"'fp8', which needs compute capability 8\.9 or newer, but cuda:0 has 7\.5\. No eight bits run there; use dtype='float32'\."
    with pytest.raises(ValueError, match=sentence):
        check_eight_bits(torch.float8_e4m3fn, card(monkeypatch, (7, 5)), None)
    check_eight_bits(torch.bfloat16, card(monkeypatch, (7, 5)), None)


@pytest.mark.parametrize("backend", [None, "kernels"])
def test_on_a_cpu_plain_pytorch_alone(backend: str | None, checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"dtype is 'fp8' and device 'cpu', .*: backend='reference' takes that\. Use dtype='int8'"):
        Encoder(checkpoint("qwen3"), device="cpu", dtype="fp8", backend=backend)


def test_the_command_line(checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_text("w5\n")
    where = [str(checkpoint("bert")), "--dtype", "fp8", "--device", "cpu"]
    assert main(["encode", *where, str(tmp_path / "in.txt"), "-o", str(tmp_path / "out.npy"), "-q"]) == 2
    assert "dtype is 'fp8' and device 'cpu'" in capsys.readouterr().err
    assert main(["info", *where]) == 2
    assert "dtype is 'fp8' and device 'cpu'" in capsys.readouterr().err


def test_info_of_a_card(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    card(monkeypatch, (8, 9))
    assert main(["info", str(checkpoint("bert")), "--dtype", "fp8", "--device", "cuda:0"]) == 0
    out = capsys.readouterr().out
    assert "cuda:0 in fp8" in out
    assert "which linear layers stay bfloat16" in out
