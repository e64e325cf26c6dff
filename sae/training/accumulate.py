"""Several batches' work as one: their update is that of one batch as large as all of them together.

Exact for losses that are means over rows. AuxK is normalised by its batch's residual, so its share is the mean of the
batches' gradients; what a batch selects among its own rows (BatchTopK) stays that batch's. Costs the memory of all
the batches' work at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from sae.codes import Codes
from sae.kernels import EveryRow, RowGradients, Work
from sae.objectives.terms import Losses


def joined(works: Sequence[Work]) -> Work:
    """One batch's work from that of n batches of equal size, made with the same weights."""
    if len(works) == 1:
        return works[0]
    first, n = works[0], len(works)
    return Work(
        codes=_codes([work.codes for work in works]),
        inputs=torch.cat([work.inputs for work in works]),
        error=torch.cat([work.error for work in works], dim=1).div_(n),
        value_grads=torch.cat([work.value_grads for work in works]).div_(n),
        levels=first.levels,
        subtracts_b_dec=first.subtracts_b_dec,
        extra=_extra([work.extra for work in works if work.extra is not None], n),
        every=_every([work.every for work in works if work.every is not None], n),
        vectors={name: _mean([work.vectors[name] for work in works]) for name in first.vectors},
    )


def mean_losses(losses: Sequence[Losses]) -> Losses:
    """The means of n batches' losses; a feature has fired if it fired in any of them."""
    if len(losses) == 1:
        return losses[0]
    first = losses[0]
    means = {
        field.name: _mean([getattr(one, field.name) for one in losses])
        for field in fields(Losses)
        if field.name not in ("fired", "more") and getattr(first, field.name) is not None
    }
    fired = None if first.fired is None else torch.stack([one.fired for one in losses if one.fired is not None]).any(0)
    return Losses(**means, fired=fired, more={name: _mean([one.more[name] for one in losses]) for name in first.more})


def _codes(parts: list[Codes]) -> Codes:
    offsets, entries = [parts[0].offsets], parts[0].values.numel()
    for part in parts[1:]:
        offsets.append(part.offsets[1:] + entries)
        entries += part.values.numel()
    values, indices = torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
    return Codes(values, indices, torch.cat(offsets), parts[0].n_features)


def _extra(parts: list[RowGradients], n: int) -> RowGradients | None:
    if not parts:
        return None
    features, place = torch.cat([part.features for part in parts]).unique(return_inverse=True)

    def total(name: str) -> Tensor:
        rows = torch.cat([getattr(part, name) for part in parts])
        return rows.new_zeros(len(features), *rows.shape[1:]).index_add_(0, place, rows).div_(n)

    return RowGradients(features, total("encoder"), total("W_dec"), total("b_enc"))


def _every(parts: list[EveryRow], n: int) -> EveryRow | None:
    """along_inputs follows from the weights alone, so that the sum over batches is of rank one again."""
    if not parts:
        return None
    inputs_sum = torch.stack([part.inputs_sum for part in parts]).sum(0).div_(n)
    return EveryRow(_mean([part.along_decoder for part in parts]), parts[0].along_inputs, inputs_sum)


def _mean(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).mean(0)
