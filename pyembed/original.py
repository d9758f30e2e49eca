"""A model's own implementation beside ours: sentence-transformers where there is a modules.json, else transformers' class of the same
architecture, with the recipe's mask and pooling computed plainly. Float32, one text at a time, eager attention (which knows every mask).

The only file that imports those libraries, inside functions: they are not dependencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyembed import prompts, request, stack
from pyembed.checkpoint import read_modules, read_pooling
from pyembed.config import PLAIN, ModelSpec, Recipe
from pyembed.encoder import Encoder
from pyembed.jsonfile import Fields
from pyembed.ops import PoolMode
from pyembed.options import default_length
from pyembed.published import Check, dtype_of
from pyembed.recipes import NO_RECIPE, methods, recipes

LONGEST = 512  # a model with a larger limit is asked with texts cut to:
SHORTER = 256
# largest distance from their vector, relative to its length, by our dtype
ERROR = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2, "int8": 2e-1, "fp8": 2e-1}


@dataclass(frozen=True, slots=True)
class Answers:
    """What we computed, and all that the other side needs to compute the same: no weights of ours are held."""

    directory: Path
    merged: bool  # LoRA adapters are in our weights
    spec: ModelSpec  # what files and recipe say, without the caller's arguments where these decide
    prompt: str
    templates: int
    plain: bool  # a text is its prompt and itself, with the tokenizer's specials
    limit: int
    limit_of_files: bool  # False: the recipe or this comparison sets it, there too
    texts: list[str]
    ids: list[list[int]]  # a row for each template of each text
    spans: list[tuple[int, int]]
    cut: list[int]  # indices of the texts that were cut
    specials: list[int]  # ids that we put around a text
    vectors: np.ndarray  # [texts, dim]
    dtype: str
    device: torch.device


def answers_of(encoder: Encoder, texts: Sequence[str]) -> Answers:
    """Our vectors of `texts` and of one that is longer than the limit."""
    before, spec, tokenizer = encoder.max_seq_length, encoder.spec, encoder.tokenizer
    limit = before if before is not None and before <= LONGEST else SHORTER
    of_files = limit == default_length(spec, tokenizer) and not spec.sources["max_seq_length"].startswith("recipe")
    size = min(tokenizer.vocab_size, spec.model.vocab_size)
    drawn = np.random.default_rng(1).integers(0, size, 2 * limit).tolist()
    texts = [*texts, " ".join([tokenizer.backend.decode(drawn), *["the end"] * limit])]
    form = request.form(encoder, max_length=limit)
    rows = prompts.prepare(tokenizer, form, texts)
    encoder.max_seq_length = limit
    try:
        vectors = encoder.encode(texts, truncate_dim=spec.full_dim, show_progress_bar=False)
    finally:
        encoder._max_seq_length = before
    return Answers(
        encoder.directory,
        bool(encoder._stack.task(encoder.adapter)),
        stated(encoder),
        form.prompt,
        len(form.templates),
        form.templates == (PLAIN,),
        limit,
        of_files,
        texts,
        [ids.tolist() for ids in rows.ids],
        rows.spans,
        rows.truncated,
        [*tokenizer.prefix, *tokenizer.suffix],
        vectors,
        dtype_of(encoder),
        encoder.device,
    )


def stated(encoder: Encoder) -> ModelSpec:
    """What files and recipe say. A caller's pooling or mask counts only where nothing else says it: else the comparison shows it."""
    base = (recipes() | methods()).get(encoder.spec.recipe.name, NO_RECIPE)
    try:
        spec = stack.read(encoder._stack, recipe=base)[0]
    except ValueError:  # undecided without the arguments
        return encoder.spec
    guessed = spec.sources["pooling"].startswith("no modules.json")
    return replace(spec, pooling=encoder.spec.pooling) if guessed else spec


def against_original(ours: Answers) -> list[Check]:
    """Ids and vectors against theirs."""
    why = "LoRA adapters are merged into our weights" if ours.merged else in_the_way(ours.directory, ours.spec)
    if why:
        return [Check("original", "not checkable", why)]
    chain = read_modules(ours.directory, custom=True)
    try:
        ask = sentence_transformer(ours) if chain and follows_files(ours, chain) else auto_model(ours)
    except Exception as error:  # these libraries raise anything for what they do not know
        return [Check("original", "not checkable", f"transformers does not load it: {' '.join(str(error).split())[:200]}")]
    return compare(ours, *ask)


