"""A talk with the host while features are turned up and down: what `sae chat` does, without a terminal.

A line is either a command (it begins with "/") or said to the model; the whole talk so far is its prompt. Dials hold
from the next answer on and are set on one handle (`Steering.set`). An answer that is interrupted stays in the talk as
far as it came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sae import table
from sae.autoencoder import SAE
from sae.dials import Dial, parse_dials, parse_strength, raw_amount
from sae.errors import UserError
from sae.finding import find, host_of
from sae.host import Host
from sae.prompts import Messages
from sae.steering import steer

COMMANDS = """\
/feature 1286=5x   turn features up or down; a label may stand for a number, several with commas; alone: what is on
/strength 2x       another strength for the feature that was turned last
/find fog          features that detect a concept (needs `sae index`)
/off               all dials off; /off 1286: one of them
/new               forget the talk, keep the dials
/help, /quit       Ctrl-C stops an answer, Ctrl-D ends the talk"""


class Chat:
    """A talk in progress. `dials` are those that are set, by feature; `messages` what was said."""

    def __init__(
        self,
        folder: str | Path,
        dials: Sequence[str] = (),
        *,
        host: Host | str | None = None,
        system: str | None = None,
        how: dict[str, Any] | None = None,
        seed: int = 0,
        sampling: dict[str, Any] | None = None,
    ):
        self.folder = folder
        self.sae = SAE.load(folder)
        self.kind = (how or {}).get("kind", "clamp")
        self.dials: dict[int, Dial] = {}
        self.messages: Messages = []
        self.host = host_of(self.sae, host)
        self._system, self._seed, self._sampling = system, seed, sampling or {}
        self._handle = steer(self.host, self.sae, "off", **(how or {}))
        if dials:
            self._turn(parse_dials(dials, self.sae.labels, self.kind))

    def command(self, line: str) -> str:
        """What a command answers. Raises UserError where it is wrong; nothing has changed then."""
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if word == "/feature" and rest:
            self._turn(parse_dials([rest], self.sae.labels, self.kind))
        elif word == "/feature":
            return self.told()
        elif word == "/strength":
            self._strengthen(rest)
        elif word == "/off":
            self._off(rest)
        elif word == "/new":
            self.messages = []
            return "The talk begins anew."
        elif word == "/find":
            return self._found(rest)
        elif word == "/help":
            return COMMANDS
        else:
            raise UserError(f"{word} is not a command. /help lists them.")
        return self.told()

    def told(self) -> str:
        """The dials as one line."""
        if not self.dials:
            return "All dials are off."
        known = self.sae.labels
        return "Dials: " + ", ".join(
            f"{dial} ({known[i]})" if i in known else f"{dial}" for i, dial in self.dials.items()
        )

    def say(self, text: str, write: Callable[[str], None]) -> str:
        """The model's answer to a line, in pieces to `write` as it comes; KeyboardInterrupt ends it early."""
        pieces: list[str] = []

        def piece(text: str) -> None:
            pieces.append(text)
            write(text)

        self.messages.append({"role": "user", "content": text})
        try:
            with self._handle:
                self.host.generate(
                    self.messages,  # pyright: ignore[reportArgumentType]
                    system=self._system, stream=piece, seed=self._seed + len(self.messages), **self._sampling,
                )  # fmt: skip
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})
        return "".join(pieces)

    def _turn(self, dials: Sequence[Dial]) -> None:
        wanted = {**self.dials, **{dial.feature: dial for dial in dials}}
        self.sae.check_features(list(wanted))
        self._set({feature: dial for feature, dial in wanted.items() if dial.amount is not None})

    def _strengthen(self, strength: str) -> None:
        if not self.dials:
            raise UserError("/strength: no feature is turned. Write /feature 1286=5x first.")
        amount, per_max = parse_strength(strength)
        last = list(self.dials.values())[-1]
        self._turn([Dial(last.feature, amount, per_max, last.kind)])

    def _off(self, which: str) -> None:
        if not which:
            self._set({})
            return
        gone = [dial.feature for dial in parse_dials([f"{which}=off"], self.sae.labels)]
        if gone[0] not in self.dials:
            raise UserError(f"/off: {which} is not turned. {self.told()}")
        self._turn([Dial(gone[0], None)])

    def _set(self, wanted: dict[int, Dial]) -> None:
        for dial in wanted.values():
            raw_amount(dial, self.sae)
        self._handle.set([str(dial) for dial in wanted.values()] if wanted else "off")
        self.dials = wanted

    def _found(self, concept: str) -> str:
        if not concept:
            raise UserError("/find: nothing to look for. Write /find golden gate bridge.")
        found = find(self.folder, concept, n=5, host=self.host)
        return table.text([one.row() for one in found]) if len(found) else found.legend()
