"""One pass over the rows of encoder and decoder: both weight gradients, projection, Adam, unit norm, bf16 copy.

For each block of features the gradients are summed from the codes, used and forgotten, so that no [F, d] gradient
reaches memory. The plain version is the textbook: two dense gradients, then Adam (Kingma & Ba 2015) as in
torch.optim.Adam. With β1 > 0 every row moves at every step, idle ones too, as Adam has it. With β1 = 0 a row without
gradient does not move, only its v decays; so rows that are idle are not touched, and v catches up by β2^(steps
missed) when they next are: the same result, without the traffic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.kernels import triton
from sae.kernels.by_feature import ByFeature
from sae.kernels.native import call, native
from sae.kernels.work import RowGradients, Work

if TYPE_CHECKING:
    from jaxtyping import Float

# Features in a block of the torch version: 512 rows × 576 × float32 is 1.2 MB, so weights, moments and gradient share
# the L2/L3 cache.
BLOCK = 512
_NATIVE_BLOCK = 16  # FEATURES in native/update.c


@dataclass
class Adam:
    """Moments of one parameter, and how far they are."""

    m: Tensor | None
    """None with β1 = 0, where it would be the gradient itself."""
    v: Tensor
    step: int | Float[Tensor, ""] = 0
    """In a captured step a float64 tensor on the device, as Rule.lr and Rule.scale may be."""
    fresh: Tensor | None = None
    """int32 [F], only with β1 = 0: the step up to which each row's v has decayed."""


@dataclass(frozen=True)
class Rule:
    lr: float | Float[Tensor, ""]
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 6.25e-10
    unit_norm: bool = True
    """Decoder rows keep unit norm: the gradient's part along each is removed, and the row is renormed afterwards."""
    scale: float | Float[Tensor, ""] = 1.0
    """Factor on every gradient (clipping by the previous step's norm)."""


def update_rows(
    encoder: Float[Tensor, "F d"],
    W_dec: Float[Tensor, "F d"],
    encoder_low: Float[Tensor, "F d"] | None,
    moments: tuple[Adam, Adam],
    work: Work,
    transposed: ByFeature,
    rule: Rule,
    *,
    implementation: str | None = None,
) -> Float[Tensor, ""]:
    """Update encoder and decoder rows in place; returns the squared norm of both gradients, before rule.scale.

    gradients      dW_dec[j] = Σ_b a_bj error_b, its part along W_dec[j] removed if rule.unit_norm;
                   dencoder[j] = Σ_b g_bj inputs_b; with the shares of work.extra and work.every
    moments        of encoder and decoder; their `step` is already that of this update (1 for the first)
    transposed     by_feature(work.codes)
    afterwards     decoder rows have unit norm (if rule.unit_norm); encoder_low (if any) is the encoder's bf16 copy
    """
    if implementation is None and triton.takes(encoder):
        from sae.kernels.triton.update_rows import update_rows as on_cuda

        return on_cuda(encoder, W_dec, encoder_low, moments, work, transposed, rule)
    if implementation == "plain" or encoder.device.type != "cpu":
        return _plain(encoder, W_dec, encoder_low, moments, work, rule)
    if _fits_native(encoder, W_dec, encoder_low) and native() is not None:
        return _native(encoder, W_dec, encoder_low, moments, work, transposed, rule)
    return _torch_cpu(encoder, W_dec, encoder_low, moments, work, transposed, rule)


