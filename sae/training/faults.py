"""What goes wrong in a run: batches and losses that are not finite, no memory; each as one line that says how to go on.

A step that cannot be learnt from is skipped and counted; after IN_A_ROW of them training stops with the cause.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.activations.batches import Batch
from sae.errors import UserError
from sae.objectives.terms import Params
from sae.training import checkpoint
from sae.training.optimizer import trained

if TYPE_CHECKING:
    from sae.kernels import Work
    from sae.objectives.terms import Losses
    from sae.training.loop import Run, Trainee

logger = logging.getLogger("sae")
IN_A_ROW = 3
_NAMED = 3  # rows that a message names


@dataclass
class Skips:
    """Steps of one SAE that were not learnt from; part of its checkpoints."""

    skipped: int = 0
    in_a_row: int = 0


def attempt(one: Trainee, drawn: Sequence[Batch], lr: float, step: int, run: Run) -> tuple[Work, Losses] | None:
    """A step of one SAE; None where its batch or its loss is not finite, and nothing was changed.

    Raises UserError after IN_A_ROW of those.
    """
    cause = _not_finite(drawn, one.hook, run.told)
    if cause is None:
        try:
            learnt = one.learn([batch.acts[one.hook] for batch in drawn], lr, step / run.steps)
        except FloatingPointError as error:
            cause = f"the loss is not finite ({error}) though the activations are; the learning rate may be too high"
        else:
            one.skips.in_a_row = 0
            return learnt
    one.skips.skipped += 1
    one.skips.in_a_row += 1
    if one.skips.in_a_row >= IN_A_ROW:
        raise UserError(
            f"training: {IN_A_ROW} steps in a row could not be learnt from, the last of them step {step:,}: {cause}. "
            "Mend that."
        )
    logger.warning("step %d is skipped: %s.", step, cause)
    one.log.skip(step, sum(len(batch) for batch in drawn), one.skips.skipped)
    return None


def _not_finite(drawn: Sequence[Batch], hook: str, told: Callable[[int], str]) -> str | None:
    rows = [row for batch in drawn if hook in batch.bad for row in batch.bad[hook].tolist()]
    if not rows:
        return None
    named = ", ".join(told(row) for row in rows[:_NAMED])
    more = f" and {len(rows) - _NAMED:,} more" if len(rows) > _NAMED else ""
    return f"NaN or infinity at {hook} in {named}{more}"


def refuse_not_finite(tensor: Tensor) -> None:
    """FloatingPointError where anything is NaN or infinite (the sum then is). Waits for the device."""
    if not bool(tensor.sum().isfinite()):
        raise FloatingPointError(f"{float(tensor.sum())}")


def refuse_diverged(params: Params, step: int) -> None:
    """Refuse to save what has become NaN or infinite."""
    try:
        for tensor in trained(params).values():
            refuse_not_finite(tensor)
    except FloatingPointError as error:
        raise UserError(
            f"training: after step {step:,} the weights are not finite ({error}): the learning rate is too high. "
            "Begin anew with a lower training.lr, or from the last checkpoint."
        ) from error


@contextmanager
def told(folders: Sequence[Path]) -> Iterator[None]:
    """Whatever ends a run says how to go on. A step that found no memory leaves its weights half moved: only the
    checkpoint before counts."""
    try:
        yield
    except UserError as error:
        if "Go on with" in str(error):
            raise
        raise UserError(f"{error} {_kept(folders[0])} Go on with: {again(folders)}") from error
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["MemoryError"])[0]
        raise UserError(
            f"training: out of memory ({reason[:200]}). {_kept(folders[0])} Free some memory, or begin anew with a "
            f"smaller training.batch or sae.d_sae. Go on with: {again(folders)}"
        ) from error


def stopped_by(error: UserError | OSError, step: int, folders: Sequence[Path]) -> UserError:
    """What ends a run whose source cannot be read any more."""
    reason = str(error)
    if isinstance(error, OSError):
        reason = f"{error.filename or 'activations'}: cannot be read ({error.strerror or error})"
    return UserError(
        f"{reason.rstrip('.')}. Training stopped after step {step:,}. {_kept(folders[0])} Go on with: {again(folders)}"
    )


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _kept(folder: Path) -> str:
    saved = checkpoint.steps(folder)
    return f"The checkpoint of step {saved[-1]:,} is intact." if saved else "No checkpoint is there yet."


def again(folders: Sequence[Path]) -> str:
    """The command that goes on."""
    return f"sae train {folders[0]} --resume" if len(folders) == 1 else "the same sweep and --resume"
