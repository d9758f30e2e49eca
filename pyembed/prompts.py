"""Station 2 around the tokenizer: texts to token ids by the model's templates, and which of those tokens pooling reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyembed.config import PLAIN, ModelSpec, Template
from pyembed.tokenizer import Tokenizer, Tokens

Example = Mapping[str, str] | tuple[str, str]  # text and response, and the instruction where it is another than the call's
SLOTS = re.compile(r"(\{prompt\}|\{examples\}|\{text\})")
SEPARATOR = "!@#$%^&*()"  # LLM2Vec splits by this string where the text begins, so it takes it out of texts as well


@dataclass(frozen=True, slots=True)
class Form:
    """What one call puts around its texts."""

    templates: tuple[Template, ...]  # several: the text's vector is the mean of theirs
    prompt: str
    examples: str
    include_prompt: bool
    max_length: int | None
    asked: bool = False  # by the call itself, not by the model's default

    @property
    def narrow(self) -> bool:
        """Whether pooling may read less than a text's tokens."""
        return not self.include_prompt or any(each.read or each.last or each.after for each in self.templates)


@dataclass(slots=True)
class Prepared:
    """Rows for the model: each text's templates in order, text after text."""

    ids: list[np.ndarray]  # [length] int32 per row
    spans: list[tuple[int, int]]  # first and last + 1 token that pooling reads, per row
    truncated: list[int]  # indices of the texts that were cut
    replaced: list[int]  # indices of the texts whose lone surrogates became U+FFFD


def form_of(
    spec: ModelSpec,
    prompts: Mapping[str, str],
    default: str | None,
    *,
    prompt: str | None,
    prompt_name: str | None,
    examples: Sequence[Example],
    max_length: int | None,
) -> Form:
    """What a call asks for. The name chooses the template, and the prompt where `prompt` is not the text itself.

    Raises ValueError for an unknown name, and for a prompt and examples that the template has no place for.
    """
    text = resolve(prompts, default, prompt, prompt_name)
    name = prompt_name if prompt_name is not None else default
    of_recipe = spec.recipe.templates
    templates = of_recipe.get(name or "") or of_recipe.get("") or (PLAIN,)
    if text and not any("{prompt}" in part for each in templates for part in each.parts):
        written = "".join(templates[0].parts)
        raise ValueError(f"The prompt {text!r} has no place in this model's template, {written!r}; give prompt='' to leave it out.")
    shown = fill_examples(templates[0], examples, spec.recipe.instruction)
    asked = bool(examples) or prompt_name in of_recipe or (bool(text) and (prompt is not None or prompt_name is not None))
    return Form(templates, text, shown, spec.pooling.include_prompt, max_length, asked)


def resolve(prompts: Mapping[str, str], default: str | None, prompt: str | None, prompt_name: str | None) -> str:
    """The text that is put before each input: `prompt`, else the prompt of that name, else the default one, else nothing."""
    if prompt is not None:
        return prompt
    name = prompt_name if prompt_name is not None else default
    if name is None:
        return ""
    if not isinstance(name, str):
        raise TypeError(f"prompt_name is {name!r}; expected the name of a prompt, or None.")
    if name not in prompts:
        raise ValueError(f"There is no prompt named {name!r}; this model has {', '.join(sorted(prompts))}. A text goes in `prompt`.")
    return prompts[name]


def instructed(spec: ModelSpec, prompts: Mapping[str, str], name: str, instruction: str) -> str:
    """The prompt `name` with an instruction in its place; an empty one gives the prompt of documents, which have none."""
    form = prompts.get(name, "") if "{instruction}" in prompts.get(name, "") else spec.forms.get(name)
    if form is None:
        shown = prompts.get(name, "")
        raise ValueError(
            f"This model's {name!r} prompt, {shown!r}, has no place for an instruction; give prompt= instead, or load it with recipe=."
        )
    return form.replace("{instruction}", instruction) if instruction else prompts.get("document", "")


