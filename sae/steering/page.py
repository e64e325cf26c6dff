"""Calibration and effects, each as one self-contained HTML page: plots as inline SVG, tables, answers; readable in dark
mode."""

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
CURVES = (
    ("overall", "overall score, 0 to 2"),
    ("about", "answers about the concept"),
    ("speaks as", "answers that speak as it"),
    ("concept", "concept score, 0 to 2"),
    ("instruct", "instruction score, 0 to 2"),
    ("fluency", "fluency score, 0 to 2"),
    ("perplexity", "perplexity under the unsteered model, median"),
    ("kl", "KL to the unsteered model, nats a token"),
    ("repetition", "repetition of answers"),
    ("refuses", "answers that refuse"),
)
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM = 288, 180, 44, 18, 24
_STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; --dial: #b3401f; --random: #6f7c88; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; } figcaption { font-size: 0.85rem; }
svg text { fill: currentColor; font-size: 10px; }
circle { fill: none; } .dial { stroke: var(--dial); } .random { stroke: var(--random); }
table { border-collapse: collapse; font-size: 0.82rem; } .wide { overflow-x: auto; }
td, th { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid #8884; }
td { white-space: nowrap; } td:first-child { text-align: left; }
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
    """The effects page. `rows` are `effects.report`'s, `tables` those to print, `answers` {"question", "plain",
    "steered"}."""
    plots = []
    for key, name in PANELS:
        lines = {arm: [(row["factor"], row[key]) for row in rows if row["arm"] == arm] for arm in ("dial", "random")}
        plots.append(_plot(name, lines, next(row[key] for row in rows if row["arm"] == "off")))
    key_of = (("dial", "● the dial"), ("random", "● random features of the same length, mean"))
    return _page(title, notes, key_of, plots, tables, answers)


def calibration(
    title: str, cells: Sequence[dict[str, Any]], table: Sequence[dict[str, Any]], notes: Sequence[str]
) -> str:
    """The page of `calibrate`'s cells: every score against the strength (in multiples of the feature's maximum) on the
    choosing questions, what was chosen and its controls on the reporting ones, and the first answers of these."""
    halves = {half: {cell["arm"]: cell for cell in cells if cell["half"] == half} for half in ("choosing", "reporting")}
    plain, chosen = halves["reporting"]["off"], halves["reporting"]["chosen"]
    plots = []
    for key, name in CURVES:
        level = _value(halves["choosing"]["off"][key])
        tried = [(cell["times"], _value(cell[key])) for arm, cell in halves["choosing"].items() if arm != "off"]
        dots = {"dial": [(chosen["times"], chosen[key])]}
        dots["random"] = [(cell["times"], _value(cell[key])) for arm, cell in halves["reporting"].items()
                          if arm.startswith("random")]  # fmt: skip
        plots.append(_plot(name, {"dial": tried}, level, dots))
    key_of = (("dial", "● the feature: line on the choosing questions, ring on the reporting ones, with its interval"),
              ("random", "● random features and a random direction of the same length"))  # fmt: skip
    each = chosen["samples"], plain["samples"]
    pairs = zip(plain["answers"][:: each[1]], chosen["answers"][:: each[0]], strict=True)
    answers = [{"question": a["question"], "plain": a["answer"], "steered": b["answer"]} for a, b in pairs][:10]
    return _page(title, notes, key_of, plots, [("All cells", table)], answers)


def _page(
    title: str,
    notes: Sequence[str],
    key_of: Sequence[tuple[str, str]],
    plots: Sequence[str],
    tables: Sequence[tuple[str, Sequence[dict[str, Any]]]],
    answers: Sequence[dict[str, Any]],
) -> str:
    shown = "".join(f"<h2>{escape(name)}</h2><div class=wide>{_table(lines)}</div>" for name, lines in tables)
    said = "".join(
        f"<p><b>{escape(one['question'])}</b></p><blockquote>{escape(one['plain'])}</blockquote>"
        f"<blockquote style='border-color: var(--dial)'>{escape(one['steered'])}</blockquote>"
        for one in answers
    )
    told = "".join(f"<p>{escape(note)}</p>" for note in notes)
    keys = "".join(f"<span style='color: var(--{arm})'>{escape(name)}</span>" for arm, name in key_of)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style><body><h1>{escape(title)}</h1>{told}"
        f"<p class=key>{keys}<span>– – unsteered</span></p><div class=plots>{''.join(plots)}</div>{shown}"
        f"<h2>Answers, unsteered and steered, unedited</h2>{said}</body></html>"
    )


