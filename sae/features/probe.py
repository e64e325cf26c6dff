"""Probes: can a few features tell classes of texts apart as well as the whole residual, or the words alone, can?

Every contender is an L2 logistic regression on the same folds: the k features that differ most between the classes
(max-pooled), the residual at the SAE's hook (mean- and max-pooled), and a bag of words. Features, scaling and penalty
are chosen inside each training fold, so that no figure has seen its own test texts. Cost: one pass of the host, then
Newton steps, cubic in the smaller of texts and residual width (the words' cubic in texts up to 5,000 words). Not known
here: whether a probe works on texts of another form or source.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.errors import UserError
from sae.evaluation.intervals import BOOTSTRAP_FROM, Estimates, Interval, multinomial
from sae.features.compare import seen_only, told
from sae.features.labelled import Labelled
from sae.features.logistic import PENALTIES, logistic
from sae.features.pool import DocumentMaxima, counted, document_maxima, text_blocks

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from sae.activations.harvest import Block
    from sae.autoencoder import SAE
    from sae.host import Host

WIDTHS = (1, 2, 5, 20)
FOLDS, INNER = 5, 3
_MOST_WORDS = 5_000


def folds(labels: Int[Tensor, " n"], units: Int[Tensor, " n"], count: int, seed: int = 0) -> Int[Tensor, " n"]:
    """The fold of every text, 0 to count − 1; texts of one unit are in one fold, classes are spread evenly.

    Units are dealt out in an order shuffled by `seed`, largest first, each to the fold that has fewest texts of its
    class (of the class of its first text, where it holds several), then fewest texts.
    """
    generator = torch.Generator().manual_seed(seed)
    names, unit = units.unique(return_inverse=True)
    size = torch.bincount(unit)
    first = torch.full((len(names),), len(unit)).scatter_reduce_(0, unit, torch.arange(len(unit)), "amin")
    shuffled = torch.randperm(len(names), generator=generator)
    order = shuffled[size[shuffled].argsort(descending=True, stable=True)]
    held = torch.zeros(int(labels.max()) + 1, count, dtype=torch.int64)
    fold = torch.zeros(len(names), dtype=torch.int64)
    for one in order.tolist():
        of_class = held[labels[first[one]]]
        fold[one] = min(range(count), key=lambda j, has=of_class: (int(has[j]), int(held[:, j].sum())))
        held[:, fold[one]] += torch.bincount(labels[unit == one], minlength=len(held))
    return fold[unit]


# --- what probes read --------------------------------------------------------------------------


@dataclass(frozen=True)
class Pooled:
    """What is known of n texts: their features' maxima, their residual pooled, their words."""

    maxima: DocumentMaxima
    residual: dict[str, Float[Tensor, "n d"]]
    """By the way of pooling over a text's counted positions: mean, max."""
    words: Float[Tensor, "n V"]

    def __len__(self) -> int:
        return len(self.maxima)


def pooled(
    sae: SAE, host: Host, texts: Labelled, progress: Callable[[int], None] | None = None
) -> tuple[Labelled, Pooled]:
    """Run the texts through host and SAE once. Texts of which no token counts are left out of both results."""
    hook = host.hook(sae.cfg.metadata.hook_name)
    n, d = len(texts.texts), host.width(hook)
    total, largest, count = torch.zeros(n, d), torch.full((n, d), -torch.inf), torch.zeros(n, 1)

    def noted(blocks: Iterator[Block]) -> Iterator[Block]:
        for block in blocks:
            rows = counted(block, hook).nonzero().flatten()
            doc, acts = block.doc[rows].long(), block.acts[hook][rows.to(block.acts[hook].device)].float().cpu()
            total.index_add_(0, doc, acts)
            count.index_add_(0, doc, torch.ones(len(doc), 1))
            largest.scatter_reduce_(0, doc[:, None].expand(-1, d), acts, "amax")
            yield block

    blocks = noted(told(text_blocks(texts.texts, sae, host, hook), progress))
    maxima = document_maxima(sae, blocks, n, hook=hook)
    seen = maxima.seen
    kept = texts.only(seen.tolist())
    residual = {"mean": (total / count.clamp(min=1))[seen], "max": largest[seen]}
    return kept, Pooled(seen_only(maxima), residual, bag_of_words(kept.texts))


