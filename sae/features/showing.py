"""One feature, whole: how often and how strongly it fires, on what, with what, what it promotes, what it makes the host
say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Any

from sae.features.gather import LOWEST, SAMPLED
from sae.features.index import Index, TopToken
from sae.features.rows import Shown, decoder_cosines, shown
from sae.features.trial import answers, can_steer

if TYPE_CHECKING:
    from sae.autoencoder import SAE
    from sae.host import Host

TIMES = (0.0, 3.0, 10.0)
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Feature:
    """Everything the index and the SAE know about one feature; activations in raw units."""

    feature: int
    max_act: float
    p999: float
    density: float
    document_density: float
    n_tokens: int
    bands: list[int]
    """Firing tokens in each tenth of [0, max_act]."""
    octaves: dict[str, int]
    """Firing tokens by strength, in octaves: {"4": …} counts those from 4 to 8."""
    output_score: float | None
    top_tokens: list[tuple[str, float]]
    """What its direction promotes by the logit lens; values are logits for a unit of activation, less their
    mean."""
    bottom_tokens: list[tuple[str, float]]
    says: list[tuple[str, float]]
    """What it makes the model say: the tokens that gain most at 5× its maximum, with their probability
    then."""
    neighbours: list[tuple[int, float]]
    """Features with the closest decoder rows, with the cosine."""
    examples: list[Shown]
    """The strongest, at most one a document."""
    label: str = ""
    fires_on: list[TopToken] = field(default_factory=list)
    cofiring: list[tuple[int, float, int]] = field(default_factory=list)
    """(feature, Jaccard, tokens of both) of those that fire at the same tokens."""
    by_band: list[list[Shown]] = field(default_factory=list)
    """Random places from each tenth of [0, max_act], the weakest first."""
    silent: list[Shown] = field(default_factory=list)
    """Random places in documents in which it never fires."""
    dial_max: float | None = None
    """The maximum that a dial multiplies: the SAE's own statistics' where it has some, else the index's."""
    answers: dict[str, str] = field(default_factory=dict)
    """What the model answers with the feature held at multiples of its maximum: {"3x": …}."""
    question: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        own = asdict(replace(self, examples=[], by_band=[], silent=[], fires_on=[]))
        return own | {
            "fires_on": [token._asdict() for token in self.fires_on],
            "examples": [example.to_dict() for example in self.examples],
            "by_band": [[example.to_dict() for example in band] for band in self.by_band],
            "silent": [example.to_dict() for example in self.silent],
        }

    def facts(self) -> dict[str, Any]:
        """Name and value of what fits on a line."""
        rows = {
            "feature": str(self.feature),
            "label": self.label,
            "density": self.density,
            "share of documents": self.document_density,
            "max": self.max_act,
            "max that dials multiply": "" if self.dial_max is None else self.dial_max,
            "99.9th percentile": self.p999,
            "firing by tenth of max": " ".join(f"{count:,}" for count in self.bands),
            "firing by strength": _spread(self.octaves),
            "fires on": " ".join(f"{one.text.strip()} {one.share:.0%}" for one in self.fires_on[:8]),
            "output score": self.output_score,
            "promotes": _words(self.top_tokens),
            "suppresses": _words(self.bottom_tokens),
            "makes it say": _words(self.says),
            "neighbours (cosine)": ", ".join(f"{other} ({cosine:.2f})" for other, cosine in self.neighbours[:5]),
            "fires with (Jaccard)": ", ".join(f"{other} ({share:.2f})" for other, share, _ in self.cofiring[:5]),
        }
        return {name: value for name, value in rows.items() if value != ""}

    def sections(self) -> list[tuple[str, list[str]]]:
        """Headings with lines of text: examples by tenth, silent places, answers."""
        strongest = [_line(one, self.max_act) for one in self.examples]
        parts = [("strongest (superscripts: tenths of its maximum)", strongest)]
        for tenth, band in reversed(list(enumerate(self.by_band))):
            if band:
                about = "about " if sum(self.bands) > SAMPLED else ""  # else the sample has all of them
                title = f"{tenth / 10:.1f} to {(tenth + 1) / 10:.1f} of max ({about}{self.bands[tenth]:,} tokens)"
                parts.append((title, [_line(one, self.max_act) for one in band[:3]]))
        if self.silent:
            parts.append(("where it never fires", [one.marked() for one in self.silent]))
        if self.answers:
            lines = [f"{times:>4}  {' '.join(answer.split())}" for times, answer in self.answers.items()]
            parts.append((f"'{self.question}' with the feature held at", lines))
        return parts

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(f'{v:.3g}' if isinstance(v, float) else str(v))}</td></tr>"
            for name, v in self.facts().items()
        )
        parts = [f"<table>{rows}</table><h4>strongest</h4>", _list(self.examples, self.max_act)]
        for tenth, band in reversed(list(enumerate(self.by_band))):
            if band:
                parts.append(f"<h4>{tenth / 10:.1f} to {(tenth + 1) / 10:.1f} of max</h4>{_list(band, self.max_act)}")
        if self.answers:
            lines = "".join(f"<dt>{escape(t)}</dt><dd>{escape(a)}</dd>" for t, a in self.answers.items())
            parts.append(f"<h4>{escape(self.question)}</h4><dl>{lines}</dl>")
        return "".join(parts)


