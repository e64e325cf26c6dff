"""What is gathered of every feature while activations stream by, in memory that does not grow with the text.

For each feature: how often it fires and in which log-spaced strengths (8 bins an octave from 2^-16 to 2^18, raw units;
the outer ones hold what lies beyond); its strongest tokens, at most one a document; a uniform sample of all tokens in
which it fires, and one from each of these bins; the tokens that have most of its activation. Samples are the tokens of
largest priority, a hash of (feature, row), so that they depend neither on the blocks nor on where a pass was
interrupted. At most some 9 kB a feature, reached where every feature fires at many strengths: 1.2 GB for 131,072. Cost:
two sorts of a block's entries; an entry that cannot enter a list any more is dropped at once. Features are kept in
slices, so that no sort is over all of them.

A token's mass is exact until features have fired on more than 64 distinct tokens each; then, at the end of a part, all
but a feature's 32 of largest mass are dropped, and one that comes back starts from zero.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.features.pool import LARGEST, Entries, by, first_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int

PER_OCTAVE, LOWEST, OCTAVES = 8, -16, 34
BINS = PER_OCTAVE * OCTAVES
TOP, SAMPLED, PER_BAND, PER_BIN, BANDS, TOKENS = 20, 50, 5, 3, 10, 32
_PLAIN = ("count", "histogram", "max_act", "mass")
_PENDING = 4_000_000  # entries of token masses that wait to be summed
_WAITING = 1 << 17  # entries that wait to be put in their place
SLICE = 1 << 14  # features


class Best:
    """Of each group the `n` entries of largest score (0 to 2^31-1), the earlier one among equals.

    once    at most one a document, its best
    """

    COLUMNS = ("group", "score", "row", "act", "document")

    def __init__(self, n: int, n_groups: int, *, once: bool = False):
        self.n, self.once = n, once
        self.floor = torch.full((n_groups,), -1, dtype=torch.int32)  # what a score has to exceed to enter
        kinds = (torch.int64, torch.int32, torch.int32, torch.float32, torch.int32)
        self.kept = tuple(torch.zeros(0, dtype=kind) for kind in kinds)
        self.pending: list[tuple[Tensor, ...]] = []
        self.waiting = 0

    def offer(self, group: Int[Tensor, " m"], score: Int[Tensor, " m"], entries: Entries) -> None:
        better = (score > self.floor[group]).nonzero().flatten()
        rest = (entries.row[better], entries.act[better], entries.document[better])
        self.pending.append((group[better], score[better], *rest))
        self.waiting += len(better)
        if self.waiting > max(_WAITING, len(self.kept[0]) // 4):
            self.merge()

    def merge(self) -> None:
        """Put what waits in its place; when this is done decides nothing but memory."""
        if not self.waiting:
            return
        columns = [
            torch.cat([old, *(one.to(old.dtype) for one in new)])
            for old, *new in zip(self.kept, *self.pending, strict=True)
        ]
        self.pending, self.waiting = [], 0
        order = by(columns[0], columns[1])
        if self.once:
            group, document = columns[0][order], columns[4][order]
            # a document's best comes first among its own: of each (group, document) the first in this order
            own = (group << 32 | document).argsort(stable=True)
            order = order[own[first_of(group[own], document[own])].sort().values]
        rank = _rank(columns[0][order])
        order, rank = order[rank < self.n], rank[rank < self.n]
        self.kept = tuple(column[order] for column in columns)
        last = rank == self.n - 1
        self.floor[self.kept[0][last]] = self.kept[1][last]


class Masses:
    """Of each feature the tokens that have most of its activation: sum and count."""

    def __init__(self, n: int):
        self.n = n
        self.keys = torch.zeros(0, dtype=torch.int64)  # feature << 32 | token
        self.sums = torch.zeros(0, dtype=torch.float64)
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.waiting = 0

    def add(self, entries: Entries) -> None:
        self.pending.append((entries.feature << 32 | entries.token, entries.act))
        self.waiting += len(entries.act)
        if self.waiting > max(_PENDING, len(self.keys)):
            self.merge()

    def merge(self) -> None:
        if not self.waiting:
            self.pending = []
            return
        new = [torch.cat(column) for column in zip(*self.pending, strict=True)]
        self.pending, self.waiting = [], 0
        keys = torch.cat([self.keys, new[0]])
        order = keys.argsort(stable=True)
        keys = keys[order]
        first = first_of(keys)
        into = first.cumsum(0) - 1
        n = int(into[-1]) + 1
        sums = torch.cat([self.sums, new[1].double()])[order]
        counts = torch.cat([self.counts, torch.ones(len(new[0]), dtype=torch.int64)])[order]
        self.keys = keys[first]
        self.sums = torch.zeros(n, dtype=torch.float64).index_add_(0, into, sums)
        self.counts = torch.zeros(n, dtype=torch.int64).index_add_(0, into, counts)

    def prune(self) -> None:
        """Keep the n of largest mass of each feature, the lower token among equals; by key again."""
        self.merge()
        order = self.sums.argsort(descending=True, stable=True)
        order = order[(self.keys[order] >> 32).argsort(stable=True)]
        order = order[_rank(self.keys[order] >> 32) < self.n].sort().values
        self.keys, self.sums, self.counts = self.keys[order], self.sums[order], self.counts[order]


class Gather:
    """The state of a pass; `tensors()` and `Gather.of()` carry it through a file."""

    def __init__(self, n_features: int, top: int = TOP):
        self.slices = [_Slice(min(SLICE, n_features - first), top) for first in range(0, n_features, SLICE)]

    def add(self, entries: Entries, best: Int[Tensor, " m"]) -> None:
        """Entries of a block; `best` picks the largest one of each (document, feature) in it."""
        if len(self.slices) == 1:
            self.slices[0].add(entries, entries[best])
            return
        own, strongest = entries.feature // SLICE, entries[best]
        owner = strongest.feature // SLICE
        for number, one in enumerate(self.slices):
            parts = [whole[(of == number).nonzero().flatten()] for whole, of in ((entries, own), (strongest, owner))]
            one.add(*(replace(part, feature=part.feature - number * SLICE) for part in parts))

    def close_part(self) -> None:
        """Least masses are dropped at fixed places of the text, and nothing waits any more."""
        for one in self.slices:
            one.close_part()

    def stats(self, n_tokens: int) -> dict[str, Tensor]:
        """max_act, density, mass (sum of activation), p999 [F], bands [F, 10], octaves [F, 34]."""
        return _joined([one.stats(n_tokens) for one in self.slices])

    def examples(self) -> dict[str, Tensor]:
        """CSR by feature (`offsets`): `row`, `act`, `document`, `kind`: 0 the strongest, 1 to 10 a sample of that tenth
        of [0, max], 11 a uniform sample, strongest first."""
        found, offsets, total = [one.examples() for one in self.slices], [torch.zeros(1, dtype=torch.int64)], 0
        for one in found:
            own = one.pop("offsets")
            offsets.append(own[1:] + total)
            total += int(own[-1])
        return _joined(found) | {"offsets": torch.cat(offsets)}

    def top_tokens(self, n: int) -> dict[str, Tensor]:
        """`token` [F, n] (-1 where there are fewer), their `mass` (summed activation) and `firing` (how often)."""
        return _joined([one.top_tokens(n) for one in self.slices])

    def tensors(self) -> dict[str, Tensor]:
        """All of it, at the end of a part."""
        return {f"{i}.{name}": value for i, one in enumerate(self.slices) for name, value in one.tensors().items()}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], n_features: int, top: int = TOP) -> Gather:
        """What `tensors` gave."""
        made = cls(0, top)
        for number in range(-(-n_features // SLICE)):
            own = {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{number}.")}
            made.slices.append(_Slice.of(own, top))
        return made


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class _Slice:
    """The state of a pass for some consecutive features, numbered from 0."""

    def __init__(self, n_features: int, top: int):
        F = self.F = n_features
        self.count = torch.zeros(F, dtype=torch.int64)
        self.histogram = torch.zeros(F * BINS, dtype=torch.int32)
        self.max_act = torch.zeros(F)
        self.mass = torch.zeros(F, dtype=torch.float64)
        self.top = Best(top, F, once=True)
        self.sample = Best(SAMPLED, F)
        self.bins = Best(PER_BIN, F * BINS)
        self.masses = Masses(TOKENS)

    def add(self, entries: Entries, strongest: Entries) -> None:
        feature, act = entries.feature, entries.act
        self.count += torch.bincount(feature, minlength=self.F)
        bins = _bin(act)
        self.histogram.index_add_(0, feature * BINS + bins, torch.ones(len(bins), dtype=torch.int32))
        self.max_act.scatter_reduce_(0, feature, act, "amax")
        self.mass.index_add_(0, feature, act.double())
        self.top.offer(strongest.feature, strongest.act.view(torch.int32), strongest)
        priority = _priority(feature, entries.row)
        self.sample.offer(feature, priority, entries)
        self.bins.offer(feature * BINS + bins, priority, entries)
        self.masses.add(entries)

    def close_part(self) -> None:
        for best in (self.top, self.sample, self.bins):
            best.merge()
        self.masses.merge()
        if len(self.masses.keys) > 2 * TOKENS * self.F:
            self.masses.prune()

    # ---- what came out ----

    def stats(self, n_tokens: int) -> dict[str, Tensor]:
        histogram = self.histogram.view(self.F, BINS)
        return {
            "max_act": self.max_act,
            "density": (self.count.double() / max(n_tokens, 1)).float(),
            "mass": self.mass.float(),
            "p999": quantile(histogram, self.max_act, 0.999),
            "bands": self._bands(histogram),
            "octaves": histogram.view(self.F, OCTAVES, PER_OCTAVE).sum(2).int(),
        }

    def _bands(self, histogram: Tensor) -> Tensor:
        """By the histogram; exact where the uniform sample has all of a feature's firings."""
        found, few = bands(histogram, self.max_act), self.count <= SAMPLED
        feature, act = self.sample.kept[0], self.sample.kept[3]
        own = few[feature]
        band = (act[own] / self.max_act[feature[own]] * BANDS).floor().clamp(max=BANDS - 1).long()
        exact = torch.bincount(feature[own] * BANDS + band, minlength=self.F * BANDS).view(self.F, BANDS)
        return torch.where(few[:, None], exact.int(), found)

    def examples(self) -> dict[str, Tensor]:
        parts = []
        group, _, row, act, document = self.top.kept
        parts.append((group, torch.zeros(len(group), dtype=torch.uint8), row, act, document))
        parts.append(self._of_bands())
        group, _, row, act, document = self.sample.kept
        order = by(group, act.view(torch.int32))
        kind = torch.full((len(group),), BANDS + 1, dtype=torch.uint8)
        parts.append((group[order], kind, row[order], act[order], document[order]))
        group, kind, row, act, document = (torch.cat(column) for column in zip(*parts, strict=True))
        order = (group * (BANDS + 2) + kind).argsort(stable=True)
        offsets = torch.searchsorted(group[order], torch.arange(self.F + 1))
        return {"offsets": offsets, "kind": kind[order], "row": row[order], "act": act[order],
                "document": document[order]}  # fmt: skip

    def _of_bands(self) -> tuple[Tensor, ...]:
        """Up to PER_BAND of each tenth, by priority; where the bins' samples that lie in it are fewer, the
        strongest and the uniform sample fill it up."""
        group, priority, row, act, document = self.bins.kept
        columns = [(group // BINS, priority, row, act, document)]
        for other in (self.sample.kept, self.top.kept):
            columns.append((other[0], _priority(other[0], other[2]), other[2], other[3], other[4]))
        feature, priority, row, act, document = (torch.cat(column) for column in zip(*columns, strict=True))
        band = (act / self.max_act[feature] * BANDS).floor().clamp(max=BANDS - 1).long()
        source = torch.repeat_interleave(torch.tensor([2, 1, 0]), torch.tensor([len(c[0]) for c in columns]))
        order = by(feature * BANDS + band, (source << 29 | (priority.long() >> 2)).int())
        # one row may come from several sources: the first stands
        own = (feature[order] << 32 | row[order]).argsort(stable=True)
        order = order[own[first_of(feature[order][own], row[order][own])].sort().values]
        order = order[_rank((feature * BANDS + band)[order]) < PER_BAND]
        return feature[order], (band[order] + 1).to(torch.uint8), row[order], act[order], document[order]

    def top_tokens(self, n: int) -> dict[str, Tensor]:
        self.masses.prune()
        feature, token = self.masses.keys >> 32, self.masses.keys & 0xFFFFFFFF
        order = self.masses.sums.argsort(descending=True, stable=True)
        order = order[feature[order].argsort(stable=True)]
        rank = _rank(feature[order])
        order, rank = order[rank < n], rank[rank < n]
        at = feature[order] * n + rank
        found = {
            "token": torch.full((self.F * n,), -1, dtype=torch.int32),
            "mass": torch.zeros(self.F * n),
            "firing": torch.zeros(self.F * n, dtype=torch.int32),
        }
        found["token"][at] = token[order].int()
        found["mass"][at] = self.masses.sums[order].float()
        found["firing"][at] = self.masses.counts[order].int()
        return {name: column.view(self.F, n) for name, column in found.items()}

    # ---- through a file ----

    def tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in _PLAIN}
        for name in ("top", "sample", "bins"):
            best: Best = getattr(self, name)
            found[f"{name}.floor"] = best.floor
            found |= {f"{name}.{column}": value for column, value in zip(Best.COLUMNS, best.kept, strict=True)}
        return found | {f"masses.{name}": getattr(self.masses, name) for name in ("keys", "sums", "counts")}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], top: int) -> _Slice:
        made = cls(len(tensors["count"]), top)
        for name in _PLAIN:
            setattr(made, name, tensors[name])
        for name in ("top", "sample", "bins"):
            best: Best = getattr(made, name)
            best.floor = tensors[f"{name}.floor"]
            best.kept = tuple(tensors[f"{name}.{column}"] for column in Best.COLUMNS)
        for name in ("keys", "sums", "counts"):
            setattr(made.masses, name, tensors[f"masses.{name}"])
        return made


