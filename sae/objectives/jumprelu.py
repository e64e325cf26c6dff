"""JumpReLU: a threshold for each feature, trained through a rectangle kernel. Three forms of its sparsity loss.

f = π·1[π > θ], π = W_e x + b_e, θ = exp(t) > 0, x̂ = W_d f + b_dec; b_dec is not taken off the input. With K = 1 where
|π − θ| < ε/2 the pseudo-derivatives are ∂f/∂θ = −(θ/ε)K and ∂1[π > θ]/∂θ = −(1/ε)K. Units: x of mean norm √d.
π is the pre-activation as it is: with the papers' relu(π), all negative ones would lie in the window where θ < ε/2.

tanh       Anthropic, January 2025 update. Loss ‖x − x̂‖² + λ_S Σ tanh(c f ‖W_d‖) + λ_P Σ relu(θ − π) ‖W_d‖; the kernel's
           gradient goes into π as well, and ∂f/∂t is taken as −(θ/ε)K, as published. ε = 2, c = 4, λ_P = 3e-6, λ_S
           rises over the whole run; decoder norms are free. The slope of tanh counts at f = 0 too (where |f| has none):
           else the window's lower half would feel no penalty. At first most entries lie in the window: dense steps.
           θ₀ is e^0.1: the update prints t = 0.1, and log θ is t (0.1 is worse by 0.03 in FVU: experiments/log.md).
           The published 10 to 20 for λ_S leave 3 features a token on SmolLM2's residual (2,048 features, 0.5M tokens).
step       Rajamanoharan et al. 2024 (arXiv 2407.14435): ‖x − x̂‖² + λ ‖f‖₀; only θ feels the L0 term. Unit-norm decoder.
quadratic  the same with λ (L0/k − 1)², L0 the mean of the batch: it pins the average, not every token.

λ is what holds L0 (objectives/target.py), or the recipe's after a linear warm-up.
DeepMind's forms: log θ moves by about the learning rate a step, so their constants (ε = θ₀ = 1e-3 and λ = 1e-3 where
E‖x‖² = 1, thus times √d and d here) need very many tokens before L0 falls: 230 after 0.2M. Where L0 is held, θ₀ is
where START times the target fire at first, and ε half of it: FVU 0.22 at L0 32 after 0.5M tokens with 1,024 features,
where the tanh form has 0.25 and ReLU 0.31.
Twin: tests/reference/jumprelu.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae import kernels
from sae.codes import Codes
from sae.kernels import Above, EveryRow, Work
from sae.objectives import target
from sae.objectives.elementwise import evaluate
from sae.objectives.entries import Entries, Entry, Sums, losses_of
from sae.objectives.terms import Losses, Objective, Params, initial
from sae.recipe import Recipe, SAERecipe

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

TANH_SCALE, PRE_ACT_COEFFICIENT = 4.0, 3e-6
# Anthropic starts with 10,000 features a token; a dictionary of fewer than 50,000 starts with this share of its own.
FIRST_L0, FIRST_SHARE = 10_000, 0.2
START = 5.0
"""First L0 over the target, of a step or quadratic form that is held; most of it is gone after some steps."""
FIRST = {"tanh": 0.04, "step": 0.1}
"""λ·L0/E‖x − mean x‖² before there is anything to go by; SmolLM2 ends at 0.03 and 0.07."""


@dataclass(frozen=True)
class Form:
    """A recipe's form of JumpReLU with everything resolved, in units where activations have mean norm √d."""

    mode: str
    bandwidth: float
    init_threshold: float
    l0_coefficient: float
    """Where L0 is held, its first value."""
    warm_up: float
    """Share of the run over which the coefficient rises from 0."""
    k: float
    """Target of the quadratic form."""
    pre_act_coefficient: float = PRE_ACT_COEFFICIENT
    encoder_norm: float = 1.0
    """Of an encoder row at first, where decoder rows have unit norm."""


