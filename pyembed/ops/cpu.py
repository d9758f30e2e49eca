"""The C++ kernels of csrc/cpu: same contracts as `reference`, for float32 and bfloat16.

Each function checks what it is given (a ValueError says what came and what was expected), takes addresses, sizes and strides, and calls
`pyembed._cpu`, which checks the indices inside tensors. float16 and float64 have no kernels here, since no CPU we know computes faster
in them: such tensors go to the reference, by the first line of each op. `_cpu` is built by setup.py; without it this module does not
import, and `ops.select` takes the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import pyembed._cpu as _cpu
from pyembed.config import ModelConfig
from pyembed.ops import POOL_MODES, DistanceBias, Norm, PoolMode, Prefix, Quant, Quantised, reference
from pyembed.ops.budget import Budget, balance
from pyembed.ops.checks import GATED, PLAIN, check, check_rows_apart, check_whole, dtype_number, no_kernel, norm_argument, residual_argument
from pyembed.ops.panels import int8 as int8
from pyembed.ops.panels import linear as linear
from pyembed.ops.reference import latent_attention as latent_attention
from pyembed.ops.reference import quantised as quantised
from pyembed.ops.reference import rescaled as rescaled

FROM_REFERENCE: tuple[str, ...] = ("latent_attention", "quantised", "rescaled")  # the last two serve GPUs' scheme of eight bits

# The numbers of the enumerations in csrc/params.h.
_QUANTS: dict[Quant | None, int] = {None: 0, "int8": 1, "fp8": 2}
_POOL_MODES: dict[PoolMode, int] = {"cls": 0, "max": 1, "mean": 2, "mean_sqrt_len_tokens": 3, "weightedmean": 4, "lasttoken": 5}


def _rows_out(x: Tensor, size: int, quant: Quant | None) -> tuple[Tensor | Quantised, int, int, int]:
    """Room for a result [T, size], and what the kernel wants to know about it: values, scales, kind."""
    if quant is None:
        out = torch.empty((x.shape[0], size), dtype=x.dtype, device="cpu")
        return out, out.data_ptr(), 0, 0
    if quant not in _QUANTS:
        raise ValueError(f"quant must be None, 'int8' or 'fp8', got {quant!r}")
    values = torch.empty((x.shape[0], size), dtype=torch.int8 if quant == "int8" else torch.float8_e4m3fn, device="cpu")
    scale = torch.empty(x.shape[0], dtype=torch.float32, device="cpu")
    return Quantised(values, scale), values.data_ptr(), scale.data_ptr(), _QUANTS[quant]


def budget(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Budget:
    """2048 tokens: `python bench/cpu.py MODEL CORPUS --only threads`, two Zen 4 cores."""
    return Budget(2048, balance(config, rate=0.5))


def schedule(lengths: Sequence[int]) -> Tensor:
    """[tiles, 2] int32: pieces of QUERY_TILE queries, which attention hands to its threads, as (sequence, piece); longest first."""
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    counts = -(-sizes[order] // _cpu.QUERY_TILE)
    tiles = np.empty((int(counts.sum()), 2), dtype=np.int32)
    tiles[:, 0] = order.repeat(counts)
    tiles[:, 1] = np.arange(len(tiles)) - (counts.cumsum() - counts).repeat(counts)
    return torch.from_numpy(tiles)


def embed(
    input_ids: Tensor,
    tokens: Tensor,
    *,
    scale: float = 1.0,
    positions: Tensor | None = None,
    position_table: Tensor | None = None,
    type_row: Tensor | None = None,
    norm: Norm | None = None,
) -> Tensor:
    if no_kernel(tokens):
        return reference.embed(
            input_ids, tokens, scale=scale, positions=positions, position_table=position_table, type_row=type_row, norm=norm
        )
    dtype = dtype_number(tokens)
    check("tokens", tokens, tokens.dtype, -1, -1)
    ids, rows, width = check_whole("input_ids", input_ids, torch.int64, -1), input_ids.shape[0], tokens.shape[1]
    position_rows, table = 0, (0, 0, 0)
    if position_table is not None:
        if positions is None:
            raise ValueError("position_table was given without positions")
        position_rows = check_whole("positions", positions, torch.int64, rows)
        check("position_table", position_table, tokens.dtype, -1, width)
        table = (position_table.data_ptr(), position_table.stride(0), position_table.shape[0])
    type_address = 0 if type_row is None else check_whole("type_row", type_row, tokens.dtype, width)
    out = torch.empty((rows, width), dtype=tokens.dtype, device="cpu")
    _cpu.embed(
        dtype, torch.get_num_threads(), ids, rows, width, tokens.data_ptr(), tokens.stride(0), tokens.shape[0], scale,
        position_rows, *table, type_address, norm_argument(norm, width), out.data_ptr(),
    )  # fmt: skip
    return out


def _add_norm(x: Tensor, norm: Norm, residual: Tensor | None, quant: Quant | None) -> Tensor | Quantised:
    dtype = dtype_number(x)
    rows, width = check("x", x, x.dtype, -1, -1).shape
    stream = residual_argument(residual, x.dtype, rows, width)
    out, values, scale, kind = _rows_out(x, width, quant)
    _cpu.norm(
        dtype, torch.get_num_threads(), x.data_ptr(), rows, width, x.stride(0), *stream,
        norm_argument(norm, width), values, scale, kind,
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, norm: Norm, *, residual: Tensor | None = None, quant: Quant | None = None) -> Tensor | Quantised:
    if no_kernel(x):
        return reference.rms_norm(x, norm, residual=residual, quant=quant)
    return _add_norm(x, norm, residual, quant)


def layer_norm(x: Tensor, norm: Norm, *, residual: Tensor | None = None, quant: Quant | None = None) -> Tensor | Quantised:
    if no_kernel(x):
        return reference.layer_norm(x, norm, residual=residual, quant=quant)
    return _add_norm(x, norm, residual, quant)


def qk_norm_rope(
    qkv: Tensor,
    num_heads: int,
    num_key_value_heads: int,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rows: Tensor | None = None,
    interleaved: bool = False,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> None:
    if no_kernel(qkv):
        reference.qk_norm_rope(
            qkv, num_heads, num_key_value_heads, cos=cos, sin=sin, rows=rows, interleaved=interleaved, q_norm=q_norm, k_norm=k_norm
        )
        return
    dtype = dtype_number(qkv)
    tokens, width = check("qkv", qkv, qkv.dtype, -1, -1).shape
    check_rows_apart("qkv", qkv)
    head, rest = divmod(width, max(1, num_heads + 2 * num_key_value_heads))
    if rest or num_heads < 0 or num_key_value_heads < 0:
        raise ValueError(f"qkv has {width} columns, which are not {num_heads} + 2 * {num_key_value_heads} heads")
    tables = (0, 0, 0, 0, 0, 0, 0)
    if cos is not None:
        if sin is None or rows is None:
            raise ValueError("cos was given without sin or rows")
        positions, half = check("cos", cos, torch.float32, -1, -1).shape
        check("sin", sin, torch.float32, positions, half)
        if 2 * half > head:
            raise ValueError(f"cos has {half} columns, which rotate {2 * half} dimensions, but a head has {head}")
        of_tokens = check_whole("rows", rows, torch.int64, tokens)
        tables = (cos.data_ptr(), cos.stride(0), sin.data_ptr(), sin.stride(0), 2 * half, positions, of_tokens)
    _cpu.rope(
        dtype, torch.get_num_threads(), qkv.data_ptr(), tokens, qkv.stride(0), num_heads, num_key_value_heads, head,
        *tables, interleaved, norm_argument(q_norm, head), norm_argument(k_norm, head),
    )  # fmt: skip


def _head_rows(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    schedule: object,
    *,
    causal: bool,
    window: tuple[int, int] | None = None,
    scale: float,
    softcap: float | None = None,
    bias: DistanceBias | None = None,
    prefix: Prefix | None = None,
    q_start: Tensor | None = None,
) -> Tensor:
    if no_kernel(q):
        return reference.attention(
            q, k, v, cu_q, cu_k, schedule,
            causal=causal, window=window, scale=scale, softcap=softcap, bias=bias, prefix=prefix, q_start=q_start,
        )  # fmt: skip
    dtype = dtype_number(q)
    queries, heads, width = check("q", q, q.dtype, -1, -1, -1).shape
    keys, groups, _ = check("k", k, q.dtype, -1, -1, width).shape
    check("v", v, q.dtype, keys, groups, width)
    if groups < 1 or heads % groups:
        raise ValueError(f"{heads} query heads are not a multiple of {groups} key/value heads")
    if queries + keys > _cpu.EXACT // 2:
        raise ValueError(f"a batch must hold at most {_cpu.EXACT // 2} queries and keys, got {queries} and {keys}")
    if not isinstance(schedule, Tensor):
        raise ValueError(f"schedule must be what schedule(lengths) of this module returned, got {type(schedule).__name__}")
    tiles = check_whole("schedule", schedule, torch.int32, -1, 2)
    offsets_q, sequences = check_whole("cu_q", cu_q, torch.int32, -1), cu_q.shape[0] - 1
    if sequences < 0:
        raise ValueError("cu_q must have one entry more than there are sequences, got none")
    offsets_k = check_whole("cu_k", cu_k, torch.int32, sequences + 1)
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    table, radius = 0, 0
    if bias is not None:
        table, radius = check_whole("bias.table", bias.table, torch.float32, heads, -1), bias.radius
        if bias.table.shape[1] != 2 * radius + 1:
            raise ValueError(f"bias.table must have an odd number of columns, got {bias.table.shape[1]}")
        if bias.table.numel() > _cpu.EXACT:
            raise ValueError(f"bias.table must hold at most {_cpu.EXACT} numbers, got {list(bias.table.shape)}")
    shared: tuple[tuple[int, int, int], tuple[int, int, int], int, int, int, int] = ((0, 0, 0), (0, 0, 0), 0, 0, 0, 0)
    if prefix is not None:
        rows = check("prefix.k", prefix.k, q.dtype, -1, groups, width).shape[0]
        check("prefix.v", prefix.v, q.dtype, rows, groups, width)
        offsets_p = check_whole("prefix.cu_p", prefix.cu_p, torch.int32, -1)
        of_sequences = check_whole("prefix.prefix_of", prefix.prefix_of, torch.int32, sequences)
        shared = (_head_rows(prefix.k), _head_rows(prefix.v), rows, prefix.cu_p.shape[0] - 1, offsets_p, of_sequences)
    starts = 0 if q_start is None else check_whole("q_start", q_start, torch.int32, sequences)
    left, right = (-1, -1) if window is None else window
    out = torch.empty((queries, heads, width), dtype=q.dtype, device="cpu")
    _cpu.attention(
        dtype, torch.get_num_threads(), _head_rows(q), _head_rows(k), _head_rows(v), queries, keys, heads, groups, width,
        sequences, offsets_q, offsets_k, tiles, schedule.shape[0], causal, left, right, scale, softcap or 0.0, table, radius,
        *shared, starts, out.data_ptr(),
    )  # fmt: skip
    return out


def _activation(kind: int, x: Tensor, gated: bool, quant: Quant | None) -> Tensor | Quantised:
    dtype = dtype_number(x)
    rows, width = check("x", x, x.dtype, -1, -1).shape
    if gated and width % 2:
        raise ValueError(f"x must hold gate and up side by side, got an odd number of columns: {width}")
    size = width // 2 if gated else width
    out, values, scale, eight_bits = _rows_out(x, size, quant)
    _cpu.activation(dtype, torch.get_num_threads(), kind, x.data_ptr(), rows, size, x.stride(0), values, scale, eight_bits)
    return out


def swiglu(x: Tensor, *, quant: Quant | None = None) -> Tensor | Quantised:
    return reference.swiglu(x, quant=quant) if no_kernel(x) else _activation(GATED["silu"], x, True, quant)


def geglu(x: Tensor, *, tanh: bool, quant: Quant | None = None) -> Tensor | Quantised:
    return reference.geglu(x, tanh=tanh, quant=quant) if no_kernel(x) else _activation(GATED["gelu"] + tanh, x, True, quant)


def gelu(x: Tensor, *, tanh: bool, quant: Quant | None = None) -> Tensor | Quantised:
    return reference.gelu(x, tanh=tanh, quant=quant) if no_kernel(x) else _activation(PLAIN["gelu"] + tanh, x, False, quant)


def pool(
    x: Tensor,
    cu_seqlens: Tensor,
    spans: Tensor,
    mode: PoolMode,
    *,
    norm: Norm | None = None,
    normalize: bool = False,
    dim: int | None = None,
) -> Tensor:
    if no_kernel(x):
        return reference.pool(x, cu_seqlens, spans, mode, norm=norm, normalize=normalize, dim=dim)
    dtype = dtype_number(x)
    rows, width = check("x", x, x.dtype, -1, -1).shape
    texts = spans.shape[0]
    read = check_whole("spans", spans, torch.int32, -1, 2)
    starts = check_whole("cu_seqlens", cu_seqlens, torch.int32, texts + 1)
    if mode not in _POOL_MODES:
        raise ValueError(f"mode must be one of {', '.join(POOL_MODES)}, got {mode!r}")
    kept = width if dim is None else dim
    if not 0 < kept <= width:
        raise ValueError(f"dim must be between 1 and the {width} columns of x, got {dim}")
    out = torch.empty((texts, kept), dtype=torch.float32, device="cpu")
    _cpu.pool(
        dtype, torch.get_num_threads(), _POOL_MODES[mode], x.data_ptr(), rows, width, x.stride(0), starts, read, texts, kept,
        norm_argument(norm, width), normalize, out.data_ptr(),
    )  # fmt: skip
    return out
