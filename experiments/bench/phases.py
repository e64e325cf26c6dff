"""Where a step's time goes: the clock around each kernel, the rest is everything between them.

The kernels are replaced by timed ones wherever a module of the package holds them, for as long as the measurement
takes. Rates count what the operation cannot avoid (see the table's columns in `table`), not what it happens to move.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from floor import SIZES, Rates, Shape, update_bytes
from peer_step import Trainer
from torch import Tensor

from sae import kernels

KERNELS = ("encode_select", "reconstruct", "by_feature", "update_rows")


@contextmanager
def timed_kernels() -> Iterator[dict[str, float]]:
    """Seconds spent in each kernel so far."""
    spent = dict.fromkeys(KERNELS, 0.0)
    originals = {name: getattr(kernels, name) for name in KERNELS}
    replaced = []
    for name, original in originals.items():
        timed = _timed(original, name, spent)
        for module in list(sys.modules.values()):
            if module.__name__.startswith("sae.") and vars(module).get(name) is original:
                setattr(module, name, timed)
                replaced.append((module, name, original))
        setattr(kernels, name, timed)
        replaced.append((kernels, name, original))
    try:
        yield spent
    finally:
        for module, name, original in replaced:
            setattr(module, name, original)


def _timed(function: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args, **named):
        start = time.perf_counter()
        try:
            return function(*args, **named)
        finally:
            spent[name] += time.perf_counter() - start

    return call


def by_phase(trainer: Trainer, source: Iterator[Tensor], count: int) -> dict[str, float]:
    """Median seconds of each kernel and of the rest over `count` steps."""
    steps: list[dict[str, float]] = []
    for _ in range(count):
        x = next(source)
        with timed_kernels() as spent:
            start = time.perf_counter()
            trainer.step(x)
            whole = time.perf_counter() - start
        steps.append(spent | {"rest": whole - sum(spent.values())})
    return {name: statistics.median(step[name] for step in steps) for name in steps[0]}


def table(phases: dict[str, float], shape: Shape, nnz: float, dtype: str, rates: Rates) -> list[dict[str, Any]]:
    """Milliseconds, share of the step, and the rates achieved.

    encode_select  2BdF operations; the pre-activations written once
    reconstruct    4·nnz·d operations (decode, value gradients); one gather of float32 rows
    by_feature     nnz keys read, order and rows written (4 + 8 + 8 bytes)
    update_rows    4·nnz·d operations (two gradients); two gathers and Adam's traffic
    ideal          the time of these at this run's product and copy rates, as a share of the time measured
    """
    B, d, F, _ = shape
    gather = 4 * nnz * d
    work = {
        "encode_select": (2 * B * d * F, SIZES[dtype] * B * F),
        "reconstruct": (4 * nnz * d, gather),
        "by_feature": (0, 20 * nnz),
        "update_rows": (4 * nnz * d, 2 * gather + update_bytes(shape, dtype)),
    }
    whole = sum(phases.values())
    rows = []
    for name, seconds in phases.items():
        row: dict[str, Any] = {"phase": name, "ms": seconds * 1e3, "share": seconds / whole}
        if name in work and seconds > 0:
            operations, moved = work[name]
            ideal = moved / rates.copy + (operations / rates.gemm[dtype] if name == "encode_select" else 0)
            row |= {"gflop_per_s": operations / seconds / 1e9, "gb_per_s": moved / seconds / 1e9}
            row["ideal"] = ideal / seconds
        rows.append(row)
    return rows
