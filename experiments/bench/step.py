"""Training step, tokens/s: ours by architecture against sparsify, SAELens and dictionary_learning, and the floor.

    python experiments/bench/step.py [--only ours] [--shape B,d,F,k] [--rounds 3] [--steps 7] [--json FILE]
        [--all] [--phases] [--memory]

Every contender is a process with its own interpreter (.venvs/, built by peers.sh) that waits on stdin, so
that one works at a time and rounds interleave: A-B-C-A-B-C-A-B-C. Same weights, same batches of normed
activations (real ones of the bundled host where d fits it), AuxK idle for all. Before the clock runs, our
float32 step is compared with the float64 autograd twin; a run whose gradients differ stops there.

share   of the bare product's speed in its faster dtype
eta     floor / measured, with this run's product and copy rates and the row's own non-zeros (floor.py)
memory  MB at the peak of a step above parameters and optimizer state (peer_step.py says how), with --memory
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import phases
from contender import VENVS, measure
from floor import Rates, Shape, best_dtype, floor, rates
from inputs import activations, normed
from own_step import LR, SHARE, VARIANTS, begin, resolved
from report import save, show, spread
from safetensors.torch import save_file
from torch import Tensor

MAIN = (*VARIANTS, "product bfloat16", "product float32", "copy", "sparsify adam", "SAELens", "dictionary_learning")
MORE = ("sparsify signum", "SAELens autocast", "dictionary_learning autocast")


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
    parts = begin("ours topk", acts, (min(B, 512), d, min(F, 4096), k), "float32")
    params, optimizer = parts.params, parts.optimizer
    x = acts[: min(B, 512)].float()
    pre = (x - params.b_dec).double() @ params.encoder.double().T
    top = pre.topk(k + 1, dim=1).values
    x = x[(top[:, k - 1] - top[:, k]) > 1e-5 * top[:, 0].abs()]
    _, truth = losses_and_gradients(params, x, k, variance=parts.variance)
    W = params.W_dec.double()
    truth["W_dec"] = truth["W_dec"] - (truth["W_dec"] * W).sum(1, keepdim=True) * W
    work, _ = parts.objective.loss(params, x, parts.dead.mask(), SHARE)
    optimizer.update_(work, LR)
    return {
        name: ((optimizer.moments[name].m.double() / (1 - BETAS[0]) - g).abs().max() / g.abs().max()).item()
        for name, g in truth.items()
    }


def table(
    seconds: dict[str, list[float]], answers: dict[str, dict[str, Any]], shape: Shape, found: Rates | None
) -> list[dict[str, Any]]:
    """One row a contender from the seconds of every step and what each said of itself."""
    B, _, _, k = shape
    medians = {name: spread(values) for name, values in seconds.items()}
    mine = medians.get("ours topk")
    products = [m[0] for name, m in medians.items() if name.startswith("product")]
    rows = []
    for name, (median, low, high) in medians.items():
        if name == "copy":
            continue
        facts = answers[name].get("facts", {})
        peak = answers[name].get("peak_bytes")
        bounded = found is not None and not name.startswith("product")
        rows.append(
            {
                "name": name,
                "tokens_per_s": B / median,
                "quartile_low": B / high,
                "quartile_high": B / low,
                "ours_is_times": median / mine[0] if mine else None,
                "share_of_product": min(products) / median if products else None,
                "eta": floor(shape, facts.get("nnz", B * k), found) / median if found and bounded else None,
                "nnz_per_token": facts["nnz"] / B if "nnz" in facts else None,
                "l0": facts.get("l0"),
                "memory_mb": None if peak is None else peak / 1e6,
                "implementation": facts.get("implementation"),
                "steps": len(seconds[name]),
            }
        )
    return rows


def rate_facts(found: Rates | None, shape: Shape) -> dict[str, Any]:
    """The run's own rates and what they bound."""
    if found is None:
        return {}
    B, _, _, k = shape
    return {
        "product_gflops": {name: rate / 1e9 for name, rate in found.gemm.items()},
        "copy_gb_per_s": found.copy / 1e9,
        "floor_tokens_per_s": B / floor(shape, B * k, found),
        "floor_dtype": best_dtype(shape, found),
    }


def chosen(only: str | None, everybody: bool) -> list[str]:
    """The contenders' names, in the table's order."""
    names = list(MAIN + MORE if everybody else MAIN)
    if only == "ours":
        return [name for name in names if name.split()[0] not in VENVS]
    return only.split(",") if only else names


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", help="ours: leave the peers out; else a comma-separated list of names")
    parser.add_argument("--all", action="store_true", help=f"also {', '.join(MORE)}")
    parser.add_argument("--shape", default="4096,576,16384,32", help="B,d,F,k")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7, help="timed steps a round")
    parser.add_argument("--round-seconds", type=float, default=30.0, help="a round ends after so long")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the clock counts")
    parser.add_argument("--phases", action="store_true", help="also our time by kernel")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of a step")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--acts", help="safetensors with `train` [N, d], or an activation store; default: made once")
    parser.add_argument("--json")
    options = parser.parse_args()
    B, d, F, k = shape = tuple(int(n) for n in options.shape.split(","))
    names = chosen(options.only, options.all)
    source, kind = activations(d, max(8 * B, 16_384) if B >= 1024 else 8192, options.acts)
    dtype = resolved(options.dtype)
    facts: dict[str, Any] = {"shape": options.shape, "dtype": dtype, "activations": kind}
    with tempfile.TemporaryDirectory() as folder:
        acts = normed(source)
        path = Path(folder) / "acts.safetensors"
        save_file({"train": acts}, path)
        if any(name.startswith("ours") for name in names):
            facts["gradient_error"] = parity(acts, (B, d, F, k))
            worst = max(facts["gradient_error"].values())
            if worst > 1e-5:
                raise SystemExit(f"parity failed: gradients differ by {facts['gradient_error']}; nothing was timed.")
        also = (("memory", 3),) * options.memory + (("phases", 5),) * options.phases
        seconds, answers = measure(
            names,
            path,
            options.shape,
            dtype=dtype,
            rounds=options.rounds,
            steps=options.steps,
            limit=options.round_seconds,
            warm_up=options.warm_up,
            also=also,
        )
    found = rates({name: spread(values)[0] for name, values in seconds.items()}, shape)
    rows = table(seconds, answers, shape, found)
    result = show(f"training step, B,d,F,k = {options.shape}", rows, facts=facts | rate_facts(found, shape))
    if options.phases and found is not None:
        result["phases"] = {
            name: phases.table(answer["phases"], shape, answer["facts"]["nnz"], dtype, found)
            for name, answer in answers.items()
            if "phases" in answer and "dense" not in answer["facts"]["implementation"]
        }
        for name, part in result["phases"].items():
            show(f"{name}, by kernel", part)
    save(options.json, result)


if __name__ == "__main__":
    main()
