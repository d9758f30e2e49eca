"""A candidate for long texts on Hopper: `attention` of kernels/attention.py with roles for its warps, in Gluon.

NEVER RUN ON A GPU. It is to be measured (`python bench/triton_ops.py --only attention --gluon`), then kept (at least 1.4 times as fast as
varlen_attn from 2k tokens on) or deleted. Nothing in the package calls it. Same contract as `reference.attention`, for what `attention`
below takes; same rounding as kernels/attention.py.

One warp fetches: it copies blocks of KEYS keys and of KEYS values into rings of STAGES buffers (TMA), and waits for a buffer to be given
back. Two groups of four warps fold, 64 rows of the tile each: the scores of the next block (wgmma, q and k from shared memory) and the
product of this block's weights with its values (wgmma, weights from registers) are issued together, and the softmax of the next block
runs under the second of them. Registers go from the fetching warp to the others (setmaxnreg). With TURNS the groups take turns at issuing
products, so that one group's softmax falls under the other's products. A program takes every `num_programs`-th piece of work; a grid as
large as the number of pieces gives each its own.

A descriptor spans all packed keys, and a block of it is cut at its own text's last key: `create_ragged_descriptor` of triton adds two
dimensions, of which one is crossed at exactly that row, so that the copy engine writes zeros for every row beyond. Neither a neighbour nor
the rows beyond the last text are read at all; a hidden key has score -inf, weight zero, and a value of its own text or of zeros. As in
kernels/attention.py, keys that a causal mask hides bring 0 * v: a value that is not finite makes NaN of rows of its own text alone.

Bytes: q and out once; k and v once for each tile that sees them, mostly from L2. FLOPs: 4 * K for each row and key of a tile's blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.tools.ragged_tma import create_ragged_descriptor

from pyembed.kernels.attention import FAR
from pyembed.kernels.checks import activations, check
from pyembed.kernels.tiles import HEADS, Schedule
from pyembed.ops import DistanceBias, Prefix

LOG2E = math.log2(math.e)
EDGE = gl.constexpr(1 << 30)  # of a ragged descriptor: the row of its last dimension but one that lies behind a text's last
GROUP = gl.constexpr(64)  # rows of a group of four warps; what one wgmma has
REGISTERS = gl.constexpr(240)  # of a thread of the two groups; there are 65536, and a launch of 12 warps begins with 168 for each thread
FETCHER = gl.constexpr(24)  # registers of a thread that fetches

# The assembler would wait for the values' product before the softmax that is to run under it. A store cannot be moved across that wait:
# this one, which the sums of weights forbid (none is negative), holds back the wait until they are there.
ORDER = gl.constexpr(
    "{ .reg .pred never; .reg .f32 both; .reg .b32 zero; mov.b32 zero, 0; add.f32 both, $2, $3; setp.lt.f32 never, both, 0f00000000; "
    "@never st.volatile.shared.b32 [zero], zero; mov.b32 $0, $2; mov.b32 $1, $3; }"
)
copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # of Triton 3.9, or of 3.6
meet = getattr(gl, "barrier", None) or gl.thread_barrier  # all threads of one role


@dataclass(frozen=True, slots=True)
class Form:
    """One line of the launch table."""

    keys: int  # in a block
    stages: int  # buffers of keys, and of values
    turns: bool = False
    persistent: bool = False


# By head dimension. Predictions, not measured.
FORMS = {64: Form(128, 4, turns=True), 128: Form(128, 2, turns=True), 256: Form(64, 2)}


@gluon.jit
def _blocks(edge, per_tile, queries, keys, KEYS: gl.constexpr, CAUSAL: gl.constexpr):
    """Blocks of keys that some row of the tile sees, at least one; and how many of them, from the first, every row sees whole."""
    whole = keys
    end = keys
    if CAUSAL:
        whole = min(max(keys - queries + edge + 1, 0), keys)  # of the first query, that is; the last of a text sees all keys
        end = min(max(keys - queries + min(edge + per_tile, queries), 0), keys)
    return max((end + KEYS - 1) // KEYS, 1), whole // KEYS


@gluon.jit
def _piece(piece, work, HEADS: gl.constexpr):
    """Its key/value head, first query head and that head's place in its group; of its text (-1: none, an empty one) the first query and
    the number, the first key and the number; the place of its own first query."""
    tiles, cu_q, cu_k, _, programs, parts, group = work
    tile = tiles + piece // programs * 2
    part = piece % programs
    kv = part // parts
    in_group = part % parts * HEADS
    text = gl.load(tile)
    at = max(text, 0)
    first_q = gl.load(cu_q + at)
    first_k = gl.load(cu_k + at)
    queries = gl.where(text < 0, 0, gl.load(cu_q + at + 1) - first_q)
    keys = gl.where(text < 0, 0, gl.load(cu_k + at + 1) - first_k)
    return kv, kv * group + in_group, in_group, first_q, queries, first_k, keys, gl.load(tile + 1)


@gluon.jit
def _rows(piece, work, row_stride, head_stride, HEADS: gl.constexpr, PER_TILE: gl.constexpr, NUMBER: gl.constexpr, LAYOUT: gl.constexpr):
    """Offsets of a group's 64 rows, and which are there. Found from the lists each time: kept, they would take registers from the loop."""
    _, head, in_group, first_q, queries, _, _, edge = _piece(piece, work, HEADS)
    i = edge * HEADS + NUMBER * GROUP + gl.arange(0, GROUP, LAYOUT)
    place = i // HEADS
    mine = (place < min(edge + PER_TILE, queries)) & (in_group + i % HEADS < work[6])
    return (first_q + place).to(gl.int64) * row_stride + (head + i % HEADS).to(gl.int64) * head_stride, mine


