"""Sliders in a notebook: features are turned up and down, the plain and the steered answer stand below.

`Dial(host, sae, {2202: 0.87}, prompt="Who are you?")` as the last line of a cell shows a row for each feature (its
slider in multiples of the feature's maximum, and whether it is on at all), the prompt and both answers, the steered one
shaded as by `sae.compare`. A slider that is let go, or the button, asks anew; words come as they are written. The first
answers are made when it is made. `.ask(…)` does the same from Python, `.answers` are the last ones. Cost: a steered
answer a change, a plain one a prompt; the kernel is busy meanwhile, and what changed meanwhile is asked once, after it.
Needs anywidget (the extra `notebook`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae import dials
from sae.autoencoder import SAE
from sae.errors import UserError
from sae.features.rows import ground
from sae.host import Host
from sae.steering import Answers, steer
from sae.steering.answers import answers_of

START = 0.5  # of a feature that is given without a strength: small ones first
TOP = 2.0  # the end of a slider, where it does not start above


class Dial:
    """Sliders for features of an SAE; the page's docstring says what they do.

    dials      one feature, {2202: 0.87, 1493: "off"}, or as `steer` takes them as text: "the Golden Gate
               Bridge=0.87x". Here a plain number in a mapping is a multiple of the maximum, like the sliders
    sampling   goes to `host.generate` (max_new_tokens, temperature, top_p, seed, …)
    """

    def __init__(
        self,
        host: Host,
        sae: SAE | str | Path,
        dials: int | Mapping[Any, float | str | None] | str,
        prompt: str = "Who are you?",
        **sampling: Any,
    ):
        self.host = host
        self.sae = sae if isinstance(sae, SAE) else SAE.load(sae)
        self.strengths = _strengths(self.sae, dials)
        self.prompt = prompt
        self.answers: Answers
        self._sampling = sampling
        self._steering = steer(host, self.sae, _written(self.strengths))
        self._plain: tuple[str, str] | None = None  # a prompt and its answer
        labels = self.sae.labels
        self.widget: Any = _sliders()(
            features=[
                {"feature": feature, "label": labels.get(feature, ""), "top": max(TOP, strength or 0.0)}
                for feature, strength in self.strengths.items()
            ],
            request={"n": 0},
        )
        self._told = 0  # the number of the last request that came from here
        self.ask()
        self.widget.observe(self._requested, "request")

    def ask(self, prompt: str | None = None, strengths: Mapping[int, float | None] | None = None) -> Answers:
        """Answers to a prompt with these strengths (multiples of the maximum, None: off); what is not given stays.
        Sliders and prompt follow. Raises UserError for what `steer` or `host.generate` refuse."""
        self._answer(self.prompt if prompt is None else prompt, {**self.strengths, **(strengths or {})})
        self._told = self.widget.request["n"] + 1
        by_name = {str(feature): value for feature, value in self.strengths.items()}  # JSON knows no other keys
        self.widget.request = {"n": self._told, "prompt": self.prompt, "strengths": by_name}
        self._tell_all()
        return self.answers

    def _answer(self, prompt: str, strengths: dict[int, float | None]) -> None:
        self._steering.set(_written(strengths))
        if self._plain is None or self._plain[0] != prompt:
            self._plain = (prompt, self.host.generate(prompt, stream=self._piece(), **self._sampling))
        plain = self._plain[1]
        edits = self._steering.edits
        steered = self.host.generate(prompt, stream=self._piece(plain), edits=edits, **self._sampling)
        self.answers = answers_of(self.host, self._steering, prompt, plain, steered, **self._sampling)
        self.prompt, self.strengths = prompt, strengths

    def __repr__(self) -> str:
        return repr(self.answers)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        data, metadata = self.widget._repr_mimebundle_(**options)
        return {**data, "text/plain": repr(self)}, metadata

    def _requested(self, change: Mapping[str, Any]) -> None:
        """What the browser asks for; an answer that fails or is interrupted ends too, or the sliders would wait."""
        request = change["new"]
        if request["n"] == self._told:
            return
        error = "interrupted"
        try:
            self._answer(request["prompt"], {int(feature): value for feature, value in request["strengths"].items()})
            error = ""
        except UserError as refused:
            error = str(refused)
        finally:
            self._tell_all(error)

    def _piece(self, plain: str | None = None) -> Any:
        """Takes pieces of the plain answer, or with it those of the steered one, as they come."""
        pieces: list[str] = []

        def piece(text: str) -> None:
            pieces.append(text)
            so_far = "".join(pieces)
            self._tell(*((so_far, []) if plain is None else (plain, [[so_far, "", ""]])), done=False)

        return piece

    def _tell_all(self, error: str = "") -> None:
        pieces = [[one.text, ground(one.share, one.colour) if one.share > 0 else "", one.title]
                  for one in self.answers.shades()]  # fmt: skip
        self._tell(self.answers.plain, pieces, done=True, error=error)

    def _tell(self, plain: str, steered: list[list[str]], *, done: bool, error: str = "") -> None:
        n = self.widget.request["n"]
        self.widget.answer = {"n": n, "plain": plain, "steered": steered, "done": done, "error": error}


def _strengths(sae: SAE, given: int | Mapping[Any, float | str | None] | str) -> dict[int, float | None]:
    """Multiples of the maximum by feature."""
    if isinstance(given, int):
        given = {given: START}
    if isinstance(given, Mapping):
        given = {name: "off" if value is None else f"{value}x" if isinstance(value, int | float) else value
                 for name, value in given.items()}  # fmt: skip
    found: dict[int, float | None] = {}
    for dial in dials.parse_dials(given, sae.labels):
        slides = dial.kind == "clamp" and (dial.per_max or not dial.amount) and (dial.amount or 0.0) >= 0
        if not slides:
            raise UserError(f"Dial: {dial} is no place on a slider. Give multiples of the maximum from 0 up, or off.")
        dials.raw_amount(dials.Dial(dial.feature, 1.0, True), sae)  # it needs a maximum, also where it starts off
        found[dial.feature] = dial.amount
    return found


def _written(strengths: Mapping[int, float | None]) -> dict[int, str]:
    return {feature: "off" if value is None else f"{value}x" for feature, value in strengths.items()}


def _sliders() -> type:
    """The class of the front end, made here so that this page needs anywidget only where sliders are wanted."""
    try:
        import anywidget
        import traitlets
    except ImportError as error:
        raise UserError("sliders need anywidget. Run: pip install 'goldengate-sae[notebook]'") from error

    class Sliders(anywidget.AnyWidget):
        """`request` is the browser's (n counts them, prompt, strengths), `answer` Python's: that of request n."""

        _esm = Path(__file__).with_name("widgets.js")
        _css = Path(__file__).with_name("widgets.css")
        features = traitlets.List().tag(sync=True)
        request = traitlets.Dict().tag(sync=True)
        answer = traitlets.Dict().tag(sync=True)

    return Sliders
