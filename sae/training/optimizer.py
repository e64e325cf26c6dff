"""Adam over the rows of the SAE, fed with an objective's work: exact for every row, idle ones too.

State: moments of the trained tensors, float32; the norm of the last gradient. β = (0.9, 0.999), ε = 6.25e-10 (Gao et
al. 2024). With β1 = 0 there is no first moment, and rows that are idle are not touched: their second moment decays when
they are next used, which is the same.
Clipping scales a gradient by what the previous one's norm asks: the norm of this one is known only when all rows have
been summed, and by then they have been used and forgotten (kernels/update_rows.py).
Frozen rows are put back after each step, because the kernel updates encoder and decoder in one pass.
"""

import torch
from torch import Tensor

from sae.kernels import Adam, ByFeature, Rule, Work, by_feature, update_rows
from sae.kernels.update_rows import adam_
from sae.objectives.terms import Params

BETAS, EPS = (0.9, 0.999), 6.25e-10
ROWS, VECTORS = ("encoder", "W_dec"), ("b_enc", "b_dec", "log_threshold")
FROZEN = {
    "all": (),
    "threshold": ("encoder", "W_dec", "b_enc", "b_dec"),
    "decoder": ("encoder", "b_enc", "log_threshold"),
}
"""By TrainingRecipe.finetune: what is not trained."""


def trained(params: Params) -> dict[str, Tensor]:
    """The tensors that are trained, by name; log_threshold where there is one."""
    return {name: weight for name in (*ROWS, *VECTORS) if (weight := getattr(params, name)) is not None}


class RowAdam:
    """Adam of one SAE, in place.

    clip     the largest norm of a gradient over all tensors, by the previous step's; 0 is no limit
    frozen   names of tensors that keep the bits they have now or get from a checkpoint (a row of FROZEN). Frozen rows
             cost a copy, have moments and count in the norm; frozen vectors do not
    """

    def __init__(
        self,
        params: Params,
        *,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
        clip: float = 0.0,
        frozen: tuple[str, ...] = (),
    ):
        self.params, self.betas, self.eps, self.clip = params, betas, eps, clip
        self.kept = {name: getattr(params, name).clone() for name in ROWS if name in frozen}
        """What frozen rows are put back to."""
        self.moments: dict[str, Adam] = {}
        for name, weight in trained(params).items():
            if name in VECTORS and name in frozen:
                continue
            m = torch.zeros_like(weight) if betas[0] else None
            lazy = name in ROWS and m is None
            fresh = torch.zeros(len(weight), dtype=torch.int32, device=weight.device) if lazy else None
            self.moments[name] = Adam(m, torch.zeros_like(weight), fresh=fresh)
        self.norm = params.b_dec.new_zeros(())
        """Of the last gradient; 0 before the first."""

    def update_(
        self, work: Work, lr: float | Tensor, *, unit_norm: bool = True, implementation: str | None = None
    ) -> None:
        """One step in place; decoder rows have unit norm afterwards (if asked), the bf16 encoder copy is fresh."""
        params, moments = self.params, self.moments
        rule = Rule(lr, self.betas, self.eps, unit_norm, self._scale())
        for state in moments.values():
            state.step += 1
        transposed = by_feature(work.codes)
        vectors = self._vectors(work, transposed)
        squared = update_rows(
            params.encoder,
            params.W_dec,
            params.encoder_low,
            (moments["encoder"], moments["W_dec"]),
            work,
            transposed,
            rule,
            implementation=implementation,
        )
        for name, grad in vectors.items():
            if name in moments:
                squared = squared + grad.square().sum()
                adam_(getattr(params, name), grad.mul_(rule.scale), moments[name], rule)
        self.norm.copy_(squared.sqrt())
        self._put_back()

    def _put_back(self) -> None:
        """Frozen rows as they were kept; in place, so that a captured step may do it."""
        for name, kept in self.kept.items():
            getattr(self.params, name).copy_(kept)
        if "encoder" in self.kept and self.params.encoder_low is not None:
            self.params.encoder_low.copy_(self.kept["encoder"])

    def _scale(self) -> float | Tensor:
        if not self.clip:
            return 1.0
        scale = (self.clip / self.norm).clamp_max(1.0)  # of norm 0 it is 1
        return scale if scale.is_cuda else float(scale)  # what waits for no device

    def _vectors(self, work: Work, transposed: ByFeature) -> dict[str, Tensor]:
        """Gradients of the vectors, frozen ones too (b_dec's goes through b_enc's): what follows from the codes, and
        what the objective adds."""
        params = self.params
        grads = {name: torch.zeros_like(weight) for name, weight in trained(params).items() if name in VECTORS}
        if work.value_grads.is_cuda:  # index_add_ adds in any order there
            d_b_enc = grads["b_enc"].add_(transposed.sums(work.value_grads))
        else:
            d_b_enc = grads["b_enc"].index_add_(0, work.codes.indices, work.value_grads)
        if work.extra is not None:
            d_b_enc.index_add_(0, work.extra.features, work.extra.b_enc)
        for name, grad in work.vectors.items():
            grads[name] += grad
        grads["b_dec"] += work.error[0].sum(0)
        if work.subtracts_b_dec:
            grads["b_dec"] -= _through(d_b_enc, params.encoder)
        return grads

    def forget_(self, features: Tensor, alive: Tensor) -> None:
        """Some features' rows were replaced: no momentum, and the mean second moment of the living."""
        for name, state in self.moments.items():
            if name == "b_dec":
                continue
            if state.m is not None:
                state.m[features] = 0
            state.v[features] = state.v[alive].mean(0)
            if state.fresh is not None:
                state.fresh[features] = int(state.step)

    def state_dict(self) -> dict[str, Tensor]:
        state = {"adam.step": torch.tensor(int(self.moments["encoder"].step)), "adam.norm": self.norm}
        for name, adam in self.moments.items():
            kept = {"m": adam.m, "v": adam.v, "fresh": adam.fresh}
            state |= {f"adam.{name}.{part}": tensor for part, tensor in kept.items() if tensor is not None}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on from a saved state; the parameters are in place already, and frozen rows are kept as they are now."""
        for name, kept in self.kept.items():
            kept.copy_(getattr(self.params, name))
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
        for adam in self.moments.values():
            adam.step = int(state["adam.step"])


def _through(d_b_enc: Tensor, encoder: Tensor) -> Tensor:
    """d_b_enc @ encoder; on the CPU only over the features that have a gradient, where these are few."""
    if encoder.device.type == "cpu":
        features = d_b_enc.nonzero().squeeze(1)
        if 4 * len(features) < len(encoder):
            return d_b_enc[features] @ encoder[features]
    return d_b_enc @ encoder
