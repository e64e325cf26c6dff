"""Activations cached by SAELens's CacheActivationsRunner; runs in the peer's own environment.

    python cache_saelens.py MODEL_FOLDER TEXTS.jsonl OUT_FOLDER HOOK WIDTH CONTEXT ROWS

HOOK is a module's path (model.layers.5), where SAELens reads any transformers model, float32.
"""

import json
import os
import sys
import warnings
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
warnings.filterwarnings("ignore")

from datasets import Dataset  # noqa: E402
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig  # noqa: E402


def main(folder: str, texts: str, out: str, hook: str, width: str, context: str, rows: str) -> None:
    lines = [json.loads(line)["text"] for line in Path(texts).read_text(encoding="utf-8").splitlines()]
    tokens = int(context) * int(rows)
    cfg = CacheActivationsRunnerConfig(
        dataset_path="texts",
        model_name=folder,
        model_class_name="AutoModelForCausalLM",
        model_batch_size=8,
        hook_name=hook,
        d_in=int(width),
        training_tokens=tokens,
        context_size=int(context),
        new_cached_activations_path=out,
        shuffle=False,
        device="cpu",
        buffer_size_gb=tokens * int(width) * 4 / 1e9,
        prepend_bos=True,
    )
    CacheActivationsRunner(cfg, override_dataset=Dataset.from_dict({"text": lines})).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
