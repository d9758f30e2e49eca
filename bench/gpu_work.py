"""The texts of bench/gpu.py: seeded lengths as users send them, cut from a corpus, as texts and as token ids."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

import pyembed

LARGEST = 8192  # tokens of a text
BLOCK = 100  # texts of the corpus that are tokenised together
REQUEST = 256  # texts of a request, where texts come in an order that is not ours to change
INSTRUCTION = 22  # tokens of the instruction of W1i
# texts, of which a run may take the first
COUNTS = {"S128": 20_000, "W1": 20_000, "W1i": 20_000, "W2": 20_000, "W3": 4_000, "W4": 1_000, "W5": 20_000}
WORKLOADS = {
    "S128": "texts of 128 tokens",
    "W1": "queries, lognormal, mean 10 tokens",
    "W1i": f"W1 behind an instruction of {INSTRUCTION} tokens, which ours is given as the prompt that it is",
    "W2": "passages, lognormal, mean 80 tokens, at most 256",
    "W3": "chunks of 512 tokens",
    "W4": "documents, lognormal around 1,500 tokens, at most 8,192",
    "W5": f"80% W1, 15% W2, 5% W4 in the order of arrival, {REQUEST} texts a request",
}


@dataclass(frozen=True)
class Work:
    name: str
    texts: list[str]
    ids: list[np.ndarray]
    request: int | None  # texts a call; None: all in one
    prompt: str = ""  # that all texts begin with

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


def lognormal(dice: np.random.Generator, count: int, median: float, sigma: float, low: int, high: int) -> np.ndarray:
    return dice.lognormal(math.log(median), sigma, count).round().clip(low, high).astype(int)


def lengths(name: str, tokens: int, largest: int = LARGEST) -> list[int]:
    """Of the texts of a workload, special tokens included: as many of its first ones as make up `tokens`, but two at least."""
    count, dice = COUNTS[name], np.random.default_rng(0)
    queries = lognormal(dice, count, 9.2, 0.408, 3, 64)  # mean 10, of which 95% are below 18
    passages = lognormal(dice, count, 72.6, 0.44, 8, 256)  # mean 80, 95% below 150
    documents = lognormal(dice, count, 1500, 0.8, 64, LARGEST)
    which = dice.random(count)
    drawn = {
        "S128": np.full(count, 128),
        "W1": queries,
        "W1i": queries,
        "W2": passages,
        "W3": np.full(count, 512),
        "W4": documents,
        "W5": np.where(which < 0.8, queries, np.where(which < 0.95, passages, documents)),
    }[name].clip(1, largest)
    return drawn[: max(2, int((drawn.cumsum() <= tokens).sum()))].tolist()


class Source:
    """Texts of about so many tokens, no two alike, cut from the corpus at the borders of its tokens."""

    def __init__(self, encoder: pyembed.Encoder, corpus: Sequence[str]) -> None:
        self.encoder, self.pieces, self.seen, self.at, self.turns = encoder, [], set[str](), 0, 0
        self.specials = len(encoder.tokenizer.prefix) + len(encoder.tokenizer.suffix)
        for start in range(0, len(corpus), BLOCK):
            text = "\n\n".join(corpus[start : start + BLOCK]) + "\n\n"
            ends = encoder.tokenizer.ends(text)
            self.pieces += [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def cuts(self, tokens: int) -> Iterator[str]:
        """Text after text. A turn through the corpus begins one token further than the last, so that it is cut elsewhere."""
        while True:
            if self.at + tokens > len(self.pieces):
                self.turns += 1
                self.at = self.turns
            if self.at + tokens > len(self.pieces):
                raise ValueError(f"The corpus has {len(self.pieces)} tokens; no further text of {tokens} can be cut from it.")
            text = "".join(self.pieces[self.at : self.at + tokens]).strip()
            self.at += tokens
            if text and text not in self.seen:
                self.seen.add(text)
                yield text

    def texts(self, wanted: Sequence[int]) -> list[str]:
        """Specials are counted in. A text may come out a token longer or shorter than wanted: its ends are cut inside words."""
        return [next(self.cuts(max(1, each - self.specials))) for each in wanted]

    def exactly(self, tokens: int, count: int) -> list[str]:
        """Texts of just so many tokens. ValueError where one turn through the corpus does not give as many."""
        own, found, turns = tokens - self.specials, list[str](), self.turns + 2
        for text in self.cuts(own + 2):
            ends = self.encoder.tokenizer.ends(text)
            if len(ends) >= own and len(self.encoder.tokenizer.ends(text[: ends[own - 1]])) == own:
                found.append(text[: ends[own - 1]])
            if len(found) == count:
                break
            if self.turns == turns:
                raise ValueError(f"The corpus gives {len(found)} texts of {tokens} tokens; {count} were asked for.")
        return found

    def work(self, name: str, tokens: int, largest: int) -> Work:
        texts = self.texts(lengths(name, tokens, largest))
        prompt = self.exactly(INSTRUCTION, 1)[0] + " " if name == "W1i" else ""
        texts = [prompt + each for each in texts]
        return Work(name, texts, self.encoder.token_ids(texts), REQUEST if name == "W5" else None, prompt)
