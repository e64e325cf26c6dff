"""Codes: sparse feature activations in CSR, the noun that all rooms share.

One representation for every architecture: row b of a batch holds the features
`indices[offsets[b]:offsets[b+1]]` with strengths `values[...]`, in the units of the SAE that made them.
Entries with value 0 may occur (TopK with a negative pre-activation); they count as not firing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Codes:
    """values [nnz] float, indices [nnz] int64, offsets [B+1] int64; `n_features` is F = d_sae."""

    values: Float[Tensor, " nnz"]
    indices: Int[Tensor, " nnz"]
    offsets: Int[Tensor, " B_plus_1"]
    n_features: int

    @property
    def n_rows(self) -> int:
        return self.offsets.shape[0] - 1

    def rows(self) -> Int[Tensor, " nnz"]:
        """The batch row of every entry."""
        counts = self.offsets[1:] - self.offsets[:-1]
        return torch.repeat_interleave(torch.arange(self.n_rows, device=counts.device), counts)

    def dense(self) -> Float[Tensor, "B F"]:
        """The same activations as a dense [B, F] matrix."""
        out = torch.zeros(self.n_rows, self.n_features, dtype=self.values.dtype, device=self.values.device)
        return out.index_put_((self.rows(), self.indices), self.values, accumulate=True)

    def l0(self) -> Float[Tensor, " B"]:
        """How many features fire in each row (entries that are not 0; AbsTopK's may be below it)."""
        fired = (self.values != 0).to(torch.float32)
        return torch.zeros(self.n_rows, device=fired.device).index_add_(0, self.rows(), fired)


def from_topk(values: Float[Tensor, "B k"], indices: Int[Tensor, "B k"], n_features: int) -> Codes:
    """Codes with the same number of entries in every row."""
    B, k = values.shape
    offsets = torch.arange(0, B * k + 1, k, device=values.device) if k else torch.zeros(B + 1, dtype=torch.int64)
    return Codes(values.reshape(-1), indices.reshape(-1), offsets, n_features)


def from_dense(acts: Float[Tensor, "B F"]) -> Codes:
    """Codes of what is not zero in a dense matrix."""
    rows, indices = torch.nonzero(acts, as_tuple=True)
    counts = torch.bincount(rows, minlength=acts.shape[0])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Codes(acts[rows, indices], indices, offsets, acts.shape[1])


def joined(parts: Sequence[Codes]) -> Codes:
    """Codes of several groups of rows as one."""
    counts = torch.cat([part.offsets[1:] - part.offsets[:-1] for part in parts])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    values, indices = (torch.cat([getattr(part, name) for part in parts]) for name in ("values", "indices"))
    return Codes(values, indices, offsets, parts[0].n_features)
