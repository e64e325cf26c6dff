"""encode_select on CUDA: the product (product.py), and then exact selections that read only the groups that matter.

TopK never waits for the host and can be captured in a CUDA graph. BatchTopK and Above find out how many entries there
are, which waits for the device once a call, or once a chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.codes import Codes, from_topk
from sae.kernels.encode_select import BatchTopK, Select, TopK
from sae.kernels.triton.product import GROUP, chunks
from sae.kernels.triton.tuned import FUSED

# Candidates of a row (k groups of 64) that one program keeps in registers without spills: k up to 128.
MOST = 8192


def encode_select(x: Tensor, encoder: Tensor, b_enc: Tensor, select: Select) -> Codes:
    """See sae/kernels/encode_select.py."""
    if isinstance(select, TopK):
        return _top_k(x, encoder, b_enc, select.k)
    if isinstance(select, BatchTopK):
        return _batch_top_k(x, encoder, b_enc, select.k)
    return _above(x, encoder, b_enc, select.floor)


def _top_k(x: Tensor, encoder: Tensor, b_enc: Tensor, k: int) -> Codes:
    """The k largest entries of a row lie in the k groups with the largest maxima (of equals, the first): otherwise k
    groups would each hold an entry that goes before. So one kernel finds these groups, another searches them."""
    B, F = x.shape[0], encoder.shape[0]
    G = triton.cdiv(F, GROUP)
    near = min(k, G)
    values = torch.empty(B, k, dtype=torch.float32, device=x.device)
    indices = torch.empty(B, k, dtype=torch.int64, device=x.device)
    groups = torch.empty(B, near, dtype=torch.int32, device=x.device)
    for start, product, maxima in chunks(x, encoder, b_enc):
        n = len(product)
        block = triton.next_power_of_2(G)
        _groups[(n,)](maxima, groups[start:], G, near, BLOCK=block, num_warps=_warps(block), **FUSED)
        block = triton.next_power_of_2(near) * GROUP
        if block > MOST:
            made = _first_of_groups(product, b_enc, groups[start : start + n], k)
            values[start : start + n], indices[start : start + n] = made
            continue
        _entries[(n,)](
            product, b_enc, groups[start:], values[start:], indices[start:], F, G, near, k,
            SIZE=GROUP, BLOCK=block, num_warps=_warps(block), **FUSED,
        )  # fmt: skip
    return from_topk(values.relu_(), indices, F)


def _warps(block: int) -> int:
    """Eight values a thread, within 4 and 16 warps."""
    return min(16, max(4, block // 256))


def _first_of_groups(product: Tensor, b_enc: Tensor, groups: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What _entries finds, by a sort of all candidates, which takes longer."""
    columns = (groups[:, :, None].long() * GROUP + torch.arange(GROUP, device=groups.device)).flatten(1)
    pre = product.gather(1, columns).float() + b_enc[columns.clamp_max(len(b_enc) - 1)]
    at = pre.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    return pre.gather(1, at), columns.gather(1, at)


@triton.jit
def _largest(values, k):
    """Mask of the k largest of a 1-D block; of equals, the first. The k-th is found bit by bit."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)  # −0 is 0
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    none = tl.min(tl.zeros_like(keys), 0)
    lowest = none - 2147483647 - 1
    kth = tl.where(tl.sum((keys >= 0).to(tl.int32), 0) >= k, none, lowest)
    for step in range(31):
        higher = kth + (1 << (30 - step))
        kth = tl.where(tl.sum((keys >= higher).to(tl.int32), 0) >= k, higher, kth)
    above, equal = keys > kth, keys == kth
    missing = k - tl.sum(above.to(tl.int32), 0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= missing))


@triton.jit
def _groups(maxima, groups, G, near, BLOCK: tl.constexpr):
    """One program a row: the `near` groups with the largest maxima, ascending."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    kept = _largest(tl.load(maxima + row * G + at, mask=at < G, other=float("-inf")), near) & (at < G)
    tl.store(groups + row * near + tl.cumsum(kept.to(tl.int32), 0) - 1, at, mask=kept)


