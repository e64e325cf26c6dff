"""Which launch settings are fastest on this card: a fixed grid, timed; what `make gpu` ships as tuned.json's entries.

Settings follow the width d alone, so each kernel is tuned at one shape a class of widths. A setting that does not fit
the card is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_step import Inputs, Shape, median_ms

from sae.kernels.triton import tuned

CLASSES: list[tuple[int | None, Shape]] = [
    (1024, (4096, 768, 24576, 32)),
    (3072, (4096, 2304, 65536, 64)),
    (None, (4096, 4096, 65536, 64)),
]
"""Widths up to … are tuned at B, d, F, k."""


def _grid(names: str, rows: list[tuple[int, ...]]) -> list[dict[str, Any]]:
    return [dict(zip(names.split(), row, strict=True)) for row in rows]


LIBRARY = {"library": True}
GRID: dict[str, list[dict[str, Any]]] = {
    "summary": _grid("GROUPS num_warps", [(8, 2), (16, 2), (16, 4), (32, 4), (64, 4), (64, 8)]),
    "product": [LIBRARY]
    + [
        {"library": False, "BAND": 8, **tile}
        for tile in _grid(
            "BLOCK_B BLOCK_F BLOCK_D num_warps num_stages",
            [(128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 4, 4), (256, 128, 64, 8, 3)],
        )
    ],
    "decode": _grid("BLOCK_K BLOCK_D num_warps", [(8, 128, 4), (16, 128, 4), (32, 128, 4), (16, 256, 4)]),
    "reconstruct": _grid(
        "BLOCK_K BLOCK_D num_warps",
        [(16, 128, 4), (32, 64, 4), (32, 128, 4), (32, 128, 8), (64, 64, 4), (64, 128, 8), (32, 256, 8)],
    ),
    "update_rows": _grid("BLOCK_T num_warps", [(1, 4), (2, 4), (4, 4), (2, 8), (4, 8), (8, 8), (4, 16)]),
}
"""In this order: the product's rivals use the best pass over it."""
CALLED_BY = {"summary": "encode_select", "product": "encode_select"}


def tune(device: str, out_of_time: Callable[[], bool]) -> list[dict[str, Any]]:
    """Time the grid and put the best into tuned.table() for this architecture; a row for each setting."""
    arch, table, rows = tuned.architecture(), tuned.table(), []
    shipped = {name: table[name].get(arch) for name in GRID}
    best: dict[str, list[dict[str, Any]]] = {name: [] for name in GRID}
    try:
        for up_to, shape in CLASSES:
            inputs = Inputs(shape, device)
            for name, settings in GRID.items():
                taken = []
                for setting in settings:
                    if out_of_time():
                        return rows
                    table[name][arch] = [setting]
                    row = {"kernel": name, "d": shape[1], **setting}
                    try:
                        taken.append((median_ms(inputs.calls()[CALLED_BY.get(name, name)], steps=8), setting))
                        rows.append(row | {"ms": round(taken[-1][0], 4)})
                    except Exception as error:  # beyond the card's limits: OutOfResources, PTXASError, …
                        rows.append(row | {"error": type(error).__name__})
                if taken:
                    fastest = min(taken, key=lambda one: one[0])[1]
                    best[name].append(({} if up_to is None else {"up_to": up_to}) | fastest)
                    table[name][arch] = [fastest]
            del inputs
            torch.cuda.empty_cache()
    finally:
        for name, found in best.items():
            if found:  # wider than what was tuned: as the widest
                table[name][arch] = [*found[:-1], {k: v for k, v in found[-1].items() if k != "up_to"}]
            elif shipped[name] is None:
                table[name].pop(arch, None)
            else:
                table[name][arch] = shipped[name]
    return rows
