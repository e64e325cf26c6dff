"""Dials as people write them: which feature, what is done to it, how far.

`1286=5x` holds feature 1286 at five times its recorded maximum; a plain number is raw units (decoder rows have
length 1), `0x` takes it out, `off` leaves it alone. Other signs: `+=` adds, `*=` multiplies what is there, `>=` raises
to at least, `<=` lowers to at most. A label may stand for the number. Conditions are written `77>0.5x` or `77<2`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sae.autoencoder import SAE
from sae.errors import UserError, nearest
from sae.labels import feature_of

KINDS = ("clamp", "add", "scale", "ablate", "floor", "ceil")
SIGNS = {"+=": "add", "*=": "scale", ">=": "floor", "<=": "ceil"}

Strength = str | float | int
Dials = str | Mapping[int, Strength] | Mapping[str, Strength] | Iterable[str]

_STRENGTH = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(x|×)?", re.IGNORECASE)
_DIAL = re.compile(r"(.*?)\s*([+*<>]?=)\s*([^=]*)", re.DOTALL)
_MOST = 1e6  # the largest strength; float32 arithmetic stays finite far beyond any use


@dataclass(frozen=True)
class Dial:
    """One feature's setting: `amount` in raw units, or in multiples of its maximum (`per_max`); None: off."""

    feature: int
    amount: float | None
    per_max: bool = False
    kind: str = "clamp"

    def __str__(self) -> str:
        sign = next((sign for sign, kind in SIGNS.items() if kind == self.kind), "=")
        if self.amount is None:
            return f"{self.feature}{sign}off"
        return f"{self.feature}{sign}{self.amount:g}{'x' if self.per_max else ''}"


@dataclass(frozen=True)
class Condition:
    """A feature fires above an amount (or, with `above` False, below it)."""

    feature: int
    amount: float
    per_max: bool = False
    above: bool = True

    def __str__(self) -> str:
        return f"{self.feature}{'>' if self.above else '<'}{self.amount:g}{'x' if self.per_max else ''}"


def parse_strength(strength: Strength) -> tuple[float | None, bool]:
    """(amount, per_max) of "5x", "-2x", "0x", 12.5, "12.5" or "off"; off has no amount."""
    text = str(strength).strip()
    if text.lower() == "off":
        return None, False
    match = _STRENGTH.fullmatch(text)
    if match is None or not math.isfinite(float(match[1])):
        raise UserError(
            f"strength: '{text[:60]}' is not one. Write 5x (times the feature's maximum), 12.5 (raw units), "
            "0x (ablation) or off."
        )
    if abs(float(match[1])) > _MOST:
        raise UserError(f"strength: '{text[:60]}' is too large. Give at most {_MOST:,.0f}; often 1x is enough.")
    return float(match[1]), match[2] is not None


def parse_dial(text: str, kind: str = "clamp") -> Dial:
    """A dial as it is written on a command line: "1286=5x". `kind` is what a plain "=" means."""
    match = _DIAL.fullmatch(text)
    if match is None:
        raise UserError(f"dial: '{text[:60]}' has no '='. Write FEATURE=STRENGTH, for example 1286=5x.")
    return Dial(_feature_number(match[1]), *parse_strength(match[3]), SIGNS.get(match[2], kind))


