"""What every benchmark prints: the machine's line, a table, and a JSON file."""

import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae import files, table
from sae.machine import describe

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # tests/reference is imported from a checkout
LOAD_BEFORE = os.getloadavg()[0]


def machine() -> str:
    """One line: processor, its instructions, threads, torch, malloc, and the load before it began."""
    malloc = os.environ.get("MALLOC_MMAP_THRESHOLD_", "default")
    return f"{describe()}, malloc {malloc}, load before {LOAD_BEFORE:.1f}"


def show(title: str, rows: Sequence[dict[str, Any]], *, facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """Print machine line and table; the same as one object for --json."""
    line = machine()
    print(f"\n{title}\n{line}")
    print(table.text(rows))
    for key, value in (facts or {}).items():
        print(f"{key}: {value}")
    return {"machine": line, "rows": list(rows), **(facts or {})}


def save(path: str | None, result: dict[str, Any]) -> None:
    """Write --json, when it was asked for."""
    if path:
        files.write_json(path, result)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return (values[0], values[0], values[0])
    low, _, high = statistics.quantiles(values, n=4)
    return statistics.median(values), low, high
