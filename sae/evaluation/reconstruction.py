"""Reconstruction and sparsity of an SAE over activations, without a host: x [N, d] in raw units, valid
tokens only.

One streaming pass: sums per cluster in float64, so that nothing depends on how tokens were batched, and FVU,
with the mean of the whole set, is exact in every bootstrap draw. Memory: two [G, d] sums, counts [F], one
int32 a token. Definitions are methods.md §1.2 to §1.6. `cossim_centred` is pooled (a ratio of sums about the
mean of the set), while `cossim` is the mean of per-token cosines, as in the field. A feature fires where its
activation is not 0. Of a Matryoshka SAE each prefix has an FVU of its own: the full one is worse than
BatchTopK's by design, and the prefixes are what it was trained for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.codes import Codes
from sae.evaluation.intervals import ClusterSums, Estimates, Interval, Statistic, ratio

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_TINY = torch.finfo(torch.float64).tiny


class Reconstruction:
    """Accumulates blocks of (x, codes, reconstruction); `metrics` gives every figure with its interval.

    widths   of nested prefixes of features, each of which reconstructs alone too
    """

    def __init__(
        self,
        n_clusters: int,
        n_features: int,
        decoder_norms: Float[Tensor, " F"] | None = None,
        widths: Sequence[int] = (),
    ):
        self.widths = tuple(widths)
        self.sums = ClusterSums(n_clusters)
        self.fired = torch.zeros(n_features, dtype=torch.int64)
        self.fired_rows = torch.zeros(n_features, dtype=torch.int64)
        self.n_tokens = 0
        self._decoder_norms = decoder_norms
        self._l0: list[Tensor] = []
        self._cluster: list[Tensor] = []
        self._legacy = 0.0

    def add(
        self,
        x: Float[Tensor, "N d"],
        reconstruction: Float[Tensor, "N d"],
        codes: Codes,
        cluster: Int[Tensor, " N"],
        row: Int[Tensor, " N"],
        prefixes: Sequence[Float[Tensor, "N d"]] = (),
    ) -> None:
        """Add a block of tokens; `row` is the text row of each, unique to this block; `prefixes` are the
        reconstructions by each of the widths."""
        if x.shape[0] == 0:
            return
        x, r = _float64(x), _float64(reconstruction)
        xx, rr, xr = (x * x).sum(1), (r * r).sum(1), (x * r).sum(1)
        err = ((x - r) ** 2).sum(1)
        l0, l1 = self._sparsity(codes, row)
        pairs = zip(self.widths, prefixes, strict=True)
        misses = {_miss(width): ((x - _float64(made)) ** 2).sum(1) for width, made in pairs}
        self.sums.add(
            cluster,
            n=torch.ones_like(xx),
            err=err,
            xx=xx,
            rr=rr,
            xr=xr,
            cos=xr / (xx * rr).sqrt().clamp_min(_TINY),
            ratio=(rr / xx.clamp_min(_TINY)).sqrt(),
            norm_in=xx.sqrt(),
            norm_out=rr.sqrt(),
            l0=l0,
            l1=l1,
            x=x,
            r=r,
            **misses,
        )
        around = ((x - x.mean(0)) ** 2).sum(1).clamp_min(_TINY)
        self._legacy += float((1 - err / around).sum())
        self._l0.append(l0.to("cpu", torch.int32))
        self._cluster.append(cluster.cpu())
        self.n_tokens += x.shape[0]

    def _sparsity(self, codes: Codes, row: Tensor) -> tuple[Tensor, Tensor]:
        """L0 and scale-free L1 of each token; counts firings, and the rows with at least one, per feature."""
        at, F = codes.rows(), codes.n_features
        strength = codes.values.abs().to(torch.float64)
        fires = strength > 0
        l0 = torch.bincount(at[fires], minlength=codes.n_rows).to(torch.float64)
        self.fired += torch.bincount(codes.indices[fires], minlength=F).cpu()
        pairs = torch.unique(row.to(at.device)[at[fires]] * F + codes.indices[fires])
        self.fired_rows += torch.bincount(pairs % F, minlength=F).cpu()
        if self._decoder_norms is not None:
            strength = strength * self._decoder_norms.to(strength)[codes.indices]
        return l0, torch.zeros_like(l0).index_add_(0, at, strength)

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """Mean of x over all tokens added, float64."""
        return self.sums.sums["x"].sum(0) / self.sums.sums["n"].sum()

    @property
    def density(self) -> Float[Tensor, " F"]:
        """Share of tokens in which each feature fires."""
        return self.fired.to(torch.float64) / max(self.n_tokens, 1)

    @property
    def legacy(self) -> float:
        """SAELens's explained_variance_legacy: a mean of per-token ratios about each block's own mean."""
        return self._legacy / max(self.n_tokens, 1)

    def metrics(self, *, seed: int = 0) -> dict[str, Interval]:
        """Every figure of reconstruction and sparsity by name."""
        estimates = self.sums.estimates(seed=seed)
        found = {name: estimates.of(statistic) for name, statistic in STATISTICS.items()}
        found |= {f"fvu_{width}": estimates.of(_fvu_of(_miss(width))) for width in self.widths}
        return found | self._quantiles(estimates, seed)

    def _quantiles(self, estimates: Estimates, seed: int) -> dict[str, Interval]:
        """Median, 5th and 95th percentile of L0, from each cluster's histogram of it."""
        levels, at = torch.unique(torch.cat(self._l0), return_inverse=True)
        cells = torch.cat(self._cluster) * len(levels) + at
        histogram = torch.bincount(cells, minlength=self.sums.n_clusters * len(levels))
        sums = ClusterSums(self.sums.n_clusters)
        sums.sums = {
            "n": self.sums.sums["n"].cpu(),
            "histogram": histogram.view(self.sums.n_clusters, -1).to(torch.float64),
        }
        drawn = sums.estimates(seed=seed)

        def quantile(q: float) -> Statistic:
            def of(s: dict[str, Tensor]) -> Tensor:
                reached = s["histogram"].cumsum(1) >= q * s["n"][:, None] - 1e-9
                return levels[reached.to(torch.int8).argmax(1)].to(torch.float64)

            return of

        shares = {"l0_median": 0.5, "l0_p5": 0.05, "l0_p95": 0.95}
        return {name: drawn.of(quantile(share), smooth=False) for name, share in shares.items()}


