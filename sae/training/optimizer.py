"""Adam over the rows of the SAE, fed with an objective's work: exact for every row, idle ones too.

State: first and second moments of the four tensors, float32. β = (0.9, 0.999), ε = 6.25e-10 (Gao et al. 2024).
"""

import torch
from torch import Tensor

from sae.kernels import Adam, Rule, Work, by_feature, update_rows
from sae.kernels.update_rows import adam_
from sae.objectives.terms import Params

BETAS, EPS = (0.9, 0.999), 6.25e-10
_NAMES = ("encoder", "W_dec", "b_enc", "b_dec")


class RowAdam:
    def __init__(self, params: Params):
        self.params = params
        self.moments = {}
        for name in _NAMES:
            weight = getattr(params, name)
            self.moments[name] = Adam(torch.zeros_like(weight), torch.zeros_like(weight))

    def update_(self, work: Work, lr: float, *, unit_norm: bool = True, implementation: str | None = None) -> None:
        """One step in place; decoder rows have unit norm afterwards (if asked), the bf16 encoder copy is fresh."""
        params, moments = self.params, self.moments
        rule = Rule(lr, BETAS, EPS, unit_norm)
        for state in moments.values():
            state.step += 1
        d_b_enc = torch.zeros_like(params.b_enc).index_add_(0, work.codes.indices, work.value_grads)
        if work.extra is not None:
            d_b_enc.index_add_(0, work.extra.features, work.extra.b_enc)
        if "b_enc" in work.vectors:
            d_b_enc += work.vectors["b_enc"]
        d_b_dec = work.error[0].sum(0)
        if work.subtracts_b_dec:
            d_b_dec -= d_b_enc @ params.encoder
        update_rows(
            params.encoder,
            params.W_dec,
            params.encoder_low,
            (moments["encoder"], moments["W_dec"]),
            work,
            by_feature(work.codes),
            rule,
            implementation=implementation,
        )
        adam_(params.b_enc, d_b_enc, moments["b_enc"], rule)
        adam_(params.b_dec, d_b_dec, moments["b_dec"], rule)

    def state_dict(self) -> dict[str, Tensor]:
        state = {"adam.step": torch.tensor(self.moments["encoder"].step)}
        for name, adam in self.moments.items():
            state |= {f"adam.{name}.m": adam.m, f"adam.{name}.v": adam.v}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, adam in self.moments.items():
            adam.m.copy_(state[f"adam.{name}.m"])
            adam.v.copy_(state[f"adam.{name}.v"])
            adam.step = int(state["adam.step"])