def show(
    index: Index,
    feature: int,
    sae: SAE | None = None,
    host: Host | None = None,
    *,
    n: int = 10,
    question: str = "Who are you?",
) -> Feature:
    """One feature, whole; with the SAE its nearest neighbours and the user's label, with the host its answers to a
    question at 0, 3 and 10 times its maximum (greedy). Raises UserError for a feature out of range."""
    index.check_feature(feature)
    stats, lens = index.stats, index.lens

    def tokens(name: str, values: str) -> list[tuple[str, float]]:
        if name not in lens:
            return []
        pairs = zip(lens[name][feature].tolist(), lens[values][feature].tolist(), strict=True)
        return [(index.token(token), value) for token, value in pairs if token >= 0]

    score = float(lens["output_score"][feature]) if "output_score" in lens else math.nan
    asked: dict[str, str] = {}
    if sae is not None and host is not None and stats["max_act"][feature] > 0 and can_steer(sae, host):
        maxima = stats["max_act"] if sae.stats is None else sae.stats.max_act  # what `sae steer` multiplies
        found = answers(host, sae, feature, index.facts.hook, TIMES, question, max_act=float(maxima[feature]))
        asked = dict(zip((f"{times:g}x" for times in TIMES), found, strict=True))
    return Feature(
        feature=feature,
        max_act=float(stats["max_act"][feature]),
        p999=float(stats["p999"][feature]),
        density=float(stats["density"][feature]),
        document_density=float(stats["document_density"][feature]),
        n_tokens=index.facts.n_tokens,
        bands=stats["bands"][feature].tolist(),
        octaves=_octaves(stats["octaves"][feature].tolist()),
        output_score=None if math.isnan(score) else score,
        top_tokens=tokens("top", "top_values"),
        bottom_tokens=tokens("bottom", "bottom_values"),
        says=tokens("says", "says_p"),
        neighbours=neighbours(sae, feature, n) if sae is not None else [],
        examples=shown(index, feature, index.examples(feature, n)),
        label="" if sae is None else sae.labels.get(feature, ""),
        fires_on=index.top_tokens(feature, 20),
        cofiring=index.cofiring(feature, n),
        by_band=[shown(index, feature, band) for band in index.by_band(feature)],
        silent=shown(index, feature, index.silent(feature, 3)),
        dial_max=None if sae is None or sae.stats is None else float(sae.stats.max_act[feature]),
        answers=asked,
        question=question if asked else "",
    )


def neighbours(sae: SAE, feature: int, n: int = 10) -> list[tuple[int, float]]:
    """The features whose decoder rows have the largest cosine with this one's, itself left out."""
    sae.check_features([feature])
    cosine = decoder_cosines(sae, sae.W_dec[feature])
    cosine[feature] = -2
    best = cosine.topk(min(n, len(cosine) - 1))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _octaves(counts: Sequence[int]) -> dict[str, int]:
    fired = [i for i, count in enumerate(counts) if count]
    return {f"{2.0 ** (LOWEST + i):g}": counts[i] for i in range(fired[0], fired[-1] + 1)} if fired else {}


def _spread(octaves: dict[str, int]) -> str:
    if not octaves:
        return ""
    edges = [float(edge) for edge in octaves]
    return f"from {edges[0]:g} {_bars(list(octaves.values()))} to {2 * edges[-1]:g}, a bar an octave, log scale"


def _bars(counts: Sequence[int]) -> str:
    """One character a count, on a logarithmic scale: strengths fall off exponentially."""
    top = math.log1p(max(counts))
    return "".join(" " if not c else _BARS[min(7, int(8 * math.log1p(c) / top))] for c in counts)


def _words(pairs: Sequence[tuple[str, float]]) -> str:
    return " ".join(token.strip() for token, _ in pairs[:10])


def _line(one: Shown, maximum: float) -> str:
    return f"{one.act:>6.3g}  {one.marked(maximum)}"


def _list(places: Sequence[Shown], maximum: float) -> str:
    return "<ul>" + "".join(f"<li>{one.act:.3g} {one.html(maximum)}</li>" for one in places) + "</ul>"