def bag_of_words(texts: Sequence[str]) -> Float[Tensor, "n V"]:
    """log(1 + count) of the words that at least two texts hold (the 5,000 that most do), each text of length 1.

    Words are chosen without a look at the classes; one that a training fold lacks gets no weight there.
    """
    counts = [Counter(re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.casefold())) for text in texts]
    held = Counter(word for count in counts for word in count)
    kept = sorted((word for word in held if held[word] > 1), key=lambda word: (-held[word], word))[:_MOST_WORDS]
    column = {word: i for i, word in enumerate(kept)}
    X = torch.zeros(len(texts), max(1, len(kept)))
    for i, count in enumerate(counts):
        for word, times in count.items():
            if word in column:
                X[i, column[word]] = times
    return torch.nn.functional.normalize(X.log1p(), dim=1)


def most_different(
    maxima: DocumentMaxima, train: Bool[Tensor, " n"], y: Bool[Tensor, " n"], k: int
) -> Int[Tensor, " k"]:
    """The k features whose class means differ most, in units of their mean over the texts where they fire, best first.

    Only training texts are looked at; fewer than k come back where fewer fired. Gurnee et al. 2023 (max mean
    difference), scaled as Kantamneni et al. 2025 do.
    """
    F, documents = maxima.n_features, train.nonzero().flatten()
    rows, features, values = maxima.select(documents)
    positive = y[documents]
    sign_over_n = torch.where(positive, 1 / positive.sum().double(), -1 / (~positive).sum().double())
    values = values.double()
    difference = torch.zeros(F, dtype=torch.float64).index_add_(0, features, values * sign_over_n[rows])
    fired = torch.bincount(features, minlength=F)
    mean = torch.zeros(F, dtype=torch.float64).index_add_(0, features, values) / fired.clamp(min=1)
    score = torch.where(fired > 0, difference.abs() / mean.clamp(min=1e-12), -1.0)
    return score.argsort(descending=True, stable=True)[: min(k, int((fired > 0).sum()))]


def columns(maxima: DocumentMaxima, features: Int[Tensor, " k"]) -> Float[Tensor, "n k"]:
    """The maxima of a few features in all texts; 0 where silent."""
    rows, found, values = maxima.select(torch.arange(len(maxima)))
    place = torch.full((maxima.n_features,), -1)
    place[features] = torch.arange(len(features))
    kept = place[found] >= 0
    X = torch.zeros(len(maxima), len(features), dtype=torch.float64)
    X[rows[kept], place[found[kept]]] = values[kept].double()
    return X


Designs = Callable[[Tensor, Tensor], dict[str, Tensor]]


def designs(data: Pooled, widths: Sequence[int]) -> Designs:
    """What every contender reads, as a function of the training texts and which of them are positive: by name, [n, r].

    All rows are filled, only training rows decide on features, centre and scale. Sparse columns and residual
    components have unit variance over the training texts; words keep their scale.
    """

    def made(train: Bool[Tensor, " n"], y: Bool[Tensor, " n"]) -> dict[str, Tensor]:
        chosen = columns(data.maxima, most_different(data.maxima, train, y, max(widths)))
        found = {sparse(k): _standard(chosen[:, :k], train) for k in widths}
        found |= {f"residual, {how}": _rotated(_standard(X, train), train) for how, X in data.residual.items()}
        return found | {"bag of words": _rotated(data.words.double() - data.words[train].double().mean(0), train)}

    return made


def sparse(k: int) -> str:
    """The name of the probe on k features."""
    return f"{k} feature{'' if k == 1 else 's'}"


def _standard(X: Tensor, train: Tensor) -> Tensor:
    X = X.double()
    deviation, mean = torch.std_mean(X[train], dim=0, correction=0)
    return (X - mean) / torch.where(deviation > 1e-12, deviation, 1.0)


def _rotated(X: Tensor, train: Tensor) -> Tensor:
    """The same texts along the axes that the training texts span: with an L2 penalty weights lie there, and fits cost
    what there are texts, not what there are columns."""
    if X.shape[1] <= int(train.sum()):
        return X
    values, vectors = torch.linalg.eigh(X[train] @ X[train].T)
    kept = values > 1e-10 * values[-1].clamp(min=1e-12)
    return X @ (X[train].T @ (vectors[:, kept] / values[kept].sqrt()))


