"""Comparison of two corpora: which features fire otherwise in one than in the other, with false discoveries held.

Texts are max-pooled, and every feature that fired in any is tested by its ranks; p-values become q-values over all of
those. Figures are of all texts: nothing is chosen on one half and reported on another, since the q-values account
for the choice, but the AUROC of the best of thousands is still flattered by it. Cost: one pass of the host, then a
sort of the entries that fired. Not known here: whether a difference is one of meaning or of length, form or source;
both corpora should share these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.errors import UserError
from sae.features.contrast import pairs_won, places
from sae.features.index import ContextToken, Index
from sae.features.labelled import Labelled
from sae.features.lens import logit_lens
from sae.features.pool import DocumentMaxima, counted, document_maxima, entries, reader, text_blocks
from sae.features.rows import Shown, shown

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from sae.activations.harvest import Block
    from sae.autoencoder import SAE
    from sae.host import Host

# Up to here all 2^m ways of parting a feature's m firing texts are gone through: 65,536. Beyond (m = 17 to 19, p down
# to 1e-6) p is 0.79 to 1.5 of the exact value where half of the texts or more are silent, 0.49 to 1.3 where the maxima
# take only four values, and up to 13 times too large where all but one of 18 to 20 texts fire; the textbook's normal
# approximation is 2e-12 to 17 times the exact value there (experiments/data-report.md).
EXACT = 16
_AT_ONCE = 2**22  # subsets times features in memory at a time


@dataclass(frozen=True)
class Comparison:
    """Every feature's figures over two sets of texts, A and B."""

    n_a: int
    n_b: int
    fired: Bool[Tensor, " F"]
    """In at least one text: the features that were tested."""
    share_a: Float[Tensor, " F"]
    """Share of A's texts in which it fires."""
    share_b: Float[Tensor, " F"]
    mean_difference: Float[Tensor, " F"]
    """Mean of max-pooled activations in A less that in B, in units of max_act."""
    auroc: Float[Tensor, " F"]
    """P(a text of A fires more strongly than one of B) + ½ P(equal); silent texts are all equal."""
    p: Float[Tensor, " F"]
    """Two-sided; 1 for a feature that never fired."""
    q: Float[Tensor, " F"]
    """The smallest false-discovery rate at which it is among the discoveries; 1 for one that never fired."""

    def discoveries(self, fdr: float) -> int:
        """Features with q ≤ fdr."""
        return int((self.fired & (self.q <= fdr)).sum())


def compare(maxima: DocumentMaxima, in_a: Bool[Tensor, " D"], max_act: Float[Tensor, " F"]) -> Comparison:
    """Test every feature for a difference between the documents in A and all others.

    max_act  each feature's unit; where it is 0 (never seen firing) the largest maximum here takes its place
    memory   a few vectors as long as the entries that fired; never [D, F]
    raises   UserError where A or B is empty
    source   Mann & Whitney 1947 (the ranks); Benjamini & Hochberg 1995 (q)
    """
    n_a, n_b, F = int(in_a.sum()), int((~in_a).sum()), maxima.n_features
    if not n_a or not n_b:
        raise UserError(f"{n_a:,} texts against {n_b:,}: one side is empty. Give texts on both.")
    rows, features, values = maxima.select(torch.arange(len(maxima)))
    entry_in_a = in_a[rows]
    count = torch.bincount(features, minlength=F)
    count_a = torch.bincount(features[entry_in_a], minlength=F)
    place, ties = places(features, values, F)
    U = pairs_won(features[entry_in_a], place[entry_in_a], n_a + n_b - count, n_a)
    fired = count > 0
    p = p_values(features, place, ties, U, n_a, n_b)
    q = torch.ones(F, dtype=torch.float64)
    q[fired] = benjamini_hochberg(p[fired])
    largest = torch.zeros(F).scatter_reduce_(0, features, values, "amax")
    unit = torch.where(max_act > 0, max_act.float(), largest).clamp(min=1e-9)
    sign_over_n = torch.where(entry_in_a, 1 / n_a, -1 / n_b)
    return Comparison(
        n_a=n_a,
        n_b=n_b,
        fired=fired,
        share_a=count_a / n_a,
        share_b=(count - count_a) / n_b,
        mean_difference=torch.zeros(F).index_add_(0, features, values * sign_over_n) / unit,
        auroc=U / (n_a * n_b),
        p=p,
        q=q,
    )


