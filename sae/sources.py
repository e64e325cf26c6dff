"""Where training's activations come from: a store, live from the host, or the user's own rows, behind one face."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae import files
from sae.activations import batches as feed
from sae.activations import windows
from sae.activations.harvest import Block, outlier_limits, stream
from sae.activations.shards import Layout
from sae.activations.spool import Spool
from sae.documents import told
from sae.errors import UserError
from sae.harvesting import for_training
from sae.host import Host
from sae.recipe import Recipe
from sae.text import ROWS_PER_BATCH, Rows
from sae.token_rows import Text

if TYPE_CHECKING:
    from jaxtyping import Float

logger = logging.getLogger("sae")
SAMPLE = 16_384  # rows from which mean, scale and variance are taken


@dataclass(frozen=True)
class Channel:
    """What is known of the activations at one hook before training begins."""

    hook: str
    sample: Float[Tensor, "n d"]
    """Raw float32, about SAMPLE rows."""
    blocks: Callable[[], Iterator[Tensor]]
    """One pass over raw valid rows, for statistics."""
    outlier_norm: float | None = None
    began_with: float | None = None
    """The scale that the run began with, where it goes on."""

    @property
    def d_in(self) -> int:
        return self.sample.shape[1]

    @cached_property
    def scale(self) -> float:
        """Raw activations times this have a mean norm of sqrt(d): the units in which training runs."""
        if self.began_with is not None:
            return self.began_with
        return self.d_in**0.5 / self.sample.norm(dim=1).mean().item()


@dataclass(frozen=True)
class Feed:
    """Where training's activations come from."""

    channels: dict[str, Channel]
    """By hook, as the host names it."""
    batches: Callable[[dict[str, Any] | None], Iterator[feed.Batch]]
    """Raw batches from a position on."""
    sequences: str
    """What a batch draws on, for the line at the start."""
    kind: str
    """store, live or given rows: a run resumes from the kind it began with."""
    rows: int | None = None
    """Of a source whose number of rows is known."""
    seconds_a_row: float | None = None
    """Of the host's forward, where it runs while training goes on, and was just timed."""
    on_cores: bool = False
    """Whether drawing a batch is work for all of the CPU's cores (a host that computes there), not for one."""
    told: Callable[[int], str] = "given row {:,}".format
    """Which row a batch's number stands for, for a message."""
    keep: Callable[[dict[str, Any]], None] = lambda position: None
    """Told of the earliest position that a checkpoint still needs; what is older may go."""


def from_store(recipe: Recipe, hooks: Sequence[str], host: Host, seed: int, progress: bool) -> Feed:
    """From the recipe's store, harvested now where there is none; `hooks` as the host names them."""
    store = for_training(recipe, hooks, host, progress)
    rows = windows.StoreSource(store, [store.source(hook, host.fingerprint) for hook in hooks])
    batch, context = recipe.training.batch, store.text.context
    capacity = feed.buffer_rows(recipe.activations.min_sequences, batch, context)
    if capacity < rows.n:
        reached = feed.effective_sequences(capacity, batch, context)
        read = Layout("", context, {source.hook: source.width for source in rows.sources}, rows.sources[0].dtype)
        size = capacity * read.bytes_read_a_row()
        told = f"through a buffer of {capacity:,} ({size / 1e6:,.0f} MB)"
    else:
        reached, told = feed.effective_sequences(rows.n, batch, context), "permuted whole"
    return Feed(
        channels={
            hook: Channel(hook, _usable(sample), partial(rows.all, hook), source.outlier_norm)
            for source, (hook, sample) in zip(rows.sources, rows.sample(SAMPLE, seed).items(), strict=True)
        },
        batches=lambda position: windows.windows(rows, batch, capacity, seed, position),
        sequences=f"store of {rows.n:,} rows, {told}: {reached:,.0f} effective sequences a batch "
        f"(asked for: {recipe.activations.min_sequences:,})",
        kind="store",
        rows=rows.n,
        told=partial(_told, rows),
    )


def from_tensors(recipe: Recipe, acts: Mapping[str, Any], seed: int) -> Feed:
    """From the user's own rows [N, d], by hook."""
    rows = feed.TensorSource(acts)

    def blocks(hook: str) -> Iterator[Tensor]:
        return (rows.take(hook, numbers) for numbers in torch.arange(rows.n).split(8192))

    return Feed(
        channels={
            hook: Channel(hook, _usable(sample), partial(blocks, hook))
            for hook, sample in feed.sample(rows, SAMPLE, seed).items()
        },
        batches=lambda position: feed.shuffled(rows, recipe.training.batch, seed, position),
        sequences=f"{rows.n:,} given rows, permuted whole",
        kind="given rows",
        rows=rows.n,
    )


