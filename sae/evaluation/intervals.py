"""95 % intervals for statistics of sums over tokens, where tokens in one cluster depend on each other.

A cluster is what was sampled together: a document, or a prompt template of text that a model wrote. Per-token
quantities are summed per cluster in float64; a statistic is a function of such sums with a leading axis of
draws. The point estimate, the bootstrap (1,000 draws of the clusters with replacement, where there are at
least 30) and the linearised standard error (fewer; Student's t with G-1 degrees of freedom) all evaluate that
one function, so that ratios, and FVU with its mean, are recomputed in each draw and never averaged. Memory:
[G, width] per quantity and [draws, width] while estimating. With one cluster there is no interval: both ends
are None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Statistic = Callable[[dict[str, Tensor]], Tensor]
DRAWS = 1_000
BOOTSTRAP_FROM = 30
# 97.5th percentile of Student's t with 1..29 degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
)  # fmt: skip
_Z = 1.959964


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval; the ends are None where none can be given."""

    value: float
    low: float | None = None
    high: float | None = None


class ClusterSums:
    """Float64 sums of per-token quantities, kept per cluster."""

    def __init__(self, n_clusters: int):
        self.n_clusters = n_clusters
        self.sums: dict[str, Tensor] = {}

    def add(self, cluster: Int[Tensor, " N"], **values: Tensor) -> None:
        """Add one block: `cluster` is each token's cluster; a value is [N] or [N, width]."""
        for name, value in values.items():
            if name not in self.sums:
                shape = (self.n_clusters, *value.shape[1:])
                self.sums[name] = torch.zeros(shape, dtype=torch.float64, device=value.device)
            self.sums[name].index_add_(0, cluster.to(value.device), value.to(torch.float64))

    def estimates(self, *, seed: int = 0) -> Estimates:
        """What statistics are computed from; clusters without a token (by the quantity `n`) do not count."""
        kept = (self.sums["n"] > 0).nonzero().flatten()
        return Estimates({name: value[kept].cpu() for name, value in self.sums.items()}, seed)


@dataclass(frozen=True)
class Estimates:
    """Sums of G clusters, [G] or [G, width] each, and the draws from them."""

    sums: dict[str, Tensor]
    seed: int = 0

    @property
    def n_clusters(self) -> int:
        return self.sums["n"].shape[0]

    @cached_property
    def totals(self) -> dict[str, Tensor]:
        """The sums over all clusters, with a leading axis of one."""
        return {name: value.sum(0, keepdim=True) for name, value in self.sums.items()}

    @cached_property
    def drawn(self) -> dict[str, Tensor]:
        """The sums of each bootstrap draw."""
        weights = multinomial(self.n_clusters, self.seed)
        return {name: weights @ value for name, value in self.sums.items()}

    def of(self, statistic: Statistic, *, smooth: bool = True) -> Interval:
        """Value and interval of a statistic. A quantile is not smooth: it has no linearised error."""
        value = float(statistic(self.totals)[0])
        if math.isnan(value) or self.n_clusters < 2:
            return Interval(value)
        if self.n_clusters >= BOOTSTRAP_FROM:
            ends = torch.nanquantile(statistic(self.drawn), torch.tensor([0.025, 0.975], dtype=torch.float64))
            return Interval(value, float(ends[0]), float(ends[1]))
        if not smooth:
            return Interval(value)
        half = _T[self.n_clusters - 2] * self.linearised_error(statistic)
        return Interval(value, value - half, value + half)

    def linearised_error(self, statistic: Statistic) -> float:
        """Clustered standard error: G/(G-1)·Σ_g (∂statistic/∂w_g)², which for a ratio Σu/Σv of value R is
        G/(G-1)·Σ_g (u_g - R·v_g)²/(Σv)²."""
        G = self.n_clusters
        with torch.enable_grad():
            weights = torch.ones(1, G, dtype=torch.float64, requires_grad=True)
            (influence,) = torch.autograd.grad(
                statistic({name: weights @ value for name, value in self.sums.items()}).sum(), weights
            )
        return math.sqrt(G / (G - 1) * float((influence**2).sum()))


def multinomial(n_clusters: int, seed: int, draws: int = DRAWS) -> Float[Tensor, "draws G"]:
    """How often each cluster occurs in each draw of G clusters with replacement."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(n_clusters, (draws, n_clusters), generator=generator)
    ones = torch.ones((), dtype=torch.float64).expand(draws, n_clusters)
    return torch.zeros(draws, n_clusters, dtype=torch.float64).scatter_add_(1, picks, ones)


def wilson(count: int, of: int) -> Interval:
    """A proportion of independent cases, with Wilson's interval."""
    if of == 0:
        return Interval(math.nan)
    p, z2 = count / of, _Z**2
    centre = (p + z2 / (2 * of)) / (1 + z2 / of)
    half = _Z / (1 + z2 / of) * math.sqrt(p * (1 - p) / of + z2 / (4 * of**2))
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half))


def ratio(numerator: str, denominator: str = "n") -> Statistic:
    """The statistic Σ numerator / Σ denominator."""
    return lambda sums: sums[numerator] / sums[denominator]
