"""update_rows on CUDA: one program a feature and matrix, which sums its gradient and uses it at once.

A feature that fires in more than LIMIT rows would be a long tail of one program. Its entries are cut into parts of
LIMIT first, which another kernel sums side by side: at most 2·nnz/LIMIT parts, whatever the codes, so that shapes never
change.
Where the encoder has a bfloat16 copy, gradients are summed (in float32) from bfloat16 copies of inputs and error: the
inputs are what the product read, the error is rounded to 8 bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.kernels.by_feature import ByFeature
from sae.kernels.triton.tuned import FUSED, settings
from sae.kernels.update_rows import Adam, Rule
from sae.kernels.work import Work

LIMIT = 256


def update_rows(
    encoder: Tensor,
    W_dec: Tensor,
    encoder_low: Tensor | None,
    moments: tuple[Adam, Adam],
    work: Work,
    transposed: ByFeature,
    rule: Rule,
) -> Tensor:
    """See sae/kernels/update_rows.py."""
    F = encoder.shape[0]
    gathered = torch.float32 if encoder_low is None else encoder_low.dtype
    inputs, error = work.inputs.to(gathered).contiguous(), work.error.to(gathered).contiguous()
    slots, extra, every = None, work.extra, work.every
    if extra is not None:
        numbers = torch.arange(extra.features.shape[0], dtype=torch.int32, device=encoder.device)
        slots = torch.full((F,), -1, dtype=torch.int32, device=encoder.device).scatter_(0, extra.features, numbers)
    parts = _parts(transposed, work.codes.values.shape[0])
    squared = _matrix(
        encoder, encoder_low, moments[0], inputs, work.value_grads, transposed, parts, (F,), rule, False,
        slots, extra and extra.encoder, every and every.along_inputs, every and every.inputs_sum,
    )  # fmt: skip
    return squared + _matrix(
        W_dec, None, moments[1], error, work.codes.values, transposed, parts, work.levels, rule, rule.unit_norm,
        slots, extra and extra.W_dec, every and every.along_decoder, None,
    )  # fmt: skip


def _parts(transposed: ByFeature, nnz: int) -> tuple[Tensor, Tensor] | None:
    """Where the parts of each feature begin [F+1] and whose each part is; None where none can be needed."""
    if nnz <= LIMIT:
        return None
    counts = transposed.offsets.diff()
    needed = torch.where(counts > LIMIT, (counts + LIMIT - 1) // LIMIT, 0)
    begins = torch.nn.functional.pad(needed.cumsum(0), (1, 0))
    every_part = torch.arange(2 * nnz // LIMIT, device=begins.device)
    return begins, torch.searchsorted(begins[1:], every_part, right=True)


def _matrix(
    weight, low, moments: Adam, gathered, coefficients, transposed, parts, levels, rule: Rule, unit_norm, slots, extra,
    along, direction,
) -> Tensor:  # fmt: skip
    """Update one matrix; returns the squared norm of its gradient."""
    F, d = weight.shape
    begins = sums = None
    options = settings("update_rows", d) | {"BLOCK_D": triton.next_power_of_2(d)}
    sources = (coefficients, gathered, transposed.order, transposed.rows, transposed.offsets)
    shape = {"BATCH": gathered.shape[-2], "d": d, "ENDS": levels, **options, **FUSED}
    if parts is not None:
        begins, owners = parts
        sums = torch.empty(owners.shape[0], d, device=weight.device)
        _part[(owners.shape[0],)](*sources, begins, owners, sums, F, PART=LIMIT, **shape)
    squared = torch.zeros(F, device=weight.device)
    _update[(F,)](
        *sources, begins, sums, slots, extra, along, direction,
        weight, low, moments.m, moments.v, moments.fresh, _rates(moments, rule, weight.device), squared,
        1 - rule.betas[0], rule.betas[1], 1 - rule.betas[1], math.log2(rule.betas[1]), rule.eps,
        UNIT_NORM=unit_norm, **shape,
    )  # fmt: skip
    return squared.sum()


def _rates(moments: Adam, rule: Rule, device: torch.device) -> Tensor:
    """[rate / (1 − β1^t), 1 − β2^t, scale, t] on the device, whether rate, scale and t are numbers or tensors there."""
    beta1, beta2 = rule.betas
    lr, scale, step = (
        value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device=device)
        for value in (rule.lr, rule.scale, moments.step)
    )
    step = step.double()  # 1 − 0.999 keeps only four digits in float32
    return torch.stack([lr.double() / (1 - beta1**step), 1 - beta2**step, scale.double(), step]).float()


@triton.jit
def _sum(coefficients, gathered, order, rows, first, last, columns, d, BLOCK_T: tl.constexpr):
    """Σ coefficient · row of `gathered` over the sorted entries first:last, float32."""
    total = tl.zeros(columns.shape, tl.float32)
    for entry in range(first, last, BLOCK_T):
        entries = entry + tl.arange(0, BLOCK_T)
        there = entries < last
        row = tl.load(rows + entries, mask=there, other=0)
        by = tl.load(coefficients + tl.load(order + entries, mask=there, other=0), mask=there, other=0.0)
        mask = there[:, None] & (columns < d)[None, :]
        tile = tl.load(gathered + row[:, None] * d + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(by[:, None] * tile.to(tl.float32), 0)
    return total


@triton.jit
def _of_level(gathered, feature, BATCH, d, ENDS: tl.constexpr):
    """The error that `feature` sees: that of the first level whose end is above it."""
    level = feature * 0
    for g in tl.static_range(len(ENDS) - 1):
        level += (feature >= ENDS[g]).to(level.dtype)
    return gathered + level * BATCH * d


@triton.jit
def _part(
    coefficients, gathered, order, rows, offsets, begins, owners, sums, F, BATCH, d,
    PART: tl.constexpr, ENDS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a part: at most PART entries of one feature."""
    part = tl.program_id(0).to(tl.int64)
    if part < tl.load(begins + F):
        feature = tl.load(owners + part)
        columns = tl.arange(0, BLOCK_D)
        first = tl.load(offsets + feature) + (part - tl.load(begins + feature)) * PART
        last = tl.minimum(first + PART, tl.load(offsets + feature + 1))
        gathered = _of_level(gathered, feature, BATCH, d, ENDS)
        total = _sum(coefficients, gathered, order, rows, first, last, columns, d, BLOCK_T)
        tl.store(sums + part * d + columns, total, mask=columns < d)


