"""A running mean of the weights beside those that are trained: for evaluation and for the SAE that ships.

mean ← d·mean + (1 − d)·weights after every step, with d = min(decay, (1 + step)/(10 + step)) so that a short run is not
an average with its beginning. Costs one more copy of the weights and a pass over it a step.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sae.objectives.terms import Params
from sae.training.optimizer import trained


class Average:
    def __init__(self, params: Params, decay: float):
        self.of, self.decay = params, decay
        self.means = {name: weight.clone() for name, weight in trained(params).items()}

    def update_(self, step: int) -> None:
        """After step 0, 1, …"""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, weight in trained(self.of).items():
            self.means[name].lerp_(weight, share)

    def begin_anew_(self, features: Tensor) -> None:
        """Some features' weights were replaced: their means begin there."""
        for name, weight in trained(self.of).items():
            if name != "b_dec":
                self.means[name][features] = weight[features]

    def params(self, unit_norm: bool) -> Params:
        """The means as parameters; a mean of unit vectors is a little short, so decoder rows are renormed if asked."""
        means = dict(self.means)
        if unit_norm:
            means["W_dec"] = torch.nn.functional.normalize(means["W_dec"], dim=1)
        low = None if self.of.encoder_low is None else means["encoder"].to(self.of.encoder_low.dtype)
        return replace(self.of, **means, encoder_low=low)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"ema.{name}": mean for name, mean in self.means.items()}
