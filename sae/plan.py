"""What a training run will take, before it starts: steps, memory, disk. `sae train --dry-run`.

Loads the host (for the hook's width and to check the hook), reads no text and writes nothing. Sizes are of
what we allocate: weights, Adam's moments, the bf16 copy, the shuffle buffer; the host's stand apart. No time
is promised: tokens per second are the machine's affair and stand on the progress bar.
"""

from collections.abc import Sequence
from typing import Any

from sae import machine
from sae.activations.batches import buffer_rows
from sae.activations.shards import ROW_BYTES, Layout
from sae.host import Host
from sae.recipe import Recipe
from sae.training.checkpoint import KEEP
from sae.training.optimizer import FROZEN, ROWS
from sae.training.schedule import peak_lr, steps_of


def plan(recipes: Sequence[Recipe]) -> dict[str, Any]:
    """Facts of a run, or of several on one stream, by name, for a table or JSON; sizes in MB, of all SAEs together.

    Raises UserError for a wrong hook.
    """
    first, training = recipes[0], recipes[0].training
    host = Host.load(first.host.name, dtype=first.host.dtype, device=first.host.device)
    hooks = [host.hook(recipe.host.hook) for recipe in recipes]
    widths = {hook: host.width(hook) for hook in hooks}
    steps = steps_of(training.tokens, training.batch * training.grad_acc_steps)
    rates = [peak_lr(recipe.training.lr, recipe.sae.d_sae, steps) for recipe in recipes]
    sizes = [_sizes(recipe, widths[hook]) for recipe, hook in zip(recipes, hooks, strict=True)]
    memory, checkpoints, shipped = (sum(column) for column in zip(*sizes, strict=True))
    of_host = sum(weight.numel() * weight.itemsize for weight in host.model.parameters())
    facts = {
        "host": f"{host.name} ({str(host.dtype).removeprefix('torch.')} on {host.device})",
        "hook": ", ".join(widths),
        "SAE": "; ".join(
            f"{recipe.sae.architecture}, {widths[hook]:,} to {recipe.sae.d_sae:,}{_active(recipe)}"
            for recipe, hook in zip(recipes, hooks, strict=True)
        ),
        "encoder's product": ", ".join({"bfloat16" if _low(recipe) else "float32": None for recipe in recipes}),
        "steps": steps,
        "learning rate": rates[0] if len(set(rates)) == 1 else rates,
        "memory for training (MB)": round(memory / 1e6, 1),
        "memory of the host (MB)": round(of_host / 1e6, 1),
        "disk for checkpoints (MB)": round(KEEP * checkpoints / 1e6, 1),
        "disk for the SAE (MB)": round(shipped / 1e6, 1),
    }
    stored = Layout("", first.text.context, widths, first.activations.dtype)
    rows = buffer_rows(first.activations.min_sequences, training.batch, first.text.context)
    a_row = stored.bytes_read_a_row()
    if first.activations.store:
        facts["disk for the store (MB a million tokens)"] = round(stored.bytes_a_row() + ROW_BYTES, 1)
    else:
        a_row = sum(widths.values()) * host.dtype.itemsize
    facts["memory for the shuffle buffer, at most (MB)"] = round(rows * a_row / 1e6, 1)
    return facts


def _active(recipe: Recipe) -> str:
    """k where it says how many are active; JumpReLU's penalty and ReLU's have no such number."""
    return "" if recipe.sae.architecture in ("jumprelu", "relu") else f", {recipe.sae.k} active"


def _low(recipe: Recipe) -> bool:
    return machine.dtype_of(recipe.training.dtype).itemsize == 2


def _sizes(recipe: Recipe, d: int) -> tuple[int, int, int]:
    """Bytes of one SAE: in memory while training, in a checkpoint, as it ships."""
    F, training = recipe.sae.d_sae, recipe.training
    weights = 4 * (2 * F * d + F + d + (F if recipe.sae.architecture == "jumprelu" else 0))
    copies = 2 + bool(training.adam_beta1) + bool(training.ema)  # weights, second moment; first moment, mean
    kept = copies * weights + 8 * F  # with when each feature last fired
    frozen = sum(name in ROWS for name in FROZEN[training.finetune])
    return kept + 4 * F * d * frozen + (2 * F * d if _low(recipe) else 0), kept, weights
