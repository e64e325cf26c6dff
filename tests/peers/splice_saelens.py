"""What SAELens's SAETransformerBridge makes of SAEs in a model; runs in the peer's own environment.

    python splice_saelens.py MODEL_FOLDER TOKENS.safetensors OUT.safetensors SAE_FOLDER…

For the i-th SAE, float32: i.plain (its reconstruction in place), i.logits and i.acts_post, i.recons, i.error (with the
error term), i.clamped (with the error term, feature 7 at 30 at all positions but the first). `before`: without an SAE.
"""

import os
import sys
import warnings

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from sae_lens import SAE  # noqa: E402
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def clamp(acts: torch.Tensor, hook: object) -> torch.Tensor:
    acts = acts.clone()
    acts[:, 1:, 7] = 30.0
    return acts


@torch.no_grad()
def main(folder: str, tokens_file: str, out: str, *saes: str) -> None:
    tokens = load_file(tokens_file)["tokens"].long()
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = SAETransformerBridge.boot_transformers(folder, hf_model=hf, tokenizer=tokenizer, device="cpu")
    found = {"before": model(tokens)}
    for i, path in enumerate(saes):
        sae = SAE.load_from_disk(path)
        found[f"{i}.plain"] = model.run_with_saes(tokens, saes=[sae])
        logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=True)
        found[f"{i}.logits"] = logits
        for name in ("acts_post", "recons", "error"):
            found[f"{i}.{name}"] = cache[model.get_sae_hook_name(sae, f"hook_sae_{name}")]
        with model.saes(saes=[sae], use_error_term=True):
            hooks = [(model.get_sae_hook_name(sae), clamp)]
            found[f"{i}.clamped"] = model.run_with_hooks(tokens, fwd_hooks=hooks)
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
