"""Sources of text and the token rows made of them.

`documents` reads the bundled corpus, a `datasets` name (streamed), local .txt/.jsonl/.parquet files or an
iterable. `part_of` says by a hash of a document's group whether it is held out: stable across runs,
sources and order. `pack` puts documents into rows of `context` tokens: documents that fit are never cut,
longer ones are cut into pieces, every text token appears exactly once, order and result depend on the
documents alone. `Rows.mask` is the part of the activation mask that text decides (methods: not padding,
not special, not the first position of a piece); outlier norms are the harvest's. Cost: the tokenizer's;
memory: one window of documents.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import itertools
import json
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae import bundled
from sae.errors import UserError, nearest

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz")
WINDOW = 512  # documents among which the best fit is looked for


@dataclass(frozen=True)
class Document:
    """A text and what is known of it; documents of one `group` are held out together."""

    text: str
    group: str
    topic: str = ""
    form: str = ""


@dataclass(frozen=True)
class Rows:
    """R rows of T token positions.

    tokens, pos   int32; pos restarts at 0 with each piece when documents are isolated, else it runs
                  through the row
    doc           int32, the running number of the document at each position, -1 at padding
    mask          positions whose activations count: not padding, not special, not the first of a piece (or
                  row)
    """

    tokens: Int[Tensor, "R T"]
    doc: Int[Tensor, "R T"]
    pos: Int[Tensor, "R T"]
    mask: Bool[Tensor, "R T"]

    def __len__(self) -> int:
        return self.tokens.shape[0]


# ---- sources -----------------------------------------------------------------------------------------------


def documents(source: str | Path | Iterable[Any], column: str = "text") -> Iterator[Document]:
    """Read documents from a source, in its order; texts of white space alone are left out.

    source   "bundled"; a path, folder or glob of .txt (documents end at an empty line), .jsonl or .parquet
             files (.gz too); a `datasets` name, "name:config" for one of its configurations (its train
             split, streamed); or an iterable of str, Document or mappings
    column   the field that holds the text; `topic`, `form` and `prompt` beside it are kept where they exist
    group    the prompt that made the text, else topic and form, else the hash of the text
    raises   UserError: no such file or dataset (now), unreadable file, missing column, no text at all
             (when read)
    """
    if isinstance(source, str | Path):
        name = str(source)
        if name == "bundled":
            found = _jsonl(bundled.corpus_path())
        elif paths := _local(name):
            found = itertools.chain.from_iterable(_read(path, column) for path in paths)
        else:
            found = _dataset(name, column)
    else:
        name, found = "text", iter(source)
    return _some(name, found, column)


def _some(name: str, found: Iterable[Any], column: str) -> Iterator[Document]:
    empty = True
    for item in found:
        document = _document(name, item, column)
        if document.text.strip():
            empty = False
            yield document
    if empty:
        raise UserError(f"{name}: holds no text. Give a source with at least one document that is not empty.")


def _document(name: str, item: Any, column: str) -> Document:
    if isinstance(item, Document):
        text = _clean(item.text)
        return item if text is item.text else replace(item, text=text)
    if isinstance(item, str):
        item = _clean(item)
        return Document(item, _digest(item))
    if not isinstance(item, Mapping):
        raise UserError(f"{name}: a document is {type(item).__name__} ({str(item)[:40]!r}). Give str or Document.")
    if column not in item:
        known = [repr(str(key)) for key in item]  # repr: names from a file may hold control characters
        close = nearest(repr(column), known) or "."
        raise UserError(
            f"{name}: has no column {column!r}{close} Its columns are {', '.join(known) or 'none'}; set text.column."
        )
    text = item[column]
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise UserError(
            f"{name}: column {column!r} holds {type(text).__name__} ({str(text)[:40]!r}), not text. "
            "Set text.column to one that holds text."
        )
    text = _clean(text)
    topic, form, prompt = (_clean(str(item.get(key) or "")) for key in ("topic", "form", "prompt"))
    group = prompt or (f"{topic}\t{form}" if topic and form else _digest(text))
    return Document(text, group, topic, form)


def _clean(text: str) -> str:
    """The text with U+FFFD for lone surrogates: JSON can name them (\\ud800), UTF-8 cannot hold them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _local(name: str) -> list[Path]:
    """Files that a path, folder or glob stands for; [] where it looks like the name of a dataset."""
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES))
        if not found:
            raise UserError(f"{name}: the folder holds none of {', '.join(SUFFIXES)}. Give files of these kinds.")
        return found
    if path.is_file():
        found = [path]
    else:
        found = sorted(Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
    if not found and (any(c in name for c in "*?[") or name.endswith(SUFFIXES) or name.startswith(("/", ".", "~"))):
        raise UserError(f"{name}: no such file. Check the path.")
    for file in found:
        if not file.name.endswith(SUFFIXES):
            raise UserError(
                f"{file}: not one of {', '.join(SUFFIXES)}. Convert it, or read it yourself and pass texts."
            )
    return found


def _read(path: Path, column: str) -> Iterator[Any]:
    if path.name.endswith(".parquet"):
        return _parquet(path, column)
    return _jsonl(path) if ".jsonl" in path.suffixes else _txt(path)


def _lines(path: Path) -> Iterator[str]:
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield from file
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. Check the path.") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}). Check the file.") from error