def form_of(recipe: SAERecipe, d: int, variance: float) -> Form:
    """The recipe's form for activations of width d and variance E‖x − mean x‖²; what it leaves open follows the
    publications, or where L0 is held the target."""
    mode, l0 = recipe.jumprelu_sparsity_loss_mode, target.l0_of(recipe)
    unit, norm = 1e-3 * math.sqrt(d), 1.0
    bandwidth, threshold, coefficient, warm_up = {
        "tanh": (2.0, math.exp(0.1), 0.4, 1.0),
        "step": (unit, unit, 1e-3 * d, 0.1),
        "quadratic": (unit, unit, 1.0 * d, 0.1),
    }[mode]
    if l0 is not None:
        coefficient, warm_up = FIRST[mode] * variance / l0 if mode in FIRST else coefficient, target.WARM_UP
        if mode != "tanh":  # a unit row's pre-activations are about normal
            share = min(0.25, START * l0 / recipe.d_sae)
            z = NormalDist().inv_cdf(1 - share)
            # ‖x̂‖ over ‖x‖ before the first step: above 1, strengths fall until no feature fires
            overshoot = recipe.d_sae / d * (z * NormalDist().pdf(z) + share)
            norm = min(1.0, 1 / overshoot)
            threshold = norm * math.sqrt(variance / d) * z
            bandwidth = threshold / 2

    def given(value: float | None, otherwise: float) -> float:
        return otherwise if value is None else value

    return Form(
        mode,
        given(recipe.jumprelu_bandwidth, bandwidth),
        given(recipe.jumprelu_init_threshold, threshold),
        given(recipe.l0_coefficient, coefficient),
        given(recipe.l0_warm_up, warm_up),
        recipe.k if l0 is None else l0,
        encoder_norm=norm,
    )


def objective(recipe: Recipe, variance: float, low: bool) -> Objective:
    l0 = target.l0_of(recipe.sae)

    def form(d: int) -> Form:
        return form_of(recipe.sae, d, variance)

    def with_warm_up(params: Params, x: Tensor, dead: Tensor, share: float) -> tuple[Work, Losses]:
        return loss(params, x, dead, share, form=form(x.shape[1]))

    def at_weight(params: Params, x: Tensor, dead: Tensor, weight: float) -> tuple[Work, Losses]:
        return loss(params, x, dead, 1.0, form=replace(form(x.shape[1]), l0_coefficient=weight, warm_up=0.0))

    def begin_(sample: Tensor) -> Params:
        params = begin(sample, d_sae=recipe.sae.d_sae, form=form(sample.shape[1]), seed=recipe.training.seed, low=low)
        params.control = None if l0 is None else target.begin(form(sample.shape[1]).l0_coefficient)
        return params

    mode = recipe.sae.jumprelu_sparsity_loss_mode
    gains = {"tanh": target.FAST, "step": target.SLOW, "quadratic": target.SPRING}[mode]
    warm_up = target.WARM_UP if recipe.sae.l0_warm_up is None else recipe.sae.l0_warm_up
    return Objective(
        begin=begin_,
        loss=with_warm_up if l0 is None else target.held(at_weight, l0, warm_up, gains),
        encode=encode,
        unit_norm=mode != "tanh",
    )


def begin(sample: Float[Tensor, "n d"], *, d_sae: int, form: Form, seed: int, low: bool) -> Params:
    """Parameters before the first step.

    tanh    W_d uniform in ±1/√d, W_e = (d/F) W_dᵀ, b_dec 0, b_e such that each feature fires on a share 10,000/F of
            the sample (at most FIRST_SHARE)
    else    unit rows, W_e = W_dᵀ, b_dec the sample's mean, b_e = −W_e b_dec: what a b_dec taken off the input is folded
            into afterwards
    """
    d, F = sample.shape[1], d_sae
    if form.mode == "tanh":
        generator = torch.Generator().manual_seed(seed)
        W_dec = torch.empty(F, d).uniform_(-1 / math.sqrt(d), 1 / math.sqrt(d), generator=generator)
        params = Params(W_dec * (d / F), W_dec, torch.zeros(F), torch.zeros(d))
        fires = min(FIRST_L0 / F, FIRST_SHARE)
        for rows in torch.arange(F).split(256):
            pre = sample @ params.encoder[rows].T
            at = max(1, round((1 - fires) * len(sample)))
            params.b_enc[rows] = form.init_threshold - pre.kthvalue(at, dim=0).values
    else:
        params = initial(sample, d_sae=F, seed=seed, low=False)
        params.encoder *= form.encoder_norm
        params.b_enc = -params.encoder @ params.b_dec
    params.log_threshold = torch.full((F,), math.log(form.init_threshold))
    params.encoder_low = params.encoder.to(torch.bfloat16) if low else None
    return params


