"""What the training loop costs around its steps: batches, counters, logging, the progress bar.

    python experiments/bench/loop.py [--sizes 4096,16384] [--sources tensor,store] [--steps 40] [--json FILE]

`sae.trainer.train` itself, with its prefetching thread, metrics.jsonl (a line every 10 steps, as by default) and the
bar drawn as on a terminal, into nothing. Evaluation is off; the last checkpoint is timed and left out. "tensor" is rows
in memory, "store" an activation store (harvested on first use with the bundled host, about a minute).

outside   wall time of `fit` not spent in objective.loss, optimizer.update_ and dead.count_, as a share of these
counters  dead.count_ alone, in the same measure
slower    the step inside the loop against the same step on batches that are there: what the prefetching thread takes
"""

import argparse
import contextlib
import io
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from inputs import activations, normed
from own_step import ours
from peer_step import batches
from report import save, show

from sae import trainer
from sae.recipe import (
    ActivationsRecipe,
    EvaluationRecipe,
    Recipe,
    SAERecipe,
    TextRecipe,
    TrainingRecipe,
)
from sae.training import loop

FIT = trainer.fit
STORED_TOKENS = 100_000
WARM_UP = 3


class Terminal(io.StringIO):
    """Where a bar is drawn and forgotten."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


class Clock:
    """Seconds of every call, by name."""

    def __init__(self):
        self.calls: dict[str, list[float]] = {}

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        taken = self.calls.setdefault(name, [])

        def call(*args, **named):
            start = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                taken.append(time.perf_counter() - start)

        return call


def timed_fit(clock: Clock, trainees, stream, run) -> int:
    """`fit` with a clock around what it calls; begins to count after WARM_UP steps."""
    for one in trainees:
        params, objective, optimizer, dead = one.learn.args
        objective = replace(objective, loss=clock.around("loss", objective.loss))
        optimizer.update_ = clock.around("update", optimizer.update_)
        dead.count_ = clock.around("count", dead.count_)
        one.learn = partial(one.learn.func, params, objective, optimizer, dead)
    whole = run.steps
    with mock.patch.object(loop, "_save", lambda *args: None):  # what a checkpoint costs: checkpointing.py
        FIT(trainees, stream, replace(run, steps=WARM_UP))
        for taken in clock.calls.values():
            taken.clear()
        fit = clock.around("fit", FIT)
        return fit(trainees, stream, replace(run, start=WARM_UP, steps=whole))


def in_loop(F: int, source: str, steps: int, d: int, batch: int, store: Path) -> dict[str, float]:
    """Seconds a step of each part."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            text=TextRecipe(max_tokens=STORED_TOKENS),
            activations=ActivationsRecipe(store=str(store) if source == "store" else None),
            sae=SAERecipe(d_sae=F),
            training=TrainingRecipe(tokens=steps * batch, batch=batch, save_every=1e9, dead_after=10**9),
            evaluation=EvaluationRecipe(tokens=0, ce_tokens=0, every=0),
            out=f"{folder}/run",
        )
        acts = activations(d, 100_000, None)[0] if source == "tensor" else None
        clock = Clock()
        with (
            mock.patch.object(trainer, "fit", partial(timed_fit, clock)),
            mock.patch.object(trainer, "finish"),
            contextlib.redirect_stderr(Terminal()),
        ):
            trainer.train(recipe, acts)
    counted = steps - WARM_UP
    return {name: sum(taken) / counted for name, taken in clock.calls.items()}


def bare(F: int, d: int, batch: int, steps: int) -> float:
    """Median seconds of a step on batches that are there."""
    acts = normed(activations(d, 32_768, None)[0])
    step, source = ours("ours topk", acts, (batch, d, F, 32), "auto").step, batches(acts, batch)
    seconds = []
    for _ in range(WARM_UP + steps):
        x = next(source)
        start = time.perf_counter()
        step(x)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", default="4096,16384")
    parser.add_argument("--sources", default="tensor,store")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--d", type=int, default=576)
    parser.add_argument("--store", default="runs/bench/loop-store", help="made on first use; --again makes it anew")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.again:
        shutil.rmtree(options.store, ignore_errors=True)
    rows = []
    for F in (int(size) for size in options.sizes.split(",")):
        alone = bare(F, options.d, options.batch, min(20, options.steps))
        for source in options.sources.split(","):
            part = in_loop(F, source, options.steps, options.d, options.batch, Path(options.store))
            step = part["loss"] + part["update"] + part["count"]
            outside = part["fit"] - step
            rows.append(
                {
                    "d_sae": F,
                    "source": source,
                    "step_ms": step * 1e3,
                    "outside_ms": outside * 1e3,
                    "outside": outside / step,
                    "counters": part["count"] / step,
                    "bare_ms": alone * 1e3,
                    "slower": step / alone - 1,
                }
            )
    save(options.json, show("the loop around the step", rows))


if __name__ == "__main__":
    main()
