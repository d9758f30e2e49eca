"""The parts of bench/triton_ops.py that a figure rests on and that need no GPU: bytes, FLOPs, the gate, targets, the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks are files that import one another."""
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])


def test_bytes_of_a_case() -> None:
    """Every number that an op must read or write, counted once."""
    from triton_cases import ROWS, Shape

    t, d, f, heads, groups, k, v = 64, 48, 40, 4, 2, 16, 90
    shape = Shape(t, d, f, heads, groups, k, v, latents=24, latent_heads=3, text=16)
    expected = {
        "rms_norm": 2 * 4 * t * d,  # x, the stream twice, the result
        "layer_norm": 2 * 4 * t * d,
        "qk_norm_rope": 2 * 2 * t * (heads + groups) * k,
        "swiglu": 2 * 3 * t * f,
        "geglu": 2 * 3 * t * f,
        "pool": 2 * t * d + 4 * (t // 16) * d,
        "embed": 2 * 2 * t * d + 8 * t,
        "latent_attention": 2 * 2 * t * 24 * 3,
        "rescaled": (4 + 2) * t * 2 * f + 4 * t + (4 + 2) * 2 * f,
        "quantised": (2 + 1) * t * d + 4 * t,
    }
    assert {op: make(shape, "cpu", torch.bfloat16, lambda f: f)["bytes"] for op, make in ROWS.items()} == expected


def test_flops_and_lengths_of_attention() -> None:
    from triton_cases import attention_case, mixes

    made = mixes(16384)
    assert made["512"] == [512] * 32
    assert {name: 0.9 * 16384 < sum(each) <= 16384 for name, each in made.items()} == dict.fromkeys(made, True)
    assert min(made["5 to 60"]) == 5
    assert max(made["5 to 60"]) == 60
    assert made == mixes(16384)
    assert list(mixes(100)) == ["16", "32", "64", "5 to 60", "lognormal to 2048"]
    for causal, pairs in ((False, 9 + 1), (True, 6 + 1)):
        case = attention_case("a mix", [3, 1], 16, causal, 64, 2, "cpu", torch.bfloat16, lambda f: f)
        assert case.flops == 4 * 64 * pairs
        assert case.oracle(lambda x: x).shape == (4, 2, 16)  # all of these texts, one group


def test_targets_of_attention() -> None:
    from triton_cases import wanted_of_attention

    wanted = [wanted_of_attention(mix, 128, False) for mix in ("16", "64", "128", "512", "2048", "5 to 60")]
    assert wanted == [1.5, 1.5, None, None, 1.2, None]
    assert [wanted_of_attention("8192", width, True) for width in (64, 128, 256)] == [1.05, 1.05, 1.0]
    assert wanted_of_attention("8192", 256, False) == 1.0


def test_every_varlen_attn_is_told_of_its_mask() -> None:
    from triton_cases import varlen_options

    old, new = {"is_causal": 0}, {"window_size": 0, "enable_gqa": 0}
    assert varlen_options(old, True, 1) == {"is_causal": True}
    assert varlen_options(new, True, 2) == {"window_size": (-1, 0), "enable_gqa": True}
    assert varlen_options(new, False, 1) == varlen_options(old, False, 1) == {}
    with pytest.raises(ValueError, match="no enable_gqa; expected one for 4 query heads"):
        varlen_options(old, False, 4)


def case_of(**members: Any) -> Any:
    from triton_cases import Case, Member

    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).bfloat16()

    def oracle(wide: Any) -> torch.Tensor:
        return (wide(x)[:32].float() if wide(x).dtype is torch.bfloat16 else wide(x)[:32]).mul(1.7).to(wide(x).dtype)

    made = {name: Member(work) for name, work in members.items()}
    return Case("an op", "a shape", (x,), made, oracle, bytes=640, wanted=0.9, failed={"never made": "why"})


