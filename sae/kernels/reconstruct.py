"""Decode, the error against the target, and what each active strength could do about it, in one pass.

With levels (Matryoshka) the reconstruction of level g uses only the features below its end; the loss is
½ Σ_g weight_g ‖x̂_g − target‖², and a feature of level g sees the error Σ_{g' ≥ g} weight_g' (x̂_g' − target).
Without levels that is the plain error. The value gradient of entry (b, j) is its error · W_dec[j]: it reads the same
decoder rows as the decoding, so the two belong together (gathered once where the backend can).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.codes import Codes
from sae.kernels import triton
from sae.kernels.decode import decode
from sae.kernels.native import call, native

if TYPE_CHECKING:
    from jaxtyping import Float

_SUM = 0  # torch's code for embedding_bag(mode="sum")


@dataclass(frozen=True)
class Reconstruction:
    error: Float[Tensor, "G B d"]
    """Derivative of ½ Σ_g weight_g ‖x̂_g − target‖² by what a feature of level g adds."""
    value_grads: Float[Tensor, " nnz"]
    """The same by each entry's strength: error[level of its feature, its row] · W_dec[its feature]."""
    squared: Float[Tensor, "G B"]
    """‖x̂_g − target‖² of each row, unweighted."""


def reconstruct(
    codes: Codes,
    W_dec: Float[Tensor, "F d"],
    b_dec: Float[Tensor, " d"],
    target: Float[Tensor, "B d"],
    *,
    levels: tuple[int, ...] | None = None,
    weights: tuple[float, ...] | None = None,
    implementation: str | None = None,
) -> Reconstruction:
    """Errors and value gradients of a batch, float32, in the units of W_dec and target.

    codes     features ascending within a row; every entry gets a value gradient, those of value 0 too
    levels    ends of the levels, ascending, the last one F; default (F,)
    weights   of each level's squared error; default 1 each
    memory    [G, B, d] and [nnz]; never [nnz, d] on CPU
    """
    levels = levels or (codes.n_features,)
    weights = weights or (1.0,) * len(levels)
    if implementation is None and triton.takes(W_dec):
        from sae.kernels.triton.reconstruct import reconstruct as on_cuda

        return on_cuda(codes, W_dec, b_dec, target, levels, weights)
    if implementation == "plain":
        return _plain(codes, W_dec, b_dec, target, levels, weights)
    operands = (codes.values, W_dec, b_dec, target)
    if W_dec.device.type == "cpu" and all(t.dtype == torch.float32 for t in operands) and native() is not None:
        return _native(codes, W_dec, b_dec, target, levels, weights)
    return _torch(codes, W_dec, b_dec, target, levels, weights)


def _plain(codes: Codes, W_dec, b_dec, target, levels, weights) -> Reconstruction:
    acts = codes.dense().to(W_dec.dtype)
    misses = torch.stack([acts[:, :end] @ W_dec[:end] + b_dec - target for end in levels])
    weighted = misses * torch.tensor(weights, device=misses.device)[:, None, None]
    error = weighted.flip(0).cumsum(0).flip(0)
    level = torch.searchsorted(torch.tensor(levels, device=misses.device), codes.indices, right=True)
    value_grads = (error[level, codes.rows()] * W_dec[codes.indices]).sum(dim=1)
    return Reconstruction(error, value_grads, misses.square().sum(2))


def _native(codes: Codes, W_dec, b_dec, target, levels, weights) -> Reconstruction:
    (B, d), G = target.shape, len(levels)
    made = Reconstruction(torch.empty(G, B, d), torch.empty(len(codes.values)), torch.empty(G, B))
    call(
        "reconstruct",
        *(B, d, codes.offsets.contiguous(), codes.indices.contiguous(), codes.values.contiguous()),
        *(W_dec.contiguous(), b_dec.contiguous(), target.contiguous()),
        *(G, torch.tensor(levels), torch.tensor(weights, dtype=torch.float32)),
        *(made.error, made.value_grads, made.squared, torch.empty(torch.get_num_threads(), 2, d)),
    )
    return made


def _torch(codes: Codes, W_dec, b_dec, target, levels, weights) -> Reconstruction:
    rows, misses, squared = codes.rows(), [], []
    level = torch.searchsorted(torch.tensor(levels, device=W_dec.device), codes.indices, right=True)
    for end in levels:
        # the entries of later levels count with strength 0
        upto = codes if end == codes.n_features else replace(codes, values=codes.values * (codes.indices < end))
        misses.append(decode(upto, W_dec, b_dec).sub_(target))
        squared.append(torch.linalg.vector_norm(misses[-1], dim=1).square_())
        misses[-1].mul_(weights[len(misses) - 1])
    for g in reversed(range(len(levels) - 1)):
        misses[g] += misses[g + 1]
    grads = torch.zeros_like(codes.values)
    for g, error in enumerate(misses):
        grads += _value_grads(error, W_dec, codes, rows).mul_(level == g)
    return Reconstruction(torch.stack(misses), grads, torch.stack(squared))


def _value_grads(error, W_dec, codes: Codes, rows) -> Tensor:
    """error[row] · W_dec[feature] of every entry, without an [nnz, d] on CPU."""
    if W_dec.device.type != "cpu":
        return (error[rows] * W_dec[codes.indices]).sum(1)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        error, W_dec, codes.indices, codes.offsets[:-1], rows, _SUM
    )
