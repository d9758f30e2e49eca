"""What Encoder accepts and returns, beside sentence-transformers where the two are to agree."""

import logging

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

import pyembed.engine as engine
from pyembed import Encoder

TEXTS = [
    "What is Deep Learning?",
    "a",
    "The quick brown fox jumps over the lazy dog. " * 12,
    "Paris is the capital of France.",
    "",
    "nul \0 inside",
]


@pytest.fixture(scope="module")
def encoder(minilm):
    return Encoder(minilm, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def peer(minilm):
    return SentenceTransformer(str(minilm), device="cpu")


def test_shapes_and_kinds(encoder):
    one, many = encoder.encode(TEXTS[0]), encoder.encode(TEXTS)
    assert isinstance(one, np.ndarray)
    assert one.shape == (384,)
    assert many.shape == (len(TEXTS), 384)
    assert many.dtype == np.float32
    assert np.array_equal(one, many[0])
    assert np.array_equal(encoder.encode(np.array(TEXTS[0])), one)
    tensor = encoder.encode(TEXTS, convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    assert np.array_equal(tensor.numpy(), many)
    rows = encoder.encode(TEXTS, convert_to_numpy=False)
    assert isinstance(rows, list)
    assert torch.equal(rows[3], tensor[3])
    assert torch.equal(encoder.encode(TEXTS[3], convert_to_numpy=False), tensor[3])


class Column:
    """Like a datasets column: a length and items, not a list."""

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def __iter__(self):
        return iter(self.texts)


@pytest.mark.parametrize("wrap", [tuple, iter, np.array, lambda texts: (text for text in texts), Column])
def test_any_iterable(encoder, wrap):
    assert np.array_equal(encoder.encode(wrap(TEXTS)), encoder.encode(TEXTS))


def test_empty_inputs_are_as_in_the_peer(encoder, peer):
    for arguments in ({}, {"convert_to_tensor": True}, {"convert_to_numpy": False}):
        ours, theirs = encoder.encode([], **arguments), peer.encode([], **arguments)
        assert type(ours) is type(theirs)
        assert len(ours) == len(theirs) == 0
    assert encoder.encode(iter([])).shape == (0,)


def test_empty_and_odd_texts_are_as_in_the_peer(encoder, peer):
    texts = ["", " ", "\0", "\n\n", "é" * 5, "日本語のテキスト", "👩‍👩‍👧", "x" * 100_000]
    assert np.abs(encoder.encode(texts) - peer.encode(texts)).max() < 1e-5


def test_lone_surrogates_are_replaced_and_reported(encoder, caplog):
    before = encoder.stats.replaced
    with caplog.at_level(logging.WARNING, logger="pyembed"):
        vectors = encoder.encode(["bad \ud800 text", "bad \ufffd text"], show_progress_bar=False)
    assert np.array_equal(vectors[0], vectors[1])
    assert encoder.stats.replaced == before + 1
    assert "1 of 2 texts held lone surrogates" in caplog.text


def test_truncated_texts_are_counted_and_reported(encoder, caplog):
    before = encoder.stats
    with caplog.at_level(logging.WARNING, logger="pyembed"):
        encoder.encode(["word " * 300, "word " * 254, "word " * 255], show_progress_bar=False)
    assert encoder.stats.truncated - before.truncated == 2
    assert encoder.stats.tokens - before.tokens == 3 * 256
    assert encoder.stats.texts - before.texts == 3
    assert "2 of 3 texts were cut to 256 tokens" in caplog.text


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_precisions_are_the_peers(encoder, precision):
    vectors = encoder.encode(TEXTS)
    ours = encoder.encode(TEXTS, precision=precision)
    theirs = quantize_embeddings(vectors, precision)
    assert ours.dtype == theirs.dtype
    assert np.array_equal(ours, theirs)
    ranges = np.stack([vectors.min(0) - 0.01, vectors.max(0) + 0.01])
    assert np.array_equal(
        encoder.encode(TEXTS, precision=precision, ranges=ranges), quantize_embeddings(vectors, precision, ranges=ranges)
    )


def test_eight_bits_need_ranges_where_they_cannot_be_known(encoder):
    with pytest.raises(ValueError, match="ranges="):
        encoder.encode("one text", precision="int8")
    with pytest.raises(ValueError, match="ranges="):
        encoder.stream(TEXTS, precision="uint8")
    with pytest.raises(ValueError, match=r"expected \(2, 384\)"):
        encoder.encode(TEXTS, precision="int8", ranges=np.zeros((2, 3)))
    ranges = np.stack([np.full(384, -0.3), np.full(384, 0.3)])
    streamed = np.stack(list(encoder.stream(iter(TEXTS), precision="int8", ranges=ranges)))
    assert np.array_equal(streamed, encoder.encode(TEXTS, precision="int8", ranges=ranges))


def test_cut_and_norm_come_in_the_peers_order(encoder, peer):
    for arguments in ({"truncate_dim": 100}, {"truncate_dim": 100, "normalize_embeddings": True}):
        ours, theirs = encoder.encode(TEXTS, **arguments), peer.encode(TEXTS, **arguments)
        assert ours.shape == (len(TEXTS), 100)
        assert np.abs(ours - theirs).max() < 1e-5
    assert abs(np.linalg.norm(encoder.encode(TEXTS[0], truncate_dim=100)) - 1) > 1e-2  # not renormalised unless asked


def test_token_embeddings_and_features_are_the_peers(encoder, peer):
    ours, theirs = encoder.encode(TEXTS, output_value="token_embeddings"), peer.encode(TEXTS, output_value="token_embeddings")
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < 1e-4
    ours, theirs = encoder.encode(TEXTS[0], output_value=None), peer.encode(TEXTS[0], output_value=None)
    for name, value in ours.items():
        assert (value - theirs[name]).abs().max() < 1e-4, name


def test_prompts(minilm, peer):
    prompts = {"query": "search: ", "passage": "read: ", "other": "x "}
    encoder = Encoder(minilm, dtype="float32", prompts=prompts | {"document": ""}, default_prompt_name="other")
    plain = Encoder(minilm, dtype="float32")
    said = "hello world"
    assert np.array_equal(encoder.encode(said), plain.encode("x hello world"))
    assert np.array_equal(encoder.encode(said, prompt_name="query"), plain.encode("search: hello world"))
    assert np.array_equal(encoder.encode(said, prompt="y ", prompt_name="query"), plain.encode("y hello world"))
    assert np.array_equal(encoder.encode_query(said), plain.encode("search: hello world"))
    assert np.array_equal(encoder.encode_document(said), plain.encode(said))
    assert np.array_equal(encoder.encode_query([said], prompt="z "), plain.encode(["z hello world"]))
    with pytest.raises(ValueError, match=r"no prompt named 'nope'.*query"):
        encoder.encode(said, prompt_name="nope")
    with pytest.raises(ValueError, match="default_prompt_name is 'absent'"):
        Encoder(minilm, default_prompt_name="absent")


def test_similarity_is_the_peers(minilm, encoder):
    a, b = encoder.encode(TEXTS[:4]), encoder.encode(TEXTS[2:])
    for name in ("cosine", "dot", "euclidean", "manhattan"):
        ours, theirs = Encoder(minilm, similarity_fn_name=name), SentenceTransformer(str(minilm), similarity_fn_name=name, device="cpu")
        assert (ours.similarity(a, b) - theirs.similarity(a, b)).abs().max() < 1e-5
        assert (ours.similarity_pairwise(a, b) - theirs.similarity_pairwise(a, b)).abs().max() < 1e-5
    assert encoder.similarity(a[0], list(b)).shape == (1, 4)


def test_batches_keep_to_the_budget_and_to_batch_size(minilm, monkeypatch):
    seen = []
    original = engine.run_batch
    monkeypatch.setattr(engine, "run_batch", lambda *g, **more: (seen.append([len(i) for i in g[2].ids]), original(*g, **more))[1])
    encoder = Encoder(minilm, tokens_per_batch=64)
    encoder.encode(["word " * n for n in range(1, 90, 7)])
    assert all(sum(lengths) <= 64 or len(lengths) == 1 for lengths in seen)
    assert any(sum(lengths) > 64 for lengths in seen)  # a text beyond the budget is admitted alone
    seen.clear()
    encoder.encode([f"word {n}" for n in range(10)], batch_size=3)
    assert sorted(map(len, seen)) == [1, 3, 3, 3]


def test_an_iterator_is_read_window_by_window(encoder, monkeypatch):
    monkeypatch.setattr(engine, "WINDOW_TEXTS", 8)
    read = 0

    def source():
        nonlocal read
        for n in range(100):
            read += 1
            yield f"text number {n}"

    stream = encoder.stream(source())
    assert read == 0
    first = next(stream)
    assert read <= 8 * engine.AHEAD
    rest = list(stream)
    assert read == 100
    monkeypatch.undo()
    assert np.array_equal(np.stack([first, *rest]), encoder.encode([f"text number {n}" for n in range(100)]))


def test_many_characters_end_a_window(monkeypatch):
    monkeypatch.setattr(engine, "WINDOW_CHARACTERS", 100)
    assert [(len(chunk.inputs), more) for chunk, more in engine.windows(["x" * 60] * 5)] == [(2, True), (2, True), (1, False)]


def test_running_out_of_memory_halves_the_batch_and_is_remembered(minilm, monkeypatch):
    encoder, original, refused = Encoder(minilm), engine.run_batch, []

    def scarce(model, reads, rows, stop, **more):
        if len(rows.ids) > 2:
            refused.append(len(rows.ids))
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return original(model, reads, rows, stop, **more)

    expected = encoder.encode(TEXTS)
    monkeypatch.setattr(engine, "run_batch", scarce)
    assert np.array_equal(encoder.encode(TEXTS), expected)
    assert refused == [6, 3]
    assert np.array_equal(encoder.encode(TEXTS), expected)
    assert refused == [6, 3], "the next call begins with batches that fit"

    def hopeless(*given, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "run_batch", hopeless)
    with pytest.raises(MemoryError, match=r"Input \d alone, \d+ tokens, does not fit into memory; lower max_seq_length"):
        encoder.encode(TEXTS)


def test_other_runtime_errors_are_not_swallowed(encoder, monkeypatch):
    def broken(*given, **more):
        raise RuntimeError("something else")

    monkeypatch.setattr(engine, "run_batch", broken)
    with pytest.raises(RuntimeError, match="something else"):
        encoder.encode(TEXTS)


def test_a_vector_that_is_not_finite_names_its_input(minilm):
    encoder = Encoder(minilm, dtype="float32")
    row = encoder.tokenizer.id_of("fox")
    with torch.inference_mode():
        encoder._loaded.weights.tokens[row] = torch.nan
    with pytest.raises(ValueError, match="Input 2 gives a vector with NaN"):
        encoder.encode(["a", "b", "a fox", "c"])


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"inputs": [1, 2]}, TypeError, r"Input 0 is a int; expected a text \(str\) or its token ids .* encode\(\[ids\]\)"),
        ({"inputs": ["a", None]}, TypeError, "Input 1 is a NoneType"),
        ({"inputs": ["a", ["b"]]}, TypeError, "Input 1 is a list with a str in it"),
        ({"inputs": 3}, TypeError, "inputs is a int"),
        ({"inputs": b"bytes"}, TypeError, "inputs is a bytes"),
        ({"inputs": None}, TypeError, "inputs is a NoneType"),
        ({"inputs": {"text": "a"}}, TypeError, "inputs is a dict"),
        ({"inputs": frozenset("a")}, TypeError, "inputs is a frozenset"),
        ({"inputs": str}, TypeError, "inputs is a type"),
        ({"inputs": "a", "prompt": 5}, TypeError, "prompt is 5; expected a str"),
        ({"inputs": ["a"], "batch_size": 0}, ValueError, "batch_size is 0; expected a positive integer"),
        ({"inputs": ["a"], "batch_size": -2}, ValueError, "batch_size is -2"),
        ({"inputs": ["a"], "truncate_dim": 0}, ValueError, "truncate_dim is 0"),
        ({"inputs": ["a"], "precision": "int4"}, ValueError, "precision is 'int4'; expected one of float32"),
        ({"inputs": ["a"], "output_value": "logits"}, ValueError, "output_value is 'logits'"),
        ({"inputs": ["a"], "device": []}, ValueError, "expected one device, or a list"),
        ({"inputs": ["a"], "pool": {}}, ValueError, r"Encoder\(device=\["),
        ({"inputs": ["a"], "device": "cuda:7"}, ValueError, "torch sees"),
        ({"inputs": ["a"], "device": "toaster"}, ValueError, "expected 'cpu'"),
        ({"inputs": ["a"], "colour": "red"}, TypeError, "colour"),
    ],
)
def test_bad_calls(encoder, arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        encoder.encode(**arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dtype": "float8"}, "dtype is 'float8'; expected 'auto', 'float32'"),
        ({"device": "npu"}, "device is 'npu'"),
        ({"device": "mps"}, "runs on 'cpu' and 'cuda'"),
        ({"recipe": "nope"}, "recipe is 'nope'; expected one of e5-mistral"),
        ({"recipe": "gritlm"}, "not for bert models"),
        ({"pooling": "average"}, "pooling is 'average'; expected one or several of cls"),
        ({"similarity_fn_name": "hamming"}, "similarity_fn_name is 'hamming'"),
        ({"backend": "numpy"}, "backend is 'numpy'"),
        ({"truncate_dim": -1}, "truncate_dim is -1"),
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0"),
        ({"max_seq_length": 2}, "max_seq_length is 2; expected 3"),
        ({"max_seq_length": 513}, "max_seq_length is 513; expected 3 .* to 512"),
        ({"revision": "main"}, "revision"),
        ({"causal": True}, "bert models are bidirectional; causal=True is not for them"),
        ({"pooling": 3}, "pooling is 3"),
        ({"recipe": ["a"]}, "recipe is"),
        ({"max_seq_length": "10"}, "max_seq_length is '10'"),
    ],
)
def test_bad_options(minilm, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Encoder(minilm, **arguments)


def test_max_seq_length_can_be_changed(minilm):
    encoder = Encoder(minilm, dtype="float32")
    assert encoder.max_seq_length == 256
    encoder.max_seq_length = 512
    long = encoder.encode("word " * 400)
    encoder.max_seq_length = 256
    assert not np.array_equal(long, encoder.encode("word " * 400))
    with pytest.raises(ValueError, match="to 512"):
        encoder.max_seq_length = None


def test_repr_tells_what_runs(encoder):
    text = repr(encoder)
    for part in ("bert", "device=cpu", "dtype=float32", "mask=bidirectional", "pooling=mean", "L2", "dim=384", "backend="):
        assert part in text
    assert Encoder(encoder.directory, backend="reference").__repr__().count("backend=reference") == 1


def test_device_argument_of_encode_keeps_the_model_where_it_is(encoder):
    loaded = encoder._loaded
    encoder.encode("a", device="cpu")
    assert encoder._loaded is loaded


def test_progress_bar_counts_texts(encoder, capsys):
    encoder.encode(TEXTS, show_progress_bar=True)
    shown = capsys.readouterr().err
    assert "6/6" in shown
    encoder.encode(TEXTS)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "arguments", [{"causal": "no"}, {"normalize": 1}, {"include_prompt": "yes"}, {"prompts": ["a"]}, {"prompts": {"a": 3}}]
)
def test_options_of_the_wrong_type(minilm, arguments):
    with pytest.raises(TypeError, match=f"{next(iter(arguments))} is .*; expected"):
        Encoder(minilm, **arguments)


