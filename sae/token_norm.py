"""Normalisation of each token by itself, which no weights can take up: what the encoder sees, and the way back.

layer_norm             (x − mean) / (std + 1e-5), back: y·std + mean   (OpenAI's TopK SAEs, SAELens)
constant_norm_rescale  x·√d / ‖x‖, back: y·‖x‖ / √d                    (SAELens; OpenMOSS calls it token-wise)

An activation of such an SAE is in units of its token, and what it adds to the residual stream depends on that token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

KINDS = ("layer_norm", "constant_norm_rescale")
_EPS = 1e-5


def normed(kind: str, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    if kind == "layer_norm":
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / (centred.std(dim=-1, keepdim=True) + _EPS)
    assert kind == "constant_norm_rescale", kind
    return x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True))


def scale(kind: str, x: Float[Tensor, "... d"]) -> Float[Tensor, "... 1"]:
    """How long 1 in units of a token is in x's own."""
    if kind == "layer_norm":
        return x.std(dim=-1, keepdim=True)
    assert kind == "constant_norm_rescale", kind
    return x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5


def restored(kind: str, y: Float[Tensor, "... d"], x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """y, a reconstruction of `normed(kind, x)`, as one of x."""
    back = y * scale(kind, x)
    return back + x.mean(dim=-1, keepdim=True) if kind == "layer_norm" else back
