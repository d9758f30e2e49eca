"""The Triton kernels of kernels/, and the library's matrix products: same contracts as `reference`, for bfloat16, float16 and float32.

Triton's interpreter has run them, a GPU has not: until ops.CUDA_RECORD names such a run, `select` takes this module only where
backend="kernels" asks for it.
"""

from __future__ import annotations

import torch

from pyembed.config import ModelConfig
from pyembed.kernels.activation import geglu, gelu, quantised, swiglu
from pyembed.kernels.attention import attention, schedule
from pyembed.kernels.embed import embed
from pyembed.kernels.latent_attention import latent_attention
from pyembed.kernels.layer_norm import layer_norm
from pyembed.kernels.pool import pool
from pyembed.kernels.qk_norm_rope import qk_norm_rope
from pyembed.kernels.rescaled import rescaled
from pyembed.kernels.rms_norm import rms_norm
from pyembed.ops.budget import Budget, activation_bytes, balance, flops
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
    "quantised",
    "rescaled",
    "rms_norm",
    "schedule",
    "swiglu",
]
FROM_REFERENCE: tuple[str, ...] = ("int8", "linear")
# None of these is measured; `python bench/gpu.py` tries them.
LEAST, MOST = 8192, 32768  # tokens of a batch
CACHED = 3  # one part in so many of the second-level cache is for the residual stream, which every op reads
LAUNCHES = 9  # of a layer
LAUNCH = 25e-6  # seconds that one takes on the host
RATE = 400e12  # FLOP/s of the linear layers
NARROW = 1024  # hidden size up to which one batch leaves much of a card idle at each kernel's end


def budget(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Budget:
    """What a card takes at once, by the memory that is free now and by its second-level cache."""
    free, cache = torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_properties(device).L2_cache_size
    return budget_of(config, max(2, dtype.itemsize), free, cache)  # in eight bits most activations are bfloat16


def budget_of(config: ModelConfig, itemsize: int, free: int, cache: int) -> Budget:
    """As many tokens as leave the residual stream in the cache, between LEAST and MOST, and no more than a quarter of the memory holds.

    Batches are replayed from graphs up to where their products take as long as launching them kernel by kernel would.
    """
    streams = 2 if config.hidden_size <= NARROW else 1
    room = free // 4 // streams // activation_bytes(config, itemsize)
    tokens = max(16, min(room, MOST, max(LEAST, cache // CACHED // (itemsize * config.hidden_size) // 256 * 256)))
    launching = LAUNCHES * config.num_layers * LAUNCH
    graphs = min(tokens, int(launching * RATE / flops(config)))
    return Budget(tokens, balance(config, rate=0.5), windows=8, graphs=graphs, streams=streams)
