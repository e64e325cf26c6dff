"""From recipes to finished SAEs: open the source of activations, take a sample, begin or resume, loop, finish.

`train` is one SAE; `train_many` trains several on one stream: the host runs once, each batch is read once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import __version__, config, kernels, machine, warm
from sae.activations import batches as feed
from sae.activations.harvest import stream
from sae.architectures import architecture
from sae.autoencoder import SAE
from sae.errors import Stopped, UserError
from sae.finish import finish, git_revision
from sae.host import Host
from sae.objectives import Objective, Params, objective
from sae.recipe import Recipe, TrainingRecipe
from sae.sources import Channel, Feed, first_rows, from_store, from_tensors, live
from sae.token_rows import Text, open_host
from sae.training import capture, checkpoint
from sae.training import folder as runs
from sae.training.average import Average
from sae.training.dead import Dead, dead_window
from sae.training.log import Log, Progress
from sae.training.loop import Run, Trainee, fit, learn
from sae.training.optimizer import FROZEN, RowAdam
from sae.training.schedule import decay_steps, lr_at, peak_lr, steps_of, warm_up_steps

QUICK = 8192  # held-out rows behind the progress line
# What recipes on one stream have in common; everything else is each SAE's own.
SHARED = ("host.", "text.", "activations.", "evaluation.", "log.", "training.tokens", "training.batch",
    "training.grad_acc_steps", "training.device", "training.save_every")  # fmt: skip
OWN = ("host.hook",)


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
    return train_many([recipe], acts, host=host, resume=resume, progress=progress)[0]


def train_many(
    recipes: Sequence[Recipe],
    acts: Any = None,
    *,
    host: Host | None = None,
    resume: bool = False,
    progress: bool = True,
) -> list[SAE]:
    """Train several SAEs on one stream of activations, each in the folder of its own recipe; as `train` otherwise.

    Recipes may differ in `sae`, in `host.hook`, and in what concerns one SAE's training. The order of the data is that
    of the first recipe's seed; SAEs of other seeds differ in how they begin. `acts` may be {hook: [N, d]}.
    `resume=True` goes on from the newest step that all unfinished runs have saved, and opens the finished ones.
    """
    _check_together(recipes)
    training = recipes[0].training
    steps = steps_of(training.tokens, training.batch * training.grad_acc_steps)
    before = [runs.earlier(recipe, resume) for recipe in recipes]
    order = next((known["order_seed"] for known in before if "order_seed" in known), training.seed)
    waiting = [i for i, recipe in enumerate(recipes) if not runs.is_finished(recipe, before[i], steps)]
    made = {i: SAE.load(Path(recipes[i].out) / "sae") for i in range(len(recipes)) if i not in waiting}
    if waiting:
        unfinished, earlier = [recipes[i] for i in waiting], [before[i] for i in waiting]
        made |= dict(zip(waiting, _train(unfinished, earlier, order, steps, acts, host, progress), strict=True))
    return [made[i] for i in range(len(recipes))]


def _train(
    recipes: Sequence[Recipe],
    before: Sequence[dict[str, Any]],
    order: int,
    steps: int,
    acts: Any,
    host: Host | None,
    progress: bool,
) -> list[SAE]:
    """Train unfinished SAEs together. before: what an earlier start of each resolved; order: seed of the batches."""
    first, device = recipes[0], _device(recipes[0].training)
    if acts is None:
        for recipe, known in zip(recipes, before, strict=True):
            if known.get("source") == "given rows":
                raise UserError(
                    f"{recipe.out}: was trained on given rows. Go on in Python: train(recipe, acts, resume=True)."
                )
        host = host or open_host(first.host)
    hooks = [recipe.host.hook if host is None else host.hook(recipe.host.hook) for recipe in recipes]
    start = runs.common_step([Path(recipe.out) for recipe in recipes], [bool(known) for known in before])
    widths = [host.width(hook) if host is not None and acts is None else None for hook in hooks]
    warmed = [
        warm.open_sae(recipe, hook, host, width) if recipe.training.init_from is not None and start == 0 else None
        for recipe, hook, width in zip(recipes, hooks, widths, strict=True)
    ]
    source = _open(first, list(dict.fromkeys(hooks)), acts, host, order, progress)
    channels = [source.channels[hook] for hook in hooks]
    for recipe, known, channel in zip(recipes, before, channels, strict=True):
        _refuse_other_source(recipe, known, source, channel)

    held_out = _held_out_samples(first, host, source) if host is not None else {}
    samples = {hook: channel.sample * channel.scale for hook, channel in source.channels.items()}
    trainees, position, tokens_a_step = [], None, first.training.batch * first.training.grad_acc_steps
    for recipe, known, channel in zip(recipes, before, channels, strict=True):
        low = machine.dtype_of(recipe.training.dtype, device) == torch.bfloat16
        if known:  # the number format goes on as it began, whatever this machine would choose
            low = known["encoder_dtype"] == "bfloat16"
        sample, unseen = samples[channel.hook], held_out.get(channel.hook)
        one = _trainee(recipe, channel, sample, unseen, low, device, steps, warmed.pop(0))
        if start:
            one.log.done_tokens = start * tokens_a_step
            position = checkpoint.load(checkpoint.at(one.folder, start), one.state())["position"]
        trainees.append(one)
    with ExitStack() as opened:
        for recipe, known, channel, one in zip(recipes, before, channels, trainees, strict=True):
            resolved = _resolved(recipe, one, source, channel, order, steps)
            runs.begin(recipe, resolved | warm.noted(recipe, known, start), start)
            opened.enter_context(one.log)
        if progress:
            low = "bfloat16" if trainees[0].params.encoder_low is not None else "float32"
            print(f"{machine.describe()} · encoder in {low} · {source.sequences}", file=sys.stderr)
        scales = {hook: channel.scale for hook, channel in source.channels.items()}
        batches = _served(source, position, scales, device, opened)
        bar = Progress(steps * tokens_a_step, start * tokens_a_step, "tok", name="train", shown=progress)
        opened.callback(bar.close)
        run = Run(
            steps=steps,
            start=start,
            evaluate_every=round(steps * first.evaluation.every),
            save_every=first.training.save_every,
            progress=bar,
            batches_a_step=first.training.grad_acc_steps,
        )
        finished = fit(trainees, batches, run)
    if not finished:
        again = f"sae train {trainees[0].folder} --resume" if len(trainees) == 1 else "the same sweep and --resume"
        raise Stopped(f"stopped and saved. Go on with: {again}")
    return [
        finish(one.folder / "sae", recipe, one.shipped(), channel, host, progress)
        for recipe, channel, one in zip(recipes, channels, trainees, strict=True)
    ]


def _open(recipe: Recipe, hooks: Sequence[str], acts: Any, host: Host | None, order: int, progress: bool) -> Feed:
    if acts is not None:
        if not isinstance(acts, Mapping):
            if len(hooks) > 1:
                raise UserError(f"activations: one matrix for {', '.join(hooks)}. Give {{hook: [N, d]}}.")
            acts = {hooks[0]: acts}
        elif host is not None:
            acts = {host.hook(name): rows for name, rows in acts.items()}
        if missing := [hook for hook in hooks if hook not in acts]:
            raise UserError(f"activations: none for {missing[0]} (given: {', '.join(acts)}). Give {{hook: [N, d]}}.")
        return from_tensors(recipe, {hook: acts[hook] for hook in hooks}, order)
    assert host is not None, "without rows there is a host"
    if recipe.activations.store:
        return from_store(recipe, hooks, host, order, progress)
    return live(recipe, hooks, host, order)


def _served(
    source: Feed, position: dict[str, Any] | None, scales: dict[str, float], device: torch.device, opened: ExitStack
) -> Iterator[feed.Batch]:
    """Normed batches on the device, fetched ahead in a thread unless that would take the training step's own cores."""
    batches = source.batches(position)
    if device.type == "cpu":
        batches = feed.normed(batches, scales)
        return batches if source.on_cores else opened.enter_context(closing(feed.prefetched(batches)))
    if device.type == "cuda":
        batches = feed.pinned(batches)
    ahead = opened.enter_context(closing(feed.prefetched(batches, one_core=not source.on_cores)))
    return feed.normed(ahead, scales, device)


