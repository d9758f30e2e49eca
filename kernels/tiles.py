"""How `attention` cuts a batch into tiles: the launch table, and the lists of tiles that a schedule makes once for a batch.

A tile is queries x heads of one group, which share the keys and values that they read. It has one of three forms:
- long: queries of one text, as many as fit;
- few: the same with few rows, for texts of at most SHORT queries where `q_start` is given (a last layer that computes what is pooled),
  and in float32, where there is no tensor core to fill;
- short: several texts of at most SHORT queries, each in a slot of UNIT or 2 * UNIT queries and as many keys, under a block-diagonal mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pyembed.transfer import to_device

UNIT = 16  # queries of the smaller slot of a shared tile; the depth of a tensor core's product
SHORT = 2 * UNIT  # queries of a text that may share a tile
HEADS = 8  # of a group in one tile, at most
REGISTERS = 1 << 16  # of a core (a streaming multiprocessor)


@dataclass(frozen=True, slots=True)
class Launch:
    rows: int  # queries x heads of a tile; of a shared tile at most
    keys: int  # in a block; of a shared tile where a group is one head, otherwise SHORT
    warps: int
    stages: int  # of the pipeline that loads keys and values; 1: none
    programs: int = 1  # that are to share a core's registers, where these would not suffice for as many


def _launches(*numbers: tuple[int, ...]) -> dict[int, Launch]:
    """By head dimension, rounded up to a power of two."""
    return {16 << i: Launch(*each) for i, each in enumerate(numbers)}


# By form, card (see `card`) and bytes of a number, which is true float32 if it has four: no tensor cores. Predictions, not measured:
# `python bench/triton_attention.py` prints this table on a GPU. Head dimension: 16, 32, 64, 128, 256. In a pipeline of two stages a block
# is asked for when the one before it is done, and waited for at once; in one of three it is under way meanwhile.
LAUNCHES: dict[tuple[str, int, int], dict[int, Launch]] = {
    ("long", 80, 2): _launches((128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (64, 32, 4, 3), (64, 32, 8, 2)),
    ("long", 90, 2): _launches((128, 64, 8, 3, 2), (128, 64, 8, 3, 2), (128, 64, 8, 3, 2), (128, 64, 8, 3), (128, 32, 8, 3)),
    ("long", 100, 2): _launches((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
}
for _card in (80, 90, 100):
    LAUNCHES |= {
        ("few", _card, 2): _launches((16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 2), (16, 32, 8, 2)),
        ("short", _card, 2): _launches((128, 64, 4, 1), (128, 64, 4, 1), (128, 64, 4, 1), (128, 64, 8, 1), (32, 32, 8, 1)),
        ("long", _card, 4): _launches((64, 32, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        ("few", _card, 4): _launches((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    }
# Where there is a bias, which takes registers, by form and bytes of a number. Nothing is pipelined: the bias would be, number by number.
# Not measured, and not swept.
BIASED: dict[tuple[str, int], dict[int, Launch]] = {
    ("long", 2): _launches((128, 64, 8, 1), (128, 32, 8, 1), (128, 64, 8, 1), (64, 32, 8, 1), (64, 16, 8, 1)),
    ("few", 2): _launches((16, 64, 4, 1), (16, 64, 4, 1), (16, 64, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
    ("short", 2): _launches((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
    ("long", 4): _launches((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    ("few", 4): _launches((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
}


@lru_cache
def card(device: torch.device) -> int:
    """90 and 100 for those generations; 80 for all others, of which some have 99 KiB of shared memory."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return {9: 90, 10: 100}.get(major, 80)


@dataclass(frozen=True, slots=True)
class Tile:
    """A line of the table for one size of group."""

    rows: int
    keys: int
    heads: int  # of a group in one tile
    queries: int  # of one tile
    warps: int
    stages: int
    registers: int  # of a thread, at most