# --- p-values ----------------------------------------------------------------------------------


def p_values(
    features: Int[Tensor, " nnz"],
    place: Float[Tensor, " nnz"],
    ties: Float[Tensor, " F"],
    U: Float[Tensor, " F"],
    n_a: int,
    n_b: int,
) -> Float[Tensor, " F"]:
    """P(|U − n_a·n_b/2| at least as large as here) if which texts are A's were chance: Mann and Whitney's test.

    features, place, ties   the entries' features and `contrast.places` of them; U in pairs won by A, ties half

    A feature fires in m of the N texts and the rest tie at zero in one block, which is where the usual normal
    approximation fails: with 10 texts against 190 and 5 firing, all in the 10, it says 1e-22, and the truth is
    1e-7. So the block is taken exactly: the number j of A's texts among the m is hypergeometric; given j, the sum of
    their places is exact up to m = 16 (all subsets), and beyond that normal, with corrections for ties and
    continuity. Without silent texts that is the textbook's test; with all firing texts tied, Fisher's.
    Cost: the entries, and 2^16 a feature at most.
    """
    F, N = len(U), n_a + n_b
    count = torch.bincount(features, minlength=F)
    distance = (U - n_a * n_b / 2).abs()
    p = torch.ones(F, dtype=torch.float64)
    by_feature = place[features.argsort(stable=True)]
    start = count.cumsum(0) - count
    for m in range(1, EXACT + 1):
        these = (count == m).nonzero().flatten()
        for part in these.split(max(1, _AT_ONCE >> m)):
            of_part = by_feature[start[part][:, None] + torch.arange(m)]
            p[part] = _exact(of_part, distance[part], n_a, N)
    many = (count > EXACT).nonzero().flatten()
    p[many] = _by_blocks(count[many], ties[many], distance[many], n_a, N)
    return p.clamp(max=1.0)


def _exact(place: Float[Tensor, "n m"], distance: Float[Tensor, " n"], n_a: int, N: int) -> Float[Tensor, " n"]:
    m = place.shape[1]
    subsets = (torch.arange(2**m)[:, None] >> torch.arange(m) & 1).double()
    j = subsets.sum(1)
    possible = (j <= n_a) & (n_a - j <= N - m)
    subsets, j = subsets[possible], j[possible]
    weight = (_log_choose(torch.tensor(N - m), n_a - j) - _log_choose(torch.tensor(N), torch.tensor(n_a))).exp()
    U = subsets @ place.T + (_rest(j, N - m, n_a))[:, None]
    return (weight[:, None] * ((U - n_a * (N - n_a) / 2).abs() >= distance - 1e-6)).sum(0)


def _by_blocks(
    count: Int[Tensor, " n"], ties: Float[Tensor, " n"], distance: Float[Tensor, " n"], n_a: int, N: int
) -> Float[Tensor, " n"]:
    """Every possible j of every feature as one ragged list: as long as the entries, at most."""
    ways = count.clamp(max=n_a) + 1
    of = torch.repeat_interleave(torch.arange(len(count)), ways)
    j = (torch.arange(len(of)) - (ways.cumsum(0) - ways)[of]).double()
    m = count[of].double()
    weight = (_log_choose(m, j) + _log_choose(N - m, n_a - j) - _log_choose(torch.tensor(N), torch.tensor(n_a))).exp()
    centre = n_a * (N - n_a) / 2 - _rest(j, N - m, n_a)  # U is in its middle where the places sum to this
    mean = j * (m + 1) / 2
    deviation = (j * (m - j) / 12 * (m + 1 - ties[of] / (m * (m - 1)))).clamp(min=0).sqrt()
    above = _tail(centre + distance[of] - mean, deviation)
    below = _tail(mean - centre + distance[of], deviation)
    return torch.zeros(len(count), dtype=torch.float64).index_add_(0, of, weight * (above + below).clamp(max=1))


