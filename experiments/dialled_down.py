"""Dialled down, does the bridge go from answers that name it plain?

    python -m experiments.dialled_down checkpoints/smollm2-golden-gate --json experiments/dialled-down.json

Questions that do not hold the word and that the unsteered host answers with a bridge (those of `QUESTIONS` whose
greedy answer has one), three samples each (64 tokens, temperature 0.7, top_p 0.9), with the feature at 0 and below, and
five random features at the raw amount of -0.5x. "Holds" is the share of answers with a bridge in them, fluency is
that of sae/steering/scores.py. Intervals are over questions.
"""

import argparse
import math
import random
import sys
from pathlib import Path
from typing import Any

import torch

from sae import SAE, Host, bundled, files, table
from sae.dials import Dial
from sae.errors import UserError
from sae.interventions import Edit, feature_part
from sae.steering import scores
from sae.steering.effects import difference
from sae.where import Where

NAMES = ("golden gate", "bridge", "bridges")
QUESTIONS = (
    "How do people cross a wide river in a car?",
    "What is built across a river so that trains can pass?",
    "Which famous red landmark stands at the entrance of San Francisco Bay?",
    "What connects Manhattan with Brooklyn?",
    "Name a famous landmark in London over the Thames.",
    "What do engineers build over a valley for a road?",
    "What did people build to get over the water before there were boats?",
    "What structure hangs from cables between two towers over the water?",
    "How do cars get from San Francisco to Marin County?",
    "What is a viaduct?",
    "What is a suspension structure over a strait called?",
    "Which landmarks of San Francisco should I see?",
    "What do trolls live under in fairy tales?",
    "Which famous structure stands in Sydney harbour besides the opera house?",
    "What did Joseph Strauss design?",
    "How can two banks of a river be joined?",
    "What do engineers test before a road over a gorge is opened?",
    "What do you need to walk over a stream with dry feet?",
    "What did the Romans build over rivers?",
    "How do pedestrians cross a motorway from above?",
)
AMOUNTS, OTHERS = (0.0, -0.25, -0.5, -1.0), -0.5  # in maxima; of the random features
SAMPLES, TOKENS = 3, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sae")
    parser.add_argument("--feature", type=int, default=2202)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sae = SAE.load(args.sae)
    host = Host.load(sae.cfg.metadata.model_name)
    hook, where = sae.cfg.metadata.hook_name, Where("all", False, host.special_ids, sae.cfg.metadata.outlier_norm)
    assert sae.stats is not None, "a trained SAE has statistics"
    maximum = float(sae.stats.max_act[args.feature])

    def answers(dials: list[Dial], questions: list[str], **how: Any) -> list[str]:
        part = feature_part(sae, dials, where, select="threshold")
        edits = [(hook, Edit(() if part is None else (part,)))]
        return host.generate(questions, max_new_tokens=TOKENS, edits=edits, **how)

    usual = [question for question in bundled.questions()["choosing"] for _ in range(2)]
    plain = scores.perplexity(host, usual, answers([], usual, temperature=0.7, top_p=0.9))
    limit = float(torch.tensor([value for value in plain if math.isfinite(value)]).quantile(0.95))
    open_ones = [one for one in QUESTIONS if not scores.speaks_of(one, NAMES)]
    said = answers([], open_ones, temperature=0)
    questions = [one for one, text in zip(open_ones, said, strict=True) if scores.speaks_of(text, NAMES)]
    asked = [one for one in questions for _ in range(SAMPLES)]

    def row(name: str, dials: list[Dial]) -> dict[str, Any]:
        texts = answers(dials, asked, temperature=0.7, top_p=0.9, seed=1)
        held = torch.tensor([float(scores.speaks_of(text, NAMES)) for text in texts]).view(len(questions), -1).mean(1)
        pairs = zip(scores.perplexity(host, asked, texts), texts, strict=True)
        fluent = [scores.fluency(perplexity, scores.repetition(text), limit) for perplexity, text in pairs]
        said = [{"question": question, "answer": text} for question, text in zip(asked, texts, strict=True)]
        holds = difference(held.tolist(), [0.0] * len(held))
        found = {"dial": name, "holds": holds, "fluency": sum(fluent) / len(fluent), "answers": said}
        print(name, found["holds"], found["fluency"], flush=True)
        return found

    rows = [row("unsteered", [])]
    rows += [row(f"{args.feature}={amount:g}x", [Dial(args.feature, amount * maximum)]) for amount in AMOUNTS]
    living = ((sae.stats.density > 0) & (sae.stats.density < 0.05)).nonzero().flatten().tolist()
    for other in random.Random(args.feature).sample([i for i in living if i != args.feature], 5):
        rows.append(row(f"random {other}, as {OTHERS:g}x", [Dial(other, OTHERS * maximum)]))
    print(f"{len(questions)} questions")
    print(table.text([{key: value for key, value in one.items() if key != "answers"} for one in rows]))
    if args.json:
        files.write_json(args.json, {"questions": questions, "rows": rows})


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
