"""The Triton kernels of kernels/, and the library's matrix products: same contracts as `reference`, for bfloat16, float16 and float32.

Triton's interpreter has run them, a GPU has not: until ops.CUDA_RECORD names such a run, `select` takes this module only where
backend="kernels" asks for it.
"""

from __future__ import annotations

import torch

from pyembed.config import ModelConfig
from pyembed.kernels.activation import geglu, gelu, swiglu
from pyembed.kernels.attention import attention, schedule
from pyembed.kernels.embed import embed
from pyembed.kernels.latent_attention import latent_attention
from pyembed.kernels.layer_norm import layer_norm
from pyembed.kernels.pool import pool
from pyembed.kernels.qk_norm_rope import qk_norm_rope
from pyembed.kernels.rms_norm import rms_norm
from pyembed.ops.budget import Budget, activation_bytes, balance
from pyembed.ops.reference import int8, linear

__all__ = [
    "attention",
    "budget",
    "embed",
    "geglu",
    "gelu",
    "int8",
    "latent_attention",
    "layer_norm",
    "linear",
    "pool",
    "qk_norm_rope",
    "rms_norm",
    "schedule",
    "swiglu",
]
FROM_REFERENCE: tuple[str, ...] = ("int8", "linear")
TOKENS = 16384  # in a batch; not measured


def budget(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Budget:
    """TOKENS, or what a quarter of the memory that is free now holds. In fp8 most activations are bfloat16."""
    room = torch.cuda.mem_get_info(device)[0] // 4 // activation_bytes(config, max(2, dtype.itemsize))
    return Budget(max(16, min(TOKENS, room)), balance(config, rate=0.5), windows=8)
