"""CUDA graphs of whole models: recorded on one batch, replayed on others of its form. Interpreted, a tape takes the place of the graph."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from test_latent import directory, mistral  # noqa: F401 - fixtures

from pyembed import Encoder, graphs, loading, quantising

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LIMIT = 256  # tokens of a batch that is replayed
Make = Callable[..., Encoder]


def without(encoder: Encoder, texts: list[str], **given: Any) -> np.ndarray:
    """Their vectors, launched kernel by kernel."""
    kept, encoder._loaded.graphs = encoder._loaded.graphs, ()
    try:
        return encoder.encode(texts, **given)  # type: ignore[no-any-return]
    finally:
        encoder._loaded.graphs = kept


def batches(*lengths: tuple[int, ...]) -> list[list[str]]:
    return [checkpoints.sentences(each, seed) for seed, each in enumerate(lengths)]


def off(y: np.ndarray, r: np.ndarray) -> float:
    return float((np.linalg.norm(y - r, axis=1) / np.linalg.norm(r, axis=1)).max())


def check(encoder: Encoder, groups: list[list[str]], forms: int, **given: Any) -> None:
    """Batches of as many forms: each is launched, recorded, then replayed; all give what they give without graphs."""
    right = [without(encoder, texts, **given) for texts in groups]
    own = encoder._loaded.graphs[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for texts, expected in zip(groups, right, strict=True):
            assert off(encoder.encode(texts, **given), expected) <= 1e-6
    assert not own.failure
    assert len(own.made) == forms, own.made.keys()
    assert set(own.made) <= set(own.met)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "xlm-roberta", "bloom", "gptj"])
def test_replayed(made: Make, checkpoint: Callable[[str], Path], name: str) -> None:
    """Long texts and short ones, of other lengths in the same form; then short ones alone."""
    groups = batches((7, 40, 17, 33), (33, 45, 2, 20), (50, 35, 18, 1), (3, 6), (2, 5), (1, 4))
    check(made(checkpoint(name)), groups, 2)


@pytest.mark.parametrize("pooling", ["cls", "weightedmean", "max", "mean"])
def test_poolings(made: Make, checkpoint: Callable[[str], Path], pooling: str) -> None:
    check(made(checkpoint("llama"), pooling=pooling), batches((3, 9), (1, 12), (6, 4)), 1)


def test_nv_embeds_head(made: Make, request: pytest.FixtureRequest) -> None:
    encoder = made(request.getfixturevalue("directory"), recipe="nv-embed", instruction="Find: ")
    check(encoder, batches((3, 40), (2, 42), (5, 36)), 1)


def test_prompts_that_were_kept(made: Make, checkpoint: Callable[[str], Path]) -> None:
    """A prompt's keys are where they were when its graph was recorded; another prompt has a graph of its own."""
    encoder, groups = made(checkpoint("llama")), batches((3, 9), (1, 12), (6, 4))
    for n in range(2):
        check(encoder, groups, n + 1, prompt=checkpoints.sentence(25 + n, n) + " ")
    assert len({form.run for form in encoder._loaded.graphs[0].made}) == 2
    assert encoder._loaded.prefixes is not None
    encoder._loaded.prefixes.runs.popitem(last=False)
    encoder._loaded.graphs[0].tidy()
    assert len(encoder._loaded.graphs[0].made) == 1, "a prompt that is not kept any more keeps no graph"


def test_deterministic(made: Make, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "ROW_BY_ROW", ())  # interpreted on a CPU
    monkeypatch.setattr(loading, "rows_for", lambda width: 32)
    check(made(checkpoint("llama"), deterministic=True, dtype="bfloat16"), batches((3, 9), (1, 12), (6, 4)), 1)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_int8(made: Make, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Also batches of so few rows that zeros are put behind them."""
    monkeypatch.setattr(quantising, "is_symmetric", lambda *_: True)  # interpreted on a CPU
    monkeypatch.setattr(quantising, "LIMIT", math.inf)  # products that are exact in whatever form
    encoder = made(checkpoint(name), dtype="int8")
    check(encoder, batches((3, 9), (1, 12), (6, 4), (20, 33), (23, 35), (18, 40)), 2)
    check(made(checkpoint(name), dtype="int8", deterministic=True), batches((3, 9), (1, 12), (6, 4)), 1)


def test_whatever_a_form_holds_is_read_from_the_batch(
    made: Make, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the arrays counts: one that is not sent anew gives other vectors."""
    encoder, plain = made(checkpoint("llama"), pooling="lasttoken"), graphs.arrays
    prompt, sent = checkpoints.sentence(25, 5) + " ", list[dict[str, np.ndarray]]()
    first, second, third = batches((20, 50, 30), (32, 64, 1), (65, 20, 21))  # the last one has tiles of its own of each kind
    right = without(encoder, third, prompt=prompt)
    monkeypatch.setattr(graphs, "arrays", lambda *given: (sent.append(plain(*given)), sent[-1])[1])
    for texts in (first, second):
        encoder.encode(texts, prompt=prompt)
    alike = {"cu_p", "prefix_of", "kept cu_seqlens", "kept spans", *(name for name in sent[-1] if "kept tiles" in name)}  # of all batches
    alike.add("spans")  # `kept rows` are made of them
    assert len(alike) == 6
    assert len(sent[-1]) == 13
    for name, stale in sent[-1].items():
        monkeypatch.setattr(graphs, "arrays", lambda *given, name=name, stale=stale: plain(*given) | {name: stale})
        same = False
        with suppress(ValueError):  # NaN: a text that no tile names
            same = off(encoder.encode(third, prompt=prompt), right) <= 1e-6
        assert same == (name in alike), name
