"""OpenMOSS: folders of its package (llamascopium, earlier lm-saes), and the published Llama Scope and its R1 SAEs.

    config.json       or hyperparams.json, which Llama Scope has
    sae_weights.*     or checkpoints/pruned.*, checkpoints/final.*; safetensors, or a pickle {"sae": …, "version": …}

W_E [d, F], b_E, W_D [F, d], b_D; before 2.0 as torch's Linear has them: encoder.weight [F, d], decoder.weight [d, F].
Training saw x·f with f = √d / mean‖x‖ of the hook, and wrote y·f_out of the hook it is compared with. Here, from x and
in raw units:

    W_enc = W_E    b_enc = b_E / f    W_dec = W_D · f/f_out    b_dec = b_D / f_out    activations = theirs / f

- norm_activation: dataset-wise is the above; inference has it folded already; token-wise is f of each token, which no
  weights can take up (token_norm.py); batch-wise depends on the batch and is not read
- sparsity_include_decoder_norm: what is compared with the threshold, or ranked, is pre·‖W_D‖. A threshold is divided
  by that. A topk SAE gets decoder rows of length 1: activations are then times ‖W_dec‖, in raw units as well
- jumprelu's threshold is exp(log_jumprelu_threshold), of what training saw, so over f here. OpenMOSS's own fold
  (fold_activation_scale) leaves it as it is, and other features fire; a file that it folded so is read as it reads it
- Llama Scope's jump_relu_threshold, one for all, is of the length of what is added to the raw output. (In published
  ones it is about 2/f_out, in residual SAEs and transcoders alike.) Of rows of length 1 in an SAE that is the raw
  activation, as SAELens takes it, which has no second factor for transcoders
- batchtopk ranks within the batch also when it is only used, and is not read
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import files
from sae.errors import UserError
from sae.formats import checks, folds
from sae.formats.facts import Facts

CONFIG, OLD_CONFIG, HOST = "config.json", "hyperparams.json", "lm_config.json"
_WEIGHTS = [
    f"{stem}.{kind}"
    for stem in ("sae_weights", "checkpoints/pruned", "checkpoints/final")
    for kind in ("safetensors", "pt", "dcp")
]
"""In the order in which OpenMOSS looks for them."""
_LINEAR = {"encoder.weight": "W_E", "encoder.bias": "b_E", "decoder.weight": "W_D", "decoder.bias": "b_D"}
_LOG_THRESHOLDS = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")
_NORMS = "dataset_average_activation_norm"
_PUBLISHED = {
    "Llama3_1-8B-Base": "meta-llama/Llama-3.1-8B",
    "Llama-Scope-R1-Distill": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
}
"""Hosts, by what is in a published folder's name; those were trained on rows of 1,024 that begin with BOS."""
_OTHERS = "Use OpenMOSS's own package for it, or choose another SAE."


def recognises(path: Path) -> bool:
    return _parts(path) is not None


def _parts(path: Path) -> tuple[Path, Path] | None:
    """(config, weights) of a folder, or of a weights file in one."""
    for folder in (path, path.parent, path.parent.parent):
        config = next((folder / name for name in (CONFIG, OLD_CONFIG) if (folder / name).is_file()), None)
        if config is None or (folder / "cfg.json").exists():  # SAELens's
            continue
        known = [folder / name for name in _WEIGHTS if (folder / name).exists()]
        if known and path in (folder, *known):
            return config, known[0] if path == folder else path
    return None


def read(path: Path, *, where: str = "", trust_pickle: bool = False) -> tuple[Facts, dict[str, Tensor]]:
    """(facts, tensors). Raises UserError for a missing, damaged or contradictory folder, and for what is not read.

    where   repository and folder, of which a published one's names say its host
    """
    parts = _parts(path)
    assert parts is not None, "recognised before it is read"
    about, weights = parts
    config = files.read_json_object(about, ("d_model", "hook_point_in"))
    rule = _rule(about, config)
    given = _tensors(weights, trust_pickle)
    reads, writes = checks.text(config, "hook_point_in"), checks.text(config, "hook_point_out")
    writes = writes or reads
    kind = config.get("norm_activation", "dataset-wise")
    if kind not in ("dataset-wise", "token-wise", "inference"):
        raise UserError(f"{about}: norm_activation is {kind!r}, which is not read. {_OTHERS}")
    if kind == "token-wise" and reads != writes:
        raise UserError(f"{about}: norms what it writes by what should have been written, which nobody has. {_OTHERS}")
    tensors = _unify(weights, about, config, rule, given)
    d, F = tensors["W_enc"].shape
    f_in, f_out = 1.0, 1.0
    if kind == "dataset-wise":
        f_in, f_out = (d**0.5 / _norm(about, config, given, *hook) for hook in (("in", reads), ("out", writes)))
    gates = checks.flag(about, config, "sparsity_include_decoder_norm", about.name == CONFIG)
    _fold(tensors, rule, f_in, f_out, gates, old=about.name == OLD_CONFIG)
    tensors = checks.sound(weights, tensors)
    return Facts(
        rule,
        d,
        F,
        k=checks.count(about, config, "top_k", most=F) if rule == "topk" else None,
        d_out=d if writes != reads else None,
        normalize_activations="constant_norm_rescale" if kind == "token-wise" else "none",
        metadata={
            **_published(about, where),
            "hook_name": reads,
            "hook_name_out": writes if writes != reads else "",
            "units": "token" if kind == "token-wise" else "raw",
            "norm_factor": f_in if kind == "dataset-wise" else None,
        },
    ), tensors


