"""The loop: next batch, step, log, evaluate, save. It reads top to bottom; each helper does one thing.

`fit` takes an iterator of batches (normed, float32) and trains one SAE, or several from the same batches: each batch is
read once. It knows no host, no text, no metric: the caller hands in `evaluate`. Ctrl-C and SIGTERM end it at the next
step's end, with a checkpoint of each.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from sae.activations.batches import Batch
from sae.errors import UserError
from sae.kernels import Work
from sae.objectives.terms import Losses, Objective, Params
from sae.training import checkpoint
from sae.training.accumulate import joined, mean_losses
from sae.training.average import Average
from sae.training.dead import Dead
from sae.training.log import Log, Progress, told
from sae.training.optimizer import RowAdam
from sae.training.resample import resample_, resample_due

if TYPE_CHECKING:
    from jaxtyping import Float


class Learn(Protocol):
    def __call__(self, xs: Sequence[Float[Tensor, "B d"]], lr: float, share: float) -> tuple[Work, Losses]:
        """One update from the work of some batches of normed activations, and the count of what fired; `share` of the
        run is done.

        Raises FloatingPointError, with the parameters untouched, where the loss is not finite and that is known
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

    def shipped(self) -> Params:
        """What is evaluated and exported: the weights, or their average."""
        return self.params if self.average is None else self.average.params(self.objective.unit_norm)

    def state(self) -> checkpoint.State:
        return checkpoint.State(self.params, self.optimizer, self.dead, self.average)

    def save(self, step: int, position: dict[str, Any]) -> None:
        """A checkpoint after `step` steps, from which reading goes on at `position`."""
        checkpoint.save(self.folder, step, self.state(), position, self.facts)


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


def fit(trainees: list[Trainee], batches: Iterator[Batch], run: Run) -> bool:
    """Train from run.start to run.steps; True when it ran to the end, False when it was asked to stop before."""
    saved = time.monotonic()
    with stop_signals() as stop:
        for step in range(run.start, run.steps):
            drawn = [next(batches) for _ in range(run.batches_a_step)]
            tokens = sum(len(batch) for batch in drawn)
            due = run.evaluate_every and (step + 1) % run.evaluate_every == 0
            for one in trainees:
                lr = one.rate(step)
                figures: dict[str, float] = {}
                with _not_finite_is_told(step, one.folder):
                    work, losses = one.learn([batch.acts[one.hook] for batch in drawn], lr, step / run.steps)
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
            run.progress.update(tokens, told([one.log for one in trainees]))
            last = step + 1 == run.steps
            if last or stop.is_set() or time.monotonic() - saved > run.save_every:
                for one in trainees:
                    with _not_finite_is_told(step, one.folder):
                        refuse_not_finite(one.params.b_dec)
                    one.save(step + 1, drawn[-1].position)
                saved = time.monotonic()
            if stop.is_set() and not last:
                return False
    return True


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
        refuse_not_finite(losses.mse)
    optimizer.update_(work, lr, unit_norm=objective.unit_norm)
    dead.count_(work.codes, losses.fired)
    return work, losses


def refuse_not_finite(tensor: Tensor) -> None:
    """FloatingPointError where anything is NaN or infinite (the sum then is). Waits for the device."""
    if not bool(tensor.sum().isfinite()):
        raise FloatingPointError(f"{float(tensor.sum())}")


@contextmanager
def _not_finite_is_told(step: int, folder: Path):
    try:
        yield
    except FloatingPointError as error:
        raise UserError(
            f"training: the loss of step {step:,} is not finite ({error}): the activations hold NaN or infinity, or "
            f"the rate is too high. The last checkpoint in {folder} is intact; mend that and resume."
        ) from error


@contextmanager
def stop_signals():
    """An event that SIGINT and SIGTERM set; a second SIGINT stops at once. Only in the main thread."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
