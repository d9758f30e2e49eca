"""bench/gpu.py from end to end on a CPU with tiny models, and the parts of it that a figure rests on."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

pytest.importorskip("triton")
pytest.importorskip("sentence_transformers")

BENCH = Path(__file__).resolve().parents[1] / "bench"
WORDS = "some words of a corpus that tokens are cut from, and it says nothing at all about anything; numbers help:"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks are files that import one another."""
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    dice = np.random.default_rng(0)
    words = WORDS.split()
    return [" ".join([*dice.choice(words, 40), str(n)]) for n in range(300)]


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: Any = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """varlen_attn as its documentation has it, for a CPU."""
    assert max_q == max_k == int(cu_q.diff().max())
    group = q.shape[1] // k.shape[1]
    assert enable_gqa == (group > 1)
    place = torch.arange(len(q))
    text = torch.searchsorted(cu_q[1:].long(), place, right=True)
    mask = text[:, None] == text
    if window_size == (-1, 0):
        mask &= place[:, None] >= place
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.float(), k.float()) * q.shape[2] ** -0.5
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v.float()).to(q.dtype)


@pytest.fixture
def run(corpus: list[str], tmp_path: Path) -> Callable[..., Any]:
    """The driver on tiny models: its exit status, and the record if one was asked for."""
    import gpu

    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": each}) for each in corpus))
    usual = ["--device", "cpu", "--tiny", "--rounds", "2", "--case", "5", "--compiled", "--corpus", str(tmp_path / "corpus.jsonl")]
    return lambda *words, to=tmp_path / "record.json": (gpu.main([*usual, "-o", str(to), "--only", *words]), json.loads(to.read_text()))


