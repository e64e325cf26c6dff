"""What a checkpoint every 30 s costs training: none at all, ours (beside the loop), the same written in the loop.

    python experiments/bench/checkpointing.py --seconds 65 --rounds 3 --json runs/bench/checkpointing.json

Tokens/s of `fit` on rows in memory, contenders interleaved, medians. The last checkpoint, which every contender writes
when it ends, is outside the clock. Beside it: how long the loop stood still for one, and a bare copy of the same bytes
in memory, which is the least that it can take.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from sae import files, machine, table
from sae.activations import batches as feed
from sae.recipe import HostRecipe, Recipe, SAERecipe, TrainingRecipe
from sae.trainees import is_low, trainee
from sae.training import checkpoint, loop
from sae.training.log import Progress

NEVER = 1e9


def tokens_a_second(
    recipe: Recipe, rows: torch.Tensor, seconds: float, save_every: float, stalls: list[float]
) -> float:
    """Of so many seconds of training."""
    shutil.rmtree(recipe.out, ignore_errors=True)
    one = trainee(recipe, "h", rows[:4096].float(), None, scale=1.0, low=is_low(recipe))
    source = feed.TensorSource({"h": rows})
    batches = feed.prefetched(feed.normed(feed.checked(feed.shuffled(source, recipe.training.batch, 0)), {"h": 1.0}))
    times: list[float] = []

    def timed(items):
        for item in items:
            times.append(time.perf_counter())
            if len(times) > 3 and times[-1] - times[2] > seconds:
                raise StopIteration
            yield item

    save = loop._save

    def measured(*args):
        began = time.perf_counter()
        save(*args)
        stalls.append(time.perf_counter() - began)

    run = loop.Run(10**9, 0, 0, save_every, Progress(None, 0, "tok", name="bench", shown=False))
    loop._save = measured
    try:
        with one.log:
            loop.fit([one], timed(batches), run)
    except RuntimeError as error:  # the clock, from inside a generator
        assert "StopIteration" in str(error), error
    finally:
        loop._save = save
        batches.close()
    return (len(times) - 3) * recipe.training.batch / (times[-1] - times[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096,576,16384,32", help="batch, d_in, d_sae, k")
    parser.add_argument("--seconds", type=float, default=65.0)
    parser.add_argument("--every", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="none,ours,in the loop")
    parser.add_argument("--folder", help="on the disk to be measured; default: a temporary one")
    parser.add_argument("--json")
    args = parser.parse_args()
    B, d, F, k = (int(part) for part in args.shape.split(","))
    rows = torch.randn(16 * B, d, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        recipe = Recipe(
            host=HostRecipe(hook="h"),
            sae=SAERecipe(d_sae=F, k=k),
            training=TrainingRecipe(tokens=10**9, batch=B),
            out=str(Path(folder) / "run"),
        )
        found: dict[str, list[float]] = {name: [] for name in args.only.split(",")}
        stalls: dict[str, list[float]] = {name: [] for name in found}
        spare = checkpoint.SPARE
        for _ in range(args.rounds):
            for name in found:
                checkpoint.SPARE = 1e15 if name == "in the loop" else spare
                every = NEVER if name == "none" else args.every
                found[name].append(tokens_a_second(recipe, rows, args.seconds, every, stalls[name]))
        checkpoint.SPARE = spare
        one = trainee(recipe, "h", rows[:4096].float(), None, scale=1.0, low=is_low(recipe))
        tensors = one.state().tensors().values()
        size = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        began = time.perf_counter()
        copies = [tensor.to("cpu", copy=True) for tensor in tensors]
        limit = time.perf_counter() - began
        del copies
    none = statistics.median(found["none"])
    shown = [
        {
            "checkpoints": f"every {args.every:g} s, {name}" if name != "none" else "none",
            "tokens/s": round(statistics.median(found[name])),
            "of none": round(statistics.median(found[name]) / none, 3),
            "loop stands still (s)": round(statistics.median(stalls[name]), 3) if stalls[name] else None,
        }
        for name in found
    ]
    print(f"{machine.describe()} · {size / 1e6:,.0f} MB a checkpoint · a bare copy takes {limit:.3f} s")
    print(table.text(shown))
    if args.json:
        files.write_json(args.json, {"machine": machine.describe(), "rows": shown, "tokens/s": found, "stalls": stalls})


if __name__ == "__main__":
    main()
