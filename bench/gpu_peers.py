"""The others of bench/gpu.py: sentence-transformers, and a transformers model on packed texts with torch's `varlen_attn`.

The second is the strongest that plain PyTorch offers: no padding, texts sorted by length and packed up to a token budget, results kept on
the device until the end. Both are run at the best of their own settings, searched on a sample of the very texts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import seconds
from peers import Peer
from torch import Tensor
from torch.nn.attention import varlen
from triton_cases import told, varlen_options

BUDGETS = (8192, 16384, 32768)  # tokens of a packed batch
PADDED = (8192, 32768, 131072)  # tokens of sentence-transformers' batch, by the mean length of a text
BATCHES = (1, 2048)  # least and most texts of it
SAMPLE = 4  # one text of so many is searched on
NAME = "packed_varlen_attn"


def searched(name: str, tried: Sequence[dict[str, Any]], make: Callable[[dict[str, Any]], Callable[[Any], Any]], sample: Any) -> Peer:
    """The fastest of the settings on the sample: each is run twice, the faster run counts. One that fails is no choice and is recorded."""
    times: list[tuple[float, int]] = []
    notes: list[dict[str, Any]] = []
    for n, settings in enumerate(tried):
        try:
            encode = make(settings)
            times.append((min(seconds(lambda encode=encode: encode(sample)) for _ in range(2)), n))
            notes.append(settings | {"seconds": times[-1][0]})
        except Exception as fault:  # out of memory, for one
            notes.append(settings | {"failed": told(fault)})
    if not times:
        raise RuntimeError(notes[0]["failed"])
    best = tried[min(times)[1]]
    return Peer(name, make(best), best, notes)


def spaced(items: Sequence[Any]) -> list[Any]:
    """The sample of a workload: one of every few, in its order."""
    return list(items[:: SAMPLE if len(items) > 4 * SAMPLE else 1])


# sentence-transformers


class Sentences:
    """sentence-transformers in bfloat16 with torch's SDPA. It sorts texts by itself."""

    def __init__(self, directory: Path, device: str, longest: int) -> None:
        from sentence_transformers import SentenceTransformer

        options = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
        self.model = SentenceTransformer(str(directory), device=device, model_kwargs=options)
        self.model.max_seq_length = longest

    def encode(self, texts: Sequence[str], batch: int) -> np.ndarray:
        vectors = self.model.encode(list(texts), batch_size=batch, convert_to_tensor=True, show_progress_bar=False)
        return vectors.float().cpu().numpy()  # type: ignore[no-any-return]

    def best(self, texts: Sequence[str], mean: float) -> Peer:
        low, high = BATCHES
        sizes = sorted({min(high, max(low, 32)), *(min(high, max(low, int(each / mean))) for each in PADDED)})
        tried = [{"batch": size} for size in sizes if size <= max(32, len(texts))]
        return searched("sentence-transformers", tried, lambda each: lambda given: self.encode(given, each["batch"]), spaced(texts))


# packed


@cache
def groups_as_they_are(parameters: tuple[str, ...], device: str) -> bool:
    """Whether a varlen_attn without `enable_gqa` takes fewer key/value heads than query heads and gives what it should."""
    q, k, v = (torch.randn(24, heads, 64, device=device, dtype=torch.bfloat16) for heads in (4, 2, 2))
    cu = torch.tensor([0, 7, 24], dtype=torch.int32, device=device)
    options = varlen_options(parameters, True, 1)
    whole = varlen.varlen_attn(q, *(x.repeat_interleave(2, 1) for x in (k, v)), cu, cu, 17, 17, **options)
    try:
        return bool(torch.allclose(varlen.varlen_attn(q, k, v, cu, cu, 17, 17, **options), whole, atol=0.02))
    except (RuntimeError, ValueError):
        return False


def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float, **others: Any) -> tuple[Tensor, None]:
    """What transformers calls in place of its own: [1, H, T, K] to [1, T, H, K], causal within each text, at the usual scale."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if abs(scaling * q.shape[2] ** 0.5 - 1) > 1e-6:
        raise ValueError(f"scaling is {scaling}; expected 1 / sqrt({q.shape[2]}), which every varlen_attn takes by itself")
    options, cu, longest = dict(module.varlen), others["cu_seq_lens_q"], others["max_length_q"]
    if options.pop("repeated", False):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return varlen.varlen_attn(q, k, v, cu, cu, longest, longest, **options)[None], None


def options_of(group: int, device: str) -> dict[str, Any]:
    """How the varlen_attn that is installed is told of a causal mask and of grouped heads; "repeated": not at all of these."""
    parameters = tuple(inspect.signature(varlen.varlen_attn).parameters)
    if group == 1 or "enable_gqa" in parameters:
        return varlen_options(parameters, True, group)
    return varlen_options(parameters, True, 1) | ({} if groups_as_they_are(parameters, device) else {"repeated": True})


def packs(ids: Sequence[np.ndarray], budget: int) -> Iterator[list[int]]:
    """Numbers of texts, longest first, in batches of at most so many tokens; a longer text is alone."""
    batch: list[int] = []
    room = budget
    for number in sorted(range(len(ids)), key=lambda n: -len(ids[n])):
        if batch and len(ids[number]) > room:
            yield batch
            batch, room = [], budget
        batch.append(number)
        room -= len(ids[number])
    if batch:
        yield batch


class Packed:
    """A transformers model whose texts lie end to end; the last token's state of each is its vector."""

    def __init__(self, directory: Path, device: str, *, compiled: bool) -> None:
        from transformers import AttentionInterface, AutoModel

        AttentionInterface.register(NAME, attention)
        self.device = device
        model = AutoModel.from_pretrained(str(directory), dtype=torch.bfloat16, attn_implementation=NAME)
        self.model = model.to(device).eval()
        options = options_of(model.config.num_attention_heads // model.config.num_key_value_heads, device)
        for layer in self.model.layers:
            layer.self_attn.varlen = options
            if compiled:  # by layer: one compilation serves them all
                layer.compile(dynamic=True)

    def sent(self, array: np.ndarray) -> Tensor:
        host = torch.from_numpy(array)
        return host.pin_memory().to(self.device, non_blocking=True) if self.device != "cpu" else host

    def batch(self, ids: Sequence[np.ndarray]) -> Tensor:
        """[n, D] float32 unit vectors."""
        counts = np.array([len(each) for each in ids])
        starts = np.concatenate([[0], counts.cumsum()])
        places = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
        cu = self.sent(starts.astype(np.int32))
        hidden = self.model(
            input_ids=self.sent(np.concatenate(ids).astype(np.int64))[None],
            position_ids=self.sent(places)[None],
            use_cache=False,
            cu_seq_lens_q=cu,
            max_length_q=int(counts.max()),
        ).last_hidden_state[0]
        return torch.nn.functional.normalize(hidden[cu[1:].long() - 1].float(), dim=-1)

    def encode(self, ids: Sequence[np.ndarray], budget: int) -> np.ndarray:
        """[N, D], in the order of the texts."""
        with torch.inference_mode():
            order = list(packs(ids, budget))
            vectors = torch.cat([self.batch([ids[n] for n in numbers]) for numbers in order]).cpu().numpy()
        out = np.empty_like(vectors)
        out[[n for numbers in order for n in numbers]] = vectors
        return out

    def best(self, ids: Sequence[np.ndarray]) -> Peer:
        tried = [{"budget": budget} for budget in BUDGETS]
        return searched("packed", tried, lambda each: lambda given: self.encode(given, each["budget"]), spaced(ids))
