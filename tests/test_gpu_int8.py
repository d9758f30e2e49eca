"""dtype="int8" as a CUDA device has it, computed on a CPU: the arithmetic of one layer, what a card takes, whole models, refusals."""

from __future__ import annotations

import math
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
from safetensors.torch import load_file, save_file
from test_fp8 import card, data, distance, layer_calls, made
from test_int8 import outlier_in_bert
from torch import Tensor

from pyembed import Encoder, int8, quantising, symmetric
from pyembed.cli import main
from pyembed.int8 import Int8, signed_product
from pyembed.ops import Quantised, reference
from pyembed.options import check_eight_bits
from pyembed.steady import steady
from pyembed.symmetric import Symmetric

LENGTHS = (1, 2, 5, 17, 33, 40, 64, 75)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card's scheme, and its torch._int_mm, which refuses what a card's does."""
    product = torch._int_mm

    def strict(rows: Tensor, columns: Tensor) -> Tensor:
        assert rows.shape[0] > 16, "torch._int_mm: self.size(0) needs to be greater than 16"
        assert rows.shape[1] % 8 == 0 and columns.shape[1] % 8 == 0, "torch._int_mm: a multiple of 8"
        assert rows.is_contiguous() and columns.T.is_contiguous()
        return product(rows, columns)

    monkeypatch.setattr(quantising, "is_symmetric", lambda dtype, device: True)
    monkeypatch.setattr(torch, "_int_mm", strict)


def loaded(directory: Path) -> Encoder:
    return Encoder(directory, device="cpu", dtype="int8", backend="reference")


# One layer


def test_which_scheme_is_whose() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    given = [(torch.int8, cpu), (torch.int8, cuda), (torch.float8_e4m3fn, cpu), (torch.float8_e4m3fn, cuda)]
    assert [quantising.is_symmetric(*each) for each in given] == [False, True, True, True]


def test_the_arithmetic() -> None:
    """Bit for bit against numpy; variants next door are off."""
    x, w, b = data()
    layer = made(w, b, "int8")
    assert (layer.values.dtype, layer.scale.dtype, layer.wants, layer.fuses) == (torch.int8, torch.float32, "int8", frozenset())

    def transcribed(rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        wide = rows.float().numpy()
        scale = np.abs(wide).max(1) / np.float32(127)
        return np.round(wide / scale[:, None]).astype(np.int64), scale

    (q, scale), (values, scales) = transcribed(x), transcribed(w)
    assert np.array_equal(layer.values.numpy(), values)
    assert np.array_equal(layer.scale.numpy(), scales)
    rows = reference.quantised(x, "int8")
    assert np.array_equal(rows.values.numpy(), q)
    assert np.array_equal(rows.scale.numpy(), scale)

    product, bias = (q @ values.T).astype(np.float32), b.float().numpy()
    steps = scale[:, None] * scales
    y = layer.apply(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch.from_numpy(product * steps + bias).bfloat16())
    whole = product * steps
    variants = {
        "no bias": whole,
        "rounded before the bias": torch.from_numpy(whole).bfloat16().float().numpy() + bias,
        "scales of other rows": product * (scale[::-1, None] * scales) + bias,
        "scales of other outputs": product * (scale[:, None] * scales[::-1]) + bias,
        "one scale of rows": product * (scale.max() * scales) + bias,
        "weights as they were": (q * scale[:, None]).astype(np.float32) @ w.float().numpy().T + bias,
        "rows as they were": x.float().numpy() @ (values * scales[:, None]).T.astype(np.float32) + bias,
    }
    for name, wrong in variants.items():
        assert (y != torch.from_numpy(wrong).bfloat16()).double().mean() >= 0.1, name
    assert torch.equal(layer.apply(rows), y)
    assert torch.equal(made(w, None, "int8").apply(x), torch.from_numpy(whole).bfloat16())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("rows", [0, 1, 16, 17, 32])
def test_as_few_rows_as_there_are(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card multiplies no fewer than 17."""
    x, w, b = data(40)
    layer = made(w, b, "int8")
    right = layer.apply(x)
    assert torch.equal(layer.apply(x[:rows]), right[:rows])
    q = reference.quantised(x[:rows], "int8").values
    assert torch.equal(signed_product(q, layer.values).long(), q.long() @ layer.values.long().T)
    assert signed_product(q, layer.values).is_contiguous()
    if 0 < rows <= 16 and torch.cpu._is_vnni_supported():  # else this CPU multiplies in float64
        monkeypatch.setattr(int8, "TOO_FEW", 0)
        with pytest.raises(AssertionError, match="greater than 16"):
            layer.apply(x[:rows])


