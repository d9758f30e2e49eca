"""The command line: formats, what is left after an interrupt or a full disk, memory, and what a reader of the terminal sees."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from pyembed import Encoder, cli, output, search
from pyembed.quantize import PRECISIONS

TEXTS = ["The cat sat on the mat.", "", "Grüße aus Köln", "  spaces stay  ", "a\u2028b", "東京の天気は晴れです。", "emoji 🙂", "A cat."]


@pytest.fixture(scope="module")
def encoder(minilm):
    return Encoder(minilm, dtype="float32")


@pytest.fixture(scope="module")
def small(minilm, tmp_path_factory):
    """The first layer of MiniLM alone: quick enough for many thousands of texts."""
    directory = shutil.copytree(minilm, tmp_path_factory.mktemp("small") / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    tensors = load_file(minilm / "model.safetensors")
    save_file({name: x for name, x in tensors.items() if not re.search(r"layer\.[1-9]", name)}, directory / "model.safetensors")
    return directory


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """`pyembed ...` in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*args: object, stdin: bytes | None = None) -> tuple[int, str, str]:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            code = cli.main([str(arg) for arg in args])
        except SystemExit as error:
            code = error.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def start(*args: object, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "pyembed.cli", *map(str, args)], stderr=subprocess.PIPE, **options)


def read_vectors(path: Path) -> np.ndarray:
    name = path.name.removesuffix(".partial")
    if name.endswith(".npy"):
        return np.load(path)
    if name.endswith(".safetensors"):
        tensors = load_file(path)
        assert list(tensors) == ["embeddings"]
        return tensors["embeddings"]
    return np.array([json.loads(line)["embedding"] for line in path.read_text().splitlines()], dtype=np.float32)


def kept(error: str) -> int:
    """The number of rows that a message calls valid."""
    found = re.search(r" The first ([\d,]+) rows are valid in \S+\.partial\.\n$", error)
    assert found, error
    return int(found[1].replace(",", ""))


# Formats