@triton.jit
def _update(
    coefficients, gathered, order, rows, offsets, begins, sums, slots, extra, along, direction,
    weight, low, m, v, fresh, rates, squared, one_less_beta1, beta2, one_less_beta2, log2_beta2, eps, BATCH, d,
    ENDS: tl.constexpr, UNIT_NORM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a feature: gradient, projection, Adam, unit norm, low copy. Arguments that are None cost nothing."""
    feature = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < d
    begin, last = tl.load(offsets + feature), tl.load(offsets + feature + 1)
    moves = fresh is None or along is not None
    if not moves:
        moves = last > begin
    if slots is not None:
        slot = tl.load(slots + feature).to(tl.int64)
        moves = moves | (slot >= 0)
    if moves:
        at = feature * d + columns
        w = tl.load(weight + at, mask=inside, other=0.0)
        alone = last
        if begins is not None:
            part, end = tl.load(begins + feature), tl.load(begins + feature + 1)
            alone = tl.where(end > part, begin, last)
        gathered = _of_level(gathered, feature, BATCH, d, ENDS)
        grad = _sum(coefficients, gathered, order, rows, begin, alone, columns, d, BLOCK_T)
        if begins is not None:
            for row in range(part, end):
                grad += tl.load(sums + row * d + columns, mask=inside, other=0.0)
        if slots is not None:  # noqa: SIM102 - decided when this is compiled
            if slot >= 0:
                grad += tl.load(extra + slot * d + columns, mask=inside, other=0.0)
        if along is not None:
            by = tl.load(along + feature)
            if direction is None:
                grad += by * w
            else:
                grad += by * tl.load(direction + columns, mask=inside, other=0.0)
        if UNIT_NORM:
            grad -= tl.sum(grad * w, 0) * w
        tl.store(squared + feature, tl.sum(grad * grad, 0))
        grad *= tl.load(rates + 2)
        second = tl.load(v + at, mask=inside, other=0.0)
        if m is not None:
            first = tl.load(m + at, mask=inside, other=0.0)
        if fresh is not None:  # v decayed in the steps that this row sat out
            step = tl.load(rates + 3)
            missed = step - 1 - tl.load(fresh + feature).to(tl.float32)
            second *= tl.exp2(missed * log2_beta2)
        tl.debug_barrier()  # threads may hold copies of one element: all have read before any writes
        if fresh is not None:
            tl.store(fresh + feature, step.to(tl.int32))
        second = second * beta2 + one_less_beta2 * grad * grad
        tl.store(v + at, second, mask=inside)
        if m is not None:
            grad = first + one_less_beta1 * (grad - first)
            tl.store(m + at, grad, mask=inside)
        w -= tl.load(rates) * grad / (tl.sqrt_rn(second / tl.load(rates + 1)) + eps)
        if UNIT_NORM:
            w /= tl.sqrt_rn(tl.sum(w * w, 0))
        tl.store(weight + at, w, mask=inside)
        if low is not None:
            tl.store(low + at, w.to(low.dtype.element_ty), mask=inside)
