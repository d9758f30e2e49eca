"""Station 8: results window by window to what the caller asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyembed import quantize
from pyembed.job import Stats
from pyembed.quantize import Array, Precision
from pyembed.window import Window

logger = logging.getLogger("pyembed")


def progress(show: bool | None, texts: Iterable[Any]) -> Any:
    """A bar that counts texts, or a context that does nothing; None shows it when the logger "pyembed" is at INFO or DEBUG."""
    if show is None:
        show = logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
    if not show:
        return nullcontext()
    from tqdm.auto import tqdm

    return tqdm(total=len(texts) if isinstance(texts, Sequence) else None, unit=" texts", desc="Encoding")


def advance_of(bar: Any) -> Callable[[Stats], Any] | None:
    """What the engine calls with each batch's counts."""
    return None if bar is None else lambda done: bar.update(done.texts)


def reported(results: Iterable[Window], max_seq_length: int | None) -> Iterator[Window]:
    """Pass results on; at the end say how many texts of this call were cut or repaired."""
    truncated = replaced = count = 0
    for window in results:
        truncated, replaced, count = truncated + window.truncated, replaced + window.replaced, count + window.texts
        yield window
    if truncated:
        logger.warning("%d of %d texts were cut to %s tokens (max_seq_length).", truncated, count, max_seq_length)
    if replaced:
        logger.warning("%d of %d texts held lone surrogates, which became U+FFFD.", replaced, count)


def collect(results: Iterable[Window], count: int | None, device: torch.device, *, on_device: bool) -> Tensor:
    """All vectors [N, dim]; written into one array as they come where their number is known."""
    target = device if on_device else torch.device("cpu")
    out, parts, filled = None, [], 0
    for window in results:
        if count is None:
            parts.append(window.vectors.to(target))
            continue
        if out is None:
            out = torch.empty((count, window.vectors.shape[1]), dtype=torch.float32, device=target)
        out[filled : filled + len(window.vectors)] = window.vectors
        filled += len(window.vectors)
    if count is None:
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float32, device=target)
    return torch.empty(0, dtype=torch.float32, device=target) if out is None else out


def features(ids: np.ndarray, states: Tensor, vector: Tensor) -> dict[str, Tensor]:
    """What `output_value=None` gives for one text, under sentence-transformers' names."""
    tokens = torch.from_numpy(ids).long()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "token_embeddings": states, "sentence_embedding": vector}


def shaped(
    vectors: Tensor, single: bool, precision: Precision, ranges: Array | None, integers: bool, *, to_numpy: bool, to_tensor: bool
) -> Any:
    """[N, dim] float32 as array, tensor or list of tensors, in the precision asked for; one text's row alone when `single`."""
    if len(vectors) == 0 and not single:
        return vectors[:0].flatten() if to_tensor else np.array([]) if to_numpy else []
    if precision == "float32":
        out: Any = vectors if to_tensor or not to_numpy else vectors.numpy()
    else:
        quantized = quantize.quantize(vectors.cpu().numpy(), precision, ranges, integers=integers)
        out = quantized if to_numpy and not to_tensor else torch.from_numpy(quantized)
    if not (to_numpy or to_tensor):
        out = list(out)
    return out[0] if single else out
