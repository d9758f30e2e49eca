"""Rotary position tables: cos and sin in float32, grown as longer texts arrive, per text where the scaling depends on its length."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyembed.batch import PackedBatch
from pyembed.config import Rope


def inverse_frequencies(rope: Rope, length: int = 0) -> Tensor:
    """[R / 2] float32 on the CPU. `length` is the text's own length, which only `dynamic` and `longrope` look at.

    default: RoFormer (arXiv 2104.09864); dynamic: NTK-aware by length; llama3: Llama 3.1's wavelength bands; yarn: arXiv 2309.00071;
    longrope: arXiv 2402.13753; proportional: Gemma 4's, the first frequencies of the whole head's, then zeros.
    """
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32, device="cpu") / rope.dim
    theta = rope.theta
    if rope.kind == "dynamic" and length > rope.original_max_position:
        stretch = rope.factor * length / rope.original_max_position - (rope.factor - 1)
        theta *= stretch ** (rope.dim / (rope.dim - 2))
    if rope.kind == "longrope":
        factors = rope.long_factors if length > rope.original_max_position else rope.short_factors
        return 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * theta**exponents)
    frequencies = 1.0 / (theta**exponents)
    if rope.kind == "proportional":
        frequencies[rope.rotated // 2 :] = 0
    if rope.kind in ("linear", "proportional"):
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
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}  # cos and sin [rows, R / 2] by `deciding`; at most two of them
        self.outgrown: list[tuple[Tensor, Tensor]] = []  # on CUDA: graphs and other streams may read them

    def deciding(self, length: int) -> int:
        """The length that decides the frequencies of a text: 0 for every text that the scaling leaves alone."""
        if self.rope.kind not in ("dynamic", "longrope") or length <= self.rope.original_max_position:
            return 0
        return length if self.rope.kind == "dynamic" else self.rope.original_max_position + 1

    def table(self, deciding: int, longest: int) -> tuple[Tensor, Tensor]:
        """cos and sin of at least `longest` positions."""
        kept = self.tables.get(deciding)
        if kept is None or len(kept[0]) < longest:
            grown = deciding == 0 or self.rope.kind == "longrope"  # of a dynamic one the next text has another
            cos, sin = table(self.rope, 1 << (longest - 1).bit_length() if grown else longest, deciding)
            kept = cos.to(self.device), sin.to(self.device)
            if grown:
                if self.device.type == "cuda" and deciding in self.tables:
                    self.outgrown.append(self.tables[deciding])
                self.tables[deciding] = kept
        return kept

    def rows(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """cos and sin [rows, R / 2], and the row of each token of the batch [T]. Texts that look at different tables get all of them."""
        longest: dict[int, int] = {}  # of the texts that share a table
        totals = [before + own for before, own in zip(batch.before, batch.lengths, strict=True)]
        for length in totals:
            longest[self.deciding(length)] = max(length, longest.get(self.deciding(length), 1))
        tables = {deciding: self.table(deciding, most) for deciding, most in (longest or {0: 1}).items()}
        if len(tables) == 1:
            return *next(iter(tables.values())), batch.positions
        first, starts = 0, {}
        for deciding, (cos, _) in tables.items():
            starts[deciding] = first
            first += len(cos)
        rows, start = batch.positions.clone(), 0
        for length, total in zip(batch.lengths, totals, strict=True):
            rows[start : start + length] += starts[self.deciding(total)]
            start += length
        return torch.cat([cos for cos, _ in tables.values()]), torch.cat([sin for _, sin in tables.values()]), rows
