"""The activation store, both directions: shards of safetensors and a manifest, rows by slice.

STORE/manifest.json        format; host name and fingerprint; hooks and widths; dtype; context; masking; source; shards
STORE/shard-00000.safetensors   acts.<hook> [rows, d], tokens, doc, pos [rows] int32, mask [rows] uint8
STORE/documents.jsonl      the documents by their number, so that a store can be indexed and shown on its own

A forward batch never crosses a shard, every shard is renamed into place whole, and the manifest is rewritten after
each: a harvest that was stopped goes on at the next shard. Nobody else touches activation files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae import files
from sae.activations.harvest import Block
from sae.errors import UserError
from sae.text import Document

if TYPE_CHECKING:
    from jaxtyping import Float, Int

FORMAT = 1
MANIFEST, DOCUMENTS = "manifest.json", "documents.jsonl"
_KEYS = ("format", "description", "shards", "complete")
# Forward batches in a shard: 32 × 64 rows × 128 tokens × 576 × bf16 is 300 MB.
BATCHES_PER_SHARD = 8


@dataclass(frozen=True)
class Description:
    """What a store must agree on with whoever uses it."""

    host: str
    host_fingerprint: str
    hooks: dict[str, int]
    """Canonical name → width."""
    dtype: str
    context: int
    source: str
    part: str
    """train, held_out or all."""
    held_out: float
    max_tokens: int | None
    isolate_documents: bool
    outlier_norm: dict[str, float]
    """Positions whose norm is larger are masked."""


def write(
    path: str | Path,
    description: Description,
    batches: Iterable[Any],
    forward: Callable[[Any], Block],
    documents: Sequence[Document],
    on_tokens: Callable[[int], None] = lambda n: None,
) -> Store:
    """Run `forward` over batches of token rows and write the blocks as shards; `documents` is filled by the time the
    batches are exhausted. Finished shards of an interrupted call with the same description are kept.

    A finished store that has these hooks and others is opened too. Raises UserError when the folder holds a store of
    something else.
    """
    path = Path(path)
    manifest = _begin(path, description)
    if manifest["complete"]:
        return Store.open(path)
    done = len(manifest["shards"])
    waiting: list[Any] = []
    number = 0
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        if batch is not None:
            waiting.append(batch)
        if waiting and (batch is None or len(waiting) == BATCHES_PER_SHARD):
            if number >= done:
                blocks = []
                for item in waiting:
                    blocks.append(forward(item))
                    on_tokens(blocks[-1].tokens.shape[0])
                manifest["shards"].append(_write_shard(path, number, blocks))
                files.write_json(path / MANIFEST, manifest)
            else:
                on_tokens(manifest["shards"][number]["rows"])
            number, waiting = number + 1, []
        if batch is None:
            break
    if not manifest["shards"]:
        raise UserError(f"{description.source}: holds no text to harvest (part {description.part}). Check the source.")
    files.write_text(path / DOCUMENTS, "".join(files.json_line(asdict(document)) for document in documents))
    files.write_json(path / MANIFEST, manifest | {"complete": True})
    return Store.open(path)


def _begin(path: Path, description: Description) -> dict[str, Any]:
    wanted = asdict(description)
    if (path / MANIFEST).exists():
        manifest = files.read_json_object(path / MANIFEST, _KEYS, newest=FORMAT)
        if not isinstance(manifest["description"], dict) or not isinstance(manifest["shards"], list):
            raise _foreign(path, "description or shards")
        if manifest["complete"] and _has_more_hooks(manifest["description"], wanted):
            return manifest
        differing = [key for key, value in wanted.items() if manifest["description"].get(key) != value]
        if differing:
            key = differing[0]
            raise UserError(
                f"{path}: holds a store with {key} = {manifest['description'].get(key)!r}, this harvest has "
                f"{wanted[key]!r}. Choose another folder or delete this one."
            )
        return manifest
    if path.exists() and any(path.iterdir()):
        raise UserError(f"{path}: is not empty and not an activation store. Choose another folder.")
    return {"format": FORMAT, "description": wanted, "shards": [], "complete": False}


def _has_more_hooks(there: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a store was made like the wanted one, at its hooks and others. (A row is masked by all of its hooks.)"""
    by_hook = ("hooks", "outlier_norm")
    same = all(there.get(key) == value for key, value in wanted.items() if key not in by_hook)
    return same and all(wanted[key].items() <= (there.get(key) or {}).items() for key in by_hook)


def _foreign(path: Path, why: object) -> UserError:
    return UserError(f"{path / MANIFEST}: not a manifest of ours ({why}). Delete the store and harvest again.")


