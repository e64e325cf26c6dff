"""Which features fire, and how strongly: the encoder's product and the selection, in one go.

The [B, F] matrix of pre-activations is never held: the product is made in tiles of rows and features that stay in the
cache, each tile is searched while it is there, and only what may still be selected is kept. TopK keeps the k best of
each row so far; BatchTopK keeps what is above a floor that at least B·k entries are known to reach, and raises it as
more are found; so both are exact with respect to the product's own numbers, ties too: the lower index wins, in
BatchTopK the lower row before it.

A pre-activation is float32(product in the encoder's dtype) + b_enc, the sum in float32.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.codes import Codes, from_topk
from sae.kernels import triton
from sae.kernels.native import call, native

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Rows and bytes of a tile of products: measured on 2 cores with 32 MB of cache at d = 576. More rows repay the packing
# of the weights that every product begins with; a larger tile leaves the cache before it is searched.
ROWS, TILE_BYTES = 1024, 8 << 20
TORCH_ROWS = 256  # without the C kernels merging tiles of features costs more than the packing
_ENTRIES = 1 << 16  # room for what is above the floors in a tile; more is made where they are more


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
    memory    the codes, one tile of products (8 MB on CPU) and for BatchTopK some 3·B·k entries; never [B, F]
    """
    if implementation is None and len(x) and triton.takes(encoder):
        from sae.kernels.triton.encode_select import encode_select as on_cuda

        return on_cuda(x, encoder, b_enc, select)
    if implementation == "plain" or not len(x):
        return _plain(x, encoder, b_enc, select)
    x = x.to(encoder.dtype)
    if isinstance(select, TopK):
        return _topk(x, encoder, b_enc, select.k)
    if isinstance(select, BatchTopK):
        return _batch_topk(x, encoder, b_enc, select.k)
    return _above(x, encoder, b_enc, select.floor)


def _plain(x: Tensor, encoder: Tensor, b_enc: Tensor, select: Select) -> Codes:
    pre = (x.to(encoder.dtype) @ encoder.T).float() + b_enc
    B, F = pre.shape
    if isinstance(select, TopK):
        ranked = pre.sort(dim=1, descending=True, stable=True).indices
        indices = ranked[:, : select.k].sort(dim=1).values
        return from_topk(pre.gather(1, indices).relu(), indices, F)
    if isinstance(select, BatchTopK):
        flat = pre.flatten()
        kept = torch.zeros(B * F, dtype=torch.bool, device=pre.device)
        kept[flat.sort(descending=True, stable=True).indices[: B * select.k]] = True
        kept = (kept & (flat > 0)).view(B, F)
    else:
        kept = pre > select.floor
    rows, indices = kept.nonzero(as_tuple=True)
    offsets = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    return Codes(pre[rows, indices], indices, offsets, F)


@dataclass(frozen=True)
class Tile:
    """Products of some rows and features; they and pre() are valid until the next tile is made."""

    product: Tensor
    bias: Float[Tensor, " w"]
    start: int
    """The first row."""
    first: int
    """The first feature."""

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.product.shape[0])

    def pre(self) -> Float[Tensor, "n w"]:
        out = _memory("pre", self.product.numel(), self.bias).view(self.product.shape)
        return out.copy_(self.product).add_(self.bias)

    def is_native(self) -> bool:
        kinds = (torch.float32, torch.bfloat16)
        return self.product.device.type == "cpu" and self.product.dtype in kinds and native() is not None

    def as_arguments(self) -> tuple[Tensor | int, ...]:
        return self.product, self.product.dtype == torch.bfloat16, *self.product.shape, self.bias


_held = threading.local()


