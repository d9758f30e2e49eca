"""A stack of files to what runs: its weights on a device, checked against what is claimed of them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from pyembed import ops, weights
from pyembed.config import Family, ModelSpec
from pyembed.options import native_dtype
from pyembed.prefix import BYTES, PrefixCache, obstacle, shareable
from pyembed.probes import check_ids, check_mask
from pyembed.runner import Loaded
from pyembed.stack import Stack
from pyembed.tokenizer import Tokenizer

logger = logging.getLogger("pyembed")


def load(
    stack: Stack,
    spec: ModelSpec,
    family: Family,
    tokenizer: Tokenizer,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    adapter: str | None,
    settings: Mapping[str, Any],
) -> Loaded:
    """The model of `stack` with one of its adapters merged. `dtype` None: the device's own. `settings` are Encoder's backend,
    prefix_cache_bytes and share_prefixes.

    ValueError for a dtype that the family cannot take, for share_prefixes where texts cannot share, and for weights or a tokenizer that
    are not what files and recipe claim.
    """
    dtype, backend, room = dtype or native_dtype(device), settings["backend"], settings["prefix_cache_bytes"]
    if dtype == torch.float16 and not family.float16:
        raise ValueError(f"{family.name} models overflow in float16; use dtype='bfloat16' or 'float32'.")
    if settings["share_prefixes"] and (why := obstacle(spec)) is not None:
        raise ValueError(f"share_prefixes=True was given, but texts of this model cannot share what they begin with: {why}; leave it out.")
    slow = device.type == "cpu" and dtype == torch.float16  # no kernels: no CPU we know computes faster in it
    module = ops.select(device, reference=slow or backend == "reference")
    if slow:
        logger.warning("float16 on a CPU is computed by plain PyTorch, many times slower than bfloat16 or float32.")
    elif device.type == "cpu" and backend is None and module.__name__.endswith("reference"):
        warnings.warn(
            "pyembed's C++ kernels were not built, so plain PyTorch serves; reinstall pyembed where a C++ compiler is.",
            RuntimeWarning,
            stacklevel=4,
        )
    dense = [(stack.settings / head.path, head) for head in spec.dense]
    with torch.inference_mode():
        tensors = weights.load(stack.weights, spec.model, family.tensors, dense, device, dtype, stack.task(adapter))
    loaded = Loaded(spec, tensors, module, device, dtype, adapter)
    if room != 0 and shareable(spec):
        loaded.prefixes = PrefixCache(BYTES[device.type] if room is None else room)
    check_ids(tokenizer, spec)
    check_mask(loaded)
    return loaded


def add_vocabulary(loaded: Loaded, stack: Stack, family: Family) -> None:
    """Read the head that gives logits, unless it is there. ValueError where the checkpoint has none."""
    if loaded.weights.vocabulary is None:
        with torch.inference_mode():
            head = weights.load_vocabulary(
                stack.weights, loaded.spec.model, family.tensors, loaded.weights.tokens, stack.task(loaded.adapter)
            )
        loaded.weights = replace(loaded.weights, vocabulary=head)
