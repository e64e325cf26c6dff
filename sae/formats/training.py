"""Our own training checkpoint, RUN/checkpoints/step-N: the SAE as it was at that step. Read only.

What is told beside the weights stands in RUN/resolved.json. The running average of the weights is taken where there is
one, as at the end of a run; a BatchTopK's threshold is training's running one (the end of a run sets it anew).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import files
from sae.architectures import architecture
from sae.errors import UserError
from sae.formats import checks, folds
from sae.formats.facts import Facts

STATE, WEIGHTS, RESOLVED = "training.json", "training.safetensors", "resolved.json"


def recognises(folder: Path) -> bool:
    return (folder / STATE).is_file() and (folder / WEIGHTS).is_file()


def read(folder: Path, *, where: str = "", trust_pickle: bool = False) -> tuple[Facts, dict[str, Tensor]]:
    """(facts, tensors) of the step. Raises UserError where the run's resolved.json is gone, or the state is damaged."""
    run = folder.resolve().parent.parent
    if not (run / RESOLVED).is_file():
        raise UserError(
            f"{folder}: is a training checkpoint without its run ({run / RESOLVED} is missing). Put it back."
        )
    recipe = files.read_json_object(run / RESOLVED, ("recipe",))["recipe"]
    try:
        name, hook, _ = recipe["sae"]["architecture"], recipe["host"]["hook"], recipe["sae"]["k"]
        about = {"model_name": recipe["host"]["name"], "dataset": str(recipe["text"]["source"])}
    except (KeyError, TypeError) as error:
        raise UserError(f"{run / RESOLVED}: its recipe has no {error}. Copy the run again.") from error
    row, path = architecture(name), folder / WEIGHTS
    state = files.read_json_object(folder / STATE, ("norm_factor",))
    scale = checks.number(folder / STATE, state, "norm_factor", positive=True)
    raw = checks.safetensors(path)
    raw |= {key.removeprefix("ema."): mean for key, mean in raw.items() if key.startswith("ema.")}
    encoder = raw.get("encoder")
    if encoder is None or encoder.ndim != 2:
        raise UserError(f"{path}: encoder is missing or no matrix. {checks.AGAIN}")
    F, d = encoder.shape
    shapes: dict[str, tuple[int, ...]] = {"encoder": (F, d), "W_dec": (F, d), "b_enc": (F,), "b_dec": (d,)}
    if name == "jumprelu":
        shapes["log_threshold"] = (F,)
    params = checks.sound(path, checks.taken(path, raw, shapes, "the encoder says"))
    if "ema.W_dec" in raw and _keeps_unit_norm(recipe["sae"]):  # a mean of unit vectors is a little short
        params["W_dec"] = torch.nn.functional.normalize(params["W_dec"], dim=1)
    threshold = params["log_threshold"].exp() if name == "jumprelu" else None
    if row.inference == "jumprelu" and threshold is None:
        running = checks.taken(path, raw, {"ema_threshold": ()}, "expected")["ema_threshold"]
        threshold = running.clamp_min(0).expand(F)
    facts = Facts(
        row.inference,
        d,
        F,
        k=checks.count(run / RESOLVED, recipe["sae"], "k", most=F) if row.inference == "topk" else None,
        apply_b_dec_to_input=row.subtracts_b_dec,
        metadata={**about, "hook_name": hook, "norm_factor": scale, "training_architecture": name,
                  "context_size": recipe["text"].get("context") or 0, "recipe": recipe},
    )  # fmt: skip
    return facts, folds.raw_units(params, threshold, scale)


def _keeps_unit_norm(recipe: dict[str, Any]) -> bool:
    """Whether the objective holds decoder rows at length 1 (objectives/, Objective.unit_norm)."""
    tanh = recipe.get("jumprelu_sparsity_loss_mode") == "tanh"
    return recipe["architecture"] != "relu" and not (recipe["architecture"] == "jumprelu" and tanh)
