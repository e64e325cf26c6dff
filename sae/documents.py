"""Where text comes from: documents of the bundled corpus, of local files, of a `datasets` name, or of Python objects.

A document is plain text, a chat (a list of messages, later put in the tokenizer's own template) or a list of token ids
that somebody made before. `part_of` says by a hash of a document's group whether it is held out: stable across runs,
sources and order. Documents come one by one in their source's order; memory is one batch of a file.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae import bundled
from sae.errors import UserError, first_line, nearest

SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz")


@dataclass(frozen=True)
class Document:
    """A text and what is known of it; documents of one `group` are held out together.

    A chat or a list of token ids has an empty text until a tokenizer has read it (`text.tokenized`).
    """

    text: str
    group: str
    topic: str = ""
    form: str = ""
    source: str = ""
    """Which source of a mixture it came from; empty where there is one source."""
    messages: tuple[Mapping[str, str], ...] = ()
    tokens: tuple[int, ...] = ()

    def facts(self) -> dict[str, str]:
        """What is kept of it beside a store: the text and what is known of it, no token ids."""
        known = {"topic": self.topic, "form": self.form, "source": self.source}
        return {"text": self.text, "group": self.group, **{key: value for key, value in known.items() if value}}


def documents(source: str | Path | Iterable[Any], column: str = "text") -> Iterator[Document]:
    """Read documents from a source, in its order; those of white space alone, or of nothing, are left out.

    source   "bundled"; a path, folder or glob of .txt (documents end at an empty line), .jsonl or .parquet
             files (.gz too); a `datasets` name, "name:config" for one of its configurations (its train
             split, streamed); or an iterable of str, Document or mappings
    column   the field that holds text, a list of messages (role, content) or a list of token ids; several, parted by
             commas, are tried in turn; `topic`, `form` and `prompt` beside it are kept where they exist
    group    the prompt that made the text, else topic and form, else the hash of the content
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
            found = _dataset(name)
    else:
        name, found = "text", iter(source)
    return _some(name, found, column)


def labelled(path: str | Path, field: str) -> Iterator[tuple[Document, str]]:
    """Documents of .jsonl or .parquet files, each with what its row holds in `field` (text, a number, true or false).

    raises   UserError: as `documents`; and for rows without that field or with nothing in it
    """
    name = str(path)
    row = 0
    for file in _local(name):
        for row, item in enumerate(_read(file, f"text,{field}"), start=1):
            if not isinstance(item, Mapping):
                raise UserError(f"{file}: is plain text, which has no field {field!r}. Give .jsonl, or a file a class.")
            if field not in item:
                known = [repr(str(key)) for key in item]
                close = nearest(repr(field), known) or "."
                raise UserError(
                    f"{file}: row {row:,} has no field {field!r}{close} Its fields are {', '.join(known) or 'none'}."
                )
            value = item[field]
            if not isinstance(value, str | int | float) or not str(value).strip():
                raise UserError(
                    f"{file}: row {row:,} holds {value!r:.40} as {field!r}, which is no label. "
                    "Give every row a word or a number there."
                )
            document = _document(name, item, "text")
            if document.text.strip() or document.messages or document.tokens:
                yield document, _clean(str(value)).strip()
    if not row:
        raise UserError(f"{name}: holds no text. Give a file with labelled texts.")


def _some(name: str, found: Iterable[Any], column: str) -> Iterator[Document]:
    empty = True
    for item in found:
        document = _document(name, item, column)
        if document.text.strip() or document.messages or document.tokens:
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
    here = next((one for one in columns(column) if one in item), None)
    if here is None:
        known = [repr(str(key)) for key in item]  # repr: names from a file may hold control characters
        close = nearest(repr(column), known) or "."
        raise UserError(
            f"{name}: has no column {column!r}{close} Its columns are {', '.join(known) or 'none'}; set text.column."
        )
    topic, form, prompt = (_clean(str(item.get(key) or "")) for key in ("topic", "form", "prompt"))
    made = _content(name, here, item[here])
    group = prompt or (f"{topic}\t{form}" if topic and form else made.group)
    return replace(made, group=group, topic=topic, form=form)


def told(source: str | Mapping[str, float]) -> str:
    """A source, or a mixture of them, in words."""
    return source if isinstance(source, str) else " + ".join(f"{share:g} {name}" for name, share in source.items())


def columns(column: str) -> list[str]:
    """The columns that text.column names, in order."""
    return [one.strip() for one in column.split(",") if one.strip()]


def _content(name: str, column: str, value: Any) -> Document:
    """The value of a column as a document: text, messages or token ids."""
    if value is None:
        return Document("", "")
    value = value.tolist() if hasattr(value, "tolist") else value  # numpy's, torch's
    if isinstance(value, str):
        text = _clean(value)
        return Document(text, _digest(text))
    if isinstance(value, list | tuple) and value:
        if all(isinstance(one, Mapping) for one in value):
            messages = tuple(_message(name, column, one) for one in value)
            return Document("", _digest(json.dumps(messages, ensure_ascii=False)), messages=messages)
        if all(isinstance(one, int) and not isinstance(one, bool) for one in value):
            return Document("", _digest(",".join(map(str, value))), tokens=tuple(value))
    if value == [] or value == ():
        return Document("", "")
    raise UserError(
        f"{name}: column {column!r} holds {type(value).__name__} ({str(value)[:40]!r}), no text, no messages with "
        "role and content, no token ids. Set text.column to one that does."
    )


def _message(name: str, column: str, value: Mapping[str, Any]) -> dict[str, str]:
    """A turn of a chat, in either of the two spellings that data sets have."""
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(
            f"{name}: column {column!r} holds a message with {', '.join(map(repr, value)) or 'nothing'}, expected "
            "'role' and 'content' as text. Set text.column to one that holds such messages."
        )
    known = {"human": "user", "gpt": "assistant", "bot": "assistant"}
    return {"role": known.get(role, role), "content": _clean(content)}


def _clean(text: str) -> str:
    """The text with U+FFFD for lone surrogates: JSON can name them (\\ud800), UTF-8 cannot hold them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def hashed(*parts: object) -> str:
    """sha256 of words, as hex: for orders and choices that are the same in every run."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()


def _digest(text: str) -> str:
    return hashed(text)[:16]


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
            asked = columns(column)
            wanted = [name for name in (*asked, "topic", "form", "prompt") if name in names]
            if not set(asked) & set(names):
                wanted = names  # the error names them
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = first_line(error)
        raise UserError(f"{path}: not readable as parquet ({reason}). Write or download it again.") from error


def _dataset(name: str) -> Iterator[Any]:
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
        reason = first_line(error)
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