def loss(
    params: Params,
    x: Float[Tensor, "B d"],
    dead: Bool[Tensor, " F"],
    share: float,
    *,
    form: Form,
    dense: bool | None = None,
    implementation: str | None = None,
) -> tuple[Work, Losses]:
    """One batch of normed activations → work and losses. `dense` picks the path, by default by density."""
    assert params.log_threshold is not None, "begin() makes it"
    weight = form.l0_coefficient * (min(1.0, share / form.warm_up) if form.warm_up else 1.0)
    threshold = params.log_threshold.exp()
    floor = threshold - form.bandwidth / 2
    path = {"dense": dense, "implementation": implementation}
    if form.mode == "tanh":
        norm = torch.linalg.vector_norm(params.W_dec, dim=1)
        entry = tanh_entry(form, weight)
        work, sums, density = evaluate(params, x, floor, entry, (threshold, norm), **path)
        work, pre_act = _with_pre_act(work, sums, params, x, threshold, norm, form.pre_act_coefficient)
        losses = losses_of(x, sums, density, sums.penalty / len(x))
        losses.more["losses/pre_act_loss"] = pre_act
    else:
        work, sums, density = evaluate(params, x, floor, step_entry(form), (threshold,), **path)
        l0 = sums.active.sum() / len(x)
        excess = l0 / form.k - 1
        sparsity, slope = (
            (weight * l0, weight) if form.mode == "step" else (weight * excess**2, 2 * weight * excess / form.k)
        )
        # ∂1[π > θ]/∂ log θ = −(θ/ε)K: the same for all of a feature's entries, so their number is enough
        by_l0 = -slope * threshold / form.bandwidth * sums.window / len(x)
        work = replace(work, vectors={"log_threshold": sums.by_log_threshold + by_l0})
        losses = losses_of(x, sums, density, sparsity)
    losses.more["sparsity/window_share"] = sums.window.sum() / (len(x) * len(threshold))
    return work, losses


def tanh_entry(form: Form, weight: float) -> Entry:
    def entry(pre: Tensor, threshold: Tensor, norm: Tensor) -> Entries:
        active, window = _gate(pre, threshold, form.bandwidth)
        strength = pre * active
        jump = window * (threshold / form.bandwidth)
        tanh = torch.tanh(TANH_SCALE * strength * norm)
        steep = weight * TANH_SCALE * (1 - tanh.square())  # not 0 at strength 0: it counts inside the window
        return Entries(
            strength,
            active + jump,
            -jump,
            weight * tanh,
            steep * norm,
            steep * strength,
            form.pre_act_coefficient * norm * active,
            window,
        )

    return entry


def step_entry(form: Form) -> Entry:
    def entry(pre: Tensor, threshold: Tensor) -> Entries:
        active, window = _gate(pre, threshold, form.bandwidth)
        by_threshold = window * (-threshold.square() / form.bandwidth)
        return Entries(pre * active, active.float(), by_threshold, window=window)

    return entry


def _gate(pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """(π > θ, K). The window's lower end is written as the floor is, so that both round alike."""
    return pre > threshold, (pre > threshold - bandwidth / 2) & (pre < threshold + bandwidth / 2)


def _with_pre_act(
    work: Work, sums: Sums, params: Params, x: Tensor, threshold: Tensor, norm: Tensor, coefficient: float
) -> tuple[Work, Tensor]:
    """Add λ_P Σ relu(θ − π) ‖W_d‖, mean over rows. Its gradient by π is the same for every entry, rank one over the
    batch, but for the active ones, whose share the rule has taken back (penalty_by_pre)."""
    B = len(x)
    inputs_sum = x.sum(0)
    pre_sum = torch.mv(params.encoder, inputs_sum).add_(params.b_enc, alpha=B)
    below = (B - sums.active) * threshold - (pre_sum - sums.strength)
    by_pre = -coefficient / B * norm
    every = EveryRow((sums.by_norm + coefficient * below) / (B * norm.clamp_min(1e-12)), by_pre, inputs_sum)
    by_log_threshold = sums.by_log_threshold + coefficient / B * norm * (B - sums.active) * threshold
    vectors = {"b_enc": B * by_pre, "log_threshold": by_log_threshold}
    return replace(work, every=every, vectors=vectors), coefficient / B * (norm * below).sum()


def encode(params: Params, x: Float[Tensor, "B d"]) -> Codes:
    """Codes by each feature's threshold."""
    assert params.log_threshold is not None, "begin() makes it"
    return kernels.encode_select(x, params.encoder_read, params.b_enc, Above(params.log_threshold.exp()))
