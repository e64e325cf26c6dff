"""SAELens: a folder with cfg.json and sae_weights.safetensors. It is also our own layout.

What we write loads in SAELens unchanged and gives the same codes: decoder rows have unit norm, nothing is left to
fold, feature activations are in raw units of the host. Read is all that it saves but `temporal` (which needs a whole
sequence, and which it cannot train): finished SAEs and transcoders, folders of before 6.0 (flat keys), and training
checkpoints with their sidecars, which its own load_from_disk leaves unread.

- trained on x·s (expected_average_only_in; activation_scaler.json has s): W_enc·s, W_dec/s, b_dec/s, as it folds at its
  end; activations stay in units of x·s
- trained on (x − mean)·M (covariance_whitening; activation_whitening.safetensors): folded as there
- ranked by pre·‖W_dec‖ (rescale_acts_by_decoder_norm): norms folded; activations are as there, times ‖W_dec‖
- batchtopk checkpoints: the scalar topk_threshold stands for all features, as in its finished form
- gated: a JumpReLU (folds.py)
- transcoders that choose by topk, abstopk or groupmax are our own names, after its pattern; it does not read them
- matching_pursuit adds b_dec only where it was taken off
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import files, token_norm
from sae.errors import UserError
from sae.formats import checks, folds
from sae.formats.facts import Facts
from sae.selections import Pursuit

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SCALER, WHITENING, RUNNER = "activation_scaler.json", "activation_whitening.safetensors", "runner_cfg.json"
LAYOUT = "6.0.0"
"""Written as `sae_lens_version`: SAELens takes a folder without one for an older layout and drops its metadata."""
THEIR_NAMES = {"relu": "standard", "matryoshka": "matryoshka_batchtopk"}
OUR_NAMES = {theirs: ours for ours, theirs in THEIR_NAMES.items()}
_RANKS = ("topk", "abstopk", "groupmax")
_RULES = {
    "standard": "relu", "relu": "relu", "topk": "topk", "abstopk": "abstopk", "jumprelu": "jumprelu",
    "gated": "jumprelu", "batchtopk": "jumprelu", "matryoshka_batchtopk": "jumprelu", "groupmax": "groupmax",
    "matching_pursuit": "matching_pursuit", "transcoder": "relu", "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu", "jumprelu_skip_transcoder": "jumprelu",
}  # fmt: skip
_RULES |= {f"{rule}_{kind}": rule for rule in _RANKS for kind in ("transcoder", "skip_transcoder")}
_KEPT = ("model_name", "hook_name", "hook_name_out", "context_size", "matryoshka_widths")


def recognises(folder: Path) -> bool:
    # OpenMOSS has weights of this name too, beside a config.json
    return (folder / CONFIG).is_file() and not (folder / "sae.safetensors").exists()


def write(folder: Path, facts: Facts, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Write both files into an existing folder. Matrices in `dtype`, the rest in float32 (it is small and matters)."""
    about = facts.metadata
    trained = about.get("training_architecture") or facts.architecture
    kept = {key: about[key] for key in ("model_name", "hook_name", "hook_name_out", "context_size") if about.get(key)}
    metadata = dict(about.get("foreign") or {}) | kept
    metadata |= {"sae_lens_version": LAYOUT, "training_architecture": THEIR_NAMES.get(trained, trained)}
    metadata |= {"dataset_path": about.get("dataset", ""), "goldengate_version": about.get("goldengate_version", "")}
    metadata.setdefault("prepend_bos", False)
    config: dict[str, Any] = {
        "architecture": _their_name(facts, "W_skip" in tensors),
        "d_in": facts.d_in,
        "d_sae": facts.d_sae,
        "dtype": "float32",  # what the weights become in memory: SAELens casts all tensors to it
        "device": "cpu",
        "apply_b_dec_to_input": facts.apply_b_dec_to_input,
        "normalize_activations": facts.normalize_activations,
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if facts.k is not None:
        config |= {"k": facts.k, "rescale_acts_by_decoder_norm": False}
    if facts.d_out is not None:
        config["d_out"] = facts.d_out
    if facts.pursuit is not None:
        config |= dataclasses.asdict(facts.pursuit)
        tensors = {name: tensors[name] for name in ("W_dec", "b_dec")}
    tensors = {name: tensor.to(dtype if name.startswith("W_") else torch.float32) for name, tensor in tensors.items()}
    files.write_safetensors(folder / WEIGHTS, tensors)
    files.write_json(folder / CONFIG, config)


def _their_name(facts: Facts, skips: bool) -> str:
    if facts.d_out is None:
        return THEIR_NAMES.get(facts.architecture, facts.architecture)
    rule = "" if facts.architecture == "relu" else f"{facts.architecture}_"
    return f"{rule}{'skip_' if skips else ''}transcoder"


def read(
    folder: Path, *, where: str = "", trust_pickle: bool = False, overrides: Mapping[str, Any] | None = None
) -> tuple[Facts, dict[str, Tensor]]:
    """(facts, tensors). Raises UserError for a missing, damaged or contradictory folder, and what is not read.

    overrides   keys that stand in place of cfg.json's, as SAELens's list of releases has them; norm_scaling_factor is
                that of a folder without its sidecar
    """
    path = folder / CONFIG
    config = _modern(files.read_json_object(path, ("d_in", "d_sae")) | dict(overrides or {}))
    given = config.get("architecture")
    rule = _RULES.get(given) if isinstance(given, str) else None
    if rule is None or not isinstance(given, str):
        known = ", ".join(_RULES)
        raise UserError(f"{path}: architecture {given!r} is not read (read are: {known}). Choose another SAE.")
    # hook_z: heads side by side, as our host has them
    if (config.get("reshape_activations") or "none") not in ("none", "hook_z"):
        raise UserError(f"{path}: reshape_activations is {config['reshape_activations']!r}, which is not read.")
    d, F = (checks.count(path, config, key) for key in ("d_in", "d_sae"))
    transcoder = given.endswith("transcoder")
    d_out = checks.count(path, config, "d_out") if transcoder else None
    facts = Facts(
        rule,
        d,
        F,
        k=checks.count(path, config, "k", most=F) if rule in _RANKS else None,
        apply_b_dec_to_input=not transcoder and checks.flag(path, config, "apply_b_dec_to_input", True),
        d_out=d_out,
        pursuit=_pursuit(path, config) if rule == "matching_pursuit" else None,
        metadata=_metadata(path, config, given),
    )
    if facts.k is not None and rule == "groupmax" and F % facts.k:
        raise UserError(f"{path}: k is {facts.k}, of which d_sae {F:,} is no multiple. {checks.AGAIN}")
    raw = checks.safetensors(folder / WEIGHTS)
    tensors = _unify(folder, raw, facts, given)
    if facts.pursuit is not None and not facts.apply_b_dec_to_input:
        tensors["b_dec"] = torch.zeros(d)
    facts = _fold(folder, config, facts, tensors)
    return facts, tensors


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """A config of before 6.0 in today's words: flat metadata, `activation_fn_str`, a boolean normalisation.

    There "standard" may be a TopK SAE (SAELens issue 553: such ones were loaded as ReLU, and reconstructed badly).
    """
    if "metadata" in config and "architecture" in config:
        return config
    new = {"architecture": "standard", **config, "metadata": config.get("metadata") or config}
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    kwargs = config.get("activation_fn_kwargs")
    if activation == "topk" or new["architecture"] == "topk":
        k = kwargs.get("k") if isinstance(kwargs, dict) else None
        new |= {"architecture": "topk", "k": config.get("k", k)}
    elif activation != "relu":
        new["architecture"] = f"{new['architecture']} with {activation}"
    normalisation = config.get("normalize_activations") or "none"
    return new | {"normalize_activations": "expected_average_only_in" if normalisation is True else normalisation}


def _metadata(path: Path, config: Mapping[str, Any], given: str) -> dict[str, Any]:
    metadata = config.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: metadata is not an object. {checks.AGAIN}")
    trained = str(metadata.get("training_architecture") or given)
    hook = checks.text(metadata, "hook_name") or checks.text(metadata, "hook_point")
    return {
        **{key: metadata[key] for key in _KEPT if metadata.get(key)},
        "hook_name": hook,
        "dataset": checks.text(metadata, "dataset_path"),
        "training_architecture": OUR_NAMES.get(trained, trained),
        "foreign": {key: value for key, value in metadata.items() if key in FOREIGN},
    }


FOREIGN = (
    "prepend_bos", "neuronpedia_id", "exclude_special_tokens", "seqpos_slice", "sequence_separator_token",
    "disable_concat_sequences", "hf_hook_name", "model_class_name", "model_from_pretrained_kwargs", "hook_head_index",
)  # fmt: skip
"""What a user of the SAE may want to know of how its activations were taken; kept, and written again."""


def _pursuit(path: Path, config: Mapping[str, Any]) -> Pursuit:
    limit = checks.number(path, {"residual_threshold": 1e-2, **config}, "residual_threshold")
    if limit < 0:
        raise UserError(f"{path}: residual_threshold is {limit!r}, expected a number of at least 0. {checks.AGAIN}")
    most = None if config.get("max_iterations") is None else checks.count(path, config, "max_iterations")
    return Pursuit(limit, most, checks.flag(path, config, "stop_on_duplicate_support", True))


def _unify(folder: Path, raw: dict[str, Tensor], facts: Facts, given: str) -> dict[str, Tensor]:
    """The tensors by our names, each of its shape; a scalar or logarithmic threshold and gates undone."""
    path, said = folder / WEIGHTS, f"{CONFIG} says"
    d, F, out = facts.d_in, facts.d_sae, facts.d_out or facts.d_in
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, F), "W_dec": (F, out), "b_dec": (out,)}
    if facts.pursuit is not None:
        del shapes["W_enc"]
        tensors = checks.sound(path, checks.taken(path, raw, shapes, said))
        return {"W_enc": tensors["W_dec"].T, "b_enc": torch.zeros(F), **tensors}
    shapes |= {"b_gate": (F,), "b_mag": (F,), "r_mag": (F,)} if given == "gated" else {"b_enc": (F,)}
    if given.endswith("skip_transcoder"):
        shapes["W_skip"] = (out, d)
    if "log_threshold" in raw and "threshold" not in raw:
        raw["threshold"] = raw["log_threshold"].exp()
    if "topk_threshold" in raw and "threshold" not in raw:
        raw["threshold"] = checks.taken(path, raw, {"topk_threshold": ()}, said)["topk_threshold"].expand(F)
    if facts.architecture == "jumprelu" and given != "gated":
        shapes["threshold"] = (F,)
    tensors = checks.sound(path, checks.taken(path, raw, shapes, said))
    scaling = raw.get("scaling_factor")
    if scaling is not None and not torch.allclose(scaling.float(), torch.ones(())):
        raise UserError(f"{path}: has a finetuning_scaling_factor, which is not read. Choose another SAE.")
    if given == "gated":
        tensors = folds.ungated(tensors)
    return tensors


