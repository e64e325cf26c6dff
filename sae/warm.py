"""A warm start: a run begins from the weights of a finished SAE (training.init_from) instead of random ones.

The inverse of export.py. The SAE is in raw units; training sees s·x, s being this run's scale: matrices stay, vectors
are multiplied by s. Where one of the two takes b_dec off the input and the other does not, encoder · b_dec moves into
b_enc, so that the pre-activations stay. Where training keeps decoder rows of unit norm, norms are folded into the
encoder, the bias and the threshold, as export does.
An SAE begins its own kind, and what can be had from its threshold: TopK's calibrated one begins JumpReLU and the
BatchTopKs, a JumpReLU's mean those; the k largest pre-activations can be taken of any.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sae import files
from sae.architectures import ARCHITECTURES, LOADED, Architecture, architecture
from sae.autoencoder import SAE
from sae.errors import UserError
from sae.formats import saelens
from sae.host import Host
from sae.objectives import Params
from sae.recipe import Recipe

NORMS_ALIKE = 1.01  # rows of a unit-norm SAE that was saved in bfloat16 stay below


def open_sae(recipe: Recipe, hook: str, host: Host | None, width: int | None) -> SAE:
    """The SAE of training.init_from. Raises UserError where there is none, or where it cannot begin this run.

    hook    this run's, as its host names it
    width   of the activations there, where it is known before they are read
    """
    assert recipe.training.init_from is not None, "asked only for a warm start"
    where = f"training.init_from: {recipe.training.init_from}"
    sae = SAE.load(recipe.training.init_from)
    metadata = sae.cfg.metadata
    if sae.cfg.d_sae != recipe.sae.d_sae:
        raise UserError(f"{where} has {sae.cfg.d_sae:,} features, sae.d_sae is {recipe.sae.d_sae:,}. Make them one.")
    if width is not None:
        _refuse_other_width(where, sae, width)
    if host is not None and metadata.host_fingerprint and metadata.host_fingerprint != host.fingerprint:
        raise UserError(
            f"{where} was trained on {metadata.model_name} ({metadata.host_fingerprint}), this run's host is "
            f"{host.name} ({host.fingerprint}). Use its own host."
        )
    its = metadata.hook_name
    if host is not None and its:
        with contextlib.suppress(UserError):  # a hook that this host has not is another one too
            its = host.hook(its)
    if its and its != hook:
        raise UserError(f"{where} was trained at {its}, this run reads {hook}. Set host.hook to its own.")
    _refuse_other_kind(where, sae, recipe.sae.architecture)
    return sae


def begin_from(params: Params, sae: SAE, recipe: Recipe, scale: float, unit_norm: bool) -> Params:
    """The SAE's weights as parameters of a run, float32 on the CPU; the bf16 copy is that of the new encoder.

    params      a cold start of the same run: says what it trains, and lends a direction to a decoder row that is zero
                (of a feature that never fires)
    scale       this run's norm factor
    unit_norm   whether training keeps decoder rows of unit norm
    Raises UserError where the activations have another width.
    """
    _refuse_other_width(f"training.init_from: {recipe.training.init_from}", sae, params.W_dec.shape[1])
    row = architecture(recipe.sae.architecture)
    encoder, W_dec, b_enc, b_dec = (
        weight.detach().float().cpu().clone() for weight in (sae.encoder, sae.W_dec, sae.b_enc, sae.b_dec)
    )
    if sae.cfg.apply_b_dec_to_input and not row.subtracts_b_dec:
        b_enc -= encoder @ b_dec
    if row.subtracts_b_dec and not sae.cfg.apply_b_dec_to_input:
        b_enc += encoder @ b_dec
    threshold = None if sae.threshold is None else sae.threshold.cpu() * scale
    if unit_norm:
        norms = W_dec.norm(dim=1)
        encoder, b_enc = encoder * norms[:, None], b_enc * norms
        empty = norms == 0
        W_dec = torch.where(empty[:, None], params.W_dec, W_dec / norms.masked_fill(empty, 1)[:, None])
        threshold = None if threshold is None else threshold * norms.masked_fill(empty, 1)
    begun = replace(params, encoder=encoder, W_dec=W_dec, b_enc=b_enc * scale, b_dec=b_dec * scale)
    if params.encoder_low is not None:
        begun.encoder_low = encoder.to(params.encoder_low.dtype)
    if threshold is not None and params.log_threshold is not None:
        begun.log_threshold = threshold.log()
    if threshold is not None and params.ema_threshold is not None:
        begun.ema_threshold = threshold.mean()
    return begun


def noted(recipe: Recipe, known: dict[str, Any], start: int) -> dict[str, str]:
    """For resolved.json: which weights the run began from. known: what it noted when it began, if `start` is past 0."""
    folder = recipe.training.init_from
    if folder is None:
        return {}
    return {"init_from_sha256": known["init_from_sha256"] if start else files.checksum(Path(folder) / saelens.WEIGHTS)}


def _refuse_other_width(where: str, sae: SAE, width: int) -> None:
    if sae.cfg.d_in != width:
        raise UserError(
            f"{where} was trained on width {sae.cfg.d_in:,}, this run's activations have {width:,}. "
            "Give an SAE of its width."
        )


def _begins(finished: str, row: Architecture) -> bool:
    """Whether a finished SAE of this kind has what training under this row begins with."""
    return row.selection == "topk" or finished == row.inference or (finished, row.inference) == ("topk", "jumprelu")


def _refuse_other_kind(where: str, sae: SAE, name: str) -> None:
    """Refuse what would not begin as the SAE ends; `name` is the architecture to train."""
    row, its = architecture(name), sae.cfg.architecture
    kind = sae.cfg.normalize_activations
    unlike = "a transcoder" if sae.cfg.d_out is not None else f"{its}, only loaded here" if its in LOADED else ""
    unlike = f"normed by token ({kind})" if kind != "none" else unlike
    if unlike:
        raise UserError(f"{where} is {unlike}, which no training here goes on with. Choose another SAE, or none.")
    if row.selection == "topk":
        norms = sae.W_dec.norm(dim=1)
        if its == "topk" and norms.max() > NORMS_ALIKE * norms.min():
            raise UserError(
                f"{where} has decoder rows of norm {float(norms.min()):.3g} to {float(norms.max()):.3g}: with norm 1, "
                "as topk trains them, it would choose other features. Begin batchtopk or jumprelu from it."
            )
        return
    if not _begins(its, row):
        can = ", ".join(known for known in ARCHITECTURES if _begins(its, ARCHITECTURES[known]))
        raise UserError(
            f"{where} is {its}, from which {name} cannot begin ({can} can). Choose another sae.architecture or SAE."
        )
    if name != "jumprelu":
        return
    if sae.threshold is None:
        raise UserError(f"{where} has no calibrated threshold for jumprelu to begin with. Begin batchtopk from it.")
    wrong = (~((sae.threshold > 0) & sae.threshold.isfinite())).nonzero().flatten().tolist()
    if wrong:
        told = ", ".join(map(str, wrong[:5])) + (", …" if len(wrong) > 5 else "")
        raise UserError(
            f"{where}: the thresholds of {len(wrong):,} features are not above 0 ({told}), and jumprelu trains their "
            "logarithms. Begin batchtopk or topk from it."
        )
