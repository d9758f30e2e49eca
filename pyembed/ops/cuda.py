"""The backend of CUDA devices. No kernel has had a recorded pass on a GPU yet, so every op comes from the reference."""

import torch

from pyembed.config import ModelConfig
from pyembed.ops.budget import Budget, activation_bytes, balance
from pyembed.ops.reference import (
    attention,
    embed,
    geglu,
    gelu,
    int8,
    latent_attention,
    layer_norm,
    linear,
    pool,
    qk_norm_rope,
    rms_norm,
    schedule,
    swiglu,
)

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
FROM_REFERENCE = tuple(name for name in __all__ if name != "budget")
TOKENS = 16384  # in a batch; not measured


def budget(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Budget:
    """TOKENS, or what a quarter of the memory that is free now holds."""
    room = torch.cuda.mem_get_info(device)[0] // 4 // activation_bytes(config, dtype.itemsize)
    return Budget(max(16, min(TOKENS, room)), balance(config, rate=0.5), windows=8)
