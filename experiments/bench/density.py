"""How sparse JumpReLU's steps are over a real run: entries worked on, window share, where dense gives way to sparse.

    python experiments/bench/density.py [--mode tanh] [--tokens 2000000] [--shape 4096,576,16384,32] [--json FILE]

Anthropic's form (tanh, the default) opens a window of ε = 2 around the threshold, in which most pre-activations lie at
the start, so its first steps are dense. On the bundled host's activations, as `sae train` would run it.

density   share of [B, d_sae] entries above the window's lower end: what the sparse path works on
window    share of entries inside the window, where the threshold learns
l0        active features a token
dense     whether the step went by dense products (objectives/dense.py, at a density above SPARSE_BELOW)
"""

import argparse
import sys
import time
from typing import Any

import torch
from inputs import order, parts
from report import save, show
from training_run import recipe_of, train

from sae.machine import dtype_of
from sae.objectives.dense import SPARSE_BELOW


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every step."""
    shape = tuple(int(n) for n in options.shape.split(","))
    B = shape[0]
    rows_of = parts(None, 500_000, 20_000)["train"]
    tokens = options.tokens // B * B
    recipe = recipe_of(shape, tokens, 0, architecture="jumprelu", jumprelu_sparsity_loss_mode=options.mode)
    rows: list[dict[str, Any]] = []
    before = time.perf_counter()

    def watch(step, params, work, losses) -> None:
        nonlocal before
        now = time.perf_counter()
        rows.append(
            {
                "tokens": (step + 1) * B,
                "density": losses.more["metrics/density"].item(),
                "window": losses.more["sparsity/window_share"].item(),
                "l0": losses.more["metrics/l0"].item(),
                "fvu": losses.fvu.item(),
                "threshold_mean": params.log_threshold.exp().mean().item(),
                "dense": work.extra is not None,
                "tokens_per_s": B / (now - before),
            }
        )
        before = now
        if step % 25 == 0:
            print(f"{rows[-1]['tokens']:,} tokens: density {rows[-1]['density']:.4f}", file=sys.stderr)

    low = dtype_of(options.dtype) == torch.bfloat16
    train(recipe, rows_of, order(len(rows_of), tokens, 0), low=low, watch=watch)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mode", default="tanh", choices=("tanh", "step", "quadratic"))
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--shape", default="4096,576,16384,32", help="B,d,F,k")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json")
    options = parser.parse_args()
    rows = run(options)
    sparse = next((row["tokens"] for row in rows if not row["dense"]), None)
    facts = {
        "mode": options.mode,
        "shape": options.shape,
        "dense_above": SPARSE_BELOW,
        "first_sparse_step_at_tokens": sparse,
        "share_of_steps_dense": sum(row["dense"] for row in rows) / len(rows),
    }
    some = [rows[round(i * (len(rows) - 1) / 10)] for i in range(11)] if len(rows) > 11 else rows
    result = show(f"JumpReLU, {options.mode}: density over the run", some, facts=facts)
    save(options.json, result | {"every_step": rows})


if __name__ == "__main__":
    main()
