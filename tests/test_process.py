"""Threads, pickling, forked children, and torch's thread count."""

import multiprocessing
import pickle
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pyembed import Encoder

TEXTS = [f"text number {n} " * (n % 9 + 1) for n in range(40)]


@pytest.fixture(scope="module")
def encoder(minilm):
    return Encoder(minilm, device="cpu", dtype="float32")


def test_threads_may_encode_at_once(encoder):
    expected = encoder.encode(TEXTS)
    before = encoder.stats.texts
    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(lambda n: encoder.encode(TEXTS[n:], batch_size=1 + n), range(12)))
    for n, result in enumerate(results):
        assert np.array_equal(result, expected[n:])
    assert encoder.stats.texts - before == sum(len(TEXTS) - n for n in range(12))


def test_pickling_loads_the_model_again(minilm):
    encoder = Encoder(minilm, dtype="float32", prompts={"query": "q: "}, truncate_dim=64, max_seq_length=100)
    encoder.max_seq_length = 80
    blob = pickle.dumps(encoder)
    assert len(blob) < 10_000  # the arguments, not the weights
    copy = pickle.loads(blob)
    assert copy.max_seq_length == 80
    encoder.prompts["query"], encoder.truncate_dim, encoder.similarity_fn_name, encoder.default_prompt_name = "new ", 8, "dot", "query"
    copy = pickle.loads(pickle.dumps(encoder))
    assert np.array_equal(copy.encode(TEXTS), encoder.encode(TEXTS))
    assert copy.encode(TEXTS).shape[1] == 8
    assert copy.similarity_fn_name == "dot"
    encoder.truncate_dim, encoder.prompts["query"] = 64, "q: "
    copy = pickle.loads(pickle.dumps(encoder))
    assert b"secret" not in pickle.dumps(Encoder(minilm, token="secret"))
    assert np.array_equal(copy.encode_query(TEXTS), encoder.encode_query(TEXTS))


def _in_child(encoder, queue):
    try:
        queue.put(encoder.encode("a").shape)
    except Exception as error:
        queue.put(f"{type(error).__name__}: {error}")


def test_a_forked_child_is_told(encoder):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(encoder, queue))
    child.start()
    answer = queue.get(timeout=60)
    child.join(30)
    assert child.exitcode == 0
    assert "RuntimeError" in answer
    assert "forked" in answer


def _finish(stream, queue):
    try:
        queue.put(len(list(stream)))
    except Exception as error:
        queue.put(f"{type(error).__name__}: {error}")


def test_a_stream_carried_over_a_fork_is_told_too(encoder, monkeypatch):
    monkeypatch.setattr("pyembed.engine.WINDOW_TEXTS", 4)
    stream = encoder.stream(TEXTS)
    next(stream)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_finish, args=(stream, queue))
    child.start()
    answer = queue.get(timeout=60)
    child.join(30)
    assert "forked" in str(answer)


def test_a_spawned_process_loads_its_own(encoder):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert np.array_equal(pool.submit(encoder.encode, TEXTS[:3]).result(timeout=120), encoder.encode(TEXTS[:3]))


def test_torch_threads_are_left_alone_and_respected(encoder):
    before = torch.get_num_threads()
    expected = encoder.encode(TEXTS)
    seen = {}

    def work():
        torch.set_num_threads(1)
        seen["vectors"], seen["threads"] = encoder.encode(TEXTS), torch.get_num_threads()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen["threads"] == 1
    assert np.array_equal(seen["vectors"], expected)
    assert torch.get_num_threads() == before
