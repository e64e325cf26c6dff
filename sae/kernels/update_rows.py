"""One pass over the rows of encoder and decoder: both weight gradients, projection, Adam, unit norm, bf16 copy.

For each block of features the gradients are summed from the codes, used and forgotten, so that no [F, d] gradient
reaches memory. The plain version is the textbook: two dense gradients, then Adam (Kingma & Ba 2015) as in
torch.optim.Adam. Adam is followed exactly for every row, idle ones too (their moments decay, and they move).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.codes import Codes
from sae.kernels.by_feature import ByFeature

# Features in a block: 512 rows × 576 × float32 is 1.2 MB, so weights, moments and gradient share the L2/L3 cache.
BLOCK = 512


@dataclass
class Adam:
    """Moments of one parameter, and how far they are."""

    m: Tensor
    v: Tensor
    step: int = 0


@dataclass(frozen=True)
class RowGradients:
    """Dense gradients of some features' rows, added to the sparse ones (the auxiliary loss of dead features)."""

    features: Int[Tensor, " n"]
    encoder: Float[Tensor, "n d"]
    W_dec: Float[Tensor, "n d"]
    b_enc: Float[Tensor, " n"]


def update_rows(
    encoder: Float[Tensor, "F d"],
    W_dec: Float[Tensor, "F d"],
    encoder_low: Float[Tensor, "F d"] | None,
    moments: tuple[Adam, Adam],
    codes: Codes,
    value_grads: Float[Tensor, " nnz"],
    inputs: Float[Tensor, "B d"],
    error: Float[Tensor, "B d"],
    transposed: ByFeature,
    extra: RowGradients | None,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    *,
    implementation: str | None = None,
) -> None:
    """Update encoder and decoder rows in place.

    gradients      dW_dec[j] = Σ_b a_bj error_b, its part along W_dec[j] removed; dencoder[j] = Σ_b g_bj inputs_b
    value_grads    g: the loss's derivative by the pre-activation of each entry (0 where the entry is 0)
    inputs, error  what the encoder saw, and the loss's derivative by the reconstruction; float32
    moments        of encoder and decoder; their `step` is already that of this update (1 for the first)
    afterwards     decoder rows have unit norm; encoder_low (if any) is the encoder's bf16 copy
    """
    args = (
        encoder,
        W_dec,
        encoder_low,
        moments,
        codes,
        value_grads,
        inputs,
        error,
        transposed,
        extra,
        lr,
        betas,
        eps,
    )
    if implementation == "plain" or encoder.device.type != "cpu":
        _plain(*args)
    else:
        _cpu(*args)


def _plain(
    encoder, W_dec, encoder_low, moments, codes, value_grads, inputs, error, transposed, extra, lr, betas, eps
) -> None:
    rows = codes.rows()
    d_dec = torch.zeros_like(W_dec).index_add_(0, codes.indices, codes.values[:, None] * error[rows])
    d_enc = torch.zeros_like(encoder).index_add_(0, codes.indices, value_grads[:, None] * inputs[rows])
    if extra is not None:
        d_dec.index_add_(0, extra.features, extra.W_dec)
        d_enc.index_add_(0, extra.features, extra.encoder)
    d_dec -= (d_dec * W_dec).sum(1, keepdim=True) * W_dec
    adam_(encoder, d_enc, moments[0], lr, betas, eps)
    adam_(W_dec, d_dec, moments[1], lr, betas, eps)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    if encoder_low is not None:
        encoder_low.copy_(encoder)


def adam_(weight: Tensor, grad: Tensor, state: Adam, lr: float, betas: tuple[float, float], eps: float) -> None:
    """One step of Adam in place, as torch.optim.Adam computes it; `state.step` counts this step."""
    beta1, beta2 = betas
    state.m.lerp_(grad, 1 - beta1)
    state.v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (state.v / (1 - beta2**state.step)).sqrt_().add_(eps)
    weight.addcdiv_(state.m, denominator, value=-lr / (1 - beta1**state.step))


def _cpu(
    encoder, W_dec, encoder_low, moments, codes, value_grads, inputs, error, transposed, extra, lr, betas, eps
) -> None:
    values, grads = codes.values[transposed.order], value_grads[transposed.order]
    offsets = transposed.offsets.tolist()
    F = encoder.shape[0]
    for low in range(0, F, BLOCK):
        high = min(low + BLOCK, F)
        block = slice(low, high)
        span = slice(offsets[low], offsets[high])
        bags = transposed.offsets[low:high] - offsets[low]
        d_dec = _bags(transposed.rows[span], error, bags, values[span])
        d_enc = _bags(transposed.rows[span], inputs, bags, grads[span])
        if extra is not None:
            _add_extra(d_enc, d_dec, extra, low, high)
        w = W_dec[block]
        d_dec.addcmul_((d_dec * w).sum(1, keepdim=True), w, value=-1)
        _fused_adam(encoder[block], d_enc, moments[0], block, lr, betas, eps)
        _fused_adam(w, d_dec, moments[1], block, lr, betas, eps)
        w.div_(torch.linalg.vector_norm(w, dim=1, keepdim=True))
        if encoder_low is not None:
            encoder_low[block].copy_(encoder[block])


def _bags(rows: Tensor, matrix: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
    return torch.nn.functional.embedding_bag(rows, matrix, bags, mode="sum", per_sample_weights=weights)


def _add_extra(d_enc: Tensor, d_dec: Tensor, extra: RowGradients, low: int, high: int) -> None:
    # extra.features ascend, so a block's share is one slice
    first, last = torch.searchsorted(extra.features, torch.tensor([low, high])).tolist()
    if first == last:
        return
    at = extra.features[first:last] - low
    d_enc.index_add_(0, at, extra.encoder[first:last])
    d_dec.index_add_(0, at, extra.W_dec[first:last])


def _fused_adam(weight: Tensor, grad: Tensor, state: Adam, block: slice, lr, betas, eps) -> None:
    torch.ops.aten._fused_adam_(
        [weight],
        [grad],
        [state.m[block]],
        [state.v[block]],
        [],
        [torch.tensor(float(state.step))],
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
