"""What CUDA graphs, a second stream and deterministic=True bring and cost: ours beside itself, in turns; and whether bits are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_models import Bench
from measure import Case, cosines, interleaved, spread

import pyembed

USUAL, LAUNCHED, ONE_STREAM, DETERMINISTIC = "usual", "no graphs", "one stream", "deterministic"
LENGTHS = (1, 2, 3, 5, 8, 10, 13, 17, 24, 31, 40, 64, 65, 100, 128, 129, 200, 300, 512)  # tokens of the texts whose bits are compared
SMALL = 8  # queries of a small request
CALLS = 64  # small requests, and single queries, of one measurement


@contextmanager
def only(encoder: pyembed.Encoder, streams: int | None, graphs: bool) -> Iterator[None]:
    """With so many of its streams, and without its graphs."""
    model = encoder._loaded
    kept = model.streams, model.graphs
    model.streams, model.graphs = kept[0][:streams], kept[1][:streams] if graphs else ()
    try:
        yield
    finally:
        model.streams, model.graphs = kept


def modes(bench: Bench, shape: str) -> dict[str, Any]:
    """Seconds of passages of 128 tokens in one call, of small requests and of single queries, by mode; and whether bits are kept."""
    bench.passed(shape)
    ours, steady = bench.ours(shape), bench.ours(shape, deterministic=True)
    source, queries = bench.source(shape), bench.work(shape, "W1").ids
    given = ours.token_ids(source.texts([n for n in LENGTHS if n <= bench.largest] * 2))
    right, together = ours.encode(given), steady.encode(given)
    alone = np.concatenate([steady.encode([each]) for each in given])
    turned = steady.encode(given[::-1])[::-1]
    same = {"alone": int((alone == together).all(1).sum()), "reversed": int((turned == together).all(1).sum()), "texts": len(given)}
    calls = CALLS if not bench.tiny else 2
    requests = [queries[SMALL * n : SMALL * (n + 1)] for n in range(calls) if SMALL * n < len(queries)]
    work = {
        "S128": [bench.work(shape, "S128").ids],
        f"{len(requests)} requests of {SMALL} queries": requests,
        f"{calls} single queries": [[each] for each in queries[:calls]],
    }

    def run(encoder: pyembed.Encoder, parts: Sequence[Any], streams: int | None, graphs: bool) -> None:
        with only(encoder, streams, graphs):
            for each in parts:
                encoder.encode(each)

    found: dict[str, Any] = {}
    for name, parts in work.items():
        members: dict[str, Callable[[], None]] = {
            USUAL: partial(run, ours, parts, None, True),
            LAUNCHED: partial(run, ours, parts, None, False),
            ONE_STREAM: partial(run, ours, parts, 1, True),
            DETERMINISTIC: partial(run, steady, parts, None, True),
        }
        for _ in range(2):  # the second batch of a form is recorded
            for member in members.values():
                member()
        done = interleaved({label: Case(each) for label, each in members.items()}, bench.affordable(members))
        found[name] = {label: spread(taken) for label, taken in done.seconds.items()}
    graphs, least = ours._loaded.graphs, float(cosines(together, right).min())
    return {
        "layers": ours.spec.model.num_layers,
        "modes": found,
        "same_bits": same,
        "cosine_of_deterministic": least,
        "streams": len(ours._loaded.streams),
        "graphs": {"tokens": graphs[0].limit if graphs else 0, "recorded": sum(len(each.made) for each in graphs)},
        "failed": {f"graphs of stream {n}": each.failure for n, each in enumerate(graphs) if each.failure},
        "reserved": torch.cuda.memory_reserved() if bench.device != "cpu" else None,
    }
