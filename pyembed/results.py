"""Station 8: results window by window to what the caller asked for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyembed import engine
from pyembed.job import Engine, Input, Job, Stats
from pyembed.quantize import Array, Precision
from pyembed.window import Window

logger = logging.getLogger("pyembed")
Stored = Callable[[Array], Array]  # vectors [n, dim] float32 in fewer bits
INTEGERS: dict[Precision, str] = {"int8": "int8", "uint8": "uint8", "binary": "int8", "ubinary": "uint8"}


@contextmanager
def running(
    serving: Engine, job: Job, inputs: Iterable[Input], show: bool | None, total: int | None, limit: int | None, *, once: bool = False
) -> Iterator[Iterator[Window]]:
    """The engine's windows under a progress bar; after them it is told how many texts were cut to `limit` tokens or repaired. `once` as
    in engine.run."""
    seen = Stats()

    def counted(windows: Iterable[Window]) -> Iterator[Window]:
        for window in windows:
            seen.add(Stats(len(window.numbers) + len(window.repeats), truncated=window.truncated, replaced=window.replaced))
            yield window

    with (
        progress(show, total, devices=len(serving.lanes)) as advance,
        closing(engine.run(serving, job, inputs, advance, once=once)) as windows,
    ):
        yield counted(windows)
    report(seen, limit)


@contextmanager
def progress(show: bool | None, total: int | None, *, devices: int = 1) -> Iterator[Callable[[Stats], None] | None]:
    """A bar on stderr that is told what is done, of `total` texts where that is known, on so many devices.

    Without a bar there is nothing to tell: None. `show` None shows it when the logger "pyembed" is at INFO or DEBUG.
    """
    if show is None:
        show = logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
    if not show:
        yield None
        return
    from tqdm.auto import tqdm

    done, start = Stats(), time.perf_counter()
    with tqdm(total=total, unit=" texts", desc="Encoding", dynamic_ncols=True) as bar:

        def advance(more: Stats) -> None:
            done.add(more)
            bar.set_postfix_str(told(done, time.perf_counter() - start, devices), refresh=False)  # drawn when tqdm next draws
            bar.update(more.texts)

        yield advance


def told(done: Stats, seconds: float, devices: int = 1) -> str:
    """Beside a bar: tokens a second, the share of the time that the devices computed, and, if there are any, prompt tokens taken from the
    cache, duplicates, and texts that were cut.
    """
    counts = {"reused": done.prefix_tokens, "dup": done.duplicates, "cut": done.truncated}
    shown = [f"{short(done.tokens / seconds)} tok/s", f"{done.busy / seconds / devices:4.0%} busy"]
    return ", ".join([*shown, *(f"{short(count)} {what}" for what, count in counts.items() if count)])


def short(number: float) -> str:
    """Three digits and a unit, in five columns."""
    thousands = 0
    while number >= 999.5 and thousands < 4:
        number, thousands = number / 1000, thousands + 1
    digits = 0 if not thousands or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f}{('', 'k', 'M', 'G', 'T')[thousands]}".rjust(5)


def report(done: Stats, limit: int | None) -> None:
    """Tell of texts that were cut or repaired."""
    if done.truncated:
        logger.warning("%d of %d texts were cut to %s tokens (max_seq_length).", done.truncated, done.texts, limit)
    if done.replaced:
        logger.warning("%d of %d texts held lone surrogates, which became U+FFFD.", done.replaced, done.texts)


def streamed(
    serving: Engine,
    job: Job,
    inputs: Iterable[Input],
    show: bool | None,
    total: int | None,
    limit: int | None,
    stored: Stored | None,
) -> Iterator[Array]:
    """One vector at a time."""
    with running(serving, job, inputs, show, total, limit) as windows:
        for window in windows:
            vectors = window.vectors.numpy()
            yield from vectors if stored is None else stored(vectors)


def collect(results: Iterable[Window], count: int | None, width: int, device: torch.device) -> Tensor:
    """All vectors [N, width] float32; written into one array as they come where their number is known."""
    if count is None:
        parts = [window.vectors.to(device) for window in results]
        return torch.cat(parts) if parts else torch.empty((0, width), dtype=torch.float32, device=device)
    made = torch.empty((count, width), dtype=torch.float32, device=device)
    if (filled := fill(results, made, None)) != count:
        raise ValueError(f"The inputs were {count} when the call began and {filled} when they were read; leave them as they are meanwhile.")
    return made


def into(results: Iterable[Window], out: Any, stored: Stored | None) -> Any:
    """`out`, which check_out has let pass, filled with the vectors; its first rows where it has more."""
    filled = fill(results, out[None] if out.ndim == 1 else out, stored)
    return out if out.ndim == 1 or filled == len(out) else out[:filled]


def fill(results: Iterable[Window], rows: Any, stored: Stored | None) -> int:
    """Write vectors into rows [n, width], window by window as they come, and return their number. ValueError where they are too many,
    or where the rows' dtype cannot hold a value; what was written stays."""
    kind = str(rows.dtype).removeprefix("torch.")
    filled = 0
    for window in results:
        numbers = window.numbers[: np.searchsorted(window.numbers, len(rows))]
        vectors = window.vectors[: len(numbers)]
        part = vectors if stored is None or not len(vectors) else torch.from_numpy(stored(vectors.numpy()))
        part = part.to(getattr(torch, kind))
        narrow = part.is_floating_point() and part.dtype != torch.float32  # what is float32 was looked at when it was made
        if narrow and not bool((finite := torch.isfinite(part)).all()):
            row, place = map(int, (~finite).nonzero()[0])
            raise ValueError(
                f"Input {numbers[row]} gives a vector with {vectors[row, place]:g} in it, which {kind} cannot hold; give a float32 out."
            )
        if len(numbers):
            write(rows, numbers, part if isinstance(rows, Tensor) else part.numpy())
        if window.repeats:
            again, earlier = np.array(window.repeats).T
            write(rows, again, rows[earlier])
        filled += len(numbers) + len(window.repeats)
        if len(numbers) < len(window.numbers):
            raise ValueError(f"out has {len(rows)} rows, but there are more inputs; the rows are written. Give an out with more.")
    return filled


