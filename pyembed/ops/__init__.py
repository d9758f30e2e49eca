"""The ops of the forward pass, and the choice of the module that provides them.

A backend is a module (`reference`, `cpu`, `cuda`) that exports the names of `Ops` with the same signatures; `select` picks one once,
at load. Contracts, rounding and shapes are those of `reference`, which is the oracle of every kernel test.

Dimensions in shape comments: T tokens of the packed batch, N sequences, D hidden size, H query heads, G key/value heads, K head
dimension, F MLP width, V vocabulary, R rotary dimensions.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyembed.config import ModelConfig
    from pyembed.int8 import Int8
    from pyembed.linear import Linear
    from pyembed.ops.budget import Budget

Quant = Literal["fp8", "int8"]
Backend = Literal["reference", "kernels"]
PoolMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
POOL_MODES: tuple[PoolMode, ...] = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


CUDA_RECORD: str | None = None  # the file under bench/results of a run of `pytest -m gpu` on a GPU; None: no GPU has run the kernels yet


@dataclass(frozen=True, slots=True)
class Quantised:
    """Rows in eight bits: row i of the tensor they stand for is `values[i] * scale[i]`."""

    values: Tensor  # [T, D] float8_e4m3fn or int8
    scale: Tensor  # [T] float32


@dataclass(frozen=True, slots=True)
class Norm:
    """One normalisation: RMSNorm without `bias`, LayerNorm when `layer`. A Gemma weight is stored here as `1 + w`."""

    weight: Tensor | None  # [D] float32; None: no weight
    bias: Tensor | None  # [D] float32
    eps: float
    layer: bool = False  # LayerNorm (mean subtracted) instead of RMSNorm
    round_first: bool = False  # RMSNorm rounds to the activation dtype before the weight (Llama) instead of after it (Gemma)


@dataclass(frozen=True, slots=True)
class DistanceBias:
    """A number per head added to each score, by key position minus query position (T5 buckets and ALiBi are both that)."""

    table: Tensor  # [H, 2 * radius + 1] float32; column `radius + distance`, distance clipped to +-radius

    @property
    def radius(self) -> int:
        return (self.table.shape[1] - 1) // 2


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values computed once that a text's queries see before its own keys."""

    k: Tensor  # [P, G, K]
    v: Tensor  # [P, G, K]
    cu_p: Tensor  # [M + 1] int32, start of each prefix
    prefix_of: Tensor  # [N] int32, which prefix a text has; -1: none


class Ops(Protocol):
    """What a backend module exports. `reference` documents each function."""

    __name__: str
    FROM_REFERENCE: tuple[str, ...]

    def budget(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Budget: ...
    def schedule(self, lengths: Sequence[int]) -> object: ...
    def embed(
        self,
        input_ids: Tensor,
        tokens: Tensor,
        *,
        scale: float = 1.0,
        positions: Tensor | None = None,
        position_table: Tensor | None = None,
        type_row: Tensor | None = None,
        norm: Norm | None = None,
    ) -> Tensor: ...
    def rms_norm(self, x: Tensor, norm: Norm, *, residual: Tensor | None = None, quant: Quant | None = None) -> Tensor | Quantised: ...
    def layer_norm(self, x: Tensor, norm: Norm, *, residual: Tensor | None = None, quant: Quant | None = None) -> Tensor | Quantised: ...
    def qk_norm_rope(
        self,
        qkv: Tensor,
        num_heads: int,
        num_key_value_heads: int,
        *,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        rows: Tensor | None = None,
        interleaved: bool = False,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
    ) -> None: ...
    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        schedule: object,
        *,
        causal: bool,
        window: tuple[int, int] | None = None,
        scale: float,
        softcap: float | None = None,
        bias: DistanceBias | None = None,
        prefix: Prefix | None = None,
        q_start: Tensor | None = None,
    ) -> Tensor: ...
    def swiglu(self, x: Tensor, *, quant: Quant | None = None) -> Tensor | Quantised: ...
    def geglu(self, x: Tensor, *, tanh: bool, quant: Quant | None = None) -> Tensor | Quantised: ...
    def gelu(self, x: Tensor, *, tanh: bool, quant: Quant | None = None) -> Tensor | Quantised: ...
    def pool(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        spans: Tensor,
        mode: PoolMode,
        *,
        norm: Norm | None = None,
        normalize: bool = False,
        dim: int | None = None,
    ) -> Tensor: ...
    def latent_attention(self, scores: Tensor, heads: int) -> Tensor: ...
    def quantised(self, x: Tensor, quant: Quant) -> Quantised: ...
    def rescaled(self, product: Tensor, rows: Tensor, outputs: Tensor, bias: Tensor | None) -> Tensor: ...
    def linear(self, weight: Tensor, bias: Tensor | None, *, gated: bool = False) -> Linear: ...
    def int8(self, layer: Int8, *, gated: bool = False) -> Linear: ...


def select(device: torch.device, backend: Backend | None = None) -> Ops:
    """The backend module for `device`: its kernels where they can run and have been seen to, else the reference; `Encoder` says so once.

    "reference": plain PyTorch. "kernels": the kernels; ValueError where they cannot run.
    """
    package = {"cpu": "pyembed._cpu", "cuda": "triton"}[device.type]
    there = importlib.util.find_spec(package) is not None
    if backend == "kernels" and not there:
        raise ValueError(f"backend is 'kernels', but those for {device.type!r} need {package}, which is not here; use backend='reference'.")
    kernels = there and (backend == "kernels" or (backend is None and (device.type == "cpu" or CUDA_RECORD is not None)))
    return cast("Ops", importlib.import_module(f"pyembed.ops.{device.type if kernels else 'reference'}"))
