"""`pyembed verify`: does a model give the vectors it should? Probes of its own, published numbers, and its own implementation.

Each step returns a list of Checks. A step that cannot be done says so and why; nothing is skipped in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pyembed import prompts, request
from pyembed.config import Recipe
from pyembed.encoder import Encoder
from pyembed.hub import hub_id
from pyembed.info import mask
from pyembed.original import against_original, answers_of
from pyembed.probes import PROBE, ProbeError, check_ids, check_mask
from pyembed.published import Check, all_ids, checks, dtype_of, id_of_recipe, known_as, published
from pyembed.quantising import EIGHT_BITS
from pyembed.recipes import methods, recipe_of_id, recipes
from pyembed.transfer import out_of_memory

Against = Literal["transformers", "card"]
SHORT = (PROBE, "a", "What is Deep Learning?")
# Largest distance between a text's vectors in two batches, relative to their length. On a CPU in float32 and bfloat16 there is none.
BATCH = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 5e-3, "int8": 1e-1, "fp8": 1e-1}
NEAREST = 10
LEAST = 0.99  # mean cosine of vectors in eight bits and in float32: layers all at the rule's limit leave about 0.993 (docs/int8.md)
UNIT = 1e-5  # largest distance of a unit vector's length from 1


def verify(load: Callable[[], Encoder], model: str, *, as_id: str | None, against: Against | None) -> tuple[str, list[Check]]:
    """What was loaded, in words, and the checks: those of `against`, else all.

    `as_id` is the hub id whose numbers a directory is held against; None: the model's own id, or the one its recipe leads to.
    """
    try:
        encoder = load()
    except ProbeError as error:  # the probes that every load makes
        return f"{model} did not load", [Check(error.probe, "FAIL", str(error))]
    head, out = describe(encoder), []
    if against is None:
        out += probe(encoder)
        if any(check.name == "finite vectors" and check.outcome == "FAIL" for check in out):
            return head, out
    if against in (None, "card"):
        out += against_card(encoder, model, as_id)
    if against is None and encoder.dtype in EIGHT_BITS:
        out.append(beside_float32(encoder))
    if against in (None, "transformers"):
        answers = answers_of(encoder, texts_of(encoder))
        del encoder  # memory for the other implementation
        out += against_original(answers)
    return head, out


def describe(encoder: Encoder) -> str:
    recipe = encoder.spec.recipe.name
    return f"{encoder.model}, {f'recipe {recipe}' if recipe else 'no recipe'}, in {dtype_of(encoder)} on {encoder.device}"


def table(head: str, found: Sequence[Check]) -> str:
    """What was loaded, a line for each check, and their count."""
    widths = [max(len(text) for text in texts) for texts in zip(*((check.outcome, check.name) for check in found), strict=True)]
    rows = [f"{check.outcome:{widths[0]}}  {check.name:{widths[1]}}  {check.detail}" for check in found]
    counts = [sum(check.outcome == outcome for check in found) for outcome in ("pass", "FAIL", "not checkable")]
    return "\n".join([head, *rows, "{} passed, {} failed, {} not checkable".format(*counts)])


def exit_code(found: Sequence[Check], against: Against | None) -> int:
    """1 where a check failed; 3 where what was asked for by name could not be checked; else 0."""
    outcomes = {check.outcome for check in found}
    return 1 if "FAIL" in outcomes else 3 if against is not None and "not checkable" in outcomes else 0


def recipe_for(as_id: str) -> str | None:
    """The name of the recipe of a hub id. ValueError for an id of which nothing is known."""
    recipe = recipe_of_id(as_id)
    if recipe is None and known_as(as_id, all_ids(published())) is None:
        raise ValueError(f"--as is {as_id!r}, which has neither published numbers nor a recipe; `pyembed verify` lists those with numbers.")
    return None if recipe is None else recipe.name


# Published numbers


def against_card(encoder: Encoder, model: str, as_id: str | None) -> list[Check]:
    """Numbers published for the model, found by `as_id`, by its hub id, or by its recipe."""
    data, why = published(), ""
    chosen = as_id or (None if Path(model).is_dir() else hub_id(model))
    recipe = encoder.spec.recipe
    if recipe.name in methods() or "templates" in recipe.given:
        return [Check("published", "not checkable", "no numbers are published for models under a template of the caller's choice")]
    if chosen is None:
        chosen, why = id_of_recipe(recipes().get(recipe.name, Recipe()), encoder.spec.full_dim, data)
    return checks(encoder, chosen, data) if chosen is not None else [Check("published", "not checkable", why)]


# Probes


def probe(encoder: Encoder) -> list[Check]:
    """What must hold of every model, whatever its numbers are."""
    texts = texts_of(encoder)
    out = [probe_ids(encoder, texts), probe_mask(encoder), probe_truncation(encoder)]
    try:
        vectors = encode(encoder, texts)
    except ValueError as error:
        return [*out, Check("finite vectors", "FAIL", str(error))]
    finite = bool(np.isfinite(vectors).all())
    size = f"{len(vectors)} vectors of {vectors.shape[1]:,} numbers"
    out.append(Check("finite vectors", "pass" if finite else "FAIL", size))
    out.append(probe_batches(encoder, texts, vectors))
    return out + probe_output(encoder, vectors)


def probe_ids(encoder: Encoder, texts: Sequence[str]) -> Check:
    """The recipe's tokens around a text, ids that the table has, and no token lost on the way through templates and cuts."""
    tokenizer, rows = encoder.tokenizer, encoder.spec.model.vocab_size
    try:
        check_ids(tokenizer, encoder.spec)
    except ProbeError as error:
        return Check("ids", "FAIL", str(error))
    form = request.form(encoder)
    prepared = prompts.prepare(tokenizer, form, texts)
    largest = max(int(ids.max()) for ids in prepared.ids if len(ids))
    if largest >= rows:
        return Check("ids", "FAIL", f"the tokenizer gives the id {largest}, but the embedding table has {rows:,} rows")
    plain = len(form.templates) == 1 and form.templates[0].parts == ("{prompt}{text}",) and form.templates[0].clean == "none"
    if plain and form.templates[0].special:
        for text, ids in zip(texts, prepared.ids, strict=True):
            whole = tokenizer.backend.encode(form.prompt + text).ids
            if ids.tolist() != whole:
                return Check("ids", "FAIL", f"{text!r} became {len(ids)} ids, but tokenizer.json gives {len(whole)} or others")
    ids = tokenizer.encode([PROBE], None).ids[0].tolist()
    first, last = (f"{tokenizer.backend.id_to_token(id)} ({id})" for id in (ids[0], ids[-1])) if ids else ("nothing", "nothing")
    return Check("ids", "pass", f"a text begins {first} and ends {last}; the largest of {len(texts)} texts is {largest:,} of {rows:,} rows")


