"""Station 6 and what follows it: hidden states to one vector per text, projection, Dense modules, L2."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyembed.batch import ROW_MULTIPLE, PackedBatch, padded, reads_all
from pyembed.blocks import norm
from pyembed.config import ModelSpec
from pyembed.latent import Latent, attend
from pyembed.linear import Linear
from pyembed.model import Head, Weights
from pyembed.ops import Ops, PoolMode
from pyembed.transfer import to_device

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "relu": torch.relu,
    # torch's silu rounds an element by its place in a vector or its tail; this does not (its tanh does not)
    "silu": lambda x: (x.double() * 0.5 * (1 + torch.tanh(x.double() * 0.5))).float(),
}


WIDEST = 8192  # columns of a vector that the pooling kernel divides by its length


def pool(hidden: Tensor, spec: ModelSpec, weights: Weights, batch: PackedBatch, ops: Ops) -> Tensor:
    """[T, D] before the final norm to [N, dim] float32: final norm, pooling, projection or latent attention, Dense modules, and what the
    model's output is: rounded to integers, L2, both (which the caller's `normalize` asks for) or as it is."""
    plain = not weights.heads and weights.projection is None and weights.latent is None
    together = spec.normalize and plain and spec.output == "float" and len(spec.pooling.modes) == 1
    if weights.latent is not None:
        vectors = latent_vectors(hidden, weights, weights.latent, batch, ops)
    else:
        parts = [pooled(hidden, weights, batch, ops, mode, normalize=together) for mode in spec.pooling.modes]
        vectors = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    for head in weights.heads:
        vectors = dense(vectors, head)
    if spec.output == "tanh_int8":
        vectors = torch.round(127 * torch.tanh(vectors))
    if not spec.normalize or together:
        return vectors
    own = vectors.is_cuda and vectors.shape[1] <= WIDEST
    return unit_rows(vectors, ops) if own else F.normalize(vectors, dim=-1)


def unit_rows(x: Tensor, ops: Ops) -> Tensor:
    """Rows [N, D] float32 divided by their lengths, by the pooling op: on CUDA torch sums a row in an order that N decides."""
    starts = torch.arange(len(x) + 1, dtype=torch.int32, device=x.device)
    return ops.pool(x, starts, torch.stack([starts[:-1], starts[1:]], dim=1), "cls", normalize=True)


def reads(spec: ModelSpec, *, sparse: bool, narrow: bool) -> PoolMode | None:
    """The part of each span that is read, where that may be less than the text: what a last layer need not go beyond. None: all of it.

    It depends on the model and its template alone (`narrow`: that reads less than a text), so that a text's bits do not depend on its
    neighbours. A weighted mean needs each token's number.
    """
    if sparse:
        return "lasttoken"
    mode = spec.pooling.modes[0]
    if len(spec.pooling.modes) > 1 or mode == "weightedmean":
        return None
    return mode if mode in ("cls", "lasttoken") or narrow or not spec.pooling.include_prompt else None


def pooled(hidden: Tensor, weights: Weights, batch: PackedBatch, ops: Ops, mode: PoolMode, *, normalize: bool) -> Tensor:
    """One mode's vectors, [N, output_dim] float32. The projection commutes with every mode but max, so it meets N vectors, not T tokens."""
    if weights.projection is not None and mode == "max":
        return ops.pool(projected(hidden.float(), weights, ops), batch.cu_seqlens, batch.spans, mode)
    vectors = ops.pool(hidden, batch.cu_seqlens, batch.spans, mode, norm=weights.final_norm, normalize=normalize)
    return vectors if weights.projection is None else on_vectors(weights.projection, vectors)