# --- cross-validation --------------------------------------------------------------------------


def choose_penalty(
    made: Designs, train: Bool[Tensor, " n"], y: Bool[Tensor, " n"], units: Int[Tensor, " n"], seed: int
) -> dict[str, int]:
    """For every contender the place in PENALTIES with the least log loss over 3 folds inside the training texts; the
    stronger penalty where two are equal. Each inner fold chooses its own features, on its own training texts."""
    here = train.nonzero().flatten()
    inner = folds(y[here].long(), units[here], INNER, seed)
    losses: dict[str, Tensor] = {}
    for j in range(INNER):
        fit, test = here[inner != j], here[inner == j]
        mask = torch.zeros_like(train)
        mask[fit] = True
        for name, X in made(mask, y).items():
            weights = logistic(X[fit], y[fit])
            z = X[test] @ weights[:, :-1].T + weights[:, -1]
            loss = torch.nn.functional.softplus(torch.where(y[test][:, None], -z, z)).sum(0)
            losses[name] = losses.get(name, torch.zeros(len(PENALTIES), dtype=torch.float64)) + loss
    return {name: int(loss.argmin()) for name, loss in losses.items()}


def out_of_fold(
    made: Designs,
    labels: Int[Tensor, " n"],
    units: Int[Tensor, " n"],
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Float[Tensor, "n C"]]:
    """For every contender the probability of each class in each text, by probes that have not seen the text's fold.

    One class against the rest for each of C classes (C = 2: one probe for class 0, and 1 less it); five folds,
    the penalty chosen within each training fold.
    progress  called with the texts held out, for each fold and class
    """
    n, C = len(labels), int(labels.max()) + 1
    fold = folds(labels, units, FOLDS, seed)
    found: dict[str, Tensor] = {}
    for j in range(FOLDS):
        train = fold != j
        for c in range(C if C > 2 else 1):
            y = labels == c
            penalty = choose_penalty(made, train, y, units, seed)
            for name, X in made(train, y).items():
                (weights,) = logistic(X[train], y[train], PENALTIES[: penalty[name] + 1])[-1:]
                p = torch.sigmoid(X[~train] @ weights[:-1] + weights[-1])
                scores = found.setdefault(name, torch.zeros(n, C, dtype=torch.float64))
                scores[~train, c] = p
                if C == 2:
                    scores[~train, 1] = 1 - p
            if progress is not None:
                progress(int((~train).sum()))
    return found


# --- figures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How well one contender tells the classes of texts that it has not seen; 95 % intervals over texts (or groups)."""

    probe: str
    accuracy: Interval
    balanced: Interval
    """Mean over the classes of the share that is recognised."""
    auroc: Interval
    """Mean over the classes, each against the rest."""


def score(name: str, scores: Float[Tensor, "n C"], labels: Int[Tensor, " n"], units: Int[Tensor, " n"]) -> Score:
    """Figures of out-of-fold probabilities; units are drawn whole, 1,000 times (fewer than 30: linearised)."""
    C = scores.shape[1]
    right = (scores.argmax(1) == labels).double()
    of_class = torch.nn.functional.one_hot(labels, C).double()

    def balanced(weights: Tensor) -> Tensor:
        return ((weights * right) @ of_class / (weights @ of_class)).mean(1)

    def auroc(weights: Tensor) -> Tensor:
        classes = range(C) if C > 2 else range(1)
        return torch.stack([weighted_auroc(scores[:, c], labels == c, weights) for c in classes]).mean(0)

    return Score(
        name,
        _interval(lambda weights: (weights @ right) / weights.sum(1), units),
        _interval(balanced, units),
        _interval(auroc, units),
    )


def weighted_auroc(
    scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"], weights: Float[Tensor, "D n"]
) -> Float[Tensor, " D"]:
    """P(positive > negative) + ½P(equal) for each of D weightings of the texts; NaN where one side weighs nothing."""
    names, level = scores.unique(return_inverse=True)
    sums = [
        torch.zeros(len(weights), len(names), dtype=weights.dtype).index_add(1, level, weights * side)
        for side in (positive, ~positive)
    ]
    below = sums[1].cumsum(1) - sums[1] / 2
    return (sums[0] * below).sum(1) / (sums[0].sum(1) * sums[1].sum(1))


