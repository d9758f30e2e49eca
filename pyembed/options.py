"""What the caller gives, checked and made definite."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor

from pyembed.checkpoint import SIMILARITIES
from pyembed.config import ModelSpec, Output, Recipe, Template
from pyembed.job import Wordings
from pyembed.ops import POOL_MODES, Backend, PoolMode
from pyembed.recipes import NO_RECIPE, methods, overlaid, recipe_of_id, recipes
from pyembed.rows import Text
from pyembed.tokenizer import Tokenizer
from pyembed.tokenizer import load as load_tokenizer

OVERRULED = (
    *("include_prompt", "causal", "full_attention", "normalize", "instruction", "prompts", "default_prompt_name", "output", "drop_layers"),
)
Device = str | torch.device
FP8_CARDS, INT8_CARDS = (8, 9), (8, 0)  # the oldest compute capability that multiplies fp8; int8, beside layers in bfloat16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def choose_device(device: str | torch.device | None) -> torch.device:
    """CUDA where there is one, unless a device is named. ValueError for a device that is unknown or absent."""
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {device!r}; expected 'cpu', 'cuda' or 'cuda:N'.") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; pyembed runs on 'cpu' and 'cuda'.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device is {device!r}, but torch sees {count} CUDA devices; use 'cpu' or install a CUDA build of torch.")
    return torch.device("cuda", chosen.index or 0) if chosen.type == "cuda" else torch.device("cpu")


def choose_devices(device: Device | Sequence[Device] | None) -> tuple[torch.device, ...]:
    """One device, or those of a list. ValueError as choose_device, and for a list that cannot be served."""
    if not isinstance(device, list | tuple):
        return (choose_device(cast("Device | None", device)),)
    if not device or any(each is None for each in device):
        raise ValueError(f"device is {device!r}; expected one device, or a list of them such as ['cuda:0', 'cuda:1'] or ['cpu', 'cpu'].")
    devices = tuple(map(choose_device, device))
    for each in devices:
        if each.type == "cuda" and devices.count(each) > 1:
            raise ValueError(f"device lists {each} {devices.count(each)} times; a second copy of the weights there would gain nothing.")
    if len(devices) > 1 and (count := sum(each.type == "cpu" for each in devices)) > len(cores()):
        raise ValueError(f"device lists 'cpu' {count} times, but this process may use {len(cores())} cores; each worker needs one.")
    return devices


def cores() -> list[int]:
    """The cores that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def check_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype asked for; None for "auto"."""
    name = dtype_name(dtype)
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected 'auto', {', '.join(map(repr, DTYPES))}.")
    return DTYPES.get(name)


def dtype_name(dtype: str | torch.dtype) -> str:
    """A dtype as the argument has it."""
    return "fp8" if dtype == torch.float8_e4m3fn else str(dtype).removeprefix("torch.")


def check_eight_bits(dtype: torch.dtype, devices: Sequence[torch.device], backend: Backend | None) -> None:
    """ValueError for a dtype of eight bits on a device that cannot run it, and for int8 on devices that compute it in two ways."""
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        return
    if dtype == torch.int8 and len({device.type for device in devices}) > 1:
        listed = ", ".join(map(str, devices))
        raise ValueError(f"dtype is 'int8' and device {listed}; a CPU's int8 is not a GPU's. Use devices of one kind, or dtype='bfloat16'.")
    least = FP8_CARDS if dtype == torch.float8_e4m3fn else INT8_CARDS
    for device in devices:
        if dtype == torch.float8_e4m3fn and device.type == "cpu" and backend != "reference":
            raise ValueError(
                "dtype is 'fp8' and device 'cpu', where only plain PyTorch computes it, slowly, to show its numbers: backend='reference' "
                "takes that. Use dtype='int8' or 'bfloat16' to work on a CPU."
            )
        if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < least:
            instead = "Use dtype='int8' or 'bfloat16'." if capability >= INT8_CARDS else "No eight bits run there; use dtype='float32'."
            raise ValueError(
                f"dtype is {dtype_name(dtype)!r}, which needs compute capability {at(least)} or newer, but {device} has {at(capability)}. "
                + instead
            )


def at(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it: AVX512-BF16 or AMX on a CPU, compute capability 8.0 on CUDA. Else float32."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def common_dtype(devices: Sequence[torch.device]) -> torch.dtype:
    """The native dtype of all. ValueError where they differ."""
    natives = {device: native_dtype(device) for device in devices}
    if len(set(natives.values())) > 1:
        listed = ", ".join(f"{dtype_name(dtype)} on {device}" for device, dtype in natives.items())
        raise ValueError(f"dtype 'auto' is {listed}; say which one all devices are to take (dtype=).")
    return natives[devices[0]]


def choose_recipe(model: str, arguments: Mapping[str, Any]) -> Recipe:
    """The recipe asked for by name, or by a method's template, or the one of a known hub id; on top the arguments that are not None.

    `arguments` are Encoder's, or as many of them as there are. TypeError and ValueError for what cannot be meant.
    """
    for name in ("include_prompt", "causal", "full_attention", "normalize"):
        check_kind(name, arguments.get(name), bool)
    for name in ("instruction", "default_prompt_name"):
        check_kind(name, arguments.get(name), str)
    check_prompts(arguments.get("prompts"))
    if arguments.get("output") not in (None, *get_args(Output)):
        raise ValueError(f"output is {arguments['output']!r}; expected one of {', '.join(map(repr, get_args(Output)))}.")
    if arguments.get("drop_layers") != 0:
        check_positive("drop_layers", arguments.get("drop_layers"))
    recipe, template = arguments.get("recipe"), arguments.get("template")
    fields = {name: arguments.get(name) for name in OVERRULED} | {
        "pooling": check_pooling(arguments.get("pooling")),
        "prepend": check_tokens("prepend", arguments.get("prepend")),
        "append": check_tokens("append", arguments.get("append")),
    }
    given = {name: value for name, value in fields.items() if value is not None}
    base = NO_RECIPE
    if recipe is not None:
        if not isinstance(recipe, str) or recipe not in recipes():
            raise ValueError(f"recipe is {recipe!r}; expected one of {', '.join(recipes())}.")
        base = recipes()[recipe]
    elif not Path(model).is_dir():
        base = recipe_of_id(model) or NO_RECIPE
    if isinstance(template, str) and template in methods():
        if recipe is not None:
            raise ValueError(f"recipe {recipe!r} and template {template!r} were both given; a method's template is a recipe of its own.")
        base = methods()[template]
    elif template is not None:
        given["templates"] = {"": (check_template(template),)}
    chosen = overlaid(base, Recipe(**given, given=frozenset(given)))
    check_arguments(chosen)
    return chosen


def check_arguments(recipe: Recipe) -> None:
    """ValueError for a caller's arguments that the templates leave no room for."""
    templates = [each for several in recipe.templates.values() for each in several]
    around = sorted(recipe.given & {"prepend", "append"})
    if around and templates and not any(each.special for each in templates):
        raise ValueError(f"{around[0]} was given, but {recipe.name or 'this'} template writes its special tokens itself.")
    if "include_prompt" in recipe.given and not recipe.include_prompt and any(len(each.parts) > 1 or each.after for each in templates):
        raise ValueError(f"include_prompt=False was given, but {recipe.name or 'this'} template says itself which tokens are pooled.")


