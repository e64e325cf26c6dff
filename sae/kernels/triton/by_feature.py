"""by_feature on CUDA: one stable radix sort, never waiting for the host (bincount and repeat_interleave would)."""

from __future__ import annotations

import torch
from torch import Tensor

from sae.codes import Codes
from sae.kernels.by_feature import ByFeature


def by_feature(codes: Codes) -> ByFeature:
    """See sae/kernels/by_feature.py."""
    F, device = codes.n_features, codes.indices.device
    # A radix sort takes time by the width of its keys.
    narrow = torch.int16 if F < 2**15 else torch.int32
    keys, order = torch.sort(codes.indices.to(narrow), stable=True)
    offsets = torch.searchsorted(keys, torch.arange(F + 1, dtype=narrow, device=device))
    return ByFeature(order, rows_of(codes)[order], offsets)


def rows_of(codes: Codes) -> Tensor:
    """The batch row of every entry."""
    entries = torch.arange(codes.indices.shape[0], device=codes.indices.device)
    return torch.searchsorted(codes.offsets[1:], entries, right=True)
