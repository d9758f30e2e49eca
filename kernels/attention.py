"""Attention within each text of a packed batch: same contract as `reference.attention`.

    out[t, h] = sum over keys j of p[j] * v[j, g] / sum of p[j],    g = h // (H / G)
    p[j] = 2 ** ((s[j] - largest s so far) * post),    s[j] = q[t, h] . k[j, g], then softcap and bias where there are any

The softmax is online, in base 2; `post` is scale * log2(e), or what is left of it after softcap and bias. Scores, sums and the result are
float32; p is rounded to the activation dtype before it meets V, its sum is not. A hidden key adds exactly zero. float32 is true float32.

A program has one tile (tiles.py): ROWS rows, and KEYS keys at a time. The form of a text's tiles follows from its own number of queries,
the dtype, and whether `q_start` and `bias` are given, never from `prefix`, which varies from batch to batch; its blocks of keys start at
its own first key (a prefix's at the prefix's first key), and slots at multiples of their size. So nothing that is computed for a text
depends on what else is in the batch: on one card, with one launch table, its rows have the same bits in any batch, alone or not. (The
interpreter shows this. On a GPU it rests on products and sums being taken in aligned powers of two, to which zeros add nothing, and on
the compiler's doing the same with and without a prefix; not measured.) In a shared tile a row that sees a key whose value is not finite
is NaN in all of its dimensions.

Bytes: q and out once; k and v once for each tile that sees them, mostly from L2. FLOPs: 4 * K for each row and key of a tile's blocks.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyembed.kernels import tiles as tiling
from pyembed.kernels.checks import activations, check, check_whole
from pyembed.kernels.tiles import Schedule
from pyembed.kernels.tiles import schedule as schedule
from pyembed.ops import DistanceBias, Prefix

UNIT = tl.constexpr(tiling.UNIT)
FAR = 1 << 29  # beyond every position
LOG2E = math.log2(math.e)


@triton.jit
def _tanh(x):
    """(1 - e) / (1 + e) with e = exp(-2 |x|), and where 1 - e cancels the first terms of the series."""
    size = tl.abs(x)
    e = tl.exp2(size * -2.8853900817779268)
    y = x * x
    series = size * (1.0 + y * (-0.33333333333 + y * (0.13333333333 + y * (-0.05396825397 + y * 0.02186948854))))
    bent = tl.where(size < 0.25, series, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0.0, -bent, bent)


@triton.jit
def _rows(x, row, there, stride, d, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [KEYS, BLOCK_D], zeros where there are none; `there` is None: all are."""
    at = x + row.to(tl.int64)[:, None] * stride + d[None, :]
    if there is None and WIDTH == BLOCK_D:
        rows = tl.load(at)
    elif there is None:
        rows = tl.load(at, mask=(d < WIDTH)[None, :], other=0.0)
    elif WIDTH == BLOCK_D:
        rows = tl.load(at, mask=there[:, None], other=0.0)
    else:
        rows = tl.load(at, mask=there[:, None] & (d < WIDTH)[None, :], other=0.0)
    return rows


