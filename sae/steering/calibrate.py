"""How far to turn a feature: strengths are chosen on one half of the questions and reported on the other.

Every strength answers the choosing questions. Chosen is the one with the highest mean harmonic score (concept,
instruction, fluency; AxBench's, by the rules of scores.py), or with the most fluent answers about the concept, among
those that repeat less than a fifth of their 4-grams. The reporting questions then get it, nothing twice (two seeds:
what noise alone does), random living features and a random direction at the same length. Strengths are shares of the
residual's typical norm at the hook, told also as multiples of the feature's maximum. Answers of all strengths are one
batch, a dial of its own in each row. Cells are yielded as they end, so that a caller can keep them and go on later.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae import bundled
from sae.autoencoder import SAE
from sae.dials import Dial
from sae.errors import UserError
from sae.evaluation.intervals import multinomial
from sae.host import Host
from sae.interventions import Edit, check_one_scale, check_steerable, direction_part, feature_part
from sae.steering import scores
from sae.steering.scores import Lexicon, Relevance
from sae.where import Where

if TYPE_CHECKING:
    from jaxtyping import Float

SHARES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.36, 0.42, 0.5, 0.6)
OFF = "off"
GOALS = {"overall": "overall", "about": "about", "as": "speaks as"}  # words for what decides, and the score behind them
DENSEST = 0.1  # a control fires in no more of the tokens


@dataclass(frozen=True)
class Effort:
    """How much is asked: tokens an answer, rows a batch; samples a question where strengths are chosen, where what was
    chosen is reported, and of the controls."""

    choosing: int = 1
    reporting: int = 3
    controls: int = 1
    tokens: int = 64
    temperature: float = 0.7
    top_p: float = 0.9
    batch: int = 96
    random_features: int = 5


@dataclass(frozen=True)
class Judge:
    """What answers are scored by: the concept's words, and what unsteered answers say of fluency and relevance."""

    host: Host
    lexicon: Lexicon
    limit: float
    relevance: Relevance

    @classmethod
    def of(cls, host: Host, lexicon: Lexicon, effort: Effort) -> Judge:
        """From unsteered answers to the choosing questions, two samples each."""
        questions = [question for question in bundled.questions()["choosing"] for _ in range(2)]
        texts = host.generate(
            questions, max_new_tokens=effort.tokens, temperature=effort.temperature, top_p=effort.top_p, seed=0
        )
        found = [value for value in scores.perplexity(host, questions, texts) if math.isfinite(value)]
        return cls(host, lexicon, float(torch.tensor(found).quantile(0.95)), Relevance.of(host, questions, texts))

    def scored(self, questions: Sequence[str], texts: Sequence[str]) -> list[dict[str, Any]]:
        """One dict an answer."""
        perplexities = scores.perplexity(self.host, questions, texts)
        gained = scores.nats_gained(self.host, questions, texts, own=perplexities).tolist()
        found = []
        for question, text, perplexity, nats in zip(questions, texts, perplexities, gained, strict=True):
            repetition = scores.repetition(text)
            concept = scores.concept(text, self.lexicon, question)
            instruct, fluency = self.relevance.score(nats), scores.fluency(perplexity, repetition, self.limit)
            found.append(
                {
                    "question": question, "answer": text, "concept": concept, "instruct": instruct, "fluency": fluency,
                    "overall": scores.overall(concept, instruct, fluency), "about": concept == 2 and fluency >= 1,
                    "speaks as": scores.speaks_as(text, self.lexicon), "perplexity": perplexity,
                    "repetition": repetition, "distinct-2": scores.distinct(text, 2), "refuses": scores.refuses(text),
                    "words": len(text.split()),
                }
            )  # fmt: skip
        return found


@dataclass(frozen=True)
class Arm:
    """One way to answer: features clamped, a direction added, or nothing.

    amount     in raw units; each feature is clamped at this times its weight
    """

    name: str
    amount: float = 0.0
    samples: int = 1
    features: Mapping[int, float] = field(default_factory=dict)
    vector: Float[Tensor, " d"] | None = None
    seed: int = 0


@torch.no_grad()
def answers(
    host: Host, sae: SAE, hook: str, where: Where, arms: Sequence[Arm], questions: Sequence[str], effort: Effort
) -> Iterator[tuple[Arm, list[str], list[str]]]:
    """Each arm with its questions and answers as it ends, its samples of each question after each other; batched across
    arms of a seed and a kind, so that an arm asked among others draws otherwise."""
    for arm_group in _groups(arms):
        rows = [(arm, question) for arm in arm_group for question in questions for _ in range(arm.samples)]
        waiting = list(arm_group)
        texts: list[str] = []
        for start in range(0, len(rows), effort.batch):
            some = rows[start : start + effort.batch]
            texts += host.generate(
                [question for _, question in some], max_new_tokens=effort.tokens, temperature=effort.temperature,
                top_p=effort.top_p, seed=1000 * arm_group[0].seed + start, edits=[(hook, _edit(sae, where, some))],
            )  # fmt: skip
            while waiting and len(texts) >= waiting[0].samples * len(questions):
                asked = [question for question in questions for _ in range(waiting[0].samples)]
                yield waiting.pop(0), asked, texts[: len(asked)]
                del texts[: len(asked)]