def _fold(folder: Path, config: Mapping[str, Any], facts: Facts, tensors: dict[str, Tensor]) -> Facts:
    """Take what is left to normalise into the tensors, in place; returns the facts of what came of it."""
    kind, path = config.get("normalize_activations") or "none", folder / CONFIG
    rescales = config["architecture"] in _RANKED and checks.flag(path, config, "rescale_acts_by_decoder_norm", False)
    about: dict[str, Any] = {}
    if kind in token_norm.KINDS:
        about = {"units": "token"}
        facts = dataclasses.replace(facts, normalize_activations=kind)
    elif kind == "expected_average_only_in":
        scale = _scale(folder, config)
        about = {"units": "raw" if rescales or facts.pursuit else "normalised", "norm_factor": scale}
        facts = _unscale(facts, tensors, scale, rescales)
    elif kind == "covariance_whitening" and facts.pursuit is None:
        if rescales:  # before the decoder's lengths change, by which features are ranked
            tensors.update(folds.unit_rows(tensors))
        _unwhiten(folder, facts, tensors)
        about, rescales = {"units": "normalised", "norm_factor": None}, False
    elif kind != "none":
        raise UserError(f"{path}: normalize_activations is {kind!r}, which is not read. Choose another SAE.")
    elif not rescales and not folds.has_unit_rows(tensors["W_dec"]):
        about = {"units": _units_of_finished(folder)}
    if rescales:
        tensors.update(folds.unit_rows(tensors))
    return dataclasses.replace(facts, metadata={**facts.metadata, **about})


