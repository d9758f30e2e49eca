"""What every wrapper of a Triton kernel checks before it launches one."""

from __future__ import annotations

import torch
from torch import Tensor

from pyembed.ops import Norm

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def activations(name: str, x: Tensor) -> torch.dtype:
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be bfloat16, float16 or float32, got {x.dtype}")
    return x.dtype


def check(name: str, x: Tensor, dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    """`x` is on that device, of that dtype and shape (-1: any size), and its last dimension is contiguous."""
    if x.device != device or x.dtype is not dtype:
        raise ValueError(f"{name} must be a {dtype} tensor on {device}, got {x.dtype} on {x.device}")
    got = x.shape
    if len(got) != len(shape) or any(want not in (-1, size) for want, size in zip(shape, got, strict=True)):
        raise ValueError(f"{name} must have shape {list(shape)} (-1: any), got {list(got)}")
    if got[-1] > 1 and x.stride(-1) != 1 and x.numel() > 0:
        raise ValueError(f"{name} must have unit stride in its last dimension, got strides {x.stride()}")
    return x


def check_whole(name: str, x: Tensor, dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    if not check(name, x, dtype, device, *shape).is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {x.stride()} for shape {list(x.shape)}")
    return x


def weight_and_bias(norm: Norm | None, size: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    if norm is None:
        return None, None
    weight, bias = norm.weight, norm.bias
    return (
        None if weight is None else check_whole("norm.weight", weight, torch.float32, device, size),
        None if bias is None else check_whole("norm.bias", bias, torch.float32, device, size),
    )
