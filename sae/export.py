"""From trained parameters, in normed units, to a finished SAE in the host's own (raw) units; and its threshold.

What is folded, and why activations come out in raw units, stands in formats/folds.py.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.architectures import architecture
from sae.autoencoder import SAE, Metadata, SAEConfig
from sae.evaluation.reconstruction import quick
from sae.formats.folds import raw_units
from sae.objectives import Params
from sae.recipe import SAERecipe
from sae.stats import calibrate_threshold

if TYPE_CHECKING:
    from jaxtyping import Float


def export(params: Params, recipe: SAERecipe, metadata: Metadata) -> SAE:
    """The SAE of trained parameters; a BatchTopK one still passes every positive feature (`calibrate` ends that).

    A feature whose decoder row is zero never fires.
    """
    row = architecture(recipe.architecture)
    scale = metadata.norm_factor
    assert scale is not None, "training notes what it scaled by"
    with torch.no_grad():
        given = {name: getattr(params, name).cpu() for name in ("encoder", "W_dec", "b_enc", "b_dec")}
        threshold = None if params.log_threshold is None else params.log_threshold.exp().cpu()
        tensors = raw_units(given, threshold, scale)
    F, d = params.W_dec.shape
    if row.inference == "jumprelu":
        tensors.setdefault("threshold", torch.zeros(F))
    k = recipe.k if row.selection == "topk" else None
    sae = SAE.of(SAEConfig(row.inference, d, F, k, metadata, row.subtracts_b_dec), tensors)
    return sae.requires_grad_(False)


def calibrate(sae: SAE, rows: Float[Tensor, "N d"], k: int, ema_threshold: float | None, about: str) -> SAE:
    """Set a BatchTopK SAE's one threshold so that k features a row fire on average over `rows` (raw), and note how.

    ema_threshold   training's running threshold in raw units; it is only noted, with the L0 that it would give
    about           what the rows are
    notes           Metadata.calibration: threshold, l0, ema_threshold, ema_l0, k, tokens, rows
    """
    noted: dict[str, float | int | str | None] = {"ema_threshold": ema_threshold, "ema_l0": None}
    if ema_threshold is not None:
        sae.threshold = torch.full((sae.cfg.d_sae,), ema_threshold)
        noted["ema_l0"] = quick(sae, rows)["l0"]
    threshold = calibrate_threshold(sae, [rows], k, max_tokens=len(rows))
    sae.threshold = torch.full((sae.cfg.d_sae,), threshold)
    noted |= {"threshold": threshold, "l0": quick(sae, rows)["l0"], "k": k, "tokens": len(rows), "rows": about}
    metadata = dataclasses.replace(sae.cfg.metadata, calibration=noted)
    sae.cfg = dataclasses.replace(sae.cfg, metadata=metadata)
    return sae
