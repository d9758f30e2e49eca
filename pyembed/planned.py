"""What would be run for some texts, without running it: `print(encoder.plan(texts))`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyembed.batch import COST_PER_TOKEN
from pyembed.engine import windows
from pyembed.job import Engine, Input, Job
from pyembed.window import given, prepare

SHOWN = 40  # batches that are printed


@dataclass(frozen=True, slots=True)
class Batch:
    window: int  # number of the window its texts are sorted in
    texts: int  # rows, where a text has several
    tokens: int  # that are run
    longest: int  # tokens of the longest text, what it shares included
    cost: float  # in tokens: those that are run, and their attention


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    batches: tuple[Batch, ...]
    budget: int
    texts: int
    tokens: int  # of all texts that are tokenised
    duplicates: int  # texts, or rows of a window, that repeat an earlier one
    shared: int  # tokens whose states a prompt or another text of the batch gives

    def __repr__(self) -> str:
        run = sum(each.tokens for each in self.batches)
        saved = {"given by prompts or other texts": self.shared, "in rows that repeat others": self.tokens - run - self.shared}
        told = "".join(f", {count:,} {what}" for what, count in saved.items() if count)
        repeats = f" ({self.duplicates:,} repeat an earlier one)" if self.duplicates else ""
        lines = [
            f"Texts: {self.texts:,}{repeats}. Tokens: {self.tokens:,}, of which {run:,} are run{told}.",
            f"Batches: {len(self.batches):,}, of at most {self.budget:,} tokens, cost {COST_PER_TOKEN * self.budget:,}, or one text.",
            f"{'batch':>7} {'window':>7} {'texts':>7} {'tokens':>9} {'of budget':>10} {'cost':>9} {'longest':>8}",
        ]
        for n, each in enumerate(self.batches[:SHOWN]):
            share = f"{each.tokens / self.budget:.0%}"
            lines.append(f"{n:7,} {each.window:7,} {each.texts:7,} {each.tokens:9,} {share:>10} {each.cost:9,.0f} {each.longest:8,}")
        if len(self.batches) > SHOWN:
            lines.append(f"    ... {len(self.batches) - SHOWN:,} more")
        return "\n".join(lines)


def plan(engine: Engine, job: Job, inputs: Iterable[Input]) -> Plan:
    """Tokenise all inputs and plan them as `engine.run` would."""
    batches, number, texts, tokens, duplicates, shared = [], 0, 0, 0, 0, 0
    for chunk, more in windows(inputs, job.budget.windows, growing=engine.share is None, once=isinstance(inputs, Sequence)):
        texts, duplicates = texts + len(chunk.inputs) + len(chunk.repeats), duplicates + len(chunk.repeats)
        if not chunk.inputs:
            continue
        work = prepare(engine, job, chunk.inputs, chunk.numbers, only=number == 0 and not more)
        lengths = [len(ids) for ids in work.rows.ids]
        for rows in work.batches:
            less = given(work, rows)
            own = [lengths[row] - saved for row, saved in zip(rows, less, strict=True)]
            dear = sum(count * job.budget.factor(lengths[row]) for row, count in zip(rows, own, strict=True))
            batches.append(Batch(number, len(rows), sum(own), max(lengths[row] for row in rows), dear))
            shared += sum(less)
        tokens, duplicates, number = tokens + sum(lengths), duplicates + len(work.twins), number + 1
    return Plan(tuple(batches), engine.most(job), texts, tokens, duplicates, shared)
