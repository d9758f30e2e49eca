"""Softmax over the latents of each head, between the two products of NV-Embed's head. Same contract as reference.latent_attention.

    p[t, h, i] = exp(s[t, h, i] - m) / sum over j of exp(s[t, h, j] - m),    m = max over j of s[t, h, j]

Float32 inside, one division a head, one rounding at the end. A score of -inf gives zero; a head with NaN, inf or nothing but -inf is NaN in
all of its latents, and no other head is.

Bytes of a number, in a dtype of b bytes: 2 b. FLOPs: about 5. Bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyembed.kernels.checks import activations, check
from pyembed.kernels.rows import TILES, store_rows, tile


@triton.jit(do_not_specialize=["count"])
def latent_kernel(scores, scores_stride, out, count, latents, ROWS: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr):
    """A row of the tile is one head of one token; those of a token lie side by side."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    kept = (rows < count)[:, None] & (columns < latents)[None, :]
    first = rows // HEADS * scores_stride + rows % HEADS * latents
    x = tl.load(scores + first[:, None] + columns[None, :], mask=kept, other=float("-inf")).to(tl.float32)
    p = tl.exp(x - tl.max(x, 1, keep_dims=True))
    p = p * tl.math.div_rn(1.0, tl.sum(p, 1, keep_dims=True))
    store_rows(p, out, None, rows, columns, count, latents, scores.dtype.element_ty)


def latent_attention(scores: Tensor, heads: int) -> Tensor:
    """[T, heads * latents] -> the same shape, contiguous. Launched as rows.TILES says, a head for a row."""
    tokens, columns = check("scores", scores, activations("scores", scores), scores.device, -1, -1).shape
    if heads < 1 or columns < 1 or columns % heads:
        raise ValueError(f"scores must have the same number of latents for each head, got {columns} columns for {heads} heads")
    latents = columns // heads
    if latents > TILES[-1][0]:
        raise ValueError(f"a head must have at most {TILES[-1][0]} latents, got {latents}")
    launch = tile(latents)
    out = torch.empty((tokens, columns), dtype=scores.dtype, device=scores.device)
    if tokens == 0:
        return out
    with torch.cuda.device_of(scores):
        latent_kernel[(triton.cdiv(tokens * heads, launch["ROWS"]),)](
            scores, scores.stride(0), out, tokens * heads, latents, HEADS=heads, **launch
        )
    return out
