"""The facade: `Encoder(model).encode(texts)`. Accepts texts (station 1), hands them to the engine, shapes what comes back (7, 8)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pyembed import pickled, planned, prompts, quantize, request, sparse, stack, warmup
from pyembed.config import ModelSpec, Output, Template
from pyembed.info import summary
from pyembed.job import Input, Stats
from pyembed.loading import add_vocabulary, serve
from pyembed.options import (
    Device,
    as_texts,
    check_dtype,
    check_length,
    check_place,
    check_settings,
    choose_devices,
    choose_recipe,
    default_length,
    known,
    tokenizer_of,
    with_variants,
)
from pyembed.planned import Plan
from pyembed.prompts import Example
from pyembed.quantize import Array, Precision
from pyembed.results import check_out, collect, into, per_token, running, shaped, streamed
from pyembed.rows import Text
from pyembed.runner import Loaded
from pyembed.tokenizer import Tokenizer


class Encoder:
    """A text embedding model, loaded and ready.

    Args:
        model: directory or hub id of a safetensors checkpoint, or of a LoRA adapter, which is merged into the base that it names.
        adapters: directories or hub ids of further LoRA adapters, merged in this order on top of what `model` is.
        adapter: of a model with adapters to switch between, the one to begin with; None leaves it to the recipe, False merges none.
        device: "cpu", "cuda", "cuda:1"; None takes CUDA where there is one. A list of several starts a worker process with the weights for
            each, and batches go to whichever is free; ["cpu", "cpu"] divides the cores between two (docs/throughput.md).
        dtype: "auto" (bfloat16 where the hardware multiplies it, else float32), "float32", "bfloat16", "float16", "int8", "fp8" (docs/).
        recipe: name of a recipe (`pyembed info` lists them) for a checkpoint whose files do not say how it is used.
        template: a method that needs no training ("prompteol", "metaeol", "promptreps", ...) for any causal language model, or a string of
            your own with {text} in it (and pooling=, where no file says it).
        pooling, include_prompt, causal, full_attention, normalize, prepend, append, instruction, output, drop_layers: overrule files and
            recipe; pooling is a mode or several, full_attention drops sliding windows, prepend and append are tokens that texts must start
            and end with, output "tanh_int8" rounds vectors to integers, drop_layers leaves last layers and the final norm out.
        prompts, default_prompt_name, similarity_fn_name, truncate_dim: as in sentence-transformers. "{instruction}" in a prompt is where
            `encode_query(instruction=)` goes.
        max_seq_length: tokens a text is cut to, specials included; None takes what the model's files say.
        tokens_per_batch: most tokens of a batch; None takes the device's budget, in which long texts cost more.
        backend: "kernels" takes pyembed's own, "reference" plain PyTorch; None the kernels where they have been seen to run: on CPUs.
        deterministic: a text's vector has the same bits alone and in any batch, on a GPU as it always has on a CPU (docs/gpu.md).
        cuda_graphs: small batches are replayed from CUDA graphs, where the kernels serve; False launches them kernel by kernel.
        prefix_cache_bytes: memory for prompts' states, which a causal model's texts share (docs/throughput.md); 0 runs every text whole.
        share_prefixes: texts of a batch run what they begin with in common once (causal models; docs/throughput.md).
        revision, token, cache_folder, local_files_only: for hub ids, as in huggingface_hub.

    Raises ValueError, TypeError or OSError with a sentence for what cannot be loaded, RuntimeError where Triton finds no C compiler.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        adapters: Sequence[str | os.PathLike[str]] = (),
        adapter: str | Literal[False] | None = None,
        device: Device | Sequence[Device] | None = None,
        dtype: str | torch.dtype = "auto",
        recipe: str | None = None,
        template: str | Template | None = None,
        pooling: str | Sequence[str] | None = None,
        include_prompt: bool | None = None,
        causal: bool | None = None,
        full_attention: bool | None = None,
        normalize: bool | None = None,
        prepend: Sequence[str] | None = None,
        append: Sequence[str] | None = None,
        instruction: str | None = None,
        output: Output | None = None,
        drop_layers: int | None = None,
        prompts: dict[str, str] | None = None,
        default_prompt_name: str | None = None,
        similarity_fn_name: str | None = None,
        truncate_dim: int | None = None,
        max_seq_length: int | None = None,
        tokens_per_batch: int | None = None,
        backend: Literal["reference", "kernels"] | None = None,
        deterministic: bool = False,
        cuda_graphs: bool = True,
        prefix_cache_bytes: int | None = None,
        share_prefixes: bool = False,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_folder: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        self._arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_place(model, adapters, adapter)
        self.model = os.fspath(model)
        devices, chosen_dtype = choose_devices(device), check_dtype(dtype)
        chosen = choose_recipe(self.model, self._arguments)
        check_settings(self._arguments)

        read = partial(stack.read, recipe=chosen)
        access: dict[str, Any] = {"token": token, "cache_folder": cache_folder, "local_files_only": local_files_only, "revision": revision}
        self._stack = stack.resolve(model, adapters, adapter or None, check=read, **access)
        spec, self._family = read(self._stack)
        self.prompts = spec.prompts
        self.default_prompt_name = spec.default_prompt_name
        self.similarity_fn_name = similarity_fn_name or spec.similarity
        self.truncate_dim = truncate_dim if truncate_dim is not None else spec.truncate_dim
        self._spec = spec
        self.tokenizer: Tokenizer = tokenizer_of(self._stack.tokenizer, spec)
        self._max_seq_length = default_length(spec, self.tokenizer)
        if max_seq_length is not None:
            self.max_seq_length = max_seq_length
        self._stack.warn_if_alone(spec)
        self._reloading = threading.RLock()
        self._load(devices, chosen_dtype, self._stack.first_task(spec) if adapter is None else adapter or None)

    def _load(self, devices: Sequence[torch.device], dtype: torch.dtype | None, adapter: str | None) -> None:
        """Read the weights; then they serve the calls that follow."""
        self._engine = serve(self._stack, self._spec, self._family, self.tokenizer, devices, dtype, adapter, self._arguments)

    @property
    def _loaded(self) -> Loaded:
        """The model in this process. ValueError where there is none."""
        if self._engine.local is None:
            raise ValueError(f"This works on one device, but device= lists {len(self.devices)}: their worker processes have the weights.")
        return self._engine.local

    def set_adapter(self, name: str | None) -> None:
        """Load the weights again with the adapter `name` merged, one of `adapter_names`; None: without any.

        Until then, and in calls under way, the old weights serve, so both are in memory for a while. ValueError for another name.
        """
        with self._reloading:
            self._load(self.devices, self.dtype, name)

    @property
    def directory(self) -> Path:
        """Where the model's files are; of several directories the topmost."""
        return (self._stack.base, *self._stack.adapters)[-1]

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names that `set_adapter` takes."""
        return tuple(self._stack.tasks)

    @property
    def adapter(self) -> str | None:
        """The one of `adapter_names` that is merged."""
        return self._engine.adapter

    @property
    def device(self) -> torch.device:
        return self.devices[0]

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All that it runs on: one in this process, or several in worker processes, of which `device` is the first."""
        return self._engine.devices

    @property
    def dtype(self) -> torch.dtype:
        return self._engine.dtype

    @property
    def spec(self) -> ModelSpec:
        """Everything the checkpoint and its recipe say."""
        return self._spec

    @property
    def stats(self) -> Stats:
        """What was done since loading: texts, tokens, texts cut or repaired, what was not computed twice, seconds the device was busy."""
        return replace(self._engine.stats)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        full = self._spec.full_dim
        return full if self.truncate_dim is None else min(full, self.truncate_dim)

    @property
    def max_seq_length(self) -> int | None:
        """Tokens a text is cut to, specials included; None: never."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        check_length(value, self._spec, self.tokenizer)
        self._max_seq_length = value

    def __repr__(self) -> str:
        return summary(self.model, self._family.name, self._engine, self.dim, self.max_seq_length, self._stack)

    def __reduce__(self) -> tuple[Any, ...]:
        return pickled.reduced(self)

    def encode(
        self,
        inputs: str | Iterable[Text],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        output_value: Literal["sentence_embedding", "token_embeddings"] | None = "sentence_embedding",
        precision: Precision = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Device | Sequence[Device] | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        pool: object = None,
        chunk_size: int | None = None,
        *,
        ranges: Array | None = None,
        examples: Sequence[Example] = (),
        variants: Iterable[Any] | None = None,
        out: Any = None,
    ) -> Any:
        """Vectors of texts, in their order.

        Args:
            inputs: one text, or any sequence or iterator of them; an iterator is read window by window. In a text's place may stand its
                token ids (a list, 1-D array or 1-D tensor of integers, as `token_ids` gives them), which are taken exactly as they are:
                nothing is put before or behind them, and too many are a ValueError.
            prompt_name, prompt: what is put before each text: a named prompt of the model, or this very text, which wins.
            batch_size: at most so many texts in a batch; None leaves it to the token budget.
            show_progress_bar: None shows it when the logger "pyembed" is at INFO or DEBUG.
            output_value: "sentence_embedding", "token_embeddings" (a [length, D] tensor per text), or None (a dict per text).
            precision: "float32", or "int8", "uint8", "binary", "ubinary" as sentence-transformers quantizes.
            convert_to_numpy, convert_to_tensor: array [N, dim] (default), tensor on the device, or with neither a list of tensors.
            device: move the model there first, to several where it is a list.
            normalize_embeddings: divide by the L2 norm, after the cut to `truncate_dim`.
            truncate_dim: keep the first so many dimensions.
            ranges: [2, dim], least and largest value of each dimension for int8 and uint8; None takes them from this call's vectors.
                A model whose vectors are int8 numbers (`spec.output`) needs none for int8.
            examples: in-context examples, (text, response) or dicts with text, response and instruction, for models that take them.
            variants: for each text other wordings of it; its vector is the mean of theirs and its own (GenEOL, arXiv 2410.14635).
            out: array, memmap or tensor to write into, [N or more, dim] float32 or float16 (a tensor also bfloat16), or the precision's
                integers; [dim] or [1, dim] for one text. Vectors are written as they come, so those of finished windows stay when the
                rest fails; int8 and uint8 need `ranges`.

        Returns float32 (or the precision's integers): [dim] for one text, [N, dim] for several; `out` where it was given, or its first N
        rows where it has more.
        """
        request.check_kinds(output_value, precision, pool, chunk_size)
        if device is not None and choose_devices(device) != self.devices:
            with self._reloading:
                self._load(choose_devices(device), self.dtype if self._arguments["dtype"] != "auto" else None, self.adapter)
        single, texts = as_texts(inputs)
        job = request.job(
            self,
            prompt=prompt,
            prompt_name=prompt_name,
            examples=examples,
            batch_size=batch_size,
            normalize=normalize_embeddings,
            truncate_dim=truncate_dim,
            tokens=output_value != "sentence_embedding",
        )
        request.check_tokens(output_value, job, variants=variants is not None, out=out)
        stored = request.storing(self, job, precision, ranges, variants=variants is not None, at_once=out is None)
        count, width = known(texts), request.width(self, job)
        if out is not None:
            check_out(out, count, width, precision, single=single, to_tensor=convert_to_tensor)
        rows: Iterable[Input] = texts if variants is None else with_variants(texts, [variants] if single else variants)
        once = count is not None and not job.tokens  # all texts are at hand, and so are their rows
        with running(self._engine, job, rows, show_progress_bar, count, self.max_seq_length, once=once) as windows:
            if job.tokens:
                items = per_token(windows, everything=output_value is None)
                return items[0] if single else items
            if out is not None:
                return into(windows, out, stored)
            vectors = collect(windows, count, width, self.device if convert_to_tensor else torch.device("cpu"))
        return shaped(vectors, stored, single=single, to_numpy=convert_to_numpy, to_tensor=convert_to_tensor)

    def encode_query(self, inputs: str | Iterable[Text], *, instruction: str | None = None, **arguments: Any) -> Any:
        """`encode` with the prompt and template named "query".

        `instruction` says what is searched for, in models that take one; None leaves the recipe's own. It goes with neither `prompt` nor
        `prompt_name`.
        """
        return self.encode(inputs, **prompts.named(self._spec, self.prompts, ("query",), instruction, arguments))

    def encode_document(self, inputs: str | Iterable[Text], *, instruction: str | None = None, **arguments: Any) -> Any:
        """`encode` with the first prompt and template there is of "document", "passage", "corpus". `instruction` as in `encode_query`."""
        names = ("document", "passage", "corpus")
        return self.encode(inputs, **prompts.named(self._spec, self.prompts, names, instruction, arguments))

    def encode_sparse(
        self,
        inputs: str | Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        words: sparse.Words | None = None,
        expand: int = 0,
        as_dict: bool = False,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> Any:
        """Sparse vectors from the vocabulary's logits at the last token (PromptReps, arXiv 2404.18424), of a causal language model.

        Args:
            prompt_name, prompt, batch_size, show_progress_bar: as `encode`; PromptReps has a template for "query" and one for "document".
            words: the words of a text whose tokens count; None takes NLTK's, without stopwords, where NLTK and its data are installed.
            expand: so many tokens beyond the text's own.
            as_dict: {token: weight} per text, tokens as the vocabulary spells them, instead of a tensor.

        Returns a coalesced sparse COO tensor, [V] for one text, [N, V] for several. Weights are round(100 ln(1 + logit)).
        """
        single, texts = as_texts(inputs)
        job = request.job(self, prompt=prompt, prompt_name=prompt_name, batch_size=batch_size)
        job = replace(job, sparse=sparse.maker(self._spec, self.tokenizer, words, expand))
        with self._reloading:
            add_vocabulary(self._loaded, self._stack, self._family)
        with running(self._engine, job, texts, show_progress_bar, known(texts), self.max_seq_length) as windows:
            rows = [row for window in windows for row in window.sparse]
        made = sparse.as_dicts(rows, self.tokenizer) if as_dict else sparse.as_tensor(rows, self._spec.model.vocab_size)
        return made[0] if single else made

    def stream(
        self,
        inputs: Iterable[Text],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        precision: Precision = "float32",
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        ranges: Array | None = None,
        examples: Sequence[Example] = (),
    ) -> Iterator[Array]:
        """One vector [dim] per text, in order, in memory that does not grow with their number. Arguments as `encode`.

        int8 and uint8 need `ranges`: a stream does not know the range of what is yet to come.
        """
        single, texts = as_texts(inputs)
        if single:
            raise TypeError("stream takes an iterable of texts; one text goes to encode.")
        shape: dict[str, Any] = {"normalize": normalize_embeddings, "truncate_dim": truncate_dim}
        job = request.job(self, prompt=prompt, prompt_name=prompt_name, examples=examples, batch_size=batch_size, **shape)
        stored = request.storing(self, job, precision, ranges)
        return streamed(self._engine, job, texts, show_progress_bar, known(texts), self.max_seq_length, stored)

    def token_ids(
        self, texts: Iterable[str], prompt_name: str | None = None, prompt: str | None = None, examples: Sequence[Example] = ()
    ) -> list[np.ndarray]:
        """The ids that `encode` would run for each text, [length] int32: prompt, template, special tokens and truncation included.

        `encode` takes them in the texts' place. Arguments as `encode`; ValueError for a model with several templates for a text.
        """
        return request.token_ids(self, texts, prompt=prompt, prompt_name=prompt_name, examples=examples)

    def plan(
        self,
        inputs: Iterable[Text],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        examples: Sequence[Example] = (),
    ) -> Plan:
        """What `encode` would run for these texts, batch by batch, to look at or to print. They are tokenised and no more."""
        job = request.job(self, prompt=prompt, prompt_name=prompt_name, batch_size=batch_size, examples=examples)
        return planned.plan(self._engine, job, as_texts(inputs)[1])

    def warmup(self) -> warmup.Warmed:
        """Run batches of every kind, so that later calls compile no kernel; how long that took, in seconds."""
        return warmup.warmup(self)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Scores [N, M] float32 of two sets of vectors, by the model's similarity function."""
        return quantize.similarity(self.similarity_fn_name, embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Scores [N] of vectors paired by place."""
        return quantize.similarity(self.similarity_fn_name, embeddings1, embeddings2, pairwise=True)
