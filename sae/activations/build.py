"""Building a store: token rows first, then shards, each a pure function of its rows and the host.

1. The text is read once and packed into blocks of some `BLOCK` tokens, whose sequences are shuffled, so that a
   shard draws on much of the text. Rows, bytes and time are known before a host has run.
2. Every process takes its share of the shards (parallel.py), runs the host over their rows and writes them beside the
   next forward. A shard is finished when its note (shard-00000.json) is there; forwards never cross a shard, so that a
   shard has the same bits whoever makes it, and whenever.
3. Who finds all notes there gathers them into the manifest.

A harvest that was killed loses the shards in hand and goes on with the rest. One process writes a store at a time, or
several as ranks; locks.py keeps others out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Any

import torch

from sae import files, locks
from sae.activations import shards
from sae.activations.cached import CachedRows
from sae.activations.harvest import Block
from sae.activations.manifest import (
    FORMAT,
    MANIFEST,
    Reading,
    TextFacts,
    cut,
    layout_of,
    read_manifest,
    sequences_a_shard,
    wrong_entry,
)
from sae.activations.shards import Entry, Layout
from sae.activations.store import Store
from sae.documents import Document, told
from sae.errors import UserError
from sae.parallel import Rank
from sae.places import Place
from sae.text import Packer, Rows

logger = logging.getLogger("sae")
BLOCK = 2**21  # tokens whose sequences are shuffled together before any host reads them
WRITING, PLANNING = "harvest", "rows"
CACHED = "cached_activations_path="  # how the source of imported rows begins
_LEFT_BEHIND = 3600.0  # seconds after which nobody writes a temporary file any more
_WAIT = 0.5  # seconds between looks at what another rank is doing
_ROW_FIELDS = ("tokens", "doc", "pos", "mask")


# ---- token rows --------------------------------------------------------------------------------------------


def plan(
    place: Place,
    text: TextFacts,
    pack: Callable[[Callable[[Document], None]], Packer | CachedRows],
    fits: Callable[[int], None],
    on_tokens: Callable[[int], object] = lambda n: None,
) -> dict[str, Any]:
    """Read and pack the text, write it as blocks of token rows, and give the manifest that names them.

    pack   a packer that notes documents as it numbers them
    fits   called with the rows so far; raises where the disk cannot hold them
    Whatever goes wrong, nothing is left behind.
    """
    noted: list[Document] = []
    packer = pack(noted.append)
    written: list[dict[str, Any]] = []
    waiting: list[Rows] = []
    a_block = max(BLOCK // text.context, sequences_a_shard(asdict(text)))
    _remove_rows(place)  # of a plan that was killed
    try:
        for rows in packer:
            waiting.append(rows)
            on_tokens(rows.tokens.numel())
            if sum(map(len, waiting)) >= a_block:
                written.append(_write_block(place, len(written), _joined(waiting), noted))
                waiting.clear()
                noted.clear()
                fits(sum(one["sequences"] for one in written) * text.context)
        if waiting:
            written.append(_write_block(place, len(written), _joined(waiting), noted))
        sequences = sum(one["sequences"] for one in written)
        if not sequences:
            raise UserError(f"{told(text.source)}: holds no text (part {text.part}). Check the source.")
        fits(sequences * text.context)
    except BaseException:
        _remove_rows(place)
        raise
    counts: dict[str, Any] = packer.counts | {"sequences": sequences}
    if isinstance(text.source, dict):
        counts["tokens_by_source"] = dict(packer.sources)
    return {
        "format": FORMAT,
        "text": asdict(text),
        "counts": counts,
        "blocks": written,
        "shards": [(stop - start) * text.context for _, start, stop in cut(asdict(text), written)],
        "readings": [],
    }


def _remove_rows(place: Place) -> None:
    for name in place.names():
        if name.startswith(("rows-", "documents-")):
            place.remove(name)


def _joined(parts: Sequence[Rows]) -> Rows:
    return Rows(*(torch.cat([getattr(part, name) for part in parts]) for name in _ROW_FIELDS))


def _write_block(place: Place, number: int, rows: Rows, documents: Sequence[Document]) -> dict[str, Any]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(number))
    tensors = {name: getattr(rows, name)[order] for name in _ROW_FIELDS}
    tensors["mask"] = tensors["mask"].to(torch.uint8)
    names = {"rows": f"rows-{number:05d}.safetensors", "documents": f"documents-{number:05d}.jsonl"}
    text = "".join(files.json_line(document.facts()) for document in documents).encode("utf-8")
    content = b"".join(files.safetensors_blocks(tensors, {"block": str(number)}))
    place.write(names["documents"], [text])
    place.write(names["rows"], [content])
    return {
        **names,
        "sequences": len(rows),
        "n_documents": len(documents),
        "sha256": sha256(content).hexdigest(),
        "documents_sha256": sha256(text).hexdigest(),
    }


class TokenRows:
    """The token rows of a planned store, by shard; one block is held in memory."""

    def __init__(self, place: Place, manifest: dict[str, Any]):
        self.place, self.blocks = place, manifest["blocks"]
        self.at = cut(manifest["text"], self.blocks)
        self._held: tuple[int, Rows] | None = None

    def of(self, shard: int) -> Rows:
        block, start, stop = self.at[shard]
        if self._held is None or self._held[0] != block:
            self._held = (block, read_block(self.place, self.blocks[block]))
        return self._held[1].part(start, stop)


def read_block(place: Place, known: dict[str, Any]) -> Rows:
    """A block of token rows; refused by name where it is not what was written."""
    from safetensors.torch import load

    content = place.read(known["rows"])
    if sha256(content).hexdigest() != known["sha256"]:
        raise UserError(
            f"{place.named(known['rows'])}: is not what was written (sha256 differs). It cannot be mended alone. "
            "Delete the store and harvest again."
        )
    tensors = load(content)
    return Rows(tensors["tokens"], tensors["doc"], tensors["pos"], tensors["mask"].bool())


# ---- who writes --------------------------------------------------------------------------------------------


@contextmanager
def writing(place: Place, rank: Rank) -> Iterator[None]:
    """Keep other writers out: all where this process is alone, those of its own rank where it is one of several."""
    if rank.world == 1:
        with locks.lock(place, WRITING):
            for name in locks.held_names(place):
                if name.startswith("rank-") and locks.is_held(place, name):
                    raise UserError(
                        f"{place}: is being written by {name}. Wait until its ranks have ended, or stop them."
                    )
            yield
        return
    with locks.lock(place, f"rank-{rank.rank}-of-{rank.world}"):
        if locks.is_held(place, WRITING):
            raise UserError(f"{place}: is being written by one process alone. Wait until it has ended, or stop it.")
        for name in locks.held_names(place):
            if name.startswith("rank-") and not name.endswith(f"-of-{rank.world}") and locks.is_held(place, name):
                raise UserError(
                    f"{place}: is being written by {name}, this is {rank}. Wait until those ranks have ended."
                )
        yield


@contextmanager
def changing_manifest(place: Place) -> Iterator[None]:
    """Only one rank at a time; the others wait."""
    with ExitStack() as held:
        waited = False
        while True:
            try:
                held.enter_context(locks.lock(place, PLANNING))
                break
            except locks.Held:
                if not waited:
                    logger.warning("%s: another rank is reading the text or completing the store; waiting", place)
                waited = True
                time.sleep(_WAIT)
        yield


def planned(place: Place, text: TextFacts, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The manifest of the store with this text; made now where there is none, refused where it is of another text."""
    manifest = read_manifest(place)
    if manifest is None:
        strange = [name for name in place.names() if not name.startswith((".", "rows-", "documents-"))]
        if strange:
            raise UserError(f"{place}: is not empty and not an activation store ({strange[0]}). Choose another folder.")
        manifest = make()
        place.write_json(MANIFEST, manifest)
        return manifest
    refuse_other_text(place, manifest, text)
    return manifest


