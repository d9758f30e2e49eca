"""Rotary position tables: cos and sin in float32, grown as longer texts arrive, per text where the scaling depends on its length."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyembed.batch import PackedBatch
from pyembed.config import Rope


def inverse_frequencies(rope: Rope, length: int = 0) -> Tensor:
    """[R / 2] float32 on the CPU. `length` is the text's own length, which only `dynamic` looks at.

    default: RoFormer (arXiv 2104.09864); dynamic: NTK-aware by length; llama3: Llama 3.1's wavelength bands; yarn: arXiv 2309.00071.
    """
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32, device="cpu") / rope.dim
    theta = rope.theta
    if rope.kind == "dynamic" and length > rope.original_max_position:
        stretch = rope.factor * length / rope.original_max_position - (rope.factor - 1)
        theta *= stretch ** (rope.dim / (rope.dim - 2))
    frequencies = 1.0 / (theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        smooth = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = smooth.clamp(0, 1)  # 1: short waves, unchanged; 0: long waves, divided by the factor
        return (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    if rope.kind == "yarn":
        low, high = (_yarn_dimension(rope, turns) for turns in (rope.beta_fast, rope.beta_slow))
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.dim - 1)
        ramp = ((torch.arange(rope.dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low or 0.001)).clamp(0, 1)
        return frequencies / rope.factor * ramp + frequencies * (1 - ramp)
    return frequencies


def _yarn_dimension(rope: Rope, turns: float) -> float:
    """The dimension whose wave turns `turns` times within the original context."""
    return rope.dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def table(rope: Rope, positions: int, length: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin, each [positions, R / 2] float32 on the CPU, so that every device reads the same values."""
    angles = torch.arange(positions, dtype=torch.float32, device="cpu")[:, None] * inverse_frequencies(rope, length)[None, :]
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


class Rotary:
    """The tables of one rotary embedding on one device; a row's values do not depend on how long the table is."""

    def __init__(self, rope: Rope, device: torch.device) -> None:
        self.rope, self.device = rope, device
        self.cos = self.sin = torch.empty(0, rope.dim // 2, device="cpu")

    def rows(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """cos and sin [rows, R / 2], and the row of each token of the batch [T]."""
        longest = max(batch.lengths, default=1)
        own = longest if self.rope.kind != "dynamic" else min(longest, self.rope.original_max_position)
        if own > len(self.cos):
            cos, sin = table(self.rope, 1 << (own - 1).bit_length())
            self.cos, self.sin = cos.to(self.device), sin.to(self.device)
        if own == longest:
            return self.cos, self.sin, batch.positions
        rows, tables, used = batch.positions.clone(), [(self.cos, self.sin)], len(self.cos)
        start = 0
        for length in batch.lengths:  # dynamic: a text beyond the original context has a table of its own
            if length > self.rope.original_max_position:
                cos, sin = table(self.rope, length, length)
                tables.append((cos.to(self.device), sin.to(self.device)))
                rows[start : start + length] += used
                used += length
            start += length
        return torch.cat([cos for cos, _ in tables]), torch.cat([sin for _, sin in tables]), rows
