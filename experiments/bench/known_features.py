"""Synthetic activations whose features are known: are they found, and as well by the fused step as by plain autograd?

    python experiments/bench/known_features.py [--tokens 2000000] [--seeds 0,1,2] [--only NAMES] [--json FILE]

G unit directions in d dimensions, their overlaps reduced by a few steps of orthogonalisation; direction i fires with
odds ~ 1/(i+1)^0.5, scaled to `active` directions a row (Zipf, as in SynthSAEBench, arXiv 2602.14687), independently;
strengths are 1 + |N|/2, and a little noise is added. Directions and data are drawn anew for every seed, the same for
all contenders.

recovered   mean over the true directions of the largest cosine with a decoder row (MMCS)
above 0.9   share of true directions with a cosine above 0.9
fvu, l0     on fresh rows, selecting as inference does

"fused" runs in the machine's dtype. Plain is the same run by autograd (training_run.py). Within noise: the means of the
two differ by less than the standard deviation over seeds (the root mean square of both forms' own).
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from held_out import measure, run_forward
from inputs import order
from report import save, show
from torch import Tensor
from training_run import recipe_of, train

from sae import files
from sae.machine import dtype_of

# Penalties such that these data are learnt: with the defaults, for wider and longer runs, JumpReLU falls silent here.
ARCHITECTURES = {
    "topk": {},
    "batchtopk": {},
    "matryoshka": {},
    "jumprelu": {"l0_coefficient": 1.0},
    "relu": {"l1_coefficient": 1.0},
}
D, G, ACTIVE = 128, 512, 12
FEATURES, BATCH, ROWS = 512, 1024, 200_000


def directions(generator: torch.Generator) -> Tensor:
    """G unit vectors [G, D]: random, then pushed apart."""
    found = torch.nn.functional.normalize(torch.randn(G, D, generator=generator), dim=1)
    for _ in range(50):
        overlap = found @ found.T
        overlap.fill_diagonal_(0)
        found = torch.nn.functional.normalize(found - 0.05 * overlap @ found, dim=1)
    return found


def rows(found: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n activations [n, D] float32."""
    odds = 1 / torch.arange(1, G + 1) ** 0.5
    odds = (ACTIVE * odds / odds.sum()).clamp(max=0.5)
    made = []
    for start in range(0, n, 8192):
        B = min(8192, n - start)
        fires = torch.rand(B, G, generator=generator) < odds
        strength = 1 + 0.5 * torch.randn(B, G, generator=generator).abs()
        made.append((fires * strength) @ found + 0.02 * torch.randn(B, D, generator=generator))
    return torch.cat(made)


def one(name: str, seed: int, tokens: int, low: bool) -> dict[str, Any]:
    """Train a contender and compare its decoder with the truth."""
    form, architecture = name.split()
    generator = torch.Generator().manual_seed(1000 + seed)
    truth = directions(generator)
    acts, fresh = rows(truth, ROWS, generator), rows(truth, 8192, generator)
    recipe = recipe_of(
        (BATCH, D, FEATURES, ACTIVE), tokens, seed, architecture=architecture, **ARCHITECTURES[architecture]
    )
    plan = order(ROWS, tokens, seed)
    run = train(recipe, acts, plan, low=low, plain=form == "plain")
    cosine = truth @ torch.nn.functional.normalize(run.params.W_dec, dim=1).T
    best = cosine.amax(dim=1)
    figures = measure(run_forward(run), FEATURES, {"train": acts, "held_out": fresh, "order": plan})
    return {"recovered": best.mean().item(), "above 0.9": (best > 0.9).float().mean().item(), **figures}


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a contender; fused is set against plain of the same architecture where both ran."""
    lines = []
    for name in dict.fromkeys(row["name"] for row in found):
        of = [row for row in found if row["name"] == name]
        recovered = [row["recovered"] for row in of]
        line = {"name": name, "seeds": len(of), "recovered": statistics.mean(recovered)}
        line["spread"] = statistics.stdev(recovered) if len(of) > 1 else None
        line |= {key: statistics.mean(row[key] for row in of) for key in ("above 0.9", "fvu", "l0", "dead")}
        plain = [row["recovered"] for row in found if row["name"] == name.replace("fused", "plain")]
        if name.startswith("fused") and min(len(plain), len(of)) > 1:
            line["fused − plain"] = statistics.mean(recovered) - statistics.mean(plain)
            noise = ((statistics.variance(recovered) + statistics.variance(plain)) / 2) ** 0.5
            line["within_noise"] = abs(line["fused − plain"]) < noise
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2_000_000, help="rounded down to whole batches")
    parser.add_argument("--seeds", default="0,1,2")
    names = [f"{form} {architecture}" for architecture in ARCHITECTURES for form in ("fused", "plain")]
    parser.add_argument("--only", default=",".join(names))
    parser.add_argument("--dtype", default="auto", help="of the fused encoder's product")
    parser.add_argument("--json", help="runs that stand there are not repeated")
    options = parser.parse_args()
    tokens = options.tokens // BATCH * BATCH
    facts = {"d": D, "true_features": G, "features": FEATURES, "active": ACTIVE, "tokens": tokens}
    found: list[dict[str, Any]] = []
    if options.json and Path(options.json).exists():
        before = files.read_json(options.json)
        if any(before[key] != value for key, value in facts.items()):
            raise SystemExit(f"{options.json}: holds runs of another size. Delete it or choose another file.")
        found = before["runs"]
    for seed in (int(seed) for seed in options.seeds.split(",")):
        for name in options.only.split(","):
            if any((row["name"], row["seed"]) == (name, seed) for row in found):
                continue
            found.append(
                {"name": name, "seed": seed, **one(name, seed, tokens, dtype_of(options.dtype) == torch.bfloat16)}
            )
            print(f"{name}, seed {seed}: recovered {found[-1]['recovered']:.4f}", file=sys.stderr)
            save(options.json, {"runs": found, **facts})
    save(options.json, show("known features", summary(found), facts=facts) | {"runs": found})


if __name__ == "__main__":
    main()
