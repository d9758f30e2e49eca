"""What would be run for some texts, without running it: `print(encoder.plan(texts))`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyembed.engine import windows
from pyembed.job import Engine, Input, Job
from pyembed.window import cost, given, prepare

SHOWN = 40  # batches that are printed


@dataclass(frozen=True, slots=True)
class Batch:
    window: int  # number of the window its texts are sorted in
    texts: int  # rows, where a text has several
    tokens: int  # that are run
    longest: int  # tokens of the longest text, what it shares included
    cost: float  # in tokens: those that are run, and their attention


@dataclass(frozen=True, slots=True)
class Plan:
    batches: tuple[Batch, ...]
    budget: int
    texts: int
    tokens: int  # of all texts that are tokenised
    duplicates: int  # texts, or rows of a window, that repeat an earlier one
    shared: int  # tokens whose states a prompt or another text of the batch gives

    def __str__(self) -> str:
        run = sum(each.tokens for each in self.batches)
        saved = f"{self.shared:,} given by prompts or other texts, {self.tokens - run - self.shared:,} in {self.duplicates:,} duplicates"
        lines = [
            f"{self.texts:,} texts, {self.tokens:,} tokens: {run:,} are run ({saved})",
            f"{len(self.batches):,} batches, each of at most {self.budget:,} tokens unless a text alone has more",
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
    batches, texts, tokens, duplicates, shared = [], 0, 0, 0, 0
    for number, (chunk, more) in enumerate(windows(inputs, job.budget.windows, once=isinstance(inputs, Sequence))):
        texts, duplicates = texts + len(chunk.inputs) + len(chunk.repeats), duplicates + len(chunk.repeats)
        if not chunk.inputs:
            break
        work = prepare(engine, job, chunk.inputs, chunk.numbers, only=number == 0 and not more)
        lengths = [len(ids) for ids in work.rows.ids]
        for rows in work.batches:
            less = given(work, rows)
            costs = [cost(lengths[row], saved, job.budget.balance) for row, saved in zip(rows, less, strict=True)]
            run = sum(lengths[row] for row in rows) - sum(less)
            batches.append(Batch(number, len(rows), run, max(lengths[row] for row in rows), sum(costs)))
            shared += sum(less)
        tokens, duplicates = tokens + sum(lengths), duplicates + len(work.twins)
    return Plan(tuple(batches), job.budget.tokens, texts, tokens, duplicates, shared)
