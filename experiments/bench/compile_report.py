"""Registers, shared memory and spills of every Triton kernel, compiled for cards that are not here.

    python experiments/bench/compile_report.py [--archs 75,80,86,90,100,120] [--json FILE] > compile-report.md

Compiled is what a training step launches at these shapes, with the settings of tuned.json (tests/kernels/aot.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import triton

from sae import files
from tests.kernels.aot import SHAPES, SHARED, Compiled, compile_all

EVERYWHERE = ("A", "B16", "C")
ON_HOPPER = ("B131", "wide", "many", "broad")


def line(made: list[Compiled]) -> str:
    """registers · shared memory in KiB of the largest variant, and spills where there are any."""
    if not made:
        return "–"
    spills = max(one.spills for one in made)
    text = f"{max(one.registers for one in made)} · {max(one.shared for one in made) / 1024:.1f}"
    return text + (f" · **{spills} spills**" if spills else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--archs", default="75,80,86,90,100,120")
    parser.add_argument("--json")
    options = parser.parse_args()
    archs = [int(arch) for arch in options.archs.split(",")]
    found: dict[str, dict[int, list[Compiled]]] = {}
    for shape in (*EVERYWHERE, *ON_HOPPER):
        found[shape] = {arch: compile_all(arch, SHAPES[shape]) for arch in archs if shape in EVERYWHERE or arch == 90}
        print(f"{shape} done", file=sys.stderr)
    print(f"# Compile report, Triton {triton.__version__}\n")
    print(
        "Registers a thread · shared memory a program in KiB, the largest of each kernel's variants. `product` is the"
    )
    print("fused encoder product, which cards without bfloat16 do not use. Limits: 255 registers,", end=" ")
    print(", ".join(f"sm_{arch} {limit} KiB" for arch, limit in SHARED.items()) + ".\n")
    for shape, by_arch in found.items():
        print(f"## {shape}: B, d, F, k = {', '.join(f'{n:,}' for n in SHAPES[shape])}\n")
        print("| kernel | " + " | ".join(f"sm_{arch}" for arch in by_arch) + " |")
        print("|---" * (1 + len(by_arch)) + "|")
        for kernel in sorted({one.kernel for made in by_arch.values() for one in made}):
            cells = [line([one for one in made if one.kernel == kernel]) for made in by_arch.values()]
            print(f"| {kernel} | " + " | ".join(cells) + " |")
        print()
    every = [one for by_arch in found.values() for made in by_arch.values() for one in made]
    print(f"{len(every)} kernels compiled, {sum(one.spills > 0 for one in every)} with spills,", end=" ")
    print(f"{sum(one.shared > SHARED[one.arch] * 1024 for one in every)} beyond the shared memory of their card.")
    if options.json:
        rows = [
            {"shape": shape, **dataclasses.asdict(one)}
            for shape, by_arch in found.items()
            for made in by_arch.values()
            for one in made
        ]
        files.write_json(Path(options.json), {"triton": triton.__version__, "rows": rows})


if __name__ == "__main__":
    main()
