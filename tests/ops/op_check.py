"""What the kernel tests share: the tolerance rule, and inputs that sit in hostile memory."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]


def error(y: Tensor, r: Tensor) -> float:
    """The largest over rows of max|y - r| / max|r|, r being the float64 oracle; infinite if y is not finite where r is."""
    if y.numel() == 0:
        return 0.0
    off, top = (y.double() - r).abs().amax(-1), r.abs().amax(-1)
    off = torch.where(off.isfinite(), off, torch.inf)
    return float(torch.where(off == 0, 0.0, off / top).max())


def limit(same: Tensor, r: Tensor, dtype: torch.dtype) -> float:
    """What a kernel may lose: twice what the reference loses in the same dtype, and two units in the last place."""
    return 2 * error(same, r) + 2 * torch.finfo(dtype).eps


def assert_right(y: Tensor, same: Tensor, r: Tensor, dtype: torch.dtype) -> None:
    assert y.shape == r.shape, f"shape {list(y.shape)} instead of {list(r.shape)}"
    got, allowed = error(y, r), limit(same, r, dtype)
    if got <= allowed:
        return
    off = (y.double() - r).abs() / r.abs().amax(-1, keepdim=True)
    at = tuple(int(i) for i in torch.unravel_index(torch.where(off.isfinite(), off, torch.inf).argmax(), off.shape))
    raise AssertionError(
        f"error {got:.3g} > {allowed:.3g}; at {at}: {float(y[at])!r}, oracle {float(r[at])!r}, reference {float(same[at])!r}"
    )


def assert_misses(wrong: Tensor, same: Tensor, r: Tensor, dtype: torch.dtype) -> None:
    """The wrong variant next door would be noticed."""
    assert error(wrong, r) > limit(same, r, dtype), f"a wrong variant passes: {error(wrong, r):.3g} <= {limit(same, r, dtype):.3g}"


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """The same numbers on every device; on the default one."""
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return (torch.randn(shape, generator=generator, device="cpu") * scale).to(torch.get_default_device(), dtype)


def hostile(x: Tensor, gap: int = 3) -> Tensor:
    """The same values as a view into memory that is NaN wherever x is not: around each row, before the first and after the last."""
    rows = x.flatten(1)
    big = torch.full((rows.shape[0] + 2, rows.shape[1] + 2 * gap), torch.nan, dtype=x.dtype, device=x.device)
    view = big[1:-1, gap:-gap]
    view.copy_(rows)
    return view.unflatten(1, x.shape[1:]) if x.dim() > 2 else view


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
