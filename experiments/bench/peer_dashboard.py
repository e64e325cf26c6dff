"""SAEDashboard's top examples in its own process: SaeVisRunner over given token rows, one JSON file.

    python peer_dashboard.py --model FOLDER --sae FOLDER --task FILE --rows FILE --out FILE

The task (JSON) names hook, features, ignored tokens and size of the top group; --out gets, for each feature, the
runner's own top group as [row, position, activation], strongest first, activations as it keeps them (four decimals),
and the activations at the hook of the first rows, for parity. The model is TransformerLens's HookedTransformer over
the same float32 weights, processed in no way. Two things are ours. TransformerLens 2 knows no SmolLM2, so its
configuration is written down here (a Llama). And the runner folds decoder norms into the encoder, which SAELens 6.54
refuses for a TopK SAE like this one, so that the runner cannot read it as it is; here that one call does nothing.
"""

import argparse
import json
import os
import warnings
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from sae_dashboard.components import SequenceData  # noqa: E402
from sae_dashboard.components_config import (  # noqa: E402
    ActsHistogramConfig,
    Column,
    FeatureTablesConfig,
    LogitsHistogramConfig,
    LogitsTableConfig,
    SequencesConfig,
)
from sae_dashboard.layout import SaeVisLayoutConfig  # noqa: E402
from sae_dashboard.sae_vis_data import SaeVisConfig  # noqa: E402
from sae_dashboard.sae_vis_runner import SaeVisRunner  # noqa: E402
from sae_lens import SAE, HookedSAETransformer  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformer_lens import HookedTransformerConfig  # noqa: E402
from transformer_lens.pretrained.weight_conversions import convert_llama_weights  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

FEATURES_AT_ONCE = 32  # a group keeps whole rows of activations and logits, as Python lists


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "sae", "task", "rows", "out"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    options = parser.parse_args()
    task = json.loads(options.task.read_text())
    tokens = load_file(options.rows)["tokens"].long()
    model = hooked(options.model, tokens.shape[1])
    sae = SAE.load_from_disk(options.sae, device="cpu")
    sae.fold_W_dec_norm = lambda: None
    cache = options.out.with_suffix(".cache")
    found = {}
    for start in range(0, len(task["features"]), FEATURES_AT_ONCE):
        features = task["features"][start : start + FEATURES_AT_ONCE]
        config = SaeVisConfig(
            hook_point=task["hook"],
            features=features,
            minibatch_size_features=FEATURES_AT_ONCE,
            minibatch_size_tokens=16,
            ignore_tokens=set(task["ignored"]),
            ignore_positions=[0],
            ignore_high_activation_norm_multiple=task["norm_multiple"],
            feature_centric_layout=layout(task["group"]),
            cache_dir=cache,
        )
        data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
        for feature in features:
            group = data.feature_data_dict[feature].sequence_data.seq_group_data[0].seq_data
            found[feature] = [[s.original_index, s.qualifying_token_index, strength(s, tokens)] for s in group]
    options.out.write_text(json.dumps(found))
    first = torch.load(cache / "model_activations_0.pt")[task["hook"]]
    save_file({"acts": first.float().contiguous()}, options.out.with_suffix(".safetensors"))


def strength(sequence: SequenceData, tokens: torch.Tensor) -> float:
    """The activation at the position that the group names. Kept rows begin at position 1: the list is one shorter."""
    assert len(sequence.feat_acts) == tokens.shape[1] - 1, "SAEDashboard keeps rows from position 1 on"
    at = sequence.qualifying_token_index
    assert sequence.token_ids[at - 1] == tokens[sequence.original_index, at] or at == 0
    return sequence.feat_acts[at - 1] if at else 0.0  # position 0 is ignored


def layout(group: int) -> SaeVisLayoutConfig:
    """The default page with every position of a row allowed (its buffer of five at both ends off), no intervals."""
    sequences = SequencesConfig(buffer=None, n_quantiles=0, top_acts_group_size=group, stack_mode="stack-none")
    middle = (ActsHistogramConfig(), LogitsTableConfig(), LogitsHistogramConfig())
    return SaeVisLayoutConfig(columns=[Column(FeatureTablesConfig()), Column(*middle), Column(sequences)])


@torch.no_grad()
def hooked(folder: Path, context: int) -> HookedSAETransformer:
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # for its weights alone
    about = json.loads((folder / "config.json").read_text())
    config = HookedTransformerConfig(
        d_model=about["hidden_size"],
        d_head=about["head_dim"],
        n_heads=about["num_attention_heads"],
        n_key_value_heads=about["num_key_value_heads"],
        d_mlp=about["intermediate_size"],
        n_layers=about["num_hidden_layers"],
        n_ctx=context,
        eps=about["rms_norm_eps"],
        d_vocab=about["vocab_size"],
        act_fn=about["hidden_act"],
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=about["head_dim"],
        rotary_base=int(about["rope_parameters"]["rope_theta"]),
        final_rms=True,
        gated_mlp=True,
        original_architecture="LlamaForCausalLM",
        default_prepend_bos=False,
        device="cpu",
    )
    model = HookedSAETransformer(config)
    model.load_and_process_state_dict(
        convert_llama_weights(hf, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model


if __name__ == "__main__":
    main()
