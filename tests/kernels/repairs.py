"""Repairs the conversions and products of Triton's interpreter, so that kernels compute there what a GPU computes.

Without this `tl.dot` multiplies the bits of bfloat16, float32 -> bfloat16 cuts instead of rounding, and conversions to eight bits lose
carries. Conversions are torch's here. Those to float8_e4m3fn saturate, as the instruction does (PTX has no other). Arithmetic in
bfloat16 is refused: a kernel computes in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

STORED_AS_BITS = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}
FP8_MAX = 448.0


def _values(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    """What the interpreter holds as an array, in the dtype that it stands for."""
    x = torch.from_numpy(np.array(data))
    return x.view(STORED_AS_BITS[dtype][0]) if dtype in STORED_AS_BITS else x


def convert(data: np.ndarray, source: tl.dtype, to: tl.dtype) -> np.ndarray:
    """Rounds to nearest, ties to even."""
    x = _values(data, source)
    if to == tl.float16:
        return x.to(torch.float16).numpy()
    if to not in STORED_AS_BITS:
        return x.float().numpy().astype(interpreter._get_np_dtype(to))
    if to == tl.float8e4nv:
        x = x.float().clamp(-FP8_MAX, FP8_MAX)
    dtype, bits = STORED_AS_BITS[to]
    return x.to(dtype).view(bits).numpy()


def _cast(plain: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def cast(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype, *rounding: Any) -> TensorHandle:
        source, to = src.dtype.scalar, dst_type.scalar
        if source not in STORED_AS_BITS and to not in STORED_AS_BITS:
            return plain(self, src, dst_type, *rounding)
        return TensorHandle(convert(src.data, source, to), to)

    return cast


def _no_bits(plain: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def op(self: InterpreterBuilder, *arguments: Any) -> TensorHandle:
        for each in arguments:
            if isinstance(each, TensorHandle) and each.dtype.scalar in STORED_AS_BITS:
                raise TypeError(f"arithmetic on {each.dtype.scalar}, which the interpreter would do on its bits: convert to float32 first")
        return plain(self, *arguments)

    return op


def _dot(plain: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        if a.dtype.scalar in STORED_AS_BITS:
            a, b = (TensorHandle(convert(x.data, x.dtype.scalar, tl.float32), tl.float32) for x in (a, b))
        return plain(self, a, b, *rest)

    return dot


def _patch_once(plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A launch patches the whole language; the interpreter would do it again for each call of a device function, in half of its time."""
    whole = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    return lambda fn: plain(whole)


def repair() -> None:
    """To be called once in a process."""
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = _cast(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.create_dot = _dot(InterpreterBuilder.create_dot)
    InterpreterBuilder.binary_op = _no_bits(InterpreterBuilder.binary_op)
    InterpreterBuilder.unary_op = _no_bits(InterpreterBuilder.unary_op)
    interpreter._patch_lang = _patch_once(interpreter._patch_lang)
    InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
