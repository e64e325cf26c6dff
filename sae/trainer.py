"""From recipes to finished SAEs: open the source of activations, take a sample, begin or resume, loop, finish.

`train` is one SAE; `train_many` trains several on one stream: the host runs once, each batch is read once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import config, files, machine, plan, warm
from sae.activations import batches as feed
from sae.activations.harvest import Block, stream
from sae.architectures import architecture
from sae.autoencoder import SAE
from sae.errors import Stopped, UserError
from sae.finish import finish, git_revision, versions
from sae.host import Host
from sae.objectives import target
from sae.recipe import Recipe
from sae.sources import Channel, Feed, first_rows, from_store, from_tensors, kept, live
from sae.token_rows import Text, open_host
from sae.trainees import device_of, is_low, resolved, trainee, variance_of
from sae.training import checkpoint, faults
from sae.training import folder as runs
from sae.training.log import Progress
from sae.training.loop import Run, Trainee, fit
from sae.training.schedule import steps_of
from sae.training.stop import ended_by_signal

logger = logging.getLogger("sae")
MISSED = 0.05  # of a target
SCALES_ALIKE = 1e-4  # another machine or number of threads rounds otherwise
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
        unfinished = [recipes[i] for i in waiting]
        with runs.writing(recipes):
            earlier = [runs.earlier(recipe, resume) for recipe in unfinished]  # again: nobody else writes now
            trained = _train(_Task(unfinished, recipes, earlier, order, steps, acts, host, progress))
            made |= dict(zip(waiting, trained, strict=True))
    with faults.told([Path(recipe.out) for recipe in recipes]):
        files.remove_folder(Path(recipes[0].out) / "rows")
    return [made[i] for i in range(len(recipes))]


@dataclass(frozen=True)
class _Task:
    """What a start of training was asked for."""

    recipes: Sequence[Recipe]
    """Of the unfinished SAEs."""
    stream: Sequence[Recipe]
    """All the recipes on this stream, finished or not: their hooks decide which rows count."""
    before: Sequence[dict[str, Any]]
    """What an earlier start of each unfinished one resolved."""
    order: int
    """Seed of the batches."""
    steps: int
    acts: Any
    host: Host | None
    progress: bool


@dataclass(frozen=True)
class _Ready:
    """Everything before the next step."""

    host: Host | None
    source: Feed
    trainees: list[Trainee]
    start: int
    position: dict[str, Any] | None
    """Where reading goes on."""

    @property
    def channels(self) -> list[Channel]:
        """Of each trainee."""
        return [self.source.channels[one.hook] for one in self.trainees]


def _train(task: _Task) -> list[SAE]:
    """Train unfinished SAEs together."""
    recipes, before, steps, progress = task.recipes, task.before, task.steps, task.progress
    first, folders = recipes[0], [Path(recipe.out) for recipe in recipes]
    again = f"Go on with: {faults.again(folders)}"
    with ended_by_signal(f"stopped before a step was made; what the host was run for is kept. {again}"):
        ready = _made_ready(task)
    tokens_a_step = first.training.batch * first.training.grad_acc_steps
    with ExitStack() as opened:
        for recipe, known, one in zip(recipes, before, ready.trainees, strict=True):
            facts = _resolved(recipe, known, one, ready, task)
            runs.begin(recipe, facts | warm.noted(recipe, known, ready.start), ready.start)
            opened.enter_context(one.log)
        batches = _served(ready, device_of(first.training), opened)
        bar = Progress(steps * tokens_a_step, ready.start * tokens_a_step, "tok", name="train", shown=progress)
        opened.callback(bar.close)
        run = Run(
            steps=steps,
            start=ready.start,
            evaluate_every=round(steps * first.evaluation.every),
            save_every=first.training.save_every,
            progress=bar,
            batches_a_step=first.training.grad_acc_steps,
            told=ready.source.told,
            keep=ready.source.keep,
        )
        stopped_by = fit(ready.trainees, batches, run)
    if stopped_by:
        saved = "stopped and saved" if checkpoint.steps(folders[0]) else "stopped before the first step"
        raise Stopped(f"{saved}. {again}", 128 + stopped_by)
    for recipe, one in zip(recipes, ready.trainees, strict=True):
        _tell_missed_target(recipe, one)
    with ended_by_signal(f"stopped after the last step, which is saved. {again}"), faults.told(folders):
        held_out: dict[str, Any] = {}
        made = [
            finish(one.folder / "sae", recipe, one.shipped(), channel, ready.host, progress, held_out)
            for recipe, channel, one in zip(recipes, ready.channels, ready.trainees, strict=True)
        ]
    return made


def _made_ready(task: _Task) -> _Ready:
    """Host, source, sample, and each SAE as it begins or as its checkpoint has it. Refuses what cannot be trained."""
    recipes, before, acts, host = task.recipes, task.before, task.acts, task.host
    first, folders = recipes[0], [Path(recipe.out) for recipe in recipes]
    device_of(first.training)  # refuses one that is not here, before a host is loaded
    if acts is None:
        for recipe, known in zip(recipes, before, strict=True):
            if known.get("source") == "given rows":
                raise UserError(
                    f"{recipe.out}: was trained on given rows. Go on in Python: train(recipe, acts, resume=True)."
                )
        host = host or open_host(first.host)
    hooks = _hooks(recipes, host)
    start = runs.common_step(folders, [bool(known) for known in before])
    widths = [host.width(hook) if host is not None and acts is None else None for hook in hooks]
    warmed = [
        warm.open_sae(recipe, hook, host, width) if recipe.training.init_from is not None and start == 0 else None
        for recipe, hook, width in zip(recipes, hooks, widths, strict=True)
    ]
    if acts is None:
        assert host is not None, "it was opened above"
        needed = _needed(
            recipes, {hook: host.width(hook) for hook in hooks}, hooks, host
        )  # before a store is made for it
        for recipe in recipes:
            runs.note_recipe(recipe)  # from here on `sae train FOLDER --resume` goes on
    read = list(dict.fromkeys(_hooks(task.stream, host)))
    rows = Path(task.stream[0].out) / "rows" if host is None else _rows_folder(task.stream[0], read, host)
    source = _open(first, read, acts, host, task.order, rows, task.progress)
    for recipe, known, hook in zip(recipes, before, hooks, strict=True):
        if known:
            _refuse_other_source(recipe, known, source, hook, host)
    channels = [source.channels[hook] for hook in hooks]
    if acts is not None:
        needed = _needed(recipes, {one.hook: one.d_in for one in channels}, hooks, None)

    held_out = _held_out_samples(first, host, source, rows) if host is not None else {}
    samples = {hook: channel.sample * channel.scale for hook, channel in source.channels.items()}
    if task.progress:
        if start:
            print(f"{folders[0]}: goes on after step {start:,} of {task.steps:,}", file=sys.stderr)
        _forecast(recipes, [samples[hook] for hook in hooks], source, task.steps - start, needed)
    trainees, position, tokens_a_step = [], None, first.training.batch * first.training.grad_acc_steps
    for recipe, known, channel in zip(recipes, before, channels, strict=True):
        low = known["encoder_dtype"] == "bfloat16" if known else is_low(recipe)
        one = trainee(
            recipe,
            channel.hook,
            samples[channel.hook],
            held_out.get(channel.hook),
            scale=channel.scale,
            low=low,
            warmed=None
            if (sae := warmed.pop(0)) is None
            else partial(warm.begin_from, sae=sae, recipe=recipe, scale=channel.scale),
        )
        if start:
            one.log.done_tokens = start * tokens_a_step
            noted = checkpoint.load(checkpoint.at(one.folder, start), one.state())
            position = noted["position"]
            one.skips = faults.Skips(noted.get("skipped", 0), noted.get("in_a_row", 0))
        trainees.append(one)
    return _Ready(host, source, trainees, start, position)


def _hooks(recipes: Sequence[Recipe], host: Host | None) -> list[str]:
    """Of each recipe, as its host names it."""
    return [recipe.host.hook if host is None else host.hook(recipe.host.hook) for recipe in recipes]


def _tell_missed_target(recipe: Recipe, one: Trainee) -> None:
    """A run may be too short, or its rate too low, for the controller to reach what was asked for."""
    if one.params.control is None:
        return
    wanted, found = target.l0_of(recipe.sae), one.log.last_tenth("metrics/l0")
    if wanted and found and abs(found / wanted - 1) > MISSED:
        logger.warning(
            "%s: L0 was %.3g over the last tenth of the run, %.3g was asked for: train longer, or choose a target that "
            "the rows allow.", recipe.out, found, wanted,
        )  # fmt: skip


def _rows_folder(recipe: Recipe, hooks: Sequence[str], host: Host) -> Path:
    """RUN/rows, emptied where it is of other rows: activations that a resumption need not run the host for again."""
    folder, whole = Path(recipe.out) / "rows", config.to_dict(recipe)
    facts = {name: whole[name] for name in ("host", "text", "activations")} | {"hooks": list(hooks)}
    facts |= {"batch": recipe.training.batch, "seed": recipe.training.seed, "host_fingerprint": host.fingerprint}
    note = folder / "recipe.json"
    if not note.exists() or files.read_json(note) != facts:
        files.remove_folder(folder)
        files.write_json(note, facts)
    return folder


def _needed(
    recipes: Sequence[Recipe], by_hook: Mapping[str, int], hooks: Sequence[str], host: Host | None
) -> plan.Memory:
    """What training takes; refused where there is no room for it. Without a host rows are given and need no buffer."""
    a_row = 0 if host is None else plan.row_bytes(recipes[0], by_hook, host)
    return plan.refuse_too_large(recipes, [by_hook[hook] for hook in hooks], a_row, 0 if host is None else None)


def _forecast(
    recipes: Sequence[Recipe],
    samples: Sequence[Tensor],
    source: Feed,
    steps: int,
    needed: plan.Memory,
) -> None:
    """Say what the run is made of and what it will take."""
    free = plan.free_of(recipes[0])
    low = "bfloat16" if is_low(recipes[0]) else "float32"
    print(f"{machine.describe()} · encoder in {low} · {source.sequences}", file=sys.stderr)
    taken = plan.seconds(recipes, samples, steps) if steps else None
    of = "the steps"
    if taken is not None and source.seconds_a_row is not None:
        of = "the steps and the host's forward"
        beside = steps * recipes[0].training.batch * recipes[0].training.grad_acc_steps * source.seconds_a_row
        taken = taken[0] + beside, taken[1] + beside
    print(plan.told(needed, free, taken, of), file=sys.stderr)


def _open(
    recipe: Recipe, hooks: Sequence[str], acts: Any, host: Host | None, order: int, rows: Path, progress: bool
) -> Feed:
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
    if recipe.activations.store or recipe.activations.cached_activations_path:  # which refuses the latter alone
        return from_store(recipe, hooks, host, order, progress)
    return live(recipe, hooks, host, order, rows)


def _served(ready: _Ready, device: torch.device, opened: ExitStack) -> Iterator[feed.Batch]:
    """Normed batches on the device, fetched ahead in a thread unless that would take the training step's own cores."""
    source, scales = ready.source, {hook: channel.scale for hook, channel in ready.source.channels.items()}
    batches = feed.checked(source.batches(ready.position))
    if device.type == "cpu":
        batches = feed.normed(batches, scales)
        return batches if source.on_cores else opened.enter_context(closing(feed.prefetched(batches)))
    if device.type == "cuda":
        batches = feed.pinned(batches)
    ahead = opened.enter_context(closing(feed.prefetched(batches, one_core=not source.on_cores)))
    return feed.normed(ahead, scales, device)


