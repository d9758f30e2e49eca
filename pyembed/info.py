"""What `pyembed info` prints: what was detected of a model, and which file or recipe said so. No weights are read but their headers."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from pyembed import heads, lora, ops, quantising, stack, weights
from pyembed.arguments import recipe_arguments
from pyembed.config import ModelConfig, ModelSpec
from pyembed.families import ALIASES, FAMILIES
from pyembed.job import Engine
from pyembed.ops import Ops
from pyembed.options import (
    check_dtype,
    check_eight_bits,
    choose_devices,
    choose_recipe,
    common_dtype,
    default_length,
    dtype_name,
    tokenizer_of,
)
from pyembed.prefix import obstacle
from pyembed.probes import PROBE, check_ids
from pyembed.recipes import METHODS, RECIPES
from pyembed.tensorfile import FLOATS, open_safetensors
from pyembed.tokenizer import Tokenizer

Row = tuple[str, str, str]  # label, what was found, where


def supported() -> str:
    """The architectures and recipes there are."""
    out = ["Architectures (model_type of config.json):"]
    width = max(len(family.name) for family in FAMILIES)
    out += [f"  {family.name:{width}} {', '.join(family.model_types)}" for family in FAMILIES]
    out.append(f"  {'':{width}} {', '.join(ALIASES)}: variants of these")
    out += ["", "Recipes, for models whose files do not say how they are used (a hub id finds its own; a folder needs --recipe):"]
    out += [f"  {recipe.name:22} {', '.join(recipe.ids) or 'any ' + ' or '.join(recipe.model_types)}" for recipe in RECIPES]
    out += ["", "Templates, which need no training, for any causal language model (--template):"]
    out += [f"  {method.name}" for method in METHODS]
    return "\n".join(out)


def summary(model: str, family: str, engine: Engine, dim: int, limit: int | None, found: stack.Stack) -> str:
    """repr of an Encoder: the model's shape and recipe; adapters; device, mask, pooling; vector, length, kernels, cache."""
    spec, config = engine.spec, engine.spec.model
    backends, dtype = dict.fromkeys(kernels(each) for each in engine.backends), dtype_name(engine.dtype)
    dtype += f" ({quantising.summary(engine.errors, engine.dtype)})" if engine.errors else ""
    merged = f"  merged=[{', '.join(map(stack.label, found.adapters))}] into {found.base},\n" if found.adapters else ""
    task = f"  adapter={engine.adapter} of {', '.join(found.tasks)},\n" if found.tasks else ""
    return (
        f"Encoder({model!r}, {family}, {config.num_layers} layers, recipe={spec.recipe.name or None},\n{merged}{task}"
        f"  device={places(engine.devices)}, dtype={dtype}, mask={mask(config)}, {heads.describe(spec)},\n"
        f"  dim={dim}, max_seq_length={limit}, backend={' + '.join(backends)}{launching(engine)}, prompt cache {cache(engine)})"
    )


def places(devices: Sequence[torch.device]) -> str:
    """Where a model runs."""
    counts = Counter(map(str, devices))
    listed = " + ".join(name if count == 1 else f"{name} x {count}" for name, count in counts.items())
    return f"{listed} (worker processes)" if len(devices) > 1 else listed


def launching(engine: Engine) -> str:
    """How a CUDA device in this process is told what to run, and whether bits are kept from a text's batch."""
    model, steady = engine.local, ", deterministic" if engine.deterministic else ""
    if model is None or model.device.type == "cpu":
        return steady
    if not model.graphs:
        return f"{steady}, no CUDA graphs"
    failure = next((f"; {each.failure}" for each in model.graphs if each.failure), "")
    recorded = sum(len(each.made) for each in model.graphs)
    return f"{steady}, CUDA graphs up to {model.graphs[0].limit:,} tokens ({recorded} recorded{failure})"


def cache(engine: Engine) -> str:
    """How full the cache of prompts is, or why there is none."""
    if not engine.reuses:
        why = obstacle(engine.spec)
        return f"none ({why})" if why else "off"
    if engine.local is None:
        return "in each worker"
    kept = engine.local.prefixes
    assert kept is not None
    used, room = (each / 2**20 for each in (kept.bytes, kept.limit))
    return f"{used:{'.0f' if used >= 10 or not used else '.2g'}} of {room:{'.0f' if room >= 10 else '.2g'}} MiB"


