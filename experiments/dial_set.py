"""Several features on one dial: calibrated and reported as `sae calibrate` does for one.

    python -m experiments.dial_set checkpoints/smollm2-golden-gate "2202:38.7,3847:28.1,1529:23.6" \\
        --concept "the Golden Gate Bridge" --goal as --json runs/set.json

Weights are raw units; they are scaled so that together the features add a vector of the strength's length. The words
of the concept are forty.json's. "By the loose pattern" is the share of answers with "I am …" up to sixty characters
before the concept's name, or "my …" thirty before one of its parts ("I am a climber on the bridge" counts), which is
laxer than "speaks as".
"""

import argparse
import re
from pathlib import Path
from typing import Any

from experiments import forty
from sae import SAE, Host, files, table
from sae.steering.calibrate import Effort, calibrate, shown
from sae.steering.directions import typical_norm
from sae.steering.scores import Lexicon


def loosely_as(answers: list[dict[str, Any]], lexicon: Lexicon) -> float:
    """Share of answers in the first person near the concept's name or parts."""
    names, parts = ("|".join(map(re.escape, words)) for words in (lexicon.names, lexicon.parts or ("\0",)))
    pattern = re.compile(
        rf"\bI(?:['’]m| am| was|['’]ve been)\b[^.?!]{{0,60}}\b(?:{names})\b|\bmy\b[^.?!]{{0,30}}\b(?:{parts})\b",
        re.IGNORECASE,
    )
    return sum(pattern.search(one["answer"]) is not None for one in answers) / len(answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sae")
    parser.add_argument("features", help="FEATURE:WEIGHT with commas")
    parser.add_argument("--concept", required=True, help="a name of forty.json")
    parser.add_argument("--goal", default="about", choices=["overall", "about", "as"])
    parser.add_argument("--random-features", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True, help="cells are kept there")
    args = parser.parse_args()
    sae = SAE.load(args.sae)
    host = Host.load(sae.cfg.metadata.model_name)
    weights = {int(word.split(":")[0]): float(word.split(":")[1]) for word in args.features.split(",")}
    lexicon = next(one.lexicon for one in forty.concepts() if one.name == args.concept)
    norm = typical_norm(host, sae.cfg.metadata.hook_name)
    cells: list[dict[str, Any]] = files.read_json(args.json)["cells"] if args.json.exists() else []
    effort = Effort(random_features=args.random_features)
    for cell in calibrate(host, sae, weights, lexicon, norm, known=list(cells), effort=effort, goal=args.goal):
        cells.append(cell)
        files.write_json(args.json, {"features": args.features, "cells": cells})
    print(table.text(shown(cells)))
    best = next(cell for cell in cells if cell["half"] == "reporting" and cell["arm"] == "chosen")
    print(f"by the loose pattern: {loosely_as(best['answers'], lexicon):.2f}; clamped at {best['features']}")


if __name__ == "__main__":
    main()
