"""How many tokens ago each feature fired; the dead are those that waited longer than `window` tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.codes import Codes

if TYPE_CHECKING:
    from jaxtyping import Bool


def dead_window(tokens: int, dead_after: int | None) -> int:
    """Tokens without firing after which a feature is dead; by default min(10M, 5% of the run), so that short runs
    revive anything at all."""
    return min(10_000_000, tokens // 20) if dead_after is None else dead_after


class Dead:
    def __init__(self, n_features: int, window: int):
        self.window = window
        self.since = torch.zeros(n_features, dtype=torch.int64)

    def count_(self, codes: Codes) -> None:
        """Note which features fired in this batch."""
        self.since += codes.n_rows
        self.since[codes.indices[codes.values > 0]] = 0

    def mask(self) -> Bool[Tensor, " F"]:
        return self.since > self.window

    def share(self) -> float:
        return self.mask().float().mean().item()
