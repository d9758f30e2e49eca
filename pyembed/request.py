"""What one call asks for, checked: its prompt, template, examples, cut and norm, as the engine's Job."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pyembed import engine, prompts, quantize
from pyembed.job import Job, Stats
from pyembed.options import as_texts, check_kind, check_positive
from pyembed.prompts import Example
from pyembed.quantize import Array, Precision
from pyembed.results import Stored, report

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
        narrow=asked.narrow,
        budget=encoder._engine.budget if given is None else replace(encoder._engine.budget, tokens=given, balance=math.inf),
        max_texts=batch_size,
        dim=dim,
        normalize=normalize,
        tokens=tokens,
        share_prefixes=encoder._arguments["share_prefixes"] and not tokens,  # those of every token are asked for
    )


def check_kinds(output_value: object, precision: str, pool: object, chunk_size: object) -> None:
    """ValueError for a kind of result that there is not, and for a pool of processes."""
    if pool is not None or chunk_size is not None:
        raise ValueError("There is no pool= and no chunk_size=; Encoder(device=[...]) runs on several devices and divides the texts.")
    quantize.check_precision(precision)
    if output_value not in ("sentence_embedding", "token_embeddings", None):
        raise ValueError(f"output_value is {output_value!r}; expected 'sentence_embedding', 'token_embeddings' or None.")


def check_tokens(output_value: object, job: Job, *, variants: bool, out: Any) -> None:
    """ValueError where tokens are asked for of what has none, or no place for them."""
    if job.tokens and (variants or len(job.form.templates) > 1):
        raise ValueError(f"output_value={output_value!r} gives one text's tokens; with variants or several templates there are more.")
    if job.tokens and out is not None:
        raise ValueError(f"output_value={output_value!r} gives results of different lengths; out= takes sentence embeddings.")


def width(encoder: Encoder, job: Job) -> int:
    """Dimensions of the vectors that a job gives."""
    full = encoder.spec.full_dim
    return full if job.dim is None else min(full, int(job.dim))


def storing(
    encoder: Encoder, job: Job, precision: Precision, ranges: Array | None, *, variants: bool = False, at_once: bool = False
) -> Stored | None:
    """What turns a job's float32 vectors into `precision`; None where they stay as they are.

    ValueError for int8 and uint8 without ranges, unless the vectors are int8 numbers or come all `at_once`.
    """
    quantize.check_precision(precision)
    if precision == "float32":
        return None
    integers = encoder.spec.integers and not job.normalize and not variants and len(job.form.templates) == 1
    if precision in ("int8", "uint8") and ranges is None and not at_once and not (integers and precision == "int8"):
        raise ValueError(
            f"precision {precision!r} needs ranges= when vectors are handed out as they come (stream, out=): each dimension's range over "
            "all of them is not known."
        )
    return partial(quantize.quantize, precision=precision, ranges=ranges, integers=integers)


def token_ids(
    encoder: Encoder, texts: Any, *, prompt: str | None, prompt_name: str | None, examples: Sequence[Example]
) -> list[np.ndarray]:
    """What Encoder.token_ids returns."""
    engine.check_process(encoder._engine)
    check_kind("prompt", prompt, str)
    single, given = as_texts(texts)
    if single:
        raise TypeError("token_ids takes several texts; one is passed as a list of one.")
    listed = list(given)
    for index, text in enumerate(listed):
        if not isinstance(text, str):
            raise TypeError(f"Input {index} is a {type(text).__name__}; expected str.")
    asked = form(encoder, prompt=prompt, prompt_name=prompt_name, examples=examples, max_length=encoder.max_seq_length)
    if len(asked.templates) > 1:
        raise ValueError(f"This model puts a text into {len(asked.templates)} templates, so there is no one row of ids for it; give texts.")
    rows = prompts.prepare(encoder.tokenizer, asked, cast(list[str], listed))
    report(Stats(len(listed), truncated=len(rows.truncated), replaced=len(rows.replaced)), encoder.max_seq_length)
    return rows.ids