def _resolved(recipe: Recipe, known: dict[str, Any], one: Trainee, ready: _Ready, task: _Task) -> dict[str, Any]:
    """What became of "auto", and where and on what the run takes place."""
    channel = ready.source.channels[one.hook]
    variance = variance_of(channel.sample * channel.scale)
    return {
        "resolved": config.to_dict(resolved(recipe, channel.d_in, channel.hook, ready.host, variance)),
        "steps": task.steps,
        "encoder_dtype": "float32" if one.params.encoder_low is None else "bfloat16",
        "order_seed": task.order,
        "source": ready.source.kind,
        "rows": ready.source.rows,
        "host_fingerprint": None if ready.host is None else ready.host.fingerprint,
        "d_in": channel.d_in,
        "hook": channel.hook,
        "norm_factor": channel.scale,
        **_where(known),
    }


def _where(known: dict[str, Any]) -> dict[str, Any]:
    """The machine, the versions and the revision of the code; of a run that went on elsewhere, the last."""
    now = {"machine": machine.describe(), "versions": versions(), "git_revision": git_revision()}
    changed = [name for name in now if name in known and known[name] != now[name]]
    if "machine" in changed or "versions" in changed:
        logger.warning(
            "this run began on %s with torch %s: it goes on here, but may not end with the same bits.",
            known["machine"], known["versions"]["torch"],
        )  # fmt: skip
    return now


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


