"""Do the rules say what a reader says? A hundred answers, labelled by a reader who saw no score and no strength.

    python -m experiments.agreement make runs/to-label.txt    # draws and scores them, writes what a reader sees
    python -m experiments.agreement read runs/labels.txt      # puts the reader's lines beside the rules' scores
    python -m experiments.agreement                           # prints the agreement (experiments/blind-labels.json)

Seventy are the answers shown in the card of the shipped SAE (seven dials), thirty those of a calibration of the bridge
(runs/steer/bridge-about.json: unsteered, random features, and the feature at strengths on the way). A reader's line is
"NUMBER concept instruction fluency as", the first three from 0 to 2, the last 0 or 1. Kappa is Cohen's, weighted by
squares for the scores from 0 to 2; intervals by bootstrap over answers.
"""

import random
import sys
from pathlib import Path
from typing import Any

import torch

from experiments import forty
from sae import Host, files, table
from sae.steering.calibrate import Effort, Judge

FILE = Path(__file__).parent / "blind-labels.json"
CARD = Path(__file__).parents[1] / "checkpoints" / "smollm2-golden-gate" / "dials.json"
CALIBRATION = Path(__file__).parents[1] / "runs" / "steer" / "bridge-about.json"
SCORES = ("concept", "instruct", "fluency", "speaks as")


def drawn() -> list[dict[str, Any]]:
    """{"concept", "question", "answer"}, shuffled."""
    draw, found = random.Random(0), []
    for dial in files.read_json(CARD)["dials"]:
        found += [{"concept": dial["concept"], **one} for one in dial["shown"]]
    cells = {(cell["half"], cell["arm"]): cell for cell in files.read_json(CALIBRATION)["cells"]}
    arms = [("reporting", "off"), ("choosing", "0.25"), ("choosing", "0.3"), ("choosing", "0.5")]
    arms += [key for key in cells if key[1].startswith("random f")][:6]
    for key in arms:
        some = draw.sample(cells[key]["answers"], 3)
        found += [{"concept": "the Golden Gate Bridge", "question": one["question"], "answer": one["answer"]}
                  for one in some]  # fmt: skip
    draw.shuffle(found)
    return found


def scored(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the rules' scores."""
    lexicons = {one.name: one.lexicon for one in forty.concepts()}
    judge = Judge.of(Host.load(), lexicons[rows[0]["concept"]], Effort())
    for concept in {row["concept"] for row in rows}:
        some = [row for row in rows if row["concept"] == concept]
        own = Judge(judge.host, lexicons[concept], judge.limit, judge.relevance)
        found = own.scored([row["question"] for row in some], [row["answer"] for row in some])
        for row, scores in zip(some, found, strict=True):
            row["rules"] = {name: int(scores[name]) for name in SCORES}
    return rows


def kappa(a: torch.Tensor, b: torch.Tensor, levels: int) -> float:
    """Cohen's kappa with squared weights; nan where both are constant."""
    table_of = torch.zeros(levels, levels, dtype=torch.float64)
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        table_of[x, y] += 1
    steps = torch.arange(levels, dtype=torch.float64)
    apart = (steps[:, None] - steps) ** 2
    expected = table_of.sum(1, keepdim=True) * table_of.sum(0) / len(a)
    return float(1 - (apart * table_of).sum() / (apart * expected).sum())


def agreement(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a score."""
    lines = []
    for name in SCORES:
        rules, reader = (torch.tensor([row[who][name] for row in rows]) for who in ("rules", "reader"))
        levels = 2 if name == "speaks as" else 3
        generator = torch.Generator().manual_seed(0)
        draws = [torch.randint(len(rows), (len(rows),), generator=generator) for _ in range(1000)]
        each = torch.tensor([kappa(rules[at], reader[at], levels) for at in draws])
        low, high = each[each.isfinite()].quantile(torch.tensor([0.025, 0.975])).tolist()
        value = {"value": kappa(rules, reader, levels), "low": low, "high": high}
        same, means = (rules == reader).float().mean(), (rules.float().mean(), reader.float().mean())
        lines.append({"score": name, "same": float(same), "kappa": value, "mean by rules": float(means[0]),
                      "by the reader": float(means[1])})  # fmt: skip
    return lines


def main(words: list[str]) -> None:
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return
    if words[:1] == ["make"]:
        rows = scored(drawn())
        files.write_json(FILE, rows)
        files.write_text(words[1], "\n".join(
            f"{i} | concept: {row['concept']} | question: {row['question']} | answer: {' '.join(row['answer'].split())}"
            for i, row in enumerate(rows)
        ) + "\n")  # fmt: skip
        return
    rows = files.read_json(FILE)
    if words[:1] == ["read"]:
        for line in Path(words[1]).read_text(encoding="utf-8").splitlines():
            if line.strip():
                number, *labels = map(int, line.split())
                rows[number]["reader"] = dict(zip(SCORES, labels, strict=True))
        files.write_json(FILE, rows)
    print(f"{len(rows)} answers\n" + table.text(agreement(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