_RANKED = ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk")


def _unscale(facts: Facts, tensors: dict[str, Tensor], scale: float, rescales: bool) -> Facts:
    """From x·scale to x, with the same activations; those of matching pursuit become raw, its rows stay of length 1."""
    tensors["b_dec"] = tensors["b_dec"] / scale
    if facts.pursuit is not None:
        left = facts.pursuit.residual_threshold / scale
        return dataclasses.replace(facts, pursuit=dataclasses.replace(facts.pursuit, residual_threshold=left))
    tensors["W_enc"] = tensors["W_enc"] * scale
    tensors["W_dec"] = tensors["W_dec"] / scale
    if rescales and "threshold" in tensors:  # of pre·‖W_dec‖, which the line above divided
        tensors["threshold"] = tensors["threshold"] / scale
    return facts


def _scale(folder: Path, config: Mapping[str, Any]) -> float:
    """√d / mean‖x‖ of a training checkpoint, or of a release that leaves the folding to its reader."""
    path = folder / SCALER
    if path.is_file():
        scale = files.read_json_object(path, ("scaling_factor",))["scaling_factor"]
    elif (scale := config.get("norm_scaling_factor")) is None:
        raise UserError(
            f"{folder / CONFIG}: was trained on scaled activations and {SCALER} is not beside it. "
            "Give SAELens's checkpoint folder whole, the name of its release, or what save_inference_model wrote."
        )
    return checks.number(path, {"scaling_factor": scale}, "scaling_factor", positive=True)


