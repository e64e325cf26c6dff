"""Where and when an edit works: which positions of a forward, and how much of it at each generated token.

Left alone, bit for bit, unless `special=True`: special tokens, padding, the first real position of a row and of each
document packed in it (attention sinks), and positions whose norm is above the SAE's outlier limit. In a cached forward
of one generated token only its id and norm are looked at.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.errors import UserError, nearest
from sae.host import Pass

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

POSITIONS = ("all", "prompt", "generated", "last")
Positions = str | Callable[[Pass], Tensor]
Schedule = Callable[[int], float]
SCHEDULES = ("ramp", "fade", "first")


@dataclass(frozen=True)
class Where:
    """Which positions an edit touches.

    positions     all · prompt · generated · last (of the prompt) · "4:" (from token 4 of each text, counted from 0), or
                  a function Pass → [B, T] bool
    special       include special tokens, padding, the first real position of a text and outlier-norm positions
    special_ids   the host's; outlier_norm the SAE's limit on ‖x‖, None where it has none
    """

    positions: Positions = "all"
    special: bool = False
    special_ids: frozenset[int] = frozenset()
    outlier_norm: float | None = None

    def __post_init__(self) -> None:
        named = isinstance(self.positions, str) and self._from is None
        if named and self.positions not in POSITIONS:
            raise UserError(
                f"positions: '{self.positions}' is not one of {', '.join(POSITIONS)}"
                f"{nearest(str(self.positions), POSITIONS)} or a slice such as 4:. Choose one of them."
            )

    @property
    def needs_pass(self) -> bool:
        """Whether prompt, generated tokens or token ids decide, and not the columns alone."""
        return self.positions != "all"

    @property
    def _from(self) -> int | None:
        match = re.fullmatch(r"(\d{1,9}):", self.positions) if isinstance(self.positions, str) else None
        return int(match[1]) if match else None

    def columns(self, at: Pass) -> tuple[int, int]:
        """The columns [start, stop) of this forward that `positions` names."""
        T, past, prompt = at.tokens.shape[1], at.past, at.prompt_length
        start, stop = {
            "prompt": (0, prompt),
            "generated": (prompt, past + T),
            "last": (prompt - 1, prompt),
        }.get(self.positions if isinstance(self.positions, str) else "all", (0, past + T))
        return min(max(start - past, 0), T), min(max(stop - past, 0), T)

    def mask(self, rows: Float[Tensor, "B t d"], at: Pass, start: int, stop: int) -> Bool[Tensor, "B t"] | None:
        """Which of the columns [start, stop), whose activations `rows` are, are edited; None when all are."""
        kept: list[Tensor] = []
        if callable(self.positions):
            kept.append(self.positions(at)[:, start:stop].to(rows.device))
        elif self._from is not None:
            kept.append((_index_in_text(at)[:, start:stop] >= self._from).to(rows.device))
        if not self.special:
            kept.extend(self._ordinary(rows, at, start, stop))
        return functools.reduce(torch.logical_and, kept) if kept else None

    def _ordinary(self, rows: Tensor, at: Pass, start: int, stop: int) -> Iterable[Tensor]:
        if self.special_ids:
            table = _ordinary_ids(self.special_ids, at.tokens.device)
            yield table[at.tokens[:, start:stop].clamp(-1, len(table) - 2)].to(rows.device)
        if at.past + start < at.prompt_length or at.past == 0:  # a generated token is real and not the first
            yield (_index_in_text(at)[:, start:stop] > 0).to(rows.device)
        if self.outlier_norm is not None:
            yield torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32) <= self.outlier_norm


def _index_in_text(at: Pass) -> Tensor:
    """Each position's number in its text [B, T], -1 at padding."""
    B, T = at.tokens.shape
    if at.doc is not None:
        columns = torch.arange(T, device=at.doc.device).expand(B, -1)
        begins = torch.ones_like(at.doc, dtype=torch.bool)
        begins[:, 1:] = at.doc[:, 1:] != at.doc[:, :-1]
        first = torch.where(begins, columns, 0).cummax(dim=1).values
        return torch.where(at.doc >= 0, columns - first, -1)
    if at.attention_mask is None:
        return torch.arange(at.past, at.past + T, device=at.tokens.device).expand(B, -1)
    real = at.attention_mask > 0
    return torch.where(real, real.cumsum(dim=1) - 1, -1)[:, at.past : at.past + T]


@functools.lru_cache
def _ordinary_ids(special: frozenset[int], device: torch.device) -> Tensor:
    """Whether an id is none of these, by id, up to one above the largest; -1 (unknown, the last) is ordinary too."""
    table = torch.ones(max(special) + 3, dtype=torch.bool)
    table[sorted(special)] = False
    return table.to(device)


def schedule(text: str) -> Schedule:
    """ramp:20 (from nothing to the whole edit over 20 generated tokens), fade:20 (back) or first:20 (then off)."""
    name, _, count = text.partition(":")
    if name not in SCHEDULES or not re.fullmatch(r"[1-9]\d{0,8}", count):
        raise UserError(f"schedule: '{text[:60]}' is not one. Write ramp:20, fade:20 or first:20.")
    n = int(count)
    if name == "first":
        return lambda token: float(token < n)
    if name == "ramp":
        return lambda token: min(1.0, token / n)
    return lambda token: max(0.0, 1 - token / n)


def weights(plan: Schedule, at: Pass, start: int, stop: int) -> list[float]:
    """How much of the edit each of the columns [start, stop) gets; the prompt gets that of token 0."""
    return [float(plan(max(0, at.past + column - at.prompt_length))) for column in range(start, stop)]