def test_attributes_are_checked_where_they_are_used(minilm):
    encoder = Encoder(minilm)
    for value in (20.5, "20", 0):
        with pytest.raises(ValueError, match="max_seq_length is"):
            encoder.max_seq_length = value
    encoder.truncate_dim = -5
    with pytest.raises(ValueError, match="truncate_dim is -5"):
        encoder.encode("a")
    with pytest.raises(ValueError, match="384 and 10 dimensions"):
        encoder.similarity(np.ones((1, 384)), np.ones((1, 10)))


def test_numpy_integers_are_integers(encoder):
    assert encoder.encode(TEXTS, batch_size=np.int64(2), truncate_dim=np.int32(5)).shape == (6, 5)


def test_torchs_defaults_around_us_change_nothing(minilm):
    for backend in (None, "reference"):
        encoder = Encoder(minilm, dtype="float32", backend=backend, device="cpu")
        expected = encoder.encode(TEXTS)
        with torch.device("meta"):
            assert np.array_equal(encoder.encode(TEXTS), expected)
            assert np.array_equal(Encoder(minilm, dtype="float32", backend=backend, device="cpu").encode(TEXTS), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert np.array_equal(encoder.encode(TEXTS), expected)
        torch.set_default_dtype(torch.float64)
        try:
            assert np.array_equal(encoder.encode(TEXTS), expected)
            assert np.array_equal(Encoder(minilm, dtype="float32", backend=backend, device="cpu").encode(iter(TEXTS)), expected)
        finally:
            torch.set_default_dtype(torch.float32)


def test_float16_on_a_cpu_says_that_it_is_slow(minilm, encoder, caplog):
    with caplog.at_level(logging.WARNING, logger="pyembed"):
        half = Encoder(minilm, device="cpu", dtype="float16")
    assert "many times slower" in caplog.text
    assert "backend=reference" in repr(half)
    assert (half.encode(TEXTS[:2]) * encoder.encode(TEXTS[:2])).sum(1).min() > 0.9999


def test_pooling_by_argument_keeps_what_the_files_say_of_the_prompt(minilm, tmp_path):
    for path in minilm.iterdir():
        if path.name != "1_Pooling":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean", "include_prompt": false}')
    assert not Encoder(tmp_path, pooling="max").spec.pooling.include_prompt
    assert Encoder(tmp_path, pooling="max", include_prompt=True).spec.pooling.include_prompt
