"""Launch settings as data: tuned.json, measured by `make gpu`, chosen by lookup and never by a timing at run time.

    {kernel: {"sm_90": [{"up_to": 1024, "BLOCK_D": 64, "num_warps": 4, …}, …], "default": […]}}

The first entry whose `up_to` is not below the width d counts (the last one has none). A card without its own entry uses
the default: not measured, but compiled for every architecture without spills (experiments/bench/compile-report.md).
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

import triton

# Multiply-adds are fused, whatever this version of Triton takes for its default: it has changed before.
FUSED = {"enable_fp_fusion": True}


@functools.cache
def table() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What tuned.json says; `make gpu` changes it in place while it tunes."""
    return json.loads(resources.files("sae.kernels.triton").joinpath("tuned.json").read_text(encoding="utf-8"))


def settings(kernel: str, d: int) -> dict[str, Any]:
    """Constants and launch options of `kernel` for rows of width d on the current card."""
    known = table()[kernel]
    for entry in known.get(architecture(), known["default"]):
        if d <= entry.get("up_to", d):
            return {name: value for name, value in entry.items() if name != "up_to"}
    raise AssertionError(f"tuned.json: {kernel} has no entry for rows of width {d}")


def architecture() -> str:
    """`sm_90` and the like; `interpreter` where Triton interprets."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    return f"sm_{triton.runtime.driver.active.get_current_target().arch}"
