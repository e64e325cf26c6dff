"""Which SAE ships? Layers × objectives × widths × seeds on one reading of the host, and what each one's dials do.

    sae harvest configs/smollm2.yaml activations.store=runs/sweep/acts --hooks blocks.8.hook_resid_post,…
    OMP_NUM_THREADS=1 python -m experiments.sweep --layers 8,12 --json runs/sweep/a.json &
    OMP_NUM_THREADS=1 python -m experiments.sweep --layers 15,20 --json runs/sweep/b.json    # a core each
    python -m experiments.sweep --merge runs/sweep/a.json,runs/sweep/b.json --json experiments/sweep.json --plot PNG

Every SAE trains on one stream with the others of its width and seed (`train_many`), for TOKENS tokens: short, so the
table orders settings and says little about what a long run reaches. All have K active features a token; at the layers
of SPARSITY_AT the plain cell (TopK, 4,096) is trained with OTHER_K as well. For each: FVU, L0, cross-entropy recovered
and dead features on held-out prompts; how many of the forty concepts have a feature with a held-out AUROC of 0.9
(forty.py) and the median output score of these features; and for five of them, with the best of sixteen features at the
best of three strengths, the share of answers *about* the concept with fluency of at least 1 (dial.py), beside the
difference of means at the same layer and random features. The dials are tried for the first seed. Rows are written as
they end and not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import dial, forty
from sae import SAE, Host, files, finish, table
from sae.activations.harvest import Block
from sae.activations.store import Store
from sae.evaluation.core import headline
from sae.features.pool import DocumentMaxima, document_maxima
from sae.recipe import ActivationsRecipe, EvaluationRecipe, HostRecipe, Recipe, SAERecipe, TextRecipe, TrainingRecipe
from sae.trainer import train_many

LAYERS, ARCHITECTURES, WIDTHS, SEEDS = (8, 12, 15, 20), ("topk", "batchtopk", "matryoshka"), (4096, 8192, 16384), (0, 1)
TOKENS, BATCH, K = 300_000, 2048, 16
SPARSITY_AT, OTHER_K = (12, 15), (8, 32)
EFFORT = dial.Effort(
    by_contrast=8, by_direction=4, by_promotion=4, shares=(0.31, 0.38, 0.45), tried_on=5, tried_tokens=40,
    reported_on=(20, 30), samples=1, tokens=64, random_features=1,
)  # fmt: skip
Cell = tuple[int, str, int, int, int]  # layer, architecture, d_sae, k, seed
finish.MEASURED = 100_000  # rows for the statistics of an SAE that is only compared


def recipe(folder: Path, cell: Cell) -> Recipe:
    """What trains a cell."""
    layer, architecture, width, k, seed = cell
    return Recipe(
        host=HostRecipe(hook=f"blocks.{layer}.hook_resid_post"),
        text=TextRecipe(),
        activations=ActivationsRecipe(store=str(folder / "acts")),
        sae=SAERecipe(architecture=architecture, d_sae=width, k=k),
        training=TrainingRecipe(tokens=TOKENS, batch=BATCH, seed=seed, save_every=120),
        evaluation=EvaluationRecipe(tokens=0, every=0),
        out=str(folder / "-".join(map(str, cell))),
    )


class Bench:
    """What is read once: the passages at every hook, differences of means, what is fluent."""

    def __init__(self, host: Host, folder: Path, hooks: Sequence[str]):
        self.host, self.which = host, forty.passages()
        store = Store.open(folder / "acts")
        outliers = {hook: store.source(hook).outlier_norm for hook in hooks}
        self.blocks: list[Block] = list(forty.blocks(self.which, host, hooks, outliers))
        self.read = {hook: forty.summed(self.blocks, hook, len(self.which.documents)) for hook in hooks}
        self.limit = dial.limit_of(host)
        self.dialled = [one for one in forty.concepts() if one.name in dial.DIALS]

    def of(self, sae: SAE, hook: str) -> dial.Bench:
        return dial.Bench(self.host, sae, hook, self.read[hook].norm, self.limit)

    def maxima(self, sae: SAE, hook: str) -> DocumentMaxima:
        return document_maxima(sae, self.blocks, len(self.which.documents), hook=hook)


def measured(bench: Bench, sae: SAE, hook: str, *, dials: bool) -> dict[str, Any]:
    """The figures of one SAE."""
    assert sae.stats is not None, "training writes statistics"
    figures = headline(finish.evaluate_on(sae, bench.host, TextRecipe(), 6_000, 1_500, False))
    found = {key: figures[key]["value"] for key in ("fvu", "l0", "recovered_mean", "kl")}
    found["dead"] = float((sae.stats.density == 0).float().mean())
    maxima = bench.maxima(sae, hook)
    rows = forty.measured(bench.which, maxima, sae, bench.host, hook, intervals=False)
    found["concepts"] = sum(row.auroc >= forty.ENOUGH for row in rows)
    found["auroc"] = statistics.mean(row.auroc for row in rows)
    found["output score"] = statistics.median(row.output_score for row in rows)
    if dials:
        found["dials"] = dialled(bench, bench.of(sae, hook), maxima, hook)
    return found


def dialled(bench: Bench, one: dial.Bench, maxima: DocumentMaxima, hook: str) -> list[dict[str, Any]]:
    """Five concepts' dials: the best of a few features and strengths on five questions, reported on ten others."""
    tried: dict[str, list[int | Tensor]] = {
        concept.name: list(dial.candidates(one, dial.Bearings(bench.which, maxima, bench.read[hook]), concept, EFFORT))
        for concept in bench.dialled
    }
    best = picked(bench, one, tried)
    generator = torch.Generator().manual_seed(0)
    assert one.sae.stats is not None, "training writes statistics"
    living = ((one.sae.stats.density > 0) & (one.sae.stats.density < forty.DENSEST)).nonzero().flatten()
    rows = []
    for concept in bench.dialled:
        setting = best[concept.name]
        drawn = living[torch.randint(len(living), (EFFORT.random_features,), generator=generator)].tolist()
        settings = [setting, *(dial.Setting(feature, setting.amount) for feature in drawn)]
        answers, *others = dial.reported(one, concept, settings, EFFORT, 1)
        rows.append(line(one, concept.name, setting, answers) | {"random": statistics.mean(x.rate for x in others)})
    return rows