def _interval(statistic: Callable[[Tensor], Tensor], units: Tensor) -> Interval:
    _, unit = units.unique(return_inverse=True)
    count = int(unit.max()) + 1
    if count < BOOTSTRAP_FROM:
        members = torch.nn.functional.one_hot(unit, count).T.double()
        return Estimates({"n": members}).of(lambda sums: statistic(sums["n"]))
    value = float(statistic(torch.ones(1, len(unit), dtype=torch.float64))[0])
    draws = statistic(multinomial(count, seed=0)[:, unit])
    ends = torch.nanquantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Interval(value, float(ends[0]), float(ends[1]))


# --- the whole ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """A feature of a sparse probe that was fitted on all texts."""

    feature: int
    weight: float
    """Log-odds for its class that a standard deviation of its maximum adds."""
    folds: int
    """In how many of the five training folds it was chosen too."""


@dataclass(frozen=True)
class Classification:
    """How well probes tell classes apart, and with which features."""

    texts: Labelled
    units: int
    """What folds and intervals go by: texts, or fewer groups of them."""
    scores: list[Score]
    """The majority class first, then the contenders."""
    chosen: dict[str, dict[int, list[Chosen]]]
    """By class (of two, the first alone: a negative weight speaks for the other) and number of features; best first."""

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        chosen = {
            name: {str(k): [asdict(one) for one in features] for k, features in by_width.items()}
            for name, by_width in self.chosen.items()
        }
        return {
            **self.texts.to_dict(), "units": self.units, "folds": FOLDS,
            "scores": [asdict(one) for one in self.scores], "chosen": chosen,
        }  # fmt: skip


def classify(
    texts: Labelled,
    data: Pooled,
    *,
    widths: Sequence[int] = WIDTHS,
    progress: Callable[[int], None] | None = None,
) -> Classification:
    """Probes on k features for each of `widths`, on the residual and on words, on the same five folds.

    texts, data  as `pooled` gives them back
    progress     called with the texts held out, for each fold and class
    raises       UserError for widths that are not 1 or more
    source       sparse probing: Gurnee et al. 2023 (arXiv 2305.01610), Kantamneni et al. 2025 (arXiv 2502.16681). Other
                 than there: max-pooled over the text and not its last token, L2 and not L1, the penalty by log loss
                 (AUROC of one feature does not know it), and a figure for every text instead of one split
    """
    if not widths or min(widths) < 1:
        raise UserError(
            f"k is {', '.join(map(str, widths)) or 'not given'}: a probe reads at least 1 feature. Use k=1."
        )
    widths = sorted(set(widths))
    labels, units = torch.tensor(texts.labels), torch.tensor(texts.units(FOLDS))
    made = designs(data, widths)
    found = out_of_fold(made, labels, units, progress=progress)
    majority = torch.zeros(len(labels), len(texts.classes), dtype=torch.float64)
    majority[:, torch.bincount(labels).argmax()] = 1e-9  # chosen always, and nothing is ranked by it
    scores = [score(name, one, labels, units) for name, one in {"majority class": majority, **found}.items()]
    classes = texts.classes if len(texts.classes) > 2 else texts.classes[:1]
    chosen = {name: _chosen(data, made, labels, units, c, widths) for c, name in enumerate(classes)}
    return Classification(texts, len(units.unique()), scores, chosen)


def _chosen(
    data: Pooled, made: Designs, labels: Tensor, units: Tensor, c: int, widths: Sequence[int]
) -> dict[int, list[Chosen]]:
    y, everywhere = labels == c, torch.ones(len(labels), dtype=torch.bool)
    fold = folds(labels, units, FOLDS)
    in_folds = [most_different(data.maxima, fold != j, y, max(widths)).tolist() for j in range(FOLDS)]
    penalty, X = choose_penalty(made, everywhere, y, units, 0), made(everywhere, y)
    features = most_different(data.maxima, everywhere, y, max(widths)).tolist()
    found = {}
    for k in widths:
        (weights,) = logistic(X[sparse(k)], y, PENALTIES[: penalty[sparse(k)] + 1])[-1:]
        found[k] = [
            Chosen(feature, float(weight), sum(feature in one[:k] for one in in_folds))
            for feature, weight in zip(features[:k], weights, strict=False)
        ]
    return found
