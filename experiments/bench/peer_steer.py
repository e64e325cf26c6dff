"""SAELens's way to steer, in its own process: `use_error_term` and a hook on `hook_sae_acts_post`.

    python peer_steer.py --model FOLDER --sae FOLDER … --tokens FILE --feature 7 --amount 30 --out FILE
    stdin   "round N": N forwards of the last token's row for each SAE;  stdout: {"seconds": [one a SAE]}

The bridge runs TransformerLens's float32 model; each SAE is attached with its error term, its codes are clamped at all
positions but the first by a hook, as SAELens's tutorial on SAETransformerBridge has it. The logits of the given tokens
are written first.
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
from sae_lens import SAE  # noqa: E402
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--sae", nargs="+", required=True)
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--feature", type=int, required=True)
    parser.add_argument("--amount", type=float, required=True)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    tokens = load_file(options.tokens)["tokens"].long()
    hf = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = SAETransformerBridge.boot_transformers(options.model, hf_model=hf, tokenizer=tokenizer, device="cpu")
    saes = [SAE.load_from_disk(folder) for folder in options.sae]

    def clamp(acts: torch.Tensor, hook: object) -> torch.Tensor:
        acts = acts.clone()
        acts[:, 1:, options.feature] = options.amount
        return acts

    def logits(sae: SAE, rows: torch.Tensor) -> torch.Tensor:
        with model.saes(saes=[sae], use_error_term=True):
            return model.run_with_hooks(rows, fwd_hooks=[(model.get_sae_hook_name(sae), clamp)])

    save_file({f"logits.{i}": logits(sae, tokens).contiguous() for i, sae in enumerate(saes)}, options.out)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        n, seconds = int(line.split()[1]), []
        plain = 0.0
        start = time.perf_counter()
        for _ in range(n):
            model(tokens)
        plain = time.perf_counter() - start
        for sae in saes:
            start = time.perf_counter()
            for _ in range(n):
                logits(sae, tokens)
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"plain": plain, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
