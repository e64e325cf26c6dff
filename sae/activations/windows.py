"""Shuffled training batches from a store of any size, or live, through a buffer that is refilled slot by slot.

Guarantee: a batch draws on at least `min_sequences` effective sequences (1/Σp², p = a sequence's share of the batch)
where the store has them, through a buffer of `buffer_rows` rows; memory is that buffer and one slab. The order of rows
is a function of (seed, position): slabs are permuted anew each epoch by (seed, epoch), so many of them as fill the
buffer are a window, and the rows of a window come in an order given by (seed, window). A store that fits the buffer is
one window, permuted whole. The position is (window, offset), and resuming from it is exact. A batch holds the same rows
of every source. Live slabs come in the order of the text (spool.py). Every byte of a store is checked against its
checksum as it is read.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from sae.activations.batches import Batch, joined, permutation
from sae.activations.harvest import Block
from sae.activations.store import Source, Store
from sae.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SAMPLED = 32  # slabs that a sample of a store is taken from


class Slabs(Protocol):
    """What windows are made of: an endless sequence of slabs, each of at most `slab_rows` rows."""

    hooks: list[str]
    slab_rows: int

    def window(self, capacity: int) -> tuple[int, int]:
        """(slabs in a window of `capacity` rows, slots that it needs)."""
        ...

    def sequence(self, start: int, end: int, seed: int) -> list[int]:
        """The slabs at places start … end − 1."""
        ...

    def block(self, number: int, memory: Callable[[int], bytearray] = bytearray) -> Block:
        """A slab, with the rows that do not count."""
        ...


class StoreSource:
    """The valid rows of some sources of a store, by slab."""

    def __init__(self, store: Store, sources: Sequence[Source]):
        self.store, self.sources = store, sources
        self.hooks = [source.hook for source in sources]
        self.n_slabs = len(store.slabs)
        self.slab_rows = max(
            end - start for rows in set(store.shard_rows) for start, end in store.layouts[0].spans(rows)
        )

    @cached_property
    def n(self) -> int:
        """Rows that count."""
        readings = {source.reading for source in self.sources}
        if len(readings) == 1:
            return sum(entry.valid for entry in self.store.entries[readings.pop()])
        return sum(int(self.store.read(self.sources, slab).mask.sum()) for slab in range(self.n_slabs))

    def window(self, capacity: int) -> tuple[int, int]:
        # By the rows that count, which a slab has on average; a window that is not the whole store may span two epochs.
        slabs = max(1, min(self.n_slabs, math.ceil(capacity * self.n_slabs / max(1, self.n))))
        return slabs, self.store.n_rows if slabs == self.n_slabs else slabs * self.slab_rows

    def sequence(self, start: int, end: int, seed: int) -> list[int]:
        """In an order of its own in each epoch."""
        n = self.n_slabs
        orders = {epoch: permutation(n, seed, epoch).tolist() for epoch in range(start // n, (end - 1) // n + 1)}
        return [orders[at // n][at % n] for at in range(start, end)]

    def block(self, number: int, memory: Callable[[int], bytearray] = bytearray) -> Block:
        return self.store.read(self.sources, number, memory)

    def told(self, number: int, row: int) -> str:
        """A row of a slab, for a message."""
        block = self.block(number)
        shard, slab = self.store.slabs[number]
        start = self.store.layouts[0].spans(self.store.shard_rows[shard])[slab][0]
        file = self.store.place.named(self.store.entries[self.sources[0].reading][shard].file)
        place = f"document {int(block.doc[row]):,}, token {int(block.pos[row])} of its piece"
        return f"row {start + row:,} of {file} ({place})"

    def sample(self, n: int, seed: int) -> dict[str, Float[Tensor, "n d"]]:
        """Random rows of each hook, from up to SAMPLED slabs; the same for a seed."""
        generator = torch.Generator().manual_seed(seed)
        slabs = torch.randperm(self.n_slabs, generator=generator)[:SAMPLED].tolist()
        parts, left = [], n
        for i, number in enumerate(slabs):
            block = self.block(number)
            valid = block.mask.nonzero().flatten()
            rows = valid[torch.randperm(len(valid), generator=generator)[: -(-left // (len(slabs) - i))]]
            parts.append({hook: block.acts[hook][rows] for hook in self.hooks})
            left -= len(rows)
        return {hook: x.float() for hook, x in joined(parts).items()}

    def all(self, hook: str) -> Iterator[Float[Tensor, "n d"]]:
        """One pass over all rows of a hook."""
        source = self.sources[self.hooks.index(hook)]
        for number in range(self.n_slabs):
            block = self.store.read([source], number)
            yield block.acts[hook][block.mask]


def windows(
    source: Slabs, batch: int, capacity: int, seed: int, position: dict[str, Any] | None = None
) -> Iterator[Batch]:
    """Endless batches through a buffer of about `capacity` rows; a batch may span two windows.

    Rows of the next window are read into the slots that batches have emptied, so that a window is whole when its turn
    comes, and nothing is read twice or waited for. `position` goes on after that batch.
    """
    if position is not None and "window" not in position:
        raise UserError(
            "activations: this run began with an earlier version, whose order of rows is not this one's. "
            "Begin a new run."
        )
    a_window, slots = source.window(capacity)
    number, offset = (position["window"], position["offset"]) if position else (0, 0)
    buffer = _Buffer(source, slots)
    now, after = _Window(source, a_window, seed, number), _Window(source, a_window, seed, number + 1)
    buffer.fill(now)
    order = now.order()
    buffer.free(order[:offset])
    while True:
        parts, rows, missing = [], [], batch
        while missing:
            if offset == len(order):
                buffer.fill(after)
                number, offset = number + 1, 0
                now, after = after, _Window(source, a_window, seed, number + 1)
                order = now.order()
            slots = order[offset : offset + missing]
            offset, missing = offset + len(slots), missing - len(slots)
            parts.append(buffer.take(slots))
            rows.append(buffer.rows[slots])
            buffer.free(slots)
            buffer.fill(after, only_what_fits=True)
        position = {"window": number, "offset": offset, "slab": number * a_window}
        yield Batch(joined(parts), torch.cat(rows), position)


class _Window:
    """The slabs of one window, in the endless sequence of slabs, and where its rows are in the buffer."""

    def __init__(self, source: Slabs, slabs: int, seed: int, number: int):
        self.seed, self.number = seed, number
        self.waiting = deque(source.sequence(number * slabs, (number + 1) * slabs, seed))
        self.slots: list[Tensor] = []
        """Of the rows read so far, in the order of reading."""

    def order(self) -> Int[Tensor, " n"]:
        """The slots of its rows, as they are given out."""
        slots = torch.cat(self.slots)
        # Windows have their own stream of seeds, apart from the epochs'.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.number) ^ 0x5AE)
        return slots[torch.randperm(len(slots), generator=generator)]


class _Scratch:
    """Memory that one slab after another is read into: fresh memory for each would cost more than the reading, and
    leave the heap twice as large as the buffer."""

    def __init__(self):
        self.pieces: dict[tuple[int, int], bytearray] = {}
        self.taken: Counter[int] = Counter()

    def again(self) -> None:
        """Nobody needs what was read so far."""
        self.taken.clear()

    def __call__(self, size: int) -> bytearray:
        self.taken[size] += 1
        key = size, self.taken[size]
        if key not in self.pieces:
            self.pieces[key] = bytearray(size)
        return self.pieces[key]


class _Buffer:
    """Rows of each hook in slots; slots that batches have emptied are free."""

    def __init__(self, source: Slabs, slots: int):
        self.source = source
        self.rows = torch.zeros(slots, dtype=torch.int64)
        """Of each slot: slab · slab_rows + the row in it."""
        self.acts: dict[str, Tensor] = {}
        self.valid: dict[str, Tensor] = {}
        """The rows of the last slab that count: kept, so that no memory of this size comes and goes with every slab."""
        self.scratch = _Scratch()
        self.slots = slots
        self.empty: list[Tensor] = [torch.arange(slots)]
        self.n_empty = slots

    def take(self, slots: Int[Tensor, " n"]) -> dict[str, Tensor]:
        return {hook: acts.index_select(0, slots) for hook, acts in self.acts.items()}

    def free(self, slots: Int[Tensor, " n"]) -> None:
        self.empty.append(slots)
        self.n_empty += len(slots)

    def fill(self, window: _Window, only_what_fits: bool = False) -> None:
        """Read the window's slabs into free slots: all of them, or while there is room."""
        while window.waiting:
            if only_what_fits and self.n_empty < self.source.slab_rows:
                return
            self.scratch.again()
            number = window.waiting.popleft()
            block = self.source.block(number, self.scratch)
            if not self.acts:
                self.acts = {hook: x.new_empty(self.slots, x.shape[1]) for hook, x in block.acts.items()}
                self.valid = {hook: x.new_empty(self.source.slab_rows, x.shape[1]) for hook, x in block.acts.items()}
            rows = block.mask.nonzero().flatten()
            slots = self._claim(len(rows))
            self.rows[slots] = number * self.source.slab_rows + rows
            for hook, x in block.acts.items():
                self.acts[hook].index_copy_(0, slots, torch.index_select(x, 0, rows, out=self.valid[hook][: len(rows)]))
            window.slots.append(slots)

    def _claim(self, n: int) -> Int[Tensor, " n"]:
        parts = []
        self.n_empty -= n
        assert self.n_empty >= 0, "a window is not larger than the buffer"
        while n:  # those freed last: memory that was never needed is never touched
            free = self.empty.pop()
            parts.append(free[:n])
            if len(free) > n:
                self.empty.append(free[n:])
            n -= len(parts[-1])
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
