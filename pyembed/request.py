"""What one call asks for, checked: its prompt, template, examples, cut and norm, as the engine's Job."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pyembed import engine, prompts
from pyembed.job import Job
from pyembed.options import check_kind, check_positive
from pyembed.prompts import Example

if TYPE_CHECKING:
    from pyembed.encoder import Encoder


def form(
    encoder: Encoder,
    *,
    prompt: str | None = None,
    prompt_name: str | None = None,
    examples: Sequence[Example] = (),
    max_length: int | None = None,
) -> prompts.Form:
    """What the encoder puts around texts; `max_length` None: no limit."""
    given = {"prompt": prompt, "prompt_name": prompt_name, "examples": examples, "max_length": max_length}
    return prompts.form_of(encoder.spec, encoder.prompts, encoder.default_prompt_name, **given)  # type: ignore[arg-type]


def job(
    encoder: Encoder,
    *,
    prompt: str | None = None,
    prompt_name: str | None = None,
    examples: Sequence[Example] = (),
    batch_size: int | None = None,
    normalize: bool = False,
    truncate_dim: int | None = None,
    tokens: bool = False,
) -> Job:
    """A call's job. Arguments as `Encoder.encode`; ValueError and TypeError for what cannot be meant."""
    engine.check_process(encoder._engine)
    dim = encoder.truncate_dim if truncate_dim is None else truncate_dim
    check_positive("batch_size", batch_size)
    check_positive("truncate_dim", dim)
    check_kind("prompt", prompt, str)
    asked = form(encoder, prompt=prompt, prompt_name=prompt_name, examples=examples, max_length=encoder.max_seq_length)
    given = encoder._arguments["tokens_per_batch"]
    return Job(
        form=asked,
        narrow=any(template.read or template.last or template.after for template in asked.templates),
        budget=encoder._engine.budget if given is None else replace(encoder._engine.budget, tokens=given, balance=math.inf),
        max_texts=batch_size,
        dim=dim,
        normalize=normalize,
        tokens=tokens,
        share_prefixes=encoder._arguments["share_prefixes"] and not tokens,  # those of every token are asked for
    )
