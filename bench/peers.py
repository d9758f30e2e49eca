"""The other side, each at its best: OpenVINO, ONNX Runtime and sentence-transformers for a BERT with mean pooling.

sentence-transformers' own backend="openvino" and "onnx" need optimum-intel (transformers < 5.6, huggingface-hub < 1.22) and optimum-onnx
(transformers < 4.58), which do not import beside transformers 5.23. So both runtimes are driven directly, which spares them
sentence-transformers' own work: the model is traced from transformers with mean pooling and L2 in the graph, texts are tokenised by the
`tokenizers` library in one call, sorted by length, padded to the longest of a batch, and handed over as NumPy arrays.
Batch size, rounding of lengths, and one batch on two threads or one on each are searched on a sample.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import seconds
from tokenizers import Tokenizer
from tqdm import tqdm

Encode = Callable[[Sequence[str]], np.ndarray]
Batch = tuple[np.ndarray, np.ndarray, np.ndarray]  # numbers of the texts [B], ids [B, S] int64, mask [B, S] int64
BATCHES = (4, 8, 16, 32)  # of OpenVINO; ONNX Runtime is best at smaller ones
FINALISTS = 2
CALIBRATION = 300  # texts, as many as sentence-transformers takes


@dataclass(frozen=True)
class Peer:
    """One contestant at its best settings."""

    name: str
    encode: Encode
    settings: dict[str, Any]
    searched: list[dict[str, Any]] = field(default_factory=list)  # settings that were tried, and seconds on the sample


def best_of(name: str, tried: Sequence[dict[str, Any]], make: Callable[[dict[str, Any]], Encode], sample: Sequence[str]) -> Peer:
    """The fastest of the settings on the sample: each is run twice, the second run counts; the best FINALISTS are run once more."""
    times = []
    with tqdm(tried, desc=f"{name}: settings", unit="", leave=False, dynamic_ncols=True) as bar:
        for settings in bar:
            encode = make(settings)
            times.append(min(seconds(lambda encode=encode: encode(sample)) for _ in range(2)))
            del encode  # before the next one is made: it may hold threads
    for n in sorted(range(len(tried)), key=times.__getitem__)[:FINALISTS] if len(tried) > 1 else ():
        encode = make(tried[n])
        times[n] = min(times[n], *(seconds(lambda encode=encode: encode(sample)) for _ in range(2)))
    searched = [settings | {"seconds": taken} for settings, taken in zip(tried, times, strict=True)]
    best = min(range(len(tried)), key=times.__getitem__)
    return Peer(name, make(tried[best]), tried[best], searched)


# sentence-transformers


def transformer(directory: str, dtype: str | None) -> Any:
    """`dtype` None: as it comes."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(directory, device="cpu", model_kwargs={} if dtype is None else {"dtype": dtype})


def dtype_of(model: Any) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def sentence_transformers(name: str, model: Any, sizes: Sequence[int], sample: Sequence[str]) -> Peer:
    """At the best of the batch sizes."""

    def make(settings: dict[str, Any]) -> Encode:
        return lambda texts: model.encode(list(texts), batch_size=settings["batch"])  # type: ignore[no-any-return]

    peer = best_of(name, [{"batch": size} for size in sizes], make, sample)
    return Peer(name, peer.encode, peer.settings | {"dtype": dtype_of(model)}, peer.searched)


# What OpenVINO and ONNX Runtime share