def _refuse_other_source(recipe: Recipe, known: dict[str, Any], source: Feed, hook: str, host: Host | None) -> None:
    """Refuse to go on with other activations; the scale stays the one that the run began with."""
    channel = source.channels[hook]
    if (source.kind, channel.d_in) != (known["source"], known["d_in"]):
        raise UserError(
            f"{recipe.out}: began on {known['source']} of width {known['d_in']:,}, now it would go on with "
            f"{source.kind} of width {channel.d_in:,}. Resume with what it began with."
        )
    for name, then, now in (
        ("rows", known.get("rows"), source.rows),
        ("host", known.get("host_fingerprint"), None if host is None else host.fingerprint),
    ):
        if then is not None and then != now:
            raise UserError(f"{recipe.out}: began with {name} {then}, now it is {now}. Resume with what it began with.")
    then = known["norm_factor"]
    if abs(channel.scale / then - 1) > SCALES_ALIKE:
        raise UserError(
            f"{recipe.out}: began on activations of norm factor {then:.6g}, those of now have {channel.scale:.6g}: the "
            "text, the host or the rows have changed. Resume with what it began with, or begin a new run."
        )
    source.channels[hook] = replace(channel, began_with=then)


def _held_out_samples(recipe: Recipe, host: Host, source: Feed, folder: Path) -> dict[str, Tensor]:
    """Normed held-out activations by hook for the progress line; none where nothing is held out or asked."""
    if not recipe.evaluation.every or not recipe.text.held_out:
        return {}
    limits = {hook: one.outlier_norm for hook, one in source.channels.items() if one.outlier_norm is not None}

    def blocks() -> Iterator[Block]:
        return stream(host, Text(recipe.text, host, "held_out").rows(), list(source.channels), outlier_norm=limits)

    found = kept(folder / "held_out.safetensors", lambda: first_rows(blocks(), QUICK))
    return {hook: acts.float() * source.channels[hook].scale for hook, acts in found.items()}
