"""encode(out=): vectors written into the caller's array, window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch

from pyembed import Encoder, engine
from pyembed.config import Template
from pyembed.results import fill
from pyembed.window import Window

Directory = Callable[[str], Path]
TEXTS = checkpoints.sentences((1, 2, 3, 10, 17, 40, 5, 6, 7, 8))
RANGES = np.stack([np.full(48, -1.5), np.full(48, 1.5)])


@pytest.fixture
def encoder(checkpoint: Directory, monkeypatch: pytest.MonkeyPatch) -> Encoder:
    """Windows of three texts."""
    torch.set_num_threads(1)
    monkeypatch.setattr(engine, "WINDOW_TEXTS", 3)
    return Encoder(checkpoint("llama"), device="cpu", dtype="float32")


def bits(rows: Any) -> np.ndarray:
    return rows.float().numpy() if isinstance(rows, torch.Tensor) else np.asarray(rows).astype(np.float32)


OUTS: dict[str, Callable[[int], Any]] = {
    "float32": lambda n: np.full((n, 48), np.nan, np.float32),
    "float16": lambda n: np.full((n, 48), np.nan, np.float16),
    "columns of a wider one": lambda n: np.full((n, 100), np.nan, np.float32)[:, 7:55],
    "every other row": lambda n: np.full((2 * n, 48), np.nan, np.float32)[::2],
    "backwards": lambda n: np.full((n, 48), np.nan, np.float32)[::-1],
    "columns first": lambda n: np.full((48, n), np.nan, np.float32).T,
    "tensor": lambda n: torch.full((n, 48), torch.nan),
    "half tensor": lambda n: torch.full((n, 48), torch.nan, dtype=torch.float16),
    "bfloat16 tensor": lambda n: torch.full((n, 48), torch.nan, dtype=torch.bfloat16),
    "columns of a tensor": lambda n: torch.full((n, 100), torch.nan)[:, 7:55],
    "parameter": lambda n: torch.nn.Parameter(torch.full((n, 48), torch.nan)),
}


@pytest.mark.parametrize("kind", OUTS)
@pytest.mark.parametrize("wrap", [list, iter])
def test_rows_are_written_in_place(encoder: Encoder, kind: str, wrap: Callable[[Any], Any]) -> None:
    expected = encoder.encode(TEXTS, convert_to_tensor=True)
    out = OUTS[kind](len(TEXTS))
    assert encoder.encode(wrap(TEXTS), out=out) is out
    rows = out.detach() if isinstance(out, torch.Tensor) else out
    dtype = rows.dtype if isinstance(rows, torch.Tensor) else getattr(torch, str(rows.dtype))
    assert np.array_equal(bits(rows), expected.to(dtype).float().numpy())


def test_what_is_beside_the_rows_stays(encoder: Encoder) -> None:
    wide = np.full((24, 60), 7, np.float32)
    found = encoder.encode(TEXTS, out=wide[1::2, 4:52])
    assert found.shape == (len(TEXTS), 48)
    assert np.shares_memory(found, wide)
    assert np.array_equal(wide[1:21:2, 4:52], encoder.encode(TEXTS))
    wide[1:21:2, 4:52] = 7
    assert (wide == 7).all()


def test_more_rows_than_texts_give_the_first_rows(encoder: Encoder) -> None:
    for out in (np.zeros((15, 48), np.float32), torch.zeros(15, 48)):
        for texts in (TEXTS, iter(TEXTS)):
            found = encoder.encode(texts, out=out)
            assert found.shape == (len(TEXTS), 48)
            assert (found.data_ptr() == out.data_ptr()) if isinstance(out, torch.Tensor) else np.shares_memory(found, out)
            assert (out[len(TEXTS) :] == 0).all()
        assert encoder.encode([], out=out).shape == encoder.encode(iter([]), out=out).shape == (0, 48)


def test_a_file_is_written(encoder: Encoder, tmp_path: Path) -> None:
    out = np.lib.format.open_memmap(tmp_path / "vectors.npy", mode="w+", dtype=np.float16, shape=(len(TEXTS), 48))
    assert encoder.encode(iter(TEXTS), out=out) is out
    out.flush()
    assert np.array_equal(np.load(tmp_path / "vectors.npy"), encoder.encode(TEXTS).astype(np.float16))


def test_one_text(encoder: Encoder) -> None:
    expected = encoder.encode(TEXTS[3])
    for shape in ((48,), (1, 48)):
        out = np.zeros(shape, np.float32)
        assert encoder.encode(TEXTS[3], out=out) is out
        assert np.array_equal(out.reshape(48), expected)
        tensor = torch.zeros(shape)
        assert encoder.encode(TEXTS[3], out=tensor) is tensor
        assert np.array_equal(tensor.numpy().reshape(48), expected)
    row = np.zeros(48, np.float32)
    encoder.encode(TEXTS[3], out=row[None])  # an axis of one, whose stride is 0
    assert np.array_equal(row, expected)
    with pytest.raises(ValueError, match=r"out has the shape \(2, 48\); expected \(48,\) or \(1, 48\)"):
        encoder.encode(TEXTS[3], out=np.zeros((2, 48), np.float32))


def test_cut_norm_and_prompts_of_queries(encoder: Encoder) -> None:
    out = np.zeros((len(TEXTS), 5), np.float32)
    for name in ("encode", "encode_query", "encode_document"):
        call = {"truncate_dim": 5, "normalize_embeddings": True}
        assert getattr(encoder, name)(TEXTS, out=out, **call) is out
        assert np.array_equal(out, getattr(encoder, name)(TEXTS, **call))
        out[:] = 0


@pytest.mark.parametrize(
    ("precision", "dtype", "width"), [("int8", "int8", 48), ("uint8", "uint8", 48), ("binary", "int8", 6), ("ubinary", "uint8", 6)]
)
def test_precisions(encoder: Encoder, precision: Any, dtype: str, width: int) -> None:
    ranges = RANGES if "int" in precision else None
    expected = encoder.encode(TEXTS, precision=precision, ranges=ranges)
    for out in (np.zeros((len(TEXTS), width), dtype), torch.zeros(len(TEXTS), width, dtype=getattr(torch, dtype))):
        assert encoder.encode(iter(TEXTS), out=out, precision=precision, ranges=ranges) is out
        assert np.array_equal(np.asarray(out), expected)
    assert np.abs(expected.astype(int)).max() > 0
    if ranges is not None:
        with pytest.raises(ValueError, match="needs ranges="):
            encoder.encode(TEXTS, out=np.zeros((len(TEXTS), width), dtype), precision=precision)
    with pytest.raises(ValueError, match=rf"out holds float32; for precision '{precision}' expected {dtype}"):
        encoder.encode(TEXTS, out=np.zeros((len(TEXTS), width), np.float32), precision=precision, ranges=ranges)


def test_vectors_that_are_integers_need_no_ranges(checkpoint: Directory) -> None:
    encoder = Encoder(checkpoint("llama"), device="cpu", dtype="float32", output="tanh_int8", normalize=False)
    out = np.zeros((len(TEXTS), 48), np.int8)
    assert encoder.encode(TEXTS, out=out, precision="int8") is out
    assert np.array_equal(out, encoder.encode(TEXTS).astype(np.int8))
    for more in ({"normalize_embeddings": True}, {"variants": [["w5"]] * len(TEXTS)}):
        with pytest.raises(ValueError, match="needs ranges="):
            encoder.encode(TEXTS, out=out, precision="int8", **more)


def test_a_list_that_is_too_long_is_refused_before_anything_is_computed(encoder: Encoder) -> None:
    out = np.full((9, 48), 7, np.float32)
    before = encoder.stats
    with pytest.raises(ValueError, match=r"out has the shape \(9, 48\); expected \(10 or more, 48\)"):
        encoder.encode(TEXTS, out=out)
    assert (out == 7).all()
    assert encoder.stats == before


@pytest.mark.parametrize("rows", [0, 2, 3, 8, 9])
def test_an_iterator_that_is_too_long_fills_the_rows_first(encoder: Encoder, rows: int) -> None:
    out = np.zeros((rows, 48), np.float32)
    with pytest.raises(ValueError, match=f"out has {rows} rows, but there are more inputs"):
        encoder.encode(iter(TEXTS), out=out)
    assert np.array_equal(out, encoder.encode(TEXTS)[:rows])


def test_rows_of_finished_windows_stay(encoder: Encoder) -> None:
    def source() -> Iterator[str]:
        yield from TEXTS[:7]
        raise RuntimeError("the source broke")

    expected = encoder.encode(TEXTS)
    out = np.zeros((10, 48), np.float32)
    with pytest.raises(RuntimeError, match="the source broke"):
        encoder.encode(source(), out=out)
    assert np.array_equal(out[:7], expected[:7])
    assert (out[7:] == 0).all()
    out[:] = 0
    with pytest.raises(TypeError, match="Input 8 is a NoneType"):
        encoder.encode([*TEXTS[:8], None], out=out)  # type: ignore[list-item]
    assert np.array_equal(out[:6], expected[:6])
    assert (out[6:] == 0).all()


@pytest.mark.parametrize("out", [np.zeros((4, 48), np.float16), torch.zeros(4, 48, dtype=torch.float16)])
def test_a_value_that_float16_cannot_hold_names_its_input(encoder: Encoder, out: Any) -> None:
    """65,519 rounds to the largest number of float16, 65,520 to infinity."""

    def given(value: float) -> Iterator[Window]:
        for n in range(4):
            vectors = torch.zeros(1, 48)
            vectors[0, 5] = value if n == 2 else 1.0
            yield Window(vectors, np.array([n]), [], [], [], [], 0, 0)

    with pytest.raises(ValueError, match=r"Input 2 gives a vector with 65520 in it, which float16 cannot hold"):
        fill(given(65520.0), out, None)
    assert out[1, 5] == 1
    assert out[2, 5] == 0
    assert fill(given(-65519.0), out, None) == 4
    assert out[2, 5] == -65504


def read_only() -> np.ndarray:
    out = np.zeros((10, 48), np.float32)
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    ("out", "error", "sentence"),
    [
        ([[0.0] * 48] * 10, TypeError, r"out is a list; expected a numpy array or a torch tensor of shape \(10 or more, 48\)"),
        (np.zeros((10, 48)), ValueError, "out holds float64; for precision 'float32' expected float32 or float16"),
        (np.zeros((10, 48), ">f4"), ValueError, "out holds >f4"),
        (torch.zeros(10, 48, dtype=torch.float64), ValueError, "out holds torch.float64; .* expected float32 or float16 or bfloat16"),
        (np.zeros((10, 48), np.int8), ValueError, "out holds int8"),
        (np.zeros((10, 47), np.float32), ValueError, r"out has the shape \(10, 47\); expected \(10 or more, 48\)"),
        (np.zeros(480, np.float32), ValueError, r"out has the shape \(480,\)"),
        (np.zeros((1, 10, 48), np.float32), ValueError, r"out has the shape \(1, 10, 48\)"),
        (read_only(), ValueError, "out is read-only"),
        (torch.zeros(1, 48).expand(10, 48), ValueError, "out is a broadcast view"),
        (np.lib.stride_tricks.as_strided(np.zeros(48, np.float32), (10, 48), (0, 4)), ValueError, "out is a broadcast view"),
    ],
)
def test_what_cannot_be_written_is_refused(encoder: Encoder, out: Any, error: type[Exception], sentence: str) -> None:
    before = encoder.stats
    with pytest.raises(error, match=sentence):
        encoder.encode(TEXTS, out=out)
    assert encoder.stats == before


def test_what_out_excludes(encoder: Encoder) -> None:
    out = np.zeros((10, 48), np.float32)
    for value in ("token_embeddings", None):
        with pytest.raises(ValueError, match="out= takes sentence embeddings"):
            encoder.encode(TEXTS, out=out, output_value=value)
    with pytest.raises(ValueError, match="convert_to_tensor=True was given with a numpy out"):
        encoder.encode(TEXTS, out=out, convert_to_tensor=True)
    assert encoder.encode(TEXTS, out=out, convert_to_numpy=False) is out
    tensor = torch.zeros(10, 48)
    assert encoder.encode(TEXTS, out=tensor, convert_to_tensor=True) is tensor


def test_a_stream_of_averaged_integers_needs_ranges(checkpoint: Directory) -> None:
    """The mean over templates of whole numbers is none."""
    encoder = Encoder(checkpoint("llama"), device="cpu", dtype="float32", output="tanh_int8", normalize=False)
    templates = (Template(("w5 {text}",)), Template(("w6 {text}",)))
    object.__setattr__(encoder.spec.recipe, "templates", {"": templates})
    with pytest.raises(ValueError, match="needs ranges="):
        encoder.stream(TEXTS, precision="int8")
