"""Search: which features separate texts that hold a concept from texts of the same form that do not.

Texts are max-pooled, features ranked by shrunk AUROC on half of the texts and reported on the other half
(methods 5.3). For steering, features that detect are ordered by what they make the model write: in a trial
where there is a host (trial.py), else by output score × the share of what they promote that belongs to the
concept. A query over the index's own documents needs neither host nor SAE and costs a sort of the entries
of at most 800 documents. Not known here: how well a feature steers on other prompts (steering/ measures
that).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.errors import UserError
from sae.features.index import ContextToken, DocumentMaxima, Index, IndexedDocument, Text, document_maxima
from sae.features.lens import output_scores
from sae.features.trial import Tried, try_out

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from sae.autoencoder import SAE
    from sae.host import Host

GOALS = ("detect", "steer")
FEWEST = 8  # positive texts: below this a contrast says nothing (methods 5.3)
_MOST_POSITIVES, _MOST_NEGATIVES, _NEGATIVES_EACH = 200, 600, 5
_DENSEST = 0.05  # denser features come after all others
_DETECTS = 0.75  # AUROC on the choosing half from which a feature counts as detecting
_CANDIDATES = 50  # considered for steering when fewer detect
_TRIED = 16  # of these at most that many are tried out
_LEAST = 1e-3  # output score × writes below this orders nothing


@dataclass(frozen=True)
class Shown:
    """An example as shown: the tokens around the firing one."""

    act: float
    document: int
    topic: str
    tokens: list[ContextToken]

    def marked(self) -> str:
        """One line, the firing token in «»."""
        parts = (_in_marks(token.text) if token.firing else token.text for token in self.tokens)
        return " ".join("".join(parts).split())


def _in_marks(text: str) -> str:
    word = text.lstrip()  # a token's space stands before the mark
    return f"{text[: len(text) - len(word)]}«{word}»" if word else f"«{text}»"


@dataclass(frozen=True)
class Found:
    """A feature that a search found; every figure but `auroc_choosing` is of texts not used for choosing
    it."""

    feature: int
    auroc: float
    """On the reported half: P(a text with the concept fires more strongly than one without)."""
    auroc_choosing: float
    mean_difference: float
    """Mean of max-pooled activations, with less without the concept, in units of the feature's maximum."""
    sensitivity: float
    """Share of the texts with the concept in which it fires."""
    density: float
    max_act: float
    output_score: float | None
    """How surely it makes the model say its own top tokens (methods 5.5); None without a host."""
    writes: float | None
    """Share of what it promotes and makes the model say that belongs to the concept; None without a host."""
    tried: float | None
    """How much of the concept it wrote in a trial (trial.py), 0..1; None where none was made."""
    strength: float | None
    """The strength that did best in the trial, in multiples of the maximum that `sae steer` uses: the SAE's
    own statistics', or max_act where it has none."""
    wrote: list[str]
    """The trial's answers at that strength."""
    top_tokens: list[str]
    says: list[str]
    examples: list[Shown]
    positives: int
    """Texts with the concept in the reported half."""
    negatives: int
    """Texts without it there."""

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            **asdict(self),
            "examples": [{"act": e.act, "topic": e.topic, "text": e.marked()} for e in self.examples],
        }


@dataclass(frozen=True)
class _Side:
    """Texts and where their maxima are."""

    texts: list[Text]
    maxima: DocumentMaxima
    rows: Int[Tensor, " n"]  # of maxima


