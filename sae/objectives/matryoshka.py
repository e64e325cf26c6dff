"""Matryoshka BatchTopK + AuxK (Bussmann, Nabeshima, Karvonen and Nanda 2025, arXiv 2503.17547).

One BatchTopK over all features; level g reconstructs with the first m_g features alone, and the loss is the mean over
the G levels of their errors: weight 1/G each, once (dictionary_learning weights 1/G and then averages again, which
makes AuxK G times as heavy). AuxK and the figures logged are of the full width; metrics/fvu_<width> of each prefix.
Threshold as in objectives/batchtopk.py. Twin: tests/reference/batchtopk.py.
"""

from __future__ import annotations

from functools import partial

from sae.objectives import batchtopk
from sae.objectives.terms import Objective
from sae.recipe import Recipe, SAERecipe


def objective(recipe: Recipe, variance: float, low: bool) -> Objective:
    levels = widths(recipe.sae)
    return Objective(
        begin=partial(batchtopk.begin, d_sae=recipe.sae.d_sae, seed=recipe.training.seed, low=low),
        loss=partial(
            batchtopk.loss,
            k=recipe.sae.k,
            variance=variance,
            aux_coefficient=recipe.training.aux_coefficient,
            levels=levels,
            weights=(1 / len(levels),) * len(levels),
        ),
        encode=batchtopk.encode,
    )


def widths(recipe: SAERecipe) -> tuple[int, ...]:
    """Ends of the nested prefixes: the recipe's, or groups of 1/32, 1/16, 1/8, 1/4 of the features and the rest."""
    if recipe.matryoshka_widths is not None:
        return recipe.matryoshka_widths
    F = recipe.d_sae
    # the ends of those groups; a small dictionary has fewer
    return (*sorted({F * part // 32 for part in (1, 3, 7, 15)} - {0, F}), F)
