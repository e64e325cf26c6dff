"""From a recipe to a finished SAE: open the source of activations, take a sample, begin or resume, loop, finish."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import __version__, config, files, kernels, machine
from sae.activations import batches as feed
from sae.activations.harvest import stream
from sae.autoencoder import SAE
from sae.errors import Stopped, UserError
from sae.finish import FINISHED, finish, git_revision
from sae.host import Host
from sae.objectives import Objective, Params, objective
from sae.recipe import Recipe
from sae.sources import Feed, Text, from_store, from_tensor, live, open_host
from sae.training import checkpoint
from sae.training.dead import Dead, dead_window
from sae.training.log import Log
from sae.training.loop import Batch, Run, fit
from sae.training.optimizer import RowAdam
from sae.training.schedule import peak_lr, steps_of

QUICK = 8192  # held-out rows behind the progress line
MAY_CHANGE = ("log.", "evaluation.", "training.save_every", "host.device", "out")  # when a run is resumed


def train(
    recipe: Recipe,
    acts: Any = None,
    *,
    host: Host | None = None,
    resume: bool = False,
    progress: bool = True,
) -> SAE:
    """Train the recipe's SAE, from its store, live from its host, or from your own `acts` [N, d] (tensor or memmap).

    Returns the finished SAE, which is also in `recipe.out`/sae with statistics and (where there is a host)
    evaluation on held-out documents. Raises Stopped after Ctrl-C or SIGTERM with a checkpoint; `resume=True` goes on.
    """
    folder = Path(recipe.out)
    before = _earlier(folder, recipe, resume)
    saved = checkpoint.all_of(folder)
    steps = steps_of(recipe.training.tokens, recipe.training.batch)
    if before and saved and saved[-1].name.endswith(f"{steps:08d}") and (folder / "sae" / FINISHED).exists():
        return SAE.load(folder / "sae")
    if acts is None:
        if before.get("source") == "given rows":
            raise UserError(f"{folder}: was trained on given rows. Go on in Python: train(recipe, acts, resume=True).")
        host = host or open_host(recipe.host)
        source = from_store(recipe, host, progress) if recipe.activations.store else live(recipe, host)
    else:
        source = from_tensor(recipe, acts)
    if before and (source.kind, source.d_in) != (before["source"], before["d_in"]):
        raise UserError(
            f"{folder}: began on {before['source']} of width {before['d_in']:,}, now it would go on with {source.kind} "
            f"of width {source.d_in:,}. Resume with what it began with."
        )

    low = machine.dtype_of(recipe.training.dtype) == torch.bfloat16
    if before:  # the number format goes on as it began, whatever this machine would choose
        low = before["encoder_dtype"] == "bfloat16"
    scale = source.d_in**0.5 / source.sample.norm(dim=1).mean().item()
    sample = source.sample * scale
    variance = (sample - sample.mean(0)).square().sum(1).mean().item()
    trained = objective(recipe, variance, low=low)
    params = trained.begin(sample)
    optimizer = RowAdam(params)
    dead = Dead(recipe.sae.d_sae, dead_window(recipe.training.tokens, recipe.training.dead_after))
    start, position = 0, None
    if before and saved:
        state = checkpoint.load(saved[-1], params, optimizer, dead)
        start, position = state["step"], state["position"]

    run = Run(
        folder=folder,
        steps=steps,
        start=start,
        peak_lr=peak_lr(recipe.training.lr, recipe.sae.d_sae, steps),
        evaluate_every=round(steps * recipe.evaluation.every),
        save_every=recipe.training.save_every,
        facts={"norm_factor": scale},
    )
    _begin_folder(folder, recipe, run, dead.window, low, source)
    if progress:
        print(
            f"{machine.describe()} · encoder in {'bfloat16' if low else 'float32'} · {source.sequences}",
            file=sys.stderr,
        )
    held_out = _held_out_sample(recipe, host, source.hook, source.outlier_norm, scale) if host is not None else None
    log = Log(
        folder,
        config.to_dict(recipe),
        wandb=recipe.log.wandb,
        every=recipe.log.every,
        total=steps * recipe.training.batch,
        done=start * recipe.training.batch,
        shown=progress,
    )
    batches = feed.prefetched(source.batches(position))
    try:
        finished = fit(
            params,
            trained,
            optimizer,
            dead,
            _normed(batches, scale),
            run,
            log,
            partial(_quick, trained, held_out),
        )
    finally:
        batches.close()
        log.close()
    if not finished:
        raise Stopped(f"stopped and saved. Go on with: sae train {folder} --resume")
    return finish(folder / "sae", recipe, params, source, host, scale, progress)


def _earlier(folder: Path, recipe: Recipe, resume: bool) -> dict[str, Any]:
    """What an earlier start of this run resolved (empty for a new run); refuses to overwrite or to change it."""
    if not resume:
        if checkpoint.all_of(folder):
            raise UserError(
                f"{folder}: holds a run already. "
                f"Go on with `sae train {folder} --resume`, choose another `out`, or delete it."
            )
        return {}
    if not (folder / "resolved.json").exists():
        return {}
    before = files.read_json(folder / "resolved.json")
    then, now = _flat(before["recipe"]), _flat(config.to_dict(recipe))
    for name in now:
        if name in then and then[name] != now[name] and not name.startswith(MAY_CHANGE):
            raise UserError(
                f"{folder}: began with {name} = {then[name]}, now it is {now[name]}. Resume without that change, or "
                "begin a new run with another `out`."
            )
    return before


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    pages = {name: page if isinstance(page, dict) else {"": page} for name, page in recipe.items()}
    return {f"{name}.{field}".rstrip("."): value for name, page in pages.items() for field, value in page.items()}


def _begin_folder(folder: Path, recipe: Recipe, run: Run, window: int, low: bool, source: Feed) -> None:
    """Only now, when everything is open and checked, is anything written."""
    if run.start == 0 and (folder / "metrics.jsonl").exists():
        files.write_text(folder / "metrics.jsonl", "")
    files.write_text(folder / "recipe.yaml", config.to_yaml(recipe))
    files.write_json(
        folder / "resolved.json",
        {
            "recipe": config.to_dict(recipe),
            "steps": run.steps,
            "lr": run.peak_lr,
            "dead_after": window,
            "encoder_dtype": "bfloat16" if low else "float32",
            "source": source.kind,
            "d_in": source.d_in,
            "hook": source.hook,
            "norm_factor": run.facts["norm_factor"],
            "machine": machine.describe(),
            "versions": {"goldengate-sae": __version__, "torch": torch.__version__},
            "git_revision": git_revision(),
        },
    )


def _normed(batches: Iterator[feed.RawBatch], scale: float) -> Iterator[Batch]:
    for batch in batches:
        yield Batch(batch.acts.to(torch.float32, copy=True).mul_(scale), batch.position)


def _held_out_sample(recipe: Recipe, host: Host, hook: str, outlier_norm: float | None, scale: float) -> Tensor | None:
    """Normed held-out activations for the progress line; None where nothing is held out or asked."""
    if not recipe.evaluation.every or not recipe.text.held_out:
        return None
    limits = None if outlier_norm is None else {hook: outlier_norm}
    parts, n = [], 0
    for block in stream(host, Text(recipe.text, host, "held_out").rows(), [hook], outlier_norm=limits):
        parts.append(block.acts[hook][block.mask].float())
        n += len(parts[-1])
        if n >= QUICK:
            break
    return torch.cat(parts) * scale if parts else None


def _quick(trained: Objective, held_out: Tensor | None, params: Params) -> dict[str, float]:
    if held_out is None:
        return {}
    codes = trained.encode(params, held_out)
    miss = kernels.decode(codes, params.W_dec, params.b_dec) - held_out
    spread = held_out - held_out.mean(0)
    return {"held_out/fvu": (miss.double().square().sum() / spread.double().square().sum()).item()}