def _write_shard(path: Path, number: int, blocks: list[Block]) -> dict[str, Any]:
    name = f"shard-{number:05d}.safetensors"
    tensors = {f"acts.{hook}": torch.cat([block.acts[hook] for block in blocks]) for hook in blocks[0].acts}
    for field in ("tokens", "doc", "pos"):
        tensors[field] = torch.cat([getattr(block, field) for block in blocks]).to(torch.int32)
    tensors["mask"] = torch.cat([block.mask for block in blocks]).to(torch.uint8)
    files.write_safetensors(path / name, tensors)
    return {"file": name, "rows": tensors["tokens"].shape[0], "sha256": files.checksum(path / name)}


class Store:
    """A finished store, opened for reading; shards are memory-mapped on first use."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest
        self.description = Description(**manifest["description"])
        self.shard_rows = [shard["rows"] for shard in manifest["shards"]]
        self.starts = torch.tensor([0, *self.shard_rows]).cumsum(0)
        self._shards: dict[int, dict[str, Tensor]] = {}

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Raises UserError for a folder that is no store, an unfinished one, or one of a newer format."""
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise UserError(f"{path}: not an activation store (no {MANIFEST}). Make one with `sae harvest`.")
        manifest = files.read_json_object(path / MANIFEST, _KEYS, newest=FORMAT)
        if not manifest["complete"]:
            raise UserError(f"{path}: the harvest was not finished. Run the same `sae harvest` again: it goes on.")
        try:
            return cls(path, manifest)
        except (TypeError, KeyError) as error:
            raise _foreign(path, error) from error

    @property
    def hooks(self) -> dict[str, int]:
        return self.description.hooks

    @property
    def n_rows(self) -> int:
        return int(self.starts[-1])

    @property
    def documents(self) -> list[Document]:
        try:
            return [Document(**line) for line in files.read_lines(self.path / DOCUMENTS)]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{self.path / DOCUMENTS}: missing or damaged ({error}). Delete the store and harvest again."
            ) from error

    def check(self, host_fingerprint: str, hook: str) -> None:
        """Refuse another host or a hook that is not here."""
        if host_fingerprint != self.description.host_fingerprint:
            raise UserError(
                f"{self.path}: was harvested from {self.description.host} ({self.description.host_fingerprint}), "
                f"this host is {host_fingerprint}. Harvest again with this host."
            )
        if hook not in self.hooks:
            raise UserError(f"{self.path}: has no {hook} (it has {', '.join(self.hooks)}). Harvest that hook.")

    def shard(self, number: int) -> dict[str, Tensor]:
        """Named tensors of one shard, memory-mapped."""
        if number not in self._shards:
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            entry = self.manifest["shards"][number]
            try:
                tensors = load_file(self.path / entry["file"])
            except (SafetensorError, FileNotFoundError) as error:
                raise UserError(
                    f"{self.path / entry['file']}: missing or damaged ({error}). Delete the store and harvest again."
                ) from error
            if tensors["tokens"].shape[0] != entry["rows"]:
                raise UserError(
                    f"{self.path / entry['file']}: has {tensors['tokens'].shape[0]:,} rows, the manifest says "
                    f"{entry['rows']:,}. Delete the store and harvest again."
                )
            self._shards[number] = tensors
        return self._shards[number]

    def valid_rows(self) -> Int[Tensor, " n"]:
        """Numbers of the rows that count: text, and no outlier norm."""
        masks = [self.shard(i)["mask"] for i in range(len(self.shard_rows))]
        return torch.cat(masks).nonzero().squeeze(1)

    def take(self, hook: str, rows: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Activations of the given rows, in the given order and the store's dtype."""
        if (rows[1:] < rows[:-1]).any():
            rows, order = rows.sort()
            return self.take(hook, rows)[order.argsort()]
        ends = torch.searchsorted(rows, self.starts).tolist()  # ascending rows: those of a shard are a slice
        acts = {n: self.shard(n)[f"acts.{hook}"] for n in range(len(self.shard_rows)) if ends[n] < ends[n + 1]}
        any_shard = next(iter(acts.values()))
        out = torch.empty(rows.shape[0], any_shard.shape[1], dtype=any_shard.dtype)
        for number, part in acts.items():
            here = slice(ends[number], ends[number + 1])
            torch.index_select(part, 0, rows[here] - self.starts[number], out=out[here])
        return out

    def blocks(self, hook: str) -> Iterator[Block]:
        """One Block a shard, in order, with the activations of one hook."""
        for number in range(len(self.shard_rows)):
            tensors = self.shard(number)
            yield Block(
                {hook: tensors[f"acts.{hook}"]},
                tensors["tokens"],
                tensors["doc"],
                tensors["pos"],
                tensors["mask"].bool(),
            )
