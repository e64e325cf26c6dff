"""One way to print a table: aligned plain text for the screen, the same rows as JSON on request.

A row is a dict; columns are its keys in order of first appearance. Numbers show three to four significant
digits, counts have separators, an interval ({value, low, high}) reads '0.161 [0.155, 0.168]'. Text that users
or models wrote loses terminal escapes and control characters, so that it cannot move the cursor or recolour
the screen.
"""

import itertools
import math
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae import files
from sae.errors import ESCAPE

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SHOWN = {"\n": "⏎", "\t": " ", "\r": ""}


def clean(text: str) -> str:
    """One printable line: no escapes, no control or direction characters; a newline is shown as ⏎."""
    return _CONTROL.sub(lambda found: _SHOWN.get(found[0], ""), ESCAPE.sub("", text))


def clean_text(text: str) -> str:
    """The same for text of several lines: newlines stay."""
    return "\n".join(clean(line) for line in text.split("\n"))


def number(value: float) -> str:
    """A number with sensible precision: 0.1613, 31.9, 12,345, 2.1e-05."""
    if math.isnan(value):
        return "–"
    if math.isinf(value) or value == 0:
        return "0" if value == 0 else str(value)
    size = abs(value)
    if size >= 999.5:
        return f"{value:,.0f}"
    if size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.{max(0, 3 - max(0, math.floor(math.log10(size)) + 1))}f}"


def cell(value: Any) -> str:
    """One cell as text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping) and "value" in value:
        if value.get("low") is None or value.get("high") is None:
            return cell(value["value"])
        return f"{cell(value['value'])} [{number(value['low'])}, {number(value['high'])}]"
    if isinstance(value, list | tuple):
        return ", ".join(cell(item) for item in value)
    return clean(str(value))


def text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """The rows as aligned lines under a header; numbers to the right, words to the left. '' for no rows."""
    if not rows:
        return ""
    if columns is None:
        columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[cell(row.get(name)) for name in columns] for row in rows]
    right = [all(_numeric(row.get(name)) for row in rows) for name in columns]
    lines = [[clean(name) for name in columns], *cells]
    widths = [max(_width(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, ["─" * width for width in widths])
    return "\n".join("  ".join(map(_pad, line, widths, right)).rstrip() for line in lines)


def beside(blocks: Sequence[str], gap: int = 3) -> str:
    """Blocks of lines side by side, tops aligned."""
    columns = [block.splitlines() for block in blocks]
    widths = [max(map(_width, lines), default=0) for lines in columns]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(
        (" " * gap).join(_pad(*cell, False) for cell in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def emit(result: Sequence[Mapping[str, Any]] | Mapping[str, Any], json_path: str | Path | None = None) -> None:
    """Print rows as a table, or a dict as one line a key; write them as JSON too where a path is given."""
    if isinstance(result, Mapping):
        print(
            text([{"": name, "value": value} for name, value in result.items()], ["", "value"]),
            file=sys.stdout,
        )
    else:
        print(text(result), file=sys.stdout)
    if json_path is not None:
        files.write_json(json_path, dict(result) if isinstance(result, Mapping) else [dict(row) for row in result])


def _numeric(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _width(line: str) -> int:
    """Columns on a terminal: wide characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def _pad(line: str, width: int, right: bool) -> str:
    space = " " * (width - _width(line))
    return space + line if right else line + space
