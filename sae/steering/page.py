"""The effects report as one self-contained HTML page: plots as inline SVG, tables, answers; readable in dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

PANELS = (
    ("perplexity", "perplexity of held-out text"),
    ("kl", "KL to the unsteered model, nats a token"),
    ("capability", "multiple choice, share right"),
    ("about", "answers about the concept"),
    ("repetition", "repetition of answers"),
    ("harmful: refuse", "harmful requests refused"),
    ("harmful: derail", "harmful requests derailed"),
    ("harmless: refuse", "harmless requests refused"),
    ("harmless: derail", "harmless requests derailed"),
)
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 300, 180, 44, 24
_STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; --dial: #b3401f; --random: #6f7c88; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; } figcaption { font-size: 0.85rem; }
svg text { fill: currentColor; font-size: 10px; } .dial { stroke: var(--dial); } .random { stroke: var(--random); }
table { border-collapse: collapse; font-size: 0.82rem; } .wide { overflow-x: auto; }
td, th { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid #8884; }
td:first-child { text-align: left; }
.key span { margin-right: 1rem; }
blockquote { margin: 0.4rem 0 1rem; border-left: 3px solid #8886; padding-left: 0.8rem; }
"""


def html(
    title: str,
    rows: Sequence[dict[str, Any]],
    tables: Sequence[tuple[str, Sequence[dict[str, Any]]]],
    answers: Sequence[dict[str, Any]],
    notes: Sequence[str],
) -> str:
    """The page. `rows` are `effects.report`'s, `tables` those to print, `answers` {"question", "plain", "steered"}."""
    plots = "".join(_plot(rows, key, name) for key, name in PANELS)
    shown = "".join(f"<h2>{escape(name)}</h2><div class=wide>{_table(lines)}</div>" for name, lines in tables)
    said = "".join(
        f"<p><b>{escape(one['question'])}</b></p><blockquote>{escape(one['plain'])}</blockquote>"
        f"<blockquote style='border-color: var(--dial)'>{escape(one['steered'])}</blockquote>"
        for one in answers
    )
    told = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style><body><h1>{escape(title)}</h1>{told}"
        f"<p class=key><span style='color: var(--dial)'>● the dial</span>"
        f"<span style='color: var(--random)'>● random features of the same length, mean</span>"
        f"<span>– – unsteered</span></p><div class=plots>{plots}</div>{shown}"
        f"<h2>Answers, unsteered and steered, unedited</h2>{said}</body></html>"
    )


def _plot(rows: Sequence[dict[str, Any]], key: str, name: str) -> str:
    """One figure against the factor of the strength; the unsteered value is a dashed line."""
    series = {arm: [(row["factor"], row[key]) for row in rows if row["arm"] == arm] for arm in ("dial", "random")}
    off = next(row[key] for row in rows if row["arm"] == "off")
    values = [off, *(y for points in series.values() for _, y in points)]
    finite = [y for y in values if math.isfinite(y)]
    low, high = min(0.0, *finite), max(finite, default=1.0) or 1.0
    widest = max((x for points in series.values() for x, _ in points), default=1.0)

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (_WIDTH - _LEFT - 8) * x / widest
        return across, (_HEIGHT - _BOTTOM) * (1 - (y - low) / (high - low)) * 0.92 + 8

    parts = []
    for arm, points in series.items():
        drawn = [at(x, y) for x, y in [(0.0, off), *sorted(points)] if math.isfinite(y)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        parts.append(f"<polyline class={arm} points='{line}' fill=none stroke-width=2 />")
        parts += [f"<circle class={arm} cx={x:.1f} cy={y:.1f} r=2.5 />" for x, y in drawn[1:]]
    _, level = at(0, off)
    ticks = "".join(
        f"<text x={_LEFT - 4} y={at(0, y)[1] + 3:.1f} text-anchor=end>{_cell(y)}</text>" for y in (low, high)
    ) + "".join(
        f"<text x={at(x, 0)[0]:.1f} y={_HEIGHT - 8} text-anchor=middle>{x:g}×</text>"
        for x in {p[0] for p in series["dial"]}
    )
    return (
        f"<figure><figcaption>{escape(name)}</figcaption><svg width={_WIDTH} height={_HEIGHT} role=img "
        f"aria-label='{escape(name, quote=True)}'><line x1={_LEFT} x2={_WIDTH - 8} y1={level:.1f} y2={level:.1f} "
        f"stroke=currentColor stroke-dasharray='4 4' opacity=0.5 />{''.join(parts)}{ticks}</svg></figure>"
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(_cell(row.get(name)))}</td>" for name in columns) for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['value']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