def _plot(
    name: str,
    lines: dict[str, list[tuple[float, float]]],
    level: float,
    dots: dict[str, list[tuple[float, Any]]] | None = None,
) -> str:
    """One figure against the strength: a line through `level` at 0 and each arm's points; the unsteered `level` is
    dashed, `dots` stand alone, with a bar where they have an interval."""
    dots = dots or {}
    values = [level, *(y for points in lines.values() for _, y in points)]
    values += [end for points in dots.values() for _, y in points for end in _ends(y)]
    finite = [y for y in values if math.isfinite(y)]
    low, high = min(0.0, *finite), max(finite, default=1.0) or 1.0
    widest = max((x for points in [*lines.values(), *dots.values()] for x, _ in points), default=1.0)

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (_WIDTH - _LEFT - _RIGHT) * x / widest
        return across, (_HEIGHT - _BOTTOM) * (1 - (y - low) / (high - low)) * 0.92 + 8

    parts = []
    for arm, points in lines.items():
        drawn = [at(x, y) for x, y in [(0.0, level), *sorted(points)] if math.isfinite(y)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        parts.append(f"<polyline class={arm} points='{line}' fill=none stroke-width=2 />")
        parts += [f"<circle class={arm} cx={x:.1f} cy={y:.1f} r=2.5 />" for x, y in drawn[1:]]
    for arm, points in dots.items():
        for across, y in points:
            (x, bottom), (_, top) = (at(across, end) for end in _ends(y))
            own = at(across, _value(y))[1]
            if all(map(math.isfinite, (x, bottom, top, own))):
                parts.append(f"<line class={arm} x1={x:.1f} x2={x:.1f} y1={bottom:.1f} y2={top:.1f} />")
                parts.append(f"<circle class={arm} cx={x:.1f} cy={own:.1f} r=4 fill=none />")
    _, dashed = at(0, level)
    ticks = "".join(
        f"<text x={_LEFT - 4} y={at(0, y)[1] + 3:.1f} text-anchor=end>{_cell(y)}</text>" for y in (low, high)
    ) + "".join(
        f"<text x={at(x, 0)[0]:.1f} y={_HEIGHT - 8} text-anchor=middle>{x:.2g}×</text>"
        for x in _apart(sorted({x for x, _ in lines["dial"]}), widest / 8)
    )
    return (
        f"<figure><figcaption>{escape(name)}</figcaption><svg width={_WIDTH} height={_HEIGHT} role=img "
        f"aria-label='{escape(name, quote=True)}'><line x1={_LEFT} x2={_WIDTH - _RIGHT} y1={dashed:.1f} "
        f"y2={dashed:.1f} stroke=currentColor stroke-dasharray='4 4' opacity=0.5 />{''.join(parts)}{ticks}"
        "</svg></figure>"
    )


def _apart(values: Sequence[float], least: float) -> list[float]:
    """Those of sorted values that have room for a label."""
    found: list[float] = []
    for value in values:
        if not found or value - found[-1] >= least:
            found.append(value)
    return found


def _value(figure: Any) -> float:
    return math.nan if figure is None else float(figure["value"] if isinstance(figure, dict) else figure)


def _ends(figure: Any) -> tuple[float, float]:
    """The interval of a figure; a bare one is its own."""
    return (figure["low"], figure["high"]) if isinstance(figure, dict) else (_value(figure), _value(figure))


def _table(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(_cell(row.get(name)))}</td>" for name in columns) for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['value']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
