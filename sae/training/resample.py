"""Resampling of dead features: each begins anew at an input that is reconstructed badly.

After Bricken et al. 2023, Towards Monosemanticity (Anthropic, October 2023), 'Neuron resampling': inputs are drawn with
probability proportional to their squared loss; a dead feature's decoder row becomes the input's direction, its encoder
row the same times 0.2 of the mean norm of the living encoder rows, its bias 0. There: at four moments, from a pool of
819,200 inputs, and Adam's moments are zeroed. Here: every so many tokens, from the inputs of that step; Adam goes on
with the mean second moment of the living, because bias correction is long over and a step after zero would be several
times the rate (31 times with β1 = 0). Where the encoder reads x as it is (JumpReLU, ReLU), directions are taken from
the batch's mean, and the bias takes that mean off again: else every such feature would fire on everything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.kernels import Work
from sae.objectives.terms import Params
from sae.training.average import Average
from sae.training.dead import Dead
from sae.training.optimizer import RowAdam

ENCODER_SCALE = 0.2


def resample_due(step: int, steps: int, tokens_a_step: int, every: int | None) -> bool:
    """Whether `every` tokens have passed once more with this step (0 … steps−1). Not when fewer than that are left: a
    new feature needs time to learn."""
    if every is None:
        return False
    now = (step + 1) * tokens_a_step
    return now // every > (now - tokens_a_step) // every and steps * tokens_a_step - now >= every


def resample_(
    params: Params, optimizer: RowAdam, dead: Dead, work: Work, seed: int, average: Average | None = None
) -> int:
    """Begin the dead features anew, in place; returns how many. Deterministic in the seed.

    work   of the step just done: its inputs as the encoder saw them, and its error
    """
    mask = dead.mask()
    features, alive = mask.nonzero().squeeze(1), ~mask
    if features.numel() == 0 or not bool(alive.any()):
        return 0
    inputs = work.inputs[_draw(work.error[-1].square().sum(1), features.numel(), seed)]
    centre = torch.zeros_like(inputs[0]) if work.subtracts_b_dec else work.inputs.mean(0)
    directions = torch.nn.functional.normalize(inputs - centre, dim=1)
    lost = directions.square().sum(1) < 0.5  # an input that is the centre has no direction
    directions[lost] = params.W_dec[features[lost]] / params.W_dec[features[lost]].norm(dim=1, keepdim=True)
    params.W_dec[features] = directions * params.W_dec[alive].norm(dim=1).mean()
    params.encoder[features] = directions * (ENCODER_SCALE * params.encoder[alive].norm(dim=1).mean())
    params.b_enc[features] = -(params.encoder[features] @ centre)
    if params.log_threshold is not None:  # a feature may have died of its threshold
        params.log_threshold[features] = params.log_threshold[alive].mean()
    if params.encoder_low is not None:
        params.encoder_low[features] = params.encoder[features].to(params.encoder_low.dtype)
    optimizer.forget_(features, alive)
    if average is not None:
        average.begin_anew_(features)
    dead.since[features] = 0
    return features.numel()


def _draw(loss: Tensor, n: int, seed: int) -> Tensor:
    """n rows with probability proportional to squared loss [B]; each once while there are enough."""
    weights = loss.double().square().cpu()
    weights = weights / weights.max().clamp_min(1e-300) + 1e-12  # rows without loss are drawn last
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(weights, n, replacement=n > len(weights), generator=generator).to(loss.device)
