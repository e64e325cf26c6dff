"""What a training run will take, before it starts: steps, memory, disk, time. `sae train` prints it and refuses what
cannot fit; `sae train --dry-run` prints it with the resolved recipe and stops.

Sizes are of what we allocate: weights, Adam's moments, the bf16 copy, a step's intermediate values, the shuffle buffer;
the host's stand apart. Time is that of a few steps of a throw-away SAE on the very shapes (and of the host's forward
where it runs while training); checked against real runs in experiments/resume-report.md.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae import config, files, machine
from sae.activations.batches import buffer_rows
from sae.activations.shards import ROW_BYTES, Layout
from sae.errors import UserError
from sae.host import Host
from sae.objectives import jumprelu, target
from sae.objectives.dense import CHUNK, SPARSE_BELOW
from sae.objectives.matryoshka import widths as levels_of
from sae.objectives.revive import most
from sae.recipe import Recipe
from sae.trainees import device_of, is_low, resolved, trainee, variance_of
from sae.training.checkpoint import KEEP
from sae.training.loop import Trainee
from sae.training.optimizer import FROZEN, ROWS
from sae.training.schedule import steps_of

if TYPE_CHECKING:
    from jaxtyping import Float

SAMPLE_ROWS = 16_384 + 8_192  # of the source, and held out (sources.SAMPLE, trainer.QUICK)
ENTRY = 48  # bytes of a kept entry through a step: value, index, gradient, and their order by feature
DENSE_ENTRY = 100  # of one that JumpReLU's and ReLU's rules are asked about
DENSE_CHUNKS = {"jumprelu": 24, "relu": 8}  # of pre-activations and what the rules make of them
LIBRARIES = 80_000_000  # bytes that torch takes for threads and scratch when training begins
DENSE_SHARE = 0.25  # of a run's steps, at most, while L0 comes down
ASKED, WINDOW = 256, 2.5  # rows that tell the density; entries worked on over the active ones (measured: 2 to 3)
TRIED = 3  # steps behind a forecast, after one that is not timed


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for."""

    parts: Mapping[str, int]
    copy: int
    """Of a checkpoint; where there is no room for it, training waits while one is written."""

    @property
    def least(self) -> int:
        """Without which it cannot train."""
        return sum(self.parts.values())


def memory_of(recipes: Sequence[Recipe], widths: Sequence[int], a_row: int, given: int | None) -> Memory:
    """What training takes beside the host, several SAEs on one stream.

    widths   of each recipe's activations
    a_row    bytes of a row in the shuffle buffer, all hooks
    given    rows that are in memory already, and need no buffer; else None
    """
    first = recipes[0]
    sizes = [_sizes(recipe, d) for recipe, d in zip(recipes, widths, strict=True)]
    buffer = 0 if given is not None else _buffer(first) * a_row
    return Memory(
        {
            "weights and moments": sum(size.training for size in sizes),
            "libraries": LIBRARIES,
            "a step": max(_step(recipe, d) for recipe, d in zip(recipes, widths, strict=True)),
            "shuffle buffer": buffer,
            "samples": SAMPLE_ROWS
            * sum({one.host.hook: d for one, d in zip(recipes, widths, strict=True)}.values())
            * 8,
        },
        copy=sum(size.checkpoint for size in sizes),
    )


def row_bytes(recipe: Recipe, by_hook: Mapping[str, int], host: Host) -> int:
    """Of a row in the shuffle buffer; widths by hook."""
    if recipe.activations.store is None:
        return sum(by_hook.values()) * host.dtype.itemsize
    return Layout("", recipe.text.context, dict(by_hook), recipe.activations.dtype).bytes_read_a_row()


def refuse_too_large(recipes: Sequence[Recipe], widths: Sequence[int], a_row: int, given: int | None) -> Memory:
    """What it takes; a UserError where memory or disk have no room for it, with the largest d_sae and batch that fit.
    Arguments as of `memory_of`."""
    needed = memory_of(recipes, widths, a_row, given)
    free = _free(device_of(recipes[0].training))
    if free is not None and needed.least > free:
        raise UserError(
            f"training: needs {_size(needed.least)} ({_parts(needed)}), and {_size(free)} are free. "
            f"{_what_fits(recipes, widths, a_row, given, free)}"
        )
    for recipe, d in zip(recipes, widths, strict=True):
        size = _sizes(recipe, d)
        wanted, place = (KEEP + 1) * size.checkpoint + size.shipped, files.existing_parent(Path(recipe.out))
        if recipe.activations.store is None and given is None:  # RUN/rows
            wanted += 2 * needed.parts["shuffle buffer"] + needed.parts["samples"] // 4
        if wanted > (left := shutil.disk_usage(place).free):
            raise UserError(
                f"{recipe.out}: the run writes {_size(wanted)} ({KEEP + 1} checkpoints, the SAE and what a live run "
                f"keeps), and {place} has {_size(left)} free. Free some space or choose another `out`."
            )
    return needed


