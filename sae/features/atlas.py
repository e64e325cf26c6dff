"""The embedding atlas: which tokens of a vocabulary lie near one another in a host's input embeddings E [V, d].

Three views of a row: raw; centred, less the mean row; abtt (all-but-the-top, Mu & Viswanath 2018), which loses the top
D principal components too. Tokens never seen in a corpus, then those of odd norm, are no neighbours, and mean and
components are those of the tokens left: unused rows sit near one point and draw the mean of all rows to it (SmolLM2:
random pairs of kept tokens have a mean cosine of 0.049 about that mean; experiments/atlas-report.md).
Cost: the corpus' tokenization, then products of the seen rows in float32 (three copies of them in memory).
Not known here: words of several pieces; depths.py follows those through the layers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae import bundled, files
from sae.documents import documents
from sae.errors import UserError
from sae.evaluation.intervals import Interval, multinomial
from sae.text import tokenized

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from sae.host import Host

VIEWS = ("raw", "centred", "abtt")
MOST_TOKENS = 10_000_000
"""Of a corpus so many are counted at most: a streamed data set has no end that one could wait for."""
FEWEST = 100
"""Of a host, with fewer tokens kept there is no atlas: their mean and components would say nothing."""
_NORMS = (0.005, 0.995)  # quantiles of the seen tokens' norms; neighbours lie between them


@dataclass(frozen=True)
class Lists:
    """What is shipped: a carrier sentence, words to be put at its end, and pairs of words (query, partner) by kind."""

    carrier: str
    words: tuple[str, ...]
    pairs: dict[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class Near:
    """A token beside a query: its cosine to it in one view, ‖e‖ in the host's units, occurrences in the corpus."""

    token: int
    text: str
    cosine: float
    norm: float
    count: int


@dataclass(frozen=True)
class Neighbours:
    """Of one query token, by view: the other forms of its word, and the nearest other words as groups of their
    forms; forms and groups are ordered by cosine, a group by its nearest form."""

    query: Near
    forms: dict[str, tuple[Near, ...]]
    words: dict[str, tuple[tuple[Near, ...], ...]]


@dataclass(frozen=True)
class KindScore:
    """Precision@n by view over the pairs of one kind, and what the other views gain on raw, with 95% intervals.

    `left_out` pairs have a word that is not one token here or never seen, or a partner that is dropped for its norm.
    """

    kind: str
    queries: int
    left_out: int
    precision: dict[str, Interval]
    gain: dict[str, Interval]