def named(
    spec: ModelSpec, prompts: Mapping[str, str], names: Sequence[str], instruction: str | None, arguments: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of `encode` with the first of the names that there is a prompt for; `prompt` replaces that prompt's text alone."""
    name = next((name for name in names if name in prompts), None)
    if instruction is not None:
        if arguments.get("prompt") is not None or arguments.get("prompt_name") is not None:
            raise ValueError("instruction goes into the model's own prompt, so it cannot be given together with prompt or prompt_name.")
        if not isinstance(instruction, str):
            raise TypeError(f"instruction is {instruction!r}; expected a str or None.")
        arguments = arguments | {"prompt": instructed(spec, prompts, name or names[0], instruction)}
        if arguments.get("examples"):
            arguments["examples"] = tasked(arguments["examples"], instruction)
    return arguments if arguments.get("prompt_name") is not None else arguments | {"prompt_name": name}


def tasked(examples: Sequence[Example], instruction: str) -> list[Example]:
    """Examples with this instruction where they have none of their own."""
    return [{"instruction": instruction, **example_of(index, example)} for index, example in enumerate(examples)]


def example_of(index: int, example: Example) -> dict[str, str]:
    """An example under our names; FlagEmbedding's `query` and `instruct` are read as well."""
    pair = isinstance(example, tuple | list) and len(example) == 2
    given = dict(zip(("text", "response"), example, strict=True)) if pair else dict(example) if isinstance(example, Mapping) else {}
    found = {{"query": "text", "instruct": "instruction"}.get(name, name): value for name, value in given.items()}
    if not {"text", "response"} <= set(found) <= {"text", "response", "instruction"} or not all(isinstance(x, str) for x in found.values()):
        raise ValueError(f"Example {index} is {example!r}; expected (text, response), or a dict with text, response and instruction.")
    return found


def fill_examples(template: Template, examples: Sequence[Example], instruction: str) -> str:
    """In-context examples as the template writes them, one after the other. ValueError where it takes none."""
    if isinstance(examples, str | Mapping) or not isinstance(examples, Sequence):
        raise TypeError(f"examples is {examples!r}; expected a list of (text, response), or of dicts with text, response and instruction.")
    if examples and not template.example:
        raise ValueError("examples were given, but this model's template has no place for them.")
    out = []
    for index, example in enumerate(examples):
        slots = {"{instruction}": instruction} | {f"{{{name}}}": value for name, value in example_of(index, example).items()}
        out.append("".join(slots.get(piece, piece) for piece in re.split(r"(\{\w+\})", template.example)))
    return "".join(out)


def prepare(tokenizer: Tokenizer, form: Form, texts: Sequence[str]) -> Prepared:
    """Token ids and spans of texts, for each of the form's templates."""
    each = [_one(tokenizer, template, form, texts) for template in form.templates]
    if len(each) == 1:
        return each[0]
    rows = [(done.ids[n], done.spans[n]) for n in range(len(texts)) for done in each]
    truncated, replaced = ({index for done in each for index in getattr(done, name)} for name in ("truncated", "replaced"))
    return Prepared([ids for ids, _ in rows], [span for _, span in rows], sorted(truncated), sorted(replaced))


def beginnings(tokenizer: Tokenizer, form: Form) -> list[np.ndarray]:
    """For each template the ids that its texts may begin with: those of the template around no text at all."""
    if not form.prompt and not form.examples and form.templates == (PLAIN,):
        return [np.empty(0, dtype=np.int32)]
    return prepare(tokenizer, form, [""]).ids


def _one(tokenizer: Tokenizer, template: Template, form: Form, texts: Sequence[str]) -> Prepared:
    prompt, dropped, own_strings = form.prompt, set[int](), template.parts != PLAIN.parts
    if template.words is not None:  # counted before anything is trimmed
        texts, dropped = _fewer_words(tokenizer, texts, template.words, form.max_length)
    if template.clean == "sentence":
        texts = [sentence(text) for text in texts]
    elif template.clean in ("trim", "question"):
        texts = [text.strip() for text in texts]
    elif template.clean == "llm2vec" and own_strings:
        texts = [text.rstrip() for text in texts]
    if template.clean == "question":
        prompt = f" {prompt.strip()}" if prompt.strip() else ""
        texts = [text + "?" if prompt and not text.endswith((".", "?", "!")) else text for text in texts]
    if template.clean == "llm2vec" and prompt:
        prompt = prompt.strip() + " "
        prompt = prompt.lstrip() if own_strings else prompt
    fill = {"{prompt}": prompt, "{examples}": form.examples}
    made = (_joined if len(template.parts) == 1 else _pieces)(tokenizer, template, form, list(texts), fill)
    made.truncated = sorted(dropped.union(made.truncated))
    return made


def sentence(text: str) -> str:
    """PromptEOL's preparation (kongds/scaling_sentemb): a full stop at the end, single quotes inside, a final question mark becomes one."""
    if text and text[-1] not in ".?\"'":
        text += "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text


def _fewer_words(tokenizer: Tokenizer, texts: Sequence[str], limit: int, most: int | None) -> tuple[list[str], set[int]]:
    """Texts shortened to at most `limit` tokens by dropping words at their end, in the reference's steps (LLM2Vec, _convert_to_str),
    which never counts beyond `most`.
    """
    kept, dropped = list(texts), set()
    for index, ids in enumerate(tokenizer.encode(texts, most, special=False).ids):
        length = len(ids)
        while length > limit:
            words = kept[index].split()
            kept[index] = " ".join(words[: int(len(words) * limit / length)])
            dropped.add(index)
            length = len(tokenizer.encode([kept[index]], most, special=False).ids[0])
    return kept, dropped


def _sides(part: str, fill: Mapping[str, str]) -> list[str]:
    """What stands before and after the text in a part (or all of a part without one), its slots filled."""
    return ["".join(fill.get(piece, piece) for piece in SLOTS.split(side)) for side in part.split("{text}")]


def _around(before: str, after: str) -> Callable[[str], str]:
    return lambda text: before + text + after


def _joined(tokenizer: Tokenizer, template: Template, form: Form, texts: list[str], fill: Mapping[str, str]) -> Prepared:
    """One part: the strings are put together first, then tokenised as one."""
    before, after = _sides(template.parts[0], fill)
    limit, again = form.max_length, Tokens([], [], [])
    if template.cut == "decoded":
        texts, before, again, limit = _decoded(tokenizer, [fill["{prompt}"] + text for text in texts], fill["{examples}"], after, limit)

    def join(text: str) -> str:
        whole = before + (text.replace(SEPARATOR, "") if template.unread == "before_text" else text) + after
        return whole.strip() if template.clean in ("trim", "question") else whole

    tokens = _fitted(tokenizer, template, texts, join, limit, special=template.special)
    spans = _spans(tokenizer, template, form, tokens, before, texts, after)
    truncated, replaced = {*tokens.truncated, *again.truncated}, {*tokens.replaced, *again.replaced}
    return Prepared(tokens.ids, spans, sorted(truncated), sorted(replaced))


def _fitted(
    tokenizer: Tokenizer, template: Template, texts: list[str], join: Callable[[str], str], limit: int | None, *, special: bool
) -> Tokens:
    """Ids of the joined texts, at most `limit` each. Where all but the text must stay, `texts` are shortened in place."""
    own = template.cut == "text"
    tokens = tokenizer.encode([join(text) for text in texts], None if own else limit, special=special)
    if own and limit is not None:
        for index in (index for index, ids in enumerate(tokens.ids) if len(ids) > limit):
            texts[index], tokens.ids[index] = _shortened(tokenizer, template, texts[index], join, limit, special=special)
            tokens.truncated.append(index)
    return tokens


def _shortened(
    tokenizer: Tokenizer, template: Template, text: str, join: Callable[[str], str], limit: int, *, special: bool
) -> tuple[str, np.ndarray]:
    """A text without its last tokens, so that with all that surrounds it it has at most `limit` ids; and those ids."""
    ends = tokenizer.ends(text)
    kept, ids = len(ends), tokenizer.encode([join(text)], None, special=special).ids[0]
    while len(ids) > limit:
        kept = min(kept - 1, max(kept - (len(ids) - limit), 1))  # a token alone may be several in its place
        if kept < 1:
            least = len(tokenizer.encode([join("")], None, special=special).ids[0])
            raise ValueError(
                f"max_seq_length is {limit}; the template alone takes {least} tokens, and {text[:20]!r} does not fit beside it."
            )
        shorter = text[: ends[kept - 1]]
        shorter = sentence(shorter) if template.clean == "sentence" else shorter  # the references cut before they punctuate
        ids = tokenizer.encode([join(shorter)], None, special=special).ids[0]
    return shorter, ids


def _decoded(
    tokenizer: Tokenizer, queries: list[str], examples: str, after: str, limit: int | None
) -> tuple[list[str], str, Tokens, int | None]:
    """BGE-ICL's round trip (FlagEmbedding, icl.py): every query is cut, turned back into a string and put after the examples.

    Returns the strings, what stands before them, the tokens that they came from, and the limit of the whole.
    """

    def count(text: str) -> int:
        return len(tokenizer.encode([text], None, special=False).ids[0])

    first, last = ("".join(tokenizer.backend.id_to_token(id) or "" for id in ids) for ids in (tokenizer.prefix, tokenizer.suffix))
    around = count(first) + count(after + last)
    if limit is not None and limit <= around:
        raise ValueError(f"max_seq_length is {limit}; this model's template needs at least {around + 1}.")
    tokens = tokenizer.encode(queries, None if limit is None else limit - around, special=False)
    strings = [tokenizer.backend.decode(ids.tolist(), skip_special_tokens=False) for ids in tokens.ids]
    whole = None if limit is None else (count(examples) + count(after) + limit + 8) // 8 * 8 + 8
    return strings, examples, tokens, whole


def _spans(
    tokenizer: Tokenizer, template: Template, form: Form, tokens: Tokens, before: str, texts: Sequence[str], after: str
) -> list[tuple[int, int]]:
    """The tokens that pooling reads of each joined text."""
    lengths = [len(ids) for ids in tokens.ids]
    if template.last:
        return [(max(0, length - template.last), length) for length in lengths]
    if template.after:
        skips = [_after(tokenizer, template, before + text + after) for text in texts]
        return [(min(skip, length), length) for skip, length in zip(skips, lengths, strict=True)]
    if form.include_prompt or not (before or template.unread == "before_text"):
        return [(0, length) for length in lengths]
    if template.unread == "before_text":
        tails = tokenizer.encode([(text + after).split(SEPARATOR)[0] for text in texts], form.max_length, special=False).ids
        return [(max(0, length - len(tail)) if len(tail) else 0, length) for tail, length in zip(tails, lengths, strict=True)]
    skip = prompt_tokens(tokenizer, before, form.max_length, special=template.unread == "prompt")
    return [(min(skip, length), length) for length in lengths]


def _after(tokenizer: Tokenizer, template: Template, whole: str) -> int:
    """How many tokens a text has up to the end of `template.after`, tokenised alone; the template's ending is searched from the start."""
    ending = template.after + template.parts[0].rpartition(template.after)[2]
    head = whole[: whole.index(ending) + len(template.after)]
    return len(tokenizer.encode([head], None, special=template.special).ids[0]) - (len(tokenizer.suffix) if template.special else 0)


def prompt_tokens(tokenizer: Tokenizer, prompt: str, max_length: int | None, *, special: bool = True) -> int:
    """How many tokens a prompt has, alone: with specials before it but without one at its end (sentence-transformers, GritLM), or bare."""
    if not prompt:
        return 0
    ids = tokenizer.encode([prompt], max_length, special=special).ids[0].tolist()
    ends = {index for index, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special} if special else set()
    return len(ids) - (len(ids) > 0 and ids[-1] in ends)


def _pieces(tokenizer: Tokenizer, template: Template, form: Form, texts: list[str], fill: Mapping[str, str]) -> Prepared:
    """Several parts: each is tokenised alone, and their ids stand end to end."""
    limit, parts = form.max_length, template.parts
    around = (tokenizer.prefix, tokenizer.suffix) if template.special else ([], [])
    own = [n for n, part in enumerate(parts) if "{text}" in part]
    fixed: dict[int, list[int]] = {}
    for n in set(range(len(parts))).difference(own):
        short = limit if template.cut == "piece" and SLOTS.search(parts[n]) else None
        filled = _sides(parts[n], fill)[0]
        fixed[n] = tokenizer.encode([filled], short, special=False).ids[0].tolist() if filled else []
    inside = None if limit is None else limit - len(around[0]) - len(around[1])
    room = limit if template.cut == "piece" else None
    if template.cut == "text" and limit is not None and inside is not None:
        room = (inside - sum(map(len, fixed.values()))) // len(own)
        if room < 1:
            raise ValueError(f"max_seq_length is {limit}; this model's template needs at least {limit + len(own) * (1 - room)}.")
    made: dict[int, Tokens] = {}
    for n in own:
        if parts[n] == "{text}":  # cut by ids
            made[n] = tokenizer.encode(texts, room, special=False)
        else:
            made[n] = _fitted(tokenizer, template, list(texts), _around(*_sides(parts[n], fill)), room, special=False)
    ids, spans = [], []
    truncated = {index for tokens in made.values() for index in tokens.truncated}
    for index in range(len(texts)):
        pieces = [made[n].ids[index].tolist() if n in made else fixed[n] for n in range(len(parts))]
        whole = [id for piece in pieces for id in piece]
        if template.cut == "end" and inside is not None and len(whole) > inside:
            whole = whole[:inside]
            truncated.add(index)
        ids.append(np.array([*around[0], *whole, *around[1]], dtype=np.int32))
        length, ends = len(ids[-1]), np.cumsum([len(around[0]), *map(len, pieces)]).clip(max=len(around[0]) + len(whole)).tolist()
        first, end = (ends[template.read[0]], ends[template.read[-1] + 1]) if template.read else (0, length)
        spans.append((max(0, length - template.last), length) if template.last else (first, end))
    replaced = {index for tokens in made.values() for index in tokens.replaced}
    return Prepared(ids, spans, sorted(truncated), sorted(replaced))
