"""Documents to token rows: one tokenizer's reading of them, mixtures by weight, packing.

`tokenized` reads documents with a tokenizer (chats through its template, ready-made ids after a check that they are
its own); `mixed` draws from several sources so that each has its share of the tokens. `pack` puts documents into rows
of `context` tokens: documents that fit are never cut, longer ones are cut into pieces, every text token appears exactly
once, order and result depend on the documents alone. `Rows.mask` is the part of the activation mask that text decides
(methods: not padding, not special, not the first position of a piece, in the slice of positions asked for); outlier
norms are the harvest's. A packer goes on exactly where an earlier one was, from its `.state` and the documents that one
had not read. Cost: the tokenizer's; memory: one window of documents.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.documents import Document, documents, part_of, select
from sae.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

__all__ = ["Document", "Packer", "Rows", "begin_id", "documents", "loss_mask", "mixed", "pack", "part_of", "segments",
    "select", "tokenized"]  # fmt: skip
ROWS_PER_BATCH = 64
NOTHING_COUNTED: dict[str, int] = dict.fromkeys(
    ("documents", "tokens", "positions", "padding", "special", "first", "sliced"), 0
)
WINDOW = 512  # documents among which the best fit is looked for
Piece = tuple[int, list[int]]  # number of the document, token ids
# Some ready-made ids of every window are read back as text and tokenized again. What comes back differs at cuts inside
# words only; of ids that mean other tokens, 86 to 91% of the pairs come back.
_TRIED, _ENOUGH, _ALIKE = 1000, 32, 0.97  # pairs of a window of documents at most and at least, share


@dataclass(frozen=True)
class Rows:
    """R rows of T token positions.

    tokens, pos   int32; pos restarts at 0 with each piece when documents are isolated, else it runs
                  through the row
    doc           int32, the running number of the document at each position, -1 at padding
    mask          positions whose activations count: not padding, not special, not the first of a piece (or
                  row), inside the slice of positions asked for
    """

    tokens: Int[Tensor, "R T"]
    doc: Int[Tensor, "R T"]
    pos: Int[Tensor, "R T"]
    mask: Bool[Tensor, "R T"]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def part(self, start: int, stop: int) -> Rows:
        """Some of the rows."""
        return Rows(*(getattr(self, name)[start:stop] for name in ("tokens", "doc", "pos", "mask")))


# ---- reading with a tokenizer ------------------------------------------------------------------------------


def tokenized(documents: Iterable[Document | str], tokenizer: Any) -> Iterator[Document]:
    """Documents with their token ids, and with the text that these stand for; ids that are there are kept.

    raises   UserError: a chat and a tokenizer without a template; ready-made ids of another tokenizer
    """
    source = iter(documents)
    while window := list(itertools.islice(source, WINDOW)):
        whole = [Document(item, "") if isinstance(item, str) else item for item in window]
        texts = [_as_text(document, tokenizer) for document in whole]
        made = iter(tokenizer([text for text in texts if text is not None], add_special_tokens=False, verbose=False)
                    .input_ids if any(text is not None for text in texts) else [])  # fmt: skip
        for document in whole:
            _refuse_unknown_ids(document, tokenizer)
        _refuse_foreign_ids([one for one in whole if one.tokens and not one.text], tokenizer)
        for document, text in zip(whole, texts, strict=True):
            if text is not None:
                yield replace(document, text=text, tokens=tuple(next(made)))
                continue
            if not document.text:
                document = replace(document, text=tokenizer.decode(document.tokens, clean_up_tokenization_spaces=False))
            yield document


def _as_text(document: Document, tokenizer: Any) -> str | None:
    """What there is to tokenize; None for ids that are ready."""
    if document.tokens:
        return None
    if not document.messages:
        return document.text
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{_of(document)}a chat, and this host's tokenizer has no chat template. Take a host that has one, or a "
            "column with plain text."
        )
    try:
        return tokenizer.apply_chat_template(list(document.messages), tokenize=False)
    except Exception as error:  # templates raise what they like, jinja2's errors among it
        roles = ", ".join(message["role"] for message in document.messages[:6])
        raise UserError(
            f"{_of(document)}the host's chat template refuses a chat with roles {roles} ({error}). "
            "Leave such chats out."
        ) from error


def _refuse_unknown_ids(document: Document, tokenizer: Any) -> None:
    if document.tokens and not 0 <= min(document.tokens) <= max(document.tokens) < len(tokenizer):
        wrong = min(document.tokens) if min(document.tokens) < 0 else max(document.tokens)
        raise UserError(
            f"{_of(document)}token {wrong:,} is beyond this tokenizer's {len(tokenizer):,}. Give data made with this "
            "host's tokenizer, or its text."
        )


def _refuse_foreign_ids(documents: list[Document], tokenizer: Any) -> None:
    """Of too few ids nothing can be said."""
    pairs: Counter[tuple[int, int]] = Counter()
    back: Counter[tuple[int, int]] = Counter()
    for document in documents:
        if pairs.total() >= _TRIED:
            break
        text = tokenizer.decode(document.tokens, clean_up_tokenization_spaces=False)
        pairs.update(itertools.pairwise(document.tokens[2:-2]))  # a cut inside a word changes the tokens beside it
        back.update(itertools.pairwise(tokenizer(text, add_special_tokens=False, verbose=False).input_ids))
    alike = (pairs & back).total() / max(1, pairs.total())
    if pairs.total() >= _ENOUGH and alike < _ALIKE:
        raise UserError(
            f"{_of(documents[0])}its token ids are not of this host's tokenizer: read as text and tokenized again, "
            f"{alike:.0%} of their pairs come back. Tokenize with this host's tokenizer, or give the text."
        )


def _of(document: Document) -> str:
    return f"{document.source}: " if document.source else "text: "


def mixed(
    sources: Mapping[str, Iterable[Document]], weights: Mapping[str, float], given: Mapping[str, int] | None = None
) -> Iterator[Document]:
    """Tokenized documents of several sources, so that each has its weight's share of the tokens at every moment.

    Always from the source that is furthest behind. Ends where that one has no more: shares hold to the end.
    given   tokens that each source has given before, to go on as if there had been no break; none where it has no name
    """
    streams = {name: iter(found) for name, found in sources.items()}
    done = {name: (given or {}).get(name, 0) for name in sources}  # integers: exact, however often it was broken off
    while True:
        behind = min(done, key=lambda name: done[name] / weights[name])
        document = next(streams[behind], None)
        if document is None:
            return
        done[behind] += len(document.tokens)
        yield replace(document, source=behind)


# ---- packing -----------------------------------------------------------------------------------------------


def begin_id(tokenizer: Any) -> int | None:
    """The token that this tokenizer puts in front of a text by itself (Llama 3, Gemma), or None (SmolLM2,
    GPT-2)."""
    bos = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer("a", verbose=False).input_ids
    return bos if bos is not None and len(ids) and ids[0] == bos else None


def pack(
    documents: Iterable[Document | str],
    tokenizer: Any,
    context: int,
    *,
    isolate: bool = True,
    special_ids: Collection[int] | None = None,
    rows_per_batch: int = ROWS_PER_BATCH,
    max_tokens: int | None = None,
    positions: tuple[int, int | None] = (0, None),
    note: Callable[[Document], None] | None = None,
    resume: Mapping[str, Any] | None = None,
) -> Packer:
    """Pack documents into rows of `context` tokens; iterate over the result for `Rows` of up to
    `rows_per_batch`.

    isolate      documents that fit are whole, in the best-fitting row of a window; longer ones are cut
                 into pieces of `context`, each a segment of its own. False: plain concatenation, rows cut
                 anywhere
    BOS          where the tokenizer adds one by itself, each document (each piece when isolated) starts
                 with it
    special_ids  masked; the tokenizer's own special tokens when None
    max_tokens   stop reading after the document that reaches so many text tokens, those before `resume` among
                 them
    positions    only from one `pos` up to another (or to the end) are in the mask
    note         called with each document, tokenized, in the order of their numbers; not again with those before
                 `resume`
    resume       the `.state` of an earlier packer with the same tokenizer and options, also after a way through
                 JSON: the rows are those that it had yet to give, to the bit, and numbers and counts run on.
                 `documents` must begin after the first `resume["documents"]` of that packer's
    """
    if context < 2:
        raise UserError(f"text.context: {context} is too short for a row. Give at least 2.")
    return Packer(
        documents, tokenizer, context, isolate, special_ids, rows_per_batch, max_tokens, positions, note, resume
    )


class Packer:
    """Iterator of Rows. `.counts` says what became of the positions: documents, tokens (text), positions, and of
    these padding, special, first (the first of a piece or row), sliced (outside the slice asked for, and nothing
    of that). `.sources`: tokens by source; `.by_source`: documents by source."""

    def __init__(
        self,
        documents: Iterable[Document | str],
        tokenizer: Any,
        context: int,
        isolate: bool,
        special_ids: Collection[int] | None,
        rows_per_batch: int,
        max_tokens: int | None,
        positions: tuple[int, int | None],
        note: Callable[[Document], None] | None,
        resume: Mapping[str, Any] | None,
    ):
        self.context = context
        self.rows_per_batch = rows_per_batch
        self._documents = documents
        self._tokenizer = tokenizer
        self._isolate = isolate
        self._max_tokens = max_tokens
        self._positions = positions
        self._note = note
        self._bos = begin_id(tokenizer)
        self._pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, self._bos) if i is not None), 0)
        special = set(tokenizer.all_special_ids if special_ids is None else special_ids)
        self._special = torch.tensor(sorted(special), dtype=torch.int32)
        self.counts = dict(NOTHING_COUNTED)
        self.sources: Counter[str] = Counter()
        self.by_source: Counter[str] = Counter()
        self._emitted = 0
        # Numbered, and in no row yet. Whatever waits is here and not in a generator's frame: it is part of the state.
        self._held: dict[int, Piece] = {}  # among which the best fit is looked for, in order of arrival
        self._rest: deque[Piece] = deque()  # behind them: what is left of the document that was numbered last
        if resume is not None:
            self.counts |= resume["counts"]
            self.sources.update(resume["sources"])
            self.by_source.update(resume["by_source"])
            self._emitted = resume["rows"]
            self._rest.extend((number, ids) for number, ids in resume["pending"])
        self._rows = self._isolated() if isolate else self._concatenated()

    @property
    def state(self) -> dict[str, Any]:
        """The position after the last batch, for `pack(resume=...)`; to be asked for between batches.

        documents   how many are numbered: reading goes on behind them. What `tokenized` read ahead is read again
        by_source   the same by source {source: documents}
        sources     their text tokens {source: tokens}
        counts      `.counts`
        rows        how many were given
        pending     [[document number, [token ids]], ...]: pieces that are in no row yet, in order, BOS on; up to
                    `WINDOW` of them, and the rest of a document that is longer
        """
        return {
            "documents": self.counts["documents"],
            "by_source": dict(self.by_source),
            "sources": dict(self.sources),
            "counts": dict(self.counts),
            "rows": self._emitted,
            "pending": [[number, ids] for number, ids in (*self._held.values(), *self._rest)],
        }

    def __iter__(self) -> Packer:
        return self

    def __next__(self) -> Rows:
        taken = list(itertools.islice(self._rows, self.rows_per_batch))
        if not taken:
            raise StopIteration
        self._emitted += len(taken)
        tokens = torch.full((len(taken), self.context), self._pad, dtype=torch.int32)
        doc = torch.full_like(tokens, -1)
        pos = torch.zeros_like(tokens)
        for r, segments in enumerate(taken):
            at = 0
            for number, ids in segments:
                end = at + len(ids)
                tokens[r, at:end] = torch.tensor(ids, dtype=torch.int32)
                doc[r, at:end] = number
                start = 0 if self._isolate else at
                pos[r, at:end] = torch.arange(start, start + len(ids), dtype=torch.int32)
                at = end
        return Rows(tokens, doc, pos, mask_of(tokens, doc, pos, self._special, self._positions, self.counts))

    def _numbered(self) -> Iterator[Piece]:
        """(number, text tokens) of each document."""
        read = tokenized(self._documents, self._tokenizer)
        while self._max_tokens is None or self.counts["tokens"] < self._max_tokens:
            document = next(read, None)
            if document is None:
                return
            number = self.counts["documents"]
            self.counts["documents"] += 1
            self.counts["tokens"] += len(document.tokens)
            self.sources[document.source] += len(document.tokens)
            self.by_source[document.source] += 1
            if self._note is not None:
                self._note(document)
            if document.tokens:
                yield number, list(document.tokens)

    def _without_begin(self, ids: list[int]) -> list[int]:
        """Ready-made ids may have the beginning that we put there ourselves."""
        return ids[1:] if self._bos is not None and ids[0] == self._bos else ids

    def _pieces(self, cut: Callable[[list[int]], Iterator[list[int]]]) -> Iterator[Piece]:
        """What an earlier packer left, then the documents, cut."""
        while self._rest:
            yield self._rest.popleft()
        for number, ids in self._numbered():
            self._rest.extend((number, piece) for piece in cut(self._without_begin(ids)))
            while self._rest:
                yield self._rest.popleft()

    def _isolated(self) -> Iterator[list[Piece]]:
        """Each row: the piece that waits longest, then again and again the longest one that still fits."""
        head = [] if self._bos is None else [self._bos]
        most = self.context - len(head)

        def cut(ids: list[int]) -> Iterator[list[int]]:
            return (head + ids[start : start + most] for start in range(0, len(ids), most))

        pieces = self._pieces(cut)
        shelves: list[deque[int]] = [deque() for _ in range(self.context + 1)]  # serials of those held, by length
        serials = itertools.count()
        while True:
            for piece in itertools.islice(pieces, WINDOW - len(self._held)):
                serial = next(serials)
                self._held[serial] = piece
                shelves[len(piece[1])].append(serial)
            if not self._held:
                return
            length = len(next(iter(self._held.values()))[1])  # its shelf is in order of arrival, it stands first there
            row: list[Piece] = []
            room = self.context
            while length:
                row.append(self._held.pop(shelves[length].popleft()))
                room -= length
                length = next((n for n in range(room, 0, -1) if shelves[n]), 0)
            yield row

    def _concatenated(self) -> Iterator[list[Piece]]:
        """Between rows nothing waits but the rest of one document."""
        head = [] if self._bos is None else [self._bos]
        row: list[Piece] = []
        room = self.context

        def cut(ids: list[int]) -> Iterator[list[int]]:
            """Where the row ends, then a row at a time: asked for when the row holds all that came before."""
            ids = head + ids
            ends = [0, *range(room, len(ids), self.context), len(ids)]
            return (ids[start:stop] for start, stop in itertools.pairwise(ends))

        for number, ids in self._pieces(cut):
            row.append((number, ids))
            room -= len(ids)
            if not room:
                yield row
                row, room = [], self.context
        if row:
            yield row


def mask_of(
    tokens: Int[Tensor, "R T"],
    doc: Int[Tensor, "R T"],
    pos: Int[Tensor, "R T"],
    special: Int[Tensor, " n"],
    positions: tuple[int, int | None],
    counts: dict[str, int],
) -> Bool[Tensor, "R T"]:
    """The mask of rows, and added to `counts` what became of their positions, each by the first cause."""
    padding = doc < 0
    start, stop = positions
    outside = (pos < start) | (pos >= (tokens.shape[1] if stop is None else stop))
    causes = {
        "padding": padding,
        "special": torch.isin(tokens, special) & ~padding,
        "first": (pos == 0) & ~padding,
        "sliced": outside,
    }
    out = torch.zeros_like(padding)
    counts["positions"] += tokens.numel()
    for name, where in causes.items():
        counts[name] += int((where & ~out).sum())
        out |= where
    return ~out


def segments(rows: Rows) -> Int[Tensor, "R T"]:
    """The segment of each position, numbered from 1 in its row, -1 at padding: what attention stays inside.

    A segment is a piece of text that starts at position 0; in rows packed without isolation that is the row.
    """
    return torch.where(rows.doc >= 0, (rows.pos == 0).cumsum(1), -1)


def loss_mask(rows: Rows) -> Bool[Tensor, "R T"]:
    """Where the loss of predicting token t + 1 from t counts: both are in the mask and in the same
    document."""
    counts = torch.zeros_like(rows.mask)
    counts[:, :-1] = rows.mask[:, :-1] & rows.mask[:, 1:] & (rows.doc[:, :-1] == rows.doc[:, 1:])
    return counts
