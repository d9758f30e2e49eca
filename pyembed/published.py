"""Numbers that others have published for models, as data (published.json), and how a model's own numbers are held against them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pyembed import engine, request
from pyembed.config import Pooling, Recipe
from pyembed.encoder import Encoder
from pyembed.job import Job
from pyembed.jsonfile import read_json
from pyembed.ops import PoolMode
from pyembed.options import dtype_name
from pyembed.recipes import recipe_of_id

Outcome = Literal["pass", "FAIL", "not checkable"]
COSINE = {"float32": 1e-3, "int8": 5e-2, "fp8": 5e-2}  # largest difference of two cosines by the dtype they were computed in; all others:
COSINE_HALF = 1e-2
# and of printed numbers of a vector, relative to their length: another GELU moves them by 1e-3
VECTOR = {"float32": 5e-3, "int8": 2e-1, "fp8": 2e-1}
VECTOR_HALF = 5e-2


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a verification."""

    name: str
    outcome: Outcome
    detail: str  # what was compared with what, and the number


@dataclass(frozen=True, slots=True)
class Inputs:
    """Queries and documents that several sources use."""

    queries: tuple[str, ...]
    documents: tuple[str, ...]
    instruction: str | None = None  # of the queries; None: they take their prompt as it is


@dataclass(frozen=True, slots=True)
class PublishedVector:
    """Some numbers of one text's vector, without a prompt and before L2 where `normalized` does not say otherwise."""

    ids: tuple[str, ...]  # hub ids of the model
    text: str
    pooling: PoolMode
    dtype: str  # that the source computed in
    source: str
    first: tuple[float, ...]
    norm: float
    last: tuple[float, ...] = ()
    normalized: bool = False
    foreign_pooling: bool = False  # the source pooled otherwise than the model is used
    tolerance: float | None = None  # relative to the printed numbers' length; None: by dtype
    doubt: str = ""  # why another number need not mean that the model is wrong

    @property
    def title(self) -> str:
        return f"vector of {self.text!r}"


@dataclass(frozen=True, slots=True)
class PublishedScores:
    """Cosines of queries with documents."""

    ids: tuple[str, ...]
    inputs: str  # name of an Inputs
    scores: tuple[tuple[float | None, ...], ...]  # [queries, documents]; None: not printed
    dtype: str
    source: str
    scale: float = 1.0  # that the source multiplied cosines by
    instruction: str | None = None  # in place of the inputs' own
    query_prompt: str | None = None  # None: the model's own
    document_prompt: str | None = None
    examples: str | None = None  # name of in-context examples
    doubt: str = ""

    @property
    def title(self) -> str:
        return f"cosines of inputs {self.inputs}"


Number = PublishedVector | PublishedScores


@dataclass(frozen=True, slots=True)
class Published:
    inputs: dict[str, Inputs]
    examples: dict[str, list[dict[str, str]]]
    vectors: tuple[PublishedVector, ...]
    scores: tuple[PublishedScores, ...]
    dims: dict[str, int]  # hub id: length of its vectors, to tell the sizes of one recipe apart

    @property
    def numbers(self) -> tuple[Number, ...]:
        return (*self.vectors, *self.scores)


@cache
def published() -> Published:
    """The package's published.json."""
    content = read_json(Path(__file__).with_name("published.json"))
    return Published(
        {name: Inputs(**fixed(each)) for name, each in content["inputs"].items()},
        content["examples"],
        tuple(PublishedVector(**fixed(each)) for each in content["vectors"]),
        tuple(PublishedScores(**fixed(each)) for each in content["similarities"]),
        content["dims"],
    )


def fixed(fields: dict[str, Any]) -> dict[str, Any]:
    """Lists as tuples."""
    return {name: tuple_of(value) if isinstance(value, list) else value for name, value in fields.items()}


def tuple_of(values: list[Any]) -> tuple[Any, ...]:
    return tuple(tuple_of(each) if isinstance(each, list) else each for each in values)


def all_ids(data: Published) -> list[str]:
    """Hub ids of all models with a number, in the order of the file."""
    return list(dict.fromkeys(id for each in data.numbers for id in each.ids))


PLAIN_ENCODERS = ("sentence-transformers/all-MiniLM-L6-v2", "BAAI/bge-m3", "BAAI/llm-embedder")  # run without a recipe


def listed(data: Published) -> str:
    """Which models have published numbers, and of what."""
    out = ["Models with published numbers:"]
    for id in all_ids(data):
        of = [each.title for each in data.numbers if id in each.ids]
        runs = id in PLAIN_ENCODERS or recipe_of_id(id) is not None
        out.append(f"  {id:66} {'; '.join(of)}{'' if runs else ' (its architecture is not supported yet)'}")
    out += ["", "`pyembed verify DIR --as HUB_ID` holds a local copy against them."]
    return "\n".join(out)


def known_as(hub_id: str, ids: Collection[str]) -> str | None:
    """`hub_id` as `ids` spells it; the hub compares without case."""
    return next((id for id in ids if id.lower() == hub_id.lower()), None)


