"""CUDA graphs of whole forward passes, for batches so small that launching their kernels takes longer than running them.

A graph is the launches of one forward pass, recorded once and replayed on other numbers in the same places. It has a form: rows, texts and
tiles of attention, rounded up, and the kept prompt that its texts share. What fills a form up belongs to nobody: spare rows, texts without
tokens, empty tiles. Whatever depends on a batch lies in one buffer on the device, which one copy fills before each replay.

The first batch of a form is launched kernel by kernel, which also tells the lists of tiles that attention asks for; with the second the
graph is recorded. So the first query waits for nothing, and a form that is met once is never recorded. Graphs share one pool of memory per
stream: a replay's result is on its way out before the next one begins. At most MOST of them are kept. A form takes the place of another
one only if it is met more than RATIO times as often, since a recording costs what many replays save: traffic of more forms than there are
places would else record and give away all the time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pyembed import heads
from pyembed.batch import ROW_MULTIPLE, KeptLayout, Layout, PackedBatch, kept_of, reads_all
from pyembed.config import ModelSpec
from pyembed.kernels.tiles import Outline, Schedule, outline
from pyembed.model import Weights, forward
from pyembed.ops import Ops, Prefix
from pyembed.prefix import PrefixCache, Prefixes, Run
from pyembed.transfer import Sheet, out_of_memory, pinned

MOST = 64  # graphs of one stream
RATIO = 2
AGE = 1024  # batches after which those before count half, and for which no graph is recorded after memory has run out
Lists = tuple[tuple[str, int], ...]  # forms of tiles and queries of a tile, as attention asks for them


@dataclass(frozen=True, slots=True)
class Given:
    """A batch before it is on the device."""

    layout: Layout
    kept: KeptLayout | None
    schedule: object  # what ops.schedule made of the texts' lengths
    kept_schedule: object  # and of the kept rows'
    runs: Sequence[tuple[Run, int] | None]  # [N] kept prompts that the texts begin with, and how many of their tokens


@dataclass(frozen=True, slots=True)
class Form:
    """What a graph is recorded for."""

    rows: int
    texts: int
    tiles: Outline
    kept_rows: int  # 0: the last layer computes all
    kept_tiles: Outline | None
    run: int  # identity of the kept prompt, which the graph keeps alive; 0: none
    count: int


def bucket(rows: int) -> int:
    """A number of rows rounded up to a multiple of ROW_MULTIPLE, and beyond 128 rows to one of four sizes an octave."""
    step = max(ROW_MULTIPLE, 1 << max(rows - 1, 1).bit_length() >> 3)
    return max(1, -(-rows // step)) * step


def power(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def form_of(given: Given, spec: ModelSpec, limit: int) -> Form | None:
    """The form of a batch; None where it is launched kernel by kernel: too many tokens, or something that differs in more than a form."""
    layout, kept, config = given.layout, given.kept, spec.model
    rows = bucket(int(layout.starts[-1]))
    runs = {(id(each[0]), each[1]) for each in given.runs if each is not None}
    if rows > limit or layout.overlap is not None or len(runs) > 1 or not layout.lengths:
        return None
    run, count = next(iter(runs), (0, 0))
    if any(each.kind in ("dynamic", "longrope") and rows + count > each.original_max_position for each in config.ropes):
        return None  # each text's own length would decide its tables
    if kept is None and config.latent is not None and not reads_all(layout.lengths, list(map(tuple, layout.read.tolist()))):
        return None  # the head would pick rows
    kept_rows, kept_tiles = (0, None) if kept is None else (bucket(int(kept.starts[-1])), outlined(given.kept_schedule))
    return Form(rows, power(len(layout.lengths)), outlined(given.schedule), kept_rows, kept_tiles, run, count)


def outlined(schedule: object) -> Outline:
    assert isinstance(schedule, Schedule)
    return outline(schedule)


def up_to(array: np.ndarray, count: int, fill: int | np.ndarray = 0) -> np.ndarray:
    """The first `count` rows of an array, or all and then `fill`."""
    if len(array) >= count:
        return array[:count]
    out = np.empty((count, *array.shape[1:]), dtype=array.dtype)
    out[: len(array)] = array
    out[len(array) :] = fill
    return out


def arrays(form: Form, given: Given, lists: Lists, kept_lists: Lists) -> dict[str, np.ndarray]:
    """All that depends on the batch, in the sizes of its form."""

    def texts(name: str, starts: np.ndarray, spans: np.ndarray) -> dict[str, np.ndarray]:
        return {f"{name}cu_seqlens": up_to(starts, form.texts + 1, starts[-1]), f"{name}spans": up_to(spans, form.texts)}

    def tiles(name: str, schedule: object, outline: Outline, rows: int, asked: Lists) -> dict[str, np.ndarray]:
        assert isinstance(schedule, Schedule)
        return {f"{name}{each}": up_to(schedule.listed(*each), outline.most(*each, rows), -1) for each in asked}

    layout, kept = given.layout, given.kept
    out = {"input_ids": up_to(layout.input_ids, form.rows), "positions": up_to(layout.positions, form.rows)}
    out |= texts("", layout.starts, layout.read) | tiles("tiles", given.schedule, form.tiles, form.rows, lists)
    if kept is not None:
        assert form.kept_tiles is not None
        out |= {"kept rows": up_to(kept.rows, form.kept_rows), "kept first": up_to(kept.first, form.texts)}
        out |= texts("kept ", kept.starts, kept.spans)
        out |= tiles("kept tiles", given.kept_schedule, form.kept_tiles, form.kept_rows, kept_lists)
    if form.run:
        out["prefix_of"] = up_to(np.array([-1 if each is None else 0 for each in given.runs], dtype=np.int32), form.texts, -1)
        out["cu_p"] = np.array([0, form.count], dtype=np.int32)
    return out


class Graph:
    """A forward pass of one form. `run` gives the vectors of a batch of that form: launched kernel by kernel until it is `recorded`."""

    def __init__(self, form: Form, given: Given, lists: tuple[Lists, Lists], of: Graphs) -> None:
        self.form, self.lists = form, lists
        self.prompt = next((each[0] for each in given.runs if each is not None), None)
        self.sheet = Sheet.of({name: (array.shape, array.dtype) for name, array in arrays(form, given, *lists).items()})
        self.buffer = torch.empty(self.sheet.size, dtype=torch.uint8, device=of.device)
        self.launch = self.prepared(of, self.sheet.views(self.buffer))

    def run(self, given: Given) -> Tensor:
        """[N, dim] float32, which the next replay of any graph may overwrite."""
        host = pinned(self.sheet.size, torch.uint8)
        self.sheet.fill(host, arrays(self.form, given, *self.lists))
        self.buffer.copy_(host, non_blocking=True)
        return self.launch()[: len(given.layout.lengths)]

    def prepared(self, of: Graphs, views: dict[str, Tensor]) -> Callable[[], Tensor]:
        """The forward pass on the buffer: which kernels it launches, and on what memory, does not depend on what the buffer holds."""
        form = self.form

        def blank(name: str, outline: Outline, lists: Lists) -> Schedule:
            return outline.blank(form.texts, {(*each, of.device): views[f"{name}{each}"] for each in lists})

        batch = PackedBatch(
            **{name: views[name] for name in ("input_ids", "positions", "cu_seqlens", "spans")},
            lengths=[form.rows],  # as the host sees it, the form is one text: the longest that there may be
            before=[form.count],
            read=[(0, form.rows)],
            paths=None,
            schedule=blank("tiles", form.tiles, self.lists[0]),
        )
        kept_part = {name.removeprefix("kept "): each for name, each in views.items() if name.startswith("kept ")}
        kept_tiles = None if form.kept_tiles is None else blank("kept tiles", form.kept_tiles, self.lists[1])
        prefixes = None
        if self.prompt is not None:
            layers = [Prefix(k[: form.count], v[: form.count], views["cu_p"], views["prefix_of"]) for k, v in self.prompt.keys]
            prefixes = Prefixes(layers, self.prompt.hidden[: form.count], [])

        def launch() -> Tensor:
            kept = None
            if kept_tiles is not None:
                kept = kept_of(batch, kept_part, [form.kept_rows], [(0, form.kept_rows)], kept_tiles)
            hidden = forward(of.weights, batch, of.ops, kept, prefixes=prefixes)
            return heads.pool(hidden, of.spec, of.weights, batch if kept is None else kept.batch, of.ops)

        return launch

    def recorded(self, of: Graphs) -> None:
        self.launch = of.record(self.launch)


def record_on(device: torch.device) -> Callable[[Callable[[], Tensor]], Callable[[], Tensor]]:
    """What records launches on the current stream of a CUDA device into a graph, and returns what replays it; all on one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def record(launch: Callable[[], Tensor]) -> Callable[[], Tensor]:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # what memory there is must not be looked for while recording: freeing some would void it
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may allocate meanwhile
            vectors = launch()
            graph.capture_end()
        except BaseException:
            with suppress(RuntimeError):  # the recording is void; what went wrong in it is told
                graph.capture_end()
            with suppress(RuntimeError):  # where that fails too, torch takes the recording for one under way, and frees no memory any more
                torch._C._cuda_endAllocateToPool(device.index, pool)
            raise

        def replay() -> Tensor:
            graph.replay()
            return vectors

        return replay

    return record


