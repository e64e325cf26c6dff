"""An SAE before its first step: from a recipe and a sample of normed activations to everything the loop trains.

What a recipe leaves to "auto" becomes a value here (`resolved`), which is written down with the run and printed by
`sae train --dry-run`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae import config, kernels, machine
from sae.host import Host
from sae.objectives import Objective, Params, jumprelu, matryoshka, objective, relu, target
from sae.recipe import Recipe, TrainingRecipe
from sae.training import capture
from sae.training.average import Average
from sae.training.dead import Dead, dead_window
from sae.training.log import Log
from sae.training.loop import Trainee, learn
from sae.training.optimizer import FROZEN, RowAdam
from sae.training.schedule import decay_steps, lr_at, peak_lr, steps_of, warm_up_steps

if TYPE_CHECKING:
    from jaxtyping import Float


def device_of(training: TrainingRecipe) -> torch.device:
    """Where weights and batches are: auto is cuda or cpu; mps, whose kernels are the plain ones, only when asked."""
    if training.device == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    return machine.device_of(training.device)


def is_low(recipe: Recipe) -> bool:
    """Whether the encoder's product reads a bfloat16 copy."""
    return machine.dtype_of(recipe.training.dtype, device_of(recipe.training)) == torch.bfloat16


def variance_of(sample: Float[Tensor, "n d"]) -> float:
    """E‖x − mean x‖²."""
    return (sample - sample.mean(0)).square().sum(1).mean().item()


def trainee(
    recipe: Recipe,
    hook: str,
    sample: Float[Tensor, "n d"],
    held_out: Float[Tensor, "n d"] | None,
    *,
    scale: float,
    low: bool,
    warmed: Callable[..., Params] | None = None,
) -> Trainee:
    """An SAE before its first step. Nothing is written.

    sample, held_out   normed activations; the second are evaluated in between
    low                the encoder's product reads a bfloat16 copy: as the run began, whatever this machine would choose
    warmed             (a cold start, unit_norm=whether decoder rows have unit norm) → weights of a finished SAE
    """
    training = recipe.training
    device = device_of(training)
    steps = steps_of(training.tokens, training.batch * training.grad_acc_steps)
    trained = objective(recipe, variance_of(sample), low=low)
    begun = trained.begin(sample)
    if warmed is not None:
        begun = warmed(begun, unit_norm=trained.unit_norm)
    there = {name: one.to(device) for name, one in vars(begun).items() if one is not None and name != "control"}
    params = replace(begun, **there)
    optimizer = RowAdam(
        params,
        betas=(training.adam_beta1, training.adam_beta2),
        clip=training.clip,
        frozen=FROZEN[training.finetune],
    )
    dead = Dead(recipe.sae.d_sae, dead_window(training.tokens, training.dead_after), device)
    state = params, trained, optimizer, dead
    return Trainee(
        folder=Path(recipe.out),
        hook=hook,
        params=params,
        objective=trained,
        optimizer=optimizer,
        dead=dead,
        average=Average(params, training.ema) if training.ema else None,
        learn=partial(learn, *state)
        if training.grad_acc_steps > 1
        else capture.learner(recipe.sae.architecture, *state),
        rate=partial(
            lr_at,
            steps=steps,
            peak=peak_lr(training.lr, recipe.sae.d_sae, steps),
            name=training.lr_scheduler_name,
            warm_up=training.lr_warm_up_steps,
            decay=training.lr_decay_steps,
        ),
        resample_every=training.resample_every,
        seed=training.seed,
        log=Log(Path(recipe.out), config.to_dict(recipe), wandb=recipe.log.wandb, every=recipe.log.every),
        evaluate=partial(_quick, trained, None if held_out is None else held_out.to(device)),
        facts={"norm_factor": scale},
    )


def _quick(trained: Objective, held_out: Tensor | None, params: Params) -> dict[str, float]:
    if held_out is None:
        return {}
    codes = trained.encode(params, held_out)
    miss = kernels.decode(codes, params.W_dec, params.b_dec) - held_out
    spread = held_out - held_out.mean(0)
    return {"held_out/fvu": (miss.double().square().sum() / spread.double().square().sum()).item()}


def resolved(recipe: Recipe, d_in: int, hook: str, host: Host | None, variance: float | None) -> Recipe:
    """The recipe with every "auto" as what it means here.

    variance   of a sample of normed activations, on which a held JumpReLU's first thresholds depend; None before any
               was seen leaves these to "auto"
    """
    training = recipe.training
    sae = recipe.sae
    steps = steps_of(training.tokens, training.batch * training.grad_acc_steps)
    warm_up = training.lr_warm_up_steps
    there = {} if host is None else {"dtype": str(host.dtype).removeprefix("torch."), "device": str(host.device)}
    training = replace(
        training,
        lr=peak_lr(training.lr, sae.d_sae, steps),
        lr_warm_up_steps=warm_up_steps(steps, warm_up),
        lr_decay_steps=decay_steps(steps, training.lr_scheduler_name, training.lr_decay_steps, warm_up),
        dead_after=dead_window(training.tokens, training.dead_after),
        dtype="bfloat16" if is_low(recipe) else "float32",
        device=str(device_of(training)),
    )
    if sae.architecture == "matryoshka":
        sae = replace(sae, matryoshka_widths=matryoshka.widths(sae))
    if sae.architecture in ("jumprelu", "relu"):
        sae = replace(sae, target_l0=target.l0_of(sae))
    if sae.architecture == "jumprelu" and variance is not None:
        form = jumprelu.form_of(recipe.sae, d_in, variance)
        sae = replace(
            sae,
            jumprelu_bandwidth=form.bandwidth,
            jumprelu_init_threshold=form.init_threshold,
            l0_coefficient=form.l0_coefficient,
            l0_warm_up=form.warm_up,
        )
    if sae.architecture == "relu" and variance is not None:
        coefficient, share = relu.weight_of(recipe.sae, variance)
        sae = replace(sae, l1_coefficient=coefficient, l1_warm_up=share)
    return replace(recipe, host=replace(recipe.host, hook=hook, **there), sae=sae, training=training)
