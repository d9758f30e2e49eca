"""What a bar tells, the stats it is told, and what repr says of the cache of prompts."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
import tqdm.auto

from pyembed import Encoder, engine, request, results, runner
from pyembed.job import Stats
from pyembed.results import short, told

Directory = Callable[[str], Path]
TEXTS = checkpoints.sentences((1, 2, 3, 10, 17, 40, 3))
PROMPT = checkpoints.sentence(25, 5) + " "


@pytest.fixture
def encoder(checkpoint: Directory, monkeypatch: pytest.MonkeyPatch) -> Encoder:
    torch.set_num_threads(1)
    monkeypatch.setattr(engine, "WINDOW_TEXTS", 4)
    return Encoder(checkpoint("llama"), device="cpu", dtype="float32")


def summed(deltas: list[Stats]) -> Stats:
    total = Stats()
    for each in deltas:
        total.add(each)
    return total


def rounded(stats: Stats) -> list[float]:
    """Sums of the same floats in another order differ in their last bits."""
    return [round(getattr(stats, each.name), 9) for each in fields(stats)]


@pytest.mark.parametrize("wrap", [list, iter])
def test_the_deltas_add_up_to_the_stats(encoder: Encoder, wrap: Callable[[Any], Any]) -> None:
    deltas: list[Stats] = []
    encoder.max_seq_length = 40
    job = request.job(encoder, prompt=PROMPT, batch_size=2)
    texts = [*TEXTS, TEXTS[1], TEXTS[0], "w5 \ud800", TEXTS[0]]
    for _ in engine.run(encoder._engine, job, wrap(texts), deltas.append):
        assert rounded(summed(deltas)) == rounded(encoder.stats), "a window is told when it is done"
    total = summed(deltas)
    assert (total.texts, total.truncated, total.replaced, total.duplicates) == (11, 2, 1, 1)
    assert total.prefix_tokens == 25 * 10
    assert total.tokens == sum(map(len, encoder.token_ids(texts, prompt=PROMPT)))
    assert len([each for each in deltas if each.texts]) >= 6, "batch by batch"


def test_a_text_in_several_rows_is_one_text(encoder: Encoder) -> None:
    encoder.encode(TEXTS, variants=[["w5", "w6 w7"]] * len(TEXTS))
    assert encoder.stats.texts == len(TEXTS)


def test_busy_is_the_devices_time(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = runner.forward
    monkeypatch.setattr(runner, "forward", lambda *given, **named: (time.sleep(0.05), forward(*given, **named))[1])
    start = time.perf_counter()
    encoder.encode(TEXTS[:3], batch_size=1)
    elapsed = time.perf_counter() - start
    assert 0.15 <= encoder.stats.busy <= elapsed


def test_what_stands_beside_the_bar() -> None:
    done = Stats(texts=10, tokens=3_000, busy=1.5)
    assert told(done, 2.0) == "1.50k tok/s,  75% busy"
    assert told(done, 2.0, devices=2) == "1.50k tok/s,  38% busy"
    assert told(Stats(tokens=30, busy=2.0, truncated=3), 2.0) == "   15 tok/s, 100% busy,     3 cut"
    everything = Stats(10**7, 10**9, 10**6, 5, 123_456, 54_321, 10.0)
    assert told(everything, 1000.0) == "1.00M tok/s,   1% busy,  123k reused, 54.3k dup, 1.00M cut"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *((0, "0"), (999.4, "999"), (999.5, "1.00k"), (1000, "1.00k"), (9_994, "9.99k"), (9_996, "10.0k"), (99_949, "99.9k")),
        *((99_960, "100k"), (999_499, "999k"), (999_500, "1.00M"), (1_234_567_890, "1.23G"), (5e12, "5.00T"), (5e15, "5000T")),
    ],
)
def test_short_numbers_have_one_width(number: float, text: str) -> None:
    assert short(number) == text.rjust(5)


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.replace("\r", "\n").strip().split("\n")


def test_the_bar_tells(encoder: Encoder, capsys: pytest.CaptureFixture[str]) -> None:
    encoder.max_seq_length = 40
    encoder.encode([*TEXTS, TEXTS[6]], prompt=PROMPT, show_progress_bar=True)
    last = shown(capsys)[-1]
    counts = r"[ \d.kM]{5} tok/s, [ \d]{3}% busy"
    rates = rf"\d\d<00:00, +[\d.]+ texts/s, {counts},   150 reused,     2 dup,     2 cut\]"
    assert re.fullmatch(r"Encoding: 100%\|.+\| 8/8 \[00:" + rates, last), last
    assert len(last) <= 140
    encoder.encode(iter(TEXTS), show_progress_bar=True)
    last = shown(capsys)[-1]
    assert re.fullmatch(rf"Encoding: 7 texts \[00:\d\d, +[\d.]+ texts/s, {counts}\]", last), last


@pytest.mark.parametrize("call", ["encode", "stream", "out"])
def test_a_bar_for_every_way_to_encode(encoder: Encoder, call: str, capsys: pytest.CaptureFixture[str]) -> None:
    def go(show: bool) -> None:
        if call == "stream":
            list(encoder.stream(TEXTS, show_progress_bar=show))
        else:
            out = np.zeros((7, 48), np.float32) if call == "out" else None
            encoder.encode(TEXTS, show_progress_bar=show, out=out)

    go(True)
    assert "7/7" in shown(capsys)[-1]
    go(False)
    assert capsys.readouterr() == ("", "")


def test_without_a_bar_nobody_is_told(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tqdm.auto, "tqdm")
    with results.progress(False, 3) as advance:
        assert advance is None
    encoder.encode(TEXTS, show_progress_bar=False)
    with pytest.raises(ImportError):
        encoder.encode(TEXTS, show_progress_bar=True)


def test_the_bar_is_drawn_at_tqdms_pace(capsys: pytest.CaptureFixture[str]) -> None:
    """A thousand batches in far less than the tenth of a second that tqdm waits."""
    with results.progress(True, 1000) as advance:
        assert advance is not None
        for _ in range(1000):
            advance(Stats(1, 10, busy=1e-6))
    lines = shown(capsys)
    assert 2 <= len(lines) <= 20
    assert "1000/1000" in lines[-1]


def test_warnings_follow_the_bar(encoder: Encoder, capsys: pytest.CaptureFixture[str]) -> None:
    encoder.max_seq_length = 10
    handler = logging.StreamHandler()
    logging.getLogger("pyembed").addHandler(handler)
    try:
        encoder.encode(TEXTS, show_progress_bar=True)
    finally:
        logging.getLogger("pyembed").removeHandler(handler)
    assert shown(capsys)[-1] == "2 of 7 texts were cut to 10 tokens (max_seq_length)."


def test_a_bar_is_closed_by_an_error(encoder: Encoder, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TypeError, match="Input 5"):
        encoder.encode([*TEXTS[:5], None], show_progress_bar=True)  # type: ignore[list-item]
    err = capsys.readouterr().err
    assert "4/6" in err
    assert err.endswith("\n")


def test_repr_shows_the_cache_of_prompts(checkpoint: Directory, tmp_path: Path) -> None:
    def cache(encoder: Encoder) -> str:
        (found,) = re.findall(r"prompt cache ([^)]*\)?)\)", repr(encoder))
        return str(found)

    made = Encoder(checkpoint("llama"), device="cpu", dtype="float32")
    assert cache(made) == "0 of 256 MiB"
    made.encode(TEXTS, prompt=PROMPT)
    size = 25 * (48 + 3 * 2 * 2 * 16) * 4  # hidden states, and keys and values of three layers
    assert cache(made) == f"{size / 2**20:.2g} of 256 MiB"
    assert cache(Encoder(checkpoint("llama"), device="cpu", prefix_cache_bytes=3 << 19)) == "0 of 1.5 MiB"
    assert cache(Encoder(checkpoint("llama"), device="cpu", prefix_cache_bytes=0)) == "off"
    assert cache(Encoder(checkpoint("bert"), device="cpu")) == "none (its tokens see those after them)"
    assert cache(Encoder(checkpoint("bert"), device="cpu", prefix_cache_bytes=0)) == "none (its tokens see those after them)"
    assert cache(Encoder(checkpoint("llama"), device="cpu", pooling="cls")) == "none (it is pooled at the first token)"
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}
    directory = checkpoints.edit(checkpoint("llama"), tmp_path / "dynamic", rope_parameters=scaling)
    assert cache(Encoder(directory, device="cpu")) == "none (its rotary positions depend on a text's length)"
