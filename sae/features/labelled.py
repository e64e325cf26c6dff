"""Texts in classes, made fit for statistics: each text once, each class large enough, what belongs together known.

The same text twice (white space aside) is one observation, so repeats are dropped; a text of two classes speaks for
neither and is dropped from both. Texts of one `group` (one prompt, where the file says so) are not independent: a
group is never parted where every class has groups enough, and how many texts share one is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae.documents import Document, documents, labelled
from sae.errors import UserError
from sae.features.concept import FEWEST


@dataclass(frozen=True)
class Labelled:
    """Distinct texts, in the order of their classes, and which class each is of."""

    documents: list[Document]
    labels: list[int]
    """The class of each text, a place in `classes`."""
    classes: list[str]
    repeats: int
    """Texts dropped because their class has them already."""
    contested: int
    """Distinct texts dropped because several classes have them."""
    unread: int = 0
    """Texts dropped because the model counted no token in them (such as a single word)."""

    @property
    def texts(self) -> list[str]:
        return [document.text for document in self.documents]

    @property
    def sharing(self) -> int:
        """Texts whose group holds another text too."""
        size = Counter(document.group for document in self.documents)
        return sum(count for count in size.values() if count > 1)

    def to_dict(self) -> dict[str, Any]:
        """Counts, for --json: texts by class, and what was dropped or shares a group."""
        told = {name: getattr(self, name) for name in ("repeats", "contested", "unread", "sharing")}
        return {"texts": {name: self.labels.count(i) for i, name in enumerate(self.classes)}, **told}

    def units(self, fewest: int) -> list[int]:
        """What each text belongs to and is drawn with: its group, from 0; the text alone where a class has fewer than
        `fewest` groups."""
        pairs = {(label, document.group) for label, document in zip(self.labels, self.documents, strict=True)}
        if min(Counter(label for label, _ in pairs).values()) < fewest:
            return list(range(len(self.documents)))
        number: dict[str, int] = {}
        return [number.setdefault(document.group, len(number)) for document in self.documents]

    def only(self, seen: Sequence[bool]) -> Labelled:
        """Without the texts of which nothing is known. Raises UserError where a class is then too small."""
        kept = [i for i, one in enumerate(seen) if one]
        less = replace(
            self,
            documents=[self.documents[i] for i in kept],
            labels=[self.labels[i] for i in kept],
            unread=self.unread + len(seen) - len(kept),
        )
        less._check()
        return less

    def _check(self) -> None:
        size = Counter(self.labels)
        dropped = "; ".join(
            f"{count:,} {why}"
            for count, why in (
                (self.repeats, "more were repeats"),
                (self.contested, "stand in several classes"),
                (self.unread, "hold no token that counts"),
            )
            if count
        )
        for label, name in enumerate(self.classes):
            if size[label] < FEWEST:
                raise UserError(
                    f"{name}: {size[label]:,} different text{'' if size[label] == 1 else 's'}"
                    f"{f' ({dropped})' if dropped else ''}, {FEWEST} are needed. "
                    "Give more (.txt files are split at empty lines), or leave this class out."
                )


def distinct(classes: Mapping[str, Sequence[Document]]) -> Labelled:
    """Each text once. Raises UserError for fewer than two classes, fewer than 8 texts in one, chats and token ids."""
    if len(classes) < 2:
        only = next(iter(classes), "none")
        raise UserError(f"one class alone ({only}): nothing to tell apart. Give texts of at least two.")
    found: dict[str, dict[int, Document]] = {}
    repeats = 0
    for label, (name, members) in enumerate(classes.items()):
        for document in members:
            if not document.text.strip():
                raise UserError(f"{name}: holds chats or token ids. Give plain text.")
            places = found.setdefault(" ".join(document.text.split()), {})
            repeats += label in places
            places.setdefault(label, document)
    kept = sorted(
        ((label, document) for places in found.values() if len(places) == 1 for label, document in places.items()),
        key=lambda one: one[0],
    )
    made = Labelled(
        [document for _, document in kept],
        [label for label, _ in kept],
        list(classes),
        repeats,
        sum(len(places) > 1 for places in found.values()),
    )
    made._check()
    return made


def of_files(paths: Sequence[str]) -> Labelled:
    """A class a file, named as the path was typed. Raises UserError as `distinct`, and for one file given twice."""
    real = [Path(path).expanduser().resolve() for path in paths]
    for i, path in enumerate(real):
        if path in real[:i]:
            raise UserError(f"{paths[i]}: given twice, and a file does not differ from itself. Give another one.")
    return distinct({path: list(documents(path)) for path in paths})


def of_field(path: str, field: str) -> Labelled:
    """The classes that a field of a .jsonl or .parquet file names, in alphabetical order."""
    classes: dict[str, list[Document]] = {}
    for document, label in labelled(path, field):
        classes.setdefault(label, []).append(document)
    if len(classes) == 1:
        raise UserError(f"{path}: every {field!r} is {next(iter(classes))!r}. Give texts of at least two classes.")
    return distinct(dict(sorted(classes.items())))
