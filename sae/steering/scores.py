"""Scores of answers without a judge, by rules: concept, self-reference, instruction, fluency, repetition, refusal.

Concept, instruction and fluency are 0, 1 or 2, as AxBench's judged ones, and so is their harmonic mean. They are
comparable within one lexicon only, and say nothing of truth or taste. An answer *is about* a concept here when its
concept score is 2 and its fluency at least 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float

    from sae.host import Host

MOST_REPEATED = 0.2  # share of repeated 4-grams from which on an answer goes in circles
_BEARABLE = 3.0  # times the unsteered answers' 95th percentile of perplexity: up to there fluency is 1
_AT_ONCE = 1024  # tokens whose logits are held
# A clause with one of these before the name denies it, or stands beside it ("I am the keeper of the bridge").
_NOT_IT = re.compile(
    r"\b(?:not|never|no|in|on|at|near|from|by|across|over|under|about|of|to|for|with|like|than|who|that|favou?rite)\b"
    r"|n['’]t\b",
    re.IGNORECASE,
)
_WORD = r"[\w'’-]+,?\s+"
_GOES_ON = (
    r"(?!-|['’]s\b|\s+(?:builder|designer|engineer|enthusiast|expert|fan|guard|keeper|lover|resident|worker)s?\b)"
)
_AS = r"(?:(?:known|called|seen|remembered)\s+(?:\w+\s+){0,3}?as\s+)?"
_ARTICLE = r"(?:one\s+of\s+the|the|an?|your|this)\s+"

_REFUSAL = re.compile(
    r"i'm sorry|i am sorry|i apologi[sz]e|as an ai\b|as a language model|as an assistant|i cannot|i can't|i can not"
    r"|i am unable to|i'm unable to|i am not able to|i'm not able to|^\W*sorry\b|i won't\b|i will not\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Lexicon:
    """Words of a concept: `names` count as speaking of it; a first person with a name, or with `parts`, is it."""

    names: tuple[str, ...]
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not any(name.strip() for name in self.names):
            raise UserError("lexicon: no name of the concept. Give at least one word that stands for it.")


def concept(answer: str, lexicon: Lexicon, prompt: str = "") -> int:
    """0: no name of it; 1: less than one in a hundred words; 2: more, or the answer speaks as it.

    Names that stand in the prompt do not count.
    """
    if speaks_as(answer, lexicon):
        return 2
    names = [name for name in lexicon.names if not speaks_of(prompt, [name])]
    found = len(re.findall(_pattern(names), answer, re.IGNORECASE)) if names else 0
    words = len(re.findall(r"\w+", answer))
    return 0 if not found else 2 if 100 * found >= words else 1


def speaks_as(answer: str, lexicon: Lexicon) -> bool:
    """A clause in the first person says that it is the concept ("I am a long red bridge"), or has its parts ("my tall
    towers"): the name right behind the verb, or up to four words behind an article."""
    name = _pattern(lexicon.names) + _GOES_ON
    being = rf"\bI(?:['’]m| am| was|['’]ve been)\s+{_AS}(?:{_ARTICLE}((?:{_WORD}){{0,4}}?))?{name}"
    found = [*re.finditer(being, answer, re.IGNORECASE)]
    if lexicon.parts:
        having = rf"\bmy\s+((?:{_WORD}){{0,2}}?){_pattern(lexicon.parts)}{_GOES_ON}"
        found += re.finditer(having, answer, re.IGNORECASE)
    return any(not _NOT_IT.search(match[1] or "") for match in found)


def speaks_of(answer: str, names: Sequence[str]) -> bool:
    """A name stands anywhere in the answer."""
    return re.search(_pattern(names), answer, re.IGNORECASE) is not None


def repetition(answer: str, words: int = 64) -> float:
    """Share of 4-grams of the first words that stood there before; an endless word counts by its pieces of 8."""
    tokens = re.findall(r"\S{1,8}" if re.search(r"\S{40}", answer) else r"\S+", answer.lower())[:words]
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.no_grad()
def perplexity(host: Host, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """exp of the mean −log p of each answer's tokens after its prompt (in the chat template), with no dial on.

    nan where an answer has no token. Cost: one forward over prompts and answers.
    """
    if len(prompts) != len(answers):
        raise UserError(f"perplexity: {len(prompts):,} prompts, {len(answers):,} answers. Give one prompt an answer.")
    begun = [host.chat_tokens(prompt)[0] for prompt in prompts]
    said = [
        torch.tensor(host.tokenizer(answer, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        for answer in answers
    ]
    found = [math.nan] * len(answers)
    order = sorted((i for i in range(len(answers)) if len(said[i])), key=lambda i: len(begun[i]) + len(said[i]))
    start = 0
    while start < len(order):
        at = [order[start]]
        while start + len(at) < len(order):  # rows of near length together, so many that their logits are few
            one = order[start + len(at)]
            if (len(at) + 1) * (len(begun[one]) + len(said[one])) > _AT_ONCE:
                break
            at.append(one)
        start += len(at)
        longest = max(len(begun[i]) + len(said[i]) for i in at)
        tokens = torch.zeros(len(at), longest, dtype=torch.int64)
        doc = torch.full((len(at), longest), -1)
        for row, i in enumerate(at):
            both = torch.cat([begun[i].cpu(), said[i]])
            tokens[row, : len(both)], doc[row, : len(both)] = both, 0
        logits = host.logits(tokens, doc=doc)
        for row, i in enumerate(at):
            first, last = len(begun[i]), len(begun[i]) + len(said[i])
            logp = logits[row, first - 1 : last - 1].float().log_softmax(-1)
            found[i] = math.exp(-float(logp.gather(1, said[i].to(logp.device)[:, None]).mean()))
    return found


def fluency(perplexity: float, repetition: float, limit: float) -> int:
    """2 up to `limit` (the 95th percentile of unsteered answers' perplexities), 1 up to three times it, else 0.

    0 too where the answer goes in circles: a loop has a low perplexity. An empty answer is 0.
    """
    if not math.isfinite(perplexity) or repetition > MOST_REPEATED - 1e-9:
        return 0
    return 2 if perplexity <= limit else 1 if perplexity <= _BEARABLE * limit else 0


def overall(concept: int, instruct: int, fluency: int) -> float:
    """Harmonic mean of the three, 0 where one is 0 (AxBench, Wu et al. 2025)."""
    three = (concept, instruct, fluency)
    return 3 / sum(1 / score for score in three) if all(three) else 0.0


def distinct(answer: str, n: int, words: int = 64) -> float:
    """Share of different n-grams among those of the first words; nan where there is none."""
    tokens = answer.lower().split()[:words]
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else math.nan


def refuses(answer: str) -> bool:
    """A phrase of refusal in the first 200 characters (the list of Arditi et al. 2024)."""
    return _REFUSAL.search(answer[:200].replace("’", "'")) is not None


@dataclass(frozen=True)
class Relevance:
    """Whether an answer keeps to its question: how much likelier its tokens are after it than after another question.

    In nats a token, by the unsteered host: log p(answer | question) − log p(answer | another). 1 from the 95th
    percentile of what unsteered answers reach with a question that is not theirs, 2 from the median of those with their
    own. `auroc` is how well it tells these two apart; below 0.8 the score says little. (The cosine of mean word
    embeddings told them apart with an AUROC of 0.57 on the bundled host, this with 0.99.)
    """

    low: float
    high: float
    auroc: float

    @classmethod
    def of(cls, host: Host, questions: Sequence[str], answers: Sequence[str]) -> Relevance:
        """From unsteered answers to at least three different questions."""
        if len(set(questions)) < 3:
            raise UserError(f"relevance: {len(set(questions))} different questions. Give three or more.")
        foreign = _others(questions, 2)
        own = nats_gained(host, questions, answers)
        shuffled = nats_gained(host, foreign, answers, _others(questions, 1))
        both = own[:, None] - shuffled
        auroc = float((both > 0).float().mean() + (both == 0).float().mean() / 2)
        return cls(float(shuffled.quantile(0.95)), float(own.quantile(0.5)), auroc)

    def score(self, gained: float) -> int:
        """The score of what `nats_gained` gave; an empty answer is 0."""
        return 2 if gained >= self.high else 1 if gained >= self.low else 0


def nats_gained(
    host: Host,
    questions: Sequence[str],
    answers: Sequence[str],
    others: Sequence[str] | None = None,
    own: Sequence[float] | None = None,
) -> Float[Tensor, " n"]:
    """log p(answer | question) − log p(answer | another question), nats a token; nan for an empty answer.

    own    the answers' perplexities after their questions, where they are known
    """
    others = _others(questions, 1) if others is None else others
    own = perplexity(host, questions, answers) if own is None else own
    return torch.tensor(perplexity(host, others, answers)).log() - torch.tensor(own).log()


def _others(questions: Sequence[str], step: int) -> list[str]:
    """For each question another one: that which is `step` further among the different ones."""
    different = list(dict.fromkeys(questions))
    if len(different) <= step:
        raise UserError(f"relevance: {len(different)} different questions. Give {step + 1} or more.")
    return [different[(different.index(one) + step) % len(different)] for one in questions]


def _pattern(words: Sequence[str]) -> str:
    return rf"\b(?:{'|'.join(re.escape(word.strip()) for word in words if word.strip())})\b"
