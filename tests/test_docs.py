"""The code that the documents print runs as printed, with tiny models in place of the published ones."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_lora import train
from test_recipes import of_type  # noqa: F401 - a fixture

from pyembed import Encoder, hub, sparse
from pyembed.options import cores

ROOT = Path(__file__).parent.parent
Made = Callable[[str, bool], Path]


def blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def published(of_type: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """hub.resolve gives a tiny model of the type of each id; a folder of copies is returned."""
    llama, qwen = of_type("llama", True), of_type("qwen3", False)
    copies = tmp_path / "models"
    shutil.copytree(llama, copies / "llama-3")
    shutil.copytree(of_type("mistral", False), copies / "gritlm-7b")
    for seed, name in enumerate(("mntp", "supervised")):
        train(llama, copies / name, seed=seed, target_modules="all-linear")
    jina = tmp_path / "jina"
    shutil.copytree(of_type("jina_embeddings_v5", False), jina)
    for seed, name in enumerate(("retrieval", "text-matching")):
        train(qwen, jina / "adapters" / name, seed=seed, target_modules="all-linear")
    mntp = "McGill-NLP/LLM2Vec-Meta-Llama-3-8B-Instruct-mntp"
    places = {
        "Qwen/Qwen3-Embedding-0.6B": qwen,
        mntp: copies / "mntp",
        f"{mntp}-supervised": copies / "supervised",
        "jinaai/jina-embeddings-v5-text-small": jina,
        "BAAI/bge-en-icl": of_type("mistral", False),
        "facebook/opt-2.7b": of_type("opt", False),
        "meta-llama/Meta-Llama-3-8B-Instruct": llama,
    }
    real = hub.resolve

    def resolve(model: Any, **arguments: Any) -> Path:
        if str(model) not in places:
            return real(model, **arguments)
        arguments["check"](places[str(model)])
        return places[str(model)]

    monkeypatch.setattr(hub, "resolve", resolve)
    monkeypatch.setattr(sparse, "nltk_words", lambda: str.split)
    torch.set_num_threads(1)
    return copies


@pytest.mark.parametrize("number", range(len(blocks("docs/models.md"))))
def test_the_page_of_models_runs(published: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    code = blocks("docs/models.md")[number].replace('"/models/', f'"{published}/')
    if "Meta-Llama-3-8B-Instruct" in code and "encode_sparse" in code:  # a head for the logits
        from pyembed import weights

        def head(directory: Path, config: Any, names: Any, tokens: torch.Tensor, adapters: Any = ()) -> Any:
            return weights.Dense(tokens, None, packed=False)

        monkeypatch.setattr(weights, "load_vocabulary", head)
    space: dict[str, Any] = {}
    exec("from pyembed import Encoder\n" + code, space)
    for name in ("vectors", "queries", "documents", "dense"):
        assert name not in space or np.isfinite(space[name]).all()


def test_the_readme_runs(minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("README.md")
    (tmp_path / "huge.txt").write_text("one\ntwo\n")
    monkeypatch.chdir(tmp_path)
    exec(block.replace("sentence-transformers/all-MiniLM-L6-v2", str(minilm)), {})
    assert "The Nile flows north." in capsys.readouterr().out


def test_the_page_of_throughput_runs(minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["Paris is the capital of France.", "A tomato is a berry.", "The Nile flows north."]
    (tmp_path / "huge.txt").write_text("".join(f"{line}\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    encoder = Encoder(minilm, device="cpu", prompts={"document": "read: "})
    space: dict[str, Any] = {"encoder": encoder, "docs": lines}
    plan, file, ids, several = blocks("docs/throughput.md")
    exec(plan, space)
    exec(file.replace("1_000_000", "5"), space)
    assert np.array_equal(np.load(tmp_path / "huge.npy")[:3], encoder.encode(lines).astype(np.float16))
    assert len(space["vectors"]) == 3
    exec(ids, space)
    assert np.array_equal(space["vectors"], encoder.encode_document(lines))
    if len(cores()) > 1:
        exec(several.replace("sentence-transformers/all-MiniLM-L6-v2", str(minilm)), space)
        assert len(space["encoder"].devices) == len(space["vectors"]) == 2