def id_of_recipe(recipe: Recipe, dim: int, data: Published) -> tuple[str | None, str]:
    """Which model a local copy with a recipe is, or why that is not known. Two models of one recipe are told apart by their length."""
    if not recipe.ids:
        return None, "nothing says which model this directory is; give --as HUB_ID"
    fitting = [id for id in recipe.ids if data.dims.get(id, dim) == dim]
    numbered = [id for id in fitting if id in all_ids(data)]
    if not numbered:
        return None, f"there are no published numbers for recipe {recipe.name} with {dim:,} dimensions"
    if len(fitting) > 1:
        return None, f"recipe {recipe.name} is of {', '.join(fitting)}; say with --as which of them this directory is"
    return numbered[0], ""


def checks(encoder: Encoder, hub_id: str, data: Published) -> list[Check]:
    """The numbers of one model against what `encoder` computes."""
    out = []
    for each in data.numbers:
        if known_as(hub_id, each.ids):
            try:
                out.append(check_vector(encoder, each, data) if isinstance(each, PublishedVector) else check_scores(encoder, each, data))
            except ValueError as error:  # the encoder's own sentence: no place for the instruction, numbers that are not finite
                out.append(Check(each.title, "FAIL", str(error)))
    return out or [Check("published", "not checkable", f"there are no published numbers for {hub_id}")]


def check_vector(encoder: Encoder, want: PublishedVector, data: Published) -> Check:
    vector = plain_vector(encoder, want)
    if len(vector) != data.dims[want.ids[0]]:
        return Check(want.title, "FAIL", f"it has {len(vector):,} numbers; expected {data.dims[want.ids[0]]:,}")
    right = np.array([*want.first, *want.last])
    ours = np.concatenate([vector[: len(want.first)], vector[len(vector) - len(want.last) :]])
    error = float(np.linalg.norm(ours - right) / np.linalg.norm(right))
    norm = float(np.linalg.norm(vector))
    apart = abs(norm - want.norm) / want.norm
    limit = max(want.tolerance or VECTOR.get(want.dtype, VECTOR_HALF), VECTOR.get(dtype_of(encoder), VECTOR_HALF))
    detail = f"{len(right)} printed numbers differ by {error:.1e} of their length, the norm {norm:.5g} by {apart:.1e}"
    return verdict(want.title, max(error, apart) <= limit, f"{detail}; at most {limit:.0e} [{origin(want)}, {want.pooling}]", want.doubt)


def check_scores(encoder: Encoder, want: PublishedScores, data: Published) -> Check:
    given = data.inputs[want.inputs]
    asked: dict[str, Any] = {"normalize_embeddings": True, "truncate_dim": encoder.spec.full_dim}
    query, document = dict(asked), dict(asked)
    if want.query_prompt is not None:
        query["prompt"] = want.query_prompt
    else:
        query["instruction"] = given.instruction if want.instruction is None else want.instruction
    if want.examples is not None:
        query["examples"] = data.examples[want.examples]
    if want.document_prompt is not None:
        document["prompt"] = want.document_prompt
    queries, documents = encoder.encode_query(list(given.queries), **query), encoder.encode_document(list(given.documents), **document)
    ours = np.asarray(queries, dtype=np.float64) @ np.asarray(documents, dtype=np.float64).T
    right = np.array([[np.nan if score is None else score for score in row] for row in want.scores]) / want.scale
    error = float(np.nanmax(np.abs(ours - right)))
    limit = max(COSINE.get(dtype, COSINE_HALF) for dtype in (want.dtype, dtype_of(encoder)))
    detail = f"{', '.join(f'{score:.4f}' for score in ours.flatten())} differ by {error:.1e}; at most {limit:.0e} [{origin(want)}]"
    return verdict(want.title, error <= limit, detail, want.doubt)


def origin(want: Number) -> str:
    return f"{want.source}, {'dtype not stated' if want.dtype == 'unstated' else want.dtype}"


def verdict(name: str, right: bool, detail: str, doubt: str) -> Check:
    """A number that need not be the model's own cannot fail it."""
    if not right and doubt:
        return Check(name, "not checkable", f"{detail}; {doubt}")
    return Check(name, "pass" if right else "FAIL", detail)


def dtype_of(encoder: Encoder) -> str:
    return dtype_name(encoder.dtype)


def plain_vector(encoder: Encoder, want: PublishedVector) -> np.ndarray:
    """The text's whole vector, [dim] float64, without a prompt, and before L2 unless the numbers are those of a unit vector."""
    model = encoder._loaded
    pooling = Pooling((want.pooling,)) if want.foreign_pooling else model.spec.pooling
    model = replace(model, spec=replace(model.spec, pooling=pooling, normalize=want.normalized))
    form = replace(request.form(encoder, prompt="", max_length=encoder.max_seq_length), include_prompt=model.spec.pooling.include_prompt)
    serving = engine.local(model, encoder.tokenizer)
    (window,) = engine.run(serving, Job(form, serving.budget, max_texts=None, dim=None, normalize=want.normalized), [want.text])
    return window.vectors[0].double().numpy()