def refuse_other_text(place: Place, manifest: dict[str, Any], text: TextFacts) -> None:
    """Refuse another text with both values, and what to write so that they agree."""
    for key, value in asdict(text).items():
        there = manifest["text"][key]
        if there == value:
            continue
        field = "activations.shard_rows" if key == "shard_rows" else f"text.{key}"
        told = f"{place}: was harvested with {field} = {_spelled(there)}, now it is {_spelled(value)}."
        if key in ("tokenizer", "part") or CACHED in (str(there) + str(value)):
            raise UserError(f"{told.replace(field, key)} Choose another folder.")
        raise UserError(f"{told} Write {field}={_spelled(there)} to use this store, or choose another folder.")


def _spelled(value: Any) -> str:
    """As a recipe or a command line has it."""
    if isinstance(value, dict):
        return "'{" + ", ".join(f"{name}: {share:g}" for name, share in value.items()) + "}'"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def begun(place: Place, manifest: dict[str, Any], wanted: Reading) -> tuple[list[int], Reading | None]:
    """The readings that have hooks of the wanted one, and what no reading has yet.

    Raises UserError where a hook is there in another number format, or (unfinished) computed in another one.
    """
    found, missing = [], dict(wanted.hooks)
    for number, one in enumerate(manifest["readings"]):
        there = Reading(**one["facts"])
        shared = [hook for hook in there.hooks if hook in missing]
        if there.host_fingerprint != wanted.host_fingerprint or not shared:
            continue
        for key in ("dtype", "computed") if one["shards"] is None else ("dtype",):
            # Whether layers are compiled was decided when the reading began, and it goes on so.
            if getattr(there, key).partition(",")[0] != getattr(wanted, key).partition(",")[0]:
                word = "kept as" if key == "dtype" else "computed in"
                raise UserError(
                    f"{place}: holds {shared[0]} of {there.host} {word} {getattr(there, key)}, this harvest would have "
                    f"it {word} {getattr(wanted, key)}. Choose another folder, or the same format."
                )
        found.append(number)
        for hook in shared:
            del missing[hook]
    return found, replace(wanted, hooks=missing) if missing else None