def test_what_is_wrong_or_fails_is_named_and_not_timed() -> None:
    from triton_ops import gate, measured

    def breaks(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("\nno such kernel in /usr/lib/some/where.so\nmore")

    case = case_of(
        ours=lambda x: x.mul_(1.7),  # in place: the next one gets what this one got
        rough=lambda x: x * 1.76,
        wrong=lambda x: x * 2.0,
        nan=lambda x: x * torch.nan,
        cut=lambda x: x[:, :3],
        breaks=breaks,
    )
    right, errors, failed = gate(case)
    assert list(right) == ["ours", "rough"]
    assert errors["ours"] <= 1 < errors["rough"] <= 4 < errors["wrong"]
    assert failed["breaks"] == "RuntimeError: no such kernel in ..."
    assert failed["wrong"].startswith("wrong: its error is ")
    assert "shape [32, 3], expected [32, 8]" in failed["cut"]
    assert failed["never made"] == "why"
    assert set(failed) == {"wrong", "nan", "cut", "breaks", "never made"}
    assert "at most 1" in gate(case_of(ours=lambda x: x * 1.76))[2]["ours"]

    row = measured(case, 3, "cpu", {"copy": 1e9, "gemm": 1.0})
    ours = row["members"]["ours"]
    assert ours["rate"] == pytest.approx(640 / ours["seconds"]["median"])
    assert ours["share"] == pytest.approx(ours["rate"] / 1e9)
    assert list(row["members"]) == ["ours", "rough"]


def row_of(wanted: float | None, against: str, **seconds: float) -> dict[str, Any]:
    members = {name: {"seconds": {"median": each}, "rate": 2e12, "share": 0.93} for name, each in seconds.items()}
    failed = {"peer": "it broke"}
    return {"op": "an op", "shape": "a shape", "bytes": 1, "members": members, "failed": failed, "wanted": wanted, "against": against}


def test_verdicts() -> None:
    from triton_ops import verdict

    reached = [(0.9, "copy", {"ours": 1e-5}), (1.5, "peer", {"ours": 2e-5, "peer": 3e-5})]
    missed = [(0.95, "copy", {"ours": 1e-5}), (1.6, "peer", {"ours": 2e-5, "peer": 3e-5})]
    for wanted, met in ((reached, True), (missed, False)):
        for least, against, seconds in wanted:
            found = verdict(row_of(least, against, **seconds))
            assert isinstance(found, dict)
            assert found["met"] is met
    assert verdict(row_of(None, "copy", ours=1.0)) is None
    assert verdict(row_of(1.5, "peer", ours=1.0)) == "an op a shape: peer was not timed"
    assert verdict(row_of(0.9, "copy")) == "an op a shape: ours was not timed"


def test_the_table_and_the_time_that_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    from triton_ops import run, summary, table

    assert table([row_of(None, "copy", ours=2e-5, other=5e-5)]).split(maxsplit=4)[4] == (
        "20.0 us   2000 GB/s  93%  other 2.50x, peer failed"
    )
    broken = [("first", lambda: case_of(ours=lambda x: x * 1.7)), ("second", lambda: 1 / 0)]
    rows = list(run(broken, 2, "cpu", {"copy": 1e9}, float("inf")))
    assert [row["op"] for row in rows] == ["an op", "second"]
    assert rows[1]["failed"] == {"ours": "ZeroDivisionError: division by zero"}
    assert list(run(broken, 2, "cpu", {}, 0.0)) == ["first", "second"]
    summary({"gpu": "a card", "rates": {"copy": 4e12, "gemm": 7e14}, "rows": [*rows, row_of(1.5, "peer", ours=1.0)], "not_run": ["third"]})
    told = capsys.readouterr().out
    for line in (
        "a card: copy 4000 GB/s, GEMM 700 TFLOP/s",
        "ours FAILED: ZeroDivisionError",
        "failed: peer: it broke",
        "share of the copy's rate",
        "UNKNOWN an op a shape: peer was not timed",
        "no time was left for 1 cases: third",
    ):
        assert line in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so() -> None:
    done = subprocess.run([sys.executable, BENCH / "triton_ops.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no CUDA device here" in done.stderr


def test_what_is_asked_for_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And what the record says of the card, which this one makes up."""
    import triton_ops

    asked: list[Any] = []

    def fill(record: dict[str, Any], cases: Any, *rest: Any) -> None:
        asked.extend([record, [name for name, _ in cases], *rest])
        record |= {"rates": {"copy": 1.0, "gemm": 1.0}, "rows": [], "not_run": []}

    card = SimpleNamespace(name="a card", major=9, minor=0, total_memory=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(triton_ops, "fill", fill)
    triton_ops.main(["--only", "swiglu", "attention", "--tokens", "64", "--rounds", "3", "-o", str(tmp_path / "record.json")])
    record, names, rounds, device, _, to = asked
    assert names[:2] == ["swiglu 0.6B", "swiglu 7B"]
    assert names[2:4] == ["attention 16, head_dim 128, causal", "attention 16, head_dim 128, full"]
    assert len(names) == 2 + 3 * 5 * 2
    assert (rounds, device, to) == (3, "cuda", tmp_path / "record.json")
    assert record["gpu"] == "a card"
    assert "triton" in record["versions"]
    assert str(tmp_path) not in json.dumps(record)
