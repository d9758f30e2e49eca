"""Layers in panels: int8 beside its oracle bit for bit, bfloat16 and activations under the tolerance rule, and what rows may not do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from op_check import assert_misses, assert_right, hostile, normal
from torch import Tensor

from pyembed.int8 import Int8, exact_product, int8, quantise_rows
from pyembed.ops import Norm, cpu, panels, reference
from pyembed.ops.panels import PAIR_ROWS, Panels

pytestmark = pytest.mark.usefixtures("isa")

KINDS = ("bfloat16", "int8")
ACTS = ("gelu", "gelu_tanh", "relu", "silu")  # the last of gated layers only, relu of plain ones only
CASES = [(act, gated) for act in ACTS for gated in (False, True) if (act != "silu" or gated) and (act != "relu" or not gated)]
# in, out: in is not a multiple of 4, 32 and 64, out not of 32, a gated half not of 16
SIZES = [(1, 1), (3, 5), (34, 50), (65, 33), (130, 98), (384, 64), (515, 77)]
ROWS = [0, 1, 11, 12, 13, 25, 241, 257]


@dataclass(frozen=True)
class Made:
    """A layer in panels, and what it is made of."""

    panels: Panels
    weight: Tensor  # [O, I] bfloat16
    bias: Tensor | None  # [O] bfloat16
    eight: Int8 | None

    def exact(self, x: Tensor, *, bias: Tensor | None = None, scale: Tensor | None = None, shift: int = 1) -> Tensor:
        """x W^T + b in float64: of an int8 layer, of the bytes. The rest makes wrong variants."""
        bias = self.bias if bias is None else bias
        added = 0.0 if bias is None else bias.double()
        if self.eight is None:
            return x.double() @ self.weight.double().T + added
        q, zero, scale_x = quantise_rows(x)
        whole = exact_product(q, self.eight.values, self.eight.sums) - shift * zero[:, None] * self.eight.sums
        return whole.double() * scale_x.double()[:, None] * (self.eight.scale if scale is None else scale).double() + added

    def plain(self, x: Tensor) -> Tensor:
        """x W^T + b in bfloat16, by PyTorch."""
        return F.linear(x, self.weight, self.bias) if self.eight is None else self.eight.apply(x)


def make(kind: str, inputs: int, out: int, *, bias: bool = True, gated: bool = False, seed: int = 1) -> Made:
    """A layer whose outputs differ in size by ten, so that a scale or a bias of another column is seen."""
    sizes = torch.logspace(-1, 0, out)[torch.randperm(out, generator=torch.Generator().manual_seed(seed))]
    weight = (normal(out, inputs, seed=seed) * sizes[:, None] * 2 / math.sqrt(inputs)).bfloat16()
    shift = normal(out, dtype=torch.bfloat16, seed=seed + 1) if bias else None
    if kind == "bfloat16":
        return Made(panels.in_panels(weight, None, None, shift, gated), weight, shift, None)
    eight = int8(weight, shift)
    made = panels.int8(eight, gated=gated)
    assert isinstance(made, Panels)
    return Made(made, weight, shift, eight)


def rows_of(rows: int, inputs: int, seed: int = 0) -> Tensor:
    """Rows of sizes from 0.1 to 10 that lie on one side of zero, as GELU leaves them, and every third one on both."""
    x = 2 * normal(rows, inputs, seed=seed)
    x = torch.where(torch.arange(rows)[:, None] % 3 == 0, x, F.gelu(x)) * torch.logspace(-1, 1, max(rows, 1))[:rows, None]
    return x.bfloat16()


def activated(x: Tensor, act: str | None, gated: bool) -> Tensor:
    """In the dtype of x, bfloat16 or float64."""
    if gated:
        return reference.swiglu(x) if act == "silu" else reference.geglu(x, tanh=act == "gelu_tanh")
    if act is None:
        return x
    return torch.relu(x) if act == "relu" else reference.gelu(x, tanh=act == "gelu_tanh")


def same(a: Tensor, b: Tensor) -> bool:
    """The same numbers; NaN is NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(7e30), b.nan_to_num(7e30))


# One layer


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_int8_is_the_oracle_bit_for_bit(size: tuple[int, int], bias: bool) -> None:
    made = make("int8", *size, bias=bias)
    assert made.eight is not None
    for rows in ROWS:
        x = rows_of(rows, size[0])
        assert same(made.panels.apply(hostile(x)), made.eight.apply(x)), rows


