"""One shard of a store: a safetensors file, both directions.

    acts.<hook> [rows, d]   bfloat16 or float32; or int8 with scale.<hook> [rows], mean.<hook> and std.<hook> [d]
    tokens, doc, pos [rows] int32, mask [rows] uint8 (1: counts)

Rows are read in slabs of `SLAB` rows, each by its own byte range. Every slab of every tensor has a CRC-32 in the file's
metadata, beside the store's id and the shard's number, so that a file that is short, damaged, swapped or another
store's is refused by name wherever it is read. The sha256 of the whole file is the manifest's.

int8: columns are standardised by mean and deviation over the shard's valid rows, then each row is scaled to its largest
value. That costs an FVU of 6e-5 (SmolLM2, layer 15); a scale a row alone would cost 2e-3, for a few columns of
the residual stream are ten times larger than the rest.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae import files
from sae.activations.harvest import Block
from sae.errors import UserError
from sae.places import Place

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int8

SLAB = 4096  # rows, rounded to whole sequences: 4.7 MB of 576-wide bfloat16
ROW_BYTES = 13  # of tokens, doc, pos and mask
STORED = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8, "I32": torch.int32, "U8": torch.uint8}
_COLUMNS = {"tokens": "I32", "doc": "I32", "pos": "I32", "mask": "U8"}
_HEAD = 1 << 16
MEND = "Mend it with `sae harvest RECIPE --repair`."


@dataclass(frozen=True)
class Entry:
    """What the manifest knows of a shard."""

    file: str
    rows: int
    valid: int
    """Rows whose mask is 1."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Layout:
    """What the shards of one reading have in common."""

    store_id: str
    context: int
    hooks: Mapping[str, int]
    dtype: str

    @property
    def slab_rows(self) -> int:
        return self.context * max(1, SLAB // self.context)

    def bytes_read_a_row(self) -> int:
        """What a row takes in a buffer; int8 is read as bfloat16."""
        return sum(self.hooks.values()) * (4 if self.dtype == "float32" else 2)

    def bytes_a_row(self) -> int:
        """About what a row takes on disk."""
        scale = 4 if self.dtype == "int8" else 0
        return ROW_BYTES + sum(width * STORED[self.dtype].itemsize + scale for width in self.hooks.values())

    def spans(self, rows: int) -> list[tuple[int, int]]:
        """First row and end of each slab of a shard: whole sequences, as even as they can be."""
        sequences = -(-rows // self.context)
        n = -(-rows // self.slab_rows)
        ends = [sequences * (i + 1) // n * self.context for i in range(n)]
        return list(zip([0, *ends[:-1]], [*ends[:-1], rows], strict=True))

    def tensors(self, rows: int) -> dict[str, tuple[str, list[int]]]:
        """Type and shape, by name, of all that a shard of so many rows holds."""
        found = {name: (kind, [rows]) for name, kind in _COLUMNS.items()}
        kind = {"bfloat16": "BF16", "float32": "F32", "int8": "I8"}[self.dtype]
        for hook, width in self.hooks.items():
            found[f"acts.{hook}"] = (kind, [rows, width])
            if self.dtype == "int8":
                found[f"scale.{hook}"] = ("F32", [rows])
                found |= {f"{name}.{hook}": ("F32", [width]) for name in ("mean", "std")}
        return found


# ---- writing -----------------------------------------------------------------------------------------------


def write(place: Place, file: str, number: int, layout: Layout, blocks: Sequence[Block]) -> Entry:
    """Write the blocks as shard `number`, whole or not at all."""
    tensors = {name: torch.cat([getattr(b, name) for b in blocks]).to(torch.int32) for name in ("tokens", "doc", "pos")}
    mask = torch.cat([block.mask for block in blocks])
    tensors["mask"] = mask.to(torch.uint8)
    for hook in layout.hooks:
        acts = torch.cat([block.acts[hook] for block in blocks])
        if layout.dtype == "int8":
            tensors |= {f"{name}.{hook}": one for name, one in quantised(acts, mask).items()}
        else:
            tensors[f"acts.{hook}"] = acts.to(STORED[layout.dtype])
    rows = len(mask)
    everything = [(0, None)]
    sums = {
        name: [zlib.crc32(files.raw(one[a:b])) for a, b in (layout.spans(rows) if _is_by_rows(name) else everything)]
        for name, one in sorted(tensors.items())
    }
    facts = {"store": layout.store_id, "shard": str(number)}
    digest, size = hashlib.sha256(), 0

    def counted() -> Iterator[bytes | memoryview]:
        nonlocal size
        for block in files.safetensors_blocks(tensors, facts | {"crc32": json.dumps(sums, separators=(",", ":"))}):
            digest.update(block)
            size += len(block)
            yield block

    place.write(file, counted())
    return Entry(file, rows, int(mask.sum()), size, digest.hexdigest())


def _is_by_rows(name: str) -> bool:
    return not name.startswith(("mean.", "std."))


def quantised(acts: Float[Tensor, "n d"], mask: Bool[Tensor, " n"]) -> dict[str, Tensor]:
    """int8 `acts` with float32 `scale` [n], `mean` and `std` [d]: acts ≈ (int8 * scale) * std + mean."""
    x = acts.to(torch.float32)
    known = x[mask] if bool(mask.any()) else x
    mean, std = known.mean(0), known.std(0, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    x = (x - mean) / std
    scale = x.abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return {"acts": (x / scale[:, None]).round_().to(torch.int8), "scale": scale, "mean": mean, "std": std}


def restored(
    acts: Int8[Tensor, "n d"], scale: Float[Tensor, " n"], mean: Float[Tensor, " d"], std: Float[Tensor, " d"]
) -> Float[Tensor, "n d"]:
    """What int8 stands for, as bfloat16."""
    return (acts.to(torch.float32).mul_(scale[:, None]).mul_(std).add_(mean)).to(torch.bfloat16)


# ---- reading -----------------------------------------------------------------------------------------------


class Shard:
    """A shard opened for reading: its header is read and checked, rows come slab by slab."""

    def __init__(self, place: Place, entry: Entry, number: int, layout: Layout):
        self.place, self.entry, self.layout = place, entry, layout
        size = place.size(entry.file)
        if size is None:
            raise UserError(f"{self}: is missing. {MEND}")
        header = self._header(size)
        facts = header.get("__metadata__")
        facts = facts if isinstance(facts, dict) else {}
        if facts.get("store") != layout.store_id:
            raise UserError(f"{self}: is of store {facts.get('store')}, this one is {layout.store_id}. {MEND}")
        if facts.get("shard") != str(number):
            raise UserError(f"{self}: is shard {facts.get('shard')}, expected shard {number}. {MEND}")
        if size != entry.bytes:
            raise UserError(f"{self}: has {size:,} bytes, the manifest says {entry.bytes:,} (cut short?). {MEND}")
        try:
            self.sums: dict[str, list[int]] = json.loads(facts["crc32"])
            self.at = {name: self.start + header[name]["data_offsets"][0] for name in layout.tensors(entry.rows)}
            found = {name: (header[name]["dtype"], header[name]["shape"]) for name in self.at}
            for name in self.at:
                known = self.sums[name]
                if len(known) != (self.n_slabs if _is_by_rows(name) else 1) or not all(
                    isinstance(n, int) for n in known
                ):
                    raise ValueError(f"the checksums of {name}")
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from error
        for name, (kind, shape) in layout.tensors(entry.rows).items():
            if found[name] != (kind, shape):
                raise UserError(f"{self}: {name} is {found[name][0]} {found[name][1]}, expected {kind} {shape}. {MEND}")

    def __str__(self) -> str:
        return self.place.named(self.entry.file)

    @property
    def n_slabs(self) -> int:
        return len(self.layout.spans(self.entry.rows))

    def _header(self, size: int) -> dict[str, Any]:
        head = self.place.ranges(self.entry.file, [(0, min(size, _HEAD))])[0] if size else bytearray()
        length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else size
        self.start = 8 + length
        if self.start > size:
            raise self._damaged(f"it would be {length:,} bytes long, the file has {size:,}")
        if self.start > len(head):
            head += self.place.ranges(self.entry.file, [(len(head), self.start)])[0]
        try:
            header = json.loads(head[8 : self.start])
        except (ValueError, RecursionError) as error:
            raise self._damaged(str(error)) from error
        if not isinstance(header, dict):
            raise self._damaged("its header is no object")
        return header

    def _damaged(self, why: str) -> UserError:
        return UserError(f"{self}: its header is damaged ({why}). {MEND}")

    def slab(
        self, number: int, names: Sequence[str], memory: Callable[[int], bytearray] = bytearray
    ) -> dict[str, Tensor]:
        """Some columns (tokens, doc, pos, mask, acts.<hook>) of one slab; activations of int8 as bfloat16.

        memory   as in `Place.ranges`: what it hands out again belongs to an earlier slab
        Raises UserError where what is there is not what was written.
        """
        a, b = self.layout.spans(self.entry.rows)[number]
        hooks = [name.removeprefix("acts.") for name in names if name.startswith("acts.")]
        hooks = hooks if self.layout.dtype == "int8" else []
        wanted = [*names, *(f"{part}.{hook}" for hook in hooks for part in ("scale", "mean", "std"))]
        kinds, spans = self.layout.tensors(self.entry.rows), []
        for name in wanted:
            kind, shape = kinds[name]
            first, last = (a, b) if _is_by_rows(name) else (0, shape[0])
            width = _TYPES[kind].itemsize * (shape[1] if len(shape) == 2 else 1)
            spans.append((self.at[name] + first * width, self.at[name] + last * width))
        found = {}
        for name, data in zip(wanted, self.place.ranges(self.entry.file, spans, memory), strict=True):
            kind, shape = kinds[name]
            if zlib.crc32(data) != self.sums[name][number if _is_by_rows(name) else 0]:
                raise UserError(
                    f"{self}: {name} is not what was written, in rows {a:,} to {b - 1:,} (a flipped bit, or a bad "
                    f"disk). {MEND}"
                )
            found[name] = torch.frombuffer(data, dtype=_TYPES[kind]).view(-1, *shape[1:])
        for hook in hooks:
            parts = [found.pop(f"{part}.{hook}") for part in ("scale", "mean", "std")]
            found[f"acts.{hook}"] = restored(found[f"acts.{hook}"], *parts)
        return found
