"""The pass over activations that says how each feature fires: maximum, density, 99.9th percentile; and the
threshold that selects k features a token on average (TopK's for steering, BatchTopK's own).

x [N, d] in raw units, valid tokens only; everything found is in raw units. One pass, memory [F, 64] int32:
each feature has a histogram of eight bins an octave below its own running maximum, which moves up with it, so
that the result does not depend on how tokens were batched. p999 is exact to a bin (2^(1/8)), and is the
maximum itself for a feature that fired fewer than 1,000 times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae import kernels
from sae.autoencoder import FeatureStats
from sae.codes import Codes
from sae.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float

BINS, PER_OCTAVE = 64, 8
_QUANTILE = 0.999
_LOWEST = -(2**30)  # the top bin of a feature that never fired


@torch.no_grad()
def measure(
    sae: Any,
    batches: Iterable[Float[Tensor, "N d"]],
    *,
    max_tokens: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> FeatureStats:
    """Statistics of every feature over the batches, or over their first `max_tokens` tokens.

    sae        anything with encode_sparse and cfg.d_sae
    progress   called with the number of tokens just done (a tqdm's `update`)
    raises     UserError where there is no token
    """
    F = sae.cfg.d_sae
    counts = _Counts(F)
    for x in _limited(batches, max_tokens):
        counts.add(sae.encode_sparse(_computable(x)))
        if progress is not None:
            progress(x.shape[0])
    if counts.n_tokens == 0:
        raise UserError("statistics: the text has no valid token (0). Give more text.")
    return FeatureStats(
        max_act=counts.max_act,
        density=(counts.fired.to(torch.float64) / counts.n_tokens).to(torch.float32),
        p999=counts.percentile(_QUANTILE),
        n_tokens=counts.n_tokens,
    )


class _Counts:
    def __init__(self, F: int):
        self.n_tokens = 0
        self.fired = torch.zeros(F, dtype=torch.int64)
        self.max_act = torch.zeros(F)
        self.histogram = torch.zeros(F, BINS, dtype=torch.int32)
        self.top = torch.full((F,), _LOWEST, dtype=torch.int64)

    def add(self, codes: Codes) -> None:
        """Count one block of codes; entries of 0 do not fire."""
        values, indices = codes.values.abs().float().cpu(), codes.indices.cpu()
        values, indices = values[values > 0], indices[values > 0]
        self.n_tokens += codes.n_rows
        self.fired += torch.bincount(indices, minlength=len(self.fired))
        self.max_act.scatter_reduce_(0, indices, values, "amax")
        at = torch.floor(torch.log2(values) * PER_OCTAVE).to(torch.int64)
        self._move_up(self.top.scatter_reduce(0, indices, at, "amax"))
        slot = (at - self.top[indices] + BINS - 1).clamp_min(0)
        ones = torch.ones((), dtype=torch.int32).expand(len(values))
        self.histogram.view(-1).scatter_add_(0, indices * BINS + slot, ones)

    def _move_up(self, top: Tensor) -> None:
        """Shift the histograms whose maximum rose; what leaves at the bottom stays in the lowest bin."""
        moved = (top > self.top).nonzero().flatten()
        if len(moved):
            shift = (top - self.top)[moved].clamp_max(BINS)[:, None]
            to = (torch.arange(BINS) - shift).clamp_min(0)
            old = self.histogram[moved]
            self.histogram[moved] = torch.zeros_like(old).scatter_add_(1, to, old)
        self.top = top

    def percentile(self, q: float) -> Float[Tensor, " F"]:
        """The value of rank ceil(q·n) among each feature's n firings; 0 where it never fired."""
        rank = torch.ceil(self.fired.to(torch.float64) * q).to(torch.int64).clamp_min(1)
        below = self.histogram.to(torch.int64).cumsum(1)
        at = (below < rank[:, None]).sum(1).clamp_max(BINS - 1)[:, None]
        inside = self.histogram.gather(1, at).to(torch.int64)
        share = (rank[:, None] - (below.gather(1, at) - inside)) / inside.clamp_min(1)
        exponent = (self.top[:, None] - (BINS - 1) + at + share) / PER_OCTAVE
        found = torch.exp2(exponent.to(torch.float64)).flatten().to(torch.float32)
        found = torch.where(rank == self.fired, self.max_act, torch.minimum(found, self.max_act))
        return torch.where(self.fired > 0, found, torch.zeros_like(found))


@torch.no_grad()
def calibrate_threshold(
    sae: Any,
    batches: Iterable[Float[Tensor, "N d"]],
    k: int | None = None,
    *,
    max_tokens: int = 16_384,
) -> float:
    """The one threshold, in raw units, with which `pre > threshold` selects k features a token on average.

    Exact on the tokens given: it lies between the N·k-th and the next largest of all N·F pre-activations.
    0 where fewer than N·k of them are positive. `SAE.threshold` is a [F] filled with it.
    k        by default a TopK SAE's own
    memory   the tokens, and some 4·k values of each; never [N, F]
    raises   UserError where there is no token
    """
    x = [block for block in _limited(batches, max_tokens) if block.shape[0]]
    if not x:
        raise UserError("threshold: the text has no valid token (0). Give more text.")
    k, F = sae.cfg.k if k is None else k, sae.cfg.d_sae
    assert k is not None, "an SAE that selects by threshold does not know its k"
    N = sum(block.shape[0] for block in x)
    kept = min(4 * k, F)
    while True:
        pool = torch.cat([_largest(sae, rows, kept) for rows in x])
        largest = pool.flatten().topk(min(N * k + 1, pool.numel())).values
        # A token whose every kept value passes may have had more: keep more of each and look again.
        if kept == F or not bool((pool.amin(1) > largest[-1]).any()):
            break
        kept = min(2 * kept, F)
    if len(largest) <= N * k:
        return 0.0
    low, high = float(largest[N * k]), float(largest[N * k - 1])
    middle = float(torch.tensor((low + high) / 2, dtype=torch.float32))  # as it will be compared
    return middle if low <= middle < high else low


def _largest(sae: Any, x: Float[Tensor, "n d"], kept: int) -> Float[Tensor, "n kept"]:
    """The largest pre-activations of each token, in no order; 0 stands for those that are not positive."""
    codes = kernels.encode_select(sae.centred(_computable(x)), sae.encoder, sae.b_enc, kernels.TopK(kept))
    return codes.values.view(-1, kept).float().cpu()


def _limited(batches: Iterable[Tensor], max_tokens: int | None) -> Iterable[Tensor]:
    """The batches, cut after max_tokens tokens."""
    left = max_tokens
    for x in batches:
        if left is not None:
            x = x[:left]
            left -= x.shape[0]
        yield x
        if left is not None and left <= 0:
            return


def _computable(x: Tensor) -> Tensor:
    """Float32, or float64 where the caller has it."""
    return x if x.dtype == torch.float64 else x.float()
