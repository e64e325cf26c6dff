"""Codes transposed: for every feature, the batch rows in which it is active.

Stable (rows ascend within a feature) and free of atomics, so sums over it are the same to the bit from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.codes import Codes
from sae.kernels import triton

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class ByFeature:
    """Entries sorted by feature: feature j owns entries offsets[j]:offsets[j+1] of `order` and `rows`."""

    order: Int[Tensor, " nnz"]
    """Where the sorted entry stands in the codes."""
    rows: Int[Tensor, " nnz"]
    """Its batch row."""
    offsets: Int[Tensor, " F_plus_1"]

    def sums(self, entries: Float[Tensor, " nnz"]) -> Float[Tensor, " F"]:
        """Σ of each feature's entries, without atomics; on a CPU index_add_ is faster and as exact."""
        return torch.segment_reduce(entries[self.order], "sum", offsets=self.offsets, initial=0.0, unsafe=True)


def by_feature(codes: Codes) -> ByFeature:
    """Sort the entries of the codes by feature, stably. The plain version is the fast one: one stable sort."""
    if triton.takes(codes.indices):
        from sae.kernels.triton.by_feature import by_feature as on_cuda

        return on_cuda(codes)
    # A radix sort of int32 keys is the fast path of torch.sort; indices fit (F < 2^31).
    _, order = torch.sort(codes.indices.to(torch.int32), stable=True)
    counts = torch.bincount(codes.indices, minlength=codes.n_features)
    offsets = torch.zeros(codes.n_features + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return ByFeature(order, codes.rows()[order], offsets)
