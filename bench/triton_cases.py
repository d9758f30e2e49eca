"""What bench/triton_ops.py times: the ops on the shapes of two models, attention on texts of many lengths, each beside the library's."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from pyembed.kernels.activation import geglu, quantised, swiglu
from pyembed.kernels.attention import attention, schedule
from pyembed.kernels.embed import embed
from pyembed.kernels.latent_attention import latent_attention
from pyembed.kernels.layer_norm import layer_norm
from pyembed.kernels.pool import pool
from pyembed.kernels.qk_norm_rope import qk_norm_rope
from pyembed.kernels.rescaled import rescaled
from pyembed.kernels.rms_norm import rms_norm
from pyembed.kernels.tiles import SHORT
from pyembed.ops import Norm, Quantised, reference

OURS, COMPILED = "ours", "torch.compile"
GATE = 4096  # rows of a result that are compared
SHARE = 0.9  # of the copy's rate, which these are to reach
BOUND = ("rms_norm", "layer_norm", "qk_norm_rope", "swiglu", "pool", "rescaled", "quantised")
Wide = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """A model's sizes."""

    tokens: int
    hidden: int
    inner: int
    heads: int
    groups: int
    head: int
    vocabulary: int
    latents: int = 512
    latent_heads: int = 8
    text: int = 512  # tokens


SHAPES = {"0.6B": Shape(65536, 1024, 3072, 16, 8, 128, 151936), "7B": Shape(32768, 4096, 14336, 32, 8, 128, 32000)}


@dataclass(frozen=True)
class Member:
    work: Callable[..., Any]  # of the case's tensors, which it may change
    read: Callable[[Any], Tensor] = lambda y: y  # what is compared of what it gives


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    given: tuple[Tensor, ...]
    members: dict[str, Member]
    oracle: Callable[[Wide], Tensor]  # the reference's result, or its first rows, on tensors that were passed through the function
    bytes: int = 0
    flops: int = 0
    wanted: float | None = None
    against: str = "copy"  # or the member whose time is to be that many times ours
    failed: dict[str, str] = field(default_factory=dict)  # members that could not be made, and why


def told(fault: Exception) -> str:
    """The error in a line, without paths of this machine."""
    lines = [line for line in str(fault).splitlines() if line.strip()]
    return re.sub(r"(/[\w.@+-]+){2,}", "...", f"{type(fault).__name__}: {lines[0] if lines else ''}")[:300]


def norm_case(op: str, shape: Shape, device: str, dtype: torch.dtype, compiled: Any) -> dict[str, Any]:
    layer, width = op == "layer_norm", shape.hidden
    weight, bias = (torch.randn(width, device=device).to(dtype) for _ in range(2))
    norm = Norm(weight.float(), bias.float() if layer else None, 1e-6, layer=layer, round_first=not layer)
    ours, theirs = (layer_norm, reference.layer_norm) if layer else (rms_norm, reference.rms_norm)
    x, stream = (torch.randn(shape.tokens, width, device=device).to(dtype) for _ in range(2))

    def library(x: Tensor, stream: Tensor) -> Tensor:
        stream.add_(x)
        return F.layer_norm(stream, (width,), weight, bias, 1e-6) if layer else F.rms_norm(stream, (width,), weight, 1e-6)

    def plain(x: Tensor, stream: Tensor) -> Any:
        return theirs(x, norm, residual=stream)

    return {
        "given": (x, stream),
        "members": {
            OURS: Member(lambda x, stream: ours(x, norm, residual=stream)),
            f"F.{op}": Member(library),
            COMPILED: Member(compiled(plain)),
        },
        "oracle": lambda wide: plain(wide(x[:GATE]), wide(stream[:GATE].clone())),
        "bytes": 4 * x.nbytes,
    }


