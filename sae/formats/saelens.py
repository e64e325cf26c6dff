"""SAELens ≥ 6: a folder with cfg.json and sae_weights.safetensors. It is also our own layout.

What we write loads in SAELens unchanged and gives the same codes: decoder rows have unit norm, nothing is left to
fold, feature activations are in raw units of the host. Only the TopK layout is read so far; anything else is refused
by name.
"""

import errno
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import files
from sae.errors import UserError

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write(folder: Path, facts: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write both files into an existing folder. Matrices in `dtype`, biases in float32 (they are small and matter)."""
    config = {
        "architecture": facts["architecture"],
        "d_in": facts["d_in"],
        "d_sae": facts["d_sae"],
        "dtype": "float32",  # what the weights become in memory: SAELens casts all tensors to it
        "device": "cpu",
        "apply_b_dec_to_input": facts["subtracts_b_dec"],
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": facts["metadata"],
        "k": facts["k"],
        "rescale_acts_by_decoder_norm": False,
    }
    matrices = {name: tensors[name].to(dtype) for name in ("W_enc", "W_dec")}
    biases = {name: tensors[name].to(torch.float32) for name in ("b_enc", "b_dec")}
    files.write_safetensors(folder / WEIGHTS, {**matrices, **biases})
    files.write_json(folder / CONFIG, config)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read (facts, tensors) in float32.

    Raises UserError for a missing or foreign folder, an architecture or normalisation we do not read, or tensors
    whose shapes are not the config's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: not an SAE folder (no {CONFIG} in it). Give the folder that holds {CONFIG}.")
    config = files.read_json_object(folder / CONFIG, ("architecture", "d_in", "d_sae"))
    if config["architecture"] != "topk":
        raise UserError(f"{folder / CONFIG}: architecture {config['architecture']!r} is not read yet. Use a TopK SAE.")
    if config.get("normalize_activations", "none") != "none" or config.get("reshape_activations", "none") != "none":
        raise UserError(
            f"{folder / CONFIG}: activation normalisation is not folded in. "
            "Save it with SAELens's save_inference_model."
        )
    d, F = (_count(folder, config, key) for key in ("d_in", "d_sae"))
    k = _count(folder, config, "k", most=F)
    if not isinstance(config.get("metadata") or {}, dict):
        raise UserError(f"{folder / CONFIG}: metadata is not an object. Copy the folder again.")
    try:
        tensors = {name: value.to(torch.float32) for name, value in load_file(folder / WEIGHTS).items()}
    except (OSError, SafetensorError) as error:
        why = (
            "is missing"
            if getattr(error, "errno", None) == errno.ENOENT or not (folder / WEIGHTS).exists()
            else f"is damaged ({error})"
        )
        raise UserError(f"{folder / WEIGHTS}: {why}. Copy the folder again.") from error
    for name, shape in {"W_enc": (d, F), "W_dec": (F, d), "b_enc": (F,), "b_dec": (d,)}.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise UserError(
                f"{folder / WEIGHTS}: {name} is {found or 'missing'}, {CONFIG} says {shape}. Copy the folder again."
            )
    if config.get("rescale_acts_by_decoder_norm"):
        norms = tensors["W_dec"].norm(dim=1)
        tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
        tensors["W_enc"] = tensors["W_enc"] * norms
        tensors["b_enc"] = tensors["b_enc"] * norms
    facts = {
        "architecture": config["architecture"],
        "d_in": d,
        "d_sae": F,
        "k": k,
        "subtracts_b_dec": config.get("apply_b_dec_to_input", True),
        "metadata": config.get("metadata") or {},
    }
    return facts, tensors


def _count(folder: Path, config: dict[str, Any], key: str, most: int | None = None) -> int:
    """A whole number of at least 1 from the config."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        upto = "or more" if most is None else f"to {most:,}"
        raise UserError(
            f"{folder / CONFIG}: {key} is {value!r}, expected a whole number, 1 {upto}. Copy the folder again."
        )
    return value
