"""A steering edit as one small safetensors file: all that is needed to repeat it, without the SAE.

    x + Σᵢ clip(constᵢ + slopeᵢ · aᵢ, lowᵢ, highᵢ) · vectorsᵢ,  aᵢ = zᵢ where zᵢ = encoderᵢ · x + biasᵢ > floorᵢ, else 0

x is the host's activation at `hook`, raw, float32. Tensors, all float32: vectors [n, d], encoder [n, d], bias [n],
floor [n] and laws [4, n] (const, slope, low, high). Metadata, all text: format; rule (the line above); reading
(threshold, or none where no law looks at an activation); hook; features, kinds, dials; host, host_fingerprint;
outlier_norm (positions with a larger ‖x‖ are left alone, as are special tokens, padding and the first position of a
text; None: no limit); lost (a line for each thing that the file cannot say of what was converted). One feature of width
576 is 6 kB, 64 of width 2,304 are 1.2 MB.
"""

from pathlib import Path

import torch
from torch import Tensor

from sae import files
from sae.errors import UserError

FORMAT = "goldengate-edit-1"
RULE = (
    "x + sum_i clip(const_i + slope_i * a_i, low_i, high_i) * vectors_i; laws = (const, slope, low, high); "
    "a_i = z_i where z_i = encoder_i . x + bias_i > floor_i, else 0; left alone: special tokens, padding, the first "
    "position of a text, |x| > outlier_norm"
)
READINGS = ("threshold", "none")
_FACTS = ("hook", "reading", "features", "kinds", "dials", "host", "host_fingerprint", "outlier_norm", "lost")
_REMEDY = "Give a file that `sae convert --to safetensors` wrote."


def write(path: str | Path, facts: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Write the file whole or not at all; `facts` are the metadata but for format and rule."""
    files.write_safetensors(path, tensors, {"format": FORMAT, "rule": RULE, **facts})


def read(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(facts, tensors) of what `write` wrote. Raises UserError for any other file, and for one that is damaged."""
    if not Path(path).is_file():
        raise UserError(f"{path}: {'is a folder' if Path(path).exists() else 'no such file'}. {_REMEDY}")
    try:
        tensors, facts = files.read_safetensors(path)
    except UserError as error:
        raise UserError(f"{path}: is no safetensors file, or a damaged one. {_REMEDY}") from error
    if facts.get("format") != FORMAT:
        raise UserError(f"{path}: format is {facts.get('format')!r}, expected {FORMAT}. {_REMEDY}")
    for name in _FACTS:
        if name not in facts:
            raise UserError(f"{path}: its metadata has no {name}. {_REMEDY}")
    if facts["reading"] not in READINGS:
        raise UserError(f"{path}: reading is {facts['reading']!r}, expected {' or '.join(READINGS)}. {_REMEDY}")
    vectors = tensors.get("vectors")
    if vectors is None or vectors.ndim != 2 or not len(vectors):
        raise UserError(f"{path}: vectors are {_shape(vectors)}, expected [n, d]. {_REMEDY}")
    n, d = vectors.shape
    shapes = {"vectors": (n, d), "encoder": (n, d), "bias": (n,), "floor": (n,), "laws": (4, n)}
    for name, shape in shapes.items():
        found = tensors.get(name)
        if found is None or tuple(found.shape) != shape or found.dtype != torch.float32:
            raise UserError(f"{path}: {name} is {_shape(found)}, expected float32 {list(shape)}. {_REMEDY}")
        # a law's limits may be infinite, and a floor that reads all is
        finite = found[:2] if name == "laws" else found
        if bool(found.isnan().any()) or (name != "floor" and not bool(finite.isfinite().all())):
            raise UserError(f"{path}: {name} has NaN or infinite values. {_REMEDY}")
    try:
        limit = float("inf") if facts["outlier_norm"] == "None" else float(facts["outlier_norm"])
    except ValueError:
        limit = -1.0
    if not limit > 0:
        raise UserError(f"{path}: outlier_norm is {facts['outlier_norm']!r}, expected a number or None. {_REMEDY}")
    return facts, {name: tensors[name] for name in shapes}


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
