"""Station 6 and what follows it: hidden states to one vector per text, Dense modules, L2."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pyembed.batch import ROW_MULTIPLE, PackedBatch
from pyembed.blocks import norm
from pyembed.config import ModelSpec
from pyembed.model import Head, Weights
from pyembed.ops import Ops

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "relu": torch.relu,
    # torch's silu rounds an element by its place in a vector or its tail; this does not (its tanh does not)
    "silu": lambda x: (x.double() * 0.5 * (1 + torch.tanh(x.double() * 0.5))).float(),
}


def pool(hidden: Tensor, spec: ModelSpec, weights: Weights, batch: PackedBatch, ops: Ops) -> Tensor:
    """[T, D] before the final norm to [N, dim] float32: final norm, pooling, Dense modules, and L2 where the model has it."""
    together = spec.normalize and not weights.heads and len(spec.pooling.modes) == 1
    parts = [
        ops.pool(hidden, batch.cu_seqlens, batch.spans, mode, norm=weights.final_norm, normalize=together)
        for mode in spec.pooling.modes
    ]
    vectors = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    for head in weights.heads:
        vectors = dense(vectors, head)
    return F.normalize(vectors, dim=-1) if spec.normalize and not together else vectors


def dense(vectors: Tensor, head: Head) -> Tensor:
    """activation(x W^T + b) for [N, in] float32, in a multiple of ROW_MULTIPLE rows so that a text's bits do not depend on N."""
    rows = len(vectors)
    padded = F.pad(vectors, (0, 0, 0, -rows % ROW_MULTIPLE))
    return ACTIVATIONS[head.activation](head.linear.apply(padded)[:rows])


def token_vectors(hidden: Tensor, weights: Weights, batch: PackedBatch, ops: Ops) -> list[Tensor]:
    """The final hidden states of each text, [length, D] in the activation dtype."""
    states = hidden if weights.final_norm is None else norm(hidden, weights.final_norm, ops)
    return list(states[: sum(batch.lengths)].split(batch.lengths))