def _usable(sample: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The rows that are finite; refuses activations from which nothing can be learnt: most not finite, constant, or one
    number wide."""
    good = sample.isfinite().all(dim=1)
    if bad := int((~good).sum()):
        told = f"activations: {bad:,} of a sample of {len(sample):,} rows hold NaN or infinity"
        if bad > len(sample) // 2:
            raise UserError(f"{told}. Leave such rows out.")
        logger.warning("%s. Batches with such rows will be skipped.", told)
        sample = sample[good]
    if sample.shape[1] < 2 or len(sample) < 2 or not (sample - sample.mean(0)).any():
        raise UserError(
            f"activations: {len(sample):,} rows of width {sample.shape[1]:,} do not vary. Give rows that differ."
        )
    return sample


def live(recipe: Recipe, hooks: Sequence[str], host: Host, seed: int, folder: Path) -> Feed:
    """From the host while training goes on; `hooks` as the host names them, all read in one forward.

    folder   of what was harvested and may be needed again: a run that was killed goes on from there
    """
    text = Text(recipe.text, host, "train")
    context, batch = recipe.text.context, recipe.training.batch
    capacity = feed.buffer_rows(recipe.activations.min_sequences, batch, context)
    limits = _limits(text, hooks, host, folder)

    def harvest(rows: Rows) -> Block:
        return next(stream(host, [rows], hooks, outlier_norm=limits))

    spool = Spool(folder, hooks, ROWS_PER_BATCH * context, partial(text.rows, None), harvest)
    slabs, slots = spool.window(capacity)

    def sample() -> dict[str, Tensor]:
        some = spool.at_most(-(-SAMPLE // spool.slab_rows) + 1)
        return first_rows(map(spool.block, range(some)), SAMPLE)

    is_new, began = not (folder / "sample.safetensors").exists(), time.perf_counter()
    samples = kept(folder / "sample.safetensors", sample)

    def blocks(hook: str) -> Iterator[Tensor]:
        return (block.acts[hook][block.mask] for block in stream(host, text.rows(), [hook], outlier_norm=limits))

    reached = feed.effective_sequences(slots, batch, context)
    return Feed(
        channels={
            hook: Channel(hook, _usable(sample.float()), partial(blocks, hook), limits[hook])
            for hook, sample in samples.items()
        },
        batches=lambda position: windows.windows(spool, batch, capacity, seed, position),
        sequences=f"live, first {slabs:,} blocks ({slots:,} rows) are read: {reached:,.0f} effective sequences a batch "
        f"(asked for: {recipe.activations.min_sequences:,})",
        kind="live",
        seconds_a_row=(time.perf_counter() - began) / len(samples[hooks[0]]) if is_new else None,
        on_cores=host.device.type == "cpu",
        told=partial(_told, spool),
        keep=lambda position: spool.keep_from(position.get("slab", 0)),
    )


def _limits(text: Text, hooks: Sequence[str], host: Host, folder: Path) -> dict[str, float]:
    """Outlier limits by the first rows of the text; noted, so that a resumption needs no forward for them."""
    path = folder / "limits.json"
    if path.exists():
        return files.read_json_object(path, hooks)
    first = next(text.rows(), None)
    if first is None:
        raise UserError(f"text.source: {told(text.recipe.source)} holds no text to train on. Check the source.")
    limits = outlier_limits(host, first, hooks)
    files.write_json(path, limits)
    return limits


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors that are made once in a run and read by its resumptions."""
    if not path.exists():
        files.write_blocks(path, files.safetensors_blocks(make(), {}))
    return files.read_safetensors(path)[0]


def _told(slabs: windows.StoreSource | Spool, row: int) -> str:
    return slabs.told(*divmod(row, slabs.slab_rows))


def first_rows(blocks: Iterator[Block], n: int) -> dict[str, Float[Tensor, "n d"]]:
    """The first `n` valid rows of each hook (fewer where the stream ends), raw; {} of an empty stream."""
    parts: list[dict[str, Tensor]] = []
    found = 0
    for block in blocks:
        parts.append({hook: acts[block.mask] for hook, acts in block.acts.items()})
        found += int(block.mask.sum())
        if found >= n:
            break
    return {hook: torch.cat([part[hook] for part in parts])[:n] for hook in parts[0]} if parts else {}