def in_the_way(directory: Path, spec: ModelSpec) -> str:
    """Why a model's own implementation cannot be asked; empty where it can."""
    if find_spec("transformers") is None:
        return "transformers is not installed"
    chain = read_modules(directory, custom=True)
    at = directory / spec.transformer_path
    if chain and find_spec("sentence_transformers") is None:
        return "sentence-transformers is not installed"
    config = Fields.of(at / "config.json")
    if "AutoModel" in (config.get("auto_map", dict, None) or {}):
        return f"the original needs the repository's own code ({config.values['auto_map']['AutoModel']}), which pyembed never runs"
    if spec.model.latent is not None:
        return "transformers has no latent attention head"
    return ""


def follows_files(ours: Answers, chain: list[tuple[str, str]]) -> bool:
    """Whether modules.json says all that the recipe says, so that sentence-transformers does what the model is meant to do."""
    spec, normalize = ours.spec, any(kind == "Normalize" for kind, _ in chain)
    same = (read_pooling(ours.directory, chain, spec.model), normalize, "float") == (spec.pooling, spec.normalize, spec.output)
    return same and ours.templates == 1 and not spec.recipe.drop_layers


def compare(ours: Answers, name: str, their_ids: list[list[int]] | None, theirs: Tensor) -> list[Check]:
    out = []
    if their_ids is not None:
        out.append(compare_ids(ours, name, their_ids))
    if theirs.shape != ours.vectors.shape:
        return [*out, Check("their vectors", "FAIL", f"{name} gives {theirs.shape[1]:,} numbers; expected {ours.vectors.shape[1]:,}")]
    length = theirs.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    errors = (torch.from_numpy(ours.vectors) - theirs).norm(dim=1) / length
    worst, limit = float(errors.max()), ERROR[ours.dtype]
    sizes = [len(ids) for ids in ours.ids]
    texts = f"{len(ours.texts)} texts of {min(sizes)} to {max(sizes)} tokens, {len(ours.cut)} of them cut"
    right = worst <= limit  # False for NaN
    at = "" if right else f", worst in text {int(errors.argmax())}"
    detail = f"{texts}: off by {worst:.1e} of the length{at}; at most {limit:.0e} [{name}]"
    return [*out, Check("their vectors", "pass" if right else "FAIL", detail)]


def compare_ids(ours: Answers, name: str, theirs: list[list[int]]) -> Check:
    """Their ids, or ours but for special tokens that a recipe or tokenizer_config.json asks for and their tokenizer leaves out."""
    added: set[int] = set()
    for index, (own, other) in enumerate(zip(ours.ids, theirs, strict=True)):
        extra = surplus(own, other, ours.specials, cut=index in ours.cut)
        if extra is None:
            where = next((n for n, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))
            return Check("their ids", "FAIL", f"text {index}: {len(own)} ids, theirs {len(other)}; they part at {where} [{name}]")
        added.update(extra)
    note = f", but for {sorted(added)}, which it does not add" if added else ""
    return Check("their ids", "pass", f"{len(theirs)} texts: the same{note} [{name}]")


def surplus(ours: list[int], theirs: list[int], specials: Sequence[int], *, cut: bool) -> list[int] | None:
    """The specials that only we have around a text; None where the ids differ otherwise. A cut text has fewer of its own for them."""
    for start in range(len(specials) + 1):
        for end in range(len(specials) + 1 - start):
            inner = ours[start : len(ours) - end]
            extra = [*ours[:start], *ours[len(ours) - end :]]
            if (inner == theirs or (cut and inner == theirs[: len(inner)])) and all(id in specials for id in extra):
                return extra
    return None


Asked = tuple[str, list[list[int]] | None, Tensor]  # who was asked, their ids where a text is plain, their vectors


