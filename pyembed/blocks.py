"""One function per residual order. A block takes the residual stream and what is yet to be added to it, and returns the same pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from pyembed.batch import Kept, PackedBatch
from pyembed.config import ModelConfig
from pyembed.linear import Input, Linear, chained, wanted
from pyembed.ops import DistanceBias, Norm, Ops, Prefix, Quant, Quantised

Stream = tuple[Tensor, Tensor | None]  # hidden [T, D], delta [T, D]


@dataclass(frozen=True, slots=True)
class Shared:
    """What the layers of one forward pass share."""

    batch: PackedBatch
    ropes: list[tuple[Tensor, Tensor, Tensor]]  # cos, sin [positions, rotary dims / 2], and each token's row [T]; one a config's rope
    bias: DistanceBias | None
    kept: Kept | None = None  # the queries that this layer computes; None: all
    prefix: Prefix | None = None  # this layer's keys and values of what was run before
    captured: list[tuple[Tensor, Tensor]] | None = None  # takes this layer's keys and values


@dataclass(frozen=True, slots=True)
class PerLayer:
    """A sub-block after the MLP that mixes the embeddings in once more. P: per_layer_dim."""

    project: Linear  # D -> P, on the scaled embeddings; this layer's rows of a matrix for all layers
    project_norm: Norm  # weight [P]
    gate: Linear  # D -> P
    out: Linear  # P -> D
    norm: Norm
    scale: float  # of the residual stream, at the layer's end


@dataclass(frozen=True, slots=True)
class Layer:
    num_key_value_heads: int  # G
    head_dim: int  # K
    qkv: tuple[Linear, ...]  # D -> (H + 2 G) * K; in the last layer queries apart, D -> H * K and D -> 2 G * K
    out: Linear  # H * K -> D
    up: Linear  # D -> 2 F, rows [gate; up], or D -> F
    down: Linear  # F -> D
    attention_norm: Norm  # before attention; after it in a post-norm block
    mlp_norm: Norm  # a parallel block may have one object for both
    post_attention_norm: Norm | None  # sandwich blocks
    post_mlp_norm: Norm | None
    q_norm: Norm | None  # weight [K]
    k_norm: Norm | None
    v_norm: Norm | None  # without weight
    per_layer: PerLayer | None
    window: tuple[int, int] | None  # keys before and after the query that it sees
    rope: int | None  # index into Weights.rotary


@overload
def norm(x: Tensor, weights: Norm, ops: Ops, *, residual: Tensor | None = None) -> Tensor: ...
@overload
def norm(x: Tensor, weights: Norm, ops: Ops, *, residual: Tensor | None = None, quant: Quant | None) -> Input: ...
def norm(x: Tensor, weights: Norm, ops: Ops, *, residual: Tensor | None = None, quant: Quant | None = None) -> Input:
    """The norm of x, or of residual + x, which then also stands in `residual`; in eight bits with `quant`."""
    op = ops.layer_norm if weights.layer else ops.rms_norm
    return op(x, weights, residual=residual, quant=quant)


@overload
def normed(x: Input, linear: Linear, weights: Norm, ops: Ops, *, residual: Tensor | None = None) -> Tensor: ...
@overload
def normed(x: Input, linear: Linear, weights: Norm, ops: Ops, *, residual: Tensor | None = None, quant: Quant | None) -> Input: ...
def normed(x: Input, linear: Linear, weights: Norm, ops: Ops, *, residual: Tensor | None = None, quant: Quant | None = None) -> Input:
    """The norm of linear(x), or of residual + linear(x), which then also stands in `residual`; in eight bits with `quant`."""
    if chained(linear):
        assert quant is None and not isinstance(x, Quantised)
        return linear.chain(x, norm=weights, residual=residual)
    return norm(linear.apply(x), weights, ops, residual=residual, quant=quant)


def attend(x: Input, layer: Layer, config: ModelConfig, shared: Shared, ops: Ops) -> Tensor:
    """Attention before its output projection: [T, D] -> [T, H * K], or -> [R, H * K] where only the queries of `kept` are wanted."""
    heads, groups, width = config.num_heads, layer.num_key_value_heads, layer.head_dim
    batch, kept = shared.batch, shared.kept
    if len(layer.qkv) == 1:
        qkv = layer.qkv[0].apply(x)  # [T, (H + 2 G) * K]
        turn(qkv, heads, groups, None, layer, config, shared, ops)
        q, k, v = qkv.view(-1, heads + 2 * groups, width).split((heads, groups, groups), dim=1)
    else:
        queries = layer.qkv[0].apply(rows_of(x, kept))  # [R, H * K]
        keys = layer.qkv[1].apply(x)  # [T, 2 G * K]
        turn(queries, heads, 0, kept, layer, config, shared, ops)
        turn(keys, 0, groups, None, layer, config, shared, ops)
        q = queries.view(-1, heads, width)
        k, v = keys.view(-1, 2 * groups, width).split((groups, groups), dim=1)
    if layer.v_norm is not None:
        v = norm(v.reshape(-1, width), layer.v_norm, ops).view(-1, groups, width)
    if config.query_scale and batch.longest > config.query_scale_period:  # below that all factors are 1
        growth = torch.log1p((rows_of(batch.positions, kept) // config.query_scale_period).float())
        q = q * (1 + config.query_scale * growth).to(q.dtype)[:, None, None]
    if shared.captured is not None:
        shared.captured.append((k.contiguous(), v.contiguous()))
    cu_k = batch.cu_seqlens
    if batch.paths is not None:
        k, v, cu_k = k[batch.paths.rows], v[batch.paths.rows], batch.paths.cu_k
    mixed = ops.attention(
        q,
        k,
        v,
        batch.cu_seqlens if kept is None else kept.batch.cu_seqlens,
        cu_k,
        batch.schedule if kept is None else kept.batch.schedule,
        causal=config.causal,
        window=layer.window,
        scale=config.attention_scale,
        softcap=config.softcap,
        bias=shared.bias,
        prefix=shared.prefix,
        q_start=None if kept is None else kept.first,
    )
    return mixed.view(-1, heads * width)


def turn(qkv: Tensor, heads: int, groups: int, kept: Kept | None, layer: Layer, config: ModelConfig, shared: Shared, ops: Ops) -> None:
    """Norms and rotation of query and key heads in place, where the layer has any."""
    if layer.rope is None and layer.q_norm is None:
        return
    cos, sin, rows = (None, None, None) if layer.rope is None else shared.ropes[layer.rope]
    ops.qk_norm_rope(
        qkv,
        heads,
        groups,
        cos=cos,
        sin=sin,
        rows=None if rows is None else rows_of(rows, kept),
        interleaved=layer.rope is not None and config.ropes[layer.rope].interleaved,
        q_norm=layer.q_norm,
        k_norm=layer.k_norm,
    )


@overload
def rows_of(x: Tensor, kept: Kept | None) -> Tensor: ...
@overload
def rows_of(x: Input, kept: Kept | None) -> Input: ...
def rows_of(x: Input, kept: Kept | None) -> Input:
    """The rows of `x` that are kept; all of them where there is no `kept`."""
    if kept is None:
        return x
    if isinstance(x, Quantised):  # as bytes: not every torch picks rows of fp8
        return Quantised(x.values.view(torch.uint8)[kept.rows].view(x.values.dtype), x.scale[kept.rows])
    return x[kept.rows]


def mlp(x: Input, layer: Layer, config: ModelConfig, ops: Ops, *, weights: Norm | None = None, residual: Tensor | None = None) -> Tensor:
    """The feed-forward layer, gated or plain: [T, D] -> [T, D]; with `weights` the norm of residual + that, as `normed` has it."""
    act, up, down = config.activation, layer.up, layer.down
    if chained(up) and chained(down) and act in up.fuses:
        assert not isinstance(x, Quantised)
        return up.chain(x, act=act, second=down, norm=weights, residual=residual)
    h: Input
    if act in up.fuses:
        h = up.apply(x, act=act)
    elif config.gated:
        h = gate(up.apply(x), act, ops, quant=down.wants)
    elif act == "relu":
        h = torch.relu(up.apply(x))  # exact in any dtype
    else:
        h = ops.gelu(up.apply(x), tanh=act == "gelu_tanh", quant=down.wants)
    return down.apply(h) if weights is None else normed(h, down, weights, ops, residual=residual)


def gate(x: Tensor, act: str, ops: Ops, *, quant: Quant | None) -> Input:
    """act(first half) * second half: [T, 2 F] -> [T, F]; in eight bits with `quant`."""
    return ops.swiglu(x, quant=quant) if act == "silu" else ops.geglu(x, tanh=act == "gelu_tanh", quant=quant)


def mix_embeddings(x: Tensor, delta: Tensor | None, embedded: Tensor, weights: PerLayer, config: ModelConfig, ops: Ops) -> Stream:
    """x += norm(W_out (act(W_gate x) * norm(W_project embedded))); x *= scale. `embedded` [T, D], as the model starts."""
    if delta is not None:
        x.add_(delta)
    signal = norm(weights.project.apply(embedded), weights.project_norm, ops)
    h = gate(torch.cat([weights.gate.apply(x), signal], dim=1), config.activation, ops, quant=weights.out.wants)
    return x.add_(norm(weights.out.apply(h), weights.norm, ops)).mul_(weights.scale), None


def entered(x: Tensor, delta: Tensor | None, weights: Norm, ops: Ops, quant: Quant | None) -> Input:
    """The norm before a block's attention, in eight bits with `quant`; x += delta."""
    return norm(x, weights, ops, quant=quant) if delta is None else norm(delta, weights, ops, residual=x, quant=quant)


