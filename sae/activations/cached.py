"""Activations that SAELens's CacheActivationsRunner wrote, as the token rows and blocks of a store.

FOLDER/dataset_info.json, state.json, data-….arrow   what `datasets.load_from_disk` reads
    HOOK       [context, d]  a column of floats by TransformerLens's name of the hook
    token_ids  [context]     int32, special tokens among them

Promise: the rows are the dataset's, in its order, a row being a document (`doc` is its number there); read a batch at a
time, whole files are never held. Traps: the folder does not say which model made it (SAELens's config goes to the Hub
alone), so whoever imports it runs some rows again; documents run on from one row to the next and attention ran through
the row; what was cut by seqpos_slice has lost what came before, and cannot be run again. Datasets without token_ids
(SAELens before 6) are refused: what is no text could not be masked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae.activations.harvest import Block, flattened
from sae.documents import Document
from sae.errors import UserError, first_line
from sae.text import NOTHING_COUNTED, ROWS_PER_BATCH, Rows, mask_of

if TYPE_CHECKING:
    from sae.host import Host

TOKENS = "token_ids"


class Cached:
    """A folder of cached activations, opened for one host's hooks. Raises UserError for a folder that is none, and for
    one of other hooks, widths, rows or token ids than asked for."""

    def __init__(self, path: str | Path, host: Host, hooks: Sequence[str], context: int):
        self.path, self.host, self.context = str(path), host, context
        self.data = _opened(self.path)
        columns = {name: _canonical(host, name) for name in self.data.column_names if name != TOKENS}
        if TOKENS not in self.data.column_names:
            raise UserError(
                f"{path}: has no column {TOKENS}, without which special tokens cannot be told apart. Cache it again "
                "with SAELens 6."
            )
        self.columns: dict[str, str] = {}
        for hook in hooks:
            found = next((column for column, name in columns.items() if name == hook), None)
            if found is None:
                raise UserError(f"{path}: has no {hook} (its columns are {', '.join(columns)}). Set host.hook to one.")
            shape = getattr(self.data.features[found], "shape", None)
            if shape is None or len(shape) != 2:
                raise UserError(f"{path}: {found} is no [context, width] of floats. Give what SAELens cached.")
            if shape[0] != context:
                raise UserError(
                    f"{path}: its rows have {shape[0]:,} tokens, text.context is {context:,}. "
                    f"Write text.context={shape[0]}."
                )
            if shape[1] != host.width(hook):
                raise UserError(
                    f"{path}: {found} is {shape[1]:,} wide, {host.width(hook):,} in {host.name}. Give its own host."
                )
            self.columns[hook] = found

    def rows(
        self, note: Callable[[Document], None], positions: tuple[int, int | None], max_tokens: int | None
    ) -> CachedRows:
        """Its token rows; arguments as of `text.pack`."""
        return CachedRows(self, note, positions, max_tokens)

    def blocks(
        self, rows: Iterable[Rows], hooks: Sequence[str], *, outlier_norm: Mapping[str, float] | None = None
    ) -> Iterator[Block]:
        """What was cached of token rows, in place of a host's `harvest.stream`."""
        read = self.data.select_columns([TOKENS, *(self.columns[hook] for hook in hooks)]).with_format("torch")
        for some in rows:
            found: Any = read[some.doc[:, 0].tolist()]
            if not torch.equal(found[TOKENS].to(torch.int32), some.tokens):
                raise UserError(f"{self.path}: has other rows than when its import began. Import into another folder.")
            acts = {hook: found[self.columns[hook]] for hook in hooks}
            yield flattened(acts, some, outlier_norm or {})


class CachedRows:
    """Iterator of Rows, with `.counts` and `.sources` as a Packer's."""

    def __init__(
        self,
        cached: Cached,
        note: Callable[[Document], None],
        positions: tuple[int, int | None],
        max_tokens: int | None,
    ):
        self.cached, self.note, self.positions = cached, note, positions
        host, data = cached.host, cached.data
        self.special = torch.tensor(sorted(host.special_ids), dtype=torch.int32)
        self.left = len(data) if max_tokens is None else min(len(data), -(-max_tokens // cached.context))
        self.ids = data.select_columns([TOKENS]).with_format("torch")
        self.counts = dict(NOTHING_COUNTED)
        self.sources: Counter[str] = Counter()

    def __iter__(self) -> CachedRows:
        return self

    def __next__(self) -> Rows:
        start, tokenizer = self.counts["documents"], self.cached.host.tokenizer
        n = min(ROWS_PER_BATCH, self.left - start)
        if n <= 0:
            raise StopIteration
        found: Any = self.ids[start : start + n]
        tokens = found[TOKENS].to(torch.int32)
        if int(tokens.min()) < 0 or int(tokens.max()) >= len(tokenizer):
            wrong = int(tokens.min()) if int(tokens.min()) < 0 else int(tokens.max())
            raise UserError(
                f"{self.cached.path}: token {wrong:,} is beyond this tokenizer's {len(tokenizer):,}. Give its own host."
            )
        for ids in tokens:
            text = tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
            self.note(Document(text, sha256(ids.numpy().tobytes()).hexdigest()[:16]))
        doc = torch.arange(start, start + n, dtype=torch.int32)[:, None].expand_as(tokens)
        pos = torch.arange(self.cached.context, dtype=torch.int32).expand_as(tokens)
        self.counts["documents"] += n
        self.counts["tokens"] += tokens.numel()
        return Rows(tokens, doc, pos, mask_of(tokens, doc, pos, self.special, self.positions, self.counts))


def _opened(path: str) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        data = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError, TypeError, DatasetsError) as error:
        reason = first_line(error)
        raise UserError(
            f"activations.cached_activations_path: {path} holds no activations that SAELens cached ({reason}). Give "
            "the folder that its CacheActivationsRunner wrote."
        ) from error
    if not isinstance(data, datasets.Dataset):
        raise UserError(
            f"activations.cached_activations_path: {path} holds splits ({', '.join(map(str, data))}). Give one."
        )
    return data


def _canonical(host: Host, name: str) -> str:
    """A column's name as the host has it; itself where it is no hook."""
    try:
        return host.hook(name)
    except UserError:
        return name
