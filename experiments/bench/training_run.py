"""One training run on rows in a given order, fused or plain: what sae/trainer.py does, without hosts and folders.

Both forms share everything but the step: sample, scale, initial weights, batches, learning rate, dead counters. Fused
is the package's objective and optimizer. Plain is textbook autograd on the dense [B, F] activations by the twins of
tests/reference, in float32 (the twins of JumpReLU and ReLU know only float64): `backward`, projection,
torch.optim.Adam, unit norm; it asks the objective only which features fired (for the counters) and what the batch's
FVU is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from report import ROOT  # puts the checkout on the path, for tests.reference
from torch import Tensor

from sae.kernels import Work
from sae.objectives import Losses, Objective, Params, objective
from sae.objectives.jumprelu import form_of
from sae.objectives.matryoshka import widths
from sae.objectives.relu import weight_of
from sae.recipe import Recipe, SAERecipe, TrainingRecipe
from sae.training.dead import Dead, dead_window
from sae.training.loop import learn
from sae.training.optimizer import BETAS, EPS, RowAdam
from sae.training.schedule import lr_at, peak_lr

assert (ROOT / "tests" / "reference").is_dir(), "benchmarks run from a checkout"
SAMPLE = 16_384
Watch = Callable[[int, Params, Work, Losses], None]
Take = Callable[[Tensor, float, float], tuple[Work, Losses]]


@dataclass
class Trained:
    params: Params
    objective: Objective
    factor: float
    """Normed = raw · factor."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(tokens, batch's FVU) at every step."""


def recipe_of(shape: tuple[int, int, int, int], tokens: int, seed: int, lr: float | None = None, **sae: Any) -> Recipe:
    """The defaults at a shape B, d, F, k; `sae` are further fields of its SAE."""
    B, _, F, k = shape
    return Recipe(
        sae=SAERecipe(d_sae=F, k=k, **sae),
        training=TrainingRecipe(tokens=tokens, batch=B, seed=seed, lr=lr),
    )


def train(
    recipe: Recipe,
    rows: Tensor,
    order: Tensor,
    *,
    low: bool,
    plain: bool = False,
    watch: Watch = lambda step, params, work, losses: None,
) -> Trained:
    """Train on rows[order] (raw units, any float format), batch after batch.

    low    the fused encoder's product reads a bfloat16 copy; plain is float32 always
    watch  called after every step with its number, the parameters, the step's work and losses
    """
    training, F = recipe.training, recipe.sae.d_sae
    sample = rows[order[:SAMPLE].unique()].float()
    factor = (sample.shape[1] ** 0.5 / sample.norm(dim=1).mean()).item()
    sample *= factor
    variance = (sample - sample.mean(0)).square().sum(1).mean().item()
    trained = objective(recipe, variance, low=low and not plain)
    params = trained.begin(sample)
    dead = Dead(F, dead_window(training.tokens, training.dead_after))
    if plain:
        take: Take = PlainStep(recipe, trained, params, dead, variance)
    else:
        optimizer = RowAdam(params)

        def take(x: Tensor, lr: float, share: float) -> tuple[Work, Losses]:
            return learn(params, trained, optimizer, dead, [x], lr, share)

    steps = order.shape[0] // training.batch
    peak = peak_lr(training.lr, F, steps)
    done = Trained(params, trained, factor)
    for step, batch in enumerate(order[: steps * training.batch].split(training.batch)):
        x = rows[batch].float().mul_(factor)
        work, losses = take(x, lr_at(step, steps, peak), step / steps)
        done.curve.append(((step + 1) * training.batch, float(losses.fvu)))
        watch(step, params, work, losses)
    return done


def twin_gradients(
    recipe: Recipe, params: Params, x: Tensor, dead: Tensor, share: float, variance: float, held: Tensor | None
) -> dict[str, Tensor]:
    """Gradients by name of the architecture's twin: float32, or float64 where the twin knows nothing else.

    held   weight of the sparsity loss in this batch, where a controller moves it
    """
    from tests.reference import batchtopk, jumprelu, relu, topk

    k = recipe.sae.k
    common = {"variance": variance, "dead": dead, "dtype": torch.float32}
    common["aux_coefficient"] = recipe.training.aux_coefficient
    if recipe.sae.architecture == "topk":
        return topk.losses_and_gradients(params, x, k, **common)[1]
    if recipe.sae.architecture in ("batchtopk", "matryoshka"):
        levels = widths(recipe.sae) if recipe.sae.architecture == "matryoshka" else None
        return batchtopk.losses_and_gradients(params, x, k, levels=levels, **common)[1]
    if recipe.sae.architecture == "jumprelu":
        form = form_of(recipe.sae, x.shape[1], variance)
        weight = warmed(form.l0_coefficient, form.warm_up, share) if held is None else float(held)
        facts = {"bandwidth": form.bandwidth, "pre_act": form.pre_act_coefficient, "k": form.k}
        return jumprelu.losses_and_gradients(params, x, form.mode, coefficient=weight, **facts)[1]
    weight = warmed(*weight_of(recipe.sae, variance), share) if held is None else float(held)
    return relu.losses_and_gradients(params, x, weight)[1]


def warmed(weight: float, warm_up: float, share: float) -> float:
    """A penalty's weight that rises from 0 over the first `warm_up` of the run."""
    return weight * min(1.0, share / warm_up) if warm_up else weight


class PlainStep:
    def __init__(self, recipe: Recipe, trained: Objective, params: Params, dead: Dead, variance: float):
        self.recipe, self.objective, self.params, self.dead, self.variance = recipe, trained, params, dead, variance
        self.optimizer: torch.optim.Adam | None = None

    def __call__(self, x: Tensor, lr: float, share: float) -> tuple[Work, Losses]:
        params, mask = self.params, self.dead.mask()
        work, losses = self.objective.loss(params, x, mask, share)
        held = losses.more.get("details/sparsity_coefficient")
        gradients = twin_gradients(self.recipe, params, x, mask, share, self.variance, held)
        if self.optimizer is None:
            trained = [getattr(params, name) for name in gradients]
            self.optimizer = torch.optim.Adam(trained, lr, BETAS, EPS)
        self.optimizer.param_groups[0]["lr"] = lr
        W = params.W_dec
        if self.objective.unit_norm:
            g = gradients["W_dec"]
            gradients["W_dec"] = g - (g * W).sum(1, keepdim=True) * W
        for name, gradient in gradients.items():
            getattr(params, name).grad = gradient.float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.objective.unit_norm:
            W /= W.norm(dim=1, keepdim=True)
        self.dead.count_(work.codes, losses.fired)
        return work, losses
