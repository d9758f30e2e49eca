"""convert.py: pickled weights become safetensors once, whole or not at all."""

from __future__ import annotations

import collections
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from pyembed import convert as module
from pyembed.convert import DTYPES, convert
from pyembed.weights import weight_files

CHAIN = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense")]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.rand(*shape, generator=generator) * 100).to(dtype)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor.detach()), name


def listing(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def saved(path: Path, tensors: Any, **options: Any) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path, **options)
    return tensors


@pytest.mark.parametrize("zipped", [True, False])
def test_every_dtype(tmp_path: Path, zipped: bool) -> None:
    tensors = {str(dtype): random(3, 5, dtype=dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 7), 'ünïcode "quoted"': random(1), "odd": random(3, dtype=torch.bool)}
    saved(tmp_path / "pytorch_model.bin", tensors, _use_new_zipfile_serialization=zipped)
    before = listing(tmp_path)
    assert convert(tmp_path) == tmp_path
    same(load_file(tmp_path / "model.safetensors"), tensors)
    written = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(written[:8], "little")
    for name, entry in json.loads(written[8 : 8 + size]).items():
        assert name == "__metadata__" or (8 + size + entry["data_offsets"][0]) % tensors[name].itemsize == 0  # aligned
    assert listing(tmp_path).keys() == before.keys() | {"model.safetensors"}
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


KINDS = st.tuples(st.sampled_from(sorted(DTYPES, key=str)), st.integers(0, 9))


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=20), KINDS))
def test_any_names_and_sizes(tmp_path_factory: pytest.TempPathFactory, drawn: dict[str, tuple[torch.dtype, int]]) -> None:
    tmp_path = tmp_path_factory.mktemp("drawn")
    tensors = {"always": random(3), **{name: random(size, dtype=dtype) for name, (dtype, size) in drawn.items() if name != "__metadata__"}}
    saved(tmp_path / "pytorch_model.bin", tensors)
    convert(tmp_path)
    same(load_file(tmp_path / "model.safetensors"), tensors)
    assert int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") % 8 == 0  # the header is padded


def test_tied_shared_and_strided(tmp_path: Path) -> None:
    table = random(6, 4)
    tensors = {
        "embed": table,
        "lm_head": table,  # the same tensor
        "rows": table[2:5],  # a view that starts later
        "columns": table[:, 1:3],
        "turned": table.t(),
        "spread": table[0].expand(3, 4),
        "skipped": table.flatten()[::2],
        "parameter": torch.nn.Parameter(random(2, 2)),
    }
    saved(tmp_path / "pytorch_model.bin", tensors)
    convert(tmp_path)
    same(load_file(tmp_path / "model.safetensors"), tensors)


def shards(directory: Path) -> dict[str, Tensor]:
    first = saved(directory / "pytorch_model-00001-of-00002.bin", {"a": random(4, 4), "b": random(3)})
    second = saved(directory / "pytorch_model-00002-of-00002.bin", collections.OrderedDict(c=random(2, 9, dtype=torch.bfloat16)))
    places = dict.fromkeys(first, "pytorch_model-00001-of-00002.bin") | dict.fromkeys(second, "pytorch_model-00002-of-00002.bin")
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return {**first, **second}


def test_shards(tmp_path: Path) -> None:
    tensors = shards(tmp_path)
    convert(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00001-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }
    files = weight_files(tmp_path)  # checks that each shard holds what the index says
    same({name: tensor for path in files for name, tensor in load_file(path).items()}, tensors)


