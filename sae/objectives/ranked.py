"""The loss that TopK, BatchTopK and Matryoshka share: they differ in which entries they keep and in the levels.

z = what `select` keeps of W_e(x − b_dec) + b_e, x̂_g = W_d z + b_dec from the features of the first g levels.
Loss: Σ_g weight_g · mean over rows of ‖x − x̂_g‖², divided by the fixed variance of a sample about its mean, plus AuxK
on what the full reconstruction missed. Only kept entries have a gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sae import kernels
from sae.kernels import BatchTopK, TopK, Work
from sae.objectives.revive import revive_dead
from sae.objectives.terms import Losses, Params

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def loss(
    params: Params,
    x: Float[Tensor, "B d"],
    dead: Bool[Tensor, " F"],
    select: TopK | BatchTopK,
    share: float,
    *,
    variance: float,
    aux_coefficient: float,
    levels: tuple[int, ...] | None = None,
    weights: tuple[float, ...] | None = None,
    implementation: str | None = None,
) -> tuple[Work, Losses]:
    """One batch of normed activations → work and losses.

    variance          E‖x − mean x‖² of a sample, fixed for the run: the loss of predicting the mean is 1
    dead              features that AuxK may use
    levels, weights   as kernels.reconstruct takes them; one level of weight 1 by default
    Losses            mse and fvu of the full reconstruction
    """
    # A transcoder would hand its target to `reconstruct` and to the residual here; the encoder goes on reading x.
    B = x.shape[0]
    inputs = x - params.b_dec
    codes = kernels.encode_select(inputs, params.encoder_read, params.b_enc, select, implementation=implementation)
    levels, weights = levels or (codes.n_features,), weights or (1.0,)
    made = kernels.reconstruct(
        codes, params.W_dec, params.b_dec, x, levels=levels, weights=weights, implementation=implementation
    )
    # a feature of the last level sees that level's error alone
    residual = made.error[-1] / -weights[-1]
    extra, aux = revive_dead(params, inputs, residual, dead, aux_coefficient, share)

    scale = 2 / (B * variance)
    value_grads = made.value_grads.mul_(scale).mul_(codes.values > 0)
    work = Work(codes, inputs, made.error.mul_(scale), value_grads, levels, True, extra)
    squared = made.squared.sum(1)
    spread = (x - x.mean(0)).square().sum()
    more = {f"metrics/fvu_{width}": part / spread for width, part in zip(levels[:-1], squared[:-1], strict=True)}
    return work, Losses(squared[-1] / B, squared[-1] / spread, aux, more=more)
