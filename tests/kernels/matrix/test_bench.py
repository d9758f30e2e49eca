"""bench/triton_ops.py on small shapes: every case is right, and so is every peer that runs here."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[3] / "bench"
EVERYWHERE = {"FlexAttention", "SDPA flash, padded"}


@pytest.mark.filterwarnings("ignore")  # of torch, on what is not compiled and on segment_reduce
def test_every_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    from triton_cases import Shape, all_cases
    from triton_ops import fill

    shape, device = Shape(64, 48, 40, 4, 2, 16, 90, latents=24, latent_heads=3, text=16), torch.get_default_device().type
    group = 2 if device == "cpu" else 1  # not every torch's varlen_attn has groups
    cases = [
        (name, make)
        for name, op, make in all_cases({"tiny": shape}, 64, 256, group, device, torch.bfloat16, lambda work: work)
        if op != "attention" or ("head_dim 256" not in name and ("causal" in name or "5 to 60" in name))  # of one sort some
    ]
    record: dict[str, Any] = {}
    fill(record, cases, 1, device, math.inf, tmp_path / "record.json")
    assert json.loads((tmp_path / "record.json").read_text())["rows"] == record["rows"]
    assert len(record["rows"]) == len(cases)
    for row in record["rows"]:
        name, failed, timed = f"{row['op']} {row['shape']}", row["failed"], set(row["members"])
        assert row["errors"]["ours"] <= 1, name
        assert "ours" in timed
        if row["op"] != "attention":
            assert not failed, name
        elif device == "cpu":
            assert timed >= EVERYWHERE or "5 to 60" in name, failed
            assert set(failed) >= {"varlen_attn", "SDPA cuDNN, padded"}, failed
        else:
            assert "varlen_attn" in timed, failed
