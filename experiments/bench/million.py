"""Five training steps with 1,048,576 features on this machine: seconds a step, peak memory, swap.

    python experiments/bench/million.py [--features 1048576] [--batch 1024] [--log experiments/bench/million.log]

TopK, k 32, width 576, on the bundled host's activations. First as the recipe has it, then with β1 = 0, which needs no
first moment and leaves idle rows alone. Each in its own process; resident memory is Linux's VmHWM, reset before the
first step. "above" is the peak less what was resident before and less parameters and optimizer state (peer_step.py).
A peer's dense path would hold several [B, d_sae] float32 buffers: 4 GiB each at this shape.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from report import machine, show

BETAS = {"default": None, "beta1 = 0": (0.0, 0.999)}


def steps(F: int, B: int, k: int, count: int, betas: tuple[float, float] | None) -> dict[str, Any]:
    """Run the steps in this process."""
    from inputs import activations, normed
    from own_step import ours
    from peer_step import load_libraries, reset_peak, resident

    acts = normed(activations(576, 16_384, None)[0])
    load_libraries("ours topk", acts, "auto")
    before = resident("VmRSS")
    trainer = ours("ours topk", acts, (B, 576, F, k), "auto", betas=betas)
    built = resident("VmHWM")
    reset_peak()
    seconds = []
    for number in range(count):
        x = acts[number * B : (number + 1) * B].float()
        start = time.perf_counter()
        trainer.step(x)
        seconds.append(time.perf_counter() - start)
        print(f"step {number + 1}: {seconds[-1]:.2f} s", file=sys.stderr)
    peak, held = resident("VmHWM"), trainer.held()
    return {
        "s_per_step": sorted(seconds)[len(seconds) // 2],
        "tokens_per_s": B * count / sum(seconds),
        "parameters_and_state_gb": held / 1e9,
        "peak_gb": max(peak, built) / 1e9,
        "above_mb": (peak - before - held) / 1e6,
        "allowed_mb": 250 + 0.02 * 8 * 576 * F / 1e6,
        "swap_mb": resident("VmSwap") / 1e6,
        "each_s": " ".join(f"{one:.2f}" for one in seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--features", type=int, default=1_048_576)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--case", choices=BETAS, help="only this one, in this process, as JSON on stdout")
    parser.add_argument("--log", help="write the table here too")
    options = parser.parse_args()
    shape = [options.features, options.batch, options.k, options.steps]
    if options.case:
        print(json.dumps(steps(*shape, BETAS[options.case])))
        return
    rows = []
    for case in BETAS:
        words = [f"--{key}={value}" for key, value in vars(options).items() if key not in ("case", "log")]
        command = [sys.executable, __file__, *words, f"--case={case}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append({"case": case} | json.loads(done.stdout))
    title = f"{options.steps} steps, B,d,F,k = {options.batch},576,{options.features},{options.k}"
    show(title, rows)
    if options.log:
        from sae import table

        text = f"{title}\n{machine()}\n{table.text(rows)}\n"
        Path(options.log).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
