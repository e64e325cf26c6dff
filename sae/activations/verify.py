"""Is a store what was written? Every byte of it is read.

Per shard: there, of the noted size and sha256, of this store and this number, all tensors of their type and shape,
every slab's checksum, tokens as the token rows have them, as many rows that count as noted, activations finite where
they count, document numbers that exist. Per block of token rows and documents: its sha256. What is found is one line a
file. Cost: two reads of the store, the second from the cache; memory: a slab.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sae.activations import build
from sae.activations.manifest import MANIFEST, layout_of, read_manifest
from sae.activations.shards import MEND, Entry, Layout, Shard
from sae.errors import UserError
from sae.places import Place

_READ = 16 << 20


@dataclass(frozen=True)
class Fault:
    """A file that is not what was written, and why."""

    file: str
    why: str
    reading: int | None = None
    shard: int | None = None


def faults(place: Place, on_bytes: Callable[[int], object] = lambda n: None) -> Iterator[Fault]:
    """Everything that is wrong with a store, finished or not. Raises UserError for a folder that is no store."""
    manifest = read_manifest(place)
    if manifest is None:
        raise UserError(f"{place}: not an activation store (no manifest.json). Make one with `sae harvest`.")
    rows_are_good = True
    for block in manifest["blocks"]:
        for name, key in (("rows", "sha256"), ("documents", "documents_sha256")):
            why = _unlike(place, block[name], block[key], on_bytes)
            if why:
                rows_are_good = rows_are_good and name != "rows"
                yield Fault(block[name], why)
    if rows_are_good and (why := _miscounted(place, manifest)):
        yield Fault(MANIFEST, why)
    for reading in range(len(manifest["readings"])):
        yield from _of_reading(place, manifest, reading, rows_are_good, on_bytes)


def _miscounted(place: Place, manifest: dict[str, Any]) -> str:
    """Which count of the manifest its token rows do not bear out; empty where all are right."""
    counts = manifest["counts"]
    found = dict.fromkeys(("sequences", "positions", "padding", "documents", "masked positions"), 0)
    for block in manifest["blocks"]:  # one at a time: they grow with the text
        rows = build.read_block(place, block)
        found["sequences"] += len(rows)
        found["positions"] += rows.tokens.numel()
        found["padding"] += int((rows.doc < 0).sum())
        found["documents"] += block["n_documents"]
        found["masked positions"] += int((~rows.mask).sum())
    noted = counts | {"masked positions": sum(counts[name] for name in ("padding", "special", "first", "sliced"))}
    return next((f"notes {noted[name]:,} {name}, there are {n:,}" for name, n in found.items() if noted[name] != n), "")


def bad_shards(place: Place, manifest: dict[str, Any], reading: int) -> dict[int, str]:
    """Numbers of the shards of a reading that are not what was written, with the reason."""
    found = _of_reading(place, manifest, reading, True, lambda n: None)
    return {fault.shard: f"{fault.file}: {fault.why}" for fault in found if fault.shard is not None}


def _of_reading(
    place: Place, manifest: dict[str, Any], reading: int, rows_are_good: bool, on_bytes: Callable[[int], object]
) -> Iterator[Fault]:
    layout = layout_of(manifest, reading)
    rows = build.TokenRows(place, manifest) if rows_are_good else None
    n_documents = sum(block["n_documents"] for block in manifest["blocks"])
    for number, entry in build.there(place, manifest, reading).items():
        why = _shard_fault(place, entry, number, layout, rows, n_documents, on_bytes)
        if why:
            yield Fault(entry.file, why, reading, number)


def _shard_fault(
    place: Place,
    entry: Entry,
    number: int,
    layout: Layout,
    rows: build.TokenRows | None,
    n_documents: int,
    on_bytes: Callable[[int], object],
) -> str:
    """What is wrong with a shard, in words; empty where nothing is."""
    try:
        shard = Shard(place, entry, number, layout)
        given = None if rows is None else rows.of(number)
        valid = 0
        for slab, (a, b) in enumerate(layout.spans(entry.rows)):
            found = shard.slab(slab, ["tokens", "doc", "pos", "mask", *(f"acts.{hook}" for hook in layout.hooks)])
            mask = found["mask"].bool()
            valid += int(mask.sum())
            for name in ("tokens", "doc", "pos") if given is not None else ():
                if not bool((found[name] == getattr(given, name).reshape(-1)[a:b]).all()):
                    return f"{name} of rows {a:,} to {b - 1:,} are not those of the store's token rows"
            if given is not None and bool((mask & ~given.mask.reshape(-1)[a:b]).any()):
                return f"rows {a:,} to {b - 1:,} count where the token rows do not let them"
            if int(found["doc"].max()) >= n_documents:
                return f"names document {int(found['doc'].max()):,}, the store has {n_documents:,}"
            for hook in layout.hooks:
                broken = ~found[f"acts.{hook}"].float().sum(1).isfinite() & mask
                if bool(broken.any()):
                    return f"row {a + int(broken.nonzero()[0]):,} of {hook} holds NaN or infinity and counts"
    except UserError as error:
        return str(error).removeprefix(f"{place.named(entry.file)}: ").removesuffix(f". {MEND}")
    if valid != entry.valid:
        return f"{valid:,} rows count, the manifest says {entry.valid:,}"
    return _unlike(place, entry.file, entry.sha256, on_bytes)


def _unlike(place: Place, name: str, known: str, on_bytes: Callable[[int], object]) -> str:
    """How a file differs from its noted sha256; empty where it does not."""
    size = place.size(name)
    if size is None:
        return "is missing"
    digest = hashlib.sha256()
    for start in range(0, size, _READ):
        (part,) = place.ranges(name, [(start, min(start + _READ, size))])
        digest.update(part)
        on_bytes(len(part))
    return "" if digest.hexdigest() == known else "is not what was written (sha256 differs)"
