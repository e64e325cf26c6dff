"""One page an architecture: (params, batch, …) → work and losses, written by hand on the kernels.

Each has a float64 autograd twin in tests/reference with which its gradients are compared. `objective` picks the page.
"""

from __future__ import annotations

from functools import partial

from sae.architectures import architecture
from sae.objectives import topk
from sae.objectives.terms import Losses, Objective, Params, initial
from sae.recipe import Recipe

__all__ = ["Losses", "Objective", "Params", "objective"]


def objective(recipe: Recipe, variance: float, *, low: bool) -> Objective:
    """The objective of a recipe's architecture.

    variance   E‖x − mean x‖² of a sample of normed activations
    low        the encoder's product reads a bfloat16 copy
    """
    assert architecture(recipe.sae.architecture).objective == "topk", (
        "every architecture in the table has its page here"
    )
    return Objective(
        begin=partial(initial, d_sae=recipe.sae.d_sae, seed=recipe.training.seed, low=low),
        loss=partial(topk.loss, k=recipe.sae.k, variance=variance, aux_coefficient=recipe.training.aux_coefficient),
        encode=partial(topk.encode, k=recipe.sae.k),
    )
