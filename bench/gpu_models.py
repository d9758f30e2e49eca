"""The models of bench/gpu.py: two shapes with random weights, made on the machine that runs it, and loaded when a case first needs them."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_ceilings import Chain
from gpu_peers import Packed, Sentences
from gpu_work import LARGEST, Source, Work
from made import SHAPE, made
from measure import seconds
from single import status

import pyembed

OURS = "ours"


@dataclass(frozen=True)
class Shape:
    kind: str  # of made.KINDS
    layers: int
    vocabulary: int
    sizes: dict[str, int]
    tokens: int  # of a workload
    batches: tuple[int, ...]  # tokens at which the linear layers are measured


MISTRAL = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SHAPES = {
    "0.6B": Shape("qwen3", 28, 151669, SHAPE, 400_000, (8192, 16384, 32768)),
    "7B": Shape("mistral", 32, 32000, MISTRAL, 65_536, (4096, 16384)),
}
TINY = {"0.6B": Shape("qwen3", 2, 400, SMALL, 1500, (64,)), "7B": Shape("mistral", 2, 400, SMALL, 1000, (64,))}


@dataclass
class Settings:
    """What the command line says."""

    device: str
    backend: str
    tiny: bool
    layers: dict[str, int]  # at most, of shapes that are not to have all of theirs
    scale: float  # of the tokens of a workload
    rounds: int
    case: float  # seconds that a case is to take at most
    compiled: tuple[str, ...]  # workloads on which the compiled peer is timed


class Bench:
    """Models, texts and the clock of one run."""

    def __init__(self, settings: Settings, corpus: Sequence[str], folder: Path, cases: dict[str, Any]) -> None:
        self.settings, self.corpus, self.folder, self.cases = settings, corpus, folder, cases
        self.device, self.tiny, self.rounds, self.compiled = settings.device, settings.tiny, settings.rounds, settings.compiled
        self.largest = 256 if settings.tiny else LARGEST
        self.shapes = TINY if settings.tiny else SHAPES
        self.loading: dict[str, dict[str, float]] = {}
        self.kept: dict[tuple[Any, ...], Any] = {}

    def once_made(self, *key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.kept:
            self.say(f"making {' '.join(map(str, key))}")
            self.kept[key] = make()
        return self.kept[key]

    def say(self, what: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {what}", file=sys.stderr, flush=True)

    def affordable(self, members: dict[str, Callable[[], Any]]) -> int:
        """Rounds that fit into half of a case's seconds, of which a call of each tells: loading and warming up have the other half."""
        once = sum(seconds(each) for each in members.values())
        return max(1, min(self.rounds, int(self.settings.case / 2 / once)))

    # the device

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def usable(self) -> bool:
        """Whether the device still computes: after an illegal access nothing does until the process ends."""
        try:
            return bool((torch.ones(2, device=self.device) + 1 == 2).all())
        except RuntimeError:
            return False

    def tidy(self) -> None:
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def memory(self) -> float:
        """Bytes that are taken now."""
        return torch.cuda.memory_allocated() if self.device != "cpu" else status("VmRSS") * 2**20

    def peak(self) -> float:
        """Bytes that were taken at most since `reset_peak`; on a CPU since the process began."""
        return torch.cuda.max_memory_allocated() if self.device != "cpu" else status("VmHWM") * 2**20

    def reserved(self) -> float:
        return torch.cuda.memory_reserved() if self.device != "cpu" else status("VmRSS") * 2**20

    def reset_peak(self) -> None:
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()

    # models

    def directory(self, shape: str) -> Path:
        def make() -> Path:
            to, each = self.folder / shape, self.shapes[shape]
            to.mkdir(parents=True)
            layers = min(each.layers, self.settings.layers.get(shape, each.layers))
            return made(to, layers, list(self.corpus), each.sizes, each.vocabulary, 0.02, kind=each.kind, device=self.device)

        return self.once_made("checkpoint", shape, make=make)  # type: ignore[no-any-return]

    def ours(self, shape: str, dtype: str = "bfloat16", *, deterministic: bool = False) -> pyembed.Encoder:
        def make() -> pyembed.Encoder:
            directory = self.directory(shape)
            self.wait()
            before, start = self.memory(), time.perf_counter()
            self.reset_peak()
            settings = {"backend": self.settings.backend, "max_seq_length": self.largest, "deterministic": deterministic}
            encoder = pyembed.Encoder(directory, device=self.device, dtype=dtype, **settings)  # type: ignore[arg-type]
            self.wait()
            self.loading[" ".join([shape, *[dtype] * (dtype != "bfloat16"), *["deterministic"] * deterministic])] = {
                "file": (directory / "model.safetensors").stat().st_size,
                "loaded": self.memory() - before,
                "while_loading": self.peak() - before,
                "seconds_to_load": time.perf_counter() - start,
            }
            return encoder

        return self.once_made(OURS, shape, dtype, *["deterministic"] * deterministic, make=make)  # type: ignore[no-any-return]

    def reference(self, shape: str) -> pyembed.Encoder:
        """In float32, of plain PyTorch; not kept."""
        options: dict[str, Any] = {"backend": "reference", "max_seq_length": self.largest}
        return pyembed.Encoder(self.directory(shape), device=self.device, dtype="float32", **options)

    def packed(self, shape: str, *, compiled: bool = False) -> Packed:
        make = lambda: Packed(self.directory(shape), self.device, compiled=compiled)  # noqa: E731
        return self.once_made("packed", shape, *["compiled"] * compiled, make=make)  # type: ignore[no-any-return]

    def sentences(self, shape: str) -> Sentences:
        make = lambda: Sentences(self.directory(shape), self.device, self.largest)  # noqa: E731
        return self.once_made("sentence-transformers", shape, make=make)  # type: ignore[no-any-return]

    def chain(self, shape: str) -> Chain:
        return self.once_made("chain", shape, make=lambda: Chain(self.ours(shape).spec.model, self.device))  # type: ignore[no-any-return]

    # texts

    def source(self, shape: str) -> Source:
        return self.once_made("texts", shape, make=lambda: Source(self.ours(shape), self.corpus))  # type: ignore[no-any-return]

    def work(self, shape: str, name: str) -> Work:
        tokens = int(self.shapes[shape].tokens * self.settings.scale)
        return self.once_made(  # type: ignore[no-any-return]
            "workload", shape, name, make=lambda: self.source(shape).work(name, tokens, self.largest)
        )

    def passed(self, shape: str) -> None:
        """RuntimeError unless our vectors of this shape have passed the gate."""
        found = self.cases.get(f"{shape} gate")
        if found is None or "error" in found:
            raise RuntimeError(f"not timed: the gate of {shape} {'has not been run' if found is None else 'refused our vectors'}")
