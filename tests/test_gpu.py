"""On a CUDA device: the same vectors as on the CPU. Collected everywhere, run where there is one."""

import numpy as np
import pytest
import torch

from pyembed import Encoder, quantising
from pyembed.ops.budget import activation_bytes

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


# The steady state


@pytest.fixture
def many():
    """Texts of all lengths, and queries of one form."""
    import checkpoints

    return checkpoints.sentences([n % 75 + 1 for n in range(400)]), [checkpoints.sentences((3 + n, 12 - n), n) for n in range(4)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "bert"])
def test_graphs_and_streams_change_nothing(checkpoint, many, name, dtype):
    given = {"device": "cuda", "dtype": dtype, "backend": "kernels"}
    ours, plain = (Encoder(checkpoint(name), cuda_graphs=each, **given) for each in (True, False))
    assert len(ours._loaded.streams) == 2, "a small model has two"
    for texts in (many[0], *many[1] * 3):
        y, right = ours.encode(texts), plain.encode(texts)
        assert (np.linalg.norm(y - right, axis=1) / np.linalg.norm(right, axis=1)).max() <= (1e-5 if dtype == "float32" else 0.02)
    assert any(each.made for each in ours._loaded.graphs), "recorded"
    assert not any(each.failure for each in ours._loaded.graphs)
    assert "recorded)" in repr(ours)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "bert"])
def test_deterministic_on_cuda(checkpoint, many, name, dtype):
    """The same bits alone, in batches of any size, in any order, replayed or launched."""
    encoder = Encoder(checkpoint(name), device="cuda", dtype=dtype, backend="kernels", deterministic=True, prefix_cache_bytes=0)
    texts = many[0][:150]
    together = encoder.encode(texts)
    assert np.array_equal(np.stack([encoder.encode(each) for each in texts]), together)
    assert np.array_equal(encoder.encode(texts[::-1])[::-1], together)
    assert np.array_equal(encoder.encode(texts, batch_size=7), together)


def test_nothing_waits_and_nothing_is_allocated(checkpoint, many):
    """After the first rounds the host reads nothing of the device but vectors, behind an event, and the allocator asks for nothing."""
    encoder = Encoder(checkpoint("qwen3"), device="cuda", dtype="bfloat16", backend="kernels")
    for _ in range(6):
        for texts in (many[0], *many[1]):
            right = encoder.encode(texts)
    torch.cuda.synchronize()
    names = ("segment.all.allocated", "num_alloc_retries", "num_ooms")
    before, used = [torch.cuda.memory_stats()[each] for each in names], torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for n in range(1000):
            y = encoder.encode(many[1][n % 4] if n % 20 else many[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert [torch.cuda.memory_stats()[each] for each in names] == before
    assert torch.cuda.memory_allocated() == used, "no creep"
    assert y.shape == right.shape


def test_weights_are_in_memory_once_while_they_are_read(minilm):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    encoder = Encoder(minilm, device="cuda", dtype="bfloat16", backend="kernels")
    weights = torch.cuda.memory_allocated() - before
    assert weights >= 22_000_000 * 2
    assert torch.cuda.max_memory_allocated() - before <= weights * 1.3
    for n in range(20):
        encoder.encode(TEXTS * n)
    batch = encoder._engine.budget.tokens * 2 * activation_bytes(encoder.spec.model, 2)
    assert torch.cuda.max_memory_allocated() - before <= weights + batch
