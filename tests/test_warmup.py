"""Warming up: which batches it runs, and what `pyembed warmup` says where Triton compiles. (What they compile: tests/kernels.)"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pyembed import Encoder, cli, compiler, warmup
from pyembed.compiler import NoCompiler

Directory = Callable[[str], Path]
PROMPTS = {"query": "w4 w5 w6 w7 w8 w9 w10 w11 w12 ", "document": "w9 w8 "}


def asked(encoder: Encoder) -> list[dict[str, Any]]:
    kinds = warmup.kinds(encoder)
    assert len(kinds) % 3 == 0
    return [arguments for _, arguments in kinds[::3]]


def test_short_texts_a_long_one_and_both(minilm: Path) -> None:
    encoder = Encoder(minilm, device="cpu")
    (short, _), (long, _), (both, _) = warmup.kinds(encoder)
    lengths = [len(ids) for ids in encoder.token_ids([*short, *long, *both])]
    assert lengths[0] <= 32 and 120 < lengths[1] <= 256 and max(lengths[2:5]) <= 32 and sum(lengths[2:]) > warmup.LONG
    encoder.encode(both)
    assert encoder.stats.duplicates == encoder.stats.truncated == 0


@pytest.mark.parametrize("limit", [3, 40, 256])
def test_no_text_is_cut(minilm: Path, limit: int) -> None:
    encoder = Encoder(minilm, device="cpu", max_seq_length=limit)
    took = encoder.warmup()
    assert min(took.first, took.others, took.again) > 0 and took.kinds == 3
    assert encoder.stats.truncated == 0 or limit == 3  # a short text has more
    _, (long, _), (both, _) = warmup.kinds(encoder)
    assert len(both) == 3 + -(-warmup.LONG // min(warmup.LONG, limit // 2)) and long == both[3:4]


def test_each_thing_that_is_put_before_texts_once(checkpoint: Directory) -> None:
    model: dict[str, Any] = {"model": checkpoint("llama"), "device": "cpu", "dtype": "float32"}
    assert asked(Encoder(**model)) == [{}, {"prompt": warmup.PROMPT}]  # it keeps prompts, but has none
    assert asked(Encoder(**model, prompts=PROMPTS)) == [{}, {"prompt_name": "query"}, {"prompt_name": "document"}]
    short = {"query": "w4 ", "document": ""}
    assert asked(Encoder(**model, prompts=short)) == [{}, {"prompt_name": "query"}, {"prompt": warmup.PROMPT}]
    assert asked(Encoder(**model, prompts=PROMPTS, default_prompt_name="query")) == [{}, {"prompt_name": "document"}]
    assert asked(Encoder(**model, prefix_cache_bytes=0)) == [{}]
    assert asked(Encoder(**model, template="w4 {text} w5")) == [{}]  # no prompt has a place in it
    assert asked(Encoder(checkpoint("bert"), device="cpu")) == [{}]


def test_every_lane_and_stream_meets_every_kind(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(warmup, "run", lambda encoder, kind: ran.append(kind[0]))
    encoder = Encoder(minilm, device="cpu")

    def turns() -> list[int]:
        ran.clear()
        warmup.warmup(encoder)
        kinds = [texts for texts, _ in warmup.kinds(encoder)]
        assert ran[0] == kinds[0] and ran[-3:] == kinds
        return [ran[1:-3].count(texts) for texts in kinds]

    assert turns() == [1, 1, 1]
    engine: Any = encoder._engine
    monkeypatch.setattr(warmup, "on_cuda", lambda encoder: True)
    monkeypatch.setattr(engine, "lanes", engine.lanes * 2)
    engine.budget = SimpleNamespace(streams=2)
    assert turns() == [8, 8, 8]  # two lanes, two streams of each, and a graph is recorded with the second batch


def test_vectors_stay_as_they_are(checkpoint: Directory) -> None:
    texts = ["w4 w5 w6", "w7"]
    cold, warm = (Encoder(checkpoint("llama"), device="cpu", dtype="float32") for _ in range(2))
    warm.warmup()
    assert np.array_equal(cold.encode(texts), warm.encode(texts))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A CUDA device that Triton's kernels would serve, and an empty cache."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(warmup, "kernels_of", lambda device, dtype, backend: SimpleNamespace(__name__="pyembed.ops.cuda"))
    return tmp_path / "cache"


def test_what_was_compiled_is_counted(card: Path, minilm: Path) -> None:
    encoder = Encoder(minilm, device="cpu")

    def told(*new: str) -> str:
        def make() -> Encoder:
            for name in new:
                (card / name).mkdir(parents=True)
            return encoder

        return warmup.report(make, [torch.device("cuda")], "kernels", 0.0)

    assert f"compiled         2 kernels and launchers, 0 were there, in {card}\n" in told("a", "b")
    assert f"compiled         0 kernels and launchers, 2 were there, in {card}\n" in told()


def test_no_compiler_is_told_before_anything_is_loaded(
    card: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless the cache has something, which may be all that is needed."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(NoCompiler, match="there is no gcc and no clang"):
        warmup.report(lambda: pytest.fail("it was loaded"), [torch.device("cuda")], "kernels", 0.0)
    assert cli.main(["warmup", str(minilm), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("pyembed: Triton needs a C compiler and this Python's headers once")
    (card / "a").mkdir(parents=True)
    assert compiler.compiled() == {card / "a"}
    assert cli.main(["warmup", str(minilm), "--device", "cpu"]) == 0