def _plain(encoder, W_dec, encoder_low, moments, work: Work, rule: Rule) -> Tensor:
    codes, rows = work.codes, work.codes.rows()
    level = torch.searchsorted(torch.tensor(work.levels, device=encoder.device), codes.indices, right=True)
    d_dec = torch.zeros_like(W_dec).index_add_(0, codes.indices, codes.values[:, None] * work.error[level, rows])
    d_enc = torch.zeros_like(encoder).index_add_(0, codes.indices, work.value_grads[:, None] * work.inputs[rows])
    if work.extra is not None:
        d_dec.index_add_(0, work.extra.features, work.extra.W_dec)
        d_enc.index_add_(0, work.extra.features, work.extra.encoder)
    if work.every is not None:
        d_dec += work.every.along_decoder[:, None] * W_dec
        d_enc += work.every.along_inputs[:, None] * work.every.inputs_sum
    if rule.unit_norm:
        d_dec -= (d_dec * W_dec).sum(1, keepdim=True) * W_dec
    squared = d_enc.square().sum() + d_dec.square().sum()
    adam_(encoder, d_enc.mul_(rule.scale), moments[0], rule)
    adam_(W_dec, d_dec.mul_(rule.scale), moments[1], rule)
    if rule.unit_norm:
        W_dec /= W_dec.norm(dim=1, keepdim=True)
    if encoder_low is not None:
        encoder_low.copy_(encoder)
    return squared


def adam_(weight: Tensor, grad: Tensor, state: Adam, rule: Rule) -> None:
    """One step of Adam in place, as torch.optim.Adam computes it; `state.step` counts this step."""
    beta1, beta2 = rule.betas
    if state.fresh is not None:  # bring every row up to date, then as usual
        state.v.mul_((beta2 ** (state.step - 1 - state.fresh.double())).float().view(-1, *[1] * (state.v.dim() - 1)))
        state.fresh.fill_(state.step)
    m = grad if state.m is None else state.m.lerp_(grad, 1 - beta1)
    state.v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (state.v / (1 - beta2**state.step)).sqrt_().add_(rule.eps)
    weight.sub_((m / denominator).mul_(rule.lr / (1 - beta1**state.step)))


def _fits_native(encoder: Tensor, W_dec: Tensor, encoder_low: Tensor | None) -> bool:
    whole = encoder.dtype == W_dec.dtype == torch.float32 and encoder.is_contiguous() and W_dec.is_contiguous()
    return whole and (encoder_low is None or (encoder_low.dtype == torch.bfloat16 and encoder_low.is_contiguous()))


def _native(encoder, W_dec, encoder_low, moments, work: Work, transposed: ByFeature, rule: Rule) -> Tensor:
    extra, every = work.extra, work.every
    of_encoder = _native_matrix(
        *(encoder, encoder_low, moments[0], transposed, work.value_grads, work.inputs[None], (len(encoder),)),
        extra=None if extra is None else (extra.features, extra.encoder),
        every=None if every is None else (every.along_inputs, every.inputs_sum),
        rule=replace(rule, unit_norm=False),
    )
    of_decoder = _native_matrix(
        *(W_dec, None, moments[1], transposed, work.codes.values, work.error, work.levels),
        extra=None if extra is None else (extra.features, extra.W_dec),
        every=None if every is None else (every.along_decoder, None),
        rule=rule,
    )
    return (of_encoder + of_decoder).float()


