"""Where a run's figures go: metrics.jsonl always, wandb when asked, a progress line on the terminal.

Keys are the field's (`losses/mse_loss`, `metrics/explained_variance`, `metrics/l0`, `sparsity/dead_features`, …).
Reading a figure from the device happens only when a line is due.

wandb takes its figures from metrics.jsonl, in a process of its own (follower.py); one that fails costs one warning,
never the run. RUN/wandb.json keeps the one id that the run has there over all resumptions. Offline, each start makes a
folder RUN/wandb/offline-run-* with every line from the first on: sync the newest alone, which is
RUN/wandb/latest-run (`wandb sync RUN/wandb/latest-run`).
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sae import files
from sae.errors import UserError
from sae.kernels import Work
from sae.objectives.terms import Losses
from sae.training.dead import Dead
from sae.training.follower import Follower, warn

_PLAIN_EVERY = 10.0


class Progress:
    """One line: a bar on a terminal, time-stamped plain lines at most every 10 s elsewhere."""

    def __init__(self, total: int | None, initial: int, unit: str, *, name: str, shown: bool = True):
        self.total, self.done, self.start_at, self.name, self.unit = total, initial, initial, name, unit
        self.began = self.last_line = time.monotonic()
        self.tty = sys.stderr.isatty()
        self.shown = shown
        self.bar = (
            tqdm(total=total, initial=initial, unit=unit, unit_scale=True, desc=name, dynamic_ncols=True)
            if shown and self.tty
            else None
        )

    def update(self, n: int, text: str = "") -> None:
        self.done += n
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(n)
        elif self.shown and time.monotonic() - self.last_line > _PLAIN_EVERY:
            self.last_line = time.monotonic()
            rate = (self.done - self.start_at) / (self.last_line - self.began)
            of = left = ""
            if self.total is not None:
                of = f"/{self.total:,}"
                left = f" · {max(0, self.total - self.done) / max(rate, 1e-9):,.0f} s left"
            figures = f" · {text}" if text else ""
            print(
                f"{time.strftime('%H:%M:%S')} {self.name} {self.done:,}{of} {self.unit} · "
                f"{rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s{figures}{left}",
                file=sys.stderr,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Log:
    """The figures of one SAE."""

    def __init__(self, folder: Path, recipe: dict[str, Any], *, wandb: str, every: int):
        self.folder, self.recipe, self.mode = folder, recipe, wandb
        self.every, self.done_tokens = every, 0
        self.last: dict[str, float] = {}

    def __enter__(self) -> Log:
        """Only now is anything written. Raises UserError where metrics.jsonl is damaged."""
        path = self.folder / "metrics.jsonl"
        kept = _kept(path, self.done_tokens)
        self.lines = files.Lines(path)
        self.began = time.time() - (kept[-1]["time"] if kept else 0.0)
        self.wandb = self._start_wandb()
        return self

    def _start_wandb(self) -> Follower | None:
        if self.mode == "off" or os.environ.get("WANDB_MODE") == "disabled":
            return None
        try:
            return Follower(self.folder, _wandb_id(self.folder, self.recipe, self.done_tokens), self.recipe, self.mode)
        except (OSError, UserError) as error:
            warn(self.folder, str(error))
            return None

    def step(self, step: int, work: Work, losses: Losses, dead: Dead, lr: float, evaluated: dict[str, float]) -> None:
        """Count the rows of a step; write its line when one is due or something was evaluated."""
        rows = work.codes.n_rows
        self.done_tokens += rows
        if step % self.every == 0 or evaluated:
            self._write(
                step,
                {
                    "losses/mse_loss": float(losses.mse),
                    "losses/auxiliary_reconstruction_loss": float(losses.aux),
                    "metrics/explained_variance": 1 - float(losses.fvu),
                    "metrics/l0": (work.codes.values > 0).sum().item() / rows,
                    "sparsity/dead_features": dead.share(),
                    "details/current_learning_rate": lr,
                    **({"losses/sparsity_loss": float(losses.sparsity)} if losses.sparsity is not None else {}),
                    **{name: float(value) for name, value in losses.more.items()},
                    **evaluated,
                },
            )

    def last_tenth(self, key: str) -> float | None:
        """Mean of a figure over the lines of the last tenth of the steps; None where there is none."""
        lines = [line for line in files.read_lines(self.folder / "metrics.jsonl") if key in line]
        found = [line[key] for line in lines if line["step"] >= 0.9 * lines[-1]["step"]]
        return sum(found) / len(found) if found else None

    def skip(self, step: int, rows: int, skipped: int) -> None:
        """Count the rows of a step that was not learnt from; always a line."""
        self.done_tokens += rows
        self._write(step, {"details/skipped_steps": skipped})

    def _write(self, step: int, figures: dict[str, float]) -> None:
        self.last |= figures
        line = {"step": step, "tokens": self.done_tokens, "time": time.time() - self.began, **figures}
        self.lines.add(line)

    def sync(self) -> None:
        """On disk, come what may, is every line so far; due before a checkpoint is."""
        self.lines.sync()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.lines.close()
        if self.wandb is not None:
            self.wandb.close(exit_code=0 if kind is None else 1)


def _kept(path: Path, tokens: int) -> list[dict[str, Any]]:
    """The lines up to a resumed position. Later ones are gone from the file."""
    if not path.exists():
        return []
    lines = files.read_lines(path, required=("step", "tokens", "time"))
    kept = [line for line in lines if line["tokens"] <= tokens]
    files.write_text(path, "".join(files.json_line(line) for line in kept))
    return kept


def _wandb_id(folder: Path, recipe: dict[str, Any], tokens: int) -> str:
    """The run's id: made once, and once more where another recipe begins in the folder from nothing."""
    path = folder / "wandb.json"
    recipe = json.loads(files.json_text(recipe))
    if path.exists():
        known = files.read_json_object(path, required=("id", "recipe"))
        if tokens or known["recipe"] == recipe:
            return known["id"]
    made = uuid.uuid4().hex[:12]
    files.write_json(path, {"id": made, "recipe": recipe})
    return made


def told(logs: Sequence[Log]) -> str:
    """The last figures for the progress line: one SAE's, or the range over several."""
    last = [log.last for log in logs]
    if not all("metrics/l0" in figures for figures in last):
        return ""

    def over(values: list[float], form: str) -> str:
        low, high = (format(value, form) for value in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    many = f"{len(last)} SAEs · " if len(last) > 1 else ""
    fvu = over([1 - figures["metrics/explained_variance"] for figures in last], ".3f")
    held_out = [figures["held_out/fvu"] for figures in last if "held_out/fvu" in figures]
    held_out = f" (held-out {over(held_out, '.3f')})" if held_out else ""
    l0 = over([figures["metrics/l0"] for figures in last], ".1f")
    dead = over([figures["sparsity/dead_features"] for figures in last], ".1%")
    return f"{many}FVU {fvu}{held_out} · L0 {l0} · dead {dead}"
