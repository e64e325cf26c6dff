"""Which of several processes this one is, as torchrun (or a user by hand) says it: RANK and WORLD_SIZE.

One process is rank 0 of 1, so that no caller asks whether there are several. Nothing here talks to the others: work is
dealt out by number, and what is finished is seen in the folder that all of them write.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from sae.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """One of `world` processes."""

    rank: int = 0
    world: int = 1

    def __post_init__(self):
        if not 0 <= self.rank < self.world:
            raise UserError(
                f"rank {self.rank} of {self.world}: ranks go from 0 to {self.world - 1}. Set RANK and WORLD_SIZE so."
            )

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world}"

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Every world-th of the items, from the rank-th on."""
        return items[self.rank :: self.world]


def this_rank() -> Rank:
    """From RANK and WORLD_SIZE; alone where they are not set."""
    told = {}
    for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)):
        text = os.environ.get(name, str(alone))
        if not text.isdecimal():
            raise UserError(f"{name} is '{text}', expected a whole number. Set RANK and WORLD_SIZE, or unset both.")
        told[name] = int(text)
    return Rank(told["RANK"], told["WORLD_SIZE"])
