"""The backend of CUDA devices. No kernel has had a recorded pass on a GPU yet, so every op comes from the reference."""

from pyembed.ops.reference import (
    attention,
    embed,
    geglu,
    gelu,
    latent_attention,
    layer_norm,
    pool,
    qk_norm_rope,
    rms_norm,
    schedule,
    swiglu,
)

__all__ = [
    "attention",
    "embed",
    "geglu",
    "gelu",
    "latent_attention",
    "layer_norm",
    "pool",
    "qk_norm_rope",
    "rms_norm",
    "schedule",
    "swiglu",
]
FROM_REFERENCE = tuple(__all__)
