"""A CUDA graph on a CPU: what was launched once is launched again, on the same memory, whatever the host has come to think meanwhile.

Operations of torch and launches of Triton's interpreter are recorded with the very tensors that they had. Before a replay all memory
that was taken while recording is filled with NaN, as memory that others may have used meanwhile. Reading a number of the device, or
sending it an array, is an error while recording, as it is on a card.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from pyembed import transfer

READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.is_nonzero")
Step = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]


def tensors(tree: Any) -> list[Tensor]:
    """Those that have an address: not weights in a layout of the library's own."""
    return [each for each in tree_leaves(tree) if isinstance(each, Tensor) and not each.is_mkldnn]


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.own: dict[int, Tensor] = {}  # memory that was taken, by its address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(str(func).startswith(each) for each in READS):
            raise RuntimeError(f"the host reads the device: {func}")
        given = {each.untyped_storage().data_ptr() for each in tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        for each in tensors(out):
            if each.untyped_storage().data_ptr() not in given:
                self.own.setdefault(each.untyped_storage().data_ptr(), each)
        return out


def record(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Run `work` once, recorded, and return what replays it."""
    tape, run = Tape(), InterpretedFunction.run

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        tape.steps.append((run, (self, *args), kwargs, None))
        with torch.utils._python_dispatch._disable_current_modes():
            return run(self, *args, **kwargs)

    def sends(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the host sends an array to the device")

    with mock.patch.object(InterpretedFunction, "run", launch), mock.patch.object(transfer, "to_device", sends), tape:
        result = work()

    def replay() -> Tensor:
        for each in tape.own.values():
            whole = torch.empty(0, dtype=torch.uint8).set_(each.untyped_storage())
            whole.fill_(0xFF)  # NaN in every float type
        for func, args, kwargs, out in tape.steps:
            again = func(*args, **kwargs)
            for old, new in zip(tensors(out), tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return result

    return replay
