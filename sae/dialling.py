"""What the verbs that turn features do, from folders: steer a prompt, calibrate a dial, measure its effects.

The long ones say first how long they take, and keep what they measured in a file, so that they go on after an
interruption.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae import bundled, files, labels
from sae.autoencoder import SAE
from sae.dials import Dials, parse_dials
from sae.documents import documents, part_of
from sae.errors import UserError
from sae.finding import host_of
from sae.host import Host
from sae.interventions import check_one_scale, check_steerable
from sae.steering import effects as effects_page
from sae.steering import side_by_side, steer
from sae.steering.calibrate import SHARES, Effort, Judge, shown, tokens_asked
from sae.steering.calibrate import calibrate as cells_of
from sae.steering.directions import typical_norm
from sae.steering.page import calibration as calibration_html
from sae.steering.page import html as effects_html
from sae.steering.scores import Lexicon

_TRY = 24  # tokens an answer
_FIXED = 5000  # tokens that could be written while a setting's texts and multiple-choice questions are read
HELD_OUT = 0.1  # of the bundled corpus, as recipes have it by default


def steer_prompt(
    sae: str | Path,
    dials: str | Sequence[str],
    prompt: str,
    *,
    host: Host | str | None = None,
    how: Mapping[str, Any] | None = None,
    stream_plain: Callable[[str], None] | None = None,
    stream_steered: Callable[[str], None] | None = None,
    **sampling: Any,
) -> tuple[str, str]:
    """The plain and the steered answer to one prompt; `how` are keywords of `steer` (kind, positions, when, …)."""
    loaded = SAE.load(sae)
    host = host_of(loaded, host)
    steering = steer(host, loaded, dials, **(how or {}))
    return side_by_side(host, steering, prompt, stream_plain=stream_plain, stream_steered=stream_steered, **sampling)


def calibrate(
    sae: str | Path,
    feature: int | str,
    names: Sequence[str] = (),
    parts: Sequence[str] = (),
    *,
    host: Host | str | None = None,
    effort: Effort | None = None,
    shares: Sequence[float] = SHARES,
    goal: str = "overall",
    keep: str | Path | None = None,
    html: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """How far to turn a feature (its number or label): the cells of `steering.calibrate`, chosen strength included.

    names    words that count as speaking of the concept; none: the feature's label without its article
    goal     what decides: "overall" (to the question too), "about" (whatever was asked) or "as" (speaks as the concept)
    keep     a JSON file that cells are kept in as they end; what stands in it for this feature is not asked again
    html     a self-contained page with the curves to write
    """
    loaded = SAE.load(sae)
    check_steerable(loaded)
    check_one_scale(loaded, "calibrate")
    number = feature if isinstance(feature, int) else labels.feature_of(feature, loaded.labels)
    lexicon, effort = _lexicon(loaded, number, names, parts), effort or Effort()
    host = host_of(loaded, host)
    facts = {"feature": number, "effort": dataclasses.asdict(effort), "shares": list(shares), "goal": goal}
    facts["host"] = host.fingerprint
    kept = _Kept(keep, sae, lexicon, facts, "arm")
    norm = typical_norm(host, loaded.cfg.metadata.hook_name)
    todo = tokens_asked(len(shares), effort)
    todo = round(todo * (1 - len(kept.cells) / (len(shares) + effort.random_features + 5)))
    say(f"about {todo:,} tokens to write, {_minutes(host, 2 * todo)}; {len(kept.cells)} cells are known")
    settings = {"known": list(kept.cells), "shares": shares, "effort": effort, "goal": goal}
    for cell in cells_of(host, loaded, number, lexicon, norm, **settings):
        kept.add(cell)
        about, overall = (cell[key]["value"] for key in ("about", "overall"))
        what = f"{cell['times']:.2f}x" if cell["half"] == "choosing" and cell["amount"] else cell["arm"]
        say(f"{cell['half']} {what}: about it {about:.0%}, overall {overall:.2f}")
    if html:
        title = f"How far to turn feature {number}" + (f", {loaded.labels[number]}" if number in loaded.labels else "")
        notes = [
            f"{host.name}, {Path(sae).name}, {loaded.cfg.metadata.hook_name}. Words of the concept: "
            f"{', '.join(lexicon.names)}. Strengths are multiples of the feature's maximum, chosen by: {goal}. "
            "Intervals are 95%, by bootstrap over questions; scores are by rules and say nothing of truth.",
        ]
        files.write_text(html, calibration_html(title, kept.cells, shown(kept.cells), notes))
    return kept.cells


def effects(
    sae: str | Path,
    dials: Dials,
    names: Sequence[str] = (),
    parts: Sequence[str] = (),
    *,
    host: Host | str | None = None,
    effort: Effort | None = None,
    factors: Sequence[float] = (0.5, 0.75, 1.0, 1.25),
    pairs: str = "all",
    keep: str | Path | None = None,
    html: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """What dials change besides: the rows of `steering.effects.report`, at these factors of the given strengths.

    names    words of the concept; none: the label of the first feature
    host     another host than the SAE's own, such as a LoRA adapter on it
    pairs    requests that are asked: "all" sixty pairs, or the thirty "held-out" ones where the host learned the rest
    keep     a JSON file that settings are kept in as they end
    html     a self-contained page to write
    """
    loaded = SAE.load(sae)
    check_steerable(loaded)
    parsed = [dial for dial in parse_dials(dials, loaded.labels) if dial.amount is not None]
    if not parsed or any(dial.kind != "clamp" for dial in parsed):
        raise UserError("effects: give features with strengths, such as 1286=5x; other kinds are not compared.")
    if any(dial.amount == 0 for dial in parsed):
        raise UserError("effects: a dial at 0 has no strengths between. Give another one, below 0 to turn it down.")
    if loaded.stats is None:
        raise UserError(f"{sae}: has no feature statistics to choose controls by. Run `sae index` first.")
    lexicon, effort = (
        _lexicon(loaded, parsed[0].feature, names, parts),
        effort or Effort(reporting=1, random_features=2),
    )
    host = host_of(loaded, host)
    facts = {"dials": [str(dial) for dial in parsed], "effort": dataclasses.asdict(effort), "factors": list(factors)}
    facts |= {"host": host.fingerprint, "pairs": pairs}
    kept = _Kept(keep, sae, lexicon, facts, "setting")
    held_out = itertools.islice((one for one in documents("bundled") if part_of(one, HELD_OUT) == "held_out"), 24)
    texts, questions = [document.text for document in held_out], bundled.questions()["reporting"]
    wanted = effects_page.settings(loaded, parsed, factors, effort.random_features)
    requests = bundled.requests(None if pairs == "all" else pairs)
    tokens = len(questions) * effort.reporting * effort.tokens + 2 * len(requests) * effects_page.REFUSAL_TOKENS
    todo = (2 * tokens + _FIXED) * (len(wanted) - len(kept.cells))
    say(f"{len(wanted)} settings, {_minutes(host, todo)}; {len(kept.cells)} are known")
    judge = Judge.of(host, lexicon, effort)
    for setting in wanted:
        if setting.key not in {cell["setting"] for cell in kept.cells}:
            kept.add(
                effects_page.measured(
                    host,
                    loaded,
                    judge,
                    setting,
                    texts,
                    questions,
                    requests,
                    effort,
                    lambda part, key=setting.key: say(f"{key}: {part} …"),
                )
            )
            answered = kept.cells[-1]["answers"]
            say(f"{setting.key}: about it {sum(one['about'] for one in answered) / len(answered):.0%}")
    rows = effects_page.report(kept.cells, loaded)
    if html:
        written = " ".join(str(dial) for dial in parsed)
        notes = [
            f"{host.name}, {Path(sae).name}, {loaded.cfg.metadata.hook_name}. Words of the concept: "
            f"{', '.join(lexicon.names)}. Strengths are factors of {written}; random features are "
            f"as long as the dial ({effort.random_features} of them, means). Intervals are 95%, by bootstrap over "
            "texts, items and pairs.",
            "Steering toward something harmless can change what a model refuses: what counts is the difference of the "
            "dial to the random features. Answers to requests are classed by rules and not kept.",
        ]
        tables = [*effects_page.shown(rows), ("Other features in the answers", effects_page.moved(rows))]
        page = effects_html(f"Effects of {written}", rows, tables, effects_page.beside(kept.cells), notes)
        files.write_text(html, page)
    return rows


class _Kept:
    """Cells of a long table, written to a file as they come; a file of other facts is refused."""

    def __init__(self, path: str | Path | None, sae: str | Path, lexicon: Lexicon, facts: dict[str, Any], key: str):
        own = [Path(sae) / name for name in ("sae_weights.safetensors", "feature_stats.safetensors")]
        facts = {
            "sae": [files.checksum(one) for one in own if one.exists()],
            "lexicon": dataclasses.asdict(lexicon),
            **facts,
        }
        self.path, self.facts = path, json.loads(files.json_text(facts))
        before = files.read_json_object(path, ("facts", "cells")) if path and Path(path).exists() else None
        if before is not None and before["facts"] != self.facts:
            other = ", ".join(name for name in self.facts if before["facts"].get(name) != self.facts[name])
            raise UserError(f"{path}: has the cells of another feature or setting ({other}). Give another file.")
        self.cells: list[dict[str, Any]] = before["cells"] if before else []
        if not isinstance(self.cells, list) or not all(isinstance(one, dict) and key in one for one in self.cells):
            raise UserError(f"{path}: its cells are damaged. Give another file or remove it.")

    def add(self, cell: dict[str, Any]) -> None:
        self.cells.append(cell)
        if self.path:
            files.write_json(self.path, {"facts": self.facts, "cells": self.cells})


def _lexicon(sae: SAE, feature: int, names: Sequence[str], parts: Sequence[str]) -> Lexicon:
    sae.check_features([feature])
    label = re.sub(r"^(the|an?) ", "", sae.labels.get(feature, ""))
    if not names and not label:
        raise UserError(
            f"feature {feature} has no label. Say what counts as its concept: --names 'golden gate,bridge'."
        )
    return Lexicon(tuple(names) or (label,), tuple(parts))


def _minutes(host: Host, tokens: int) -> str:
    """How long the host writes so many tokens in batches, from a short try."""
    start = time.perf_counter()
    host.generate(bundled.questions()["reporting"][:32], max_new_tokens=_TRY, temperature=0)
    return f"about {max(1, round(tokens * (time.perf_counter() - start) / (32 * _TRY) / 60))} min"
