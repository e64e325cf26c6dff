"""Training state on disk: everything a run needs to go on, in one folder that appears whole or not at all.

RUN/checkpoints/step-00001200/ holds training.safetensors (parameters, their average, moments, dead counters, the L0
controller; float32, normed units) and training.json (step, position in the data, what was skipped, norm factor). The
last two are kept. This is not the SAE that ships: that is RUN/sae, written by finish.py.
`Saver` writes beside the loop: training waits for a copy of the state in memory, not for the disk.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sae import files, machine
from sae.errors import UserError
from sae.objectives.terms import Params
from sae.training.average import Average
from sae.training.dead import Dead
from sae.training.optimizer import RowAdam, trained

logger = logging.getLogger("sae")
KEEP = 2
NICE = 10
SPARE = 256e6  # bytes of memory that a copy leaves free


@dataclass
class State:
    """What a checkpoint holds of one SAE."""

    params: Params
    optimizer: RowAdam
    dead: Dead
    average: Average | None = None

    def tensors(self) -> dict[str, Tensor]:
        """By their names on disk; these are the live ones."""
        named = {**trained(self.params), **self.optimizer.state_dict(), "dead.since": self.dead.since}
        kept = {"ema_threshold": self.params.ema_threshold, "control": self.params.control}
        named |= {name: tensor for name, tensor in kept.items() if tensor is not None}
        return named if self.average is None else named | self.average.state_dict()


class Saver:
    """Writes checkpoints of some SAEs in a thread, those of one step at a time. A context: leaving it waits for them.

    written   called in that thread when all of a step are on disk
    A write that failed is raised by whatever is called next, as the UserError that it was.
    """

    def __init__(self, written: Callable[[], None] = lambda: None):
        self.written = written
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.step: int | None = None
        """Of what was last begun to be written."""
        self.streams = False

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception) and self.thread is not None:  # after Ctrl-C the interpreter's end waits
            self.thread.join()

    @property
    def is_busy(self) -> bool:
        """Whether a write goes on; training does not wait for it, the next checkpoint does."""
        self._raise()
        return self.thread is not None and self.thread.is_alive()

    def save(
        self,
        step: int,
        states: Mapping[Path, State],
        facts: Mapping[Path, dict[str, Any]],
        first: Sequence[Callable[[], None]] = (),
    ) -> None:
        """Copy every run's state and begin to write the copies; `states` and `facts` by run folder. Where memory has no
        room for a copy, the state is written as it is, and the caller waits.

        first   called before anything is written, in the same thread
        """
        self.wait()
        self.step = step
        tensors = {run: state.tensors() for run, state in states.items()}
        size = _bytes(tensors)
        free = machine.free_memory()
        if free is not None and size + SPARE > free:
            if not self.streams:
                logger.warning(
                    "checkpoint: %.1f MB and only %.0f MB of memory free: written without a copy, training waits.",
                    size / 1e6, free / 1e6,
                )  # fmt: skip
            self.streams = True
            self._write(step, tensors, facts, first)
            self._raise()
            return
        copies = {
            run: {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}
            for run, named in tensors.items()
        }
        # Not a daemon: an interpreter that ends on an error still finishes the file.
        self.thread = threading.Thread(target=self._write_beside, args=(step, copies, facts, first), name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Until what was begun is on disk."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self._raise()

    def _write_beside(self, *args: Any) -> None:
        """In what training leaves of the cores: a step waits for its slowest thread."""
        if sys.platform == "linux":  # elsewhere priorities are of processes
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        self._write(*args)

    def _write(
        self,
        step: int,
        tensors: Mapping[Path, Mapping[str, Tensor]],
        facts: Mapping[Path, dict[str, Any]],
        first: Sequence[Callable[[], None]],
    ) -> None:
        try:
            for call in first:
                call()
            for run, named in tensors.items():
                write(run, step, named, facts[run])
            for run in tensors:  # only when all have this step: they go on together
                for old in all_of(run)[:-KEEP]:
                    files.remove_folder(old)
            self.written()
        except UserError as error:
            self.error = UserError(
                f"{error} The checkpoint of step {step:,} ({_bytes(tensors) / 1e6:,.2f} MB) was not written."
            )
        except BaseException as error:  # noqa: BLE001 - raised in the loop, whatever it is
            self.error = error

    def _raise(self) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error


def _bytes(tensors: Mapping[Path, Mapping[str, Tensor]]) -> int:
    return sum(tensor.numel() * tensor.itemsize for named in tensors.values() for tensor in named.values())


def write(run: Path, step: int, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> Path:
    """One checkpoint, whole or not at all."""
    folder = at(run, step)
    crc = 0

    def noted() -> Iterator[bytes | memoryview]:
        nonlocal crc
        for block in files.safetensors_blocks(tensors, {}):
            crc = zlib.crc32(block, crc)
            yield block

    with files.atomic_folder(folder, marker="training.json") as temporary:
        files.write_blocks(temporary / "training.safetensors", noted())
        files.write_json(temporary / "training.json", {"step": step, **facts, "crc32": crc})
    return folder


def all_of(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-" + "[0-9]" * 8))


def steps(run: Path) -> list[int]:
    """The steps of its complete checkpoints, oldest first."""
    return [int(folder.name.removeprefix("step-")) for folder in all_of(run)]


def at(run: Path, step: int) -> Path:
    """The checkpoint's folder."""
    return run / "checkpoints" / f"step-{step:08d}"


def oldest_position(run: Path) -> dict[str, Any]:
    """Where its oldest checkpoint goes on reading."""
    return facts_of(all_of(run)[0])["position"]


def facts_of(folder: Path) -> dict[str, Any]:
    """training.json of a checkpoint."""
    return files.read_json_object(folder / "training.json", ("step", "position"))


def drop_after(run: Path, step: int) -> None:
    """Remove checkpoints of later steps, from which a run is not gone on with, and what killed writers left."""
    for folder in all_of(run):
        if folder > at(run, step):
            files.remove_folder(folder)
    files.sweep(run / "checkpoints")


def _crc(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            found = zlib.crc32(block, found)
    return found


def load(folder: Path, state: State) -> dict[str, Any]:
    """Put a checkpoint's state in place; returns training.json. Raises UserError if it is damaged."""
    try:
        facts = facts_of(folder)
        tensors, _ = files.read_safetensors(folder / "training.safetensors")
        if facts.get("crc32", found := _crc(folder / "training.safetensors")) != found:
            raise UserError(f"{folder / 'training.safetensors'}: its bytes are not what was written.")
    except UserError as error:
        raise UserError(f"{error} Delete this folder ({folder}) and resume from the one before.") from error
    for name, mine in state.tensors().items():
        if name not in tensors:
            raise UserError(f"{folder}: has no {name}. Resume with the recipe and the version of the run.")
        if mine.shape != tensors[name].shape:
            raise UserError(
                f"{folder}: {name} is {tuple(tensors[name].shape)}, the recipe makes {tuple(mine.shape)}. "
                "Resume with the recipe of the run."
            )
        mine.copy_(tensors[name])
    if state.params.encoder_low is not None:
        state.params.encoder_low.copy_(state.params.encoder)
    state.optimizer.load_state_dict(tensors)
    return facts
