"""all-MiniLM-L6-v2 with its real weights against sentence-transformers, and against numbers computed with transformers 5.23."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from pyembed import Encoder

COUNT = 500


@pytest.fixture(scope="module")
def texts(docstrings: list[str]) -> list[str]:
    """Spread over the whole library, from one word to more than the model reads."""
    return docstrings[:: len(docstrings) // COUNT][:COUNT]


@pytest.fixture(scope="module")
def right(minilm: Path, texts: list[str]) -> np.ndarray:
    return SentenceTransformer(str(minilm), device="cpu").encode(texts, batch_size=64)


def test_numbers_of_one_text(minilm: Path, backend: str | None) -> None:
    """Mean of the last hidden states, before the norm; source: transformers 5.23, BertModel in float32."""
    vector = Encoder(minilm, device="cpu", dtype="float32", normalize=False, backend=backend).encode("What is Deep Learning?")
    assert vector.shape == (384,)
    assert np.abs(vector[:5] - [-0.590237, -0.252319, 0.149686, 0.054787, -0.118040]).max() <= 1e-4
    assert abs(np.linalg.norm(vector) - 7.581584) <= 1e-4


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.99999), ("bfloat16", 0.9995)])
def test_docstrings(minilm: Path, texts: list[str], right: np.ndarray, dtype: str, least: float, backend: str | None) -> None:
    assert len(texts) == COUNT
    some = slice(None, None, 8 if backend == "reference" else 1)  # plain PyTorch takes ten times as long
    encoder = Encoder(minilm, device="cpu", dtype=dtype, backend=backend)
    ours = encoder.encode(texts[some])
    assert np.allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
    assert (ours * right[some]).sum(1).min() >= least
    assert 0 < encoder.stats.truncated < len(ours)


def test_the_limit_is_that_of_the_model(minilm: Path) -> None:
    """sentence_bert_config.json says 256; the truncation to 128 that tokenizer.json stores is not for readers of that file."""
    assert json.loads((minilm / "tokenizer.json").read_text())["truncation"]["max_length"] == 128
    encoder = Encoder(minilm, device="cpu", dtype="float32")
    assert encoder.max_seq_length == 256
    exact, longer, other = "word " * 254, "word " * 255, "word " * 127 + "other " * 127
    assert len(encoder.encode(exact, output_value="token_embeddings")) == 256
    assert encoder.stats.truncated == 0
    assert (encoder.encode(longer) == encoder.encode(exact)).all()
    assert encoder.stats.truncated == 1
    assert np.abs(encoder.encode(other) - encoder.encode(exact)).max() > 1e-2  # what follows token 128 is read


def test_what_the_files_say(minilm: Path) -> None:
    encoder = Encoder(minilm, device="cpu", dtype="float32")
    spec = encoder.spec
    assert (encoder.dim, spec.model.num_layers, spec.model.causal, spec.pooling.modes, spec.normalize) == (384, 6, False, ("mean",), True)
    assert encoder.similarity_fn_name == "cosine"
