"""What goes to a device and comes back without the host waiting for it: pinned memory and copies in the order of the stream.

On a CPU nothing is copied: arrays and tensors are handed on as they are. On CUDA a batch's arrays lie side by side in one pinned buffer,
since a copy costs more by its start than by its bytes; torch's allocator of pinned memory gives a buffer away again once its copy is over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

TELLING = threading.RLock()  # of the thread that tells CUDA devices what to do: torch's switches, and what is recorded, are the process's
APART = 16  # bytes to which an array's start is aligned: kernels are compiled for pointers that are multiples of it
Form = tuple[tuple[int, ...], np.dtype]  # shape and dtype of an array
# of torch's allocator, of oneDNN where it finds no room for a GEMM's code or scratch, of CUDA, Triton and cuBLAS
NO_MEMORY = (
    *("not enough memory", "can't allocate memory", "could not create a primitive", "could not create a memory"),
    *("out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),
)
DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}


@dataclass(frozen=True, slots=True)
class Sheet:
    """Where arrays lie in one buffer."""

    forms: dict[str, Form]
    starts: dict[str, int]  # bytes
    size: int  # bytes

    @staticmethod
    def of(forms: Mapping[str, Form]) -> Sheet:
        starts, at = {}, 0
        for name, (shape, dtype) in forms.items():
            starts[name] = at
            at += -(-prod(shape) * dtype.itemsize // APART) * APART
        return Sheet(dict(forms), starts, at)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The arrays as tensors of a buffer [size] uint8."""
        out = {}
        for name, (shape, dtype) in self.forms.items():
            part = buffer[self.starts[name] : self.starts[name] + prod(shape) * dtype.itemsize]
            out[name] = part.view(DTYPES[dtype]).view(shape)
        return out

    def fill(self, buffer: Tensor, arrays: Mapping[str, np.ndarray]) -> None:
        """Copy arrays of just these forms into a buffer of the host."""
        for name, view in self.views(buffer).items():
            np.copyto(view.numpy(), arrays[name], casting="no")


def to_device(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """int32 and int64 arrays as tensors on `device`, which may still be on their way; on a CPU they share the arrays' memory."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    sheet = Sheet.of({name: (array.shape, array.dtype) for name, array in arrays.items()})
    buffer = pinned(sheet.size, torch.uint8)
    sheet.fill(buffer, arrays)
    return sheet.views(buffer.to(device, non_blocking=True))


def pinned(shape: int | torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory of the host that a device reads and writes by itself."""
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=torch.cuda.is_available())


def to_host(x: Tensor) -> tuple[Tensor | None, Callable[[], Tensor] | None]:
    """`x` where it is on the CPU; else what waits for its copy there and gives it."""
    if x.device.type == "cpu":
        return x, None
    copies = [pinned(x.shape, x.dtype)]
    copies[0].copy_(x, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(x.device))

    def landed() -> Tensor:
        event.synchronize()
        out = copies[0].clone()
        with TELLING:  # torch records an event on the stream when pinned memory is given back
            copies.clear()
        return out

    return None, landed


def out_of_memory(error: BaseException) -> bool:
    """torch's allocator on CUDA and the C++ kernels have exceptions of their own; the others raise RuntimeError with one of NO_MEMORY."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in NO_MEMORY)
