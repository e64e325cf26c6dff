"""Does a dial write? The concepts' best features, chosen on some questions and reported on others.

    python -m experiments.dial checkpoints/smollm2-golden-gate --json experiments/dials.json

For each concept candidates are the features with the best contrast (forty.py), those whose decoder rows lie nearest to
the difference of means and those that make its names likely, some fifty. They are tried at one share of the residual's
typical norm on three questions, the best six at several shares on five ("tried" in the JSON: greedy answers, and the
best of thirty, so its shares are too high). The best settings go through ten choosing questions (sae/bundled),
sampled at temperature 0.7 and top_p 0.9 (80 tokens); the one with the most answers *about* the concept (concept score
2, fluency at least 1: sae/steering/scores.py) is reported on the reporting questions. Beside it, on the same questions:
unsteered, the difference of means with a strength that was chosen in the same way, and random features (density below
5%) at the chosen raw strength. Intervals are the wider end of Wilson's over answers and of a bootstrap over questions.
Rules are blind to truth; ten answers a concept are in the JSON's "shown".
"""

from __future__ import annotations

import argparse
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import forty
from experiments.forty import DENSEST, Concept, Passages, Sums
from sae import SAE, Host, bundled, files, table
from sae.activations.harvest import Block
from sae.dials import Dial
from sae.evaluation.intervals import multinomial, wilson
from sae.features.pool import DocumentMaxima, document_maxima
from sae.interventions import Edit, direction_part, feature_part
from sae.steering.scores import concept as concept_score
from sae.steering.scores import fluency, perplexity, repetition, speaks_as
from sae.where import Where

DIALS = ("the Golden Gate Bridge", "San Francisco", "computer code", "anger", "whales")
TRIED = (*DIALS, "the Eiffel Tower", "joy", "insecure code", "a scam email", "chess")
WARM, TOP_P = 0.7, 0.9  # without the cut at 0.9 this host's answers are much less fluent, steered or not
WRITES = 0.5  # share of answers about a concept from which on a dial has its name
QUESTIONS = {"choosing": bundled.questions()["choosing"][:10], "reporting": bundled.questions()["reporting"]}


@dataclass(frozen=True)
class Effort:
    """How long a dial is looked for."""

    by_contrast: int = 30
    by_direction: int = 10
    by_promotion: int = 10
    first_share: float = 0.38
    first_on: int = 3
    first_tokens: int = 40
    kept: int = 6
    shares: tuple[float, ...] = (0.3, 0.36, 0.42, 0.48, 0.54)
    tried_on: int = 5
    tried_tokens: int = 48
    finalists: int = 8
    reported_on: tuple[int, int] = (0, 20)
    samples: int = 3
    tokens: int = 80
    random_features: int = 10


@dataclass(frozen=True)
class Bench:
    """A host and an SAE at its hook, ready to be asked; `limit` is what unsteered answers say of fluency."""

    host: Host
    sae: SAE
    hook: str
    norm: float
    limit: float

    @property
    def where(self) -> Where:
        return Where("all", False, self.host.special_ids, self.sae.cfg.metadata.outlier_norm)


@dataclass(frozen=True)
class Setting:
    """A feature or a direction [d], and the raw amount."""

    which: int | Tensor
    amount: float


@dataclass(frozen=True)
class Answers:
    """One setting's answers: question by question, all samples of one after the other."""

    texts: list[str]
    concept: list[int]
    fluency: list[int]
    speaks_as: list[bool]
    repetition: list[float]

    @property
    def about(self) -> list[bool]:
        return [c == 2 and f >= 1 for c, f in zip(self.concept, self.fluency, strict=True)]

    @property
    def rate(self) -> float:
        return sum(self.about) / len(self.about)

    @property
    def order(self) -> tuple[float, float]:
        """What settings are ordered by: answers about the concept, then how fluent these are."""
        both = [2 * c * f / (c + f) if c + f else 0.0 for c, f in zip(self.concept, self.fluency, strict=True)]
        return self.rate, sum(both) / len(both)


