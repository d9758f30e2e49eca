"""Part `profile`: where our time goes. The ops and the linear layers are timed around each call, in one process.

What a call spends inside another timed one counts for the inner one alone. What is in no group is "the rest": Python, packing, and
torch's own element-wise calls. The wall time with and without the timers shows what they cost.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from contest import CUT, Run, ours, shape_of_06b
from measure import Notes, seconds
from placement import placed

import pyembed
from pyembed.ops import Ops
from pyembed.tokenizer import Tokenizer

# Which group an op belongs to; one that is not here has a row of its own.
GROUPS = {
    "attention": "attention",
    **dict.fromkeys(("embed", "rms_norm", "layer_norm", "qk_norm_rope", "swiglu", "geglu", "gelu", "pool"), "element-wise"),
    "latent_attention": "element-wise",
    "schedule": "attention",
}
LINEARS = {"apply": "GEMM", "chain": "GEMM, fused"}  # methods of linear layers; fused: with activation, sum and norm
TOKENS, REST = "tokenisation", "the rest"


def linears(weights: Any) -> set[type]:
    """The classes of all linear objects in the weights: what has `apply`."""
    if isinstance(weights, tuple | list):
        return set().union(*map(linears, weights)) if weights else set()
    if not dataclasses.is_dataclass(weights):
        return set()
    own = {type(weights)} if callable(getattr(weights, "apply", None)) else set()
    return own.union(*(linears(getattr(weights, each.name)) for each in dataclasses.fields(weights)))


class Clock:
    """Seconds by group, each call without the timed calls inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = [0.0]  # of the calls under way, what was timed inside them

    def around(self, work: Callable[..., Any], group: str) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            self.inner.append(0.0)
            start = time.perf_counter()
            try:
                return work(*given, **named)
            finally:
                taken = time.perf_counter() - start
                self.seconds[group] += taken - self.inner.pop()
                self.inner[-1] += taken

        return timed


@contextmanager
def watched(encoder: pyembed.Encoder) -> Iterator[Clock]:
    """Timers around the encoder's ops, linear layers and tokenizer."""
    loaded, clock = encoder._loaded, Clock()
    ops: Any = loaded.ops
    names = [name for name, each in vars(Ops).items() if isinstance(each, FunctionType) and not name.startswith("_")]
    places: list[tuple[Any, str, str]] = [(ops, name, GROUPS.get(name, f"ops.{name}")) for name in names]
    for kind in linears(loaded.weights):
        places += [(kind, name, group) for name, group in LINEARS.items() if name in vars(kind)]
    places.append((Tokenizer, "encode", TOKENS))
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in places]
    for owner, name, group in places:
        setattr(owner, name, clock.around(vars(owner)[name], group))
    try:
        yield clock
    finally:
        for owner, name, work in before:
            setattr(owner, name, work)


def together(encoder: pyembed.Encoder, texts: Sequence[str]) -> None:
    """Encode with all threads in each batch, so that times of calls add up to the wall time."""
    placed(encoder, list(texts), math.inf)


def shares(encoder: pyembed.Encoder, texts: Sequence[str], rounds: int) -> dict[str, Any]:
    """Medians over the rounds, and each group's share of the wall time under the timers."""
    together(encoder, texts)
    plain, timed, groups = [], [], []
    for _ in range(rounds):
        plain.append(seconds(lambda: together(encoder, texts)))
        with watched(encoder) as clock:
            timed.append(seconds(lambda: together(encoder, texts)))
        groups.append(dict(clock.seconds) | {REST: timed[-1] - sum(clock.seconds.values())})
    middle = {name: statistics.median(each.get(name, 0.0) for each in groups) for name in groups[0]}
    return {
        "texts": len(texts),
        "tokens": sum(map(len, encoder.token_ids(list(texts)))),
        "seconds_without_timers": plain,
        "seconds_with_timers": timed,
        "cost_of_timers": statistics.median(timed) / statistics.median(plain) - 1,
        "seconds_of_groups": groups,
        "shares": {name: each / sum(middle.values()) for name, each in sorted(middle.items(), key=lambda item: -item[1])},
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """Groups by case."""
    names = list(dict.fromkeys(name for each in found.values() for name in each["shares"]))
    lines = [f"{'share of the time':20s}" + "".join(f"{case:>20s}" for case in found)]
    lines += [f"{name:20s}" + "".join(f"{each['shares'].get(name, 0):20.1%}" for each in found.values()) for name in names]
    lines.append(f"{'cost of the timers':20s}" + "".join(f"{each['cost_of_timers']:20.1%}" for each in found.values()))
    return "\n".join(lines)


def profile(run: Run) -> dict[str, Any]:
    """MiniLM on 1,000 docstrings and the 0.6B shape on 60, by dtype."""
    notes = Notes()
    found = {}
    for dtype, encoder in ours(run.model, ("bfloat16", "int8"), notes).items():
        found[f"MiniLM {dtype}"] = shares(encoder, run.sample(1000), run.rounds or 3)
    with tempfile.TemporaryDirectory() as folder:
        encoders = ours(shape_of_06b(folder, run.corpus), ("bfloat16", "int8"), notes, max_seq_length=CUT)
    for dtype, encoder in encoders.items():
        found[f"0.6B {dtype}"] = shares(encoder, run.sample(60), run.rounds or 3)
    del encoders
    gc.collect()
    print(table(found))
    return {"cases": found, **vars(notes)}