@dataclass(frozen=True)
class Atlas:
    """A vocabulary's tokens and, of the n that a corpus holds, the embeddings.

    texts    V strings as in running text: with their leading space
    counts   occurrences in the corpus
    norms    ‖e‖ in the units of the embedding matrix
    ids      the seen tokens, ascending; `units` are their rows of norm 1 by view, `kept` those that may be neighbours
    removed  D, the principal components that the view abtt is without
    """

    texts: tuple[str, ...]
    counts: Int[Tensor, " V"]
    norms: Float[Tensor, " V"]
    ids: Int[Tensor, " n"]
    kept: Bool[Tensor, " n"]
    units: dict[str, Float[Tensor, "n d"]]
    removed: int

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The word that each token is a form of (V strings)."""
        return tuple(word_of(text) for text in self.texts)

    @cached_property
    def token(self) -> dict[str, int]:
        """Token ids by their text."""
        return {text: i for i, text in reversed(list(enumerate(self.texts)))}

    @cached_property
    def row(self) -> dict[int, int]:
        """Rows of `units` by token id."""
        return {token: row for row, token in enumerate(self.ids.tolist())}

    @cached_property
    def kept_rows(self) -> dict[str, list[int]]:
        """Rows of `units` that may be neighbours, by word."""
        rows = defaultdict(list)
        for row in self.kept.nonzero().flatten().tolist():
            rows[self.words[int(self.ids[row])]].append(row)
        return rows

    def forms(self, word: str) -> list[int]:
        """The tokens that are forms of a word, seen or not."""
        return [token for token, form in enumerate(self.words) if form == word_of(word)]


def shipped() -> Lists:
    """The carrier, words and pairs that come with the package."""
    made = files.read_json_object(bundled.atlas_path(), ("carrier", "words", "pairs"))
    pairs = {kind: tuple((query, partner) for query, partner in pairs) for kind, pairs in made["pairs"].items()}
    return Lists(made["carrier"], tuple(made["words"]), pairs)


def check_word(word: str) -> None:
    """Refuse a word of white space alone, or of nothing."""
    if not word.strip():
        raise UserError(f"the word is empty ({word!r}). Give one such as London.")


def word_of(text: str) -> str:
    """What the forms of a word share: no white space around it, case-folded. White space alone stays as it is."""
    return text.strip().casefold() or text


# ---- making one --------------------------------------------------------------------------------------------


def build(
    E: Float[Tensor, "V d"], texts: Sequence[str], counts: Int[Tensor, " V"], *, special: Collection[int] = ()
) -> Atlas:
    """The atlas of an embedding matrix whose token i reads texts[i] and occurs counts[i] times in some corpus.

    kept     tokens with a count, not `special`, whose norm is between the 0.5th and 99.5th percentile of such tokens
    D        max(3, ⌊d/100⌋), the upper end of what Mu & Viswanath (2018) advise; mean and components are the kept rows'
    raises   UserError where not more than D tokens are kept
    """
    V, d = E.shape
    D = max(3, d // 100)
    norms = torch.cat([part.float().norm(dim=1) for part in E.detach().split(8192)]).cpu()
    seen = counts.cpu() > 0
    seen[[token for token in special if token < V]] = False
    ids = seen.nonzero().flatten()
    if len(ids) <= D:
        raise UserError(f"embeddings: {len(ids):,} tokens are seen in the text, more than {D} are needed. Give more.")
    low, high = norms[ids].quantile(torch.tensor(_NORMS))
    kept = (norms[ids] >= low) & (norms[ids] <= high)
    rows = E.detach()[ids.to(E.device)].float().cpu()
    centred = rows - rows[kept].mean(0)
    top = torch.linalg.eigh(centred[kept].T @ centred[kept]).eigenvectors[:, -D:]
    views = dict(zip(VIEWS, (rows, centred, centred - centred @ top @ top.T), strict=True))
    units = {view: torch.nn.functional.normalize(x, dim=1) for view, x in views.items()}
    return Atlas(tuple(texts), counts.cpu(), norms, ids, kept, units, D)


def of_host(host: Host, source: str = "bundled", *, progress: Callable[[int], object] | None = None) -> Atlas:
    """The atlas of a host's input embeddings, counts from a source of text (as `sae.documents.documents` takes it).

    progress   called with the number of tokens just counted
    raises     UserError: no such text; fewer than 100 tokens of the vocabulary kept
    """
    E: Tensor = host.model.get_input_embeddings().weight
    V = min(len(host.tokenizer), len(E))
    atlas = build(E[:V], token_texts(host, V), count_tokens(host, V, source, progress), special=host.special_ids)
    if (kept := int(atlas.kept.sum())) < FEWEST:
        raise UserError(f"{source}: holds {kept:,} tokens to choose among, expected {FEWEST} or more. Give more text.")
    return atlas


def token_texts(host: Host, V: int) -> list[str]:
    """The first V tokens as they read in running text; parts of a character under the tokenizer's own name."""
    names = host.tokenizer.convert_ids_to_tokens(list(range(V)))
    texts = []
    for name, text in zip(names, host.text_of(range(V)), strict=True):
        if "\ufffd" in text or not text:
            text = str(name)
        elif str(name).startswith("▁") and not text.startswith(" "):  # SentencePiece decodes one token without it
            text = " " + text
        texts.append(text)
    return texts


def count_tokens(
    host: Host, V: int, source: str = "bundled", progress: Callable[[int], object] | None = None
) -> Int[Tensor, " V"]:
    """How often each token occurs in the first ten million of a source of text, read with the host's tokenizer."""
    counted: Counter[int] = Counter()
    total = 0
    for document in tokenized(documents(source), host.tokenizer):
        counted.update(document.tokens)
        total += len(document.tokens)
        if progress is not None:
            progress(len(document.tokens))
        if total >= MOST_TOKENS:
            break
    return torch.tensor([counted[token] for token in range(V)])


def is_tied(host: Host) -> bool | None:
    """Whether input embeddings and unembedding are one matrix; None where a host has no unembedding."""
    head: Any = host.model.get_output_embeddings()
    return None if head is None else head.weight is host.model.get_input_embeddings().weight


# ---- asking it ---------------------------------------------------------------------------------------------


def anisotropy(unit: Float[Tensor, "n d"]) -> float:
    """Mean cosine of two different rows of norm 1, over all n(n-1) pairs: what a random pair is expected to have."""
    n = len(unit)
    return float((unit.double().sum(0).square().sum() - n) / (n * (n - 1)))


def query_of(atlas: Atlas, word: str) -> int:
    """The token that stands for a word: with a space and as written, without, else the form that is seen most.

    raises   UserError: empty; no form of it is one token; none of those is seen in the corpus
    """
    check_word(word)
    forms = atlas.forms(word)
    if not forms:
        raise UserError(f"{word}: no form of it is one token here. Take a word that is; its layers can be followed.")
    seen = [token for token in forms if token in atlas.row]
    if not seen:
        texts = ", ".join(repr(atlas.texts[token]) for token in forms)
        raise UserError(
            f"{word}: never seen in the text as one token ({texts}), so its neighbours would be those of all rare "
            "tokens. Give text that holds it with --text, or another word."
        )
    written = word.strip()
    exact = [atlas.token[text] for text in (" " + written, written) if atlas.token.get(text) in seen]
    return exact[0] if exact else max(seen, key=lambda token: int(atlas.counts[token]))


