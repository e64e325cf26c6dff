"""decode on CUDA: one program for a row and a tile of columns, summed in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.codes import Codes
from sae.kernels.triton.tuned import FUSED, settings


def decode(codes: Codes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """See sae/kernels/decode.py."""
    B, d = codes.n_rows, W_dec.shape[1]
    out = torch.empty(B, d, dtype=W_dec.dtype, device=W_dec.device)
    options = settings("decode", d)
    grid = (B, triton.cdiv(d, options["BLOCK_D"]))
    _decode[grid](codes.values, codes.indices, codes.offsets, W_dec, b_dec, out, d, **options, **FUSED)
    return out


@triton.jit
def _decode(values, indices, offsets, W_dec, b_dec, out, d, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.load(b_dec + columns, mask=columns < d, other=0.0).to(tl.float32)
    last = tl.load(offsets + row + 1)
    for start in range(tl.load(offsets + row), last, BLOCK_K):
        entries = start + tl.arange(0, BLOCK_K)
        there = entries < last
        strength = tl.load(values + entries, mask=there, other=0.0).to(tl.float32)
        feature = tl.load(indices + entries, mask=there, other=0)
        mask = there[:, None] & (columns < d)[None, :]
        W = tl.load(W_dec + feature[:, None] * d + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(strength[:, None] * W, 0)
    tl.store(out + row * d + columns, total.to(out.dtype.element_ty), mask=columns < d)
