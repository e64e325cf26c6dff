"""The encoder's product in row chunks, with one number for every 64 columns: all that a selection needs to look at.

A chunk of the product is [n, G·64] in the encoder's dtype, at most CHUNK_BYTES (G = ⌈F/64⌉; columns beyond F are −∞).
Its summary [n, G] is each group's largest pre-activation, or, where a floor is given, how many of the group are above
it. Two ways to the same numbers: cuBLAS and then one pass over the product, or one kernel whose epilogue writes both;
tuned.json says which is faster on a card (the pass costs 3-6% of a step, so the kernel must come as near to cuBLAS).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.kernels.triton.tuned import FUSED, settings

GROUP = 64
CHUNK_BYTES = 1 << 28
# Here cuBLAS is far ahead of anything written in Triton, and the pass over the product costs next to nothing.
ALWAYS_LIBRARY = (torch.float32,)


def chunks(
    x: Tensor, encoder: Tensor, b_enc: Tensor, floor: Tensor | None = None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first row, product [n, G·64], summary [n, G]) of each chunk; the next chunk overwrites the product."""
    B, F = x.shape[0], encoder.shape[0]
    G = triton.cdiv(F, GROUP)
    n = max(1, min(B, CHUNK_BYTES // (G * GROUP * encoder.element_size())))
    product = torch.empty(n, G * GROUP, dtype=encoder.dtype, device=x.device)
    product[:, F:] = float("-inf")
    x = x.to(encoder.dtype)
    for start in range(0, B, n):
        rows = x[start : start + n]
        yield start, product[: len(rows)], _multiply(rows, encoder, b_enc, floor, product[: len(rows)])


def _multiply(x: Tensor, encoder: Tensor, b_enc: Tensor, floor: Tensor | None, product: Tensor) -> Tensor:
    (n, d), F, G = x.shape, encoder.shape[0], product.shape[1] // GROUP
    summary = torch.empty(n, G, dtype=torch.float32 if floor is None else torch.int32, device=x.device)
    options = settings("product", d)
    if options.pop("library") or encoder.dtype in ALWAYS_LIBRARY:
        torch.mm(x, encoder.T, out=product[:, :F])
        options = settings("summary", d)
        grid = (n, triton.cdiv(G, options["GROUPS"]))
        _summary[grid](product, b_enc, floor, summary, F, G, SIZE=GROUP, **options, **FUSED)
    else:
        grid = (triton.cdiv(n, options["BLOCK_B"]) * triton.cdiv(F, options["BLOCK_F"]),)
        _product[grid](x, encoder, b_enc, floor, product, summary, n, F, d, G, SIZE=GROUP, **options, **FUSED)
    return summary


@triton.jit
def _of_group(product, columns, b_enc, floor, F, axis: tl.constexpr):
    """Largest pre-activation of each group (or, with a floor, how many are above it) along `axis`."""
    pre = product.to(tl.float32) + tl.load(b_enc + columns, mask=columns < F, other=0.0)
    if floor is None:
        return tl.max(tl.where(columns < F, pre, float("-inf")), axis)
    else:
        above = (pre > tl.load(floor + columns, mask=columns < F, other=0.0)) & (columns < F)
        return tl.sum(above.to(tl.int32), axis)


@triton.jit
def _summary(product, b_enc, floor, summary, F, G, SIZE: tl.constexpr, GROUPS: tl.constexpr):
    """One program: GROUPS groups of one row."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    low = tl.load(product + row * G * SIZE + columns, mask=columns < F, other=0.0)
    tl.store(summary + row * G + groups, _of_group(low, columns, b_enc, floor, F, 1), mask=groups < G)


@triton.jit
def _product(
    x, encoder, b_enc, floor, product, summary, n, F, d, G,
    SIZE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the product. BAND tiles of rows share an encoder tile while it is in the L2 cache."""
    tiles_B, tiles_F = tl.cdiv(n, BLOCK_B), tl.cdiv(F, BLOCK_F)
    band = tl.program_id(0) // (BAND * tiles_F)
    height = tl.minimum(tiles_B - band * BAND, BAND)
    at = tl.program_id(0) % (BAND * tiles_F)
    rows = (band * BAND + at % height) * BLOCK_B + tl.arange(0, BLOCK_B)
    groups = (at // height) * (BLOCK_F // SIZE) + tl.arange(0, BLOCK_F // SIZE)
    columns = (at // height) * BLOCK_F + tl.arange(0, BLOCK_F)
    inner = tl.arange(0, BLOCK_D)
    # Rows and columns beyond the ends read the first ones again (no masks in the loop) and are not stored.
    x += ((rows % n).to(tl.int64) * d)[:, None] + inner[None, :]
    encoder += ((columns % F).to(tl.int64) * d)[None, :] + inner[:, None]
    total = tl.zeros([BLOCK_B, BLOCK_F], tl.float32)
    for start in range(0, d, BLOCK_D):
        left = tl.load(x + start, mask=inner[None, :] < d - start, other=0.0)
        right = tl.load(encoder + start, mask=inner[:, None] < d - start, other=0.0)
        total = tl.dot(left, right, total)
    low = total.to(product.dtype.element_ty)
    there = (rows < n)[:, None]
    at_rows = rows.to(tl.int64)[:, None]
    tl.store(product + at_rows * G * SIZE + columns[None, :], low, mask=there & (columns < F)[None, :])
    grouped = tl.reshape(low, [BLOCK_B, BLOCK_F // SIZE, SIZE])
    columns = tl.reshape(columns, [1, BLOCK_F // SIZE, SIZE])
    made = _of_group(grouped, columns, b_enc, floor, F, 2)
    tl.store(summary + at_rows * G + groups[None, :], made, mask=there & (groups < G)[None, :])
