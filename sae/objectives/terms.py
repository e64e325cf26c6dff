"""What objectives share: the trained tensors, the work an optimizer consumes, the auxiliary loss.

All in normed units (x scaled so that its mean norm is √d), float32.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.codes import Codes
from sae.kernels import RowGradients


@dataclass
class Params:
    """What is trained. encoder_low is the bf16 copy that the encoder's product reads, if any."""

    encoder: Float[Tensor, "F d"]
    W_dec: Float[Tensor, "F d"]
    b_enc: Float[Tensor, " F"]
    b_dec: Float[Tensor, " d"]
    encoder_low: Float[Tensor, "F d"] | None = None

    @property
    def encoder_read(self) -> Float[Tensor, "F d"]:
        return self.encoder if self.encoder_low is None else self.encoder_low


@dataclass(frozen=True)
class Work:
    """What an update needs: never a [F, d] gradient."""

    codes: Codes
    inputs: Float[Tensor, "B d"]
    """What the encoder saw (x − b_dec)."""
    error: Float[Tensor, "B d"]
    """The loss's derivative by the reconstruction."""
    value_grads: Float[Tensor, " nnz"]
    """The loss's derivative by the pre-activation of each entry."""
    extra: RowGradients | None = None


@dataclass(frozen=True)
class Losses:
    """Tensors of one element, read only when a line is due. mse: sum over d, mean over rows, normed units."""

    mse: Tensor
    fvu: Tensor
    """Of this batch, about its own mean: for the progress line only."""
    aux: Tensor


def aux_k(d: int) -> int:
    """Dead features used by the auxiliary loss: the power of two nearest d/2 (Gao et al. 2024)."""
    return 2 ** round(torch.log2(torch.tensor(d / 2)).item())


def revive_dead(
    params: Params,
    inputs: Float[Tensor, "B d"],
    residual: Float[Tensor, "B d"],
    dead: Bool[Tensor, " F"],
    coefficient: float,
) -> tuple[RowGradients | None, Tensor]:
    """AuxK (Gao et al. 2024, §A.2): the dead features alone predict the residual x − x̂.

    loss = coefficient · ‖ê − e‖² / ‖e − mean e‖² with ê from the k_aux largest dead pre-activations, no bias; no
    gradient flows into e. Dense products over the compacted dead rows: cheaper than gathering k_aux rows an input.
    Returns (gradients of the dead rows, loss); (None, 0) when nothing is dead.
    """
    features = dead.nonzero().squeeze(1)
    if features.numel() == 0 or coefficient == 0:
        return None, inputs.new_zeros(())
    encoder, W_dec = params.encoder[features], params.W_dec[features]
    pre = torch.addmm(params.b_enc[features], inputs, encoder.T)
    k = min(aux_k(inputs.shape[1]), features.numel())
    if k < features.numel():
        floor = pre.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
        acts = pre.relu().mul_(pre >= floor)
    else:
        acts = pre.relu()
    miss = torch.mm(acts, W_dec).sub_(residual)
    scale = (residual - residual.mean(0)).square().sum().clamp_min(1e-12)
    loss = miss.square().sum() / scale
    d_miss = miss.mul_(2 * coefficient / scale)
    d_acts = torch.mm(d_miss, W_dec.T).mul_(acts > 0)
    rows = RowGradients(features, torch.mm(d_acts.T, inputs), torch.mm(acts.T, d_miss), d_acts.sum(0))
    return rows, loss
