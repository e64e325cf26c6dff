"""ReLU + L1 on decoder norms (Anthropic, April 2024 update).

f = relu(W_e x + b_e), x̂ = W_d f + b_dec; b_dec is not taken off the input. Loss, x normed so that its mean norm is √d:
mean over rows of ‖x − x̂‖² + λ Σ_j f_j ‖W_d,j‖. λ is what holds L0 (objectives/target.py), or the recipe's (published:
5), after a linear warm-up (published: the first 5% of the run). Decoder norms are free and folded away after training.
No resampling, no AuxK: the recipe leaves few features dead.
Half of all entries are positive at the start, so the first steps are dense. Twin: tests/reference/relu.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae import kernels
from sae.codes import Codes
from sae.kernels import Above, EveryRow, Work
from sae.objectives import target
from sae.objectives.elementwise import evaluate
from sae.objectives.entries import Entries, losses_of
from sae.objectives.terms import Losses, Objective, Params, random_rows
from sae.recipe import Recipe, SAERecipe

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

WARM_UP, NORM = 0.05, 0.1
FIRST = 0.3
"""λ·L0/E‖x − mean x‖² before there is anything to go by; SmolLM2 ends between 0.2 and 0.3."""


def weight_of(recipe: SAERecipe, variance: float) -> tuple[float, float]:
    """(λ, share of the run over which it rises from 0); where L0 is held, λ is its first value."""
    l0, given, warm_up = target.l0_of(recipe), recipe.l1_coefficient, recipe.l1_warm_up
    if l0 is None:
        assert given is not None, "else L0 is held"
        return given, WARM_UP if warm_up is None else warm_up
    return FIRST * variance / l0 if given is None else given, target.WARM_UP if warm_up is None else warm_up


def objective(recipe: Recipe, variance: float, low: bool) -> Objective:
    (coefficient, warm_up), l0 = weight_of(recipe.sae, variance), target.l0_of(recipe.sae)

    def at_weight(params: Params, x: Tensor, dead: Tensor, weight: float) -> tuple[Work, Losses]:
        return loss(params, x, dead, 1.0, coefficient=weight, warm_up=0.0)

    def begin_(sample: Tensor) -> Params:
        params = begin(sample, d_sae=recipe.sae.d_sae, seed=recipe.training.seed, low=low)
        params.control = None if l0 is None else target.begin(coefficient)
        return params

    with_warm_up = partial(loss, coefficient=coefficient, warm_up=warm_up)
    return Objective(
        begin=begin_,
        loss=with_warm_up if l0 is None else target.held(at_weight, l0, warm_up),
        encode=encode,
        unit_norm=False,
    )


def begin(sample: Float[Tensor, "n d"], *, d_sae: int, seed: int, low: bool) -> Params:
    """Random decoder directions of norm 0.1, the encoder their transpose, biases 0."""
    W_dec = random_rows(d_sae, sample.shape[1], seed).mul_(NORM)
    encoder = W_dec.clone()
    return Params(
        encoder, W_dec, torch.zeros(d_sae), torch.zeros(sample.shape[1]), encoder.to(torch.bfloat16) if low else None
    )


def loss(
    params: Params,
    x: Float[Tensor, "B d"],
    dead: Bool[Tensor, " F"],
    share: float,
    *,
    coefficient: float,
    warm_up: float,
    dense: bool | None = None,
    implementation: str | None = None,
) -> tuple[Work, Losses]:
    """One batch of normed activations → work and losses. `dense` picks the path, by default by density."""
    weight = coefficient * (min(1.0, share / warm_up) if warm_up else 1.0)
    norm = torch.linalg.vector_norm(params.W_dec, dim=1)

    def entry(pre: Tensor, norm: Tensor) -> Entries:
        strength = pre.relu()
        cost = weight * norm
        return Entries(
            strength,
            (pre > 0).float(),
            penalty=cost * strength,
            penalty_by_strength=cost.expand_as(pre),
            penalty_by_norm=weight * strength,
        )

    floor = torch.zeros_like(params.b_enc)
    work, sums, density = evaluate(params, x, floor, entry, (norm,), dense=dense, implementation=implementation)
    B = x.shape[0]
    every = EveryRow(sums.by_norm / (B * norm.clamp_min(1e-12)), torch.zeros_like(norm), torch.zeros_like(x[0]))
    return replace(work, every=every), losses_of(x, sums, density, sums.penalty / B)


def encode(params: Params, x: Float[Tensor, "B d"]) -> Codes:
    """Codes of what is positive."""
    return kernels.encode_select(x, params.encoder_read, params.b_enc, Above(torch.zeros_like(params.b_enc)))
