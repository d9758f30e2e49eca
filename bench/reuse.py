"""What is not computed twice, on a 0.6B causal shape with random weights: prompts run once, a last layer for the rows that are read.

    python bench/reuse.py CORPUS.jsonl [--layers 28] [--texts 64] [--rounds 5] [--threads 2] [--peer] [--encoder DIR] [-o FILE.json]

Ten-token queries under a 25-token instruction and under a 300-token few-shot prefix: with the prefix kept, with it made anew, without
reuse, without reuse and pruning, and (--peer) sentence-transformers in bfloat16 at its best batch of {4, 16, 64}. Members of a case run
one after the other in every round, medians; vectors are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from minilm import cpu_name, seconds, worst_cosine
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

import pyembed
from pyembed import runner

SHAPE = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
VOCABULARY = 151669


def made(directory: Path, layers: int, corpus: list[str], shape: dict[str, int] = SHAPE, vocabulary: int = VOCABULARY) -> Path:
    """A Qwen3-Embedding, of 0.6B unless another shape is given, with random weights and a tokenizer trained on the corpus."""
    width, inner, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    config = shape | {"model_type": "qwen3", "architectures": ["Qwen3Model"], "vocab_size": vocabulary, "num_hidden_layers": layers}
    config |= {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu", "torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config | {"attention_bias": False, "tie_word_embeddings": True}))
    kinds = ("Transformer", "Pooling", "Normalize")
    places = [f"{n}_{kind}" if n else "" for n, kind in enumerate(kinds)]
    entries = [
        {"idx": n, "name": str(n), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for n, (kind, place) in enumerate(zip(kinds, places, strict=True))
    ]
    (directory / "modules.json").write_text(json.dumps(entries))
    (directory / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": width, "pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=min(8000, vocabulary), special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    specials = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(specials | {"model_max_length": 32768}))
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).bfloat16()

    queries, keys = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    tensors = {"embed_tokens.weight": drawn(vocabulary, width) * width**0.5, "norm.weight": torch.ones(width).bfloat16()}
    for n in range(layers):
        at = f"layers.{n}."
        rows = {"q": queries, "k": keys, "v": keys}
        tensors |= {f"{at}self_attn.{name}_proj.weight": drawn(size, width) for name, size in rows.items()}
        tensors |= {f"{at}self_attn.o_proj.weight": drawn(width, queries), f"{at}mlp.down_proj.weight": drawn(width, inner)}
        tensors |= {f"{at}mlp.{name}_proj.weight": drawn(inner, width) for name in ("gate", "up")}
        tensors |= {f"{at}self_attn.{name}_norm.weight": torch.ones(head).bfloat16() for name in "qk"}
        tensors |= {f"{at}{name}_layernorm.weight": torch.ones(width).bfloat16() for name in ("input", "post_attention")}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def of_tokens(encoder: pyembed.Encoder, corpus: list[str], count: int, texts: int) -> list[str]:
    """Different texts of exactly `count` tokens, cut from the corpus."""
    found = []
    for text in dict.fromkeys(" ".join(each.split()) for each in corpus):
        ends = encoder.tokenizer.ends(text)
        if len(ends) >= count and len(encoder.tokenizer.ends(text[: ends[count - 1]])) == count:
            found.append(text[: ends[count - 1]])
        if len(found) == texts:
            return found
    raise ValueError(f"The corpus has only {len(found)} texts of {count} tokens; {texts} were asked for.")


def unpruned(encoder: pyembed.Encoder, texts: list[str], prompt: str | None) -> Any:
    """Vectors with a last layer that computes every row."""
    keep, runner.keep = runner.keep, lambda *_: None  # type: ignore[assignment]
    try:
        return encoder.encode(texts, prompt=prompt)
    finally:
        runner.keep = keep


def cases_of(
    on: pyembed.Encoder, off: pyembed.Encoder, peer: Any, queries: list[str], prompt: str, *, noise: bool
) -> dict[str, Callable[[], Any]]:
    """What is compared under one prompt; vectors are checked first. `noise`: also the same thing twice, and what pruning gains."""

    def anew() -> Any:
        on._loaded.prefixes.runs.clear()  # type: ignore[union-attr]
        return on.encode(queries, prompt=prompt)

    cases: dict[str, Callable[[], Any]] = {
        "prefix kept": lambda: on.encode(queries, prompt=prompt),
        "prefix made anew": anew,
        "no reuse": lambda: off.encode(queries, prompt=prompt),
    }
    if noise:
        cases["no reuse again"] = lambda: off.encode(queries, prompt=prompt)
        cases["no reuse, no pruning"] = lambda: unpruned(off, queries, prompt)
    right = unpruned(off, queries, prompt)
    for each in ("prefix kept", "no reuse"):
        assert worst_cosine(cases[each](), right) > 0.9999, each
    if peer is not None:
        times = {size: seconds(lambda size=size: peer.encode(queries, prompt=prompt, batch_size=size)) for size in (4, 16, 64)}
        best = min(times, key=times.__getitem__)
        assert worst_cosine(peer.encode(queries, prompt=prompt, batch_size=best), right) > 0.99
        cases[f"sentence-transformers, best batch ({best})"] = lambda: peer.encode(queries, prompt=prompt, batch_size=best)
    return cases


def measure(cases: dict[str, Callable[[], Any]], rounds: int, base: str, texts: int) -> dict[str, list[float]]:
    """Seconds of each case in every round, printed beside those of `base`."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, work in cases.items():
            found[name].append(seconds(work))
    for name, each in found.items():
        middle = statistics.median(each)
        print(f"  {middle:8.3f} s  {texts / middle:8.1f} texts/s  {statistics.median(found[base]) / middle:6.2f} x  {name}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="JSONL with a text field (bench/docstrings.py writes one)")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--encoder", help="directory of all-MiniLM-L6-v2: also the gain of pruning for an encoder pooled at its first token"
    )
    parser.add_argument("--peer", action="store_true", help="also sentence-transformers")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    corpus = [json.loads(line)["text"] for line in Path(options.corpus).read_text(encoding="utf-8").splitlines()]
    record: dict[str, Any] = {
        "command": f"python bench/reuse.py CORPUS --layers {options.layers} --texts {options.texts} --rounds {options.rounds}",
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "threads": options.threads},
        "versions": {"pyembed": pyembed.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        directory = made(Path(folder), options.layers, corpus)
        on = pyembed.Encoder(directory, device="cpu", dtype="bfloat16")
        off = pyembed.Encoder(directory, device="cpu", dtype="bfloat16", prefix_cache_bytes=0)
        peer: Any = None
        if options.peer:
            from sentence_transformers import SentenceTransformer

            peer = SentenceTransformer(str(directory), device="cpu", model_kwargs={"dtype": "bfloat16"})
        queries = of_tokens(on, corpus, 10, options.texts)
        for name, count in (("instruction of 25 tokens", 25), ("few-shot prefix of 300 tokens", 300)):
            prompt = of_tokens(on, corpus, count, 1)[0]
            cases = cases_of(on, off, peer, queries, prompt, noise=count == 25)
            print(f"\n{name}, {len(queries)} queries of 10 tokens, {options.layers} layers, medians of {options.rounds} rounds")
            measured = measure(cases, options.rounds, "no reuse", len(queries))
            equal = np.array_equal(on.encode(queries, prompt=prompt), off.encode(queries, prompt=prompt))
            record["cases"][name] = {"equal bits": bool(equal), "seconds": measured}
    if options.encoder:
        encoder, texts = pyembed.Encoder(options.encoder, device="cpu", pooling="cls"), corpus[:1000]
        print(f"\n{encoder.spec.model.num_layers}-layer encoder pooled at its first token, {len(texts)} docstrings")
        cases = {
            "pruned": lambda: encoder.encode(texts),
            "pruned again": lambda: encoder.encode(texts),
            "whole": lambda: unpruned(encoder, texts, None),
        }
        record["cases"]["encoder, cls"] = {"seconds": measure(cases, options.rounds, "whole", len(texts))}
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