def told(needed: Memory, free: int | None, seconds: tuple[float, float] | None, of: str) -> str:
    """The line before the first step; the seconds are those of `of`."""
    parts = _parts(needed)
    there = "" if free is None else f" of {_size(free)} free"
    whole = _size(needed.least + needed.copy)
    line = f"memory beside the host: {whole}{there} ({parts}, a checkpoint's copy {_size(needed.copy)})"
    return line if seconds is None else f"{line} · time of {of}: {_time(*seconds)}"


def _parts(needed: Memory) -> str:
    return ", ".join(f"{name} {_size(size)}" for name, size in needed.parts.items() if size)


def free_of(recipe: Recipe) -> int | None:
    """Bytes free where the recipe trains."""
    return _free(device_of(recipe.training))


def seconds(recipes: Sequence[Recipe], samples: Sequence[Float[Tensor, "n d"]], steps: int) -> tuple[float, float]:
    """(least, most) seconds for so many steps, from a few timed ones of a throw-away SAE of each recipe.

    samples   normed activations for each recipe; rows are repeated to fill a batch
    Steps take alike but for JumpReLU's and ReLU's: dense at first, several times faster when L0 has come down. That is
    so after a quarter of the run at most.
    """
    times = [_step_seconds(recipe, sample) for recipe, sample in zip(recipes, samples, strict=True)]
    early, late = (sum(column) for column in zip(*times, strict=True))
    return steps * late, steps * max(late, DENSE_SHARE * early + (1 - DENSE_SHARE) * late)


def _step_seconds(recipe: Recipe, sample: Tensor) -> tuple[float, float]:
    """(first steps, later steps) of an SAE of the recipe that is trained for these and forgotten."""
    one = trainee(recipe, "trial", sample, None, scale=1.0, low=is_low(recipe))
    batch = recipe.training.batch
    rows = torch.arange(batch * recipe.training.grad_acc_steps) % len(sample)
    xs = [x.contiguous() for x in sample[rows].to(one.params.b_dec.device).split(batch)]
    early = _timed(one, xs)
    if recipe.sae.architecture not in ("jumprelu", "relu"):
        return early, early
    pre = xs[0][:ASKED] @ one.params.encoder.T + one.params.b_enc
    if one.params.log_threshold is not None:
        form = jumprelu.form_of(recipe.sae, sample.shape[1], variance_of(sample))
        pre = pre - (one.params.log_threshold.exp() - form.bandwidth / 2)
    # as if L0 had come down to its target, with the entries of the window beside
    kept = int(WINDOW * len(pre) * (target.l0_of(recipe.sae) or recipe.sae.k))
    above = pre.flatten().kthvalue(max(1, pre.numel() - kept)).values
    one.params.b_enc -= above.clamp_min(0)
    return early, _timed(one, xs)


def _timed(one: Trainee, xs: Sequence[Tensor]) -> float:
    found = []
    for _ in range(1 + TRIED):
        _synchronize(xs[0].device)
        began = time.perf_counter()
        one.learn(xs, 0.0, 0.5)
        _synchronize(xs[0].device)
        found.append(time.perf_counter() - began)
    return sorted(found[1:])[TRIED // 2]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plan(recipes: Sequence[Recipe]) -> dict[str, Any]:
    """Facts of a run, or of several on one stream, by name, for a table or JSON; sizes in MB, of all SAEs together.

    Loads the host, reads no text and writes nothing; times are of random activations. Raises UserError for a wrong hook
    and for what cannot fit.
    """
    first, training = recipes[0], recipes[0].training
    host = Host.load(first.host.name, dtype=first.host.dtype, device=first.host.device)
    hooks = [host.hook(recipe.host.hook) for recipe in recipes]
    by_hook = {hook: host.width(hook) for hook in hooks}
    widths = [by_hook[hook] for hook in hooks]
    steps = steps_of(training.tokens, training.batch * training.grad_acc_steps)
    needed = refuse_too_large(recipes, widths, row_bytes(first, by_hook, host), None)
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(4096, d, generator=generator) for d in widths]
    least, most_ = seconds(recipes, samples, steps)
    of_host = sum(weight.numel() * weight.itemsize for weight in host.model.parameters())
    whole = [resolved(recipe, d, hook, host, None) for recipe, hook, d in zip(recipes, hooks, widths, strict=True)]
    rates = list(dict.fromkeys(one.training.lr for one in whole))
    facts = {
        "host": f"{host.name} ({str(host.dtype).removeprefix('torch.')} on {host.device})",
        "hook": ", ".join(by_hook),
        "SAE": "; ".join(
            f"{recipe.sae.architecture}, {d:,} to {recipe.sae.d_sae:,}{_active(recipe)}"
            for recipe, d in zip(recipes, widths, strict=True)
        ),
        "encoder's product": ", ".join(dict.fromkeys(one.training.dtype for one in whole)),
        "steps": steps,
        "learning rate": rates[0] if len(rates) == 1 else rates,
        "time of the steps": _time(least, most_),
        "memory beside the host (MB)": round((needed.least + needed.copy) / 1e6, 1),
        **{f"  {name} (MB)": round(size / 1e6, 1) for name, size in needed.parts.items()},
        "  a checkpoint's copy (MB)": round(needed.copy / 1e6, 1),
        "memory of the host (MB)": round(of_host / 1e6, 1),
        "disk for checkpoints (MB)": round(KEEP * needed.copy / 1e6, 1),
        "disk for the SAE (MB)": round(
            sum(_sizes(r, d).shipped for r, d in zip(recipes, widths, strict=True)) / 1e6, 1
        ),
    }
    if first.activations.store is not None:
        stored = Layout("", first.text.context, by_hook, first.activations.dtype)
        facts["disk for the store (MB a million tokens)"] = round(stored.bytes_a_row() + ROW_BYTES, 1)
    else:
        facts["time beside the steps"] = "the host's forward over all tokens (sae harvest --dry-run says how long)"
    return {"facts": facts, "resolved": [config.to_dict(one) for one in whole]}


