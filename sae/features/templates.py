"""Matched texts from a name alone: the same sentences about it and about other things.

`matched("the Golden Gate Bridge")` fills every template of sae/bundled/templates.json with the name (a positive)
and with other subjects of its shape: article, number of words, capitals, plural, length (negatives). Form, length and
place of the name are so equal on both sides; what is left to tell them apart is the name, with which no subject shares
a content word. No model, no network; the same name and seed give the same texts. Limits: English sentences; nothing
is known of what the name means, so its synonyms may stand among the negatives, and a feature for one word of a longer
name can do as well as one for the whole (near misses as negatives did worse: experiments/planted-report.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from sae import bundled, files
from sae.documents import hashed
from sae.errors import UserError

_OTHERS = 4  # negatives of a template
_NEAR = 40  # subjects of the nearest shapes among which these are drawn
_LONGEST = 80  # characters of a name
_SLOT = re.compile(r"\{(name|Name)\}")
_SMALL = frozenset((
    "a", "an", "the", "of", "in", "on", "at", "to", "for",
    "from", "with", "by", "and", "or", "my", "your", "its", "our",
))  # fmt: skip


@dataclass(frozen=True)
class Filled:
    """A template filled with a subject."""

    text: str
    subject: str
    form: str
    template: str
    """Which one: texts of one template stay together when texts are split."""


@dataclass(frozen=True)
class Matched:
    """Texts that hold a name, one for each template, and several negatives of each of the same templates."""

    name: str
    positives: tuple[Filled, ...]
    negatives: tuple[Filled, ...]


def matched(name: str, seed: int = 0) -> Matched:
    """Positive and negative texts for a name as it stands inside a sentence: "anger", "the Eiffel Tower", "a castle".

    Each template gives one positive and four negatives, of different subjects.
    raises   UserError for a name that is empty, has no letter or digit, or is longer than a name is
    """
    name = _checked(name)
    templates, subjects = _bundled()
    own = content_words(name)
    others = [subject for subject in subjects if not own & content_words(subject)]
    others = sorted(others, key=lambda subject: (_distance(name, subject), hashed(seed, name, subject)))[:_NEAR]
    other = _rounds(others, f"{seed}/{name}")
    positives, negatives = [], []
    for number, (form, template) in enumerate(templates):
        key = f"template {number}"
        positives.append(Filled(fill(template, name), name, form, key))
        negatives += [Filled(fill(template, subject), subject, form, key) for subject in _distinct(other, _OTHERS)]
    return Matched(name, tuple(positives), tuple(negatives))


def fill(template: str, subject: str) -> str:
    """{name} as the subject is written, {Name} with a capital, for the start of a sentence."""
    capital = subject[:1].upper() + subject[1:]
    return _SLOT.sub(lambda slot: capital if slot[1] == "Name" else subject, template)


def content_words(name: str) -> frozenset[str]:
    """Its words in lower case without articles and prepositions and without a plural's s; all words where none is
    left."""
    words = re.findall(r"\w+", name.casefold())
    return frozenset(_singular(word) for word in words if word not in _SMALL) or frozenset(words)


def _checked(name: str) -> str:
    name = " ".join(name.split())
    if not name:
        raise UserError("name: is empty. Give a concept as it stands in a sentence, such as 'the Eiffel Tower'.")
    if not any(letter.isalnum() for letter in name):
        raise UserError(f"name: {name[:_LONGEST]!r} has no letter or digit. Give a concept, such as 'anger'.")
    if len(name) > _LONGEST:
        raise UserError(
            f"name: has {len(name):,} characters, a name has at most {_LONGEST}. "
            "Give a shorter one, or texts about the concept instead."
        )
    return name


@cache
def _bundled() -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """(form, template) of every template, and all subjects."""
    data = files.read_json(bundled.templates_path())
    templates = tuple((template["form"], template["text"]) for template in data["templates"])
    return templates, tuple(name for names in data["subjects"].values() for name in names)


def _singular(word: str) -> str:
    for ending, instead in (("ies", "y"), ("ss", "ss"), ("us", "us"), ("is", "is"), ("oes", "o"), ("s", "")):
        if len(word) > 3 and word.endswith(ending):
            return word[: -len(ending)] + instead
    return word


def _article(name: str) -> str:
    first = name.split()[0].casefold()
    return "a" if first == "an" else first if first in ("a", "the") else ""


def _distance(name: str, other: str) -> float:
    """How differently two names are built."""
    a, b = name.split(), other.split()
    capitals = (name.split()[-1][0].isupper(), other.split()[-1][0].isupper())
    plurals = tuple(_singular(word[-1].casefold()) != word[-1].casefold() for word in (a, b))
    return (
        2 * (_article(name) != _article(other))
        + 2 * (capitals[0] != capitals[1])
        + (plurals[0] != plurals[1])
        + abs(len(a) - len(b))
        + abs(len(name) - len(other)) / 10
    )


def _rounds(names: Sequence[str], key: str) -> Iterator[str]:
    """All names in an order drawn by hash, again and again, each round in another order."""
    turn = 0
    while True:
        yield from sorted(names, key=lambda name: hashed(key, turn, name))
        turn += 1


def _distinct(names: Iterator[str], n: int) -> list[str]:
    found: list[str] = []
    while len(found) < n:
        subject = next(names)
        if subject not in found:
            found.append(subject)
    return found
