"""A trial of candidates for steering: turn each up, let the host answer two neutral questions, count the
concept.

What a feature detects, and even the one token that it makes likely next, hardly tell what it makes the model
write about; this asks. Every feature is added at `times` × its own maximum (the one `sae steer` multiplies) at
the positions that steering edits, without reading the feature first, all features of a strength in one greedy batch.
An answer scores the concept words it holds (weights as in search.py, two full words are enough) × its share
of distinct word pairs, so that a loop counts little. Cost: features × strengths × questions answers of some
28 tokens. A hint of two questions per feature, to choose by: what is claimed of a feature is measured on
other prompts (steering/).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from sae.dials import Dial
from sae.interventions import Edit, feature_part
from sae.where import Where

if TYPE_CHECKING:
    from jaxtyping import Float

    from sae.autoencoder import SAE
    from sae.host import Host

QUESTIONS = ("Who are you?", "Tell me a short story.")
STRENGTHS = (1.0, 1.5, 2.5)


@dataclass(frozen=True)
class Tried:
    """The best of a feature's strengths: its mean score 0..1, the strength in ×max, and the answers there."""

    score: float
    times: float
    answers: list[str]


def can_steer(sae: SAE, host: Host) -> bool:
    """Whether its features can be turned in the residual stream: a transcoder's cannot."""
    return sae.cfg.d_out is None and sae.cfg.d_in == host.d_model


def try_out(
    host: Host,
    sae: SAE,
    features: Sequence[int],
    hook: str,
    max_act: Float[Tensor, " F"],
    words: Callable[[str], list[str]],
    weights: Mapping[str, float],
    *,
    questions: Sequence[str] = QUESTIONS,
    strengths: Sequence[float] = STRENGTHS,
    max_new_tokens: int = 28,
) -> list[Tried]:
    """Each feature's best trial. `words` splits a text as the keys of `weights` were made."""
    best: list[Tried] = [Tried(-1.0, 0.0, []) for _ in features]
    prompts = [question for question in questions for _ in features]
    where = Where("all", False, host.special_ids, sae.cfg.metadata.outlier_norm)
    for times in strengths:
        dials = [[Dial(feature, times * float(max_act[feature]), kind="add")] for feature in features]
        part = feature_part(sae, dials * len(questions), where)
        assert part is not None, "a candidate has a maximum"
        answers = host.generate(prompts, max_new_tokens=max_new_tokens, temperature=0, edits=[(hook, Edit((part,)))])
        for i in range(len(features)):
            own = answers[i :: len(features)]
            score = sum(concept_score(words(answer), weights) for answer in own) / len(own)
            if score > best[i].score:
                best[i] = Tried(score, times, own)
    return best


def answers(
    host: Host,
    sae: SAE,
    feature: int,
    hook: str,
    times: Sequence[float],
    question: str,
    *,
    max_act: float,
    max_new_tokens: int = 40,
) -> list[str]:
    """Greedy answers to one question with a feature held at multiples of its maximum (0: ablated)."""
    where = Where("all", False, host.special_ids, sae.cfg.metadata.outlier_norm)
    found = []
    for one in times:
        part = feature_part(sae, [Dial(feature, one * max_act)], where)
        assert part is not None, "a strength is no 'off'"
        found.append(
            host.generate(question, max_new_tokens=max_new_tokens, temperature=0, edits=[(hook, Edit((part,)))])
        )
    return found


def concept_score(words: Sequence[str], weights: Mapping[str, float]) -> float:
    """Weights of the distinct concept words over 2, at most 1, × the share of distinct word pairs."""
    pairs = list(zip(words, words[1:], strict=False))
    held = sum(weights.get(word, 0.0) for word in set(words))
    return min(1.0, held / 2) * (len(set(pairs)) / len(pairs) if pairs else 0.0)
