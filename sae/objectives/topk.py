"""TopK + AuxK (Gao, la Tour et al. 2024, arXiv 2406.04093).

z = relu(TopK_k(W_e(x − b_dec) + b_e)), x̂ = W_d z + b_dec. Loss: mean over rows of ‖x − x̂‖², divided by the fixed
variance of a sample about its mean, plus AuxK on the features that have not fired for a while.
Twin: tests/reference/topk.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sae import kernels
from sae.codes import Codes
from sae.kernels import TopK, Work
from sae.objectives.terms import Losses, Params, revive_dead

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def loss(
    params: Params,
    x: Float[Tensor, "B d"],
    dead: Bool[Tensor, " F"],
    share: float = 0.0,
    *,
    k: int,
    variance: float,
    aux_coefficient: float,
    implementation: str | None = None,
) -> tuple[Work, Losses]:
    """One batch of normed activations → work and losses.

    variance   E‖x − mean x‖² of a sample, fixed for the run: the loss of predicting the mean is 1
    dead       features that AuxK may use
    """
    B = x.shape[0]
    inputs = x - params.b_dec
    codes = kernels.encode_select(inputs, params.encoder_read, params.b_enc, TopK(k), implementation=implementation)
    made = kernels.reconstruct(codes, params.W_dec, params.b_dec, x, implementation=implementation)
    error, value_grads = made.error, made.value_grads
    mse = made.squared.sum() / B
    spread = (x - x.mean(0)).square().sum() / B
    extra, aux = revive_dead(params, inputs, error[0].neg(), dead, aux_coefficient)
    scale = 2 / (B * variance)
    value_grads = value_grads.mul_(scale).mul_(codes.values > 0)
    work = Work(codes, inputs, error.mul_(scale), value_grads, (codes.n_features,), True, extra)
    return work, Losses(mse, mse / spread, aux)


def encode(params: Params, x: Float[Tensor, "B d"], *, k: int) -> Codes:
    """Codes as inference selects them."""
    return kernels.encode_select(x - params.b_dec, params.encoder_read, params.b_enc, TopK(k))
