"""Work: what one batch asks of the weights, in a form that an update can consume without a [F, d] gradient.

Made by an objective, consumed by update_rows. Kernels know nothing of losses: they see codes, derivatives and errors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from sae.codes import Codes

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class RowGradients:
    """Dense gradients of some features' rows (ascending), added to the sparse ones: AuxK's, or a dense objective's."""

    features: Int[Tensor, " n"]
    encoder: Float[Tensor, "n d"]
    W_dec: Float[Tensor, "n d"]
    b_enc: Float[Tensor, " n"]


@dataclass(frozen=True)
class EveryRow:
    """Shares of the gradient that every feature has, of rank one, so that nothing dense is needed for them."""

    along_decoder: Float[Tensor, " F"]
    """dW_dec[j] += along_decoder[j] · W_dec[j] (a penalty on decoder norms)."""
    along_inputs: Float[Tensor, " F"]
    """dencoder[j] += along_inputs[j] · inputs_sum (a penalty on every pre-activation)."""
    inputs_sum: Float[Tensor, " d"]


@dataclass(frozen=True)
class Work:
    codes: Codes
    """values: the strengths that were decoded; an entry of value 0 may still carry a value gradient."""
    inputs: Float[Tensor, "B d"]
    """What the encoder saw."""
    error: Float[Tensor, "G B d"]
    """The loss's derivative by what a feature of level g adds to the reconstruction; G = 1 without levels."""
    value_grads: Float[Tensor, " nnz"]
    """The loss's derivative by the pre-activation of each entry."""
    levels: tuple[int, ...]
    """Ends of the levels, ascending, the last one F: feature j belongs to the first level whose end is above j."""
    subtracts_b_dec: bool
    """inputs = x − b_dec, so that b_dec also has a gradient through the encoder."""
    extra: RowGradients | None = None
    every: EveryRow | None = None
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """Gradients of vectors, to be added to what follows from the codes: b_enc [F], log_threshold [F]."""
