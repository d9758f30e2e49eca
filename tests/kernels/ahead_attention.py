"""Launches that ahead.py compiles: attention and rotation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from ahead_rows import BF16, FP16, FP32, Call, empty, some_norm
from torch import Tensor

from pyembed.kernels import attention, tiles
from pyembed.kernels.qk_norm_rope import LAUNCHES as ROPE_LAUNCHES
from pyembed.kernels.qk_norm_rope import qk_norm_rope
from pyembed.ops import DistanceBias, Norm, Prefix


def attend(form: str, width: int, dtype: torch.dtype, heads: int = 4, queries: int = 0, extras: str = "") -> Call:
    """A call of attention that launches tiles of one form. Extras: softcap, prefix, bias."""
    count = queries or (tiles.SHORT + 1 if form == "long" else 1)
    q, k = empty(count, heads, width, dtype=dtype), empty(count, 1, width, dtype=dtype)
    cu, index = torch.tensor([0, count], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    options: dict[str, Any] = {"q_start": index[:1] if form == "few" else None}
    if "softcap" in extras:
        options["softcap"] = 50.0
    if "prefix" in extras:
        options["prefix"] = Prefix(k, k, index, index[:1])
    if "bias" in extras:
        options["bias"] = DistanceBias(empty(heads, 9, dtype=FP32))
    return lambda: attention.attention(q, k, k, cu, cu, attention.schedule([count]), causal=True, scale=1.0, **options)


FORMS = (("long", BF16), ("few", BF16), ("short", BF16), ("long", FP32), ("few", FP32))
EXTRAS = ("", "softcap", "prefix", "softcap, prefix", "bias", "softcap, prefix, bias")


def telling(form: str, width: int, dtype: torch.dtype, extras: str) -> bool:
    """Each entry of both tables once, with the options that take most registers, and long tiles as nearly all models have them."""
    if not extras:
        return form == "long" and dtype is BF16
    return extras in ("prefix" if width == 128 else "softcap, prefix", EXTRAS[-1])


def attentions(every: bool) -> Iterator[tuple[str, Call]]:
    for (form, dtype), width, extras in itertools.product(FORMS, (16, 32, 64, 128, 256), EXTRAS):
        if every or telling(form, width, dtype, extras):
            yield f"{form} {width} {dtype} {extras}".strip(), attend(form, width, dtype, extras=extras)
        if every and form == "short":
            yield f"{form} {width} {dtype} one head {extras}".strip(), attend(form, width, dtype, heads=1, extras=extras)
    yield "long 80 float16", attend("long", 80, FP16, heads=3)
    yield "short 32 float16 one head", attend("short", 32, FP16, heads=1)


def turn(width: int, dtype: torch.dtype, rotary: int, interleaved: bool, q_norm: Norm | None, k_norm: Norm | None, tokens: int = 3) -> Call:
    table, rows = empty(5, rotary // 2, dtype=FP32), torch.zeros(tokens, dtype=torch.int64)
    given: dict[str, Tensor] = {"cos": table, "sin": table, "rows": rows} if rotary else {}
    return lambda: qk_norm_rope(empty(tokens, 8 * width, dtype=dtype), 4, 2, **given, interleaved=interleaved, q_norm=q_norm, k_norm=k_norm)


def rotations() -> Iterator[tuple[str, Call]]:
    for width in ROPE_LAUNCHES:
        norm = some_norm(width, round_first=True)
        yield f"rope {width}", turn(width, BF16, width, False, norm, norm)
        yield f"rope {width} float32 in pairs", turn(width, FP32, width, True, norm, None)
    yield "rope 80 in part", turn(80, FP16, 24, False, None, some_norm(80))
    yield "rope 80 in part, in pairs", turn(80, FP16, 24, True, None, some_norm(80))
    yield "norms alone 128", turn(128, BF16, 0, False, some_norm(128, layer=True), some_norm(128))


def cases(every: bool = False) -> Iterator[tuple[str, Call]]:
    yield from attentions(every)
    yield from rotations()
