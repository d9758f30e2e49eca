"""Parts `minilm` and `qwen`: text in to vectors out, ours beside the others, each at its best settings."""

from __future__ import annotations

import gc
import importlib.util
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gemm
import numpy as np
import peers
from made import made
from measure import AGAIN, Case, Notes, Rounds, interleaved, noise, of_cosines, refusal, spread, target

import pyembed

GATED = 600  # texts whose vectors are compared before anything is timed
LAYERS, VOCABULARY, CUT = 28, 16384, 512  # of the 0.6B shape
AS_IT_COMES = "sentence-transformers as it comes"


@dataclass(frozen=True)
class Run:
    """What the command line says."""

    model: str  # directory of all-MiniLM-L6-v2
    corpus: list[str]  # different texts
    threads: int
    rounds: int | None  # None: each part's own number
    texts: int | None

    def sample(self, usual: int) -> list[str]:
        """Different texts, the same in every run."""
        return random.Random(0).sample(self.corpus, min(self.texts or usual, len(self.corpus)))


@dataclass
class Entry:
    """A contestant."""

    encode: Callable[[Sequence[str]], Any]
    dtype: str
    rounds: int | None = None  # that it is timed in, if not all
    texts: Sequence[str] | None = None  # that it is timed on, if not all
    settings: dict[str, Any] = field(default_factory=dict)
    searched: list[dict[str, Any]] = field(default_factory=list)
    ours: bool = False


def ours(directory: str | Path, dtypes: Sequence[str], notes: Notes, **settings: Any) -> dict[str, pyembed.Encoder]:
    """Encoders by dtype. What the installed pyembed refuses is said in `notes`."""
    found = {}
    for dtype in dtypes:
        try:
            found[dtype] = pyembed.Encoder(directory, device="cpu", dtype=dtype, **settings)
        except ValueError as error:
            if dtype != "int8":
                raise
            notes.left_out.append(f"pyembed {dtype}: {error}".replace(str(directory), "MODEL"))
    return found


