"""Objectives in which a strength follows from its own pre-activation (JumpReLU, ReLU): by sparse products or dense.

The sparse path works on the entries above a floor. While too many lie there for that to win (half of a ReLU's at the
start, nearly all in a wide JumpReLU window), the dense path does the same with the same rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae import kernels
from sae.codes import Codes
from sae.kernels import Above, Work
from sae.objectives.dense import SPARSE_BELOW, dense_work
from sae.objectives.entries import Entry, Sums, add_, derivatives
from sae.objectives.terms import Params

if TYPE_CHECKING:
    from jaxtyping import Float

PROBE = 32
"""About so many rows of a batch, evenly spread, tell its density: under 1% of the encoder's product at 4,096 rows."""


def evaluate(
    params: Params,
    x: Float[Tensor, "B d"],
    floor: Float[Tensor, " F"],
    entry: Entry,
    facts: tuple[Float[Tensor, " F"], ...],
    *,
    dense: bool | None = None,
    implementation: str | None = None,
) -> tuple[Work, Sums, Float[Tensor, ""]]:
    """(the batch's work, sums by feature, share of entries above the floor); the encoder reads x as it is.

    dense   on which path; by default by the density of some of this batch's rows: the same after a resume
    """
    # A transcoder would hand its target to both paths here; the encoder goes on reading x.
    if dense is None:
        some = x[:: max(1, len(x) // PROBE)]
        found = kernels.encode_select(
            some, params.encoder_read, params.b_enc, Above(floor), implementation=implementation
        )
        dense = found.values.numel() > SPARSE_BELOW * found.n_rows * found.n_features
    if dense:
        return dense_work(params, x, floor, entry, facts)
    return sparse_work(params, x, floor, entry, facts, implementation)


def sparse_work(
    params: Params,
    x: Tensor,
    floor: Tensor,
    entry: Entry,
    facts: tuple[Tensor, ...],
    implementation: str | None = None,
) -> tuple[Work, Sums, Tensor]:
    """By the kernels, over the entries above the floor."""
    B, F = x.shape[0], params.b_enc.shape[0]
    kept = kernels.encode_select(x, params.encoder_read, params.b_enc, Above(floor), implementation=implementation)
    at = kept.indices
    entries = entry(kept.values, *(fact[at] for fact in facts))
    codes = Codes(entries.strength, at, kept.offsets, F)
    made = kernels.reconstruct(codes, params.W_dec, params.b_dec, x, implementation=implementation)
    d_strength, d_pre = derivatives(entries, made.value_grads, B)

    sums = Sums.zeros(F, x.device)
    sums.squared = made.squared.sum()
    add_(sums, entries, d_strength, lambda total, values: total.index_add_(0, at, values))
    work = Work(codes, x, made.error.mul_(2 / B), d_pre, (F,), subtracts_b_dec=False)
    density = torch.tensor(at.numel() / (B * F), device=x.device)
    return work, sums, density