def sentence_transformer(ours: Answers) -> Asked:
    """The vectors of sentence-transformers, of its own ids, or of ours where only we add special tokens."""
    import sentence_transformers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = sentence_transformers.SentenceTransformer(
        str(ours.directory),
        device=str(ours.device),
        local_files_only=True,
        model_kwargs={"attn_implementation": "eager", "dtype": torch.float32},
    ).float()
    state_mask(model[0].model.config, ours.spec.recipe)
    if not ours.limit_of_files:
        model.max_seq_length = ours.limit
    found, vectors = [], []
    for text, own, span in zip(ours.texts, ours.ids, ours.spans, strict=True):
        features = dict(model.preprocess([text], prompt=ours.prompt or None))
        found.append(features["input_ids"][0].tolist())
        if not ours.plain or found[-1] != own:
            features = {"prompt_length": span[0]} if span[0] else {}
            features["input_ids"] = torch.tensor([own])
            features["attention_mask"] = torch.ones_like(features["input_ids"])
        features = {key: value.to(ours.device) if isinstance(value, Tensor) else value for key, value in features.items()}
        with torch.inference_mode():
            vectors.append(model(features)["sentence_embedding"][0].float().cpu())
    return f"sentence-transformers {sentence_transformers.__version__}", found if ours.plain else None, torch.stack(vectors)


def auto_model(ours: Answers) -> Asked:
    """transformers' last hidden states of our ids, pooled here."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    spec, at = ours.spec, ours.directory / ours.spec.transformer_path
    if any(kind == "Dense" for kind, _ in read_modules(ours.directory, custom=True)):
        raise ValueError("its modules.json and its recipe say different things")
    config = transformers.AutoConfig.from_pretrained(at)
    state_mask(config, spec.recipe)
    how: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, told = transformers.AutoModel.from_pretrained(at, config=config, **how)
    if lacking := sorted(told["missing_keys"]):  # drawn at random
        raise ValueError(f"its class finds no {lacking[0]} and {len(lacking) - 1} other tensors in the files")
    model.to(ours.device)
    if hasattr(model, "get_encoder") and getattr(config, "is_encoder_decoder", False):
        model = model.get_encoder()
    model.eval()
    found = None
    if ours.plain:
        tokenizer = transformers.AutoTokenizer.from_pretrained(at)
        whole = [ours.prompt + text for text in ours.texts]
        found = [tokenizer(text, truncation=True, max_length=ours.limit)["input_ids"] for text in whole]
    rows = []
    for ids, (first, end) in zip(ours.ids, ours.spans, strict=True):
        tokens = torch.tensor([ids], device=ours.device)
        with torch.inference_mode():
            made = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), output_hidden_states=bool(spec.recipe.drop_layers))
        states = made.hidden_states[-1 - spec.recipe.drop_layers] if spec.recipe.drop_layers else made.last_hidden_state
        if states.shape[-1] != spec.model.output_dim:
            raise ValueError(f"its states have {states.shape[-1]} numbers, and what makes {spec.model.output_dim} of them is no part of it")
        parts = [pooled(states[0].float().cpu(), first, end, mode) for mode in spec.pooling.modes]
        vector = torch.cat(parts)
        vector = torch.round(127 * torch.tanh(vector)) if spec.output == "tanh_int8" else vector
        rows.append(F.normalize(vector, dim=0) if spec.normalize else vector)
    vectors = torch.stack([torch.stack(rows[n : n + ours.templates]).mean(0) for n in range(0, len(rows), ours.templates)])
    return f"transformers {transformers.__version__}, {type(model).__name__}", found, vectors


def state_mask(config: Any, recipe: Recipe) -> None:
    """Write a recipe's mask into a configuration, from which transformers 5 makes the masks of every decoder."""
    if recipe.causal is not None:
        config.is_causal = recipe.causal
        if recipe.causal and hasattr(config, "use_bidirectional_attention"):
            config.use_bidirectional_attention = False
    if recipe.full_attention and getattr(config, "sliding_window", None) is not None:
        config.sliding_window = None
        if getattr(config, "layer_types", None):
            config.layer_types = ["full_attention"] * len(config.layer_types)


def pooled(states: Tensor, first: int, end: int, mode: PoolMode) -> Tensor:
    """One mode's vector [D] of the tokens first .. end - 1 of states [length, D]."""
    read = states[first:end]
    if len(read) == 0:
        return torch.zeros(states.shape[1])
    if mode == "cls":
        return read[0]
    if mode == "lasttoken":
        return read[-1]
    if mode == "max":
        return read.max(dim=0).values
    if mode == "weightedmean":
        weights = torch.arange(first + 1, end + 1, dtype=torch.float32)[:, None]
        return (read * weights).sum(0) / weights.sum()
    return read.sum(0) / (len(read) if mode == "mean" else len(read) ** 0.5)
