"""Training step, tokens/s: ours against sparsify, SAELens, and the one matrix product that nobody can avoid.

    python experiments/bench/step.py [--only ours] [--shape B,d,F,k] [--rounds 3] [--steps 7] [--json FILE]

Every contender is a process with its own interpreter (.venvs/, built by peers.sh) that waits on stdin, so
that one works at a time and rounds interleave: A-B-C-A-B-C-A-B-C. Same weights, same batches of normed
activations (real ones of the bundled host where d fits it), AuxK idle for all. Before the clock runs, our
float32 step is compared with the float64 autograd twin; a run whose gradients differ stops there.

share   of the bare product's speed in its faster dtype
eta     floor / measured; the floor is one product, three gathers of B·k rows, Adam's pass over the weights,
        and one write of the pre-activations, at this run's rates: 2BdF/gemm + (3·2Bkd + 26·2dF + 2BF)/copy
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from inputs import activations, normed
from peer_step import Step, shared_weights
from report import ROOT, save, show, spread
from torch import Tensor

Shape = tuple[int, int, int, int]
MAIN = ("ours topk", "product bfloat16", "product float32", "copy", "sparsify adam", "SAELens")
MORE = ("sparsify signum", "SAELens autocast", "dictionary_learning")
VENVS = {"sparsify": "sparsify", "SAELens": "saelens", "dictionary_learning": "dictionary"}
COPY_BYTES = 1 << 28


def ours(acts: Tensor, shape: Shape, dtype: str) -> Step:
    """Our step as the loop runs it: objective, update, dead counters. `dtype` is the encoder product's."""
    params, objective, optimizer, dead = _our_parts(acts, shape, dtype)

    def step(x: Tensor) -> None:
        work, _ = objective(params, x, dead.mask())
        optimizer.update_(work, 1e-4)
        dead.count_(work.codes)

    return step


def _our_parts(acts: Tensor, shape: Shape, dtype: str):
    from functools import partial

    from sae.objectives import topk
    from sae.objectives.terms import Params
    from sae.training.dead import Dead
    from sae.training.optimizer import RowAdam

    _, _, F, k = shape
    rows, mean = shared_weights(acts, F)
    low = rows.bfloat16() if _resolved(dtype) == "bfloat16" else None
    params = Params(rows.clone(), rows.clone(), torch.zeros(F), mean, low)
    variance = (acts[:8192].float() - mean).square().sum(1).mean().item()
    objective = partial(topk.loss, k=k, variance=variance, aux_coefficient=1 / 32)
    return params, objective, RowAdam(params), Dead(F, window=10**9)


def _resolved(dtype: str) -> str:
    """auto is what the machine's flags say, by the package's own rule."""
    if dtype != "auto":
        return dtype
    from sae.machine import machine_dtype

    return str(machine_dtype()).removeprefix("torch.")


def product(acts: Tensor, shape: Shape, dtype: torch.dtype) -> Step:
    """The bare encoder product into memory that is there: whole or by 256 rows, whichever is faster."""
    import time

    B, _, F, _ = shape
    encoder = shared_weights(acts, F)[0].to(dtype)
    out = torch.empty(B, F, dtype=dtype)

    def whole(x: Tensor) -> None:
        torch.mm(x.to(dtype), encoder.T, out=out)

    def chunks(x: Tensor) -> None:
        x = x.to(dtype)
        for start in range(0, B, 256):
            rows = x[start : start + 256]
            torch.mm(rows, encoder.T, out=out[: rows.shape[0]])

    x, took = acts[:B].float(), {}
    for form in (whole, chunks, whole, chunks):
        start = time.perf_counter()
        form(x)
        took[form] = time.perf_counter() - start  # the second round counts: pages are there
    return min(took, key=lambda form: took[form])


def copy() -> Step:
    """One copy of 256 MB, for the memory rate (2 bytes moved for each byte copied)."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.zeros_like(source)

    def step(_: Tensor) -> None:
        target.copy_(source)

    return step


def own_contender(name: str, acts: Tensor, shape: Shape, dtype: str) -> Step:
    """What peer_step.py runs when the name is not a peer's."""
    if name == "copy":
        return copy()
    if name.startswith("product "):
        return product(acts, shape, getattr(torch, name.removeprefix("product ")))
    return ours(acts, shape, dtype)


def parity(acts: Tensor, shape: Shape) -> dict[str, float]:
    """Largest error of every gradient of our float32 step, relative to the gradient's largest entry, against
    float64.

    After one step Adam's first moment is (1 − β1)·gradient, so the fused update itself is under test. Rows
    whose k-th and next pre-activation are closer than float32 can tell are left out: there both choices are
    right.
    """
    from sae.training.optimizer import BETAS
    from tests.reference.topk import losses_and_gradients

    B, d, F, k = shape
    shape = (min(B, 512), d, min(F, 4096), k)
    params, objective, optimizer, dead = _our_parts(acts, shape, "float32")
    x = acts[: shape[0]].float()
    pre = (x - params.b_dec).double() @ params.encoder.double().T
    top = pre.topk(k + 1, dim=1).values
    x = x[(top[:, k - 1] - top[:, k]) > 1e-5 * top[:, 0].abs()]
    _, truth = losses_and_gradients(params, x, k, variance=objective.keywords["variance"])
    W = params.W_dec.double()
    truth["W_dec"] = truth["W_dec"] - (truth["W_dec"] * W).sum(1, keepdim=True) * W
    work, _ = objective(params, x, dead.mask())
    optimizer.update_(work, 1e-4)
    return {
        name: ((optimizer.moments[name].m.double() / (1 - BETAS[0]) - g).abs().max() / g.abs().max()).item()
        for name, g in truth.items()
    }