def pre_norm(x: Tensor, delta: Tensor | None, layer: Layer, config: ModelConfig, shared: Shared, ops: Ops) -> Stream:
    """x += Attn(norm(x)); x += MLP(norm(x)): most decoders."""
    h = entered(x, delta, layer.attention_norm, ops, wanted(layer.qkv))
    h, x = attend(h, layer, config, shared, ops), rows_of(x, shared.kept)
    h = normed(h, layer.out, layer.mlp_norm, ops, residual=x, quant=layer.up.wants)
    return x, mlp(h, layer, config, ops)


def sandwich(x: Tensor, delta: Tensor | None, layer: Layer, config: ModelConfig, shared: Shared, ops: Ops) -> Stream:
    """x += norm(Attn(norm(x))); x += norm(MLP(norm(x)))."""
    assert layer.post_attention_norm is not None
    assert layer.post_mlp_norm is not None
    h = entered(x, delta, layer.attention_norm, ops, wanted(layer.qkv))
    h, x = normed(attend(h, layer, config, shared, ops), layer.out, layer.post_attention_norm, ops), rows_of(x, shared.kept)
    h = norm(h, layer.mlp_norm, ops, residual=x, quant=layer.up.wants)
    return x, mlp(h, layer, config, ops, weights=layer.post_mlp_norm)


