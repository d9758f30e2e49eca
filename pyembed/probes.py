"""Guard rails at load: do the ids and the mask come out as the checkpoint and its recipe claim?"""

from __future__ import annotations

import re

import numpy as np
import torch

from pyembed.batch import pack
from pyembed.config import ModelSpec
from pyembed.model import forward
from pyembed.runner import Loaded, device_of
from pyembed.tokenizer import Tokenizer

PROBE = "The quick brown fox jumps over the lazy dog."


class ProbeError(ValueError):
    """What a model claims is not what it does."""

    def __init__(self, probe: str, message: str) -> None:
        super().__init__(message)
        self.probe = probe

    def __reduce__(self) -> tuple[type[ProbeError], tuple[str, str]]:
        return ProbeError, (self.probe, str(self))


def check_ids(tokenizer: Tokenizer, spec: ModelSpec) -> None:
    """ProbeError unless a probe text starts and ends with the recipe's tokens and has no id beyond the embedding table."""
    ids = tokenizer.encode([PROBE], None).ids[0].tolist()
    if ids and max(ids) >= spec.model.vocab_size:
        raise ProbeError(
            "ids",
            f"The tokenizer gives the id {max(ids)}, but the embedding table has {spec.model.vocab_size} rows: they are not of one model.",
        )
    first, last = ([tokenizer.id_of(token) for token in tokens] for tokens in (spec.recipe.prepend, spec.recipe.append))
    if ids[: len(first)] != first or ids[len(ids) - len(last) :] != last:
        raise ProbeError(
            "ids",
            f"Recipe {spec.recipe.name!r} wants texts to start with {list(spec.recipe.prepend)} and end with {list(spec.recipe.append)}; "
            f"the tokenizer ({tokenizer.source}) gives {ids[:2]} ... {ids[-2:]}.",
        )
    check_written(tokenizer, spec)


def check_written(tokenizer: Tokenizer, spec: ModelSpec) -> None:
    """ValueError unless the tokens that a model's templates write out are tokens. Methods for any model write theirs either way."""
    if spec.recipe.model_types and "templates" not in spec.recipe.given:
        parts = "".join(part for several in spec.recipe.templates.values() for each in several for part in each.parts)
        missing = [token for token in dict.fromkeys(re.findall(r"<[^<>\s]+>", parts)) if tokenizer.id_of(token) is None]
        if missing:
            raise ProbeError(
                "ids",
                f"Recipe {spec.recipe.name!r} writes {', '.join(missing)} around a text, which the tokenizer ({tokenizer.source}) does not "
                "have as tokens: the model is another one, or its tokenizer files are incomplete.",
            )


def check_mask(model: Loaded) -> None:
    """ProbeError unless other second tokens move a first token's state exactly when the mask is bidirectional."""
    config = model.spec.model
    texts = [np.array(ids, dtype=np.int32) for ids in ((0, last) for last in range(1, min(config.vocab_size, 9)))]
    if len(texts) < 2:
        return
    with device_of(model):
        batch = pack(texts, None, model.ops, model.device)
        first = forward(model.weights, batch, model.ops)[: 2 * len(texts) : 2]
    if not bool(torch.isfinite(first).all()):
        message = f"The weights give NaN or infinite hidden states for the ids 0 and 1 in {model.dtype}; try dtype='float32'."
        raise ProbeError("finite vectors", message)
    moved = any(not torch.equal(first[0], other) for other in first[1:])
    if moved == config.causal:
        claimed, found = "causal" if config.causal else "bidirectional", "saw" if moved else "did not see"
        raise ProbeError("mask", f"The mask probe failed: the model is said to be {claimed}, but its first token {found} the next.")
