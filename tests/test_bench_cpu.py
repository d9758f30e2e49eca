"""The parts of bench/cpu.py that a figure rests on: statistics, the gate, FLOPs, samples, timers, the record and its picture."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import pyembed
from pyembed import engine
from pyembed.config import ModelConfig

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks are files that import one another."""
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pyembed.Encoder:
    """The shape that the benchmark makes, small."""
    sys.path.insert(0, str(BENCH))
    from made import made

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    directory = made(tmp_path_factory.mktemp("tiny"), 2, ["some text", "and another one"] * 50, shape, 300, 0.02)
    sys.path.remove(str(BENCH))
    return pyembed.Encoder(directory, device="cpu", dtype="float32")


def test_statistics() -> None:
    from measure import noise, spread

    assert spread([4.0, 1.0, 2.0, 3.0, 10.0]) == {"median": 3.0, "quartile_1": 2.0, "quartile_3": 4.0}
    found = noise({"a": [1.0, 2.0, 9.0], "b": [7.0], "a, again": [1.0, 2.1, 2.2]})
    assert found == pytest.approx(0.05)
    assert noise({"a": [1.0]}) is None


def test_rounds_are_interleaved_and_slow_cases_stop_early() -> None:
    from measure import Case, interleaved

    order: list[str] = []
    cases = {"a": Case(lambda: order.append("a") or "first"), "b": Case(lambda: order.append("b"), rounds=1)}
    done = interleaved(cases, 3, lambda: order.append("|"))
    assert "".join(order) == "|ab|a|a"
    assert {name: len(each) for name, each in done.seconds.items()} == {"a": 3, "b": 1}
    assert done.results["a"] == "first"


def test_the_gate_refuses_vectors_that_are_off() -> None:
    from contest import Entry, gate
    from measure import Notes, cosines, refusal

    dice = np.random.default_rng(0)
    reference = dice.standard_normal((40, 64))
    turned = reference.copy()
    turned[7] = reference[7] + 0.06 * np.linalg.norm(reference[7]) / 8 * dice.standard_normal(64)  # one text alone: cosine 0.998
    entries = {
        "right": Entry(lambda texts: reference * 3, "bfloat16", ours=True),
        "one text off": Entry(lambda texts: turned, "bfloat16", ours=True),
        "a peer": Entry(lambda texts: turned, "bfloat16"),
    }
    notes = Notes()
    found = gate(entries, ["a"] * 40, reference, notes)
    assert list(entries) == ["right", "a peer"]
    assert len(notes.refused) == 1 and "one text off" in notes.refused[0] and "0.9995" in notes.refused[0]
    assert found["one text off"]["mean"] > 0.9995 > found["one text off"]["min"]
    assert refusal("x", {"mean": 0.9971, "min": 0.9851}, "int8") is None
    assert refusal("x", {"mean": 0.9969, "min": 0.9851}, "int8") is not None
    assert refusal("x", {"mean": 0.9971, "min": 0.9849}, "int8") is not None
    assert refusal("x", {"mean": float("nan"), "min": float("nan")}, "int8") is not None
    with pytest.raises(ValueError, match="cannot be held against"):
        cosines(reference[:3], reference)


def test_targets_look_the_right_way() -> None:
    from measure import target

    assert target("r", "w", 2.0, 2.0)["met"] and not target("r", "w", 1.99, 2.0)["met"]
    assert target("r", "w", 0.5, 0.5, least=False)["met"] and not target("r", "w", 0.51, 0.5, least=False)["met"]


def config(**axes: Any) -> ModelConfig:
    """What the FLOPs read of a config."""
    given = {"hidden_size": 8, "intermediate_size": 20, "num_layers": 3, "num_heads": 4, "gated": True}
    return SimpleNamespace(**given, heads_at=lambda n: (2, 6), **axes)  # type: ignore[return-value]


def test_flops_by_hand(minilm: Path) -> None:
    from gemm import flops, shapes

    # qkv 8 x (4 + 2 + 2) 6, out 24 x 8, gate and up 8 x 40, down 20 x 8
    layer = 8 * 48 + 24 * 8 + 8 * 40 + 20 * 8
    assert flops(config(), 5) == 2 * 5 * 3 * layer
    assert sum(shapes(config()).values()) == 12
    # two of five rows are read: keys and values (8 x 24) of all, the rest of the last layer of two
    assert flops(config(), 5, 2) == 2 * (5 * 2 * layer + 5 * 8 * 24 + 2 * (layer - 8 * 24))
    assert flops(config(), 5, 5) == flops(config(), 5)
    model = pyembed.Encoder(minilm, device="cpu", dtype="float32").spec.model
    assert flops(model, 1) == 2 * 6 * (4 * 384 * 384 + 2 * 384 * 1536) == 21_233_664


