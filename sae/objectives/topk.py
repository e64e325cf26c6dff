"""TopK + AuxK (Gao, la Tour et al. 2024, arXiv 2406.04093).

z = relu(TopK_k(W_e(x − b_dec) + b_e)): the k largest of each row. Loss: objectives/ranked.py.
Twin: tests/reference/topk.py.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from sae import kernels
from sae.codes import Codes
from sae.kernels import TopK, Work
from sae.objectives import ranked
from sae.objectives.terms import Losses, Objective, Params, initial
from sae.recipe import Recipe

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def objective(recipe: Recipe, variance: float, low: bool) -> Objective:
    return Objective(
        begin=partial(initial, d_sae=recipe.sae.d_sae, seed=recipe.training.seed, low=low),
        loss=partial(loss, k=recipe.sae.k, variance=variance, aux_coefficient=recipe.training.aux_coefficient),
        encode=partial(encode, k=recipe.sae.k),
    )


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
    """One batch of normed activations → work and losses; arguments as in objectives/ranked.py."""
    return ranked.loss(
        params,
        x,
        dead,
        TopK(k),
        share,
        variance=variance,
        aux_coefficient=aux_coefficient,
        implementation=implementation,
    )


def encode(params: Params, x: Float[Tensor, "B d"], *, k: int) -> Codes:
    """Codes as inference selects them."""
    return kernels.encode_select(x - params.b_dec, params.encoder_read, params.b_enc, TopK(k))
