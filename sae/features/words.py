"""Full-text search over features: what they fire on, what they promote, and their strongest contexts.

`search.sqlite` inside the index is a contentless FTS5 table, a row a feature; it is a cache and may be deleted at any
time: the next search writes it anew. bm25 weighs tokens that a feature fires on 4, tokens it promotes 2, contexts 1.
Words are matched whole, whatever their case; a word that ends in * by its beginning. Labels are not in it (they are the
user's own, and few). Where the folder cannot be written it is made in memory; where SQLite has no FTS5 the texts are
scanned.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sae import files
from sae.errors import UserError

if TYPE_CHECKING:
    from sae.features.index import Index

FILE = "search.sqlite"
_FORMAT = 1
_CONTEXTS, _BEFORE, _AFTER = 8, 8, 4  # strongest contexts a feature, tokens around each
_SLICE = 4096  # features whose texts are made at once
_WEIGHTS = (4.0, 2.0, 1.0)


def search(index: Index, query: str, n: int = 10) -> list[tuple[int, float]]:
    """(feature, score) of those that match any of the query's words, best first; the score is bm25's, higher is better.

    Raises UserError for a query without a word.
    """
    words = re.findall(r"[^\W_]+\*?", query)
    if not words:
        raise UserError(f"find: {query!r} holds no word to look for. Give words such as 'golden gate'.")
    terms = " OR ".join(f'"{word.rstrip("*")}"{"*" if word.endswith("*") else ""}' for word in words)
    with _opened(index) as table:
        if table is None:
            return _scan(index, words, n)
        weights = ", ".join(str(weight) for weight in _WEIGHTS)
        rows = table.execute(
            f"SELECT rowid, bm25(features, {weights}) AS s FROM features WHERE features MATCH ? "
            "ORDER BY s, rowid LIMIT ?",
            (terms, n),
        ).fetchall()
    return [(rowid - 1, -score) for rowid, score in rows]


def rebuild(index: Index) -> None:
    """Write the cache. Without FTS5, or where nothing can be written, nothing is."""
    if not has_fts5():
        return
    with files.atomic_file(index.path / FILE) as path:
        _fill(sqlite3.connect(path), index)


def has_fts5() -> bool:
    """Whether this Python's SQLite can do it."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        try:
            database.execute("CREATE VIRTUAL TABLE probe USING fts5(a)")
        except sqlite3.OperationalError:
            return False
    return True


@contextlib.contextmanager
def _opened(index: Index) -> Iterator[sqlite3.Connection | None]:
    if not has_fts5():
        yield None
        return
    path = index.path / FILE
    if not _belongs(path, index):
        try:
            rebuild(index)
        except UserError:  # a folder that cannot be written
            with contextlib.closing(_fill(sqlite3.connect(":memory:"), index, close=False)) as table:
                yield table
            return
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as table:
        yield table


def _belongs(path: Path, index: Index) -> bool:
    if not path.exists():
        return False
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as table:
            return table.execute("SELECT sae, tokens, format FROM of").fetchone() == _of(index)
    except sqlite3.DatabaseError:  # damaged, or something else
        return False


def _of(index: Index) -> tuple[str, int, int]:
    return index.facts.sae, index.facts.n_tokens, _FORMAT


def _fill(database: sqlite3.Connection, index: Index, *, close: bool = True) -> sqlite3.Connection:
    with database:
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("CREATE VIRTUAL TABLE features USING fts5(fires, promotes, contexts, content='')")
        database.execute("CREATE TABLE of (sae, tokens, format)")
        database.execute("INSERT INTO of VALUES (?, ?, ?)", _of(index))
        database.executemany(
            "INSERT INTO features (rowid, fires, promotes, contexts) VALUES (?, ?, ?, ?)",
            ((feature + 1, *columns) for feature, columns in _texts(index)),
        )
    if close:
        database.close()
    return database


def _texts(index: Index) -> Iterator[tuple[int, tuple[str, str, str]]]:
    """(feature, (tokens it fires on, tokens it promotes, contexts)) of those that fired."""
    vocab = [*index.vocab, ""]  # -1 is nothing
    promoted = index.lens.get("top")
    kept = index.all_examples
    for first in range(0, index.facts.n_features, _SLICE):
        last = min(first + _SLICE, index.facts.n_features)
        counts = kept["offsets"][first : last + 1].diff()
        at = torch.arange(int(kept["offsets"][first]), int(kept["offsets"][last]))
        place = at - kept["offsets"][first:last].repeat_interleave(counts)
        strong = (kept["kind"][at] == 0) & (place < _CONTEXTS)
        feature = torch.arange(first, last).repeat_interleave(counts)[strong].tolist()
        windows = index.parts.windows(kept["row"][at[strong]].long(), _BEFORE, _AFTER).tolist()
        contexts: dict[int, list[str]] = {}
        for one, tokens in zip(feature, windows, strict=True):
            contexts.setdefault(one, []).append("".join([vocab[token] for token in tokens]))
        for one, found in contexts.items():
            fires = " ".join(vocab[token] for token in index.top_token_ids[one].tolist())
            promotes = "" if promoted is None else " ".join(vocab[token] for token in promoted[one].tolist())
            yield one, (fires, promotes, "\n".join(found))


def _scan(index: Index, words: list[str], n: int) -> list[tuple[int, float]]:
    found = []
    for feature, columns in _texts(index):
        score = 0.0
        for weight, text in zip(_WEIGHTS, columns, strict=True):
            held = Counter(re.findall(r"[^\W_]+", text.casefold()))
            for word in words:
                stem = word.rstrip("*").casefold()
                times = held[stem] if stem == word.casefold() else sum(c for w, c in held.items() if w.startswith(stem))
                score += weight * times / (times + 1)
        if score:
            found.append((feature, score))
    return sorted(found, key=lambda one: (-one[1], one[0]))[:n]
