"""The parts of an index: rows of text with their codes and the maxima of their documents, read by slices.

Files are memory-mapped and opened when they are first asked for. A row is numbered from the beginning of the text; what
is asked for may lie in several parts, and so may a document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.errors import UserError
from sae.features.pool import DocumentMaxima, in_csr, spans

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

_READ = 16_000_000  # codes looked through for what fires together


def opened(path: Path) -> Any:
    """A safetensors file, memory-mapped; a UserError where it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not readable ({error}). Make the index again with `sae index`.") from error


class Parts:
    """All rows of an index."""

    def __init__(self, path: Path, n_rows: Sequence[int]):
        self.path, self._open = path, {}
        self._starts = [0]
        for n in n_rows:
            self._starts.append(self._starts[-1] + n)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def open(self, number: int) -> Any:
        """A part's file."""
        if number not in self._open:
            path = self.path / f"part-{number:05}.safetensors"
            file, rows = opened(path), self._starts[number + 1] - self._starts[number]
            found = {name: file.get_slice(name).get_shape()[0] for name in file.keys()}  # noqa: SIM118  (not a dict)
            if found.get("tokens") != rows or found.get("codes.offsets") != rows + 1:
                raise UserError(
                    f"{path}: has {found.get('tokens', 0):,} rows, index.json says {rows:,}. Make the index again with "
                    "`sae index`."
                )
            self._open[number] = file
        return self._open[number]

    def some(self) -> Iterator[Any]:
        """All parts, or evenly chosen ones that hold some 16M codes."""
        sizes = [self.open(number).get_slice("codes.features").get_shape()[0] for number in range(len(self))]
        every = max(1, -(-sum(sizes) // _READ))
        return (self.open(number) for number in range(0, len(sizes), every))

    def rows(self, start: int, end: int) -> dict[str, Tensor]:
        """tokens, doc, pos, mask of some rows."""
        names = ("tokens", "doc", "pos", "mask")
        found = [[part.get_slice(name)[a:b] for name in names] for part, a, b in self._cut(start, end)]
        return {name: torch.cat(column) for name, column in zip(names, zip(*found, strict=True), strict=True)}

    def acts(self, feature: int, start: int, end: int) -> list[float]:
        """What the feature's activation is in some rows (bfloat16, 0 where it is silent)."""
        found: list[float] = []
        for part, a, b in self._cut(start, end):
            offsets = part.get_slice("codes.offsets")[a : b + 1]
            first, last = int(offsets[0]), int(offsets[-1])
            features = part.get_slice("codes.features")[first:last]
            values = part.get_slice("codes.values")[first:last].float()
            at = (features == feature).nonzero().flatten()
            acts = torch.zeros(b - a)
            acts[torch.searchsorted(offsets - first, at, right=True) - 1] = values[at]
            found += acts.tolist()
        return found

    def windows(self, positions: Int[Tensor, " n"], before: int, after: int) -> Int[Tensor, "n w"]:
        """Token ids around many positions, inside their documents; -1 beyond."""
        found = torch.full((len(positions), before + 1 + after), -1, dtype=torch.int32)
        around = positions[:, None] + torch.arange(-before, after + 1)
        for number, (first, last) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            here = ((positions >= first) & (positions < last)).nonzero().flatten()
            if not len(here):
                continue
            tokens, doc, pos = (self.open(number).get_tensor(name) for name in ("tokens", "doc", "pos"))
            at = (around[here] - first).clamp(0, last - first - 1)
            own = (positions[here] - first)[:, None]
            steps = torch.arange(-before, after + 1)
            inside = (at - own == steps) & (doc[at] == doc[own]) & (pos[at] - pos[own] == steps)
            found[here] = torch.where(inside, tokens[at], -1)
        return found

    def _cut(self, start: int, end: int) -> Iterator[tuple[Any, int, int]]:
        """(part, from, to) of rows that may lie in several parts."""
        for number, (first, last) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            if start < last and end > first:
                yield self.open(number), max(start, first) - first, min(end, last) - first


class StoredMaxima:
    """`pool.DocumentMaxima` of an index, of which only the documents asked for are read."""

    def __init__(self, parts: Parts, n_documents: int, n_features: int):
        self.parts, self.n_documents, self.n_features = parts, n_documents, n_features
        self._docs = [parts.open(number).get_tensor("max.docs") for number in range(len(parts))]
        self._offsets = [parts.open(number).get_tensor("max.offsets") for number in range(len(parts))]

    @cached_property
    def seen(self) -> Bool[Tensor, " D"]:
        """False for documents of which no token was counted."""
        seen = torch.zeros(self.n_documents, dtype=torch.bool)
        for docs in self._docs:
            seen[docs.long()] = True
        return seen

    def of(self, documents: Int[Tensor, " n"]) -> DocumentMaxima:
        """The maxima of some documents, in the order asked for."""
        F = self.n_features
        row_of = torch.full((len(self.seen),), -1, dtype=torch.int64)
        row_of[documents] = torch.arange(len(documents))
        found = []
        for number, (docs, offsets) in enumerate(zip(self._docs, self._offsets, strict=True)):
            rows = row_of[docs.long()]
            here = (rows >= 0).nonzero().flatten()
            if not len(here):
                continue
            part = self.parts.open(number)
            at, entry = spans(offsets, here)
            columns = [part.get_slice(name) for name in ("max.features", "max.values")]
            if 4 * len(here) > len(docs):  # most of it: one read
                kept = [column[:][entry] for column in columns]
            else:
                cuts = list(zip(offsets[here].tolist(), offsets[here + 1].tolist(), strict=True))
                kept = [torch.cat([column[a:b] for a, b in cuts]) for column in columns]
            found.append((rows[here][at], *kept))
        none = torch.zeros(0, dtype=torch.int64)
        columns = [torch.cat(column) for column in zip(*found, strict=True)] or [none, none, torch.zeros(0)]
        return in_csr(columns[0], columns[1].long(), columns[2], self.seen[documents], F)

    def select(self, documents: Int[Tensor, " n"]) -> tuple[Tensor, Tensor, Tensor]:
        """(row among the selected, feature, maximum) of every entry of some documents."""
        return self.of(documents).select(torch.arange(len(documents)))
