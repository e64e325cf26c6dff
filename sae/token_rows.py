"""The host and the text of a recipe: token rows of one part of its source, or of its mixture of sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


class Text:
    """Token rows of one part of a source."""

    def __init__(self, recipe: TextRecipe, host: Host, part: str):
        self.recipe, self.host, self.part = recipe, host, part

    def rows(self, note: Callable[[Document], Any] | None = None) -> Packer:
        """From the beginning; `note` is given the documents in the order of their numbers."""
        recipe = self.recipe
        start, _, stop = (recipe.positions or ":").partition(":")
        return pack(
            self._documents(),
            self.host.tokenizer,
            recipe.context,
            isolate=recipe.isolate_documents,
            special_ids=self.host.special_ids,
            max_tokens=recipe.max_tokens,
            positions=(int(start or 0), int(stop) if stop else None),
            note=note,
        )

    def _documents(self) -> Iterator[Document]:
        if isinstance(self.recipe.source, str):
            return self._of(self.recipe.source)
        read = {name: tokenized(self._of(name), self.host.tokenizer) for name in self.recipe.source}
        return mixed(read, self.recipe.source)

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
