"""SAELens's ActivationsStore in its own process: batches of activations from given token rows, timed on request.

    python peer_harvest.py --model FOLDER --rows FILE --hook blocks.15.hook_resid_post --layers 30 [--autocast]
    stdin   "round N": draw N training batches of 4,096 with next_batch();  "check": activations of the first rows
    stdout  one JSON object a line: {"ready": …}, then {"seconds": …, "tokens": …} per round

The store is SAELens's own class with its tutorial's settings (batches of 16 prompts, 64 batches in the buffer), a
pretokenised data set of the same rows, no special tokens excluded. The model is TransformerLens's bridge over the same
float32 weights, which is what TransformerLens has for this model; --autocast is SAELens's `autocast_lm`.
"""

import argparse
import json
import os
import sys
import time
import warnings

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from sae_lens.training.activations_store import ActivationsStore  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformer_lens.model_bridge import TransformerBridge  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--hook", required=True)
    parser.add_argument("--check", required=True)
    parser.add_argument("--autocast", action="store_true")
    options = parser.parse_args()
    tokens = load_file(options.rows)["tokens"].long()
    hf = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with torch.no_grad():
        model = TransformerBridge.boot_transformers(options.model, hf_model=hf, tokenizer=tokenizer, device="cpu")
    store = ActivationsStore(
        model=model,
        dataset=Dataset.from_dict({"tokens": tokens.tolist()}),
        streaming=False,
        hook_name=options.hook,
        hook_head_index=None,
        context_size=tokens.shape[1],
        d_in=hf.config.hidden_size,
        n_batches_in_buffer=64,
        total_training_tokens=1,
        store_batch_size_prompts=16,
        train_batch_size_tokens=4096,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        autocast_lm=options.autocast,
    )
    with torch.no_grad():
        save_file({"acts": store.get_activations(tokens[:16]).float().contiguous()}, options.check)
        store.next_batch()
        tell({"ready": True})
        for line in sys.stdin:
            start, n = time.perf_counter(), 0
            for _ in range(int(line.split()[1])):
                n += store.next_batch().shape[0]
            tell({"seconds": time.perf_counter() - start, "tokens": n})


def tell(answer: dict) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