def rope_case(shape: Shape, device: str, dtype: torch.dtype, compiled: Any) -> dict[str, Any]:
    qkv = torch.randn(shape.tokens, (shape.heads + 2 * shape.groups) * shape.head, device=device).to(dtype)
    angles = torch.arange(shape.text, device=device)[:, None] * 0.97 ** torch.arange(shape.head // 2, device=device)
    norm = Norm(torch.rand(shape.head, device=device) + 0.5, None, 1e-6, round_first=True)
    usual = {"cos": angles.cos(), "sin": angles.sin(), "q_norm": norm, "k_norm": norm}
    rows = torch.arange(shape.tokens, device=device) % shape.text

    def turned(op: Any, qkv: Tensor) -> Tensor:
        op(qkv, shape.heads, shape.groups, **usual, rows=rows[: len(qkv)])
        return qkv

    read = shape.tokens * (shape.heads + shape.groups) * shape.head * dtype.itemsize
    return {
        "given": (qkv,),
        "members": {OURS: Member(partial(turned, qk_norm_rope)), COMPILED: Member(compiled(partial(turned, reference.qk_norm_rope)))},
        "oracle": lambda wide: turned(reference.qk_norm_rope, wide(qkv[:GATE].clone())),
        "bytes": 2 * read,
    }


def gated_case(op: str, shape: Shape, device: str, dtype: torch.dtype, compiled: Any) -> dict[str, Any]:
    x = torch.randn(shape.tokens, 2 * shape.inner, device=device).to(dtype)
    silu = op == "swiglu"

    def library(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return (F.silu(gate) if silu else F.gelu(gate, approximate="tanh")) * up

    def plain(x: Tensor) -> Any:
        return reference.swiglu(x) if silu else reference.geglu(x, tanh=True)

    return {
        "given": (x,),
        "members": {
            OURS: Member(swiglu if silu else partial(geglu, tanh=True)),
            f"F.{'silu' if silu else 'gelu'} and product": Member(library),
            COMPILED: Member(compiled(plain)),
        },
        "oracle": lambda wide: plain(wide(x[:GATE])),
        "bytes": 3 * x.nbytes // 2,
    }


def pool_case(shape: Shape, device: str, dtype: torch.dtype, compiled: Any) -> dict[str, Any]:
    x = torch.randn(shape.tokens, shape.hidden, device=device).to(dtype) + 0.5
    texts, width = shape.tokens // shape.text, shape.hidden
    cu = torch.arange(texts + 1, device=device, dtype=torch.int32) * shape.text
    spans = torch.stack([cu[:-1], cu[1:]], 1).contiguous()
    norm, few = Norm(torch.rand(width, device=device) + 0.5, None, 1e-6), max(1, min(texts, GATE // shape.text))
    lengths = torch.full((texts,), shape.text, device=device)

    def library(x: Tensor) -> Tensor:
        rows = F.rms_norm(x.float(), (width,), norm.weight, 1e-6)
        return F.normalize(torch.segment_reduce(rows, "mean", lengths=lengths), dim=-1)

    def plain(x: Tensor) -> Tensor:  # what the reference would be if it had texts of one length
        rows = F.rms_norm(x.float(), (width,), norm.weight, 1e-6)
        return F.normalize(rows.view(texts, shape.text, width).mean(1), dim=-1)

    options: dict[str, Any] = {"norm": norm, "normalize": True}
    return {
        "given": (x,),
        "members": {
            OURS: Member(lambda x: pool(x, cu, spans, "mean", **options)),
            "segment_reduce": Member(library),
            f"{COMPILED}, lengths fixed": Member(compiled(plain)),
        },
        "oracle": lambda wide: reference.pool(wide(x), cu[: few + 1], spans[:few], "mean", **options),
        "bytes": x.nbytes + 4 * texts * width,
    }


def embed_case(shape: Shape, device: str, dtype: torch.dtype, compiled: Any) -> dict[str, Any]:
    ids = torch.randint(0, shape.vocabulary, (shape.tokens,), device=device)
    table = torch.randn(shape.vocabulary, shape.hidden, device=device).to(dtype)
    first = torch.arange(min(GATE, shape.tokens), device=device)
    return {
        "given": (ids, table),
        "members": {OURS: Member(embed), "F.embedding": Member(F.embedding), COMPILED: Member(compiled(reference.embed))},
        "oracle": lambda wide: reference.embed(first, wide(table[ids[:GATE]])),
        "bytes": shape.tokens * (2 * shape.hidden * dtype.itemsize + 8),
    }


def latent_case(shape: Shape, device: str, dtype: torch.dtype, compiled: Any) -> dict[str, Any]:
    heads = shape.latent_heads
    scores = torch.randn(shape.tokens, heads * shape.latents, device=device).mul(3).to(dtype)
    return {
        "given": (scores,),
        "members": {
            OURS: Member(partial(latent_attention, heads=heads)),
            "torch.softmax": Member(lambda x: torch.softmax(x.unflatten(1, (heads, -1)), -1).flatten(1)),
            COMPILED: Member(compiled(partial(reference.latent_attention, heads=heads))),
        },
        "oracle": lambda wide: reference.latent_attention(wide(scores[:GATE]), heads),
        "bytes": 2 * scores.nbytes,
    }


def rescaled_case(shape: Shape, device: str, dtype: torch.dtype, compiled: Any) -> dict[str, Any]:
    """Behind the widest product of a model."""
    outputs = 2 * shape.inner
    product = torch.randint(-(10**6), 10**6, (shape.tokens, outputs), dtype=torch.int32, device=device)
    rows, scales = torch.rand(shape.tokens, device=device) + 0.1, torch.rand(outputs, device=device) * 1e-5
    bias = torch.randn(outputs, device=device).bfloat16()

    return {
        "given": (product, rows),
        "members": {
            OURS: Member(lambda product, rows: rescaled(product, rows, scales, bias)),
            "torch.addcmul": Member(lambda product, rows: torch.addcmul(bias.float(), product.float(), rows[:, None] * scales).bfloat16()),
            COMPILED: Member(compiled(lambda product, rows: reference.rescaled(product, rows, scales, bias))),
        },
        "oracle": lambda wide: reference.rescaled(product[:GATE], wide(rows[:GATE]), wide(scales), bias),
        "bytes": 6 * product.numel() + 4 * shape.tokens + 6 * outputs,
    }


def quantised_case(shape: Shape, device: str, dtype: torch.dtype, compiled: Any) -> dict[str, Any]:
    """Held against the rows themselves: what eight bits lose is the error."""
    x = torch.randn(shape.tokens, shape.hidden, device=device).to(dtype)

    def read(y: Quantised) -> Tensor:
        return y.values.float() * y.scale[:, None]

    return {
        "given": (x,),
        "members": {
            OURS: Member(lambda x: quantised(x, "int8"), read),
            "plain PyTorch": Member(lambda x: reference.quantised(x, "int8"), read),
            COMPILED: Member(compiled(lambda x: reference.quantised(x, "int8")), read),
        },
        "oracle": lambda wide: y if (y := wide(x[:GATE])).dtype is torch.float64 else read(reference.quantised(y, "int8")),
        "bytes": x.nbytes + x.numel() + 4 * shape.tokens,
    }


ROWS: dict[str, Callable[..., dict[str, Any]]] = {
    "rms_norm": partial(norm_case, "rms_norm"),
    "layer_norm": partial(norm_case, "layer_norm"),
    "qk_norm_rope": rope_case,
    "swiglu": partial(gated_case, "swiglu"),
    "geglu": partial(gated_case, "geglu"),
    "pool": pool_case,
    "embed": embed_case,
    "latent_attention": latent_case,
    "rescaled": rescaled_case,
    "quantised": quantised_case,
}


def row_case(op: str, name: str, shape: Shape, device: str, dtype: torch.dtype, compiled: Any) -> Case:
    return Case(op, name, **ROWS[op](shape, device, dtype, compiled), wanted=SHARE if op in BOUND else None)


# --- attention

VARLEN = "varlen_attn"
BACKENDS = {"SDPA flash, padded": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN, padded": SDPBackend.CUDNN_ATTENTION}
LENGTHS = (16, 32, 64, 128, 512, 2048, 8192)


def mixes(tokens: int) -> dict[str, list[int]]:
    """Lengths of texts by name, about `tokens` of them: of one length, short ones, and lognormal ones."""
    found = {str(length): [length] * (tokens // length) for length in LENGTHS if length <= tokens}
    numbers = np.random.default_rng(0)
    for name, drawn in (
        ("5 to 60", numbers.integers(5, 61, tokens)),
        ("lognormal to 2048", numbers.lognormal(np.log(120), 1.0, tokens).clip(4, 2048).astype(int)),
    ):
        found[name] = drawn[: max(1, int((drawn.cumsum() <= tokens).sum()))].tolist()
    return found


def wanted_of_attention(mix: str, width: int, causal: bool) -> float | None:
    """How many times faster than varlen_attn it is to be."""
    if not mix.isdigit() or 64 < int(mix) < 1024:
        return None
    if int(mix) <= 64:
        return 1.5
    if width == 256:
        return 1.0
    return 1.05 if causal else 1.2


def varlen_options(parameters: Any, causal: bool, group: int) -> dict[str, Any]:
    """Of the varlen_attn that is installed: it was told of causal masks in two ways, and of groups only lately."""
    options: dict[str, Any] = {}
    if causal:
        options = {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}
    if group > 1:
        if "enable_gqa" not in parameters:
            raise ValueError(f"this torch's varlen_attn has no enable_gqa; expected one for {group} query heads to a key/value head")
        options["enable_gqa"] = True
    return options


def attention_case(
    mix: str, lengths: list[int], width: int, causal: bool, inner: int, group: int, device: str, dtype: torch.dtype, compiled: Any,
    gluon: bool = False,
) -> Case:  # fmt: skip
    heads, tokens, longest = inner // width, sum(lengths), max(lengths)
    q, k, v = (torch.randn(tokens, each, width, device=device).to(dtype) for each in (heads, heads // group, heads // group))
    starts = np.cumsum([0, *lengths])
    cu = torch.tensor(starts, dtype=torch.int32, device=device)
    plan = schedule(lengths)
    text = torch.repeat_interleave(torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device))
    place = torch.arange(tokens, device=device) - cu[text]

    some = sorted({0, 1, len(lengths) // 2, len(lengths) - 1} & set(range(len(lengths))))
    picked = torch.cat([torch.arange(int(starts[n]), int(starts[n + 1]), device=device) for n in some])

    def read(y: Tensor) -> Tensor:
        return y[picked, :group]

    def oracle(wide: Wide) -> Tensor:
        own = torch.tensor([0, *(lengths[n] for n in some)], device=device).cumsum(0).to(torch.int32)
        tensors = (wide(x[picked, :heads_of]) for x, heads_of in ((q, group), (k, 1), (v, 1)))
        return reference.attention(*tensors, own, own, None, causal=causal, scale=width**-0.5)

    def padded(x: Tensor) -> Tensor:
        room = x.new_zeros(len(lengths), longest, *x.shape[1:])
        room[text, place] = x
        return room.transpose(1, 2).contiguous()

    def sdpa(backend: SDPBackend) -> Member:
        rows = [padded(x) for x in (q, k, v)]
        ragged = len(set(lengths)) > 1 and not causal  # under a causal mask no query sees what is behind its text
        there = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        mask = there[:, None, None, :] if ragged else None

        def work() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*rows, attn_mask=mask, is_causal=causal, enable_gqa=group > 1)

        return Member(work, lambda y: read(y.transpose(1, 2)[text, place]))

    def flex() -> Member:
        def same_text(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (text[i] == text[j]) & (i >= j) if causal else text[i] == text[j]

        mask = create_block_mask(same_text, None, None, tokens, tokens, device=device)
        rows = [x.transpose(0, 1)[None] for x in (q, k, v)]
        run = compiled(flex_attention)
        return Member(lambda: run(*rows, block_mask=mask, enable_gqa=group > 1), lambda y: read(y[0].transpose(0, 1)))

    def ragged() -> Member:
        options = varlen_options(inspect.signature(varlen.varlen_attn).parameters, causal, group)
        return Member(lambda: varlen.varlen_attn(q, k, v, cu, cu, longest, longest, **options), read)

    def candidate() -> Member:
        from gluon_attention import attention

        return Member(lambda: attention(q, k, v, cu, cu, plan, causal=causal, scale=width**-0.5), read)

    peers = {VARLEN: ragged} | {name: partial(sdpa, each) for name, each in BACKENDS.items()} | {"FlexAttention": flex}
    if gluon and min(lengths) > SHORT:
        peers["ours in Gluon"] = candidate
    members, failed = {OURS: Member(lambda: attention(q, k, v, cu, cu, plan, causal=causal, scale=width**-0.5), read)}, {}
    for name, make in peers.items():
        try:
            members[name] = make()
        except Exception as fault:  # of many kinds
            failed[name] = told(fault)
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    return Case(
        op="attention",
        shape=f"{mix}, head_dim {width}, {'causal' if causal else 'full'}",
        given=(),
        members=members,
        oracle=oracle,
        flops=4 * heads * width * pairs,
        wanted=wanted_of_attention(mix, width, causal),
        against=VARLEN,
        failed=failed,
    )


# --- all of them


def all_cases(
    shapes: dict[str, Shape], tokens: int, inner: int, group: int, device: str, dtype: torch.dtype, compiled: Any, gluon: bool = False
) -> Iterator[tuple[str, str, Callable[[], Case]]]:
    """Name, op, and what makes the case, so that two cases' tensors are never there at once."""
    for (name, shape), op in product(shapes.items(), ROWS):
        yield f"{op} {name}", op, partial(row_case, op, name, shape, device, dtype, compiled)
    for width, (mix, lengths), causal in product((128, 64, 256), mixes(tokens).items(), (True, False)):
        make = partial(attention_case, mix, lengths, width, causal, inner, group, device, dtype, compiled, gluon)
        yield f"attention {mix}, head_dim {width}, {'causal' if causal else 'full'}", "attention", make
