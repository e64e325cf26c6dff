"""Contrast: which features separate texts with a concept from texts of the same form without it.

Texts are max-pooled; a feature's AUROC is P(it fires more strongly in a text with the concept than in one without),
ties half, from the texts in which it fires alone, so that nothing of shape [texts, F] is made. Half of the texts
choose, the other half is reported; a group of texts (one template, one prompt) stays in one half. Among many features
some separate small halves by luck: `noise` says how well the best does when labels are shuffled (methods 5.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.documents import hashed
from sae.features.index import Text
from sae.features.parts import StoredMaxima
from sae.features.pool import LARGEST, DocumentMaxima, by, first_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float, Int

ENOUGH = 5  # firing texts below which an AUROC is shrunk towards 0.5
_DRAWS = 10  # shuffles of the labels


@dataclass(frozen=True)
class Side:
    """Texts and where their maxima are."""

    texts: Sequence[Text]
    maxima: DocumentMaxima | StoredMaxima
    rows: Int[Tensor, " n"]  # of maxima

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Contrast:
    """Of every feature, over two sides."""

    auroc: Float[Tensor, " F"]
    difference: Float[Tensor, " F"]
    """Of mean max-pooled activations, raw units."""
    sensitivity: Float[Tensor, " F"]
    """Share of the positive texts in which it fires."""
    specificity: Float[Tensor, " F"]
    """Share of the negative texts in which it does not."""
    n_fired: Int[Tensor, " F"]
    """Texts of either side in which it fires."""

    @property
    def shrunk(self) -> Float[Tensor, " F"]:
        """AUROC less ½, shrunk where few texts fire (methods 5.3)."""
        return (self.auroc - 0.5) * (self.n_fired / ENOUGH).clamp(max=1)


class Pair:
    """Two sides and the firing texts of every feature, ranked once: the AUROC of any labelling is then one sum."""

    def __init__(self, positives: Side, negatives: Side, F: int):
        parts = []
        for side, first in ((positives, 0), (negatives, len(positives))):
            row, feature, value = side.maxima.select(side.rows)
            parts.append((row + first, feature, value))
        self.text, self.feature, self.value = (torch.cat(column) for column in zip(*parts, strict=True))
        self.F, self.n_pos, self.n_neg = F, len(positives), len(negatives)
        self.units = _units(positives, negatives)
        self.n_fired = torch.bincount(self.feature, minlength=F)
        self.place = places(self.feature, self.value, F)[0]

    def auroc(self, positive: Bool[Tensor, " n"]) -> Float[Tensor, " F"]:
        """With these texts as the positive ones."""
        mask, n, n_pos = positive[self.text], self.n_pos + self.n_neg, int(positive.sum())
        won = pairs_won(self.feature[mask], self.place[mask], n - self.n_fired, n_pos)
        return (won / (n_pos * (n - n_pos))).float()


def contrast(pair: Pair) -> Contrast:
    """Compare two sides."""
    n_pos, n_neg, F = pair.n_pos, pair.n_neg, pair.F
    positive = pair.text < n_pos
    means, fired = [], []
    for mask, n in ((positive, n_pos), (~positive, n_neg)):
        feature = pair.feature[mask]
        means.append(torch.zeros(F).index_add_(0, feature, pair.value[mask]) / n)
        fired.append(torch.bincount(feature, minlength=F) / n)
    return Contrast(
        auroc=pair.auroc(torch.arange(n_pos + n_neg) < n_pos),
        difference=means[0] - means[1],
        sensitivity=fired[0],
        specificity=1 - fired[1],
        n_fired=pair.n_fired,
    )


def noise(pair: Pair, among: Bool[Tensor, " F"], *, seed: int = 0) -> float:
    """AUROC of the feature, among some, that separates best when the labels of all these texts are shuffled: the mean
    of ten shuffles, each with the same ranking (shrunk AUROC). What a choice among so many features reaches by luck.

    Texts of one group keep one label, where the group lies on one side; then the number of positive texts is about the
    same, not exactly.
    """
    shrink = (pair.n_fired / ENOUGH).clamp(max=1) * among
    generator = torch.Generator().manual_seed(seed)
    n_units = int(pair.units.max()) + 1
    best = []
    for _ in range(_DRAWS):
        order = torch.randperm(n_units, generator=generator)
        sizes = torch.bincount(pair.units, minlength=n_units)[order].cumsum(0)
        chosen = order[: max(1, int((sizes <= pair.n_pos).sum()))]
        label = torch.isin(pair.units, chosen)
        auroc = pair.auroc(label)
        best.append(float(auroc[((auroc - 0.5) * shrink).argmax()]))
    return sum(best) / len(best)


def _units(positives: Side, negatives: Side) -> Int[Tensor, " n"]:
    """What is shuffled as one: a group of texts on one side, else a single text."""
    own = [[text.group or text.text for text in side.texts] for side in (positives, negatives)]
    both = set(own[0]) & set(own[1])
    names: dict[object, int] = {}
    found = [
        names.setdefault((i, j) if group in both else group, len(names))
        for i, side in enumerate(own)
        for j, group in enumerate(side)
    ]
    return torch.tensor(found, dtype=torch.int64)


def places(
    features: Int[Tensor, " nnz"], values: Float[Tensor, " nnz"], F: int
) -> tuple[Float[Tensor, " nnz"], Float[Tensor, " F"]]:
    """Each entry's midrank among the texts in which its feature fires, from 1; and Σ t³ − t over a feature's ties.

    Both in float64; the texts in which a feature is silent are no part of either.
    """
    order = by(features, LARGEST - values.float().view(torch.int32))  # weakest first
    features, values = features[order], values[order]
    count = torch.bincount(features, minlength=F)
    place, ties = torch.zeros(len(order), dtype=torch.float64), torch.zeros(F, dtype=torch.float64)
    if not len(order):
        return place, ties
    new = first_of(features, values)
    tie = new.cumsum(0) - 1
    size = torch.bincount(tie)
    before = torch.arange(len(order)) - (count.cumsum(0) - count)[features]
    place[order] = before[new][tie] + (size[tie] + 1).double() / 2
    ties.index_add_(0, features[new], size.double() ** 3 - size)
    return place, ties


def pairs_won(
    feature: Int[Tensor, " m"], place: Float[Tensor, " m"], silent: Int[Tensor, " F"], n_pos: int
) -> Float[Tensor, " F"]:
    """U: in how many pairs of a positive and a negative text the positive one fires more strongly, ties half (float64).

    feature, place   of the entries of the positive texts, places as `places` gives them
    silent           in how many texts of either side each feature is silent: these tie at zero in one block below
    """
    F = len(silent)
    fired = torch.bincount(feature, minlength=F)
    ranks = torch.zeros(F, dtype=torch.float64).index_add_(0, feature, place)
    ranks += fired * silent + (n_pos - fired) * (silent + 1) / 2
    return ranks - n_pos * (n_pos + 1) / 2


def auroc(
    features: Int[Tensor, " nnz"],
    values: Float[Tensor, " nnz"],
    positive: Bool[Tensor, " nnz"],
    n_pos: int,
    n_neg: int,
    F: int,
) -> Float[Tensor, " F"]:
    """P(positive > negative) + ½P(equal) of every feature, from its firing texts only.

    An entry is one text in which a feature fires, its value > 0; all other texts tie at zero in one block.
    Rank sums in float64, ties by midranks; never [texts, F].
    """
    silent = n_pos + n_neg - torch.bincount(features, minlength=F)
    place = places(features, values, F)[0]
    return (pairs_won(features[positive], place[positive], silent, n_pos) / (n_pos * n_neg)).float()


def halves(side: Side, seed: int) -> tuple[Side, Side]:
    """Half for choosing, half for reporting, by hash; a group stays together where it is not itself most of the
    texts."""
    own = [text.group or text.text for text in side.texts]
    order = sorted(range(len(own)), key=lambda i: (hashed(seed, own[i]), hashed(seed, side.texts[i].text), i))
    n, groups = len(order), [own[i] for i in order]
    cuts = [cut for cut in range(n // 4, n - n // 4 + 1) if 0 < cut < n and groups[cut - 1] != groups[cut]]
    cut = min(cuts, key=lambda cut: abs(cut - n / 2), default=n // 2)
    first, second = sorted(order[:cut]), sorted(order[cut:])
    return _some(side, first), _some(side, second)


def _some(side: Side, which: list[int]) -> Side:
    return Side([side.texts[i] for i in which], side.maxima, side.rows[which])


def ranked(*keys: Tensor) -> Int[Tensor, " n"]:
    """Indices by the first key, largest first; ties by the next, then by index."""
    order = torch.arange(len(keys[0]))
    for key in reversed(keys):
        order = order[key[order].to(torch.float64).argsort(descending=True, stable=True)]
    return order
