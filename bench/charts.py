"""A record of bench/cpu.py as a picture: a row a part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

OURS = {"float32": "#8fc1bd", "bfloat16": "#0b7a75", "int8": "#d1495b"}
OTHERS = "#b4bcc6"
GROUPS = {
    "GEMM": "#0b7a75",
    "GEMM, fused": "#45a29e",
    "attention": "#d1495b",
    "element-wise": "#edae49",
    "tokenisation": "#66729b",
    "the rest": "#c9ced6",
}


def colour(name: str) -> str:
    return next((each for dtype, each in OURS.items() if dtype in name), "#0b7a75") if name.startswith("pyembed") else OTHERS


def down(cosine: float) -> str:
    """Five digits, never rounded up to 1."""
    return f"{np.floor(cosine * 1e5) / 1e5:.5f}"


def bars(
    axes: Any, values: dict[str, float], unit: str, *, notes: dict[str, str] | None = None, whiskers: dict[str, float] | None = None
) -> None:
    """A bar a name, the first one on top, its value beside it."""
    names, most = list(values), max([*values.values(), *(whiskers or {}).values()])
    at, bbox = np.arange(len(names))[::-1], {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axes.barh(at, list(values.values()), color=[colour(name) for name in names], height=0.72)
    for y, name in zip(at, names, strict=True):
        end = values[name]
        if whiskers:
            end = max(end, whiskers[name])
            axes.plot([values[name], whiskers[name]], [y, y], color="#30363d", linewidth=1.2)
        shown = f"{values[name]:,.0f}" if values[name] >= 100 else f"{values[name]:,.1f}"
        axes.text(
            end + most * 0.01, y, shown + (f"   {notes[name]}" if notes and name in notes else ""), va="center", fontsize=8, bbox=bbox
        )
    axes.set_yticks(at, names, fontsize=8)
    axes.set_xlabel(unit, fontsize=8)
    axes.set_xlim(0, most * 1.32)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def contest(figure: Any, record: dict[str, Any]) -> None:
    axes = figure.subplots()
    results = {name: each for name, each in record["results"].items() if not name.endswith(", again")}
    rates = {name: each["tokens_per_second"] for name, each in sorted(results.items(), key=lambda item: -item[1]["tokens_per_second"])}
    cosines = record.get("cosines", record["cosines_before_timing"])
    batch = {name: f", batch {each['batch']}" for name, each in record.get("settings", {}).items() if "batch" in each}
    notes = {name: f"cosine ≥ {down(cosines[name]['min'])}{batch.get(name, '')}" for name in rates if name in cosines}
    bars(axes, rates, "tokens/s", notes=notes)
    axes.set_ylim(-0.6, len(rates) - 0.1)
    for dtype in ("bfloat16", "int8"):
        limit = float(np.median(record["gemm_ceiling"].get(dtype, [np.nan]))) / record["gemm_flops_a_token"]
        if limit < axes.get_xlim()[1]:
            axes.axvline(limit, color=OURS[dtype], linestyle=":", linewidth=1.2, zorder=0)
            axes.text(limit, len(rates) - 0.4, f" {dtype} GEMM alone", color=OURS[dtype], fontsize=7.5, va="center")
    axes.set_title(f"{record['model'].partition(':')[0]}, {record['texts']:,} docstrings", fontsize=10, loc="left")


def latency(figure: Any, record: dict[str, Any]) -> None:
    for axes, (model, each) in zip(figure.subplots(1, len(record["models"])), record["models"].items(), strict=True):
        results = {name: found for name, found in each["results"].items() if not name.endswith(", again")}
        whiskers = {name: found["p90"] for name, found in results.items()}
        labels = {name: name.replace("sentence-transformers", "s-t") for name in results}
        p50 = {labels[name]: found["p50"] for name, found in results.items()}
        notes = {labels[name]: f"p90 {value:,.1f}" for name, value in whiskers.items()}
        bars(axes, p50, "ms, p50 (line: to p90)", notes=notes, whiskers={labels[name]: value for name, value in whiskers.items()})
        axes.set_title(f"{model}, one text of {record['tokens']} tokens", fontsize=10, loc="left")


def long(figure: Any, record: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    bars(left, {name: each["tokens_per_second"] for name, each in record["results"].items() if not name.endswith(", again")}, "tokens/s")
    left.set_title("0.6B, documents of 512 and of 8k tokens", fontsize=10, loc="left")
    for dtype, found in record["memory_mb"].items():
        lengths = [each["tokens"] for each in found]
        right.plot(lengths, [each["peak"] - each["loaded"] for each in found], "o-", color=OURS[dtype], label=dtype)
    right.tick_params(labelsize=8)
    right.set_xlim(0, None)
    right.set_ylim(0, None)
    right.set_xlabel("tokens of the document", fontsize=8)
    right.set_title("MB beyond the loaded model", fontsize=10, loc="left")
    right.legend(fontsize=8, frameon=False)
    right.grid(alpha=0.3)
    right.spines[["top", "right"]].set_visible(False)


def profile(figure: Any, record: dict[str, Any]) -> None:
    axes, names = figure.subplots(), list(record["cases"])
    at, start = np.arange(len(names))[::-1], np.zeros(len(names))
    found = {group for each in record["cases"].values() for group, share in each["shares"].items() if share > 0.0005}
    groups = [group for group in GROUPS if group in found] + sorted(found - set(GROUPS))
    for group in groups:
        part = np.array([100 * record["cases"][name]["shares"].get(group, 0.0) for name in names])
        axes.barh(at, part, left=start, color=GROUPS.get(group), label=group, height=0.7)
        for y, size, begin in zip(at, part, start, strict=True):
            if size > 3:
                axes.text(begin + size / 2, y, f"{size:.0f}", ha="center", va="center", fontsize=8, color="white")
        start = start + part
    axes.set_yticks(at, names, fontsize=8)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the time", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Where the time goes", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False, ncols=len(groups), loc="upper center", bbox_to_anchor=(0.5, -0.22))


def threads(figure: Any, record: dict[str, Any]) -> None:
    for axes, (name, each) in zip(np.ravel(figure.subplots(1, len(record["cases"]))), record["cases"].items(), strict=True):
        ways: dict[str, list[tuple[int, float]]] = {}
        for label, found in each["results"].items():
            tokens, _, way = label.partition(" tokens, ")
            if not way.endswith("again"):
                ways.setdefault(way, []).append((int(tokens), found["tokens_per_second"]))
        for way, points in ways.items():
            axes.plot(*zip(*points, strict=True), "o-", label=way, color="#d1495b" if "a thread" in way else "#0b7a75")
        axes.set_xscale("log", base=2)
        axes.set_xticks([tokens for tokens, _ in points], [str(tokens) for tokens, _ in points], fontsize=8)
        axes.minorticks_off()
        axes.set_ylim(0, 1.1 * axes.dataLim.y1)
        axes.tick_params(labelsize=8)
        axes.set_xlabel("tokens a batch", fontsize=8)
        axes.set_title(f"{name}, tokens/s", fontsize=10, loc="left")
        axes.legend(fontsize=8, frameon=False, loc="lower right")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)


DRAWN: dict[str, tuple[float, Callable[[Any, dict[str, Any]], None]]] = {
    "minilm": (3.6, contest),
    "qwen": (2.4, contest),
    "latency": (2.4, latency),
    "long": (2.6, long),
    "profile": (2.2, profile),
    "threads": (2.8, threads),
}


def plot(record: dict[str, Any], to: Path) -> None:
    """Each part of the record, one under the other."""
    parts = [name for name in DRAWN if name in record["parts"]]
    heights = [DRAWN[name][0] for name in parts]
    figure = plt.figure(figsize=(10.5, sum(heights) + 0.5), layout="constrained")
    machine = record["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['threads']} threads, {record['date']}: text in to vectors out", fontsize=11)
    rows = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, name in zip(rows, parts, strict=True):
        DRAWN[name][1](row, record["parts"][name])
    figure.savefig(to, dpi=120)
    plt.close(figure)