class Contender:
    """A waiting process; `round` makes it work."""

    def __init__(self, name: str, acts: Path, shape: str, dtype: str, log: Path):
        family = name.split()[0]
        venv = ROOT / ".venvs" / VENVS[family] / "bin" / "python" if family in VENVS else Path(sys.executable)
        if not venv.exists():
            raise FileNotFoundError(f"{name}: {venv} does not exist. Run experiments/bench/peers.sh {VENVS[family]}")
        self.name, self.log, self.seconds = name, log, list[float]()
        script = str(Path(__file__).with_name("peer_step.py"))
        self.process = subprocess.Popen(
            [str(venv), script, name, "--acts", str(acts), "--shape", shape, "--dtype", dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        self._answer()

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended early:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)

    def round(self, steps: int, limit: float) -> list[float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"round {steps} {limit}\n")
        self.process.stdin.flush()
        return self._answer()["seconds"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(names: list[str], acts: Path, shape: str, dtype: str, rounds: int, steps: int, limit: float, warm_up: int):
    """Seconds of every timed step by contender, interleaved; a peer that is not built is left out."""
    contenders: list[Contender] = []
    with tempfile.TemporaryDirectory() as logs:
        try:
            for name in names:
                try:
                    contender = Contender(name, acts, shape, dtype, Path(logs) / name.replace(" ", "-"))
                except FileNotFoundError as error:
                    print(error, file=sys.stderr)
                    continue
                contenders.append(contender)
                contender.round(warm_up, limit)
            for number in range(rounds):
                for contender in contenders:
                    contender.seconds += contender.round(steps, limit)
                    print(f"round {number + 1}/{rounds} {contender.name}", file=sys.stderr)
        finally:
            for contender in contenders:
                contender.close()
    return {contender.name: contender.seconds for contender in contenders}


def table(seconds: dict[str, list[float]], shape: Shape) -> tuple[list[dict], dict]:
    """Rows and facts from the seconds of every step."""
    B, d, F, k = shape
    medians = {name: spread(values) for name, values in seconds.items()}
    products = {n.removeprefix("product "): m[0] for n, m in medians.items() if n.startswith("product ")}
    mine = medians.get("ours topk")
    rows, facts = [], {}
    floor = None
    if products and "copy" in medians:
        rate = 2 * COPY_BYTES / medians["copy"][0]
        floor = min(products.values()) + (6 * B * k * d + 52 * d * F + 2 * B * F) / rate
        best = min(products, key=lambda name: products[name])
        facts = {
            "product_gflops": {name: 2 * B * d * F / t / 1e9 for name, t in products.items()},
            "copy_gb_per_s": rate / 1e9,
            "floor_tokens_per_s": B / floor,
            "floor_dtype": best,
        }
    for name, (median, low, high) in medians.items():
        if name == "copy":
            continue
        rows.append(
            {
                "name": name,
                "tokens_per_s": B / median,
                "quartile_low": B / high,
                "quartile_high": B / low,
                "ours_is_times": median / mine[0] if mine else None,
                "share_of_product": min(products.values()) / median if products else None,
                "eta": floor / median if floor and not name.startswith("product") else None,
                "steps": len(seconds[name]),
            }
        )
    return rows, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", help="ours: leave the peers out; else a comma-separated list of names")
    parser.add_argument("--all", action="store_true", help=f"also {', '.join(MORE)}")
    parser.add_argument("--shape", default="4096,576,16384,32", help="B,d,F,k")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7, help="timed steps a round")
    parser.add_argument("--round-seconds", type=float, default=30.0, help="a round ends after so long")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the clock counts")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--acts", help="safetensors with `train` [N, d], or an activation store; default: made once")
    parser.add_argument("--json")
    options = parser.parse_args()
    B, d, F, k = (int(n) for n in options.shape.split(","))
    names = list(MAIN + MORE if options.all else MAIN)
    if options.only == "ours":
        names = [n for n in names if n.split()[0] not in VENVS]
    elif options.only:
        names = options.only.split(",")
    source, kind = activations(d, max(8 * B, 16_384) if B >= 1024 else 8192, options.acts)
    with tempfile.TemporaryDirectory() as folder:
        from safetensors.torch import save_file

        acts = normed(source)
        path = Path(folder) / "acts.safetensors"
        save_file({"train": acts}, path)
        dtype = _resolved(options.dtype)
        facts: dict = {"shape": options.shape, "dtype": dtype, "activations": kind}
        if "ours topk" in names:
            facts["gradient_error"] = parity(acts, (B, d, F, k))
            worst = max(facts["gradient_error"].values())
            if worst > 1e-5:
                raise SystemExit(f"parity failed: gradients differ by {facts['gradient_error']}; nothing was timed.")
        seconds = measure(
            names,
            path,
            options.shape,
            dtype,
            options.rounds,
            options.steps,
            options.round_seconds,
            options.warm_up,
        )
    rows, more = table(seconds, (B, d, F, k))
    save(options.json, show(f"training step, B,d,F,k = {options.shape}", rows, facts=facts | more))


if __name__ == "__main__":
    main()
