"""An Encoder as a pickle: what it was made of, never its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyembed.recipes import recipes

if TYPE_CHECKING:
    from pyembed.encoder import Encoder

SET = ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim", "max_seq_length")  # what can be set after loading


def reduced(encoder: Encoder) -> tuple[Any, ...]:
    """What Encoder.__reduce__ returns: its arguments and what was set since, without the token. The other side loads the local directory
    again."""
    given, stack, recipe = encoder._arguments, encoder._stack, encoder.spec.recipe.name
    now = {name: getattr(encoder, name) for name in SET}
    now |= {"model": str(stack.base), "adapters": [str(each) for each in stack.adapters], "adapter": encoder.adapter or False}
    now |= {"recipe": recipe if recipe in recipes() else None, "device": [str(each) for each in encoder.devices]}
    return rebuild, (given | now | {"revision": None, "token": None}, {name: given[name] for name in SET})


def rebuild(arguments: dict[str, Any], given: dict[str, Any]) -> Encoder:
    """An Encoder made from what it was `given`, then set to what it was: as an argument, a None or a filled prompt means another thing."""
    from pyembed.encoder import Encoder

    encoder = Encoder(**(arguments | given))
    vars(encoder).update({"_max_seq_length" if name == "max_seq_length" else name: arguments[name] for name in given})
    return encoder