def test_int8_beside_wrong_oracles() -> None:
    made, x = make("int8", 130, 98), rows_of(25, 130)
    assert made.eight is not None
    assert made.bias is not None
    ours, eight = made.panels.apply(x), made.eight
    assert same(ours, made.exact(x).bfloat16())
    wrong = {
        "no zero": made.exact(x, shift=0),
        "bias of the neighbour": made.exact(x, bias=made.bias.roll(1)),
        "no bias": made.exact(x, bias=torch.zeros(98)),
        "scale of the neighbour": made.exact(x, scale=eight.scale.roll(1)),
        "one scale for all": made.exact(x, scale=eight.scale.amax().expand(98)),
    }
    for name, y in wrong.items():
        assert not same(ours, y.bfloat16()), name
        assert_misses(y, ours, made.exact(x), torch.bfloat16)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_activations(kind: str, case: tuple[str, bool]) -> None:
    act, gated = case
    for inputs, out in [(2, 34), (34, 50), (130, 98), (384, 64)]:
        for bias in (True, False):
            made = make(kind, inputs, out, bias=bias, gated=gated)
            assert act in made.panels.fuses
            for rows in (1, 13, 25):
                x = rows_of(rows, inputs)
                right = activated(made.exact(x), act, gated)
                assert_right(made.panels.apply(hostile(x), act=act), activated(made.plain(x), act, gated), right, torch.bfloat16)


