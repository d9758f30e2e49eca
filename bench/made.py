"""Models with random weights and texts of a given length, for benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

import pyembed

SHAPE = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
VOCABULARY = 151669
KINDS: dict[str, dict[str, Any]] = {  # what config.json says beside the sizes
    "qwen3": {
        "architectures": ["Qwen3Model"],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
    "mistral": {"architectures": ["MistralModel"], "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": None},
}


def made(
    directory: Path,
    layers: int,
    corpus: list[str],
    shape: dict[str, int] = SHAPE,
    vocabulary: int = VOCABULARY,
    deviation: float | None = None,
    *,
    kind: str = "qwen3",
    device: str = "cpu",
) -> Path:
    """A Qwen3-Embedding, of 0.6B unless another shape is given, with random weights and a tokenizer trained on the corpus; or a Mistral.

    Weights are drawn on `device` and saved in bfloat16. `deviation` of all matrices; None: 1 / sqrt(in), and 1 for the embeddings.
    """
    width, inner, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    config = shape | {"model_type": kind, "vocab_size": vocabulary, "num_hidden_layers": layers, "torch_dtype": "bfloat16"}
    config |= {"max_position_embeddings": 32768, "hidden_act": "silu"} | KINDS[kind]
    (directory / "config.json").write_text(json.dumps(config))
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
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        numbers = torch.randn(shape, generator=generator, device=device)
        return (numbers * (shape[-1] ** -0.5 if deviation is None else deviation)).bfloat16().cpu()

    queries, keys = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    embeddings = drawn(vocabulary, width) * (width**0.5 if deviation is None else 1)
    tensors = {"embed_tokens.weight": embeddings, "norm.weight": torch.ones(width).bfloat16()}
    for n in range(layers):
        at = f"layers.{n}."
        rows = {"q": queries, "k": keys, "v": keys}
        tensors |= {f"{at}self_attn.{name}_proj.weight": drawn(size, width) for name, size in rows.items()}
        tensors |= {f"{at}self_attn.o_proj.weight": drawn(width, queries), f"{at}mlp.down_proj.weight": drawn(width, inner)}
        tensors |= {f"{at}mlp.{name}_proj.weight": drawn(inner, width) for name in ("gate", "up")}
        if kind == "qwen3":
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
