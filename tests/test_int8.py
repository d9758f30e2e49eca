"""dtype="int8": the arithmetic of one layer, the rule by which layers stay bfloat16, and whole models."""

from __future__ import annotations

import math
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from checkpoints import error
from safetensors.torch import load_file, save_file
from test_loading import CONFIG, write_model
from test_lora import train
from torch import Tensor

from pyembed import Encoder, int8, quantising, weights
from pyembed.cli import main
from pyembed.int8 import Int8, exact_product, quantise_rows, quantise_weight
from pyembed.linear import FUSED, Linear, linear
from pyembed.ops import reference
from pyembed.options import cores

FAMILY_CASES = ("llama-biases", "qwen3", "gemma2", "embeddinggemma", "bert", "gptj", "gpt-neox", "opt", "bloom", "embedding_gemma2")
LENGTHS = (1, 2, 5, 17, 33, 40, 64, 75)
Made = Callable[[Tensor, Tensor | None], Linear]


def data(tokens: int = 48, inputs: int = 515, outputs: int = 77) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that lie on one side of zero, as GELU leaves them, of sizes from 0.1 to 10; outputs of sizes that differ as much; a bias."""
    draw = torch.Generator().manual_seed(0)
    x = torch.nn.functional.gelu(2 * torch.randn(tokens, inputs, generator=draw)) * torch.logspace(-1, 1, tokens)[:, None]
    w = torch.randn(outputs, inputs, generator=draw) * torch.logspace(-2, 0, outputs)[:, None]
    return x, w, torch.randn(outputs, generator=draw)


# One layer


def test_rows_by_hand() -> None:
    x = torch.tensor([[-1.0, 0.0, 1.5, 0.001], [2.0, 4.0, 5.1, 0.0], [-5.1, -1.0, -2.0, -0.03], [0.0, 0.0, 0.0, 0.0]])
    q, zero, scale = quantise_rows(x)
    assert (q.dtype, zero.dtype, scale.dtype) == (torch.uint8, torch.int32, torch.float32)
    assert zero.tolist() == [102, 0, 255, 0]
    assert q.tolist() == [[0, 102, 255, 102], [100, 200, 255, 0], [0, 205, 155, 253], [0, 0, 0, 0]]  # -0.03 is 1.5 steps: to the even one
    assert torch.allclose(scale[:3], torch.tensor([2.5, 5.1, 5.1]) / 255)
    assert ((q - zero[:, None]) * scale[:, None] - x).abs().max() <= 0.5 * scale.max() * 1.001


def test_weights_by_hand() -> None:
    values, scale, sums = quantise_weight(torch.tensor([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0], [-254.0, 3.0, 1.0]]))
    assert (values.dtype, scale.dtype, sums.dtype) == (torch.int8, torch.float32, torch.int32)
    assert values.tolist() == [[127, -50, 0], [0, 0, 0], [-127, 2, 0]]  # 1.5 and 0.5 steps: to the even one
    assert sums.tolist() == [77, 0, -125]
    assert scale[[0, 2]].tolist() == pytest.approx([0.01, 2.0])


def test_a_weight_is_quantised_in_pieces_like_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = data()[1]
    whole = quantise_weight(weight)
    monkeypatch.setattr(int8, "CHUNK", 4 * 515 + 1)
    assert all(torch.equal(ours, right) for ours, right in zip(quantise_weight(weight), whole, strict=True))
    assert torch.equal(whole[2], whole[0].long().sum(1).int())


@pytest.mark.parametrize("vnni", [True, False])
def test_the_product_is_exact(monkeypatch: pytest.MonkeyPatch, vnni: bool) -> None:
    if vnni and not torch.cpu._is_vnni_supported():
        pytest.skip("no VNNI")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    draw = torch.Generator().manual_seed(1)
    q = torch.randint(0, 256, (19, 4099), generator=draw, dtype=torch.uint8)
    values = torch.randint(-127, 128, (33, 4099), generator=draw, dtype=torch.int8)
    q[0], values[0], values[1] = 255, 127, -127  # the largest sums there are
    right = q.long() @ values.long().T
    assert torch.equal(exact_product(q, values, values.sum(1, dtype=torch.int32)).long(), right)
    assert right.abs().max() == 4099 * 255 * 127
    for inputs in (1, 2, 3):
        right = q[:, :inputs].long() @ values[:, :inputs].long().T
        assert torch.equal(exact_product(q[:, :inputs], values[:, :inputs], values[:, :inputs].sum(1, dtype=torch.int32)).long(), right)


@pytest.mark.parametrize("act", [None, *FUSED])
def test_the_order_of_rounding(act: str | None) -> None:
    """Bit for bit the same formula in numpy's float32."""
    x, w, b = (each.bfloat16() for each in data())
    layer = int8.int8(w, b)
    q, zero, scale = (each.numpy() for each in quantise_rows(x))
    sums = layer.values.numpy().astype(np.int64)
    whole = q.astype(np.int64) @ sums.T - zero[:, None].astype(np.int64) * sums.sum(1)
    y = whole.astype(np.float32) * (scale[:, None] * layer.scale.numpy()) + b.float().numpy()
    right = torch.from_numpy(y)
    if act is not None:
        right = torch.relu(right) if act == "relu" else reference.gelu(right, tanh=act == "gelu_tanh")
    ours = layer.apply(x, act=act)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, right.bfloat16())
    assert not torch.equal(ours, right.bfloat16() + torch.finfo(torch.bfloat16).eps)
    assert layer.fuses == set(FUSED)