# ---- shards ------------------------------------------------------------------------------------------------


def shard_names(reading: int, number: int) -> tuple[str, str]:
    """File and note of a shard."""
    stem = f"shard-{number:05d}" + (f".{reading}" if reading else "")
    return f"{stem}.safetensors", f"{stem}.json"


def finished(place: Place, manifest: dict[str, Any], reading: int) -> dict[int, Entry]:
    """The shards that are there, by number: noted, and of the size that was noted."""
    there = set(place.names())
    found = {}
    for number in range(len(manifest["shards"])):
        file, note = shard_names(reading, number)
        if note in there and file in there:
            try:
                noted = place.read_json(note)
            except UserError:  # damaged: the shard is made anew
                continue
            rows = manifest["shards"][number]
            if not wrong_entry(noted, rows) and noted["file"] == file and place.size(file) == noted["bytes"]:
                found[number] = Entry(**noted)
    return found


def there(place: Place, manifest: dict[str, Any], reading: int) -> dict[int, Entry]:
    """The shards of a reading by number: of a finished one as the manifest has them, else those that are finished."""
    noted = manifest["readings"][reading]["shards"]
    if noted is None:
        return finished(place, manifest, reading)
    return {number: Entry(**entry) for number, entry in enumerate(noted)}


def without(place: Place, manifest: dict[str, Any], reading: int, bad: set[int]) -> dict[str, Any]:
    """The manifest with a reading taken up again: its good shards are noted, the bad ones gone."""
    known = manifest["readings"][reading]["shards"]
    if known is not None and not bad:
        return manifest
    for number, entry in enumerate(known or []):
        if number not in bad:
            place.write_json(shard_names(reading, number)[1], entry)
    if known is not None:
        manifest["readings"][reading]["shards"] = None
        place.write_json(MANIFEST, manifest)
    there = set(place.names())
    for number in bad:
        for name in set(shard_names(reading, number)) & there:
            place.remove(name)
    return manifest


def run(
    place: Place,
    manifest: dict[str, Any],
    reading: int,
    numbers: Sequence[int],
    forward: Callable[[Rows], Iterator[Block]],
) -> None:
    """Make some shards: the host computes one while the one before is written. Ctrl-C waits for the latter."""
    layout = layout_of(manifest, reading)
    rows = TokenRows(place, manifest)
    # One core for the writer: a second team of OpenMP threads would spin against that of the forward.
    with ThreadPoolExecutor(1, "writer", lambda: torch.set_num_threads(1)) as writer:
        before: Future[None] | None = None
        for number in numbers:
            blocks = list(forward(rows.of(number)))
            if before is not None:
                before.result()  # or what went wrong in writing it
            before = writer.submit(_write_shard, place, reading, number, layout, blocks)
            torch.set_num_threads(torch.get_num_threads())  # of threads begun later: the writer's setting reached them
        if before is not None:
            before.result()


def _write_shard(place: Place, reading: int, number: int, layout: Layout, blocks: Sequence[Block]) -> None:
    file, note = shard_names(reading, number)
    place.write_json(note, asdict(shards.write(place, file, number, layout, blocks)))


def merged(place: Place, reading: int, rank: Rank) -> Store | None:
    """Gather the notes of all shards into the manifest, and the store; None while some are missing."""
    with changing_manifest(place):
        manifest = read_manifest(place)
        assert manifest is not None, "the plan was there a moment ago"
        if manifest["readings"][reading]["shards"] is None:
            found = finished(place, manifest, reading)
            if len(found) < len(manifest["shards"]):
                return None
            manifest["readings"][reading]["shards"] = [asdict(found[i]) for i in range(len(found))]
            place.write_json(MANIFEST, manifest)
        for note in {shard_names(reading, i)[1] for i in range(len(manifest["shards"]))} & set(place.names()):
            place.remove(note)
        place.sweep(0.0 if rank.world == 1 else _LEFT_BEHIND)  # other ranks may be writing now
    return Store.open(place.url)
