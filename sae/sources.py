"""Where activations come from: the text of a recipe as token rows, the harvest into a store, and the feed of training
(a store, live from the host, or the user's own rows) behind one small face.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae import files
from sae.activations import batches as feed
from sae.activations import store as stores
from sae.activations.harvest import Block, outlier_limits, stream
from sae.bundled import corpus_path
from sae.errors import UserError
from sae.host import Host
from sae.recipe import HostRecipe, Recipe, TextRecipe
from sae.text import Document, Rows, documents, pack, select
from sae.training.log import Progress

if TYPE_CHECKING:
    from jaxtyping import Float

SAMPLE = 16_384  # rows from which mean, scale and variance are taken


def open_host(recipe: HostRecipe) -> Host:
    """The host of a recipe."""
    return Host.load(recipe.name, dtype=recipe.dtype, device=recipe.device)


class Text:
    """Token rows of one part of a source, and the documents they came from, noted as they are read."""

    def __init__(self, recipe: TextRecipe, host: Host, part: str):
        self.recipe, self.host, self.part = recipe, host, part
        self.documents: list[Document] = []

    def rows(self) -> Iterator[Rows]:
        """From the beginning; the documents' numbers are their places in `documents`."""
        self.documents = []
        found = documents(self.recipe.source, self.recipe.column)
        if self.part != "all":
            found = select(found, self.recipe.held_out, self.part)
        return iter(
            pack(
                self._noted(found),
                self.host.tokenizer,
                self.recipe.context,
                isolate=self.recipe.isolate_documents,
                special_ids=self.host.special_ids,
                max_tokens=self.recipe.max_tokens,
            )
        )

    def _noted(self, found: Iterator[Document]) -> Iterator[Document]:
        for document in found:
            self.documents.append(document)
            yield document

    def expected_tokens(self) -> int | None:
        """About how many positions `rows` will give, where that can be known beforehand."""
        known = self.recipe.max_tokens
        if self.recipe.source == "bundled":
            whole = files.read_json(corpus_path().with_name("corpus.json"))["counts"]["tokens"]
            share = {"train": 1 - self.recipe.held_out, "held_out": self.recipe.held_out}.get(self.part, 1.0)
            known = min(known or whole, int(whole * share))
        return known


def _forward(host: Host, hooks: Sequence[str], limits: dict[str, float] | None) -> Callable[[Rows], Block]:
    def one(rows: Rows) -> Block:
        return next(stream(host, [rows], hooks, outlier_norm=limits))

    return one


def harvest(
    recipe: Recipe,
    *,
    host: Host | None = None,
    hooks: Sequence[str] | None = None,
    part: str = "train",
    progress: bool = True,
) -> stores.Store:
    """Run the host over the text and write the activation store. An interrupted one goes on, a finished one is
    opened.

    hooks   all are read in one forward and kept in one store; None is the recipe's one
    """
    if recipe.activations.store is None:
        raise UserError(
            "activations.store: not set. Give the folder to harvest into, for example activations.store=runs/acts."
        )
    host = host or open_host(recipe.host)
    hooks = [host.hook(name) for name in hooks or [recipe.host.hook]]
    text = Text(recipe.text, host, part)
    first = next(text.rows(), None)
    if first is None:
        raise UserError(f"text.source: {recipe.text.source} holds no text (part {part}). Check the source.")
    limits = outlier_limits(host, first, hooks)
    description = stores.Description(
        host=recipe.host.name,
        host_fingerprint=host.fingerprint,
        hooks={hook: host.width(hook) for hook in hooks},
        dtype=str(host.dtype).removeprefix("torch."),
        context=recipe.text.context,
        source=recipe.text.source,
        part=part,
        held_out=recipe.text.held_out,
        max_tokens=recipe.text.max_tokens,
        isolate_documents=recipe.text.isolate_documents,
        outlier_norm=limits,
    )
    bar = Progress(text.expected_tokens(), 0, "tok", name="harvest", shown=progress)
    rows = text.rows()
    try:
        return stores.write(
            recipe.activations.store,
            description,
            rows,
            _forward(host, hooks, limits),
            text.documents,
            bar.update,
        )
    finally:
        bar.close()