def test_rows_that_are_not_finite_are_nan_and_alone_in_that() -> None:
    x, w, b = data(8)
    layer, x = int8.int8(w, b), x.bfloat16()
    right = layer.apply(x)
    x[1, 3], x[2, 4], x[3, 0], x[4, :2] = math.nan, math.inf, -math.inf, torch.tensor([3e38, -3e38])
    x[5], x[6] = 0, 0
    ours = layer.apply(x)
    assert ours[1:5].isnan().all()
    assert torch.equal(ours[5:7], b.bfloat16().expand(2, -1))
    assert torch.equal(ours[[0, 7]], right[[0, 7]])


def test_too_many_inputs_are_refused() -> None:
    assert int8.MOST_INPUTS == 66_311
    assert int8.int8(torch.ones(1, 66_311), None).apply(torch.ones(1, 66_311)).item() == pytest.approx(66_311)
    with pytest.raises(ValueError, match=r"66,312 inputs; in int8 at most 66,311 .* Use dtype='bfloat16'"):
        int8.int8(torch.ones(1, 66_312), None)


def expected_error(x: Tensor, w: Tensor, layer: Int8) -> Tensor:
    """The root mean square of the errors of y, [T, O], that values rounded to the nearest step make: uniform within half a step."""
    step, steps = quantise_rows(x)[2], layer.scale
    return ((step[:, None] * w.norm(dim=1)).square() + (x.norm(dim=1)[:, None] * steps).square()).div(12).sqrt()


def excess(y: Tensor, x: Tensor, w: Tensor, layer: Int8) -> float:
    """The error of y beside what is expected; 1 is what rounding alone makes."""
    right = x.double() @ w.double().T
    return float(((y - right) / expected_error(x, w, layer)).square().mean().sqrt())


def test_the_error_is_what_rounding_makes_and_that_of_wrong_variants_is_more() -> None:
    x, w, _ = data(inputs=77 * 6, outputs=77 * 6)  # square, so that scales can be taken for those of the inputs
    layer = int8.int8(w, None)
    q, zero, scale = quantise_rows(x)
    dequantised = (q - zero[:, None]) * scale[:, None]
    assert excess(layer.apply(x), x, w, layer) <= 1.05
    values, unsigned = layer.values.float(), q.float()
    largest = x.abs().amax(1, keepdim=True) / 127
    one = (x.max() - x.min()) / 255
    variants = {
        "symmetric": ((x / largest).round() * largest) @ (values * layer.scale[:, None]).T,
        "no zero": (unsigned * scale[:, None]) @ (values * layer.scale[:, None]).T,
        "one scale for all rows": ((x / one).round() * one) @ (values * layer.scale[:, None]).T,
        "one scale for all weights": dequantised @ ((w / w.abs().max() * 127).round() * w.abs().max() / 127).T,
        "scales of the inputs": dequantised @ (values * layer.scale[None, :]).T,
        "weights cut off": dequantised @ ((w / layer.scale[:, None]).trunc() * layer.scale[:, None]).T,
        "rows cut off": ((x / scale[:, None]).floor() * scale[:, None]) @ (values * layer.scale[:, None]).T,
    }
    for name, y in variants.items():
        assert excess(y, x, w, layer) >= 1.3, name


