"""The loop: next batch, step, count, log, evaluate, save. It reads top to bottom; each helper does one thing.

`fit` takes an iterator of batches (normed, float32) and gives back trained parameters; it knows no host, no text, no
metric: the caller hands in `evaluate`. Ctrl-C and SIGTERM end it at the next step's end, with a checkpoint.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sae.errors import UserError
from sae.objectives.terms import Losses, Objective, Params
from sae.training import checkpoint
from sae.training.dead import Dead
from sae.training.log import Log
from sae.training.optimizer import RowAdam
from sae.training.schedule import lr_at

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Batch:
    acts: Float[Tensor, "B d"]
    """Normed float32 activations."""
    position: dict[str, Any]
    """Where to resume after this batch."""


@dataclass
class Run:
    """What the loop is told about its run."""

    folder: Path
    steps: int
    start: int
    peak_lr: float
    evaluate_every: int
    """Steps; 0 never."""
    save_every: float
    """Seconds."""
    facts: dict[str, Any]
    """Goes into every checkpoint beside the state."""


def fit(
    params: Params,
    objective: Objective,
    optimizer: RowAdam,
    dead: Dead,
    batches: Iterator[Batch],
    run: Run,
    log: Log,
    evaluate: Callable[[Params], dict[str, float]],
) -> bool:
    """Train from run.start to run.steps; True when it ran to the end, False when it was asked to stop before."""
    saved = time.monotonic()
    with stop_signals() as stop:
        for step in range(run.start, run.steps):
            batch = next(batches)
            lr = lr_at(step, run.steps, run.peak_lr)
            work, losses = objective.loss(params, batch.acts, dead.mask(), step / run.steps)
            _refuse_not_finite(losses, step, run.folder)
            optimizer.update_(work, lr, unit_norm=objective.unit_norm)
            dead.count_(work.codes)
            due = run.evaluate_every and (step + 1) % run.evaluate_every == 0
            log.step(step, work, losses, dead, lr, evaluate(params) if due else {})
            last = step + 1 == run.steps
            if last or stop.is_set() or time.monotonic() - saved > run.save_every:
                checkpoint.save(run.folder, step + 1, params, optimizer, dead, batch.position, run.facts)
                saved = time.monotonic()
            if stop.is_set() and not last:
                return False
    return True


def _refuse_not_finite(losses: Losses, step: int, folder: Path) -> None:
    """Stop before such a step touches the parameters."""
    if not bool(losses.mse.isfinite()):
        raise UserError(
            f"training: the loss of step {step:,} is not finite ({float(losses.mse)}): the activations hold NaN or "
            f"infinity, or the rate is too high. The last checkpoint in {folder} is intact; mend that and resume."
        )


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
