"""Training batches: what they are, how they are checked, normed and fetched ahead; shuffled ones of rows in memory.

Rows in memory (tensor, memmap) are permuted afresh each epoch by (seed, epoch): the position is (epoch, offset), and
resuming from it is exact. Of a store, or live from a host: windows.py. A batch holds the same rows of every hook.
"""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from sae.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    acts: dict[str, Float[Tensor, "B d"]]
    """By hook, the same rows of each: raw in the source's dtype as they are drawn, `normed` on the way to training."""
    rows: Int[Tensor, " B"]
    """The source's numbers of these rows."""
    position: dict[str, Any]
    """Where to resume after this batch."""
    bad: dict[str, Int[Tensor, " n"]] = field(default_factory=dict)
    """Of `checked` batches: numbers of the rows that are not finite, by hook where there are any."""

    def __len__(self) -> int:
        return _length(self.acts)


def checked(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches, with the rows that hold NaN or infinity noted; on the CPU, a pass over each batch."""
    for batch in batches:
        bad = {}
        for hook, acts in batch.acts.items():
            if bool(acts.sum(dtype=torch.float32).isfinite()):
                continue
            if len(wrong := (~acts.isfinite().all(dim=1)).nonzero().flatten()):  # a sum may be too large by itself
                bad[hook] = batch.rows[wrong]
        yield replace(batch, bad=bad) if bad else batch


def pinned(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches in page-locked memory, from which a CUDA device copies without anybody waiting."""
    for batch in batches:
        yield replace(batch, acts={hook: rows.pin_memory() for hook, rows in batch.acts.items()})


def normed(
    batches: Iterable[Batch], scales: Mapping[str, float], device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """The same batches on a device in float32, the rows of each hook times its scale."""
    for batch in batches:
        acts = {}
        for hook, rows in batch.acts.items():
            there = rows.to(device, non_blocking=True)  # in the source's narrower dtype
            acts[hook] = there.to(torch.float32, copy=True).mul_(scales[hook])
        yield replace(batch, acts=acts)


class TensorSource:
    """The user's own [N, d] tensors or memory-mapped arrays, by hook."""

    def __init__(self, acts: Mapping[str, Any]):
        self.acts = {hook: _matrix(rows) for hook, rows in acts.items()}
        lengths = {hook: len(rows) for hook, rows in self.acts.items()}
        if len(set(lengths.values())) != 1:
            told = ", ".join(f"{length:,} of {hook}" for hook, length in lengths.items())
            raise UserError(f"activations: {told} rows. Give the same rows of every hook.")
        self.hooks, self.n = list(self.acts), next(iter(lengths.values()))

    def take(self, hook: str, rows: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        return self.acts[hook].index_select(0, rows)


def _matrix(acts: Any) -> Tensor:
    if getattr(acts, "ndim", 0) != 2 or len(acts) == 0:
        raise UserError(
            f"activations: shape {tuple(getattr(acts, 'shape', ()))}, expected [N, d] with N > 0. Reshape them."
        )
    with warnings.catch_warnings():  # a read-only memory map is only read here
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        acts = acts.detach() if isinstance(acts, Tensor) else torch.from_numpy(acts)
    if not acts.dtype.is_floating_point:
        raise UserError(f"activations: dtype {acts.dtype}, expected floating point. Convert them.")
    return acts


def sample(source: TensorSource, n: int, seed: int) -> dict[str, Float[Tensor, "n d"]]:
    """Random rows of each hook, float32; the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(source.n, generator=generator)[:n].sort().values
    return {hook: source.take(hook, rows).float() for hook in source.hooks}


def shuffled(source: TensorSource, batch: int, seed: int, position: dict[str, Any] | None = None) -> Iterator[Batch]:
    """Endless batches of rows that are in memory over fresh permutations; a batch may span two epochs. The position is
    (epoch, offset) and goes on after that batch."""
    epoch, offset = (position["epoch"], position["offset"]) if position else (0, 0)
    order = permutation(source.n, seed, epoch)
    while True:
        parts, missing = [], batch
        while missing:
            if offset >= source.n:
                epoch, offset = epoch + 1, 0
                order = permutation(source.n, seed, epoch)
            rows = order[offset : offset + missing]
            offset, missing = offset + len(rows), missing - len(rows)
            parts.append(rows)
        # Sorted rows read a memory map in order; which row is which within a batch does not matter.
        rows = torch.cat(parts).sort().values
        acts = {hook: source.take(hook, rows) for hook in source.hooks}
        yield Batch(acts, rows, {"epoch": epoch, "offset": offset})


def permutation(n: int, seed: int, epoch: int) -> Int[Tensor, " n"]:
    """The order of n things in an epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def effective_sequences(capacity: int, batch: int, context: int) -> float:
    """1/Σp² of a batch of B rows drawn from C slots filled by sequences of `context` rows: 1/(1/B + context/C)."""
    return 1 / (1 / batch + context / capacity)


def buffer_rows(min_sequences: int, batch: int, context: int) -> int:
    """Slots of a buffer that give `min_sequences` effective sequences a batch."""
    if min_sequences >= batch:
        raise UserError(
            f"activations.min_sequences: {min_sequences:,} is not below the batch of {batch:,}. "
            "Lower it or raise training.batch."
        )
    return int(context / (1 / min_sequences - 1 / batch)) + batch


def _length(acts: dict[str, Tensor]) -> int:
    return len(next(iter(acts.values())))


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of each hook one after the other; of one part, itself."""
    if len(parts) == 1:
        return parts[0]
    return {hook: torch.cat([part[hook] for part in parts]) for hook in parts[0]}


def _side_stream() -> Any:
    """A CUDA stream that begins after what was asked of the device so far; None, which changes nothing, without one."""
    if not torch.cuda.is_available():
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return stream


_END = object()


def prefetched(items: Iterator[Item], depth: int = 2, *, one_core: bool = True) -> Generator[Item]:
    """The same items, made up to `depth` ahead in a thread; an error there is raised here.

    one_core   of the thread: a second team of OpenMP threads would spin against that of a training step on the CPU
    On CUDA the thread has a stream of its own, so that a host's forward there runs beside the training step; what it
    hands over must be complete, such as rows that were copied back.
    """
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
        if one_core:
            torch.set_num_threads(1)  # of this thread, and of threads begun later; undone below
        try:
            with torch.cuda.stream(_side_stream()):
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
        torch.set_num_threads(torch.get_num_threads())
