"""reconstruct on CUDA: one program a row, which reads each decoder row once.

A value gradient is a sum over columns, and the error of some columns needs only those columns of the decoder rows. So
the program goes through d in tiles: decode a tile, take its error, add its share to the value gradients. The second
reading of a tile of at most BLOCK_K · BLOCK_D weights comes from the L1 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.codes import Codes
from sae.kernels.reconstruct import Reconstruction
from sae.kernels.triton.tuned import FUSED, settings


def reconstruct(
    codes: Codes, W_dec: Tensor, b_dec: Tensor, target: Tensor, levels: tuple[int, ...], weights: tuple[float, ...]
) -> Reconstruction:
    """See sae/kernels/reconstruct.py."""
    B, d = target.shape
    error = torch.empty(len(levels), B, d, device=target.device)
    value_grads = torch.zeros(codes.values.shape, device=target.device)
    squared = torch.zeros(len(levels), B, device=target.device)
    _reconstruct[(B,)](
        codes.values, codes.indices, codes.offsets, W_dec, b_dec, target, error, value_grads, squared, B, d,
        BEGINS=(0, *levels[:-1]), ENDS=levels, WEIGHTS=weights, **settings("reconstruct", d), **FUSED,
    )  # fmt: skip
    return Reconstruction(error, value_grads, squared)


@triton.jit
def _reconstruct(
    values, indices, offsets, W_dec, b_dec, target, error, value_grads, squared, B, d,
    BEGINS: tl.constexpr, ENDS: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each address of value_grads and squared has one program that adds to it, in order: the sums never vary."""
    LEVELS: tl.constexpr = len(ENDS)
    row = tl.program_id(0).to(tl.int64)
    first, last = tl.load(offsets + row), tl.load(offsets + row + 1)
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = columns < d
        miss = tl.load(b_dec + columns, mask=inside, other=0.0) - tl.load(
            target + row * d + columns, mask=inside, other=0.0
        )
        for entry in range(first, last, BLOCK_K):
            strength, W = _tile(values, indices, W_dec, entry, last, 0, ENDS[LEVELS - 1], columns, d, BLOCK_K)
            miss += tl.sum(strength[:, None] * W, 0)
        # From the last level to the first: what level g adds also counts for all levels after it.
        weighted = tl.zeros_like(miss)
        for level in tl.static_range(LEVELS - 1, -1, -1):
            tl.atomic_add(squared + level * B + row, tl.sum(miss * miss, 0), sem="relaxed")
            weighted += WEIGHTS[level] * miss
            tl.store(error + (level * B + row) * d + columns, weighted, mask=inside)
            for entry in range(first, last, BLOCK_K):
                strength, W = _tile(
                    values, indices, W_dec, entry, last, BEGINS[level], ENDS[level], columns, d, BLOCK_K
                )
                entries = entry + tl.arange(0, BLOCK_K)
                share = tl.sum(W * weighted[None, :], 1)
                tl.atomic_add(value_grads + entries, share, mask=entries < last, sem="relaxed")
                if level > 0:
                    miss -= tl.sum(strength[:, None] * W, 0)


@triton.jit
def _tile(values, indices, W_dec, entry, last, begin, end, columns, d, BLOCK_K: tl.constexpr):
    """Strengths [BLOCK_K] and decoder columns [BLOCK_K, BLOCK_D] of the entries whose feature is in begin:end."""
    entries = entry + tl.arange(0, BLOCK_K)
    there = entries < last
    feature = tl.load(indices + entries, mask=there, other=0)
    there = there & (feature >= begin) & (feature < end)
    strength = tl.load(values + entries, mask=there, other=0.0)
    mask = there[:, None] & (columns < d)[None, :]
    return strength, tl.load(W_dec + feature[:, None] * d + columns[None, :], mask=mask, other=0.0).to(tl.float32)
