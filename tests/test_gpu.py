"""On a CUDA device: the same vectors as on the CPU. Collected everywhere, run where there is one."""

import numpy as np
import pytest
import torch

from pyembed import Encoder, quantising

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TEXTS = ["What is Deep Learning?", "a", "", "The quick brown fox jumps over the lazy dog. " * 12]


@pytest.mark.parametrize("backend", ["reference", "kernels"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3", "gemma2", "embeddinggemma", "bert", "xlm-roberta"])
def test_tiny_models_on_cuda(checkpoint, name, backend):
    import checkpoints

    texts = checkpoints.sentences((1, 2, 17, 40, 75))
    ours = Encoder(checkpoint(name), device="cuda", dtype="float32", backend=backend).encode(texts)
    right = Encoder(checkpoint(name), device="cpu", dtype="float32").encode(texts)
    assert (np.linalg.norm(ours - right, axis=1) / np.linalg.norm(right, axis=1)).max() <= 1e-4  # TF32 is off by default


def test_minilm_on_cuda(minilm):
    right = Encoder(minilm, device="cpu", dtype="float32").encode(TEXTS)
    for dtype, cosine in (("float32", 0.99999), ("bfloat16", 0.9995), ("float16", 0.9995)):
        encoder = Encoder(minilm, device="cuda", dtype=dtype)
        assert encoder.device.type == "cuda"
        assert (encoder.encode(TEXTS) * right).sum(1).min() >= cosine
        assert encoder.encode(TEXTS, convert_to_tensor=True).is_cuda


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="this card multiplies no bfloat16")
@pytest.mark.parametrize("backend", ["reference", "kernels"])
def test_int8_on_cuda(minilm, backend, monkeypatch):
    """What the same scheme gives on a CPU: nearer to that than that is to float32. One short text has 16 rows."""
    right = Encoder(minilm, device="cpu", dtype="float32").encode(TEXTS)
    encoder = Encoder(minilm, device="cuda", dtype="int8", backend=backend)
    vectors = encoder.encode(TEXTS)
    assert (vectors * right).sum(1).min() >= 0.97  # of no text at all: 0.981
    monkeypatch.setattr(quantising, "is_symmetric", lambda dtype, device: True)
    same = Encoder(minilm, device="cpu", dtype="int8", backend="reference")
    assert quantising.stayed(encoder._engine.errors) == quantising.stayed(same._engine.errors)
    assert np.linalg.norm(vectors - same.encode(TEXTS)) <= 0.5 * np.linalg.norm(same.encode(TEXTS) - right)
    for text, vector in zip(TEXTS, vectors, strict=True):
        assert encoder.encode(text) @ vector >= 0.999


def test_encode_moves_the_model(minilm):
    encoder = Encoder(minilm, device="cpu")
    encoder.encode("a", device="cuda")
    assert encoder.device.type == "cuda"


def test_workers_on_cuda_and_the_cpu(minilm):
    right = Encoder(minilm, device="cpu", dtype="float32").encode(TEXTS * 9)
    encoder = Encoder(minilm, device=["cuda:0", "cpu"], dtype="float32", tokens_per_batch=64)
    assert (encoder.encode(TEXTS * 9) * right).sum(1).min() >= 0.99999
    assert [str(each) for each in encoder.devices] == ["cuda:0", "cpu"]
    assert encoder.encode(TEXTS, convert_to_tensor=True).is_cuda