def _rank(group: Tensor) -> Tensor:
    """The place of each entry in its run of equal groups."""
    at = torch.arange(len(group))
    begin = torch.where(first_of(group), at, 0)
    return at - begin.cummax(0).values if len(group) else at


def _priority(feature: Tensor, row: Tensor) -> Tensor:
    """31 bits of a hash (splitmix64) of feature and row."""
    x = (feature.long() << 40) + row.long()  # distinct below 2^40 rows
    x = (x + 0x1E3779B97F4A7C15) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x6B2FB644ECCEEE15
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return (x & LARGEST).int()


def _bin(values: Tensor) -> Tensor:
    return ((values.log2() - LOWEST) * PER_OCTAVE).floor().long().clamp(0, BINS - 1)


def _edges() -> Tensor:
    return 2.0 ** (LOWEST + torch.arange(BINS + 1) / PER_OCTAVE)


def quantile(histogram: Int[Tensor, "F bins"], max_act: Float[Tensor, " F"], q: float) -> Float[Tensor, " F"]:
    """The quantile over firing tokens, to within one bin (9 %), never above the maximum; 0 where nothing fired."""
    cumulative = histogram.cumsum(1)
    target = (cumulative[:, -1:].double() * q).ceil().clamp(min=1)
    return torch.minimum(_edges()[(cumulative < target).sum(1).clamp(max=BINS - 1) + 1], max_act)


def bands(histogram: Int[Tensor, "F bins"], max_act: Float[Tensor, " F"]) -> Int[Tensor, "F 10"]:
    """Firing tokens in each tenth of [0, max], to within what one bin of the log histogram resolves."""
    cumulative = torch.cat([torch.zeros(len(histogram), 1), histogram.cumsum(1).float()], 1)
    edges = _edges()
    below = []
    for tenth in range(1, BANDS):
        level = (max_act * tenth / BANDS)[:, None].clamp(min=float(edges[0]))
        at = _bin(level)
        share = ((level - edges[at]) / (edges[at + 1].minimum(max_act[:, None]) - edges[at])).clamp(0, 1)
        below.append(cumulative.gather(1, at) + share.nan_to_num(0) * histogram.gather(1, at))
    columns = torch.cat([torch.zeros(len(histogram), 1), *below, cumulative[:, -1:]], 1)
    return columns.round().diff(dim=1).int()
