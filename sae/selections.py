"""Selection rules that no kernel has: of SAEs that are only loaded, written as their papers say, over dense tensors.

absolute_topk     AbsTopK (Zhu et al. 2025, arXiv 2510.00404): the k largest by magnitude, with their signs
group_max         sparsify's groupmax: k groups of neighbouring features, the largest of each, where it is above 0
matching_pursuit  MP-SAE (Costa et al. 2025, arXiv 2506.03093): one feature after another, each on what is left
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Pursuit:
    """When matching pursuit ends, for each row on its own."""

    residual_threshold: float = 1e-2
    """Below this length of what is left; 0: never."""
    max_iterations: int | None = None
    """None: as many as the row is wide."""
    stop_on_duplicate_support: bool = True
    """As soon as a step adds no new feature."""


def absolute_topk(pre: Float[Tensor, "... F"], k: int) -> Float[Tensor, "... F"]:
    indices = pre.abs().topk(k, dim=-1).indices
    return torch.zeros_like(pre).scatter(-1, indices, pre.gather(-1, indices))


def group_max(pre: Float[Tensor, "... F"], k: int) -> Float[Tensor, "... F"]:
    groups = pre.unflatten(-1, (k, -1))
    values, indices = groups.max(dim=-1, keepdim=True)
    return torch.zeros_like(groups).scatter(-1, indices, values.relu()).flatten(-2)


def matching_pursuit(x: Float[Tensor, "... d"], W_dec: Float[Tensor, "F d"], ends: Pursuit) -> Float[Tensor, "... F"]:
    """x is centred. Cost: one product with all of W_dec a step, until the last row has ended."""
    left = x.reshape(-1, x.shape[-1])
    acts = left.new_zeros(len(left), len(W_dec))
    active = torch.ones(len(left), dtype=torch.bool, device=left.device)
    for _ in range(x.shape[-1] if ends.max_iterations is None else ends.max_iterations):
        if not bool(active.any()):
            break
        best = (left @ W_dec.T).argmax(dim=1, keepdim=True)
        rows = W_dec[best[:, 0]]
        amount = (left * rows).sum(dim=1, keepdim=True).relu() * active[:, None]
        new = (acts.gather(1, best) == 0) & (amount > 0)
        acts = acts.scatter_add(1, best, amount)
        left = left - amount * rows
        if ends.stop_on_duplicate_support:
            active = active & new[:, 0]
        if ends.residual_threshold > 0:
            active = active & (left.norm(dim=1) >= ends.residual_threshold)
    return acts.reshape(*x.shape[:-1], -1)
