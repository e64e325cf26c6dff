"""The loop: next batch, step, log, evaluate, save. It reads top to bottom; each helper does one thing.

`fit` takes an iterator of batches (normed, float32) and trains one SAE, or several from the same batches: each batch is
read once. It knows no host, no text, no metric: the caller hands in `evaluate`. Whatever ends it before its last step
(Ctrl-C, SIGTERM, a source that can be read no more) leaves a checkpoint of the last step done; a step that failed half
way (out of memory) leaves the last checkpoint as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from sae.activations.batches import Batch
from sae.errors import UserError
from sae.kernels import Work
from sae.objectives.terms import Losses, Objective, Params
from sae.training import checkpoint, faults
from sae.training.accumulate import joined, mean_losses
from sae.training.average import Average
from sae.training.dead import Dead
from sae.training.log import Log, Progress, told
from sae.training.optimizer import RowAdam
from sae.training.resample import resample_, resample_due
from sae.training.stop import Asked, stop_signals

if TYPE_CHECKING:
    from jaxtyping import Float


class Learn(Protocol):
    def __call__(self, xs: Sequence[Float[Tensor, "B d"]], lr: float, share: float) -> tuple[Work, Losses]:
        """One update from the work of some batches of normed activations, and the count of what fired; `share` of the
        run is done.

        Raises FloatingPointError, with the weights untouched, where the loss is not finite and that is known
        without waiting for the device.
        """
        ...


@dataclass
class Trainee:
    """One SAE in training and all that is its own."""

    folder: Path
    hook: str
    """Which of a batch's activations it learns from."""
    params: Params
    objective: Objective
    optimizer: RowAdam
    dead: Dead
    average: Average | None
    """Of the weights, where the recipe asks for one."""
    learn: Learn
    rate: Callable[[int], float]
    """Learning rate at a step."""
    resample_every: int | None
    """Tokens."""
    seed: int
    """Of resampling, with the step."""
    log: Log
    evaluate: Callable[[Params], dict[str, float]]
    facts: dict[str, Any]
    """Goes into every checkpoint beside the state."""
    skips: faults.Skips = field(default_factory=faults.Skips)

    def shipped(self) -> Params:
        """What is evaluated and exported: the weights, or their average."""
        return self.params if self.average is None else self.average.params(self.objective.unit_norm)

    def state(self) -> checkpoint.State:
        return checkpoint.State(self.params, self.optimizer, self.dead, self.average)


@dataclass
class Run:
    """What all trainees share."""

    steps: int
    start: int
    evaluate_every: int
    """Steps; 0 never."""
    save_every: float
    """Seconds."""
    progress: Progress
    batches_a_step: int = 1
    """Batches whose work goes into one update."""
    told: Callable[[int], str] = str
    """Which row a batch's number stands for."""
    keep: Callable[[dict[str, Any]], None] = lambda position: None
    """Told of the earliest position that a checkpoint still needs."""


def fit(trainees: list[Trainee], batches: Iterator[Batch], run: Run) -> int:
    """Train from run.start to run.steps; 0 when it ran to the end, else the number of the signal that asked to stop.

    Raises UserError: a source or a disk that fails, steps that cannot be learnt from, no memory.
    """
    folders = [one.folder for one in trainees]
    step, position, saved, fault = run.start, None, time.monotonic(), None
    saver = checkpoint.Saver(written=lambda: run.keep(checkpoint.oldest_position(folders[0])))
    with stop_signals() as stop, faults.told(folders), saver:
        while step < run.steps and not stop.number:
            try:
                with stop.at_once():
                    drawn = [next(batches) for _ in range(run.batches_a_step)]
            except Asked:
                break
            except (UserError, OSError) as error:
                fault = error
                break
            tokens = sum(len(batch) for batch in drawn)
            due = run.evaluate_every and (step + 1) % run.evaluate_every == 0
            for one in trainees:
                lr = one.rate(step)
                learnt = faults.attempt(one, drawn, lr, step, run)
                if learnt is None:
                    continue
                work, losses = learnt
                figures: dict[str, float] = {}
                if one.average is not None:
                    one.average.update_(step)
                if resample_due(step, run.steps, tokens, one.resample_every):
                    seed = one.seed * 1_000_003 + step
                    figures["sparsity/resampled"] = resample_(
                        one.params, one.optimizer, one.dead, work, seed, one.average
                    )
                if due:
                    figures |= one.evaluate(one.shipped())
                one.log.step(step, work, losses, one.dead, lr, figures)
            step, position = step + 1, drawn[-1].position
            run.progress.update(tokens, told([one.log for one in trainees]))
            # not while steps are skipped: what has diverged must not push out what is sound
            sound = not any(one.skips.in_a_row for one in trainees)
            if sound and time.monotonic() - saved > run.save_every and not saver.is_busy:
                _save(saver, trainees, step, position)
                saved = time.monotonic()
        if position is not None:
            _save(saver, trainees, step, position)
    if fault is not None:
        raise faults.stopped_by(fault, step, folders) from fault
    return stop.number


def _save(saver: checkpoint.Saver, trainees: Sequence[Trainee], step: int, position: dict[str, Any]) -> None:
    """Begin to write a checkpoint of each, from which reading goes on at `position`."""
    if step == saver.step:
        return
    for one in trainees:
        faults.refuse_diverged(one.params, step)
    saver.save(
        step,
        {one.folder: one.state() for one in trainees},
        {one.folder: {"position": position, **vars(one.skips), **one.facts} for one in trainees},
        first=[one.log.sync for one in trainees],
    )


def learn(
    params: Params,
    objective: Objective,
    optimizer: RowAdam,
    dead: Dead,
    xs: Sequence[Float[Tensor, "B d"]],
    lr: float,
    share: float,
) -> tuple[Work, Losses]:
    """`Learn` on any device, one kernel after the other."""
    mask = dead.mask()
    works, all_losses = zip(*(objective.loss(params, x, mask, share) for x in xs), strict=True)
    work, losses = joined(works), mean_losses(all_losses)
    if losses.mse.device.type == "cpu":
        faults.refuse_not_finite(losses.mse)
    optimizer.update_(work, lr, unit_norm=objective.unit_norm)
    dead.count_(work.codes, losses.fired)
    return work, losses