def _tiles(x: Tensor, encoder: Tensor, b_enc: Tensor) -> Iterator[Tile]:
    """Every product once, all rows for some features before the next ones.

    Each thread of Python holds one tile's memory for good: fresh pages at every step cost more than the selection.
    """
    rows = max(1, min(x.shape[0], ROWS if native() is not None else TORCH_ROWS))
    width = max(1, min(encoder.shape[0], TILE_BYTES // (rows * encoder.element_size())))
    memory = _memory("product", rows * width, encoder)
    for first in range(0, encoder.shape[0], width):
        part, bias = encoder[first : first + width], b_enc[first : first + width].float()
        for start in range(0, x.shape[0], rows):
            inputs = x[start : start + rows]
            n, w = inputs.shape[0], part.shape[0]
            product = torch.mm(inputs, part.T, out=memory[: n * w].view(n, w))
            yield Tile(product, bias, start, first)


def _memory(name: str, size: int, like: Tensor) -> Tensor:
    held = vars(_held).get(name)
    if held is None or held.dtype != like.dtype or held.device != like.device or len(held) < size:
        held = torch.empty(size, dtype=like.dtype, device=like.device)
        setattr(_held, name, held)
    return held[:size]


def _topk(x: Tensor, encoder: Tensor, b_enc: Tensor, k: int) -> Codes:
    B, F = x.shape[0], encoder.shape[0]
    k = min(k, F)
    values = torch.empty(B, k, device=x.device)
    indices = torch.empty(B, k, dtype=torch.int64, device=x.device)
    for tile in _tiles(x, encoder, b_enc):
        best, at = values[tile.rows], indices[tile.rows]
        if tile.is_native():
            scratch = torch.empty(torch.get_num_threads(), 2 * (k + tile.product.shape[1] + 16), dtype=torch.int32)
            call("select_topk", *tile.as_arguments(), tile.first, k, best, at, scratch)
        else:
            _merge(best, at, min(k, tile.first), tile, k)
    return from_topk(values.relu_(), indices, F)


def _merge(best: Tensor, at: Tensor, filled: int, tile: Tile, k: int) -> None:
    """Put the k best of the first `filled` columns and of the tile into best and at, in place."""
    found, where = exact_topk(tile.pre(), min(k, tile.product.shape[1]))
    values = torch.cat([best[:, :filled], found], 1)
    indices = torch.cat([at[:, :filled], where + tile.first], 1)
    kept = values.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    best[:, : kept.shape[1]] = values.gather(1, kept)
    at[:, : kept.shape[1]] = indices.gather(1, kept)


def exact_topk(pre: Float[Tensor, "n w"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest of each row, columns ascending; among equal ones the lower column, which torch.topk ignores."""
    kth = top_in_groups(pre, k).amin(1, keepdim=True)
    if kth.isnan().any():  # NaN counts as the largest
        return exact_topk(pre.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf), k)
    rows, columns = (pre >= kth).nonzero(as_tuple=True)
    values = pre[rows, columns]
    equal = values == kth[rows, 0]
    spare = k - torch.zeros(len(pre), dtype=torch.int64, device=pre.device).index_add_(0, rows, (~equal).long())
    rank = equal.cumsum(0)  # among the equal ones of all rows; from it goes what the rows before have
    before = torch.zeros_like(spare).index_add_(0, rows, equal.long()).cumsum(0).roll(1)
    before[0] = 0
    kept = ~equal | (rank - before[rows] <= spare[rows])
    return values[kept].view(-1, k), columns[kept].view(-1, k)


def top_in_groups(pre: Float[Tensor, "n F"], k: int) -> Float[Tensor, "n k"]:
    """The k largest values of each row: they lie in the k groups with the largest maxima.

    A group is every G-th column, so that the maxima are one vectorised pass over contiguous memory.
    """
    n, F = pre.shape
    size = group_size(F, k)
    if size < 4:
        return pre.topk(k, dim=1, sorted=False).values
    groups = pre.view(n, size, F // size)
    best = groups.amax(dim=1).topk(k, dim=1, sorted=False).indices
    candidates = groups.gather(2, best.unsqueeze(1).expand(n, size, k)).view(n, size * k)
    return candidates.topk(k, dim=1, sorted=False).values


def group_size(F: int, k: int) -> int:
    """Columns in a group: a power of two near sqrt(F/k), which balances maxima and candidates; 1 = search all."""
    size = 1
    while F % (2 * size) == 0 and (2 * size) ** 2 <= 2 * F // max(k, 1) and F // (2 * size) >= 2 * k:
        size *= 2
    return size


@dataclass(frozen=True)
class Entries:
    """Entries of pre-activations; those of one row stand in the order of their features."""

    values: Float[Tensor, " n"]
    rows: Int[Tensor, " n"]
    features: Int[Tensor, " n"]

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, chosen: Tensor) -> Entries:
        return Entries(self.values[chosen], self.rows[chosen], self.features[chosen])

    def codes(self, n_rows: int, n_features: int) -> Codes:
        # int32 keys: the radix sort of torch.sort
        ordered = self[self.rows.to(torch.int32).sort(stable=True).indices]
        offsets = torch.bincount(self.rows, minlength=n_rows).cumsum(0)
        return Codes(ordered.values, ordered.features, torch.nn.functional.pad(offsets, (1, 0)), n_features)


def _joined(parts: list[Entries]) -> Entries:
    return Entries(
        torch.cat([part.values for part in parts]),
        torch.cat([part.rows for part in parts]),
        torch.cat([part.features for part in parts]),
    )


def _entries(tile: Tile, floor: Float[Tensor, " w"]) -> Entries:
    """The tile's entries above their feature's floor."""
    if not tile.is_native():
        pre = tile.pre()
        rows, columns = (pre > floor).nonzero(as_tuple=True)
        return Entries(pre[rows, columns], rows + tile.start, columns + tile.first)
    width, capacity, found = tile.product.shape[1], _ENTRIES, torch.zeros(1, dtype=torch.int64)
    scratch = torch.empty(torch.get_num_threads(), 2 * width, dtype=torch.int32)
    while True:
        values = torch.empty(capacity)
        rows, features = torch.empty(2, capacity, dtype=torch.int64)
        where = (tile.first, tile.start, capacity, values, rows, features)
        call("select_above", *tile.as_arguments(), floor, *where, found, scratch)
        n = int(found)
        if n <= capacity:
            return Entries(values[:n].clone(), rows[:n].clone(), features[:n].clone())  # and let the room go
        capacity = n


def _above(x: Tensor, encoder: Tensor, b_enc: Tensor, floor: Tensor) -> Codes:
    parts = []
    for tile in _tiles(x, encoder, b_enc):
        parts.append(_entries(tile, floor[tile.first : tile.first + tile.product.shape[1]].float()))
    return _joined(parts).codes(x.shape[0], encoder.shape[0])


def _batch_topk(x: Tensor, encoder: Tensor, b_enc: Tensor, k: int) -> Codes:
    B, F = x.shape[0], encoder.shape[0]
    budget = min(B * k, B * F)
    floor = _below(_guess(x, encoder, b_enc, k))
    found = _reaching(floor, x, encoder, b_enc, budget)
    if floor > 0 and len(found) < budget:  # guessed too high, so the product is made again
        found = _reaching(0.0, x, encoder, b_enc, budget)
    return _largest(found, budget, F).codes(B, F)


def _reaching(floor: float, x: Tensor, encoder: Tensor, b_enc: Tensor, budget: int) -> Entries:
    """Entries above the floor; only the `budget` largest and few others are kept when there are more than twice."""
    parts, total = [], 0
    for tile in _tiles(x, encoder, b_enc):
        parts.append(_entries(tile, torch.full_like(tile.bias, floor)))
        total += len(parts[-1])
        if total > 2 * budget:
            parts, total = [_largest(_joined(parts), budget, encoder.shape[0])], budget
            floor = _below(parts[0].values.amin())  # its equals in later tiles may stand before it
    return _joined(parts)


def _guess(x: Tensor, encoder: Tensor, b_enc: Tensor, k: int) -> Tensor:
    """What some 1.5·B·k entries reach, by some 64 of the rows."""
    sample = x[:: max(1, len(x) // 64)]
    values = _topk(sample, encoder, b_enc, 4 * k).values
    return values.topk(min(len(sample) * k * 3 // 2 + 1, len(values)), sorted=False).values.amin()


def _below(value: Tensor) -> float:
    """The next smaller float32, at least 0."""
    return max(0.0, value.nextafter(torch.full_like(value, -torch.inf)).item())


def _largest(entries: Entries, budget: int, F: int) -> Entries:
    """The `budget` largest; among equal ones the first in the order of rows and features."""
    if len(entries) <= budget:
        return entries
    smallest = entries.values.topk(budget, sorted=False).values.amin()
    kept = entries.values > smallest
    tied = (entries.values == smallest).nonzero()[:, 0]
    position = entries.rows[tied] * F + entries.features[tied]
    kept[tied[position.topk(budget - int(kept.sum()), largest=False).indices]] = True
    return entries[kept]