@gluon.jit
def _high(piece, work, HEADS: gl.constexpr, CAUSAL: gl.constexpr, NUMBER: gl.constexpr, LAYOUT: gl.constexpr):
    """For each of a group's 64 rows the number of keys that it sees."""
    _, _, _, _, queries, _, keys, edge = _piece(piece, work, HEADS)
    high = gl.zeros([GROUP], gl.int32, LAYOUT) + keys
    if CAUSAL:
        i = edge * HEADS + NUMBER * GROUP + gl.arange(0, GROUP, LAYOUT)
        high = gl.minimum(keys - queries + i // HEADS + 1, high)
    return high


@gluon.jit
def _fetch(
    work, k, v, k_head, v_head, k_ring, v_ring,
    KEYS: gl.constexpr, STAGES: gl.constexpr, HEADS: gl.constexpr, PER_TILE: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """One warp: the blocks of keys and of values of every piece, in the order in which they are folded."""
    pieces = work[3]
    k_rows, k_full, k_free = k_ring
    v_rows, v_full, v_free = v_ring
    bytes: gl.constexpr = k.block_type.nbytes
    turn = 0
    for piece in range(gl.program_id(0), pieces, gl.num_programs(0)):
        kv, _, _, _, queries, first, keys, edge = _piece(piece, work, HEADS)
        blocks, _ = _blocks(edge, PER_TILE, queries, keys, KEYS, CAUSAL)
        k_column = (kv.to(gl.int64) * k_head).to(gl.int32)
        v_column = (kv.to(gl.int64) * v_head).to(gl.int32)
        for block in range(blocks):
            slot = turn % STAGES
            free = turn // STAGES & 1 ^ 1
            row = EDGE - keys + block * KEYS
            mbarrier.wait(k_free.index(slot), free)
            mbarrier.expect(k_full.index(slot), bytes)
            copy(k, [EDGE, first + keys, row, k_column], k_full.index(slot), k_rows.index(slot))
            mbarrier.wait(v_free.index(slot), free)
            mbarrier.expect(v_full.index(slot), bytes)
            copy(v, [EDGE, first + keys, row, v_column], v_full.index(slot), v_rows.index(slot))
            turn += 1


@gluon.jit
def _scores(
    q, turn, k_ring, turns, KEYS: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
    NUMBER: gl.constexpr, TURNS: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """Issues the scores of one block, when it is there and it is this group's turn."""
    rows, full, _ = k_ring
    if TURNS:  # the first group's first turn is there from the start
        mbarrier.wait(turns.index(NUMBER), turn & 1 ^ (NUMBER == 0))
    mbarrier.wait(full.index(turn % STAGES), turn // STAGES & 1)
    keys = rows.index(turn % STAGES).reshape([KEYS, WIDTH]).permute([1, 0])
    return hopper.warpgroup_mma(q, keys, gl.zeros([GROUP, KEYS], gl.float32, SCORES), use_acc=False, is_async=True)


@gluon.jit
def _mixed(p, mixed, turn, v_ring, KEYS: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr):
    """Issues the product of a block's weights and values."""
    rows, full, _ = v_ring
    mbarrier.wait(full.index(turn % STAGES), turn // STAGES & 1)
    return hopper.warpgroup_mma(p, rows.index(turn % STAGES).reshape([KEYS, WIDTH]), mixed, is_async=True)


@gluon.jit
def _give_back(ring, turn, STAGES: gl.constexpr):
    mbarrier.arrive(ring[2].index(turn % STAGES))


@gluon.jit
def _soften(s, top, total, at, high, post, KEYS: gl.constexpr, SCORES: gl.constexpr, WHOLE: gl.constexpr):
    """Weights of one block, what fades before them, the largest score so far and the sum. WHOLE: every row sees every key of the block."""
    if not WHOLE:
        index = at + gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
        s = gl.where(index[None, :] < high[:, None], s, float("-inf"))
    above = gl.maximum(top, gl.max(s, 1))
    base = gl.where(above == float("-inf"), 0.0, above)  # of a row that has seen no key yet
    p = gl.exp2((s - base[:, None]) * post)  # in this order: the largest score's own weight is 1, whatever its size
    fade = gl.exp2((top - base) * post)
    return p, fade, above, total * fade + gl.sum(p, 1)


@gluon.jit
def _step(
    q, p, mixed, top, total, block, turn, high, post, k_ring, v_ring, turns,
    KEYS: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, NUMBER: gl.constexpr, TURNS: gl.constexpr,
    SCORES: gl.constexpr, MIXED: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Scores of one block, and the values of the block before it."""
    scores = _scores(q, turn, k_ring, turns, KEYS, WIDTH, STAGES, NUMBER, TURNS, SCORES)
    mixed = _mixed(p, mixed, turn - 1, v_ring, KEYS, WIDTH, STAGES)
    if TURNS:
        mbarrier.arrive(turns.index(1 - NUMBER))
    scores = hopper.warpgroup_mma_wait(1, deps=[scores])
    _give_back(k_ring, turn, STAGES)
    weights, fade, top, total = _soften(scores, top, total, block * KEYS, high, post, KEYS, SCORES, WHOLE)
    weights = gl.convert_layout(weights.to(p.dtype), gl.DotOperandLayout(0, MIXED, 2))
    total = gl.inline_asm_elementwise(ORDER, "=f,=f,f,f", [total], gl.float32, is_pure=False, pack=2)
    mixed, p = hopper.warpgroup_mma_wait(0, deps=[mixed, p])
    _give_back(v_ring, turn - 1, STAGES)
    mixed = mixed * gl.convert_layout(fade, gl.SliceLayout(1, MIXED))[:, None]
    return weights, mixed, top, total


@gluon.jit
def _fold(
    work, rows, k_ring, v_ring, turns, post,
    KEYS: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, HEADS: gl.constexpr, PER_TILE: gl.constexpr, CAUSAL: gl.constexpr,
    NUMBER: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Four warps: 64 rows of every piece."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    MIXED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    q, out, q_row, q_head, out_row, q_place = rows
    pieces = work[3]
    place = q_place.index(NUMBER)
    d = gl.arange(0, WIDTH, gl.SliceLayout(0, FLAT))
    turn = 0
    for piece in range(gl.program_id(0), pieces, gl.num_programs(0)):
        _, _, _, _, queries, _, keys, edge = _piece(piece, work, HEADS)
        blocks, whole = _blocks(edge, PER_TILE, queries, keys, KEYS, CAUSAL)
        at, mine = _rows(piece, work, q_row, q_head, HEADS, PER_TILE, NUMBER, gl.SliceLayout(1, FLAT))
        x = gl.load(q + at[:, None] + d[None, :], mask=mine[:, None], other=0.0)
        meet()  # all have read the last piece's rows from there
        place.store(x)
        hopper.fence_async_shared()
        meet()

        top = gl.full([GROUP], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.zeros([GROUP], gl.float32, gl.SliceLayout(1, SCORES))
        mixed = gl.zeros([GROUP, WIDTH], gl.float32, MIXED)
        scores = _scores(place, turn, k_ring, turns, KEYS, WIDTH, STAGES, NUMBER, TURNS, SCORES)
        if TURNS:
            mbarrier.arrive(turns.index(1 - NUMBER))
        scores = hopper.warpgroup_mma_wait(0, deps=[scores])
        _give_back(k_ring, turn, STAGES)
        high = _high(piece, work, HEADS, CAUSAL, NUMBER, gl.SliceLayout(1, SCORES))
        weights, _fade, top, total = _soften(scores, top, total, 0, high, post, KEYS, SCORES, False)
        p = gl.convert_layout(weights.to(x.dtype), gl.DotOperandLayout(0, MIXED, 2))
        for block in range(1, whole):
            p, mixed, top, total = _step(
                place, p, mixed, top, total, block, turn + block, high, post, k_ring, v_ring, turns,
                KEYS, WIDTH, STAGES, NUMBER, TURNS, SCORES, MIXED, True,
            )  # fmt: skip
        high = _high(piece, work, HEADS, CAUSAL, NUMBER, gl.SliceLayout(1, SCORES))
        for block in range(max(whole, 1), blocks):
            p, mixed, top, total = _step(
                place, p, mixed, top, total, block, turn + block, high, post, k_ring, v_ring, turns,
                KEYS, WIDTH, STAGES, NUMBER, TURNS, SCORES, MIXED, False,
            )  # fmt: skip
        turn += blocks
        mixed = _mixed(p, mixed, turn - 1, v_ring, KEYS, WIDTH, STAGES)
        mixed, p = hopper.warpgroup_mma_wait(0, deps=[mixed, p])
        _give_back(v_ring, turn - 1, STAGES)

        mixed = mixed / gl.convert_layout(gl.where(total == 0.0, 1.0, total), gl.SliceLayout(1, MIXED))[:, None]
        place.store(mixed.to(x.dtype))  # every product with q is done
        meet()
        at, mine = _rows(piece, work, out_row, WIDTH, HEADS, PER_TILE, NUMBER, gl.SliceLayout(1, FLAT))
        gl.store(out + at[:, None] + d[None, :], place.load(FLAT), mask=mine[:, None])


@gluon.jit(do_not_specialize=["pieces", "programs", "parts", "group"])
def _kernel(
    q, k, v, out, tiles, cu_q, cu_k, q_row, q_head, k_head, v_head, out_row, pieces, programs, parts, group, post,
    KEYS: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, HEADS: gl.constexpr, PER_TILE: gl.constexpr, CAUSAL: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP, WIDTH], k.dtype)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    q_place = gl.allocate_shared_memory(k.dtype, [2, GROUP, WIDTH], flat)
    k_rows = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, KEYS, WIDTH], k.layout)
    v_rows = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, KEYS, WIDTH], k.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    hopper.fence_async_shared()
    work = (tiles, cu_q, cu_k, pieces, programs, parts, group)
    k_ring = (k_rows, k_full, k_free)
    v_ring = (v_rows, v_full, v_free)
    rows = (q, out, q_row, q_head, out_row, q_place)
    gl.warp_specialize(
        [
            (_fold, (work, rows, k_ring, v_ring, turns, post, KEYS, WIDTH, STAGES, HEADS, PER_TILE, CAUSAL, gl.constexpr(0), TURNS)),
            (_fold, (work, rows, k_ring, v_ring, turns, post, KEYS, WIDTH, STAGES, HEADS, PER_TILE, CAUSAL, gl.constexpr(1), TURNS)),
            (_fetch, (work, k, v, k_head, v_head, k_ring, v_ring, KEYS, STAGES, HEADS, PER_TILE, CAUSAL)),
        ],
        [4, 1],
        [REGISTERS, FETCHER],
    )


def _ragged(name: str, x: Tensor, keys: int) -> TensorDescriptor:
    """All of x [T, G, K] as rows of all heads, in blocks of `keys` rows of one head that a text's end cuts."""
    rows, heads, width = x.shape
    if x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16:
        raise ValueError(f"{name} must begin, and each of its rows, at a multiple of 16 bytes, got strides {x.stride()} at {x.data_ptr()}")
    flat = x.as_strided((rows, (heads - 1) * x.stride(1) + width), (x.stride(0), 1))
    made = create_ragged_descriptor(flat, [keys, width])
    layout = gl.NVMMASharedLayout.get_default_for(list(made.block_shape), getattr(gl, str(x.dtype).split(".")[1]))
    return TensorDescriptor(flat, made.shape, made.strides, made.block_shape, layout)


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
    form: Form | None = None,  # another line of the table, for measuring
) -> Tensor:  # [Tq, H, K] contiguous; rows at and beyond cu_q[-1] are not written
    device, dtype = q.device, activations("q", q)
    rows, heads, width = check("q", q, dtype, device, -1, -1, -1).shape
    keys, kv_heads, _ = check("k", k, dtype, device, -1, -1, width).shape
    check("v", v, dtype, device, keys, kv_heads, width)
    texts = check("cu_q", cu_q, torch.int32, device, -1).shape[0] - 1
    check("cu_k", cu_k, torch.int32, device, texts + 1)
    if dtype is torch.float32 or width not in FORMS:
        raise ValueError(f"this candidate takes bfloat16 and float16 heads of {', '.join(map(str, FORMS))}, got {dtype} heads of {width}")
    for name, given in (("window", window), ("softcap", softcap), ("bias", bias), ("prefix", prefix), ("q_start", q_start)):
        if given is not None:
            raise ValueError(f"this candidate takes no {name}, got {given}")
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key/value heads")
    if not isinstance(schedule, Schedule) or len(schedule.lengths) != texts or schedule.queries > rows:
        raise ValueError(
            f"schedule must be what schedule(lengths) of kernels/attention.py returned for these {texts} texts, got {schedule}"
        )
    if len(schedule.short) > 0:
        raise ValueError(f"this candidate takes long texts only, got {len(schedule.short)} short ones")
    most = FAR // HEADS  # places times heads have 32 bits
    if not 0 < keys < most or rows >= most:
        raise ValueError(f"a batch must hold some keys, and fewer than {most} queries and keys, got {rows} queries and {keys} keys")

    out = torch.empty((rows, heads, width), dtype=dtype, device=device)
    form = FORMS[width] if form is None else form
    group = heads // kv_heads
    in_tile = triton.cdiv(group, triton.cdiv(group, HEADS))
    parts, per_tile = triton.cdiv(group, in_tile), 2 * GROUP.value // in_tile
    tiles = schedule.tiles("long", per_tile, device)
    pieces = tiles.shape[0] * kv_heads * parts
    if pieces == 0:
        return out
    grid = min(pieces, torch.cuda.get_device_properties(device).multi_processor_count) if form.persistent else pieces
    with torch.cuda.device_of(q):
        _kernel[(grid,)](
            q, _ragged("k", k, form.keys), _ragged("v", v, form.keys), out, tiles, cu_q, cu_k,
            q.stride(0), q.stride(1), k.stride(1), v.stride(1), heads * width, pieces, kv_heads * parts, parts, group, scale * LOG2E,
            KEYS=form.keys, WIDTH=width, STAGES=form.stages, HEADS=in_tile, PER_TILE=per_tile, CAUSAL=causal,
            TURNS=form.turns, num_warps=4,
        )  # fmt: skip
    return out