def describe(args: argparse.Namespace) -> str:
    """The model of the command line, as a table."""
    recipe = choose_recipe(args.model, recipe_arguments(args))
    found = stack.resolve(args.model, args.adapters, args.adapter, revision=args.revision, local_files_only=args.offline)
    spec, family = stack.read(found, recipe=recipe)
    spec = replace(spec, truncate_dim=args.truncate_dim or spec.truncate_dim)
    if spec.model.position_offset is not None and (args.max_seq_length or 0) > spec.model.max_positions:
        raise ValueError(f"--max-seq-length is {args.max_seq_length}; this model has positions for {spec.model.max_positions} tokens.")
    tokenizer = tokenizer_of(found.tokenizer, spec)
    check_ids(tokenizer, spec)
    devices = choose_devices(args.device)
    dtype = check_dtype(args.dtype) or common_dtype(devices)
    check_eight_bits(dtype, devices, args.backend)
    rows: list[Row] = [("folder", str(found.base), "")]
    rows += [("merged", str(folder), lora.CONFIG) for folder in found.merged]
    rows += of_model(spec, family.name)
    rows += of_vector(spec)
    rows += of_text(spec, tokenizer, args.max_seq_length)
    if found.tasks:
        chosen = args.adapter or found.first_task(spec) or "none"
        rows.append(("adapters", f"{', '.join(found.tasks)}; {chosen} of them merged", "adapters/"))
    rows += of_files(found, spec)
    backends = " + ".join(dict.fromkeys(kernels(ops.select(device, args.backend)) for device in devices))
    rows.append(("runs on", f"{places(devices)} in {dtype_name(dtype)}, kernels: {backends}", ""))
    unchecked = ", and which linear layers stay bfloat16" if dtype in quantising.EIGHT_BITS else ""
    rows.append(("not checked", f"whether every weight fits config.json, and the mask{unchecked}: loading the model does", ""))
    width = max(len(label) for label, _, _ in rows)
    return "\n".join(f"{label:{width}}  {found}" + (f"  [{where}]" if where else "") for label, found, where in rows)


def kernels(backend: Ops) -> str:
    """The backend's name, and which ops it takes from the reference."""
    borrowed = f" (from the reference: {', '.join(backend.FROM_REFERENCE)})" if backend.FROM_REFERENCE else ""
    return f"{backend.__name__.rpartition('.')[2]}{borrowed}"


def of_model(spec: ModelSpec, family: str) -> list[Row]:
    config = spec.model
    order = {"pre": "pre-norm", "sandwich": "sandwich-norm", "post": "post-norm", "parallel": "attention beside MLP,"}[config.block]
    norm = {"rms": "RMSNorm", "rms_plus_one": "RMSNorm (1 + w)", "rms_float32": "RMSNorm (float32)", "layer": "LayerNorm"}[config.norm]
    mlp = f"{'gated ' if config.gated else ''}{config.activation} {config.intermediate_size:,}"
    options = {
        "scores not scaled": config.attention_scale == 1.0,
        "QK norm": config.qk_norm,
        "V norm": config.v_norm,
        "QKV bias": config.qkv_bias,
        f"softcap {config.softcap}": config.softcap,
        f"queries grow by {config.query_scale} ln(1 + position // {config.query_scale_period:,})": config.query_scale,
    }
    extras = [name for name, there in options.items() if there]
    rows = [
        ("model", f"{family}, {config.num_layers} layers of {config.hidden_size:,}, MLP {mlp}, {order} {norm}", "config.json"),
        ("attention", ", ".join([head_shapes(config), *extras]), "config.json"),
        ("mask", mask(config), spec.sources["mask"]),
        ("positions", positions(config), "config.json"),
    ]
    if config.per_layer_dim is not None:
        rows.append(("embeddings", f"mixed into every layer once more, {config.per_layer_dim:,} wide", "config.json"))
    if config.projection_dim is not None:
        rows.append(("projection", f"{config.hidden_size:,} to {config.projection_dim:,}, every token", "config.json"))
    return rows


def head_shapes(config: ModelConfig) -> str:
    shapes = [config.heads_at(n) for n in range(config.num_layers)]
    found = []
    for groups, width in dict.fromkeys(shapes):
        shared = "" if groups == config.num_heads else f", {groups} for keys and values"
        layers = f" in {shapes.count((groups, width))} layers" if len(set(shapes)) > 1 else ""
        found.append(f"{config.num_heads} heads of {width}{shared}{layers}")
    return "; ".join(found)


def mask(config: ModelConfig) -> str:
    out = "causal" if config.causal else "bidirectional"
    for window in sorted({window for window in config.windows if window is not None}):
        out += f", {config.windows.count(window)} of {config.num_layers} layers see {window[0]} keys before and {window[1]} after"
    return out


