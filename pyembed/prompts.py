"""Station 2, the part before the tokenizer: which prompt a text gets, and how many of its tokens pooling leaves out."""

from __future__ import annotations

from collections.abc import Mapping

from pyembed.tokenizer import Tokenizer


def resolve(prompts: Mapping[str, str], default: str | None, prompt: str | None, prompt_name: str | None) -> str:
    """The text that is put before each input: `prompt`, else the prompt of that name, else the default one, else nothing."""
    if prompt is not None:
        return prompt
    name = prompt_name if prompt_name is not None else default
    if name is None:
        return ""
    if name not in prompts:
        raise ValueError(f"There is no prompt named {name!r}; this model has {', '.join(sorted(prompts))}. A text goes in `prompt`.")
    return prompts[name]


def prompt_tokens(tokenizer: Tokenizer, prompt: str, max_length: int | None) -> int:
    """How many tokens `include_prompt=False` leaves out: those of the prompt tokenised alone, without a special one at its end.

    That is sentence-transformers' count, and GritLM's (gritlm 1.0.2): BOS and instruction are out.
    """
    if not prompt:
        return 0
    ids = tokenizer.encode([prompt], max_length).ids[0].tolist()
    special = {index for index, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    return len(ids) - (len(ids) > 0 and ids[-1] in special)