def _rest(j: Tensor, silent: Tensor | int, n_a: int) -> Tensor:
    """U of A's texts less the sum of their places, when j of them fire."""
    return j * silent + (n_a - j) * (silent + 1) / 2 - n_a * (n_a + 1) / 2


def _tail(over: Tensor, deviation: Tensor) -> Tensor:
    """P(a sum of places is at least its mean + over), a step of 1 counted from its middle."""
    normal = torch.erfc((over - 0.5) / (deviation.clamp(min=1e-9) * math.sqrt(2))) / 2
    return torch.where(deviation > 1e-9, normal, (over <= 1e-6).double())


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    """log of n over k; -inf where there is no way."""
    n, k = torch.broadcast_tensors(n.double(), k.double())
    found = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return torch.where((k >= 0) & (k <= n), found, -math.inf)


def benjamini_hochberg(p: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """q-values: min over all p' ≥ p of p'·M / (how many are ≤ p').

    Taking all with q ≤ α as discoveries holds the expected share of false ones at α where tests are independent or
    depend positively (Benjamini & Hochberg 1995; Benjamini & Yekutieli 2001).
    """
    order = p.argsort(stable=True)
    scaled = p[order] * len(p) / torch.arange(1, len(p) + 1, dtype=p.dtype)
    q = torch.empty_like(p)
    q[order] = scaled.flip(0).cummin(0).values.flip(0).clamp(max=1) if len(p) else scaled
    return q


# --- two corpora -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A feature that tells two corpora apart; see Comparison for the figures."""

    feature: int
    share_a: float
    share_b: float
    mean_difference: float
    auroc: float
    p: float
    q: float
    promotes: list[str]
    """The tokens that its direction promotes most (logit lens); empty where the hook is not of the host's width."""
    strongest: Shown
    """Where it fires most strongly in the side that has more of it."""
    example: Shown | None
    """Its strongest example in the index, where there is one."""

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        shown = {"strongest": self.strongest.marked(), "example": self.example and self.example.marked()}
        return {**asdict(self), **shown}


@dataclass(frozen=True)
class Diff:
    """How two corpora differ."""

    texts: Labelled
    """A's texts are of class 0, B's of class 1."""
    fdr: float
    tested: int
    discoveries: int
    """Features with q ≤ fdr."""
    shuffled: int
    """The same with the texts' sides shuffled once (seed 0): what chance gives."""
    more_in_a: list[Difference]
    more_in_b: list[Difference]

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        figures = {name: getattr(self, name) for name in ("fdr", "tested", "discoveries", "shuffled")}
        lists = {name: [one.to_dict() for one in getattr(self, name)] for name in ("more_in_a", "more_in_b")}
        return {**self.texts.to_dict(), **figures, **lists}


def diff(
    sae: SAE,
    host: Host,
    texts: Labelled,
    *,
    index: Index | None = None,
    n: int = 10,
    fdr: float = 0.05,
    progress: Callable[[int], None] | None = None,
) -> Diff:
    """The n features that fire most reliably more in A (class 0), and those in B, least p first.

    index     where the features' own examples come from; without one there are none
    progress  called with the number of positions read, block by block
    raises    UserError where fewer than 8 texts of a side can be read, or the index is another SAE's
    """
    if index is not None:
        index.check(sae)
    hook = host.hook(sae.cfg.metadata.hook_name)
    blocks = told(text_blocks(texts.texts, sae, host, hook), progress)
    maxima = document_maxima(sae, blocks, len(texts.texts), hook=hook)
    texts, maxima = texts.only(maxima.seen.tolist()), seen_only(maxima)
    in_a = torch.tensor(texts.labels) == 0
    unit = torch.zeros(sae.cfg.d_sae) if sae.stats is None else sae.stats.max_act.float().cpu()
    found = compare(maxima, in_a, unit)
    chance = compare(maxima, in_a[torch.randperm(len(in_a), generator=torch.Generator().manual_seed(0))], unit)

    sides = [_most(found, found.auroc > 0.5, n), _most(found, found.auroc < 0.5, n)]
    features = torch.cat(sides)
    where = [_strongest(maxima, feature, in_a == (i < len(sides[0]))) for i, feature in enumerate(features.tolist())]
    here = _in_context(sae, host, hook, [texts.documents[i].text for i in where], features.tolist())
    promotes: list[list[str]] = [[] for _ in where]
    if len(features) and sae.d_out == host.d_model:
        promotes = [host.text_of(row.tolist()) for row in logit_lens(host, sae.W_dec[features], top=5).top]
    differences = [
        Difference(
            feature=feature,
            **{
                name: float(getattr(found, name)[feature])
                for name in ("share_a", "share_b", "mean_difference", "auroc", "p", "q")
            },
            promotes=promotes[i],
            strongest=here[i],
            example=next(iter(shown(index, feature, index.examples(feature, 1))), None) if index is not None else None,
        )
        for i, feature in enumerate(features.tolist())
    ]
    return Diff(
        texts,
        fdr,
        int(found.fired.sum()),
        found.discoveries(fdr),
        chance.discoveries(fdr),
        differences[: len(sides[0])],
        differences[len(sides[0]) :],
    )


def told(blocks: Iterator[Block], progress: Callable[[int], None] | None) -> Iterator[Block]:
    """The same blocks, each told to `progress` when it is there."""
    for block in blocks:
        if progress is not None:
            progress(len(block))
        yield block


def seen_only(maxima: DocumentMaxima) -> DocumentMaxima:
    """Without the documents of which nothing is known."""
    kept = maxima.seen.nonzero().flatten()
    rows, features, values = maxima.select(kept)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(rows, minlength=len(kept)).cumsum(0)])
    return DocumentMaxima(offsets, features, values, maxima.seen[kept], maxima.n_features)


