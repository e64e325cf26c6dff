"""Where a run's figures go: metrics.jsonl always, a progress line on the terminal, wandb when asked.

Keys are the field's (`losses/mse_loss`, `metrics/explained_variance`, `metrics/l0`, `sparsity/dead_features`, …).
A wandb that fails costs one warning, never the run. Reading a figure from the device happens only when a line is due.
"""

import logging
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sae import files
from sae.kernels import Work
from sae.objectives.terms import Losses
from sae.training.dead import Dead

logger = logging.getLogger("sae")
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
                f"{rate:,.0f} {self.unit}/s{figures}{left}",
                file=sys.stderr,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Log:
    def __init__(
        self,
        folder: Path,
        recipe: dict[str, Any],
        *,
        wandb: str,
        every: int,
        total: int,
        done: int,
        shown: bool,
    ):
        self.every, self.done_tokens = every, done
        self._drop_after(folder / "metrics.jsonl", done)
        self.lines = files.Lines(folder / "metrics.jsonl")
        self.progress = Progress(total, done, "tok", name="train", shown=shown)
        self.began = time.time()
        self.wandb = _start_wandb(wandb, folder, recipe)
        self.last: dict[str, float] = {}

    @staticmethod
    def _drop_after(path: Path, tokens: int) -> None:
        """After a resume, lines beyond the resumed step are gone."""
        if path.exists():
            kept = [line for line in files.read_lines(path) if line["tokens"] <= tokens]
            files.write_text(path, "".join(files.json_line(line) for line in kept))

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
                    **evaluated,
                },
            )
        self.progress.update(rows, self._text())

    def _text(self) -> str:
        last = self.last
        if not last:
            return ""
        held_out = f" (held-out {last['held_out/fvu']:.3f})" if "held_out/fvu" in last else ""
        return (
            f"loss {last['losses/mse_loss']:.1f} · FVU {1 - last['metrics/explained_variance']:.3f}{held_out}"
            f" · L0 {last['metrics/l0']:.1f} · dead {last['sparsity/dead_features']:.1%}"
        )

    def _write(self, step: int, figures: dict[str, float]) -> None:
        self.last |= figures
        line = {"step": step, "tokens": self.done_tokens, "time": time.time() - self.began, **figures}
        self.lines.add(line)
        if self.wandb is not None:
            try:
                self.wandb.log({**figures, "details/n_training_samples": self.done_tokens}, step=step)
            except Exception as error:  # wandb raises its own, the system's and the network's errors alike
                logger.warning("wandb: %s. Training goes on; metrics.jsonl has everything.", error)
                self.wandb = None

    def close(self) -> None:
        self.progress.close()
        self.lines.close()
        if self.wandb is not None:
            self.wandb.finish()


def _start_wandb(mode: str, folder: Path, recipe: dict[str, Any]):
    if mode == "off":
        return None
    try:
        import wandb

        return wandb.init(project="goldengate-sae", name=folder.name, dir=str(folder), config=recipe, mode=mode)  # type: ignore[arg-type]
    except Exception as error:  # as above
        logger.warning("wandb did not start (%s). Training goes on; metrics.jsonl has everything.", error)
        return None
