"""Shuffled training batches, from rows that are there (store, tensor, memmap) or live from a host.

Guarantee: a batch draws on at least `min_sequences` effective sequences (1/Σp², p = a sequence's share of the batch)
where the text has them. Rows that are there are permuted afresh each epoch by (seed, epoch): the position is (epoch,
offset), and resuming from it is exact. Live rows pass through a buffer that is refilled in place, no copies of it are
made; after a resume reading goes on where it was, into a buffer filled anew.
"""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from sae.activations.harvest import Block
from sae.activations.store import Store
from sae.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class RawBatch:
    acts: Float[Tensor, "B d"]
    """Raw, in the source's dtype."""
    position: dict[str, Any]
    """Where to resume after this batch."""


class Source(Protocol):
    """Rows that are there, by number."""

    n: int

    def take(self, rows: Int[Tensor, " n"]) -> Float[Tensor, "n d"]: ...


class TensorSource:
    """The user's own [N, d] tensor or memory-mapped array."""

    def __init__(self, acts):
        if getattr(acts, "ndim", 0) != 2 or len(acts) == 0:
            raise UserError(
                f"activations: shape {tuple(getattr(acts, 'shape', ()))}, expected [N, d] with N > 0. Reshape them."
            )
        with warnings.catch_warnings():  # a read-only memory map is only read here
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self.acts = acts.detach() if isinstance(acts, Tensor) else torch.from_numpy(acts)
        if not self.acts.dtype.is_floating_point:
            raise UserError(f"activations: dtype {self.acts.dtype}, expected floating point. Convert them.")
        self.n = self.acts.shape[0]

    def take(self, rows: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        return self.acts.index_select(0, rows)


class StoreSource:
    """The valid rows of one hook of a store."""

    def __init__(self, store: Store, hook: str):
        self.store, self.hook = store, hook
        self.valid = store.valid_rows()
        self.n = self.valid.shape[0]

    def take(self, rows: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        return self.store.take(self.hook, self.valid[rows])


def sample(source: Source, n: int, seed: int) -> Float[Tensor, "n d"]:
    """Random rows, float32; the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(source.n, generator=generator)[:n]
    return source.take(rows.sort().values).float()


def shuffled(source: Source, batch: int, seed: int, position: dict[str, Any] | None = None) -> Iterator[RawBatch]:
    """Endless batches over fresh permutations; a batch may span two epochs. `position` goes on after that batch."""
    epoch, offset = (position["epoch"], position["offset"]) if position else (0, 0)
    order = _order(source.n, seed, epoch)
    while True:
        parts, missing = [], batch
        while missing:
            if offset == source.n:
                epoch, offset = epoch + 1, 0
                order = _order(source.n, seed, epoch)
            rows = order[offset : offset + missing]
            offset, missing = offset + len(rows), missing - len(rows)
            parts.append(rows)
        # Sorted rows read the memory map in order; which row is which within a batch does not matter.
        rows = torch.cat(parts).sort().values
        yield RawBatch(source.take(rows), {"epoch": epoch, "offset": offset})


def _order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def buffer_rows(min_sequences: int, batch: int, context: int) -> int:
    """Slots of a live buffer that give `min_sequences` effective sequences a batch.

    A batch of B rows drawn from C slots filled by sequences of `context` rows has 1/Σp² = 1/(1/B + context/C).
    """
    if min_sequences >= batch:
        raise UserError(
            f"activations.min_sequences: {min_sequences:,} is not below the batch of {batch:,}. "
            "Lower it or raise training.batch."
        )
    return int(context / (1 / min_sequences - 1 / batch)) + batch


def live(
    blocks: Callable[[int], Iterator[Block]],
    hook: str,
    batch: int,
    capacity: int,
    seed: int,
    position: dict[str, Any] | None = None,
) -> Iterator[RawBatch]:
    """Endless batches from a stream that is begun again when it ends, through a buffer of `capacity` rows.

    Slots are drawn without replacement and refilled in place with the next rows of the stream.
    blocks    called with how many blocks of the text to skip
    position  of an earlier batch: reading goes on where it had come to, into a buffer filled anew
    """
    at, draws = (position["block"], position["draws"]) if position else (0, 0)
    generator = torch.Generator().manual_seed(seed + draws)
    rows = _Rows(blocks, hook, at)
    buffer = _fill(rows, capacity)
    if buffer.shape[0] < batch:
        raise UserError(
            f"the text gives {buffer.shape[0]:,} activations, fewer than a batch of {batch:,}. Lower training.batch."
        )
    while True:
        slots = torch.randperm(buffer.shape[0], generator=generator)[:batch]
        draws += 1
        yield RawBatch(buffer[slots], {"block": rows.block, "draws": draws})
        buffer[slots] = _next_rows(rows, batch)


class _Rows:
    """The valid rows of an endless stream of blocks, in pieces of any size."""

    def __init__(self, blocks: Callable[[int], Iterator[Block]], hook: str, block: int):
        self.blocks, self.hook, self.block = blocks, hook, block
        self.stream = blocks(block)
        self.rest: Tensor | None = None
        self.passes = 0

    def more(self) -> Tensor:
        block = next(self.stream, None)
        if block is None:
            self.passes, self.block = self.passes + 1, 0
            self.stream = self.blocks(0)
            block = next(self.stream, None)
            if block is None:
                raise UserError("the text source is empty. Check the source.")
        self.block += 1
        return block.acts[self.hook][block.mask]


def _next_rows(rows: _Rows, n: int) -> Tensor:
    parts = []
    while n:
        piece = rows.rest if rows.rest is not None and len(rows.rest) else rows.more()
        parts.append(piece[:n])
        rows.rest = piece[n:]
        n -= len(parts[-1])
    return torch.cat(parts)


def _fill(rows: _Rows, capacity: int) -> Tensor:
    """The next `capacity` rows, or all of a shorter text (which then is in the buffer once)."""
    parts, n, first = [], 0, rows.block
    while n < capacity:
        piece = rows.more()
        if rows.passes > 1 or (rows.passes == 1 and rows.block > first):  # once round
            rows.rest = piece
            break
        parts.append(piece[: capacity - n])
        rows.rest = piece[capacity - n :]
        n += len(parts[-1])
    return torch.cat(parts)


_END = object()


def prefetched(items: Iterator[RawBatch], depth: int = 2) -> Generator[RawBatch]:
    """The same items, made up to `depth` ahead in a thread; an error there is raised here."""
    made: queue.Queue = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(item) -> bool:
        while not closed.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((_END, None))
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, whatever it is
            put((_END, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        closed.set()
        thread.join(timeout=10)