def model(directory: Path) -> None:
    """A sentence-transformers repository, everything pickled, with files that nobody reads."""
    shards(directory)
    entries = [{"idx": 0, "name": kind, "path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in CHAIN]
    saved(directory / "2_Dense" / "pytorch_model.bin", {"linear.weight": random(3, 4)})
    saved(directory / "checkpoint-9" / "pytorch_model.bin", {"x": random(1)})
    small = ("config.json", "tokenizer.json", "tokenizer.model", "1_Pooling/config.json", "2_Dense/config.json", "README.md")
    for name, text in {**dict.fromkeys(small, "{}"), "modules.json": json.dumps(entries)}.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)


def test_modules(tmp_path: Path) -> None:
    model(tmp_path)
    before = listing(tmp_path)
    convert(tmp_path)
    after = listing(tmp_path)
    assert {name: data for name, data in after.items() if name in before} == before
    assert sorted(after.keys() - before.keys()) == [
        "2_Dense/model.safetensors",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    same(load_file(tmp_path / "2_Dense/model.safetensors"), {"linear.weight": random(3, 4)})
    with pytest.raises(ValueError, match="nothing to convert"):
        convert(tmp_path)
    assert listing(tmp_path) == after


def test_output(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    model(source)
    before = listing(source)
    assert convert(source, output) == output
    assert listing(source) == before
    expected = {"modules.json", "config.json", "tokenizer.json", "tokenizer.model", "1_Pooling/config.json", "2_Dense/config.json"}
    expected |= {
        "2_Dense/model.safetensors",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    assert listing(output).keys() == expected
    assert len(weight_files(output)) == 2
    with pytest.raises(OSError, match=f"{output} exists; give a new directory"):
        convert(source, output)
    half = tmp_path / "half"
    convert(source)
    (source / "2_Dense/model.safetensors").unlink()
    convert(source, half)  # what was converted before goes along
    assert listing(half) == listing(output)


def test_existing_safetensors_stay(tmp_path: Path) -> None:
    saved(tmp_path / "pytorch_model.bin", {"a": random(3)})
    saved(tmp_path / "adapter_model.bin", {"b": random(2)})
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    convert(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"
    same(load_file(tmp_path / "adapter_model.safetensors"), {"b": random(2)})

    other = tmp_path / "other"
    other.mkdir()
    shards(other)
    (other / "model-00002-of-00002.safetensors").write_bytes(b"mine")
    before = listing(other)
    with pytest.raises(OSError, match=r"model-00002-of-00002\.safetensors exists and is not overwritten"):
        convert(other)
    assert listing(other) == before


class Exploit:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("PWNED",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "pytorch_model.bin", {"a": random(3), "b": Exploit()}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is refused: reading it would run \w+\.mkdir") as caught:
        convert(tmp_path)
    assert caught.value.__cause__ is not None
    assert listing(tmp_path).keys() == {"pytorch_model.bin"}
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, -30])
def test_damaged(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "pytorch_model.bin"
    saved(path, {"a": random(300)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is refused: it is damaged or no PyTorch file"):
        convert(tmp_path)
    assert listing(tmp_path).keys() == {"pytorch_model.bin"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.ones(1)], "holds list; expected tensors by name"),
        ({}, "holds dict; expected tensors by name"),
        ({"state_dict": {"a": torch.ones(1)}}, "'state_dict' is dict; expected only dense tensors"),
        ({3: torch.ones(1)}, "3 is a torch.strided tensor"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "'a' is a torch.strided tensor of torch.complex64"),
        ({"a": torch.ones(2, 2).to_sparse()}, "'a' is a torch.sparse_coo tensor"),
    ],
)
def test_not_tensors_by_name(tmp_path: Path, content: Any, sentence: str) -> None:
    saved(tmp_path / "pytorch_model.bin", content)
    with pytest.raises(ValueError, match=sentence):
        convert(tmp_path)
    assert listing(tmp_path).keys() == {"pytorch_model.bin"}


def test_nothing_to_convert(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} has nothing to convert"):
        convert(tmp_path)
    with pytest.raises(OSError, match="is not a directory"):
        convert(tmp_path / "gone")


@pytest.mark.parametrize("shard", ["../x.bin", "/x.bin", "sub/x.bin", "x.txt"])
def test_an_index_that_leads_out(tmp_path: Path, shard: str) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin\.index\.json: ") as caught:
        convert(tmp_path)
    assert repr(shard) in str(caught.value)


def test_an_index_that_is_wrong(tmp_path: Path) -> None:
    shards(tmp_path)
    index = tmp_path / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], "d": "pytorch_model-00002-of-00002.bin"}}))
    before = listing(tmp_path)
    with pytest.raises(ValueError, match="names d, which none of its files holds"):
        convert(tmp_path)
    saved(tmp_path / "pytorch_model-00002-of-00002.bin", {"b": random(3), "c": random(1), "d": random(1)})
    with pytest.raises(ValueError, match=r"holds b, which model-00001-of-00002\.safetensors holds too"):
        convert(tmp_path)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(OSError, match=r"nothing is left of the attempt: .*pytorch_model-00002-of-00002\.bin"):
        convert(tmp_path)
    assert listing(tmp_path).keys() == before.keys() - {"pytorch_model-00002-of-00002.bin"}


@pytest.mark.parametrize("to", [None, "output"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, to: str | None) -> None:
    source = tmp_path / "source"
    shards(source)
    saved(source / "pytorch_model-00002-of-00002.bin", {"c": random(300_000)})
    before = listing(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # the first shard fits, the second does not
    try:
        with pytest.raises(OSError, match="could not be converted, and nothing is left of the attempt") as caught:
            convert(source, None if to is None else tmp_path / to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(caught.value.__cause__, OSError)
    assert listing(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_name_appears_only_when_its_bytes_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "pytorch_model.bin", {"a": random(3)})
    synced: list[set[str]] = []

    def fsync(handle: int) -> None:
        assert os.fstat(handle).st_size == (tmp_path / "model.safetensors.partial").stat().st_size > 12
        synced.append({path.name for path in tmp_path.iterdir()})

    monkeypatch.setattr(module.os, "fsync", fsync)
    convert(tmp_path)
    assert synced == [{"pytorch_model.bin", "model.safetensors.partial"}]
    assert listing(tmp_path).keys() == {"pytorch_model.bin", "model.safetensors"}


def test_another_conversion_at_work(tmp_path: Path) -> None:
    saved(tmp_path / "pytorch_model.bin", {"a": random(3)})
    (tmp_path / "model.safetensors.partial").write_bytes(b"theirs")
    with pytest.raises(OSError, match=r"model\.safetensors\.partial exists and is not overwritten; remove it"):
        convert(tmp_path)
    assert (tmp_path / "model.safetensors.partial").read_bytes() == b"theirs"
