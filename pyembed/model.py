"""Station 5: the tensors of a model and its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyembed.alibi import Alibi
from pyembed.batch import Kept, PackedBatch
from pyembed.blocks import BLOCKS, Layer, Shared, mix_embeddings, rows_of
from pyembed.config import ModelConfig
from pyembed.latent import Latent
from pyembed.linear import Linear
from pyembed.ops import Norm, Ops
from pyembed.prefix import Prefixes
from pyembed.rope import Rotary

T = TypeVar("T", bound=Any)


@dataclass(frozen=True, slots=True)
class Head:
    """A Dense module after pooling."""

    linear: Linear  # float32
    activation: str


@dataclass(frozen=True, slots=True)
class Weights:
    config: ModelConfig
    tokens: Tensor  # [V, D]
    positions: Tensor | None  # [position_rows, D]
    type_row: Tensor | None  # [D]
    embedding_norm: Norm | None
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    alibi: Alibi | None
    rotary: tuple[Rotary, ...]
    projection: Linear | None  # D -> projection_dim, float32: it sees N pooled rows, and rounding them would lose what pooling kept
    latent: Latent | None
    vocabulary: Linear | None  # output_dim -> V; loaded where logits are asked for
    heads: tuple[Head, ...]
    spare_rows: bool = True  # the layers want rows up to a multiple of 16, for a row to have the same bits in any batch


def linears(weights: Weights) -> Iterator[Linear]:
    """The linear layers that meet every token, or may."""
    for layer in weights.layers:
        yield from (*layer.qkv, layer.out, layer.up, layer.down)
        if layer.per_layer is not None:
            yield from (layer.per_layer.project, layer.per_layer.gate, layer.per_layer.out)
    if weights.projection is not None:
        yield weights.projection
    if weights.latent is not None:
        yield from (weights.latent.scores, weights.latent.mix, weights.latent.up, weights.latent.down)


def with_linears(weights: Weights, change: Callable[[Linear], Linear]) -> Weights:
    """Weights whose linear layers, those that meet vectors included, are what `change` makes of them."""

    def changed(part: T, *names: str) -> T:
        def new(value: Any) -> Any:
            return tuple(map(change, value)) if isinstance(value, tuple) else change(value)

        return replace(part, **{name: new(getattr(part, name)) for name in names if getattr(part, name) is not None})

    def layer_of(layer: Layer) -> Layer:
        extra = layer.per_layer if layer.per_layer is None else changed(layer.per_layer, "project", "gate", "out")
        return replace(changed(layer, "qkv", "out", "up", "down"), per_layer=extra)

    return replace(
        changed(weights, "projection", "vocabulary"),
        layers=tuple(map(layer_of, weights.layers)),
        latent=None if weights.latent is None else changed(weights.latent, "scores", "mix", "up", "down"),
        heads=tuple(changed(head, "linear") for head in weights.heads),
    )


def position_rows(batch: PackedBatch, config: ModelConfig) -> Tensor:
    """Each token's row of the table of learned positions, [T] int64."""
    assert config.position_offset is not None
    if config.position_pad is None:
        return batch.positions + config.position_offset
    counted = (batch.input_ids != config.position_pad).long()
    before = counted.cumsum(0) - counted  # counted tokens before each one, over the whole batch
    first = torch.arange(len(before), device=before.device) - batch.positions  # where each token's text starts
    return (before - before[first]) * counted + (config.position_offset - 1 + counted)


def forward(
    weights: Weights,
    batch: PackedBatch,
    ops: Ops,
    kept: Kept | None = None,
    *,
    prefixes: Prefixes | None = None,
    captured: list[tuple[Tensor, Tensor]] | None = None,
    between: Callable[[], None] | None = None,
) -> Tensor:
    """Packed ids to hidden states [T, D] in the activation dtype, before the final norm. Spare rows hold anything.

    With `kept` the last layer computes its rows alone, on keys and values of all: [R, D]. `prefixes` were run before; `captured` takes
    each layer's keys and values; `between` is called before each layer, and may raise.
    """
    config = weights.config
    if not weights.spare_rows:
        tokens = sum(batch.lengths)
        batch = replace(batch, input_ids=batch.input_ids[:tokens], positions=batch.positions[:tokens])
        kept = None if kept is None else replace(kept, rows=kept.rows[: sum(kept.batch.lengths)])
    hidden = ops.embed(
        batch.input_ids,
        weights.tokens,
        scale=config.embed_scale,
        positions=None if config.position_offset is None else position_rows(batch, config),
        position_table=weights.positions,
        type_row=weights.type_row,
        norm=weights.embedding_norm,
    )
    shared = Shared(batch, [each.rows(batch) for each in weights.rotary], None if weights.alibi is None else weights.alibi.bias(batch))
    block = BLOCKS[config.block]
    embedded = hidden.clone() if config.per_layer_dim is not None else None  # the blocks write into `hidden`
    delta = None  # what the last block has yet to add to the residual stream, so that the next norm adds it
    for n, layer in enumerate(weights.layers):
        if between is not None:
            between()
        own = None if prefixes is None else prefixes.layers[n]
        shared = replace(shared, prefix=own, kept=kept if n + 1 == len(weights.layers) else None, captured=captured)
        hidden, delta = block(hidden, delta, layer, config, shared, ops)
        if layer.per_layer is not None:
            assert embedded is not None
            hidden, delta = mix_embeddings(hidden, delta, rows_of(embedded, shared.kept), layer.per_layer, config, ops)
    return hidden if delta is None else hidden + delta