@pytest.mark.parametrize("suffix", output.FORMATS)
@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_files_hold_what_encode_returns_bit_for_bit(run, encoder, minilm, tmp_path, suffix, form):
    if form == "txt":
        (tmp_path / "in.txt").write_bytes("\r\n".join(TEXTS).encode())
    else:
        lines = [json.dumps({"id": i, "body": text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(TEXTS)]
        (tmp_path / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")  # a blank line after each
    code, out, err = run("encode", minilm, f"in.{form}", "-o", f"out{suffix}", "--dtype", "float32", "--field", "body")
    assert (code, out) == (0, "")
    assert re.search(r"8 texts, \d+ tokens in [\d.]+ s: [\d,]+ texts/s, [\d,]+ tokens/s; no text cut\. out\.\w+: 8 x 384 float32\.$", err)
    assert np.array_equal(read_vectors(tmp_path / f"out{suffix}"), encoder.encode(TEXTS))
    assert sorted(os.listdir(tmp_path)) == sorted([f"in.{form}", f"out{suffix}"])


def test_standard_input_a_byte_order_mark_and_no_newline_at_the_end(run, encoder, minilm, tmp_path):
    assert run("encode", minilm, "-o", "a.npy", "--dtype", "float32", "-q", stdin=b"\xef\xbb\xbfone\n\nthree") == (0, "", "")
    assert np.array_equal(np.load(tmp_path / "a.npy"), encoder.encode(["one", "", "three"]))
    code, *_ = run("encode", minilm, "-o", "b.npy", "-", "--dtype", "float32", "--input-format", "jsonl", stdin=b'{"text": "one"}\n')
    assert code == 0
    assert np.array_equal(np.load(tmp_path / "b.npy"), encoder.encode(["one"]))


def test_options_reach_the_encoder(run, encoder, minilm, tmp_path):
    (tmp_path / "in").write_text("\n".join(["one two three four five six"] * 3))
    options = ["--prompt", "query: ", "--truncate-dim", 60, "--normalize", "--max-seq-length", 6, "--batch-size", 2]
    options += ["--tokens-per-batch", 16]
    code, _, err = run("encode", minilm, "in", "-o", "out.npy", "--dtype", "float32", *options)
    assert code == 0
    assert "3 texts cut to 6 tokens" in err
    assert err.count("texts cut") == 1  # said once, by the summary
    want = encoder.encode(["query: one two"] * 3, normalize_embeddings=True, truncate_dim=60)
    assert np.array_equal(np.load(tmp_path / "out.npy"), want)
    code, *_ = run("encode", minilm, "in", "-o", "max.npy", "--dtype", "float32", "--pooling", "max")
    want = Encoder(minilm, dtype="float32", pooling="max").encode(["one two three four five six"] * 3)
    assert np.array_equal(np.load(tmp_path / "max.npy"), want)
    assert run("encode", minilm, "in", "-o", "x.npy", "--prompt-name", "nobody")[0] == 2


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("suffix", output.FORMATS)
def test_precisions(run, encoder, minilm, tmp_path, precision, suffix):
    (tmp_path / "in.txt").write_text("\n".join(TEXTS))
    vectors = encoder.encode(TEXTS, truncate_dim=100)
    ranges = np.stack([vectors.min(0), vectors.max(0)])
    np.save(tmp_path / "ranges.npy", ranges)
    more = ["--ranges", "ranges.npy"] if precision in ("int8", "uint8") else []
    options = ["--dtype", "float32", "--truncate-dim", 100, "--precision", precision, *more]
    assert run("encode", minilm, "in.txt", "-o", f"out{suffix}", *options)[0] == 0
    want = encoder.encode(TEXTS, truncate_dim=100, precision=precision, ranges=ranges if more else None)
    got = read_vectors(tmp_path / f"out{suffix}")
    assert np.array_equal(got, want)
    assert suffix == ".jsonl" or got.dtype == want.dtype
    if more:
        code, _, err = run("encode", minilm, "in.txt", "-o", "other.npy", "--precision", precision)
        assert code == 2
        assert "--ranges FILE.npy" in err


@pytest.mark.parametrize("suffix", output.FORMATS)
def test_no_text_gives_a_file_without_rows(run, minilm, tmp_path, suffix):
    assert run("encode", minilm, "-o", f"out{suffix}", stdin=b"")[0] == 0
    assert read_vectors(tmp_path / f"out{suffix}").shape == ((0,) if suffix == ".jsonl" else (0, 384))


def test_headers_have_room_for_any_number_of_rows():
    for dtype in ("float32", "int8", "uint8"):
        for suffix in output.FORMATS:
            assert len(output.header(suffix, 10**12, 10**6, np.dtype(dtype))) == output.HEADER[suffix]


# What is refused


BAD = {
    "not json": (b'{"text": "a"}\n{"text": \n', "in.jsonl, line 2 is not JSON"),
    "no object": (b'["a"]\n', "in.jsonl, line 1 is a JSON list; expected an object with the field 'text'"),
    "no field": (b'{"text": "a"}\n\n{"id": 1, "body": "b"}\n', "in.jsonl, line 3 has no field 'text'; it has 'id', 'body'. Name"),
    "no string": (b'{"text": 7}\n', "in.jsonl, line 1: 'text' is 7; expected a string."),
    "no utf-8": (b'{"text": "a"}\n{"text": "\xff"}\n', "in.jsonl, line 2: byte 11 is not UTF-8"),
    "too deep": (b"[" * 200_000 + b"\n", "in.jsonl, line 1 is not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named(run, small, tmp_path, name):
    content, message = BAD[name]
    (tmp_path / "in.jsonl").write_bytes(content)
    code, out, err = run("encode", small, "in.jsonl", "-o", "out.npy", "-q")
    assert (code, out) == (2, "")
    assert err.startswith(f"pyembed: {message}")
    assert err.count("\n") == 1
    rows = message[15] != "1"  # those of the lines before it
    assert err.endswith("The first 1 rows are valid in out.npy.partial.\n" if rows else "No row was written.\n")
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", *["out.npy.partial"] * rows]


def test_rows_before_a_bad_line_are_kept(run, small, tmp_path):
    lines = [f"text {i}" for i in range(5000)]
    (tmp_path / "in.txt").write_bytes("\n".join(lines).encode() + b"\n\xff\n")
    code, _, err = run("encode", small, "in.txt", "-o", "out.safetensors", "--dtype", "float32", "-q")
    assert code == 2
    assert "in.txt, line 5001: byte 1 is not UTF-8" in err
    rows = kept(err)
    assert rows >= 4096  # a window
    got = read_vectors(tmp_path / "out.safetensors.partial")
    assert np.array_equal(got, Encoder(small, dtype="float32").encode(lines[:rows]))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["in.txt", "-o", "out.csv"], "out.csv ends in '.csv'; an output is one of .npy, .safetensors, .jsonl."),
        (["in.txt", "-o", "out"], "out ends in 'nothing'"),
        (["in.txt", "-o", "no/out.npy"], "There is no folder no to write out.npy to."),
        (["in.txt", "-o", "there.npy"], "there.npy exists already; move it away or pass --overwrite."),
        (["in.txt", "-o", "half.npy"], "half.npy.partial exists already"),
        (["in.txt", "-o", "folder.npy", "--overwrite"], "folder.npy is a folder"),
        (["none.txt", "-o", "out.npy"], "none.txt: No such file or directory."),
        (["in.csv", "-o", "out.npy"], "in.csv ends in .csv, which does not say what it holds; pass --input-format text or jsonl."),
        (["in.txt", "-o", "out.npy", "--recipe", "none"], "recipe is 'none'; expected one of"),
        (["in.txt", "-o", "out.npy", "--max-seq-length", "9999"], "max_seq_length is 9999"),
        (["in.txt", "-o", "out.npy", "--device", "abacus"], "device is 'abacus'"),
        (["in.txt", "-o", "out.npy", "--precision", "int8", "--ranges", "in.txt"], "in.txt is not an .npy file"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(run, minilm, tmp_path, args, message):
    (tmp_path / "in.txt").write_text("a text")
    (tmp_path / "there.npy").write_text("precious")
    (tmp_path / "half.npy.partial").write_text("precious")
    (tmp_path / "folder.npy").mkdir()
    before = sorted(os.listdir(tmp_path))
    code, out, err = run("encode", minilm, *args)
    assert (code, out) == (2, "")
    assert err.startswith(f"pyembed: {message}"), err
    assert err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "there.npy").read_text() == (tmp_path / "half.npy.partial").read_text() == "precious"


def test_overwrite(run, minilm, tmp_path):
    (tmp_path / "in.txt").write_text("a text")
    (tmp_path / "out.npy").write_text("old")
    (tmp_path / "out.npy.partial").write_text("older " * 10_000)
    assert run("encode", minilm, "in.txt", "-o", "out.npy", "--overwrite")[0] == 0
    assert np.load(tmp_path / "out.npy").shape == (1, 384)
    assert not (tmp_path / "out.npy.partial").exists()


def test_usage_errors_and_options_before_the_input(run, minilm, tmp_path):
    assert run("encode", minilm, "-o", "out.npy", "in.txt")[2].startswith("pyembed: in.txt: No such file")
    assert run("encode", minilm, "a", "b", "-o", "out.npy")[0] == 2
    assert run("encode", minilm, "-o", "out.npy", "--batch-size", 0)[0] == 2
    assert "unrecognized arguments: --nonsense" in run("info", minilm, "--nonsense")[2]
    assert run()[0] == 2
    assert run("--version")[1].startswith("pyembed ")


# Interrupts, full disks, memory


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("suffix", output.FORMATS)
def test_an_interrupt_leaves_valid_rows(small, tmp_path, number, code, suffix):
    target = tmp_path / f"out{suffix}"
    process = start("encode", small, "-o", target, "--dtype", "float32", stdin=subprocess.PIPE)
    process.stdin.write(b"".join(b"text %d\n" % i for i in range(5000)))  # several windows, and then it waits for the rest of the next
    process.stdin.flush()
    partial = output.partial(target)
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size > 2000 * 384 * 4) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    error = process.communicate()[1].decode()
    assert process.returncode == code, error
    rows = kept(error)
    assert "pyembed: Interrupted. The" in error
    assert "Traceback" not in error
    assert not target.exists()
    assert rows > 500
    assert np.array_equal(read_vectors(partial), Encoder(small, dtype="float32").encode([f"text {i}" for i in range(rows)]))


@pytest.mark.parametrize("suffix", output.FORMATS)
def test_a_full_disk_leaves_valid_rows(small, tmp_path, suffix):
    (tmp_path / "in.txt").write_text("\n".join(f"text {i}" for i in range(3000)))
    limit = 2_000_000  # of 4.6 MB
    target = tmp_path / f"out{suffix}"
    process = start(
        "encode", small, tmp_path / "in.txt", "-o", target, "--dtype", "float32", "-q",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    error = process.communicate()[1].decode()
    assert process.returncode == 2, error
    rows = kept(error)
    assert error.startswith("pyembed: File too large. The first ")
    assert error.count("\n") == 1
    assert rows > 300  # 1,302 in binary
    vectors = read_vectors(output.partial(target))
    assert len(vectors) == rows
    assert np.array_equal(vectors, Encoder(small, dtype="float32").encode([f"text {i}" for i in range(rows)]))
    assert not target.exists()


def test_an_interrupt_at_any_point_of_the_writer_loses_and_doubles_nothing(tmp_path):
    """A row is committed by one assignment. Here the trace function interrupts at every single line, one after the other."""
    rows = [np.full(40_000, i, np.float32) for i in range(20)]  # seven fill a chunk

    def attempt(stop_at: int) -> bool:
        seen, appended = 0, 0

        def trace(frame, event, _):
            nonlocal seen
            if frame.f_code.co_filename != output.__file__:
                return None
            seen += event == "line"
            if event == "line" and seen == stop_at:
                raise KeyboardInterrupt
            return trace

        out = output.Output(tmp_path / "out.npy", 40_000, np.dtype("float32"), overwrite=True)
        sys.settrace(trace)
        with contextlib.suppress(KeyboardInterrupt):
            for row in rows:
                out.append(row)
                appended += 1
        sys.settrace(None)
        out.keep()
        if out.rows:
            got = np.load(output.partial(out.path))
            assert np.array_equal(got[:, 0], np.arange(out.rows))
        assert appended <= out.rows <= appended + 1
        return seen >= stop_at

    stop_at = 1
    while attempt(stop_at):
        stop_at += 1
    assert stop_at > 60


def test_memory_does_not_grow_with_the_number_of_texts(small, tmp_path):
    def peak(count: int) -> int:
        (tmp_path / "in.txt").write_text("".join(f"{i % 100}\n" for i in range(count)))
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # glibc gives large blocks back, in every run alike
        process = start("encode", small, tmp_path / "in.txt", "-o", tmp_path / "out.npy", "--overwrite", "-q", env=env)
        watched, most = psutil.Process(process.pid), 0
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                most = max(most, watched.memory_info().rss)
            time.sleep(0.01)
        assert process.returncode == 0, process.stderr.read()
        process.stderr.close()
        assert np.load(tmp_path / "out.npy", mmap_mode="r").shape == (count, 384)
        return most

    few, many = peak(10_000), peak(70_000)
    assert many - few < 40 << 20  # the 60,000 further vectors alone take 92 MB


# search


CORPUS = [
    {"title": "Zoo", "text": "Lions and tigers live in the zoo."},
    {"id": "db-7", "text": "An index makes queries of a database\nfaster.\x1b[31m " + "More about that. " * 40},
    {"id": 3, "text": "Bread is baked from flour and water."},
]


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, CORPUS)))
    (tmp_path / "corpus.txt").write_text("\n".join(record["text"].replace("\n", " ") for record in CORPUS))


@pytest.mark.usefixtures("corpus")
def test_search_shows_the_nearest_texts(run, encoder, minilm, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    code, out, err = run("search", minilm, "corpus.jsonl", "-k", 2, "How is SQL made quick?", "bakery", "--dtype", "float32")
    assert code == 0
    assert "3 texts" in err
    score = float(encoder.similarity(encoder.encode("How is SQL made quick?"), encoder.encode(CORPUS[1]["text"])))
    head = "   An index makes queries of a database faster. [31m More\n   about that."
    assert out.startswith(f"\nHow is SQL made quick?\n\n1  db-7  {score:.3f}\n{head}")
    assert all(len(line) <= 60 for line in out.splitlines())
    assert "\x1b" not in out
    assert re.search(r" …\n\n2  ", out)
    assert re.search(r"bakery\n\n1  3  0\.\d+\n   Bread is baked", out)
    _, out, _ = run("search", minilm, "corpus.txt", "animals", "-k", 9, "-q")
    assert out.startswith("\nanimals\n\n1  corpus.txt:1  0.")
    assert out.count("corpus.txt:") == 3


@pytest.mark.usefixtures("corpus")
def test_search_index(run, minilm, tmp_path):
    args = ["search", minilm, "corpus.jsonl", "animals", "--index", "index.npy", "--dtype", "float32"]
    code, first, err = run(*args)
    assert code == 0
    assert "3 texts" in err
    written = (tmp_path / "index.npy").read_bytes()
    assert np.load(tmp_path / "index.npy").shape == (3, 384)
    assert run(*args) == (0, first, "")  # nothing embedded but the query and a sample
    for other, message in (
        (np.zeros((2, 384), np.float32), "index.npy holds float32 [2, 384]; this corpus and model give float32 [3, 384]."),
        (np.load(tmp_path / "index.npy")[::-1], "index.npy: vector 0 is not that of Zoo by this model."),
        (np.zeros((3, 384)), "index.npy holds float64 [3, 384]"),
    ):
        np.save(tmp_path / "index.npy", other)
        code, _, err = run(*args)
        assert code == 2
        assert err.startswith(f"pyembed: {message}")
    (tmp_path / "index.npy").write_text("no array")
    assert "index.npy is not an .npy file" in run(*args)[2]
    (tmp_path / "index.npy").write_bytes(written)
    assert run(*args)[0] == 0
    assert run(*args[:-4], "--index", "index.bin")[0] == 2


@pytest.mark.usefixtures("corpus")
def test_search_asks_on_a_terminal_in_colour(minilm, tmp_path):
    pty = pytest.importorskip("pty")

    def talk(**environment: str) -> str:
        main, other = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "50", **environment}
        command = [sys.executable, "-m", "pyembed.cli", "search", str(minilm), "corpus.jsonl", "-k", "1", "-q"]
        process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, cwd=tmp_path, env=env)
        os.close(other)
        seen, typed = b"", [b"\x04", b"\n", b"animals\n"]
        with contextlib.suppress(OSError):  # the other end is gone
            while select.select([main], [], [], 60)[0] and (part := os.read(main, 4096)):
                seen += part
                if seen.endswith(b"> "):
                    os.write(main, typed.pop())
        assert process.wait(60) == 0, seen
        os.close(main)
        return seen.decode()

    assert "\x1b[36mZoo\x1b[0m" in talk(NO_COLOR="")
    plain = talk(NO_COLOR="1")
    assert re.search(r"1  Zoo  0\.\d{3}\s+Lions and tigers", plain)