@dataclass(slots=True)
class Met:
    """What is known of a form."""

    lists: tuple[Lists, Lists]  # of tiles, that were asked for
    times: int  # batches of it, older ones counted less


@dataclass(slots=True)
class Graphs:
    """The graphs of one model on one stream."""

    spec: ModelSpec
    weights: Weights
    ops: Ops
    device: torch.device
    limit: int  # tokens of a batch
    record: Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
    prompts: PrefixCache | None
    met: dict[Form, Met] = field(default_factory=dict)
    made: dict[Form, Graph] = field(default_factory=dict)
    batches: int = 0
    rest_until: int = 0  # as many batches, because memory ran out
    fit: int = MOST  # graphs that it holds, for all that is known
    failure: str = ""  # why there will be no more

    def form(self, given: Given) -> Form | None:
        return None if self.failure else form_of(given, self.spec, self.limit)

    def run(self, form: Form, given: Given) -> Tensor | None:
        """Vectors [N, dim] of a batch; None: it is to be launched kernel by kernel, and `saw` told of it."""
        self.batches += 1
        if self.batches % AGE == 0:
            self.age()
        if form not in self.met:
            return None
        self.met[form].times += 1
        if form in self.made:
            return self.made[form].run(given)
        return self.begun(form, given) if self.worth(form) else None

    def worth(self, form: Form) -> bool:
        """Whether a form that was met again is to have a graph."""
        if self.batches < self.rest_until:
            return False
        if len(self.made) >= self.places():
            self.tidy()
        return len(self.made) < self.places() or self.met[form].times > RATIO * min(self.met[each].times for each in self.made)

    def places(self) -> int:
        return min(MOST, self.fit)

    def begun(self, form: Form, given: Given) -> Tensor | None:
        """Record a form's graph, and the vectors of the batch that gave rise to it; None where that fails."""
        try:
            graph = Graph(form, given, self.met[form].lists, self)
            vectors = graph.run(given)  # compiles what is not compiled yet, and grows tables
            graph.recorded(self)
        except (RuntimeError, MemoryError) as error:
            why = f"{type(error).__name__}: {error}"
            if out_of_memory(error):
                self.rest_until, until = self.batches + AGE, f"the next {AGE:,} "
                self.fit = max(1, len(self.made))
            else:
                self.failure, until = why, ""
            self.give_away(list(self.made))
            told = f"No CUDA graph could be recorded, so {until}small batches are launched kernel by kernel."
            warnings.warn(f"{told} {why}", stacklevel=2)
            return None
        self.made[form] = graph
        self.tidy()
        return vectors

    def tidy(self) -> None:
        """Give away graphs of prompts that are not kept any more, and those that were used least."""
        gone = [form for form, each in self.made.items() if each.prompt is not None and not self.kept(each.prompt)]
        left = sorted((form for form in self.made if form not in gone), key=lambda form: self.met[form].times)
        self.give_away(gone + left[: max(0, len(left) - self.places())])

    def age(self) -> None:
        """Count what has been met so far half, and forget what is left with nothing; memory may hold one graph more than before."""
        self.fit += 1
        self.tidy()
        for form, each in list(self.met.items()):
            each.times //= 2
            if not each.times and form not in self.made:
                del self.met[form]

    def give_away(self, gone: list[Form]) -> None:
        if gone and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # a replay may be under way
        for form in gone:
            del self.made[form]
        if not self.made and self.device.type == "cuda":
            self.record = record_on(self.device)  # a pool ends with its last graph, or with a recording that failed as its first

    def kept(self, prompt: Run) -> bool:
        return self.prompts is not None and any(each is prompt for each in self.prompts.runs.values())

    def saw(self, form: Form, given: Given) -> None:
        """A batch of this form was launched kernel by kernel."""
        self.met.setdefault(form, Met((asked(given.schedule), asked(given.kept_schedule)), 1))


def asked(schedule: object) -> Lists:
    return tuple((form, queries) for form, queries, _ in schedule.made) if isinstance(schedule, Schedule) else ()