def probe_mask(encoder: Encoder) -> Check:
    claimed = mask(encoder.spec.model)
    try:
        check_mask(encoder._loaded)
    except ProbeError as error:
        return Check("mask", "FAIL", str(error))
    found = "does not see" if encoder.spec.model.causal else "sees"
    return Check("mask", "pass", f"{claimed}: the first token {found} the next")


def probe_truncation(encoder: Encoder) -> Check:
    """A text beyond the limit ends as every other text does: the last special token is what many models read."""
    limit = encoder.max_seq_length
    if limit is None:
        return Check("truncation", "not checkable", "the model has no limit; --max-seq-length gives one")
    form = request.form(encoder, max_length=limit)
    long = " ".join([PROBE] * (limit // 4 + 2))
    rows = len(form.templates)
    short, cut = prompts.prepare(encoder.tokenizer, form, SHORT), prompts.prepare(encoder.tokenizer, form, [long])
    if cut.truncated != [0]:
        return Check("truncation", "FAIL", f"{len(long):,} characters became {len(cut.ids[0]):,} tokens; the limit is {limit:,}")
    whole = {"piece", "decoded"}.isdisjoint(template.cut for template in form.templates)
    if whole and max(map(len, cut.ids)) > limit:
        return Check("truncation", "FAIL", f"a long text kept {max(map(len, cut.ids)):,} tokens; the limit is {limit:,}")
    kept = []
    for n in range(rows):
        if form.templates[n].cut == "end" and not form.templates[n].parts[-1].endswith("{text}"):
            continue  # the reference cuts what stands behind the text as well
        ends = {int(ids[-1]) for ids in short.ids[n::rows]}
        if len(ends) == 1 and int(cut.ids[n][-1]) not in ends:
            return Check("truncation", "FAIL", f"texts end in {ends.pop()}, a long one in {int(cut.ids[n][-1])}")
        kept += [encoder.tokenizer.backend.id_to_token(id) for id in ends] if len(ends) == 1 else []
    ending = f"and ends {' '.join(map(str, kept))} as short ones do" if kept else "; nothing stands after a text"
    return Check("truncation", "pass", f"a text of {len(long):,} characters becomes {len(cut.ids[0]):,} tokens {ending}".replace(" ;", ";"))


def probe_batches(encoder: Encoder, texts: Sequence[str], together: np.ndarray) -> Check:
    """Each text alone, and all in the opposite order in small batches, against all together."""
    alone = np.concatenate([encode(encoder, [text]) for text in texts])
    order = encode(encoder, texts[::-1], batch_size=3)[::-1]
    scale = np.maximum(np.linalg.norm(together, axis=1), np.finfo(np.float32).tiny)
    error = max(float((np.linalg.norm(other - together, axis=1) / scale).max()) for other in (alone, order))
    exact = encoder.device.type == "cpu" and encoder.dtype != torch.float16
    right = bool((alone == together).all() and (order == together).all()) if exact else error <= BATCH[dtype_of(encoder)]
    how = "bit for bit" if exact and right else f"they differ by {error:.1e}; at most {0 if exact else BATCH[dtype_of(encoder)]:.0e}"
    return Check("batches", "pass" if right else "FAIL", f"{len(texts)} texts alone, together and in another order: {how}")


def probe_output(encoder: Encoder, vectors: np.ndarray) -> list[Check]:
    """What the model says of its vectors: of length 1, or whole numbers."""
    if encoder.spec.normalize:
        error = float(np.abs(np.linalg.norm(vectors, axis=1) - 1).max())
        return [Check("norm", "pass" if error <= UNIT else "FAIL", f"1 to {error:.1e}; at most {UNIT:.0e}")]
    if encoder.spec.integers:
        right = bool((vectors == np.round(vectors)).all() and np.abs(vectors).max() <= 128)
        return [Check("integers", "pass" if right else "FAIL", f"from {vectors.min():g} to {vectors.max():g}")]
    return []


# Eight bits


def beside_float32(encoder: Encoder) -> Check:
    """The vectors of texts that are published with others' numbers, beside those of the same model in float32."""
    given = published().inputs.values()
    texts = list(dict.fromkeys(text for each in given for text in (*each.queries, *each.documents)))
    arguments = encoder._arguments | {"device": encoder.device, "dtype": "float32"}
    try:
        cosines, same = agreement(encode(encoder, texts), encode(Encoder(**arguments), texts))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return Check("beside float32", "not checkable", "there is no memory for the same model in float32")
    mean, least = cosines.mean(), cosines.min()
    detail = f"{len(texts)} texts: mean cosine {mean:.4f}, at least {LEAST}; least cosine {least:.4f}; top-{NEAREST} agreement {same:.3f}"
    return Check("beside float32", "pass" if mean >= LEAST else "FAIL", detail)


def agreement(vectors: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, float]:
    """Each row's cosine with the right one, [N], and the share of a row's NEAREST others that are the right row's too."""
    a, b = (each.astype(np.float64) for each in (vectors, right))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    same = [len(np.intersect1d(ours, theirs)) / NEAREST for ours, theirs in zip(nearest(a), nearest(b), strict=True)]
    return cosines, float(np.mean(same))


def nearest(vectors: np.ndarray) -> np.ndarray:
    """The NEAREST others of each row by cosine, [N, NEAREST]."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = unit @ unit.T
    np.fill_diagonal(scores, -np.inf)
    return np.argpartition(-scores, NEAREST, axis=1)[:, :NEAREST]


# What the steps share


def encode(encoder: Encoder, texts: Sequence[str], **arguments: Any) -> np.ndarray:
    """Uncut vectors [N, dim] float32."""
    vectors: np.ndarray = encoder.encode(list(texts), truncate_dim=encoder.spec.full_dim, show_progress_bar=False, **arguments)
    return vectors


def texts_of(encoder: Encoder) -> list[str]:
    """Sentences of several lengths, and the same of words of the model's own vocabulary, which small ones do not have in English."""
    given = published().inputs
    texts = [*SHORT, given["Q"].queries[0], given["Q"].documents[1]]
    drawn = np.random.default_rng(0)
    size = min(encoder.tokenizer.vocab_size, encoder.spec.model.vocab_size)
    for length in (1, 7, 40):
        texts.append(encoder.tokenizer.backend.decode(drawn.integers(0, size, length).tolist()).strip() or PROBE)
    return texts