def _device(training: TrainingRecipe) -> torch.device:
    """Where weights and batches are: auto is cuda or cpu; mps, whose kernels are the plain ones, only when asked."""
    if training.device == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    return machine.device_of(training.device)


def _trainee(
    recipe: Recipe,
    channel: Channel,
    sample: Tensor,
    held_out: Tensor | None,
    low: bool,
    device: torch.device,
    steps: int,
    warmed: SAE | None,
) -> Trainee:
    """An SAE before its first step, from a sample of normed activations or from a finished one. Nothing is written."""
    variance = (sample - sample.mean(0)).square().sum(1).mean().item()
    trained = objective(recipe, variance, low=low)
    begun = trained.begin(sample)
    if warmed is not None:
        begun = warm.begin_from(begun, warmed, recipe, channel.scale, trained.unit_norm)
    params = replace(begun, **{name: one.to(device) for name, one in vars(begun).items() if one is not None})
    optimizer = RowAdam(
        params,
        betas=(recipe.training.adam_beta1, recipe.training.adam_beta2),
        clip=recipe.training.clip,
        frozen=FROZEN[recipe.training.finetune],
    )
    dead = Dead(recipe.sae.d_sae, dead_window(recipe.training.tokens, recipe.training.dead_after), device)
    state = params, trained, optimizer, dead
    return Trainee(
        folder=Path(recipe.out),
        hook=channel.hook,
        params=params,
        objective=trained,
        optimizer=optimizer,
        dead=dead,
        average=Average(params, recipe.training.ema) if recipe.training.ema else None,
        learn=partial(learn, *state)
        if recipe.training.grad_acc_steps > 1
        else capture.learner(recipe.sae.architecture, *state),
        rate=partial(
            lr_at,
            steps=steps,
            peak=peak_lr(recipe.training.lr, recipe.sae.d_sae, steps),
            name=recipe.training.lr_scheduler_name,
            warm_up=recipe.training.lr_warm_up_steps,
            decay=recipe.training.lr_decay_steps,
        ),
        resample_every=recipe.training.resample_every,
        seed=recipe.training.seed,
        log=Log(Path(recipe.out), config.to_dict(recipe), wandb=recipe.log.wandb, every=recipe.log.every),
        evaluate=partial(_quick, trained, None if held_out is None else held_out.to(device)),
        facts={"norm_factor": channel.scale},
    )