def write(rows: Any, numbers: np.ndarray, part: Any) -> None:
    """rows[numbers] = part; ascending numbers without a gap are a slice, which is quicker."""
    first, end = int(numbers[0]), int(numbers[-1]) + 1
    with torch.inference_mode():
        rows[slice(first, end) if end - first == len(numbers) else numbers] = part


def check_out(out: Any, count: int | None, width: int, precision: Precision, *, single: bool, to_tensor: bool) -> None:
    """TypeError or ValueError unless the vectors of `count` texts (None: unknown) can be written into `out`."""
    floats = ("float32", "float16", "bfloat16") if isinstance(out, Tensor) else ("float32", "float16")
    kinds = floats if precision == "float32" else (INTEGERS[precision],)
    width = -(-width // 8) if precision in ("binary", "ubinary") else width
    shape = f"({width},) or (1, {width})" if single else f"({'n' if count is None else count}{' or more' if count else ''}, {width})"
    if not isinstance(out, np.ndarray | Tensor):
        raise TypeError(f"out is a {type(out).__name__}; expected a numpy array or a torch tensor of shape {shape}.")
    if to_tensor and not isinstance(out, Tensor):
        raise ValueError("convert_to_tensor=True was given with a numpy out, which is what is returned; leave one of them out.")
    if str(out.dtype).removeprefix("torch.") not in kinds:
        raise ValueError(f"out holds {out.dtype}; for precision {precision!r} expected {' or '.join(kinds)}.")
    fits = tuple(out.shape) in ((width,), (1, width)) if single else out.ndim == 2 and out.shape[1] == width and len(out) >= (count or 0)
    if not fits:
        raise ValueError(f"out has the shape {tuple(out.shape)}; expected {shape}.")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out is read-only; expected an array that can be written (a memmap: mode 'r+' or 'w+').")
    strides = out.stride() if isinstance(out, Tensor) else out.strides
    if 0 not in out.shape and any(stride == 0 and size > 1 for stride, size in zip(strides, out.shape, strict=True)):
        raise ValueError("out is a broadcast view, whose rows or columns share their memory; expected an array of its own.")


def features(ids: np.ndarray, states: Tensor, vector: Tensor) -> dict[str, Tensor]:
    """What `output_value=None` gives for one text, under sentence-transformers' names."""
    tokens = torch.from_numpy(ids).long()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "token_embeddings": states, "sentence_embedding": vector}


def per_token(results: Iterable[Window], *, everything: bool) -> list[Any]:
    """Each text's token states, or all of its features."""
    found: list[Any] = []
    for window in results:
        for ids, states, vector in zip(window.ids, window.states, window.vectors, strict=True):
            found.append(features(ids, states, vector) if everything else states)
    return found


def shaped(vectors: Tensor, stored: Stored | None, *, single: bool, to_numpy: bool, to_tensor: bool) -> Any:
    """[N, dim] float32 as array, tensor or list of tensors, `stored` in fewer bits; one text's row alone when `single`."""
    if len(vectors) == 0 and not single:
        return vectors[:0].flatten() if to_tensor else np.array([]) if to_numpy else []
    if stored is None:
        out: Any = vectors if to_tensor or not to_numpy else vectors.numpy()
    else:
        quantized = stored(vectors.cpu().numpy())
        out = quantized if to_numpy and not to_tensor else torch.from_numpy(quantized)
    if not (to_numpy or to_tensor):
        out = list(out)
    return out[0] if single else out
