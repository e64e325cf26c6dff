"""AuxK: the dead features alone predict what the reconstruction missed (Gao et al. 2024, arXiv 2406.04093, §A.2).

Dense products over the compacted dead rows, in chunks of batch rows: cheaper than gathering k_aux rows an input
unless dead features outnumber k_aux by far. Memory: [chunk, n] and the gradients [n, d] of at most LIMIT features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.kernels import RowGradients
from sae.objectives.terms import Params

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

ROWS = 256
LIMIT = 16_384
"""Dead features in one step; of more, every n-th, others at the next step."""


def aux_k(d: int) -> int:
    """Dead features an input may use: the power of two nearest d/2 (Gao et al. 2024)."""
    return 2 ** round(torch.log2(torch.tensor(d / 2)).item())


def revive_dead(
    params: Params,
    inputs: Float[Tensor, "B d"],
    residual: Float[Tensor, "B d"],
    dead: Bool[Tensor, " F"],
    coefficient: float,
    share: float = 0.0,
) -> tuple[RowGradients | None, Float[Tensor, ""]]:
    """(gradients of the dead rows, auxiliary loss); (None, 0) when nothing is dead.

    loss        ‖ê − e‖² / ‖e − mean e‖², ê from the k_aux largest dead pre-activations of each row, fewer where fewer
                are dead, those that are positive; ê has no bias, so b_dec is counted once. Unweighted.
    residual    e = x − x̂ of the full reconstruction; no gradient flows into it
    gradients   of coefficient · loss; b_dec's through the encoder follows from b_enc's as everywhere
    share       of the run that is done; picks among more dead features than LIMIT
    0           also where the loss is no number, as with one row or a perfect reconstruction
    """
    features = dead.nonzero().squeeze(1)
    if features.numel() == 0 or coefficient == 0:
        return None, inputs.new_zeros(())
    if features.numel() > LIMIT:
        stride = -(-features.numel() // LIMIT)
        features = features[int(share * 2**20) % stride :: stride].contiguous()
    encoder, W_dec, b_enc = params.encoder[features], params.W_dec[features], params.b_enc[features]
    k = min(aux_k(inputs.shape[1]), features.numel())
    total = (residual - residual.mean(0)).square().sum()
    missed = torch.zeros_like(total)
    rows = RowGradients(features, torch.zeros_like(encoder), torch.zeros_like(W_dec), torch.zeros_like(b_enc))
    for start in range(0, inputs.shape[0], ROWS):
        seen, target = inputs[start : start + ROWS], residual[start : start + ROWS]
        top, at = torch.addmm(b_enc, seen, encoder.T).topk(k, dim=1, sorted=False)
        acts = torch.zeros(len(seen), features.numel(), device=seen.device).scatter_(1, at, top.relu_())
        miss = torch.mm(acts, W_dec).sub_(target)
        missed += miss.square().sum()
        d_acts = torch.mm(miss, W_dec.T).mul_(acts > 0)
        rows.W_dec.addmm_(acts.T, miss)
        rows.encoder.addmm_(d_acts.T, seen)
        rows.b_enc.add_(d_acts.sum(0))
    usable = total > 0
    scale = torch.where(usable, 2 * coefficient / total, 0.0)
    for gradient in (rows.encoder, rows.W_dec, rows.b_enc):
        gradient.mul_(scale)
    return rows, torch.where(usable, missed / total, 0.0)
