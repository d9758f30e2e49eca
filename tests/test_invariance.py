"""A text's vector does not depend on its batch: bit for bit on the CPU, whatever else is encoded, in any order, with any threads."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch

from pyembed import Encoder
from pyembed.heads import dense
from pyembed.linear import linear
from pyembed.model import Head

MODELS = ("qwen3", "gemma2", "embeddinggemma", "bert", "minilm")
LENGTHS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 40, 64, 75, 100)
Make = Callable[..., Encoder]


@pytest.fixture(params=MODELS)
def texts_and_make(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], minilm: Path, docstrings: list[str], backend: str | None
) -> tuple[list[str], Make]:
    """Texts of all lengths, and what makes an encoder of the model."""
    real = request.param == "minilm"
    directory = minilm if real else checkpoint(request.param)
    texts = docstrings[:: len(docstrings) // 24][:24] if real else checkpoints.sentences(LENGTHS)

    def make(**arguments: Any) -> Encoder:
        return Encoder(directory, device="cpu", backend=backend, **arguments)

    return texts, make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_alone_in_any_batch_in_any_order(texts_and_make: tuple[list[str], Make], dtype: str) -> None:
    texts, make = texts_and_make
    torch.set_num_threads(1)
    encoder = make(dtype=dtype)
    alone = np.stack([encoder.encode(text) for text in texts])
    assert np.isfinite(alone).all()
    assert len(np.unique(alone, axis=0)) == len(texts)
    assert (encoder.encode(texts) == alone).all()
    for seed in range(3):
        order = random.Random(seed).sample(range(len(texts)), len(texts))
        assert (encoder.encode([texts[i] for i in order]) == alone[order]).all()
    assert (encoder.encode(texts * 3) == np.tile(alone, (3, 1))).all()
    for batch_size in (1, 2, 5):
        assert (encoder.encode(texts, batch_size=batch_size) == alone).all()
    for budget in (1, 50, 100_000):
        assert (make(dtype=dtype, tokens_per_batch=budget).encode(texts) == alone).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_any_number_of_threads(texts_and_make: tuple[list[str], Make], dtype: str, backend: str | None) -> None:
    if backend == "reference":
        pytest.skip("PyTorch's own gelu and exp round an element by its place in a thread's share; the promise is the kernels'")
    texts, make = texts_and_make
    encoder = make(dtype=dtype)
    seen = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        seen.append(encoder.encode(texts))
        seen.append(np.stack([encoder.encode(text) for text in texts[:4]]))
        assert torch.get_num_threads() == threads
    for whole, some in zip(seen[::2], seen[1::2], strict=True):
        assert (whole == seen[0]).all()
        assert (some == seen[0][:4]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_token_states_too(texts_and_make: tuple[list[str], Make], dtype: str) -> None:
    texts, make = texts_and_make
    torch.set_num_threads(1)
    encoder = make(dtype=dtype)
    for text, state in zip(texts, encoder.encode(texts, output_value="token_embeddings"), strict=True):
        assert torch.equal(state, encoder.encode(text, output_value="token_embeddings"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_rows_of_nobody_reach_no_output(texts_and_make: tuple[list[str], Make], dtype: str) -> None:
    """NaN in the rows that pad a batch, from the embedding on, changes no bit; nor do the rows, where the layers need none."""
    texts, make = texts_and_make
    torch.set_num_threads(1)
    encoder = make(dtype=dtype)
    right = encoder.encode(texts)
    encoder._loaded.weights = replace(encoder._loaded.weights, spare_rows=True)
    ops = encoder._loaded.ops
    lengths = [len(ids) for ids in encoder.tokenizer.encode(texts, encoder.max_seq_length).ids]
    own, spare = iter(lengths), []

    def embed(*args: Any, **kwargs: Any) -> torch.Tensor:
        out, length = ops.embed(*args, **kwargs), next(own)
        out[length:] = torch.nan
        spare.append(len(out) - length)
        return out

    exported = {name: getattr(ops, name) for name in dir(ops) if not name.startswith("__")}
    encoder._loaded.ops = SimpleNamespace(**exported | {"embed": embed})
    for text, vector in zip(texts, right, strict=True):
        assert (encoder.encode(text) == vector).all()
    assert max(spare) > 10


def test_memory_is_poisoned() -> None:
    """What the other tests rely on: memory that nobody wrote is NaN, by whichever name it is asked for."""
    like = torch.ones(2, 3, dtype=torch.bfloat16)
    for empty in (torch.empty(5), torch.empty((2, 3), dtype=torch.bfloat16), torch.empty_like(like), like.new_empty(4)):
        assert empty.isnan().all()


@pytest.mark.parametrize("activation", ["identity", "tanh", "gelu", "relu", "silu"])
@pytest.mark.parametrize("width", [7, 40, 768])
def test_dense_modules_of_any_activation_and_width(width: int, activation: str) -> None:
    generator = torch.Generator().manual_seed(width)
    head = Head(linear(torch.randn(width, 24, generator=generator), torch.randn(width, generator=generator)), activation)
    vectors = torch.randn(39, 24, generator=generator) * 4
    with torch.inference_mode():
        alone = torch.cat([dense(vectors[i : i + 1], head) for i in range(len(vectors))])
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(dense(vectors, head), alone)