def neighbours(atlas: Atlas, word: str, n: int = 10) -> Neighbours:
    """The n words nearest to a word in each view, and its own other forms; raises as `query_of`."""
    query = query_of(atlas, word)
    own = [token for token in atlas.forms(word) if token in atlas.row and token != query]
    forms, words = {}, {}
    for view, unit in atlas.units.items():
        cosines = unit @ unit[atlas.row[query]]
        forms[view] = _near(atlas, cosines, [atlas.row[token] for token in own])
        groups = []
        met = {atlas.words[query]}
        for row in cosines.argsort(descending=True, stable=True).tolist():
            if len(groups) == n:
                break
            other = atlas.words[int(atlas.ids[row])]
            if atlas.kept[row] and other not in met:
                met.add(other)
                groups.append(_near(atlas, cosines, atlas.kept_rows[other]))
        words[view] = tuple(groups)
    itself = Near(query, atlas.texts[query], 1.0, float(atlas.norms[query]), int(atlas.counts[query]))
    return Neighbours(itself, forms, words)


def _near(atlas: Atlas, cosines: Tensor, rows: Sequence[int]) -> tuple[Near, ...]:
    """Some rows as tokens, nearest first."""
    tokens = [(row, int(atlas.ids[row])) for row in rows]
    near = [
        Near(token, atlas.texts[token], float(cosines[row]), float(atlas.norms[token]), int(atlas.counts[token]))
        for row, token in tokens
    ]
    return tuple(sorted(near, key=lambda one: -one.cosine))


def score(atlas: Atlas, pairs: Mapping[str, Sequence[tuple[str, str]]], n: int = 10) -> tuple[KindScore, ...]:
    """Precision@n of pairs (query, partner) of each kind, and of "all": the share of queries whose partner is among
    their n nearest tokens.

    A query has one right answer, so that the share of right ones among n would be an n-th of this. Words are taken as
    in running text, with their space; forms are not grouped, for they are answers here.
    interval  95% bootstrap over query words (one word in two kinds is drawn as one); paired in `gain`, the difference
              to raw. It has no width where all queries hit
    raises    UserError where no pair of any kind is left
    """
    hits = {kind: _hits(atlas, of_kind, n) for kind, of_kind in pairs.items()}
    if not any(len(words) for words, _ in hits.values()):
        total = sum(map(len, pairs.values()))
        raise UserError(f"score: none of {total:,} pairs has two tokens here. Give more text, or another host.")
    scores = [_kind_score(kind, *hits[kind], len(of_kind)) for kind, of_kind in pairs.items() if hits[kind][0]]
    words = [word for of_kind, _ in hits.values() for word in of_kind]
    found = {view: torch.cat([of_kind[view] for _, of_kind in hits.values()]) for view in VIEWS}
    return (*scores, _kind_score("all", words, found, sum(map(len, pairs.values()))))


def _hits(atlas: Atlas, pairs: Sequence[tuple[str, str]], n: int) -> tuple[list[str], dict[str, Tensor]]:
    """Of the pairs that can be asked: the queries' words, and by view whether the partner is among the n nearest."""
    rows = [[atlas.row.get(atlas.token.get(" " + word, -1), -1) for word in pair] for pair in pairs]
    asked = [i for i, (query, partner) in enumerate(rows) if query >= 0 and partner >= 0 and bool(atlas.kept[partner])]
    queries, partners = torch.tensor([rows[i] for i in asked], dtype=torch.int64).reshape(-1, 2).T
    found = {}
    for view, unit in atlas.units.items():
        cosines = unit @ unit[queries].T
        of_partner = cosines.gather(0, partners[None])
        cosines[~atlas.kept] = -torch.inf
        cosines.scatter_(0, queries[None], -torch.inf)
        found[view] = ((cosines > of_partner).sum(0) < n).double()
    return [word_of(pairs[i][0]) for i in asked], found


def _kind_score(kind: str, words: Sequence[str], hits: Mapping[str, Tensor], size: int) -> KindScore:
    number = {word: i for i, word in enumerate(dict.fromkeys(words))}
    cluster = torch.tensor([number[word] for word in words])
    drawn = multinomial(len(number), seed=0)[:, cluster]  # how often each query is in each draw

    def mean(values: Tensor) -> Interval:
        ends = ((drawn @ values) / drawn.sum(1)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        return Interval(float(values.mean()), float(ends[0]), float(ends[1]))

    precision = {view: mean(hits[view]) for view in VIEWS}
    gain = {view: mean(hits[view] - hits["raw"]) for view in VIEWS[1:]}
    return KindScore(kind, len(words), size - len(words), precision, gain)


def shared_words(a: Neighbours, b: Neighbours) -> dict[str, tuple[str, ...]]:
    """By view: the words near the query in both of two atlases, compared as strings, in the order of the first."""
    found = {}
    for view in VIEWS:
        there = {word_of(group[0].text) for group in b.words[view]}
        found[view] = tuple(word for group in a.words[view] if (word := word_of(group[0].text)) in there)
    return found