def _native_matrix(
    weight: Tensor,
    low: Tensor | None,
    state: Adam,
    transposed: ByFeature,
    strengths: Tensor,
    sources: Tensor,
    levels: tuple[int, ...],
    *,
    extra: tuple[Tensor, Tensor] | None,
    every: tuple[Tensor, Tensor | None] | None,
    rule: Rule,
) -> Tensor:
    """update_matrix of native/update.c; returns the gradient's squared norm, float64."""
    F, d = weight.shape
    features, rows = (None, None) if extra is None else (extra[0].contiguous(), _plain_floats(extra[1]))
    along, direction = (None, None) if every is None else every
    squared = torch.zeros(-(-F // _NATIVE_BLOCK), dtype=torch.float64)
    call(
        "update_matrix",
        *(weight, state.m, state.v, state.fresh, low, F, d),
        *(transposed.offsets, transposed.order, transposed.rows, _plain_floats(strengths)),
        *(_plain_floats(sources), sources.shape[1], torch.tensor(levels)),
        *(features, 0 if features is None else len(features), rows),
        *(None if along is None else _plain_floats(along), None if direction is None else _plain_floats(direction)),
        *(float(rule.lr), float(rule.betas[0]), float(rule.betas[1]), float(rule.eps)),
        *(int(state.step), rule.unit_norm, float(rule.scale)),
        *(squared, torch.empty(torch.get_num_threads(), 2, d)),
    )
    return squared.sum()


def _plain_floats(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()


def _torch_cpu(encoder, W_dec, encoder_low, moments, work: Work, transposed: ByFeature, rule: Rule) -> Tensor:
    values, grads = work.codes.values[transposed.order], work.value_grads[transposed.order]
    lazy = moments[0].fresh is not None and moments[1].fresh is not None and work.every is None
    squared = torch.zeros((), dtype=torch.float64)
    start = 0
    for level, end in enumerate(work.levels):
        for low in range(start, end, BLOCK):
            block = slice(low, min(low + BLOCK, end))
            span = slice(*transposed.offsets[[block.start, block.stop]].tolist())
            if lazy and span.start == span.stop and not _has_extra(work.extra, block):
                continue
            bags = transposed.offsets[block] - span.start
            d_dec = _bags(transposed.rows[span], work.error[level], bags, values[span])
            d_enc = _bags(transposed.rows[span], work.inputs, bags, grads[span])
            if work.extra is not None:
                _add_extra(d_enc, d_dec, work.extra, block)
            w = W_dec[block]
            if work.every is not None:
                d_dec.addcmul_(work.every.along_decoder[block, None], w)
                d_enc.addcmul_(work.every.along_inputs[block, None], work.every.inputs_sum)
            if rule.unit_norm:
                d_dec.addcmul_((d_dec * w).sum(1, keepdim=True), w, value=-1)
            squared += d_dec.square().sum() + d_enc.square().sum()
            if rule.scale != 1:
                d_dec, d_enc = d_dec * rule.scale, d_enc * rule.scale
            _adam_block(encoder[block], d_enc, moments[0], block, rule)
            _adam_block(w, d_dec, moments[1], block, rule)
            if rule.unit_norm:
                w.div_(torch.linalg.vector_norm(w, dim=1, keepdim=True))
            if encoder_low is not None:
                encoder_low[block].copy_(encoder[block])
        start = end
    return squared.float()


def _bags(rows: Tensor, matrix: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
    return torch.nn.functional.embedding_bag(rows, matrix, bags, mode="sum", per_sample_weights=weights)


def _has_extra(extra: RowGradients | None, block: slice) -> bool:
    return extra is not None and bool(((extra.features >= block.start) & (extra.features < block.stop)).any())


def _add_extra(d_enc: Tensor, d_dec: Tensor, extra: RowGradients, block: slice) -> None:
    # extra.features ascend, so a block's share is one slice
    first, last = torch.searchsorted(extra.features, torch.tensor([block.start, block.stop])).tolist()
    if first == last:
        return
    at = extra.features[first:last] - block.start
    d_enc.index_add_(0, at, extra.encoder[first:last])
    d_dec.index_add_(0, at, extra.W_dec[first:last])


def _adam_block(weight: Tensor, grad: Tensor, state: Adam, block: slice, rule: Rule) -> None:
    if state.m is None:
        fresh = None if state.fresh is None else state.fresh[block]
        adam_(weight, grad, Adam(None, state.v[block], state.step, fresh), rule)
        return
    torch.ops.aten._fused_adam_(
        [weight],
        [grad],
        [state.m[block]],
        [state.v[block]],
        [],
        [torch.tensor(float(state.step))],
        lr=rule.lr,
        beta1=rule.betas[0],
        beta2=rule.betas[1],
        weight_decay=0.0,
        eps=rule.eps,
        amsgrad=False,
        maximize=False,
    )
