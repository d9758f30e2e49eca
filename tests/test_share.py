"""Texts of one batch run their common beginnings once; and the same bits as without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch

from pyembed import Encoder

Directory = Callable[[str], Path]
PROMPT = checkpoints.sentence(25, 5) + " "


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("pooling", ["weightedmean", ["mean", "weightedmean"], "mean", "lasttoken"])
def test_a_kept_prompt_that_pooling_leaves_out_still_counts(checkpoint: Directory, pooling: Any) -> None:
    """A weighted mean numbers a text's tokens from its start, the prompt's included."""
    arguments = {"device": "cpu", "dtype": "float32", "pooling": pooling, "include_prompt": False}
    on, off = (Encoder(checkpoint("llama"), prefix_cache_bytes=size, **arguments) for size in (None, 0))
    texts = checkpoints.sentences((3, 10, 17))
    assert np.array_equal(on.encode(texts, prompt=PROMPT), off.encode(texts, prompt=PROMPT))
    assert on.stats.prefix_tokens == 3 * 25