def parse_dials(dials: Dials, labels: Mapping[int, str] | None = None, kind: str = "clamp") -> list[Dial]:
    """Dials of "1286=5x, 77+=2" (commas or spaces), of a list of such, or of {1286: "5x"}; "off" alone: none.

    labels   names that may stand for numbers: a whole label in a string, in a list or a mapping also part of one
    kind     what a plain "=" means; a mapping's strength may begin with another sign: {1286: "+=5x"}
    """
    if kind not in KINDS:
        raise UserError(f"kind: '{kind}' is not one of {', '.join(KINDS)}{nearest(kind, KINDS)}. Choose one of them.")
    if isinstance(dials, Mapping):
        parsed = [
            parse_dial(f"{_numbered(str(feature), labels)}{'' if str(value)[:2] in SIGNS else '='}{value}", kind)
            for feature, value in dials.items()
        ]
    else:
        words = (
            _unlabelled(dials, labels)
            if isinstance(dials, str)
            else ",".join(_unlabelled(dial, labels, part=True) for dial in dials)
        )
        if words.strip().lower() == "off":
            return []
        joined = re.sub(r"\s*([+*<>]?=)\s*", r"\1", words)
        parsed = [parse_dial(word, kind) for word in re.split(r"[,\s]+", joined) if word]
    if not parsed:
        raise UserError("dials: none given. Write FEATURE=STRENGTH, for example 1286=5x.")
    seen: set[int] = set()
    for dial in parsed:
        if dial.feature in seen:
            raise UserError(f"dials: feature {dial.feature} is set twice. Give each feature once.")
        seen.add(dial.feature)
    return parsed


def parse_condition(text: str, labels: Mapping[int, str] | None = None) -> Condition:
    """A condition as it is written: 77>0.5x, the Golden Gate Bridge<2."""
    match = re.fullmatch(r"(.*?)\s*([<>])\s*([^<>=]*)", text.strip(), re.DOTALL)
    if match is None:
        raise UserError(f"condition: '{text[:60]}' is not one. Write FEATURE>STRENGTH, for example 77>0.5x.")
    amount, per_max = parse_strength(match[3])
    if amount is None:
        raise UserError(f"condition: '{text[:60]}' has no strength. Write FEATURE>STRENGTH, for example 77>0.5x.")
    return Condition(_feature_number(_numbered(match[1], labels)), amount, per_max, match[2] == ">")


def _unlabelled(text: str, labels: Mapping[int, str] | None, *, part: bool = False) -> str:
    """Dials with numbers in place of labels."""
    for feature, label in sorted((labels or {}).items(), key=lambda known: -len(known[1])):
        pattern = rf"(?:(?<=[,\s])|(?<!.)){re.escape(label)}(?=\s*[+*<>]?=)"
        text = re.sub(pattern, str(feature), text, flags=re.IGNORECASE)
    match = _DIAL.fullmatch(text)
    return f"{_numbered(match[1], labels)}{match[2]}{match[3]}" if part and match and "=" not in match[1] else text


def _numbered(name: str, labels: Mapping[int, str] | None) -> str:
    """The number of a label; anything else as it is, for the message about it."""
    name = name.strip()
    plain = not labels or not name or re.fullmatch(r"[-+]?\d+", name)
    return name if plain else str(feature_of(name, labels or {}))


def _feature_number(feature: str | int) -> int:
    text = str(feature).strip()
    if not re.fullmatch(r"-?\d{1,18}", text):
        raise UserError(f"dial: '{text[:60]}' is not a feature's number. Write FEATURE=STRENGTH, for example 1286=5x.")
    return int(text)


def raw_amount(dial: Dial | Condition, sae: SAE) -> float:
    """A dial's amount in raw units ('scale': the factor itself), after a check of range and statistics."""
    sae.check_features([dial.feature])
    assert dial.amount is not None, "an off dial has no amount"
    if not dial.per_max or dial.amount == 0 or (isinstance(dial, Dial) and dial.kind in ("scale", "ablate")):
        return dial.amount
    if sae.stats is None:
        raise UserError(
            f"{dial}: the SAE's folder has no feature statistics to take multiples of (`sae index` takes them). "
            f"Give the strength in raw units: {dial.feature}=12.5."
        )
    maximum = float(sae.stats.max_act[dial.feature])
    if maximum <= 0:
        raise UserError(
            f"{dial}: the feature never fired in {sae.stats.n_tokens} tokens, so it has no maximum. Give the "
            f"strength in raw units ({dial.feature}=12.5) or choose a living feature."
        )
    return dial.amount * maximum
