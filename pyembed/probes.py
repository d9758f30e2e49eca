"""Guard rails at load: do the ids and the mask come out as the checkpoint and its recipe claim?"""

from __future__ import annotations

import numpy as np
import torch

from pyembed.batch import pack
from pyembed.config import ModelSpec
from pyembed.engine import Loaded
from pyembed.model import forward
from pyembed.tokenizer import Tokenizer

PROBE = "The quick brown fox jumps over the lazy dog."


def check_ids(tokenizer: Tokenizer, spec: ModelSpec) -> None:
    """ValueError unless a probe text starts and ends with the recipe's tokens and has no id beyond the embedding table."""
    ids = tokenizer.encode([PROBE], None).ids[0].tolist()
    if ids and max(ids) >= spec.model.vocab_size:
        raise ValueError(
            f"The tokenizer gives the id {max(ids)}, but the embedding table has {spec.model.vocab_size} rows: they are not of one model."
        )
    if spec.recipe is None:
        return
    first, last = ([tokenizer.id_of(token) for token in tokens] for tokens in (spec.recipe.prepend, spec.recipe.append))
    if ids[: len(first)] != first or ids[len(ids) - len(last) :] != last:
        raise ValueError(
            f"Recipe {spec.recipe.name!r} wants texts to start with {list(spec.recipe.prepend)} and end with {list(spec.recipe.append)}; "
            f"the tokenizer ({tokenizer.source}) gives {ids[:2]} ... {ids[-2:]}."
        )


def check_mask(model: Loaded) -> None:
    """ValueError unless changing a text's last token moves its first token's state exactly when the mask is bidirectional."""
    config = model.spec.model
    if config.vocab_size < 3:
        return
    a, b, c = (np.array(ids, dtype=np.int32) for ids in ((0, 1), (0, 2), (0, 1)))
    with model.lock, torch.inference_mode():
        batch = pack([a, b, c], [0, 0, 0], model.ops, model.device)
        hidden = forward(model.weights, batch, model.ops)
        moved, same = not torch.equal(hidden[0], hidden[2]), torch.equal(hidden[0], hidden[4])
    if moved == config.causal or not same:
        claimed, found = "causal" if config.causal else "bidirectional", "saw" if moved else "did not see"
        raise ValueError(f"The mask probe failed: the model is said to be {claimed}, but its first token {found} the next.")