def find(
    index: Index,
    concept: str | None = None,
    *,
    pos: Sequence[str] | None = None,
    neg: Sequence[str] | None = None,
    sae: SAE | None = None,
    host: Host | None = None,
    goal: str = "detect",
    n: int = 10,
    seed: int = 0,
) -> list[Found]:
    """The n features that best separate texts with a concept from texts without, best first.

    concept   looked for in the text and topic of the index's documents, as a phrase, or else all its words
    pos, neg  own texts instead, run through `host` and `sae`; without neg the negatives come from the index
    goal      "detect" orders by shrunk AUROC. "steer" orders those that detect by a trial (trial.py) where
              host and sae are given, else by output score × writes; the index's output scores, or where it
              has none computed for the candidates with host and sae
    seed      of the split into choosing and reporting halves
    Raises UserError for fewer than 8 positives or negatives, and when neither a concept nor texts are given.
    """
    if goal not in GOALS:
        raise UserError(f"find: the goal {goal!r} is not one of {', '.join(GOALS)}. Use one of them.")
    if n < 1:
        raise UserError(f"find: n is {n}, a search gives at least 1 feature. Use n=10.")
    if sae is not None:
        index.check(sae)
    if pos is not None:
        positives, negatives = _own_texts(index, concept, pos, neg, sae, host)
    elif neg is not None:
        raise UserError("find: negative texts without positive ones. Give --pos too, or a concept alone.")
    else:
        positives, negatives = _from_index(index, concept, seed)
    choosing, reporting = zip(_halves(positives, seed), _halves(negatives, seed), strict=True)

    F = index.facts.n_features
    density, max_act = index.stats["density"], index.stats["max_act"].clamp(min=1e-9)
    chosen, reported = _contrast(*choosing, F), _contrast(*reporting, F)
    difference = chosen.difference / max_act
    z = (chosen.auroc - 0.5) * (chosen.n_fired / 5).clamp(max=1)
    order = _ranked(density < _DENSEST, z, difference)
    if goal == "detect":
        order = order[:n]
    else:
        detecting = order[(chosen.auroc[order] >= _DETECTS) & (density[order] < _DENSEST)]
        order = detecting if len(detecting) >= _CANDIDATES else order[:_CANDIDATES]
    output = _what_it_says(index, order, sae, host, needed=goal == "steer")
    weights = _concept_words(concept, choosing)
    writes = _writes(output, _concept_tokens(index, weights)) if output is not None else None
    trial: list[Tried] | None = None
    if goal == "steer":
        product = torch.zeros(len(order))
        if output is not None and writes is not None and "output_score" in output:
            product = output["output_score"].nan_to_num(0) * writes
            product = product * (product >= _LEAST)
        here = _ranked(product, z[order])
        if host is not None and sae is not None and sae.cfg.d_in == host.d_model:
            best = torch.cat([here[: _TRIED // 3], torch.arange(len(order))])  # and else those that detect best
            here = torch.tensor(list(dict.fromkeys(best.tolist()))[:_TRIED])
            maxima = index.stats["max_act"] if sae.stats is None else sae.stats.max_act.float().cpu()
            tried = try_out(host, sae, order[here].tolist(), index.facts.hook, maxima, _words, weights)
            by_trial = _ranked(torch.tensor([one.score for one in tried]), product[here], z[order[here]])
            here, trial = here[by_trial], [tried[i] for i in by_trial.tolist()]
        here = here[:n]
        order, writes = order[here], None if writes is None else writes[here]
        output = None if output is None else {name: column[here] for name, column in output.items()}
    found = []
    for i, feature in enumerate(order.tolist()):
        score = float(output["output_score"][i]) if output is not None and "output_score" in output else math.nan
        found.append(
            Found(
                feature=feature,
                auroc=float(reported.auroc[feature]),
                auroc_choosing=float(chosen.auroc[feature]),
                mean_difference=float(reported.difference[feature] / max_act[feature]),
                sensitivity=float(reported.sensitivity[feature]),
                density=float(density[feature]),
                max_act=float(index.stats["max_act"][feature]),
                output_score=None if math.isnan(score) else score,
                writes=None if writes is None else float(writes[i]),
                tried=None if trial is None else trial[i].score,
                strength=None if trial is None else trial[i].times,
                wrote=[] if trial is None else trial[i].answers,
                top_tokens=_strings(index, output, "top", i),
                says=_strings(index, output, "says", i),
                examples=shown(index, feature, 3),
                positives=len(reporting[0].rows),
                negatives=len(reporting[1].rows),
            )
        )
    return found


def _ranked(*keys: Tensor) -> Tensor:
    """Indices by the first key, largest first; ties by the next, then by index."""
    order = torch.arange(len(keys[0]))
    for key in reversed(keys):
        order = order[key[order].to(torch.float64).argsort(descending=True, stable=True)]
    return order


def _strings(index: Index, output: dict[str, Tensor] | None, name: str, i: int) -> list[str]:
    if output is None or name not in output:
        return []
    return [index.token(token) for token in output[name][i].tolist()[:10] if token >= 0]


def shown(index: Index, feature: int, n: int, *, before: int = 12, after: int = 8) -> list[Shown]:
    """A feature's strongest examples with their contexts."""
    return [
        Shown(
            example.act,
            example.document,
            index.documents[example.document].topic,
            index.context(example.position, before, after, act=example.act),
        )
        for example in index.examples(feature, n)
    ]


# --- the texts ---------------------------------------------------------------------------------


def _word(word: str) -> str:
    """A pattern for a word, with or without inner hyphens and a plural s: email also finds E-mails."""
    return "-?".join(re.escape(letter) for letter in word) + r"(?:s|es)?"


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['+#][^\W_]*)*", text.casefold().replace("’", "'").replace("-", ""))


def matching(documents: Sequence[Text], concept: str, fewest: int = FEWEST) -> list[int]:
    """Documents whose text or topic holds the concept as a phrase, or all its words where the phrase is too
    rare."""
    words = _words(concept)
    if not words:
        raise UserError(f"find: {concept!r} holds no word to look for. Give a word or a phrase.")
    contents = [f"{document.topic}\n{document.text}".casefold().replace("’", "'") for document in documents]
    phrase = re.compile(r"(?<!\w)" + r"[\W_]+".join(map(_word, words)) + r"(?!\w)")
    found = [i for i, content in enumerate(contents) if phrase.search(content)]
    if len(found) >= fewest or len(words) == 1:
        return found
    each = [re.compile(r"(?<!\w)" + _word(word) + r"(?!\w)") for word in words]
    return [i for i, content in enumerate(contents) if all(pattern.search(content) for pattern in each)]


def _from_index(index: Index, concept: str | None, seed: int) -> tuple[_Side, _Side]:
    if concept is None:
        raise UserError('find: nothing to look for. Give a concept such as "Golden Gate Bridge", or texts with --pos.')
    documents, maxima = index.documents, index.maxima
    matches = matching(documents, concept)
    holding = [i for i in matches if bool(maxima.seen[i])]
    if len(holding) < FEWEST:
        raise UserError(
            f"find: {len(holding)} of {int(maxima.seen.sum()):,} indexed texts hold {concept!r}, "
            f"{FEWEST} are needed. Give at least {FEWEST} texts that hold it with --pos FILE "
            "(and others with --neg FILE)."
        )
    apart = set(matches)
    topics = {documents[i].topic for i in matches if documents[i].topic}
    others = [i for i in range(len(documents)) if bool(maxima.seen[i]) and i not in apart]
    elsewhere = [i for i in others if documents[i].topic not in topics]
    positives = _by_hash(holding, documents, seed)[:_MOST_POSITIVES]
    negatives = _of_same_forms(positives, elsewhere if len(elsewhere) >= len(positives) else others, documents, seed)
    _enough(
        len(negatives),
        "texts without it",
        "The indexed text is all about it: give others with --pos and --neg.",
    )
    return tuple(_Side([documents[i] for i in rows], maxima, torch.tensor(rows)) for rows in (positives, negatives))  # type: ignore[return-value]


def _own_texts(
    index: Index,
    concept: str | None,
    pos: Sequence[str],
    neg: Sequence[str] | None,
    sae: SAE | None,
    host: Host | None,
) -> tuple[_Side, _Side]:
    if sae is None or host is None:
        raise UserError("find: own texts must be run through the model. Give the host and the SAE too.")
    positives = _run(pos, index, sae, host)
    _enough(
        len(positives.texts),
        "positive texts",
        f"Give at least {FEWEST} with --pos; .txt files are split at empty lines.",
    )
    if neg is not None:
        negatives = _run(neg, index, sae, host)
        _enough(
            len(negatives.texts),
            "negative texts",
            f"Give at least {FEWEST} with --neg (.txt files are split at empty lines), or none to use the index's.",
        )
        return positives, negatives
    apart = set(matching(index.documents, concept, 1)) if concept else set()
    rows = [i for i in range(len(index.documents)) if bool(index.maxima.seen[i]) and i not in apart]
    rows = _by_hash(rows, index.documents, 0)[: min(_MOST_NEGATIVES, _NEGATIVES_EACH * len(positives.texts))]
    _enough(len(rows), "indexed texts to compare with", f"Give at least {FEWEST} with --neg.")
    return positives, _Side([index.documents[i] for i in rows], index.maxima, torch.tensor(rows))


def _enough(count: int, what: str, remedy: str) -> None:
    if count < FEWEST:
        what = what.replace("texts", "text", 1) if count == 1 else what
        raise UserError(f"find: {count} {what}, {FEWEST} are needed. {remedy}")


def _run(texts: Sequence[str], index: Index, sae: SAE, host: Host) -> _Side:
    """Max-pool the user's texts with host and SAE."""
    from sae.activations.harvest import stream
    from sae.text import Document, pack

    kept = [text for text in texts if text.strip()]
    documents = [Document(text=text, group=hashlib.sha256(text.encode()).hexdigest()) for text in kept]
    metadata, hook = sae.cfg.metadata, index.facts.hook
    rows = pack(documents, host.tokenizer, metadata.context_size or 128, special_ids=host.special_ids)
    limits = {hook: metadata.outlier_norm} if metadata.outlier_norm is not None else None
    maxima = document_maxima(sae, stream(host, rows, [hook], outlier_norm=limits), len(documents), hook=hook)
    seen = maxima.seen.nonzero().flatten()
    return _Side([documents[i] for i in seen.tolist()], maxima, seen)


def _hash(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def _by_hash(rows: Iterable[int], documents: Sequence[Text], seed: int) -> list[int]:
    return sorted(rows, key=lambda i: _hash(seed, "order", documents[i].text, i))


def _of_same_forms(positives: list[int], pool: list[int], documents: Sequence[Text], seed: int) -> list[int]:
    """Negatives with the positives' counts of forms, several for each positive."""
    wanted = Counter(documents[i].form for i in positives)
    each = min(_NEGATIVES_EACH, max(1, _MOST_NEGATIVES // len(positives)))
    by_form: dict[str, list[int]] = {}
    for i in _by_hash(pool, documents, seed):
        by_form.setdefault(documents[i].form, []).append(i)
    return [i for form, count in sorted(wanted.items()) for i in by_form.get(form, [])[: each * count]]


def _halves(side: _Side, seed: int) -> tuple[_Side, _Side]:
    """Half for choosing, half for reporting, by hash; a group stays together where it is not itself most of
    the texts."""
    order = sorted(
        range(len(side.texts)),
        key=lambda i: (
            _hash(seed, side.texts[i].group or side.texts[i].text),
            _hash(seed, side.texts[i].text),
            i,
        ),
    )
    n = len(order)
    groups = [side.texts[i].group or side.texts[i].text for i in order]
    cuts = [cut for cut in range(n // 4, n - n // 4 + 1) if 0 < cut < n and groups[cut - 1] != groups[cut]]
    cut = min(cuts, key=lambda cut: abs(cut - n / 2), default=n // 2)
    parts = (sorted(order[:cut]), sorted(order[cut:]))
    return tuple(_Side([side.texts[i] for i in part], side.maxima, side.rows[part]) for part in parts)  # type: ignore[return-value]


# --- the statistics ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Contrast:
    auroc: Float[Tensor, " F"]
    difference: Float[Tensor, " F"]  # of mean max-pooled activations, raw units
    sensitivity: Float[Tensor, " F"]
    n_fired: Int[Tensor, " F"]  # texts of either side in which it fires


def _contrast(positives: _Side, negatives: _Side, F: int) -> _Contrast:
    _, features_p, values_p = positives.maxima.select(positives.rows)
    _, features_n, values_n = negatives.maxima.select(negatives.rows)
    features, values = torch.cat([features_p, features_n]), torch.cat([values_p, values_n])
    positive = torch.arange(len(features)) < len(features_p)
    n_pos, n_neg = len(positives.rows), len(negatives.rows)
    sums = [torch.zeros(F).index_add_(0, f, v) for f, v in ((features_p, values_p), (features_n, values_n))]
    return _Contrast(
        auroc=auroc(features, values, positive, n_pos, n_neg, F),
        difference=sums[0] / n_pos - sums[1] / n_neg,
        sensitivity=torch.bincount(features_p, minlength=F) / n_pos,
        n_fired=torch.bincount(features, minlength=F),
    )


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
    place, _ = places(features, values, F)
    zeros = n_pos + n_neg - torch.bincount(features, minlength=F)
    ranks = torch.zeros(F, dtype=torch.float64)
    ranks.index_add_(0, features[positive], place[positive] + zeros[features[positive]])
    silent = n_pos - torch.bincount(features[positive], minlength=F)
    ranks += silent * (zeros + 1) / 2
    return ((ranks - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg)).float()


def places(
    features: Int[Tensor, " nnz"], values: Float[Tensor, " nnz"], F: int
) -> tuple[Float[Tensor, " nnz"], Float[Tensor, " F"]]:
    """Each entry's midrank among the texts in which its feature fires, from 1; and Σ t³ − t over a feature's ties.

    Both in float64; the texts in which a feature is silent are no part of either.
    """
    order = values.argsort(stable=True)
    order = order[features[order].argsort(stable=True)]
    features, values = features[order], values[order]
    count = torch.bincount(features, minlength=F)
    place, ties = torch.zeros(len(order), dtype=torch.float64), torch.zeros(F, dtype=torch.float64)
    if not len(order):
        return place, ties
    new = torch.ones(len(order), dtype=torch.bool)
    new[1:] = (features[1:] != features[:-1]) | (values[1:] != values[:-1])
    tie = new.cumsum(0) - 1
    size = torch.bincount(tie)
    before = torch.arange(len(order)) - (count.cumsum(0) - count)[features]
    place[order] = before[new][tie] + (size[tie] + 1).double() / 2
    ties.index_add_(0, features[new], size.double() ** 3 - size)
    return place, ties


# --- what a feature writes ---------------------------------------------------------------------


def _what_it_says(
    index: Index, features: Int[Tensor, " n"], sae: SAE | None, host: Host | None, *, needed: bool
) -> dict[str, Tensor] | None:
    """The lens and output-score columns of some features: the index's, or computed now where it has none."""
    kept = {name: column[features] for name, column in index.lens.items()}
    if "output_score" not in kept and sae is not None and host is not None and sae.cfg.d_in == host.d_model:
        now = output_scores(
            host, sae, features, index.facts.hook, top_tokens=kept.get("top"), max_act=index.stats["max_act"]
        )
        if "top" not in kept:
            from sae.features.lens import logit_lens

            read = logit_lens(host, sae.W_dec[features])
            kept |= {"top": read.top, "top_values": read.top_values}
        kept |= {"output_score": now.score, "says": now.says, "says_p": now.says_p}
    if needed and "output_score" not in kept:
        raise UserError(
            f"{index.path}: holds no output scores, which order features for steering. Make it with a host "
            "(`sae index`), or give the host and the SAE."
        )
    return kept or None


def _concept_words(concept: str | None, sides: tuple[_Side, _Side]) -> dict[str, float]:
    """Weights in 0..1: the concept's own words 1, the positives' most characteristic words less."""
    weights = {word: 1.0 for word in _words(concept or "") if len(word) > 2 or not word.isascii()}
    texts = [[text.text for text in side.texts] for side in sides]
    for word, weight in characteristic_words(texts[0], texts[1]).items():
        weights.setdefault(word, weight)
    return weights


def _concept_tokens(index: Index, weights: dict[str, float]) -> Float[Tensor, " V"]:
    """The weight of every token: its word's."""
    strings = [string.strip().casefold() for string in index.vocab]
    known = set(strings)
    # A word that is no token of its own counts by its longest first piece of at least three letters.
    pieces: dict[str, float] = {}
    for word, weight in weights.items():
        for length in range(len(word), 2, -1):
            if word[:length] in known:
                pieces[word[:length]] = max(weight, pieces.get(word[:length], 0.0))
                break
    return torch.tensor([pieces.get(string, 0.0) for string in strings])


def characteristic_words(positives: Sequence[str], negatives: Sequence[str], n: int = 20) -> dict[str, float]:
    """Words that more of the positive texts hold, by the z-score of the log-odds (at least 3); weights in
    0..1."""
    held = [Counter(word for text in texts for word in set(_words(text))) for texts in (positives, negatives)]
    scores: dict[str, float] = {}
    for word, a in held[0].items():
        if a < 3 or len(word) < 3:
            continue
        b = held[1][word]
        cells = (a + 0.5, len(positives) - a + 0.5, b + 0.5, len(negatives) - b + 0.5)
        odds = math.log(cells[0] / cells[1]) - math.log(cells[2] / cells[3])
        z = odds / math.sqrt(sum(1 / cell for cell in cells))
        if z >= 3:
            scores[word] = z
    best = sorted(scores, key=lambda word: (-scores[word], word))[:n]
    return {word: scores[word] / scores[best[0]] for word in best}


def _writes(output: dict[str, Tensor], weights: Float[Tensor, " V"]) -> Float[Tensor, " n"]:
    """Mean of two shares that belong to the concept: of the lens's top tokens, by value, and of the
    probability that what the feature makes the model say has in the unsteered model's place (the ten tokens
    that gain most)."""
    lens = output["top_values"].clamp(min=0)
    share = (lens * weights[output["top"].long()]).sum(1) / lens.sum(1).clamp(min=1e-9)
    if "says" not in output:
        return share
    says = output["says"].long()
    said = (output["says_p"] * weights[says.clamp(min=0)] * (says >= 0)).sum(1)
    return (share + said) / 2


# --- one feature -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Feature:
    """Everything the index and the SAE know about one feature; activations in raw units."""

    feature: int
    max_act: float
    p999: float
    density: float
    document_density: float
    n_tokens: int
    bands: list[int]
    """Firing tokens in each tenth of [0, max_act]."""
    output_score: float | None
    top_tokens: list[tuple[str, float]]
    """What its direction promotes by the logit lens; values are logits for a unit of activation, less their
    mean."""
    bottom_tokens: list[tuple[str, float]]
    says: list[tuple[str, float]]
    """What it makes the model say: the tokens that gain most at 5× its maximum, with their probability
    then."""
    neighbours: list[tuple[int, float]]
    """Features with the closest decoder rows, with the cosine."""
    examples: list[Shown]

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            **asdict(self),
            "examples": [{"act": e.act, "topic": e.topic, "text": e.marked()} for e in self.examples],
        }


def show(index: Index, feature: int, sae: SAE | None = None, *, n: int = 10) -> Feature:
    """One feature: statistics, n examples, what it promotes and says, and (with the SAE) its n nearest
    neighbours."""
    index.check_feature(feature)
    stats, lens = index.stats, index.lens

    def tokens(name: str, values: str) -> list[tuple[str, float]]:
        if name not in lens:
            return []
        pairs = zip(lens[name][feature].tolist(), lens[values][feature].tolist(), strict=True)
        return [(index.token(token), value) for token, value in pairs if token >= 0]

    score = float(lens["output_score"][feature]) if "output_score" in lens else math.nan
    return Feature(
        feature=feature,
        max_act=float(stats["max_act"][feature]),
        p999=float(stats["p999"][feature]),
        density=float(stats["density"][feature]),
        document_density=float(stats["document_density"][feature]),
        n_tokens=index.facts.n_tokens,
        bands=stats["bands"][feature].tolist(),
        output_score=None if math.isnan(score) else score,
        top_tokens=tokens("top", "top_values"),
        bottom_tokens=tokens("bottom", "bottom_values"),
        says=tokens("says", "says_p"),
        neighbours=neighbours(sae, feature, n) if sae is not None else [],
        examples=shown(index, feature, n),
    )


def neighbours(sae: SAE, feature: int, n: int = 10) -> list[tuple[int, float]]:
    """The features whose decoder rows have the largest cosine with this one's, itself left out."""
    sae.check_features([feature])
    rows = sae.W_dec.detach().float()
    cosine = rows @ rows[feature] / (rows.norm(dim=1) * rows[feature].norm()).clamp(min=1e-12)
    cosine[feature] = -2
    best = cosine.topk(min(n, len(rows) - 1))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


__all__ = [
    "Feature",
    "Found",
    "IndexedDocument",
    "Shown",
    "auroc",
    "find",
    "matching",
    "neighbours",
    "places",
    "show",
    "shown",
]