def ask(
    bench: Bench,
    settings: Sequence[Setting],
    questions: Sequence[str],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    tokens: int = 32,
    seed: int = 0,
    batch: int = 192,
) -> list[list[str]]:
    """The answers of every setting; all settings are of one kind. Each row of a batch has its own dial."""
    rows = [(one, question) for one in settings for question in questions for _ in range(samples)]
    texts: list[str] = []
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        if isinstance(some[0][0].which, Tensor):
            directions = torch.stack([torch.as_tensor(one.which) for one, _ in some])
            part = direction_part(directions, [one.amount for one, _ in some], bench.where, by_row=True)
        else:
            dials = [[Dial(int(one.which), one.amount)] for one, _ in some]
            part = feature_part(bench.sae, dials, bench.where, select="threshold")
        texts += bench.host.generate(
            [question for _, question in some],
            max_new_tokens=tokens,
            temperature=temperature,
            top_p=TOP_P,
            seed=seed + start,
            edits=[(bench.hook, Edit((part,) if part else ()))],
        )
    each = len(questions) * samples
    return [texts[i * each : (i + 1) * each] for i in range(len(settings))]


def scored(
    bench: Bench, concept: Concept, questions: Sequence[str], texts: Sequence[Sequence[str]], *, all_fluent: bool = True
) -> list[Answers]:
    """Scores of every setting's answers, with one forward of the unsteered host over them.

    all_fluent   False leaves the fluency of answers that are not about the concept at 0, and does not run over them
    """
    asked = [question for some in texts for question in _each(questions, len(some))]
    flat = [text for some in texts for text in some]
    held = [concept_score(text, concept.lexicon, question) for text, question in zip(flat, asked, strict=True)]
    repeated = [repetition(text) for text in flat]
    read = [i for i, score in enumerate(held) if all_fluent or score == 2]
    fluent = [0] * len(flat)
    for i, ppl in zip(read, perplexity(bench.host, [asked[i] for i in read], [flat[i] for i in read]), strict=True):
        fluent[i] = fluency(ppl, repeated[i], bench.limit)
    found, start = [], 0
    for some in texts:
        at = slice(start, start + len(some))
        start += len(some)
        own = [speaks_as(text, concept.lexicon) for text in some]
        found.append(Answers(list(some), held[at], fluent[at], own, repeated[at]))
    return found


