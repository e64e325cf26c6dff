"""BatchTopK + AuxK (Bussmann, Leask and Nanda 2024, arXiv 2412.06410).

z = the B·k largest positive entries of W_e(x − b_dec) + b_e over the whole batch. Loss: objectives/ranked.py.
Inference cannot look at a batch, so it is a JumpReLU with one threshold. While training that is a running mean of each
batch's smallest kept pre-activation; the threshold that is saved is calibrated on held-out text at the end, because
the minimum of a batch is a noisy, low-biased estimate. Twin: tests/reference/batchtopk.py.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae import kernels
from sae.codes import Codes
from sae.kernels import Above, BatchTopK, Work
from sae.objectives import ranked
from sae.objectives.terms import Losses, Objective, Params, initial
from sae.recipe import Recipe

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

# SAELens's rate (topk_threshold_lr 0.01, from the first batch); dictionary_learning's 0.001 from step 1,000 on would
# leave short runs without a threshold.
RATE = 0.01
UNSET = -1.0
"""Before the first batch, as in dictionary_learning; the first batch sets the threshold to its own minimum."""


def objective(recipe: Recipe, variance: float, low: bool) -> Objective:
    return Objective(
        begin=partial(begin, d_sae=recipe.sae.d_sae, seed=recipe.training.seed, low=low),
        loss=partial(loss, k=recipe.sae.k, variance=variance, aux_coefficient=recipe.training.aux_coefficient),
        encode=encode,
    )


def begin(sample: Float[Tensor, "n d"], *, d_sae: int, seed: int, low: bool) -> Params:
    params = initial(sample, d_sae=d_sae, seed=seed, low=low)
    # float32 always: at rate 0.01 a bfloat16 mean stands still
    params.ema_threshold = torch.tensor(UNSET, device=sample.device)
    return params


def loss(
    params: Params,
    x: Float[Tensor, "B d"],
    dead: Bool[Tensor, " F"],
    share: float = 0.0,
    *,
    k: int,
    variance: float,
    aux_coefficient: float,
    levels: tuple[int, ...] | None = None,
    weights: tuple[float, ...] | None = None,
    implementation: str | None = None,
) -> tuple[Work, Losses]:
    """One batch of normed activations → work and losses; moves params.ema_threshold. Arguments as in ranked.py."""
    work, losses = ranked.loss(
        params,
        x,
        dead,
        BatchTopK(k),
        share,
        variance=variance,
        aux_coefficient=aux_coefficient,
        levels=levels,
        weights=weights,
        implementation=implementation,
    )
    follow_threshold_(params, work.codes)
    return work, losses


def follow_threshold_(params: Params, codes: Codes) -> None:
    """Move the running threshold, in place, towards the smallest entry that this batch kept."""
    threshold = params.ema_threshold
    assert threshold is not None, "begin() makes it"
    if codes.values.numel() == 0:
        return
    smallest = codes.values.min()
    moved = torch.where(threshold < 0, smallest, threshold.lerp(smallest, RATE))
    threshold.copy_(torch.where(smallest.isfinite(), moved, threshold))


def encode(params: Params, x: Float[Tensor, "B d"]) -> Codes:
    """Codes by the running threshold, for evaluation while training; every positive entry while it is unset."""
    assert params.ema_threshold is not None, "begin() makes it"
    floor = params.ema_threshold.clamp_min(0).repeat(params.b_enc.shape[0])
    return kernels.encode_select(x - params.b_dec, params.encoder_read, params.b_enc, Above(floor))
