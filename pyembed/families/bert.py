"""BERT, RoBERTa, XLM-RoBERTa and CamemBERT: post-norm encoders with learned positions and a plain GELU MLP."""

from __future__ import annotations

from typing import Literal, cast

from pyembed.config import Family, ModelConfig, TensorNames
from pyembed.families.common import MOST_LAYERS, activation, norm_eps
from pyembed.jsonfile import Fields


def read(fields: Fields) -> ModelConfig:
    """config.json of a BERT-like encoder. RoBERTa types number positions from pad_token_id + 1, so their tables hold fewer tokens."""
    kind = fields.get("model_type", str)
    positions = fields.get("position_embedding_type", str, "absolute")
    if positions != "absolute":
        raise ValueError(f"{fields.path}: position_embedding_type {positions!r} is not supported; expected 'absolute'.")
    if fields.get("is_decoder", bool, False):
        raise ValueError(f"{fields.path}: is_decoder is true; pyembed runs BERT-like models as encoders.")
    heads = fields.positive("num_attention_heads")
    hidden = fields.positive("hidden_size")
    if hidden % heads:
        raise ValueError(f"{fields.path}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}.")
    act = activation(fields, "hidden_act", "gelu")
    if act == "silu":
        raise ValueError(f"{fields.path}: hidden_act 'silu' is not supported without a gate; expected a GELU.")
    layers = fields.positive("num_hidden_layers", most=MOST_LAYERS)
    offset = 0 if kind == "bert" else fields.get("pad_token_id", int, 1) + 1
    rows = fields.positive("max_position_embeddings", 512)
    if not 0 <= offset < rows:
        raise ValueError(f"{fields.path}: {rows} positions from pad_token_id + 1 = {offset} on leave none for a text.")
    return ModelConfig(
        family="bert",
        vocab_size=fields.positive("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.positive("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_positions=rows - offset,
        norm_eps=norm_eps(fields, "layer_norm_eps", 1e-12),
        block="post",
        norm="layer",
        activation=cast("Literal['silu', 'gelu', 'gelu_tanh']", act),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        bias=True,
        attention_scale=(hidden // heads) ** -0.5,
        causal=False,
        windows=(None,) * layers,
        position_offset=offset,
        position_pad=offset - 1 if kind != "bert" else None,
        position_rows=rows,
        type_rows=fields.positive("type_vocab_size", 2),
        embedding_norm=True,
        final_norm=False,
    )


FAMILY = Family(
    name="bert",
    model_types=("bert", "roberta", "xlm-roberta", "camembert"),
    read=read,
    decoder=False,
    tensors=TensorNames(
        prefixes=("bert.", "roberta.", "0.auto_model.", "model."),
        tokens="embeddings.word_embeddings",
        positions="embeddings.position_embeddings",
        types="embeddings.token_type_embeddings",
        embedding_norm="embeddings.LayerNorm",
        layers="encoder.layer.{n}.",
        qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
        out="attention.output.dense",
        attention_norm="attention.output.LayerNorm",
        up=("intermediate.dense",),
        down="output.dense",
        mlp_norm="output.LayerNorm",
        ignored=(r"(.*\.)?position_ids", r"pooler\..*", r"cls\..*", r"lm_head\..*"),
    ),
)