class Pooled(torch.nn.Module):
    """Token ids to unit vectors: the model, the mean of its tokens, L2."""

    def __init__(self, directory: str, attention: str) -> None:
        from transformers import AutoModel

        super().__init__()
        self.model = AutoModel.from_pretrained(directory, attn_implementation=attention, dtype=torch.float32).eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        types = torch.zeros_like(input_ids)
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=types).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def example() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask to trace a model with; the second text is shorter, so that the mask is traced as well."""
    ids, mask = torch.arange(1000, 1032).view(2, 16), torch.ones(2, 16, dtype=torch.int64)
    mask[1, 9:] = 0
    return ids, mask


def batches(tokenizer: Tokenizer, texts: Sequence[str], size: int, multiple: int) -> Iterator[Batch]:
    """Padded batches of texts of about one length, longest first. Lengths are rounded up to a multiple."""
    ids = [each.ids for each in tokenizer.encode_batch_fast(list(texts))]
    order = sorted(range(len(ids)), key=lambda n: -len(ids[n]))
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        width = -(-len(ids[numbers[0]]) // multiple) * multiple
        padded, mask = np.zeros((len(numbers), width), dtype=np.int64), np.zeros((len(numbers), width), dtype=np.int64)
        for row, number in enumerate(numbers):
            padded[row, : len(ids[number])] = ids[number]
            mask[row, : len(ids[number])] = 1
        yield np.array(numbers), padded, mask


def tokenizer_of(directory: str, longest: int) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    return tokenizer


# OpenVINO


def openvino_encode(model: Any, tokenizer: Tokenizer, dim: int, threads: int, settings: dict[str, Any]) -> Encode:
    import openvino

    hints = {
        "INFERENCE_PRECISION_HINT": settings["precision"],
        "PERFORMANCE_HINT": settings["hint"],
        "INFERENCE_NUM_THREADS": threads,
    }
    compiled = openvino.Core().compile_model(model, "CPU", hints)
    queue = openvino.AsyncInferQueue(compiled, compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))

    def encode(texts: Sequence[str]) -> np.ndarray:
        out = np.empty((len(texts), dim), dtype=np.float32)
        queue.set_callback(lambda request, numbers: out.__setitem__(numbers, request.get_output_tensor(0).data))
        for numbers, ids, mask in batches(tokenizer, texts, settings["batch"], settings["multiple"]):
            queue.start_async({0: ids, 1: mask}, numbers)
        queue.wait_all()
        return out

    return encode


def openvino_peers(
    directory: str, tokenizer: Tokenizer, dim: int, threads: int, sample: Sequence[str], calibration: Sequence[str]
) -> list[Peer]:
    """bfloat16, and int8 the better of static quantisation of weights and activations (NNCF, calibrated) and of weights alone.

    `calibration`: other texts, which the ranges of the activations are taken from.
    """
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids, mask = example()
        model = openvino.convert_model(Pooled(directory, "sdpa"), example_input={"input_ids": ids, "attention_mask": mask})

        def tried(precisions: Sequence[str], sizes: Sequence[int] = BATCHES) -> list[dict[str, Any]]:
            ways = [(precision, hint) for precision in precisions for hint in ("LATENCY", "THROUGHPUT")]
            return [{"precision": p, "hint": h, "batch": size, "multiple": 1} for p, h in ways for size in sizes]

        def searched(name: str, model: Any, settings: list[dict[str, Any]]) -> Peer:
            def make(each: dict[str, Any]) -> Encode:
                return openvino_encode(model, tokenizer, dim, threads, each)

            first = best_of(name, settings, make, sample)
            rounded = [first.settings | {"multiple": multiple} for multiple in (1, 8)]
            second = best_of(name, rounded, make, sample)
            gc.collect()
            return Peer(name, second.encode, second.settings, first.searched + second.searched)

        bfloat16 = searched("OpenVINO bfloat16", model, tried(["bf16"]))
        data = [{0: ids, 1: mask} for _, ids, mask in batches(tokenizer, calibration, 1, 1)]
        static = nncf.quantize(
            model.clone(),
            nncf.Dataset(data),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(data),
            preset=nncf.QuantizationPreset.MIXED,
        )
        light = nncf.compress_weights(model.clone(), mode=nncf.CompressWeightsMode.INT8_ASYM)
    kinds = {"static, weights and activations": static, "weights": light}
    found = {
        kind: searched("OpenVINO int8", each, tried(["bf16", "f32"] if each is static else ["bf16"], BATCHES[:3]))
        for kind, each in kinds.items()
    }
    kind = min(found, key=lambda name: min(each["seconds"] for each in found[name].searched))
    both = [{"quantisation": name} | each for name, peer in found.items() for each in peer.searched]
    best = found[kind]
    return [bfloat16, Peer(best.name, best.encode, {"quantisation": kind} | best.settings, both)]


# ONNX Runtime


def onnx_encode(path: Path, tokenizer: Tokenizer, dim: int, threads: int, settings: dict[str, Any]) -> Encode:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads if settings["threads"] == "in a batch" else 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads must not spin while the next contestant runs
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def encode(texts: Sequence[str]) -> np.ndarray:
        out = np.empty((len(texts), dim), dtype=np.float32)

        def run(batch: Batch) -> None:
            numbers, ids, mask = batch
            out[numbers] = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]

        made = batches(tokenizer, texts, settings["batch"], settings["multiple"])
        if settings["threads"] == "in a batch":
            for batch in made:
                run(batch)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(run, made))
        return out

    return encode


def onnx_files(directory: str, heads: int, width: int, folder: Path) -> dict[str, Path]:
    """float32 as exported and fused, and both with weights in int8 and activations quantised on the fly, by tensor and by channel."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    logging.getLogger().setLevel(logging.ERROR)  # the quantiser's advice goes to the root logger
    names = ["input_ids", "attention_mask"]
    plain, fused = folder / "plain.onnx", folder / "fused.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # the tracing exporter and eager attention: what the optimiser's fusions of attention, LayerNorm and GELU recognise
        torch.onnx.export(
            Pooled(directory, "eager"), example(), str(plain), input_names=names, output_names=["vectors"], opset_version=17, dynamo=False,
            dynamic_axes={name: {0: "texts", 1: "tokens"} for name in names} | {"vectors": {0: "texts"}},
        )  # fmt: skip
    made = optimizer.optimize_model(str(plain), model_type="bert", num_heads=heads, hidden_size=width, opt_level=0)
    if made.get_fused_operator_statistics()["Attention"] == 0:
        raise RuntimeError("onnxruntime.transformers.optimizer fused no attention; float32 and int8 would be slower than they can be.")
    made.save_model_to_file(str(fused))
    files = {"float32 plain": plain, "float32 fused": fused}
    for kind, source in (("plain", plain), ("fused", fused)):
        for channel in (False, True):
            name = f"int8 {kind}, by {'channel' if channel else 'tensor'}"
            files[name] = folder / f"{name.replace(' ', '-')}.onnx"
            floats = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # shapes are not inferred across fused nodes
            quantize_dynamic(source, files[name], per_channel=channel, weight_type=QuantType.QInt8, extra_options=floats)
    return files


def onnx_peers(
    directory: str, tokenizer: Tokenizer, heads: int, width: int, threads: int, sample: Sequence[str], folder: Path
) -> list[Peer]:
    """float32 and int8, the fastest of their graphs. `width` is also the length of a vector."""
    files = onnx_files(directory, heads, width, folder)

    def make(settings: dict[str, Any]) -> Encode:
        return onnx_encode(files[settings["graph"]], tokenizer, width, threads, settings)

    found = []
    for dtype in ("float32", "int8"):
        name, graphs = f"ONNX Runtime {dtype}", [graph for graph in files if graph.startswith(dtype)]
        ways = [{"graph": graph, "batch": 4, "multiple": 1, "threads": "one batch each"} for graph in graphs]
        graph = best_of(name, ways, make, sample)
        sizes = (1, 2, 4, 8, 16) if dtype == "int8" else (2, 4, 8)
        size = best_of(name, [graph.settings | {"batch": size} for size in sizes], make, sample)
        last = best_of(name, [size.settings, size.settings | {"multiple": 8}, size.settings | {"threads": "in a batch"}], make, sample)
        found.append(Peer(name, last.encode, last.settings, graph.searched + size.searched + last.searched))
    return found
