"""Codes back to activations: b_dec plus the active decoder rows, weighted by their strength."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.codes import Codes
from sae.errors import UserError
from sae.kernels import triton

if TYPE_CHECKING:
    from jaxtyping import Float


def decode(
    codes: Codes,
    W_dec: Float[Tensor, "F d"],
    b_dec: Float[Tensor, " d"],
    *,
    implementation: str | None = None,
) -> Float[Tensor, "B d"]:
    """Rebuild each batch row as b_dec plus its active decoder rows, weighted by their strength.

    codes    B rows in CSR; values in the units W_dec was trained in
    returns  [B, d] in W_dec's dtype; a row with nothing active is exactly b_dec
    memory   one output, never [B, F] (the plain version holds it)
    raises   UserError if codes.n_features differs from F
    """
    if codes.n_features != W_dec.shape[0]:
        raise UserError(
            f"decode: the codes have {codes.n_features:,} features, the decoder {W_dec.shape[0]:,}. "
            "Use the SAE that made the codes."
        )
    if implementation is None and triton.takes(W_dec):
        from sae.kernels.triton.decode import decode as on_cuda

        return on_cuda(codes, W_dec, b_dec)
    if implementation == "plain" or W_dec.device.type != "cpu":
        return codes.dense().to(W_dec.dtype) @ W_dec + b_dec
    rows = torch.nn.functional.embedding_bag(
        codes.indices,
        W_dec,
        codes.offsets[:-1],
        mode="sum",
        per_sample_weights=codes.values.to(W_dec.dtype),
    )
    return rows + b_dec