@triton.jit
def _fold(
    q, top, total, mixed, k, v, row, there, seen, distance, k_row, v_row, d, table, radius, pre, cap, post,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, SHARED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running softmax; `seen` is None: every row of the tile sees every key of the block."""
    keys = _rows(k, row, there, k_row, d, WIDTH, BLOCK_D)
    s = tl.dot(q, tl.trans(keys), input_precision="ieee")
    if SOFTCAP:
        s = _tanh(s * pre)
    if table is not None:
        s = s * cap + tl.load(table[:, None] + tl.minimum(tl.maximum(distance, -radius), radius))
    values = _rows(v, row, there, v_row, d, WIDTH, BLOCK_D)
    if SHARED:
        # Zero times what is not finite is not zero: such values of one text would reach its neighbours. They go into its scores instead.
        whole = tl.min((tl.abs(values.to(tl.float32)) < float("inf")).to(tl.int32), 1) == 1
        values = tl.where(whole[:, None], values, 0.0)
        s = tl.where(whole[None, :], s, float("nan"))
    if seen is not None:
        s = tl.where(seen, s, float("-inf"))
    above = tl.maximum(top, tl.max(s, 1))
    base = tl.where(above == float("-inf"), 0.0, above)  # of a row that has seen no key yet
    p = tl.exp2((s - base[:, None]) * post)  # in this order: the largest score's own weight is 1, whatever its size
    fade = tl.exp2((top - base) * post)
    mixed = tl.dot(p.to(values.dtype), values, mixed * fade[:, None], input_precision="ieee")
    return above, total * fade + tl.sum(p, 1), mixed


@triton.jit
def _text(text, cu_q, cu_k, q_start, cu_p, prefix_of):
    """First query and queries, first key and keys, prefix and its length, and the position of the first query; -1 is an empty text."""
    there = text >= 0
    first_q = tl.load(cu_q + text, mask=there, other=0)
    queries = tl.load(cu_q + text + 1, mask=there, other=0) - first_q
    first_k = tl.load(cu_k + text, mask=there, other=0)
    keys = tl.load(cu_k + text + 1, mask=there, other=0) - first_k
    of = text * 0 - 1
    before = text * 0
    if prefix_of is not None:
        of = tl.load(prefix_of + text, mask=there, other=-1)
        before = tl.load(cu_p + of + 1, mask=of >= 0, other=0) - tl.load(cu_p + of, mask=of >= 0, other=0)
    start = before + keys - queries
    if q_start is not None:
        start = tl.load(q_start + text, mask=there, other=0)
    return first_q, queries, first_k, keys, of, before, start


@triton.jit
def _slot(units, i, count: tl.constexpr):
    """Text of place i of a shared tile (-1: none), the place in its slot, and the slot's size: two units hold one text, or two."""
    text = tl.load(units + i // UNIT, mask=i < count, other=-1)
    beside = tl.load(units + (i // UNIT ^ 1), mask=i < count, other=-1)
    size = tl.where(text == beside, 2 * UNIT, UNIT)
    return text, i & (size - 1), size


@triton.jit(do_not_specialize=["programs", "parts", "group", "left", "right", "columns"])
def attention_kernel(
    q, k, v, out, tiles, cu_q, cu_k, q_start, prefix_k, prefix_v, cu_p, prefix_of, table,
    q_row, q_head, k_row, k_head, v_row, v_head, pk_row, pk_head, pv_row, pv_head, out_row,
    programs, parts, group, left, right, columns, pre, cap, post,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr,
    SHARED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // programs  # those of a tile lie side by side, and those of a group of heads
    part = tl.program_id(0) % programs
    kv = (part // parts).to(tl.int64)
    i = tl.arange(0, ROWS)
    c = tl.arange(0, KEYS)
    d = tl.arange(0, BLOCK_D)
    query = i // HEADS
    radius = columns // 2
    head = kv * group + part % parts * HEADS  # the first of the tile's; int64
    mine = i % HEADS < group - part % parts * HEADS

    # Places of the rows' queries in their texts; of shared tiles also those of the keys.
    if SHARED:
        units = tiles + tile * (KEYS // UNIT)
        text, place, _ = _slot(units, query, KEYS)
        key_text, key_place, step = _slot(units, c, KEYS)
    else:
        text = tl.load(tiles + tile * 2)
        edge = tl.load(tiles + tile * 2 + 1)
        place = edge + query
        mine = mine & (query < tl.where(text < 0, 0, ROWS // HEADS))
    first_q, queries, first_k, keys, of, before, start = _text(text, cu_q, cu_k, q_start, cu_p, prefix_of)
    mine = mine & (place < queries)

    # Every mask is an interval of positions [low, high) for each row.
    position = start + place
    low = tl.maximum(position - left, 0)
    high = tl.minimum(position + right + 1, before + keys)
    if not SHARED:
        last = tl.minimum(edge + ROWS // HEADS, queries) - 1
        low_first = tl.maximum(start + edge - left, 0)
        low_last = tl.maximum(start + last - left, 0)
        high_first = tl.minimum(start + edge + right + 1, before + keys)
        high_last = tl.minimum(start + last + right + 1, before + keys)

    row = first_q + place
    mask = mine[:, None]
    if WIDTH < BLOCK_D:
        mask = mask & (d < WIDTH)[None, :]
    q += head * q_head
    x = tl.load(q + row.to(tl.int64)[:, None] * q_row + (i % HEADS).to(tl.int64)[:, None] * q_head + d[None, :], mask=mask, other=0.0)
    if table is not None:
        table = table + tl.minimum(head + i % HEADS, kv * group + group - 1) * columns + radius  # [ROWS]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, BLOCK_D], tl.float32)

    if prefix_of is not None:
        if SHARED:
            p_first = tl.min(tl.where(of < 0, 1 << 30, of), 0)
            p_end = tl.max(of, 0) + 1
        else:
            p_first = tl.maximum(of, 0)
            p_end = of + 1
        for p in range(p_first, p_end):
            first_p = tl.load(cu_p + p)
            size = tl.load(cu_p + p + 1) - first_p
            seen_end = tl.where(of == p, tl.minimum(high, size), 0)
            if SHARED:
                begin = 0
                end = size * tl.max((of == p).to(tl.int32), 0)  # one that no text of the tile has is passed over
            else:
                begin = low_first // KEYS * KEYS
                end = tl.minimum(high_last, size)
            for at in tl.range(begin, end, KEYS, num_stages=1):
                index = at + c
                seen = (index[None, :] >= low[:, None]) & (index[None, :] < seen_end[:, None])
                top, total, mixed = _fold(
                    x, top, total, mixed, prefix_k + kv * pk_head, prefix_v + kv * pv_head, first_p + tl.minimum(index, size - 1), None,
                    seen, index[None, :] - position[:, None], pk_row, pv_row, d, table, radius, pre, cap, post,
                    WIDTH, BLOCK_D, SHARED, SOFTCAP,
                )  # fmt: skip

    k += kv * k_head
    v += kv * v_head
    if SHARED:
        _, _, first_k, keys, _, before, _ = _text(key_text, cu_q, cu_k, q_start, cu_p, prefix_of)  # [KEYS]
        for turn in range(tl.max(tl.cdiv(keys, step), 0)):
            index = key_place + turn * step
            at = before + index
            seen = (text[:, None] == key_text[None, :]) & (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])
            top, total, mixed = _fold(
                x, top, total, mixed, k, v, first_k + index, index < keys, seen, at[None, :] - position[:, None],
                k_row, v_row, d, table, radius, pre, cap, post, WIDTH, BLOCK_D, SHARED, SOFTCAP,
            )  # fmt: skip
    else:
        # Blocks from begin to end; those from all_first to all_end every row sees whole, and they need no mask. Then the others, which
        # read the text's last key in place of those beyond it: no row sees these, and a load without a mask takes fewer registers.
        begin = tl.maximum(low_first - before, 0) // KEYS * KEYS
        end = high_last - before
        all_first = tl.cdiv(tl.maximum(low_last - before, 0), KEYS) * KEYS
        all_end = tl.maximum(tl.maximum(high_first - before, 0) // KEYS * KEYS, all_first)
        for edge_k in range(all_first, all_end, KEYS):
            index = edge_k + c
            top, total, mixed = _fold(
                x, top, total, mixed, k, v, first_k + index, None, None, before + index[None, :] - position[:, None],
                k_row, v_row, d, table, radius, pre, cap, post, WIDTH, BLOCK_D, SHARED, SOFTCAP,
            )  # fmt: skip
        done = all_end - all_first
        for edge_k in range(begin, end - done, KEYS):
            index = edge_k + tl.where(edge_k < all_first, 0, done) + c
            at = before + index
            seen = (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])
            top, total, mixed = _fold(
                x, top, total, mixed, k, v, first_k + tl.minimum(index, keys - 1), None, seen, at[None, :] - position[:, None],
                k_row, v_row, d, table, radius, pre, cap, post, WIDTH, BLOCK_D, SHARED, SOFTCAP,
            )  # fmt: skip

    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    out += head * WIDTH
    tl.store(
        out + row.to(tl.int64)[:, None] * out_row + (i % HEADS * WIDTH)[:, None] + d[None, :], mixed.to(out.dtype.element_ty), mask=mask
    )


def attention(
    q: Tensor,  # [Tq, H, K], any strides with unit last
    k: Tensor,  # [Tk, G, K]
    v: Tensor,  # [Tk, G, K]
    cu_q: Tensor,  # [N + 1] int32
    cu_k: Tensor,  # [N + 1] int32
    schedule: object,
    *,
    causal: bool,
    window: tuple[int, int] | None = None,
    scale: float,
    softcap: float | None = None,
    bias: DistanceBias | None = None,
    prefix: Prefix | None = None,
    q_start: Tensor | None = None,  # [N] int32
) -> Tensor:  # [Tq, H, K] contiguous; rows at and beyond cu_q[-1] are not written
    device, dtype = q.device, activations("q", q)
    rows, heads, width = check("q", q, dtype, device, -1, -1, -1).shape
    keys, groups, _ = check("k", k, dtype, device, -1, -1, width).shape
    check("v", v, dtype, device, keys, groups, width)
    if groups < 1 or heads % groups:
        raise ValueError(f"{heads} query heads are not a multiple of {groups} key/value heads")
    if not 1 <= width <= 256:
        raise ValueError(f"a head must have 1 to 256 dimensions, got {width}")
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule must be what schedule(lengths) of this module returned, got {type(schedule).__name__}")
    texts = check("cu_q", cu_q, torch.int32, device, -1).shape[0] - 1
    check("cu_k", cu_k, torch.int32, device, texts + 1)
    if len(schedule.lengths) != texts or schedule.queries > rows:
        made_of = f"{len(schedule.lengths)} texts with {schedule.queries} queries"
        raise ValueError(f"schedule was made for {made_of}, but cu_q has {texts} texts and q {rows} rows")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if bias is not None:
        check_whole("bias.table", bias.table, torch.float32, device, heads, -1)
        if bias.table.shape[1] != 2 * bias.radius + 1:
            raise ValueError(f"bias.table must have an odd number of columns, got {bias.table.shape[1]}")
    shared: tuple[Tensor | None, ...] = (None, None, None, None)
    strides = (0, 0, 0, 0)
    before = 0
    if prefix is not None:
        before = check("prefix.k", prefix.k, dtype, device, -1, groups, width).shape[0]
        check("prefix.v", prefix.v, dtype, device, before, groups, width)
        check("prefix.cu_p", prefix.cu_p, torch.int32, device, -1)
        check("prefix.prefix_of", prefix.prefix_of, torch.int32, device, texts)
        shared = (prefix.k, prefix.v, prefix.cu_p, prefix.prefix_of)
        strides = (prefix.k.stride(0), prefix.k.stride(1), prefix.v.stride(0), prefix.v.stride(1))
    if rows + keys + before >= FAR:
        raise ValueError(f"a batch must hold fewer than {FAR} queries and keys, got {rows} queries, {keys} keys and {before} of prefixes")
    if q_start is not None:
        check("q_start", q_start, torch.int32, device, texts)

    out = torch.empty((rows, heads, width), dtype=dtype, device=device)
    left, right = (FAR if side < 0 else min(side, FAR) for side in ((-1, -1) if window is None else window))
    if scale <= 0:  # the kernel takes the largest product for the largest score
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    cap = float(scale if softcap is None else softcap)
    group, at = heads // groups, tiling.card(device)
    little = "short" if q_start is None and dtype.itemsize == 2 else "few"
    for form, some in (("long", schedule.long), (little, schedule.short)):
        if len(some) == 0:
            continue
        one = tiling.tile(form, at, dtype.itemsize, width, group, bias is not None)
        parts, tiles = triton.cdiv(group, one.heads), schedule.tiles(form, one.queries, device)
        with torch.cuda.device_of(q):
            attention_kernel[(tiles.shape[0] * groups * parts,)](
                q, k, v, out, tiles, cu_q, cu_k, q_start, *shared, None if bias is None else bias.table,
                q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), *strides, heads * width,
                groups * parts, parts, group, left, 0 if causal else right, 1 if bias is None else bias.table.shape[1],
                scale / cap, cap, LOG2E * (cap if bias is None else 1.0),
                WIDTH=width, BLOCK_D=tiling.padded(width), ROWS=one.rows, KEYS=one.keys, HEADS=one.heads,
                SHARED=form == "short", SOFTCAP=softcap is not None, num_warps=one.warps, num_stages=one.stages, maxnreg=one.registers,
                enable_fp_fusion=True,
            )  # fmt: skip
    return out
