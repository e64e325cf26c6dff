"""Metrics of an SAE's weights alone: how far encoder and decoder agree, and each feature's nearest
neighbour.

Dead features keep their initial cos(enc, dec) near 1 and inflate the mean, so each mean is also given over
features that fired. Two [F, d]·[d, F] products in chunks of 512 rows; [F, F] is never held.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def weight_metrics(sae: Any, alive: Bool[Tensor, " F"]) -> dict[str, Any]:
    """Weight metrics over features, means over all and over those alive in this evaluation; never [F, F]."""
    names = ("encoder_decoder_cosine_sim", "max_decoder_cosine_sim", "max_encoder_cosine_sim")
    averages = {"max_decoder_cosine_sim", "max_encoder_cosine_sim"}
    if not (hasattr(sae, "W_enc") and hasattr(sae, "W_dec")):
        missing: dict[str, Any] = {f"average_{name}": None for name in names}
        return missing | {f"average_{name}_alive": None for name in names}
    encoder = nn.functional.normalize(sae.W_enc.T.float(), dim=1)
    decoder = nn.functional.normalize(sae.W_dec.float(), dim=1)
    found: dict[str, Any] = {}
    if sae.cfg.d_out is None:  # what a transcoder reads and what it writes are vectors of two spaces
        found["encoder_decoder_cosine_sim"] = (encoder * decoder).sum(1).cpu()
    found["max_decoder_cosine_sim"], found["max_encoder_cosine_sim"] = (
        _max_cosine(decoder),
        _max_cosine(encoder),
    )
    for name in names:
        own = found.get(name)
        found[f"average_{name}"] = None if own is None else float(own.mean())
        found[f"average_{name}_alive"] = float(own[alive].mean()) if own is not None and bool(alive.any()) else None
    assert averages <= set(found), "SAEBench's two averages"
    return found


def _max_cosine(unit: Float[Tensor, "F d"], chunk: int = 512) -> Float[Tensor, " F"]:
    """Of each unit row, the largest product with any other row."""
    best = torch.empty(unit.shape[0])
    for start in range(0, unit.shape[0], chunk):
        products = unit[start : start + chunk] @ unit.T
        products[torch.arange(len(products)), start + torch.arange(len(products))] = -1
        best[start : start + chunk] = products.amax(1).cpu()
    return best
