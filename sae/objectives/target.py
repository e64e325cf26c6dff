"""L0 as the user states it: a controller moves the sparsity loss's weight until a batch's L0 meets a target.

Users think in L0; what a coefficient does differs with the host, the width and the length of a run. Closed loop: after
each batch, with e = log(L0/r), log weight = I + gain·e, and I += rate·Δshare·e: a PI controller, so that the first
weight need only be of the right size. gain·e is kept within ±LIMIT, in both places: a push that is too strong or too
weak to tell any more would only wind I up. It begins after the warm-up of the weight (a new dictionary's L0 says
nothing yet), and the reference r goes geometrically from the L0 found then to the target, e-fold in a share REACH of
the run. Constants: experiments/log.md, 'target_l0'. On CUDA a step waits for its L0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.kernels import Work
from sae.objectives.terms import Loss, Losses, Params
from sae.recipe import SAERecipe

if TYPE_CHECKING:
    from jaxtyping import Float

WARM_UP, REACH = 0.1, 0.1  # shares of the run
LIMIT = 2.0


@dataclass(frozen=True)
class Gains:
    gain: float
    rate: float
    """By share of the run."""
    signed: bool = False
    """weight = exp(I)·(1 + gain·e), which is below 0 where L0 is too low: it then pulls, as nothing else would."""
    spring: bool = False
    """The loss pulls towards the target from both sides by itself: its weight grows while |e| is above SLACK."""


FAST = Gains(1.0, 40.0)
"""Of a penalty that every weight feels."""
SLOW = Gains(10.0, 30.0, signed=True)
"""Of one that thresholds alone feel: they move by the learning rate a step, however hard it pushes."""
SPRING = Gains(10.0, 150.0, spring=True)
SLACK = 0.01


def l0_of(recipe: SAERecipe) -> float | None:
    """The L0 that the recipe's sparsity loss is held to: its target_l0, else its k; None where a coefficient was given
    and holds nothing."""
    if recipe.target_l0 is not None:
        return recipe.target_l0
    given = recipe.l0_coefficient if recipe.architecture == "jumprelu" else recipe.l1_coefficient
    return recipe.k if given is None else None


def begin(weight: float) -> Float[Tensor, " 4"]:
    """State before the first batch: weight, I, the share of the run at the last batch that moved them, the log of the
    L0 at the first such (NaN until then). float64."""
    weight = max(weight, 1e-12)
    return torch.tensor([weight, math.log(weight), 0.0, math.nan], dtype=torch.float64)


def held(
    loss: Callable[[Params, Tensor, Tensor, float], tuple[Work, Losses]],
    l0: float,
    warm_up: float,
    gains: Gains = FAST,
) -> Loss:
    """A loss whose weight of sparsity, its last argument, holds L0; moves params.control after every batch.

    warm_up   share of the run over which the weight rises from 0, and is not moved
    """

    def held_loss(params: Params, x: Tensor, dead: Tensor, share: float) -> tuple[Work, Losses]:
        assert params.control is not None, "begin() makes it"
        weight = float(params.control[0]) * (min(1.0, share / warm_up) if warm_up else 1.0)
        work, losses = loss(params, x, dead, weight)
        if share >= warm_up:
            follow_(params.control, float(losses.more["metrics/l0"]), l0, share, warm_up, gains)
        losses.more["details/sparsity_coefficient"] = torch.tensor(weight)
        return work, losses

    return held_loss


def follow_(
    control: Float[Tensor, " 4"],
    l0: float,
    target: float,
    share: float,
    warm_up: float,
    gains: Gains = FAST,
) -> None:
    """Move the state, in place, by the L0 of a batch; one that is not finite is left out."""
    if not math.isfinite(l0):
        return
    _, integral, before, first = control.tolist()
    now, wanted = math.log(max(l0, 1e-3)), math.log(target)
    if math.isnan(first):
        first, before = now, share
    reference = wanted + (first - wanted) * math.exp((warm_up - share) / REACH)
    error = abs(now - wanted) - SLACK if gains.spring else now - reference
    push = min(LIMIT, max(-LIMIT, gains.gain * error))
    integral += gains.rate / gains.gain * (share - before) * push
    weight = math.exp(integral) * (1 + push) if gains.signed else math.exp(integral + push)
    control.copy_(torch.tensor([weight, integral, share, first], dtype=torch.float64))
