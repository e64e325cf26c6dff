"""Quality: SAEs trained on the same activations in the same order, ours against plain autograd and the peers.

    python experiments/bench/quality.py [--acts FILE|STORE] [--tokens 1000000] [--shape 4096,576,4096,32]
        [--seeds 0,1,2] [--only NAMES] [--merge FILE,FILE] [--plot PNG] [--json FILE]

"ours ARCHITECTURE" is our fused step, "plain ARCHITECTURE" the same run (weights, batches, rates, AuxK) in textbook
float32 autograd (training_run.py). Peers run their own trainers and defaults in their own interpreters (.venvs/, built
by peers.sh) on one safetensors file (`train`, `order`, `held_out`); their weights come back in one form, and what their
own classes say must agree with our measure (held_out.py), else the run stops.

Each (contender, seed) is written to the JSON file as it ends and not run again while it stands there; --merge takes
rows of other files over, if they come from the same shape, tokens and rows.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from held_out import measure, run_forward, topk_forward
from inputs import order, parts
from report import ROOT, save, show
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_run import recipe_of, train

from sae import files
from sae.machine import dtype_of

Shape = tuple[int, int, int, int]
MAIN = ("ours topk", "plain topk", "sparsify", "SAELens")
VENVS = {"sparsify": "sparsify", "SAELens": "saelens"}


def ours(name: str, data: dict[str, Tensor], shape: Shape, seed: int, dtype: str, lr: float | None) -> dict[str, Any]:
    """Figures and curve of one of our runs, fused or plain."""
    form, architecture = name.split(maxsplit=1)
    recipe = recipe_of(shape, len(data["order"]), seed, lr, architecture=architecture)
    low = dtype_of(dtype) == torch.bfloat16
    run = train(recipe, data["train"], data["order"], low=low, plain=form == "plain")
    if architecture != "topk":
        return measure(run_forward(run), shape[2], data) | {"curve": run.curve}
    # as the peers are measured: weights in raw units, with none of our kernels
    params = run.params
    weights = {"encoder": params.encoder, "b_enc": params.b_enc / run.factor}
    weights |= {"W_dec": params.W_dec, "b_dec": params.b_dec / run.factor}
    return measure(topk_forward(weights, shape[3]), shape[2], data) | {"curve": run.curve}


def peer(name: str, data: dict[str, Tensor], shape: str, seed: int) -> dict[str, Any] | None:
    """Figures of a peer trained in its own interpreter; None (and a line) where that is not built."""
    family = name.split()[0]
    python = ROOT / ".venvs" / VENVS[family] / "bin" / "python"
    if not python.exists():
        print(f"{name}: {python} does not exist. Run experiments/bench/peers.sh {VENVS[family]}", file=sys.stderr)
        return None
    script = str(Path(__file__).with_name("peer_quality.py"))
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "input.safetensors", Path(folder) / "peer.safetensors"
        save_file(data, source)
        command = [str(python), script, name, "--input", str(source), "--out", str(out), "--shape", shape]
        done = subprocess.run([*command, "--seed", str(seed)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        found = load_file(out)
    figures = measure(topk_forward(found, int(shape.split(",")[3])), found["encoder"].shape[0], data)
    own = found["fvu"].item()
    if abs(own - figures["fvu"]) > 2e-3 * own:
        raise SystemExit(f"{name}: its own classes say FVU {own:.5f}, we measure {figures['fvu']:.5f}.")
    return figures | {"own_fvu": own}


def stored(paths: list[str], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of these files, each (name, seed) once; files of another run are refused, missing ones are empty."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for path in paths:
        if not Path(path).exists():
            continue
        found = files.read_json(path)
        differing = [key for key, value in facts.items() if found[key] != value]
        if differing:
            key = differing[0]
            raise SystemExit(f"{path}: {key} is {found[key]}, here it is {facts[key]}. Leave it out or delete it.")
        rows |= {(row["name"], row["seed"]): row for row in found["rows"]}
    return list(rows.values())


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a contender: medians over its seeds, and the ends of FVU."""
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        of = [row for row in rows if row["name"] == name]
        fvu = sorted(row["fvu"] for row in of)
        middle = {key: torch.tensor([row[key] for row in of]).double().median().item() for key in ("fvu", "l0", "dead")}
        lines.append({"name": name, "seeds": len(of), **middle, "lowest": fvu[0], "highest": fvu[-1]})
    return lines


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """FVU of each batch over the run, for every row with a curve; one panel an architecture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row.get("curve")]
    kinds = list(dict.fromkeys(row["name"].split(maxsplit=1)[1] for row in rows))
    wide = min(3, len(kinds))
    high = -(-len(kinds) // wide)
    figure, axes = pyplot.subplots(high, wide, figsize=(5.5 * wide, 4 * high), squeeze=False, layout="constrained")
    looks = {"ours": {"color": "C0", "lw": 1.6}, "plain": {"color": "C1", "lw": 1.0, "ls": "--"}}
    for axis in axes.flat[len(kinds) :]:
        axis.remove()
    for axis, kind in zip(axes.flat, kinds, strict=False):
        named = set()
        for row in sorted(rows, key=lambda row: row["name"]):
            form, of = row["name"].split(maxsplit=1)
            if of != kind:
                continue
            label = None if form in named else {"ours": "fused", "plain": "plain float32 autograd"}[form]
            named.add(form)
            tokens, fvu = zip(*row["curve"], strict=True)
            axis.semilogy(tokens, fvu, label=label, **looks[form])
        axis.set(xlabel="tokens", ylabel="FVU of the batch", title=kind)
        axis.legend()
        axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--acts", help="safetensors with train and held_out, or an activation store")
    parser.add_argument("--rows", type=int, default=500_000, help="training rows to harvest at most")
    parser.add_argument("--held-out", type=int, default=20_000, help="held-out rows to harvest at most")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="rounded down to whole batches")
    parser.add_argument("--shape", default="4096,576,4096,32", help="B,d,F,k")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--only", help=f"comma-separated names; default {','.join(MAIN)}")
    parser.add_argument("--merge", default="", help="comma-separated JSON files whose rows are taken over")
    parser.add_argument("--dtype", default="auto", help="of our encoder's product")
    parser.add_argument("--lr", type=float, help="ours and plain; the recipe's rule by default")
    parser.add_argument("--plot", help="PNG of the curves (needs the extra `plots`)")
    parser.add_argument("--json")
    options = parser.parse_args()
    B, d, F, k = (int(n) for n in options.shape.split(","))
    data = parts(options.acts, options.rows, options.held_out)
    data = {name: data[name] for name in ("train", "held_out")}
    facts = {
        "shape": options.shape,
        "tokens": options.tokens // B * B,
        "distinct_rows": data["train"].shape[0],
        "held_out_rows": data["held_out"].shape[0],
    }
    rows = stored([*filter(None, options.merge.split(",")), *filter(None, [options.json])], facts)
    save(options.json, {"rows": rows, **facts})
    for seed in (int(seed) for seed in options.seeds.split(",")):
        data["order"] = order(facts["distinct_rows"], facts["tokens"], seed)
        for name in options.only.split(",") if options.only else MAIN:
            if any((row["name"], row["seed"]) == (name, seed) for row in rows):
                continue
            start = time.perf_counter()
            if name.split()[0] in VENVS:
                figures = peer(name, data, options.shape, seed)
            else:
                figures = ours(name, data, (B, d, F, k), seed, options.dtype, options.lr)
            if figures is None:
                continue
            rows.append({"name": name, "seed": seed, **figures, "seconds": time.perf_counter() - start})
            print(f"{name}, seed {seed}: FVU {figures['fvu']:.4f}", file=sys.stderr)
            save(options.json, {"rows": rows, **facts})
    shown = show("held-out quality on the same activations, median over seeds", summary(rows), facts=facts)
    save(options.json, shown | {"summary": shown["rows"], "rows": rows})
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
