"""AuxK: the dead features alone predict what the reconstruction missed (Gao et al. 2024, arXiv 2406.04093, §A.2).

Dense products over the compacted dead rows, in chunks of batch rows: cheaper than gathering k_aux rows an input
unless dead features outnumber k_aux by far. Memory: [chunk, n] and the gradients [n, d] of `most` features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.kernels import RowGradients
from sae.objectives.terms import Params

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

ROWS = 256
ROWS_ELSEWHERE = 4096
"""A GPU wants fewer and larger products than a CPU's cache."""
LIMIT = 16_384
"""Dead features that a captured step has room for."""
MOST_BYTES = 64 << 20
"""Of their weights and gradients in a step."""


def aux_k(d: int) -> int:
    """Dead features an input may use: the power of two nearest d/2 (Gao et al. 2024)."""
    return 2 ** max(0, round(torch.log2(torch.tensor(d / 2)).item()))


def most(d: int) -> int:
    """Dead features that a step takes on: dense products over many more than 16·k_aux cost more than the rest of the
    step, and their memory must not grow with the dictionary."""
    return max(1, min(LIMIT, 16 * aux_k(d), MOST_BYTES // (16 * d)))


@dataclass(frozen=True)
class Listed:
    """Dead features as a list of fixed length, for a step that must not wait for the device to count them."""

    features: Int[Tensor, " n"]
    """Ascending, each once; live ones fill it up."""
    dead: Bool[Tensor, " n"]
    """Which of them are dead."""


def listed(dead: Bool[Tensor, " F"], n: int, begin: Int[Tensor, ""]) -> Listed:
    """The first n dead features from `begin` on, round and round: with a moving begin, all have their turn."""
    F = dead.shape[0]
    if n == 0:
        return Listed(begin.new_empty(0), dead[:0])
    features = torch.arange(F, device=dead.device)
    turn = torch.where(dead, (features - begin) % F, F + features)
    features = turn.argsort()[:n].sort().values
    return Listed(features, dead[features])


def revive_dead(
    params: Params,
    inputs: Float[Tensor, "B d"],
    residual: Float[Tensor, "B d"],
    dead: Bool[Tensor, " F"] | Listed,
    coefficient: float,
    share: float = 0.0,
) -> tuple[RowGradients | None, Float[Tensor, ""]]:
    """(gradients of the dead rows, auxiliary loss); (None, 0) when nothing is dead.

    loss        ‖ê − e‖² / ‖e − mean e‖², ê from the k_aux largest dead pre-activations of each row, fewer where fewer
                are dead, those that are positive; ê has no bias, so b_dec is counted once. Unweighted.
    residual    e = x − x̂ of the full reconstruction; no gradient flows into it
    gradients   of coefficient · loss; b_dec's through the encoder follows from b_enc's as everywhere
    share       of the run that is done; picks among more dead features than `most`
    0           also where the loss is no number, as with one row or a perfect reconstruction
    Listed      has gradients for every feature of the list, zeros for the live ones
    """
    live = None if isinstance(dead, Tensor) else ~dead.dead
    features = dead.nonzero().squeeze(1) if isinstance(dead, Tensor) else dead.features
    if features.numel() == 0 or coefficient == 0:
        return None, inputs.new_zeros(())
    if live is None and features.numel() > (limit := most(inputs.shape[1])):
        stride = -(-features.numel() // limit)
        features = features[int(share * 2**20) % stride :: stride].contiguous()
    encoder, W_dec, b_enc = params.encoder[features], params.W_dec[features], params.b_enc[features]
    k = min(aux_k(inputs.shape[1]), features.numel())
    total = (residual - residual.mean(0)).square().sum()
    missed = torch.zeros_like(total)
    rows = RowGradients(features, torch.zeros_like(encoder), torch.zeros_like(W_dec), torch.zeros_like(b_enc))
    n = ROWS if inputs.device.type == "cpu" else ROWS_ELSEWHERE
    for start in range(0, inputs.shape[0], n):
        seen, target = inputs[start : start + n], residual[start : start + n]
        pre = torch.addmm(b_enc, seen, encoder.T)
        if live is not None:
            pre.masked_fill_(live, float("-inf"))
        top, at = pre.topk(k, dim=1, sorted=False)
        acts = torch.zeros(len(seen), features.numel(), device=seen.device).scatter_(1, at, top.relu_())
        miss = torch.mm(acts, W_dec).sub_(target)
        missed += miss.square().sum()
        d_acts = torch.mm(miss, W_dec.T).mul_(acts > 0)
        rows.W_dec.addmm_(acts.T, miss)
        rows.encoder.addmm_(d_acts.T, seen)
        rows.b_enc.add_(d_acts.sum(0))
    usable = total > 0 if live is None else (total > 0) & ~live.all()
    scale = torch.where(usable, 2 * coefficient / total, 0.0)
    for gradient in (rows.encoder, rows.W_dec, rows.b_enc):
        gradient.mul_(scale)
    return rows, torch.where(usable, missed / total, 0.0)