def _each(questions: Sequence[str], n: int) -> list[str]:
    return [question for question in questions for _ in range(n // len(questions))]


def limit_of(host: Host) -> float:
    """95th percentile of the perplexity of unsteered answers to the choosing questions, three samples each."""
    questions = _each(QUESTIONS["choosing"], 30)
    texts = host.generate(questions, max_new_tokens=80, temperature=WARM, top_p=TOP_P, seed=0)
    found = [value for value in perplexity(host, questions, texts) if math.isfinite(value)]
    return float(torch.tensor(found).quantile(0.95))


@dataclass(frozen=True)
class Bearings:
    """The passages as an SAE and its host read them: what points to candidates."""

    which: Passages
    maxima: DocumentMaxima
    sums: Sums


def candidates(bench: Bench, read: Bearings, concept: Concept, effort: Effort) -> list[int]:
    """Features that detect the concept, that point to where its texts are, and that make its names likely."""
    assert bench.sae.stats is not None, "a trained SAE has statistics"
    detecting = forty.chosen(
        forty.contrasted(read.which, read.maxima, concept, reporting=False)[0], bench.sae, effort.by_contrast
    )
    near = bench.sae.W_dec.detach().float() @ forty.difference(read.which, read.sums, concept)
    silent = bench.sae.stats.density == 0
    near = near.masked_fill(silent, -1).topk(effort.by_direction).indices
    promoted = promotion(bench, concept).masked_fill(silent, -math.inf).topk(effort.by_promotion).indices
    return list(dict.fromkeys([*detecting, *near.tolist(), *promoted.tolist()]))


def promotion(bench: Bench, concept: Concept) -> Tensor:
    """How far each decoder row raises the first token of the name that it raises most, over the mean token [F]."""
    vocabulary = bench.host.model.get_output_embeddings().weight.detach().float()
    tokenizer = bench.host.tokenizer
    first = {tokenizer(f" {name}", add_special_tokens=False)["input_ids"][0] for name in concept.lexicon.names}
    rows = bench.sae.W_dec.detach().float()
    return (rows @ vocabulary[sorted(first)].T).amax(1) - rows @ vocabulary.mean(0)


def finalists(
    bench: Bench, concept: Concept, tried: Sequence[int | Tensor], effort: Effort
) -> list[tuple[Setting, Answers]]:
    """The settings that do best on a few choosing questions, with their answers, best first."""
    questions = QUESTIONS["choosing"]
    if len(tried) > effort.kept:
        settings = [Setting(which, effort.first_share * bench.norm) for which in tried]
        first = _trial(bench, concept, settings, questions[: effort.first_on], effort.first_tokens)
        tried = [setting.which for setting, _ in first[: effort.kept]]
    settings = [Setting(which, share * bench.norm) for which in tried for share in effort.shares]
    return _trial(bench, concept, settings, questions[: effort.tried_on], effort.tried_tokens)[: effort.finalists]


def _trial(
    bench: Bench, concept: Concept, settings: Sequence[Setting], questions: Sequence[str], tokens: int
) -> list[tuple[Setting, Answers]]:
    """Settings with their greedy answers, best first."""
    answers = scored(bench, concept, questions, ask(bench, settings, questions, tokens=tokens), all_fluent=False)
    return sorted(zip(settings, answers, strict=True), key=lambda one: one[1].order, reverse=True)


def best(bench: Bench, concept: Concept, settings: Sequence[Setting], effort: Effort) -> tuple[Setting, Answers]:
    """The setting whose answers to all choosing questions are most about the concept, with these answers."""
    questions, first = QUESTIONS["choosing"], settings[0]
    some = [*settings, *(Setting(first.which, first.amount * factor) for factor in (0.85, 1.15))]
    texts = ask(bench, some, questions, samples=2, temperature=WARM, tokens=effort.tokens, seed=1)
    answers = scored(bench, concept, questions, texts)
    at = max(range(len(some)), key=lambda i: answers[i].order)
    return some[at], answers[at]


def reported(
    bench: Bench, concept: Concept, settings: Sequence[Setting], effort: Effort, samples: int
) -> list[Answers]:
    """Answers to the reporting questions."""
    questions = QUESTIONS["reporting"][slice(*effort.reported_on)]
    warm = {"samples": samples, "temperature": WARM, "seed": 2}
    return scored(bench, concept, questions, ask(bench, settings, questions, tokens=effort.tokens, **warm))


def rates(answers: Answers, concept: Concept, questions: int) -> dict[str, Any]:
    """The figures of a line; intervals take the wider end of Wilson's and a bootstrap over `questions` equal parts of
    the answers: questions, or for random features the features.

    "named" is the share of answers with the first of the concept's names ("golden gate", where any bridge is about it).
    """
    named = re.compile(rf"\b{re.escape(concept.lexicon.names[0])}", re.IGNORECASE)
    about = torch.tensor(answers.about, dtype=torch.float64).view(questions, -1).mean(1)
    draws = (multinomial(questions, 0) @ about) / questions
    ends = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    single = wilson(sum(answers.about), len(answers.about))
    assert single.low is not None and single.high is not None, "there are answers"
    n = len(answers.texts)
    return {
        "about": {"value": answers.rate, "low": min(ends[0], single.low), "high": max(ends[1], single.high)},
        "score": sum(answers.concept) / n,
        "fluency": sum(answers.fluency) / n,
        "named": sum(named.search(text) is not None for text in answers.texts) / n,
        "speaks as": sum(answers.speaks_as) / n,
        "repetition": sum(answers.repetition) / n,
    }


def dial(bench: Bench, read: Bearings, concept: Concept, settings: Sequence[Setting], effort: Effort) -> dict[str, Any]:
    """Everything about one concept's dial; `settings` are its finalists."""
    stats = bench.sae.stats
    assert stats is not None, "a trained SAE has statistics"
    setting, choosing = best(bench, concept, settings, effort)
    means = finalists(bench, concept, [forty.difference(read.which, read.sums, concept)], effort)
    direction, by_means = best(bench, concept, [one for one, _ in means], effort)
    assert isinstance(setting.which, int), "a feature"
    answers = reported(bench, concept, [setting], effort, effort.samples)[0]
    of_means = reported(bench, concept, [direction], effort, effort.samples)[0]
    plain = reported(bench, concept, [replace(direction, amount=0.0)], effort, effort.samples)[0]
    tried = set(candidates(bench, read, concept, effort))
    living = ((stats.density > 0) & (stats.density < DENSEST)).nonzero().flatten().tolist()
    others = [i for i in living if i not in tried]
    drawn = random.Random(f"{concept.name}/0").sample(others, min(effort.random_features, len(others)))
    controls = reported(bench, concept, [Setting(i, setting.amount) for i in drawn], effort, 1)
    n = effort.reported_on[1] - effort.reported_on[0]
    times = setting.amount / float(stats.max_act[setting.which])
    pooled = Answers(*(sum((getattr(one, name) for one in controls), []) for name in vars(answers)))
    return {
        "concept": concept.name,
        "feature": setting.which,
        "times": times,
        "amount": setting.amount,
        "share": setting.amount / bench.norm,
        "choosing": choosing.rate,
        **rates(answers, concept, n),
        "difference of means": {
            "share": direction.amount / bench.norm,
            "choosing": by_means.rate,
            **rates(of_means, concept, n),
        },
        "unsteered": rates(plain, concept, n),
        "random features": {
            "n": len(drawn),
            "each": [one.rate for one in controls],
            **rates(pooled, concept, len(drawn)),
        },
        "shown": [
            {"question": question, "answer": answers.texts[i * effort.samples]}
            for i, question in enumerate(QUESTIONS["reporting"][slice(*effort.reported_on)][:10])
        ],
    }


def words(row: dict[str, Any]) -> str:
    """A dial as `sae steer` takes it."""
    return f"{row['feature']}={row['times']:.2f}x"


def line(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the printed table."""
    return {
        "concept": row["concept"], "dial": words(row), "share": row["share"], "about": row["about"],
        "named": row["named"], "fluency": row["fluency"],
        "repetition": row["repetition"],
        "difference of means": row["difference of means"]["about"],
        "unsteered": row["unsteered"]["about"], "random features": row["random features"]["about"],
    }  # fmt: skip


def dials(
    sae: SAE,
    host: Host,
    which: Passages,
    some: Sequence[Block],
    known: dict[str, list[dict[str, Any]]],
    tried: Sequence[str],
    names: Sequence[str],
    more: int = 0,
) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """What was measured so far, after every row: concepts that were `tried` with their finalists, and `dials`.

    known    rows of before, which are not measured again
    tried    concepts whose candidates are tried on the first choosing questions
    names    those whose best setting is reported; `more` others follow, which did best of those that were tried
    """
    rows, found = list(known.get("tried", [])), list(known.get("dials", []))
    hook = sae.cfg.metadata.hook_name
    maxima = document_maxima(sae, some, len(which.documents), hook=hook)
    read = Bearings(which, maxima, forty.summed(some, hook, len(which.documents)))
    bench, effort = Bench(host, sae, hook, read.sums.norm, limit_of(host)), Effort()
    by_name = {concept.name: concept for concept in forty.concepts()}
    for name in tried:
        if name not in {row["concept"] for row in rows}:
            rows.append(_tried(bench, read, by_name[name], effort))
            print(table.text([tried_line(rows[-1])]), flush=True)
            yield {"tried": rows, "dials": found}
    order = sorted(rows, key=lambda row: row["finalists"][0]["about"], reverse=True)  # stable: ties as in the list
    reported_too = [row["concept"] for row in order if row["concept"] not in names][:more]
    for name in (*names, *reported_too):
        if name not in {row["concept"] for row in found}:
            own = next(row["finalists"] for row in rows if row["concept"] == name)
            settings = [Setting(one["feature"], one["amount"]) for one in own]
            found.append(dial(bench, read, by_name[name], settings, effort))
            print(table.text([line(found[-1])]), flush=True)
            yield {"tried": rows, "dials": found}


def _tried(bench: Bench, read: Bearings, concept: Concept, effort: Effort) -> dict[str, Any]:
    best_first = finalists(bench, concept, candidates(bench, read, concept, effort), effort)
    assert bench.sae.stats is not None, "a trained SAE has statistics"
    return {
        "concept": concept.name,
        "finalists": [
            {
                "feature": setting.which,
                "times": setting.amount / float(bench.sae.stats.max_act[setting.which]),
                "amount": setting.amount,
                "share": setting.amount / bench.norm,
                "about": answers.rate,
                "answer": answers.texts[0],
            }
            for setting, answers in best_first
        ],
    }


def tried_line(row: dict[str, Any]) -> dict[str, Any]:
    """A tried concept's row of the printed table."""
    first = row["finalists"][0]
    return {"concept": row["concept"], "dial": words(first), "about": first["about"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sae")
    parser.add_argument("--concepts", default=",".join(DIALS), help="names of forty.json, with commas")
    parser.add_argument("--json", type=Path, help="write the rows there; those that stand in it are not measured again")
    args = parser.parse_args()
    known = files.read_json(args.json) if args.json and args.json.exists() else {}
    sae, which = SAE.load(args.sae), forty.passages()
    about = sae.cfg.metadata
    host = Host.load(about.model_name)
    some = list(forty.blocks(which, host, [about.hook_name], {about.hook_name: about.outlier_norm}))
    names = args.concepts.split(",")
    rows = known
    for rows in dials(sae, host, which, some, known, names, names):
        if args.json:
            files.write_json(args.json, rows)
    print(table.text([line(row) for row in rows["dials"]]))


if __name__ == "__main__":
    main()
