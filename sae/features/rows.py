"""What a search gives: features in order, each with every score that is known of it, as text, JSON or HTML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from sae.errors import UserError
from sae.features.index import ContextToken, Example, Index

if TYPE_CHECKING:
    from jaxtyping import Float

    from sae.autoencoder import SAE

COLOURS = ("255,140,0", "0,140,255", "170,80,220", "0,170,90", "230,60,90")
"""Grounds of features that are shown together, the first also of one alone; they tell apart on white and on black."""
_LEVELS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
_USUAL = "1.5x"  # a strength to begin with where none was tried


@dataclass(frozen=True)
class Shown:
    """A place in the text as shown: the tokens around it, with the feature's activation at each where it is known."""

    act: float
    document: int
    topic: str
    tokens: list[ContextToken]

    def marked(self, maximum: float | None = None) -> str:
        """One line, the firing token in «»; with the feature's maximum every token that fires has its tenth of it."""
        parts = []
        for token in self.tokens:
            text = _in_marks(token.text) if token.firing and token.act != 0 else token.text
            parts.append(text if maximum is None else text + _level(token.text, token.act, maximum))
        return " ".join("".join(parts).split())

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        acts = [None if token.act is None else round(token.act, 3) for token in self.tokens]
        return {"act": self.act, "topic": self.topic, "text": self.marked(), "document": self.document,
                "tokens": [token.text for token in self.tokens], "acts": acts}  # fmt: skip

    def html(self, maximum: float) -> str:
        """The tokens, each on a ground as strong as it fires."""
        parts = []
        for token in self.tokens:
            act = token.act or 0.0
            share = act / maximum if maximum > 0 else 0.0
            parts.append(shaded(token.text, share, f"{act:.2f}", bold=token.firing))
        return "".join(parts)


def ground(share: float, colour: str = COLOURS[0]) -> str:
    """A CSS colour as strong as `share` (0..1), see-through, so that dark and light text stay readable on it."""
    return f"rgba({colour},{0.6 * min(1.0, max(0.0, share)):.2f})"


def shaded(text: str, share: float, title: str = "", *, colour: str = COLOURS[0], bold: bool = False) -> str:
    """Text as HTML on its ground."""
    style = f"background:{ground(share, colour)}" + (";font-weight:bold" if bold else "")
    told = f' title="{escape(title)}"' if title else ""
    return f'<span style="{style}"{told}>{escape(text)}</span>'


def _in_marks(text: str) -> str:
    word = text.lstrip()  # a token's space stands before the mark
    return f"{text[: len(text) - len(word)]}«{word}»" if word else f"«{text}»"


def _level(text: str, act: float | None, maximum: float) -> str:
    if not act or maximum <= 0:
        return ""
    tenth = min(10, int(10 * act / maximum + 0.999))
    level = "".join(_LEVELS[int(digit)] for digit in str(tenth))
    return f"⁽{level}⁾" if text[-1:].isdigit() else level


def shown(index: Index, feature: int, examples: Sequence[Example], *, before: int = 12, after: int = 8) -> list[Shown]:
    """Examples of a feature with their contexts, every token with its activation."""
    return [
        Shown(
            example.act,
            example.document,
            index.documents[example.document].topic,
            index.context(example.position, before, after, feature=feature),
        )
        for example in examples
    ]


@dataclass(frozen=True)
class Found:
    """A feature that a search found. What the way of searching, or a missing host, leaves unknown is None or empty."""

    feature: int
    score: float
    """What the list is ordered by; FeatureList.by names it."""
    density: float
    max_act: float
    label: str = ""
    """The user's own."""
    why: str = ""
    """What this way of searching says of it: the token it fires on, its cosine, …"""
    auroc: float | None = None
    """On the reported half: P(a text with the concept fires more strongly than one without)."""
    auroc_choosing: float | None = None
    """The same on the half that chose it: too high by luck, see FeatureList.noise."""
    mean_difference: float | None = None
    """Mean of max-pooled activations, with less without the concept, in units of the feature's maximum."""
    sensitivity: float | None = None
    """Share of the texts with the concept in which it fires."""
    specificity: float | None = None
    """Share of the texts without it in which it does not."""
    positives: int = 0
    """Texts with the concept in the reported half."""
    negatives: int = 0
    """Texts without it there."""
    output_score: float | None = None
    """How surely it makes the model say its own top tokens (methods 5.5)."""
    writes: float | None = None
    """Share of what it promotes and makes the model say that belongs to the concept."""
    tried: float | None = None
    """How much of the concept it wrote in a trial (trial.py), 0..1."""
    strength: float | None = None
    """The strength that did best in the trial, in multiples of the maximum that `sae steer` uses: the SAE's
    own statistics', or max_act where it has none. In a set of features, its share of it."""
    wrote: list[str] = field(default_factory=list)
    """The trial's answers at that strength."""
    fires_on: list[str] = field(default_factory=list)
    """Tokens that have most of its activation."""
    top_tokens: list[str] = field(default_factory=list)
    """What it promotes by the logit lens."""
    says: list[str] = field(default_factory=list)
    examples: list[Shown] = field(default_factory=list)

    @property
    def dial(self) -> str:
        """The feature with a strength to begin with, as `sae steer` and `steer(…)` take it."""
        return f"{self.feature}={_USUAL if self.strength is None else f'{self.strength:g}x'}"

    @property
    def steer(self) -> str:
        """The line of Python that steers with it."""
        feature, _, strength = self.dial.partition("=")
        return f'with steer(host, model, {{{feature}: "{strength}"}}): print(host.generate("Who are you?"))'

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(replace(self, examples=[])), "examples": [e.to_dict() for e in self.examples],
                "dial": self.dial}  # fmt: skip

    def row(self) -> dict[str, Any]:
        """One line of a table: the scores that are known."""
        trial = {} if self.tried is None else {"wrote": self.tried, "at": f"{self.strength:g}x"}
        weight = {} if self.tried is not None or self.strength is None else {"strength": f"{self.strength:g}x"}
        contrast = {} if self.auroc is None else {
            "auroc": self.auroc, "sens": self.sensitivity, "spec": self.specificity}  # fmt: skip
        return {
            "feature": str(self.feature),
            **({"label": self.label} if self.label else {}),
            **({"why": self.why} if self.why else {}),
            **contrast,
            **trial,
            **weight,
            "out": self.output_score,
            "density": self.density,
            "max": self.max_act,
            "fires on": " ".join(token.strip() for token in self.fires_on[:4]),
            "promotes": " ".join(token.strip() for token in self.top_tokens[:4]),
        }