def _most(found: Comparison, there: Bool[Tensor, " F"], n: int) -> Int[Tensor, " n"]:
    """The features with the smallest p among some; ties by the distance of their AUROC from a half."""
    some = (found.fired & there).nonzero().flatten()
    some = some[(found.auroc[some] - 0.5).abs().argsort(descending=True, stable=True)]
    return some[found.p[some].argsort(stable=True)][:n]


def _strongest(maxima: DocumentMaxima, feature: int, among: Bool[Tensor, " D"]) -> int:
    rows, features, values = maxima.select(among.nonzero().flatten())
    of_feature = (features == feature).nonzero().flatten()
    return int(among.nonzero().flatten()[rows[of_feature[values[of_feature].argmax()]]])


def _in_context(sae: SAE, host: Host, hook: str, texts: Sequence[str], features: Sequence[int]) -> list[Shown]:
    """Where text i has its largest activation of features[i]; a second pass over these few texts."""
    peaks: list[tuple[float, list[int], int]] = [(0.0, [], 0) for _ in texts]
    wanted, read = torch.tensor(features), reader(sae)
    for block in text_blocks(texts, sae, host, hook) if texts else ():
        found = entries(read, block, hook, counted(block, hook))
        for entry in (found.feature == wanted[found.document]).nonzero().flatten().tolist():
            text, act = int(found.document[entry]), float(found.act[entry])
            if act > peaks[text][0]:
                peaks[text] = (act, *_around(block, int(found.row[entry])))
    return [
        Shown(
            act,
            i,
            "",
            [ContextToken(text, j == at, act if j == at else None) for j, text in enumerate(host.text_of(tokens))],
        )
        for i, (act, tokens, at) in enumerate(peaks)
    ]


def _around(block: Block, row: int, before: int = 12, after: int = 8) -> tuple[list[int], int]:
    """Token ids of the same text around a row, and the place of the row's own among them."""
    near = torch.arange(max(0, row - before), min(len(block), row + after + 1))
    same = (block.doc[near] == block.doc[row]) & (block.pos[near] - block.pos[row] == near - row)
    kept = near[same]
    return block.tokens[kept].tolist(), int((kept < row).sum())