@pytest.mark.usefixtures("corpus")
def test_search_without_a_query_or_a_text(run, minilm, tmp_path):
    code, _, err = run("search", minilm, "corpus.jsonl", stdin=b"")
    assert code == 2
    assert err.startswith("pyembed: No query was given")
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt holds no text" in run("search", minilm, "empty.txt", "query")[2]


def test_fitting_to_columns():
    assert search.fitted("", 10, 3) == [""]
    assert search.fitted("one two three", 7, 3) == ["one two", "three"]
    assert search.fitted("one two three", 7, 1) == ["one …"]
    assert search.fitted("exactly", 7) == ["exactly"]
    assert search.fitted("東京の天気は晴れです", 8, 9) == ["東京の天", "気は晴れ", "です"]
    assert search.fitted("x" * 30, 10, 2) == ["x" * 10, "x" * 8 + " …"]
    assert search.fitted("a\x1b[0m\n\tb\u200bc", 20) == ["a [0m b c"]
    assert search.columns("e\u0301🙂") == 3
    for width in range(8, 30):
        assert all(search.columns(line) <= width for line in search.fitted("晴れ, one or two words " * 9, width, 3))


# info, convert, help


def test_info(run, minilm, tmp_path):
    code, out, err = run("info", minilm)
    assert (code, err) == (0, "")
    for line in (
        r"^model +bert, 6 layers of 384, MLP gelu 1,536, post-norm LayerNorm  \[config.json\]$",
        r"^attention +12 heads of 32, QKV bias ",
        r"^mask +bidirectional ",
        r"^positions +learned, a table of 512 rows",
        r"^pooling +mean  \[modules.json\]$",
        r"^vector +384 dimensions, L2 norm 1, compared by cosine  \[modules.json\]$",
        r"^max length +256 tokens  \[sentence_bert_config.json\]$",
        r"^tokenizer +30,522 tokens; a text begins \[CLS\] \(101\) the \(1996\) and ends \. \(1012\) \[SEP\] \(102\)  \[tokenizer.json\]$",
        r"^weights +22,713,216 parameters, 90\.9 MB as F32  \[model.safetensors\]$",
        r"^runs on +cpu in \w+, kernels: ",
    ):
        assert re.search(line, out, re.MULTILINE), line
    assert "cls" in run("info", minilm, "--pooling", "cls")[1]
    shutil.copytree(minilm, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    code, out, err = run("info", "model")
    assert (code, out) == (2, "")
    assert "has no weights" in err


def test_info_reads_no_weights(run, minilm, monkeypatch):
    monkeypatch.setattr("pyembed.weights.TensorFiles", None)
    assert run("info", minilm)[0] == 0


@pytest.mark.parametrize("name", ["mistral-window", "qwen3"])
def test_info_of_decoders(run, checkpoint, name):
    code, out, err = run("info", checkpoint(name), "--pooling", "lasttoken", "--causal")
    assert code == 0, err
    assert re.search(r"^mask +causal(, 3 of 3 layers see 6 keys before and 0 after)?  \[argument\]$", out, re.MULTILINE), out
    assert re.search(r"^positions +RoPE, theta [\d,]+, 16 of 16 dimensions; up to 256  \[config.json\]$", out, re.MULTILINE), out


def test_info_without_a_model(run):
    code, out, _ = run("info")
    assert code == 0
    assert re.search(r"^  llama +llama, mistral, ministral, ministral3, qwen2, qwen3$", out, re.MULTILINE)
    assert re.search(r"^  gritlm +GritLM/GritLM-7B$", out, re.MULTILINE)


def test_convert(run, minilm, tmp_path):
    import torch

    model = shutil.copytree(minilm, tmp_path / "model")
    want = load_file(model / "model.safetensors")
    torch.save({name: torch.from_numpy(x) for name, x in want.items()}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    code, _, err = run("encode", model, "-o", "out.npy", stdin=b"text\n")
    assert code == 2
    assert f"run `pyembed convert {model}` once" in err
    assert run("convert", model)[0] == 0
    assert run("encode", model, "-o", "out.npy", stdin=b"text\n")[0] == 0
    code, out, err = run("convert", tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"pyembed: .*nowhere.*\n", err)


@pytest.mark.parametrize("device", ["cpu", "cpu,cpu"])
def test_warmup(run, minilm, device):
    code, out, err = run("warmup", minilm, "--device", device, "--dtype", "float32", "--backend", "reference", "--offline")
    assert (code, err) == (0, "")
    for line in (
        r"^runs on +cpu( x 2 \(worker processes\))? in float32, kernels: reference$",
        r"^load +\d+\.\d\d s  with what is imported$",
        r"^first embedding +\d+\.\d\d s  \d+\.\d\d s after the start$",
        r"^other batches +\d+\.\d\d s  of 3 kinds$",
        r"^once more +\d+\.\d\d s$",
        r"^next process +finds nothing: what oneDNN builds ",
    ):
        assert re.search(line, out, re.MULTILINE), out
    assert run("warmup")[0] == 2
    assert "no CUDA" in (err := run("warmup", minilm, "--device", "cuda")[2]) or "0 CUDA devices" in err


def test_how_it_runs_reaches_the_encoder(run, minilm, monkeypatch):
    seen, made, names = [], [], ("deterministic", "cuda_graphs", "share_prefixes", "prefix_cache_bytes")

    def watched(*given, **named):
        seen.append(tuple(named[name] for name in names))
        made.append(Encoder(*given, **named))
        return made[-1]

    monkeypatch.setattr("pyembed.encoder.Encoder", watched)
    every = ["--deterministic", "--no-cuda-graphs", "--share-prefixes", "--prefix-cache-bytes", "1000000"]
    for words in ([], [*every[:2], *every[3:]]):
        assert run("encode", minilm, "-o", f"{len(words)}.npy", "--device", "cpu", *words, stdin=b"a\n")[0] == 0
    code, _, said = run("encode", minilm, "-o", "c.npy", "--device", "cpu", *every, stdin=b"a\n")
    assert code == 2
    assert "share_prefixes=True" in said, "MiniLM is not causal"
    assert seen == [(False, True, False, None), (True, False, False, 1000000), (True, False, True, 1000000)]
    assert [each._engine.deterministic for each in made] == [False, True]


def test_the_backend_reaches_the_encoder(run, minilm):
    for backend in ("kernels", "reference"):
        out = run("info", minilm, "--device", "cpu", "--backend", backend)[1]
        assert ("kernels: reference" in out) == (backend == "reference")
    code, _, err = run("encode", minilm, "-o", "out.npy", "--dtype", "float16", "--device", "cpu", "--backend", "kernels", stdin=b"a\n")
    assert code == 2
    assert "on a CPU there are none for float16" in err


@pytest.mark.parametrize("command", ["", "encode", "search", "info", "verify", "warmup", "convert"])
def test_help(run, command):
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    if command == "encode":
        assert "an empty line is a text too" in " ".join(out.split())


def test_precisions_of_the_parser_are_those_of_the_encoder():
    assert tuple(cli.STORED) == PRECISIONS
