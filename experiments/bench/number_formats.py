"""What int8 in the store costs: bytes, quantisation error, FVU of an SAE, FVU of training on it.

    python experiments/bench/number_formats.py [--tokens 150000] [--json FILE]

Activations of the bundled host (layer 15, bfloat16 as the host gives them), held out by documents. `error` is the
squared error of storing over the variance of the held-out rows; `shipped SAE` its FVU on rows as stored against rows
as they were; `trained on it` the FVU, on rows as they were, of an SAE (2,048 features, k 32) trained on stored rows,
mean of two seeds. "row scale alone" is int8 as it is often done, without our standardised columns.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from inputs import parts
from report import ROOT, save, show
from torch import Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--json")
    options = parser.parse_args()

    from sae import SAE
    from sae.activations.shards import quantised, restored

    acts = parts(None, 100_000, 8_000)
    x = acts["held_out"].float()
    variance = (x - x.mean(0)).square().sum()
    shipped = SAE.load(next((ROOT / "checkpoints").glob("smollm2-*")))

    def int8(rows: Tensor) -> Tensor:
        whole = [restored(**quantised(part, torch.ones(len(part), dtype=torch.bool))) for part in rows.split(65_536)]
        return torch.cat(whole)

    def row_scale(rows: Tensor) -> Tensor:
        scale = rows.float().abs().amax(1, keepdim=True) / 127
        return ((rows.float() / scale).round() * scale).bfloat16()

    d = x.shape[1]
    formats: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
        "bfloat16": (2 * d, lambda rows: rows),
        "int8 (ours)": (d + 4, int8),
        "int8, row scale alone": (d + 4, row_scale),
    }
    result = []
    for name, (size, store) in formats.items():
        kept = store(acts["held_out"]).float()
        with torch.no_grad():
            fvu = float((shipped(kept) - x).square().sum() / variance)
        trained = [trained_on(store(acts["train"]), x, options.tokens, seed) for seed in (0, 1)]
        result.append(
            {
                "name": name,
                "bytes_a_row": size,
                "error": float((kept - x).square().sum() / variance),
                "shipped_sae_fvu": fvu,
                "trained_on_it_fvu": sum(trained) / len(trained),
            }
        )
    save(options.json, show("number formats of the store", result))


def trained_on(rows: Tensor, held_out: Tensor, tokens: int, seed: int) -> float:
    """FVU on held-out rows of a small SAE trained on `rows`."""
    from sae import train
    from sae.recipe import EvaluationRecipe, Recipe, SAERecipe, TrainingRecipe

    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            sae=SAERecipe(d_sae=2048, k=32),
            training=TrainingRecipe(tokens=tokens, batch=2048, seed=seed),
            evaluation=EvaluationRecipe(every=0),
            out=str(Path(folder) / "run"),
        )
        sae = train(recipe, rows, progress=False)
    with torch.no_grad():
        miss = sae(held_out) - held_out
    return float(miss.square().sum() / (held_out - held_out.mean(0)).square().sum())


if __name__ == "__main__":
    main()