def _resolved(recipe: Recipe, one: Trainee, source: Feed, channel: Channel, order: int, steps: int) -> dict[str, Any]:
    """What became of "auto", and where and on what the run takes place."""
    return {
        "steps": steps,
        "lr": peak_lr(recipe.training.lr, recipe.sae.d_sae, steps),
        "lr_warm_up_steps": warm_up_steps(steps, recipe.training.lr_warm_up_steps),
        "lr_decay_steps": decay_steps(
            steps, recipe.training.lr_scheduler_name, recipe.training.lr_decay_steps, recipe.training.lr_warm_up_steps
        ),
        "dead_after": one.dead.window,
        "encoder_dtype": "float32" if one.params.encoder_low is None else "bfloat16",
        "device": str(one.params.b_dec.device),
        "order_seed": order,
        "source": source.kind,
        "d_in": channel.d_in,
        "hook": channel.hook,
        "norm_factor": channel.scale,
        "machine": machine.describe(),
        "versions": {"goldengate-sae": __version__, "torch": torch.__version__},
        "git_revision": git_revision(),
    }


def _check_together(recipes: Sequence[Recipe]) -> None:
    """Recipes on one stream agree in what makes the stream; each has an architecture and a folder."""
    if not recipes:
        raise UserError("train: no recipe given. Give at least one.")
    first = runs.flat(config.to_dict(recipes[0]))
    for recipe in recipes:
        architecture(recipe.sae.architecture)
        config.check_together(recipe, f"recipe for {recipe.out}")
        for name, value in runs.flat(config.to_dict(recipe)).items():
            if name.startswith(SHARED) and name not in OWN and value != first[name]:
                raise UserError(
                    f"{name}: is {first[name]} and {value} for SAEs on one stream, which have it in common. "
                    "Train them one by one."
                )
    outs = [recipe.out for recipe in recipes]
    for out in outs:
        if outs.count(out) > 1:
            raise UserError(f"out: {outs.count(out)} SAEs would be written to {out}. Give each a folder of its own.")


def _refuse_other_source(recipe: Recipe, known: dict[str, Any], source: Feed, channel: Channel) -> None:
    if known and (source.kind, channel.d_in) != (known["source"], known["d_in"]):
        raise UserError(
            f"{recipe.out}: began on {known['source']} of width {known['d_in']:,}, now it would go on with "
            f"{source.kind} of width {channel.d_in:,}. Resume with what it began with."
        )


def _held_out_samples(recipe: Recipe, host: Host, source: Feed) -> dict[str, Tensor]:
    """Normed held-out activations by hook for the progress line; none where nothing is held out or asked."""
    if not recipe.evaluation.every or not recipe.text.held_out:
        return {}
    limits = {hook: one.outlier_norm for hook, one in source.channels.items() if one.outlier_norm is not None}
    blocks = stream(host, Text(recipe.text, host, "held_out").rows(), list(source.channels), outlier_norm=limits)
    return {hook: acts * source.channels[hook].scale for hook, acts in first_rows(blocks, QUICK).items()}


def _quick(trained: Objective, held_out: Tensor | None, params: Params) -> dict[str, float]:
    if held_out is None:
        return {}
    codes = trained.encode(params, held_out)
    miss = kernels.decode(codes, params.W_dec, params.b_dec) - held_out
    spread = held_out - held_out.mean(0)
    return {"held_out/fvu": (miss.double().square().sum() / spread.double().square().sum()).item()}
