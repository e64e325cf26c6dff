"""Which features fire, and how strongly: the encoder's product and the selection, in one go.

The [B, F] matrix of pre-activations is never held: rows go in chunks, only the codes are kept. On CPU a chunk's
product stays in the cache, and the selection reads group maxima first: the k largest entries lie in the k groups
with the largest maxima, so only those groups are searched (exact with respect to the product's own numbers).

A pre-activation is float32(product in the encoder's dtype) + b_enc, the sum in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.codes import Codes, from_topk

if TYPE_CHECKING:
    from jaxtyping import Float

# Rows in a chunk: at F = 16,384 a bf16 chunk of 8 MB stays in a 32 MB cache.
CHUNK = 256


@dataclass(frozen=True)
class TopK:
    """The k largest of each row; those that are not positive are kept with value 0, so every row has k entries."""

    k: int


@dataclass(frozen=True)
class BatchTopK:
    """The B·k largest positive entries of the whole batch (fewer where fewer are positive)."""

    k: int


@dataclass(frozen=True)
class Above:
    """Every entry above its feature's floor; values are the pre-activations as they are, negative ones too."""

    floor: Float[Tensor, " F"]


Select = TopK | BatchTopK | Above


def encode_select(
    x: Float[Tensor, "B d"],
    encoder: Float[Tensor, "F d"],
    b_enc: Float[Tensor, " F"],
    select: Select,
    *,
    implementation: str | None = None,
) -> Codes:
    """Codes of the entries of x·encoderᵀ + b_enc that `select` keeps.

    x         already centred (b_dec subtracted where the architecture does); cast to the encoder's dtype
    encoder   rows are features, contiguous; bfloat16 gives a bfloat16 product with float32 accumulation
    returns   codes with float32 values, features ascending within a row; the same from run to run, ties too
    memory    one chunk of rows and features, never [B, F]
    """
    if implementation == "plain" or x.device.type != "cpu":
        return _plain(x, encoder, b_enc, select)
    if isinstance(select, TopK):
        return _cpu_topk(x, encoder, b_enc, select.k)
    return _plain(x, encoder, b_enc, select)


def _plain(x: Tensor, encoder: Tensor, b_enc: Tensor, select: Select) -> Codes:
    pre = (x.to(encoder.dtype) @ encoder.T).float() + b_enc
    B, F = pre.shape
    if isinstance(select, TopK):
        indices = pre.topk(select.k, dim=1).indices.sort(dim=1).values
        return from_topk(pre.gather(1, indices).relu(), indices, F)
    if isinstance(select, BatchTopK):
        flat = pre.flatten()
        kept = torch.zeros(B * F, dtype=torch.bool, device=pre.device)
        kept[flat.topk(min(B * select.k, B * F)).indices] = True
        kept = (kept & (flat > 0)).view(B, F)
    else:
        kept = pre > select.floor
    rows, indices = kept.nonzero(as_tuple=True)
    offsets = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    return Codes(pre[rows, indices], indices, offsets, F)


def _cpu_topk(x: Tensor, encoder: Tensor, b_enc: Tensor, k: int) -> Codes:
    B, F = x.shape[0], encoder.shape[0]
    x = x.to(encoder.dtype)
    values = torch.empty(B, k, dtype=torch.float32)
    indices = torch.empty(B, k, dtype=torch.int64)
    product = torch.empty(min(B, CHUNK), F, dtype=encoder.dtype)
    pre = torch.empty(min(B, CHUNK), F)
    for start in range(0, B, CHUNK):
        rows = slice(start, min(start + CHUNK, B))
        n = rows.stop - start
        torch.mm(x[rows], encoder.T, out=product[:n])
        torch.add(product[:n], b_enc, out=pre[:n])
        at = top_in_groups(pre[:n], k)[1].sort(dim=1).values
        values[rows] = pre[:n].gather(1, at)
        indices[rows] = at
    return from_topk(values.relu_(), indices, F)


def top_in_groups(pre: Float[Tensor, "n F"], k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row with their indices, unordered; exactly torch.topk's values.

    A group is every G-th column, so that the maxima are one vectorised pass over contiguous memory.
    """
    n, F = pre.shape
    size = group_size(F, k)
    if size < 4:
        return pre.topk(k, dim=1, sorted=False)
    G = F // size
    groups = pre.view(n, size, G)
    best = groups.amax(dim=1).topk(k, dim=1, sorted=False).indices
    candidates = groups.gather(2, best.unsqueeze(1).expand(n, size, k)).view(n, size * k)
    top, at = candidates.topk(k, dim=1, sorted=False)
    member, group = at // k, best.gather(1, at % k)
    return top, member * G + group


def group_size(F: int, k: int) -> int:
    """Columns in a group: a power of two near sqrt(F/k), which balances maxima and candidates; 1 = search all."""
    size = 1
    while F % (2 * size) == 0 and (2 * size) ** 2 <= 2 * F // max(k, 1) and F // (2 * size) >= 2 * k:
        size *= 2
    return size