def _unwhiten(folder: Path, facts: Facts, tensors: dict[str, Tensor]) -> None:
    d, path = facts.d_in, folder / WHITENING
    if not path.is_file():
        raise UserError(
            f"{folder / CONFIG}: was trained on whitened activations and {WHITENING} is not beside it. "
            "Give SAELens's checkpoint folder whole, or save it there with save_inference_model."
        )
    shapes: dict[str, tuple[int, ...]] = {"mean": (d,), "matrix": (d, d), "inverse_matrix": (d, d)}
    known = checks.sound(path, checks.taken(path, checks.safetensors(path), shapes, f"{CONFIG} says"))
    tensors["W_enc"] = known["matrix"] @ tensors["W_enc"]
    if not facts.apply_b_dec_to_input:
        tensors["b_enc"] = tensors["b_enc"] - known["mean"] @ tensors["W_enc"]
    tensors["W_dec"] = tensors["W_dec"] @ known["inverse_matrix"]
    tensors["b_dec"] = tensors["b_dec"] @ known["inverse_matrix"] + known["mean"]


def _units_of_finished(folder: Path) -> str:
    """Of an SAE whose normalisation is folded in, or that had none: its training config alone says which."""
    if not (folder / RUNNER).is_file():
        return "unknown"
    runner = files.read_json_object(folder / RUNNER)
    inner = runner.get("sae")
    kind = (inner if isinstance(inner, dict) else runner).get("normalize_activations")
    return "normalised" if kind in (True, "expected_average_only_in", "covariance_whitening") else "raw"
