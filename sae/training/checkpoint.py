"""Training state on disk: everything a run needs to go on, in one folder that appears whole or not at all.

RUN/checkpoints/step-00001200/ holds training.safetensors (parameters, their average, moments, dead counters; float32,
normed units) and training.json (step, position in the data, norm factor). The last two are kept. This is not the SAE
that ships: that is RUN/sae, written by finish.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sae import files
from sae.errors import UserError
from sae.objectives.terms import Params
from sae.training.average import Average
from sae.training.dead import Dead
from sae.training.optimizer import RowAdam, trained

KEEP = 2


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
        if self.params.ema_threshold is not None:
            named["ema_threshold"] = self.params.ema_threshold
        return named if self.average is None else named | self.average.state_dict()


def save(
    run: Path,
    step: int,
    state: State,
    position: dict[str, Any],
    facts: dict[str, Any],
) -> Path:
    """Write the state after `step` steps and drop all but the last KEEP."""
    folder = at(run, step)
    with files.atomic_folder(folder, marker="training.json") as temporary:
        files.write_safetensors(temporary / "training.safetensors", state.tensors())
        files.write_json(temporary / "training.json", {"step": step, "position": position, **facts})
    for old in all_of(run)[:-KEEP]:
        files.remove_folder(old)
    return folder


def all_of(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def steps(run: Path) -> list[int]:
    """The steps of its complete checkpoints, oldest first."""
    return [int(folder.name.removeprefix("step-")) for folder in all_of(run)]


def at(run: Path, step: int) -> Path:
    """The checkpoint's folder."""
    return run / "checkpoints" / f"step-{step:08d}"


def drop_after(run: Path, step: int) -> None:
    """Remove checkpoints of later steps, from which a run is not gone on with."""
    for folder in all_of(run):
        if folder > at(run, step):
            files.remove_folder(folder)


def load(folder: Path, state: State) -> dict[str, Any]:
    """Put a checkpoint's state in place; returns training.json. Raises UserError if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    facts = files.read_json(folder / "training.json")
    try:
        tensors = load_file(folder / "training.safetensors")
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{folder}: damaged ({error}). Delete this folder and resume from the one before.") from error
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
