"""What a training run will take, before it starts: steps, memory, disk. `sae train --dry-run`.

Loads the host (for the hook's width and to check the hook), reads no text and writes nothing. Sizes are of
what we allocate: weights, Adam's moments, the bf16 copy, the shuffle buffer; the host's stand apart. No time
is promised: tokens per second are the machine's affair and stand on the progress bar.
"""

from typing import Any

from sae import machine
from sae.activations.batches import buffer_rows
from sae.host import Host
from sae.recipe import Recipe
from sae.training.checkpoint import KEEP
from sae.training.schedule import peak_lr, steps_of


def plan(recipe: Recipe) -> dict[str, Any]:
    """Facts of a run by name, for a table or JSON; sizes in MB. Raises UserError for a wrong hook."""
    host = Host.load(recipe.host.name, dtype=recipe.host.dtype, device=recipe.host.device)
    hook = host.hook(recipe.host.hook)
    d, F = host.width(hook), recipe.sae.d_sae
    steps = steps_of(recipe.training.tokens, recipe.training.batch)
    weights = 2 * F * d + F + d
    low = machine.dtype_of(recipe.training.dtype).itemsize == 2
    training = 3 * 4 * weights + (2 * F * d if low else 0)
    kept = 3 * 4 * weights + 8 * F  # a checkpoint: weights, both moments, when each feature last fired
    of_host = sum(weight.numel() * weight.itemsize for weight in host.model.parameters())
    facts = {
        "host": f"{host.name} ({str(host.dtype).removeprefix('torch.')} on {host.device})",
        "hook": hook,
        "SAE": f"{recipe.sae.architecture}, {d:,} to {F:,}, {recipe.sae.k} active",
        "encoder's product": "bfloat16" if low else "float32",
        "steps": steps,
        "learning rate": peak_lr(recipe.training.lr, F, steps),
        "memory for training (MB)": round(training / 1e6, 1),
        "memory of the host (MB)": round(of_host / 1e6, 1),
        "disk for checkpoints (MB)": round(KEEP * kept / 1e6, 1),
        "disk for the SAE (MB)": round(4 * weights / 1e6, 1),
    }
    if recipe.activations.store:
        facts["disk for the store (MB a million tokens)"] = round(1e6 * (d * host.dtype.itemsize + 13) / 1e6, 1)
    else:
        rows = buffer_rows(recipe.activations.min_sequences, recipe.training.batch, recipe.text.context)
        facts["memory for the shuffle buffer (MB)"] = round(rows * d * host.dtype.itemsize / 1e6, 1)
    return facts
