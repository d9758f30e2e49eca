"""What every wrapper of a C++ kernel checks before it hands addresses over."""

from __future__ import annotations

import torch
from torch import Tensor

from pyembed.ops import Norm

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # numbers of Dtype in csrc/params.h
# numbers of Act there, of gated activations and of others; the tanh variant follows the erf variant
GATED = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
PLAIN = {"gelu": 3, "gelu_tanh": 4, "relu": 5}
NormArgument = tuple[int, int, float, bool, bool] | None


def no_kernel(x: Tensor) -> bool:
    """Whether the reference computes for the dtype of `x`."""
    return x.dtype is torch.float16 or x.dtype is torch.float64


def dtype_number(x: Tensor) -> int:
    number = DTYPES.get(x.dtype)
    if number is None:
        raise ValueError(f"activations must be float32, bfloat16, float16 or float64, got {x.dtype}")
    return number


def check(name: str, x: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """`x` is in main memory, of that dtype and shape (-1: any size), and its last dimension is contiguous."""
    if not x.is_cpu or x.dtype is not dtype:
        raise ValueError(f"{name} must be a {dtype} tensor on the CPU, got {x.dtype} on {x.device}")
    got = x.shape
    if len(got) != len(shape) or any(want not in (-1, size) for want, size in zip(shape, got, strict=True)):
        raise ValueError(f"{name} must have shape {list(shape)} (-1: any), got {list(got)}")
    if got[-1] > 1 and x.stride(-1) != 1 and x.numel() > 0:
        raise ValueError(f"{name} must have unit stride in its last dimension, got strides {x.stride()}")
    return x


def check_whole(name: str, x: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """The address of a contiguous tensor."""
    if not check(name, x, dtype, *shape).is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {x.stride()} for shape {list(x.shape)}")
    return x.data_ptr()


def check_rows_apart(name: str, x: Tensor) -> None:
    """The rows of a tensor that is written do not overlap."""
    if x.shape[0] > 1 and x.stride(0) < x.shape[1]:
        raise ValueError(f"{name} is written, so its rows must not overlap, got strides {x.stride()} for shape {list(x.shape)}")


def residual_argument(residual: Tensor | None, dtype: torch.dtype, *shape: int) -> tuple[int, int]:
    """Address and row stride of a residual stream, which is written; zeros for none."""
    if residual is None:
        return 0, 0
    check_rows_apart("residual", check("residual", residual, dtype, *shape))
    return residual.data_ptr(), residual.stride(0)


def norm_argument(norm: Norm | None, size: int) -> NormArgument:
    if norm is None:
        return None
    weight = 0 if norm.weight is None else check_whole("norm.weight", norm.weight, torch.float32, size)
    bias = 0 if norm.bias is None else check_whole("norm.bias", norm.bias, torch.float32, size)
    return weight, bias, norm.eps, norm.layer, norm.round_first
