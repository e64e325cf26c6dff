"""Directions that need no SAE: the baseline against which every feature's dial is held.

A Direction is a unit vector at a hook with the two scales its strength is told in: its own largest projection
on the concept's texts ("2x") and the typical norm of the host's activations there (`share`). Only ordinary
positions count: no special tokens, not the first of a text, no outlier norms (above ten medians). One forward
a text; means in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.errors import UserError
from sae.host import Host

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Direction:
    """`vector` [d] of length 1; `max_act` and `norm` (median ‖x‖) in raw units."""

    hook: str
    vector: Float[Tensor, " d"]
    max_act: float
    norm: float
    host_fingerprint: str = ""
    outlier_norm: float | None = None

    def share(self, fraction: float) -> float:
        """The raw strength that adds a vector of this share of the typical norm (0.5 is a good start)."""
        return fraction * self.norm


def difference_of_means(
    host: Host, hook: str, positive: Sequence[str], negative: Sequence[str], *, context: int = 128
) -> Direction:
    """Unit difference of mean activations, texts with a concept minus texts without (AxBench's DiffMean)."""
    name = host.hook(hook)
    for label, texts in (("positive", positive), ("negative", negative)):
        if not texts:
            raise UserError(f"directions: no {label} texts. Give at least one of each kind; ten or more are better.")
    with_it, without = (torch.cat([_rows(host, name, text, context) for text in t]) for t in (positive, negative))
    if not len(with_it) or not len(without):
        raise UserError("directions: the texts have no ordinary tokens. Give longer ones.")
    norms = torch.cat([with_it, without]).norm(dim=1)
    limit = 10 * float(norms.median())
    with_it, without = (rows[rows.norm(dim=1) <= limit] for rows in (with_it, without))
    difference = with_it.double().mean(dim=0) - without.double().mean(dim=0)
    if float(difference.norm()) == 0:
        raise UserError("directions: positive and negative texts have the same mean. Give texts that differ.")
    vector = (difference / difference.norm()).float()
    return Direction(name, vector, float((with_it @ vector).max()), float(norms.median()), host.fingerprint, limit)


def _rows(host: Host, hook: str, text: str, context: int) -> Tensor:
    """Activations [N, d] float32 of a text's ordinary tokens; a text is read up to `context` tokens."""
    ids = host.tokenizer(text, add_special_tokens=False)["input_ids"][:context]
    if len(ids) < 2:
        return torch.zeros(0, host.width(hook), device=host.device)
    tokens = torch.tensor([ids], device=host.device)
    keep = ~torch.isin(tokens[0], torch.tensor(sorted(host.special_ids), dtype=torch.long, device=host.device))
    keep[0] = False
    return host.activations(tokens, [hook])[hook][0][keep].float()
