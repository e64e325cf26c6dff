"""A rule on single entries: pre-activation → strength, penalty and their derivatives; and sums of its answers.

JumpReLU and ReLU are such rules. A rule is told nothing of shapes, so that one function works on the entries above a
floor (objectives/elementwise.py) and on whole rows (objectives/dense.py), and the two cannot differ.
Loss: mean over rows of ‖x − x̂‖² + Σ penalties, sums over d and over entries; x̂ = strengths · W_dec + b_dec.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.objectives.terms import Losses

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Entries:
    """A rule's answer, each of the shape of the pre-activations; None is 0 everywhere."""

    strength: Tensor
    slope: Tensor
    """d strength / d pre."""
    slope_threshold: Tensor | None = None
    """d strength / d log θ."""
    penalty: Tensor | None = None
    """Weighted, as are its derivatives."""
    penalty_by_strength: Tensor | None = None
    penalty_by_norm: Tensor | None = None
    """By the norm of the feature's decoder row."""
    penalty_by_pre: Tensor | None = None
    """Beside what goes through the strength."""
    window: Tensor | None = None
    """bool: where the threshold's kernel is not 0."""


Entry = Callable[..., Entries]
"""(pre, *facts of its feature) → Entries. Nothing comes of a pre-activation that is not above its feature's floor."""


@dataclass
class Sums:
    """Over the rows of a batch, by feature."""

    active: Float[Tensor, " F"]
    """Entries of positive strength."""
    window: Float[Tensor, " F"]
    strength: Float[Tensor, " F"]
    by_norm: Float[Tensor, " F"]
    by_log_threshold: Float[Tensor, " F"]
    """Of the loss through the strengths; a penalty of its own the page adds."""
    penalty: Float[Tensor, ""]
    squared: Float[Tensor, ""]
    """‖x − x̂‖²."""

    @staticmethod
    def zeros(F: int, device: torch.device) -> Sums:
        return Sums(*torch.zeros(5, F, device=device), *torch.zeros(2, device=device))


def derivatives(entries: Entries, value_grads: Tensor, B: int) -> tuple[Tensor, Tensor]:
    """The loss's by strength and by pre-activation; value_grads are error · W_dec[j] of the plain error."""
    d_strength = value_grads * (2 / B)
    if entries.penalty_by_strength is not None:
        d_strength.add_(entries.penalty_by_strength, alpha=1 / B)
    d_pre = d_strength * entries.slope
    if entries.penalty_by_pre is not None:
        d_pre.add_(entries.penalty_by_pre, alpha=1 / B)
    return d_strength, d_pre


def add_(
    sums: Sums,
    entries: Entries,
    d_strength: Tensor,
    collect: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Add entries to the sums; `collect` adds values, shaped as the entries are, to a total by feature in place."""
    collect(sums.active, (entries.strength > 0).float())
    collect(sums.strength, entries.strength)
    if entries.window is not None:
        collect(sums.window, entries.window.float())
    if entries.slope_threshold is not None:
        collect(sums.by_log_threshold, d_strength * entries.slope_threshold)
    if entries.penalty_by_norm is not None:
        collect(sums.by_norm, entries.penalty_by_norm)
    if entries.penalty is not None:
        sums.penalty += entries.penalty.sum()


def losses_of(x: Tensor, sums: Sums, density: Tensor, sparsity: Tensor) -> Losses:
    """The losses of a batch, with its L0 and the share of entries that were worked on."""
    spread = (x - x.mean(0)).square().sum()
    more = {"metrics/l0": sums.active.sum() / len(x), "metrics/density": density}
    return Losses(
        sums.squared / len(x), sums.squared / spread, torch.zeros_like(sums.squared), sparsity, sums.active > 0, more
    )
