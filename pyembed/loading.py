"""A stack of files to what runs: its weights on each device, checked against what is claimed of them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from pyembed import engine, ops, quantising, weights
from pyembed.config import Family, ModelSpec, TensorNames
from pyembed.graphs import Graphs, record_on
from pyembed.job import Engine
from pyembed.linear import Linear, chained
from pyembed.model import linears, with_linears
from pyembed.ops import Backend
from pyembed.options import check_eight_bits, common_dtype
from pyembed.prefix import BYTES, PrefixCache, obstacle, shareable
from pyembed.probes import check_ids, check_mask
from pyembed.runner import Loaded, device_of
from pyembed.stack import Stack
from pyembed.steady import rows_for, steady, steady_in_amx
from pyembed.tokenizer import Tokenizer
from pyembed.workers import Pool

logger = logging.getLogger("pyembed")
ROW_BY_ROW = (torch.float32, torch.bfloat16, torch.int8)  # on a CPU a row's products have the same bits in any batch anyway


def serve(
    stack: Stack,
    spec: ModelSpec,
    family: Family,
    tokenizer: Tokenizer,
    devices: Sequence[torch.device],
    dtype: torch.dtype | None,
    adapter: str | None,
    settings: Mapping[str, Any],
) -> Engine:
    """The model of `stack` with one of its adapters merged, on a device in this process or on several in a worker process each.

    `dtype` None: the devices' own. `settings` are Encoder's backend, prefix_cache_bytes, share_prefixes, deterministic and cuda_graphs.

    ValueError for a dtype that the family cannot take, for share_prefixes where texts cannot share, and for weights or a tokenizer that
    are not what files and recipe claim.
    """
    check_ids(tokenizer, spec)
    if settings["share_prefixes"] and (why := obstacle(spec)) is not None:
        raise ValueError(f"share_prefixes=True was given, but texts of this model cannot share what they begin with: {why}; leave it out.")
    dtype, backend, room = dtype or common_dtype(devices), settings["backend"], settings["prefix_cache_bytes"]
    check_eight_bits(dtype, devices, backend)
    for device in {each.type: each for each in devices}.values():
        check_kernels(family, device, dtype, backend)
        if settings["deterministic"]:
            check_deterministic(device, kernels_of(device, dtype, backend), shares=settings["share_prefixes"])
    names = family.tensors
    model = {"stack": stack, "spec": spec, "names": names, "dtype": dtype, "adapter": adapter, "backend": backend, "room": room}
    model |= {name: settings[name] for name in ("deterministic", "cuda_graphs")}
    model["probe"] = quantising.probe(tokenizer, spec.model.vocab_size) if dtype in quantising.EIGHT_BITS else None
    if len(devices) == 1:
        return engine.local(load(device=devices[0], **model), tokenizer)
    pool, reuses = Pool(model, devices), room != 0 and shareable(spec)
    backends = tuple(kernels_of(device, dtype, backend) for device in devices)
    given = (spec, tokenizer, pool.lanes, tuple(devices), backends, dtype, adapter, pool.budget, reuses, None)
    return Engine(*given, errors=pool.errors, deterministic=settings["deterministic"])


def check_kernels(family: Family, device: torch.device, dtype: torch.dtype, backend: Backend | None) -> None:
    """ValueError for a dtype that the family cannot take; a warning where no kernels serve though they could."""
    if dtype == torch.float16 and not family.float16:
        raise ValueError(f"{family.name} models overflow in float16; use dtype='bfloat16' or 'float32'.")
    if device.type == "cpu" and dtype == torch.float16:
        if backend == "kernels":
            raise ValueError("backend is 'kernels', but on a CPU there are none for float16; use dtype='bfloat16' or 'float32'.")
        logger.warning("float16 on a CPU is computed by plain PyTorch, many times slower than bfloat16 or float32.")
    elif backend == "kernels" and too_old(device):
        raise ValueError(f"backend is 'kernels', which need compute capability 8.0; {device} has less. Use backend='reference'.")
    elif backend is None and kernels_of(device, dtype, backend).__name__.endswith("reference"):
        if device.type == "cpu":
            why = "pyembed's C++ kernels were not built, so plain PyTorch serves; reinstall pyembed where a C++ compiler is."
        elif ops.CUDA_RECORD is None:
            why = "No GPU has run pyembed's Triton kernels yet, so plain PyTorch serves; backend='kernels' takes them."
        elif too_old(device):
            why = f"{device} is older than compute capability 8.0, which pyembed's Triton kernels need, so plain PyTorch serves."
        else:
            why = "Triton is not installed, so plain PyTorch serves; `pip install triton`."
        warnings.warn(why, RuntimeWarning, stacklevel=5)


def check_deterministic(device: torch.device, kernels: ops.Ops, *, shares: bool) -> None:
    """ValueError where a text's bits cannot be kept from its batch. On a CPU they are anyway."""
    if device.type == "cpu":
        return
    if kernels is ops.select(device, "reference"):
        raise ValueError(
            f"deterministic=True was given, but plain PyTorch serves {device}, whose sums depend on the batch; pyembed's kernels do not: "
            "backend='kernels' takes them."
        )
    if shares:
        raise ValueError(
            "deterministic=True and share_prefixes=True were both given, but on a GPU a text that takes states from its neighbours has "
            "other bits than alone; leave one of them out."
        )


