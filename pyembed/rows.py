"""Station 2 for a mix of texts and token ids that the caller made: ids are taken as they are, texts go through the templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyembed import prompts
from pyembed.prompts import Form, Prepared
from pyembed.tokenizer import Tokenizer

CHARACTERS = 4  # that a token stands for where a window is measured
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
Ids = Sequence[int] | np.ndarray | Tensor  # of one text
Text = str | Ids


def extent(text: object) -> int:
    """Characters of a text, about. What is neither text nor ids is refused later."""
    if isinstance(text, str):
        return len(text)
    if isinstance(text, list | tuple):
        return CHARACTERS * len(text)
    return CHARACTERS * int(np.prod(text.shape)) if isinstance(text, np.ndarray | Tensor) else 0


def kept(text: object) -> Any:
    """The same, which stays what it is when the caller fills its array with the next text."""
    if isinstance(text, Tensor):
        return text.clone()
    return text.copy() if isinstance(text, np.ndarray) else text


def as_ids(text: object, index: int) -> np.ndarray:
    """The ids of input `index` as integers [length]. TypeError for what is not a row of integers."""
    expected = "expected a text (str) or its token ids (a list, 1-D array or 1-D tensor of integers)"
    if isinstance(text, list | tuple):
        kinds = {kind.__name__: kind for kind in map(type, text)}
        wrong = [name for name, kind in kinds.items() if not issubclass(kind, int | np.integer) or kind is bool]
        if wrong:
            raise TypeError(f"Input {index} is a {type(text).__name__} with a {wrong[0]} in it; {expected}.")
        return np.array(text, dtype=object)  # a Python int has no bounds
    if isinstance(text, Tensor) and text.dtype in INTEGERS and text.ndim == 1:
        return text.cpu().numpy()
    if isinstance(text, np.ndarray) and text.ndim == 1 and (text.dtype.kind in "iu" or text.size == 0):
        return text
    if isinstance(text, np.ndarray | Tensor) and text.ndim:
        raise TypeError(f"Input {index} is a {type(text).__name__} of {text.dtype}, shape {tuple(text.shape)}; {expected}.")
    number = isinstance(text, int | np.integer | Tensor | np.ndarray) and not isinstance(text, bool)
    alone = " The ids of one text are passed as a list of one, encode([ids])." if number else ""
    raise TypeError(f"Input {index} is a {type(text).__name__}; {expected}.{alone}")


def refuse_ids(form: Form, index: int, *, words: bool) -> None:
    """TypeError or ValueError where ids cannot stand for a text: its words are needed, or what surrounds it."""
    if words:
        raise TypeError(f"Input {index} is token ids; a sparse vector needs the text's words, so give the text.")
    if form.asked:
        raise ValueError(
            f"Input {index} is token ids, and nothing is put before ids, but the call asks for a prompt, its template or examples. Leave "
            "them out (encode_query and encode_document ask for the model's own), or give texts."
        )
    if len(form.templates) > 1:
        raise ValueError(f"Input {index} is token ids, but this model's vector is the mean of {len(form.templates)} templates; give texts.")
    if form.narrow:
        raise ValueError(
            f"Input {index} is token ids, but this model pools a part of its tokens only, which ids do not tell (its prompt or template is "
            "left out); give texts."
        )


def check_ids(ids: np.ndarray, index: int, limit: int | None, vocab_size: int) -> np.ndarray:
    """Ids as int32 [length]. ValueError for none, too many, and ids that the model has not."""
    if len(ids) == 0:
        raise ValueError(f"Input {index} has no token id; leave it out.")
    if limit is not None and len(ids) > limit:
        raise ValueError(
            f"Input {index} has {len(ids)} token ids; max_seq_length is {limit}, and ids are never cut. Cut them, raise max_seq_length, or "
            "give the text."
        )
    least, largest = ids.min(), ids.max()
    if least < 0 or largest >= vocab_size:
        raise ValueError(
            f"Input {index} has the token id {least if least < 0 else largest}; expected 0 to {vocab_size - 1}, the rows of the model's "
            "embedding table."
        )
    return ids.astype(np.int32)


def prepare(
    tokenizer: Tokenizer, form: Form, groups: Sequence[Sequence[Text]], numbers: Sequence[int], vocab_size: int, *, words: bool
) -> Prepared:
    """Rows of inputs, each in one or several wordings; `numbers` are their places in the call, for errors. `words`: texts alone."""
    texts = [(index, text) for index, group in zip(numbers, groups, strict=True) for text in group]
    given = {n: as_ids(text, index) for n, (index, text) in enumerate(texts) if not isinstance(text, str)}
    if not given:
        return prompts.prepare(tokenizer, form, [text for _, text in texts if isinstance(text, str)])
    refuse_ids(form, texts[min(given)][0], words=words)
    own = {n: text for n, (_, text) in enumerate(texts) if isinstance(text, str)}
    made = prompts.prepare(tokenizer, form, list(own.values())) if own else Prepared([], [], [], [])
    ids = {n: check_ids(row, texts[n][0], form.max_length, vocab_size) for n, row in given.items()}
    spans = {n: (0, len(row)) for n, row in ids.items()}
    ids |= dict(zip(own, made.ids, strict=True))
    spans |= dict(zip(own, made.spans, strict=True))
    order, places = range(len(texts)), list(own)
    truncated, replaced = ([places[n] for n in found] for found in (made.truncated, made.replaced))
    return Prepared([ids[n] for n in order], [spans[n] for n in order], truncated, replaced)
