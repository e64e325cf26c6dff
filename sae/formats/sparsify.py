"""sparsify (EleutherAI): a folder with cfg.json and sae.safetensors, `<run>/<hook point>/` or `…/<hook point>/seedN/`.

Tensors: encoder.weight [d_sae, d], encoder.bias, W_dec [d_sae, d], b_dec, and W_skip [d, d] (ŷ += x·W_skipᵀ, x as it
is). The largest k of relu(pre), or with groupmax the largest of each of k groups of neighbours. x is never normalised.

- num_latents 0 means d_in·expansion_factor
- b_dec is taken off the input unless `transcode`. An SAE with a skip connection that is no transcoder is read as one
  from x to x, b_dec folded: no layout but this says it otherwise
- `multi_topk` concerns training; its forward() then gives a reconstruction by 4k features, encode and decode one by k,
  as here
- `signed` of its first releases (2024): the k largest by magnitude, signs kept; that is AbsTopK. Today's package drops
  the flag and loads such a folder as TopK
- hook points are modules of transformers, told from the folder's name; model and data stand in the run's config.json,
  one level above. We write them into cfg.json too, as `metadata`, which sparsify leaves unread
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae import files
from sae.errors import UserError
from sae.formats import checks, folds, hooks
from sae.formats.facts import Facts

CONFIG, WEIGHTS, RUN = "cfg.json", "sae.safetensors", "config.json"
_KEPT = ("model_name", "hook_name", "hook_name_out", "context_size", "dataset", "units", "norm_factor")


def recognises(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path, *, where: str = "", trust_pickle: bool = False) -> tuple[Facts, dict[str, Tensor]]:
    """(facts, tensors). Raises UserError for a damaged or contradictory folder, and for what is not read."""
    at = path / CONFIG
    config = files.read_json_object(at, ("d_in", "k"))
    d = checks.count(at, config, "d_in")
    width = checks.count(at, {"num_latents": 0, **config}, "num_latents", least=0)
    F = width or d * checks.count(at, config, "expansion_factor")
    k = checks.count(at, config, "k", most=F)
    rule = config.get("activation", "topk")
    if rule not in ("topk", "groupmax"):
        raise UserError(f"{at}: activation {rule!r} is not read (read are: topk, groupmax). Choose another SAE.")
    if checks.flag(at, config, "signed", False):
        rule = "abstopk"
    if rule == "groupmax" and F % k:
        raise UserError(f"{at}: k is {k}, of which its {F:,} features are no multiple. {checks.AGAIN}")
    transcodes, skips = (checks.flag(at, config, key, False) for key in ("transcode", "skip_connection"))
    shapes = {"encoder.weight": (F, d), "encoder.bias": (F,), "W_dec": (F, d), "b_dec": (d,)}
    shapes |= {"W_skip": (d, d)} if skips else {}
    raw = checks.safetensors(path / WEIGHTS)
    checks.nothing_else(path / WEIGHTS, raw, shapes)
    tensors = checks.sound(path / WEIGHTS, checks.taken(path / WEIGHTS, raw, shapes, f"{CONFIG} says"))
    tensors |= {"W_enc": tensors.pop("encoder.weight").T, "b_enc": tensors.pop("encoder.bias")}
    facts = Facts(rule, d, F, k=k, apply_b_dec_to_input=not transcodes)
    facts = dataclasses.replace(facts, metadata=_metadata(path, config, where, rule, transcodes, skips))
    if transcodes or skips:
        tensors = folds.centred(facts, tensors, False)
        facts = dataclasses.replace(facts, apply_b_dec_to_input=False, d_out=d)
    return facts, tensors


def _metadata(
    path: Path, config: Mapping[str, Any], where: str, rule: str, transcodes: bool, skips: bool
) -> dict[str, Any]:
    path, named = path.resolve(), Path(where or path.resolve())
    if re.fullmatch(r"seed\d+", named.name):
        path, named = path.parent, named.parent
    takes, returns = hooks.of_module(named.name)
    about = {"hook_name": takes if transcodes else returns, "hook_name_out": returns if transcodes or skips else ""}
    run = files.read_json(path.parent / RUN) if (path.parent / RUN).is_file() else {}
    if isinstance(run, dict):
        about |= {"model_name": checks.text(run, "model"), "dataset": checks.text(run, "dataset")}
        about |= {"context_size": run.get("ctx_len")}
    ours = config.get("metadata")
    ours = ours if isinstance(ours, dict) else {}
    kept = {key: ours[key] for key in _KEPT if key in ours and (ours[key] or key == "norm_factor")}
    return {"training_architecture": rule, "norm_factor": 1.0, **about, **kept}


def write(folder: Path, facts: Facts, tensors: Mapping[str, Tensor]) -> None:
    """Write both files into an existing folder, in float32. A calibrated threshold cannot be said, and is left out.

    Raises UserError for what sparsify has no words for.
    """
    if "sparsify" not in facts.said_by():
        raise facts.refusal("sparsify")
    transcodes = facts.d_out is not None
    tensors = folds.centred(facts, tensors, not transcodes)
    names = {"b_enc": "encoder.bias", **{name: name for name in ("W_dec", "b_dec", "W_skip")}}
    theirs = {names[name]: tensor for name, tensor in tensors.items() if name in names}
    files.write_safetensors(folder / WEIGHTS, {"encoder.weight": tensors["W_enc"].T, **theirs})
    config = {
        "activation": facts.architecture,
        "expansion_factor": max(1, facts.d_sae // facts.d_in),
        "normalize_decoder": folds.has_unit_rows(tensors["W_dec"]),
        "num_latents": facts.d_sae,
        "k": facts.k,
        "multi_topk": False,
        "skip_connection": "W_skip" in tensors,
        "transcode": transcodes,
        "d_in": facts.d_in,
        "metadata": {key: facts.metadata[key] for key in _KEPT if key in facts.metadata},
    }
    files.write_json(folder / CONFIG, config)