def _rule(path: Path, config: Mapping[str, Any]) -> str:
    """The selection rule. Raises UserError for what is no SAE of this page."""
    if (kind := config.get("sae_type", "sae")) != "sae":
        raise UserError(f"{path}: sae_type is {kind!r}, of which only 'sae' is read. {_OTHERS}")
    if checks.flag(path, config, "use_glu_encoder", False):
        raise UserError(f"{path}: its encoder is gated (use_glu_encoder), which is not read. {_OTHERS}")
    rule = config.get("act_fn", "jumprelu")
    rule = rule.lower() if isinstance(rule, str) else rule
    if rule == "batchtopk":
        raise UserError(
            f"{path}: act_fn is batchtopk, which ranks the features of a whole batch: no token's are its own. {_OTHERS}"
        )
    if rule not in ("relu", "topk", "jumprelu"):
        raise UserError(f"{path}: act_fn is {rule!r}, which is not read (read are relu, topk, jumprelu). {_OTHERS}")
    return rule


def _tensors(path: Path, trust_pickle: bool) -> dict[str, Tensor]:
    if path.suffix == ".dcp":
        raise UserError(
            f"{path}: is a checkpoint in shards, which is not read. Load the folder with OpenMOSS's own package "
            f"(SparseDictionary.from_pretrained) and write it with save_checkpoint('{path.stem}.safetensors')."
        )
    if path.suffix == ".safetensors":
        return checks.safetensors(path)
    held = checks.pickled(path, trust_pickle=trust_pickle)
    return checks.named(path, held.get("sae") if isinstance(held, Mapping) else held)


def _norm(path: Path, config: Mapping[str, Any], given: Mapping[str, Tensor], way: str, hook: str) -> float:
    """mean‖x‖ of a hook, which is among the weights or, in Llama Scope, in the config as "in" or "out"."""
    noted = config.get(_NORMS)
    noted = noted if isinstance(noted, Mapping) else {}
    norm = given.get(f"{_NORMS}.{hook}", noted.get(way, noted.get(hook)))
    if isinstance(norm, Tensor) and norm.numel() == 1 and not norm.is_complex():
        norm = norm.item()
    # where no norm was ever set, OpenMOSS saves whatever was in memory
    if isinstance(norm, bool) or not isinstance(norm, int | float) or not 1e-30 < norm < 1e30:
        shown = " ".join(f"{norm}".split())[:40]
        raise UserError(
            f"{path}: was trained on scaled activations, and their mean norm at {hook!r} is {shown}. Write it in here: "
            f'"{_NORMS}": {{"{hook}": 12.3}}.'
        )
    return float(norm)


def _unify(
    path: Path, about: Path, config: Mapping[str, Any], rule: str, given: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors by our names, each of its shape; a threshold, whole, of what training saw."""
    linear = "encoder.weight" in given
    if linear:
        given = {_LINEAR.get(name, name): tensor.T if tensor.ndim == 2 else tensor for name, tensor in given.items()}
    d, F = checks.count(about, config, "d_model"), given["b_E"].numel() if "b_E" in given else 0
    shapes: dict[str, tuple[int, ...]] = {"W_E": (d, F), "W_D": (F, d), "b_E": (F,)}
    if checks.flag(about, config, "use_decoder_bias", True):
        shapes["b_D"] = (d,)
    logs = next((name for name in _LOG_THRESHOLDS if name in given), _LOG_THRESHOLDS[linear])
    if rule == "jumprelu" and about.name == CONFIG:
        shapes[logs] = (F,)
    found = checks.taken(path, given, shapes, f"{about.name} and b_E say")
    tensors = {"W_enc": found["W_E"], "W_dec": found["W_D"], "b_enc": found["b_E"]}
    tensors["b_dec"] = found.get("b_D", torch.zeros(d))
    if checks.flag(about, config, "apply_decoder_bias_to_pre_encoder", False):
        tensors["b_enc"] = tensors["b_enc"] - tensors["b_dec"] @ tensors["W_enc"]
    if logs in found:
        tensors["threshold"] = found[logs].exp()
    elif rule == "jumprelu":
        tensors["threshold"] = torch.full((F,), checks.number(about, config, "jump_relu_threshold"))
    return tensors


def _fold(tensors: dict[str, Tensor], rule: str, f_in: float, f_out: float, gates: bool, *, old: bool) -> None:
    """From x·f_in and y·f_out to x and y, with activations in raw units; norms that gate are taken up. In place.

    old   the threshold is of what is added to y, not of what training saw
    """
    if "threshold" in tensors:
        norms = tensors["W_dec"].norm(dim=1).clamp_min(1e-30) if gates else 1
        tensors["threshold"] = tensors["threshold"] * (f_out if old else 1) / f_in / norms
    tensors["b_enc"] = tensors["b_enc"] / f_in
    tensors["b_dec"] = tensors["b_dec"] / f_out
    if f_in != f_out:
        tensors["W_dec"] = tensors["W_dec"] * (f_in / f_out)
    if gates and rule == "topk":
        tensors.update(folds.unit_rows(tensors))


def _published(about: Path, where: str) -> dict[str, Any]:
    """The host, from the file that uploads have beside the weights, or from the name of what OpenMOSS published."""
    beside = about.with_name(HOST)
    host = checks.text(files.read_json_object(beside), "model_name") if beside.is_file() else ""
    for name, model in _PUBLISHED.items():
        if name in where:
            data = {"context_size": 1024, "foreign": {"prepend_bos": True}}
            return {"model_name": host or model, **data}
    return {"model_name": host}