def _active(recipe: Recipe) -> str:
    """How many are active; nothing holds that where a coefficient was given."""
    if recipe.sae.architecture not in ("jumprelu", "relu"):
        return f", {recipe.sae.k} active"
    l0 = target.l0_of(recipe.sae)
    return "" if l0 is None else f", {l0:g} active"


@dataclass(frozen=True)
class _Sizes:
    """Bytes of one SAE."""

    training: int
    checkpoint: int
    shipped: int


def _sizes(recipe: Recipe, d: int) -> _Sizes:
    F, training = recipe.sae.d_sae, recipe.training
    weights = 4 * (2 * F * d + F + d + (F if recipe.sae.architecture == "jumprelu" else 0))
    copies = 2 + bool(training.adam_beta1) + bool(training.ema)  # weights, second moment; first moment, mean
    kept = copies * weights + 8 * F  # with when each feature last fired
    frozen = sum(name in ROWS for name in FROZEN[training.finetune])
    return _Sizes(kept + 4 * F * d * frozen + (2 * F * d if is_low(recipe) else 0), kept, weights)


def _step(recipe: Recipe, d: int) -> int:
    """Bytes of a step's batch and intermediate values, about."""
    F, B = recipe.sae.d_sae, recipe.training.batch * recipe.training.grad_acc_steps
    batches = 4 * B * d * 4  # two fetched ahead, one in work, and what the encoder reads of it
    if recipe.sae.architecture in ("jumprelu", "relu"):
        dense = 2 * F * d * 4 + DENSE_CHUNKS[recipe.sae.architecture] * min(CHUNK, B * F) * 4
        return batches + B * d * 4 + max(dense, round(SPARSE_BELOW * B * F) * DENSE_ENTRY)
    levels = len(levels_of(recipe.sae)) if recipe.sae.architecture == "matryoshka" else 1
    auxiliary = 4 * min(F, most(d)) * d * 4 if recipe.training.aux_coefficient else 0
    return batches + levels * B * d * 4 + B * recipe.sae.k * ENTRY + auxiliary


def _buffer(recipe: Recipe) -> int:
    return buffer_rows(recipe.activations.min_sequences, recipe.training.batch, recipe.text.context)


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return machine.free_memory()


def _what_fits(recipes: Sequence[Recipe], widths: Sequence[int], a_row: int, given: int | None, free: int) -> str:
    """Advice: the largest d_sae at this batch, and the largest batch at this d_sae, in steps of 256 and of 64."""

    def fits(change: Callable[[Recipe], Recipe]) -> bool:
        try:
            return memory_of([change(recipe) for recipe in recipes], widths, a_row, given).least <= free
        except UserError:  # a batch too small for the sequences asked for
            return False

    def wider(d_sae: int) -> Callable[[Recipe], Recipe]:
        return lambda r: replace(r, sae=replace(r.sae, d_sae=d_sae, matryoshka_widths=None))

    def longer(batch: int) -> Callable[[Recipe], Recipe]:
        return lambda r: replace(r, training=replace(r.training, batch=batch))

    width = _largest(lambda n: fits(wider(256 * n)), max(recipe.sae.d_sae for recipe in recipes) // 256) * 256
    batch = _largest(lambda n: fits(longer(64 * n)), recipes[0].training.batch // 64) * 64
    parts = [f"sae.d_sae up to {width:,} with this batch"] if width else []
    parts += [f"training.batch up to {batch:,} with this d_sae"] if batch else []
    if not parts:
        smallest = memory_of([longer(64)(wider(256)(one)) for one in recipes], widths, a_row, given).least
        if smallest > free:
            return f"Free some memory: the smallest SAE takes {_size(smallest)}."
        return "No d_sae and no batch alone would fit: lower both, or free some memory."
    return f"What fits: {' or '.join(parts)}."


def _largest(fits: Callable[[int], bool], below: int) -> int:
    """The largest n from 1 to below that fits; 0 for none."""
    low, high = 0, below + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _size(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.{0 if size >= 1e7 else 1}f} MB"


def _time(least: float, most_: float) -> str:
    def one(value: float) -> str:
        return (
            f"{value:,.0f} s" if value < 120 else f"{value / 60:,.0f} min" if value < 7200 else f"{value / 3600:,.1f} h"
        )

    return f"about {one(least)}" if most_ < 1.2 * least else f"{one(least)} to {one(most_)} (dense steps at first)"
