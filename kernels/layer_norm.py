"""LayerNorm (arXiv 1607.06450) of x, or of residual + x, which then is what `residual` holds. Same contract as reference.layer_norm.

The kernel, its roundings, bytes and FLOPs are those of rms_norm.py, and two FLOPs a number more: `norm.layer` has the mean taken off.
"""

from __future__ import annotations

from torch import Tensor

from pyembed.kernels.rms_norm import add_norm
from pyembed.ops import Norm, Quant, Quantised


def layer_norm(
    x: Tensor,  # [T, D]
    norm: Norm,
    *,
    residual: Tensor | None = None,  # [T, D], overwritten with residual + x
    quant: Quant | None = None,
) -> Tensor | Quantised:  # [T, D]
    result: Tensor | Quantised = add_norm(x, norm, residual, quant)
    return result