def test_the_ceiling_is_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    import gemm

    monkeypatch.setattr(gemm, "rate", lambda rows, a, b, dtype: {(8, 48): 100.0}.get((a, b), 200.0) - (rows != 1024))
    slow, fast = 8 * 48, 24 * 8 + 8 * 40 + 20 * 8
    assert gemm.ceiling(config(), "bfloat16") == pytest.approx((slow + fast) / (slow / 100 + fast / 200))
    monkeypatch.undo()
    for dtype in ("float32", "bfloat16", "int8"):
        assert 1e6 < gemm.rate(16, 64, 32, dtype) < 1e15


def test_samples_have_batches_as_even_as_all_texts() -> None:
    from contest import Run, blocks_of

    texts = ["x" * n for n in np.random.default_rng(0).permutation(1000)]
    lengths = list(map(len, blocks_of(texts, 4, 3)))
    assert lengths == [164, 165, 166, 167, 498, 499, 500, 501, 831, 832, 833, 834]
    assert len(set(blocks_of(texts[:9], 4, 3))) == 8  # no text twice
    assert len(blocks_of(texts[:3], 4, 2)) == 3  # fewer than a block
    run = Run("", texts, 2, None, None)
    assert run.sample(50) == run.sample(50) and len(set(run.sample(50))) == 50


def test_memory_that_grows_with_the_square_is_seen() -> None:
    from single import linear

    def found(grows: Any) -> list[dict[str, float]]:
        return [{"tokens": n, "loaded": 300.0, "peak": 300 + grows(n)} for n in (2048, 4096, 8192)]

    assert linear(found(lambda n: 40 + n / 64)) == pytest.approx(1)
    assert linear(found(lambda n: 40 + n * n / 100_000)) == pytest.approx(2)


def test_documents_have_their_lengths(tiny: pyembed.Encoder) -> None:
    from single import documents

    found = documents(tiny, [f"text number {n} of many, with words in it" for n in range(400)], 96, 3)
    assert [len(each) for each in found] == [96] * 3
    assert len({tuple(each) for each in found}) == 3
    assert {int(each[-1]) for each in found} == {tiny.tokenizer.suffix[0]}


def test_timers_count_a_call_once_and_go_away(tiny: pyembed.Encoder) -> None:
    from shares import Clock, linears, shares, watched

    clock = Clock()
    inner = clock.around(lambda: time.sleep(0.05), "inner")
    clock.around(lambda: (time.sleep(0.02), inner()), "outer")()
    assert 0.05 <= clock.seconds["inner"] < 0.09
    assert 0.02 <= clock.seconds["outer"] < 0.05
    weights = tiny._loaded.weights
    assert linears(weights) == {type(weights.layers[0].out)}
    before = tiny._loaded.ops.attention, type(weights.layers[0].out).apply
    with watched(tiny) as timed:
        tiny.encode(["some text", "another"])
    assert before == (tiny._loaded.ops.attention, type(weights.layers[0].out).apply)
    assert {"attention", "GEMM", "element-wise", "tokenisation"} <= set(timed.seconds)
    found = shares(tiny, ["some text", "another"], 2)
    assert sum(found["shares"].values()) == pytest.approx(1)


def test_threads_apart_give_the_same_bits(tiny: pyembed.Encoder) -> None:
    from placement import placed, twin

    texts = [f"some text, number {n}" * (1 + n % 5) for n in range(41)]
    other = twin(tiny, 64)
    assert other._loaded.weights is tiny._loaded.weights
    assert other._engine.budget.tokens == 64 != tiny._engine.budget.tokens
    usual = engine.PLENTY
    for plenty in (1, math.inf):
        assert np.array_equal(placed(other, texts, plenty), tiny.encode(texts))
    assert usual == engine.PLENTY


