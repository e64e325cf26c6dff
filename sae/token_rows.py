"""The host and the text of a recipe: token rows of one part of its source, or of its mixture of sources."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sae import files
from sae.bundled import corpus_path
from sae.documents import Document, documents, select
from sae.host import Host
from sae.recipe import HostRecipe, TextRecipe
from sae.text import Packer, mixed, pack, tokenized


def open_host(recipe: HostRecipe) -> Host:
    """The host of a recipe."""
    return Host.load(recipe.name, dtype=recipe.dtype, device=recipe.device)


def positions_of(recipe: TextRecipe) -> tuple[int, int | None]:
    """First position that counts, and the end of them; None is the end of the text."""
    start, _, stop = (recipe.positions or ":").partition(":")
    return int(start or 0), int(stop) if stop else None


class Text:
    """Token rows of one part of a source."""

    def __init__(self, recipe: TextRecipe, host: Host, part: str):
        self.recipe, self.host, self.part = recipe, host, part

    def rows(self, note: Callable[[Document], Any] | None = None, resume: Mapping[str, Any] | None = None) -> Packer:
        """From the beginning, or from the `.state` of an earlier packer of this text on: documents that it has read
        are passed over, not tokenized again. `note` is given the documents in the order of their numbers."""
        recipe = self.recipe
        return pack(
            self._documents(resume),
            self.host.tokenizer,
            recipe.context,
            isolate=recipe.isolate_documents,
            special_ids=self.host.special_ids,
            max_tokens=recipe.max_tokens,
            positions=positions_of(recipe),
            note=note,
            resume=resume,
        )

    def _documents(self, resume: Mapping[str, Any] | None) -> Iterator[Document]:
        """Those that a packer with this state has not read."""
        if isinstance(self.recipe.source, str):
            return itertools.islice(self._of(self.recipe.source), resume["documents"] if resume else 0, None)
        read, given = (resume["by_source"], resume["sources"]) if resume else ({}, {})
        left = {name: itertools.islice(self._of(name), read.get(name, 0), None) for name in self.recipe.source}
        return mixed(
            {name: tokenized(found, self.host.tokenizer) for name, found in left.items()}, self.recipe.source, given
        )

    def _of(self, source: str) -> Iterator[Document]:
        found = documents(source, self.recipe.column)
        return found if self.part == "all" else select(found, self.recipe.held_out, self.part)

    def expected_tokens(self) -> int | None:
        """About how many positions `rows` will give, where that can be known beforehand."""
        known = self.recipe.max_tokens
        if self.recipe.source == "bundled":
            whole = files.read_json(corpus_path().with_name("corpus.json"))["counts"]["tokens"]
            share = {"train": 1 - self.recipe.held_out, "held_out": self.recipe.held_out}.get(self.part, 1.0)
            known = min(known or whole, int(whole * share))
        return known
