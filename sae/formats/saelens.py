"""SAELens ≥ 6: a folder with cfg.json and sae_weights.safetensors. It is also our own layout.

What we write loads in SAELens unchanged and gives the same codes: decoder rows have unit norm, nothing is left to
fold, feature activations are in raw units of the host. Read are its finished topk, jumprelu and standard SAEs, with
the codes that they have there, and older folders (before 6.0, flat keys) that say nothing else. Refused by name:
other architectures, and an SAE whose input still has to be normalised.
"""

import errno
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import files
from sae.errors import UserError

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LAYOUT = "6.0.0"
"""Written as `sae_lens_version`: SAELens takes a folder without one for an older layout and drops its metadata."""
THEIR_NAMES = {"relu": "standard", "matryoshka": "matryoshka_batchtopk"}
OUR_NAMES = {theirs: ours for ours, theirs in THEIR_NAMES.items()}
ARCHITECTURES = ("topk", "jumprelu", "relu")


def write(folder: Path, facts: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write both files into an existing folder. Matrices in `dtype`, the rest in float32 (it is small and matters)."""
    name, trained = facts["architecture"], facts["metadata"]["training_architecture"]
    config = {
        "architecture": THEIR_NAMES.get(name, name),
        "d_in": facts["d_in"],
        "d_sae": facts["d_sae"],
        "dtype": "float32",  # what the weights become in memory: SAELens casts all tensors to it
        "device": "cpu",
        "apply_b_dec_to_input": facts["subtracts_b_dec"],
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": facts["metadata"]
        | {"sae_lens_version": LAYOUT, "training_architecture": THEIR_NAMES.get(trained, trained)},
    }
    if name == "topk":
        config |= {"k": facts["k"], "rescale_acts_by_decoder_norm": False}
    matrices = {name: tensors[name].to(dtype) for name in ("W_enc", "W_dec")}
    vectors = {name: tensor.to(torch.float32) for name, tensor in tensors.items() if name not in matrices}
    files.write_safetensors(folder / WEIGHTS, {**matrices, **vectors})
    files.write_json(folder / CONFIG, config)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read (facts, tensors) in float32.

    Raises UserError for a missing or foreign folder, an architecture or normalisation we do not read, tensors whose
    shapes are not the config's, and thresholds that are negative or NaN.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: not an SAE folder (no {CONFIG} in it). Give the folder that holds {CONFIG}.")
    config = _modern(files.read_json_object(folder / CONFIG, ("d_in", "d_sae")))
    given = config.get("architecture")
    name = OUR_NAMES.get(given, given) if isinstance(given, str) else given
    if name not in ARCHITECTURES:
        known = ", ".join(THEIR_NAMES.get(one, one) for one in ARCHITECTURES)
        raise UserError(
            f"{folder / CONFIG}: architecture {given!r} is not read yet (read are: {known}). "
            "Save a training checkpoint with SAELens's save_inference_model."
        )
    if config.get("normalize_activations", "none") != "none" or config.get("reshape_activations", "none") != "none":
        raise UserError(
            f"{folder / CONFIG}: activation normalisation is not folded in. "
            "Save it with SAELens's save_inference_model."
        )
    d, F = (_count(folder, config, key) for key in ("d_in", "d_sae"))
    k = _count(folder, config, "k", most=F) if name == "topk" else None
    subtracts = config.get("apply_b_dec_to_input", True)
    if not isinstance(subtracts, bool):
        raise UserError(
            f"{folder / CONFIG}: apply_b_dec_to_input is {subtracts!r}, expected true or false. Copy the folder again."
        )
    metadata = config.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise UserError(f"{folder / CONFIG}: metadata is not an object. Copy the folder again.")
    trained = str(metadata.get("training_architecture") or given)
    facts = {
        "architecture": name,
        "d_in": d,
        "d_sae": F,
        "k": k,
        "subtracts_b_dec": subtracts,
        "metadata": metadata | {"training_architecture": OUR_NAMES.get(trained, trained)},
    }
    shapes = {"W_enc": (d, F), "W_dec": (F, d), "b_enc": (F,), "b_dec": (d,)}
    tensors = _tensors(folder, shapes | ({"threshold": (F,)} if name == "jumprelu" else {}))
    if name == "topk" and config.get("rescale_acts_by_decoder_norm"):
        norms = tensors["W_dec"].norm(dim=1)
        tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
        tensors["W_enc"] = tensors["W_enc"] * norms
        tensors["b_enc"] = tensors["b_enc"] * norms
    return facts, tensors


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """A config of before 6.0 in today's words: flat metadata, `activation_fn_str`, a boolean normalisation.

    There "standard" may be a TopK SAE (SAELens issue 553: such ones were loaded as ReLU, and reconstructed badly).
    """
    if "metadata" in config:
        return config
    new = {"architecture": "standard", **config, "metadata": config}
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if activation == "topk":
        new |= {"architecture": "topk", "k": (config.get("activation_fn_kwargs") or {}).get("k")}
    elif activation != "relu":
        new["architecture"] = f"{new['architecture']} with {activation}"
    if config.get("finetuning_scaling_factor"):
        new["architecture"] = f"{new['architecture']} with a finetuning_scaling_factor"
    normalisation = config.get("normalize_activations") or "none"
    return new | {"normalize_activations": "expected_average_only_in" if normalisation is True else normalisation}


def _tensors(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of these names and shapes, in float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = {name: value.to(torch.float32) for name, value in load_file(folder / WEIGHTS).items()}
    except (OSError, SafetensorError) as error:
        why = (
            "is missing"
            if getattr(error, "errno", None) == errno.ENOENT or not (folder / WEIGHTS).exists()
            else f"is damaged ({error})"
        )
        raise UserError(f"{folder / WEIGHTS}: {why}. Copy the folder again.") from error
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            what = "missing" if found is None else found
            raise UserError(f"{folder / WEIGHTS}: {name} is {what}, {CONFIG} says {shape}. Copy the folder again.")
    wrong = ~(tensors["threshold"] >= 0) if "threshold" in shapes else torch.zeros(1, dtype=torch.bool)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise UserError(
            f"{folder / WEIGHTS}: the threshold of feature {at:,} is {float(tensors['threshold'][at]):g} "
            f"({int(wrong.sum()):,} such), expected 0 or more. Copy the folder again."
        )
    return {name: tensors[name] for name in shapes}


def _count(folder: Path, config: dict[str, Any], key: str, most: int | None = None) -> int:
    """A whole number of at least 1 from the config."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        upto = "or more" if most is None else f"to {most:,}"
        raise UserError(
            f"{folder / CONFIG}: {key} is {value!r}, expected a whole number, 1 {upto}. Copy the folder again."
        )
    return value