@pytest.mark.parametrize("size", [size for size in SIZES if size[0] % 2 == 0], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_bfloat16_without_an_activation(size: tuple[int, int], bias: bool) -> None:
    made = make("bfloat16", *size, bias=bias)
    for rows in ROWS:
        x = rows_of(rows, size[0])
        assert_right(made.panels.apply(hostile(x)), made.plain(x), made.exact(x), torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_variants_of_activations_miss(kind: str) -> None:
    x = rows_of(25, 130)
    for act, gated in CASES:
        made = make(kind, 130, 98, gated=gated)
        assert made.bias is not None
        inside = made.exact(x)
        right, known = activated(inside, act, gated), activated(made.plain(x), act, gated)
        wrong = {
            "bias of the neighbour": activated(made.exact(x, bias=made.bias.roll(1)), act, gated),
            "no activation": inside[:, :49] * inside[:, 49:] if gated else inside,
        }
        if gated:
            wrong["gate and up swapped"] = activated(inside.roll(49, 1), act, gated)
            wrong["up of the neighbour"] = activated(torch.cat([inside[:, :49], inside[:, 49:].roll(1, 1)], 1), act, gated)
        if made.eight is not None:
            wrong["no zero"] = activated(made.exact(x, shift=0), act, gated)
            wrong["one scale for all"] = activated(made.exact(x, scale=made.eight.scale.amax().expand(98)), act, gated)
        assert_right(made.panels.apply(x, act=act), known, right, torch.bfloat16)
        for y in wrong.values():
            assert_misses(y, known, right, torch.bfloat16)


# What rows hold


def only_neighbours_changed(made: Made, x: Tensor, bad: list[int], act: str | None) -> Tensor:
    """The rows `bad` of the result, after the others were found to be what they are without them."""
    ours, others = made.panels.apply(x, act=act), [i for i in range(len(x)) if i not in bad]
    assert same(ours[others], made.panels.apply(x[others], act=act))
    return ours[bad]


@pytest.mark.parametrize("case", [(None, False), *CASES], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_finite_stay_visible_and_alone(kind: str, case: tuple[str | None, bool]) -> None:
    act, gated = case
    made, x = make(kind, 34, 50, gated=gated), rows_of(25, 34)
    x[3, 7], x[4, 0], x[12, 33], x[24, 1] = math.nan, math.inf, -math.inf, math.nan
    bad = only_neighbours_changed(made, x, [3, 4, 12, 24], act)
    assert bad[[0, 3]].isnan().all()
    if kind == "int8":
        assert bad.isnan().all()
        assert made.eight is not None
        if act is None:
            assert same(made.panels.apply(x), made.eight.apply(x))
    else:
        assert not bad[1:3].isfinite().all(1).any()


@pytest.mark.parametrize("case", [(None, False), *CASES], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_are_exact(kind: str, case: tuple[str | None, bool]) -> None:
    act, gated = case
    for bias in (True, False):
        made = make(kind, 34, 50, bias=bias, gated=gated)
        ours = made.panels.apply(torch.zeros(13, 34, dtype=torch.bfloat16), act=act)
        shift = torch.zeros(50) if made.bias is None else made.bias
        right = activated(shift.double(), act, gated).expand(13, -1)
        assert_right(ours, right.bfloat16(), right, torch.bfloat16)
        if act in (None, "relu") or not bias:
            assert same(ours, right.bfloat16())


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e36])
@pytest.mark.parametrize("kind", KINDS)
def test_huge_and_tiny_rows(kind: str, size: float) -> None:
    x = rows_of(13, 34, seed=4)
    x[5] = -x[5].abs()
    x = (x.float() * size).bfloat16()
    for act, gated in CASES:
        if not gated:
            made = make(kind, 34, 50, bias=False)
            assert_right(made.panels.apply(x), made.plain(x), made.exact(x), torch.bfloat16)
            right, known = activated(made.exact(x), act, False), activated(made.plain(x), act, False)
            assert_right(made.panels.apply(x, act=act), known, right, torch.bfloat16)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
def test_huge_gates(act: str) -> None:
    """Gates of 1e36 beside values of 1: neither of them comes near the end of float32."""
    made = make("bfloat16", 34, 50, bias=False, gated=True)
    made.weight[:25, 17:], made.weight[25:, :17] = 0, 0
    layer, x = panels.in_panels(made.weight, None, None, None, True), rows_of(13, 34, seed=4).float()
    x[:, :17] *= 1e36
    x = x.bfloat16()
    right, known = activated(made.exact(x), act, True), activated(made.plain(x), act, True)
    assert_right(layer.apply(x, act=act), known, right, torch.bfloat16)


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "silu"])
def test_far_below_zero_nothing_is_left(act: str) -> None:
    """Not even the millionth that an approximation may leave of a small number."""
    weight = torch.cat([torch.eye(34), torch.zeros(34, 34)]).bfloat16()  # values are 1, by the bias
    layer = panels.in_panels(weight, None, None, torch.arange(68) // 34, True)
    for size in (100.0, 1e4, 1e10, 1e38):
        x = torch.full((2, 34), size, dtype=torch.bfloat16)
        assert layer.apply(-x, act=act).abs().max() <= 1e-5
        assert torch.allclose(layer.apply(x, act=act), x, rtol=1e-2)


# Rows among others, threads, paths


@pytest.mark.parametrize("case", [(None, False), ("gelu", False), ("silu", True)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_its_bits_alone_among_others_and_with_any_threads(kind: str, case: tuple[str | None, bool]) -> None:
    act, gated = case
    made, x = make(kind, 130, 98, gated=gated), rows_of(300, 130)
    whole = made.panels.apply(x, act=act)
    for start, end in [(0, 1), (7, 8), (299, 300), (5, 16), (5, 17), (5, 18), (100, 125), (0, 256), (0, 257)]:
        assert same(made.panels.apply(x[start:end], act=act), whole[start:end])
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for start in (0, 200, 299):
            assert same(made.panels.apply(x[start:], act=act), whole[start:])


NORMS: dict[str, Callable[[int], Norm]] = {
    "layer": lambda n: Norm(1 + normal(n, seed=7) / 4, normal(n, seed=8), 1e-5, layer=True),
    "rms": lambda n: Norm(1 + normal(n, seed=7) / 4, None, 1e-5),
    "rms, rounded first": lambda n: Norm(1 + normal(n, seed=7) / 4, None, 1e-5, round_first=True),
}


def after(y: Tensor, norm: Norm | None, residual: Tensor | None) -> Tensor:
    if norm is None:
        return y
    op = cpu.layer_norm if norm.layer else cpu.rms_norm
    out = op(y, norm, residual=residual)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("kinds", [(a, b) for a in KINDS for b in KINDS], ids="-".join)
@pytest.mark.parametrize("case", [(None, False), ("gelu", False), ("relu", False), ("silu", True), ("gelu_tanh", True)], ids=str)
def test_two_layers_are_one_after_the_other_bit_for_bit(kinds: tuple[str, str], case: tuple[str | None, bool]) -> None:
    act, gated = case
    for inputs, between, out in [(34, 2, 33), (66, 50, 34), (130, 98, 77)]:
        first = make(kinds[0], inputs, 2 * between if gated else between, gated=gated).panels
        second = make(kinds[1], between, out, seed=5).panels
        norm = NORMS["layer"](out)
        for rows in (0, 1, 13, PAIR_ROWS - 1, PAIR_ROWS, PAIR_ROWS + 5, 241):
            x, stream = rows_of(rows, inputs), rows_of(rows, out, seed=9)
            right = second.apply(first.apply(x, act=act))
            assert same(first.chain(hostile(x), act=act, second=second), right), rows
            ours, theirs = hostile(stream), stream.clone()
            got = first.chain(hostile(x), act=act, second=second, norm=norm, residual=ours)
            assert same(got, after(right, norm, theirs)), rows
            assert same(ours, theirs), rows
            assert torch.equal(ours[:0], theirs[:0])


def test_an_odd_width_between_two_layers() -> None:
    """The library multiplies a bfloat16 layer of an odd number of inputs; in int8 they end within a word."""
    for act, gated in [("gelu", False), ("silu", True)]:
        first, second = make("bfloat16", 34, 74 if gated else 37, gated=gated).panels, make("int8", 37, 33)
        assert second.eight is not None
        x = rows_of(PAIR_ROWS + 5, 34)
        assert same(first.chain(x, act=act, second=second.panels), second.eight.apply(first.apply(x, act=act)))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_after_a_layer(kind: str, name: str) -> None:
    made = make(kind, 34, 50)
    norm = NORMS[name](50)
    for rows in ROWS:
        x, stream = rows_of(rows, 34), rows_of(rows, 50, seed=9)
        plain = made.panels.apply(x)
        assert same(made.panels.chain(x), plain)
        assert same(made.panels.chain(x, norm=norm), after(plain, norm, None))
        ours, theirs = hostile(stream), stream.clone()
        got = made.panels.chain(x, norm=norm, residual=ours)
        assert same(got, after(plain, norm, theirs))
        assert same(ours, theirs)
        if rows > 1:
            assert not same(got, after(plain, norm, None))
            assert not same(got, after(plain, replace(norm, eps=0.1), stream.clone()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_input_may_be_the_residual(kind: str) -> None:
    """As the MLP of a post-norm block has it: rows are read before they are written, whoever computes them."""
    first, second, square = make(kind, 34, 98).panels, make(kind, 98, 34, seed=5).panels, make(kind, 34, 34).panels
    norm = NORMS["layer"](34)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for rows in (1, 13, PAIR_ROWS * 3, 2500):
            x = rows_of(rows, 34)
            for layer, other in [(first, second), (square, None)]:
                ours = x.clone()
                got = layer.chain(ours, act="gelu", second=other, norm=norm, residual=ours)
                theirs = x.clone()
                inside = layer.apply(x, act="gelu")
                assert same(got, after(inside if other is None else other.apply(inside), norm, theirs)), rows
                assert same(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_two_layers_have_the_same_bits_with_any_threads_and_rows(kind: str) -> None:
    first, second = make(kind, 66, 100, gated=True).panels, make(kind, 50, 34, seed=5).panels
    norm, x, stream = NORMS["rms"](34), rows_of(PAIR_ROWS * 3 + 7, 66), rows_of(PAIR_ROWS * 3 + 7, 34, seed=9)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in (1, 13, PAIR_ROWS - 1, PAIR_ROWS, len(x)) if threads == 1 else (PAIR_ROWS * threads - 1, PAIR_ROWS * threads):
            got = first.chain(x[-rows:], act="silu", second=second, norm=norm, residual=stream[-rows:].clone())
            found.append((rows, got))
    whole = next(got for rows, got in found if rows == len(x))
    assert all(same(got, whole[-rows:]) for rows, got in found)


# Refusals


def test_what_does_not_fit_is_refused() -> None:
    first, second = make("bfloat16", 34, 50).panels, make("bfloat16", 48, 34).panels
    x, norm = rows_of(3, 34), NORMS["rms"](50)
    assert first.apply(x).shape == (3, 50)
    for call, sentence in [
        (lambda: first.apply(x.float()), r"x must be a torch\.bfloat16 tensor"),
        (lambda: first.apply(x[:, :33]), r"x must have shape \[-1, 34\]"),
        (lambda: first.apply(x.t().contiguous().t()), "x must have unit stride"),
        (lambda: first.chain(rows_of(500, 34), second=second), "takes 48 columns, but the first gives 50"),
        (lambda: first.chain(x, residual=x), "residual was given without a norm"),
        (lambda: first.chain(x, norm=norm, residual=x), r"residual must have shape \[3, 50\]"),
        (lambda: first.chain(x, norm=norm, residual=torch.zeros(1, 50, dtype=torch.bfloat16).expand(3, 50)), "rows must not overlap"),
        (lambda: first.chain(x, norm=NORMS["rms"](49)), r"norm.weight must have shape \[50\]"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            call()
