"""The command line: pyembed encode | search | info | verify | warmup | convert. Commands import what they need, so help comes at once."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pyembed import lines
from pyembed.arguments import parse, recipe_arguments
from pyembed.compiler import NoCompiler
from pyembed.output import STORED, Output, check_path, partial

if TYPE_CHECKING:
    from pyembed.encoder import Encoder
    from pyembed.job import Stats

EXPECTED = (KeyboardInterrupt, ValueError, TypeError, OSError, MemoryError, NoCompiler)  # everything else is a bug and shows its traceback


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    logging.basicConfig(format="pyembed: %(message)s")
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    before = signal.signal(signal.SIGTERM, stop)
    code = 0
    try:
        code = COMMANDS[args.command](args) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except EXPECTED as error:
        say(sentence(error))
        return exit_code(error)
    finally:
        signal.signal(signal.SIGTERM, before)
    return code


def stop(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


def exit_code(error: BaseException) -> int:
    """2, or what a shell reports for the signal that interrupted us: 130 for Ctrl-C, 143 for a polite kill."""
    return 128 + (error.args[0] if error.args else signal.SIGINT) if isinstance(error, KeyboardInterrupt) else 2


def sentence(error: BaseException) -> str:
    """An error as one line."""
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return " ".join(str(error).split()) or f"{type(error).__name__}."


def say(message: str) -> None:
    print(f"pyembed: {message}", file=sys.stderr, flush=True)


# Commands


def encode(args: argparse.Namespace) -> None:
    form = lines.format_of(args.input, args.input_format)
    check_path(args.output, overwrite=args.overwrite)
    ranges = read_ranges(args)
    with lines.open_input(args.input) as file:
        encoder = load(args)
        texts = (text for text, _ in lines.read(file, name_of(args.input), form, args.field))
        rows = encoder.stream(
            texts,
            prompt=args.prompt,
            prompt_name=args.prompt_name,
            batch_size=args.batch_size,
            show_progress_bar=False,
            precision=args.precision,
            normalize_embeddings=args.normalize,
            ranges=ranges,
        )
        import numpy as np

        dim = (encoder.dim + 7) // 8 if args.precision in ("binary", "ubinary") else encoder.dim
        out = Output(args.output, dim, np.dtype(STORED[args.precision]), overwrite=args.overwrite)
        start = time.perf_counter()
        try:
            with progress(encoder, None if args.quiet else lines.count(args.input, form), quiet=args.quiet):
                for row in rows:
                    out.append(row)
            out.finish()
        except BaseException as error:
            out.keep()
            kept = f"The first {out.rows:,} rows are valid in {partial(args.output)}." if out.rows else "No row was written."
            if not isinstance(error, EXPECTED):
                say(kept)
                raise
            say(f"{sentence(error)} {kept}")
            raise SystemExit(exit_code(error)) from error
    if not args.quiet:
        say(f"{summary(encoder.stats, time.perf_counter() - start, encoder)} {args.output}: {out.rows:,} x {dim} {STORED[args.precision]}.")


def search(args: argparse.Namespace) -> None:
    from pyembed.search import Entry, check_index, digest_of, fingerprint, nearest, show

    if not args.query and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ValueError("No query was given; queries follow the corpus on the command line.")
    if args.index is not None and args.index.suffix != ".npy":
        raise ValueError(f"--index is {args.index}; expected the name of an .npy file.")
    form = lines.format_of(args.corpus, args.input_format)
    with lines.open_input(args.corpus) as file:
        entries = [
            Entry(str(record.get("title") or record.get("id") or f"{name_of(args.corpus)}:{number}"), text)
            for number, (text, record) in enumerate(lines.read(file, name_of(args.corpus), form, args.field), 1)
        ]
    if not entries:
        raise ValueError(f"{name_of(args.corpus)} holds no text to search.")
    encoder = load(args)
    if args.index is not None and args.index.exists():
        with unwarned():
            vectors = check_index(args.index, encoder, entries)
    else:
        start = time.perf_counter()
        with progress(encoder, len(entries), quiet=args.quiet):
            vectors = encoder.encode_document([entry.text for entry in entries], batch_size=args.batch_size, show_progress_bar=False)
        if not args.quiet:
            say(summary(encoder.stats, time.perf_counter() - start, encoder))
        if args.index is not None:
            out = Output(args.index, encoder.dim, vectors.dtype, overwrite=True)
            for row in vectors:
                out.append(row)
            out.finish()
            digest_of(args.index).write_text(fingerprint(entries))
    for query in args.query or asked():
        print(show(query, nearest(encoder, query, vectors, args.k), entries), flush=True)


def asked() -> Iterator[str]:
    """Queries typed at a prompt, until Ctrl-D."""
    import readline  # noqa: F401 - input() then edits lines

    print(f"{os.linesep}Type a query; Ctrl-D ends.")
    while True:
        try:
            query = input("\n> ").strip()
        except EOFError:
            print()
            return
        if query:
            yield query


def info(args: argparse.Namespace) -> None:
    from pyembed.info import describe, supported

    print(supported() if args.model is None else describe(args))


def verify(args: argparse.Namespace) -> int:
    from pyembed import verify
    from pyembed.published import listed, published

    if args.model is None:
        print(listed(published()))
        return 0
    if args.as_id is not None and args.recipe is None and args.template is None:
        args.recipe = verify.recipe_for(args.as_id)
    with unwarned():
        head, found = verify.verify(lambda: load(args), args.model, as_id=args.as_id, against=args.against)
    print(verify.table(head, found))
    return verify.exit_code(found, args.against)


def warmup(args: argparse.Namespace) -> None:
    start = time.perf_counter()  # torch is imported below
    from pyembed import warmup
    from pyembed.options import choose_devices

    with unwarned():
        print(warmup.report(lambda: load(args), choose_devices(args.device), args.backend, start))


def convert(args: argparse.Namespace) -> None:
    from pyembed.convert import convert

    print(convert(args.directory, args.output))


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "encode": encode,
    "search": search,
    "info": info,
    "verify": verify,
    "warmup": warmup,
    "convert": convert,
}


# What commands share


def load(args: argparse.Namespace) -> Encoder:
    from pyembed.encoder import Encoder

    return Encoder(
        args.model,
        adapters=args.adapters,
        adapter=args.adapter,
        device=args.device,
        dtype=args.dtype,
        recipe=args.recipe,
        template=args.template,
        instruction=args.instruction,
        pooling=args.pooling,
        causal=args.causal,
        truncate_dim=args.truncate_dim,
        max_seq_length=args.max_seq_length,
        tokens_per_batch=args.tokens_per_batch,
        backend=args.backend,
        deterministic=args.deterministic,
        cuda_graphs=args.cuda_graphs,
        share_prefixes=args.share_prefixes,
        prefix_cache_bytes=args.prefix_cache_bytes,
        revision=args.revision,
        local_files_only=args.offline,
    )


def read_ranges(args: argparse.Namespace) -> Any:
    """The array of --ranges. ValueError where the precision needs it and it is not there."""
    if args.ranges is None:
        from pyembed.options import choose_recipe

        recipe = choose_recipe(args.model, recipe_arguments(args))
        own = args.precision == "int8" and recipe.output == "tanh_int8"
        if args.precision in ("int8", "uint8") and not own:
            raise ValueError(
                f"--precision {args.precision} needs --ranges FILE.npy with the least and largest value of each dimension, [2, dim]; from "
                "float32 vectors v of similar texts that is np.stack([v.min(0), v.max(0)])."
            )
        return None
    import numpy as np

    try:
        return np.load(args.ranges, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{args.ranges} is not an .npy file ({error}).") from error


def name_of(path: str) -> str:
    return "standard input" if path == "-" else path


def summary(stats: Stats, seconds: float, encoder: Encoder) -> str:
    """What was done and how fast; texts that were cut or repaired are always told."""
    out = f"{stats.texts:,} texts, {stats.tokens:,} tokens in {seconds:.1f} s: "
    out += f"{stats.texts / seconds:,.0f} texts/s, {stats.tokens / seconds:,.0f} tokens/s; "
    out += f"{stats.truncated:,} texts cut to {encoder.max_seq_length:,} tokens." if stats.truncated else "no text cut."
    return out + (f" {stats.replaced:,} texts held lone surrogates, which became U+FFFD." if stats.replaced else "")


@contextmanager
def progress(encoder: Encoder, total: int | None, *, quiet: bool) -> Iterator[None]:
    """A bar on stderr, drawn by a thread from the encoder's counts. With it, warnings wait for the summary, which repeats them."""
    if quiet:
        yield
        return
    from tqdm import tqdm

    from pyembed.results import told

    terminal = sys.stderr.isatty()
    rates = "{n:,} of {total:,} texts [{elapsed}<{remaining}, " if total is not None else "{n:,} texts [{elapsed}, "
    bar = tqdm(
        total=total,
        mininterval=0,  # the thread below sets the pace
        smoothing=0,
        dynamic_ncols=terminal,
        bar_format=("{percentage:3.0f}%|{bar}| " if total is not None else "") + rates + "{rate_noinv_fmt}{postfix}]",
        unit=" texts",
    )
    before, start, done = encoder.stats, time.perf_counter(), threading.Event()

    def draw() -> None:
        done_since = encoder.stats.since(before)
        bar.n = done_since.texts
        bar.set_postfix_str(told(done_since, time.perf_counter() - start, len(encoder.devices)))

    def keep_drawing() -> None:
        while not done.wait(0.2 if terminal else 10):
            draw()

    thread = threading.Thread(target=keep_drawing, daemon=True)
    try:
        thread.start()
        with unwarned():
            yield
    finally:
        done.set()
        thread.join()
        draw()
        bar.close()


@contextmanager
def unwarned() -> Iterator[None]:
    """Without the warnings of each call to encode, where they are told otherwise or not about what was asked for."""
    logger = logging.getLogger("pyembed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
