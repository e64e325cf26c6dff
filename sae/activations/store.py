"""The activation store: what it says of itself, and rows by slab.

STORE/manifest.json           format; the text and how it was read; the readings of it, each by one host at some hooks
STORE/rows-00000.safetensors  token rows (tokens, doc, pos, mask), made before any host runs: every host reads the same
STORE/documents-00000.jsonl   the documents by their number, so that a store can be indexed and shown on its own
STORE/shard-00000.safetensors activations of the first reading (shards.py); shard-00000.1.safetensors of the second, …

A *source* is a host and a hook. Sources of several readings have the same rows, so that two models can be compared row
by row; a row counts where every reading that is asked lets it count. A store may lie on a disk or anywhere else
(places.py). It is written by build.py; nobody else touches its files. Memory: what is asked for, never a shard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.activations.harvest import Block
from sae.activations.manifest import MANIFEST, Reading, TextFacts, layout_of, read_manifest
from sae.activations.shards import MEND, Entry, Shard
from sae.documents import Document
from sae.errors import UserError
from sae.places import Place

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Source:
    """Activations of one host at one hook."""

    host: str
    host_fingerprint: str
    hook: str
    width: int
    dtype: str
    outlier_norm: float | None
    reading: int


class Store:
    """The finished readings of a store, opened for reading."""

    def __init__(self, place: Place, manifest: Mapping[str, Any]):
        self.place, self.manifest = place, manifest
        self.text = TextFacts(**manifest["text"])
        self.shard_rows: list[int] = [int(rows) for rows in manifest["shards"]]
        self.numbers = [i for i, one in enumerate(manifest["readings"]) if one["shards"] is not None]
        """Of the finished readings, in the manifest."""
        done = [manifest["readings"][i] for i in self.numbers]
        self.readings = [Reading(**one["facts"]) for one in done]
        self.layouts = [layout_of(manifest, number) for number in self.numbers]
        self.entries = [[Entry(**entry) for entry in one["shards"]] for one in done]
        self._shards: dict[tuple[int, int], Shard] = {}

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Raises UserError for a folder that is no store, one without a finished reading, or one of another format."""
        place = Place(path)
        manifest = read_manifest(place)
        if manifest is None:
            raise UserError(f"{place}: not an activation store (no {MANIFEST}). Make one with `sae harvest`.")
        if not any(reading["shards"] is not None for reading in manifest["readings"]):
            raise UserError(f"{place}: the harvest was not finished. Run the same `sae harvest` again: it goes on.")
        return cls(place, manifest)

    def __repr__(self) -> str:
        names = ", ".join(f"{one.hook} of {one.host} ({one.width:,}, {one.dtype})" for one in self.sources)
        return f"Store({self.place.url!r}: {self.n_rows:,} rows; {names})"

    @property
    def path(self) -> str:
        return self.place.url

    @cached_property
    def sources(self) -> list[Source]:
        return [
            Source(
                reading.host, reading.host_fingerprint, hook, width, reading.dtype, reading.outlier_norm.get(hook), i
            )
            for i, reading in enumerate(self.readings)
            for hook, width in reading.hooks.items()
        ]

    @property
    def hooks(self) -> dict[str, int]:
        """Width by hook, of all readings; of two hosts with a hook of one name, the first one's."""
        found: dict[str, int] = {}
        for source in self.sources:
            found.setdefault(source.hook, source.width)
        return found

    @property
    def n_rows(self) -> int:
        return sum(self.shard_rows)

    def source(self, hook: str, host_fingerprint: str | None = None) -> Source:
        """The source at a hook, of one host where that is given; a UserError says what there is."""
        at_hook = [one for one in self.sources if one.hook == hook]
        found = [one for one in at_hook if host_fingerprint in (None, one.host_fingerprint)]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(f"{one.host} ({one.host_fingerprint})" for one in found)
            raise UserError(f"{self.place}: has {hook} of several hosts: {names}. Say which.")
        if not at_hook:
            raise UserError(f"{self.place}: has no {hook} (it has {', '.join(self.hooks)}). Harvest that hook.")
        raise UserError(
            f"{self.place}: was harvested from {at_hook[0].host} ({at_hook[0].host_fingerprint}), this host is "
            f"{host_fingerprint}. Harvest it with this host too, or take the other one."
        )

    def check(
        self, host_fingerprint: str, hook: str, *, tokenizer: str | None = None, width: int | None = None
    ) -> None:
        """Refuse another host, a hook that is not here, another tokenizer or width, with both values."""
        source = self.source(hook, host_fingerprint)
        if tokenizer is not None and tokenizer != self.text.tokenizer:
            raise UserError(
                f"{self.place}: its text was read by tokenizer {self.text.tokenizer}, this host's is {tokenizer}. "
                "Harvest again with this host."
            )
        if width is not None and width != source.width:
            raise UserError(
                f"{self.place}: {hook} is {source.width:,} wide there, {width:,} in this host. Harvest again with it."
            )

    @property
    def documents(self) -> list[Document]:
        """All documents, by their number."""
        found: list[Document] = []
        for block in self.manifest["blocks"]:
            name = block["documents"]
            try:
                content = self.place.read(name)
                if sha256(content).hexdigest() != block["documents_sha256"]:
                    raise ValueError("not what was written")
                lines = content.decode("utf-8").split("\n")[:-1]
                found += [Document(**json.loads(line)) for line in lines]
            except (UserError, ValueError, TypeError) as error:
                raise UserError(
                    f"{self.place.named(name)}: missing or damaged ({error}). Delete the store and harvest again."
                ) from error
        return found

    def shard(self, number: int, reading: int = 0) -> Shard:
        """One shard, its header read and checked."""
        key = (reading, number)
        if key not in self._shards:
            self._shards[key] = Shard(self.place, self.entries[reading][number], number, self.layouts[reading])
        return self._shards[key]

    @cached_property
    def slabs(self) -> list[tuple[int, int]]:
        """(shard, slab in it) of every slab, in order; the same for every reading."""
        spans = self.layouts[0].spans
        return [(number, i) for number, rows in enumerate(self.shard_rows) for i in range(len(spans(rows)))]

    def read(self, sources: Sequence[Source], slab: int, memory: Callable[[int], bytearray] = bytearray) -> Block:
        """One slab of several sources, keys by hook: whole sequences, in order. The mask is that of all of them.

        memory   as in `Place.ranges`
        """
        number, i = self.slabs[slab]
        acts: dict[str, Tensor] = {}
        columns: dict[str, Tensor] = {}
        mask: Tensor | None = None
        for reading in dict.fromkeys(source.reading for source in sources):
            mine = [source.hook for source in sources if source.reading == reading]
            names = ["mask"] if columns else ["mask", "tokens", "doc", "pos"]
            found = self.shard(number, reading).slab(i, [*names, *(f"acts.{hook}" for hook in mine)], memory)
            acts |= {hook: found[f"acts.{hook}"] for hook in mine}
            columns = columns or found
            mask = found["mask"].bool() if mask is None else mask & found["mask"].bool()
        assert mask is not None, "no sources were asked for"
        return Block(acts, columns["tokens"], columns["doc"], columns["pos"], mask)

    def blocks(self, hook: str, host_fingerprint: str | None = None) -> Iterator[Block]:
        """All rows in order, a slab at a time, with the activations of one source."""
        source = self.source(hook, host_fingerprint)
        return (self.read([source], slab) for slab in range(len(self.slabs)))

    def refuse_missing(self) -> None:
        """Refuse shards that are not there or not of the noted size, which can be seen without reading them; on a disk
        of this machine, where looking is free."""
        if self.place.local is None:
            return
        for entry in (entry for entries in self.entries for entry in entries):
            size = self.place.size(entry.file)
            if size != entry.bytes:
                there = "is missing" if size is None else f"has {size:,} bytes, the manifest says {entry.bytes:,}"
                raise UserError(f"{self.place.named(entry.file)}: {there}. {MEND}")