def test_what_is_refused_is_said(tiny: pyembed.Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    import contest
    from measure import Notes

    def refusing(*given: Any, dtype: str, **named: Any) -> Any:
        if dtype == "int8":
            raise ValueError(f"dtype is 'int8' for {given[0]}; expected another.")
        return tiny

    monkeypatch.setattr(contest.pyembed, "Encoder", refusing)
    notes = Notes()
    assert list(contest.ours("a/place", ("bfloat16", "int8"), notes)) == ["bfloat16"]
    assert notes.left_out == ["pyembed int8: dtype is 'int8' for MODEL; expected another."]
    assert contest.installed("A peer", ("numpy",), notes) and not contest.installed("A peer", ("numpy", "no_such_package"), notes)
    assert "A peer: no_such_package not installed" in notes.left_out[-1]


def test_contestants_are_timed_and_recorded(tiny: pyembed.Encoder, tmp_path: Path) -> None:
    from contest import Run, compared, compete, entries_of
    from measure import about, write

    texts = [f"some text, number {n}" for n in range(12)]
    run = Run("", texts, 1, 2, None)
    entries = entries_of({"bfloat16": tiny})
    entries["other"] = entries["pyembed bfloat16"].__class__(tiny.encode, "bfloat16", 1, texts[:4])
    record, done = compete(run, entries, texts, tiny, 2)
    ids = tiny.token_ids(texts)
    assert record["results"]["other"]["tokens"] == sum(map(len, ids[:4])) and record["results"]["other"]["rounds"] == 1
    ours = record["results"]["pyembed bfloat16"]
    assert ours["tokens_per_second"] == pytest.approx(sum(map(len, ids)) / np.median(record["seconds"]["pyembed bfloat16"]))
    assert 0 < ours["executed_gemm_share_of_ceiling"] < ours["gemm_share_of_ceiling"]
    assert np.array_equal(done.results["pyembed bfloat16"], tiny.encode(texts))
    assert compared(record, "row", "pyembed bfloat16", "absent", 2) == []
    assert len(compared(record, "row", "pyembed bfloat16", "other", 2)) == 1
    with pytest.raises(RuntimeError, match="2 repeated texts"):
        compete(run, entries, [*texts, texts[0]], tiny, 1)  # in two cases

    whole = about(1) | {"parts": {"minilm": record}}
    write(whole, tmp_path / "record.json")
    assert json.loads((tmp_path / "record.json").read_text()) == json.loads(json.dumps(whole))
    with pytest.raises(ValueError, match="path of this machine"):
        write({"command": f"python {Path.home()}/x"}, tmp_path / "other.json")


def test_every_part_has_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import charts
    import cpu

    times = {"median": 2.0, "p50": 2.0, "p90": 3.0, "tokens_per_second": 70.0}
    results = dict.fromkeys(("pyembed bfloat16", "pyembed bfloat16, again", "pyembed int8", "sentence-transformers float32"), times)
    raced = {
        "model": "a: b",
        "texts": 3,
        "results": results,
        "cosines_before_timing": {"pyembed int8": {"min": 0.99}},
        "gemm_ceiling": {"bfloat16": [160.0]},
        "gemm_flops_a_token": 2,
    }
    memory = [{"tokens": n, "loaded": 1.0, "peak": 2.0 * n} for n in (1, 2, 4)]
    budgets = {f"{n} tokens, {way}": times for n in (512, 1024) for way in ("2 threads in a batch", "one batch a thread")}
    parts = {
        "minilm": raced,
        "qwen": raced,
        "latency": {"tokens": 10, "models": {"a": {"results": results}, "b": {"results": results}}},
        "long": {"results": results, "memory_mb": {"bfloat16": memory}},
        "profile": {"cases": {"a": {"shares": {"GEMM": 0.6, "ops.other": 0.4}}}},
        "threads": {"cases": {"a": {"results": budgets | {"512 tokens, 2 threads in a batch, again": times}}}},
    }
    assert set(parts) == set(cpu.PARTS)
    record = {"machine": {"cpu": "a CPU", "threads": 2}, "date": "2026-11-21", "parts": parts}
    charts.plot(record, tmp_path / "record.png")
    assert (tmp_path / "record.png").stat().st_size > 20_000


def test_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import cpu

    (tmp_path / "corpus.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": "a"}\n')
    given = []

    def part(run: Any) -> dict[str, Any]:
        given.append(run)
        return {"left_out": ["a peer: not there"], "refused": ["ours: wrong"]}

    monkeypatch.setitem(cpu.PARTS, "minilm", part)
    monkeypatch.setattr(sys, "argv", ["cpu.py", "MODEL", str(tmp_path / "corpus.jsonl"), "--only", "minilm", "--threads", "1"])
    with pytest.raises(SystemExit) as ended:
        cpu.main()
    assert ended.value.code == 1  # the gate refused
    assert given[0].corpus == ["a", "b"] and given[0].threads == torch.get_num_threads() == 1
    shown = capsys.readouterr().out
    assert "LEFT OUT  a peer: not there" in shown and "LEFT OUT  ours: wrong" in shown
    monkeypatch.setattr(sys, "argv", ["cpu.py", "MODEL", "CORPUS", "--only", "minilm,other"])
    with pytest.raises(SystemExit):
        cpu.main()
    assert "'other' is no part" in capsys.readouterr().err


def test_several_parts_make_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    import cpu

    def run(command: list[str], *, check: bool) -> Any:
        name, to = command[command.index("--only") + 1], Path(command[command.index("-o") + 1])
        assert command[2:4] == ["MODEL", "CORPUS"]
        if name != "long":
            to.write_text(json.dumps({"date": "a day", "parts": {name: {"left_out": [], "refused": []}}}))
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(cpu.subprocess, "run", run)
    record = cpu.in_processes(["minilm", "qwen"], ["MODEL", "CORPUS"])
    assert record["date"] == "a day" and list(record["parts"]) == ["minilm", "qwen"]
    with pytest.raises(SystemExit, match="long failed with exit status 3"):
        cpu.in_processes(["minilm", "long"], ["MODEL", "CORPUS"])