def _txt(path: Path) -> Iterator[str]:
    block: list[str] = []
    for line in _lines(path):
        if line.strip():
            block.append(line)
        elif block:
            yield "".join(block).strip("\n")
            block = []
    if block:
        yield "".join(block).strip("\n")


def _jsonl(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:  # not JSON, a number too long, nested too deep
            raise UserError(f"{path}: line {number:,} is not JSON ({error}). Write one JSON object a line.") from error


def _parquet(path: Path, column: str) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading parquet needs pyarrow. Run: pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in (column, "topic", "form", "prompt") if name in names]
            if column not in names:
                wanted = names  # the error names them
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not readable as parquet ({reason}). Write or download it again.") from error


def _dataset(name: str, column: str) -> Iterator[Any]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"{name}: no such file, and datasets is not installed. Run: pip install datasets") from error
    path, _, config = name.partition(":")
    try:
        yield from load_dataset(path, config or None, split="train", streaming=True)
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # datasets' own not-found and offline errors are OSErrors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name}: neither a file here nor a dataset that can be read ({reason}). "
            "Check the name and the network, or give files."
        ) from error


# ---- train and held out ------------------------------------------------------------------------------------


def part_of(document: Document, held_out: float) -> str:
    """ "train" or "held_out", by the hash of the document's group; `held_out` is the expected share of
    groups."""
    share = int.from_bytes(hashlib.sha256(document.group.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
    return "held_out" if share < held_out else "train"


def select(documents: Iterable[Document], held_out: float, part: str) -> Iterator[Document]:
    """The documents of one part ("train" or "held_out"), in order."""
    assert part in ("train", "held_out"), part
    if not 0 <= held_out <= 0.9:
        raise UserError(f"text.held_out: {held_out} is not between 0 and 0.9. Give such a share.")
    return (document for document in documents if part_of(document, held_out) == part)


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
    rows_per_batch: int = 64,
    max_tokens: int | None = None,
    resume: Mapping[str, int] | None = None,
) -> Packer:
    """Pack documents into rows of `context` tokens; iterate over the result for `Rows` of up to
    `rows_per_batch`.

    isolate      documents that fit are whole, in the best-fitting row of a window; longer ones are cut
                 into pieces of `context`, each a segment of its own. False: plain concatenation, rows cut
                 anywhere
    BOS          where the tokenizer adds one by itself, each document (each piece when isolated) starts
                 with it
    special_ids  masked; the tokenizer's own special tokens when None
    max_tokens   stop reading after the document that reaches so many text tokens
    resume       an earlier packer's `.state`: those rows are made again and skipped
    """
    if context < 2:
        raise UserError(f"text.context: {context} is too short for a row. Give at least 2.")
    return Packer(documents, tokenizer, context, isolate, special_ids, rows_per_batch, max_tokens, resume)


class Packer:
    """Iterator of Rows. `.state` is the position after the last batch; `.counts` says what became of the
    positions: documents, tokens (text), positions, and of these padding, special, first (the first of a
    piece or row)."""

    def __init__(
        self,
        documents: Iterable[Document | str],
        tokenizer: Any,
        context: int,
        isolate: bool,
        special_ids: Collection[int] | None,
        rows_per_batch: int,
        max_tokens: int | None,
        resume: Mapping[str, int] | None,
    ):
        self.context = context
        self.rows_per_batch = rows_per_batch
        self._documents = documents
        self._tokenizer = tokenizer
        self._isolate = isolate
        self._max_tokens = max_tokens
        self._bos = begin_id(tokenizer)
        self._pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, self._bos) if i is not None), 0)
        special = set(tokenizer.all_special_ids if special_ids is None else special_ids)
        self._special = torch.tensor(sorted(special), dtype=torch.int32)
        self.counts: dict[str, int] = dict.fromkeys(
            ("documents", "tokens", "positions", "padding", "special", "first"), 0
        )
        self._emitted = 0
        self._rows = self._isolated() if isolate else self._concatenated()
        while resume and self._emitted < resume["rows"]:
            if next(self, None) is None:
                break

    @property
    def state(self) -> dict[str, int]:
        return {"rows": self._emitted}

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
        padding = doc < 0
        special = torch.isin(tokens, self._special) & ~padding
        first = (pos == 0) & ~padding
        self.counts["positions"] += tokens.numel()
        for name, where in (("padding", padding), ("special", special), ("first", first & ~special)):
            self.counts[name] += int(where.sum())
        return Rows(tokens, doc, pos, ~(padding | special | first))

    def _tokenized(self) -> Iterator[tuple[int, list[int]]]:
        """(number, text tokens) of each document, tokenized a window at a time."""
        source = iter(self._documents)
        while window := list(itertools.islice(source, WINDOW)):
            texts = [item if isinstance(item, str) else item.text for item in window]
            for ids in self._tokenizer(texts, add_special_tokens=False, verbose=False).input_ids:
                number = self.counts["documents"]
                self.counts["documents"] += 1
                self.counts["tokens"] += len(ids)
                if ids:
                    yield number, ids
                if self._max_tokens is not None and self.counts["tokens"] >= self._max_tokens:
                    return

    def _pieces(self) -> Iterator[tuple[int, list[int]]]:
        head = [] if self._bos is None else [self._bos]
        room = self.context - len(head)
        for number, ids in self._tokenized():
            for start in range(0, len(ids), room):
                yield number, head + ids[start : start + room]

    def _isolated(self) -> Iterator[list[tuple[int, list[int]]]]:
        """Each row: the piece that waits longest, then again and again the longest one that still fits."""
        pieces = self._pieces()
        shelves: list[deque[tuple[int, int, list[int]]]] = [deque() for _ in range(self.context + 1)]
        waiting: deque[tuple[int, int]] = deque()  # (serial, length), oldest first; taken ones are skipped
        taken: set[int] = set()
        serials = itertools.count()
        held = 0
        while True:
            for number, ids in itertools.islice(pieces, WINDOW - held):
                serial = next(serials)
                shelves[len(ids)].append((serial, number, ids))
                waiting.append((serial, len(ids)))
                held += 1
            if not held:
                return
            while waiting[0][0] in taken:
                taken.remove(waiting.popleft()[0])
            length = waiting[0][1]  # its shelf is in order of arrival, so it stands first there
            row: list[tuple[int, list[int]]] = []
            room = self.context
            while length:
                serial, number, ids = shelves[length].popleft()
                taken.add(serial)
                held -= 1
                row.append((number, ids))
                room -= length
                length = next((n for n in range(room, 0, -1) if shelves[n]), 0)
            yield row

    def _concatenated(self) -> Iterator[list[tuple[int, list[int]]]]:
        head = [] if self._bos is None else [self._bos]
        row: list[tuple[int, list[int]]] = []
        room = self.context
        for number, ids in self._tokenized():
            ids = head + ids
            while ids:
                row.append((number, ids[:room]))
                ids, room = ids[room:], room - len(ids[:room])
                if not room:
                    yield row
                    row, room = [], self.context
        if row:
            yield row


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
