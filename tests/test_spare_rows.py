"""Rows that belong to no text are run only where a layer needs them for a row to have the same bits in any batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest
import torch

from pyembed import Encoder
from pyembed.ops import panels

needs_panels = pytest.mark.skipif(not panels.native(), reason="bfloat16 is the library's here")


@needs_panels
def test_a_projection_of_every_token_keeps_them(tmp_path: Path) -> None:
    """It is the library's, in float32, whose product of one wide row has other bits than that row has among others."""
    case = checkpoints.OPT_350M.but(hidden_size=1536, word_embed_proj_dim=384, num_hidden_layers=1, ffn_dim=64)
    directory = checkpoints.save(replace(case, bos=False, pooling=("max",)), tmp_path)
    texts = checkpoints.sentences([1, 2, 3])
    torch.set_num_threads(1)
    for dtype in ("bfloat16", "int8"):
        encoder = Encoder(directory, device="cpu", dtype=dtype)
        alone = [encoder.encode(text, convert_to_tensor=True) for text in texts]
        assert torch.equal(torch.stack(alone), encoder.encode(texts, convert_to_tensor=True)), dtype


@needs_panels
def test_panels_need_none(checkpoint: Callable[[str], Path]) -> None:
    for name, dtype, spare in [("qwen3", "bfloat16", False), ("qwen3", "int8", False), ("qwen3", "float32", True)]:
        assert Encoder(checkpoint(name), device="cpu", dtype=dtype)._loaded.weights.spare_rows == spare, (name, dtype)
