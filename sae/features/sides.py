"""The two sides of a contrast: texts with a concept and texts of the same form without it.

They come from the index's own documents (which needs no host), from texts that are made of the concept's name, or are
the user's own; what is not indexed is run through host and SAE.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from sae.documents import hashed
from sae.errors import UserError
from sae.features.concept import FEWEST, matching
from sae.features.contrast import Side
from sae.features.index import Index, IndexedDocument, Text
from sae.features.pool import text_maxima
from sae.features.templates import matched

if TYPE_CHECKING:
    from sae.autoencoder import SAE
    from sae.host import Host

_MOST_POSITIVES, _MOST_NEGATIVES, _NEGATIVES_EACH = 200, 600, 5


def holding(index: Index, concept: str) -> list[int]:
    """The index's documents that hold a concept and of which a token was counted."""
    return [i for i in matching(index.documents, concept) if bool(index.maxima.seen[i])]


def sides(
    index: Index,
    concept: str | None,
    pos: Sequence[str] | None,
    neg: Sequence[str] | None,
    by_name: bool,
    sae: SAE | None,
    host: Host | None,
    seed: int,
) -> tuple[Side, Side, str]:
    """Texts with the concept and without, as `search.find` says, and where they come from in words; raises UserError
    for fewer than 8 of either."""
    if pos is not None:
        return *_own_texts(index, concept, pos, neg, sae, host), "texts of your own"
    if neg is not None:
        raise UserError("find: negative texts without positive ones. Give --pos too, or a concept alone.")
    if concept is None:
        raise UserError('find: nothing to look for. Give a concept such as "Golden Gate Bridge", or texts with --pos.')
    matches = [] if by_name else matching(index.documents, concept)
    found = [i for i in matches if bool(index.maxima.seen[i])]
    if len(found) >= FEWEST:
        about = "texts of the index that hold it, and others of the same forms"
        return *_from_index(index, found, set(matches), seed), about
    if sae is None or host is None:
        raise UserError(
            f"find: {len(found)} of {int(index.maxima.seen.sum()):,} indexed texts hold {concept!r}, "
            f"{FEWEST} are needed. Give at least {FEWEST} texts that hold it with --pos FILE "
            "(and others with --neg FILE), or the host and the SAE, to make texts from the name."
        )
    made = matched(concept, seed)
    with_it, without = (
        [IndexedDocument(one.text, form=one.form, group=one.template) for one in side]
        for side in (made.positives, made.negatives)
    )
    about = (
        f"{len(with_it)} texts made from the name {concept!r} and {len(without)} of the same templates with other "
        "names; a feature for a piece of the name passes too"
    )
    return _run(with_it, index, sae, host), _run(without, index, sae, host), about


def _from_index(index: Index, found: list[int], apart: set[int], seed: int) -> tuple[Side, Side]:
    documents, maxima = index.documents, index.maxima
    topics = {documents[i].topic for i in apart if documents[i].topic}
    others = [i for i in range(len(documents)) if bool(maxima.seen[i]) and i not in apart]
    elsewhere = [i for i in others if documents[i].topic not in topics]
    positives = _by_hash(found, documents, seed)[:_MOST_POSITIVES]
    negatives = _of_same_forms(positives, elsewhere if len(elsewhere) >= len(positives) else others, documents, seed)
    _enough(
        len(negatives),
        "texts without it",
        "The indexed text is all about it: give others with --pos and --neg.",
    )
    return tuple(Side([documents[i] for i in rows], maxima, torch.tensor(rows)) for rows in (positives, negatives))  # type: ignore[return-value]


def _own_texts(
    index: Index,
    concept: str | None,
    pos: Sequence[str],
    neg: Sequence[str] | None,
    sae: SAE | None,
    host: Host | None,
) -> tuple[Side, Side]:
    if sae is None or host is None:
        raise UserError("find: own texts must be run through the model. Give the host and the SAE too.")
    positives = _run(_as_documents(pos), index, sae, host)
    _enough(
        len(positives),
        "positive texts",
        f"Give at least {FEWEST} with --pos; .txt files are split at empty lines.",
    )
    if neg is not None:
        negatives = _run(_as_documents(neg), index, sae, host)
        _enough(
            len(negatives),
            "negative texts",
            f"Give at least {FEWEST} with --neg (.txt files are split at empty lines), or none to use the index's.",
        )
        return positives, negatives
    apart = set(matching(index.documents, concept, 1)) if concept else set()
    rows = [i for i in range(len(index.documents)) if bool(index.maxima.seen[i]) and i not in apart]
    rows = _by_hash(rows, index.documents, 0)[: min(_MOST_NEGATIVES, _NEGATIVES_EACH * len(positives))]
    _enough(len(rows), "indexed texts to compare with", f"Give at least {FEWEST} with --neg.")
    return positives, Side([index.documents[i] for i in rows], index.maxima, torch.tensor(rows))


def _as_documents(texts: Iterable[str]) -> list[IndexedDocument]:
    """Each text its own group, so that equal ones stay in one half."""
    return [IndexedDocument(text, group=hashed(text)) for text in texts if text.strip()]


def _enough(count: int, what: str, remedy: str) -> None:
    if count < FEWEST:
        what = what.replace("texts", "text", 1) if count == 1 else what
        raise UserError(f"find: {count} {what}, {FEWEST} are needed. {remedy}")


def _run(documents: Sequence[IndexedDocument], index: Index, sae: SAE, host: Host) -> Side:
    """Max-pool texts with host and SAE."""
    if not documents:
        return Side([], index.maxima, torch.zeros(0, dtype=torch.int64))
    maxima = text_maxima([document.text for document in documents], sae, host, index.facts.hook)
    seen = maxima.seen.nonzero().flatten()
    return Side([documents[i] for i in seen.tolist()], maxima, seen)


def _by_hash(rows: Iterable[int], documents: Sequence[Text], seed: int) -> list[int]:
    return sorted(rows, key=lambda i: hashed(seed, "order", documents[i].text, i))


def _of_same_forms(positives: list[int], pool: list[int], documents: Sequence[Text], seed: int) -> list[int]:
    """Negatives with the positives' counts of forms, several for each positive."""
    wanted = Counter(documents[i].form for i in positives)
    each = min(_NEGATIVES_EACH, max(1, _MOST_NEGATIVES // len(positives)))
    by_form: dict[str, list[int]] = {}
    for i in _by_hash(pool, documents, seed):
        by_form.setdefault(documents[i].form, []).append(i)
    return [i for form, count in sorted(wanted.items()) for i in by_form.get(form, [])[: each * count]]


def texts(side: Side) -> list[str]:
    return [text.text for text in side.texts]