def kernels_of(device: torch.device, dtype: torch.dtype, backend: Backend | None) -> ops.Ops:
    """The ops that serve a dtype on a device."""
    slow = device.type == "cpu" and dtype == torch.float16  # no kernels: no CPU we know computes faster in it
    return ops.select(device, "reference" if slow or (backend is None and too_old(device)) else backend)


def too_old(device: torch.device) -> bool:
    """Whether it is a CUDA device without bfloat16 products."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)


def load(
    stack: Stack,
    spec: ModelSpec,
    names: TensorNames,
    device: torch.device,
    dtype: torch.dtype,
    *,
    adapter: str | None,
    backend: Backend | None,
    room: int | None,
    probe: Sequence[np.ndarray] | None,
    deterministic: bool,
    cuda_graphs: bool,
) -> Loaded:
    """The model of `stack` on a device of this process. `room`: bytes for prompts' states, None the device's usual ones; `probe`: ids
    that decide which layers take eight bits (quantising.probe).

    ValueError for weights that are not what files and recipe claim.
    """
    dense = [(stack.settings / head.path, head) for head in spec.dense]
    given = (stack.weights, spec.model, names, dense, device)
    kernels = kernels_of(device, dtype, backend)
    with torch.inference_mode():
        if probe is not None:
            make = partial(quantising.Trial, kernels, dtype, sum(map(len, probe)))
            tensors = weights.load(*given, torch.bfloat16, stack.task(adapter), make)
        else:
            tensors = weights.load(*given, dtype, stack.task(adapter), lambda read, gated: kernels.linear(*read(), gated=gated))
    loaded = Loaded(spec, tensors, kernels, device, dtype, adapter, deterministic=deterministic)
    if probe is not None:
        with device_of(loaded):
            loaded.weights, loaded.errors = quantising.settle(tensors, probe, loaded.ops, dtype)
    loaded.weights = replace(loaded.weights, spare_rows=not all(chained(each) for each in linears(loaded.weights)))
    loaded.weights = with_linears(loaded.weights, partial(row_by_row, loaded))
    if room != 0 and shareable(spec):
        loaded.prefixes = PrefixCache(BYTES[device.type] if room is None else room)
    check_mask(loaded)
    if device.type == "cuda":
        ready(loaded, cuda_graphs=cuda_graphs)
    return loaded


def row_by_row(model: Loaded, layer: Linear) -> Linear:
    """A layer with the same bits for a row in any batch: where oneDNN multiplies in AMX, and where deterministic=True asks for it."""
    layer = steady_in_amx(layer)
    wanted = model.deterministic and not (model.device.type == "cpu" and model.dtype in ROW_BY_ROW)
    return steady(layer, rows_for(model.spec.model.hidden_size)) if wanted else layer


def ready(model: Loaded, *, cuda_graphs: bool) -> None:
    """Streams and graphs of a model on a CUDA device, once all that was done to it is over."""
    torch.cuda.synchronize(model.device)
    budget = model.ops.budget(model.spec.model, model.dtype, model.device)
    model.streams = tuple(torch.cuda.Stream(model.device) for _ in range(budget.streams))
    if cuda_graphs and budget.graphs:
        given = (model.spec, model.weights, model.ops, model.device, budget.graphs)
        model.graphs = tuple(Graphs(*given, record_on(model.device), model.prefixes) for _ in model.streams)


def add_vocabulary(loaded: Loaded, stack: Stack, family: Family) -> None:
    """Read the head that gives logits, unless it is there. ValueError where the checkpoint has none."""
    if loaded.weights.vocabulary is None:
        with torch.inference_mode():
            head = weights.load_vocabulary(
                stack.weights, loaded.spec.model, family.tensors, loaded.weights.tokens, stack.task(loaded.adapter)
            )
        loaded.weights = replace(loaded.weights, vocabulary=row_by_row(loaded, head))
        if loaded.device.type == "cuda":
            torch.cuda.synchronize(loaded.device)  # batches run on streams of their own
