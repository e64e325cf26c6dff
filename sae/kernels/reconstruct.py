"""Decode, the error against the target, and what each active strength could do about it, in one pass.

The value gradient of entry (b, j) is error_b · W_dec[j]: the derivative of ½‖error_b‖² by that strength.
It reads the same decoder rows as the decoding, so the two belong together (gathered once where the backend can).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sae.codes import Codes
from sae.kernels.decode import decode

_SUM = 0  # torch's code for embedding_bag(mode="sum")


def reconstruct(
    codes: Codes,
    W_dec: Float[Tensor, "F d"],
    b_dec: Float[Tensor, " d"],
    target: Float[Tensor, "B d"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Tensor, "B d"], Float[Tensor, " nnz"]]:
    """Return (error, value_grads): error = decode(codes) − target, value_grads[n] = error[row n] · W_dec[index n].

    All float32, in the units of W_dec and target. Memory: [B, d] and [nnz]; never [nnz, d] on CPU.
    """
    error = decode(codes, W_dec, b_dec, implementation=implementation).sub_(target)
    if implementation == "plain" or W_dec.device.type != "cpu":
        return error, (error[codes.rows()] * W_dec[codes.indices]).sum(dim=1)
    value_grads = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        error, W_dec, codes.indices, codes.offsets[:-1], codes.rows(), _SUM
    )
    return error, value_grads
