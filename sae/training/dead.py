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
    def __init__(self, n_features: int, window: int, device: torch.device | str = "cpu"):
        self.window = window
        self._since = torch.zeros(n_features + 1, dtype=torch.int64, device=device)
        self.since = self._since[:-1]
        """Tokens since each feature fired."""

    def count_(self, codes: Codes, fired: Bool[Tensor, " F"] | None = None) -> None:
        """Note which features fired in this batch: those of the codes, or `fired` where the codes do not tell."""
        self.since += codes.n_rows
        if fired is None:
            # Entries that did not fire are sent to a spare place, so that nothing waits for a device to count them.
            self._since.index_fill_(0, torch.where(codes.values > 0, codes.indices, self.since.shape[0]), 0)
        else:
            self.since.masked_fill_(fired, 0)

    def mask(self) -> Bool[Tensor, " F"]:
        return self.since > self.window

    def share(self) -> float:
        return self.mask().float().mean().item()