def blocks_of(texts: Sequence[str], size: int, count: int) -> list[str]:
    """A sample whose batches are as even as those of all texts: runs of neighbours by length, at as many places of the order."""
    ordered, count = sorted(texts, key=len), max(1, min(count, len(texts) // size))
    middles = [(2 * n + 1) * len(ordered) // (2 * count) for n in range(count)]
    starts = [min(max(0, middle - size // 2), max(0, len(ordered) - size)) for middle in middles]
    return [text for start in starts for text in ordered[start : start + size]]


def shape_of_06b(folder: str | Path, corpus: list[str]) -> Path:
    """The 0.6B causal shape: weights N(0, 0.02) in bfloat16."""
    return made(Path(folder), LAYERS, corpus, vocabulary=VOCABULARY, deviation=0.02)


def installed(peer: str, packages: Sequence[str], notes: Notes) -> bool:
    """Whether all packages of a peer are there; `notes` are told which are not."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        notes.left_out.append(f"{peer}: {' and '.join(absent)} not installed; pip install -e '.[bench]'.")
    return not absent


def entries_of(encoders: dict[str, pyembed.Encoder], slow: Sequence[str] = ()) -> dict[str, Entry]:
    """Ours, bfloat16 twice: the difference is noise."""
    found = {}
    for dtype, encoder in encoders.items():
        loaded = {"tokens_per_batch": "as it comes", "dtype": dtype}
        found[f"pyembed {dtype}"] = Entry(encoder.encode, dtype, 2 if dtype in slow else None, settings=loaded, ours=True)
    return found | {f"{name}{AGAIN}": entry for name, entry in found.items() if entry.dtype == "bfloat16"}


def gate(entries: dict[str, Entry], sample: Sequence[str], reference: np.ndarray, notes: Notes) -> dict[str, dict[str, float]]:
    """Cosines of all on the sample. Ours that are too far from the reference are taken out of `entries`, and said in `notes`."""
    found = {}
    for name, entry in list(entries.items()):
        found[name] = of_cosines(np.asarray(entry.encode(sample)), reference)
        why = refusal(name, found[name], entry.dtype) if entry.ours else None
        if why is not None:
            notes.refused.append(why)
            del entries[name]
    return found


def compete(run: Run, entries: dict[str, Entry], texts: list[str], encoder: pyembed.Encoder, rounds: int) -> tuple[dict[str, Any], Rounds]:
    """The timed rounds, and what a record says of them. `encoder`: one of ours, which counts tokens and knows the shapes."""
    config = encoder.spec.model
    counted = {name: sum(map(len, encoder.token_ids(entry.texts or texts))) for name, entry in entries.items()}
    causal = config.causal  # the last token is read: the last layer computes one row a text
    ceilings: dict[str, list[float]] = {dtype: [] for dtype in dict.fromkeys(entry.dtype for entry in entries.values())}

    def measure_ceilings() -> None:
        for dtype, each in ceilings.items():
            each.append(gemm.ceiling(config, dtype))

    cases = {name: Case(lambda entry=entry: entry.encode(entry.texts or texts), entry.rounds) for name, entry in entries.items()}
    before = encoder.stats
    done = interleaved(cases, rounds, measure_ceilings)
    skipped = encoder.stats.since(before)
    if skipped.duplicates or skipped.prefix_tokens:
        counts = f"{skipped.duplicates} repeated texts and {skipped.prefix_tokens} shared tokens"
        raise RuntimeError(f"{counts} were not computed; the figures would flatter.")
    results = {}
    for name, entry in entries.items():
        middle, count = statistics.median(done.seconds[name]), len(entry.texts or texts)
        room = middle * statistics.median(ceilings[entry.dtype])  # FLOPs that the ceiling allows in that time
        results[name] = spread(done.seconds[name]) | {
            "rounds": len(done.seconds[name]),
            "texts": count,
            "tokens": counted[name],
            "tokens_per_second": counted[name] / middle,
            "gemm_share_of_ceiling": gemm.flops(config, counted[name]) / room,
            "executed_gemm_share_of_ceiling": gemm.flops(config, counted[name], count if causal and entry.ours else None) / room,
        }
    record = {
        "texts": len(texts),
        "tokens": sum(map(len, encoder.token_ids(texts))),
        "work_skipped": "No text repeats another, no prompt is shared."
        + (" Of the last layer ours computes queries, output and MLP for the one row that is read." if causal else ""),
        "gemm_flops_a_token": gemm.flops(config, 1),
        "gemm_ceiling": ceilings,
        "settings": {name: entry.settings for name, entry in entries.items()},
        "searched": {name: entry.searched for name, entry in entries.items() if entry.searched},
        "seconds": done.seconds,
        "results": results,
        "noise": noise(done.seconds),
    }
    return record, done


def of_peer(peer: peers.Peer, dtype: str, rounds: int | None = None) -> Entry:
    return Entry(peer.encode, dtype, rounds, settings=peer.settings, searched=peer.searched)


def compared(record: dict[str, Any], row: str, name: str, other: str, wanted: float) -> list[dict[str, Any]]:
    """How many times as fast as another, if both were timed."""
    rates = {each: record["results"][each]["tokens_per_second"] for each in (name, other) if each in record["results"]}
    if len(rates) < 2:
        return []
    return [target(row, f"{name} / {other}", rates[name] / rates[other], wanted)]


def minilm(run: Run) -> dict[str, Any]:
    """3,000 docstrings."""
    notes = Notes()
    texts = run.sample(3000)
    sample, gated = blocks_of(texts, 32, 5), texts[:GATED]
    encoders = ours(run.model, ("float32", "bfloat16", "int8"), notes)
    config, longest = encoders["bfloat16"].spec.model, encoders["bfloat16"].max_seq_length
    assert longest is not None
    plain, half = peers.transformer(run.model, None), peers.transformer(run.model, "bfloat16")
    entries = entries_of(encoders, slow=["float32"])
    default = {"batch": 32, "dtype": peers.dtype_of(plain)}
    entries[AS_IT_COMES] = Entry(lambda texts: plain.encode(list(texts)), "float32", 2, settings=default)
    for dtype, model, rounds in (("float32", plain, 1), ("bfloat16", half, None)):
        name = f"sentence-transformers {dtype}"
        entries[name] = of_peer(peers.sentence_transformers(name, model, (4, 8, 16, 32), sample), dtype, rounds)
    tokenizer = peers.tokenizer_of(run.model, longest)
    with tempfile.TemporaryDirectory() as folder:
        if installed("OpenVINO", ("openvino", "nncf"), notes):
            taken = set(texts)
            rest = [text for text in run.corpus if text not in taken]
            calibration = random.Random(1).sample(rest or texts, min(peers.CALIBRATION, len(rest or texts)))
            found = peers.openvino_peers(run.model, tokenizer, encoders["bfloat16"].dim, run.threads, sample, calibration)
            entries |= {peer.name: of_peer(peer, dtype) for peer, dtype in zip(found, ("bfloat16", "int8"), strict=True)}
        if installed("ONNX Runtime", ("onnxruntime", "onnx"), notes):
            found = peers.onnx_peers(run.model, tokenizer, config.num_heads, encoders["bfloat16"].dim, run.threads, sample, Path(folder))
            entries |= {peer.name: of_peer(peer, *kind) for peer, kind in zip(found, (("float32", 1), ("int8", None)), strict=True)}
    reference = plain.encode(gated, batch_size=8)
    before = gate(entries, gated, reference, notes)
    record, done = compete(run, entries, texts, encoders["bfloat16"], run.rounds or 3)
    whole = {name: of_cosines(np.asarray(made), np.asarray(done.results[AS_IT_COMES])) for name, made in done.results.items()}
    notes.refused += [why for name, each in whole.items() if entries[name].ours and (why := refusal(name, each, entries[name].dtype))]
    half_row, row = "MiniLM, bfloat16", "MiniLM, int8"
    targets = [
        *compared(record, half_row, "pyembed bfloat16", AS_IT_COMES, 4),
        *compared(record, half_row, "pyembed bfloat16", "sentence-transformers bfloat16", 2),
        *compared(record, half_row, "pyembed bfloat16", "OpenVINO bfloat16", 1.7),
        *compared(record, row, "pyembed int8", "pyembed bfloat16", 1.5),
        *compared(record, row, "pyembed int8", "ONNX Runtime int8", 2),
        *compared(record, row, "pyembed int8", "OpenVINO int8", 2),
    ]
    cosines = {"cosines_before_timing": before, "cosines": whole}
    return {"model": "all-MiniLM-L6-v2", **record, **cosines, "targets": targets, **vars(notes)}


def qwen(run: Run) -> dict[str, Any]:
    """The 0.6B shape, 200 docstrings cut at 512 tokens."""
    notes = Notes()
    texts = run.sample(200)
    with tempfile.TemporaryDirectory() as folder:
        directory = shape_of_06b(folder, run.corpus)
        encoders = ours(directory, ("bfloat16", "int8"), notes, max_seq_length=CUT)
        model = peers.transformer(str(directory), None)
        whole = peers.transformer(str(directory), "float32")
    model.max_seq_length = whole.max_seq_length = CUT
    gated = sorted(texts, key=len)[:: max(1, len(texts) // 20)]
    entries = entries_of(encoders)
    best = peers.sentence_transformers("sentence-transformers bfloat16", model, (1, 2, 4, 8), blocks_of(texts, 8, 2))
    entries[best.name] = of_peer(best, peers.dtype_of(model), 2)
    default = {"batch": 32, "dtype": peers.dtype_of(model)}
    entries[AS_IT_COMES] = Entry(lambda texts: model.encode(list(texts)), peers.dtype_of(model), 1, settings=default)
    reference = whole.encode(gated, batch_size=1)
    del whole
    gc.collect()
    before = gate(entries, gated, reference, notes)
    record, _ = compete(run, entries, texts, encoders["bfloat16"], run.rounds or 3)
    half_row, row = "0.6B, bfloat16", "0.6B, int8"
    targets = [
        *compared(record, half_row, "pyembed bfloat16", best.name, 1.8),
        *compared(record, half_row, "pyembed bfloat16", AS_IT_COMES, 7),
        *[
            target(half_row, "GEMM FLOPs / wall time / ceiling", each["gemm_share_of_ceiling"], 0.8)
            for name, each in record["results"].items()
            if name == "pyembed bfloat16"
        ],
        *compared(record, row, "pyembed int8", "pyembed bfloat16", 1.6),
    ]
    shape = f"Qwen3-Embedding-0.6B shape: {LAYERS} layers, vocabulary {VOCABULARY}, weights N(0, 0.02), texts cut at {CUT} tokens"
    return {"model": shape, **record, "cosines_before_timing": before, "targets": targets, **vars(notes)}