@pytest.mark.parametrize("vnni", [True, False])
def test_the_largest_sums_there_are_are_exact(vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not vnni or not torch.cpu._is_vnni_supported():
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert symmetric.MOST_INPUTS == 133_144
    inputs = 133_136  # the largest multiple of 16
    layer = made(torch.ones(16, inputs), None, "int8")
    assert layer.wants is None  # no kernel gives rows so wide
    assert layer.apply(torch.ones(1, inputs).bfloat16()).tolist() == [[float(torch.tensor(inputs).bfloat16())] * 16]
    whole = signed_product(torch.full((1, inputs), 127, dtype=torch.int8), layer.values)
    assert whole.tolist() == [[127 * 127 * inputs] * 16]
    wider = torch.ones(16, inputs + 16)
    assert symmetric.symmetric(wider, None, "int8", reference) is None
    assert symmetric.symmetric(wider, None, "fp8", reference) is not None


def test_rows_that_are_not_finite_are_nan_and_alone_in_that() -> None:
    x, w, b = data(9)
    layer = made(w, b, "int8")
    right = layer.apply(x)
    x[1, 3], x[2, 4], x[3, 0] = math.nan, math.inf, -math.inf
    x[4], x[5] = math.nan, math.inf
    x[6], x[7] = 0, -0.0
    for rows in (x, reference.quantised(x, "int8")):
        ours = layer.apply(rows)
        assert ours[1:6].isnan().all()
        assert torch.equal(ours[6:8], b.expand(2, -1))
        assert torch.equal(ours[[0, 8]], right[[0, 8]])


@pytest.mark.usefixtures("gpu")
def test_products_of_a_fixed_number_of_rows_have_the_same_bits() -> None:
    """deterministic=True: rows that are given in eight bits are cut and filled up as well."""
    x, w, b = data(300)
    layer = made(w, b, "int8")
    right, fixed = layer.apply(x), steady(layer, 256)
    assert fixed.wants == "int8"
    for rows in (x, reference.quantised(x, "int8")):
        assert torch.equal(fixed.apply(rows), right)
    some = Quantised(*(getattr(reference.quantised(x, "int8"), each)[:9] for each in ("values", "scale")))
    assert torch.equal(fixed.apply(some), right[:9])


def test_massive_activations_into_the_down_projection() -> None:
    """Units a thousand times as large: in one token they cost that token alone; in all tokens the rule sees what they cost."""
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 512, generator=draw), torch.randn(128, 512, generator=draw)

    def lost(rows: Tensor) -> float:
        right = rows.bfloat16().float() @ w.bfloat16().float().T
        return quantising.error(made(w.bfloat16(), None, "int8").apply(rows.bfloat16()).float(), right)

    plain = lost(x)
    assert 0.009 <= plain <= 0.012  # fp8: 0.036
    some = x.clone()
    some[0, 7] = 3000.0
    assert abs(lost(some) - plain) <= 0.001
    assert lost(x * 1000) == pytest.approx(plain, rel=0.05)
    x[:, 7] = 30.0
    assert lost(x) >= quantising.LIMIT
    x[:, 7] = 3000.0
    assert lost(x) >= 10 * quantising.LIMIT


# Models


@pytest.mark.usefixtures("gpu")
def test_attentions_output_is_a_layer_like_any_other(checkpoint: Callable[[str], Path]) -> None:
    encoder = loaded(checkpoint("qwen3"))
    assert "dtype=int8 (13 of 13 linear layers), mask" in repr(encoder)
    for layer in encoder._loaded.weights.layers:
        assert all(isinstance(each, Symmetric) and each.quant == "int8" for each in (*layer.qkv, layer.out, layer.up, layer.down))


def test_a_cpu_keeps_its_own_scheme(checkpoint: Callable[[str], Path]) -> None:
    assert isinstance(loaded(checkpoint("qwen3"))._loaded.weights.layers[0].up, Int8)


@pytest.mark.usefixtures("gpu")
def test_layers_that_a_card_does_not_take_stay(tmp_path: Path) -> None:
    directory = checkpoints.save(checkpoints.LLAMA.but(intermediate_size=72), tmp_path)
    assert quantising.stayed(loaded(directory)._engine.errors) == ["layers.0.down", "layers.1.down", "layers.2.down"]


