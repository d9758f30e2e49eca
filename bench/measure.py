"""What every benchmark needs: seconds, medians, interleaved rounds, cosines and the gate on them, and what a record says of its machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

PACKAGES = (
    *("pyembed", "torch", "numpy", "tokenizers", "transformers", "sentence-transformers"),
    *("openvino", "nncf", "onnxruntime", "onnx"),
)
AGAIN = ", again"  # ends the name of a case that is another one, timed twice
# mean and smallest cosine
LEAST = {"float32": (0.99999, 0.99999), "bfloat16": (0.9995, 0.9995), "fp8": (0.997, 0.99), "int8": (0.997, 0.985)}


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def about(threads: int) -> dict[str, Any]:
    """Date, machine and versions, as a record says them."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    machine = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "threads": threads, "isa": torch.backends.cpu.get_cpu_capability()}
    return {"date": datetime.date.today().isoformat(), "machine": machine, "versions": versions}


def write(record: dict[str, Any], to: Path) -> None:
    """The record as JSON. ValueError where it holds a path of this machine."""
    text = json.dumps(record, indent=1)
    for each in (str(Path.home()), os.getcwd(), "/tmp/"):
        if len(each) > 1 and each in text:
            at = text.index(each)
            raise ValueError(f"The record holds a path of this machine: ...{text[max(0, at - 40) : at + 60]}...; a record must not.")
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(text + "\n", encoding="utf-8")


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(times, (25, 50, 75))
    return {"median": float(middle), "quartile_1": float(low), "quartile_3": float(high)}


def noise(times: dict[str, list[float]]) -> float | None:
    """By how much the medians of two runs of the same thing differ, 0.02 is 2%: of a case and the one of that name with AGAIN."""
    for name, again in times.items():
        if name.endswith(AGAIN) and name.removesuffix(AGAIN) in times:
            return abs(statistics.median(again) / statistics.median(times[name.removesuffix(AGAIN)]) - 1)
    return None


def cosines(vectors: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """[n] cosines of the rows, in float64. ValueError for shapes that differ."""
    if vectors.shape != reference.shape:
        raise ValueError(f"Vectors of shape {vectors.shape} cannot be held against {reference.shape}.")
    a, b = vectors.astype(np.float64), reference.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)  # type: ignore[no-any-return]


def worst_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(cosines(a, b).min())


def of_cosines(vectors: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    found = cosines(vectors, reference)
    return {"mean": float(found.mean()), "min": float(found.min())}


def refusal(name: str, found: dict[str, float], dtype: str) -> str | None:
    """Why a case of that dtype must not be timed; None: it may. What is not a number is refused as well."""
    mean, least = LEAST[dtype]
    if found["mean"] >= mean and found["min"] >= least:
        return None
    came = f"mean {found['mean']:.5f}, min {found['min']:.5f}"
    return f"{name}: its cosines have {came}; expected at least {mean} and {least}. No figure of it is given."


@dataclass
class Notes:
    """What a reader must know of the cases that are not there."""

    left_out: list[str] = field(default_factory=list)  # not installed, or refused by the installed version
    refused: list[str] = field(default_factory=list)  # by the gate: the vectors are wrong


@dataclass(frozen=True)
class Case:
    """What is timed in every round, or in the first `rounds` of them."""

    work: Callable[[], Any]
    rounds: int | None = None


@dataclass
class Rounds:
    seconds: dict[str, list[float]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)  # what each case gave in the first round


def interleaved(cases: dict[str, Case], rounds: int, before: Callable[[], Any] | None = None) -> Rounds:
    """A B C A B C ..., with `before` at the start of every round."""
    done = Rounds({name: [] for name in cases})
    total = sum(min(rounds, each.rounds or rounds) for each in cases.values())
    with tqdm(total=total, unit=" runs", dynamic_ncols=True) as bar:
        for number in range(rounds):
            if before is not None:
                before()
            for name, case in cases.items():
                if case.rounds is not None and number >= case.rounds:
                    continue
                bar.set_description(name)
                start = time.perf_counter()
                made = case.work()
                done.seconds[name].append(time.perf_counter() - start)
                done.results.setdefault(name, made)
                bar.update()
    return done


def target(row: str, against: str, reached: float, wanted: float, *, least: bool = True) -> dict[str, Any]:
    """A line of the table of targets. `least`: `reached` must be at least `wanted`, else at most."""
    met = reached >= wanted if least else reached <= wanted
    return {"row": row, "what": against, "wanted": f"{'>=' if least else '<='} {wanted:g}", "reached": reached, "met": bool(met)}


def print_targets(targets: Sequence[dict[str, Any]]) -> None:
    for each in targets:
        verdict = "met" if each["met"] else "MISSED"
        print(f"  {verdict:6s}  {each['reached']:8.3f}  (wanted {each['wanted']})  {each['row']}: {each['what']}")