def test_all_of_it_on_a_cpu(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import gpu
    from gpu_cases import FP8, IDS, INT8, OURS, PACKED, SENTENCES, TEXT

    monkeypatch.setattr(varlen, "varlen_attn", plain)
    cases = ("gate", "linear", "S128", "latency", "modes", "memory")
    status, record = run("device", *(f"0.6B {each}" for each in cases), "7B gate", "7B W5", "7B head")
    told = capsys.readouterr().out
    cases = record["cases"]
    assert status == 0
    assert [name for name, case in cases.items() if "error" in case] == []
    for shape in ("0.6B", "7B"):  # plain PyTorch, transformers and ours agree on both shapes
        assert min(cases[f"{shape} gate"]["cosines"][each]["min"] for each in (OURS, PACKED)) > 0.9995
    race = cases["0.6B S128"]
    assert set(race["results"]) == {IDS, f"{IDS}, again", TEXT, PACKED, SENTENCES, INT8}
    assert set(race["failed"]) == {FP8}
    assert min(each["min"] for label, each in race["cosines_to_ours"].items() if label != INT8) > 0.999
    assert 0.985 <= race["settings"][INT8]["cosines"]["min"] < race["cosines_to_ours"][PACKED]["min"]
    assert " int8 " in told
    ours, ceiling = race["results"][IDS], np.median(race["ceiling"]["flops_per_second"])
    assert ours["tokens_per_second"] == pytest.approx(race["tokens"] / ours["median"])
    assert ours["gemm_share"] == pytest.approx(cases["0.6B linear"]["flops_a_token"] * race["tokens"] / ours["median"] / ceiling)
    assert race["results"][PACKED]["executed_gemm_share"] == race["results"][PACKED]["gemm_share"]
    assert ours["executed_gemm_share"] < ours["gemm_share"]  # the last layer's queries are those of one row a text
    assert {member for row in cases["0.6B latency"]["milliseconds"].values() for member in row} == {IDS, TEXT, PACKED, SENTENCES}
    assert list(cases["0.6B latency"]["milliseconds"]) == ["10", "80"]
    modes = cases["0.6B modes"]
    assert list(modes["modes"]) == ["S128", "2 requests of 8 queries", "2 single queries"]
    assert modes["same_bits"] == {"alone": 34, "reversed": 34, "texts": 34}
    assert modes["cosine_of_deterministic"] > 0.999
    assert "met " not in told and "MISSED" not in told  # nothing here says anything of a GPU
    assert "UNKNOWN 0.6B S128: GEMM FLOPs / time" in told
    assert "/tmp/" not in json.dumps(record)

    monkeypatch.setattr(gpu, "one", partial(pytest.fail, "a case that is there was run again"))
    assert run("0.6B gate", "7B head")[1]["cases"] == cases


def test_the_first_embedding(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import first_embedding
    from first_embedding import STAGES, process

    monkeypatch.setattr(varlen, "varlen_attn", plain)
    caches: list[tuple[str, list[str]]] = []

    def watched(code: str, model: Path, settings: dict[str, Any], cache: str, limit: float) -> dict[str, float]:
        caches.append((cache, sorted(os.listdir(cache))))
        Path(cache, f"kernel {len(caches)}").touch()  # what a card would leave
        assert settings["backend"] == "kernels" and limit <= 300
        return process(code, model, settings, cache, limit)

    monkeypatch.setattr(first_embedding, "process", watched)
    _, record = run("0.6B gate", "0.6B first", "--case", "300")
    case = record["cases"]["0.6B first embedding"]
    assert len(case["warm"]) == 2  # rounds
    for each in (case["cold"], *case["warm"]):
        assert set(each) == {"process", *STAGES} and each["process"] > sum(each[stage] for stage in STAGES) > 0
    assert len({cache for cache, _ in caches}) == 1
    assert [found for _, found in caches] == [[], ["kernel 1"], ["kernel 1", "kernel 2"]]
    assert (case["compiled"], case["compiled_by_the_next"]) == (1, 2)
    told = capsys.readouterr().out
    assert "0.6B first embedding 1 kernels and launchers compiled, 2 by the next process (2 layers)" in told
    assert re.search(r"\d s  cold: import torch \d+\.\d\d, .*\n +\d+\.\d\d s  warm, 2 processes: import torch", told)


def test_a_new_process_that_fails_or_takes_too_long(tmp_path: Path) -> None:
    from first_embedding import cold_and_warm, process

    with pytest.raises(RuntimeError, match=r"^a new process failed: ValueError: There is no such model$"):
        process("raise ValueError('There is no such model')", tmp_path, {}, str(tmp_path))
    with pytest.raises(RuntimeError, match=r"^a new process had no embedding after 0 s$"):
        process("import time; time.sleep(60)", tmp_path, {}, str(tmp_path), 0.2)
    with pytest.raises(RuntimeError, match="no embedding after 0 s"):
        cold_and_warm(tmp_path, {}, 3, 0.01)


def test_a_peer_that_fails_is_named(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    """torch's own varlen_attn does not run on a CPU."""
    from gpu_cases import PACKED, SENTENCES

    _, record = run("7B gate", "7B W1")
    assert "NotImplementedError" in record["cases"]["7B gate"]["failed"][PACKED]
    race = record["cases"]["7B W1"]
    assert "NotImplementedError" in race["failed"][PACKED] and PACKED not in race["results"]
    assert SENTENCES in race["results"]
    assert f"failed (7B W1)  {PACKED}: RuntimeError: NotImplementedError" in capsys.readouterr().out


def test_wrong_vectors_are_not_timed(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_cases
    from gpu_cases import PACKED

    monkeypatch.setattr(varlen, "varlen_attn", plain)
    right = gpu_cases.Packed.encode
    monkeypatch.setattr(gpu_cases.Packed, "encode", lambda self, ids, budget: right(self, ids, budget)[::-1].copy())
    _, record = run("0.6B gate", "0.6B W1")
    assert record["cases"]["0.6B W1"]["failed"][PACKED].startswith("wrong: its mean cosine to ours is ")
    assert PACKED not in record["cases"]["0.6B W1"]["results"]

    monkeypatch.setattr(gpu_cases, "refusal", lambda *given: "ours are wrong")
    status, record = run("7B gate", "7B W1", "7B latency", "7B head")
    assert status == 1
    assert record["cases"]["7B gate"]["error"] == "ours are wrong"
    for name in ("W1", "latency", "head"):
        assert "the gate of 7B refused our vectors" in record["cases"][f"7B {name}"]["error"]
    assert "results" in record["cases"]["0.6B W1"]


def test_an_instruction_is_run_once_and_said_to_others_with_each_text(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_cases
    from gpu_cases import IDS, PACKED, SENTENCES, TEXT

    monkeypatch.setattr(varlen, "varlen_attn", plain)
    seen: list[str] = []
    encode = gpu_cases.Sentences.encode
    monkeypatch.setattr(gpu_cases.Sentences, "encode", lambda self, texts, batch: (seen.extend(texts), encode(self, texts, batch))[1])
    _, record = run("0.6B gate", "0.6B W1i")
    case = record["cases"]["0.6B W1i"]
    assert set(case["results"]) == {IDS, TEXT, PACKED, SENTENCES}
    assert min(each["min"] for each in case["cosines_to_ours"].values()) > 0.998
    assert len({text[:40] for text in seen}) == 1, "the instruction"
    assert case["tokens"] / case["texts"] > 30


def test_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    import gpu
    from gpu_models import Bench, Settings

    ran: list[str] = []

    def case(name: str) -> Callable[[Any], dict[str, Any]]:
        def work(bench: Any) -> dict[str, Any]:
            ran.append(name)
            if name == "b":
                raise RuntimeError("no such thing in /usr/lib/python3/x.py")
            return {"figure": len(ran)}

        return work

    def go(seconds: float, case_seconds: float = 1.0, **changed: Any) -> dict[str, Any]:
        settings = Settings(**{"device": "cpu", "backend": "kernels", "tiny": True, "layers": {}, "scale": 1.0, "rounds": 2,
                               "case": case_seconds, "compiled": ()} | changed)  # fmt: skip
        record = gpu.described("cpu", settings)
        record["cases"] = gpu.begun(to, record)
        gpu.run(Bench(settings, [], tmp_path, record["cases"]), record, list("abc"), time.monotonic() + seconds, to)
        assert json.loads(to.read_text()) == json.loads(json.dumps(record))
        return record

    to = tmp_path / "record.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "CASES", {name: case(name) for name in "abc"})
        assert go(0.5)["not_run"] == list("abc")  # none may end in time
        record = go(100)
        assert ran == list("abc") and record["not_run"] == []
        assert record["cases"]["b"]["error"] == "RuntimeError: no such thing in ..."
        first = record["cases"]["c"]
        again = go(100, rounds=3)
        assert ran == [*"abc", "b"]  # what failed is tried once more
        assert again["cases"]["c"] == first
        with pytest.raises(ValueError, match=r"record.json was made with scale 1.0, this run has 0.5"):
            go(100, scale=0.5)
        to.unlink()
        ran.clear()
        patch.setattr(Bench, "usable", lambda self: False)
        assert go(100)["not_run"] == ["b", "c"] and ran == ["a"]


def test_lengths_are_those_that_are_told() -> None:
    from gpu_work import COUNTS, lengths

    drawn = {name: np.array(lengths(name, 10**9)) for name in COUNTS}
    assert {name: len(each) for name, each in drawn.items()} == COUNTS
    assert drawn["W1"].mean() == pytest.approx(10, rel=0.03) and np.percentile(drawn["W1"], 95) == pytest.approx(18, abs=1)
    assert drawn["W2"].mean() == pytest.approx(80, rel=0.03) and np.percentile(drawn["W2"], 95) == pytest.approx(150, rel=0.03)
    assert drawn["W2"].max() <= 256 and set(drawn["W3"]) == {512} and set(drawn["S128"]) == {128}
    assert np.median(drawn["W4"]) == pytest.approx(1500, rel=0.1) and drawn["W4"].max() <= 8192 and drawn["W4"].min() >= 64
    mixed = drawn["W5"]
    assert (mixed < 25).mean() == pytest.approx(0.8, abs=0.02) and (mixed > 300).mean() == pytest.approx(0.05, abs=0.01)
    assert list(mixed[:500]) != sorted(mixed[:500])
    assert lengths("W2", 5000) == drawn["W2"][: len(lengths("W2", 5000))].tolist()
    assert 4700 < sum(lengths("W2", 5000)) <= 5000
    assert lengths("W3", 10, 300) == [300, 300]


def test_texts_differ_and_end(corpus: list[str]) -> None:
    from gpu_work import Source

    class Letters:
        """A token a character."""

        prefix, suffix = [], [0]

        def ends(self, text: str) -> list[int]:
            return list(range(1, len(text) + 1))

    encoder: Any = SimpleNamespace(tokenizer=Letters(), token_ids=lambda texts: [np.arange(len(each) + 1) for each in texts])
    source = Source(encoder, ["abcdefghijklmnopqrstuvwxyz"])
    assert source.texts([6, 6]) == ["abcde", "fghij"]
    assert source.exactly(11, 1) == ["klmnopqrst"]
    later = source.texts([13] * 8)
    assert len(set(later)) == 8
    assert later[0] == "bcdefghijklm"  # the second turn, one token on; what lies between would have reached over the end
    with pytest.raises(ValueError, match="no further text of 40"):
        source.texts([41])
    with pytest.raises(ValueError, match=r"The corpus gives . texts of 6 tokens; 99 were asked for"):
        source.exactly(6, 99)
    work = source.work("W5", 40, 12)
    assert work.request == 256 and work.tokens == sum(len(each) + 1 for each in work.texts)


def test_packs() -> None:
    from gpu_peers import packs

    ids = [np.zeros(n) for n in (3, 30, 5, 1, 7, 2, 2)]
    found = list(packs(ids, 10))
    assert found == [[1], [4], [2, 0, 5], [6, 3]]
    assert sorted(n for batch in found for n in batch) == list(range(7))
    assert all(len(batch) == 1 or sum(len(ids[n]) for n in batch) <= 10 for batch in found)
    assert list(packs([], 10)) == []


def test_every_varlen_attn_gets_grouped_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of torch 2.12 it is told of them; before, it may take them as they are, refuse them, or give something else."""
    import gpu_peers

    def old(takes: str) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, is_causal: bool = False) -> Tensor:
            if k.shape[1] < q.shape[1] and takes == "none":
                raise RuntimeError("heads differ")
            if k.shape[1] < q.shape[1] and takes == "other":  # the heads in another order
                k, v = (x.repeat(1, q.shape[1] // x.shape[1], 1) for x in (k, v))
            window = (-1, 0) if is_causal else (-1, -1)
            return plain(q, k, v, cu_q, cu_k, max_q, max_k, window_size=window, enable_gqa=k.shape[1] < q.shape[1])

        return attend

    q, k, v = (torch.randn(1, heads, 9, 16) for heads in (6, 2, 2))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    right = plain(*(x[0].transpose(0, 1) for x in (q, k, v)), cu, cu, 5, 5, window_size=(-1, 0), enable_gqa=True)
    expected = {
        "new": (plain, {"window_size": (-1, 0), "enable_gqa": True}),
        "as they are": (old("all"), {"is_causal": True}),
        "refused": (old("none"), {"is_causal": True, "repeated": True}),
        "something else": (old("other"), {"is_causal": True, "repeated": True}),
    }
    for name, (function, options) in expected.items():
        monkeypatch.setattr(varlen, "varlen_attn", function)
        gpu_peers.groups_as_they_are.cache_clear()
        assert gpu_peers.options_of(3, "cpu") == options, name
        module = SimpleNamespace(varlen=options)
        made, _ = gpu_peers.attention(module, q, k, v, None, scaling=0.25, cu_seq_lens_q=cu, max_length_q=5)
        torch.testing.assert_close(made[0], right)
        assert module.varlen == options == gpu_peers.options_of(3, "cpu")
    assert gpu_peers.options_of(1, "cpu") == {"is_causal": True}
    gpu_peers.groups_as_they_are.cache_clear()
    with pytest.raises(ValueError, match=r"scaling is 0\.5"):
        gpu_peers.attention(SimpleNamespace(varlen={}), q, k, v, None, scaling=0.5, cu_seq_lens_q=cu, max_length_q=5)


def test_the_best_of_the_settings_is_taken() -> None:
    from gpu_peers import searched

    def make(settings: dict[str, Any]) -> Callable[[Any], Any]:
        def encode(given: Any) -> str:
            if settings["size"] == 3:
                raise RuntimeError("out of memory")
            time.sleep(0.001 * settings["size"])
            return f"{given} by {settings['size']}"

        return encode

    peer = searched("a peer", [{"size": size} for size in (30, 3, 5)], make, "sample")
    assert peer.settings == {"size": 5} and peer.encode("all") == "all by 5"
    assert [set(each) for each in peer.searched] == [{"size", "seconds"}, {"size", "failed"}, {"size", "seconds"}]
    with pytest.raises(RuntimeError, match="out of memory"):
        searched("a peer", [{"size": 3}], make, "sample")


def test_what_a_card_did_inside_calls() -> None:
    from gpu_cases import on_card

    work = [(1.0, 2.0), (1.5, 3.0), (5.0, 6.0), (11.0, 12.0), (21.5, 22.0), (24.0, 26.0)]  # two at once, and a gap
    assert on_card([(0.5, 7.0)], work) == {"span": 5.0, "busy": 3.0}
    assert on_card([(0.5, 7.0), (10.0, 13.0), (20.0, 30.0)], work) == {"span": 4.5, "busy": 2.5}
    assert on_card([(7.0, 9.0)], work) is None


def test_the_ceiling_runs_every_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    import gemm
    import gpu_ceilings

    config: Any = SimpleNamespace(num_layers=3, hidden_size=8, intermediate_size=12, num_heads=4, gated=True, heads_at=lambda layer: (2, 2))
    seen: list[tuple[int, ...]] = []
    product = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: (seen.append((len(x), *w.shape)), product(x, w))[1])
    chain = gpu_ceilings.Chain(config, "cpu")
    chain.run(5)
    assert seen == [(5, 16, 8), (5, 8, 8), (5, 24, 8), (5, 8, 12)] * 3
    assert gemm.flops(config, 5) == sum(2 * a * b * c for a, b, c in seen)
    monkeypatch.setattr(gpu_ceilings, "seconds", lambda work: 0.5)
    assert chain.rate(5) == gemm.flops(config, 5) / 0.5


def record_of(factor: float) -> dict[str, Any]:
    """A run on a card in which everything but the card's own rate reaches `factor` times what is wanted, just."""
    from gpu_cases import COMPILED, FP8, IDS, PACKED, SENTENCES, TEXT

    def race(layers: int, share: float, **times: float) -> dict[str, Any]:
        names = {"ids": IDS, "text": TEXT, "fp8": FP8, "packed": PACKED, "compiled": COMPILED, "sentences": SENTENCES}
        results = {names[name]: {"median": each, "gemm_share": share, "tokens_per_second": 1 / each} for name, each in times.items()}
        return {"layers": layers, "tokens": 9, "rounds": 5, "noise": 0.01, "results": results, "failed": {"a peer": "why " * 60}}

    f = factor
    whole = {"span": 0.9 / f, "busy": 0.5}
    latencies = {member: {"p50": 1.5 / f, "p95": 2.0, "calls": 9} for member in (IDS, TEXT, PACKED, SENTENCES)} | {"on the device": whole}
    bytes_of = {"file": 1, "loaded": 1, "while_loading": 1, "batches": 3, "calls": 1000}
    memory = bytes_of | {"beyond_loaded": {"one batch": 10.0, "many batches": 11.0 / f}}
    memory |= {"growth": {"allocated": 0, "peak": (2 << 20) / f, "reserved": 0, "resident": 9e9}}
    modes = {name: {mode: {"median": 1.0} for mode in ("usual", "no graphs", "deterministic")} for name in ("S128", "64 single queries")}
    modes = {"modes": modes, "layers": 28, "streams": 2, "graphs": {"tokens": 2861, "recorded": 9}, "failed": {}}
    modes |= {"same_bits": {"alone": 34 * f, "reversed": 34, "texts": 34}}
    gate = {"cosines": {"ours": {"mean": 0.9999, "min": 0.9996}, PACKED: {"mean": 0.9999, "min": 0.9996}}, "failed": {}}
    cases = {
        "device": {"copy": 4e12, "best_square": 8e14, "8192^3": {"median": 7.9e14}},
        "0.6B gate": gate,
        "0.6B linear": {"chain": {"8192": {"median": 6e14}, "16384": {"median": 6e14}}},
        "0.6B S128": race(28, 0.75 * f, ids=1.0, fp8=1 / 1.25 / f, packed=1.4 * f, compiled=1.4 * f, text=1.1 / f),
        "0.6B W1": race(28, 0.5, ids=1.0, text=1.0, sentences=3.0 * f),
        "0.6B W2": race(28, 0.5, ids=1.0, text=1.1 / f, packed=1.4 * f, compiled=1.4 * f, sentences=1.7 * f * 1.1 / f),
        **{f"0.6B {name}": race(28, 0.5, ids=1.0, text=1.0, packed=1.0, sentences=1.0) for name in ("W3", "W4", "W5")},
        **{f"7B {name}": race(32, 0.5, ids=1.0, text=1.0, packed=1.0, sentences=1.0) for name in ("W1", "W3", "W4", "W5")},
        "7B S128": race(32, 0.8 * f, ids=1.0, fp8=1 / 1.45 / f, packed=1.1 * f, compiled=1.1 * f),
        "7B W2": race(32, 0.5, ids=1.0, packed=1.1 * f, compiled=1.1 * f),
        **{f"{shape} latency": {"layers": layers, "milliseconds": {str(n): latencies for n in (10, 80, 512, 8192)}, "failed": {}}
           for shape, layers in (("0.6B", 28), ("7B", 32))},
        **{f"{shape} {name}": case for shape in ("0.6B", "7B") for name, case in (("memory", memory), ("modes", modes))},
        "7B head": {"layers": 32, "seconds_a_token": {"head": 0.03 / f, "trunk": 1.0}},
    }  # fmt: skip
    return {"gpu": {"name": "a card"}, "versions": {"torch": "2"}, "settings": {"tiny": False}, "not_run": ["7B gate"], "cases": cases}


def verdicts(record: dict[str, Any]) -> list[list[str]]:
    import gpu_report

    lines = [line.split(maxsplit=1) for line in gpu_report.summary(record).splitlines()]
    return [words for words in lines if words and words[0] in ("met", "MISSED", "UNKNOWN")]


def test_targets_are_met_missed_or_unknown() -> None:
    import gpu_report

    met, missed = (verdicts(record_of(factor)) for factor in (1.001, 0.98))
    assert len(met) == 26
    assert [verdict for verdict, _ in met] == ["met"] * 25 + ["UNKNOWN"]
    assert [verdict for verdict, _ in missed] == ["MISSED"] * 25 + ["UNKNOWN"]
    text = gpu_report.summary(record_of(1.0))
    assert len(text) < 12_000  # what is shown of a long output is its end
    assert "failed (0.6B S128, 0.6B W1, 0.6B W2" in text
    assert "no time was left for: 7B gate" in text

    less = record_of(1.01)
    less["cases"]["0.6B S128"] = {"error": "it broke"}
    for name in ("0.6B latency", "7B head"):
        less["cases"][name]["layers"] = 8
    del less["cases"]["7B W2"]["results"]["packed varlen_attn, ids"]
    less["cases"]["7B W2"]["failed"]["packed varlen_attn, ids"] = "no memory"
    unknown = [told for verdict, told in verdicts(less) if verdict == "UNKNOWN"]
    assert "0.6B S128    FAILED: it broke" in gpu_report.summary(less)
    assert len(unknown) == 1 + 5 + 2 + 1 + 1  # the families; S128; milliseconds; the head; the peer
    assert any(told.endswith("packed varlen_attn, ids was not timed: no memory") for told in unknown)
    assert {verdict for verdict, _ in verdicts(record_of(1.0) | {"gpu": None, "machine": {"cpu": "a CPU"}})} == {"UNKNOWN"}


def test_the_command_line_refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, why in (
        ([], "there is no CUDA device here"),
        (["--device", "cpu", "--only", "8B"], "no case begins with 8B; expected one of: device, 0.6B gate"),
        (["--layers", "7B=0"], "'7B=0' is no shape and its layers"),
        (["--layers", "8B=2"], "expected one of 0.6B, 7B"),
    ):
        with pytest.raises(SystemExit) as ended:
            gpu.main(words)
        assert ended.value.code == 2
        assert why in capsys.readouterr().err
    assert dict(map(gpu.layers_of, ["7B=8", "0.6B=4"])) == {"7B": 8, "0.6B": 4}