@pytest.mark.usefixtures("gpu")
def test_a_model_with_massive_activations_keeps_that_layer(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint("bert"), model)
    tensors = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    outlier_in_bert(tensors)
    save_file(tensors, model / "model.safetensors")
    errors = loaded(model)._engine.errors
    assert errors["layers.1.down"] >= 4 * quantising.LIMIT
    assert "layers.1.down" in quantising.stayed(errors)
    with_rule = distance(model, "int8")
    assert with_rule <= distance(checkpoint("bert"), "int8") + distance(model, "bfloat16")
    monkeypatch.setattr(quantising, "LIMIT", math.inf)
    assert distance(model, "int8") >= 3 * with_rule


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", ["llama-biases", "gemma2", "bert", "gptj", "opt", "bloom"])
def test_families(name: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantising, "LIMIT", math.inf)
    lost, ours = distance(checkpoint(name), "bfloat16"), distance(checkpoint(name), "int8")
    assert 1.5 * lost <= ours <= 6 * lost

    def swapped(weight: Tensor, bias: Tensor | None, *how: Any) -> Symmetric:
        layer = made(weight, bias, "int8")
        return replace(layer, scale=layer.scale.flip(0))

    monkeypatch.setattr(quantising, "symmetric", swapped)
    assert distance(checkpoint(name), "int8") >= 1.5 * ours


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("name", "own"), [("qwen3", 3), ("bert", 3 + 7)])
def test_alone_in_any_batch_and_whoever_makes_the_rows(
    name: str, own: int, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantising, "LIMIT", math.inf)
    torch.set_num_threads(1)
    texts = checkpoints.sentences(LENGTHS)
    encoder = loaded(checkpoint(name))
    alone = np.stack([encoder.encode(text) for text in texts])
    order = random.Random(0).sample(range(len(texts)), len(texts))
    assert (encoder.encode([texts[i] for i in order], batch_size=3) == alone[order]).all()
    calls = layer_calls(monkeypatch)
    assert (encoder.encode(texts) == alone).all()
    assert (len(calls), calls.count(False)) == (13, own)
    monkeypatch.setattr(Symmetric, "wants", None)
    assert (encoder.encode(texts) == alone).all()
    assert calls[13:] == [False] * 13


@pytest.mark.usefixtures("gpu")
def test_minilm(minilm: Path, docstrings: list[str]) -> None:
    texts = docstrings[::60]
    right = Encoder(minilm, device="cpu", dtype="float32").encode(texts)
    encoder = loaded(minilm)
    assert "(24 of 25 linear layers; in bfloat16: layers.0.down)" in repr(encoder)
    cosines = (encoder.encode(texts) * right).sum(1)
    assert cosines.mean() >= 0.997
    assert cosines.min() >= 0.985


# Refusals


def test_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    check_eight_bits(torch.int8, card(monkeypatch, (8, 0), (8, 6), (9, 0)), "kernels")
    sentence = r"'int8', which needs compute capability 8\.0 or newer, but cuda:1 has 7\.5\. No eight bits run there; use dtype='float32'\."
    for backend in (None, "kernels", "reference"):
        with pytest.raises(ValueError, match=sentence):
            check_eight_bits(torch.int8, card(monkeypatch, (8, 0), (7, 5)), backend)


def test_devices_of_two_kinds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [*card(monkeypatch, (8, 0)), torch.device("cpu")]
    with pytest.raises(ValueError, match=r"device cuda:0, cpu; a CPU's int8 is not a GPU's\. Use devices of one kind, or dtype='bfloat16'"):
        check_eight_bits(torch.int8, devices, None)
    check_eight_bits(torch.bfloat16, devices, None)
    check_eight_bits(torch.int8, [torch.device("cpu")] * 2, None)


def test_info_of_a_card(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for capability, status in (((8, 0), 0), ((7, 5), 2)):
        card(monkeypatch, capability)
        assert main(["info", str(checkpoint("bert")), "--dtype", "int8", "--device", "cuda:0"]) == status
    told = capsys.readouterr()
    assert "cuda:0 in int8" in told.out
    assert "which linear layers stay bfloat16" in told.out
    assert "needs compute capability 8.0 or newer, but cuda:0 has 7.5" in told.err
