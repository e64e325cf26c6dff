"""The blocks of a live run on disk, for as long as a checkpoint needs them: nothing is harvested twice.

A window of the shuffle (windows.py) holds the rows of some blocks, read from the host one after the other. Each is
written to FOLDER/block-00000012.safetensors as it is made: acts.<hook>, tokens, doc, pos of the rows that count, and
the text packer's state after it, so that a run which was killed reads the blocks of its window back, and packs and
harvests from the next one on. What no checkpoint needs any more is dropped (`keep_from`): the disk holds about two
windows, and what was harvested since the last checkpoint but one. A text that fits a window stays, and is harvested
once.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import files
from sae.activations.harvest import Block
from sae.errors import UserError
from sae.text import Packer, Rows


class Spool:
    """The text's blocks by their place in its endless repetition, as `windows.Slabs`: of n blocks, that at place n is
    the first one again.

    rows      packs the text, from the beginning or from a packer's state on
    harvest   runs the host over token rows
    slab_rows positions of a block at most
    """

    def __init__(
        self,
        folder: Path,
        hooks: Sequence[str],
        slab_rows: int,
        rows: Callable[[Mapping[str, Any] | None], Packer],
        harvest: Callable[[Rows], Block],
    ):
        self.folder, self.hooks, self.slab_rows = folder, list(hooks), slab_rows
        self.rows, self.harvest = rows, harvest
        self.packer, self.next = None, 0
        self.about: dict[str, Any] = {"blocks": None, "window": None, "fits": False}
        if (folder / "about.json").exists():
            self.about = files.read_json_object(folder / "about.json", self.about)

    @property
    def n_blocks(self) -> int | None:
        """Of the text; None until its end was seen."""
        return self.about["blocks"]

    def window(self, capacity: int) -> tuple[int, int]:
        """(blocks in a window of `capacity` rows, slots for them); at most the whole text."""
        wanted = -(-capacity // self.slab_rows)
        if self.about["window"] != wanted:
            found = self.at_most(wanted + 1)
            self._note(window=wanted, blocks=found if found <= wanted else None, fits=found <= wanted)
        if self.n_blocks == 0:
            raise UserError("text.source: holds no text to train on. Check the source.")
        blocks = min(wanted, self.n_blocks or wanted)
        return blocks, blocks * self.slab_rows

    def at_most(self, n: int) -> int:
        """So many blocks, or as many as the text has: by packing alone, without the host, always the same."""
        return sum(1 for _ in islice(self.rows(None), n))

    def sequence(self, start: int, end: int, seed: int) -> list[int]:
        """In the order of the text, round and round."""
        return list(range(start, end))

    def block(self, number: int, memory: Callable[[int], bytearray] = bytearray) -> Block:
        if self._path(number).exists():
            return self._read(number)[0]
        rows = self._rows_of(number)
        if rows is None:  # the text's end, which is known from now on
            if not self.n_blocks:
                raise UserError("text.source: holds no text to train on. Check the source.")
            return self.block(number, memory)
        made = _that_count(self.harvest(rows))
        assert self.packer is not None, "it just gave the rows"
        self._write(number, made, self.packer.state)
        return made

    def keep_from(self, number: int) -> None:
        """Drop the blocks at places before `number`; of a text that fits a window, none."""
        for path in [] if self.about["fits"] else self.folder.glob("block-*.safetensors"):
            if int(path.stem.removeprefix("block-")) < number:
                files.remove_file(path)

    def told(self, number: int, row: int) -> str:
        """A row of a block, for a message."""
        block = self.block(number)
        return f"document {int(block.doc[row]):,}, token {int(block.pos[row])} of its piece"

    def _rows_of(self, number: int) -> Rows | None:
        """The token rows of a block; None, and its number of blocks noted, where the text ends before it."""
        at = number if not self.n_blocks else number % self.n_blocks
        if self.packer is None or self.next != at:
            state = self._read(number - 1)[1] if at and self._path(number - 1).exists() else None
            self.packer, self.next = self.rows(state), at if state else 0
        rows = None
        while self.next <= at:  # once, but where the spool was deleted: that is packing again, without the host
            if (rows := next(self.packer, None)) is None:
                self._note(blocks=self.next)
                return None
            self.next += 1
        return rows

    def _path(self, number: int) -> Path:
        if self.about["fits"]:
            number %= self.about["blocks"]
        return self.folder / f"block-{number:08d}.safetensors"

    def _note(self, **facts: Any) -> None:
        self.about |= facts
        files.write_json(self.folder / "about.json", self.about)

    def _write(self, number: int, block: Block, state: Mapping[str, Any]) -> None:
        pending = state["pending"]
        tensors = {
            **{f"acts.{hook}": acts for hook, acts in block.acts.items()},
            **{name: getattr(block, name) for name in ("tokens", "doc", "pos")},
            "pending.documents": torch.tensor([number for number, _ in pending], dtype=torch.int64),
            "pending.lengths": torch.tensor([len(ids) for _, ids in pending], dtype=torch.int64),
            "pending.ids": torch.tensor([one for _, ids in pending for one in ids], dtype=torch.int32),
        }
        counters = {name: value for name, value in state.items() if name != "pending"}
        noted = {"packer": json.dumps(counters), "crc32": str(_crc(tensors))}
        files.write_blocks(self._path(number), files.safetensors_blocks(tensors, noted))

    def _read(self, number: int) -> tuple[Block, dict[str, Any]]:
        """(block, the packer's state after it)."""
        tensors, noted = files.read_safetensors(self._path(number))
        try:
            found = {hook: tensors[f"acts.{hook}"] for hook in self.hooks}
            tokens, doc, pos = (tensors[name] for name in ("tokens", "doc", "pos"))
            state = json.loads(noted["packer"])
            if noted["crc32"] != str(_crc(tensors)):
                raise ValueError("its bytes are not what was written")
            ids = tensors["pending.ids"].split(tensors["pending.lengths"].tolist())
            numbers = tensors["pending.documents"].tolist()
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{self._path(number)}: not a block of this run ({error}). Delete this file.") from error
        state["pending"] = [[number, one.tolist()] for number, one in zip(numbers, ids, strict=True)]
        return Block(found, tokens, doc, pos, torch.ones(len(tokens), dtype=torch.bool)), state


def _crc(tensors: Mapping[str, Tensor]) -> int:
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(files.raw(tensors[name]), found)
    return found


def _that_count(block: Block) -> Block:
    """The block without the rows that do not count: the same now as when it is read back."""
    keep: Tensor = block.mask
    acts = {hook: rows[keep] for hook, rows in block.acts.items()}
    return Block(acts, block.tokens[keep], block.doc[keep], block.pos[keep], keep[keep])
