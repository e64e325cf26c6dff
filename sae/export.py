"""From trained parameters, in normed units, to a finished SAE in the host's own (raw) units; and its threshold.

Training sees s·x (s = Metadata.norm_factor). Its pre-activations W_e(s·x − b_dec) + b_enc, divided by s, are
W_e(x − b_dec/s) + b_enc/s: matrices stay, vectors are divided by s, whether b_dec is subtracted or not; activations
and thresholds come out divided by s too, in raw units. Then decoder norms are folded: with n_i = ‖W_dec[i]‖ the row
becomes a unit vector, and encoder row, bias and threshold of feature i are multiplied by n_i.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.architectures import architecture
from sae.autoencoder import SAE, Metadata, SAEConfig
from sae.evaluation.reconstruction import quick
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
    F, d = params.W_dec.shape
    k = recipe.k if row.selection == "topk" else None
    sae = SAE(SAEConfig(row.inference, d, F, k, metadata, row.subtracts_b_dec))
    scale = metadata.norm_factor
    assert scale is not None, "training notes what it scaled by"
    with torch.no_grad():
        norms = params.W_dec.norm(dim=1).cpu()
        sae.encoder.copy_(params.encoder).mul_(norms[:, None])
        sae.W_dec.copy_(params.W_dec).div_(norms.clamp_min(torch.finfo(norms.dtype).tiny)[:, None])
        sae.b_enc.copy_(params.b_enc).mul_(norms / scale)
        sae.b_dec.copy_(params.b_dec).div_(scale)
        if params.log_threshold is not None:
            sae.threshold = params.log_threshold.exp().cpu() * norms / scale
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
