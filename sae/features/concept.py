"""A concept in words: documents that hold it, and words and tokens by which what is written is recognised as its."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.errors import UserError
from sae.features.index import Index, Text

if TYPE_CHECKING:
    from jaxtyping import Float

FEWEST = 8  # positive texts: below this a contrast says nothing (methods 5.3)


def _word(word: str) -> str:
    """A pattern for a word, with or without inner hyphens and a plural s: email also finds E-mails."""
    return "-?".join(re.escape(letter) for letter in word) + r"(?:s|es)?"


def words_of(text: str) -> list[str]:
    """Case-folded words, hyphens and apostrophes' forms made alike."""
    return re.findall(r"[^\W_]+(?:['+#][^\W_]*)*", text.casefold().replace("’", "'").replace("-", ""))


def matching(documents: Sequence[Text], concept: str, fewest: int = FEWEST) -> list[int]:
    """Documents whose text or topic holds the concept as a phrase, or all its words where the phrase is too rare.

    Raises UserError for a concept without a word.
    """
    words = words_of(concept)
    if not words:
        raise UserError(f"find: {concept!r} holds no word to look for. Give a word or a phrase.")
    contents = [f"{document.topic}\n{document.text}".casefold().replace("’", "'") for document in documents]
    phrase = re.compile(r"(?<!\w)" + r"[\W_]+".join(map(_word, words)) + r"(?!\w)")
    found = [i for i, content in enumerate(contents) if phrase.search(content)]
    if len(found) >= fewest or len(words) == 1:
        return found
    each = [re.compile(r"(?<!\w)" + _word(word) + r"(?!\w)") for word in words]
    return [i for i, content in enumerate(contents) if all(pattern.search(content) for pattern in each)]


def weights_of(concept: str | None, positives: Sequence[str], negatives: Sequence[str]) -> dict[str, float]:
    """Weights in 0..1: the concept's own words 1, the positives' most characteristic words less."""
    weights = {word: 1.0 for word in words_of(concept or "") if len(word) > 2 or not word.isascii()}
    for word, weight in characteristic_words(positives, negatives).items():
        weights.setdefault(word, weight)
    return weights


def tokens_of(index: Index, weights: Mapping[str, float]) -> Float[Tensor, " V"]:
    """The weight of every token: its word's."""
    strings = [string.strip().casefold() for string in index.vocab]
    known = set(strings)
    # A word that is no token of its own counts by its longest first piece of at least three letters.
    pieces: dict[str, float] = {}
    for word, weight in weights.items():
        for length in range(len(word), min(len(word) - 1, 2), -1):
            if word[:length] in known:
                pieces[word[:length]] = max(weight, pieces.get(word[:length], 0.0))
                break
    return torch.tensor([pieces.get(string, 0.0) for string in strings])


def characteristic_words(positives: Sequence[str], negatives: Sequence[str], n: int = 20) -> dict[str, float]:
    """Words that more of the positive texts hold, by the z-score of the log-odds (at least 3); weights in 0..1."""
    held = [Counter(word for text in texts for word in set(words_of(text))) for texts in (positives, negatives)]
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


def writes(lens: Mapping[str, Tensor], weights: Float[Tensor, " V"]) -> Float[Tensor, " n"]:
    """Mean of two shares that belong to the concept: of the lens's top tokens, by value, and of the probability that
    what the feature makes the model say has in the unsteered model's place (the ten tokens that gain most)."""
    values = lens["top_values"].clamp(min=0)
    share = (values * weights[lens["top"].long()]).sum(1) / values.sum(1).clamp(min=1e-9)
    if "says" not in lens:
        return share
    says = lens["says"].long()
    said = (lens["says_p"] * weights[says.clamp(min=0)] * (says >= 0)).sum(1)
    return (share + said) / 2