def picked(bench: Bench, one: dial.Bench, tried: dict[str, list[int | Tensor]]) -> dict[str, dial.Setting]:
    """Each concept's best setting: the best feature or direction at one share of the norm, then its best share."""
    first = {name: [dial.Setting(w, EFFORT.first_share * one.norm) for w in some] for name, some in tried.items()}
    best = trial(bench, one, first, EFFORT.first_on)
    shares = {
        name: [dial.Setting(setting.which, share * one.norm) for share in EFFORT.shares]
        for name, setting in best.items()
    }
    return trial(bench, one, shares, EFFORT.tried_on)


def trial(
    bench: Bench, one: dial.Bench, settings: dict[str, list[dial.Setting]], n_questions: int
) -> dict[str, dial.Setting]:
    """Each concept's best setting on the first choosing questions; the trials of all concepts are one batch."""
    questions = dial.QUESTIONS["choosing"][:n_questions]
    texts = iter(dial.ask(one, [x for some in settings.values() for x in some], questions, tokens=EFFORT.tried_tokens))
    best = {}
    for concept in bench.dialled:
        own = [next(texts) for _ in settings[concept.name]]
        scores = dial.scored(one, concept, questions, own, all_fluent=False)
        best[concept.name] = settings[concept.name][max(range(len(own)), key=lambda i: scores[i].order)]
    return best


def line(one: dial.Bench, name: str, setting: dial.Setting, answers: dial.Answers) -> dict[str, Any]:
    return {
        "concept": name,
        "feature": setting.which if isinstance(setting.which, int) else None,
        "share": setting.amount / one.norm,
        "about": answers.rate,
        "fluency": statistics.mean(answers.fluency),
        "speaks as": statistics.mean(answers.speaks_as),
        "answers": answers.texts[:3],
    }


def by_means(bench: Bench, sae: SAE, hook: str) -> list[dict[str, Any]]:
    """The difference of means at a hook, chosen and reported as a feature is (the SAE only says where outliers are)."""
    one = bench.of(sae, hook)
    directions = {c.name: [forty.difference(bench.which, bench.read[hook], c)] for c in bench.dialled}
    best = picked(bench, one, directions)  # pyright: ignore[reportArgumentType]
    return [line(one, c.name, best[c.name], dial.reported(one, c, [best[c.name]], EFFORT, 1)[0]) for c in bench.dialled]


def shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The printed table: one line a cell."""
    lines = []
    for row in rows:
        dials = row.get("dials", [])
        made = {key: row.get(key) for key in ("layer", "architecture", "d_sae", "k", "seed", "fvu", "l0",
                                              "recovered_mean", "dead", "concepts", "output score")}  # fmt: skip
        made |= {one["concept"]: one["about"] for one in dials}
        if dials:
            made["mean"] = statistics.mean(one["about"] for one in dials)
            made["fluency"] = statistics.mean(one["fluency"] for one in dials)
            made["random"] = statistics.mean(one.get("random", math.nan) for one in dials)
        lines.append(made)
    return lines


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells with K active features by layer, architecture and width: means, and of the dials with their error."""
    cells = [cell for row, cell in zip(rows, shown(rows), strict=True) if row.get("k") == K]
    lines = []
    for key, values in (("layer", LAYERS), ("architecture", ARCHITECTURES), ("d_sae", WIDTHS)):
        for value in values:
            own = [cell for cell in cells if cell[key] == value]
            if not own:
                continue
            line: dict[str, Any] = {"": f"{key} {value:,}" if isinstance(value, int) else value, "cells": len(own)}
            for figure in ("fvu", "recovered_mean", "dead", "concepts", "output score"):
                line[figure] = statistics.mean(cell[figure] for cell in own)
            written = [cell["mean"] for cell in own if "mean" in cell]
            line["dials tried"] = len(written)
            for name in ("the Golden Gate Bridge", "mean", "fluency", "random"):
                line[name] = statistics.mean(cell[name] for cell in own if name in cell) if written else None
            line["± of mean"] = statistics.stdev(written) / len(written) ** 0.5 if len(written) > 1 else None
            lines.append(line)
    return lines


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """FVU against concepts found and against what the dials write; the front of each is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    cells = [row for row in rows if row.get("k") == K]
    panels = [
        ("recovered_mean", "cross-entropy recovered"),
        ("concepts", "concepts found (of 40)"),
        ("mean", "answers about five concepts"),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 4.6))
    markers = dict(zip(ARCHITECTURES, "o^s", strict=True))
    colors = dict(zip(LAYERS, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True))
    for axis, (key, name) in zip(axes, panels, strict=True):
        points = [
            (row["fvu"], cell[key], row)
            for row, cell in zip(cells, shown(cells), strict=True)
            if cell.get(key) is not None
        ]
        for x, y, row in points:
            axis.scatter(x, y, marker=markers[row["architecture"]], color=colors[row["layer"]],
                         s=20 * math.log2(row["d_sae"] / 1024), alpha=0.7)  # fmt: skip
        front, best = [], -math.inf
        for x, y, _ in sorted(points, key=lambda point: point[:2]):
            if y > best:
                front.append((x, y))
                best = y
        axis.plot(*zip(*front, strict=True), color="grey", linewidth=1, zorder=0)
        axis.set(xlabel="held-out FVU", ylabel=name)
    handles = [Line2D([], [], marker=m, linestyle="", color="grey", label=a) for a, m in markers.items()]
    handles += [Line2D([], [], marker="o", linestyle="", color=c, label=f"layer {n}") for n, c in colors.items()]
    axes[0].legend(handles=handles, fontsize=8)
    figure.suptitle(f"{len(cells)} SAEs, {TOKENS:,} training tokens each; larger marks are wider; grey: Pareto front")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--layers", default=",".join(map(str, LAYERS)))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--merge", help="JSON files whose rows are put together, with commas; nothing is trained")
    parser.add_argument("--plot", metavar="PNG", help="with --merge: draw them")
    args = parser.parse_args()
    if args.merge:
        rows = [row for path in dict.fromkeys(args.merge.split(",")) for row in files.read_json(path)]
        rows.sort(key=lambda row: (row.get("seed", -1), row["layer"], row.get("d_sae", 0), row.get("k", 0)))
        files.write_json(args.json, rows)
        if args.plot:
            plot(rows, args.plot)
    else:
        rows = swept(args.folder, [int(layer) for layer in args.layers.split(",")], args.json)
    print(table.text(shown(rows)))
    if args.merge:
        print(f"\nMeans of the cells with {K} active features\n\n{table.text(means(rows))}")


def swept(folder: Path, layers: Sequence[int], path: Path) -> list[dict[str, Any]]:
    """The rows of all cells at these layers; those that stand in the file are kept."""
    rows: list[dict[str, Any]] = files.read_json(path) if path.exists() else []
    host, bench = Host.load("smollm2"), None
    for cells in batches(layers):
        known = {tuple(row.get(key) for key in ("layer", "architecture", "d_sae", "k", "seed")) for row in rows}
        if all(cell in known for cell in cells):
            continue
        recipes = [recipe(folder, cell) for cell in cells]
        saes = train_many(recipes, host=host, resume=any(Path(one.out, "resolved.json").exists() for one in recipes))
        bench = bench or Bench(host, folder, [f"blocks.{layer}.hook_resid_post" for layer in layers])
        for cell, one, sae in zip(cells, recipes, saes, strict=True):
            layer, architecture, width, k, seed = cell
            if cell in known:
                continue
            if not any(row["layer"] == layer and row["architecture"] == "difference of means" for row in rows):
                means = by_means(bench, sae, one.host.hook)
                rows.append({"layer": layer, "architecture": "difference of means", "dials": means})
            found = measured(bench, sae, one.host.hook, dials=seed == SEEDS[0])
            rows.append({"layer": layer, "architecture": architecture, "d_sae": width, "k": k, "seed": seed, **found})
            files.write_json(path, rows)
            print(table.text(shown(rows[-1:])), flush=True)
        for one in recipes:
            shutil.rmtree(one.out)
    return rows


def batches(layers: Sequence[int]) -> list[list[Cell]]:
    """The cells, those that train together in one list: all of a width and a seed, and the other k."""
    found = [
        [(layer, architecture, width, K, seed) for layer in layers for architecture in ARCHITECTURES]
        for seed, width in itertools.product(SEEDS, WIDTHS)
    ]
    others = [
        (layer, ARCHITECTURES[0], WIDTHS[0], k, SEEDS[0]) for layer in layers if layer in SPARSITY_AT for k in OTHER_K
    ]
    return [found[0], *([others] if others else []), *found[1:]]


if __name__ == "__main__":
    main()