def check_settings(arguments: Mapping[str, Any]) -> None:
    """ValueError for those of Encoder's arguments that are neither the recipe's nor the device's."""
    if arguments["similarity_fn_name"] not in (None, *SIMILARITIES):
        raise ValueError(f"similarity_fn_name is {arguments['similarity_fn_name']!r}; expected one of {', '.join(SIMILARITIES)}.")
    for name in ("truncate_dim", "tokens_per_batch", "max_seq_length"):
        check_positive(name, arguments[name])
    room = arguments["prefix_cache_bytes"]
    if room is not None and (not isinstance(room, int) or isinstance(room, bool) or room < 0):
        raise ValueError(f"prefix_cache_bytes is {room!r}; expected a number of bytes, 0 for no cache, or None.")
    for name in ("share_prefixes", "deterministic", "cuda_graphs"):
        if not isinstance(arguments[name], bool):
            raise ValueError(f"{name} is {arguments[name]!r}; expected True or False.")
    if arguments["backend"] not in (None, *get_args(Backend)):
        raise ValueError(f"backend is {arguments['backend']!r}; expected None (what serves the device best), 'kernels' or 'reference'.")


def check_template(template: object) -> Template:
    """A template of the caller's own: a Template, or a string with {text} where the text goes."""
    made = Template((template,), cut="text") if isinstance(template, str) else template
    if not isinstance(made, Template) or not any("{text}" in part for part in made.parts):
        raise ValueError(f"template is {template!r}; expected one of {', '.join(methods())}, or a string with {{text}} in it.")
    if any(part.count("{text}") > 1 for part in made.parts):
        raise ValueError(f"template is {template!r}; expected {{text}} once in a part (a Template of several parts may repeat it).")
    if len(made.parts) > 1 and (made.after or made.unread != "prompt" or made.cut == "decoded"):
        raise ValueError(f"template is {template!r}; after, unread and cut='decoded' are for templates of one part.")
    if made.after not in made.parts[0].partition("{text}")[2]:
        raise ValueError(f"template is {template!r}; expected `after`, {made.after!r}, behind the {{text}}.")
    if made.read and (made.read != tuple(range(made.read[0], made.read[-1] + 1)) or made.read[0] < 0 or made.read[-1] >= len(made.parts)):
        raise ValueError(f"template is {template!r}; expected in `read` numbers of parts that follow each other.")
    return made