@dataclass(frozen=True)
class Channel:
    """What is known of the activations at one hook before training begins."""

    hook: str
    sample: Float[Tensor, "n d"]
    """Raw float32, about SAMPLE rows."""
    blocks: Callable[[], Iterator[Tensor]]
    """One pass over raw valid rows, for statistics."""
    outlier_norm: float | None = None

    @property
    def d_in(self) -> int:
        return self.sample.shape[1]

    @cached_property
    def scale(self) -> float:
        """Raw activations times this have a mean norm of sqrt(d): the units in which training runs."""
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
    on_cores: bool = False
    """Whether drawing a batch is work for all of the CPU's cores (a host that computes there), not for one."""


def from_store(recipe: Recipe, hooks: Sequence[str], host: Host, seed: int, progress: bool) -> Feed:
    """From the recipe's store, harvested now where it is not there; `hooks` as the host names them."""
    store = harvest(recipe, host=host, hooks=hooks, progress=progress)
    for hook in hooks:
        store.check(host.fingerprint, hook)
    rows = feed.StoreSource(store, hooks)
    told = f"store of {rows.n:,} rows, permuted whole"
    return _fixed(recipe, rows, store.description.outlier_norm, seed, told, "store")


def from_tensors(recipe: Recipe, acts: Mapping[str, Any], seed: int) -> Feed:
    """From the user's own rows [N, d], by hook."""
    rows = feed.TensorSource(acts)
    return _fixed(recipe, rows, {}, seed, f"{rows.n:,} given rows, permuted whole", "given rows")


def _fixed(
    recipe: Recipe, rows: feed.Source, limits: Mapping[str, float], seed: int, sequences: str, kind: str
) -> Feed:
    def blocks(hook: str) -> Iterator[Tensor]:
        for numbers in torch.arange(rows.n).split(8192):
            yield rows.take(hook, numbers)

    return Feed(
        channels={
            hook: Channel(hook, _usable(sample), partial(blocks, hook), limits.get(hook))
            for hook, sample in feed.sample(rows, SAMPLE, seed).items()
        },
        batches=lambda position: feed.shuffled(rows, recipe.training.batch, seed, position),
        sequences=sequences,
        kind=kind,
    )


def _usable(sample: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Refuse activations from which nothing can be learnt: not finite, constant, or one number wide."""
    bad = (~sample.isfinite().all(dim=1)).nonzero().flatten()
    if len(bad):
        raise UserError(
            f"activations: {len(bad):,} of a sample of {len(sample):,} rows hold NaN or infinity. Leave such rows out."
        )
    if sample.shape[1] < 2 or len(sample) < 2 or not (sample - sample.mean(0)).any():
        raise UserError(
            f"activations: {len(sample):,} rows of width {sample.shape[1]:,} do not vary. Give rows that differ."
        )
    return sample


def live(recipe: Recipe, hooks: Sequence[str], host: Host, seed: int) -> Feed:
    """From the host while training goes on; `hooks` as the host names them, all read in one forward."""
    text = Text(recipe.text, host, "train")
    first = next(text.rows(), None)
    if first is None:
        raise UserError(f"text.source: {recipe.text.source} holds no text to train on. Check the source.")
    limits = outlier_limits(host, first, hooks)
    capacity = feed.buffer_rows(recipe.activations.min_sequences, recipe.training.batch, recipe.text.context)

    def stream_from(skip: int = 0) -> Iterator[Block]:
        return stream(host, itertools.islice(text.rows(), skip, None), hooks, outlier_norm=limits)

    def blocks(hook: str) -> Iterator[Tensor]:
        return (block.acts[hook][block.mask] for block in stream_from())

    samples = first_rows(stream_from(), SAMPLE)
    return Feed(
        channels={
            hook: Channel(hook, _usable(sample), partial(blocks, hook), limits[hook])
            for hook, sample in samples.items()
        },
        batches=lambda position: feed.live(stream_from, recipe.training.batch, capacity, seed, position),
        sequences=f"live, a batch draws on at least {recipe.activations.min_sequences:,} effective sequences "
        f"where the text has them; first a buffer of {capacity:,} rows is filled",
        kind="live",
        on_cores=host.device.type == "cpu",
    )


def first_rows(blocks: Iterator[Block], n: int) -> dict[str, Float[Tensor, "n d"]]:
    """The first `n` valid rows of each hook (fewer where the stream ends), raw float32; {} of an empty stream."""
    parts: list[dict[str, Tensor]] = []
    found = 0
    for block in blocks:
        parts.append({hook: acts[block.mask].float() for hook, acts in block.acts.items()})
        found += int(block.mask.sum())
        if found >= n:
            break
    return {hook: torch.cat([part[hook] for part in parts])[:n] for hook in parts[0]} if parts else {}