# The rule


def outlier_in_bert(tensors: dict[str, Tensor]) -> None:
    """A unit of the second layer that is 200 whatever the text; the bias takes what it adds away again."""
    at = "encoder.layer.1."
    tensors[f"{at}intermediate.dense.weight"][3], tensors[f"{at}intermediate.dense.bias"][3] = 0, 200
    tensors[f"{at}output.dense.bias"] -= 200 * tensors[f"{at}output.dense.weight"][:, 3]


def outlier_in_qwen3(factor: float) -> Callable[[dict[str, Tensor]], None]:
    """A number before the second layer's MLP that is `factor` times as large, with weights that are as much smaller."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["layers.1.post_attention_layernorm.weight"][5] *= factor
        for name in ("gate", "up"):
            tensors[f"layers.1.mlp.{name}_proj.weight"][:, 5] /= factor

    return change


OUTLIERS = {
    "bert": (outlier_in_bert, ["layers.1.down"]),
    "qwen3": (outlier_in_qwen3(1024.0), ["layers.1.up"]),
    "qwen3, weights": (outlier_in_qwen3(1 / 1024), ["layers.1.up"]),
}


def distance(directory: Path, dtype: str, **arguments: str) -> float:
    """The mean distance of vectors from those in float32."""
    texts = checkpoints.sentences(LENGTHS)
    right = torch.from_numpy(Encoder(directory, device="cpu", dtype="float32").encode(texts))
    return float(error(Encoder(directory, device="cpu", dtype=dtype, **arguments).encode(texts), right).mean())


@pytest.mark.parametrize("case", OUTLIERS)
def test_layers_that_lose_too_much_stay_bfloat16(
    case: str, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, stay = OUTLIERS[case]
    source = checkpoint(case.partition(",")[0])
    healthy = distance(source, "int8")
    model = tmp_path / "model"
    shutil.copytree(source, model)
    tensors = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, model / "model.safetensors")
    encoder = Encoder(model, device="cpu", dtype="int8")
    errors = encoder._engine.errors
    assert quantising.stayed(errors) == stay
    assert f"dtype=int8 (12 of 13 linear layers; in bfloat16: {stay[0]})" in repr(encoder)
    others = [value for name, value in errors.items() if name not in stay]
    assert max(others) <= 0.8 * quantising.LIMIT
    assert errors[stay[0]] >= 4 * quantising.LIMIT
    with_rule = distance(model, "int8")
    assert with_rule <= max(1.25 * healthy, distance(model, "bfloat16") + healthy)
    monkeypatch.setattr(quantising, "LIMIT", math.inf)
    assert distance(model, "int8") >= 3 * with_rule


def test_what_all_tokens_have_in_common_hides_no_error() -> None:
    """The plain relative error of a layer with a large constant is small, while nothing is left of what tells tokens apart."""
    x, w, _ = data()
    x[:, 0], w[:, 0] = 3000.0, 1.0
    right, ours = x @ w.T, int8.int8(w, None).apply(x)
    assert (ours - right).norm() / right.norm() <= 0.3 * quantising.LIMIT
    assert quantising.error(ours, right) >= 3 * quantising.LIMIT


def test_the_error_is_nan_or_infinite_where_it_says_nothing() -> None:
    y = torch.ones(4, 3)
    for ours in (y, y + 1, y * math.nan):
        assert not quantising.error(ours, y) <= quantising.LIMIT


def test_a_tokenizer_that_does_not_know_the_probe_reads_words_of_its_own(minilm: Path, checkpoint: Callable[[str], Path]) -> None:
    real, own = (Encoder(model, device="cpu") for model in (minilm, checkpoint("bert")))
    ids = quantising.probe(real.tokenizer, real.spec.model.vocab_size)
    assert [each.tolist() for each in ids] == [each.tolist() for each in real.tokenizer.encode(quantising.TEXTS, None).ids]
    ids = quantising.probe(own.tokenizer, own.spec.model.vocab_size)
    assert all((each[0], each[-1]) == (2, 3) for each in ids)
    joined = np.concatenate(ids)
    assert len(np.unique(joined)) >= 20
    assert joined.max() < checkpoints.VOCABULARY


# Models


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_families(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    projected = checkpoints.PROJECTED.get(name)
    model = checkpoint(name) if projected is None else checkpoints.save(projected, tmp_path)
    lost = distance(model, "bfloat16")
    assert 1.5 * lost <= distance(model, "int8", **({} if backend is None else {"backend": backend})) <= 5 * lost

    def swapped(weight: Tensor, bias: Tensor | None) -> Linear:
        made = int8.int8(weight, bias)
        return Int8(made.values, made.scale.flip(0), made.sums, made.bias)

    monkeypatch.setattr(quantising, "LIMIT", math.inf)
    monkeypatch.setattr(quantising, "int8", swapped)
    assert distance(model, "int8") >= 6 * lost


class Symmetric(Int8):
    """A layer whose activations are quantised with a zero in the middle."""

    @property
    def fuses(self) -> frozenset[str]:
        return frozenset()

    def apply(self, x: Tensor, *, act: str | None = None) -> Tensor:
        largest = x.float().abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
        y = ((x.float() / largest).round() * largest) @ (self.values * self.scale[:, None]).T
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def symmetric(weight: Tensor, bias: Tensor | None) -> Int8:
    made = int8.int8(weight, bias)
    return Symmetric(made.values, made.scale, made.sums, made.bias)


def test_minilm(minilm: Path, docstrings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = docstrings[::20]
    right = Encoder(minilm, device="cpu", dtype="float32").encode(texts)
    encoder = Encoder(minilm, device="cpu", dtype="int8")
    assert "dtype=int8 (25 of 25 linear layers)" in repr(encoder)
    cosines = (encoder.encode(texts) * right).sum(1)
    assert cosines.mean() >= 0.9987
    assert cosines.min() >= 0.996
    monkeypatch.setattr(quantising, "int8", symmetric)
    monkeypatch.setattr(quantising, "LIMIT", math.inf)
    wrong = Encoder(minilm, device="cpu", dtype="int8", backend="reference").encode(texts[::4])
    assert (wrong * right[::4]).sum(1).mean() <= 0.9982


def test_the_dtype_says_int8_and_activations_are_bfloat16(checkpoint: Callable[[str], Path]) -> None:
    encoder = Encoder(checkpoint("qwen3"), device="cpu", dtype=torch.int8)
    assert encoder.dtype == torch.int8
    assert encoder.encode("w5 w6", output_value="token_embeddings").dtype == torch.bfloat16
    assert encoder.encode("w5 w6").dtype == np.float32
    plain = Encoder(checkpoint("qwen3"), device="cpu", dtype="int8", backend="reference")
    layer = plain._loaded.weights.layers[0]
    for each in (*layer.qkv, layer.out, layer.up, layer.down):
        assert isinstance(each, Int8)
    assert encoder._loaded.weights.tokens.dtype == torch.bfloat16


def test_pickles_workers_and_moves_keep_it(checkpoint: Callable[[str], Path]) -> None:
    texts = checkpoints.sentences(LENGTHS)
    encoder = Encoder(checkpoint("bert"), device="cpu", dtype="int8")
    right = encoder.encode(texts)
    again = pickle.loads(pickle.dumps(encoder))
    assert again.dtype == torch.int8
    assert np.array_equal(again.encode(texts), right)
    if len(cores()) > 1:
        assert np.array_equal(encoder.encode(texts, device=["cpu", "cpu"]), right)
        assert "dtype=int8 (13 of 13 linear layers)" in repr(encoder)


def test_adapters_are_merged_before(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    base = checkpoint("qwen3")
    adapter = train(base, tmp_path / "adapter", target_modules="all-linear")
    texts = checkpoints.sentences(LENGTHS)

    def vectors(dtype: str, adapters: list[Path]) -> Tensor:
        return torch.from_numpy(Encoder(base, adapters=adapters, device="cpu", dtype=dtype).encode(texts))

    right, ours = vectors("float32", [adapter]), vectors("int8", [adapter])
    assert error(ours, right).mean() <= 5 * error(vectors("bfloat16", [adapter]), right).mean()
    assert error(vectors("int8", []), right).mean() >= 0.5


def test_what_is_refused(checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="dtype is 'uint8'; expected 'auto', 'float32', 'bfloat16', 'float16', 'int8'"):
        Encoder(checkpoint("qwen3"), dtype="uint8")
    assert main(["info", str(checkpoint("qwen3")), "--dtype", "int8", "--device", "cpu"]) == 0
    assert "cpu in int8" in (out := capsys.readouterr().out)
    assert "which linear layers stay bfloat16" in out


def test_the_command_line(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    texts = checkpoints.sentences((3, 9))
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n")
    options = ["--dtype", "int8", "--device", "cpu", "-q"]
    assert main(["encode", str(checkpoint("bert")), str(tmp_path / "in.txt"), "-o", str(tmp_path / "out.npy"), *options]) == 0
    assert np.array_equal(np.load(tmp_path / "out.npy"), Encoder(checkpoint("bert"), device="cpu", dtype="int8").encode(texts))


def test_weights_that_are_nan_are_named(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint("bert"), model)
    tensors = load_file(model / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][0, 0] = math.nan
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output\.dense\.weight' has NaN"):
        Encoder(model, device="cpu", dtype="int8")


MEASURE = """
import sys, threading, time, torch
from pyembed import Encoder, quantising
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
quantising.int8(torch.ones(64, 64), None).apply(torch.ones(16, 64).bfloat16())
torch.nn.functional.linear(torch.ones(16, 16), torch.ones(16, 16))
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
thread = threading.Thread(target=watch, daemon=True); thread.start()
quantising.LIMIT = float("inf")
encoder = Encoder(sys.argv[1], device="cpu", dtype="int8", pooling="lasttoken", causal=True)
done = True; thread.join()
print(peak - before)
"""


def test_loading_never_holds_the_model_in_bfloat16(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 32, "vocab_size": 1000}
    model = write_model(tmp_path / "larger", CONFIG | sizes | {"num_attention_heads": 16, "num_key_value_heads": 8}, modules=False)
    count = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    run = subprocess.run([sys.executable, "-c", MEASURE, str(model)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert count <= int(run.stdout) <= 1.8 * count, f"{int(run.stdout) / count:.3f} bytes a weight; bfloat16 has 2"


def test_ordinary_loading_makes_the_same_layers_as_before(checkpoint: Callable[[str], Path]) -> None:
    """The reader of a layer, called late, gives what it gives at once: rows of the last layer's projection apart among them."""
    encoder = Encoder(checkpoint("qwen3"), device="cpu", dtype="bfloat16")
    spec, stack = encoder.spec, encoder._stack
    readers: list[quantising.Read] = []

    def kept(read: quantising.Read, gated: bool) -> Linear:
        readers.append(read)
        return linear(*read())

    with torch.inference_mode():
        given = (stack.weights, spec.model, encoder._family.tensors, [], torch.device("cpu"), torch.bfloat16)
        made = weights.load(*given, make=kept)
        first = [tuple(each.clone() for each in read() if each is not None) for read in readers]
        again = [tuple(each.clone() for each in read() if each is not None) for read in reversed(readers)]
    assert len(readers) == 4 * len(made.layers) + 1
    for one, other in zip(first, reversed(again), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