@triton.jit
def _entries(
    product, b_enc, groups, values, indices, F, G, near, k, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program a row: the k largest pre-activations within the row's groups, ascending in their index."""
    row = tl.program_id(0).to(tl.int64)  # in the pointers at once: offsets of 32 bits save half the registers
    product, groups = product + row * G * SIZE, groups + row * near
    values, indices = values + row * k, indices + row * k
    at = tl.arange(0, BLOCK)
    there = at // SIZE < near
    columns = tl.load(groups + at // SIZE, mask=there, other=0) * SIZE + at % SIZE
    there = there & (columns < F)
    low = tl.load(product + columns, mask=there, other=0.0)
    pre = low.to(tl.float32) + tl.load(b_enc + columns, mask=there, other=0.0)
    pre = tl.where(there, pre, float("-inf"))
    kept = _largest(pre, k) & there
    to = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(values + to, pre, mask=kept)
    tl.store(indices + to, columns.to(tl.int64), mask=kept)


def _batch_top_k(x: Tensor, encoder: Tensor, b_enc: Tensor, k: int) -> Codes:
    """As _top_k, with the whole batch for a row: the B·k best groups so far go in front of the next chunk's."""
    B, F = x.shape[0], encoder.shape[0]
    G = triton.cdiv(F, GROUP)
    best = encoder.new_empty(0, GROUP)
    maxima, numbers = b_enc.new_empty(0), torch.empty(0, dtype=torch.int64, device=x.device)
    for start, product, summary in chunks(x, encoder, b_enc):
        maxima = torch.cat([maxima, summary.view(-1)])
        numbers = torch.cat([numbers, torch.arange(start * G, (start + len(product)) * G, device=x.device)])
        kept = _first_of_all(maxima, min(B * k, len(maxima)))
        old = int((kept < len(best)).sum())
        best = torch.cat([best[kept[:old]], product.view(-1, GROUP)[kept[old:] - len(best)]])
        maxima, numbers = maxima[kept], numbers[kept]
    pre = _pre(best, b_enc, numbers, F)
    if B * k < pre.numel():
        kept = torch.zeros(pre.numel(), dtype=torch.bool, device=x.device)
        kept[_first_of_all(pre.view(-1), B * k)] = True
        kept = kept.view_as(pre)
    else:
        kept = torch.ones_like(pre, dtype=torch.bool)
    return _codes([(pre, kept & (pre > 0), numbers)], B, F)


def _first_of_all(values: Tensor, n: int) -> Tensor:
    """Places of the n largest, ascending; of equals, the first."""
    kth = values.topk(n, sorted=False).values.amin()
    above, equal = values > kth, values == kth
    return (above | (equal & (equal.cumsum(0) <= n - above.sum()))).nonzero().squeeze(1)


def _above(x: Tensor, encoder: Tensor, b_enc: Tensor, floor: Tensor) -> Codes:
    B, F = x.shape[0], encoder.shape[0]
    G = triton.cdiv(F, GROUP)
    found = []
    floors = torch.nn.functional.pad(floor, (0, G * GROUP - F), value=float("inf")).view(G, GROUP)
    for start, product, counts in chunks(x, encoder, b_enc, floor):
        hot = counts.view(-1).nonzero().squeeze(1)
        pre = _pre(product.view(-1, GROUP)[hot], b_enc, hot, F)
        found.append((pre, pre > floors[hot % G], hot + start * G))
    return _codes(found, B, F)


def _pre(product: Tensor, b_enc: Tensor, numbers: Tensor, F: int) -> Tensor:
    """Pre-activations [m, 64] of groups by their number, row · G + group; columns beyond F stay −∞."""
    G = triton.cdiv(F, GROUP)
    biases = torch.nn.functional.pad(b_enc, (0, G * GROUP - F)).view(G, GROUP)
    return product.float() + biases[numbers % G]


def _codes(found: list[tuple[Tensor, Tensor, Tensor]], B: int, F: int) -> Codes:
    """Codes of the kept entries of groups, (pre [m, 64], kept [m, 64], numbers [m] ascending) for each chunk."""
    G = triton.cdiv(F, GROUP)
    values, rows, indices = [], [], []
    for pre, kept, numbers in found:
        group, member = kept.nonzero(as_tuple=True)
        values.append(pre[group, member])
        rows.append(numbers[group] // G)
        indices.append(numbers[group] % G * GROUP + member)
    row = torch.cat(rows)
    offsets = torch.searchsorted(row, torch.arange(B + 1, device=row.device))
    return Codes(torch.cat(values), torch.cat(indices), offsets, F)
