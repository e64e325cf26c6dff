"""The same work as objectives/elementwise.py's, by dense products: for batches in which most entries count.

Rows go in chunks, so that [B, F] is never held; five products of 2·B·d·F operations a batch, in float32 but for the
encoder's, which is that of encode_select. The work has no codes: all features' gradients are its `extra`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.codes import Codes
from sae.kernels import RowGradients, Work
from sae.objectives.entries import Entry, Sums, add_, derivatives
from sae.objectives.terms import Params

if TYPE_CHECKING:
    from jaxtyping import Float

SPARSE_BELOW = 0.1
"""Share of entries above the floor under which the sparse path is taken, at some 100 bytes an entry. Seconds for a
step of ReLU at B = 1,024, d = 576, bf16, on two busy cores: F = 2,048: sparse 0.07 at a density of 5% and 0.16 at 12%,
dense 0.20 to 0.27; F = 16,384: sparse 1.3 at 0.5%, 1.5 at 3%, 3.3 at 10%, dense 3.3 to 7.2 whatever the density."""
CHUNK = 1 << 21
"""Entries of a chunk: its matrices of 8 MB stay in the cache, and are large enough for the products."""


def dense_work(
    params: Params,
    x: Float[Tensor, "B d"],
    floor: Float[Tensor, " F"],
    entry: Entry,
    facts: tuple[Float[Tensor, " F"], ...],
) -> tuple[Work, Sums, Float[Tensor, ""]]:
    """(work, sums by feature, share of entries above the floor). Memory: gradients [F, d], a few chunks."""
    B, F = x.shape[0], params.b_enc.shape[0]
    n = max(1, min(B, CHUNK // F))
    encoder, read = params.encoder_read, x.to(params.encoder_read.dtype)
    product = torch.empty(n, F, dtype=encoder.dtype, device=x.device)
    pre, value_grads = torch.empty(2, n, F, device=x.device)
    error = torch.empty_like(x)
    d_encoder, d_W_dec = torch.zeros_like(params.encoder), torch.zeros_like(params.W_dec)
    d_b_enc = torch.zeros_like(params.b_enc)
    sums = Sums.zeros(F, x.device)
    above = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, B, n):
        rows = slice(start, min(start + n, B))
        some = slice(0, rows.stop - start)
        torch.mm(read[rows], encoder.T, out=product[some])
        torch.add(product[some], params.b_enc, out=pre[some])
        entries = entry(pre[some], *facts)
        torch.addmm(params.b_dec - x[rows], entries.strength, params.W_dec, out=error[rows])
        sums.squared += error[rows].square().sum()
        torch.mm(error[rows], params.W_dec.T, out=value_grads[some])
        d_strength, d_pre = derivatives(entries, value_grads[some], B)
        add_(sums, entries, d_strength, lambda total, values: total.add_(values.sum(0)))
        d_W_dec.addmm_(entries.strength.T, error[rows], alpha=2 / B)
        d_encoder.addmm_(d_pre.T, x[rows])
        d_b_enc.add_(d_pre.sum(0))
        above += (pre[some] > floor).sum()

    nothing = torch.empty(0, dtype=torch.int64, device=x.device)
    codes = Codes(x.new_empty(0), nothing, torch.zeros(B + 1, dtype=torch.int64, device=x.device), F)
    extra = RowGradients(torch.arange(F, device=x.device), d_encoder, d_W_dec, d_b_enc)
    work = Work(codes, x, error.mul_(2 / B)[None], x.new_empty(0), (F,), subtracts_b_dec=False, extra=extra)
    return work, sums, above / (B * F)
