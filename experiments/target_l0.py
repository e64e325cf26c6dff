"""How well L0 is held to its target: every architecture whose sparsity is a coefficient, three seeds, two widths.

    python experiments/target_l0.py runs/target --json runs/target.json --plot experiments/target-l0.png

Needs the store of configs/smollm2.yaml. A run that is there is not made again, so it can be stopped and resumed. For
each run: L0 over the last tenth of its steps (mean, least, most of a batch, over the target), FVU there, dead features.
"""

import argparse
from pathlib import Path
from typing import Any

from sae import Recipe, config, files, table
from sae.host import Host
from sae.run import train

FORMS = {
    "relu": {"architecture": "relu"},
    "jumprelu tanh": {"architecture": "jumprelu"},
    "jumprelu step": {"architecture": "jumprelu", "jumprelu_sparsity_loss_mode": "step"},
    "jumprelu quadratic": {"architecture": "jumprelu", "jumprelu_sparsity_loss_mode": "quadratic"},
}
WIDTHS = {1024: ("500k", 2048, 32), 4096: ("1M", 4096, 64)}  # features: tokens, batch, target


def recipe(out: Path, store: str, form: str, d_sae: int, seed: int) -> Recipe:
    tokens, batch, target = WIDTHS[d_sae]
    return config.build(
        {
            "host": {"name": "smollm2", "hook": "blocks.15.hook_resid_post"},
            "activations": {"store": store},
            "sae": {"d_sae": d_sae, "target_l0": target, **FORMS[form]},
            "training": {"tokens": tokens, "batch": batch, "seed": seed},
            "evaluation": {"tokens": 2000, "ce_tokens": 0, "every": 0},
            "log": {"every": 1},
            "out": str(out),
        },
        "target_l0",
    )


def row(form: str, d_sae: int, seed: int, folder: Path) -> dict[str, Any]:
    target = WIDTHS[d_sae][2]
    lines = files.read_lines(folder / "metrics.jsonl")
    last = [line for line in lines if line["step"] >= lines[-1]["step"] * 0.9]
    l0 = [line["metrics/l0"] / target for line in last]
    return {
        "form": form,
        "d_sae": d_sae,
        "target": target,
        "seed": seed,
        "L0/target": round(sum(l0) / len(l0), 3),
        "least": round(min(l0), 3),
        "most": round(max(l0), 3),
        "FVU": round(sum(1 - line["metrics/explained_variance"] for line in last) / len(last), 3),
        "dead": lines[-1]["sparsity/dead_features"],
        "curve": [(line["step"] / lines[-1]["step"], line["metrics/l0"] / target) for line in lines],
    }


def draw(rows: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(FORMS), figsize=(4 * len(FORMS), 3.2), sharey=True)
    for axis, form in zip(axes, FORMS, strict=True):
        axis.axhspan(0.95, 1.05, color="0.85")
        for one in (one for one in rows if one["form"] == form):
            colour = {1024: "tab:blue", 4096: "tab:orange"}[one["d_sae"]]
            label = f"{one['d_sae']:,} features, target {one['target']}" if one["seed"] == 0 else None
            axis.plot(*zip(*one["curve"], strict=True), color=colour, linewidth=0.8, label=label)
        axis.set(title=form, xlabel="share of the run", yscale="log", ylim=(0.3, 20))
        axis.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axes[0].set_ylabel("L0 of a batch / target")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--store", default="runs/smollm2/acts")
    parser.add_argument("--json")
    parser.add_argument("--plot")
    args = parser.parse_args()
    host, rows = Host.load("smollm2"), []
    for seed in range(3):
        for d_sae in WIDTHS:
            for form in FORMS:
                folder = Path(args.out) / f"{form.replace(' ', '-')}-{d_sae}-{seed}"
                train(recipe(folder, args.store, form, d_sae, seed), host=host, resume=True, progress=False)
                rows.append(row(form, d_sae, seed, folder))
                print(table.text([{name: value for name, value in rows[-1].items() if name != "curve"}]), flush=True)
    shown = [{name: value for name, value in one.items() if name != "curve"} for one in rows]
    print(table.text(shown))
    if args.json:
        files.write_json(args.json, rows)
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
