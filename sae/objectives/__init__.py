"""One page an architecture: (params, batch, …) → work and losses, written by hand on the kernels.

Each has a float64 autograd twin in tests/reference with which its gradients are compared. `objective` picks the page
that the table of architectures names.
"""

from __future__ import annotations

from dataclasses import replace

from sae.architectures import architecture
from sae.objectives import batchtopk, jumprelu, matryoshka, relu, topk
from sae.objectives.terms import Losses, Objective, Params
from sae.recipe import Recipe

__all__ = ["Losses", "Objective", "Params", "objective"]

_PAGES = {
    "topk": topk.objective,
    "batchtopk": batchtopk.objective,
    "matryoshka": matryoshka.objective,
    "jumprelu": jumprelu.objective,
    "relu": relu.objective,
}


def objective(recipe: Recipe, variance: float, *, low: bool) -> Objective:
    """The objective of a recipe's architecture.

    variance   E‖x − mean x‖² of a sample of normed activations
    low        the encoder's product reads a bfloat16 copy
    """
    page = architecture(recipe.sae.architecture).objective
    if recipe.training.finetune != "all":  # a dead feature comes back by its encoder, which is frozen
        recipe = replace(recipe, training=replace(recipe.training, aux_coefficient=0.0))
    return _PAGES[page](recipe, variance, low)