def _groups(arms: Sequence[Arm]) -> list[list[Arm]]:
    """Arms that may share a batch."""
    found: dict[tuple[bool, int], list[Arm]] = {}
    for arm in arms:
        found.setdefault((arm.vector is not None, arm.seed), []).append(arm)
    return list(found.values())


def _edit(sae: SAE, where: Where, rows: Sequence[tuple[Arm, str]]) -> Edit:
    vectors = [arm.vector for arm, _ in rows if arm.vector is not None]
    if vectors:
        part = direction_part(torch.stack(vectors), [arm.amount for arm, _ in rows], where, by_row=True)
    else:
        dials = [[Dial(i, weight * arm.amount) for i, weight in arm.features.items()] for arm, _ in rows]
        part = feature_part(sae, dials, where, select=None if sae.cfg.architecture != "topk" else "threshold")
    return Edit(() if part is None else (part,))


def kl(host: Host, hook: str, edit: Edit, questions: Sequence[str], texts: Sequence[str]) -> list[float]:
    """Mean KL(steered ‖ unsteered) of the next-token distributions along each given answer, nats a token.

    Cost: two forwards over questions and answers; `edit` steers every row alike.
    """
    found = []
    for question, text in zip(questions, texts, strict=True):
        begun = host.chat_tokens(question)[0]
        said = torch.tensor(host.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        if not len(said):
            found.append(math.nan)
            continue
        tokens = torch.cat([begun.cpu(), said])[None]
        last = len(said) + 1
        plain = host.logits(tokens, last=last)[0, :-1].float().log_softmax(-1)
        steered = host.logits(tokens, edits=[(hook, edit)], last=last)[0, :-1].float().log_softmax(-1)
        found.append(float((steered.exp() * (steered - plain)).sum(-1).mean()))
    return found


def length(sae: SAE, amounts: Mapping[int, float]) -> float:
    """Length of the vector that features add together, at these raw amounts."""
    return float((torch.tensor(list(amounts.values())) @ sae.W_dec.detach()[list(amounts)].float().cpu()).norm())


def unit(sae: SAE, weights: Mapping[int, float]) -> dict[int, float]:
    """The weights at which features together add a vector of length 1."""
    whole = length(sae, weights)
    return {feature: weight / whole for feature, weight in weights.items()}


def tokens_asked(n_shares: int, effort: Effort) -> int:
    """Tokens that `calibrate` has the host write at most."""
    choosing, reporting = (len(bundled.questions()[half]) for half in ("choosing", "reporting"))
    answers = (n_shares + 1) * choosing * effort.choosing + 3 * reporting * effort.reporting
    return (answers + (effort.random_features + 1) * reporting * effort.controls) * effort.tokens


def summary(rows: Sequence[dict[str, Any]], n_questions: int) -> dict[str, Any]:
    """Means of an arm's answers with 95% intervals by bootstrap over questions."""
    draws = multinomial(n_questions, 0)
    found: dict[str, Any] = {}
    for key in ("overall", "about", "speaks as", "concept", "instruct", "fluency", "repetition", "refuses", "words"):
        each = torch.tensor([float(row[key]) for row in rows], dtype=torch.float64).view(n_questions, -1).mean(dim=1)
        low, high = ((draws @ each) / n_questions).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        found[key] = {"value": float(each.mean()), "low": low, "high": high}
    finite = [row["perplexity"] for row in rows if math.isfinite(row["perplexity"])]
    found["perplexity"] = float(torch.tensor(finite).median()) if finite else math.nan
    return found


def calibrate(
    host: Host,
    sae: SAE,
    features: int | Mapping[int, float],
    lexicon: Lexicon,
    norm: float,
    *,
    known: Sequence[dict[str, Any]] = (),
    shares: Sequence[float] = SHARES,
    effort: Effort | None = None,
    goal: str = "overall",
) -> Iterator[dict[str, Any]]:
    """Cells as they end: {"half", "arm", "amount", "share", "times", answers …}; those of `known` are not asked again.

    features  one, or several with weights; these are scaled so that together they add a vector of the strength's length
    goal      what decides: "overall", the harmonic score; "about", the share of fluent answers about the concept,
              whatever was asked; "as", the share that speaks as it (as Golden Gate Claude did)
    norm      typical norm of the residual stream at the SAE's hook (`sae index` or a Direction knows it)
    The last cell of the choosing half decides: `chosen` finds it among the cells. Raises UserError where a feature is
    dead, the SAE has no statistics, is a transcoder or norms each token by itself.
    """
    if goal not in GOALS:
        raise UserError(f"calibrate: goal is '{goal}', expected one of {', '.join(GOALS)}.")
    check_steerable(sae)
    check_one_scale(sae, "calibrate")
    effort = effort or Effort()
    given = {features: 1.0} if isinstance(features, int) else features
    sae.check_features(list(given))
    for feature in given:
        if sae.stats is None or float(sae.stats.max_act[feature]) <= 0:
            raise UserError(f"feature {feature}: has no recorded maximum. Run `sae index`, or choose a living feature.")
    assert sae.stats is not None, "just checked"
    weights = unit(sae, given)
    about, first = sae.cfg.metadata, next(iter(weights))
    hook, maximum = host.hook(about.hook_name), float(sae.stats.max_act[first]) / weights[first]
    where = Where("all", False, host.special_ids, about.outlier_norm)
    cells = {(cell["half"], cell["arm"]): cell for cell in known}
    judge: Judge | None = None

    def asked(half: str, arms: Sequence[Arm]) -> Iterator[dict[str, Any]]:
        nonlocal judge
        questions = bundled.questions()[half]
        wanted = [arm for arm in arms if (half, arm.name) not in cells]
        for arm, each, texts in answers(host, sae, hook, where, wanted, questions, effort):
            judge = judge or Judge.of(host, lexicon, effort)
            rows = judge.scored(each, texts)
            plain = rows if arm.name == OFF else cells[half, OFF]["answers"]
            along = {row["question"]: row["answer"] for row in reversed(plain)}
            edit = _edit(sae, where, [(arm, "")])
            moved = kl(host, hook, edit, list(along), list(along.values())) if edit.parts else [0.0]
            finite = [value for value in moved if math.isfinite(value)]
            clamped = {str(i): weight * arm.amount for i, weight in arm.features.items()}
            cell = {"half": half, "arm": arm.name, "features": clamped, "amount": arm.amount,
                    "kl": sum(finite) / max(1, len(finite)),
                    "share": arm.amount / norm, "times": arm.amount / maximum, "relevance": asdict(judge.relevance),
                    "samples": arm.samples, **summary(rows, len(questions)), "answers": rows}  # fmt: skip
            cells[half, arm.name] = cell
            yield cell

    strengths = [Arm(f"{share:g}", share * norm, effort.choosing, weights) for share in shares]
    yield from asked("choosing", [Arm(OFF, samples=effort.choosing), *strengths])
    best = chosen([cell for (half, _), cell in cells.items() if half == "choosing"], goal)
    amount = best["amount"]
    living = ((sae.stats.density > 0) & (sae.stats.density < DENSEST)).nonzero().flatten().tolist()
    living = [i for i in living if i not in weights]
    others = random.Random(first).sample(living, min(effort.random_features, len(living)))
    vector = torch.randn(sae.cfg.d_in, generator=torch.Generator().manual_seed(first))
    arms = [Arm(OFF, samples=effort.reporting), Arm("chosen", amount, effort.reporting, weights)]
    arms += [Arm("off again", samples=effort.reporting, seed=1)]
    arms += [Arm(f"random feature {i}", amount, effort.controls, {i: 1.0}) for i in others]
    arms += [Arm("random direction", amount, effort.controls, vector=vector)]
    yield from asked("reporting", arms)


def chosen(cells: Sequence[dict[str, Any]], goal: str = "overall") -> dict[str, Any]:
    """The cell of the choosing half that does best by the goal, of those that do not go in circles; of equal ones the
    weakest; where none does anything by the goal, the best by the other goals."""
    turned = [cell for cell in cells if cell["half"] == "choosing" and cell["arm"] != OFF]
    steady = [cell for cell in turned if cell["repetition"]["value"] < scores.MOST_REPEATED] or turned
    others = [score for word, score in GOALS.items() if word != goal]

    def order(cell: dict[str, Any]) -> tuple[float, ...]:
        value = cell[GOALS[goal]]["value"]
        return value, *(0.0 if value else cell[score]["value"] for score in others), -cell["amount"]

    return max(steady, key=order)


def shown(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the printed table: strengths on the choosing half, then what was chosen and its controls."""
    lines = []
    for cell in sorted(cells, key=lambda cell: (cell["half"], cell["half"] == "choosing" and cell["amount"])):
        tried = cell["half"] == "choosing" and cell["arm"] != OFF
        one = {
            "questions": cell["half"],
            "what": "strength" if tried else cell["arm"],
            "×max": cell["times"],
            "share of ‖x‖": cell["share"],
        }
        for key in ("overall", "about", "speaks as", "concept", "instruct", "fluency", "repetition", "refuses"):
            figure = cell[key]
            one[key] = figure["value"] if cell["half"] == "choosing" else {**figure}
        lines.append(one | {"perplexity": cell["perplexity"], "kl": cell["kl"]})
    return lines
