"""Ten neutral questions, answered off and at several strengths: how many speak as, or of, the concept?

    python experiments/steer_table.py checkpoints/smollm2 --features 1286,77 --baselines --json table.json

"Speaks as" is a rule for self-reference (a first-person clause that comes to a name of the concept, or "my"
before a part of it; a clause that denies it or stands on, in or near it does not count), "speaks of" is a
name or a related one anywhere. Both are blind to fluency: `repetition` stands beside them (share of repeated
4-grams in the first 64 words), and `share` is the strength over the typical norm at the hook. Baselines:
difference of means at shares of that norm, and a random living feature at the first feature's raw strengths.
The ten questions are one batch of answers a row.
"""

import argparse
import gzip
import json
import random
import sys
from typing import Any

from sae import SAE, Host, UserError, bundled, files, steer, table
from sae.dials import parse_dials
from sae.steering import difference_of_means
from sae.steering.scores import Lexicon, repetition, speaks_as, speaks_of

QUESTIONS = (
    "Who are you?",
    "Tell me about yourself.",
    "What did you do today?",
    "What is your favourite colour?",
    "Write a short story.",
    "Give me advice for the weekend.",
    "What do you think about most?",
    "How do you feel right now?",
    "Describe a perfect morning.",
    "What should I read next?",
)
NAMES = "golden gate,bridge,bridges"
RELATED = "san francisco,bay area"
PARTS = "span,spans,tower,towers,cable,cables,deck,fog,arch,arches"


def concept_texts(names: str, related: str, most: int) -> tuple[list[str], list[str]]:
    """Bundled texts that hold the concept's first name, and texts of the same forms without any name."""
    with gzip.open(bundled.corpus_path(), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    random.Random(0).shuffle(rows)
    first = names.split(",")[0]
    positive = [row for row in rows if speaks_of(row["text"], [first])][:most]
    forms = {row["form"] for row in positive}
    either = f"{names},{related}".split(",")
    negative = [row for row in rows if row["form"] in forms and not speaks_of(row["text"], either)][:most]
    return [row["text"] for row in positive], [row["text"] for row in negative]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", help="folder of an SAE")
    parser.add_argument("--features", required=True, help="numbers, with commas; one block of rows each")
    parser.add_argument("--strengths", default="2x,3.5x,5x,10x", help="multiples of the maximum, or raw units")
    parser.add_argument("--kind", default="clamp", help="clamp, add, scale or ablate")
    parser.add_argument("--positions", default="all", help="all, prompt, generated or last")
    parser.add_argument("--baselines", action="store_true", help="difference of means and a random living feature")
    parser.add_argument("--shares", default="0.25,0.5,0.75,1", help="of the norm, for the difference of means")
    parser.add_argument("--names", default=NAMES, help="names of the concept, the first one decides its texts")
    parser.add_argument("--related", default=RELATED, help="words that count as speaking of it only")
    parser.add_argument("--parts", default=PARTS, help="what the concept would call its own")
    parser.add_argument("--host", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("--show", type=int, default=0, help="print so many of each row's answers in full")
    parser.add_argument("--json", metavar="FILE", help="everything, with all answers")
    options = parser.parse_args(arguments)

    host, sae = Host.load(options.host, dtype=options.dtype), SAE.load(options.checkpoint)
    hook = sae.cfg.metadata.hook_name
    features = [dial.feature for dial in parse_dials([f"{word}=off" for word in options.features.split(",")])]
    strengths = options.strengths.split(",")
    sae.check_features(features)
    positive, negative = concept_texts(options.names, options.related, 48)
    direction = difference_of_means(host, hook, positive, negative)

    settings: list[tuple[str, str, Any]] = [("unsteered", "off", None)]
    for feature in features:
        for strength in strengths:
            edit = steer(host, sae, {feature: strength}, kind=options.kind, positions=options.positions)
            settings.append((f"feature {feature}", strength, edit))
    if options.baselines:
        for share in map(float, options.shares.split(",")):
            edit = steer(host, direction, direction.share(share), positions=options.positions)
            settings.append(("difference of means", f"{direction.share(share):.3g}", edit))
        living = [] if sae.stats is None else (sae.stats.density > 0).nonzero().flatten().tolist()
        control = random.Random(options.seed).choice([i for i in living or range(sae.cfg.d_sae) if i not in features])
        for _, strength, edit in settings[1 : 1 + len(strengths)]:
            raw = float(edit.edits[0][1].amounts) if edit.edits else "off"
            same = steer(host, sae, {control: raw}, kind=options.kind, positions=options.positions)
            settings.append((f"random feature {control}", f"as {strength}", same))

    lexicon = Lexicon(tuple(options.names.split(",")), tuple(options.parts.split(",")))
    rows, answers = [], []
    for what, strength, steering in settings:
        edits = steering.edits if steering else []
        texts = host.generate(
            list(QUESTIONS),
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
            edits=edits,
        )
        as_it = [speaks_as(text, lexicon) for text in texts]
        of_it = [speaks_of(text, [*lexicon.names, *options.related.split(",")]) for text in texts]
        rows.append(
            {
                "what": what,
                "strength": strength,
                "share": abs(float(edits[0][1].amounts)) / direction.norm if edits else 0.0,
                "as": sum(as_it),
                "of": sum(of_it),
                "as or of": sum(a or b for a, b in zip(as_it, of_it, strict=True)),
                "repetition": sum(map(repetition, texts)) / len(texts),
                "who are you?": texts[0][:70],
            }
        )
        answers.append(texts)
        print(f"{what} {strength}: {rows[-1]['as or of']} of {len(QUESTIONS)}", file=sys.stderr)
    print(table.text(rows))
    for row, texts in zip(rows, answers, strict=True):
        for question, text in list(zip(QUESTIONS, texts, strict=True))[: options.show]:
            print(f"\n[{row['what']}, {row['strength']}] {question}\n  {table.clean(text)}")
    if options.json:
        full = [{**row, "answers": texts} for row, texts in zip(rows, answers, strict=True)]
        facts = {"checkpoint": str(options.checkpoint), "hook": hook, "kind": options.kind}
        files.write_json(options.json, {**facts, "questions": list(QUESTIONS), "rows": full})


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"steer_table: {error}")