def positions(config: ModelConfig) -> str:
    if config.position_offset is not None:
        return f"learned, a table of {config.position_rows:,} rows, used from row {config.position_offset} on"
    if config.alibi:
        return f"ALiBi, a slope for each of {config.num_heads} heads"
    found = []
    for index, rope in enumerate(config.ropes):
        factor = (" interleaved" if rope.interleaved else "") + ("" if rope.kind == "default" else f" {rope.kind} x{rope.factor:g}")
        layers = f" in {config.rope_of_layer.count(index)} layers" if len(config.ropes) > 1 else ""
        width = next((config.heads_at(n)[1] for n, used in enumerate(config.rope_of_layer) if used == index), config.head_dim)
        found.append(f"RoPE{factor}, theta {rope.theta:,.0f}, {rope.rotated or rope.dim} of {width} dimensions{layers}")
    return "; ".join(found) + f"; up to {config.max_positions:,}" if found else "none"


def of_vector(spec: ModelSpec) -> list[Row]:
    pooling = " + ".join(spec.pooling.modes) + ("" if spec.pooling.include_prompt else ", without the prompt's tokens")
    rows = [("pooling", pooling, spec.sources["pooling"])]
    if (latent := spec.model.latent) is not None:
        rows.insert(0, ("head", f"attention to {latent.latents:,} latents, {latent.heads} heads of {latent.head_dim:,}", "config.json"))
    for head in spec.dense:
        rows.append(("dense", f"{head.in_features:,} to {head.out_features:,}, {head.activation}", f"{head.path}/config.json"))
    full = spec.full_dim
    cut = f", cut to {spec.truncate_dim:,}" if spec.truncate_dim is not None and spec.truncate_dim < full else ""
    length = "L2 norm 1" if spec.normalize else "integers, round(127 tanh)" if spec.output == "tanh_int8" else "not normalised"
    rows.append(("vector", f"{full:,} dimensions{cut}, {length}, compared by {spec.similarity}", spec.sources["normalize"]))
    return rows


def of_text(spec: ModelSpec, tokenizer: Tokenizer, longest: int | None) -> list[Row]:
    ids = tokenizer.encode([PROBE], None).ids[0].tolist()
    ends = [" ".join(f"{tokenizer.backend.id_to_token(i)} ({i})" for i in part) for part in (ids[:2], ids[-2:])]
    limit, source = (longest, "argument") if longest is not None else (default_length(spec, tokenizer), spec.sources["max_seq_length"])
    rows = [
        ("recipe", spec.recipe.name or "none", ""),
        ("max length", "any" if limit is None else f"{limit:,} tokens", source),
        ("tokenizer", f"{tokenizer.vocab_size:,} tokens; a text begins {ends[0]} and ends {ends[1]}", tokenizer.source),
    ]
    for name, templates in spec.recipe.templates.items():
        shown = " | ".join(" + ".join(map(repr, template.parts)) for template in templates[:2])
        more = f" and {len(templates) - 2} more, averaged" if len(templates) > 2 else ""
        rows.append(("template", f"{name + ': ' if name else ''}{shown}{more}", spec.recipe.says("templates")))
    if spec.forms:
        rows.append(("instruction", f"{spec.recipe.instruction!r}, unless one is given", spec.recipe.says("instruction")))
    if spec.recipe.note:
        rows.append(("note", spec.recipe.note, f"recipe {spec.recipe.name}"))
    prompts = {name: text for name, text in spec.prompts.items() if text}
    for name, text in prompts.items():
        default = ", the default" if name == spec.default_prompt_name else ""
        rows.append(("prompt", f"{name}: {text!r}{default}", spec.sources.get("prompts", "")))
    return rows if prompts else [*rows, ("prompts", "none", "")]


def of_files(found: stack.Stack, spec: ModelSpec) -> list[Row]:
    """Counts from the headers of the weight files."""
    paths = weights.weight_files(found.weights)
    paths += [path for head in spec.dense for path in weights.weight_files(found.settings / head.path)]
    total, kinds = 0, set()
    for path in paths:
        file = open_safetensors(path)
        for name in file.keys():  # noqa: SIM118 - not a dict
            part = file.get_slice(name)
            if part.get_dtype() in FLOATS:  # not the buffers of position numbers that some files hold
                total += math.prod(part.get_shape())
                kinds.add(part.get_dtype())
    size = sum(path.stat().st_size for path in paths)
    where = paths[0].name if len(paths) == 1 else f"{len(paths)} files"
    return [("weights", f"{total:,} parameters, {size / 1e6:,.1f} MB as {', '.join(sorted(kinds))}", where)]