def check_tokens(name: str, tokens: Sequence[str] | None) -> tuple[str, ...] | None:
    """Special tokens to put around texts, as a tuple."""
    if tokens is None:
        return None
    if not isinstance(tokens, list | tuple) or not all(isinstance(token, str) for token in tokens):
        raise TypeError(f"{name} is {tokens!r}; expected a list of tokens, such as ['</s>'].")
    return tuple(tokens)


def check_pooling(pooling: str | Sequence[str] | None) -> tuple[PoolMode, ...] | None:
    if pooling is None:
        return None
    modes = tuple(pooling) if isinstance(pooling, list | tuple) else (pooling,)
    if not modes or any(mode not in POOL_MODES for mode in modes):
        raise ValueError(f"pooling is {pooling!r}; expected one or several of {', '.join(POOL_MODES)}.")
    return tuple(cast(PoolMode, mode) for mode in modes)


def check_kind(name: str, value: object, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}; expected a {kind.__name__} or None.")


def check_prompts(prompts: object) -> None:
    if prompts is not None and not (isinstance(prompts, dict) and all(isinstance(x, str) for pair in prompts.items() for x in pair)):
        raise TypeError(f"prompts is {prompts!r}; expected a dict of a text for each name.")


def check_positive(name: str, value: int | None) -> None:
    """numpy's integers are integers here."""
    if value is not None and (not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{name} is {value!r}; expected a positive integer.")


def tokenizer_of(folder: Path, spec: ModelSpec) -> Tokenizer:
    """The tokenizer whose files are in `folder`, with what the model's recipe puts around a text."""
    rule = spec.recipe
    return load_tokenizer(folder, prepend=rule.prepend, append=rule.append, lowercase=spec.lowercase)


def default_length(spec: ModelSpec, tokenizer: Tokenizer) -> int | None:
    """The stated limit, else the smaller of the tokenizer's and the model's; never more than a table of learned positions holds."""
    limit = spec.max_seq_length
    if limit is None:
        limit = min(tokenizer.model_max_length or spec.model.max_positions, spec.model.max_positions)
    return limit if spec.model.position_offset is None else min(limit, spec.model.max_positions)


def check_length(value: int | None, spec: ModelSpec, tokenizer: Tokenizer) -> None:
    """ValueError for a max_seq_length that leaves no room for a token, or is beyond a table of learned positions."""
    check_positive("max_seq_length", value)
    least, table, most = len(tokenizer.prefix) + len(tokenizer.suffix) + 1, spec.model.position_offset is not None, spec.model.max_positions
    if (value is None and table) or (value is not None and (value < least or (table and value > most))):
        most_text = f"to {most}" if table else "or more"
        raise ValueError(f"max_seq_length is {value}; expected {least} (one token and the specials) {most_text}.")


def as_texts(inputs: Any) -> tuple[bool, Iterable[Text]]:
    """Whether it is one text, and the texts: a list where their number is known, else the iterator itself. A text may be token ids."""
    if isinstance(inputs, Tensor):
        inputs = inputs.cpu()
    if isinstance(inputs, Tensor) or (isinstance(inputs, np.ndarray) and inputs.dtype.kind in "biufc"):
        if inputs.ndim != 2:
            raise TypeError(
                f"inputs is a {type(inputs).__name__} of numbers, shape {tuple(inputs.shape)}; expected texts, or token ids with a row for "
                "each text. The ids of one text are passed as a list of one, encode([ids])."
            )
        return False, list(inputs)
    if isinstance(inputs, np.ndarray):
        inputs = inputs.tolist()  # a str where it has no dimension
    if isinstance(inputs, str):
        return True, [inputs]
    if isinstance(inputs, bytes | dict | set | frozenset | type) or not hasattr(inputs, "__iter__"):
        raise TypeError(f"inputs is a {type(inputs).__name__}; expected a text (str), or an iterable of texts or of their token ids.")
    if hasattr(inputs, "__len__"):
        return False, inputs if isinstance(inputs, list | tuple) else list(inputs)
    return False, inputs


def known(texts: Iterable[Text]) -> int | None:
    """How many texts there are; None for an iterator."""
    return len(texts) if isinstance(texts, Sequence) else None


def with_variants(texts: Iterable[Text], variants: Iterable[Iterable[str]]) -> Iterator[Wordings]:
    """Each text together with its variants. ValueError where their numbers differ, TypeError for what is no list of str."""
    if isinstance(variants, str) or not isinstance(variants, Iterable):
        raise TypeError(f"variants is {variants!r}; expected a list of other wordings for each text.")
    missing = object()
    for index, (text, others) in enumerate(itertools.zip_longest(texts, variants, fillvalue=missing)):
        if text is missing or others is missing:
            raise ValueError(f"variants must be as many as the texts; one of both ends before number {index}.")
        listed = None if isinstance(others, str) or not isinstance(others, Iterable) else tuple(others)
        if listed is None or not all(isinstance(each, str) for each in listed):
            raise TypeError(f"variants of text {index} are {others if listed is None else list(listed)!r}; expected a list of str.")
        if not isinstance(text, str):
            raise TypeError(f"Input {index} is a {type(text).__name__}; with variants expected a str.")
        yield Wordings((text, *listed))


def check_place(model: object, adapters: object, adapter: object) -> None:
    """TypeError for a model or adapters that are neither directories nor hub ids, and for an adapter's name that is none."""
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"model is {model!r}; expected a directory or a hub id.")
    if not isinstance(adapters, list | tuple) or not all(isinstance(each, str | os.PathLike) for each in adapters):
        raise TypeError(f"adapters is {adapters!r}; expected a list of directories or hub ids.")
    if adapter is not None and adapter is not False and not isinstance(adapter, str):
        raise TypeError(f"adapter is {adapter!r}; expected a name, False for none, or None for the recipe's own.")
