"""What objectives share: the trained tensors, the face an objective shows to the loop, how TopK's family starts.

All in normed units (x scaled so that its mean norm is √d), float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sae.codes import Codes
from sae.kernels import Work

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass
class Params:
    """What is trained. encoder_low is the bf16 copy that the encoder's product reads, if any."""

    encoder: Float[Tensor, "F d"]
    W_dec: Float[Tensor, "F d"]
    b_enc: Float[Tensor, " F"]
    b_dec: Float[Tensor, " d"]
    encoder_low: Float[Tensor, "F d"] | None = None
    log_threshold: Float[Tensor, " F"] | None = None
    """Of JumpReLU; θ = exp(log_threshold), float32 always."""
    ema_threshold: Float[Tensor, ""] | None = None
    """Of BatchTopK: running mean of each batch's smallest kept pre-activation, below 0 before the first; state, not
    trained."""
    control: Float[Tensor, " 4"] | None = None
    """State of the controller that holds L0, where there is one (objectives/target.py); float64, on the CPU."""

    @property
    def encoder_read(self) -> Float[Tensor, "F d"]:
        return self.encoder if self.encoder_low is None else self.encoder_low


@dataclass(frozen=True)
class Losses:
    """Tensors of one element, read only when a line is due. mse: sum over d, mean over rows, normed units."""

    mse: Tensor
    fvu: Tensor
    """Of this batch, about its own mean: for the progress line only."""
    aux: Tensor
    sparsity: Tensor | None = None
    """The weighted sparsity penalty, where the objective has one."""
    fired: Tensor | None = None
    """bool [F]: the features that fired, where the work has no codes to tell it (the dense path)."""
    more: dict[str, Tensor] = field(default_factory=dict)
    """What this objective alone has to say, under the key it is logged by."""


class Loss(Protocol):
    def __call__(
        self, params: Params, x: Float[Tensor, "B d"], dead: Bool[Tensor, " F"], share: float
    ) -> tuple[Work, Losses]:
        """One batch of normed activations → work and losses; `share` of the run is done (0 at the first step)."""
        ...


@dataclass(frozen=True)
class Objective:
    """An architecture as the training loop sees it."""

    begin: Callable[[Float[Tensor, "n d"]], Params]
    """Parameters before the first step, from a sample of normed activations."""
    loss: Loss
    encode: Callable[[Params, Float[Tensor, "B d"]], Codes]
    """Codes as inference will select them, with strengths as they are decoded."""
    unit_norm: bool = True
    """Decoder rows keep unit norm."""


def initial(sample: Tensor, *, d_sae: int, seed: int, low: bool) -> Params:
    """Parameters before the first step, from a sample [n, d] of normed activations.

    b_dec is the sample's mean, decoder rows are random unit directions, the encoder is their transpose, b_enc 0.
    Deterministic in the seed.
    """
    W_dec = random_rows(d_sae, sample.shape[1], seed)
    encoder = W_dec.clone()
    return Params(encoder, W_dec, torch.zeros(d_sae), sample.mean(0), encoder.to(torch.bfloat16) if low else None)


def random_rows(n: int, d: int, seed: int) -> Float[Tensor, "n d"]:
    """Random directions of unit norm."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return rows.div_(rows.norm(dim=1, keepdim=True))