def latent_vectors(hidden: Tensor, weights: Weights, latent: Latent, batch: PackedBatch, ops: Ops) -> Tensor:
    """Means of the latent attention's tokens, [N, D] float32. Only the rows in the spans enter it; an empty span gives zeros."""
    cu_seqlens, spans = batch.cu_seqlens, batch.spans
    if not reads_all(batch.lengths, batch.read):
        lengths = [end - first for first, end in batch.read]
        starts = np.cumsum([0, *lengths], dtype=np.int32)
        rows = np.zeros(padded(int(starts[-1])), dtype=np.int64)  # spare rows repeat the first
        rows[: starts[-1]] = np.concatenate([np.arange(first, end) for first, end in batch.read])
        sent = to_device({"rows": rows, "starts": starts}, hidden.device)
        hidden, cu_seqlens = hidden[sent["rows"]], sent["starts"]
        spans = torch.stack([cu_seqlens[:-1], cu_seqlens[1:]], dim=1)
    y, gated = attend(final_states(hidden, weights, ops), latent, ops)
    means = [ops.pool(each, cu_seqlens, spans, "mean") for each in (y, gated)]
    return (on_vectors(latent.down, means[1]) + means[0]) * (spans[:, 1:] > spans[:, :1])  # an empty span would give the bias


def on_vectors(linear: Linear, vectors: Tensor) -> Tensor:
    """x W^T + b for [N, in] float32, in a multiple of ROW_MULTIPLE rows so that a text's bits do not depend on N."""
    rows = len(vectors)
    return linear.apply(F.pad(vectors, (0, 0, 0, -rows % ROW_MULTIPLE)))[:rows]


def dense(vectors: Tensor, head: Head) -> Tensor:
    """activation(x W^T + b), [N, in] to [N, out], float32."""
    return ACTIVATIONS[head.activation](on_vectors(head.linear, vectors))


def final_states(hidden: Tensor, weights: Weights, ops: Ops) -> Tensor:
    """The final norm of every token, [T, D]."""
    return hidden if weights.final_norm is None else norm(hidden, weights.final_norm, ops)


def projected(hidden: Tensor, weights: Weights, ops: Ops) -> Tensor:
    """Final norm and projection of every token, [T, D] to [T, output_dim] in the dtype of `hidden`."""
    states = final_states(hidden, weights, ops)
    return states if weights.projection is None else weights.projection.apply(states.float()).to(hidden.dtype)


def token_vectors(hidden: Tensor, weights: Weights, batch: PackedBatch, ops: Ops) -> list[Tensor]:
    """What pooling reads of each text, [length, output_dim] in the activation dtype: final norm, then projection or latent attention."""
    if weights.latent is None:
        states = projected(hidden, weights, ops)
    else:
        y, gated = attend(final_states(hidden, weights, ops), weights.latent, ops)
        states = (weights.latent.down.apply(gated.float()) + y).to(hidden.dtype)
    return list(states[: sum(batch.lengths)].split(batch.lengths))


def logits(hidden: Tensor, weights: Weights, batch: PackedBatch, ops: Ops) -> Tensor:
    """Logits of the vocabulary at each text's last token, [N, V] float32, capped where the model caps them.

    The product is in the activation dtype, as in transformers' ...ForCausalLM classes; `weights.vocabulary` must be loaded.
    """
    assert weights.vocabulary is not None
    last = np.zeros(padded(len(batch.lengths)), dtype=np.int64)  # spare rows repeat the first
    last[: len(batch.lengths)] = np.cumsum(batch.lengths) - 1
    states = projected(hidden[to_device({"last": last}, hidden.device)["last"]], weights, ops)
    out = weights.vocabulary.apply(states)[: len(batch.lengths)].float()
    cap = weights.config.logit_softcap
    return out if cap is None else cap * torch.tanh(out / cap)


def describe(spec: ModelSpec) -> str:
    """What this file does for a model, as `repr` of an Encoder says it."""
    model = spec.model
    parts = [f"pooling={'+'.join(spec.pooling.modes)}" + ("" if spec.pooling.include_prompt else " without prompt")]
    if model.latent is not None:
        parts.append(f"{model.latent.latents} latents")
    if model.projection_dim is not None:
        parts.append(f"linear {model.hidden_size}->{model.projection_dim}")
    parts += [f"Dense {each.in_features}->{each.out_features}" for each in spec.dense]
    return ", ".join([*parts, *(["tanh int8"] if spec.output == "tanh_int8" else []), *(["L2"] if spec.normalize else [])])
