"""Quality: TopK SAEs on the same activations in the same order, each by its own trainer and defaults.

    python experiments/bench/quality.py [--acts FILE|STORE] [--tokens 500000] [--shape 4096,576,4096,32]
        [--seeds 1] [--also "SAELens normed,sparsify adam"] [--json FILE]

Everybody reads one safetensors file (`train`, `order`, `held_out`); peers run in their own interpreters
(.venvs/, built by peers.sh). The finished weights come back in one form and one function measures all of
them on held-out documents: FVU pooled about the mean of the whole set, L0, and features that fire on neither
the held-out rows nor a sample of the training rows. What the peers' own classes say must agree with it, else
the run stops.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from inputs import order, parts
from report import ROOT, save, show
from safetensors.torch import load_file, save_file
from torch import Tensor

Shape = tuple[int, int, int, int]
MAIN = ("ours topk", "SAELens", "sparsify")
VENVS = {"sparsify": "sparsify", "SAELens": "saelens"}


def ours(data: dict[str, Tensor], shape: Shape, seed: int, dtype: str, lr: float | None) -> dict[str, Tensor]:
    """What sae/run.py `train` does, with the recipe's defaults, on the shared order instead of our own."""
    from functools import partial

    from sae.machine import dtype_of
    from sae.objectives import topk
    from sae.objectives.terms import initial
    from sae.recipe import TrainingRecipe
    from sae.training.dead import Dead, dead_window
    from sae.training.optimizer import RowAdam
    from sae.training.schedule import lr_at, peak_lr

    B, d, F, k = shape
    defaults = TrainingRecipe()
    sample = data["train"][data["order"][:16_384].unique()].float()
    factor = (d**0.5 / sample.norm(dim=1).mean()).item()
    variance = (sample * factor - (sample * factor).mean(0)).square().sum(1).mean().item()
    params = initial(sample * factor, d_sae=F, seed=seed, low=dtype_of(dtype) == torch.bfloat16)
    optimizer = RowAdam(params)
    tokens = data["order"].shape[0]
    dead = Dead(F, dead_window(tokens, defaults.dead_after))
    objective = partial(topk.loss, k=k, variance=variance, aux_coefficient=defaults.aux_coefficient)
    steps = tokens // B
    peak = peak_lr(lr, F, steps)
    for step, batch in enumerate(data["order"].split(B)):
        work, _ = objective(params, data["train"][batch].float() * factor, dead.mask())
        optimizer.update_(work, lr_at(step, steps, peak))
        dead.count_(work.codes)
    return {
        "encoder": params.encoder,
        "b_enc": params.b_enc / factor,
        "W_dec": params.W_dec,
        "b_dec": params.b_dec / factor,
    }


def measure(sae: dict[str, Tensor], data: dict[str, Tensor], k: int) -> dict[str, float]:
    """FVU and L0 on held-out rows; dead on these and a sample of up to 100k training rows. float32."""
    held = data["held_out"]
    fires = torch.zeros(sae["encoder"].shape[0], dtype=torch.bool)
    error, total = torch.zeros((), dtype=torch.float64), 0
    for x in held.split(2048):
        x = x.float()
        values, indices = _codes(sae, x, k)
        # Plain gather and sum of the decoder's rows: nothing of any contender's kernels
        out = torch.einsum("bk,bkd->bd", values, sae["W_dec"][indices]) + sae["b_dec"]
        error += (x - out).double().square().sum()
        total += int((values > 0).sum())
        fires[indices[values > 0]] = True
    for x in data["train"][data["order"][-100_000:].unique()].split(2048):
        values, indices = _codes(sae, x.float(), k)
        fires[indices[values > 0]] = True
    x64 = held.double()
    return {
        "fvu": (error / (x64 - x64.mean(0)).square().sum()).item(),
        "l0": total / held.shape[0],
        "dead": 1 - fires.float().mean().item(),
    }


def _codes(sae: dict[str, Tensor], x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    pre = (x - sae["b_dec"]) @ sae["encoder"].T + sae["b_enc"]
    values, indices = pre.topk(k, dim=1)
    return values.relu(), indices


def peer(name: str, source: Path, shape: str, seed: int, out: Path) -> dict[str, Tensor] | None:
    """Weights of a peer trained in its own interpreter; None (and a line) where that is not built."""
    family = name.split()[0]
    python = ROOT / ".venvs" / VENVS[family] / "bin" / "python"
    if not python.exists():
        print(
            f"{name}: {python} does not exist. Run experiments/bench/peers.sh {VENVS[family]}",
            file=sys.stderr,
        )
        return None
    script = str(Path(__file__).with_name("peer_quality.py"))
    command = [str(python), script, name, "--input", str(source), "--out", str(out), "--shape", shape]
    done = subprocess.run([*command, "--seed", str(seed)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return load_file(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--acts", help="safetensors with train and held_out, or an activation store")
    parser.add_argument("--rows", type=int, default=500_000, help="training rows to harvest at most")
    parser.add_argument("--held-out", type=int, default=20_000, help="held-out rows to harvest at most")
    parser.add_argument("--tokens", type=int, default=500_000, help="rounded down to whole batches")
    parser.add_argument("--shape", default="4096,576,4096,32", help="B,d,F,k")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", help="comma-separated names")
    parser.add_argument("--also", default="", help='"SAELens normed", "sparsify adam"')
    parser.add_argument("--dtype", default="auto", help="of our encoder's product")
    parser.add_argument("--lr", type=float, help="ours; the recipe's rule by default")
    parser.add_argument("--json")
    options = parser.parse_args()
    B, d, F, k = (int(n) for n in options.shape.split(","))
    names = options.only.split(",") if options.only else [*MAIN, *filter(None, options.also.split(","))]
    data = parts(options.acts, options.rows, options.held_out)
    data = {name: data[name] for name in ("train", "held_out")}
    tokens = options.tokens // B * B
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            data["order"] = order(data["train"].shape[0], tokens, seed)
            source = Path(folder) / "input.safetensors"
            save_file(data, source)
            for name in names:
                start = time.perf_counter()
                if name == "ours topk":
                    found = ours(data, (B, d, F, k), seed, options.dtype, options.lr)
                else:
                    found = peer(name, source, options.shape, seed, Path(folder) / "peer.safetensors")
                if found is None:
                    continue
                seconds = time.perf_counter() - start
                measured = measure(found, data, k)
                own = found["fvu"].item() if "fvu" in found else None
                if own is not None and abs(own - measured["fvu"]) > 2e-3 * own:
                    raise SystemExit(f"{name}: its own classes say FVU {own:.5f}, we measure {measured['fvu']:.5f}.")
                rows.append({"name": name, "seed": seed, **measured, "own_fvu": own, "seconds": seconds})
                print(f"{name}, seed {seed}: FVU {measured['fvu']:.4f}", file=sys.stderr)
    facts = {
        "shape": options.shape,
        "tokens": tokens,
        "distinct_rows": data["train"].shape[0],
        "held_out_rows": data["held_out"].shape[0],
        "median_fvu": {name: _median([r["fvu"] for r in rows if r["name"] == name]) for name in names},
    }
    save(
        options.json,
        show("held-out quality on the same activations, each by its own defaults", rows, facts=facts),
    )


def _median(values: list[float]) -> float | None:
    return torch.tensor(values).median().item() if values else None


if __name__ == "__main__":
    main()
