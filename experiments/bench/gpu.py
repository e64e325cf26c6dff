"""Everything to be learnt on a GPU machine, in one command and ten minutes: `make gpu PYTHON=python3`.

    python experiments/bench/gpu.py [--json runs/bench/gpu.json] [--seconds 570] [--only phase,phase]

Needs torch, triton, numpy, safetensors and transformers; no network, no installation, no pytest. Phases run in the
order of PHASES; each is on its own, so that a failure costs one phase, and the JSON file is written after each. What
the tuning found lies beside it as tuned.json, in the form of sae/kernels/triton/tuned.json: copy it there to ship it.
Exit code 2 without CUDA, 1 where a check failed.

eta     floor / measured; floor.py, with the product's and the copy's rates of the same run
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # tests are imported from a checkout; the package too, which nobody installed
DEVICE = "cuda"
SHAPES: dict[str, tuple[int, int, int, int]] = {
    "A": (4096, 768, 24576, 32),
    "B16": (4096, 2304, 16384, 64),
    "B32": (4096, 2304, 32768, 64),
    "B65": (4096, 2304, 65536, 64),
    "B131": (4096, 2304, 131072, 64),
    "C": (8192, 4096, 131072, 64),
}
"""B, d, F, k"""
STEPS = 40


class Report:
    """The JSON file, and what is left of the time."""

    def __init__(self, path: Path, seconds: float):
        self.path, self.end = path, time.monotonic() + seconds
        self.found: dict[str, Any] = {"seconds": {}, "errors": {}}

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self, name: str, phase: Callable[[Report], Any], least: float) -> None:
        """One phase, if `least` seconds are left; what it returns, or how it failed, goes into the file."""
        print(f"\n== {name} ({self.left():.0f} s left)", flush=True)
        if self.left() < least:
            self.found["errors"][name] = "left out: no time"
        else:
            began = time.monotonic()
            try:
                self.found[name] = phase(self)
            except Exception:  # one phase's failure must not cost the others
                self.found["errors"][name] = traceback.format_exc()
                print(self.found["errors"][name])
            self.found["seconds"][name] = round(time.monotonic() - began, 1)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1, default=str) + "\n", encoding="utf-8")


def machine(report: Report) -> dict[str, Any]:
    import transformers
    import triton

    from sae.machine import describe

    about = torch.cuda.get_device_properties(0)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    facts = {"machine": describe(), "memory_gb": about.total_memory / 1e9, "sms": about.multi_processor_count}
    return facts | versions | {"capability": torch.cuda.get_device_capability()}


def kernel_cases(report: Report) -> list[dict]:
    """Every kernel against the plain version, on the device."""
    from tests.kernels.triton_cases import CASES, ON_DEVICE, run

    verdicts = [run(name, case, DEVICE) for name, case in {**CASES, **ON_DEVICE}.items()]
    for verdict in verdicts:
        print("ok  " if verdict["error"] is None else "FAIL", verdict["name"], verdict["seconds"])
        if verdict["error"]:
            print(verdict["error"].strip().splitlines()[-1])
    return verdicts


def step_checks(report: Report) -> list[dict]:
    from tests.gpu import harvest
    from tests.gpu.checks import CHECKS

    verdicts = []
    for name, check in (CHECKS | harvest.CHECKS).items():
        error = figures = None
        try:
            figures = check()
        except Exception:  # a failing check must not lose the others
            error = traceback.format_exc()
        verdicts.append({"name": name, "figures": figures, "error": error})
        print("ok  " if error is None else f"FAIL\n{error}", name, figures or "")
    return verdicts


def steps(report: Report) -> list[dict]:
    """Our captured TopK step at every shape, its parts, and the rates that bound it."""
    return [_guarded(_step_row, name) for name in SHAPES]


def _guarded(row: Callable[..., dict], name: str, *arguments) -> dict:
    """A row for the table, or why there is none."""
    try:
        made = {"shape": name, **row(SHAPES[name], *arguments)}
    except Exception as error:  # a shape that does not fit this card must not lose the others
        traceback.print_exc()
        made = {"shape": name, "error": repr(error)}
    torch.cuda.empty_cache()
    print(json.dumps(made), flush=True)
    return made


def _step_row(shape) -> dict:
    from floor import floor_in
    from gpu_step import Inputs, median_ms, ours, times_ms

    B = shape[0]
    torch.cuda.reset_peak_memory_stats()
    step, learn = ours(shape, DEVICE)
    taken = times_ms(step, steps=STEPS, warm_up=8)
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    wall = (time.perf_counter() - began) / STEPS * 1e3
    peak = torch.cuda.max_memory_allocated()
    parameters = sum(p.numel() * p.element_size() for p in vars(learn.params).values() if p is not None)
    del step, learn
    torch.cuda.empty_cache()
    measured = rates(shape)
    floor = floor_in("bfloat16", shape, B * shape[3], measured) * 1e3
    median = statistics.median(taken)
    parts = {name: round(median_ms(call, steps=20), 4) for name, call in Inputs(shape, DEVICE).calls().items()}
    return {
        "ms": round(median, 4),
        "quartiles": [round(q, 4) for q in statistics.quantiles(taken, n=4)[::2]],
        "wall_ms": round(wall, 4),
        "tokens_per_s": round(B / median * 1e3),
        "floor_ms": round(floor, 4),
        "eta": round(floor / median, 3),
        "gemm_tflops": round(measured.gemm["bfloat16"] / 1e12, 1),
        "copy_gb_per_s": round(measured.copy / 1e9),
        "peak_gb": round(peak / 1e9, 2),
        "parameters_gb": round(parameters / 1e9, 2),
        "eager_parts_ms": parts,
    }


def rates(shape):
    """The encoder's product in bfloat16, in chunks as the kernel makes it, and a copy of 1 GB, of this very moment."""
    from floor import Rates
    from gpu_step import median_ms

    B, d, F, _ = shape
    x = torch.randn(B, d, device=DEVICE, dtype=torch.bfloat16)
    encoder = torch.randn(F, d, device=DEVICE, dtype=torch.bfloat16)
    n = max(1, min(B, (1 << 28) // (2 * F)))
    out = torch.empty(n, F, device=DEVICE, dtype=torch.bfloat16)

    def product() -> None:
        for rows in x.split(n):
            torch.mm(rows, encoder.T, out=out[: len(rows)])

    source = torch.empty(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / median_ms(lambda: target.copy_(source), steps=10) * 1e3
    return Rates({"bfloat16": 2 * B * d * F / median_ms(product, steps=10) * 1e3}, copy)


def tuning(report: Report) -> list[dict]:
    """Leaves the best settings in the table for the phases that follow, and in a file."""
    from gpu_tuning import tune

    from sae.kernels.triton import tuned

    until = time.monotonic() + min(240, report.left() - 150)
    rows = tune(DEVICE, lambda: time.monotonic() > until)
    text = json.dumps(tuned.table(), indent=2) + "\n"
    report.path.with_name("tuned.json").write_text(text, encoding="utf-8")
    for row in rows:
        print(row)
    return rows


def variants(report: Report) -> list[dict]:
    """Other architectures and β1 = 0, at two shapes."""
    return [_guarded(_variant_row, shape, name) for shape in ("A", "B65") for name in ("topk lazily", *_others())]


def _others() -> list[str]:
    from gpu_step import VARIANTS

    return [name for name in VARIANTS if name != "topk"]


def _variant_row(shape, name: str) -> dict:
    from gpu_step import median_ms, ours

    if name == "topk lazily":
        step, _ = ours(shape, DEVICE, betas=(0.0, 0.999))
    else:
        step, _ = ours(shape, DEVICE, name)
    for _ in range(5):
        step()
    return {"name": name, "ms": round(median_ms(step, steps=20), 4)}


def plain_torch(report: Report) -> list[dict]:
    return [_guarded(_dense_row, name) for name in SHAPES]


def _dense_row(shape) -> dict:
    from gpu_step import dense, median_ms

    torch.cuda.reset_peak_memory_stats()
    median = median_ms(dense(shape, DEVICE), steps=10)
    return {"name": "dense autograd", "ms": round(median, 4), "peak_gb": torch.cuda.max_memory_allocated() / 1e9}


HOST = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 65536,
}
"""1.2 billion parameters."""
ROWS, CONTEXT = 64, 1024


def harvest(report: Report) -> list[dict]:
    """Tokens/s of harvest.stream, activations on the CPU in the end, from a host with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from sae.activations.harvest import stream
    from sae.host import Host
    from sae.text import Rows

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model = LlamaForCausalLM(LlamaConfig(**HOST)).eval()
    finally:
        torch.set_default_dtype(before)
    host = Host.from_model(model, None, name="random")
    tokens = torch.randint(0, HOST["vocab_size"], (ROWS, CONTEXT), dtype=torch.int32)
    doc = (torch.arange(CONTEXT, dtype=torch.int32) // 300).expand(ROWS, CONTEXT).contiguous()
    pos = (torch.arange(CONTEXT, dtype=torch.int32) % 300).expand(ROWS, CONTEXT).contiguous()
    packed = Rows(tokens, doc, pos, torch.ones(ROWS, CONTEXT, dtype=torch.bool))
    made = []
    for layer in (HOST["num_hidden_layers"] // 2, HOST["num_hidden_layers"] - 1):
        hook = f"blocks.{layer}.hook_resid_post"
        blocks = stream(host, [packed] * 6, [hook])
        next(blocks)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        n = sum(len(block) for block in blocks)
        made.append({"hook": hook, "tokens_per_s": round(n / (time.perf_counter() - began))})
        print(made[-1])
    return [{"parameters": sum(p.numel() for p in model.parameters()), "context": CONTEXT}, *made]


def peers(report: Report) -> list[dict] | str:
    """Peers' steps, where they happen to be installed."""
    import importlib.util

    there = [name for name in ("sparsify", "sae_lens") if importlib.util.find_spec(name) is not None]
    if not there:
        return "neither sparsify nor sae_lens is installed"
    return [_guarded(_peer_row, shape, name) for shape in SHAPES for name in there]


def _peer_row(shape, name: str) -> dict:
    import gpu_step

    step = {"sparsify": gpu_step.sparsify, "sae_lens": gpu_step.saelens}[name](shape, DEVICE)
    return {"name": name, "ms": round(gpu_step.median_ms(step, steps=10), 4)}


PHASES: dict[str, tuple[Callable[[Report], Any], float]] = {
    "machine": (machine, 0),
    "steps": (steps, 30),
    "kernel cases": (kernel_cases, 20),
    "step checks": (step_checks, 20),
    "plain torch": (plain_torch, 30),
    "tuning": (tuning, 180),
    "steps tuned": (steps, 30),
    "variants": (variants, 20),
    "harvest": (harvest, 20),
    "peers": (peers, 20),
}
"""In order of importance, with the seconds that a phase needs at least."""


def failures(found: dict[str, Any]) -> list[str]:
    """Names of phases and checks that failed."""
    checks = [*found.get("kernel cases", []), *found.get("step checks", [])]
    return [*found["errors"], *(verdict["name"] for verdict in checks if verdict["error"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", default="runs/bench/gpu.json")
    parser.add_argument("--seconds", type=float, default=570)
    parser.add_argument("--only", help=f"comma-separated, of: {', '.join(PHASES)}")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device here. Run it where `torch.cuda.is_available()`.", file=sys.stderr)
        raise SystemExit(2)
    report = Report(Path(options.json), options.seconds)
    for name in options.only.split(",") if options.only else PHASES:
        report.run(name, *PHASES[name])
    failed = failures(report.found)
    print(f"\n{report.path}: {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
