"""The same SAE said otherwise: exact rewritings of tensors (facts.py) that several layouts need.

Each gives new tensors with which codes and reconstruction stay what they were, but for the last bits of float32.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.formats.facts import Facts


def centred(facts: Facts, tensors: Mapping[str, Tensor], centres: bool) -> dict[str, Tensor]:
    """For an encoder that takes b_dec off x (`centres`), or does not: (x − b_dec)·W + b is x·W + (b − b_dec·W)."""
    if facts.apply_b_dec_to_input == centres:
        return dict(tensors)
    shift = tensors["b_dec"] @ tensors["W_enc"]
    return {**tensors, "b_enc": tensors["b_enc"] + (shift if centres else -shift)}


def unit_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Decoder rows of length 1, activations times their lengths; a threshold is taken to be of such activations."""
    norms = tensors["W_dec"].norm(dim=1).clamp_min(1e-8)
    changed = {"W_dec": tensors["W_dec"] / norms[:, None], "W_enc": tensors["W_enc"] * norms}
    return {**tensors, **changed, "b_enc": tensors["b_enc"] * norms}


def has_unit_rows(W_dec: Tensor) -> bool:
    """Whether an activation is the length that it adds: then it is in raw units, whatever training saw."""
    return bool(((W_dec.norm(dim=1) - 1).abs() < 1e-3).all())


def ungated(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A gated SAE (b_gate, b_mag, r_mag [d_sae]) as the JumpReLU that it is.

    It fires where pre + b_gate > 0, with e^r·pre + b_mag (but where pre + b_gate is 0 to the last bit, which the fold
    rounds): encoder e^r·W_enc, bias b_mag, threshold b_mag − e^r·b_gate
    (Rajamanoharan et al. 2024b, section 3).
    """
    rest = {name: tensor for name, tensor in tensors.items() if name not in ("b_gate", "b_mag", "r_mag")}
    growth, bias = tensors["r_mag"].exp(), tensors["b_mag"]
    threshold = bias - growth * tensors["b_gate"]
    return {**rest, "W_enc": tensors["W_enc"] * growth, "b_enc": bias, "threshold": threshold}


def raw_units(params: Mapping[str, Tensor], threshold: Tensor | None, scale: float) -> dict[str, Tensor]:
    """What training made, in units of x·scale (s), as tensors of facts.py in raw units, decoder rows of length 1.

    Its pre-activations W_e(s·x − b_dec) + b_enc, divided by s, are W_e(x − b_dec/s) + b_enc/s: matrices stay, vectors
    are divided by s, whether b_dec is subtracted or not; activations and thresholds come out divided by s too, in raw
    units. Then decoder norms are folded: with n_i = ‖W_dec[i]‖ the row becomes a unit vector, and encoder row, bias and
    threshold of feature i are multiplied by n_i.

    params   encoder [d_sae, d], W_dec [d_sae, d], b_enc [d_sae], b_dec [d]; a feature whose decoder row is zero never
             fires
    """
    norms = params["W_dec"].norm(dim=1)
    tensors = {
        "W_enc": (params["encoder"] * norms[:, None]).T,
        "W_dec": params["W_dec"] / norms.clamp_min(torch.finfo(norms.dtype).tiny)[:, None],
        "b_enc": params["b_enc"] * (norms / scale),
        "b_dec": params["b_dec"] / scale,
    }
    return tensors if threshold is None else tensors | {"threshold": threshold * norms / scale}
