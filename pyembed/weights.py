"""safetensors to Weights: tensors are copied one at a time from the mapped file into their merged, converted, final place."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyembed import latent, lora
from pyembed.alibi import Alibi
from pyembed.blocks import Layer, PerLayer
from pyembed.config import DenseConfig, ModelConfig, TensorNames
from pyembed.jsonfile import Fields
from pyembed.linear import Dense, Linear, Read, linear, packable
from pyembed.model import Head, Weights
from pyembed.ops import Norm
from pyembed.rope import Rotary
from pyembed.tensorfile import FLOATS, Shapes, open_safetensors, shorten, strip_prefix

FOLDED_ROWS = 4096  # of the token table at a time, where a projection is folded into it


class TensorFiles:
    """The tensors of one or several safetensors files by name, checked against what is expected before any is read.

    `adapters` are the directories of LoRA adapters that are merged, in this order, into each tensor as it is copied.
    """

    def __init__(
        self, paths: Sequence[Path], prefixes: Sequence[str] = (), ignored: Sequence[str] = (), adapters: Sequence[Path] = ()
    ) -> None:
        self.paths = list(paths)
        self.adapters = [lora.read(directory, prefixes, ignored) for directory in adapters]
        self.places: dict[str, tuple[Any, str, Path]] = {}  # canonical name -> open file, its name there, path
        skip = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or r"(?!)")
        for path in self.paths:
            file = open_safetensors(path)
            for name in file.keys():  # noqa: SIM118 - not a dict
                short = strip_prefix(name, prefixes)
                if skip.fullmatch(name) or skip.fullmatch(short):
                    continue
                short = re.sub(r"(LayerNorm)\.gamma$", r"\1.weight", re.sub(r"(LayerNorm)\.beta$", r"\1.bias", short))
                if short in self.places:
                    other = self.places[short]
                    raise ValueError(f"{path}: tensor {name!r} is there twice, also in {other[2]} as {other[1]!r}.")
                self.places[short] = (file, name, path)

    def check(self, expected: Shapes) -> None:
        """ValueError that lists every missing, unexpected and misshapen tensor."""
        where = str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0].parent} ({len(self.paths)} files)"
        missing, extra = sorted(expected.keys() - self.places.keys()), sorted(self.places.keys() - expected.keys())
        wrong = []
        for name in expected.keys() & self.places.keys():
            file, stored, path = self.places[name]
            part = file.get_slice(stored)
            shape = tuple(part.get_shape())
            if shape != expected[name]:
                wrong.append(f"{stored} in {path.name} has shape {list(shape)}, config.json says {list(expected[name])}")
            if part.get_dtype() not in FLOATS:
                wrong.append(f"{stored} in {path.name} is {part.get_dtype()}; expected one of {', '.join(FLOATS)}")
        found = {"missing": missing, "not expected": extra, "wrong": sorted(wrong)}
        problems = [f"{kind}: {shorten(names)}" for kind, names in found.items() if names]
        if problems:
            raise ValueError(f"The tensors of {where} do not fit its config.json; " + "; ".join(problems) + ".")
        for adapter in self.adapters:
            lora.check(adapter, expected)

    def copy(self, name: str, to: Tensor) -> None:
        """Copy a tensor into its place, whose shape may split the file's dimensions, merged and converted to its dtype.

        ValueError naming it when a value is not finite there.
        """
        file, stored, path = self.places[name]
        updates = [adapter.updates[name] for adapter in self.adapters if name in adapter.updates]
        tensor = file.get_tensor(stored)
        if updates:
            merged = to if to.shape == tensor.shape else torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
            lora.merge(tensor, updates, merged)
            tensor = merged
        if tensor is not to:
            to.copy_(tensor.view(to.shape))
        check_finite(to, lambda: file.get_tensor(stored), stored, path)

    def part(self, name: str, device: torch.device, dtype: torch.dtype, *at: slice) -> Tensor:
        """A tensor, or the slices `at` of it, on `device` in `dtype`, without reading the rest. ValueError as `copy`."""
        file, stored, path = self.places[name]
        if any(name in adapter.updates for adapter in self.adapters):
            raise ValueError(f"An adapter changes {stored!r} of {path}, which is read in parts and cannot be merged with it.")
        made: Tensor = file.get_slice(stored)[at or (slice(None),)].to(device, dtype)
        check_finite(made, lambda: file.get_tensor(stored), stored, path)
        return made


def check_finite(made: Tensor, source: Callable[[], Tensor], stored: str, path: Path) -> None:
    """ValueError naming the tensor when a value of it is not finite as converted; `source` reads it again to say why."""
    low, high = torch.aminmax(made)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        finite = all(torch.isfinite(bound) for bound in torch.aminmax(source()))
        reason = f"values that overflow {made.dtype}; choose another dtype" if finite else "NaN or infinite values"
        raise ValueError(f"{path}: tensor {stored!r} has {reason}.")


def weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the shards of its index. OSError / ValueError with the way out when there is none."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        if any(directory.glob("pytorch_model*.bin*")):
            raise ValueError(
                f"{directory} has its weights only as pickles (.bin), which pyembed does not read; run `pyembed convert {directory}` once."
            )
        raise FileNotFoundError(f"{directory} has no weights: neither model.safetensors nor model.safetensors.index.json is there.")
    weight_map = Fields.of(index).get("weight_map", dict)
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if Path(shard).name != shard:
            raise ValueError(f"{index} names the shard {shard!r}; expected a file beside it.")
        if not (directory / shard).is_file():
            raise FileNotFoundError(f"{index} names the shard {shard}, which is not in {directory}; download it again.")
    for shard in shards:
        held = set(open_safetensors(directory / shard).keys())
        absent = sorted(name for name, place in weight_map.items() if place == shard and name not in held)
        if absent:
            raise ValueError(f"{index} says that {shard} holds {shorten(absent)}; it does not.")
    return [directory / shard for shard in shards]


def expected_shapes(config: ModelConfig, names: TensorNames) -> Shapes:
    """Every tensor that the forward pass reads, with its shape."""
    hidden, heads = config.hidden_size, config.num_heads
    shapes: Shapes = {f"{names.tokens}.weight": (config.vocab_size, config.token_dim or hidden)}
    if config.token_dim is not None:
        shapes[f"{names.token_projection}.weight"] = (hidden, config.token_dim)

    def add_norm(name: str | None, size: int = hidden) -> None:
        if name is not None:
            shapes[f"{name}.weight"] = (size,)
            if config.norm == "layer":
                shapes[f"{name}.bias"] = (size,)

    def add_linear(name: str, out: int, width: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (out, width)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    if names.positions is not None:
        shapes[f"{names.positions}.weight"] = (config.position_rows, hidden)
    if names.types is not None:
        shapes[f"{names.types}.weight"] = (config.type_rows, hidden)
    add_norm(names.embedding_norm if config.embedding_norm else None)
    add_norm(names.final_norm if config.final_norm else None)
    if config.projection_dim is not None:
        assert names.projection is not None, config.family
        add_linear(names.projection, config.projection_dim, hidden, False)
    if config.latent is not None:
        assert names.latent is not None, config.family
        shapes |= latent.shapes(config.latent, hidden, names.latent)
    extra, extra_dim = names.per_layer, config.per_layer_dim
    if extra is not None and extra_dim is not None:
        add_linear(extra.project, config.num_layers * extra_dim, hidden, False)
        add_norm(extra.project_norm, extra_dim)
    for n in range(config.num_layers):
        at = names.layers.format(n=n)
        groups, width = config.heads_at(n)
        counts = (heads + 2 * groups,) if len(names.qkv) == 1 else (heads, groups, groups)
        for name, count in zip(names.qkv, counts, strict=True):
            add_linear(at + name, count * width, hidden, config.qkv_bias)
        add_linear(at + names.out, hidden, heads * width, config.out_bias)
        for name in names.up:
            merged = 2 if config.gated and len(names.up) == 1 else 1
            add_linear(at + name, merged * config.intermediate_size, hidden, config.bias)
        add_linear(at + names.down, hidden, config.intermediate_size, config.bias)
        for norm_name in (names.attention_norm, names.mlp_norm, names.post_attention_norm, names.post_mlp_norm):
            add_norm(at + norm_name if norm_name else None)
        if config.qk_norm:
            add_norm(f"{at}{names.q_norm}", width)
            add_norm(f"{at}{names.k_norm}", width)
        if extra is not None and extra_dim is not None:
            add_linear(at + extra.gate, extra_dim, hidden, False)
            add_linear(at + extra.out, hidden, extra_dim, False)
            add_norm(at + extra.norm)
            shapes[at + extra.scale] = (1,)
    return shapes


def unread(config: ModelConfig, names: TensorNames) -> list[str]:
    """Patterns of the tensors that stand in the file but not in the config: those of layers left out, and of what follows them."""
    if not config.unread_layers:
        return []
    layers = range(config.num_layers, config.num_layers + config.unread_layers)
    after = [name for name in (names.final_norm, names.projection) if name is not None]
    return [re.escape(name) + r".*" for name in (*(names.layers.format(n=n) for n in layers), *(f"{name}." for name in after))]


def matrices(names: TensorNames) -> tuple[tuple[str, ...], ...]:
    """The linear layers of a block, each with the parts it is merged from."""
    extra = () if names.per_layer is None else ((names.per_layer.gate,), (names.per_layer.out,))
    return (names.qkv, (names.out,), names.up, (names.down,), *extra)


def unbiased(weight: Tensor) -> tuple[Tensor, None]:
    return weight, None


def load(
    directory: Path,
    config: ModelConfig,
    names: TensorNames,
    dense: Sequence[tuple[Path, DenseConfig]],
    device: torch.device,
    dtype: torch.dtype,
    adapters: Sequence[Path] = (),
    make: Callable[[Read, bool], Linear] = lambda read, gated: linear(*read(), gated=gated),
) -> Weights:
    """The weights of `directory`, with LoRA `adapters` merged in this order, on `device` in `dtype`; norms, the projection and Dense
    modules in float32. The head that gives logits is not among them (`load_vocabulary`). `make` makes the linear layers of the blocks,
    the gated ones among them or not, and may read later what they are made of.

    Beyond the weights the process holds one matrix: where packing copies anyway, matrices are merged and converted in one scratch
    buffer, because freeing and allocating one each time leaves holes in the heap (measured: 1.21 x the weights instead of 1.06).
    """
    files = TensorFiles(weight_files(directory), names.prefixes, (*names.ignored, *unread(config, names)), adapters)
    shapes = expected_shapes(config, names)
    files.check(shapes)

    largest = max(
        sum(math.prod(shapes[f"{names.layers.format(n=n)}{part}.weight"]) for part in parts)
        for n in range(config.num_layers)
        for parts in matrices(names)
    )
    scratch = torch.empty(largest, dtype=dtype, device=device) if packable(device, dtype) else None

    def tensor(*parts: str, dtype: torch.dtype = dtype, into: Tensor | None = None, by_head: bool = False) -> Tensor:
        rows = [shapes[part][0] for part in parts]
        shape = (sum(rows), *shapes[parts[0]][1:])
        merged = torch.empty(shape, dtype=dtype, device=device) if into is None else into[: math.prod(shape)].view(shape)
        for part, place in zip(parts, merged.split(rows), strict=True):
            # the file's rows [H, 3, K] go where [3, H, K] has them
            files.copy(part, place.unflatten(0, (3, config.num_heads, config.head_dim)).transpose(0, 1) if by_head else place)
        return merged

    def linear_of(at: str, parts: Sequence[str], rows: slice = slice(None), *, by_head: bool = False, gated: bool = False) -> Linear:
        def read() -> tuple[Tensor, Tensor | None]:
            weight = tensor(*(f"{at}{part}.weight" for part in parts), into=scratch, by_head=by_head)
            biased = f"{at}{parts[0]}.bias" in shapes
            bias = tensor(*(f"{at}{part}.bias" for part in parts), by_head=by_head) if biased else None
            some = weight[rows] if scratch is not None or rows == slice(None) else weight[rows].clone()
            return some, None if bias is None else bias[rows].clone()

        return make(read, gated)

    def queries_apart(at: str, parts: Sequence[str], queries: int, *, by_head: bool) -> tuple[Linear, ...]:
        return tuple(linear_of(at, parts, rows, by_head=by_head) for rows in (slice(0, queries), slice(queries, None)))

    def token_table() -> Tensor:
        if config.token_dim is None:
            return tensor(f"{names.tokens}.weight")
        narrow = tensor(f"{names.tokens}.weight", dtype=torch.float32)
        projection = tensor(f"{names.token_projection}.weight", dtype=torch.float32)
        table = torch.empty((config.vocab_size, config.hidden_size), dtype=dtype, device=device)
        for rows, place in zip(narrow.split(FOLDED_ROWS), table.split(FOLDED_ROWS), strict=True):
            place.copy_(rows @ projection.T)  # in float32, so that a row is rounded once
        return table

    def norm(name: str | None) -> Norm | None:
        if name is None or f"{name}.weight" not in shapes:
            return None
        weight = tensor(f"{name}.weight", dtype=torch.float32)
        layer = config.norm == "layer"
        return Norm(
            weight=weight + 1 if config.norm == "rms_plus_one" else weight,
            bias=tensor(f"{name}.bias", dtype=torch.float32) if layer else None,
            eps=config.norm_eps,
            layer=layer,
            round_first=config.norm == "rms",
        )

    def needed(name: str) -> Norm:
        made = norm(name)
        assert made is not None, name
        return made

    def per_layer() -> list[PerLayer | None]:
        extra, width = names.per_layer, config.per_layer_dim
        if extra is None or width is None:
            return [None] * config.num_layers
        # the projection is divided by sqrt(D) before its norm, which is as if the norm's epsilon were D times as large
        projected = replace(needed(extra.project_norm), eps=config.norm_eps * config.hidden_size)
        made: list[PerLayer | None] = []
        for n, rows in enumerate(tensor(f"{extra.project}.weight").split(width)):
            at = names.layers.format(n=n)
            gate, out = linear_of(at, (extra.gate,)), linear_of(at, (extra.out,))
            scale = float(tensor(at + extra.scale))
            made.append(PerLayer(make(partial(unbiased, rows), False), projected, gate, out, needed(at + extra.norm), scale))
        return made

    def layers() -> Iterator[Layer]:
        mixed = per_layer()
        for n in range(config.num_layers):
            at = names.layers.format(n=n)
            attention_norm = needed(at + names.attention_norm)
            groups, width = config.heads_at(n)
            yield Layer(
                num_key_value_heads=groups,
                head_dim=width,
                qkv=queries_apart(at, names.qkv, config.num_heads * width, by_head=names.qkv_by_head)
                if n + 1 == config.num_layers
                else (linear_of(at, names.qkv, by_head=names.qkv_by_head),),
                out=linear_of(at, (names.out,)),
                up=linear_of(at, names.up, gated=config.gated),
                down=linear_of(at, (names.down,)),
                attention_norm=attention_norm,
                mlp_norm=attention_norm if names.mlp_norm == names.attention_norm else needed(at + names.mlp_norm),
                post_attention_norm=norm(names.post_attention_norm and at + names.post_attention_norm),
                post_mlp_norm=norm(names.post_mlp_norm and at + names.post_mlp_norm),
                q_norm=norm(names.q_norm and at + names.q_norm),
                k_norm=norm(names.k_norm and at + names.k_norm),
                v_norm=Norm(None, None, config.norm_eps) if config.v_norm else None,
                per_layer=mixed[n],
                window=config.windows[n],
                rope=config.rope_of_layer[n] if config.rope_of_layer else None,
            )

    def projection() -> Linear | None:
        if config.projection_dim is None:
            return None
        return linear(tensor(f"{names.projection}.weight", dtype=torch.float32), None)

    # transformers multiplies by the scale as rounded to the weights' dtype
    rounded = replace(config, embed_scale=float(torch.tensor(config.embed_scale, dtype=torch.float64, device="cpu").to(dtype)))
    return Weights(
        config=rounded,
        tokens=token_table(),
        positions=tensor(f"{names.positions}.weight") if names.positions else None,
        type_row=tensor(f"{names.types}.weight")[0].clone() if names.types else None,
        embedding_norm=norm(names.embedding_norm),
        layers=tuple(layers()),
        final_norm=norm(names.final_norm),
        alibi=Alibi(config.num_heads, device) if config.alibi else None,
        rotary=tuple(Rotary(each, device) for each in config.ropes),
        projection=projection(),
        latent=latent.load(files, config.latent, names.latent, device, dtype) if config.latent and names.latent else None,
        vocabulary=None,
        heads=tuple(load_dense(path, each, device) for path, each in dense),
    )


def load_vocabulary(directory: Path, config: ModelConfig, names: TensorNames, tokens: Tensor, adapters: Sequence[Path] = ()) -> Linear:
    """The head that gives logits, output_dim -> V, like the loaded token table `tokens`, which it is where config.json ties them.

    ValueError where the checkpoint has none: transformers would draw one at random.
    """
    if names.vocabulary is None:
        raise ValueError(f"{directory}: pyembed knows no head that gives logits of the vocabulary for {config.family} models.")
    if config.tied and config.token_dim is None:
        if tokens.shape[1] != config.output_dim:
            shape = f"{tokens.shape[1]} columns, and the head would read {config.output_dim}"
            raise ValueError(f"{directory}: config.json ties the head that gives logits to the token table, which has {shape}.")
        return Dense(tokens, None, packed=False)
    stored = names.tokens if config.tied else names.vocabulary  # a narrow table was widened when it was loaded
    weight, bias = f"{stored}.weight", f"{stored}.bias"
    others = rf"(?!(?:.*\.)?{re.escape(stored)}\.(?:weight|bias)$).*"
    touching = [adapter for adapter in adapters if weight in lora.read(adapter, names.prefixes).updates]
    files = TensorFiles(weight_files(directory), names.prefixes, (others,), touching)
    if weight not in files.places:
        raise ValueError(
            f"{directory} has no {weight}, and its config.json does not tie it to the token table, so there are no logits; take a "
            "checkpoint that was saved with its language-model head."
        )
    shapes: Shapes = {weight: (config.vocab_size, config.output_dim)} | ({bias: (config.vocab_size,)} if bias in files.places else {})
    files.check(shapes)
    made = {name: torch.empty(shape, dtype=tokens.dtype, device=tokens.device) for name, shape in shapes.items()}
    for name, place in made.items():
        files.copy(name, place)
    return linear(made[weight], made.get(bias))


def load_dense(directory: Path, config: DenseConfig, device: torch.device) -> Head:
    """A Dense module, kept in float32: it sees N rows, not T."""
    files = TensorFiles(weight_files(directory))
    shapes: Shapes = {"linear.weight": (config.out_features, config.in_features)}
    if config.bias:
        shapes["linear.bias"] = (config.out_features,)
    files.check(shapes)
    tensors = {name: torch.empty(shape, dtype=torch.float32, device=device) for name, shape in shapes.items()}
    for name, place in tensors.items():
        files.copy(name, place)
    return Head(linear(tensors["linear.weight"], tensors.get("linear.bias")), config.activation)