@dataclass(frozen=True)
class FeatureList(Sequence[Found]):
    """Features in order. A notebook shows it as a table."""

    rows: list[Found]
    by: str
    """What they are ordered by."""
    texts: str = ""
    """What was compared, in words: where the texts came from."""
    noise: float | None = None
    """AUROC on the choosing half that the best of as many features reaches when the texts' labels are shuffled."""
    together: float | None = None
    """AUROC on the reported half of the weighted sum of a set of features."""
    host: str = ""
    """The model that the index was made with, where the SAE does not name its own."""

    @overload
    def __getitem__(self, at: int) -> Found: ...
    @overload
    def __getitem__(self, at: slice) -> list[Found]: ...
    def __getitem__(self, at: int | slice) -> Found | list[Found]:
        return self.rows[at]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Found]:
        return iter(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        own = {"by": self.by, "texts": self.texts, "noise": self.noise, "together": self.together}
        return own | {"features": [one.to_dict() for one in self]}

    def legend(self) -> str:
        """What the columns mean, of those shown, in a few lines."""
        if not self.rows:
            return f"nothing found (by {self.by}). Try other words, or another way: `sae find --help` lists them."
        parts = [f"ordered by {self.by}"]
        if self.texts:
            parts.append(f"compared: {self.texts}")
        first = self.rows[0]
        if first.auroc is not None:
            parts.append(
                f"auroc, sens, spec: on texts not used for choosing ({first.positives:,} with the concept, "
                f"{first.negatives:,} without); sens: share of those with it that fire, spec: of those without that "
                "do not"
            )
        if self.noise is not None:
            parts.append(f"on the choosing half pure noise reaches {self.noise:.2f} among so many features")
        if self.together is not None:
            parts.append(f"auroc of the weighted sum: {self.together:.3f}")
        if any(one.tried is not None for one in self):
            parts.append(
                "wrote, at: how many words of the concept and its texts two answers hold (0..1), at which strength"
            )
        if any(one.output_score is not None for one in self):
            parts.append("out: output score, how surely it makes the model say its own top tokens")
        else:
            parts.append("out: not known, the index was made without output scores (`sae index` makes them)")
        parts.append(
            "density: share of tokens at which it fires; max: its largest activation in the index's text; fires on: "
            "tokens that have most of its activation; promotes: tokens that its direction makes likelier (logit lens)"
        )
        return "\n".join(parts)

    def __repr__(self) -> str:
        return f"FeatureList({len(self)} by {self.by}: {', '.join(str(one.feature) for one in self)})"

    def _repr_html_(self) -> str:
        columns = list(dict.fromkeys(name for one in self for name in one.row()))
        head = "".join(f"<th>{escape(name)}</th>" for name in [*columns, "strongest", "steer"])
        body = []
        for one in self:
            row = one.row()
            cells = "".join(f"<td>{escape(_cell(row.get(name)))}</td>" for name in columns)
            strongest = one.examples[0].html(one.max_act) if one.examples else ""
            body.append(f"<tr>{cells}<td>{strongest}</td><td><code>{escape(one.steer)}</code></td></tr>")
        note = "<br>".join(escape(line) for line in self.legend().splitlines())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table><p>{note}</p>"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def filled(index: Index, found: Sequence[Found], sae: SAE | None = None, *, examples: int = 3) -> list[Found]:
    """What the index knows of each: statistics, tokens, scores and examples, where a search has not said them; with the
    SAE also the user's label."""
    lens, rows = index.lens, []
    labels = {} if sae is None else sae.labels
    for one in found:
        feature = one.feature
        score = float(lens["output_score"][feature]) if "output_score" in lens else float("nan")
        rows.append(
            replace(
                one,
                label=one.label or labels.get(feature, ""),
                output_score=one.output_score if score != score else score,
                fires_on=[token.text for token in index.top_tokens(feature, 10)],
                top_tokens=one.top_tokens or (index.strings(lens["top"][feature]) if "top" in lens else []),
                says=one.says or (index.strings(lens["says"][feature]) if "says" in lens else []),
                examples=shown(index, feature, index.examples(feature, examples)),
            )
        )
    return rows


def bare(index: Index, feature: int, score: float, why: str = "") -> Found:
    """A feature with its statistics."""
    density, max_act = index.stats["density"], index.stats["max_act"]
    return Found(feature, score, float(density[feature]), float(max_act[feature]), why=why)


def decoder_cosines(sae: SAE, direction: Float[Tensor, " d"]) -> Float[Tensor, " F"]:
    """Cosine of every decoder row with a direction."""
    rows = torch.nn.functional.normalize(sae.W_dec.detach().float().cpu(), dim=1)
    return rows @ torch.nn.functional.normalize(direction.detach().float().cpu(), dim=0)


def check_n(n: int) -> None:
    """Raise UserError unless a search is asked for at least one feature."""
    if n < 1:
        raise UserError(f"find: n is {n}, a search gives at least 1 feature. Use n=10.")