def tile(form: str, at: int, size: int, width: int, group: int, biased: bool) -> Tile:
    """The tile of one form on card `at` for numbers of `size` bytes, heads of `width` and `group` query heads to a key/value head."""
    launch = (BIASED[form, size] if biased else LAUNCHES[form, at, size])[padded(width)]
    # Named even where all may be used: otherwise the assembler spills a few to seat one more program.
    registers = min(255, REGISTERS // (32 * launch.warps * launch.programs))
    if form != "short":
        heads = _even(group, min(HEADS, launch.rows))
        return Tile(launch.rows, launch.keys, heads, launch.rows // heads, launch.warps, launch.stages, registers)
    keys = launch.keys if group == 1 else SHORT
    heads = _even(group, max(1, min(HEADS, launch.rows // keys)))
    return Tile(padded(keys * heads), keys, heads, keys, launch.warps, launch.stages, registers)


def padded(width: int) -> int:
    """Blocks have powers of two, and products at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def _even(group: int, most: int) -> int:
    """Heads in each part of a group that is cut into as few parts of at most `most` as do."""
    return -(-group // -(-group // most))


@dataclass(frozen=True, slots=True)
class Schedule:
    """The queries of a batch's texts, and the tile lists made of them so far: by form, queries of a tile and device."""

    lengths: np.ndarray  # [N] int64
    queries: int  # their sum
    long: np.ndarray  # texts of more than SHORT queries, longest first
    short: np.ndarray  # the others that have any, longest first
    made: dict[tuple[str, int, torch.device], Tensor] = field(default_factory=dict)
    complete: bool = False  # no list may be added to `made`

    def tiles(self, form: str, queries: int, device: torch.device) -> Tensor:
        """[tiles, 2] int32, (text, first query), or [tiles, queries / UNIT] for shared tiles: the text of each unit.

        A tile whose text is -1 is empty: a list may be filled up with such to any length.
        """
        key = (form, queries, device)
        if key not in self.made:
            if self.complete:
                raise RuntimeError(f"attention asks for tiles {form!r} of {queries} queries, of which this graph has no list")
            self.made[key] = to_device({"tiles": self.listed(form, queries)}, device)["tiles"]
        return self.made[key]

    def listed(self, form: str, queries: int) -> np.ndarray:
        """`tiles` on the host."""
        texts = self.long if form == "long" else self.short
        return together(self.lengths, texts, queries // UNIT) if form == "short" else apart(self.lengths, texts, queries)


def schedule(lengths: Sequence[int]) -> Schedule:
    """What `attention` wants to know about a batch's query lengths, made once and used by every layer."""
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    long = sizes[order] > SHORT
    return Schedule(sizes, int(sizes.sum()), order[long], order[~long & (sizes[order] > 0)])


def apart(lengths: np.ndarray, texts: np.ndarray, queries: int) -> np.ndarray:
    """Tiles of one text each: text by text, its last queries first, since under a causal mask those see most."""
    counts = -(-lengths[texts] // queries)
    tiles = np.empty((int(counts.sum()), 2), dtype=np.int32)
    tiles[:, 0] = texts.repeat(counts)
    tiles[:, 1] = (counts.cumsum().repeat(counts) - 1 - np.arange(len(tiles))) * queries
    return tiles


def together(lengths: np.ndarray, texts: np.ndarray, units: int) -> np.ndarray:
    """Tiles of `units` units. A text of more than UNIT queries has two, the first at an even place, for such texts come first."""
    wide = lengths[texts] > UNIT
    slots = np.concatenate([texts[wide].repeat(2), texts[~wide]])
    tiles = np.full((-(-len(slots) // units), units), -1, dtype=np.int32)
    tiles.reshape(-1)[: len(slots)] = slots
    return tiles


@dataclass(frozen=True, slots=True)
class Outline:
    """As much of a schedule as decides how many tiles it may have, rounded up so that many schedules share it. For CUDA graphs."""

    long: int  # texts
    short: int  # texts
    units: int  # of the short texts

    def most(self, form: str, queries: int, rows: int) -> int:
        """Tiles of one form that a schedule of this outline has at most, with `rows` queries in all."""
        if form == "short":
            return -(-self.units // (queries // UNIT))
        return rows // queries + self.long if form == "long" else min(rows, SHORT * self.short) // queries + self.short

    def blank(self, texts: int, made: dict[tuple[str, int, torch.device], Tensor]) -> Schedule:
        """A schedule whose lists of tiles are `made`, to be filled for each batch anew."""
        return Schedule(np.zeros(texts, dtype=np.int64), 0, np.zeros(self.long), np.zeros(self.short), made, complete=True)


def outline(schedule: Schedule) -> Outline:
    """The outline that a schedule has."""
    units = int((1 + (schedule.lengths[schedule.short] > UNIT)).sum())
    return Outline(*(0 if count == 0 else 1 << (count - 1).bit_length() for count in (len(schedule.long), len(schedule.short), units)))