def _float64(x: Tensor) -> Tensor:
    return x.cpu().to(torch.float64) if x.device.type == "mps" else x.to(torch.float64)


def _variance(s: dict[str, Tensor]) -> Tensor:
    """Σ‖x - μ‖² with μ the mean of the same tokens."""
    return s["xx"] - (s["x"] ** 2).sum(1) / s["n"]


def _fvu_of(err: str) -> Statistic:
    return lambda s: s[err] / _variance(s)


_fvu = _fvu_of("err")


def _miss(width: int) -> str:
    """The name of the sum of squared errors of a prefix."""
    return f"err_{width}"


def first_features(codes: Codes, width: int) -> Codes:
    """The entries of the first `width` features."""
    kept = codes.indices < width
    before = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
    return Codes(codes.values[kept], codes.indices[kept], before[codes.offsets], codes.n_features)


def _cossim_centred(s: dict[str, Tensor]) -> Tensor:
    mean = s["x"] / s["n"][:, None]
    own = _variance(s)
    other = s["rr"] - 2 * (mean * s["r"]).sum(1) + s["n"] * (mean**2).sum(1)
    cross = s["xr"] - (mean * s["r"]).sum(1)  # Σ(x-μ)·(x̂-μ), since Σ(x-μ) = 0
    # All of x̂ at the mean has no direction: 0. Rounding leaves 1e-16 of the squares, which is none either.
    none = other <= 1e-12 * (s["rr"] + s["xx"])
    return torch.where(none, torch.zeros_like(cross), cross / (own * other.clamp_min(_TINY)).sqrt())


STATISTICS: dict[str, Statistic] = {
    "fvu": _fvu,
    "explained_variance": lambda s: 1 - _fvu(s),
    "mse": ratio("err"),
    "cossim": ratio("cos"),
    "cossim_centred": _cossim_centred,
    "relative_reconstruction_bias": ratio("rr", "xr"),
    "l2_ratio": ratio("ratio"),
    "l2_norm_in": ratio("norm_in"),
    "l2_norm_out": ratio("norm_out"),
    "l0": ratio("l0"),
    "l1": ratio("l1"),
}


def quick(sae: Any, x: Float[Tensor, "N d"], *, chunk: int = 4096) -> dict[str, float]:
    """FVU and mean L0 over raw activations, without intervals: for a line in the log while training.

    sae    an SAE, or a pair (encode: [n, d] → Codes, decode: Codes → [n, d])
    cost   one encode and decode of x; sums in float64, [chunk, d] at a time
    """
    encode: Callable[[Tensor], Codes]
    encode, decode = sae if isinstance(sae, tuple) else (sae.encode_sparse, sae.decode)
    if x.shape[0] == 0:
        return {"fvu": math.nan, "l0": math.nan}
    total = dict.fromkeys(("n", "err", "xx", "l0"), 0.0)
    shift = torch.zeros(x.shape[1], dtype=torch.float64)
    with torch.no_grad():
        for block in x.split(chunk):
            codes = encode(block if block.dtype == torch.float64 else block.float())
            wide, out = _float64(block), _float64(decode(codes))
            total["n"] += block.shape[0]
            total["err"] += float(((wide - out) ** 2).sum())
            total["xx"] += float((wide * wide).sum())
            total["l0"] += float((codes.values != 0).sum())
            shift += wide.sum(0).cpu()
    variance = total["xx"] - float((shift**2).sum()) / total["n"]
    return {"fvu": total["err"] / variance if variance > 0 else math.nan, "l0": total["l0"] / total["n"]}
