"""The plain and the steered answer to one prompt as one object, which a notebook shows side by side.

`compare(host, steer(…), prompt)` asks twice with one seed and sampling. Where features of an SAE are dialled, every
token of the steered answer lies on a ground as strong as the feature fires there in multiples of its maximum, read by
the unsteered host over prompt and answer: the shade says what the text holds, not what was pushed in. Several
features have a colour each, and a token has that of the one that fires strongest there. Cost: two answers and one
forward. Limits: the answer's text is tokenized anew for reading; where these tokens do not add up to it again, it is
shown unshaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae import prompts
from sae.errors import UserError
from sae.features.rows import COLOURS, shaded
from sae.host import Host
from sae.steering.handle import Steering, side_by_side

if TYPE_CHECKING:
    from sae.prompts import Messages

_CELL = "text-align:left;vertical-align:top;white-space:pre-wrap;width:50%"


@dataclass(frozen=True)
class Reading:
    """How strongly one feature fires at each piece of an answer, in multiples of its maximum (0 where it is silent)."""

    feature: int
    label: str
    shares: list[float]


class Shade(NamedTuple):
    """A piece of an answer: the largest share at it, whose colour that is, and all of them in words."""

    text: str
    share: float
    colour: str
    title: str


@dataclass(frozen=True, repr=False)
class Answers:
    """Both answers, the dials as they are written; printed as text, shown in a notebook as a table.

    pieces     the steered answer's tokens; they add up to it
    readings   one for each dialled feature, a share for each piece
    """

    prompt: str
    dials: list[str]
    plain: str
    steered: str
    pieces: list[str]
    readings: list[Reading]

    def __repr__(self) -> str:
        return f"── plain ──\n{self.plain}\n\n── {self._told} ──\n{self.steered}"

    def _repr_html_(self) -> str:
        heads = "".join(f'<th style="{_CELL}">{escape(name)}</th>' for name in ("plain", self._told))
        cells = "".join(f'<td style="{_CELL}">{text}</td>' for text in (escape(self.plain), self._shaded()))
        key = " · ".join(
            shaded(f"{one.feature}{f' ({one.label})' if one.label else ''}", 1.0, colour=_colour(i))
            for i, one in enumerate(self.readings)
        )
        note = f"<p>shaded: where the answer's text fires {key}, to the unsteered model</p>" if key else ""
        return (
            f"<p><b>{escape(self.prompt)}</b></p><table style='width:100%'><thead><tr>{heads}</tr></thead>"
            f"<tbody><tr>{cells}</tr></tbody></table>{note}"
        )

    @property
    def _told(self) -> str:
        return ", ".join(self.dials) or "off"

    def shades(self) -> list[Shade]:
        """The steered answer piece by piece, each with the ground that shows which feature fires there most."""
        found = []
        for at, piece in enumerate(self.pieces):
            shares = [one.shares[at] for one in self.readings]
            most = max(range(len(shares)), key=shares.__getitem__, default=0)
            title = ", ".join(f"{one.feature}: {one.shares[at]:.2f}x" for one in self.readings if one.shares[at] > 0)
            found.append(Shade(piece, shares[most] if shares else 0.0, _colour(most), title))
        return found

    def _shaded(self) -> str:
        return "".join(
            shaded(one.text, one.share, one.title, colour=one.colour) if one.share > 0 else escape(one.text)
            for one in self.shades()
        )


def compare(host: Host, steering: Steering, prompt: str | Messages, **sampling: Any) -> Answers:
    """The unsteered and the steered answer to one prompt (text, or messages of a talk).

    `sampling` goes to `host.generate` (max_new_tokens, temperature, top_p, seed, chat, system, stream_plain, …).
    Raises UserError for a batch of prompts, and where the handle is attached: both answers would be steered.
    """
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt and isinstance(prompt[0], dict)):
        raise UserError("compare: takes one prompt, text or messages. Call it once for each prompt of a batch.")
    if steering.is_attached:
        raise UserError("compare: the handle is attached, the plain answer would be steered too. Call it outside.")
    plain, steered = side_by_side(host, steering, prompt, **sampling)
    return answers_of(host, steering, prompt, plain, steered, **sampling)


def answers_of(
    host: Host, steering: Steering, prompt: str | Messages, plain: str, steered: str, **sampling: Any
) -> Answers:
    """Two answers that are there already, as `compare` shows them; `sampling` as it was for them."""
    how = {name: sampling[name] for name in ("chat", "system") if name in sampling}
    pieces, readings = read(host, steering, prompt, steered, **how)
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return Answers(asked, [dial for one in steering.turned for dial in one.dials], plain, steered, pieces, readings)


@torch.no_grad()
def read(
    host: Host,
    steering: Steering,
    prompt: str | Messages,
    answer: str,
    *,
    chat: bool = True,
    system: str | None = None,
) -> tuple[list[str], list[Reading]]:
    """The answer's tokens as text, and how strongly every dialled feature fires at them (`Answers`); nothing where no
    feature is dialled."""
    dialled = [(one.sae, one.features) for one in steering.turned if one.sae is not None and one.features]
    ids = host.tokenizer(answer, add_special_tokens=False)["input_ids"]
    pieces, spans = _pieces(host, ids)
    if not dialled or not ids or "".join(pieces) != answer:
        return [answer], []
    before, _, _ = prompts.token_rows(host.tokenizer, prompt, chat, system, host.name)
    tokens = torch.cat([before[0], torch.tensor(ids)])[None]
    hooks = [host.hook(sae.cfg.metadata.hook_name) for sae, _ in dialled]
    acts = host.activations(tokens, hooks)
    readings = []
    for (sae, features), hook in zip(dialled, hooks, strict=True):
        fired = sae.feature_acts(acts[hook][0, -len(ids) :].to(sae.device, sae.dtype), features).float().cpu()
        for feature, own in zip(features, fired.T, strict=True):
            maximum = float(own.max() if sae.stats is None else sae.stats.max_act[feature])
            shares = (own / maximum).tolist() if maximum > 0 else [0.0] * len(ids)
            by_piece = [max(shares[start:stop]) for start, stop in spans]
            readings.append(Reading(feature, sae.labels.get(feature, ""), by_piece))
    return pieces, readings


def _pieces(host: Host, ids: Sequence[int]) -> tuple[list[str], list[tuple[int, int]]]:
    """The text that tokens write, and which tokens wrote each piece: several where one character needs them."""
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    streamer = prompts.Streamer(host.tokenizer, pieces.append)
    streamer.put(torch.tensor([]))  # the prompt, which it leaves out
    for at, token in enumerate(ids):
        streamer.put(torch.tensor([token]))
        if len(pieces) > len(spans):
            spans.append((spans[-1][1] if spans else 0, at + 1))
    streamer.end()
    if len(pieces) > len(spans):
        spans.append((spans[-1][1] if spans else 0, len(ids)))
    return pieces, spans


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]