def post_norm(x: Tensor, delta: Tensor | None, layer: Layer, config: ModelConfig, shared: Shared, ops: Ops) -> Stream:
    """x = norm(x + Attn(x)); x = norm(x + MLP(x)): most encoders. The norms give the residual too, so layers make eight bits themselves."""
    x = normed(attend(x, layer, config, shared, ops), layer.out, layer.attention_norm, ops, residual=rows_of(x, shared.kept))
    return mlp(x, layer, config, ops, weights=layer.mlp_norm, residual=x), None


def parallel(x: Tensor, delta: Tensor | None, layer: Layer, config: ModelConfig, shared: Shared, ops: Ops) -> Stream:
    """x += Attn(norm(x)) + MLP(norm(x)), both of the same x, with a norm each or one for both."""
    both = layer.mlp_norm is layer.attention_norm
    h = entered(x, delta, layer.attention_norm, ops, wanted((*layer.qkv, layer.up) if both else layer.qkv))
    x = rows_of(x, shared.kept)
    other = rows_of(h, shared.kept) if both else norm(x, layer.mlp_norm, ops, quant=layer.up.wants)
    return x, layer.out.apply(attend(h, layer, config, shared, ops)) + mlp(other, layer, config, ops)


Block = Callable[[Tensor, Tensor | None, Layer, ModelConfig, Shared, Ops], Stream]
BLOCKS: dict[str, Block] = {"pre": pre_norm, "sandwich": sandwich, "post": post_norm, "parallel": parallel}
